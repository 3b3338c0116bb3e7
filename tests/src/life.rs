//! A life: a plan is carried out in the World, everything heals, and what
//! people then see is compared with what really happened.
//!
//! The reference is much simpler than the system, because it sees everything:
//! what each program wrote and how it ended is known to the simulated
//! machines, what was asked for to whoever asked. Bytes are checked as they
//! are shown ([`crate::dashboard`]), starts as they happen
//! ([`crate::agent`]), the order of queues as they are leased
//! ([`crate::world`]); the rest is checked here, at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trunkline_client::ConnectionState;
use trunkline_client::core::agent::{AgentCore, AgentSetup};
use trunkline_client::core::dashboard::{Audit, DashboardCore, ReaderId, Reading, RequestError};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::ids::{CommandId, RequestId, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    CommandInterrupt, CommandRequest, CommandSpec, CommandState, CommandStatus, DashboardToHub,
    ErrorCode, From, GapReason, Lag, Presence, Run, Target,
};

use crate::agent::{Fate, SimJournal};
use crate::dashboard::Seen;
use crate::disk::Queue;
use crate::plan::{Act, Ask, NAMES, Plan};
use crate::world::{Peer, Storage, World};

/// Memory of one stream's tail with an agent.
const TAIL_BYTES: usize = 64 * 1024;

/// How long a started command may have been on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(15);

/// Time enough for everything to come to rest.
const REST: Duration = Duration::from_secs(400);

const S: Duration = Duration::from_secs(1);

/// What sometimes must have happened in a large number of lives, or they prove
/// little.
pub type Marks = BTreeSet<&'static str>;

/// All marks there are.
pub const MARKS: [&str; 30] = [
    "a command completed",
    "a command failed",
    "a command was interrupted",
    "a command timed out",
    "a command expired",
    "a command became unknown",
    "a command was tried again",
    "a command was lost with its queue",
    "a command survived the hub that accepted it",
    "a request was ambiguous",
    "a full queue refused",
    "a failing queue refused",
    "a gap: evicted",
    "output gave way to that of later commands",
    "a gap: agent_overflow",
    "a gap: agent_loss",
    "a gap: hub_loss",
    "a gap: lagged",
    "a gap: not_requested",
    "a stream was verified",
    "a stream was read on over a killed hub",
    "a stream was read on from the stream log",
    "an agent was superseded",
    "an agent listed in parts what it held",
    "an agent died while it ran something",
    "input arrived",
    "a stalled reader caught up",
    "a result came after its agent was cut off",
    "two ran at a time",
    "a client went over to another link",
];

/// What a life came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lived {
    /// What happened in it.
    pub marks: Marks,
    /// A digest of all frames and their times.
    pub fingerprint: u64,
    /// Processes that died, the hub's included, before everything healed.
    pub deaths: u32,
    /// How often somebody went over to another link.
    pub went_over: u32,
}

/// A command as whoever asked for it knows it.
#[derive(Debug)]
struct Asked {
    dashboard: usize,
    command: CommandId,
    answer: RequestId,
    request: CommandRequest,
    interrupted: bool,
    /// Interrupts: by which dashboard, and how often the hub had been killed.
    interrupts: Vec<(usize, RequestId, u32)>,
    repeated: bool,
    /// Lines typed into it.
    typed: u32,
}

/// Somebody who reads a target.
#[derive(Debug)]
struct Watch {
    dashboard: usize,
    reader: ReaderId,
    command: Option<CommandId>,
    reading: Reading,
}

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fact {
    /// An agent was told to stop.
    Stopped,
    /// Everything was stopped.
    StoppedAll,
    ClockJumped,
    AgentsCut,
    HalfOpen,
    /// A journal could not be written, or not in time.
    JournalFailed,
    /// The stream log failed, or seemed to.
    OutputNotKept,
}

#[derive(Debug)]
struct Life {
    world: World,
    names: Vec<usize>,
    asked: Vec<Asked>,
    watches: Vec<Watch>,
    left: BTreeSet<usize>,
    /// What cannot be told from the world at the end.
    facts: BTreeSet<Fact>,
    slept: BTreeSet<usize>,
    marks: Marks,
}

/// Streams whose output is kept.
const STREAMS_MAX: usize = 4;

/// Small bounds, so that little data reaches them.
fn limits() -> Limits {
    Limits {
        log_bytes_per_stream: 48 * 1024,
        log_bytes_per_tenant: 160 * 1024,
        streams_per_tenant: STREAMS_MAX,
        grant_bytes: 16 * 1024,
        terminal_bytes_per_second: 64 * 1024,
        queue_per_agent: 4,
        input_bytes_ahead: 1024,
        newest_bytes_behind: 4 * 1024,
        ..Limits::default()
    }
}

