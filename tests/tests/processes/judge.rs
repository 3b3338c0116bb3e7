//! What people saw is compared with what happened.

use std::collections::BTreeMap;
use std::sync::Arc;

use trunkline_client::{Audit, Lost, RequestError};
use trunkline_protocol::message::{CommandState, CommandStatus, GapReason};
use trunkline_protocol::roster::Roster;

use crate::people::{Asked, Heard, is_true_of, marks};
use crate::plan::{DASHBOARDS, Pace, Who};
use crate::reader::{Reading, Seen};
use crate::stage::{IS_KEPT, Kills, Stage};

/// Below this a stream fits every log and every tail.
const FITS_BYTES: u64 = 3 * 1024 * 1024;

/// What rounds came to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How often what was done.
    pub(crate) done: BTreeMap<&'static str, u64>,
    /// Commands, by how they ended.
    pub(crate) commands: BTreeMap<String, u64>,
    /// Gaps that readers were told of.
    pub(crate) gaps: BTreeMap<String, u64>,
    /// Streams that were read to the end without a gap, their digest compared.
    pub(crate) whole: u64,
    /// Bytes that readers were shown, each compared.
    pub(crate) bytes: u64,
    /// Bytes and connections that went over the cables.
    pub(crate) carried: u64,
    pub(crate) connections: u64,
}

impl Tally {
    /// Adds another one.
    pub(crate) fn add(&mut self, other: Self) {
        fn merge<K: Ord>(into: &mut BTreeMap<K, u64>, from: BTreeMap<K, u64>) {
            for (key, count) in from {
                *into.entry(key).or_insert(0) += count;
            }
        }
        merge(&mut self.done, other.done);
        merge(&mut self.commands, other.commands);
        merge(&mut self.gaps, other.gaps);
        self.whole += other.whole;
        self.bytes += other.bytes;
        self.carried += other.carried;
        self.connections += other.connections;
    }
}

/// Judges a round that has come to rest. `fresh` is what a dashboard sees and
/// reads that was not there before, in the order of `asked`.
pub(crate) fn judge(
    stage: &Stage,
    asked: &[Asked],
    roster: &Roster,
    fresh: &[Option<Reading>],
) -> Tally {
    let mut tally = Tally { done: stage.done(), ..Tally::default() };
    (tally.carried, tally.connections) = stage.carried();
    for (asked, fresh) in asked.iter().zip(fresh) {
        let how = judge_command(&stage.kills, asked, roster);
        *tally.commands.entry(how).or_insert(0) += 1;
        let Ok(heard) = &asked.answer else { continue };
        let seen = heard.seen.iter().map(|seen| seen.as_ref().map(|seen| &seen.reading));
        let readings = seen.zip(asked.ask.readers).chain([(fresh.as_ref(), Pace::Prompt)]);
        for (number, (reading, pace)) in readings.enumerate() {
            let Some(reading) = reading else { continue };
            let name = format!("command {}, reader {number}", asked.ask.number);
            judge_reading(&stage.kills, asked, heard, reading, pace, &name, &mut tally);
        }
    }
    tally
}

/// Whether a hub may have forgotten commands. Also those that were asked for
/// later: a dashboard may not yet have known that its hub was gone.
fn forgot(kills: &Kills) -> bool {
    !IS_KEPT && kills.any(Who::Hub)
}

/// The command has one end, which is true. Says which.
fn judge_command(kills: &Kills, asked: &Asked, roster: &Roster) -> String {
    let name = format!("command {} ({:?})", asked.ask.number, asked.ask);
    let (begun, ended) = marks(&asked.marks);
    let heard = match &asked.answer {
        Ok(heard) => heard,
        Err(RequestError::Ambiguous) => {
            assert!(forgot(kills), "{name}: only a lost queue makes it ambiguous");
            assert!(begun <= 1 || asked.ask.retry, "{name}: begun {begun} times");
            return "ambiguous".to_owned();
        }
        Err(error) => panic!("{name}: {error}"),
    };
    let listed = roster.command(heard.id);
    assert!(listed.is_some() || forgot(kills), "{name}: accepted and gone");
    let mut states: Vec<&Arc<CommandState>> = listed.into_iter().collect();
    for seen in &heard.seen {
        let Some(seen) = seen else {
            assert!(forgot(kills), "{name}: not heard of");
            continue;
        };
        match &seen.end {
            Ok(state) => states.push(state),
            Err(Lost::ByHub { .. }) => assert!(forgot(kills), "{name}: lost"),
            Err(Lost::Closed { .. }) => panic!("{name}: nobody closed"),
        }
    }
    let Some(state) = states.first() else {
        assert!(begun <= 1 || asked.ask.retry, "{name}: begun {begun} times");
        return "lost with its hub".to_owned();
    };
    let name = format!("{name}: {state:?}, begun {begun} times and ended {ended} times");
    for other in &states {
        let key = |state: &CommandState| (state.status, state.attempt, state.end.clone());
        assert_eq!(key(state), key(other), "{name}: not everybody is told the same");
    }
    assert!(state.status.is_final(), "{name}");
    assert!(is_true_of(state.status, asked), "{name}: it cannot have ended so");
    assert!(begun <= if asked.ask.retry { state.attempt.max(1) } else { 1 }, "{name}");
    assert!(asked.ask.retry || state.attempt <= 1, "{name}: tried again unasked");
    let end = state.end.clone().unwrap_or_default();
    match state.status {
        CommandStatus::Completed => {
            assert!(begun >= 1 && ended >= 1, "{name}: it has not run to its end");
            assert_eq!((end.exit_code, end.signal), (Some(asked.exit_code), None), "{name}");
            assert!(asked.expected.length() == Some(end.end), "{name}: not all that it wrote");
            if let (Some(told), Some((_, known))) = (&end.digest, asked.expected.known()) {
                assert_eq!(*told, known, "{name}: not the digest of what it wrote");
            }
            assert_eq!(heard.typing, Ok(()), "{name}: it heard all that was typed");
        }
        CommandStatus::Failed | CommandStatus::Expired => assert_eq!(begun, 0, "{name}"),
        CommandStatus::Unknown => {
            assert!(kills.since(asked.at, Who::Agent), "{name}: its agent lives");
        }
        CommandStatus::Interrupted
        | CommandStatus::TimedOut
        | CommandStatus::Queued
        | CommandStatus::Dispatched
        | CommandStatus::Running => {}
    }
    state.status.to_string()
}

