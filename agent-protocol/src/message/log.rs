//! Log records forwarded by agents and dashboards: a stream whose positions
//! are record numbers.

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

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// When, in milliseconds since the epoch, by the sender's clock.
    pub ts_ms: u64,
    /// How serious.
    pub level: LogLevel,
    /// Which part of the program.
    pub target: String,
    /// What.
    pub message: String,
    /// Details. At most 64.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "bound::map::<64, _, _, _>"
    )]
    pub fields: BTreeMap<String, String>,
}

/// `log:batch`: consecutive records of one sender's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogBatch {
    /// The sender's log; another process has another.
    pub stream: StreamId,
    /// The number of the first record, counted from 0.
    #[serde(deserialize_with = "bound::offset")]
    pub offset: u64,
    /// The records. At most 256.
    #[serde(deserialize_with = "bound::list::<256, _, _>")]
    pub records: Vec<LogRecord>,
}
