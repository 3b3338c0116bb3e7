//! What a dashboard makes of what the hub says.

use std::sync::Arc;
use std::time::Duration;

use trunkline_protocol::codec::Rules;
use trunkline_protocol::ids::{CommandId, RequestId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    Accepted, CommandState, CommandStatus, ConnectionAck, ErrorCode, HubToDashboard, Peer,
    Presence, Refusal, Target, TerminalInputTaken, TerminalRefused,
};
use trunkline_protocol::roster::RosterEvent;
use trunkline_protocol::time::Now;

use super::link::{Link, Up, bytes};
use super::reading::RETURN_TIMEOUT;
use crate::core::Class;

use super::{Asked, DashboardCore, DashboardEvent, Missing, Output, RequestError};

/// Input is not answered when all is well; when it is refused, this is how
/// the command it was for is found.
pub(super) fn input_id(command: CommandId, number: u64) -> RequestId {
    let id = format!("{command}.{number}");
    // Of 0-9 a-f - and ., and at most 57 long.
    id.parse().expect("a UUID, a dot and a number are a request id")
}

fn input_command(id: &RequestId) -> Option<CommandId> {
    id.as_str().split_once('.')?.0.parse().ok()
}

impl DashboardCore {
    /// The first words of the hub on a link.
    pub(super) fn handle_greeted(&mut self, message: HubToDashboard, now: Now) {
        match message {
            HubToDashboard::Ack(ack) => self.handle_ack(&ack, now),
            HubToDashboard::Error(refusal) => {
                // The close that follows says what to do about it.
                tracing::warn!(%refusal, "the hub refused the greeting");
            }
            // Whatever it is, it comes too early.
            _ => self.close("no acknowledgement", now),
        }
    }

    fn handle_ack(&mut self, ack: &ConnectionAck, now: Now) {
        let Peer::Dashboard(me) = &ack.peer else {
            self.close("this is a dashboard", now);
            return;
        };
        self.me = me.clone();
        self.link = Link::Up(Box::new(Up::new(ack, now)));
        let defaults = Limits::default();
        self.message_bytes_max = bytes(ack.limits.message_bytes_max);
        self.rules = Rules {
            message_bytes_max: defaults.message_bytes_max.max(self.message_bytes_max),
            chunk_bytes_max: defaults.chunk_bytes_max.max(bytes(ack.limits.chunk_bytes_max)),
            batch_messages_max: defaults.batch_messages_max.max(ack.limits.batch_messages_max),
            ..Rules::from(&defaults)
        };
        self.refresh.handle_link();
        self.pace.handle_ack(ack.limits.rates);
        self.outbox.handle_link();
        self.interrupts.handle_link();
        self.readers.handle_link();
        self.inputs.handle_link(ack.limits.input_bytes_ahead);
        self.roster.handle_link();
        if let Some(logs) = &mut self.logs {
            logs.handle_link();
        }
        if self.epoch.replace(ack.queue).is_some_and(|before| before != ack.queue) {
            self.in_doubt = true;
        }
        self.dialing.handle_acked(now);
        self.after_dialing();
        // Deltas follow if the hub is the one that the roster is of; a
        // snapshot otherwise.
        if self.roster.roster().position().is_some_and(|at| at.hub == ack.hub) {
            self.handle_whole(now);
        }
    }

