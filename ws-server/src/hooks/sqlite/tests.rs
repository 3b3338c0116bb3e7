use std::fs;
use std::path::PathBuf;

use futures_util::FutureExt as _;
use tempfile::TempDir;
use trunkline_protocol::ids::{InstanceId, StreamId};
use trunkline_protocol::message::{
    Channel, CommandEnd, CommandRequest, CommandSpec, CommandStatus, Priority, Run,
};

use super::*;
use crate::hooks::{LogChange, Piece, StreamHead, StreamLog as _};

const INSTANCE: InstanceId = InstanceId::from_u128(7);

/// A folder with a queue's file in it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("queue.db")
    }

    fn open(&self) -> SqliteQueue {
        SqliteQueue::open(self.file()).expect("it opens")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.file()).expect("it is there")
    }
}

fn tenant(name: &str) -> TenantId {
    name.parse().expect("a name")
}

fn accepted(number: u128, order: u64) -> StoredCommand {
    StoredCommand {
        tenant: tenant("one"),
        request: CommandRequest {
            command: CommandId::from_u128(number),
            agent: "a".parse().expect("a name"),
            spec: CommandSpec::from(Run::Argv(vec!["ls".into(), "-l".into()])),
            priority: Priority::High,
            deliver_within_ms: Some(5),
            retry: true,
        },
        requested_by: Some("ann".parse().expect("a name")),
        requested_at_ms: 1_700_000_000_000,
        order,
        status: CommandStatus::Queued,
        attempt: 0,
        instance: None,
        stream: None,
        ended_at_ms: None,
        end: None,
    }
}

fn accept(command: &StoredCommand) -> QueueChange {
    QueueChange::Accepted(Box::new(command.clone()))
}

fn lease(number: u128, attempt: u32) -> QueueChange {
    let command = CommandId::from_u128(number);
    QueueChange::Leased { tenant: tenant("one"), command, attempt, instance: INSTANCE }
}

fn settle(number: u128, ended_at_ms: u64) -> QueueChange {
    QueueChange::Settled {
        tenant: tenant("one"),
        command: CommandId::from_u128(number),
        attempt: 1,
        status: CommandStatus::Completed,
        ended_at_ms,
        stream: Some(StreamId::from_u128(9)),
        end: CommandEnd { exit_code: Some(3), end: 12, ..CommandEnd::default() },
    }
}

fn forget(number: u128) -> QueueChange {
    QueueChange::Forgotten { tenant: tenant("one"), command: CommandId::from_u128(number) }
}

async fn all(queue: &SqliteQueue, changes: impl IntoIterator<Item = QueueChange>) {
    for change in changes {
        queue.apply(&change).await.expect("stored");
    }
}

#[tokio::test]
async fn what_was_stored_is_there_when_the_file_is_opened_again() {
    let place = Place::new();
    let queue = place.open();
    let epoch = queue.epoch();
    let changes = [accept(&accepted(1, 1)), accept(&accepted(2, 2)), lease(1, 1)];
    // Each twice: repeating is harmless.
    for change in changes {
        all(&queue, [change.clone(), change]).await;
    }
    let before = queue.load().await.expect("loaded");
    drop(queue);
    let queue = place.open();
    assert_eq!(queue.epoch(), epoch);
    let after = queue.load().await.expect("loaded");
    assert_eq!(after, before);
    let leased = StoredCommand {
        status: CommandStatus::Dispatched,
        attempt: 1,
        instance: Some(INSTANCE),
        ..accepted(1, 1)
    };
    assert_eq!(after, [leased, accepted(2, 2)]);
}

#[tokio::test]
async fn an_end_is_kept_with_all_that_was_told_of_it() {
    let place = Place::new();
    let queue = place.open();
    all(&queue, [accept(&accepted(1, 1)), lease(1, 1), settle(1, 1_700_000_000_500)]).await;
    drop(queue);
    let [command] = &place.open().load().await.expect("loaded")[..] else { panic!("one") };
    assert_eq!(
        (command.status, command.ended_at_ms),
        (CommandStatus::Completed, Some(1_700_000_000_500))
    );
    assert_eq!(command.end.as_ref().and_then(|end| end.exit_code), Some(3));
    assert_eq!(command.stream, Some(StreamId::from_u128(9)));
}

