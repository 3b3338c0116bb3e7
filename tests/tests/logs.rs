//! Log records on their way from a `tracing` subscriber through an agent or a
//! dashboard to the hub's log sink.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "logs/positions.rs"]
mod positions;

use std::fmt::Write as _;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::prelude::*;
use trunkline_client::logs::{self, Logs};
use trunkline_client::testing::{Script, Scripts, Viewer};
use trunkline_client::{Agent, Dashboard, Request};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::message::LogLevel;
use trunkline_server::hooks::{BoxFuture, ForwardedLogs, LogSender, LogSinkError};
use trunkline_server::testing::{Cable, TestHub, TestLink};
use trunkline_server::{Hub, LogSink, TracingLogSink};
use trunkline_tests::process::now;

const S: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn records_reach_the_sink_with_whose_they_are() {
    let (hub, sink) = hub_with_a_sink().await;
    let (layer, agents) = logs::forward(logs::Options::default());
    let (other, dashboards) = logs::forward(logs::Options::default());
    let _listening = listen(tracing_subscriber::registry().with(layer).with(other));
    tracing::info!(jobs = 3, "before there is an agent");
    let _agent = agent(&hub, agents);
    let _dashboard = Dashboard::over(hub.cable().connector())
        .id("web-1".parse().unwrap())
        .logs(dashboards)
        .connect();
    sink.has(2).await;
    tracing::warn!("later");
    sink.has(4).await;
    for sender in [
        LogSender::Agent("build-1".parse().unwrap()),
        LogSender::Dashboard("web-1".parse().unwrap()),
    ] {
        let taken = sink.of(&sender);
        let [first, second] = &taken[..] else { panic!("{taken:?}") };
        assert_eq!((first.tenant.as_str(), first.first, second.first), ("default", 0, 1));
        assert_eq!(first.stream, second.stream);
        assert_eq!((&first.missing, &second.missing), (&None, &None));
        let (first, second) = (&first.records[0], &second.records[0]);
        assert_eq!(first.message, "before there is an agent");
        assert_eq!((&first.level, &*first.target), (&LogLevel::Info, "logs"));
        assert_eq!(first.fields["jobs"], "3");
        assert_eq!((&second.level, &*second.message), (&LogLevel::Warn, "later"));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_said_while_the_hub_is_away_comes_once_and_what_had_no_room_is_named() {
    let (hub, sink) = hub_with_a_sink().await;
    let options = logs::Options { records_max: 100, ..logs::Options::default() };
    let (layer, logs) = logs::forward(options);
    let _listening = listen(tracing_subscriber::registry().with(layer));
    let cable = hub.cable();
    let _agent =
        Agent::over(cable.connector(), "build-1").unwrap().logs(logs).connect(Scripts::new());
    tracing::info!("0");
    sink.has(1).await;
    cable.cut();
    tracing::info!("1");
    sink.has(2).await;
    hub.kill();
    for n in 2..1000 {
        tracing::info!("{n}");
        tokio::task::yield_now().await;
    }
    passes(60 * S).await;
    hub.restart().await;
    sink.has(102).await;
    let taken = sink.taken();
    let missing: Vec<_> = taken.iter().filter_map(|logs| logs.missing.as_ref()).collect();
    assert_eq!(missing, [&(2..900)]);
    let expected: Vec<String> = (0..2).chain(900..1000).map(|n: u32| n.to_string()).collect();
    assert_eq!(sink.messages(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_fails_hangs_or_panics_gets_its_records_again_and_holds_up_nobody() {
    let (hub, sink) = hub_with_a_sink().await;
    let (layer, logs) = logs::forward(logs::Options::default());
    let _listening = listen(tracing_subscriber::registry().with(layer));
    let _agent = agent(&hub, logs);
    let dashboard = Dashboard::over(hub.cable().connector()).connect();
    for (mood, patience) in [(Mood::Fails, 6 * S), (Mood::Panics, 6 * S), (Mood::Hangs, 16 * S)] {
        let before = sink.messages().len();
        let asked = sink.asked();
        sink.is(mood);
        tracing::info!("{mood:?}");
        sink.was_asked(asked + 1).await;
        let begun = now();
        // While it is stuck, commands run.
        let mut hello = Viewer::run(&dashboard, "build-1", Request::text("hi")).await.unwrap();
        hello.sees("hello").await;
        assert!(now() - begun < S, "{mood:?}");
        sink.is(Mood::Takes);
        sink.has(before + 1).await;
        assert!(now() - begun <= patience, "{mood:?}: {:?}", now() - begun);
    }
    assert_eq!(sink.messages(), ["Fails", "Panics", "Hangs"]);
}

#[tokio::test(start_paused = true)]
async fn a_hub_without_a_sink_says_so_and_hears_no_more_on_that_link() {
    let hub = TestHub::start().await;
    let (layer, logs) = logs::forward(logs::Options::default());
    let _listening = listen(tracing_subscriber::registry().with(layer));
    let (cable, said) = (hub.cable(), Arc::default());
    let connector = tapped(&cable, &said);
    let _agent = Agent::over(connector, "build-1").unwrap().logs(logs).connect(Scripts::new());
    let batches = || {
        let said = said.lock().unwrap();
        said.iter().filter(|text| text.contains("log:batch")).count()
    };
    for links in 1..=3 {
        for n in 0..30 {
            tracing::info!("{n}");
            passes(S).await;
        }
        assert_eq!(batches(), links);
        cable.cut();
        passes(60 * S).await;
    }
}

/// The link itself says something about every frame, and louder than anybody.
#[tokio::test(start_paused = true)]
async fn a_link_that_talks_about_its_frames_is_no_circle() {
    let (hub, sink) = hub_with_a_sink().await;
    let everything = logs::Options { level: Level::TRACE, ..logs::Options::default() };
    let (layer, logs) = logs::forward(everything);
    let seen = Seen::default();
    let _listening = listen(tracing_subscriber::registry().with(layer).with(seen.clone()));
    let connector = tapped(&hub.cable(), &Arc::default());
    let _agent = Agent::over(connector, "build-1").unwrap().logs(logs).connect(Scripts::new());
    tracing::info!("once");
    sink.has(1).await;
    passes(3600 * S).await;
    assert_eq!(sink.messages(), ["once"]);
    let lines = seen.lines.lock().unwrap();
    assert!(lines.iter().filter(|line| line.starts_with("wire")).count() > 1000, "heartbeats");
}

/// All that everybody in this process says, at every level, is heard: hub, agent
/// and dashboard, over real sockets. Only what the application says is forwarded.
#[tokio::test]
async fn a_subscriber_that_hears_everything_reaches_silence() {
    let sink = Arc::new(Notes::default());
    let hub = Hub::builder().logs(Arc::clone(&sink) as Arc<dyn LogSink>).start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let everything = logs::Options {
        level: Level::TRACE,
        gather: Duration::from_millis(1),
        ..logs::Options::default()
    };
    let (layer, agents) = logs::forward(everything);
    let (other, dashboards) = logs::forward(everything);
    let _listening = listen(tracing_subscriber::registry().with(layer).with(other));
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    let _agent = Agent::builder(&url, "build-1").unwrap().logs(agents).connect(Scripts::new());
    let _dashboard = Dashboard::builder(&url).unwrap().logs(dashboards).connect();
    // Whatever sending one said would be there before the next.
    for n in 0..50 {
        tracing::trace!("{n}");
        sink.has(2 * (n + 1)).await;
    }
    let mut messages = sink.messages();
    messages.sort_by_key(|message| message.parse::<usize>().unwrap());
    let expected: Vec<String> = (0..50).flat_map(|n| [n, n]).map(|n| n.to_string()).collect();
    assert_eq!(messages, expected);
}

#[tokio::test(start_paused = true)]
async fn what_is_forwarded_into_the_hubs_own_log_forges_nothing_there() {
    let hub = TestHub::start_with(|builder| builder.logs(Arc::new(TracingLogSink))).await;
    let (layer, logs) = logs::forward(logs::Options::default());
    let seen = Seen::default();
    let _listening = listen(tracing_subscriber::registry().with(layer).with(seen.clone()));
    let _agent = agent(&hub, logs);
    let evil = "x\r\n2026 ERROR forged\u{1b}[2J\u{202e}";
    tracing::error!(target: "app", evil, "{evil}");
    let lines = loop {
        let lines = seen.lines.lock().unwrap().clone();
        if lines.iter().any(|line| line.starts_with("trunkline::forwarded")) {
            break lines;
        }
        passes(S).await;
    };
    let forwarded = lines.iter().filter(|line| line.starts_with("trunkline::forwarded"));
    let forwarded: Vec<&String> = forwarded.collect();
    let [line] = &forwarded[..] else { panic!("{forwarded:?}") };
    assert!(line.starts_with("trunkline::forwarded ERROR"), "{line}");
    assert!(line.contains(r#"message="x\r\n2026 ERROR forged\u{1b}[2J\u{202e}""#), "{line}");
    assert!(line.contains(r#"fields={"evil": "x\r\n2026"#), "{line}");
    assert!(line.contains(r#"sender=build-1 subject="build-1""#), "{line}");
    assert!(!line.contains(|c: char| c.is_control() || c == '\u{202e}'), "{line}");
    // It is said once, and is not forwarded in its turn.
    passes(3600 * S).await;
    let count = |lines: &[String]| {
        lines.iter().filter(|line| line.starts_with("trunkline::forwarded")).count()
    };
    assert_eq!(count(&seen.lines.lock().unwrap()), 1);
}

#[tokio::test(start_paused = true)]
async fn a_sender_has_one_batch_under_way_and_nothing_is_taken_twice() {
    let (hub, sink) = hub_with_a_sink().await;
    sink.is(Mood::Hangs);
    let mut guest = Guest::dials(&hub, "g-1").await;
    guest.says("a", "", 0, 1, 10).await;
    guest.says("b", "", 1, 1, 10).await;
    assert!(guest.hears().await.contains(r#""in_reply_to":"b","code":"rate_limited""#));
    let failed = guest.hears().await;
    assert!(failed.contains(r#""in_reply_to":"a","code":"internal""#), "{failed}");
    assert!(failed.contains(r#""retry_after_ms":5000"#), "{failed}");
    assert_eq!(sink.asked(), 1);
    sink.is(Mood::Takes);
    guest.says("c", "", 0, 3, 10).await;
    assert!(guest.hears().await.contains(r#""offset":3}"#));
    // Its link was lost, and it did not hear that.
    guest = Guest::dials(&hub, "g-1").await;
    guest.says("d", "", 1, 3, 10).await;
    assert!(guest.hears().await.contains(r#""offset":4}"#));
    guest.says("e", "", 0, 4, 10).await;
    assert!(guest.hears().await.contains(r#""offset":4}"#));
    guest.says("f", r#""missing_from":2,"#, 9, 1, 10).await;
    assert!(guest.hears().await.contains(r#""offset":10}"#));
    let taken = sink.taken();
    let ranges: Vec<_> = taken.iter().map(|t| (t.missing.clone(), t.first, t.end())).collect();
    assert_eq!(ranges, [(None, 0, 3), (None, 3, 4), (Some(4..9), 9, 10)]);
}

#[tokio::test(start_paused = true)]
async fn what_a_stuck_sink_is_given_is_bounded() {
    let (hub, sink) = hub_with_a_sink().await;
    sink.is(Mood::Hangs);
    let mut guests = Vec::new();
    for n in 0..20 {
        let mut guest = Guest::dials(&hub, &format!("g-{n}")).await;
        guest.says("a", "", 0, 120, 8192).await;
        guests.push(guest);
    }
    let mut limited = 0;
    for guest in &mut guests {
        limited += usize::from(guest.hears().await.contains("rate_limited"));
    }
    assert_eq!((sink.asked(), limited), (16 * 1024 * 1024 / (120 * 8300), 4));
    // They have been told to come again, and there is room.
    sink.is(Mood::Takes);
    for guest in &mut guests {
        guest.says("b", "", 0, 120, 8192).await;
        assert!(guest.hears().await.contains("log:taken"));
    }
}

// ---- who is there -----------------------------------------------------------

async fn hub_with_a_sink() -> (TestHub, Arc<Notes>) {
    let sink = Arc::new(Notes::default());
    let given = Arc::clone(&sink);
    let hub =
        TestHub::start_with(move |builder| builder.logs(Arc::clone(&given) as Arc<dyn LogSink>))
            .await;
    (hub, sink)
}

fn agent(hub: &TestHub, logs: Logs) -> Agent {
    let scripts = Scripts::new().on("hi", Script::new().prints("hello"));
    Agent::over(hub.cable().connector(), "build-1").unwrap().logs(logs).connect(scripts)
}

/// Every test has its subscriber to itself: all of it lives on one thread.
fn listen(subscriber: impl Subscriber + Send + Sync) -> DefaultGuard {
    tracing::subscriber::set_default(subscriber)
}

/// Time passes, on the virtual clock.
async fn passes(time: Duration) {
    tokio::time::sleep_until(now() + time).await;
}

/// A dashboard, by hand.
struct Guest(TestLink);

impl Guest {
    async fn dials(hub: &TestHub, name: &str) -> Self {
        let mut guest = Self(hub.cable().dial().unwrap());
        let payload = format!(r#"{{"protocols":[1],"dashboard":"{name}"}}"#);
        guest.send(format!(r#"{{"type":"dashboard:connect","payload":{payload}}}"#)).await;
        guest.hears().await;
        guest.hears().await;
        guest
    }

    async fn says(&mut self, id: &str, missing: &str, offset: u64, records: usize, bytes: usize) {
        let message = "x".repeat(bytes);
        let record =
            format!(r#"{{"ts_ms":0,"level":"info","target":"app","message":"{message}"}}"#);
        let records = vec![record; records].join(",");
        let stream = "01977a3e-7001-7b20-8000-00000000f002";
        let payload =
            format!(r#"{{"stream":"{stream}",{missing}"offset":{offset},"records":[{records}]}}"#);
        self.send(format!(r#"{{"type":"log:batch","id":"{id}","payload":{payload}}}"#)).await;
    }

    async fn send(&mut self, text: String) {
        self.0.send(Frame::Text(text.into())).await.unwrap();
    }

    /// The next message that is about something.
    async fn hears(&mut self) -> String {
        loop {
            let frame = tokio::time::timeout(120 * S, self.0.next()).await.unwrap();
            let Frame::Text(json) = frame.unwrap().unwrap() else { panic!("not text") };
            let text = String::from_utf8(json.to_vec()).unwrap();
            if !text.contains("heartbeat:") {
                return text;
            }
        }
    }
}

// ---- a sink that remembers --------------------------------------------------

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Takes,
    Fails,
    Panics,
    Hangs,
}

#[derive(Default)]
struct Notes {
    mood: Mutex<Mood>,
    /// What was taken, and how often it was asked.
    notes: watch::Sender<(Vec<ForwardedLogs>, usize)>,
}

impl LogSink for Notes {
    fn take<'a>(&'a self, logs: &'a ForwardedLogs) -> BoxFuture<'a, Result<(), LogSinkError>> {
        let mood = *self.mood.lock().unwrap();
        self.notes.send_modify(|(taken, asked)| {
            *asked += 1;
            if mood == Mood::Takes {
                taken.push(logs.clone());
            }
        });
        Box::pin(async move {
            match mood {
                Mood::Takes => Ok(()),
                Mood::Fails => Err(LogSinkError("full".into())),
                Mood::Panics => panic!("no such thing"),
                Mood::Hangs => std::future::pending().await,
            }
        })
    }
}

impl Notes {
    fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn taken(&self) -> Vec<ForwardedLogs> {
        self.notes.borrow().0.clone()
    }

    fn asked(&self) -> usize {
        self.notes.borrow().1
    }

    fn of(&self, sender: &LogSender) -> Vec<ForwardedLogs> {
        self.taken().into_iter().filter(|logs| logs.sender == *sender).collect()
    }

    fn messages(&self) -> Vec<String> {
        let records = self.taken().into_iter().flat_map(|logs| logs.records);
        records.map(|record| record.message).collect()
    }

    async fn has(&self, records: usize) {
        let count = |taken: &[ForwardedLogs]| taken.iter().map(|logs| logs.records.len()).sum();
        self.until(|(taken, _)| {
            let count: usize = count(taken);
            count >= records
        })
        .await;
    }

    async fn was_asked(&self, times: usize) {
        self.until(|(_, asked)| *asked >= times).await;
    }

    async fn until(&self, is_so: impl FnMut(&(Vec<ForwardedLogs>, usize)) -> bool) {
        let mut notes = self.notes.subscribe();
        let so = notes.wait_for(is_so);
        tokio::time::timeout(120 * S, so).await.expect("it comes in time").unwrap();
    }
}

// ---- a link that is listened to ---------------------------------------------

struct Tap {
    link: TestLink,
    said: Arc<Mutex<Vec<String>>>,
}

/// Dials taps.
fn tapped(
    cable: &Cable,
    said: &Arc<Mutex<Vec<String>>>,
) -> impl Fn() -> Ready<io::Result<Tap>> + Send + Sync + use<> + 'static {
    let (cable, said) = (cable.clone(), Arc::clone(said));
    move || ready(cable.dial().map(|link| Tap { link, said: Arc::clone(&said) }))
}

impl Stream for Tap {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        tracing::error!(target: "wire", "looks for a frame");
        self.link.poll_next_unpin(cx)
    }
}

impl Sink<Frame> for Tap {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.poll_ready_unpin(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        tracing::error!(target: "wire", ?frame, "sends a frame");
        if let Frame::Text(json) = &frame {
            self.said.lock().unwrap().push(String::from_utf8(json.to_vec()).unwrap());
        }
        self.link.start_send_unpin(frame)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.poll_flush_unpin(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.poll_close_unpin(cx)
    }
}

// ---- what an operator sees --------------------------------------------------

/// A log with a line for each event, as a terminal would show it.
#[derive(Clone, Default)]
struct Seen {
    lines: Arc<Mutex<Vec<String>>>,
}

struct Line(String);

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        write!(self.0, " {}={value}", field.name()).unwrap();
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_event(&self, event: &Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        let metadata = event.metadata();
        let mut line = Line(format!("{} {}", metadata.target(), metadata.level()));
        event.record(&mut line);
        self.lines.lock().unwrap().push(line.0);
    }
}
