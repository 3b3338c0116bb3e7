//! Transports: bytes to frames, and nothing else.

#[cfg(feature = "tls")]
mod tls;
mod websocket;

#[cfg(feature = "tls")]
pub use self::tls::{TlsError, TrustError};
pub use self::websocket::{UrlError, WebSocket};
