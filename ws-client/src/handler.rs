//! What runs a command: the hook of an agent.

use std::future::Future;
use std::sync::Arc;

use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{Channel, CommandSpec};
use trunkline_protocol::time::Now;

use crate::agent::{Bells, Core};
use crate::connector::BoxFuture;
use crate::core::agent::AgentCore;
pub use crate::core::agent::{ExecutionEvent, Outcome};
use crate::shell::Shared;

/// Runs commands.
///
/// [`run`](Self::run) is called once for every attempt that the hub gives to
/// this agent, on a task of its own, as soon as one of the agent's slots is
/// free. The command counts as `running` from then on, before its first
/// output. When the future is done the command has ended as the [`Outcome`]
/// says.
///
/// An [`Interrupt`](ExecutionEvent::Interrupt) asks it to end: signal what runs
/// and say so with [`Execution::signalled`], kill it after the grace. A handler
/// that has not ended five seconds after the grace is dropped, and its command
/// ends without it. It is dropped, too, when the hub does not want the agent
/// back, and when the runtime ends. So dropping the future must end what it
/// runs.
///
/// A handler that panics leaves its command `unknown`: something ran, and
/// nobody can tell how that ended.
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
        self.output.with(|agent, _| agent.signalled(self.command));
    }

    /// The next event: an interrupt before a new size, and that before input.
    /// Taking input is what acknowledges it: who takes none makes its writers
    /// wait, after 1 MiB. Once the command has ended there is no next event,
    /// and this waits for ever.
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
            let event = self.output.with(|agent, _| agent.take_event(self.command, input));
            if let Some(event) = event.flatten() {
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
    /// Tells the agent something, as long as this is the attempt that runs:
    /// what is left of a dropped one has no say in the next.
    fn with<T>(&self, tell: impl FnOnce(&mut AgentCore, Now) -> T) -> Option<T> {
        self.shared.with(|core, now| {
            core.is_running(self.command, &self.bells).then(|| tell(&mut core.agent, now))
        })
    }

    /// Writes all of `bytes`. Waits while they do not fit into the stream's tail
    /// (8 MiB) beside what the hub has not taken and, in up to half of it, what
    /// it took last. That holds a program that writes faster than the hub takes,
    /// for up to 30 s; after that the oldest bytes are given up, and dashboards
    /// see a gap there.
    ///
    /// Not cancel safe: a part may have been written. Bytes of a command that
    /// has ended are dropped.
    pub async fn write(&self, channel: Channel, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.bells.room.notified();
            let written = self.with(|agent, now| agent.write(self.command, channel, bytes, now));
            let Some(written) = written else { return };
            bytes = &bytes[written..];
            if written == 0 {
                room.await;
            }
        }
    }
}
