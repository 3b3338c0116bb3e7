//! Links inside one process: no bytes on a wire, the same frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Sink, Stream};
use tokio::sync::mpsc;
use trunkline_protocol::frame::Frame;

/// Frames under way in each direction.
const FRAMES: usize = 64;

/// One end of an in-memory link: a stream and a sink of frames. Dropping it is
/// losing the link.
#[derive(Debug)]
pub struct MemoryLink {
    out: Option<mpsc::Sender<Frame>>,
    reserving: Reserving,
    incoming: mpsc::Receiver<Frame>,
}

/// A place in the channel that is being waited for, or had.
enum Reserving {
    Nothing,
    Waiting(Pin<Box<dyn Future<Output = Option<mpsc::OwnedPermit<Frame>>> + Send>>),
    Ready(mpsc::OwnedPermit<Frame>),
}

impl std::fmt::Debug for Reserving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nothing => "Nothing",
            Self::Waiting(_) => "Waiting",
            Self::Ready(_) => "Ready",
        })
    }
}

/// Two ends of one link.
pub(crate) fn pair() -> (MemoryLink, MemoryLink) {
    let (a_out, b_in) = mpsc::channel(FRAMES);
    let (b_out, a_in) = mpsc::channel(FRAMES);
    let end =
        |out, incoming| MemoryLink { out: Some(out), reserving: Reserving::Nothing, incoming };
    (end(a_out, a_in), end(b_out, b_in))
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl Stream for MemoryLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

impl Sink<Frame> for MemoryLink {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.reserving {
                Reserving::Ready(_) => return Poll::Ready(Ok(())),
                Reserving::Waiting(place) => match place.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(permit)) => self.reserving = Reserving::Ready(permit),
                    Poll::Ready(None) => {
                        self.reserving = Reserving::Nothing;
                        self.out = None;
                        return Poll::Ready(Err(gone()));
                    }
                },
                Reserving::Nothing => {
                    let out = self.out.clone().ok_or_else(gone)?;
                    let place = async move { out.reserve_owned().await.ok() };
                    self.reserving = Reserving::Waiting(Box::pin(place));
                }
            }
        }
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        match std::mem::replace(&mut self.reserving, Reserving::Nothing) {
            Reserving::Ready(permit) => {
                permit.send(frame);
                Ok(())
            }
            Reserving::Nothing | Reserving::Waiting(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.reserving = Reserving::Nothing;
        self.out = None;
        Poll::Ready(Ok(()))
    }
}
