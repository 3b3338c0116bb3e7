//! Commands as rows, and back.

use std::str::FromStr;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension as _, Row, named_params, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use trunkline_protocol::ids::{AgentId, QueueEpoch, TenantId};

use super::file::Schema;
use super::{HistoryCursor, HistoryPage};
use crate::hooks::{QueueChange, StoredCommand};

/// Its tables. "trnq".
pub(super) const SCHEMA: Schema = Schema {
    kind: "command queue",
    application_id: 0x7472_6e71,
    migrations: &["
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
"],
    begin: |new| {
        let epoch = new_epoch().to_string();
        new.execute("INSERT INTO about (key, value) VALUES ('epoch', ?1)", [epoch]).map(drop)
    },
};

#[expect(clippy::disallowed_methods, reason = "made once for each file, outside the core")]
fn new_epoch() -> QueueEpoch {
    QueueEpoch::from_u128(rand::random())
}

/// The name of the memory; `None` if it is none.
pub(super) fn epoch(of: &Connection) -> rusqlite::Result<Option<QueueEpoch>> {
    let select = "SELECT value FROM about WHERE key = 'epoch'";
    let epoch: String = of.query_row(select, [], |row| row.get(0))?;
    Ok(epoch.parse().ok())
}

/// Stores a change. A command that is forgotten stays for the history as of
/// `history_ms`, or goes.
pub(super) fn apply(
    to: &Connection,
    change: &QueueChange,
    history_ms: Option<u64>,
) -> rusqlite::Result<()> {
    match change {
        QueueChange::Accepted(command) => accept(to, command),
        QueueChange::Leased { tenant, command, attempt, instance } => to
            .prepare_cached(
                "UPDATE commands SET status = 'dispatched', attempt = ?3, instance = ?4
                 WHERE tenant = ?1 AND command = ?2 AND forgotten_at_ms IS NULL",
            )?
            .execute(params![tenant.as_str(), command.to_string(), attempt, instance.to_string()])
            .map(drop),
        QueueChange::Settled { tenant, command, attempt, status, ended_at_ms, stream, end } => to
            .prepare_cached(
                "UPDATE commands SET status = ?3, attempt = ?4, ended_at_ms = ?5, stream = ?6,
                     ending = ?7
                 WHERE tenant = ?1 AND command = ?2 AND forgotten_at_ms IS NULL",
            )?
            .execute(params![
                tenant.as_str(),
                command.to_string(),
                status.as_str(),
                attempt,
                signed(*ended_at_ms),
                stream.map(|stream| stream.to_string()),
                json(end)?,
            ])
            .map(drop),
        QueueChange::Forgotten { tenant, command } => {
            let (tenant, command) = (tenant.as_str(), command.to_string());
            if let Some(now_ms) = history_ms {
                to.prepare_cached(
                    "UPDATE commands SET forgotten_at_ms = ?3
                     WHERE tenant = ?1 AND command = ?2 AND forgotten_at_ms IS NULL
                         AND ended_at_ms IS NOT NULL",
                )?
                .execute(params![tenant, command, signed(now_ms)])?;
            }
            // What never ended is of no history: it was not accepted after all.
            to.prepare_cached(
                "DELETE FROM commands
                 WHERE tenant = ?1 AND command = ?2 AND forgotten_at_ms IS NULL",
            )?
            .execute(params![tenant, command])
            .map(drop)
        }
    }
}

/// A command that is known is left as it is. One that only the history knows
/// begins anew: the hub has long forgotten it, and has accepted it again.
fn accept(to: &Connection, stored: &StoredCommand) -> rusqlite::Result<()> {
    let (tenant, command) = (stored.tenant.as_str(), stored.request.command.to_string());
    let known: Option<bool> = to
        .prepare_cached(
            "SELECT forgotten_at_ms IS NULL FROM commands WHERE tenant = ?1 AND command = ?2",
        )?
        .query_row(params![tenant, command], |row| row.get(0))
        .optional()?;
    if known == Some(true) {
        return Ok(());
    }
    to.prepare_cached(
        "INSERT OR REPLACE INTO commands (tenant, command, agent, place, status, attempt, instance,
             stream, requested_by, requested_at_ms, ended_at_ms, request, ending)
         VALUES (:tenant, :command, :agent, :place, :status, :attempt, :instance,
             :stream, :requested_by, :requested_at_ms, :ended_at_ms, :request, :ending)",
    )?
    .execute(named_params! {
        ":tenant": tenant,
        ":command": command,
        ":agent": stored.request.agent.as_str(),
        ":place": signed(stored.order),
        ":status": stored.status.as_str(),
        ":attempt": stored.attempt,
        ":instance": stored.instance.map(|instance| instance.to_string()),
        ":stream": stored.stream.map(|stream| stream.to_string()),
        ":requested_by": stored.requested_by.as_ref().map(|by| by.as_str().to_owned()),
        ":requested_at_ms": signed(stored.requested_at_ms),
        ":ended_at_ms": stored.ended_at_ms.map(signed),
        ":request": json(&stored.request)?,
        ":ending": stored.end.as_ref().map(json).transpose()?,
    })
    .map(drop)
}

