//! The frames that readers were given last and that are not those of the log's
//! own chunks: texts, and several chunks in one. What is read by a thousand is
//! made once.
//!
//! An entry is named by its exact range. Offsets name the same bytes for ever,
//! so an entry can grow useless (its chunk was merged or evicted, nobody asks
//! for that range again) but never wrong, and nothing has to be invalidated.

use std::collections::VecDeque;

use bytes::Bytes;

use super::segment::{CHUNK_BYTES_MAX, CHUNK_OVERHEAD_BYTES};
use crate::codec::binary::OUTPUT_HEADER_BYTES;

/// Most memory one log spends on text frames, in bytes; counted in its cost.
pub const TEXTS_COST_MAX: usize = 512 * 1024;

/// Most memory one log spends on gathered frames, in bytes; counted in its cost.
pub const GATHERED_COST_MAX: usize =
    8 * (CHUNK_BYTES_MAX + OUTPUT_HEADER_BYTES + CHUNK_OVERHEAD_BYTES);

pub(super) struct Kept {
    frames: VecDeque<Range>,
    cost: usize,
    cost_max: usize,
    frames_max: usize,
}

struct Range {
    from: u64,
    to: u64,
    frame: Bytes,
}

impl Range {
    fn cost(&self) -> usize {
        CHUNK_OVERHEAD_BYTES + self.frame.len()
    }
}

impl Kept {
    /// For text frames: they are searched one by one, newest first.
    pub(super) fn texts() -> Self {
        Self::within(TEXTS_COST_MAX, 64)
    }

    /// For frames that are gathered from several.
    pub(super) fn gathered() -> Self {
        Self::within(GATHERED_COST_MAX, 8)
    }

    fn within(cost_max: usize, frames_max: usize) -> Self {
        Self { frames: VecDeque::new(), cost: 0, cost_max, frames_max }
    }

    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    pub(super) fn find(&self, from: u64, to: u64) -> Option<Bytes> {
        let found = self.frames.iter().rev().find(|kept| (kept.from, kept.to) == (from, to));
        found.map(|kept| kept.frame.clone())
    }

    /// The latest that begins there and does not end beyond `up_to`, with its
    /// end.
    pub(super) fn find_from(&self, from: u64, up_to: u64) -> Option<(&Bytes, u64)> {
        let found = self.frames.iter().rev().find(|kept| kept.from == from && kept.to <= up_to);
        found.map(|kept| (&kept.frame, kept.to))
    }

    /// Keeps a frame, at the expense of those kept longest.
    pub(super) fn keep(&mut self, from: u64, to: u64, frame: Bytes) {
        let range = Range { from, to, frame };
        if range.cost() > self.cost_max {
            return;
        }
        self.shrink_to(self.cost_max - range.cost());
        if self.frames.len() == self.frames_max {
            self.drop_oldest();
        }
        self.cost += range.cost();
        self.frames.push_back(range);
    }

    pub(super) fn shrink_to(&mut self, cost_max: usize) {
        while self.cost > cost_max {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(range) = self.frames.pop_front() {
            self.cost -= range.cost();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_within_both_bounds() {
        let mut texts = Kept::texts();
        for at in 0..100 {
            texts.keep(at, at + 1, Bytes::from(vec![b'x'; 10]));
        }
        assert_eq!(texts.find(35, 36), None);
        assert!(texts.find(36, 37).is_some());
        assert_eq!(texts.find(99, 101), None, "another range is another frame");

        let large = Bytes::from(vec![b'x'; TEXTS_COST_MAX / 3]);
        for at in 100..110 {
            texts.keep(at, at + 1, large.clone());
            assert!(texts.cost() <= TEXTS_COST_MAX);
        }
        assert!(texts.find(109, 110).is_some());

        texts.keep(200, 201, Bytes::from(vec![b'x'; TEXTS_COST_MAX]));
        assert!(texts.find(109, 110).is_some(), "what never fits displaces nothing");
        texts.shrink_to(0);
        assert_eq!((texts.cost(), texts.frames.len()), (0, 0));
    }

    #[test]
    fn the_latest_of_those_that_begin_at_one_offset_is_found() {
        let mut kept = Kept::gathered();
        for to in [10, 30, 20] {
            kept.keep(5, to, Bytes::from(vec![b'x'; 10]));
        }
        assert_eq!(kept.find_from(5, 100).map(|(_, to)| to), Some(20));
        assert_eq!(kept.find_from(5, 19).map(|(_, to)| to), Some(10));
        assert_eq!(kept.find_from(5, 9), None);
        assert_eq!(kept.find_from(6, 100), None);
        for from in 100..200 {
            kept.keep(from, from + 1, Bytes::from(vec![b'x'; CHUNK_BYTES_MAX]));
        }
        assert_eq!((kept.frames.len(), kept.cost() <= GATHERED_COST_MAX), (8, true));
    }
}
