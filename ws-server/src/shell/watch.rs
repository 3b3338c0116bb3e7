//! Where events go: into the log, and to the observer.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::ids::AgentId;
use trunkline_protocol::message::{ErrorCode, Peer};

use crate::hooks::{EVENTS_MAX, Event, Observer, What};

/// An event in the log, with what every one of them says. Texts that somebody
/// has chosen are written by `Debug`, with control characters as escapes.
macro_rules! say {
    ($level:ident, $name:literal, $event:expr $(, $($field:tt)*)?) => {{
        let who = $event.who.as_ref();
        tracing::event!(
            name: $name,
            target: "trunkline::hub",
            tracing::Level::$level,
            link = $event.link.map(|link| link.0),
            tenant = who.map(|who| who.tenant.as_str()),
            subject = who.map(|who| debug(&who.subject)),
            peer = who.map(|who| peer(&who.peer)),
            $($($field)*,)?
            $name
        );
    }};
}

fn peer(peer: &Peer) -> &str {
    match peer {
        Peer::Agent(agent) => agent.as_str(),
        Peer::Dashboard(dashboard) => dashboard.as_str(),
    }
}

fn outcome<T, E: std::fmt::Display>(outcome: &Result<T, E>) -> String {
    outcome.as_ref().err().map_or_else(|| "ok".to_owned(), ToString::to_string)
}

/// Says an event in the log. The names, levels and fields are documented in
/// `docs/watching.md`, and do not change.
pub(super) fn trace(event: &Event) {
    match &event.what {
        What::Connected { address } => say!(DEBUG, "connected", event, ?address),
        What::Rejected { address, close, why } => {
            let (code, reason) = (close.code.number(), close.reason.as_str());
            match close.code {
                // They come and go.
                CloseCode::Lost | CloseCode::GreetingTimeout => {
                    say!(DEBUG, "rejected", event, ?address, code, ?reason, ?why);
                }
                _ => {
                    say!(INFO, "rejected", event, ?address, code, ?reason, ?why);
                }
            }
        }
        What::Greeted { address, after, expires_in } => {
            say!(INFO, "greeted", event, ?address, ?after, ?expires_in);
        }
        What::Refreshed { expires_in } => {
            say!(DEBUG, "refreshed", event, ?expires_in);
        }
        What::RefreshRefused { why } => say!(INFO, "refresh refused", event, ?why),
        What::Closed { close, after } => {
            let (code, reason) = (close.code.number(), close.reason.as_str());
            match close.code {
                CloseCode::Superseded => {
                    say!(INFO, "superseded", event, code, ?reason, ?after);
                }
                CloseCode::Flood => {
                    say!(WARN, "flooded", event, code, ?reason, ?after);
                }
                _ => say!(INFO, "closed", event, code, ?reason, ?after),
            }
        }
        What::Revoked { tenant, subject, links } => {
            tracing::info!(
                name: "revoked",
                target: "trunkline::hub",
                %tenant,
                subject = ?subject.as_str(),
                links,
                "revoked"
            );
        }
        What::CommandRequested { command, agent, title, outcome: result } => {
            let outcome = outcome(result);
            say!(INFO, "command requested", event, %command, %agent, ?title, outcome);
        }
        What::CommandStarted { command, agent, attempt, waited } => {
            say!(INFO, "command started", event, %command, %agent, attempt, ?waited);
        }
        What::CommandEnded { command, agent, attempt, status, end, ran } => {
            say!(
                INFO,
                "command ended",
                event,
                %command,
                %agent,
                attempt,
                %status,
                exit_code = end.exit_code,
                signal = end.signal,
                ?ran
            );
        }
        What::InterruptRequested { command, agent, outcome: result } => {
            let outcome = outcome(result);
            let agent = agent.as_ref().map(AgentId::as_str);
            say!(INFO, "interrupt requested", event, %command, agent, outcome);
        }
        What::StopRequested { agents, outcome: result } => {
            let stopped = result.as_ref().ok();
            let outcome = outcome(result);
            say!(WARN, "stop requested", event, ?agents, stopped, outcome);
        }
        What::InputBegan { command, agent } => {
            say!(INFO, "input began", event, %command, %agent);
        }
        What::InputEnded { command, agent, bytes } => {
            say!(INFO, "input ended", event, %command, %agent, bytes);
        }
        What::Refused { message, code: ErrorCode::RateLimited } => {
            say!(DEBUG, "rate limited", event, message_type = message);
        }
        What::Refused { message, code } => {
            say!(DEBUG, "refused", event, message_type = message, %code);
        }
        What::Slow { stream, from, to } => {
            say!(INFO, "slow", event, %stream, from, to);
        }
        What::Gap { agent, stream, from, to, reason } => {
            say!(WARN, "gap", event, %agent, %stream, from, to, %reason);
        }
        What::HookFailed { hook, why } => {
            say!(WARN, "hook failed", event, %hook, ?why);
        }
        What::Missed { count } => say!(WARN, "events missed", event, count),
    }
}

