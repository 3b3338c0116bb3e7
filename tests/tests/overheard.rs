//! Everything that is said to a log, by the libraries below ours too, while
//! tokens are shown, renewed and refused in every way, and while hostile texts
//! come from every side: no token stands in it, and nothing forges a line of it.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, Once};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Sink, Stream};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing::{Subscriber, span};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context as Layers;
use tracing_subscriber::prelude::*;
use trunkline_client::testing::{Script, Scripts, Viewer};
use trunkline_client::{Agent, Dashboard, Request, WebSocket};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_server::hooks::{BoxFuture, Event, Role};
use trunkline_server::{AuthError, Authenticator, Credentials, Hub, Identity, TokenTable};

#[allow(dead_code, reason = "other tests say more by hand")]
#[path = "bad_input/raw.rs"]
mod raw;

use raw::{Heard, PATIENCE, REQUEST, Raw, close};

// ---- who listens -------------------------------------------------------------

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note(line: String) {
    LINES.lock().unwrap().push(line);
}

/// All that was said so far.
fn lines() -> Vec<String> {
    LINES.lock().unwrap().clone()
}

/// Takes whatever is said through `tracing` or `log`, at every level, of every
/// crate. A line is written the way that shows most: as the value was given.
struct Ears;

impl<S: Subscriber> Layer<S> for Ears {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Layers<'_, S>) {
        let mut line = start(attributes.metadata());
        attributes.record(&mut Fields(&mut line));
        note(line);
    }

    fn on_record(&self, _: &span::Id, values: &span::Record<'_>, _: Layers<'_, S>) {
        let mut line = String::from("TRACE span:");
        values.record(&mut Fields(&mut line));
        note(line);
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: Layers<'_, S>) {
        let mut line = start(event.metadata());
        event.record(&mut Fields(&mut line));
        note(line);
    }
}

fn start(metadata: &tracing::Metadata<'_>) -> String {
    format!("{} {}:", metadata.level(), metadata.target())
}

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        write!(self.0, " {}={value}", field.name()).unwrap();
    }
}

impl log::Log for Ears {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        note(format!("{} {}: {}", record.level(), record.target(), record.args()));
    }

    fn flush(&self) {}
}

fn listen() {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Ears)).unwrap();
        log::set_logger(&Ears).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

/// An embedder's audit trail, as events are meant to be printed.
fn watch(event: &Event) {
    note(format!("INFO observer: {event:?}"));
}

/// What a WebSocket library says of the frames that it carries, if it is asked
/// for every detail. Nobody can switch that off for an embedder;
/// `docs/security.md` tells them not to switch it on.
fn is_of_the_wire(line: &str) -> bool {
    line.starts_with("TRACE tungstenite::")
}

// ---- secrets -----------------------------------------------------------------

/// No token is a part of another one.
const GREETING: &str = "tok3n-shown-in-a-greeting";
const AGENTS: &str = "tok3n-shown-by-an-agent";
const HEADER: &str = "tok3n-shown-in-a-header";
const SUBPROTOCOL: &str = "tok3n-shown-as-a-subprotocol";
/// [`SUBPROTOCOL`] as it stands there.
const SUBPROTOCOL_BASE64: &str = "dG9rM24tc2hvd24tYXMtYS1zdWJwcm90b2NvbA";
const QUERY: &str = "tok3n-shown-in-a-url";
const RENEWED: &str = "tok3n-shown-to-renew-another";
const WRONG: &str = "tok3n-that-nobody-gave-out";
/// [`WRONG`] as it stands among subprotocols.
const WRONG_BASE64: &str = "dG9rM24tdGhhdC1ub2JvZHktZ2F2ZS1vdXQ";
const MISPLACED: &str = "tok3n-where-none-belongs";

const SECRETS: [&str; 10] = [
    GREETING,
    AGENTS,
    HEADER,
    SUBPROTOCOL,
    SUBPROTOCOL_BASE64,
    QUERY,
    RENEWED,
    WRONG,
    WRONG_BASE64,
    MISPLACED,
];

