//! The agent's core against a scripted hub, in virtual time. What passes
//! between them is what would be on the wire.

use bytes::Bytes;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use trunkline_protocol::codec::binary::{OUTPUT_HEADER_BYTES, parse_output};
use trunkline_protocol::ids::{DashboardId, HubInstance, QueueEpoch};
use trunkline_protocol::limits::GREETING_BYTES_MAX;
use trunkline_protocol::message::{
    AgentControl, CommandAccepted, CommandComplete, CommandEnd, CommandExecute, CommandInterrupt,
    CommandInterrupting, CommandSettled, CommandStarted, CommandStatus, Direction, GapReason,
    Greeting, Heartbeat, HeldCommand, HeldCommands, InterruptStage, LogLevel, LogTaken,
    RefreshNeeded, Run, TerminalGap, TerminalInput, TerminalInputTaken, TerminalResize,
    TerminalSize, TerminalTaken,
};
use trunkline_protocol::stream::Log;

use super::*;
use crate::core::logs::LogLimits;

const KIB: u64 = 1024;
const GRANT: u64 = 1024 * KIB;

// ---- output ---------------------------------------------------------------

#[test]
fn output_arrives_whole_and_can_be_audited() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 100_000);
    agent.end(command, Outcome::Exited(3));
    let heard = agent.talk(&mut hub);
    let end = ending(&heard, command);
    assert_eq!(
        (end.status, end.end.exit_code, end.end.end),
        (CommandStatus::Completed, Some(3), 100_000)
    );
    assert_eq!(hub.text(command), text(0, 100_000));
    assert_eq!(end.end.digest, Some(digest(&text(0, 100_000))));
}

#[test]
fn a_new_link_goes_on_exactly_where_the_hub_is() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    agent.type_out(command, 200_000);
    // Five chunks arrive; what else was written into the link is gone.
    agent.talk_some(&mut hub, 5);
    let stored = hub.stream(command).log.end();
    assert_eq!(stored, 5 * 16 * KIB);
    while agent.core.poll_transmit(agent.now()).is_some() {}
    agent.cut();
    agent.type_out(command, 1_000);
    agent.wait(10);

    let greeting = agent.connect(&mut hub);
    let held = &greeting.commands[0];
    assert_eq!((held.command, held.status), (command, CommandStatus::Running));
    assert_eq!(held.stream.map(|stream| (stream.from, stream.to)), Some((0, 201_000)));
    let heard = agent.talk(&mut hub);
    let from = heard.iter().find_map(|word| match word {
        AgentToHub::Output(output) => Some(output.offset),
        _ => None,
    });
    assert_eq!(from, Some(stored), "not a byte twice");
    assert_eq!(hub.text(command), text(0, 201_000));
}

#[test]
fn nothing_of_a_listed_stream_is_sent_before_the_hub_has_said_where_it_stands() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 10_000);
    agent.cut();
    hub.silent = true;
    agent.connect(&mut hub);
    assert!(agent.talk(&mut hub).is_empty());
    hub.take(&mut agent, command);
    agent.talk(&mut hub);
    assert_eq!(hub.text(command), text(0, 10_000));
}

#[test]
fn a_hub_that_forgot_everything_is_refilled() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 300_000);
    agent.talk(&mut hub);
    agent.end(command, Outcome::Exited(0));
    agent.talk(&mut hub);
    hub.settle(&mut agent, command);
    agent.cut();

    let mut hub = Hub::default();
    let greeting = agent.connect(&mut hub);
    let held = &greeting.commands[0];
    assert_eq!((held.status, held.end.as_ref().unwrap().end), (CommandStatus::Completed, 300_000));
    assert!(held.spec.is_some(), "so that it can be listed again");
    agent.talk(&mut hub);
    assert_eq!(hub.text(command), text(0, 300_000));
}

#[test]
fn not_a_byte_goes_beyond_the_grant() {
    let (mut agent, mut hub) = connected();
    hub.silent = true;
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 2 * GRANT);
    agent.talk(&mut hub);
    assert_eq!(hub.stream(command).log.end(), GRANT);
    let stream = hub.stream(command).log.stream();
    hub.streams.get_mut(&command).unwrap().allowed = GRANT + 10;
    hub.say(
        &mut agent,
        HubToAgent::Taken(TerminalTaken { stream, stored: GRANT, allowed: GRANT + 10 }),
    );
    // Older figures change nothing.
    hub.say(&mut agent, HubToAgent::Taken(TerminalTaken { stream, stored: 0, allowed: 5 }));
    agent.talk(&mut hub);
    assert_eq!(hub.stream(command).log.end(), GRANT + 10);
}

#[test]
fn a_program_is_held_while_its_tail_is_full_of_what_the_hub_has_not_taken() {
    let (mut agent, mut hub) = connected_as(|setup| setup.tail_bytes = 256 * 1024);
    let command = agent.run(&mut hub, 1);
    agent.cut();
    let written = agent.type_until_held(command);
    assert!((150_000..256 * KIB).contains(&written), "{written}");
    agent.connect(&mut hub);
    agent.talk(&mut hub);
    hub.take(&mut agent, command);
    assert!(agent.heard(&AgentOutput::Room(command)));
    assert!(agent.type_until_held(command) > written / 3);
    agent.talk(&mut hub);
    assert!(hub.gaps(command).is_empty());
}

#[test]
fn half_of_a_tail_is_kept_for_a_hub_that_dies_with_what_it_took() {
    let (mut agent, mut hub) = connected_as(|setup| setup.tail_bytes = 256 * 1024);
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 200_000);
    agent.talk(&mut hub);
    hub.take(&mut agent, command);
    agent.cut();
    let unstored = agent.type_until_held(command);
    assert!(unstored > 64 * KIB, "{unstored}");

    let mut hub = Hub::default();
    let from = agent.connect(&mut hub).commands[0].stream.unwrap().from;
    assert!(from <= 200_000 - 100 * KIB, "{from}");
    agent.talk(&mut hub);
    assert_eq!(hub.text(command), text(from, 200_000 + unstored));
}

#[test]
fn a_program_that_was_held_for_long_goes_on_and_what_is_lost_is_one_exact_gap() {
    let (mut agent, mut hub) = connected_as(|setup| setup.tail_bytes = 256 * 1024);
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 1_000);
    agent.talk(&mut hub);
    agent.cut();
    agent.type_until_held(command);
    agent.wait(29_999);
    assert_eq!(agent.type_until_held(command), 0);
    agent.wait(1);
    assert!(agent.heard(&AgentOutput::Room(command)));
    agent.type_out(command, 1_000_000);
    agent.end(command, Outcome::Exited(0));
    let written = agent.written[&command];

    let greeting = agent.connect(&mut hub);
    let from = greeting.commands[0].stream.unwrap().from;
    let heard = agent.talk(&mut hub);
    let gaps = heard.iter().filter(|word| matches!(word, AgentToHub::Gap(_))).count();
    assert_eq!(gaps, 1);
    assert_eq!(hub.gaps(command), [(1_000, from, GapReason::AgentOverflow)]);
    assert_eq!(hub.stream(command).log.end(), written);
    assert_eq!(hub.text(command), [text(0, 1_000), text(from, written)].concat());
    let end = greeting.commands[0].end.clone().unwrap();
    assert_eq!(end.digest, Some(digest(&text(0, written))), "over all that was written");
}

#[test]
fn stored_bytes_make_room_without_holding_anybody() {
    let (mut agent, mut hub) = connected_as(|setup| setup.tail_bytes = 64 * 1024);
    let command = agent.run(&mut hub, 1);
    for _ in 0..100 {
        agent.type_out(command, 10_000);
        agent.wait(10);
        agent.talk(&mut hub);
        hub.take(&mut agent, command);
    }
    assert!(agent.core.tail_bytes() <= 64 * 1024);
    assert_eq!(hub.text(command), text(0, 1_000_000));
}

