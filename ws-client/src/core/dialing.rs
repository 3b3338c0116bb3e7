//! When to dial: one state machine for agents and dashboards.
//!
//! ```text
//!            until         handle_dialed       handle_acked
//!  Waiting ─────────► Dialing ─────────► Greeting ─────────► Up
//!     ▲                  │ failed, late      │ lost, late     │ lost
//!     └──────────────────┴──── back-off ─────┴────────────────┘
//!                              │ the close says never, or stop
//!                              ▼
//!                             Over
//! ```
//!
//! The first wait is short and random, so that a fleet does not come back all
//! at once; each further one doubles up to a maximum. A link that was up long
//! enough starts the count anew. What a close advises comes before all that.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_protocol::close::{Advice, CloseCode};
use trunkline_protocol::frame::Close;
use trunkline_protocol::time::Now;

/// How long to wait between attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The first attempt after a loss comes after a random part of this.
    /// 500 ms.
    pub first: Duration,
    /// The second attempt waits this long; each further one twice as long as
    /// the one before. 1 s.
    pub base: Duration,
    /// No attempt waits longer. 30 s.
    pub max: Duration,
    /// Each wait is changed at random by up to this much of itself, in
    /// percent. 20.
    pub jitter_percent: u32,
    /// A link that was up for this long starts the count anew. 30 s.
    pub reset_after: Duration,
    /// An attempt that is not acknowledged by then is given up. 10 s.
    pub attempt_timeout: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            base: Duration::from_secs(1),
            max: Duration::from_secs(30),
            jitter_percent: 20,
            reset_after: Duration::from_secs(30),
            attempt_timeout: Duration::from_secs(10),
        }
    }
}

/// A connection as its user sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionState {
    /// The first attempt.
    Connecting,
    /// The hub has acknowledged; everything flows.
    Connected,
    /// The link was lost, or could not be made; it is tried again for ever.
    Reconnecting {
        /// Attempts since the last good link, the next one included.
        attempt: u32,
        /// When the next one begins, in milliseconds since the epoch.
        next_at_ms: u64,
        /// Why the last one ended.
        why: Close,
    },
    /// It will not be tried again.
    Disconnected {
        /// Why. [`CloseCode::Normal`] if this side wanted it.
        why: Close,
    },
}

impl ConnectionState {
    /// Whether the hub is there.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected)
    }

    /// Whether it will never be tried again.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Disconnected { .. })
    }
}

/// What the shell is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialAction {
    /// Dial. With a new token if the last one was not accepted.
    Dial {
        /// Whether the last token was refused.
        token_refused: bool,
    },
    /// Drop the attempt, or the link, that is under way.
    HangUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting { until: Duration },
    Dialing { until: Duration },
    Greeting { until: Duration },
    Up { since: Duration },
    Over,
}

/// The state machine.
#[derive(Debug)]
pub struct Dialing {
    backoff: Backoff,
    rng: StdRng,
    state: State,
    shown: ConnectionState,
    /// Attempts that failed since the last link that held.
    failed: u32,
    token_refused: bool,
    /// Whether a refused token can be replaced.
    can_renew: bool,
    action: Option<DialAction>,
}

impl Dialing {
    /// A machine that wants to dial at once. `can_renew` says whether there is
    /// a source of new tokens: without one, a refused token is the end.
    pub fn new(backoff: Backoff, can_renew: bool, seed: [u8; 32]) -> Self {
        Self {
            backoff,
            rng: StdRng::from_seed(seed),
            state: State::Waiting { until: Duration::ZERO },
            shown: ConnectionState::Connecting,
            failed: 0,
            token_refused: false,
            can_renew,
            action: None,
        }
    }

    /// As its user sees it.
    pub fn state(&self) -> &ConnectionState {
        &self.shown
    }

    /// Whether it has ended for good.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// What the shell is to do next.
    pub fn poll_action(&mut self) -> Option<DialAction> {
        self.action.take()
    }