#[tokio::test]
async fn what_is_forgotten_stays_in_the_history_page_by_page() {
    let place = Place::new();
    let queue = place.open();
    for n in 1..=7u64 {
        let ended = settle(n.into(), 1_700_000_000_000 + n / 2);
        all(&queue, [accept(&accepted(n.into(), 1)), ended]).await;
    }
    all(&queue, [forget(1), forget(2), accept(&accepted(8, 1)), forget(8)]).await;
    let loaded = queue.load().await.expect("loaded");
    assert_eq!(loaded.len(), 5, "neither the finished nor the one that never was accepted");
    let (mut seen, mut from) = (Vec::new(), None);
    loop {
        let page = queue.history(&tenant("one"), None, from, 3).await.expect("a page");
        assert!(page.commands.len() <= 3);
        seen.extend(page.commands.iter().map(|c| c.request.command.as_u128()));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1], "newest first, each once");
    let other = "b".parse().expect("a name");
    for (tenant, agent) in [(tenant("two"), None), (tenant("one"), Some(&other))] {
        let page = queue.history(&tenant, agent, None, 10).await.expect("a page");
        assert!(page.commands.is_empty());
    }
}

#[tokio::test]
async fn an_old_history_is_pruned_and_none_is_kept_if_none_is_wanted() {
    let place = Place::new();
    let open = |kept| SqliteQueue::builder(place.file()).history(kept).open().expect("it opens");
    let queue = open(Duration::ZERO);
    all(&queue, [accept(&accepted(1, 1)), settle(1, 5), forget(1)]).await;
    assert!(
        queue.history(&tenant("one"), None, None, 9).await.expect("a page").commands.is_empty()
    );
    drop(queue);
    let queue = open(Duration::from_millis(1));
    all(&queue, [accept(&accepted(2, 1)), settle(2, 5), forget(2)]).await;
    // A later change finds that it is old: the clock has moved on by then.
    for n in 3..1_000 {
        all(&queue, [accept(&accepted(n, 1)), settle(n, 6), forget(n)]).await;
        let page = queue.history(&tenant("one"), None, None, 999).await.expect("a page");
        if !page.commands.iter().any(|command| command.request.command.as_u128() == 2) {
            return;
        }
    }
    panic!("it was never pruned");
}

#[tokio::test]
async fn a_command_that_only_the_history_knows_may_be_accepted_anew() {
    let place = Place::new();
    let queue = place.open();
    all(&queue, [accept(&accepted(1, 1)), settle(1, 5), forget(1), accept(&accepted(1, 2))]).await;
    assert_eq!(queue.load().await.expect("loaded"), [accepted(1, 2)]);
}

#[tokio::test]
async fn many_at_once_are_all_stored() {
    let place = Place::new();
    let queue = place.open();
    let changes: Vec<QueueChange> =
        (0..2_000u64).map(|n| accept(&accepted(u128::from(n), n))).collect();
    let applied = changes.iter().map(|change| queue.apply(change));
    for result in futures_util::future::join_all(applied).await {
        result.expect("stored");
    }
    assert_eq!(queue.load().await.expect("loaded").len(), 2_000);
}

#[tokio::test]
async fn a_full_disk_refuses_and_goes_on() {
    let place = Place::new();
    drop(place.open());
    let mut builder = SqliteQueue::builder(place.file());
    builder.options.pages_max = Some(12);
    let queue = builder.open().expect("it opens");
    let mut stored = 0;
    let refused = loop {
        let mut large = accepted(stored, 1);
        large.request.spec = CommandSpec::from(Run::Text("x".repeat(2_000)));
        match queue.apply(&accept(&large)).await {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 1_000, "it is never full");
    };
    assert!(refused.to_string().contains("full"), "{refused}");
    assert_eq!(queue.load().await.expect("loaded").len() as u128, stored);
    all(&queue, [forget(0)]).await;
}

