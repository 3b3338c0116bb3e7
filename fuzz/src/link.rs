//! Any bytes as frames on a link of a hub: from a stranger, from an agent, from
//! a dashboard. The hub says only what its peer understands, and closes whom
//! it does not understand.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{HubInstance, QueueEpoch};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{HubToAgent, HubToDashboard};
use trunkline_server::core::{Core, Effect, LinkId, Setup};
use trunkline_server::hooks::WholeTenant;
use trunkline_server::{AuthError, Identity, QueueError};

use crate::names;
use crate::plan::Plan;

const LINK: LinkId = LinkId(1);

/// Small enough to be reached.
fn limits() -> Limits {
    Limits { log_bytes_per_stream: 8 * 1024, log_bytes_total: 12 * 1024, ..Limits::default() }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Peer {
    Stranger,
    Agent,
    Dashboard,
}

struct Hub {
    core: Core,
    now: Duration,
    peer: Peer,
    closed: bool,
}

/// Frames are cut from the bytes by their lengths.
pub fn run(data: &[u8]) {
    let plan = &mut Plan::new(data);
    let setup = Setup {
        limits: limits(),
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(1),
        epoch: QueueEpoch::from_u128(2),
        seed: [7; 32],
        stored: Vec::new(),
        streams: None,
    };
    let mut hub = Hub {
        core: Core::new(setup, names::now(Duration::ZERO)),
        now: Duration::ZERO,
        peer: plan.of(&[Peer::Stranger, Peer::Agent, Peer::Dashboard]),
        closed: false,
    };
    let now = names::now(hub.now);
    hub.core.handle_arrived(LINK, None, now);
    hub.core.handle_opened(LINK, None, None, now);
    match hub.peer {
        Peer::Stranger => {}
        Peer::Agent => hub.say(
            br#"{"type":"agent:connect","payload":{"protocols":[1],"agent":"a0","instance":"00000000-0000-0000-0000-000000000010","slots":4}}"#,
        ),
        Peer::Dashboard => hub.say(
            br#"{"type":"dashboard:connect","payload":{"protocols":[1],"dashboard":"d0","features":["binary","batch"]}}"#,
        ),
    }
    hub.settle(&mut Plan::new(&[]));
    while !plan.is_over() && !hub.closed {
        match plan.below(8) {
            0 => {
                hub.now += names::pause(plan).min(Duration::from_secs(3));
                hub.core.handle_timeout(names::now(hub.now));
            }
            1 => {
                let len = usize::from(plan.byte()) + 28;
                let frame = Frame::Binary(Bytes::copy_from_slice(plan.take(len)));
                hub.core.handle_frame(LINK, &frame, names::now(hub.now));
            }
            _ => {
                // Up to the end of the line, or of everything.
                let mut line = Vec::new();
                while !plan.is_over() {
                    match plan.byte() {
                        b'\n' => break,
                        byte => line.push(byte),
                    }
                }
                hub.say(&line);
            }
        }
        hub.settle(plan);
    }
    hub.core.handle_lost(LINK, names::now(hub.now));
    assert_eq!(hub.core.links(), 0);
    hub.settle(plan);
}

impl Hub {
    fn say(&mut self, text: &[u8]) {
        let frame = Frame::Text(Bytes::copy_from_slice(text));
        self.core.handle_frame(LINK, &frame, names::now(self.now));
    }

    /// Lets hooks answer, and hears what the hub says.
    fn settle(&mut self, plan: &mut Plan<'_>) {
        let now = names::now(self.now);
        let mut rounds = 0;
        while let Some(effect) = self.core.poll_effect() {
            match effect {
                Effect::Authenticate { link, .. } => {
                    let answer = match plan.below(8) {
                        7 => Err(AuthError::Unauthorized("no".into())),
                        6 => Err(AuthError::Unavailable("later".into())),
                        _ => Ok(Identity::new(names::tenant(0), "somebody")),
                    };
                    self.core.handle_authenticated(link, answer, now);
                }
                Effect::Store { tenant, command, .. } => {
                    let stored =
                        if plan.once_in(8) { Err(QueueError("full".into())) } else { Ok(()) };
                    self.core.handle_stored(&tenant, command, &stored, now);
                }
                Effect::Wake(_)
                | Effect::Forget(_)
                | Effect::Keep(_)
                | Effect::TakeLogs(_)
                | Effect::Observe(_) => {}
            }
            rounds += 1;
            assert!(rounds < 100_000, "effects end");
            let mut frames = Vec::new();
            self.core.transmit(LINK, now, &mut frames, 64 * 1024);
            for frame in frames {
                self.hear(&frame);
            }
        }
        let deadline = self.core.deadline();
        self.core.handle_timeout(now);
        if deadline.is_some_and(|at| at <= self.now) {
            assert!(self.core.deadline().is_none_or(|at| at > self.now), "what was due is done");
        }
        assert!(self.core.log_bytes() <= limits().log_bytes_total);
    }

    fn hear(&mut self, frame: &Frame) {
        assert!(!self.closed, "a close is the last");
        self.closed = matches!(frame, Frame::Close(_));
        let rules = Rules { message_bytes_max: 4 << 20, ..Rules::from(&limits()) };
        // A stranger may have become either.
        let as_agent = || codec::decode::<HubToAgent>(frame, rules).iter().all(Result::is_ok);
        let as_dashboard =
            || codec::decode::<HubToDashboard>(frame, rules).iter().all(Result::is_ok);
        let understood = match self.peer {
            Peer::Stranger => as_agent() || as_dashboard(),
            Peer::Agent => as_agent(),
            Peer::Dashboard => as_dashboard(),
        };
        assert!(understood, "{:?} does not understand {frame:?}", self.peer);
    }
}
