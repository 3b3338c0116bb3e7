//! A stream's log against a vector with a place for every offset.

use trunkline_protocol::codec::binary::{OUTPUT_HEADER_BYTES, parse_output};
use trunkline_protocol::codec::encode_output_text;
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{Channel, GapReason};
use trunkline_protocol::stream::{CHUNK_BYTES_MAX, Jump, Log, Read};

use crate::names;
use crate::plan::Plan;

const STREAM: StreamId = StreamId::from_u128(0x51);

/// Longest stream: the model has a place for each of its bytes.
const END_MAX: u64 = 1 << 16;

/// What stands at an offset.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    Byte(Channel, u8),
    Hole(GapReason),
}

struct Model {
    places: Vec<Place>,
    /// Everything below was evicted, but for the hole at the beginning.
    start: u64,
}

/// Follows the plan on both.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let begin = plan.maybe(|plan| u64::from(plan.short()) % 5000).unwrap_or(0);
    let mut log = match begin {
        0 => Log::new(STREAM),
        _ => Log::new_after_loss(STREAM, begin, GapReason::HubLoss),
    };
    let mut model = Model {
        places: (0..begin).map(|_| Place::Hole(GapReason::HubLoss)).collect(),
        start: begin,
    };
    let mut steps = 0;
    while !plan.is_over() && steps < 2000 {
        steps += 1;
        let end = model.places.len() as u64;
        match plan.below(8) {
            0 | 1 => {
                // Mostly where it goes on; sometimes again, sometimes beyond.
                let back = if plan.once_in(4) { plan.number() } else { 0 };
                let beyond = u64::from(plan.once_in(16));
                let offset = end.saturating_sub(back) + beyond;
                let len = names::len(plan).min(END_MAX.saturating_sub(offset).max(1));
                let channel = names::channel(plan);
                let payload = names::bytes_at(STREAM, offset, len);
                let appended = log.append(offset, channel, &payload);
                if offset > end {
                    assert_eq!(appended, Err(Jump { expected: end, got: offset }));
                } else {
                    let new = (offset + len).saturating_sub(end);
                    assert_eq!(appended.map(|new| new as u64), Ok(new));
                    let byte = |at| Place::Byte(channel, names::byte_at(STREAM, at));
                    model.places.extend((end..end + new).map(byte));
                }
            }
            2 => {
                // Byte by byte: compaction is what a log is about.
                let channel = names::channel(plan);
                for at in end..(end + u64::from(plan.byte()) * 4).min(END_MAX) {
                    let byte = names::byte_at(STREAM, at);
                    assert_eq!(log.append(at, channel, &[byte]), Ok(1));
                    model.places.push(Place::Byte(channel, byte));
                }
            }
            3 => {
                let to = end.saturating_add(plan.number()).min(END_MAX).max(end);
                let reason = names::reason(plan);
                let gap = log.skip(to, reason.clone());
                assert_eq!(gap.map(|gap| (gap.from, gap.to)), (to > end).then_some((end, to)));
                model.places.extend((end..to).map(|_| Place::Hole(reason.clone())));
            }
            4 => {
                let max = usize::from(plan.short()) * 2;
                let before = log.cost();
                let freed = log.evict_to(max);
                assert_eq!(before - freed, log.cost());
                assert!(log.cost() <= max);
                model.start = log.start().max(model.start);
            }
            5 => {
                let before = plan.number();
                log.evict_before(before);
                assert!(log.start() <= before.max(model.start), "no more than asked");
                model.start = log.start().max(model.start);
            }
            6 => {
                let from = u64::from(plan.short()) % (end + 2);
                let up_to = plan.maybe(|plan| from + plan.number() % 50_000).unwrap_or(u64::MAX);
                model.check(&log.read_limited(from, up_to), from, up_to, false);
                model.check(&log.read_gathered(from, up_to), from, up_to, false);
                model.check(&log.read_shared(from, up_to), from, up_to, false);
            }
            _ => {
                let from = u64::from(plan.short()) % (end + 2);
                let text = log.read_text(from, u64::MAX, |header, payload| {
                    assert_eq!(header.offset, from);
                    let _ = encode_output_text(header, payload);
                    trunkline_protocol::codec::binary::encode_output(header, payload)
                });
                model.check(&text, from, u64::MAX, false);
            }
        }
        assert_eq!(log.end(), model.places.len() as u64);
        assert!(log.start() <= log.end());
        assert!(log.payload_bytes() <= log.cost());
    }
    // Everything, once more from the first byte.
    let mut from = 0;
    let mut reads = 0;
    loop {
        let read = log.read(from);
        model.check(&read, from, u64::MAX, true);
        from = match read {
            Read::Chunk { next, .. } => next,
            Read::Gap(gap) => gap.to,
            Read::End => break,
        };
        reads += 1;
        assert!(reads <= model.places.len(), "a reader gets on");
    }
    assert_eq!(from, log.end());
    let whole = log.cost();
    assert_eq!(log.evict_to(0), whole);
    assert_eq!((log.cost(), log.payload_bytes(), log.start()), (0, 0, log.end()));
}

impl Model {
    /// Whether a step of a reader at `from` is what the vector says.
    fn check(&self, read: &Read, from: u64, up_to: u64, is_all: bool) {
        let at = |offset: u64| &self.places[usize::try_from(offset).expect("a place has an index")];
        let is_named = |offset: u64, reason: &GapReason| match at(offset) {
            Place::Hole(named) => named == reason,
            Place::Byte(..) => false,
        };
        let end = self.places.len() as u64;
        match read {
            Read::End => assert!(from >= end || from >= up_to, "nothing is kept back"),
            Read::Chunk { frame, next } => {
                let header = parse_output(frame).expect("a frame has a header");
                let payload = &frame[OUTPUT_HEADER_BYTES..];
                assert_eq!((header.stream, header.offset), (STREAM, from));
                assert_eq!(*next, from + payload.len() as u64);
                assert!(payload.len() <= CHUNK_BYTES_MAX && *next <= up_to);
                for (offset, byte) in (from..).zip(payload) {
                    assert_eq!(at(offset), &Place::Byte(header.channel, *byte), "at {offset}");
                }
            }
            Read::Gap(gap) => {
                assert_eq!(gap.from, from);
                assert!(gap.to > from && gap.to <= end);
                // A gap is a hole of that name, or what was evicted.
                let evicted = from < self.start;
                for offset in from..gap.to {
                    let is_hole = is_named(offset, &gap.reason);
                    assert!(is_hole || (evicted && offset < self.start), "at {offset}");
                }
                let goes_on = gap.to < end && is_named(gap.to, &gap.reason);
                assert!(!(is_all && goes_on && !evicted), "a hole is named whole");
            }
        }
    }
}
