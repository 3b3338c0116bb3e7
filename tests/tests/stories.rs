//! Stories in the World: what people see when things go right, and when they
//! do not. Virtual time, one seed, no sleeping.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::time::Duration;

use trunkline_client::ConnectionState;
use trunkline_client::core::dashboard::{Audit, Reading, RequestError};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    CommandRequest, CommandStatus, GapReason, InterruptStage, Presence, Priority, Target,
};
use trunkline_tests::{Memory, Peer, Storage, World};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// A hub, an agent `a`, two dashboards, all connected.
fn small_world(seed: u64) -> World {
    populated(World::new(seed))
}

fn populated(mut world: World) -> World {
    world.agent("a");
    world.dashboard();
    world.dashboard();
    world.run_until(5 * S, |w| (0..2).all(|d| w.presence(d, "a") == Some(Presence::Online)));
    world
}

fn ends(world: &mut World, command: CommandId, status: CommandStatus) {
    world.run_until(120 * S, |w| {
        (0..2).all(|d| w.status(d, command).is_some_and(CommandStatus::is_final))
    });
    for dashboard in 0..2 {
        assert_eq!(world.status(dashboard, command), Some(status));
    }
}

fn has_read(world: &World, dashboard: usize, command: CommandId) -> bool {
    world.dashboards[dashboard].of(command).is_some_and(|seen| seen.ended.is_some())
}

/// Both dashboards have read the whole output, every byte, and audited it.
fn read_whole(world: &mut World, command: CommandId, length: u64) {
    world.run_until(300 * S, |w| (0..2).all(|d| has_read(w, d, command)));
    for dashboard in &world.dashboards {
        let seen = dashboard.of(command).unwrap();
        assert_eq!((seen.bytes, seen.gaps.len()), (length, 0));
        assert_eq!(seen.ended.as_ref().unwrap().1, Audit::Verified);
    }
}

// ---- greeting and presence ----------------------------------------------

#[test]
fn an_agent_appears_within_a_second() {
    let mut world = World::new(1);
    world.dashboard();
    world.run_for(S);
    world.agent("a");
    world.run_until(S, |w| w.presence(0, "a") == Some(Presence::Online));
}

#[test]
fn an_agent_whose_socket_closes_is_unreachable_at_once_and_then_offline() {
    let mut world = small_world(2);
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    world.run_until(100 * MS, |w| w.presence(0, "a") == Some(Presence::Unreachable));
    world.run_for(4 * S);
    assert_eq!(world.presence(1, "a"), Some(Presence::Unreachable));
    world.run_until(2 * S, |w| w.presence(1, "a") == Some(Presence::Offline));
}

#[test]
fn an_agent_on_a_half_open_link_is_noticed_within_five_seconds() {
    let mut world = small_world(3);
    world.set_reachable(Peer::Agent(0), false);
    world.half_open(Peer::Agent(0));
    world.run_until(5 * S + 100 * MS, |w| w.presence(0, "a") == Some(Presence::Unreachable));
}

#[test]
fn an_agent_that_says_goodbye_is_offline_at_once() {
    let mut world = small_world(4);
    let now = world.now();
    world.agents[0].core.as_mut().unwrap().stop(now);
    world.run_until(100 * MS, |w| w.presence(0, "a") == Some(Presence::Offline));
    assert!(world.connection(0).is_over());
}

#[test]
fn presence_does_not_flicker_over_a_reconnect() {
    let mut world = small_world(5);
    world.cut_unnoticed_by_hub(Peer::Agent(0));
    // The agent is back before the hub has noticed that it was away.
    let mut seen = Vec::new();
    for _ in 0..200 {
        world.run_for(50 * MS);
        let presence = world.presence(0, "a").unwrap();
        if seen.last() != Some(&presence) {
            seen.push(presence);
        }
    }
    assert_eq!(seen, [Presence::Online]);
}

#[test]
fn a_second_process_under_one_id_supersedes_the_first() {
    let mut world = small_world(6);
    let second = world.agent("a");
    world.run_until(5 * S, |w| w.connection(0).is_over());
    let ConnectionState::Disconnected { why } = world.connection(0) else { unreachable!() };
    assert_eq!(why.code, CloseCode::Superseded);
    world.run_for(60 * S);
    assert_eq!(world.presence(0, "a"), Some(Presence::Online));
    let (command, _) = world.request(0, "a", "write:10 exit:0");
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(world.agents[second].starts[&command], 1);
}

