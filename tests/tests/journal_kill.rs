//! Agents that are processes of their own, run real programs, keep a journal
//! and are killed with SIGKILL, at every point of a command's life. No command
//! starts twice, and each ends as what is known of it.
//!
//! ```sh
//! TRUNKLINE_KILL_ROUNDS=100 cargo test -p trunkline-tests --test journal_kill
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "stories")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};

use tokio::net::TcpListener;
use tokio::process::Command;
use trunkline_client::journal::{Journal, JournalError, JournalRecord, Recovered};
use trunkline_client::{
    Agent, BoxFuture, Dashboard, FileJournal, Programs, Request, Terminal, TerminalEvent,
};
use trunkline_protocol::message::{CommandState, CommandStatus};
use trunkline_server::Hub;
use trunkline_tests::process::{Process, within};
use trunkline_tests::proxy::Proxy;

/// Where the agent's process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    BeforeBegun,
    AfterBegun,
    Running,
    BeforeEnded,
    AfterEnded,
}

/// Where, and whether its link is lost before that.
const CASES: [(Point, bool); 7] = [
    (Point::BeforeBegun, false),
    (Point::AfterBegun, false),
    (Point::Running, false),
    (Point::BeforeEnded, false),
    (Point::BeforeEnded, true),
    (Point::AfterEnded, false),
    (Point::AfterEnded, true),
];

#[tokio::test]
async fn no_kill_makes_a_command_run_twice_or_lies_about_its_end() {
    let rounds = std::env::var("TRUNKLINE_KILL_ROUNDS").map_or(3, |text| text.parse().unwrap());
    let stage = Stage::set().await;
    let mut kills = 0;
    let mut unknown = 0;
    for round in 0..rounds {
        for (number, (point, cut)) in CASES.into_iter().enumerate() {
            let retry = round % 2 == 1;
            let name = format!("round {round}, {point:?}, cut: {cut}, retry: {retry}");
            let seen = stage.life(point, cut, retry, &format!("{round}-{number}")).await;
            kills += 2;
            unknown += u32::from(seen.state.status == CommandStatus::Unknown);
            check(point, cut, retry, &seen, &name);
        }
    }
    let length = std::fs::metadata(stage.folder.path().join("agent.journal")).unwrap().len();
    assert!(length < 4 * 1024 * 1024, "the journal has {length} bytes");
    println!("{kills} kills, {} commands, {unknown} unknown, {length} bytes of journal", kills / 2);
}

fn check(point: Point, cut: bool, retry: bool, seen: &Seen, name: &str) {
    let end = seen.state.end.clone().unwrap();
    let status = seen.state.status;
    let name = format!("{name}: started {} times, {:?}", seen.starts, seen.state);
    // The end was told, or written down and told by the next process.
    let is_known = match point {
        Point::BeforeBegun | Point::AfterEnded => true,
        Point::AfterBegun | Point::Running => false,
        // It may just have been said.
        Point::BeforeEnded => !cut && status == CommandStatus::Completed && seen.state.attempt == 1,
    };
    let attempts = if is_known || !retry { 1 } else { 2 };
    assert_eq!(seen.state.attempt, attempts, "{name}");
    let never_started = u32::from(point == Point::AfterBegun);
    assert_eq!(seen.starts, attempts - never_started, "{name}");
    if is_known || retry {
        assert_eq!((status, end.exit_code), (CommandStatus::Completed, Some(7)), "{name}");
    } else {
        assert_eq!((status, end.exit_code), (CommandStatus::Unknown, None), "{name}");
    }
}

// ---- below the story ----------------------------------------------------------

/// A hub, the agent's cable to it, a dashboard, and a folder.
struct Stage {
    dashboard: Dashboard,
    cable: Proxy,
    folder: tempfile::TempDir,
}

/// What there was to be seen of a command.
struct Seen {
    state: CommandState,
    starts: u32,
}

