//! What the agents run: real programs, and a probe that notes when it wrote.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, interval};
use trunkline_client::protocol::ids::CommandId;
use trunkline_client::protocol::message::{Channel, Run};
use trunkline_client::{BoxFuture, CommandHandler, Execution, ExecutionEvent, Outcome, Programs};
use trunkline_examples::now;

use crate::truth::Truth;

/// The text that asks for a probe; the number of writes follows.
pub(crate) const PROBE: &str = "latency probe: ";

/// How long the probe waits between two writes.
const EVERY: Duration = Duration::from_millis(5);

/// Runs programs, and probes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Crew {
    programs: Programs,
    notes: Arc<Mutex<HashMap<CommandId, Note>>>,
}

/// What a probe wrote: the end of each write, and when it began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Note {
    pub(crate) writes: Vec<(u64, Instant)>,
    bytes: Vec<u8>,
}

impl Note {
    pub(crate) fn truth(&self) -> Truth {
        Truth::of(&self.bytes)
    }
}

impl Crew {
    pub(crate) fn note(&self, command: CommandId) -> Note {
        self.lock().get(&command).cloned().unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<CommandId, Note>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CommandHandler for Crew {
    fn run(&self, execution: Execution) -> BoxFuture<'static, Outcome> {
        let writes = match &execution.spec().run {
            Run::Text(text) => text.strip_prefix(PROBE).and_then(|count| count.parse().ok()),
            Run::Argv(_) | Run::Shell(_) => None,
        };
        match writes {
            Some(writes) => Box::pin(probe(self.clone(), execution, writes)),
            None => self.programs.run(execution),
        }
    }
}

/// Writes a short line every few milliseconds.
async fn probe(crew: Crew, mut execution: Execution, writes: u32) -> Outcome {
    let output = execution.output();
    let command = execution.command();
    let mut ticks = interval(EVERY);
    for number in 0..writes {
        tokio::select! {
            _ = ticks.tick() => {}
            () = interrupted(&mut execution) => return Outcome::Interrupted,
        }
        let line = format!("{number:06} {}\n", "-".repeat(40));
        let began = now();
        {
            let mut notes = crew.lock();
            let note = notes.entry(command).or_default();
            note.bytes.extend_from_slice(line.as_bytes());
            note.writes.push((note.bytes.len() as u64, began));
        }
        output.write(Channel::Stdout, line.as_bytes()).await;
    }
    Outcome::Exited(0)
}

async fn interrupted(execution: &mut Execution) {
    while !matches!(execution.next_event().await, ExecutionEvent::Interrupt { .. }) {}
}
