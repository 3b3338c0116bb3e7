//! What happens, in order.

use std::error::Error;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use trunkline_client::protocol::ids::{AgentId, CommandId};
use trunkline_client::protocol::message::{CommandState, CommandStatus, Priority};
use trunkline_client::protocol::roster::RosterEvent;
use trunkline_client::protocol::stream::{Plain, TerminalFilter};
use trunkline_client::{Agent, Backoff, Command, ConnectionState, DashboardEvent, Events, Request};
use trunkline_examples::{bytes_in_words, in_words, pause, printable, short};

use crate::agents::{Crew, PROBE};
use crate::cables::Cables;
use crate::hub_process::HubProcess;
use crate::show::{Colour, Show};
use crate::truth::Truth;
use crate::verdict::{Check, Expected, Latency, Verdict};
use crate::watcher::Watcher;

/// About 50 MB.
const NUMBERS: u32 = 6_400_000;
/// Writes of each probe, 200 a second.
const PROBES: u32 = 300;
/// How long nobody reaches the hub.
const OUTAGE: Duration = Duration::from_millis(400);

/// Shorter waits than the default, which suits fleets: up to 0.1 s, then 0.2 s
/// each.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    base: Duration::from_millis(200),
    max: Duration::from_millis(200),
    jitter_percent: 20,
    reset_after: Duration::from_secs(1),
    attempt_timeout: Duration::from_secs(5),
};

/// What runs until it is interrupted, tidies up, and says so.
const NIGHTLY: &str =
    "trap 'echo caught it, tidying up; exit 130' INT; echo working; while :; do sleep 0.1; done";
/// What answers what is typed.
const SESSION: &str = "stty -echo; echo ready; \
    while read -r line; do test \"$line\" = bye && exit 3; echo \"you typed $line\"; done";

/// Tells it, and whether all of it held.
pub(crate) async fn tell(show: &Show) -> Result<bool, Box<dyn Error>> {
    let folder = Folder::fill()?;

    show.waits_for("the hub to start");
    let mut hub = HubProcess::start().await?;
    let cables = Cables::lay().await?;
    cables.plug_in(hub.address);
    let url = cables.url();
    show.say("hub", &format!("process {} listens on {}", hub.pid(), hub.address));

    let crew = Crew::default();
    let build_1 = Agent::builder(&url, "build-1")?.slots(2).backoff(BACKOFF).connect(crew.clone());
    let build_2 = Agent::builder(&url, "build-2")?.backoff(BACKOFF).connect(crew.clone());
    let ids = [build_1.id(), build_2.id()];
    let ann = Watcher::connect("ann", &url, BACKOFF, &ids)?;
    let bob = Watcher::connect("bob", &url, BACKOFF, &ids)?;
    let peers = Peers { agents: [&build_1, &build_2], dashboards: [&ann, &bob] };

    show.waits_for("everybody to connect");
    peers.all_back().await;
    peers.agents_listed(&ids).await;
    show.say("hub", "has two agents and two dashboards, each on a link of its own");

    // What is said from here on is what dashboard ann hears.
    let narrated = narrate(show, ann.dashboard.events());
    let story = async {
        let mut verdict = Verdict::default();
        let listing = list(show, &ann, &folder.0).await?;
        verdict.expects(listing);

        show.waits_for("the queue of build-2, and the probe on build-1");
        let (calm, queue) = tokio::join!(probe(&bob, &crew), overtake(show, &ann, &bob, &ids[1]));
        let calm = calm?;
        let (queued, overtaken) = queue?;
        for expected in queued {
            verdict.expects(expected);
        }
        verdict.checks(overtaken);

        let (big, session, busy) =
            large_output(show, &ann, &bob, &crew, &cables, &mut hub, &peers).await?;
        verdict.expects(big.expected);
        verdict.expects(session);
        verdict.checks(big.outages);

        verdict.expects(calm.expected(&crew));
        verdict.expects(busy.expected(&crew));
        for (when, probe) in [("at rest", &calm), ("beside the large output", &busy)] {
            let note = crew.note(probe.command);
            let latency = Latency::of(&note.writes, probe.command, &[&ann, &bob]);
            verdict.checks(latency.check(when));
        }
        verdict.look(&[&ann, &bob]).await;
        Ok::<_, Box<dyn Error>>(verdict)
    };
    let verdict = tokio::select! {
        verdict = story => verdict?,
        () = narrated => return Err("the dashboard was closed".into()),
    };

    show.waits_for("everybody to say goodbye");
    show.live(Vec::new());
    let goodbyes = async {
        tokio::join!(ann.dashboard.close(), bob.dashboard.close(), build_1.stop(), build_2.stop())
    };
    goodbyes.await;
    Ok(verdict.print(show))
}

