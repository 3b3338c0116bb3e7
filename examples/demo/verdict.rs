//! Whether all of it held: what was expected, what each dashboard saw, and
//! the table at the end.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use trunkline_client::Audit;
use trunkline_client::protocol::ids::CommandId;
use trunkline_client::protocol::message::{CommandState, CommandStatus};
use trunkline_examples::{bytes_in_words, in_words};

use crate::show::{Colour, Show};
use crate::truth::Truth;
use crate::watcher::Watcher;

/// How long a dashboard may take to see what has already happened.
const PATIENCE: Duration = Duration::from_secs(10);

/// A command, and what must have become of it.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) what: &'static str,
    pub(crate) command: CommandId,
    pub(crate) truth: Truth,
    pub(crate) status: CommandStatus,
    pub(crate) exit_code: i32,
}

/// Something else that must hold.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) held: bool,
    pub(crate) what: String,
    pub(crate) found: String,
}

/// All that is known.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    expected: Vec<Expected>,
    checks: Vec<Check>,
    dashboards: Vec<&'static str>,
    rows: Vec<Row>,
}

/// One command in the table.
#[derive(Debug)]
struct Row {
    held: bool,
    what: &'static str,
    wrote: u64,
    status: String,
    /// For each dashboard, in words, what it saw.
    saw: Vec<Result<(), String>>,
}

impl Verdict {
    pub(crate) fn expects(&mut self, expected: Expected) {
        self.expected.push(expected);
    }

    pub(crate) fn checks(&mut self, check: Check) {
        self.checks.push(check);
    }

    /// Compares what was expected with what each dashboard has seen, and with
    /// what its roster, which is the second hub's, now says.
    pub(crate) async fn look(&mut self, watchers: &[&Watcher]) {
        self.dashboards = watchers.iter().map(|watcher| watcher.name).collect();
        for expected in &self.expected {
            let mut saw = Vec::new();
            let mut status = String::new();
            for watcher in watchers {
                let end = watcher.sees_end(expected.command);
                let in_time = timeout(PATIENCE, end).await.is_ok();
                let listed = timeout(PATIENCE, listed_as_over(watcher, expected.command)).await;
                saw.push(match listed {
                    Err(_) => Err("not listed as over".to_owned()),
                    Ok(_) if !in_time => Err("no end".to_owned()),
                    Ok(state) => {
                        status = in_words(&state);
                        compare(expected, watcher, &state)
                    }
                });
            }
            let held = saw.iter().all(Result::is_ok);
            let Expected { what, ref truth, .. } = *expected;
            self.rows.push(Row { held, what, wrote: truth.bytes, status, saw });
        }

        let (mut bytes, mut gaps, mut jumps) = (0, 0, 0);
        for watcher in watchers {
            for output in watcher.seen().outputs() {
                bytes += output.bytes;
                gaps += output.gaps.len();
                jumps += output.jumps;
            }
        }
        let found = format!(
            "{} read by {} dashboards; {gaps} gaps, {jumps} bytes lost or doubled in silence",
            bytes_in_words(bytes),
            watchers.len(),
        );
        let held = gaps == 0 && jumps == 0 && self.rows.iter().all(|row| row.held);
        self.checks.insert(0, Check { held, what: "zero loss".to_owned(), found });
    }

