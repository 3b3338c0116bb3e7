//! How often something may happen: the same arithmetic on both ends, so that
//! who keeps to what the ack says is never refused.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How often something may happen, and how often at once.
///
/// On the wire `{"every_ms":50,"burst":50}`: fifty at once after a silence,
/// and then one every 50 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct Rate {
    /// The time that one of them takes to be earned; zero: any number.
    pub every: Duration,
    /// How many may be saved up. At least 1.
    pub burst: u32,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    every_ms: u64,
    burst: u32,
}

impl From<Wire> for Rate {
    fn from(wire: Wire) -> Self {
        Self { every: Duration::from_millis(wire.every_ms), burst: wire.burst }
    }
}

impl From<Rate> for Wire {
    fn from(rate: Rate) -> Self {
        // Rounded up: who keeps to it is rather too slow than too fast.
        let every_ms = rate.every.as_micros().div_ceil(1000);
        Self { every_ms: u64::try_from(every_ms).unwrap_or(u64::MAX), burst: rate.burst }
    }
}

impl Rate {
    /// Any number.
    pub const UNLIMITED: Self = Self { every: Duration::ZERO, burst: u32::MAX };

    /// So many in a second, and so many at once after a silence.
    pub const fn per_second(rate: u32, burst: u32) -> Self {
        let nanos = if rate == 0 { u64::MAX } else { 1_000_000_000 / rate as u64 };
        Self { every: Duration::from_nanos(nanos), burst }
    }

    /// The time in which all of a burst is earned.
    fn whole(self) -> Duration {
        self.every.checked_mul(self.burst.max(1)).unwrap_or(Duration::MAX)
    }
}

/// How much of a [`Rate`] is used up: one time, whatever the rate.
///
/// ```text
///   used     ├──────── burst × every ────────┤
///   ─────────┬──────────────┬────────────────┬──────► time
///           now          full_at      not beyond here
/// ```
///
/// The generic cell rate algorithm (ITU-T I.371, annex A): `full_at` is when
/// all of the burst is there again; taking one moves it on by `every`.
///
/// ```
/// use std::time::Duration;
/// use trunkline_protocol::rate::{Bucket, Rate};
///
/// let rate = Rate::per_second(20, 2);
/// let mut bucket = Bucket::default();
/// let now = Duration::from_secs(7);
/// assert_eq!(bucket.take(rate, now), Ok(()));
/// assert_eq!(bucket.take(rate, now), Ok(()));
/// assert_eq!(bucket.take(rate, now), Err(Duration::from_millis(50)));
/// assert_eq!(bucket.take(rate, now + Duration::from_millis(50)), Ok(()));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bucket {
    full_at: Duration,
}

impl Bucket {
    /// Takes one, or says how long to wait for it. Who is refused has used
    /// nothing.
    pub fn take(&mut self, rate: Rate, now: Duration) -> Result<(), Duration> {
        self.take_many(rate, 1, now)
    }

    /// Takes several, for what costs as much as several, or says how long to
    /// wait for them. Who is refused has used nothing. More than a burst are
    /// never there.
    pub fn take_many(&mut self, rate: Rate, count: u32, now: Duration) -> Result<(), Duration> {
        let used = self.full_at.saturating_sub(now);
        let after = used.saturating_add(rate.every.saturating_mul(count));
        let beyond = after.saturating_sub(rate.whole());
        if beyond > Duration::ZERO {
            return Err(beyond);
        }
        self.full_at = now.saturating_add(after);
        Ok(())
    }

    /// How many may be taken now.
    pub fn available(&self, rate: Rate, now: Duration) -> u32 {
        let every = rate.every.as_nanos();
        if every == 0 {
            return u32::MAX;
        }
        let left = rate.whole().saturating_sub(self.full_at.saturating_sub(now));
        u32::try_from(left.as_nanos() / every).unwrap_or(u32::MAX)
    }

    /// When one may be taken.
    pub fn ready_at(&self, rate: Rate) -> Duration {
        self.full_at.saturating_add(rate.every).saturating_sub(rate.whole())
    }

    /// When nothing is used up any more: from then on it is as good as a new
    /// one.
    pub fn full_at(&self) -> Duration {
        self.full_at
    }

