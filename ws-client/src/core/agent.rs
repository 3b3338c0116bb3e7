//! An agent without clock, socket or task: what it holds, how far the hub has
//! taken its output, and what it says.
//!
//! Each command that was ever given to this process and is not forgotten is in
//! one table, with the tail of its output. A link carries nothing but the way
//! there: on a new one the table is listed in the greeting, the hub says how
//! far it is with each stream, and sending goes on from there.
//!
//! ```text
//!             handle_dialed             ack                  handle_lost
//!   no link ────────────────► Greeting ─────► Up ──────────────────────────► no link
//!                             what is held    │ what happened since
//!                                             │ `terminal:taken`: go on from there
//!                                             ▼
//!                                  control, then input taken
//!                                  and figures, then output,
//!                                  then log records
//! ```

mod commands;
mod execution;
mod greeting;
mod held;
mod journal;
mod output;
mod recording;
mod tail;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, InstanceId, RequestId, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::liveness::{Due, Liveness};
use trunkline_protocol::message::{
    AgentAbout, AgentConnect, AgentReport, AgentToHub, Channel, CommandSpec, ConnectionAck,
    ControlAction, Disconnect, Envelope, ErrorCode, Feature, HeartbeatBeat, HeldCommand,
    HubToAgent, LinkLimits, LogRecord, Peer, RefreshToken, Refusal, Secret,
};
use trunkline_protocol::stream::Coalescing;
use trunkline_protocol::time::Now;

pub use self::execution::{ExecutionEvent, Outcome};
pub use self::journal::{Attempts, JournalRecord, Recovered};

use self::held::Held;
use self::recording::Recording;
use self::tail::Tail;
use super::dialing::{Backoff, ConnectionState, DialAction, Dialing};
use super::logs::LogTail;
use super::{Pace, Refresh, RefreshWanted};

/// Commands whose highest attempt is remembered after they are forgotten, by an
/// agent and by its journal.
pub const FENCES_MAX: usize = 4096;

/// How much longer than its grace a handler has to end.
const GRACE_MARGIN: Duration = Duration::from_secs(5);

/// How long the close of this side may take to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Control messages that may wait for the link.
const CONTROL_MAX: usize = 4096;

/// How an agent is set up.
#[derive(Debug, Clone)]
pub struct AgentSetup {
    /// The id it proposes.
    pub agent: AgentId,
    /// What it says about itself.
    pub about: AgentAbout,
    /// Commands at a time; at least 1. What the hub gives beyond that waits
    /// here.
    pub slots: u32,
    /// Memory of the tail of one stream's output. 8 MiB; at least 64 KiB.
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
    /// What the journal remembers, if there is one. Nothing is then begun that
    /// it does not know of, and its instance is the agent's.
    pub journal: Option<Recovered>,
    /// The log that it forwards, if it does.
    pub logs: Option<LogTail>,
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
            journal: None,
            logs: None,
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
    /// This is to be written to the journal, as a whole: see
    /// [`AgentCore::handle_journaled`]. The next batch comes after the answer.
    Journal(Vec<JournalRecord>),
}

#[derive(Debug)]
enum Link {
    None,
    /// `None` once the greeting is out; and what it had no room for.
    Greeting(Option<Box<AgentConnect>>, Vec<HeldCommand>),
    Up(Box<Up>),
    /// This side has ended it: only these last frames go out.
    Closing {
        last: VecDeque<Frame>,
        why: Close,
        until: Option<Duration>,
    },
}

#[derive(Debug)]
struct Up {
    liveness: Liveness,
    limits: LinkLimits,
    binary: bool,
    control: VecDeque<Frame>,
}

