//! A segment is one step of a log: bytes of one channel in a ready-made frame,
//! or a named hole; and small neighbours become one.

use bytes::Bytes;

use crate::codec::binary::{OUTPUT_HEADER_BYTES, OutputHeader, encode_output};
use crate::ids::StreamId;
use crate::message::{Channel, GapReason};

/// Most terminal bytes in one frame of a log: 16 KiB.
pub const CHUNK_BYTES_MAX: usize = 16 * 1024;

/// What a chunk or a named hole costs beside its frame, in bytes: its place in
/// the ring with the ring's spare room (2 × 56), the count by which readers
/// share the frame (32), and the allocator's own words.
pub const CHUNK_OVERHEAD_BYTES: usize = 160;

/// Chunks beyond this size are worth a frame of their own and are never
/// copied again. So of two neighbours in a compacted run at least one is this
/// large, or both together fill a frame.
const LARGE_BYTES: usize = CHUNK_BYTES_MAX / 2;

pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) end: u64,
    pub(super) content: Content,
}

pub(super) enum Content {
    /// A frame as readers get it, in an allocation of its own length.
    Chunk { channel: Channel, frame: Bytes },
    /// A frame that small neighbours are being gathered into. It has spare
    /// room and cannot be shared yet.
    Gathering { channel: Channel, frame: Vec<u8> },
    /// Nothing, and why.
    Hole(GapReason),
}

/// A piece of a segment with bytes.
pub(super) struct Span<'a> {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) channel: Channel,
    pub(super) payload: &'a [u8],
    /// The ready frame, where the span is exactly what it holds.
    shared: Option<&'a Bytes>,
}

impl Span<'_> {
    pub(super) fn header(&self, stream: StreamId) -> OutputHeader {
        OutputHeader { stream, offset: self.from, channel: self.channel }
    }

    /// The frame: shared where that is possible, written anew otherwise.
    pub(super) fn frame(&self, stream: StreamId) -> Bytes {
        match self.shared {
            Some(frame) => frame.clone(),
            None => encode_output(&self.header(stream), self.payload),
        }
    }
}

impl Segment {
    pub(super) fn chunk(header: &OutputHeader, payload: &[u8]) -> Self {
        let frame = encode_output(header, payload);
        // A fresh buffer gets its reference count when it is first cloned.
        // Paying for that here keeps every reader's clone free of allocation.
        drop(frame.clone());
        Self {
            offset: header.offset,
            end: header.offset + payload.len() as u64,
            content: Content::Chunk { channel: header.channel, frame },
        }
    }

    pub(super) fn hole(from: u64, to: u64, reason: GapReason) -> Self {
        Self { offset: from, end: to, content: Content::Hole(reason) }
    }

    /// Bytes of memory, as far as the log accounts for them.
    pub(super) fn cost(&self) -> usize {
        CHUNK_OVERHEAD_BYTES
            + match &self.content {
                Content::Chunk { frame, .. } => frame.len(),
                Content::Gathering { frame, .. } => frame.capacity(),
                Content::Hole(GapReason::Other(word)) => word.len(),
                Content::Hole(_) => 0, // the words we know are constants
            }
    }

    /// The frame's channel and bytes; `None` for a hole.
    fn frame(&self) -> Option<(Channel, &[u8])> {
        match &self.content {
            Content::Chunk { channel, frame } => Some((*channel, frame)),
            Content::Gathering { channel, frame } => Some((*channel, frame)),
            Content::Hole(_) => None,
        }
    }

    /// Terminal bytes in it; none in a hole.
    pub(super) fn payload_len(&self) -> usize {
        self.frame().map_or(0, |(_, frame)| frame.len() - OUTPUT_HEADER_BYTES)
    }

