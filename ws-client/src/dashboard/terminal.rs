//! The handle to what a command or an agent shows.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Notify;
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{From, Lag};
use trunkline_protocol::stream::View;

use super::Dashboard;
use crate::core::dashboard::{Next, ReaderId, Reading, TerminalEvent};

/// Streams of which a terminal keeps the scrollback.
const VIEWS_MAX: usize = 64;

/// How to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalOptions {
    /// Where to begin: with the oldest byte that is kept (the default), or
    /// with what comes next.
    pub from: From,
    /// What to do when behind: every byte as long as the hub has it (the
    /// default), only the newest, or be disconnected.
    pub lag: Lag,
    /// Most output of one stream that waits for [`Terminal::next`], in bytes.
    /// The hub sends no more than that ahead; its log has the rest. 1 MiB.
    pub window_bytes: u64,
    /// Most output of one stream that is kept for [`Terminal::view`], in
    /// bytes, for the newest 64 streams; 0 keeps none. 256 KiB.
    pub scrollback_bytes: usize,
}

impl Default for TerminalOptions {
    fn default() -> Self {
        let Reading { from, lag, window_bytes } = Reading::default();
        Self { from, lag, window_bytes, scrollback_bytes: 256 * 1024 }
    }
}

impl TerminalOptions {
    pub(super) fn reading(self) -> Reading {
        Reading { from: self.from, lag: self.lag, window_bytes: self.window_bytes }
    }
}

/// What a command or an agent shows: each byte once and in order, each hole
/// by name, across lost links.
///
/// A terminal that is not read holds up to its window; the hub keeps what
/// follows as long as it can. Several terminals of one dashboard may read the
/// same streams, each from its own place; they share the hub's attention, so
/// the slowest of them sets the pace for all that read the same stream, and
/// the smallest window counts.
///
/// Dropping it ends the subscription if it was the last for its target.
#[derive(Debug)]
pub struct Terminal {
    dashboard: Dashboard,
    reader: ReaderId,
    bell: Arc<Notify>,
    scrollback_bytes: usize,
    views: BTreeMap<StreamId, View>,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.dashboard.shared.with(|core, _| {
            core.pure.unread(self.reader);
            core.readers.remove(&self.reader);
        });
    }
}

impl Terminal {
    pub(super) fn new(
        dashboard: Dashboard,
        reader: ReaderId,
        bell: Arc<Notify>,
        scrollback_bytes: usize,
    ) -> Self {
        Self { dashboard, reader, bell, scrollback_bytes, views: BTreeMap::new() }
    }

    /// What is shown next. Taking it is what lets the hub send more.
    ///
    /// `None` after a command's final state and the end of its last stream;
    /// right after the final state for a command that never started. Reading
    /// an agent goes on until the dashboard is closed.
    ///
    /// Cancel safe: nothing is taken that is not given out.
    pub async fn next(&mut self) -> Option<TerminalEvent> {
        let shared = Arc::clone(&self.dashboard.shared);
        loop {
            let rung = self.bell.notified();
            let (next, is_news) =
                shared.quietly(|core, _| (core.pure.take(self.reader), core.pure.has_taken()));
            if is_news {
                shared.changed.notify_one();
            }
            match next {
                Next::Event(event) => {
                    drop(rung);
                    self.look(&event);
                    return Some(event);
                }
                Next::Over => return None,
                Next::Wait => rung.await,
            }
        }
    }

    /// The scrollback of a stream, to be searched and exported: of what
    /// [`next`](Self::next) gave out.
    pub fn view(&self, stream: StreamId) -> Option<&View> {
        self.views.get(&stream)
    }

    /// The streams that have a scrollback, oldest first.
    pub fn streams(&self) -> impl Iterator<Item = StreamId> {
        self.views.keys().copied()
    }

    fn look(&mut self, event: &TerminalEvent) {
        if self.scrollback_bytes == 0 {
            return;
        }
        match event {
            TerminalEvent::Opened { stream, from, live_from, .. } => {
                while self.views.len() >= VIEWS_MAX {
                    let done = self.views.iter().find(|(_, view)| view.end().is_some());
                    let oldest =
                        done.or_else(|| self.views.iter().next()).map(|(stream, _)| *stream);
                    let Some(oldest) = oldest else { break };
                    self.views.remove(&oldest);
                }
                let mut view = View::resuming(*from, self.scrollback_bytes);
                view.handle_opened(*live_from);
                self.views.insert(*stream, view);
            }
            TerminalEvent::Output { stream, offset, channel, data, .. } => {
                if let Some(view) = self.views.get_mut(stream) {
                    let _ = view.handle_output(*offset, *channel, data.clone());
                }
            }
            TerminalEvent::Gap { stream, gap } => {
                if let Some(view) = self.views.get_mut(stream) {
                    let _ = view.handle_gap(gap.clone());
                }
            }
            TerminalEvent::Ended { stream, state, .. } => {
                if let Some(view) = self.views.get_mut(stream) {
                    let end = state.end.clone().unwrap_or_default();
                    view.handle_end(end.end, end.digest);
                }
            }
            TerminalEvent::Refused(_) | TerminalEvent::Lost(_) => {}
        }
    }
}
