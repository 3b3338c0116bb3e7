//! For tests. Feature `testing`.
//!
//! [`Scripts`] are what an agent runs when it runs nothing real, and a
//! [`Viewer`] says what must be seen of a command next. With
//! `trunkline_server::testing::TestHub` between them a whole fleet is in one
//! test, on a virtual clock if it is paused.
//!
//! [`journal`] runs all that a [`Journal`] must keep.

mod script;
mod viewer;

pub use self::script::{Script, Scripts, Started};
pub use self::viewer::{Seen, Viewer};

use std::fmt::Display;
use std::future::Future;

use futures_util::FutureExt as _;
use trunkline_protocol::ids::{CommandId, InstanceId};
use trunkline_protocol::message::{
    CommandAccepted, CommandComplete, CommandEnd, CommandSettled, CommandStatus,
};

use crate::journal::{Attempts, FENCES_MAX, Journal, JournalRecord, Recovered};

/// Commands that live and end while a journal is asked to stay small.
const MANY: usize = 3 * FENCES_MAX;

/// Records in one batch of those.
const BATCH: usize = 64;

/// Checks that a [`Journal`] keeps its obligations, except the one that no test
/// in one process can: that what it has said is recorded survives a crash.
///
/// `new_memory` makes an empty memory, and what opens a journal on it; that is
/// called again and again for one memory, after the journal before was dropped.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use trunkline_client::{FileJournal, testing};
///
/// # let folder = std::env::temp_dir().join(format!("journal-kit-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// let mut memories = 0..;
/// testing::journal(|| {
///     let path = folder.join(format!("{}.journal", memories.next().unwrap()));
///     move || std::future::ready(FileJournal::open(&path))
/// })
/// .await;
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # }
/// ```
///
/// Dropping the future ends the suite.
///
/// # Panics
///
/// When it does not; with the obligation that is broken.
pub async fn journal<Memory, Open, Opening, J, E>(mut new_memory: Memory)
where
    Memory: FnMut() -> Open,
    Open: Fn() -> Opening,
    Opening: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let first = a_new_memory_is_empty(&new_memory()).await;
    let second = a_new_memory_is_empty(&new_memory()).await;
    assert_ne!(first, second, "every memory has an instance of its own");
    every_record_is_there_when_it_is_opened_again(&new_memory()).await;
    repeating_is_harmless(&new_memory()).await;
    a_batch_is_whole_or_not_there(&new_memory()).await;
    one_at_a_time_may_use_it(&new_memory()).await;
    it_stays_small_and_keeps_its_fences(&new_memory()).await;
}

async fn a_new_memory_is_empty<F, J, E>(open: &impl Fn() -> F) -> InstanceId
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let (journal, recovered) = opened(open).await;
    assert_eq!(recovered.records, [], "a new memory is empty");
    drop(journal);
    let (_, again) = opened(open).await;
    assert_eq!(again, recovered, "opening a memory changes nothing in it, and not its instance");
    recovered.instance
}

async fn every_record_is_there_when_it_is_opened_again<F, J, E>(open: &impl Fn() -> F)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let mut all = Vec::new();
    let mut instance = None;
    for batch in life() {
        let (journal, recovered) = opened(open).await;
        assert_same(&recovered, &all, "what was recorded is there when it is opened again");
        assert_eq!(
            *instance.get_or_insert(recovered.instance),
            recovered.instance,
            "the instance is the same as long as nothing is lost"
        );
        record(&journal, &batch).await;
        all.extend(batch);
    }
    let (_, recovered) = opened(open).await;
    assert_same(&recovered, &all, "what was recorded is there when it is opened again");
}

async fn repeating_is_harmless<F, J, E>(open: &impl Fn() -> F)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let (journal, _) = opened(open).await;
    let mut all = Vec::new();
    for batch in life() {
        record(&journal, &batch).await;
        record(&journal, &batch).await;
        all.extend(batch);
    }
    drop(journal);
    let (journal, recovered) = opened(open).await;
    assert_same(&recovered, &all, "repeating a record changes nothing");
    record(&journal, &all).await;
    drop(journal);
    let (_, recovered) = opened(open).await;
    assert_same(&recovered, &all, "repeating a record changes nothing");
}

