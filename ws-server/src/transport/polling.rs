//! A link over plain HTTP: what its requests put down, and what they take
//! away, between two of them.
//!
//! ```text
//!   POST n ──► inbox ──────────────► link task
//!                                       │
//!   GET n ◄── given (n) ◄── gathered ◄──┘
//! ```
//!
//! In each direction one batch may be under way that its receiver has not
//! confirmed; asked for again, it is the same. So a lost request, or a lost
//! answer, costs a repetition and nothing else.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::polling::{BATCH_FRAMES_MAX, append};

/// What is gathered for one answer before the link has to wait, in bytes.
const GATHERED_BYTES: usize = 256 * 1024;

/// A peer that has not asked for so long does not come back: it tries for less
/// (P-POLL-9).
const SILENCE: Duration = Duration::from_secs(25);

/// Where the requests of one link meet its task.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    inside: Mutex<Inside>,
    /// Something was put down for the peer, or the link is over.
    news: Notify,
    /// The link's task has taken what the peer put down.
    room: Notify,
}

#[derive(Debug, Default)]
struct Inside {
    /// The number of the peer's last batch.
    heard: u64,
    inbox: VecDeque<Frame>,
    reader: Option<Waker>,
    /// The last batch that was given to the peer, until it has confirmed it.
    given: (u64, Bytes),
    gathered: Vec<u8>,
    frames: usize,
    writer: Option<Waker>,
    /// How many have asked: of two that ask at once the later is answered.
    asked: u64,
    /// How many of them wait for their answer.
    waiting: usize,
    /// The last frame for the peer is among those gathered, or was.
    said_close: bool,
    /// The peer has said something that cannot be: its link is lost.
    is_broken: bool,
    /// The link's task has ended.
    is_over: bool,
}

/// Why a request comes to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The number is not the next one: the link is lost.
    Number,
    /// Another request has taken its place.
    Superseded,
    /// The link is over.
    Over,
}

impl Inside {
    fn has_room(&self) -> bool {
        self.gathered.len() < GATHERED_BYTES && self.frames < BATCH_FRAMES_MAX
    }

    fn put(&mut self, frame: &Frame) {
        if !self.said_close {
            append(&mut self.gathered, frame);
            self.frames += 1;
            self.said_close = matches!(frame, Frame::Close(_));
        }
    }

    /// The peer has fetched the last words.
    fn is_done(&self) -> bool {
        self.said_close && self.frames == 0
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, inside: &mut Inside) {
        inside.is_broken = true;
        inside.wake();
        self.news.notify_waiters();
        self.room.notify_waiters();
    }

