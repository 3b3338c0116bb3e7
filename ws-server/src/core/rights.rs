//! Who may do what: the one place where the policy is asked.

use std::collections::{BTreeSet, HashMap, VecDeque};

use trunkline_protocol::ids::{AgentId, CommandId};
use trunkline_protocol::message::{
    DashboardToHub, EmergencyStop, ErrorCode, HubToDashboard, Refusal, Target, TerminalRefused,
};
use trunkline_protocol::roster::{Cursor, REMOVALS_MAX};

use super::Map;
use super::agents::Agent;
use super::commands::{Command, no_such_command};
use super::link::LinkId;
use super::tenant::Tenant;
use super::wires::Wires;
use crate::hooks::{AgentRef, Identity, Permission, Policy};

pub(super) type Labels = BTreeSet<String>;

static UNKNOWN: Labels = Labels::new();

/// The labels of agents that are no longer listed: who was allowed to know of
/// one hears that it is gone. As many as the roster remembers removals.
#[derive(Debug, Default)]
pub(super) struct Departed {
    labels: HashMap<AgentId, Labels>,
    order: VecDeque<AgentId>,
}

impl Departed {
    pub(super) fn add(&mut self, agent: &AgentId, labels: Labels) {
        if labels.is_empty() || self.labels.insert(agent.clone(), labels).is_some() {
            return;
        }
        self.order.push_back(agent.clone());
        if self.order.len() > REMOVALS_MAX
            && let Some(first) = self.order.pop_front()
        {
            self.labels.remove(&first);
        }
    }
}

/// What the policy says of one tenant's agents.
#[derive(Clone, Copy)]
pub(super) struct Rights<'a> {
    pub(super) policy: &'a dyn Policy,
    pub(super) agents: &'a Map<AgentId, Agent>,
    pub(super) departed: &'a Departed,
}

impl<'a> Rights<'a> {
    fn labels(&self, agent: &AgentId) -> &'a Labels {
        let seen = self.agents.get(agent).and_then(|agent| agent.seen.as_ref());
        let departed = || self.departed.labels.get(agent);
        seen.map(|seen| &seen.labels).or_else(departed).unwrap_or(&UNKNOWN)
    }

    /// Whether `who` may know of an agent.
    pub(super) fn sees(&self, who: &Identity, agent: &AgentId) -> bool {
        let agent = AgentRef { id: agent, labels: self.labels(agent) };
        self.policy.allows(who, Permission::Observe, &agent)
    }

    /// Whether `who` may do this to an agent, which it must see for that.
    pub(super) fn allows(&self, who: &Identity, permission: Permission, agent: &AgentId) -> bool {
        let known = AgentRef { id: agent, labels: self.labels(agent) };
        self.sees(who, agent) && self.policy.allows(who, permission, &known)
    }
}

impl Tenant {
    pub(super) fn rights<'a>(&'a self, wires: &'a Wires) -> Rights<'a> {
        Rights { policy: &*wires.policy, agents: &self.agents, departed: &self.departed }
    }

    /// Whether a dashboard may say this. Every message that is about an agent
    /// is in this table; a new one does not compile without its line.
    pub(super) fn permit(
        &self,
        wires: &Wires,
        who: &Identity,
        message: &DashboardToHub,
    ) -> Result<(), Refusal> {
        let rights = self.rights(wires);
        let agent = |permission, agent: &AgentId, field: String| {
            if rights.allows(who, permission, agent) {
                return Ok(());
            }
            Err(forbidden().field(field))
        };
        let command = |permission, id: &CommandId| {
            let command = self.commands.get(id).filter(|c| rights.sees(who, &c.request.agent));
            let command = command.ok_or_else(no_such_command)?;
            if rights.allows(who, permission, &command.request.agent) {
                return Ok(());
            }
            Err(forbidden().field("payload.command"))
        };
        match message {
            DashboardToHub::Subscribe(subscribe) => {
                for (n, terminal) in subscribe.terminals.iter().enumerate() {
                    if let Target::Agent(id) = &terminal.target {
                        agent(Permission::Observe, id, format!("payload.terminals[{n}].agent"))?;
                    }
                }
                Ok(())
            }
            DashboardToHub::Request(request) => {
                agent(Permission::Command, &request.agent, "payload.agent".into())
            }
            DashboardToHub::Interrupt(interrupt) => {
                command(Permission::Command, &interrupt.command)
            }
            DashboardToHub::Input(input) => command(Permission::Input, &input.command),
            DashboardToHub::Resize(resize) => command(Permission::Input, &resize.command),
            DashboardToHub::EmergencyStop(stop) => match &stop.agents {
                Some(agents) => {
                    for (n, id) in agents.iter().enumerate() {
                        agent(Permission::Administer, id, format!("payload.agents[{n}]"))?;
                    }
                    Ok(())
                }
                None => self.permit_stop(rights, who),
            },
            // These are about no agent, or about the link.
            DashboardToHub::Unsubscribe(_)
            | DashboardToHub::Shown(_)
            | DashboardToHub::Log(_)
            | DashboardToHub::Disconnect(_)
            | DashboardToHub::Ping(_)
            | DashboardToHub::Pong(_)
            | DashboardToHub::RefreshToken(_)
            | DashboardToHub::Error(_) => Ok(()),
        }
    }

