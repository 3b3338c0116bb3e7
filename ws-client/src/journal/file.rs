//! A journal in one file.
//!
//! ```text
//!   header                                             frames, each synced before the next
//!   ┌────────┬─────────┬──────────┬──────┬──────────┐ ┌────────┬──────────┬─────────┐
//!   │ magic  │ version │ instance │ base │ checksum │ │ length │ checksum │ records │ …
//!   │ 8      │ 4       │ 16       │ 8    │ 8        │ │ 4      │ 8        │ length  │
//!   └────────┴─────────┴──────────┴──────┴──────────┘ └────────┴──────────┴─────────┘
//! ```
//!
//! Numbers stand most significant byte first. A checksum is the first 8 bytes
//! of the SHA-256 of what stands before it in the header, or of the length and
//! the records of its frame. Records are lines of JSON.
//!
//! A frame is a batch: recorded whole or not at all. Since each is synced before
//! the next is written, a crash can only tear the last one. So a frame that is
//! not whole is cut off where it is the last, and is damage where a whole one
//! follows, or where it lies below `base`: up to there the file was synced
//! before it got its name. Damage is refused, and nothing is changed.
//!
//! A file is only ever appended to. What has grown too long, could not be
//! written, or was torn, is written anew, synced, and renamed into place.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};
use trunkline_protocol::ids::InstanceId;

use super::{Attempts, Journal, JournalError, JournalRecord, Recovered, new_instance};
use crate::connector::BoxFuture;

const MAGIC: &[u8; 8] = b"trunklnJ";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 44;
const FRAME_HEADER_BYTES: usize = 12;

/// How much longer than twice its base a file may grow.
const SLACK_BYTES: u64 = 256 * 1024;

/// A file longer than this is none of ours: [`SLACK_BYTES`] and the most that
/// an agent may hold are far below.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Why a journal's file cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it, or this one.
    #[error("{path}: another agent is using this journal")]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// There is a file, and it is something else.
    #[error("{path}: is not an agent's journal")]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
    /// It was written by a later version of this library.
    #[error("{path}: is a journal of version {version}; this program knows version {VERSION}")]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Something that had been recorded can no longer be read. To go on
    /// without what was recorded, move the file away: what was running then
    /// becomes `unknown`.
    #[error("{path}: is damaged at byte {at}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        at: usize,
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

/// Keeps the journal in a file: it survives a crash of the process, and, as far
/// as the disk keeps what it said it had synced, of the machine.
///
/// ```no_run
/// use trunkline_client::{Agent, FileJournal, Programs};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let journal = FileJournal::open("/var/lib/build-1/agent.journal")?;
/// let agent = Agent::builder("ws://127.0.0.1:7070", "build-1")?
///     .journal(journal)
///     .await?
///     .connect(Programs::new());
/// # Ok(())
/// # }
/// ```
///
/// Beside the file stand `FILE.lock`, which is locked as long as somebody uses
/// the journal and stays when nobody does, and for moments `FILE.new`. The file
/// holds how commands ended, not what they were; only its owner may read it. It
/// stays below a few megabytes: the last 4,096 settled attempts are kept, so
/// that none of them is run again.
///
/// Each command costs three small writes to the disk, each synced: before it
/// starts, which it waits for, when it has ended, and when the hub has stored
/// that. What several commands write at the same moment goes in one.
///
/// A write that fails, such as on a full disk, fails the commands that were to
/// begin with it; later ones find out for themselves. A last record that a crash
/// left half written is cut off, with a warning: nothing was begun on it. As a
/// torn record cannot be told from a damaged one, the journal then takes a new
/// [`instance`](Recovered::instance), so that nothing is run again because of it.
///
/// Dropping it waits for a write that is under way, milliseconds, and lets go of
/// the file.
#[derive(Debug)]
pub struct FileJournal {
    book: Arc<Mutex<Book>>,
}

#[derive(Debug)]
struct Book {
    path: PathBuf,
    /// Held until the journal is dropped; the system lets go of it with the
    /// process.
    lock: Option<Lock>,
    /// `None` while what is in the file, or which file has the name, is in
    /// doubt: it is written anew before anything else.
    file: Option<File>,
    instance: InstanceId,
    attempts: Attempts,
    /// What is whole in the file, and how much of that it began with.
    length: u64,
    base: u64,
}

