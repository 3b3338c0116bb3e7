//! Commands: from the request to an end that is stored.
//!
//! A command is moved by what is *known* of it. Every input writes down what
//! it knows (an interrupt was asked for, an agent told of an end) and calls
//! [`Tenant::advance`], which starts the next write to the queue if none is
//! under way; when that is done it is called again. So a slow queue delays,
//! and never confuses.
//!
//! ```text
//!   Accepting ──stored──► Queued ──slot──► Leasing ──stored──► Dispatched
//!                           │  ▲             │ (agent gone)        │ started
//!                           │  └─────────────┘                  Running
//!                           └────────── ending, stored ──────► Final ◄┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trunkline_protocol::ids::{
    AgentId, CommandId, DashboardId, InstanceId, RequestId, StreamId, TenantId,
};
use trunkline_protocol::limits::HELD_MAX;
use trunkline_protocol::message::{
    Accepted, CommandComplete, CommandEnd, CommandExecute, CommandInterrupt, CommandInterrupting,
    CommandRequest, CommandSettled, CommandSpec, CommandStarted, CommandState, CommandStatus,
    EmergencyStop, ErrorCode, HeldCommand, HeldStream, HubToAgent, InterruptStage, Peer, Priority,
    Refusal, Run, TerminalResize, TerminalSize,
};

use super::agents::Agent;
use super::deadlines::Due;
use super::link::LinkId;
use super::tenant::Tenant;
use super::wires::{Effect, Wires};
use crate::hooks::{Hook, Identity, QueueChange, QueueError, StoredCommand, What, Who};

/// Streams of one command that are taken from an agent's list, one for each
/// attempt.
const STREAMS_MAX: usize = 64;

/// Memory of a command beyond its `spec`: what is shown of it, and its places in
/// maps and lists.
const COMMAND_BYTES: usize = 1024;

/// How long after a failed write to the queue it is tried again.
const STORE_RETRY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Command {
    pub(super) request: CommandRequest,
    requested_by: Option<DashboardId>,
    requested_at_ms: u64,
    pub(super) order: u64,
    /// Its memory.
    cost: usize,
    stage: Stage,
    /// The latest that was sent to an agent; 0 before the first.
    pub(super) attempt: u32,
    /// The process that holds the lease.
    instance: Option<InstanceId>,
    /// The output of each attempt.
    pub(super) streams: Vec<(u32, StreamId)>,
    started_at_ms: Option<u64>,
    /// When it must have started.
    deliver_by: Duration,
    interrupt: Option<Interrupt>,
    /// How it ends, as soon as that is stored.
    ending: Option<Ending>,
    /// The write to the queue that is under way.
    storing: Option<Storing>,
    /// What the queue is yet to hear before anything else.
    adopted: Option<Adopted>,
    /// Requests to answer once it is stored.
    waiting: Vec<(DashboardId, Option<RequestId>)>,
    /// What an agent that returned over some link says of it, to be looked at
    /// when what is being stored is.
    claim: Option<Box<(LinkId, InstanceId, HeldCommand)>>,
    /// How far each writer's input is known to have got.
    pub(super) writers: BTreeMap<DashboardId, u64>,
    /// The terminal's size as last asked for.
    pub(super) size: Option<TerminalSize>,
    /// Its output was here, and has had to go.
    pub(super) is_dropped: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Accepting,
    Queued,
    Leasing,
    Dispatched,
    Running,
    Final,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storing {
    Accept,
    Adopt(Adopted),
    Lease,
    Settle,
}

/// What an agent told of a command, and the queue does not have: until it has,
/// it could not keep how the command ends, and nobody is shown what the next
/// hub may not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Adopted {
    /// That this attempt of it is under way, at this process.
    Lease,
    /// All of it.
    Whole,
}

#[derive(Debug)]
struct Interrupt {
    stage: InterruptStage,
    grace_ms: Option<u64>,
}

#[derive(Debug, Clone)]
struct Ending {
    status: CommandStatus,
    at_ms: u64,
    end: CommandEnd,
}

