//! One command under every order of events, within a scope: what random lives
//! try at random is tried here exhaustively, with the machines of production.
//!
//! A [`Machine`] holds a hub's core, an agent's core, what the queue and the
//! journal have on disk, and the frames that are under way. A [`Step`] is one
//! thing that can happen next. [`CommandModel`] gives them to `stateright`,
//! which walks through all that can be reached.
//!
//! The cores cannot be copied (their generators of random numbers cannot), so
//! a [`State`] is the list of steps that leads to it, and a machine is made
//! anew by walking them. What two lists lead to is one state if it prints
//! alike: the whole of both cores, disks, frames, and what this module keeps,
//! with the order of unordered sets taken out ([`canonical`]). Only the
//! generators do not print, whose names nobody compares, and what is in a log,
//! which is nothing: programs write nothing here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use stateright::{Model, Property};
use trunkline_client::core::agent::{
    AgentCore, AgentOutput, AgentSetup, Attempts, ExecutionEvent, JournalRecord, Outcome, Recovered,
};
use trunkline_client::core::dialing::{Backoff, DialAction};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{
    CommandId, HubInstance, InstanceId, QueueEpoch, RequestId, TenantId,
};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    CommandInterrupt, CommandRequest, CommandSpec, CommandStatus, DashboardConnect, DashboardToHub,
    Direction, Envelope, Greeting, HubToAgent, HubToDashboard, PROTOCOLS, Priority, Run, Secret,
    Since,
};
use trunkline_protocol::roster::RosterReader;
use trunkline_protocol::time::Now;
use trunkline_server::core::{Core, Effect, LinkId, Setup};
use trunkline_server::hooks::{QueueChange, QueueError, WholeTenant};
use trunkline_server::{Identity, MemoryQueue};

const S: Duration = Duration::from_secs(1);
/// The command's `deliver_by` passes with this, and an agent that is not there
/// is given up.
const AGE: Duration = Duration::from_secs(600);
const REQUEST: &str = "request";
const INTERRUPT: &str = "interrupt";

/// How much may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    /// Whether the command may be tried again.
    pub retry: bool,
    /// Whether the agent keeps a journal.
    pub journal: bool,
    /// What may happen, and how often.
    pub faults: Faults,
}

/// What may happen, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// The agent's link breaks; one end notices first.
    pub cuts: u8,
    /// The agent's process dies, and another takes its place.
    pub agent_deaths: u8,
    /// The hub's process dies, and another goes on with its queue.
    pub hub_deaths: u8,
    /// The queue does not store a change.
    pub refusals: u8,
    /// Somebody interrupts the command.
    pub interrupts: u8,
    /// So much time passes that whatever waits for it comes.
    pub ages: u8,
}

/// An end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The hub's.
    Hub,
    /// The agent's.
    Agent,
}

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The next frame on a link arrives at this end.
    Arrives(u64, End),
    /// A link breaks, and this end notices.
    Breaks(u64, End),
    /// The other end notices, too.
    Notices(u64, End),
    /// The agent dials.
    Dials,
    /// The queue has stored what it was given.
    Stored,
    /// The queue says that it has not, and has not.
    NotStored,
    /// The journal has written what it was given.
    Journaled,
    /// The program ends by itself, or as it was told.
    Ends,
    /// The dashboard interrupts the command.
    Interrupt,
    /// The agent dies, with what its journal was writing on disk or not.
    AgentDies(bool),
    /// The hub dies, with what its queue was storing on disk or not.
    HubDies(bool),
    /// Time passes.
    Ages,
}

#[derive(Debug)]
struct Link {
    up: VecDeque<Frame>,
    down: VecDeque<Frame>,
    at_hub: bool,
    at_agent: bool,
}

