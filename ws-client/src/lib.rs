//! Agents and dashboards for trunkline: they connect to a hub, for ever, and
//! go on where they stood.
//!
//! An agent that runs real programs in real terminals:
//!
//! ```no_run
//! use trunkline_client::{Agent, Programs};
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let agent = Agent::builder("ws://127.0.0.1:7070", "build-1")?.connect(Programs::new());
//!     println!("{}", agent.closed().await);
//!     Ok(())
//! }
//! ```
//!
//! A dashboard that runs a command and shows what its terminal shows:
//!
//! ```no_run
//! use trunkline_client::{Dashboard, Request, TerminalEvent};
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let dashboard = Dashboard::builder("ws://127.0.0.1:7070")?.connect();
//!     let command = dashboard.run("build-1", Request::argv(["ls", "-l"])).await?;
//!     let mut terminal = command.terminal();
//!     while let Some(event) = terminal.next().await {
//!         if let TerminalEvent::Output { data, .. } = event {
//!             // To a terminal of your own, feed it through a `TerminalFilter` first.
//!             print!("{}", String::from_utf8_lossy(&data));
//!         }
//!     }
//!     Ok(())
//! }
//! ```
//!
//! Both reconnect by themselves ([`Backoff`]), say how they are
//! ([`ConnectionState`]), and resume by position: no byte is lost or doubled
//! as long as the hub's log or the agent's tail holds it, and what is lost is
//! named. What runs a command is your [`CommandHandler`], or [`Programs`]; an
//! agent that has a [`Journal`] runs no attempt twice, even when it crashes. The
//! pure halves are in [`core`], for simulators and other runtimes.
//!
//! # Features
//!
//! | feature | |
//! |---|---|
//! | `programs` (default) | `Programs`: real programs, in a pseudo-terminal or with pipes. Unix only |
//! | `tls` | `wss://` URLs: see [`WebSocket`] |
//! | `polling` | links over plain HTTP where no WebSocket gets through: see `Reaching` |
//! | `logs` | both forward what this process logs |
//! | `testing` | agents that follow scripts, viewers, and what a journal must keep |

mod agent;
pub mod connector;
pub mod core;
mod dashboard;
mod handler;
pub mod journal;
#[cfg(feature = "logs")]
pub mod logs;
mod shell;
#[cfg(feature = "testing")]
pub mod testing;
mod tokens;
mod transport;

#[cfg(all(unix, feature = "programs"))]
mod programs;

pub use agent::{Agent, AgentBuilder, SetupError};
pub use connector::{BoxFuture, BoxLink, Connector, FrameLink};
pub use core::dashboard::{Audit, DashboardEvent, InputError, RequestError, TerminalEvent};
pub use core::dialing::{Backoff, ConnectionState};
pub use core::outbox::OutboxLimits;
#[cfg(feature = "polling")]
pub use core::reach::Way;
pub use dashboard::{
    Command, Dashboard, DashboardBuilder, Disconnected, Events, Lost, Request, Stage, Terminal,
    TerminalOptions,
};
pub use handler::{CommandHandler, Execution, ExecutionEvent, Outcome, Output};
pub use journal::{FileJournal, Journal};
#[cfg(all(unix, feature = "programs"))]
pub use programs::Programs;
pub use tokens::TokenSource;
#[cfg(feature = "tls")]
pub use tokio_rustls::rustls;
pub use transport::{HttpRefusal, UrlError, WebSocket};
#[cfg(feature = "polling")]
pub use transport::{Polling, Reaching};
#[cfg(feature = "tls")]
pub use transport::{TlsError, TrustError};
pub use trunkline_protocol as protocol;
