//! The documents say what the code does: every message, member, code and
//! limit, and every line of the conversations.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use trunkline_protocol::close::{Advice, CloseCode};
use trunkline_protocol::codec::{Rules, decode};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::limits::{GREETING_BYTES_MAX, HELD_MAX, Limits};
use trunkline_protocol::message::{
    AgentToHub, CommandStatus, DashboardToHub, Direction, ErrorCode, Greeting, HubToAgent,
    HubToDashboard, InterruptStage, Lag, Presence, Refusal,
};

/// A direction as the reference writes it, with its vectors.
const DIRECTIONS: [(&str, &[&str], &str); 5] = [
    ("greeting", Greeting::TYPES, include_str!("../vectors/greeting.json")),
    ("agent → hub", AgentToHub::TYPES, include_str!("../vectors/agent-to-hub.json")),
    ("hub → agent", HubToAgent::TYPES, include_str!("../vectors/hub-to-agent.json")),
    ("dashboard → hub", DashboardToHub::TYPES, include_str!("../vectors/dashboard-to-hub.json")),
    ("hub → dashboard", HubToDashboard::TYPES, include_str!("../vectors/hub-to-dashboard.json")),
];

#[test]
fn the_reference_has_every_message_of_every_direction_and_no_other() {
    let protocol = document("protocol.md");
    for (direction, types, _) in DIRECTIONS {
        let told: BTreeSet<&str> = reference(&protocol)
            .filter(|(_, directions, _)| directions.contains(&direction))
            .map(|(kind, _, _)| kind)
            .collect();
        assert_eq!(told, types.iter().copied().collect(), "{direction}");
    }
    for (kind, directions, _) in reference(&protocol) {
        for direction in directions {
            assert!(
                DIRECTIONS.iter().any(|(known, _, _)| *known == direction),
                "{kind}: {direction}"
            );
        }
    }
}

#[test]
fn every_message_that_is_named_anywhere_exists() {
    for name in ["protocol.md", "errors.md"] {
        for word in document(name).split('`').skip(1).step_by(2) {
            let is_type = word.split_once(':').is_some_and(|(noun, verb)| {
                let letters = |text: &str| {
                    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
                };
                letters(noun) && letters(verb)
            });
            let known = DIRECTIONS.iter().any(|(_, types, _)| types.contains(&word));
            assert!(!is_type || known || word == "noun:verb", "{name}: {word}");
        }
    }
}

#[test]
fn every_member_is_told_where_its_message_is() {
    let protocol = document("protocol.md");
    let shared = section(&protocol, "### Shared objects");
    for (direction, _, file) in DIRECTIONS {
        let vectors: Vec<BTreeMap<String, Value>> = serde_json::from_str(file).unwrap();
        for meaning in vectors.iter().flat_map(|vector| vector["meaning"].as_array().unwrap()) {
            let kind = meaning["type"].as_str().unwrap();
            let (_, _, told) = reference(&protocol)
                .find(|(told, directions, _)| *told == kind && directions.contains(&direction))
                .unwrap_or_else(|| panic!("{kind} is not in the reference"));
            for (member, value) in meaning["payload"].as_object().unwrap() {
                let member = if member == "data_hex" { "data_base64" } else { member };
                assert!(told.contains(&format!("`{member}`")), "{kind}: {member}");
                // What is inside is told there, or with the shared objects, or
                // with the limits.
                let mut inner = BTreeSet::new();
                names(member, value, &mut inner);
                for name in inner {
                    let name = format!("`{name}`");
                    let is_told = told.contains(&name)
                        || shared.contains(&name)
                        || section(&protocol, "## Limits").contains(&name);
                    assert!(is_told, "{kind}: {member}: {name}");
                }
            }
        }
    }
}

