//! For tests. Feature `testing`.
//!
//! [`TestHub`] is a hub to test an application against, with cables that can be
//! cut and a process that can be killed.
//!
//! The others are suites for whoever implements a hook or a transport: one call
//! runs all that this library expects of it. They panic, naming the obligation
//! that is not kept.

#![allow(clippy::panic, clippy::expect_used, reason = "a suite of tests")]

mod authenticator;
mod hub;
mod stream_log;
#[cfg(test)]
mod tests;
mod transport;

use std::collections::BTreeMap;
use std::pin::pin;
use std::task::{Context, Waker};

use futures_util::future::join_all;
use trunkline_protocol::ids::{CommandId, InstanceId, StreamId, TenantId};
use trunkline_protocol::message::{
    CommandEnd, CommandRequest, CommandSpec, CommandStatus, Priority, Run,
};

pub use self::authenticator::authenticator;
pub use self::hub::{Cable, TestHub, TestLink};
pub use self::stream_log::stream_log;
pub use self::transport::transport;
use crate::MemoryLink;
use crate::hooks::{CommandQueue, QueueChange, StoredCommand};

/// Runs everything that a [`CommandQueue`] must keep to.
///
/// `fresh` makes a queue on an empty memory of its own. `reopen` closes a queue
/// and opens another on the same memory, as after a restart of the hub; a
/// queue that survives nothing gives back the one it got.
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_server::MemoryQueue;
///
/// trunkline_server::testing::command_queue(async || MemoryQueue::new(), async |queue| queue).await;
/// # });
/// ```
///
/// Dropping the future ends the suite.
///
/// # Panics
///
/// When an obligation is not kept.
pub async fn command_queue<Q: CommandQueue>(
    mut fresh: impl AsyncFnMut() -> Q,
    mut reopen: impl AsyncFnMut(Q) -> Q,
) {
    let queue = fresh().await;
    let epoch = queue.epoch();
    expect(&queue, &[], "a fresh memory is empty").await;

    // One command's way, each step twice.
    let one = accepted("one", 1, 1);
    for _ in 0..2 {
        apply(&queue, &QueueChange::Accepted(Box::new(one.clone()))).await;
        expect(&queue, std::slice::from_ref(&one), "accepting again changes nothing").await;
    }
    let leased = StoredCommand {
        status: CommandStatus::Dispatched,
        attempt: 1,
        instance: Some(INSTANCE),
        ..one.clone()
    };
    for _ in 0..2 {
        apply(&queue, &lease("one", 1, 1)).await;
        expect(&queue, std::slice::from_ref(&leased), "a lease is kept, and may be repeated").await;
    }
    apply(&queue, &QueueChange::Accepted(Box::new(one.clone()))).await;
    expect(&queue, std::slice::from_ref(&leased), "accepting again does not undo a lease").await;
    let queue = reopen(queue).await;
    assert_eq!(queue.epoch(), epoch, "the same memory has the same epoch");
    expect(&queue, std::slice::from_ref(&leased), "a lease is there after a restart").await;
    let settled = settled(leased);
    for _ in 0..2 {
        apply(&queue, &settle("one", 1)).await;
        expect(&queue, std::slice::from_ref(&settled), "an end is kept, and may be repeated").await;
    }
    let queue = reopen(queue).await;
    expect(&queue, &[settled], "an end is there after a restart").await;
    for _ in 0..2 {
        apply(&queue, &forget("one", 1)).await;
        expect(&queue, &[], "what is forgotten is not loaded").await;
    }

    // What is not there is not made.
    for change in [lease("one", 9, 1), settle("one", 9), forget("one", 9)] {
        apply(&queue, &change).await;
        expect(&queue, &[], "a change to what was never accepted makes nothing").await;
    }

    // Tenants.
    let (ours, theirs) = (accepted("one", 2, 1), accepted("two", 2, 1));
    for command in [&ours, &theirs] {
        apply(&queue, &QueueChange::Accepted(Box::new(command.clone()))).await;
    }
    apply(&queue, &forget("one", 2)).await;
    expect(&queue, &[theirs], "one id in two tenants is two commands").await;
    apply(&queue, &forget("two", 2)).await;

    // Many at once.
    let many: Vec<StoredCommand> =
        (10..110).map(|number| accepted("one", number, number)).collect();
    let changes: Vec<QueueChange> =
        many.iter().map(|command| QueueChange::Accepted(Box::new(command.clone()))).collect();
    for result in join_all(changes.iter().map(|change| queue.apply(change))).await {
        result.expect("changes to different commands come concurrently");
    }
    expect(&queue, &many, "changes to different commands come concurrently").await;
    let queue = reopen(queue).await;
    expect(&queue, &many, "places and priorities are kept").await;
    for number in 10..110 {
        apply(&queue, &forget("one", number)).await;
    }

    // A future that is dropped may have stored its change or not, and what
    // comes later counts.
    for number in 200..220 {
        let change = QueueChange::Accepted(Box::new(accepted("one", number, 1)));
        {
            let mut dropped = pin!(queue.apply(&change));
            let _ = dropped.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        apply(&queue, &forget("one", number)).await;
    }
    expect(&queue, &[], "a dropped change does not come after a later one").await;
    let queue = reopen(queue).await;
    expect(&queue, &[], "a dropped change does not come after a later one").await;

    assert_ne!(fresh().await.epoch(), epoch, "another memory has another epoch");
}

/// Both ends of an in-memory link.
pub fn memory_link() -> (MemoryLink, MemoryLink) {
    crate::transport::pair()
}

const INSTANCE: InstanceId = InstanceId::from_u128(7);

async fn apply(queue: &impl CommandQueue, change: &QueueChange) {
    if let Err(error) = queue.apply(change).await {
        panic!("a change is stored: {change:?}: {error}");
    }
}

/// In any order.
async fn expect(queue: &impl CommandQueue, expected: &[StoredCommand], obligation: &str) {
    let loaded = queue.load().await;
    let loaded = loaded.unwrap_or_else(|error| panic!("what is kept is loaded: {error}"));
    let key = |command: &StoredCommand| (command.tenant.clone(), command.request.command);
    let by_key = |all: &[StoredCommand]| -> BTreeMap<_, _> {
        all.iter().map(|command| (key(command), command.clone())).collect()
    };
    assert_eq!(loaded.len(), by_key(&loaded).len(), "{obligation}: one is loaded twice");
    assert_eq!(by_key(&loaded), by_key(expected), "{obligation}");
}

fn id(number: u64) -> CommandId {
    CommandId::from_u128(number.into())
}

fn tenant(name: &str) -> TenantId {
    name.parse().expect("a name")
}

fn accepted(of: &str, number: u64, order: u64) -> StoredCommand {
    let retry = number.is_multiple_of(5);
    StoredCommand {
        tenant: tenant(of),
        request: CommandRequest {
            command: id(number),
            agent: "build-1".parse().expect("a name"),
            spec: CommandSpec::from(Run::Argv(vec!["cargo".into(), "t\u{e9}st\n\"'".into()])),
            priority: if retry { Priority::High } else { Priority::Low },
            deliver_within_ms: number.is_multiple_of(2).then_some(60_000),
            retry,
        },
        requested_by: number.is_multiple_of(2).then(|| "ann".parse().expect("a name")),
        requested_at_ms: 1_764_000_000_000 + number,
        order,
        status: CommandStatus::Queued,
        attempt: 0,
        instance: None,
        stream: None,
        ended_at_ms: None,
        end: None,
    }
}

fn lease(of: &str, number: u64, attempt: u32) -> QueueChange {
    let command = id(number);
    QueueChange::Leased { tenant: tenant(of), command, attempt, instance: INSTANCE }
}

fn settled(leased: StoredCommand) -> StoredCommand {
    StoredCommand {
        status: CommandStatus::Completed,
        ended_at_ms: Some(1_764_000_000_999),
        stream: Some(StreamId::from_u128(9)),
        end: Some(end()),
        ..leased
    }
}

fn settle(of: &str, number: u64) -> QueueChange {
    QueueChange::Settled {
        tenant: tenant(of),
        command: id(number),
        attempt: 1,
        status: CommandStatus::Completed,
        ended_at_ms: 1_764_000_000_999,
        stream: Some(StreamId::from_u128(9)),
        end: end(),
    }
}

fn end() -> CommandEnd {
    let digest = Some(format!("sha256:{}", "0".repeat(64)));
    CommandEnd { exit_code: Some(-1), end: 1 << 40, digest, ..CommandEnd::default() }
}

fn forget(of: &str, number: u64) -> QueueChange {
    QueueChange::Forgotten { tenant: tenant(of), command: id(number) }
}
