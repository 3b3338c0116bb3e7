//! What of a stranger's terminal output may go to somebody's own terminal.
//!
//! A terminal does what it is told: it sets the clipboard, renames the window,
//! changes what keys send, and answers questions by typing the answer. So
//! nothing passes that is not known to be harmless:
//!
//! | passes | |
//! |---|---|
//! | text | as UTF-8; what is none becomes U+FFFD |
//! | `BEL BS HT LF VT FF CR` | |
//! | `CSI` … `m` | colours and styles |
//! | `CSI` … `A`–`H` `I` `Z` `` ` `` `a` `d` `e` `f` `s` `u` | the cursor moves |
//! | `CSI` … `J` `K` `X` `@` `P` `L` `M` `S` `T` `b` `g` `r` | erasing, inserting, scrolling, tabs |
//! | `CSI` … `SP q` | the cursor's shape |
//! | `CSI 4 h/l`, `CSI ? 6 7 12 25 47 1047 1048 1049 2026 h/l` | inserting, wrapping, the cursor, the other screen, drawing at once |
//! | `ESC 7 8 D E H M`, `ESC ( ) B 0` | the cursor saved, lines, line drawing |
//! | `OSC 8` with `http:`, `https:` or `mailto:` | links, if they are allowed |
//!
//! Everything else is taken away: the clipboard (`OSC 52`), titles, palettes,
//! notifications, reports of any kind, modes that change what keys or the
//! mouse send, images, printing, resets. So is a sequence that is longer than
//! any of these has reason to be.
//!
//! C1 controls count as what they stand for if they are UTF-8 (U+009B is
//! `CSI`), and are written in their 7-bit form.

/// Longest parameters of a control sequence, in bytes.
const PARAMETERS_MAX: usize = 128;

/// Longest link, in bytes.
const LINK_MAX: usize = 2048;

const BEL: u8 = 0x07;
const CAN: u8 = 0x18;
const SUB: u8 = 0x1A;
const ESC: u8 = 0x1B;

/// Lets through what may be shown in somebody's own terminal. The state is
/// kept from one call to the next: bytes may be cut inside a sequence or a
/// character.
///
/// ```
/// use trunkline_protocol::stream::TerminalFilter;
///
/// let (mut filter, mut shown) = (TerminalFilter::new(), Vec::new());
/// filter.feed(b"\x1b[31mred\x1b[0m\x1b]52;c;ZXZpbA==\x07 and no more\x1b[", &mut shown);
/// filter.feed(b"6n", &mut shown); // a question: where is the cursor?
/// assert_eq!(shown, b"\x1b[31mred\x1b[0m and no more");
/// ```
///
/// It does not look at what text says: a program can still print a line that
/// looks like a prompt.
#[derive(Debug, Clone, Default)]
pub struct TerminalFilter {
    links: bool,
    only_styles: bool,
    state: State,
    /// What has come of a character or a sequence, after its introducer.
    held: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Text,
    /// In a character that has so many bytes.
    Character(usize),
    Escape,
    /// After `ESC` and intermediates.
    Intermediate,
    Sequence,
    /// In an `OSC`, and whether too much of it has come.
    Command {
        too_long: bool,
    },
    /// In any other string: nothing of it passes.
    String,
    /// After `ESC` in a string; whether that was an `OSC`.
    End {
        command: bool,
        too_long: bool,
    },
}

impl TerminalFilter {
    /// What puts a terminal back in order when a stream ends anywhere: the
    /// style, the character set, the cursor, the margins, the screen, links.
    pub const RESTORE: &'static [u8] = b"\x1b[?2026l\x1b[?1049l\x1b[?6l\x1b[?7h\x1b[?25h\x1b[4l\
        \x1b[r\x1b(B\x1b[0m\x1b]8;;\x1b\\";

    /// A filter that takes links away.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets links (`OSC 8`) to `http:`, `https:` and `mailto:` through.
    #[must_use]
    pub fn with_links(mut self) -> Self {
        self.links = true;
        self
    }

    /// Lets of sequences only colours and styles through, and of controls only
    /// tab, line feed and carriage return: for lines that stand among others.
    #[must_use]
    pub fn only_styles(mut self) -> Self {
        self.only_styles = true;
        self
    }