#[test]
fn what_a_superseded_link_says_changes_nothing() {
    let mut world = small_world(7);
    let (command, _) = world.request(0, "a", "sleep:2000 write:100 exit:0");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Running));
    world.stall(Peer::Agent(0));
    world.run_for(S);
    world.agent("a");
    world.run_until(10 * S, |w| w.status(0, command) == Some(CommandStatus::Unknown));
    world.go_on(Peer::Agent(0));
    world.run_for(30 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Unknown));
    assert_eq!(world.presence(0, "a"), Some(Presence::Online));
}

// ---- commands -----------------------------------------------------------

#[test]
fn a_command_lives() {
    let mut world = small_world(10);
    let (command, request) = world.request(0, "a", "write:1000 sleep:100 write:500 exit:3");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    world.run_until(S, |w| w.status(1, command) == Some(CommandStatus::Running));
    assert_eq!(world.presence(1, "a"), Some(Presence::Busy));
    assert!(world.dashboards[0].answers[&request].is_ok(), "stored before it runs");
    ends(&mut world, command, CommandStatus::Completed);
    let state = world.command(1, command).unwrap();
    assert_eq!(state.end.as_ref().unwrap().exit_code, Some(3));
    read_whole(&mut world, command, 1500);
    assert_eq!(world.presence(0, "a"), Some(Presence::Online));
}

#[test]
fn commands_queue_by_priority_and_then_first_come_first_served() {
    let mut world = small_world(11);
    let (first, _) = world.request(0, "a", "sleep:1000 exit:0");
    world.run_for(100 * MS);
    let mut ask = |dashboard, priority| {
        let set = |r: &mut CommandRequest| r.priority = priority;
        let (command, _) = world.request_with(dashboard, "a", "sleep:10 exit:0", set);
        world.run_for(50 * MS);
        command
    };
    let low = ask(0, Priority::Low);
    let normal = ask(1, Priority::Normal);
    let second_normal = ask(0, Priority::Normal);
    let high = ask(1, Priority::High);
    let agent = "a".parse().unwrap();
    assert_eq!(world.roster(0).queue(&agent), [high, normal, second_normal, low]);
    assert_eq!(world.roster(1).queue(&agent), [high, normal, second_normal, low]);
    world.run_for(5 * S);
    let started = |id| world.command(0, id).unwrap().started_at_ms.unwrap();
    let order = [first, high, normal, second_normal, low].map(started);
    assert!(order.is_sorted_by(|a, b| a < b), "{order:?}: one at a time, in this order");
}

#[test]
fn a_full_queue_refuses() {
    let limits = Limits { queue_per_agent: 2, ..Limits::default() };
    let mut world = World::with_limits(12, limits);
    world.agent("a");
    world.dashboard();
    world.run_for(2 * S);
    let mut asked = Vec::new();
    for _ in 0..4 {
        asked.push(world.request(0, "a", "forever"));
        world.run_for(50 * MS);
    }
    let answers = &world.dashboards[0].answers;
    assert!(asked[..3].iter().all(|(_, request)| answers[request].is_ok()));
    let Err(RequestError::Refused(refusal)) = &answers[&asked[3].1] else { panic!("accepted") };
    assert_eq!((refusal.code.as_str(), refusal.recoverable), ("queue_full", true));
    assert!(world.command(0, asked[3].0).is_none(), "what was refused is not listed");
}

#[test]
fn a_command_for_an_absent_agent_waits_and_expires() {
    let mut world = small_world(13);
    let within = |ms| move |r: &mut CommandRequest| r.deliver_within_ms = Some(ms);
    let (patient, _) = world.request_with(0, "late", "exit:0", within(60_000));
    let (hasty, _) = world.request_with(0, "late", "exit:0", within(5_000));
    world.run_for(4 * S);
    assert_eq!(world.status(0, hasty), Some(CommandStatus::Queued));
    world.run_for(2 * S);
    assert_eq!(world.status(0, hasty), Some(CommandStatus::Expired));
    world.agent("late");
    ends(&mut world, patient, CommandStatus::Completed);
    assert!(!world.agents[1].starts.contains_key(&hasty));
}

