//! What an embedder hears of its hub: events, figures, and lines in the log.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::{Event as Line, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use trunkline_client::testing::{Script, Scripts, Viewer};
use trunkline_client::{Agent, ConnectionState, Dashboard, Request};
use trunkline_protocol::ids::{AgentId, CommandId};
use trunkline_protocol::message::{ErrorCode, Peer};
use trunkline_server::hooks::{
    AuthError, BoxFuture, Credentials, Event, QueueChange, RolePolicy, What,
};
use trunkline_server::testing::TestHub;
use trunkline_server::{
    Authenticator, CommandQueue, HubBuilder, Identity, MemoryQueue, QueueError, Role,
};

const S: Duration = Duration::from_secs(1);

type Trail = Arc<Mutex<Vec<Event>>>;

/// Tokens are subjects; `guest` may only watch.
struct Names;

impl Authenticator for Names {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        let name = match (&credentials.role, &credentials.token) {
            (Role::Agent(agent), _) => agent.to_string(),
            (Role::Dashboard(_), Some(token)) => token.reveal().to_owned(),
            (Role::Dashboard(_), None) => String::new(),
        };
        Box::pin(async move {
            if name.is_empty() {
                return Err(AuthError::Unauthorized("no token".into()));
            }
            let role = if name == "guest" { "viewer" } else { "operator" };
            let roles = BTreeSet::from([role.to_owned()]);
            Ok(Identity { roles, ..Identity::new("acme".parse().unwrap(), name) })
        })
    }
}

fn policy() -> RolePolicy {
    let every = ["observe:*", "command:*", "input:*", "administer:*"];
    RolePolicy::new()
        .role("viewer", ["observe:*"])
        .and_then(|policy| policy.role("operator", every))
        .unwrap()
}

async fn hub(make: impl Fn(HubBuilder) -> HubBuilder + Send + Sync + 'static) -> (TestHub, Trail) {
    let trail = Trail::default();
    let written = Arc::clone(&trail);
    let hub = TestHub::start_with(move |builder| {
        let written = Arc::clone(&written);
        let builder = builder.authenticator(Names).policy(policy());
        make(builder).observer(move |event: &Event| written.lock().unwrap().push(event.clone()))
    })
    .await;
    (hub, trail)
}

fn agent(hub: &TestHub) -> Agent {
    let login = Script::new().prints("password: ").hears("secret\n").goes_on();
    let scripts =
        Scripts::new().on("login", login).on("hi", Script::new().prints("hello").exits(3));
    Agent::over(hub.cable().connector(), "build-1").unwrap().connect(scripts)
}

fn dashboard(hub: &TestHub, name: &str) -> Dashboard {
    Dashboard::over(hub.cable().connector()).id(name.parse().unwrap()).token(name).connect()
}

/// An event in a few words: whose doing, and what.
fn in_words(event: &Event) -> String {
    let who = event.who.as_ref().map_or("-", |who| match &who.peer {
        Peer::Agent(agent) => agent.as_str(),
        Peer::Dashboard(dashboard) => dashboard.as_str(),
    });
    let what = match &event.what {
        What::Connected { .. } => "connected".into(),
        What::Rejected { close, why, .. } => format!("rejected {} {why:?}", close.code.number()),
        What::Greeted { .. } => "greeted".into(),
        What::Closed { close, .. } => format!("closed {}", close.code.number()),
        What::Revoked { subject, links, .. } => format!("revoked {subject} {links}"),
        What::CommandRequested { agent, title, outcome, .. } => {
            format!("requested {agent} {title:?} {outcome:?}")
        }
        What::CommandStarted { agent, attempt, .. } => format!("started {agent} {attempt}"),
        What::CommandEnded { agent, status, end, ran, .. } => {
            assert!(ran.is_some());
            format!("ended {agent} {status} {:?}", end.exit_code)
        }
        What::InterruptRequested { agent, outcome, .. } => {
            format!("interrupt {:?} {outcome:?}", agent.as_ref().map(ToString::to_string))
        }
        What::StopRequested { agents, outcome } => format!("stop {agents:?} {outcome:?}"),
        What::InputBegan { agent, .. } => format!("input began {agent}"),
        What::InputEnded { agent, bytes, .. } => format!("input ended {agent} {bytes}"),
        What::HookFailed { hook, .. } => format!("failed {hook}"),
        other => format!("{other:?}"),
    };
    format!("{who}: {what}")
}

