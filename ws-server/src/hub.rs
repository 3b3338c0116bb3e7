//! The handle to a hub.

use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::HubInstance;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::Secret;

use crate::core::{Core, Setup};
use crate::hooks::{
    Anyone, Authenticator, CommandQueue, LogError, LogSink, MemoryQueue, Policy, QueueError,
    StreamLog, WholeTenant,
};
use crate::shell::{Shared, run_link};
use crate::transport::{self, MemoryLink};

/// A running hub. Cloning gives another handle to the same one; when the last
/// handle is dropped, every link is dropped without a word: see
/// [`shutdown`](Self::shutdown) for the polite way.
#[derive(Clone)]
pub struct Hub {
    pub(crate) shared: Arc<Shared>,
    limits: Arc<Limits>,
    /// Connections in their handshake or beyond.
    sockets: Arc<Semaphore>,
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
    authenticator: Arc<dyn Authenticator>,
    policy: Arc<dyn Policy>,
    queue: Arc<dyn CommandQueue>,
    stream_log: Option<Arc<dyn StreamLog>>,
    log_sink: Option<Arc<dyn LogSink>>,
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
        self.authenticator = Arc::new(authenticator);
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
        self.queue = queue;
        self
    }

    /// Where output is kept for the next hub; only in memory otherwise. Goes
    /// with a [`queue`](Self::queue) that survives, too.
    #[must_use]
    pub fn stream_log(mut self, log: Arc<dyn StreamLog>) -> Self {
        self.stream_log = Some(log);
        self
    }

    /// Where the log records go that agents and dashboards forward; without
    /// one, none are taken. [`TracingLogSink`](crate::TracingLogSink) puts them
    /// into the hub's own log.
    #[must_use]
    pub fn logs(mut self, sink: Arc<dyn LogSink>) -> Self {
        self.log_sink = Some(sink);
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
        let stored = self.queue.load().await?;
        let streams = match &self.stream_log {
            Some(log) => Some(log.load().await?),
            None => None,
        };
        match self.authenticator.describe() {
            "anyone" => tracing::warn!(
                target: "trunkline::hub",
                "ANYONE MAY CONNECT as any agent or dashboard: the authenticator is `Anyone`, \
                 which is for development only"
            ),
            name => tracing::info!(target: "trunkline::hub", authenticator = name, "hub starts"),
        }
        let setup = Setup {
            limits: self.limits.clone(),
            policy: self.policy,
            hub: HubInstance::from_u128(rand::random()),
            epoch: self.queue.epoch(),
            seed: rand::random(),
            stored,
            streams,
        };
        let limits = Arc::new(self.limits);
        let shared = Shared::new(
            |now| Core::new(setup, now),
            self.authenticator,
            self.queue,
            self.stream_log,
            self.log_sink,
            limits.hook_timeout,
            limits.close_timeout,
        );
        tokio::spawn(Arc::clone(&shared).run_timer());
        // A few more than links: a newcomer is told why it may not stay.
        let sockets = Arc::new(Semaphore::new(limits.links_max + 64));
        Ok(Hub { limits, sockets, _last: Arc::new(Last(Arc::clone(&shared))), shared })
    }
}

impl Hub {
    /// A hub with default limits, an in-memory queue, and [`Anyone`] let in.
    pub fn builder() -> HubBuilder {
        HubBuilder {
            limits: Limits::default(),
            authenticator: Arc::new(Anyone),
            policy: Arc::new(WholeTenant),
            queue: Arc::new(MemoryQueue::new()),
            stream_log: None,
            log_sink: None,
        }
    }

    /// Serves WebSocket connections of `listener` until
    /// [`shutdown`](Self::shutdown).
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
    /// waiting. It shares `greeting_timeout` with what follows, and is dropped
    /// when that is over, or the connection was closed with the error that it
    /// returns, which is logged (level `DEBUG`).
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
                    Ok((socket, peer)) => self.serve_socket(socket, |socket| open(socket, peer)),
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

    fn serve_socket<Fut, S>(&self, socket: TcpStream, open: impl FnOnce(TcpStream) -> Fut)
    where
        Fut: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(place) = Arc::clone(&self.sockets).try_acquire_owned() else {
            return; // dropped: there is not even room to say so
        };
        let shared = Arc::clone(&self.shared);
        let limits = Arc::clone(&self.limits);
        #[expect(clippy::disallowed_methods, reason = "the shell is where the clock is read")]
        let since = Instant::now();
        // Small messages are gathered here, and must not wait in the kernel.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(target: "trunkline::hub", %error, "TCP_NODELAY not set");
        }
        let opening = open(socket);
        tokio::spawn(async move {
            let _place = place;
            let accepting = async {
                let socket = tokio::time::timeout(limits.greeting_timeout, opening).await??;
                let left = limits.greeting_timeout.saturating_sub(since.elapsed());
                transport::accept(socket, &limits, left).await
            };
            match accepting.await {
                Ok((link, token)) => {
                    if let Some(life) = run_link(&shared, link, token, since.elapsed()) {
                        life.await;
                    }
                }
                Err(error) => {
                    tracing::debug!(target: "trunkline::hub", %error, "handshake failed");
                }
            }
        });
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
        if let Some(life) = run_link(&self.shared, transport, token, Duration::ZERO) {
            tokio::spawn(life);
        }
    }

    /// Opens an in-memory link to this hub and returns the peer's end, which
    /// the client's `connector` takes.
    pub fn memory(&self) -> MemoryLink {
        let (ours, theirs) = transport::pair();
        self.attach(ours, None);
        theirs
    }

    /// Links that are up, greeted or not.
    pub fn links(&self) -> usize {
        self.shared.links()
    }

    /// Ends the hub in order: nothing new is taken, what waits for each link
    /// goes out, and every peer is told to be back at a time of its own within
    /// `spread`, so that a fleet does not return all at once. Returns when all
    /// links have ended, after `close_timeout` twice over at the latest.
    ///
    /// Queued commands stay in the queue; running ones go on at their agents.
    ///
    /// Cancel safe: the closing goes on.
    pub async fn shutdown(&self, spread: Duration) {
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
        self.shared.stop();
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
