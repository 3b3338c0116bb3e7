//! What remains of terminal output when everything that is not text is taken
//! away: a small state machine over bytes that may be cut anywhere.
//!
//! | taken away | |
//! |---|---|
//! | `ESC [` to a final byte `@` … `~` | control sequences: colours, cursor moves |
//! | `ESC ]` to `BEL` or `ESC \` | commands to the terminal: titles, links, clipboard |
//! | `ESC P`, `ESC X`, `ESC ^`, `ESC _` to `ESC \` | other strings: images, key maps |
//! | `ESC`, intermediates, one byte | character sets, saved cursors |
//! | C1 controls | the same again as U+0080 to U+009F |
//! | C0 controls and DEL | all but tab and line feed |
//!
//! `CR LF` is one line feed. A carriage return with more text after it ends
//! the line too: a progress bar leaves each of its states on a line of its
//! own, instead of all of them in one.
//!
//! `CAN`, `SUB` and `ESC` abort whatever they interrupt, as terminals have it.
//! Strings may be of any length: images are. A byte that continues a UTF-8
//! character is never a control, inside strings either, so a title with `✓`
//! (which holds the byte `9C`) ends where it ends. A single byte of the C1
//! range that belongs to no character is taken away; as `9B` it begins a
//! control sequence and as `9C` it ends a string, but it begins none: in
//! output that is not UTF-8 that would swallow all that follows.

/// Takes the text out of terminal output. The state is kept from one call to
/// the next: bytes may be cut inside a sequence or a character.
///
/// ```
/// use trunkline_protocol::stream::Plain;
///
/// let (mut plain, mut text) = (Plain::default(), Vec::new());
/// plain.feed(b"\x1b[1;3", &mut text);
/// plain.feed(b"1merror\x1b[0m: no such file\r\n", &mut text);
/// assert_eq!(text, b"error: no such file\n");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Plain {
    state: State,
    line: Line,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Text(Utf8),
    /// After `ESC`.
    Escape,
    /// After `ESC` and one or more intermediates.
    Intermediate,
    /// In a control sequence, before its final byte.
    Sequence,
    /// In a command to the terminal, which `BEL` ends, too.
    Command(Utf8),
    /// In any other string.
    String(Utf8),
}

impl Default for State {
    fn default() -> Self {
        Self::Text(Utf8::Between)
    }
}

/// Where in a character the next byte falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Utf8 {
    Between,
    /// After `C2`, held back: the next byte tells a control from a character.
    AfterC2,
    /// So many bytes to come.
    Left(u8),
}

impl Utf8 {
    /// After a byte that begins a character, or is one.
    fn after(byte: u8) -> Self {
        match byte {
            0xC2 => Self::AfterC2,
            0xC3..=0xDF => Self::Left(1),
            0xE0..=0xEF => Self::Left(2),
            0xF0..=0xF4 => Self::Left(3),
            _ => Self::Between, // ASCII, or no UTF-8
        }
    }

    /// After one more byte of a character of which so many were to come.
    fn one_less(left: u8) -> Self {
        if left > 1 { Self::Left(left - 1) } else { Self::Between }
    }
}

/// What a carriage return would do to the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Line {
    #[default]
    Empty,
    Written,
    /// Text, then a carriage return: more text begins another line.
    Returned,
}

const BEL: u8 = 0x07;
const CAN: u8 = 0x18;
const SUB: u8 = 0x1A;
const ESC: u8 = 0x1B;
const C1_CSI: u8 = 0x9B;
const C1_ST: u8 = 0x9C;

impl Plain {
    /// Appends the text in `bytes` to `text`. A character cut at the end of
    /// `bytes` may be appended in two parts.
    pub fn feed(&mut self, bytes: &[u8], text: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some((&byte, after)) = rest.split_first() {
            // Most output is plain already.
            if (self.state, self.line) == (State::default(), Line::Written) {
                let run = rest.iter().take_while(|byte| matches!(byte, b' '..=b'~')).count();
                if run > 0 {
                    text.extend_from_slice(&rest[..run]);
                    rest = &rest[run..];
                    continue;
                }
            }
            self.step(byte, &mut |shown| text.push(shown));
            rest = after;
        }
    }

