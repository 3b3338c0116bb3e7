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
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use tracing::Instrument as _;
use trunkline_protocol::frame::Frame;

use super::Shared;
use super::wake_up::WakeUp;
use crate::core::LinkId;
use crate::transport::{Greeted, Violation};

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

/// A place among the hub's links; given back however its task ends.
pub(super) struct Registered {
    pub(super) shared: Arc<Shared>,
    pub(super) id: LinkId,
    is_released: bool,
}

impl Registered {
    pub(super) fn new(shared: &Arc<Shared>, id: LinkId) -> Self {
        Self { shared: Arc::clone(shared), id, is_released: false }
    }

    fn release(&mut self) {
        if !std::mem::replace(&mut self.is_released, true) {
            self.shared.release(self.id);
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.release();
    }
}

#[expect(clippy::struct_excessive_bools, reason = "each is about another thing")]
pub(super) struct LinkTask<T> {
    shared: Arc<Shared>,
    id: LinkId,
    registered: Registered,
    wake: Arc<WakeUp>,
    transport: T,
    /// To be told when the peer has greeted.
    greeted: Option<Greeted>,
    inbox: Vec<Frame>,
    outbox: VecDeque<Frame>,
    pulled: Vec<Frame>,
    /// The core may have more than what was pulled.
    more: bool,
    unflushed: bool,
    /// Whether what the peer says can still be understood.
    reading: bool,
    /// The close was handed to the transport.
    said_close: bool,
}

/// How the busy part of a link's life ended.
enum Over {
    /// The peer is gone.
    Lost,
    /// The peer has closed: it gets its close back.
    Goodbye,
    /// The hub closes: some last words, then the end.
    Closing,
}

impl<T: Transport> LinkTask<T> {
    pub(super) fn new(registered: Registered, wake: Arc<WakeUp>, transport: T) -> Self {
        Self {
            shared: Arc::clone(&registered.shared),
            id: registered.id,
            registered,
            wake,
            transport,
            greeted: None,
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            pulled: Vec::new(),
            more: false,
            unflushed: false,
            reading: true,
            said_close: false,
        }
    }

    /// Which link it is.
    #[cfg(feature = "polling")]
    pub(super) fn id(&self) -> LinkId {
        self.id
    }

    /// Says when the peer has greeted.
    pub(super) fn saying_when_greeted(self, greeted: Greeted) -> Self {
        Self { greeted: Some(greeted), ..self }
    }

    /// The link's life.
    pub(super) fn run(self) -> impl Future<Output = ()> {
        let span = tracing::debug_span!(target: "trunkline::hub", "link", link = self.id.0);
        self.live().instrument(span)
    }

    async fn live(mut self) {
        let over = std::future::poll_fn(|cx| self.poll(cx)).await;
        let limit = self.shared.close_timeout;
        // Whether the last words arrive is up to the peer, within that time.
        match over {
            Over::Lost => {}
            Over::Goodbye => {
                // For the hub it is gone now.
                self.registered.release();
                let _ = tokio::time::timeout(limit, self.part()).await;
            }
            Over::Closing => {
                let _ = tokio::time::timeout(limit, self.last_words()).await;
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Over> {
        loop {
            let more_to_read = match self.poll_read(cx) {
                Ok(more) => more,
                Err(over) => return Poll::Ready(over),
            };
            let woken = self.wake.poll(cx);
            self.more |= woken;
            if self.wake.is_stopped() {
                return Poll::Ready(Over::Lost);
            }
            // Before it hears so itself.
            let id = self.id;
            if woken
                && let Some(greeted) =
                    self.greeted.take_if(|_| self.shared.input(|core, _| core.is_greeted(id)))
            {
                greeted.store(true, Ordering::Release);
            }
            match self.poll_write(cx) {
                Err(_) => return Poll::Ready(Over::Lost),
                Ok(Wrote::Close) => return Poll::Ready(Over::Closing),
                // The close stands behind what the peer does not take.
                Ok(Wrote::All) if woken && !self.outbox.is_empty() && self.is_closing() => {
                    return Poll::Ready(Over::Closing);
                }
                Ok(Wrote::Round) => {}
                Ok(Wrote::All) if more_to_read => {}
                Ok(Wrote::All) => return Poll::Pending,
            }
        }
    }

    /// Takes what has arrived and gives it to the core, under one lock.
    /// Returns whether there may be more.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, Over> {
        let mut violation = None;
        let mut over = None;
        let mut more = false;
        while self.reading {
            if self.inbox.len() >= INBOX_FRAMES {
                more = true;
                break;
            }
            match self.transport.poll_next_unpin(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(Frame::Close(_)))) => {
                    over = Some(Over::Goodbye);
                    break;
                }
                Poll::Ready(Some(Ok(frame))) => self.inbox.push(frame),
                Poll::Ready(Some(Err(error))) => {
                    violation = Violation::of(&error);
                    if violation.is_none() {
                        over = Some(Over::Lost);
                    }
                    self.reading = false;
                }
                Poll::Ready(None) => {
                    over = Some(Over::Lost);
                    break;
                }
            }
        }
        if !self.inbox.is_empty() || violation.is_some() {
            let id = self.id;
            let inbox = &mut self.inbox;
            self.shared.input(|core, now| {
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
        over.map_or(Ok(more), Err)
    }

    fn is_closing(&self) -> bool {
        self.shared.input(|core, _| core.is_closing(self.id))
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
                    self.said_close = true;
                    return Ok(Wrote::Close);
                }
            }
            if !self.more {
                break;
            }
            let id = self.id;
            let pulled = &mut self.pulled;
            self.more = self.shared.input(|core, now| core.transmit(id, now, pulled, OUTBOX_BYTES));
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

    /// Gets the close out, behind all that waits, and hears the peer's.
    async fn last_words(&mut self) {
        let said = std::future::poll_fn(|cx| {
            while !self.said_close {
                match self.poll_write(cx) {
                    Ok(Wrote::Close | Wrote::Round) => {}
                    Ok(Wrote::All) => return Poll::Pending,
                    Err(_) => return Poll::Ready(false),
                }
            }
            Poll::Ready(true)
        });
        if !said.await || self.transport.flush().await.is_err() {
            return;
        }
        while self.reading {
            match self.transport.next().await {
                // It may have said more before it read the close.
                Some(Ok(Frame::Text(_) | Frame::Binary(_))) => {}
                Some(Ok(Frame::Close(_)) | Err(_)) => break,
                None => return,
            }
        }
        self.part().await;
    }

    /// Ends our direction and waits for the peer to end its own.
    async fn part(&mut self) {
        if self.transport.close().await.is_ok() {
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
