//! A view is the reader's end of one stream: it gives each byte once and in
//! order, each hole by its name, and keeps a scrollback.
//!
//! It trusts only offsets. What it has is dropped when it comes again, which
//! is how a reconnect, another transport or another hub may send too much
//! without harm; what does not follow on is not taken, because bytes would be
//! missing in silence. The caller then subscribes again from
//! [`View::position`].

use std::fmt;

use bytes::{Buf as _, Bytes};

use super::log::Jump;
use super::scrollback::{Match, Scrollback};
use crate::message::{Channel, Gap};

/// What a view gives out, in order, without overlap and without a silent hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes to show.
    Bytes {
        /// Where the first stands.
        offset: u64,
        /// Which of the program's outputs they came from.
        channel: Channel,
        /// At least one byte. Shares the buffer it arrived in.
        data: Bytes,
        /// Whether they are history. Nothing may answer a terminal query
        /// found there.
        replay: bool,
    },
    /// Bytes that will not come.
    Gap(Gap),
}

/// What became of what was handed in.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It was new, wholly or in part. One piece; two where replay ends within
    /// the bytes.
    New(Vec<Piece>),
    /// All of it was known.
    Known,
    /// It does not follow on, and nothing changed. Subscribe again from
    /// [`Jump::expected`].
    Jump(Jump),
}

/// The reader of one stream.
pub struct View {
    position: u64,
    live_from: u64,
    is_whole: bool,
    end: Option<u64>,
    digest: Option<String>,
    scrollback: Scrollback,
}

impl View {
    /// A view of a stream from its first byte on. It keeps the newest
    /// `scrollback_bytes_max` bytes, gaps counted at
    /// [`GAP_COST_BYTES`](super::GAP_COST_BYTES) each; its memory may be twice
    /// that.
    pub fn new(scrollback_bytes_max: usize) -> Self {
        Self::resuming(0, scrollback_bytes_max)
    }

    /// A view for a reader who has all that is below `position` from elsewhere.
    pub fn resuming(position: u64, scrollback_bytes_max: usize) -> Self {
        Self {
            position,
            live_from: u64::MAX,
            is_whole: position == 0,
            end: None,
            digest: None,
            scrollback: Scrollback::new(position, scrollback_bytes_max),
        }
    }

    /// A link announced the stream: what stands below `live_from` is replay.
    /// Until the first announcement everything is. (Where the link says that
    /// it goes on reading does not matter here: if that leaves a hole, the
    /// first bytes show it.)
    pub fn handle_opened(&mut self, live_from: u64) {
        self.live_from = live_from;
    }

    /// Takes bytes of which the first stands at `offset`.
    pub fn handle_output(&mut self, offset: u64, channel: Channel, mut data: Bytes) -> Taken {
        let Some(known) = self.position.checked_sub(offset) else {
            return self.jump(offset);
        };
        match usize::try_from(known) {
            Ok(known) if known < data.len() => data.advance(known),
            _ => return Taken::Known, // all of it, however far back
        }
        let offset = self.position;
        self.position += data.len() as u64;
        self.scrollback.push_bytes(offset, &data);

        let replay = self.live_from.saturating_sub(offset);
        match usize::try_from(replay) {
            Ok(0) => Taken::New(vec![Piece::Bytes { offset, channel, data, replay: false }]),
            Ok(replay) if replay < data.len() => {
                let history = data.split_to(replay);
                let live_from = self.live_from;
                Taken::New(vec![
                    Piece::Bytes { offset, channel, data: history, replay: true },
                    Piece::Bytes { offset: live_from, channel, data, replay: false },
                ])
            }
            _ => Taken::New(vec![Piece::Bytes { offset, channel, data, replay: true }]),
        }
    }

    /// Takes the name of a hole. What is known of its range stays known: the
    /// piece given out is the rest.
    pub fn handle_gap(&mut self, gap: Gap) -> Taken {
        if gap.from > self.position {
            return self.jump(gap.from);
        }
        if gap.to <= self.position {
            return Taken::Known;
        }
        let gap = Gap { from: self.position, ..gap };
        self.position = gap.to;
        self.is_whole = false;
        self.scrollback.push_gap(gap.clone());
        Taken::New(vec![Piece::Gap(gap)])
    }

    /// The command has ended: how long its stream is, and the digest of all
    /// its bytes if there is one, as `command:complete` has it. The stream
    /// may still be on its way: see [`is_complete`](Self::is_complete).
    pub fn handle_end(&mut self, end: u64, digest: Option<String>) {
        self.end = Some(end);
        self.digest = digest;
    }