/// Lives a plan. Panics where a promise is broken.
pub fn live(plan: &Plan, traced: bool) -> Lived {
    live_in(World::with_limits(plan.seed, limits()), plan, traced)
}

/// The same with this queue.
pub fn live_with(queue: Queue, plan: &Plan) -> Lived {
    let mut world = World::with_limits(plan.seed, limits());
    world.keep_commands(queue);
    live_in(world, plan, false)
}

fn live_in(mut world: World, plan: &Plan, traced: bool) -> Lived {
    world.traced = traced;
    let mut life = Life {
        world,
        names: Vec::new(),
        asked: Vec::new(),
        watches: Vec::new(),
        left: BTreeSet::new(),
        facts: BTreeSet::new(),
        slept: BTreeSet::new(),
        marks: Marks::new(),
    };
    for act in &plan.acts {
        if traced {
            println!("{:>10.3} s  * {act:?}", life.world.now().monotonic.as_secs_f64());
        }
        life.act(act);
        life.check_bounds();
    }
    if traced {
        println!("{:>10.3} s  * it heals", life.world.now().monotonic.as_secs_f64());
    }
    let deaths = life.world.kills + life.world.agents.iter().map(|node| node.deaths).sum::<u32>();
    life.rest();
    life.judge();
    let went_over = life.world.went_over;
    if went_over > 0 {
        life.marks.insert("a client went over to another link");
    }
    Lived { marks: life.marks, fingerprint: life.world.fingerprint, deaths, went_over }
}

impl Life {
    // ---- acts -----------------------------------------------------------