#[test]
fn a_command_that_runs_too_long_is_ended() {
    let mut world = small_world(14);
    let short = |r: &mut CommandRequest| r.spec.run_for_ms = Some(3_000);
    let (command, _) = world.request_with(0, "a", "forever", short);
    ends(&mut world, command, CommandStatus::TimedOut);
    let (gone, _) = world.request_with(0, "a", "forever", short);
    world.run_until(2 * S, |w| w.status(0, gone) == Some(CommandStatus::Running));
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    // Its agent is not there to end it: the hub does, some time later.
    ends(&mut world, gone, CommandStatus::TimedOut);
}

#[test]
fn a_queue_that_fails_refuses_and_recovers() {
    let mut world = small_world(15);
    world.storage = Storage::Fails;
    let (command, request) = world.request(0, "a", "exit:0");
    world.run_for(S);
    let Err(RequestError::Refused(refusal)) = &world.dashboards[0].answers[&request] else {
        panic!("accepted")
    };
    assert_eq!(refusal.code.as_str(), "queue_unavailable");
    assert!(world.command(0, command).is_none());
    world.storage = Storage::Works;
    let (command, _) = world.request(0, "a", "sleep:500 exit:0");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Running));
    world.storage = Storage::Fails;
    world.run_for(5 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Running), "final only once stored");
    world.storage = Storage::Works;
    ends(&mut world, command, CommandStatus::Completed);
}

#[test]
fn one_id_is_one_command() {
    let mut world = small_world(16);
    let (command, _) = world.request(0, "a", "sleep:100 exit:0");
    world.run_for(50 * MS);
    let same = |r: &mut CommandRequest| r.command = command;
    let (_, again) = world.request_with(0, "a", "sleep:100 exit:0", same);
    let (_, other) = world.request_with(1, "a", "exit:1", same);
    ends(&mut world, command, CommandStatus::Completed);
    assert!(world.dashboards[0].answers[&again].is_ok());
    let Err(RequestError::Refused(refusal)) = &world.dashboards[1].answers[&other] else {
        panic!("accepted")
    };
    assert_eq!(refusal.code.as_str(), "conflict");
    assert_eq!(world.agents[0].starts[&command], 1);
}

// ---- interrupts ---------------------------------------------------------

#[test]
fn an_interrupt_shows_its_stages() {
    let mut world = small_world(20);
    let (command, _) = world.request(0, "a", "forever");
    world.run_until(S, |w| w.status(1, command) == Some(CommandStatus::Running));
    world.interrupt(1, command);
    let stage = |w: &World| w.command(0, command).and_then(|c| c.interrupt);
    world.run_until(S, |w| stage(w).is_some());
    world.run_until(S, |w| stage(w) == Some(InterruptStage::Signalled));
    ends(&mut world, command, CommandStatus::Interrupted);
}

#[test]
fn an_interrupt_takes_a_command_out_of_the_queue() {
    let mut world = small_world(21);
    let (running, _) = world.request(0, "a", "forever");
    let (queued, _) = world.request(0, "a", "exit:0");
    world.run_for(S);
    let asked = world.interrupt(0, queued);
    ends(&mut world, queued, CommandStatus::Interrupted);
    assert!(world.dashboards[0].answers[&asked].is_ok());
    assert!(!world.agents[0].starts.contains_key(&queued), "it never started");
    assert_eq!(world.status(0, running), Some(CommandStatus::Running));
}

#[test]
fn an_interrupt_waits_for_an_absent_agent() {
    let mut world = small_world(22);
    let (command, _) = world.request(0, "a", "forever");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Running));
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    world.interrupt(0, command);
    world.run_for(20 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Running));
    world.set_reachable(Peer::Agent(0), true);
    ends(&mut world, command, CommandStatus::Interrupted);
}