/// Events on their way to the observer.
pub(crate) struct Watch {
    observer: Option<Arc<dyn Observer>>,
    waiting: Mutex<Waiting>,
    /// There is something to tell, or it is over.
    news: Notify,
    /// The last one that waited was told.
    told: Notify,
    is_over: AtomicBool,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<Event>,
    is_telling: bool,
    /// Left out since the last one that waits.
    missed: u64,
}

impl Waiting {
    fn put(&mut self, event: &Event) {
        let room =
            if event.who.is_some() || event.link.is_none() { EVENTS_MAX } else { EVENTS_MAX / 2 };
        if self.events.len() >= room {
            self.missed += 1;
            return;
        }
        if self.missed > 0 {
            let count = std::mem::take(&mut self.missed);
            let missed = What::Missed { count };
            self.events.push_back(Event { link: None, who: None, what: missed, ..event.clone() });
        }
        self.events.push_back(event.clone());
    }
}

impl Watch {
    pub(super) fn new(observer: Option<Arc<dyn Observer>>) -> Self {
        Self {
            observer,
            waiting: Mutex::default(),
            news: Notify::new(),
            told: Notify::new(),
            is_over: AtomicBool::new(false),
        }
    }

    /// Whether anybody observes.
    pub(crate) fn is_on(&self) -> bool {
        self.observer.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event has happened, after all that were put before.
    pub(super) fn put(&self, event: &Event) {
        if self.is_on() {
            self.lock().put(event);
            self.news.notify_one();
        }
    }

    /// Tells the observer, until the hub is dropped.
    pub(crate) async fn run(&self) {
        let Some(observer) = &self.observer else { return };
        loop {
            let news = self.news.notified();
            while let Some(event) = self.next() {
                // What it shares with other calls is its own to keep in order.
                if catch_unwind(AssertUnwindSafe(|| observer.observe(&event))).is_err() {
                    tracing::warn!(target: "trunkline::hub", "the observer panicked");
                }
                // Others want the thread, too.
                tokio::task::consume_budget().await;
            }
            self.told.notify_waiters();
            if self.is_over.load(Ordering::Acquire) {
                return;
            }
            news.await;
        }
    }

    fn next(&self) -> Option<Event> {
        let mut waiting = self.lock();
        let event = waiting.events.pop_front();
        waiting.is_telling = event.is_some();
        event
    }

    /// Waits until everything was told.
    pub(crate) async fn flushed(&self) {
        loop {
            let told = self.told.notified();
            {
                let waiting = self.lock();
                if !self.is_on() || (waiting.events.is_empty() && !waiting.is_telling) {
                    return;
                }
            }
            told.await;
        }
    }

    pub(super) fn stop(&self) {
        self.is_over.store(true, Ordering::Release);
        self.news.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::LinkId;

    fn event(link: Option<u64>, count: u64) -> Event {
        Event {
            at_ms: count,
            link: link.map(LinkId),
            who: None,
            what: What::Connected { address: None },
        }
    }

    #[test]
    fn strangers_take_half_and_what_was_left_out_is_counted_in_its_place() {
        let mut waiting = Waiting::default();
        for n in 0..EVENTS_MAX as u64 {
            waiting.put(&event(Some(n), n));
        }
        assert_eq!(waiting.events.len(), EVENTS_MAX / 2);
        // Those of the hub itself, and of peers, still find room.
        waiting.put(&event(None, 1));
        let missed = &waiting.events[EVENTS_MAX / 2].what;
        assert_eq!(*missed, What::Missed { count: EVENTS_MAX as u64 / 2 });
        for n in 0..EVENTS_MAX as u64 {
            waiting.put(&event(None, n));
        }
        assert!(waiting.events.len() <= EVENTS_MAX + 1, "{}", waiting.events.len());
        assert!(waiting.missed > 0);
    }
}