    pub(super) fn handle_message(&mut self, message: HubToDashboard, now: Now) {
        match message {
            HubToDashboard::Ack(_) => {
                self.close("a second acknowledgement", now);
            }
            HubToDashboard::List(list) => {
                let before = Arc::clone(self.roster.roster());
                if let Some(event) = self.roster.handle_list(list) {
                    let listed = Arc::clone(self.roster.roster());
                    for gone in before.commands().filter(|c| listed.command(c.command).is_none()) {
                        self.handle_gone(gone, now);
                    }
                    for state in listed.commands() {
                        let before = before.command(state.command).map(|before| before.status);
                        self.handle_state(state, before);
                    }
                    self.tell(event);
                    self.handle_whole(now);
                }
            }
            HubToDashboard::Agent(changed) => {
                let id = changed.agent.as_ref().map(|agent| agent.agent.clone());
                let before = id.and_then(|id| self.roster().agent(&id).cloned());
                if let Some(event) = self.roster.handle_agent(changed) {
                    let was_there = before.is_some_and(|agent| is_there(agent.presence));
                    if let RosterEvent::Agent(agent) = &event
                        && is_there(agent.presence)
                        && !was_there
                    {
                        let typed = self.inputs.commands();
                        let roster = Arc::clone(self.roster());
                        for state in typed.iter().filter_map(|command| roster.command(*command)) {
                            if state.agent == agent.agent {
                                self.inputs.handle_agent_back(state.command);
                            }
                        }
                    }
                    self.tell(event);
                }
            }
            HubToDashboard::Command(changed) | HubToDashboard::Complete(changed) => {
                let command = changed.removed.or(changed.command.as_ref().map(|c| c.command));
                let before = command.and_then(|id| self.roster().command(id).cloned());
                match self.roster.handle_command(changed) {
                    Some(RosterEvent::Command(state)) => {
                        self.handle_state(&state, before.map(|before| before.status));
                        self.consider_unannounced(now);
                        self.tell(RosterEvent::Command(state));
                    }
                    Some(event) => {
                        if let Some(gone) = before {
                            self.handle_gone(&gone, now);
                        }
                        self.tell(event);
                    }
                    None => {}
                }
            }
            HubToDashboard::Queue(changed) => {
                if let Some(event) = self.roster.handle_queue(&changed) {
                    self.tell(event);
                }
            }
            HubToDashboard::Opened(opened) => {
                let event = DashboardEvent::TerminalOpened(opened.clone());
                self.readers.handle_opened(opened, self.roster.roster());
                self.consider_unannounced(now);
                self.outputs.push_back(Output::Event(event));
            }
            HubToDashboard::Refused(TerminalRefused { target, code, message }) => {
                self.readers.handle_refused(&target, &Refusal::new(code, message));
            }
            HubToDashboard::Output(output) => self.readers.handle_output(&output),
            HubToDashboard::Gap(gap) => self.readers.handle_gap(&gap),
            HubToDashboard::InputTaken(taken) => self.handle_input_taken(&taken),
            HubToDashboard::LogTaken(taken) => {
                if let Some(logs) = &mut self.logs {
                    logs.handle_taken(&taken, now.monotonic);
                }
            }
            HubToDashboard::Ok(accepted) => self.handle_ok(accepted, now),
            HubToDashboard::Error(refusal) => self.handle_refusal(refusal, now),
            HubToDashboard::Ping(ping) => {
                if let Link::Up(up) = &mut self.link {
                    up.pong = Some(ping.n);
                }
            }
            HubToDashboard::Pong(pong) => {
                if let Link::Up(up) = &mut self.link {
                    up.liveness.handle_pong(pong.n, now.monotonic);
                }
            }
            HubToDashboard::RefreshNeeded(_) => self.refresh.handle_needed(),
            HubToDashboard::RefreshSuccess(_) => self.refresh.handle_success(),
            HubToDashboard::RefreshFailed(failed) => self.refresh.handle_failed(&failed.message),
        }
    }

    /// The roster is that of the hub at the other end, from here on up to
    /// date.
    fn handle_whole(&mut self, now: Now) {
        self.is_whole = true;
        for missing in self.missing.values_mut() {
            missing.until.get_or_insert(now.monotonic + RETURN_TIMEOUT);
        }
        if std::mem::take(&mut self.in_doubt) {
            self.resolve_doubt();
        }
        self.consider_unannounced(now);
    }

    /// The hub's queue is another than before: says of every command that was
    /// sent and not answered whether it is stored now.
    fn resolve_doubt(&mut self) {
        let roster = Arc::clone(self.roster());
        let is_listed = |command| roster.command(command).is_some();
        let decided = self.outbox.withdraw(|asked, sent| match asked {
            Asked::Command { command, retry } => sent && (is_listed(*command) || !retry),
            Asked::Other => false, // repeating it is harmless
        });
        for unanswered in decided {
            let answer = match unanswered.note {
                Asked::Command { command, .. } if is_listed(command) => {
                    Ok(Accepted { command: Some(command), ..Accepted::default() })
                }
                Asked::Command { .. } | Asked::Other => Err(RequestError::Ambiguous),
            };
            self.answer(unanswered.id, answer);
        }
    }

    /// A command is listed as `state`.
    fn handle_state(&mut self, state: &Arc<CommandState>, before: Option<CommandStatus>) {
        self.missing.remove(&state.command);
        if before == Some(state.status) {
            return;
        }
        if state.status == CommandStatus::Running {
            self.inputs.handle_agent_back(state.command);
        }
        if state.status.is_final() {
            self.drop_input(state.command);
            self.readers.handle_state(state);
        }
    }

    /// A command is no longer listed. If it had not ended, the hub has
    /// forgotten it, unless its agent brings it back.
    fn handle_gone(&mut self, gone: &CommandState, now: Now) {
        if !gone.status.is_final() {
            let until = Some(now.monotonic + RETURN_TIMEOUT);
            self.missing.insert(gone.command, Missing { until });
        }
    }

    pub(super) fn consider_unannounced(&mut self, now: Now) {
        if self.is_whole {
            self.readers.consider_unannounced(now.monotonic);
        }
    }

    pub(super) fn drop_input(&mut self, command: CommandId) {
        self.inputs.forget(command);
        self.outputs.push_back(Output::InputMoved(command));
    }

    fn tell(&mut self, event: RosterEvent) {
        self.outputs.push_back(Output::Event(DashboardEvent::Roster(event)));
    }

    fn handle_input_taken(&mut self, taken: &TerminalInputTaken) {
        if taken.writer == self.me
            && self.inputs.handle_taken(taken.command, taken.offset, taken.resend)
        {
            self.outputs.push_back(Output::InputMoved(taken.command));
        }
    }

