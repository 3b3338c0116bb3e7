//! A log keeps the newest bytes of one stream, addressed by offset, within a
//! bound, and hands them to any number of readers.
//!
//! It is a row of *segments* without space between them: chunks, each a
//! complete binary frame that all readers share, and holes, each with its
//! reason. A reader is nothing but an offset: it asks for the step at that
//! offset and gets bytes, a gap, or the news that it is at the end.
//!
//! ```text
//!        bytes gone, two reasons       old: compacted          young: as written
//!   0 ────────────┬───────────────┬───────────────────────┬───────────────────┐
//!     never held  │   evicted     │ chunk  chunk hole ... │ c c c c ... c c c │
//!   ──────────────┴───────────────┴───────────────────────┴───────────────────┘
//!                                start                                       end
//! ```
//!
//! Which reason a reader below `start` hears:
//!
//! - Below where the log began, the reason it was begun with
//!   ([`Log::new_after_loss`]), for ever.
//! - From there to `start`, the eviction reason. Names of holes are memory too
//!   and are evicted in their turn: a hole among evicted bytes is told as
//!   evicted along with them, in one gap. Only a hole at the very beginning,
//!   with nothing before it, keeps its reason: it is where the log began.
//! - So a reader far behind hears at most two gaps before `start`.
//!
//! The newest [`YOUNG_CHUNKS`] segments stay as they were written, so that all
//! who follow closely share the same frames. Older ones are gathered into
//! frames of up to [`CHUNK_BYTES_MAX`], so that a program that writes byte by
//! byte costs no more memory than its bytes and a reader far behind reads few
//! large frames. Each byte is moved a constant number of times.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;

use super::kept::Kept;
use super::segment::{CHUNK_BYTES_MAX, Content, Segment, Span};
use crate::codec::binary::{OUTPUT_HEADER_BYTES, OutputHeader, encode_output};
use crate::ids::StreamId;
use crate::message::{Channel, Gap, GapReason};

/// How many of the newest segments are left as they were written: 256.
pub const YOUNG_CHUNKS: usize = 256;

/// Longest chunk that is put into one frame with others: what is longer costs
/// less as it is than it would to copy.
const GATHERED_PAYLOAD_MAX: usize = 4 * 1024;

/// Bytes that do not follow on what is there, without a gap that says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream goes on at offset {expected}, not at {got}")]
pub struct Jump {
    /// Where the stream goes on.
    pub expected: u64,
    /// What came instead; always greater.
    pub got: u64,
}

/// One step of a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// Bytes.
    Chunk {
        /// A complete frame, 1 to [`CHUNK_BYTES_MAX`] terminal bytes, the
        /// first of which stands where the reader stood.
        frame: Bytes,
        /// Where the reader stands after it.
        next: u64,
    },
    /// A hole that begins where the reader stands. It goes on at `to`.
    Gap(Gap),
    /// Nothing now: the reader is at the end, or beyond it, or at its limit.
    End,
}

/// The newest bytes of one stream. See the module for how it is laid out.
///
/// It never drops anything by itself: whoever owns it calls
/// [`evict_to`](Self::evict_to) after it grew.
pub struct Log {
    stream: StreamId,
    end: u64,
    /// Bytes below were never here, and why.
    begun: u64,
    begun_reason: GapReason,
    evicted_reason: GapReason,
    old: VecDeque<Segment>,
    young: VecDeque<Segment>,
    texts: Kept,
    gathered: Kept,
    /// Of the segments; what is kept beside them knows its own.
    cost: usize,
    payload: usize,
}

impl Log {
    /// A log of a stream from its first byte on.
    pub fn new(stream: StreamId) -> Self {
        Self::new_after_loss(stream, 0, GapReason::HubLoss)
    }

    /// A log that begins at offset `start` with nothing in it; a reader below
    /// is told `reason`. For a hub that lost its memory and is refilled from
    /// an agent's tail that is [`GapReason::HubLoss`].
    pub fn new_after_loss(stream: StreamId, start: u64, reason: GapReason) -> Self {
        Self {
            stream,
            end: start,
            begun: start,
            begun_reason: reason,
            evicted_reason: GapReason::Evicted,
            old: VecDeque::new(),
            young: VecDeque::new(),
            texts: Kept::texts(),
            gathered: Kept::gathered(),
            cost: 0,
            payload: 0,
        }
    }

    /// The same log, with another reason for what it evicts: an agent's tail
    /// that drops what the hub never had says [`GapReason::AgentOverflow`].
    #[must_use]
    pub fn evicting_as(mut self, reason: GapReason) -> Self {
        self.evicted_reason = reason;
        self
    }

    /// Whose bytes these are.
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// The oldest offset of which the log still knows something, a byte or the
    /// name of a hole; [`end`](Self::end) when it knows nothing.
    pub fn start(&self) -> u64 {
        self.old.front().or(self.young.front()).map_or(self.end, |oldest| oldest.offset)
    }

