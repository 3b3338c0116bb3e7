//! The log records that are forwarded to the hub: a bounded tail of them, and
//! how far the hub has taken it.
//!
//! ```text
//!         taken, or told to be missing   dropped      kept
//!   0 ─────────────────────────────────┬──────────┬──────────────┬──────────┐
//!                                    taken      the first     `to`, under  end
//!                                                              way
//! ```
//!
//! One batch is under way at a time; the next begins at what the hub says. What
//! the tail had to drop before it was taken is named by the batch that follows.
//! On a new link all of that goes on from `taken`.

use std::collections::VecDeque;
use std::time::Duration;

use trunkline_protocol::ids::{RequestId, StreamId};
use trunkline_protocol::message::{LOG_BATCH_RECORDS_MAX, LogBatch, LogRecord, LogTaken, Refusal};

/// Longest batch as JSON, unless one record alone is longer: what is urgent
/// waits no longer behind it than behind a piece of output.
const BATCH_BYTES: usize = 16 * 1024;

/// Most members and elements of a batch, far below what a hub reads.
const BATCH_ITEMS: usize = 4096;

/// Around the records of a batch, in bytes as JSON: rather too many than too
/// few.
const AROUND_BYTES: usize = 512;

/// Memory of a record beside its texts, and of one of its fields.
const RECORD_OVERHEAD_BYTES: usize = 128;
const FIELD_OVERHEAD_BYTES: usize = 64;

/// The smallest tail in bytes: the longest record has room in it.
const BYTES_MIN: usize = 128 * 1024;

/// When what was refused is sent again, unless the hub says so.
const AGAIN: Duration = Duration::from_secs(5);

/// The longest that a hub may ask for.
const AGAIN_MAX: Duration = Duration::from_secs(3600);

/// How much of a log is kept and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Most records that are kept until the hub has taken them; at least 1.
    /// Beyond that the oldest are dropped. 1,000.
    pub records_max: usize,
    /// Most memory of those, in bytes; at least 128 KiB. 256 KiB.
    pub bytes_max: usize,
    /// How long records are gathered after some were sent. The first after a
    /// longer silence goes at once, and so does whatever fills a batch. 1 s.
    pub gather: Duration,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { records_max: 1000, bytes_max: 256 * 1024, gather: Duration::from_secs(1) }
    }
}

impl LogLimits {
    /// Whether so many records, of so many bytes, are too many.
    pub(crate) fn is_beyond(&self, records: usize, bytes: usize) -> bool {
        records > self.records_max.max(1) || bytes > self.bytes_max.max(BYTES_MIN)
    }
}

/// Memory of a record, in bytes and roughly.
pub(crate) fn cost(record: &LogRecord) -> usize {
    let of_field =
        |(name, value): (&String, &String)| FIELD_OVERHEAD_BYTES + name.len() + value.len();
    let texts = record.target.len() + record.message.len();
    RECORD_OVERHEAD_BYTES + texts + record.fields.iter().map(of_field).sum::<usize>()
}

/// A log as its sender has it.
///
/// Its owner asks [`poll`](Self::poll) while a link is up and nothing else is to
/// be sent, and calls [`handle_timeout`](Self::handle_timeout) at
/// [`deadline`](Self::deadline).
#[derive(Debug, Clone)]
pub struct LogTail {
    stream: StreamId,
    limits: LogLimits,
    kept: VecDeque<Kept>,
    bytes: usize,
    /// The hub has everything below, or was told that it is missing.
    taken: u64,
    /// The number of the next record.
    end: u64,
    standing: Standing,
    /// When a batch was last sent.
    sent_at: Option<Duration>,
    /// The last time it was told of.
    now: Duration,
}

#[derive(Debug, Clone)]
struct Kept {
    number: u64,
    record: LogRecord,
    cost: usize,
}

/// What the hub is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Nothing: the next batch may go.
    Ready,
    /// A batch is under way: the answer to it.
    UnderWay,
    /// It asked for patience.
    Patient(Duration),
    /// It takes none, on this link.
    Refused,
}

impl LogTail {
    /// A log from whose records nothing has been sent.
    pub fn new(stream: StreamId, limits: LogLimits) -> Self {
        Self {
            stream,
            limits,
            kept: VecDeque::new(),
            bytes: 0,
            taken: 0,
            end: 0,
            standing: Standing::Ready,
            sent_at: None,
            now: Duration::ZERO,
        }
    }

    // ---- getters --------------------------------------------------------

    /// The log's name.
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// Everything below this number was taken by the hub, or is known there to
    /// be missing.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Memory of the records kept, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    // ---- inputs ---------------------------------------------------------

