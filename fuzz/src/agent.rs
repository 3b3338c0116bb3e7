//! What a hub may say to an agent, and what programs may do in it: a good hub,
//! a broken one, raw bytes. The agent never panics, keeps its tails within
//! their bounds, and says only what a hub can read.

use std::time::Duration;

use trunkline_client::core::agent::{AgentCore, AgentOutput, AgentSetup};
use trunkline_client::{ConnectionState, Outcome};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{CommandId, QueueEpoch, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    Accepted, AgentControl, AgentReport, AgentToHub, CommandExecute, CommandInterrupt,
    CommandSettled, ConnectionAck, ControlAction, Envelope, ErrorCode, Feature, Greeting,
    Heartbeat, HeartbeatBeat, HubToAgent, LinkLimits, Peer, RefreshFailed, RefreshNeeded,
    RefreshSuccess, Refusal, Secret, TerminalInput, TerminalResize, TerminalSize, TerminalTaken,
};

use crate::names;
use crate::plan::Plan;

const TAIL_BYTES: usize = 64 * 1024;

/// Commands an agent may hold, and what each may exceed its tail by while one
/// write is taken.
const TAILS_BYTES_MAX: usize = names::SERIALS as usize * 2 * TAIL_BYTES;

/// Frames that the link takes at a time.
const FRAMES: u32 = 200;

struct Stage {
    core: AgentCore,
    now: Duration,
    linked: bool,
    acked: bool,
    running: Vec<CommandId>,
    /// Streams as the agent named them, and how much of each was sent.
    streams: Vec<(StreamId, u64)>,
}

/// Follows the plan.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let mut setup = AgentSetup::new(names::agent(0));
    setup.slots = u32::from(plan.below(3)) + 1;
    setup.tail_bytes = TAIL_BYTES;
    setup.can_renew_token = plan.once_in(2);
    let mut stage = Stage {
        core: AgentCore::new(setup, [3; 32], names::now(Duration::ZERO)),
        now: Duration::ZERO,
        linked: false,
        acked: false,
        running: Vec::new(),
        streams: Vec::new(),
    };
    stage.settle();
    while !plan.is_over() {
        stage.step(plan);
        stage.settle();
    }
    let now = names::now(stage.now);
    stage.core.stop(now);
    for command in std::mem::take(&mut stage.running) {
        stage.core.ended(command, Outcome::Exited(0), now);
    }
    for _ in 0..20 {
        stage.now += Duration::from_secs(40);
        stage.core.handle_timeout(names::now(stage.now));
        stage.settle();
        if stage.core.connection().is_over() {
            return;
        }
    }
    panic!("an agent that is stopped is gone some time");
}

impl Stage {
    fn step(&mut self, plan: &mut Plan<'_>) {
        let now = names::now(self.now);
        match plan.byte() {
            0..110 if self.linked => {
                let message = if self.acked { message(plan, &self.streams) } else { ack(plan) };
                self.acked = true;
                let id = plan.maybe(|_| names::request(1));
                let envelope = Envelope { id, ts: None, message };
                self.core.handle_frame(&codec::encode(&envelope), now);
            }
            110..120 if self.linked => {
                let len = plan.byte().into();
                let frame = match plan.below(2) {
                    0 => Frame::Text(plan.take(len).to_vec().into()),
                    _ => Frame::Binary(plan.take(len).to_vec().into()),
                };
                self.core.handle_frame(&frame, now);
            }
            0..120 => {
                if matches!(self.core.connection(), ConnectionState::Disconnected { .. }) {
                    return;
                }
                self.now += Duration::from_secs(40);
                self.core.handle_timeout(names::now(self.now));
            }
            120..180 => {
                let Some(command) = self.pick(plan) else { return };
                let len = names::len(plan) * u64::from(plan.below(8) + 1);
                let bytes = names::bytes_at(StreamId::from_u128(1), 0, len);
                let taken = self.core.write(command, names::channel(plan), &bytes, now);
                assert!(taken <= bytes.len());
            }
            180..200 => {
                let Some(command) = self.pick(plan) else { return };
                while self.core.take_event(command, plan.once_in(2)).is_some() {}
                if plan.once_in(3) {
                    self.core.signalled(command);
                }
            }
            200..215 => {
                let Some(command) = self.pick(plan) else { return };
                let outcome = plan.of(&[
                    Outcome::Exited(0),
                    Outcome::Signalled(9),
                    Outcome::Interrupted,
                    Outcome::Failed("no".into()),
                ]);
                if plan.once_in(6) {
                    self.core.lost(command, "gone", now);
                } else {
                    self.core.ended(command, outcome, now);
                }
                self.running.retain(|running| *running != command);
            }
            215..235 => {
                self.now += names::pause(plan);
                self.core.handle_timeout(names::now(self.now));
            }
            235..245 => {
                if self.linked {
                    self.linked = false;
                    let code = plan.of(&[
                        CloseCode::Lost,
                        CloseCode::Restart,
                        CloseCode::Unauthorized,
                        CloseCode::Violation,
                        CloseCode::Internal,
                    ]);
                    self.core.handle_lost(&Close::new(code, plan.text(4)), now);
                }
            }
            245..250 => self.core.report(AgentReport {
                note: plan.maybe(|plan| plan.text(8)),
                ..AgentReport::default()
            }),
            250..254 => {
                if self.core.poll_refresh().is_some() {
                    self.core.refresh(Secret::new("new"), now);
                }
                self.core.retry_now(now);
            }
            _ => {
                if plan.once_in(8) {
                    self.core.stop(now);
                }
            }
        }
    }

