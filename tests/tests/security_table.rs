//! The table of attacks in `docs/security.md` says what is so: its numbers are
//! whole, and every test that it names is there and is run.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

const ROWS_MIN: u32 = 84;

fn read(path: &str) -> Option<String> {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), ".."].iter().collect();
    std::fs::read_to_string(root.join(path)).ok()
}

/// The cells of every row that begins with a number.
fn rows(document: &str) -> Vec<(u32, Vec<String>)> {
    let table = document.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let cells = table.map(|row| row.split(" | ").map(str::to_owned).collect::<Vec<_>>());
    cells.filter_map(|cells| Some((cells[0].parse().ok()?, cells))).collect()
}

/// What stands between backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Whether a file has this function, as a test that is not passed over.
fn has_test(source: &str, name: &str) -> bool {
    let at = |before: &str| source.find(&format!("{before} {name}(")).map(|at| (at, before.len()));
    let Some((at, _)) = at("fn") else { return false };
    // The attributes right above it.
    let line = source[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let above = source[..line].lines().rev();
    let attributes: Vec<&str> = above
        .map(str::trim)
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .collect();
    let is_test = |line: &&str| {
        ["#[test]", "#[tokio::test]", "#[tokio::test("].iter().any(|test| line.starts_with(test))
    };
    attributes.iter().any(is_test) && !attributes.iter().any(|line| line.starts_with("#[ignore"))
}

#[test]
fn every_row_names_tests_that_there_are() {
    let document = read("docs/security.md").unwrap();
    let rows = rows(&document);
    let numbers: Vec<u32> = rows.iter().map(|(number, _)| *number).collect();
    let expected: Vec<u32> = (1..=u32::try_from(rows.len()).unwrap()).collect();
    assert_eq!(numbers, expected, "each number once, in their order");
    assert!(numbers.len() >= ROWS_MIN as usize, "{} rows", numbers.len());

    let mut sources: HashMap<String, String> = HashMap::new();
    let mut wrong: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for (number, cells) in &rows {
        let mut say = |what: String| wrong.entry(*number).or_default().push(what);
        let [_, attack, outcome, shown] = &cells[..] else {
            say(format!("{} cells", cells.len()));
            continue;
        };
        if attack.trim().is_empty() || outcome.trim().is_empty() {
            say("an empty cell".into());
        }
        let mut file = None;
        let mut tests = 0;
        for word in quoted(shown) {
            if word.contains('/') {
                if !sources.contains_key(word) {
                    match read(word) {
                        Some(source) => drop(sources.insert(word.to_owned(), source)),
                        None => say(format!("there is no {word}")),
                    }
                }
                file = sources.get(word);
            } else if file.is_some_and(|source| has_test(source, word)) {
                tests += 1;
            } else {
                say(format!("there is no test {word} there"));
            }
        }
        if tests == 0 {
            say("no test".into());
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The check itself would see it.
#[test]
fn what_is_no_test_is_not_taken_for_one() {
    let source = "#[test]\nfn one() {}\nfn two() {}\n#[ignore = \"x\"]\n#[test]\nfn three() {}\n\
        \x20   /// Four.\n    #[tokio::test(start_paused = true)]\n    async fn four() {}\n\
        // #[test]\nfn five() {}\n#[test]\nfn seven_and_more() {}\n";
    for (name, expected) in [
        ("one", true),
        ("two", false),
        ("three", false),
        ("four", true),
        ("five", false),
        ("six", false),
        ("seven", false),
    ] {
        assert_eq!(has_test(source, name), expected, "{name}");
    }
    let table =
        "| | a |\n|--:|---|\n| 1 | a | b | `x/y.rs` `z` |\ntext | 2 | x |\n| 3 | c | d | e |";
    let numbers: Vec<u32> = rows(table).into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, [1, 3]);
    assert_eq!(quoted("`x/y.rs` `z`, w; `v`").collect::<Vec<_>>(), ["x/y.rs", "z", "v"]);
}
