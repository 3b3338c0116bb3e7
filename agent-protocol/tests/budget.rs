//! What one message may take: memory in a small multiple of its length, and
//! no stack to speak of.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fmt::Write as _;
use std::process::Command;

use bytes::Bytes;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{AgentToHub, DashboardToHub, Direction, Greeting};

const MIB: usize = 1024 * 1024;

type Greedy = (&'static str, fn() -> String);

/// Every one of them a megabyte that asks for much more.
const GREEDY: &[Greedy] = &[
    ("zeros", || filled(r#"{"type":"heartbeat:ping","payload":{"x":[0"#, ",0", "]}}")),
    ("zeros in the envelope", || filled(r#"{"type":"heartbeat:ping","x":[0"#, ",0", "]}")),
    ("arrays", || filled(r#"{"type":"heartbeat:ping","payload":{"x":[[]"#, ",[]", "]}}")),
    ("nested arrays", || filled(r#"{"type":"heartbeat:ping","payload":"#, "[", "")),
    ("nested objects", || filled(r#"{"type":"heartbeat:ping","payload":"#, r#"{"":"#, "")),
    ("empty arguments", || {
        filled(
            r#"{"type":"command:request","payload":{"spec":{"run":{"argv":["""#,
            r#","""#,
            "]}}}}",
        )
    }),
    ("protocols", || {
        filled(r#"{"type":"dashboard:connect","payload":{"protocols":[1"#, ",1", "]}}")
    }),
    ("features", || {
        let head = r#"{"type":"dashboard:connect","payload":{"protocols":[],"features":["a""#;
        filled(head, r#","a""#, "]}}")
    }),
    ("targets", || {
        let head = r#"{"type":"unsubscribe","payload":{"terminals":[{"agent":"a"}"#;
        filled(head, r#",{"agent":"a"}"#, "]}}")
    }),
    ("variables", || {
        let head = r#"{"type":"command:request","payload":{"spec":{"env":{"":"""#;
        let mut json = String::from(head);
        for n in 0.. {
            if json.len() > MIB - 30 {
                break;
            }
            write!(json, r#","{n}":"""#).expect("a string takes everything");
        }
        json + "}}}}"
    }),
    ("messages in a batch", || filled(r#"{"type":"batch","payload":{"messages":[0"#, ",0", "]}}")),
    ("a batch of lists", || {
        let each = filled(
            r#"{"type":"unsubscribe","payload":{"terminals":[{"agent":"a"}"#,
            r#",{"agent":"a"}"#,
            "]}}",
        );
        let short = format!(
            "{}]}}}}",
            &each[..r#"{"type":"unsubscribe","payload":{"terminals":["#.len() + 700 * 14 - 1]
        );
        format!(
            r#"{{"type":"batch","payload":{{"messages":[{}]}}}}"#,
            [short.as_str(); 100].join(",")
        )
    }),
    ("escapes", || {
        filled(r#"{"type":"auth:refresh-token","payload":{"token":""#, r"\u0000", r#""}}"#)
    }),
    ("one long name", || filled(r#"{"type":"subscribe","payload":{""#, "x", r#"":1}}"#)),
    ("one long type", || filled(r#"{"type":""#, "x", r#""}"#)),
];

fn filled(head: &str, unit: &str, tail: &str) -> String {
    let room = MIB - head.len() - tail.len();
    head.to_owned() + &unit.repeat(room / unit.len()) + tail
}

#[test]
fn a_megabyte_that_asks_for_more_gets_little() {
    let me = std::env::current_exe().unwrap();
    for (index, (name, build)) in GREEDY.iter().enumerate() {
        assert!(build().len() > MIB * 9 / 10, "{name} is not a megabyte");
        // In a process of its own: the peak of this one says nothing.
        let child = Command::new(&me)
            .args(["--exact", "child_reads_a_greedy_message", "--ignored", "--nocapture"])
            .env("GREEDY", index.to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        let grown = said.split_once("grown by ").and_then(|(_, rest)| rest.split(' ').next());
        let grown: usize = grown.unwrap_or_else(|| panic!("{name}: {said}")).parse().unwrap();
        assert!(grown <= 5 * MIB, "{name}: took {} KiB to read", grown / 1024);
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_reads_a_greedy_message() {
    let Ok(index) = std::env::var("GREEDY") else { return };
    let (_, build) = GREEDY[index.parse::<usize>().unwrap()];
    let frame = Frame::Text(Bytes::from(build()));
    // From here on the peak counts: what building the message took is over.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak();
    read::<Greeting>(&frame);
    read::<AgentToHub>(&frame);
    read::<DashboardToHub>(&frame);
    println!("grown by {} bytes", peak() - before);
}

fn read<M: Direction>(frame: &Frame) {
    drop(codec::decode::<M>(frame, Rules::from(&Limits::default())));
}

/// The most memory that this process had resident, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}
