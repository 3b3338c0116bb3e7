//! The shells of hub, agent and dashboards, whole, under thousands of
//! schedules: links that are slow at random moments decide who goes next, and
//! the clock stands still while anybody can do anything. So whoever misses a
//! wake-up sleeps until some timer comes, which takes longer than all of it may
//! take, or for ever.
//!
//! `TRUNKLINE_SCHEDULES=N` for more of them, `TRUNKLINE_SCHEDULE=SEED` for one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use futures_util::{Sink, Stream};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, Backoff, BoxLink, Connector, Dashboard, Execution, ExecutionEvent, Outcome,
    Request, Terminal, TerminalEvent,
};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::QueueEpoch;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{Channel, CommandStatus};
use trunkline_server::hooks::{BoxFuture, QueueChange, QueueError, StoredCommand};
use trunkline_server::{CommandQueue, Hub, MemoryQueue};
use trunkline_tests::fresh_seed;
use trunkline_tests::process::now;

/// All of one schedule: some waits for small writes to gather, and some for
/// links to come back. Every timer that could hide a lost wake-up is longer.
const IN_TIME: Duration = Duration::from_secs(8);
const OUTPUT_BYTES: usize = 150_000;

// ---- chance -----------------------------------------------------------------

/// Who goes next.
#[derive(Clone)]
struct Chance(Arc<Mutex<StdRng>>);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    fn below(&self, n: u32) -> u32 {
        self.0.lock().unwrap().random_range(0..n)
    }

    /// Lets others go first, sometimes.
    async fn hesitate(&self) {
        for _ in 0..self.below(4) {
            tokio::task::yield_now().await;
        }
    }
}

// ---- links ------------------------------------------------------------------

type Sending = Pin<Box<dyn Future<Output = Option<mpsc::OwnedPermit<Frame>>> + Send>>;

/// One end of a link with room for two frames, that is often not ready though
/// it could be, and can be cut.
struct End {
    chance: Chance,
    out: Option<mpsc::Sender<Frame>>,
    sending: Option<Sending>,
    permit: Option<mpsc::OwnedPermit<Frame>>,
    incoming: mpsc::Receiver<Frame>,
    cut: Arc<Cut>,
    side: usize,
}

#[derive(Default)]
struct Cut {
    done: AtomicBool,
    wakers: [AtomicWaker; 2],
}

impl Cut {
    fn now(&self) {
        self.done.store(true, Ordering::Release);
        for waker in &self.wakers {
            waker.wake();
        }
    }
}

