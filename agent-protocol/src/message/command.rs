//! Commands: what is to run, how far it is, how it ended.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bound;
use super::open::{closed_words, open_words};
use super::terminal::TerminalSize;
use crate::ids::{AgentId, CommandId, StreamId};

closed_words! {
    /// Who goes first in an agent's queue; first come first served within one.
    #[derive(Default)]
    Priority {
        /// Before everything else.
        High = "high",
        /// The default.
        #[default]
        Normal = "normal",
        /// When nothing else waits.
        Low = "low",
    }
}

closed_words! {
    /// How far a command is.
    ///
    /// ```text
    ///              ┌───────────────────────────────────────► expired
    ///              │        ┌─ (the agent never got it) ─┐
    ///              │        ▼                            │
    ///  request ─► queued ─► dispatched ─► running ─► completed
    ///              │           │            ├──────► failed
    ///              │           │            ├──────► interrupted
    ///              │           │            ├──────► timed_out
    ///              │           │            └──────► unknown
    ///              │           └─ any of the above; its start or end may be
    ///              │              heard of late
    ///              └─ interrupted, or running when an agent returns with it
    /// ```
    ///
    /// With `retry`, `dispatched` and `running` may go back to `queued`, and
    /// the next dispatch is a new attempt. The right-hand column is final: it
    /// never changes again.
    CommandStatus {
        /// Accepted, stored, waiting for its agent.
        Queued = "queued",
        /// Leased to its agent under an attempt number.
        Dispatched = "dispatched",
        /// Its program runs.
        Running = "running",
        /// It ran to an end of its own, with an exit code or by a signal.
        Completed = "completed",
        /// It could not be run.
        Failed = "failed",
        /// Somebody interrupted it, queued or running.
        Interrupted = "interrupted",
        /// It ran longer than it may.
        TimedOut = "timed_out",
        /// It was not started in time.
        Expired = "expired",
        /// It started, and whoever ran it is gone without saying how it ended.
        Unknown = "unknown",
    }
}

impl CommandStatus {
    /// Whether it never changes again.
    pub const fn is_final(self) -> bool {
        match self {
            Self::Queued | Self::Dispatched | Self::Running => false,
            Self::Completed
            | Self::Failed
            | Self::Interrupted
            | Self::TimedOut
            | Self::Expired
            | Self::Unknown => true,
        }
    }

    /// The transition table: whether `self` may become `next`.
    pub const fn may_become(self, next: Self) -> bool {
        use CommandStatus::{
            Completed, Dispatched, Expired, Failed, Interrupted, Queued, Running, TimedOut, Unknown,
        };
        match self {
            // Running: an agent came back holding a command that this hub
            // only knew as waiting. Unknown: an attempt was made, and there is
            // no time for another.
            Queued => matches!(next, Dispatched | Running | Interrupted | Expired | Unknown),
            // Queued: the agent never got it, or a retry was asked for.
            Dispatched => matches!(
                next,
                Queued | Running | Completed | Failed | Interrupted | TimedOut | Expired | Unknown
            ),
            // Queued: only with `retry`, after the process that ran it is gone.
            Running => {
                matches!(next, Queued | Completed | Failed | Interrupted | TimedOut | Unknown)
            }
            Completed | Failed | Interrupted | TimedOut | Expired | Unknown => false,
        }
    }
}

closed_words! {
    /// How far an interrupt is.
    InterruptStage {
        /// The hub has it; the agent is told when it is there.
        Accepted = "accepted",
        /// The agent has it.
        Delivered = "delivered",
        /// The process group was signalled.
        Signalled = "signalled",
    }
}

/// What to run: exactly one of the three forms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawRun", into = "RawRun")]
pub enum Run {
    /// A program and its arguments, passed as they are, without a shell.
    /// 1 to 1,024 strings without NUL; the first is the program.
    Argv(Vec<String>),
    /// A line for the agent's shell (`sh -c`).
    Shell(String),
    /// Anything else that the agent's handler understands: a prompt, say.
    Text(String),
}

#[derive(Serialize, Deserialize)]
struct RawRun {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    argv: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shell: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl TryFrom<RawRun> for Run {
    type Error = &'static str;

    fn try_from(raw: RawRun) -> Result<Self, &'static str> {
        match (raw.argv, raw.shell, raw.text) {
            (Some(argv), None, None) => {
                if argv.is_empty() || argv.len() > 1024 {
                    Err("argv: must have 1 to 1024 strings")
                } else if argv[0].is_empty() {
                    Err("argv: the program must not be empty")
                } else if argv.iter().any(|arg| arg.contains('\0')) {
                    Err("argv: must not contain NUL")
                } else {
                    Ok(Self::Argv(argv))
                }
            }
            (None, Some(line), None) if line.contains('\0') => Err("shell: must not contain NUL"),
            (None, Some(line), None) => Ok(Self::Shell(line)),
            (None, None, Some(text)) => Ok(Self::Text(text)),
            _ => Err("exactly one of argv, shell and text is required"),
        }
    }
}

impl From<Run> for RawRun {
    fn from(run: Run) -> Self {
        let none = Self { argv: None, shell: None, text: None };
        match run {
            Run::Argv(argv) => Self { argv: Some(argv), ..none },
            Run::Shell(line) => Self { shell: Some(line), ..none },
            Run::Text(text) => Self { text: Some(text), ..none },
        }
    }
}

impl Run {
    /// One line for people: at most 200 characters, control characters
    /// replaced.
    pub fn title(&self) -> String {
        let (mut title, mut left) = (String::new(), 200_usize);
        let mut push = |text: &str| {
            for c in text.chars().take(left) {
                title.push(if c.is_control() { '\u{b7}' } else { c });
                left -= 1;
            }
        };
        match self {
            Self::Argv(argv) => {
                for (i, arg) in argv.iter().take(200).enumerate() {
                    if i > 0 {
                        push(" ");
                    }
                    push(arg);
                }
            }
            Self::Shell(text) | Self::Text(text) => push(text),
        }
        title
    }
}

