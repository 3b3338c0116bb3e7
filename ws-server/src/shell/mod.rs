//! The only place that waits: tasks, timers and the core's effects.
//!
//! One mutex guards the core. Every task takes it for the length of one input
//! or one transmit, never across an await; effects are taken out before it is
//! released, wakes are given at once, hooks are asked after.

mod arrival;
mod clock;
mod link;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "polling")]
mod polling;
#[cfg(feature = "axum")]
mod router;
mod wake_up;
mod watch;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Notify, Semaphore};
use tokio::task::AbortHandle;
use trunkline_protocol::ids::{CommandId, TenantId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::time::Now;

pub(crate) use self::arrival::Arriving;
use self::clock::Clock;
#[cfg(feature = "polling")]
pub(crate) use self::polling::Polling;
#[cfg(all(feature = "polling", feature = "testing"))]
pub(crate) use self::polling::answer_for;
#[cfg(feature = "axum")]
pub(crate) use self::router::router;
use self::wake_up::WakeUp;
use self::watch::Watch;
use crate::core::{Core, Effect, LinkId};
use crate::hooks::{
    AuthError, Authenticator, CommandQueue, Credentials, ForwardedLogs, Hook, LogChange, LogError,
    LogSink, LogSinkError, Observer, QueueChange, QueueError, StreamLog,
};

/// Connections that are told why there is no link, at once.
const FAREWELLS_MAX: usize = 64;

/// What [`wake_up`] is made of.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};

    pub(super) use futures_util::task::AtomicWaker;
}

/// What the embedder has plugged in, but for the policy, which the core asks.
#[derive(Clone)]
pub(crate) struct Hooks {
    pub(crate) authenticator: Arc<dyn Authenticator>,
    pub(crate) queue: Arc<dyn CommandQueue>,
    pub(crate) stream_log: Option<Arc<dyn StreamLog>>,
    pub(crate) log_sink: Option<Arc<dyn LogSink>>,
    pub(crate) observer: Option<Arc<dyn Observer>>,
}

pub(crate) struct Shared {
    inside: Mutex<Inside>,
    clock: Clock,
    /// The first deadline has moved forward.
    rearm: Notify,
    /// A link has ended.
    pub(crate) ended: Notify,
    /// The hub was dropped.
    #[cfg(any(feature = "metrics", feature = "polling"))]
    stopped: Notify,
    /// Links over plain HTTP.
    #[cfg(feature = "polling")]
    polled: polling::Polled,
    /// Room for the connections that their requests come over.
    #[cfg(feature = "polling")]
    connections: Arc<Semaphore>,
    hooks: Hooks,
    hook_timeout: Duration,
    pub(crate) close_timeout: Duration,
    /// Room for those who are told why there is no link.
    farewells: Semaphore,
    /// Events on their way to the observer.
    pub(crate) watch: Watch,
}

struct Inside {
    core: Core,
    links: HashMap<LinkId, Arc<WakeUp>>,
    /// Questions to the authenticator: one at a time for a link, and none for
    /// a link that is gone.
    asking: HashMap<LinkId, AbortHandle>,
    next: u64,
    /// The deadline that the timer waits for.
    armed: Option<Duration>,
    stopped: bool,
}

/// Questions to hooks, asked outside the lock.
enum Ask {
    Authenticate(LinkId, Credentials),
    Store(TenantId, CommandId, QueueChange),
    Forget(QueueChange),
    Keep(Vec<LogChange>),
    TakeLogs(Box<ForwardedLogs>),
}