    /// The offset after the newest byte or hole.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Memory in use, in bytes: frames with their headers, those kept for
    /// [`read_text`](Self::read_text) and [`read_shared`](Self::read_shared),
    /// and [`CHUNK_OVERHEAD_BYTES`](super::CHUNK_OVERHEAD_BYTES) for each chunk,
    /// hole and kept frame. An empty log counts 0.
    pub fn cost(&self) -> usize {
        self.cost + self.texts.cost() + self.gathered.cost()
    }

    /// Terminal bytes kept, without holes and bookkeeping.
    pub fn payload_bytes(&self) -> usize {
        self.payload
    }

    /// Adds `payload`, whose first byte stands at `offset`, and says how many
    /// of its bytes were new: those below [`end`](Self::end) are known, or
    /// known to be missing, and are ignored, so that sending again is
    /// harmless. The payload is copied; more than [`CHUNK_BYTES_MAX`] becomes
    /// several chunks.
    ///
    /// An `offset` beyond the end is a [`Jump`] and changes nothing: a hole
    /// needs a reason, see [`skip`](Self::skip).
    pub fn append(&mut self, offset: u64, channel: Channel, payload: &[u8]) -> Result<usize, Jump> {
        let Some(known) = self.end.checked_sub(offset) else {
            return Err(Jump { expected: self.end, got: offset });
        };
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        let new = payload.get(known..).unwrap_or_default();
        for part in new.chunks(CHUNK_BYTES_MAX) {
            let header = OutputHeader { stream: self.stream, offset: self.end, channel };
            self.push(Segment::chunk(&header, part));
        }
        Ok(new.len())
    }

    /// Names everything from the end up to `to` a hole, and returns it.
    /// Nothing happens if the end is there already. A hole that follows one
    /// with the same reason joins it.
    pub fn skip(&mut self, to: u64, reason: GapReason) -> Option<Gap> {
        let from = self.end;
        if to <= from {
            return None;
        }
        // The newest segment is always a young one.
        match self.young.back_mut() {
            Some(Segment { end, content: Content::Hole(same), .. }) if *same == reason => {
                *end = to;
                self.end = to;
            }
            _ => self.push(Segment::hole(from, to, reason.clone())),
        }
        Some(Gap { from, to, reason })
    }

    /// Drops the oldest chunks and holes until [`cost`](Self::cost) is at most
    /// `cost_max` bytes, and returns how much was freed. Frames that are kept
    /// beside them are first cut to an eighth of the bound for each kind, so
    /// that they cannot crowd out history.
    pub fn evict_to(&mut self, cost_max: usize) -> usize {
        let before = self.cost();
        self.texts.shrink_to(cost_max / 8);
        self.gathered.shrink_to(cost_max / 8);
        while self.cost() > cost_max {
            self.evict_oldest();
        }
        before - self.cost()
    }

    /// Drops the oldest chunk or hole and returns what that freed, in bytes;
    /// 0 when there is none.
    pub fn evict_oldest(&mut self) -> usize {
        let before = self.cost();
        let Some(gone) = pop(&mut self.old).or_else(|| pop(&mut self.young)) else { return 0 };
        self.cost -= gone.cost();
        self.payload -= gone.payload_len();
        if let Content::Hole(reason) = gone.content
            && gone.offset == self.begun
            && (gone.offset == 0 || reason == self.begun_reason)
        {
            self.begun = gone.end;
            self.begun_reason = reason;
        }
        if self.start() == self.end {
            self.texts.shrink_to(0);
            self.gathered.shrink_to(0);
        }
        before - self.cost()
    }

    /// Drops the chunks and holes that end at or below `offset` and returns
    /// what that freed, in bytes. One that reaches beyond is kept whole.
    pub fn evict_before(&mut self, offset: u64) -> usize {
        let mut freed = 0;
        while self.old.front().or(self.young.front()).is_some_and(|oldest| oldest.end <= offset) {
            freed += self.evict_oldest();
        }
        freed
    }

    /// The next step of a reader that stands at `from`. At the beginning of a
    /// chunk that is a shared frame and allocates nothing; in the middle of
    /// one, or where compaction is under way, the frame is written anew.
    pub fn read(&self, from: u64) -> Read {
        self.read_limited(from, u64::MAX)
    }

    /// [`read`](Self::read), but no byte at or beyond `up_to`: a chunk is cut
    /// there, and a reader that stands there is at the [`Read::End`]. A gap is
    /// named whole, even if it reaches beyond.
    pub fn read_limited(&self, from: u64, up_to: u64) -> Read {
        match self.step(from, up_to) {
            Step::Bytes(span) => Read::Chunk { frame: span.frame(self.stream), next: span.to },
            Step::Gap(gap) => Read::Gap(gap),
            Step::End => Read::End,
        }
    }

