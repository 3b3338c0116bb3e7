//! The hub as a pure machine: frames, answers of hooks and the time go in,
//! frames and effects come out. It never waits, and asks no clock.
//!
//! # How to drive it
//!
//! 1. Tell it what happens: [`handle_arrived`](Core::handle_arrived),
//!    [`handle_opened`](Core::handle_opened),
//!    [`handle_frame`](Core::handle_frame), [`handle_lost`](Core::handle_lost),
//!    and, when [`deadline`](Core::deadline) has come,
//!    [`handle_timeout`](Core::handle_timeout).
//! 2. Take its [`Effect`]s until there are none. A hook's answer goes back
//!    through [`handle_authenticated`](Core::handle_authenticated),
//!    [`handle_stored`](Core::handle_stored), [`handle_kept`](Core::handle_kept)
//!    or [`handle_logged`](Core::handle_logged), at any later time.
//! 3. For each link named by [`Effect::Wake`], ask
//!    [`transmit`](Core::transmit) for frames whenever the link can take some,
//!    until it says that no more wait. A [`Frame::Close`] is the last: when it is
//!    out,
//!    say `handle_lost`.
//!
//! The same core runs under the shell's sockets and under the simulator.

mod agents;
mod commands;
mod counts;
mod dashboards;
mod deadlines;
mod keeping;
mod link;
mod logs;
mod rights;
mod sources;
mod streams;
mod subjects;
mod tenant;
mod wires;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Invalid, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{DashboardId, HubInstance, QueueEpoch, RequestId, TenantId};
use trunkline_protocol::limits::{GREETING_BYTES_MAX, Limits};
use trunkline_protocol::liveness::{Due as Beat, Liveness};
use trunkline_protocol::message::{
    AgentConnect, AgentToHub, ConnectionAck, DashboardConnect, DashboardToHub, Direction, Envelope,
    ErrorCode, Feature, Greeting, Heartbeat, HeartbeatBeat, HubToAgent, HubToDashboard, PROTOCOLS,
    Peer, RefreshFailed, RefreshNeeded, RefreshSuccess, Refusal, Secret,
};
use trunkline_protocol::time::Now;

use self::counts::{BATCH, INVALID, Output};
use self::deadlines::{Deadlines, Due};
use self::keeping::Keeping;
use self::link::{AgentLink, Closing, DashboardLink, Link, Listing, State};
use self::sources::Sources;
use self::subjects::Usage;
use self::tenant::Tenant;
use self::wires::Wires;
use crate::hooks::{
    AuthError, Credentials, Hook, Identity, LogSender, Policy, QueueError, Role, StoredCommand,
    StoredStream, What,
};

pub use self::counts::{ByWord, Counts, Stats, Traffic};
pub use self::link::LinkId;
pub use self::wires::Effect;

/// What is looked up for every message: by a hash that is quick, and of which
/// nobody outside knows the seed.
type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What a hub core starts with.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The bounds.
    pub limits: Limits,
    /// What dashboards may do.
    pub policy: Arc<dyn Policy>,
    /// This incarnation; another at every start.
    pub hub: HubInstance,
    /// The queue's memory.
    pub epoch: QueueEpoch,
    /// For everything random.
    pub seed: [u8; 32],
    /// What the queue has kept.
    pub stored: Vec<StoredCommand>,
    /// What the stream log has kept; `None` without a stream log.
    pub streams: Option<Vec<StoredStream>>,
}

/// The hub.
#[derive(Debug)]
pub struct Core {
    wires: Wires,
    tenants: Map<TenantId, Tenant>,
    rng: StdRng,
    revoked: Revoked,
}

/// Whose links were ended lately: a question to the authenticator that was
/// asked before may be answered after.
#[derive(Debug, Default)]
struct Revoked {
    /// How many there were so far.
    count: u64,
    /// Which one, when, and whose.
    latest: VecDeque<(u64, Duration, TenantId, String)>,
}

impl Revoked {
    /// Whether this was so since `count` of them.
    fn is_since(&self, count: u64, identity: &Identity) -> bool {
        self.latest.iter().any(|(number, _, tenant, subject)| {
            *number >= count && (tenant, subject) == (&identity.tenant, &identity.subject)
        })
    }
}

impl Core {
    /// A hub without links.
    pub fn new(setup: Setup, now: Now) -> Self {
        let rules = Rules::from(&setup.limits);
        let mut core = Self {
            wires: Wires {
                now,
                limits: setup.limits,
                policy: setup.policy,
                rules,
                hub: setup.hub,
                epoch: setup.epoch,
                draining: false,
                links: Map::default(),
                sources: Sources::default(),
                deadlines: Deadlines::default(),
                effects: VecDeque::new(),
                closed: Vec::new(),
                log_bytes: 0,
                keeping: setup.streams.is_some().then(Keeping::default),
                logging: None,
                counts: Counts::default(),
                output: Output::default(),
            },
            tenants: Map::default(),
            rng: StdRng::from_seed(setup.seed),
            revoked: Revoked::default(),
        };
        let mut stored = setup.stored;
        stored.sort_by_key(|command| (command.ended_at_ms, command.order));
        for command in stored {
            let tenant = command.tenant.clone();
            let Self { wires, tenants, .. } = &mut core;
            let tenant =
                tenants.entry(tenant.clone()).or_insert_with(|| Tenant::new(tenant, wires));
            tenant.load_command(wires, command);
        }
        core.load_streams(setup.streams.unwrap_or_default());
        core
    }

    // ---- outputs --------------------------------------------------------

    /// What the shell is to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.wires.effects.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called.
    pub fn deadline(&self) -> Option<Duration> {
        self.wires.deadlines.next()
    }

    /// Links that are up, greeted or not.
    pub fn links(&self) -> usize {
        self.wires.links.len()
    }

