//! By which way to reach a hub: over a WebSocket as long as one comes through,
//! over plain HTTP where none does.
//!
//! ```text
//!            3 failures in a row              a probe comes through
//!   WebSocket ────────────────► polling ─────────────────────────► on trial
//!       ▲  ▲                      │  ▲                             │   │
//!       │  └──── not even that ───┘  └──── dies early, and the ────┘   │
//!       │                                  next probe is later         │
//!       └──────────────────────────── lasts ───────────────────────────┘
//! ```
//!
//! A failure is what tells that something on the way does not let a WebSocket
//! through: a dial that was answered otherwise or not at all, or a link that died
//! before long without a close. A hub that cannot be reached in any way, or that
//! says to come later, tells nothing of that.

use std::time::Duration;

/// Failures in a row before the other way is tried.
const FAILURES: u32 = 3;

/// A link that has lived so long has come through.
pub(crate) const LASTS: Duration = Duration::from_secs(10);

/// Between two probes at first, unless told otherwise.
pub(crate) const PROBE_EVERY: Duration = Duration::from_secs(60);

/// Probes that come through to links that die early come ever more rarely, but
/// not more than so many times.
const RARER_MAX: u32 = 10;

/// A way to reach a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// A WebSocket.
    WebSocket,
    /// Plain HTTP.
    Polling,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Reach {
    way: Way,
    failed: u32,
    /// The last probe came through, and its link has not lasted yet.
    is_on_trial: bool,
    /// Between two probes at first, and now.
    first_every: Duration,
    probe_every: Duration,
    probe_at: Duration,
}

impl Reach {
    pub(crate) fn new(probe_every: Duration) -> Self {
        Self {
            way: Way::WebSocket,
            failed: 0,
            is_on_trial: false,
            first_every: probe_every,
            probe_every,
            probe_at: Duration::ZERO,
        }
    }

    /// The way to dial.
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// When to see whether a WebSocket comes through again, while none is
    /// dialled.
    pub(crate) fn probe_at(&self) -> Option<Duration> {
        (self.way == Way::Polling).then_some(self.probe_at)
    }

    /// A dial, or a link that had not lasted, has failed.
    pub(crate) fn handle_failed(&mut self, way: Way, now: Duration) {
        match (way, self.way) {
            (Way::WebSocket, Way::WebSocket) => {
                self.failed += 1;
                if self.is_on_trial {
                    self.probe_every = (self.probe_every * 2).min(self.first_every * RARER_MAX);
                }
                if self.is_on_trial || self.failed >= FAILURES {
                    self.is_on_trial = false;
                    self.way = Way::Polling;
                    self.probe_at = now.saturating_add(self.probe_every);
                }
            }
            // It is no better.
            (Way::Polling, Way::Polling) => self.begin_anew(),
            (Way::WebSocket, Way::Polling) | (Way::Polling, Way::WebSocket) => {}
        }
    }

    /// A link has lasted, or has ended as one that came through.
    pub(crate) fn handle_lasted(&mut self, way: Way) {
        if (way, self.way) == (Way::WebSocket, Way::WebSocket) {
            self.failed = 0;
            self.is_on_trial = false;
            self.probe_every = self.first_every;
        }
    }

    /// A probe came through, or did not. Whether it is the way to go now.
    pub(crate) fn handle_probed(&mut self, came_through: bool, now: Duration) -> bool {
        if self.way == Way::Polling {
            self.probe_at = now.saturating_add(self.probe_every);
            if came_through {
                self.begin_anew();
                self.is_on_trial = true;
            }
        }
        came_through
    }

    fn begin_anew(&mut self) {
        self.way = Way::WebSocket;
        self.failed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn fallen_back(now: Duration) -> Reach {
        let mut reach = Reach::new(PROBE_EVERY);
        for _ in 0..FAILURES {
            assert_eq!((reach.way(), reach.probe_at()), (Way::WebSocket, None));
            reach.handle_failed(Way::WebSocket, now);
        }
        assert_eq!((reach.way(), reach.probe_at()), (Way::Polling, Some(now + PROBE_EVERY)));
        reach
    }

    #[test]
    fn three_failures_in_a_row_lead_to_the_other_way() {
        fallen_back(S);
        let mut reach = Reach::new(PROBE_EVERY);
        for _ in 0..10 {
            reach.handle_failed(Way::WebSocket, S);
            reach.handle_failed(Way::WebSocket, S);
            reach.handle_lasted(Way::WebSocket);
        }
        assert_eq!(reach.way(), Way::WebSocket, "they were not in a row");
    }

    #[test]
    fn what_is_no_better_is_not_kept_to() {
        let mut reach = fallen_back(S);
        reach.handle_failed(Way::Polling, 2 * S);
        assert_eq!((reach.way(), reach.probe_at()), (Way::WebSocket, None));
    }

    #[test]
    fn a_probe_that_comes_through_leads_back_and_is_on_trial() {
        let mut now = S;
        let mut reach = fallen_back(now);
        assert!(!reach.handle_probed(false, now));
        assert_eq!(reach.probe_at(), Some(now + PROBE_EVERY));
        // It lets WebSockets through and kills them: less and less is tried.
        for minutes in [2, 4, 8, 10, 10] {
            now += PROBE_EVERY;
            assert!(reach.handle_probed(true, now));
            assert_eq!((reach.way(), reach.probe_at()), (Way::WebSocket, None));
            reach.handle_failed(Way::WebSocket, now);
            assert_eq!(reach.probe_at(), Some(now + minutes * PROBE_EVERY));
        }
        // One that lasts starts the count anew.
        assert!(reach.handle_probed(true, now));
        reach.handle_lasted(Way::WebSocket);
        reach.handle_failed(Way::WebSocket, now);
        assert_eq!(reach.way(), Way::WebSocket);
        reach.handle_failed(Way::WebSocket, now);
        reach.handle_failed(Way::WebSocket, now);
        assert_eq!(reach.probe_at(), Some(now + PROBE_EVERY));
    }

    #[test]
    fn what_is_told_of_the_other_way_changes_nothing() {
        let mut reach = fallen_back(S);
        reach.handle_failed(Way::WebSocket, 9 * S);
        reach.handle_lasted(Way::WebSocket);
        assert_eq!(reach.probe_at(), Some(S + PROBE_EVERY));
        reach.handle_lasted(Way::Polling);
        assert_eq!(reach.way(), Way::Polling);
        let mut reach = Reach::new(PROBE_EVERY);
        reach.handle_failed(Way::Polling, S);
        assert!(reach.handle_probed(true, S));
        assert!(!reach.is_on_trial, "it never left");
    }
}
