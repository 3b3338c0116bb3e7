//! A socket that counts: what a message may take in bytes and in time, below
//! the WebSocket library, which bounds the size of messages but neither the
//! number of their fragments nor how long they take.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use trunkline_protocol::close::CloseCode;

use super::Violation;

/// Bytes read since the last whole message, and how many may be.
#[derive(Debug)]
pub(super) struct Meter {
    read: AtomicUsize,
    max: usize,
}

impl Meter {
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { read: AtomicUsize::new(0), max })
    }

    /// A whole message was taken out.
    pub(super) fn reset(&self) {
        self.read.store(0, Ordering::Relaxed);
    }

    /// Whether a message is under way.
    pub(super) fn is_inside(&self) -> bool {
        self.read.load(Ordering::Relaxed) > 0
    }
}

/// A socket under a [`Meter`].
pub(super) struct Guarded<S> {
    pub(super) socket: S,
    pub(super) meter: Arc<Meter>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.meter.read.load(Ordering::Relaxed) > self.meter.max {
            let violation = Violation::new(CloseCode::TooBig, "a message takes too many bytes");
            return Poll::Ready(Err(violation.into_error()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        let bytes = buf.filled().len() - before;
        self.meter.read.fetch_add(bytes, Ordering::Relaxed);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