    /// The bytes from `from`, which is within this segment, to its end or to
    /// `up_to`; or why there are none.
    pub(super) fn span(&self, from: u64, up_to: u64) -> Result<Span<'_>, &GapReason> {
        let (channel, frame, shared) = match &self.content {
            Content::Chunk { channel, frame } => (*channel, &frame[..], Some(frame)),
            Content::Gathering { channel, frame } => (*channel, &frame[..], None),
            Content::Hole(reason) => return Err(reason),
        };
        let to = self.end.min(up_to);
        let at = |offset: u64| OUTPUT_HEADER_BYTES + within(offset - self.offset);
        let shared = shared.filter(|_| (from, to) == (self.offset, self.end));
        Ok(Span { from, to, channel, payload: &frame[at(from)..at(to)], shared })
    }

    /// Takes the bytes of the segment that follows into this one, if the two
    /// are small and of one channel. Says whether it did.
    pub(super) fn absorb(&mut self, next: &Self) -> bool {
        let joined = self.payload_len() + next.payload_len();
        let Some((channel, more)) = next.frame() else { return false };
        if joined > CHUNK_BYTES_MAX || next.payload_len() > LARGE_BYTES {
            return false;
        }
        match &mut self.content {
            Content::Chunk { channel: own, frame } => {
                if *own != channel || frame.len() - OUTPUT_HEADER_BYTES > LARGE_BYTES {
                    return false;
                }
                let mut gathered = Vec::with_capacity(OUTPUT_HEADER_BYTES + joined);
                gathered.extend_from_slice(frame);
                gathered.extend_from_slice(&more[OUTPUT_HEADER_BYTES..]);
                self.content = Content::Gathering { channel, frame: gathered };
            }
            Content::Gathering { channel: own, frame } => {
                if *own != channel {
                    return false;
                }
                // Doubling keeps the copying at a constant per byte; the cap
                // keeps a nearly full frame from reserving twice its size.
                let needed = OUTPUT_HEADER_BYTES + joined;
                if needed > frame.capacity() {
                    let room = (2 * frame.capacity()).min(OUTPUT_HEADER_BYTES + CHUNK_BYTES_MAX);
                    frame.reserve_exact(room.max(needed) - frame.len());
                }
                frame.extend_from_slice(&more[OUTPUT_HEADER_BYTES..]);
            }
            Content::Hole(_) => return false,
        }
        self.end = next.end;
        true
    }

    /// Makes a gathered frame final: exact in size, and shared from now on.
    pub(super) fn seal(&mut self) {
        if let Content::Gathering { channel, frame } = &mut self.content {
            let frame = Bytes::from(std::mem::take(frame).into_boxed_slice());
            drop(frame.clone()); // as in `chunk`
            self.content = Content::Chunk { channel: *channel, frame };
        }
    }
}

/// A distance within one segment, as an index.
fn within(distance: u64) -> usize {
    usize::try_from(distance).expect("a segment with bytes is at most 16 KiB long")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, channel: Channel, payload: &[u8]) -> Segment {
        let header = OutputHeader { stream: StreamId::from_u128(1), offset, channel };
        Segment::chunk(&header, payload)
    }

    #[test]
    fn small_neighbours_of_one_channel_become_one_frame() {
        let mut run = chunk(10, Channel::Stdout, b"ab");
        assert!(run.absorb(&chunk(12, Channel::Stdout, b"c")));
        assert!(run.absorb(&chunk(13, Channel::Stdout, b"de")));
        run.seal();
        let whole = chunk(10, Channel::Stdout, b"abcde");
        assert_eq!((run.offset, run.end), (10, 15));
        assert_eq!(run.frame(), whole.frame());
        assert_eq!(run.cost(), whole.cost());
    }

    #[test]
    fn other_channels_holes_and_large_chunks_stay_apart() {
        let large = vec![b'x'; LARGE_BYTES + 1];
        for (mut left, right) in [
            (chunk(0, Channel::Stdout, b"a"), chunk(1, Channel::Stderr, b"b")),
            (chunk(0, Channel::Stdout, b"a"), Segment::hole(1, 2, GapReason::HubLoss)),
            (Segment::hole(0, 1, GapReason::HubLoss), chunk(1, Channel::Stdout, b"a")),
            (chunk(0, Channel::Stdout, b"a"), chunk(1, Channel::Stdout, &large)),
            (chunk(0, Channel::Stdout, &large), chunk(8193, Channel::Stdout, b"a")),
        ] {
            let before = (left.end, left.cost());
            assert!(!left.absorb(&right));
            assert_eq!((left.end, left.cost()), before);
        }
    }

    #[test]
    fn the_overhead_covers_a_place_in_the_ring() {
        assert!(2 * size_of::<Segment>() + 48 <= CHUNK_OVERHEAD_BYTES);
    }
}
