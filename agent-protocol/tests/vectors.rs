//! The golden vectors: what is understood, what is written, what is refused.
//!
//! The files are the truth; nothing here writes them. Their format is told in
//! `vectors/README.md`.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use trunkline_protocol::codec::{self, DecodeError, Invalid, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::RequestId;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentToHub, DashboardToHub, Direction, Envelope, Greeting, HubToAgent, HubToDashboard,
};

// ---- the vectors of each direction -----------------------------------------

#[test]
fn greetings() {
    check::<Greeting>(include_str!("../vectors/greeting.json"));
}

#[test]
fn agent_to_hub() {
    check::<AgentToHub>(include_str!("../vectors/agent-to-hub.json"));
}

#[test]
fn hub_to_agent() {
    check::<HubToAgent>(include_str!("../vectors/hub-to-agent.json"));
}

#[test]
fn dashboard_to_hub() {
    check::<DashboardToHub>(include_str!("../vectors/dashboard-to-hub.json"));
}

#[test]
fn hub_to_dashboard() {
    check::<HubToDashboard>(include_str!("../vectors/hub-to-dashboard.json"));
}

fn check<M: Direction + Clone + PartialEq + std::fmt::Debug>(file: &str) {
    let vectors: Vec<Vector> = serde_json::from_str(file).unwrap();
    for vector in &vectors {
        let name = &vector.name;
        let messages = read::<M>(&text(&vector.json))
            .into_iter()
            .map(|message| message.unwrap_or_else(|e| panic!("{name}: {}", e.error)))
            .collect::<Vec<_>>();

        assert_eq!(messages.len(), vector.meaning.len(), "{name}");
        for (message, meaning) in messages.iter().zip(&vector.meaning) {
            assert_means(name, message, meaning);
        }

        let written = match &messages[..] {
            [one] if vector.kind != "batch" => content(codec::encode(one)),
            several => {
                let each: Vec<Bytes> = several.iter().map(|m| content(codec::encode(m))).collect();
                content(codec::batch(&each))
            }
        };
        assert_eq!(String::from_utf8_lossy(&written), vector.json, "{name}");

        let output = messages.first().and_then(|message| message.message.as_output());
        if let Some(binary) = &vector.binary_hex {
            let binary = Frame::Binary(hex(binary));
            assert_eq!(codec::encode_output(output.unwrap()), binary, "{name}");
            let [Ok(same)] = &read::<M>(&binary)[..] else { panic!("{name}: not read as binary") };
            assert_eq!(*same, messages[0], "{name}");
        } else if let (Some(_), [one]) = (output, &messages[..]) {
            assert!(vector.kind == "batch" || one.id.is_some(), "{name}: has a binary form");
        }
    }

    for kind in M::TYPES {
        let examples = vectors.iter().filter(|vector| vector.kind == *kind).count();
        assert!(examples >= 2, "{kind}: {examples} vectors; a minimal and a full one are wanted");
    }
    let names: BTreeSet<&str> = vectors.iter().map(|vector| vector.name.as_str()).collect();
    assert_eq!(names.len(), vectors.len(), "names tell vectors apart");
}

/// What is written says what the vector means, and leaves out only defaults.
fn assert_means<M: Direction>(name: &str, message: &Envelope<M>, meaning: &Meaning) {
    assert_eq!(message.message.kind(), meaning.kind, "{name}");
    assert_eq!(message.id.as_ref().map(RequestId::as_str), meaning.id.as_deref(), "{name}");
    assert_eq!(message.ts, meaning.ts, "{name}");
    let written: Value = serde_json::from_slice(&content(codec::encode(message))).unwrap();
    assert_same(name, &plain(&written["payload"]), &meaning.payload);
    if let Some(output) = message.message.as_output() {
        assert_eq!(hex(meaning.payload["data_hex"].as_str().unwrap()), output.data, "{name}");
    }
    if let Some(input) = message.message.as_input() {
        assert_eq!(hex(meaning.payload["data_hex"].as_str().unwrap()), input.data, "{name}");
    }
}

fn assert_same(name: &str, written: &Value, meant: &Value) {
    match (written, meant) {
        (Value::Object(written), Value::Object(meant)) => {
            for key in written.keys() {
                assert!(meant.contains_key(key), "{name}: {key} is not meant");
            }
            for (key, meant) in meant {
                match written.get(key) {
                    Some(written) => assert_same(&format!("{name}: {key}"), written, meant),
                    None => assert!(is_default(meant), "{name}: {key} was lost"),
                }
            }
        }
        (Value::Array(written), Value::Array(meant)) => {
            assert_eq!(written.len(), meant.len(), "{name}");
            for (written, meant) in written.iter().zip(meant) {
                assert_same(name, written, meant);
            }
        }
        (written, meant) => assert_eq!(written, meant, "{name}"),
    }
}

