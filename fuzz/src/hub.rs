//! Two agents, three dashboards, an authenticator and a queue on one hub core.
//! The bytes choose who does what next: mostly what such a peer would do,
//! sometimes what none should; hooks answer early, late, in any order, or fail.
//!
//! What must hold whatever they do:
//!
//! - no panic, and what was due is done once its time has come;
//! - everything the hub says can be read by whom it says it to, and after a
//!   close it says nothing;
//! - a stream reaches a dashboard in order, every byte as it was written, every
//!   hole named; nothing of one tenant reaches another;
//! - of one command, one change at a time is being stored, a final state stays,
//!   and an attempt is given to one process only;
//! - logs keep within their bounds;
//! - in the end every request on a link that lives has its answer, and all
//!   dashboards of a tenant see the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{
    CommandId, HubInstance, InstanceId, QueueEpoch, RequestId, StreamId, TenantId,
};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentAbout, AgentConnect, AgentReport, AgentToHub, Channel, CommandAccepted, CommandComplete,
    CommandInterrupt, CommandInterrupting, CommandRequest, CommandStarted, CommandStatus,
    DashboardConnect, DashboardToHub, Direction, Disconnect, EmergencyStop, Envelope, Feature,
    From, Greeting, HeartbeatBeat, HeldCommand, HeldStream, HubToAgent, HubToDashboard,
    InterruptStage, Lag, LogBatch, PROTOCOLS, RefreshToken, Secret, Since, Subscribe, Target,
    TerminalGap, TerminalInput, TerminalInputTaken, TerminalOutput, TerminalResize, TerminalShown,
    TerminalSize, TerminalSubscription, Unsubscribe,
};
use trunkline_protocol::roster::RosterReader;
use trunkline_server::core::{Core, Effect, LinkId, Setup};
use trunkline_server::hooks::{
    LogChange, LogError, MemoryQueue, MemoryStreamLog, QueueChange, WholeTenant,
};
use trunkline_server::{AuthError, Identity, QueueError, Role};

use crate::names;
use crate::plan::Plan;

/// Agents are peers 0 and 1, dashboards 2 to 4; the last is of another tenant.
const AGENTS: usize = 2;
const PEERS: usize = 5;

/// Small enough to be reached.
fn limits() -> Limits {
    Limits {
        links_max: 12,
        subscriptions_max: 4,
        control_bytes_max: 256 * 1024,
        queue_per_agent: 3,
        finished_per_agent: 3,
        answers_max: 256,
        log_bytes_per_stream: 6 * 1024,
        log_bytes_total: 10 * 1024,
        grant_bytes: 4 * 1024,
        terminal_bytes_per_second: 64 * 1024,
        newest_bytes_behind: 512,
        ..Limits::default()
    }
}

/// One end of a link: what its peer has heard on it.
#[derive(Default)]
struct Link {
    peer: usize,
    instance: u8,
    welcome: bool,
    /// How often each request was asked on this link.
    asked: BTreeMap<RequestId, u32>,
    answered: BTreeMap<RequestId, u32>,
    /// Where a dashboard stands in each stream.
    streams: BTreeMap<StreamId, u64>,
}

/// What outlives a peer's links.
#[derive(Default)]
struct Peer {
    link: Option<LinkId>,
    instance: u8,
    /// What an agent was given, and what it writes.
    given: Vec<(CommandId, u32)>,
    runs: Vec<Run>,
    /// What a dashboard asked, to be asked again.
    unanswered: BTreeMap<RequestId, DashboardToHub>,
    roster: RosterReader,
}

struct Run {
    command: CommandId,
    attempt: u32,
    stream: StreamId,
    /// How long it is, and up to where it was sent.
    end: u64,
    sent: u64,
    allowed: u64,
    /// A new link: the hub has yet to say where to go on.
    lost: bool,
}

struct Stage {
    core: Core,
    queue: MemoryQueue,
    log: MemoryStreamLog,
    keeping: Option<Vec<LogChange>>,
    now: Duration,
    hubs: u8,
    links: BTreeMap<LinkId, Link>,
    peers: [Peer; PEERS],
    serial: u32,
    authenticating: Vec<(LinkId, Role)>,
    storing: Vec<(TenantId, CommandId, QueueChange)>,
    executed: BTreeMap<(CommandId, u32), InstanceId>,
    /// Commands that the hub forgot: their ids may mean others since.
    forgotten: BTreeSet<CommandId>,
}

