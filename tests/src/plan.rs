//! What happens in a life: acts of people, processes and cables, one after the
//! other, as data that can be drawn from a seed, written down and shortened.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use trunkline_protocol::message::{Lag, Priority};

use crate::agent::CrashPoint;
use crate::world::{Memory, Peer, Storage};

/// The names that agents may have. A request may name one that never comes.
pub const NAMES: [&str; 4] = ["a", "b", "c", "nobody"];

/// One thing that happens. Numbers count what there is; an act on what is not
/// there does nothing, so that a plan without some of its acts is a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields are called what they are")]
pub enum Act {
    /// Time passes, in milliseconds.
    Wait(u64),
    /// A new process under one of the names: perhaps a second one.
    Agent {
        name: usize,
        slots: u32,
        #[serde(default)]
        journal: bool,
        /// Its greeting has no room for what it holds.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        wordy: bool,
    },
    /// Another dashboard.
    Dashboard,
    /// A dashboard says goodbye.
    Leave(usize),
    /// A dashboard asks for a command.
    Request(Box<Ask>),
    /// A dashboard asks for a command of its own once more, in the same words.
    Repeat { dashboard: usize, command: usize },
    /// A dashboard reads a command's terminal.
    Watch { dashboard: usize, command: usize, live: bool, lag: Lag, window: u64 },
    /// A dashboard reads an agent's terminals.
    WatchAgent { dashboard: usize, name: usize },
    /// A dashboard interrupts a command.
    Interrupt { dashboard: usize, command: usize, grace_ms: Option<u64> },
    /// A dashboard stops everything.
    StopAll(usize),
    /// The person who began a command types so many lines into it.
    Type { command: usize, lines: u32 },
    /// Both ends of a cable notice its end.
    Cut(Peer),
    /// Only the peer notices it.
    CutUnnoticed(Peer),
    /// Nobody notices that nothing arrives any more.
    HalfOpen(Peer),
    /// Once so many frames more have arrived, at either end, the peer lets go of
    /// its cable for another, as a client that goes over from one transport to
    /// another. The hub does not notice, and still hears what was under way.
    GoOver(Peer, u64),
    /// Nothing arrives until it goes on.
    Stall(Peer),
    /// A stall ends.
    GoOn(Peer),
    /// A cable carries no more than this, in bytes per second.
    Throttle(Peer, u64),
    /// No new cable can be had.
    Unreachable(Peer),
    /// New cables can be had again.
    Reachable(Peer),
    /// The hub's process dies.
    KillHub,
    /// The hub's process dies when it has put so much out: effects and frames.
    /// What it had given its disks is on them then, or not.
    KillHubAfter(u64, bool),
    /// A new one starts.
    StartHub(Memory),
    /// An agent's process dies.
    Crash(usize),
    /// An agent's process dies the next time that it comes to a point where it
    /// uses its journal.
    CrashAt(usize, CrashPoint),
    /// An agent's process dies when it has put so much out: orders to its
    /// machine and frames.
    CrashAfter(usize, u64),
    /// An agent's journal cannot be written, or can again.
    JournalFails(usize, bool),
    /// An agent's journal takes so long, in milliseconds.
    JournalTakes(usize, u64),
    /// A new one starts in its place.
    Restart(usize),
    /// An agent stops in order.
    Stop(usize),
    /// A dashboard does not look at its terminals.
    Sleep(usize),
    /// It does again.
    WakeUp(usize),
    /// Hooks take this long, in milliseconds.
    Hooks(u64),
    /// The queue behaves so.
    Storage(Storage),
    /// The hub has a stream log: at the very beginning, or never.
    KeepOutput,
    /// The stream log behaves so.
    LogStorage(Storage),
    /// The authenticator cannot answer, or can again.
    AuthFails(bool),
    /// The wall clock jumps, in milliseconds.
    Clock(i64),
}

/// What a dashboard asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub dashboard: usize,
    /// The agent's name.
    pub name: usize,
    /// What its program does.
    pub script: String,
    /// How urgent it is.
    pub priority: Priority,
    /// By when it must have started.
    pub deliver_within_ms: Option<u64>,
    /// How long it may run.
    pub run_for_ms: Option<u64>,
    /// Whether it may be started again.
    pub retry: bool,
    /// Whether the one who asks reads its terminal.
    pub watched: bool,
}

/// A life to be lived.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// For everything that is random in the world itself.
    pub seed: u64,
    /// What happens.
    pub acts: Vec<Act>,
}

