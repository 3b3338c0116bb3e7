//! What a hub may say to a dashboard, and what a person may do with it: a good
//! hub, a broken one, raw bytes. Whoever reads gets every byte once and in
//! order, every request ends once, and the hub can read what is said.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trunkline_client::core::dashboard::{
    DashboardCore, DashboardSetup, Next, Output, ReaderId, Reading, RequestError, TerminalEvent,
};
use trunkline_client::core::dialing::DialAction;
use trunkline_client::{Audit, OutboxLimits};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{QueueEpoch, RequestId, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    Accepted, AgentChanged, AgentList, CommandChanged, CommandInterrupt, CommandRequest,
    ConnectionAck, DashboardToHub, EmergencyStop, Envelope, ErrorCode, Feature, From, Greeting,
    Heartbeat, HeartbeatBeat, HubToDashboard, Lag, LinkLimits, LinkRates, Peer, QueueChanged,
    QueueState, RefreshFailed, RefreshNeeded, RefreshSuccess, Refusal, RosterPosition, Secret,
    Subscription, Target, TerminalGap, TerminalInputTaken, TerminalOpened, TerminalOutput,
};
use trunkline_protocol::rate::Rate;

use crate::names;
use crate::plan::Plan;

/// Frames that the link takes at a time.
const FRAMES: u32 = 200;

struct Stage {
    core: DashboardCore,
    now: Duration,
    linked: bool,
    acked: bool,
    revision: u64,
    /// Requests as the hub has heard them, to be answered.
    heard: Vec<RequestId>,
    open: BTreeSet<RequestId>,
    readers: Vec<ReaderId>,
    /// Where each reader stands in each stream, and whether it has ended.
    seen: BTreeMap<(ReaderId, StreamId), (u64, bool)>,
}

/// Follows the plan.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let setup = DashboardSetup {
        can_renew: plan.once_in(2),
        outbox: OutboxLimits { requests_max: 8, ..OutboxLimits::default() },
        ..DashboardSetup::default()
    };
    let mut stage = Stage {
        core: DashboardCore::new(setup, [4; 32], names::now(Duration::ZERO)),
        now: Duration::ZERO,
        linked: false,
        acked: false,
        revision: 0,
        heard: Vec::new(),
        open: BTreeSet::new(),
        readers: Vec::new(),
        seen: BTreeMap::new(),
    };
    stage.settle();
    while !plan.is_over() {
        stage.step(plan);
        stage.settle();
    }
    stage.core.stop(None, names::now(stage.now));
    for _ in 0..5 {
        stage.settle();
        stage.now += Duration::from_secs(40);
        stage.core.handle_timeout(names::now(stage.now));
    }
    stage.settle();
    assert!(stage.core.connection().is_over(), "who stops is gone");
    assert!(stage.open.is_empty(), "every request ends: {:?}", stage.open);
}