/// Follows the plan.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let mut stage = Stage::new();
    if plan.maybe(|_| ()).is_none() {
        for peer in 0..PEERS {
            stage.dial(peer, &mut Plan::new(&[]));
            stage.hooks(&mut Plan::new(&[]), usize::MAX);
        }
        stage.transmit_all();
    }
    while !plan.is_over() {
        stage.step(plan);
        stage.check();
    }
    stage.finish();
}

impl Stage {
    fn new() -> Self {
        let queue = MemoryQueue::with_epoch(QueueEpoch::from_u128(2));
        let log = MemoryStreamLog::new();
        let mut stage = Self {
            core: Core::new(setup(0, &queue, &log), names::now(Duration::ZERO)),
            queue,
            log,
            keeping: None,
            now: Duration::ZERO,
            hubs: 0,
            links: BTreeMap::new(),
            peers: Default::default(),
            serial: 0,
            authenticating: Vec::new(),
            storing: Vec::new(),
            executed: BTreeMap::new(),
            forgotten: BTreeSet::new(),
        };
        for (peer, number) in stage.peers.iter_mut().zip(0..) {
            peer.instance = number * 16;
        }
        stage
    }

    fn peer(plan: &mut Plan<'_>, of: usize) -> usize {
        usize::from(plan.byte()) % of
    }

    fn step(&mut self, plan: &mut Plan<'_>) {
        match plan.byte() {
            0..120 => {
                let peer = Self::peer(plan, PEERS);
                match self.peers[peer].link {
                    None => self.dial(peer, plan),
                    Some(link) if peer < AGENTS => self.agent_says(peer, link, plan),
                    Some(link) => self.dashboard_says(peer, link, plan),
                }
            }
            120..170 => {
                let many = usize::from(plan.below(3)) + 1;
                self.hooks(plan, many);
            }
            170..210 => {
                let peer = Self::peer(plan, PEERS);
                if let Some(link) = self.peers[peer].link {
                    let bytes = plan.of(&[64 * 1024, 1, 1000]);
                    self.transmit(link, bytes);
                }
            }
            210..225 => self.transmit_all(),
            225..240 => {
                self.now += names::pause(plan);
                if plan.maybe(|_| ()).is_none() {
                    // Everybody is heard, or only the silent survive this.
                    for link in self.peers.iter().filter_map(|peer| peer.link) {
                        let now = names::now(self.now);
                        let n = HeartbeatBeat { n: 0 };
                        let beat = codec::encode(&Envelope::bare(DashboardToHub::Ping(n)));
                        self.core.handle_frame(link, &beat, now);
                    }
                }
                self.core.handle_timeout(names::now(self.now));
            }
            240..247 => {
                let peer = Self::peer(plan, PEERS);
                if let Some(link) = self.peers[peer].link {
                    self.lose(link);
                }
            }
            247..252 => {
                let peer = Self::peer(plan, PEERS);
                self.dial(peer, plan); // a second link may supersede the first
            }
            252 => {
                // The process of an agent starts anew.
                let peer = Self::peer(plan, AGENTS);
                if let Some(link) = self.peers[peer].link {
                    self.lose(link);
                }
                self.peers[peer].instance = self.peers[peer].instance.wrapping_add(1);
                self.peers[peer].given.clear();
                self.peers[peer].runs.clear();
            }
            253 => self.restart(),
            254 => {
                let spread = names::pause(plan);
                self.core.handle_drain(spread, names::now(self.now));
            }
            255 => {
                let peer = Self::peer(plan, PEERS);
                if let Some(link) = self.peers[peer].link {
                    let len = plan.byte().into();
                    let frame = Frame::Text(plan.take(len).to_vec().into());
                    self.core.handle_frame(link, &frame, names::now(self.now));
                }
            }
        }
    }

    // ---- links ----------------------------------------------------------