#[tokio::test]
async fn a_file_held_by_another_program_refuses_in_time_and_goes_on() {
    let place = Place::new();
    let builder = SqliteQueue::builder(place.file()).busy_timeout(Duration::from_millis(20));
    let queue = builder.open().expect("it opens");
    let other = rusqlite::Connection::open(place.file()).expect("another program");
    other.execute_batch("BEGIN IMMEDIATE").expect("it writes");
    let refused = queue.apply(&accept(&accepted(1, 1))).await.expect_err("held");
    assert!(refused.to_string().contains("locked"), "{refused}");
    other.execute_batch("ROLLBACK").expect("it has written");
    all(&queue, [accept(&accepted(1, 1))]).await;
}

#[test]
fn two_hubs_cannot_use_one_file() {
    let place = Place::new();
    let first = place.open();
    assert!(matches!(SqliteQueue::open(place.file()), Err(OpenError::InUse { .. })));
    drop(first);
    place.open();
}

#[test]
fn what_is_no_queue_is_refused_and_left_as_it_is() {
    let place = Place::new();
    fs::write(place.file(), "a letter to somebody, long enough for a header ".repeat(9))
        .expect("written");
    let before = place.bytes();
    assert!(matches!(SqliteQueue::open(place.file()), Err(OpenError::Foreign { .. })));
    assert_eq!(place.bytes(), before);
    fs::remove_file(place.file()).expect("removed");
    let other = rusqlite::Connection::open(place.file()).expect("another database");
    other.execute_batch("CREATE TABLE theirs (x)").expect("written");
    drop(other);
    let before = place.bytes();
    assert!(matches!(SqliteQueue::open(place.file()), Err(OpenError::Foreign { .. })));
    assert_eq!(place.bytes(), before);
}

#[test]
fn a_newer_file_is_refused_and_left_as_it_is() {
    let place = Place::new();
    drop(place.open());
    let newer = rusqlite::Connection::open(place.file()).expect("it opens");
    newer.execute_batch("PRAGMA user_version = 99; PRAGMA wal_checkpoint(TRUNCATE)").expect("set");
    drop(newer);
    let before = place.bytes();
    let refused = SqliteQueue::open(place.file()).expect_err("newer");
    assert!(matches!(refused, OpenError::Newer { version: 99, known: 1, .. }), "{refused}");
    assert_eq!(place.bytes(), before);
}

#[tokio::test]
async fn a_damaged_file_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let queue = place.open();
    for n in 0..200 {
        all(&queue, [accept(&accepted(n, 1))]).await;
    }
    drop(queue);
    let whole = place.bytes();
    let page = 4096;
    assert!(whole.len() > 8 * page, "several pages");
    // Cut off at each page, and garbage in each page but the first.
    let cuts = (1..whole.len() / page).map(|n| whole[..n * page].to_vec());
    let spoilt = (1..whole.len() / page).map(|n| {
        let mut bytes = whole.clone();
        bytes[n * page..n * page + 64].fill(0xa5);
        bytes
    });
    for bytes in cuts.chain(spoilt) {
        fs::write(place.file(), &bytes).expect("written");
        let refused = SqliteQueue::open(place.file());
        assert!(matches!(refused, Err(OpenError::Damaged { .. })), "{refused:?}");
        assert_eq!(place.bytes(), bytes);
    }
}

#[tokio::test]
async fn what_was_asked_before_it_was_dropped_is_stored_in_order() {
    let place = Place::new();
    let queue = place.open();
    let change = accept(&accepted(1, 1));
    {
        let mut dropped = queue.apply(&change);
        // Polled once: it is on its way.
        assert!(dropped.as_mut().now_or_never().is_none());
    }
    all(&queue, [forget(1)]).await;
    assert!(queue.load().await.expect("loaded").is_empty(), "what came later counts");
}

// ---- the stream log ---------------------------------------------------------

