//! Text from elsewhere in one line of a log or an error: the one place that
//! decides what of it is shown as it is.

use std::fmt::{self, Write as _};

/// Shows a text so that it cannot pass for anything else: line breaks, escape
/// sequences and other control characters are written as by
/// [`char::escape_debug`], and so is what cannot be seen or turns the direction
/// of what follows. Everything else, quotes and backslashes too, stays.
///
/// ```
/// use trunkline_protocol::one_line::OneLine;
///
/// let forged = "gone\r\n2026-01-01 INFO all is well\u{1b}[2J\u{202e}";
/// let shown = OneLine(forged).to_string();
/// assert_eq!(shown, r"gone\r\n2026-01-01 INFO all is well\u{1b}[2J\u{202e}");
/// assert_eq!(OneLine(r#"Zoë's "C:\tmp""#).to_string(), r#"Zoë's "C:\tmp""#);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct OneLine<'a>(pub &'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\'' | '"' | '\\' => f.write_char(c)?,
                c => write!(f, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_that_moves_a_cursor_or_hides_is_shown(text in any::<String>()) {
            let shown = OneLine(&text).to_string();
            prop_assert!(!shown.contains(char::is_control), "{shown:?}");
            let turns = ['\u{200e}', '\u{200f}', '\u{061c}', '\u{2028}', '\u{2029}', '\u{feff}'];
            let turns = |c: char| {
                turns.contains(&c) || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            };
            prop_assert!(!shown.contains(turns), "{shown:?}");
        }
    }

    #[test]
    fn what_turns_or_hides_is_escaped() {
        for c in "\u{202a}\u{202e}\u{2066}\u{2069}\u{200e}\u{200b}\u{2028}\u{9b}\u{7f}".chars() {
            let shown = OneLine(&c.to_string()).to_string();
            assert!(shown.starts_with('\\'), "{shown:?}");
        }
    }
}
