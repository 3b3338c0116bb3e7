//! Agents and dashboards.
mod agent;
pub mod connector;
pub mod core;
mod dashboard;
mod handler;
mod shell;
mod transport;

#[cfg(all(unix, feature = "programs"))]
mod programs;

pub use agent::{Agent, AgentBuilder, SetupError};
pub use connector::{BoxFuture, BoxLink, Connector, FrameLink, TokenSource};
pub use core::dashboard::{Audit, DashboardEvent, InputError, RequestError, TerminalEvent};
pub use core::dialing::{Backoff, ConnectionState};
pub use core::outbox::OutboxLimits;
pub use dashboard::{
    Command, Dashboard, DashboardBuilder, Disconnected, Events, Lost, Request, Stage, Terminal,
    TerminalOptions,
};
pub use handler::{CommandHandler, Execution, ExecutionEvent, Outcome, Output};
#[cfg(all(unix, feature = "programs"))]
pub use programs::Programs;
pub use transport::{UrlError, WebSocket};
pub use trunkline_protocol as protocol;
