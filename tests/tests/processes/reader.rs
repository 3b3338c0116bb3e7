//! Somebody who reads a command's terminal and checks every byte as it comes.

use std::collections::BTreeMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use trunkline_client::{Audit, Terminal, TerminalEvent};
use trunkline_protocol::ids::StreamId;
use trunkline_protocol::message::{Channel, CommandState, Gap};

use crate::program::{Expected, digest};

/// What was seen of one attempt's output.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) attempt: u32,
    /// Where it stands.
    pub(crate) at: u64,
    /// Bytes that were shown, each of them compared.
    pub(crate) bytes: u64,
    pub(crate) gaps: Vec<Gap>,
    /// The end, once it was shown.
    pub(crate) ended: Option<(Arc<CommandState>, Audit)>,
    sha256: Sha256,
    /// How much of each of two channels was shown.
    channels: BTreeMap<u8, usize>,
}

impl Seen {
    /// The SHA-256 of what was shown.
    pub(crate) fn digest(&self) -> String {
        digest(self.sha256.clone().finalize())
    }
}

/// What a reader saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    pub(crate) streams: BTreeMap<StreamId, Seen>,
    /// Nobody knows any more how it ended.
    pub(crate) is_lost: bool,
}

/// Reads to the end. `position` follows the newest stream.
pub(crate) async fn read(
    mut terminal: Terminal,
    expected: &Expected,
    position: &watch::Sender<u64>,
) -> Reading {
    let mut reading = Reading::default();
    while let Some(event) = terminal.next().await {
        look(&mut reading, event, expected, position);
    }
    reading
}

fn look(
    reading: &mut Reading,
    event: TerminalEvent,
    expected: &Expected,
    position: &watch::Sender<u64>,
) {
    let streams = &mut reading.streams;
    match event {
        TerminalEvent::Opened { stream, attempt, from, .. } => {
            assert_eq!(from, 0, "attempt {attempt} is read from its beginning");
            let seen = Seen {
                attempt,
                at: 0,
                bytes: 0,
                gaps: Vec::new(),
                ended: None,
                sha256: Sha256::new(),
                channels: BTreeMap::new(),
            };
            assert!(streams.insert(stream, seen).is_none(), "a stream is opened once");
        }
        TerminalEvent::Output { stream, offset, channel, data, .. } => {
            let seen = streams.get_mut(&stream).expect("opened before its output");
            assert!(seen.ended.is_none(), "nothing follows the end");
            assert_eq!(offset, seen.at, "no byte twice, none out of order, no hole unnamed");
            let text = || String::from_utf8_lossy(&data).into_owned();
            assert!(expected.has(offset, &data), "not what stands at {offset}: {:?}", text());
            let lane = seen.channels.entry(u8::from(channel == Channel::Stderr)).or_default();
            *lane = expected
                .follows(channel, *lane, &data, !seen.gaps.is_empty())
                .unwrap_or_else(|| panic!("not what follows in {channel}: {:?}", text()));
            seen.sha256.update(&data);
            seen.at += data.len() as u64;
            seen.bytes += data.len() as u64;
            position.send_replace(seen.at);
        }
        TerminalEvent::Gap { stream, gap } => {
            let seen = streams.get_mut(&stream).expect("opened before its gap");
            assert!(seen.ended.is_none(), "nothing follows the end");
            assert_eq!(gap.from, seen.at, "a gap is exact");
            assert!(gap.to > gap.from, "a gap is not empty");
            seen.at = gap.to;
            seen.gaps.push(gap);
            position.send_replace(seen.at);
        }
        TerminalEvent::Ended { stream, state, audit } => {
            let seen = streams.get_mut(&stream).expect("opened before its end");
            assert!(seen.ended.is_none(), "a stream ends once");
            assert_ne!(audit, Audit::Mismatch, "what was read is what was written");
            seen.ended = Some((state, audit));
        }
        TerminalEvent::Refused(refusal) => panic!("a subscription was refused: {refusal}"),
        TerminalEvent::Lost(_) => reading.is_lost = true,
    }
}
