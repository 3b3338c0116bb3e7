//! A cable between real sockets that breaks on demand: a TCP proxy whose
//! faults a test chooses, byte by byte.
//!
//! ```text
//!   peer ──► 127.0.0.1:port ──► up ──► target
//!        ◄──                ◄── down ◄──
//! ```
//!
//! A [`Proxy`] is the cable and the way to break it. What is done to a *way*
//! ([`stall`](Proxy::stall), [`throttle`](Proxy::throttle),
//! [`delay`](Proxy::delay), [`chunk`](Proxy::chunk)) holds for connections
//! there are and those to come, until it is undone; what is done to
//! *connections* ([`cut`](Proxy::cut), [`reset`](Proxy::reset),
//! [`half_open`](Proxy::half_open)) concerns those there are. Frames mean
//! nothing here: a cut falls where the bytes say.
//!
//! Each way of a connection holds at most [`HELD_BYTES`]; what a slow reader
//! does not take stays in the sockets' buffers, and then with whoever sends.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::process::now;

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 4 * 1024;
/// Pieces that wait in one way of one connection.
const PIECES_MAX: usize = 14;
/// Most bytes that one way of one connection holds: those that wait, one that
/// is being read, and one that is being written.
pub const HELD_BYTES: usize = (PIECES_MAX + 2) * PIECE_BYTES;
/// A throttled way writes this often.
const THROTTLED_WRITES_PER_SECOND: u64 = 20;

/// One way along the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From whoever dialled to the target.
    Up,
    /// From the target to whoever dialled.
    Down,
}

impl Way {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::Up, Self::Down];
}

/// How a connection is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Both sockets are closed.
    Close,
    /// Both peers get an RST, which overtakes what was on its way.
    Reset,
}

/// What has gone through a [`Proxy`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that reached the target.
    pub connections: u64,
    /// Connections that were refused, or found no target.
    pub refused: u64,
    /// Connections that were cut, reset, or swallowed from here.
    pub broken: u64,
    /// Those among them that were cut after so many bytes.
    pub cut_by_bytes: u64,
    /// Bytes passed on to the target.
    pub up: u64,
    /// Bytes passed on to whoever dialled.
    pub down: u64,
}

/// What is done to everything that goes one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Weather {
    stalled: bool,
    bytes_per_second: Option<u64>,
    delay: Duration,
    chunk: Option<usize>,
}

/// What is done to one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Carried,
    /// Everything is read, nothing is passed on, and nobody is told.
    Swallowed,
    Broken(Cut),
}

impl Fate {
    fn is_broken(self) -> bool {
        matches!(self, Self::Broken(_))
    }
}

#[derive(Debug)]
struct Lane {
    weather: watch::Sender<Weather>,
    /// After how many more bytes, and how, whatever then sends is cut.
    fuse: Mutex<Option<(u64, Cut)>>,
    blown: AtomicU64,
    passed: AtomicU64,
}

impl Lane {
    fn new() -> Self {
        Self {
            weather: watch::Sender::new(Weather::default()),
            fuse: Mutex::new(None),
            blown: AtomicU64::new(0),
            passed: AtomicU64::new(0),
        }
    }

    /// How many of `wanted` bytes may pass now.
    fn spend(&self, wanted: usize) -> usize {
        let mut fuse = locked(&self.fuse);
        let Some((left, _)) = &mut *fuse else { return wanted };
        let may = usize::try_from(*left).unwrap_or(usize::MAX).min(wanted);
        *left -= may as u64;
        may
    }

    /// Blows the fuse if all that it allowed is spent: it does so once.
    fn check(&self) -> Result<(), Cut> {
        let Some((_, cut)) = locked(&self.fuse).take_if(|(left, _)| *left == 0) else {
            return Ok(());
        };
        self.blown.fetch_add(1, Ordering::AcqRel);
        Err(cut)
    }
}

#[derive(Debug)]
struct Shared {
    /// Nowhere while there is none: a free port may soon be somebody else's.
    target: Mutex<Option<SocketAddr>>,
    refuses: Mutex<bool>,
    up: Lane,
    down: Lane,
    live: Mutex<BTreeMap<u64, watch::Sender<Fate>>>,
    connections: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
}

impl Shared {
    fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }
}