fn told(trail: &Trail) -> Vec<String> {
    trail.lock().unwrap().iter().map(in_words).collect()
}

/// Everything that people and programs do is told, whose doing it was, once,
/// in the order in which it happened.
#[tokio::test(start_paused = true)]
async fn an_observer_hears_who_did_what_to_whom() {
    let (hub, trail) = hub(|builder| builder).await;
    let agent = agent(&hub);
    let (ann, guest) = (dashboard(&hub, "ann"), dashboard(&hub, "guest"));
    ann.connected().await.unwrap();
    guest.connected().await.unwrap();
    // Who is let in is not in order with what others do.
    let mut beginning = std::mem::take(&mut *trail.lock().unwrap());
    beginning.sort_by_key(in_words);
    assert_eq!(
        beginning.iter().map(in_words).collect::<Vec<_>>(),
        [
            "-: connected",
            "-: connected",
            "-: connected",
            "ann: greeted",
            "build-1: greeted",
            "guest: greeted"
        ]
    );

    let name: AgentId = "build-1".parse().unwrap();
    let refused = guest.run(name.clone(), Request::text("hi")).await;
    assert!(refused.is_err());
    let mut login = Viewer::run(&ann, "build-1", Request::text("login")).await.unwrap();
    login.sees("password: ").await;
    login.types("secr").await.unwrap();
    login.types("et\n").await.unwrap();
    let unknown = CommandId::from_u128(7);
    assert!(guest.interrupt(unknown).await.is_err());
    assert!(guest.interrupt(login.command().id()).await.is_err());
    assert!(guest.emergency_stop(None).await.is_err());
    login.interrupts().await.unwrap();
    login.sees_the_end().await;
    let hi = Viewer::run(&ann, "build-1", Request::text("hi")).await.unwrap();
    hi.sees_the_end().await;
    assert_eq!(ann.emergency_stop(Some(vec![name])).await, Ok(0));
    assert_eq!(hub.hub().unwrap().revoke(&"acme".parse().unwrap(), "guest"), 1);
    hub.hub().unwrap().drain(S).await;
    let end = told(&trail);
    let (done, end) = end.split_at(end.iter().position(|e| e.contains("revoked")).unwrap() - 1);
    assert_eq!(
        done,
        [
            r#"guest: requested build-1 "hi" Err(Forbidden)"#,
            r#"ann: requested build-1 "login" Ok(())"#,
            "build-1: started build-1 1",
            "ann: input began build-1",
            "guest: interrupt None Err(NotFound)",
            r#"guest: interrupt Some("build-1") Err(Forbidden)"#,
            "guest: stop None Err(Forbidden)",
            r#"ann: interrupt Some("build-1") Ok(())"#,
            "ann: input ended build-1 7",
            "-: ended build-1 interrupted None",
            r#"ann: requested build-1 "hi" Ok(())"#,
            "build-1: started build-1 1",
            "-: ended build-1 completed Some(3)",
            "ann: stop Some([build-1]) Ok(0)",
        ]
    );
    // The drain is over when everything was told.
    assert_eq!(end[..2], ["guest: closed 4401", "-: revoked guest 1"]);
    let mut last = end[2..].to_vec();
    last.sort();
    assert_eq!(last, ["ann: closed 1012", "build-1: closed 1012"]);
    drop(agent);
}

struct Broken(MemoryQueue);

impl CommandQueue for Broken {
    fn epoch(&self) -> trunkline_protocol::ids::QueueEpoch {
        self.0.epoch()
    }

