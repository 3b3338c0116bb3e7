//! A WebSocket where one comes through, plain HTTP where none does.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Sink, Stream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use trunkline_protocol::frame::Frame;

use super::polling::Polling;
use super::websocket::{HttpRefusal, WebSocket};
use crate::connector::{BoxFuture, BoxLink, Connector};
use crate::core::reach::{LASTS, PROBE_EVERY, Reach, Way};
use crate::shell::Clock;

/// What [`Agent::builder`](crate::Agent::builder) and
/// [`Dashboard::builder`](crate::Dashboard::builder) dial with, with feature
/// `polling`: a WebSocket; and after three that did not come through in a row,
/// or died within seconds without a close, [`Polling`]. While that is up, it is
/// seen every minute whether a WebSocket comes through again, later less often if
/// such die early; then the link goes over to it. Positions see to it that
/// nothing is lost or comes twice.
#[derive(Clone)]
pub struct Reaching {
    websocket: WebSocket,
    polling: Polling,
    shared: Arc<Shared>,
}

struct Shared {
    reach: Mutex<Reach>,
    clock: Clock,
    /// A WebSocket that a probe has brought.
    probed: Mutex<Option<BoxLink>>,
}

impl fmt::Debug for Reaching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reaching").field("websocket", &self.websocket).finish_non_exhaustive()
    }
}

impl From<WebSocket> for Reaching {
    /// Reaches the hub that this dials, with the same trust in its certificate.
    fn from(websocket: WebSocket) -> Self {
        let shared = Shared {
            reach: Mutex::new(Reach::new(PROBE_EVERY)),
            clock: Clock::start(),
            probed: Mutex::default(),
        };
        let polling = websocket.clone().into();
        Self { websocket, polling, shared: Arc::new(shared) }
    }
}

impl Reaching {
    /// How long to wait before it is seen whether a WebSocket comes through again;
    /// a minute otherwise. To be said before the first dial.
    #[must_use]
    pub fn probing_every(self, every: Duration) -> Self {
        *self.shared.reach() = Reach::new(every);
        self
    }

    /// By which way a link is dialled now; one that came another way is about to be
    /// replaced. Keep a clone, and it tells of the agent or the dashboard that was
    /// given the other.
    pub fn way(&self) -> Way {
        self.shared.reach().way()
    }
}

impl Shared {
    fn reach(&self) -> MutexGuard<'_, Reach> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.clock.now().monotonic
    }

    fn failed(&self, way: Way) {
        let now = self.now();
        let mut reach = self.reach();
        let before = reach.way();
        reach.handle_failed(way, now);
        if before != reach.way() && reach.way() == Way::Polling {
            tracing::info!(target: "trunkline::client", "no WebSocket comes through: over plain HTTP");
        }
    }

    fn take_probed(&self) -> Option<BoxLink> {
        self.probed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A dial that is under way: given up, it has failed.
struct Trying<'a>(Option<&'a Shared>, Way);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.failed(self.1);
        }
    }
}

impl Connector for Reaching {
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        Box::pin(async move {
            if let Some(link) = self.shared.take_probed() {
                return Ok(self.watched(link, Way::WebSocket));
            }
            let way = self.shared.reach().way();
            let mut trying = Trying(Some(&self.shared), way);
            let dialled = match way {
                Way::WebSocket => self.websocket.dial().await,
                Way::Polling => self.polling.dial().await,
            };
            if dialled.as_ref().map_or_else(|error| !tells(error), |_| true) {
                trying.0 = None;
            }
            drop(trying);
            Ok(self.watched(dialled?, way))
        })
    }

    fn is_exposed(&self) -> bool {
        self.websocket.is_exposed()
    }
}

/// Whether a dial that failed so tells that this way leads nowhere. A hub that
/// cannot be connected to at all, or says to come later, does not.
fn tells(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    match error.get_ref().and_then(|error| error.downcast_ref::<HttpRefusal>()) {
        Some(refusal) => !matches!(refusal.status, 429 | 503),
        None => matches!(
            error.kind(),
            Kind::Other
                | Kind::UnexpectedEof
                | Kind::ConnectionReset
                | Kind::ConnectionAborted
                | Kind::BrokenPipe
                | Kind::InvalidData
                | Kind::TimedOut
        ),
    }
}

impl Reaching {
    fn watched(&self, link: BoxLink, way: Way) -> BoxLink {
        let probing = (way == Way::Polling).then(|| self.probe());
        let shared = Arc::clone(&self.shared);
        let since = shared.now();
        Box::pin(Watched { link, way, shared, since, is_over: false, probing })
    }

    /// Sees from time to time whether a WebSocket comes through, until one does.
    fn probe(&self) -> Probing {
        let (found, is_found) = oneshot::channel();
        let this = self.clone();
        let task = tokio::spawn(async move {
            loop {
                let at = this.shared.reach().probe_at();
                let Some(at) = at else { return };
                this.shared.clock.sleep_until(at).await;
                let dialled = tokio::time::timeout(LASTS, this.websocket.dial()).await;
                let link = dialled.ok().and_then(Result::ok);
                let now = this.shared.now();
                if this.shared.reach().handle_probed(link.is_some(), now) {
                    *this.shared.probed.lock().unwrap_or_else(PoisonError::into_inner) = link;
                    tracing::info!(target: "trunkline::client", "a WebSocket comes through again");
                    let _ = found.send(());
                    return;
                }
            }
        });
        Probing { is_found, task }
    }
}

/// A link, and what its fate tells of its way.
struct Watched {
    link: BoxLink,
    way: Way,
    shared: Arc<Shared>,
    since: Duration,
    is_over: bool,
    probing: Option<Probing>,
}

struct Probing {
    is_found: oneshot::Receiver<()>,
    task: JoinHandle<()>,
}

impl Drop for Probing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watched {
    /// It has ended: by a close, or without.
    fn ended(&mut self, is_closed: bool) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        if is_closed || self.shared.now().saturating_sub(self.since) >= LASTS {
            self.shared.reach().handle_lasted(self.way);
        } else {
            self.shared.failed(self.way);
        }
    }
}

impl Stream for Watched {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.link.as_mut().poll_next(cx);
        match &next {
            Poll::Ready(Some(Ok(Frame::Close(_)))) => self.ended(true),
            Poll::Ready(None | Some(Err(_))) => self.ended(false),
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Pending => {
                if let Some(probing) = &mut self.probing
                    && let Poll::Ready(Ok(())) = Pin::new(&mut probing.is_found).poll(cx)
                {
                    self.is_over = true;
                    let why = "a WebSocket comes through again";
                    return Poll::Ready(Some(Err(io::Error::other(why))));
                }
            }
        }
        next
    }
}

impl Sink<Frame> for Watched {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.as_mut().poll_ready(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        self.link.as_mut().start_send(frame)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.as_mut().poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.as_mut().poll_close(cx)
    }
}
