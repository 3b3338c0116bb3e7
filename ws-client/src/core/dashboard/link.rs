//! What a dashboard says on one link, and in which order.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use trunkline_protocol::codec;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::RequestId;
use trunkline_protocol::liveness::Liveness;
use trunkline_protocol::message::{
    ConnectionAck, DashboardConnect, DashboardToHub, Envelope, Feature, Greeting, HeartbeatBeat,
    LinkLimits, PROTOCOLS, RefreshToken, Refusal, Secret, Since, Subscribe, Target, TerminalShown,
    TerminalSubscription, Unsubscribe,
};
use trunkline_protocol::time::Now;

use super::{DashboardCore, encode};
use crate::core::Class;
use crate::core::outbox::Batching;

#[derive(Debug)]
pub(super) enum Link {
    None,
    /// The greeting is to be said, or was.
    Greeting {
        said: bool,
    },
    Up(Box<Up>),
    /// This side has ended it: only its last words go out, in time or never.
    Closing {
        last: VecDeque<Frame>,
        why: Close,
        until: Duration,
    },
}

#[derive(Debug)]
pub(super) struct Up {
    pub(super) liveness: Liveness,
    pub(super) limits: LinkLimits,
    pub(super) batching: Option<Batching>,
    pub(super) ping: Option<u64>,
    pub(super) pong: Option<u64>,
    pub(super) errors: VecDeque<Refusal>,
    /// A new token to go on with.
    pub(super) refresh: Option<Secret>,
    pub(super) unsubscribe: BTreeSet<Target>,
    /// Subscriptions that are not answered yet.
    pub(super) subscribing: HashMap<RequestId, Vec<Target>>,
    /// Targets refused in company, to be asked for one by one.
    pub(super) alone: BTreeSet<Target>,
    /// Targets that the hub asked to be asked for later.
    pub(super) later: BTreeMap<Target, Duration>,
}

impl Up {
    /// A link on which the hub has just said `ack`.
    pub(super) fn new(ack: &ConnectionAck, now: Now) -> Self {
        let idle = Duration::from_millis(ack.heartbeat.idle_ms.max(1));
        let timeout = Duration::from_millis(ack.heartbeat.timeout_ms.max(1));
        let batching = Batching {
            messages_max: ack.limits.batch_messages_max as usize,
            bytes_max: bytes(ack.limits.message_bytes_max),
        };
        Self {
            liveness: Liveness::new(idle, timeout, now.monotonic),
            limits: ack.limits,
            batching: ack.features.contains(&Feature::Batch).then_some(batching),
            ping: None,
            pong: None,
            errors: VecDeque::new(),
            refresh: None,
            unsubscribe: BTreeSet::new(),
            subscribing: HashMap::new(),
            alone: BTreeSet::new(),
            later: BTreeMap::new(),
        }
    }

    /// What keeps the link alive and honest.
    fn poll_control(&mut self) -> Option<DashboardToHub> {
        if let Some(n) = self.pong.take() {
            return Some(DashboardToHub::Pong(HeartbeatBeat { n }));
        }
        if let Some(n) = self.ping.take() {
            return Some(DashboardToHub::Ping(HeartbeatBeat { n }));
        }
        self.errors.pop_front().map(DashboardToHub::Error)
    }
}

