//! Every type of message there is, said by everybody who may not say it, in
//! every state of a link: refused by name, and without effect. And said far too
//! often by those who may.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use trunkline_protocol::message::{
    AgentToHub, DashboardToHub, Direction, Greeting, HubToAgent, HubToDashboard,
};
use trunkline_server::protocol::limits::Limits;
use trunkline_server::protocol::rate::Rate;
use trunkline_server::testing::TestHub;

#[path = "by_hand/peer.rs"]
mod peer;

use peer::{Heard, Peer, is};

const COMMAND: &str = "0191d4a8-5a3c-7f00-8000-00000000000c";
const STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000005";

/// The golden vectors of one direction.
fn vectors(file: &str) -> Vec<(String, String)> {
    let vectors: Vec<Value> = serde_json::from_str(file).unwrap();
    let text = |vector: &Value, field: &str| vector[field].as_str().unwrap().to_owned();
    vectors.iter().map(|vector| (text(vector, "type"), text(vector, "json"))).collect()
}

/// A valid message of every type of every direction, the fullest that there is,
/// about what the honest agent holds: by its type, and by the direction.
fn one_of_each() -> BTreeMap<(String, usize), String> {
    let mut all: BTreeMap<(String, usize), String> = BTreeMap::new();
    let files = [
        include_str!("../../agent-protocol/vectors/greeting.json"),
        include_str!("../../agent-protocol/vectors/agent-to-hub.json"),
        include_str!("../../agent-protocol/vectors/hub-to-agent.json"),
        include_str!("../../agent-protocol/vectors/dashboard-to-hub.json"),
        include_str!("../../agent-protocol/vectors/hub-to-dashboard.json"),
    ];
    for (direction, file) in files.into_iter().enumerate() {
        // A batch is no message of its own.
        for (kind, json) in vectors(file).into_iter().filter(|(kind, _)| kind != "batch") {
            let known = all.entry((kind, direction)).or_default();
            if json.len() > known.len() {
                *known = json;
            }
        }
    }
    for json in all.values_mut() {
        let mut message: Value = serde_json::from_str(json).unwrap();
        aim(&mut message["payload"]);
        *json = message.to_string();
    }
    all
}

/// Makes a message be about what there is.
fn aim(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match (name.as_str(), &*value) {
                    ("command", Value::String(_)) => *value = json!(COMMAND),
                    ("stream", Value::String(_)) => *value = json!(STREAM),
                    ("agent", Value::String(_)) => *value = json!("honest"),
                    _ => aim(value),
                }
            }
        }
        Value::Array(elements) => elements.iter_mut().for_each(aim),
        _ => {}
    }
}

/// Directions, as [`one_of_each`] counts them.
const AGENT_TO_HUB: usize = 1;
const DASHBOARD_TO_HUB: usize = 3;

fn types() -> impl Iterator<Item = &'static str> {
    [
        Greeting::TYPES,
        AgentToHub::TYPES,
        HubToAgent::TYPES,
        DashboardToHub::TYPES,
        HubToDashboard::TYPES,
    ]
    .into_iter()
    .flatten()
    .copied()
}

fn agent(id: &str) -> Value {
    let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
    json!({"type": "agent:connect",
        "payload": {"protocols": [1], "agent": id, "instance": instance}})
}

fn dashboard(id: &str) -> Value {
    json!({"type": "dashboard:connect", "payload": {"protocols": [1], "dashboard": id}})
}

/// The codes of all refusals.
fn refusals(heard: &[Heard]) -> Vec<String> {
    let errors = heard.iter().filter(|heard| is(heard, "error"));
    errors.filter_map(|e| Some(e.message()?["payload"]["code"].as_str()?.to_owned())).collect()
}

/// The codes of all closes.
fn closes(heard: &[Heard]) -> Vec<u16> {
    let code = |heard: &Heard| match heard {
        Heard::Close(code, _) => Some(*code),
        Heard::Message(_) | Heard::End => None,
    };
    heard.iter().filter_map(code).collect()
}

