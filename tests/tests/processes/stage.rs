//! A hub and an agent as processes, dashboards in this one, and a cable to the
//! hub for each.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::{Instant, sleep_until};
use trunkline_client::{Backoff, Dashboard};
use trunkline_tests::process::{Process, now, within};
use trunkline_tests::proxy::Proxy;

use crate::plan::{Act, DASHBOARDS, Link, Plan, Who};

/// What the agent is called.
pub(crate) const AGENT: &str = "a";

/// Commands that it runs at a time.
const SLOTS: &str = "3";

/// What really happened, as told in the order of its times.
#[derive(Debug)]
pub(crate) struct Trace {
    began: Instant,
    lines: Mutex<Vec<String>>,
}

impl Trace {
    pub(crate) fn begin() -> Self {
        Self { began: now(), lines: Mutex::default() }
    }

    pub(crate) fn note(&self, what: impl AsRef<str>) {
        let line = format!("{:>8.3} s  {}", self.began.elapsed().as_secs_f64(), what.as_ref());
        self.lines.lock().unwrap().push(line);
    }

    pub(crate) fn text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }
}

/// Which process was killed when.
#[derive(Debug, Default)]
pub(crate) struct Kills(Vec<(Who, Instant)>);

impl Kills {
    /// Whether it was killed at all.
    pub(crate) fn any(&self, who: Who) -> bool {
        self.0.iter().any(|(killed, _)| *killed == who)
    }

    /// Whether it was killed at or after a moment.
    pub(crate) fn since(&self, moment: Instant, who: Who) -> bool {
        self.0.iter().any(|(killed, at)| *killed == who && *at >= moment)
    }
}

/// Everything that a round is played with. Dropping it kills the processes and
/// closes the cables.
#[derive(Debug)]
pub(crate) struct Stage {
    folder: PathBuf,
    hub: Option<Process>,
    agent: Option<Process>,
    /// The agent's cable, then those of the dashboards, and a fresh one's.
    cables: Vec<Proxy>,
    pub(crate) dashboards: Vec<Dashboard>,
    pub(crate) kills: Kills,
    /// How often what was done.
    done: BTreeMap<&'static str, u64>,
}

/// Waits until a moment, for what happens at its own time.
pub(crate) async fn pause(time: Duration) {
    sleep_until(now() + time).await;
}

impl Stage {
    /// Everything is there and connected.
    pub(crate) async fn set(folder: &Path) -> Self {
        let mut stage = Self {
            folder: folder.to_owned(),
            hub: None,
            agent: None,
            cables: Vec::new(),
            dashboards: Vec::new(),
            kills: Kills::default(),
            done: BTreeMap::new(),
        };
        for _ in 0..DASHBOARDS + 2 {
            stage.cables.push(Proxy::start(None).await.unwrap());
        }
        stage.start_hub().await;
        stage.start_agent();
        for number in 0..DASHBOARDS {
            stage.dashboards.push(stage.dashboard(Link::Dashboard(number)));
        }
        for dashboard in &stage.dashboards {
            within(dashboard.connected()).await.unwrap();
        }
        stage
    }

    /// A dashboard at the end of a cable. It dials more often than it would by
    /// itself, so that a round has many links.
    fn dashboard(&self, link: Link) -> Dashboard {
        let backoff = Backoff {
            first: Duration::from_millis(50),
            base: Duration::from_millis(100),
            max: Duration::from_secs(1),
            ..Backoff::default()
        };
        Dashboard::builder(&self.cable(link).url()).unwrap().backoff(backoff).connect()
    }

    /// A dashboard that has seen nothing yet.
    pub(crate) fn fresh_dashboard(&self) -> Dashboard {
        self.dashboard(Link::Dashboard(DASHBOARDS))
    }

    pub(crate) fn cable(&self, link: Link) -> &Proxy {
        match link {
            Link::Agent => &self.cables[0],
            Link::Dashboard(number) => &self.cables[number + 1],
        }
    }

    // ---- acts -----------------------------------------------------------

    /// Does what the plan says, if it can be done.
    pub(crate) async fn act(&mut self, act: &Act) {
        let name = match *act {
            Act::Ask(_) => return,
            Act::Cut(link) => self.broke(link, "cut", Proxy::cut),
            Act::Reset(link) => self.broke(link, "reset", Proxy::reset),
            Act::HalfOpen(link) => self.broke(link, "half-open", Proxy::half_open),
            Act::CutAfter(link, way, bytes, cut) => {
                self.cable(link).cut_after(way, bytes, cut);
                None // counted when it happens
            }
            Act::Stall(link, way) => {
                self.cable(link).stall(way);
                Some("stall")
            }
            Act::Resume(link, way) => {
                self.cable(link).resume(way);
                None
            }
            Act::Throttle(link, way, rate) => {
                self.cable(link).throttle(way, rate);
                rate.map(|_| "throttle")
            }
            Act::Delay(link, way, delay) => {
                self.cable(link).delay(way, delay);
                (delay > Duration::ZERO).then_some("delay")
            }
            Act::Chunk(link, way, bytes) => {
                self.cable(link).chunk(way, bytes);
                bytes.map(|_| "chunks")
            }
            Act::Refuse(link, refuses) => {
                self.cable(link).refuse(refuses);
                refuses.then_some("refusal")
            }
            Act::Kill(who) => self.kill(who).await,
            Act::Start(who) => {
                self.start(who).await;
                None
            }
            Act::Stop(who) => self.signal(who, "hub stopped", "agent stopped", Process::stop),
            Act::GoOn(who) => {
                self.signal(who, "", "", Process::go_on);
                None
            }
        };
        if let Some(name) = name {
            *self.done.entry(name).or_insert(0) += 1;
        }
    }