#[test]
fn a_hub_that_missed_something_gets_it_again() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 50_000);
    agent.talk(&mut hub);
    agent.type_out(command, 50_000);
    agent.wait(100);
    while agent.core.poll_transmit(agent.now()).is_some() {}
    let refusal = Refusal::new(ErrorCode::InvalidMessage, "offset: must not be beyond 50000");
    hub.say(&mut agent, HubToAgent::Error(refusal.field("payload.offset")));
    agent.talk(&mut hub);
    assert_eq!(hub.text(command), text(0, 100_000));
}

#[test]
fn a_stream_that_the_hub_does_not_know_is_not_sent_on() {
    let (mut agent, mut hub) = connected();
    let known = agent.run(&mut hub, 1);
    agent.type_out(known, 10);
    agent.talk(&mut hub);
    hub.silent = true;
    let unknown = agent.run(&mut hub, 2);
    let refusal = Refusal::new(ErrorCode::NotFound, "no such stream");
    hub.say(&mut agent, HubToAgent::Error(refusal.field("payload.stream")));
    agent.type_out(known, 10);
    agent.type_out(unknown, 10);
    agent.wait(100);
    agent.talk(&mut hub);
    assert_eq!((hub.text(known), hub.text(unknown)), (text(0, 20), Vec::new()));
    hub.take(&mut agent, unknown);
    agent.talk(&mut hub);
    assert_eq!(hub.text(unknown), text(0, 10));
}

#[test]
fn streams_take_turns_and_control_passes_between_their_pieces() {
    let (mut agent, mut hub) = connected();
    let (one, two) = (agent.run(&mut hub, 1), agent.run(&mut hub, 2));
    agent.talk(&mut hub);
    agent.type_out(one, 100_000);
    agent.type_out(two, 100_000);
    agent.talk_some(&mut hub, 4);
    assert_eq!(hub.stream(one).log.end(), 32 * KIB);
    assert_eq!(hub.stream(two).log.end(), 32 * KIB);
    hub.say(&mut agent, HubToAgent::Ping(HeartbeatBeat { n: 7 }));
    assert_eq!(agent.talk_some(&mut hub, 1), [AgentToHub::Pong(HeartbeatBeat { n: 7 })]);
}

#[test]
fn small_writes_are_gathered_and_the_first_after_silence_is_not() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    agent.type_out(command, 1);
    assert_eq!(agent.talk(&mut hub).len(), 1);
    for _ in 0..7 {
        agent.wait(1);
        agent.type_out(command, 1);
        assert_eq!(agent.talk(&mut hub), []);
    }
    agent.wait(1);
    assert_eq!(agent.talk(&mut hub).len(), 1, "seven bytes in one message");
    assert_eq!(hub.text(command), text(0, 8));
}

#[test]
fn a_link_that_takes_nothing_keeps_no_timer_running() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    for _ in 0..20 {
        agent.type_out(command, 10);
        agent.wait(1);
    }
    agent.wait(20);
    let deadline = agent.core.deadline().unwrap();
    assert!(deadline > agent.time + Duration::from_millis(100), "{deadline:?} at {:?}", agent.time);
}

#[test]
fn a_link_without_binary_gets_text() {
    let mut agent = Agent::new(|_| {});
    let mut hub = Hub { features: vec![], chunk_bytes_max: 1000, ..Hub::default() };
    agent.connect(&mut hub);
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 10_000);
    let frames: Vec<Frame> = std::iter::from_fn(|| agent.core.poll_transmit(agent.now())).collect();
    assert!(frames.iter().all(|frame| matches!(frame, Frame::Text(_))));
    for frame in &frames {
        hub.hear(&mut agent, frame);
    }
    assert_eq!(hub.text(command), text(0, 10_000));
}

// ---- commands -------------------------------------------------------------

#[test]
fn a_command_told_twice_runs_once() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    let stream = hub.stream(command).log.stream();
    hub.execute(&mut agent, command, 1, |_| {});
    assert!(!agent.heard(&AgentOutput::Execute(command)));
    assert_eq!(
        agent.talk(&mut hub),
        [
            AgentToHub::Accepted(CommandAccepted { command, attempt: 1 }),
            AgentToHub::Started(CommandStarted { command, attempt: 1, stream }),
        ]
    );
    agent.end(command, Outcome::Exited(0));
    agent.talk(&mut hub);
    hub.settle(&mut agent, command);
    hub.execute(&mut agent, command, 1, |_| {});
    let heard = agent.talk(&mut hub);
    assert_eq!(ending(&heard, command).status, CommandStatus::Completed, "the end is told again");
    assert!(!agent.heard(&AgentOutput::Execute(command)));
}

#[test]
fn an_older_attempt_is_nothing_and_a_forgotten_one_is_not_run_again() {
    let (mut agent, mut hub) = connected();
    let command = id(1);
    hub.execute(&mut agent, command, 2, |_| {});
    hub.execute(&mut agent, command, 1, |_| {});
    assert_eq!(agent.begin(command), Some(2));
    agent.end(command, Outcome::Exited(0));
    hub.settle_attempt(&mut agent, command, 2);
    agent.talk(&mut hub);
    agent.wait(15 * 60 * 1000);
    agent.reconnect_if_lost(&mut hub);
    assert_eq!(agent.core.tail_bytes(), 0);

    hub.execute(&mut agent, command, 1, |_| {});
    assert_eq!(agent.talk(&mut hub), []);
    hub.execute(&mut agent, command, 2, |_| {});
    assert!(!agent.heard(&AgentOutput::Execute(command)));
    assert_eq!(ending(&agent.talk(&mut hub), command).status, CommandStatus::Unknown);
    hub.execute(&mut agent, command, 3, |_| {});
    assert_eq!(agent.begin(command), Some(3));
}

#[test]
fn a_later_attempt_waits_for_the_end_of_the_one_that_runs() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    hub.execute(&mut agent, command, 2, |_| {});
    assert!(matches!(agent.event(command), Some(ExecutionEvent::Interrupt { .. })));
    assert!(!agent.heard(&AgentOutput::Execute(command)));
    agent.end(command, Outcome::Signalled(2));
    assert_eq!(agent.begin(command), Some(2));
    agent.written.clear();
    agent.type_out(command, 10);
    agent.talk(&mut hub);
    assert_eq!(hub.text(command), text(0, 10));
}

#[test]
fn no_more_run_at_a_time_than_there_are_slots() {
    let (mut agent, mut hub) = connected_as(|setup| setup.slots = 1);
    let one = agent.run(&mut hub, 1);
    hub.execute(&mut agent, id(2), 1, |_| {});
    hub.execute(&mut agent, id(3), 1, |_| {});
    assert!(!agent.heard(&AgentOutput::Execute(id(2))));
    agent.end(one, Outcome::Exited(0));
    assert_eq!(agent.begin(id(2)), Some(1));
    assert!(!agent.heard(&AgentOutput::Execute(id(3))));
}

#[test]
fn what_is_interrupted_before_it_begins_never_begins() {
    let (mut agent, mut hub) = connected_as(|setup| setup.slots = 1);
    hub.execute(&mut agent, id(1), 1, |_| {});
    hub.execute(&mut agent, id(2), 1, |_| {});
    for command in [id(1), id(2)] {
        hub.interrupt(&mut agent, command, None);
        let heard = agent.talk(&mut hub);
        assert!(heard.contains(&interrupting(command, InterruptStage::Delivered)));
        assert_eq!(ending(&heard, command).status, CommandStatus::Interrupted);
        assert_eq!(agent.begin(command), None);
    }
}

#[test]
fn the_stages_of_an_interrupt_are_told_one_by_one() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    hub.interrupt(&mut agent, command, Some(700));
    assert_eq!(agent.talk(&mut hub), [interrupting(command, InterruptStage::Delivered)]);
    let grace = Duration::from_millis(700);
    assert_eq!(agent.event(command), Some(ExecutionEvent::Interrupt { grace }));
    agent.core.signalled(command);
    assert_eq!(agent.talk(&mut hub), [interrupting(command, InterruptStage::Signalled)]);
    agent.end(command, Outcome::Signalled(2));
    let end = ending(&agent.talk(&mut hub), command);
    assert_eq!((end.status, end.end.signal), (CommandStatus::Interrupted, Some(2)));
}