    /// Whether a link is closed from this side, and only its last words are
    /// still to go out: a shell gives them a bounded time.
    pub fn is_closing(&self, id: LinkId) -> bool {
        self.wires.links.get(&id).is_some_and(Link::is_closing)
    }

    /// Whether the peer is known: before that a greeting is all that it may
    /// say, of [`GREETING_BYTES_MAX`] at most.
    pub fn is_greeted(&self, id: LinkId) -> bool {
        let state = self.wires.links.get(&id).map(|link| &link.state);
        matches!(state, Some(State::Agent(_) | State::Dashboard(_)))
    }

    /// Whether [`handle_drain`](Self::handle_drain) was called.
    pub fn is_draining(&self) -> bool {
        self.wires.draining
    }

    /// Memory of all stream logs, in bytes.
    pub fn log_bytes(&self) -> usize {
        self.wires.log_bytes
    }

    /// Appends the next frames for a link: all control that waits, then about
    /// `bytes` of bulk. Returns whether more waits: the link is to ask again when
    /// it can take more. Otherwise it is named by [`Effect::Wake`] when something
    /// does. After a [`Frame::Close`] nothing follows.
    pub fn transmit(&mut self, id: LinkId, now: Now, into: &mut Vec<Frame>, bytes: usize) -> bool {
        self.wires.now = now;
        let before = into.len();
        let Some(link) = self.wires.links.get_mut(&id) else { return false };
        link.drain_into(into);
        let more = match &link.state {
            State::Dashboard(dashboard) => {
                let tenant = dashboard.tenant.clone();
                let Self { wires, tenants, .. } = self;
                let tenant = tenants.get_mut(&tenant);
                tenant.is_some_and(|tenant| tenant.transmit_dashboard(wires, id, into, bytes))
            }
            State::Agent(agent) => {
                if let Some(tenant) = self.tenants.get_mut(&agent.tenant) {
                    tenant.transmit_agent(self.wires.keeping.as_ref(), &agent.agent, into);
                }
                false
            }
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Closed => false,
        };
        self.tidy();
        let Some(link) = self.wires.links.get_mut(&id) else { return false };
        if into.len() > before {
            link.liveness.handle_said(now.monotonic);
        }
        // Transmitting may have closed it: a reader that must not lose a byte.
        link.drain_into(into);
        if !more {
            link.say_flushed(into);
        }
        link.awake = more && into.len() > before;
        link.awake
    }

    // ---- links ----------------------------------------------------------

    /// Somebody has connected, from `address` if the shell knows where it is;
    /// the transport's handshake begins. From here on its greeting is due. It
    /// may be closed at once: the shell says so in the transport's words.
    pub fn handle_arrived(&mut self, id: LinkId, address: Option<IpAddr>, now: Now) {
        self.wires.now = now;
        let limits = &self.wires.limits;
        let full = self.wires.links.len() >= limits.links_max;
        let liveness =
            Liveness::new(limits.dashboard_idle, limits.dashboard_timeout, now.monotonic);
        let timeout = limits.greeting_timeout;
        self.wires.links.insert(id, Link::new(liveness, now.monotonic));
        if full {
            self.wires.close(id, Close::new(CloseCode::TryLater, "too many links"));
        } else if self.wires.draining {
            let close = self.restart_hint(Duration::from_secs(1));
            self.wires.close(id, close);
        } else {
            self.wires.in_time(Due::Greeting(id), timeout);
            if let Some(address) = address {
                self.wires.enter(id, address);
            }
        }
        self.tidy();
    }

    /// The transport of who [arrived](Self::handle_arrived) is about to be up:
    /// its handshake was all right. `token` is what that carried, if anything,
    /// and `address` where it says that the link comes from, if whoever passed
    /// it on is believed. It may be closed now.
    pub fn handle_opened(
        &mut self,
        id: LinkId,
        token: Option<Secret>,
        address: Option<IpAddr>,
        now: Now,
    ) {
        self.wires.now = now;
        if let Some(address) = address {
            self.wires.enter(id, address);
        }
        if let Some(link) = self.wires.links.get_mut(&id)
            && let State::Arriving = link.state
        {
            link.state = State::Greeting { header: token };
            let address = link.address;
            self.wires.observe(Some(id), None, What::Connected { address });
        }
        self.tidy();
    }

    /// Who [arrived](Self::handle_arrived) turns out to be no link: nothing is
    /// held against it. [`handle_lost`](Self::handle_lost) follows.
    pub fn handle_withdrawn(&mut self, id: LinkId, now: Now) {
        self.wires.now = now;
        if let Some(link) = self.wires.links.get_mut(&id)
            && let State::Arriving = link.state
        {
            link.state = State::Closed;
            self.wires.deadlines.cancel(&Due::Greeting(id));
        }
    }

    /// A transport is gone, with or without a close from the peer.
    pub fn handle_lost(&mut self, id: LinkId, now: Now) {
        self.wires.now = now;
        if self.wires.links.get(&id).is_some_and(|link| link.state.is_stranger()) {
            self.wires.fail(id);
        }
        let said = self.wires.links.get(&id).and_then(|link| match &link.closing {
            Some(Closing::Said(close)) => Some(close.clone()),
            Some(Closing::Now(_) | Closing::Flushed(_)) | None => None,
        });
        let close = said.unwrap_or_else(|| Close::new(CloseCode::Lost, "gone"));
        self.wires.observe_end(id, close, None);
        if let Some(link) = self.wires.links.remove(&id) {
            if let Some(source) = link.source {
                self.wires.sources.leave(source);
            }
            self.wires.closed.push((id, link.state));
            for due in [Due::Greeting, Due::Beat, Due::Flushed, Due::Credentials] {
                self.wires.deadlines.cancel(&due(id));
            }
        }
        self.tidy();
    }

