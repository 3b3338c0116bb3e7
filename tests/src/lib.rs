//! The World: the same cores that run in production, on simulated links, with
//! one virtual clock and one seed.
//!
//! Bytes cross the links, not structs: everything goes through the codec. What
//! people should see is checked as it happens ([`dashboard`]): each byte of a
//! stream is the one its program wrote, in order, or lies in a named gap.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a world of tests")]
#![allow(clippy::missing_panics_doc, reason = "its methods assert")]

pub mod agent;
pub mod cable;
pub mod dashboard;
pub mod life;
#[cfg(feature = "model")]
pub mod model;
pub mod plan;
pub mod process;
pub mod proxy;
pub mod world;

pub use world::{Memory, Peer, Storage, World};
