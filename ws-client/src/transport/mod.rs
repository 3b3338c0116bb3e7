//! Transports: bytes to frames, and nothing else.

#[cfg(feature = "polling")]
mod polling;
#[cfg(feature = "polling")]
mod reach;
#[cfg(feature = "tls")]
mod tls;
mod websocket;

#[cfg(feature = "polling")]
pub use self::polling::Polling;
#[cfg(feature = "polling")]
pub use self::reach::Reaching;
#[cfg(feature = "tls")]
pub use self::tls::{TlsError, TrustError};
pub use self::websocket::{HttpRefusal, UrlError, WebSocket};
