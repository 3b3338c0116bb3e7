//! What a person sees while it happens: lines with a time, and in a terminal
//! one live line per dashboard below them.

use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;
use trunkline_examples::now;

/// Where the demo prints.
#[derive(Debug)]
pub(crate) struct Show {
    since: Instant,
    plain: bool,
    live: Mutex<Vec<String>>,
    waits_for: Mutex<&'static str>,
}

/// A colour, by its number in a terminal.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
    Blue = 36,
    Dim = 90,
}

impl Show {
    pub(crate) fn new(plain: bool) -> Self {
        Self { since: now(), plain, live: Mutex::default(), waits_for: Mutex::new("") }
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Seconds since the start.
    pub(crate) fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    pub(crate) fn paint(&self, colour: Colour, text: &str) -> String {
        if self.plain { text.to_owned() } else { format!("\x1b[{}m{text}\x1b[0m", colour as u8) }
    }

    /// What the demo waits for now: told when that takes too long.
    pub(crate) fn waits_for(&self, what: &'static str) {
        *self.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    pub(crate) fn waiting_for(&self) -> String {
        let what = self.waits_for.lock().unwrap_or_else(PoisonError::into_inner);
        format!("it was waiting for {what}")
    }

    /// A line with the time.
    pub(crate) fn say(&self, who: &str, what: &str) {
        let time = self.paint(Colour::Dim, &format!("{:6.2} s", self.seconds()));
        let who = self.paint(Colour::Blue, &format!("{who:<8}"));
        self.line(&format!("{time}  {who}  {what}"));
    }

    /// A line.
    pub(crate) fn line(&self, line: &str) {
        let below_it = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        draw(&format!("{}{line}\n{}", above(&below_it), below(&below_it)));
    }

    /// Redraws the live lines, in a terminal.
    pub(crate) fn live(&self, lines: Vec<String>) {
        if self.plain {
            return;
        }
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        draw(&format!("{}{}", above(&live), below(&lines)));
        *live = lines;
    }
}

/// Back to where the live lines begin, and away with them.
fn above(live: &[String]) -> String {
    if live.is_empty() { String::new() } else { format!("\x1b[{}A\x1b[J", live.len()) }
}

fn below(live: &[String]) -> String {
    live.iter().flat_map(|line| [line, "\n"]).collect()
}

/// In one write, so that nothing flickers. Nobody may be reading any more.
fn draw(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}