/// The pure half of an agent.
///
/// Methods are of four sorts. *Getters* change nothing. *Inputs* (`handle_*`)
/// tell what happened on the link, and to the journal. *Commands* (`begin`, `write`, `ended`, …)
/// are what runs the commands and who owns the agent have to say. *Outputs*
/// are taken after any of the latter two: [`poll_output`](Self::poll_output)
/// until it is empty, [`poll_dial`](Self::poll_dial),
/// [`poll_transmit`](Self::poll_transmit) as often as the link takes frames;
/// and [`handle_timeout`](Self::handle_timeout) is called at
/// [`deadline`](Self::deadline).
#[derive(Debug)]
pub struct AgentCore {
    setup: AgentSetup,
    me: AgentId,
    instance: InstanceId,
    rng: StdRng,
    dialing: Dialing,
    /// The link is given up: the shell is to drop it.
    hangs_up: bool,
    rules: Rules,
    /// Longest message that the hub reads, as far as is known.
    message_bytes_max: usize,
    link: Link,
    commands: BTreeMap<CommandId, Held>,
    streams: HashMap<StreamId, CommandId>,
    /// Commands without a slot, in the order in which they were given.
    waiting: VecDeque<CommandId>,
    /// The command whose output went last; the ones after it come next.
    turn: Option<CommandId>,
    /// The highest attempt of commands given, the oldest forgotten first.
    fences: HashMap<CommandId, u32>,
    fence_order: VecDeque<CommandId>,
    /// What is to be written down; `None` without a journal.
    recording: Option<Recording>,
    /// The log that is forwarded; `None` for one that forwards none.
    logs: Option<LogTail>,
    /// The latest figures, and whether the hub has yet to hear them.
    report: Option<AgentReport>,
    report_unsaid: bool,
    pace: Pace,
    /// Until then what only counts in its newest value waits.
    conflating: Option<Duration>,
    refresh: Refresh,
    /// When to look for what may be forgotten.
    forget_at: Option<Duration>,
    /// When an agent that stops goes at the latest.
    stopping: Option<Duration>,
    outputs: VecDeque<AgentOutput>,
}