    fn dial(&mut self, peer: usize, plan: &mut Plan<'_>) {
        self.serial += 1;
        let id = LinkId(u64::from(self.serial));
        let instance = self.peers[peer].instance;
        self.links.insert(id, Link { peer, instance, ..Link::default() });
        self.peers[peer].link = Some(id);
        let now = names::now(self.now);
        self.core.handle_arrived(id, None, now);
        self.core.handle_opened(id, None, None, now);
        let number = u8::try_from(peer).expect("few peers");
        let greeting = if peer < AGENTS {
            for run in &mut self.peers[peer].runs {
                run.lost = true;
            }
            let mut commands: Vec<HeldCommand> = self.peers[peer].runs.iter().map(held).collect();
            if plan.once_in(4) {
                commands.extend(plan.list(3, claim));
            }
            Greeting::Agent(AgentConnect {
                protocols: PROTOCOLS.to_vec(),
                agent: names::agent(number),
                instance: names::instance(instance),
                token: None,
                about: AgentAbout::default(),
                slots: u32::from(plan.below(3)) + 1,
                features: vec![Feature::Binary],
                commands,
                more: false,
            })
        } else {
            let roster = plan.maybe(|_| self.peers[peer].roster.roster().position()).flatten();
            self.peers[peer].roster.handle_link();
            Greeting::Dashboard(DashboardConnect {
                protocols: PROTOCOLS.to_vec(),
                dashboard: Some(names::dashboard(number)),
                token: None,
                features: plan.maybe(|_| Feature::Binary).into_iter().collect(),
                since: Since { roster },
            })
        };
        self.core.handle_frame(id, &codec::encode(&Envelope::bare(greeting)), now);
    }

    fn lose(&mut self, id: LinkId) {
        self.core.handle_lost(id, names::now(self.now));
        self.forget(id);
    }

    fn forget(&mut self, id: LinkId) {
        if let Some(link) = self.links.remove(&id)
            && self.peers[link.peer].link == Some(id)
        {
            self.peers[link.peer].link = None;
        }
    }

    /// The hub's process dies, and another one goes on with its queue.
    fn restart(&mut self) {
        for id in self.links.keys().copied().collect::<Vec<_>>() {
            self.forget(id);
        }
        self.authenticating.clear();
        self.storing.clear();
        self.keeping = None;
        self.hubs = self.hubs.wrapping_add(1);
        self.core = Core::new(setup(self.hubs, &self.queue, &self.log), names::now(self.now));
    }

    // ---- hooks ----------------------------------------------------------

    /// Takes what the core wants of the hooks.
    fn effects(&mut self) {
        let mut effects = 0;
        while let Some(effect) = self.core.poll_effect() {
            match effect {
                Effect::Wake(_) => {}
                // It must be true that it can be printed.
                Effect::Observe(event) => drop(format!("{event:?}")),
                Effect::Authenticate { link, credentials } => {
                    self.authenticating.push((link, credentials.role));
                }
                Effect::Store { tenant, command, change } => {
                    let same = |(t, c, _): &(TenantId, CommandId, QueueChange)| {
                        (t, c) == (&tenant, &command)
                    };
                    assert!(!self.storing.iter().any(same), "one change at a time");
                    self.storing.push((tenant, command, change));
                }
                Effect::Forget(change) => {
                    if let QueueChange::Forgotten { command, .. } = &change {
                        self.forgotten.insert(*command);
                        self.executed.retain(|(executed, _), _| executed != command);
                    }
                    self.queue.store(&change);
                }
                Effect::Keep(changes) => {
                    assert!(!changes.is_empty(), "there is something to keep");
                    assert!(changes.len() <= 1024 + 64, "a batch is bounded");
                    let mut places = BTreeSet::new();
                    for change in &changes {
                        if let LogChange::Grown { tenant, stream, piece } = change {
                            let place = (tenant.clone(), *stream, piece.from());
                            assert!(places.insert(place), "nothing is kept twice in a batch");
                        }
                    }
                    let before = self.keeping.replace(changes);
                    assert_eq!(before, None, "one batch at a time");
                }
                Effect::TakeLogs(_) => unreachable!("there is no log sink"),
            }
            effects += 1;
            assert!(effects < 100_000, "effects end");
        }
    }

