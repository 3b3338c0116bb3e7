//! The trunkline wire protocol: pure types and pure functions.
pub mod close;
pub mod codec;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod liveness;
pub mod message;
pub mod roster;
pub mod stream;
pub mod time;