/// The cores and everything around them.
#[derive(Debug)]
pub struct Machine {
    scope: Scope,
    left: Faults,
    now: Duration,
    hub: Core,
    queue: MemoryQueue,
    storing: VecDeque<(TenantId, CommandId, QueueChange)>,
    agent: AgentCore,
    journal: Vec<JournalRecord>,
    writing: Option<Vec<JournalRecord>>,
    links: BTreeMap<u64, Link>,
    awake: BTreeSet<LinkId>,
    opened: u64,
    /// The dashboard's link, and what it has heard.
    dashboard: LinkId,
    roster: RosterReader,
    answered: Option<bool>,
    /// The attempt that runs, and whether it was interrupted.
    running: Option<(u32, bool)>,
    starts: BTreeMap<u32, u32>,
    ended: BTreeSet<u32>,
    /// Those whose process lives.
    ended_here: BTreeSet<u32>,
    /// Those whose process had nothing left to write when it died.
    kept_ends: BTreeSet<u32>,
    last: Option<CommandStatus>,
    /// The first promise that was broken.
    broken: Option<String>,
}

fn limits() -> Limits {
    let never = Duration::from_secs(86_400 * 365);
    Limits {
        // Links break when a step says so.
        agent_idle: never,
        agent_timeout: never * 2,
        dashboard_idle: never,
        dashboard_timeout: never * 2,
        log_retention: never,
        agent_retention: never,
        ..Limits::default()
    }
}

fn command() -> CommandId {
    CommandId::from_u128(0xc0)
}

fn request_id(name: &str) -> RequestId {
    name.parse().expect("a name")
}

fn seed(of: u64) -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&of.to_le_bytes());
    seed
}

fn new_agent(scope: Scope, number: u64, journal: &[JournalRecord], now: Now) -> AgentCore {
    let mut setup = AgentSetup::new("a".parse().expect("a name"));
    let wait = S / 2;
    setup.backoff =
        Backoff { first: wait, base: wait, max: wait, jitter_percent: 0, ..Backoff::default() };
    if scope.journal {
        let attempts: Attempts = journal.iter().collect();
        setup.journal =
            Some(Recovered { instance: InstanceId::from_u128(7), records: attempts.records() });
    }
    AgentCore::new(setup, seed(number), now)
}

fn new_hub(queue: &MemoryQueue, number: u8, now: Now) -> Core {
    let setup = Setup {
        limits: limits(),
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(0x100 + u128::from(number)),
        epoch: queue_epoch(),
        seed: seed(1000 + u64::from(number)),
        stored: queue.stored(),
        streams: None,
    };
    Core::new(setup, now)
}

fn queue_epoch() -> QueueEpoch {
    QueueEpoch::from_u128(5)
}

impl Machine {
    /// The command has been asked for; nothing else has happened.
    pub fn new(scope: Scope) -> Self {
        let queue = MemoryQueue::with_epoch(queue_epoch());
        let now = Now { monotonic: Duration::ZERO, wall_ms: 1_700_000_000_000 };
        let mut machine = Self {
            scope,
            left: scope.faults,
            now: Duration::ZERO,
            hub: new_hub(&queue, scope.faults.hub_deaths, now),
            queue,
            storing: VecDeque::new(),
            agent: new_agent(scope, 0, &[], now),
            journal: Vec::new(),
            writing: None,
            links: BTreeMap::new(),
            awake: BTreeSet::new(),
            opened: 0,
            dashboard: LinkId(0),
            roster: RosterReader::default(),
            answered: None,
            running: None,
            starts: BTreeMap::new(),
            ended: BTreeSet::new(),
            ended_here: BTreeSet::new(),
            kept_ends: BTreeSet::new(),
            last: None,
            broken: None,
        };
        machine.dashboard_comes();
        machine.rest();
        machine
    }

    /// The machine after these steps.
    pub fn after(scope: Scope, steps: &[Step]) -> Self {
        let mut machine = Self::new(scope);
        for step in steps {
            machine.step(*step);
        }
        machine
    }

    fn time(&self) -> Now {
        let millis = u64::try_from(self.now.as_millis()).expect("it is short");
        Now { monotonic: self.now, wall_ms: 1_700_000_000_000 + millis }
    }

