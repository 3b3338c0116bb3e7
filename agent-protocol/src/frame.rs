//! What a transport carries: whole messages, and the close that ends them.

use std::fmt;

use bytes::Bytes;

use crate::close::CloseCode;
use crate::one_line::OneLine;

/// One unit on a link. Transports move frames, whole and in order, and look
/// into none of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A JSON message: valid UTF-8.
    Text(Bytes),
    /// A binary message.
    Binary(Bytes),
    /// The last frame in its direction.
    Close(Close),
}

impl Frame {
    /// Length of the content, in bytes; a close counts nothing.
    pub fn len(&self) -> usize {
        match self {
            Self::Text(bytes) | Self::Binary(bytes) => bytes.len(),
            Self::Close(_) => 0,
        }
    }

    /// Whether there is no content.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a link ends. The code is advice for whoever reads it: see
/// [`CloseCode::advice`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// What to make of it.
    pub code: CloseCode,
    /// For people, and for the hint of [`Close::retry_after`]: at most 123
    /// bytes on the wire (RFC 6455 §5.5).
    pub reason: String,
}

impl Close {
    /// A close with a reason. Longer reasons are cut at 123 bytes.
    pub fn new(code: CloseCode, reason: impl Into<String>) -> Self {
        let mut reason: String = reason.into();
        while reason.len() > 123 {
            reason.pop();
        }
        Self { code, reason }
    }
}

impl fmt::Display for Close {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if !self.reason.is_empty() {
            write!(f, ": {}", OneLine(&self.reason))?;
        }
        Ok(())
    }
}