impl Stage {
    fn step(&mut self, plan: &mut Plan<'_>) {
        let now = names::now(self.now);
        match plan.byte() {
            0..140 if self.linked => {
                let message = if self.acked { self.message(plan) } else { ack(plan) };
                self.acked = true;
                let frame = match &message {
                    HubToDashboard::Output(output) if plan.maybe(|_| ()).is_none() => {
                        codec::encode_output(output)
                    }
                    _ => codec::encode(&Envelope::bare(message)),
                };
                self.core.handle_frame(&frame, now);
            }
            140..150 if self.linked => {
                let len = plan.byte().into();
                let frame = match plan.below(2) {
                    0 => Frame::Text(plan.take(len).to_vec().into()),
                    _ => Frame::Binary(plan.take(len).to_vec().into()),
                };
                self.core.handle_frame(&frame, now);
            }
            0..150 => {
                if !self.core.connection().is_over() {
                    self.now += Duration::from_secs(40);
                    self.core.handle_timeout(names::now(self.now));
                }
            }
            150..165 => {
                let target = target(plan);
                let reading = Reading {
                    from: plan.of(&[From::Start, From::Live]),
                    lag: plan.of(&[Lag::EveryByte, Lag::Newest, Lag::Disconnect]),
                    window_bytes: plan.of(&[1, 100, 20_000, 1024 * 1024]),
                };
                if self.readers.len() < 8 {
                    self.readers.push(self.core.read(target, reading, now));
                }
            }
            165..170 => {
                if !self.readers.is_empty() {
                    let index = usize::from(plan.byte()) % self.readers.len();
                    let reader = self.readers.remove(index);
                    self.core.unread(reader);
                    assert_eq!(self.core.take(reader), Next::Over, "nothing follows");
                }
            }
            170..195 => {
                if !self.readers.is_empty() {
                    let index = usize::from(plan.byte()) % self.readers.len();
                    self.take(self.readers[index], plan.below(8));
                }
            }
            195..210 => {
                let command = names::command(plan);
                let message = match plan.below(4) {
                    0 | 1 => DashboardToHub::Request(CommandRequest {
                        command,
                        agent: names::agent(plan.below(2)),
                        spec: names::spec(plan),
                        priority: names::priority(plan),
                        deliver_within_ms: None,
                        retry: plan.once_in(2),
                    }),
                    2 => DashboardToHub::Interrupt(CommandInterrupt {
                        command,
                        attempt: None,
                        grace_ms: None,
                    }),
                    _ => DashboardToHub::EmergencyStop(EmergencyStop::default()),
                };
                let patience = plan.maybe(names::pause);
                match self.core.request(message, patience, now) {
                    Ok(id) => assert!(self.open.insert(id), "a request has an id of its own"),
                    Err(RequestError::Full | RequestError::Closed) => {}
                    Err(other) => panic!("nothing was wrong with the request: {other}"),
                }
            }
            210..220 => {
                let command = names::command(plan);
                let mut data = names::bytes_at(StreamId::from_u128(1), 0, names::len(plan));
                let before = data.len();
                let typed = self.core.input(command, &mut data);
                assert!(data.len() <= before && (typed.is_ok() || data.len() == before));
                let _ = self.core.has_room(command);
            }
            220..235 => {
                self.now += names::pause(plan);
                self.core.handle_timeout(names::now(self.now));
            }
            235..246 => {
                if self.linked {
                    self.linked = false;
                    let code = plan.of(&[
                        CloseCode::Lost,
                        CloseCode::Restart,
                        CloseCode::Unauthorized,
                        CloseCode::Lagging,
                        CloseCode::Internal,
                    ]);
                    self.core.handle_lost(&Close::new(code, plan.text(4)), now);
                }
            }
            246..250 => self.core.retry_now(now),
            250..254 => self.core.refresh(Secret::new("new")),
            _ => {
                if plan.once_in(8) {
                    self.core.stop(plan.maybe(|plan| plan.text(4)), now);
                }
            }
        }
    }

    /// Takes some of a reader's events, and checks each.
    fn take(&mut self, reader: ReaderId, many: u8) {
        for _ in 0..many {
            let Next::Event(event) = self.core.take(reader) else { return };
            match event {
                TerminalEvent::Opened { stream, from, .. } => {
                    let known = self.seen.insert((reader, stream), (from, false));
                    assert!(known.is_none(), "a stream is opened once");
                }
                TerminalEvent::Output { stream, offset, data, .. } => {
                    let seen = self.seen.get_mut(&(reader, stream));
                    let (at, ended) = seen.expect("opened before its output");
                    assert_eq!((offset, *ended), (*at, false), "in order, without a hole");
                    assert!(!data.is_empty());
                    for (offset, byte) in (offset..).zip(&data) {
                        assert_eq!(*byte, names::byte_at(stream, offset));
                    }
                    *at += data.len() as u64;
                }
                TerminalEvent::Gap { stream, gap } => {
                    let seen = self.seen.get_mut(&(reader, stream));
                    let (at, ended) = seen.expect("opened before its gap");
                    assert_eq!((gap.from, *ended), (*at, false), "a gap is exact");
                    assert!(gap.to > gap.from);
                    *at = gap.to;
                }
                TerminalEvent::Ended { stream, audit, .. } => {
                    let seen = self.seen.get_mut(&(reader, stream));
                    let (_, ended) = seen.expect("opened before its end");
                    assert!(!std::mem::replace(ended, true), "a stream ends once");
                    assert_eq!(audit, Audit::NotChecked, "there is no digest here");
                }
                TerminalEvent::Refused(_) | TerminalEvent::Lost(_) => {}
            }
        }
    }

