//! The roster: who is there and what they run, as state with revisions.
//!
//! The hub keeps a [`Ledger`]: every entry stands at the revision of its last
//! change. A reader is one number, the revision up to which it has read; what
//! it has not seen is simply every entry above that number, newest value
//! only. A snapshot is the same walk from zero. Readers fold what they get
//! into a [`Roster`], which equals a fresh reader's once it has caught up.
//!
//! ```text
//!   ledger:   agent b@3   command x@5   queue b@6   (agent a removed)@7
//!   reader at 4 gets:     command x     queue b     agent a removed
//!   reader at 0, fresh, gets pages: [b, x, queue b], complete at 7
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::codec;
use crate::frame::Frame;
use crate::ids::{AgentId, CommandId, HubInstance};
use crate::message::{
    AgentChanged, AgentList, AgentState, CommandChanged, CommandState, Envelope, HubToDashboard,
    QueueChanged, QueueState, RosterPosition,
};

/// Removals that a ledger remembers, so that a reader who missed one is told
/// so; a reader who was away for longer gets a snapshot. About 100 bytes each.
pub const REMOVALS_MAX: usize = 4096;

/// Entries on one page of a snapshot, at most.
const PAGE_ENTRIES: usize = 128;

/// Entries looked at for one page, at most: a reader may be allowed to see few.
const PAGE_LOOKED_AT: usize = 4096;

/// Bytes on one page of a snapshot, roughly: far below any message limit.
const PAGE_BYTES: usize = 128 * 1024;

/// What a dashboard knows of the roster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Roster {
    position: Option<RosterPosition>,
    agents: BTreeMap<AgentId, Arc<AgentState>>,
    commands: BTreeMap<CommandId, Arc<CommandState>>,
    queues: BTreeMap<AgentId, Arc<[CommandId]>>,
}

impl Roster {
    /// Where its reader stands; `None` before the first complete snapshot.
    pub fn position(&self) -> Option<RosterPosition> {
        self.position
    }

    /// Every agent, by id.
    pub fn agents(&self) -> impl ExactSizeIterator<Item = &Arc<AgentState>> {
        self.agents.values()
    }

    /// One agent.
    pub fn agent(&self, id: &AgentId) -> Option<&Arc<AgentState>> {
        self.agents.get(id)
    }

    /// Every listed command, oldest first (ids are ordered by time).
    pub fn commands(&self) -> impl ExactSizeIterator<Item = &Arc<CommandState>> {
        self.commands.values()
    }

    /// One command.
    pub fn command(&self, id: CommandId) -> Option<&Arc<CommandState>> {
        self.commands.get(&id)
    }

    /// The commands waiting for an agent, next first.
    pub fn queue(&self, agent: &AgentId) -> &[CommandId] {
        self.queues.get(agent).map_or(&[], |queue| queue)
    }

    fn set_queue(&mut self, queue: &QueueState) {
        if queue.commands.is_empty() {
            self.queues.remove(&queue.agent);
        } else {
            self.queues.insert(queue.agent.clone(), queue.commands.as_slice().into());
        }
    }
}

/// What a message did to a roster.
#[derive(Debug, Clone, PartialEq)]
pub enum RosterEvent {
    /// An agent is new or changed.
    Agent(Arc<AgentState>),
    /// An agent is no longer listed.
    AgentRemoved(AgentId),
    /// A command is new or changed.
    Command(Arc<CommandState>),
    /// A command is no longer listed.
    CommandRemoved(CommandId),
    /// A queue changed.
    Queue(AgentId),
    /// A whole snapshot replaced everything.
    Replaced,
}

/// Folds what the hub says into a [`Roster`].
///
/// Pages of a snapshot gather aside and replace the roster when the last one
/// is there, so that nothing disappears in between. A link that breaks off
/// half-way leaves the old roster, and the old position to go on from.
#[derive(Debug, Clone, Default)]
pub struct RosterReader {
    roster: Arc<Roster>,
    gathering: Option<Roster>,
}

impl RosterReader {
    /// The roster as last known; cheap to clone.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// A link came up: a snapshot begun on another one will not be finished.
    pub fn handle_link(&mut self) {
        self.gathering = None;
    }

