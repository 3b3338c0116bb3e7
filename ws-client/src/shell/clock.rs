//! The clocks, read in one place.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use trunkline_protocol::time::Now;

pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the shell is where the clock is read")]
    pub(crate) fn start() -> Self {
        Self { origin: Instant::now() }
    }

    #[expect(clippy::disallowed_methods, reason = "the shell is where the clock is read")]
    pub(crate) fn now(&self) -> Now {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now {
            monotonic: self.origin.elapsed(),
            wall_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
        }
    }

    pub(crate) async fn sleep_until(&self, at: Duration) {
        // A deadline centuries away is as good as none.
        let far = self.origin.elapsed() + Duration::from_secs(365 * 24 * 3600);
        tokio::time::sleep_until(self.origin + at.min(far)).await;
    }
}
