//! Bytes inside JSON: `data` where they are valid UTF-8, `data_base64`
//! (RFC 4648 §4, padded) otherwise. Exactly one of the two is present.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;

/// Reads the one of the two fields that is present.
pub(super) fn decode(
    data: Option<Cow<'_, str>>,
    base64: Option<Cow<'_, str>>,
) -> Result<Bytes, &'static str> {
    match (data, base64) {
        (Some(text), None) => Ok(Bytes::from(text.into_owned())),
        (None, Some(text)) => STANDARD
            .decode(text.as_bytes())
            .map(Bytes::from)
            .map_err(|_| "data_base64: must be padded base64"),
        (None, None) => Err("data: either data or data_base64 is required"),
        (Some(_), Some(_)) => Err("data: only one of data and data_base64 may be present"),
    }
}

/// Chooses the field: `(data, data_base64)`.
pub(super) fn encode(bytes: &[u8]) -> (Option<Cow<'_, str>>, Option<Cow<'_, str>>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(Cow::Borrowed(text)), None),
        Err(_) => (None, Some(Cow::Owned(STANDARD.encode(bytes)))),
    }
}
