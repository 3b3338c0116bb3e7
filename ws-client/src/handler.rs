//! What runs a command: the hook of an agent.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{Channel, CommandSpec, TerminalSize};

use crate::agent::{Bells, Core};
use crate::connector::BoxFuture;
use crate::shell::Shared;

/// Runs commands.
///
/// [`run`](Self::run) is called once for every attempt that the hub gives to
/// this agent, on a task of its own; by then dashboards see it as `running`.
/// When the future is done the command has ended as the [`Outcome`] says. A
/// handler that panics has failed.
///
/// An [`Interrupt`](ExecutionEvent::Interrupt) asks it to end: signal what runs
/// and say so with [`Execution::signalled`], kill it after the grace. A handler
/// that has not ended some seconds after the grace is dropped, as it is when
/// the agent's runtime ends: dropping the future must end what it runs.
///
/// Implemented by [`Programs`](crate::Programs), and by every closure from an
/// [`Execution`] to a future of an [`Outcome`].
pub trait CommandHandler: Send + Sync + 'static {
    /// Runs one attempt to its end.
    fn run(&self, execution: Execution) -> BoxFuture<'static, Outcome>;
}

impl<F, Fut> CommandHandler for F
where
    F: Fn(Execution) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Outcome> + Send + 'static,
{
    fn run(&self, execution: Execution) -> BoxFuture<'static, Outcome> {
        Box::pin(self(execution))
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code.
    Exited(i32),
    /// A signal of this number ended it.
    Signalled(i32),
    /// It ended because it was interrupted.
    Interrupted,
    /// It could not be run: why, for people; 1,024 characters are kept.
    Failed(String),
}

/// Something for the handler to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecutionEvent {
    /// Somebody typed this. Each byte comes once, in order by its writer.
    Input(Bytes),
    /// The terminal has a new size; only the latest comes.
    Resize(TerminalSize),
    /// It is to end, and to be killed after the grace. Comes before
    /// everything else that waits, and may come again.
    Interrupt {
        /// How long it has to end by itself.
        grace: Duration,
    },
}

/// One attempt at a command.
#[derive(Debug)]
pub struct Execution {
    pub(crate) command: CommandId,
    pub(crate) attempt: u32,
    pub(crate) spec: CommandSpec,
    pub(crate) output: Output,
}

impl Execution {
    /// The command.
    pub fn command(&self) -> CommandId {
        self.command
    }

    /// Which attempt at it; 1 is the first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What to run.
    pub fn spec(&self) -> &CommandSpec {
        &self.spec
    }

    /// Where its output goes.
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// Reports that what runs was signalled: the last stage of an interrupt
    /// before the end. Makes the command end as `interrupted`.
    pub fn signalled(&self) {
        self.output.shared.with(|core, _| core.agent.signalled(self.command));
    }

    /// The next event. Taking input is what acknowledges it: who does not
    /// take any makes its writer wait.
    ///
    /// Cancel safe: an event is only taken when the future is done.
    pub async fn next_event(&mut self) -> ExecutionEvent {
        self.event(true).await
    }

    /// The next event that is no input: for a handler that has no room for
    /// more, and must hear an interrupt all the same.
    ///
    /// Cancel safe: an event is only taken when the future is done.
    pub async fn next_event_but_input(&mut self) -> ExecutionEvent {
        self.event(false).await
    }

    async fn event(&mut self, input: bool) -> ExecutionEvent {
        loop {
            let more = self.output.bells.events.notified();
            let event =
                self.output.shared.with(|core, _| core.agent.take_event(self.command, input));
            if let Some(event) = event {
                return event;
            }
            more.await;
        }
    }
}

/// The output of one attempt: bytes, in the order in which they are written.
#[derive(Clone)]
pub struct Output {
    pub(crate) command: CommandId,
    pub(crate) shared: Arc<Shared<Core>>,
    pub(crate) bells: Arc<Bells>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("command", &self.command).finish_non_exhaustive()
    }
}

impl Output {
    /// Writes all of `bytes`. Waits while the stream's tail (8 MiB) is full of
    /// what the hub has not taken, for up to 30 s; that holds a program that
    /// writes faster than the hub takes. After that the oldest bytes are given
    /// up, and dashboards see a gap there.
    ///
    /// Not cancel safe: a part may have been written. Bytes of a command that
    /// has ended are dropped.
    pub async fn write(&self, channel: Channel, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.bells.room.notified();
            let written =
                self.shared.with(|core, now| core.agent.write(self.command, channel, bytes, now));
            bytes = &bytes[written..];
            if written == 0 {
                room.await;
            }
        }
    }
}
