//! Whether the hub wants another token on the present link.

use trunkline_protocol::one_line::OneLine;

/// A new token is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefreshWanted {
    /// The hub did not take the last one: the same again would be in vain.
    pub refused: bool,
}

/// What the hub has said about tokens.
///
/// It asks again, every few seconds, until it has taken one or the old one has
/// run out; so nothing is to be tried again here.
#[derive(Debug, Default)]
pub(crate) struct Refresh {
    wanted: bool,
    refused: bool,
}

impl Refresh {
    pub(crate) fn handle_needed(&mut self) {
        self.wanted = true;
    }

    pub(crate) fn handle_success(&mut self) {
        tracing::debug!(target: "trunkline::client", "the hub took the new token");
        *self = Self::default();
    }

    pub(crate) fn handle_failed(&mut self, why: &str) {
        tracing::warn!(target: "trunkline::client", why = %OneLine(why), "the hub did not take the new token");
        self.refused = true;
    }

    /// A greeting brings a token of its own.
    pub(crate) fn handle_link(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn poll(&mut self) -> Option<RefreshWanted> {
        std::mem::take(&mut self.wanted).then_some(RefreshWanted { refused: self.refused })
    }
}
