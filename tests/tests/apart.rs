//! Tenants, and agents that somebody may not observe: whatever ids a stranger
//! names, it hears the same to the letter as on a hub where those ids are
//! nobody's, and whom they belong to notices nothing.
//!
//! Each life is lived twice, on a hub with the victims and on one without
//! them; what the stranger heard is compared.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use trunkline_server::hooks::{BoxFuture, Role, RolePolicy};
use trunkline_server::protocol::limits::Limits;
use trunkline_server::testing::TestHub;
use trunkline_server::{AuthError, Authenticator, Credentials, HubBuilder, Identity};

#[path = "by_hand/peer.rs"]
mod peer;

use peer::{Heard, Peer, is};

const RUNNING: &str = "0191d4a8-5a3c-7f00-8000-00000000000c";
const QUEUED: &str = "0191d4a8-5a3c-7f00-8000-00000000000d";
const STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000005";
const OWN: &str = "0191d4a8-5a3c-7f00-8000-0000000000cc";
const OWN_STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000055";

/// The token is `TENANT SUBJECT ROLE LABEL`.
#[derive(Debug)]
struct Told;

impl Authenticator for Told {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        Box::pin(async move {
            let token = credentials.token.as_ref().unwrap().reveal();
            let words: Vec<&str> = token.split(' ').collect();
            let mut identity = Identity::new(words[0].parse().unwrap(), words[1]);
            match credentials.role {
                Role::Agent(_) => identity.labels.extend([words[2].to_owned()]),
                Role::Dashboard(_) => identity.roles.extend([words[2].to_owned()]),
            }
            Ok(identity)
        })
    }
}

async fn hub() -> TestHub {
    let never = Duration::from_secs(24 * 3600);
    let limits = Limits {
        agent_timeout: never,
        agent_idle: never / 2,
        dashboard_timeout: never,
        dashboard_idle: never / 2,
        ..Limits::default()
    };
    let policy = RolePolicy::new()
        .role("all", ["observe:*", "command:*", "input:*", "administer:*"])
        .and_then(|policy| {
            let own = ["observe:label=own", "command:label=own", "input:label=own"];
            policy.role("own", own)?.role("own", ["administer:label=own"])
        })
        .unwrap();
    TestHub::start_with(move |builder: HubBuilder| {
        builder.limits(limits.clone()).authenticator(Told).policy(policy.clone())
    })
    .await
}

fn agent(id: &str, token: &str) -> Value {
    let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
    json!({"type": "agent:connect", "payload":
        {"protocols": [1], "agent": id, "instance": instance, "token": token}})
}

fn dashboard(id: &str, token: &str) -> Value {
    json!({"type": "dashboard:connect", "payload":
        {"protocols": [1], "dashboard": id, "token": token}})
}

fn request(id: &str, command: &str, agent: &str) -> String {
    json!({"type": "command:request", "id": id, "payload":
        {"command": command, "agent": agent, "spec": {"run": {"text": "secret"}}}})
    .to_string()
}

/// An agent that runs a command and shows output, and its dashboard.
struct Running {
    agent: Peer,
    dashboard: Peer,
}

impl Running {
    async fn new(
        hub: &TestHub,
        names: [&str; 2],
        tokens: [&str; 2],
        commands: &[&str],
        stream: &str,
    ) -> Self {
        let mut running = Peer::greeted(hub, &agent(names[0], tokens[0])).await;
        let mut asking = Peer::greeted(hub, &dashboard(names[1], tokens[1])).await;
        for command in commands {
            asking.ask(&request(command, command, names[0])).await;
        }
        running.everything().await;
        for word in [
            json!({"type": "command:started", "payload":
                {"command": commands[0], "attempt": 1, "stream": stream}}),
            json!({"type": "terminal:output", "payload":
                {"stream": stream, "offset": 0, "channel": "pty", "data": "secret"}}),
        ] {
            running.ask(&word.to_string()).await;
        }
        let subscribe =
            json!({"type": "subscribe", "payload": {"terminals": [{"agent": names[0]}]}});
        let heard = asking.ask(&subscribe.to_string()).await;
        assert!(heard.iter().any(|heard| is(heard, "terminal:output")), "{heard:?}");
        Self { agent: running, dashboard: asking }
    }
}