    /// Folds a page. Nothing changes to the eye before the last one.
    pub fn handle_list(&mut self, list: AgentList) -> Option<RosterEvent> {
        if list.reset {
            self.gathering = Some(Roster::default());
        }
        let gathering = self.gathering.as_mut()?;
        for agent in list.agents {
            gathering.agents.insert(agent.agent.clone(), Arc::new(agent));
        }
        for command in list.commands {
            gathering.commands.insert(command.command, Arc::new(command));
        }
        for queue in &list.queues {
            gathering.set_queue(queue);
        }
        if !list.complete {
            return None;
        }
        let mut whole = self.gathering.take()?;
        whole.position = Some(list.at);
        self.roster = Arc::new(whole);
        Some(RosterEvent::Replaced)
    }

    /// Whether a delta at `at` is new: not seen, and of the hub that the
    /// roster is of.
    fn advance(&mut self, at: RosterPosition) -> Option<&mut Roster> {
        let known = self.roster.position?;
        if self.gathering.is_some() || known.hub != at.hub || at.revision <= known.revision {
            return None;
        }
        let roster = Arc::make_mut(&mut self.roster);
        roster.position = Some(at);
        Some(roster)
    }

    /// Folds one agent.
    pub fn handle_agent(&mut self, changed: AgentChanged) -> Option<RosterEvent> {
        let roster = self.advance(changed.at)?;
        if let Some(id) = changed.removed {
            roster.agents.remove(&id);
            return Some(RosterEvent::AgentRemoved(id));
        }
        let agent = Arc::new(changed.agent?);
        roster.agents.insert(agent.agent.clone(), Arc::clone(&agent));
        Some(RosterEvent::Agent(agent))
    }

    /// Folds one command.
    pub fn handle_command(&mut self, changed: CommandChanged) -> Option<RosterEvent> {
        let roster = self.advance(changed.at)?;
        if let Some(id) = changed.removed {
            roster.commands.remove(&id);
            return Some(RosterEvent::CommandRemoved(id));
        }
        let command = Arc::new(changed.command?);
        roster.commands.insert(command.command, Arc::clone(&command));
        Some(RosterEvent::Command(command))
    }

