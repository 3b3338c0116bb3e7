//! Bad frames: RFC 6455 broken in every way, and kept to the letter in ways
//! that nobody means.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::interval;

use crate::raw::{BINARY, CLOSE, CONTINUE, FIN, Heard, PING, PONG, TEXT, close, frame, head, text};
use crate::stage::{Stage, agent_greeting, limits};

const MIB: u64 = 1024 * 1024;

/// Each attack closes a stranger's link, and a greeted dashboard's, with its
/// code; the honest go on.
async fn closes<'a>(cases: impl IntoIterator<Item = (u16, &'a str, Vec<u8>)>) {
    let mut stage = Stage::new().await;
    for (code, what, attack) in cases {
        let mut stranger = stage.stranger().await;
        let mut guest = stage.guest_dashboard("guest").await;
        for raw in [&mut stranger, &mut guest] {
            let _ = raw.send(&attack).await;
            let reason = raw.closed(code).await;
            println!("{what}: {code} {reason}");
        }
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn frames_that_the_rfc_forbids() {
    let ping = r#"{"type":"heartbeat:ping"}"#;
    let mut unmasked = vec![FIN | TEXT, u8::try_from(ping.len()).unwrap()];
    unmasked.extend(ping.as_bytes());
    closes([
        (1002, "unmasked", unmasked),
        (1002, "RSV1", frame(FIN | 0x40 | TEXT, ping.as_bytes())),
        (1002, "RSV2", frame(FIN | 0x20 | TEXT, ping.as_bytes())),
        (1002, "RSV3", frame(FIN | 0x10 | TEXT, ping.as_bytes())),
        (1002, "reserved opcode 3", frame(FIN | 0x3, b"")),
        (1002, "reserved opcode 7", frame(FIN | 0x7, b"x")),
        (1002, "reserved opcode 11", frame(FIN | 0xb, b"")),
        (1002, "reserved opcode 15", frame(FIN | 0xf, b"x")),
        (1002, "a ping of 126 bytes", frame(FIN | PING, &[0; 126])),
        (1002, "a pong of 70,000 bytes", frame(FIN | PONG, &vec![0; 70_000])),
        (1002, "a fragmented ping", frame(PING, b"x")),
        (1002, "a fragmented close", frame(CLOSE, &1000u16.to_be_bytes())),
        (1002, "a continuation of nothing", frame(FIN | CONTINUE, b"x")),
        (1002, "a message within a message", [frame(TEXT, b"{"), text("{}")].concat()),
        (1002, "a close of one byte", frame(FIN | CLOSE, b"x")),
    ])
    .await;
}

#[tokio::test]
async fn text_that_is_not_utf8() {
    let half = "\u{20ac}".as_bytes();
    closes([
        (1007, "a lone continuation byte", frame(FIN | TEXT, b"{\"a\":\"\x80\"}")),
        (1007, "overlong", frame(FIN | TEXT, b"\xc0\xaf")),
        (1007, "a surrogate", frame(FIN | TEXT, b"\xed\xa0\x80")),
        (1007, "beyond U+10FFFF", frame(FIN | TEXT, b"\xf4\x90\x80\x80")),
        (1007, "cut short", frame(FIN | TEXT, &half[..2])),
        (
            1007,
            "cut short over fragments",
            [frame(TEXT, &half[..1]), frame(FIN, &half[1..2])].concat(),
        ),
        (1007, "a close reason", frame(FIN | CLOSE, b"\x03\xe8\xff")),
    ])
    .await;
}

#[tokio::test]
async fn a_code_point_may_be_cut_by_fragments() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let json = "{\"type\":\"heartbeat:ping\",\"note\":\"\u{20ac}\u{1f980}\",\"payload\":{\"n\":7}}";
    let (first, rest) = json.as_bytes().split_first().unwrap();
    let mut fragments = frame(TEXT, &[*first]);
    for byte in rest {
        fragments.extend(frame(CONTINUE, &[*byte]));
    }
    fragments.extend(frame(FIN | CONTINUE, b""));
    guest.send(&fragments).await.unwrap();
    guest.until("heartbeat:pong").await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn lengths_that_cannot_be() {
    let length = |length: u64| [&[FIN | BINARY, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
    closes([
        (1009, "the highest bit set", length(1 << 63)),
        (1009, "all bits set", length(u64::MAX)),
        (1009, "a terabyte", length(1 << 40)),
        (1009, "15 MB declared, 4 bytes sent", [length(15 * MIB), vec![1, 2, 3, 4]].concat()),
        (1009, "a byte too long", length(MIB + 1)),
        (
            1009,
            "a close of a terabyte",
            [&[FIN | CLOSE, 0xff][..], &(1u64 << 40).to_be_bytes(), &[0; 4]].concat(),
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_message_that_is_too_long_in_sum() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let piece = [head(CONTINUE, 64 * 1024), vec![b' '; 64 * 1024]].concat();
    let _ = guest.send(&frame(TEXT, b"{")).await;
    for _ in 0..17 {
        let _ = guest.send(&piece).await;
    }
    guest.closed(1009).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_message_as_long_as_allowed() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let json = r#"{"type":"heartbeat:ping","payload":{"n":7}}"#;
    let blank = vec![b' '; usize::try_from(MIB).unwrap() - json.len()];
    guest.send(&[head(FIN | TEXT, MIB), blank, json.as_bytes().to_vec()].concat()).await.unwrap();
    guest.until("heartbeat:pong").await;
    drop(guest);
    stage.goes_on_alone().await;
}

/// Sends the same bytes again and again, as fast as the hub reads, until it
/// closes; says how many bytes that took.
async fn endlessly(stage: &Stage, begin: Vec<u8>, again: &[u8], code: u16) -> usize {
    let guest = stage.guest_dashboard("guest").await;
    let again = again.repeat(32 * 1024 / again.len());
    let (mut hub, mut flood) = guest.split();
    let mut sent = begin.len();
    let flooding = async {
        let mut bytes = begin;
        while flood.write_all(&bytes).await.is_ok() {
            sent += again.len();
            bytes.clone_from(&again);
        }
    };
    let ((), reason) = tokio::join!(flooding, async {
        let reason = hub.heard_close(code).await;
        hub.ended().await;
        reason
    });
    println!("{code} {reason} after {sent} bytes");
    sent
}

#[tokio::test]
async fn endless_fragments() {
    let mut stage = Stage::new().await;
    let empty = frame(CONTINUE, b"");
    let one = frame(CONTINUE, b" ");
    let with_pings = [frame(CONTINUE, b""), frame(FIN | PING, b"")].concat();
    endlessly(&stage, frame(TEXT, b""), &empty, 1009).await;
    endlessly(&stage, frame(BINARY, b""), &empty, 1009).await;
    endlessly(&stage, frame(TEXT, b"{"), &one, 1009).await;
    endlessly(&stage, frame(BINARY, b"\x01"), &one, 1009).await;
    endlessly(&stage, frame(TEXT, b"{"), &with_pings, 1008).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_flood_of_pings_or_pongs() {
    let mut stage = Stage::new().await;
    for first in [FIN | PING, FIN | PONG] {
        for payload in [&[][..], &[b'x'; 125]] {
            endlessly(&stage, Vec::new(), &frame(first, payload), 1008).await;
        }
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn pings_between_messages_are_answered_for_as_long_as_one_likes() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    for n in 0..100 {
        // 13 KB of pings to each message.
        guest.send(&frame(FIN | PING, &[b'x'; 125]).repeat(100)).await.unwrap();
        guest.lives(n).await;
    }
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_ping_is_no_message_under_way() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let mut pace = interval(limits().message_timeout * 2);
    for _ in 0..3 {
        pace.tick().await;
        guest.send(&frame(FIN | PING, b"still here")).await.unwrap();
        assert_eq!(guest.hear_pong().await, b"still here");
    }
    guest.lives(1).await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_message_begun_and_never_ended() {
    let whole = r#"{"type":"heartbeat:ping","payload":{"n":1}}"#;
    closes([
        (4400, "a fragment, then silence", frame(TEXT, b"{")),
        (4400, "half a header", vec![FIN | TEXT]),
        (4400, "a header, no mask", vec![FIN | TEXT, 0x85]),
        (
            4400,
            "16 KiB declared, four bytes sent",
            [head(FIN | TEXT, 16 * 1024), b"    ".to_vec()].concat(),
        ),
        (4400, "half a ping", head(FIN | PING, 10)),
        (4400, "a fragment and a ping", [frame(TEXT, b"{"), frame(FIN | PING, b"")].concat()),
    ])
    .await;
    // Behind a whole message in the same segment, and only to who has greeted.
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    guest.send(&[text(whole), head(FIN | TEXT, 100), b"{".to_vec()].concat()).await.unwrap();
    guest.until("heartbeat:pong").await;
    guest.closed(4400).await;
    let mut guest = stage.guest_dashboard("guest").await;
    guest.send(&[head(FIN | TEXT, MIB), b"    ".to_vec()].concat()).await.unwrap();
    guest.closed(4400).await;
    stage.goes_on_alone().await;
}

/// A stranger may take up no more than a greeting's worth, by its own word.
#[tokio::test]
async fn a_stranger_that_declares_more_than_a_greeting() {
    let mut stage = Stage::new().await;
    let piece = [head(CONTINUE, 4096), vec![b' '; 4096]].concat();
    for attack in [
        head(FIN | TEXT, 19 * 1024),
        head(FIN | BINARY, MIB),
        [frame(TEXT, b"{"), piece.repeat(5)].concat(),
        [frame(TEXT, b""), frame(CONTINUE, b"").repeat(4000)].concat(),
    ] {
        let mut stranger = stage.stranger().await;
        let _ = stranger.send(&attack).await;
        stranger.closed(1009).await;
    }
    let long = agent_greeting("guest").replace('}', &format!("{}}}", " ".repeat(9000)));
    let mut stranger = stage.stranger().await;
    stranger.say(&long).await;
    stranger.closed(1009).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_message_that_trickles_in_has_one_deadline() {
    let mut stage = Stage::new().await;
    let guest = stage.guest_dashboard("guest").await;
    let (mut hub, mut trickle) = guest.split();
    let trickling = async {
        let mut pace = interval(Duration::from_millis(20));
        let _ = trickle.write_all(&head(FIN | TEXT, 1000)).await;
        while trickle.write_all(b" ").await.is_ok() {
            pace.tick().await;
        }
    };
    tokio::join!(trickling, async {
        hub.heard_close(4400).await;
        hub.ended().await;
    });
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn half_a_frame_and_a_reset() {
    let mut stage = Stage::new().await;
    for cut in
        [vec![FIN | TEXT], [head(FIN | TEXT, 1000), b"{".to_vec()].concat(), frame(TEXT, b"{")]
    {
        for mut raw in [stage.stranger().await, stage.guest_dashboard("guest").await] {
            raw.send(&cut).await.unwrap();
            // Zero: the connection is reset when it is dropped.
            #[expect(deprecated, reason = "zero does not block, which is why it is deprecated")]
            raw.socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_close_is_answered_and_nothing_after_it_counts() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let stop = text(r#"{"type":"system:emergency-stop","id":"stop","payload":{}}"#);
    guest.send(&[close(1000, "bye"), stop].concat()).await.unwrap();
    loop {
        match guest.hear().await {
            Heard::Close(code, _) => break assert_eq!(code, 1000),
            Heard::Text(json) => assert!(!json.contains("\"stopped\""), "{json}"),
            other => panic!("{other:?}"),
        }
    }
    guest.ended().await;
    // Codes that must not be sent are told apart.
    for code in [0, 999, 1004, 1005, 1006, 1015, 5000, 65535] {
        let mut guest = stage.guest_dashboard("guest").await;
        guest.send(&close(code, "")).await.unwrap();
        loop {
            match guest.hear().await {
                Heard::Close(answer, _) => break assert_eq!(answer, 1002, "{code}"),
                Heard::Text(_) => {}
                other => panic!("{other:?}"),
            }
        }
        guest.ended().await;
    }
    // The honest command was not stopped.
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_close_that_is_never_answered() {
    let mut stage = Stage::new().await;
    let mut guests = Vec::new();
    for _ in 0..3 {
        let mut guest = stage.guest_dashboard("guest").await;
        guest.send(&frame(FIN | 0x3, b"")).await.unwrap();
        // The close is not even read, and the connection is kept.
        guests.push(guest);
    }
    stage.goes_on_alone().await;
}
