//! Whether a link lives: when to ping, and when to give up.
//!
//! Any received frame counts as life, so a busy link sends no pings, and a
//! peer that is slowly sending one large message is not mistaken for dead as
//! long as bytes arrive ([`Liveness::handle_heard`] may be called for those).

use std::time::Duration;

/// One end's view of one link. Times are `Now::monotonic`.
#[derive(Debug, Clone)]
pub struct Liveness {
    idle: Duration,
    timeout: Duration,
    heard: Duration,
    said: Duration,
    pings: u64,
    pinged: Option<Duration>,
    round_trip: Option<Duration>,
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Nothing before [`Liveness::deadline`].
    Nothing,
    /// Send `heartbeat:ping` with this number.
    Ping(u64),
    /// The link is dead.
    Dead,
}

impl Liveness {
    /// A link that came up at `now`: pings after `idle` without having said
    /// anything, dead after `timeout` without having heard anything.
    pub fn new(idle: Duration, timeout: Duration, now: Duration) -> Self {
        Self { idle, timeout, heard: now, said: now, pings: 0, pinged: None, round_trip: None }
    }

    /// Something arrived.
    pub fn handle_heard(&mut self, now: Duration) {
        self.heard = now;
    }

    /// Something was sent.
    pub fn handle_said(&mut self, now: Duration) {
        self.said = now;
    }

    /// A pong arrived; one that answers no ping under way is ignored.
    pub fn handle_pong(&mut self, n: u64, now: Duration) {
        if n == self.pings
            && let Some(at) = self.pinged.take()
        {
            self.round_trip = Some(now.saturating_sub(at));
        }
    }

    /// The last measured round trip.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// When to ask [`poll`](Self::poll) again: the ping that is due, or the
    /// end of patience.
    pub fn deadline(&self) -> Duration {
        self.said.saturating_add(self.idle).min(self.heard.saturating_add(self.timeout))
    }

    /// What is due now. A ping counts as said.
    pub fn poll(&mut self, now: Duration) -> Due {
        if now >= self.heard.saturating_add(self.timeout) {
            return Due::Dead;
        }
        if now < self.said.saturating_add(self.idle) {
            return Due::Nothing;
        }
        self.said = now;
        self.pings += 1;
        self.pinged = Some(now);
        Due::Ping(self.pings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_busy_link_sends_no_pings() {
        let mut link = Liveness::new(2 * S, 5 * S, Duration::ZERO);
        for second in 1..100 {
            link.handle_heard(second * S);
            link.handle_said(second * S);
            assert_eq!(link.poll(second * S), Due::Nothing);
        }
    }

    #[test]
    fn silence_is_pinged_and_then_dead() {
        let mut link = Liveness::new(2 * S, 5 * S, Duration::ZERO);
        assert_eq!(link.deadline(), 2 * S);
        assert_eq!(link.poll(2 * S), Due::Ping(1));
        assert_eq!(link.poll(4 * S), Due::Ping(2));
        assert_eq!(link.deadline(), 5 * S);
        assert_eq!(link.poll(5 * S), Due::Dead);
    }

    #[test]
    fn a_pong_measures_its_own_ping_only() {
        let mut link = Liveness::new(2 * S, 60 * S, Duration::ZERO);
        link.poll(2 * S);
        link.poll(4 * S);
        link.handle_pong(1, 5 * S);
        assert_eq!(link.round_trip(), None, "an old ping's pong");
        link.handle_pong(2, 7 * S);
        assert_eq!(link.round_trip(), Some(3 * S));
    }
}