    /// Folds one queue.
    pub fn handle_queue(&mut self, changed: &QueueChanged) -> Option<RosterEvent> {
        let roster = self.advance(changed.at)?;
        roster.set_queue(&changed.queue);
        Some(RosterEvent::Queue(changed.queue.agent.clone()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Agent(AgentId),
    Command(CommandId),
    Queue(AgentId),
}

#[derive(Debug, PartialEq)]
enum Value {
    Agent(AgentState),
    Command(CommandState),
    Queue(QueueState),
    /// It was about this agent.
    Removed(AgentId),
}

impl Value {
    /// The agent that it is about.
    fn agent(&self) -> &AgentId {
        match self {
            Self::Agent(agent) => &agent.agent,
            Self::Command(command) => &command.agent,
            Self::Queue(queue) => &queue.agent,
            Self::Removed(agent) => agent,
        }
    }
}

#[derive(Debug)]
struct Entry {
    key: Key,
    value: Value,
    /// The change as a message, encoded once for every reader.
    frame: Option<Bytes>,
}

/// The hub's roster of one tenant.
#[derive(Debug)]
pub struct Ledger {
    hub: HubInstance,
    revision: u64,
    /// A reader below this may have missed a removal that is forgotten.
    floor: u64,
    entries: BTreeMap<u64, Entry>,
    at: HashMap<Key, u64>,
    removals: std::collections::VecDeque<u64>,
}

/// Where a reader of a [`Ledger`] stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    read: u64,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Needs a snapshot, and has nothing of it yet.
    Fresh,
    /// Has a part of a snapshot. Pages do not tell what was removed: `removed`
    /// is the first removal since the snapshot `began`, of an entry that may
    /// stand on an earlier page.
    Paging { began: u64, removed: Option<u64> },
    /// Has a whole roster and follows it.
    Following,
}

impl Cursor {
    /// A cursor for a reader that needs everything anew: a snapshot takes the
    /// place of what it has.
    pub const fn fresh() -> Self {
        Self { read: 0, phase: Phase::Fresh }
    }
}

impl Ledger {
    /// An empty roster, counted by this hub.
    pub fn new(hub: HubInstance) -> Self {
        Self {
            hub,
            revision: 0,
            floor: 0,
            entries: BTreeMap::new(),
            at: HashMap::new(),
            removals: std::collections::VecDeque::new(),
        }
    }

    /// The revision of the last change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Lists an agent as it now is.
    pub fn set_agent(&mut self, agent: AgentState) {
        self.put(Key::Agent(agent.agent.clone()), Value::Agent(agent));
    }

    /// Lists a command as it now is.
    pub fn set_command(&mut self, command: CommandState) {
        self.put(Key::Command(command.command), Value::Command(command));
    }

    /// Lists a queue as it now is; an empty one is no longer listed.
    pub fn set_queue(&mut self, queue: QueueState) {
        let key = Key::Queue(queue.agent.clone());
        if queue.commands.is_empty() {
            self.remove(key);
        } else {
            self.put(key, Value::Queue(queue));
        }
    }

    /// No longer lists an agent, nor its queue.
    pub fn remove_agent(&mut self, agent: &AgentId) {
        self.remove(Key::Queue(agent.clone()));
        self.remove(Key::Agent(agent.clone()));
    }

    /// No longer lists a command.
    pub fn remove_command(&mut self, command: CommandId) {
        self.remove(Key::Command(command));
    }

    fn remove(&mut self, key: Key) {
        let listed = self.at.get(&key).and_then(|at| self.entries.get(at));
        let Some(entry) = listed.filter(|entry| !matches!(entry.value, Value::Removed(_))) else {
            return;
        };
        let agent = entry.value.agent().clone();
        self.put(key, Value::Removed(agent));
        self.removals.push_back(self.revision);
        while self.removals.len() > REMOVALS_MAX {
            let Some(revision) = self.removals.pop_front() else { return };
            // A removal may have been superseded: the key is listed again.
            if let Some(entry) = self.entries.remove(&revision) {
                self.at.remove(&entry.key);
                self.floor = revision;
            }
        }
    }

    fn put(&mut self, key: Key, value: Value) {
        let listed = self.at.get(&key).and_then(|at| self.entries.get(at));
        if listed.is_some_and(|entry| entry.value == value) {
            return;
        }
        self.revision += 1;
        if let Some(old) = self.at.insert(key.clone(), self.revision) {
            self.entries.remove(&old);
        }
        self.entries.insert(self.revision, Entry { key, value, frame: None });
    }

    /// A cursor for a reader that says it stands at `since`.
    pub fn cursor(&self, since: Option<RosterPosition>) -> Cursor {
        match since {
            Some(at)
                if at.hub == self.hub && (self.floor..=self.revision).contains(&at.revision) =>
            {
                Cursor { read: at.revision, phase: Phase::Following }
            }
            Some(_) | None => Cursor::fresh(),
        }
    }

    /// Whether `cursor` has something to read.
    pub fn has_news(&self, cursor: &Cursor) -> bool {
        cursor.phase != Phase::Following || cursor.read < self.revision
    }

    /// The next message for a reader, if it has not read everything. The
    /// cursor moves past it.
    ///
    /// `sees` says of which agents the reader may know; of another it hears
    /// nothing. When the answer changes for an entry that the reader has been
    /// past, it needs a [fresh](Cursor::fresh) cursor.
    pub fn read(&mut self, cursor: &mut Cursor, sees: impl Fn(&AgentId) -> bool) -> Option<Frame> {
        if cursor.phase != Phase::Fresh && cursor.read < self.floor {
            // It was so slow that a removal it has not read is forgotten.
            *cursor = Cursor::fresh();
        }
        if cursor.phase != Phase::Following {
            return Some(self.page(cursor, sees));
        }
        let hub = self.hub;
        let mut news = self.entries.range_mut(cursor.read + 1..);
        let Some((&revision, entry)) = news.find(|(_, entry)| sees(entry.value.agent())) else {
            // What lay between was superseded and has been read since.
            cursor.read = self.revision;
            return None;
        };
        cursor.read = revision;
        let at = RosterPosition { hub, revision };
        let frame = entry.frame.get_or_insert_with(|| encode_change(at, &entry.key, &entry.value));
        Some(Frame::Text(frame.clone()))
    }

    fn page(&mut self, cursor: &mut Cursor, sees: impl Fn(&AgentId) -> bool) -> Frame {
        let (began, mut removed) = match cursor.phase {
            Phase::Paging { began, removed } => (began, removed),
            Phase::Fresh | Phase::Following => (self.revision, None),
        };
        let mut list = AgentList {
            at: RosterPosition { hub: self.hub, revision: self.revision },
            reset: cursor.phase == Phase::Fresh,
            complete: true,
            agents: Vec::new(),
            commands: Vec::new(),
            queues: Vec::new(),
        };
        let (mut bytes, mut entries) = (0, 0);
        for (looked_at, (&revision, entry)) in self.entries.range(cursor.read + 1..).enumerate() {
            if entries >= PAGE_ENTRIES || bytes >= PAGE_BYTES || looked_at >= PAGE_LOOKED_AT {
                list.complete = false;
                break;
            }
            cursor.read = revision;
            list.at.revision = revision;
            if !sees(entry.value.agent()) {
                continue;
            }
            entries += 1;
            match &entry.value {
                Value::Agent(agent) => {
                    bytes +=
                        512 + agent.report.figures.len() * 40 + agent.about.capabilities.len() * 40;
                    list.agents.push(agent.clone());
                }
                Value::Command(command) => {
                    bytes += 700 + command.title.len();
                    list.commands.push(command.clone());
                }
                Value::Queue(queue) => {
                    bytes += 64 + queue.commands.len() * 40;
                    list.queues.push(queue.clone());
                }
                Value::Removed(_) if revision > began => {
                    removed.get_or_insert(revision);
                }
                Value::Removed(_) => {}
            }
        }
        if list.complete {
            // Removals since the snapshot began follow as changes.
            cursor.read = removed.map_or(self.revision, |first| first - 1);
            cursor.phase = Phase::Following;
            list.at.revision = cursor.read;
        } else {
            cursor.phase = Phase::Paging { began, removed };
        }
        codec::encode(&Envelope::bare(HubToDashboard::List(list)))
    }
}

fn encode_change(at: RosterPosition, key: &Key, value: &Value) -> Bytes {
    let message = match (key, value) {
        (_, Value::Agent(agent)) => {
            HubToDashboard::Agent(AgentChanged { at, agent: Some(agent.clone()), removed: None })
        }
        (_, Value::Command(command)) => {
            let is_final = command.status.is_final();
            let changed = CommandChanged { at, command: Some(command.clone()), removed: None };
            if is_final {
                HubToDashboard::Complete(changed)
            } else {
                HubToDashboard::Command(changed)
            }
        }
        (_, Value::Queue(queue)) => {
            HubToDashboard::Queue(QueueChanged { at, queue: queue.clone() })
        }
        (Key::Agent(id), Value::Removed(_)) => {
            HubToDashboard::Agent(AgentChanged { at, agent: None, removed: Some(id.clone()) })
        }
        (Key::Command(id), Value::Removed(_)) => {
            HubToDashboard::Command(CommandChanged { at, command: None, removed: Some(*id) })
        }
        (Key::Queue(id), Value::Removed(_)) => HubToDashboard::Queue(QueueChanged {
            at,
            queue: QueueState { agent: id.clone(), commands: Vec::new() },
        }),
    };
    match codec::encode(&Envelope::bare(message)) {
        Frame::Text(bytes) | Frame::Binary(bytes) => bytes,
        Frame::Close(_) => Bytes::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{Rules, decode};
    use crate::ids::InstanceId;
    use crate::limits::Limits;
    use crate::message::{AgentAbout, AgentReport, CommandStatus, Presence, Priority};

    fn agent(id: u8, since_ms: u64) -> AgentState {
        AgentState {
            agent: format!("a{id}").parse().unwrap(),
            presence: Presence::Online,
            since_ms,
            instance: InstanceId::from_u128(1),
            about: AgentAbout::default(),
            slots: 1,
            running: 0,
            report: AgentReport::default(),
        }
    }

    fn command(id: u8, requested_at_ms: u64) -> CommandState {
        CommandState {
            command: CommandId::from_u128(id.into()),
            agent: agent(id, 0).agent,
            status: if id.is_multiple_of(2) {
                CommandStatus::Queued
            } else {
                CommandStatus::Completed
            },
            attempt: 0,
            title: "ls".into(),
            priority: Priority::Normal,
            requested_by: None,
            requested_at_ms,
            started_at_ms: None,
            ended_at_ms: None,
            stream: None,
            interrupt: None,
            end: None,
        }
    }

    fn fold(reader: &mut RosterReader, frame: &Frame) {
        for message in decode::<HubToDashboard>(frame, Rules::from(&Limits::default())) {
            match message.unwrap().message {
                HubToDashboard::List(list) => drop(reader.handle_list(list)),
                HubToDashboard::Agent(changed) => drop(reader.handle_agent(changed)),
                HubToDashboard::Command(changed) | HubToDashboard::Complete(changed) => {
                    drop(reader.handle_command(changed));
                }
                HubToDashboard::Queue(changed) => drop(reader.handle_queue(&changed)),
                other => panic!("not of the roster: {other:?}"),
            }
        }
    }

    fn catch_up(ledger: &mut Ledger, cursor: &mut Cursor, reader: &mut RosterReader) {
        catch_up_on(ledger, cursor, reader, all);
    }

    fn catch_up_on(
        ledger: &mut Ledger,
        cursor: &mut Cursor,
        reader: &mut RosterReader,
        sees: impl Fn(&AgentId) -> bool,
    ) {
        while let Some(frame) = ledger.read(cursor, &sees) {
            fold(reader, &frame);
        }
        assert!(!ledger.has_news(cursor));
    }

    fn all(_: &AgentId) -> bool {
        true
    }

    /// A reader that may know of some agents only.
    fn some(agent: &AgentId) -> bool {
        agent.as_str() < "a3"
    }

    fn fresh(ledger: &mut Ledger) -> Arc<Roster> {
        let mut reader = RosterReader::default();
        let mut cursor = ledger.cursor(None);
        catch_up(ledger, &mut cursor, &mut reader);
        Arc::clone(reader.roster())
    }

    #[derive(Debug, Clone)]
    enum Act {
        Agent(u8, u64),
        Command(u8, u64),
        Queue(u8, Vec<u8>),
        RemoveAgent(u8),
        RemoveCommand(u8),
        Read(u8),
        Reconnect(bool),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (0..6u8, any::<u64>()).prop_map(|(a, b)| Act::Agent(a, b >> 20)),
            4 => (0..6u8, any::<u64>()).prop_map(|(a, b)| Act::Command(a, b >> 20)),
            2 => (0..6u8, prop::collection::vec(0..6u8, 0..4)).prop_map(|(a, b)| Act::Queue(a, b)),
            1 => (0..6u8).prop_map(Act::RemoveAgent),
            1 => (0..6u8).prop_map(Act::RemoveCommand),
            4 => (0..4u8).prop_map(Act::Read),
            1 => any::<bool>().prop_map(Act::Reconnect),
        ]
    }

    proptest! {
        #[test]
        fn a_reader_that_has_caught_up_equals_a_fresh_one(acts in prop::collection::vec(act(), 0..80)) {
            let mut ledger = Ledger::new(HubInstance::from_u128(1));
            let mut reader = RosterReader::default();
            let mut cursor = ledger.cursor(None);
            let mut narrow = (RosterReader::default(), Cursor::fresh());
            for act in acts {
                match act {
                    Act::Agent(id, since) => ledger.set_agent(agent(id, since)),
                    Act::Command(id, at) => ledger.set_command(command(id, at)),
                    Act::Queue(id, commands) => ledger.set_queue(QueueState {
                        agent: agent(id, 0).agent,
                        commands: commands.iter().map(|c| CommandId::from_u128((*c).into())).collect(),
                    }),
                    Act::RemoveAgent(id) => ledger.remove_agent(&agent(id, 0).agent),
                    Act::RemoveCommand(id) => ledger.remove_command(CommandId::from_u128(id.into())),
                    Act::Read(n) => for _ in 0..n {
                        if let Some(frame) = ledger.read(&mut cursor, all) {
                            fold(&mut reader, &frame);
                        }
                        if let Some(frame) = ledger.read(&mut narrow.1, some) {
                            fold(&mut narrow.0, &frame);
                        }
                    },
                    Act::Reconnect(with_position) => {
                        reader.handle_link();
                        let since = reader.roster().position().filter(|_| with_position);
                        cursor = ledger.cursor(since);
                        narrow.0.handle_link();
                        let since = narrow.0.roster().position().filter(|_| with_position);
                        narrow.1 = ledger.cursor(since);
                    }
                }
            }
            catch_up(&mut ledger, &mut cursor, &mut reader);
            prop_assert_eq!(reader.roster(), &fresh(&mut ledger));
            catch_up_on(&mut ledger, &mut narrow.1, &mut narrow.0, some);
            let (whole, part) = (reader.roster(), narrow.0.roster());
            prop_assert!(part.agents().eq(whole.agents().filter(|a| some(&a.agent))));
            prop_assert!(part.commands().eq(whole.commands().filter(|c| some(&c.agent))));
            for id in 0..6 {
                let id = agent(id, 0).agent;
                let queue = if some(&id) { whole.queue(&id) } else { &[] };
                prop_assert_eq!(part.queue(&id), queue);
            }
        }
    }

    #[test]
    fn only_the_newest_value_waits() {
        let mut ledger = Ledger::new(HubInstance::from_u128(1));
        let mut cursor = ledger.cursor(None);
        let mut reader = RosterReader::default();
        catch_up(&mut ledger, &mut cursor, &mut reader);
        for since in 0..1000 {
            ledger.set_agent(agent(1, since));
        }
        fold(&mut reader, &ledger.read(&mut cursor, all).unwrap());
        assert_eq!(reader.roster().agents().next().unwrap().since_ms, 999);
        assert!(ledger.read(&mut cursor, all).is_none());
    }

    #[test]
    fn nothing_disappears_while_a_snapshot_arrives() {
        let mut ledger = Ledger::new(HubInstance::from_u128(1));
        for id in 0..=255 {
            ledger.set_command(command(id, 0));
        }
        let mut reader = RosterReader::default();
        let mut cursor = ledger.cursor(None);
        catch_up(&mut ledger, &mut cursor, &mut reader);
        let mut again = ledger.cursor(None);
        let first = ledger.read(&mut again, all).unwrap();
        fold(&mut reader, &first);
        assert_eq!(reader.roster().commands().len(), 256, "half a snapshot is not shown");
    }

    #[test]
    fn what_is_removed_while_a_snapshot_arrives_is_not_shown_for_ever() {
        let mut ledger = Ledger::new(HubInstance::from_u128(1));
        for id in 0..=255 {
            ledger.set_command(command(id, 0));
        }
        let mut reader = RosterReader::default();
        let mut cursor = ledger.cursor(None);
        fold(&mut reader, &ledger.read(&mut cursor, all).unwrap());
        ledger.remove_command(CommandId::from_u128(0));
        ledger.set_command(command(1, 7));
        catch_up(&mut ledger, &mut cursor, &mut reader);
        assert_eq!(reader.roster(), &fresh(&mut ledger));
    }

    #[test]
    fn a_reader_that_missed_forgotten_removals_gets_a_snapshot() {
        let mut ledger = Ledger::new(HubInstance::from_u128(1));
        ledger.set_agent(agent(1, 0));
        let mut reader = RosterReader::default();
        let mut cursor = ledger.cursor(None);
        catch_up(&mut ledger, &mut cursor, &mut reader);
        ledger.remove_agent(&agent(1, 0).agent);
        for i in 0..=REMOVALS_MAX {
            let id = CommandId::from_u128(i as u128);
            ledger.set_command(CommandState { command: id, ..command(0, 0) });
            ledger.remove_command(id);
        }
        assert!(ledger.entries.len() <= REMOVALS_MAX + 1);
        let since = reader.roster().position();
        assert_eq!(ledger.cursor(since).phase, Phase::Fresh);
        catch_up(&mut ledger, &mut cursor, &mut reader);
        assert_eq!(reader.roster().agents().len(), 0);
    }
}
