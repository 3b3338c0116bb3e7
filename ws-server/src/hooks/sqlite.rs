//! A command queue in a SQLite file: accepted means on disk. And a stream log
//! in another.
//!
//! One thread owns the connection. Changes reach it through a bounded channel,
//! in order; those that wait at the same moment share one transaction, and
//! with it one sync of the disk.
//!
//! ```text
//!   apply ──┐
//!   apply ──┼──► channel ──► the writer: begin, all that waits, commit ──► answers
//!   apply ──┘
//! ```

mod file;
mod rows;
mod stream_log;
#[cfg(test)]
mod tests;
mod worker;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;
use trunkline_protocol::ids::{AgentId, CommandId, QueueEpoch, TenantId};

use self::file::{Opened, Options};
pub use self::stream_log::{SqliteStreamLog, SqliteStreamLogBuilder};
use self::worker::{GONE, Worker};
use self::writer::{Job, Writer};
use super::{BoxFuture, CommandQueue, QueueChange, QueueError, StoredCommand};

/// Changes that may wait for the writer; more wait where they are made.
const JOBS_MAX: usize = 1024;

/// Most commands on one page of a history.
const PAGE_MAX: u32 = 1000;

/// When a change counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Synchronous {
    /// When the disk has it (`synchronous=FULL`): it survives a power cut, as
    /// far as the disk keeps what it said it had written. The default.
    #[default]
    Full,
    /// When the operating system has it (`synchronous=NORMAL`): it survives
    /// `kill -9` of the hub, and not a power cut, after which the last changes
    /// may be missing. Several times faster on a slow disk.
    Normal,
}

/// Why a file cannot be opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another hub has it, in this process or another.
    #[error("{path}: another hub is using this {kind}")]
    InUse {
        /// Which file.
        path: PathBuf,
        /// What it is: a "command queue" or a "stream log".
        kind: &'static str,
    },
    /// There is a file, and it is something else.
    #[error("{path}: is not a {kind}")]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What it was to be.
        kind: &'static str,
    },
    /// It was written by a later version of this library.
    #[error("{path}: is a {kind} of version {version}; this program knows version {known}")]
    Newer {
        /// Which file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// Its version.
        version: u32,
        /// The latest that is known here.
        known: u32,
    },
    /// It does not hold together. Move it away to go on without it, or restore
    /// a copy.
    #[error("{path}: is damaged: {what}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What does not hold.
        what: String,
    },
    /// SQLite refused.
    #[error("{path}: {error}")]
    Sqlite {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: rusqlite::Error,
    },
    /// The system refused.
    #[error("{path}: {error}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// How a [`SqliteQueue`] is opened.
#[derive(Debug, Clone)]
pub struct SqliteQueueBuilder {
    options: Options,
    history: Duration,
}

impl SqliteQueueBuilder {
    /// When a change counts as stored. [`Synchronous::Full`] unless set.
    #[must_use]
    pub fn sync(mut self, sync: Synchronous) -> Self {
        self.options.sync = sync;
        self
    }

    /// How long a finished command stays in the history after the hub has
    /// dropped it from its roster: 7 days unless set; zero keeps none.
    #[must_use]
    pub fn history(mut self, kept: Duration) -> Self {
        self.history = kept;
        self
    }

    /// How long a change waits for another program that holds the file, such
    /// as a backup, before it fails: 2 s unless set. The hub gives a hook
    /// [`hook_timeout`](trunkline_protocol::limits::Limits::hook_timeout).
    #[must_use]
    pub fn busy_timeout(mut self, time: Duration) -> Self {
        self.options.busy_timeout = time;
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
    pub fn open(self) -> Result<SqliteQueue, OpenError> {
        let Opened { connection, lock } = file::open(&self.options, &rows::SCHEMA)?;
        let path = self.options.path;
        let epoch = match rows::epoch(&connection) {
            Ok(Some(epoch)) => epoch,
            Ok(None) => return Err(OpenError::Damaged { path, what: "its epoch".into() }),
            Err(error) => return Err(OpenError::Sqlite { path, error }),
        };
        let writer = Writer { connection, history: self.history };
        let worker = Worker::start("command-queue", JOBS_MAX, move |jobs| {
            writer.run(jobs);
            drop(lock);
        });
        match worker {
            Ok(worker) => Ok(SqliteQueue { epoch, worker, path }),
            Err(error) => Err(OpenError::Io { path, error }),
        }
    }
}

/// Keeps commands in a SQLite file: they survive `kill -9` of the hub at any
/// moment.
///
/// ```no_run
/// use trunkline_server::Hub;
/// use trunkline_server::hooks::SqliteQueue;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let queue = SqliteQueue::open("/var/lib/hub/queue.db")?;
/// let hub = Hub::builder().queue(std::sync::Arc::new(queue)).start().await?;
/// # Ok(())
/// # }
/// ```
///
/// Beside the file stand SQLite's own `-wal` and `-shm`, and `FILE.lock`, which
/// is locked as long as a hub uses the queue. The lock dies with the process,
/// however that ends. Programs that only read may open the file at any time.
///
/// A change that cannot be stored fails: the disk is full, the file is
/// read-only, or another program has held it for too long. It is not stored
/// then, and the next one is tried as if nothing had been. An `apply` whose
/// future is dropped may have been stored, or be stored yet, before any later
/// change to the same command.
#[derive(Debug)]
pub struct SqliteQueue {
    epoch: QueueEpoch,
    worker: Worker<Job>,
    path: PathBuf,
}

/// Where a page of a history begins: after this command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryCursor {
    ended_at_ms: u64,
    command: CommandId,
}

/// A page of finished commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryPage {
    /// The commands, that which ended last first.
    pub commands: Vec<StoredCommand>,
    /// Where the next page begins, if there may be one.
    pub next: Option<HistoryCursor>,
}

impl SqliteQueue {
    /// Opens a queue with the defaults: every change is synced, finished
    /// commands are kept for 7 days.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::builder(path).open()
    }

    /// A queue to be set up.
    pub fn builder(path: impl AsRef<Path>) -> SqliteQueueBuilder {
        SqliteQueueBuilder {
            options: Options::new(path.as_ref(), Synchronous::Full),
            history: Duration::from_secs(7 * 24 * 3600),
        }
    }

    /// Which file it is in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finished commands of a tenant, and of one agent if it is named: those
    /// that the hub still lists and those of the history. At most `count`, and
    /// at most 1,000.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub async fn history(
        &self,
        tenant: &TenantId,
        agent: Option<&AgentId>,
        from: Option<HistoryCursor>,
        count: u32,
    ) -> Result<HistoryPage, QueueError> {
        let (tenant, agent, count) = (tenant.clone(), agent.cloned(), count.min(PAGE_MAX));
        self.ask(|answer| Job::History { tenant, agent, from, count, answer }).await
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, QueueError>>) -> Job,
    ) -> Result<T, QueueError> {
        self.worker.ask(job).await.unwrap_or_else(|| Err(QueueError(GONE.into())))
    }
}

impl CommandQueue for SqliteQueue {
    fn epoch(&self) -> QueueEpoch {
        self.epoch
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>> {
        Box::pin(self.ask(|answer| Job::Load { answer }))
    }

    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        Box::pin(self.ask(|answer| Job::Apply { change: change.clone(), answer }))
    }
}
