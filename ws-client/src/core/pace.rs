//! How fast this side may speak, by what the ack says: who keeps to it is only
//! refused where others of the same subject speak, too.

use std::time::Duration;

use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::LinkRates;
use trunkline_protocol::rate::{Bucket, Rate};

/// What is paid for apart from being a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Requests, subscriptions, sizes.
    Requests,
    /// Interrupts and emergency stops.
    Interrupts,
    /// Input.
    Input,
}

/// What is used up. It outlives links, as it does at the hub.
#[derive(Debug)]
pub(crate) struct Pace {
    rates: LinkRates,
    requests: Bucket,
    interrupts: Bucket,
    input: Bucket,
    messages: Bucket,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            rates: Limits::default().for_link().rates,
            requests: Bucket::default(),
            interrupts: Bucket::default(),
            input: Bucket::default(),
            messages: Bucket::default(),
        }
    }
}

impl Pace {
    /// What holds from now on.
    pub(crate) fn handle_ack(&mut self, rates: LinkRates) {
        self.rates = rates;
    }

    fn rate(&self, class: Class) -> Rate {
        match class {
            Class::Requests => self.rates.requests,
            Class::Interrupts => self.rates.interrupts,
            Class::Input => self.rates.input,
        }
    }

    fn bucket(&self, class: Class) -> Bucket {
        match class {
            Class::Requests => self.requests,
            Class::Interrupts => self.interrupts,
            Class::Input => self.input,
        }
    }

    fn bucket_mut(&mut self, class: Class) -> &mut Bucket {
        match class {
            Class::Requests => &mut self.requests,
            Class::Interrupts => &mut self.interrupts,
            Class::Input => &mut self.input,
        }
    }

    /// How many may be said now.
    pub(crate) fn available(&self, class: Class, now: Duration) -> usize {
        let available = self.bucket(class).available(self.rate(class), now);
        usize::try_from(available).unwrap_or(usize::MAX)
    }

    /// So many were said.
    pub(crate) fn said(&mut self, class: Class, count: usize, now: Duration) {
        let rate = self.rate(class);
        for _ in 0..count {
            let _ = self.bucket_mut(class).take(rate, now); // asked for before
            self.said_message(now);
        }
    }

    /// The hub has refused one: nothing of its kind before `until`.
    pub(crate) fn hold(&mut self, class: Class, until: Duration) {
        let rate = self.rate(class);
        self.bucket_mut(class).hold(rate, until);
    }

    /// When one may be said, if that is not now.
    pub(crate) fn ready_at(&self, class: Class, now: Duration) -> Option<Duration> {
        Some(self.bucket(class).ready_at(self.rate(class))).filter(|at| *at > now)
    }

    /// A message was said that costs nothing else.
    pub(crate) fn said_message(&mut self, now: Duration) {
        let _ = self.messages.take(self.rates.messages, now);
    }

    /// What can wait, as only its newest value counts, leaves half of the burst
    /// to what cannot: when it may be said, if that is not now.
    pub(crate) fn conflated_at(&self, now: Duration) -> Option<Duration> {
        let rate = self.rates.messages;
        let half = rate.every.saturating_mul((rate.burst / 2).max(1));
        Some(self.messages.full_at().saturating_sub(half)).filter(|at| *at > now)
    }
}
