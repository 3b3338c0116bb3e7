//! What every transport must keep to.

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use tokio::time::timeout;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};

/// Longest that one step may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A link that does not read takes no more than this before it makes the other
/// wait.
const UNREAD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Runs everything that a transport must keep to: a stream and a sink of whole
/// frames, as [`Hub::attach`](crate::Hub::attach) and the client's `Connector`
/// take them.
///
/// `connect` makes a link and gives both its ends. It needs a runtime with
/// time. Dropping the future ends the suite and drops the links.
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_server::testing;
///
/// // Yours in the place of `memory_link`: what one end says, the other hears.
/// testing::transport(async || testing::memory_link()).await;
/// # });
/// ```
///
/// # Panics
///
/// When an obligation is not kept.
pub async fn transport<A, B>(mut connect: impl AsyncFnMut() -> (A, B))
where
    A: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin,
    B: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin,
{
    let (mut one, mut other) = connect().await;
    frames_arrive_as_they_were(&mut one, &mut other).await;
    frames_arrive_as_they_were(&mut other, &mut one).await;
    both_may_talk_at_a_time(&mut one, &mut other).await;
    waiting_ends_wake_up(&mut one, &mut other).await;
    drop((one, other));

    let (mut one, mut other) = connect().await;
    who_does_not_read_makes_the_other_wait(&mut one, &mut other).await;
    drop((one, other));
    let (mut one, mut other) = connect().await;
    who_does_not_read_makes_the_other_wait(&mut other, &mut one).await;
    drop((one, other));

    let (one, other) = connect().await;
    last_words_arrive(one, other).await;
    let (one, other) = connect().await;
    last_words_arrive(other, one).await;
    let (one, other) = connect().await;
    who_is_gone_is_missed(one, other).await;
    let (one, other) = connect().await;
    who_is_gone_is_missed(other, one).await;
}

trait Link: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin {}

impl<T: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin> Link for T {}

async fn in_time<F: Future>(what: F, obligation: &str) -> F::Output {
    timeout(PATIENCE, what).await.unwrap_or_else(|_| panic!("{obligation}: it takes for ever"))
}

fn text(length: usize, salt: usize) -> Frame {
    let letters = (0..length).map(|n| b"abcdefghij"[(n / 7 + salt) % 10]);
    Frame::Text(letters.collect())
}

fn binary(length: usize, salt: usize) -> Frame {
    Frame::Binary((0..length).map(|n| (n / 3 + salt).to_le_bytes()[0]).collect())
}

/// Of many sizes, around those where framings change their shape.
fn all_kinds() -> Vec<Frame> {
    let sizes = [1, 2, 125, 126, 127, 1_000, 65_535, 65_536, 65_537, 1_000_000];
    let frames = sizes.into_iter().enumerate().flat_map(|(salt, size)| {
        [text(size, salt), binary(size, salt), Frame::Text(Bytes::from("ä€😀\u{1b}[1m"))]
    });
    frames.collect()
}

async fn frames_arrive_as_they_were(from: &mut impl Link, to: &mut impl Link) {
    let obligation = "frames arrive whole, in order, and of their kind";
    let frames = all_kinds();
    let send = async {
        for frame in &frames {
            from.feed(frame.clone()).await.expect("it is up");
        }
        from.flush().await.expect("it is up");
    };
    let hear = async {
        for frame in &frames {
            let heard = to.next().await.expect("it is up").expect("it is up");
            assert!(heard == *frame, "{obligation}: one of {} bytes did not", frame.len());
        }
    };
    in_time(async { tokio::join!(send, hear) }, obligation).await;
}