    /// Hears all that the core has to say.
    fn settle(&mut self) {
        let now = names::now(self.now);
        let (mut rounds, mut frames) = (0, 0);
        loop {
            rounds += 1;
            assert!(rounds < 10_000, "it comes to rest");
            if let Some(action) = self.core.poll_dial() {
                self.linked = false;
                if matches!(action, DialAction::Dial { .. }) {
                    self.core.handle_dialed(Some(Secret::new("token")), now);
                    self.linked = true;
                    self.acked = false;
                    self.heard.clear();
                }
                continue;
            }
            if let Some(output) = self.core.poll_output() {
                match output {
                    Output::Answered { request, .. } => {
                        assert!(self.open.remove(&request), "{request} ended twice");
                    }
                    Output::Readable(_) | Output::InputMoved(_) | Output::Event(_) => {}
                }
                continue;
            }
            if !self.linked {
                break;
            }
            // A link takes only so much at a time.
            if frames == FRAMES {
                return;
            }
            let Some(frame) = self.core.poll_transmit(now) else { break };
            frames += 1;
            self.hear(&frame);
        }
        if self.core.deadline(now).is_some_and(|at| at <= self.now) {
            self.core.handle_timeout(now);
            let dialling = self.core.poll_dial();
            if dialling == Some(DialAction::HangUp) {
                self.linked = false;
            } else if dialling.is_some() {
                self.core.handle_dialed(None, now);
                self.linked = true;
                self.acked = false;
            }
            let said = self.linked.then(|| self.core.poll_transmit(now)).flatten();
            if let Some(frame) = &said {
                self.hear(frame);
            }
            let next = self.core.deadline(now);
            let quiet = dialling.is_none() && said.is_none();
            assert!(!quiet || next.is_none_or(|at| at > self.now), "what was due is done");
        }
    }

    fn hear(&mut self, frame: &Frame) {
        if let Frame::Close(close) = frame {
            self.linked = false;
            self.core.handle_lost(&close.clone(), names::now(self.now));
            return;
        }
        // It keeps to what it was told, which may be more than the default.
        let any = usize::MAX;
        let rules = Rules::from(&Limits::default());
        let rules = Rules { message_bytes_max: any, chunk_bytes_max: any, ..rules };
        if codec::decode::<Greeting>(frame, rules).iter().all(Result::is_ok) {
            return;
        }
        for message in codec::decode::<DashboardToHub>(frame, rules) {
            let message = message.expect("a hub understands its dashboard");
            self.heard.extend(message.id);
        }
    }

