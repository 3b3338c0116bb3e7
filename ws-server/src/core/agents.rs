//! Agents: who is there, derived from the live link, and what a returning
//! one still holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::Close;
use trunkline_protocol::ids::{AgentId, CommandId, InstanceId, StreamId};
use trunkline_protocol::limits::HELD_MAX;
use trunkline_protocol::message::{
    AgentAbout, AgentConnect, AgentReport, AgentState, CommandStatus, HeldCommand, HubToAgent,
    Presence, Priority, QueueState, TerminalInputTaken,
};

use super::deadlines::Due;
use super::link::{LinkId, Listing, State};
use super::rights::Labels;
use super::subjects::Usage;
use super::tenant::Tenant;
use super::wires::Wires;
use crate::hooks::Identity;

#[derive(Debug, Default)]
pub(super) struct Agent {
    /// `None` for an agent that has only been asked for: commands may wait
    /// for one that has not come yet.
    pub(super) seen: Option<Seen>,
    /// Commands that wait, next first.
    pub(super) queue: BTreeMap<(Priority, u64), CommandId>,
    /// Commands that are being stored, to wait then.
    pub(super) accepting: usize,
    /// Commands that take a slot: being leased, leased, running, settling.
    pub(super) held: BTreeSet<CommandId>,
    /// Commands that had ended before this hub heard of them, until that is
    /// stored: they take no slot, and are not listed.
    pub(super) relearnt: BTreeSet<CommandId>,
    /// Finished commands still listed, oldest first.
    pub(super) finished: VecDeque<CommandId>,
    /// Streams whose `terminal:taken` is to be sent.
    pub(super) tell: Vec<StreamId>,
    /// What may be granted now, in bytes.
    pub(super) tokens: u64,
    pub(super) tokens_at: Duration,
    /// What it has used up of what it may say.
    pub(super) usage: Usage,
    /// What the roster says, to publish only what changed.
    listed: Option<AgentState>,
}

/// An agent that has been here.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) instance: InstanceId,
    pub(super) subject: String,
    /// The labels of its identity, by which policies know it.
    pub(super) labels: Labels,
    pub(super) slots: u32,
    about: AgentAbout,
    report: AgentReport,
    standing: Standing,
    /// Until it has listed all that it holds, it is given nothing.
    is_listing: bool,
    /// The newest of its links so far.
    latest: LinkId,
    since_ms: u64,
}

/// Why a greeting comes to nothing that took longer to be authenticated than
/// that of a newer link: what it says is old, and the newer one must not be
/// closed for it.
pub(super) fn stale() -> Close {
    Close::new(CloseCode::Superseded, "a newer link was here first")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Here(LinkId),
    Unreachable,
    Offline,
}

impl Agent {
    /// The live link, if there is one.
    pub(super) fn link(&self) -> Option<LinkId> {
        match self.seen.as_ref()?.standing {
            Standing::Here(link) => Some(link),
            Standing::Unreachable | Standing::Offline => None,
        }
    }

    fn presence(&self, seen: &Seen) -> Presence {
        match seen.standing {
            Standing::Here(_) if self.held.len() >= seen.slots as usize => Presence::Busy,
            Standing::Here(_) => Presence::Online,
            Standing::Unreachable => Presence::Unreachable,
            Standing::Offline => Presence::Offline,
        }
    }

    /// Whether a queued command could start now.
    pub(super) fn has_free_slot(&self) -> bool {
        let known = self.seen.as_ref().filter(|seen| !seen.is_listing);
        let slots = known.map_or(0, |seen| seen.slots as usize);
        self.link().is_some() && self.held.len() < slots
    }
}

impl Tenant {
    /// An agent has greeted and been recognised. `Err` when it may not come.
    pub(super) fn handle_agent_here(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        id: &AgentId,
        identity: Identity,
        greeting: &AgentConnect,
    ) -> Result<(), Close> {
        let full = self.agents.len() >= wires.limits.agents_max;
        let agent = match self.agents.get_mut(id) {
            Some(agent) => agent,
            None if full => return Err(Close::new(CloseCode::TryLater, "too many agents")),
            None => self.agents.entry(id.clone()).or_default(),
        };
        if let Some(seen) = &agent.seen {
            if seen.subject != identity.subject {
                return Err(Close::new(CloseCode::Forbidden, "another subject has this agent id"));
            }
            if link < seen.latest {
                return Err(stale());
            }
            agent.usage.count_link(wires)?;
            if let Standing::Here(old) = seen.standing {
                wires.close(old, Close::new(CloseCode::Superseded, "another link took over"));
            }
        } else {
            agent.tokens = wires.limits.grant_bytes;
            agent.tokens_at = wires.now.monotonic;
        }
        let before = self.take_labels(id);
        let Some(agent) = self.agents.get_mut(id) else { return Ok(()) };
        let report = agent.seen.take().map(|seen| seen.report).unwrap_or_default();
        let is_relabelled = identity.labels != before;
        agent.seen = Some(Seen {
            instance: greeting.instance,
            subject: identity.subject,
            labels: identity.labels,
            slots: greeting.slots.max(1),
            about: greeting.about.clone(),
            report,
            standing: Standing::Here(link),
            is_listing: true,
            latest: link,
            since_ms: wires.now.wall_ms,
        });
        agent.tell.clear();
        wires.deadlines.cancel(&Due::AgentGrace(self.id.clone(), id.clone()));
        wires.deadlines.cancel(&Due::AgentRetention(self.id.clone(), id.clone()));
        if is_relabelled {
            self.relabelled(wires, id, &before);
        }
        Ok(())
    }

