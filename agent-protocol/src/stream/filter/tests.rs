use proptest::prelude::*;

use super::*;

fn shown(bytes: &[u8]) -> Vec<u8> {
    let (mut filter, mut shown) = (TerminalFilter::new(), Vec::new());
    filter.feed(bytes, &mut shown);
    shown
}

fn shown_with_links(bytes: &[u8]) -> Vec<u8> {
    let (mut filter, mut shown) = (TerminalFilter::new().with_links(), Vec::new());
    filter.feed(bytes, &mut shown);
    shown
}

#[test]
fn what_is_harmless_passes_as_it_is() {
    for text in [
        "plain, ä€😀\r\n\tand\x08\x07\x0b\x0c",
        "\x1b[m\x1b[0m\x1b[1;31m\x1b[38;5;200m\x1b[38:2::1:2:3m\x1b[48;2;255;0;128m",
        "\x1b[A\x1b[12B\x1b[C\x1b[D\x1b[E\x1b[F\x1b[3G\x1b[2;3H\x1b[2;3f\x1b[4d\x1b[s\x1b[u",
        "\x1b[I\x1b[Z\x1b[2`\x1b[2a\x1b[2e\x1b[2g\x1b[5b",
        "\x1b[J\x1b[2J\x1b[K\x1b[1K\x1b[4X\x1b[4@\x1b[4P\x1b[4L\x1b[4M\x1b[S\x1b[2T\x1b[2;20r",
        "\x1b[2 q\x1b[4h\x1b[4l",
        "\x1b[?25l\x1b[?25h\x1b[?1049h\x1b[?1049l\x1b[?7l\x1b[?2026h\x1b[?6;7;12;47;1047;1048h",
        "\x1b7\x1b8\x1bD\x1bE\x1bH\x1bM\x1b(0\x1b(B\x1b)B\x1b)0",
    ] {
        assert_eq!(shown(text.as_bytes()), text.as_bytes(), "{text:?}");
    }
}

#[test]
fn what_a_terminal_would_obey_or_answer_is_taken_away() {
    for (what, bytes) in [
        ("the clipboard", "\x1b]52;c;ZXZpbA==\x07"),
        ("the clipboard, asked for", "\x1b]52;c;?\x1b\\"),
        ("the title", "\x1b]0;evil\x07"),
        ("the title", "\x1b]2;evil\x1b\\"),
        ("the palette", "\x1b]4;1;rgb:ff/00/00\x07"),
        ("colours", "\x1b]10;#000000\x07\x1b]11;?\x07\x1b]104\x07"),
        ("a notification", "\x1b]9;evil\x07\x1b]777;notify;a;b\x07"),
        ("files", "\x1b]1337;File=name=ZXZpbA==:AAAA\x07"),
        ("a font", "\x1b]50;evil\x07"),
        ("a link", "\x1b]8;;https://example.org\x1b\\\x1b]8;;\x1b\\"),
        ("who are you?", "\x1b[c\x1b[0c\x1b[>c\x1b[=c\x1bZ"),
        ("where are you?", "\x1b[5n\x1b[6n\x1b[?6n\x1b[?15n"),
        ("how are you?", "\x1b[?25$p\x1b[4$p\x1b[x\x1b[>q\x1b[?u\x1b[18t\x1b[21t"),
        ("the window", "\x1b[8;200;200t\x1b[3;0;0t\x1b[22;0t"),
        ("keys", "\x1b[?1h\x1b=\x1b>\x1b[>4;2m\x1b[>1u\x1b[?2004h\x1b[?1004h\x1b[20h"),
        ("the mouse", "\x1b[?1000h\x1b[?1002h\x1b[?1003h\x1b[?1006h\x1b[?1015h"),
        ("a mode beside a harmless one", "\x1b[?25;1000h"),
        ("columns", "\x1b[?3h"),
        ("locks", "\x1b[2h\x1b[12h"),
        ("printing", "\x1b[5i\x1b[?5i"),
        ("a reset", "\x1bc\x1b[!p\x1b#8"),
        ("an image", "\x1bPq#0;2;0;0;0#0~~@@vv@@~~$\x1b\\\x1b_Gf=24;AAAA\x1b\\"),
        ("a macro", "\x1bP1;1|17/ff\x1b\\\x1b^evil\x1b\\\x1bXevil\x1b\\"),
        ("something for tmux", "\x1bPtmux;\x1b\x1b]52;c;ZXZpbA==\x07\x1b\\"),
        ("an answerback", "\x05"),
        ("shifts", "\x0e\x0f\x1bn\x1bo\x1bN\x1bO\x1b|"),
        ("flow control", "\x11\x13\x00\x7f"),
        ("C1", "\u{9d}52;c;ZXZpbA==\u{9c}\u{9b}6n\u{90}evil\u{9c}\u{85}\u{9a}"),
        ("a repetition without end", "\x1b[99999999b"),
    ] {
        let text = format!("a{bytes}z");
        let left = shown(text.as_bytes());
        // An `ESC` inside a string ends it, so what follows may be text.
        if what == "something for tmux" {
            assert!(!left.contains(&ESC) && left.starts_with(b"a") && left.ends_with(b"z"));
        } else {
            assert_eq!(String::from_utf8_lossy(&left), "az", "{what}");
        }
    }
}

