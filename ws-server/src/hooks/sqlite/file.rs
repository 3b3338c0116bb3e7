//! The file: whose it is, which version it has, and that it holds together.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _};
use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use trunkline_protocol::ids::QueueEpoch;

use super::{OpenError, SqliteQueueBuilder, Synchronous};

/// Says whose file it is, in SQLite's own header: "trnq".
const APPLICATION_ID: u32 = 0x7472_6e71;

/// The latest version of the tables.
const VERSION: u32 = 1;

/// What each version adds to the one before.
const MIGRATIONS: [&str; VERSION as usize] = ["
    CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE commands (
        tenant TEXT NOT NULL,
        command TEXT NOT NULL,
        agent TEXT NOT NULL,
        place INTEGER NOT NULL,
        status TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        instance TEXT,
        stream TEXT,
        requested_by TEXT,
        requested_at_ms INTEGER NOT NULL,
        ended_at_ms INTEGER,
        forgotten_at_ms INTEGER,
        request TEXT NOT NULL,
        ending TEXT,
        PRIMARY KEY (tenant, command)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX ended ON commands (tenant, ended_at_ms, command) WHERE ended_at_ms IS NOT NULL;
    CREATE INDEX forgotten ON commands (forgotten_at_ms) WHERE forgotten_at_ms IS NOT NULL;
"];

/// An open file.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) epoch: QueueEpoch,
    /// Held as long as the file is used.
    pub(super) lock: File,
}

pub(super) fn open(builder: &SqliteQueueBuilder) -> Result<Opened, OpenError> {
    let path = &builder.path;
    let lock = lock(path)?;
    let is_new = look_at_header(path)?;
    let sqlite = |error| sort(path, error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let flags = if is_new { flags | OpenFlags::SQLITE_OPEN_CREATE } else { flags };
    let mut connection = Connection::open_with_flags(path, flags).map_err(sqlite)?;
    connection.busy_timeout(builder.busy_timeout).map_err(sqlite)?;
    if !is_new {
        check(path, &connection)?;
    }
    connection.pragma_update(None, "journal_mode", "WAL").map_err(sqlite)?;
    let synchronous = match builder.sync {
        Synchronous::Full => "FULL",
        Synchronous::Normal => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", synchronous).map_err(sqlite)?;
    migrate(&mut connection).map_err(sqlite)?;
    let epoch: String = connection
        .query_row("SELECT value FROM about WHERE key = 'epoch'", [], |row| row.get(0))
        .map_err(sqlite)?;
    let epoch = epoch
        .parse()
        .map_err(|_| OpenError::Damaged { path: path.clone(), what: "its epoch".into() })?;
    #[cfg(test)]
    if let Some(pages) = builder.pages_max {
        connection.pragma_update(None, "max_page_count", pages).map_err(sqlite)?;
    }
    Ok(Opened { connection, epoch, lock })
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let io = |error| OpenError::Io { path: path.to_owned(), error };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(name);
    let lock = open.map_err(io)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

/// Whether there is no file yet. One that is there must be ours, which its
/// first bytes say before SQLite may write to it.
fn look_at_header(path: &Path) -> Result<bool, OpenError> {
    let io = |error| OpenError::Io { path: path.to_owned(), error };
    let foreign = || OpenError::Foreign { path: path.to_owned() };
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
    if !is_sqlite || application != APPLICATION_ID {
        return Err(foreign());
    }
    if version > VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), version, known: VERSION });
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

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let version: u32 =
        connection.query_row("SELECT user_version FROM pragma_user_version", [], |r| r.get(0))?;
    if version == VERSION {
        return Ok(());
    }
    let change = connection.transaction()?;
    for migration in MIGRATIONS.iter().skip(version as usize) {
        change.execute_batch(migration)?;
    }
    if version == 0 {
        let epoch = new_epoch().to_string();
        change.execute("INSERT INTO about (key, value) VALUES ('epoch', ?1)", [epoch])?;
        change.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    change.pragma_update(None, "user_version", VERSION)?;
    change.commit()?;
    // So that the header says whose file it is, to whoever looks at that first.
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
}

#[expect(clippy::disallowed_methods, reason = "made once for each file, outside the core")]
fn new_epoch() -> QueueEpoch {
    QueueEpoch::from_u128(rand::random())
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
