//! What a view still has of a stream: its newest bytes and gaps within a
//! bound, to be searched and exported.

use std::collections::VecDeque;
use std::ops::Range;

use super::plain::Plain;
use crate::message::Gap;

/// What a gap counts in a scrollback, in bytes.
pub const GAP_COST_BYTES: usize = 128;

/// Most of a line that a [`Match`] repeats, in bytes: 1 KiB.
pub const MATCH_LINE_BYTES_MAX: usize = 1024;

/// A line in which something was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// Where in the stream the first occurrence in this line begins.
    pub offset: u64,
    /// The line as plain text, without its end; of a longer one, the
    /// [`MATCH_LINE_BYTES_MAX`] bytes around the occurrence.
    pub line: String,
}

pub(super) struct Scrollback {
    bytes_max: usize,
    bytes: VecDeque<u8>,
    /// What the bytes are, in order. Two runs of bytes have a gap between.
    runs: VecDeque<Run>,
    gaps: usize,
    /// Where the view began, and from where it is kept.
    began: u64,
    kept_from: u64,
    /// The state at `kept_from`: the cut may fall into a sequence.
    plain: Plain,
}

enum Run {
    Bytes { offset: u64, len: usize },
    Gap(Gap),
}

impl Scrollback {
    pub(super) fn new(began: u64, bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: VecDeque::new(),
            runs: VecDeque::new(),
            gaps: 0,
            began,
            kept_from: began,
            plain: Plain::default(),
        }
    }

    pub(super) fn kept_from(&self) -> u64 {
        self.kept_from
    }

    /// Bytes and gaps, as counted against the bound.
    pub(super) fn cost(&self) -> usize {
        self.bytes.len() + self.gaps * GAP_COST_BYTES
    }

    /// Bytes that follow on all that is there.
    pub(super) fn push_bytes(&mut self, offset: u64, data: &[u8]) {
        self.bytes.extend(data);
        match self.runs.back_mut() {
            Some(Run::Bytes { len, .. }) => *len += data.len(),
            Some(Run::Gap(_)) | None => self.runs.push_back(Run::Bytes { offset, len: data.len() }),
        }
        self.trim();
    }

    /// A gap that follows on all that is there.
    pub(super) fn push_gap(&mut self, gap: Gap) {
        match self.runs.back_mut() {
            Some(Run::Gap(last)) if last.reason == gap.reason => last.to = gap.to,
            _ => {
                self.gaps += 1;
                self.runs.push_back(Run::Gap(gap));
            }
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self.cost() > self.bytes_max {
            let excess = self.cost() - self.bytes_max;
            match self.runs.pop_front() {
                Some(Run::Bytes { offset, len }) => {
                    let gone = excess.min(len);
                    for byte in self.bytes.drain(..gone) {
                        self.plain.step(byte, &mut |_| {});
                    }
                    self.kept_from = offset + gone as u64;
                    if gone < len {
                        let rest = Run::Bytes { offset: self.kept_from, len: len - gone };
                        self.runs.push_front(rest);
                    }
                }
                Some(Run::Gap(gap)) => {
                    self.gaps -= 1;
                    self.kept_from = gap.to;
                    self.plain = Plain::default();
                }
                None => return, // nothing costs nothing
            }
        }
    }

    /// The runs in order; bytes with their offset, in up to two slices.
    fn steps(&self) -> impl Iterator<Item = Step<'_>> {
        let mut at = 0;
        self.runs.iter().map(move |run| match run {
            Run::Gap(gap) => Step::Gap(gap),
            Run::Bytes { offset, len } => {
                let range = at..at + len;
                at = range.end;
                Step::Bytes { offset: *offset, slices: self.slices(range) }
            }
        })
    }

    fn slices(&self, range: Range<usize>) -> [&[u8]; 2] {
        let (first, second) = self.bytes.as_slices();
        let cut = |at: usize| (at.min(first.len()), at.saturating_sub(first.len()));
        let (from, to) = (cut(range.start), cut(range.end));
        [&first[from.0..to.0], &second[from.1..to.1]]
    }

    pub(super) fn search(&self, needle: &str, limit: usize) -> Vec<Match> {
        let mut search = Search::new(needle.as_bytes(), limit);
        if needle.is_empty() || limit == 0 {
            return Vec::new();
        }
        let mut plain = self.plain;
        let mut shown = Vec::new();
        for step in self.steps() {
            match step {
                Step::Gap(_) => {
                    // Nobody knows what stood there: no line reaches across.
                    search.end_line();
                    plain = Plain::default();
                }
                Step::Bytes { offset, slices } => {
                    for (byte, at) in slices.into_iter().flatten().zip(offset..) {
                        plain.step(*byte, &mut |byte| shown.push(byte));
                        search.take(at, &shown);
                        shown.clear();
                    }
                }
            }
        }
        search.end_line();
        search.found.into()
    }

    pub(super) fn export_plain(&self) -> String {
        let mut text = Vec::with_capacity(self.bytes.len());
        if let Some(mark) = self.mark_of_start() {
            text.extend_from_slice(mark.as_bytes());
            text.push(b'\n');
        }
        let mut plain = self.plain;
        for step in self.steps() {
            match step {
                Step::Bytes { slices, .. } => {
                    for slice in slices {
                        plain.feed(slice, &mut text);
                    }
                }
                Step::Gap(gap) => {
                    if text.last().is_some_and(|last| *last != b'\n') {
                        text.push(b'\n');
                    }
                    text.extend_from_slice(mark_of(gap).as_bytes());
                    text.push(b'\n');
                    plain = Plain::default();
                }
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(super) fn export_ansi(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes.len());
        // Wherever a gap cuts, even inside a title that would swallow the
        // mark: cancel what is under way, forget the colours, begin a line.
        let mark = |bytes: &mut Vec<u8>, mark: &str| {
            bytes.extend_from_slice(b"\x18\x1b[0m\r\n");
            bytes.extend_from_slice(mark.as_bytes());
            bytes.extend_from_slice(b"\r\n");
        };
        if let Some(start) = self.mark_of_start() {
            mark(&mut bytes, &start);
        }
        for step in self.steps() {
            match step {
                Step::Bytes { slices, .. } => bytes.extend(slices.concat()),
                Step::Gap(gap) => mark(&mut bytes, &mark_of(gap)),
            }
        }
        bytes
    }

    fn mark_of_start(&self) -> Option<String> {
        let (from, to) = (self.began, self.kept_from);
        (from < to)
            .then(|| format!("[trunkline: {} bytes no longer kept: {from}..{to}]", to - from))
    }
}

fn mark_of(gap: &Gap) -> String {
    let Gap { from, to, reason } = gap;
    // A reason may be a word that a peer chose: it must not draw.
    let reason = reason.as_str().escape_debug();
    format!("[trunkline: {} bytes missing: {from}..{to}, {reason}]", to - from)
}

enum Step<'a> {
    Bytes { offset: u64, slices: [&'a [u8]; 2] },
    Gap(&'a Gap),
}

/// One pass over the text, line by line.
struct Search<'a> {
    needle: &'a [u8],
    limit: usize,
    line: Vec<u8>,
    /// Where in the stream the bytes of the line stood: (index, offset) where
    /// that does not just count on.
    places: Vec<(usize, u64)>,
    found: VecDeque<Match>,
}

impl<'a> Search<'a> {
    fn new(needle: &'a [u8], limit: usize) -> Self {
        let (line, places, found) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { needle, limit, line, places, found }
    }

    /// What the byte at `offset` has shown. The last of it is that byte, the
    /// one before it the `C2` before that byte or the end of another line.
    fn take(&mut self, offset: u64, shown: &[u8]) {
        for (byte, back) in shown.iter().zip((0..shown.len() as u64).rev()) {
            if *byte == b'\n' {
                self.end_line();
                continue;
            }
            let (index, place) = (self.line.len(), offset - back);
            if self.places.last().is_none_or(|&(i, p)| p + (index - i) as u64 != place) {
                self.places.push((index, place));
            }
            self.line.push(*byte);
        }
    }

    fn end_line(&mut self) {
        let found = self.line.windows(self.needle.len()).position(|window| window == self.needle);
        if let Some(at) = found {
            let after = self.places.partition_point(|&(index, _)| index <= at);
            let (index, place) = self.places[after - 1]; // the first index is 0
            if self.found.len() == self.limit {
                self.found.pop_front();
            }
            let offset = place + (at - index) as u64;
            self.found.push_back(Match { offset, line: excerpt(&self.line, at) });
        }
        self.line.clear();
        self.places.clear();
    }
}

/// At most [`MATCH_LINE_BYTES_MAX`] bytes of the line around `at`, cut between
/// characters.
fn excerpt(line: &[u8], at: usize) -> String {
    let is_cut = |index: usize| {
        index > 0 && line.get(index).is_some_and(|byte| byte & 0xC0 == 0x80) // UTF-8 goes on here
    };
    let latest = line.len().saturating_sub(MATCH_LINE_BYTES_MAX);
    let mut from = at.saturating_sub(MATCH_LINE_BYTES_MAX / 4).min(latest);
    while is_cut(from) && from < at {
        from += 1;
    }
    let mut to = line.len().min(from + MATCH_LINE_BYTES_MAX);
    while is_cut(to) && to > from {
        to -= 1;
    }
    String::from_utf8_lossy(&line[from..to]).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::GapReason;

    fn kept(began: u64, bytes_max: usize, outputs: &[&[u8]]) -> Scrollback {
        let mut scrollback = Scrollback::new(began, bytes_max);
        let mut at = began;
        for output in outputs {
            scrollback.push_bytes(at, output);
            at += output.len() as u64;
        }
        scrollback
    }

    fn gap(from: u64, to: u64) -> Gap {
        Gap { from, to, reason: GapReason::Evicted }
    }

    #[test]
    fn coloured_text_cut_in_pieces_is_found_where_it_stands() {
        let screen = kept(0, 1000, &[b"ok\r\n\x1b[3", b"1mer\x1b[1mr", b"or\x1b[0m: disk\r\n$ "]);
        let found = screen.search("error", 10);
        assert_eq!(found, [Match { offset: 9, line: "error: disk".into() }]);
        assert_eq!(screen.search("disk\n$", 10), []);
        assert_eq!(screen.search("", 10), []);
        assert_eq!(screen.search("error", 0), []);
    }

    #[test]
    fn a_character_led_by_c2_is_found_at_its_first_byte() {
        let screen = kept(0, 1000, &["ab\u{a3}5".as_bytes()]);
        assert_eq!(screen.search("\u{a3}5", 1)[0].offset, 2);
    }

    #[test]
    fn the_newest_matches_count_and_long_lines_are_cut() {
        let lines: Vec<String> = (0..100).map(|n| format!("line {n}\n")).collect();
        let screen = kept(0, 10_000, &[lines.concat().as_bytes()]);
        let found: Vec<String> = screen.search("line", 2).into_iter().map(|m| m.line).collect();
        assert_eq!(found, ["line 98", "line 99"]);

        let long = format!("{}needle{}", "é".repeat(5_000), "ü".repeat(5_000));
        let found = kept(0, 100_000, &[long.as_bytes()]).search("needle", 9);
        assert_eq!((found.len(), found[0].offset), (1, 10_000));
        let line = &found[0].line;
        assert!(line.contains("éneedleü") && !line.contains('\u{fffd}'), "{line}");
        assert!(line.len() <= MATCH_LINE_BYTES_MAX && line.len() > MATCH_LINE_BYTES_MAX - 4);
    }

    #[test]
    fn a_gap_is_seen_in_both_exports_and_found_across_by_nobody() {
        let mut screen = kept(0, 1000, &[b"\x1b[31mab", b"cd\x1b]0;tit"]);
        screen.push_gap(gap(18, 50));
        screen.push_bytes(50, b"ef\r\n");
        assert_eq!(
            screen.export_plain(),
            "abcd\n[trunkline: 32 bytes missing: 18..50, evicted]\nef\n"
        );
        assert_eq!(
            screen.export_ansi().escape_ascii().to_string(),
            r"\x1b[31mabcd\x1b]0;tit\x18\x1b[0m\r\n[trunkline: 32 bytes missing: 18..50, evicted]\r\nef\r\n"
        );
        assert_eq!(screen.search("cdef", 1), []);
        assert_eq!(screen.search("trunkline", 1), [], "marks are not output");
    }

    #[test]
    fn a_reason_cannot_draw_on_the_terminal() {
        let mut screen = kept(0, 1000, &[]);
        let reason = GapReason::Other("\x1b]0;evil\x07".into());
        screen.push_gap(Gap { from: 0, to: 9, reason });
        assert!(!screen.export_plain().contains(['\x1b', '\x07']));
        assert_eq!(screen.export_ansi().split(|byte| *byte == b'\x1b').count(), 2);
    }

    #[test]
    fn the_oldest_is_dropped_even_within_an_escape_sequence() {
        let screen = kept(100, 8, &[b"text\x1b[38;5;9mred"]);
        assert_eq!(screen.kept_from(), 108);
        assert_eq!(screen.export_plain(), "[trunkline: 8 bytes no longer kept: 100..108]\nred");
        assert_eq!(screen.search("red", 1)[0].offset, 113);
        assert!(screen.export_ansi().ends_with(b"\r\n;5;9mred"));
    }

    #[test]
    fn a_flood_of_gaps_is_bounded_too() {
        let mut screen = kept(0, 1000, &[]);
        for at in 0..1_000 {
            screen.push_bytes(2 * at, b"x");
            screen.push_gap(gap(2 * at + 1, 2 * at + 2));
            assert!(screen.cost() <= 1000 && screen.runs.len() <= 16);
        }
        assert_eq!(screen.kept_from(), 1_986);
    }

    proptest! {
        /// Against the naive reader: all bytes in one row, stripped at once.
        #[test]
        fn search_and_export_agree_with_the_whole_stream(
            outputs in prop::collection::vec("(a|b|é|\u{a3}|\x1b\\[3|1m|\r?\n){0,12}", 0..30),
            bytes_max in prop_oneof![Just(10_000usize), 0usize..200],
        ) {
            let outputs: Vec<&[u8]> = outputs.iter().map(String::as_bytes).collect();
            let screen = kept(0, bytes_max, &outputs);
            let all = outputs.concat();
            let cut = all.len().saturating_sub(bytes_max);
            prop_assert_eq!(screen.kept_from(), cut as u64);

            let (mut plain, mut text) = (Plain::default(), Vec::new());
            plain.feed(&all[..cut], &mut text);
            let (mut kept, mut places) = (Vec::new(), Vec::new());
            for (at, byte) in all.iter().enumerate().skip(cut) {
                plain.step(*byte, &mut |shown| kept.push(shown));
                places.resize(kept.len(), at as u64);
            }
            let text = String::from_utf8_lossy(&kept).into_owned();
            let ansi = screen.export_ansi();
            prop_assert!(ansi.ends_with(&all[cut..]));
            if cut == 0 {
                prop_assert_eq!(&ansi, &all);
                prop_assert_eq!(screen.export_plain(), text.clone());
            }

            let mut expected = Vec::new();
            let mut at = 0;
            for line in kept.split(|byte| *byte == b'\n') {
                if let Some(found) = line.windows(2).position(|two| two == b"ab") {
                    let line = String::from_utf8_lossy(line).into_owned();
                    expected.push(Match { offset: places[at + found], line });
                }
                at += line.len() + 1;
            }
            prop_assert_eq!(screen.search("ab", usize::MAX), expected);
        }
    }
}