    fn load(
        &self,
    ) -> BoxFuture<'_, Result<Vec<trunkline_server::hooks::StoredCommand>, QueueError>> {
        self.0.load()
    }

    fn apply<'a>(&'a self, _: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        Box::pin(async { Err(QueueError("the disk is full".into())) })
    }
}

/// What fails is told with its reason, to whoever looks after the hub and not
/// to peers; a request that comes to nothing is told, too.
#[tokio::test(start_paused = true)]
async fn an_observer_hears_what_failed() {
    let (hub, trail) = hub(|builder| builder.queue(Arc::new(Broken(MemoryQueue::new())))).await;
    let _agent = agent(&hub);
    let ann = dashboard(&hub, "ann");
    let refused = ann.run("build-1", Request::text("hi")).await.unwrap_err();
    assert!(!refused.to_string().contains("disk"), "{refused}");
    let nobody = Dashboard::over(hub.cable().connector()).connect();
    assert!(nobody.connected().await.is_err(), "it has no token");
    hub.hub().unwrap().drain(S).await;
    let told = told(&trail);
    let whys: Vec<_> = trail
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| match &event.what {
            What::HookFailed { why, .. } => Some(why.clone()),
            _ => None,
        })
        .collect();
    assert!(whys.iter().any(|why| why.contains("the disk is full")), "{whys:?}");
    let requested = r#"ann: requested build-1 "hi" Err(QueueUnavailable)"#;
    assert_eq!(told.iter().filter(|event| *event == requested).count(), 1, "{told:#?}");
    assert!(told.iter().any(|event| event.starts_with("-: rejected 4401 Some(")), "{told:#?}");
}

/// One that panics has missed what it panicked at, and nothing else.
#[tokio::test(start_paused = true)]
async fn an_observer_that_panics_hears_the_rest() {
    let heard = Arc::new(Mutex::new(0));
    let counter = Arc::clone(&heard);
    let hub = TestHub::start_with(move |builder| {
        let counter = Arc::clone(&counter);
        builder.observer(move |_: &Event| {
            *counter.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += 1;
            panic!("on purpose");
        })
    })
    .await;
    let dashboard = Dashboard::over(hub.cable().connector()).connect();
    dashboard.connected().await.unwrap();
    dashboard.close().await;
    hub.hub().unwrap().drain(S).await;
    let heard = *heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert_eq!(heard, 3, "connected, greeted, closed");
}

/// The figures are those of what was told.
#[tokio::test(start_paused = true)]
async fn figures_agree_with_what_was_told() {
    let (hub, trail) = hub(|builder| builder).await;
    let _agent = agent(&hub);
    let (ann, guest) = (dashboard(&hub, "ann"), dashboard(&hub, "guest"));
    guest.connected().await.unwrap();
    for _ in 0..3 {
        let hi = Viewer::run(&ann, "build-1", Request::text("hi")).await.unwrap();
        hi.sees_the_end().await;
        let refused = guest.run("build-1", Request::text("hi")).await;
        assert!(refused.is_err());
    }
    ann.run("absent", Request::text("hi")).await.unwrap();
    let stats = hub.hub().unwrap().stats();
    assert_eq!((stats.links_agents, stats.links_dashboards, stats.links_other), (1, 2, 0));
    assert_eq!((stats.tenants, stats.agents, stats.streams), (1, 2, 3));
    assert_eq!(stats.commands_waiting, 1);
    assert!(stats.oldest_waiting.is_some(), "by a clock that is not the test's");
    let counts = stats.counts;
    assert_eq!(counts.greeted, BTreeMap::from([("agent", 1), ("dashboard", 2)]));
    assert_eq!(counts.authenticated, BTreeMap::from([("ok", 3)]));
    assert_eq!(counts.commands_requested, BTreeMap::from([("forbidden", 3), ("ok", 4)]));
    assert_eq!(counts.commands_ended, BTreeMap::from([("completed", 3)]));
    assert_eq!(counts.refused, BTreeMap::from([("forbidden", 3)]));
    let received = |kind: &str| counts.received[kind];
    assert_eq!(received("command:request").count, 7);
    assert!(received("command:request").bytes > 7 * 100);
    assert_eq!(received("terminal:output").count, 3, "one piece for each");
    assert_eq!(counts.sent["error"].count, 3);
    assert_eq!(counts.sent["command:execute"].count, 3);
    let is_told = |code: &ErrorCode| {
        let trail = trail.lock().unwrap();
        let is_it = |event: &&Event| matches!(&event.what, What::CommandRequested { outcome: Err(told), .. } if told == code);
        trail.iter().filter(is_it).count()
    };
    assert_eq!(is_told(&ErrorCode::Forbidden), 3);
}

