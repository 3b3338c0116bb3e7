//! What a program writes, read from wherever it writes it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use pty_process::OwnedReadPty;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::process::{ChildStderr, ChildStdout};
use trunkline_protocol::message::Channel;

/// Bytes read at once, at most: what a pipe gives in one call at its default
/// size is 64 KiB, a terminal gives 4 KiB.
const BUFFER_BYTES: usize = 32 * 1024;

/// The outputs of one program and the one buffer they are read into.
pub(super) struct Sources {
    open: [Option<Source>; 2],
    /// Which one is looked at first, so that neither starves the other.
    first: usize,
    buffer: Box<[u8]>,
}

enum Source {
    Pty(OwnedReadPty),
    Stdout(ChildStdout),
    Stderr(ChildStderr),
}

impl Sources {
    pub(super) fn terminal(pty: OwnedReadPty) -> Self {
        Self::new([Some(Source::Pty(pty)), None])
    }

    pub(super) fn pipes(stdout: Option<ChildStdout>, stderr: Option<ChildStderr>) -> Self {
        Self::new([stdout.map(Source::Stdout), stderr.map(Source::Stderr)])
    }

    fn new(open: [Option<Source>; 2]) -> Self {
        Self { open, first: 0, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() }
    }

    /// Whether the end may be followed by more. A terminal ends when nobody
    /// has it open; the program may open it again as long as it lives.
    pub(super) fn may_open_again(&self) -> bool {
        matches!(self.open, [Some(Source::Pty(_)), _])
    }

    /// The next bytes, or `None` at the end. Dropping the future loses
    /// nothing.
    pub(super) async fn next(&mut self) -> Option<(Channel, &[u8])> {
        let (channel, len) = std::future::poll_fn(|cx| self.poll_next(cx)).await?;
        Some((channel, &self.buffer[..len]))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(Channel, usize)>> {
        let mut waiting = false;
        for at in [self.first, 1 - self.first] {
            let Some(source) = &mut self.open[at] else { continue };
            match source.poll_fill(cx, &mut self.buffer) {
                Poll::Ready(0) if matches!(source, Source::Pty(_)) => {}
                Poll::Ready(0) => self.open[at] = None,
                Poll::Ready(len) => {
                    let channel = source.channel();
                    self.first = 1 - at;
                    return Poll::Ready(Some((channel, len)));
                }
                Poll::Pending => waiting = true,
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(None) }
    }
}

impl Source {
    fn channel(&self) -> Channel {
        match self {
            Self::Pty(_) => Channel::Pty,
            Self::Stdout(_) => Channel::Stdout,
            Self::Stderr(_) => Channel::Stderr,
        }
    }

    /// Reads what is there now, up to the size of the buffer: one write
    /// onwards per flood instead of one per 4 KiB. `Ready(0)` is the end, and
    /// is said again when asked again.
    fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<usize> {
        let mut buffer = ReadBuf::new(buffer);
        loop {
            let before = buffer.filled().len();
            match self.poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().len() > before && buffer.remaining() > 0 => {
                }
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // An error is the end: Linux ends a terminal with EIO, and
                // nothing can be read after any other error either.
                Poll::Ready(_) | Poll::Pending => return Poll::Ready(buffer.filled().len()),
            }
        }
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Pty(pty) => Pin::new(pty).poll_read(cx, buffer),
            Self::Stdout(stdout) => Pin::new(stdout).poll_read(cx, buffer),
            Self::Stderr(stderr) => Pin::new(stderr).poll_read(cx, buffer),
        }
    }
}