impl FileJournal {
    /// Opens the journal in this file, or begins one. Its folder must be there.
    /// Blocks for as long as reading it takes: milliseconds.
    ///
    /// # Errors
    ///
    /// When it is in use, damaged, or something else than a journal of this
    /// version; nothing is changed then.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        // Through links: renaming is to replace the file, not a link to it.
        let path = fs::canonicalize(&path).unwrap_or_else(|_| path.as_ref().to_path_buf());
        let failed = |error| OpenError::Io { path: path.clone(), error };
        let lock = match Lock::take(&path) {
            Ok(lock) => lock,
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        };
        let found = match read(&path) {
            Err(OpenError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => None,
            found => Some(found?),
        };
        if let Some(Found { is_torn: true, length, .. }) = found {
            tracing::warn!(target: "trunkline::client", path = %path.display(), whole_bytes = length, "the journal's last record was not whole, and is cut off");
        }
        let whole = found.as_ref().filter(|found| !found.is_torn);
        let instance = whole.map_or_else(new_instance, |found| found.instance);
        let append = || OpenOptions::new().append(true).open(&path);
        let file = whole.map(|_| append()).transpose().map_err(failed)?;
        let (length, base) = whole.map_or((0, 0), |found| (found.length, found.base));
        let attempts = found.map(|found| found.attempts).unwrap_or_default();
        let mut book =
            Book { path: path.clone(), lock: Some(lock), file, instance, attempts, length, base };
        if book.file.is_none() {
            book.file = Some(book.write_anew().map_err(failed)?);
        }
        Ok(Self { book: Arc::new(Mutex::new(book)) })
    }
}

/// A write may be under way for whom nobody waits any more: it is waited for
/// here, and none is begun after it, so that the next may open the file.
impl Drop for FileJournal {
    fn drop(&mut self) {
        lock(&self.book).lock = None;
    }
}

impl Journal for FileJournal {
    fn load(&self) -> BoxFuture<'_, Result<Recovered, JournalError>> {
        let book = lock(&self.book);
        let recovered = Recovered { instance: book.instance, records: book.attempts.records() };
        Box::pin(async move { Ok(recovered) })
    }

    fn record<'a>(
        &'a self,
        records: &'a [JournalRecord],
    ) -> BoxFuture<'a, Result<(), JournalError>> {
        Box::pin(async move {
            let (book, records) = (Arc::clone(&self.book), records.to_vec());
            let write = move || lock(&book).append(&records);
            let written = tokio::task::spawn_blocking(write).await.unwrap_or_else(|error| {
                // The runtime ends, or it panicked.
                Err(io::Error::other(error))
            });
            written.map_err(|error| JournalError(error.to_string()))
        })
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    // What a panic left in doubt is marked as such.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    fn append(&mut self, records: &[JournalRecord]) -> io::Result<()> {
        if self.lock.is_none() {
            // Nobody waits for it, and the file may be another's by now.
            return Err(io::Error::other("the journal was closed"));
        }
        let frame = frame(records)?;
        let is_long = self.length > 2 * self.base + SLACK_BYTES;
        let mut file = match self.file.take().filter(|_| !is_long) {
            Some(file) => file,
            None => self.write_anew()?,
        };
        file.write_all(&frame)?;
        file.sync_data()?;
        self.file = Some(file);
        self.length += frame.len() as u64;
        for record in records {
            self.attempts.apply(record);
        }
        Ok(())
    }

    /// Writes what is known to a new file, and puts it in place of this one.
    fn write_anew(&mut self) -> io::Result<File> {
        let records = self.attempts.records();
        let frame = if records.is_empty() { Vec::new() } else { frame(&records)? };
        let base = (HEADER_BYTES + frame.len()) as u64;
        let new_path = beside(&self.path, ".new");
        let mut file = private().create(true).truncate(true).open(&new_path)?;
        file.write_all(&header(self.instance, base))?;
        file.write_all(&frame)?;
        file.sync_all()?;
        // Until the folder is synced, either of the two may have the name after
        // a crash: nothing is recorded in between.
        fs::rename(&new_path, &self.path)?;
        sync_folder(&self.path)?;
        (self.length, self.base) = (base, base);
        Ok(file)
    }
}