impl Shared {
    pub(crate) fn new(core: impl FnOnce(Now) -> Core, hooks: Hooks, limits: &Limits) -> Arc<Self> {
        let Limits { hook_timeout, close_timeout, .. } = *limits;
        #[cfg(feature = "polling")]
        let connections = limits.links_max.min(Semaphore::MAX_PERMITS);
        let clock = Clock::start();
        let mut core = core(clock.now());
        if hooks.log_sink.is_some() {
            core.take_logs();
        }
        Arc::new(Self {
            inside: Mutex::new(Inside {
                core,
                links: HashMap::new(),
                asking: HashMap::new(),
                next: 0,
                armed: None,
                stopped: false,
            }),
            clock,
            rearm: Notify::new(),
            ended: Notify::new(),
            #[cfg(any(feature = "metrics", feature = "polling"))]
            stopped: Notify::new(),
            #[cfg(feature = "polling")]
            polled: polling::Polled::default(),
            #[cfg(feature = "polling")]
            connections: Arc::new(Semaphore::new(connections)),
            watch: Watch::new(hooks.observer.clone()),
            hooks,
            hook_timeout,
            close_timeout,
            farewells: Semaphore::new(FAREWELLS_MAX),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // A panic in the core is a bug, and is reported as one by its task;
        // the other links go on.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the core an input, and does what it asks for.
    pub(crate) fn input<T>(self: &Arc<Self>, input: impl FnOnce(&mut Core, Now) -> T) -> T {
        let now = self.clock.now();
        let mut asks = Vec::new();
        let mut events = Vec::new();
        let mut inside = self.lock();
        let result = input(&mut inside.core, now);
        while let Some(effect) = inside.core.poll_effect() {
            match effect {
                Effect::Wake(id) => {
                    if let Some(link) = inside.links.get(&id) {
                        link.wake();
                    }
                }
                Effect::Authenticate { link, credentials } => {
                    asks.push(Ask::Authenticate(link, credentials));
                }
                Effect::Store { tenant, command, change } => {
                    asks.push(Ask::Store(tenant, command, change));
                }
                Effect::Forget(change) => asks.push(Ask::Forget(change)),
                Effect::Keep(changes) => asks.push(Ask::Keep(changes)),
                Effect::TakeLogs(logs) => asks.push(Ask::TakeLogs(logs)),
                // In the order in which things happened.
                Effect::Observe(event) => {
                    self.watch.put(&event);
                    events.push(event);
                }
            }
        }
        let deadline = inside.core.deadline();
        let sooner = match (deadline, inside.armed) {
            (Some(new), Some(armed)) => new < armed,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if sooner {
            inside.armed = deadline;
        }
        drop(inside);
        if sooner {
            self.rearm.notify_one();
        }
        for event in events {
            watch::trace(&event);
            #[cfg(feature = "metrics")]
            metrics::record(&event);
        }
        for ask in asks {
            self.ask(ask);
        }
        result
    }

    fn ask(self: &Arc<Self>, ask: Ask) {
        let shared = Arc::clone(self);
        let limit = self.hook_timeout;
        match ask {
            Ask::Authenticate(link, credentials) => {
                let mut inside = self.lock();
                if !inside.links.contains_key(&link) {
                    return;
                }
                let asking = tokio::spawn(async move {
                    let answer = shared.hooks.authenticator.authenticate(&credentials);
                    let answer = tokio::time::timeout(limit, answer);
                    let answer =
                        shared.timed(Hook::Authenticator, answer).await.unwrap_or_else(|_| {
                            Err(AuthError::Unavailable("the authenticator took too long".into()))
                        });
                    shared.lock().asking.remove(&link);
                    shared.input(|core, now| core.handle_authenticated(link, answer, now));
                });
                inside.asking.insert(link, asking.abort_handle());
            }
            Ask::Store(tenant, command, change) => {
                tokio::spawn(async move {
                    let stored = shared.store(&change, limit).await;
                    shared.input(|core, now| core.handle_stored(&tenant, command, &stored, now));
                });
            }
            Ask::Keep(changes) => {
                tokio::spawn(async move {
                    let kept = shared.keep(&changes, limit).await;
                    shared.input(|core, now| core.handle_kept(&kept, now));
                });
            }
            Ask::TakeLogs(logs) => {
                tokio::spawn(async move {
                    let taken = shared.take_logs(&logs, limit).await;
                    shared.input(|core, now| core.handle_logged(&logs, &taken, now));
                });
            }
            Ask::Forget(change) => {
                tokio::spawn(async move {
                    if let Err(error) = shared.store(&change, limit).await {
                        let why = error.to_string();
                        shared.input(|core, now| core.handle_hook_failed(Hook::Queue, why, now));
                    }
                });
            }
        }
    }

    async fn keep(&self, changes: &[LogChange], limit: Duration) -> Result<(), LogError> {
        let Some(log) = &self.hooks.stream_log else { return Ok(()) };
        let slow = |_| Err(LogError("took too long".into()));
        let kept = tokio::time::timeout(limit, log.apply(changes));
        self.timed(Hook::StreamLog, kept).await.unwrap_or_else(slow)
    }

    async fn take_logs(&self, logs: &ForwardedLogs, limit: Duration) -> Result<(), LogSinkError> {
        let Some(sink) = &self.hooks.log_sink else { return Ok(()) };
        // A sink that panics must not leave its sender waiting for ever. What it
        // shares with other calls is its own to keep in order.
        let taken = AssertUnwindSafe(async { sink.take(logs).await }).catch_unwind();
        match self.timed(Hook::LogSink, tokio::time::timeout(limit, taken)).await {
            Ok(Ok(taken)) => taken,
            Ok(Err(_)) => Err(LogSinkError("panicked".into())),
            Err(_) => Err(LogSinkError("took too long".into())),
        }
    }

    async fn store(&self, change: &QueueChange, limit: Duration) -> Result<(), QueueError> {
        let slow = |_| Err(QueueError("took too long".into()));
        let stored = tokio::time::timeout(limit, self.hooks.queue.apply(change));
        self.timed(Hook::Queue, stored).await.unwrap_or_else(slow)
    }

    /// Asks a hook, and notes how long that takes.
    async fn timed<T>(&self, hook: Hook, answer: impl Future<Output = T>) -> T {
        let asked = self.clock.now().monotonic;
        let answer = answer.await;
        let took = self.clock.now().monotonic.saturating_sub(asked);
        #[cfg(feature = "metrics")]
        metrics::record_hook(hook, took);
        tracing::trace!(target: "trunkline::hub", %hook, ?took, "hook answered");
        answer
    }

    /// Waits until the hub is dropped.
    #[cfg(any(feature = "metrics", feature = "polling"))]
    pub(crate) async fn until_stopped(&self) {
        let stopped = self.stopped.notified();
        if !self.lock().stopped {
            stopped.await;
        }
    }

    /// Brings the figures up to date, again and again, until the hub is dropped.
    #[cfg(feature = "metrics")]
    pub(crate) async fn run_metrics(self: Arc<Self>) {
        metrics::describe();
        let mut stopped = std::pin::pin!(self.until_stopped());
        loop {
            self.publish_metrics();
            tokio::select! {
                () = self.pause(metrics::EVERY) => {}
                () = stopped.as_mut() => return,
            }
        }
    }

    #[cfg(feature = "metrics")]
    pub(crate) fn publish_metrics(self: &Arc<Self>) {
        metrics::publish(&self.input(|core, now| core.stats(now)));
    }

    /// Makes room for a link; `None` once the hub was dropped.
    fn register(&self) -> Option<(LinkId, Arc<WakeUp>)> {
        let mut inside = self.lock();
        if inside.stopped {
            return None;
        }
        inside.next += 1;
        let id = LinkId(inside.next);
        let wake = Arc::new(WakeUp::default());
        inside.links.insert(id, Arc::clone(&wake));
        Some((id, wake))
    }

    fn release(self: &Arc<Self>, id: LinkId) {
        let mut inside = self.lock();
        inside.links.remove(&id);
        if let Some(asking) = inside.asking.remove(&id) {
            asking.abort();
        }
        drop(inside);
        self.input(|core, now| core.handle_lost(id, now));
        self.ended.notify_waiters();
    }

    /// Whether the hub takes nothing new any more.
    pub(crate) fn is_draining(&self) -> bool {
        let inside = self.lock();
        inside.stopped || inside.core.is_draining()
    }

    /// Waits a moment before something is tried again.
    pub(crate) async fn pause(&self, time: Duration) {
        self.clock.sleep_until(self.clock.now().monotonic + time).await;
    }

    /// Links that are up or ending.
    pub(crate) fn links(&self) -> usize {
        self.lock().links.len()
    }

    /// Ends every link at once, without a word to anybody.
    pub(crate) fn stop(&self) {
        let mut inside = self.lock();
        inside.stopped = true;
        for link in inside.links.values() {
            link.stop();
        }
        drop(inside);
        self.rearm.notify_one();
        self.watch.stop();
        #[cfg(any(feature = "metrics", feature = "polling"))]
        self.stopped.notify_waiters();
    }

    /// Calls the core when a deadline has come, until the hub is dropped.
    pub(crate) async fn run_timer(self: Arc<Self>) {
        loop {
            let rearm = self.rearm.notified();
            let deadline = {
                let mut inside = self.lock();
                if inside.stopped {
                    return;
                }
                inside.armed = inside.core.deadline();
                inside.armed
            };
            match deadline {
                Some(at) => {
                    tokio::select! {
                        () = self.clock.sleep_until(at) => {
                            self.input(Core::handle_timeout);
                        }
                        () = rearm => {}
                    }
                }
                None => rearm.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake, Waker};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn every_wake_after_a_look_wakes_the_task() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let cx = Context::from_waker(&waker);
        let wake = WakeUp::default();
        assert!(!wake.poll(&cx));
        for round in 1..=3 {
            wake.wake();
            wake.wake();
            assert_eq!(woken.0.load(Ordering::Relaxed), round);
            assert!(wake.poll(&cx));
        }
        assert!(!wake.poll(&cx));
    }
}