#[test]
fn among_other_lines_only_styles_pass() {
    let mut filter = TerminalFilter::new().only_styles();
    let mut shown = Vec::new();
    let bytes = b"a\x1b[1;31mb\x1b[2J\x1b[5;5H\x1b7\x1b(0\x08\x07\x0c\x1b[?25lc\x1b[0m\r\n\td";
    for byte in bytes {
        filter.feed(&[*byte], &mut shown);
    }
    assert_eq!(String::from_utf8_lossy(&shown), "a\x1b[1;31mbc\x1b[0m\r\n\td");
}

#[test]
fn controls_of_one_character_are_written_with_two() {
    assert_eq!(shown("\u{9b}31mred\u{9b}m".as_bytes()), b"\x1b[31mred\x1b[m");
}

#[test]
fn what_is_no_text_is_shown_to_be_none() {
    assert_eq!(shown(b"a\x9b6nz"), "a\u{fffd}6nz".as_bytes(), "no C1 in eight bits");
    assert_eq!(shown(b"\xff\xc0\x80\xed\xa0\x80"), "\u{fffd}".repeat(6).as_bytes());
    assert_eq!(shown(b"\xe2\x82z"), "\u{fffd}z".as_bytes());
    assert_eq!(shown(b"\xe2\x82\x1b[1m"), "\u{fffd}\x1b[1m".as_bytes());
}

#[test]
fn links_pass_if_they_may_and_lead_to_the_web() {
    for uri in ["https://example.org/?a=b;c", "http://x", "mailto:a@b", "HTTPS://X", ""] {
        let link = format!("\x1b]8;id=1;{uri}\x1b\\");
        assert_eq!(shown_with_links(link.as_bytes()), link.as_bytes());
        assert_eq!(shown_with_links(format!("\x1b]8;id=1;{uri}\x07").as_bytes()), link.as_bytes());
    }
    for uri in ["file:///etc/passwd", "javascript:alert(1)", "ssh://x", "https", "x:y"] {
        assert_eq!(shown_with_links(format!("\x1b]8;;{uri}\x1b\\").as_bytes()), b"", "{uri}");
    }
    assert_eq!(shown_with_links(b"\x1b]8;;https://a b\x07\x1b]88;;https://a\x07"), b"");
}

#[test]
fn a_sequence_that_is_interrupted_is_none() {
    assert_eq!(shown(b"\x1b[31\x18mred"), b"mred");
    assert_eq!(shown(b"\x1b[3\x1b[1mbold"), b"\x1b[1mbold");
    assert_eq!(shown(b"\x1b]0;title\x1b[1mbold"), b"\x1b[1mbold");
    assert_eq!(shown(b"\x1b[3\r\n1mred"), b"\r\n\x1b[31mred", "done at once, as terminals do");
    assert_eq!(shown("\x1b[3ä".as_bytes()), "ä".as_bytes());
}

