//! Programs whose every byte is known before they run.
//!
//! Each leaves a line in a file of its own when it begins and when it ends, so
//! that it is known how often it began, whatever anybody says.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use trunkline_client::Request;
use trunkline_protocol::message::Channel;

/// Length of a numbered line.
const LINE_BYTES: u64 = 16;

/// What a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Program {
    /// Numbered lines, as fast as they are taken.
    Count { first: u64, lines: u64 },
    /// Numbered lines, one at a time.
    Drip { first: u64, lines: u64, every_ms: u64 },
    /// The same until it is interrupted.
    Endless { first: u64, every_ms: u64 },
    /// Answers so many lines that are typed into it.
    Talk { lines: u64, in_terminal: bool },
    /// Writes to its standard output and its standard error by turns.
    TwoChannels { lines: u64 },
    /// Is not there.
    Missing,
}

/// What there is to be read of a program.
#[derive(Debug)]
pub(crate) enum Expected {
    Bytes(Vec<u8>),
    /// Numbered lines without end.
    Endless {
        first: u64,
    },
    /// Two outputs, each in its own order.
    Channels {
        out: Vec<u8>,
        err: Vec<u8>,
    },
}

fn numbered(lines: Range<u64>) -> Vec<u8> {
    let mut text = String::new();
    for line in lines {
        writeln!(text, "{line:015}").unwrap();
    }
    text.into_bytes()
}

/// What is typed into a command, line by line.
pub(crate) fn typed(line: u64) -> String {
    format!("line {line} that somebody types\n")
}

impl Program {
    /// A request for it. What it leaves goes to `marks`.
    pub(crate) fn request(&self, marks: &Path, exit_code: i32) -> Request {
        let body = match self {
            Self::Count { first, lines } => {
                format!("seq -f '%015.0f' {first} {}", first + lines - 1)
            }
            Self::Drip { first, lines, every_ms } => format!(
                "i={first}; while [ $i -lt {} ]; do printf '%015d\\n' $i; i=$((i+1)); sleep {}; done",
                first + lines,
                seconds(*every_ms)
            ),
            Self::Endless { first, every_ms } => format!(
                "i={first}; while :; do printf '%015d\\n' $i; i=$((i+1)); sleep {}; done",
                seconds(*every_ms)
            ),
            Self::Talk { lines, in_terminal } => format!(
                "{}echo ready; i=0; while [ $i -lt {lines} ]; do IFS= read -r line || exit 99; \
                 echo \"heard $line\"; i=$((i+1)); done",
                if *in_terminal { "stty -echo; " } else { "" }
            ),
            Self::TwoChannels { lines } => format!(
                "i=0; while [ $i -lt {lines} ]; do echo \"out $i\"; echo \"err $i\" >&2; \
                 i=$((i+1)); done"
            ),
            Self::Missing => return Request::argv(["/there/is/no/such/program"]),
        };
        let marks = marks.display();
        let script =
            format!("echo begun >>{marks}; {body}; echo ended >>{marks}; exit {exit_code}");
        let request = Request::shell(script);
        if let Self::Talk { in_terminal: true, .. } = self {
            return request.terminal(80, 24);
        }
        request
    }

    /// What it writes.
    pub(crate) fn expected(&self) -> Expected {
        match self {
            Self::Count { first, lines } | Self::Drip { first, lines, .. } => {
                Expected::Bytes(numbered(*first..first + lines))
            }
            Self::Endless { first, .. } => Expected::Endless { first: *first },
            Self::Talk { lines, in_terminal } => {
                let mut text = "ready\n".to_owned();
                for line in 0..*lines {
                    text += "heard ";
                    text += &typed(line);
                }
                let text = if *in_terminal { text.replace('\n', "\r\n") } else { text };
                Expected::Bytes(text.into_bytes())
            }
            Self::TwoChannels { lines } => {
                let all = |name: &str| {
                    let lines = (0..*lines).map(|line| format!("{name} {line}\n"));
                    lines.collect::<String>().into_bytes()
                };
                Expected::Channels { out: all("out"), err: all("err") }
            }
            Self::Missing => Expected::Bytes(Vec::new()),
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

impl Expected {
    /// Its length and its SHA-256, if the program alone decides them.
    pub(crate) fn known(&self) -> Option<(u64, String)> {
        let Self::Bytes(bytes) = self else { return None };
        Some((bytes.len() as u64, digest(Sha256::digest(bytes))))
    }

    /// Its length, if it has an end.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes.len() as u64),
            Self::Endless { .. } => None,
            Self::Channels { out, err } => Some((out.len() + err.len()) as u64),
        }
    }

    /// Whether these bytes are the ones that stand at `offset`. Of two
    /// channels the order is not known: see [`Self::follows`].
    pub(crate) fn has(&self, offset: u64, data: &[u8]) -> bool {
        match self {
            Self::Bytes(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let until = from.saturating_add(data.len());
                bytes.get(from..until).is_some_and(|own| own == data)
            }
            Self::Endless { first } => {
                let until = offset + data.len() as u64;
                let lines = first + offset / LINE_BYTES..first + until.div_ceil(LINE_BYTES);
                let skip = usize::try_from(offset % LINE_BYTES).unwrap_or_default();
                numbered(lines)[skip..].starts_with(data)
            }
            Self::Channels { .. } => true,
        }
    }

    /// Where in its channel these bytes end, which come after `at` there and
    /// right there unless `has_gap`. `None` if they do not.
    pub(crate) fn follows(
        &self,
        channel: Channel,
        at: usize,
        data: &[u8],
        has_gap: bool,
    ) -> Option<usize> {
        let Self::Channels { out, err } = self else { return Some(0) };
        let own = if channel == Channel::Stderr { err } else { out };
        if own.get(at..)?.starts_with(data) {
            return Some(at + data.len());
        }
        let rest = own.get(at..).filter(|_| has_gap)?;
        let skipped = rest.windows(data.len()).position(|window| window == data)?;
        Some(at + skipped + data.len())
    }
}

/// A digest as it stands in a command's end.
pub(crate) fn digest(sha256: impl AsRef<[u8]>) -> String {
    sha256.as_ref().iter().fold("sha256:".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn what_is_expected_is_checked_to_the_byte() {
    let count = Program::Count { first: 7, lines: 3 }.expected();
    assert!(count.has(0, b"000000000000007\n000000000000008\n"));
    assert!(count.has(15, b"\n00000") && !count.has(16, b"\n00000"));
    assert!(!count.has(40, b"00000009\n0"), "beyond the end");
    let endless = Program::Endless { first: 7, every_ms: 1 }.expected();
    assert!(endless.has(30, b"8\n000000000000009\n"));
    assert!(!endless.has(30, b"9\n000000000000009\n"));
    let two = Program::TwoChannels { lines: 3 }.expected();
    assert_eq!(two.follows(Channel::Stderr, 0, b"err 0\nerr", false), Some(9));
    assert_eq!(two.follows(Channel::Stderr, 9, b"err 2\n", false), None);
    assert_eq!(two.follows(Channel::Stderr, 9, b"err 2\n", true), Some(18));
    assert_eq!(two.follows(Channel::Stdout, 6, b"out 0\n", true), None);
}