    /// Lets hooks answer.
    fn hooks(&mut self, plan: &mut Plan<'_>, many: usize) {
        for _ in 0..many {
            self.effects();
            let waiting = self.waiting();
            if waiting == 0 {
                return;
            }
            let which = usize::from(plan.byte()) % waiting;
            let now = names::now(self.now);
            if which < self.authenticating.len() {
                let (link, role) = self.authenticating.remove(which);
                let answer = match plan.byte() {
                    250..252 => Err(AuthError::Unauthorized("no".into())),
                    252..254 => Err(AuthError::Forbidden("no".into())),
                    254..=255 => Err(AuthError::Unavailable("later".into())),
                    byte => {
                        let expires_in = (byte >= 240).then(|| names::pause(plan));
                        Ok(Identity { expires_in, ..identity(&role) })
                    }
                };
                self.core.handle_authenticated(link, answer, now);
            } else if let Some(changes) = self.keeping.take_if(|_| which + 1 == waiting) {
                // Who fails may have kept some of it.
                let luck = plan.byte();
                let kept = if luck < 220 { changes.len() } else { changes.len() / 2 };
                for change in &changes[..kept] {
                    self.keep(change);
                }
                let answer = if luck < 220 { Ok(()) } else { Err(LogError("full".into())) };
                self.core.handle_kept(&answer, now);
            } else {
                let (tenant, command, change) =
                    self.storing.remove(which - self.authenticating.len());
                // Who fails may have stored it all the same.
                let luck = plan.byte();
                if !(220..240).contains(&luck) {
                    self.store(&change);
                }
                let answer = if luck < 220 { Ok(()) } else { Err(QueueError("full".into())) };
                self.core.handle_stored(&tenant, command, &answer, now);
            }
        }
    }

    /// Questions to hooks that have no answer yet.
    fn waiting(&self) -> usize {
        self.authenticating.len() + self.storing.len() + usize::from(self.keeping.is_some())
    }

    fn keep(&mut self, change: &LogChange) {
        if let LogChange::Grown { tenant, stream, piece } = change {
            let stored = self.log.stored();
            let known =
                stored.iter().find(|s| (&s.head.tenant, s.head.stream) == (tenant, *stream));
            let known = known.expect("a stream is opened before it grows");
            if let Some(last) = known.pieces.last() {
                assert!(piece.from() <= last.to(), "a copy has no hole without a name");
            }
            assert!(piece.from() < piece.to(), "a piece is something");
        }
        self.log.store(change);
    }

    fn store(&mut self, change: &QueueChange) {
        let known = |tenant: &TenantId, command: &CommandId| {
            let stored = self.queue.stored();
            stored.into_iter().find(|s| s.tenant == *tenant && s.request.command == *command)
        };
        match change {
            QueueChange::Leased { tenant, command, .. } => {
                if let Some(known) = known(tenant, command) {
                    assert!(!known.status.is_final(), "final states are final");
                    // Which attempts are sent to whom is judged by what is sent:
                    // one that was stored and never sent may be leased again.
                }
            }
            QueueChange::Settled { tenant, command, status, .. } => {
                assert!(status.is_final());
                if let Some(known) = known(tenant, command) {
                    let same = !known.status.is_final() || known.status == *status;
                    assert!(same, "{:?} became {status:?}", known.status);
                }
            }
            QueueChange::Accepted(_) | QueueChange::Forgotten { .. } => {}
        }
        self.queue.store(change);
    }

    // ---- what agents say ------------------------------------------------

