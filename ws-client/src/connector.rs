//! How a client gets a link.

use std::future::Future;
use std::io;
use std::pin::Pin;

use futures_util::{Sink, Stream};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::message::Secret;

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

/// Where tokens come from.
///
/// Asked before every attempt to connect. A source that can get a fresh one
/// does so when the last was refused, or is about to expire.
pub trait TokenSource: Send + Sync + 'static {
    /// A token. `refused` says that the hub did not accept the last one.
    ///
    /// # Errors
    ///
    /// Counts as a failed attempt: it is tried again later.
    fn token(&self, refused: bool) -> BoxFuture<'_, io::Result<Secret>>;
}

impl<F, Fut> TokenSource for F
where
    F: Fn(bool) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<Secret>> + Send + 'static,
{
    fn token(&self, refused: bool) -> BoxFuture<'_, io::Result<Secret>> {
        Box::pin(self(refused))
    }
}
