//! What a person types: a stream per command, numbered here, kept until the
//! agent has taken it.
//!
//! Sending the same bytes twice does no harm (the agent trims what it has),
//! so whenever it is doubtful how far a stream got, on a new link, when the
//! agent is back or when it says so, sending starts again where the agent is
//! known to stand.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::TerminalInput;

/// Input ahead of what the agent has taken, until an ack says otherwise.
const AHEAD_BYTES: u64 = 64 * 1024;

#[derive(Debug)]
pub(super) struct Inputs {
    typed: BTreeMap<CommandId, Typed>,
    ahead_bytes: u64,
    /// The command whose turn it is; the ones after it come next.
    turn: Option<CommandId>,
}

#[derive(Debug, Default)]
struct Typed {
    /// Handed to the program, as far as is known.
    taken: u64,
    /// What follows `taken`.
    waiting: BytesMut,
    /// Sent on this link.
    sent: u64,
    /// The hub asked for a pause.
    paused_until: Option<Duration>,
}

impl Typed {
    fn end(&self) -> u64 {
        self.taken + self.waiting.len() as u64
    }

    fn unsent(&self, now: Duration) -> bool {
        self.sent < self.end() && self.paused_until.is_none_or(|until| until <= now)
    }
}

impl Inputs {
    pub(super) fn new() -> Self {
        Self { typed: BTreeMap::new(), ahead_bytes: AHEAD_BYTES, turn: None }
    }

    /// Takes from the front of `data` what there is room for.
    pub(super) fn push(&mut self, command: CommandId, data: &mut Bytes) {
        let ahead = self.ahead_bytes;
        let typed = self.typed.entry(command).or_default();
        let room = ahead.saturating_sub(typed.waiting.len() as u64);
        let taken = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
        typed.waiting.extend_from_slice(&data.split_to(taken));
    }

    /// Whether there is room for a byte.
    pub(super) fn has_room(&self, command: CommandId) -> bool {
        let waiting = self.typed.get(&command).map_or(0, |typed| typed.waiting.len() as u64);
        waiting < self.ahead_bytes
    }

    /// A link came up.
    pub(super) fn handle_link(&mut self, ahead_bytes: u64) {
        self.ahead_bytes = ahead_bytes.max(1);
        for typed in self.typed.values_mut() {
            typed.sent = typed.taken;
            typed.paused_until = None;
        }
    }

    /// The commands that are typed into.
    pub(super) fn commands(&self) -> Vec<CommandId> {
        self.typed.keys().copied().collect()
    }

    /// The command's agent is back, or its program has started: what was sent meanwhile may not have
    /// reached it.
    pub(super) fn handle_agent_back(&mut self, command: CommandId) {
        if let Some(typed) = self.typed.get_mut(&command) {
            typed.sent = typed.taken;
            typed.paused_until = None;
        }
    }

    /// The agent has taken everything below `offset`. Says whether there is
    /// room now that was not there before.
    pub(super) fn handle_taken(&mut self, command: CommandId, offset: u64, resend: bool) -> bool {
        let Some(typed) = self.typed.get_mut(&command) else { return false };
        if offset > typed.end() {
            tracing::warn!(%command, offset, end = typed.end(), "input taken that was never typed");
            return false;
        }
        let new = offset.saturating_sub(typed.taken);
        // At most what waits, which is a length in memory.
        let new = usize::try_from(new).unwrap_or(usize::MAX).min(typed.waiting.len());
        drop(typed.waiting.split_to(new));
        typed.taken += new as u64;
        typed.sent = if resend { typed.taken } else { typed.sent.max(typed.taken) };
        new > 0
    }

    /// The hub refused some of it for now: goes on where the agent stands.
    pub(super) fn handle_pause(&mut self, command: CommandId, until: Duration) {
        if let Some(typed) = self.typed.get_mut(&command) {
            typed.sent = typed.taken;
            typed.paused_until = Some(until);
        }
    }

    /// The hub refused it for good: nothing waits any more, and what is typed
    /// next stands where the refused bytes stood.
    pub(super) fn handle_refused(&mut self, command: CommandId) {
        if let Some(typed) = self.typed.get_mut(&command) {
            typed.waiting.clear();
            typed.sent = typed.taken;
            if typed.taken == 0 {
                self.typed.remove(&command);
            }
        }
    }

    /// The command is over: nobody types into it any more.
    pub(super) fn forget(&mut self, command: CommandId) {
        self.typed.remove(&command);
    }

