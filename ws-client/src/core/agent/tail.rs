//! One stream as its agent has it: the last bytes of it, how far the hub has
//! taken it, and how far it may be sent.

use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{Channel, GapReason, HeldStream, TerminalGap};
use trunkline_protocol::stream::{CHUNK_BYTES_MAX, Coalescer, Coalescing, Log, Read};

#[derive(Debug)]
pub(super) struct Tail {
    log: Log,
    bytes_max: usize,
    coalescer: Coalescer,
    digest: Sha256,
    /// The hub has everything below.
    stored: u64,
    /// May be sent up to here.
    allowed: u64,
    /// Sent up to here on this link.
    sent: u64,
    /// Whether the hub has said, on this link, where it stands.
    positioned: bool,
    /// Since when the program is held for lack of room.
    held_since: Option<Duration>,
    /// It was held long enough: the oldest bytes give way.
    overflowing: bool,
    finished: bool,
}

/// What is sent next.
#[derive(Debug)]
pub(super) enum Sent {
    /// A binary `terminal:output`.
    Chunk(Bytes),
    Gap(TerminalGap),
}

impl Tail {
    pub(super) fn new(stream: StreamId, bytes_max: usize, coalescing: Coalescing) -> Self {
        Self {
            log: Log::new(stream).evicting_as(GapReason::AgentOverflow),
            bytes_max,
            coalescer: Coalescer::new(coalescing),
            digest: Sha256::new(),
            stored: 0,
            allowed: 0,
            sent: 0,
            positioned: false,
            held_since: None,
            overflowing: false,
            finished: false,
        }
    }

    pub(super) fn stream(&self) -> StreamId {
        self.log.stream()
    }

    pub(super) fn cost(&self) -> usize {
        self.log.cost()
    }

    pub(super) fn listed(&self) -> HeldStream {
        HeldStream { stream: self.log.stream(), from: self.log.start(), to: self.log.end() }
    }

    /// Whether something is still to be sent, or was sent and not yet taken
    /// far enough to send the rest.
    pub(super) fn is_sending(&self) -> bool {
        self.sent < self.log.end()
    }

    /// Appends what there is room for; 0 is: wait.
    pub(super) fn write(
        &mut self,
        channel: Channel,
        bytes: &[u8],
        hold: Duration,
        now: Duration,
    ) -> usize {
        let bytes = &bytes[..bytes.len().min(4 * CHUNK_BYTES_MAX)];
        if !self.make_room(bytes.len(), hold, now) {
            return 0;
        }
        // Appended at its own end: there is no jump.
        if self.log.append(self.log.end(), channel, bytes).is_ok() {
            self.digest.update(bytes);
            self.coalescer.handle_written(self.log.end(), now);
        }
        bytes.len()
    }

    fn make_room(&mut self, bytes: usize, hold: Duration, now: Duration) -> bool {
        let full = |tail: &Self| tail.log.cost() + bytes > tail.bytes_max && tail.log.cost() > 0;
        // What the hub has goes first; it is only kept for a hub that forgets.
        while full(self) && self.log.start() + CHUNK_BYTES_MAX as u64 <= self.stored {
            if self.log.evict_oldest() == 0 {
                break;
            }
        }
        if !full(self) {
            self.held_since = None;
            self.overflowing = false;
            return true;
        }
        let since = *self.held_since.get_or_insert(now);
        if !self.overflowing && now < since.saturating_add(hold) {
            return false;
        }
        self.overflowing = true;
        while full(self) {
            if self.log.evict_oldest() == 0 {
                break;
            }
        }
        true
    }

    /// Whether a program that is held may go on. What was gathered long enough
    /// is due from now on, even if the link takes nothing: a deadline that has
    /// come must not stay one.
    pub(super) fn handle_timeout(&mut self, hold: Duration, now: Duration) -> bool {
        self.coalescer.due(now);
        let over = self.hold_deadline(hold).is_some_and(|at| at <= now);
        if over {
            self.overflowing = true;
        }
        over
    }

    pub(super) fn hold_deadline(&self, hold: Duration) -> Option<Duration> {
        let since = self.held_since.filter(|_| !self.overflowing && !self.finished)?;
        Some(since.saturating_add(hold))
    }

    /// The end of the stream: its length and its digest.
    pub(super) fn finish(&mut self) -> (u64, Option<String>) {
        self.finished = true;
        self.coalescer.flush();
        let digest = self.digest.clone().finalize();
        let hex = digest.iter().fold(String::from("sha256:"), |mut hex, byte| {
            use std::fmt::Write as _;
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        (self.log.end(), Some(hex))
    }

    /// A new link: nothing is sent before the hub has said where it stands.
    pub(super) fn handle_link(&mut self) {
        self.positioned = false;
    }

    /// The hub stands at `stored` and takes up to `allowed`, on this link.
    pub(super) fn position(&mut self, stored: u64, allowed: u64) {
        self.positioned = true;
        self.stored = stored.min(self.log.end());
        self.sent = self.stored;
        self.allowed = allowed;
    }

    /// Returns whether there may be room for the program now.
    pub(super) fn handle_taken(&mut self, stored: u64, allowed: u64) -> bool {
        if self.positioned {
            self.stored = self.stored.max(stored.min(self.log.end()));
            self.allowed = self.allowed.max(allowed);
        } else {
            self.position(stored, allowed);
        }
        self.held_since.is_some()
    }

    /// The hub missed something: from what it has, again.
    pub(super) fn rewind(&mut self) {
        self.sent = self.sent.min(self.stored);
    }

    pub(super) fn send_deadline(&self) -> Option<Duration> {
        let blocked = !self.positioned || self.sent >= self.allowed || self.sent >= self.log.end();
        if blocked { None } else { self.coalescer.deadline() }
    }

    /// The next piece that is due and allowed.
    pub(super) fn poll_send(&mut self, now: Duration) -> Option<Sent> {
        if !self.positioned || self.sent >= self.log.end() {
            return None;
        }
        let stream = self.log.stream();
        if self.sent < self.log.start() {
            // What is lost is said at once, whatever is granted.
            if let Read::Gap(gap) = self.log.read_limited(self.sent, u64::MAX) {
                self.sent = gap.to;
                self.allowed = self.allowed.max(gap.to);
                let (from, to, reason) = (gap.from, gap.to, gap.reason);
                return Some(Sent::Gap(TerminalGap { stream, from, to, reason }));
            }
        }
        let up_to = self.coalescer.due(now).max(self.sent).min(self.allowed);
        match self.log.read_gathered(self.sent, up_to) {
            Read::Chunk { frame, next } => {
                self.sent = next;
                Some(Sent::Chunk(frame))
            }
            Read::Gap(gap) => {
                self.sent = gap.to;
                let (from, to, reason) = (gap.from, gap.to, gap.reason);
                Some(Sent::Gap(TerminalGap { stream, from, to, reason }))
            }
            Read::End => None,
        }
    }
}