    fn act(&mut self, act: &Act) {
        match act {
            Act::Wait(ms) => self.world.run_for(Duration::from_millis(*ms)),
            Act::Agent { name, slots, journal, wordy } => {
                let change = |setup: &mut AgentSetup| {
                    setup.slots = *slots;
                    setup.tail_bytes = TAIL_BYTES;
                    setup.tail_hold = 3 * S;
                    if *wordy {
                        setup.about.capabilities = vec!["\u{1f6f0}".repeat(60); 64];
                    }
                };
                if *journal {
                    self.world.agent_with_journal(NAMES[*name], change);
                } else {
                    self.world.agent_with(NAMES[*name], change);
                }
                self.names.push(*name);
            }
            Act::Dashboard => {
                self.world.dashboard();
            }
            Act::Leave(dashboard) => {
                let now = self.world.now();
                if self.is_here(*dashboard) {
                    self.world.core_of(*dashboard).stop(None, now);
                    self.left.insert(*dashboard);
                }
            }
            Act::Request(ask) => self.ask(ask),
            Act::Repeat { dashboard, command } => self.repeat(*dashboard, *command),
            Act::Watch { dashboard, command, live, lag, window } => {
                let Some(asked) = self.asked.get(*command) else { return };
                let from = if *live { From::Live } else { From::Start };
                let reading = Reading { from, lag: *lag, window_bytes: *window };
                self.watch(*dashboard, asked.command, reading);
            }
            Act::WatchAgent { dashboard, name } => {
                if self.is_here(*dashboard) {
                    let target = Target::Agent(NAMES[*name].parse().expect("a name"));
                    let reading = Reading::default();
                    let reader = self.world.read(*dashboard, target, reading);
                    let watch = Watch { dashboard: *dashboard, reader, command: None, reading };
                    self.watches.push(watch);
                }
            }
            Act::Interrupt { dashboard, command, grace_ms } => {
                let Some(asked) = self.asked.get_mut(*command) else { return };
                if self.left.contains(dashboard) || *dashboard >= self.world.dashboards.len() {
                    return;
                }
                asked.interrupted = true;
                let (command, grace_ms) = (asked.command, *grace_ms);
                let interrupt = CommandInterrupt { command, attempt: None, grace_ms };
                let now = self.world.now();
                let kills = self.world.kills;
                let core = self.world.core_of(*dashboard);
                if let Ok(id) = core.request(DashboardToHub::Interrupt(interrupt), None, now) {
                    asked.interrupts.push((*dashboard, id, kills));
                }
            }
            Act::StopAll(dashboard) => {
                if self.is_here(*dashboard) {
                    self.world.stop_all(*dashboard);
                    self.facts.insert(Fact::StoppedAll);
                }
            }
            Act::Type { command, lines } => self.type_into(*command, *lines),
            Act::Cut(peer) => {
                self.note_cut(*peer);
                self.world.cut(*peer);
            }
            Act::CutUnnoticed(peer) => {
                self.note_cut(*peer);
                self.world.cut_unnoticed_by_hub(*peer);
            }
            Act::HalfOpen(peer) => {
                self.facts.insert(Fact::HalfOpen);
                self.note_cut(*peer);
                self.world.half_open(*peer);
            }
            Act::GoOver(peer, frames) => {
                self.note_cut(*peer);
                self.world.goes_over.insert(*peer, *frames);
            }
            Act::Stall(peer) => self.world.stall(*peer),
            Act::GoOn(peer) => self.world.go_on(*peer),
            Act::Throttle(peer, rate) => self.world.on_cable(*peer, |cable| cable.throttle(*rate)),
            Act::Unreachable(peer) => self.world.set_reachable(*peer, false),
            Act::Reachable(peer) => self.world.set_reachable(*peer, true),
            Act::KillHub => {
                if self.world.hub().is_some() {
                    self.world.kill_hub();
                }
            }
            Act::KillHubAfter(outputs, is_on_disk) => {
                self.world.hub_dies_after = Some((*outputs, *is_on_disk));
            }
            Act::CrashAfter(agent, outputs) => {
                if let Some(node) = self.world.agents.get_mut(*agent) {
                    node.dies_after = Some(*outputs);
                }
            }
            Act::StartHub(memory) => {
                if self.world.hub().is_none() {
                    self.world.start_hub(*memory);
                }
            }
            Act::Crash(agent) => {
                if self.world.agents.get(*agent).is_some_and(|node| node.core.is_some()) {
                    self.world.crash_agent(*agent);
                }
            }
            Act::CrashAt(agent, point) => {
                if let Some(journal) = self.journal(*agent) {
                    journal.crash_at = Some(*point);
                }
            }
            Act::JournalFails(agent, fails) => {
                if let Some(journal) = self.journal(*agent) {
                    journal.fails = *fails;
                    if *fails {
                        self.facts.insert(Fact::JournalFailed);
                    }
                }
            }
            Act::JournalTakes(agent, ms) => {
                if let Some(journal) = self.journal(*agent) {
                    journal.delay = Duration::from_millis(*ms);
                    if *ms > 9_000 {
                        self.facts.insert(Fact::JournalFailed);
                    }
                }
            }
            Act::Restart(agent) => {
                if self.world.agents.get(*agent).is_some_and(|node| node.core.is_none()) {
                    self.world.restart_agent(*agent);
                }
            }
            Act::Stop(agent) => {
                let now = self.world.now();
                if let Some(core) = self.world.agents.get_mut(*agent).and_then(|n| n.core.as_mut())
                {
                    core.stop(now);
                    self.facts.insert(Fact::Stopped);
                }
            }
            Act::Sleep(dashboard) => {
                if let Some(node) = self.world.dashboards.get_mut(*dashboard) {
                    node.asleep = true;
                    self.slept.insert(*dashboard);
                }
            }
            Act::WakeUp(dashboard) => {
                if let Some(node) = self.world.dashboards.get_mut(*dashboard) {
                    node.asleep = false;
                }
            }
            Act::Hooks(ms) => self.world.hook_delay = Duration::from_millis(*ms),
            Act::Storage(storage) => self.world.storage = *storage,
            Act::KeepOutput => {
                if self.world.dashboards.is_empty() && self.world.agents.is_empty() {
                    self.world.keep_output();
                }
            }
            Act::LogStorage(storage) => {
                self.world.log_storage = *storage;
                if *storage != Storage::Works {
                    self.facts.insert(Fact::OutputNotKept);
                }
            }
            Act::AuthFails(fails) => self.world.auth_fails = *fails,
            Act::Clock(ms) => {
                self.world.jump_clock(*ms);
                self.facts.insert(Fact::ClockJumped);
            }
        }
    }

    fn journal(&mut self, agent: usize) -> Option<&mut SimJournal> {
        self.world.agents.get_mut(agent)?.journal.as_mut()
    }

    fn note_cut(&mut self, peer: Peer) {
        if let Peer::Agent(_) = peer {
            self.facts.insert(Fact::AgentsCut);
        }
    }

    fn had(&self, fact: Fact) -> bool {
        self.facts.contains(&fact)
    }

    fn is_here(&self, dashboard: usize) -> bool {
        dashboard < self.world.dashboards.len() && !self.left.contains(&dashboard)
    }

    fn ask(&mut self, ask: &Ask) {
        if !self.is_here(ask.dashboard) {
            return;
        }
        let now = self.world.now();
        let core = self.world.core_of(ask.dashboard);
        let command = core.mint_command(now);
        let mut spec = CommandSpec::from(Run::Text(ask.script.clone()));
        spec.run_for_ms = ask.run_for_ms;
        let request = CommandRequest {
            command,
            agent: NAMES[ask.name].parse().expect("a name"),
            spec,
            priority: ask.priority,
            deliver_within_ms: ask.deliver_within_ms,
            retry: ask.retry,
        };
        let asked = core.request(DashboardToHub::Request(request.clone()), None, now);
        let answer = asked.expect("an outbox has room for a life");
        let dashboard = ask.dashboard;
        self.asked.push(Asked {
            dashboard,
            command,
            answer,
            request,
            interrupted: false,
            interrupts: Vec::new(),
            repeated: false,
            typed: 0,
        });
        if ask.watched {
            self.watch(dashboard, command, Reading::default());
        }
    }

