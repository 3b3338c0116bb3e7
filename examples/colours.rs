//! Terminal output of others, made fit for one's own terminal: text and
//! colours pass, everything that could do more than that does not.
//!
//! What a command writes is not to be trusted: escape sequences move the
//! cursor, rename windows, and make some terminals type. A terminal emulator
//! that draws each command in its own box shows all of it; a line interface
//! cannot, and lets through what stays harmless anywhere.

/// Longest colour sequence that is let through.
const SEQUENCE_MAX: usize = 32;

/// A filter for one stream. Bytes may be cut anywhere.
#[derive(Debug, Default)]
pub struct Colours {
    state: State,
    /// The beginning of a character whose rest has not come.
    cut: Vec<u8>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    Escape,
    /// `ESC [`, and what followed so far.
    Sequence(String),
    /// `ESC ]`, `ESC P` and the like, up to BEL or `ESC \`.
    Hidden,
    /// ESC within such a string.
    MaybeOver,
    /// `ESC (` and the like: one more character belongs to it.
    OneMore,
}

impl Colours {
    /// What of `bytes` may be shown.
    pub fn feed(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.cut);
        all.extend_from_slice(bytes);
        let mut shown = String::with_capacity(all.len());
        let mut rest = all.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.feed_text(text, &mut shown);
                    return shown;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    self.feed_text(&String::from_utf8_lossy(good), &mut shown);
                    let Some(len) = error.error_len() else {
                        self.cut = bad.to_vec();
                        return shown;
                    };
                    self.feed_text("\u{fffd}", &mut shown);
                    rest = &bad[len..];
                }
            }
        }
    }

    fn feed_text(&mut self, text: &str, shown: &mut String) {
        for c in text.chars() {
            self.state = match (std::mem::take(&mut self.state), c) {
                (State::Hidden, '\x1b') => State::MaybeOver,
                (State::Hidden, '\x07' | '\u{9c}') | (State::MaybeOver, '\\') => State::Text,
                (State::Hidden | State::MaybeOver, _)
                | (State::Escape, ']' | 'P' | 'X' | '^' | '_') => State::Hidden,
                (_, '\x1b') => State::Escape,
                (State::Escape, '[') => State::Sequence(String::new()),
                (State::Escape, ' '..='/') => State::OneMore,
                (State::Escape | State::OneMore, _) => State::Text,
                (State::Sequence(mut inner), '\x20'..='\x3f') => {
                    if inner.len() < SEQUENCE_MAX {
                        inner.push(c);
                    }
                    State::Sequence(inner)
                }
                (State::Sequence(inner), last) => {
                    let plain = |c: char| c.is_ascii_digit() || matches!(c, ';' | ':');
                    if last == 'm' && inner.len() < SEQUENCE_MAX && inner.chars().all(plain) {
                        shown.push_str("\x1b[");
                        shown.push_str(&inner);
                        shown.push('m');
                    }
                    State::Text
                }
                (State::Text, '\n' | '\r' | '\t') => {
                    shown.push(c);
                    State::Text
                }
                (State::Text, c) => {
                    if !c.is_control() {
                        shown.push(c);
                    }
                    State::Text
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Colours;

    #[test]
    fn text_and_colours_pass_and_nothing_else() {
        for (said, shown) in [
            ("plain\r\n\ttext é", "plain\r\n\ttext é"),
            ("\x1b[1;31mred\x1b[0m\x1b[38:5:9m", "\x1b[1;31mred\x1b[0m\x1b[38:5:9m"),
            ("a\x1b[2Jb\x1b[5;5Hc\x1b[6n\x1b[?25ld", "abcd"),
            ("a\x1b]0;title\x07b\x1b]52;c;aGk=\x1b\\c\x1bP$q\x1b\\d", "abcd"),
            ("a\x1b(0b\x1bcc\u{9b}31md\x07", "abc31md"),
            ("\x1b[>4;1mx\x1b[1\x1b[2my", "x\x1b[2my"),
        ] {
            assert_eq!(Colours::default().feed(said.as_bytes()), shown, "{said:?}");
            let mut bytewise = Colours::default();
            let pieces: String = said.bytes().map(|byte| bytewise.feed(&[byte])).collect();
            assert_eq!(pieces, shown, "cut: {said:?}");
        }
        assert_eq!(Colours::default().feed(b"a\xffb\xc3"), "a\u{fffd}b");
    }
}
