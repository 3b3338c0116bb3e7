//! The hub's figures, for the `metrics` facade: whoever installs a recorder has
//! them. Names, types and labels are documented in `docs/watching.md`, and do
//! not change.

use std::time::Duration;

use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use trunkline_protocol::message::Peer;

use crate::core::{ByWord, Stats, Traffic};
use crate::hooks::{Event, Hook, What};

/// How often the figures are brought up to date.
pub(super) const EVERY: Duration = Duration::from_secs(5);

/// Says what each figure is.
pub(super) fn describe() {
    for (name, what) in [
        ("trunkline_greetings_total", "Greetings that were accepted"),
        ("trunkline_links_rejected_total", "Links that ended before their greeting was accepted"),
        ("trunkline_links_closed_total", "Links that ended after that"),
        ("trunkline_authentications_total", "Answers of the authenticator"),
        ("trunkline_refusals_total", "What was refused to peers"),
        ("trunkline_received_messages_total", "Messages received"),
        ("trunkline_sent_messages_total", "Messages sent"),
        ("trunkline_commands_requested_total", "Requests for commands"),
        ("trunkline_commands_ended_total", "Commands that have ended"),
        ("trunkline_gaps_total", "Gaps in streams, for everybody"),
        ("trunkline_slow_reads_total", "Dashboards that read too slowly for what they wanted"),
        ("trunkline_hook_failures_total", "Hooks that failed or took too long"),
    ] {
        describe_counter!(name, Unit::Count, what);
    }
    for (name, what) in [
        ("trunkline_received_bytes_total", "Content of the frames received"),
        ("trunkline_sent_bytes_total", "Content of the frames sent"),
        ("trunkline_gap_bytes_total", "Output that is missing, for everybody"),
        ("trunkline_slow_read_bytes_total", "Output that slow dashboards missed"),
        ("trunkline_evicted_bytes_total", "Output dropped from logs to make room"),
    ] {
        describe_counter!(name, Unit::Bytes, what);
    }
    for (name, unit, what) in [
        ("trunkline_links", Unit::Count, "Links that are up"),
        ("trunkline_tenants", Unit::Count, "Tenants that are known"),
        ("trunkline_agents", Unit::Count, "Agents that are known, present or not"),
        ("trunkline_commands_waiting", Unit::Count, "Commands that wait for their agents"),
        ("trunkline_oldest_waiting_seconds", Unit::Seconds, "How long the first has waited"),
        ("trunkline_command_bytes", Unit::Bytes, "Memory of all commands"),
        ("trunkline_streams", Unit::Count, "Streams whose output is in memory"),
        ("trunkline_log_bytes", Unit::Bytes, "Memory of all stream logs"),
    ] {
        describe_gauge!(name, unit, what);
    }
    for (name, what) in [
        ("trunkline_greeting_seconds", "From the accepted connection to the accepted greeting"),
        ("trunkline_command_wait_seconds", "From a command's acceptance to its start"),
        ("trunkline_command_run_seconds", "From a command's start to its end"),
        ("trunkline_hook_seconds", "Answers of hooks"),
    ] {
        describe_histogram!(name, Unit::Seconds, what);
    }
}

/// What is a length of time in an event.
pub(super) fn record(event: &Event) {
    match &event.what {
        What::Greeted { after, .. } => {
            let role = match event.who.as_ref().map(|who| &who.peer) {
                Some(Peer::Dashboard(_)) => "dashboard",
                Some(Peer::Agent(_)) | None => "agent",
            };
            histogram!("trunkline_greeting_seconds", "role" => role).record(*after);
        }
        What::CommandStarted { waited, .. } => {
            histogram!("trunkline_command_wait_seconds").record(*waited);
        }
        What::CommandEnded { ran: Some(ran), .. } => {
            histogram!("trunkline_command_run_seconds").record(*ran);
        }
        _ => {} // the rest is counted
    }
}

/// How long a hook took.
pub(super) fn record_hook(hook: Hook, took: Duration) {
    histogram!("trunkline_hook_seconds", "hook" => hook.as_str()).record(took);
}