impl Plan {
    /// A plan drawn from a seed. Each leaves some kinds of trouble out
    /// altogether, so that the others come thick.
    pub fn draw(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x7072_6c61_6e00);
        let mut draw = Draw { troubles: Vec::new(), names: Vec::new(), rng: &mut rng };
        draw.troubles = Trouble::ALL.into_iter().filter(|_| draw.rng.random_bool(0.4)).collect();
        let mut acts = Vec::new();
        if draw.rng.random() {
            acts.push(Act::KeepOutput);
        }
        for _ in 0..draw.rng.random_range(1..=2) {
            acts.push(draw.agent());
        }
        for _ in 0..draw.rng.random_range(1..=3) {
            acts.push(Act::Dashboard);
        }
        if draw.rng.random_bool(0.8) {
            acts.push(Act::Wait(1500));
        }
        for _ in 0..draw.rng.random_range(4..=40) {
            draw.push(&mut acts);
        }
        Self { seed, acts }
    }

    /// As text: one act a line.
    pub fn to_text(&self) -> String {
        let mut text = format!("seed {}\n", self.seed);
        for act in &self.acts {
            text += &serde_json::to_string(act).expect("an act is data");
            text.push('\n');
        }
        text
    }

    /// From text. Lines that begin with `#` say something to people.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim);
        let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let seed = lines.next().and_then(|line| line.strip_prefix("seed "));
        let seed = seed.and_then(|seed| seed.parse().ok()).ok_or("the first line is `seed N`")?;
        let act = |line| serde_json::from_str(line).map_err(|error| format!("{line}: {error}"));
        Ok(Self { seed, acts: lines.map(act).collect::<Result<_, _>>()? })
    }

    /// A shorter plan for which `fails` still holds: whole stretches of acts
    /// are left out, then single ones, until none can be spared.
    #[must_use]
    pub fn shorten(&self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        let mut best = self.clone();
        let mut stretch = best.acts.len().div_ceil(2).max(1);
        loop {
            let mut at = 0;
            let mut spared = false;
            while at < best.acts.len() {
                let mut shorter = best.clone();
                let end = (at + stretch).min(shorter.acts.len());
                shorter.acts.drain(at..end);
                if fails(&shorter) {
                    best = shorter;
                    spared = true;
                } else {
                    at += stretch;
                }
            }
            if stretch > 1 {
                stretch = stretch.div_ceil(2);
            } else if !spared {
                return best;
            }
        }
    }
}

/// A kind of trouble that a life may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Cuts,
    Silence,
    Slowness,
    Distance,
    Kills,
    Losses,
    Crashes,
    Doubles,
    Storage,
    Hooks,
    Clock,
    Sleepers,
    Volume,
    Interrupts,
    Journals,
    LogStorage,
}

impl Trouble {
    const ALL: [Self; 16] = [
        Self::Cuts,
        Self::Silence,
        Self::Slowness,
        Self::Distance,
        Self::Kills,
        Self::Losses,
        Self::Crashes,
        Self::Doubles,
        Self::Storage,
        Self::Hooks,
        Self::Clock,
        Self::Sleepers,
        Self::Volume,
        Self::Interrupts,
        Self::Journals,
        Self::LogStorage,
    ];
}

struct Draw<'a> {
    rng: &'a mut StdRng,
    troubles: Vec<Trouble>,
    /// The names of the agents so far.
    names: Vec<usize>,
}

