//! Lives that once broke a promise, and some that never did.
//!
//! `tests/lives/*.plan` are the shortest forms of what random lives have
//! found; each line is an act. See `src/bin/lives.rs` for how to look for more.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::fs;
use std::path::Path;

use trunkline_protocol::message::{Lag, Priority};
use trunkline_tests::life::live;
use trunkline_tests::plan::{Act, Ask, Plan};
use trunkline_tests::{Memory, Peer};

#[test]
fn what_was_once_found_stays_mended() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("lives");
    let mut lived = 0;
    for file in fs::read_dir(folder).unwrap() {
        let file = file.unwrap().path();
        let plan = Plan::from_text(&fs::read_to_string(&file).unwrap());
        println!("{}", file.display()); // named if it breaks
        live(&plan.unwrap(), false);
        lived += 1;
    }
    assert!(lived >= 7, "only {lived} plans were found");
}

#[test]
fn fresh_lives_break_no_promise() {
    // `.ci/run lives` lives many more.
    for seed in 1_000_000..1_000_300 {
        let plan = Plan::draw(seed);
        println!("seed {seed}"); // named if it breaks
        live(&plan, false);
    }
}

/// `TRUNKLINE_SQLITE_LIVES=N` for more of them.
#[cfg(feature = "sqlite")]
#[test]
fn fresh_lives_over_a_queue_in_a_file_break_no_promise() {
    use trunkline_tests::disk::Queue;
    let lives = std::env::var("TRUNKLINE_SQLITE_LIVES").map_or(200, |n| n.parse().unwrap());
    let from = trunkline_tests::fresh_seed();
    for seed in from..from + lives {
        println!("seed {seed}"); // named if it breaks
        trunkline_tests::life::live_with(Queue::file(), &Plan::draw(seed));
    }
}

#[test]
fn a_plan_is_one_life() {
    for seed in 0..20 {
        let plan = Plan::draw(seed);
        let written = Plan::from_text(&plan.to_text()).unwrap();
        assert_eq!(written, plan);
        assert_eq!(live(&plan, false), live(&written, false), "seed {seed}");
    }
}

#[test]
fn a_broken_promise_is_shortened_to_what_breaks_it() {
    let plan = (0..1_000).map(Plan::draw).find(|plan| plan.acts.contains(&Act::KillHub)).unwrap();
    let short = plan.shorten(|plan| plan.acts.contains(&Act::KillHub));
    assert_eq!(short.acts, [Act::KillHub]);
}

/// A life with a bit of everything that is stored, in which somebody dies.
fn a_life_with_a_death(journal: bool, retry: bool, death: &Act, back: &Act) -> Plan {
    let ask = |script: &str, priority| {
        Act::Request(Box::new(Ask {
            dashboard: 0,
            name: 0,
            script: script.into(),
            priority,
            deliver_within_ms: None,
            run_for_ms: None,
            retry,
            watched: true,
        }))
    };
    let acts = vec![
        Act::KeepOutput,
        Act::Agent { name: 0, slots: 1, journal, wordy: false },
        Act::Dashboard,
        Act::Dashboard,
        Act::Wait(1_500),
        death.clone(),
        ask("write:3000 sleep:20 write:500 exit:3", Priority::Normal),
        Act::Wait(6),
        ask("write:100 exit:0", Priority::Low),
        ask("write:100 forever", Priority::High),
        Act::Watch { dashboard: 1, command: 0, live: false, lag: Lag::EveryByte, window: 1 << 20 },
        Act::Type { command: 0, lines: 2 },
        Act::Wait(200),
        Act::Interrupt { dashboard: 1, command: 2, grace_ms: None },
        Act::Wait(200),
        back.clone(),
        Act::Wait(2_000),
    ];
    Plan { seed: 4711, acts }
}

/// Dies at every point at which something leaves a process, until there is none
/// left; how many there were.
fn dies_everywhere(death: impl Fn(u64) -> Act, back: &Act) -> u64 {
    let mut points = 0;
    for (journal, retry) in [(false, false), (false, true), (true, false), (true, true)] {
        for after in 0..2_000 {
            let plan = a_life_with_a_death(journal, retry, &death(after), back);
            println!("{}", plan.to_text()); // shown if it breaks
            if live(&plan, false).deaths == 0 {
                break;
            }
            points += 1;
        }
    }
    points
}

#[test]
fn a_hub_may_die_wherever_something_leaves_it() {
    for is_on_disk in [false, true] {
        let points =
            dies_everywhere(|n| Act::KillHubAfter(n, is_on_disk), &Act::StartHub(Memory::Kept));
        println!("the hub died at {points} points");
        assert!((200..4_000).contains(&points), "{points} points");
    }
}

/// Goes over to another link at every frame of a life that arrives at either end
/// of the old one, until there is none left; how many there were.
#[test]
fn a_client_may_go_over_to_another_link_at_every_frame() {
    let mut points = 0;
    for peer in [Peer::Agent(0), Peer::Dashboard(0), Peer::Dashboard(1)] {
        for again in [false, true] {
            for after in 0..2_000 {
                // To the other, and perhaps back while all is still under way.
                let over = Act::GoOver(peer, after);
                let back = if again { Act::GoOver(peer, 3) } else { Act::Wait(0) };
                let plan = a_life_with_a_death(true, false, &over, &back);
                println!("{}", plan.to_text()); // shown if it breaks
                if live(&plan, false).went_over == 0 {
                    break;
                }
                points += 1;
            }
        }
    }
    println!("went over at {points} points");
    assert!((150..6_000).contains(&points), "{points} points");
}

#[test]
fn an_agent_may_die_wherever_something_leaves_it() {
    let points = dies_everywhere(|n| Act::CrashAfter(0, n), &Act::Restart(0));
    println!("the agent died at {points} points");
    assert!((60..4_000).contains(&points), "{points} points");
}
