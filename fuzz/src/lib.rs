//! What a fuzzer may try on trunkline: one module for each target, with one
//! function `run` that takes the fuzzer's bytes and panics when something that
//! must always hold does not.
//!
//! | target | the bytes are |
//! |---|---|
//! | [`mod@decode`] | a frame, read in every direction |
//! | [`batch`] | the body of a request of a link that polls |
//! | [`binary`] | a binary frame |
//! | [`link`] | frames of one peer, a stranger first, raw |
//! | [`hub`] | what two agents, three dashboards and the hooks do to a hub |
//! | [`agent`] | what a hub and programs do to an agent |
//! | [`dashboard`] | what a hub and a person do to a dashboard |
//! | [`log`] | what is done to a stream's log, compared with a plain vector |
//! | [`roster`] | what is done to a roster, compared with a plain map |
//! | [`view`] | what a terminal writes, cut anywhere |
//!
//! The targets are plain functions, so that `cargo test --no-default-features`
//! replays a corpus without any fuzzer. What memory they may take is up to
//! whoever runs them: `run.sh` gives the limits.

pub mod agent;
pub mod batch;
pub mod binary;
pub mod dashboard;
pub mod decode;
pub mod hub;
pub mod link;
pub mod log;
pub mod names;
pub mod plan;
pub mod roster;
pub mod view;

/// What is done with the fuzzer's bytes.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("agent", agent::run),
    ("batch", batch::run),
    ("binary", binary::run),
    ("dashboard", dashboard::run),
    ("decode", decode::run),
    ("hub", hub::run),
    ("link", link::run),
    ("log", log::run),
    ("roster", roster::run),
    ("view", view::run),
];