    /// A peer broke the rules of its transport: it is told, and closed.
    pub fn handle_violation(&mut self, id: LinkId, close: Close, now: Now) {
        self.wires.now = now;
        self.wires.close(id, close);
        self.tidy();
    }

    /// A whole frame arrived.
    pub fn handle_frame(&mut self, id: LinkId, frame: &Frame, now: Now) {
        self.wires.now = now;
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        link.liveness.handle_heard(now.monotonic);
        match &mut link.state {
            State::Arriving | State::Closed => {}
            State::Greeting { .. } => self.handle_greeting(id, frame),
            State::Authenticating { .. } => {
                let close = Close::new(CloseCode::Violation, "wait for connection:ack");
                self.wires.close(id, close);
            }
            State::Agent(agent_link) => {
                if let Some(listing) = &mut agent_link.listing {
                    listing.bytes += frame.len();
                }
                let (tenant, agent) = (agent_link.tenant.clone(), agent_link.agent.clone());
                if let Frame::Binary(bytes) = frame {
                    if agent_link.listing.is_some() {
                        self.wires.close(id, unlisted());
                        self.tidy();
                        return;
                    }
                    let rules = self.wires.rules;
                    match codec::decode_output(bytes, rules) {
                        Ok((header, data)) => {
                            link.invalid = 0;
                            self.wires.output.received.add(bytes.len());
                            if self.is_flood(id, true) {
                                return;
                            }
                            let Self { wires, tenants, .. } = self;
                            if let Some(tenant) = tenants.get_mut(&tenant) {
                                tenant.handle_output(wires, id, &agent, &header, &data);
                            }
                        }
                        Err(error) => {
                            self.invalid(id, frame, &Invalid { id: None, error });
                        }
                    }
                } else {
                    self.each(id, frame, |core, envelope| {
                        core.handle_agent_message(id, &tenant, &agent, envelope);
                    });
                }
            }
            State::Dashboard(dashboard) => {
                let (tenant, from) = (dashboard.tenant.clone(), dashboard.dashboard.clone());
                self.each(id, frame, |core, envelope| {
                    core.handle_dashboard_message(id, &tenant, &from, envelope);
                });
            }
        }
        self.tidy();
    }

    /// Judges each message of a frame on its own, until the link is closed.
    fn each<M: Direction>(
        &mut self,
        id: LinkId,
        frame: &Frame,
        mut handle: impl FnMut(&mut Self, Envelope<M>),
    ) {
        let messages = codec::decode::<M>(frame, self.wires.rules);
        let kind = match messages.as_slice() {
            [Ok(envelope)] => envelope.message.kind(),
            [Err(_)] => INVALID,
            _ => BATCH,
        };
        self.wires.counts.received_bytes(kind, frame.len());
        for message in messages {
            let Some(link) = self.wires.links.get_mut(&id) else { return };
            if matches!(link.state, State::Closed) {
                return;
            }
            let is_piece =
                message.as_ref().is_ok_and(|envelope| envelope.message.as_output().is_some());
            if message.is_ok() {
                link.invalid = 0;
            }
            let kind = message.as_ref().map_or(INVALID, |envelope| envelope.message.kind());
            self.wires.counts.received(kind);
            if self.is_flood(id, is_piece) {
                return;
            }
            match message {
                Ok(envelope) => handle(self, envelope),
                Err(invalid) => self.invalid(id, frame, &invalid),
            }
        }
    }

    /// What whoever is at the other end has used up.
    fn usage(&mut self, id: LinkId) -> Option<&mut Usage> {
        match &self.wires.links.get(&id)?.state {
            State::Agent(link) => {
                let tenant = self.tenants.get_mut(&link.tenant)?;
                Some(&mut tenant.agents.get_mut(&link.agent)?.usage)
            }
            State::Dashboard(link) => {
                let tenant = self.tenants.get_mut(&link.tenant)?;
                Some(&mut tenant.subjects.get_mut(&link.identity.subject)?.usage)
            }
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Closed => None,
        }
    }

    /// Counts a message, or a piece of output. Whoever sends too many is
    /// closed.
    fn is_flood(&mut self, id: LinkId, is_piece: bool) -> bool {
        let now = self.wires.now.monotonic;
        let (pieces, messages) = (self.wires.limits.piece_rate, self.wires.limits.message_rate);
        let Some(usage) = self.usage(id) else { return false };
        let taken = if is_piece {
            usage.pieces.take(pieces, now)
        } else {
            usage.messages.take(messages, now)
        };
        if taken.is_err() {
            self.wires.close(id, subjects::flood());
        }
        taken.is_err()
    }

    /// Answers a message that could not be understood; too many in a row end
    /// the link.
    fn invalid(&mut self, id: LinkId, frame: &Frame, invalid: &Invalid) {
        let max = self.wires.limits.invalid_messages_max;
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        link.invalid += 1;
        let flood = link.invalid >= max;
        let mut refusal = invalid.refusal();
        if invalid.error.field.as_deref() == Some("type")
            && codec::peek(frame, self.wires.rules).is_some_and(|(kind, _)| is_known(&kind))
        {
            refusal.code = ErrorCode::Forbidden;
            refusal.message = "type: belongs to another role, or to the greeting".into();
        }
        let what = What::Refused { message: None, code: refusal.code.clone() };
        self.wires.observe_peer(id, what);
        self.wires.refuse(id, refusal);
        if flood {
            let close = Close::new(CloseCode::Violation, "too many messages that are none");
            self.wires.close(id, close);
        }
    }

    // ---- greeting -------------------------------------------------------