// ---- the form of the file -----------------------------------------------------

struct Found {
    instance: InstanceId,
    attempts: Attempts,
    length: u64,
    base: u64,
    is_torn: bool,
}

fn read(path: &Path) -> Result<Found, OpenError> {
    let failed = |error| OpenError::Io { path: path.to_path_buf(), error };
    let foreign = || OpenError::Foreign { path: path.to_path_buf() };
    let about = fs::metadata(path).map_err(failed)?;
    if !about.is_file() || about.len() > FILE_BYTES_MAX {
        return Err(foreign());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let damaged = |at| OpenError::Damaged { path: path.to_path_buf(), at };
    let after_magic = bytes.strip_prefix(MAGIC).ok_or_else(foreign)?;
    let (version, _) = after_magic.split_first_chunk().ok_or_else(|| damaged(MAGIC.len()))?;
    let version = u32::from_be_bytes(*version);
    if version > VERSION {
        return Err(OpenError::Newer { path: path.to_path_buf(), version });
    }
    let (instance, base) = read_header(&bytes).ok_or_else(|| damaged(MAGIC.len()))?;

    let mut attempts = Attempts::default();
    let mut at = HEADER_BYTES;
    while at < bytes.len() {
        let Some(payload) = whole_frame(&bytes[at..]) else { break };
        for line in payload.split_inclusive(|byte| *byte == b'\n') {
            attempts.apply(&serde_json::from_slice(line).map_err(|_| damaged(at))?);
        }
        at += FRAME_HEADER_BYTES + payload.len();
    }
    let length = at as u64;
    let is_torn = at < bytes.len();
    let goes_on = || (at + 1..bytes.len()).any(|later| whole_frame(&bytes[later..]).is_some());
    if length < base || (is_torn && goes_on()) {
        return Err(damaged(at));
    }
    Ok(Found { instance, attempts, length, base, is_torn })
}

fn header(instance: InstanceId, base: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_be_bytes());
    header.extend(instance.as_u128().to_be_bytes());
    header.extend(base.to_be_bytes());
    let sum = checksum(&[&header]);
    header.extend(sum);
    header
}

/// The instance and the base, if the header is what was written.
fn read_header(bytes: &[u8]) -> Option<(InstanceId, u64)> {
    let instance = u128::from_be_bytes(bytes.get(12..28)?.try_into().ok()?);
    let base = u64::from_be_bytes(bytes.get(28..36)?.try_into().ok()?);
    let instance = InstanceId::from_u128(instance);
    (bytes.get(..HEADER_BYTES)? == header(instance, base)).then_some((instance, base))
}

fn frame(records: &[JournalRecord]) -> io::Result<Vec<u8>> {
    let mut payload = Vec::new();
    for record in records {
        serde_json::to_writer(&mut payload, record)?;
        payload.push(b'\n');
    }
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes();
    Ok([&length[..], &checksum(&[&length, &payload]), &payload].concat())
}

/// The records of the frame that stands at the beginning, if it is whole.
fn whole_frame(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let payload = rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    (!payload.is_empty() && checksum(&[length, payload]) == *sum).then_some(payload)
}

fn checksum(parts: &[&[u8]]) -> [u8; 8] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    let hash: [u8; 32] = hash.finalize().into();
    hash.first_chunk().copied().unwrap_or_default()
}

// ---- the system ---------------------------------------------------------------

/// Says that a journal is in use.
#[derive(Debug)]
struct Lock(File);

impl Lock {
    fn take(journal: &Path) -> Result<Self, TryLockError> {
        let file = private().create(true).truncate(false).open(beside(journal, ".lock"));
        let file = file.map_err(TryLockError::Error)?;
        file.try_lock()?;
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the file is not enough: a program that is being started at
        // this moment may have it open as well.
        if let Err(error) = self.0.unlock() {
            tracing::debug!(target: "trunkline::client", %error, "the journal's lock goes with its file");
        }
    }
}

/// To be written, by its owner only.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes the new name of a file durable. Elsewhere than on Unix, a folder is
/// not a thing to be synced.
fn sync_folder(path: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests;