    /// Where the view stands: everything below was given out or named a gap.
    /// This is the position to subscribe from.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The stream's final length, once it is known.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Whether nothing more will come: the end is known and reached.
    pub fn is_complete(&self) -> bool {
        self.end.is_some_and(|end| self.position >= end)
    }

    /// Whether every byte from offset 0 up to the position was given out. Only
    /// then can the caller's own digest equal that of the stream.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The digest of the whole stream that its producer made, once known.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The offset from which the scrollback is kept.
    pub fn kept_from(&self) -> u64 {
        self.scrollback.kept_from()
    }

    /// What the scrollback holds, in bytes, counted as in [`View::new`].
    pub fn kept_bytes(&self) -> usize {
        self.scrollback.cost()
    }

    /// The newest `limit` lines of the scrollback that contain `needle`, in
    /// the order of the stream. The text searched is plain, so colours within
    /// a word do not hide it; see [`Plain`](super::Plain). Letters must agree
    /// in case. An empty needle is found nowhere, and none across lines.
    ///
    /// Reads the whole scrollback; the result takes at most `limit` times
    /// three [`MATCH_LINE_BYTES_MAX`](super::MATCH_LINE_BYTES_MAX).
    pub fn search(&self, needle: &str, limit: usize) -> Vec<Match> {
        self.scrollback.search(needle, limit)
    }

    /// The scrollback as text, escape sequences removed as
    /// [`Plain`](super::Plain) does. Each gap, and what is no longer kept, is
    /// a line in square brackets. What is not UTF-8 becomes U+FFFD.
    pub fn export_plain(&self) -> String {
        self.scrollback.export_plain()
    }

    /// The scrollback byte for byte, to be shown by a terminal. Each gap, and
    /// what is no longer kept, is a line in square brackets, with the
    /// terminal's state reset before it.
    pub fn export_ansi(&self) -> Vec<u8> {
        self.scrollback.export_ansi()
    }