    fn broke(
        &self,
        link: Link,
        name: &'static str,
        how: impl Fn(&Proxy) -> usize,
    ) -> Option<&'static str> {
        (how(self.cable(link)) > 0).then_some(name)
    }

    fn process(&mut self, who: Who) -> &mut Option<Process> {
        match who {
            Who::Hub => &mut self.hub,
            Who::Agent => &mut self.agent,
        }
    }

    async fn kill(&mut self, who: Who) -> Option<&'static str> {
        if who == Who::Hub {
            self.lead_to(None); // its port is free for others from now on
        }
        let mut process = self.process(who).take()?;
        let status = process.kill().await;
        assert_eq!(status.signal(), Some(9), "{who:?} ended by itself: {status}");
        self.kills.0.push((who, now()));
        Some(if who == Who::Hub { "hub killed" } else { "agent killed" })
    }

    async fn start(&mut self, who: Who) {
        if self.process(who).is_none() {
            match who {
                Who::Hub => self.start_hub().await,
                Who::Agent => self.start_agent(),
            }
        }
    }

    fn signal(
        &mut self,
        who: Who,
        hub: &'static str,
        agent: &'static str,
        signal: impl Fn(&Process),
    ) -> Option<&'static str> {
        signal(self.process(who).as_ref()?);
        Some(if who == Who::Hub { hub } else { agent })
    }

    async fn start_hub(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hub"));
        command.args(["--listen", "127.0.0.1:0"]);
        if IS_KEPT {
            command.arg("--queue").arg(self.folder.join("queue.db"));
            command.arg("--output").arg(self.folder.join("output.db"));
        }
        let hub = Process::start(command.stderr(self.log("hub.log")));
        let address = hub.says("hub: listening on ws://").await;
        self.hub = Some(hub);
        self.lead_to(Some(address.parse().unwrap()));
    }

    fn start_agent(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_agent"));
        command.args(["--hub", &self.cable(Link::Agent).url(), "--name", AGENT, "--slots", SLOTS]);
        command.arg("--journal").arg(self.folder.join("agent.journal"));
        self.agent = Some(Process::start(command.stderr(self.log("agent.log"))));
    }

    /// What they say to standard error is kept for whoever looks for a cause.
    fn log(&self, name: &str) -> Stdio {
        let file = File::options().create(true).append(true).open(self.folder.join(name));
        file.unwrap().into()
    }

    fn lead_to(&self, target: Option<SocketAddr>) {
        for cable in &self.cables {
            cable.lead_to(target);
        }
    }

    // ---- afterwards -----------------------------------------------------

    /// Every cable is whole, every process runs.
    pub(crate) async fn heal(&mut self, plan: &Plan) {
        for cable in &self.cables {
            cable.heal();
        }
        for who in [Who::Hub, Who::Agent] {
            self.act(&Act::GoOn(who)).await;
            self.start(who).await;
        }
        if plan.hangs_up {
            for number in 0..DASHBOARDS {
                self.cable(Link::Dashboard(number)).cut_swallowed();
            }
        }
        for dashboard in &self.dashboards {
            dashboard.retry_now();
        }
    }

    /// How often what was done.
    pub(crate) fn done(&self) -> BTreeMap<&'static str, u64> {
        let cuts: u64 = self.cables.iter().map(|cable| cable.counts().cut_by_bytes).sum();
        let mut done = self.done.clone();
        done.insert("cut inside what was sent", cuts);
        done
    }

    /// Bytes that went over the cables, and connections that there were.
    pub(crate) fn carried(&self) -> (u64, u64) {
        let counts = self.cables.iter().map(Proxy::counts);
        counts.fold((0, 0), |(bytes, connections), cable| {
            (bytes + cable.up + cable.down, connections + cable.connections)
        })
    }

    /// Whoever runs at the end has run since it was started last.
    pub(crate) async fn strike(mut self) {
        for dashboard in &self.dashboards {
            dashboard.close().await;
        }
        for who in [Who::Agent, Who::Hub] {
            self.kill(who).await;
        }
    }
}

/// Whether the hub's commands and their output survive its process.
pub(crate) const IS_KEPT: bool = cfg!(feature = "sqlite");