fn head(number: u128) -> StreamHead {
    StreamHead {
        tenant: tenant("one"),
        stream: StreamId::from_u128(number),
        command: CommandId::from_u128(number),
        attempt: 1,
        agent: "a".parse().expect("a name"),
    }
}

/// A whole batch of the hub's: 1 MiB at this place.
fn a_megabyte(number: u128, at: u64) -> Vec<LogChange> {
    let pieces = (0..64).map(|n| LogChange::Grown {
        tenant: tenant("one"),
        stream: StreamId::from_u128(number),
        piece: Piece::Output {
            offset: at + n * 16 * 1024,
            channel: Channel::Pty,
            data: vec![b'x'; 16 * 1024].into(),
        },
    });
    pieces.collect()
}

const MIB: u64 = 1024 * 1024;

#[tokio::test]
async fn a_log_that_is_written_for_ever_does_not_grow_for_ever() {
    let place = Place::new();
    let log = SqliteStreamLog::open(place.file()).expect("it opens");
    log.apply(&[LogChange::Opened(head(1))]).await.expect("kept");
    for n in 0..60 {
        let mut changes = a_megabyte(1, n * MIB);
        let before = (n * MIB).saturating_sub(4 * MIB);
        let stream = StreamId::from_u128(1);
        changes.push(LogChange::Evicted { tenant: tenant("one"), stream, before });
        log.apply(&changes).await.expect("kept");
    }
    let kept = log.load().await.expect("loaded");
    assert_eq!(kept[0].pieces.len(), 5 * 64);
    assert!(fs::metadata(place.file()).expect("there").len() < 8 * MIB);
    // One that was large is given back.
    for n in 0..40 {
        log.apply(&a_megabyte(1, (60 + n) * MIB)).await.expect("kept");
    }
    assert!(fs::metadata(place.file()).expect("there").len() > 40 * MIB);
    let stream = StreamId::from_u128(1);
    log.apply(&[LogChange::Dropped { tenant: tenant("one"), stream }]).await.expect("kept");
    drop(log);
    let left = fs::metadata(place.file()).expect("there").len();
    assert!(left < 18 * MIB, "{left}");
}

#[tokio::test]
async fn a_full_disk_refuses_output_whole_and_goes_on() {
    let place = Place::new();
    drop(SqliteStreamLog::open(place.file()).expect("it opens"));
    let mut builder = SqliteStreamLog::builder(place.file());
    builder.0.pages_max = Some(1000);
    let log = builder.open().expect("it opens");
    log.apply(&[LogChange::Opened(head(1))]).await.expect("kept");
    let mut kept = 0;
    let refused = loop {
        match log.apply(&a_megabyte(1, kept * MIB)).await {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
        assert!(kept < 10, "it is never full");
    };
    assert!(refused.to_string().contains("full"), "{refused}");
    let loaded = log.load().await.expect("loaded");
    assert_eq!(loaded[0].pieces.len() as u64, kept * 64, "all of a call, or nothing");
    let stream = StreamId::from_u128(1);
    log.apply(&[LogChange::Dropped { tenant: tenant("one"), stream }]).await.expect("kept");
    let again = [vec![LogChange::Opened(head(2))], a_megabyte(2, 0)].concat();
    log.apply(&again).await.expect("there is room again");
}

#[test]
fn a_queue_is_no_stream_log_and_a_log_no_queue() {
    let place = Place::new();
    drop(place.open());
    let refused = SqliteStreamLog::open(place.file()).expect_err("a queue");
    assert!(refused.to_string().ends_with("is not a stream log"), "{refused}");
    fs::remove_file(place.file()).expect("removed");
    let log = SqliteStreamLog::open(place.file()).expect("it opens");
    let refused = SqliteStreamLog::open(place.file()).expect_err("two hubs");
    assert!(refused.to_string().ends_with("another hub is using this stream log"), "{refused}");
    drop(log);
    let refused = SqliteQueue::open(place.file()).expect_err("a log");
    assert!(refused.to_string().ends_with("is not a command queue"), "{refused}");
}