/// Whether a member with this value may be left out.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_default),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    }
}

/// A payload with the bytes of a terminal as hex digits.
fn plain(payload: &Value) -> Value {
    use base64::Engine as _;
    let Value::Object(members) = payload else { return payload.clone() };
    let mut members = members.clone();
    let data = members.remove("data").map(|text| text.as_str().unwrap().as_bytes().to_vec());
    let base64 = members.remove("data_base64").map(|text| {
        base64::engine::general_purpose::STANDARD.decode(text.as_str().unwrap()).unwrap()
    });
    if let Some(data) = data.or(base64) {
        members.insert("data_hex".into(), hex_of(&data).into());
    }
    Value::Object(members)
}

// ---- what is tolerated ------------------------------------------------------

#[test]
fn what_nobody_here_writes_is_understood() {
    let vectors: Vec<Tolerated> =
        serde_json::from_str(include_str!("../vectors/tolerated.json")).unwrap();
    for vector in &vectors {
        match vector.direction.as_str() {
            "greeting" => tolerates::<Greeting>(vector),
            "agent-to-hub" => tolerates::<AgentToHub>(vector),
            "hub-to-agent" => tolerates::<HubToAgent>(vector),
            "dashboard-to-hub" => tolerates::<DashboardToHub>(vector),
            "hub-to-dashboard" => tolerates::<HubToDashboard>(vector),
            other => panic!("{other} is no direction"),
        }
    }
}

fn tolerates<M: Direction + PartialEq + std::fmt::Debug>(vector: &Tolerated) {
    let name = &vector.name;
    let frame = match (&vector.json, &vector.parts) {
        (Some(json), None) => text(json),
        (None, Some(parts)) => text(&joined(parts)),
        _ => panic!("{name}: either json or parts"),
    };
    let messages: Vec<Envelope<M>> = read(&frame)
        .into_iter()
        .map(|message| message.unwrap_or_else(|e| panic!("{name}: {}", e.error)))
        .collect();
    let times = vector.times.unwrap_or(1);
    assert_eq!(messages.len(), times, "{name}");
    if vector.reads_as_itself {
        return;
    }
    let reads_as = vector.reads_as.as_ref().or(vector.reads_as_each.as_ref()).unwrap();
    for message in &messages {
        assert_eq!(String::from_utf8_lossy(&content(codec::encode(message))), *reads_as, "{name}");
    }
}

// ---- what is refused ----------------------------------------------------------

#[test]
fn what_breaks_a_rule_is_refused_by_field_and_rule() {
    let vectors: Vec<Refused> =
        serde_json::from_str(include_str!("../vectors/invalid.json")).unwrap();
    for vector in &vectors {
        match vector.direction.as_str() {
            "greeting" => refuses::<Greeting>(vector),
            "agent-to-hub" => refuses::<AgentToHub>(vector),
            "hub-to-agent" => refuses::<HubToAgent>(vector),
            "dashboard-to-hub" => refuses::<DashboardToHub>(vector),
            "hub-to-dashboard" => refuses::<HubToDashboard>(vector),
            other => panic!("{other} is no direction"),
        }
    }
}

fn refuses<M: Direction + std::fmt::Debug>(vector: &Refused) {
    let name = &vector.name;
    let frame = vector.frame();
    let (good, bad): (Vec<_>, Vec<_>) = read::<M>(&frame).into_iter().partition(Result::is_ok);
    assert_eq!(good.len(), vector.valid_beside_it.unwrap_or(0), "{name}");
    let [Err(invalid)] = &bad[..] else { panic!("{name}: was understood as {bad:?}") };
    let Invalid { id, error: DecodeError { field, rule } } = invalid;
    assert_eq!(*field, vector.field, "{name}: {rule}");
    assert!(rule.contains(&vector.rule), "{name}: {rule}");
    assert_eq!(id.as_ref().map(RequestId::as_str), vector.id.as_deref(), "{name}");
    assert_repeats_nothing(name, &frame, invalid);
}

