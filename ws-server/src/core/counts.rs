//! What the hub has counted, and what it holds now.
//!
//! Every figure that goes with an [`Event`] is counted where the event is
//! told, so that the two cannot differ.

use std::collections::BTreeMap;
use std::time::Duration;

use trunkline_protocol::ids::{AgentId, StreamId};
use trunkline_protocol::message::{ErrorCode, Gap, GapReason, Peer, Refusal};
use trunkline_protocol::time::Now;

use super::link::State;
use super::wires::{Effect, Wires};
use super::{Core, LinkId};
use crate::hooks::{AuthError, Event, Hook, What, Who};

/// The type of terminal output, of a frame with several messages, and of what
/// is no message.
pub(super) const OUTPUT: &str = "terminal:output";
pub(super) const BATCH: &str = "batch";
pub(super) const INVALID: &str = "invalid";

/// Counts by a word, of which there are few: a message's type, a code, a
/// reason.
pub type ByWord<T = u64> = BTreeMap<&'static str, T>;

/// How many, and how long in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many.
    pub count: u64,
    /// Bytes in all.
    pub bytes: u64,
}

/// Terminal output in its binary form.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Output {
    pub(super) received: Traffic,
    pub(super) sent: Traffic,
}

impl Traffic {
    pub(super) fn add(&mut self, bytes: usize) {
        self.count += 1;
        self.bytes += bytes as u64;
    }
}

/// What happened since the hub was started. Every figure only grows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Greetings that were accepted, by role: `agent`, `dashboard`.
    pub greeted: ByWord,
    /// Links that ended before that, by the word of their close code.
    pub rejected: ByWord,
    /// Links that ended after that, by the word of their close code.
    pub closed: ByWord,
    /// The authenticator's answers: `ok`, `unauthorized`, `forbidden`,
    /// `unavailable`.
    pub authenticated: ByWord,
    /// What was refused to peers, by the word of the error code.
    pub refused: ByWord,
    /// Messages received, by their type; `invalid` for what is none. Bytes are
    /// those of whole frames: of a batch they stand under `batch`.
    pub received: ByWord<Traffic>,
    /// Messages sent, by their type. What one dashboard is sent of the roster
    /// stands under `roster`, in frames.
    pub sent: ByWord<Traffic>,
    /// Requests for commands, by outcome: `ok`, or the word of the error code.
    pub commands_requested: ByWord,
    /// Commands that have ended, by their final status.
    pub commands_ended: ByWord,
    /// Gaps in streams, by reason, with the bytes that are missing.
    pub gaps: ByWord<Traffic>,
    /// How often a dashboard was too slow for output that it wanted, with the
    /// bytes that it missed.
    pub slow: Traffic,
    /// Output that was dropped from logs to make room, in bytes.
    pub evicted_bytes: u64,
    /// Hooks that failed or took too long, by hook.
    pub hook_failures: ByWord,
}

/// What a hub holds now, and what it has counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Links that have not greeted yet, and those that are ending.
    pub links_other: usize,
    /// Links of agents.
    pub links_agents: usize,
    /// Links of dashboards.
    pub links_dashboards: usize,
    /// Tenants that are known.
    pub tenants: usize,
    /// Agents that are known, present or not.
    pub agents: usize,
    /// Commands that wait for their agents.
    pub commands_waiting: usize,
    /// How long the first of them has waited, by the wall clock.
    pub oldest_waiting: Option<Duration>,
    /// Memory of all commands, in bytes.
    pub command_bytes: usize,
    /// Streams whose output is in memory.
    pub streams: usize,
    /// Memory of all stream logs, in bytes.
    pub log_bytes: usize,
    /// Since the hub was started.
    pub counts: Counts,
}

impl Counts {
    /// With what is counted apart, as there is so much of it.
    fn with(mut self, output: Output) -> Self {
        for (map, more) in [(&mut self.received, output.received), (&mut self.sent, output.sent)] {
            let known = map.entry(OUTPUT).or_default();
            known.count += more.count;
            known.bytes += more.bytes;
        }
        self
    }

