//! An agent without clock, socket or task: what it holds, how far the hub has
//! taken its output, and what it says.
//!
//! Each command that was ever given to this process and is not forgotten is in
//! one table, with the tail of its output. A link carries nothing but the way
//! there: on a new one the table is listed in the greeting, the hub says how
//! far it is with each stream, and sending goes on from there.

mod tail;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, DashboardId, InstanceId, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::liveness::{Due, Liveness};
use trunkline_protocol::message::{
    AgentAbout, AgentConnect, AgentReport, AgentToHub, Channel, CommandAccepted, CommandComplete,
    CommandEnd, CommandExecute, CommandInterrupt, CommandInterrupting, CommandSpec, CommandStarted,
    CommandStatus, ConnectionAck, ControlAction, Disconnect, Envelope, ErrorCode, Feature,
    Greeting, HeartbeatBeat, HeldCommand, HubToAgent, InterruptStage, LinkLimits, PROTOCOLS, Peer,
    Refusal, Secret, TerminalInput, TerminalInputTaken, TerminalSize, TerminalTaken,
};
use trunkline_protocol::stream::Coalescing;
use trunkline_protocol::time::Now;

use self::tail::{Sent, Tail};
use super::dialing::{Backoff, ConnectionState, DialAction, Dialing};
use crate::handler::{ExecutionEvent, Outcome};

/// Commands whose highest attempt is remembered after they are forgotten.
const FENCES_MAX: usize = 4096;

/// Settled commands whose output is kept for a hub that forgets.
const SETTLED_MAX: usize = 64;

/// Memory of the output of all settled commands together.
const SETTLED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long a settled command's output is kept.
const SETTLED_KEPT: Duration = Duration::from_secs(15 * 60);

/// Input that may wait for one handler.
const INPUT_BYTES_MAX: usize = 256 * 1024;

/// How much longer than its grace a handler has to end.
const GRACE_MARGIN: Duration = Duration::from_secs(5);

/// Control messages that may wait for the link.
const CONTROL_MAX: usize = 4096;

/// How an agent is set up.
#[derive(Debug, Clone)]
pub struct AgentSetup {
    /// The id it proposes.
    pub agent: AgentId,
    /// What it says about itself.
    pub about: AgentAbout,
    /// Commands at a time; at least 1.
    pub slots: u32,
    /// Memory of the tail of one stream's output. 8 MiB.
    pub tail_bytes: usize,
    /// How long a program is held when its tail is full of what the hub has
    /// not taken; then it goes on and the oldest output is lost. 30 s.
    pub tail_hold: Duration,
    /// How small writes are gathered.
    pub coalescing: Coalescing,
    /// How long a program has to end when interrupted, unless the interrupt
    /// says otherwise. 5 s.
    pub grace: Duration,
    /// How it reconnects.
    pub backoff: Backoff,
    /// Whether a refused token can be replaced.
    pub can_renew_token: bool,
}

impl AgentSetup {
    /// Defaults for an agent of this name.
    pub fn new(agent: AgentId) -> Self {
        Self {
            agent,
            about: AgentAbout::default(),
            slots: 1,
            tail_bytes: 8 * 1024 * 1024,
            tail_hold: Duration::from_secs(30),
            coalescing: Coalescing::default(),
            grace: Duration::from_secs(5),
            backoff: Backoff::default(),
            can_renew_token: false,
        }
    }
}

/// What the core has to tell its shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentOutput {
    /// A command is to be run: see [`AgentCore::begin`].
    Execute(CommandId),
    /// There is an event for its handler: see [`AgentCore::take_event`].
    Event(CommandId),
    /// There may be room for its output again.
    Room(CommandId),
    /// It did not end in time and is over: its handler is to be dropped.
    Kill(CommandId),
    /// The hub wants a report.
    Report,
}

#[derive(Debug)]
enum Link {
    None,
    /// `None` once the greeting is out.
    Greeting(Option<Box<AgentConnect>>),
    Up(Box<Up>),
    /// Last frames.
    Closing(VecDeque<Frame>),
}

#[derive(Debug)]
struct Up {
    liveness: Liveness,
    limits: LinkLimits,
    binary: bool,
    control: VecDeque<Frame>,
}

