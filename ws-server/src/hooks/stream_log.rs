//! Where output is kept beyond the hub's process.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use trunkline_protocol::ids::{AgentId, CommandId, StreamId, TenantId};
use trunkline_protocol::message::{Channel, Gap};
use trunkline_protocol::one_line::OneLine;

use super::BoxFuture;

/// Whose output a stream is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHead {
    /// Whose command.
    pub tenant: TenantId,
    /// The stream: one id in two tenants is two streams.
    pub stream: StreamId,
    /// Which command.
    pub command: CommandId,
    /// Which attempt at it.
    pub attempt: u32,
    /// Where it runs.
    pub agent: AgentId,
}

/// A part of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes.
    Output {
        /// Where the first of them stands.
        offset: u64,
        /// What wrote them.
        channel: Channel,
        /// The bytes: 1 to 16,384.
        data: Bytes,
    },
    /// A hole, by its range and why it is there.
    Gap(Gap),
}

impl Piece {
    /// Where it begins.
    pub fn from(&self) -> u64 {
        match self {
            Self::Output { offset, .. } => *offset,
            Self::Gap(gap) => gap.from,
        }
    }

    /// Where it ends.
    pub fn to(&self) -> u64 {
        match self {
            Self::Output { offset, data, .. } => offset.saturating_add(data.len() as u64),
            Self::Gap(gap) => gap.to,
        }
    }
}

/// One change to what is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogChange {
    /// A stream begins. Whatever is kept under its id is dropped.
    Opened(StreamHead),
    /// A stream goes on. Whatever is kept of it at or beyond the place where
    /// the piece begins is replaced.
    Grown {
        /// Whose.
        tenant: TenantId,
        /// Which.
        stream: StreamId,
        /// What follows.
        piece: Piece,
    },
    /// Pieces that end at or below an offset are no longer wanted.
    Evicted {
        /// Whose.
        tenant: TenantId,
        /// Which.
        stream: StreamId,
        /// Below this.
        before: u64,
    },
    /// The stream is no longer wanted.
    Dropped {
        /// Whose.
        tenant: TenantId,
        /// Which.
        stream: StreamId,
    },
}

/// A stream as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredStream {
    /// Whose it is.
    pub head: StreamHead,
    /// What is kept of it, in the order of the offsets.
    pub pieces: Vec<Piece>,
}

/// Why output could not be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stream log: {}", OneLine(.0))]
pub struct LogError(pub String);

/// Keeps the output that is in the hub's memory for the next hub.
///
/// Without one, output survives a hub as far as agents still have it. With
/// one, an agent is told that output is stored when it is kept here, and
/// readers are shown it before that. The log is bounded by the limits of the
/// hub's memory, to which it is a copy: it holds up to an eighth of
/// [`log_bytes_per_stream`] more for each stream.
///
/// Goes with a [`CommandQueue`](super::CommandQueue) that survives, too: the
/// output of commands that the queue does not know is dropped.
///
/// # Obligations
///
/// - [`apply`](Self::apply) returns `Ok` only when the changes are as durable
///   as the log promises. They are applied in order, and one call comes at a
///   time.
/// - On `Err`, or when it takes longer than [`hook_timeout`] and its future is
///   dropped, any of the changes may have been applied. The hub tells agents
///   that output is stored when it is in memory, as it does without a log,
///   tries again each second, and goes on from what was kept for certain, so
///   that changes may come again, cut into other pieces.
/// - A change to a stream that was not opened does nothing.
/// - [`load`](Self::load) gives every stream that was opened and not dropped,
///   in any order. It is called once, before the hub serves its first link.
/// - All of this is checked by `testing::stream_log` (feature `testing`).
///
/// [`hook_timeout`]: trunkline_protocol::limits::Limits::hook_timeout
/// [`log_bytes_per_stream`]: trunkline_protocol::limits::Limits::log_bytes_per_stream
pub trait StreamLog: Send + Sync + 'static {
    /// Everything kept.
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredStream>, LogError>>;

    /// Keeps changes: about 1 MiB of output at most.
    fn apply<'a>(&'a self, changes: &'a [LogChange]) -> BoxFuture<'a, Result<(), LogError>>;
}

/// Keeps output in memory, beside the hub's own copy: for a hub that is dropped
/// and built again in one process, and for tests.
#[derive(Debug, Default)]
pub struct MemoryStreamLog {
    streams: Mutex<BTreeMap<(TenantId, StreamId), StoredStream>>,
}

impl MemoryStreamLog {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything kept, at once.
    pub fn stored(&self) -> Vec<StoredStream> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Applies a change, at once.
    pub fn store(&self, change: &LogChange) {
        // A panic while holding the lock cannot leave a change half applied.
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            LogChange::Opened(head) => {
                let opened = StoredStream { head: head.clone(), pieces: Vec::new() };
                streams.insert((head.tenant.clone(), head.stream), opened);
            }
            LogChange::Grown { tenant, stream, piece } => {
                if let Some(stored) = streams.get_mut(&(tenant.clone(), *stream)) {
                    stored.pieces.retain(|known| known.from() < piece.from());
                    stored.pieces.push(piece.clone());
                }
            }
            LogChange::Evicted { tenant, stream, before } => {
                if let Some(stored) = streams.get_mut(&(tenant.clone(), *stream)) {
                    stored.pieces.retain(|known| known.to() > *before);
                }
            }
            LogChange::Dropped { tenant, stream } => {
                streams.remove(&(tenant.clone(), *stream));
            }
        }
    }
}

impl StreamLog for MemoryStreamLog {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredStream>, LogError>> {
        let stored = self.stored();
        Box::pin(async move { Ok(stored) })
    }

    fn apply<'a>(&'a self, changes: &'a [LogChange]) -> BoxFuture<'a, Result<(), LogError>> {
        for change in changes {
            self.store(change);
        }
        Box::pin(async { Ok(()) })
    }
}
