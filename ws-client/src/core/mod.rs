//! The pure halves: what an agent and a dashboard are, without a clock, a
//! socket or a task. The shell drives them; so does the simulator.

pub mod agent;
pub mod dashboard;
pub mod dialing;
pub mod logs;
pub mod outbox;
mod pace;
#[cfg(feature = "polling")]
pub(crate) mod reach;
mod refresh;

pub(crate) use pace::{Class, Pace};
pub(crate) use refresh::Refresh;
pub use refresh::RefreshWanted;