#[derive(Debug)]
struct Held {
    attempt: u32,
    spec: CommandSpec,
    stage: Stage,
    tail: Option<Tail>,
    /// Events that wait for the handler, an interrupt ahead of all.
    interrupt: Option<Duration>,
    resize: Option<TerminalSize>,
    input: VecDeque<(DashboardId, Bytes)>,
    input_bytes: usize,
    writers: BTreeMap<DashboardId, Writer>,
    /// When its time to run is over.
    run_until: Option<Duration>,
    timed_out: bool,
    /// When a handler that was asked to end is dropped.
    kill_at: Option<Duration>,
    signalled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// Given, and not begun.
    Accepted,
    Running,
    Ended {
        status: CommandStatus,
        end: CommandEnd,
        settled: Option<Duration>,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Writer {
    /// Handed to the handler.
    taken: u64,
    /// Received, some of it not yet handed over.
    received: u64,
    /// Whether it is to be told, and whether it must send again.
    tell: bool,
    resend: bool,
}

/// The pure half of an agent.
#[derive(Debug)]
pub struct AgentCore {
    setup: AgentSetup,
    me: AgentId,
    instance: InstanceId,
    rng: StdRng,
    dialing: Dialing,
    rules: Rules,
    link: Link,
    commands: BTreeMap<CommandId, Held>,
    /// Streams take turns.
    turn: Option<CommandId>,
    fences: HashMap<CommandId, u32>,
    fence_order: VecDeque<CommandId>,
    report: Option<AgentReport>,
    stopping: Option<Duration>,
    outputs: VecDeque<AgentOutput>,
}

impl AgentCore {
    /// An agent that wants to dial at once.
    pub fn new(setup: AgentSetup, seed: [u8; 32], now: Now) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let instance = InstanceId::mint(now.wall_ms, rng.random());
        let dialing = Dialing::new(setup.backoff, setup.can_renew_token, rng.random());
        // The hub is the agent's own choice: its messages may be larger than
        // a stranger's.
        let rules = Rules { message_bytes_max: 4 << 20, ..Rules::from(&Limits::default()) };
        Self {
            me: setup.agent.clone(),
            setup,
            instance,
            rng,
            dialing,
            rules,
            link: Link::None,
            commands: BTreeMap::new(),
            turn: None,
            fences: HashMap::new(),
            fence_order: VecDeque::new(),
            report: None,
            stopping: None,
            outputs: VecDeque::new(),
        }
    }

    // ---- getters --------------------------------------------------------

    /// Who it is: as the hub said, once it has.
    pub fn id(&self) -> &AgentId {
        &self.me
    }

    /// This incarnation.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// The connection as its user sees it.
    pub fn connection(&self) -> &ConnectionState {
        self.dialing.state()
    }

    /// What it was given and has not ended.
    pub fn running(&self) -> impl Iterator<Item = CommandId> {
        self.commands
            .iter()
            .filter(|(_, held)| !matches!(held.stage, Stage::Ended { .. }))
            .map(|(id, _)| *id)
    }

    /// Memory of all output kept, in bytes.
    pub fn tail_bytes(&self) -> usize {
        self.commands.values().filter_map(|held| held.tail.as_ref()).map(Tail::cost).sum()
    }

    // ---- the application's side -----------------------------------------

    /// Begins a command that [`AgentOutput::Execute`] named: its attempt and
    /// what to run. `None` if it has been interrupted in between; it is then
    /// over and must not be run.
    pub fn begin(&mut self, id: CommandId, now: Now) -> Option<(u32, CommandSpec)> {
        let stream = StreamId::mint(now.wall_ms, self.rng.random());
        let held = self.commands.get_mut(&id)?;
        if held.stage != Stage::Accepted {
            return None;
        }
        held.stage = Stage::Running;
        let mut tail = Tail::new(stream, self.setup.tail_bytes, self.setup.coalescing);
        if let Link::Up(up) = &self.link {
            // Begun on this link: nothing to wait for.
            tail.position(0, up.limits.grant_bytes);
        }
        held.tail = Some(tail);
        let run_for = held.spec.run_for_ms.map(Duration::from_millis);
        held.run_until = run_for.map(|run_for| now.monotonic.saturating_add(run_for));
        let (attempt, spec) = (held.attempt, held.spec.clone());
        self.say(AgentToHub::Started(CommandStarted { command: id, attempt, stream }));
        Some((attempt, spec))
    }

    /// Appends output. Takes from the front of `bytes` what the tail has room
    /// for; 0 means: wait for [`AgentOutput::Room`]. Output of a command that
    /// has ended is taken and dropped.
    pub fn write(&mut self, id: CommandId, channel: Channel, bytes: &[u8], now: Now) -> usize {
        let patience = self.setup.tail_hold;
        let Some(held) = self.commands.get_mut(&id) else { return bytes.len() };
        let (Stage::Running, Some(tail)) = (&held.stage, &mut held.tail) else {
            return bytes.len();
        };
        tail.write(channel, bytes, patience, now.monotonic)
    }

    /// The process group was signalled.
    pub fn signalled(&mut self, id: CommandId) {
        let Some(held) = self.commands.get_mut(&id) else { return };
        if held.stage == Stage::Running && !held.signalled {
            held.signalled = true;
            let attempt = held.attempt;
            let stage = InterruptStage::Signalled;
            self.say(AgentToHub::Interrupting(CommandInterrupting { command: id, attempt, stage }));
        }
    }

    /// The next event for a command's handler; without `input`, only those
    /// that are none. Taking input is what acknowledges it.
    pub fn take_event(&mut self, id: CommandId, input: bool) -> Option<ExecutionEvent> {
        let held = self.commands.get_mut(&id)?;
        if let Some(grace) = held.interrupt.take() {
            return Some(ExecutionEvent::Interrupt { grace });
        }
        if let Some(size) = held.resize.take() {
            return Some(ExecutionEvent::Resize(size));
        }
        if !input {
            return None;
        }
        let (writer, data) = held.input.pop_front()?;
        held.input_bytes -= data.len();
        if let Some(state) = held.writers.get_mut(&writer) {
            state.taken += data.len() as u64;
            state.tell = true;
        }
        Some(ExecutionEvent::Input(data))
    }

    /// A command's handler has ended. The first word counts.
    pub fn ended(&mut self, id: CommandId, outcome: Outcome, now: Now) {
        let Some(held) = self.commands.get_mut(&id) else { return };
        let status = match (&outcome, held.timed_out, held.signalled) {
            (Outcome::Failed(_), false, false) => CommandStatus::Failed,
            (_, true, _) => CommandStatus::TimedOut,
            (Outcome::Interrupted, ..) | (_, _, true) => CommandStatus::Interrupted,
            (Outcome::Exited(_) | Outcome::Signalled(_), false, false) => CommandStatus::Completed,
        };
        let end = match outcome {
            Outcome::Exited(code) => CommandEnd { exit_code: Some(code), ..CommandEnd::default() },
            Outcome::Signalled(number) => {
                CommandEnd { signal: Some(number), ..CommandEnd::default() }
            }
            Outcome::Failed(error) => {
                let error = error.chars().take(1024).collect();
                CommandEnd { error: Some(error), ..CommandEnd::default() }
            }
            Outcome::Interrupted => CommandEnd::default(),
        };
        self.end(id, status, end);
        self.consider_stopped(now);
    }

    fn end(&mut self, id: CommandId, status: CommandStatus, mut end: CommandEnd) {
        let Some(held) = self.commands.get_mut(&id) else { return };
        if matches!(held.stage, Stage::Ended { .. }) {
            return;
        }
        if let Some(tail) = &mut held.tail {
            (end.end, end.digest) = tail.finish();
        }
        held.run_until = None;
        held.kill_at = None;
        held.interrupt = None;
        held.input.clear();
        held.input_bytes = 0;
        held.stage = Stage::Ended { status, end: end.clone(), settled: None };
        let attempt = held.attempt;
        self.say(AgentToHub::Complete(CommandComplete { command: id, attempt, status, end }));
    }

    /// Reports figures; only the newest that waits is sent.
    pub fn report(&mut self, report: AgentReport) {
        self.report = Some(report);
    }

    /// Dials at once instead of waiting for the next attempt.
    pub fn retry_now(&mut self, now: Now) {
        self.dialing.retry_now(now);
    }

    /// Ends in order: running commands are interrupted, what they wrote goes
    /// out, then a goodbye. At the latest after the grace and some seconds.
    pub fn stop(&mut self, now: Now) {
        if self.stopping.is_some() || self.dialing.is_over() {
            return;
        }
        let patience = self.setup.grace + 2 * GRACE_MARGIN;
        self.stopping = Some(now.monotonic + patience);
        let running: Vec<CommandId> = self.running().collect();
        for id in running {
            self.interrupt(id, None, now);
        }
        self.consider_stopped(now);
    }

    /// Says goodbye once nothing runs and nothing waits to be sent.
    fn consider_stopped(&mut self, now: Now) {
        let Some(until) = self.stopping else { return };
        let late = now.monotonic >= until;
        let busy = self.running().next().is_some()
            || self.commands.values().filter_map(|held| held.tail.as_ref()).any(Tail::is_sending);
        let up = matches!(self.link, Link::Up(_));
        if (busy && !late && up) || self.dialing.is_over() {
            return;
        }
        if busy && !up && self.running().next().is_some() && !late {
            return;
        }
        let mut last = match std::mem::replace(&mut self.link, Link::None) {
            Link::Up(up) => {
                let goodbye = AgentToHub::Disconnect(Disconnect { reason: None });
                let mut last = up.control;
                last.push_back(codec::encode(&Envelope::bare(goodbye)));
                last
            }
            Link::Greeting(_) | Link::Closing(_) => VecDeque::new(),
            Link::None => {
                self.dialing.stop(now);
                return;
            }
        };
        last.push_back(Frame::Close(Close::new(CloseCode::Normal, "stopped")));
        self.link = Link::Closing(last);
        self.dialing.stop(now);
    }

    // ---- the link's side ------------------------------------------------

    /// A link is there: the hub is greeted on it.
    pub fn handle_dialed(&mut self, token: Option<Secret>, now: Now) {
        self.dialing.handle_dialed(now);
        if self.dialing.is_over() {
            return;
        }
        for held in self.commands.values_mut() {
            if let Some(tail) = &mut held.tail {
                tail.handle_link();
            }
        }
        let commands = self.commands.iter().map(|(id, held)| held.listed(*id)).collect();
        let greeting = AgentConnect {
            protocols: PROTOCOLS.to_vec(),
            agent: self.setup.agent.clone(),
            instance: self.instance,
            token,
            about: self.setup.about.clone(),
            slots: self.setup.slots.max(1),
            features: vec![Feature::Binary, Feature::Batch],
            commands,
        };
        self.link = Link::Greeting(Some(Box::new(greeting)));
    }

    /// No link could be made.
    pub fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.dialing.handle_dial_failed(close, now);
    }