/// Everything that is not forgotten.
pub(super) fn load(from: &Connection) -> rusqlite::Result<Vec<StoredCommand>> {
    let mut all = from.prepare("SELECT * FROM commands WHERE forgotten_at_ms IS NULL")?;
    all.query_map([], read)?.collect()
}

/// A page of what has ended.
pub(super) fn history(
    from: &Connection,
    tenant: &TenantId,
    agent: Option<&AgentId>,
    after: Option<HistoryCursor>,
    count: u32,
) -> rusqlite::Result<HistoryPage> {
    let mut page = from.prepare_cached(
        "SELECT * FROM commands
         WHERE tenant = :tenant AND ended_at_ms IS NOT NULL
             AND (:agent IS NULL OR agent = :agent)
             AND (ended_at_ms, command) < (:ended_at_ms, :command)
         ORDER BY ended_at_ms DESC, command DESC LIMIT :count",
    )?;
    let (before_ms, before) = match after {
        Some(after) => (signed(after.ended_at_ms), after.command.to_string()),
        None => (i64::MAX, "~".into()),
    };
    let rows = page.query_map(
        named_params! {
            ":tenant": tenant.as_str(),
            ":agent": agent.map(AgentId::as_str),
            ":ended_at_ms": before_ms,
            ":command": before,
            ":count": count,
        },
        read,
    )?;
    let commands = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    let is_full = commands.len() >= count as usize;
    let next = commands.last().filter(|_| is_full).map(|last| HistoryCursor {
        ended_at_ms: last.ended_at_ms.unwrap_or(0),
        command: last.request.command,
    });
    Ok(HistoryPage { commands, next })
}

/// Deletes some of what was forgotten before a time.
pub(super) fn prune(from: &Connection, before_ms: u64, count: u32) -> rusqlite::Result<()> {
    from.prepare_cached(
        "DELETE FROM commands WHERE (tenant, command) IN (
             SELECT tenant, command FROM commands
             WHERE forgotten_at_ms IS NOT NULL AND forgotten_at_ms < ?1 LIMIT ?2)",
    )?
    .execute(params![signed(before_ms), count])
    .map(drop)
}

fn read(row: &Row<'_>) -> rusqlite::Result<StoredCommand> {
    Ok(StoredCommand {
        tenant: parse(row, "tenant")?,
        request: parse_json(row, "request")?,
        requested_by: parse_optional(row, "requested_by")?,
        requested_at_ms: unsigned(row.get("requested_at_ms")?),
        order: unsigned(row.get("place")?),
        status: word(row.get("status")?)?,
        attempt: row.get("attempt")?,
        instance: parse_optional(row, "instance")?,
        stream: parse_optional(row, "stream")?,
        ended_at_ms: row.get::<_, Option<i64>>("ended_at_ms")?.map(unsigned),
        end: match row.get::<_, Option<String>>("ending")? {
            Some(text) => Some(serde_json::from_str(&text).map_err(|error| wrong(error.into()))?),
            None => None,
        },
    })
}

pub(super) fn parse<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &Row<'_>,
    column: &str,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    text.parse().map_err(|error: T::Err| wrong(error.into()))
}

/// One of our words.
pub(super) fn word<T: DeserializeOwned>(word: String) -> rusqlite::Result<T> {
    serde_json::from_value(word.into()).map_err(|error| wrong(error.into()))
}

fn parse_optional<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &Row<'_>,
    column: &str,
) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| text.parse().map_err(|error: T::Err| wrong(error.into()))).transpose()
}

fn parse_json<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| wrong(error.into()))
}

fn json<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

pub(super) fn wrong(error: Box<dyn std::error::Error + Send + Sync>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error)
}

/// SQLite knows signed numbers only; none of ours comes near the end of them.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