    /// When a pause ends.
    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        let ends = self.typed.values().filter(|typed| typed.sent < typed.end());
        ends.filter_map(|typed| typed.paused_until).filter(|until| *until > now).min()
    }

    /// Whether something may be sent now.
    pub(super) fn has_something(&self, now: Duration) -> bool {
        self.typed.iter().any(|typed| typed.1.unsent(now))
    }

    /// The next piece to send, the commands in turn.
    pub(super) fn poll(&mut self, chunk_bytes_max: usize, now: Duration) -> Option<TerminalInput> {
        let unsent = |(_, typed): &(&CommandId, &Typed)| typed.unsent(now);
        let later = |turn| (std::ops::Bound::Excluded(turn), std::ops::Bound::Unbounded);
        let next = self.turn.and_then(|turn| self.typed.range(later(turn)).find(unsent));
        let command = *next.or_else(|| self.typed.iter().find(unsent))?.0;
        self.turn = Some(command);

        let typed = self.typed.get_mut(&command)?;
        let from = usize::try_from(typed.sent - typed.taken).unwrap_or(usize::MAX);
        let rest = typed.waiting.get(from..)?;
        let data = Bytes::copy_from_slice(&rest[..rest.len().min(chunk_bytes_max.max(1))]);
        let offset = typed.sent;
        typed.sent += data.len() as u64;
        Some(TerminalInput { command, writer: None, offset, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: CommandId = CommandId::from_u128(1);
    const D: CommandId = CommandId::from_u128(2);
    const S: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_not_taken_is_sent_again_from_there() {
        let mut inputs = Inputs::new();
        type_into(&mut inputs, C, "hello");
        assert_eq!(sent(&mut inputs, 3), [(0, "hel"), (3, "lo")].map(owned));
        assert!(inputs.handle_taken(C, 2, false));
        assert!(!inputs.handle_taken(C, 1, false), "late words change nothing");
        assert_eq!(sent(&mut inputs, 9), [(0, ""); 0].map(owned));
        inputs.handle_link(AHEAD_BYTES);
        assert_eq!(sent(&mut inputs, 9), [owned((2, "llo"))]);
        inputs.handle_taken(C, 4, true);
        assert_eq!(sent(&mut inputs, 9), [owned((4, "o"))]);
        inputs.handle_agent_back(C);
        assert_eq!(sent(&mut inputs, 9), [owned((4, "o"))]);
        inputs.handle_taken(C, 5, false);
        type_into(&mut inputs, C, "!");
        assert_eq!(sent(&mut inputs, 9), [owned((5, "!"))]);
    }

    #[test]
    fn a_person_types_no_further_ahead_than_allowed() {
        let mut inputs = Inputs::new();
        inputs.handle_link(4);
        let mut data = Bytes::from_static(b"123456");
        inputs.push(C, &mut data);
        assert_eq!(data, "56");
        assert!(!inputs.has_room(C) && inputs.has_room(D));
        assert!(inputs.handle_taken(C, 1, false));
        inputs.push(C, &mut data);
        assert_eq!(data, "6");
        assert!(!inputs.handle_taken(C, 99, false), "more than was typed");
    }

    #[test]
    fn a_pause_holds_one_command_and_refusal_drops_its_input() {
        let mut inputs = Inputs::new();
        type_into(&mut inputs, C, "a");
        type_into(&mut inputs, D, "b");
        assert_eq!(inputs.poll(9, S).unwrap().command, C);
        inputs.handle_pause(C, 2 * S);
        assert_eq!(inputs.deadline(S), Some(2 * S));
        assert_eq!(inputs.poll(9, S).unwrap().command, D);
        assert_eq!(inputs.poll(9, S), None);
        assert_eq!(inputs.poll(9, 2 * S).unwrap().data, "a");
        inputs.handle_refused(C);
        inputs.handle_link(AHEAD_BYTES);
        assert_eq!(inputs.poll(9, 2 * S).unwrap().command, D);
        assert_eq!(inputs.poll(9, 2 * S), None);
    }

    #[test]
    fn commands_take_turns() {
        let mut inputs = Inputs::new();
        type_into(&mut inputs, C, "abc");
        type_into(&mut inputs, D, "xyz");
        let order: Vec<_> = sent(&mut inputs, 1).into_iter().map(|(_, text)| text).collect();
        assert_eq!(order.concat(), "axbycz");
    }

    fn type_into(inputs: &mut Inputs, command: CommandId, text: &'static str) {
        let mut data = Bytes::from_static(text.as_bytes());
        inputs.push(command, &mut data);
        assert!(data.is_empty());
    }

    fn sent(inputs: &mut Inputs, chunk: usize) -> Vec<(u64, String)> {
        let piece =
            |input: TerminalInput| (input.offset, String::from_utf8(input.data.to_vec()).unwrap());
        std::iter::from_fn(|| inputs.poll(chunk, Duration::ZERO)).map(piece).collect()
    }

    fn owned((offset, text): (u64, &str)) -> (u64, String) {
        (offset, text.to_owned())
    }
}