    /// The link is gone, by the hub's close or without one.
    pub fn handle_lost(&mut self, close: &Close, now: Now) {
        self.link = Link::None;
        self.dialing.handle_lost(close, now);
        self.consider_stopped(now);
    }

    /// A frame arrived.
    pub fn handle_frame(&mut self, frame: &Frame, now: Now) {
        if let Link::Up(up) = &mut self.link {
            up.liveness.handle_heard(now.monotonic);
        }
        for message in codec::decode::<HubToAgent>(frame, self.rules) {
            match (message, &mut self.link) {
                (Ok(Envelope { message, .. }), Link::Up(_)) => self.handle_message(message, now),
                (Ok(Envelope { message: HubToAgent::Ack(ack), .. }), Link::Greeting(_)) => {
                    self.handle_ack(ack, now);
                }
                (Ok(Envelope { message: HubToAgent::Error(refusal), .. }), Link::Greeting(_)) => {
                    // The close that follows says what to do.
                    tracing::warn!(target: "trunkline::client", code = %refusal.code, message = %refusal.message, "greeting refused");
                }
                (Ok(_) | Err(_), Link::Greeting(_)) => {
                    self.hang_up(Close::new(CloseCode::Violation, "no acknowledgement"));
                }
                (Err(invalid), Link::Up(_)) => {
                    tracing::warn!(target: "trunkline::client", error = %invalid.error, "the hub said what cannot be understood");
                    self.say(AgentToHub::Error(invalid.refusal()));
                }
                (_, Link::None | Link::Closing(_)) => {}
            }
        }
        self.consider_stopped(now);
    }