impl Stage {
    async fn set() -> Self {
        let hub = Hub::builder().start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { hub.serve(listener).await });
        let dashboard = Dashboard::builder(&format!("ws://{address}")).unwrap().connect();
        let cable = Proxy::start(address).await.unwrap();
        Self { dashboard, cable, folder: tempfile::tempdir().unwrap() }
    }

    /// A command, an agent that dies over it, and the next one.
    async fn life(&self, point: Point, cut: bool, retry: bool, name: &str) -> Seen {
        let at = |what: &str| self.folder.path().join(format!("{what}-{name}"));
        let (starts, go) = (at("starts"), at("go"));
        let mut first = self.agent(Some(point));
        let request = Request::shell(script(&starts, &go));
        let request = if retry { request.retry() } else { request };
        let command = within(self.dashboard.run("a", request)).await.unwrap();
        if !matches!(point, Point::BeforeBegun | Point::AfterBegun) {
            shows_that_it_runs(&mut command.terminal()).await;
            if cut {
                self.cable.refuse(true);
                self.cable.cut();
            }
            if point == Point::Running {
                first.kill().await;
            } else {
                std::fs::write(&go, "").unwrap();
            }
        }
        let died = first.died().await;
        assert_eq!(died.signal(), Some(9), "{died}");
        // Lets a program that outlived its agent end, and the next one too.
        std::fs::write(&go, "").unwrap();
        self.cable.heal();
        let mut second = self.agent(None);
        let state = within(command.ended()).await.unwrap();
        second.kill().await;
        let starts = std::fs::read_to_string(&starts).unwrap_or_default();
        Seen { state: (*state).clone(), starts: u32::try_from(starts.lines().count()).unwrap() }
    }

    fn agent(&self, dies: Option<Point>) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--ignored", "--exact", "an_agent_process"])
            .env("TRUNKLINE_HUB", self.cable.url())
            .env("TRUNKLINE_JOURNAL", self.folder.path().join("agent.journal"))
            .env("TRUNKLINE_DIES", dies.map(|point| format!("{point:?}")).unwrap_or_default());
        Process::start(&mut command)
    }
}

/// Leaves a mark that it started, and ends when it may.
fn script(starts: &Path, go: &Path) -> String {
    let (starts, go) = (starts.display(), go.display());
    format!(
        "echo started >> {starts}; echo started; while [ ! -e {go} ]; do sleep 0.02; done; exit 7"
    )
}

async fn shows_that_it_runs(terminal: &mut Terminal) {
    loop {
        match within(terminal.next()).await {
            Some(TerminalEvent::Output { data, .. }) if data.starts_with(b"started") => return,
            Some(_) => {}
            None => panic!("it ended before it ran"),
        }
    }
}

// ---- the agent's process ------------------------------------------------------

#[test]
#[ignore = "the agent's process, which the other test starts"]
fn an_agent_process() {
    let variable = |name: &str| std::env::var(name).expect("started by the other test");
    let dies = variable("TRUNKLINE_DIES");
    let journal = PathBuf::from(variable("TRUNKLINE_JOURNAL"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let journal = Tripwire { journal: FileJournal::open(journal).unwrap(), dies };
        let agent = Agent::builder(&variable("TRUNKLINE_HUB"), "a").unwrap();
        let agent = agent.journal(journal).await.unwrap().connect(Programs::new());
        let why = agent.closed().await;
        panic!("it is over: {why}");
    });
}

/// The journal, which kills the process at a point.
#[derive(Debug)]
struct Tripwire {
    journal: FileJournal,
    dies: String,
}

impl Tripwire {
    fn die_at(&self, point: Point) {
        if self.dies == format!("{point:?}") {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
    }
}

impl Journal for Tripwire {
    fn load(&self) -> BoxFuture<'_, Result<Recovered, JournalError>> {
        self.journal.load()
    }

    fn record<'a>(
        &'a self,
        records: &'a [JournalRecord],
    ) -> BoxFuture<'a, Result<(), JournalError>> {
        Box::pin(async move {
            let begins = records.iter().any(|record| matches!(record, JournalRecord::Begun(_)));
            let ends = records.iter().any(|record| matches!(record, JournalRecord::Ended(_)));
            if begins {
                self.die_at(Point::BeforeBegun);
            }
            if ends {
                self.die_at(Point::BeforeEnded);
            }
            self.journal.record(records).await?;
            if begins {
                self.die_at(Point::AfterBegun);
            }
            if ends {
                self.die_at(Point::AfterEnded);
            }
            Ok(())
        })
    }
}
