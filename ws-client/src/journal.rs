//! Where an agent writes down what it begins, before it begins it.

mod file;

use trunkline_protocol::ids::InstanceId;

pub use self::file::{FileJournal, OpenError};
pub use crate::core::agent::{Attempts, FENCES_MAX, JournalRecord, Recovered};

use crate::connector::BoxFuture;

/// Why a journal cannot be read or written, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the agent's journal: {0}")]
pub struct JournalError(pub String);

/// Remembers, over a crash of the agent's process, what the agent has begun.
/// What it survives, "never twice" survives.
///
/// The agent records an attempt as [`Begun`](JournalRecord::Begun) and starts it
/// only when that is done; as [`Ended`](JournalRecord::Ended) when it is over;
/// as [`Settled`](JournalRecord::Settled) when the hub has stored how. The next
/// process lists to the hub what is not settled, ended as recorded or, without
/// an end, `unknown`; and starts no attempt that was begun.
///
/// # Obligations
///
/// - [`record`](Self::record) returns `Ok` only when all of its records are as
///   durable as the journal promises. A batch is recorded whole or not at all.
/// - On `Err`, and when its future is dropped, the agent does not know whether
///   the batch was recorded. It starts nothing that stood in it, and may record
///   the same again: repeating a record must be harmless.
/// - Calls come one at a time. One that never returns stops nothing but what
///   waits for it: what was to begin fails after ten seconds.
/// - [`load`](Self::load) gives records that come to the same [`Attempts`] as
///   all that were ever recorded, in order. It may give all of them, or as few
///   as [`Attempts::records`]; what a journal keeps must not grow for ever. It is
///   called once, before the first `record`.
/// - [`Recovered::instance`] names this memory, and is minted at random with it:
///   the same as long as nothing recorded has been lost, and never the same for
///   two memories. By it the hub knows that what is not listed was never begun,
///   and may be given to this agent again. A journal that may have lost something
///   takes a new one.
/// - It belongs to one agent at one hub, since another hub, which knows nothing
///   of what it lists, lets all of that be forgotten; and to one that runs. A second one that opens the same memory,
///   in this process or another, must fail to. A copy of it is no backup: brought
///   back, it claims that what was begun since was not.
pub trait Journal: Send + Sync + 'static {
    /// What is remembered.
    fn load(&self) -> BoxFuture<'_, Result<Recovered, JournalError>>;

    /// Writes down a batch, in its order.
    fn record<'a>(
        &'a self,
        records: &'a [JournalRecord],
    ) -> BoxFuture<'a, Result<(), JournalError>>;
}

/// The name of a memory that begins now.
#[expect(clippy::disallowed_methods, reason = "made by the embedder, outside the core")]
fn new_instance() -> InstanceId {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let millis = since_epoch.unwrap_or_default().as_millis();
    InstanceId::mint(u64::try_from(millis).unwrap_or(u64::MAX), rand::random())
}