/// Names of members within `member`, but for the keys of maps that anybody may
/// choose.
fn names(member: &str, value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|value| names(member, value, found)),
        Value::Object(_) if ["env", "figures", "positions", "fields"].contains(&member) => {}
        Value::Object(map) => {
            for (name, value) in map {
                found.insert(name.clone());
                names(name, value, found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn both_tables_have_every_close_code_with_its_advice() {
    for name in ["protocol.md", "errors.md"] {
        let document = document(name);
        let rows: Vec<&str> = document
            .lines()
            .filter(|line| {
                let code = line.strip_prefix("| ").and_then(|rest| rest.split(' ').next());
                code.is_some_and(|code| code.len() == 4 && code.parse::<u16>().is_ok())
            })
            .collect();
        for code in CloseCode::ALL {
            let head = format!("| {} | `{}` |", code.number(), code.as_str());
            let advice = match code.advice() {
                Advice::Reconnect => "| reconnect |".to_owned(),
                Advice::After(after) => format!("| after {} s |", after.as_secs()),
                Advice::WithNewToken => "| with a new token |".to_owned(),
                Advice::Never => "| never |".to_owned(),
            };
            let row = rows.iter().find(|row| row.starts_with(&head));
            let row = row.unwrap_or_else(|| panic!("{name}: {head}"));
            assert!(row.contains(&advice), "{name}: {head} {advice}");
        }
        assert_eq!(rows.len(), CloseCode::ALL.len(), "{name}");
    }
}

#[test]
fn both_tables_have_every_error_code() {
    // Told from one to the next, so that a code that is added and not told
    // does not compile.
    let next = |code: &ErrorCode| match code {
        ErrorCode::InvalidMessage => Some(ErrorCode::Forbidden),
        ErrorCode::Forbidden => Some(ErrorCode::NotFound),
        ErrorCode::NotFound => Some(ErrorCode::Unauthorized),
        ErrorCode::Unauthorized => Some(ErrorCode::UnsupportedProtocol),
        ErrorCode::UnsupportedProtocol => Some(ErrorCode::QueueFull),
        ErrorCode::QueueFull => Some(ErrorCode::QueueUnavailable),
        ErrorCode::QueueUnavailable => Some(ErrorCode::Conflict),
        ErrorCode::Conflict => Some(ErrorCode::AgentOffline),
        ErrorCode::AgentOffline => Some(ErrorCode::NotRunning),
        ErrorCode::NotRunning => Some(ErrorCode::LimitReached),
        ErrorCode::LimitReached => Some(ErrorCode::RateLimited),
        ErrorCode::RateLimited => Some(ErrorCode::Unsupported),
        ErrorCode::Unsupported => Some(ErrorCode::Draining),
        ErrorCode::Draining => Some(ErrorCode::Internal),
        ErrorCode::Internal | ErrorCode::Other(_) => None,
    };
    let all: Vec<ErrorCode> =
        std::iter::successors(Some(ErrorCode::InvalidMessage), next).collect();
    for name in ["protocol.md", "errors.md"] {
        let document = document(name);
        for code in &all {
            let recoverable = match code {
                ErrorCode::NotRunning => "as it says",
                code if Refusal::new(code.clone(), "").recoverable => "yes",
                _ => "no",
            };
            let row = format!("\n| `{code}` | {recoverable} |");
            assert!(document.contains(&row), "{name}: {row}");
        }
    }
}

#[test]
fn the_lists_of_closed_words_are_whole() {
    let protocol = document("protocol.md");
    let has_rows = |words: &mut dyn Iterator<Item = String>| {
        for word in words {
            assert!(protocol.contains(&format!("\n| `{word}` |")), "{word}");
        }
    };
    has_rows(&mut CommandStatus::ALL.iter().map(ToString::to_string));
    has_rows(&mut Presence::ALL.iter().map(ToString::to_string));
    has_rows(&mut InterruptStage::ALL.iter().map(ToString::to_string));
    has_rows(&mut Lag::ALL.iter().map(ToString::to_string));
}

#[test]
fn the_table_of_transitions_is_that_of_the_code() {
    let protocol = document("protocol.md");
    let (_, table) = protocol.split_once("| from | to |").unwrap();
    for from in CommandStatus::ALL.iter().filter(|status| !status.is_final()) {
        let row = table.lines().find(|line| line.starts_with(&format!("| `{from}` |"))).unwrap();
        let told: BTreeSet<&str> = row.split('`').skip(3).step_by(2).collect();
        let real = CommandStatus::ALL.iter().filter(|to| from.may_become(**to));
        assert_eq!(told, real.map(|status| status.as_str()).collect(), "{from}");
    }
}

#[test]
fn limits_are_as_told() {
    let protocol = document("protocol.md");
    let limits = Limits::default();
    let link = limits.for_link();
    for (name, value) in [
        ("message_bytes_max", link.message_bytes_max),
        ("chunk_bytes_max", link.chunk_bytes_max),
        ("batch_messages_max", link.batch_messages_max.into()),
        ("grant_bytes", link.grant_bytes),
        ("queue_per_agent", link.queue_per_agent.into()),
        ("input_bytes_ahead", link.input_bytes_ahead),
    ] {
        assert!(protocol.contains(&format!("\n| `{name}` | {value} |")), "{name} {value}");
    }
    let millis = |duration: Duration| duration.as_millis();
    let rates = link.rates;
    for (name, rate) in [
        ("requests", rates.requests),
        ("interrupts", rates.interrupts),
        ("input", rates.input),
        ("messages", rates.messages),
    ] {
        let told = format!("| `{name}` | every {} ms, burst {} |", millis(rate.every), rate.burst);
        assert!(protocol.contains(&told), "{told}");
    }
    for told in [
        format!(
            "`idle_ms` {}, `timeout_ms` {}",
            millis(limits.agent_idle),
            millis(limits.agent_timeout)
        ),
        format!(
            "`idle_ms` {}, `timeout_ms` {}",
            millis(limits.dashboard_idle),
            millis(limits.dashboard_timeout)
        ),
        format!(
            "| messages in a row that cannot be understood | {} |",
            limits.invalid_messages_max
        ),
        format!("at most {} levels deep", limits.json_depth_max),
        format!("| finished commands listed per agent | {} |", limits.finished_per_agent),
    ] {
        assert!(protocol.contains(&told), "{told}");
    }
    assert_eq!(limits.json_items_max, 16_384, "told as 16,384");
    assert_eq!(GREETING_BYTES_MAX, 16 * 1024, "told as 16 KiB");
    assert_eq!(HELD_MAX, 1024, "told as 1,024");
    assert_eq!(limits.spec_bytes_max, 64 * 1024, "told as 64 KiB");
    assert_eq!(limits.log_bytes_per_stream, 8 * 1024 * 1024, "told as 8 MiB");
    assert_eq!(limits.log_bytes_per_tenant, 128 * 1024 * 1024, "told as 128 MiB");
    assert_eq!(limits.command_bytes_per_tenant, 64 * 1024 * 1024, "told as 64 MiB");
    assert_eq!(limits.streams_per_tenant, 16 * 1024, "told as 16,384");
    assert_eq!(limits.log_bytes_total, 256 * 1024 * 1024, "told as 256 MiB");
    assert_eq!(limits.log_retention, Duration::from_secs(15 * 60), "told as 15 min");
    assert_eq!(limits.control_bytes_max, 4 * 1024 * 1024, "told as 4 MiB");
    assert_eq!(limits.subscriptions_max, 1024, "told as 1,024");
    assert_eq!(limits.answers_max, 256, "told as 256");
    assert_eq!(limits.greeting_timeout, Duration::from_secs(5), "told as 5 s");
    assert_eq!(limits.agent_grace, Duration::from_secs(5), "told as 5 s");
    assert_eq!(limits.agent_retention, Duration::from_secs(24 * 3600), "told as 24 h");
    assert_eq!(limits.refresh_ahead, Duration::from_secs(60), "told as 60 s");
    assert_eq!(limits.refresh_grace, Duration::from_secs(30), "told as 30 s");
    assert_eq!(limits.deliver_within, Duration::from_secs(3600), "told as an hour");
}

#[test]
fn every_line_of_the_conversations_is_understood() {
    let protocol = document("protocol.md");
    let mut lines = 0;
    for line in protocol.lines() {
        let Some((who, json)) = line.split_once(' ') else { continue };
        match who {
            "A→H" | "D→H" if json.contains(":connect\"") => understood::<Greeting>(json),
            "A→H" => understood::<AgentToHub>(json),
            "D→H" if json.contains("agnet") => refused::<DashboardToHub>(json),
            "D→H" => understood::<DashboardToHub>(json),
            "H→A" => understood::<HubToAgent>(json),
            "H→D" => understood::<HubToDashboard>(json),
            _ => continue,
        }
        lines += 1;
    }
    assert!(lines > 40, "the conversations are gone: {lines} lines");
}

fn understood<M: Direction>(json: &str) {
    let frame = Frame::Text(Bytes::copy_from_slice(json.as_bytes()));
    for message in decode::<M>(&frame, Rules::from(&Limits::default())) {
        if let Err(invalid) = message {
            panic!("{}: {json}", invalid.error);
        }
    }
}

fn refused<M: Direction>(json: &str) {
    let frame = Frame::Text(Bytes::copy_from_slice(json.as_bytes()));
    assert!(decode::<M>(&frame, Rules::from(&Limits::default()))[0].is_err(), "{json}");
}

#[test]
fn rules_have_one_number_each_and_references_exist() {
    let protocol = document("protocol.md");
    let mut rules = BTreeSet::new();
    for rule in protocol.split("**[P-").skip(1).map(|rest| rest.split(']').next().unwrap()) {
        assert!(rules.insert(rule.to_owned()), "{rule} stands twice");
    }
    assert!(rules.len() > 80, "{} rules", rules.len());
    for text in [&protocol, &document("errors.md")] {
        for rule in text.split("[P-").skip(1).map(|rest| rest.split(']').next().unwrap()) {
            assert!(rules.contains(rule), "{rule} is no rule");
        }
    }
}

// ---- helpers --------------------------------------------------------------------

/// A page of the repository's documents.
fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The reference: each message's type, its directions, and what is told.
fn reference(protocol: &str) -> impl Iterator<Item = (&str, Vec<&str>, &str)> {
    let sections = protocol.split("\n#### ").skip(1);
    sections.map(|section| {
        let section = section.split("\n## ").next().unwrap();
        let (head, told) = section.split_once('\n').unwrap();
        let mut head = head.split(" · ");
        let kind = head.next().unwrap().trim_matches('`');
        (kind, head.collect(), told)
    })
}

/// What stands under a heading, up to the next of its level.
fn section<'a>(document: &'a str, heading: &str) -> &'a str {
    let (_, rest) = document.split_once(&format!("\n{heading}\n")).unwrap();
    let level = heading.split(' ').next().unwrap();
    rest.split(&format!("\n{level} ")).next().unwrap()
}