#[test]
fn an_interrupt_overtakes_output() {
    let mut world = small_world(23);
    world.on_cable(Peer::Agent(0), |cable| cable.throttle(100_000));
    let (command, _) = world.request(0, "a", "write:50000000 exit:0");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    world.run_for(10 * S);
    world.interrupt(0, command);
    let stage = |w: &World| w.command(0, command).and_then(|c| c.interrupt);
    // What lies in the lane is ahead of it (64 KiB and a frame), and nothing else.
    world.run_until(S, |w| stage(w) == Some(InterruptStage::Signalled));
}

#[test]
fn a_program_that_does_not_listen_is_ended_after_its_grace() {
    let mut world = small_world(24);
    let (command, _) = world.request(0, "a", "stubborn forever");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Running));
    world.interrupt(0, command);
    world.run_for(4 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Running));
    ends(&mut world, command, CommandStatus::Interrupted);
}

#[test]
fn an_emergency_stop_stops_everything_once_and_counts_it() {
    let mut world = small_world(25);
    world.agent("b");
    world.run_for(2 * S);
    let commands = ["a", "a", "a", "b", "absent"].map(|agent| world.request(0, agent, "forever").0);
    world.run_for(S);
    world.cut(Peer::Dashboard(1));
    let asked = world.stop_all(1);
    for command in commands {
        ends(&mut world, command, CommandStatus::Interrupted);
    }
    world.run_for(5 * S);
    let answer = world.dashboards[1].answers[&asked].clone().unwrap();
    assert_eq!(answer.stopped, Some(5));
}

// ---- lost links ---------------------------------------------------------

#[test]
fn output_goes_on_where_it_stood_after_any_cable_is_cut() {
    let mut world = small_world(30);
    let (command, _) = world.request(0, "a", "write:20000000 exit:0");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    for peer in [Peer::Agent(0), Peer::Dashboard(0), Peer::Dashboard(1), Peer::Agent(0)] {
        world.run_for(400 * MS);
        world.cut(peer);
    }
    ends(&mut world, command, CommandStatus::Completed);
    read_whole(&mut world, command, 20_000_000);
    assert_eq!(world.agents[0].starts[&command], 1);
}

#[test]
fn a_hub_that_is_killed_and_keeps_its_queue_goes_on() {
    let mut world = small_world(31);
    let (command, _) = world.request(0, "a", "write:15000000 sleep:100 write:1000 exit:0");
    let (queued, _) = world.request(1, "a", "write:10 exit:0");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
        world.watch(dashboard, queued);
    }
    world.run_for(700 * MS);
    world.kill_hub();
    world.run_for(3 * S);
    world.start_hub(Memory::Kept);
    ends(&mut world, command, CommandStatus::Completed);
    read_whole(&mut world, command, 15_001_000);
    ends(&mut world, queued, CommandStatus::Completed);
    read_whole(&mut world, queued, 10);
    assert_eq!(world.agents[0].starts[&command], 1);
}

/// The same with a stream log.
fn world_with_a_stream_log(seed: u64) -> World {
    let mut world = World::new(seed);
    world.keep_output();
    populated(world)
}

#[test]
fn kept_output_outlives_the_hub_and_the_agent() {
    let mut world = world_with_a_stream_log(41);
    let (ended, _) = world.request(0, "a", "write:3000000 exit:0");
    ends(&mut world, ended, CommandStatus::Completed);
    world.run_for(2 * S);
    world.crash_agent(0);
    world.kill_hub();
    world.start_hub(Memory::Kept);
    world.run_for(5 * S);
    for dashboard in 0..2 {
        world.watch(dashboard, ended); // they have seen nothing of it before
    }
    read_whole(&mut world, ended, 3_000_000);
}

#[test]
fn what_readers_saw_before_it_was_kept_is_not_lost_with_the_hub() {
    for killed_after in [3, 10, 30, 80, 200] {
        let mut world = world_with_a_stream_log(killed_after);
        // Readers are shown what the stream log takes seconds to keep.
        world.hook_delay = 2 * S;
        let (command, _) = world.request(0, "a", "write:2000000 sleep:6000 write:1000 exit:0");
        world.watch(0, command);
        world.run_until(20 * S, |w| w.dashboards[0].of(command).is_some_and(|s| s.at > 100_000));
        world.run_for(Duration::from_millis(killed_after));
        world.kill_hub();
        world.hook_delay = MS;
        world.start_hub(Memory::Kept);
        ends(&mut world, command, CommandStatus::Completed);
        world.watch(1, command);
        read_whole(&mut world, command, 2_001_000);
        assert_eq!(world.agents[0].starts[&command], 1);
    }
}

