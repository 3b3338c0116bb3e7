//! What every stream log must keep to.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::pin::pin;
use std::task::{Context, Waker};

use bytes::Bytes;
use trunkline_protocol::ids::{CommandId, StreamId};
use trunkline_protocol::message::{Channel, Gap, GapReason};

use super::tenant;
use crate::hooks::{LogChange, Piece, StoredStream, StreamHead, StreamLog};

/// Runs everything that a [`StreamLog`] must keep to.
///
/// `fresh` makes an empty log. `reopen` closes a log and opens another on the
/// same memory, as after a restart of the hub; a log that survives nothing
/// gives back the one it got.
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_server::MemoryStreamLog;
///
/// let fresh = async || MemoryStreamLog::new();
/// trunkline_server::testing::stream_log(fresh, async |log| log).await;
/// # });
/// ```
///
/// Dropping the future ends the suite.
///
/// # Panics
///
/// When an obligation is not kept.
pub async fn stream_log<L: StreamLog>(
    mut fresh: impl AsyncFnMut() -> L,
    mut reopen: impl AsyncFnMut(L) -> L,
) {
    let log = fresh().await;
    expect(&log, &[], "a fresh log is empty").await;

    // One stream's way: bytes of all values, holes with all reasons.
    let all: Vec<u8> = (0..=255).collect();
    let reasons = [
        GapReason::Evicted,
        GapReason::AgentOverflow,
        GapReason::AgentLoss,
        GapReason::HubLoss,
        GapReason::Other("of-tomorrow".into()),
    ];
    let mut pieces = vec![output(0, Channel::Pty, &all), output(256, Channel::Stdout, b"x")];
    let mut at = 257;
    for reason in reasons {
        pieces.push(gap(at, at + 10, reason));
        pieces.push(output(at + 10, Channel::Stderr, &[b'y'; 16 * 1024]));
        at += 10 + 16 * 1024;
    }
    let mut changes = vec![LogChange::Opened(head("one", 1))];
    changes.extend(pieces.iter().map(|piece| grown("one", 1, piece)));
    apply(&log, &changes).await;
    let whole = stored("one", 1, &pieces);
    expect(&log, std::slice::from_ref(&whole), "what is kept is loaded").await;
    let log = reopen(log).await;
    expect(&log, std::slice::from_ref(&whole), "it is there after a restart").await;

    // Once more, cut into other pieces, as after an answer that was lost.
    let again = output(256, Channel::Stdout, b"x and more");
    apply(&log, &[grown("one", 1, &again)]).await;
    let replaced = stored("one", 1, &[pieces[0].clone(), again]);
    expect(&log, &[replaced], "what stands at or beyond a piece's place is replaced").await;
    apply(&log, &changes[..1]).await;
    expect(&log, &[stored("one", 1, &[])], "a stream that is opened again is empty").await;
    apply(&log, &changes[1..]).await;
    expect(&log, &[whole], "and goes on like any other").await;

    // The oldest goes.
    apply(&log, &[evicted("one", 1, 256 + 5)]).await;
    let left = stored("one", 1, &pieces[2..]);
    expect(&log, &[left], "pieces that end at or below the place are gone, and no others").await;
    apply(&log, &[evicted("one", 1, u64::MAX >> 1)]).await;
    expect(&log, &[stored("one", 1, &[])], "an empty stream stays").await;
    let far = output(1 << 60, Channel::Pty, b"far");
    apply(&log, &[grown("one", 1, &far)]).await;
    let log = reopen(log).await;
    expect(&log, &[stored("one", 1, &[far])], "offsets may be large").await;
    apply(&log, &[dropped("one", 1)]).await;
    expect(&log, &[], "what is dropped is not loaded").await;

    // What is not there is not made.
    for change in [grown("one", 9, &pieces[0]), evicted("one", 9, 5), dropped("one", 9)] {
        apply(&log, std::slice::from_ref(&change)).await;
        expect(&log, &[], "a change to what was never opened makes nothing").await;
    }

    // Tenants.
    for of in ["one", "two"] {
        apply(&log, &[LogChange::Opened(head(of, 2)), grown(of, 2, &pieces[0])]).await;
    }
    apply(&log, &[grown("one", 2, &pieces[1]), evicted("one", 2, 256)]).await;
    let theirs = stored("two", 2, &pieces[..1]);
    let ours = stored("one", 2, &pieces[1..2]);
    expect(&log, &[ours, theirs.clone()], "one id in two tenants is two streams").await;
    apply(&log, &[dropped("one", 2)]).await;
    expect(&log, &[theirs], "one id in two tenants is two streams").await;
    apply(&log, &[dropped("two", 2)]).await;

    // Many, in one call, in order.
    let mut changes = Vec::new();
    let mut many = Vec::new();
    for number in 10..60 {
        changes.push(LogChange::Opened(head("one", number)));
        many.push(stored("one", number, &pieces[..2]));
    }
    for piece in &pieces[..2] {
        changes.extend((10..60).map(|number| grown("one", number, piece)));
    }
    apply(&log, &changes).await;
    let log = reopen(log).await;
    expect(&log, &many, "changes of one call are applied in order").await;
    let all: Vec<LogChange> = (10..60).map(|number| dropped("one", number)).collect();
    apply(&log, &all).await;

    // A future that is dropped may have applied its changes or not, and what
    // comes later counts.
    for number in 200..220 {
        let changes = [LogChange::Opened(head("one", number)), grown("one", number, &pieces[0])];
        {
            let mut given_up = pin!(log.apply(&changes));
            let _ = given_up.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        apply(&log, &[dropped("one", number)]).await;
    }
    expect(&log, &[], "a dropped call does not come after a later one").await;
    let log = reopen(log).await;
    expect(&log, &[], "a dropped call does not come after a later one").await;
}

async fn apply(log: &impl StreamLog, changes: &[LogChange]) {
    if let Err(error) = log.apply(changes).await {
        panic!("changes are kept: {error}");
    }
}

/// In any order.
async fn expect(log: &impl StreamLog, expected: &[StoredStream], obligation: &str) {
    let loaded = log.load().await;
    let loaded = loaded.unwrap_or_else(|error| panic!("what is kept is loaded: {error}"));
    let key = |stream: &StoredStream| (stream.head.tenant.clone(), stream.head.stream);
    let by_key = |all: &[StoredStream]| -> BTreeMap<_, _> {
        all.iter().map(|stream| (key(stream), stream.clone())).collect()
    };
    assert_eq!(loaded.len(), by_key(&loaded).len(), "{obligation}: one is loaded twice");
    assert!(by_key(&loaded) == by_key(expected), "{obligation}: {loaded:?}");
}

fn head(of: &str, number: u128) -> StreamHead {
    StreamHead {
        tenant: tenant(of),
        stream: StreamId::from_u128(number),
        command: CommandId::from_u128(number + 1000),
        attempt: 3,
        agent: "build-1".parse().expect("a name"),
    }
}

fn stored(of: &str, number: u128, pieces: &[Piece]) -> StoredStream {
    StoredStream { head: head(of, number), pieces: pieces.to_vec() }
}

fn output(offset: u64, channel: Channel, data: &[u8]) -> Piece {
    Piece::Output { offset, channel, data: Bytes::copy_from_slice(data) }
}

fn gap(from: u64, to: u64, reason: GapReason) -> Piece {
    Piece::Gap(Gap { from, to, reason })
}

fn grown(of: &str, number: u128, piece: &Piece) -> LogChange {
    let stream = StreamId::from_u128(number);
    LogChange::Grown { tenant: tenant(of), stream, piece: piece.clone() }
}

fn evicted(of: &str, number: u128, before: u64) -> LogChange {
    LogChange::Evicted { tenant: tenant(of), stream: StreamId::from_u128(number), before }
}

fn dropped(of: &str, number: u128) -> LogChange {
    LogChange::Dropped { tenant: tenant(of), stream: StreamId::from_u128(number) }
}