    /// When [`handle_timeout`](Self::handle_timeout) is due: the next attempt,
    /// or the end of patience with the present one.
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Waiting { until } | State::Dialing { until } | State::Greeting { until } => {
                Some(until)
            }
            State::Up { .. } | State::Over => None,
        }
    }

    /// A deadline has come.
    pub fn handle_timeout(&mut self, now: Now) {
        match self.state {
            State::Waiting { until } if until <= now.monotonic => {
                let until = now.monotonic.saturating_add(self.backoff.attempt_timeout);
                self.state = State::Dialing { until };
                self.action = Some(DialAction::Dial { token_refused: self.token_refused });
            }
            State::Dialing { until } | State::Greeting { until } if until <= now.monotonic => {
                self.action = Some(DialAction::HangUp);
                self.fail(&Close::new(CloseCode::Lost, "no answer in time"), now);
            }
            State::Waiting { .. }
            | State::Dialing { .. }
            | State::Greeting { .. }
            | State::Up { .. }
            | State::Over => {}
        }
    }

    /// A link is there; the greeting goes out.
    pub fn handle_dialed(&mut self, now: Now) {
        if self.is_over() {
            self.action = Some(DialAction::HangUp);
            return;
        }
        let until = match self.state {
            State::Dialing { until } => until, // dialling and greeting share one patience
            _ => now.monotonic.saturating_add(self.backoff.attempt_timeout), // a shell that dials by itself
        };
        self.state = State::Greeting { until };
    }

    /// No link could be made.
    pub fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.fail(close, now);
    }

    /// The hub has acknowledged the greeting.
    pub fn handle_acked(&mut self, now: Now) {
        if !self.is_over() {
            self.state = State::Up { since: now.monotonic };
            self.token_refused = false;
            self.shown = ConnectionState::Connected;
        }
    }

    /// The link is gone.
    pub fn handle_lost(&mut self, close: &Close, now: Now) {
        if let State::Up { since } = self.state
            && now.monotonic.saturating_sub(since) >= self.backoff.reset_after
        {
            self.failed = 0;
        }
        self.fail(close, now);
    }

    /// Dials at once instead of waiting, if it waits.
    pub fn retry_now(&mut self, now: Now) {
        if let State::Waiting { until } = &mut self.state {
            *until = now.monotonic;
        }
    }

    /// Ends it for good.
    pub fn stop(&mut self, _now: Now) {
        if !self.is_over() {
            self.end(Close::new(CloseCode::Normal, "stopped"));
        }
    }

    fn end(&mut self, why: Close) {
        self.state = State::Over;
        self.shown = ConnectionState::Disconnected { why };
    }

    fn fail(&mut self, close: &Close, now: Now) {
        match self.state {
            State::Dialing { .. } | State::Greeting { .. } | State::Up { .. } => {}
            // Given up already: told twice is failed once.
            State::Waiting { .. } | State::Over => return,
        }
        let at_least = match close.advice() {
            Advice::Never => return self.end(close.clone()),
            Advice::WithNewToken if !self.can_renew => return self.end(close.clone()),
            Advice::WithNewToken => {
                self.token_refused = true;
                Duration::ZERO
            }
            Advice::After(after) => after,
            Advice::Reconnect => Duration::ZERO,
        };
        let mut wait = self.wait();
        if wait < at_least {
            // Those who were told the same do not come at the same moment.
            wait = at_least + self.backoff.first.mul_f64(self.rng.random::<f64>());
        }
        self.failed = self.failed.saturating_add(1);
        self.state = State::Waiting { until: now.monotonic.saturating_add(wait) };
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.shown = ConnectionState::Reconnecting {
            attempt: self.failed,
            next_at_ms: now.wall_ms.saturating_add(wait_ms),
            why: close.clone(),
        };
    }

    /// The wait after `failed` failures.
    fn wait(&mut self) -> Duration {
        let Backoff { first, base, max, jitter_percent, .. } = self.backoff;
        if self.failed == 0 {
            return first.mul_f64(self.rng.random::<f64>());
        }
        let doublings = (self.failed - 1).min(20);
        let wait = base.saturating_mul(1 << doublings).min(max);
        let jitter = f64::from(jitter_percent.min(100)) / 100.0;
        wait.mul_f64(1.0 - jitter + 2.0 * jitter * self.rng.random::<f64>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Now {
        Now { monotonic: Duration::from_millis(millis), wall_ms: millis }
    }

    fn dialing(can_renew: bool) -> Dialing {
        Dialing::new(Backoff::default(), can_renew, [7; 32])
    }

    fn lost() -> Close {
        Close::new(CloseCode::Lost, "")
    }

    #[test]
    fn waits_grow_to_the_maximum_and_start_anew_after_a_link_that_held() {
        let mut dialing = dialing(false);
        dialing.handle_timeout(at(0));
        assert_eq!(dialing.poll_action(), Some(DialAction::Dial { token_refused: false }));
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..9 {
            dialing.handle_dial_failed(&lost(), at(now));
            let next = u64::try_from(dialing.deadline().unwrap().as_millis()).unwrap() + 1;
            waits.push(next - now);
            now = next;
            dialing.handle_timeout(at(now));
            assert!(dialing.poll_action().is_some());
        }
        assert!(waits[0] <= 501);
        for (i, nominal) in [1, 2, 4, 8, 16, 30, 30, 30].into_iter().enumerate() {
            let range = nominal * 800..=nominal * 1200 + 1;
            assert!(range.contains(&waits[i + 1]), "{waits:?}");
        }
        dialing.handle_dialed(at(now));
        dialing.handle_acked(at(now));
        now += 31_000;
        dialing.handle_lost(&lost(), at(now));
        assert!(dialing.deadline().unwrap() <= Duration::from_millis(now + 500));
    }

    #[test]
    fn a_link_that_flaps_does_not_start_the_count_anew() {
        let mut dialing = dialing(false);
        let mut now = 0;
        for _ in 0..4 {
            dialing.handle_timeout(at(now));
            dialing.handle_dialed(at(now));
            dialing.handle_acked(at(now));
            dialing.handle_lost(&lost(), at(now + 10));
            now = u64::try_from(dialing.deadline().unwrap().as_millis()).unwrap() + 1;
        }
        assert!(now >= 5_000, "1 + 2 + 4 s, less jitter, at {now}");
    }

    #[test]
    fn every_close_code_is_obeyed() {
        for code in CloseCode::ALL {
            for can_renew in [false, true] {
                let mut dialing = dialing(can_renew);
                dialing.handle_timeout(at(0));
                dialing.handle_dialed(at(0));
                dialing.handle_lost(&Close::new(*code, ""), at(0));
                match code.advice() {
                    Advice::Never => assert!(dialing.is_over(), "{code}"),
                    Advice::WithNewToken => assert_eq!(dialing.is_over(), !can_renew, "{code}"),
                    Advice::After(after) => assert!(dialing.deadline().unwrap() >= after, "{code}"),
                    Advice::Reconnect => assert!(dialing.deadline().is_some(), "{code}"),
                }
            }
        }
    }

    #[test]
    fn a_refused_token_asks_for_another() {
        let mut dialing = dialing(true);
        dialing.handle_timeout(at(0));
        dialing.poll_action();
        dialing.handle_dialed(at(0));
        dialing.handle_lost(&Close::new(CloseCode::Unauthorized, ""), at(0));
        dialing.handle_timeout(at(1_000));
        assert_eq!(dialing.poll_action(), Some(DialAction::Dial { token_refused: true }));
    }

    #[test]
    fn one_failure_told_twice_counts_once() {
        let mut dialing = dialing(false);
        dialing.handle_timeout(at(0));
        dialing.handle_timeout(at(10_000));
        assert_eq!(dialing.poll_action(), Some(DialAction::HangUp));
        let next = dialing.deadline();
        dialing.handle_lost(&lost(), at(10_000));
        dialing.handle_dial_failed(&lost(), at(10_000));
        assert_eq!(dialing.deadline(), next);
        assert!(matches!(dialing.state(), ConnectionState::Reconnecting { attempt: 1, .. }));
    }

    #[test]
    fn a_hint_is_kept_and_those_who_got_it_do_not_come_at_once() {
        let until = |seed| {
            let mut dialing = Dialing::new(Backoff::default(), false, [seed; 32]);
            dialing.handle_timeout(at(0));
            dialing.handle_dialed(at(0));
            dialing.handle_lost(&Close::restart(Duration::from_secs(7)), at(0));
            dialing.deadline().unwrap()
        };
        for seed in 0..50 {
            assert!((7_000..=7_500).contains(&until(seed).as_millis()), "{:?}", until(seed));
        }
        assert_ne!(until(1), until(2));
    }

    #[test]
    fn a_wait_can_be_cut_short_and_a_stop_is_final() {
        let mut dialing = dialing(false);
        dialing.handle_timeout(at(0));
        for _ in 0..5 {
            dialing.handle_dial_failed(&lost(), at(0));
            dialing.retry_now(at(0));
            dialing.poll_action();
            dialing.handle_timeout(at(0));
            assert_eq!(dialing.poll_action(), Some(DialAction::Dial { token_refused: false }));
        }
        dialing.stop(at(0));
        dialing.handle_lost(&lost(), at(0));
        dialing.retry_now(at(0));
        assert_eq!(dialing.deadline(), None);
        let ConnectionState::Disconnected { why } = dialing.state() else { panic!() };
        assert_eq!(why.code, CloseCode::Normal);
    }

    #[test]
    fn an_attempt_that_hangs_is_given_up() {
        let mut dialing = dialing(false);
        dialing.handle_timeout(at(0));
        dialing.poll_action();
        dialing.handle_dialed(at(4_000));
        dialing.handle_timeout(at(9_999));
        assert_eq!(dialing.poll_action(), None);
        dialing.handle_timeout(at(10_000));
        assert_eq!(dialing.poll_action(), Some(DialAction::HangUp));
        assert!(matches!(dialing.state(), ConnectionState::Reconnecting { attempt: 1, .. }));
    }
}
