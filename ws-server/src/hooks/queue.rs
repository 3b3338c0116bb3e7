//! Where accepted commands are kept.

use std::collections::BTreeMap;
use std::sync::Mutex;

use trunkline_protocol::ids::{CommandId, DashboardId, InstanceId, QueueEpoch, StreamId, TenantId};
use trunkline_protocol::message::{CommandEnd, CommandRequest, CommandStatus};
use trunkline_protocol::one_line::OneLine;

use super::BoxFuture;

/// A command as a queue keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCommand {
    /// Whose it is.
    pub tenant: TenantId,
    /// What was asked for.
    pub request: CommandRequest,
    /// By whom; absent when a hub learnt of the command from its agent.
    pub requested_by: Option<DashboardId>,
    /// When it was accepted, in milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// Its place: first come first served within one priority.
    pub order: u64,
    /// How far it is: `queued`, `dispatched` or final.
    pub status: CommandStatus,
    /// The latest attempt; 0 before the first lease.
    pub attempt: u32,
    /// The agent process that holds the lease.
    pub instance: Option<InstanceId>,
    /// The output of the attempt, once known.
    pub stream: Option<StreamId>,
    /// When it ended.
    pub ended_at_ms: Option<u64>,
    /// How it ended.
    pub end: Option<CommandEnd>,
}

/// One change to what is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueueChange {
    /// A new command. Repeating it changes nothing.
    Accepted(Box<StoredCommand>),
    /// An attempt is about to be given to an agent process.
    Leased {
        /// Whose.
        tenant: TenantId,
        /// Which.
        command: CommandId,
        /// The attempt: greater than every earlier one that was sent to an
        /// agent. One that was stored and never sent is leased again, perhaps
        /// to another process.
        attempt: u32,
        /// The process.
        instance: InstanceId,
    },
    /// It ended; the status is final.
    Settled {
        /// Whose.
        tenant: TenantId,
        /// Which.
        command: CommandId,
        /// The attempt that ended.
        attempt: u32,
        /// How.
        status: CommandStatus,
        /// When, in milliseconds since the epoch.
        ended_at_ms: u64,
        /// Its output.
        stream: Option<StreamId>,
        /// In the agent's words.
        end: CommandEnd,
    },
    /// A finished command is no longer listed and may be dropped.
    Forgotten {
        /// Whose.
        tenant: TenantId,
        /// Which.
        command: CommandId,
    },
}

/// Why a change could not be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("command queue: {}", OneLine(.0))]
pub struct QueueError(pub String);

/// Keeps accepted commands. What it survives, they survive.
///
/// # Obligations
///
/// - [`apply`](Self::apply) returns `Ok` only when the change is as durable as
///   the queue promises: a requester hears `ok`, and an agent its command, only
///   after that. A change is applied whole or not at all.
/// - Changes to one command come one at a time, in order, from one hub.
///   Changes to different commands come concurrently.
/// - On `Err`, or when it takes longer than
///   [`hook_timeout`](trunkline_protocol::limits::Limits::hook_timeout) and its
///   future is dropped, the hub does not know whether the change was stored,
///   and may apply the same change again: repeating one must be harmless.
/// - [`load`](Self::load) gives every command that is not forgotten, in any
///   order. It is called once, before the hub serves its first link. An empty
///   list means that nothing was ever accepted.
/// - All of this is checked by `testing::command_queue` (feature `testing`).
/// - [`epoch`](Self::epoch) names this memory: the same as long as nothing that
///   was accepted has been lost.
pub trait CommandQueue: Send + Sync + 'static {
    /// The name of this memory.
    fn epoch(&self) -> QueueEpoch;

    /// Everything kept.
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>>;

    /// Stores one change.
    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>>;
}

/// Keeps commands in memory: they survive any loss of links and agents, and a
/// hub that is dropped and built again on the same queue, but not the process.
#[derive(Debug)]
pub struct MemoryQueue {
    epoch: QueueEpoch,
    commands: Mutex<BTreeMap<(TenantId, CommandId), StoredCommand>>,
}

impl MemoryQueue {
    /// An empty queue with a new epoch.
    #[expect(clippy::disallowed_methods, reason = "made by the embedder, outside the core")]
    pub fn new() -> Self {
        Self::with_epoch(QueueEpoch::from_u128(rand::random()))
    }

    /// An empty queue with this epoch, for tests that must repeat exactly.
    pub fn with_epoch(epoch: QueueEpoch) -> Self {
        Self { epoch, commands: Mutex::default() }
    }

    /// Everything kept, at once.
    pub fn stored(&self) -> Vec<StoredCommand> {
        self.lock().values().cloned().collect()
    }

    /// Applies a change, at once.
    pub fn store(&self, change: &QueueChange) {
        let mut commands = self.lock();
        match change {
            QueueChange::Accepted(command) => {
                let key = (command.tenant.clone(), command.request.command);
                commands.entry(key).or_insert_with(|| (**command).clone());
            }
            QueueChange::Leased { tenant, command, attempt, instance } => {
                if let Some(stored) = commands.get_mut(&(tenant.clone(), *command)) {
                    stored.status = CommandStatus::Dispatched;
                    stored.attempt = *attempt;
                    stored.instance = Some(*instance);
                }
            }
            QueueChange::Settled { tenant, command, attempt, status, ended_at_ms, stream, end } => {
                if let Some(stored) = commands.get_mut(&(tenant.clone(), *command)) {
                    stored.status = *status;
                    stored.attempt = *attempt;
                    stored.ended_at_ms = Some(*ended_at_ms);
                    stored.stream = *stream;
                    stored.end = Some(end.clone());
                }
            }
            QueueChange::Forgotten { tenant, command } => {
                commands.remove(&(tenant.clone(), *command));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(TenantId, CommandId), StoredCommand>> {
        // A panic while holding the lock cannot leave a change half applied.
        self.commands.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Default for MemoryQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl CommandQueue for MemoryQueue {
    fn epoch(&self) -> QueueEpoch {
        self.epoch
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>> {
        let stored = self.stored();
        Box::pin(async move { Ok(stored) })
    }

    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        self.store(change);
        Box::pin(async { Ok(()) })
    }
}
