//! The load: one agent that writes and many dashboards that read, the same
//! for every server.
//!
//! The agent is the thread that calls; one more thread reads for all
//! dashboards. The agent keeps at most [`Pace::ahead`] chunks under way to the
//! slowest dashboard, so nobody may lose a byte, and a lost byte is an error.

#![expect(clippy::disallowed_methods, reason = "a load keeps real time")]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::net::RecvFlags;

use crate::measure::Histogram;
use crate::wire::{Chunks, Incoming, Piece, Result, client_text, handshake};

/// What serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The hub.
    Hub,
    /// One `write` per frame and socket.
    Each,
    /// One `write` per socket for all frames that are there.
    Gathered,
}

/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a dashboard reads at a time.
const READ_BYTES: usize = 64 * 1024;

/// Frames that the agent writes at a time when nothing holds it back.
const BURST: u64 = 64;

/// How fast the agent writes.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Chunks per second, each with a `write` of its own; `None`: as fast as
    /// the slowest dashboard reads.
    pub per_second: Option<u32>,
    /// Chunks under way, at most.
    pub ahead: u64,
}

/// What came of a phase.
#[derive(Debug, Default)]
pub struct Phase {
    /// Chunks that the agent wrote.
    pub chunks: u64,
    /// Until the last dashboard had the last byte.
    pub took: Duration,
    /// What the dashboards saw of them.
    pub seen: Seen,
}

/// What all dashboards together saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Frames that carried output.
    pub frames: u64,
    /// Of every chunk at every dashboard, from before the agent's `write` to
    /// after the `read` with the chunk's last byte.
    pub latencies: Histogram,
}

/// One side of a connection, greeted. Whoever it is hears of no error: the
/// first one fails the measurement.
#[derive(Debug)]
pub struct Peer {
    socket: TcpStream,
    incoming: Incoming,
    heard: VecDeque<String>,
}

impl Peer {
    /// Connects, greets, and is let in.
    pub fn connect(address: SocketAddr, greeting: &str) -> Result<Self> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        handshake(&mut socket)?;
        let mut peer = Self { socket, incoming: Incoming::default(), heard: VecDeque::new() };
        peer.say(greeting)?;
        peer.hear("connection:ack")?;
        Ok(peer)
    }

    /// Sends a message.
    pub fn say(&mut self, json: &str) -> Result<()> {
        Ok(self.socket.write_all(&client_text(json)?)?)
    }

    /// Waits for a message of a type; others are passed over.
    pub fn hear(&mut self, kind: &str) -> Result<()> {
        let mark = format!("\"type\":\"{kind}\"");
        loop {
            while let Some(text) = self.heard.pop_front() {
                if text.contains(&mark) {
                    return Ok(());
                }
                check(&text)?;
            }
            self.listen(RecvFlags::empty())?;
        }
    }

    /// Reads once what is there. Returns whether there was anything.
    fn listen(&mut self, flags: RecvFlags) -> Result<bool> {
        let mut buffer = [0; 4096];
        let len = match rustix::net::recv(&self.socket, &mut buffer, flags) {
            Ok((0, _)) => return Err("the server is gone".into()),
            Ok((len, _)) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock && !flags.is_empty() => {
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        let heard = &mut self.heard;
        self.incoming.feed(&buffer[..len], |piece| match piece {
            Piece::Text(text) => {
                heard.push_back(text.to_owned());
                Ok(())
            }
            Piece::Output { .. } => Err("output before the agent wrote any".into()),
        })?;
        Ok(true)
    }
}

/// No message may say that something was lost or refused.
fn check(text: &str) -> Result<()> {
    if text.contains("\"type\":\"error\"") || text.contains("\"type\":\"terminal:gap\"") {
        return Err(text.into());
    }
    Ok(())
}

/// What the two threads know of each other.
struct Progress {
    /// Bytes that every dashboard has.
    slowest: AtomicU64,
    /// The agent waits for this many.
    wanted: AtomicU64,
    agent: Thread,
    /// Dashboards to which the stream was announced.
    opened: AtomicUsize,
    stop: AtomicBool,
    failure: Mutex<Option<String>>,
    seen: Mutex<Seen>,
    /// When each chunk under way was written, in nanoseconds since `start`.
    sent_at: Vec<AtomicU64>,
    start: Instant,
    chunks: Chunks,
}

impl Progress {
    #[expect(clippy::cast_possible_truncation, reason = "585 years")]
    fn nanos(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "the remainder is small")]
    fn sent_at(&self, chunk: u64) -> &AtomicU64 {
        &self.sent_at[(chunk % self.sent_at.len() as u64) as usize]
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: &dyn std::fmt::Display) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        self.agent.unpark();
    }

    fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure.clone().into()),
            None => Ok(()),
        }
    }

    /// Waits until every dashboard has `bytes`.
    fn wait_for(&self, bytes: u64) -> Result<()> {
        let since = Instant::now();
        self.wanted.store(bytes, SeqCst);
        while self.slowest.load(SeqCst) < bytes {
            self.check()?;
            if since.elapsed() > PATIENCE {
                return Err("a dashboard waits for bytes that do not come".into());
            }
            thread::park_timeout(Duration::from_millis(100));
        }
        Ok(())
    }
}