impl AgentCore {
    /// An agent that wants to dial at once. All its randomness comes from the
    /// seed.
    pub fn new(mut setup: AgentSetup, seed: [u8; 32], now: Now) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let minted = InstanceId::mint(now.wall_ms, rng.random());
        let (journal, logs) = (setup.journal.take(), setup.logs.take());
        let dialing = Dialing::new(setup.backoff, setup.can_renew_token, rng.random());
        let limits = Limits::default();
        // The hub is the agent's own choice: its messages may be larger than
        // a stranger's.
        let rules = Rules { message_bytes_max: 4 << 20, ..Rules::from(&limits) };
        let mut core = Self {
            me: setup.agent.clone(),
            setup,
            instance: journal.as_ref().map_or(minted, |journal| journal.instance),
            rng,
            dialing,
            hangs_up: false,
            rules,
            message_bytes_max: limits.message_bytes_max,
            link: Link::None,
            commands: BTreeMap::new(),
            streams: HashMap::new(),
            waiting: VecDeque::new(),
            turn: None,
            fences: HashMap::new(),
            fence_order: VecDeque::new(),
            recording: journal.as_ref().map(|_| Recording::default()),
            logs,
            report: None,
            report_unsaid: false,
            pace: Pace::default(),
            conflating: None,
            refresh: Refresh::default(),
            forget_at: None,
            stopping: None,
            outputs: VecDeque::new(),
        };
        if let Some(journal) = journal {
            core.recall(&journal.records);
        }
        core
    }

    // ---- getters --------------------------------------------------------

    /// Who it is: as the hub said, once it has.
    pub fn id(&self) -> &AgentId {
        &self.me
    }

    /// This incarnation; one that has the journal of another is still that one.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// The connection as its user sees it.
    pub fn connection(&self) -> &ConnectionState {
        self.dialing.state()
    }

    /// What it was given and has not ended, in order of the commands' ids.
    pub fn running(&self) -> impl Iterator<Item = CommandId> {
        self.commands.iter().filter(|(_, held)| !held.is_ended()).map(|(id, _)| *id)
    }

    /// Memory of all output kept, in bytes.
    pub fn tail_bytes(&self) -> usize {
        self.commands.values().map(Held::tail_cost).sum()
    }

    // ---- commands: what runs the commands -------------------------------

    /// Begins a command that [`AgentOutput::Execute`] named: which attempt it
    /// is, and what to run. `None` if it has ended in between: it must not be
    /// run.
    pub fn begin(&mut self, command: CommandId, now: Now) -> Option<(u32, CommandSpec)> {
        self.begin_held(command, now)
    }

    /// Appends output: takes from the front of `bytes` what the tail has room
    /// for, and says how much that was. 0 means: wait for
    /// [`AgentOutput::Room`]. Output of a command that has ended is taken and
    /// dropped.
    pub fn write(&mut self, command: CommandId, channel: Channel, bytes: &[u8], now: Now) -> usize {
        self.write_held(command, channel, bytes, now)
    }

    /// What runs was signalled: the last stage of an interrupt before the end.
    pub fn signalled(&mut self, command: CommandId) {
        self.signal_held(command);
    }

    /// The next event for a command's handler: an interrupt first, then the
    /// terminal's size, then input; without `input`, only those that are none.
    /// Taking input is what acknowledges it.
    pub fn take_event(&mut self, command: CommandId, input: bool) -> Option<ExecutionEvent> {
        self.commands.get_mut(&command)?.take_event(input)
    }

    /// A command's handler has ended. The first word counts.
    pub fn ended(&mut self, command: CommandId, outcome: Outcome, now: Now) {
        self.end_as(command, outcome, now);
        self.consider_stopped(now);
    }

    /// What ran a command is gone without a word on how the command ended: it
    /// is `unknown`, and why, for people, goes with it.
    pub fn lost(&mut self, command: CommandId, why: &str, now: Now) {
        self.end_unknown(command, why, now);
        self.consider_stopped(now);
    }

    // ---- commands: who owns the agent -----------------------------------

    /// Reports figures. Only the newest that waits is sent; the latest is
    /// repeated on every new link.
    pub fn report(&mut self, report: AgentReport) {
        self.report = Some(report);
        self.report_unsaid = true;
    }

    /// A record of its log: see [`LogTail::push`].
    pub fn push_log(&mut self, number: u64, record: LogRecord, now: Now) {
        if let Some(logs) = &mut self.logs {
            logs.push(number, record, now.monotonic);
        }
    }

    /// Whether the hub wants a new token: asked after every input. The answer
    /// is [`refresh`](Self::refresh).
    pub fn poll_refresh(&mut self) -> Option<RefreshWanted> {
        self.refresh.poll()
    }

    /// A new token for the present link.
    pub fn refresh(&mut self, token: Secret, now: Now) {
        let serial = CommandId::mint(now.wall_ms, self.rng.random()).to_string();
        // 36 characters of 0-9 a-f and -, which is a name.
        let id: RequestId = serial.parse().expect("a UUID is a request id");
        self.say_as(Some(id), AgentToHub::RefreshToken(RefreshToken { token }));
    }

    /// Dials at once instead of waiting for the next attempt.
    pub fn retry_now(&mut self, now: Now) {
        self.dialing.retry_now(now);
    }

    /// Ends in order: running commands are interrupted, what they wrote goes
    /// out, then a goodbye. At the latest after the grace and ten seconds.
    pub fn stop(&mut self, now: Now) {
        if self.stopping.is_some() || self.dialing.is_over() {
            return;
        }
        let patience = self.setup.grace.saturating_add(2 * GRACE_MARGIN);
        self.stopping = Some(now.monotonic.saturating_add(patience));
        self.interrupt_all(now);
        self.consider_stopped(now);
    }

    // ---- inputs: the link -----------------------------------------------

    /// A link is there: the hub is greeted on it.
    pub fn handle_dialed(&mut self, token: Option<Secret>, now: Now) {
        self.dialing.handle_dialed(now);
        if self.dialing.is_over() {
            return;
        }
        let held = self.commands.iter().map(|(id, held)| (*id, held));
        let listed = greeting::list(held, self.message_bytes_max);
        for (id, held) in &mut self.commands {
            held.handle_greeting(listed.iter().any(|listed| listed.command == *id));
        }
        let mut greeting = greeting::greeting(&self.setup, self.instance, token);
        let rest = greeting::fill(&mut greeting, listed);
        self.link = Link::Greeting(Some(Box::new(greeting)), rest);
    }

    /// No link could be made.
    pub fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.dialing.handle_dial_failed(close, now);
        self.consider_stopped(now);
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
                (Ok(Envelope { id, message, .. }), Link::Up(_)) => {
                    self.handle_message(id, message, now);
                }
                (Ok(Envelope { message: HubToAgent::Ack(ack), .. }), Link::Greeting(_, rest)) => {
                    let rest = std::mem::take(rest);
                    self.handle_ack(ack, rest, now);
                }
                (Ok(Envelope { message: HubToAgent::Error(refusal), .. }), Link::Greeting(..)) => {
                    // The close that follows says what to do.
                    tracing::warn!(target: "trunkline::client", %refusal, "greeting refused");
                }
                (Ok(_) | Err(_), Link::Greeting(..)) => {
                    self.hang_up(Close::new(CloseCode::Violation, "no acknowledgement"));
                }
                (Err(invalid), Link::Up(_)) => {
                    tracing::warn!(target: "trunkline::client", error = %invalid.error, "the hub said what cannot be understood");
                    self.say(AgentToHub::Error(invalid.refusal()));
                }
                (_, Link::None | Link::Closing { .. }) => {}
            }
        }
        self.consider_stopped(now);
    }

    /// What [`AgentOutput::Journal`] asked for is done: all of it is written for
    /// good, or, with a reason for people, perhaps none.
    pub fn handle_journaled(&mut self, result: Result<(), &str>, now: Now) {
        self.handle_recorded(result, now);
        self.consider_stopped(now);
    }

    /// A deadline has come.
    pub fn handle_timeout(&mut self, now: Now) {
        self.dialing.handle_timeout(now);
        if let Link::Closing { until, why, .. } = &mut self.link {
            let until = *until.get_or_insert(now.monotonic.saturating_add(CLOSE_TIMEOUT));
            if until <= now.monotonic {
                let why = why.clone();
                self.link = Link::None;
                self.hangs_up = true;
                self.dialing.handle_lost(&why, now);
            }
        }
        self.conflating = self.conflating.filter(|at| *at > now.monotonic);
        self.commands_timeout(now);
        if let Some(recording) = &mut self.recording {
            recording.handle_timeout(now.monotonic);
        }
        if let Some(logs) = &mut self.logs {
            logs.handle_timeout(now.monotonic);
        }
        if let Link::Up(up) = &mut self.link {
            match up.liveness.poll(now.monotonic) {
                Due::Nothing => {}
                Due::Ping(n) => self.say(AgentToHub::Ping(HeartbeatBeat { n })),
                Due::Dead => self.hang_up(Close::new(CloseCode::Silent, "nothing was heard")),
            }
        }
        self.consider_stopped(now);
    }

    // ---- outputs --------------------------------------------------------

    /// When [`handle_timeout`](Self::handle_timeout) is due, or
    /// [`poll_transmit`](Self::poll_transmit) has more.
    pub fn deadline(&self) -> Option<Duration> {
        let (link, is_up) = match &self.link {
            Link::Up(up) => (Some(up.liveness.deadline()), true),
            // Without a time yet: that is set at once.
            Link::Closing { until, .. } => (Some(until.unwrap_or_default()), false),
            Link::None | Link::Greeting(..) => (None, false),
        };
        let stopping = self.stopping.filter(|_| !self.dialing.is_over());
        let hold = self.setup.tail_hold;
        let commands = self.commands.values().flat_map(|held| {
            let tail = held.tail.as_ref();
            let gathered = tail.filter(|_| is_up).and_then(Tail::send_deadline);
            let released = tail.and_then(|tail| tail.hold_deadline(hold));
            [held.run_until, held.kill_at, held.recorded_by(), gathered, released]
        });
        let journal = self.recording.as_ref().and_then(Recording::deadline);
        let conflating = self.conflating.filter(|_| is_up);
        let logs = self.logs.as_ref().filter(|_| is_up).and_then(LogTail::deadline);
        let others =
            [self.dialing.deadline(), link, stopping, self.forget_at, journal, conflating, logs];
        others.into_iter().chain(commands).flatten().min()
    }

    /// What to do about the link.
    pub fn poll_dial(&mut self) -> Option<DialAction> {
        if std::mem::take(&mut self.hangs_up) {
            return Some(DialAction::HangUp);
        }
        let action = self.dialing.poll_action()?;
        if action == DialAction::HangUp {
            self.link = Link::None;
        }
        Some(action)
    }

    /// The next thing to tell the shell.
    pub fn poll_output(&mut self) -> Option<AgentOutput> {
        let journal = |core: &mut Self| core.recording.as_mut()?.poll().map(AgentOutput::Journal);
        self.outputs.pop_front().or_else(|| journal(self))
    }

    /// The next frame for the link: control first, then how far input has
    /// got and the latest figures, then output, streams taking turns, then log
    /// records. A close is the last.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Frame> {
        self.consider_stopped(now);
        let control = match &mut self.link {
            Link::None => return None,
            Link::Closing { last, .. } => return last.pop_front(),
            Link::Greeting(greeting, _) => return greeting.take().map(|it| greeting::encode(*it)),
            Link::Up(up) => up.control.pop_front(),
        };
        let control = control.or_else(|| self.poll_latest(now.monotonic));
        let frame = match control {
            Some(control) => {
                self.pace.said_message(now.monotonic);
                control
            }
            None => self.poll_bulk(now.monotonic).or_else(|| self.poll_logs(now.monotonic))?,
        };
        if let Link::Up(up) = &mut self.link {
            up.liveness.handle_said(now.monotonic);
        }
        Some(frame)
    }
}

