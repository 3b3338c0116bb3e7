//! The handle to one command.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{CommandState, CommandStatus, Target, TerminalSize};

use super::{Dashboard, Terminal};
use crate::core::dashboard::{InputError, RequestError};

/// It will not be known here how a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The hub lost its memory, and no agent brought the command back within
    /// 10 s of a connected dashboard; or it ended so long ago that it is no
    /// longer listed.
    #[error("the hub no longer knows command {command}")]
    ByHub {
        /// Which.
        command: CommandId,
    },
    /// The dashboard was closed, or the hub does not want it back. The
    /// command goes on.
    #[error("the dashboard was closed before command {command} ended")]
    Closed {
        /// Which.
        command: CommandId,
    },
}

/// How far a command is, as far as this dashboard knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// The roster has not listed it yet.
    Unlisted,
    /// As the roster has it, or last had it.
    Listed(Arc<CommandState>),
    /// How it ends will not be known here.
    Lost {
        /// Why.
        why: Lost,
        /// What was last known.
        last: Option<Arc<CommandState>>,
    },
}

impl Stage {
    /// What is known of the command.
    pub fn state(&self) -> Option<&Arc<CommandState>> {
        match self {
            Self::Unlisted => None,
            Self::Listed(state) => Some(state),
            Self::Lost { last, .. } => last.as_ref(),
        }
    }

    /// Gives up on a command that has not ended.
    pub(super) fn lose(&mut self, why: Lost) {
        if self.state().is_none_or(|state| !state.status.is_final()) {
            *self = Self::Lost { why, last: self.state().cloned() };
        }
    }
}

/// One command: how far it is, and what to do with it.
///
/// Dropping it changes nothing for the command.
#[derive(Debug)]
pub struct Command {
    dashboard: Dashboard,
    id: CommandId,
    stages: watch::Receiver<Stage>,
}

impl Drop for Command {
    fn drop(&mut self) {
        self.dashboard.shared.quietly(|core, _| {
            // The one left is this handle's own.
            if core.stages.get(&self.id).is_some_and(|stages| stages.receiver_count() <= 1) {
                core.stages.remove(&self.id);
            }
        });
    }
}

impl Command {
    pub(super) fn new(dashboard: Dashboard, id: CommandId, stages: watch::Receiver<Stage>) -> Self {
        Self { dashboard, id, stages }
    }

    /// Its id.
    pub fn id(&self) -> CommandId {
        self.id
    }

    /// The command as last known; `None` before the roster has listed it.
    pub fn state(&self) -> Option<Arc<CommandState>> {
        self.stages.borrow().state().cloned()
    }

    /// How far it is, observable: status, attempt, how far an interrupt is,
    /// how it ended. Only the newest is kept for a slow reader.
    pub fn stages(&self) -> watch::Receiver<Stage> {
        self.stages.clone()
    }

    /// Waits until the command is at least as far as `status`, and says how
    /// far that is: one that ended without getting there has got further.
    /// Final states are all equally far.
    ///
    /// Waits for ever for a command that the hub never knew.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When it will not be known.
    pub async fn reached(&self, status: CommandStatus) -> Result<Arc<CommandState>, Lost> {
        let mut stages = self.stages.clone();
        let there = |stage: &Stage| match stage {
            Stage::Unlisted => false,
            Stage::Listed(state) => distance(state.status) >= distance(status),
            Stage::Lost { .. } => true,
        };
        match stages.wait_for(there).await.as_deref() {
            Ok(Stage::Listed(state)) => Ok(Arc::clone(state)),
            Ok(Stage::Lost { last: Some(last), .. })
                if distance(last.status) >= distance(status) =>
            {
                Ok(Arc::clone(last))
            }
            Ok(Stage::Lost { why, .. }) => Err(*why),
            // Not waited for, or gone with `shared`, which this handle holds.
            Ok(Stage::Unlisted) | Err(_) => Err(Lost::Closed { command: self.id }),
        }
    }

    /// Waits until the command has ended, and says how. Its output may still
    /// be on its way: that ends with
    /// [`TerminalEvent::Ended`](crate::TerminalEvent::Ended).
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When it will not be known.
    pub async fn ended(&self) -> Result<Arc<CommandState>, Lost> {
        self.reached(CommandStatus::Completed).await
    }

    /// Reads its terminal, through all its attempts, from the oldest byte
    /// that is kept.
    pub fn terminal(&self) -> Terminal {
        self.dashboard.terminal(Target::Command(self.id))
    }

    /// Types into it: see [`Dashboard::input`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn input(&self, data: impl Into<Bytes>) -> Result<(), InputError> {
        self.dashboard.input(self.id, data).await
    }

    /// Changes the size of its terminal: see [`Dashboard::resize`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), RequestError> {
        self.dashboard.resize(self.id, size).await
    }

    /// Interrupts it: see [`Dashboard::interrupt`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn interrupt(&self) -> Result<(), RequestError> {
        self.dashboard.interrupt(self.id).await
    }
}

/// How far a status is from nothing.
fn distance(status: CommandStatus) -> u8 {
    match status {
        CommandStatus::Queued => 0,
        CommandStatus::Dispatched => 1,
        CommandStatus::Running => 2,
        CommandStatus::Completed
        | CommandStatus::Failed
        | CommandStatus::Interrupted
        | CommandStatus::TimedOut
        | CommandStatus::Expired
        | CommandStatus::Unknown => 3,
    }
}