#[test]
fn a_kept_gap_has_the_reason_that_it_had() {
    let mut world = World::new(42);
    world.keep_output();
    world.agent_with("a", |setup| {
        setup.tail_bytes = 64 * 1024;
        setup.tail_hold = S;
    });
    world.dashboard();
    world.dashboard();
    world.run_for(S);
    let (command, _) = world.request(0, "a", "write:1000 sleep:500 write:900000 exit:0");
    world.run_for(300 * MS);
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    world.run_for(10 * S);
    world.set_reachable(Peer::Agent(0), true);
    ends(&mut world, command, CommandStatus::Completed);
    world.run_for(10 * S);
    world.kill_hub();
    world.start_hub(Memory::Kept);
    world.crash_agent(0);
    world.run_for(5 * S);
    world.watch(1, command);
    world.run_for(5 * S);
    let seen = world.dashboards[1].of(command).unwrap();
    let reasons: Vec<_> = seen.gaps.iter().map(|gap| gap.reason.clone()).collect();
    assert_eq!(reasons, [GapReason::AgentOverflow]);
    assert_eq!((seen.gaps[0].from, seen.at), (1_000, 901_000));
}

#[test]
fn a_stream_log_that_fails_holds_nobody_up() {
    let mut world = world_with_a_stream_log(43);
    world.log_storage = Storage::Fails;
    // More than a tail holds for what is not stored.
    let takes = |world: &mut World| {
        let begun = world.now().monotonic;
        let (command, _) = world.request(0, "a", "write:30000000 exit:0");
        ends(world, command, CommandStatus::Completed);
        (command, world.now().monotonic.saturating_sub(begun))
    };
    let (command, without) = takes(&mut world);
    world.log_storage = Storage::Works;
    let (_, with) = takes(&mut world);
    assert!(without < 2 * with, "{without:?} against {with:?}");
    // What was not kept then is kept now, as far as it is still there.
    world.run_for(5 * S);
    world.crash_agent(0);
    world.kill_hub();
    world.start_hub(Memory::Kept);
    world.watch(1, command);
    world.run_for(5 * S);
    let seen = world.dashboards[1].of(command).unwrap();
    assert_eq!((seen.gaps.len(), seen.at), (1, 30_000_000), "{:?}", seen.gaps);
    assert_eq!(seen.gaps[0].reason, GapReason::Evicted);
}

#[test]
fn a_hub_that_lost_its_memory_is_told_by_its_agents() {
    let mut world = small_world(32);
    let (command, _) = world.request(0, "a", "write:3000000 sleep:8000 write:1000 exit:7");
    world.watch(0, command);
    world.run_for(2 * S);
    world.kill_hub();
    world.run_for(S);
    world.start_hub(Memory::Lost);
    world.run_for(2 * S);
    world.watch(1, command); // it has seen nothing of it before
    ends(&mut world, command, CommandStatus::Completed);
    read_whole(&mut world, command, 3_001_000);
    assert_eq!(world.agents[0].starts[&command], 1);
}

#[test]
fn a_hub_that_lost_its_memory_is_refilled_with_what_had_already_ended() {
    for cut_after in [120, 200, 300, 500, 900, 1500, 2500] {
        let mut world = small_world(1000 + cut_after);
        let (command, _) = world.request(0, "a", "write:7900000 exit:0");
        world.watch(0, command);
        world.watch(1, command);
        world.run_for(Duration::from_millis(cut_after));
        world.kill_hub();
        world.run_for(400 * MS);
        world.start_hub(Memory::Lost);
        read_whole(&mut world, command, 7_900_000);
        ends(&mut world, command, CommandStatus::Completed);
        assert_eq!(world.agents[0].starts[&command], 1);
    }
}

