//! Agents that do as they are told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{Channel, CommandSpec, Run};

use crate::connector::BoxFuture;
use crate::{CommandHandler, Execution, ExecutionEvent, Outcome};

/// What a program does, for a test.
///
/// Interrupted, it ends at once, unless it is [`stubborn`](Self::stubborn).
#[derive(Debug, Clone)]
pub struct Script {
    steps: Vec<Step>,
    end: Outcome,
    is_stubborn: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Write(Channel, Bytes),
    Sleep(Duration),
    Hear(Bytes),
}

impl Script {
    /// A program that does nothing and exits with 0.
    pub fn new() -> Self {
        Self { steps: Vec::new(), end: Outcome::Exited(0), is_stubborn: false }
    }

    /// Writes to its terminal.
    #[must_use]
    pub fn prints(self, text: impl Into<Bytes>) -> Self {
        self.writes(Channel::Pty, text)
    }

    /// Writes bytes.
    #[must_use]
    pub fn writes(mut self, channel: Channel, bytes: impl Into<Bytes>) -> Self {
        self.steps.push(Step::Write(channel, bytes.into()));
        self
    }

    /// Waits.
    #[must_use]
    pub fn sleeps(mut self, time: Duration) -> Self {
        self.steps.push(Step::Sleep(time));
        self
    }

    /// Waits until somebody has typed this, after what an earlier step waited
    /// for.
    #[must_use]
    pub fn hears(mut self, typed: impl Into<Bytes>) -> Self {
        self.steps.push(Step::Hear(typed.into()));
        self
    }

    /// Exits with this code in the end.
    #[must_use]
    pub fn exits(self, code: i32) -> Self {
        self.ends(Outcome::Exited(code))
    }

    /// Ends so.
    #[must_use]
    pub fn ends(mut self, outcome: Outcome) -> Self {
        self.end = outcome;
        self
    }

    /// Goes on until it is interrupted.
    #[must_use]
    pub fn goes_on(self) -> Self {
        self.sleeps(Duration::from_secs(3600 * 24 * 365))
    }

    /// Does not end when it is interrupted.
    #[must_use]
    pub fn stubborn(mut self) -> Self {
        self.is_stubborn = true;
        self
    }
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs scripts for commands, instead of programs: the handler of an agent in
/// a test.
///
/// A command is known by its text, or by its words with one space between
/// them. One that is not known exits with 127, as a shell would say.
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_client::testing::{Script, Scripts};
///
/// let scripts = Scripts::new()
///     .on("cargo build", Script::new().prints("Compiling\r\n").exits(101))
///     .on("login", Script::new().prints("password: ").hears("secret\n"));
/// // Agent::over(cable.connector(), "build-1")?.connect(scripts.clone());
/// assert!(scripts.started().is_empty());
/// # });
/// ```
#[derive(Debug, Clone, Default)]
pub struct Scripts {
    scripts: BTreeMap<String, Script>,
    started: Arc<Mutex<Vec<Started>>>,
}

/// A command that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Which.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// What was to be run.
    pub spec: CommandSpec,
}

impl Scripts {
    /// No script.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a script for a command.
    #[must_use]
    pub fn on(mut self, command: impl Into<String>, script: Script) -> Self {
        self.scripts.insert(command.into(), script);
        self
    }

    /// What was started, by this and all its clones, in order.
    pub fn started(&self) -> Vec<Started> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl CommandHandler for Scripts {
    fn run(&self, execution: Execution) -> BoxFuture<'static, Outcome> {
        let started = Started {
            command: execution.command(),
            attempt: execution.attempt(),
            spec: execution.spec().clone(),
        };
        let name = match &started.spec.run {
            Run::Text(text) | Run::Shell(text) => text.clone(),
            Run::Argv(words) => words.join(" "),
        };
        self.started.lock().unwrap_or_else(PoisonError::into_inner).push(started);
        match self.scripts.get(&name).cloned() {
            Some(script) => Box::pin(play(script, execution)),
            None => Box::pin(std::future::ready(Outcome::Exited(127))),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a handler has the runtime's time")]
async fn play(script: Script, mut execution: Execution) -> Outcome {
    let output = execution.output();
    let mut typed = VecDeque::new();
    for step in &script.steps {
        let until = match step {
            Step::Write(channel, bytes) => {
                output.write(*channel, bytes).await;
                continue;
            }
            Step::Sleep(time) => Some(Instant::now() + *time),
            Step::Hear(_) => None,
        };
        loop {
            if let Step::Hear(wanted) = step
                && heard(&mut typed, wanted)
            {
                break;
            }
            let event = tokio::select! {
                event = execution.next_event() => event,
                () = async {
                    match until {
                        Some(until) => sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                } => break,
            };
            match event {
                ExecutionEvent::Input(bytes) => typed.extend(bytes),
                ExecutionEvent::Interrupt { .. } if !script.is_stubborn => {
                    execution.signalled();
                    return Outcome::Interrupted;
                }
                ExecutionEvent::Interrupt { .. } | ExecutionEvent::Resize(_) => {}
            }
        }
    }
    script.end
}

/// Takes what is wanted, and what stands before it, if it was typed.
fn heard(typed: &mut VecDeque<u8>, wanted: &[u8]) -> bool {
    let bytes = typed.make_contiguous();
    let at = if wanted.is_empty() {
        Some(0)
    } else {
        bytes.windows(wanted.len()).position(|part| part == wanted)
    };
    let Some(at) = at else { return false };
    typed.drain(..at + wanted.len());
    true
}
