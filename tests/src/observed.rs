//! What an observer of the hub hears, and must hear: each thing once, and in an
//! order that makes sense.

use std::collections::{BTreeMap, BTreeSet};

use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::CommandStatus;
use trunkline_server::core::LinkId;
use trunkline_server::hooks::{Event, What};

/// What one hub has told its observer so far.
#[derive(Debug, Default)]
pub struct Observed {
    links: BTreeMap<LinkId, Phase>,
    requested: BTreeSet<CommandId>,
    ended: BTreeMap<CommandId, CommandStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connected,
    Greeted,
    Over,
}

impl Observed {
    /// The next event.
    ///
    /// # Panics
    ///
    /// When it cannot be true after what was told before.
    pub fn hear(&mut self, event: &Event) {
        let link = event.link;
        let phase = link.and_then(|link| self.links.get(&link).copied());
        let mut becomes = |next| {
            if let Some(link) = link {
                self.links.insert(link, next);
            }
        };
        match &event.what {
            What::Connected { .. } => {
                assert_eq!(phase, None, "connected twice: {event:?}");
                becomes(Phase::Connected);
            }
            What::Greeted { .. } => {
                assert_eq!(phase, Some(Phase::Connected), "greeted: {event:?}");
                assert!(event.who.is_some(), "nobody has greeted: {event:?}");
                becomes(Phase::Greeted);
            }
            What::Rejected { .. } => {
                assert!(matches!(phase, None | Some(Phase::Connected)), "rejected: {event:?}");
                becomes(Phase::Over);
            }
            What::Closed { .. } => {
                assert_eq!(phase, Some(Phase::Greeted), "closed: {event:?}");
                assert!(event.who.is_some(), "nobody was closed: {event:?}");
                becomes(Phase::Over);
            }
            What::CommandRequested { command, outcome: Ok(()), .. } => {
                assert!(self.requested.insert(*command), "accepted twice: {event:?}");
            }
            What::CommandStarted { command, .. } => {
                assert_eq!(self.ended.get(command), None, "started after its end: {event:?}");
            }
            What::CommandEnded { command, status, .. } => {
                assert!(status.is_final(), "no end: {event:?}");
                let before = self.ended.insert(*command, *status);
                assert_eq!(before, None, "ended twice: {event:?}");
            }
            _ => {}
        }
    }

    /// Links that have greeted and have not ended, as far as was told.
    pub fn links(&self) -> usize {
        self.links.values().filter(|phase| **phase == Phase::Greeted).count()
    }

    /// How each command ended, as far as was told.
    pub fn ended(&self) -> &BTreeMap<CommandId, CommandStatus> {
        &self.ended
    }
}
