//! Transports: bytes to frames, and nothing else.

mod websocket;

pub use self::websocket::{UrlError, WebSocket};
