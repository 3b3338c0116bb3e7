//! Stories of agents that keep a journal and crash, in the World.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::time::Duration;

use trunkline_client::core::agent::{Attempts, JournalRecord};
use trunkline_client::core::dashboard::Audit;
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{CommandRequest, CommandStatus, GapReason, Presence};
use trunkline_tests::agent::CrashPoint;
use trunkline_tests::{Memory, Peer, World};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// A hub, an agent `a` with a journal, a dashboard that reads all of it.
fn small_world(seed: u64) -> World {
    let mut world = World::new(seed);
    world.agent_with_journal("a", |_| {});
    world.dashboard();
    world.run_until(5 * S, |w| w.presence(0, "a") == Some(Presence::Online));
    world
}

fn ask(world: &mut World, script: &str) -> CommandId {
    let (command, _) = world.request(0, "a", script);
    world.watch(0, command);
    command
}

fn ask_with_retry(world: &mut World, script: &str) -> CommandId {
    let retry = |request: &mut CommandRequest| request.retry = true;
    let (command, _) = world.request_with(0, "a", script, retry);
    world.watch(0, command);
    command
}

fn crash_at(world: &mut World, point: CrashPoint) {
    world.agents[0].journal.as_mut().unwrap().crash_at = Some(point);
}

/// The process has died, and after a while there is another.
fn comes_back(world: &mut World) {
    world.run_until(60 * S, |w| w.agents[0].core.is_none());
    world.run_for(S);
    world.restart_agent(0);
}

fn ends(world: &mut World, command: CommandId, status: CommandStatus) {
    world.run_until(120 * S, |w| w.status(0, command).is_some_and(CommandStatus::is_final));
    world.run_for(S);
    assert_eq!(world.status(0, command), Some(status));
}

fn starts(world: &World, command: CommandId) -> u32 {
    world.agents[0].starts.get(&command).copied().unwrap_or(0)
}

/// Nothing of it is left to be listed.
fn is_settled(world: &World, command: CommandId) -> bool {
    let attempts: Attempts = world.agents[0].journal.as_ref().unwrap().records.iter().collect();
    let of_it = |record: &JournalRecord| record.attempt().0 == command;
    let records = attempts.records();
    let mut records = records.iter().filter(|record| of_it(record));
    records.all(|record| matches!(record, JournalRecord::Settled(_)))
}

#[test]
fn a_command_lives() {
    let mut world = small_world(1);
    let command = ask(&mut world, "write:1000 exit:3");
    ends(&mut world, command, CommandStatus::Completed);
    let seen = world.dashboards[0].of(command).unwrap();
    assert_eq!((seen.bytes, &seen.ended.as_ref().unwrap().1), (1000, &Audit::Verified));
    assert_eq!(world.agents[0].journal.as_ref().unwrap().records.len(), 3);
    assert!(is_settled(&world, command));
}

#[test]
fn what_was_not_written_down_was_not_begun_and_is_given_again() {
    let mut world = small_world(2);
    crash_at(&mut world, CrashPoint::BeforeBegun);
    let command = ask(&mut world, "write:10 exit:3");
    comes_back(&mut world);
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(starts(&world, command), 1);
    assert_eq!(world.command(0, command).unwrap().attempt, 1);
}

#[test]
fn what_was_written_down_is_not_begun_again() {
    let mut world = small_world(3);
    crash_at(&mut world, CrashPoint::AfterBegun);
    let command = ask(&mut world, "write:10 exit:3");
    comes_back(&mut world);
    ends(&mut world, command, CommandStatus::Unknown);
    assert_eq!(starts(&world, command), 0);
    let end = world.command(0, command).unwrap().end.clone().unwrap();
    assert!(end.error.unwrap().contains("died"), "people hear why");
    assert!(is_settled(&world, command));
}