#[test]
fn a_handler_that_does_not_end_when_asked_is_dropped_and_its_command_ends() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    hub.interrupt(&mut agent, command, Some(1_000));
    agent.wait(3_000);
    // A second one does not lengthen the time.
    hub.interrupt(&mut agent, command, Some(60_000));
    agent.wait(2_999);
    assert!(!agent.heard(&AgentOutput::Kill(command)));
    agent.wait(1);
    assert!(agent.heard(&AgentOutput::Kill(command)));
    let end = ending(&agent.talk(&mut hub), command);
    assert_eq!(end.status, CommandStatus::Interrupted);
    assert!(end.end.error.unwrap().contains("did not end"));
    agent.end(command, Outcome::Exited(0));
    assert_eq!(agent.talk(&mut hub), [], "the first word counts");
}

#[test]
fn an_interrupt_for_what_is_not_held_is_refused() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    let other = CommandInterrupt { command, attempt: Some(9), grace_ms: None };
    for interrupt in [CommandInterrupt { command: id(77), ..other.clone() }, other] {
        let request: RequestId = "r1".parse().unwrap();
        let message = Envelope::request(request.clone(), HubToAgent::Interrupt(interrupt));
        agent.core.handle_frame(&codec::encode(&message), agent.now());
        let [AgentToHub::Error(refusal)] = &agent.talk(&mut hub)[..] else { panic!() };
        assert_eq!((&refusal.code, &refusal.in_reply_to), (&ErrorCode::NotFound, &Some(request)));
    }
}

#[test]
fn what_runs_too_long_is_ended_and_timed_out() {
    let (mut agent, mut hub) = connected();
    let command = id(1);
    hub.execute(&mut agent, command, 1, |spec| spec.run_for_ms = Some(2_000));
    assert_eq!(agent.begin(command), Some(1));
    agent.wait(1_999);
    assert_eq!(agent.event(command), None);
    agent.wait(1);
    assert!(matches!(agent.event(command), Some(ExecutionEvent::Interrupt { .. })));
    agent.core.signalled(command);
    agent.end(command, Outcome::Signalled(15));
    let end = ending(&agent.talk(&mut hub), command);
    assert_eq!((end.status, end.end.signal), (CommandStatus::TimedOut, Some(15)));
}

#[test]
fn what_is_gone_without_a_word_is_unknown() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 10);
    agent.core.lost(command, "the handler panicked", agent.now());
    let end = ending(&agent.talk(&mut hub), command);
    assert_eq!((end.status, end.end.end), (CommandStatus::Unknown, 10));
    assert_eq!(end.end.error.as_deref(), Some("the handler panicked"));
}

#[test]
fn what_happens_between_greeting_and_acknowledgement_is_told_after_it() {
    let (mut agent, mut hub) = connected();
    let ends = agent.run(&mut hub, 1);
    hub.execute(&mut agent, id(2), 1, |_| {});
    agent.talk(&mut hub);
    agent.cut();
    let greeting = agent.greet();
    let status = |held: &HeldCommand| held.status;
    let statuses: Vec<CommandStatus> = greeting.commands.iter().map(status).collect();
    assert_eq!(statuses, [CommandStatus::Running, CommandStatus::Dispatched]);
    agent.end(ends, Outcome::Exited(0));
    assert_eq!(agent.begin(id(2)), Some(1));
    agent.type_out(id(2), 10);
    hub.welcome(&mut agent, &greeting);
    let heard = agent.talk(&mut hub);
    assert_eq!(ending(&heard, ends).status, CommandStatus::Completed);
    assert!(heard.iter().any(|word| matches!(word, AgentToHub::Started(s) if s.command == id(2))));
    agent.talk(&mut hub);
    assert_eq!(hub.text(id(2)), text(0, 10));
}

#[test]
fn a_settled_command_is_kept_for_a_while_and_not_for_ever() {
    let (mut agent, mut hub) = connected();
    for number in 0..100 {
        let command = agent.run(&mut hub, number);
        agent.type_out(command, 10);
        agent.end(command, Outcome::Exited(0));
        agent.talk(&mut hub);
        hub.settle(&mut agent, command);
        agent.talk(&mut hub);
        agent.wait(10);
    }
    agent.cut();
    assert_eq!(agent.connect(&mut hub).commands.len(), 64);
    agent.cut();
    agent.wait(15 * 60 * 1000);
    assert_eq!(agent.connect(&mut hub).commands.len(), 0);
}

#[test]
fn an_end_that_is_not_settled_is_listed_until_it_is() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.cut();
    agent.end(command, Outcome::Failed("x".repeat(5_000)));
    agent.wait(3600 * 1000);
    let greeting = agent.connect(&mut hub);
    assert_eq!(greeting.commands[0].status, CommandStatus::Failed);
    assert_eq!(greeting.commands[0].end.as_ref().unwrap().error.as_ref().unwrap().len(), 1024);
}

#[test]
fn output_of_many_ended_commands_is_bounded_and_what_is_given_up_is_a_gap() {
    let (mut agent, mut hub) = connected_as(|setup| setup.slots = 100);
    hub.silent = true;
    for number in 0..20 {
        let command = agent.run(&mut hub, number);
        agent.type_out(command, 4 * GRANT);
        agent.end(command, Outcome::Exited(0));
        agent.talk(&mut hub);
    }
    assert!(agent.core.tail_bytes() <= 64 * 1024 * 1024);
    agent.cut();
    hub.silent = false;
    agent.connect(&mut hub);
    agent.talk(&mut hub);
    let mut whole = 0;
    for number in 0..20 {
        assert_eq!(hub.stream(id(number)).log.end(), 4 * GRANT, "nothing is lost in silence");
        whole += usize::from(hub.gaps(id(number)).is_empty());
    }
    assert!((14..=16).contains(&whole), "{whole}");
}

#[test]
fn a_greeting_is_never_longer_than_the_hub_reads() {
    let (mut agent, hub) = connected_as(|setup| setup.slots = 1000);
    for number in 0..250 {
        hub.execute(&mut agent, id(number), 1, |spec| {
            spec.run = Run::Argv(vec!["\u{1}".repeat(20); 500]);
            spec.env = (0..200).map(|n| (format!("N{n}"), "v".repeat(100))).collect();
        });
    }
    while agent.core.poll_transmit(agent.now()).is_some() {}
    agent.cut();
    agent.dial();
    let frame = agent.core.poll_transmit(agent.now()).unwrap();
    assert!(frame.len() <= GREETING_BYTES_MAX, "{}", frame.len());
    agent.cut();

    let greeting = agent.connect(&mut Hub::default());
    let whole = codec::encode(&Envelope::bare(Greeting::Agent(greeting.clone()))).len();
    assert!(whole <= Limits::default().message_bytes_max, "{whole}");
    assert_eq!(greeting.commands.len(), 250, "that it is held goes before what it is");
    assert!(greeting.commands.iter().any(|held| held.spec.is_some()));
}

#[test]
fn what_an_agent_says_of_itself_is_cut_before_its_greeting_is_too_long() {
    let (mut agent, _) = connected_as(|setup| {
        setup.about.capabilities = vec!["\u{10ffff}".repeat(64); 64];
    });
    agent.cut();
    let greeting = agent.greet();
    let capabilities = greeting.about.capabilities.len();
    assert!((32..64).contains(&capabilities), "{capabilities}");
    let frame = codec::encode(&Envelope::bare(Greeting::Agent(greeting)));
    assert!(frame.len() <= GREETING_BYTES_MAX, "{}", frame.len());
}

