//! Links over plain HTTP, for where no WebSocket comes through: what stands in a
//! request's body, and what its headers are called.
//!
//! A link is opened by a `POST`; its peer sends with further ones, each of the
//! next number, and receives with `GET`s, each of which asks for the batch of
//! the next number and thereby says that it has the one before. Whoever lost an
//! answer asks with the same number again and gets the same: so nothing is lost,
//! and nothing comes twice, in whatever way the network breaks.
//!
//! The body of both is a *batch*: frames one after the other, each a kind in one
//! byte (1 text, 2 binary, 3 close), a length in four, most significant first,
//! and that many bytes. Those of a close are its code in two, most significant
//! first, and its reason in UTF-8.

use bytes::{Buf as _, Bytes};

use crate::close::CloseCode;
use crate::frame::{Close, Frame};

/// The header that names a link: in the answer to the request that opens it, and
/// in every one about it. A secret of the two.
pub const LINK_HEADER: &str = "trunkline-link";

/// The header that numbers a batch, from 1 on in each direction.
pub const BATCH_HEADER: &str = "trunkline-batch";

/// What the body is.
pub const CONTENT_TYPE: &str = "application/octet-stream";

/// Most frames in one batch.
pub const BATCH_FRAMES_MAX: usize = 100;

/// Bytes before the content of each frame.
pub const FRAME_HEADER_BYTES: usize = 5;

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 3;

/// Why bytes are no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// It ends within a frame.
    #[error("a frame ends before its length")]
    Short,
    /// A kind that there is not.
    #[error("a frame is text (1), binary (2) or a close (3), and not {0}")]
    Kind(u8),
    /// A frame beyond the bound that was asked for.
    #[error("a frame is longer than it may be")]
    TooLong,
    /// More than [`BATCH_FRAMES_MAX`].
    #[error("a batch has at most {BATCH_FRAMES_MAX} frames")]
    TooMany,
    /// A text that is none.
    #[error("a text frame must be UTF-8")]
    NotUtf8,
    /// Something follows on a close, or the close has no code.
    #[error("a close is the last frame, of two bytes or more, in UTF-8 from the third on")]
    Close,
}

/// Appends a frame to a batch.
///
/// # Panics
///
/// If it is longer than 4 GiB.
pub fn append(batch: &mut Vec<u8>, frame: &Frame) {
    let mut put = |kind: u8, parts: [&[u8]; 2]| {
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let length = u32::try_from(length).expect("a frame is no longer than its limit");
        batch.push(kind);
        batch.extend_from_slice(&length.to_be_bytes());
        for part in parts {
            batch.extend_from_slice(part);
        }
    };
    match frame {
        Frame::Text(text) => put(TEXT, [text, b""]),
        Frame::Binary(bytes) => put(BINARY, [bytes, b""]),
        Frame::Close(close) => {
            put(CLOSE, [&close.code.number().to_be_bytes(), close.reason.as_bytes()]);
        }
    }
}

/// The frames of a batch, none of them longer than `frame_bytes_max`. They share
/// the memory of `body`.
///
/// # Errors
///
/// With the first thing that is wrong; nothing is taken then.
pub fn read(mut body: Bytes, frame_bytes_max: usize) -> Result<Vec<Frame>, BatchError> {
    let mut frames: Vec<Frame> = Vec::new();
    while !body.is_empty() {
        if frames.len() >= BATCH_FRAMES_MAX {
            return Err(BatchError::TooMany);
        }
        if matches!(frames.last(), Some(Frame::Close(_))) {
            return Err(BatchError::Close);
        }
        if body.len() < FRAME_HEADER_BYTES {
            return Err(BatchError::Short);
        }
        let kind = body.get_u8();
        if ![TEXT, BINARY, CLOSE].contains(&kind) {
            return Err(BatchError::Kind(kind));
        }
        let length = usize::try_from(body.get_u32()).unwrap_or(usize::MAX);
        if length > frame_bytes_max {
            return Err(BatchError::TooLong);
        }
        if length > body.len() {
            return Err(BatchError::Short);
        }
        let content = body.split_to(length);
        frames.push(match kind {
            TEXT if std::str::from_utf8(&content).is_err() => return Err(BatchError::NotUtf8),
            TEXT => Frame::Text(content),
            BINARY => Frame::Binary(content),
            _ => Frame::Close(close(content)?),
        });
    }
    Ok(frames)
}