impl Command {
    fn status(&self) -> CommandStatus {
        match (self.stage, &self.ending) {
            (Stage::Accepting | Stage::Queued | Stage::Leasing, _) => CommandStatus::Queued,
            (Stage::Dispatched, _) => CommandStatus::Dispatched,
            (Stage::Running, _) => CommandStatus::Running,
            (Stage::Final, Some(ending)) => ending.status,
            // A final command has its ending; without one nothing is known.
            (Stage::Final, None) => CommandStatus::Unknown,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.stage == Stage::Running
    }

    pub(super) fn is_final(&self) -> bool {
        self.stage == Stage::Final
    }

    /// The output of the latest attempt.
    pub(super) fn stream(&self) -> Option<StreamId> {
        self.streams.iter().rfind(|(attempt, _)| *attempt == self.attempt).map(|(_, id)| *id)
    }

    /// The final length of its output, as soon as its end is known.
    pub(super) fn end(&self) -> Option<u64> {
        self.ending.as_ref().map(|ending| ending.end.end)
    }

    fn state(&self) -> CommandState {
        let ending = self.ending.as_ref().filter(|_| self.is_final());
        CommandState {
            command: self.request.command,
            agent: self.request.agent.clone(),
            status: self.status(),
            attempt: self.attempt,
            title: self.request.spec.run.title(),
            priority: self.request.priority,
            requested_by: self.requested_by.clone(),
            requested_at_ms: self.requested_at_ms,
            started_at_ms: self.started_at_ms,
            ended_at_ms: ending.map(|ending| ending.at_ms),
            stream: self.stream(),
            interrupt: self.interrupt.as_ref().map(|interrupt| interrupt.stage),
            end: ending.map(|ending| ending.end.clone()),
        }
    }

    fn stored(&self, tenant: &TenantId) -> StoredCommand {
        StoredCommand {
            tenant: tenant.clone(),
            request: self.request.clone(),
            requested_by: self.requested_by.clone(),
            requested_at_ms: self.requested_at_ms,
            order: self.order,
            status: match self.stage {
                Stage::Accepting | Stage::Queued | Stage::Leasing => CommandStatus::Queued,
                Stage::Dispatched | Stage::Running | Stage::Final => CommandStatus::Dispatched,
            },
            attempt: self.attempt,
            instance: self.instance,
            stream: self.stream(),
            ended_at_ms: None,
            end: None,
        }
    }

    fn adoption(&self, tenant: &TenantId, adopted: Adopted) -> QueueChange {
        match (adopted, self.instance) {
            (Adopted::Lease, Some(instance)) => QueueChange::Leased {
                tenant: tenant.clone(),
                command: self.request.command,
                attempt: self.attempt,
                instance,
            },
            (Adopted::Whole | Adopted::Lease, _) => {
                QueueChange::Accepted(Box::new(self.stored(tenant)))
            }
        }
    }

    /// The queue has been told everything, and has answered.
    fn is_stored(&self) -> bool {
        self.storing.is_none() && self.adopted.is_none()
    }

    /// The queue does not have what an agent told.
    fn is_being_adopted(&self) -> bool {
        self.adopted.is_some() || matches!(self.storing, Some(Storing::Adopt(_)))
    }

    /// Notes that the stream is the output of an attempt, if it may be: an
    /// attempt has one, and the attempts that are remembered are few.
    pub(super) fn note_stream(&mut self, attempt: u32, stream: StreamId) -> bool {
        if self.streams.iter().any(|(_, known)| *known == stream) {
            return true;
        }
        let may = self.streams.len() < STREAMS_MAX
            && self.streams.iter().all(|(known, _)| *known != attempt);
        if may {
            self.streams.push((attempt, stream));
        }
        may
    }

    /// The number of the attempt that is being leased. One that was stored
    /// and never sent is used again: nobody can speak about it.
    fn next_attempt(&self) -> u32 {
        // An agent may have claimed any number for an attempt of its own.
        self.attempt.saturating_add(1)
    }

    /// Whether another process was given this attempt.
    fn is_anothers(&self, instance: InstanceId, attempt: u32) -> bool {
        matches!(self.stage, Stage::Dispatched | Stage::Running)
            && self.attempt == attempt
            && !self.is_with(instance)
    }

    /// Whether this process has it, as far as is known.
    pub(super) fn is_with(&self, instance: InstanceId) -> bool {
        self.instance.is_none_or(|known| known == instance)
    }

    fn key(&self) -> (Priority, u64) {
        (self.request.priority, self.order)
    }
}

/// What becomes of a command that is not given out any more: if attempts were
/// made, one of them may have run, or may yet.
fn unless_tried(attempts: u32, status: CommandStatus) -> CommandStatus {
    if attempts > 0 { CommandStatus::Unknown } else { status }
}

pub(super) fn no_such_command() -> Refusal {
    Refusal::new(ErrorCode::NotFound, "no such command")
}

impl Tenant {
    // ---- requests -------------------------------------------------------

    /// A dashboard asks for a command. Answered once it is stored.
    pub(super) fn request_command(
        &mut self,
        wires: &mut Wires,
        from: &DashboardId,
        id: Option<RequestId>,
        request: CommandRequest,
    ) -> Result<(), Refusal> {
        if wires.draining {
            return Err(Refusal::new(ErrorCode::Draining, "the hub is closing"));
        }
        if let Some(known) = self.commands.get_mut(&request.command) {
            if known.request != request {
                let message = "another command has this id";
                return Err(Refusal::new(ErrorCode::Conflict, message).field("payload.command"));
            }
            if known.stage == Stage::Accepting {
                let waiter = (from.clone(), id);
                if !known.waiting.contains(&waiter) {
                    if known.waiting.len() >= wires.limits.answers_max {
                        let message = "too many requests for one command";
                        return Err(Refusal::new(ErrorCode::LimitReached, message));
                    }
                    known.waiting.push(waiter);
                }
                return Ok(());
            }
            let accepted = Accepted { command: Some(request.command), ..Accepted::default() };
            self.answer_ok(wires, from, id, accepted);
            return Ok(());
        }
        let cost = COMMAND_BYTES + check_spec(&request, wires)?;
        let full = self.agents.len() >= wires.limits.agents_max;
        let waiting = match self.agents.get(&request.agent) {
            Some(agent) => agent.queue.len() + agent.accepting,
            None if full => {
                return Err(Refusal::new(ErrorCode::LimitReached, "too many agents"));
            }
            None => 0,
        };
        if waiting >= wires.limits.queue_per_agent {
            return Err(Refusal::new(ErrorCode::QueueFull, "the agent's queue is full"));
        }
        if !self.make_room(wires, cost) {
            return Err(Refusal::new(ErrorCode::QueueFull, "the tenant's queues are full"));
        }
        self.agents.entry(request.agent.clone()).or_default().accepting += 1;
        self.forget_agent_later(wires, &request.agent);
        let within = request.deliver_within_ms.map(Duration::from_millis);
        let within = within.unwrap_or(wires.limits.deliver_within);
        let command = Command {
            requested_by: Some(from.clone()),
            requested_at_ms: wires.now.wall_ms,
            order: self.next_order(),
            cost,
            stage: Stage::Accepting,
            attempt: 0,
            instance: None,
            streams: Vec::new(),
            started_at_ms: None,
            deliver_by: wires.now.monotonic.saturating_add(within),
            interrupt: None,
            ending: None,
            storing: Some(Storing::Accept),
            adopted: None,
            waiting: vec![(from.clone(), id)],
            claim: None,
            writers: BTreeMap::new(),
            size: None,
            is_dropped: false,
            request,
        };
        let change = QueueChange::Accepted(Box::new(command.stored(&self.id)));
        self.store(wires, command.request.command, change);
        self.command_bytes += cost;
        self.commands.insert(command.request.command, command);
        Ok(())
    }

