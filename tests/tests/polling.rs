//! Links over plain HTTP: clients that fall back to it and return, and requests
//! that are none.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, Backoff, Dashboard, Programs, Reaching, Request, TerminalEvent, WebSocket,
};
use trunkline_protocol::limits::Limits;
use trunkline_server::Hub;
use trunkline_tests::process::now;

#[path = "by_hand/http.rs"]
mod http;

use http::{PATIENCE, ask};

const MS: Duration = Duration::from_millis(1);

/// What is between clients and hub: it may let no WebSocket through, and it
/// breaks connections when told to.
#[derive(Clone)]
struct Between {
    address: String,
    inside: Arc<Inside>,
}

#[derive(Default)]
struct Inside {
    blocks: AtomicBool,
    websockets: AtomicUsize,
    requests: AtomicUsize,
    connections: Mutex<Vec<AbortHandle>>,
}

impl Between {
    async fn start(hub: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let inside = Arc::new(Inside::default());
        let this = Self { address, inside: Arc::clone(&inside) };
        tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let passing = tokio::spawn(pass(socket, hub.clone(), Arc::clone(&inside)));
                inside.connections.lock().unwrap().push(passing.abort_handle());
            }
        });
        this
    }

    fn cuts(&self) {
        for connection in self.inside.connections.lock().unwrap().drain(..) {
            connection.abort();
        }
    }

    fn blocks(&self, blocks: bool) {
        self.inside.blocks.store(blocks, Ordering::Relaxed);
    }

    fn seen(&self) -> (usize, usize) {
        let Inside { websockets, requests, .. } = &*self.inside;
        (websockets.load(Ordering::Relaxed), requests.load(Ordering::Relaxed))
    }

    /// Reaches the hub through it, as quickly as it can.
    fn connector(&self) -> Reaching {
        let url = format!("ws://{}", self.address);
        Reaching::from(WebSocket::new(&url).unwrap()).probing_every(100 * MS)
    }
}

async fn pass(mut socket: TcpStream, hub: String, inside: Arc<Inside>) {
    let mut head = Vec::new();
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        if socket.read_buf(&mut head).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
    if text.contains("upgrade: websocket") {
        if inside.blocks.load(Ordering::Relaxed) {
            let _ = socket.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await;
            return;
        }
        inside.websockets.fetch_add(1, Ordering::Relaxed);
    } else {
        inside.requests.fetch_add(1, Ordering::Relaxed);
    }
    let Ok(mut hub) = TcpStream::connect(hub).await else { return };
    if hub.write_all(&head).await.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut socket, &mut hub).await;
    }
}

async fn hub(limits: Limits) -> (Hub, String) {
    let hub = Hub::builder().limits(limits).start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    (hub, address)
}

fn quick() -> Backoff {
    Backoff { first: 20 * MS, base: 20 * MS, max: 100 * MS, ..Backoff::default() }
}

async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = now() + PATIENCE;
    while !so() {
        assert!(now() < end, "{what}");
        let _ = timeout(10 * MS, std::future::pending::<()>()).await;
    }
}

/// An output of 50 MB crosses a network that lets no WebSocket through, and then
/// does, and then not again, at both ends and all the time: every byte comes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_output_comes_whole_while_its_links_go_to_and_fro() {
    let limits = Limits {
        terminal_bytes_per_second: 6 << 20,
        log_bytes_per_stream: 64 << 20,
        ..Limits::default()
    };
    let (hub, address) = hub(limits).await;
    let between = [Between::start(address.clone()).await, Between::start(address).await];
    let agent = Agent::over(between[0].connector(), "build-1").unwrap();
    let agent = agent.backoff(quick()).tail(64 << 20, PATIENCE).connect(Programs::new());
    let dashboard = Dashboard::over(between[1].connector()).backoff(quick()).connect();
    let request = Request::argv(["seq", "1", "6800000"]);
    let command = dashboard.run("build-1", request).await.unwrap();
    let mut terminal = command.terminal();
    let turns = Arc::new(AtomicUsize::new(0));
    let (turned, networks) = (Arc::clone(&turns), between.clone());
    let turning = tokio::spawn(async move {
        loop {
            let blocks = turned.load(Ordering::Relaxed) % 2 == 0;
            for network in &networks {
                let before = network.seen();
                network.blocks(blocks);
                if blocks {
                    network.cuts();
                    until("it falls back", || network.seen().1 > before.1 + 1).await;
                } else {
                    until("it returns", || network.seen().0 > before.0).await;
                }
            }
            turned.fetch_add(1, Ordering::Relaxed);
            let _ = timeout(150 * MS, std::future::pending::<()>()).await;
        }
    });
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
    timeout(2 * PATIENCE, all).await.unwrap();
    turning.abort();
    assert_eq!((bytes, audit), (53_288_896, Some(Audit::Verified)));
    let turns = turns.load(Ordering::Relaxed);
    println!(
        "{turns} turns at both ends; WebSockets and requests: {:?}",
        between.map(|b| b.seen())
    );
    assert!(turns >= 4, "{turns} turns");
    agent.stop().await;
    hub.drain(MS).await;
}