/// Names of fields apart, an answer holds nothing that the peer chose.
fn assert_repeats_nothing(name: &str, frame: &Frame, invalid: &Invalid) {
    let refusal = invalid.refusal();
    assert_eq!(refusal.field, invalid.error.field, "{name}");
    assert_eq!(refusal.in_reply_to, invalid.id, "{name}");
    let rule = &invalid.error.rule;
    let said = refusal.message.strip_suffix(rule.as_ref()).unwrap();
    assert_eq!(
        said,
        invalid.error.field.as_ref().map_or(String::new(), |field| format!("{field}: "))
    );
    assert!(refusal.message.len() <= 400, "{name}: {}", refusal.message);
    assert!(refusal.message.bytes().all(|b| (b' '..=b'~').contains(&b)), "{name}: {refusal:?}");
    // No string value of the input stands in the rule. (Short ones and words
    // of our own do by chance.)
    if let Frame::Text(json) = frame
        && let Ok(value) = serde_json::from_slice::<Value>(json)
    {
        let mut values = Vec::new();
        strings(&value, &mut values);
        for value in values.iter().filter(|value| value.len() > 5) {
            assert!(!rule.contains(value.as_str()), "{name}: {rule}");
        }
    }
}

fn strings(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(list) => list.iter().for_each(|value| strings(value, found)),
        Value::Object(map) => map.values().for_each(|value| strings(value, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[test]
fn a_name_that_a_peer_chose_is_cut_wherever_it_stands() {
    let name = format!("\u{1b}[2J{}", "x".repeat(10_000));
    let name = serde_json::to_string(&name).unwrap();
    let deep = format!("{{{name}:").repeat(40) + "1" + &"}".repeat(40);
    for payload in [
        deep,
        format!("{{{name}:1e999}}"),
        format!("{{\"terminals\":[{{{name}:1}}]}}"),
        format!("{{\"terminals\":[{{\"agent\":\"a\",\"positions\":{{{name}:1}}}}]}}"),
        format!("{{\"terminals\":[{{\"agent\":{name}}}]}}"),
        format!("{{\"terminals\":[{{\"agent\":\"a\",\"from\":{name}}}]}}"),
        format!("{{\"terminals\":{name}}}"),
    ] {
        let frame = text(&format!("{{\"type\":\"subscribe\",\"payload\":{payload}}}"));
        let [Err(invalid)] = &read::<DashboardToHub>(&frame)[..] else { panic!("{payload}") };
        assert_repeats_nothing(&payload, &frame, invalid);
    }
}

// ---- the files ----------------------------------------------------------------

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    json: String,
    binary_hex: Option<String>,
    meaning: Vec<Meaning>,
    #[serde(rename = "notes")]
    _notes: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Meaning {
    #[serde(rename = "type")]
    kind: String,
    id: Option<String>,
    ts: Option<u64>,
    payload: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tolerated {
    name: String,
    direction: String,
    json: Option<String>,
    parts: Option<Vec<(String, usize)>>,
    reads_as: Option<String>,
    reads_as_each: Option<String>,
    times: Option<usize>,
    #[serde(default)]
    reads_as_itself: bool,
    #[serde(rename = "notes")]
    _notes: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    name: String,
    direction: String,
    text: Option<String>,
    text_hex: Option<String>,
    binary_hex: Option<String>,
    parts: Option<Vec<(String, usize)>>,
    parts_are: Option<String>,
    field: Option<String>,
    rule: String,
    id: Option<String>,
    valid_beside_it: Option<usize>,
}

impl Refused {
    fn frame(&self) -> Frame {
        match (&self.text, &self.text_hex, &self.binary_hex, &self.parts) {
            (Some(json), None, None, None) => text(json),
            (None, Some(bytes), None, None) => Frame::Text(hex(bytes)),
            (None, None, Some(bytes), None) => Frame::Binary(hex(bytes)),
            (None, None, None, Some(parts)) => match self.parts_are.as_deref() {
                None => text(&joined(parts)),
                Some("binary_hex") => Frame::Binary(hex(&joined(parts))),
                Some(other) => panic!("{}: parts are {other}", self.name),
            },
            _ => panic!("{}: one form of input", self.name),
        }
    }
}

fn read<M: Direction>(frame: &Frame) -> Vec<Result<Envelope<M>, Invalid>> {
    codec::decode(frame, Rules::from(&Limits::default()))
}

fn text(json: &str) -> Frame {
    Frame::Text(Bytes::copy_from_slice(json.as_bytes()))
}

fn joined(parts: &[(String, usize)]) -> String {
    parts.iter().map(|(part, times)| part.repeat(*times)).collect()
}

fn content(frame: Frame) -> Bytes {
    match frame {
        Frame::Text(bytes) | Frame::Binary(bytes) => bytes,
        Frame::Close(close) => panic!("not a message: {close}"),
    }
}

fn hex(digits: &str) -> Bytes {
    assert!(digits.len().is_multiple_of(2), "{digits}");
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        write!(digits, "{byte:02x}").unwrap();
        digits
    })
}