    /// Forgets finished commands until there is room for another one of this
    /// size. Whether there is.
    fn make_room(&mut self, wires: &mut Wires, cost: usize) -> bool {
        let max = wires.limits.command_bytes_per_tenant;
        while self.command_bytes + cost > max
            && let Some((_, oldest)) = self.finished.first().copied()
        {
            self.forget_command(wires, oldest);
        }
        self.command_bytes + cost <= max
    }

    /// Drops output of finished commands until there is room for this many
    /// streams. Whether there is.
    pub(super) fn make_room_for_streams(&mut self, wires: &mut Wires, streams: usize) -> bool {
        let max = wires.limits.streams_per_tenant;
        let streams = streams + self.starting.len();
        while self.streams.len() + streams > max
            && let Some((_, oldest)) = self.readable.first().copied()
        {
            self.drop_output(wires, oldest);
        }
        self.streams.len() + streams <= max
    }

    /// Whether there is room for what an agent holds and this hub does not know.
    pub(super) fn has_room_for(&mut self, wires: &mut Wires, held: &[HeldCommand]) -> bool {
        let unknown = held.iter().filter(|held| !self.commands.contains_key(&held.command));
        let cost =
            |held: &HeldCommand| held.spec.as_ref().map(|spec| COMMAND_BYTES + spec_bytes(spec));
        let bytes = unknown.filter_map(cost).sum();
        bytes == 0 || self.make_room(wires, bytes)
    }

    fn next_order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    /// Interrupts a command in whatever state it is.
    pub(super) fn interrupt_command(
        &mut self,
        wires: &mut Wires,
        interrupt: &CommandInterrupt,
    ) -> Result<(), Refusal> {
        let id = interrupt.command;
        let command = self.commands.get_mut(&id).ok_or_else(no_such_command)?;
        if command.ending.is_some() {
            return Ok(());
        }
        let known = command.interrupt.get_or_insert(Interrupt {
            stage: InterruptStage::Accepted,
            grace_ms: interrupt.grace_ms,
        });
        if interrupt.grace_ms.is_some() {
            known.grace_ms = interrupt.grace_ms;
        }
        match command.stage {
            Stage::Accepting | Stage::Queued | Stage::Leasing => {
                let status = unless_tried(command.attempt, CommandStatus::Interrupted);
                self.end_command(wires, id, status, None);
            }
            Stage::Dispatched | Stage::Running => {
                self.send_interrupt(wires, id);
                self.publish_command(wires, id);
            }
            Stage::Final => {}
        }
        Ok(())
    }

    /// Interrupts everything; how many commands that were.
    pub(super) fn stop_all(
        &mut self,
        wires: &mut Wires,
        who: &Identity,
        stop: &EmergencyStop,
    ) -> u32 {
        let hit = |command: &Command| {
            command.ending.is_none() && self.is_stopped(wires, who, stop, command)
        };
        let hits = self.commands.iter().filter(|(_, command)| hit(command));
        let all: BTreeSet<CommandId> = hits.map(|(id, _)| *id).collect();
        for command in &all {
            let interrupt = CommandInterrupt { command: *command, attempt: None, grace_ms: None };
            // It was in the table a moment ago: there is nothing to refuse.
            let _ = self.interrupt_command(wires, &interrupt);
        }
        u32::try_from(all.len()).unwrap_or(u32::MAX)
    }

    fn send_interrupt(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get(&id) else { return };
        let Some(interrupt) = &command.interrupt else { return };
        let Some(link) = self.agents.get(&command.request.agent).and_then(Agent::link) else {
            return; // said again when the agent is back
        };
        let message = CommandInterrupt {
            command: id,
            attempt: Some(command.attempt),
            grace_ms: interrupt.grace_ms,
        };
        wires.send(link, HubToAgent::Interrupt(message));
    }

    // ---- dispatch -------------------------------------------------------

    /// Leases what waits to an agent that has free slots.
    pub(super) fn dispatch(&mut self, wires: &mut Wires, id: &AgentId) {
        if wires.draining {
            return;
        }
        let mut changed = false;
        while let Some(agent) = self.agents.get_mut(id) {
            if !agent.has_free_slot() || agent.queue.is_empty() {
                break;
            }
            if !self.make_room_for_streams(wires, 1) {
                // What frees some need not be about this agent.
                wires.in_time(Due::Dispatch(self.id.clone(), id.clone()), STORE_RETRY);
                break;
            }
            let Some(agent) = self.agents.get_mut(id) else { break };
            let Some(instance) = agent.seen.as_ref().map(|seen| seen.instance) else { break };
            // Of one command one change at a time is stored: one that is being
            // stored as it was comes when that is done.
            let commands = &self.commands;
            let is_free = |id: &CommandId| commands.get(id).is_none_or(Command::is_stored);
            let next = agent.queue.iter().find(|(_, id)| is_free(id));
            let Some((key, next)) = next.map(|(key, id)| (*key, *id)) else { break };
            agent.queue.remove(&key);
            self.waiting.remove(&(key.1, next));
            let Some(command) = self.commands.get_mut(&next) else { continue };
            changed = true;
            agent.held.insert(next);
            self.starting.insert(next);
            command.stage = Stage::Leasing;
            command.instance = Some(instance);
            command.storing = Some(Storing::Lease);
            let attempt = command.next_attempt();
            let tenant = self.id.clone();
            let change = QueueChange::Leased { tenant, command: next, attempt, instance };
            self.store(wires, next, change);
        }
        if changed {
            self.publish_queue(wires, id);
            self.publish_agent(wires, id);
        }
    }

