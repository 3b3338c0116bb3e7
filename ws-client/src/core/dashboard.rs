//! A dashboard without clock, socket or task: what it knows, what it reads,
//! what it waits for, and what it says to the hub.
//!
//! Everything that outlives a link has its own position here and goes on from
//! it on the next one: the roster by its revision, each terminal by its
//! offset, input by what was taken, requests by their ids. A link itself
//! carries nothing: when it is lost, `Link` is replaced and that is all.
//!
//! ```text
//!              handle_dialed            ack                   handle_lost
//!   no link ────────────────► greeting ─────► up ─────────────────────────► no link
//!                                             │ subscribe (from positions)
//!                                             │ roster: deltas, or a snapshot
//!                                             │ in doubt? hold the outbox until the
//!                                             │   snapshot says what was stored
//!                                             ▼
//!                                        outbox, input, shown, log records
//! ```
//!
//! *In doubt*: the hub's queue has another epoch than it had, so it may have
//! forgotten what it stored. Whether it carried out a `command:request` that
//! was sent and not answered is then to be read from its new roster; what the
//! roster does not tell stays unknown, and is said to be.

mod heard;
mod input;
mod link;
mod reading;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{CommandId, DashboardId, QueueEpoch, RequestId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::liveness::Due;
use trunkline_protocol::message::{
    Accepted, CommandRequest, DashboardToHub, Disconnect, Envelope, ErrorCode, HubToDashboard,
    LogRecord, Refusal, Secret, Target, TerminalOpened,
};
use trunkline_protocol::roster::{Roster, RosterEvent, RosterReader};
use trunkline_protocol::time::Now;

pub use self::reading::{Audit, Next, ReaderId, Reading, TerminalEvent};

use self::input::Inputs;
use self::link::Link;
use self::reading::Readers;
use super::dialing::{Backoff, ConnectionState, DialAction, Dialing};
use super::logs::LogTail;
use super::outbox::{Outbox, OutboxLimits, Unanswered};
use super::{Class, Pace, Refresh, RefreshWanted};

/// Answers to what could not be understood that may wait for the link.
const ERRORS_MAX: usize = 8;

/// How long this side's last words may take to go out.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a request has no good answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The hub refused it; what to do is in the refusal: whether it may
    /// succeed later, and when. What came too fast (`rate_limited`) is not told:
    /// it is asked again in time. Nothing else is tried again by itself.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// Too many requests wait for their answer. It was not made.
    #[error("too many requests wait for their answer")]
    Full,
    /// No answer came in time.
    #[error("no answer came in time")]
    TimedOut {
        /// Whether the hub may have got it, and may have carried it out or
        /// still do so. If not, it certainly has not.
        sent: bool,
    },
    /// The hub may have carried it out and has lost its memory since.
    #[error("the hub lost its memory and may have carried it out before that")]
    Ambiguous,
    /// The dashboard was closed, or the hub does not want it back.
    #[error("the dashboard is closed")]
    Closed,
}

/// Why nothing can be typed into a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// The command has ended.
    #[error("the command has ended")]
    Ended,
    /// The hub refused what was typed.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The dashboard was closed.
    #[error("the dashboard is closed")]
    Closed,
}

/// Something happened that a person may want to see.
#[derive(Debug, Clone, PartialEq)]
pub enum DashboardEvent {
    /// The connection changed.
    Connection(ConnectionState),
    /// The roster changed.
    Roster(RosterEvent),
    /// A terminal that is read has a new stream, or goes on after a
    /// reconnect.
    TerminalOpened(TerminalOpened),
    /// The hub no longer knows a command that it had accepted.
    CommandLost(CommandId),
    /// What was typed into a command was refused, and dropped.
    InputRefused {
        /// The command.
        command: CommandId,
        /// Why.
        refusal: Refusal,
    },
    /// The reader of these events was slow: so many are missing here.
    Missed(u64),
}

/// What the core has to tell its shell.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// A request has ended.
    Answered {
        /// The request.
        request: RequestId,
        /// The answer.
        answer: Result<Accepted, RequestError>,
    },
    /// A reader has something to take: see [`DashboardCore::take`].
    Readable(ReaderId),
    /// What waits for room to type into a command may look again.
    InputMoved(CommandId),
    /// For whoever listens.
    Event(DashboardEvent),
}

