//! From a connection that was accepted to a link: one deadline, and one place
//! for each, whatever they consist of.

use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use tokio::io::{AsyncRead, AsyncWrite};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::Secret;

use super::link::{LinkTask, Registered, Transport};
#[cfg(feature = "polling")]
use super::polling::Polling;
use super::{Shared, WakeUp};
use crate::core::LinkId;
#[cfg(feature = "polling")]
use crate::transport::PollingLink;
use crate::transport::{self, Door, Greeted, Heard, Refused};

/// What becomes of a connection.
enum Shaken {
    /// A WebSocket.
    Open,
    /// Requests in HTTP, of which this was read.
    #[cfg(feature = "polling")]
    Plain(Vec<u8>),
}

/// Somebody has connected: a place among the hub's links, and
/// `greeting_timeout` from now until a greeting is accepted. Dropping it gives
/// the place back.
pub(crate) struct Arriving {
    registered: Registered,
    wake: Arc<WakeUp>,
}

impl Arriving {
    /// Takes a place; `None` once the hub was dropped. The link may be turned
    /// away already.
    pub(crate) fn new(shared: &Arc<Shared>, address: Option<IpAddr>) -> Option<Self> {
        let (id, wake) = shared.register()?;
        let registered = Registered::new(shared, id);
        shared.input(|core, now| core.handle_arrived(id, address, now));
        Some(Self { registered, wake })
    }

    fn id(&self) -> LinkId {
        self.registered.id
    }

    /// The close that the core has for it.
    fn poll_turned_away(&self, cx: &Context<'_>) -> Poll<Option<Close>> {
        if self.wake.poll(cx) {
            let mut frames = Vec::new();
            let id = self.id();
            self.registered.shared.input(|core, now| core.transmit(id, now, &mut frames, 0));
            if let Some(Frame::Close(close)) = frames.pop() {
                return Poll::Ready(Some(close));
            }
        }
        // A hub that stops has nothing to say.
        if self.wake.is_stopped() { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Does something for as long as the link is not turned away.
    async fn unless_turned_away<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, Option<Close>> {
        let mut work = std::pin::pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(close) = self.poll_turned_away(cx) {
                return Poll::Ready(Err(close));
            }
            work.as_mut().poll(cx).map(Ok)
        })
        .await
    }

    /// The handshake was all right. `token` and `address` are what it said.
    pub(super) fn open(&self, token: Option<Secret>, address: Option<IpAddr>) {
        let id = self.id();
        self.registered.shared.input(|core, now| core.handle_opened(id, token, address, now));
    }

    /// Runs the link on a transport without a handshake of its own. Returns
    /// its life, to be spawned.
    pub(crate) fn run<T: Transport>(
        self,
        transport: T,
        token: Option<Secret>,
    ) -> impl Future<Output = ()> + Send {
        self.open(token, None);
        LinkTask::new(self.registered, self.wake, transport).run()
    }

    /// The close that the core has for it already, if any.
    #[cfg(feature = "polling")]
    pub(super) fn turned_away(&self) -> Option<Close> {
        let waker = std::task::Waker::noop();
        match self.poll_turned_away(&Context::from_waker(waker)) {
            Poll::Ready(close) => {
                Some(close.unwrap_or_else(|| Close::restart(std::time::Duration::ZERO)))
            }
            Poll::Pending => None,
        }
    }

    /// The life of the link over requests in HTTP.
    #[cfg(feature = "polling")]
    pub(super) fn polled(self, link: PollingLink, token: Option<Secret>) -> LinkTask<PollingLink> {
        self.open(token, None);
        LinkTask::new(self.registered, self.wake, link)
    }

    /// Gives the place back: this connection is none of a link's, and nothing is
    /// held against it.
    #[cfg(feature = "polling")]
    fn withdraw(self) {
        let id = self.id();
        self.registered.shared.input(|core, now| core.handle_withdrawn(id, now));
    }

