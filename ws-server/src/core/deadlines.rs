//! What is due when. Every deadline says why it is set.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use trunkline_protocol::ids::{AgentId, CommandId, DashboardId, TenantId};

use super::LinkId;

/// Why something happens at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Due {
    /// The greeting must have succeeded.
    Greeting(LinkId),
    /// The link is to be pinged, or given up.
    Beat(LinkId),
    /// A closing link has had its time to be flushed.
    Flushed(LinkId),
    /// The link's credentials run out soon, or have.
    Credentials(LinkId),
    /// An unreachable agent is offline.
    AgentGrace(TenantId, AgentId),
    /// An offline agent is forgotten.
    AgentRetention(TenantId, AgentId),
    /// More grants are to be had.
    Grant(TenantId, AgentId),
    /// Dispatching failed for lack of storage and is tried again.
    Dispatch(TenantId, AgentId),
    /// A queued command expires.
    DeliverBy(TenantId, CommandId),
    /// A running command's time is over, and nobody is there to end it.
    RunFor(TenantId, CommandId),
    /// Storing a change failed and is tried again.
    Store(TenantId, CommandId),
    /// A finished command's output is dropped.
    LogRetention(TenantId, CommandId),
    /// Keeping output failed and is tried again.
    Keep,
    /// A dashboard that left is forgotten.
    Dashboard(TenantId, DashboardId),
    /// A subject without links has nothing used up any more.
    Subject(TenantId, String),
}

/// Deadlines by reason: one time each.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    by_time: BTreeSet<(Duration, Due)>,
    by_due: HashMap<Due, Duration>,
}

impl Deadlines {
    /// Sets or moves a deadline.
    pub(super) fn set(&mut self, due: Due, at: Duration) {
        if let Some(old) = self.by_due.insert(due.clone(), at) {
            if old == at {
                return;
            }
            self.by_time.remove(&(old, due.clone()));
        }
        self.by_time.insert((at, due));
    }

    /// Sets a deadline unless there is an earlier one.
    pub(super) fn set_earlier(&mut self, due: Due, at: Duration) {
        if self.by_due.get(&due).is_none_or(|known| at < *known) {
            self.set(due, at);
        }
    }

    /// Takes a deadline back.
    pub(super) fn cancel(&mut self, due: &Due) {
        if let Some(at) = self.by_due.remove(due) {
            self.by_time.remove(&(at, due.clone()));
        }
    }

    /// The first deadline.
    pub(super) fn next(&self) -> Option<Duration> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes the first deadline that has come.
    pub(super) fn pop(&mut self, now: Duration) -> Option<Due> {
        if self.next()? > now {
            return None;
        }
        let (_, due) = self.by_time.pop_first()?;
        self.by_due.remove(&due);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_deadline_fires_once_at_its_new_time() {
        let mut deadlines = Deadlines::default();
        let due = Due::Greeting(LinkId(1));
        deadlines.set(due.clone(), Duration::from_secs(5));
        deadlines.set(due.clone(), Duration::from_secs(9));
        deadlines.set_earlier(due.clone(), Duration::from_secs(10));
        assert_eq!(deadlines.pop(Duration::from_secs(8)), None);
        assert_eq!(deadlines.pop(Duration::from_secs(9)), Some(due.clone()));
        assert_eq!(deadlines.pop(Duration::from_secs(99)), None);
        deadlines.set(due.clone(), Duration::from_secs(5));
        deadlines.cancel(&due);
        assert_eq!(deadlines.next(), None);
    }
}
