//! Every bound that a peer can meet: one below, at it, and one beyond.
//!
//! Those of rates are in `rates.rs`, those that need an address in
//! `bad_input/admission.rs`, those that are measured as memory in
//! `bad_input/pressure.rs`.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::future::pending;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use trunkline_server::protocol::limits::{GREETING_BYTES_MAX, HELD_MAX, Limits};
use trunkline_server::protocol::rate::Rate;
use trunkline_server::testing::TestHub;

#[path = "by_hand/peer.rs"]
mod peer;

use peer::{Heard, Peer, is};

const COMMAND: &str = "0191d4a8-5a3c-7f00-8000-00000000000c";
const STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000005";

/// The limit of most of these tests.
const MAX: usize = 5;

/// What became of what was tried.
#[derive(Debug, PartialEq)]
enum Outcome {
    Taken,
    Refused(String),
    Closed(u16),
}

use Outcome::{Closed, Refused, Taken};

/// What was heard comes to.
fn outcome(heard: &[Heard]) -> Outcome {
    for heard in heard {
        match heard {
            Heard::Close(code, _) => return Closed(*code),
            Heard::Message(message) if message["type"] == "error" => {
                return Refused(message["payload"]["code"].as_str().unwrap().to_owned());
            }
            Heard::Message(_) | Heard::End => {}
        }
    }
    Taken
}

fn refused(code: &str) -> Outcome {
    Refused(code.to_owned())
}

async fn hub(change: impl Fn(&mut Limits)) -> TestHub {
    let never = Duration::from_secs(24 * 3600);
    let mut limits = Limits { agent_timeout: never, dashboard_timeout: never, ..Limits::default() };
    change(&mut limits);
    TestHub::start_with(move |builder| builder.limits(limits.clone())).await
}

/// Tries one less than `max`, as much, and one more, each on a hub of its own.
async fn border<F: Future<Output = Outcome>>(
    max: usize,
    beyond: Outcome,
    change: impl Fn(&mut Limits),
    attempt: impl Fn(TestHub, usize) -> F,
) {
    for n in [max - 1, max] {
        assert_eq!(attempt(hub(&change).await, n).await, Taken, "{n} of {max}");
    }
    assert_eq!(attempt(hub(&change).await, max + 1).await, beyond, "{} of {max}", max + 1);
}

fn agent(id: &str) -> Value {
    let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
    json!({"type": "agent:connect",
        "payload": {"protocols": [1], "agent": id, "instance": instance}})
}

fn dashboard(id: &str) -> Value {
    json!({"type": "dashboard:connect", "payload": {"protocols": [1], "dashboard": id}})
}

async fn a_dashboard(hub: &TestHub) -> Peer {
    Peer::greeted(hub, &dashboard("d")).await
}

fn serial(n: usize) -> String {
    format!("0191d4a8-5a3c-7f00-8000-{n:012x}")
}

fn request(id: usize, command: &str, agent: &str) -> String {
    json!({"type": "command:request", "id": format!("r{id}"), "payload":
        {"command": command, "agent": agent, "spec": {"run": {"text": "x"}}}})
    .to_string()
}

/// An agent that runs [`COMMAND`] and may write [`STREAM`], and a dashboard.
async fn running(hub: &TestHub) -> (Peer, Peer) {
    let mut running = Peer::greeted(hub, &agent("a")).await;
    let mut asking = a_dashboard(hub).await;
    asking.ask(&request(0, COMMAND, "a")).await;
    running.everything().await;
    let started = json!({"type": "command:started", "payload":
        {"command": COMMAND, "attempt": 1, "stream": STREAM}});
    running.ask(&started.to_string()).await;
    asking.everything().await;
    (running, asking)
}

/// A ping of this many bytes.
fn ping(len: usize) -> String {
    let bare = r#"{"type":"heartbeat:ping"}"#;
    format!("{bare}{}", " ".repeat(len - bare.len()))
}