fn link(chance: &Chance) -> (End, End, Arc<Cut>) {
    let (a_out, b_in) = mpsc::channel(2);
    let (b_out, a_in) = mpsc::channel(2);
    let cut = Arc::new(Cut::default());
    let end = |out, incoming, side| End {
        chance: chance.clone(),
        out: Some(out),
        sending: None,
        permit: None,
        incoming,
        cut: Arc::clone(&cut),
        side,
    };
    (end(a_out, a_in, 0), end(b_out, b_in, 1), Arc::clone(&cut))
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl End {
    /// Not now, though it could: asked again at once.
    fn balks(&self, cx: &Context<'_>) -> bool {
        let balks = self.chance.below(3) == 0;
        if balks {
            cx.waker().wake_by_ref();
        }
        balks
    }

    fn is_cut(&mut self, cx: &Context<'_>) -> bool {
        self.cut.wakers[self.side].register(cx.waker());
        let is_cut = self.cut.done.load(Ordering::Acquire);
        if is_cut {
            self.out = None;
        }
        is_cut
    }
}

impl Stream for End {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_cut(cx) {
            return Poll::Ready(Some(Err(gone())));
        }
        if self.balks(cx) {
            return Poll::Pending;
        }
        self.incoming.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

impl Sink<Frame> for End {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut(cx) {
            return Poll::Ready(Err(gone()));
        }
        if self.permit.is_some() {
            return Poll::Ready(Ok(()));
        }
        if self.balks(cx) {
            return Poll::Pending;
        }
        if self.sending.is_none() {
            let out = self.out.clone().ok_or_else(gone)?;
            self.sending = Some(Box::pin(async move { out.reserve_owned().await.ok() }));
        }
        let Some(sending) = &mut self.sending else { return Poll::Pending };
        match sending.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(permit) => {
                self.sending = None;
                self.permit = permit;
                Poll::Ready(if self.permit.is_some() { Ok(()) } else { Err(gone()) })
            }
        }
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let permit = self.permit.take().ok_or_else(gone)?;
        permit.send(frame);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.balks(cx) { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        (self.out, self.sending, self.permit) = (None, None, None);
        Poll::Ready(Ok(()))
    }
}

// ---- hooks ------------------------------------------------------------------

struct HesitantQueue(MemoryQueue, Chance);

impl CommandQueue for HesitantQueue {
    fn epoch(&self) -> QueueEpoch {
        self.0.epoch()
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>> {
        self.0.load()
    }

    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        Box::pin(async move {
            self.1.hesitate().await;
            self.0.apply(change).await
        })
    }
}

fn byte_at(at: usize) -> u8 {
    (at.wrapping_mul(31) >> 3).to_le_bytes()[0]
}

/// `write`: much output, in pieces. `echo`: each line that is typed, until
/// `bye`. `both`: two who write at a time. `wait`: until it is interrupted.
async fn work(mut execution: Execution, chance: Chance) -> Outcome {
    let output = execution.output();
    let trunkline_protocol::message::Run::Text(text) = execution.spec().run.clone() else {
        return Outcome::Failed("a text, please".into());
    };
    match text.as_str() {
        "write" => {
            let mut at = 0;
            while at < OUTPUT_BYTES {
                let more = (1 + chance.below(9_000) as usize).min(OUTPUT_BYTES - at);
                let bytes: Vec<u8> = (at..at + more).map(byte_at).collect();
                output.write(Channel::Pty, &bytes).await;
                at += more;
                chance.hesitate().await;
            }
        }
        "both" => {
            let piece = vec![b'x'; OUTPUT_BYTES / 20];
            let one = async |channel: Channel| {
                for _ in 0..10 {
                    output.write(channel, &piece).await;
                    chance.hesitate().await;
                }
            };
            tokio::join!(one(Channel::Stdout), one(Channel::Stderr));
        }
        "echo" => {
            let mut typed = Vec::new();
            while !typed.ends_with(b"bye\n") {
                if let ExecutionEvent::Input(bytes) = execution.next_event().await {
                    typed.extend_from_slice(&bytes);
                    output.write(Channel::Pty, &bytes).await;
                }
                chance.hesitate().await;
            }
        }
        _ => loop {
            if let ExecutionEvent::Interrupt { .. } = execution.next_event().await {
                execution.signalled();
                return Outcome::Interrupted;
            }
        },
    }
    Outcome::Exited(0)
}

// ---- what is done -----------------------------------------------------------

/// Everything that one schedule has.
struct Stage {
    chance: Chance,
    hub: Hub,
    cuts: Arc<Mutex<Vec<Arc<Cut>>>>,
}

impl Stage {
    async fn new(seed: u64) -> Self {
        let chance = Chance::new(seed);
        let queue = MemoryQueue::with_epoch(QueueEpoch::from_u128(1));
        let limits = Limits {
            grant_bytes: 20 * 1024,
            terminal_bytes_per_second: 1 << 40,
            log_bytes_per_stream: 4 * OUTPUT_BYTES,
            ..Limits::default()
        };
        let hub = Hub::builder()
            .limits(limits)
            .queue(Arc::new(HesitantQueue(queue, chance.clone())))
            .start()
            .await
            .unwrap();
        Self { chance, hub, cuts: Arc::default() }
    }

    fn connector(&self) -> impl Connector + use<> {
        let (chance, hub, cuts) = (self.chance.clone(), self.hub.clone(), Arc::clone(&self.cuts));
        move || {
            let (ours, theirs, cut) = link(&chance);
            hub.attach(ours, None);
            cuts.lock().unwrap().push(cut);
            async move { Ok(Box::pin(theirs) as BoxLink) }
        }
    }

    fn agent(&self) -> Agent {
        let chance = self.chance.clone();
        Agent::over(self.connector(), "a")
            .unwrap()
            .backoff(quick())
            .slots(2)
            .tail(64 * 1024, Duration::from_secs(3600))
            .connect(move |execution| work(execution, chance.clone()))
    }

    fn dashboard(&self) -> Dashboard {
        Dashboard::over(self.connector()).backoff(quick()).connect()
    }

    /// Cuts some link.
    fn cut(&self) {
        let mut cuts = self.cuts.lock().unwrap();
        if !cuts.is_empty() {
            let one = self.chance.below(u32::try_from(cuts.len()).unwrap()) as usize;
            cuts.swap_remove(one).now();
        }
    }
}

fn quick() -> Backoff {
    let wait = Duration::from_millis(20);
    Backoff { first: wait, base: wait, max: wait, ..Backoff::default() }
}

/// Reads to the end; what it read.
async fn read(mut terminal: Terminal, chance: Chance) -> (Vec<u8>, Audit) {
    let mut bytes = Vec::new();
    loop {
        // A reader that looks elsewhere meanwhile loses nothing.
        let event = if chance.below(4) == 0 {
            tokio::select! {
                biased;
                event = terminal.next() => event,
                () = chance.hesitate() => continue,
            }
        } else {
            terminal.next().await
        };
        match event {
            Some(TerminalEvent::Output { offset, data, .. }) => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.extend_from_slice(&data);
            }
            Some(TerminalEvent::Ended { audit, .. }) => return (bytes, audit),
            Some(TerminalEvent::Opened { .. }) => {}
            other => panic!("{other:?}"),
        }
        chance.hesitate().await;
    }
}