    fn hang_up(&mut self, close: Close) {
        self.link = Link::Closing(VecDeque::from([Frame::Close(close)]));
    }

    fn handle_ack(&mut self, ack: ConnectionAck, now: Now) {
        let Peer::Agent(me) = ack.peer else {
            self.hang_up(Close::new(
                CloseCode::Violation,
                "the acknowledgement is for a dashboard",
            ));
            return;
        };
        self.me = me;
        let idle = Duration::from_millis(ack.heartbeat.idle_ms.max(1));
        let timeout = Duration::from_millis(ack.heartbeat.timeout_ms.max(1));
        self.link = Link::Up(Box::new(Up {
            liveness: Liveness::new(idle, timeout, now.monotonic),
            limits: ack.limits,
            binary: ack.features.contains(&Feature::Binary),
            control: VecDeque::new(),
        }));
        self.dialing.handle_acked(now);
        // What has begun or ended between the greeting and now was not listed
        // as such: it is said again; the hub takes the same word twice.
        let said: Vec<AgentToHub> =
            self.commands.iter().flat_map(|(id, held)| held.words(*id)).collect();
        for word in said {
            self.say(word);
        }
        for held in self.commands.values_mut() {
            for writer in held.writers.values_mut() {
                // What was under way when the last link was lost is gone.
                writer.tell = true;
                writer.resend = true;
            }
        }
    }

