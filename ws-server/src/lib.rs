//! The trunkline hub: the place between agents, which run commands and stream
//! their terminals, and dashboards, which watch and drive them.
//!
//! ```no_run
//! use trunkline_server::Hub;
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let hub = Hub::builder().start().await?;
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:7070").await?;
//!     hub.serve(listener).await?;
//!     Ok(())
//! }
//! ```
//!
//! That hub lets anyone in, for development. With
//! [`HubBuilder::authenticator`] it asks for tokens (a table of them, or with
//! feature `jwt` those that your identity provider signs), with
//! [`HubBuilder::queue`] it keeps commands where they last, with
//! [`HubBuilder::limits`] every bound is yours.
//!
//! It listens by itself ([`Hub::serve`]), over whatever you make of an accepted
//! socket ([`Hub::serve_over`]), or within your own HTTP server: as a part of an
//! axum application (`Hub::router`, feature `axum`), or of any other
//! (`Hub::answer`, feature `polling`).
//!
//! The promises, the protocol and the map of the code are in the repository's
//! `docs/`. What is inside: [`core`] is the whole hub as a pure machine, for
//! whoever simulates it or runs it on another runtime; [`hooks`] is what an
//! embedder plugs in.

#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod conformance;
pub mod core;
pub mod hooks;
mod hub;
mod shell;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;

pub use crate::core::Stats;
pub use hooks::{
    Anyone, AuthError, Authenticator, CommandQueue, Credentials, Event, Identity, LogError,
    LogSink, MemoryQueue, MemoryStreamLog, Observer, Permission, Policy, QueueError, Role,
    RolePolicy, StreamLog, TokenTable, TracingLogSink,
};
#[cfg(feature = "jwt")]
pub use hooks::{JwtAuthenticator, JwtBuilder, JwtSetupError};
pub use hub::{Arrival, Hub, HubBuilder, IpNet, StartError};
pub use transport::{MemoryLink, Origin, OriginError, Violation};
pub use trunkline_protocol as protocol;