/// A cable from 127.0.0.1 to a target. Dropping it closes everything.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Proxy {
    /// A cable to `target`, on a free port of 127.0.0.1; without a target it
    /// refuses whoever dials. It runs on the present runtime.
    ///
    /// # Errors
    ///
    /// When there is no port.
    pub async fn start(target: impl Into<Option<SocketAddr>>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target: Mutex::new(target.into()),
            refuses: Mutex::new(false),
            up: Lane::new(),
            down: Lane::new(),
            live: Mutex::default(),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            broken: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared))).abort_handle();
        Ok(Self { address, shared, accepting })
    }

    /// Where to dial.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where to dial, as a WebSocket's URL.
    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// Leads connections to come to another target, or refuses them.
    pub fn lead_to(&self, target: impl Into<Option<SocketAddr>>) {
        *locked(&self.shared.target) = target.into();
    }

    /// Whether connections to come are reset at once.
    pub fn refuse(&self, refuses: bool) {
        *locked(&self.shared.refuses) = refuses;
    }

    /// Closes both ends of every connection. Says how many there were.
    pub fn cut(&self) -> usize {
        self.decide(Fate::Broken(Cut::Close))
    }

    /// Ends every connection with an RST in both directions. Says how many
    /// there were.
    pub fn reset(&self) -> usize {
        self.decide(Fate::Broken(Cut::Reset))
    }

    /// Swallows all that is sent on the connections there are, both ways, and
    /// leaves them open until both ends have given up or they are cut. Says how
    /// many there were.
    pub fn half_open(&self) -> usize {
        self.decide(Fate::Swallowed)
    }

    /// Closes both ends of every connection that is swallowed: a peer that
    /// still waits hears that it is gone. Says how many there were.
    pub fn cut_swallowed(&self) -> usize {
        self.decide_where(|fate| fate == Fate::Swallowed, Fate::Broken(Cut::Close))
    }

    /// Lets `bytes` more pass on one way, over all connections, and cuts the
    /// one on which the last of them went. A second call replaces the first.
    pub fn cut_after(&self, way: Way, bytes: u64, cut: Cut) {
        *locked(&self.shared.lane(way).fuse) = Some((bytes, cut));
    }

    /// Lets nothing arrive, and takes no more than there is room for.
    pub fn stall(&self, way: Way) {
        self.change(way, |weather| weather.stalled = true);
    }

    /// Ends a stall.
    pub fn resume(&self, way: Way) {
        self.change(way, |weather| weather.stalled = false);
    }

    /// Passes no more than this on each connection; any rate with `None`.
    pub fn throttle(&self, way: Way, bytes_per_second: Option<u64>) {
        let rate = bytes_per_second.map(|rate| rate.max(1));
        self.change(way, |weather| weather.bytes_per_second = rate);
    }

    /// Passes nothing before it has been here for so long.
    pub fn delay(&self, way: Way, delay: Duration) {
        self.change(way, |weather| weather.delay = delay);
    }

    /// Writes at most so many bytes at a time, each write a segment of its own;
    /// as they come with `None`.
    pub fn chunk(&self, way: Way, bytes: Option<usize>) {
        let chunk = bytes.map(|bytes| bytes.max(1));
        self.change(way, |weather| weather.chunk = chunk);
    }

    /// Undoes everything: the ways are clear, no cut is to come, connections
    /// are accepted. Those that are swallowed stay so: what went through them
    /// is lost.
    pub fn heal(&self) {
        for way in Way::BOTH {
            self.change(way, |weather| *weather = Weather::default());
            *locked(&self.shared.lane(way).fuse) = None;
        }
        self.refuse(false);
    }

    /// What has gone through so far.
    pub fn counts(&self) -> Counts {
        let shared = &self.shared;
        let read = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        let cut_by_bytes = read(&shared.up.blown) + read(&shared.down.blown);
        Counts {
            connections: read(&shared.connections),
            refused: read(&shared.refused),
            broken: read(&shared.broken) + cut_by_bytes,
            cut_by_bytes,
            up: read(&shared.up.passed),
            down: read(&shared.down.passed),
        }
    }

    /// Connections that are open now, swallowed ones among them.
    pub fn live(&self) -> usize {
        locked(&self.shared.live).len()
    }

    fn change(&self, way: Way, change: impl FnOnce(&mut Weather)) {
        self.shared.lane(way).weather.send_modify(change);
    }

    fn decide(&self, fate: Fate) -> usize {
        match fate {
            Fate::Broken(_) => self.decide_where(|present| !present.is_broken(), fate),
            Fate::Swallowed | Fate::Carried => {
                self.decide_where(|present| present == Fate::Carried, fate)
            }
        }
    }

    fn decide_where(&self, concerns: impl Fn(Fate) -> bool, fate: Fate) -> usize {
        let live = locked(&self.shared.live);
        let changed = live.values().filter(|connection| {
            connection.send_if_modified(|present| {
                let is_news = concerns(*present);
                if is_news {
                    if *present == Fate::Carried {
                        self.shared.broken.fetch_add(1, Ordering::AcqRel);
                    }
                    *present = fate;
                }
                is_news
            })
        });
        changed.count()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Accepts until it is aborted, and all connections with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut number = 0;
    while let Ok((near, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        number += 1;
        connections.spawn(connect(near, number, Arc::clone(&shared)));
    }
}

/// Takes a connection from the list when it is over, however that comes.
struct Listed {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        locked(&self.shared.live).remove(&self.number);
    }
}

