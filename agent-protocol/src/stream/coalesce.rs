//! Small writes are worth a message together: what a program writes after a
//! silence is sent at once, and what follows is gathered for a moment.
//!
//! ```text
//! written   a          bc d                 e          f
//! due       a ─────────────── bcd ───────── e ...      f
//!           │←── window ────→│←── window ──→│ silence
//! ```
//!
//! A person who types sees the echo without delay, and a program that writes
//! a thousand lines a second makes 125 batches of it. Only bytes pass through
//! here: control never waits for a window.

use std::time::Duration;

/// How long and how much to gather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coalescing {
    /// Least time between two batches, unless the second is full. 8 ms: half
    /// a frame of a 60 Hz screen, so nobody sees it. Zero: never gather.
    pub window: Duration,
    /// A batch of this many bytes is full and waits no longer. 32 KiB.
    pub bytes_max: u64,
}

impl Default for Coalescing {
    fn default() -> Self {
        Self { window: Duration::from_millis(8), bytes_max: 32 * 1024 }
    }
}

/// Decides up to which offset a stream is due to be sent.
///
/// It holds no bytes: they lie in the [`Log`](super::Log), from where
/// [`read_gathered`](super::Log::read_gathered) takes them. Nor does it know
/// how far sending has got: what is due stays due while a link is slow or
/// gone, so a stalled link never makes a timer fire in vain.
#[derive(Debug, Clone)]
pub struct Coalescer {
    coalescing: Coalescing,
    written: u64,
    due: u64,
    due_at: Option<Duration>,
}

impl Coalescer {
    /// For a stream of which nothing has been written yet.
    pub fn new(coalescing: Coalescing) -> Self {
        Self { coalescing, written: 0, due: 0, due_at: None }
    }

    /// The stream now reaches up to offset `end`. An earlier end than one
    /// told before is ignored.
    pub fn handle_written(&mut self, end: u64, now: Duration) {
        self.written = self.written.max(end);
        self.release(now);
    }

    /// Everything below this offset should be sent by now.
    pub fn due(&mut self, now: Duration) -> u64 {
        self.release(now);
        self.due
    }

    /// When to ask [`due`](Self::due) again, because more will be due by the
    /// passing of time alone. `None` while nothing is being gathered.
    pub fn deadline(&self) -> Option<Duration> {
        let gathering = self.written > self.due;
        self.due_at.filter(|_| gathering).map(|at| at.saturating_add(self.coalescing.window))
    }

    /// Makes everything written so far due at once: at the end of a stream.
    pub fn flush(&mut self) {
        self.due = self.written;
    }

    fn release(&mut self, now: Duration) {
        let gathered = self.written - self.due;
        let quiet = self.due_at.is_none_or(|at| now >= at.saturating_add(self.coalescing.window));
        if gathered > 0 && (quiet || gathered >= self.coalescing.bytes_max) {
            self.due = self.written;
            self.due_at = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn fresh() -> Coalescer {
        Coalescer::new(Coalescing::default())
    }

    #[test]
    fn a_keystroke_after_silence_goes_at_once() {
        let mut echo = fresh();
        for key in 1..5 {
            let now = ms(key * 100);
            echo.handle_written(key, now);
            assert_eq!(echo.due(now), key);
            assert_eq!(echo.deadline(), None);
        }
    }

    #[test]
    fn what_follows_is_gathered_until_the_window_is_over() {
        let mut build = fresh();
        build.handle_written(10, ms(0));
        build.handle_written(20, ms(1));
        build.handle_written(30, ms(7));
        assert_eq!(build.due(ms(7)), 10);
        assert_eq!(build.deadline(), Some(ms(8)));
        assert_eq!(build.due(ms(8)), 30);
        assert_eq!(build.deadline(), None);

        build.handle_written(40, ms(9));
        assert_eq!(build.deadline(), Some(ms(16)), "the next window began with the last batch");
    }

    #[test]
    fn a_full_batch_waits_no_longer() {
        let mut cat = fresh();
        cat.handle_written(1, ms(0));
        cat.handle_written(32 * 1024, ms(1));
        assert_eq!(cat.due(ms(1)), 1);
        cat.handle_written(32 * 1024 + 1, ms(1));
        assert_eq!(cat.due(ms(1)), 32 * 1024 + 1);
    }

    #[test]
    fn the_end_of_a_stream_is_due_at_once() {
        let mut exit = fresh();
        exit.handle_written(1, ms(0));
        exit.handle_written(5, ms(1));
        exit.flush();
        assert_eq!(exit.due(ms(1)), 5);
        assert_eq!(exit.deadline(), None);
    }

    #[test]
    fn a_stalled_link_leaves_no_timer_running() {
        let mut stalled = fresh();
        stalled.handle_written(1, ms(0));
        stalled.handle_written(2, ms(1));
        assert_eq!(stalled.due(ms(8)), 2);
        // Nothing could be sent; it stays due, and nothing asks to be woken.
        assert_eq!(stalled.deadline(), None);
        assert_eq!(stalled.due(ms(500)), 2);
    }

    proptest! {
        /// Whatever a program writes, whoever wakes at the deadlines sees each
        /// byte due within one window, and no more batches than promised.
        #[test]
        fn no_byte_waits_longer_than_a_window_and_batches_are_few(
            writes in prop::collection::vec((0u64..12_000, 1u64..20_000), 1..200),
        ) {
            let rules = Coalescing::default();
            let mut coalescer = Coalescer::new(rules);
            let mut batches: Vec<(Duration, u64)> = Vec::new();
            let mut look = |coalescer: &mut Coalescer, now| {
                let due = coalescer.due(now);
                if batches.last().is_none_or(|(_, last)| due > *last) {
                    batches.push((now, due));
                }
                due
            };
            let (mut now, mut end) = (Duration::ZERO, 0);
            for (pause, len) in writes {
                let next = now + Duration::from_micros(pause);
                if let Some(deadline) = coalescer.deadline() {
                    prop_assert!(deadline <= now + rules.window);
                    if deadline <= next {
                        prop_assert_eq!(look(&mut coalescer, deadline), end);
                    }
                }
                now = next;
                end += len;
                coalescer.handle_written(end, now);
                let due = look(&mut coalescer, now);
                prop_assert!(end - due < rules.bytes_max);
                prop_assert_eq!(coalescer.deadline().is_some(), due < end);
            }
            for pair in batches.windows(2) {
                let ((at, upto), (next_at, next_upto)) = (pair[0], pair[1]);
                prop_assert!(
                    next_at >= at + rules.window || next_upto - upto >= rules.bytes_max
                );
            }
        }
    }
}