    fn repeat(&mut self, dashboard: usize, command: usize) {
        if self.is_here(dashboard)
            && let Some(asked) = self.asked.get_mut(command)
        {
            asked.repeated = true;
            let message = DashboardToHub::Request(asked.request.clone());
            let now = self.world.now();
            let _ = self.world.core_of(dashboard).request(message, None, now);
        }
    }

    fn watch(&mut self, dashboard: usize, command: CommandId, reading: Reading) {
        if self.is_here(dashboard) {
            let reader = self.world.read(dashboard, Target::Command(command), reading);
            self.watches.push(Watch { dashboard, reader, command: Some(command), reading });
        }
    }

    fn type_into(&mut self, command: usize, lines: u32) {
        let Some(asked) = self.asked.get_mut(command) else { return };
        if self.left.contains(&asked.dashboard) {
            return;
        }
        let core = self.world.core_of(asked.dashboard);
        for _ in 0..lines {
            asked.typed += 1;
            let mut line = bytes::Bytes::from(format!("{:05}\n", asked.typed));
            if core.input(asked.command, &mut line).is_err() || !line.is_empty() {
                break;
            }
        }
    }

    // ---- rest -----------------------------------------------------------

    /// Everything heals, what runs may end, and then must.
    fn rest(&mut self) {
        self.world.hub_dies_after = None;
        self.world.goes_over.clear();
        self.world.agents.iter_mut().for_each(|node| node.dies_after = None);
        self.world.heal();
        for journal in self.world.agents.iter_mut().filter_map(|node| node.journal.as_mut()) {
            (journal.fails, journal.delay, journal.crash_at) = (false, Duration::ZERO, None);
        }
        for agent in 0..self.world.agents.len() {
            if self.world.agents[agent].core.is_none() {
                self.world.restart_agent(agent);
            }
        }
        self.world.run_for(S); // so that what was cut is noticed
        // A dashboard notices 45 s of silence, and what was under way before
        // that may have been slow.
        let end = self.world.now().monotonic + 200 * S;
        while self.world.is_half_open() && self.world.now().monotonic < end {
            self.world.run_for(S);
        }
        assert!(!self.world.is_half_open(), "somebody does not notice silence");
        if self.had(Fact::HalfOpen) {
            self.world.run_for(20 * S);
        }
        self.rest_for(30 * S);
        self.judge_superseded();
        // Somebody starts again what has stopped.
        for agent in 0..self.world.agents.len() {
            let own = self.names.iter().enumerate().filter(|(_, n)| **n == self.names[agent]);
            if own.map(|(n, _)| n).all(|n| self.is_gone(n)) {
                self.world.crash_agent(agent);
                self.world.restart_agent(agent);
            }
        }
        self.rest_for(30 * S);
        // Somebody who is certainly there stops what would go on for ever.
        let last = self.world.dashboard();
        self.world.run_for(5 * S);
        self.judge_interrupts(last);
        self.judge_waiting(last);
        self.world.stop_all(last);
        self.facts.insert(Fact::StoppedAll);
        self.rest_for(REST);
        self.world.dashboard();
        self.world.run_for(6 * S); // an agent that is gone has 5 s
    }

    fn rest_for(&mut self, time: Duration) {
        let end = self.world.now().monotonic + time;
        while self.world.now().monotonic < end && !self.is_at_rest() {
            self.world.run_for(S);
            self.check_bounds();
        }
    }

    /// Whether an agent's process is there and will not come back to the hub.
    fn is_gone(&self, agent: usize) -> bool {
        self.world.agents[agent].core.as_ref().is_some_and(|core| core.connection().is_over())
    }

    fn is_at_rest(&self) -> bool {
        let world = &self.world;
        let here = || (0..world.dashboards.len()).filter(|d| !self.left.contains(d));
        let dashboards = here().filter_map(|d| world.dashboards[d].core.as_ref());
        let agents = world.agents.iter().filter_map(|node| node.core.as_ref());
        let mut links =
            dashboards.map(DashboardCore::connection).chain(agents.map(AgentCore::connection));
        world.is_quiet()
            && links.all(|state| *state == ConnectionState::Connected || state.is_over())
            && here().all(|d| world.roster(d).commands().all(|command| command.status.is_final()))
            && self.asked.iter().all(|asked| {
                self.left.contains(&asked.dashboard)
                    || world.dashboards[asked.dashboard].answers.contains_key(&asked.answer)
            })
            && self.watches.iter().all(|watch| !self.is_open(watch))
    }

