//! Bytes to messages and back, within bounds.
//!
//! [`decode`] reads one frame into one or more messages of one direction;
//! every message is judged on its own, so one bad message in a `batch` costs
//! only itself. [`encode`] writes one message; [`batch`] joins several.

pub mod binary;
mod strict;

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use self::binary::{OUTPUT_HEADER_BYTES, OutputHeader};
use self::strict::Budget;
use crate::frame::Frame;
use crate::ids::RequestId;
use crate::limits::Limits;
use crate::message::{
    Direction, Envelope, ErasedPayload as _, ErrorCode, OutputJson, Refusal, TerminalOutput,
};

/// Latest time accepted in `ts`: the end of the year 9999.
pub const TS_MAX: u64 = 253_402_300_799_999;

/// Longest path of a field before its last name, in bytes.
const PATH_BYTES_MAX: usize = 200;

/// The bounds that decoding keeps.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Longest message, in bytes.
    pub message_bytes_max: usize,
    /// Longest terminal data, in bytes.
    pub chunk_bytes_max: usize,
    /// Deepest nesting of a message, its envelope being the first level.
    pub json_depth_max: u32,
    /// Most elements and members in the payload of one message, all levels
    /// together; as many in its envelope, where the payload counts as one.
    pub json_items_max: u32,
    /// Most messages in a batch.
    pub batch_messages_max: u32,
}

impl From<&Limits> for Rules {
    fn from(limits: &Limits) -> Self {
        Self {
            message_bytes_max: limits.message_bytes_max,
            chunk_bytes_max: limits.chunk_bytes_max,
            json_depth_max: limits.json_depth_max,
            json_items_max: limits.json_items_max,
            batch_messages_max: limits.batch_messages_max,
        }
    }
}

impl Rules {
    fn budget(self) -> Budget {
        Budget { depth_max: self.json_depth_max, items_max: self.json_items_max }
    }
}

/// Why a message could not be understood: the field, and the rule it breaks.
/// Neither repeats what the peer sent, but for names of fields, cut to 64
/// characters of printable ASCII.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeError {
    /// Path of the field, if it is about one: `payload.spec.run`.
    pub field: Option<String>,
    /// The rule.
    pub rule: Cow<'static, str>,
}

impl DecodeError {
    fn rule(rule: &'static str) -> Self {
        Self { field: None, rule: Cow::Borrowed(rule) }
    }

    fn field(field: &str, rule: &'static str) -> Self {
        Self { field: Some(field.into()), rule: Cow::Borrowed(rule) }
    }

    /// Puts the field inside another.
    fn within(mut self, outer: &str) -> Self {
        self.field = Some(match self.field {
            Some(inner) if inner.starts_with('[') => format!("{outer}{inner}"),
            Some(inner) => format!("{outer}.{inner}"),
            None => outer.into(),
        });
        self
    }

    fn from_json(error: &serde_json::Error, innermost_first: &[String]) -> Self {
        let mut path = String::new();
        for segment in innermost_first.iter().rev() {
            if path.len() + segment.len() > PATH_BYTES_MAX {
                break;
            }
            if !path.is_empty() && !segment.starts_with('[') {
                path.push('.');
            }
            path.push_str(segment);
        }
        let text = error.to_string();
        let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
        if !error.is_data() {
            // serde_json's syntax messages are fixed texts.
            return Self { field: None, rule: format!("must be JSON: {text}").into() };
        }
        let mut push = |name: &str| {
            if !path.is_empty() {
                path.push('.');
            }
            path.extend(printable(name));
        };
        let quoted = |prefix: &str| {
            text.strip_prefix(prefix).map(|rest| match rest.rsplit_once("`, expected") {
                Some((name, _)) => name.to_owned(),
                None => rest.trim_end_matches('`').split('`').next().unwrap_or(rest).to_owned(),
            })
        };
        let rule: Cow<'static, str> = if let Some(name) = quoted("missing field `") {
            push(&name);
            "is required".into()
        } else if let Some(name) = quoted("unknown field `") {
            push(&name);
            "is not a field here".into()
        } else if let Some(name) = quoted("duplicate field `") {
            push(&name);
            "must not stand twice".into()
        } else if text.starts_with("unknown variant `") {
            "is not a word here".into()
        } else if let Some((_, expected)) =
            text.strip_prefix("invalid ").and_then(|rest| rest.rsplit_once(", expected "))
        {
            expected_rule(expected)
        } else if let Some((name, rule)) =
            text.split_once(": ").filter(|(name, _)| is_field_name(name))
        {
            push(name);
            rule.to_owned().into()
        } else {
            text.to_owned().into()
        };
        Self { field: (!path.is_empty()).then_some(path), rule }
    }
}

/// What may be repeated of a name that a peer chose.
fn printable(name: &str) -> impl Iterator<Item = char> {
    name.chars().take(64).map(|c| if c.is_ascii_graphic() { c } else { '?' })
}

