//! The clock, the cables, and everyone on them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_client::core::agent::{AgentCore, AgentSetup};
use trunkline_client::core::dashboard::{
    DashboardCore, DashboardSetup, ReaderId, Reading, RequestError,
};
use trunkline_client::core::dialing::{ConnectionState, DialAction};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{
    CommandId, HubInstance, InstanceId, QueueEpoch, RequestId, StreamId, TenantId,
};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    Accepted, CommandInterrupt, CommandRequest, CommandSpec, CommandState, CommandStatus,
    DashboardToHub, EmergencyStop, HubToAgent, Priority, Run, Secret, Target,
};
use trunkline_protocol::roster::Roster;
use trunkline_protocol::time::Now;
use trunkline_server::core::{Core, Effect, LinkId, Setup, Stats};
use trunkline_server::hooks::{LogChange, LogError, Policy, QueueChange, QueueError, WholeTenant};
use trunkline_server::{AuthError, Identity, MemoryStreamLog, Role};

use crate::agent::{AgentNode, SimJournal};
use crate::cable::Cable;
use crate::dashboard::DashboardNode;
use crate::disk::Queue;
use crate::observed::Observed;

/// Who is at the other end of a cable.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Peer {
    /// An agent, by number.
    Agent(usize),
    /// A dashboard, by number.
    Dashboard(usize),
}

/// What a hub that starts again still knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Memory {
    /// Its queue.
    Kept,
    /// Nothing.
    Lost,
}

/// What becomes of a change given to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Storage {
    /// It is stored.
    Works,
    /// It is not stored, and the hub hears so.
    Fails,
    /// It is stored, and the hub hears that it failed: so looks a time-out.
    Lies,
    /// Any of these.
    Whims,
}

impl Storage {
    /// Whether a change is stored, and whether the hub hears that it is.
    fn does(self, rng: &mut StdRng) -> (bool, bool) {
        match self {
            Self::Works => (true, true),
            Self::Fails => (false, false),
            Self::Lies => (true, false),
            Self::Whims => {
                let stores = rng.random();
                (stores, stores && rng.random())
            }
        }
    }
}

#[derive(Debug)]
enum Event {
    Dialed(Peer),
    Authenticated(LinkId, Result<Identity, AuthError>),
    Store(TenantId, CommandId, QueueChange),
    Forget(QueueChange),
    Keep(Vec<LogChange>),
    /// An end of a cable learns that it is gone.
    Notice(u64, bool),
}

/// What the wall clock says when time begins.
const EPOCH_MS: u64 = 1_700_000_000_000;

/// Everything.
#[derive(Debug)]
pub struct World {
    /// For reports: the seed that it all came from.
    pub seed: u64,
    now: Duration,
    rng: StdRng,
    limits: Limits,
    policy: Arc<dyn Policy>,
    hub: Option<Core>,
    /// What the present hub has told its observer.
    pub observed: Observed,
    queue: Queue,
    stream_log: Option<MemoryStreamLog>,
    /// What hubs have dropped from it.
    pub dropped: BTreeSet<StreamId>,
    /// Attempts for which a hub had to have room: it leased a command for them.
    pub leases: usize,
    awake: BTreeSet<LinkId>,
    /// The simulated processes.
    pub agents: Vec<AgentNode>,
    /// The simulated views.
    pub dashboards: Vec<DashboardNode>,
    cables: BTreeMap<u64, Cable>,
    cables_made: u64,
    agenda: BTreeMap<(Duration, u64), Event>,
    serial: u64,
    /// No new cable can be had by these.
    unreachable: BTreeSet<Peer>,
    /// How long a frame takes.
    pub latency: Duration,
    /// How long hooks take.
    pub hook_delay: Duration,
    /// How the queue behaves.
    pub storage: Storage,
    /// How the stream log behaves.
    pub log_storage: Storage,
    /// The authenticator cannot answer as long as this is set.
    pub auth_fails: bool,
    /// Who the authenticator says that a peer is, where that is not everybody's
    /// default.
    pub identities: BTreeMap<Peer, Identity>,
    /// Whose source of tokens has none while it stands here.
    pub without_tokens: BTreeSet<Peer>,
    /// How far the wall clock is off, in milliseconds, and whether it ever
    /// jumped.
    clock_skew_ms: i64,
    clock_jumped: bool,
    /// How often the hub was killed, and how often it lost its queue with that.
    pub kills: u32,
    /// How often it lost its queue with that.
    pub era: u32,
    /// The same for each hub that there was.
    eras: BTreeMap<HubInstance, u32>,
    /// When the hub last tried to store each command as new.
    pub accepted: BTreeMap<CommandId, Duration>,
    /// Changes that are under way to the queue.
    storing: BTreeMap<CommandId, u32>,
    /// When the queue was last written for each command.
    stored: BTreeMap<CommandId, Duration>,
    /// Commands of which the queue has told the present hub that it failed.
    doubted: BTreeSet<CommandId>,
    /// How often the present hub may put something out, an effect or a frame,
    /// before it dies; and whether what it has given its disks is on them then.
    pub hub_dies_after: Option<(u64, bool)>,
    /// Who goes over to another cable when so many frames more have arrived, at
    /// either end of its present one.
    pub goes_over: BTreeMap<Peer, u64>,
    /// How often somebody did.
    pub went_over: u32,
    /// A digest of all frames that arrived, and when.
    pub fingerprint: u64,
    /// Whether to print what crosses the cables.
    pub traced: bool,
    /// How often something happened at the present time.
    still: (Duration, u32),
}

