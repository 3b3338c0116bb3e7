//! How often anybody may do anything: each limit one below, at and one beyond
//! it, over raw links and on a clock that stands still while somebody acts.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::future::pending;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::time::timeout;
use trunkline_server::protocol::frame::Frame;
use trunkline_server::protocol::limits::Limits;
use trunkline_server::testing::{TestHub, TestLink};
use trunkline_server::{HubBuilder, TokenTable};

const S: Duration = Duration::from_secs(1);

/// The clock goes on, and nothing else happens.
async fn pass(time: Duration) {
    let _ = timeout(time, pending::<()>()).await;
}

/// A peer that says what it likes.
struct Raw {
    link: TestLink,
    said: u64,
}

/// What the hub said last.
#[derive(Debug, PartialEq)]
enum Heard {
    Message(Value),
    Close(u16, String),
}

impl Raw {
    async fn agent(hub: &TestHub, id: &str) -> Self {
        let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
        let payload = json!({"protocols": [1], "agent": id, "instance": instance, "token": id});
        Self::greet(hub, "agent:connect", payload).await.unwrap()
    }

    async fn dashboard(hub: &TestHub, token: &str, id: &str) -> Result<Self, Heard> {
        let payload = json!({"protocols": [1], "dashboard": id, "token": token});
        Self::greet(hub, "dashboard:connect", payload).await
    }

    async fn greet(hub: &TestHub, kind: &str, payload: Value) -> Result<Self, Heard> {
        let mut raw = Self { link: hub.cable().dial().unwrap(), said: 0 };
        raw.say(&json!({"type": kind, "payload": payload})).await;
        loop {
            match raw.hear().await {
                Heard::Message(message) if message["type"] == "connection:ack" => return Ok(raw),
                Heard::Message(_) => {}
                close @ Heard::Close(..) => return Err(close),
            }
        }
    }

    async fn say(&mut self, message: &Value) {
        self.link.send(Frame::Text(message.to_string().into())).await.unwrap();
    }

    async fn hear(&mut self) -> Heard {
        match self.link.next().await.unwrap().unwrap() {
            Frame::Text(text) => Heard::Message(serde_json::from_slice(&text).unwrap()),
            Frame::Close(close) => Heard::Close(close.code.number(), close.reason),
            Frame::Binary(_) => panic!("nothing here is read"),
        }
    }

    /// Asks, and hears whether that was too fast, and how long to wait then.
    async fn ask(&mut self, kind: &str, payload: &Value) -> Result<Option<u64>, Heard> {
        self.said += 1;
        let id = format!("r{}", self.said);
        self.say(&json!({"type": kind, "id": id, "payload": payload})).await;
        // Of input that is taken nothing is heard: a ping tells when it was.
        self.say(&json!({"type": "heartbeat:ping", "payload": {"n": self.said}})).await;
        let mut wait = None;
        loop {
            match self.hear().await {
                Heard::Message(message) if message["type"] == "heartbeat:pong" => return Ok(wait),
                Heard::Message(message) if message["payload"]["code"] == "rate_limited" => {
                    assert_eq!(message["payload"]["in_reply_to"], id);
                    assert_eq!(message["payload"]["recoverable"], true);
                    wait = message["payload"]["retry_after_ms"].as_u64();
                    assert!(wait.is_some_and(|wait| wait > 0));
                }
                Heard::Message(_) => {}
                close @ Heard::Close(..) => return Err(close),
            }
        }
    }
}

fn table() -> TokenTable {
    TokenTable::new()
        .dashboard("ann", "acme", "ann")
        .and_then(|table| table.dashboard("bob", "acme", "bob"))
        .and_then(|table| table.dashboard("eve", "evil", "ann"))
        .and_then(|table| table.agent("a", "acme", "a"))
        .unwrap()
}

async fn hub() -> TestHub {
    TestHub::start_with(|builder: HubBuilder| builder.authenticator(table())).await
}

fn command(n: u64) -> String {
    format!("0191d4a8-5a3c-7f00-8000-{n:012x}")
}