    fn pick(&self, plan: &mut Plan<'_>) -> Option<CommandId> {
        let index = usize::from(plan.byte());
        let running = &self.running;
        (!running.is_empty()).then(|| running[index % running.len()])
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
                if matches!(action, trunkline_client::core::dialing::DialAction::Dial { .. }) {
                    self.core.handle_dialed(Some(Secret::new("token")), now);
                    self.linked = true;
                    self.acked = false;
                }
                continue;
            }
            if let Some(output) = self.core.poll_output() {
                match output {
                    AgentOutput::Execute(command) => {
                        if self.core.begin(command, now).is_some() {
                            self.running.push(command);
                        }
                    }
                    AgentOutput::Kill(command) => {
                        self.running.retain(|running| *running != command);
                    }
                    AgentOutput::Journal(records) => panic!("it keeps no journal: {records:?}"),
                    AgentOutput::Event(_) | AgentOutput::Room(_) | AgentOutput::Report => {}
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
        let due = self.core.deadline().is_some_and(|at| at <= self.now);
        if due {
            self.core.handle_timeout(now);
            let quiet = self.core.poll_dial().is_none();
            let next = self.core.deadline();
            assert!(!quiet || next.is_none_or(|at| at > self.now), "what was due is done");
        }
        assert!(self.core.tail_bytes() <= TAILS_BYTES_MAX, "{} bytes kept", self.core.tail_bytes());
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
        for message in codec::decode::<AgentToHub>(frame, rules) {
            match message.expect("a hub understands its agent").message {
                AgentToHub::Started(started) => self.streams.push((started.stream, 0)),
                AgentToHub::Output(output) => {
                    let known = self.streams.iter_mut().find(|(id, _)| *id == output.stream);
                    let (_, sent) = known.expect("started before its output");
                    *sent = (*sent).max(output.offset + output.data.len() as u64);
                }
                _ => {} // what it says about itself
            }
        }
    }
}

fn ack(plan: &mut Plan<'_>) -> HubToAgent {
    let peer = match plan.below(12) {
        11 => Peer::Dashboard(names::dashboard(0)),
        _ => Peer::Agent(names::agent(0)),
    };
    let odd = plan.once_in(4);
    let limits = Limits::default().for_link();
    HubToAgent::Ack(ConnectionAck {
        protocol: 1,
        tenant: names::tenant(0),
        peer,
        hub: names::hub(plan.below(2)),
        queue: QueueEpoch::from_u128(u128::from(plan.below(2))),
        features: plan.maybe(|_| Feature::Binary).into_iter().collect(),
        limits: if odd {
            LinkLimits {
                message_bytes_max: plan.number(),
                chunk_bytes_max: plan.number(),
                batch_messages_max: plan.below(3).into(),
                grant_bytes: plan.number(),
                ..limits
            }
        } else {
            limits
        },
        heartbeat: match plan.below(4) {
            0 => Heartbeat { idle_ms: plan.number(), timeout_ms: plan.number() },
            _ => Heartbeat { idle_ms: 2000, timeout_ms: 5000 },
        },
    })
}

fn message(plan: &mut Plan<'_>, streams: &[(StreamId, u64)]) -> HubToAgent {
    let command = names::command(plan);
    let attempt = u32::from(plan.below(4));
    match plan.below(18) {
        0..4 => HubToAgent::Execute(CommandExecute { command, attempt, spec: names::spec(plan) }),
        4 => {
            let attempt = plan.maybe(|_| attempt);
            let grace_ms = plan.maybe(Plan::number);
            HubToAgent::Interrupt(CommandInterrupt { command, attempt, grace_ms })
        }
        5 => HubToAgent::Settled(CommandSettled { command, attempt }),
        6..8 => {
            let data = names::bytes_at(StreamId::from_u128(1), 0, names::len(plan));
            let offset = plan.number().min(i64::MAX as u64 - 20_000);
            let writer = plan.maybe(|plan| names::dashboard(plan.below(3)));
            HubToAgent::Input(TerminalInput { command, writer, offset, data })
        }
        8 => HubToAgent::Resize(TerminalResize { command, size: TerminalSize::default() }),
        9..12 => {
            let known = streams.get(usize::from(plan.byte()) % streams.len().max(1));
            let (stream, sent) = known.copied().unwrap_or_else(|| (names::stream(plan), 0));
            let (stored, allowed) = match plan.below(4) {
                0 => (plan.offset(), plan.offset()),
                _ => (sent, sent + 64 * 1024),
            };
            HubToAgent::Taken(TerminalTaken { stream, stored, allowed })
        }
        12 => {
            let action = plan.of(&[ControlAction::Report, ControlAction::Other("dance".into())]);
            HubToAgent::Control(AgentControl { action })
        }
        13 => HubToAgent::Ok(Accepted::default()),
        14 => HubToAgent::Error(Refusal::new(
            plan.of(&[ErrorCode::NotFound, ErrorCode::InvalidMessage, ErrorCode::Internal]),
            plan.text(5),
        )),
        15 => HubToAgent::Ping(HeartbeatBeat { n: plan.number() }),
        16 => HubToAgent::Pong(HeartbeatBeat { n: plan.number() }),
        _ => match plan.below(4) {
            0 => HubToAgent::RefreshNeeded(RefreshNeeded { expires_in_ms: plan.number() }),
            1 => HubToAgent::RefreshSuccess(RefreshSuccess { expires_in_ms: None }),
            2 => HubToAgent::RefreshFailed(RefreshFailed { message: String::new() }),
            _ => ack(plan),
        },
    }
}