fn judge_reading(
    kills: &Kills,
    asked: &Asked,
    heard: &Heard,
    reading: &Reading,
    pace: Pace,
    name: &str,
    tally: &mut Tally,
) {
    assert!(!reading.is_lost || forgot(kills), "{name}: the hub forgot it");
    let states = heard.seen.iter().flatten().filter_map(|seen| seen.end.as_ref().ok());
    let state = states.max_by_key(|state| state.attempt);
    for seen in reading.streams.values() {
        let name = format!("{name}, attempt {}", seen.attempt);
        tally.bytes += seen.bytes;
        for gap in &seen.gaps {
            *tally.gaps.entry(gap.reason.to_string()).or_insert(0) += 1;
            let is_true = is_gap_true(kills, asked, &gap.reason, seen.at, pace);
            assert!(is_true, "{name}: {gap:?} is not true");
        }
        let missing: u64 = seen.gaps.iter().map(|gap| gap.to - gap.from).sum();
        assert_eq!(seen.bytes + missing, seen.at, "{name}: the sum is wrong");
        let is_last = state.is_some_and(|state| state.attempt == seen.attempt);
        let Some((last, audit)) = &seen.ended else {
            assert!(!is_last || reading.is_lost, "{name}: it has no end");
            continue;
        };
        judge_end(asked, seen, last, *audit, &name);
        tally.whole += u64::from(seen.gaps.is_empty());
    }
    // Who comes when it is over finds what is kept.
    let began = state.is_some_and(|state| {
        state.end.as_ref().is_some_and(|end| end.end > 0) && state.stream.is_some()
    });
    let is_there = reading.streams.values().any(|seen| seen.ended.is_some());
    let is_gone = kills.since(asked.at, Who::Hub) && kills.since(asked.at, Who::Agent);
    assert!(is_there || !began || reading.is_lost || is_gone, "{name}: no output is left");
    if began && !is_there {
        *tally.gaps.entry("all of it".to_owned()).or_insert(0) += 1;
    }
}

/// A stream that was read to its end.
fn judge_end(asked: &Asked, seen: &Seen, last: &CommandState, audit: Audit, name: &str) {
    let end = last.end.clone().unwrap_or_default();
    // An end that its agent did not tell is all that the hub has; an earlier
    // hub may have passed on more.
    let is_end = seen.at == end.end || (end.digest.is_none() && seen.at > end.end);
    assert!(is_end, "{name}: ended at {} and not at {}", seen.at, end.end);
    if !seen.gaps.is_empty() {
        assert_eq!(audit, Audit::NotChecked, "{name}: what has a hole cannot be known to be whole");
        return;
    }
    if last.status == CommandStatus::Completed {
        assert_eq!(Some(seen.at), asked.expected.length(), "{name}: not all that was written");
        if let Some((_, known)) = asked.expected.known() {
            assert_eq!(seen.digest(), known, "{name}: not what was written");
        }
    }
    if let Some(told) = &end.digest {
        assert_eq!((seen.digest(), audit), (told.clone(), Audit::Verified), "{name}");
    }
}

/// Whether bytes can be missing for this reason.
fn is_gap_true(kills: &Kills, asked: &Asked, reason: &GapReason, at: u64, pace: Pace) -> bool {
    let hub = kills.since(asked.at, Who::Hub);
    let agent = kills.since(asked.at, Who::Agent);
    match reason {
        GapReason::Evicted | GapReason::AgentOverflow => at > FITS_BYTES,
        GapReason::AgentLoss => agent,
        GapReason::HubLoss => !IS_KEPT && hub && (agent || at > FITS_BYTES),
        GapReason::Lagged => pace == Pace::Newest,
        GapReason::NotRequested | GapReason::Other(_) => false,
    }
}

/// Everybody sees the same.
pub(crate) fn agree(rosters: &[Arc<Roster>]) -> bool {
    debug_assert_eq!(rosters.len(), DASHBOARDS + 1, "the dashboards, and a fresh one");
    rosters.iter().all(|roster| roster == &rosters[0])
}