/// How a dashboard is set up.
#[derive(Debug, Clone, Default)]
pub struct DashboardSetup {
    /// Who it is; minted by default. Two that live at once under one id
    /// supersede each other.
    pub dashboard: Option<DashboardId>,
    /// How long to wait between attempts to connect.
    pub backoff: Backoff,
    /// Whether there is a source of new tokens.
    pub can_renew: bool,
    /// How much waits for an answer.
    pub outbox: OutboxLimits,
    /// The log that it forwards, if it does.
    pub logs: Option<LogTail>,
}

/// What there is to know of a request when it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Command { command: CommandId, retry: bool },
    Other,
}

/// A command that was accepted, or listed, and is not listed now.
#[derive(Debug)]
struct Missing {
    /// When it counts as lost; `None` while the roster is not up to date.
    until: Option<Duration>,
}

/// The pure half of a dashboard.
///
/// Methods are of four sorts. *Getters* change nothing. *Inputs*
/// (`handle_*`) tell what happened outside. *Commands* (`request`, `read`,
/// `input`, …) are what the application wants. After any of the latter two,
/// [`poll_transmit`](Self::poll_transmit) as often as the link takes frames,
/// [`poll_output`](Self::poll_output) until it is empty, and
/// [`handle_timeout`](Self::handle_timeout) at [`deadline`](Self::deadline).
#[derive(Debug)]
pub struct DashboardCore {
    me: DashboardId,
    dialing: Dialing,
    /// The connection as it was last told.
    connection: ConnectionState,
    /// The shell is to drop the link.
    hangs_up: bool,
    token: Option<Secret>,
    rng: StdRng,
    link: Link,
    rules: Rules,
    message_bytes_max: usize,
    roster: RosterReader,
    /// Whether the roster is that of the hub at the other end.
    is_whole: bool,
    epoch: Option<QueueEpoch>,
    in_doubt: bool,
    outbox: Outbox<Asked>,
    /// Interrupts overtake requests, but not those that they are about.
    interrupts: Outbox<Asked>,
    pace: Pace,
    readers: Readers,
    inputs: Inputs,
    missing: BTreeMap<CommandId, Missing>,
    outputs: VecDeque<Output>,
    inputs_said: u64,
    refresh: Refresh,
    /// The log that is forwarded; `None` for one that forwards none.
    logs: Option<LogTail>,
}

