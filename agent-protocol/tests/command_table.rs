//! The states of a command, drawn as a table: a change of behaviour is a
//! change of `command_table.txt`.

use std::fmt::Write as _;

use trunkline_protocol::message::CommandStatus;

#[test]
fn the_table_is_as_drawn() {
    let drawn = include_str!("command_table.txt");
    assert_eq!(draw(), drawn, "\n{}", draw());
}

#[test]
fn a_final_state_never_changes_and_no_other_is_stuck() {
    for from in CommandStatus::ALL {
        let leaves = CommandStatus::ALL.iter().any(|to| from.may_become(*to));
        assert_eq!(leaves, !from.is_final(), "{from}");
        assert!(!from.may_become(*from), "{from} becomes itself");
    }
}

#[test]
fn every_state_can_be_reached_and_left_for_an_end() {
    let mut reached = vec![CommandStatus::Queued];
    for at in 0.. {
        let Some(from) = reached.get(at).copied() else { break };
        let next = CommandStatus::ALL.iter().filter(|to| from.may_become(**to));
        let new: Vec<_> = next.filter(|to| !reached.contains(to)).copied().collect();
        reached.extend(new);
        let ends = CommandStatus::ALL.iter().any(|to| to.is_final() && from.may_become(*to));
        assert!(from.is_final() || ends, "{from}");
    }
    assert_eq!(reached.len(), CommandStatus::ALL.len());
}

fn draw() -> String {
    let mut table = format!("{:<12}", "from \\ to");
    for to in CommandStatus::ALL {
        write!(table, " {to:<11}").expect("a string takes everything");
    }
    for from in CommandStatus::ALL {
        let row = CommandStatus::ALL.iter().map(|to| if from.may_become(*to) { "x" } else { "." });
        write!(table, "\n{from:<12}").expect("a string takes everything");
        for cell in row {
            write!(table, " {cell:<11}").expect("a string takes everything");
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}