#[test]
fn what_a_greeting_has_no_room_for_comes_right_after_it_in_parts() {
    let (mut agent, mut hub) = connected_as(|setup| setup.slots = 1000);
    for number in 0..100 {
        hub.execute(&mut agent, id(number), 1, |spec| {
            spec.run = Run::Text("x".repeat(if number == 50 { 60_000 } else { 2_000 }));
        });
    }
    while agent.core.poll_transmit(agent.now()).is_some() {}
    agent.cut();
    let greeting = agent.greet();
    assert!(greeting.more && !greeting.commands.is_empty(), "as many as there is room for");
    let mut listed: Vec<_> = greeting.commands.iter().map(|held| held.command).collect();
    // It ends before the hub has answered: that is news, and comes after.
    agent.end(listed[0], Outcome::Exited(0));
    hub.acknowledge(&mut agent);
    let rules = Rules::from(&Limits::default());
    let mut more = true;
    while let Some(frame) = agent.core.poll_transmit(agent.now()) {
        assert!(frame.len() < 128 * 1024, "{}", frame.len());
        match codec::decode::<AgentToHub>(&frame, rules).remove(0).unwrap().message {
            AgentToHub::Commands(part) => {
                assert!(more, "one part too many");
                assert!(!part.commands.is_empty());
                listed.extend(part.commands.iter().map(|held| held.command));
                more = part.more;
            }
            other => assert!(!more, "{other:?} came before the rest"),
        }
    }
    assert!(!more, "the last part says so");
    listed.sort();
    assert_eq!(listed, (0..100).map(id).collect::<Vec<_>>());
}

#[test]
fn a_hub_that_gives_too_much_is_told_so() {
    let (mut agent, mut hub) = connected();
    for number in 0..300 {
        hub.execute(&mut agent, id(number), 1, |_| {});
    }
    assert_eq!(agent.core.running().count(), 256);
    let heard = agent.talk(&mut hub);
    assert_eq!(ending(&heard, id(299)).status, CommandStatus::Failed);
}

// ---- input ----------------------------------------------------------------

#[test]
fn keys_arrive_once_and_in_order_whatever_is_repeated_or_skipped() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    hub.input(&mut agent, command, "d1", 0, b"hel");
    hub.input(&mut agent, command, "d1", 0, b"hello");
    hub.input(&mut agent, command, "d2", 0, b"!");
    assert_eq!(agent.typed(command), b"hello!");
    let heard = agent.talk(&mut hub);
    assert_eq!(heard, [taken(command, "d1", 5, false), taken(command, "d2", 1, false)]);

    hub.input(&mut agent, command, "d1", 7, b"rld");
    assert_eq!(agent.talk(&mut hub), [taken(command, "d1", 5, true)]);
    hub.input(&mut agent, command, "d1", 5, b" world");
    hub.input(&mut agent, command, "d1", 7, b"orld");
    assert_eq!(agent.typed(command), b" world");
    assert_eq!(agent.talk(&mut hub), [taken(command, "d1", 11, false)]);
}

#[test]
fn what_was_typed_into_a_lost_link_is_asked_for_again() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    hub.input(&mut agent, command, "d1", 0, b"abc");
    assert_eq!(agent.typed(command), b"abc");
    hub.input(&mut agent, command, "d1", 3, b"def");
    agent.talk(&mut hub);
    agent.cut();
    agent.connect(&mut hub);
    let heard = agent.talk(&mut hub);
    assert!(heard.contains(&taken(command, "d1", 3, true)), "{heard:?}");
    // Whether or not it comes again, what had arrived is not lost or doubled.
    hub.input(&mut agent, command, "d1", 3, b"defg");
    assert_eq!(agent.typed(command), b"defg");
}

#[test]
fn a_handler_that_reads_no_input_makes_its_writers_wait() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    let piece = vec![b'x'; 16 * 1024];
    for at in 0..80 {
        hub.input(&mut agent, command, "d1", at * 16 * KIB, &piece);
    }
    let heard = agent.talk(&mut hub);
    assert!(heard.len() <= 1, "only the newest word waits: {heard:?}");
    assert_eq!(agent.typed(command).len() as u64, 1024 * KIB);
    assert_eq!(agent.talk(&mut hub), [taken(command, "d1", 1024 * KIB, true)]);
    hub.input(&mut agent, command, "d1", 1024 * KIB, b"y");
    assert_eq!(agent.typed(command), b"y");
}

#[test]
fn input_for_what_does_not_run_is_refused() {
    let (mut agent, mut hub) = connected();
    hub.input(&mut agent, id(1), "d1", 0, b"x");
    let [AgentToHub::Error(refusal)] = &agent.talk(&mut hub)[..] else { panic!() };
    assert_eq!(refusal.code, ErrorCode::NotRunning);
}

#[test]
fn an_interrupt_passes_a_resize_and_that_passes_input() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    let size = |cols| TerminalSize { cols, rows: 24 };
    hub.input(&mut agent, command, "d1", 0, b"x");
    hub.say(&mut agent, HubToAgent::Resize(TerminalResize { command, size: size(90) }));
    hub.say(&mut agent, HubToAgent::Resize(TerminalResize { command, size: size(100) }));
    hub.interrupt(&mut agent, command, None);
    let grace = Duration::from_secs(5);
    assert_eq!(agent.event(command), Some(ExecutionEvent::Interrupt { grace }));
    assert_eq!(agent.event(command), Some(ExecutionEvent::Resize(size(100))));
    assert_eq!(agent.core.take_event(command, false), None, "no input for who has no room");
    assert_eq!(agent.event(command), Some(ExecutionEvent::Input(Bytes::from_static(b"x"))));
    assert_eq!(agent.event(command), None);
}

// ---- the link -------------------------------------------------------------

#[test]
fn a_silent_hub_is_pinged_and_then_given_up() {
    let (mut agent, mut hub) = connected();
    agent.wait(2_000);
    assert_eq!(agent.talk(&mut hub), [AgentToHub::Ping(HeartbeatBeat { n: 1 })]);
    agent.wait(3_000);
    let last = std::iter::from_fn(|| agent.core.poll_transmit(agent.now())).last();
    assert!(matches!(last, Some(Frame::Close(close)) if close.code == CloseCode::Silent));
}

#[test]
fn a_close_that_cannot_be_written_does_not_keep_the_agent_out() {
    let (mut agent, _hub) = connected();
    agent.wait(5_000);
    assert_eq!(agent.core.poll_dial(), None, "the close may still be written");
    agent.wait(2_000);
    assert_eq!(agent.core.poll_dial(), Some(DialAction::HangUp));
    agent.wait(1_000);
    assert!(matches!(agent.core.poll_dial(), Some(DialAction::Dial { .. })));
}

#[test]
fn only_the_newest_figures_wait_and_a_new_hub_hears_them_again() {
    let (mut agent, mut hub) = connected();
    let note = |note: &str| AgentReport { note: Some(note.into()), ..AgentReport::default() };
    agent.core.report(note("old"));
    agent.core.report(note("new"));
    assert_eq!(agent.talk(&mut hub), [AgentToHub::Status(note("new"))]);
    agent.cut();
    agent.connect(&mut hub);
    assert_eq!(agent.talk(&mut hub), [AgentToHub::Status(note("new"))]);
    hub.say(&mut agent, HubToAgent::Control(AgentControl { action: ControlAction::Report }));
    assert!(agent.heard(&AgentOutput::Report));
    assert_eq!(agent.talk(&mut hub), [AgentToHub::Status(note("new"))]);
}

#[test]
fn a_token_is_renewed_on_the_link() {
    let (mut agent, mut hub) = connected();
    hub.say(&mut agent, HubToAgent::RefreshNeeded(RefreshNeeded { expires_in_ms: 60_000 }));
    assert_eq!(agent.core.poll_refresh(), Some(RefreshWanted { refused: false }));
    assert_eq!(agent.core.poll_refresh(), None);
    agent.core.refresh("fresh".into(), agent.now());
    let [AgentToHub::RefreshToken(refresh)] = &agent.talk(&mut hub)[..] else { panic!() };
    assert_eq!(refresh.token.reveal(), "fresh");
}

