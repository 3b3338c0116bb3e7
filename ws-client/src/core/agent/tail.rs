//! One stream as its agent has it: the last bytes of it, how far the hub has
//! taken it, and how far it may be sent.
//!
//! ```text
//!        gone            kept for a hub that forgets     unstored: the program is held
//!                                                        when this fills the other half
//!   0 ────────────┬──────────────────────────────┬──────────────┬──────────────┐
//!                start                          stored         sent           end
//!                                                       ◄─ up to `allowed` ─►
//! ```

use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use trunkline_protocol::codec::binary::OUTPUT_HEADER_BYTES;
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{Channel, Gap, GapReason, HeldStream, TerminalGap};
use trunkline_protocol::stream::{
    CHUNK_BYTES_MAX, CHUNK_OVERHEAD_BYTES, Coalescer, Coalescing, Log, Read,
};

/// Most that is taken in one write, so that the lock around the core is held
/// for microseconds.
const WRITE_BYTES_MAX: usize = 4 * CHUNK_BYTES_MAX;

/// The smallest tail: below, the bookkeeping would be most of it.
const TAIL_BYTES_MIN: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Tail {
    log: Log,
    bytes_max: usize,
    coalescer: Coalescer,
    digest: Sha256,
    /// The hub had everything below, when it was last heard of.
    stored: u64,
    /// Some hub had everything below, once.
    delivered: u64,
    /// `None` until the hub has said, on this link, where it stands.
    flow: Option<Flow>,
    hold: Hold,
    finished: bool,
}

#[derive(Debug)]
struct Flow {
    /// Sent up to here on this link.
    sent: u64,
    /// May be sent up to here.
    allowed: u64,
    /// The hub has spoken of this stream on this link.
    confirmed: bool,
}