fn is_field_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    !text.is_empty() && text.bytes().all(allowed)
}

fn expected_rule(expected: &str) -> Cow<'static, str> {
    match expected {
        "u64" => "must be a whole number from 0 to 2^64 - 1".into(),
        "u32" => "must be a whole number from 0 to 4294967295".into(),
        "u16" => "must be a whole number from 0 to 65535".into(),
        "i32" => "must be a whole number of 32 bits".into(),
        "f64" => "must be a number".into(),
        "a sequence" => "must be an array".into(),
        "a map" => "must be an object".into(),
        other if other.starts_with("struct ") => "must be an object".into(),
        other => format!("must be {other}").into(),
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Some(field) => write!(f, "{field}: {}", self.rule),
            None => f.write_str(&self.rule),
        }
    }
}

impl std::error::Error for DecodeError {}

/// A message that could not be understood, and the request id it carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The `id`, where there was one to read.
    pub id: Option<RequestId>,
    /// What is wrong.
    pub error: DecodeError,
}

impl Invalid {
    fn new(error: DecodeError) -> Self {
        Self { id: None, error }
    }

    /// The answer to it.
    pub fn refusal(&self) -> Refusal {
        let refusal = Refusal::new(ErrorCode::InvalidMessage, self.error.to_string());
        Refusal { field: self.error.field.clone(), ..refusal }.reply_to(self.id.clone())
    }
}

/// A payload as it came, not yet read.
#[derive(Clone, Copy)]
pub struct Payload<'a> {
    raw: Option<&'a RawValue>,
    rules: Rules,
}

impl<'a> Payload<'a> {
    /// Reads it as a `T`. No payload is read as an empty object.
    pub(crate) fn read<T: Deserialize<'a>>(self) -> Result<T, DecodeError> {
        let text = self.raw.map_or("{}", RawValue::get);
        // The envelope is the first level of nesting.
        let budget = self.rules.budget();
        let budget = Budget { depth_max: budget.depth_max.saturating_sub(1), ..budget };
        strict::from_slice(text.as_bytes(), budget).map_err(|e| e.within("payload"))
    }
}

#[derive(Deserialize)]
struct RawEnvelope<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default)]
    id: Option<RequestId>,
    #[serde(default)]
    ts: Option<u64>,
    #[serde(default, borrow)]
    payload: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawBatch<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

/// Reads one frame. Each message in it is judged on its own; a frame that is
/// no message at all gives one [`Invalid`].
///
/// Memory: a small multiple of the frame, whatever it holds. A close frame
/// gives nothing.
pub fn decode<M: Direction>(frame: &Frame, rules: Rules) -> Vec<Result<Envelope<M>, Invalid>> {
    let one = |error| vec![Err(Invalid::new(error))];
    if frame.len() > rules.message_bytes_max {
        return one(DecodeError::rule("the message is longer than message_bytes_max"));
    }
    match frame {
        Frame::Close(_) => Vec::new(),
        Frame::Binary(bytes) => match decode_output(bytes, rules) {
            Ok((header, data)) => {
                let OutputHeader { stream, offset, channel } = header;
                let output = TerminalOutput { stream, offset, channel, data };
                match M::from_output(output) {
                    Some(message) => vec![Ok(Envelope::bare(message))],
                    None => one(DecodeError::rule("no binary message goes in this direction")),
                }
            }
            Err(error) => one(error),
        },
        Frame::Text(bytes) => decode_text(bytes, rules),
    }
}

/// Reads a binary `terminal:output`: its header and its payload, which shares
/// the frame's memory.
pub fn decode_output(frame: &Bytes, rules: Rules) -> Result<(OutputHeader, Bytes), DecodeError> {
    let header = binary::parse_output(frame)
        .map_err(|error| DecodeError { field: None, rule: error.to_string().into() })?;
    let payload = frame.slice(OUTPUT_HEADER_BYTES..);
    if payload.len() > rules.chunk_bytes_max {
        return Err(DecodeError::field("data", "is longer than chunk_bytes_max"));
    }
    Ok((header, payload))
}

fn decode_text<M: Direction>(json: &[u8], rules: Rules) -> Vec<Result<Envelope<M>, Invalid>> {
    let outer = match read_envelope(json, rules) {
        Ok(outer) => outer,
        Err(error) => return vec![Err(Invalid::new(error))],
    };
    if outer.kind != "batch" {
        return vec![read_message(outer, rules)];
    }
    let id = outer.id.clone();
    let whole = |error| vec![Err(Invalid { id: id.clone(), error })];
    let payload = Payload { raw: outer.payload, rules };
    let batch: RawBatch<'_> = match payload.read() {
        Ok(batch) => batch,
        Err(error) => return whole(error),
    };
    if batch.messages.len() > rules.batch_messages_max as usize {
        return whole(DecodeError::field("payload.messages", "has more than batch_messages_max"));
    }
    let inner = |(i, raw): (usize, &&RawValue)| {
        let outer = read_envelope(raw.get().as_bytes(), rules)
            .map_err(|e| Invalid::new(e.within(&format!("payload.messages[{i}]"))))?;
        if outer.kind == "batch" {
            return Err(Invalid::new(DecodeError::field("type", "a batch holds no batch")));
        }
        read_message(outer, rules)
    };
    batch.messages.iter().enumerate().map(inner).collect()
}