    /// A record was made. Numbers only rise; those between two were dropped
    /// before they came here.
    pub fn push(&mut self, number: u64, record: LogRecord, now: Duration) {
        self.now = now;
        if number < self.end {
            return;
        }
        self.end = number + 1;
        let cost = cost(&record);
        self.bytes += cost;
        self.kept.push_back(Kept { number, record, cost });
        while self.limits.is_beyond(self.kept.len(), self.bytes) {
            self.drop_first();
        }
    }

    /// The hub has acknowledged a new link. What was under way may have been
    /// taken: the hub drops what it has.
    pub fn handle_link(&mut self) {
        self.standing = Standing::Ready;
    }

    /// How far the hub is.
    pub fn handle_taken(&mut self, taken: &LogTaken, now: Duration) {
        self.now = now;
        if taken.stream != self.stream {
            return;
        }
        let before = self.taken;
        self.taken = self.taken.max(taken.offset.min(self.end));
        while self.kept.front().is_some_and(|kept| kept.number < self.taken) {
            self.drop_first();
        }
        self.standing = match self.standing {
            // An answer to what was said on an earlier link.
            Standing::Refused => Standing::Refused,
            _ if self.taken > before => Standing::Ready,
            // It says nothing new: not to be asked again and again.
            _ => Standing::Patient(now.saturating_add(AGAIN)),
        };
    }

    /// The hub refused something. Whether it was of this log.
    pub fn handle_refused(&mut self, refusal: &Refusal, now: Duration) -> bool {
        self.now = now;
        let id = refusal.in_reply_to.as_ref().map(RequestId::as_str);
        let own = id.is_some_and(|id| id.starts_with(&format!("log.{}.", self.stream)));
        if own {
            tracing::debug!(target: "trunkline::client", code = %refusal.code, "the hub does not take log records now");
            self.standing = if refusal.recoverable {
                let after = refusal.retry_after_ms.map_or(AGAIN, Duration::from_millis);
                Standing::Patient(now.saturating_add(after.min(AGAIN_MAX)))
            } else {
                Standing::Refused
            };
        }
        own
    }

    /// A deadline may have come.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.now = now;
    }

    // ---- outputs --------------------------------------------------------

    /// When there will be something to send. `None` too while there is: it waits
    /// for the link then.
    pub fn deadline(&self) -> Option<Duration> {
        self.due().filter(|due| *due > self.now)
    }

    /// The next batch, with an id for the hub to name it by, for one that reads
    /// messages of `message_bytes_max`.
    pub fn poll(
        &mut self,
        message_bytes_max: usize,
        now: Duration,
    ) -> Option<(RequestId, LogBatch)> {
        self.now = now;
        if self.due()? > now {
            return None;
        }
        let most = message_bytes_max.saturating_sub(AROUND_BYTES);
        while self.kept.front().is_some_and(|kept| json_bytes(&kept.record) > most) {
            // This hub would never read it.
            self.drop_first();
        }
        let offset = self.kept.front().map_or(self.end, |kept| kept.number);
        let (mut bytes, mut items) = (0, 0);
        let mut records: Vec<LogRecord> = Vec::new();
        for (number, kept) in (offset..).zip(&self.kept) {
            bytes += json_bytes(&kept.record);
            items += items_of(&kept.record);
            let fits = bytes <= BATCH_BYTES.min(most) && items <= BATCH_ITEMS;
            let follows = kept.number == number && records.len() < LOG_BATCH_RECORDS_MAX;
            if !follows || !(fits || records.is_empty()) {
                break;
            }
            records.push(kept.record.clone());
        }
        let id = format!("log.{}.{offset}", self.stream);
        // Letters, digits, - and ., and at most 61 of them.
        let id = id.parse().expect("a word, a UUID and a number with dots are a request id");
        let missing_from = (self.taken < offset).then_some(self.taken);
        self.standing = Standing::UnderWay;
        self.sent_at = Some(now);
        Some((id, LogBatch { stream: self.stream, missing_from, offset, records }))
    }

    /// When the next batch is to go; `None` while there is none, or the hub's
    /// word is waited for.
    fn due(&self) -> Option<Duration> {
        if self.taken >= self.end {
            return None;
        }
        match self.standing {
            Standing::UnderWay | Standing::Refused => None,
            Standing::Patient(until) => Some(until),
            Standing::Ready => {
                let is_full = self.kept.len() >= LOG_BATCH_RECORDS_MAX || self.bytes >= BATCH_BYTES;
                let gathered = self.sent_at.map(|at| at.saturating_add(self.limits.gather));
                Some(gathered.filter(|_| !is_full).unwrap_or_default())
            }
        }
    }

    fn drop_first(&mut self) {
        if let Some(dropped) = self.kept.pop_front() {
            self.bytes -= dropped.cost;
        }
    }
}

