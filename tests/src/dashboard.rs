//! A simulated dashboard: the real core, and a person who checks every byte.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use trunkline_client::core::dashboard::{
    Audit, DashboardCore, DashboardEvent, Next, Output, ReaderId, RequestError, TerminalEvent,
};
use trunkline_protocol::ids::{CommandId, HubInstance, RequestId, StreamId};
use trunkline_protocol::message::{Accepted, CommandState, CommandStatus, Gap, Refusal};
use trunkline_protocol::roster::RosterEvent;

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
    /// Readers that were refused, and why.
    pub refused: BTreeMap<ReaderId, Refusal>,
    /// Every answer: one for each request.
    pub answers: BTreeMap<RequestId, Result<Accepted, RequestError>>,
    /// Commands reported as lost.
    pub lost: Vec<CommandId>,
    /// Readers that were told that nothing more will come.
    pub over: BTreeSet<ReaderId>,
    /// Final states seen, and in which era: what a hub forgets with its queue
    /// may be told anew.
    /// Since when is the last.
    pub finals: BTreeMap<CommandId, (CommandStatus, u32, Duration)>,
    attempts: BTreeMap<CommandId, (u32, u32)>,
}

impl DashboardNode {
    pub(crate) fn new(core: DashboardCore) -> Self {
        Self {
            core: Some(core),
            asleep: false,
            readers: Vec::new(),
            seen: BTreeMap::new(),
            refused: BTreeMap::new(),
            answers: BTreeMap::new(),
            lost: Vec::new(),
            over: BTreeSet::new(),
            finals: BTreeMap::new(),
            attempts: BTreeMap::new(),
        }
    }

    pub(crate) fn reads(&mut self, reader: ReaderId) {
        self.readers.push(reader);
    }

    /// What was seen of a command's output, by whichever reader.
    pub fn of(&self, command: CommandId) -> Option<&Seen> {
        self.seen.values().find(|seen| seen.command == command)
    }

    /// Hears the core. `eras` says of each hub how often the queue was lost
    /// before it. Returns whether anything happened.
    pub(crate) fn advance(&mut self, eras: &BTreeMap<HubInstance, u32>, now: Duration) -> bool {
        let Some(core) = &mut self.core else { return false };
        let era_of = |core: &DashboardCore| {
            let hub = core.roster().position().map(|at| at.hub);
            hub.and_then(|hub| eras.get(&hub)).copied().unwrap_or(0)
        };
        let mut happened = false;
        while let Some(output) = core.poll_output() {
            match &output {
                Output::Event(DashboardEvent::Roster(RosterEvent::Command(state))) => {
                    let era = era_of(core);
                    note(&mut self.finals, &mut self.attempts, state, era, now);
                }
                Output::Event(_)
                | Output::Answered { .. }
                | Output::Readable(_)
                | Output::InputMoved(_) => {}
            }
            happened = true;
            match output {
                Output::Answered { request, answer } => {
                    let known = self.answers.insert(request.clone(), answer);
                    assert!(known.is_none(), "request {request} was answered twice");
                }
                Output::Event(DashboardEvent::CommandLost(id)) => self.lost.push(id),
                Output::Readable(_) | Output::InputMoved(_) | Output::Event(_) => {}
            }
        }
        if happened {
            // What was told above may be older than a list that came with it.
            let era = era_of(core);
            for state in core.roster().commands() {
                note(&mut self.finals, &mut self.attempts, state, era, now);
            }
        }
        if self.asleep {
            return happened;
        }
        for reader in self.readers.clone() {
            while let Some(core) = &mut self.core {
                match core.take(reader) {
                    Next::Event(event) => {
                        assert!(!self.over.contains(&reader), "nothing follows the last event");
                        happened = true;
                        self.look(reader, event);
                    }
                    Next::Over => {
                        self.over.insert(reader);
                        break;
                    }
                    Next::Wait => break,
                }
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
            TerminalEvent::Refused(refusal) => {
                self.refused.insert(reader, refusal);
            }
            TerminalEvent::Lost(_) => {}
        }
    }
}

/// Final states are final, and attempts only ever rise.
fn note(
    finals: &mut BTreeMap<CommandId, (CommandStatus, u32, Duration)>,
    attempts: &mut BTreeMap<CommandId, (u32, u32)>,
    state: &CommandState,
    era: u32,
    now: Duration,
) {
    let id = state.command;
    if let Some((known, of, _)) = finals.get(&id)
        && *of == era
    {
        assert_eq!(*known, state.status, "the final state of {id} changed");
    }
    if let Some((known, of)) = attempts.insert(id, (state.attempt, era))
        && of == era
    {
        assert!(known <= state.attempt, "the attempt at {id} went back");
    }
    if state.status.is_final() {
        let since = match finals.get(&id) {
            Some((_, of, since)) if *of == era => *since,
            Some(_) | None => now,
        };
        finals.insert(id, (state.status, era, since));
    }
}
