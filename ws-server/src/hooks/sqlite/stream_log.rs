//! A stream log in a SQLite file.
//!
//! One thread owns the connection; a call is one transaction.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior, params};
use tokio::sync::oneshot;
use trunkline_protocol::ids::{StreamId, TenantId};
use trunkline_protocol::message::{Channel, Gap};

use super::file::{self, Opened, Options, Schema};
use super::rows::{parse, signed, unsigned, word, wrong};
use super::worker::{GONE, Worker};
use super::{OpenError, Synchronous};
use crate::hooks::{BoxFuture, LogChange, LogError, Piece, StoredStream, StreamHead, StreamLog};

/// Its tables. "trnl".
const SCHEMA: Schema = Schema {
    kind: "stream log",
    application_id: 0x7472_6e6c,
    migrations: &["
    CREATE TABLE streams (
        id INTEGER PRIMARY KEY,
        tenant TEXT NOT NULL,
        stream TEXT NOT NULL,
        command TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        agent TEXT NOT NULL,
        UNIQUE (tenant, stream)
    ) STRICT;
    CREATE TABLE pieces (
        stream INTEGER NOT NULL REFERENCES streams (id),
        start INTEGER NOT NULL,
        end INTEGER NOT NULL,
        -- of a hole, why it is there
        reason TEXT,
        channel TEXT,
        data BLOB,
        CHECK ((reason IS NULL) = (data IS NOT NULL AND channel IS NOT NULL))
    ) STRICT;
    CREATE UNIQUE INDEX place ON pieces (stream, start);
"],
    begin: |_| Ok(()),
};

/// Pages that nobody uses are kept for what comes next, up to this; 16 MiB.
const FREE_PAGES_MAX: u32 = 4096;

/// How a [`SqliteStreamLog`] is opened.
#[derive(Debug, Clone)]
pub struct SqliteStreamLogBuilder(pub(super) Options);

impl SqliteStreamLogBuilder {
    /// When output counts as kept. [`Synchronous::Normal`] unless set: it
    /// survives `kill -9` of the hub; what a power cut takes is refilled by
    /// agents that are still there.
    #[must_use]
    pub fn sync(mut self, sync: Synchronous) -> Self {
        self.0.sync = sync;
        self
    }

    /// How long a write waits for another program that holds the file before
    /// it fails: 2 s unless set.
    #[must_use]
    pub fn busy_timeout(mut self, time: Duration) -> Self {
        self.0.busy_timeout = time;
        self
    }

    /// Opens the file, or makes it. Reads all of it once, to see that it holds
    /// together.
    ///
    /// Blocks while it does: call it before the hub starts, or on a thread
    /// that may block.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]: what is there is left as it is.
    pub fn open(self) -> Result<SqliteStreamLog, OpenError> {
        let Opened { connection, lock } = file::open(&self.0, &SCHEMA)?;
        let worker = Worker::start("stream-log", 1, move |mut jobs| {
            let mut writer = Writer(connection);
            while let Some(job) = jobs.blocking_recv() {
                writer.run(job);
            }
            drop(lock);
        });
        let path = self.0.path;
        match worker {
            Ok(worker) => Ok(SqliteStreamLog { worker, path }),
            Err(error) => Err(OpenError::Io { path, error }),
        }
    }
}

/// Keeps output in a SQLite file: a hub that is killed at any moment goes on
/// with it.
///
/// ```no_run
/// use std::sync::Arc;
/// use trunkline_server::Hub;
/// use trunkline_server::hooks::{SqliteQueue, SqliteStreamLog};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let queue = SqliteQueue::open("/var/lib/hub/queue.db")?;
/// let output = SqliteStreamLog::open("/var/lib/hub/output.db")?;
/// let hub = Hub::builder().queue(Arc::new(queue)).stream_log(Arc::new(output)).start().await?;
/// # Ok(())
/// # }
/// ```
///
/// The file takes about as much as the hub's logs have in memory
/// ([`log_bytes_total`]), and 16 MiB more. Beside it stand SQLite's own `-wal`
/// and `-shm`, and `FILE.lock`, which is locked as long as a hub uses it.
///
/// When it cannot be written (the disk is full, say), the hub goes on as if it
/// had none, and tries again each second.
///
/// [`log_bytes_total`]: trunkline_protocol::limits::Limits::log_bytes_total
#[derive(Debug)]
pub struct SqliteStreamLog {
    worker: Worker<Job>,
    path: PathBuf,
}

type Answer<T> = oneshot::Sender<Result<T, LogError>>;

/// Something to do.
#[derive(Debug)]
enum Job {
    Apply(Vec<LogChange>, Answer<()>),
    Load(Answer<Vec<StoredStream>>),
}

impl SqliteStreamLog {
    /// Opens a log with the defaults.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::builder(path).open()
    }

    /// A log to be set up.
    pub fn builder(path: impl AsRef<Path>) -> SqliteStreamLogBuilder {
        SqliteStreamLogBuilder(Options::new(path.as_ref(), Synchronous::Normal))
    }

    /// Which file it is in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn ask<T>(&self, job: impl FnOnce(Answer<T>) -> Job) -> Result<T, LogError> {
        self.worker.ask(job).await.unwrap_or_else(|| Err(LogError(GONE.into())))
    }
}

impl StreamLog for SqliteStreamLog {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredStream>, LogError>> {
        Box::pin(self.ask(Job::Load))
    }