fn secret_in(text: &str) -> Option<&'static str> {
    SECRETS.into_iter().find(|secret| text.contains(secret))
}

fn tokens() -> TokenTable {
    TokenTable::new()
        .agent(AGENTS, "acme", "build-1")
        .and_then(|table| table.dashboard(GREETING, "acme", "ann"))
        .and_then(|table| table.dashboard(HEADER, "acme", "ann"))
        .and_then(|table| table.dashboard(SUBPROTOCOL, "acme", "ann"))
        .and_then(|table| table.dashboard(QUERY, "acme", "ann"))
        .and_then(|table| table.dashboard(RENEWED, "acme", "ann"))
        .unwrap()
}

fn greeting(token: Option<&str>) -> Value {
    let mut greeting = json!({"type": "dashboard:connect", "payload": {"protocols": [1]}});
    if let Some(token) = token {
        greeting["payload"]["token"] = json!(token);
    }
    greeting
}

/// Everything that the hub says until it is silent or closes, in one text.
async fn everything(peer: &mut Raw) -> String {
    let mut said = String::new();
    while let Ok(heard) = timeout(Duration::from_millis(300), peer.hear()).await {
        write!(said, "{heard:?}").unwrap();
        if heard == Heard::End {
            break;
        }
    }
    said
}