async fn everything(seed: u64) {
    let stage = Stage::new(seed).await;
    let chance = stage.chance.clone();
    let begun = now();
    let (ann, bob) = (stage.dashboard(), stage.dashboard());
    let agent = stage.agent();
    ann.connected().await.unwrap();
    let much = ann.run("a", Request::text("write")).await.unwrap();
    let echo = bob.run("a", Request::text("echo")).await.unwrap();
    let both = ann.run("a", Request::text("both")).await.unwrap();
    let wait = bob.run("a", Request::text("wait")).await.unwrap();

    let readers = [&ann, &bob]
        .map(|who| tokio::spawn(read(who.command(much.id()).terminal(), chance.clone())));
    // Somebody who leaves in the middle.
    let mut glimpse = bob.command(much.id()).terminal();
    let leaver = tokio::spawn(async move {
        for _ in 0..3 {
            glimpse.next().await;
        }
    });
    let heard = tokio::spawn(read(ann.command(echo.id()).terminal(), chance.clone()));
    let cutter = async {
        for _ in 0..chance.below(4) {
            for _ in 0..chance.below(300) {
                tokio::task::yield_now().await;
            }
            stage.cut();
        }
    };
    let typing = async {
        for line in ["one\n", "two\n", "bye\n"] {
            bob.input(echo.id(), line).await.unwrap();
            chance.hesitate().await;
        }
    };
    tokio::join!(cutter, typing);

    let expected = Sha256::digest((0..OUTPUT_BYTES).map(byte_at).collect::<Vec<u8>>());
    for reader in readers {
        let (bytes, audit) = reader.await.unwrap();
        assert_eq!(Sha256::digest(&bytes), expected, "{} bytes", bytes.len());
        assert_eq!(audit, Audit::Verified);
    }
    leaver.await.unwrap();
    assert_eq!(heard.await.unwrap().0, b"one\ntwo\nbye\n");
    let (bytes, _) = read(both.terminal(), chance.clone()).await;
    assert_eq!(bytes.len(), OUTPUT_BYTES / 20 * 20);
    for command in [&much, &echo, &both] {
        assert_eq!(command.ended().await.unwrap().status, CommandStatus::Completed);
    }
    ann.interrupt(wait.id()).await.unwrap();
    assert_eq!(wait.ended().await.unwrap().status, CommandStatus::Interrupted);

    match chance.below(3) {
        0 => agent.stop().await,
        1 => ann.close().await,
        _ => stage.cut(),
    }
    stage.hub.shutdown(Duration::ZERO).await;
    assert_eq!(stage.hub.links(), 0);
    drop((agent, ann, bob, much, echo, both, wait, stage));
    let took = begun.elapsed();
    assert!(took < IN_TIME, "somebody waited for a timer: {took:?}");
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[test]
fn nobody_sleeps_on_under_any_schedule() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let live = |seed: u64| {
        runtime.block_on(async {
            let life = timeout(Duration::from_secs(3600), everything(seed));
            assert!(life.await.is_ok(), "seed {seed}: somebody sleeps for ever");
            // What was dropped ends, and so do all its tasks.
            for _ in 0..10_000 {
                if tokio::runtime::Handle::current().metrics().num_alive_tasks() == 0 {
                    return;
                }
                tokio::task::yield_now().await;
            }
            panic!("seed {seed}: a task goes on for ever");
        });
    };
    if let Some(seed) = number("TRUNKLINE_SCHEDULE") {
        return live(seed);
    }
    let schedules = number("TRUNKLINE_SCHEDULES").unwrap_or(100);
    let from = fresh_seed();
    let at = AtomicU64::new(from);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for seed in from..from + schedules {
            at.store(seed, Ordering::Relaxed);
            live(seed);
        }
    }));
    if let Err(panic) = result {
        eprintln!("TRUNKLINE_SCHEDULE={} shows it again", at.load(Ordering::Relaxed));
        std::panic::resume_unwind(panic);
    }
    println!("{schedules} schedules from seed {from}: nobody slept on");
}