impl DashboardCore {
    /// A dashboard that wants to dial at once. All its randomness comes from
    /// the seed.
    pub fn new(setup: DashboardSetup, seed: [u8; 32], now: Now) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let me = setup.dashboard.unwrap_or_else(|| {
            let serial = CommandId::mint(now.wall_ms, rng.random()).to_string();
            // 36 characters of 0-9 a-f and -, which is a name.
            serial.parse().expect("a UUID is a dashboard id")
        });
        let limits = Limits::default();
        let dialing = Dialing::new(setup.backoff, setup.can_renew, rng.random());
        Self {
            me,
            connection: dialing.state().clone(),
            dialing,
            hangs_up: false,
            token: None,
            rng,
            link: Link::None,
            rules: Rules::from(&limits),
            message_bytes_max: limits.message_bytes_max,
            roster: RosterReader::default(),
            is_whole: false,
            epoch: None,
            in_doubt: false,
            outbox: Outbox::new(setup.outbox),
            interrupts: Outbox::new(setup.outbox),
            pace: Pace::default(),
            readers: Readers::default(),
            inputs: Inputs::new(),
            missing: BTreeMap::new(),
            outputs: VecDeque::new(),
            inputs_said: 0,
            refresh: Refresh::default(),
            logs: setup.logs,
        }
    }

    // ---- getters --------------------------------------------------------

    /// The connection as its user sees it.
    pub fn connection(&self) -> &ConnectionState {
        self.dialing.state()
    }

    /// The roster as last known.
    pub fn roster(&self) -> &Arc<Roster> {
        self.roster.roster()
    }

    /// Who this dashboard is: as the hub said, once it has.
    pub fn id(&self) -> &DashboardId {
        &self.me
    }

    // ---- commands -------------------------------------------------------

    /// Mints the id of a new command.
    pub fn mint_command(&mut self, now: Now) -> CommandId {
        CommandId::mint(now.wall_ms, self.rng.random())
    }

    /// Asks the hub for something, with `patience` for the answer (for ever
    /// if `None`), connected or not. It comes as [`Output::Answered`] under
    /// the id given back.
    pub fn request(
        &mut self,
        message: DashboardToHub,
        patience: Option<Duration>,
        now: Now,
    ) -> Result<RequestId, RequestError> {
        if self.is_closed() {
            return Err(RequestError::Closed);
        }
        let asked = match &message {
            DashboardToHub::Request(CommandRequest { command, retry, .. }) => {
                Asked::Command { command: *command, retry: *retry }
            }
            _ => Asked::Other, // only a command can be looked up in the roster
        };
        let overtakes = match &message {
            DashboardToHub::Interrupt(interrupt) => {
                let is_it = |asked: &Asked| matches!(asked, Asked::Command { command, .. } if *command == interrupt.command);
                !self.outbox.has(is_it)
            }
            DashboardToHub::EmergencyStop(_) => {
                !self.outbox.has(|asked| matches!(asked, Asked::Command { .. }))
            }
            _ => false, // whatever else is asked waits its turn
        };
        let id = self.mint_request(now);
        let json = encode(Some(&id), message, now);
        if json.len() > self.message_bytes_max {
            let message = "the request is longer than message_bytes_max";
            return Err(RequestError::Refused(Refusal::new(ErrorCode::InvalidMessage, message)));
        }
        let until = patience.map(|patience| now.monotonic.saturating_add(patience));
        let outbox = if overtakes { &mut self.interrupts } else { &mut self.outbox };
        outbox.push(id.clone(), json, asked, until).map_err(|_| RequestError::Full)?;
        Ok(id)
    }

    /// Begins to read a target.
    pub fn read(&mut self, target: Target, options: Reading, now: Now) -> ReaderId {
        let id = self.readers.add(target, options, self.roster.roster());
        self.consider_unannounced(now);
        self.wake_readers();
        id
    }

    /// Ends a reader; with the last of its target, the subscription.
    pub fn unread(&mut self, reader: ReaderId) {
        if let Some(target) = self.readers.remove(reader)
            && let Link::Up(up) = &mut self.link
        {
            up.later.remove(&target);
            up.alone.remove(&target);
            up.unsubscribe.insert(target);
        }
    }

    /// The next event of a reader. Taking it is what moves the reader's
    /// window on.
    pub fn take(&mut self, reader: ReaderId) -> Next {
        self.readers.take(reader)
    }

    /// Whether what was taken is to be told to the hub:
    /// [`poll_transmit`](Self::poll_transmit) has something.
    pub fn has_taken(&self) -> bool {
        matches!(self.link, Link::Up(_)) && self.readers.has_something_to_say()
    }

    /// Types into a running command: takes from the front of `data` what
    /// there is room for. When there is room again, [`Output::InputMoved`]
    /// tells. A command that the roster has as ended takes nothing.
    pub fn input(&mut self, command: CommandId, data: &mut Bytes) -> Result<(), InputError> {
        if self.is_closed() {
            return Err(InputError::Closed);
        }
        let state = self.roster.roster().command(command);
        if state.is_some_and(|state| state.status.is_final()) {
            return Err(InputError::Ended);
        }
        self.inputs.push(command, data);
        Ok(())
    }

    /// Whether something may be typed into a command now.
    pub fn has_room(&self, command: CommandId) -> bool {
        self.inputs.has_room(command)
    }

    /// Whether the hub wants a new token: asked after every input. The answer
    /// is [`refresh`](Self::refresh).
    pub fn poll_refresh(&mut self) -> Option<RefreshWanted> {
        self.refresh.poll()
    }

    /// Goes on with a new token, now if connected, and otherwise not at all:
    /// every greeting brings its own.
    pub fn refresh(&mut self, token: Secret) {
        if let Link::Up(up) = &mut self.link {
            up.refresh = Some(token);
        }
    }

    /// A record of its log: see [`LogTail::push`].
    pub fn push_log(&mut self, number: u64, record: LogRecord, now: Now) {
        if let Some(logs) = &mut self.logs {
            logs.push(number, record, now.monotonic);
        }
    }

    /// Dials at once instead of waiting, if it waits.
    pub fn retry_now(&mut self, now: Now) {
        self.dialing.retry_now(now);
    }

    /// Says goodbye. Everything that waits for an answer ends with
    /// [`RequestError::Closed`].
    pub fn stop(&mut self, reason: Option<String>, now: Now) {
        let mut last = VecDeque::new();
        if matches!(self.link, Link::Up(_)) {
            let goodbye = DashboardToHub::Disconnect(Disconnect { reason });
            last.push_back(Frame::Text(encode(None, goodbye, now)));
        }
        if !matches!(self.link, Link::None | Link::Closing { .. }) {
            self.close_after(last, Close::new(CloseCode::Normal, "stopped"), now);
        }
        self.dialing.stop(now);
        self.after_dialing();
    }

    // ---- inputs ---------------------------------------------------------

    /// A link is there: the hub is greeted on it, with this token.
    pub fn handle_dialed(&mut self, token: Option<Secret>, now: Now) {
        self.token = token;
        self.link = Link::Greeting { said: false };
        self.dialing.handle_dialed(now);
        self.after_dialing();
    }

    /// No link could be made.
    pub fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.dialing.handle_dial_failed(close, now);
        self.after_dialing();
    }

    /// The link is gone, by the peer's close or without one.
    pub fn handle_lost(&mut self, close: &Close, now: Now) {
        self.forget_link();
        self.dialing.handle_lost(close, now);
        self.after_dialing();
    }

    /// A frame arrived.
    pub fn handle_frame(&mut self, frame: &Frame, now: Now) {
        if let Link::Up(up) = &mut self.link {
            up.liveness.handle_heard(now.monotonic);
        }
        for message in codec::decode::<HubToDashboard>(frame, self.rules) {
            match (message, &mut self.link) {
                (Ok(Envelope { message, .. }), Link::Up(_)) => self.handle_message(message, now),
                (Ok(Envelope { message, .. }), Link::Greeting { .. }) => {
                    self.handle_greeted(message, now);
                }
                (Err(invalid), Link::Up(up)) => {
                    tracing::warn!(error = %invalid.error, "the hub said what cannot be understood");
                    if up.errors.len() < ERRORS_MAX {
                        up.errors.push_back(invalid.refusal());
                    }
                }
                (Err(invalid), Link::Greeting { .. }) => {
                    tracing::warn!(error = %invalid.error, "the hub's greeting cannot be understood");
                    self.close("no acknowledgement", now);
                }
                (_, Link::None | Link::Closing { .. }) => {}
            }
        }
        self.wake_readers();
    }

    /// A deadline has come.
    pub fn handle_timeout(&mut self, now: Now) {
        self.dialing.handle_timeout(now);
        self.after_dialing();
        while let Some(expired) = self.poll_expired(now.monotonic) {
            let sent = expired.sent;
            self.answer(expired.id, Err(RequestError::TimedOut { sent }));
        }
        self.readers.handle_timeout(now.monotonic);
        if let Some(logs) = &mut self.logs {
            logs.handle_timeout(now.monotonic);
        }
        let due = |missing: &Missing| missing.until.is_some_and(|until| until <= now.monotonic);
        let lost = self.missing.extract_if(.., |_, missing| due(missing));
        let lost: Vec<CommandId> = lost.map(|(command, _)| command).collect();
        for command in lost {
            tracing::warn!(%command, "the hub no longer knows a command");
            self.readers.handle_lost(command);
            self.drop_input(command);
            self.outputs.push_back(Output::Event(DashboardEvent::CommandLost(command)));
        }
        if let Link::Up(up) = &mut self.link {
            let again = up.later.extract_if(.., |_, at| *at <= now.monotonic);
            for (target, _) in again {
                self.readers.change(target);
            }
            match up.liveness.poll(now.monotonic) {
                Due::Nothing => {}
                Due::Ping(n) => up.ping = Some(n),
                Due::Dead => {
                    // No last words: whoever does not hear does not take them.
                    self.hangs_up = true;
                    self.handle_lost(&Close::new(CloseCode::Silent, "nothing was heard"), now);
                }
            }
        }
        if let Link::Closing { why, until, .. } = &self.link
            && *until <= now.monotonic
        {
            self.hangs_up = true;
            self.handle_lost(&why.clone(), now);
        }
        self.wake_readers();
    }

    // ---- outputs --------------------------------------------------------

    /// When [`handle_timeout`](Self::handle_timeout) is due.
    pub fn deadline(&self, now: Now) -> Option<Duration> {
        let mut deadline = self.dialing.deadline();
        let mut consider = |other: Option<Duration>| {
            deadline = match (deadline, other) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        };
        consider(self.outbox.deadline());
        consider(self.interrupts.deadline());
        consider(self.readers.deadline());
        consider(self.missing.values().filter_map(|missing| missing.until).min());
        if let Link::Up(up) = &self.link {
            consider(Some(up.liveness.deadline()));
            consider(up.later.values().min().copied());
            consider(self.inputs.deadline(now.monotonic));
            consider(self.pace_deadline(now.monotonic));
            consider(self.logs.as_ref().and_then(LogTail::deadline));
        }
        if let Link::Closing { until, .. } = &self.link {
            consider(Some(*until));
        }
        deadline
    }

    /// Whether to dial or to hang up.
    pub fn poll_dial(&mut self) -> Option<DialAction> {
        if std::mem::take(&mut self.hangs_up) {
            return Some(DialAction::HangUp);
        }
        let action = self.dialing.poll_action()?;
        if action == DialAction::HangUp {
            self.forget_link();
        }
        Some(action)
    }

    /// The next thing to tell the application.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next frame for the link, the urgent ones first: what keeps the
    /// link alive, then subscriptions, requests, input, what was shown, and log
    /// records.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Frame> {
        let frame = match &mut self.link {
            Link::None | Link::Greeting { said: true } => None,
            Link::Closing { last, .. } => last.pop_front(),
            Link::Greeting { said } => {
                *said = true;
                Some(self.greeting())
            }
            Link::Up(_) => self.poll_up(now),
        };
        if frame.is_some()
            && let Link::Up(up) = &mut self.link
        {
            up.liveness.handle_said(now.monotonic);
        }
        frame
    }
}