    fn message(&mut self, plan: &mut Plan<'_>) -> HubToDashboard {
        let command = names::command(plan);
        let stream = names::stream(plan);
        let position = |stage: &mut Self, plan: &mut Plan<'_>| {
            stage.revision += u64::from(!plan.once_in(6));
            RosterPosition { hub: names::hub(0), revision: stage.revision }
        };
        match plan.below(20) {
            0..2 => {
                let at = position(self, plan);
                HubToDashboard::List(AgentList {
                    at,
                    reset: !plan.once_in(3),
                    complete: !plan.once_in(3),
                    agents: plan.list(2, |plan| names::agent_state(plan, 0)),
                    commands: plan.list(3, names::command_state),
                    queues: Vec::new(),
                })
            }
            2 => {
                let at = position(self, plan);
                let agent = plan.maybe(|plan| names::agent_state(plan, 1));
                let removed = plan.maybe(|_| names::agent(1));
                HubToDashboard::Agent(AgentChanged { at, agent, removed })
            }
            3..6 => {
                let at = position(self, plan);
                let removed = plan.once_in(8).then_some(command);
                let command = plan.maybe(names::command_state);
                let changed = CommandChanged { at, command, removed };
                match plan.below(2) {
                    0 => HubToDashboard::Command(changed),
                    _ => HubToDashboard::Complete(changed),
                }
            }
            6 => {
                let at = position(self, plan);
                let commands = plan.list(3, names::command);
                let queue = QueueState { agent: names::agent(plan.below(2)), commands };
                HubToDashboard::Queue(QueueChanged { at, queue })
            }
            7..9 => HubToDashboard::Opened(TerminalOpened {
                stream,
                command,
                attempt: u32::from(plan.below(4)),
                agent: names::agent(plan.below(2)),
                from: if plan.once_in(3) { plan.offset() } else { 0 },
                live_from: plan.offset(),
            }),
            9..13 => {
                let known = self.seen.iter().find(|((_, seen), _)| *seen == stream);
                let offset = match (plan.below(3), known) {
                    (0, _) | (_, None) => plan.number().min(1 << 40),
                    (_, Some((_, (at, _)))) => *at,
                };
                let data = names::bytes_at(stream, offset, names::len(plan).min(16 * 1024));
                let channel = names::channel(plan);
                HubToDashboard::Output(TerminalOutput { stream, offset, channel, data })
            }
            13 => {
                let from = plan.number().min(1 << 40);
                let to = from + 1 + plan.number() % 100_000;
                HubToDashboard::Gap(TerminalGap { stream, from, to, reason: names::reason(plan) })
            }
            14 => HubToDashboard::InputTaken(TerminalInputTaken {
                command,
                writer: self.core.id().clone(),
                offset: plan.offset(),
                resend: plan.once_in(2),
            }),
            15..17 => {
                let in_reply_to = match self.heard.pop() {
                    Some(id) => Some(id),
                    None => plan.maybe(|_| names::request(1)),
                };
                match plan.below(3) {
                    0 => HubToDashboard::Error(
                        Refusal::new(
                            plan.of(&[
                                ErrorCode::NotFound,
                                ErrorCode::LimitReached,
                                ErrorCode::InvalidMessage,
                                ErrorCode::NotRunning,
                            ]),
                            plan.text(4),
                        )
                        .reply_to(in_reply_to),
                    ),
                    _ => HubToDashboard::Ok(Accepted {
                        in_reply_to,
                        command: plan.maybe(|_| command),
                        subscription: plan.maybe(|_| Subscription::default()),
                        stopped: None,
                    }),
                }
            }
            17 => HubToDashboard::Ping(HeartbeatBeat { n: plan.number() }),
            18 => HubToDashboard::Pong(HeartbeatBeat { n: plan.number() }),
            _ => match plan.below(4) {
                0 => HubToDashboard::RefreshNeeded(RefreshNeeded { expires_in_ms: 0 }),
                1 => HubToDashboard::RefreshSuccess(RefreshSuccess { expires_in_ms: None }),
                2 => HubToDashboard::RefreshFailed(RefreshFailed { message: String::new() }),
                _ => ack(plan),
            },
        }
    }
}

fn target(plan: &mut Plan<'_>) -> Target {
    match plan.below(2) {
        0 => Target::Command(names::command(plan)),
        _ => Target::Agent(names::agent(plan.below(2))),
    }
}

fn ack(plan: &mut Plan<'_>) -> HubToDashboard {
    let peer = match plan.below(12) {
        11 => Peer::Agent(names::agent(0)),
        _ => Peer::Dashboard(names::dashboard(0)),
    };
    let odd = plan.once_in(8);
    let limits = Limits::default().for_link();
    HubToDashboard::Ack(ConnectionAck {
        protocol: 1,
        tenant: names::tenant(0),
        peer,
        hub: names::hub(plan.below(2)),
        queue: QueueEpoch::from_u128(u128::from(plan.below(2))),
        features: plan.maybe(|_| Feature::Batch).into_iter().collect(),
        limits: if odd {
            LinkLimits {
                chunk_bytes_max: plan.number(),
                batch_messages_max: plan.below(3).into(),
                input_bytes_ahead: plan.number(),
                rates: LinkRates {
                    requests: Rate {
                        every: Duration::from_millis(plan.number() % 10_000),
                        burst: plan.below(4).into(),
                    },
                    ..limits.rates
                },
                ..limits
            }
        } else {
            limits
        },
        heartbeat: match plan.below(4) {
            0 => Heartbeat { idle_ms: plan.number(), timeout_ms: plan.number() },
            _ => Heartbeat { idle_ms: 15_000, timeout_ms: 45_000 },
        },
    })
}