    fn agent_says(&mut self, peer: usize, link: LinkId, plan: &mut Plan<'_>) {
        let runs = self.peers[peer].runs.len();
        let message = match plan.byte() {
            0..50 => {
                // It begins what it was given.
                let Some((command, attempt)) = self.peers[peer].given.pop() else { return };
                self.serial += 1;
                let stream = StreamId::from_u128(u128::from(self.serial) << 8);
                let allowed = limits().grant_bytes;
                let run = Run { command, attempt, stream, end: 0, sent: 0, allowed, lost: false };
                self.peers[peer].runs.push(run);
                AgentToHub::Started(CommandStarted { command, attempt, stream })
            }
            50..120 => {
                // It writes on, as far as it may.
                if runs == 0 {
                    return;
                }
                let run = &mut self.peers[peer].runs[usize::from(plan.byte()) % runs];
                let len = names::len(plan).min(run.allowed.saturating_sub(run.sent));
                if len == 0 || run.lost {
                    return;
                }
                let offset = run.sent;
                run.sent += len;
                run.end = run.end.max(run.sent);
                let (stream, channel) = (run.stream, names::channel(plan));
                let data = names::bytes_at(stream, offset, len);
                AgentToHub::Output(TerminalOutput { stream, offset, channel, data })
            }
            120..150 => {
                // It ends what it runs.
                if runs == 0 {
                    return;
                }
                let run = self.peers[peer].runs.remove(usize::from(plan.byte()) % runs);
                let mut end = names::end(plan);
                end.end = run.end;
                let (command, attempt) = (run.command, run.attempt);
                let status = plan.of(&[CommandStatus::Completed, CommandStatus::Interrupted]);
                AgentToHub::Complete(CommandComplete { command, attempt, status, end })
            }
            _ => self.agent_babbles(peer, plan),
        };
        let frame = match &message {
            AgentToHub::Output(output) if plan.maybe(|_| ()).is_none() => {
                codec::encode_output(output)
            }
            _ => codec::encode(&Envelope::bare(message)),
        };
        self.core.handle_frame(link, &frame, names::now(self.now));
    }

    fn agent_babbles(&mut self, peer: usize, plan: &mut Plan<'_>) -> AgentToHub {
        let runs = &self.peers[peer].runs;
        // About something of its own, or anything.
        let run = (!runs.is_empty() && plan.maybe(|_| ()).is_some())
            .then(|| &runs[usize::from(plan.byte()) % runs.len()]);
        let command = run.map_or_else(|| names::command(plan), |run| run.command);
        let attempt = run.map_or_else(|| u32::from(plan.below(4)), |run| run.attempt);
        let stream = run.map_or_else(|| names::stream(plan), |run| run.stream);
        match plan.below(13) {
            0 => AgentToHub::Status(AgentReport {
                note: plan.maybe(|_| "busy".into()),
                ..AgentReport::default()
            }),
            1 => AgentToHub::Accepted(CommandAccepted { command, attempt }),
            2 => AgentToHub::Started(CommandStarted { command, attempt, stream }),
            3 => {
                let stage = plan.of(&[
                    InterruptStage::Delivered,
                    InterruptStage::Signalled,
                    InterruptStage::Accepted,
                ]);
                AgentToHub::Interrupting(CommandInterrupting { command, attempt, stage })
            }
            4 => {
                let mut status = names::status(plan);
                if !status.is_final() {
                    status = CommandStatus::Failed;
                }
                let end = names::end(plan);
                AgentToHub::Complete(CommandComplete { command, attempt, status, end })
            }
            5 => {
                let offset = plan.number() & 0xffff;
                let data = names::bytes_at(stream, offset, names::len(plan));
                AgentToHub::Output(TerminalOutput { stream, offset, channel: Channel::Pty, data })
            }
            6 => {
                let from = plan.offset().min(i64::MAX as u64 - 1);
                let to = from.saturating_add(plan.number().max(1)).min(i64::MAX as u64);
                AgentToHub::Gap(TerminalGap { stream, from, to, reason: names::reason(plan) })
            }
            7 => {
                let writer = names::dashboard(2 + plan.below(3));
                let (offset, resend) = (plan.offset(), plan.once_in(3));
                AgentToHub::InputTaken(TerminalInputTaken { command, writer, offset, resend })
            }
            8 => AgentToHub::Ping(HeartbeatBeat { n: plan.number() }),
            9 => AgentToHub::Pong(HeartbeatBeat { n: plan.number() }),
            10 => AgentToHub::RefreshToken(RefreshToken { token: Secret::new("t") }),
            11 => AgentToHub::Log(LogBatch {
                stream: StreamId::from_u128(1),
                missing_from: None,
                offset: 0,
                records: Vec::new(),
            }),
            _ => AgentToHub::Disconnect(Disconnect { reason: None }),
        }
    }

    // ---- what dashboards say --------------------------------------------