#[tokio::test]
async fn no_token_stands_in_a_log_an_error_or_a_debug_form() {
    listen();
    let mut shown = Vec::new();
    let builder = Hub::builder().authenticator(tokens()).query_tokens(true).observer(watch);
    shown.push(format!("{builder:?}"));
    let hub = builder.start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn({
        let hub = hub.clone();
        async move { hub.serve(listener).await }
    });

    // The clients of this SDK: in a greeting, in a URL, refused, renewed.
    let url = format!("ws://{address}/");
    let scripts = Scripts::new().on("hi", Script::new().prints("hello"));
    let builder = Agent::builder(&url, "build-1").unwrap().token(AGENTS);
    shown.push(format!("{builder:?}"));
    let agent = builder.connect(scripts);
    let builder = Dashboard::builder(&url).unwrap().token(GREETING);
    shown.push(format!("{builder:?}"));
    let dashboard = builder.connect();
    let mut hello = Viewer::run(&dashboard, "build-1", Request::text("hi")).await.unwrap();
    hello.sees("hello").await;
    let with_query = WebSocket::new(&format!("{url}?access_token={QUERY}")).unwrap();
    shown.push(format!("{with_query:?}"));
    let by_url = Dashboard::over(with_query).connect();
    timeout(PATIENCE, by_url.connected()).await.unwrap().unwrap();
    let refused = Dashboard::builder(&url).unwrap().token(WRONG).connect();
    let why = timeout(PATIENCE, refused.connected()).await.unwrap().unwrap_err();
    shown.push(format!("{why} {why:?} {agent:?} {dashboard:?} {refused:?} {hub:?}"));
    shown.push(format!("{:?} {:?}", agent.connection().borrow(), refused.connection().borrow()));

    // By hand: in a header, as a subprotocol, twice, wrong, and misplaced.
    let offer = |token: &str| {
        REQUEST.replace("trunkline.v1", &format!("trunkline.v1, trunkline.bearer.{token}"))
    };
    let header = |token: &str| {
        REQUEST.replace("\r\n\r\n", &format!("\r\nAuthorization: Bearer {token}\r\n\r\n"))
    };
    let query = |token: &str| REQUEST.replace("GET / ", &format!("GET /?access_token={token} "));
    for request in [
        offer(SUBPROTOCOL_BASE64),
        header(HEADER),
        query(QUERY),
        offer(WRONG_BASE64),
        header(WRONG),
        query(WRONG),
        offer(SUBPROTOCOL_BASE64)
            .replace("\r\n\r\n", &format!("\r\nAuthorization: Bearer {HEADER}\r\n\r\n")),
        header(&format!("{MISPLACED} {MISPLACED}")),
        format!("GET /{MISPLACED} {MISPLACED}\r\n\r\n"),
        header(HEADER).replace("13", MISPLACED),
    ] {
        let mut peer = Raw::dial(address).await;
        let answer = peer.ask(request.as_bytes()).await;
        if answer.starts_with("HTTP/1.1 101 ") {
            peer.say(&greeting(None).to_string()).await;
            shown.push(everything(&mut peer).await);
        }
        shown.push(answer);
    }
    let bad = [
        greeting(Some(WRONG)).to_string(),
        greeting(Some(GREETING)).to_string().replace('}', ""),
        greeting(Some(MISPLACED)).to_string().replace("\"token\"", "\"protocols\""),
        json!({"type": MISPLACED}).to_string(),
        json!({"type": "dashboard:connect", "payload": {"protocols": [1], "token": [MISPLACED]}})
            .to_string(),
        MISPLACED.to_owned(),
    ];
    for greeting in bad {
        let mut peer = Raw::upgraded(address).await;
        peer.say(&greeting).await;
        shown.push(everything(&mut peer).await);
    }
    let mut peer = Raw::upgraded(address).await;
    peer.say(&greeting(Some(GREETING)).to_string()).await;
    peer.until("connection:ack").await;
    for token in [json!(RENEWED), json!(WRONG), json!([MISPLACED]), json!({"x": MISPLACED})] {
        let refresh = json!({"type": "auth:refresh-token", "payload": {"token": token}});
        peer.say(&refresh.to_string()).await;
        shown.push(everything(&mut peer).await);
    }
    for said in [
        json!({"type": "subscribe", "payload": {"terminals": [{"agent": MISPLACED}]}}),
        json!({"type": "subscribe", "payload": {"terminals": [], "token": MISPLACED}}),
        json!({"type": "command:interrupt", "payload": {"command": MISPLACED}}),
        json!({"type": "error", "payload":
            {"code": "x", "message": MISPLACED, "recoverable": false}}),
    ] {
        peer.say(&said.to_string()).await;
    }
    let heard = everything(&mut peer).await;
    assert!(heard.contains("error"), "{heard}");
    // Of a subscription that it made the dashboard hears: that names an agent.
    shown.push(heard.replace(&format!(r#"\"agent\":\"{MISPLACED}\""#), ""));
    peer.send(&close(4999, "")).await.unwrap();
    agent.stop().await;
    dashboard.close().await;
    hub.drain(Duration::ZERO).await;
    serving.await.unwrap().unwrap();

    // Values that an embedder may print.
    let credentials = Credentials { role: Role::Dashboard(None), token: Some(WRONG.into()) };
    let refused = tokens().authenticate(&credentials).await.unwrap_err();
    shown.push(format!("{credentials:?} {:?} {refused} {refused:?}", tokens()));

    for text in &shown {
        assert_eq!(secret_in(text), None, "{text}");
    }
    let lines = lines();
    let with_secrets: Vec<&String> =
        lines.iter().filter(|line| secret_in(line).is_some() && !is_of_the_wire(line)).collect();
    assert!(with_secrets.is_empty(), "{with_secrets:#?}");
    // It did listen: to the hub, to the client, and to what is below them.
    for target in ["trunkline::hub: ", "trunkline_client::", "tungstenite::", "observer: "] {
        assert!(lines.iter().any(|line| line.contains(target)), "nothing of {target}");
    }
}

// ---- forged lines ------------------------------------------------------------

const EVIL: &str = "x\r\n2026-01-01T00:00:00Z  INFO forged\u{1b}[2J\u{9b}31m\u{202e}\u{7}\u{0}";

/// Refuses whoever comes, and says why in the peer's own words.
struct Parrot;

impl Authenticator for Parrot {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        Box::pin(async move {
            let words = credentials.token.as_ref().map_or("", |token| token.reveal()).to_owned();
            match words.strip_prefix("let in ") {
                Some(subject) => Ok(Identity::new("acme".parse().unwrap(), subject)),
                None if words.contains("forbidden") => Err(AuthError::Forbidden(words)),
                None if words.contains("unavailable") => Err(AuthError::Unavailable(words)),
                None => Err(AuthError::Unauthorized(words)),
            }
        })
    }
}

/// Replaces every text in a message, one at a time.
fn every_text(message: &Value) -> Vec<Value> {
    fn texts(value: &Value, at: &str, all: &mut Vec<String>) {
        match value {
            Value::String(_) => all.push(at.to_owned()),
            Value::Array(elements) => {
                for (n, value) in elements.iter().enumerate() {
                    texts(value, &format!("{at}/{n}"), all);
                }
            }
            Value::Object(members) => {
                for (name, value) in members {
                    texts(value, &format!("{at}/{name}"), all);
                }
            }
            _ => {}
        }
    }
    let mut all = Vec::new();
    texts(message, "", &mut all);
    let replaced = |at: &String| {
        let mut message = message.clone();
        *message.pointer_mut(at).unwrap() = json!(EVIL);
        message
    };
    let mut messages: Vec<Value> = all.iter().map(replaced).collect();
    let mut extra = message.clone();
    extra["payload"][EVIL] = json!(EVIL);
    messages.push(extra);
    messages
}

fn vectors(file: &str) -> Vec<Value> {
    let vectors: Vec<Value> = serde_json::from_str(file).unwrap();
    let json = vectors.iter().map(|vector| vector["json"].as_str().unwrap());
    json.map(|json| serde_json::from_str(json).unwrap()).collect()
}

/// A hub that says what it was told to, and hears nothing.
struct Says(VecDeque<Frame>);

impl Stream for Says {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.pop_front().map_or(Poll::Pending, |frame| Poll::Ready(Some(Ok(frame))))
    }
}

impl Sink<Frame> for Says {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, _: Frame) -> io::Result<()> {
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// An acknowledgement, and whatever a hub of bad intent may say after it.
fn a_hub_of_bad_intent(vectors: &[Value]) -> Says {
    let is_ack = |message: &&Value| message["type"] == "connection:ack";
    let ack = vectors.iter().find(is_ack).unwrap();
    // What tells an agent to end would end this.
    let goes_on = |message: &&Value| !is_ack(message) && message["type"] != "agent:control";
    let rest = vectors.iter().filter(goes_on).flat_map(every_text);
    let frames = std::iter::once(ack.clone()).chain(rest);
    let frames = frames.map(|message| Frame::Text(message.to_string().into()));
    let close = Frame::Close(Close::new(CloseCode::Restart, EVIL));
    Says(frames.chain([close]).collect())
}

/// A hub that refuses whoever greets.
fn a_hub_that_refuses(code: CloseCode) -> Says {
    let error = json!({"type": "error", "payload":
        {"code": "unauthorized", "message": EVIL, "recoverable": false, "field": EVIL}});
    let close = Frame::Close(Close::new(code, EVIL));
    Says([Frame::Text(error.to_string().into()), close].into())
}

#[tokio::test]
async fn nothing_that_a_peer_says_forges_a_line() {
    listen();
    let mut shown = Vec::new();
    let hub = Hub::builder().authenticator(Parrot).observer(watch).start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn({
        let hub = hub.clone();
        async move { hub.serve(listener).await }
    });
    // To the hub: heads of requests, tokens, and every text of every message.
    let heads = ["Origin", "Host", "User-Agent", "X-Forwarded-For", "Authorization", "Cookie"];
    for line in heads {
        let evil = EVIL.replace(['\r', '\n', '\0'], "");
        let request = REQUEST.replace("\r\n\r\n", &format!("\r\n{line}: Bearer {evil}\r\n\r\n"));
        shown.push(Raw::dial(address).await.ask(request.as_bytes()).await);
    }
    for why in ["forbidden", "unavailable", "unauthorized"] {
        let mut peer = Raw::upgraded(address).await;
        peer.say(&greeting(Some(&format!("{why} {EVIL}"))).to_string()).await;
        shown.push(everything(&mut peer).await);
    }
    let agents = vectors(include_str!("../../agent-protocol/vectors/agent-to-hub.json"));
    let dashboards = vectors(include_str!("../../agent-protocol/vectors/dashboard-to-hub.json"));
    let subject = format!("let in {EVIL}");
    let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
    let agent = json!({"type": "agent:connect", "payload":
        {"protocols": [1], "agent": "a", "instance": instance, "token": subject}});
    for (greeting, messages) in [(agent, agents), (greeting(Some(&subject)), dashboards)] {
        let mut peer = Raw::upgraded(address).await;
        peer.say(&greeting.to_string()).await;
        peer.until("connection:ack").await;
        let ping = json!({"type": "heartbeat:ping"}).to_string();
        for message in messages.iter().flat_map(every_text) {
            let text = message.to_string();
            if text.contains(":disconnect") {
                continue; // below
            }
            peer.say(&text).await;
            // So that no row of bad ones ends the link.
            peer.say(&ping).await;
        }
        let heard = everything(&mut peer).await;
        assert!(heard.contains("invalid_message") && !heard.contains("Close("), "{heard}");
        shown.push(heard);
        let goodbye = if greeting["type"] == "agent:connect" { "agent" } else { "dashboard" };
        let goodbye = json!({"type": format!("{goodbye}:disconnect"), "payload": {"reason": EVIL}});
        peer.say(&goodbye.to_string()).await;
        shown.push(everything(&mut peer).await);
        let mut peer = Raw::upgraded(address).await;
        peer.say(&greeting.to_string()).await;
        peer.until("connection:ack").await;
        peer.send(&close(4999, EVIL)).await.unwrap();
        shown.push(everything(&mut peer).await);
    }
    hub.drain(Duration::ZERO).await;
    serving.await.unwrap().unwrap();

    // To the clients.
    let to_agents = vectors(include_str!("../../agent-protocol/vectors/hub-to-agent.json"));
    let to_dashboards = vectors(include_str!("../../agent-protocol/vectors/hub-to-dashboard.json"));
    let before = lines().len();
    let agent =
        Agent::over(move || std::future::ready(Ok(a_hub_of_bad_intent(&to_agents))), "build-1")
            .unwrap()
            .connect(Scripts::new());
    let dashboard =
        Dashboard::over(move || std::future::ready(Ok(a_hub_of_bad_intent(&to_dashboards))))
            .token(GREETING)
            .connect();
    for mut connection in [agent.connection(), dashboard.connection()] {
        let closed = connection.wait_for(|state| format!("{state:?}").contains("forged"));
        let state = timeout(PATIENCE, closed).await.unwrap().unwrap().clone();
        shown.push(trunkline_examples::connection_in_words(&state));
    }
    let refusing = || std::future::ready(Ok(a_hub_that_refuses(CloseCode::Forbidden)));
    let dashboard = Dashboard::over(refusing).connect();
    shown.push(timeout(PATIENCE, dashboard.connected()).await.unwrap().unwrap_err().to_string());
    let agent = Agent::over(refusing, "build-1").unwrap().connect(Scripts::new());
    shown.push(timeout(PATIENCE, agent.closed()).await.unwrap().to_string());

    let forges = |text: &str| {
        // An answer in HTTP, and nothing else, has lines.
        let text =
            if text.starts_with("HTTP/1.1 ") { text.replace("\r\n", "") } else { text.into() };
        text.trim_end().contains(|c: char| c.is_control() || c == '\u{202e}')
    };
    for text in &shown {
        assert!(!forges(text), "{text:?}");
    }
    let lines = lines();
    let bad: Vec<&String> =
        lines.iter().filter(|line| forges(line) && !is_of_the_wire(line)).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let told = |of: &str, by: &str| {
        lines[before..].iter().any(|line| line.contains(of) && line.contains(by))
    };
    assert!(told("the hub refused", "trunkline::client"), "the agent was told");
    assert!(lines.iter().any(|line| line.contains("greeting refused")), "the hub was told");
}