    fn jump(&self, got: u64) -> Taken {
        Taken::Jump(Jump { expected: self.position, got })
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("position", &self.position)
            .field("end", &self.end)
            .field("is_whole", &self.is_whole)
            .field("kept_from", &self.kept_from())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::GapReason;

    fn output(view: &mut View, offset: u64, data: &'static [u8]) -> Taken {
        view.handle_output(offset, Channel::Pty, Bytes::from_static(data))
    }

    fn live(offset: u64, data: &'static [u8]) -> Piece {
        let data = Bytes::from_static(data);
        Piece::Bytes { offset, channel: Channel::Pty, data, replay: false }
    }

    fn replay(offset: u64, data: &'static [u8]) -> Piece {
        let data = Bytes::from_static(data);
        Piece::Bytes { offset, channel: Channel::Pty, data, replay: true }
    }

    fn gap(from: u64, to: u64) -> Gap {
        Gap { from, to, reason: GapReason::Evicted }
    }

    fn live_view() -> View {
        let mut view = View::new(1000);
        view.handle_opened(0);
        view
    }

    #[test]
    fn a_reconnect_that_sends_too_much_doubles_nothing() {
        let mut view = live_view();
        assert_eq!(output(&mut view, 0, b"hello"), Taken::New(vec![live(0, b"hello")]));
        view.handle_opened(0);
        assert_eq!(output(&mut view, 0, b"hello"), Taken::Known);
        assert_eq!(output(&mut view, 3, b"lo you"), Taken::New(vec![live(5, b" you")]));
        assert_eq!(view.position(), 9);
        assert_eq!(view.export_plain(), "hello you");
    }

    #[test]
    fn bytes_that_skip_an_offset_are_not_taken() {
        let mut view = live_view();
        let _ = output(&mut view, 0, b"ab");
        let jump = Taken::Jump(Jump { expected: 2, got: 3 });
        assert_eq!(output(&mut view, 3, b"d"), jump);
        assert_eq!(view.handle_gap(gap(3, 9)), jump, "a gap must not hide a hole before it");
        assert_eq!(view.position(), 2);
        assert_eq!(output(&mut view, 2, b"cd"), Taken::New(vec![live(2, b"cd")]));
    }

    #[test]
    fn a_gap_is_named_but_for_what_is_known() {
        let mut view = live_view();
        let _ = output(&mut view, 0, b"ab");
        assert!(view.is_whole());
        assert_eq!(view.handle_gap(gap(0, 2)), Taken::Known);
        assert_eq!(view.handle_gap(gap(1, 6)), Taken::New(vec![Piece::Gap(gap(2, 6))]));
        assert!(!view.is_whole());
        assert_eq!(output(&mut view, 4, b"efgh"), Taken::New(vec![live(6, b"gh")]));
    }

    #[test]
    fn history_is_marked_until_the_reader_has_caught_up() {
        let mut view = View::new(1000);
        assert_eq!(output(&mut view, 0, b"a"), Taken::New(vec![replay(0, b"a")]));
        view.handle_opened(4);
        let pieces = vec![replay(1, b"bcd"), live(4, b"ef")];
        assert_eq!(output(&mut view, 1, b"bcdef"), Taken::New(pieces));
        assert_eq!(output(&mut view, 6, b"g"), Taken::New(vec![live(6, b"g")]));

        // An outage: what happened meanwhile is history when it arrives.
        view.handle_opened(9);
        assert_eq!(output(&mut view, 7, b"hi"), Taken::New(vec![replay(7, b"hi")]));
        assert_eq!(output(&mut view, 9, b"j"), Taken::New(vec![live(9, b"j")]));
    }

    #[test]
    fn done_is_shown_only_when_the_last_byte_or_its_gap_is() {
        let mut view = live_view();
        view.handle_end(5, Some("sha256:abc".into()));
        assert_eq!((view.is_complete(), view.end()), (false, Some(5)));
        let _ = output(&mut view, 0, b"abc");
        assert!(!view.is_complete());
        let _ = view.handle_gap(gap(3, 5));
        assert!(view.is_complete());
        assert_eq!((view.is_whole(), view.digest()), (false, Some("sha256:abc")));
    }

    #[test]
    fn a_reader_who_knows_the_beginning_goes_on_from_there() {
        let mut view = View::resuming(1_000, 1000);
        view.handle_opened(1_000);
        assert_eq!((view.position(), view.kept_from()), (1_000, 1_000));
        assert_eq!(output(&mut view, 998, b"xxyes"), Taken::New(vec![live(1_000, b"yes")]));
        assert_eq!(view.export_plain(), "yes", "what was never asked for is not missing");
        assert!(!view.is_whole());
    }

    #[derive(Debug, Clone)]
    enum Said {
        Output { back: u64, ahead: u64, len: u64 },
        Gap { back: u64, ahead: u64, len: u64 },
        Opened { live_from: u64 },
    }

    fn said() -> impl Strategy<Value = Said> {
        let span = || (0u64..30, prop_oneof![9 => Just(0u64), 1 => 1u64..5], 0u64..40);
        prop_oneof![
            6 => span().prop_map(|(back, ahead, len)| Said::Output { back, ahead, len }),
            2 => span().prop_map(|(back, ahead, len)| Said::Gap { back, ahead, len }),
            1 => (0u64..500).prop_map(|live_from| Said::Opened { live_from }),
        ]
    }

    proptest! {
        /// Whatever a hub says, the pieces follow on one another, carry the
        /// stream's own bytes, and a jump changes nothing.
        #[test]
        fn pieces_are_the_stream_in_order(talk in prop::collection::vec(said(), 0..80)) {
            let byte_at = |offset: u64| (offset * 31 % 251) as u8;
            let mut view = View::new(64);
            let (mut position, mut live_from) = (0, u64::MAX);
            for said in talk {
                let (from, to, taken) = match said {
                    Said::Opened { live_from: from } => {
                        view.handle_opened(from);
                        live_from = from;
                        continue;
                    }
                    Said::Output { back, ahead, len } => {
                        let from = (position + ahead).saturating_sub(back);
                        let data: Vec<u8> = (from..from + len).map(byte_at).collect();
                        (from, from + len, view.handle_output(from, Channel::Stdout, data.into()))
                    }
                    Said::Gap { back, ahead, len } => {
                        let from = (position + ahead).saturating_sub(back);
                        (from, from + len, view.handle_gap(gap(from, from + len)))
                    }
                };
                match taken {
                    Taken::Jump(jump) => {
                        prop_assert!(from > position);
                        prop_assert_eq!(jump, Jump { expected: position, got: from });
                    }
                    Taken::Known => prop_assert!(to <= position),
                    Taken::New(pieces) => {
                        for piece in pieces {
                            match piece {
                                Piece::Gap(hole) => {
                                    prop_assert_eq!(&hole, &gap(position, to));
                                    position = hole.to;
                                }
                                Piece::Bytes { offset, data, replay, .. } => {
                                    prop_assert_eq!(offset, position);
                                    prop_assert!(!data.is_empty());
                                    for byte in data {
                                        prop_assert_eq!(byte, byte_at(position));
                                        prop_assert_eq!(replay, position < live_from);
                                        position += 1;
                                    }
                                }
                            }
                        }
                        prop_assert_eq!(position, to);
                    }
                }
                prop_assert_eq!(view.position(), position);
                prop_assert!(view.kept_bytes() <= 64 && view.kept_from() <= position);
            }
        }
    }
}