    fn dashboard_says(&mut self, peer: usize, link: LinkId, plan: &mut Plan<'_>) {
        if plan.once_in(16) {
            // What a new link does: asks again what has no answer.
            if !self.links.get(&link).is_some_and(|link| link.welcome && link.asked.is_empty()) {
                return;
            }
            for (id, message) in self.peers[peer].unanswered.clone() {
                self.ask(link, id, message);
            }
            return;
        }
        let command = names::command(plan);
        let agent = names::agent(plan.below(3));
        let target = match plan.maybe(|_| ()) {
            Some(()) => Target::Command(command),
            None => Target::Agent(agent.clone()),
        };
        let known = self.links.get(&link).map(|link| link.streams.clone()).unwrap_or_default();
        let message = match plan.below(14) {
            0..3 => DashboardToHub::Request(CommandRequest {
                command,
                agent,
                spec: names::spec(plan),
                priority: names::priority(plan),
                deliver_within_ms: plan.maybe(Plan::number),
                retry: plan.once_in(2),
            }),
            3..5 => {
                let subscription = |plan: &mut Plan<'_>| TerminalSubscription {
                    target: target.clone(),
                    from: plan.of(&[From::Start, From::Live]),
                    lag: plan.of(&[Lag::EveryByte, Lag::Newest, Lag::Disconnect]),
                    window_bytes: plan.maybe(|plan| plan.number().max(1)),
                    positions: known
                        .iter()
                        .filter(|_| plan.once_in(2))
                        .map(|(stream, at)| (*stream, *at))
                        .collect(),
                };
                DashboardToHub::Subscribe(Subscribe { terminals: plan.list(2, subscription) })
            }
            5 => DashboardToHub::Unsubscribe(Unsubscribe { terminals: vec![target] }),
            6 => {
                let grace_ms = plan.maybe(Plan::number);
                DashboardToHub::Interrupt(CommandInterrupt { command, attempt: None, grace_ms })
            }
            7 => {
                let agents = plan.maybe(|_| vec![agent]);
                DashboardToHub::EmergencyStop(EmergencyStop { agents })
            }
            8 => {
                let size = TerminalSize::default();
                DashboardToHub::Resize(TerminalResize { command, size })
            }
            9 => DashboardToHub::Log(LogBatch {
                stream: StreamId::from_u128(1),
                missing_from: None,
                offset: 0,
                records: Vec::new(),
            }),
            10..12 => {
                let stream = known.keys().next().copied();
                let stream = stream.unwrap_or_else(|| names::stream(plan));
                DashboardToHub::Shown(TerminalShown { stream, offset: plan.offset() })
            }
            12 => {
                let data = names::bytes_at(StreamId::from_u128(1), 0, names::len(plan));
                let offset = plan.number().min(i64::MAX as u64 - 20_000);
                DashboardToHub::Input(TerminalInput { command, writer: None, offset, data })
            }
            _ => match plan.below(4) {
                0 => DashboardToHub::Ping(HeartbeatBeat { n: 1 }),
                1 => DashboardToHub::Pong(HeartbeatBeat { n: plan.number() }),
                2 => DashboardToHub::RefreshToken(RefreshToken { token: Secret::new("t") }),
                _ => DashboardToHub::Disconnect(Disconnect { reason: None }),
            },
        };
        if is_request(&message) {
            self.serial += 1;
            self.ask(link, names::request(self.serial), message);
        } else {
            let frame = codec::encode(&Envelope::bare(message));
            self.core.handle_frame(link, &frame, names::now(self.now));
        }
    }

    fn ask(&mut self, id: LinkId, request: RequestId, message: DashboardToHub) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if link.welcome {
            *link.asked.entry(request.clone()).or_default() += 1;
            self.peers[link.peer].unanswered.insert(request.clone(), message.clone());
        }
        let frame = codec::encode(&Envelope::request(request, message));
        self.core.handle_frame(id, &frame, names::now(self.now));
    }

    // ---- what the hub says ----------------------------------------------

    fn transmit_all(&mut self) {
        for id in self.links.keys().copied().collect::<Vec<_>>() {
            self.transmit(id, 64 * 1024);
        }
    }

    fn transmit(&mut self, id: LinkId, bytes: usize) {
        let mut rounds = 0;
        loop {
            let mut frames = Vec::new();
            let more = self.core.transmit(id, names::now(self.now), &mut frames, bytes);
            for frame in frames {
                self.hear(id, &frame);
            }
            if !more || !self.links.contains_key(&id) || bytes < 64 * 1024 {
                return;
            }
            rounds += 1;
            assert!(rounds < 10_000, "what waits ends");
        }
    }

    fn hear(&mut self, id: LinkId, frame: &Frame) {
        let Some(link) = self.links.get_mut(&id) else { panic!("a close is the last") };
        if let Frame::Close(_) = frame {
            self.lose(id);
            return;
        }
        if link.peer < AGENTS {
            for message in heard::<HubToAgent>(frame) {
                self.hear_as_agent(id, message);
            }
        } else {
            for message in heard::<HubToDashboard>(frame) {
                self.hear_as_dashboard(id, message);
            }
        }
    }

    fn hear_as_agent(&mut self, id: LinkId, message: HubToAgent) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let peer = &mut self.peers[link.peer];
        match message {
            HubToAgent::Ack(_) => link.welcome = true,
            HubToAgent::Execute(execute) => {
                let instance = names::instance(link.instance);
                let key = (execute.command, execute.attempt);
                let first = *self.executed.entry(key).or_insert(instance);
                assert_eq!(first, instance, "an attempt is given to one process");
                if link.instance == peer.instance && !peer.given.contains(&key) {
                    peer.given.push(key);
                }
            }
            HubToAgent::Taken(taken) => {
                for run in peer.runs.iter_mut().filter(|run| run.stream == taken.stream) {
                    run.allowed = taken.allowed;
                    if std::mem::take(&mut run.lost) {
                        run.sent = taken.stored;
                    }
                }
            }
            _ => {} // an agent has more to do with these than this one
        }
    }

    fn hear_as_dashboard(&mut self, id: LinkId, message: HubToDashboard) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let peer = &mut self.peers[link.peer];
        let is_stranger = link.peer == PEERS - 1;
        match message {
            HubToDashboard::Ack(_) => link.welcome = true,
            HubToDashboard::Ok(ok) => Self::answered(link, peer, ok.in_reply_to),
            HubToDashboard::Error(error) => Self::answered(link, peer, error.in_reply_to),
            HubToDashboard::Opened(opened) => {
                assert!(!is_stranger, "a stream crossed tenants");
                link.streams.insert(opened.stream, opened.from);
            }
            HubToDashboard::Output(output) => {
                let at = link.streams.get_mut(&output.stream).expect("opened before its output");
                assert_eq!(output.offset, *at, "in order, once, without a hole");
                for (offset, byte) in (output.offset..).zip(&output.data) {
                    assert_eq!(*byte, names::byte_at(output.stream, offset), "at {offset}");
                }
                *at += output.data.len() as u64;
            }
            HubToDashboard::Gap(gap) => {
                let at = link.streams.get_mut(&gap.stream).expect("opened before its gap");
                assert_eq!(gap.from, *at, "a gap is exact");
                *at = gap.to;
            }
            HubToDashboard::List(list) => drop(peer.roster.handle_list(list)),
            HubToDashboard::Agent(changed) => {
                assert!(!is_stranger, "an agent crossed tenants");
                peer.roster.handle_agent(changed);
            }
            HubToDashboard::Command(changed) | HubToDashboard::Complete(changed) => {
                if let Some(new) = &changed.command
                    && let Some(old) = peer.roster.roster().command(new.command)
                    && peer.roster.roster().position().is_some_and(|at| at.hub == changed.at.hub)
                {
                    let same = !old.status.is_final()
                        || old.status == new.status
                        || self.forgotten.contains(&new.command);
                    assert!(same, "{:?} became {:?}", old.status, new.status);
                }
                peer.roster.handle_command(changed);
            }
            HubToDashboard::Queue(changed) => drop(peer.roster.handle_queue(&changed)),
            _ => {} // about the link
        }
    }

    fn answered(link: &mut Link, peer: &mut Peer, request: Option<RequestId>) {
        let Some(request) = request else { return };
        peer.unanswered.remove(&request);
        *link.answered.entry(request).or_default() += 1;
    }

    // ---- what must hold -------------------------------------------------

    fn check(&mut self) {
        self.effects();
        assert!(self.core.log_bytes() <= limits().log_bytes_total, "all logs together");
        if self.core.deadline().is_some_and(|at| at <= self.now) {
            self.core.handle_timeout(names::now(self.now));
            let next = self.core.deadline();
            assert!(next.is_none_or(|at| at > self.now), "what was due is done");
            self.effects();
        }
    }

    /// Faults end: everything is answered, and everybody sees the same.
    fn finish(&mut self) {
        for _ in 0..20 {
            self.hooks(&mut Plan::new(&[]), 10_000);
            self.transmit_all();
            self.check();
            if self.waiting() == 0 {
                break;
            }
        }
        self.transmit_all();
        assert_eq!(self.waiting(), 0, "hooks come to rest");
        for link in self.links.values().filter(|link| link.welcome && link.peer >= AGENTS) {
            for (request, asked) in &link.asked {
                let answers = link.answered.get(request).copied().unwrap_or_default();
                assert!(answers >= *asked, "{request} was not answered");
            }
        }
        let rosters: Vec<_> = (AGENTS..PEERS - 1)
            .filter(|peer| {
                let link = self.peers[*peer].link.and_then(|id| self.links.get(&id));
                link.is_some_and(|link| link.welcome)
            })
            .map(|peer| self.peers[peer].roster.roster())
            .collect();
        let distinct: BTreeSet<String> =
            rosters.iter().map(|roster| format!("{roster:?}")).collect();
        assert!(distinct.len() <= 1, "dashboards disagree: {distinct:#?}");
        for id in self.links.keys().copied().collect::<Vec<_>>() {
            self.lose(id);
        }
        assert_eq!(self.core.links(), 0);
    }
}