    fn apply<'a>(&'a self, changes: &'a [LogChange]) -> BoxFuture<'a, Result<(), LogError>> {
        Box::pin(self.ask(|answer| Job::Apply(changes.to_vec(), answer)))
    }
}

/// The thread that owns the connection.
#[derive(Debug)]
struct Writer(Connection);

impl Writer {
    fn run(&mut self, job: Job) {
        let failed = |error: rusqlite::Error| LogError(error.to_string());
        // Who asked may have gone.
        match job {
            Job::Apply(changes, answer) => {
                let _ = answer.send(self.apply(&changes).map_err(failed));
            }
            Job::Load(answer) => {
                let _ = answer.send(load(&self.0).map_err(failed));
            }
        }
    }

    fn apply(&mut self, changes: &[LogChange]) -> rusqlite::Result<()> {
        let whole = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for change in changes {
            apply(&whole, change)?;
        }
        // Dropped without a commit, it is rolled back.
        whole.commit()?;
        let free: u32 = self.0.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
        if let Some(too_many @ 1..) = free.checked_sub(FREE_PAGES_MAX) {
            // Each step gives back one page.
            let mut vacuum = self.0.prepare(&format!("PRAGMA incremental_vacuum({too_many})"))?;
            let mut steps = vacuum.query([])?;
            while steps.next()?.is_some() {}
        }
        Ok(())
    }
}

fn apply(to: &Connection, change: &LogChange) -> rusqlite::Result<()> {
    match change {
        LogChange::Opened(head) => {
            drop_stream(to, &head.tenant, head.stream)?;
            to.prepare_cached(
                "INSERT INTO streams (tenant, stream, command, attempt, agent)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![
                head.tenant.as_str(),
                head.stream.to_string(),
                head.command.to_string(),
                head.attempt,
                head.agent.as_str(),
            ])
            .map(drop)
        }
        LogChange::Grown { tenant, stream, piece } => {
            let Some(id) = find(to, tenant, *stream)? else { return Ok(()) };
            let (from, end) = (signed(piece.from()), signed(piece.to()));
            to.prepare_cached("DELETE FROM pieces WHERE stream = ?1 AND start >= ?2")?
                .execute(params![id, from])?;
            let (reason, channel, data) = match piece {
                Piece::Output { channel, data, .. } => (None, Some(channel.as_str()), Some(data)),
                Piece::Gap(gap) => (Some(gap.reason.to_string()), None, None),
            };
            to.prepare_cached(
                "INSERT INTO pieces (stream, start, end, reason, channel, data)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![id, from, end, reason, channel, data.map(Bytes::as_ref)])
            .map(drop)
        }
        LogChange::Evicted { tenant, stream, before } => {
            let Some(id) = find(to, tenant, *stream)? else { return Ok(()) };
            // By the start, which is in the index: a piece ends where the next
            // one begins.
            to.prepare_cached("DELETE FROM pieces WHERE stream = ?1 AND start < ?2 AND end <= ?2")?
                .execute(params![id, signed(*before)])
                .map(drop)
        }
        LogChange::Dropped { tenant, stream } => drop_stream(to, tenant, *stream),
    }
}

fn find(from: &Connection, tenant: &TenantId, stream: StreamId) -> rusqlite::Result<Option<i64>> {
    from.prepare_cached("SELECT id FROM streams WHERE tenant = ?1 AND stream = ?2")?
        .query_row(params![tenant.as_str(), stream.to_string()], |row| row.get(0))
        .optional()
}

fn drop_stream(to: &Connection, tenant: &TenantId, stream: StreamId) -> rusqlite::Result<()> {
    let Some(id) = find(to, tenant, stream)? else { return Ok(()) };
    to.prepare_cached("DELETE FROM pieces WHERE stream = ?1")?.execute([id])?;
    to.prepare_cached("DELETE FROM streams WHERE id = ?1")?.execute([id]).map(drop)
}

fn load(from: &Connection) -> rusqlite::Result<Vec<StoredStream>> {
    let mut heads = from.prepare_cached(
        "SELECT id, tenant, stream, command, attempt, agent FROM streams ORDER BY id",
    )?;
    let heads = heads.query_map([], |row| {
        let head = StreamHead {
            tenant: parse(row, "tenant")?,
            stream: parse(row, "stream")?,
            command: parse(row, "command")?,
            attempt: row.get("attempt")?,
            agent: parse(row, "agent")?,
        };
        Ok((row.get::<_, i64>("id")?, head))
    })?;
    let mut pieces = from.prepare_cached(
        "SELECT start, end, reason, channel, data FROM pieces WHERE stream = ?1 ORDER BY start",
    )?;
    heads
        .map(|head| {
            let (id, head) = head?;
            let pieces = pieces.query_map([id], piece)?.collect::<rusqlite::Result<_>>()?;
            Ok(StoredStream { head, pieces })
        })
        .collect()
}

fn piece(row: &Row<'_>) -> rusqlite::Result<Piece> {
    let (from, to) = (unsigned(row.get("start")?), unsigned(row.get("end")?));
    if let Some(reason) = row.get("reason")? {
        return Ok(Piece::Gap(Gap { from, to, reason: word(reason)? }));
    }
    let data: Vec<u8> = row.get("data")?;
    if data.is_empty() || to.checked_sub(from) != Some(data.len() as u64) {
        return Err(wrong("a piece is not as long as it says".into()));
    }
    let channel: Channel = word(row.get("channel")?)?;
    Ok(Piece::Output { offset: from, channel, data: Bytes::from(data) })
}