/// An agent and its dashboards, connected.
pub struct Load {
    agent: Peer,
    progress: Arc<Progress>,
    reading: Option<JoinHandle<()>>,
    dashboards: usize,
    /// Chunks written.
    written: u64,
    /// The agent may write up to here.
    allowed: u64,
    burst: Vec<u8>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.progress.stop.store(true, SeqCst);
        if let Some(reading) = self.reading.take() {
            // A panic there was reported there.
            let _ = reading.join();
        }
    }
}

impl Load {
    /// Connects everyone, and starts the command whose output is watched.
    pub fn connect(
        address: SocketAddr,
        kind: Kind,
        dashboards: usize,
        chunks: Chunks,
    ) -> Result<Self> {
        let agent = Peer::connect(
            address,
            r#"{"type":"agent:connect","payload":{"protocols":[1],"agent":"bench",
                "instance":"0191d4a8-5a3c-7f00-8000-0000000000aa","features":["binary"]}}"#,
        )?;
        let mut readers = Vec::new();
        for _ in 0..dashboards {
            let mut peer = Peer::connect(
                address,
                r#"{"type":"dashboard:connect","payload":{"protocols":[1],"features":["binary"]}}"#,
            )?;
            if kind == Kind::Hub {
                peer.say(
                    r#"{"type":"subscribe","id":"s","payload":{"terminals":[{"agent":"bench"}]}}"#,
                )?;
                peer.hear("ok")?;
            }
            readers.push(Dashboard { peer, has: 0, chunks });
        }
        let progress = Arc::new(Progress {
            slowest: AtomicU64::new(0),
            wanted: AtomicU64::new(u64::MAX),
            agent: thread::current(),
            opened: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            seen: Mutex::default(),
            sent_at: (0..1 << 16).map(|_| AtomicU64::new(0)).collect(),
            start: Instant::now(),
            chunks,
        });
        let allowed = if kind == Kind::Hub { 0 } else { u64::MAX };
        let mut load = Self {
            agent,
            progress,
            reading: None,
            dashboards,
            written: 0,
            allowed,
            burst: Vec::new(),
        };
        if kind == Kind::Hub {
            load.start_command(&mut readers)?;
        }
        load.start_reading(readers)?;
        if kind == Kind::Hub {
            load.wait_until_opened()?;
        }
        Ok(load)
    }

    fn start_command(&mut self, readers: &mut [Dashboard]) -> Result<()> {
        let command = "0191d4a8-5a3c-7f00-8000-0000000000cc";
        let asking = readers.first_mut().ok_or("no dashboards")?;
        asking.peer.say(&format!(
            r#"{{"type":"command:request","id":"r","payload":{{"command":"{command}",
                "agent":"bench","spec":{{"run":{{"text":"fan out"}}}}}}}}"#
        ))?;
        self.agent.hear("command:execute")?;
        let about = format!(r#""command":"{command}","attempt":1"#);
        self.agent.say(&format!(r#"{{"type":"command:accepted","payload":{{{about}}}}}"#))?;
        self.agent.say(&format!(
            r#"{{"type":"command:started","payload":{{{about},
                "stream":"0191d4a8-5a3c-7f00-8000-000000000001"}}}}"#
        ))
    }

    fn start_reading(&mut self, mut readers: Vec<Dashboard>) -> Result<()> {
        for reader in &mut readers {
            reader.peer.socket.set_nonblocking(true)?;
            for text in std::mem::take(&mut reader.peer.heard) {
                hear(&text, &self.progress)?;
            }
        }
        let progress = Arc::clone(&self.progress);
        self.reading = Some(thread::spawn(move || {
            if let Err(error) = read_all(&mut readers, &progress) {
                progress.fail(&error);
            }
        }));
        Ok(())
    }

    fn wait_until_opened(&mut self) -> Result<()> {
        let since = Instant::now();
        while self.progress.opened.load(SeqCst) < self.dashboards {
            self.progress.check()?;
            if since.elapsed() > PATIENCE {
                return Err("the stream was not announced to everyone".into());
            }
            thread::park_timeout(Duration::from_millis(5));
        }
        while self.allowed == 0 {
            self.hear_allowed(RecvFlags::empty())?;
        }
        Ok(())
    }

    /// Writes for `time` at a pace, and waits until everybody has everything.
    pub fn run(&mut self, pace: Pace, time: Duration) -> Result<Phase> {
        *self.progress.seen() = Seen::default();
        let first = self.written;
        let begin = Instant::now();
        match pace.per_second {
            Some(per_second) => {
                for beat in 0.. {
                    let due = Duration::from_secs(1) / per_second * beat;
                    if due >= time {
                        break;
                    }
                    thread::sleep(due.saturating_sub(begin.elapsed()));
                    self.make_room(pace.ahead, 1)?;
                    self.write(1)?;
                }
            }
            None => {
                while begin.elapsed() < time {
                    let room = self.make_room(pace.ahead, pace.ahead / 4)?;
                    self.write(room.min(BURST))?;
                }
            }
        }
        self.progress.wait_for(self.written * self.progress.chunks.bytes as u64)?;
        self.progress.check()?;
        let took = begin.elapsed();
        let seen = std::mem::take(&mut *self.progress.seen());
        Ok(Phase { chunks: self.written - first, took, seen })
    }

    /// Waits until at least `needed` chunks may be written, and says how many.
    fn make_room(&mut self, ahead: u64, needed: u64) -> Result<u64> {
        let bytes = self.progress.chunks.bytes as u64;
        let until = (self.written + needed).saturating_sub(ahead);
        self.progress.wait_for(until * bytes)?;
        while (self.written + needed) * bytes > self.allowed {
            self.hear_allowed(RecvFlags::empty())?;
        }
        let under_way = self.written - self.progress.slowest.load(SeqCst) / bytes;
        Ok((ahead - under_way).min(self.allowed / bytes - self.written))
    }

    fn write(&mut self, count: u64) -> Result<()> {
        let Progress { chunks, .. } = *self.progress;
        self.burst.clear();
        let now = self.progress.nanos();
        for number in self.written..self.written + count {
            chunks.append_agent_frame(number, &mut self.burst);
            self.progress.sent_at(number).store(now, SeqCst);
        }
        self.written += count;
        self.agent.socket.write_all(&self.burst)?;
        // Grants are taken in while they are not needed yet.
        if self.allowed != u64::MAX && self.written.is_multiple_of(BURST) {
            self.hear_allowed(RecvFlags::DONTWAIT)?;
        }
        Ok(())
    }

    /// Reads the grants that are there.
    fn hear_allowed(&mut self, flags: RecvFlags) -> Result<()> {
        self.agent.listen(flags)?;
        while let Some(text) = self.agent.heard.pop_front() {
            check(&text)?;
            if let Some((_, rest)) = text.split_once("\"allowed\":") {
                let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
                self.allowed = self.allowed.max(digits.parse()?);
            }
        }
        Ok(())
    }
}