    pub(super) fn received(&mut self, kind: &'static str) {
        self.received.entry(kind).or_default().count += 1;
    }

    pub(super) fn received_bytes(&mut self, kind: &'static str, bytes: usize) {
        self.received.entry(kind).or_default().bytes += bytes as u64;
    }

    pub(super) fn sent(&mut self, kind: &'static str, bytes: usize) {
        self.sent.entry(kind).or_default().add(bytes);
    }

    pub(super) fn refused(&mut self, code: &ErrorCode) {
        *self.refused.entry(word(code)).or_default() += 1;
    }

    pub(super) fn authenticated<T>(&mut self, result: &Result<T, AuthError>) {
        let word = match result {
            Ok(_) => "ok",
            Err(AuthError::Unauthorized(_)) => "unauthorized",
            Err(AuthError::Forbidden(_)) => "forbidden",
            Err(AuthError::Unavailable(_)) => "unavailable",
        };
        *self.authenticated.entry(word).or_default() += 1;
    }

    fn count(&mut self, event: &Event) {
        let missing = |from: u64, to: u64| usize::try_from(to - from).unwrap_or(usize::MAX);
        let (by_word, word) = match &event.what {
            What::Rejected { close, .. } => (&mut self.rejected, close.code.as_str()),
            What::Closed { close, .. } => (&mut self.closed, close.code.as_str()),
            What::Greeted { .. } => match event.who.as_ref().map(|who| &who.peer) {
                Some(Peer::Dashboard(_)) => (&mut self.greeted, "dashboard"),
                Some(Peer::Agent(_)) | None => (&mut self.greeted, "agent"),
            },
            What::CommandRequested { outcome, .. } => {
                let word = outcome.as_ref().err().map_or("ok", word);
                (&mut self.commands_requested, word)
            }
            What::CommandEnded { status, .. } => (&mut self.commands_ended, status.as_str()),
            What::HookFailed { hook, .. } => (&mut self.hook_failures, hook.as_str()),
            What::Gap { from, to, reason, .. } => {
                self.gaps.entry(gap_word(reason)).or_default().add(missing(*from, *to));
                return;
            }
            What::Slow { from, to, .. } => {
                self.slow.add(missing(*from, *to));
                return;
            }
            What::Connected { .. }
            | What::Refreshed { .. }
            | What::RefreshRefused { .. }
            | What::Revoked { .. }
            | What::CommandStarted { .. }
            | What::InterruptRequested { .. }
            | What::StopRequested { .. }
            | What::InputBegan { .. }
            | What::InputEnded { .. }
            | What::Refused { .. }
            | What::Missed { .. } => return,
        };
        *by_word.entry(word).or_default() += 1;
    }
}

/// The word of a code that a hub uses.
fn word(code: &ErrorCode) -> &'static str {
    match code {
        ErrorCode::InvalidMessage => "invalid_message",
        ErrorCode::Forbidden => "forbidden",
        ErrorCode::NotFound => "not_found",
        ErrorCode::Unauthorized => "unauthorized",
        ErrorCode::UnsupportedProtocol => "unsupported_protocol",
        ErrorCode::QueueFull => "queue_full",
        ErrorCode::QueueUnavailable => "queue_unavailable",
        ErrorCode::Conflict => "conflict",
        ErrorCode::AgentOffline => "agent_offline",
        ErrorCode::NotRunning => "not_running",
        ErrorCode::LimitReached => "limit_reached",
        ErrorCode::RateLimited => "rate_limited",
        ErrorCode::Unsupported => "unsupported",
        ErrorCode::Draining => "draining",
        ErrorCode::Internal => "internal",
        // Whoever may make up words may not make up figures.
        ErrorCode::Other(_) => "other",
    }
}

fn gap_word(reason: &GapReason) -> &'static str {
    match reason {
        GapReason::Evicted => "evicted",
        GapReason::AgentOverflow => "agent_overflow",
        GapReason::AgentLoss => "agent_loss",
        GapReason::HubLoss => "hub_loss",
        GapReason::Lagged => "lagged",
        GapReason::NotRequested => "not_requested",
        GapReason::Other(_) => "other",
    }
}

