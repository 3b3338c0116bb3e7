//! The file: whose it is, which version it has, and that it holds together.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::{OpenError, Synchronous};

/// What a file is, and how its tables came about.
#[derive(Debug)]
pub(super) struct Schema {
    /// What it is called in errors.
    pub(super) kind: &'static str,
    /// Says whose file it is, in SQLite's own header.
    pub(super) application_id: u32,
    /// What each version adds to the one before.
    pub(super) migrations: &'static [&'static str],
    /// What a new file begins with.
    pub(super) begin: fn(&Connection) -> rusqlite::Result<()>,
}

impl Schema {
    /// The latest version of the tables.
    fn version(&self) -> u32 {
        u32::try_from(self.migrations.len()).unwrap_or(u32::MAX)
    }
}

/// How a file is opened.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) path: PathBuf,
    pub(super) sync: Synchronous,
    pub(super) busy_timeout: Duration,
    #[cfg(test)]
    pub(super) pages_max: Option<u32>,
}

impl Options {
    pub(super) fn new(path: &Path, sync: Synchronous) -> Self {
        Self {
            path: path.to_owned(),
            sync,
            busy_timeout: Duration::from_secs(2),
            #[cfg(test)]
            pages_max: None,
        }
    }
}

/// An open file.
pub(super) struct Opened {
    pub(super) connection: Connection,
    /// Held as long as the file is used.
    pub(super) lock: File,
}

pub(super) fn open(options: &Options, schema: &Schema) -> Result<Opened, OpenError> {
    let path = &options.path;
    let lock = lock(path, schema)?;
    let is_new = look_at_header(path, schema)?;
    let sqlite = |error| sort(path, error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let flags = if is_new { flags | OpenFlags::SQLITE_OPEN_CREATE } else { flags };
    let mut connection = Connection::open_with_flags(path, flags).map_err(sqlite)?;
    connection.busy_timeout(options.busy_timeout).map_err(sqlite)?;
    if is_new {
        // Before there are tables, or never: what is deleted can be given back.
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL").map_err(sqlite)?;
    } else {
        check(path, &connection)?;
    }
    connection.pragma_update(None, "journal_mode", "WAL").map_err(sqlite)?;
    let synchronous = match options.sync {
        Synchronous::Full => "FULL",
        Synchronous::Normal => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", synchronous).map_err(sqlite)?;
    migrate(&mut connection, schema).map_err(sqlite)?;
    #[cfg(test)]
    if let Some(pages) = options.pages_max {
        connection.pragma_update(None, "max_page_count", pages).map_err(sqlite)?;
    }
    Ok(Opened { connection, lock })
}

fn lock(path: &Path, schema: &Schema) -> Result<File, OpenError> {
    let io = |error| OpenError::Io { path: path.to_owned(), error };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(name);
    let lock = open.map_err(io)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            Err(OpenError::InUse { path: path.to_owned(), kind: schema.kind })
        }
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

/// Whether there is no file yet. One that is there must be ours, which its
/// first bytes say before SQLite may write to it.
fn look_at_header(path: &Path, schema: &Schema) -> Result<bool, OpenError> {
    let io = |error| OpenError::Io { path: path.to_owned(), error };
    let kind = schema.kind;
    let foreign = || OpenError::Foreign { path: path.to_owned(), kind };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(io(error)),
    };
    let mut header = Vec::new();
    io::Read::by_ref(&mut file).take(100).read_to_end(&mut header).map_err(io)?;
    if header.is_empty() {
        return Ok(true); // a crash while it was made
    }
    let number = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(u32::from_be_bytes)
    };
    let is_sqlite = header.starts_with(b"SQLite format 3\0");
    let (Some(version), Some(application)) = (number(60), number(68)) else {
        return Err(foreign());
    };
    if !is_sqlite || application != schema.application_id {
        return Err(foreign());
    }
    let known = schema.version();
    if version > known {
        return Err(OpenError::Newer { path: path.to_owned(), kind, version, known });
    }
    Ok(false)
}

fn check(path: &Path, connection: &Connection) -> Result<(), OpenError> {
    let found: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|error| sort(path, error))?;
    if found == "ok" {
        return Ok(());
    }
    Err(OpenError::Damaged { path: path.to_owned(), what: found })
}

fn migrate(connection: &mut Connection, schema: &Schema) -> rusqlite::Result<()> {
    let version: u32 =
        connection.query_row("SELECT user_version FROM pragma_user_version", [], |r| r.get(0))?;
    if version == schema.version() {
        return Ok(());
    }
    let change = connection.transaction()?;
    for migration in schema.migrations.iter().skip(version as usize) {
        change.execute_batch(migration)?;
    }
    if version == 0 {
        (schema.begin)(&change)?;
        change.pragma_update(None, "application_id", schema.application_id)?;
    }
    change.pragma_update(None, "user_version", schema.version())?;
    change.commit()?;
    // So that the header says whose file it is, to whoever looks at that first.
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
}

fn sort(path: &Path, error: rusqlite::Error) -> OpenError {
    use rusqlite::ErrorCode;
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            OpenError::Damaged { path, what: error.to_string() }
        }
        _ => OpenError::Sqlite { path, error }, // whatever else SQLite may say
    }
}