/// Brings the figures up to date.
pub(super) fn publish(stats: &Stats) {
    let counts = &stats.counts;
    by_word("trunkline_greetings_total", "role", &counts.greeted);
    by_word("trunkline_links_rejected_total", "code", &counts.rejected);
    by_word("trunkline_links_closed_total", "code", &counts.closed);
    by_word("trunkline_authentications_total", "result", &counts.authenticated);
    by_word("trunkline_refusals_total", "code", &counts.refused);
    by_word("trunkline_commands_requested_total", "outcome", &counts.commands_requested);
    by_word("trunkline_commands_ended_total", "status", &counts.commands_ended);
    by_word("trunkline_hook_failures_total", "hook", &counts.hook_failures);
    let received = ["trunkline_received_messages_total", "trunkline_received_bytes_total"];
    traffic(received, "type", &counts.received);
    traffic(["trunkline_sent_messages_total", "trunkline_sent_bytes_total"], "type", &counts.sent);
    traffic(["trunkline_gaps_total", "trunkline_gap_bytes_total"], "reason", &counts.gaps);
    counter!("trunkline_slow_reads_total").absolute(counts.slow.count);
    counter!("trunkline_slow_read_bytes_total").absolute(counts.slow.bytes);
    counter!("trunkline_evicted_bytes_total").absolute(counts.evicted_bytes);

    for (role, links) in [
        ("agent", stats.links_agents),
        ("dashboard", stats.links_dashboards),
        ("other", stats.links_other),
    ] {
        gauge!("trunkline_links", "role" => role).set(float(links));
    }
    gauge!("trunkline_tenants").set(float(stats.tenants));
    gauge!("trunkline_agents").set(float(stats.agents));
    gauge!("trunkline_commands_waiting").set(float(stats.commands_waiting));
    let oldest = stats.oldest_waiting.unwrap_or_default();
    gauge!("trunkline_oldest_waiting_seconds").set(oldest);
    gauge!("trunkline_command_bytes").set(float(stats.command_bytes));
    gauge!("trunkline_streams").set(float(stats.streams));
    gauge!("trunkline_log_bytes").set(float(stats.log_bytes));
}

fn by_word(name: &'static str, label: &'static str, counts: &ByWord) {
    for (word, count) in counts {
        counter!(name, label => *word).absolute(*count);
    }
}

fn traffic([count, bytes]: [&'static str; 2], label: &'static str, counts: &ByWord<Traffic>) {
    for (word, traffic) in counts {
        counter!(count, label => *word).absolute(traffic.count);
        counter!(bytes, label => *word).absolute(traffic.bytes);
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn float(figure: usize) -> f64 {
    figure as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use metrics::{
        Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString,
        with_local_recorder,
    };
    use trunkline_protocol::frame::Close;
    use trunkline_protocol::message::{CommandEnd, CommandStatus};

    use super::*;
    use crate::core::Counts;

    /// What was described, and what was given.
    #[derive(Default)]
    struct Seen {
        described: Mutex<BTreeSet<String>>,
        given: Mutex<BTreeSet<String>>,
    }

    impl Seen {
        fn describe(&self, key: &KeyName) {
            self.described.lock().unwrap().insert(key.as_str().to_owned());
        }

        fn give(&self, key: &Key) {
            self.given.lock().unwrap().insert(key.name().to_owned());
        }
    }

    impl Recorder for Seen {
        fn describe_counter(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(&key);
        }
        fn describe_gauge(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(&key);
        }
        fn describe_histogram(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(&key);
        }
        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            self.give(key);
            Counter::noop()
        }
        fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
            self.give(key);
            Gauge::noop()
        }
        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
            self.give(key);
            Histogram::noop()
        }
    }

    fn event(what: What) -> Event {
        Event { at_ms: 0, link: None, who: None, what }
    }

    #[test]
    fn every_figure_is_described_given_and_documented() {
        let document = include_str!("../../../docs/watching.md");
        let rows = document.lines().filter(|line| line.starts_with("| `trunkline_"));
        let names = rows.flat_map(|row| row[2..].split(" | ").next().unwrap_or("").split(", "));
        let documented: BTreeSet<String> =
            names.map(|name| name.trim_matches('`').to_owned()).collect();
        let one = ByWord::from([("x", 1)]);
        let some = ByWord::from([("x", Traffic::default())]);
        let counts = Counts {
            greeted: one.clone(),
            rejected: one.clone(),
            closed: one.clone(),
            authenticated: one.clone(),
            refused: one.clone(),
            received: some.clone(),
            sent: some.clone(),
            commands_requested: one.clone(),
            commands_ended: one.clone(),
            gaps: some,
            hook_failures: one,
            ..Counts::default()
        };
        let (address, after) = (None, Duration::ZERO);
        let (command, agent) = (
            trunkline_protocol::ids::CommandId::from_u128(1),
            "a".parse::<trunkline_protocol::ids::AgentId>().unwrap(),
        );
        let (attempt, status, end) = (1, CommandStatus::Completed, CommandEnd::default());
        let seen = Seen::default();
        with_local_recorder(&seen, || {
            describe();
            publish(&Stats { counts, ..Stats::default() });
            record(&event(What::Greeted { address, after, expires_in: None }));
            let agent_ = agent.clone();
            record(&event(What::CommandStarted { command, agent: agent_, attempt, waited: after }));
            let ran = Some(after);
            record(&event(What::CommandEnded { command, agent, attempt, status, end, ran }));
            let close = Close::new(trunkline_protocol::close::CloseCode::Normal, "");
            record(&event(What::Closed { close, after }));
            record_hook(Hook::Queue, after);
        });
        let (described, given) = (seen.described.into_inner().unwrap(), seen.given.into_inner());
        assert_eq!(described, documented);
        assert_eq!(given.unwrap(), documented);
    }
}