fn read_envelope(json: &[u8], rules: Rules) -> Result<RawEnvelope<'_>, DecodeError> {
    let envelope: RawEnvelope<'_> = strict::from_slice(json, rules.budget())?;
    if envelope.ts.is_some_and(|ts| ts > TS_MAX) {
        return Err(DecodeError::field("ts", "must be before the year 10000"));
    }
    Ok(envelope)
}

fn read_message<M: Direction>(
    outer: RawEnvelope<'_>,
    rules: Rules,
) -> Result<Envelope<M>, Invalid> {
    let payload = Payload { raw: outer.payload, rules };
    let message = match M::read(&outer.kind, payload) {
        Some(Ok(message)) => message,
        Some(Err(error)) => return Err(Invalid { id: outer.id, error }),
        None => {
            let error = DecodeError::field("type", "is not a type of this direction");
            return Err(Invalid { id: outer.id, error });
        }
    };
    let output = message.as_output().map(|output| &output.data);
    let data = output.or(message.as_input().map(|input| &input.data));
    if data.is_some_and(|data| data.len() > rules.chunk_bytes_max) {
        let error = DecodeError::field("payload.data", "is longer than chunk_bytes_max");
        return Err(Invalid { id: outer.id, error });
    }
    Ok(Envelope { id: outer.id, ts: outer.ts, message })
}

/// The `type` and `id` of a message, whatever its direction: for telling a
/// stranger what was wrong with its first words.
pub fn peek(frame: &Frame, rules: Rules) -> Option<(String, Option<RequestId>)> {
    match frame {
        Frame::Text(json) if json.len() <= rules.message_bytes_max => {
            let envelope = read_envelope(json, rules).ok()?;
            Some((envelope.kind.chars().take(64).collect(), envelope.id))
        }
        Frame::Text(_) | Frame::Binary(_) | Frame::Close(_) => None,
    }
}

/// Writes one message as JSON.
pub fn encode<M: Direction>(envelope: &Envelope<M>) -> Frame {
    let mut json = Vec::with_capacity(192);
    append(&mut json, envelope);
    Frame::Text(Bytes::from(json))
}

fn append<M: Direction>(json: &mut Vec<u8>, envelope: &Envelope<M>) {
    append_head(json, envelope.message.kind(), envelope.id.as_ref(), envelope.ts);
    envelope.message.payload().append_json(json);
    json.push(b'}');
}

fn append_head(json: &mut Vec<u8>, kind: &str, id: Option<&RequestId>, ts: Option<u64>) {
    // Types and ids have alphabets without anything to escape.
    json.extend_from_slice(b"{\"type\":\"");
    json.extend_from_slice(kind.as_bytes());
    json.push(b'"');
    if let Some(id) = id {
        json.extend_from_slice(b",\"id\":\"");
        json.extend_from_slice(id.as_str().as_bytes());
        json.push(b'"');
    }
    if let Some(ts) = ts {
        json.extend_from_slice(b",\"ts\":");
        json.extend_from_slice(ts.to_string().as_bytes());
    }
    json.extend_from_slice(b",\"payload\":");
}

/// Joins messages that are already encoded into one `batch` frame. The caller
/// keeps to `batch_messages_max` and `message_bytes_max`.
pub fn batch<'a>(messages: impl IntoIterator<Item = &'a Bytes>) -> Frame {
    let mut json = b"{\"type\":\"batch\",\"payload\":{\"messages\":[".to_vec();
    for (i, message) in messages.into_iter().enumerate() {
        if i > 0 {
            json.push(b',');
        }
        json.extend_from_slice(message);
    }
    json.extend_from_slice(b"]}}");
    Frame::Text(Bytes::from(json))
}

/// Writes `terminal:output` as JSON, from its parts.
pub fn encode_output_text(header: &OutputHeader, data: &[u8]) -> Bytes {
    let mut json = Vec::with_capacity(data.len() + 160);
    append_head(&mut json, "terminal:output", None, None);
    OutputJson::new(header.stream, header.offset, header.channel, data).append_json(&mut json);
    json.push(b'}');
    Bytes::from(json)
}

/// Writes `terminal:output` in its binary form.
pub fn encode_output(output: &TerminalOutput) -> Frame {
    let TerminalOutput { stream, offset, channel, data } = output;
    let header = OutputHeader { stream: *stream, offset: *offset, channel: *channel };
    Frame::Binary(binary::encode_output(&header, data))
}