    /// [`read_limited`](Self::read_limited), but small neighbours of one
    /// channel come in one frame of up to [`CHUNK_BYTES_MAX`]. For the only
    /// reader of a log, an agent that sends what its [`Coalescer`] let
    /// gather; where many read, shared frames are cheaper.
    ///
    /// [`Coalescer`]: super::Coalescer
    pub fn read_gathered(&self, from: u64, up_to: u64) -> Read {
        let first = match self.step(from, up_to) {
            Step::Bytes(span) => span,
            Step::Gap(gap) => return Read::Gap(gap),
            Step::End => return Read::End,
        };
        let mut next = first.to;
        let mut gathered = Vec::new();
        while let Step::Bytes(more) = self.step(next, up_to)
            && more.channel == first.channel
            && more.to - from <= CHUNK_BYTES_MAX as u64
        {
            if gathered.is_empty() {
                gathered.extend_from_slice(first.payload);
            }
            gathered.extend_from_slice(more.payload);
            next = more.to;
        }
        let frame = if gathered.is_empty() {
            first.frame(self.stream)
        } else {
            encode_output(&first.header(self.stream), &gathered)
        };
        Read::Chunk { frame, next }
    }

    /// [`read_limited`](Self::read_limited) for the many who read one log: a
    /// reader that has fallen behind by several small chunks of one channel gets
    /// them in one frame of up to [`CHUNK_BYTES_MAX`]. That is kept, so that
    /// others who stand there get the same one. What is kept is part of
    /// [`cost`](Self::cost): evict after reading, too.
    pub fn read_shared(&mut self, from: u64, up_to: u64) -> Read {
        let first = match self.step(from, up_to) {
            Step::Bytes(span) => span,
            Step::Gap(gap) => return Read::Gap(gap),
            Step::End => return Read::End,
        };
        let limit = self.end.min(up_to);
        if first.to >= limit || first.payload.len() > GATHERED_PAYLOAD_MAX {
            return Read::Chunk { next: first.to, frame: first.frame(self.stream) };
        }
        if let Some((frame, next)) = self.gathered.find_from(from, up_to)
            // One that was made when there was less here is not worth much.
            && (next == limit || next - from > (CHUNK_BYTES_MAX / 2) as u64)
        {
            return Read::Chunk { frame: frame.clone(), next };
        }
        let mut frame = Vec::new();
        let mut next = first.to;
        for segment in self.segments_after(first.to) {
            if next >= up_to {
                break;
            }
            let Ok(more) = segment.span(next, up_to) else { break };
            if more.channel != first.channel
                || more.payload.len() > GATHERED_PAYLOAD_MAX
                || more.to - from > CHUNK_BYTES_MAX as u64
            {
                break;
            }
            if frame.is_empty() {
                let room = usize::try_from(limit - from).unwrap_or(usize::MAX);
                frame.reserve_exact(OUTPUT_HEADER_BYTES + room.min(CHUNK_BYTES_MAX));
                frame.extend_from_slice(&encode_output(&first.header(self.stream), first.payload));
            }
            frame.extend_from_slice(more.payload);
            next = more.to;
        }
        if frame.is_empty() {
            return Read::Chunk { next: first.to, frame: first.frame(self.stream) };
        }
        // In an allocation of its own length, or the cost would not be true.
        let frame = Bytes::from(frame.into_boxed_slice());
        self.gathered.keep(from, next, frame.clone());
        Read::Chunk { frame, next }
    }

    /// The segments from the one that begins at `offset` on.
    fn segments_after(&self, offset: u64) -> impl Iterator<Item = &Segment> {
        let old = self.old.partition_point(|segment| segment.offset < offset);
        let young = self.young.partition_point(|segment| segment.offset < offset);
        self.old.range(old..).chain(self.young.range(young..))
    }

    /// [`read_limited`](Self::read_limited) for readers of text: the frame is
    /// what `encode` makes of the bytes. It is kept, so that others who read
    /// the same range soon get it without encoding; so every caller of one log
    /// must encode alike. What is kept is part of [`cost`](Self::cost): evict
    /// after reading, too.
    pub fn read_text(
        &mut self,
        from: u64,
        up_to: u64,
        encode: impl FnOnce(&OutputHeader, &[u8]) -> Bytes,
    ) -> Read {
        let span = match self.step(from, up_to) {
            Step::Bytes(span) => span,
            Step::Gap(gap) => return Read::Gap(gap),
            Step::End => return Read::End,
        };
        let next = span.to;
        if let Some(frame) = self.texts.find(from, next) {
            return Read::Chunk { frame, next };
        }
        // Encoders grow their buffers by doubling: what is kept is a copy of
        // exact size, or the cost would not be true.
        let frame = Bytes::copy_from_slice(&encode(&span.header(self.stream), span.payload));
        self.texts.keep(from, next, frame.clone());
        Read::Chunk { frame, next }
    }

