//! How a client gets a link.

use std::future::Future;
use std::io;
use std::pin::Pin;

use futures_util::{Sink, Stream};
use trunkline_protocol::frame::Frame;

/// A boxed future, so that hooks are object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A link: a stream and a sink of whole frames, in order.
///
/// The stream ends with a [`Frame::Close`], or without one when the link is
/// lost. Implemented by everything that has the right `Stream` and `Sink`.
pub trait FrameLink:
    Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Send + 'static
{
}

impl<T> FrameLink for T where
    T: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Send + 'static
{
}

/// Any link.
pub type BoxLink = Pin<Box<dyn FrameLink>>;

/// Makes links. Called for every attempt; the future is dropped when the
/// attempt is given up, which must leave nothing behind.
///
/// Implemented by [`WebSocket`](crate::WebSocket), and by every closure that
/// returns a future of a link: `|| async { Ok(hub.memory()) }`.
pub trait Connector: Send + Sync + 'static {
    /// Makes one link.
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>>;

    /// Whether others on the way can read what crosses its links. A client that
    /// is to send a token over such links warns of it once. `false` unless the
    /// connector knows better.
    fn is_exposed(&self) -> bool {
        false
    }
}

impl<F, Fut, L> Connector for F
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<L>> + Send + 'static,
    L: FrameLink,
{
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        let link = self();
        Box::pin(async move { Ok(Box::pin(link.await?) as BoxLink) })
    }
}