    fn handle_message(&mut self, message: HubToAgent, now: Now) {
        match message {
            // Renewing a token in band is not offered yet: the next connection
            // carries a new one in any case.
            HubToAgent::Ack(_)
            | HubToAgent::Ok(_)
            | HubToAgent::RefreshNeeded(_)
            | HubToAgent::RefreshSuccess(_)
            | HubToAgent::RefreshFailed(_) => {}
            HubToAgent::Execute(execute) => self.execute(execute, now),
            HubToAgent::Interrupt(interrupt) => self.handle_interrupt(&interrupt, now),
            HubToAgent::Settled(settled) => self.settle(settled.command, settled.attempt, now),
            HubToAgent::Input(input) => self.handle_input(input),
            HubToAgent::Resize(resize) => {
                if let Some(held) = self.commands.get_mut(&resize.command)
                    && !matches!(held.stage, Stage::Ended { .. })
                {
                    held.resize = Some(resize.size);
                    self.outputs.push_back(AgentOutput::Event(resize.command));
                }
            }
            HubToAgent::Taken(taken) => self.handle_taken(&taken),
            HubToAgent::Control(control) => match control.action {
                ControlAction::Report => self.outputs.push_back(AgentOutput::Report),
                ControlAction::Stop => self.stop(now),
                ControlAction::Other(_) => {
                    let refusal = Refusal::new(ErrorCode::Unsupported, "no such action");
                    self.say(AgentToHub::Error(refusal.field("payload.action")));
                }
            },
            HubToAgent::Error(refusal) => {
                tracing::warn!(target: "trunkline::client", code = %refusal.code, message = %refusal.message, "the hub refused");
                if matches!(refusal.field.as_deref(), Some("payload.offset" | "payload.from")) {
                    for held in self.commands.values_mut() {
                        if let Some(tail) = &mut held.tail {
                            tail.rewind();
                        }
                    }
                }
            }
            HubToAgent::Ping(ping) => self.say(AgentToHub::Pong(ping)),
            HubToAgent::Pong(pong) => {
                if let Link::Up(up) = &mut self.link {
                    up.liveness.handle_pong(pong.n, now.monotonic);
                }
            }
        }
    }

    // ---- commands -------------------------------------------------------

    fn execute(&mut self, execute: CommandExecute, now: Now) {
        let CommandExecute { command: id, attempt, spec } = execute;
        if let Some(held) = self.commands.get(&id) {
            if held.attempt == attempt {
                // Told twice, run once.
                let words = held.words(id);
                self.say(AgentToHub::Accepted(CommandAccepted { command: id, attempt }));
                for word in words {
                    self.say(word);
                }
                return;
            }
            if held.attempt > attempt || !matches!(held.stage, Stage::Ended { .. }) {
                return;
            }
            self.commands.remove(&id);
        } else if self.fences.get(&id).is_some_and(|known| *known >= attempt) {
            return;
        }
        self.fence(id, attempt);
        self.commands.insert(id, Held::new(attempt, spec));
        self.say(AgentToHub::Accepted(CommandAccepted { command: id, attempt }));
        if self.stopping.is_some() {
            let error = Some("the agent is stopping".to_owned());
            self.end(id, CommandStatus::Failed, CommandEnd { error, ..CommandEnd::default() });
            self.consider_stopped(now);
            return;
        }
        self.outputs.push_back(AgentOutput::Execute(id));
    }

    fn fence(&mut self, id: CommandId, attempt: u32) {
        if self.fences.insert(id, attempt).is_none() {
            self.fence_order.push_back(id);
            if self.fence_order.len() > FENCES_MAX
                && let Some(oldest) = self.fence_order.pop_front()
            {
                self.fences.remove(&oldest);
            }
        }
    }