#[test]
fn an_agent_that_stops_ends_what_runs_and_says_goodbye_last() {
    let (mut agent, mut hub) = connected_as(|setup| setup.slots = 1);
    let command = agent.run(&mut hub, 1);
    hub.execute(&mut agent, id(2), 1, |_| {});
    agent.type_out(command, 50_000);
    hub.say(&mut agent, HubToAgent::Control(AgentControl { action: ControlAction::Stop }));
    assert!(matches!(agent.event(command), Some(ExecutionEvent::Interrupt { .. })));
    let heard = agent.talk(&mut hub);
    assert_eq!(ending(&heard, id(2)).status, CommandStatus::Interrupted);
    agent.core.signalled(command);
    agent.end(command, Outcome::Signalled(2));
    let heard = agent.talk(&mut hub);
    assert!(matches!(heard.last(), Some(AgentToHub::Disconnect(_))), "{heard:?}");
    assert_eq!(ending(&heard, command).status, CommandStatus::Interrupted);
    assert_eq!(hub.text(command), text(0, 50_000));
    assert_eq!(hub.closed.as_ref().map(|close| close.code), Some(CloseCode::Normal));
    assert!(agent.core.connection().is_over());
}

#[test]
fn an_agent_that_stops_waits_no_longer_than_it_said() {
    let (mut agent, mut hub) = connected();
    hub.silent = true;
    let command = agent.run(&mut hub, 1);
    agent.type_out(command, 3 * GRANT);
    agent.core.stop(agent.now());
    agent.end(command, Outcome::Exited(0));
    for _ in 0..14 {
        agent.wait(1_000);
        hub.say(&mut agent, HubToAgent::Ping(HeartbeatBeat { n: 1 }));
        agent.talk(&mut hub);
        assert!(!agent.core.connection().is_over());
    }
    agent.wait(1_000);
    agent.talk(&mut hub);
    assert!(agent.core.connection().is_over() && hub.closed.is_some());
}

#[test]
fn an_agent_without_a_link_stops_when_nothing_runs() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.cut();
    agent.core.stop(agent.now());
    assert!(!agent.core.connection().is_over());
    agent.end(command, Outcome::Signalled(2));
    assert!(agent.core.connection().is_over());
}

// ---- random lives ---------------------------------------------------------

#[derive(Debug, Clone)]
enum Op {
    Write(u64),
    Talk(usize),
    Wait(u64),
    /// What was written into the link and not heard is gone.
    Cut,
    Forget,
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u64..60_000).prop_map(Op::Write),
        4 => (0usize..12).prop_map(Op::Talk),
        3 => (0u64..20).prop_map(Op::Wait),
        1 => (10_000u64..40_000).prop_map(Op::Wait),
        2 => Just(Op::Cut),
        1 => Just(Op::Forget),
    ]
}

proptest! {
    /// Whatever happens to links and hubs: once the agent has talked to a hub
    /// to the end, that hub has every byte in its place, or its gap.
    #[test]
    fn every_byte_arrives_in_its_place_or_in_a_gap(life in prop::collection::vec(ops(), 1..50)) {
        let (mut agent, mut hub) = connected_as(|setup| setup.tail_bytes = 128 * 1024);
        let command = agent.run(&mut hub, 1);
        agent.talk(&mut hub);
        for op in life {
            match op {
                Op::Write(bytes) => agent.type_some(command, bytes),
                Op::Talk(frames) => drop(agent.talk_some(&mut hub, frames)),
                Op::Wait(ms) => agent.wait(ms),
                Op::Cut => {
                    while agent.core.poll_transmit(agent.now()).is_some() {}
                    agent.cut();
                }
                Op::Forget => {
                    hub = Hub::default();
                    agent.cut();
                }
            }
            agent.reconnect_if_lost(&mut hub);
        }
        agent.end(command, Outcome::Exited(0));
        agent.wait(10);
        agent.reconnect_if_lost(&mut hub);
        agent.talk(&mut hub);
        let written = agent.written.get(&command).copied().unwrap_or(0);
        let stream = hub.stream(command);
        prop_assert_eq!(stream.log.end(), written);
        prop_assert_eq!(hub.wrong, None);
    }
}

// ---- the journal ------------------------------------------------------------

#[test]
fn nothing_begins_before_it_is_written_down() {
    let (mut agent, hub) = journaled(&[]);
    assert_eq!(agent.core.instance(), InstanceId::from_u128(9), "the journal's");
    hub.execute(&mut agent, id(1), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(1, 1)]);
    hub.execute(&mut agent, id(2), 1, |_| {});
    assert_eq!(agent.begin(id(1)), None);
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(1)), Some(1));
    assert_eq!(agent.begin(id(2)), None);
    assert_eq!(agent.next_batch(), [begun(2, 1)]);
    agent.end(id(1), Outcome::Exited(3));
    hub.execute(&mut agent, id(3), 1, |_| {});
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(2)), Some(1));
    let records = agent.next_batch();
    assert_eq!((records.len(), &records[1]), (2, &begun(3, 1)), "what gathered goes at once");
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(3)), Some(1));
    hub.settle(&mut agent, id(1));
    hub.settle(&mut agent, id(1));
    assert_eq!(agent.next_batch(), [settled(1, 1)], "once");
}

#[test]
fn how_a_command_ended_is_said_without_waiting_for_the_journal() {
    let (mut agent, mut hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    agent.next_batch();
    agent.recorded(Ok(()));
    agent.begin(id(1)).unwrap();
    agent.type_out(id(1), 1_000);
    agent.end(id(1), Outcome::Exited(3));
    let heard = agent.talk(&mut hub);
    let said = ending(&heard, id(1));
    assert_eq!(agent.next_batch(), [JournalRecord::Ended(said)]);
}

#[test]
fn a_command_that_cannot_be_written_down_is_not_started() {
    let (mut agent, mut hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    agent.next_batch();
    agent.recorded(Err("the disk is full"));
    assert_eq!(agent.begin(id(1)), None);
    let heard = agent.talk(&mut hub);
    let end = ending(&heard, id(1));
    assert_eq!(end.status, CommandStatus::Failed);
    let why = "not started: the agent's journal could not be written: the disk is full";
    assert_eq!(end.end.error.as_deref(), Some(why));
    assert_eq!(agent.next_batch(), [], "there is nothing to say of it");
    hub.settle(&mut agent, id(1));
    assert_eq!(agent.next_batch(), []);
    // The next one finds out for itself.
    hub.execute(&mut agent, id(2), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(2, 1)]);
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(2)), Some(1));
}

#[test]
fn a_journal_that_does_not_answer_holds_nobody_for_ever() {
    let (mut agent, mut hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(1, 1)]);
    agent.wait_linked(&hub, 9_999);
    assert_eq!(agent.talk(&mut hub).iter().find(|w| matches!(w, AgentToHub::Complete(_))), None);
    hub.execute(&mut agent, id(2), 1, |_| {});
    agent.wait(1);
    let heard = agent.talk(&mut hub);
    assert_eq!(ending(&heard, id(1)).status, CommandStatus::Failed);
    for number in 3..100 {
        hub.execute(&mut agent, id(number), 1, |_| {});
        agent.wait_linked(&hub, 10_000);
        hub.settle(&mut agent, id(number));
        agent.talk(&mut hub);
    }
    // Late, and too late: nothing starts, and what may be taken for begun ends.
    agent.recorded(Ok(()));
    assert_eq!((agent.begin(id(1)), agent.begin(id(2))), (None, None));
    let records = agent.next_batch();
    let [JournalRecord::Ended(ended)] = &records[..] else { panic!("{records:?}") };
    assert_eq!((ended.command, ended.status), (id(1), CommandStatus::Failed));
}

