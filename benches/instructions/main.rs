//! How many instructions each thing takes that the hub does for every message:
//! counted by valgrind, so that the figures are the same on a busy machine and on
//! a quiet one, and a change that makes one dearer is seen.
//!
//! ```sh
//! cargo bench -p trunkline-benches --bench instructions               # the figures, beside the committed ones
//! cargo bench -p trunkline-benches --bench instructions -- --check    # fails if one is dearer by more than its tolerance
//! cargo bench -p trunkline-benches --bench instructions -- --accept   # they are the ones to compare with now
//! ```

mod cases;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use cases::{CASES, Case};

/// Says, as other scripts here do, that it could not be tried.
const SKIPPED: u8 = 75;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| args.iter().any(|arg| arg == word);
    if let Some(at) = args.iter().position(|arg| arg == "--case") {
        let name = args.get(at + 1).map_or("", String::as_str);
        return run(name);
    }
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: valgrind is not installed: `apt-get install valgrind`");
        return ExitCode::from(SKIPPED);
    }
    match compare(has("--check"), has("--accept")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does what a case does, in a process of its own that is being counted.
fn run(name: &str) -> ExitCode {
    let Some(case) = CASES.iter().find(|case| case.name == name) else {
        eprintln!("no case is called {name:?}");
        return ExitCode::FAILURE;
    };
    let mut thing = (case.make)();
    counted(&mut *thing);
    ExitCode::SUCCESS
}

/// Instructions are counted in here, and nowhere else.
#[inline(never)]
fn counted(thing: &mut dyn FnMut()) {
    thing();
}

fn count(case: &Case) -> Result<u64, Box<dyn Error>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .arg("--toggle-collect=*instructions::counted*")
        .arg(std::env::current_exe()?)
        .args(["--case", case.name])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {said}", case.name).into());
    }
    let collected = said.lines().find_map(|line| line.split_once("Collected : "));
    let total: u64 = collected.ok_or("valgrind says no figure")?.1.trim().parse()?;
    if total == 0 {
        return Err(format!("{}: nothing was counted", case.name).into());
    }
    Ok(total / case.times)
}

fn compare(check: bool, accept: bool) -> Result<bool, Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions/accepted.txt");
    let accepted = std::fs::read_to_string(&file).unwrap_or_default();
    let accepted: BTreeMap<&str, u64> = accepted
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, count)| Some((name, count.trim().parse().ok()?)))
        .collect();
    let mut lines = vec!["# Instructions for each time, by `--accept`.".to_owned()];
    let mut dearer = Vec::new();
    println!("{:<20} {:>12} {:>12}", "each time", "instructions", "accepted");
    for case in CASES {
        let now = count(case)?;
        let before = accepted.get(case.name).copied();
        let shown = before.map_or_else(|| "-".to_owned(), |before| before.to_string());
        println!("{:<20} {now:>12} {shown:>12}", case.name);
        lines.push(format!("{} {now}", case.name));
        match before {
            Some(before) if now * 100 > before * (100 + case.tolerance) => {
                dearer.push(format!("{}: {now} instructions, {before} were accepted", case.name));
            }
            Some(_) => {}
            None => dearer.push(format!("{}: nothing to compare with: --accept", case.name)),
        }
    }
    if accept {
        std::fs::write(&file, lines.join("\n") + "\n")?;
        return Ok(true);
    }
    for line in &dearer {
        println!("dearer: {line}");
    }
    Ok(!check || dearer.is_empty())
}