#[test]
fn a_command_whose_agent_died_while_it_ran_is_unknown_with_all_that_it_showed() {
    let mut world = small_world(4);
    let command = ask(&mut world, "write:100 sleep:60000 exit:0");
    world.run_for(2 * S);
    world.crash_agent(0);
    comes_back(&mut world);
    ends(&mut world, command, CommandStatus::Unknown);
    assert_eq!(starts(&world, command), 1);
    let seen = world.dashboards[0].of(command).unwrap();
    assert_eq!((seen.bytes, seen.gaps.len()), (100, 0));
    assert!(seen.ended.is_some(), "nobody waits for more");
}

#[test]
fn an_end_that_was_not_written_down_is_unknown_unless_the_hub_heard_it() {
    for (seed, cut) in [(5, false), (6, true)] {
        let mut world = small_world(seed);
        crash_at(&mut world, CrashPoint::BeforeEnded);
        let command = ask(&mut world, "write:10 sleep:1000 exit:3");
        world.run_for(500 * MS);
        if cut {
            world.set_reachable(Peer::Agent(0), false);
            world.cut(Peer::Agent(0));
        }
        comes_back(&mut world);
        world.heal();
        // It died before it could say anything.
        ends(&mut world, command, CommandStatus::Unknown);
        assert_eq!(starts(&world, command), 1);
    }
}

#[test]
fn an_end_that_was_written_down_is_told_by_the_next_process() {
    let mut world = small_world(7);
    crash_at(&mut world, CrashPoint::AfterEnded);
    let command = ask(&mut world, "write:100 sleep:1000 write:400 exit:3");
    world.run_for(500 * MS);
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    comes_back(&mut world);
    world.heal();
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(starts(&world, command), 1);
    let end = world.command(0, command).unwrap().end.clone().unwrap();
    assert_eq!((end.exit_code, end.end), (Some(3), 500));
    // What the first process had not sent went with it, and people see that.
    let seen = world.dashboards[0].of(command).unwrap();
    assert_eq!((seen.bytes, seen.ended.as_ref().unwrap().1), (100, Audit::NotChecked));
    let gaps: Vec<_> = seen.gaps.iter().map(|gap| (gap.from, gap.to, &gap.reason)).collect();
    assert_eq!(gaps, [(100, 500, &GapReason::AgentLoss)]);
    assert!(is_settled(&world, command));
}

#[test]
fn an_end_that_the_hub_heard_leaves_nobody_waiting_for_output_that_died() {
    // With a journal and without: the end overtakes the output, and the
    // process dies with that.
    for (seed, with_journal) in [(8, true), (9, false)] {
        let mut world = World::new(seed);
        if with_journal {
            world.agent_with_journal("a", |_| {});
        } else {
            world.agent("a");
        }
        world.dashboard();
        world.run_for(2 * S);
        world.on_cable(Peer::Agent(0), |cable| cable.throttle(20_000));
        let command = ask(&mut world, "write:1000000 exit:0");
        world.run_until(60 * S, |w| w.status(0, command) == Some(CommandStatus::Completed));
        world.crash_agent(0);
        world.run_for(S);
        let seen = world.dashboards[0].of(command).unwrap();
        assert!(seen.bytes < 1_000_000 && seen.ended.is_none());
        world.restart_agent(0);
        world.run_for(5 * S);
        let seen = world.dashboards[0].of(command).unwrap();
        let missing = (seen.bytes, 1_000_000, GapReason::AgentLoss);
        let gaps: Vec<_> = seen.gaps.iter().map(|g| (g.from, g.to, g.reason.clone())).collect();
        assert_eq!(gaps, [missing]);
        assert!(seen.ended.is_some());
    }
}