    fn requeue(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        command.stage = Stage::Queued;
        let agent_id = command.request.agent.clone();
        let agent = self.agents.entry(agent_id.clone()).or_default();
        agent.held.remove(&id);
        self.starting.remove(&id);
        agent.queue.insert(command.key(), id);
        self.waiting.insert((command.order, id));
        let at = command.deliver_by;
        wires.deadlines.set(Due::DeliverBy(self.id.clone(), id), at);
        self.publish_queue(wires, &agent_id);
        self.publish_command(wires, id);
        self.publish_agent(wires, &agent_id);
    }

    fn send_execute(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get(&id) else { return };
        let Some(link) = self.agents.get(&command.request.agent).and_then(Agent::link) else {
            return;
        };
        let execute = CommandExecute {
            command: id,
            attempt: command.attempt,
            spec: command.request.spec.clone(),
        };
        wires.send(link, HubToAgent::Execute(execute));
    }

    // ---- storing --------------------------------------------------------

    fn store(&mut self, wires: &mut Wires, command: CommandId, change: QueueChange) {
        wires.effects.push_back(Effect::Store { tenant: self.id.clone(), command, change });
    }

    /// A write to the queue is done.
    pub(super) fn handle_stored(
        &mut self,
        wires: &mut Wires,
        id: CommandId,
        result: &Result<(), QueueError>,
    ) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        let Some(storing) = command.storing.take() else { return };
        if let Err(error) = result {
            wires.observe_failure(Hook::Queue, error.to_string());
        }
        if storing == Storing::Accept
            && let Some(agent) = self.agents.get_mut(&command.request.agent)
        {
            agent.accepting = agent.accepting.saturating_sub(1);
        }
        match (storing, result.is_ok()) {
            (Storing::Accept, true) => self.accepted(wires, id),
            (Storing::Accept, false) => {
                // The requester hears that nothing was accepted; should the
                // queue have kept it after all, it is told to forget it.
                let Some(command) = self.commands.remove(&id) else { return };
                self.command_bytes -= command.cost;
                let tenant = self.id.clone();
                wires
                    .effects
                    .push_back(Effect::Forget(QueueChange::Forgotten { tenant, command: id }));
                self.observe_request(wires, &command, Err(ErrorCode::QueueUnavailable));
                for (dashboard, request) in command.waiting {
                    let refusal =
                        Refusal::new(ErrorCode::QueueUnavailable, "the queue did not store it");
                    self.answer_error(wires, &dashboard, request, refusal);
                }
            }
            (Storing::Adopt(_), true) => {
                let agent = command.request.agent.clone();
                self.publish_command(wires, id);
                self.advance(wires, id);
                self.dispatch(wires, &agent);
            }
            (Storing::Adopt(adopted), false) => {
                command.adopted = command.adopted.max(Some(adopted));
                wires.in_time(Due::Store(self.id.clone(), id), STORE_RETRY);
            }
            (Storing::Settle, false) => {
                wires.in_time(Due::Store(self.id.clone(), id), STORE_RETRY);
            }
            (Storing::Lease, true) => self.leased(wires, id),
            (Storing::Lease, false) => {
                if command.ending.is_some() {
                    self.advance(wires, id);
                } else {
                    let agent = command.request.agent.clone();
                    self.requeue(wires, id);
                    wires.in_time(Due::Dispatch(self.id.clone(), agent), STORE_RETRY);
                }
                self.hear_claim(wires, id);
            }
            (Storing::Settle, true) => self.settled(wires, id),
        }
    }

    /// Starts the write that is due, if none is under way.
    pub(super) fn advance(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        if command.storing.is_some() || command.stage == Stage::Final {
            return;
        }
        let (storing, change) = if let Some(adopted) = command.adopted.take() {
            (Storing::Adopt(adopted), command.adoption(&self.id, adopted))
        } else if let Some(ending) = command.ending.clone() {
            let settled = QueueChange::Settled {
                tenant: self.id.clone(),
                command: id,
                attempt: command.attempt,
                status: ending.status,
                ended_at_ms: ending.at_ms,
                stream: command.stream(),
                end: ending.end,
            };
            (Storing::Settle, settled)
        } else {
            return;
        };
        command.storing = Some(storing);
        self.store(wires, id, change);
    }

    fn accepted(&mut self, wires: &mut Wires, id: CommandId) {
        if let Some(command) = self.commands.get(&id) {
            self.observe_request(wires, command, Ok(()));
        }
        let Some(command) = self.commands.get_mut(&id) else { return };
        let waiting = std::mem::take(&mut command.waiting);
        let agent = command.request.agent.clone();
        if command.ending.is_none() {
            self.requeue(wires, id);
        } else {
            command.stage = Stage::Queued;
            self.publish_command(wires, id);
        }
        for (dashboard, request) in waiting {
            let accepted = Accepted { command: Some(id), ..Accepted::default() };
            self.answer_ok(wires, &dashboard, request, accepted);
        }
        self.hear_claim(wires, id);
        self.advance(wires, id);
        self.dispatch(wires, &agent);
    }

    fn leased(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        let agent_id = command.request.agent.clone();
        let here = self.agents.get(&agent_id).filter(|agent| agent.link().is_some());
        let same = here.and_then(|a| a.seen.as_ref()).map(|seen| seen.instance) == command.instance;
        if command.ending.is_some() {
            self.advance(wires, id);
        } else if wires.now.monotonic >= command.deliver_by {
            let status = unless_tried(command.attempt, CommandStatus::Expired);
            self.end_command(wires, id, status, None);
        } else if same {
            command.stage = Stage::Dispatched;
            command.attempt = command.next_attempt();
            wires.deadlines.cancel(&Due::DeliverBy(self.id.clone(), id));
            self.send_execute(wires, id);
            self.publish_command(wires, id);
        } else {
            // It was never sent, so nobody has it.
            self.requeue(wires, id);
        }
        self.hear_claim(wires, id);
        self.dispatch(wires, &agent_id);
    }