#[tokio::test(start_paused = true)]
async fn bytes_of_a_message() {
    let change = |limits: &mut Limits| limits.message_bytes_max = 4096;
    border(4096, refused("invalid_message"), change, async |hub, n| {
        let heard = a_dashboard(&hub).await.ask(&ping(n)).await;
        if outcome(&heard) == Taken {
            assert!(heard.iter().any(|heard| is(heard, "heartbeat:pong")));
        }
        outcome(&heard)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn bytes_of_a_greeting() {
    border(
        GREETING_BYTES_MAX,
        Closed(1009),
        |_| {},
        async |hub, n| {
            let greeting = dashboard("d").to_string();
            let greeting = format!("{greeting}{}", " ".repeat(n - greeting.len()));
            outcome(&Peer::dial(&hub).ask(&greeting).await)
        },
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn bytes_of_a_piece_and_of_what_was_granted() {
    let output = |len: usize| {
        let payload =
            json!({"stream": STREAM, "offset": 0, "channel": "pty", "data": "x".repeat(len)});
        json!({"type": "terminal:output", "payload": payload}).to_string()
    };
    let piece = |limits: &mut Limits| limits.chunk_bytes_max = 100;
    border(100, refused("invalid_message"), piece, async |hub, n| {
        let (mut agent, _dashboard) = running(&hub).await;
        outcome(&agent.ask(&output(n)).await)
    })
    .await;
    let grant = |limits: &mut Limits| limits.grant_bytes = 1000;
    border(1000, Closed(4413), grant, async |hub, n| {
        let (mut agent, _dashboard) = running(&hub).await;
        outcome(&agent.ask(&output(n)).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn levels_and_members_of_json() {
    let depth = |limits: &mut Limits| limits.json_depth_max = 8;
    border(8, refused("invalid_message"), depth, async |hub, n| {
        // The message and its payload are two of them.
        let nested = format!("{}1{}", "[".repeat(n - 2), "]".repeat(n - 2));
        let json = format!(r#"{{"type":"heartbeat:ping","payload":{{"x":{nested}}}}}"#);
        outcome(&a_dashboard(&hub).await.ask(&json).await)
    })
    .await;
    let items = |limits: &mut Limits| limits.json_items_max = 50;
    border(50, refused("invalid_message"), items, async |hub, n| {
        // The list is one of them.
        let list = vec!["0"; n - 1].join(",");
        let json = format!(r#"{{"type":"heartbeat:ping","payload":{{"x":[{list}]}}}}"#);
        outcome(&a_dashboard(&hub).await.ask(&json).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn messages_of_a_batch() {
    let change = |limits: &mut Limits| limits.batch_messages_max = 5;
    border(MAX, refused("invalid_message"), change, async |hub, n| {
        let pings = vec![json!({"type": "heartbeat:ping"}); n];
        let batch = json!({"type": "batch", "payload": {"messages": pings}});
        outcome(&a_dashboard(&hub).await.ask(&batch.to_string()).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn messages_in_a_row_that_are_none() {
    let change = |limits: &mut Limits| limits.invalid_messages_max = 6;
    border(MAX, Closed(4400), change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        let mut heard = Vec::new();
        for _ in 0..n {
            heard.extend(dashboard.ask("nonsense").await);
        }
        heard.retain(|heard| !is(heard, "error"));
        outcome(&heard)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn letters_of_a_name() {
    border(
        128,
        refused("invalid_message"),
        |_| {},
        async |hub, n| {
            let json = json!({"type": "heartbeat:ping", "id": "n".repeat(n)});
            outcome(&a_dashboard(&hub).await.ask(&json.to_string()).await)
        },
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn links_of_a_hub() {
    let change = |limits: &mut Limits| limits.links_max = MAX;
    border(MAX, Closed(1013), change, async |hub, n| {
        let mut before = Vec::new();
        for _ in 1..n {
            before.push(Peer::dial(&hub));
        }
        let mut last = Peer::dial(&hub);
        outcome(&last.ask(&dashboard("d").to_string()).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn agents_that_have_come() {
    let change = |limits: &mut Limits| limits.agents_max = MAX;
    border(MAX, refused("limit_reached"), change, async |hub, n| {
        let mut agents = Vec::new();
        for id in 1..n {
            agents.push(Peer::greeted(&hub, &agent(&format!("a{id}"))).await);
        }
        outcome(&Peer::dial(&hub).ask(&agent("last").to_string()).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn agents_that_were_asked_for() {
    let change = |limits: &mut Limits| limits.agents_max = MAX;
    border(MAX, refused("limit_reached"), change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        let mut heard = Vec::new();
        for id in 0..n {
            heard.extend(dashboard.ask(&request(id, &serial(id), &format!("absent-{id}"))).await);
        }
        outcome(&heard)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn subscriptions_of_a_dashboard() {
    let change = |limits: &mut Limits| limits.subscriptions_max = MAX;
    for one_by_one in [true, false] {
        border(MAX, refused("limit_reached"), change, async |hub, n| {
            let mut dashboard = a_dashboard(&hub).await;
            let all: Vec<_> = (0..n).map(|id| json!({"agent": format!("a{id}")})).collect();
            let mut heard = Vec::new();
            for some in all.chunks(if one_by_one { 1 } else { n }) {
                let subscribe = json!({"type": "subscribe", "payload": {"terminals": some}});
                heard.extend(dashboard.ask(&subscribe.to_string()).await);
            }
            outcome(&heard)
        })
        .await;
    }
}

/// What a message about subscriptions costs is what it names and what it is
/// answered with: a few words may ask for a list of a thousand.
#[tokio::test(start_paused = true)]
async fn answers_with_everything_that_is_subscribed_to() {
    let change = |limits: &mut Limits| {
        limits.message_rate = Rate { every: Duration::from_secs(10), burst: 800 };
    };
    // 800 terminals are 100 messages more: 101 of 800 for the subscription, and
    // 101 for each that asks for nothing and is told of all of it.
    border(6, Closed(4429), change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        let all: Vec<_> = (0..800).map(|id| json!({"agent": format!("a{id}")})).collect();
        let subscribe = json!({"type": "subscribe", "payload": {"terminals": all}});
        assert_eq!(outcome(&dashboard.ask(&subscribe.to_string()).await), Taken);
        for _ in 0..n {
            dashboard.say(r#"{"type":"unsubscribe","payload":{"terminals":[]}}"#).await;
        }
        outcome(&dashboard.everything().await)
    })
    .await;
    // To subscribe anew is refused, and may be tried later.
    border(4, refused("rate_limited"), change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        let all: Vec<_> = (0..800).map(|id| json!({"agent": format!("a{id}")})).collect();
        let subscribe = json!({"type": "subscribe", "payload": {"terminals": all}});
        for _ in 0..n {
            dashboard.say(&subscribe.to_string()).await;
        }
        outcome(&dashboard.everything().await)
    })
    .await;
}

/// One more answer than is remembered, and the first is forgotten: what is
/// asked under its id is carried out.
#[tokio::test(start_paused = true)]
async fn answers_that_are_remembered() {
    let change = |limits: &mut Limits| limits.answers_max = MAX;
    let carried_out = refused("not_found");
    border(MAX, carried_out, change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        for id in 0..n {
            let stop = json!({"type": "system:emergency-stop", "id": format!("r{id}"),
                "payload": {"agents": ["nobody"]}});
            assert_eq!(outcome(&dashboard.ask(&stop.to_string()).await), Taken);
        }
        let other =
            json!({"type": "command:interrupt", "id": "r0", "payload": {"command": COMMAND}});
        outcome(&dashboard.ask(&other.to_string()).await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn commands_that_wait_for_an_agent() {
    let change = |limits: &mut Limits| limits.queue_per_agent = MAX;
    border(MAX, refused("queue_full"), change, async |hub, n| {
        let mut dashboard = a_dashboard(&hub).await;
        for id in 0..n {
            dashboard.say(&request(id, &serial(id), "absent")).await;
        }
        outcome(&dashboard.everything().await)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn bytes_of_a_spec() {
    let change = |limits: &mut Limits| limits.spec_bytes_max = 100;
    border(100, refused("invalid_message"), change, async |hub, n| {
        let spec = json!({"run": {"shell": "x".repeat(n)}});
        let request = json!({"type": "command:request", "id": "r", "payload":
            {"command": COMMAND, "agent": "a", "spec": spec}});
        outcome(&a_dashboard(&hub).await.ask(&request.to_string()).await)
    })
    .await;
    border(
        256,
        refused("invalid_message"),
        |_| {},
        async |hub, n| {
            let env: serde_json::Map<_, _> = (0..n).map(|n| (format!("V{n}"), json!(""))).collect();
            let request = json!({"type": "command:request", "id": "r", "payload":
            {"command": COMMAND, "agent": "a", "spec": {"run": {"text": "x"}, "env": env}}});
            outcome(&a_dashboard(&hub).await.ask(&request.to_string()).await)
        },
    )
    .await;
    border(
        1024,
        refused("invalid_message"),
        |_| {},
        async |hub, n| {
            let request = json!({"type": "command:request", "id": "r", "payload":
            {"command": COMMAND, "agent": "a", "spec": {"run": {"argv": vec!["x"; n]}}}});
            outcome(&a_dashboard(&hub).await.ask(&request.to_string()).await)
        },
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn bytes_of_input_under_way() {
    let change = |limits: &mut Limits| limits.input_bytes_ahead = 100;
    border(100, refused("limit_reached"), change, async |hub, n| {
        let (_agent, mut dashboard) = running(&hub).await;
        let mut heard = Vec::new();
        for (offset, len) in [(0, 50), (50, n - 50)] {
            let payload = json!({"command": COMMAND, "offset": offset, "data": "x".repeat(len)});
            let input = json!({"type": "terminal:input", "id": "i", "payload": payload});
            heard.extend(dashboard.ask(&input.to_string()).await);
        }
        outcome(&heard)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn commands_that_an_agent_holds() {
    border(
        HELD_MAX,
        Closed(1009),
        |_| {},
        async |hub, n| {
            let mut greeting = agent("a");
            greeting["payload"]["more"] = json!(true);
            let mut agent = Peer::greeted(&hub, &greeting).await;
            let held = |n: usize| {
                json!({"command": serial(n), "attempt": 1, "status": "dispatched",
                "spec": {"run": {"text": "x"}}})
            };
            let list = |from: usize, to: usize, more: bool| {
                let commands: Vec<_> = (from..to).map(held).collect();
                json!({"type": "agent:commands", "payload": {"commands": commands, "more": more}})
            };
            agent.say(&list(0, 500, true).to_string()).await;
            outcome(&agent.ask(&list(500, n, false).to_string()).await)
        },
    )
    .await;
}

/// Of those that have ended the oldest is forgotten.
#[tokio::test(start_paused = true)]
async fn commands_that_have_ended() {
    for (ended, listed) in [(MAX - 1, MAX - 1), (MAX, MAX), (MAX + 1, MAX)] {
        let hub = hub(|limits| limits.finished_per_agent = MAX).await;
        let mut agent = Peer::greeted(&hub, &agent("a")).await;
        let mut asking = a_dashboard(&hub).await;
        for n in 0..ended {
            asking.ask(&request(n, &serial(n), "a")).await;
            let complete = json!({"type": "command:complete", "payload":
                {"command": serial(n), "attempt": 1, "status": "completed", "end": {}}});
            agent.everything().await;
            agent.ask(&complete.to_string()).await;
        }
        let heard = Peer::dial(&hub).ask(&dashboard("witness").to_string()).await;
        let list = heard.iter().find(|heard| is(heard, "agent:list")).unwrap().message().unwrap();
        assert_eq!(list["payload"]["commands"].as_array().unwrap().len(), listed);
    }
}

/// The clock goes on, and nothing else happens.
async fn pass(time: Duration) {
    let _ = timeout(time, pending::<()>()).await;
}

#[tokio::test(start_paused = true)]
async fn time_until_a_greeting_and_of_silence() {
    const MS: Duration = Duration::from_millis(1);
    let limit = Limits::default().greeting_timeout;
    for (after, is_taken) in [(limit.saturating_sub(2 * MS), true), (limit + 2 * MS, false)] {
        let hub = hub(|_| {}).await;
        let mut late = Peer::dial(&hub);
        pass(after).await;
        let heard = late.ask(&dashboard("d").to_string()).await;
        assert_eq!(outcome(&heard), if is_taken { Taken } else { Closed(4408) }, "{after:?}");
    }
    let limit = Limits::default().dashboard_timeout;
    for (after, is_taken) in [(limit.saturating_sub(100 * MS), true), (limit + 2 * MS, false)] {
        let hub = hub(|limits| limits.dashboard_timeout = limit).await;
        let mut silent = a_dashboard(&hub).await;
        pass(after).await;
        let heard = silent.everything().await;
        assert_eq!(outcome(&heard), if is_taken { Taken } else { Closed(4410) }, "{after:?}");
    }
}