    fn handle_greeting(&mut self, id: LinkId, frame: &Frame) {
        if frame.len() > GREETING_BYTES_MAX {
            self.wires
                .close(id, Close::new(CloseCode::TooBig, "a greeting is at most 16 KiB long"));
            return;
        }
        let mut messages = codec::decode::<Greeting>(frame, self.wires.rules);
        let kind = match messages.as_slice() {
            [Ok(greeting)] => greeting.message.kind(),
            _ => INVALID,
        };
        self.wires.counts.received(kind);
        self.wires.counts.received_bytes(kind, frame.len());
        let greeting = match (messages.len(), messages.pop()) {
            (1, Some(Ok(greeting))) => greeting,
            (_, Some(Err(invalid))) => {
                self.refuse_greeting(id, frame, &invalid);
                return;
            }
            (_, _) => {
                let close = Close::new(CloseCode::Violation, "greet first, with one message");
                self.wires.close(id, close);
                return;
            }
        };
        let (protocols, role, token) = match &greeting.message {
            Greeting::Agent(agent) => {
                (&agent.protocols, Role::Agent(agent.agent.clone()), agent.token.clone())
            }
            Greeting::Dashboard(dashboard) => (
                &dashboard.protocols,
                Role::Dashboard(dashboard.dashboard.clone()),
                dashboard.token.clone(),
            ),
        };
        if !protocols.iter().any(|version| PROTOCOLS.contains(version)) {
            let message = format!("this hub speaks protocol {PROTOCOLS:?}");
            let refusal = Refusal::new(ErrorCode::UnsupportedProtocol, message)
                .field("payload.protocols")
                .reply_to(greeting.id);
            self.wires.refuse(id, refusal);
            let close = Close::new(CloseCode::UnsupportedProtocol, "no common protocol version");
            self.wires.close(id, close);
            return;
        }
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        let header = match &mut link.state {
            State::Greeting { header } => header.take(),
            State::Arriving
            | State::Authenticating { .. }
            | State::Agent(_)
            | State::Dashboard(_)
            | State::Closed => None,
        };
        let credentials = Credentials { role, token: token.or(header) };
        let Envelope { id: request, message, .. } = greeting;
        link.state = State::Authenticating { greeting: Box::new(message), id: request };
        link.asked = self.revoked.count;
        self.wires.effects.push_back(Effect::Authenticate { link: id, credentials });
    }

    fn refuse_greeting(&mut self, id: LinkId, frame: &Frame, invalid: &Invalid) {
        let mut refusal = invalid.refusal();
        let known = codec::peek(frame, self.wires.rules).is_some_and(|(kind, _)| is_known(&kind));
        if known && invalid.error.field.as_deref() == Some("type") {
            refusal.code = ErrorCode::Forbidden;
            refusal.message = "greet first: agent:connect or dashboard:connect".into();
        }
        self.wires.refuse(id, refusal);
        self.wires.close(id, Close::new(CloseCode::Violation, "not a greeting"));
    }

    /// The authenticator has answered for a link.
    pub fn handle_authenticated(
        &mut self,
        id: LinkId,
        result: Result<Identity, AuthError>,
        now: Now,
    ) {
        self.wires.now = now;
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        let revoked = &self.revoked;
        let result = result.and_then(|identity| {
            if revoked.is_since(link.asked, &identity) {
                return Err(AuthError::Unauthorized("revoked while it was asked about".into()));
            }
            Ok(identity)
        });
        self.wires.counts.authenticated(&result);
        if let Err(AuthError::Unavailable(why)) = &result {
            self.wires.observe_failure(Hook::Authenticator, why.clone());
        }
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        if link.refreshing {
            link.refreshing = false;
            self.handle_refreshed(id, result);
        } else if let State::Authenticating { .. } = link.state {
            // Whatever comes of it, the greeting is over.
            let state = std::mem::replace(&mut link.state, State::Greeting { header: None });
            if let State::Authenticating { greeting, id: request } = state {
                match result {
                    Ok(identity) => self.welcome(id, *greeting, identity),
                    Err(error) => self.turn_away(id, request, &error),
                }
            }
        }
        self.tidy();
    }

    fn turn_away(&mut self, id: LinkId, request: Option<RequestId>, error: &AuthError) {
        // The same words whatever was wrong: nothing to learn from them.
        let (code, message, close) = match error {
            AuthError::Unauthorized(_) => {
                (ErrorCode::Unauthorized, "credentials not accepted", CloseCode::Unauthorized)
            }
            AuthError::Forbidden(_) => {
                (ErrorCode::Forbidden, "not allowed with these credentials", CloseCode::Forbidden)
            }
            AuthError::Unavailable(_) => {
                (ErrorCode::Internal, "credentials could not be checked", CloseCode::TryLater)
            }
        };
        let refusal = Refusal::new(code, message).reply_to(request);
        self.wires.refuse(id, refusal);
        self.wires.close_because(id, Close::new(close, message), Some(error.to_string()));
    }

    fn welcome(&mut self, id: LinkId, greeting: Greeting, identity: Identity) {
        let expires = identity.expires_in;
        let result = match greeting {
            Greeting::Agent(greeting) => self.welcome_agent(id, &greeting, identity),
            Greeting::Dashboard(greeting) => self.welcome_dashboard(id, &greeting, identity),
        };
        match result {
            Ok(()) => {
                // An agent that has more to list is not done.
                if !self.wires.links.get(&id).is_some_and(Link::is_listing) {
                    self.wires.deadlines.cancel(&Due::Greeting(id));
                }
                self.set_expiry(id, expires);
                if let Some(link) = self.wires.links.get(&id) {
                    let at = link.liveness.deadline();
                    self.wires.deadlines.set(Due::Beat(id), at);
                }
            }
            Err(close) => {
                let code = match close.code {
                    CloseCode::Forbidden => Some(ErrorCode::Forbidden),
                    CloseCode::Superseded => None, // nothing was wrong with it
                    _ => Some(ErrorCode::LimitReached), // the only other refusal of a greeting
                };
                if let Some(code) = code {
                    let refusal = Refusal::new(code, close.reason.clone());
                    self.wires.refuse(id, refusal);
                }
                self.wires.close(id, close);
            }
        }
    }

