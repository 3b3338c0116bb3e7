//! The handle to a hub.

use std::future::ready;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Sink, Stream};
pub use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{HubInstance, TenantId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::Secret;

use crate::core::{Core, Setup, Stats};
use crate::hooks::{
    ANYONE, Anyone, Authenticator, CommandQueue, LogError, LogSink, MemoryQueue, Observer, Policy,
    QueueError, StreamLog, WholeTenant,
};
#[cfg(feature = "polling")]
use crate::shell::Polling;
use crate::shell::{Arriving, Hooks, Shared};
use crate::transport::{self, Door, MemoryLink, Origin};

/// A running hub. Cloning gives another handle to the same one; when the last
/// handle is dropped, every link is dropped without a word: see
/// [`drain`](Self::drain) for the polite way.
#[derive(Clone)]
pub struct Hub {
    pub(crate) shared: Arc<Shared>,
    limits: Arc<Limits>,
    door: Arc<Door>,
    _last: Arc<Last>,
}

/// Stops the hub when the last handle goes.
struct Last(Arc<Shared>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("links", &self.links()).finish_non_exhaustive()
    }
}

/// Why a hub did not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The queue cannot be loaded.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The stream log cannot be loaded.
    #[error(transparent)]
    StreamLog(#[from] LogError),
}

/// What a hub is made of.
pub struct HubBuilder {
    limits: Limits,
    policy: Arc<dyn Policy>,
    hooks: Hooks,
    door: Door,
}

