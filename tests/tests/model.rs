//! One command under every order of events: see `trunkline_tests::model`.
//!
//! Each test walks through all that can be reached with so many faults, for an
//! agent with and without a journal and a command with and without `retry`.

#![allow(clippy::expect_used, clippy::panic, reason = "tests")]
#![expect(clippy::disallowed_methods, reason = "says how long it took")]

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker as _, Model as _};
use trunkline_tests::model::{CommandModel, Faults, Machine, Scope, State};

const NONE: Faults =
    Faults { cuts: 0, agent_deaths: 0, hub_deaths: 0, refusals: 0, interrupts: 0, ages: 0 };

/// Each of the faults, once.
fn each() -> [(&'static str, Faults); 6] {
    [
        ("cut", Faults { cuts: 1, ..NONE }),
        ("agent dies", Faults { agent_deaths: 1, ..NONE }),
        ("hub dies", Faults { hub_deaths: 1, ..NONE }),
        ("not stored", Faults { refusals: 1, ..NONE }),
        ("interrupt", Faults { interrupts: 1, ..NONE }),
        ("late", Faults { ages: 1, ..NONE }),
    ]
}

/// As many of the faults as that, in each combination, the same one again
/// included.
fn combined(number: usize) -> Vec<(String, Faults)> {
    let mut all = vec![(String::new(), NONE, 0)];
    for _ in 0..number {
        let longer = all.iter().flat_map(|(name, faults, from)| {
            let more = each().into_iter().enumerate().skip(*from);
            more.map(move |(n, (what, more))| (format!("{name} {what},"), plus(*faults, more), n))
        });
        all = longer.collect();
    }
    all.into_iter()
        .map(|(name, faults, _)| (name.trim_matches([' ', ',']).into(), faults))
        .collect()
}

fn plus(one: Faults, other: Faults) -> Faults {
    Faults {
        cuts: one.cuts + other.cuts,
        agent_deaths: one.agent_deaths + other.agent_deaths,
        hub_deaths: one.hub_deaths + other.hub_deaths,
        refusals: one.refusals + other.refusals,
        interrupts: one.interrupts + other.interrupts,
        ages: one.ages + other.ages,
    }
}

/// What must have happened somewhere, or little was tried.
fn expected(scope: Scope) -> BTreeSet<&'static str> {
    let Faults { cuts, agent_deaths, hub_deaths, interrupts, ages, .. } = scope.faults;
    let mut expected = BTreeSet::from(["it completes"]);
    let mut expect = |when: bool, what| when.then(|| expected.insert(what));
    expect(cuts > 0, "it completes over a cut");
    expect(hub_deaths > 0, "it completes over the hub's death");
    expect(interrupts > 0, "it is interrupted before it begins");
    expect(ages > 0, "it expires");
    expect(agent_deaths > 0 && scope.retry, "it is tried again");
    // With `retry` only if there is no time for it, or nobody wants it.
    expect(agent_deaths > 0 && (!scope.retry || ages > 0 || interrupts > 0), "it becomes unknown");
    expected
}

/// Walks through everything in the scope; how many states that were.
fn check(name: &str, scope: Scope) -> usize {
    let begun = Instant::now();
    let checker = CommandModel(scope).checker().threads(2).spawn_bfs().join();
    assert!(checker.is_done(), "{name}: not done");
    let states = checker.unique_state_count();
    println!(
        "{name}{}{}: {states} states, {} steps between them, at most {} in a row, {:.1} s",
        if scope.journal { ", journal" } else { "" },
        if scope.retry { ", retry" } else { "" },
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64(),
    );
    let found = checker.discoveries();
    for promise in ["no promise is broken", "it can always end well"] {
        if let Some(path) = found.get(promise) {
            panic!("{name}: not true that {promise}\n{}", told(scope, path.last_state()));
        }
    }
    let found: BTreeSet<&str> = found.into_keys().collect();
    assert_eq!(found, expected(scope), "{name}: what sometimes happens");
    states
}

/// The steps to a state, and what is wrong there.
fn told(scope: Scope, state: &State) -> String {
    let steps = state.steps.iter().enumerate().map(|(n, step)| format!("{n:>3}  {step:?}\n"));
    let mut machine = Machine::after(scope, &state.steps);
    format!("{}{:?}, {:?}", steps.collect::<String>(), state.broken, machine.settle())
}

fn check_all(faults: &[(String, Faults)]) {
    let mut states = 0;
    for (name, faults) in faults {
        for (retry, journal) in [(false, false), (false, true), (true, false), (true, true)] {
            states += check(name, Scope { retry, journal, faults: *faults });
        }
    }
    println!("{} scopes, {states} states: nothing is broken in any", faults.len() * 4);
}

#[test]
fn no_fault_breaks_a_promise() {
    check_all(&combined(0));
    check_all(&combined(1));
}

#[test]
#[ignore = "takes minutes without --release"]
fn no_two_faults_break_a_promise() {
    check_all(&combined(2));
}

#[test]
#[ignore = "takes an hour"]
fn no_three_faults_break_a_promise() {
    check_all(&combined(3));
}
