//! What an embedder plugs in. Each hook has a default, and a page that says
//! when it is called and what it must keep.

mod authenticator;
#[cfg(feature = "jwt")]
mod jwt;
mod log_sink;
mod observer;
mod policy;
mod queue;
#[cfg(feature = "sqlite")]
mod sqlite;
mod stream_log;

use std::future::Future;
use std::pin::Pin;

pub(crate) use authenticator::ANYONE;
pub use authenticator::{
    Anyone, AuthError, Authenticator, Credentials, Identity, Role, TokenTable,
};
#[cfg(feature = "jwt")]
pub use jwt::{JwtAuthenticator, JwtBuilder, JwtSetupError};
pub use log_sink::{ForwardedLogs, LogSender, LogSink, LogSinkError, TracingLogSink};
pub use observer::{EVENTS_MAX, Event, Hook, Observer, What, Who};
pub use policy::{
    AgentRef, Agents, Grant, GrantError, Permission, Policy, RolePolicy, WholeTenant,
};
pub use queue::{CommandQueue, MemoryQueue, QueueChange, QueueError, StoredCommand};
#[cfg(feature = "sqlite")]
pub use sqlite::{
    HistoryCursor, HistoryPage, OpenError, SqliteQueue, SqliteQueueBuilder, SqliteStreamLog,
    SqliteStreamLogBuilder, Synchronous,
};
pub use stream_log::{
    LogChange, LogError, MemoryStreamLog, Piece, StoredStream, StreamHead, StreamLog,
};

/// A boxed future, so that hooks are object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