impl std::fmt::Debug for HubBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubBuilder").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl HubBuilder {
    /// The bounds; [`Limits::default`] otherwise.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Who is let in; [`Anyone`] otherwise, which is for development and says
    /// so in the log.
    #[must_use]
    pub fn authenticator(mut self, authenticator: impl Authenticator) -> Self {
        self.hooks.authenticator = Arc::new(authenticator);
        self
    }

    /// What dashboards may do; everything in their own tenant
    /// ([`WholeTenant`]) otherwise.
    #[must_use]
    pub fn policy(mut self, policy: impl Policy) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// Where accepted commands are kept; in memory otherwise. An `Arc` of a
    /// queue can be given to the next hub, which then goes on with it.
    #[must_use]
    pub fn queue(mut self, queue: Arc<dyn CommandQueue>) -> Self {
        self.hooks.queue = queue;
        self
    }

    /// Where output is kept for the next hub; only in memory otherwise. Goes
    /// with a [`queue`](Self::queue) that survives, too.
    #[must_use]
    pub fn stream_log(mut self, log: Arc<dyn StreamLog>) -> Self {
        self.hooks.stream_log = Some(log);
        self
    }

    /// Where the log records go that agents and dashboards forward; without
    /// one, none are taken. [`TracingLogSink`](crate::TracingLogSink) puts them
    /// into the hub's own log.
    #[must_use]
    pub fn logs(mut self, sink: Arc<dyn LogSink>) -> Self {
        self.hooks.log_sink = Some(sink);
        self
    }

    /// Who hears what happens: who came, what was asked of whom, and what became
    /// of it. Nobody otherwise, beside the log.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.hooks.observer = Some(Arc::new(observer));
        self
    }

    /// Lets pages of this origin connect, beside those that the hub's own host
    /// serves. A browser says which page it is that connects; a page from
    /// anywhere else is refused with HTTP status 403. Programs are not asked.
    ///
    /// As long as [`Anyone`] is let in, the hub's own host is an address or
    /// `localhost`: any other name may be a stranger's that leads here for now
    /// (DNS rebinding), and has to be allowed.
    #[must_use]
    pub fn allow_origin(mut self, origin: Origin) -> Self {
        self.door.origins.push(origin);
        self
    }

    /// Believes the proxies in this network where they say, in
    /// `X-Forwarded-For`, that a link comes from: limits per address then count
    /// the last address that is not such a proxy's. Of others the header is not
    /// looked at.
    ///
    /// Without it all links of a proxy count as coming from its one address.
    #[must_use]
    pub fn trust_proxies(mut self, network: IpNet) -> Self {
        self.door.proxies.push(network);
        self
    }

    /// Takes a token from the URL, too: `?access_token=…` (RFC 6750 §2.3).
    ///
    /// Off unless switched on, and better left so: URLs stand in the logs of
    /// every proxy on the way and in the histories of browsers. A page can show
    /// its token as a subprotocol instead, as `trunkline.bearer.` and the token
    /// in base64url without padding beside `trunkline.v1`, or in its greeting.
    #[must_use]
    pub fn query_tokens(mut self, allowed: bool) -> Self {
        self.door.query_tokens = allowed;
        self
    }

    /// Loads the queue and the stream log, and starts the hub's timer on the
    /// present runtime.
    ///
    /// Cancel safe: nothing was started if it is dropped.
    ///
    /// # Errors
    ///
    /// When the queue or the stream log cannot be loaded. Nothing was changed
    /// then.
    ///
    /// # Panics
    ///
    /// When called outside a tokio runtime.
    #[expect(clippy::disallowed_methods, reason = "the shell is where randomness comes from")]
    pub async fn start(self) -> Result<Hub, StartError> {
        let stored = self.hooks.queue.load().await?;
        let streams = match &self.hooks.stream_log {
            Some(log) => Some(log.load().await?),
            None => None,
        };
        match self.hooks.authenticator.describe() {
            ANYONE => tracing::warn!(
                target: "trunkline::hub",
                "ANYONE MAY CONNECT as any agent or dashboard: the authenticator is `Anyone`, \
                 which is for development only"
            ),
            name => tracing::info!(target: "trunkline::hub", authenticator = name, "hub starts"),
        }
        if self.door.query_tokens {
            tracing::warn!(
                target: "trunkline::hub",
                "tokens are taken from URLs, which proxies write into their logs"
            );
        }
        let is_open_to_anyone = self.hooks.authenticator.describe() == ANYONE;
        let door = Arc::new(Door { is_open_to_anyone, ..self.door });
        let setup = Setup {
            limits: self.limits.clone(),
            policy: self.policy,
            hub: HubInstance::from_u128(rand::random()),
            epoch: self.hooks.queue.epoch(),
            seed: rand::random(),
            stored,
            streams,
        };
        let limits = Arc::new(self.limits);
        let shared = Shared::new(|now| Core::new(setup, now), self.hooks, &limits);
        tokio::spawn(Arc::clone(&shared).run_timer());
        #[cfg(feature = "metrics")]
        tokio::spawn(Arc::clone(&shared).run_metrics());
        if shared.watch.is_on() {
            let watched = Arc::clone(&shared);
            tokio::spawn(async move { watched.watch.run().await });
        }
        Ok(Hub { limits, door, _last: Arc::new(Last(Arc::clone(&shared))), shared })
    }
}

impl Hub {
    /// A hub with default limits, an in-memory queue, and [`Anyone`] let in.
    pub fn builder() -> HubBuilder {
        HubBuilder {
            limits: Limits::default(),
            policy: Arc::new(WholeTenant),
            hooks: Hooks {
                authenticator: Arc::new(Anyone),
                queue: Arc::new(MemoryQueue::new()),
                stream_log: None,
                log_sink: None,
                observer: None,
            },
            door: Door::default(),
        }
    }

