//! What the parts of the core share: the links, the deadlines, the effects
//! that wait for the shell, and the time of the present input.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{CommandId, HubInstance, QueueEpoch, TenantId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{Direction, Envelope, HubToDashboard, Refusal};
use trunkline_protocol::time::Now;

use super::Map;
use super::counts::{Counts, Output};
use super::deadlines::{Deadlines, Due};
use super::keeping::Keeping;
use super::link::{Closing, DashboardLink, Link, LinkId, State};
use super::logs::Logging;
use super::sources::{Source, Sources};
use crate::hooks::{Credentials, Event, ForwardedLogs, LogChange, Policy, QueueChange, What};

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Something waits for this link: ask [`Core::transmit`](super::Core::transmit).
    Wake(LinkId),
    /// Ask the authenticator, then say [`Core::handle_authenticated`](super::Core::handle_authenticated).
    Authenticate {
        /// Who asks.
        link: LinkId,
        /// What it shows.
        credentials: Credentials,
    },
    /// Ask the queue, then say [`Core::handle_stored`](super::Core::handle_stored).
    Store {
        /// Whose command.
        tenant: TenantId,
        /// Which command.
        command: CommandId,
        /// The change.
        change: QueueChange,
    },
    /// Tell the queue; nobody waits for the answer.
    Forget(QueueChange),
    /// Ask the stream log, then say [`Core::handle_kept`](super::Core::handle_kept).
    /// Another comes only after that.
    Keep(Vec<LogChange>),
    /// Ask the log sink, then say [`Core::handle_logged`](super::Core::handle_logged).
    /// Another for that sender comes only after that.
    TakeLogs(Box<ForwardedLogs>),
    /// Tell whoever observes the hub. Nobody waits for an answer.
    Observe(Box<Event>),
}

#[derive(Debug)]
pub(super) struct Wires {
    pub(super) now: Now,
    pub(super) limits: Limits,
    pub(super) policy: Arc<dyn Policy>,
    pub(super) rules: Rules,
    pub(super) hub: HubInstance,
    pub(super) epoch: QueueEpoch,
    pub(super) draining: bool,
    pub(super) links: Map<LinkId, Link>,
    pub(super) sources: Sources,
    pub(super) deadlines: Deadlines,
    pub(super) effects: VecDeque<Effect>,
    /// Links closed from this side since the last input: their peers are to
    /// be told apart from the living.
    pub(super) closed: Vec<(LinkId, State)>,
    /// Memory of all logs of all tenants.
    pub(super) log_bytes: usize,
    /// How far the copies in the stream log are, if there is one.
    pub(super) keeping: Option<Keeping>,
    /// What is on its way to the log sink, if there is one.
    pub(super) logging: Option<Logging>,
    /// What has happened since the start.
    pub(super) counts: Counts,
    pub(super) output: Output,
}

impl Wires {
    pub(super) fn at(&self, after: Duration) -> Duration {
        self.now.monotonic.saturating_add(after)
    }

    /// What a link is as a dashboard.
    pub(super) fn dashboard(&self, id: LinkId) -> Option<&DashboardLink> {
        match &self.links.get(&id)?.state {
            State::Dashboard(dashboard) => Some(dashboard),
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Agent(_)
            | State::Closed => None,
        }
    }

    pub(super) fn in_time(&mut self, due: Due, after: Duration) {
        let at = self.at(after);
        self.deadlines.set(due, at);
    }

    /// Tells the shell, once, that something waits for a link.
    pub(super) fn wake(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.awake
        {
            link.awake = true;
            self.effects.push_back(Effect::Wake(id));
        }
    }

    /// Puts a control frame at the end of a link's line. A peer that lets too
    /// many of them wait is closed: it does not read.
    pub(super) fn send_frame(&mut self, id: LinkId, kind: &'static str, frame: Frame) {
        let Some(link) = self.links.get_mut(&id) else { return };
        // A link that is still being flushed is answered, and hears of a
        // stream before its output.
        if link.is_closing() {
            return;
        }
        self.counts.sent(kind, frame.len());
        link.push(frame);
        if link.control_bytes() > self.limits.control_bytes_max {
            self.close(id, Close::new(CloseCode::Lagging, "too many messages wait for this link"));
            return;
        }
        self.wake(id);
    }

    pub(super) fn send<M: Direction>(&mut self, id: LinkId, message: M) {
        let kind = message.kind();
        let envelope = Envelope { id: None, ts: Some(self.now.wall_ms), message };
        self.send_frame(id, kind, codec::encode(&envelope));
    }

    /// Says to a peer, of whatever role, that something was refused.
    pub(super) fn refuse(&mut self, id: LinkId, refusal: Refusal) {
        self.counts.refused(&refusal.code);
        // `error` has one shape in every direction.
        self.send(id, HubToDashboard::Error(refusal));
    }

    /// Counts a link where it comes from; closes it if there may be no more.
    pub(super) fn enter(&mut self, id: LinkId, address: IpAddr) {
        let (source, now) = (Source::from(address), self.now.monotonic);
        let Some(link) = self.links.get_mut(&id).filter(|link| link.source.is_none()) else {
            return;
        };
        link.address = Some(address);
        match self.sources.enter(source, &self.limits, now) {
            Ok(()) => link.source = Some(source),
            Err(close) => self.close(id, close),
        }
    }

    /// A link has come to nothing, by its own doing.
    pub(super) fn fail(&mut self, id: LinkId) {
        if let Some(source) = self.links.get(&id).and_then(|link| link.source) {
            self.sources.fail(source, &self.limits, self.now.monotonic);
        }
    }

    /// Ends a link from this side: what it was is over at once, its last
    /// words still go out.
    pub(super) fn close(&mut self, id: LinkId, close: Close) {
        self.close_because(id, close, None);
    }

    /// The same, with words on it that the peer does not hear.
    pub(super) fn close_because(&mut self, id: LinkId, close: Close, why: Option<String>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if link.is_closing() {
            return;
        }
        let is_at_fault = link.state.is_stranger() && is_fault(close.code);
        self.observe_end(id, close.clone(), why);
        let Some(link) = self.links.get_mut(&id) else { return };
        link.closing = Some(Closing::Now(close));
        let state = std::mem::replace(&mut link.state, State::Closed);
        self.closed.push((id, state));
        self.deadlines.cancel(&Due::Greeting(id));
        self.deadlines.cancel(&Due::Beat(id));
        self.deadlines.cancel(&Due::Credentials(id));
        // Said even if something waits already: a link whose peer takes
        // nothing must hear that its time runs out.
        link.awake = true;
        self.effects.push_back(Effect::Wake(id));
        if is_at_fault {
            self.fail(id);
        }
    }

    /// A link is over, unless that was said already.
    pub(super) fn observe_end(&mut self, id: LinkId, close: Close, why: Option<String>) {
        let Some(link) = self.links.get(&id) else { return };
        let (who, address) = (link.state.who(), link.address);
        let what = match (&who, &link.state) {
            (_, State::Closed) => return,
            (Some(_), _) => {
                let after = self.now.monotonic.saturating_sub(link.since);
                What::Closed { close, after }
            }
            (None, _) => What::Rejected { address, close, why },
        };
        self.observe(Some(id), who, what);
    }
}

/// Whether a stranger that is closed so brought it about.
fn is_fault(code: CloseCode) -> bool {
    !matches!(
        code,
        CloseCode::TryLater
            | CloseCode::Restart
            | CloseCode::GoingAway
            | CloseCode::Internal
            | CloseCode::Superseded
    )
}