/// A hub on which an honest agent runs a command, and a dashboard.
async fn stage() -> (TestHub, Peer, Peer) {
    let never = Duration::from_secs(24 * 3600);
    let limits = Limits {
        invalid_messages_max: 1000,
        agent_timeout: never,
        dashboard_timeout: never,
        message_rate: Rate::UNLIMITED,
        link_rate: Rate::UNLIMITED,
        ..Limits::default()
    };
    let hub = TestHub::start_with(move |builder| builder.limits(limits.clone())).await;
    let mut honest = Peer::greeted(&hub, &agent("honest")).await;
    let mut watcher = Peer::greeted(&hub, &dashboard("watcher")).await;
    let request = json!({"type": "command:request", "id": "r", "payload":
        {"command": COMMAND, "agent": "honest", "spec": {"run": {"text": "x"}}}});
    watcher.ask(&request.to_string()).await;
    let started = json!({"type": "command:started", "payload":
        {"command": COMMAND, "attempt": 1, "stream": STREAM}});
    let output = json!({"type": "terminal:output", "payload":
        {"stream": STREAM, "offset": 0, "channel": "pty", "data": "so far"}});
    honest.everything().await;
    honest.say(&started.to_string()).await;
    let taken = honest.ask(&output.to_string()).await;
    assert!(taken.iter().any(|heard| is(heard, "terminal:taken")), "{taken:?}");
    (hub, honest, watcher)
}

