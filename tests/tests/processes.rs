//! The example hub and agent as processes, dashboards in this one, a cable that
//! breaks in every way for each of them, and kills and pauses of both, in
//! rounds that are drawn from seeds. When all is healed, every command that was
//! accepted has one end, which is true; every byte that was shown is the right
//! one, and what is missing is named; and everybody sees the same.
//!
//! ```sh
//! TRUNKLINE_FAULT_ROUNDS=200 cargo test -p trunkline-tests --test processes -- --nocapture
//! TRUNKLINE_FAULT_SEED=4711 cargo test -p trunkline-tests --test processes -- --nocapture
//! ```
//!
//! The second plays the round of a seed again: its schedule is the same, the
//! moments at which processes get their turn are not. With the feature `sqlite`
//! the hub keeps commands and output in files, and without in memory, so that
//! they may be lost with it.
//!
//! | module | what is in it |
//! |---|---|
//! | `plan` | what happens in a round, and when |
//! | `program` | what commands run, and what they must show |
//! | `stage` | processes, cables, and what is done to them |
//! | `people` | who asks, types, interrupts, waits |
//! | `reader` | who reads, and compares every byte |
//! | `judge` | what must be true in the end |

#![allow(clippy::unwrap_used, clippy::panic, reason = "stories")]

#[path = "processes/judge.rs"]
mod judge;
#[path = "processes/people.rs"]
mod people;
#[path = "processes/plan.rs"]
mod plan;
#[path = "processes/program.rs"]
mod program;
#[path = "processes/reader.rs"]
mod reader;
#[path = "processes/stage.rs"]
mod stage;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep_until, timeout};
use trunkline_client::{Dashboard, TerminalOptions};
use trunkline_protocol::ids::AgentId;
use trunkline_protocol::message::{Presence, Target};
use trunkline_protocol::roster::Roster;
use trunkline_tests::fresh_seed;
use trunkline_tests::process::{now, within};

use crate::judge::{Tally, agree, judge};
use crate::people::{Asked, Person, watch_ends};
use crate::plan::{Act, Plan};
use crate::reader::{Reading, read};
use crate::stage::{AGENT, IS_KEPT, Stage, Trace};

/// Longest that anything may take to be in order once all is healed: a
/// dashboard may take 45 s to notice that its link is dead, and an agent that
/// could not connect for a while waits up to 36 s.
const SETTLE: Duration = Duration::from_secs(150);

/// Rounds of an ordinary test.
const ROUNDS: u64 = 3;

/// Rounds at a time. They wait more than they work.
const LANES: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_breaks_ends_are_true_and_bytes_are_right() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let (seed, rounds) = (number("TRUNKLINE_FAULT_SEED"), number("TRUNKLINE_FAULT_ROUNDS"));
    let first = seed.unwrap_or_else(fresh_seed);
    let is_short = seed.is_none() && rounds.is_none();
    let rounds = rounds.unwrap_or(if seed.is_some() { 1 } else { ROUNDS });
    let kind = if IS_KEPT { "files" } else { "memory" };
    println!("{rounds} rounds from seed {first}, hubs that keep all in {kind}");
    let plans = (first..).map(Plan::draw).filter(|plan| !is_short || !plan.is_long);
    let count = usize::try_from(rounds).unwrap();
    let (tally, broken) = play(plans.take(count).collect(), rounds).await;
    print_tally(rounds, &tally);
    assert!(broken.is_empty(), "broken rounds:\n\n{}", broken.join("\n\n"));
}

/// Plays rounds, some at a time, and goes on when one breaks a promise.
async fn play(mut plans: Vec<Plan>, rounds: u64) -> (Tally, Vec<String>) {
    plans.reverse();
    let (mut tally, mut broken, mut over) = (Tally::default(), Vec::new(), 0);
    let mut lanes = JoinSet::new();
    loop {
        while lanes.len() < LANES
            && let Some(plan) = plans.pop()
        {
            lanes.spawn(play_one(plan));
        }
        let Some(played) = lanes.join_next().await else { break };
        let (seed, took, outcome) = played.unwrap();
        over += 1;
        let head = format!("round {over} of {rounds}, seed {seed}, {:.1} s", took.as_secs_f64());
        match outcome {
            Ok(round) => {
                println!("{head}: {}", in_a_line(&round));
                tally.add(round);
            }
            Err(why) => {
                println!("{head}: BROKEN: {why}");
                broken.push(format!("seed {seed}: {why}"));
            }
        }
    }
    (tally, broken)
}

/// Plays a round in a task of its own; what it came to, or why it broke.
async fn play_one(plan: Plan) -> (u64, Duration, Result<Tally, String>) {
    let folder = tempfile::tempdir().unwrap();
    let (seed, began) = (plan.seed, now());
    let trace = Arc::new(Trace::begin());
    let path = folder.path().to_owned();
    let played = tokio::spawn(round(plan, path, Arc::clone(&trace))).await;
    let outcome = played.map_err(|error| {
        let kept = folder.keep();
        std::fs::write(kept.join("trace.log"), trace.text()).unwrap();
        format!("{}\nWhat is left of it is in {}", said(error), kept.display())
    });
    (seed, began.elapsed(), outcome)
}

fn said(error: JoinError) -> String {
    let Ok(panic) = error.try_into_panic() else { return "cancelled".to_owned() };
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(other) => {
            other.downcast::<&str>().map_or("no words".to_owned(), |text| text.to_string())
        }
    }
}

