//! The course of commands on their agent: given, begun, interrupted, ended,
//! settled, forgotten.

use std::time::Duration;

use rand::RngExt as _;
use trunkline_protocol::ids::{CommandId, RequestId, StreamId};
use trunkline_protocol::message::{
    AgentToHub, CommandAccepted, CommandComplete, CommandEnd, CommandExecute, CommandInterrupt,
    CommandInterrupting, CommandSettled, CommandSpec, CommandStarted, CommandStatus, ErrorCode,
    InterruptStage, Refusal, TerminalResize,
};
use trunkline_protocol::time::Now;

use super::execution::Outcome;
use super::held::{Held, Stage};
use super::tail::Tail;
use super::{AgentCore, AgentOutput, FENCES_MAX, GRACE_MARGIN, JournalRecord, Link};

/// Commands held at a time, the settled ones not counted: a hub that gives
/// more is refused. What a greeting lists stays far below what a hub reads.
const HELD_MAX: usize = 256;

/// Settled commands whose output is kept for a hub that forgets.
const SETTLED_MAX: usize = 64;

/// Memory of the output of all ended commands together.
const ENDED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long a settled command's output is kept.
const SETTLED_KEPT: Duration = Duration::from_secs(15 * 60);

/// How long after that it is looked whether the hub has it all by now.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

impl AgentCore {
    // ---- given ----------------------------------------------------------

    pub(super) fn handle_execute(&mut self, execute: CommandExecute, now: Now) {
        let CommandExecute { command, attempt, spec } = execute;
        if let Some(held) = self.commands.get_mut(&command) {
            if held.attempt == attempt {
                // Told twice, run once.
                for word in held.words(command) {
                    self.say(word);
                }
                return;
            }
            if held.attempt > attempt {
                return;
            }
            if !held.is_ended() {
                // The hub has given up on the attempt that still runs here.
                held.successor = Some((attempt, spec));
                self.fence(command, attempt);
                self.say(AgentToHub::Accepted(CommandAccepted { command, attempt }));
                self.interrupt(command, None, now);
                return;
            }
            self.remove(command);
        } else if let Some(known) = self.fences.get(&command).copied()
            && known >= attempt
        {
            if known == attempt {
                // It ran here, and a hub that forgot asks again.
                let why = "it ran here before, and how it ended is forgotten";
                self.say(complete(command, attempt, CommandStatus::Unknown, with_error(why)));
            }
            return;
        }
        let unsettled = self.commands.values().filter(|held| held.settled().is_none()).count();
        if unsettled >= HELD_MAX {
            let why = "the agent holds too many commands";
            self.say(complete(command, attempt, CommandStatus::Failed, with_error(why)));
            return;
        }
        self.fence(command, attempt);
        self.say(AgentToHub::Accepted(CommandAccepted { command, attempt }));
        self.hold(command, attempt, spec, now);
    }

    fn hold(&mut self, command: CommandId, attempt: u32, spec: CommandSpec, now: Now) {
        self.commands.insert(command, Held::new(attempt, spec));
        if self.stopping.is_some() {
            let why = "the agent is stopping";
            self.end(command, CommandStatus::Failed, with_error(why), now);
            return;
        }
        self.waiting.push_back(command);
        self.offer(now.monotonic);
    }

    /// Gives free slots to those who wait.
    fn offer(&mut self, now: Duration) {
        let slots = self.setup.slots.max(1) as usize;
        let mut active = self.commands.values().filter(|held| held.is_active()).count();
        while active < slots
            && let Some(command) = self.waiting.pop_front()
        {
            let held = self.commands.get(&command);
            if held.is_some_and(|held| held.stage == Stage::Waiting) {
                active += 1;
                self.prepare(command, now);
            }
        }
    }

    pub(super) fn fence(&mut self, command: CommandId, attempt: u32) {
        if self.fences.insert(command, attempt).is_none() {
            self.fence_order.push_back(command);
            if self.fence_order.len() > FENCES_MAX
                && let Some(oldest) = self.fence_order.pop_front()
            {
                self.fences.remove(&oldest);
            }
        }
    }