    /// Nothing may be taken before `until`.
    pub fn hold(&mut self, rate: Rate, until: Duration) {
        let full_at = until.saturating_add(rate.whole()).saturating_sub(rate.every);
        self.full_at = self.full_at.max(full_at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// In any span there are no more than the burst and what is earned in
        /// it; and waiting as long as was said is always enough.
        #[test]
        fn no_more_than_the_burst_and_what_is_earned(
            every_us in 1..200_000_u64,
            burst in 1..100_u32,
            steps in prop::collection::vec(0..300_000_u64, 1..200),
        ) {
            let rate = Rate { every: Duration::from_micros(every_us), burst };
            let mut bucket = Bucket::default();
            let mut now = Duration::from_secs(1);
            let mut taken: Vec<Duration> = Vec::new();
            for step in steps {
                now += Duration::from_micros(step);
                let before = bucket;
                prop_assert_eq!(before.available(rate, now) > 0, before.ready_at(rate) <= now);
                match bucket.take(rate, now) {
                    Ok(()) => taken.push(now),
                    Err(wait) => {
                        prop_assert_eq!(bucket, before);
                        prop_assert_eq!(now + wait, before.ready_at(rate));
                        prop_assert_eq!(bucket.take(rate, now + wait), Ok(()));
                        bucket = before;
                    }
                }
            }
            for (n, from) in taken.iter().enumerate() {
                for (m, to) in taken.iter().enumerate().skip(n) {
                    let earned = to.saturating_sub(*from).as_micros() / u128::from(every_us);
                    prop_assert!((m - n) as u128 <= u128::from(burst) + earned);
                }
            }
        }

        #[test]
        fn several_are_as_much_as_each_of_them(
            every_ms in 0..100_u64,
            burst in 1..50_u32,
            counts in prop::collection::vec((0..20_u32, 0..500_u64), 1..50),
        ) {
            let rate = Rate { every: Duration::from_millis(every_ms), burst };
            let (mut at_once, mut one_by_one) = (Bucket::default(), Bucket::default());
            let mut now = Duration::from_secs(1);
            for (count, step) in counts {
                now += Duration::from_millis(step);
                let taken = at_once.take_many(rate, count, now);
                let mut each = one_by_one;
                let all = (0..count).try_for_each(|_| each.take(rate, now));
                prop_assert_eq!(taken.is_ok(), all.is_ok());
                if taken.is_ok() && count > 0 {
                    one_by_one = each;
                    prop_assert_eq!(at_once, one_by_one);
                }
                if let Err(wait) = taken && count <= burst {
                    let mut later = at_once;
                    prop_assert_eq!(later.take_many(rate, count, now + wait), Ok(()));
                }
            }
        }

        #[test]
        fn nothing_overflows(every in any::<u64>(), burst: u32, now in any::<u64>(), hold in any::<u64>()) {
            let rate = Rate { every: Duration::from_millis(every), burst };
            let mut bucket = Bucket::default();
            let now = Duration::from_millis(now);
            bucket.hold(rate, Duration::from_millis(hold));
            for _ in 0..3 {
                let _ = bucket.take(rate, now);
                let _ = bucket.take_many(rate, u32::MAX, now);
                let _ = (bucket.available(rate, now), bucket.ready_at(rate), bucket.full_at());
            }
            bucket.hold(Rate { every: Duration::MAX, burst }, Duration::MAX);
            let _ = bucket.take(rate, Duration::MAX);
        }
    }

    #[test]
    fn what_has_no_rate_is_always_there() {
        let mut bucket = Bucket::default();
        for _ in 0..1000 {
            assert_eq!(bucket.take(Rate::UNLIMITED, Duration::ZERO), Ok(()));
        }
        assert_eq!(bucket.available(Rate::UNLIMITED, Duration::ZERO), u32::MAX);
        assert_eq!(Bucket::default().take(Rate::per_second(0, 1), Duration::ZERO), Ok(()));
    }

    #[test]
    fn on_the_wire_it_is_rather_too_slow() {
        let json = serde_json::to_string(&Rate::per_second(3000, 5)).unwrap();
        assert_eq!(json, r#"{"every_ms":1,"burst":5}"#);
        let read: Rate = serde_json::from_str(r#"{"every_ms":50,"burst":7}"#).unwrap();
        assert_eq!(read, Rate::per_second(20, 7));
    }
}