#[test]
fn with_retry_what_is_unknown_is_run_again_as_a_numbered_attempt() {
    for (seed, point, started) in [
        (10, CrashPoint::BeforeBegun, 1),
        (11, CrashPoint::AfterBegun, 1),
        (12, CrashPoint::BeforeEnded, 2),
        (13, CrashPoint::AfterEnded, 1),
    ] {
        let mut world = small_world(seed);
        crash_at(&mut world, point);
        let command = ask_with_retry(&mut world, "write:100 sleep:1000 exit:3");
        world.run_for(500 * MS);
        world.set_reachable(Peer::Agent(0), false);
        world.cut(Peer::Agent(0));
        comes_back(&mut world);
        world.heal();
        ends(&mut world, command, CommandStatus::Completed);
        assert_eq!(starts(&world, command), started, "{point:?}");
        let attempt = match point {
            CrashPoint::BeforeBegun | CrashPoint::AfterEnded => 1,
            CrashPoint::AfterBegun | CrashPoint::BeforeEnded => 2,
        };
        assert_eq!(world.command(0, command).unwrap().attempt, attempt, "{point:?}");
    }
}

#[test]
fn an_agent_that_dies_again_and_again_tells_the_same() {
    let mut world = small_world(14);
    let command = ask_with_retry(&mut world, "write:10 sleep:60000 exit:0");
    for _ in 0..4 {
        world.run_for(2 * S);
        world.crash_agent(0);
        world.restart_agent(0);
        // Before it has said anything, or in the middle of it.
        world.run_for(7 * MS);
        world.crash_agent(0);
        world.restart_agent(0);
    }
    world.run_for(2 * S);
    world.interrupt(0, command);
    ends(&mut world, command, CommandStatus::Interrupted);
    let attempt = world.command(0, command).unwrap().attempt;
    assert!(starts(&world, command) <= attempt, "an attempt starts once");
}

#[test]
fn a_later_attempt_that_was_lost_on_its_way_is_given_again() {
    let mut world = small_world(15);
    let command = ask_with_retry(&mut world, "write:10 sleep:5000 exit:0");
    world.run_for(2 * S);
    world.crash_agent(0);
    world.restart_agent(0);
    // It lists the first attempt as unknown, and the second is lost.
    world.run_until(5 * S, |w| {
        let command = w.command(0, command);
        command.is_some_and(|c| c.attempt == 2 && c.status == CommandStatus::Dispatched)
    });
    world.cut(Peer::Agent(0));
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(starts(&world, command), 2);
}

#[test]
fn a_hub_that_forgot_cannot_make_it_run_twice() {
    let mut world = small_world(16);
    let command = ask(&mut world, "write:10 exit:3");
    ends(&mut world, command, CommandStatus::Completed);
    assert!(is_settled(&world, command));
    world.kill_hub();
    world.crash_agent(0);
    world.start_hub(Memory::Lost);
    world.restart_agent(0);
    world.run_for(10 * S);
    let same = |request: &mut CommandRequest| request.command = command;
    world.request_with(0, "a", "write:10 exit:3", same);
    ends(&mut world, command, CommandStatus::Unknown);
    assert_eq!(starts(&world, command), 1);
}

#[test]
fn a_hub_that_forgot_hears_the_end_that_was_written_down() {
    let mut world = small_world(17);
    crash_at(&mut world, CrashPoint::AfterEnded);
    let command = ask(&mut world, "write:10 sleep:1000 exit:3");
    world.run_for(500 * MS);
    world.kill_hub();
    world.run_until(10 * S, |w| w.agents[0].core.is_none());
    world.start_hub(Memory::Lost);
    let same = |request: &mut CommandRequest| request.command = command;
    world.request_with(0, "a", "write:10 sleep:1000 exit:3", same);
    world.run_for(10 * S);
    world.restart_agent(0);
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(starts(&world, command), 1);
}

#[test]
fn without_its_journal_a_command_does_not_start() {
    let mut world = small_world(18);
    world.agents[0].journal.as_mut().unwrap().fails = true;
    let command = ask(&mut world, "write:10 exit:0");
    ends(&mut world, command, CommandStatus::Failed);
    let error = world.command(0, command).unwrap().end.clone().unwrap().error.unwrap();
    assert!(error.contains("journal could not be written: out of order"), "{error}");
    world.agents[0].journal.as_mut().unwrap().fails = false;
    let next = ask(&mut world, "write:10 exit:0");
    ends(&mut world, next, CommandStatus::Completed);
    assert_eq!((starts(&world, command), starts(&world, next)), (0, 1));
}

