//! Lives that once broke a promise, and some that never did.
//!
//! `tests/lives/*.plan` are the shortest forms of what random lives have
//! found; each line is an act. See `src/bin/lives.rs` for how to look for more.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::fs;
use std::path::Path;

use trunkline_tests::life::live;
use trunkline_tests::plan::Plan;

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
    use trunkline_tests::plan::Act;
    let plan = (0..1_000).map(Plan::draw).find(|plan| plan.acts.contains(&Act::KillHub)).unwrap();
    let short = plan.shorten(|plan| plan.acts.contains(&Act::KillHub));
    assert_eq!(short.acts, [Act::KillHub]);
}
