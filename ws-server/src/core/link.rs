//! One live attachment: what it is, what waits for it, and whether it lives.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, DashboardId, RequestId, StreamId, TenantId};
use trunkline_protocol::liveness::Liveness;
use trunkline_protocol::message::{
    Greeting, HeldCommand, Lag, Secret, Target, TerminalSubscription,
};
use trunkline_protocol::roster;

use super::Map;
use super::sources::Source;
use crate::hooks::Identity;

/// Memory of a waiting control frame beyond its content: its place in the line
/// and the slack of its buffer.
const FRAME_OVERHEAD_BYTES: usize = 160;

/// Names a link for as long as the hub lives; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// What a link is to the hub.
#[derive(Debug)]
pub(super) enum State {
    /// Its transport's handshake is under way.
    Arriving,
    /// Nothing yet: only a greeting is listened to.
    Greeting {
        /// A token from the transport's handshake.
        header: Option<Secret>,
    },
    /// It has greeted and waits to hear who it is.
    Authenticating { greeting: Box<Greeting>, id: Option<RequestId> },
    /// An agent.
    Agent(AgentLink),
    /// A dashboard.
    Dashboard(Box<DashboardLink>),
    /// Closed from this side, or superseded: nothing it says has any effect.
    Closed,
}

impl State {
    /// Whether nothing that was asked of it has been done yet: its handshake,
    /// and its greeting.
    pub(super) fn is_stranger(&self) -> bool {
        matches!(self, Self::Arriving | Self::Greeting { .. })
    }
}

#[derive(Debug)]
pub(super) struct AgentLink {
    pub(super) tenant: TenantId,
    pub(super) agent: AgentId,
    pub(super) subject: String,
    /// What it holds, while it still says so.
    pub(super) listing: Option<Listing>,
}

/// What an agent has listed so far.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) commands: Vec<HeldCommand>,
    /// What has come since the greeting.
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) struct DashboardLink {
    pub(super) tenant: TenantId,
    pub(super) dashboard: DashboardId,
    pub(super) identity: Arc<Identity>,
    /// Where it stands in the roster.
    pub(super) cursor: roster::Cursor,
    /// Whether the tenant's list of roster followers to wake has it.
    pub(super) follows: bool,
    /// What it reads.
    pub(super) subscription: BTreeMap<Target, TerminalSubscription>,
    /// Where it stands in each stream.
    pub(super) readers: Map<StreamId, Reader>,
    /// Streams with something to read, each once; read in turn.
    pub(super) turn: VecDeque<StreamId>,
}

/// Where a dashboard stands in a stream.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) at: u64,
    /// Where the hub began on this link.
    pub(super) lag: Lag,
    pub(super) window: Option<u64>,
    /// What its view has shown.
    pub(super) shown: u64,
    /// Some of what it asked for was gone before it came.
    pub(super) is_late: bool,
    pub(super) wait: Wait,
}

/// What a reader waits for. It is in exactly one place at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Its turn on the link.
    Turn,
    /// New output: the stream's list of readers to wake has it.
    Output,
    /// Its window to move on.
    Window,
}

/// How a link ends from this side.
#[derive(Debug)]
pub(super) enum Closing {
    /// After the control messages that wait.
    Now(Close),
    /// After everything that waits.
    Flushed(Close),
    /// It was handed to the transport.
    Said(Close),
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) state: State,
    /// Where it comes from, once that is known.
    pub(super) address: Option<IpAddr>,
    /// The same, once it is counted there.
    pub(super) source: Option<Source>,
    /// When it was accepted; then, when its greeting was.
    pub(super) since: Duration,
    pub(super) liveness: Liveness,
    /// Terminal output goes out in its binary form.
    pub(super) binary: bool,
    /// Messages in a row that could not be understood.
    pub(super) invalid: u32,
    /// When its credentials run out, and whether it has been told.
    pub(super) expires: Option<Duration>,
    pub(super) refreshing: bool,
    /// How many subjects had been revoked when the authenticator was asked.
    pub(super) asked: u64,
    pub(super) closing: Option<Closing>,
    control: VecDeque<Frame>,
    control_bytes: usize,
    /// Whether the shell was told that something waits.
    pub(super) awake: bool,
}

impl Link {
    pub(super) fn new(liveness: Liveness, since: Duration) -> Self {
        Self {
            state: State::Arriving,
            address: None,
            source: None,
            since,
            liveness,
            binary: false,
            invalid: 0,
            expires: None,
            refreshing: false,
            asked: 0,
            closing: None,
            control: VecDeque::new(),
            control_bytes: 0,
            awake: false,
        }
    }

    pub(super) fn push(&mut self, frame: Frame) {
        self.control_bytes += frame.len() + FRAME_OVERHEAD_BYTES;
        self.control.push_back(frame);
    }

    pub(super) fn pop(&mut self) -> Option<Frame> {
        let frame = self.control.pop_front()?;
        self.control_bytes -= frame.len() + FRAME_OVERHEAD_BYTES;
        if self.control.is_empty() {
            // An idle link keeps no buffer.
            self.control = VecDeque::new();
        }
        Some(frame)
    }

    /// Everything that waits in the line, and the close if it is due.
    pub(super) fn drain_into(&mut self, into: &mut Vec<Frame>) {
        while let Some(frame) = self.pop() {
            into.push(frame);
        }
        if matches!(self.closing, Some(Closing::Now(_)))
            && let Some(Closing::Now(close)) = self.closing.take()
        {
            self.closing = Some(Closing::Said(close.clone()));
            into.push(Frame::Close(close));
        }
    }

    /// The close of a link that had everything flushed before.
    pub(super) fn say_flushed(&mut self, into: &mut Vec<Frame>) {
        if matches!(self.closing, Some(Closing::Flushed(_)))
            && let Some(Closing::Flushed(close)) = self.closing.take()
        {
            self.closing = Some(Closing::Said(close.clone()));
            into.push(Frame::Close(close));
        }
    }

    /// Memory of the control frames that wait.
    pub(super) fn control_bytes(&self) -> usize {
        self.control_bytes
    }

    /// Whether nothing follows but the last words.
    pub(super) fn is_closing(&self) -> bool {
        matches!(self.closing, Some(Closing::Now(_) | Closing::Said(_)))
    }

    /// Whether it is an agent that has not listed all that it holds.
    pub(super) fn is_listing(&self) -> bool {
        matches!(&self.state, State::Agent(agent) if agent.listing.is_some())
    }

    pub(super) fn dashboard(&mut self) -> Option<&mut DashboardLink> {
        match &mut self.state {
            State::Dashboard(dashboard) => Some(dashboard),
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Agent(_)
            | State::Closed => None,
        }
    }
}