async fn connect(near: TcpStream, number: u64, shared: Arc<Shared>) {
    // Listed before it dials: a cut that comes meanwhile concerns it too.
    let (decided, mut fate) = watch::channel(Fate::Carried);
    locked(&shared.live).insert(number, decided);
    let listed = Listed { shared: Arc::clone(&shared), number };
    let target = *locked(&shared.target);
    let refuses = *locked(&shared.refuses);
    let dialled = async {
        match target {
            Some(target) if !refuses => TcpStream::connect(target).await,
            Some(_) | None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    };
    let far = tokio::select! {
        biased;
        _ = broken(&mut fate) => Err(io::ErrorKind::ConnectionAborted.into()),
        far = dialled => far,
    };
    let Ok(far) = far else {
        shared.refused.fetch_add(1, Ordering::AcqRel);
        drop(listed);
        let _ = near.set_zero_linger(); // closed in order instead
        return;
    };
    shared.connections.fetch_add(1, Ordering::AcqRel);
    carry(near, far, &shared, fate, listed).await;
}

/// Carries bytes both ways until both ends have said their last, or it breaks.
async fn carry(
    mut near: TcpStream,
    mut far: TcpStream,
    shared: &Shared,
    mut fate: watch::Receiver<Fate>,
    listed: Listed,
) {
    for socket in [&near, &far] {
        let _ = socket.set_nodelay(true); // only makes segments larger
    }
    let ending = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let up = pass(near_read, far_write, &shared.up, fate.clone());
        let down = pass(far_read, near_write, &shared.down, fate.clone());
        tokio::select! {
            biased;
            cut = broken(&mut fate) => Some(cut),
            both = async { tokio::try_join!(up, down) } => both.err(),
        }
    };
    if ending == Some(Cut::Reset) {
        for socket in [&near, &far] {
            let _ = socket.set_zero_linger(); // closed in order instead
        }
    }
    // Whoever finds it gone from the list finds its sockets closed.
    drop((near, far));
    drop(listed);
}

/// Waits until the connection is to be broken.
async fn broken(fate: &mut watch::Receiver<Fate>) -> Cut {
    match fate.wait_for(|fate| fate.is_broken()).await.as_deref() {
        Ok(Fate::Broken(cut)) => *cut,
        // Not waited for; or taken from the list, which this holds.
        Ok(Fate::Carried | Fate::Swallowed) | Err(_) => Cut::Close,
    }
}

/// Bytes, and when they were read.
struct Piece {
    data: Bytes,
    at: Instant,
}

/// One way of one connection: read, held as long as the weather asks, and
/// written. An end is passed on behind the last byte; an error resets the
/// connection, as it would come through a cable.
async fn pass(
    mut from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    lane: &Lane,
    mut fate: watch::Receiver<Fate>,
) -> Result<(), Cut> {
    let (pieces, mut pieces_read) = mpsc::channel(PIECES_MAX);
    let reading = async move {
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let length = from.read(&mut buffer).await.map_err(|_| Cut::Reset)?;
            if length == 0 {
                return Ok(());
            }
            let piece = Piece { data: Bytes::copy_from_slice(&buffer[..length]), at: now() };
            if pieces.send(piece).await.is_err() {
                return Ok(()); // the other half says why
            }
        }
    };
    let writing = async {
        tokio::select! {
            biased;
            () = swallowed(&mut fate) => {}
            written = write(&mut pieces_read, to, lane) => return written,
        }
        while pieces_read.recv().await.is_some() {}
        Ok(())
    };
    tokio::try_join!(reading, writing).map(drop)
}

async fn swallowed(fate: &mut watch::Receiver<Fate>) {
    // An error says that the connection is over, and this with it.
    let _ = fate.wait_for(|fate| *fate == Fate::Swallowed).await;
}

async fn write(
    waiting: &mut mpsc::Receiver<Piece>,
    mut to: WriteHalf<'_>,
    lane: &Lane,
) -> Result<(), Cut> {
    let mut weather = lane.weather.subscribe();
    while let Some(Piece { mut data, at }) = waiting.recv().await {
        while !data.is_empty() {
            let present = cleared(&mut weather, at).await;
            let most = present.chunk.unwrap_or(PIECE_BYTES).min(data.len());
            let at_once = |rate: u64| (rate / THROTTLED_WRITES_PER_SECOND).max(1);
            let most = present
                .bytes_per_second
                .map_or(most, |rate| usize::try_from(at_once(rate)).unwrap_or(most).min(most));
            lane.check()?;
            let length = lane.spend(most);
            let part = data.split_to(length);
            to.write_all(&part).await.map_err(|_| Cut::Reset)?;
            lane.passed.fetch_add(length as u64, Ordering::AcqRel);
            lane.check()?;
            if let Some(rate) = present.bytes_per_second {
                let takes = Duration::from_micros(length as u64 * 1_000_000 / rate);
                let until = now() + takes;
                // Clear again: then it need not wait.
                let faster = |new: &Weather| new.bytes_per_second != Some(rate);
                tokio::select! {
                    () = sleep_until(until) => {}
                    _ = weather.wait_for(faster) => {}
                }
            }
        }
    }
    to.shutdown().await.map_err(|_| Cut::Reset)
}

/// Waits until what was read at `at` may be passed on.
async fn cleared(weather: &mut watch::Receiver<Weather>, at: Instant) -> Weather {
    loop {
        let present = *weather.borrow_and_update();
        let due = at + present.delay;
        if !present.stalled && due <= now() {
            return present;
        }
        // No error: the sender lives as long as the proxy's connections.
        tokio::select! {
            () = sleep_until(due), if !present.stalled => {}
            _ = weather.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests;
