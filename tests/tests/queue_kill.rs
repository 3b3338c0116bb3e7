//! Hubs that are processes of their own, keep their queue in SQLite and are
//! killed with SIGKILL, at every point from a request to its end. Nothing that
//! was accepted is lost, and nothing runs twice.
//!
//! ```sh
//! TRUNKLINE_KILL_ROUNDS=100 cargo test -p trunkline-tests --features sqlite --test queue_kill
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "stories")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::watch;
use trunkline_client::{Agent, Backoff, Dashboard, Execution, Outcome, Request};
use trunkline_protocol::ids::{CommandId, QueueEpoch};
use trunkline_protocol::message::{Channel, CommandStatus};
use trunkline_server::Hub;
use trunkline_server::hooks::{
    BoxFuture, CommandQueue, QueueChange, QueueError, SqliteQueue, StoredCommand,
};
use trunkline_tests::process::{Process, within};
use trunkline_tests::proxy::Proxy;

/// Where the hub's process dies: at a change, before it is stored or after,
/// before anybody hears so; or from outside, once the program runs.
const POINTS: [&str; 7] = [
    "accepted, before",
    "accepted, after",
    "leased, before",
    "leased, after",
    "settled, before",
    "settled, after",
    "running",
];

#[tokio::test]
async fn no_kill_loses_what_was_accepted_or_runs_it_twice() {
    let rounds = std::env::var("TRUNKLINE_KILL_ROUNDS").map_or(2, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("queue.db");
    let stage = Stage::set().await;
    let (mut kills, mut commands) = (0, Vec::new());
    let mut hub = stage.start_hub(&file, "").await;
    for round in 0..rounds {
        for point in POINTS {
            hub.kill().await;
            let mut doomed = stage.start_hub(&file, point).await;
            let dashboard = stage.dashboard.clone();
            let asked = tokio::spawn(async move { dashboard.run("a", Request::text("go")).await });
            if point == "running" {
                within(stage.started.clone().wait_for(|count| *count > commands.len()))
                    .await
                    .unwrap();
                doomed.kill().await;
            }
            let died = doomed.died().await;
            assert_eq!(died.signal(), Some(9), "{point}: {died}");
            kills += 1;
            hub = stage.start_hub(&file, "").await;
            let command = within(asked).await.unwrap().unwrap();
            let ended = within(command.ended()).await.unwrap();
            let exit = ended.end.as_ref().and_then(|end| end.exit_code);
            let name = format!("round {round}, {point}");
            assert_eq!((ended.status, exit), (CommandStatus::Completed, Some(7)), "{name}");
            commands.push(command.id());
            let starts = stage.starts.lock().unwrap().clone();
            assert_eq!(starts.get(&command.id()), Some(&1), "{name}: starts");
            assert_eq!(starts.len(), commands.len(), "{name}: nothing else was started");
        }
    }
    hub.kill().await;
    let kept = SqliteQueue::open(&file).unwrap().load().await.unwrap();
    // The roster keeps 100; what a killed hub could not forget any more stays.
    assert!(kept.len() >= commands.len().min(100) && kept.len() < 110, "{} are kept", kept.len());
    assert!(kept.iter().all(|command| command.status == CommandStatus::Completed));
    println!("{kills} kills, {} commands: none lost, none run twice", commands.len());
}

// ---- below the story ----------------------------------------------------------

/// An agent and a dashboard, which live through it all, and the cable on which
/// they dial whichever hub there is.
struct Stage {
    dashboard: Dashboard,
    /// How often each command was started.
    starts: Arc<Mutex<HashMap<CommandId, u32>>>,
    started: watch::Receiver<usize>,
    cable: Proxy,
    _agent: Agent,
}

impl Stage {
    async fn set() -> Self {
        let cable = Proxy::start(None).await.unwrap();
        let url = cable.url();
        let backoff = Backoff {
            first: Duration::from_millis(20),
            base: Duration::from_millis(50),
            max: Duration::from_millis(100),
            ..Backoff::default()
        };
        let starts = Arc::new(Mutex::new(HashMap::new()));
        let (count, started) = watch::channel(0);
        let agent = Agent::builder(&url, "a").unwrap().backoff(backoff).connect({
            let (starts, count) = (Arc::clone(&starts), count);
            move |execution: Execution| {
                *starts.lock().unwrap().entry(execution.command()).or_insert(0) += 1;
                count.send_modify(|count| *count += 1);
                async move {
                    execution.output().write(Channel::Stdout, b"it runs").await;
                    Outcome::Exited(7)
                }
            }
        });
        let dashboard = Dashboard::builder(&url).unwrap().backoff(backoff).connect();
        Self { dashboard, starts, started, cable, _agent: agent }
    }

    /// A hub that dies at a point, if one is named.
    async fn start_hub(&self, file: &Path, dies: &str) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--ignored", "--exact", "a_hub_process", "--nocapture"])
            .env("TRUNKLINE_QUEUE", file)
            .env("TRUNKLINE_DIES", dies);
        let hub = Process::start(&mut command);
        let address: SocketAddr = hub.says("listens on ").await.parse().unwrap();
        self.cable.lead_to(address);
        hub
    }
}

// ---- the hub's process ---------------------------------------------------------

#[test]
#[ignore = "the hub's process, which the other test starts"]
fn a_hub_process() {
    let variable = |name: &str| std::env::var(name).expect("started by the other test");
    let queue = SqliteQueue::open(PathBuf::from(variable("TRUNKLINE_QUEUE"))).unwrap();
    let queue = Tripwire { queue, dies: variable("TRUNKLINE_DIES") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let hub = Hub::builder().queue(Arc::new(queue)).start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("\nlistens on {}", listener.local_addr().unwrap());
        hub.serve(listener).await.unwrap();
    });
}

/// The queue, which kills the process at a point.
#[derive(Debug)]
struct Tripwire {
    queue: SqliteQueue,
    dies: String,
}

impl Tripwire {
    fn die_at(&self, change: &QueueChange, when: &str) {
        let kind = match change {
            QueueChange::Accepted(_) => "accepted",
            QueueChange::Leased { .. } => "leased",
            QueueChange::Settled { .. } => "settled",
            QueueChange::Forgotten { .. } => "forgotten",
        };
        if self.dies == format!("{kind}, {when}") {
            let own = rustix::process::getpid();
            let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        }
    }
}

impl CommandQueue for Tripwire {
    fn epoch(&self) -> QueueEpoch {
        self.queue.epoch()
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>> {
        self.queue.load()
    }

    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        Box::pin(async move {
            self.die_at(change, "before");
            self.queue.apply(change).await?;
            self.die_at(change, "after");
            Ok(())
        })
    }
}
