//! The fuzzer's bytes, read as decisions.

/// A sequence of decisions. Where the bytes end every decision is the first
/// choice, so a plan always ends.
#[derive(Debug)]
pub struct Plan<'a> {
    bytes: &'a [u8],
}

impl<'a> Plan<'a> {
    /// Reads these.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Whether nothing is left to decide.
    pub fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        *first
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u8) -> u8 {
        self.byte() % n.max(1)
    }

    /// One of these.
    pub fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()].clone()
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u8) -> bool {
        self.below(n) == n - 1
    }

    /// Something, or nothing.
    pub fn maybe<T>(&mut self, some: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.byte() & 1 == 1).then(|| some(self))
    }

    /// A short list.
    pub fn list<T>(&mut self, max: u8, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(max + 1)).map(|_| one(self)).collect()
    }

    /// A number of 16 bits.
    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// A number: mostly small, sometimes at the edge of what is allowed.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 6] =
            [i64::MAX as u64, i64::MAX as u64 - 1, u64::MAX, 1 << 32, 1 << 53, 16 * 1024];
        match self.byte() {
            small @ 0..200 => u64::from(small),
            200..250 => u64::from(self.short()),
            edge => EDGES[usize::from(edge - 250)],
        }
    }

    /// An offset: a number that fits 63 bits.
    pub fn offset(&mut self) -> u64 {
        self.number() & (i64::MAX as u64)
    }

    /// Up to `max` of the bytes that follow.
    pub fn take(&mut self, max: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(max.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    /// A text of the bytes that follow.
    pub fn text(&mut self, max: usize) -> String {
        String::from_utf8_lossy(self.take(max)).into_owned()
    }
}
