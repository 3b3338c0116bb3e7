//! What to run, and how the hub is to treat it.

use std::time::Duration;

use trunkline_protocol::message::{CommandSpec, Priority, Run, TerminalSize};

use super::PATIENCE;

/// A command to be: what to run, and around what.
///
/// ```
/// # use std::time::Duration;
/// use trunkline_client::Request;
/// use trunkline_client::protocol::message::Priority;
///
/// let request = Request::argv(["cargo", "test"])
///     .cwd("/work")
///     .terminal(80, 24)
///     .priority(Priority::High)
///     .within(Duration::from_secs(60))
///     .run_for(Duration::from_secs(600));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub(super) spec: CommandSpec,
    pub(super) priority: Priority,
    pub(super) deliver_within: Option<Duration>,
    pub(super) retry: bool,
    pub(super) patience: Option<Duration>,
}

/// A time on the wire.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Request {
    /// What to run, in the protocol's own words.
    pub fn new(spec: impl Into<CommandSpec>) -> Self {
        Self {
            spec: spec.into(),
            priority: Priority::Normal,
            deliver_within: None,
            retry: false,
            patience: Some(PATIENCE),
        }
    }

    /// A program and its arguments, passed as they are, without a shell: 1 to
    /// 1,024 strings.
    pub fn argv<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self::new(Run::Argv(argv.into_iter().map(Into::into).collect()))
    }

    /// A line for the agent's shell.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new(Run::Shell(line.into()))
    }

    /// Anything else that the agent's handler understands: a prompt, say.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Run::Text(text.into()))
    }

    /// The directory to run in; the agent's own unless set.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<String>) -> Self {
        self.spec.cwd = Some(directory.into());
        self
    }

    /// Adds an environment variable; at most 256.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.spec.env.insert(name.into(), value.into());
        self
    }

    /// Runs it in a pseudo-terminal of this size, in character cells: 1 to
    /// 4,096 each, and what is beyond is brought within.
    #[must_use]
    pub fn terminal(mut self, cols: u16, rows: u16) -> Self {
        let within = |cells: u16| cells.clamp(1, 4096);
        self.spec.terminal = Some(TerminalSize { cols: within(cols), rows: within(rows) });
        self
    }

    /// Its place in the agent's queue.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// It must start within this time of being accepted, or expires; the
    /// hub's default unless set. To the millisecond.
    #[must_use]
    pub fn within(mut self, time: Duration) -> Self {
        self.deliver_within = Some(time);
        self
    }

    /// The longest it may run; no limit unless set. To the millisecond.
    #[must_use]
    pub fn run_for(mut self, time: Duration) -> Self {
        self.spec.run_for_ms = Some(millis(time));
        self
    }

    /// Lets it run again when it is not known how an attempt ended. Without
    /// this it runs at most once.
    #[must_use]
    pub fn retry(mut self) -> Self {
        self.retry = true;
        self
    }

    /// How long to wait for the hub's answer, connected or not; 30 s unless
    /// set, for ever with `None`.
    #[must_use]
    pub fn answer_within(mut self, time: Option<Duration>) -> Self {
        self.patience = time;
        self
    }
}