// ---- the link ---------------------------------------------------------------

impl AgentCore {
    /// What only counts in its newest value, as fast as the hub hears it.
    fn poll_latest(&mut self, now: Duration) -> Option<Frame> {
        self.conflating = self.pace.conflated_at(now);
        if self.conflating.is_some() {
            return None;
        }
        self.poll_input_taken().or_else(|| self.poll_report())
    }

    fn handle_ack(&mut self, ack: ConnectionAck, rest: Vec<HeldCommand>, now: Now) {
        let Peer::Agent(me) = ack.peer else {
            let close = Close::new(CloseCode::Violation, "the acknowledgement is for a dashboard");
            self.hang_up(close);
            return;
        };
        self.me = me;
        self.message_bytes_max =
            usize::try_from(ack.limits.message_bytes_max).unwrap_or(usize::MAX);
        let idle = Duration::from_millis(ack.heartbeat.idle_ms.max(1));
        let timeout = Duration::from_millis(ack.heartbeat.timeout_ms.max(1));
        self.link = Link::Up(Box::new(Up {
            liveness: Liveness::new(idle, timeout, now.monotonic),
            limits: ack.limits,
            binary: ack.features.contains(&Feature::Binary),
            control: VecDeque::new(),
        }));
        self.refresh.handle_link();
        self.pace.handle_ack(ack.limits.rates);
        self.dialing.handle_acked(now);
        self.report_unsaid = self.report.is_some();
        if let Some(logs) = &mut self.logs {
            logs.handle_link();
        }
        // First of all: what follows is about commands that it knows then.
        for part in greeting::parts(rest) {
            self.say(AgentToHub::Commands(part));
        }
        self.tell_news(ack.limits.grant_bytes);
    }