async fn round(plan: Plan, folder: PathBuf, trace: Arc<Trace>) -> Tally {
    let mut stage = Stage::set(&folder).await;
    let (heal, healed) = watch::channel(false);
    let (end, over) = watch::channel(false);
    let mut watching = JoinSet::new();
    for dashboard in &stage.dashboards {
        watching.spawn(watch_ends(dashboard.clone(), over.clone()));
    }
    let mut people = JoinSet::new();
    let began = now();
    for (at, act) in &plan.acts {
        sleep_until(began + *at).await;
        if let Act::Ask(ask) = act {
            let person = Person {
                ask: ask.clone(),
                dashboards: stage.dashboards.clone(),
                folder: folder.clone(),
                healed: healed.clone(),
                trace: Arc::clone(&trace),
            };
            people.spawn(person.live());
        } else {
            trace.note(format!("{act:?}"));
            stage.act(act).await;
        }
    }
    trace.note("it heals");
    stage.heal(&plan).await;
    heal.send_replace(true);

    let mut asked: Vec<Asked> = Vec::new();
    let settled = async {
        while let Some(person) = people.join_next().await {
            asked.push(unbroken(person));
        }
    };
    assert!(timeout(SETTLE, settled).await.is_ok(), "it does not come to rest");
    asked.sort_by_key(|asked| asked.ask.number);

    trace.note("a fresh dashboard comes");
    let fresh = stage.fresh_dashboard();
    within(fresh.connected()).await.unwrap();
    let mut all = stage.dashboards.clone();
    all.push(fresh.clone());
    let agreed = timeout(SETTLE, agreement(&all)).await;
    let roster = agreed.unwrap_or_else(|_| {
        let seen = all.iter().map(|dashboard| dashboard.roster().borrow().clone());
        panic!("not everybody sees the same: {:#?}", seen.collect::<Vec<_>>())
    });
    let readings = asked.iter().map(|asked| read_afresh(&fresh, asked, &roster));
    let readings = timeout(SETTLE, join_all(readings)).await.expect("what is kept is read");
    end.send_replace(true);
    while let Some(watched) = watching.join_next().await {
        unbroken(watched);
    }
    let tally = judge(&stage, &asked, &roster, &readings);
    fresh.close().await;
    stage.strike().await;
    tally
}

/// What a task came to; its panic goes on here.
fn unbroken<T>(joined: Result<T, JoinError>) -> T {
    joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Waits until everybody sees the same: nothing waits or runs, and the agent is
/// there.
async fn agreement(dashboards: &[Dashboard]) -> Arc<Roster> {
    let agent: AgentId = AGENT.parse().unwrap();
    let mut rosters: Vec<_> = dashboards.iter().map(Dashboard::roster).collect();
    loop {
        let seen: Vec<_> =
            rosters.iter_mut().map(|roster| Arc::clone(&roster.borrow_and_update())).collect();
        let is_there = seen[0]
            .agent(&agent)
            .is_some_and(|agent| agent.presence == Presence::Online && agent.running == 0);
        if is_there && agree(&seen) {
            return Arc::clone(&seen[0]);
        }
        let news = rosters.iter_mut().map(|roster| Box::pin(roster.changed()));
        select_all(news).await.0.unwrap();
    }
}

/// Reads a command as somebody who was not there.
async fn read_afresh(fresh: &Dashboard, asked: &Asked, roster: &Roster) -> Option<Reading> {
    let heard = asked.answer.as_ref().ok()?;
    // Of one that is not listed a reader would wait for ever.
    roster.command(heard.id)?;
    let options = TerminalOptions { scrollback_bytes: 0, ..TerminalOptions::default() };
    let terminal = fresh.terminal_with(Target::Command(heard.id), options);
    Some(read(terminal, &asked.expected, &watch::Sender::new(0)).await)
}

// ---- what is shown --------------------------------------------------------------

fn in_a_line(tally: &Tally) -> String {
    format!(
        "{} commands, {} faults, {} connections, {:.1} MB compared, gaps: {}",
        tally.commands.values().sum::<u64>(),
        tally.done.values().sum::<u64>(),
        tally.connections,
        megabytes(tally.bytes),
        tally.gaps.values().sum::<u64>(),
    )
}

fn print_tally(rounds: u64, tally: &Tally) {
    println!("in {rounds} rounds:");
    for (title, counts) in [
        ("faults", tally.done.iter().map(|(name, count)| (*name, *count)).collect()),
        ("commands", named(&tally.commands)),
        ("gaps", named(&tally.gaps)),
    ] {
        let counts: Vec<(&str, u64)> = counts;
        let all: u64 = counts.iter().map(|(_, count)| count).sum();
        let each: Vec<_> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        println!("  {all} {title}: {}", each.join(", "));
    }
    println!("  {} connections carried {:.1} MB", tally.connections, megabytes(tally.carried));
    println!(
        "  {:.1} MB of output compared, {} streams whole and their digest the known one",
        megabytes(tally.bytes),
        tally.whole
    );
}

fn named(counts: &BTreeMap<String, u64>) -> Vec<(&str, u64)> {
    counts.iter().map(|(name, count)| (name.as_str(), *count)).collect()
}

#[expect(clippy::cast_precision_loss, reason = "one digit behind the point is shown")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