    /// An agent goes on under a new token.
    pub(super) fn renew_agent(
        &mut self,
        wires: &mut Wires,
        id: &AgentId,
        new: Identity,
    ) -> Result<(), &'static str> {
        let is_same = |seen: &Seen| seen.subject == new.subject;
        if !self.agents.get(id).and_then(|agent| agent.seen.as_ref()).is_some_and(is_same) {
            return Err("the token is for somebody else");
        }
        let before = self.take_labels(id);
        let is_relabelled = before != new.labels;
        if let Some(seen) = self.agents.get_mut(id).and_then(|agent| agent.seen.as_mut()) {
            seen.labels = new.labels;
        }
        if is_relabelled {
            self.relabelled(wires, id, &before);
        }
        Ok(())
    }

    /// What a returning agent holds: some of it, or the rest.
    pub(super) fn handle_listed(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        id: &AgentId,
        held: Vec<HeldCommand>,
        more: bool,
    ) {
        let bytes_max = wires.limits.message_bytes_max;
        let mut listing = Listing::default();
        if let Some(State::Agent(agent)) = wires.links.get_mut(&link).map(|link| &mut link.state) {
            listing = agent.listing.take().unwrap_or_default();
        }
        listing.commands.extend(held);
        if listing.commands.len() > HELD_MAX || listing.bytes > bytes_max {
            wires.close(link, Close::new(CloseCode::TooBig, "too many held commands"));
            return;
        }
        if more {
            if let Some(State::Agent(agent)) = wires.links.get_mut(&link).map(|it| &mut it.state) {
                agent.listing = Some(listing);
            }
            return;
        }
        if !self.has_room_for(wires, &listing.commands) {
            let why = "no room for the commands that it holds";
            wires.close(link, Close::new(CloseCode::TryLater, why));
            return;
        }
        wires.deadlines.cancel(&Due::Greeting(link));
        if let Some(seen) = self.agents.get_mut(id).and_then(|agent| agent.seen.as_mut()) {
            seen.is_listing = false;
        }
        self.reconcile(wires, id, &listing.commands);
    }

    /// What a returning agent holds, against what this hub believes. Nothing
    /// is guessed from timing: only from what is listed, and by which process.
    fn reconcile(&mut self, wires: &mut Wires, id: &AgentId, held: &[HeldCommand]) {
        let Some(agent) = self.agents.get(id) else { return };
        let (Some(link), Some(seen)) = (agent.link(), &agent.seen) else { return };
        let instance = seen.instance;
        let believed: Vec<CommandId> = agent.held.iter().copied().collect();
        for one in held {
            self.handle_held(wires, link, id, instance, one);
        }
        for command in believed {
            let Some(known) = self.commands.get(&command) else { continue };
            let attempt = known.attempt;
            // One that lists an earlier attempt has not got this one.
            let is_it = |one: &HeldCommand| one.command == command && one.attempt >= attempt;
            if !(known.is_with(instance) && held.iter().any(is_it)) {
                self.handle_not_held(wires, command, instance);
            }
        }
        self.close_lost_streams(wires, id, held);
        self.resume_input(wires, id);
        self.publish_agent(wires, id);
        self.dispatch(wires, id);
    }

    /// Asks everyone who types into this agent's commands to go on from what
    /// is known to have arrived: what was under way when the link was lost is
    /// gone.
    fn resume_input(&mut self, wires: &mut Wires, id: &AgentId) {
        let Some(agent) = self.agents.get(id) else { return };
        for id in &agent.held {
            let Some(command) = self.commands.get(id) else { continue };
            if let (Some(size), Some(link)) = (command.size, agent.link()) {
                let resize = trunkline_protocol::message::TerminalResize { command: *id, size };
                wires.send(link, HubToAgent::Resize(resize));
            }
            for (writer, offset) in &command.writers {
                let Some(link) = self.dashboards.get(writer).and_then(|d| d.link) else { continue };
                let taken = TerminalInputTaken {
                    command: *id,
                    writer: writer.clone(),
                    offset: *offset,
                    resend: true,
                };
                wires.send(link, trunkline_protocol::message::HubToDashboard::InputTaken(taken));
            }
        }
    }

    /// The agent's link is gone. A link that was superseded changes nothing.
    pub(super) fn handle_agent_lost(&mut self, wires: &mut Wires, id: &AgentId, link: LinkId) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        let Some(seen) = &mut agent.seen else { return };
        if seen.standing != Standing::Here(link) {
            return;
        }
        seen.standing = Standing::Unreachable;
        seen.since_ms = wires.now.wall_ms;
        agent.tell.clear();
        let grace = wires.limits.agent_grace;
        wires.in_time(Due::AgentGrace(self.id.clone(), id.clone()), grace);
        wires.deadlines.cancel(&Due::Grant(self.id.clone(), id.clone()));
        self.publish_agent(wires, id);
    }

    /// The agent said goodbye, or its grace is over.
    pub(super) fn handle_agent_offline(&mut self, wires: &mut Wires, id: &AgentId) {
        let Some(seen) = self.agents.get_mut(id).and_then(|agent| agent.seen.as_mut()) else {
            return;
        };
        if seen.standing != Standing::Offline {
            seen.standing = Standing::Offline;
            seen.since_ms = wires.now.wall_ms;
        }
        wires.deadlines.cancel(&Due::AgentGrace(self.id.clone(), id.clone()));
        let retention = wires.limits.agent_retention;
        wires.in_time(Due::AgentRetention(self.id.clone(), id.clone()), retention);
        self.publish_agent(wires, id);
    }

    /// An agent that is not here is to be forgotten in time: one that never
    /// was, as soon as what was asked of it is of no interest any more.
    pub(super) fn forget_agent_later(&self, wires: &mut Wires, id: &AgentId) {
        let Some(agent) = self.agents.get(id).filter(|agent| agent.link().is_none()) else {
            return;
        };
        let retention = match &agent.seen {
            Some(_) => wires.limits.agent_retention,
            None => wires.limits.log_retention,
        };
        let at = wires.at(retention);
        wires.deadlines.set_earlier(Due::AgentRetention(self.id.clone(), id.clone()), at);
    }

    /// An agent has been away for so long that nobody waits for it any more.
    pub(super) fn handle_agent_retention(&mut self, wires: &mut Wires, id: &AgentId) {
        let Some(agent) = self.agents.get(id) else { return };
        if agent.link().is_some() {
            return;
        }
        for command in agent.held.clone() {
            self.end_command(wires, command, CommandStatus::Unknown, None);
        }
        let Some(agent) = self.agents.get(id) else { return };
        let is_needed = agent.accepting > 0
            || !(agent.held.is_empty() && agent.relearnt.is_empty() && agent.queue.is_empty());
        if is_needed {
            // What still waits has a time of its own; look again later.
            self.forget_agent_later(wires, id);
            return;
        }
        for command in agent.finished.clone() {
            self.forget_command(wires, command);
        }
        let labels = self.take_labels(id);
        self.departed.add(id, labels);
        self.agents.remove(id);
        self.ledger.remove_agent(id);
        self.wake_followers(wires);
    }

    /// The agent's latest figures.
    pub(super) fn handle_report(&mut self, wires: &mut Wires, id: &AgentId, report: AgentReport) {
        if let Some(seen) = self.agents.get_mut(id).and_then(|agent| agent.seen.as_mut()) {
            seen.report = report;
            self.publish_agent(wires, id);
        }
    }

    /// Lists the agent as it now is.
    pub(super) fn publish_agent(&mut self, wires: &mut Wires, id: &AgentId) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        let Some(seen) = &agent.seen else { return };
        let presence = agent.presence(seen);
        let since_ms = match &agent.listed {
            Some(listed) if listed.presence == presence => listed.since_ms,
            Some(_) | None => wires.now.wall_ms,
        };
        let state = AgentState {
            agent: id.clone(),
            presence,
            since_ms,
            instance: seen.instance,
            about: seen.about.clone(),
            slots: seen.slots,
            running: u32::try_from(agent.held.len()).unwrap_or(u32::MAX),
            report: seen.report.clone(),
        };
        if agent.listed.as_ref() == Some(&state) {
            return;
        }
        agent.listed = Some(state.clone());
        self.ledger.set_agent(state);
        self.wake_followers(wires);
    }

    /// Lists the agent's queue as it now is.
    pub(super) fn publish_queue(&mut self, wires: &mut Wires, id: &AgentId) {
        let Some(agent) = self.agents.get(id) else { return };
        let commands = agent.queue.values().copied().collect();
        self.ledger.set_queue(QueueState { agent: id.clone(), commands });
        self.wake_followers(wires);
    }
}