    // ---- begun ----------------------------------------------------------

    pub(super) fn begin_held(
        &mut self,
        command: CommandId,
        now: Now,
    ) -> Option<(u32, CommandSpec)> {
        let stream = StreamId::mint(now.wall_ms, self.rng.random());
        let held = self.commands.get_mut(&command)?;
        if held.stage != Stage::Offered {
            return None;
        }
        let spec = held.spec.clone()?;
        held.stage = Stage::Running;
        let mut tail = Tail::new(stream, self.setup.tail_bytes, self.setup.coalescing);
        if let Link::Up(up) = &self.link {
            tail.begin(up.limits.grant_bytes);
        }
        held.tail = Some(tail);
        let run_for = spec.run_for_ms.map(Duration::from_millis);
        held.run_until = run_for.map(|run_for| now.monotonic.saturating_add(run_for));
        let attempt = held.attempt;
        self.streams.insert(stream, command);
        self.say(AgentToHub::Started(CommandStarted { command, attempt, stream }));
        Some((attempt, spec))
    }

    pub(super) fn handle_resize(&mut self, resize: TerminalResize) {
        let Some(held) = self.commands.get_mut(&resize.command) else { return };
        if !held.is_ended() {
            held.resize = Some(resize.size);
            self.outputs.push_back(AgentOutput::Event(resize.command));
        }
    }

    // ---- interrupted ----------------------------------------------------

    pub(super) fn handle_interrupt(
        &mut self,
        id: Option<RequestId>,
        interrupt: &CommandInterrupt,
        now: Now,
    ) {
        let command = interrupt.command;
        let is_named = |held: &&Held| interrupt.attempt.is_none_or(|named| named == held.attempt);
        let Some(held) = self.commands.get(&command).filter(is_named) else {
            let refusal = Refusal::new(ErrorCode::NotFound, "no such command");
            self.refuse(id, refusal.field("payload.command"));
            return;
        };
        if held.is_ended() {
            for word in held.words(command) {
                self.say(word);
            }
            return;
        }
        let stage =
            if held.signalled { InterruptStage::Signalled } else { InterruptStage::Delivered };
        let word = interrupting(command, held.attempt, stage);
        self.say(word);
        self.interrupt(command, interrupt.grace_ms.map(Duration::from_millis), now);
    }

    fn interrupt(&mut self, command: CommandId, grace: Option<Duration>, now: Now) {
        let grace = grace.unwrap_or(self.setup.grace);
        let Some(held) = self.commands.get_mut(&command) else { return };
        match held.stage {
            Stage::Waiting | Stage::Recording { .. } | Stage::Offered => {
                // Not begun, and now never will be.
                self.end(command, CommandStatus::Interrupted, CommandEnd::default(), now);
            }
            Stage::Running => {
                held.interrupt = Some(grace);
                let kill_at = now.monotonic.saturating_add(grace).saturating_add(GRACE_MARGIN);
                held.kill_at = Some(held.kill_at.map_or(kill_at, |known| known.min(kill_at)));
                self.outputs.push_back(AgentOutput::Event(command));
            }
            Stage::Ended { .. } => {}
        }
    }

    pub(super) fn interrupt_all(&mut self, now: Now) {
        for held in self.commands.values_mut() {
            held.successor = None;
        }
        let running: Vec<CommandId> = self.running().collect();
        for command in running {
            self.interrupt(command, None, now);
        }
    }

    pub(super) fn signal_held(&mut self, command: CommandId) {
        let Some(held) = self.commands.get_mut(&command) else { return };
        if held.stage == Stage::Running && !held.signalled {
            held.signalled = true;
            let word = interrupting(command, held.attempt, InterruptStage::Signalled);
            self.say(word);
        }
    }

