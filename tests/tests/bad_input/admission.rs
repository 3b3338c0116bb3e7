//! Who may have a link at all: how many, from where, and how soon again.

use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use trunkline_server::protocol::limits::Limits;
use trunkline_server::protocol::rate::Rate;
use trunkline_server::{Hub, Origin, TokenTable};

use crate::raw::{PATIENCE, REQUEST, Raw};
use crate::stage::{Stage, dashboard_greeting, limits};

/// The opening handshake with further lines in its head.
fn request_with(lines: &str) -> String {
    REQUEST.replace("\r\n\r\n", &format!("\r\n{lines}\r\n\r\n"))
}

/// The opening handshake of what a proxy has passed on.
fn from(address: &str) -> String {
    request_with(&format!("X-Forwarded-For: {address}"))
}

async fn status(raw: &mut Raw, request: &str) -> u16 {
    let response = raw.ask(request.as_bytes()).await;
    response.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Nobody is there but who is known.
fn tokens() -> TokenTable {
    TokenTable::new()
        .agent("token-of-honest", "t", "honest")
        .unwrap()
        .dashboard("token-of-watcher", "t", "watcher")
        .unwrap()
}

#[tokio::test]
async fn a_link_too_many_is_told_when_to_come_back() {
    let mut stage = Stage::of(Hub::builder().limits(Limits { links_max: 4, ..limits() })).await;
    let first = stage.guest_dashboard("first").await;
    let second = stage.guest_dashboard("second").await;
    let mut third = Raw::dial(stage.address).await;
    let response = third.ask(REQUEST.as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
    assert!(response.contains("\r\nRetry-After: 10\r\n"), "{response}");
    drop((first, second));
    stage.goes_on_alone().await;
    let mut fourth = stage.guest_dashboard("fourth").await;
    fourth.lives(1).await;
}

#[tokio::test]
async fn an_address_has_only_so_many_links() {
    let limits = Limits { links_per_address: 4, ..limits() };
    let mut stage = Stage::of(Hub::builder().limits(limits)).await;
    // The stage has two of its own; who says nothing takes a place, too.
    let silent = Raw::dial(stage.address).await;
    let guest = stage.guest_dashboard("guest").await;
    let mut beyond = Raw::dial(stage.address).await;
    assert_eq!(status(&mut beyond, REQUEST).await, 503);
    drop((silent, guest));
    stage.goes_on_alone().await;
    stage.guest_dashboard("guest").await.lives(1).await;
}

#[tokio::test]
async fn who_guesses_tokens_is_slowed_and_who_is_known_goes_on() {
    let limits =
        Limits { failure_rate: Rate { every: Duration::from_millis(400), burst: 5 }, ..limits() };
    let mut stage = Stage::of(Hub::builder().limits(limits).authenticator(tokens())).await;
    for n in 0..5 {
        let mut thief = stage.stranger().await;
        thief.say(&dashboard_greeting(&format!("thief-{n}"))).await;
        thief.closed(4401).await;
    }
    let mut thief = Raw::dial(stage.address).await;
    // It is told before it has said anything.
    let response = thief.answer().await;
    assert!(response.starts_with("HTTP/1.1 429 "), "{response}");
    assert!(response.contains("\r\nRetry-After: 1\r\n"), "{response}");
    stage.goes_on_alone().await;
    // After as long as it was told it may try again, once.
    let mut tries = 0;
    let again = async {
        loop {
            let mut guest = Raw::dial(stage.address).await;
            tries += 1;
            if status(&mut guest, REQUEST).await == 101 {
                break guest;
            }
        }
    };
    let mut guest = tokio::time::timeout(PATIENCE, again).await.unwrap();
    guest.say(&dashboard_greeting("watcher")).await;
    guest.until("connection:ack").await;
    guest.lives(1).await;
    assert!(tries > 1, "it had to wait");
}

#[tokio::test]
async fn every_way_to_come_to_nothing_counts() {
    let limits =
        Limits { failure_rate: Rate { every: Duration::from_secs(600), burst: 4 }, ..limits() };
    let mut stage = Stage::of(Hub::builder().limits(limits).authenticator(tokens())).await;
    // Gone without a word, not HTTP, gone without a greeting, not a greeting.
    drop(Raw::dial(stage.address).await);
    assert_eq!(status(&mut Raw::dial(stage.address).await, "hello\r\n\r\n").await, 400);
    drop(stage.stranger().await);
    stage.goes_on_alone().await;
    let mut fourth = stage.stranger().await;
    fourth.say("{}").await;
    fourth.closed(4400).await;
    let response = Raw::dial(stage.address).await.answer().await;
    assert!(response.starts_with("HTTP/1.1 429 "), "{response}");
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn who_is_turned_away_takes_nobodys_place() {
    let limits = Limits {
        links_max: 8,
        links_per_address: 4,
        close_timeout: Duration::from_secs(20),
        ..limits()
    };
    let mut stage = Stage::of(Hub::builder().limits(limits)).await;
    let held = [stage.stranger().await, stage.stranger().await];
    // They read nothing, and stay for as long as they are let.
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(Raw::dial(stage.address).await);
    }
    stage.goes_on().await;
    drop(held);
    stage.goes_on_alone().await;
    stage.guest_dashboard("guest").await.lives(1).await;
    drop(crowd);
}

#[tokio::test]
async fn behind_a_proxy_each_is_counted_where_it_comes_from() {
    let limits = Limits { links_per_address: 2, ..limits() };
    let builder = Hub::builder().limits(limits).trust_proxies("127.0.0.0/8".parse().unwrap());
    let mut stage = Stage::of(builder).await;
    let mut links = Vec::new();
    for (address, expected) in [
        ("192.0.2.1", 101),
        ("192.0.2.1", 101),
        ("192.0.2.1", 503),
        ("203.0.113.9, 192.0.2.1", 503), // what is to the left anybody can write
        ("192.0.2.1, 127.0.0.9", 503),
        ("192.0.2.2", 101),
        ("2001:db8::1", 101),
        ("2001:db8::2", 101),
        ("2001:db8::3", 503),
        ("2001:db8:0:1::1", 101),
    ] {
        let mut link = Raw::dial(stage.address).await;
        assert_eq!(status(&mut link, &from(address)).await, expected, "{address}");
        links.push(link);
    }
    drop(links);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn nobody_is_believed_who_is_no_proxy() {
    let limits = Limits { links_per_address: 3, ..limits() };
    let mut stage = Stage::of(Hub::builder().limits(limits)).await;
    let mut third = Raw::dial(stage.address).await;
    assert_eq!(status(&mut third, &from("192.0.2.1")).await, 101);
    let mut fourth = Raw::dial(stage.address).await;
    assert_eq!(status(&mut fourth, &from("192.0.2.2")).await, 503);
    drop(third);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn what_a_connection_is_wrapped_in_is_part_of_its_time() {
    let limits = Limits {
        greeting_timeout: Duration::from_millis(300),
        failure_rate: Rate { every: Duration::from_secs(600), burst: 2 },
        ..limits()
    };
    let hub = Hub::builder().limits(limits).start().await.unwrap();
    let peer = "192.0.2.1".parse().unwrap();
    for _ in 0..2 {
        // A TLS handshake, say, that never ends.
        let arrival = hub.arrive(peer).unwrap();
        assert_eq!(hub.links(), 1);
        let serving = arrival.serve(std::future::pending::<std::io::Result<TcpStream>>());
        tokio::time::timeout(PATIENCE, serving).await.expect("it has a deadline");
        assert_eq!(hub.links(), 0);
    }
    // That counts as a failure like any other: this one is not even begun.
    let arrival = hub.arrive(peer).unwrap();
    arrival.serve(std::future::pending::<std::io::Result<TcpStream>>()).await;
    assert_eq!(hub.links(), 0);
    hub.drain(Duration::ZERO).await;
    let after = hub.arrive(peer);
    assert!(after.is_none(), "a hub that has ended takes nobody");
}

#[tokio::test]
async fn a_page_from_elsewhere_needs_leave() {
    let origin: Origin = "https://app.example".parse().unwrap();
    let builder = Hub::builder().limits(limits()).authenticator(tokens()).allow_origin(origin);
    let mut stage = Stage::of(builder).await;
    for (origin, expected) in [
        ("https://app.example", 101),
        ("https://hub.example", 101), // its own host
        ("https://evil.example", 403),
        ("http://app.example", 403),
        ("null", 403),
    ] {
        let request = request_with(&format!("Origin: {origin}"));
        assert_eq!(status(&mut Raw::dial(stage.address).await, &request).await, expected);
    }
    stage.goes_on_alone().await;
}

/// The page's own name was made to lead to this machine after it was loaded:
/// for its browser it is at home here.
#[tokio::test]
async fn a_page_whose_name_leads_here_for_now_needs_credentials() {
    let rebound = |host: &str| {
        let lines = format!("Host: {host}\r\nOrigin: http://{host}");
        REQUEST.replace("Host: hub.example", &lines)
    };
    let mut stage = Stage::new().await;
    let here = stage.address.to_string();
    for (host, expected) in
        [(here.as_str(), 101), ("localhost:7070", 101), ("evil.example:7070", 403)]
    {
        let mut page = Raw::dial(stage.address).await;
        assert_eq!(status(&mut page, &rebound(host)).await, expected, "{host}");
    }
    stage.goes_on_alone().await;
    // Where there are credentials, the page has none.
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(tokens())).await;
    let mut page = Raw::dial(stage.address).await;
    let cookie = "\r\nCookie: token=token-of-watcher; access_token=token-of-watcher\r\n\r\n";
    let request = rebound("evil.example:7070").replace("\r\n\r\n", cookie);
    assert_eq!(status(&mut page, &request).await, 101);
    page.say(r#"{"type":"dashboard:connect","payload":{"protocols":[1]}}"#).await;
    page.closed(4401).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_page_shows_its_token_as_a_subprotocol() {
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(tokens())).await;
    // "token-of-watcher" in base64url.
    let offer = "trunkline.v1, trunkline.bearer.dG9rZW4tb2Ytd2F0Y2hlcg";
    let mut page = Raw::dial(stage.address).await;
    let response = page.ask(REQUEST.replace("trunkline.v1", offer).as_bytes()).await;
    assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
    assert!(!response.contains("bearer"), "the token is not sent back: {response}");
    page.say(r#"{"type":"dashboard:connect","payload":{"protocols":[1]}}"#).await;
    page.until("connection:ack").await;
    page.lives(1).await;
    drop(page);
    let twice = REQUEST.replace("trunkline.v1", offer);
    let twice = twice.replace("\r\n\r\n", "\r\nAuthorization: Bearer token-of-watcher\r\n\r\n");
    assert_eq!(status(&mut Raw::dial(stage.address).await, &twice).await, 400);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_token_in_the_url_is_for_those_who_asked_for_it() {
    let request = REQUEST.replace("GET / ", "GET /?access_token=token-of-watcher ");
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(tokens())).await;
    assert_eq!(status(&mut Raw::dial(stage.address).await, &request).await, 400);
    stage.goes_on_alone().await;

    let builder = Hub::builder().limits(limits()).authenticator(tokens()).query_tokens(true);
    let hub = builder.start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { hub.serve(listener).await });
    let mut page = Raw::dial(address).await;
    assert_eq!(status(&mut page, &request).await, 101);
    page.say(r#"{"type":"dashboard:connect","payload":{"protocols":[1]}}"#).await;
    page.until("connection:ack").await;
}
