//! Offset-addressed streams: what keeps the bytes of one, what paces them and
//! what puts them together again.
//!
//! [`Log`] is the memory of one stream: the hub's, shared by the cursors of
//! all its readers, and the agent's tail. [`Coalescer`] decides how much of a
//! growing stream is worth a message yet. [`View`] is the reader: every byte
//! once and in order, every hole by name.
//!
//! Offsets count bytes from 0 at the source and stay below 2^63, as every
//! decoder of this crate makes sure.

mod coalesce;
mod filter;
mod kept;
mod log;
mod plain;
mod scrollback;
mod segment;
mod view;

pub use coalesce::{Coalescer, Coalescing};
pub use filter::TerminalFilter;
pub use kept::{GATHERED_COST_MAX, TEXTS_COST_MAX};
pub use log::{Jump, Log, Read, YOUNG_CHUNKS};
pub use plain::Plain;
pub use scrollback::{GAP_COST_BYTES, MATCH_LINE_BYTES_MAX, Match};
pub use segment::{CHUNK_BYTES_MAX, CHUNK_OVERHEAD_BYTES};
pub use view::{Piece, Taken, View};
