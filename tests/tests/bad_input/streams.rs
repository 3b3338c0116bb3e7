//! Bad streams: offsets that jump, go back or overflow, bytes beyond the
//! grant, streams of others.

use trunkline_server::Hub;
use trunkline_server::protocol::limits::Limits;

use crate::raw::{BINARY, FIN, Heard, frame, number, text, word};
use crate::stage::{
    COMMAND, GUEST_COMMAND, GUEST_STREAM, STREAM, Stage, limits, output, subscribe,
};

const NOWHERE: &str = "0191d4a8-5a3c-7f00-8000-0000000000ff";

/// The binary form of `terminal:output`.
fn binary(stream: &str, offset: u64, data: &[u8]) -> Vec<u8> {
    let digits = stream.replace('-', "");
    let stream = u128::from_str_radix(&digits, 16).unwrap();
    [&[1, 1, 0, 0][..], &stream.to_be_bytes(), &offset.to_be_bytes(), data].concat()
}

#[tokio::test]
async fn offsets_that_jump_go_back_or_overflow() {
    let mut stage = Stage::new().await;
    let mut guest = stage.running_guest("guest").await;
    let mut reader = stage.guest_dashboard("reader").await;
    reader.say(&subscribe("guest")).await;
    reader.until("terminal:opened").await;
    guest.say(&output(GUEST_STREAM, 0, "0123456789")).await;
    // A jump is refused, named, and answered with where to go on.
    for (offset, field) in [(11, "payload.offset"), (500_000, "payload.offset")] {
        guest.say(&output(GUEST_STREAM, offset, "x")).await;
        guest.refused("invalid_message", Some(field)).await;
        let taken = guest.until("terminal:taken").await;
        assert_eq!(number(&taken, "stored"), Some(10), "{taken}");
    }
    // What is known already is ignored, and what lies beyond it is taken.
    guest.say(&output(GUEST_STREAM, 0, "OVERWRITTE")).await;
    guest.say(&output(GUEST_STREAM, 5, "OVERWritten")).await;
    let mut heard = String::new();
    while heard.len() < 16 {
        let piece = reader.until("terminal:output").await;
        assert_eq!(number(&piece, "offset"), Some(heard.len() as u64), "{piece}");
        heard.push_str(word(&piece, "data").unwrap());
    }
    assert_eq!(heard, "0123456789ritten");
    // Numbers that are no offsets.
    let huge = ["-1", "1.0", "9223372036854775808", "18446744073709551615", "18446744073709551616"];
    for offset in huge {
        guest
            .say(
                &output(GUEST_STREAM, 0, "x")
                    .replace(r#""offset":0"#, &format!(r#""offset":{offset}"#)),
            )
            .await;
        guest.refused("invalid_message", Some("payload.offset")).await;
    }
    for offset in [1 << 63, u64::MAX, (1 << 63) - 1] {
        guest.send(&frame(FIN | BINARY, &binary(GUEST_STREAM, offset, b"x"))).await.unwrap();
        guest.until("error").await;
    }
    guest.lives(1).await;
    drop((guest, reader));
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn gaps_that_are_none() {
    let mut stage = Stage::new().await;
    let mut guest = stage.running_guest("guest").await;
    let gap = |stream: &str, from: &str, to: &str| {
        format!(
            r#"{{"type":"terminal:gap","payload":{{"stream":"{stream}","from":{from},"to":{to},"reason":"agent_overflow"}}}}"#
        )
    };
    let cases = [
        (gap(GUEST_STREAM, "0", "0"), "invalid_message", "payload.to"),
        (gap(GUEST_STREAM, "9", "8"), "invalid_message", "payload.to"),
        (gap(GUEST_STREAM, "-1", "8"), "invalid_message", "payload.from"),
        (gap(GUEST_STREAM, "0", "9223372036854775808"), "invalid_message", "payload.to"),
        (gap(GUEST_STREAM, "5", "8"), "invalid_message", "payload.from"),
        (gap(STREAM, "0", "1000"), "not_found", "payload.stream"),
        (gap(NOWHERE, "0", "1000"), "not_found", "payload.stream"),
    ];
    for (json, code, field) in cases {
        guest.say(&json).await;
        guest.refused(code, Some(field)).await;
    }
    // To the end of the world: the stream is full, and the hub is not.
    guest.say(&gap(GUEST_STREAM, "0", "9223372036854775807")).await;
    guest.say(&output(GUEST_STREAM, (1 << 63) - 1, "x")).await;
    guest.refused("invalid_message", Some("payload.offset")).await;
    guest.lives(1).await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn binary_output_that_is_none() {
    let mut stage = Stage::new().await;
    let mut guest = stage.running_guest("guest").await;
    let good = binary(GUEST_STREAM, 0, b"x");
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        bad
    };
    let long = binary(GUEST_STREAM, 0, &vec![b'x'; 16 * 1024 + 1]);
    let cases = [
        vec![],
        vec![1],
        good[..28].to_vec(),
        with(0, 2),
        with(1, 3),
        with(2, 1),
        with(3, 1),
        with(20, 0x80),
    ];
    for bad in cases {
        guest.send(&frame(FIN | BINARY, &bad)).await.unwrap();
        guest.refused("invalid_message", None).await;
    }
    guest.send(&frame(FIN | BINARY, &long)).await.unwrap();
    guest.refused("invalid_message", Some("data")).await;
    guest.say(&output(GUEST_STREAM, 0, &"x".repeat(16 * 1024 + 1))).await;
    guest.refused("invalid_message", Some("payload.data")).await;
    for data in [
        r#""data":"""#,
        r#""data":"a","data_base64":"YQ==""#,
        r#""data_base64":"???""#,
        r#""nothing":"""#,
    ] {
        guest.say(&output(GUEST_STREAM, 0, "").replace(r#""data":"""#, data)).await;
        guest.until("error").await;
    }
    guest.lives(1).await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn streams_and_commands_of_others() {
    let mut stage = Stage::new().await;
    let mut guest = stage.running_guest("guest").await;
    for stream in [STREAM, NOWHERE] {
        guest.say(&output(stream, 0, "forged")).await;
        guest.refused("not_found", Some("payload.stream")).await;
        guest.send(&frame(FIN | BINARY, &binary(stream, 0, b"forged"))).await.unwrap();
        guest.refused("not_found", Some("payload.stream")).await;
    }
    let words = [
        format!(
            r#"{{"type":"command:complete","payload":{{"command":"{COMMAND}","attempt":1,"status":"failed","end":{{}}}}}}"#
        ),
        format!(
            r#"{{"type":"command:started","payload":{{"command":"{COMMAND}","attempt":1,"stream":"{NOWHERE}"}}}}"#
        ),
        format!(
            r#"{{"type":"command:started","payload":{{"command":"{GUEST_COMMAND}","attempt":1,"stream":"{STREAM}"}}}}"#
        ),
        format!(
            r#"{{"type":"command:started","payload":{{"command":"{GUEST_COMMAND}","attempt":2,"stream":"{NOWHERE}"}}}}"#
        ),
        format!(
            r#"{{"type":"command:interrupting","payload":{{"command":"{COMMAND}","attempt":1,"stage":"signalled"}}}}"#
        ),
        format!(
            r#"{{"type":"terminal:input-taken","payload":{{"command":"{COMMAND}","writer":"watcher","offset":99}}}}"#
        ),
    ];
    for word in words {
        guest.say(&word).await;
    }
    guest.lives(1).await;
    let mut witness = stage.guest_dashboard("witness").await;
    let list = witness.until("agent:list").await;
    let (_, honest) = list.split_once(&format!(r#""command":"{COMMAND}""#)).unwrap();
    assert_eq!(word(honest, "status"), Some("running"), "{list}");
    assert!(!list.contains(NOWHERE), "{list}");
    drop((guest, witness));
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn bytes_beyond_the_grant() {
    for is_binary in [true, false] {
        let limits = Limits { grant_bytes: 1000, ..limits() };
        let mut stage = Stage::of(Hub::builder().limits(limits)).await;
        let mut guest = stage.running_guest("guest").await;
        guest.say(&output(GUEST_STREAM, 0, &"x".repeat(1000))).await;
        let granted = loop {
            let taken = guest.until("terminal:taken").await;
            if number(&taken, "stored") == Some(1000) {
                break number(&taken, "allowed").unwrap();
            }
        };
        // One byte too many, whether or not it follows on what is there.
        let beyond = if is_binary {
            frame(FIN | BINARY, &binary(GUEST_STREAM, granted, b"x"))
        } else {
            let len = usize::try_from(granted - 1000 + 1).unwrap();
            text(&output(GUEST_STREAM, 1000, &"x".repeat(len)))
        };
        let _ = guest.send(&beyond).await;
        guest.closed(4413).await;
        stage.goes_on_alone().await;
    }
}

#[tokio::test]
async fn words_about_commands_that_never_were() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_agent("guest").await;
    let complete = |attempt: &str, status: &str| {
        format!(
            r#"{{"type":"command:complete","payload":{{"command":"{NOWHERE}","attempt":{attempt},"status":"{status}","end":{{}}}}}}"#
        )
    };
    guest.say(&complete("4294967295", "completed")).await;
    guest.until("command:settled").await;
    for (attempt, status, field) in [
        ("4294967296", "completed", "payload.attempt"),
        ("-1", "completed", "payload.attempt"),
        ("1", "finished", "payload.status"),
        ("1", "", "payload.status"),
    ] {
        guest.say(&complete(attempt, status)).await;
        guest.refused("invalid_message", Some(field)).await;
    }
    guest.lives(1).await;
    // Log records are heard of, and not taken.
    guest.say(&format!(r#"{{"type":"log:batch","id":"l","payload":{{"stream":"{NOWHERE}","offset":0,"records":[]}}}}"#)).await;
    guest.refused("unsupported", None).await;
    guest.send(&frame(FIN | 0x8, b"")).await.unwrap();
    while !matches!(guest.hear().await, Heard::Close(..)) {}
    stage.goes_on_alone().await;
}
