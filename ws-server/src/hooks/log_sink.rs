//! Where forwarded log records go.

use std::ops::Range;

use trunkline_protocol::ids::{AgentId, DashboardId, StreamId, TenantId};
use trunkline_protocol::message::{LogLevel, LogRecord};
use trunkline_protocol::one_line::OneLine;

use super::BoxFuture;

/// Who forwards its log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LogSender {
    /// An agent.
    Agent(AgentId),
    /// A dashboard.
    Dashboard(DashboardId),
}

/// Consecutive records of one sender's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardedLogs {
    /// Whose it is.
    pub tenant: TenantId,
    /// Who made them.
    pub sender: LogSender,
    /// Who that is, as the [`Authenticator`](super::Authenticator) said.
    pub subject: String,
    /// The sender's log: each of its processes has another.
    pub stream: StreamId,
    /// Numbers of the records right before [`first`](Self::first) that will not
    /// come, because the sender had no room to keep them.
    pub missing: Option<Range<u64>>,
    /// The number of the first record, counted from 0 by the sender.
    pub first: u64,
    /// The records: at most 256. There may be none if some are missing.
    ///
    /// Their texts are whatever the sender says, line breaks and escape
    /// sequences included: **untrusted**. Escape them where they are shown or
    /// written line by line.
    pub records: Vec<LogRecord>,
}

impl ForwardedLogs {
    /// The number after the last record.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.records.len() as u64)
    }

    /// Memory that the records take, in bytes and roughly.
    pub(crate) fn cost(&self) -> usize {
        let of_fields = |record: &LogRecord| -> usize {
            record.fields.iter().map(|(name, value)| 64 + name.len() + value.len()).sum()
        };
        let of_one = |record: &LogRecord| {
            128 + record.target.len() + record.message.len() + of_fields(record)
        };
        256 + self.records.iter().map(of_one).sum::<usize>()
    }
}

/// Why records were not taken. For the hub's log: the sender hears only that it
/// is to try again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("log sink: {}", OneLine(.0))]
pub struct LogSinkError(pub String);

/// Takes the log records that agents and dashboards forward.
///
/// Without one the hub takes none, and says so to whoever sends some.
///
/// # Obligations
///
/// - [`take`](Self::take) returns `Ok` only when the records, and what is
///   missing before them, are as safe as the sink promises: the sender then
///   forgets them. Calls for different senders come concurrently; of one
///   sender, one at a time and in the order of the numbers.
/// - On `Err`, when it panics, or when it takes longer than [`hook_timeout`] and
///   its future is dropped, the sender is asked to send again in five seconds,
///   as long as it keeps the records; nobody waits. Any of them may have been
///   taken: they then come again, perhaps cut into other batches.
/// - The hub remembers how far it is with each sender, so that records that were
///   taken do not come again when a link is lost. Another hub, or the next one,
///   does not know: a sink that outlives its hub drops what it has by
///   `(tenant, stream, number)`, as with a primary key.
/// - What the hub holds for sinks is bounded: 16 MiB of records for each tenant,
///   and 64 MiB in all. Whoever comes when that is reached is asked to try again.
///
/// [`hook_timeout`]: trunkline_protocol::limits::Limits::hook_timeout
pub trait LogSink: Send + Sync + 'static {
    /// Takes records.
    fn take<'a>(&'a self, logs: &'a ForwardedLogs) -> BoxFuture<'a, Result<(), LogSinkError>>;
}

/// Emits each record through `tracing` on the hub, under the target
/// `trunkline::forwarded` and at its own level (`info` for one that is not
/// known). What is missing is a warning.
///
/// Texts are quoted and escaped as by [`str::escape_debug`], so that no line
/// break, escape sequence or invisible character of a sender forges a line of
/// the hub's log. Whose record it is stands in `tenant`, `sender`, `subject`,
/// `stream` and `number`; its time and its target by the sender, in `ts_ms` and
/// `origin`; its fields in `fields`.
///
/// It takes whatever comes, and keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct TracingLogSink;

impl LogSink for TracingLogSink {
    fn take<'a>(&'a self, logs: &'a ForwardedLogs) -> BoxFuture<'a, Result<(), LogSinkError>> {
        emit(logs);
        Box::pin(std::future::ready(Ok(())))
    }
}

fn emit(logs: &ForwardedLogs) {
    let ForwardedLogs { tenant, sender, subject, stream, missing, first, records } = logs;
    let sender = match sender {
        LogSender::Agent(agent) => agent.as_str(),
        LogSender::Dashboard(dashboard) => dashboard.as_str(),
    };
    if let Some(missing) = missing {
        tracing::warn!(
            target: "trunkline::forwarded",
            %tenant, sender, ?subject, %stream, from = missing.start, to = missing.end,
            "records are missing: the sender had no room for them"
        );
    }
    // A level is a part of what the compiler makes of an event.
    macro_rules! emit {
        ($level:ident, $number:expr, $record:expr) => {
            tracing::event!(
                target: "trunkline::forwarded",
                tracing::Level::$level,
                %tenant, sender, ?subject, %stream, number = $number,
                ts_ms = $record.ts_ms, origin = ?$record.target, fields = ?$record.fields,
                "{:?}", $record.message
            )
        };
    }
    for (number, record) in (*first..).zip(records) {
        match record.level {
            LogLevel::Error => emit!(ERROR, number, record),
            LogLevel::Warn => emit!(WARN, number, record),
            LogLevel::Info | LogLevel::Other(_) => emit!(INFO, number, record),
            LogLevel::Debug => emit!(DEBUG, number, record),
            LogLevel::Trace => emit!(TRACE, number, record),
        }
    }
}
