//! A simulated dashboard: the real core, and a person who checks every byte.

use std::collections::BTreeMap;
use std::sync::Arc;

use trunkline_client::core::dashboard::{
    Audit, DashboardCore, Next, Output, ReaderId, RequestError, TerminalEvent,
};
use trunkline_protocol::ids::{CommandId, RequestId, StreamId};
use trunkline_protocol::message::{Accepted, CommandState, Gap};

use crate::agent::byte_of;

/// What was seen of one stream.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Whose output it is.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// Where reading began.
    pub from: u64,
    /// Where it stands.
    pub at: u64,
    /// Bytes shown.
    pub bytes: u64,
    /// Bytes marked as replay.
    pub replayed: u64,
    /// What was told to be missing.
    pub gaps: Vec<Gap>,
    /// Its end, once it was shown.
    pub ended: Option<(Arc<CommandState>, Audit)>,
}

/// A person's view.
#[derive(Debug)]
pub struct DashboardNode {
    /// The core; `None` after it left.
    pub core: Option<DashboardCore>,
    /// Does not look at its terminals while this is set.
    pub asleep: bool,
    readers: Vec<ReaderId>,
    /// Every stream, by reader.
    pub seen: BTreeMap<(ReaderId, StreamId), Seen>,
    /// Every answer: one for each request.
    pub answers: BTreeMap<RequestId, Result<Accepted, RequestError>>,
    /// Commands reported as lost.
    pub lost: Vec<CommandId>,
}

impl DashboardNode {
    pub(crate) fn new(core: DashboardCore) -> Self {
        Self {
            core: Some(core),
            asleep: false,
            readers: Vec::new(),
            seen: BTreeMap::new(),
            answers: BTreeMap::new(),
            lost: Vec::new(),
        }
    }

    pub(crate) fn reads(&mut self, reader: ReaderId) {
        self.readers.push(reader);
    }

    /// What was seen of a command's output, by whichever reader.
    pub fn of(&self, command: CommandId) -> Option<&Seen> {
        self.seen.values().find(|seen| seen.command == command)
    }

    /// Hears the core. Returns whether anything happened.
    pub(crate) fn advance(&mut self) -> bool {
        let Some(core) = &mut self.core else { return false };
        let mut happened = false;
        while let Some(output) = core.poll_output() {
            happened = true;
            match output {
                Output::Answered { request, answer } => {
                    let known = self.answers.insert(request.clone(), answer);
                    assert!(known.is_none(), "request {request} was answered twice");
                }
                Output::Event(trunkline_client::core::dashboard::DashboardEvent::CommandLost(
                    id,
                )) => {
                    self.lost.push(id);
                }
                Output::Readable(_)
                | Output::InputMoved(_)
                | Output::RefreshNeeded
                | Output::Event(_) => {}
            }
        }
        if self.asleep {
            return happened;
        }
        for reader in self.readers.clone() {
            while let Some(core) = &mut self.core
                && let Next::Event(event) = core.take(reader)
            {
                happened = true;
                self.look(reader, event);
            }
        }
        happened
    }

    /// What a person would notice.
    fn look(&mut self, reader: ReaderId, event: TerminalEvent) {
        match event {
            TerminalEvent::Opened { stream, command, attempt, from, .. } => {
                let seen = Seen {
                    command,
                    attempt,
                    from,
                    at: from,
                    bytes: 0,
                    replayed: 0,
                    gaps: Vec::new(),
                    ended: None,
                };
                let known = self.seen.insert((reader, stream), seen);
                assert!(known.is_none(), "a stream is opened once");
            }
            TerminalEvent::Output { stream, offset, data, replay, .. } => {
                let seen = self.seen.get_mut(&(reader, stream)).expect("opened before its output");
                assert!(seen.ended.is_none(), "nothing follows the end");
                assert_eq!(offset, seen.at, "neither twice nor out of order, and no hole unnamed");
                for (i, byte) in data.iter().enumerate() {
                    let at = offset + i as u64;
                    assert_eq!(*byte, byte_of(seen.command, seen.attempt, at), "byte {at}");
                }
                seen.at += data.len() as u64;
                seen.bytes += data.len() as u64;
                if replay {
                    seen.replayed += data.len() as u64;
                }
            }
            TerminalEvent::Gap { stream, gap } => {
                let seen = self.seen.get_mut(&(reader, stream)).expect("opened before its gap");
                assert_eq!(gap.from, seen.at, "a gap is exact");
                assert!(gap.to > gap.from, "a gap is not empty");
                seen.at = gap.to;
                seen.gaps.push(gap);
            }
            TerminalEvent::Ended { stream, state, audit } => {
                let seen = self.seen.get_mut(&(reader, stream)).expect("opened before its end");
                assert!(seen.ended.is_none(), "a stream ends once");
                let end = state.end.as_ref().expect("a final state says its end").end;
                assert!(seen.at >= end, "the end is shown after the last byte");
                assert_ne!(audit, Audit::Mismatch, "what was read is what was written");
                if seen.gaps.is_empty()
                    && seen.from == 0
                    && state.end.as_ref().is_some_and(|e| e.digest.is_some())
                {
                    assert_eq!(audit, Audit::Verified);
                }
                seen.ended = Some((state, audit));
            }
            TerminalEvent::Refused(refusal) => panic!("a subscription was refused: {refusal}"),
            TerminalEvent::Lost(_) => {}
        }
    }
}