    /// Whether more is to come for a reader of one command.
    fn is_open(&self, watch: &Watch) -> bool {
        let node = &self.world.dashboards[watch.dashboard];
        let Some(command) = watch.command else { return false };
        let known = self.world.status(watch.dashboard, command).is_some();
        known && !self.left.contains(&watch.dashboard) && !node.over.contains(&watch.reader)
    }

    fn check_bounds(&self) {
        let limits = limits();
        if let Some(hub) = self.world.hub() {
            let bytes = hub.log_bytes();
            assert!(bytes <= limits.log_bytes_per_tenant, "all logs together take {bytes} bytes");
        }
        for node in &self.world.agents {
            let Some(core) = &node.core else { continue };
            let streams = node.fates.len().max(1);
            let bytes = core.tail_bytes();
            assert!(bytes <= streams * TAIL_BYTES, "{streams} tails take {bytes} bytes");
        }
    }

    // ---- judgement ------------------------------------------------------

    fn judge(&mut self) {
        for node in &self.world.dashboards {
            assert!(node.refused.is_empty(), "subscriptions were refused: {:?}", node.refused);
        }
        self.judge_views();
        self.judge_presence();
        for n in 0..self.asked.len() {
            self.judge_command(n);
        }
        self.judge_readers();
        self.judge_typing();
        self.mark_agents();
    }

    /// Everyone sees what a fresh dashboard sees.
    fn judge_views(&self) {
        let fresh = self.world.dashboards.len() - 1;
        let truth = self.world.roster(fresh);
        assert!(truth.position().is_some(), "a fresh dashboard has the roster");
        for dashboard in (0..fresh).filter(|d| !self.left.contains(d)) {
            let seen = self.world.roster(dashboard);
            let unlike: Vec<_> =
                seen.commands().filter(|c| truth.command(c.command) != Some(c)).collect();
            assert!(
                seen == truth,
                "dashboard {dashboard} does not see what a fresh one sees: {:?} and {:?}, {unlike:?}",
                seen.position(),
                truth.position()
            );
        }
        for command in truth.commands() {
            assert!(command.status.is_final(), "{} is still {}", command.command, command.status);
        }
        for agent in truth.agents() {
            assert_eq!(agent.running, 0, "{} is said to run something", agent.agent);
            assert!(truth.queue(&agent.agent).is_empty(), "{} has a queue", agent.agent);
        }
    }

    /// What was interrupted has ended: only a hub's death takes that back.
    fn judge_interrupts(&self, dashboard: usize) {
        // What was refused and is asked for once more begins anew.
        for asked in self.asked.iter().filter(|asked| !asked.repeated) {
            let held = asked.interrupts.iter().any(|(by, id, kills)| {
                let answer = self.world.dashboards[*by].answers.get(id);
                matches!(answer, Some(Ok(_))) && *kills == self.world.kills
            });
            let state = self.world.command(dashboard, asked.command);
            let goes_on = state.filter(|state| !state.status.is_final());
            assert!(!held || goes_on.is_none(), "it was interrupted: {goes_on:?}");
        }
    }

    /// What could not be given out in time is not waited for.
    fn judge_waiting(&self, dashboard: usize) {
        if self.had(Fact::ClockJumped) || self.world.era > 0 {
            return; // a hub that starts again has the wall clock only
        }
        for asked in &self.asked {
            let state = self.world.command(dashboard, asked.command);
            let waits = state.is_some_and(|state| state.status == CommandStatus::Queued);
            let accepted = self.world.accepted.get(&asked.command);
            if let (true, Some(accepted), Some(within)) =
                (waits, accepted, asked.request.deliver_within_ms)
            {
                let last = *accepted + Duration::from_millis(within) + S;
                assert!(self.world.now().monotonic <= last, "{} still waits", asked.command);
            }
        }
    }

    /// Who is the only one of its name is never told that another link took
    /// over: it would not come back.
    fn judge_superseded(&self) {
        let by = |state: &ConnectionState| {
            let ConnectionState::Disconnected { why } = state else { return false };
            why.code == CloseCode::Superseded
        };
        for (n, node) in self.world.agents.iter().enumerate() {
            let Some(core) = &node.core else { continue };
            let is_alone = self.names.iter().filter(|name| **name == self.names[n]).count() == 1;
            assert!(!(is_alone && by(core.connection())), "an agent gave way to itself");
        }
        for node in &self.world.dashboards {
            let Some(core) = &node.core else { continue };
            assert!(!by(core.connection()), "a dashboard gave way to itself");
        }
    }