/// Everything that has a rate of its own, and its burst by default.
fn classes(n: u64) -> [(&'static str, Value, u32); 6] {
    let limits = Limits::default();
    let request =
        json!({"command": command(n), "agent": "absent", "spec": {"run": {"text": "ls"}}});
    let (requests, interrupts) = (limits.request_rate.burst, limits.interrupt_rate.burst);
    let size = json!({"cols": 80, "rows": 24});
    [
        ("command:request", request, requests),
        ("subscribe", json!({"terminals": [{"agent": "a"}]}), requests),
        ("terminal:resize", json!({"command": command(1), "size": size}), requests),
        ("command:interrupt", json!({"command": command(1)}), interrupts),
        ("system:emergency-stop", json!({"agents": ["absent"]}), interrupts),
        (
            "terminal:input",
            json!({"command": command(1), "offset": 0, "data": "x"}),
            limits.input_rate.burst,
        ),
    ]
}

#[tokio::test(start_paused = true)]
async fn each_kind_has_its_burst_and_what_is_earned_and_not_one_more() {
    for kind in 0..classes(0).len() {
        let hub = hub().await;
        let mut ann = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
        let mut bob = Raw::dashboard(&hub, "bob", "d2").await.unwrap();
        let mut wait = 0;
        let (word, _, burst) = classes(0)[kind].clone();
        for n in 0..=u64::from(burst) {
            let (_, payload, _) = &classes(n)[kind];
            match ann.ask(word, payload).await.unwrap() {
                None => assert!(n < u64::from(burst), "{word}: number {n} beyond the burst"),
                Some(ms) => {
                    assert_eq!(n, u64::from(burst), "{word} is refused too soon");
                    wait = ms;
                }
            }
        }
        let (_, payload, _) = &classes(1000)[kind];
        assert_eq!(bob.ask(word, payload).await, Ok(None), "{word}: bob pays for himself");
        pass(Duration::from_millis(wait - 1)).await;
        assert!(ann.ask(word, payload).await.unwrap().is_some(), "{word}: a moment too soon");
        pass(Duration::from_millis(1)).await;
        assert_eq!(ann.ask(word, payload).await, Ok(None), "{word}: as long as was said");
    }
}

#[tokio::test(start_paused = true)]
async fn links_of_one_subject_share_and_a_new_link_gives_nothing_back() {
    let hub = hub().await;
    let mut first = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
    let mut second = Raw::dashboard(&hub, "ann", "d2").await.unwrap();
    let mut foreign = Raw::dashboard(&hub, "eve", "d1").await.unwrap();
    let stop = json!({"agents": ["absent"]});
    for _ in 0..50 {
        assert_eq!(first.ask("system:emergency-stop", &stop).await, Ok(None));
    }
    assert!(second.ask("system:emergency-stop", &stop).await.unwrap().is_some());
    // A flood of one kind is in the way of no other.
    let (word, payload, _) = &classes(7)[0];
    assert_eq!(second.ask(word, payload).await, Ok(None));
    assert_eq!(foreign.ask("system:emergency-stop", &stop).await, Ok(None), "another tenant's ann");
    drop((first, second));
    let mut again = Raw::dashboard(&hub, "ann", "d3").await.unwrap();
    assert!(again.ask("system:emergency-stop", &stop).await.unwrap().is_some());
    pass(3 * S).await;
    for _ in 0..50 {
        assert_eq!(again.ask("system:emergency-stop", &stop).await, Ok(None), "all is earned");
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_closed_and_stays_out_as_long_as_it_goes_on() {
    let hub = hub().await;
    let mut ann = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
    let mut bob = Raw::dashboard(&hub, "bob", "d2").await.unwrap();
    let burst = u64::from(Limits::default().message_rate.burst);
    for n in 0..burst {
        ann.say(&json!({"type": "heartbeat:ping", "payload": {"n": n}})).await;
        let Heard::Message(_) = ann.hear().await else { panic!("{n} of {burst}") };
    }
    ann.say(&json!({"type": "no:such-thing"})).await;
    let closed = loop {
        if let Heard::Close(code, _) = ann.hear().await {
            break code;
        }
    };
    assert_eq!(closed, 4429);
    let mut again = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
    let stop = json!({"agents": ["absent"]});
    assert!(matches!(again.ask("system:emergency-stop", &stop).await, Err(Heard::Close(4429, _))));
    assert_eq!(bob.ask("system:emergency-stop", &stop).await, Ok(None), "others go on");
    pass(S).await;
    let mut later = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
    assert_eq!(later.ask("system:emergency-stop", &stop).await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_floods_is_closed_too() {
    let hub = hub().await;
    let limits = Limits::default();
    let mut agent = Raw::agent(&hub, "a").await;
    for _ in 0..limits.message_rate.burst {
        agent.say(&json!({"type": "agent:status", "payload": {}})).await;
    }
    agent.say(&json!({"type": "agent:status", "payload": {}})).await;
    assert!(matches!(agent.hear().await, Heard::Close(4429, _)));

    // Pieces of output, which grants alone do not bound, however small.
    pass(60 * S).await;
    let mut agent = Raw::agent(&hub, "a").await;
    let piece = json!({"type": "terminal:output", "payload":
        {"stream": command(9), "offset": 0, "channel": "pty", "data": "x"}});
    for n in 0..limits.piece_rate.burst {
        agent.say(&piece).await;
        let Heard::Message(refused) = agent.hear().await else { panic!("{n} pieces") };
        assert_eq!(refused["payload"]["code"], "not_found");
    }
    agent.say(&piece).await;
    assert!(matches!(agent.hear().await, Heard::Close(4429, _)));
}

#[tokio::test(start_paused = true)]
async fn refreshes_have_their_rate() {
    let hub = hub().await;
    let mut ann = Raw::dashboard(&hub, "ann", "d1").await.unwrap();
    let mut results = Vec::new();
    for _ in 0..=Limits::default().refresh_rate.burst {
        ann.say(&json!({"type": "auth:refresh-token", "payload": {"token": "ann"}})).await;
        loop {
            let Heard::Message(message) = ann.hear().await else { panic!("it lives") };
            match message["type"].as_str().unwrap() {
                "auth:refresh-success" => break results.push(true),
                "auth:refresh-failed" => break results.push(false),
                _ => {} // the roster
            }
        }
    }
    let (last, before) = results.split_last().unwrap();
    assert!(!last && before.iter().all(|taken| *taken), "{results:?}");
}

#[tokio::test(start_paused = true)]
async fn a_subject_has_so_many_links_and_no_more() {
    let limits = Limits { links_per_subject: 3, ..Limits::default() };
    let hub = TestHub::start_with(move |builder: HubBuilder| {
        builder.authenticator(table()).limits(limits.clone())
    })
    .await;
    let mut links = Vec::new();
    for n in 0..3 {
        links.push(Raw::dashboard(&hub, "ann", &format!("d{n}")).await.unwrap());
    }
    let refused = Raw::dashboard(&hub, "ann", "d3").await.err();
    assert!(matches!(refused, Some(Heard::Close(1013, _))), "{refused:?}");
    // One that takes the place of another is none more.
    links.push(Raw::dashboard(&hub, "ann", "d2").await.unwrap());
    Raw::dashboard(&hub, "bob", "d9").await.unwrap();
    links.remove(0);
    pass(S).await;
    links.push(Raw::dashboard(&hub, "ann", "d3").await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn links_that_come_too_often_are_told_when_to_come() {
    let hub = hub().await;
    let burst = Limits::default().link_rate.burst;
    for n in 0..burst {
        assert!(Raw::dashboard(&hub, "ann", "d").await.is_ok(), "{n}");
    }
    let Some(Heard::Close(1013, reason)) = Raw::dashboard(&hub, "ann", "d").await.err() else {
        panic!("one more than the burst")
    };
    let wait: u64 = reason.strip_prefix("retry_after_ms=").unwrap().parse().unwrap();
    pass(Duration::from_millis(wait)).await;
    assert!(Raw::dashboard(&hub, "ann", "d").await.is_ok(), "as it was told");
}