    /// Prints the table. Returns whether all of it held.
    pub(crate) fn print(&self, show: &Show) -> bool {
        let names: Vec<String> = self.dashboards.iter().map(|name| format!("{name:<14}")).collect();
        let names = names.concat();
        show.line("");
        show.line(&format!("    {:<18}{:>8}   {names}{}", "command", "wrote", "ended as"));
        for row in &self.rows {
            let saw: String = row
                .saw
                .iter()
                .map(|saw| match saw {
                    Ok(()) => show.paint(Colour::Green, &format!("{:<14}", "every byte")),
                    Err(why) => show.paint(Colour::Red, &format!("{why:<14}")),
                })
                .collect();
            let wrote = bytes_in_words(row.wrote);
            let mark = mark(show, row.held);
            show.line(&format!("  {mark} {:<18}{wrote:>8}   {saw}{}", row.what, row.status));
        }
        show.line("");
        for check in &self.checks {
            show.line(&format!("  {} {:<18}{}", mark(show, check.held), check.what, check.found));
        }
        let held = self.rows.iter().all(|row| row.held) && self.checks.iter().all(|c| c.held);
        let (colour, word) = if held {
            (Colour::Green, "All of it held")
        } else {
            (Colour::Red, "NOT all of it held")
        };
        show.line("");
        show.line(&format!("{}, in {:.1} s.", show.paint(colour, word), show.seconds()));
        held
    }
}

fn mark(show: &Show, held: bool) -> String {
    if held { show.paint(Colour::Green, "✓") } else { show.paint(Colour::Red, "✗") }
}

/// Waits until a dashboard's roster has a command as over.
async fn listed_as_over(watcher: &Watcher, command: CommandId) -> std::sync::Arc<CommandState> {
    let mut roster = watcher.dashboard.roster();
    loop {
        let listed = roster.borrow_and_update().command(command).cloned();
        if let Some(state) = listed.filter(|state| state.status.is_final()) {
            return state;
        }
        if roster.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Every byte, by a count and a digest made here, against what the program
/// wrote by itself and what its agent said of it; and how it ended.
fn compare(expected: &Expected, watcher: &Watcher, listed: &CommandState) -> Result<(), String> {
    let Expected { command, truth, status, exit_code, .. } = expected;
    let seen = watcher.seen();
    let output = seen.output(*command).ok_or("nothing")?;
    let (state, audit) = output.end.as_ref().ok_or("no end")?;
    if let Some(gap) = output.gaps.first() {
        return Err(format!("gap {}..{} {}", gap.from, gap.to, gap.reason));
    }
    if output.bytes != truth.bytes {
        return Err(format!("{} B", output.bytes));
    }
    if output.truth() != *truth {
        return Err("other bytes".to_owned());
    }
    for state in [state, listed] {
        let end = state.end.as_ref().ok_or("no end")?;
        if end.end != truth.bytes || end.digest.as_ref() != Some(&truth.digest) {
            return Err("agent differs".to_owned());
        }
        if state.status != *status || end.exit_code != Some(*exit_code) {
            return Err("wrong status".to_owned());
        }
    }
    if *audit != Audit::Verified {
        return Err("not verified".to_owned());
    }
    Ok(())
}

/// From the agent's write to the dashboard's read.
#[derive(Debug)]
pub(crate) struct Latency {
    expected: usize,
    /// Sorted.
    times: Vec<Duration>,
}

impl Latency {
    /// Of each write of a probe, for each dashboard, by when its last byte
    /// was there.
    pub(crate) fn of(writes: &[(u64, Instant)], command: CommandId, watchers: &[&Watcher]) -> Self {
        let mut times = Vec::new();
        for watcher in watchers {
            let seen = watcher.seen();
            let Some(output) = seen.output(command) else { continue };
            for (end, wrote) in writes {
                let first = output.arrivals.partition_point(|(up_to, _)| up_to < end);
                if let Some((_, read)) = output.arrivals.get(first) {
                    times.push(read.saturating_duration_since(*wrote));
                }
            }
        }
        times.sort_unstable();
        Self { expected: writes.len() * watchers.len(), times }
    }

    pub(crate) fn check(&self, when: &str) -> Check {
        let held = !self.times.is_empty() && self.times.len() == self.expected;
        let at = |percent: usize| {
            let place = (self.times.len() * percent).div_ceil(100).max(1) - 1;
            self.times.get(place).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        let found = format!(
            "p50 {:.1} ms, p99 {:.1} ms, from agent write to dashboard read, {when} ({} of {})",
            at(50),
            at(99),
            self.times.len(),
            self.expected,
        );
        Check { held, what: "latency".to_owned(), found }
    }
}