fn close(mut content: Bytes) -> Result<Close, BatchError> {
    if content.len() < 2 {
        return Err(BatchError::Close);
    }
    let code = CloseCode::from_number(content.get_u16());
    let reason = std::str::from_utf8(&content).map_err(|_| BatchError::Close)?;
    Ok(Close::new(code, reason))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(frames: &[Frame]) -> Bytes {
        let mut batch = Vec::new();
        for frame in frames {
            append(&mut batch, frame);
        }
        batch.into()
    }

    #[test]
    fn a_batch_has_the_form_that_is_documented() {
        let frames = [
            Frame::Text(Bytes::from_static(b"{}")),
            Frame::Binary(Bytes::new()),
            Frame::Close(Close::new(CloseCode::Restart, "soon")),
        ];
        let expected = b"\x01\0\0\0\x02{}\x02\0\0\0\0\x03\0\0\0\x06\x03\xf4soon";
        assert_eq!(batch(&frames), &expected[..]);
        assert_eq!(read(Bytes::from_static(expected), 6), Ok(frames.to_vec()));
        assert_eq!(read(Bytes::new(), 0), Ok(vec![]));
    }

    #[test]
    fn what_is_none_says_why() {
        for (body, expected) in [
            (&b"\x01"[..], BatchError::Short),
            (b"\x01\0\0\0", BatchError::Short),
            (b"\x01\0\0\0\x02{", BatchError::Short),
            (b"\x01\0\0\0\x0b0123456789x", BatchError::TooLong),
            (b"\x01\xff\xff\xff\xff", BatchError::TooLong),
            (b"\0\0\0\0\0", BatchError::Kind(0)),
            (b"\x04\0\0\0\0", BatchError::Kind(4)),
            (b"[[[[[[", BatchError::Kind(b'[')),
            (b"\x01\0\0\0\x01\xff", BatchError::NotUtf8),
            (b"\x03\0\0\0\x01\x03", BatchError::Close),
            (b"\x03\0\0\0\x03\x03\xf4\xff", BatchError::Close),
            (b"\x03\0\0\0\x02\x03\xf4\x01\0\0\0\0", BatchError::Close),
            (&b"\x01\0\0\0\0".repeat(101), BatchError::TooMany),
        ] {
            let body = Bytes::copy_from_slice(body);
            assert_eq!(read(body.clone(), 10), Err(expected), "{body:?}");
        }
        assert_eq!(read(Bytes::from(b"\x01\0\0\0\0".repeat(100)), 10).map(|it| it.len()), Ok(100));
    }

    proptest! {
        #[test]
        fn what_was_put_comes_out(
            contents in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 0..100),
            is_closed in any::<bool>(),
        ) {
            let mut frames: Vec<Frame> = contents
                .into_iter()
                .map(|(text, bytes)| if text { Frame::Text(String::from_utf8_lossy(&bytes).into_owned().into()) } else { Frame::Binary(bytes.into()) })
                .collect();
            if is_closed && frames.len() < BATCH_FRAMES_MAX {
                frames.push(Frame::Close(Close::new(CloseCode::Normal, "goodbye")));
            }
            prop_assert_eq!(read(batch(&frames), 900), Ok(frames));
        }

        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frames) = read(bytes.clone().into(), 100) {
                prop_assert_eq!(read(batch(&frames), 300), Ok(frames));
            }
        }
    }
}