#[test]
fn what_had_ended_before_a_hub_lost_its_memory_is_not_seen_to_run_again() {
    let mut world = small_world(33);
    world.hook_delay = 50 * MS;
    let (command, _) = world.request(0, "a", "write:1000 exit:0");
    ends(&mut world, command, CommandStatus::Completed);
    world.kill_hub();
    world.start_hub(Memory::Lost);
    let mut seen = Vec::new();
    for _ in 0..10_000 {
        world.run_for(MS);
        let busy = world.presence(0, "a") == Some(Presence::Busy);
        let status = world.status(0, command);
        assert!(!busy, "it takes no slot");
        if seen.last() != Some(&status) {
            seen.push(status);
        }
    }
    assert_eq!(seen, [Some(CommandStatus::Completed), None, Some(CommandStatus::Completed)]);
}

#[test]
fn who_never_came_is_forgotten_with_what_was_asked_of_it() {
    let limits = Limits { agents_max: 2, ..Limits::default() };
    let mut world = World::with_limits(38, limits);
    world.dashboard();
    let brief = |r: &mut CommandRequest| r.deliver_within_ms = Some(1_000);
    for name in ["b", "c"] {
        world.request_with(0, name, "exit:0", brief);
    }
    world.run_for(5 * S);
    let (_, refused) = world.request_with(0, "d", "exit:0", brief);
    world.run_for(1800 * S);
    let (_, accepted) = world.request_with(0, "e", "exit:0", brief);
    world.run_for(S);
    let answers = &world.dashboards[0].answers;
    assert!(answers[&refused].is_err(), "there is no room for another name");
    assert!(answers[&accepted].is_ok(), "there is again");
}

#[test]
fn a_hub_that_lost_its_memory_says_so_of_what_was_queued() {
    let mut world = small_world(33);
    let (running, _) = world.request(0, "a", "sleep:60000 exit:0");
    let (queued, _) = world.request(0, "a", "exit:0");
    world.run_for(2 * S);
    world.kill_hub();
    world.start_hub(Memory::Lost);
    world.run_until(60 * S, |w| w.dashboards[0].lost.contains(&queued));
    assert!(!world.dashboards[0].lost.contains(&running), "its agent still has it");
    world.run_for(90 * S);
    assert_eq!(world.status(0, running), Some(CommandStatus::Completed));
    assert!(!world.agents[0].starts.contains_key(&queued), "never run by guess");
}

#[test]
fn an_agent_that_dies_leaves_its_command_unknown() {
    let mut world = small_world(34);
    let (command, _) = world.request(0, "a", "write:100 sleep:60000 exit:0");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    world.run_for(2 * S);
    world.crash_agent(0);
    world.run_for(60 * S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Running), "no guess from timing");
    world.restart_agent(0);
    ends(&mut world, command, CommandStatus::Unknown);
    assert_eq!(world.agents[0].starts[&command], 1, "never run again by guess");
    assert_eq!(world.dashboards[0].of(command).unwrap().bytes, 100);
}

#[test]
fn output_that_died_with_its_agent_after_the_end_was_told_is_one_named_gap() {
    let mut world = small_world(39);
    world.on_cable(Peer::Agent(0), |cable| cable.throttle(100_000));
    let (command, _) = world.request(0, "a", "write:900000 exit:0");
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    // The end overtakes the output.
    ends(&mut world, command, CommandStatus::Completed);
    assert!(!has_read(&world, 0, command));
    world.crash_agent(0);
    world.restart_agent(0);
    world.run_until(10 * S, |w| (0..2).all(|d| has_read(w, d, command)));
    let seen = world.dashboards[0].of(command).unwrap();
    let [gap] = seen.gaps.as_slice() else { panic!("{:?}", seen.gaps) };
    assert_eq!((gap.to, &gap.reason), (900_000, &GapReason::AgentLoss));
    assert_eq!((seen.bytes, seen.at), (gap.from, 900_000));
}

#[test]
fn with_retry_a_new_process_makes_a_numbered_new_attempt() {
    let mut world = small_world(35);
    let retry = |r: &mut CommandRequest| r.retry = true;
    let script = "write:100 sleep:5000 write:1 exit:0";
    let (command, _) = world.request_with(0, "a", script, retry);
    for dashboard in 0..2 {
        world.watch(dashboard, command);
    }
    world.run_for(2 * S);
    world.crash_agent(0);
    world.run_for(2 * S);
    world.restart_agent(0);
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(world.command(0, command).unwrap().attempt, 2);
    assert_eq!(world.agents[0].starts[&command], 2);
}

