//! Where links come from: how many there are of one address, and how often
//! their greetings fail.
//!
//! An address is remembered while it has links, and until all of its failures
//! are forgiven; of those that have nothing but failures the oldest give way.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::Close;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::rate::Bucket;

/// Most sources that are remembered for their failures.
const FAILING_MAX: usize = 16 * 1024;

/// What counts as one place that links come from: an IPv4 address, or the /64
/// that an IPv6 address is in, as whoever has one has all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Source {
    V4([u8; 4]),
    V6(u64),
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.octets()),
            IpAddr::V6(address) => {
                // The upper half, as eight bytes.
                let network = (address.to_bits() >> 64) & u128::from(u64::MAX);
                Self::V6(u64::try_from(network).unwrap_or_default())
            }
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    links: usize,
    failures: Bucket,
}

/// All that links come from.
#[derive(Debug, Default)]
pub(super) struct Sources {
    known: HashMap<Source, Known>,
    /// Those with failures, by when they are forgiven.
    failing: BTreeSet<(Duration, Source)>,
}

impl Sources {
    /// Counts a link, or says why there may not be another one.
    pub(super) fn enter(
        &mut self,
        source: Source,
        limits: &Limits,
        now: Duration,
    ) -> Result<(), Close> {
        self.forgive(now);
        let (links, failures) =
            self.known.get(&source).map_or((0, Bucket::default()), |k| (k.links, k.failures));
        if links >= limits.links_per_address {
            return Err(Close::new(CloseCode::TryLater, "too many links from this address"));
        }
        let ready = failures.ready_at(limits.failure_rate);
        if ready > now {
            return Err(Close::hinting(CloseCode::Flood, ready.saturating_sub(now)));
        }
        self.known.entry(source).or_default().links += 1;
        Ok(())
    }

    /// A link that was counted is gone.
    pub(super) fn leave(&mut self, source: Source) {
        let Some(known) = self.known.get_mut(&source) else { return };
        known.links = known.links.saturating_sub(1);
        if known.links == 0 && !self.failing.contains(&(known.failures.full_at(), source)) {
            self.known.remove(&source);
        }
    }

    /// A link that was counted came to nothing, by its own doing.
    pub(super) fn fail(&mut self, source: Source, limits: &Limits, now: Duration) {
        let Some(known) = self.known.get_mut(&source) else { return };
        let before = known.failures.full_at();
        // Who had several links under way at once may fail more often than
        // that: the wait is as long as it can be already.
        let _ = known.failures.take(limits.failure_rate, now);
        let after = known.failures.full_at();
        self.failing.remove(&(before, source));
        self.failing.insert((after, source));
        if self.failing.len() > FAILING_MAX
            && let Some((_, oldest)) = self.failing.pop_first()
        {
            self.pardon(oldest);
        }
    }

    fn forgive(&mut self, now: Duration) {
        while let Some((at, source)) = self.failing.first().copied()
            && at <= now
        {
            self.failing.pop_first();
            self.pardon(source);
        }
    }

    fn pardon(&mut self, source: Source) {
        if let Some(known) = self.known.get_mut(&source) {
            known.failures = Bucket::default();
            if known.links == 0 {
                self.known.remove(&source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::net::Ipv6Addr;

    use trunkline_protocol::rate::Rate;

    use super::*;

    fn v4(last: u8) -> Source {
        Source::from(IpAddr::from([192, 0, 2, last]))
    }

    fn limits() -> Limits {
        Limits {
            links_per_address: 2,
            failure_rate: Rate { every: Duration::from_secs(1), burst: 3 },
            ..Limits::default()
        }
    }

    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn a_64_is_one_source_and_a_mapped_address_is_what_it_maps() {
        let v6 = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(v6("2001:db8:1:2::1"), v6("2001:db8:1:2:ffff::9"));
        assert_ne!(v6("2001:db8:1:2::1"), v6("2001:db8:1:3::1"));
        let mapped = Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped();
        assert_eq!(Source::from(IpAddr::V6(mapped)), v4(7));
        assert_ne!(Source::from(IpAddr::V6(Ipv6Addr::LOCALHOST)), v4(7));
    }

    #[test]
    fn links_are_bounded_each_source_for_itself() {
        let (mut sources, limits) = (Sources::default(), limits());
        for _ in 0..2 {
            sources.enter(v4(1), &limits, NOW).unwrap();
        }
        assert_eq!(sources.enter(v4(1), &limits, NOW).unwrap_err().code, CloseCode::TryLater);
        sources.enter(v4(2), &limits, NOW).unwrap();
        sources.leave(v4(1));
        sources.enter(v4(1), &limits, NOW).unwrap();
        for source in [1, 1, 2] {
            sources.leave(v4(source));
        }
        assert!(sources.known.is_empty(), "nothing is remembered of who is gone");
    }

    #[test]
    fn failures_slow_their_source_and_are_forgiven() {
        let (mut sources, limits) = (Sources::default(), limits());
        for _ in 0..3 {
            sources.enter(v4(1), &limits, NOW).unwrap();
            sources.fail(v4(1), &limits, NOW);
            sources.leave(v4(1));
        }
        let refused = sources.enter(v4(1), &limits, NOW).unwrap_err();
        assert_eq!(refused.code, CloseCode::Flood);
        assert_eq!(refused.retry_after(), Some(Duration::from_secs(1)));
        sources.enter(v4(2), &limits, NOW).unwrap();
        sources.leave(v4(2));

        let later = NOW + Duration::from_secs(1);
        sources.enter(v4(1), &limits, later).unwrap();
        sources.leave(v4(1));
        assert_eq!(sources.known.len(), 1, "two failures are not forgiven yet");
        sources.enter(v4(2), &limits, NOW + Duration::from_secs(3)).unwrap();
        assert_eq!(sources.known.len(), 1, "now they are");
        assert!(sources.failing.is_empty());
    }

    #[test]
    fn those_who_only_fail_take_bounded_room() {
        let (mut sources, limits) = (Sources::default(), limits());
        let many = u32::try_from(FAILING_MAX).unwrap() + 500;
        for n in 0..many {
            let source = Source::V4(n.to_be_bytes());
            let now = NOW + Duration::from_micros(n.into());
            sources.enter(source, &limits, now).unwrap();
            sources.fail(source, &limits, now);
            sources.leave(source);
        }
        assert_eq!(sources.failing.len(), FAILING_MAX);
        assert_eq!(sources.known.len(), FAILING_MAX);
    }
}