/// Names of events in the log, with their levels.
#[derive(Clone, Default)]
struct LineNames(Arc<Mutex<BTreeSet<(String, Level)>>>);

impl<S: Subscriber> Layer<S> for LineNames {
    fn on_event(&self, line: &Line<'_>, _: Context<'_, S>) {
        let metadata = line.metadata();
        if metadata.target() == "trunkline::hub" {
            self.0.lock().unwrap().insert((metadata.name().to_owned(), *metadata.level()));
        }
    }
}

/// What the log says stands in the documentation, with its level.
#[tokio::test(start_paused = true)]
async fn lines_in_the_log_are_named_as_documented() {
    let names = LineNames::default();
    let _guard =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(names.clone()));
    let (hub, _) = hub(|builder| builder).await;
    let _agent = agent(&hub);
    let (ann, guest) = (dashboard(&hub, "ann"), dashboard(&hub, "guest"));
    let mut login = Viewer::run(&ann, "build-1", Request::text("login")).await.unwrap();
    login.sees("password: ").await;
    login.types("secret\n").await.unwrap();
    assert!(guest.run("build-1", Request::text("hi")).await.is_err());
    assert!(
        guest
            .resize(
                CommandId::from_u128(7),
                trunkline_protocol::message::TerminalSize { cols: 80, rows: 24 }
            )
            .await
            .is_err()
    );
    login.interrupts().await.unwrap();
    login.sees_the_end().await;
    let _other = dashboard(&hub, "ann");
    let nobody = Dashboard::over(hub.cable().connector()).connect();
    assert!(nobody.connected().await.is_err());
    ann.connection().wait_for(ConnectionState::is_over).await.unwrap();
    assert_eq!(guest.emergency_stop(None).await, Ok(0), "there is nothing to stop");
    hub.hub().unwrap().revoke(&"acme".parse().unwrap(), "guest");
    hub.hub().unwrap().drain(S).await;

    let document = include_str!("../../docs/watching.md");
    let mut documented = BTreeSet::new();
    for row in document.lines().filter_map(|line| line.strip_prefix("| `")) {
        let Some((name, rest)) = row.split_once("` | ") else { continue };
        let levels = rest.split(" | ").next().unwrap();
        for level in levels.split(", ").filter_map(|level| level.parse::<Level>().ok()) {
            documented.insert((name.to_owned(), level));
        }
    }
    let said = names.0.lock().unwrap().clone();
    let unknown: Vec<_> = said
        .iter()
        .filter(|(name, _)| !name.starts_with("event "))
        .filter(|line| !documented.contains(line))
        .collect();
    assert_eq!(unknown, Vec::<&(String, Level)>::new(), "documented: {documented:#?}");
    let must = [
        "connected",
        "greeted",
        "rejected",
        "closed",
        "superseded",
        "refused",
        "revoked",
        "command requested",
        "command started",
        "command ended",
        "interrupt requested",
        "stop requested",
        "input began",
        "input ended",
    ];
    for name in must {
        assert!(said.iter().any(|(said, _)| said == name), "{name} was not said: {said:#?}");
    }
}
