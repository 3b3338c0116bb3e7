//! What an agent writes down so that its next process knows it: the records,
//! and what they come to.
//!
//! ```text
//!              Begun            Ended              Settled
//!   not known ───────► begun ──────────► ended ──────────────► fenced ──► forgotten
//!                        │    the process died   ▲              only "it was begun" is kept,
//!                        └──► is `unknown` ──────┘              of the last FENCES_MAX
//! ```
//!
//! A command has one place, which belongs to its highest attempt. A record
//! that comes again, or of a lower attempt, changes nothing.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use trunkline_protocol::ids::{CommandId, InstanceId};
use trunkline_protocol::message::{CommandAccepted, CommandComplete, CommandSettled};

use super::FENCES_MAX;

/// One thing that is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalRecord {
    /// The attempt may start from now on.
    Begun(CommandAccepted),
    /// The attempt has ended, and how.
    Ended(CommandComplete),
    /// The hub has stored the end, or a later attempt took its place: only that
    /// the attempt was begun is still of use.
    Settled(CommandSettled),
}

impl JournalRecord {
    /// Which attempt it is about.
    pub fn attempt(&self) -> (CommandId, u32) {
        match self {
            Self::Begun(begun) => (begun.command, begun.attempt),
            Self::Ended(ended) => (ended.command, ended.attempt),
            Self::Settled(settled) => (settled.command, settled.attempt),
        }
    }
}

/// What a journal remembers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The name of this memory: an agent that goes on with it is, to the hub,
    /// the one that wrote it.
    pub instance: InstanceId,
    /// Records that come to the same [`Attempts`] as all that were ever
    /// written, in order.
    pub records: Vec<JournalRecord>,
}

/// What records come to: of each command the highest attempt, and how far that
/// is.
///
/// A journal that keeps [`records`](Self::records) instead of everything loses
/// nothing and stays small: what is not settled, which is little, and the last
/// [`FENCES_MAX`] attempts that are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attempts {
    known: BTreeMap<CommandId, Known>,
    /// The commands whose attempt is settled, the oldest first.
    settled: VecDeque<CommandId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    Begun(CommandAccepted),
    Ended(CommandComplete),
    Settled(CommandSettled),
}

impl Known {
    pub(super) fn attempt(&self) -> u32 {
        match self {
            Self::Begun(begun) => begun.attempt,
            Self::Ended(ended) => ended.attempt,
            Self::Settled(settled) => settled.attempt,
        }
    }
}

impl Attempts {
    /// Adds one record.
    pub fn apply(&mut self, record: &JournalRecord) {
        let (command, attempt) = record.attempt();
        let known = self.known.get(&command);
        let before = known.map(Known::attempt);
        match record {
            JournalRecord::Begun(begun) => {
                if before.is_none_or(|before| before < attempt) {
                    self.set(command, Known::Begun(*begun));
                }
            }
            JournalRecord::Ended(ended) => {
                // The first word on it counts.
                if matches!(known, Some(Known::Begun(begun)) if begun.attempt == attempt) {
                    self.set(command, Known::Ended(ended.clone()));
                }
            }
            JournalRecord::Settled(settled) => {
                let again = matches!(known, Some(Known::Settled(known)) if known == settled);
                if before.is_none_or(|before| before <= attempt) && !again {
                    self.set(command, Known::Settled(*settled));
                    self.settled.push_back(command);
                    if self.settled.len() > FENCES_MAX
                        && let Some(oldest) = self.settled.pop_front()
                    {
                        self.known.remove(&oldest);
                    }
                }
            }
        }
    }

    fn set(&mut self, command: CommandId, known: Known) {
        if let Some(Known::Settled(_)) = self.known.insert(command, known) {
            self.settled.retain(|settled| *settled != command);
        }
    }