// ---- the scenes -------------------------------------------------------------

/// A coloured listing.
async fn list(show: &Show, ann: &Watcher, folder: &Path) -> Result<Expected, Box<dyn Error>> {
    show.waits_for("the listing");
    let argv = ["ls", "-l", "--color=always", &folder.to_string_lossy()].map(str::to_owned);
    let truth = Truth::by_running(&argv, true).await?;
    let command = ann.dashboard.run("build-1", Request::argv(argv).terminal(100, 24)).await?;
    ann.sees_end(command.id()).await;

    let bytes = ann.seen().output(command.id()).map(|o| o.beginning.clone()).unwrap_or_default();
    let text = if show.is_plain() {
        let mut text = Vec::new();
        Plain::default().feed(&bytes, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    } else {
        let mut shown = Vec::new();
        TerminalFilter::new().only_styles().feed(&bytes, &mut shown);
        String::from_utf8_lossy(&shown).replace('\r', "")
    };
    for line in text.lines() {
        show.line(&format!("{:21}{line}", ""));
    }
    let (status, exit_code) = (CommandStatus::Completed, 0);
    Ok(Expected { what: "coloured listing", command: command.id(), truth, status, exit_code })
}

/// One command at a time runs on build-2: what waits behind it is ordered by
/// priority, and the one in front is interrupted.
async fn overtake(
    show: &Show,
    ann: &Watcher,
    bob: &Watcher,
    build_2: &AgentId,
) -> Result<([Expected; 3], Check), Box<dyn Error>> {
    let shell = |line: &str| Request::shell(line).terminal(80, 24);
    let nightly = ann.dashboard.run("build-2", shell(NIGHTLY)).await?;
    ann.sees_bytes(nightly.id(), "working\r\n".len() as u64).await;

    let low = shell("echo low: this can wait").priority(Priority::Low);
    let low = bob.dashboard.run("build-2", low).await?;
    let high = shell("echo high: this cannot; sleep 0.1").priority(Priority::High);
    let high = bob.dashboard.run("build-2", high).await?;
    let mut roster = ann.dashboard.roster();
    // Cloned at once: the roster that is borrowed here cannot change meanwhile.
    let there = roster.wait_for(|roster| roster.queue(build_2).len() == 2).await?.clone();
    let queue: Vec<_> = there.queue(build_2).iter().map(|id| short(*id)).collect();
    show.say("build-2", &format!("its queue: {} (high), then {} (low)", queue[0], queue[1]));

    ann.dashboard.interrupt(nightly.id()).await?;
    nightly.ended().await?;
    let (first, second) = (high.ended().await?, low.ended().await?);
    let overtook = first.ended_at_ms <= second.started_at_ms && second.started_at_ms.is_some();
    let check = Check {
        held: overtook && queue == [short(high.id()), short(low.id())],
        what: "priority".to_owned(),
        found: if overtook {
            "high was asked for after low, and had ended before low began".to_owned()
        } else {
            "low began before high had ended".to_owned()
        },
    };

    let expected = |what, command: &Command, text: &str, status, exit_code| {
        let truth = Truth::of(text.replace('\n', "\r\n").as_bytes());
        Expected { what, command: command.id(), truth, status, exit_code }
    };
    let done = CommandStatus::Completed;
    let all = [
        expected(
            "interrupted",
            &nightly,
            "working\ncaught it, tidying up\n",
            CommandStatus::Interrupted,
            130,
        ),
        expected("high priority", &high, "high: this cannot\n", done, 0),
        expected("low priority", &low, "low: this can wait\n", done, 0),
    ];
    Ok((all, check))
}

/// A probe that has been run.
struct Probe {
    command: CommandId,
    what: &'static str,
}

impl Probe {
    fn expected(&self, crew: &Crew) -> Expected {
        Expected {
            what: self.what,
            command: self.command,
            truth: crew.note(self.command).truth(),
            status: CommandStatus::Completed,
            exit_code: 0,
        }
    }
}

async fn probe(bob: &Watcher, crew: &Crew) -> Result<Probe, Box<dyn Error>> {
    let command = bob.dashboard.run("build-1", Request::text(format!("{PROBE}{PROBES}"))).await?;
    command.ended().await?;
    debug_assert_eq!(crew.note(command.id()).writes.len(), PROBES as usize);
    Ok(Probe { command: command.id(), what: "latency probe" })
}

/// The large output, and how the outages went.
struct Big {
    expected: Expected,
    outages: Check,
}

/// The large output on build-1, a session on build-2; a third of the way every
/// cable is pulled, at two thirds the hub is killed. What is typed meanwhile
/// waits, and arrives once.
async fn large_output(
    show: &Show,
    ann: &Watcher,
    bob: &Watcher,
    crew: &Crew,
    cables: &Cables,
    hub: &mut HubProcess,
    peers: &Peers<'_>,
) -> Result<(Big, Expected, Probe), Box<dyn Error>> {
    show.waits_for("the session to be ready");
    let session = Request::shell(SESSION).terminal(80, 24);
    let session = bob.dashboard.run("build-2", session).await?;
    bob.sees_bytes(session.id(), "ready\r\n".len() as u64).await;
    session.input("one\n").await?;

    show.waits_for("the large output");
    let argv = ["seq", "1", &NUMBERS.to_string()].map(str::to_owned);
    let truth = Truth::by_running(&argv, false).await?;
    let total = truth.bytes;
    show.say("", &format!("the large output will be {}", bytes_in_words(total)));
    let big = ann.dashboard.run("build-1", Request::argv(argv)).await?;

    let drama = async {
        let busy = probe(bob, crew).await?;
        let busy = Probe { what: "probe beside it", ..busy };
        show.waits_for("a third of the large output");
        ann.sees_bytes(big.id(), total / 3).await;

        let pulled = cables.pull();
        show.say(
            "",
            &show.paint(
                Colour::Yellow,
                &format!("ALL {pulled} CABLES ARE PULLED, in the middle of it"),
            ),
        );
        show.waits_for("everybody to notice that the cables are pulled");
        peers.all_lost().await;
        session.input("two, while the cables were out\n").await?;
        pause(OUTAGE).await;
        cables.plug_in(hub.address);
        let since = show.seconds();
        show.waits_for("everybody to come back after the cables were pulled");
        peers.all_back().await;
        show.say(
            "",
            &format!(
                "the cables are back; all four links {:.2} s after that",
                show.seconds() - since
            ),
        );

        show.waits_for("two thirds of the large output");
        bob.sees_bytes(big.id(), total / 3 * 2).await;
        let pid = hub.pid();
        hub.kill().await?;
        show.say(
            "hub",
            &show.paint(
                Colour::Red,
                &format!("KILLED with kill -9 (process {pid}); its memory is gone"),
            ),
        );
        show.waits_for("everybody to notice that the hub is gone");
        peers.all_lost().await;
        session.input("three, while there was no hub\n").await?;
        pause(OUTAGE).await;
        show.waits_for("the next hub to start");
        *hub = HubProcess::start().await?;
        cables.plug_in(hub.address);
        let since = show.seconds();
        show.say("hub", &format!("the next one: process {} on {}", hub.pid(), hub.address));
        show.waits_for("everybody to come back after the hub was killed");
        peers.all_back().await;
        show.say(
            "",
            &format!(
                "all four links are back after {:.2} s; the agents bring it up to date",
                show.seconds() - since
            ),
        );

        show.waits_for("the end of the large output");
        big.ended().await?;
        for dashboard in [ann, bob] {
            dashboard.sees_end(big.id()).await;
        }
        session.input("bye\n").await?;
        show.waits_for("the end of the session");
        session.ended().await?;
        Ok::<_, Box<dyn Error>>((busy, pulled))
    };
    let (busy, pulled) = tokio::select! {
        drama = drama => drama?,
        () = progress(show, [ann, bob], big.id(), total) => return Err("no progress".into()),
    };

    let typed = "ready\nyou typed one\nyou typed two, while the cables were out\n\
                 you typed three, while there was no hub\n";
    let truth_of_session = Truth::of(typed.replace('\n', "\r\n").as_bytes());
    let status = CommandStatus::Completed;
    let outages = Check {
        held: pulled == 4,
        what: "outages".to_owned(),
        found: format!("{pulled} links cut at once, 1 hub killed; all came back by themselves"),
    };
    let big = Expected { what: "large output", command: big.id(), truth, status, exit_code: 0 };
    let session = Expected {
        what: "fed by input",
        command: session.id(),
        truth: truth_of_session,
        status,
        exit_code: 3,
    };
    Ok((Big { expected: big, outages }, session, busy))
}

// ---- what the scenes stand on ------------------------------------------------

/// Everybody who has a link.
struct Peers<'a> {
    agents: [&'a Agent; 2],
    dashboards: [&'a Watcher; 2],
}

impl Peers<'_> {
    async fn all(&self, what: impl Fn(&ConnectionState) -> bool) {
        let agents = self.agents.map(Agent::connection);
        let dashboards = self.dashboards.map(|watcher| watcher.dashboard.connection());
        for mut connection in agents.into_iter().chain(dashboards) {
            // Ends early only with its peer, which is borrowed here.
            let _ = connection.wait_for(&what).await;
        }
    }

    async fn all_lost(&self) {
        self.all(|state| !state.is_connected()).await;
    }

    async fn all_back(&self) {
        self.all(ConnectionState::is_connected).await;
    }

    async fn agents_listed(&self, ids: &[AgentId]) {
        for watcher in self.dashboards {
            let mut roster = watcher.dashboard.roster();
            let _ = roster.wait_for(|roster| ids.iter().all(|id| roster.agent(id).is_some())).await;
        }
    }
}

/// Says how commands get on, as a dashboard hears of it.
async fn narrate(show: &Show, mut events: Events) {
    let mut last: Vec<Arc<CommandState>> = Vec::new();
    while let Some(event) = events.next().await {
        let DashboardEvent::Roster(RosterEvent::Command(state)) = event else { continue };
        let known = last.iter_mut().find(|known| known.command == state.command);
        // (The next hub hears again of what had ended: that is no news.)
        let is_news = known
            .as_ref()
            .is_none_or(|known| known.status != state.status && !known.status.is_final());
        match known {
            Some(known) if known.status.is_final() => {}
            Some(known) => *known = Arc::clone(&state),
            None => last.push(Arc::clone(&state)),
        }
        if is_news && state.status != CommandStatus::Dispatched {
            let colour = match state.status {
                CommandStatus::Completed => Colour::Green,
                CommandStatus::Queued | CommandStatus::Dispatched | CommandStatus::Running => {
                    Colour::Dim
                }
                CommandStatus::Failed | CommandStatus::Unknown | CommandStatus::Expired => {
                    Colour::Red
                }
                CommandStatus::Interrupted | CommandStatus::TimedOut => Colour::Yellow,
            };
            let title: String = printable(&state.title).chars().take(38).collect();
            let words = show.paint(colour, &in_words(&state));
            show.say(
                state.agent.as_str(),
                &format!("{} {title:<38} {words}", short(state.command)),
            );
        }
    }
}

/// Shows how far the dashboards are, for ever.
async fn progress(show: &Show, watchers: [&Watcher; 2], command: CommandId, total: u64) {
    let mut told = 0;
    loop {
        let mut least = u64::MAX;
        let mut lines = Vec::new();
        for watcher in watchers {
            let bytes = watcher.seen().output(command).map_or(0, |output| output.bytes);
            least = least.min(bytes);
            let is_up = watcher.dashboard.connection().borrow().is_connected();
            let link = if is_up {
                show.paint(Colour::Green, "connected   ")
            } else {
                show.paint(Colour::Yellow, "reconnecting")
            };
            let filled = usize::try_from(bytes * 30 / total.max(1)).unwrap_or(30).min(30);
            let bar = format!("{}{}", "█".repeat(filled), "░".repeat(30 - filled));
            lines.push(format!(
                "{:10} {:<8}  {link}  {bar}  {}",
                "",
                watcher.name,
                bytes_in_words(bytes)
            ));
        }
        show.live(lines);
        let quarter = least * 4 / total.max(1);
        if show.is_plain() && quarter > told {
            told = quarter;
            show.say("", &format!("both dashboards have {} % of the large output", quarter * 25));
        }
        pause(Duration::from_millis(100)).await;
    }
}

/// Something to list. Removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn fill() -> std::io::Result<Self> {
        let folder = std::env::temp_dir().join(format!("trunkline-demo-{}", std::process::id()));
        fs::create_dir_all(folder.join("src"))?;
        let folder = Self(folder);
        fs::write(folder.0.join("README.md"), "Made by the demo of trunkline.\n")?;
        fs::write(folder.0.join("build.sh"), "#!/bin/sh\nexec cargo build\n")?;
        fs::set_permissions(folder.0.join("build.sh"), fs::Permissions::from_mode(0o755))?;
        fs::write(folder.0.join("release.tar.gz"), "")?;
        symlink("release.tar.gz", folder.0.join("latest"))?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // a temporary folder
    }
}