    fn step(&self, from: u64, up_to: u64) -> Step<'_> {
        if from >= self.end || from >= up_to {
            return Step::End;
        }
        let gap = |to, reason: &GapReason| Step::Gap(Gap { from, to, reason: reason.clone() });
        let start = self.start();
        if from < self.begun {
            gap(self.begun, &self.begun_reason)
        } else if from < start {
            gap(start, &self.evicted_reason)
        } else {
            let segment = self.locate(from);
            match segment.span(from, up_to) {
                Ok(span) => Step::Bytes(span),
                Err(reason) => gap(segment.end, reason),
            }
        }
    }

    /// The segment that holds `offset`, which is between start and end.
    fn locate(&self, offset: u64) -> &Segment {
        let is_young = self.young.front().is_some_and(|oldest| oldest.offset <= offset);
        let ring = if is_young { &self.young } else { &self.old };
        // Nearly every reader is at one of the last few.
        let last = ring.iter().rev().take(4).find(|segment| segment.offset <= offset);
        last.unwrap_or_else(|| {
            let after = ring.partition_point(|segment| segment.offset <= offset);
            &ring[after - 1] // start() <= offset: at least the first is not after it
        })
    }

    fn push(&mut self, segment: Segment) {
        self.end = segment.end;
        self.cost += segment.cost();
        self.payload += segment.payload_len();
        self.young.push_back(segment);
        while self.young.len() > YOUNG_CHUNKS
            && let Some(aged) = self.young.pop_front()
        {
            self.age(aged);
        }
    }

    /// Moves a segment from young to old, into its neighbour where it may.
    fn age(&mut self, aged: Segment) {
        if let Some(last) = self.old.back_mut() {
            let before = last.cost();
            let absorbed = last.absorb(&aged);
            if !absorbed {
                last.seal();
            }
            self.cost = self.cost - before + last.cost();
            if absorbed {
                self.cost -= aged.cost();
                return;
            }
        }
        self.old.push_back(aged);
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("stream", &self.stream)
            .field("start", &self.start())
            .field("end", &self.end)
            .field("cost", &self.cost())
            .finish_non_exhaustive()
    }
}

/// What stands at an offset.
enum Step<'a> {
    Bytes(Span<'a>),
    Gap(Gap),
    End,
}