    fn welcome_agent(
        &mut self,
        id: LinkId,
        greeting: &AgentConnect,
        identity: Identity,
    ) -> Result<(), Close> {
        let agent = identity.agent.clone().unwrap_or_else(|| greeting.agent.clone());
        let Self { wires, tenants, .. } = self;
        let tenant_id = identity.tenant.clone();
        let tenant = tenants
            .entry(tenant_id.clone())
            .or_insert_with(|| Tenant::new(tenant_id.clone(), wires));
        let (subject, expires_in) = (identity.subject.clone(), identity.expires_in);
        tenant.handle_agent_here(wires, id, &agent, identity, greeting)?;
        let Some(link) = wires.links.get_mut(&id) else { return Ok(()) };
        let (idle, timeout) = (wires.limits.agent_idle, wires.limits.agent_timeout);
        link.liveness = Liveness::new(idle, timeout, wires.now.monotonic);
        let features = features(&greeting.features);
        let listing = greeting.more.then(Listing::default);
        link.state = State::Agent(AgentLink {
            tenant: tenant_id.clone(),
            agent: agent.clone(),
            subject,
            listing,
        });
        let heartbeat = heartbeat(idle, timeout);
        let ack = ack(wires, tenant_id, Peer::Agent(agent.clone()), features, heartbeat);
        wires.send(id, HubToAgent::Ack(ack));
        wires.observe_greeted(id, expires_in);
        if greeting.more {
            let timeout = wires.limits.message_timeout;
            wires.in_time(Due::Greeting(id), timeout);
        }
        tenant.handle_listed(wires, id, &agent, greeting.commands.clone(), greeting.more);
        Ok(())
    }

    fn welcome_dashboard(
        &mut self,
        id: LinkId,
        greeting: &DashboardConnect,
        identity: Identity,
    ) -> Result<(), Close> {
        let dashboard = match &greeting.dashboard {
            Some(dashboard) => dashboard.clone(),
            None => self.mint_dashboard(),
        };
        let Self { wires, tenants, .. } = self;
        let tenant_id = identity.tenant.clone();
        let tenant = tenants
            .entry(tenant_id.clone())
            .or_insert_with(|| Tenant::new(tenant_id.clone(), wires));
        let expires_in = identity.expires_in;
        let identity = Arc::new(identity);
        let sees_as_before = tenant.handle_dashboard_here(wires, id, &dashboard, &identity)?;
        let Some(link) = wires.links.get_mut(&id) else { return Ok(()) };
        let (idle, timeout) = (wires.limits.dashboard_idle, wires.limits.dashboard_timeout);
        link.liveness = Liveness::new(idle, timeout, wires.now.monotonic);
        let features = features(&greeting.features);
        link.binary = features.contains(&Feature::Binary);
        link.state = State::Dashboard(Box::new(DashboardLink {
            tenant: tenant_id.clone(),
            dashboard: dashboard.clone(),
            identity,
            cursor: tenant.cursor(sees_as_before, greeting.since.roster),
            follows: false,
            subscription: BTreeMap::new(),
            readers: Map::default(),
            turn: VecDeque::new(),
        }));
        let heartbeat = heartbeat(idle, timeout);
        let ack = ack(wires, tenant_id, Peer::Dashboard(dashboard), features, heartbeat);
        wires.send(id, HubToDashboard::Ack(ack));
        wires.observe_greeted(id, expires_in);
        Ok(())
    }

    fn mint_dashboard(&mut self) -> DashboardId {
        let number = (u128::from(self.rng.next_u64()) << 64) | u128::from(self.rng.next_u64());
        let name = format!("dashboard-{number:032x}");
        // 42 characters of the alphabet of names.
        name.parse().expect("a minted name is a name")
    }

    // ---- messages -------------------------------------------------------

    fn handle_agent_message(
        &mut self,
        id: LinkId,
        tenant: &TenantId,
        agent: &trunkline_protocol::ids::AgentId,
        envelope: Envelope<AgentToHub>,
    ) {
        let Self { wires, tenants, .. } = self;
        let Some(tenant) = tenants.get_mut(tenant) else { return };
        if wires.links.get(&id).is_some_and(Link::is_listing)
            && !may_come_while_listing(&envelope.message)
        {
            wires.close(id, unlisted());
            return;
        }
        match envelope.message {
            AgentToHub::Commands(held) => {
                if wires.links.get(&id).is_some_and(Link::is_listing) {
                    tenant.handle_listed(wires, id, agent, held.commands, held.more);
                } else {
                    let why = "agent:commands follow a greeting that had more";
                    let refusal = Refusal::new(ErrorCode::InvalidMessage, why).field("type");
                    wires.refuse_message(id, "agent:commands", refusal.reply_to(envelope.id));
                }
            }
            AgentToHub::Status(report) => tenant.handle_report(wires, agent, report),
            AgentToHub::Accepted(_) => {}
            AgentToHub::Started(started) => tenant.handle_started(wires, agent, started),
            AgentToHub::Interrupting(word) => tenant.handle_interrupting(wires, agent, word),
            AgentToHub::Complete(complete) => tenant.handle_complete(wires, agent, complete),
            AgentToHub::Output(output) => {
                let header = codec::binary::OutputHeader {
                    stream: output.stream,
                    offset: output.offset,
                    channel: output.channel,
                };
                tenant.handle_output(wires, id, agent, &header, &output.data);
            }
            AgentToHub::Gap(gap) => {
                tenant.handle_gap(wires, id, agent, gap);
            }
            AgentToHub::InputTaken(taken) => tenant.handle_input_taken(wires, agent, taken),
            AgentToHub::Log(batch) => {
                let (tenant, sender) = (tenant.id.clone(), LogSender::Agent(agent.clone()));
                self.handle_log(id, &tenant, sender, envelope.id, batch);
            }
            AgentToHub::Disconnect(_) => {
                let agent = agent.clone();
                tenant.handle_agent_lost(wires, &agent, id);
                tenant.handle_agent_offline(wires, &agent);
                wires.close(id, Close::new(CloseCode::Normal, "goodbye"));
            }
            AgentToHub::Ping(ping) => wires.send(id, HubToAgent::Pong(ping)),
            AgentToHub::Pong(pong) => self.handle_pong(id, pong),
            AgentToHub::RefreshToken(refresh) => {
                let role = Role::Agent(agent.clone());
                self.refresh(id, role, refresh.token);
            }
            AgentToHub::Error(refusal) => {
                tracing::warn!(target: "trunkline::hub", link = id.0, %agent, code = %refusal.code, "agent refused");
            }
        }
    }