impl Wires {
    /// Tells, and counts, what has happened.
    pub(super) fn observe(&mut self, link: Option<LinkId>, who: Option<Who>, what: What) {
        let event = Event { at_ms: self.now.wall_ms, link, who, what };
        self.counts.count(&event);
        self.effects.push_back(Effect::Observe(Box::new(event)));
    }

    /// What a peer has done, or what became of it.
    pub(super) fn observe_peer(&mut self, link: LinkId, what: What) {
        let who = self.who(link);
        self.observe(Some(link), who, what);
    }

    /// Refuses a message of this type, and tells so.
    pub(super) fn refuse_message(&mut self, id: LinkId, kind: &'static str, refusal: Refusal) {
        let what = What::Refused { message: Some(kind), code: refusal.code.clone() };
        self.observe_peer(id, what);
        self.refuse(id, refusal);
    }

    /// A peer was let in just now.
    pub(super) fn observe_greeted(&mut self, id: LinkId, expires_in: Option<Duration>) {
        let now = self.now.monotonic;
        let Some(link) = self.links.get_mut(&id) else { return };
        let after = now.saturating_sub(std::mem::replace(&mut link.since, now));
        let address = link.address;
        self.observe_peer(id, What::Greeted { address, after, expires_in });
    }

    /// Output will be missing, for everybody.
    pub(super) fn observe_gap(&mut self, agent: &AgentId, stream: StreamId, gap: &Gap) {
        let Gap { from, to, reason } = gap.clone();
        let what = What::Gap { agent: agent.clone(), stream, from, to, reason };
        self.observe(None, None, what);
    }

    pub(super) fn observe_failure(&mut self, hook: Hook, why: String) {
        self.observe(None, None, What::HookFailed { hook, why });
    }

    /// Who is at the other end of a link, if that is known.
    pub(super) fn who(&self, link: LinkId) -> Option<Who> {
        self.links.get(&link)?.state.who()
    }
}

impl State {
    pub(super) fn who(&self) -> Option<Who> {
        match self {
            Self::Agent(link) => {
                Some(Who::new(&link.tenant, &link.subject, Peer::Agent(link.agent.clone())))
            }
            Self::Dashboard(link) => {
                let peer = Peer::Dashboard(link.dashboard.clone());
                Some(Who::new(&link.tenant, &link.identity.subject, peer))
            }
            Self::Arriving | Self::Greeting { .. } | Self::Authenticating { .. } | Self::Closed => {
                None
            }
        }
    }
}

impl Core {
    /// A hook has failed at what nobody waits for.
    pub fn handle_hook_failed(&mut self, hook: Hook, why: String, now: Now) {
        self.wires.now = now;
        self.wires.observe_failure(hook, why);
    }

    /// What the hub holds now, and what it has counted. Takes time in
    /// proportion to the number of links and tenants.
    pub fn stats(&self, now: Now) -> Stats {
        let wires = &self.wires;
        let mut stats = Stats {
            tenants: self.tenants.len(),
            log_bytes: wires.log_bytes,
            counts: wires.counts.clone().with(wires.output),
            ..Stats::default()
        };
        for link in wires.links.values() {
            match link.state {
                State::Agent(_) => stats.links_agents += 1,
                State::Dashboard(_) => stats.links_dashboards += 1,
                State::Arriving
                | State::Greeting { .. }
                | State::Authenticating { .. }
                | State::Closed => stats.links_other += 1,
            }
        }
        let mut first = None;
        for tenant in self.tenants.values() {
            stats.agents += tenant.agents.len();
            stats.command_bytes += tenant.command_bytes;
            stats.streams += tenant.streams.len();
            stats.commands_waiting += tenant.waiting.len();
            first = first.into_iter().chain(tenant.first_waiting_ms()).min();
        }
        let age = |at: u64| Duration::from_millis(now.wall_ms.saturating_sub(at));
        stats.oldest_waiting = first.map(age);
        stats
    }
}