    fn handle_interrupt(&mut self, interrupt: &CommandInterrupt, now: Now) {
        let id = interrupt.command;
        let Some(held) = self.commands.get(&id) else {
            let refusal = Refusal::new(ErrorCode::NotFound, "no such command");
            self.say(AgentToHub::Error(refusal.field("payload.command")));
            return;
        };
        let attempt = held.attempt;
        if interrupt.attempt.is_some_and(|named| named != attempt) {
            return;
        }
        if !matches!(held.stage, Stage::Ended { .. }) {
            let stage = InterruptStage::Delivered;
            let word = CommandInterrupting { command: id, attempt, stage };
            self.say(AgentToHub::Interrupting(word));
        }
        self.interrupt(id, interrupt.grace_ms.map(Duration::from_millis), now);
    }

    fn interrupt(&mut self, id: CommandId, grace: Option<Duration>, now: Now) {
        let grace = grace.unwrap_or(self.setup.grace);
        let Some(held) = self.commands.get_mut(&id) else { return };
        match held.stage {
            Stage::Accepted => {
                // Not begun, and now never will be.
                self.end(id, CommandStatus::Interrupted, CommandEnd::default());
            }
            Stage::Running => {
                held.interrupt = Some(grace);
                let kill_at = now.monotonic.saturating_add(grace).saturating_add(GRACE_MARGIN);
                held.kill_at = Some(held.kill_at.map_or(kill_at, |known| known.min(kill_at)));
                self.outputs.push_back(AgentOutput::Event(id));
            }
            Stage::Ended { .. } => {}
        }
    }

    fn settle(&mut self, id: CommandId, attempt: u32, now: Now) {
        let Some(held) = self.commands.get_mut(&id) else { return };
        if held.attempt != attempt {
            return;
        }
        if let Stage::Ended { settled, .. } = &mut held.stage {
            settled.get_or_insert(now.monotonic);
        }
        self.forget(now.monotonic);
    }

    /// Drops settled commands that were kept long enough, or are too many.
    fn forget(&mut self, now: Duration) {
        let kept = |held: &Held| match &held.stage {
            Stage::Ended { settled: Some(at), .. } => Some(*at),
            Stage::Ended { settled: None, .. } | Stage::Accepted | Stage::Running => None,
        };
        let mut settled: Vec<(Duration, CommandId)> =
            self.commands.iter().filter_map(|(id, held)| Some((kept(held)?, *id))).collect();
        settled.sort_unstable();
        let cost = |held: &Held| held.tail.as_ref().map_or(0, Tail::cost);
        let ids = settled.iter().filter_map(|(_, id)| self.commands.get(id));
        let mut bytes: usize = ids.map(cost).sum();
        let mut count = settled.len();
        for (at, id) in settled {
            let Some(held) = self.commands.get(&id) else { continue };
            let old = at + SETTLED_KEPT <= now || held.tail.is_none();
            if old || count > SETTLED_MAX || bytes > SETTLED_BYTES_MAX {
                count -= 1;
                bytes -= cost(held);
                self.commands.remove(&id);
            }
        }
    }

    // ---- input ----------------------------------------------------------

    fn handle_input(&mut self, input: TerminalInput) {
        let TerminalInput { command, writer, offset, data } = input;
        let Some(writer) = writer else { return };
        let Some(held) = self.commands.get_mut(&command) else { return };
        if held.stage != Stage::Running {
            return;
        }
        let state = held.writers.entry(writer.clone()).or_default();
        if offset > state.received {
            // Something in between was lost.
            state.tell = true;
            state.resend = true;
            return;
        }
        let known = usize::try_from(state.received - offset).unwrap_or(usize::MAX);
        if known >= data.len() {
            state.tell = true; // it does not know that this had arrived
            return;
        }
        let new = data.slice(known..);
        if held.input_bytes + new.len() > INPUT_BYTES_MAX {
            return; // the writer asks again, or is asked when there is room
        }
        state.received += new.len() as u64;
        held.input_bytes += new.len();
        held.input.push_back((writer, new));
        self.outputs.push_back(AgentOutput::Event(command));
    }

    // ---- output ---------------------------------------------------------

    fn handle_taken(&mut self, taken: &TerminalTaken) {
        for (id, held) in &mut self.commands {
            let Some(tail) = held.tail.as_mut().filter(|tail| tail.stream() == taken.stream) else {
                continue;
            };
            if tail.handle_taken(taken.stored, taken.allowed) {
                self.outputs.push_back(AgentOutput::Room(*id));
            }
            return;
        }
    }

