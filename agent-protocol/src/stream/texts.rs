//! The text frames that readers were given last, so that a chunk read by a
//! thousand of them is encoded once.
//!
//! An entry is named by its exact range. Offsets name the same bytes for ever,
//! so an entry can grow useless (its chunk was merged or evicted, nobody asks
//! for that range again) but never wrong, and nothing has to be invalidated.

use std::collections::VecDeque;

use bytes::Bytes;

use super::segment::CHUNK_OVERHEAD_BYTES;

/// Most memory one log spends on text frames, in bytes; counted in its cost.
pub const TEXTS_COST_MAX: usize = 512 * 1024;

/// Most entries: they are searched one by one, newest first.
const TEXTS_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Texts {
    kept: VecDeque<Text>,
    cost: usize,
}

struct Text {
    from: u64,
    to: u64,
    frame: Bytes,
}

impl Text {
    fn cost(&self) -> usize {
        CHUNK_OVERHEAD_BYTES + self.frame.len()
    }
}

impl Texts {
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    pub(super) fn find(&self, from: u64, to: u64) -> Option<Bytes> {
        let found = self.kept.iter().rev().find(|text| (text.from, text.to) == (from, to));
        found.map(|text| text.frame.clone())
    }

    /// Keeps a frame, at the expense of those kept longest.
    pub(super) fn keep(&mut self, from: u64, to: u64, frame: Bytes) {
        let text = Text { from, to, frame };
        if text.cost() > TEXTS_COST_MAX {
            return;
        }
        self.shrink_to(TEXTS_COST_MAX - text.cost());
        if self.kept.len() == TEXTS_MAX {
            self.drop_oldest();
        }
        self.cost += text.cost();
        self.kept.push_back(text);
    }

    pub(super) fn shrink_to(&mut self, cost_max: usize) {
        while self.cost > cost_max {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(text) = self.kept.pop_front() {
            self.cost -= text.cost();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_within_both_bounds() {
        let mut texts = Texts::default();
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
        assert_eq!((texts.cost(), texts.kept.len()), (0, 0));
    }
}