    /// Serves WebSocket connections of `listener` until
    /// [`drain`](Self::drain).
    ///
    /// From the accepted connection to a successful greeting a peer has
    /// `greeting_timeout` in all. Connections beyond `links_max` are told to
    /// try later.
    ///
    /// Cancel safe: dropping the future stops accepting; links that are up go
    /// on.
    ///
    /// # Errors
    ///
    /// When the listener fails for good. Failures of single connections, and a
    /// passing lack of file descriptors, are logged and survived.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        self.serve_over(listener, |socket, _| ready(Ok(socket))).await
    }

    /// Serves WebSocket connections like [`serve`](Self::serve), over whatever
    /// `open` makes of an accepted connection, TLS above all:
    ///
    /// ```no_run
    /// # use trunkline_server::Hub;
    /// # // As tokio-rustls has it.
    /// # struct TlsAcceptor;
    /// # impl TlsAcceptor {
    /// #     fn accept<S>(&self, socket: S) -> impl Future<Output = std::io::Result<S>> + use<S> {
    /// #         std::future::ready(Ok(socket))
    /// #     }
    /// # }
    /// # async fn run(
    /// #     hub: Hub, listener: tokio::net::TcpListener, acceptor: TlsAcceptor,
    /// # ) -> std::io::Result<()> {
    /// // `acceptor` is a `tokio_rustls::TlsAcceptor`.
    /// hub.serve_over(listener, move |socket, _peer| acceptor.accept(socket)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// `open` gets the connection and its peer's address. What it returns runs on
    /// a task of that connection's own: one that takes long keeps nobody else
    /// waiting. It shares `greeting_timeout` with what follows, and is dropped when
    /// that is over or its peer is turned away. If it fails, the connection is
    /// closed and the error logged (level `DEBUG`).
    ///
    /// Cancel safe: dropping the future stops accepting; links that are up go
    /// on, and so do connections that are being opened.
    ///
    /// # Errors
    ///
    /// When the listener fails for good. Failures of single connections, and a
    /// passing lack of file descriptors, are logged and survived.
    pub async fn serve_over<F, Fut, S>(&self, listener: TcpListener, open: F) -> io::Result<()>
    where
        F: Fn(TcpStream, SocketAddr) -> Fut,
        Fut: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        loop {
            let ended = self.shared.ended.notified();
            if self.shared.is_draining() {
                return Ok(());
            }
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, peer)) => {
                        self.serve_socket(socket, peer.ip(), |socket| open(socket, peer));
                    }
                    Err(error) if is_passing(&error) => {
                        tracing::warn!(target: "trunkline::hub", %error, "accept failed");
                        // Out of descriptors, say: some may be free in a moment.
                        self.shared.pause(Duration::from_millis(50)).await;
                    }
                    Err(error) => return Err(error),
                },
                () = ended => {}
            }
        }
    }

    fn serve_socket<Fut, S>(
        &self,
        socket: TcpStream,
        peer: IpAddr,
        open: impl FnOnce(TcpStream) -> Fut,
    ) where
        Fut: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(arrival) = self.arrive(peer) else { return };
        // Small messages are gathered here, and must not wait in the kernel.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(target: "trunkline::hub", %error, "TCP_NODELAY not set");
        }
        tokio::spawn(arrival.serve(open(socket)));
    }

    /// Somebody has connected whose socket you have accepted yourself, from
    /// `peer`: what [`serve`](Self::serve) does for each, for those who wrap
    /// sockets before they are served, in TLS say. `None` once the hub has
    /// ended: drop the socket then.
    ///
    /// ```no_run
    /// # async fn wrap(socket: tokio::net::TcpStream) -> std::io::Result<tokio::net::TcpStream> {
    /// #     Ok(socket)
    /// # }
    /// # async fn example(hub: trunkline_server::Hub) -> std::io::Result<()> {
    /// let listener = tokio::net::TcpListener::bind("[::]:7070").await?;
    /// loop {
    ///     let (socket, peer) = listener.accept().await?;
    ///     let Some(arrival) = hub.arrive(peer.ip()) else { return Ok(()) };
    ///     socket.set_nodelay(true)?;
    ///     tokio::spawn(arrival.serve(wrap(socket)));
    /// }
    /// # }
    /// ```
    pub fn arrive(&self, peer: IpAddr) -> Option<Arrival> {
        let is_passed_on = self.door.is_proxy(peer);
        let address = (!is_passed_on).then_some(peer);
        let arriving = Arriving::new(&self.shared, address)?;
        let (limits, door) = (Arc::clone(&self.limits), Arc::clone(&self.door));
        Some(Arrival { arriving, limits, door, peer, is_passed_on })
    }

    /// Answers a request that your own HTTP server has read, over a connection
    /// from `peer`: a WebSocket's handshake, or one of a link that polls. Feature
    /// `polling`. With axum, [`router`](Self::router) does it for you.
    ///
    /// What it is asked for is not looked at: give it whatever path you like, and
    /// all methods. `peer` is who has connected to you, as for
    /// [`arrive`](Self::arrive): limits go by it, and it says whether
    /// `X-Forwarded-For` is believed.
    ///
    /// A WebSocket takes the connection over, by the
    /// [`OnUpgrade`](hyper::upgrade::OnUpgrade) that `hyper` puts into the
    /// extensions of a request in HTTP/1.1. Serve connections `with_upgrades`, or it
    /// is taken over by nobody. A request without one, such as one in HTTP/2, is
    /// refused (400): its client polls.
    ///
    /// What comes before the request is your server's business: how many
    /// connections it takes, how long a head may be and how slow. `TCP_NODELAY`
    /// on its sockets spares a link up to 40 ms for a small message.
    ///
    /// Cancel safe: what was taken from the peer is taken, and what was not given
    /// to it is given again.
    ///
    /// ```no_run
    /// use http_body_util::Full;
    /// use hyper::service::service_fn;
    /// use hyper_util::rt::TokioIo;
    ///
    /// # async fn example(hub: trunkline_server::Hub) -> Result<(), Box<dyn std::error::Error>> {
    /// let listener = tokio::net::TcpListener::bind("[::]:7070").await?;
    /// loop {
    ///     let (socket, peer) = listener.accept().await?;
    ///     socket.set_nodelay(true)?;
    ///     let hub = hub.clone();
    ///     let service = service_fn(move |request| {
    ///         let hub = hub.clone();
    ///         async move {
    ///             let answer = hub.answer(request, peer.ip()).await;
    ///             Ok::<_, std::convert::Infallible>(answer.map(Full::new))
    ///         }
    ///     });
    ///     let server = hyper::server::conn::http1::Builder::new();
    ///     let connection = server.serve_connection(TokioIo::new(socket), service);
    ///     tokio::spawn(connection.with_upgrades());
    /// }
    /// # }
    /// ```
    #[cfg(feature = "polling")]
    pub async fn answer<B>(
        &self,
        request: hyper::Request<B>,
        peer: IpAddr,
    ) -> hyper::Response<bytes::Bytes>
    where
        B: hyper::body::Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let shared = Arc::clone(&self.shared);
        let (limits, door) = (Arc::clone(&self.limits), Arc::clone(&self.door));
        Polling { shared, limits, door }.answer(request, peer).await
    }

    /// The hub as a part of an axum application, whose listener, TLS and
    /// middleware it then shares: `nest` it where links are to come. Feature
    /// `axum`.
    ///
    /// It wants to know who connects: serve the application
    /// [with connect info](axum::Router::into_make_service_with_connect_info) of a
    /// [`SocketAddr`](std::net::SocketAddr), or it answers with 500 and says so.
    /// See [`answer`](Self::answer) for what else is your server's business.
    ///
    /// Middleware that compresses bodies or gives a request a time to be answered
    /// in is better not put around it: a WebSocket does not notice, links
    /// that poll wait for up to `poll_hold`.
    ///
    /// ```no_run
    /// use std::net::SocketAddr;
    ///
    /// use axum::serve::ListenerExt as _;
    /// use axum::{Router, routing::get};
    ///
    /// # async fn serve(hub: trunkline_server::Hub) -> std::io::Result<()> {
    /// let app = Router::new()
    ///     .route("/", get(|| async { "an application, with a hub at /hub" }))
    ///     .nest("/hub", hub.router())
    ///     .into_make_service_with_connect_info::<SocketAddr>();
    /// let listener = tokio::net::TcpListener::bind("[::]:7070").await?.tap_io(|socket| {
    ///     let _ = socket.set_nodelay(true);
    /// });
    /// axum::serve(listener, app).await
    /// # }
    /// ```
    #[cfg(feature = "axum")]
    pub fn router<S>(&self) -> axum::Router<S>
    where
        S: Clone + Send + Sync + 'static,
    {
        crate::shell::router(self.clone())
    }

    /// Attaches a transport of your own: a stream and a sink of whole frames.
    /// `token` is what its handshake carried, if anything. The link lives on a
    /// task of its own until either side closes it; a hub that is gone drops
    /// the transport.
    pub fn attach<T>(&self, transport: T, token: Option<Secret>)
    where
        T: Stream<Item = io::Result<Frame>>
            + Sink<Frame, Error = io::Error>
            + Send
            + Unpin
            + 'static,
    {
        if let Some(arriving) = Arriving::new(&self.shared, None) {
            tokio::spawn(arriving.run(transport, token));
        }
    }

    /// Opens an in-memory link to this hub and returns the peer's end, which
    /// the client's `connector` takes.
    pub fn memory(&self) -> MemoryLink {
        let (ours, theirs) = transport::pair();
        self.attach(ours, None);
        theirs
    }

    /// What the hub holds now, and what it has counted. Takes time in proportion
    /// to the number of links, about half a millisecond for 10,000: ask every few
    /// seconds, not for each message.
    ///
    /// With feature `metrics` the same figures, and lengths of time, go to the
    /// `metrics` facade every five seconds, under the names of `docs/watching.md`.
    /// That is for one hub in a process: several would write over each other.
    pub fn stats(&self) -> Stats {
        self.shared.input(|core, now| core.stats(now))
    }

    /// Links that are up, greeted or not.
    pub fn links(&self) -> usize {
        self.shared.links()
    }

    /// Ends all links of a subject at once, its agents' and its dashboards';
    /// how many those were. What is being authenticated of it meanwhile is
    /// refused, too. Peers are told to come back with a new token (4401):
    /// whether one will do is for your [`Authenticator`] to say, which must know
    /// by then that the old ones will not.
    ///
    /// Commands that its agents run go on there.
    pub fn revoke(&self, tenant: &TenantId, subject: &str) -> usize {
        self.shared.input(|core, now| core.handle_revoked(tenant, subject, now))
    }

    /// Ends the hub in order: nothing new is taken, what waits for each link
    /// goes out, and every peer is told to be back at a time of its own within
    /// `spread`, so that a fleet does not return all at once. Returns when all
    /// links have ended, after `close_timeout` twice over at the latest.
    ///
    /// Queued commands stay in the queue; running ones go on at their agents.
    ///
    /// Cancel safe: the closing goes on.
    pub async fn drain(&self, spread: Duration) {
        self.shared.input(|core, now| core.handle_drain(spread, now));
        self.shared.ended.notify_waiters();
        let all_ended = async {
            loop {
                let ended = self.shared.ended.notified();
                if self.links() == 0 {
                    return;
                }
                ended.await;
            }
        };
        let limit = self.limits.close_timeout * 2 + Duration::from_millis(500);
        if tokio::time::timeout(limit, all_ended).await.is_err() {
            tracing::warn!(target: "trunkline::hub", links = self.links(), "closed without their leave");
        }
        let observed = self.shared.watch.flushed();
        if tokio::time::timeout(self.limits.close_timeout, observed).await.is_err() {
            tracing::warn!(target: "trunkline::hub", "the observer has not heard everything");
        }
        #[cfg(feature = "metrics")]
        self.shared.publish_metrics();
        self.shared.stop();
    }
}

/// Somebody who has connected: has a place among the hub's links, and
/// `greeting_timeout` from now until a greeting is accepted. Dropping it gives
/// the place back.
pub struct Arrival {
    arriving: Arriving,
    limits: Arc<Limits>,
    door: Arc<Door>,
    peer: IpAddr,
    is_passed_on: bool,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").finish_non_exhaustive()
    }
}

impl Arrival {
    /// Serves a WebSocket over `socket`, from its handshake to the end of the
    /// link. `socket` may take its time, in a TLS handshake say: that is part
    /// of the greeting's.
    ///
    /// Who is turned away, because there are too many links or because the
    /// time is over, is told so in HTTP if `socket` is there already; otherwise
    /// the future is dropped.
    ///
    /// Cancel safe: dropping it drops the link.
    pub async fn serve<S>(self, socket: impl Future<Output = io::Result<S>>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { arriving, limits, door, peer, is_passed_on } = self;
        arriving.serve(socket, &limits, &door, peer, is_passed_on).await;
    }
}

/// Whether accepting may succeed a moment later.
fn is_passing(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
            | io::ErrorKind::OutOfMemory
    ) || matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}