    /// Time passes: what ran too long is asked to end, what did not end when
    /// asked to is dropped, what was held is let go.
    pub(super) fn commands_timeout(&mut self, now: Now) {
        let mut late = Vec::new();
        let mut unrecorded = Vec::new();
        let mut killed = Vec::new();
        let hold = self.setup.tail_hold;
        for (command, held) in &mut self.commands {
            if held.run_until.is_some_and(|until| until <= now.monotonic) {
                held.run_until = None;
                // Whoever asked first is why it ends.
                held.timed_out = held.kill_at.is_none();
                late.push(*command);
            }
            if held.recorded_by().is_some_and(|until| until <= now.monotonic) {
                unrecorded.push(*command);
            }
            if held.kill_at.is_some_and(|at| at <= now.monotonic) {
                killed.push(*command);
            }
            if held.tail.as_mut().is_some_and(|tail| tail.handle_timeout(hold, now.monotonic)) {
                self.outputs.push_back(AgentOutput::Room(*command));
            }
        }
        for command in late {
            self.interrupt(command, None, now);
        }
        for command in unrecorded {
            self.fail_unrecorded(command, "it does not answer", now);
        }
        for command in killed {
            self.kill(command, now);
        }
        if self.forget_at.is_some_and(|at| at <= now.monotonic) {
            self.forget(now.monotonic);
        }
    }

    /// A handler did not end when asked to: the command ends without it.
    fn kill(&mut self, command: CommandId, now: Now) {
        let Some(held) = self.commands.get_mut(&command) else { return };
        let status =
            if held.timed_out { CommandStatus::TimedOut } else { CommandStatus::Interrupted };
        // Before whatever begins in its place.
        self.outputs.push_back(AgentOutput::Kill(command));
        let why = "it did not end when asked to, and was dropped";
        self.end(command, status, with_error(why), now);
    }

    // ---- ended ----------------------------------------------------------

    pub(super) fn end_as(&mut self, command: CommandId, outcome: Outcome, now: Now) {
        let Some(held) = self.commands.get(&command) else { return };
        let status = match (&outcome, held.timed_out, held.signalled) {
            (_, true, _) => CommandStatus::TimedOut,
            (Outcome::Interrupted, false, _) | (_, false, true) => CommandStatus::Interrupted,
            (Outcome::Failed(_), false, false) => CommandStatus::Failed,
            (Outcome::Exited(_) | Outcome::Signalled(_), false, false) => CommandStatus::Completed,
        };
        let end = match outcome {
            Outcome::Exited(code) => CommandEnd { exit_code: Some(code), ..CommandEnd::default() },
            Outcome::Signalled(number) => {
                CommandEnd { signal: Some(number), ..CommandEnd::default() }
            }
            Outcome::Failed(error) => with_error(&error),
            Outcome::Interrupted => CommandEnd::default(),
        };
        self.end(command, status, end, now);
    }

    pub(super) fn end_unknown(&mut self, command: CommandId, why: &str, now: Now) {
        self.end(command, CommandStatus::Unknown, with_error(why), now);
    }

    pub(super) fn end(
        &mut self,
        command: CommandId,
        status: CommandStatus,
        mut end: CommandEnd,
        now: Now,
    ) {
        let held = self.commands.get_mut(&command).filter(|held| !held.is_ended());
        let Some(held) = held else { return };
        if let Some(tail) = &mut held.tail {
            let (length, digest) = tail.finish();
            end.end = length;
            end.digest = Some(digest);
        }
        held.drop_events();
        held.stage = Stage::Ended { status, end: end.clone(), settled: None };
        let (attempt, successor) = (held.attempt, held.successor.take());
        self.record_end(CommandAccepted { command, attempt }, status, &end);
        self.say(complete(command, attempt, status, end));
        if let Some((attempt, spec)) = successor {
            self.remove(command);
            self.hold(command, attempt, spec, now);
        }
        self.forget(now.monotonic);
        self.offer(now.monotonic);
    }

    // ---- settled, forgotten ---------------------------------------------

    pub(super) fn handle_settled(&mut self, settled: CommandSettled, now: Now) {
        let CommandSettled { command, attempt } = settled;
        if let Some(held) = self.commands.get_mut(&command)
            && held.attempt == attempt
            && let Stage::Ended { settled, .. } = &mut held.stage
        {
            let is_news = settled.replace(settled.unwrap_or(now.monotonic)).is_none();
            if is_news {
                self.record_settled(command);
            }
            self.forget(now.monotonic);
        }
    }