    /// Takes one byte and shows what it completes: usually itself or nothing,
    /// at most a line feed, a `C2` held back, and itself, in this order.
    pub(super) fn step(&mut self, byte: u8, show: &mut impl FnMut(u8)) {
        match (self.state, byte) {
            (_, ESC) => {
                self.give_up_c2(show);
                self.state = State::Escape;
            }

            (State::Text(Utf8::AfterC2), 0x80..=0x9F) => self.state = after_c1(byte),
            (State::Text(Utf8::AfterC2), 0xA0..=0xBF) => {
                self.show(0xC2, show);
                self.show(byte, show);
                self.state = State::default();
            }
            (State::Text(Utf8::Left(left)), 0x80..=0xBF) => {
                self.show(byte, show);
                self.state = State::Text(Utf8::one_less(left));
            }
            (State::Text(_), _) => {
                self.give_up_c2(show);
                self.text(byte, show);
            }

            (State::Escape, b'[') => self.state = State::Sequence,
            (State::Escape, b']') => self.state = State::Command(Utf8::Between),
            (State::Escape, b'P' | b'X' | b'^' | b'_') => {
                self.state = State::String(Utf8::Between);
            }
            // The end of whatever it was.
            (_, CAN | SUB)
            | (State::Escape | State::Intermediate, b'0'..=b'~')
            | (State::Sequence, b'@'..=b'~')
            | (State::Command(_), BEL)
            | (
                State::Command(Utf8::AfterC2 | Utf8::Between)
                | State::String(Utf8::AfterC2 | Utf8::Between),
                C1_ST,
            ) => self.state = State::default(),

            (State::Escape | State::Intermediate, b' '..=b'/') => self.state = State::Intermediate,
            (State::Sequence, b' '..=b'?') => {}
            // Controls are obeyed amid a sequence, which goes on after them.
            (State::Escape | State::Intermediate | State::Sequence, ..b' ' | 0x7F) => {
                self.control(byte, show);
            }
            // No sequence has such a byte: it was none.
            (State::Escape | State::Intermediate | State::Sequence, 0x80..) => {
                self.text(byte, show);
            }
            (State::Command(utf8), _) => self.state = State::Command(within_string(utf8, byte)),
            (State::String(utf8), _) => self.state = State::String(within_string(utf8, byte)),
        }
    }

    /// A byte of text that continues no character.
    fn text(&mut self, byte: u8, show: &mut impl FnMut(u8)) {
        self.state = State::Text(Utf8::after(byte));
        match byte {
            ..b' ' | 0x7F => self.control(byte, show),
            C1_CSI => self.state = State::Sequence,
            0x80..=0x9F | 0xC2 => {} // taken away; held back
            _ => self.show(byte, show),
        }
    }

    fn control(&mut self, byte: u8, show: &mut impl FnMut(u8)) {
        match byte {
            b'\t' => self.show(byte, show),
            b'\n' => {
                self.line = Line::Empty;
                show(byte);
            }
            b'\r' if self.line == Line::Written => self.line = Line::Returned,
            _ => {} // shows nothing
        }
    }

    fn show(&mut self, byte: u8, show: &mut impl FnMut(u8)) {
        if self.line == Line::Returned {
            show(b'\n');
        }
        self.line = Line::Written;
        show(byte);
    }

    /// The `C2` held back began no character. It is shown all the same: what
    /// is not UTF-8 is text, too.
    fn give_up_c2(&mut self, show: &mut impl FnMut(u8)) {
        if self.state == State::Text(Utf8::AfterC2) {
            self.show(0xC2, show);
        }
    }
}

fn after_c1(control: u8) -> State {
    match control {
        0x90 | 0x98 | 0x9E | 0x9F => State::String(Utf8::Between),
        C1_CSI => State::Sequence,
        0x9D => State::Command(Utf8::Between),
        _ => State::default(), // complete in itself
    }
}