    /// The next piece of output, streams taking turns.
    fn poll_bulk(&mut self, now: Duration) -> Option<Sent> {
        let after = self.turn;
        let ids: Vec<CommandId> = match after {
            Some(after) => {
                let (before, rest): (Vec<_>, Vec<_>) =
                    self.commands.keys().copied().partition(|id| *id <= after);
                rest.into_iter().chain(before).collect()
            }
            None => self.commands.keys().copied().collect(),
        };
        for id in ids {
            let tail = self.commands.get_mut(&id).and_then(|held| held.tail.as_mut());
            if let Some(sent) = tail.and_then(|tail| tail.poll_send(now)) {
                self.turn = Some(id);
                return Some(sent);
            }
        }
        None
    }

    // ---- time and outputs -----------------------------------------------

    /// A deadline has come.
    pub fn handle_timeout(&mut self, now: Now) {
        self.dialing.handle_timeout(now);
        let mut late = Vec::new();
        let mut killed = Vec::new();
        for (id, held) in &mut self.commands {
            if held.run_until.is_some_and(|until| until <= now.monotonic) {
                held.run_until = None;
                held.timed_out = true;
                late.push(*id);
            }
            if held.kill_at.is_some_and(|at| at <= now.monotonic) {
                held.kill_at = None;
                killed.push(*id);
            }
            let hold = self.setup.tail_hold;
            if held.tail.as_mut().is_some_and(|tail| tail.handle_timeout(hold, now.monotonic)) {
                self.outputs.push_back(AgentOutput::Room(*id));
            }
        }
        for id in late {
            self.interrupt(id, None, now);
        }
        for id in killed {
            let timed_out = self.commands.get(&id).is_some_and(|held| held.timed_out);
            let status =
                if timed_out { CommandStatus::TimedOut } else { CommandStatus::Interrupted };
            let error = Some("did not end when asked to".to_owned());
            self.end(id, status, CommandEnd { error, ..CommandEnd::default() });
            self.outputs.push_back(AgentOutput::Kill(id));
        }
        self.forget(now.monotonic);
        if let Link::Up(up) = &mut self.link {
            match up.liveness.poll(now.monotonic) {
                Due::Nothing => {}
                Due::Ping(n) => self.say(AgentToHub::Ping(HeartbeatBeat { n })),
                Due::Dead => self.hang_up(Close::new(CloseCode::Silent, "nothing was heard")),
            }
        }
        self.consider_stopped(now);
    }

    /// When [`handle_timeout`](Self::handle_timeout) is due, or
    /// [`poll_transmit`](Self::poll_transmit) has more.
    pub fn deadline(&self) -> Option<Duration> {
        let up = match &self.link {
            Link::Up(up) => Some(up.liveness.deadline()),
            Link::None | Link::Greeting(_) | Link::Closing(_) => None,
        };
        let hold = self.setup.tail_hold;
        let commands = self.commands.values().flat_map(|held| {
            let tail = held.tail.as_ref();
            let coalesced = tail.filter(|_| up.is_some()).and_then(Tail::send_deadline);
            let settled = match held.stage {
                Stage::Ended { settled: Some(at), .. } => Some(at + SETTLED_KEPT),
                Stage::Ended { settled: None, .. } | Stage::Accepted | Stage::Running => None,
            };
            let held_until = tail.and_then(|tail| tail.hold_deadline(hold));
            [held.run_until, held.kill_at, coalesced, settled, held_until]
        });
        let others =
            [self.dialing.deadline(), up, self.stopping.filter(|_| !self.dialing.is_over())];
        others.into_iter().chain(commands).flatten().min()
    }

    /// What to do about the link.
    pub fn poll_dial(&mut self) -> Option<DialAction> {
        let action = self.dialing.poll_action();
        if action == Some(DialAction::HangUp) {
            self.link = Link::None;
        }
        action
    }

    /// The next thing to tell the shell.
    pub fn poll_output(&mut self) -> Option<AgentOutput> {
        self.outputs.pop_front()
    }