#[test]
fn a_command_lost_on_its_way_is_sent_again_to_the_same_process() {
    let mut world = small_world(36);
    world.stall(Peer::Agent(0));
    let (command, _) = world.request(0, "a", "write:10 exit:0");
    world.run_until(2 * S, |w| w.status(0, command) == Some(CommandStatus::Dispatched));
    world.cut(Peer::Agent(0));
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(world.agents[0].starts[&command], 1);
    assert_eq!(world.command(0, command).unwrap().attempt, 1);
}

#[test]
fn a_request_on_a_dying_link_is_answered_once() {
    let mut world = small_world(37);
    world.half_open(Peer::Dashboard(0));
    let (command, request) = world.request(0, "a", "write:10 exit:0");
    world.run_until(120 * S, |w| w.dashboards[0].answers.contains_key(&request));
    ends(&mut world, command, CommandStatus::Completed);
    assert_eq!(world.agents[0].starts[&command], 1);
}

// ---- readers ------------------------------------------------------------

#[test]
fn a_slow_dashboard_slows_nobody_and_loses_only_what_it_is_told() {
    let mut world = small_world(40);
    let (command, _) = world.request(0, "a", "write:30000000 exit:0");
    world.watch(0, command);
    world.watch(1, command);
    world.dashboards[1].asleep = true;
    world.run_until(60 * S, |w| has_read(w, 0, command));
    assert_eq!(world.dashboards[0].of(command).unwrap().bytes, 30_000_000);
    world.dashboards[1].asleep = false;
    world.run_until(60 * S, |w| has_read(w, 1, command));
    let seen = world.dashboards[1].of(command).unwrap();
    assert_eq!(seen.gaps.len(), 1, "one explicit gap");
    assert_eq!(seen.gaps[0].reason, GapReason::Evicted);
    let missing = seen.gaps[0].to - seen.gaps[0].from;
    assert_eq!(seen.bytes + missing, 30_000_000, "exact");
    assert!(seen.bytes >= 8_000_000, "the hub's log was read to its oldest byte");
}

#[test]
fn a_late_dashboard_reads_history_as_replay() {
    let mut world = small_world(41);
    let (command, _) = world.request(0, "a", "write:5000 sleep:10000 write:300 exit:0");
    world.run_for(3 * S);
    world.watch(0, command);
    world.watch(1, command);
    read_whole(&mut world, command, 5300);
    assert_eq!(world.dashboards[0].of(command).unwrap().replayed, 5000);
}

#[test]
fn watching_an_agent_shows_what_it_runs_from_now_on() {
    let mut world = small_world(42);
    for dashboard in 0..2 {
        world.read(dashboard, Target::Agent("a".parse().unwrap()), Reading::default());
    }
    let (first, _) = world.request(0, "a", "write:100 exit:0");
    let (second, _) = world.request(1, "a", "write:200 exit:0");
    read_whole(&mut world, first, 100);
    read_whole(&mut world, second, 200);
}

#[test]
fn an_agent_cut_off_for_long_holds_its_program_and_then_names_what_was_lost() {
    let mut world = small_world(43);
    let (command, _) = world.request(0, "a", "write:40000000 exit:0");
    world.watch(0, command);
    world.watch(1, command);
    world.run_for(500 * MS);
    world.set_reachable(Peer::Agent(0), false);
    world.cut(Peer::Agent(0));
    world.run_for(20 * S);
    let written = *world.agents[0].written.values().next().unwrap();
    assert!(written < 20_000_000, "held at {written}");
    world.run_for(60 * S);
    world.set_reachable(Peer::Agent(0), true);
    world.run_until(120 * S, |w| has_read(w, 0, command));
    let seen = world.dashboards[0].of(command).unwrap();
    assert_eq!(seen.gaps.len(), 1);
    assert_eq!(seen.gaps[0].reason, GapReason::AgentOverflow);
    let missing = seen.gaps[0].to - seen.gaps[0].from;
    assert_eq!(seen.bytes + missing, 40_000_000);
}

// ---- input --------------------------------------------------------------

