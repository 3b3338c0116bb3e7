//! A command that an agent holds: from the moment it is given until it is
//! forgotten.
//!
//! ```text
//!           a slot is free           recorded          begin          ended, or killed
//!   Waiting ──────────────► Recording ──────► Offered ───────► Running ─────────────► Ended
//!      │                        │                │                                      ▲
//!      └────── interrupted ─────┴────────────────┴──────────────────────────────────────┘
//! ```
//!
//! Without a journal nothing is recorded, and `Recording` is passed over. What
//! a journal tells of an earlier process is `Ended` from the start.
//!
//! An ended command is listed to every hub until it is settled, and its
//! output is kept some time longer, for a hub that loses its memory.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::BytesMut;
use trunkline_protocol::ids::{CommandId, DashboardId};
use trunkline_protocol::message::{
    AgentToHub, CommandAccepted, CommandComplete, CommandEnd, CommandInterrupting, CommandSpec,
    CommandStarted, CommandStatus, HeldCommand, InterruptStage, Run, TerminalSize,
};

use super::execution::ExecutionEvent;
use super::tail::Tail;

/// Input that may wait for one handler.
const INPUT_BYTES_MAX: usize = 1024 * 1024;

/// Pieces of input that may wait for one handler.
const INPUT_PIECES_MAX: usize = 1024;

/// Small pieces of one writer are gathered up to this size.
const INPUT_PIECE_BYTES: usize = 16 * 1024;

/// Those who may type into one command. About 200 bytes each.
const WRITERS_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Held {
    pub(super) attempt: u32,
    /// `None` of one that only the journal remembers.
    pub(super) spec: Option<CommandSpec>,
    pub(super) stage: Stage,
    pub(super) tail: Option<Tail>,
    /// Events that wait for the handler, an interrupt ahead of all.
    pub(super) interrupt: Option<Duration>,
    pub(super) resize: Option<TerminalSize>,
    input: VecDeque<(DashboardId, BytesMut)>,
    input_bytes: usize,
    pub(super) writers: BTreeMap<DashboardId, Writer>,
    /// When its time to run is over.
    pub(super) run_until: Option<Duration>,
    pub(super) timed_out: bool,
    /// When a handler that was asked to end is dropped.
    pub(super) kill_at: Option<Duration>,
    pub(super) signalled: bool,
    /// What the greeting of this link told of it.
    told: Told,
    /// The journal knows that it was begun, or may.
    pub(super) is_recorded: bool,
    /// A later attempt, which begins when this one has ended.
    pub(super) successor: Option<(u32, CommandSpec)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// There is no slot for it yet.
    Waiting,
    /// It has one, and is being written down: until then at the latest.
    Recording {
        until: Duration,
    },
    /// The shell was told to begin it.
    Offered,
    Running,
    Ended {
        status: CommandStatus,
        end: CommandEnd,
        /// When the hub said that it has stored the end.
        settled: Option<Duration>,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    stream: bool,
    end: bool,
}

/// How far somebody's input has got.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Writer {
    /// Handed to the handler.
    taken: u64,
    /// Received; some of it waits for the handler.
    received: u64,
    /// Some did not fit, and is asked for when there is room.
    missed: bool,
    /// Whether it is to hear how far it has got, and whether it must go on
    /// from there.
    pub(super) tell: bool,
    pub(super) resend: bool,
}

impl Writer {
    pub(super) fn taken(self) -> u64 {
        self.taken
    }
}

/// What became of a piece of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Typed {
    /// There is something new for the handler.
    Received,
    /// There is not.
    Nothing,
    /// Too many type into this command.
    TooMany,
}

impl Held {
    pub(super) fn new(attempt: u32, spec: CommandSpec) -> Self {
        Self {
            attempt,
            spec: Some(spec),
            stage: Stage::Waiting,
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
            told: Told::default(),
            is_recorded: false,
            successor: None,
        }
    }

    /// One that an earlier process began, as the journal tells how it ended.
    pub(super) fn recalled(attempt: u32, status: CommandStatus, end: CommandEnd) -> Self {
        let mut held = Self::new(attempt, CommandSpec::from(Run::Text(String::new())));
        held.spec = None;
        held.is_recorded = true;
        held.stage = Stage::Ended { status, end, settled: None };
        held
    }