fn setup(hubs: u8, queue: &MemoryQueue, log: &MemoryStreamLog) -> Setup {
    Setup {
        limits: limits(),
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(1 + u128::from(hubs)),
        epoch: QueueEpoch::from_u128(2),
        seed: [hubs; 32],
        stored: queue.stored(),
        streams: Some(log.stored()),
    }
}

fn identity(role: &Role) -> Identity {
    match role {
        Role::Agent(agent) => Identity::new(names::tenant(0), agent.as_str()),
        Role::Dashboard(Some(id)) if *id == names::dashboard(4) => {
            Identity::new(names::tenant(1), id.as_str())
        }
        Role::Dashboard(id) => {
            Identity::new(names::tenant(0), id.as_ref().map_or("", |id| id.as_str()))
        }
    }
}

/// What an honest agent lists.
fn held(run: &Run) -> HeldCommand {
    HeldCommand {
        command: run.command,
        attempt: run.attempt,
        status: CommandStatus::Running,
        spec: None,
        stream: Some(HeldStream { stream: run.stream, from: 0, to: run.end }),
        end: None,
    }
}

/// What another one may list.
fn claim(plan: &mut Plan<'_>) -> HeldCommand {
    let from = plan.offset() & 0xffff;
    let status = names::status(plan);
    HeldCommand {
        command: names::command(plan),
        attempt: u32::from(plan.below(4)),
        status,
        spec: plan.maybe(names::spec),
        stream: plan.maybe(|plan| HeldStream {
            stream: names::stream(plan),
            from,
            to: from + u64::from(plan.short()),
        }),
        end: status.is_final().then(|| names::end(plan)),
    }
}

fn is_request(message: &DashboardToHub) -> bool {
    matches!(
        message,
        DashboardToHub::Request(_)
            | DashboardToHub::Subscribe(_)
            | DashboardToHub::Unsubscribe(_)
            | DashboardToHub::Interrupt(_)
            | DashboardToHub::EmergencyStop(_)
            | DashboardToHub::Resize(_)
    )
}

fn heard<M: Direction>(frame: &Frame) -> Vec<M> {
    let rules = Rules { message_bytes_max: 4 << 20, ..Rules::from(&limits()) };
    let understood = |message: Result<Envelope<M>, codec::Invalid>| match message {
        Ok(envelope) => envelope.message,
        Err(invalid) => panic!("the hub said what is not understood: {invalid:?}"),
    };
    codec::decode::<M>(frame, rules).into_iter().map(understood).collect()
}