#[test]
fn what_is_typed_arrives_once_and_in_order_over_lost_links() {
    let mut world = small_world(50);
    let (command, _) = world.request(0, "a", "forever");
    world.run_until(S, |w| w.status(0, command) == Some(CommandStatus::Running));
    let mut typed = Vec::new();
    for round in 0..40u32 {
        let text = format!("line {round}\n");
        let mut bytes = bytes::Bytes::from(text.clone());
        world.core_of(0).input(command, &mut bytes).unwrap();
        assert!(bytes.is_empty(), "there is room");
        typed.extend_from_slice(text.as_bytes());
        world.run_for(37 * MS);
        match round % 10 {
            3 => world.cut(Peer::Agent(0)),
            6 => world.cut(Peer::Dashboard(0)),
            8 => world.cut_unnoticed_by_hub(Peer::Agent(0)),
            _ => {}
        }
    }
    let arrived = |w: &World| w.agents[0].typed.get(&command).map_or(0, Vec::len);
    world.run_until(60 * S, |w| arrived(w) >= typed.len());
    assert_eq!(world.agents[0].typed[&command], typed);
}

// ---- views --------------------------------------------------------------

#[test]
fn a_dashboard_that_was_away_sees_what_a_fresh_one_sees() {
    let mut world = small_world(60);
    for round in 0..10 {
        world.request(0, "a", "write:10 exit:0");
        world.run_for(300 * MS);
        if round % 3 == 0 {
            world.cut(Peer::Dashboard(1));
        }
    }
    world.run_for(30 * S);
    let fresh = world.dashboard();
    world.run_for(5 * S);
    assert_eq!(world.roster(1), world.roster(fresh));
    assert_eq!(world.roster(0), world.roster(fresh));
}

#[test]
fn one_seed_is_one_life() {
    let life = |seed| {
        let mut world = small_world(seed);
        let (command, _) = world.request(0, "a", "write:100000 exit:0");
        world.watch(1, command);
        world.run_for(300 * MS);
        world.cut(Peer::Agent(0));
        world.run_for(20 * S);
        format!("{:?}", world.roster(1))
    };
    assert_eq!(life(70), life(70));
    assert_ne!(life(70), life(71));
}

// ---- a fleet ------------------------------------------------------------

#[test]
fn a_fleet_of_hundreds_comes_back_to_a_hub_that_died() {
    const AGENTS: usize = 200;
    const DASHBOARDS: usize = 100;
    let mut world = World::new(77);
    world.keep_output();
    for n in 0..AGENTS {
        world.agent(&format!("agent-{n}"));
    }
    for _ in 0..DASHBOARDS {
        world.dashboard();
    }
    world.run_for(10 * S);
    let mut commands = Vec::new();
    for n in 0..AGENTS {
        let name = format!("agent-{n}");
        let (command, _) = world.request(n % DASHBOARDS, &name, "write:9000 sleep:4000 exit:0");
        commands.push(command);
        // Two look at each, one of them from elsewhere.
        world.watch(n % DASHBOARDS, command);
        world.watch((n + 1) % DASHBOARDS, command);
    }
    world.run_for(S);
    world.kill_hub();
    world.run_for(3 * S);
    world.start_hub(Memory::Kept);
    for n in 0..DASHBOARDS / 10 {
        world.cut(Peer::Dashboard(n * 10)); // some have bad luck
    }
    let all_done = |w: &World| {
        let done = |command: &CommandId| w.status(0, *command) == Some(CommandStatus::Completed);
        commands.iter().all(done)
    };
    world.run_until(120 * S, all_done);
    world.run_for(30 * S);
    let fresh = world.dashboard();
    world.run_for(2 * S);
    for dashboard in 0..DASHBOARDS {
        assert!(world.roster(dashboard) == world.roster(fresh), "dashboard {dashboard}");
    }
    for (n, command) in commands.iter().enumerate() {
        assert_eq!(world.agents[n].starts[command], 1);
        for dashboard in [n % DASHBOARDS, (n + 1) % DASHBOARDS] {
            let seen = world.dashboards[dashboard].of(*command).unwrap();
            assert_eq!((seen.bytes, seen.gaps.len()), (9_000, 0));
            assert_eq!(seen.ended.as_ref().unwrap().1, Audit::Verified);
        }
    }
}
