//! The shells of hub, agent and dashboards, whole, under thousands of
//! schedules: links that are slow at random moments decide who goes next, and
//! the clock stands still while anybody can do anything. So whoever misses a
//! wake-up sleeps until some timer comes, which takes longer than all of it may
//! take, or for ever.
//!
//! `TRUNKLINE_SCHEDULES=N` for more of them, `TRUNKLINE_SCHEDULE=SEED` for one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{Sink, Stream};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, Backoff, BoxLink, Connector, Dashboard, Execution, ExecutionEvent, Outcome,
    Request, Terminal, TerminalEvent, TerminalOptions,
};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::QueueEpoch;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{Channel, CommandStatus, Target};
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

/// Frames that may be under way, and that may wait for their flush.
const ROOM: usize = 2;

/// One direction of a link.
#[derive(Default)]
struct Lane {
    frames: VecDeque<Frame>,
    /// Nothing more comes, or nobody reads.
    over: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Lane {
    fn ends(&mut self) {
        self.over = true;
        wake(&mut self.reader);
        wake(&mut self.writer);
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// Both directions of a link, to be cut.
#[derive(Clone)]
struct Cable([Arc<Mutex<Lane>>; 2]);

impl Cable {
    /// What was under way is lost.
    fn cut(&self) {
        for lane in &self.0 {
            let mut lane = lane.lock().unwrap();
            lane.frames.clear();
            lane.ends();
        }
    }
}

/// One end of a link with little room, that is often not ready though it could
/// be, and keeps what is sent until it is flushed.
struct End {
    chance: Chance,
    unflushed: VecDeque<Frame>,
    out: Arc<Mutex<Lane>>,
    incoming: Arc<Mutex<Lane>>,
}

fn link(chance: &Chance) -> (End, End, Cable) {
    let lanes = [Arc::default(), Arc::default()];
    let end = |out: usize| End {
        chance: chance.clone(),
        unflushed: VecDeque::new(),
        out: Arc::clone(&lanes[out]),
        incoming: Arc::clone(&lanes[1 - out]),
    };
    (end(0), end(1), Cable(lanes.clone()))
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

    /// Lets go until `left` frames are unflushed.
    fn poll_drain(&mut self, left: usize, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut lane = self.out.lock().unwrap();
        loop {
            if lane.over {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if self.unflushed.len() <= left {
                return Poll::Ready(Ok(()));
            }
            if lane.frames.len() == ROOM {
                lane.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            lane.frames.extend(self.unflushed.pop_front());
            wake(&mut lane.reader);
        }
    }
}

impl Stream for End {
    type Item = io::Result<Frame>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.balks(cx) {
            return Poll::Pending;
        }
        let mut lane = self.incoming.lock().unwrap();
        if let Some(frame) = lane.frames.pop_front() {
            wake(&mut lane.writer);
            return Poll::Ready(Some(Ok(frame)));
        }
        if lane.over {
            return Poll::Ready(None);
        }
        lane.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Sink<Frame> for End {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.balks(cx) { Poll::Pending } else { self.poll_drain(ROOM - 1, cx) }
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        self.unflushed.push_back(frame);
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.balks(cx) { Poll::Pending } else { self.poll_drain(0, cx) }
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(self.poll_drain(0, cx));
        self.out.lock().unwrap().ends();
        Poll::Ready(flushed)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Whatever it has let go arrives.
        self.out.lock().unwrap().ends();
        self.incoming.lock().unwrap().ends();
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

/// What is typed: more at a time than may be under way.
const LINES: [char; 3] = ['o', 't', 'b'];

fn typed(line: char) -> Vec<u8> {
    format!("{}\n", String::from(line).repeat(100_000)).into_bytes()
}

fn byte_at(at: usize) -> u8 {
    (at.wrapping_mul(31) >> 3).to_le_bytes()[0]
}

/// `write`: much output, in pieces. `echo`: what is typed, until the
/// last line. `both`: two who write at a time. `wait`: until it is interrupted.
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
            while !typed.ends_with(b"b\n") {
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
    cables: Arc<Mutex<Vec<Cable>>>,
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
        Self { chance, hub, cables: Arc::default() }
    }

    fn connector(&self) -> impl Connector + use<> {
        let (chance, hub) = (self.chance.clone(), self.hub.clone());
        let cables = Arc::clone(&self.cables);
        move || {
            let (ours, theirs, cable) = link(&chance);
            hub.attach(ours, None);
            cables.lock().unwrap().push(cable);
            async move { Ok(Box::pin(theirs) as BoxLink) }
        }
    }

    fn agent(&self) -> Agent {
        let chance = self.chance.clone();
        Agent::over(self.connector(), "a")
            .unwrap()
            .backoff(quick())
            .slots(3)
            .tail(64 * 1024, Duration::from_secs(3600))
            .connect(move |execution| work(execution, chance.clone()))
    }

    fn dashboard(&self) -> Dashboard {
        Dashboard::over(self.connector()).backoff(quick()).connect()
    }

    /// Cuts some link.
    fn cut(&self) {
        let mut cables = self.cables.lock().unwrap();
        if !cables.is_empty() {
            let one = self.chance.below(u32::try_from(cables.len()).unwrap()) as usize;
            cables.swap_remove(one).cut();
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
    let echoes = [
        bob.run("a", Request::text("echo")).await.unwrap(),
        bob.run("a", Request::text("echo")).await.unwrap(),
    ];
    let both = ann.run("a", Request::text("both")).await.unwrap();
    let wait = bob.run("a", Request::text("wait")).await.unwrap();

    let readers = [&ann, &bob].map(|who| {
        let options = TerminalOptions { window_bytes: 20_000, ..TerminalOptions::default() };
        let terminal = who.terminal_with(Target::Command(much.id()), options);
        tokio::spawn(read(terminal, chance.clone()))
    });
    // Somebody who leaves in the middle.
    let mut glimpse = bob.command(much.id()).terminal();
    let leaver = tokio::spawn(async move {
        for _ in 0..3 {
            glimpse.next().await;
        }
    });
    let heard = echoes
        .each_ref()
        .map(|echo| tokio::spawn(read(ann.command(echo.id()).terminal(), chance.clone())));
    let cutter = async {
        for _ in 0..chance.below(4) {
            for _ in 0..chance.below(300) {
                tokio::task::yield_now().await;
            }
            stage.cut();
        }
    };
    let typing = echoes.each_ref().map(|echo| async {
        for line in LINES {
            bob.input(echo.id(), typed(line)).await.unwrap();
            chance.hesitate().await;
        }
    });
    tokio::join!(cutter, join_all(typing));

    let expected = Sha256::digest((0..OUTPUT_BYTES).map(byte_at).collect::<Vec<u8>>());
    for reader in readers {
        let (bytes, audit) = reader.await.unwrap();
        assert_eq!(Sha256::digest(&bytes), expected, "{} bytes", bytes.len());
        assert_eq!(audit, Audit::Verified);
    }
    leaver.await.unwrap();
    for heard in heard {
        assert!(heard.await.unwrap().0 == LINES.map(typed).concat(), "what was typed was echoed");
    }
    let (bytes, _) = read(both.terminal(), chance.clone()).await;
    assert_eq!(bytes.len(), OUTPUT_BYTES / 20 * 20);
    for command in [&much, &both].into_iter().chain(&echoes) {
        assert_eq!(command.ended().await.unwrap().status, CommandStatus::Completed);
    }
    ann.interrupt(wait.id()).await.unwrap();
    assert_eq!(wait.ended().await.unwrap().status, CommandStatus::Interrupted);

    match chance.below(3) {
        0 => agent.stop().await,
        1 => ann.close().await,
        _ => stage.cut(),
    }
    stage.hub.drain(Duration::ZERO).await;
    assert_eq!(stage.hub.links(), 0);
    drop((agent, ann, bob, much, echoes, both, wait, stage));
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