/// More than fits anywhere, both ways.
async fn both_may_talk_at_a_time(one: &mut impl Link, other: &mut impl Link) {
    const COUNT: usize = 2_000;
    async fn talk(link: &mut impl Link) {
        let (mut said, mut heard) = (0, 0);
        poll_fn(|cx| {
            while said < COUNT && Pin::new(&mut *link).poll_ready(cx).is_ready() {
                Pin::new(&mut *link).start_send(binary(10_000, said)).expect("it is up");
                said += 1;
            }
            let flushed = Pin::new(&mut *link).poll_flush(cx);
            while let Poll::Ready(frame) = Pin::new(&mut *link).poll_next(cx) {
                let frame = frame.expect("it is up").expect("it is up");
                assert!(frame == binary(10_000, heard), "frame {heard} is another");
                heard += 1;
            }
            let is_done = said == COUNT && heard == COUNT && flushed.is_ready();
            if is_done { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
    let both = async { tokio::join!(talk(one), talk(other)) };
    in_time(both, "reading and writing do not wait for each other").await;
}

/// An end that waits for a frame hears of it, however long it has waited.
async fn waiting_ends_wake_up(one: &mut impl Link, other: &mut impl Link) {
    for round in 0..20 {
        let say = async {
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            one.send(text(10, round)).await.expect("it is up");
        };
        let heard = in_time(
            async { tokio::join!(other.next(), say).0 },
            "who waits for a frame is woken by it",
        );
        assert!(heard.await.expect("it is up").expect("it is up") == text(10, round));
    }
}

async fn who_does_not_read_makes_the_other_wait(from: &mut impl Link, to: &mut impl Link) {
    let obligation = "who does not read makes the other wait, and loses nothing";
    let frame = binary(64 * 1024, 1);
    let mut said = 0;
    // As long as something goes out within a moment.
    while timeout(Duration::from_millis(500), from.feed(frame.clone())).await.is_ok() {
        said += 1;
        assert!(said * frame.len() < UNREAD_BYTES_MAX, "{obligation}: it takes whatever comes");
    }
    // Whether the last one was taken is not known; it was not flushed.
    let hear = async {
        for _ in 0..said {
            let heard = to.next().await.expect("it is up").expect("it is up");
            assert!(heard == frame, "{obligation}");
        }
    };
    let flush = async { from.flush().await.expect("it is up") };
    in_time(async { tokio::join!(hear, flush) }, obligation).await;
    let last = async {
        from.send(text(3, 3)).await.expect("it is up");
        loop {
            let heard = to.next().await.expect("it is up").expect("it is up");
            if heard == text(3, 3) {
                return;
            }
            assert!(heard == frame, "{obligation}");
        }
    };
    in_time(last, "it goes on as before").await;
}

/// What is said before the end arrives before the end.
async fn last_words_arrive(mut one: impl Link, mut other: impl Link) {
    let close = Close::new(CloseCode::Restart, "see you later");
    let frames = [text(1_000, 1), binary(100_000, 2), Frame::Close(close.clone())];
    let say = async {
        for frame in frames.clone() {
            one.feed(frame).await.expect("it is up");
        }
        one.flush().await.expect("it is up");
        // It may wait for the other's goodbye.
        let _ = timeout(Duration::from_secs(5), one.close()).await;
    };
    let hear = async {
        for frame in &frames[..2] {
            let heard = other.next().await.expect("it is up").expect("it is up");
            assert!(heard == *frame, "what is said before the end arrives");
        }
        match other.next().await {
            Some(Ok(Frame::Close(heard))) => {
                assert_eq!(heard.code, close.code, "a close has its code");
                assert_eq!(heard.reason, close.reason, "a close has its reason");
            }
            heard => panic!("a close arrives, and not {heard:?}"),
        }
        let _ = other.close().await;
    };
    in_time(async { tokio::join!(say, hear) }, "last words arrive").await;
}

/// A link whose other end is dropped ends; it does not wait for ever.
async fn who_is_gone_is_missed(one: impl Link, mut other: impl Link) {
    let obligation = "an end whose other end is gone learns of it";
    let gone = async {
        tokio::task::yield_now().await;
        drop(one);
    };
    let missed = async {
        while let Some(Ok(frame)) = other.next().await {
            assert!(matches!(frame, Frame::Close(_)), "{obligation}, and hears nothing else");
        }
    };
    in_time(async { tokio::join!(gone, missed) }, obligation).await;
    let refused = async {
        for _ in 0..10_000 {
            if other.send(binary(10_000, 0)).await.is_err() {
                return;
            }
        }
        panic!("{obligation}, and sends no more");
    };
    in_time(refused, obligation).await;
}