/// Whether the program may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Free,
    /// There has been no room since then.
    Held(Duration),
    /// It was held long enough: the oldest bytes give way.
    GivenUp,
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
            bytes_max: bytes_max.max(TAIL_BYTES_MIN),
            coalescer: Coalescer::new(coalescing),
            digest: Sha256::new(),
            stored: 0,
            delivered: 0,
            flow: None,
            hold: Hold::Free,
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

    // ---- the program's side ---------------------------------------------

    /// Appends what there is room for, and says how much that was; 0 is:
    /// wait.
    pub(super) fn write(
        &mut self,
        channel: Channel,
        bytes: &[u8],
        patience: Duration,
        now: Duration,
    ) -> usize {
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES_MAX).min(self.bytes_max / 4)];
        if !self.make_room(bytes.len(), patience, now) {
            return 0;
        }
        // At its own end: there is no jump, and every byte is new.
        if self.log.append(self.log.end(), channel, bytes).is_ok() {
            self.digest.update(bytes);
            self.coalescer.handle_written(self.log.end(), now);
        }
        bytes.len()
    }

    fn make_room(&mut self, bytes: usize, patience: Duration, now: Duration) -> bool {
        let chunks = bytes.div_ceil(CHUNK_BYTES_MAX);
        let needed = bytes + chunks * (CHUNK_OVERHEAD_BYTES + OUTPUT_HEADER_BYTES);
        let keep = self.bytes_max.saturating_sub(needed);
        // What the hub has goes first, down to half of the tail: a hub may be
        // killed before it has passed on what it took.
        while self.log.cost() > keep && self.stored_cost() > self.bytes_max / 2 {
            let oldest = self.log.start() + CHUNK_BYTES_MAX as u64;
            if self.log.evict_before(oldest.min(self.stored)) == 0 {
                break;
            }
        }
        if self.log.cost() <= keep {
            self.hold = Hold::Free;
            return true;
        }
        match self.hold {
            Hold::Free => {
                self.hold = Hold::Held(now);
                false
            }
            Hold::Held(since) if now < since.saturating_add(patience) => false,
            Hold::Held(_) | Hold::GivenUp => {
                self.hold = Hold::GivenUp;
                self.log.evict_to(keep);
                true
            }
        }
    }

    /// About what the bytes cost that the hub has: their share of all.
    fn stored_cost(&self) -> usize {
        let kept = self.log.end() - self.log.start();
        let stored = self.stored.saturating_sub(self.log.start());
        let share = self.log.cost() as u128 * u128::from(stored) / u128::from(kept.max(1));
        usize::try_from(share).unwrap_or(usize::MAX)
    }

    /// Lets time pass. Says whether a program that was held may go on.
    pub(super) fn handle_timeout(&mut self, patience: Duration, now: Duration) -> bool {
        // What is due stays due while the link is slow, without a timer.
        self.coalescer.due(now);
        let over = self.hold_deadline(patience).is_some_and(|at| at <= now);
        if over {
            self.hold = Hold::GivenUp;
        }
        over
    }

    /// When a program that is held is let go.
    pub(super) fn hold_deadline(&self, patience: Duration) -> Option<Duration> {
        match self.hold {
            Hold::Held(since) if !self.finished => Some(since.saturating_add(patience)),
            Hold::Held(_) | Hold::Free | Hold::GivenUp => None,
        }
    }

    /// The end of the stream: its length and its digest.
    pub(super) fn finish(&mut self) -> (u64, String) {
        use std::fmt::Write as _;
        self.finished = true;
        self.coalescer.flush();
        let mut digest = String::from("sha256:");
        for byte in self.digest.clone().finalize() {
            // Writing to a string cannot fail.
            let _ = write!(digest, "{byte:02x}");
        }
        (self.log.end(), digest)
    }

    /// Gives up every byte that is kept. What the hub does not have becomes a
    /// gap.
    pub(super) fn give_up(&mut self) {
        self.log.evict_to(0);
    }

    // ---- the hub's side -------------------------------------------------

    /// A new link: nothing is sent before the hub has said where it stands.
    pub(super) fn handle_link(&mut self) {
        self.flow = None;
    }

    /// The stream begins on this link: there is nothing to wait for.
    pub(super) fn begin(&mut self, allowed: u64) {
        self.flow = Some(Flow { sent: 0, allowed, confirmed: false });
    }

    /// The hub has everything below `stored` and takes up to `allowed`. Says
    /// whether there may be room for a program that was held.
    pub(super) fn handle_taken(&mut self, stored: u64, allowed: u64) -> bool {
        let stored = stored.min(self.log.end());
        if let Some(flow) = &mut self.flow {
            flow.confirmed = true;
            flow.allowed = flow.allowed.max(allowed);
            flow.sent = flow.sent.max(stored);
            self.stored = self.stored.max(stored);
        } else {
            // Another hub may have less than the last one had.
            self.flow = Some(Flow { sent: stored, allowed, confirmed: true });
            self.stored = stored;
        }
        self.delivered = self.delivered.max(stored);
        self.hold != Hold::Free
    }

    /// The hub missed something: sends again from what it has.
    pub(super) fn rewind(&mut self) {
        if let Some(flow) = &mut self.flow {
            flow.sent = flow.sent.min(self.stored);
        }
    }

    /// The hub does not know a stream. If it has never spoken of this one,
    /// this may be it: nothing more is sent until it does.
    pub(super) fn doubt(&mut self) {
        if self.flow.as_ref().is_some_and(|flow| !flow.confirmed) {
            self.flow = None;
        }
    }

    /// Whether nothing remains to be sent, as far as is known.
    pub(super) fn is_sent(&self) -> bool {
        let sent = self.flow.as_ref().map_or(self.stored, |flow| flow.sent);
        sent >= self.log.end()
    }

    /// Whether something goes out as soon as the hub allows it.
    pub(super) fn is_sending(&self) -> bool {
        self.flow.as_ref().is_some_and(|flow| flow.sent < self.log.end())
    }

    /// When more will be due by the passing of time.
    pub(super) fn send_deadline(&self) -> Option<Duration> {
        let flow = self.flow.as_ref()?;
        let blocked = flow.sent >= flow.allowed || flow.sent >= self.log.end();
        if blocked { None } else { self.coalescer.deadline() }
    }

    /// The next piece that is due and allowed, of at most `chunk_bytes_max`.
    pub(super) fn poll_send(&mut self, chunk_bytes_max: u64, now: Duration) -> Option<Sent> {
        let flow = self.flow.as_mut()?;
        if flow.sent >= self.log.end() {
            return None;
        }
        let start = self.log.start();
        let read = if flow.sent < start.min(self.delivered) {
            // It was given up because a hub had it, which this one does not.
            let (from, to) = (flow.sent, start.min(self.delivered));
            Read::Gap(Gap { from, to, reason: GapReason::HubLoss })
        } else if flow.sent < start {
            // What is lost is said at once, whatever is granted.
            self.log.read(flow.sent)
        } else {
            let cut = flow.sent.saturating_add(chunk_bytes_max);
            let up_to = self.coalescer.due(now).min(flow.allowed).min(cut);
            self.log.read_gathered(flow.sent, up_to)
        };
        match read {
            Read::Chunk { frame, next } => {
                flow.sent = next;
                Some(Sent::Chunk(frame))
            }
            Read::Gap(gap) => {
                flow.sent = gap.to;
                let (from, to, reason) = (gap.from, gap.to, gap.reason);
                Some(Sent::Gap(TerminalGap { stream: self.log.stream(), from, to, reason }))
            }
            Read::End => None,
        }
    }
}