/// How long a record is as JSON, with a comma.
fn json_bytes(record: &LogRecord) -> usize {
    // A record serialises: its map has texts as keys.
    1 + serde_json::to_vec(record).map_or(usize::MAX / 2, |json| json.len())
}

/// Members and elements of a record: rather too many than too few.
fn items_of(record: &LogRecord) -> usize {
    8 + 2 * record.fields.len()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use trunkline_protocol::message::{ErrorCode, LogLevel};

    use super::*;

    const S: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);
    const MESSAGE: usize = 1024 * 1024;
    const STREAM: StreamId = StreamId::from_u128(7);

    #[test]
    fn the_first_record_goes_at_once_and_the_next_are_gathered_for_a_second() {
        let mut tail = tail(1000);
        push(&mut tail, 1, 10 * S);
        assert_eq!(sent(&mut tail, 10 * S), Some((None, 0, 1)));
        taken(&mut tail, 1, 10 * S + MS);
        push(&mut tail, 2, 10 * S + 2 * MS);
        assert_eq!(sent(&mut tail, 10 * S + 2 * MS), None);
        assert_eq!(tail.deadline(), Some(11 * S));
        push(&mut tail, 1, 10 * S + 500 * MS);
        tail.handle_timeout(11 * S);
        assert_eq!(tail.deadline(), None, "it is due, and waits for the link");
        assert_eq!(sent(&mut tail, 11 * S), Some((None, 1, 4)));
    }

    #[test]
    fn one_batch_is_under_way_at_a_time_and_a_full_one_does_not_wait() {
        let mut tail = tail(1000);
        push(&mut tail, 600, S);
        let (_, _, first) = sent(&mut tail, S).unwrap();
        assert!(first <= 256, "{first}");
        assert_eq!((sent(&mut tail, 60 * S), tail.deadline()), (None, None));
        taken(&mut tail, first, S);
        let (_, from, second) = sent(&mut tail, S).unwrap();
        assert_eq!(from, first);
        assert!(second > first, "at once: there is more than one batch");
    }

    #[test]
    fn a_new_link_goes_on_from_what_was_taken() {
        let mut tail = tail(1000);
        push(&mut tail, 3, S);
        assert_eq!(sent(&mut tail, S), Some((None, 0, 3)));
        taken(&mut tail, 2, S);
        assert_eq!(sent(&mut tail, 2 * S), Some((None, 2, 3)));
        tail.handle_link();
        push(&mut tail, 1, 3 * S);
        assert_eq!(sent(&mut tail, 3 * S), Some((None, 2, 4)));
        taken(&mut tail, 1, 3 * S);
        assert_eq!(tail.taken(), 2, "older figures change nothing");
        taken(&mut tail, 4, 3 * S);
        assert_eq!((tail.bytes(), tail.deadline()), (0, None));
    }

    #[test]
    fn what_had_to_be_dropped_is_named_exactly() {
        let mut tail = tail(10);
        push(&mut tail, 4, S);
        assert_eq!(sent(&mut tail, S), Some((None, 0, 4)));
        taken(&mut tail, 4, S);
        push(&mut tail, 25, S);
        assert_eq!(sent(&mut tail, 2 * S), Some((Some(4), 19, 29)));
        // Those under way may be pushed out, too; if they are taken, they are.
        push(&mut tail, 15, 2 * S);
        taken(&mut tail, 29, 2 * S);
        assert_eq!(sent(&mut tail, 3 * S), Some((Some(29), 34, 44)));
    }

    #[test]
    fn what_never_came_here_is_missing_too() {
        let mut tail = tail(10);
        tail.push(0, record("a"), S);
        tail.push(5, record("b"), S);
        assert_eq!(sent(&mut tail, S), Some((None, 0, 1)), "a batch has no hole");
        taken(&mut tail, 1, S);
        assert_eq!(sent(&mut tail, 2 * S), Some((Some(1), 5, 6)));
    }

    #[test]
    fn memory_is_bounded_in_bytes() {
        let mut tail = LogTail::new(STREAM, LogLimits { bytes_max: 0, ..LogLimits::default() });
        for number in 0..1000 {
            tail.push(number, record(&"x".repeat(8000)), S);
            assert!(tail.bytes() <= BYTES_MIN, "{}", tail.bytes());
        }
        let (missing, from, to) = sent(&mut tail, S).unwrap();
        assert_eq!(missing, Some(0));
        assert!(from > 980 && to - from <= 2, "{from} {to}");
    }

    #[test]
    fn a_batch_stays_within_its_bounds_as_json() {
        let mut tail = tail(1000);
        // Six bytes for each, as JSON.
        tail.push(0, record(&"\u{1}".repeat(8192)), S);
        tail.push(1, record("next"), S);
        assert_eq!(sent(&mut tail, S), Some((None, 0, 1)), "longer than others, and alone");
        taken(&mut tail, 1, S);
        assert_eq!(sent(&mut tail, 2 * S), Some((None, 1, 2)));
        taken(&mut tail, 2, 2 * S);
        let fields: BTreeMap<String, String> =
            (0..64).map(|n| (n.to_string(), String::new())).collect();
        for number in 2..200 {
            tail.push(number, LogRecord { fields: fields.clone(), ..record("") }, 3 * S);
        }
        let (_, batch) = tail.poll(MESSAGE, 3 * S).unwrap();
        let items: usize = batch.records.iter().map(items_of).sum();
        assert!(items <= BATCH_ITEMS && batch.records.len() > 10, "{items}");
        assert!(serde_json::to_vec(&batch).unwrap().len() <= BATCH_BYTES + AROUND_BYTES);
    }

    #[test]
    fn what_a_hub_would_never_read_is_missing() {
        let mut tail = tail(1000);
        tail.push(0, record("a"), S);
        tail.push(1, record(&"x".repeat(5000)), S);
        let batch = tail.poll(4096, S).unwrap().1;
        assert_eq!((batch.offset, batch.end()), (0, 1));
        taken(&mut tail, 1, S);
        let batch = tail.poll(4096, 2 * S).unwrap().1;
        assert_eq!((batch.missing_from, batch.offset, batch.records.len()), (Some(1), 2, 0));
        taken(&mut tail, 2, 2 * S);
        assert_eq!(tail.poll(4096, 60 * S), None);
    }

    #[test]
    fn a_refusal_that_passes_is_waited_for_and_another_ends_it_for_the_link() {
        let mut tail = tail(1000);
        push(&mut tail, 1, S);
        let (id, _) = tail.poll(MESSAGE, S).unwrap();
        let mut busy = Refusal::new(ErrorCode::Internal, "").reply_to(Some(id.clone()));
        busy.retry_after_ms = Some(3000);
        assert!(tail.handle_refused(&busy, S));
        assert_eq!(tail.deadline(), Some(4 * S));
        assert_eq!(sent(&mut tail, 2 * S), None);
        assert_eq!(sent(&mut tail, 4 * S), Some((None, 0, 1)));
        let never = Refusal::new(ErrorCode::Unsupported, "").reply_to(Some(id));
        assert!(tail.handle_refused(&never, 4 * S));
        push(&mut tail, 5, 5 * S);
        assert_eq!((sent(&mut tail, 60 * S), tail.deadline()), (None, None));
        tail.handle_link();
        assert_eq!(sent(&mut tail, 60 * S), Some((None, 0, 6)));
        let other = Refusal::new(ErrorCode::NotFound, "").reply_to("log.1".parse().ok());
        assert!(!tail.handle_refused(&other, 60 * S));
    }

    #[test]
    fn a_hub_that_says_nothing_new_is_not_asked_again_and_again() {
        let mut tail = tail(1000);
        push(&mut tail, 1, S);
        assert!(sent(&mut tail, S).is_some());
        taken(&mut tail, 0, S);
        assert_eq!((sent(&mut tail, S), tail.deadline()), (None, Some(6 * S)));
        let other = LogTaken { stream: StreamId::from_u128(8), offset: 1 };
        tail.handle_taken(&other, S);
        assert_eq!(tail.taken(), 0);
        taken(&mut tail, u64::MAX, S);
        assert_eq!(tail.taken(), 1, "no hub has what was not made yet");
    }

    fn tail(records_max: usize) -> LogTail {
        LogTail::new(STREAM, LogLimits { records_max, ..LogLimits::default() })
    }

    fn record(message: &str) -> LogRecord {
        LogRecord {
            ts_ms: 0,
            level: LogLevel::Info,
            target: "app".into(),
            message: message.into(),
            fields: BTreeMap::new(),
        }
    }

    fn push(tail: &mut LogTail, count: u64, now: Duration) {
        for _ in 0..count {
            tail.push(tail.end, record("x"), now);
        }
    }

    fn taken(tail: &mut LogTail, offset: u64, now: Duration) {
        tail.handle_taken(&LogTaken { stream: STREAM, offset }, now);
    }

    /// What is missing before the next batch, and its range.
    fn sent(tail: &mut LogTail, now: Duration) -> Option<(Option<u64>, u64, u64)> {
        let (_, batch) = tail.poll(MESSAGE, now)?;
        Some((batch.missing_from, batch.offset, batch.end()))
    }
}
