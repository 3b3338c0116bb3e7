//! What passes between an agent and whatever runs its commands.

use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::message::TerminalSize;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code.
    Exited(i32),
    /// A signal of this number ended it.
    Signalled(i32),
    /// It ended because it was interrupted.
    Interrupted,
    /// It could not be run: why, for people; 1,024 characters are kept.
    Failed(String),
}

/// Something for the handler to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecutionEvent {
    /// Somebody typed this. Each byte comes once, in order by its writer.
    Input(Bytes),
    /// The terminal has a new size; only the latest comes.
    Resize(TerminalSize),
    /// It is to end, and to be killed after the grace. Comes before
    /// everything else that waits, and may come again.
    Interrupt {
        /// How long it has to end by itself.
        grace: Duration,
    },
}