    fn handle_dashboard_message(
        &mut self,
        id: LinkId,
        tenant: &TenantId,
        from: &DashboardId,
        envelope: Envelope<DashboardToHub>,
    ) {
        match envelope.message {
            DashboardToHub::Ping(ping) => self.wires.send(id, HubToDashboard::Pong(ping)),
            DashboardToHub::Pong(pong) => self.handle_pong(id, pong),
            DashboardToHub::Disconnect(_) => {
                self.wires.close(id, Close::new(CloseCode::Normal, "goodbye"));
            }
            DashboardToHub::RefreshToken(refresh) => {
                let role = Role::Dashboard(Some(from.clone()));
                self.refresh(id, role, refresh.token);
            }
            DashboardToHub::Error(refusal) => {
                tracing::warn!(target: "trunkline::hub", link = id.0, code = %refusal.code, "dashboard refused");
            }
            DashboardToHub::Log(batch) => {
                let sender = LogSender::Dashboard(from.clone());
                self.handle_log(id, tenant, sender, envelope.id, batch);
            }
            DashboardToHub::Subscribe(_)
            | DashboardToHub::Unsubscribe(_)
            | DashboardToHub::Shown(_)
            | DashboardToHub::Request(_)
            | DashboardToHub::Interrupt(_)
            | DashboardToHub::Input(_)
            | DashboardToHub::Resize(_)
            | DashboardToHub::EmergencyStop(_) => {
                let Self { wires, tenants, .. } = self;
                if let Some(tenant) = tenants.get_mut(tenant) {
                    tenant.handle_dashboard_message(wires, id, from, envelope);
                }
            }
        }
    }

    fn handle_pong(&mut self, id: LinkId, pong: HeartbeatBeat) {
        let now = self.wires.now.monotonic;
        if let Some(link) = self.wires.links.get_mut(&id) {
            link.liveness.handle_pong(pong.n, now);
        }
    }

    // ---- credentials ----------------------------------------------------

    fn set_expiry(&mut self, id: LinkId, expires_in: Option<Duration>) {
        let now = self.wires.now.monotonic;
        let ahead = self.wires.limits.refresh_ahead;
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        link.expires = expires_in.map(|left| now.saturating_add(left));
        match link.expires {
            Some(expires) => {
                let at = expires.saturating_sub(ahead).max(now);
                self.wires.deadlines.set(Due::Credentials(id), at);
            }
            None => self.wires.deadlines.cancel(&Due::Credentials(id)),
        }
    }

    /// Credentials run out soon, or have.
    fn handle_expiry(&mut self, id: LinkId) {
        let now = self.wires.now.monotonic;
        let over = self.wires.limits.refresh_grace;
        let Some(expires) = self.wires.links.get(&id).and_then(|link| link.expires) else { return };
        let end = expires.saturating_add(over);
        if now >= end {
            self.wires.close(id, Close::new(CloseCode::Unauthorized, "new token"));
            return;
        }
        // Said again until one is taken: a token may not be had at once.
        let again = (self.wires.limits.refresh_ahead / 6).max(Duration::from_secs(1));
        self.wires.deadlines.set(Due::Credentials(id), end.min(self.wires.at(again)));
        let left = expires.saturating_sub(now).as_millis();
        let needed = RefreshNeeded { expires_in_ms: u64::try_from(left).unwrap_or(u64::MAX) };
        self.wires.send(id, HubToDashboard::RefreshNeeded(needed));
    }

    fn refresh(&mut self, id: LinkId, role: Role, token: Secret) {
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        let why = if link.refreshing {
            Some("a refresh is under way")
        } else {
            let (rate, now) = (self.wires.limits.refresh_rate, self.wires.now.monotonic);
            let counted = self.usage(id).map(|usage| usage.refreshes.take(rate, now));
            counted.is_some_and(|counted| counted.is_err()).then_some("too many refreshes")
        };
        if let Some(why) = why {
            let failed = RefreshFailed { message: why.into() };
            self.wires.send(id, HubToDashboard::RefreshFailed(failed));
            return;
        }
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        link.refreshing = true;
        link.asked = self.revoked.count;
        let credentials = Credentials { role, token: Some(token) };
        self.wires.effects.push_back(Effect::Authenticate { link: id, credentials });
    }

    fn handle_refreshed(&mut self, id: LinkId, result: Result<Identity, AuthError>) {
        let mut why = None;
        let result = match result {
            Ok(identity) => self.renew(id, identity),
            Err(error) => {
                why = Some(error.to_string());
                Err("the token was not accepted")
            }
        };
        match result {
            Ok(expires_in) => {
                self.set_expiry(id, expires_in);
                self.wires.observe_peer(id, What::Refreshed { expires_in });
                let millis = |left: Duration| u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                let success = RefreshSuccess { expires_in_ms: expires_in.map(millis) };
                self.wires.send(id, HubToDashboard::RefreshSuccess(success));
            }
            Err(message) => {
                let why = why.unwrap_or_else(|| message.to_owned());
                self.wires.observe_peer(id, What::RefreshRefused { why });
                let failed = RefreshFailed { message: message.into() };
                self.wires.send(id, HubToDashboard::RefreshFailed(failed));
            }
        }
    }