impl DashboardCore {
    fn is_closed(&self) -> bool {
        self.dialing.is_over()
    }

    fn poll_expired(&mut self, now: Duration) -> Option<Unanswered<Asked>> {
        self.outbox.poll_expired(now).or_else(|| self.interrupts.poll_expired(now))
    }

    /// When something may be said that waits for its time.
    fn pace_deadline(&self, now: Duration) -> Option<Duration> {
        let alone = matches!(&self.link, Link::Up(up) if !up.alone.is_empty());
        let requests = alone || self.outbox.has_unsent() || self.readers.has_changed();
        let waits = [
            self.interrupts.has_unsent().then(|| self.pace.ready_at(Class::Interrupts, now)),
            requests.then(|| self.pace.ready_at(Class::Requests, now)),
            self.inputs.has_something(now).then(|| self.pace.ready_at(Class::Input, now)),
            self.readers.has_something_to_say().then(|| self.pace.conflated_at(now)),
        ];
        waits.into_iter().flatten().flatten().min()
    }

    /// What belonged to the link is gone with it.
    fn forget_link(&mut self) {
        self.link = Link::None;
        self.outbox.handle_link();
        self.interrupts.handle_link();
        self.readers.handle_link();
        self.is_whole = false;
        for missing in self.missing.values_mut() {
            missing.until = None;
        }
    }