    /// Who is connected is online, and who is not, is not.
    fn judge_presence(&self) {
        let fresh = self.world.dashboards.len() - 1;
        for (name, text) in NAMES.iter().enumerate() {
            let mut own = self.names.iter().enumerate().filter(|(_, own)| **own == name);
            let is_up = own.any(|(n, _)| {
                let core = self.world.agents[n].core.as_ref();
                core.is_some_and(|core| !core.connection().is_over())
            });
            let presence = self.world.presence(fresh, text);
            let is_true = match presence {
                Some(Presence::Online) => is_up,
                Some(Presence::Offline) | None => !is_up,
                _ => false, // it has no work, and had its grace
            };
            assert!(is_true, "{text} is {presence:?}");
        }
    }

    fn judge_command(&mut self, n: usize) {
        let asked = &self.asked[n];
        let id = asked.command;
        let fresh = self.world.dashboards.len() - 1;
        let state = self.world.command(fresh, id).cloned();
        let answer = self.world.dashboards[asked.dashboard].answers.get(&asked.answer).cloned();
        let was_lost = self.world.era > 0;
        let left = self.left.contains(&asked.dashboard);
        assert!(answer.is_some() || left, "the request for {id} has no answer");
        match &answer {
            Some(Ok(_)) => {
                assert!(state.is_some() || was_lost, "{id} was accepted and is gone");
                if state.is_none() {
                    self.marks.insert("a command was lost with its queue");
                } else if self.world.kills > 0 {
                    self.marks.insert("a command survived the hub that accepted it");
                }
            }
            Some(Err(RequestError::Refused(refusal))) => {
                self.marks.insert(match refusal.code {
                    ErrorCode::QueueFull => "a full queue refused",
                    ErrorCode::QueueUnavailable => "a failing queue refused",
                    _ => "a request was refused",
                });
                // With an unavailable queue it cannot be known.
                let is_known = refusal.code != ErrorCode::QueueUnavailable && !was_lost;
                if is_known && !self.asked[n].repeated {
                    assert_eq!(state, None, "{id} was refused and is there");
                    assert!(self.began(id).is_empty(), "{id} was refused and ran");
                }
            }
            Some(Err(RequestError::Ambiguous)) => {
                self.marks.insert("a request was ambiguous");
                assert!(was_lost, "only a lost queue makes it ambiguous");
            }
            Some(Err(error)) => assert!(left, "{id}: {error}"),
            None => {}
        }
        let began = self.began(id);
        // Who asks a hub that has lost its memory once more is served once more.
        let asked_anew = was_lost && self.asked[n].repeated;
        if !self.asked[n].request.retry && !asked_anew {
            assert!(began.len() <= 1, "{id} began {} times: {began:?}", began.len());
        }
        if began.len() > 1 {
            self.marks.insert("a command was tried again");
        }
        self.judge_lateness(n, &began);
        for node in &self.world.dashboards {
            let Some((status, 0, seen)) = node.finals.get(&id) else { continue };
            // What is on its way to a process that was given up may still
            // arrive there: therefore the word is `unknown`, and therefore a
            // new attempt has a number.
            let last = state.as_ref().map_or(0, |state| state.attempt);
            let late = began.iter().find(|((attempt, _), at)| *attempt == last && *at > seen);
            let is_known = *status != CommandStatus::Unknown && !was_lost;
            assert!(late.is_none() || !is_known, "{id} began after it was {status}: {late:?}");
        }
        if let Some(state) = state.filter(|_| !asked_anew) {
            self.judge_end(n, &state);
        }
    }

    /// All attempts that began, wherever, and when.
    fn began(&self, id: CommandId) -> BTreeMap<(u32, usize), Duration> {
        let nodes = self.world.agents.iter().enumerate();
        let began = nodes.flat_map(|(n, node)| {
            let own = node.began.range((id, 0)..=(id, u32::MAX));
            own.map(move |((_, attempt), at)| ((*attempt, n), *at))
        });
        let began: Vec<_> = began.collect();
        let attempts: BTreeSet<u32> = began.iter().map(|((attempt, _), _)| *attempt).collect();
        if self.world.era == 0 {
            assert_eq!(attempts.len(), began.len(), "an attempt at {id} began twice: {began:?}");
            let twice = self.world.agents.iter().any(|node| node.twice.contains(&id));
            assert!(!twice, "an attempt at {id} began twice with one agent");
        }
        began.into_iter().collect()
    }

    fn judge_lateness(&self, n: usize, began: &BTreeMap<(u32, usize), Duration>) {
        let asked = &self.asked[n];
        let (id, within) = (asked.command, asked.request.deliver_within_ms);
        let (Some(within), Some(accepted)) = (within, self.world.accepted.get(&id)) else { return };
        if (self.had(Fact::ClockJumped) && self.world.kills > 0) || self.world.era > 0 {
            return; // a hub that starts again has the wall clock only
        }
        let last = *accepted + Duration::from_millis(within) + ON_ITS_WAY;
        for at in began.values() {
            assert!(*at <= last, "{id} began at {at:?} and must not have after {last:?}");
        }
    }