    fn handle_message(&mut self, id: Option<RequestId>, message: HubToAgent, now: Now) {
        match message {
            HubToAgent::Ack(_) => {
                self.hang_up(Close::new(CloseCode::Violation, "a second acknowledgement"));
            }
            HubToAgent::Ok(_) => {}
            HubToAgent::Execute(execute) => self.handle_execute(execute, now),
            HubToAgent::Interrupt(interrupt) => self.handle_interrupt(id, &interrupt, now),
            HubToAgent::Settled(settled) => self.handle_settled(settled, now),
            HubToAgent::Input(input) => self.handle_input(id, input),
            HubToAgent::Resize(resize) => self.handle_resize(resize),
            HubToAgent::Taken(taken) => self.handle_taken(&taken),
            HubToAgent::Control(control) => match control.action {
                ControlAction::Report => {
                    self.report_unsaid = self.report.is_some();
                    self.outputs.push_back(AgentOutput::Report);
                }
                ControlAction::Stop => self.stop(now),
                ControlAction::Other(_) => {
                    let refusal = Refusal::new(ErrorCode::Unsupported, "no such action");
                    self.refuse(id, refusal.field("payload.action"));
                }
            },
            HubToAgent::LogTaken(taken) => {
                if let Some(logs) = &mut self.logs {
                    logs.handle_taken(&taken, now.monotonic);
                }
            }
            HubToAgent::Error(refusal) => {
                let logs = self.logs.as_mut();
                if !logs.is_some_and(|logs| logs.handle_refused(&refusal, now.monotonic)) {
                    self.handle_refusal(&refusal);
                }
            }
            HubToAgent::Ping(ping) => self.say(AgentToHub::Pong(ping)),
            HubToAgent::Pong(pong) => {
                if let Link::Up(up) = &mut self.link {
                    up.liveness.handle_pong(pong.n, now.monotonic);
                }
            }
            HubToAgent::RefreshNeeded(_) => self.refresh.handle_needed(),
            HubToAgent::RefreshSuccess(_) => self.refresh.handle_success(),
            HubToAgent::RefreshFailed(failed) => self.refresh.handle_failed(&failed.message),
        }
    }