#[test]
fn an_interrupt_finds_a_command_that_is_being_written_down() {
    let (mut agent, mut hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(1, 1)]);
    hub.execute(&mut agent, id(2), 1, |_| {});
    for number in [1, 2] {
        hub.interrupt(&mut agent, id(number), None);
        let heard = agent.talk(&mut hub);
        assert_eq!(ending(&heard, id(number)).status, CommandStatus::Interrupted);
    }
    agent.recorded(Ok(()));
    assert_eq!((agent.begin(id(1)), agent.begin(id(2))), (None, None));
    let records = agent.next_batch();
    let [JournalRecord::Ended(ended)] = &records[..] else { panic!("{records:?}") };
    assert_eq!((ended.command, ended.status), (id(1), CommandStatus::Interrupted));
}

#[test]
fn a_later_attempt_takes_the_place_of_one_that_is_being_written_down() {
    let (mut agent, hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(1, 1)]);
    hub.execute(&mut agent, id(1), 2, |_| {});
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(1)), None);
    let attempts: Attempts = [begun(1, 1)].iter().chain(&agent.next_batch()).collect();
    assert_eq!(attempts.records(), [begun(1, 2)]);
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(1)), Some(2));
}

#[test]
fn an_agent_that_stops_writes_to_the_end() {
    let (mut agent, mut hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    agent.next_batch();
    agent.recorded(Ok(()));
    agent.begin(id(1)).unwrap();
    hub.execute(&mut agent, id(2), 1, |_| {});
    assert_eq!(agent.next_batch(), [begun(2, 1)]);
    agent.core.stop(agent.now());
    agent.end(id(1), Outcome::Exited(0));
    agent.talk(&mut hub);
    assert!(!agent.core.connection().is_over());
    agent.recorded(Ok(()));
    assert_eq!(agent.next_batch().len(), 2, "both have ended");
    assert!(!agent.core.connection().is_over());
    agent.recorded(Ok(()));
    assert!(agent.core.connection().is_over());
    assert_eq!(agent.begin(id(2)), None);
}

#[test]
fn a_journal_that_failed_gets_what_it_missed() {
    let (mut agent, hub) = journaled(&[]);
    hub.execute(&mut agent, id(1), 1, |_| {});
    agent.next_batch();
    agent.recorded(Ok(()));
    agent.begin(id(1)).unwrap();
    agent.end(id(1), Outcome::Exited(0));
    let ended = agent.next_batch();
    agent.recorded(Err("out of order"));
    assert_eq!(agent.next_batch(), []);
    hub.settle(&mut agent, id(1));
    agent.wait(999);
    assert_eq!(agent.next_batch(), []);
    agent.wait(1);
    assert_eq!(agent.next_batch(), [&ended[..], &[settled(1, 1)]].concat());
    // A command that is to begin does not wait for that.
    agent.recorded(Err("out of order"));
    hub.execute(&mut agent, id(2), 1, |_| {});
    assert_eq!(agent.next_batch(), [&ended[..], &[settled(1, 1), begun(2, 1)]].concat());
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(2)), Some(1));
}

#[test]
fn what_an_earlier_process_began_is_listed_and_never_begun_again() {
    let end = CommandEnd { exit_code: Some(3), end: 500, ..CommandEnd::default() };
    let ended = JournalRecord::Ended(CommandComplete {
        command: id(2),
        attempt: 2,
        status: CommandStatus::Completed,
        end: end.clone(),
    });
    let records =
        [begun(1, 1), begun(2, 2), ended, begun(3, 1), settled(3, 1), begun(4, 1), settled(5, 7)];
    let mut agent = Agent::new(|setup| setup.journal = Some(recovered(&records)));
    let mut hub = Hub::default();
    let greeting = agent.connect(&mut hub);
    assert_eq!(greeting.instance, InstanceId::from_u128(9));
    let listed: Vec<_> =
        greeting.commands.iter().map(|held| (held.command, held.attempt, held.status)).collect();
    let unknown = CommandStatus::Unknown;
    let completed = CommandStatus::Completed;
    assert_eq!(listed, [(id(1), 1, unknown), (id(2), 2, completed), (id(4), 1, unknown)]);
    assert_eq!(greeting.commands[1].end.as_ref(), Some(&end));
    assert!(greeting.commands.iter().all(|held| held.stream.is_none() && held.spec.is_none()));

    for (number, attempt, status) in
        [(1, 1, unknown), (2, 2, completed), (3, 1, unknown), (5, 7, unknown)]
    {
        hub.execute(&mut agent, id(number), attempt, |_| {});
        assert_eq!(agent.next_batch(), [], "{number}");
        let heard = agent.talk(&mut hub);
        assert_eq!((ending(&heard, id(number)).status, number), (status, number));
    }
    for attempt in 1..7 {
        hub.execute(&mut agent, id(5), attempt, |_| {});
    }
    assert_eq!(agent.next_batch(), []);
    hub.execute(&mut agent, id(1), 2, |_| {});
    let attempts: Attempts = records.iter().chain(&agent.next_batch()).collect();
    assert!(attempts.records().contains(&begun(1, 2)));
    agent.recorded(Ok(()));
    assert_eq!(agent.begin(id(1)), Some(2));
    hub.settle_attempt(&mut agent, id(2), 2);
    assert_eq!(agent.next_batch(), [settled(2, 2)]);
}

fn recovered(records: &[JournalRecord]) -> Recovered {
    Recovered { instance: InstanceId::from_u128(9), records: records.to_vec() }
}

fn begun(command: u128, attempt: u32) -> JournalRecord {
    JournalRecord::Begun(CommandAccepted { command: id(command), attempt })
}

fn settled(command: u128, attempt: u32) -> JournalRecord {
    JournalRecord::Settled(CommandSettled { command: id(command), attempt })
}

/// A connected agent with a journal, and ten slots.
fn journaled(records: &[JournalRecord]) -> (Agent, Hub) {
    connected_as(|setup| {
        setup.slots = 10;
        setup.journal = Some(recovered(records));
    })
}

// ---- below the stories ----------------------------------------------------

fn id(number: u128) -> CommandId {
    CommandId::from_u128(number)
}

/// What each program writes at an offset.
fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn text(from: u64, to: u64) -> Vec<u8> {
    (from..to).map(byte_at).collect()
}

fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn ending(heard: &[AgentToHub], command: CommandId) -> CommandComplete {
    let find = |word: &AgentToHub| match word {
        AgentToHub::Complete(complete) if complete.command == command => Some(complete.clone()),
        _ => None,
    };
    heard.iter().find_map(find).unwrap_or_else(|| panic!("no end of {command} in {heard:?}"))
}

fn interrupting(command: CommandId, stage: InterruptStage) -> AgentToHub {
    AgentToHub::Interrupting(CommandInterrupting { command, attempt: 1, stage })
}

fn taken(command: CommandId, writer: &str, offset: u64, resend: bool) -> AgentToHub {
    let writer = writer.parse().unwrap();
    AgentToHub::InputTaken(TerminalInputTaken { command, writer, offset, resend })
}

#[test]
fn log_records_go_after_all_else_and_on_a_new_link_from_what_was_taken() {
    let logs = LogTail::new(StreamId::from_u128(9), LogLimits::default());
    let (mut agent, mut hub) = connected_as(|setup| setup.logs = Some(logs));
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    agent.core.push_log(0, log_record(), agent.now());
    agent.type_out(command, 40_000);
    agent.core.report(AgentReport::default());
    hub.say(&mut agent, HubToAgent::Ping(HeartbeatBeat { n: 1 }));
    agent.wait(10);
    let heard = agent.talk(&mut hub);
    let mut kinds: Vec<&str> = heard.iter().map(Direction::kind).collect();
    kinds.dedup();
    assert_eq!(kinds, ["heartbeat:pong", "agent:status", "terminal:output", "log:batch"]);
    for offset in [0, 1] {
        agent.cut();
        agent.core.push_log(offset + 1, log_record(), agent.now());
        agent.connect(&mut hub);
        agent.wait(1_000);
        let heard = agent.talk(&mut hub);
        let Some(AgentToHub::Log(batch)) = heard.last() else { panic!("{heard:?}") };
        assert_eq!((batch.offset, batch.end()), (offset, offset + 2));
        let taken = LogTaken { stream: batch.stream, offset: offset + 1 };
        hub.say(&mut agent, HubToAgent::LogTaken(taken));
    }
}