/// Whose ids are named: the victims', the stranger's own, and nobody's.
#[derive(Debug, Clone, Copy)]
enum Whose {
    Running,
    Queued,
    Own,
    Nobodys,
}

impl Whose {
    fn command(self) -> &'static str {
        match self {
            Self::Running => RUNNING,
            Self::Queued => QUEUED,
            Self::Own => OWN,
            Self::Nobodys => "0191d4a8-5a3c-7f00-8000-0000000000ff",
        }
    }

    fn stream(self) -> &'static str {
        match self {
            Self::Running | Self::Queued => STREAM,
            Self::Own => OWN_STREAM,
            Self::Nobodys => "0191d4a8-5a3c-7f00-8000-0000000000ee",
        }
    }

    fn agent(self) -> &'static str {
        match self {
            Self::Running | Self::Queued => "victim",
            Self::Own => "own",
            Self::Nobodys => "nobody",
        }
    }
}

/// What a stranger does.
#[derive(Debug, Clone)]
enum Act {
    Dashboard(Vec<String>),
    Agent(Vec<String>),
    /// Comes again, with what it says it knows.
    DashboardAgain(u64),
    /// Comes again, with what it says it holds.
    AgentAgain(Whose, Whose),
}

fn whose() -> impl Strategy<Value = Whose> {
    prop_oneof![
        3 => Just(Whose::Running),
        2 => Just(Whose::Queued),
        2 => Just(Whose::Own),
        1 => Just(Whose::Nobodys),
    ]
}

/// What a dashboard may ask about somebody's command, stream or agent.
fn dashboards_word(id: u32, whose: Whose, of: u8, offset: u64) -> String {
    let (command, stream, agent) = (whose.command(), whose.stream(), whose.agent());
    let id = format!("r{id}");
    let positions = json!({(stream): offset});
    let about = match of % 12 {
        0 => json!({"type": "command:interrupt", "payload": {"command": command}}),
        1 => json!({"type": "terminal:input", "payload":
            {"command": command, "offset": offset, "data": "x"}}),
        2 => json!({"type": "terminal:resize", "payload":
            {"command": command, "size": {"cols": 80, "rows": 24}}}),
        3 => json!({"type": "subscribe", "payload":
            {"terminals": [{"command": command, "positions": positions}]}}),
        4 => json!({"type": "subscribe", "payload":
            {"terminals": [{"agent": agent, "from": "start", "positions": positions}]}}),
        5 => json!({"type": "terminal:shown", "payload": {"stream": stream, "offset": offset}}),
        6 => json!({"type": "system:emergency-stop", "payload": {"agents": [agent]}}),
        7 => json!({"type": "system:emergency-stop", "payload": {}}),
        8 => json!({"type": "unsubscribe", "payload": {"terminals": [{"agent": agent}]}}),
        9 => json!({"type": "command:interrupt", "payload":
            {"command": command, "attempt": 1, "grace_ms": 0}}),
        10 => json!({"type": "command:request", "payload":
            {"command": command, "agent": agent, "spec": {"run": {"text": "secret"}}}}),
        _ => json!({"type": "log:batch", "payload": {"stream": stream, "offset": offset,
            "records": [{"ts_ms": 0, "level": "info", "target": "x", "message": "x"}]}}),
    };
    let mut about = about;
    about["id"] = json!(id);
    about.to_string()
}