/// The part that both cores have in common.
trait Driven {
    fn dialed(&mut self, now: Now);
    fn dial_failed(&mut self, close: &Close, now: Now);
    fn frame(&mut self, frame: &Frame, now: Now);
    fn lost(&mut self, close: &Close, now: Now);
    fn timeout(&mut self, now: Now);
    fn dial(&mut self) -> Option<DialAction>;
    fn transmit(&mut self, now: Now) -> Option<Frame>;
    fn due(&self, now: Now) -> Option<Duration>;
}

macro_rules! driven {
    ($core:ty, |$this:ident, $now:ident| $deadline:expr) => {
        impl Driven for $core {
            fn dialed(&mut self, now: Now) {
                self.handle_dialed(Some(Secret::new("token")), now);
            }
            fn dial_failed(&mut self, close: &Close, now: Now) {
                self.handle_dial_failed(close, now);
            }
            fn frame(&mut self, frame: &Frame, now: Now) {
                self.handle_frame(frame, now);
            }
            fn lost(&mut self, close: &Close, now: Now) {
                self.handle_lost(close, now);
            }
            fn timeout(&mut self, now: Now) {
                self.handle_timeout(now);
            }
            fn dial(&mut self) -> Option<DialAction> {
                self.poll_dial()
            }
            fn transmit(&mut self, now: Now) -> Option<Frame> {
                self.poll_transmit(now)
            }
            fn due(&self, now: Now) -> Option<Duration> {
                let ($this, $now) = (self, now);
                $deadline
            }
        }
    };
}

driven!(AgentCore, |core, _now| core.deadline());
driven!(DashboardCore, |core, now| core.deadline(now));

/// The stream log does this.
fn keep(log: &MemoryStreamLog, changes: &[LogChange], dropped: &mut BTreeSet<StreamId>) {
    for change in changes {
        log.store(change);
        if let LogChange::Dropped { stream, .. } = change {
            dropped.insert(*stream);
        }
    }
}

impl World {
    /// A hub with default limits, and nobody else yet.
    pub fn new(seed: u64) -> Self {
        Self::with_limits(seed, Limits::default())
    }