    /// Stopping everything must not come to nothing without a word.
    fn permit_stop(&self, rights: Rights<'_>, who: &Identity) -> Result<(), Refusal> {
        let mut in_vain = false;
        for command in self.commands.values().filter(|command| !command.is_final()) {
            let agent = &command.request.agent;
            if rights.allows(who, Permission::Administer, agent) {
                return Ok(());
            }
            in_vain |= rights.sees(who, agent);
        }
        if in_vain { Err(forbidden()) } else { Ok(()) }
    }

    /// Whether an emergency stop by `who` reaches a command.
    pub(super) fn is_stopped(
        &self,
        wires: &Wires,
        who: &Identity,
        stop: &EmergencyStop,
        command: &Command,
    ) -> bool {
        let agent = &command.request.agent;
        stop.agents.as_ref().is_none_or(|agents| agents.contains(agent))
            && self.rights(wires).allows(who, Permission::Administer, agent)
    }

    /// A dashboard's rights are others now. It is shown the roster anew, what
    /// it may no longer read ends, and what it may read now of what it had
    /// asked for begins.
    pub(super) fn review(&mut self, wires: &mut Wires, id: LinkId) {
        let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) else {
            return;
        };
        dashboard.cursor = Cursor::fresh();
        wires.wake(id);
        let Some(dashboard) = wires.dashboard(id) else { return };
        let rights = self.rights(wires);
        let sees = |agent: &AgentId| rights.sees(&dashboard.identity, agent);
        let is_over = |target: &&Target| match target {
            Target::Agent(agent) => !sees(agent),
            Target::Command(command) => {
                self.commands.get(command).is_some_and(|known| !sees(&known.request.agent))
            }
        };
        let over: Vec<Target> = dashboard.subscription.keys().filter(is_over).cloned().collect();
        for target in over {
            self.end_subscription(wires, id, &target);
            wires.send(
                id,
                HubToDashboard::Refused(TerminalRefused {
                    target,
                    code: ErrorCode::Forbidden,
                    message: "no longer allowed".into(),
                }),
            );
        }
        let Some(dashboard) = wires.dashboard(id) else { return };
        for subscription in dashboard.subscription.values().cloned().collect::<Vec<_>>() {
            for stream in self.covered(&subscription) {
                self.open_reader(wires, id, stream, &subscription);
            }
        }
    }

    /// An agent has other labels than it had: whoever sees it now and did not,
    /// or the reverse, has other rights.
    pub(super) fn relabelled(&mut self, wires: &mut Wires, agent: &AgentId, before: &Labels) {
        self.relabelled_at = Some(self.ledger.revision());
        let links: Vec<LinkId> = self.dashboards.values().filter_map(|known| known.link).collect();
        for link in links {
            let Some(dashboard) = wires.dashboard(link) else { continue };
            let before = AgentRef { id: agent, labels: before };
            let saw = wires.policy.allows(&dashboard.identity, Permission::Observe, &before);
            if saw != self.rights(wires).sees(&dashboard.identity, agent) {
                self.review(wires, link);
            }
        }
    }

    /// The labels by which an agent was known until now.
    pub(super) fn take_labels(&mut self, agent: &AgentId) -> Labels {
        let known = self.agents.get_mut(agent).and_then(|agent| agent.seen.as_mut());
        match known {
            Some(seen) => std::mem::take(&mut seen.labels),
            None => self.departed.labels.get(agent).cloned().unwrap_or_default(),
        }
    }
}

fn forbidden() -> Refusal {
    Refusal::new(ErrorCode::Forbidden, "not allowed with these credentials")
}