    /// A link goes on as `new`, which must be who it is. Returns for how long.
    fn renew(&mut self, id: LinkId, new: Identity) -> Result<Option<Duration>, &'static str> {
        const OTHER: &str = "the token is for somebody else";
        let expires_in = new.expires_in;
        let Self { wires, tenants, .. } = self;
        let link = wires.links.get_mut(&id).ok_or(OTHER)?;
        match &mut link.state {
            State::Agent(link) => {
                let agent = link.agent.clone();
                let tenant = tenants.get_mut(&link.tenant).ok_or(OTHER)?;
                if link.tenant != new.tenant || new.agent.as_ref().is_some_and(|id| *id != agent) {
                    return Err(OTHER);
                }
                tenant.renew_agent(wires, &agent, new)?;
            }
            State::Dashboard(link) => {
                let tenant = tenants.get_mut(&link.tenant).ok_or(OTHER)?;
                if link.tenant != new.tenant || link.identity.subject != new.subject {
                    return Err(OTHER);
                }
                let sees_as_before = link.identity.sees_as(&new);
                link.identity = Arc::new(new);
                if let Some(known) = tenant.dashboards.get_mut(&link.dashboard) {
                    known.identity = Arc::clone(&link.identity);
                }
                if !sees_as_before {
                    tenant.review(wires, id);
                }
            }
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Closed => {
                return Err(OTHER);
            }
        }
        Ok(expires_in)
    }

    /// Ends all links of a subject at once, agents' and dashboards', and what
    /// of it is being authenticated; how many links those were. Peers are told
    /// to come back with a new token.
    pub fn handle_revoked(&mut self, tenant: &TenantId, subject: &str, now: Now) -> usize {
        self.wires.now = now;
        let (number, at) = (self.revoked.count, now.monotonic);
        self.revoked.count += 1;
        // Nobody waits longer for an answer than that.
        let keep = self.wires.limits.hook_timeout * 2;
        let latest = &mut self.revoked.latest;
        while latest.front().is_some_and(|(_, since, ..)| at.saturating_sub(*since) > keep) {
            latest.pop_front();
        }
        latest.push_back((number, at, tenant.clone(), subject.to_owned()));
        let is_theirs = |state: &State| match state {
            State::Agent(link) => {
                let agent =
                    self.tenants.get(tenant).and_then(|known| known.agents.get(&link.agent));
                let seen = agent.and_then(|agent| agent.seen.as_ref());
                link.tenant == *tenant && seen.is_some_and(|seen| seen.subject == subject)
            }
            State::Dashboard(link) => link.tenant == *tenant && link.identity.subject == subject,
            State::Arriving
            | State::Greeting { .. }
            | State::Authenticating { .. }
            | State::Closed => false,
        };
        let links = self.wires.links.iter().filter(|(_, link)| is_theirs(&link.state));
        let links: BTreeSet<LinkId> = links.map(|(id, _)| *id).collect();
        for id in &links {
            self.wires.close(*id, Close::new(CloseCode::Unauthorized, "revoked: new token"));
        }
        let (tenant, subject) = (tenant.clone(), subject.to_owned());
        let what = What::Revoked { tenant, subject, links: links.len() };
        self.wires.observe(None, None, what);
        self.tidy();
        links.len()
    }

    // ---- hooks, time, end -----------------------------------------------

    /// The queue has stored a change, or failed to.
    pub fn handle_stored(
        &mut self,
        tenant: &TenantId,
        command: trunkline_protocol::ids::CommandId,
        result: &Result<(), QueueError>,
        now: Now,
    ) {
        self.wires.now = now;
        let Self { wires, tenants, .. } = self;
        if let Some(tenant) = tenants.get_mut(tenant) {
            tenant.handle_stored(wires, command, result);
        }
        self.tidy();
    }

    /// The time has come for what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.wires.now = now;
        while let Some(due) = self.wires.deadlines.pop(now.monotonic) {
            self.handle_due(due);
            self.tidy();
        }
    }

    fn handle_due(&mut self, due: Due) {
        let Self { wires, tenants, .. } = self;
        match due {
            Due::Greeting(id) => {
                wires.close(id, Close::new(CloseCode::GreetingTimeout, "no greeting in time"));
            }
            Due::Flushed(id) => {
                // Closed for another reason meanwhile, it has its last words.
                let is_flushing = |closing: &mut Closing| matches!(closing, Closing::Flushed(_));
                if let Some(link) = wires.links.get_mut(&id)
                    && let Some(Closing::Flushed(close)) = link.closing.take_if(is_flushing)
                {
                    wires.close(id, close);
                }
            }
            Due::Beat(id) => self.beat(id),
            Due::Credentials(id) => self.handle_expiry(id),
            Due::AgentGrace(id, agent) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.handle_agent_offline(wires, &agent);
                }
            }
            Due::AgentRetention(id, agent) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.handle_agent_retention(wires, &agent);
                }
            }
            Due::Grant(id, agent) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.handle_grant(wires, &agent);
                }
            }
            Due::Dispatch(id, agent) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.dispatch(wires, &agent);
                }
            }
            Due::DeliverBy(id, command) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.handle_deliver_by(wires, command);
                }
            }
            Due::RunFor(id, command) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.handle_run_for(wires, command);
                }
            }
            Due::Store(id, command) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.advance(wires, command);
                }
            }
            Due::LogRetention(id, command) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.drop_output(wires, command);
                }
            }
            Due::Keep => self.handle_keep(),
            Due::Subject(id, subject) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.forget_subject(&subject);
                }
            }
            Due::Dashboard(id, dashboard) => {
                if let Some(tenant) = tenants.get_mut(&id) {
                    tenant.forget_dashboard(wires, &dashboard);
                }
            }
        }
    }

    fn beat(&mut self, id: LinkId) {
        let now = self.wires.now.monotonic;
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        match link.liveness.poll(now) {
            Beat::Nothing => {}
            Beat::Dead => {
                let close = Close::new(CloseCode::Silent, "nothing heard for too long");
                self.wires.close(id, close);
                return;
            }
            Beat::Ping(n) => {
                let agent = match &link.state {
                    State::Agent(link) => Some((link.tenant.clone(), link.agent.clone())),
                    State::Arriving
                    | State::Greeting { .. }
                    | State::Authenticating { .. }
                    | State::Dashboard(_)
                    | State::Closed => None,
                };
                self.wires.send(id, HubToDashboard::Ping(HeartbeatBeat { n }));
                if let Some((tenant, agent)) = agent
                    && let Some(tenant) = self.tenants.get_mut(&tenant)
                {
                    tenant.tell_stored(&mut self.wires, &agent);
                }
            }
        }
        if let Some(link) = self.wires.links.get(&id) {
            let at = link.liveness.deadline();
            self.wires.deadlines.set(Due::Beat(id), at);
        }
    }

    /// Stops taking links and commands; what waits on each link goes out, then
    /// a close that asks it to be back at a time of its own within `spread`.
    /// Whoever is not flushed within `close_timeout` is closed all the same.
    pub fn handle_drain(&mut self, spread: Duration, now: Now) {
        self.wires.now = now;
        self.wires.draining = true;
        // In order, so that a seed draws the same hints for the same links.
        let ids: BTreeSet<LinkId> = self.wires.links.keys().copied().collect();
        for id in ids {
            let close = self.restart_hint(spread);
            let timeout = self.wires.limits.close_timeout;
            let Some(link) = self.wires.links.get_mut(&id) else { continue };
            if link.closing.is_none() {
                link.closing = Some(Closing::Flushed(close));
                self.wires.in_time(Due::Flushed(id), timeout);
                self.wires.wake(id);
            }
        }
        self.tidy();
    }

    fn restart_hint(&mut self, spread: Duration) -> Close {
        let millis = u64::try_from(spread.as_millis()).unwrap_or(u64::MAX).max(1);
        Close::restart(Duration::from_millis(self.rng.next_u64() % millis))
    }

    /// Lets go of what the links were that have just been closed, and of what
    /// logs have too much.
    fn tidy(&mut self) {
        while let Some((id, state)) = self.wires.closed.pop() {
            let Self { wires, tenants, .. } = self;
            match state {
                State::Agent(link) => {
                    if let Some(tenant) = tenants.get_mut(&link.tenant) {
                        tenant.handle_agent_lost(wires, &link.agent, id);
                    }
                }
                State::Dashboard(link) => {
                    if let Some(tenant) = tenants.get_mut(&link.tenant) {
                        tenant.handle_dashboard_lost(wires, id, &link);
                    }
                }
                State::Arriving
                | State::Greeting { .. }
                | State::Authenticating { .. }
                | State::Closed => {}
            }
        }
        self.bound_logs();
        self.keep();
    }

    /// Keeps all logs together within their bound: the largest gives.
    fn bound_logs(&mut self) {
        let max = self.wires.limits.log_bytes_total;
        while self.wires.log_bytes > max {
            let largest = self.tenants.iter().filter_map(|(id, tenant)| {
                tenant.largest_stream().map(|(cost, stream)| (cost, stream, id.clone()))
            });
            let Some((cost, stream, tenant)) = largest.max() else { return };
            let before = self.wires.log_bytes;
            if let Some(tenant) = self.tenants.get_mut(&tenant) {
                // An eighth at a time, so that the search is rare.
                tenant.evict(&mut self.wires, stream, cost - cost / 8);
            }
            if self.wires.log_bytes >= before {
                return;
            }
        }
    }
}