fn within_string(utf8: Utf8, byte: u8) -> Utf8 {
    match (utf8, byte) {
        (Utf8::Left(left), 0x80..=0xBF) => Utf8::one_less(left),
        _ => Utf8::after(byte),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(bytes: &[u8]) -> String {
        let mut text = Vec::new();
        Plain::default().feed(bytes, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn people_read_the_text_and_nothing_else() {
        for (shown, read) in [
            ("plain, tab\there\n", "plain, tab\there\n"),
            ("\x1b[1;31merror\x1b[0m: no", "error: no"),
            ("\x1b[38;2;1;2;3mrgb\x1b[?25l", "rgb"),
            ("\x1b]0;title\x07$ ls", "$ ls"),
            ("\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
            ("\x1b]0;✓ done\x07after", "after"),
            ("\x1b]0;é\u{9c}after", "after"),
            ("\x1bPq#0;2;0\x07;0-~\x1b\\image", "image"),
            ("\x1b_Gf=32;AAAA\x1b\\kitty", "kitty"),
            ("\x1bXsos\x1b\\\x1b^pm\x1b\\rest", "rest"),
            ("\x1bPtmux;\x1b\x1b]52;c;Zm9v\x07\x1b\\tmux", "tmux"),
            ("\x1b(B\x1b7\x1b8\x1b=\x1b#8charset", "charset"),
            ("\u{9b}31mred\u{9d}0;t\u{9c}!\u{85}", "red!"),
            ("été ✓ 🦀 \u{a0}", "été ✓ 🦀 \u{a0}"),
            ("\x07\x08bell\x7f\0", "bell"),
            ("\x1b[31\x18cancelled", "cancelled"),
            ("\x1b]0;never ends\x1b[0mends", "ends"),
            ("\x1b[3\n1mline", "\nline"),
            ("\x1b\x1b[mtwice", "twice"),
            ("\x1b[31é", "é"),
        ] {
            assert_eq!(plain(shown.as_bytes()), read, "{shown:?}");
        }
    }

    #[test]
    fn each_state_of_a_progress_bar_has_its_line() {
        for (shown, read) in [
            ("one\r\ntwo\r\n", "one\ntwo\n"),
            ("one\r\r\ntwo", "one\ntwo"),
            ("10%\r20%\r\x1b[K30%\r\n", "10%\n20%\n30%\n"),
            ("\r\x1b[K$ ", "$ "),
            ("a\n\rb", "a\nb"),
            ("end\r", "end"),
        ] {
            assert_eq!(plain(shown.as_bytes()), read, "{shown:?}");
        }
    }

    #[test]
    fn what_is_not_utf8_swallows_nothing() {
        for (shown, read) in [
            (&b"\xe9t\xe9"[..], "\u{fffd}t\u{fffd}"), // Latin-1
            (b"\x90\x9d\x85kept", "kept"),
            (b"\x9b1mkept", "kept"),
            (b"\xc2", ""), // may still become a character
            (b"\xc2a\xc2\x1b[mb", "\u{fffd}a\u{fffd}b"),
            (b"\xe2\x9c\xc3\xa9", "\u{fffd}é"),
            (b"\x1b]0;caf\xe9!\x9cafter", "after"),
        ] {
            let read_so: String = read.into();
            assert_eq!(plain(shown), read_so, "{shown:?}");
        }
    }

    proptest! {
        #[test]
        fn where_the_bytes_are_cut_makes_no_difference(
            tokens in prop::collection::vec(prop_oneof![
                prop::sample::select(vec![
                    &b"\x1b"[..], b"[", b"]", b"P", b"\\", b"31m", b"\x07", b"\x18", b"\r", b"\n",
                    b"\xc2", b"\x9b", b"\x9c", b"\xe2\x9c\x93", b"\xf0\x9f", b"text", b"(",
                ]).prop_map(<[u8]>::to_vec),
                prop::collection::vec(any::<u8>(), 0..4),
            ], 0..40),
            cuts in prop::collection::vec(0usize..100, 0..10),
        ) {
            let bytes = tokens.concat();
            let (mut whole, mut once) = (Vec::new(), Plain::default());
            once.feed(&bytes, &mut whole);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let (mut parts, mut often) = (Vec::new(), Plain::default());
            for pair in cuts.windows(2) {
                often.feed(&bytes[pair[0]..pair[1]], &mut parts);
            }
            prop_assert_eq!(&whole, &parts);
            prop_assert_eq!(once, often);
            prop_assert!(!whole.iter().any(|b| b.is_ascii_control() && !b"\t\n".contains(b)));
        }

        #[test]
        fn text_is_left_alone(text in "[ -~é✓🦀\t\n]*") {
            prop_assert_eq!(plain(text.as_bytes()), text);
        }
    }
}
