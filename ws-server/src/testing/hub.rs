//! A hub to test an application against.

use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use trunkline_protocol::frame::Frame;

use crate::hooks::{MemoryQueue, MemoryStreamLog};
use crate::{Hub, HubBuilder, MemoryLink};

/// A hub in this process, and what may happen to it: its process is killed and
/// started again, cables break, nobody can reach it.
///
/// Peers come over [`Cable`]s:
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_server::testing::TestHub;
///
/// let hub = TestHub::start().await;
/// let cable = hub.cable();
/// // Agent::over(cable.connector(), "build-1")?.connect(handler);
/// // Dashboard::over(hub.cable().connector()).connect();
/// let link = (cable.connector())().await.unwrap();
/// cable.cut();
/// assert_eq!(hub.kill(), true);
/// assert!(cable.dial().is_err(), "nobody is there");
/// hub.restart().await;
/// assert!(cable.dial().is_ok());
/// # drop(link);
/// # });
/// ```
///
/// All of it goes by tokio's clock. In a test with
/// `#[tokio::test(start_paused = true)]` that is a virtual one: hours of
/// reconnecting and waiting take no time, and nothing depends on how busy the
/// machine is.
#[derive(Clone)]
pub struct TestHub(Arc<Inside>);

type Make = dyn Fn(HubBuilder) -> HubBuilder + Send + Sync;

struct Inside {
    make: Box<Make>,
    hub: Mutex<Option<Hub>>,
    /// Links that may be up.
    links: Mutex<Vec<Weak<Cut>>>,
}

impl std::fmt::Debug for TestHub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestHub").field("hub", &*self.0.hub()).finish_non_exhaustive()
    }
}

impl TestHub {
    /// A hub with the defaults. Its commands and its output survive its
    /// process.
    ///
    /// Cancel safe: a hub that has not started yet is dropped.
    ///
    /// # Panics
    ///
    /// When called outside a tokio runtime.
    pub async fn start() -> Self {
        let queue = Arc::new(MemoryQueue::new());
        let log = Arc::new(MemoryStreamLog::new());
        Self::start_with(move |builder| {
            let queue = Arc::clone(&queue);
            let log = Arc::clone(&log);
            builder.queue(queue).stream_log(log)
        })
        .await
    }

    /// A hub as `make` makes it, each time that it starts. What is to survive
    /// its process is the same queue each time.
    ///
    /// Cancel safe: a hub that has not started yet is dropped.
    ///
    /// # Panics
    ///
    /// When it does not start, and when called outside a tokio runtime.
    pub async fn start_with(
        make: impl Fn(HubBuilder) -> HubBuilder + Send + Sync + 'static,
    ) -> Self {
        let inside =
            Inside { make: Box::new(make), hub: Mutex::default(), links: Mutex::default() };
        let this = Self(Arc::new(inside));
        this.restart().await;
        this
    }

    /// The hub; `None` while it is dead.
    pub fn hub(&self) -> Option<Hub> {
        self.0.hub().clone()
    }

    /// A cable of its own for a peer.
    pub fn cable(&self) -> Cable {
        let inside = CableInside {
            hub: Arc::clone(&self.0),
            links: Mutex::default(),
            refuses: AtomicBool::new(false),
        };
        Cable(Arc::new(inside))
    }

    /// The hub dies without a word, as by `kill -9`. Whether it lived.
    pub fn kill(&self) -> bool {
        let Some(hub) = self.0.hub().take() else { return false };
        hub.shared.stop();
        cut_all(&self.0.links);
        true
    }

    /// The next hub starts, after the last one is killed if it still lives.
    ///
    /// Cancel safe: dropped half-way, the last hub is dead and no other lives.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub async fn restart(&self) {
        self.kill();
        let started = (self.0.make)(Hub::builder()).start().await;
        let hub = started.unwrap_or_else(|error| panic!("the hub does not start: {error}"));
        *self.0.hub() = Some(hub);
    }
}

impl Inside {
    fn hub(&self) -> MutexGuard<'_, Option<Hub>> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a peer reaches the hub by. Clones are the same cable.
#[derive(Clone)]
pub struct Cable(Arc<CableInside>);

struct CableInside {
    hub: Arc<Inside>,
    links: Mutex<Vec<Weak<Cut>>>,
    refuses: AtomicBool,
}

impl std::fmt::Debug for Cable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let refuses = self.0.refuses.load(Ordering::Relaxed);
        f.debug_struct("Cable").field("refuses", &refuses).finish_non_exhaustive()
    }
}

impl Cable {
    /// What a client dials with.
    pub fn connector(
        &self,
    ) -> impl Fn() -> Ready<io::Result<TestLink>> + Send + Sync + use<> + 'static {
        let cable = self.clone();
        move || ready(cable.dial())
    }

    /// A link to the hub.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` while the hub is dead, or the cable
    /// [refuses](Self::refuse).
    pub fn dial(&self) -> io::Result<TestLink> {
        let hub = self.0.hub.hub().clone();
        let hub = hub.filter(|_| !self.0.refuses.load(Ordering::Relaxed));
        let hub = hub.ok_or(io::ErrorKind::ConnectionRefused)?;
        let cut = Arc::new(Cut::default());
        for links in [&self.0.links, &self.0.hub.links] {
            let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
            links.retain(|link| link.strong_count() > 0);
            links.push(Arc::downgrade(&cut));
        }
        Ok(TestLink { link: Some(hub.memory()), cut })
    }

    /// Cuts it: both ends notice, and what was under way is lost. How many
    /// links were up.
    pub fn cut(&self) -> usize {
        cut_all(&self.0.links)
    }

    /// Whether new links are refused from now on. Links that are up stay.
    pub fn refuse(&self, refuses: bool) {
        self.0.refuses.store(refuses, Ordering::Relaxed);
    }
}

fn cut_all(links: &Mutex<Vec<Weak<Cut>>>) -> usize {
    let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
    let up = links.drain(..).filter_map(|link| link.upgrade());
    up.filter(|link| link.now()).count()
}

/// Ends a link from outside.
#[derive(Debug, Default)]
struct Cut {
    is_cut: AtomicBool,
    waker: AtomicWaker,
}

impl Cut {
    /// Whether that is news.
    fn now(&self) -> bool {
        let was_cut = self.is_cut.swap(true, Ordering::AcqRel);
        self.waker.wake();
        !was_cut
    }
}

/// A peer's end of a link over a [`Cable`].
#[derive(Debug)]
pub struct TestLink {
    /// `None` once it is cut.
    link: Option<MemoryLink>,
    cut: Arc<Cut>,
}

impl TestLink {
    fn link(&mut self, cx: &Context<'_>) -> io::Result<&mut MemoryLink> {
        self.cut.waker.register(cx.waker());
        if self.cut.is_cut.load(Ordering::Acquire) {
            // The hub's end learns of it.
            self.link = None;
        }
        self.link.as_mut().ok_or_else(|| io::ErrorKind::ConnectionReset.into())
    }
}

impl Stream for TestLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.link(cx) {
            Ok(link) => link.poll_next_unpin(cx),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }
}

impl Sink<Frame> for TestLink {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_ready_unpin(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let link = self.link.as_mut().ok_or(io::ErrorKind::ConnectionReset)?;
        link.start_send_unpin(frame)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_flush_unpin(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_close_unpin(cx)
    }
}
