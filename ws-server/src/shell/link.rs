//! One task per link: frames from the transport to the core, and back.
//!
//! Finished work first, then flush, then new work: the task reads what has
//! arrived, writes what the core has for this link, all of it with one flush,
//! and sleeps when neither side has more. Reading goes on while the peer does
//! not take what is written.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use futures_util::{Sink, Stream, StreamExt as _};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::message::Secret;

use super::Shared;
use crate::core::LinkId;
use crate::transport::Violation;

/// What a link runs on: frames, whole and in order.
pub(crate) trait Transport:
    Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Send + Unpin + 'static
{
}

impl<T> Transport for T where
    T: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Send + Unpin + 'static
{
}

/// Frames taken from the transport before the core is locked.
const INBOX_FRAMES: usize = 64;

/// Bulk asked from the core at a time.
const OUTBOX_BYTES: usize = 64 * 1024;

/// Times the core is asked before the transport is flushed.
const ROUNDS: usize = 4;

/// Tells a link's task that the core has something for it.
#[derive(Default)]
pub(super) struct WakeUp {
    pending: AtomicBool,
    stopped: AtomicBool,
    waker: AtomicWaker,
}

impl WakeUp {
    pub(super) fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Ends the link, without a word.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether it was woken since the last look; if not, it will be later.
    fn poll(&self, cx: &Context<'_>) -> bool {
        if self.pending.swap(false, Ordering::AcqRel) {
            return true;
        }
        self.waker.register(cx.waker());
        // It may have been woken before the waker was registered.
        self.pending.swap(false, Ordering::AcqRel)
    }
}

/// Lets go of the link however its task ends.
struct Registered {
    shared: Arc<Shared>,
    id: LinkId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.release(self.id);
    }
}

struct LinkTask<T> {
    registered: Registered,
    wake: Arc<WakeUp>,
    transport: T,
    inbox: Vec<Frame>,
    outbox: VecDeque<Frame>,
    pulled: Vec<Frame>,
    /// The core may have more than what was pulled.
    more: bool,
    unflushed: bool,
    reading: bool,
}

/// How the busy part of a link's life ended.
enum Over {
    /// The peer is gone.
    Lost,
    /// The close is in the outbox: some last words, then the end.
    Closing,
}

/// Registers a link and returns its life, to be spawned.
pub(crate) fn run_link<T: Transport>(
    shared: &Arc<Shared>,
    transport: T,
    token: Option<Secret>,
    waited: std::time::Duration,
) -> Option<impl Future<Output = ()> + Send + use<T>> {
    let (id, wake) = shared.register()?;
    let registered = Registered { shared: Arc::clone(shared), id };
    shared.input(|core, now| core.handle_opened(id, token, waited, now));
    let mut task = LinkTask {
        registered,
        wake,
        transport,
        inbox: Vec::new(),
        outbox: VecDeque::new(),
        pulled: Vec::new(),
        more: false,
        unflushed: false,
        reading: true,
    };
    Some(async move {
        let over = std::future::poll_fn(|cx| task.poll(cx)).await;
        if let Over::Closing = over {
            let limit = task.registered.shared.close_timeout;
            // Whether the last words arrive is up to the peer.
            let _ = tokio::time::timeout(limit, task.last_words()).await;
        }
    })
}

impl<T: Transport> LinkTask<T> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Over> {
        loop {
            let Ok(more_to_read) = self.poll_read(cx) else { return Poll::Ready(Over::Lost) };
            if self.wake.poll(cx) {
                self.more = true;
            }
            if self.wake.stopped.load(Ordering::Acquire) {
                return Poll::Ready(Over::Lost);
            }
            match self.poll_write(cx) {
                Err(_) => return Poll::Ready(Over::Lost),
                Ok(Wrote::Close) => return Poll::Ready(Over::Closing),
                Ok(Wrote::Round) => {}
                Ok(Wrote::All) if more_to_read => {}
                Ok(Wrote::All) => return Poll::Pending,
            }
        }
    }

    /// Takes what has arrived and gives it to the core, under one lock.
    /// Returns whether there may be more.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut violation = None;
        let mut lost = None;
        let mut more = false;
        while self.reading {
            if self.inbox.len() >= INBOX_FRAMES {
                more = true;
                break;
            }
            match self.transport.poll_next_unpin(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(Frame::Close(_))) | None) => {
                    lost = Some(io::ErrorKind::UnexpectedEof.into());
                    break;
                }
                Poll::Ready(Some(Ok(frame))) => self.inbox.push(frame),
                Poll::Ready(Some(Err(error))) => {
                    match Violation::of(&error) {
                        Some(close) => violation = Some(close),
                        None => lost = Some(error),
                    }
                    self.reading = false;
                }
            }
        }
        if !self.inbox.is_empty() || violation.is_some() {
            let id = self.registered.id;
            let inbox = &mut self.inbox;
            self.registered.shared.input(|core, now| {
                for frame in inbox.drain(..) {
                    core.handle_frame(id, &frame, now);
                }
                if let Some(close) = violation {
                    core.handle_violation(id, close, now);
                }
            });
            // An idle link keeps no buffer.
            self.inbox = Vec::new();
        }
        lost.map_or(Ok(more), Err)
    }

    /// Writes what the core has, all with one flush.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<Wrote> {
        let mut transport = Pin::new(&mut self.transport);
        for _ in 0..ROUNDS {
            while !self.outbox.is_empty() {
                if transport.as_mut().poll_ready(cx)?.is_pending() {
                    return Ok(Wrote::All);
                }
                let Some(frame) = self.outbox.pop_front() else { break };
                let last = matches!(frame, Frame::Close(_));
                transport.as_mut().start_send(frame)?;
                self.unflushed = true;
                if last {
                    return Ok(Wrote::Close);
                }
            }
            if !self.more {
                break;
            }
            let id = self.registered.id;
            let pulled = &mut self.pulled;
            self.registered.shared.input(|core, now| core.transmit(id, now, pulled, OUTBOX_BYTES));
            self.more = !self.pulled.is_empty();
            self.outbox.extend(self.pulled.drain(..));
        }
        if self.unflushed && transport.as_mut().poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        if !self.more && self.outbox.is_empty() {
            // An idle link keeps no buffers.
            self.outbox = VecDeque::new();
            self.pulled = Vec::new();
        }
        Ok(if self.more { Wrote::Round } else { Wrote::All })
    }

    /// Gets the close out and waits for the peer's.
    async fn last_words(&mut self) {
        if futures_util::SinkExt::<Frame>::flush(&mut self.transport).await.is_ok() {
            while let Some(Ok(_)) = self.transport.next().await {}
        }
    }
}

/// How far writing has got.
enum Wrote {
    /// All there is, or all that the peer takes now.
    All,
    /// A round; there is more.
    Round,
    /// The close.
    Close,
}
