//! What a returning agent says of itself: as much as a hub reads.
//!
//! A list that a hub refuses for its length would keep the agent out for ever.
//! So it is cut to what a message may be, what matters most first: commands
//! that have not ended, then ends that are not settled, then output that is
//! kept; and of each first that it is held, then what it was.
//!
//! A stranger's greeting is short. What it has no room for follows when the hub
//! has said that it knows who this is.

use trunkline_protocol::codec;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{CommandId, InstanceId};
use trunkline_protocol::limits::{GREETING_BYTES_MAX, Limits};
use trunkline_protocol::message::{
    AgentConnect, CommandExecute, CommandSpec, Envelope, Feature, Greeting, HeldCommand,
    HeldCommands, HubToAgent, PROTOCOLS, Run, Secret,
};

use super::AgentSetup;
use super::held::{Held, Stage};

/// Elements and members that one listed command has without its spec, rather
/// too many than too few.
const HELD_ITEMS: usize = 24;

/// About the length of a message that tells the rest; one command may be longer.
const PART_BYTES: usize = 64 * 1024;

/// Around the list: identity, capabilities, features.
const FRAME_ITEMS: usize = 256;

/// What is held, as it is listed for a hub that reads messages of `bytes_max`.
pub(super) fn list<'a>(
    held: impl Iterator<Item = (CommandId, &'a Held)>,
    bytes_max: usize,
) -> Vec<HeldCommand> {
    let items_max = Limits::default().json_items_max as usize;
    let mut list = List {
        // An eighth for what stands around it.
        bytes_left: bytes_max - bytes_max / 8,
        items_left: items_max - FRAME_ITEMS,
        commands: Vec::new(),
    };
    let mut held: Vec<_> = held.collect();
    held.sort_by_key(|(id, held)| (rank(held), *id));
    for (id, held) in &held {
        list.add(held.listed(*id));
    }
    for (id, held) in &held {
        if let Some(spec) = &held.spec {
            list.describe(*id, spec);
        }
    }
    list.commands
}

struct List {
    bytes_left: usize,
    items_left: usize,
    commands: Vec<HeldCommand>,
}

impl List {
    fn add(&mut self, held: HeldCommand) {
        let bytes = json_bytes(&held);
        if self.take(bytes, HELD_ITEMS) {
            self.commands.push(held);
        } else {
            tracing::warn!(target: "trunkline::client", command = %held.command, "more is held than a greeting may list");
        }
    }

    fn describe(&mut self, command: CommandId, spec: &CommandSpec) {
        let Some(at) = self.commands.iter().position(|held| held.command == command) else {
            return;
        };
        if self.take(spec_bytes(command, spec), spec_items(spec)) {
            self.commands[at].spec = Some(spec.clone());
        }
    }

    fn take(&mut self, bytes: usize, items: usize) -> bool {
        let fits = bytes <= self.bytes_left && items <= self.items_left;
        if fits {
            self.bytes_left -= bytes;
            self.items_left -= items;
        }
        fits
    }
}

fn rank(held: &Held) -> u8 {
    match &held.stage {
        Stage::Waiting | Stage::Recording { .. } | Stage::Offered | Stage::Running => 0,
        Stage::Ended { settled: None, .. } => 1,
        Stage::Ended { settled: Some(_), .. } => 2,
    }
}

/// How long it is as JSON, and a little more.
fn json_bytes(held: &HeldCommand) -> usize {
    let text = held.end.as_ref().and_then(|end| end.error.as_ref());
    // No character takes more than six bytes.
    768 + text.map_or(0, |text| 6 * text.chars().count())
}

fn spec_bytes(command: CommandId, spec: &CommandSpec) -> usize {
    let execute = CommandExecute { command, attempt: u32::MAX, spec: spec.clone() };
    codec::encode(&Envelope::bare(HubToAgent::Execute(execute))).len()
}

fn spec_items(spec: &CommandSpec) -> usize {
    let words = match &spec.run {
        Run::Argv(argv) => argv.len(),
        Run::Shell(_) | Run::Text(_) => 1,
    };
    // Each variable is a name and a value.
    16 + words + 2 * spec.env.len()
}

/// An agent's first words.
pub(super) fn greeting(
    setup: &AgentSetup,
    instance: InstanceId,
    token: Option<Secret>,
) -> AgentConnect {
    AgentConnect {
        protocols: PROTOCOLS.to_vec(),
        agent: setup.agent.clone(),
        instance,
        token,
        about: setup.about.clone(),
        slots: setup.slots.max(1),
        features: vec![Feature::Binary, Feature::Batch],
        commands: Vec::new(),
        more: false,
    }
}

/// Puts as much into the greeting as it has room for; returns the rest. What
/// the agent can do is cut rather than that no hub reads it.
pub(super) fn fill(greeting: &mut AgentConnect, mut held: Vec<HeldCommand>) -> Vec<HeldCommand> {
    let bare = loop {
        let bare = encode(AgentConnect { more: true, ..greeting.clone() }).len();
        let capabilities = &mut greeting.about.capabilities;
        if bare <= GREETING_BYTES_MAX || capabilities.pop().is_none() {
            break bare;
        }
        tracing::debug!(target: "trunkline::client", left = capabilities.len(), "a greeting has no room for all capabilities");
    };
    let fits = fitting(&held, GREETING_BYTES_MAX.saturating_sub(bare));
    let rest = held.split_off(fits);
    greeting.commands = held;
    greeting.more = !rest.is_empty();
    rest
}

/// What the greeting had no room for, in messages of a length that leaves room
/// for others in between.
pub(super) fn parts(mut rest: Vec<HeldCommand>) -> Vec<HeldCommands> {
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let fits = fitting(&rest, PART_BYTES).max(1);
        let after = rest.split_off(fits);
        parts.push(HeldCommands { commands: rest, more: !after.is_empty() });
        rest = after;
    }
    parts
}

/// How many of the first ones fit.
fn fitting(held: &[HeldCommand], mut bytes: usize) -> usize {
    let fits = |one: &&HeldCommand| {
        let spec = one.spec.as_ref().map_or(0, |spec| spec_bytes(one.command, spec));
        bytes.checked_sub(json_bytes(one) + spec).inspect(|left| bytes = *left).is_some()
    };
    held.iter().take_while(fits).count()
}

/// It, as it goes out.
pub(super) fn encode(greeting: AgentConnect) -> Frame {
    codec::encode(&Envelope::bare(Greeting::Agent(greeting)))
}
