//! Those who a tenant's dashboards belong to: how many links each has, and how
//! fast it may speak, whatever link it speaks on.
//!
//! What is used up outlives the links: a subject is forgotten when it has none
//! and all of its buckets are full again. An agent is one entity with one link,
//! and counts for itself ([`Agent`](super::agents::Agent)).

use std::time::Duration;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::Close;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{DashboardToHub, ErrorCode, Refusal};
use trunkline_protocol::rate::{Bucket, Rate};

use super::deadlines::Due;
use super::tenant::Tenant;
use super::wires::Wires;

/// Terminals in a subscription, said or answered, that cost about as much as a
/// message.
const TERMINALS_PER_MESSAGE: usize = 8;

/// What one subject, or one agent, has used up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) messages: Bucket,
    pub(super) pieces: Bucket,
    pub(super) links: Bucket,
    pub(super) refreshes: Bucket,
    requests: Bucket,
    interrupts: Bucket,
    input: Bucket,
}

impl Usage {
    fn full_at(&self) -> Duration {
        let Self { messages, pieces, links, refreshes, requests, interrupts, input } = self;
        let buckets = [messages, pieces, links, refreshes, requests, interrupts, input];
        buckets.into_iter().map(Bucket::full_at).max().unwrap_or_default()
    }

    /// Counts another link. `Err` when they come too often.
    pub(super) fn count_link(&mut self, wires: &Wires) -> Result<(), Close> {
        let taken = self.links.take(wires.limits.link_rate, wires.now.monotonic);
        taken.map_err(|wait| Close::hinting(CloseCode::TryLater, wait))
    }

    /// What a message is counted as beside being one, and how often it may
    /// come. Most are paid for by being messages.
    fn class(&mut self, limits: &Limits, message: &DashboardToHub) -> Option<(&mut Bucket, Rate)> {
        match message {
            DashboardToHub::Request(_) | DashboardToHub::Subscribe(_) | DashboardToHub::Resize(_) => {
                Some((&mut self.requests, limits.request_rate))
            }
            DashboardToHub::Interrupt(_) | DashboardToHub::EmergencyStop(_) => {
                Some((&mut self.interrupts, limits.interrupt_rate))
            }
            DashboardToHub::Input(_) => Some((&mut self.input, limits.input_rate)),
            // Refreshes have a rate of their own, where they are handled.
            DashboardToHub::RefreshToken(_)
            // It only ever gives back.
            | DashboardToHub::Unsubscribe(_)
            | DashboardToHub::Shown(_)
            | DashboardToHub::Log(_)
            | DashboardToHub::Disconnect(_)
            | DashboardToHub::Ping(_)
            | DashboardToHub::Pong(_)
            | DashboardToHub::Error(_) => None,
        }
    }
}

/// Somebody whose dashboards come here.
#[derive(Debug, Default)]
pub(super) struct Subject {
    pub(super) links: usize,
    pub(super) usage: Usage,
}

/// A peer that sends more than it may, whatever it is told.
pub(super) fn flood() -> Close {
    Close::new(CloseCode::Flood, "too many messages")
}

pub(super) fn rate_limited(wait: Duration) -> Refusal {
    let mut refusal = Refusal::new(ErrorCode::RateLimited, "too many of these");
    let millis = wait.as_micros().div_ceil(1000);
    refusal.retry_after_ms = Some(u64::try_from(millis).unwrap_or(u64::MAX));
    refusal
}

impl Tenant {
    /// A subject has another link, perhaps in the place of one. `Err` when it
    /// has as many as it may, or they come too often.
    pub(super) fn add_link(
        &mut self,
        wires: &mut Wires,
        subject: &str,
        replaces: bool,
    ) -> Result<(), Close> {
        let known = self.subjects.entry(subject.to_owned()).or_default();
        let full = known.links - usize::from(replaces) >= wires.limits.links_per_subject;
        if full {
            return Err(Close::new(CloseCode::TryLater, "too many links of this subject"));
        }
        let counted = known.usage.count_link(wires);
        if counted.is_ok() {
            known.links += 1;
            wires.deadlines.cancel(&Due::Subject(self.id.clone(), subject.to_owned()));
        }
        counted
    }

    /// A subject has one link less.
    pub(super) fn remove_link(&mut self, wires: &mut Wires, subject: &str) {
        let Some(known) = self.subjects.get_mut(subject) else { return };
        known.links = known.links.saturating_sub(1);
        if known.links == 0 {
            let at = known.usage.full_at().max(wires.now.monotonic);
            wires.deadlines.set(Due::Subject(self.id.clone(), subject.to_owned()), at);
        }
    }

    /// A subject without links has nothing used up any more.
    pub(super) fn forget_subject(&mut self, subject: &str) {
        if self.subjects.get(subject).is_some_and(|known| known.links == 0) {
            self.subjects.remove(subject);
        }
    }

    /// Counts what a message about a subscription costs beside being one: it
    /// may name many, and is answered with all that there are then. `Err` is a
    /// time to wait.
    pub(super) fn count_terminals(
        &mut self,
        wires: &Wires,
        subject: &str,
        terminals: usize,
    ) -> Result<(), Duration> {
        let Some(subject) = self.subjects.get_mut(subject) else { return Ok(()) };
        let rate = wires.limits.message_rate;
        let count = u32::try_from(terminals / TERMINALS_PER_MESSAGE).unwrap_or(u32::MAX);
        // What costs more than there ever is costs all that there is.
        let count = count.min(rate.burst);
        subject.usage.messages.take_many(rate, count, wires.now.monotonic)
    }

    /// Counts what a dashboard says. `Err` is a time to wait.
    pub(super) fn count_request(
        &mut self,
        wires: &Wires,
        subject: &str,
        message: &DashboardToHub,
    ) -> Result<(), Refusal> {
        let Some(subject) = self.subjects.get_mut(subject) else { return Ok(()) };
        let Some((bucket, rate)) = subject.usage.class(&wires.limits, message) else {
            return Ok(());
        };
        bucket.take(rate, wires.now.monotonic).map_err(rate_limited)
    }
}
