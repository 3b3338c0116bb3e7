//! Forwards the log records of this process to the hub. Feature `logs`.
//!
//! [`forward`] makes two halves: a layer for your `tracing` subscriber, and what
//! an agent or a dashboard takes its records from.
//!
//! ```no_run
//! use tracing_subscriber::prelude::*;
//! use trunkline_client::{Agent, Programs, logs};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (layer, logs) = logs::forward(logs::Options::default());
//! tracing_subscriber::registry().with(layer).init();
//! # #[cfg(all(unix, feature = "programs"))]
//! let agent = Agent::builder("ws://127.0.0.1:7070", "build-1")?.logs(logs).connect(Programs::new());
//! # Ok(())
//! # }
//! ```
//!
//! Records have numbers, and the hub says how far it has taken them. Across lost
//! links and hubs that restart each comes once and in order; what there was no
//! room for while the hub was away or slow, the hub is told by its numbers. A hub
//! that takes no logs says so, and nothing more is sent on that link. What is not
//! taken when its agent or dashboard ends is lost with it, in order or not: an
//! orderly stop does not wait for log records.
//!
//! Records of single targets are left out, or let through at other levels, by a
//! filter on the layer: `layer.with_filter(targets)`, with a
//! `tracing_subscriber::filter::Targets`. Events are forwarded, with their
//! fields; the spans around them are not.
//!
//! # Never in a circle
//!
//! What sending records says itself is not forwarded: all targets that begin
//! with `trunkline`; `DEBUG` and `TRACE` of what the links are made of (tokio,
//! mio, rustls, tungstenite, and those between them); and whatever is said on the
//! task that moves frames, while it does. A [`Connector`](crate::Connector) of
//! your own that logs about frames on tasks of its own should be filtered out.
//!
//! # For those who read them
//!
//! Records go out as they are. Do not forward to a hub what its operators must
//! not see: the layer knows no secrets from other text.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::{self, Write as _};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{
    LOG_FIELD_BYTES_MAX, LOG_FIELD_NAME_BYTES_MAX, LOG_FIELDS_MAX, LOG_MESSAGE_BYTES_MAX,
    LOG_TARGET_BYTES_MAX, LogLevel, LogRecord,
};

use crate::core::logs::{LogLimits, LogTail, cost};

/// Stands where something was cut off.
const MARK: &str = "…";

/// What links are made of: it says something about every frame, and a frame with
/// that would be the next.
const TRANSPORTS: [&str; 7] =
    ["mio", "runtime", "rustls", "tokio", "tokio_rustls", "tokio_tungstenite", "tungstenite"];

/// What is forwarded, and how much of it is kept.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The least serious level that is forwarded. `INFO`.
    pub level: Level,
    /// Longest message, in bytes; what is longer is cut and ends with `…`. All
    /// fields of a record together have as much room, and each value 1 KiB.
    /// 8 KiB, which is also the most; at least 64 bytes.
    pub message_bytes_max: usize,
    /// Most records that are kept until the hub has taken them; beyond that the
    /// oldest are dropped, and the hub is told which. 1,000.
    pub records_max: usize,
    /// Most memory of those, in bytes; at least 128 KiB. As much again may be on
    /// its way from the layer to the agent or dashboard. 256 KiB.
    pub bytes_max: usize,
    /// How long records are gathered after some were sent. The first after a
    /// longer silence goes at once, and so does whatever fills a message. 1 s.
    pub gather: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let LogLimits { records_max, bytes_max, gather } = LogLimits::default();
        let message_bytes_max = LOG_MESSAGE_BYTES_MAX;
        Self { level: Level::INFO, message_bytes_max, records_max, bytes_max, gather }
    }
}

