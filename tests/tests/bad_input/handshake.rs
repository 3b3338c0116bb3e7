//! Bad HTTP requests: each is answered in HTTP, and none becomes a link.

use std::time::Duration;

use tokio::time::{Instant, interval};
use trunkline_server::{Hub, TokenTable};

use crate::raw::{FIN, REQUEST, Raw, TEXT, frame, text};
use crate::stage::{Stage, dashboard_greeting, limits};

const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const PROTOCOL: &str = "Sec-WebSocket-Protocol: trunkline.v1\r\n";

/// The request with one line replaced.
fn with(line: &str, other: &str) -> String {
    assert!(REQUEST.contains(line));
    REQUEST.replace(line, other)
}

/// Each request is refused with its status, and the hub goes on.
async fn refused<'a>(cases: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
    let mut stage = Stage::new().await;
    for (status, request) in cases {
        let response = Raw::dial(stage.address).await.ask(&request).await;
        let shown: String = String::from_utf8_lossy(&request).chars().take(300).collect();
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{shown}\n{response}");
        let (_, why) = response.split_once("\r\n\r\n").unwrap();
        assert!(why.len() > 3, "it says why: {response}");
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_key_that_is_none() {
    refused([
        ("400", with(KEY, "").into_bytes()),
        ("400", with(KEY, "Sec-WebSocket-Key:\r\n").into_bytes()),
        ("400", with(KEY, "Sec-WebSocket-Key: short\r\n").into_bytes()),
        ("400", with(KEY, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n").into_bytes()),
        ("400", with(KEY, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ!!\r\n").into_bytes()),
        ("400", with(KEY, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==AAAA\r\n").into_bytes()),
        ("400", with(KEY, &KEY.repeat(2)).into_bytes()),
    ])
    .await;
}

#[tokio::test]
async fn a_wrong_version_is_told_the_right_one() {
    let version = "Sec-WebSocket-Version: 13\r\n";
    let mut stage = Stage::new().await;
    for other in ["", "Sec-WebSocket-Version: 8\r\n", "Sec-WebSocket-Version: 14\r\n"] {
        let response = Raw::dial(stage.address).await.ask(with(version, other).as_bytes()).await;
        assert!(response.starts_with("HTTP/1.1 426 "), "{response}");
        assert!(response.contains("\r\nSec-WebSocket-Version: 13\r\n"), "{response}");
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn the_subprotocol_must_be_offered() {
    refused([
        ("400", with(PROTOCOL, "").into_bytes()),
        ("400", with(PROTOCOL, "Sec-WebSocket-Protocol: trunkline.v2\r\n").into_bytes()),
        ("400", with(PROTOCOL, "Sec-WebSocket-Protocol: TRUNKLINE.V1\r\n").into_bytes()),
        ("400", with(PROTOCOL, "Sec-WebSocket-Protocol: tr\u{fc}nkline.v1\r\n").into_bytes()),
    ])
    .await;
}

#[tokio::test]
async fn of_many_subprotocols_ours_is_chosen_and_none_is_echoed() {
    let mut stage = Stage::new().await;
    let many = "Sec-WebSocket-Protocol: a, b\r\nSec-WebSocket-Protocol: c, trunkline.v1\r\n";
    let mut guest = Raw::dial(stage.address).await;
    let response = guest.ask(with(PROTOCOL, many).as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
    assert!(response.to_ascii_lowercase().contains("\r\nsec-websocket-protocol: trunkline.v1\r\n"));
    drop(guest);
    stage.goes_on_alone().await;
}

/// No extension is agreed to, whoever offers what: so nothing is ever
/// inflated, before a greeting or after it.
#[tokio::test]
async fn extensions_are_not_agreed_to_and_their_frames_are_refused() {
    let mut stage = Stage::new().await;
    for offer in [
        "permessage-deflate",
        "permessage-deflate; client_max_window_bits=15; server_no_context_takeover",
        "permessage-deflate; client_max_window_bits=99, x-webkit-deflate-frame, bbf-usp-protocol",
        "permessage-deflate\r\nSec-WebSocket-Extensions: permessage-bzip2",
        ", ,;;==",
    ] {
        let lines = format!("{PROTOCOL}Sec-WebSocket-Extensions: {offer}\r\n");
        let mut guest = Raw::dial(stage.address).await;
        let response = guest.ask(with(PROTOCOL, &lines).as_bytes()).await;
        assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
        assert!(!response.to_ascii_lowercase().contains("extensions"), "{response}");
        // "greet" under RSV1, as the first block of a deflate stream.
        let deflated = [0x4a, 0x2f, 0x4a, 0x4d, 0x2d, 0x01, 0x00];
        guest.send(&frame(FIN | 0x40 | TEXT, &deflated)).await.unwrap();
        guest.closed(1002).await;
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_request_with_a_body_or_with_something_behind_it() {
    let header = |line: &str| with(PROTOCOL, &format!("{PROTOCOL}{line}\r\n"));
    refused([
        ("400", header("Content-Length: 5").into_bytes()),
        ("400", [header("Content-Length: 5").as_bytes(), b"hello"].concat()),
        ("400", [header("Transfer-Encoding: chunked").as_bytes(), b"0\r\n\r\n"].concat()),
        ("400", [REQUEST.as_bytes(), &text("{}")].concat()),
        ("400", [REQUEST.as_bytes(), REQUEST.as_bytes()].concat()),
    ])
    .await;
}

#[tokio::test]
async fn heads_that_are_too_large() {
    let header = |line: &str| with(PROTOCOL, &format!("{PROTOCOL}{line}"));
    let many = (0..2000).fold(String::new(), |lines, n| lines + &format!("X-{n}: y\r\n"));
    let some = "X: y\r\n".repeat(200);
    refused([
        ("431", header(&format!("X: {}\r\n", "y".repeat(200_000))).into_bytes()),
        ("431", header(&many).into_bytes()),
        ("431", header(&some).into_bytes()),
        ("431", with("GET / ", &format!("GET /{} ", "a".repeat(64 * 1024))).into_bytes()),
    ])
    .await;
}

#[tokio::test]
async fn what_is_not_a_websocket_handshake_at_all() {
    let no_upgrade = with("Upgrade: websocket\r\n", "");
    refused([
        ("426", no_upgrade.into_bytes()),
        ("426", with("Connection: Upgrade\r\n", "Connection: close\r\n").into_bytes()),
        ("405", with("GET / ", "PUT / ").into_bytes()),
        ("505", with("HTTP/1.1", "HTTP/1.0").into_bytes()),
        ("400", b"hello\r\n\r\n".to_vec()),
        ("400", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec()),
        ("400", with("Host: hub.example", "Ho st: hub.example").into_bytes()),
        ("400", with("Host: hub.example", "Host: a\0b").into_bytes()),
        ("400", with("GET / ", "GET \u{7f} ").into_bytes()),
        (
            "403",
            with("Host: hub.example", "Host: hub.example\r\nOrigin: https://evil.example")
                .into_bytes(),
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_handshake_that_trickles_in_has_one_deadline() {
    let mut stage = Stage::new().await;
    let mut slow = Raw::dial(stage.address).await;
    let mut silent = Raw::dial(stage.address).await;
    let mut endless = Raw::dial(stage.address).await;
    endless.send(b"GET / HTTP/1.1\r\nHost: a\r\n").await.unwrap();
    let since = now();
    // A byte in 50 ms: it would take 12 s to say it all.
    let mut pace = interval(Duration::from_millis(50));
    let mut sent = 0;
    for byte in REQUEST.as_bytes() {
        pace.tick().await;
        if slow.send(&[*byte]).await.is_err() || since.elapsed() > limits().greeting_timeout * 2 {
            break;
        }
        sent += 1;
    }
    assert!(sent < REQUEST.len(), "it was cut off");
    for raw in [&mut slow, &mut silent, &mut endless] {
        let response = raw.answer().await;
        assert!(response.starts_with("HTTP/1.1 408 "), "{response}");
    }
    stage.goes_on_alone().await;
}

#[expect(clippy::disallowed_methods, reason = "an attack has its pace")]
fn now() -> Instant {
    Instant::now()
}

#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out() {
    let mut stage = Stage::new().await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(Raw::dial(stage.address).await);
    }
    let mut guest = stage.guest_dashboard("guest").await;
    guest.lives(1).await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_token_in_the_query_is_not_looked_at() {
    let table = TokenTable::new()
        .agent("token-of-honest", "acme", "honest")
        .and_then(|table| table.dashboard("token-of-watcher", "acme", "watcher"))
        .unwrap();
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(table)).await;
    let mut guest = Raw::dial(stage.address).await;
    let response = guest.ask(with("GET / ", "GET /?token=token-of-watcher ").as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
    guest.say(&dashboard_greeting("guest")).await;
    guest.closed(4401).await;
    stage.goes_on_alone().await;
}