    /// The fewest records that come to the same, what is settled first.
    pub fn records(&self) -> Vec<JournalRecord> {
        let mut records = Vec::with_capacity(self.known.len());
        for (_, known) in self.iter() {
            match known {
                Known::Begun(begun) => records.push(JournalRecord::Begun(*begun)),
                Known::Ended(ended) => {
                    let (command, attempt) = (ended.command, ended.attempt);
                    records.push(JournalRecord::Begun(CommandAccepted { command, attempt }));
                    records.push(JournalRecord::Ended(ended.clone()));
                }
                Known::Settled(settled) => records.push(JournalRecord::Settled(*settled)),
            }
        }
        records
    }

    /// What is settled, in that order; then the rest, in order of the commands.
    pub(super) fn iter(&self) -> impl Iterator<Item = (CommandId, &Known)> {
        let settled = self.settled.iter().filter_map(|id| Some((*id, self.known.get(id)?)));
        let is_open = |(_, known): &(&CommandId, &Known)| !matches!(known, Known::Settled(_));
        settled.chain(self.known.iter().filter(is_open).map(|(id, known)| (*id, known)))
    }
}

impl<'a> FromIterator<&'a JournalRecord> for Attempts {
    fn from_iter<I: IntoIterator<Item = &'a JournalRecord>>(records: I) -> Self {
        let mut attempts = Self::default();
        for record in records {
            attempts.apply(record);
        }
        attempts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use trunkline_protocol::message::{CommandEnd, CommandStatus};

    use super::*;

    fn begun(command: u128, attempt: u32) -> JournalRecord {
        JournalRecord::Begun(CommandAccepted { command: CommandId::from_u128(command), attempt })
    }

    fn ended(command: u128, attempt: u32, code: i32) -> JournalRecord {
        JournalRecord::Ended(CommandComplete {
            command: CommandId::from_u128(command),
            attempt,
            status: CommandStatus::Completed,
            end: CommandEnd { exit_code: Some(code), ..CommandEnd::default() },
        })
    }

    fn settled(command: u128, attempt: u32) -> JournalRecord {
        JournalRecord::Settled(CommandSettled { command: CommandId::from_u128(command), attempt })
    }

    #[test]
    fn the_highest_attempt_counts_and_its_first_end() {
        let all = [begun(1, 2), ended(1, 2, 7), begun(1, 1), ended(1, 2, 8), settled(1, 1)];
        let attempts: Attempts = all.iter().collect();
        assert_eq!(attempts.records(), [begun(1, 2), ended(1, 2, 7)]);
    }

    #[test]
    fn what_is_settled_stays_known_for_a_while() {
        let mut attempts = Attempts::default();
        for command in 0..=FENCES_MAX as u128 {
            for record in [begun(command, 1), ended(command, 1, 0), settled(command, 1)] {
                attempts.apply(&record);
            }
        }
        let records = attempts.records();
        assert_eq!(records.len(), FENCES_MAX);
        assert_eq!((&records[0], records.last()), (&settled(1, 1), Some(&settled(4096, 1))));
        // It is begun again, by a higher number only.
        attempts.apply(&begun(5, 1));
        assert_eq!(attempts.records(), records);
        attempts.apply(&begun(5, 2));
        assert_eq!(attempts.records().last(), Some(&begun(5, 2)));
        assert_eq!(attempts.records().len(), FENCES_MAX);
    }

    proptest! {
        #[test]
        fn the_fewest_records_come_to_the_same(
            words in prop::collection::vec((0..3u8, 0..4u128, 1..4u32), 0..60),
        ) {
            let records: Vec<JournalRecord> = words
                .into_iter()
                .map(|(kind, command, attempt)| match kind {
                    0 => begun(command, attempt),
                    1 => ended(command, attempt, 0),
                    _ => settled(command, attempt),
                })
                .collect();
            let all: Attempts = records.iter().collect();
            let few: Attempts = all.records().iter().collect();
            prop_assert_eq!(&few, &all);
            let twice: Attempts = records.iter().flat_map(|record| [record, record]).collect();
            prop_assert_eq!(twice, all);
        }
    }
}