impl Draw<'_> {
    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.rng.random_range(0..of.len())]
    }

    fn peer(&mut self) -> Peer {
        if self.rng.random() {
            Peer::Agent(self.rng.random_range(0..3))
        } else {
            Peer::Dashboard(self.rng.random_range(0..3))
        }
    }

    fn agent(&mut self) -> Act {
        let name = self.rng.random_range(0..2);
        self.agent_called(name)
    }

    fn agent_called(&mut self, name: usize) -> Act {
        let journal = self.has(Trouble::Journals) && self.rng.random();
        self.names.push(name);
        let wordy = self.rng.random_ratio(1, 6);
        Act::Agent { name, slots: self.one(&[1, 1, 1, 2, 3]), journal, wordy }
    }

    fn wait(&mut self) -> Act {
        Act::Wait(self.one(&[1, 3, 6, 10, 20, 60, 200, 600, 2_000, 6_000, 12_000]))
    }

    fn storage(&mut self) -> Storage {
        self.one(&[Storage::Works, Storage::Fails, Storage::Lies, Storage::Whims])
    }

    fn has(&self, trouble: Trouble) -> bool {
        self.troubles.contains(&trouble)
    }

    fn script(&mut self) -> String {
        let mut script = Vec::new();
        for _ in 0..self.rng.random_range(0..4) {
            let bytes = match self.rng.random_range(0..10) {
                0..7 => self.rng.random_range(1..2_000),
                7..9 => self.rng.random_range(2_000..30_000),
                _ if self.has(Trouble::Volume) => self.rng.random_range(30_000..250_000),
                _ => 1,
            };
            script.push(format!("write:{bytes}"));
            if self.rng.random() {
                script.push(format!("sleep:{}", self.one(&[1, 10, 100, 700, 3_000, 9_000])));
            }
        }
        match self.rng.random_range(0..8) {
            0 => script.push("forever".into()),
            1 => {
                script.insert(0, "stubborn".into());
                script.push("sleep:2000".into());
            }
            _ => script.push(format!("exit:{}", self.one(&[0, 0, 1, 77]))),
        }
        script.join(" ")
    }

    fn ask(&mut self) -> Act {
        Act::Request(Box::new(Ask {
            dashboard: self.rng.random_range(0..3),
            name: self.one(&[0, 0, 0, 1, 1, 2, 3]),
            script: self.script(),
            priority: self.one(&[Priority::Normal, Priority::High, Priority::Low]),
            deliver_within_ms: self.one(&[None, None, None, Some(500), Some(5_000)]),
            run_for_ms: self.one(&[None, None, None, Some(300), Some(4_000)]),
            retry: self.rng.random_bool(0.25),
            watched: self.rng.random_bool(0.7),
        }))
    }

    fn push(&mut self, acts: &mut Vec<Act>) {
        let (dashboard, command) = (self.rng.random_range(0..3), self.rng.random_range(0..12));
        let act = match self.rng.random_range(0..30) {
            0..7 => self.ask(),
            7..14 => self.wait(),
            14 => Act::Watch {
                dashboard,
                command,
                live: self.rng.random_bool(0.3),
                lag: self.one(&[Lag::EveryByte, Lag::EveryByte, Lag::Newest]),
                window: self.one(&[1 << 20, 1 << 20, 4_096, 300]),
            },
            15 => Act::WatchAgent { dashboard, name: self.rng.random_range(0..3) },
            16 if self.rng.random_bool(0.3) => Act::Leave(dashboard),
            16 => Act::Dashboard,
            17 => Act::Type { command, lines: self.one(&[1, 3, 400]) },
            18 => Act::Repeat { dashboard, command },
            19 if self.has(Trouble::Hooks)
                && (self.has(Trouble::Cuts) || self.has(Trouble::Doubles)) =>
            {
                self.slow_greetings(acts);
                return;
            }
            20 if self.has(Trouble::Cuts) => {
                self.keys_over_a_cut(acts);
                return;
            }
            21 if self.has(Trouble::Kills) => {
                self.told_anew(acts);
                return;
            }
            _ => match self.trouble() {
                Some(act) => act,
                None => self.wait(),
            },
        };
        acts.push(act);
    }

    /// Several greetings of one peer are looked at, at the same time: rare
    /// enough by chance.
    fn slow_greetings(&mut self, acts: &mut Vec<Act>) {
        let mut peer = self.peer();
        if self.has(Trouble::Doubles) {
            // Another process comes in the place of one that comes back.
            let first = self.rng.random_range(0..self.names.len());
            acts.push(self.agent_called(self.names[first]));
            acts.push(Act::Wait(10));
            peer = Peer::Agent(first);
        }
        acts.push(Act::Hooks(4_000));
        for _ in 0..self.rng.random_range(2..5) {
            acts.push(Act::CutUnnoticed(peer));
            acts.push(Act::Wait(self.one(&[200, 600, 1_000, 1_500])));
        }
    }

    /// Somebody types on while the agent comes back: some of the keys are lost
    /// with the old link, the next may be there before those are sent again.
    fn keys_over_a_cut(&mut self, acts: &mut Vec<Act>) {
        let name = self.one(&[0, 0, 1]);
        let script = "write:100 sleep:9000 exit:0".to_owned();
        if let Act::Request(mut ask) = self.ask() {
            (ask.name, ask.script, ask.run_for_ms) = (name, script, None);
            acts.push(Act::Request(ask));
        }
        let asked = acts.iter().filter(|act| matches!(act, Act::Request(_))).count();
        let Some(command) = asked.checked_sub(1) else { return };
        acts.push(Act::Wait(self.one(&[200, 600])));
        let agent = self.rng.random_range(0..self.names.len());
        acts.push(Act::CutUnnoticed(Peer::Agent(agent)));
        let pause = self.one(&[3, 7, 11, 40]);
        for _ in 0..self.rng.random_range(10..40) {
            acts.push(Act::Type { command, lines: 1 });
            acts.push(Act::Wait(pause));
        }
    }

    /// A hub dies and the next one learns of much output, and of its end, from
    /// the agent, while its hooks are slow or fail.
    fn told_anew(&mut self, acts: &mut Vec<Act>) {
        if let Act::Request(mut ask) = self.ask() {
            let bytes = self.rng.random_range(30_000..250_000);
            ask.script = format!("write:{bytes} exit:1");
            (ask.name, ask.run_for_ms) = (self.one(&[0, 0, 1]), None);
            acts.push(Act::Request(ask));
        }
        acts.push(Act::Wait(self.one(&[200, 600, 1_500, 4_000])));
        acts.push(if self.rng.random() {
            Act::Hooks(self.one(&[400, 4_000]))
        } else {
            Act::Storage(self.storage())
        });
        for _ in 0..self.rng.random_range(1..3) {
            acts.push(Act::KillHub);
            acts.push(Act::Wait(self.one(&[10, 1_000, 6_000])));
            acts.push(Act::StartHub(self.one(&[Memory::Kept, Memory::Lost])));
            acts.push(Act::Wait(self.one(&[1_000, 3_000, 6_000])));
        }
    }

    fn trouble(&mut self) -> Option<Act> {
        if self.troubles.is_empty() {
            return None;
        }
        let trouble = self.troubles[self.rng.random_range(0..self.troubles.len())];
        let peer = self.peer();
        let agent = self.rng.random_range(0..3);
        let dashboard = self.rng.random_range(0..3);
        Some(match trouble {
            Trouble::Cuts => match self.rng.random_range(0..4) {
                0 => Act::Cut(peer),
                1 => Act::CutUnnoticed(peer),
                2 => Act::HalfOpen(peer),
                _ => Act::GoOver(peer, self.rng.random_range(0..50)),
            },
            Trouble::Silence => {
                if self.rng.random() {
                    Act::Stall(peer)
                } else {
                    Act::GoOn(peer)
                }
            }
            Trouble::Slowness => Act::Throttle(peer, self.one(&[500, 5_000, 50_000])),
            Trouble::Distance => {
                if self.rng.random() {
                    Act::Unreachable(peer)
                } else {
                    Act::Reachable(peer)
                }
            }
            Trouble::Kills => {
                if self.rng.random() {
                    Act::KillHub
                } else {
                    Act::StartHub(Memory::Kept)
                }
            }
            Trouble::Losses => {
                if self.rng.random() {
                    Act::KillHub
                } else {
                    Act::StartHub(Memory::Lost)
                }
            }
            Trouble::Crashes => match self.rng.random_range(0..5) {
                0..2 => Act::Crash(agent),
                2..4 => Act::Restart(agent),
                _ => Act::Stop(agent),
            },
            Trouble::Doubles => self.agent(),
            Trouble::Storage => Act::Storage(self.storage()),
            Trouble::LogStorage => Act::LogStorage(self.storage()),
            Trouble::Hooks => {
                if self.rng.random_bool(0.8) {
                    Act::Hooks(self.one(&[0, 1, 900, 4_000]))
                } else {
                    Act::AuthFails(self.rng.random())
                }
            }
            Trouble::Clock => Act::Clock(self.one(&[-3_600_000, 3_600_000, -50, 1_000])),
            Trouble::Sleepers => {
                if self.rng.random() {
                    Act::Sleep(dashboard)
                } else {
                    Act::WakeUp(dashboard)
                }
            }
            Trouble::Volume => self.ask(),
            Trouble::Journals => match self.rng.random_range(0..4) {
                0 => Act::CrashAt(
                    agent,
                    self.one(&[
                        CrashPoint::BeforeBegun,
                        CrashPoint::AfterBegun,
                        CrashPoint::BeforeEnded,
                        CrashPoint::AfterEnded,
                    ]),
                ),
                1 => Act::JournalFails(agent, self.rng.random()),
                2 => Act::JournalTakes(agent, self.one(&[0, 2, 300, 12_000])),
                _ => Act::Restart(agent),
            },
            Trouble::Interrupts => {
                let command = self.rng.random_range(0..12);
                if self.rng.random_bool(0.9) {
                    let grace_ms = self.one(&[None, Some(100), Some(3_000)]);
                    Act::Interrupt { dashboard, command, grace_ms }
                } else {
                    Act::StopAll(dashboard)
                }
            }
        })
    }
}