/// A layer for the subscriber, and what an agent or a dashboard takes the records
/// from. Until it does, and whenever the hub is away, the newest records are kept
/// within the bounds of the options.
///
/// Each call begins a log of its own: an agent and a dashboard in one process
/// need one each.
#[expect(clippy::disallowed_methods, reason = "the shell is where randomness comes from")]
pub fn forward(options: Options) -> (ForwardLayer, Logs) {
    let limits = LogLimits {
        records_max: options.records_max,
        bytes_max: options.bytes_max,
        gather: options.gather,
    };
    let inbox = Arc::new(Inbox {
        stream: StreamId::mint(wall_ms(), rand::random()),
        level: options.level,
        message_bytes_max: options.message_bytes_max.clamp(64, LOG_MESSAGE_BYTES_MAX),
        limits,
        waiting: Mutex::default(),
        bell: Notify::new(),
    });
    (ForwardLayer(Arc::clone(&inbox)), Logs(inbox))
}

/// The half that listens: a layer for any `tracing` subscriber. See [`forward`].
///
/// It never waits for the hub, and takes a lock only to put a finished record
/// aside.
#[derive(Debug)]
pub struct ForwardLayer(Arc<Inbox>);

/// The half that an agent or a dashboard takes: see
/// [`AgentBuilder::logs`](crate::AgentBuilder::logs) and
/// [`DashboardBuilder::logs`](crate::DashboardBuilder::logs). When it is dropped,
/// or its owner is over, the layer does nothing any more.
#[derive(Debug)]
pub struct Logs(Arc<Inbox>);

/// Records on their way from the layer to the core.
#[derive(Debug)]
struct Inbox {
    stream: StreamId,
    level: Level,
    message_bytes_max: usize,
    limits: LogLimits,
    waiting: Mutex<Waiting>,
    /// Something waits.
    bell: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    records: VecDeque<(u64, LogRecord)>,
    bytes: usize,
    /// The number of the next record.
    next: u64,
    /// Nobody will ever take them.
    is_over: bool,
}

impl Inbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing in here panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, record: LogRecord) {
        let bytes = cost(&record);
        let mut waiting = self.waiting();
        if waiting.is_over {
            return;
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.bytes += bytes;
        waiting.records.push_back((number, record));
        while self.limits.is_beyond(waiting.records.len(), waiting.bytes) {
            let Some((_, oldest)) = waiting.records.pop_front() else { break };
            waiting.bytes -= cost(&oldest);
        }
        let is_first = waiting.records.len() == 1;
        drop(waiting);
        if is_first {
            self.bell.notify_one();
        }
    }
}

impl Logs {
    /// The log as its core has it, empty.
    pub(crate) fn tail(&self) -> LogTail {
        LogTail::new(self.0.stream, self.0.limits)
    }

    fn take(&self) -> VecDeque<(u64, LogRecord)> {
        let mut waiting = self.0.waiting();
        waiting.bytes = 0;
        std::mem::take(&mut waiting.records)
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.is_over = true;
        let left = std::mem::take(&mut waiting.records);
        drop(waiting);
        drop(left);
    }
}

/// Hands records to `push` as they come.
pub(crate) async fn feed(logs: Option<Logs>, push: impl Fn(VecDeque<(u64, LogRecord)>)) {
    let Some(logs) = logs else { return std::future::pending().await };
    loop {
        let more = logs.0.bell.notified();
        let records = logs.take();
        if !records.is_empty() {
            push(records);
        }
        more.await;
    }
}

// ---- not in a circle --------------------------------------------------------

thread_local! {
    /// Whether what is said on this thread now is not to be forwarded.
    static MUTED: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, nothing that is said on this thread is forwarded.
struct Muted {
    before: bool,
}

impl Muted {
    fn enter() -> Self {
        // On a thread that is ending, nothing is forwarded at all.
        Self { before: MUTED.try_with(|muted| muted.replace(true)).unwrap_or(true) }
    }
}

impl Drop for Muted {
    fn drop(&mut self) {
        let _ = MUTED.try_with(|muted| muted.set(self.before));
    }
}

/// Runs a future of whose own words none are forwarded.
pub(crate) async fn unheard<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let _muted = Muted::enter();
        future.as_mut().poll(cx)
    })
    .await
}

/// Whether a record would be about the forwarding of records.
fn is_own(target: &str, level: Level) -> bool {
    let root = target.split([':', '.']).next().unwrap_or_default();
    root.starts_with("trunkline") || (level > Level::INFO && TRANSPORTS.contains(&root))
}

