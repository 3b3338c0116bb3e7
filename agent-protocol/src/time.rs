//! The time, as an argument: nothing in this crate or in the cores built on it
//! ever asks a clock.

use std::time::Duration;

/// One instant, on two clocks.
///
/// Every deadline and every order is decided by `monotonic`. `wall_ms` only
/// ever labels things for people: a jump of the wall clock changes no
/// behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Time since an origin of the shell's choosing; never goes back.
    pub monotonic: Duration,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub wall_ms: u64,
}
