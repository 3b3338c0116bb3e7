//! A hub within somebody else's HTTP server: one of axum's routes, or what a
//! server of one's own gives its requests to.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Request as Asked;
use axum::middleware::{Next, from_fn};
use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, Dashboard, Polling, Programs, Reaching, Request, TerminalEvent, WebSocket,
};
use trunkline_protocol::limits::Limits;
use trunkline_server::Hub;

#[path = "by_hand/http.rs"]
mod http;

use http::{PATIENCE, ask, ask_over};

const MS: Duration = Duration::from_millis(1);

/// An application with its own page, the hub at `/hub`, and something that all
/// requests go through.
async fn application(hub: &Hub) -> (String, Arc<AtomicUsize>) {
    let passed = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&passed);
    let count = from_fn(move |request: Asked, next: Next| {
        counts.fetch_add(1, Ordering::Relaxed);
        next.run(request)
    });
    let app = Router::new()
        .route("/", get(|| async { "a page" }))
        .nest("/hub", hub.router())
        .layer(count)
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, passed)
}

async fn hub(limits: Limits) -> Hub {
    Hub::builder().limits(limits).start().await.unwrap()
}

fn handshake(more: &str) -> String {
    format!(
        "GET /hub HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{more}\r\n"
    )
}

const OFFERED: &str = "Sec-WebSocket-Protocol: trunkline.v1\r\n";

/// Whether a WebSocket is spoken here: a ping is answered.
async fn is_websocket(socket: &mut TcpStream) -> bool {
    socket.write_all(&[0x89, 0x80, 0, 0, 0, 0]).await.unwrap();
    let mut pong = [0; 2];
    timeout(PATIENCE, socket.read_exact(&mut pong)).await.unwrap().is_ok() && pong == [0x8a, 0]
}

/// Runs a command from one end of the hub to the other, over what these dial.
async fn runs(agent: Reaching, dashboard: impl trunkline_client::Connector) {
    let agent = Agent::over(agent, "build-1").unwrap().connect(Programs::new());
    let dashboard = Dashboard::over(dashboard).connect();
    let command = dashboard.run("build-1", Request::argv(["seq", "1", "50000"])).await.unwrap();
    let mut terminal = command.terminal();
    let (mut bytes, mut audit) = (0, None);
    let all = async {
        while let Some(event) = terminal.next().await {
            match event {
                TerminalEvent::Output { data, .. } => bytes += data.len(),
                TerminalEvent::Ended { audit: found, .. } => audit = Some(found),
                TerminalEvent::Opened { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    };
    timeout(PATIENCE, all).await.unwrap();
    assert_eq!((bytes, audit), (288_894, Some(Audit::Verified)));
    dashboard.close().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_is_one_of_an_applications_routes() {
    let hub = hub(Limits::default()).await;
    let (address, passed) = application(&hub).await;
    let at = WebSocket::new(&format!("ws://{address}/hub")).unwrap();
    runs(at.clone().into(), at.clone()).await;
    let of_websockets = passed.load(Ordering::Relaxed);
    assert_eq!(of_websockets, 2, "each is one request");
    runs(at.clone().into(), Polling::from(at)).await;
    assert!(passed.load(Ordering::Relaxed) > of_websockets + 3, "each poll is one");

    let (status, page) = ask(&address, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(status, 200);
    assert!(page.ends_with("a page"), "{page}");
    hub.drain(MS).await;
    let (status, why) = ask(&address, &handshake(OFFERED)).await;
    assert_eq!(status, 503, "{why}");
}

#[tokio::test]
async fn handshakes_are_judged_as_on_a_listener_of_the_hubs_own() {
    let hub = hub(Limits { links_per_address: 2, ..Limits::default() }).await;
    let (address, _) = application(&hub).await;
    let evil = format!("{OFFERED}Origin: https://evil.example\r\n");
    let two = format!("{OFFERED}Authorization: Bearer a\r\nAuthorization: Bearer b\r\n");
    let body = format!("{OFFERED}Content-Length: 3\r\n");
    for (request, expected, says) in [
        (handshake(""), 400, "trunkline.v1"),
        (handshake(&evil), 403, "origin"),
        (handshake(&two), 400, "once"),
        (handshake(&body) + "abc", 400, "body"),
        (handshake(OFFERED).replace(": 13", ": 12"), 426, "sec-websocket-version: 13"),
        (handshake(OFFERED).replace("AAAA==", "=="), 400, "16 bytes"),
        (handshake(OFFERED).replace("GET /hub", "POST /hub"), 405, "allow: get"),
        (handshake(OFFERED).replace("websocket", "h2c"), 426, "upgrade: websocket"),
        ("GET /hub HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(), 426, "upgrade: websocket"),
    ] {
        let (status, answer) = ask(&address, &request).await;
        assert_eq!(status, expected, "{request}: {answer}");
        assert!(answer.to_ascii_lowercase().contains(says), "{request}: {answer}");
    }
    assert_eq!(hub.links(), 0, "none of them has kept a place");

    let mut held = Vec::new();
    for _ in 0..2 {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        let (status, answer) = ask_over(&mut socket, &handshake(OFFERED)).await;
        assert_eq!(status, 101, "{answer}");
        let answer = answer.to_ascii_lowercase();
        // What RFC 6455 §1.3 makes of the key.
        assert!(answer.contains("sec-websocket-accept: icx+yqv66kxgm0fcwalwlflwtai="), "{answer}");
        assert!(answer.contains("sec-websocket-protocol: trunkline.v1"), "{answer}");
        assert!(is_websocket(&mut socket).await);
        held.push(socket);
    }
    let (status, answer) = ask(&address, &handshake(OFFERED)).await;
    assert_eq!(status, 503, "one more from this address: {answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: "), "{answer}");
    drop(held);
    hub.drain(MS).await;
}

#[tokio::test]
async fn an_application_that_does_not_say_who_connects_hears_what_it_lacks() {
    let hub = hub(Limits::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let app = Router::new().nest("/hub", hub.router());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let (status, why) = ask(&address, &handshake(OFFERED)).await;
    assert_eq!(status, 500);
    assert!(why.contains("into_make_service_with_connect_info"), "{why}");
    assert_eq!(hub.links(), 0);
}

/// One deadline holds from the request on, as it does on the hub's own listener
/// from the connection on.
#[tokio::test]
async fn who_says_nothing_after_the_handshake_is_let_go() {
    let hub = hub(Limits { greeting_timeout: 200 * MS, ..Limits::default() }).await;
    let (address, _) = application(&hub).await;
    let mut socket = TcpStream::connect(&address).await.unwrap();
    assert_eq!(ask_over(&mut socket, &handshake(OFFERED)).await.0, 101);
    let mut said = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut said)).await.unwrap().unwrap();
    assert_eq!(said[0], 0x88, "a close: {said:?}");
    assert_eq!(u16::from_be_bytes([said[2], said[3]]), 4408, "{said:?}");
    assert_eq!(hub.links(), 0);
}

/// Who finds that WebSocket comes through again may use the connection that was
/// polled over.
#[tokio::test]
async fn a_connection_that_was_polled_over_becomes_a_websocket() {
    let hub = hub(Limits::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    let mut socket = TcpStream::connect(&address).await.unwrap();
    let open = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(ask_over(&mut socket, open).await.0, 201);
    let (status, answer) = ask_over(&mut socket, &handshake(OFFERED)).await;
    assert_eq!(status, 101, "{answer}");
    assert!(is_websocket(&mut socket).await);
}