async fn open(address: &str) -> String {
    let (status, answer) =
        ask(address, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(status, 201, "{answer}");
    let link = answer.lines().find_map(|line| line.strip_prefix("trunkline-link: "));
    link.unwrap_or_else(|| panic!("{answer}")).trim().to_owned()
}

fn post(link: &str, batch: &str, body: &[u8]) -> String {
    let body = String::from_utf8(body.to_vec()).unwrap();
    format!(
        "POST / HTTP/1.1\r\nHost: h\r\nTrunkline-Link: {link}\r\nTrunkline-Batch: {batch}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn get(link: &str, batch: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: h\r\nTrunkline-Link: {link}\r\nTrunkline-Batch: {batch}\r\n\r\n"
    )
}

fn frame(text: &str) -> Vec<u8> {
    let mut batch = Vec::new();
    let frame = trunkline_protocol::frame::Frame::Text(text.to_owned().into());
    trunkline_protocol::polling::append(&mut batch, &frame);
    batch
}

fn greeting() -> Vec<u8> {
    frame(r#"{"type":"dashboard:connect","payload":{"protocols":[1],"dashboard":"d"}}"#)
}

#[tokio::test]
async fn a_request_that_is_wrong_is_answered_so() {
    let (hub, address) = hub(Limits::default()).await;
    let link = open(&address).await;
    let long = "x".repeat(20 * 1024);
    let head = |extra: &str| format!("POST / HTTP/1.1\r\nHost: h\r\n{extra}\r\n");
    for (request, expected) in [
        (post("nobody", "1", b""), 404),
        (get("nobody", "1"), 404),
        (post(&link, "0", b""), 400),
        (post(&link, "01", b""), 400),
        (post(&link, "-1", b""), 400),
        (post(&link, "one", b""), 400),
        (post(&link, "99999999999999999999", b""), 400),
        (get(&link, ""), 400),
        (post(&link, "1", b"\x01\0\0\0\x05"), 400),
        (post(&link, "1", b"\x07\0\0\0\0"), 400),
        (post(&link, "1", &b"\x01\0\0\0\0".repeat(101)), 400),
        (post(&link, "1", &frame(&long)), 413),
        (
            head(&format!(
                "Trunkline-Link: {link}\r\nTrunkline-Batch: 1\r\nContent-Length: 9999999\r\n"
            )),
            413,
        ),
        (
            head(&format!(
                "Trunkline-Link: {link}\r\nTrunkline-Link: {link}\r\nContent-Length: 0\r\n"
            )),
            400,
        ),
        (head("Content-Length: 5\r\n") + "hello", 400),
        (head("Origin: https://evil.example\r\nContent-Length: 0\r\n"), 403),
        (head("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), 400),
        ("PUT / HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(), 405),
    ] {
        let (status, answer) = ask(&address, &request).await;
        assert_eq!(status, expected, "{:?}: {answer}", &request[..request.len().min(200)]);
        assert!(!answer.contains("101 "), "{answer}");
    }
    // None of it has cost the link anything.
    assert_eq!(ask(&address, &post(&link, "1", &greeting())).await.0, 204);
    let (status, answer) = ask(&address, &get(&link, "1")).await;
    assert_eq!(status, 200);
    assert!(answer.contains("connection:ack"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("cache-control: no-store"), "{answer}");
    hub.drain(MS).await;
}

#[tokio::test]
async fn an_answer_that_was_lost_is_given_again_and_nothing_is_done_twice() {
    let (hub, address) = hub(Limits::default()).await;
    let link = open(&address).await;
    for _ in 0..3 {
        assert_eq!(ask(&address, &post(&link, "1", &greeting())).await.0, 204);
    }
    let first = ask(&address, &get(&link, "1")).await;
    assert_eq!(ask(&address, &get(&link, "1")).await, first);
    assert_eq!(hub.stats().links_dashboards, 1);
    assert_eq!(hub.stats().counts.received["dashboard:connect"].count, 1);
    let ping = frame(r#"{"type":"heartbeat:ping","payload":{"n":7}}"#);
    for _ in 0..3 {
        assert_eq!(ask(&address, &post(&link, "2", &ping)).await.0, 204);
    }
    let (_, answer) = ask(&address, &get(&link, "2")).await;
    assert_eq!(answer.matches("heartbeat:pong").count(), 1, "{answer}");
    // What cannot be asked ends it.
    assert_eq!(ask(&address, &get(&link, "1")).await.0, 409);
    assert_eq!(ask(&address, &post(&link, "3", &ping)).await.0, 410);
    until("the link is gone", || hub.links() == 0).await;
    hub.drain(MS).await;
}

#[tokio::test]
async fn who_never_asks_again_is_given_up_like_any_other() {
    let limits = Limits {
        greeting_timeout: 300 * MS,
        close_timeout: 100 * MS,
        poll_hold: 100 * MS,
        links_max: 3,
        ..Limits::default()
    };
    let (hub, address) = hub(limits).await;
    let links = [open(&address).await, open(&address).await, open(&address).await];
    let (status, answer) =
        ask(&address, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(status, 503, "{answer}");
    assert!(answer.to_ascii_lowercase().contains("retry-after: "), "{answer}");
    until("they have not greeted in time", || hub.links() == 0).await;
    until("they are forgotten", || hub.stats().links_other == 0).await;
    let (_, gone) = ask(&address, &get(&links[0], "1")).await;
    assert!(
        gone.contains("4408") || gone.contains("404") || gone.contains("no greeting"),
        "{gone}"
    );
    open(&address).await;
    hub.drain(MS).await;
}

#[tokio::test]
async fn a_body_that_has_no_end_or_is_none_costs_nothing() {
    let limits = Limits { message_timeout: 200 * MS, ..Limits::default() };
    let (hub, address) = hub(limits).await;
    let link = open(&address).await;
    let head =
        format!("POST / HTTP/1.1\r\nHost: h\r\nTrunkline-Link: {link}\r\nTrunkline-Batch: 1\r\n");
    // Chunks of a body that never ends; one that is longer than a greeting; one
    // that is declared and does not come.
    let chunks = format!("{head}Transfer-Encoding: chunked\r\n\r\n5\r\n\x01\0\0\0\x02\r\n");
    assert_eq!(ask(&address, &chunks).await.0, 408);
    let endless = format!("{head}Transfer-Encoding: chunked\r\n\r\n")
        + &"8\r\n\n\n\n\n\n\n\n\n\r\n".repeat(4096);
    assert_eq!(ask(&address, &endless).await.0, 413);
    assert_eq!(ask(&address, &format!("{head}Content-Length: 9\r\n\r\nnine")).await.0, 408);
    // A body is a batch, whatever else it is said to be.
    for body in ["\n".repeat(8000), "[]".repeat(4000), "\x1f\u{8b}compressed".to_owned()] {
        let request =
            format!("{head}Content-Encoding: gzip\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        assert_eq!(ask(&address, &request).await.0, 400);
    }
    assert_eq!(ask(&address, &post(&link, "1", &greeting())).await.0, 204);
    hub.drain(MS).await;
}

#[tokio::test]
async fn of_two_that_ask_at_once_the_later_is_answered() {
    let (hub, address) = hub(Limits::default()).await;
    let link = open(&address).await;
    let mut first = tokio::spawn({
        let (address, request) = (address.clone(), get(&link, "1"));
        async move { ask(&address, &request).await }
    });
    let mut second = tokio::spawn({
        let (address, request) = (address.clone(), get(&link, "1"));
        async move { ask(&address, &request).await }
    });
    // Whichever came first.
    let (told, waits) = tokio::select! {
        told = &mut first => (told, second),
        told = &mut second => (told, first),
    };
    assert_eq!(told.unwrap().0, 409);
    assert_eq!(ask(&address, &post(&link, "1", &greeting())).await.0, 204);
    let (status, answer) = waits.await.unwrap();
    assert!(status == 200 && answer.contains("connection:ack"), "{answer}");

    // A WebSocket of the same dashboard takes over as from any other link.
    let socket = format!("ws://{address}");
    let dashboard =
        Dashboard::over(WebSocket::new(&socket).unwrap()).id("d".parse().unwrap()).connect();
    timeout(PATIENCE, dashboard.connected()).await.unwrap().unwrap();
    let (_, answer) = ask(&address, &get(&link, "2")).await;
    assert!(answer.contains("another link took over"), "{answer}");
    hub.drain(MS).await;
}

#[tokio::test]
async fn a_page_polls_from_where_it_may() {
    let hub = Hub::builder().allow_origin("https://app.example".parse().unwrap());
    let hub = hub.start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    let from = |method: &str, origin: &str| {
        format!(
            "{method} / HTTP/1.1\r\nHost: {address}\r\nOrigin: {origin}\r\nContent-Length: 0\r\n\r\n"
        )
    };
    for (origin, expected) in [
        ("https://app.example", [204, 201]),
        ("https://app.example.evil.example", [403, 403]),
        ("http://app.example", [403, 403]),
        ("null", [403, 403]),
    ] {
        for (method, expected) in ["OPTIONS", "POST"].into_iter().zip(expected) {
            let (status, answer) = ask(&address, &from(method, origin)).await;
            assert_eq!(status, expected, "{method} {origin}: {answer}");
            let answer = answer.to_ascii_lowercase();
            let allowed = format!("access-control-allow-origin: {origin}\r\n");
            assert_eq!(answer.contains(&allowed), status < 300, "{answer}");
            assert!(
                !answer.contains("allow-credentials") && !answer.contains("cookie"),
                "{answer}"
            );
        }
    }
    let (_, preflight) = ask(&address, &from("OPTIONS", "https://app.example")).await;
    let preflight = preflight.to_ascii_lowercase();
    assert!(preflight.contains("access-control-allow-headers: authorization, content-type, trunkline-link, trunkline-batch"), "{preflight}");
    let own = ask(&address, &from("POST", &format!("http://{address}"))).await;
    assert_eq!(own.0, 201, "{}", own.1);
    hub.drain(MS).await;
}