fn log_record() -> LogRecord {
    LogRecord {
        ts_ms: 0,
        level: LogLevel::Info,
        target: "app".into(),
        message: "x".into(),
        fields: BTreeMap::new(),
    }
}

fn connected() -> (Agent, Hub) {
    connected_as(|setup| setup.slots = 10)
}

fn connected_as(change: impl FnOnce(&mut AgentSetup)) -> (Agent, Hub) {
    let mut agent = Agent::new(change);
    let mut hub = Hub::default();
    agent.connect(&mut hub);
    (agent, hub)
}

/// An agent, its programs and its clock.
struct Agent {
    core: AgentCore,
    time: Duration,
    written: BTreeMap<CommandId, u64>,
    outputs: Vec<AgentOutput>,
}

impl Agent {
    fn new(change: impl FnOnce(&mut AgentSetup)) -> Self {
        let mut setup = AgentSetup::new("a1".parse().unwrap());
        change(&mut setup);
        let now = Now { monotonic: Duration::ZERO, wall_ms: 1_764_000_000_000 };
        let core = AgentCore::new(setup, [7; 32], now);
        Self { core, time: Duration::ZERO, written: BTreeMap::new(), outputs: Vec::new() }
    }

    fn now(&self) -> Now {
        let passed = u64::try_from(self.time.as_millis()).unwrap();
        Now { monotonic: self.time, wall_ms: 1_764_000_000_000 + passed }
    }

    /// Lets time pass, stopping at every deadline on the way.
    fn wait(&mut self, ms: u64) {
        let until = self.time + Duration::from_millis(ms);
        for _ in 0..100_000 {
            let next = self.core.deadline().unwrap_or(Duration::MAX).max(self.time);
            if next > until {
                self.time = until;
                self.core.handle_timeout(self.now());
                return;
            }
            self.time = next;
            self.core.handle_timeout(self.now());
        }
        panic!("a deadline that is due and stays: {:?} at {:?}", self.core.deadline(), self.time);
    }

    /// Lets time pass on a link that is never silent.
    fn wait_linked(&mut self, hub: &Hub, ms: u64) {
        for _ in 0..ms / 1_000 {
            self.wait(1_000);
            hub.say(self, HubToAgent::Ping(HeartbeatBeat { n: 1 }));
        }
        self.wait(ms % 1_000);
    }

    /// Whether the core has said this since it was last asked.
    fn heard(&mut self, output: &AgentOutput) -> bool {
        self.outputs.extend(std::iter::from_fn(|| self.core.poll_output()));
        let before = self.outputs.len();
        self.outputs.retain(|heard| heard != output);
        self.outputs.len() < before
    }

    // ---- the journal

    /// What the journal is to write now.
    fn next_batch(&mut self) -> Vec<JournalRecord> {
        self.outputs.extend(std::iter::from_fn(|| self.core.poll_output()));
        let is_journal = |output: &AgentOutput| matches!(output, AgentOutput::Journal(_));
        let at = self.outputs.iter().position(is_journal);
        match at.map(|at| self.outputs.remove(at)) {
            Some(AgentOutput::Journal(records)) => records,
            _ => Vec::new(),
        }
    }

    fn recorded(&mut self, result: Result<(), &str>) {
        self.core.handle_journaled(result, self.now());
    }

    // ---- programs

    fn run(&mut self, hub: &mut Hub, number: u128) -> CommandId {
        hub.execute(self, id(number), 1, |_| {});
        assert_eq!(self.begin(id(number)), Some(1));
        id(number)
    }

    fn begin(&mut self, command: CommandId) -> Option<u32> {
        if !self.heard(&AgentOutput::Execute(command)) {
            return None;
        }
        let (attempt, _) = self.core.begin(command, self.now())?;
        Some(attempt)
    }

    /// Writes this much, if it is let.
    fn type_some(&mut self, command: CommandId, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            let at = self.written.entry(command).or_default();
            let data = text(*at, *at + left.min(50_000));
            let now = Now { monotonic: self.time, wall_ms: 0 };
            let taken = self.core.write(command, Channel::Pty, &data, now) as u64;
            *at += taken;
            left -= taken;
            if taken == 0 {
                return;
            }
        }
    }

    fn type_out(&mut self, command: CommandId, bytes: u64) {
        let before = self.written.get(&command).copied().unwrap_or(0);
        self.type_some(command, bytes);
        assert_eq!(self.written[&command], before + bytes, "it was held");
    }

    fn type_until_held(&mut self, command: CommandId) -> u64 {
        let before = self.written.get(&command).copied().unwrap_or(0);
        self.type_some(command, 100 * 1024 * 1024);
        self.written[&command] - before
    }

    fn event(&mut self, command: CommandId) -> Option<ExecutionEvent> {
        self.core.take_event(command, true)
    }

    /// All that was typed and waits for the program.
    fn typed(&mut self, command: CommandId) -> Vec<u8> {
        assert!(self.heard(&AgentOutput::Event(command)));
        let mut typed = Vec::new();
        while let Some(event) = self.core.take_event(command, true) {
            let ExecutionEvent::Input(data) = event else { panic!("{event:?}") };
            typed.extend_from_slice(&data);
        }
        typed
    }

    fn end(&mut self, command: CommandId, outcome: Outcome) {
        self.core.ended(command, outcome, self.now());
    }

    // ---- links

    fn dial(&mut self) {
        self.core.retry_now(self.now());
        self.core.handle_timeout(self.now());
        while let Some(action) = self.core.poll_dial() {
            if matches!(action, DialAction::Dial { .. }) {
                self.core.handle_dialed(None, self.now());
                return;
            }
        }
        panic!("it does not dial: {:?}", self.core.connection());
    }

    fn greet(&mut self) -> AgentConnect {
        self.dial();
        let frame = self.core.poll_transmit(self.now()).expect("a greeting");
        assert_eq!(self.core.poll_transmit(self.now()), None, "it waits for the answer");
        let rules = Rules::from(&Limits::default());
        match codec::decode::<Greeting>(&frame, rules).remove(0).unwrap().message {
            Greeting::Agent(greeting) => greeting,
            Greeting::Dashboard(_) => panic!("the greeting of a dashboard"),
        }
    }

    /// Returns what it says about itself, with all that it lists.
    fn connect(&mut self, hub: &mut Hub) -> AgentConnect {
        let mut greeting = self.greet();
        hub.acknowledge(self);
        while greeting.more {
            let part = self.core.poll_transmit(self.now()).expect("the rest");
            let rules = Rules::from(&Limits::default());
            match codec::decode::<AgentToHub>(&part, rules).remove(0).unwrap().message {
                AgentToHub::Commands(HeldCommands { commands, more }) => {
                    greeting.commands.extend(commands);
                    greeting.more = more;
                }
                other => panic!("{other:?} before the rest"),
            }
        }
        hub.open_listed(self, &greeting.commands);
        greeting
    }

    fn cut(&mut self) {
        self.core.handle_lost(&Close::new(CloseCode::Lost, "cut"), self.now());
    }

    fn reconnect_if_lost(&mut self, hub: &mut Hub) {
        while self.core.poll_dial().is_some() {}
        let is_closing = matches!(self.core.link, Link::Closing { .. });
        if is_closing {
            self.cut();
        }
        if matches!(self.core.link, Link::None | Link::Greeting(..)) {
            self.cut();
            self.connect(hub);
        }
    }

    /// Everything that the agent has to say goes to the hub, and the hub's
    /// answers come back, until neither has more.
    fn talk(&mut self, hub: &mut Hub) -> Vec<AgentToHub> {
        self.talk_some(hub, usize::MAX)
    }

    fn talk_some(&mut self, hub: &mut Hub, frames: usize) -> Vec<AgentToHub> {
        let mut heard = Vec::new();
        for _ in 0..frames {
            let Some(frame) = self.core.poll_transmit(self.now()) else { break };
            heard.extend(hub.hear(self, &frame));
        }
        heard
    }
}