/// Takes the oldest off a ring, and gives back room that a ring once full no
/// longer needs: only what is used is accounted for.
fn pop(ring: &mut VecDeque<Segment>) -> Option<Segment> {
    let oldest = ring.pop_front();
    if ring.capacity() > 64 && ring.len() < ring.capacity() / 4 {
        ring.shrink_to(ring.capacity() / 2);
    }
    oldest
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the streams of these tests are short")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::binary::parse_output;
    use crate::stream::{CHUNK_OVERHEAD_BYTES, TEXTS_COST_MAX};

    const STREAM: StreamId = StreamId::from_u128(42);

    /// What this stream has at an offset: the same whoever sends it.
    fn byte_at(offset: u64) -> u8 {
        (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    }

    fn bytes(from: u64, to: u64) -> Vec<u8> {
        (from..to).map(byte_at).collect()
    }

    fn grow(log: &mut Log, channel: Channel, len: usize) {
        let from = log.end();
        log.append(from, channel, &bytes(from, from + len as u64)).unwrap();
    }

    fn gap(from: u64, to: u64, reason: GapReason) -> Read {
        Read::Gap(Gap { from, to, reason })
    }

    /// All that a reader gets from `from` on: payload lengths and gaps.
    fn steps(log: &Log, mut from: u64) -> Vec<Read> {
        let mut steps = Vec::new();
        loop {
            let step = log.read(from);
            from = match &step {
                Read::Chunk { next, .. } => *next,
                Read::Gap(gap) => gap.to,
                Read::End => return steps,
            };
            steps.push(step);
        }
    }

    fn payload(step: &Read) -> &[u8] {
        match step {
            Read::Chunk { frame, .. } => &frame[OUTPUT_HEADER_BYTES..],
            other => panic!("no chunk: {other:?}"),
        }
    }

    /// Whether two readers at `from` get one and the same frame.
    fn is_shared(log: &Log, from: u64) -> bool {
        let (one, two) = (log.read(from), log.read(from));
        assert_eq!(one, two);
        payload(&one).as_ptr() == payload(&two).as_ptr()
    }

    #[test]
    fn readers_share_the_frame_of_a_chunk() {
        let mut log = Log::new(STREAM);
        grow(&mut log, Channel::Pty, 100);
        assert!(is_shared(&log, 0));
        assert_eq!(payload(&log.read(0)), bytes(0, 100));
        assert_eq!(log.read(100), Read::End);
        assert!(!is_shared(&log, 1));
    }

    #[test]
    fn who_is_behind_gets_small_chunks_in_one_frame_that_is_shared() {
        let mut log = Log::new(STREAM);
        for _ in 0..10 {
            grow(&mut log, Channel::Pty, 100);
        }
        let (one, two) = (log.read_shared(0, u64::MAX), log.read_shared(0, u64::MAX));
        assert_eq!(payload(&one), bytes(0, 1000));
        assert_eq!(payload(&one).as_ptr(), payload(&two).as_ptr());
        let cost = log.cost();
        assert_eq!(payload(&log.read_shared(0, 450)), bytes(0, 450), "but not beyond its limit");
        assert!(log.cost() > cost, "what is kept is counted");
        // Who has read all but the last gets that as it was written.
        assert!(is_shared(&log, 900));
        assert_eq!(payload(&log.read_shared(900, u64::MAX)), payload(&log.read(900)));
        // There is more, and it is worth another frame.
        grow(&mut log, Channel::Pty, 100);
        assert_eq!(payload(&log.read_shared(0, u64::MAX)), bytes(0, 1100));
        // Large ones are not copied, others' channels stay apart.
        grow(&mut log, Channel::Pty, GATHERED_PAYLOAD_MAX + 1);
        grow(&mut log, Channel::Stderr, 1);
        assert_eq!(payload(&log.read_shared(1000, u64::MAX)), bytes(1000, 1100));
        assert_eq!(payload(&log.read_shared(1100, u64::MAX)).len(), GATHERED_PAYLOAD_MAX + 1);
        // In all it is no longer than a frame may be.
        for _ in 0..1000 {
            grow(&mut log, Channel::Pty, 100);
        }
        let from = log.end() - 100_000;
        let full = log.read_shared(from, u64::MAX);
        assert!((CHUNK_BYTES_MAX - 100..=CHUNK_BYTES_MAX).contains(&payload(&full).len()));
        log.evict_to(0);
        assert_eq!(log.cost(), 0);
    }

    #[test]
    fn an_agent_that_repeats_itself_changes_nothing() {
        let mut log = Log::new(STREAM);
        assert_eq!(log.append(0, Channel::Pty, b"hello"), Ok(5));
        let cost = log.cost();
        assert_eq!(log.append(0, Channel::Pty, b"hello"), Ok(0));
        assert_eq!(log.append(1, Channel::Pty, b"ell"), Ok(0));
        assert_eq!((log.end(), log.cost()), (5, cost));
        assert_eq!(log.append(3, Channel::Pty, b"lo you"), Ok(4));
        assert_eq!(payload(&log.read(5)), b" you");
        assert_eq!(log.append(10, Channel::Pty, b"!"), Err(Jump { expected: 9, got: 10 }));
        assert_eq!(log.end(), 9);
    }

    #[test]
    fn a_reader_in_the_middle_of_a_chunk_gets_its_rest() {
        let mut log = Log::new(STREAM);
        log.append(0, Channel::Stderr, b"hello").unwrap();
        let part = |offset: u64, payload: &[u8]| {
            let header = OutputHeader { stream: STREAM, offset, channel: Channel::Stderr };
            let next = offset + payload.len() as u64;
            Read::Chunk { frame: encode_output(&header, payload), next }
        };
        assert_eq!(log.read(2), part(2, b"llo"));
        assert_eq!(log.read_limited(2, 4), part(2, b"ll"));
        assert_eq!(log.read_limited(4, 4), Read::End);
    }

    #[test]
    fn large_writes_leave_in_pieces_between_which_control_may_pass() {
        let mut log = Log::new(STREAM);
        grow(&mut log, Channel::Pty, 40_000);
        let lens: Vec<usize> = steps(&log, 0).iter().map(|step| payload(step).len()).collect();
        assert_eq!(lens, [16_384, 16_384, 7_232]);
    }

    #[test]
    fn a_named_hole_is_told_exactly_and_once() {
        let mut log = Log::new(STREAM);
        grow(&mut log, Channel::Pty, 5);
        let overflow = GapReason::AgentOverflow;
        assert_eq!(log.skip(5, overflow.clone()), None);
        let named = Gap { from: 5, to: 10, reason: overflow.clone() };
        assert_eq!(log.skip(10, overflow.clone()), Some(named));
        log.skip(20, overflow.clone());
        log.skip(30, GapReason::HubLoss);
        grow(&mut log, Channel::Pty, 5);

        assert_eq!(log.read(5), gap(5, 20, overflow.clone()), "holes of one reason are one");
        assert_eq!(log.read(7), gap(7, 20, overflow));
        assert_eq!(log.read(20), gap(20, 30, GapReason::HubLoss));
        assert_eq!(payload(&log.read(30)), bytes(30, 35));
        assert_eq!(steps(&log, 0).len(), 4);
    }

    #[test]
    fn a_laggard_is_told_what_was_evicted_and_what_was_never_there() {
        let mut log = Log::new_after_loss(STREAM, 1_000, GapReason::HubLoss);
        grow(&mut log, Channel::Pty, 10);
        log.skip(1_020, GapReason::AgentOverflow);
        grow(&mut log, Channel::Pty, 10);
        assert_eq!(log.read(0), gap(0, 1_000, GapReason::HubLoss));

        log.evict_oldest();
        assert_eq!(log.start(), 1_010);
        assert_eq!(log.read(0), gap(0, 1_000, GapReason::HubLoss));
        assert_eq!(log.read(1_000), gap(1_000, 1_010, GapReason::Evicted));
        assert_eq!(log.read(1_010), gap(1_010, 1_020, GapReason::AgentOverflow));

        // The name of the hole goes the way of the bytes around it.
        log.evict_oldest();
        assert_eq!(log.read(1_000), gap(1_000, 1_020, GapReason::Evicted));

        log.evict_to(0);
        assert_eq!((log.start(), log.end(), log.cost()), (1_030, 1_030, 0));
        assert_eq!(log.read(1_005), gap(1_005, 1_030, GapReason::Evicted));
    }

    #[test]
    fn a_hole_at_the_very_beginning_is_where_the_log_began() {
        let mut log = Log::new(STREAM);
        log.skip(100, GapReason::AgentOverflow);
        grow(&mut log, Channel::Pty, 10);
        log.evict_to(0);
        assert_eq!(log.read(0), gap(0, 100, GapReason::AgentOverflow));
        assert_eq!(log.read(100), gap(100, 110, GapReason::Evicted));
    }

    #[test]
    fn an_agents_tail_says_that_it_overflowed() {
        let mut tail = Log::new(STREAM).evicting_as(GapReason::AgentOverflow);
        grow(&mut tail, Channel::Pty, 10);
        grow(&mut tail, Channel::Pty, 10);
        assert_eq!(tail.evict_before(19), CHUNK_OVERHEAD_BYTES + OUTPUT_HEADER_BYTES + 10);
        assert_eq!(tail.read(3), gap(3, 10, GapReason::AgentOverflow));
        assert_eq!(tail.payload_bytes(), 10);
    }

    #[test]
    fn a_dashboard_ahead_of_the_hub_waits() {
        let mut log = Log::new(STREAM);
        grow(&mut log, Channel::Pty, 10);
        assert_eq!(log.read(10), Read::End);
        assert_eq!(log.read(u64::MAX), Read::End);
    }

    #[test]
    fn a_program_that_writes_byte_by_byte_costs_little_more_than_its_bytes() {
        let mut log = Log::new(STREAM);
        for _ in 0..100_000 {
            grow(&mut log, Channel::Pty, 1);
        }
        let young = YOUNG_CHUNKS * (1 + OUTPUT_HEADER_BYTES + CHUNK_OVERHEAD_BYTES);
        assert!(log.cost() - young < 104_000, "{log:?}");
        let frames = steps(&log, 0).len();
        assert_eq!(frames, YOUNG_CHUNKS + 7, "100,000 bytes in 16 KiB frames and the young");
        assert!(is_shared(&log, 0), "what is gathered is shared again");
    }

    #[test]
    fn two_channels_keep_their_order_through_compaction() {
        let mut log = Log::new(STREAM);
        for turn in 0..1_000 {
            let channel = if turn / 10 % 2 == 0 { Channel::Stdout } else { Channel::Stderr };
            grow(&mut log, channel, 3);
        }
        let steps = steps(&log, 0);
        assert!(steps.len() <= YOUNG_CHUNKS + 75, "{}", steps.len());
        assert_eq!(steps.iter().flat_map(payload).copied().collect::<Vec<_>>(), bytes(0, 3_000));
    }

    #[test]
    fn a_single_reader_gets_small_writes_in_one_frame() {
        let mut tail = Log::new(STREAM);
        for _ in 0..10 {
            grow(&mut tail, Channel::Stdout, 10);
        }
        grow(&mut tail, Channel::Stderr, 10);
        grow(&mut tail, Channel::Stderr, CHUNK_BYTES_MAX);
        assert_eq!(payload(&tail.read_gathered(5, 57)), bytes(5, 57));
        assert_eq!(payload(&tail.read_gathered(0, u64::MAX)), bytes(0, 100));
        assert_eq!(payload(&tail.read_gathered(100, u64::MAX)), bytes(100, 110));
        assert_eq!(tail.read_gathered(110, u64::MAX), tail.read(110), "a full chunk is shared");
    }

    #[test]
    fn a_text_frame_is_encoded_once_for_all_who_read_it() {
        let mut log = Log::new(STREAM);
        grow(&mut log, Channel::Pty, 100);
        let mut encoded = 0;
        for _ in 0..1_000 {
            let step = log.read_text(0, u64::MAX, |header, payload| {
                encoded += 1;
                assert_eq!((header.offset, payload), (0, &bytes(0, 100)[..]));
                Bytes::from_static(b"text")
            });
            assert_eq!(step, Read::Chunk { frame: Bytes::from_static(b"text"), next: 100 });
        }
        assert_eq!(encoded, 1);
        let cut = log.read_text(0, 50, |_, payload| Bytes::copy_from_slice(payload));
        assert_eq!(cut, Read::Chunk { frame: bytes(0, 50).into(), next: 50 });
    }

    #[test]
    fn text_frames_do_not_crowd_out_history() {
        let mut log = Log::new(STREAM);
        for _ in 0..64 {
            grow(&mut log, Channel::Pty, CHUNK_BYTES_MAX);
            let from = log.end() - CHUNK_BYTES_MAX as u64;
            log.read_text(from, u64::MAX, |_, _| Bytes::from(vec![b'x'; 2 * CHUNK_BYTES_MAX]));
        }
        assert!(log.cost() <= TEXTS_COST_MAX + 64 * (CHUNK_BYTES_MAX + 300));
        log.evict_to(800_000);
        assert!(log.cost() <= 800_000);
        assert!(log.payload_bytes() > 650_000, "{}", log.payload_bytes());
        log.evict_to(0);
        assert_eq!(log.cost(), 0);
    }

    /// What each offset of a stream is, in the plainest form.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Cell {
        Byte(Channel),
        Hole(GapReason),
    }

    struct Model {
        cells: Vec<Cell>,
    }

    impl Model {
        fn new(start: u64) -> Self {
            Self { cells: vec![Cell::Hole(GapReason::HubLoss); start as usize] }
        }

        /// The gap due at `from` in a log that starts at `start`.
        fn gap(&self, from: usize, start: usize) -> Option<Gap> {
            let range = |to: usize, reason: &GapReason| {
                Some(Gap { from: from as u64, to: to as u64, reason: reason.clone() })
            };
            if from < start {
                // The hole that the stream begins with keeps its reason.
                let Some(Cell::Hole(first)) = self.cells.first() else {
                    return range(start, &GapReason::Evicted);
                };
                let same = self.cells.iter().take_while(|c| **c == Cell::Hole(first.clone()));
                let begun = same.count().min(start);
                return if from < begun {
                    range(begun, first)
                } else {
                    range(start, &GapReason::Evicted)
                };
            }
            let Cell::Hole(reason) = &self.cells[from] else { return None };
            let same = self.cells[from..].iter().take_while(|c| *c == &self.cells[from]);
            range(from + same.count(), reason)
        }

        /// Follows a reader from `from` to its end and checks each step.
        fn check_reader(
            &self,
            log: &mut Log,
            from: u64,
            up_to: u64,
            how: u8,
        ) -> Result<(), TestCaseError> {
            let mut at = from as usize;
            loop {
                let step = match how {
                    0 => log.read_limited(at as u64, up_to),
                    1 => log.read_gathered(at as u64, up_to),
                    2 => log.read_shared(at as u64, up_to),
                    _ => log.read_text(at as u64, up_to, encode_output),
                };
                let start = log.start() as usize;
                match step {
                    Read::End => {
                        prop_assert!(at >= self.cells.len() || at as u64 >= up_to);
                        return Ok(());
                    }
                    Read::Gap(gap) => {
                        prop_assert!((at as u64) < up_to);
                        let due = self.gap(at, start);
                        prop_assert_eq!(Some(&gap), due.as_ref());
                        at = gap.to as usize;
                    }
                    Read::Chunk { frame, next } => {
                        let header = parse_output(&frame).unwrap();
                        let payload = &frame[OUTPUT_HEADER_BYTES..];
                        prop_assert_eq!((header.stream, header.offset), (STREAM, at as u64));
                        prop_assert!(at >= start && payload.len() <= CHUNK_BYTES_MAX);
                        prop_assert_eq!(next, (at + payload.len()) as u64);
                        prop_assert!(next <= up_to);
                        prop_assert_eq!(payload, bytes(at as u64, next));
                        let is_that = |cell: &Cell| *cell == Cell::Byte(header.channel);
                        prop_assert!(self.cells[at..next as usize].iter().all(is_that));
                        at = next as usize;
                    }
                }
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write { times: usize, len: usize, again: u64, channel: Channel },
        Jump { by: u64 },
        Skip { len: u64, reason: GapReason },
        EvictTo(usize),
        EvictOldest,
        EvictBefore { percent: u64 },
        Read { percent: u64, len: u64, how: u8 },
    }

    fn ops() -> impl Strategy<Value = Op> {
        let channel = prop::sample::select(Channel::ALL);
        let reason = prop::sample::select(vec![
            GapReason::AgentOverflow,
            GapReason::HubLoss,
            GapReason::Other("solar_flare".into()),
        ]);
        prop_oneof![
            4 => (1usize..10, 1usize..4_000, 0u64..100, channel.clone())
                .prop_map(|(times, len, again, channel)| Op::Write { times, len, again, channel }),
            3 => (1usize..300, 1usize..40, 0u64..10, channel.clone())
                .prop_map(|(times, len, again, channel)| Op::Write { times, len, again, channel }),
            1 => (1usize..3, 10_000usize..40_000, 0u64..5_000, channel)
                .prop_map(|(times, len, again, channel)| Op::Write { times, len, again, channel }),
            1 => (1u64..100).prop_map(|by| Op::Jump { by }),
            3 => (0u64..300, reason).prop_map(|(len, reason)| Op::Skip { len, reason }),
            1 => (0usize..200_000).prop_map(Op::EvictTo),
            2 => Just(Op::EvictOldest),
            1 => (0u64..50).prop_map(|percent| Op::EvictBefore { percent }),
            4 => (0u64..110, 0u64..100_000, 0u8..4)
                .prop_map(|(percent, len, how)| Op::Read { percent, len, how }),
        ]
    }

    fn part(log: &Log, percent: u64) -> u64 {
        log.end() * percent / 100
    }

    proptest! {
        /// Random lives: whatever is written, skipped and evicted, every
        /// reader gets each byte once and in order, or the exact gap.
        #[test]
        fn a_log_is_its_stream_minus_named_holes(
            start in prop_oneof![Just(0u64), 1u64..500],
            life in prop::collection::vec(ops(), 1..60),
        ) {
            let mut log = Log::new_after_loss(STREAM, start, GapReason::HubLoss);
            let mut model = Model::new(start);
            for op in life {
                match op {
                    Op::Write { times, len, again, channel } => {
                        for _ in 0..times {
                            let end = log.end();
                            let from = end.saturating_sub(again);
                            let new = log.append(from, channel, &bytes(from, end + len as u64));
                            prop_assert_eq!(new, Ok(len));
                            model.cells.extend(std::iter::repeat_n(Cell::Byte(channel), len));
                        }
                    }
                    Op::Jump { by } => {
                        let (expected, got, cost) = (log.end(), log.end() + by, log.cost());
                        let jump = log.append(got, Channel::Pty, b"?");
                        prop_assert_eq!(jump, Err(Jump { expected, got }));
                        prop_assert_eq!((log.end(), log.cost()), (expected, cost));
                    }
                    Op::Skip { len, reason } => {
                        let (from, to) = (log.end(), log.end() + len);
                        let named = log.skip(to, reason.clone());
                        let gap = Gap { from, to, reason: reason.clone() };
                        prop_assert_eq!(named, (len > 0).then_some(gap));
                        let hole = std::iter::repeat_n(Cell::Hole(reason), len as usize);
                        model.cells.extend(hole);
                    }
                    Op::EvictTo(cost_max) => {
                        let before = log.cost();
                        let freed = log.evict_to(cost_max);
                        prop_assert_eq!(before - freed, log.cost());
                        prop_assert!(log.cost() <= cost_max);
                    }
                    Op::EvictOldest => {
                        let (before, start) = (log.cost(), log.start());
                        let freed = log.evict_oldest();
                        prop_assert_eq!(before - freed, log.cost());
                        prop_assert_eq!(freed > 0, start < log.start());
                    }
                    Op::EvictBefore { percent } => {
                        let (before, old, to) = (log.cost(), log.start(), part(&log, percent));
                        let freed = log.evict_before(to);
                        prop_assert_eq!(before - freed, log.cost());
                        prop_assert!(log.start() <= to.max(old), "nothing beyond was dropped");
                    }
                    Op::Read { percent, len, how } => {
                        let from = part(&log, percent);
                        model.check_reader(&mut log, from, from + len, how)?;
                    }
                }
                let segments = || log.old.iter().chain(&log.young);
                let cost: usize = segments().map(Segment::cost).sum();
                prop_assert_eq!(log.cost(), cost + log.texts.cost() + log.gathered.cost());
                prop_assert_eq!(log.payload_bytes(), segments().map(Segment::payload_len).sum::<usize>());
                prop_assert_eq!(log.end(), model.cells.len() as u64);
            }
            for how in 0..4 {
                model.check_reader(&mut log, 0, u64::MAX, how)?;
            }
            // Compaction left no two small neighbours that belong together.
            for (left, right) in log.old.iter().zip(log.old.iter().skip(1)) {
                if let (Ok(one), Ok(two)) =
                    (left.span(left.offset, left.end), right.span(right.offset, right.end))
                {
                    let (one, two) = ((one.channel, one.payload.len()), (two.channel, two.payload.len()));
                    let large = CHUNK_BYTES_MAX / 2;
                    prop_assert!(
                        one.0 != two.0
                            || one.1 > large
                            || two.1 > large
                            || one.1 + two.1 > CHUNK_BYTES_MAX
                    );
                }
            }
        }
    }
}