/// What an agent may say about somebody's command or stream.
fn agents_word(whose: Whose, of: u8, offset: u64) -> String {
    let (command, stream) = (whose.command(), whose.stream());
    let word = match of % 6 {
        0 => json!({"type": "terminal:output", "payload":
            {"stream": stream, "offset": offset, "channel": "pty", "data": "forged"}}),
        1 => json!({"type": "terminal:gap", "payload":
            {"stream": stream, "from": 6, "to": 6 + offset + 1, "reason": "evicted"}}),
        2 => json!({"type": "command:started", "payload":
            {"command": command, "attempt": 1, "stream": stream}}),
        3 => json!({"type": "command:complete", "payload":
            {"command": command, "attempt": 1, "status": "failed", "end": {}}}),
        4 => json!({"type": "terminal:input-taken", "payload":
            {"command": command, "writer": "ann", "offset": offset}}),
        _ => json!({"type": "command:interrupting", "payload":
            {"command": command, "attempt": 1, "stage": "signalled"}}),
    };
    word.to_string()
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let dashboards = prop::collection::vec((any::<u32>(), whose(), any::<u8>(), 0..12_u64), 1..6);
    let agents = prop::collection::vec((whose(), any::<u8>(), 0..12_u64), 1..6);
    let act = prop_oneof![
        6 => dashboards.prop_map(|all| {
            let word = |(id, whose, of, offset)| dashboards_word(id, whose, of, offset);
            Act::Dashboard(all.into_iter().map(word).collect())
        }),
        4 => agents.prop_map(|all| {
            let word = |(whose, of, offset)| agents_word(whose, of, offset);
            Act::Agent(all.into_iter().map(word).collect())
        }),
        1 => (0..40_u64).prop_map(Act::DashboardAgain),
        2 => (whose(), whose()).prop_map(|(command, stream)| Act::AgentAgain(command, stream)),
    ];
    prop::collection::vec(act, 1..12)
}

/// What differs from hub to hub, and tells nothing: serials of the hub, its
/// clock, and how often anything at all changed in the tenant, which is in a
/// roster position.
fn plain(mut heard: Heard) -> Heard {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    let clock = name.ends_with("_ms") && name != "retry_after_ms";
                    if clock || ["ts", "at", "hub", "queue"].contains(&name.as_str()) {
                        value.take();
                    } else {
                        strip(value);
                    }
                }
            }
            Value::Array(elements) => elements.iter_mut().for_each(strip),
            _ => {}
        }
    }
    if let Heard::Message(message) = &mut heard {
        strip(message);
    }
    heard
}