#[test]
fn a_journal_that_hangs_fails_a_command_in_time_and_never_starts_it_late() {
    let mut world = small_world(19);
    world.agents[0].journal.as_mut().unwrap().hangs = true;
    let command = ask(&mut world, "write:10 exit:0");
    world.run_for(9 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Dispatched));
    world.run_for(2 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Failed));
    world.agents[0].journal.as_mut().unwrap().hangs = false;
    world.run_for(10 * S);
    assert_eq!(starts(&world, command), 0);
    world.crash_agent(0);
    world.restart_agent(0);
    let next = ask(&mut world, "write:10 exit:0");
    ends(&mut world, next, CommandStatus::Completed);
    assert_eq!(world.status(0, command), Some(CommandStatus::Failed));
}

#[test]
fn an_interrupt_wins_over_a_command_that_is_being_written_down() {
    let mut world = small_world(20);
    world.agents[0].journal.as_mut().unwrap().delay = S;
    let command = ask(&mut world, "forever");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Dispatched));
    world.interrupt(0, command);
    ends(&mut world, command, CommandStatus::Interrupted);
    world.run_for(5 * S);
    assert_eq!(starts(&world, command), 0);
    world.crash_agent(0);
    world.restart_agent(0);
    world.run_for(5 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Interrupted));
}

/// Lives full of crashes, at every point, under a link that comes and goes.
#[test]
fn no_life_starts_an_attempt_twice() {
    for seed in 1_000..2_000 {
        let mut world = small_world(seed);
        let mut asked = Vec::new();
        for round in 0..6_u64 {
            let dice = seed
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(7 * u32::try_from(round).unwrap());
            let point = match dice % 5 {
                0 => Some(CrashPoint::BeforeBegun),
                1 => Some(CrashPoint::AfterBegun),
                2 => Some(CrashPoint::BeforeEnded),
                3 => Some(CrashPoint::AfterEnded),
                _ => None,
            };
            let script = "write:100 sleep:200 write:100 exit:3";
            let command = if dice & 32 == 0 {
                ask(&mut world, script)
            } else {
                ask_with_retry(&mut world, script)
            };
            asked.push(command);
            if let Some(point) = point {
                crash_at(&mut world, point);
            }
            world.run_for(MS * u32::try_from(dice % 400).unwrap());
            match dice >> 8 & 3 {
                0 => world.cut(Peer::Agent(0)),
                1 => world.half_open(Peer::Agent(0)),
                2 => world.crash_agent(0),
                _ => {}
            }
            world.run_for(MS * u32::try_from(dice >> 16 & 255).unwrap());
            if (dice >> 24).is_multiple_of(8) {
                world.kill_hub();
                world.start_hub(Memory::Kept);
            }
            if world.agents[0].core.is_none() {
                world.restart_agent(0);
            }
        }
        world.agents[0].journal.as_mut().unwrap().crash_at = None;
        if world.agents[0].core.is_none() {
            world.restart_agent(0);
        }
        let is_over = |w: &World, c| w.status(0, c).is_some_and(CommandStatus::is_final);
        world.run_until(300 * S, |w| asked.iter().all(|c| is_over(w, *c)));
        world.run_for(10 * S);
        for command in asked {
            let state = world.command(0, command).unwrap().clone();
            let name = format!("seed {seed}, {command}: {state:?}");
            assert!(starts(&world, command) <= state.attempt, "{name}");
            match state.status {
                CommandStatus::Completed => assert!(starts(&world, command) >= 1, "{name}"),
                CommandStatus::Unknown => {}
                _ => panic!("{name}"),
            }
            assert!(is_settled(&world, command), "{name}");
            let seen = world.dashboards[0].seen.values().filter(|seen| seen.command == command);
            let mut latest = seen.filter(|seen| seen.attempt == state.attempt);
            assert!(latest.all(|seen| seen.ended.is_some()), "{name}: a reader waits for ever");
        }
    }
}