    /// Puts a control message in the line of the present link, if there is
    /// one: what it says is part of the next greeting otherwise.
    fn say(&mut self, message: AgentToHub) {
        self.say_as(None, message);
    }

    fn say_as(&mut self, id: Option<RequestId>, message: AgentToHub) {
        if let Link::Up(up) = &mut self.link {
            if up.control.len() >= CONTROL_MAX {
                self.hang_up(Close::new(CloseCode::Lagging, "the hub does not read"));
                return;
            }
            up.control.push_back(codec::encode(&Envelope { id, ts: None, message }));
        }
    }

    fn refuse(&mut self, to: Option<RequestId>, refusal: Refusal) {
        self.say(AgentToHub::Error(refusal.reply_to(to)));
    }

    /// Ends the link from this side.
    fn hang_up(&mut self, why: Close) {
        self.close(VecDeque::new(), why);
    }

    fn close(&mut self, mut last: VecDeque<Frame>, why: Close) {
        last.push_back(Frame::Close(why.clone()));
        self.link = Link::Closing { last, why, until: None };
    }

    /// Says goodbye once nothing runs and nothing waits to be sent, or when
    /// it has waited long enough for that.
    fn consider_stopped(&mut self, now: Now) {
        let Some(until) = self.stopping else { return };
        if self.dialing.is_over() {
            return;
        }
        let is_up = matches!(self.link, Link::Up(_));
        let is_sending = |held: &Held| held.tail.as_ref().is_some_and(Tail::is_sending);
        let busy = self.running().next().is_some()
            || (is_up && self.commands.values().any(is_sending))
            || self.recording.as_ref().is_some_and(Recording::is_busy);
        if busy && now.monotonic < until {
            return;
        }
        let mut last = VecDeque::new();
        match std::mem::replace(&mut self.link, Link::None) {
            Link::None => {
                self.dialing.stop(now);
                return;
            }
            Link::Greeting(..) | Link::Closing { .. } => {}
            Link::Up(up) => {
                last = up.control;
                let goodbye = AgentToHub::Disconnect(Disconnect { reason: None });
                last.push_back(codec::encode(&Envelope::bare(goodbye)));
            }
        }
        self.close(last, Close::new(CloseCode::Normal, "stopped"));
        self.dialing.stop(now);
    }
}