    /// What can happen next.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.broken.is_some() {
            return steps;
        }
        for (id, link) in &self.links {
            if link.at_hub && !link.up.is_empty() {
                steps.push(Step::Arrives(*id, End::Hub));
            }
            if link.at_agent && !link.down.is_empty() {
                steps.push(Step::Arrives(*id, End::Agent));
            }
            match (link.at_hub, link.at_agent) {
                (true, true) if self.left.cuts > 0 => {
                    steps.push(Step::Breaks(*id, End::Hub));
                    steps.push(Step::Breaks(*id, End::Agent));
                }
                (true, false) => steps.push(Step::Notices(*id, End::Hub)),
                (false, true) => steps.push(Step::Notices(*id, End::Agent)),
                (true, true) | (false, false) => {}
            }
        }
        if self.can_dial() {
            steps.push(Step::Dials);
        }
        if !self.storing.is_empty() {
            steps.push(Step::Stored);
            if self.left.refusals > 0 {
                steps.push(Step::NotStored);
            }
        }
        if self.writing.is_some() {
            steps.push(Step::Journaled);
        }
        if self.running.is_some() {
            steps.push(Step::Ends);
        }
        if self.left.interrupts > 0 && self.answered == Some(true) {
            steps.push(Step::Interrupt);
        }
        if self.left.agent_deaths > 0 {
            steps.push(Step::AgentDies(false));
            if self.writing.is_some() {
                steps.push(Step::AgentDies(true));
            }
        }
        if self.left.hub_deaths > 0 {
            steps.push(Step::HubDies(false));
            if !self.storing.is_empty() {
                steps.push(Step::HubDies(true));
            }
        }
        if self.left.ages > 0 {
            steps.push(Step::Ages);
        }
        steps
    }

    fn can_dial(&self) -> bool {
        !self.agent.connection().is_over() && self.links.values().all(|link| !link.at_agent)
    }

    /// Lets it happen, and everything that follows at once.
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Arrives(link, end) => self.arrives(link, end),
            Step::Breaks(link, end) => {
                self.left.cuts -= 1;
                self.notices(link, end, &Close::new(CloseCode::Lost, "cut"));
            }
            Step::Notices(link, end) => {
                self.notices(link, end, &Close::new(CloseCode::Lost, "cut"));
            }
            Step::Dials => self.dials(),
            Step::Stored => self.stored(true),
            Step::NotStored => {
                self.left.refusals -= 1;
                self.stored(false);
            }
            Step::Journaled => {
                let written = self.writing.take().expect("it writes");
                self.journal.extend(written);
                self.agent.handle_journaled(Ok(()), self.time());
            }
            Step::Ends => {
                let (attempt, interrupted) = self.running.take().expect("it runs");
                self.ended.insert(attempt);
                self.ended_here.insert(attempt);
                let outcome = if interrupted { Outcome::Interrupted } else { Outcome::Exited(0) };
                self.agent.ended(command(), outcome, self.time());
            }
            Step::Interrupt => {
                self.left.interrupts -= 1;
                let interrupt =
                    CommandInterrupt { command: command(), attempt: None, grace_ms: None };
                self.say(INTERRUPT, DashboardToHub::Interrupt(interrupt));
            }
            Step::AgentDies(written) => self.agent_dies(written),
            Step::HubDies(stored) => self.hub_dies(stored),
            Step::Ages => {
                self.left.ages -= 1;
                self.passes(AGE);
            }
        }
        self.rest();
    }

    // ---- what happens ---------------------------------------------------

    fn passes(&mut self, time: Duration) {
        self.now += time;
        let now = self.time();
        self.hub.handle_timeout(now);
        self.agent.handle_timeout(now);
    }

    fn arrives(&mut self, id: u64, end: End) {
        let now = self.time();
        let link = self.links.get_mut(&id).expect("it is there");
        let lane = if end == End::Hub { &mut link.up } else { &mut link.down };
        let frame = lane.pop_front().expect("something is under way");
        match (frame, end) {
            (Frame::Close(close), end) => self.notices(id, end, &close),
            (frame, End::Hub) => self.hub.handle_frame(LinkId(id), &frame, now),
            (frame, End::Agent) => self.agent.handle_frame(&frame, now),
        }
    }

    fn notices(&mut self, id: u64, end: End, close: &Close) {
        let now = self.time();
        let Some(link) = self.links.get_mut(&id) else { return };
        // What is under way to an end that is gone never arrives.
        let (end_is_here, lane) = match end {
            End::Hub => (&mut link.at_hub, &mut link.up),
            End::Agent => (&mut link.at_agent, &mut link.down),
        };
        lane.clear();
        let had = std::mem::replace(end_is_here, false);
        if !link.at_hub && !link.at_agent {
            self.links.remove(&id);
        }
        match end {
            End::Hub if had => self.hub.handle_lost(LinkId(id), now),
            End::Agent if had => self.agent.handle_lost(close, now),
            End::Hub | End::Agent => {}
        }
    }

    fn dials(&mut self) {
        self.passes(S);
        let dial = self.agent.poll_dial();
        if !matches!(dial, Some(DialAction::Dial { .. })) {
            self.breaks(format!("an agent without a link does not dial: {dial:?}"));
            return;
        }
        self.opened += 1;
        let link =
            Link { up: VecDeque::new(), down: VecDeque::new(), at_hub: true, at_agent: true };
        self.links.insert(self.opened, link);
        let now = self.time();
        self.hub.handle_arrived(LinkId(self.opened), None, now);
        self.hub.handle_opened(LinkId(self.opened), None, None, now);
        self.agent.handle_dialed(Some(Secret::new("token")), now);
    }

    fn stored(&mut self, works: bool) {
        let (tenant, command, change) = self.storing.pop_front().expect("it stores");
        if works {
            self.store(&change);
        }
        let result = if works { Ok(()) } else { Err(QueueError("out of order".into())) };
        let now = self.time();
        self.hub.handle_stored(&tenant, command, &result, now);
    }

    fn store(&mut self, change: &QueueChange) {
        let before = self.kept();
        self.queue.store(change);
        let (Some((before, attempt)), Some((after, _))) = (before, self.kept()) else { return };
        if before.is_final() && before != after {
            self.breaks(format!("{before} became {after} on disk, attempt {attempt}"));
        }
    }

    /// How far the command is, on disk.
    fn kept(&self) -> Option<(CommandStatus, u32)> {
        self.queue.stored().first().map(|stored| (stored.status, stored.attempt))
    }

    fn agent_dies(&mut self, written: bool) {
        self.left.agent_deaths -= 1;
        let ended_here = std::mem::take(&mut self.ended_here);
        if let Some(records) = self.writing.take() {
            if written {
                self.journal.extend(records);
            }
        } else if self.scope.journal {
            self.kept_ends.extend(ended_here);
        }
        self.running = None;
        let number = self.scope.faults.agent_deaths - self.left.agent_deaths;
        self.agent = new_agent(self.scope, number.into(), &self.journal, self.time());
        for link in self.links.values_mut() {
            link.at_agent = false;
            link.down.clear();
        }
        self.links.retain(|_, link| link.at_hub);
    }

    fn hub_dies(&mut self, stored: bool) {
        self.left.hub_deaths -= 1;
        if stored {
            let (_, _, change) = self.storing.pop_front().expect("it stores");
            self.store(&change);
        }
        self.storing.clear();
        self.awake.clear();
        for link in self.links.values_mut() {
            link.at_hub = false;
            link.up.clear();
        }
        self.links.retain(|_, link| link.at_agent);
        self.hub = new_hub(&self.queue, self.left.hub_deaths, self.time());
        self.dashboard_comes();
    }

    /// The dashboard, whose link never breaks while there is a hub, and who
    /// asks again for what was not answered.
    fn dashboard_comes(&mut self) {
        self.opened += 1;
        self.dashboard = LinkId(self.opened);
        self.roster.handle_link();
        let now = self.time();
        self.hub.handle_arrived(self.dashboard, None, now);
        self.hub.handle_opened(self.dashboard, None, None, now);
        let greeting = Greeting::Dashboard(DashboardConnect {
            protocols: PROTOCOLS.to_vec(),
            dashboard: Some("d".parse().expect("a name")),
            token: Some(Secret::new("token")),
            features: Vec::new(),
            since: Since { roster: self.roster.roster().position() },
        });
        self.hub.handle_frame(self.dashboard, &codec::encode(&Envelope::bare(greeting)), now);
        self.pump();
        if self.answered.is_none() {
            let request = CommandRequest {
                command: command(),
                agent: "a".parse().expect("a name"),
                spec: CommandSpec::from(Run::Text("work".into())),
                priority: Priority::Normal,
                deliver_within_ms: Some(60_000),
                retry: self.scope.retry,
            };
            self.say(REQUEST, DashboardToHub::Request(request));
        }
    }

    fn say(&mut self, id: &str, message: DashboardToHub) {
        let envelope = Envelope { id: Some(request_id(id)), ts: None, message };
        let now = self.time();
        self.hub.handle_frame(self.dashboard, &codec::encode(&envelope), now);
    }

    // ---- what follows ---------------------------------------------------

    /// Everything that takes no time.
    fn rest(&mut self) {
        for _ in 0..10_000 {
            if !self.pump() {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    fn pump(&mut self) -> bool {
        let mut happened = false;
        let now = self.time();
        while let Some(effect) = self.hub.poll_effect() {
            happened = true;
            match effect {
                Effect::Wake(link) => {
                    self.awake.insert(link);
                }
                Effect::Authenticate { link, .. } => {
                    let identity = Identity::new("default".parse().expect("a name"), "someone");
                    self.hub.handle_authenticated(link, Ok(identity), now);
                }
                Effect::Store { tenant, command, change } => {
                    if !self.storing.is_empty() {
                        self.breaks("two changes to one command at a time".into());
                    }
                    self.storing.push_back((tenant, command, change));
                }
                Effect::Forget(change) => self.queue.store(&change),
                Effect::Keep(_) => unreachable!("there is no stream log"),
                Effect::TakeLogs(_) => unreachable!("there is no log sink"),
                Effect::Observe(_) => {}
            }
        }
        while let Some(id) = self.awake.pop_first() {
            happened = true;
            self.hub_says(id);
        }
        happened | self.agent_acts()
    }

    fn hub_says(&mut self, id: LinkId) {
        let now = self.time();
        let mut frames = Vec::new();
        while self.hub.transmit(id, now, &mut frames, usize::MAX) {}
        for frame in frames {
            if id == self.dashboard {
                for message in read::<HubToDashboard>(&frame) {
                    self.dashboard_hears(message);
                }
                continue;
            }
            for message in read::<HubToAgent>(&frame) {
                if let HubToAgent::Execute(execute) = message {
                    let kept = self.kept();
                    if kept != Some((CommandStatus::Dispatched, execute.attempt)) {
                        self.breaks(format!(
                            "attempt {} is sent, and on disk is {kept:?}",
                            execute.attempt
                        ));
                    }
                }
            }
            let is_last = matches!(frame, Frame::Close(_));
            let Some(link) = self.links.get_mut(&id.0) else { continue };
            if link.at_agent {
                link.down.push_back(frame);
            }
            if is_last {
                self.notices(id.0, End::Hub, &Close::new(CloseCode::Lost, "closed"));
            }
        }
    }

    fn dashboard_hears(&mut self, message: HubToDashboard) {
        match message {
            HubToDashboard::Ok(ok) if ok.in_reply_to == Some(request_id(REQUEST)) => {
                self.answered = Some(true);
                if self.kept().is_none() {
                    self.breaks("accepted, and not on disk".into());
                }
            }
            HubToDashboard::Error(error) if error.in_reply_to == Some(request_id(REQUEST)) => {
                self.answered = Some(false);
            }
            HubToDashboard::List(list) => drop(self.roster.handle_list(list)),
            HubToDashboard::Agent(changed) => drop(self.roster.handle_agent(changed)),
            HubToDashboard::Command(changed) | HubToDashboard::Complete(changed) => {
                drop(self.roster.handle_command(changed));
            }
            HubToDashboard::Queue(changed) => drop(self.roster.handle_queue(&changed)),
            _ => {}
        }
        let Some(state) = self.roster.roster().command(command()) else { return };
        let (status, attempt) = (state.status, state.attempt);
        if self.last.as_ref() == Some(&status) {
            return;
        }
        if let Some(last) = &self.last
            && last.is_final()
        {
            let told = format!("{last} became {status}");
            self.breaks(told);
        }
        let is_true = match &status {
            CommandStatus::Completed => self.ended.contains(&attempt),
            CommandStatus::Expired => self.starts.is_empty(),
            CommandStatus::Interrupted => self.left.interrupts < self.scope.faults.interrupts,
            CommandStatus::Unknown => {
                let died = self.left.agent_deaths < self.scope.faults.agent_deaths;
                died && !self.kept_ends.contains(&attempt)
            }
            CommandStatus::Queued | CommandStatus::Dispatched | CommandStatus::Running => true,
            // The journal took too long.
            CommandStatus::Failed => self.scope.journal && !self.starts.contains_key(&attempt),
            CommandStatus::TimedOut => false,
        };
        if !is_true {
            self.breaks(format!("{status} is not true: {:?}, {:?}", self.starts, self.ended));
        }
        self.last = Some(status);
    }

    fn agent_acts(&mut self) -> bool {
        let mut happened = false;
        let now = self.time();
        while let Some(output) = self.agent.poll_output() {
            happened = true;
            match output {
                AgentOutput::Execute(id) => {
                    if let Some((attempt, _)) = self.agent.begin(id, now) {
                        self.begins(attempt);
                    }
                }
                AgentOutput::Event(id) => {
                    while let Some(event) = self.agent.take_event(id, true) {
                        if let ExecutionEvent::Interrupt { .. } = event
                            && let Some((_, interrupted)) = &mut self.running
                        {
                            *interrupted = true;
                            self.agent.signalled(id);
                        }
                    }
                }
                AgentOutput::Kill(_) => self.running = None,
                AgentOutput::Journal(records) => self.writing = Some(records),
                AgentOutput::Room(_) | AgentOutput::Report => {}
            }
        }
        let link = self.links.iter().find(|(_, link)| link.at_agent).map(|(id, _)| *id);
        if let Some(id) = link {
            if self.agent.poll_dial() == Some(DialAction::HangUp) {
                self.notices(id, End::Agent, &Close::new(CloseCode::Lost, "given up"));
                return true;
            }
            while let Some(frame) = self.agent.poll_transmit(now) {
                happened = true;
                self.links.get_mut(&id).expect("it is there").up.push_back(frame);
            }
        }
        happened
    }

    fn begins(&mut self, attempt: u32) {
        if let Some((running, _)) = self.running {
            self.breaks(format!("attempt {attempt} begins while {running} runs"));
        }
        self.running = Some((attempt, false));
        let times = self.starts.entry(attempt).or_default();
        *times += 1;
        if *times > 1 {
            self.breaks(format!("attempt {attempt} begins a second time"));
        }
        if self.starts.len() > 1 && !self.scope.retry {
            self.breaks("it begins a second time, and nobody said retry".into());
        }
        // An attempt that was given up may begin when its order was under way.
        let kept = self.kept();
        if let Some((status, _)) = &kept
            && status.is_final()
            && *status != CommandStatus::Unknown
        {
            self.breaks(format!("it begins when it is {status}"));
        }
    }

    fn breaks(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    // ---- what must come of it -------------------------------------------

    /// Nothing else goes wrong, and everything takes its way: what is broken
    /// then.
    pub fn settle(&mut self) -> Result<(), String> {
        self.left =
            Faults { cuts: 0, agent_deaths: 0, hub_deaths: 0, refusals: 0, interrupts: 0, ages: 2 };
        for _ in 0..500 {
            // Time passes when nothing else is left to happen.
            let Some(step) = self.steps().first().copied() else { break };
            self.step(step);
        }
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let shown = self.roster.roster().command(command()).map(|state| state.status);
        let kept = self.kept().map(|(status, _)| status);
        if shown != kept {
            return Err(format!("shown is {shown:?}, and on disk is {kept:?}"));
        }
        match (self.answered, kept) {
            (None, _) => Err("the request has no answer".into()),
            (Some(true), None) => Err("accepted, and lost".into()),
            (_, Some(status)) if !status.is_final() => Err(format!("it stays {status}")),
            _ if self.running.is_some() => Err("something still runs".into()),
            _ if !self.steps().is_empty() => Err(format!("it never rests: {:?}", self.steps())),
            _ => Ok(()),
        }
    }

    /// Two digests of everything.
    fn fingerprint(&self) -> (u64, u64) {
        canonical(&format!("{self:?}"))
    }
}

fn read<M: Direction>(frame: &Frame) -> Vec<M> {
    let messages = codec::decode::<M>(frame, Rules::from(&limits())).into_iter();
    messages.map(|message| message.expect("the hub speaks as agreed").message).collect()
}

/// A digest of a value that was printed with `{:?}`, in which sets and maps
/// count without their order: the entries of `{ … }` may stand in any.
pub fn canonical(text: &str) -> (u64, u64) {
    let (mut rest, mut hash) = (text.as_bytes(), (0, 0));
    while !rest.is_empty() {
        let (part, after) = entries(rest, b'\0');
        hash = mix(hash, part);
        rest = after;
    }
    hash
}

/// The digest of what comes up to `close`, and what follows it.
fn entries(text: &[u8], close: u8) -> ((u64, u64), &[u8]) {
    let (mut rest, mut entry, mut all) = (text, (1, 2), Vec::new());
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            byte if *byte == close => break,
            b'{' | b'[' | b'(' => {
                let end = match byte {
                    b'{' => b'}',
                    b'[' => b']',
                    _ => b')',
                };
                let (inner, after) = entries(rest, end);
                entry = mix(mix(entry, (u64::from(*byte), 3)), inner);
                rest = after;
            }
            b',' => all.push(std::mem::replace(&mut entry, (1, 2))),
            b' ' => {}
            b'"' => {
                let (inner, after) = quoted(rest);
                entry = mix(entry, inner);
                rest = after;
            }
            byte => entry = mix(entry, (u64::from(*byte), 6)),
        }
    }
    all.push(entry);
    if close == b'}' {
        all.sort_unstable();
    }
    (all.into_iter().fold((7, 8), mix), rest)
}

/// The digest of a quoted text, and what follows it.
fn quoted(text: &[u8]) -> ((u64, u64), &[u8]) {
    let mut is_escaped = false;
    let end = text.iter().position(|byte| {
        let ends = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        ends
    });
    let (inside, rest) = text.split_at(end.unwrap_or(text.len()));
    let hash = inside.iter().fold((4, 4), |hash, byte| mix(hash, (u64::from(*byte), 5)));
    (hash, rest.get(1..).unwrap_or_default())
}

fn mix(hash: (u64, u64), with: (u64, u64)) -> (u64, u64) {
    let one = (hash.0 ^ with.0).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let other = (hash.1.wrapping_add(with.1)).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).rotate_left(31);
    (one.wrapping_add(with.1), other ^ with.0.rotate_left(17))
}