    fn fate(&self, id: CommandId, attempt: u32) -> Option<Fate> {
        let fates = self.world.agents.iter().filter_map(|node| node.fates.get(&(id, attempt)));
        fates.copied().next_back()
    }

    /// The final state is true.
    fn judge_end(&mut self, n: usize, state: &CommandState) {
        let asked = &self.asked[n];
        let id = asked.command;
        let fate = self.fate(id, state.attempt);
        let forgot = self.world.era > 0;
        let end = state.end.clone().unwrap_or_default();
        let told =
            format!("{id} is {}, attempt {}: {fate:?}, {end:?}", state.status, state.attempt);
        match state.status {
            CommandStatus::Completed => {
                self.marks.insert("a command completed");
                match fate {
                    Some(Fate::Exited(code)) => assert_eq!(end.exit_code, Some(code), "{told}"),
                    Some(Fate::Stopped) => assert!(end.signal.is_some(), "{told}"),
                    Some(Fate::Runs | Fate::Died) | None => panic!("{told}"),
                }
                let written = self.written(id, state.attempt);
                assert_eq!(end.end, written, "{told}: not what the program wrote");
                if self.had(Fact::AgentsCut) {
                    self.marks.insert("a result came after its agent was cut off");
                }
            }
            CommandStatus::Failed => {
                self.marks.insert("a command failed");
                assert!(
                    self.had(Fact::Stopped) || self.had(Fact::JournalFailed) || forgot,
                    "{told}"
                );
                assert_eq!(fate, None, "{told}: it never ran");
            }
            CommandStatus::Interrupted => {
                self.marks.insert("a command was interrupted");
                let asked_for =
                    asked.interrupted || self.had(Fact::StoppedAll) || self.had(Fact::Stopped);
                assert!(asked_for, "{told}: nobody asked for it");
                assert_ne!(fate, Some(Fate::Runs), "{told}");
            }
            CommandStatus::TimedOut => {
                self.marks.insert("a command timed out");
                assert!(asked.request.spec.run_for_ms.is_some(), "{told}");
                assert_ne!(fate, Some(Fate::Runs), "{told}");
            }
            CommandStatus::Expired => {
                self.marks.insert("a command expired");
                let began = !self.began(id).is_empty();
                assert!(!began || forgot, "{told}: it was started");
            }
            CommandStatus::Unknown => {
                self.marks.insert("a command became unknown");
                let deaths: u32 = self.world.agents.iter().map(|node| node.deaths).sum();
                let gone = self.world.agents.iter().filter_map(|node| node.core.as_ref());
                let sent_away = gone.filter(|core| core.connection().is_over()).count();
                assert!(deaths > 0 || sent_away > 0 || forgot, "{told}: its agent lives");
                assert_ne!(fate, Some(Fate::Runs), "{told}");
            }
            CommandStatus::Queued | CommandStatus::Dispatched | CommandStatus::Running => {
                panic!("{told}: not final");
            }
        }
    }

    fn written(&self, id: CommandId, attempt: u32) -> u64 {
        let nodes = self.world.agents.iter();
        nodes.filter_map(|node| node.written.get(&(id, attempt))).copied().max().unwrap_or(0)
    }

    // ---- readers --------------------------------------------------------

    fn judge_readers(&mut self) {
        let mut marks = Marks::new();
        for watch in &self.watches {
            assert!(!self.is_open(watch), "a reader of {:?} still waits", watch.command);
            let node = &self.world.dashboards[watch.dashboard];
            for ((_, stream), seen) in node.seen.iter().filter(|((r, _), _)| *r == watch.reader) {
                self.judge_stream(watch, *stream, seen, &mut marks);
                if let Some((state, _)) = &seen.ended
                    && state.stream == Some(*stream)
                    && self.slept.contains(&watch.dashboard)
                {
                    marks.insert("a stalled reader caught up");
                }
            }
        }
        self.marks.append(&mut marks);
    }