/// A limit as a length in memory.
pub(super) fn bytes(limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

impl DashboardCore {
    pub(super) fn greeting(&self) -> Frame {
        codec::encode(&Envelope::bare(Greeting::Dashboard(DashboardConnect {
            protocols: PROTOCOLS.to_vec(),
            dashboard: Some(self.me.clone()),
            token: self.token.clone(),
            features: vec![Feature::Binary, Feature::Batch],
            since: Since { roster: self.roster.roster().position() },
        })))
    }

    pub(super) fn poll_up(&mut self, now: Now) -> Option<Frame> {
        let Link::Up(up) = &mut self.link else { return None };
        if let Some(message) = up.poll_control() {
            self.pace.said_message(now.monotonic);
            return Some(say(None, message, now));
        }
        if let Some(token) = up.refresh.take() {
            self.pace.said_message(now.monotonic);
            let id = self.mint_request(now);
            return Some(say(Some(&id), DashboardToHub::RefreshToken(RefreshToken { token }), now));
        }
        up.unsubscribe.append(&mut self.readers.take_unread());
        if !up.unsubscribe.is_empty() {
            let terminals = std::mem::take(&mut up.unsubscribe).into_iter().collect();
            self.pace.said_message(now.monotonic);
            let id = self.mint_request(now);
            return Some(say(
                Some(&id),
                DashboardToHub::Unsubscribe(Unsubscribe { terminals }),
                now,
            ));
        }
        let batching = up.batching;
        let chunk_bytes_max = bytes(up.limits.chunk_bytes_max);
        let message_bytes_max = bytes(up.limits.message_bytes_max);
        if let Some(frame) = self.poll_outbox(Class::Interrupts, batching, now) {
            return Some(frame);
        }
        if self.pace.available(Class::Requests, now.monotonic) > 0
            && let Some(frame) = self.poll_subscribe(now)
        {
            self.pace.said(Class::Requests, 1, now.monotonic);
            return Some(frame);
        }
        if let Some(frame) = self.poll_outbox(Class::Requests, batching, now) {
            return Some(frame);
        }
        if self.pace.available(Class::Input, now.monotonic) > 0
            && let Some(input) = self.inputs.poll(chunk_bytes_max, now.monotonic)
        {
            self.pace.said(Class::Input, 1, now.monotonic);
            let id = super::heard::input_id(input.command, self.inputs_said);
            self.inputs_said += 1;
            return Some(say(Some(&id), DashboardToHub::Input(input), now));
        }
        if self.pace.conflated_at(now.monotonic).is_some() {
            return None;
        }
        if let Some((stream, offset)) = self.readers.poll_shown() {
            self.pace.said_message(now.monotonic);
            let shown = DashboardToHub::Shown(TerminalShown { stream, offset });
            return Some(say(None, shown, now));
        }
        let (id, batch) = self.logs.as_mut()?.poll(message_bytes_max, now.monotonic)?;
        self.pace.said_message(now.monotonic);
        Some(say(Some(&id), DashboardToHub::Log(batch), now))
    }

    /// What waits for its answer and was not said on this link, as far as the
    /// rates allow.
    fn poll_outbox(&mut self, class: Class, batching: Option<Batching>, now: Now) -> Option<Frame> {
        let available = self.pace.available(class, now.monotonic);
        if self.in_doubt || available == 0 {
            return None;
        }
        let outbox = match class {
            Class::Interrupts => &mut self.interrupts,
            Class::Requests | Class::Input => &mut self.outbox,
        };
        let cap = |batching: Batching| Batching {
            messages_max: batching.messages_max.min(available),
            ..batching
        };
        let (frame, count) = outbox.poll(batching.map(cap))?;
        self.pace.said(class, count, now.monotonic);
        Some(frame)
    }

    /// All subscriptions that are to be made anew go together: the hub moves
    /// its place in a stream only if no other subscription holds it there.
    fn poll_subscribe(&mut self, now: Now) -> Option<Frame> {
        let Link::Up(up) = &mut self.link else { return None };
        let bytes_max = bytes(up.limits.message_bytes_max) / 2;
        let mut terminals = Vec::new();
        if let Some(target) = up.alone.pop_first() {
            terminals.extend(self.readers.subscription(target));
        } else {
            let mut gathered = 0;
            while gathered < bytes_max
                && let Some(subscription) = self.readers.poll_changed()
            {
                gathered += json_bytes(&subscription);
                terminals.push(subscription);
            }
        }
        if terminals.is_empty() {
            return None;
        }
        let id = self.mint_request(now);
        let targets = terminals.iter().map(|subscription| subscription.target.clone()).collect();
        if let Link::Up(up) = &mut self.link {
            up.subscribing.insert(id.clone(), targets);
        }
        Some(say(Some(&id), DashboardToHub::Subscribe(Subscribe { terminals }), now))
    }
}

fn say(id: Option<&RequestId>, message: DashboardToHub, now: Now) -> Frame {
    Frame::Text(encode(id, message, now))
}

/// How long a subscription is as JSON, roughly and at most.
fn json_bytes(subscription: &TerminalSubscription) -> usize {
    const ONE: usize = 320;
    const POSITION: usize = 64;
    ONE + subscription.positions.len() * POSITION
}