/// A dashboard that only counts.
struct Dashboard {
    peer: Peer,
    /// Bytes of the stream.
    has: u64,
    chunks: Chunks,
}

impl Dashboard {
    /// Reads once.
    fn read(&mut self, buffer: &mut [u8], progress: &Progress, seen: &mut Seen) -> Result<()> {
        let len = match self.peer.socket.read(buffer) {
            Ok(0) => return Err("the server hung up on a dashboard".into()),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let now = progress.nanos();
        let mut incoming = std::mem::take(&mut self.peer.incoming);
        incoming.feed(&buffer[..len], |piece| match piece {
            Piece::Output { offset, bytes, begins } => {
                seen.frames += u64::from(begins);
                self.take(offset, bytes, now, progress, seen)
            }
            Piece::Text(text) => hear(text, progress),
        })?;
        self.peer.incoming = incoming;
        Ok(())
    }

    fn take(
        &mut self,
        offset: u64,
        bytes: &[u8],
        now: u64,
        progress: &Progress,
        seen: &mut Seen,
    ) -> Result<()> {
        if offset != self.has {
            return Err(format!("bytes at {offset} where {} were next", self.has).into());
        }
        let chunk_bytes = self.chunks.bytes as u64;
        let end = offset + bytes.len() as u64;
        for chunk in offset / chunk_bytes..end / chunk_bytes {
            seen.latencies.add(now.saturating_sub(progress.sent_at(chunk).load(SeqCst)));
        }
        // A number that is cut in two by the end of a read goes unchecked.
        for chunk in offset.div_ceil(chunk_bytes)..end.div_ceil(chunk_bytes) {
            let at = usize::try_from(chunk * chunk_bytes - offset)?;
            if let Some(number) = bytes.get(at..at + 8)
                && number != chunk.to_be_bytes()
            {
                return Err(format!("chunk {chunk} holds other bytes than were written").into());
            }
        }
        self.has = end;
        Ok(())
    }
}

/// What a dashboard is told beside output.
fn hear(text: &str, progress: &Progress) -> Result<()> {
    check(text)?;
    if text.contains("\"type\":\"terminal:opened\"") {
        progress.opened.fetch_add(1, SeqCst);
    }
    Ok(())
}

/// Reads for all dashboards until told to stop.
fn read_all(dashboards: &mut [Dashboard], progress: &Progress) -> Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (number, dashboard) in (0..).zip(dashboards.iter()) {
        let data = epoll::EventData::new_u64(number);
        epoll::add(&poll, &dashboard.peer.socket, data, epoll::EventFlags::IN)?;
    }
    let patience = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let mut events = Vec::with_capacity(1024);
    let mut buffer = vec![0; READ_BYTES];
    while !progress.stop.load(SeqCst) {
        events.clear();
        match epoll::wait(&poll, spare_capacity(&mut events), Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut seen = progress.seen();
        for event in &events {
            let number = usize::try_from(event.data.u64())?;
            dashboards[number].read(&mut buffer, progress, &mut seen)?;
        }
        drop(seen);
        let slowest = dashboards.iter().map(|dashboard| dashboard.has).min().unwrap_or(0);
        progress.slowest.store(slowest, SeqCst);
        let wanted = progress.wanted.load(SeqCst);
        // The agent may want more by now, and is not to be forgotten then.
        if slowest >= wanted
            && progress.wanted.compare_exchange(wanted, u64::MAX, SeqCst, SeqCst).is_ok()
        {
            progress.agent.unpark();
        }
    }
    Ok(())
}