    fn settled(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        command.stage = Stage::Final;
        let writers = std::mem::take(&mut command.writers);
        let agent_id = command.request.agent.clone();
        let (attempt, order) = (command.attempt, command.order);
        for due in [Due::DeliverBy, Due::RunFor, Due::Store] {
            wires.deadlines.cancel(&due(self.id.clone(), id));
        }
        self.observe_end(wires, id, writers);
        let retention = wires.limits.log_retention;
        wires.in_time(Due::LogRetention(self.id.clone(), id), retention);
        let agent = self.agents.entry(agent_id.clone()).or_default();
        agent.queue.retain(|_, queued| *queued != id);
        self.waiting.remove(&(order, id));
        self.starting.remove(&id);
        self.finished.insert((order, id));
        self.readable.insert((order, id));
        agent.held.remove(&id);
        agent.relearnt.remove(&id);
        agent.finished.push_back(id);
        let too_many = agent.finished.len() > wires.limits.finished_per_agent;
        let oldest = if too_many { agent.finished.front().copied() } else { None };
        if let Some(link) = agent.link()
            && attempt > 0
        {
            wires.send(link, HubToAgent::Settled(CommandSettled { command: id, attempt }));
        }
        self.publish_queue(wires, &agent_id);
        self.publish_command(wires, id);
        self.publish_agent(wires, &agent_id);
        if let Some(oldest) = oldest {
            self.forget_command(wires, oldest);
        }
        // An agent that came back may have brought more than may stay.
        self.make_room_for_streams(wires, 0);
        self.dispatch(wires, &agent_id);
    }