/// The tokens of a stranger, as a dashboard and as an agent.
type Stranger = [&'static str; 2];

const OF_ANOTHER_TENANT: Stranger = ["evil mallory all", "evil mallory-agent own"];
/// Of the victims' tenant, and may see none but its own agent.
const WITH_FEW_RIGHTS: Stranger = ["acme mallory own", "acme mallory-agent own"];

/// Lives the stranger's life on a hub with or without victims, and returns all
/// that it heard. If there are any they are looked after.
async fn live(acts: &[Act], stranger: Stranger, with_victims: bool) -> Vec<Heard> {
    let hub = hub().await;
    let mut victims = None;
    if with_victims {
        let tokens = ["acme victim other", "acme ann all"];
        let mut running =
            Running::new(&hub, ["victim", "ann"], tokens, &[RUNNING, QUEUED], STREAM).await;
        let seen = seen(&hub).await;
        assert!(seen.iter().any(|message| message["payload"]["data"] == "secret"), "{seen:?}");
        running.agent.everything().await;
        victims = Some((running, seen));
    }
    let [as_dashboard, as_agent] = stranger;
    // In a tenant of its own it goes by the victims' names.
    let names = if stranger == WITH_FEW_RIGHTS { ["own", "mallory"] } else { ["victim", "ann"] };
    let own = Running::new(&hub, names, [as_agent, as_dashboard], &[OWN], OWN_STREAM);
    let Running { mut agent, mut dashboard } = own.await;

    let mut all = Vec::new();
    for act in acts {
        match act {
            Act::Dashboard(words) => {
                for word in words {
                    // Serials are one space within a tenant: who asks for a
                    // command under one that is taken hears of a conflict.
                    if stranger == WITH_FEW_RIGHTS && word.contains("command:request") {
                        continue;
                    }
                    dashboard.say(word).await;
                }
            }
            Act::Agent(words) => {
                for word in words {
                    agent.say(word).await;
                }
            }
            Act::DashboardAgain(revision) => {
                let mut greeting = self::dashboard(names[1], as_dashboard);
                if stranger == OF_ANOTHER_TENANT {
                    let since = format!("{}:{revision}", instance(&hub).await);
                    greeting["payload"]["since"] = json!({"roster": since});
                }
                dashboard = Peer::dial(&hub);
                dashboard.say(&greeting.to_string()).await;
            }
            &Act::AgentAgain(mut command, mut stream) => {
                if stranger == WITH_FEW_RIGHTS {
                    // For the same reason an agent that lists a command of another
                    // one is not believed, and one that lists what nobody knows is.
                    (command, stream) = (Whose::Own, Whose::Own);
                }
                let held = json!({"command": command.command(), "attempt": 1, "status": "running",
                    "spec": {"run": {"text": "secret"}},
                    "stream": {"stream": stream.stream(), "from": 0, "to": 6}});
                let mut greeting = self::agent(names[0], as_agent);
                greeting["payload"]["commands"] = json!([held]);
                agent = Peer::dial(&hub);
                agent.say(&greeting.to_string()).await;
            }
        }
        all.extend(dashboard.everything().await);
        all.extend(agent.everything().await);
    }
    if let Some((mut running, before)) = victims {
        let heard = running.agent.everything().await;
        assert!(heard.is_empty(), "the victim was told {heard:?}");
        assert_eq!(seen(&hub).await, before, "the victim's commands and output");
        let heard = running.dashboard.everything().await;
        let about_victim = |heard: &&Heard| heard.message().unwrap().to_string().contains("victim");
        let moved: Vec<_> = heard.iter().filter(about_victim).collect();
        assert!(moved.is_empty(), "the victim's roster moved: {moved:?}");
    }
    all.into_iter().map(plain).collect()
}

/// What a dashboard of the victims sees that comes now: their roster, and all
/// of the output.
async fn seen(hub: &TestHub) -> Vec<Value> {
    let mut witness = Peer::dial(hub);
    let mut heard = witness.ask(&dashboard("witness", "acme witness all").to_string()).await;
    let subscribe = json!({"type": "subscribe", "payload": {"terminals": [{"command": RUNNING}]}});
    heard.extend(witness.ask(&subscribe.to_string()).await);
    let shows = ["agent:list", "terminal:opened", "terminal:output", "terminal:gap"];
    let of_the_victim = |mut message: Value| {
        for list in ["agents", "commands", "queues"] {
            if let Some(entries) = message["payload"][list].as_array_mut() {
                entries.retain(|entry| entry["agent"] == "victim");
            }
        }
        message
    };
    heard
        .into_iter()
        .filter(|heard| shows.iter().any(|kind| is(heard, kind)))
        .filter_map(|heard| plain(heard).message().cloned().map(of_the_victim))
        .collect()
}

/// The serial of the hub, which its ack tells everybody.
async fn instance(hub: &TestHub) -> String {
    let heard = Peer::dial(hub).ask(&dashboard("x", "elsewhere x all").to_string()).await;
    let ack = heard.iter().find(|heard| is(heard, "connection:ack")).unwrap();
    ack.message().unwrap()["payload"]["hub"].as_str().unwrap().to_owned()
}

fn both(acts: &[Act], stranger: Stranger) -> [Vec<Heard>; 2] {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    [true, false].map(|with_victims| runtime.block_on(live(acts, stranger, with_victims)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn another_tenant_hears_what_it_would_hear_if_there_were_nobody(acts in acts()) {
        let [with, without] = both(&acts, OF_ANOTHER_TENANT);
        prop_assert_eq!(with, without);
    }

    #[test]
    fn who_may_not_observe_hears_what_it_would_hear_if_there_were_nobody(acts in acts()) {
        let [with, without] = both(&acts, WITH_FEW_RIGHTS);
        prop_assert_eq!(with, without);
    }
}