    /// Drops settled commands that were kept long enough or are too many, and
    /// output beyond what all that has ended may take. What the hub was not
    /// sent of that becomes a gap, and the command is kept until it was.
    fn forget(&mut self, now: Duration) {
        let settled = self.commands.iter().filter_map(|(id, held)| {
            // The sent ones first, and of those the oldest.
            Some((!held.is_sent(), held.settled()?, *id))
        });
        let mut settled: Vec<(bool, Duration, CommandId)> = settled.collect();
        settled.sort_unstable();
        let mut count = settled.len();
        for (unsent, at, command) in settled {
            let old = at.saturating_add(SETTLED_KEPT) <= now;
            if (!unsent && (old || count > SETTLED_MAX)) || count > 2 * SETTLED_MAX {
                count -= 1;
                self.remove(command);
            } else if count > SETTLED_MAX
                && let Some(tail) = self.commands.get_mut(&command).and_then(|h| h.tail.as_mut())
            {
                // There is one place left to say that it is gone.
                tail.give_up();
            }
        }
        self.bound_ended();
        let look = self.commands.values().filter_map(|held| {
            let at = held.settled()?.saturating_add(SETTLED_KEPT);
            Some(if at <= now { now.saturating_add(LOOK_AGAIN) } else { at })
        });
        self.forget_at = look.min();
    }

    fn bound_ended(&mut self) {
        let ended = || self.commands.iter().filter(|(_, held)| held.is_ended());
        let mut bytes: usize = ended().map(|(_, held)| held.tail_cost()).sum();
        if bytes <= ENDED_BYTES_MAX {
            return;
        }
        let costly = ended().map(|(id, held)| {
            let settled = held.settled().unwrap_or(Duration::MAX);
            (!held.is_sent(), settled, *id, held.tail_cost())
        });
        let mut costly: Vec<(bool, Duration, CommandId, usize)> = costly.collect();
        costly.sort_unstable();
        for (_, _, command, cost) in costly {
            if bytes <= ENDED_BYTES_MAX {
                return;
            }
            if let Some(held) = self.commands.get_mut(&command)
                && let Some(tail) = &mut held.tail
            {
                tail.give_up();
                bytes -= cost;
            }
        }
    }

    /// Nobody needs to know any more how it ended.
    fn record_settled(&mut self, command: CommandId) {
        let Some(held) = self.commands.get(&command).filter(|held| held.is_recorded) else {
            return;
        };
        if let Some(recording) = &mut self.recording {
            let attempt = held.attempt;
            recording.push(JournalRecord::Settled(CommandSettled { command, attempt }));
        }
    }

    fn remove(&mut self, command: CommandId) {
        if self.commands.get(&command).is_some_and(|held| held.settled().is_none()) {
            // A later attempt takes its place.
            self.record_settled(command);
        }
        if let Some(tail) = self.commands.remove(&command).and_then(|held| held.tail) {
            self.streams.remove(&tail.stream());
        }
    }

    // ---- said -----------------------------------------------------------

    /// Says what has happened since the greeting was written.
    pub(super) fn tell_news(&mut self, grant_bytes: u64) {
        for held in self.commands.values_mut() {
            held.handle_ack(grant_bytes);
        }
        let news: Vec<AgentToHub> =
            self.commands.iter().flat_map(|(command, held)| held.news(*command)).collect();
        for word in news {
            self.say(word);
        }
    }
}

fn complete(
    command: CommandId,
    attempt: u32,
    status: CommandStatus,
    end: CommandEnd,
) -> AgentToHub {
    AgentToHub::Complete(CommandComplete { command, attempt, status, end })
}

fn interrupting(command: CommandId, attempt: u32, stage: InterruptStage) -> AgentToHub {
    AgentToHub::Interrupting(CommandInterrupting { command, attempt, stage })
}

pub(super) fn with_error(error: &str) -> CommandEnd {
    CommandEnd { error: Some(error.chars().take(1024).collect()), ..CommandEnd::default() }
}