    /// The next frame for the link: control first, then how far input has
    /// got and the latest report, then output.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Frame> {
        let frame = match &mut self.link {
            Link::None => None,
            Link::Closing(last) => return last.pop_front(),
            Link::Greeting(greeting) => {
                let greeting = *greeting.take()?;
                return Some(codec::encode(&Envelope::bare(Greeting::Agent(greeting))));
            }
            Link::Up(up) => up.control.pop_front(),
        };
        if let Link::None = self.link {
            return None;
        }
        let frame = frame.or_else(|| self.poll_soft()).or_else(|| self.poll_output_frame(now));
        if frame.is_some()
            && let Link::Up(up) = &mut self.link
        {
            up.liveness.handle_said(now.monotonic);
        }
        frame
    }

    /// Latest states: of these only the newest is worth sending.
    fn poll_soft(&mut self) -> Option<Frame> {
        for (id, held) in &mut self.commands {
            for (name, writer) in &mut held.writers {
                if !std::mem::take(&mut writer.tell) {
                    continue;
                }
                let resend = std::mem::take(&mut writer.resend);
                if resend {
                    // What was received and not handed over will come again.
                    let left = held.input.iter().filter(|(from, _)| from == name);
                    let dropped: usize = left.map(|(_, data)| data.len()).sum();
                    held.input.retain(|(from, _)| from != name);
                    held.input_bytes -= dropped;
                    writer.received = writer.taken;
                }
                let taken = TerminalInputTaken {
                    command: *id,
                    writer: name.clone(),
                    offset: writer.taken,
                    resend,
                };
                return Some(codec::encode(&Envelope::bare(AgentToHub::InputTaken(taken))));
            }
        }
        let report = self.report.take()?;
        Some(codec::encode(&Envelope::bare(AgentToHub::Status(report))))
    }

    fn poll_output_frame(&mut self, now: Now) -> Option<Frame> {
        let binary = matches!(&self.link, Link::Up(up) if up.binary);
        Some(match self.poll_bulk(now.monotonic)? {
            Sent::Chunk(frame) if binary => Frame::Binary(frame),
            Sent::Chunk(frame) => {
                let (header, data) = codec::decode_output(&frame, self.rules).ok()?;
                Frame::Text(codec::encode_output_text(&header, &data))
            }
            Sent::Gap(gap) => codec::encode(&Envelope::bare(AgentToHub::Gap(gap))),
        })
    }

    /// Puts a control message in the line of the present link, if there is
    /// one: what it says is part of the next greeting otherwise.
    fn say(&mut self, message: AgentToHub) {
        if let Link::Up(up) = &mut self.link {
            if up.control.len() >= CONTROL_MAX {
                self.hang_up(Close::new(CloseCode::Lagging, "the hub does not read"));
                return;
            }
            up.control.push_back(codec::encode(&Envelope::bare(message)));
        }
    }
}

impl Held {
    fn new(attempt: u32, spec: CommandSpec) -> Self {
        Self {
            attempt,
            spec,
            stage: Stage::Accepted,
            tail: None,
            interrupt: None,
            resize: None,
            input: VecDeque::new(),
            input_bytes: 0,
            writers: BTreeMap::new(),
            run_until: None,
            timed_out: false,
            kill_at: None,
            signalled: false,
        }
    }

    /// As the greeting lists it.
    fn listed(&self, id: CommandId) -> HeldCommand {
        let (status, end) = match &self.stage {
            Stage::Accepted => (CommandStatus::Dispatched, None),
            Stage::Running => (CommandStatus::Running, None),
            Stage::Ended { status, end, .. } => (*status, Some(end.clone())),
        };
        HeldCommand {
            command: id,
            attempt: self.attempt,
            status,
            spec: Some(self.spec.clone()),
            stream: self.tail.as_ref().map(Tail::listed),
            end,
        }
    }

    /// What has been said of it so far, to be said again.
    fn words(&self, id: CommandId) -> Vec<AgentToHub> {
        let attempt = self.attempt;
        let mut words = Vec::new();
        if let Some(tail) = &self.tail {
            let stream = tail.stream();
            words.push(AgentToHub::Started(CommandStarted { command: id, attempt, stream }));
        }
        if self.signalled {
            let stage = InterruptStage::Signalled;
            words.push(AgentToHub::Interrupting(CommandInterrupting {
                command: id,
                attempt,
                stage,
            }));
        }
        if let Stage::Ended { status, end, settled: None } = &self.stage {
            let (status, end) = (*status, end.clone());
            words.push(AgentToHub::Complete(CommandComplete { command: id, attempt, status, end }));
        }
        words
    }
}
