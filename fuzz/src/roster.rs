//! A hub's roster and its readers against plain maps: whoever has read
//! everything knows what the maps hold, however often its link broke.

use std::collections::BTreeMap;

use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{AgentId, CommandId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentState, CommandState, HubToDashboard, QueueState, RosterPosition,
};
use trunkline_protocol::roster::{Cursor, Ledger, RosterReader};

use crate::names;
use crate::plan::Plan;

#[derive(Default)]
struct Model {
    agents: BTreeMap<AgentId, AgentState>,
    commands: BTreeMap<CommandId, CommandState>,
    queues: BTreeMap<AgentId, Vec<CommandId>>,
}

struct Reader {
    cursor: Cursor,
    roster: RosterReader,
}

/// Follows the plan.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let mut ledger = Ledger::new(names::hub(0));
    let mut model = Model::default();
    let fresh =
        |ledger: &Ledger| Reader { cursor: ledger.cursor(None), roster: RosterReader::default() };
    let mut readers = [fresh(&ledger), fresh(&ledger), fresh(&ledger)];
    let mut serial = 0;
    while !plan.is_over() {
        match plan.below(9) {
            0 => {
                let number = plan.below(4);
                let state = names::agent_state(plan, number);
                model.agents.insert(state.agent.clone(), state.clone());
                ledger.set_agent(state);
            }
            1 => {
                let state = names::command_state(plan);
                model.commands.insert(state.command, state.clone());
                ledger.set_command(state);
            }
            2 => {
                let agent = names::agent(plan.below(4));
                let commands = plan.list(3, names::command);
                if commands.is_empty() {
                    model.queues.remove(&agent);
                } else {
                    model.queues.insert(agent.clone(), commands.clone());
                }
                ledger.set_queue(QueueState { agent, commands });
            }
            3 => {
                let agent = names::agent(plan.below(4));
                model.agents.remove(&agent);
                model.queues.remove(&agent);
                ledger.remove_agent(&agent);
            }
            4 => {
                let command = names::command(plan);
                model.commands.remove(&command);
                ledger.remove_command(command);
            }
            5 => {
                // Many at once: snapshots of several pages, and more removals
                // than are remembered.
                let many = if plan.once_in(16) { 1500 } else { u16::from(plan.below(200)) };
                let stay = plan.once_in(3);
                for _ in 0..many {
                    serial += 1;
                    let id = CommandId::from_u128(0x1000 + serial);
                    let template = CommandState { command: id, ..names::command_state(plan) };
                    ledger.set_command(template.clone());
                    if stay && serial < 3000 {
                        model.commands.insert(id, template);
                    } else {
                        ledger.remove_command(id);
                    }
                }
            }
            6 => {
                // A link breaks, perhaps in the middle of a snapshot.
                let reader = &mut readers[usize::from(plan.below(3))];
                reader.roster.handle_link();
                let since = reader.roster.roster().position();
                reader.cursor = ledger.cursor(since);
            }
            _ => {
                let reader = &mut readers[usize::from(plan.below(3))];
                let reads = plan.byte();
                for _ in 0..reads {
                    if !reader.read(&mut ledger) {
                        break;
                    }
                }
                if !ledger.has_news(&reader.cursor) {
                    reader.compare(&model);
                }
            }
        }
    }
    let mut last = fresh(&ledger);
    for reader in readers.iter_mut().chain([&mut last]) {
        let mut reads = 0;
        while reader.read(&mut ledger) {
            reads += 1;
            assert!(reads < 20_000, "a reader catches up");
        }
        assert!(!ledger.has_news(&reader.cursor));
        reader.compare(&model);
    }
}

impl Reader {
    /// Reads one message; whether there was one.
    fn read(&mut self, ledger: &mut Ledger) -> bool {
        let Some(frame) = ledger.read(&mut self.cursor, |_| true) else { return false };
        assert!(matches!(frame, Frame::Text(_)));
        let rules = Rules::from(&Limits::default());
        let mut messages = codec::decode::<HubToDashboard>(&frame, rules);
        assert_eq!(messages.len(), 1);
        let message = messages.pop().expect("there is one").expect("the hub is understood").message;
        let before = self.roster.roster().position();
        match message {
            HubToDashboard::List(list) => drop(self.roster.handle_list(list)),
            HubToDashboard::Agent(changed) => drop(self.roster.handle_agent(changed)),
            HubToDashboard::Command(changed) | HubToDashboard::Complete(changed) => {
                drop(self.roster.handle_command(changed));
            }
            HubToDashboard::Queue(changed) => drop(self.roster.handle_queue(&changed)),
            other => panic!("a ledger does not say {other:?}"),
        }
        let after = self.roster.roster().position();
        let revision = |position: Option<RosterPosition>| position.map(|at| at.revision);
        assert!(revision(after) >= revision(before), "revisions do not go back");
        true
    }

    fn compare(&self, model: &Model) {
        let roster = self.roster.roster();
        assert!(roster.agents().map(AsRef::as_ref).eq(model.agents.values()), "agents");
        assert!(roster.commands().map(AsRef::as_ref).eq(model.commands.values()), "commands");
        for number in 0..4 {
            let agent = names::agent(number);
            let queue = model.queues.get(&agent).map_or(&[][..], Vec::as_slice);
            assert_eq!(roster.queue(&agent), queue, "queue of {agent}");
        }
    }
}