    /// A hub with these limits, and nobody else yet.
    pub fn with_limits(seed: u64, limits: Limits) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let queue = Queue::memory(QueueEpoch::from_u128(rng.random()));
        let mut world = Self {
            seed,
            now: Duration::ZERO,
            rng,
            limits,
            policy: Arc::new(WholeTenant),
            hub: None,
            observed: Observed::default(),
            queue,
            stream_log: None,
            dropped: BTreeSet::new(),
            leases: 0,
            awake: BTreeSet::new(),
            agents: Vec::new(),
            dashboards: Vec::new(),
            cables: BTreeMap::new(),
            cables_made: 0,
            agenda: BTreeMap::new(),
            serial: 0,
            unreachable: BTreeSet::new(),
            latency: Duration::from_millis(5),
            hook_delay: Duration::from_millis(1),
            storage: Storage::Works,
            log_storage: Storage::Works,
            auth_fails: false,
            identities: BTreeMap::new(),
            without_tokens: BTreeSet::new(),
            clock_skew_ms: 0,
            clock_jumped: false,
            kills: 0,
            era: 0,
            eras: BTreeMap::new(),
            accepted: BTreeMap::new(),
            storing: BTreeMap::new(),
            stored: BTreeMap::new(),
            doubted: BTreeSet::new(),
            hub_dies_after: None,
            goes_over: BTreeMap::new(),
            went_over: 0,
            fingerprint: 0,
            traced: false,
            still: (Duration::ZERO, 0),
        };
        world.start_hub(Memory::Kept);
        world
    }

    /// The time, on both clocks.
    pub fn now(&self) -> Now {
        let millis = u64::try_from(self.now.as_millis()).expect("a world does not last that long");
        let wall_ms = (EPOCH_MS + millis).saturating_add_signed(self.clock_skew_ms);
        Now { monotonic: self.now, wall_ms }
    }

    // ---- who is there ---------------------------------------------------

    /// A new agent process called `name`; its number.
    pub fn agent(&mut self, name: &str) -> usize {
        self.agent_with(name, |_| {})
    }

    /// The same, with changes to its setup.
    pub fn agent_with(&mut self, name: &str, change: impl FnOnce(&mut AgentSetup)) -> usize {
        self.agent_of(name, None, change)
    }

    /// A new agent process with a journal; its number.
    pub fn agent_with_journal(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut AgentSetup),
    ) -> usize {
        let journal = SimJournal::new(InstanceId::from_u128(self.rng.random()));
        self.agent_of(name, Some(journal), change)
    }

    /// A new agent process, perhaps with a journal, with changes to its setup.
    pub fn agent_of(
        &mut self,
        name: &str,
        journal: Option<SimJournal>,
        change: impl FnOnce(&mut AgentSetup),
    ) -> usize {
        let mut setup = AgentSetup::new(name.parse().expect("a name"));
        setup.can_renew_token = true;
        change(&mut setup);
        setup.journal = journal.as_ref().map(SimJournal::recovered);
        let core = AgentCore::new(setup.clone(), self.rng.random(), self.now());
        self.agents.push(AgentNode::new(setup, core, journal));
        self.agents.len() - 1
    }

    /// A new dashboard; its number.
    pub fn dashboard(&mut self) -> usize {
        let setup = DashboardSetup { can_renew: true, ..DashboardSetup::default() };
        let core = DashboardCore::new(setup, self.rng.random(), self.now());
        self.dashboards.push(DashboardNode::new(core));
        self.dashboards.len() - 1
    }

    /// The agent's process dies without a word.
    pub fn crash_agent(&mut self, agent: usize) {
        let peer = Peer::Agent(agent);
        self.agents[agent].crash();
        self.agenda.retain(|_, event| !matches!(event, Event::Dialed(who) if *who == peer));
        self.cut(peer);
    }

    /// A new process takes the place of a crashed agent, and finds its journal
    /// if it had one.
    pub fn restart_agent(&mut self, agent: usize) {
        let mut setup = self.agents[agent].setup.clone();
        setup.journal = self.agents[agent].journal.as_ref().map(SimJournal::recovered);
        let core = AgentCore::new(setup, self.rng.random(), self.now());
        self.agents[agent].core = Some(core);
    }

    /// The hub's process dies without a word.
    pub fn kill_hub(&mut self) {
        self.hub = None;
        self.kills += 1;
        self.storing.clear();
        self.doubted.clear();
        self.awake.clear();
        self.agenda.retain(|_, event| matches!(event, Event::Dialed(_) | Event::Notice(..)));
        for (id, cable) in &mut self.cables {
            cable.at_hub = false;
            self.serial += 1;
            self.agenda
                .insert((self.now + cable.down.latency, self.serial), Event::Notice(*id, false));
        }
    }

    /// Whether the hub's time has come, before it puts something out.
    fn hub_dies(&mut self) -> bool {
        let Some((left, is_on_disk)) = &mut self.hub_dies_after else { return false };
        if let Some(less) = left.checked_sub(1) {
            *left = less;
            return false;
        }
        if *is_on_disk {
            for event in self.agenda.values() {
                match event {
                    Event::Store(_, _, change) | Event::Forget(change) => self.queue.store(change),
                    Event::Keep(changes) => {
                        let log = self.stream_log.as_ref().expect("the hub was told of one");
                        keep(log, changes, &mut self.dropped);
                    }
                    Event::Dialed(_) | Event::Authenticated(..) | Event::Notice(..) => {}
                }
            }
        }
        self.hub_dies_after = None;
        self.kill_hub();
        true
    }

    /// A new hub process.
    pub fn start_hub(&mut self, memory: Memory) {
        assert!(self.hub.is_none(), "there is a hub");
        if memory == Memory::Lost {
            self.era += 1;
            let epoch = QueueEpoch::from_u128(self.rng.random());
            self.queue = self.queue.another(epoch);
        }
        self.queue.reopen();
        let setup = Setup {
            limits: self.limits.clone(),
            policy: Arc::clone(&self.policy),
            hub: HubInstance::from_u128(self.rng.random()),
            epoch: self.queue.epoch(),
            seed: self.rng.random(),
            stored: self.queue.stored(),
            streams: self.stream_log.as_ref().map(MemoryStreamLog::stored),
        };
        self.eras.insert(setup.hub, self.era);
        self.hub = Some(Core::new(setup, self.now()));
        self.observed = Observed::default();
    }

    /// The hub is another from the beginning: one with this queue.
    pub fn keep_commands(&mut self, queue: Queue) {
        assert!(self.cables.is_empty(), "it is early enough");
        self.queue = queue;
        self.hub = None;
        self.start_hub(Memory::Kept);
    }

    /// Whether the hub's output outlives it.
    pub fn keeps_output(&self) -> bool {
        self.stream_log.is_some()
    }

    /// The hub is another from the beginning: one with this policy.
    pub fn set_policy(&mut self, policy: impl Policy) {
        assert!(self.cables.is_empty(), "it is early enough");
        self.policy = Arc::new(policy);
        self.hub = None;
        self.start_hub(Memory::Kept);
    }

    /// The hub ends all links of a subject; how many those were.
    pub fn revoke(&mut self, tenant: &str, subject: &str) -> usize {
        let now = self.now();
        let tenant = tenant.parse().expect("a name");
        let ended = self.hub.as_mut().map(|hub| hub.handle_revoked(&tenant, subject, now));
        self.pump();
        ended.unwrap_or_default()
    }

    /// The hub is another from the beginning: one with a stream log.
    pub fn keep_output(&mut self) {
        assert!(self.cables.is_empty(), "it is early enough");
        if self.stream_log.is_none() {
            self.stream_log = Some(MemoryStreamLog::new());
            self.hub = None;
            self.start_hub(Memory::Kept);
        }
    }

    // ---- faults ---------------------------------------------------------

    /// The wall clock jumps.
    pub fn jump_clock(&mut self, ms: i64) {
        self.clock_skew_ms += ms;
        self.clock_jumped = true;
    }

    /// Cuts a peer's cable: both ends notice at once. What was under way is
    /// lost.
    pub fn cut(&mut self, peer: Peer) {
        for id in self.cables_of(peer) {
            self.later(Duration::ZERO, Event::Notice(id, true));
            self.later(Duration::ZERO, Event::Notice(id, false));
        }
        self.fire();
    }

    /// Cuts a peer's cable and only the peer notices; the hub goes on talking
    /// to nobody.
    pub fn cut_unnoticed_by_hub(&mut self, peer: Peer) {
        for id in self.cables_of(peer) {
            if let Some(cable) = self.cables.get_mut(&id) {
                cable.up.dead = true;
                cable.down.dead = true;
            }
            self.later(Duration::ZERO, Event::Notice(id, false));
        }
        self.fire();
    }

    /// Both ends believe in the cable, and nothing arrives any more.
    pub fn half_open(&mut self, peer: Peer) {
        self.on_cable(peer, |cable| {
            cable.up.dead = true;
            cable.down.dead = true;
        });
    }

    /// Whether somebody still believes in a cable that carries nothing. A hub
    /// that believes in a dashboard's is of no consequence to anybody.
    pub fn is_half_open(&self) -> bool {
        self.cables.values().any(|cable| {
            let is_dead = cable.up.dead || cable.down.dead;
            is_dead && (cable.at_peer || (cable.at_hub && matches!(cable.peer, Peer::Agent(_))))
        })
    }

    /// Nothing arrives in either direction until [`go_on`](Self::go_on).
    pub fn stall(&mut self, peer: Peer) {
        self.on_cable(peer, |cable| {
            cable.up.stalled = true;
            cable.down.stalled = true;
        });
    }

    /// Ends a stall.
    pub fn go_on(&mut self, peer: Peer) {
        self.on_cable(peer, |cable| {
            cable.up.stalled = false;
            cable.down.stalled = false;
        });
    }

    /// Changes something about a peer's cable.
    pub fn on_cable(&mut self, peer: Peer, change: impl Fn(&mut Cable)) {
        for id in self.cables_of(peer) {
            if let Some(cable) = self.cables.get_mut(&id) {
                change(cable);
            }
        }
    }

    /// A peer can get no new cable, or can again.
    pub fn set_reachable(&mut self, peer: Peer, reachable: bool) {
        if reachable {
            self.unreachable.remove(&peer);
        } else {
            self.unreachable.insert(peer);
        }
    }

    /// Every cable is whole again, everyone is reachable, nobody sleeps.
    pub fn heal(&mut self) {
        self.unreachable.clear();
        self.storage = Storage::Works;
        self.log_storage = Storage::Works;
        self.auth_fails = false;
        self.hook_delay = Duration::from_millis(1);
        for cable in self.cables.values_mut() {
            cable.up.stalled = false;
            cable.down.stalled = false;
            cable.up.bytes_per_second = None;
            cable.down.bytes_per_second = None;
        }
        for dashboard in &mut self.dashboards {
            dashboard.asleep = false;
        }
        if self.hub.is_none() {
            self.start_hub(Memory::Kept);
        }
    }

    fn cables_of(&self, peer: Peer) -> Vec<u64> {
        let own = self.cables.iter().filter(|(_, c)| c.peer == peer && c.at_peer);
        own.map(|(id, _)| *id).collect()
    }

    // ---- what people do -------------------------------------------------

    /// A dashboard asks for a script to be run; the command and the request.
    pub fn request(
        &mut self,
        dashboard: usize,
        agent: &str,
        script: &str,
    ) -> (CommandId, RequestId) {
        self.request_with(dashboard, agent, script, |_| {})
    }

    /// The same, with changes to the request.
    pub fn request_with(
        &mut self,
        dashboard: usize,
        agent: &str,
        script: &str,
        change: impl FnOnce(&mut CommandRequest),
    ) -> (CommandId, RequestId) {
        let now = self.now();
        let core = self.core_of(dashboard);
        let command = core.mint_command(now);
        let mut request = CommandRequest {
            command,
            agent: agent.parse().expect("a name"),
            spec: CommandSpec::from(Run::Text(script.into())),
            priority: Priority::Normal,
            deliver_within_ms: None,
            retry: false,
        };
        change(&mut request);
        let id = core.request(DashboardToHub::Request(request), None, now).expect("room");
        (command, id)
    }

    /// The answer to a request, once there is one.
    pub fn answer(
        &self,
        dashboard: usize,
        request: &RequestId,
    ) -> Option<&Result<Accepted, RequestError>> {
        self.dashboards[dashboard].answers.get(request)
    }

    /// A dashboard reads a command's terminal.
    pub fn watch(&mut self, dashboard: usize, command: CommandId) -> ReaderId {
        self.read(dashboard, Target::Command(command), Reading::default())
    }

    /// A dashboard reads a target.
    pub fn read(&mut self, dashboard: usize, target: Target, reading: Reading) -> ReaderId {
        let now = self.now();
        let reader = self.core_of(dashboard).read(target, reading, now);
        self.dashboards[dashboard].reads(reader);
        reader
    }

    /// A dashboard interrupts a command.
    pub fn interrupt(&mut self, dashboard: usize, command: CommandId) -> RequestId {
        let interrupt = CommandInterrupt { command, attempt: None, grace_ms: None };
        self.ask(dashboard, DashboardToHub::Interrupt(interrupt))
    }

    /// A dashboard stops everything.
    pub fn stop_all(&mut self, dashboard: usize) -> RequestId {
        self.ask(dashboard, DashboardToHub::EmergencyStop(EmergencyStop { agents: None }))
    }

    /// A dashboard asks for something.
    pub fn ask(&mut self, dashboard: usize, message: DashboardToHub) -> RequestId {
        let now = self.now();
        self.core_of(dashboard).request(message, None, now).expect("room")
    }

    /// A dashboard's core.
    pub fn core_of(&mut self, dashboard: usize) -> &mut DashboardCore {
        self.dashboards[dashboard].core.as_mut().expect("it is there")
    }

    // ---- what people see ------------------------------------------------

    /// A dashboard's roster.
    pub fn roster(&self, dashboard: usize) -> &Roster {
        self.dashboards[dashboard].core.as_ref().expect("it is there").roster()
    }

    /// A command as a dashboard sees it.
    pub fn command(&self, dashboard: usize, command: CommandId) -> Option<&CommandState> {
        self.roster(dashboard).command(command).map(AsRef::as_ref)
    }

    /// A command's status as a dashboard sees it.
    pub fn status(&self, dashboard: usize, command: CommandId) -> Option<CommandStatus> {
        self.command(dashboard, command).map(|command| command.status)
    }

    /// An agent's presence as a dashboard sees it.
    pub fn presence(
        &self,
        dashboard: usize,
        agent: &str,
    ) -> Option<trunkline_protocol::message::Presence> {
        let agent = agent.parse().expect("a name");
        self.roster(dashboard).agent(&agent).map(|agent| agent.presence)
    }

    /// The state of an agent's connection.
    pub fn connection(&self, agent: usize) -> &ConnectionState {
        self.agents[agent].core.as_ref().expect("it runs").connection()
    }

    /// The hub, while there is one.
    pub fn hub(&self) -> Option<&Core> {
        self.hub.as_ref()
    }

    /// What the hub holds now, and has counted, if there is one.
    pub fn stats(&self) -> Option<Stats> {
        self.hub.as_ref().map(|hub| hub.stats(self.now()))
    }

    /// How many cables were made so far.
    pub fn cables_made(&self) -> u64 {
        self.cables_made
    }

    /// Whether nothing is under way on any cable.
    pub fn is_quiet(&self) -> bool {
        let mut lanes = self.cables.values().flat_map(|cable| [&cable.up, &cable.down]);
        lanes.all(|lane| lane.next().is_none())
    }

    // ---- time -----------------------------------------------------------

    /// Lets time pass.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.pump();
            match self.next() {
                Some(next) if next <= end => {
                    self.now = self.now.max(next);
                    self.fire();
                }
                Some(_) | None => break,
            }
        }
        self.now = end;
        self.fire();
        self.pump();
    }

    /// Lets time pass until something is so; panics after `patience`.
    pub fn run_until(&mut self, patience: Duration, mut so: impl FnMut(&Self) -> bool) {
        let end = self.now + patience;
        loop {
            self.pump();
            if so(self) {
                return;
            }
            match self.next() {
                Some(next) if next <= end => {
                    self.now = self.now.max(next);
                    self.fire();
                }
                Some(_) | None => panic!("seed {}: it did not happen in {patience:?}", self.seed),
            }
        }
    }

    /// Time must move on: who keeps saying that something is due now, and
    /// does nothing about it, is named.
    fn watch_for_a_standstill(&mut self) {
        if self.now != self.still.0 {
            self.still = (self.now, 0);
        }
        self.still.1 += 1;
        if self.still.1 < 20_000 {
            return;
        }
        let now = self.now();
        let hub = self.hub.as_ref().and_then(Core::deadline);
        let agents: Vec<_> = self
            .agents
            .iter()
            .map(|n| (n.deadline(), n.core.as_ref().and_then(|c| c.due(now))))
            .collect();
        let dashboards: Vec<_> =
            self.dashboards.iter().map(|n| n.core.as_ref().and_then(|c| c.due(now))).collect();
        let cables: Vec<_> = self
            .cables
            .values()
            .map(|c| (c.peer, c.at_hub, c.at_peer, c.up.next(), c.down.next()))
            .collect();
        panic!(
            "seed {}: time stands still at {:?}: agenda {:?} hub {hub:?} agents {agents:?} dashboards {dashboards:?} cables {cables:?}",
            self.seed,
            self.now,
            self.agenda.keys().next(),
        );
    }

    fn next(&self) -> Option<Duration> {
        let now = self.now();
        let agenda = self.agenda.keys().next().map(|(at, _)| *at);
        let hub = self.hub.as_ref().and_then(Core::deadline);
        let agents = self
            .agents
            .iter()
            .flat_map(|node| [node.deadline(), node.core.as_ref().and_then(|core| core.due(now))]);
        let dashboards = self.dashboards.iter().filter_map(|n| n.core.as_ref()?.due(now));
        let cables = self.cables.values().flat_map(|cable| {
            [cable.up.next().filter(|_| cable.at_hub), cable.down.next().filter(|_| cable.at_peer)]
        });
        let all = [agenda, hub].into_iter().chain(agents).chain(cables).flatten().chain(dashboards);
        all.min()
    }

    fn later(&mut self, after: Duration, event: Event) {
        self.serial += 1;
        self.agenda.insert((self.now + after, self.serial), event);
    }

    /// Everything that is due now.
    fn fire(&mut self) {
        let now = self.now();
        self.watch_for_a_standstill();
        while let Some(entry) = self.agenda.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let event = entry.remove();
            self.happen(event);
        }
        let ids: Vec<u64> = self.cables.keys().copied().collect();
        for id in ids {
            self.deliver(id);
        }
        if let Some(hub) = &mut self.hub {
            hub.handle_timeout(now);
        }
        for peer in self.peers() {
            if let Some(core) = self.driven(peer) {
                core.timeout(now);
            }
        }
    }

    fn peers(&self) -> Vec<Peer> {
        let agents = (0..self.agents.len()).map(Peer::Agent);
        agents.chain((0..self.dashboards.len()).map(Peer::Dashboard)).collect()
    }

    fn happen(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Dialed(peer) => self.dialed(peer),
            Event::Authenticated(link, result) => {
                if let Some(hub) = &mut self.hub {
                    hub.handle_authenticated(link, result, now);
                }
            }
            Event::Store(tenant, command, change) => {
                let (stores, tells) = self.storage.does(&mut self.rng);
                if stores {
                    self.queue.store(&change);
                }
                self.stored.insert(command, self.now);
                if let Some(under_way) = self.storing.get_mut(&command) {
                    *under_way -= 1;
                }
                let result = if tells {
                    Ok(())
                } else {
                    self.doubted.insert(command);
                    Err(QueueError("out of order".into()))
                };
                if let Some(hub) = &mut self.hub {
                    hub.handle_stored(&tenant, command, &result, now);
                }
            }
            Event::Forget(change) => self.queue.store(&change),
            Event::Keep(changes) => {
                let (keeps, tells) = self.log_storage.does(&mut self.rng);
                // One that fails may have done a part.
                let done = if keeps { changes.len() } else { changes.len() / 2 };
                let log = self.stream_log.as_ref().expect("the hub was told of one");
                keep(log, &changes[..done], &mut self.dropped);
                let result = if tells { Ok(()) } else { Err(LogError("out of order".into())) };
                if let Some(hub) = &mut self.hub {
                    hub.handle_kept(&result, now);
                }
            }
            Event::Notice(id, at_hub) => {
                let close = Close::new(CloseCode::Lost, "cut");
                self.notice(id, at_hub, &close);
            }
        }
    }

    /// An end of a cable learns that it is gone; with both, so is the cable.
    fn notice(&mut self, id: u64, at_hub: bool, close: &Close) {
        let now = self.now();
        let Some(cable) = self.cables.get_mut(&id) else { return };
        let (peer, link) = (cable.peer, cable.link);
        let had =
            std::mem::replace(if at_hub { &mut cable.at_hub } else { &mut cable.at_peer }, false);
        if !cable.at_hub && !cable.at_peer {
            self.cables.remove(&id);
        }
        if !had {
            return;
        }
        if at_hub {
            self.awake.remove(&link);
            if let Some(hub) = &mut self.hub {
                hub.handle_lost(link, now);
            }
        } else if let Some(core) = self.driven(peer) {
            core.lost(close, now);
        }
    }

    fn driven(&mut self, peer: Peer) -> Option<&mut dyn Driven> {
        match peer {
            Peer::Agent(n) => self.agents[n].core.as_mut().map(|core| core as &mut dyn Driven),
            Peer::Dashboard(n) => {
                self.dashboards[n].core.as_mut().map(|core| core as &mut dyn Driven)
            }
        }
    }

    fn dialed(&mut self, peer: Peer) {
        let now = self.now();
        if self.hub.is_none() || self.unreachable.contains(&peer) {
            let close = Close::new(CloseCode::Lost, "no answer");
            if let Some(core) = self.driven(peer) {
                core.dial_failed(&close, now);
            }
            return;
        }
        self.serial += 1;
        let link = LinkId(self.serial);
        let cable = Cable::new(peer, link, self.latency);
        self.cables.insert(self.serial, cable);
        self.cables_made += 1;
        if let Some(hub) = &mut self.hub {
            hub.handle_arrived(link, None, now);
            hub.handle_opened(link, None, None, now);
        }
        if let Some(core) = self.driven(peer) {
            core.dialed(now);
        }
    }

    /// Frames that have arrived at either end.
    fn deliver(&mut self, id: u64) {
        let now = self.now();
        while let Some(cable) = self.cables.get_mut(&id).filter(|cable| cable.at_hub) {
            let (link, peer) = (cable.link, cable.peer);
            let frame = cable.up.pop(self.now);
            if let Some(frame) = &frame {
                self.note_frame(peer, true, frame);
            }
            match frame {
                Some(Frame::Close(_)) => {
                    let close = Close::new(CloseCode::Lost, "closed");
                    self.notice(id, true, &close);
                }
                Some(frame) => {
                    if let Some(hub) = &mut self.hub {
                        hub.handle_frame(link, &frame, now);
                    }
                }
                None => break,
            }
            self.may_go_over(id, peer);
        }
        while let Some(cable) = self.cables.get_mut(&id).filter(|cable| cable.at_peer) {
            let peer = cable.peer;
            let frame = cable.down.pop(self.now);
            if let Some(frame) = &frame {
                self.note_frame(peer, false, frame);
            }
            match frame {
                Some(Frame::Close(close)) => self.notice(id, false, &close),
                Some(frame) => {
                    if let Some(core) = self.driven(peer) {
                        core.frame(&frame, now);
                    }
                }
                None => break,
            }
            self.may_go_over(id, peer);
        }
    }

    /// A frame has arrived at one end of a peer's cable, who may let go of it now.
    fn may_go_over(&mut self, cable: u64, peer: Peer) {
        if !self.cables.get(&cable).is_some_and(|cable| cable.at_peer) {
            return;
        }
        let Some(left) = self.goes_over.get_mut(&peer) else { return };
        if let Some(less) = left.checked_sub(1) {
            *left = less;
            return;
        }
        self.goes_over.remove(&peer);
        self.went_over += 1;
        let close = Close::new(CloseCode::Lost, "gone over");
        self.notice(cable, false, &close);
    }

    /// Gives new tokens to who wants one, and has a source that works.
    fn refresh(&mut self, now: Now) -> bool {
        let mut happened = false;
        for (number, node) in self.agents.iter_mut().enumerate() {
            if let Some(core) = &mut node.core
                && core.poll_refresh().is_some()
                && !self.without_tokens.contains(&Peer::Agent(number))
            {
                core.refresh("token".into(), now);
                happened = true;
            }
        }
        for (number, node) in self.dashboards.iter_mut().enumerate() {
            if let Some(core) = &mut node.core
                && core.poll_refresh().is_some()
                && !self.without_tokens.contains(&Peer::Dashboard(number))
            {
                core.refresh("token".into());
                happened = true;
            }
        }
        happened
    }

    /// Lets everyone do what there is to do now.
    fn pump(&mut self) {
        for _ in 0..100_000 {
            let mut happened = false;
            let now = self.now();
            for number in 0..self.agents.len() {
                happened |= self.agents[number].advance(now);
                let peer = Peer::Agent(number);
                if self.agents[number].core.is_none() && !self.cables_of(peer).is_empty() {
                    // It died at a point that its journal named.
                    self.cut(peer);
                    happened = true;
                }
            }
            for node in &mut self.dashboards {
                happened |= node.advance(&self.eras, self.now);
            }
            happened |= self.refresh(now);
            happened |= self.dial();
            happened |= self.effects();
            happened |= self.transmit_hub();
            happened |= self.transmit_peers();
            if !happened {
                return;
            }
        }
        panic!("seed {}: a world without end", self.seed);
    }

    fn dial(&mut self) -> bool {
        let mut happened = false;
        for peer in self.peers() {
            match self.driven(peer).and_then(Driven::dial) {
                Some(DialAction::Dial { .. }) => {
                    let after = self.latency * 2;
                    self.later(after, Event::Dialed(peer));
                }
                Some(DialAction::HangUp) => {
                    for id in self.cables_of(peer) {
                        if let Some(cable) = self.cables.get_mut(&id) {
                            cable.at_peer = false;
                        }
                        let after = self.latency;
                        self.later(after, Event::Notice(id, true));
                    }
                }
                None => continue,
            }
            happened = true;
        }
        happened
    }

    fn effects(&mut self) -> bool {
        let mut happened = false;
        while let Some(effect) = self.hub.as_mut().and_then(Core::poll_effect) {
            happened = true;
            if let Effect::Observe(event) = effect {
                self.observed.hear(&event);
                continue;
            }
            if self.hub_dies() {
                break;
            }
            match effect {
                Effect::Wake(link) => {
                    self.awake.insert(link);
                }
                Effect::Authenticate { link, credentials } => {
                    let subject = match &credentials.role {
                        Role::Agent(agent) => agent.to_string(),
                        Role::Dashboard(dashboard) => format!("{dashboard:?}"),
                    };
                    let tenant = "default".parse().expect("a name");
                    let asking = self.cables.values().find(|cable| cable.link == link);
                    let known = asking.and_then(|cable| self.identities.get(&cable.peer));
                    let result = if self.auth_fails {
                        Err(AuthError::Unavailable("out of order".into()))
                    } else {
                        Ok(known.cloned().unwrap_or_else(|| Identity::new(tenant, subject)))
                    };
                    // Who asks first need not be answered first.
                    let most = u64::try_from(self.hook_delay.as_millis()).unwrap_or(u64::MAX);
                    let after = Duration::from_millis(self.rng.random_range(most.min(1)..=most));
                    self.later(after, Event::Authenticated(link, result));
                }
                Effect::Store { tenant, command, change } => {
                    self.look_at(command, &change);
                    *self.storing.entry(command).or_default() += 1;
                    self.later(self.hook_delay, Event::Store(tenant, command, change));
                }
                Effect::Forget(change) => self.later(self.hook_delay, Event::Forget(change)),
                Effect::Keep(changes) => self.later(self.hook_delay, Event::Keep(changes)),
                Effect::TakeLogs(_) => unreachable!("there is no log sink"),
                Effect::Observe(_) => unreachable!("it was heard"),
            }
        }
        happened
    }

    /// The order in which commands are leased is the order of their agent's
    /// queue.
    fn look_at(&mut self, command: CommandId, change: &QueueChange) {
        match change {
            QueueChange::Accepted(_) => {
                self.accepted.insert(command, self.now);
            }
            QueueChange::Leased { attempt, .. } => {
                self.leases += 1;
                if self.agents.iter().any(|node| node.listed.contains(&(command, *attempt))) {
                    return;
                }
                let stored = self.queue.stored();
                let Some(leased) = stored.iter().find(|s| s.request.command == command) else {
                    return;
                };
                let before = stored.iter().filter(|other| {
                    other.request.agent == leased.request.agent
                        && other.status == CommandStatus::Queued
                        && (other.request.priority, other.order)
                            < (leased.request.priority, leased.order)
                        && self.storing.get(&other.request.command).is_none_or(|n| *n == 0)
                });
                let mut before = before.map(|other| other.request.command);
                let waiting = before.find(|other| {
                    // Of what the queue was not sure of the hub may think
                    // otherwise, and what was stored at this very moment it
                    // may not have known.
                    !self.doubted.contains(other) && self.stored.get(other) != Some(&self.now)
                });
                assert_eq!(waiting, None, "{command} was leased before its turn");
            }
            QueueChange::Settled { .. } | QueueChange::Forgotten { .. } => {}
        }
    }

    fn note_frame(&mut self, peer: Peer, is_up: bool, frame: &Frame) {
        let mut mix = self.fingerprint ^ u64::try_from(self.now.as_micros()).unwrap_or(0);
        mix = mix.wrapping_mul(0x0100_0000_01b3) ^ frame.len() as u64;
        self.fingerprint = mix.rotate_left(17);
        if self.traced {
            let text = match frame {
                Frame::Text(text) => String::from_utf8_lossy(text).chars().take(300).collect(),
                Frame::Binary(bytes) => format!("{} bytes of output", bytes.len()),
                Frame::Close(close) => format!("close: {close}"),
            };
            let arrow = if is_up { "──►" } else { "◄──" };
            println!("{:>10.3} s  {peer:?} {arrow} {text}", self.now.as_secs_f64());
        }
    }

    fn transmit_hub(&mut self) -> bool {
        let now = self.now();
        let mut happened = false;
        for cable in self.cables.values_mut() {
            if !cable.at_hub || !self.awake.contains(&cable.link) {
                continue;
            }
            let Some(hub) = &mut self.hub else { return false };
            while cable.down.room() > 0 {
                let mut frames = Vec::new();
                let more = hub.transmit(cable.link, now, &mut frames, cable.down.room());
                if !more {
                    self.awake.remove(&cable.link);
                }
                if let Some((left, _)) = &mut self.hub_dies_after {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX);
                    frames.truncate(most);
                    *left -= frames.len() as u64;
                }
                happened |= !frames.is_empty();
                if matches!(cable.peer, Peer::Agent(_)) && !self.clock_jumped {
                    let queue = &self.queue;
                    for frame in &frames {
                        look_at_orders(frame, queue, &self.accepted);
                    }
                }
                for frame in frames {
                    let last = matches!(frame, Frame::Close(_));
                    cable.down.push(frame, self.now);
                    if last {
                        self.serial += 1;
                        let at = (self.now + cable.down.latency * 2, self.serial);
                        let id = cable.link.0;
                        self.agenda.insert(at, Event::Notice(id, true));
                    }
                }
                if !more {
                    break;
                }
            }
        }
        if matches!(self.hub_dies_after, Some((0, _))) {
            return self.hub_dies();
        }
        happened
    }

    fn transmit_peers(&mut self) -> bool {
        let now = self.now();
        let mut happened = false;
        let ids: Vec<(u64, Peer)> =
            self.cables.iter().filter(|(_, c)| c.at_peer).map(|(id, c)| (*id, c.peer)).collect();
        for (id, peer) in ids {
            while self.cables.get(&id).is_some_and(|cable| cable.up.room() > 0) {
                let Some(frame) = self.driven(peer).and_then(|core| core.transmit(now)) else {
                    break;
                };
                happened = true;
                if let Peer::Agent(n) = peer {
                    if self.agents[n].dies() {
                        self.crash_agent(n);
                        break;
                    }
                    self.agents[n].note_greeting(&frame);
                }
                let close = match &frame {
                    Frame::Close(close) => Some(close.clone()),
                    Frame::Text(_) | Frame::Binary(_) => None,
                };
                if let Some(cable) = self.cables.get_mut(&id) {
                    cable.up.push(frame, self.now);
                }
                if let Some(close) = close {
                    // It has said its last; nothing more is read.
                    self.notice(id, false, &close);
                }
            }
        }
        happened
    }
}

/// No command is given out after its time.
fn look_at_orders(frame: &Frame, queue: &Queue, accepted: &BTreeMap<CommandId, Duration>) {
    let word = b"command:execute";
    let Frame::Text(text) = frame else { return };
    if !text.windows(word.len()).any(|part| part == word) {
        return;
    }
    for message in codec::decode::<HubToAgent>(frame, Rules::from(&Limits::default())) {
        let message = message.expect("the hub speaks as agreed");
        let HubToAgent::Execute(order) = message.message else { continue };
        let stored = queue.stored().into_iter().find(|s| s.request.command == order.command);
        let within = stored.and_then(|stored| stored.request.deliver_within_ms);
        let (Some(within), Some(accepted)) = (within, accepted.get(&order.command)) else {
            continue;
        };
        let last = *accepted + Duration::from_millis(within);
        let given = Duration::from_millis(message.ts.expect("it has") - EPOCH_MS);
        assert!(given <= last, "{} is given out at {given:?}, after {last:?}", order.command);
    }
}
