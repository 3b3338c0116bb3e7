//! An agent's log and a hub's sink through any trouble, with the real cores:
//! links that break with frames and answers under way, hubs that are killed, and
//! a sink that fails, or fails after it has stored. Every record arrives once and
//! in order, or lies in a range that was named.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use trunkline_client::core::agent::{AgentCore, AgentSetup};
use trunkline_client::core::dialing::DialAction;
use trunkline_client::core::logs::{LogLimits, LogTail};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{HubInstance, QueueEpoch, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{LogLevel, LogRecord};
use trunkline_protocol::time::Now;
use trunkline_server::Identity;
use trunkline_server::core::{Core, Effect, LinkId, Setup};
use trunkline_server::hooks::WholeTenant;
use trunkline_server::hooks::{ForwardedLogs, LogSinkError};

#[derive(Debug, Clone)]
enum Step {
    /// So many records are made.
    Log(u8),
    Wait(u16),
    /// Frames arrive, at most so many.
    Up(u8),
    Down(u8),
    /// The link is lost with what is on it.
    Cut,
    /// The hub is killed; whether its sink still does what it was asked.
    Kill(bool),
    /// The sink answers: whether it has stored, and whether it says so.
    Sink(bool, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..12_u8).prop_map(Step::Log),
        3 => (0..3000_u16).prop_map(Step::Wait),
        6 => (1..4_u8).prop_map(Step::Up),
        6 => (1..4_u8).prop_map(Step::Down),
        1 => Just(Step::Cut),
        1 => any::<bool>().prop_map(Step::Kill),
        4 => (prop::bool::weighted(0.8), prop::bool::weighted(0.8))
            .prop_map(|(stores, tells)| Step::Sink(stores, tells)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_record_arrives_once_and_in_order_or_lies_in_a_named_gap(
        steps in prop::collection::vec(step(), 0..150)
    ) {
        let mut stage = Stage::new();
        for step in &steps {
            stage.does(step);
        }
        stage.settles();
        let made: Vec<u64> = (0..stage.made).collect();
        let mut told = stage.sink.missing.clone();
        told.extend(&stage.sink.records);
        told.sort_unstable();
        prop_assert_eq!(told, made);
        prop_assert!(stage.sink.records.is_sorted());
    }
}

struct Stage {
    now: Duration,
    agent: AgentCore,
    hub: Core,
    hubs: u128,
    links: u64,
    link: Option<LinkId>,
    up: VecDeque<Frame>,
    down: VecDeque<Frame>,
    /// What the sink of the present hub was asked, and has not answered.
    asked: VecDeque<ForwardedLogs>,
    sink: Sink,
    made: u64,
}

/// What lasts: it drops what it has, by number.
#[derive(Default)]
struct Sink {
    next: u64,
    records: Vec<u64>,
    missing: Vec<u64>,
    /// The hub cannot know what is here: it was killed, or was told that it is
    /// not.
    may_repeat: bool,
}

impl Sink {
    fn store(&mut self, logs: &ForwardedLogs) {
        let missing = logs.missing.clone().unwrap_or(logs.first..logs.first);
        assert!(missing.start <= self.next, "a hole that nobody named: {logs:?}");
        assert_eq!(missing.end, logs.first);
        let is_new = missing.start == self.next && logs.end() > self.next;
        assert!(is_new || self.may_repeat, "it has some of it: {} {logs:?}", self.next);
        self.missing.extend(missing.start.max(self.next)..missing.end);
        self.next = self.next.max(missing.end);
        for (number, record) in (logs.first..).zip(&logs.records) {
            assert_eq!(record.message, number.to_string());
            if number >= self.next {
                self.records.push(number);
                self.next = number + 1;
            }
        }
    }
}

impl Stage {
    fn new() -> Self {
        let limits = LogLimits { records_max: 20, ..LogLimits::default() };
        let logs = Some(LogTail::new(StreamId::from_u128(1), limits));
        let setup = AgentSetup { logs, ..AgentSetup::new("build-1".parse().unwrap()) };
        Self {
            now: Duration::ZERO,
            agent: AgentCore::new(setup, [1; 32], at(Duration::ZERO)),
            hub: hub(0, Duration::ZERO),
            hubs: 0,
            links: 0,
            link: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            asked: VecDeque::new(),
            sink: Sink::default(),
            made: 0,
        }
    }

    fn does(&mut self, step: &Step) {
        match step {
            Step::Log(count) => {
                for _ in 0..*count {
                    let record = LogRecord {
                        ts_ms: 0,
                        level: LogLevel::Info,
                        target: String::new(),
                        message: self.made.to_string(),
                        fields: BTreeMap::new(),
                    };
                    self.agent.push_log(self.made, record, at(self.now));
                    self.made += 1;
                }
            }
            Step::Wait(ms) => self.waits(Duration::from_millis((*ms).into())),
            Step::Up(count) => {
                for _ in 0..*count {
                    self.listens();
                    let (Some(link), Some(frame)) = (self.link, self.up.pop_front()) else { break };
                    if matches!(frame, Frame::Close(_)) {
                        self.is_cut();
                    } else {
                        self.hub.handle_frame(link, &frame, at(self.now));
                    }
                }
            }
            Step::Down(count) => {
                for _ in 0..*count {
                    self.listens();
                    let Some(frame) = self.down.pop_front() else { break };
                    if matches!(frame, Frame::Close(_)) {
                        self.is_cut();
                    } else {
                        self.agent.handle_frame(&frame, at(self.now));
                    }
                }
            }
            Step::Cut => self.is_cut(),
            Step::Kill(does) => {
                self.is_cut();
                for logs in std::mem::take(&mut self.asked) {
                    if *does {
                        self.sink.store(&logs);
                    }
                }
                self.hubs += 1;
                self.hub = hub(self.hubs, self.now);
                self.sink.may_repeat = true;
            }
            Step::Sink(stores, tells) => {
                let Some(logs) = self.asked.pop_front() else { return };
                if *stores || *tells {
                    self.sink.store(&logs);
                }
                let result = if *tells { Ok(()) } else { Err(LogSinkError("full".into())) };
                self.sink.may_repeat |= *stores && !*tells;
                self.hub.handle_logged(&logs, &result, at(self.now));
            }
        }
        self.listens();
    }

    fn waits(&mut self, time: Duration) {
        self.now += time;
        self.agent.handle_timeout(at(self.now));
        self.hub.handle_timeout(at(self.now));
    }

    /// What either side has to say is on its way.
    fn listens(&mut self) {
        while self.agent.poll_output().is_some() {}
        match self.agent.poll_dial() {
            Some(DialAction::Dial { .. }) => {
                self.links += 1;
                let link = LinkId(self.links);
                self.link = Some(link);
                self.hub.handle_arrived(link, None, at(self.now));
                self.hub.handle_opened(link, None, None, at(self.now));
                self.agent.handle_dialed(None, at(self.now));
            }
            Some(DialAction::HangUp) => self.loses_the_link(),
            None => {}
        }
        while let Some(effect) = self.hub.poll_effect() {
            match effect {
                Effect::Authenticate { link, .. } => {
                    let identity = Identity::new("default".parse().unwrap(), "build-1");
                    self.hub.handle_authenticated(link, Ok(identity), at(self.now));
                }
                Effect::TakeLogs(logs) => {
                    self.asked.push_back(*logs);
                    assert_eq!(self.asked.len(), 1, "one batch at a time");
                }
                Effect::Wake(_) | Effect::Observe(_) => {}
                Effect::Store { .. } | Effect::Forget(_) | Effect::Keep(_) => unreachable!(),
            }
        }
        if let Some(link) = self.link {
            while let Some(frame) = self.agent.poll_transmit(at(self.now)) {
                self.up.push_back(frame);
            }
            let mut frames = Vec::new();
            self.hub.transmit(link, at(self.now), &mut frames, 64 * 1024);
            self.down.extend(frames);
        }
    }

    fn is_cut(&mut self) {
        if self.link.is_some() {
            self.agent.handle_lost(&Close::new(CloseCode::Lost, "cut"), at(self.now));
        }
        self.loses_the_link();
    }

    fn loses_the_link(&mut self) {
        if let Some(link) = self.link.take() {
            self.hub.handle_lost(link, at(self.now));
        }
        self.up.clear();
        self.down.clear();
    }

    /// No more trouble.
    fn settles(&mut self) {
        for _ in 0..1000 {
            for step in [Step::Up(10), Step::Sink(true, true), Step::Down(10)] {
                self.does(&step);
            }
            if self.sink.next == self.made {
                return;
            }
            self.does(&Step::Wait(100));
        }
        panic!("{} of {} came", self.sink.next, self.made);
    }
}

fn hub(number: u128, now: Duration) -> Core {
    let setup = Setup {
        limits: Limits::default(),
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(number),
        epoch: QueueEpoch::from_u128(number),
        seed: [2; 32],
        stored: Vec::new(),
        streams: None,
    };
    let mut hub = Core::new(setup, at(now));
    hub.take_logs();
    hub
}

fn at(monotonic: Duration) -> Now {
    let wall_ms = u64::try_from(monotonic.as_millis()).unwrap();
    Now { monotonic, wall_ms }
}