#[test]
fn what_never_ends_is_not_kept() {
    let mut filter = TerminalFilter::new().with_links();
    let mut shown = Vec::new();
    for begin in [&b"\x1b["[..], b"\x1b]8;;https://", b"\x1bP", b"\x1b_", b"\x1b("] {
        filter.feed(begin, &mut shown);
        for _ in 0..1_000 {
            filter.feed(&[b'1'; 4096], &mut shown);
            assert!(filter.held.capacity() <= 2 * LINK_MAX, "{}", filter.held.capacity());
        }
        filter.feed(b"\x18", &mut shown);
    }
    // After `ESC (` and one byte more it is text.
    assert!(shown.iter().all(|byte| *byte == b'1'));
    filter.feed(b"text", &mut shown);
    assert!(shown.ends_with(b"text"));
}

#[test]
fn what_restores_a_terminal_passes_itself() {
    assert_eq!(shown_with_links(TerminalFilter::RESTORE), TerminalFilter::RESTORE);
}

/// Bytes of which many are of some use to somebody who means ill.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        "[ -~]{0,6}".prop_map(String::into_bytes),
        proptest::sample::select(vec![
            &b"\x1b["[..],
            b"\x1b]",
            b"\x1bP",
            b"\x1b\\",
            b"\x1b",
            b"\x07",
            b"\x18",
            b"\xc2\x9b",
            b"\xc2\x9d",
            b"\xc2\x9c",
            b"\xc2",
            b"?25h",
            b"31m",
            b"6n",
            b"52;c;eA==",
            b"8;;https://x",
            b"\xe2\x82\xac",
        ])
        .prop_map(<[u8]>::to_vec),
    ];
    proptest::collection::vec(pieces, 0..40).prop_map(|pieces| pieces.concat())
}

/// What is left after all that is known to be harmless, by another way to read
/// it than the filter's.
fn strange(mut text: &str) -> Option<&str> {
    let known = |rest: &str| -> Option<usize> {
        let mut parts = rest.strip_prefix('\x1b')?.chars();
        match parts.next()? {
            '7' | '8' | 'D' | 'E' | 'H' | 'M' => Some(2),
            '(' | ')' => matches!(parts.next(), Some('B' | '0')).then_some(3),
            '[' => {
                let body = &rest[2..];
                let end = body.find(|c: char| ('@'..='~').contains(&c))?;
                let fine = match (&body[..end], &body[end..=end]) {
                    (p, "h" | "l") => p == "4" || p.starts_with('?') && !p.contains("100"),
                    (p, "q") => p.ends_with(' '),
                    (p, f) => {
                        p.bytes().all(|b| b.is_ascii_digit() || b == b';' || b == b':')
                            && !"cnitxpy".contains(f)
                    }
                };
                fine.then_some(2 + end + 1)
            }
            ']' => {
                let end = rest.find("\x1b\\")?;
                rest[..end].starts_with("\x1b]8;").then_some(end + 2)
            }
            _ => None,
        }
    };
    while let Some(first) = text.chars().next() {
        let length = match first {
            '\x1b' => known(text),
            '\x07'..='\r' => Some(1),
            c if c.is_control() => None,
            c => Some(c.len_utf8()),
        };
        let Some(length) = length else { return Some(text) };
        text = &text[length..];
    }
    None
}

proptest! {
    #[test]
    fn nothing_strange_ever_passes(bytes in bytes(), links in any::<bool>()) {
        let mut filter = TerminalFilter::new();
        if links {
            filter = filter.with_links();
        }
        let mut shown = Vec::new();
        filter.feed(&bytes, &mut shown);
        let text = String::from_utf8(shown);
        prop_assert!(text.is_ok(), "it is not UTF-8");
        let text = text.unwrap_or_default();
        prop_assert_eq!(strange(&text), None, "{:?}", text);
        prop_assert!(links || !text.contains("\x1b]"));
    }

    #[test]
    fn where_bytes_are_cut_changes_nothing(bytes in bytes(), at in any::<prop::sample::Index>()) {
        let at = at.index(bytes.len() + 1);
        let (mut filter, mut cut) = (TerminalFilter::new().with_links(), Vec::new());
        filter.feed(&bytes[..at], &mut cut);
        filter.feed(&bytes[at..], &mut cut);
        prop_assert_eq!(cut, shown_with_links(&bytes));
    }

    #[test]
    fn what_has_passed_passes_again(bytes in bytes()) {
        let once = shown_with_links(&bytes);
        prop_assert_eq!(shown_with_links(&once), once);
    }
}
