//! Whatever a terminal writes, however it is cut, repeated and torn: a view
//! gives each byte once, keeps to its bound, and can be searched and exported.

use bytes::Bytes;
use trunkline_protocol::message::{Channel, Gap};
use trunkline_protocol::stream::{GAP_COST_BYTES, MATCH_LINE_BYTES_MAX, Piece, Plain, Taken, View};

use crate::names;
use crate::plan::Plan;

/// Follows the plan; what is written is what the plan holds.
pub fn run(data: &[u8]) {
    plain(data);
    let plan = &mut Plan::new(data);
    let kept_max = plan.of(&[0, 1, 7, 64, 300, 1000, 5000]);
    let begin = plan.of(&[0, 0, 0, 1, 1000, i64::MAX as u64 - 100_000]);
    let mut view = View::resuming(begin, kept_max);
    let mut at = begin;
    let mut holes = 0;
    while !plan.is_over() {
        match plan.below(6) {
            0..=2 => {
                let len = usize::from(plan.byte());
                let data = Bytes::copy_from_slice(plan.take(len));
                if data.is_empty() {
                    continue;
                }
                let back = if plan.once_in(4) { plan.number() } else { 0 };
                let offset = at.saturating_sub(back) + u64::from(plan.once_in(9));
                let taken = view.handle_output(offset, Channel::Pty, data.clone());
                check(&taken, &data, offset, &mut at);
            }
            3 => {
                let from = at.saturating_sub(plan.number()) + u64::from(plan.once_in(9));
                let to = from + 1 + plan.number() % 500;
                let reason = names::reason(plan);
                let taken = view.handle_gap(Gap { from, to, reason });
                if to > i64::MAX as u64 {
                    return; // no decoder lets such through
                }
                check(&taken, &Bytes::new(), from, &mut at);
                holes += 1;
            }
            4 => view.handle_opened(plan.offset()),
            _ => {
                let len = plan.below(5).into();
                let needle = plan.text(len);
                let limit = plan.below(4).into();
                let found = view.search(&needle, limit);
                assert!(found.len() <= limit);
                for found in &found {
                    assert!((view.kept_from()..view.position()).contains(&found.offset));
                    assert!(found.line.len() <= 3 * MATCH_LINE_BYTES_MAX);
                    assert!(!found.line.contains('\n'));
                }
                assert!(found.is_sorted_by_key(|found| found.offset));
            }
        }
        assert_eq!(view.position(), at);
        assert!(view.kept_bytes() <= kept_max);
        assert!(view.kept_from() <= at);
    }
    let room = 3 * kept_max + (kept_max / GAP_COST_BYTES + 2).min(holes + 1) * 200;
    let text = view.export_plain();
    assert!(text.len() <= room, "{} bytes of text of {kept_max}", text.len());
    assert!(view.export_ansi().len() <= room);
    for (needle, limit) in [("e", 3), ("\u{fffd}", 3)] {
        for found in view.search(needle, limit) {
            assert!(found.offset < view.position());
        }
    }
}

/// Whether what came of it follows on, and is what was handed in.
fn check(taken: &Taken, data: &Bytes, offset: u64, at: &mut u64) {
    match taken {
        Taken::Known => {}
        Taken::Jump(jump) => {
            assert_eq!((jump.expected, jump.got), (*at, offset));
            assert!(offset > *at);
        }
        Taken::New(pieces) => {
            assert!((1..=2).contains(&pieces.len()));
            for piece in pieces {
                match piece {
                    Piece::Bytes { offset: from, data: part, .. } => {
                        assert_eq!(from, at);
                        assert!(!part.is_empty());
                        let skipped = usize::try_from(from - offset).expect("within the data");
                        assert_eq!(part, &data[skipped..skipped + part.len()]);
                        *at += part.len() as u64;
                    }
                    Piece::Gap(gap) => {
                        assert_eq!(gap.from, *at);
                        assert!(gap.to > gap.from);
                        *at = gap.to;
                    }
                }
            }
        }
    }
}

/// What is text does not depend on how the bytes are cut, and has nothing in
/// it that a terminal would act on.
fn plain(data: &[u8]) {
    let mut whole = Vec::new();
    Plain::default().feed(data, &mut whole);
    let (mut cut, mut plain) = (Vec::new(), Plain::default());
    for piece in data.chunks(usize::from(data.first().copied().unwrap_or(1) % 7) + 1) {
        plain.feed(piece, &mut cut);
    }
    assert_eq!(whole, cut);
    assert!(whole.len() <= 2 * data.len() + 1);
    let is_control = |byte: &u8| *byte < 0x20 && !matches!(byte, b'\n' | b'\t') || *byte == 0x7f;
    assert!(!whole.iter().any(is_control));
    let text = String::from_utf8_lossy(&whole);
    assert!(!text.chars().any(|c| ('\u{80}'..='\u{9f}').contains(&c)), "no C1 control");
}