    fn handle_ok(&mut self, accepted: Accepted, now: Now) {
        let Some(id) = accepted.in_reply_to.clone() else { return };
        if let Link::Up(up) = &mut self.link
            && let Some(targets) = up.subscribing.remove(&id)
        {
            // A later subscription to the same target is under way: what comes
            // until it is answered goes by this one.
            let is_latest =
                |target: &Target| !up.subscribing.values().flatten().any(|later| later == target);
            for target in targets.into_iter().filter(is_latest) {
                self.readers.handle_subscribed(&target);
            }
            self.consider_unannounced(now);
            return;
        }
        let Some(asked) = self.take_asked(&id) else { return };
        if let Asked::Command { command, .. } = asked
            && self.roster().command(command).is_none()
        {
            // Its listing follows; if not, it is lost.
            let until = self.is_whole.then_some(now.monotonic + RETURN_TIMEOUT);
            self.missing.insert(command, Missing { until });
        }
        self.answer(id, Ok(accepted));
    }

    fn handle_refusal(&mut self, refusal: Refusal, now: Now) {
        let Some(id) = refusal.in_reply_to.clone() else {
            tracing::warn!(%refusal, "the hub refused something without a name");
            return;
        };
        let logs = self.logs.as_mut();
        if logs.is_some_and(|logs| logs.handle_refused(&refusal, now.monotonic)) {
            return;
        }
        if refusal.code == ErrorCode::RateLimited && self.handle_rate_limited(&id, &refusal, now) {
            return;
        }
        if let Link::Up(up) = &mut self.link
            && let Some(targets) = up.subscribing.remove(&id)
        {
            match refusal.retry_after_ms {
                Some(ms) if refusal.recoverable => {
                    let at = now.monotonic + Duration::from_millis(ms);
                    up.later.extend(targets.into_iter().map(|target| (target, at)));
                }
                _ if targets.len() > 1 => up.alone.extend(targets),
                Some(_) | None => {
                    for target in targets {
                        self.readers.handle_refused(&target, &refusal);
                    }
                }
            }
            return;
        }
        if let Some(command) = input_command(&id) {
            self.handle_input_refused(command, refusal, now);
        } else if self.take_asked(&id).is_some() {
            self.answer(id, Err(RequestError::Refused(refusal)));
        }
    }

    /// Others of the same subject have used up the rate: what was asked is
    /// asked again in time. `false` for what has its own way back: input.
    fn handle_rate_limited(&mut self, id: &RequestId, refusal: &Refusal, now: Now) -> bool {
        let wait = Duration::from_millis(refusal.retry_after_ms.unwrap_or(1000));
        let until = now.monotonic.saturating_add(wait);
        if let Link::Up(up) = &mut self.link
            && let Some(targets) = up.subscribing.remove(id)
        {
            self.pace.hold(Class::Requests, until);
            for target in targets {
                self.readers.change(target);
            }
        } else if self.interrupts.send_again(id) {
            self.pace.hold(Class::Interrupts, until);
        } else if self.outbox.send_again(id) {
            self.pace.hold(Class::Requests, until);
            // An interrupt may wait there, too, behind what it is about.
            self.pace.hold(Class::Interrupts, until);
        } else {
            self.pace.hold(Class::Input, until);
            return false;
        }
        true
    }

    /// A request is answered.
    fn take_asked(&mut self, id: &RequestId) -> Option<Asked> {
        self.outbox.handle_answer(id).or_else(|| self.interrupts.handle_answer(id))
    }

    fn handle_input_refused(&mut self, command: CommandId, refusal: Refusal, now: Now) {
        // A hub that lost its memory learns of the command when its agent
        // returns. Until then it knows nothing, and what was typed waits.
        let may_return = refusal.code == ErrorCode::NotFound
            && (!self.is_whole || self.missing.contains_key(&command));
        if refusal.recoverable || may_return {
            // A command that does not run yet wakes its input when it does.
            let wait = match refusal.code {
                ErrorCode::NotRunning => 10_000,
                _ => 1_000, // whatever else passes, passes soon
            };
            let wait = refusal.retry_after_ms.unwrap_or(wait);
            let until = now.monotonic + Duration::from_millis(wait);
            self.inputs.handle_pause(command, until);
            return;
        }
        self.inputs.handle_refused(command);
        self.outputs.push_back(Output::InputMoved(command));
        let event = DashboardEvent::InputRefused { command, refusal };
        self.outputs.push_back(Output::Event(event));
    }

    pub(super) fn wake_readers(&mut self) {
        while let Some(reader) = self.readers.poll_awake() {
            self.outputs.push_back(Output::Readable(reader));
        }
    }
}

fn is_there(presence: Presence) -> bool {
    match presence {
        Presence::Online | Presence::Busy => true,
        Presence::Unreachable | Presence::Offline => false,
    }
}