    /// Runs the link on a WebSocket, from its handshake to its end. `socket`
    /// is what bytes come over, once it is there; `is_passed_on` whether it
    /// comes from somebody who is believed about where it came from before.
    pub(crate) async fn serve<S>(
        self,
        socket: impl Future<Output = io::Result<S>>,
        limits: &Arc<Limits>,
        door: &Arc<Door>,
        peer: IpAddr,
        is_passed_on: bool,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let id = self.id();
        #[cfg(not(feature = "polling"))]
        let _ = peer;
        // Over one that is there already it can be said why there is no link.
        let mut socket = std::pin::pin!(socket);
        let socket = match socket.as_mut().now_or_never() {
            Some(done) => Ok(done),
            None => self.unless_turned_away(socket).await,
        };
        let mut socket = match socket {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                tracing::debug!(target: "trunkline::hub", link = id.0, %error, "connection failed");
                return;
            }
            Err(_) => return, // there is nothing to say it over
        };
        match self.shake(&mut socket, door, is_passed_on).await {
            Ok(Ok(Shaken::Open)) => self.live(socket, limits).await,
            #[cfg(feature = "polling")]
            Ok(Ok(Shaken::Plain(begun))) => {
                let shared = Arc::clone(&self.registered.shared);
                self.withdraw();
                let (limits, door) = (Arc::clone(limits), Arc::clone(door));
                let polling = Polling { shared, limits, door };
                polling.serve(socket, begun, peer).await;
            }
            Ok(Err(refused)) => {
                tracing::debug!(target: "trunkline::hub", link = id.0, why = refused.why, "handshake refused");
                self.refuse(&mut socket, &refused).await;
            }
            Err(error) => {
                tracing::debug!(target: "trunkline::hub", link = id.0, %error, "handshake failed");
            }
        }
    }

    /// The life of the link on a WebSocket whose handshake is over.
    async fn live<S>(self, socket: S, limits: &Limits)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let greeted = Greeted::default();
        let transport = transport::link(socket, limits, Arc::clone(&greeted)).await;
        let task = LinkTask::new(self.registered, self.wake, transport);
        task.saying_when_greeted(greeted).run().await;
    }

    /// The same, on what a connection becomes once a handshake on it is answered
    /// that somebody else's server has read.
    #[cfg(feature = "polling")]
    pub(super) async fn upgraded<S>(
        self,
        socket: impl Future<Output = io::Result<S>>,
        limits: &Limits,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.unless_turned_away(socket).await {
            Ok(Ok(socket)) => self.live(socket, limits).await,
            Ok(Err(error)) => {
                let link = self.id().0;
                tracing::debug!(target: "trunkline::hub", link, %error, "handshake failed");
            }
            Err(_) => {} // there is nothing to say it over
        }
    }

    async fn shake<S>(
        &self,
        socket: &mut S,
        door: &Door,
        is_passed_on: bool,
    ) -> io::Result<Result<Shaken, Refused>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let turned_away = |close: Option<Close>| match close {
            Some(close) => Ok(Err(Refused::closed(&close))),
            None => Err(io::ErrorKind::ConnectionAborted.into()),
        };
        let request = match self.unless_turned_away(transport::read(socket, door)).await {
            Ok(read) => match read? {
                Ok(Heard::Handshake(request)) => request,
                #[cfg(feature = "polling")]
                Ok(Heard::Plain(begun)) => return Ok(Ok(Shaken::Plain(begun))),
                Err(refused) => return Ok(Err(refused)),
            },
            Err(close) => return turned_away(close),
        };
        let address = request.forwarded_for.filter(|_| is_passed_on);
        self.open(request.token.clone(), address);
        match self.unless_turned_away(request.accept(socket)).await {
            Ok(accepted) => accepted.map(|()| Ok(Shaken::Open)),
            Err(close) => turned_away(close),
        }
    }

    /// Says why there is no link, if that can be said in time and there is
    /// room for who is told.
    async fn refuse<S>(self, socket: &mut S, refused: &Refused)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let shared = Arc::clone(&self.registered.shared);
        // For the hub it is gone now: who is refused takes nobody's place.
        drop(self);
        let Ok(_room) = shared.farewells.try_acquire() else { return };
        let refusing = transport::refuse(socket, refused);
        let _ = tokio::time::timeout(shared.close_timeout, refusing).await;
    }
}
