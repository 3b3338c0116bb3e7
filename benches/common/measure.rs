//! Figures: latencies by bucket, medians, and what the kernel accounts to a
//! process.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures for people: three digits are enough"
)]

use std::fs;
use std::time::Duration;

use crate::wire::Result;

/// Buckets per power of two: no figure is off by more than 3 %.
const STEPS: u64 = 16;

/// Durations, counted by bucket.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; (64 * STEPS) as usize], total: 0 }
    }
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, nanos: u64) {
        let nanos = nanos.max(STEPS);
        let shift = nanos.ilog2() - STEPS.ilog2();
        let step = (nanos >> shift) - STEPS;
        self.counts[(u64::from(shift) * STEPS + step) as usize] += 1;
        self.total += 1;
    }

    /// The duration that `share` of all stay below.
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = (self.total as f64 * share) as u64;
        let mut seen = 0;
        for (bucket, count) in (0_u64..).zip(&self.counts) {
            seen += count;
            if seen > rank {
                let (shift, step) = (bucket / STEPS, bucket % STEPS);
                // The middle of the bucket.
                return Duration::from_nanos(((2 * (STEPS + step) + 1) << shift) / 2);
            }
        }
        Duration::ZERO
    }
}

/// The figure in the middle.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    match figures.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => figures[len / 2],
        len => f64::midpoint(figures[len / 2 - 1], figures[len / 2]),
    }
}

/// User and system time of all threads of a process, to the nanosecond, as of
/// when each last went to sleep.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let accounts = fs::read_to_string(task?.path().join("schedstat"))?;
        let ran = accounts.split_ascii_whitespace().next().ok_or("schedstat is empty")?;
        nanos += ran.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// The most memory that a process has had resident, in bytes.
pub fn peak_resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()).ok_or("no VmHWM")?;
    Ok(kib.parse::<u64>()? * 1024)
}