    fn judge_stream(&self, watch: &Watch, stream: StreamId, seen: &Seen, marks: &mut Marks) {
        let (id, attempt) = (seen.command, seen.attempt);
        let nodes = self.world.agents.iter();
        let before = nodes.filter_map(|node| node.written_before.get(&(id, attempt))).max();
        let written = self.written(id, attempt).max(before.copied().unwrap_or(0));
        let may_give_way = self.world.leases > STREAMS_MAX;
        let missing: u64 = seen.gaps.iter().map(|gap| gap.to - gap.from).sum();
        assert_eq!(seen.from + seen.bytes + missing, seen.at, "{id}: the sum is wrong");
        assert!(seen.at <= written, "{id}: {} shown of {written}", seen.at);
        if let Some((state, audit)) = &seen.ended {
            let end = state.end.clone().unwrap_or_default();
            // An end that its agent did not tell is all that the hub has; an
            // earlier hub may have passed on more.
            let is_end = seen.at == end.end || (end.digest.is_none() && seen.at > end.end);
            assert!(is_end, "{id}: ended at {} and not at {}", seen.at, end.end);
            if *audit == Audit::Verified {
                marks.insert("a stream was verified");
                if self.world.kills > 0 && self.world.keeps_output() {
                    marks.insert("a stream was read on from the stream log");
                }
                if self.world.kills > 0 {
                    marks.insert("a stream was read on over a killed hub");
                }
            }
        }
        if seen.from > 0 {
            marks.insert("a gap: not_requested");
            assert!(watch.reading.from == From::Live || watch.command.is_none(), "{id}");
        }
        for gap in &seen.gaps {
            let is_true = match gap.reason {
                GapReason::Evicted => {
                    marks.insert("a gap: evicted");
                    // Its own bound, or that of all logs together; or that of
                    // how many there are, and then all the rest that the hub
                    // had is gone: less than was written, if it lost the agent.
                    let is_whole = gap.to == seen.at && may_give_way;
                    if is_whole && written < 30_000 {
                        marks.insert("output gave way to that of later commands");
                    }
                    is_whole || written >= 30_000 || self.total_written() >= 100_000
                }
                GapReason::AgentOverflow => {
                    marks.insert("a gap: agent_overflow");
                    written >= 25_000 || self.total_written() >= 1_000_000
                }
                GapReason::AgentLoss => {
                    marks.insert("a gap: agent_loss");
                    self.world.agents.iter().any(|node| {
                        node.deaths > 0
                            || node.core.as_ref().is_none_or(|core| core.connection().is_over())
                    })
                }
                GapReason::HubLoss => {
                    marks.insert("a gap: hub_loss");
                    // What a hub has taken for good outlives it; what it has
                    // not, its agent still has, if that lives. Of what gave
                    // way before, it does not know why it is not there.
                    let gave_way = may_give_way && self.world.dropped.contains(&stream);
                    let is_kept = self.world.keeps_output()
                        && !self.had(Fact::OutputNotKept)
                        && self.world.era == 0
                        && self.world.agents.iter().all(|node| node.deaths == 0);
                    self.world.kills > 0 && (!is_kept || gave_way)
                }
                GapReason::Lagged => {
                    marks.insert("a gap: lagged");
                    // Readers of one dashboard share its subscription.
                    self.watches
                        .iter()
                        .any(|w| w.dashboard == watch.dashboard && w.reading.lag == Lag::Newest)
                }
                GapReason::NotRequested => {
                    marks.insert("a gap: not_requested");
                    self.watches.iter().any(|w| {
                        w.dashboard == watch.dashboard
                            && (w.reading.from == From::Live || w.command.is_none())
                    })
                }
                GapReason::Other(_) => false,
            };
            assert!(is_true, "{id}: {gap:?} of {written} is not true");
        }
    }

    fn total_written(&self) -> u64 {
        self.world.agents.iter().flat_map(|node| node.written.values()).sum()
    }

    // ---- the rest -------------------------------------------------------

    /// What was typed arrived once and in order: lines may be missing where
    /// the command did not run, and none comes twice.
    fn judge_typing(&mut self) {
        for node in &self.world.agents {
            for (command, typed) in &node.typed {
                self.marks.insert("input arrived");
                let text = String::from_utf8_lossy(typed);
                // Of a line for which there was no room a part was typed.
                let whole = text.lines().filter(|line| line.len() == 5);
                let numbers: Vec<u32> = whole.filter_map(|line| line.parse().ok()).collect();
                let bad = numbers.windows(2).find(|pair| pair[0] >= pair[1]);
                assert_eq!(bad, None, "{command}: typed in order, and arrived so");
            }
        }
    }

    fn mark_agents(&mut self) {
        let world = &self.world;
        for node in &world.agents {
            let is_over = |core: &AgentCore| core.connection().is_over();
            if node.core.as_ref().is_some_and(is_over) {
                self.marks.insert("an agent was superseded");
            }
            if node.parts > 0 {
                self.marks.insert("an agent listed in parts what it held");
            }
            if node.fates.values().any(|fate| *fate == Fate::Died) {
                self.marks.insert("an agent died while it ran something");
            }
            if node.setup.slots > 1 && node.began.len() > 1 {
                self.marks.insert("two ran at a time");
            }
        }
    }
}
