//! Lives random lives in the World and looks for one in which a promise is
//! broken.
//!
//! ```text
//! cargo run --release -p trunkline-tests --bin lives -- --lives 100000
//! cargo run --release -p trunkline-tests --bin lives -- --seed 4711
//! cargo run --release -p trunkline-tests --bin lives -- --plan tests/lives/NAME.plan
//! ```
//!
//! The first goes on from a random seed (or `--from SEED`) on all cores, for so
//! many lives. A broken promise prints the seed, and the shortest plan found
//! that still breaks it; exit status 1. The other two live one life and print
//! what crosses its cables.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a program for tests")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use trunkline_tests::life::{Lived, MARKS, live};
use trunkline_tests::plan::Plan;

thread_local! {
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What was asked for.
#[derive(Debug, Default)]
struct Orders {
    lives: u64,
    from: Option<u64>,
    seed: Option<u64>,
    plan: Option<String>,
    threads: Option<usize>,
    /// Every mark must have been hit.
    marks: bool,
}

const USAGE: &str = "there are --lives N, --from SEED, --threads N, --marks; --seed N; --plan FILE";

fn orders() -> Result<Orders, String> {
    let mut orders = Orders { lives: 10_000, ..Orders::default() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--marks" {
            orders.marks = true;
            continue;
        }
        if matches!(word.as_str(), "--help" | "-h") {
            return Err(USAGE.into());
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{word} wants a number"));
        match word.as_str() {
            "--lives" => orders.lives = number()?,
            "--from" => orders.from = Some(number()?),
            "--seed" => orders.seed = Some(number()?),
            "--threads" => orders.threads = Some(usize::try_from(number()?).unwrap_or(1)),
            "--plan" => orders.plan = Some(value),
            _ => {
                return Err(format!("{word}: {USAGE}"));
            }
        }
    }
    Ok(orders)
}

fn main() -> ExitCode {
    let orders = match orders() {
        Ok(orders) => orders,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let text = info.payload_as_str().unwrap_or("a panic without words");
        SAID.with_borrow_mut(|said| *said = format!("{text}\n  at {place}"));
    }));
    let one = match (&orders.plan, orders.seed) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).map_err(|error| error.to_string());
            match text.and_then(|text| Plan::from_text(&text)) {
                Ok(plan) => Some(plan),
                Err(error) => {
                    eprintln!("{file}: {error}");
                    return ExitCode::from(2);
                }
            }
        }
        (None, Some(seed)) => Some(Plan::draw(seed)),
        (None, None) => None,
    };
    match one {
        Some(plan) => show(&plan),
        None => search(&orders),
    }
}

/// Lives one life; what broke, if anything did.
fn try_life(plan: &Plan, traced: bool) -> Result<Lived, String> {
    catch_unwind(AssertUnwindSafe(|| live(plan, traced)))
        .map_err(|_| SAID.with_borrow(Clone::clone))
}

fn show(plan: &Plan) -> ExitCode {
    match try_life(plan, true) {
        Ok(lived) => {
            println!("nothing broke; it had {:?}", lived.marks);
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("BROKEN: {broken}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a program that shows its progress")]
fn search(orders: &Orders) -> ExitCode {
    let first = orders.from.unwrap_or_else(|| trunkline_tests::fresh_seed() << 20);
    let threads = orders
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    println!("{} lives from seed {first}, on {threads} threads", orders.lives);
    let begun = std::time::Instant::now();
    let next = AtomicU64::new(0);
    let is_broken = AtomicBool::new(false);
    let found = Mutex::new(None);
    let marks = Mutex::new(BTreeMap::<&'static str, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut own = BTreeMap::new();
                while !is_broken.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= orders.lives {
                        break;
                    }
                    if n > 0 && n.is_multiple_of(50_000) {
                        println!("{n} lives, {:.0} s", begun.elapsed().as_secs_f64());
                    }
                    let plan = Plan::draw(first + n);
                    match try_life(&plan, false) {
                        Ok(lived) => {
                            for mark in lived.marks {
                                *own.entry(mark).or_insert(0) += 1;
                            }
                        }
                        Err(broken) => {
                            is_broken.store(true, Ordering::Relaxed);
                            found.lock().unwrap().get_or_insert((n, plan, broken));
                        }
                    }
                }
                let mut marks = marks.lock().unwrap();
                for (mark, times) in own {
                    *marks.entry(mark).or_insert(0) += times;
                }
            });
        }
    });
    let lived = next.into_inner().min(orders.lives);
    let seconds = begun.elapsed().as_secs_f64();
    if let Some((n, plan, broken)) = found.into_inner().unwrap() {
        tell(n, &plan, &broken);
        return ExitCode::FAILURE;
    }
    let marks = marks.into_inner().unwrap();
    for mark in MARKS {
        println!("{:>9}  {mark}", marks.get(mark).unwrap_or(&0));
    }
    let per_second = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    println!(
        "{lived} lives in {seconds:.1} s ({} a second): no promise was broken",
        lived * 1000 / per_second
    );
    let missing: Vec<_> = MARKS.iter().filter(|mark| !marks.contains_key(**mark)).collect();
    if orders.marks && !missing.is_empty() {
        println!("BUT these never happened, so little is proven: {missing:?}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Shortens what broke, and tells of it.
fn tell(n: u64, plan: &Plan, broken: &str) {
    println!("BROKEN in life {}, seed {}: {broken}", n + 1, plan.seed);
    println!("shortening …");
    let place = |text: &str| text.lines().last().unwrap_or_default().to_owned();
    let shortest = plan
        .shorten(|plan| try_life(plan, false).is_err_and(|other| place(&other) == place(broken)));
    let why = try_life(&shortest, false).err().unwrap_or_default();
    println!("{} acts, of which these are enough:\n", plan.acts.len());
    for line in why.lines() {
        println!("# {line}");
    }
    print!("{}", shortest.to_text());
    println!("\nSave that as tests/lives/NAME.plan and see it with --plan.");
}