    /// Appends to `shown` what of `bytes` may be shown. A sequence or a
    /// character that is cut at the end is kept, in at most 2 KiB, until the
    /// rest of it comes.
    pub fn feed(&mut self, bytes: &[u8], shown: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some((&byte, after)) = rest.split_first() {
            if self.state == State::Text {
                // Most output is plain already.
                let run = rest.iter().take_while(|byte| matches!(byte, b' '..=b'~')).count();
                if run > 0 {
                    shown.extend_from_slice(&rest[..run]);
                    rest = &rest[run..];
                    continue;
                }
            }
            if self.step(byte, shown) {
                rest = after;
            }
        }
    }

    /// Takes one byte; `false` if it is to be looked at once more, in another
    /// state.
    fn step(&mut self, byte: u8, shown: &mut Vec<u8>) -> bool {
        match self.state {
            State::Text => self.text(byte, shown),
            State::Character(length) => return self.character(byte, length, shown),
            State::Escape => return self.escape(byte, shown),
            State::Intermediate => match byte {
                b' '..=b'/' => self.hold(byte, PARAMETERS_MAX),
                b'0'..=b'~' => {
                    self.held.push(byte);
                    let is_set = matches!(self.held.as_slice(), [b'(' | b')', b'B' | b'0']);
                    if is_set && !self.only_styles {
                        self.pass(b"", &[], shown);
                    }
                    self.begin(State::Text);
                }
                _ => return self.abort(byte),
            },
            State::Sequence => match byte {
                b' '..=b'?' => self.hold(byte, PARAMETERS_MAX),
                b'@'..=b'~' => {
                    self.held.push(byte);
                    let may_pass = byte == b'm' || !self.only_styles;
                    if may_pass && self.held.len() <= PARAMETERS_MAX && is_harmless(&self.held) {
                        self.pass(b"[", &[], shown);
                    }
                    self.begin(State::Text);
                }
                // A terminal would carry these out at once, in the middle.
                BEL..=b'\r' => self.control(byte, shown),
                _ => return self.abort(byte),
            },
            State::Command { too_long } => match byte {
                BEL => self.command_ends(too_long, shown),
                ESC => self.state = State::End { command: true, too_long },
                CAN | SUB => self.begin(State::Text),
                _ if too_long || self.held.len() >= LINK_MAX => {
                    self.held.clear();
                    self.state = State::Command { too_long: true };
                }
                _ if self.held.ends_with(&[0xC2]) && byte == 0x9C => {
                    self.held.pop();
                    self.command_ends(too_long, shown);
                }
                _ => self.held.push(byte),
            },
            State::String => match byte {
                ESC => self.state = State::End { command: false, too_long: true },
                CAN | SUB => self.begin(State::Text),
                0x9C if self.held == [0xC2] => self.begin(State::Text),
                _ => {
                    // Only whether the last byte may begin a C1 is of use.
                    self.held.clear();
                    self.held.push(byte);
                }
            },
            State::End { command, too_long } => {
                if byte == b'\\' {
                    if command {
                        self.command_ends(too_long, shown);
                    }
                    self.begin(State::Text);
                } else {
                    // `ESC` ends a string whatever follows, and begins again.
                    self.begin(State::Escape);
                    return false;
                }
            }
        }
        true
    }

    fn text(&mut self, byte: u8, shown: &mut Vec<u8>) {
        let length = match byte {
            ESC => return self.begin(State::Escape),
            b' '..=b'~' => return shown.push(byte),
            BEL..=b'\r' => return self.control(byte, shown),
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            0..=0x7F => return, // other controls
            _ => return shown.extend_from_slice(NO_CHARACTER),
        };
        self.begin(State::Character(length));
        self.held.push(byte);
    }

    fn control(&self, byte: u8, shown: &mut Vec<u8>) {
        if !self.only_styles || matches!(byte, b'\t' | b'\n' | b'\r') {
            shown.push(byte);
        }
    }

    fn character(&mut self, byte: u8, length: usize, shown: &mut Vec<u8>) -> bool {
        self.held.push(byte);
        match std::str::from_utf8(&self.held) {
            Ok(_) => match self.held.as_slice() {
                [0xC2, c1 @ 0x80..=0x9F] => self.c1(*c1),
                character => {
                    shown.extend_from_slice(character);
                    self.begin(State::Text);
                }
            },
            // It may yet become one.
            Err(error) if error.error_len().is_none() && self.held.len() < length => {}
            Err(_) => {
                shown.extend_from_slice(NO_CHARACTER);
                self.begin(State::Text);
                return false;
            }
        }
        true
    }

