//! What the tests share.
//!
//! [`World`] has the same cores that run in production, on simulated links,
//! with one virtual clock and one seed. Bytes cross the links, not structs:
//! everything goes through the codec. What people should see is checked as it
//! happens ([`dashboard`]): each byte of a stream is the one its program wrote,
//! in order, or lies in a named gap.
//!
//! For tests with real sockets and processes there are a [`proxy`] that breaks
//! cables, and [`process`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a world of tests")]
#![allow(clippy::missing_panics_doc, reason = "its methods assert")]

pub mod agent;
pub mod cable;
pub mod dashboard;
pub mod disk;
pub mod life;
#[cfg(feature = "model")]
pub mod model;
pub mod observed;
pub mod plan;
pub mod process;
pub mod proxy;
pub mod world;

pub use world::{Memory, Peer, Storage, World};

/// Where a run of random tests begins, if nobody says where.
#[expect(clippy::disallowed_methods, reason = "the one place where a seed is drawn")]
pub fn fresh_seed() -> u64 {
    rand::random::<u32>().into()
}
