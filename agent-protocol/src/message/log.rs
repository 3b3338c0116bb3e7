//! Log records forwarded by agents and dashboards: a stream whose positions
//! are record numbers.
//!
//! All of its texts are a stranger's, and stand here as they were said:
//! whoever shows them escapes them, or a line break in one forges a line.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bound;
use super::open::open_words;
use crate::ids::StreamId;

open_words! {
    /// How serious a record is.
    LogLevel {
        /// Something is broken.
        Error = "error",
        /// Something is odd.
        Warn = "warn",
        /// Something happened.
        Info = "info",
        /// For developers.
        Debug = "debug",
        /// For developers with patience.
        Trace = "trace",
    }
}

/// Longest [`LogRecord::target`], in bytes.
pub const LOG_TARGET_BYTES_MAX: usize = 256;

/// Longest [`LogRecord::message`], in bytes.
pub const LOG_MESSAGE_BYTES_MAX: usize = 8 * 1024;

/// Most [`LogRecord::fields`].
pub const LOG_FIELDS_MAX: usize = 64;

/// Longest name of one of [`LogRecord::fields`], in bytes.
pub const LOG_FIELD_NAME_BYTES_MAX: usize = 128;

/// Longest value of one of [`LogRecord::fields`], in bytes.
pub const LOG_FIELD_BYTES_MAX: usize = 1024;

/// Most [`LogBatch::records`].
pub const LOG_BATCH_RECORDS_MAX: usize = 256;

/// One record. What is longer than it may be is cut when it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// When, in milliseconds since the epoch, by the sender's clock.
    pub ts_ms: u64,
    /// How serious.
    pub level: LogLevel,
    /// Which part of the program. At most 256 bytes.
    #[serde(
        serialize_with = "bound::cut_bytes::<LOG_TARGET_BYTES_MAX, _>",
        deserialize_with = "bound::bytes::<LOG_TARGET_BYTES_MAX, _>"
    )]
    pub target: String,
    /// What. At most 8 KiB.
    #[serde(
        serialize_with = "bound::cut_bytes::<LOG_MESSAGE_BYTES_MAX, _>",
        deserialize_with = "bound::bytes::<LOG_MESSAGE_BYTES_MAX, _>"
    )]
    pub message: String,
    /// Details. At most 64, with names of at most 128 bytes and values of at
    /// most 1 KiB. What has a longer name is not written.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        serialize_with = "bound::cut_details::<LOG_FIELDS_MAX, LOG_FIELD_NAME_BYTES_MAX, LOG_FIELD_BYTES_MAX, _>",
        deserialize_with = "bound::details::<LOG_FIELDS_MAX, LOG_FIELD_NAME_BYTES_MAX, LOG_FIELD_BYTES_MAX, _>"
    )]
    pub fields: BTreeMap<String, String>,
}

/// `log:batch`: consecutive records of one sender's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawLogBatch")]
pub struct LogBatch {
    /// The sender's log; another process has another.
    pub stream: StreamId,
    /// Records that the sender had to drop before it could send them: those
    /// from this number on, up to [`offset`](Self::offset). `None` if nothing
    /// is missing: the hub was told of all below, or has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_from: Option<u64>,
    /// The number of the first record, counted from 0.
    pub offset: u64,
    /// The records. At most 256.
    pub records: Vec<LogRecord>,
}

impl LogBatch {
    /// The number after the last record.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.records.len() as u64)
    }
}

#[derive(Deserialize)]
struct RawLogBatch {
    stream: StreamId,
    #[serde(default)]
    missing_from: Option<u64>,
    #[serde(deserialize_with = "bound::offset")]
    offset: u64,
    #[serde(deserialize_with = "bound::list::<LOG_BATCH_RECORDS_MAX, _, _>")]
    records: Vec<LogRecord>,
}

impl TryFrom<RawLogBatch> for LogBatch {
    type Error = &'static str;

    fn try_from(raw: RawLogBatch) -> Result<Self, &'static str> {
        let RawLogBatch { stream, missing_from, offset, records } = raw;
        if missing_from.is_some_and(|from| from >= offset) {
            return Err("missing_from: must be less than offset");
        }
        let batch = Self { stream, missing_from, offset, records };
        if i64::try_from(batch.end()).is_err() {
            return Err("offset: the records must not pass 2^63 - 1");
        }
        Ok(batch)
    }
}

/// `log:taken`: how far the hub has a sender's log. It only ever rises; a lower
/// one is old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTaken {
    /// The sender's log.
    pub stream: StreamId,
    /// Everything below this number was taken, or is known to be missing.
    #[serde(deserialize_with = "bound::offset")]
    pub offset: u64,
}