/// What a dashboard sees that comes now: the roster, and all of the output.
async fn seen(hub: &TestHub) -> Vec<Value> {
    let mut witness = Peer::dial(hub);
    let mut heard = witness.ask(&dashboard("witness").to_string()).await;
    let subscribe = json!({"type": "subscribe", "payload": {"terminals": [{"command": COMMAND}]}});
    heard.extend(witness.ask(&subscribe.to_string()).await);
    witness.say(&json!({"type": "dashboard:disconnect"}).to_string()).await;
    let about_the_honest = |mut message: Value| {
        let payload = &mut message["payload"];
        payload["at"].take();
        if let Some(agents) = payload["agents"].as_array_mut() {
            agents.retain(|agent| agent["agent"] == "honest");
        }
        message["ts"].take();
        message
    };
    let shows = ["agent:list", "terminal:opened", "terminal:output", "terminal:gap"];
    heard
        .into_iter()
        .filter(|heard| shows.iter().any(|kind| is(heard, kind)))
        .map(|heard| about_the_honest(heard.message().unwrap().clone()))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn every_message_of_another_role_or_state_is_refused_and_changes_nothing() {
    let (hub, mut honest, _watcher) = stage().await;
    let all = one_of_each();
    let unknown: Vec<_> = types().filter(|kind| !all.keys().any(|(k, _)| k == kind)).collect();
    assert!(unknown.is_empty(), "no vector of {unknown:?}");
    let before = seen(&hub).await;
    assert!(before.iter().any(|message| message["payload"]["data"] == "so far"), "{before:?}");

    let mut pairs = 0;
    // A greeted agent and a greeted dashboard: the link lives on.
    for (greeting, own) in
        [(agent("mallory"), AgentToHub::TYPES), (dashboard("mallory"), DashboardToHub::TYPES)]
    {
        let mut peer = Peer::greeted(&hub, &greeting).await;
        for ((kind, _), json) in all.iter().filter(|((kind, _), _)| !own.contains(&kind.as_str())) {
            let heard = peer.ask(json).await;
            assert_eq!(refusals(&heard), ["forbidden"], "{kind}: {heard:?}");
            assert!(closes(&heard).is_empty(), "{kind}");
            pairs += 1;
        }
    }
    // Somebody who has not greeted: the link ends.
    let greets = |kind: &str| Greeting::TYPES.contains(&kind);
    for ((kind, _), json) in all.iter().filter(|((kind, _), _)| !greets(kind)) {
        let heard = Peer::dial(&hub).ask(json).await;
        assert_eq!(refusals(&heard), ["forbidden"], "{kind}: {heard:?}");
        assert_eq!(closes(&heard), [4400], "{kind}");
        pairs += 1;
    }
    // An agent that has more to list than its greeting had room for.
    let may = ["agent:commands", "agent:disconnect", "heartbeat:ping", "heartbeat:pong", "error"];
    for ((kind, direction), json) in &all {
        let is_own = AgentToHub::TYPES.contains(&kind.as_str());
        if may.contains(&kind.as_str()) || is_own && *direction != AGENT_TO_HUB {
            continue;
        }
        let mut greeting = agent("listing");
        greeting["payload"]["more"] = json!(true);
        let mut peer = Peer::greeted(&hub, &greeting).await;
        let heard = peer.ask(json).await;
        if is_own {
            assert_eq!(closes(&heard), [4400], "{kind}: {heard:?}");
        } else {
            assert_eq!(refusals(&heard), ["forbidden"], "{kind}: {heard:?}");
        }
        pairs += 1;
    }
    println!("{pairs} pairs of a state and a type");
    assert!(pairs > 100);

    assert_eq!(seen(&hub).await, before);
    let said = honest.everything().await;
    assert!(said.iter().all(|heard| is(heard, "heartbeat:ping")), "{said:?}");
}

/// What a link says after its close was decided, by the hub or by itself, is
/// not handled, whatever it is.
#[tokio::test(start_paused = true)]
async fn after_its_end_a_link_says_nothing_any_more() {
    let (hub, mut honest, _watcher) = stage().await;
    let before = seen(&hub).await;
    let all = one_of_each();
    for (greeting, goodbye, own) in [
        (agent("mallory"), "agent:disconnect", AGENT_TO_HUB),
        (dashboard("mallory"), "dashboard:disconnect", DASHBOARD_TO_HUB),
    ] {
        for ((kind, _), json) in all.iter().filter(|((_, direction), _)| *direction == own) {
            let mut peer = Peer::greeted(&hub, &greeting).await;
            peer.say(&json!({"type": goodbye}).to_string()).await;
            let heard = peer.ask(json).await;
            assert_eq!(closes(&heard), [1000], "{kind}: {heard:?}");
            let unanswered = |heard: &Heard| !is(heard, "ok") && !is(heard, "error");
            assert!(heard.iter().all(unanswered), "{kind}: {heard:?}");
        }
    }
    assert_eq!(seen(&hub).await, before);
    let said = honest.everything().await;
    assert!(said.iter().all(|heard| is(heard, "heartbeat:ping")), "{said:?}");
}

/// Whatever it is that comes too often, whoever sends it is closed, and nobody
/// else is held up.
#[tokio::test(start_paused = true)]
async fn a_flood_of_any_message_ends_its_link() {
    const BURST: u32 = 20;
    let all = one_of_each();
    for (greeting, own) in
        [(agent("honest"), AGENT_TO_HUB), (dashboard("mallory"), DASHBOARD_TO_HUB)]
    {
        for ((kind, _), json) in all.iter().filter(|((_, direction), _)| *direction == own) {
            if kind.ends_with(":disconnect") {
                continue; // the first is the last
            }
            let rate = Rate { every: Duration::from_secs(1), burst: BURST };
            let limits = Limits { message_rate: rate, piece_rate: rate, ..Limits::default() };
            let hub = TestHub::start_with(move |builder| builder.limits(limits.clone())).await;
            let mut bystander = Peer::greeted(&hub, &dashboard("bystander")).await;
            let mut peer = Peer::greeted(&hub, &greeting).await;
            for _ in 0..=BURST {
                peer.say(json).await;
            }
            let heard = peer.everything().await;
            assert_eq!(closes(&heard), [4429], "{kind}: {heard:?}");
            let heard = bystander.ask(r#"{"type":"heartbeat:ping","payload":{"n":7}}"#).await;
            assert!(heard.iter().any(|heard| is(heard, "heartbeat:pong")), "{kind}: {heard:?}");
        }
    }
}