/// A hub that stores what it is sent, and grants at once.
struct Hub {
    features: Vec<Feature>,
    chunk_bytes_max: u64,
    /// Says nothing about streams by itself.
    silent: bool,
    streams: BTreeMap<CommandId, HubStream>,
    /// A byte that is not what the program wrote there.
    wrong: Option<u64>,
    closed: Option<Close>,
}

struct HubStream {
    log: Log,
    allowed: u64,
    gaps: Vec<(u64, u64, GapReason)>,
    text: Vec<u8>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            features: vec![Feature::Binary],
            chunk_bytes_max: 16 * KIB,
            silent: false,
            streams: BTreeMap::new(),
            wrong: None,
            closed: None,
        }
    }
}

impl Hub {
    fn say(&self, agent: &mut Agent, message: HubToAgent) {
        assert!(self.closed.is_none(), "the link is over");
        agent.core.handle_frame(&codec::encode(&Envelope::bare(message)), agent.now());
    }

    fn welcome(&mut self, agent: &mut Agent, greeting: &AgentConnect) {
        self.acknowledge(agent);
        self.open_listed(agent, &greeting.commands);
    }

    fn acknowledge(&mut self, agent: &mut Agent) {
        self.say(
            agent,
            HubToAgent::Ack(ConnectionAck {
                protocol: 1,
                tenant: "t1".parse().unwrap(),
                peer: Peer::Agent("a1".parse().unwrap()),
                hub: HubInstance::from_u128(1),
                queue: QueueEpoch::from_u128(1),
                features: self.features.clone(),
                limits: LinkLimits {
                    chunk_bytes_max: self.chunk_bytes_max,
                    ..Limits::default().for_link()
                },
                heartbeat: Heartbeat { idle_ms: 2_000, timeout_ms: 5_000 },
            }),
        );
        assert!(agent.core.connection().is_connected());
    }

    fn open_listed(&mut self, agent: &mut Agent, listed: &[HeldCommand]) {
        for held in listed {
            if let Some(stream) = held.stream {
                self.open(held.command, stream.stream, stream.from);
                if !self.silent {
                    self.take(agent, held.command);
                }
            }
        }
    }

    fn open(&mut self, command: CommandId, stream: StreamId, from: u64) {
        let known = self.streams.get(&command).is_some_and(|known| known.log.stream() == stream);
        if !known {
            let log = Log::new_after_loss(stream, from, GapReason::HubLoss);
            let allowed = from + GRANT;
            let opened = HubStream { log, allowed, gaps: Vec::new(), text: Vec::new() };
            self.streams.insert(command, opened);
        }
    }

    fn stream(&self, command: CommandId) -> &HubStream {
        self.streams.get(&command).expect("the hub knows the stream")
    }

    fn text(&self, command: CommandId) -> Vec<u8> {
        self.stream(command).text.clone()
    }

    fn gaps(&self, command: CommandId) -> Vec<(u64, u64, GapReason)> {
        self.stream(command).gaps.clone()
    }

    fn take(&mut self, agent: &mut Agent, command: CommandId) {
        let stream = self.streams.get_mut(&command).unwrap();
        let stored = stream.log.end();
        stream.allowed = stream.allowed.max(stored + GRANT);
        let taken = TerminalTaken { stream: stream.log.stream(), stored, allowed: stream.allowed };
        self.say(agent, HubToAgent::Taken(taken));
    }

    fn execute(
        &self,
        agent: &mut Agent,
        command: CommandId,
        attempt: u32,
        change: impl FnOnce(&mut CommandSpec),
    ) {
        let mut spec = CommandSpec::from(Run::Shell("make".into()));
        change(&mut spec);
        self.say(agent, HubToAgent::Execute(CommandExecute { command, attempt, spec }));
    }

    fn interrupt(&self, agent: &mut Agent, command: CommandId, grace_ms: Option<u64>) {
        let interrupt = CommandInterrupt { command, attempt: Some(1), grace_ms };
        self.say(agent, HubToAgent::Interrupt(interrupt));
    }

    fn settle(&self, agent: &mut Agent, command: CommandId) {
        self.settle_attempt(agent, command, 1);
    }

    fn settle_attempt(&self, agent: &mut Agent, command: CommandId, attempt: u32) {
        self.say(agent, HubToAgent::Settled(CommandSettled { command, attempt }));
    }

    fn input(&self, agent: &mut Agent, command: CommandId, who: &str, offset: u64, data: &[u8]) {
        let writer: DashboardId = who.parse().unwrap();
        let data = Bytes::copy_from_slice(data);
        self.say(
            agent,
            HubToAgent::Input(TerminalInput { command, writer: Some(writer), offset, data }),
        );
    }

    /// Reads one frame as a hub does, and answers.
    fn hear(&mut self, agent: &mut Agent, frame: &Frame) -> Vec<AgentToHub> {
        if let Frame::Close(close) = frame {
            self.closed = Some(close.clone());
        }
        let rules = Rules {
            chunk_bytes_max: usize::try_from(self.chunk_bytes_max).unwrap(),
            ..Rules::from(&Limits::default())
        };
        let heard: Vec<AgentToHub> = codec::decode::<AgentToHub>(frame, rules)
            .into_iter()
            .map(|message| message.expect("a message").message)
            .collect();
        for word in &heard {
            self.mind(agent, word);
        }
        heard
    }

    fn mind(&mut self, agent: &mut Agent, word: &AgentToHub) {
        match word {
            AgentToHub::Started(started) => {
                self.open(started.command, started.stream, 0);
                if !self.silent {
                    self.take(agent, started.command);
                }
            }
            AgentToHub::Output(output) => {
                let find = |(id, known): (&CommandId, &mut HubStream)| {
                    (known.log.stream() == output.stream).then_some(*id)
                };
                let command =
                    self.streams.iter_mut().find_map(find).expect("started before its output");
                let stream = self.streams.get_mut(&command).unwrap();
                let end = output.offset + output.data.len() as u64;
                assert!(end <= stream.allowed, "beyond the grant: {end} > {}", stream.allowed);
                let known = stream.log.end().checked_sub(output.offset).expect("a jump");
                let new = output.data.get(usize::try_from(known).unwrap()..).unwrap_or_default();
                for (at, byte) in (stream.log.end()..).zip(new) {
                    if *byte != byte_at(at) {
                        self.wrong.get_or_insert(at);
                    }
                }
                stream.text.extend_from_slice(new);
                stream.log.append(output.offset, output.channel, &output.data).unwrap();
                if !self.silent && stream.allowed - stream.log.end() <= GRANT - 64 * KIB {
                    self.take(agent, command);
                }
            }
            AgentToHub::Gap(TerminalGap { stream: id, from, to, reason }) => {
                let stream =
                    self.streams.values_mut().find(|known| known.log.stream() == *id).unwrap();
                assert!(*from <= stream.log.end(), "a jump");
                if stream.log.skip(*to, reason.clone()).is_some() {
                    stream.gaps.push((*from, *to, reason.clone()));
                    stream.allowed = stream.allowed.max(*to);
                }
            }
            _ => {} // nothing else needs an answer here
        }
    }
}

// What the binary form says is what the log says.
#[test]
fn a_chunk_is_the_frame_of_the_log() {
    let (mut agent, mut hub) = connected();
    let command = agent.run(&mut hub, 1);
    agent.talk(&mut hub);
    agent.type_out(command, 10);
    let Some(Frame::Binary(frame)) = agent.core.poll_transmit(agent.now()) else { panic!() };
    let header = parse_output(&frame).unwrap();
    assert_eq!((header.offset, header.channel), (0, Channel::Pty));
    assert_eq!(frame[OUTPUT_HEADER_BYTES..], text(0, 10));
}
