//! The suite passes our own journal, and catches journals that break one
//! obligation each.

use std::sync::{Arc, Mutex};

use super::*;
use crate::connector::BoxFuture;
use crate::journal::{FileJournal, JournalError};

#[tokio::test]
async fn a_file_keeps_every_obligation() {
    let folder = tempfile::tempdir().unwrap();
    let mut memories = 0..;
    journal(|| {
        let path = folder.path().join(format!("{:?}", memories.next()));
        move || std::future::ready(FileJournal::open(&path))
    })
    .await;
}

#[tokio::test]
async fn memory_keeps_every_obligation() {
    run(Fault::None).await;
}

#[tokio::test]
#[should_panic(expected = "what was recorded is there")]
async fn one_that_forgets_with_its_process_is_caught() {
    run(Fault::Forgets).await;
}

#[tokio::test]
#[should_panic(expected = "what was recorded is there")]
async fn one_that_drops_how_commands_ended_is_caught() {
    run(Fault::DropsEnds).await;
}

#[tokio::test]
#[should_panic(expected = "what was recorded is there")]
async fn one_that_lets_a_lower_attempt_win_is_caught() {
    run(Fault::ByCommandOnly).await;
}

#[tokio::test]
#[should_panic(expected = "and not its instance")]
async fn one_with_a_new_instance_each_time_is_caught() {
    run(Fault::NewInstance).await;
}

#[tokio::test]
#[should_panic(expected = "an instance of its own")]
async fn one_with_the_same_instance_everywhere_is_caught() {
    run(Fault::OneInstance).await;
}

#[tokio::test]
#[should_panic(expected = "changes nothing")]
async fn one_in_which_repeating_does_harm_is_caught() {
    run(Fault::RepeatsForget).await;
}

#[tokio::test]
#[should_panic(expected = "whole or not at all")]
async fn one_that_writes_record_by_record_is_caught() {
    run(Fault::OneByOne).await;
}

#[tokio::test]
#[should_panic(expected = "cannot be opened a second time")]
async fn one_that_two_may_use_is_caught() {
    run(Fault::Shared).await;
}

#[tokio::test]
#[should_panic(expected = "attempts stay known")]
async fn one_that_drops_what_is_settled_is_caught() {
    run(Fault::NoFences).await;
}

#[tokio::test]
#[should_panic(expected = "does not grow for ever")]
async fn one_that_grows_for_ever_is_caught() {
    run(Fault::KeepsAll).await;
}

// ---- below the tests ----------------------------------------------------------

async fn run(fault: Fault) {
    let mut memories = 1..;
    journal(|| {
        let instance = memories.next().unwrap();
        let memory = Arc::new(Mutex::new(Memory { instance, ..Memory::default() }));
        move || std::future::ready(InMemory::open(&memory, fault))
    })
    .await;
}

/// What a journal in memory does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Forgets,
    DropsEnds,
    ByCommandOnly,
    NewInstance,
    OneInstance,
    RepeatsForget,
    OneByOne,
    Shared,
    NoFences,
    KeepsAll,
}

#[derive(Debug, Default)]
struct Memory {
    instance: u128,
    records: Vec<JournalRecord>,
    is_used: bool,
    opened: u128,
}

#[derive(Debug)]
struct InMemory {
    memory: Arc<Mutex<Memory>>,
    fault: Fault,
}

impl InMemory {
    fn open(memory: &Arc<Mutex<Memory>>, fault: Fault) -> Result<Self, &'static str> {
        let mut inside = memory.lock().unwrap();
        if inside.is_used && fault != Fault::Shared {
            return Err("in use");
        }
        inside.is_used = true;
        inside.opened += 1;
        match fault {
            Fault::Forgets => inside.records.clear(),
            Fault::NoFences => {
                inside.records = Attempts::from_iter(&inside.records).records();
                inside.records.retain(|record| !matches!(record, JournalRecord::Settled(s) if s.command.as_u128() > 10));
            }
            Fault::KeepsAll => {}
            _ => inside.records = Attempts::from_iter(&inside.records).records(),
        }
        drop(inside);
        Ok(Self { memory: Arc::clone(memory), fault })
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        self.memory.lock().unwrap().is_used = false;
    }
}

impl Journal for InMemory {
    fn load(&self) -> BoxFuture<'_, Result<Recovered, JournalError>> {
        let memory = self.memory.lock().unwrap();
        let instance = match self.fault {
            Fault::NewInstance => memory.instance + 1_000 * memory.opened,
            Fault::OneInstance => 1,
            _ => memory.instance,
        };
        let recovered = Recovered {
            instance: InstanceId::from_u128(instance),
            records: memory.records.clone(),
        };
        Box::pin(async move { Ok(recovered) })
    }

    fn record<'a>(
        &'a self,
        records: &'a [JournalRecord],
    ) -> BoxFuture<'a, Result<(), JournalError>> {
        Box::pin(async move {
            for record in records {
                self.write(record);
                if self.fault == Fault::OneByOne {
                    tokio::task::yield_now().await;
                }
            }
            Ok(())
        })
    }
}

impl InMemory {
    fn write(&self, record: &JournalRecord) {
        let mut memory = self.memory.lock().unwrap();
        match (self.fault, record) {
            (Fault::DropsEnds, JournalRecord::Ended(_)) => {}
            (Fault::ByCommandOnly, record) => {
                let (command, _) = record.attempt();
                memory.records.retain(|known| known.attempt().0 != command);
                memory.records.push(record.clone());
            }
            (Fault::RepeatsForget, record) if memory.records.contains(record) => {
                memory.records.retain(|known| known != record);
            }
            (_, record) => memory.records.push(record.clone()),
        }
    }
}