    /// The peer's batch of this number. Taken once the link's task has what came
    /// before, so that a peer which sends more than is read waits.
    ///
    /// Cancel safe: the batch was taken or it was not, and sending it again is
    /// harmless.
    pub(crate) async fn put(&self, number: u64, frames: Vec<Frame>) -> Result<(), Missed> {
        loop {
            let room = self.room.notified();
            {
                let mut inside = self.lock();
                if inside.is_over || inside.is_broken {
                    return Err(Missed::Over);
                }
                if number == inside.heard && number > 0 {
                    return Ok(());
                }
                if number != inside.heard + 1 {
                    self.lose(&mut inside);
                    return Err(Missed::Number);
                }
                if inside.inbox.is_empty() {
                    inside.heard = number;
                    if let Some(close @ Frame::Close(_)) = frames.last() {
                        // It is answered with its like (RFC 6455 §5.5.1).
                        inside.put(close);
                        self.news.notify_waiters();
                    }
                    inside.inbox.extend(frames);
                    if let Some(reader) = inside.reader.take() {
                        reader.wake();
                    }
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// The batch of this number for the peer, which thereby confirms the one
    /// before: what there is, as soon as there is something, or nothing when
    /// `enough` is ready.
    ///
    /// Cancel safe: what was given is given again to whoever asks for it.
    pub(crate) async fn take(
        &self,
        number: u64,
        enough: impl Future<Output = ()>,
    ) -> Result<Bytes, Missed> {
        let _asking = Asking::new(self);
        let mine = {
            let mut inside = self.lock();
            inside.asked += 1;
            self.news.notify_waiters();
            if number == inside.given.0 && number > 0 {
                return Ok(inside.given.1.clone());
            }
            if number != inside.given.0 + 1 {
                self.lose(&mut inside);
                return Err(Missed::Number);
            }
            inside.asked
        };
        let mut enough = std::pin::pin!(enough);
        let mut is_enough = false;
        loop {
            let news = self.news.notified();
            {
                let mut inside = self.lock();
                if inside.asked != mine {
                    return Err(Missed::Superseded);
                }
                if inside.frames > 0 || is_enough {
                    let batch = Bytes::from(std::mem::take(&mut inside.gathered));
                    inside.frames = 0;
                    inside.given = (number, batch.clone());
                    inside.wake();
                    return Ok(batch);
                }
                if inside.is_over || inside.is_broken {
                    return Err(Missed::Over);
                }
            }
            tokio::select! {
                () = news => {}
                () = &mut enough => is_enough = true,
            }
        }
    }
}

/// Somebody who waits for an answer, or is gone again.
struct Asking<'a>(&'a Desk);

impl<'a> Asking<'a> {
    fn new(desk: &'a Desk) -> Self {
        desk.lock().waiting += 1;
        Self(desk)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.lock();
        inside.waiting -= 1;
        // From now on its silence counts.
        if let Some(reader) = inside.reader.take() {
            reader.wake();
        }
    }
}

/// The link's own end.
#[derive(Debug)]
pub(crate) struct PollingLink {
    desk: Arc<Desk>,
    /// Ends when the peer, which had asked so often, has not done so for long.
    silence: Option<(u64, Pin<Box<Sleep>>)>,
}

impl PollingLink {
    pub(crate) fn new(desk: Arc<Desk>) -> Self {
        Self { desk, silence: None }
    }
}

fn lost() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl Stream for PollingLink {
    type Item = io::Result<Frame>;

    #[expect(clippy::disallowed_methods, reason = "a deadline of the shell, not a wait")]
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { desk, silence } = self.get_mut();
        let mut inside = desk.lock();
        if inside.is_broken {
            return Poll::Ready(Some(Err(lost())));
        }
        let Some(frame) = inside.inbox.pop_front() else {
            if inside.is_done() {
                return Poll::Ready(None);
            }
            silence.take_if(|(asked, _)| inside.waiting > 0 || *asked != inside.asked);
            if inside.waiting == 0 {
                let begin = || (inside.asked, Box::pin(sleep(SILENCE)));
                let (_, silence) = silence.get_or_insert_with(begin);
                if silence.as_mut().poll(cx).is_ready() {
                    desk.lose(&mut inside);
                    return Poll::Ready(Some(Err(lost())));
                }
            }
            inside.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        if inside.inbox.is_empty() {
            desk.room.notify_waiters();
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

impl Sink<Frame> for PollingLink {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inside = self.desk.lock();
        if inside.is_broken {
            return Poll::Ready(Err(lost()));
        }
        if inside.has_room() {
            return Poll::Ready(Ok(()));
        }
        inside.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    fn start_send(self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let mut inside = self.desk.lock();
        inside.put(&frame);
        Ok(())
    }

    /// What is here is as good as sent, since whoever asks gets it; but for the
    /// last words, which nobody may be there to ask for.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inside = self.desk.lock();
        if inside.frames > 0 {
            self.desk.news.notify_waiters();
        }
        if inside.said_close && !inside.is_done() && !inside.is_broken {
            inside.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

impl Drop for PollingLink {
    fn drop(&mut self) {
        self.desk.lock().is_over = true;
        self.desk.news.notify_waiters();
        self.desk.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
    use tokio::time::timeout;
    use trunkline_protocol::polling::read;

    use super::*;

    fn text(text: &'static str) -> Frame {
        Frame::Text(Bytes::from_static(text.as_bytes()))
    }

    fn frames(batch: Bytes) -> Vec<Frame> {
        read(batch, 1 << 20).unwrap()
    }

    #[tokio::test]
    async fn what_is_asked_for_again_is_the_same() {
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        link.send(text("one")).await.unwrap();
        link.send(text("two")).await.unwrap();
        let first = desk.take(1, pending()).await.unwrap();
        link.send(text("three")).await.unwrap();
        assert_eq!(desk.take(1, pending()).await.unwrap(), first, "its answer was lost");
        assert_eq!(frames(first), [text("one"), text("two")]);
        assert_eq!(frames(desk.take(2, pending()).await.unwrap()), [text("three")]);
        assert_eq!(desk.take(3, ready(())).await.unwrap(), Bytes::new(), "nothing, in time");
        assert_eq!(desk.take(1, ready(())).await, Err(Missed::Number), "that is confirmed");
        assert!(link.next().await.unwrap().is_err(), "and whoever asks so is lost");
    }

    #[tokio::test]
    async fn what_is_sent_again_is_taken_once() {
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        assert_eq!(desk.put(1, vec![text("one")]).await, Ok(()));
        assert_eq!(desk.put(1, vec![text("one")]).await, Ok(()), "its answer was lost");
        let mut next = Box::pin(desk.put(2, vec![text("two")]));
        assert_eq!(next.as_mut().now_or_never(), None, "nobody has read the first");
        let mut again = Box::pin(desk.put(2, vec![text("two")]));
        assert_eq!(again.as_mut().now_or_never(), None, "nor is it taken");
        assert_eq!(link.next().await.unwrap().unwrap(), text("one"));
        assert_eq!((next.await, again.await), (Ok(()), Ok(())));
        assert_eq!(link.next().await.unwrap().unwrap(), text("two"));
        assert!(link.next().now_or_never().is_none());
        assert_eq!(desk.put(4, vec![]).await, Err(Missed::Number));
        assert!(link.next().await.unwrap().is_err());
        assert_eq!(desk.put(3, vec![]).await, Err(Missed::Over));
    }

    #[tokio::test]
    async fn of_two_that_wait_the_later_is_answered() {
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        let mut one = Box::pin(desk.take(1, pending()));
        assert_eq!(one.as_mut().now_or_never(), None);
        let mut two = Box::pin(desk.take(1, pending()));
        assert_eq!(two.as_mut().now_or_never(), None);
        assert_eq!(one.await, Err(Missed::Superseded));
        link.send(text("one")).await.unwrap();
        assert_eq!(frames(two.await.unwrap()), [text("one")]);
    }

    #[tokio::test]
    async fn who_does_not_ask_holds_a_bounded_amount_and_gets_the_last_words() {
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        let big = Frame::Binary(vec![0; 100 * 1024].into());
        let mut sent = 0;
        while link.feed(big.clone()).now_or_never().is_some() {
            sent += 1;
            assert!(sent < 10);
        }
        assert_eq!(sent, 3);
        assert_eq!(frames(desk.take(1, pending()).await.unwrap()).len(), 3);
        link.send(text("last")).await.unwrap();
        drop(link);
        assert_eq!(frames(desk.take(2, pending()).await.unwrap()), [text("last")]);
        assert_eq!(desk.take(2, pending()).await.map(frames), Ok(vec![text("last")]));
        assert_eq!(desk.take(3, pending()).await, Err(Missed::Over));
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_no_more_is_lost_and_who_waits_is_not() {
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        // Waiting is no silence, however long it takes.
        let waits = timeout(SILENCE * 3, desk.take(1, pending()));
        let (waited, heard) = tokio::join!(waits, timeout(SILENCE * 3, link.next()));
        assert!(waited.is_err() && heard.is_err(), "{heard:?}");
        // Whoever asks again in time has asked.
        assert!(timeout(SILENCE * 9 / 10, link.next()).await.is_err());
        assert_eq!(desk.take(1, ready(())).await, Ok(Bytes::new()));
        assert!(timeout(SILENCE * 9 / 10, link.next()).await.is_err());
        assert!(timeout(SILENCE, link.next()).await.unwrap().unwrap().is_err());
        assert_eq!(desk.take(2, ready(())).await, Err(Missed::Over));
    }

    #[tokio::test]
    async fn a_close_is_answered_and_is_the_last() {
        let close = Frame::Close(trunkline_protocol::frame::Close::new(
            trunkline_protocol::close::CloseCode::Normal,
            "goodbye",
        ));
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        let put = desk.put(1, vec![text("one"), close.clone()]);
        let (put, ()) = tokio::join!(put, async {
            assert_eq!(link.next().await.unwrap().unwrap(), text("one"));
            assert_eq!(link.next().await.unwrap().unwrap(), close);
        });
        assert_eq!(put, Ok(()));
        assert!(link.next().now_or_never().is_none(), "it has not heard ours");
        link.feed(text("too late")).await.unwrap();
        assert_eq!(frames(desk.take(1, pending()).await.unwrap()), std::slice::from_ref(&close));
        assert!(link.next().await.is_none());

        // Ours is not said before it was fetched.
        let desk = Arc::new(Desk::default());
        let mut link = PollingLink::new(Arc::clone(&desk));
        let mut said = Box::pin(link.send(close.clone()));
        assert!(said.as_mut().now_or_never().is_none());
        assert_eq!(frames(desk.take(1, pending()).await.unwrap()), [close]);
        said.await.unwrap();
        assert!(link.next().await.is_none());
    }
}