    /// A control of one character, as if it were written with two.
    fn c1(&mut self, c1: u8) {
        let state = match c1 {
            0x9B => State::Sequence,
            0x9D => State::Command { too_long: false },
            0x90 | 0x98 | 0x9E | 0x9F => State::String,
            _ => State::Text, // lines and tabs have other names
        };
        self.begin(state);
    }

    fn escape(&mut self, byte: u8, shown: &mut Vec<u8>) -> bool {
        match byte {
            b'[' => self.begin(State::Sequence),
            b']' => self.begin(State::Command { too_long: false }),
            b'P' | b'X' | b'^' | b'_' => self.begin(State::String),
            b' '..=b'/' => {
                self.begin(State::Intermediate);
                self.held.push(byte);
            }
            b'7' | b'8' | b'D' | b'E' | b'H' | b'M' if !self.only_styles => {
                self.pass(b"", &[byte], shown);
                self.begin(State::Text);
            }
            b'0'..=b'~' => self.begin(State::Text),
            _ => return self.abort(byte),
        }
        true
    }

    fn command_ends(&mut self, too_long: bool, shown: &mut Vec<u8>) {
        if self.links && !too_long && is_link(&self.held) {
            self.pass(b"]", b"\x1b\\", shown);
        }
        self.begin(State::Text);
    }

    /// What was held passes, with what goes before and after it.
    fn pass(&mut self, introducer: &[u8], end: &[u8], shown: &mut Vec<u8>) {
        shown.push(ESC);
        shown.extend_from_slice(introducer);
        shown.append(&mut self.held);
        shown.extend_from_slice(end);
    }

    /// One more than there is room for is held, so that it shows.
    fn hold(&mut self, byte: u8, most: usize) {
        if self.held.len() <= most {
            self.held.push(byte);
        }
    }

    fn begin(&mut self, state: State) {
        self.held.clear();
        self.state = state;
    }

    /// A byte that has no place in a sequence ends it, as terminals have it,
    /// and is looked at as what it is.
    fn abort(&mut self, byte: u8) -> bool {
        self.begin(State::Text);
        matches!(byte, CAN | SUB)
    }
}

const NO_CHARACTER: &[u8] = "\u{FFFD}".as_bytes();

/// What ends control sequences that only draw.
const DRAWING: &[u8] = b"mABCDEFGHIZ`adefsuJKX@PLMSTbgr";

/// A control sequence without its introducer.
fn is_harmless(sequence: &[u8]) -> bool {
    let Some((last, parameters)) = sequence.split_last() else { return false };
    let are_numbers = |numbers: &[u8]| {
        let mut each = numbers.split(|byte| matches!(byte, b';' | b':'));
        // Four digits are more than any screen has.
        each.all(|number| number.len() <= 4 && number.iter().all(u8::is_ascii_digit))
    };
    match (last, parameters) {
        (b'q', [numbers @ .., b' ']) => are_numbers(numbers),
        (last, numbers) if DRAWING.contains(last) => are_numbers(numbers),
        (b'h' | b'l', b"4") => true,
        (b'h' | b'l', [b'?', modes @ ..]) => modes.split(|byte| *byte == b';').all(|mode| {
            let known: [&[u8]; 9] =
                [b"6", b"7", b"12", b"25", b"47", b"1047", b"1048", b"1049", b"2026"];
            known.contains(&mode)
        }),
        _ => false,
    }
}

/// An `OSC 8`, without its introducer and end: `8;PARAMETERS;URI`. An empty URI
/// ends a link.
fn is_link(command: &[u8]) -> bool {
    let mut parts = command.splitn(3, |byte| *byte == b';');
    let (Some(b"8"), Some(parameters), Some(uri)) = (parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let is_plain = |text: &[u8]| text.iter().all(|byte| matches!(byte, b'!'..=b'~'));
    let known: [&[u8]; 3] = [b"http:", b"https:", b"mailto:"];
    let is_known = known.iter().any(|scheme| {
        uri.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme))
    });
    is_plain(parameters) && is_plain(uri) && (uri.is_empty() || is_known)
}

#[cfg(test)]
mod tests;