/// What to run and around what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandSpec {
    /// What to run.
    pub run: Run,
    /// Directory to run in, not empty and without NUL; the agent's own by
    /// default.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "bound::cwd")]
    pub cwd: Option<String>,
    /// Environment variables to add. At most 256, without NUL; a name is not
    /// empty and has no `=`.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "bound::env::<256, _>"
    )]
    pub env: BTreeMap<String, String>,
    /// Run in a pseudo-terminal of this size; without one, with pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// Longest it may run, in milliseconds; no limit by default. Kept by the
    /// agent; by the hub for agents that vanished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_for_ms: Option<u64>,
}

impl From<Run> for CommandSpec {
    fn from(run: Run) -> Self {
        Self { run, cwd: None, env: BTreeMap::new(), terminal: None, run_for_ms: None }
    }
}

/// `command:request`: run this. Answered with `ok` once it is stored, or with
/// `error`. The same id again is the same request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRequest {
    /// Minted by the requester.
    pub command: CommandId,
    /// Who is to run it.
    pub agent: AgentId,
    /// What.
    pub spec: CommandSpec,
    /// Its place in the queue.
    #[serde(default)]
    pub priority: Priority,
    /// It must be started within this many milliseconds of being accepted,
    /// or expires; the hub's default otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deliver_within_ms: Option<u64>,
    /// Whether it may run again when it is not known how an attempt ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retry: bool,
}

/// `command:interrupt`, to the hub and on to the agent. Works in every state
/// and may be repeated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInterrupt {
    /// Which command.
    pub command: CommandId,
    /// Which attempt; set by the hub towards the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// How long the program has to end by itself before it is killed, in
    /// milliseconds; the agent's default otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// `system:emergency-stop`: interrupt everything, queued and running.
/// Answered with the number of commands it reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmergencyStop {
    /// Only these agents; all of the tenant's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<Vec<AgentId>>,
}

/// `command:execute`: the hub leases a command to its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandExecute {
    /// Which command.
    pub command: CommandId,
    /// The attempt: a fencing number, carried by every later word about it.
    /// The lease it names lasts until the command is settled or a higher
    /// attempt is given out; it does not run out by time.
    pub attempt: u32,
    /// What to run.
    pub spec: CommandSpec,
}

/// `command:accepted`: the agent holds the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandAccepted {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
}

/// `command:started`: its program runs and writes to `stream`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandStarted {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// Where its output goes.
    pub stream: StreamId,
}

/// `command:interrupting`: how far the agent is with an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInterrupting {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// `delivered` or `signalled`.
    pub stage: InterruptStage,
}

/// How a command ended, in the agent's words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// Exit code, if it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Signal number, if a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Why it could not be run, for people. At most 1,024 characters; a
    /// longer text is cut when it is sent.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::text::<1024, _>",
        serialize_with = "bound::cut_text::<1024, _>"
    )]
    pub error: Option<String>,
    /// The stream's final length in bytes: nobody is done before having read
    /// up to here or having been told of a gap.
    #[serde(default, deserialize_with = "bound::offset")]
    pub end: u64,
    /// `sha256:` and 64 hex digits over all bytes of the stream, so that a
    /// reader without gaps can audit itself. At most 128 characters.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::line::<128, _>"
    )]
    pub digest: Option<String>,
}

/// `command:complete` from the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandComplete {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// `completed`, `failed`, `interrupted`, `timed_out` or `unknown`; never a
    /// status that is not final.
    #[serde(deserialize_with = "bound::final_status")]
    pub status: CommandStatus,
    /// How.
    pub end: CommandEnd,
}

/// `command:settled`: the hub has stored how the attempt ended; the agent may
/// forget it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandSettled {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
}

/// A command that a returning agent still holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldCommand {
    /// Which command.
    pub command: CommandId,
    /// Which attempt.
    pub attempt: u32,
    /// How far it is: `dispatched` (accepted, not started), `running`, or
    /// the final status.
    pub status: CommandStatus,
    /// What was to run, so that a hub that lost its memory knows it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<CommandSpec>,
    /// Its output, once started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<HeldStream>,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<CommandEnd>,
}

/// What a returning agent still has of a stream: `from` inclusive, `to`
/// exclusive, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawHeldStream")]
pub struct HeldStream {
    /// Which stream.
    pub stream: StreamId,
    /// The oldest byte it has.
    pub from: u64,
    /// Its length so far; not below `from`.
    pub to: u64,
}

#[derive(Deserialize)]
struct RawHeldStream {
    stream: StreamId,
    #[serde(deserialize_with = "bound::offset")]
    from: u64,
    #[serde(deserialize_with = "bound::offset")]
    to: u64,
}

impl TryFrom<RawHeldStream> for HeldStream {
    type Error = &'static str;

    fn try_from(raw: RawHeldStream) -> Result<Self, &'static str> {
        if raw.to < raw.from {
            return Err("to: must not be below from");
        }
        Ok(Self { stream: raw.stream, from: raw.from, to: raw.to })
    }
}

open_words! {
    /// What `agent:control` asks for.
    ControlAction {
        /// Send an `agent:status` now.
        Report = "report",
        /// Say goodbye and do not come back; running commands are interrupted.
        Stop = "stop",
    }
}

/// `agent:control`: an administrator's word to the agent itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentControl {
    /// What to do. An agent answers an action it does not know with `error`.
    pub action: ControlAction,
}
