//! Transports: bytes to frames, and nothing else.

mod door;
mod guard;
mod handshake;
mod memory;
#[cfg(feature = "polling")]
mod polling;
mod websocket;

use std::io;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::Close;

pub(crate) use self::door::Door;
pub use self::door::{Origin, OriginError};
pub(crate) use self::guard::Greeted;
#[cfg(feature = "polling")]
pub(crate) use self::handshake::judge;
pub(crate) use self::handshake::{Heard, Refused, read, refuse};
pub use self::memory::MemoryLink;
pub(crate) use self::memory::pair;
#[cfg(feature = "polling")]
pub(crate) use self::polling::{Desk, Missed, PollingLink};
pub(crate) use self::websocket::link;

/// A peer broke the rules of its transport: not lost, but to be told and
/// closed. Travels inside an [`io::Error`].
///
/// A transport of your own may return it, through
/// [`into_error`](Self::into_error), from its stream.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub Close);

impl Violation {
    /// A violation with this code and reason.
    pub fn new(code: CloseCode, reason: &str) -> Self {
        Self(Close::new(code, reason))
    }

    /// As the error of a transport.
    pub fn into_error(self) -> io::Error {
        io::Error::other(self)
    }

    pub(crate) fn of(error: &io::Error) -> Option<Close> {
        error.get_ref()?.downcast_ref::<Self>().map(|violation| violation.0.clone())
    }
}
