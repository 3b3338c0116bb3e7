//! Everything of one tenant. Nothing in here can name anything outside.

use std::collections::{BTreeSet, HashMap};

use trunkline_protocol::ids::{AgentId, CommandId, DashboardId, StreamId, TenantId};
use trunkline_protocol::message::{RosterPosition, Target};
use trunkline_protocol::roster::{Cursor, Ledger};

use super::Map;
use super::agents::Agent;
use super::commands::Command;
use super::dashboards::{Dashboard, Left};
use super::link::LinkId;
use super::logs::Logs;
use super::rights::Departed;
use super::streams::Stream;
use super::subjects::Subject;
use super::wires::Wires;

#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) id: TenantId,
    pub(super) ledger: Ledger,
    /// Dashboards that have read the whole roster and are to be woken by the
    /// next change.
    pub(super) followers: Vec<LinkId>,
    pub(super) agents: Map<AgentId, Agent>,
    pub(super) departed: Departed,
    /// The roster's revision when an agent's labels last changed: whoever has
    /// not read beyond it may have been shown too much or too little since.
    pub(super) relabelled_at: Option<u64>,
    pub(super) commands: HashMap<CommandId, Command>,
    /// Those that wait for their agents, in the order in which they were asked
    /// for.
    pub(super) waiting: BTreeSet<(u64, CommandId)>,
    /// Those that were given to agents and have no stream yet.
    pub(super) starting: BTreeSet<CommandId>,
    /// Those that have ended, in the same order.
    pub(super) finished: BTreeSet<(u64, CommandId)>,
    /// Those of them whose output is still here.
    pub(super) readable: BTreeSet<(u64, CommandId)>,
    /// Memory of all of them.
    pub(super) command_bytes: usize,
    pub(super) streams: Map<StreamId, Stream>,
    /// Memory of all of their logs.
    pub(super) log_bytes: usize,
    pub(super) dashboards: HashMap<DashboardId, Dashboard>,
    pub(super) left: Left,
    /// Those who the dashboards belong to.
    pub(super) subjects: HashMap<String, Subject>,
    /// The log records that its peers forward.
    pub(super) logs: Logs,
    /// Who reads the terminals of a target.
    pub(super) interests: HashMap<Target, Vec<LinkId>>,
    /// The place of the next command in its queue.
    pub(super) order: u64,
}

impl Tenant {
    pub(super) fn new(id: TenantId, wires: &Wires) -> Self {
        Self {
            id,
            ledger: Ledger::new(wires.hub),
            followers: Vec::new(),
            agents: Map::default(),
            departed: Departed::default(),
            relabelled_at: None,
            commands: HashMap::new(),
            waiting: BTreeSet::new(),
            starting: BTreeSet::new(),
            finished: BTreeSet::new(),
            readable: BTreeSet::new(),
            command_bytes: 0,
            streams: Map::default(),
            log_bytes: 0,
            dashboards: HashMap::new(),
            left: Left::default(),
            subjects: HashMap::new(),
            logs: Logs::default(),
            interests: HashMap::new(),
            order: 0,
        }
    }

    /// Where a dashboard goes on in the roster that says it stands at `since`.
    /// Who may see other agents than before begins anew.
    pub(super) fn cursor(&self, sees_as_before: bool, since: Option<RosterPosition>) -> Cursor {
        let since = since.filter(|at| sees_as_before && Some(at.revision) > self.relabelled_at);
        self.ledger.cursor(since)
    }

    /// Tells everyone who follows the roster that it has changed.
    pub(super) fn wake_followers(&mut self, wires: &mut Wires) {
        for id in std::mem::take(&mut self.followers) {
            if let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) {
                dashboard.follows = false;
                wires.wake(id);
            }
        }
    }
}
