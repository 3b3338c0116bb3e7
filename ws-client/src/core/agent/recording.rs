//! Writing down before doing: which records wait for the journal, which it is
//! writing, and what happens when it has.
//!
//! ```text
//!               one batch at a time          done
//!   waiting ─────────────────────► writing ──────► what is to begin may begin
//!      ▲                              │ failed
//!      └── ends, what is settled ─────┴──────────► what was to begin has failed
//! ```
//!
//! Only a beginning is waited for: how a command ended is said at once, since a
//! hub that has heard it needs no journal. Nothing piles up behind a journal
//! that fails or hangs: a beginning that nobody waits for any more is taken
//! back, and every other record is of an attempt that had been recorded.

use std::collections::VecDeque;
use std::time::Duration;

use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{CommandAccepted, CommandComplete, CommandEnd, CommandStatus};
use trunkline_protocol::time::Now;

use super::commands::with_error;
use super::held::{Held, Stage};
use super::journal::{Attempts, JournalRecord, Known};
use super::{AgentCore, AgentOutput};

/// How long a command waits for the journal before it fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long after a failure what is not waited for is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Records written at a time.
const BATCH_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Recording {
    waiting: VecDeque<JournalRecord>,
    /// Handed out, and not answered yet.
    writing: Vec<JournalRecord>,
    /// The last batch failed.
    retry_at: Option<Duration>,
}

impl Recording {
    pub(super) fn push(&mut self, record: JournalRecord) {
        self.waiting.push_back(record);
    }

    /// An attempt does not begin after all. Says whether the journal may come
    /// to know of it all the same.
    pub(super) fn take_back(&mut self, begun: CommandAccepted) -> bool {
        let begun = JournalRecord::Begun(begun);
        self.waiting.retain(|record| *record != begun);
        self.writing.contains(&begun)
    }

    /// The next batch.
    pub(super) fn poll(&mut self) -> Option<Vec<JournalRecord>> {
        let urgent = |record: &JournalRecord| matches!(record, JournalRecord::Begun(_));
        let paused = self.retry_at.is_some() && !self.waiting.iter().any(urgent);
        if !self.writing.is_empty() || self.waiting.is_empty() || paused {
            return None;
        }
        let size = self.waiting.len().min(BATCH_MAX);
        self.writing = self.waiting.drain(..size).collect();
        Some(self.writing.clone())
    }

    /// The batch is written, or is not; what was to begin with it.
    fn handle_done(&mut self, written: bool, now: Duration) -> Vec<CommandAccepted> {
        self.retry_at = (!written).then(|| now.saturating_add(RETRY));
        let mut begun = Vec::new();
        for record in std::mem::take(&mut self.writing).into_iter().rev() {
            match record {
                JournalRecord::Begun(it) => begun.insert(0, it),
                JournalRecord::Ended(_) | JournalRecord::Settled(_) if !written => {
                    self.waiting.push_front(record);
                }
                JournalRecord::Ended(_) | JournalRecord::Settled(_) => {}
            }
        }
        begun
    }

    pub(super) fn handle_timeout(&mut self, now: Duration) {
        self.retry_at.take_if(|at| *at <= now);
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.retry_at.filter(|_| self.writing.is_empty() && !self.waiting.is_empty())
    }

    /// Whether something is on its way to a journal that works.
    pub(super) fn is_busy(&self) -> bool {
        self.retry_at.is_none() && !(self.writing.is_empty() && self.waiting.is_empty())
    }
}

impl AgentCore {
    /// What the journal says of the processes before this one.
    pub(super) fn recall(&mut self, records: &[JournalRecord]) {
        let attempts: Attempts = records.iter().collect();
        for (command, known) in attempts.iter() {
            let attempt = known.attempt();
            self.fence(command, attempt);
            let (status, end) = match known {
                Known::Settled(_) => continue,
                Known::Ended(ended) => (ended.status, ended.end.clone()),
                Known::Begun(_) => {
                    let why = "the agent died while it ran, or was about to";
                    (CommandStatus::Unknown, with_error(why))
                }
            };
            self.commands.insert(command, Held::recalled(attempt, status, end));
        }
    }

    /// A slot is free for a command: it begins once that is written down, or
    /// at once if nothing is.
    pub(super) fn prepare(&mut self, command: CommandId, now: Duration) {
        let Some(held) = self.commands.get_mut(&command) else { return };
        if let Some(recording) = &mut self.recording {
            held.stage = Stage::Recording { until: now.saturating_add(PATIENCE) };
            let attempt = held.attempt;
            recording.push(JournalRecord::Begun(CommandAccepted { command, attempt }));
        } else {
            held.stage = Stage::Offered;
            self.outputs.push_back(AgentOutput::Execute(command));
        }
    }

    pub(super) fn handle_recorded(&mut self, result: Result<(), &str>, now: Now) {
        let Some(recording) = &mut self.recording else { return };
        if let Err(error) = result {
            tracing::error!(target: "trunkline::client", %error, "the journal was not written");
        }
        for begun in recording.handle_done(result.is_ok(), now.monotonic) {
            let CommandAccepted { command, attempt } = begun;
            let waits = |held: &&mut Held| {
                held.attempt == attempt && matches!(held.stage, Stage::Recording { .. })
            };
            // One that was given up meanwhile stays given up.
            let Some(held) = self.commands.get_mut(&command).filter(waits) else { continue };
            match result {
                Ok(()) => {
                    held.is_recorded = true;
                    held.stage = Stage::Offered;
                    self.outputs.push_back(AgentOutput::Execute(command));
                }
                Err(error) => self.fail_unrecorded(command, error, now),
            }
        }
    }

    /// A command that cannot be written down is not started.
    pub(super) fn fail_unrecorded(&mut self, command: CommandId, error: &str, now: Now) {
        let why = format!("not started: the agent's journal could not be written: {error}");
        self.end(command, CommandStatus::Failed, with_error(&why), now);
    }

    /// Writes down how an attempt has ended whose beginning is, or may be,
    /// written down.
    pub(super) fn record_end(
        &mut self,
        begun: CommandAccepted,
        status: CommandStatus,
        end: &CommandEnd,
    ) {
        let Some(held) = self.commands.get_mut(&begun.command) else { return };
        let Some(recording) = &mut self.recording else { return };
        held.is_recorded |= recording.take_back(begun);
        if held.is_recorded {
            let CommandAccepted { command, attempt } = begun;
            let end = end.clone();
            let ended = CommandComplete { command, attempt, status, end };
            recording.push(JournalRecord::Ended(ended));
        }
    }
}