    pub(super) fn is_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended { .. })
    }

    /// Whether it takes a slot.
    pub(super) fn is_active(&self) -> bool {
        matches!(self.stage, Stage::Recording { .. } | Stage::Offered | Stage::Running)
    }

    pub(super) fn settled(&self) -> Option<Duration> {
        match self.stage {
            Stage::Ended { settled, .. } => settled,
            Stage::Waiting | Stage::Recording { .. } | Stage::Offered | Stage::Running => None,
        }
    }

    /// When it is given up if it is not written down by then.
    pub(super) fn recorded_by(&self) -> Option<Duration> {
        match self.stage {
            Stage::Recording { until } => Some(until),
            Stage::Waiting | Stage::Offered | Stage::Running | Stage::Ended { .. } => None,
        }
    }

    /// Whether the hub has been sent all of its output.
    pub(super) fn is_sent(&self) -> bool {
        self.tail.as_ref().is_none_or(Tail::is_sent)
    }

    pub(super) fn tail_cost(&self) -> usize {
        self.tail.as_ref().map_or(0, Tail::cost)
    }

    /// Nothing that waits for the handler matters any more.
    pub(super) fn drop_events(&mut self) {
        self.run_until = None;
        self.kill_at = None;
        self.interrupt = None;
        self.resize = None;
        self.input = VecDeque::new();
        self.input_bytes = 0;
        self.writers.clear();
    }

    // ---- input ----------------------------------------------------------

    /// Somebody typed `data` at `offset`.
    pub(super) fn handle_input(&mut self, writer: DashboardId, offset: u64, data: &[u8]) -> Typed {
        if self.writers.len() >= WRITERS_MAX && !self.writers.contains_key(&writer) {
            return Typed::TooMany;
        }
        let state = self.writers.entry(writer.clone()).or_default();
        let Some(known) = state.received.checked_sub(offset) else {
            // Something in between was lost.
            state.tell = true;
            state.resend = true;
            return Typed::Nothing;
        };
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        let new = data.get(known..).unwrap_or_default();
        if new.is_empty() {
            state.tell = true; // it does not know that this had arrived
            return Typed::Nothing;
        }
        let full =
            self.input_bytes + new.len() > INPUT_BYTES_MAX || self.input.len() >= INPUT_PIECES_MAX;
        if full {
            state.missed = true;
            return Typed::Nothing;
        }
        state.received += new.len() as u64;
        self.input_bytes += new.len();
        match self.input.back_mut() {
            Some((last, piece)) if *last == writer && piece.len() < INPUT_PIECE_BYTES => {
                piece.extend_from_slice(new);
            }
            Some(_) | None => self.input.push_back((writer, BytesMut::from(new))),
        }
        Typed::Received
    }

    /// The next event for the handler; without `input`, only those that are
    /// none. Taking input is what acknowledges it.
    pub(super) fn take_event(&mut self, input: bool) -> Option<ExecutionEvent> {
        if let Some(grace) = self.interrupt.take() {
            return Some(ExecutionEvent::Interrupt { grace });
        }
        if let Some(size) = self.resize.take() {
            return Some(ExecutionEvent::Resize(size));
        }
        if !input {
            return None;
        }
        let (writer, data) = self.input.pop_front()?;
        self.input_bytes -= data.len();
        if let Some(state) = self.writers.get_mut(&writer) {
            state.taken += data.len() as u64;
            state.tell = true;
        }
        if self.input_bytes <= INPUT_BYTES_MAX / 2 && self.input.len() <= INPUT_PIECES_MAX / 2 {
            for state in self.writers.values_mut().filter(|state| state.missed) {
                state.missed = false;
                state.tell = true;
                state.resend = true;
            }
        }
        Some(ExecutionEvent::Input(data.freeze()))
    }

    // ---- what is said of it ---------------------------------------------

    /// As the greeting lists it.
    pub(super) fn listed(&self, command: CommandId) -> HeldCommand {
        let (status, end) = match &self.stage {
            Stage::Waiting | Stage::Recording { .. } | Stage::Offered => {
                (CommandStatus::Dispatched, None)
            }
            Stage::Running => (CommandStatus::Running, None),
            Stage::Ended { status, end, .. } => (*status, Some(end.clone())),
        };
        HeldCommand {
            command,
            attempt: self.attempt,
            status,
            spec: None,
            stream: self.tail.as_ref().map(Tail::listed),
            end,
        }
    }

    /// The greeting lists it, as it now is.
    pub(super) fn handle_greeting(&mut self, is_listed: bool) {
        self.told =
            Told { stream: is_listed && self.tail.is_some(), end: is_listed && self.is_ended() };
        if let Some(tail) = &mut self.tail {
            tail.handle_link();
        }
        for writer in self.writers.values_mut() {
            // What was under way when the last link was lost is gone.
            writer.tell = true;
            writer.resend = true;
        }
    }

    /// The hub has acknowledged the greeting. A stream that it did not list is
    /// announced on this link, and may be sent up to `allowed` without waiting.
    pub(super) fn handle_ack(&mut self, allowed: u64) {
        if let Some(tail) = self.tail.as_mut().filter(|_| !self.told.stream) {
            tail.begin(allowed);
        }
    }

    /// What has happened since the greeting was written.
    pub(super) fn news(&self, command: CommandId) -> Vec<AgentToHub> {
        let started = self.started(command).filter(|_| !self.told.stream);
        let complete = self.complete(command).filter(|_| !self.told.end);
        started.into_iter().chain(self.was_signalled(command)).chain(complete).collect()
    }

    /// All that was said of it so far, to be said again.
    pub(super) fn words(&self, command: CommandId) -> Vec<AgentToHub> {
        let accepted = CommandAccepted { command, attempt: self.attempt };
        let accepted = AgentToHub::Accepted(accepted);
        let rest = self.started(command).into_iter().chain(self.was_signalled(command));
        std::iter::once(accepted).chain(rest).chain(self.complete(command)).collect()
    }

    fn started(&self, command: CommandId) -> Option<AgentToHub> {
        let attempt = self.attempt;
        let stream = self.tail.as_ref()?.stream();
        Some(AgentToHub::Started(CommandStarted { command, attempt, stream }))
    }

    fn was_signalled(&self, command: CommandId) -> Option<AgentToHub> {
        let attempt = self.attempt;
        let stage = InterruptStage::Signalled;
        let word = CommandInterrupting { command, attempt, stage };
        (self.signalled && !self.is_ended()).then_some(AgentToHub::Interrupting(word))
    }

    fn complete(&self, command: CommandId) -> Option<AgentToHub> {
        let attempt = self.attempt;
        let Stage::Ended { status, end, .. } = &self.stage else { return None };
        let (status, end) = (*status, end.clone());
        Some(AgentToHub::Complete(CommandComplete { command, attempt, status, end }))
    }
}
