//! What is read: the output of each command, kept to be searched and exported,
//! and shown as it comes.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use trunkline_client::protocol::ids::{CommandId, StreamId};
use trunkline_client::protocol::stream::{Match, TerminalFilter, View};
use trunkline_client::{Audit, Terminal, TerminalEvent};
use trunkline_examples::{bytes_in_words, in_words, short};

/// What of output is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Text, colours and styles: it stands among other lines.
    Styles,
    /// All that draws, and nothing that does more: it has the terminal to
    /// itself.
    Drawing,
    /// Every byte: no terminal reads it.
    Bytes,
}

impl Shown {
    fn filter(self) -> Option<TerminalFilter> {
        match self {
            Self::Styles => Some(TerminalFilter::new().only_styles()),
            Self::Drawing => Some(TerminalFilter::new()),
            Self::Bytes => None,
        }
    }
}

/// Everything that is read, by command.
#[derive(Debug, Clone)]
pub(crate) struct Readings {
    kept: Arc<Mutex<Kept>>,
    /// Rings whenever something has come.
    news: watch::Sender<()>,
    kept_bytes: usize,
    shown: Shown,
}

#[derive(Debug, Default)]
struct Kept {
    commands: BTreeMap<CommandId, Output>,
    /// What was shown last, and whether its line has ended.
    shown: Option<(CommandId, bool)>,
    readers: u64,
}

#[derive(Debug)]
struct Output {
    /// Who reads it. Others that come across it leave it to that one.
    reader: u64,
    stream: StreamId,
    view: View,
    live_from: u64,
    gaps: u64,
    filter: Option<TerminalFilter>,
    is_shown: bool,
    is_over: bool,
}

/// What became of an export.
pub(crate) struct Exported {
    pub(crate) bytes: Vec<u8>,
    pub(crate) is_whole: bool,
    pub(crate) is_over: bool,
}

impl Readings {
    pub(crate) fn new(kept_bytes: usize, shown: Shown) -> Self {
        Self { kept: Arc::default(), news: watch::Sender::new(()), kept_bytes, shown }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a terminal to its end; shows what comes if `is_shown`.
    pub(crate) async fn read(self, mut terminal: Terminal, is_shown: bool) {
        let reader = {
            let mut kept = self.lock();
            kept.readers += 1;
            kept.readers
        };
        // Whatever ends the reading, others may then read the same.
        let _end = End { readings: &self, reader };
        let mut commands = BTreeMap::new();
        while let Some(event) = terminal.next().await {
            self.lock().look(&self, reader, &mut commands, event, is_shown);
            self.news.send_replace(());
        }
    }

    /// Whether a command's output is being read, or has been read to its end.
    pub(crate) fn has(&self, command: CommandId) -> bool {
        self.lock()
            .commands
            .get(&command)
            .is_some_and(|output| output.is_over || output.reader != 0)
    }

    /// Shows a command's output from now on, and what is kept of it at once.
    pub(crate) fn show(&self, command: CommandId) {
        let mut kept = self.lock();
        let Some(output) = kept.commands.get_mut(&command) else { return };
        if !output.is_shown || output.is_over {
            output.is_shown = true;
            output.filter = self.shown.filter();
            let bytes = output.view.export_ansi();
            kept.print(command, &bytes);
        }
    }

    /// Waits until a command's output is here to the end, or, if `so_far` is
    /// enough, to where it stood when it was asked for.
    pub(crate) async fn has_come(&self, command: CommandId, so_far: bool) {
        let mut news = self.news.subscribe();
        let is_here = |output: &Output| {
            output.is_over || (so_far && output.view.position() >= output.live_from)
        };
        loop {
            if self.lock().commands.get(&command).is_some_and(is_here) {
                return;
            }
            if news.changed().await.is_err() {
                return; // cannot be: the sender lives in here
            }
        }
    }

    /// The newest `limit` lines with that text.
    pub(crate) fn search(&self, command: CommandId, text: &str, limit: usize) -> Vec<Match> {
        let kept = self.lock();
        kept.commands.get(&command).map(|o| o.view.search(text, limit)).unwrap_or_default()
    }

    pub(crate) fn export(&self, command: CommandId) -> Option<Exported> {
        let kept = self.lock();
        let output = kept.commands.get(&command)?;
        let is_whole = output.view.is_whole() && output.view.kept_from() == 0;
        Some(Exported { bytes: output.view.export_ansi(), is_whole, is_over: output.is_over })
    }
}

/// The end of a reading, whatever it comes by.
struct End<'a> {
    readings: &'a Readings,
    reader: u64,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        for output in self.readings.lock().commands.values_mut() {
            if output.reader == self.reader {
                output.reader = 0;
            }
        }
        self.readings.news.send_replace(());
    }
}