fn is_known(kind: &str) -> bool {
    [
        Greeting::TYPES,
        AgentToHub::TYPES,
        HubToAgent::TYPES,
        DashboardToHub::TYPES,
        HubToDashboard::TYPES,
    ]
    .iter()
    .any(|types| types.contains(&kind))
}

/// What an agent may say before the list of what it holds is whole. The rest
/// is about commands, which the hub may not know yet.
fn may_come_while_listing(message: &AgentToHub) -> bool {
    matches!(
        message,
        AgentToHub::Commands(_)
            | AgentToHub::Ping(_)
            | AgentToHub::Pong(_)
            | AgentToHub::Disconnect(_)
            | AgentToHub::Error(_)
    )
}

fn unlisted() -> Close {
    Close::new(CloseCode::Violation, "what the greeting had no room for comes first")
}

fn features(offered: &[Feature]) -> Vec<Feature> {
    let ours = [Feature::Binary, Feature::Batch];
    ours.into_iter().filter(|feature| offered.contains(feature)).collect()
}

fn heartbeat(idle: Duration, timeout: Duration) -> Heartbeat {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    Heartbeat { idle_ms: millis(idle), timeout_ms: millis(timeout) }
}

fn ack(
    wires: &Wires,
    tenant: TenantId,
    peer: Peer,
    features: Vec<Feature>,
    heartbeat: Heartbeat,
) -> ConnectionAck {
    ConnectionAck {
        protocol: PROTOCOLS[0],
        tenant,
        peer,
        hub: wires.hub,
        queue: wires.epoch,
        features,
        limits: wires.limits.for_link(),
        heartbeat,
    }
}