async fn a_batch_is_whole_or_not_there<F, J, E>(open: &impl Fn() -> F)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let mut before: Vec<JournalRecord> = Vec::new();
    for round in 0..20 {
        let batch: Vec<_> = (0..20).map(|n| begun(1_000 * (round + 1) + n, 1)).collect();
        let (journal, _) = opened(open).await;
        // Dropped after its first step.
        let _ = journal.record(&batch).now_or_never();
        let next = [begun(round, 1)];
        record(&journal, &next).await;
        drop(journal);
        let (_, recovered) = opened(open).await;
        let with = [&before[..], &batch, &next].concat();
        let without = [&before[..], &next].concat();
        let found = Attempts::from_iter(&recovered.records);
        let is_whole = found == Attempts::from_iter(&with);
        assert!(
            is_whole || found == Attempts::from_iter(&without),
            "a batch whose future is dropped is recorded whole or not at all"
        );
        before = if is_whole { with } else { without };
    }
}

async fn one_at_a_time_may_use_it<F, J, E>(open: &impl Fn() -> F)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let (journal, _) = opened(open).await;
    let second_is_refused = match open().await {
        Err(_) => true,
        Ok(second) => second.load().await.is_err(),
    };
    assert!(second_is_refused, "a memory that is in use cannot be opened a second time");
    record(&journal, &[begun(1, 1)]).await;
    drop(journal);
    let (_, recovered) = opened(open).await;
    assert_same(&recovered, &[begun(1, 1)], "an attempt to open it twice changes nothing");
}

async fn it_stays_small_and_keeps_its_fences<F, J, E>(open: &impl Fn() -> F)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let (journal, _) = opened(open).await;
    let lives = (0..MANY as u128).flat_map(|n| [begun(n, 1), ended(n, 1), settled(n, 1)]);
    let all: Vec<JournalRecord> = lives.collect();
    for batch in all.chunks(BATCH) {
        record(&journal, batch).await;
    }
    drop(journal);
    let (_, recovered) = opened(open).await;
    let found = Attempts::from_iter(&recovered.records);
    assert!(found == Attempts::from_iter(&all), "the last {FENCES_MAX} attempts stay known");
    assert!(recovered.records.len() < all.len(), "what a journal keeps does not grow for ever");
}

// ---- below the stories --------------------------------------------------------

async fn opened<F, J, E>(open: &impl Fn() -> F) -> (J, Recovered)
where
    F: Future<Output = Result<J, E>>,
    J: Journal,
    E: Display,
{
    let journal = match open().await {
        Ok(journal) => journal,
        Err(error) => panic!("a memory that nobody uses can be opened: {error}"),
    };
    let recovered = journal.load().await;
    (journal, recovered.expect("a memory that nobody uses can be read"))
}

async fn record(journal: &impl Journal, records: &[JournalRecord]) {
    journal.record(records).await.expect("a journal that works records");
}

fn assert_same(recovered: &Recovered, all: &[JournalRecord], obligation: &str) {
    let found = Attempts::from_iter(&recovered.records).records();
    assert_eq!(found, Attempts::from_iter(all).records(), "{obligation}");
}

/// Attempts in every state, in batches of several sizes.
fn life() -> Vec<Vec<JournalRecord>> {
    vec![
        vec![begun(1, 1)],
        vec![begun(2, 1), begun(3, 1), ended(1, 1)],
        vec![settled(1, 1), begun(4, 2), ended(3, 1)],
        // A late word on an attempt that another took the place of.
        vec![begun(2, 2), ended(2, 1)],
        vec![ended(4, 2), settled(3, 1), begun(1, 2), begun(5, 1), ended(5, 1), settled(5, 1)],
        vec![settled(2, 1), ended(1, 2)],
    ]
}

fn begun(command: u128, attempt: u32) -> JournalRecord {
    JournalRecord::Begun(CommandAccepted { command: CommandId::from_u128(command), attempt })
}

fn ended(command: u128, attempt: u32) -> JournalRecord {
    let end = CommandEnd {
        exit_code: Some(7),
        error: Some("in people's words: \"…\"\n\u{1f4be}".to_owned()),
        end: 1 << 40,
        digest: Some(format!("sha256:{}", "a".repeat(64))),
        ..CommandEnd::default()
    };
    let command = CommandId::from_u128(command);
    let status = CommandStatus::Completed;
    JournalRecord::Ended(CommandComplete { command, attempt, status, end })
}

fn settled(command: u128, attempt: u32) -> JournalRecord {
    JournalRecord::Settled(CommandSettled { command: CommandId::from_u128(command), attempt })
}

#[cfg(test)]
mod tests;