    /// Writes down how a command ends; final once stored. The first word on
    /// it counts.
    pub(super) fn end_command(
        &mut self,
        wires: &mut Wires,
        id: CommandId,
        status: CommandStatus,
        end: Option<CommandEnd>,
    ) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        if command.ending.is_some() || !command.status().may_become(status) {
            return;
        }
        let log_end = || command.stream().and_then(|stream| self.streams.get(&stream));
        let mut end = end.unwrap_or_default();
        // Nobody may tell how long the output is, as one who only knows from a
        // journal that it began: what is here is of it.
        end.end = end.end.max(log_end().map_or(0, |stream| stream.log.end()));
        command.ending = Some(Ending { status, at_ms: wires.now.wall_ms, end });
        let agent = command.request.agent.clone();
        let queued = command.stage == Stage::Queued;
        if queued {
            let key = command.key();
            self.waiting.remove(&(key.1, id));
            if let Some(agent) = self.agents.get_mut(&agent) {
                agent.queue.remove(&key);
            }
            self.publish_queue(wires, &agent);
        }
        self.advance(wires, id);
    }

    /// A finished command is no longer listed, and its output is dropped.
    pub(super) fn forget_command(&mut self, wires: &mut Wires, id: CommandId) {
        self.drop_output(wires, id);
        let Some(command) = self.commands.remove(&id) else { return };
        self.command_bytes -= command.cost;
        self.finished.remove(&(command.order, id));
        if let Some(agent) = self.agents.get_mut(&command.request.agent) {
            agent.finished.retain(|finished| *finished != id);
        }
        wires.deadlines.cancel(&Due::LogRetention(self.id.clone(), id));
        let tenant = self.id.clone();
        wires.effects.push_back(Effect::Forget(QueueChange::Forgotten { tenant, command: id }));
        self.ledger.remove_command(id);
        self.wake_followers(wires);
    }

    /// Lists the command as it now is. What is not stored yet is not listed,
    /// and neither is a command that has ended while this hub did not know of
    /// it: nobody is to see it run again.
    pub(super) fn publish_command(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get(&id) else { return };
        let agent = self.agents.get(&command.request.agent);
        let is_relearnt = agent.is_some_and(|agent| agent.relearnt.contains(&id));
        let is_stored = command.stage != Stage::Accepting && !command.is_being_adopted();
        if is_stored && !is_relearnt {
            self.ledger.set_command(command.state());
            self.wake_followers(wires);
        }
    }

    // ---- observing ------------------------------------------------------

    /// When the first was asked for that still waits, in milliseconds since the
    /// epoch.
    pub(super) fn first_waiting_ms(&self) -> Option<u64> {
        let (_, id) = self.waiting.first()?;
        self.commands.get(id).map(|command| command.requested_at_ms)
    }

    /// A dashboard, as it was when it was last here.
    fn requester(&self, id: &DashboardId) -> (Option<LinkId>, Option<Who>) {
        let Some(known) = self.dashboards.get(id) else { return (None, None) };
        let who = Who::new(&self.id, &known.identity.subject, Peer::Dashboard(id.clone()));
        (known.link, Some(who))
    }

    fn observe_request(
        &self,
        wires: &mut Wires,
        command: &Command,
        outcome: Result<(), ErrorCode>,
    ) {
        let by = command.requested_by.as_ref();
        let (link, who) = by.map_or((None, None), |id| self.requester(id));
        let request = &command.request;
        let what = What::CommandRequested {
            command: request.command,
            agent: request.agent.clone(),
            title: request.spec.run.title(),
            outcome,
        };
        wires.observe(link, who, what);
    }

    fn observe_end(&self, wires: &mut Wires, id: CommandId, writers: BTreeMap<DashboardId, u64>) {
        let Some(command) = self.commands.get(&id) else { return };
        let Some(ending) = &command.ending else { return };
        let agent = &command.request.agent;
        for (writer, bytes) in writers {
            let (link, who) = self.requester(&writer);
            let what = What::InputEnded { command: id, agent: agent.clone(), bytes };
            wires.observe(link, who, what);
        }
        let ran = command.started_at_ms.map(|at| ending.at_ms.saturating_sub(at));
        let what = What::CommandEnded {
            command: id,
            agent: agent.clone(),
            attempt: command.attempt,
            status: ending.status,
            end: ending.end.clone(),
            ran: ran.map(Duration::from_millis),
        };
        wires.observe(None, None, what);
    }

    // ---- what the agent says --------------------------------------------

    /// The command, if this agent may speak about this attempt: an older
    /// attempt's words change nothing.
    fn fenced(&mut self, agent: &AgentId, id: CommandId, attempt: u32) -> Option<&mut Command> {
        let command = self.commands.get_mut(&id)?;
        (command.request.agent == *agent && command.attempt == attempt).then_some(command)
    }

    pub(super) fn handle_started(
        &mut self,
        wires: &mut Wires,
        agent: &AgentId,
        started: CommandStarted,
    ) {
        let CommandStarted { command: id, attempt, stream } = started;
        let Some(command) = self.fenced(agent, id, attempt) else { return };
        let waits = command.stage == Stage::Dispatched;
        let foreign = self.streams.get(&stream).is_some_and(|known| known.command != id);
        if waits && !foreign {
            self.run(wires, id, stream, 0);
        }
    }

    /// The command's program runs and its output is `stream`.
    fn run(&mut self, wires: &mut Wires, id: CommandId, stream: StreamId, from: u64) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        command.stage = Stage::Running;
        command.started_at_ms = Some(wires.now.wall_ms);
        let waited = wires.now.wall_ms.saturating_sub(command.requested_at_ms);
        let what = What::CommandStarted {
            command: id,
            agent: command.request.agent.clone(),
            attempt: command.attempt,
            waited: Duration::from_millis(waited),
        };
        if !command.streams.iter().any(|(_, known)| *known == stream) {
            command.streams.push((command.attempt, stream));
        }
        if let Some(run_for) = command.request.spec.run_for_ms {
            let margin = wires.limits.run_for_margin;
            let after = Duration::from_millis(run_for).saturating_add(margin);
            let at = wires.now.monotonic.saturating_add(after);
            wires.deadlines.set(Due::RunFor(self.id.clone(), id), at);
        }
        let size = command.size;
        let agent = command.request.agent.clone();
        match self.agents.get(&agent).and_then(Agent::link) {
            Some(link) => wires.observe_peer(link, what),
            None => wires.observe(None, None, what),
        }
        self.open_stream(wires, id, stream, from);
        self.publish_command(wires, id);
        // Asked for while it was still on its way.
        if let (Some(size), Some(link)) = (size, self.agents.get(&agent).and_then(Agent::link)) {
            wires.send(link, HubToAgent::Resize(TerminalResize { command: id, size }));
        }
    }

    pub(super) fn handle_interrupting(
        &mut self,
        wires: &mut Wires,
        agent: &AgentId,
        word: CommandInterrupting,
    ) {
        let Some(command) = self.fenced(agent, word.command, word.attempt) else { return };
        let Some(interrupt) = &mut command.interrupt else { return };
        if word.stage > interrupt.stage {
            interrupt.stage = word.stage;
            self.publish_command(wires, word.command);
        }
    }

    pub(super) fn handle_complete(
        &mut self,
        wires: &mut Wires,
        agent: &AgentId,
        complete: CommandComplete,
    ) {
        let CommandComplete { command: id, attempt, status, end } = complete;
        let told = self.fenced(agent, id, attempt).map(|command| command.stage);
        let link = self.agents.get(agent).and_then(Agent::link);
        match told {
            Some(Stage::Dispatched | Stage::Running) if status.is_final() => {
                self.end_or_again(wires, id, status, Some(end));
                self.dispatch(wires, agent);
            }
            // Already final, or an old attempt: the agent may forget it.
            Some(Stage::Final) | None => {
                if let Some(link) = link {
                    let settled = CommandSettled { command: id, attempt };
                    wires.send(link, HubToAgent::Settled(settled));
                }
            }
            Some(_) => {}
        }
    }

    // ---- a returning agent ----------------------------------------------

    /// One command that a returning agent holds.
    pub(super) fn handle_held(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        agent: &AgentId,
        instance: InstanceId,
        held: &HeldCommand,
    ) {
        let id = held.command;
        if let Some(command) = self.commands.get(&id)
            && command.request.agent != *agent
        {
            return; // it speaks of another agent's command
        }
        let foreign = |listed: &HeldStream| {
            self.streams.get(&listed.stream).is_some_and(|known| known.command != id)
        };
        let without_stream;
        let held = if held.stream.as_ref().is_some_and(foreign) {
            // Naming a stream gives no right to it.
            without_stream = HeldCommand { stream: None, ..held.clone() };
            &without_stream
        } else {
            held
        };
        if !self.commands.contains_key(&id) {
            self.adopt(wires, agent, instance, held);
        }
        let Some(command) = self.commands.get_mut(&id) else {
            // Listed without a word on what it was: nobody can do anything with it.
            let settled = CommandSettled { command: id, attempt: held.attempt };
            wires.send(link, HubToAgent::Settled(settled));
            return;
        };
        if command.attempt > held.attempt || command.is_anothers(instance, held.attempt) {
            // A later attempt was given out, or this one to another process
            // (by a hub that had lost its memory): it is to end, whatever it
            // does.
            let stop =
                CommandInterrupt { command: id, attempt: Some(held.attempt), grace_ms: None };
            let settled = CommandSettled { command: id, attempt: held.attempt };
            wires.send(link, HubToAgent::Interrupt(stop));
            wires.send(link, HubToAgent::Settled(settled));
            self.take_stream(wires, link, agent, held);
            return;
        }
        if command.ending.is_some() {
            // It ended here without the agent, or is about to, as soon as that
            // is stored; it must end there too.
            let is_final = command.is_final();
            if !held.status.is_final() {
                let attempt = Some(held.attempt);
                let stop = CommandInterrupt { command: id, attempt, grace_ms: None };
                wires.send(link, HubToAgent::Interrupt(stop));
            }
            if is_final {
                let settled = CommandSettled { command: id, attempt: held.attempt };
                wires.send(link, HubToAgent::Settled(settled));
            }
            self.publish_command(wires, id);
            self.take_stream(wires, link, agent, held);
            return;
        }
        match command.stage {
            // This hub only knew it as waiting: it forgot that it had leased
            // it, and somebody asked again.
            Stage::Queued => {
                let key = command.key();
                command.stage = Stage::Dispatched;
                command.attempt = held.attempt;
                command.instance = Some(instance);
                // A hub that is started again must not think that it waits.
                command.adopted = Some(Adopted::Lease);
                wires.deadlines.cancel(&Due::DeliverBy(self.id.clone(), id));
                self.waiting.remove(&(key.1, id));
                self.starting.insert(id);
                if let Some(agent) = self.agents.get_mut(agent) {
                    agent.queue.remove(&key);
                    agent.held.insert(id);
                }
                self.advance(wires, id);
                self.publish_queue(wires, agent);
            }
            Stage::Dispatched | Stage::Running => {
                let known = (command.instance.replace(instance), command.attempt);
                command.attempt = held.attempt; // not lower; it knows best
                if known != (Some(instance), held.attempt) {
                    command.adopted = command.adopted.max(Some(Adopted::Lease));
                    self.advance(wires, id);
                }
            }
            // Being stored as waiting, or as leased to a process that may not be
            // this one.
            Stage::Accepting | Stage::Leasing => {
                command.claim = Some(Box::new((link, instance, held.clone())));
                return;
            }
            Stage::Final => return,
        }
        let started = held.stream.is_some();
        let Some(command) = self.commands.get(&id) else { return };
        if started && command.stage == Stage::Dispatched {
            if let Some(stream) = held.stream {
                self.run(wires, id, stream.stream, stream.from);
            }
        } else {
            self.publish_command(wires, id);
        }
        self.take_stream(wires, link, agent, held);
        self.send_interrupt_if_live(wires, id);
        if held.status.is_final() {
            let end = held.end.clone().unwrap_or_default();
            self.end_or_again(wires, id, held.status, Some(end));
        }
    }

    /// What was being stored is: an agent that returned meanwhile is heard.
    fn hear_claim(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        let Some(claim) = command.claim.take() else { return };
        let (link, instance, held) = *claim;
        let agent = command.request.agent.clone();
        if self.agents.get(&agent).and_then(Agent::link) == Some(link) {
            self.handle_held(wires, link, &agent, instance, &held);
        }
    }

    fn send_interrupt_if_live(&mut self, wires: &mut Wires, id: CommandId) {
        let live = |c: &&Command| matches!(c.stage, Stage::Dispatched | Stage::Running);
        if self.commands.get(&id).filter(live).is_some_and(|c| c.interrupt.is_some()) {
            self.send_interrupt(wires, id);
        }
    }

    /// Learns of a command from the agent that holds it: this hub lost its
    /// memory, or never had it.
    fn adopt(
        &mut self,
        wires: &mut Wires,
        agent: &AgentId,
        instance: InstanceId,
        held: &HeldCommand,
    ) {
        let Some(spec) = held.spec.clone() else { return };
        let holds = self.agents.get(agent).map_or(0, |a| a.held.len() + a.relearnt.len());
        let request = CommandRequest {
            command: held.command,
            agent: agent.clone(),
            spec,
            priority: Priority::Normal,
            deliver_within_ms: None,
            retry: false,
        };
        // What it lists in one greeting is bounded; this bounds all of them.
        if holds >= HELD_MAX {
            return;
        }
        let Ok(spec_bytes) = check_spec(&request, wires) else { return };
        let cost = COMMAND_BYTES + spec_bytes;
        let command = Command {
            requested_by: None,
            requested_at_ms: wires.now.wall_ms,
            order: self.next_order(),
            cost,
            stage: Stage::Dispatched,
            attempt: held.attempt,
            instance: Some(instance),
            streams: Vec::new(),
            started_at_ms: None,
            deliver_by: Duration::MAX,
            interrupt: None,
            ending: None,
            storing: None,
            adopted: Some(Adopted::Whole),
            waiting: Vec::new(),
            claim: None,
            writers: BTreeMap::new(),
            size: None,
            is_dropped: false,
            request,
        };
        self.command_bytes += cost;
        self.commands.insert(held.command, command);
        self.advance(wires, held.command);
        if let Some(agent) = self.agents.get_mut(agent) {
            if held.status.is_final() {
                agent.relearnt.insert(held.command);
            } else {
                agent.held.insert(held.command);
                self.starting.insert(held.command);
            }
        }
    }

    /// A command that this hub had given to an agent which does not list it.
    pub(super) fn handle_not_held(
        &mut self,
        wires: &mut Wires,
        id: CommandId,
        instance: InstanceId,
    ) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        if command.ending.is_some() {
            return; // that is being stored
        }
        let same_process = command.instance == Some(instance);
        match command.stage {
            // The same process remembers everything it got: it never got this.
            Stage::Dispatched if same_process => {
                let before = command.attempt.saturating_sub(1);
                if command.interrupt.is_some() {
                    let status = unless_tried(before, CommandStatus::Interrupted);
                    self.end_command(wires, id, status, None);
                } else if wires.now.monotonic >= command.deliver_by {
                    let status = unless_tried(before, CommandStatus::Expired);
                    self.end_command(wires, id, status, None);
                } else {
                    self.send_execute(wires, id);
                }
            }
            Stage::Dispatched | Stage::Running => {
                self.end_or_again(wires, id, CommandStatus::Unknown, None);
            }
            Stage::Accepting | Stage::Queued | Stage::Leasing | Stage::Final => {}
        }
    }

    /// An attempt is over: the command ends with it, unless nobody knows how
    /// the attempt ended and it may run again.
    fn end_or_again(
        &mut self,
        wires: &mut Wires,
        id: CommandId,
        status: CommandStatus,
        end: Option<CommandEnd>,
    ) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        let again = status == CommandStatus::Unknown
            && command.request.retry
            && command.interrupt.is_none()
            && wires.now.monotonic < command.deliver_by;
        if !again {
            self.end_command(wires, id, status, end);
        } else if command.ending.is_none() {
            command.instance = None;
            self.requeue(wires, id);
        }
    }

    // ---- deadlines ------------------------------------------------------

    pub(super) fn handle_deliver_by(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get(&id) else { return };
        if command.stage == Stage::Queued {
            let status = unless_tried(command.attempt, CommandStatus::Expired);
            self.end_command(wires, id, status, None);
        }
    }

    pub(super) fn handle_run_for(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get(&id) else { return };
        let here =
            self.agents.get(&command.request.agent).is_some_and(|agent| agent.link().is_some());
        if here {
            // The agent ends it; look again in case it vanishes over it.
            let margin = wires.limits.run_for_margin;
            wires.in_time(Due::RunFor(self.id.clone(), id), margin);
        } else {
            self.end_command(wires, id, CommandStatus::TimedOut, None);
        }
    }

    // ---- start ----------------------------------------------------------

    /// A command that the queue kept over a restart.
    pub(super) fn load_command(&mut self, wires: &mut Wires, stored: StoredCommand) {
        let id = stored.request.command;
        let agent_id = stored.request.agent.clone();
        let within = stored.request.deliver_within_ms.map(Duration::from_millis);
        let within = within.unwrap_or(wires.limits.deliver_within);
        let waited = wires.now.wall_ms.saturating_sub(stored.requested_at_ms);
        let left = within.saturating_sub(Duration::from_millis(waited));
        let stage = match stored.status {
            CommandStatus::Queued => Stage::Queued,
            CommandStatus::Dispatched => Stage::Dispatched,
            CommandStatus::Running => Stage::Running,
            CommandStatus::Completed
            | CommandStatus::Failed
            | CommandStatus::Interrupted
            | CommandStatus::TimedOut
            | CommandStatus::Expired
            | CommandStatus::Unknown => Stage::Final,
        };
        self.order = self.order.max(stored.order);
        let ending = (stage == Stage::Final).then(|| Ending {
            status: stored.status,
            at_ms: stored.ended_at_ms.unwrap_or(stored.requested_at_ms),
            end: stored.end.unwrap_or_default(),
        });
        let cost = COMMAND_BYTES + spec_bytes(&stored.request.spec);
        let order = stored.order;
        let command = Command {
            cost,
            request: stored.request,
            requested_by: stored.requested_by,
            requested_at_ms: stored.requested_at_ms,
            order: stored.order,
            stage,
            attempt: stored.attempt,
            instance: stored.instance,
            streams: stored.stream.map(|stream| (stored.attempt, stream)).into_iter().collect(),
            started_at_ms: None,
            deliver_by: wires.now.monotonic.saturating_add(left),
            interrupt: None,
            ending,
            storing: None,
            adopted: None,
            waiting: Vec::new(),
            claim: None,
            writers: BTreeMap::new(),
            size: None,
            is_dropped: false,
        };
        self.command_bytes += cost;
        self.commands.insert(id, command);
        let retention = wires.limits.agent_retention;
        wires.in_time(Due::AgentRetention(self.id.clone(), agent_id.clone()), retention);
        let agent = self.agents.entry(agent_id).or_default();
        match stage {
            Stage::Queued => self.requeue(wires, id),
            Stage::Final => {
                agent.finished.push_back(id);
                self.finished.insert((order, id));
                self.readable.insert((order, id));
                // The queue may have more: what was to be forgotten when the
                // last hub was killed.
                let too_many = agent.finished.len() > wires.limits.finished_per_agent;
                let oldest = if too_many { agent.finished.front().copied() } else { None };
                self.publish_command(wires, id);
                if let Some(oldest) = oldest {
                    self.forget_command(wires, oldest);
                }
            }
            Stage::Accepting | Stage::Leasing | Stage::Dispatched | Stage::Running => {
                agent.held.insert(id);
                self.starting.insert(id);
                self.publish_command(wires, id);
            }
        }
    }
}

/// About how long a `spec` is as JSON.
fn spec_bytes(spec: &CommandSpec) -> usize {
    let run = match &spec.run {
        Run::Argv(argv) => argv.iter().map(|arg| arg.len() + 4).sum(),
        Run::Shell(text) | Run::Text(text) => text.len(),
    };
    let env: usize = spec.env.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
    run + env + spec.cwd.as_ref().map_or(0, String::len)
}

/// How long a request's `spec` is, if it may be so.
fn check_spec(request: &CommandRequest, wires: &Wires) -> Result<usize, Refusal> {
    let refuse = |field: &str, rule: String| {
        Err(Refusal::new(ErrorCode::InvalidMessage, format!("{field}: {rule}")).field(field))
    };
    let spec = &request.spec;
    if spec.env.len() > 256 {
        return refuse("payload.spec.env", "at most 256 variables".into());
    }
    let size = spec_bytes(spec);
    if size > wires.limits.spec_bytes_max {
        return refuse("payload.spec", format!("at most {} bytes", wires.limits.spec_bytes_max));
    }
    Ok(size)
}