/// Steps, and what they lead to.
#[derive(Debug, Clone)]
pub struct State {
    /// The steps.
    pub steps: Vec<Step>,
    next: Vec<Step>,
    fingerprint: (u64, u64),
    /// The promise that the last step broke.
    pub broken: Option<String>,
    last: Option<CommandStatus>,
    attempts: usize,
    resumed: bool,
    survived: bool,
}

impl State {
    fn new(steps: Vec<Step>, machine: &Machine) -> Self {
        let spent = |all: u8, left: u8| left < all;
        let (all, left) = (&machine.scope.faults, &machine.left);
        Self {
            steps,
            next: machine.steps(),
            fingerprint: machine.fingerprint(),
            broken: machine.broken.clone(),
            last: machine.last,
            attempts: machine.starts.len(),
            resumed: spent(all.cuts, left.cuts),
            survived: spent(all.hub_deaths, left.hub_deaths),
        }
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl Eq for State {}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.fingerprint.hash(state);
    }
}

/// The model that is checked.
#[derive(Debug, Clone, Copy)]
pub struct CommandModel(pub Scope);

impl Model for CommandModel {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(Vec::new(), &Machine::new(self.0))]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        actions.extend_from_slice(&state.next);
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut steps = last.steps.clone();
        steps.push(step);
        let machine = Machine::after(self.0, &steps);
        Some(State::new(steps, &machine))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no promise is broken", |_, state: &State| state.broken.is_none()),
            Property::always("it can always end well", |model: &Self, state: &State| {
                Machine::after(model.0, &state.steps).settle().is_ok()
            }),
            Property::sometimes("it completes", |_, state: &State| {
                state.last == Some(CommandStatus::Completed)
            }),
            Property::sometimes("it expires", |_, state: &State| {
                state.last == Some(CommandStatus::Expired)
            }),
            Property::sometimes("it is interrupted before it begins", |_, state: &State| {
                state.last == Some(CommandStatus::Interrupted) && state.attempts == 0
            }),
            Property::sometimes("it becomes unknown", |_, state: &State| {
                state.last == Some(CommandStatus::Unknown)
            }),
            Property::sometimes("it completes over a cut", |_, state: &State| {
                state.last == Some(CommandStatus::Completed) && state.resumed
            }),
            Property::sometimes("it completes over the hub's death", |_, state: &State| {
                state.last == Some(CommandStatus::Completed) && state.survived
            }),
            Property::sometimes("it is tried again", |_, state: &State| state.attempts > 1),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_order_of_sets_does_not_count() {
        let same = [
            ("X { a: {1, 2}, b: [3] }", "X { b: [3], a: {2, 1} }"),
            (r#"{"a, \"b": 1, "c": {2: 3, 4: 5}}"#, r#"{"c": {4: 5, 2: 3}, "a, \"b": 1}"#),
        ];
        for (one, other) in same {
            assert_eq!(canonical(one), canonical(other), "{one}");
        }
        let different = [
            ("[1, 2]", "[2, 1]"),
            ("(1, 2)", "(2, 1)"),
            ("{1, 2}", "{1, 3}"),
            ("{1}, {2}", "{2}, {1}"),
            ("{{1}, 2}", "{1, {2}}"),
            ("{12}", "{1, 2}"),
            ("[1, 1]", "[1]"),
            ("{1, 1}", "{1}"),
            (r#""{a, b}""#, r#""{b, a}""#),
            (r#"["a", "b"]"#, r#"["a, b"]"#),
            (r#""\"", 1"#, r#""\"", 2"#),
            ("", "a"),
        ];
        for (one, other) in different {
            assert_ne!(canonical(one), canonical(other), "{one} and {other}");
        }
    }

    #[test]
    fn the_same_steps_lead_to_the_same_state() {
        let faults =
            Faults { cuts: 1, agent_deaths: 1, hub_deaths: 1, refusals: 0, interrupts: 1, ages: 1 };
        let scope = Scope { retry: true, journal: true, faults };
        let mut steps = Vec::new();
        for n in 0..40 {
            let machine = Machine::after(scope, &steps);
            let again = Machine::after(scope, &steps);
            assert_eq!(machine.fingerprint(), again.fingerprint(), "{steps:?}");
            let next = machine.steps();
            let Some(step) = next.get(n * 7 % next.len().max(1)) else { break };
            steps.push(*step);
        }
        assert!(steps.len() > 15, "{steps:?}");
    }
}