    /// Tells of a new state of the connection. When it is over for good, so
    /// is everything that waits.
    fn after_dialing(&mut self) {
        if self.connection == *self.dialing.state() {
            return;
        }
        self.connection = self.dialing.state().clone();
        let event = DashboardEvent::Connection(self.connection.clone());
        self.outputs.push_back(Output::Event(event));
        if self.is_closed() {
            let mut unanswered = self.outbox.withdraw(|_, _| true);
            unanswered.append(&mut self.interrupts.withdraw(|_, _| true));
            for unanswered in unanswered {
                self.answer(unanswered.id, Err(RequestError::Closed));
            }
            for command in self.inputs.commands() {
                self.drop_input(command);
            }
            self.readers.close();
            self.wake_readers();
        }
    }

    /// Ends the link from this side: the hub broke the protocol.
    fn close(&mut self, reason: &str, now: Now) {
        self.close_after(VecDeque::new(), Close::new(CloseCode::Violation, reason), now);
    }

    fn close_after(&mut self, mut last: VecDeque<Frame>, why: Close, now: Now) {
        tracing::debug!(%why, "closing the link");
        last.push_back(Frame::Close(why.clone()));
        self.link = Link::Closing { last, why, until: now.monotonic + LAST_WORDS };
    }

    fn mint_request(&mut self, now: Now) -> RequestId {
        let serial = CommandId::mint(now.wall_ms, self.rng.random()).to_string();
        // 36 characters of 0-9 a-f and -, which is a name.
        serial.parse().expect("a UUID is a request id")
    }

    fn answer(&mut self, request: RequestId, answer: Result<Accepted, RequestError>) {
        self.outputs.push_back(Output::Answered { request, answer });
    }
}

fn encode(id: Option<&RequestId>, message: DashboardToHub, now: Now) -> Bytes {
    let envelope = Envelope { id: id.cloned(), ts: Some(now.wall_ms), message };
    match codec::encode(&envelope) {
        Frame::Text(json) | Frame::Binary(json) => json,
        Frame::Close(_) => Bytes::new(), // messages are not encoded as a close
    }
}