impl Kept {
    fn look(
        &mut self,
        readings: &Readings,
        reader: u64,
        commands: &mut BTreeMap<StreamId, CommandId>,
        event: TerminalEvent,
        is_shown: bool,
    ) {
        match event {
            TerminalEvent::Opened { stream, command, attempt, from, live_from } => {
                if self.commands.get(&command).is_some_and(|output| {
                    output.reader != reader && (output.reader != 0 || output.is_over)
                }) {
                    return;
                }
                commands.insert(stream, command);
                if attempt > 1 && is_shown {
                    self.note(&format!("{}: attempt {attempt}", short(command)));
                }
                let view = View::resuming(from, readings.kept_bytes);
                let output = Output {
                    reader,
                    stream,
                    view,
                    live_from,
                    gaps: u64::from(from > 0),
                    filter: readings.shown.filter(),
                    is_shown,
                    is_over: false,
                };
                self.commands.insert(command, output);
            }
            TerminalEvent::Output { stream, offset, channel, data, .. } => {
                let Some((command, output)) = self.output(commands, stream) else { return };
                let _ = output.view.handle_output(offset, channel, data.clone());
                if output.is_shown {
                    self.print(command, &data);
                }
            }
            TerminalEvent::Gap { stream, gap } => {
                let Some((command, output)) = self.output(commands, stream) else { return };
                output.gaps += 1;
                let text = format!(
                    "{}: GAP: bytes {} to {} will not come: {}",
                    short(command),
                    gap.from,
                    gap.to,
                    gap.reason
                );
                let _ = output.view.handle_gap(gap);
                if output.is_shown {
                    self.note(&text);
                }
            }
            TerminalEvent::Ended { stream, state, audit } => {
                let Some((command, output)) = self.output(commands, stream) else { return };
                let end = state.end.clone().unwrap_or_default();
                let bytes = bytes_in_words(end.end);
                output.view.handle_end(end.end, end.digest);
                output.is_over = true;
                let audit = match audit {
                    Audit::Verified => "every byte is here".to_owned(),
                    Audit::Mismatch => "BYTES WERE CHANGED ON THE WAY".to_owned(),
                    Audit::NotChecked => format!("not all of it is here: {} gaps", output.gaps),
                };
                if output.is_shown {
                    self.note(&format!(
                        "{}: {}; {bytes}, {audit}",
                        short(command),
                        in_words(&state)
                    ));
                }
            }
            TerminalEvent::Refused(refusal) => self.note(&format!("refused: {refusal}")),
            TerminalEvent::Lost(command) => {
                self.note(&format!("{}: the hub no longer knows it", short(command)));
            }
        }
    }

    fn output(
        &mut self,
        commands: &BTreeMap<StreamId, CommandId>,
        stream: StreamId,
    ) -> Option<(CommandId, &mut Output)> {
        let command = *commands.get(&stream)?;
        let output = self.commands.get_mut(&command)?;
        (output.stream == stream).then_some((command, output))
    }

    /// Shows output. When it is not that of the command shown last, a line
    /// says whose it is.
    fn print(&mut self, command: CommandId, bytes: &[u8]) {
        let Some(output) = self.commands.get_mut(&command) else { return };
        let mut shown = Vec::new();
        match &mut output.filter {
            Some(filter) => filter.feed(bytes, &mut shown),
            None => shown.extend_from_slice(bytes),
        }
        if shown.is_empty() {
            return;
        }
        if self.shown.is_none_or(|(last, _)| last != command) {
            if self.shown.is_some() || bytes.len() < 2 {
                self.end_line();
            }
            eprintln!("-- {}:", short(command));
        }
        self.shown = Some((command, shown.ends_with(b"\n")));
        let mut stdout = io::stdout().lock();
        // Nobody may be reading any more.
        let _ = stdout.write_all(&shown).and_then(|()| stdout.flush());
    }

    /// Says something about output, on a line of its own.
    fn note(&mut self, text: &str) {
        self.end_line();
        self.shown = None;
        eprintln!("-- {text}");
    }

    fn end_line(&mut self) {
        if let Some((_, false)) = self.shown {
            eprintln!();
        }
    }
}