// ---- records ----------------------------------------------------------------

impl<S: Subscriber> Layer<S> for ForwardLayer {
    // It is not `enabled` that decides: that would decide for other layers, too.
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let inbox = &*self.0;
        let (level, target) = (*event.metadata().level(), event.metadata().target());
        if level > inbox.level || is_own(target, level) {
            return;
        }
        let muted = Muted::enter();
        if muted.before {
            return;
        }
        let mut said = Said::new(inbox.message_bytes_max, target == "log");
        event.record(&mut said);
        if said.target.as_ref().is_some_and(|target| is_own(target, level)) {
            return;
        }
        inbox.push(said.record(level, target));
    }
}

/// What an event says, within its bounds.
struct Said {
    message: Cut,
    fields: BTreeMap<String, String>,
    /// Room for fields, in bytes.
    room: usize,
    /// Fields for which there was none.
    left_out: usize,
    /// It comes from the `log` crate, and has its target in a field.
    is_log: bool,
    target: Option<String>,
}

impl Said {
    fn new(bytes_max: usize, is_log: bool) -> Self {
        Self {
            message: Cut::new(bytes_max),
            fields: BTreeMap::new(),
            room: bytes_max,
            left_out: 0,
            is_log,
            target: None,
        }
    }

    fn say(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        // Writing to memory does not fail; a value that fails is cut there.
        match field.name() {
            "message" => drop(self.message.write_fmt(value)),
            "log.target" if self.is_log => {
                let mut target = Cut::new(LOG_TARGET_BYTES_MAX);
                let _ = target.write_fmt(value);
                self.target = Some(target.finish());
            }
            "log.module_path" | "log.file" | "log.line" if self.is_log => {}
            name => {
                let name = &name[..name.floor_char_boundary(LOG_FIELD_NAME_BYTES_MAX)];
                let room = self.room.saturating_sub(name.len());
                // One place is for what is left out.
                if room < MARK.len() || self.fields.len() + 1 >= LOG_FIELDS_MAX {
                    self.left_out += 1;
                    return;
                }
                let mut text = Cut::new(room.min(LOG_FIELD_BYTES_MAX));
                let _ = text.write_fmt(value);
                let text = text.finish();
                self.room = room - text.len();
                self.fields.insert(name.to_owned(), text);
            }
        }
    }

    fn record(mut self, level: Level, target: &str) -> LogRecord {
        if self.left_out > 0 {
            let more = format!("{} more", self.left_out);
            self.fields.insert(MARK.to_owned(), more);
        }
        let target = self.target.unwrap_or_else(|| {
            let mut cut = Cut::new(LOG_TARGET_BYTES_MAX);
            let _ = cut.write_str(target);
            cut.finish()
        });
        LogRecord {
            ts_ms: wall_ms(),
            level: match level {
                Level::ERROR => LogLevel::Error,
                Level::WARN => LogLevel::Warn,
                Level::INFO => LogLevel::Info,
                Level::DEBUG => LogLevel::Debug,
                Level::TRACE => LogLevel::Trace,
            },
            target,
            message: self.message.finish(),
            fields: self.fields,
        }
    }
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.say(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.say(field, format_args!("{value:?}"));
    }
}

/// A text of bounded length: the rest of what is written is not kept, and a mark
/// says so.
struct Cut {
    text: String,
    bytes_max: usize,
    is_full: bool,
}

impl Cut {
    fn new(bytes_max: usize) -> Self {
        Self { text: String::new(), bytes_max, is_full: false }
    }

    fn finish(mut self) -> String {
        if self.is_full {
            let room = self.bytes_max.saturating_sub(MARK.len());
            self.text.truncate(self.text.floor_char_boundary(room));
            self.text.push_str(MARK);
        }
        self.text
    }
}

impl fmt::Write for Cut {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        if !self.is_full {
            let room = self.bytes_max - self.text.len();
            let end = more.floor_char_boundary(room);
            self.text.push_str(&more[..end]);
            self.is_full = end < more.len();
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "the shell is where the clock is read")]
fn wall_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
