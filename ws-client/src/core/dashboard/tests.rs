//! The dashboard against a scripted hub, through the codec's bytes and in
//! virtual time.

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, HubInstance, InstanceId, QueueEpoch, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    Accepted, AgentAbout, AgentChanged, AgentList, AgentReport, AgentState, Channel,
    CommandChanged, CommandEnd, CommandInterrupt, CommandRequest, CommandSpec, CommandState,
    CommandStatus, ConnectionAck, Direction as _, EmergencyStop, Feature, From, Gap, GapReason,
    Greeting, Heartbeat, HeartbeatBeat, Lag, LogLevel, Peer, Presence, Priority, Run, Since,
    TerminalGap, TerminalInput, TerminalInputTaken, TerminalOpened, TerminalOutput,
    TerminalSubscription,
};

use super::*;
use crate::core::logs::LogLimits;

const C: CommandId = CommandId::from_u128(0xc);
const D: CommandId = CommandId::from_u128(0xd);
const S1: StreamId = StreamId::from_u128(1);
const S2: StreamId = StreamId::from_u128(2);
const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

// ---- the link ---------------------------------------------------------------

#[test]
fn a_returning_dashboard_greets_with_where_it_stands() {
    let mut w = World::new();
    w.dialed();
    assert_eq!(w.greeting().since, Since::default());
    w.ack(EPOCH);
    w.list(&[]);
    w.lose();
    w.dialed();
    let greeting = w.greeting();
    assert_eq!(greeting.since.roster.map(|at| at.revision), Some(w.revision));
    assert_eq!(greeting.dashboard.as_ref(), Some(w.core.id()));
}

#[test]
fn the_hubs_word_on_identity_is_final() {
    let mut w = World::new();
    w.dialed();
    w.greeting();
    let mut ack = ack(w.core.id(), EPOCH, HUB);
    ack.peer = Peer::Dashboard("somebody-else".parse().unwrap());
    w.hear(HubToDashboard::Ack(ack));
    assert_eq!(w.core.id().as_str(), "somebody-else");
}

#[test]
fn nothing_is_said_before_the_ack() {
    let mut w = World::new();
    w.request_stop();
    let _reader = w.core.read(Target::Command(C), Reading::default(), w.now);
    w.dialed();
    w.greeting();
    assert_eq!(w.said(), []);
    w.ack(EPOCH);
    assert_eq!(w.said_kinds(), ["system:emergency-stop", "subscribe"], "a stop goes first");
}

#[test]
fn pings_are_answered_and_silence_ends_the_link() {
    let mut w = World::up();
    w.hear(HubToDashboard::Ping(HeartbeatBeat { n: 7 }));
    assert_eq!(w.said(), [DashboardToHub::Pong(HeartbeatBeat { n: 7 })]);
    w.wait(15 * SECOND);
    assert_eq!(w.said(), [DashboardToHub::Ping(HeartbeatBeat { n: 1 })]);
    w.wait(30 * SECOND);
    assert_eq!(w.core.poll_dial(), Some(DialAction::HangUp));
    let state = w.core.connection();
    assert!(
        matches!(state, ConnectionState::Reconnecting { why, .. } if why.code == CloseCode::Silent)
    );
}

#[test]
fn what_cannot_be_understood_is_answered_and_survived() {
    let mut w = World::up();
    w.frame(&Frame::Text(Bytes::from_static(br#"{"type":"future:word","id":"x"}"#)));
    let said = w.said();
    let [DashboardToHub::Error(refusal)] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(refusal.in_reply_to, Some("x".parse().unwrap()));
    w.list(&[]);
}

// ---- requests ---------------------------------------------------------------

#[test]
fn a_request_is_answered_once_across_a_lost_link() {
    let mut w = World::up();
    let id = w.request_stop();
    assert_eq!(w.said_ids(), std::slice::from_ref(&id));
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.said_ids(), std::slice::from_ref(&id), "the same request");
    for _ in 0..2 {
        w.ok(&id, Accepted { stopped: Some(3), ..Accepted::default() });
    }
    assert_eq!(w.answers(), [(id, Ok(Some(3)))]);
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.said(), []);
}

#[test]
fn several_waiting_requests_travel_as_one_batch_in_order() {
    let mut w = World::new();
    let ids: Vec<_> = (0..5).map(|_| w.request_stop()).collect();
    w.connect(EPOCH);
    let frame = w.core.poll_transmit(w.now).unwrap();
    assert_eq!(w.core.poll_transmit(w.now), None);
    let sent: Vec<_> = decode(&frame).into_iter().filter_map(|envelope| envelope.id).collect();
    assert_eq!(sent, ids);
}

#[test]
fn a_refusal_reaches_the_caller_as_it_is() {
    let mut w = World::up();
    let id = w.request_stop();
    w.said();
    let refusal = Refusal::new(ErrorCode::LimitReached, "too many").reply_to(Some(id.clone()));
    let refusal = Refusal { retry_after_ms: Some(50), ..refusal };
    w.hear(HubToDashboard::Error(refusal.clone()));
    assert_eq!(w.answers(), [(id, Err(RequestError::Refused(refusal)))]);
    w.wait(SECOND);
    assert_eq!(w.said(), [], "nothing is tried again by itself");
}

#[test]
fn what_was_asked_too_fast_is_asked_again_in_time() {
    let mut w = World::up();
    let id = w.request_command();
    assert_eq!(w.said_ids(), std::slice::from_ref(&id));
    let refuse = |w: &mut World| {
        let refusal = Refusal::new(ErrorCode::RateLimited, "slow down").reply_to(Some(id.clone()));
        w.hear(HubToDashboard::Error(Refusal { retry_after_ms: Some(700), ..refusal }));
    };
    for _ in 0..3 {
        refuse(&mut w);
        w.wait(699 * MS);
        assert_eq!(w.said(), []);
        w.wait(MS);
        assert_eq!(w.said_ids(), std::slice::from_ref(&id), "the same request");
    }
    w.ok(&id, Accepted::default());
    assert_eq!(w.answers(), [(id.clone(), Ok(None))], "and it is answered once");
    refuse(&mut w);
    w.wait(SECOND);
    assert_eq!(w.said(), []);
}

#[test]
fn it_keeps_to_the_rates_of_the_hub_across_links() {
    let mut w = World::up();
    for _ in 0..70 {
        w.request_command();
    }
    assert_eq!(w.said().len(), 50, "a burst");
    assert_eq!(w.said().len(), 0);
    w.wait(SECOND);
    assert_eq!(w.said().len(), 20, "what was earned");
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.said().len(), 0, "a new link gives nothing back");
    w.wait(50 * MS);
    assert_eq!(w.said().len(), 1);
    // The deadline says when to look again.
    let deadline = w.core.deadline(w.now).unwrap();
    assert_eq!(deadline, w.now.monotonic + 50 * MS);
}

#[test]
fn an_interrupt_overtakes_requests_but_not_the_one_that_it_is_about() {
    let mut w = World::up();
    for _ in 0..50 {
        w.request_command();
    }
    w.said();
    let (waits, late) = (w.request_command(), w.request_of(CommandId::from_u128(7)));
    let other = CommandInterrupt { command: C, attempt: None, grace_ms: None };
    let own = CommandInterrupt { command: CommandId::from_u128(7), ..other.clone() };
    let about_it = w.core.request(DashboardToHub::Interrupt(own), None, w.now).unwrap();
    let at_once = w.core.request(DashboardToHub::Interrupt(other), None, w.now).unwrap();
    assert_eq!(w.said_ids(), [at_once]);
    w.wait(150 * MS);
    assert_eq!(w.said_ids(), [waits, late, about_it]);
}

#[test]
fn a_subscription_that_was_refused_for_now_is_made_again() {
    let mut w = World::up();
    w.core.read(Target::Command(C), Reading::default(), w.now);
    let ids = w.said_ids();
    let refusal = Refusal::new(ErrorCode::RateLimited, "slow down").reply_to(ids.first().cloned());
    w.hear(HubToDashboard::Error(Refusal { retry_after_ms: Some(300), ..refusal }));
    w.wait(299 * MS);
    assert_eq!(w.said(), []);
    w.wait(MS);
    assert_eq!(w.said_kinds(), ["subscribe"]);
}

#[test]
fn a_full_outbox_refuses_at_once() {
    let mut w = World::new();
    for _ in 0..1000 {
        w.request_stop();
    }
    let stop = DashboardToHub::EmergencyStop(EmergencyStop::default());
    assert_eq!(w.core.request(stop, None, w.now), Err(RequestError::Full));
}

#[test]
fn a_request_too_long_for_the_hub_never_costs_the_link() {
    let mut w = World::up();
    let request = command(C, &"x".repeat(1024 * 1024), false);
    let refused = w.core.request(request, None, w.now);
    assert!(matches!(refused, Err(RequestError::Refused(_))), "{refused:?}");
}

#[test]
fn log_records_go_after_all_else_until_the_hub_takes_none() {
    let mut w = World::up();
    w.core.logs = Some(LogTail::new(StreamId::from_u128(9), LogLimits::default()));
    let record = |message: &str| LogRecord {
        ts_ms: 0,
        level: LogLevel::Info,
        target: "app".into(),
        message: message.into(),
        fields: BTreeMap::new(),
    };
    w.core.push_log(0, record("a"), w.now);
    w.core.request(command(C, "make", false), None, w.now).unwrap();
    w.core.input(C, &mut Bytes::from_static(b"y")).unwrap();
    let mut said = Vec::new();
    while let Some(frame) = w.core.poll_transmit(w.now) {
        said.push(codec::decode::<DashboardToHub>(&frame, rules()).remove(0).unwrap());
    }
    let kinds: Vec<&str> = said.iter().map(|said| said.message.kind()).collect();
    assert_eq!(kinds, ["command:request", "terminal:input", "log:batch"]);
    let refusal = Refusal::new(ErrorCode::Unsupported, "");
    w.hear(HubToDashboard::Error(refusal.reply_to(said.pop().unwrap().id)));
    w.core.push_log(1, record("b"), w.now);
    w.wait(Duration::from_secs(10));
    let frame = w.core.poll_transmit(w.now);
    assert!(frame.is_none(), "{frame:?}");
}

#[test]
fn patience_ends_connected_or_not() {
    let mut w = World::new();
    let unsent = w.request_stop();
    w.wait(30 * SECOND);
    assert_eq!(w.answers(), [(unsent, Err(RequestError::TimedOut { sent: false }))]);
    w.connect(EPOCH);
    let sent = w.request_stop();
    w.said();
    w.wait(30 * SECOND);
    assert_eq!(w.answers(), [(sent.clone(), Err(RequestError::TimedOut { sent: true }))]);
    w.ok(&sent, Accepted::default());
    assert_eq!(w.answers(), [], "too late");
}

#[test]
fn a_hub_that_forgot_is_asked_what_it_stored_before_anything_is_repeated() {
    let mut w = World::up();
    let stored = w.request(command(C, "ls", false));
    let forgotten = w.request(command(D, "ls", false));
    let retried = w.request(command(CommandId::from_u128(0xe), "ls", true));
    w.said();
    w.lose();
    let unsent = w.request(command(CommandId::from_u128(0xf), "ls", false));

    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    assert_eq!(w.said(), [], "the roster is not there yet");
    w.list(&[state(C, CommandStatus::Queued)]);
    let answers = w.answers();
    assert_eq!(answers, [(stored, Ok(None)), (forgotten, Err(RequestError::Ambiguous))]);
    assert_eq!(w.said_ids(), [retried, unsent]);
}

#[test]
fn doubt_outlives_a_link_that_breaks_before_the_roster_is_there() {
    let mut w = World::up();
    let id = w.request(command(C, "ls", false));
    w.said();
    w.lose();
    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    w.lose();
    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    assert_eq!(w.said(), []);
    w.list(&[]);
    assert_eq!(w.answers(), [(id, Err(RequestError::Ambiguous))]);
}

#[test]
fn an_accepted_command_that_no_agent_brings_back_is_lost() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Running), state(D, CommandStatus::Running)]);
    let reader = w.core.read(Target::Command(C), Reading::default(), w.now);
    w.lose();
    w.wait(60 * SECOND);
    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    w.list(&[]);
    w.wait(5 * SECOND);
    w.list_command(&state(D, CommandStatus::Running));
    assert_eq!(w.lost(), [], "the agent may still be on its way");
    w.wait(5 * SECOND);
    assert_eq!(w.lost(), [C]);
    assert_eq!(w.take(reader), [TerminalEvent::Lost(C)]);
    assert_eq!(w.core.take(reader), Next::Over);
}

// ---- terminals --------------------------------------------------------------

#[test]
fn a_terminal_goes_on_where_it_was() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "hello ");
    assert_eq!(w.text(reader), "hello ");
    w.lose();
    w.connect(EPOCH);
    let asked = w.subscribed();
    assert_eq!(asked[0].positions.get(&S1), Some(&6));
    w.open(S1, 6, 6);
    w.output(S1, 6, "world");
    assert_eq!(w.text(reader), "world");
}

#[test]
fn what_comes_twice_is_shown_once() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "abc");
    w.output(S1, 0, "abc");
    w.output(S1, 1, "bcdef");
    w.output(S1, 0, "ab");
    assert_eq!(w.text(reader), "abcdef");
}

#[test]
fn a_named_gap_is_told_once() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 100);
    for _ in 0..2 {
        w.gap(S1, 0, 50, GapReason::Evicted);
    }
    w.output(S1, 50, "x");
    let events = w.take(reader);
    let gap = Gap { from: 0, to: 50, reason: GapReason::Evicted };
    assert_eq!(events[1], TerminalEvent::Gap { stream: S1, gap });
    assert_eq!(events.len(), 3);
}

#[test]
fn history_is_marked_up_to_where_the_present_begins() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 3);
    w.output(S1, 0, "oldnew");
    let pieces: Vec<_> = w.take(reader).into_iter().filter_map(piece).collect();
    assert_eq!(pieces, [("old".to_owned(), true), ("new".to_owned(), false)]);
}

#[test]
fn the_end_waits_for_the_last_byte() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "almost ");
    let done = ended(C, S1, "almost done");
    w.list_command(&done);
    assert_eq!(w.text(reader), "almost ");
    assert_eq!(w.core.take(reader), Next::Wait);
    w.output(S1, 7, "done");
    let events = w.take(reader);
    assert!(
        matches!(&events[1], TerminalEvent::Ended { audit: Audit::Verified, state, .. } if **state == done)
    );
    assert_eq!(w.core.take(reader), Next::Over);
}

#[test]
fn a_reader_audits_what_it_read() {
    for (text, gap, audit) in [
        ("right", false, Audit::Verified),
        ("wrong", false, Audit::Mismatch),
        ("right", true, Audit::NotChecked),
    ] {
        let mut w = World::up();
        let reader = w.read(C);
        w.open(S1, 0, 0);
        if gap {
            w.gap(S1, 0, 2, GapReason::AgentOverflow);
        }
        w.output(S1, 0, text);
        w.list_command(&ended(C, S1, "right"));
        let last = w.take(reader).pop().unwrap();
        let TerminalEvent::Ended { audit: found, .. } = last else { panic!("{last:?}") };
        assert_eq!(found, audit, "{text} {gap}");
    }
}

#[test]
fn a_command_that_never_started_has_nothing_to_read() {
    let mut w = World::up();
    let reader = w.read(C);
    w.list_command(&state(C, CommandStatus::Queued));
    assert_eq!(w.core.take(reader), Next::Wait);
    w.list_command(&state(C, CommandStatus::Expired));
    assert_eq!(w.core.take(reader), Next::Over);
}

#[test]
fn what_was_being_read_ends_with_a_gap_where_nobody_knows_it_any_more() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "some");
    w.take(reader);
    // A hub that was started again, and an agent that was, too.
    let mut gone = ended(C, S1, "some of it");
    gone.stream = None;
    w.list_command(&gone);
    let events = w.take(reader);
    let [TerminalEvent::Gap { gap, .. }, TerminalEvent::Ended { audit, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!((gap.from, gap.to, &gap.reason), (4, 10, &GapReason::HubLoss));
    assert_eq!(*audit, Audit::NotChecked);
    assert_eq!(w.core.take(reader), Next::Over);
}

#[test]
fn a_program_that_wrote_nothing_still_ends() {
    let mut w = World::up();
    let reader = w.read(C);
    w.list_command(&ended(C, S1, ""));
    let events = w.take(reader);
    assert!(matches!(
        events.as_slice(),
        [TerminalEvent::Opened { .. }, TerminalEvent::Ended { audit: Audit::Verified, .. }]
    ));
}

#[test]
fn a_retried_command_is_read_through_all_its_attempts() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "one");
    w.opened(TerminalOpened { attempt: 2, ..opened(C, S2, 0, 0) });
    w.output(S2, 0, "two");
    w.list_command(&ended(C, S2, "two"));
    assert_eq!(w.text(reader), "onetwo");
    assert_eq!(w.core.take(reader), Next::Over);
}

#[test]
fn nothing_follows_the_end_of_a_stream() {
    let mut w = World::up();
    let reader = w.core.read(Target::Agent(agent()), Reading::default(), w.now);
    w.drain();
    w.subscribed();
    w.open(S1, 0, 0);
    w.output(S1, 0, "done");
    w.list_command(&ended(C, S1, "done"));
    assert!(matches!(w.take(reader).last(), Some(TerminalEvent::Ended { .. })));
    // Its agent goes on after its own word.
    w.output(S1, 4, " not");
    w.gap(S1, 8, 9, GapReason::AgentOverflow);
    assert_eq!(w.core.take(reader), Next::Wait);
}

#[test]
fn output_that_nobody_has_any_more_becomes_a_gap() {
    let mut w = World::up();
    w.list_command(&ended(C, S1, "long gone"));
    let reader = w.read(C);
    w.wait(9 * SECOND);
    assert_eq!(w.core.take(reader), Next::Wait, "an agent may refill the hub");
    w.wait(2 * SECOND);
    let events = w.take(reader);
    let gap = Gap { from: 0, to: 9, reason: GapReason::HubLoss };
    assert_eq!(events[1], TerminalEvent::Gap { stream: S1, gap });
    assert!(matches!(events[2], TerminalEvent::Ended { audit: Audit::NotChecked, .. }));
}

#[test]
fn a_hole_without_a_name_is_asked_about_and_mended() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "abc");
    w.output(S1, 9, "jkl");
    w.output(S1, 12, "mno");
    assert_eq!(w.text(reader), "abc");
    assert_eq!(w.subscribed()[0].positions.get(&S1), Some(&3));
    w.open(S1, 3, 15);
    w.output(S1, 3, "defghijkl");
    assert_eq!(w.text(reader), "defghijkl");
}

#[test]
fn a_hub_that_cannot_mend_a_hole_does_not_stop_the_show() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 9, "jkl");
    w.subscribed();
    w.output(S1, 12, "mno");
    let events = w.take(reader);
    let gap = Gap { from: 0, to: 12, reason: GapReason::Other("unnamed".into()) };
    assert_eq!(events[1], TerminalEvent::Gap { stream: S1, gap });
    assert_eq!(w.subscribed(), [], "asked about once");
}

#[test]
fn a_second_terminal_begins_at_the_start_and_disturbs_nobody() {
    let mut w = World::up();
    let first = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "abc");
    assert_eq!(w.text(first), "abc");
    let second = w.core.read(Target::Agent(agent()), Reading::default(), w.now);
    w.output(S1, 3, "def");
    let asked = w.subscribed();
    assert_eq!(asked.len(), 2, "in one message, or the hub would keep its place");
    assert!(asked.iter().all(|subscription| subscription.positions.get(&S1) == Some(&0)));
    w.open(S1, 0, 6);
    w.output(S1, 0, "abcdef");
    w.output(S1, 6, "ghi");
    assert_eq!(w.text(first), "defghi");
    assert_eq!(w.text(second), "abcdefghi");
}

#[test]
fn what_is_opened_for_an_earlier_subscription_says_nothing_of_a_later_one() {
    let mut w = World::up();
    let first = w.read(C);
    w.open(S1, 0, 0);
    w.output(S1, 0, "abc");
    assert_eq!(w.text(first), "abc");
    let second = w.core.read(Target::Command(C), Reading::default(), w.now);
    let earlier = w.envelopes();
    let third = w.core.read(Target::Command(C), Reading::default(), w.now);
    let later = w.envelopes();
    w.ok(&earlier[0].id.clone().unwrap(), Accepted::default());
    w.open(S1, 3, 3);
    w.ok(&later[0].id.clone().unwrap(), Accepted::default());
    w.open(S1, 0, 3);
    w.output(S1, 0, "abc");
    assert_eq!((w.text(second).as_str(), w.text(third).as_str()), ("abc", "abc"));
}

#[test]
fn the_last_reader_of_a_target_ends_its_subscription() {
    let mut w = World::up();
    let (one, other) = (w.read(C), w.read(C));
    w.core.unread(one);
    assert_eq!(w.said(), []);
    w.core.unread(other);
    assert_eq!(w.said_kinds(), ["unsubscribe"]);
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.said(), []);
}

#[test]
fn a_refused_subscription_ends_only_its_own_readers() {
    let mut w = World::up();
    let mine = w.core.read(Target::Command(C), Reading::default(), w.now);
    let theirs = w.core.read(Target::Command(D), Reading::default(), w.now);
    let forbidden = Refusal::new(ErrorCode::Forbidden, "not yours");
    for (answers, refuse) in [(1, true), (2, false)] {
        let mut heard = 0;
        for envelope in w.envelopes() {
            let DashboardToHub::Subscribe(subscribe) = &envelope.message else { panic!() };
            let is_theirs = subscribe.terminals.iter().any(|s| s.target == Target::Command(D));
            heard += 1;
            if refuse || is_theirs {
                w.hear(HubToDashboard::Error(forbidden.clone().reply_to(envelope.id)));
            } else {
                w.ok(&envelope.id.unwrap(), Accepted::default());
            }
        }
        assert_eq!(heard, answers);
    }
    assert_eq!(w.core.take(mine), Next::Wait);
    assert!(matches!(w.take(theirs).as_slice(), [TerminalEvent::Refused(_)]));
    assert_eq!(w.core.take(theirs), Next::Over);
}

// ---- windows ----------------------------------------------------------------

#[test]
fn a_slow_consumer_costs_a_window_and_the_rest_comes_when_it_is_ready() {
    let mut w = World::up();
    let reader = w.read_within(C, 100, Lag::EveryByte);
    assert_eq!(w.said(), []);
    w.open(S1, 0, 0);
    for offset in 0..30 {
        w.output(S1, offset * 10, "0123456789");
        assert!(w.core.readers.queued_bytes(reader) <= 100);
    }
    assert_eq!(w.said(), [], "nothing was shown, nothing is asked for");
    assert_eq!(w.text(reader).len(), 100);
    assert_eq!(w.subscribed()[0].positions.get(&S1), Some(&100), "the overrun is fetched");
    w.open(S1, 100, 0);
    w.output(S1, 100, "0123456789");
    assert_eq!(w.text(reader).len(), 10);
}

#[test]
fn the_hub_hears_what_was_shown_by_quarters_of_the_window() {
    let mut w = World::up();
    let reader = w.read_within(C, 100_000, Lag::EveryByte);
    w.open(S1, 0, 0);
    let tenth = "x".repeat(10_000);
    for n in 0..5 {
        w.output(S1, n * 10_000, &tenth);
    }
    assert_eq!(w.shown(), []);
    let mut shown = Vec::new();
    while let Next::Event(_) = w.core.take(reader) {
        shown.extend(w.shown());
    }
    assert_eq!(shown, [(S1, 30_000)]);
}

#[test]
fn who_wants_the_newest_only_is_given_that_within_the_window() {
    let mut w = World::up();
    let reader = w.read_within(C, 10, Lag::Newest);
    w.open(S1, 0, 0);
    w.output(S1, 0, "01234567");
    w.output(S1, 8, "89abc");
    w.output(S1, 13, "0123456789ABCDEF");
    assert!(w.core.readers.queued_bytes(reader) <= 10);
    let events = w.take(reader);
    let gap = Gap { from: 0, to: 19, reason: GapReason::Lagged };
    assert_eq!(events[1], TerminalEvent::Gap { stream: S1, gap });
    assert_eq!(piece(events[2].clone()), Some(("6789ABCDEF".to_owned(), false)));
}

#[test]
fn after_a_reconnect_the_window_counts_from_what_was_consumed() {
    let mut w = World::up();
    let reader = w.read_within(C, 100, Lag::EveryByte);
    w.open(S1, 0, 0);
    w.output(S1, 0, &"a".repeat(90));
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.subscribed()[0].positions.get(&S1), Some(&0));
    w.open(S1, 0, 100);
    w.output(S1, 0, &"a".repeat(100));
    assert_eq!(w.core.readers.queued_bytes(reader), 100);
    assert_eq!(w.text(reader), "a".repeat(100));
}

#[test]
fn a_hub_that_begins_before_what_was_consumed_is_told_so() {
    let mut w = World::up();
    let reader = w.read_within(C, 100, Lag::EveryByte);
    w.open(S1, 0, 0);
    w.output(S1, 0, &"a".repeat(90));
    w.text(reader);
    w.lose();
    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    w.list(&[]);
    w.subscribed();
    w.open(S1, 0, 200); // its agent came back later, and it knows no position
    w.output(S1, 0, &"a".repeat(60));
    assert_eq!(w.shown(), [(S1, 60)], "or it would wait for ever at 100");
    w.output(S1, 60, &"a".repeat(60));
    assert_eq!(w.shown(), [(S1, 90)]);
    assert_eq!(w.text(reader).len(), 30);
}

#[test]
fn bytes_that_trickle_are_joined() {
    let mut w = World::up();
    let reader = w.read(C);
    w.open(S1, 0, 0);
    for offset in 0..5000 {
        w.output(S1, offset, "x");
    }
    assert_eq!(w.take(reader).len(), 3, "the announcement and two pieces");
}

// ---- input ------------------------------------------------------------------

#[test]
fn keys_arrive_once_and_in_order_across_a_reconnect() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Running)]);
    w.type_into(C, "ls");
    w.type_into(C, "\n");
    assert_eq!(w.typed(), [(0, "ls\n".to_owned())]);
    w.taken(C, 1, false);
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.typed(), [(1, "s\n".to_owned())]);
    w.taken(C, 2, true);
    assert_eq!(w.typed(), [(2, "\n".to_owned())]);
    w.taken(C, 3, false);
    w.lose();
    w.connect(EPOCH);
    assert_eq!(w.typed(), []);
}

#[test]
fn a_returning_agent_is_sent_what_it_may_have_missed() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Running)]);
    w.agent_is(Presence::Unreachable);
    w.type_into(C, "y");
    assert_eq!(w.typed().len(), 1);
    w.agent_is(Presence::Busy);
    assert_eq!(w.typed(), [(0, "y".to_owned())]);
    w.agent_is(Presence::Online);
    assert_eq!(w.typed(), []);
}

#[test]
fn keys_typed_too_early_wait_for_the_program() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Queued)]);
    w.type_into(C, "y");
    let id = w.said_ids().remove(0);
    let mut refusal = Refusal::new(ErrorCode::NotRunning, "not yet").reply_to(Some(id));
    refusal.recoverable = true;
    w.hear(HubToDashboard::Error(refusal));
    assert_eq!(w.typed(), []);
    w.list_command(&state(C, CommandStatus::Running));
    assert_eq!(w.typed(), [(0, "y".to_owned())]);
}

#[test]
fn keys_typed_while_a_hub_lost_its_memory_wait_for_the_agent_to_return() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Running)]);
    w.lose();
    w.type_into(C, "y");
    w.connect_to(OTHER_EPOCH, OTHER_HUB);
    w.list(&[]);
    let id = w.said_ids().remove(0);
    w.hear(HubToDashboard::Error(
        Refusal::new(ErrorCode::NotFound, "no such command").reply_to(Some(id)),
    ));
    assert_eq!(w.typed(), []);
    w.list_command(&state(C, CommandStatus::Running));
    assert_eq!(w.typed(), [(0, "y".to_owned())]);
}

#[test]
fn a_typist_is_told_when_there_is_room_or_nobody_listens() {
    let mut w = World::up();
    w.list(&[state(C, CommandStatus::Running)]);
    w.type_into(C, &"x".repeat(64 * 1024));
    assert!(!w.core.has_room(C));
    w.typed();
    w.outputs.clear();
    w.taken(C, 10, false);
    assert!(w.outputs.contains(&Output::InputMoved(C)));
    w.list_command(&state(C, CommandStatus::Completed));
    assert_eq!(w.core.input(C, &mut Bytes::from_static(b"x")), Err(InputError::Ended));
}

proptest! {
    /// Whatever a hub repeats, cuts up and loses with the link, each byte is
    /// shown once and in order, and never more than the window waits.
    #[test]
    fn every_byte_once(acts in prop::collection::vec((0..6u8, 0..40u64, 1..30u64), 1..80)) {
        let text: String = (b'a'..=b'w').cycle().take(2000).map(char::from).collect();
        let mut w = World::up();
        let reader = w.read_within(C, 64, Lag::EveryByte);
        w.open(S1, 0, 0);
        let mut hub = HubReader { at: 0, shown: 0 };
        let mut read = String::new();
        for (act, back, len) in acts {
            match act {
                // Some bytes, beginning a little early, as the window allows.
                0..=2 => {
                    let from = hub.at.saturating_sub(back);
                    let to = (hub.at + len).min(hub.shown + 64).min(2000);
                    if from < to {
                        w.output(S1, from, &text[index(from)..index(to)]);
                        hub.at = hub.at.max(to);
                    }
                }
                3 => read += &w.text(reader),
                4 => if let Next::Event(event) = w.core.take(reader) {
                    read.extend(piece(event).map(|(text, _)| text));
                },
                _ => {
                    w.lose();
                    w.connect(EPOCH);
                    let asked = w.subscribed();
                    hub.at = asked[0].positions[&S1];
                    hub.shown = hub.at;
                    w.open(S1, hub.at, 2000);
                }
            }
            for (_, offset) in w.shown() {
                hub.shown = hub.shown.max(offset.min(hub.at));
            }
            prop_assert!(w.core.readers.queued_bytes(reader) <= 64);
        }
        read += &w.text(reader);
        prop_assert_eq!(&read, &text[..read.len()]);
        prop_assert!(read.len() as u64 >= hub.at);
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

struct HubReader {
    at: u64,
    shown: u64,
}

// ---- the scripted hub -------------------------------------------------------

const EPOCH: QueueEpoch = QueueEpoch::from_u128(1);
const OTHER_EPOCH: QueueEpoch = QueueEpoch::from_u128(2);
const HUB: HubInstance = HubInstance::from_u128(1);
const OTHER_HUB: HubInstance = HubInstance::from_u128(2);

struct World {
    core: DashboardCore,
    now: Now,
    hub: HubInstance,
    revision: u64,
    outputs: Vec<Output>,
}

impl World {
    fn new() -> Self {
        let now = Now { monotonic: Duration::ZERO, wall_ms: 1_764_000_000_000 };
        let core = DashboardCore::new(DashboardSetup::default(), [7; 32], now);
        Self { core, now, hub: HUB, revision: 0, outputs: Vec::new() }
    }

    /// Connected, with a roster.
    fn up() -> Self {
        let mut w = Self::new();
        w.connect(EPOCH);
        w.list(&[]);
        w.outputs.clear();
        w
    }

    fn dialed(&mut self) {
        self.core.handle_dialed(None, self.now);
        self.drain();
    }

    fn greeting(&mut self) -> trunkline_protocol::message::DashboardConnect {
        let frame = self.core.poll_transmit(self.now).unwrap();
        match codec::decode::<Greeting>(&frame, rules()).remove(0).unwrap().message {
            Greeting::Dashboard(greeting) => greeting,
            Greeting::Agent(_) => panic!("an agent's greeting"),
        }
    }

    fn ack(&mut self, epoch: QueueEpoch) {
        let ack = ack(self.core.id(), epoch, self.hub);
        self.hear(HubToDashboard::Ack(ack));
    }

    fn connect(&mut self, epoch: QueueEpoch) {
        self.connect_to(epoch, self.hub);
    }

    fn connect_to(&mut self, epoch: QueueEpoch, hub: HubInstance) {
        self.hub = hub;
        self.dialed();
        self.greeting();
        self.ack(epoch);
    }

    fn lose(&mut self) {
        self.core.handle_lost(&Close::new(CloseCode::Lost, ""), self.now);
        self.drain();
    }

    fn wait(&mut self, time: Duration) {
        let until = self.now.monotonic + time;
        while let Some(deadline) = self.core.deadline(self.now).filter(|at| *at <= until) {
            self.now.monotonic = deadline.max(self.now.monotonic);
            self.core.handle_timeout(self.now);
            self.drain();
        }
        self.now.monotonic = until;
    }

    fn frame(&mut self, frame: &Frame) {
        self.core.handle_frame(frame, self.now);
        self.drain();
    }

    fn hear(&mut self, message: HubToDashboard) {
        let frame = match &message {
            HubToDashboard::Output(output) => codec::encode_output(output),
            _ => codec::encode(&Envelope::bare(message)),
        };
        self.frame(&frame);
    }

    fn drain(&mut self) {
        self.outputs.extend(std::iter::from_fn(|| self.core.poll_output()));
    }

    fn at(&mut self) -> trunkline_protocol::message::RosterPosition {
        self.revision += 1;
        trunkline_protocol::message::RosterPosition { hub: self.hub, revision: self.revision }
    }

    fn request_command(&mut self) -> RequestId {
        let command = self.core.mint_command(self.now);
        self.request_of(command)
    }

    fn request_of(&mut self, command: CommandId) -> RequestId {
        let request = CommandRequest {
            command,
            agent: agent(),
            spec: CommandSpec::from(Run::Text("ls".into())),
            priority: Priority::Normal,
            deliver_within_ms: None,
            retry: false,
        };
        self.core.request(DashboardToHub::Request(request), None, self.now).unwrap()
    }

    /// The whole roster.
    fn list(&mut self, commands: &[CommandState]) {
        let at = self.at();
        self.hear(HubToDashboard::List(AgentList {
            at,
            reset: true,
            complete: true,
            agents: Vec::new(),
            commands: commands.to_vec(),
            queues: Vec::new(),
        }));
    }

    fn list_command(&mut self, state: &CommandState) {
        let at = self.at();
        let changed = CommandChanged { at, command: Some(state.clone()), removed: None };
        self.hear(HubToDashboard::Command(changed));
    }

    fn agent_is(&mut self, presence: Presence) {
        let at = self.at();
        let agent = AgentState {
            agent: agent(),
            presence,
            since_ms: 0,
            instance: InstanceId::from_u128(1),
            about: AgentAbout::default(),
            slots: 1,
            running: 0,
            report: AgentReport::default(),
        };
        self.hear(HubToDashboard::Agent(AgentChanged { at, agent: Some(agent), removed: None }));
    }

    fn read(&mut self, command: CommandId) -> ReaderId {
        self.read_within(command, 1024 * 1024, Lag::EveryByte)
    }

    fn read_within(&mut self, command: CommandId, window_bytes: u64, lag: Lag) -> ReaderId {
        let options = Reading { from: From::Start, lag, window_bytes };
        let reader = self.core.read(Target::Command(command), options, self.now);
        self.drain();
        self.subscribed();
        reader
    }

    fn opened(&mut self, opened: TerminalOpened) {
        self.hear(HubToDashboard::Opened(opened));
    }

    fn open(&mut self, stream: StreamId, from: u64, live_from: u64) {
        self.opened(opened(C, stream, from, live_from));
    }

    fn output(&mut self, stream: StreamId, offset: u64, text: &str) {
        let data = Bytes::copy_from_slice(text.as_bytes());
        let output = TerminalOutput { stream, offset, channel: Channel::Pty, data };
        self.frame(&codec::encode_output(&output));
    }

    fn gap(&mut self, stream: StreamId, from: u64, to: u64, reason: GapReason) {
        self.hear(HubToDashboard::Gap(TerminalGap { stream, from, to, reason }));
    }

    fn taken(&mut self, command: CommandId, offset: u64, resend: bool) {
        let writer = self.core.id().clone();
        let taken = TerminalInputTaken { command, writer, offset, resend };
        self.hear(HubToDashboard::InputTaken(taken));
    }

    fn ok(&mut self, id: &RequestId, accepted: Accepted) {
        self.hear(HubToDashboard::Ok(Accepted { in_reply_to: Some(id.clone()), ..accepted }));
    }

    fn request(&mut self, message: DashboardToHub) -> RequestId {
        self.core.request(message, Some(30 * SECOND), self.now).unwrap()
    }

    fn request_stop(&mut self) -> RequestId {
        self.request(DashboardToHub::EmergencyStop(EmergencyStop::default()))
    }

    fn type_into(&mut self, command: CommandId, text: &str) {
        let mut data = Bytes::copy_from_slice(text.as_bytes());
        self.core.input(command, &mut data).unwrap();
        assert!(data.is_empty());
    }

    fn envelopes(&mut self) -> Vec<Envelope<DashboardToHub>> {
        let frames: Vec<Frame> = std::iter::from_fn(|| self.core.poll_transmit(self.now)).collect();
        frames.iter().flat_map(decode).collect()
    }

    fn said(&mut self) -> Vec<DashboardToHub> {
        self.envelopes().into_iter().map(|envelope| envelope.message).collect()
    }

    fn said_ids(&mut self) -> Vec<RequestId> {
        self.envelopes().into_iter().filter_map(|envelope| envelope.id).collect()
    }

    fn said_kinds(&mut self) -> Vec<&'static str> {
        self.said().iter().map(DashboardToHub::kind).collect()
    }

    /// What is subscribed to now; the hub agrees.
    fn subscribed(&mut self) -> Vec<TerminalSubscription> {
        let mut terminals = Vec::new();
        for envelope in self.envelopes() {
            let DashboardToHub::Subscribe(subscribe) = envelope.message else { continue };
            terminals.extend(subscribe.terminals);
            self.ok(&envelope.id.unwrap(), Accepted::default());
        }
        terminals
    }

    fn shown(&mut self) -> Vec<(StreamId, u64)> {
        let shown = |message| match message {
            DashboardToHub::Shown(shown) => Some((shown.stream, shown.offset)),
            _ => None,
        };
        self.said().into_iter().filter_map(shown).collect()
    }

    fn typed(&mut self) -> Vec<(u64, String)> {
        let typed = |message| match message {
            DashboardToHub::Input(TerminalInput { offset, data, .. }) => {
                Some((offset, String::from_utf8(data.to_vec()).unwrap()))
            }
            _ => None,
        };
        self.said().into_iter().filter_map(typed).collect()
    }

    fn take(&mut self, reader: ReaderId) -> Vec<TerminalEvent> {
        let next = || match self.core.take(reader) {
            Next::Event(event) => Some(event),
            Next::Wait | Next::Over => None,
        };
        std::iter::from_fn(next).collect()
    }

    fn text(&mut self, reader: ReaderId) -> String {
        self.take(reader).into_iter().filter_map(piece).map(|(text, _)| text).collect()
    }

    fn answers(&mut self) -> Vec<(RequestId, Result<Option<u32>, RequestError>)> {
        let answered = |output| match output {
            Output::Answered { request, answer } => {
                Some((request, answer.map(|accepted| accepted.stopped)))
            }
            _ => None,
        };
        self.outputs.drain(..).filter_map(answered).collect()
    }

    fn lost(&mut self) -> Vec<CommandId> {
        let lost = |output| match output {
            Output::Event(DashboardEvent::CommandLost(command)) => Some(command),
            _ => None,
        };
        self.outputs.drain(..).filter_map(lost).collect()
    }
}

pub(crate) fn rules() -> Rules {
    Rules::from(&Limits::default())
}

pub(crate) fn decode(frame: &Frame) -> Vec<Envelope<DashboardToHub>> {
    codec::decode(frame, rules()).into_iter().map(Result::unwrap).collect()
}

pub(crate) fn agent() -> AgentId {
    "a1".parse().unwrap()
}

pub(crate) fn ack(me: &DashboardId, queue: QueueEpoch, hub: HubInstance) -> ConnectionAck {
    ConnectionAck {
        protocol: 1,
        tenant: "t".parse().unwrap(),
        peer: Peer::Dashboard(me.clone()),
        hub,
        queue,
        features: vec![Feature::Binary, Feature::Batch],
        limits: Limits::default().for_link(),
        heartbeat: Heartbeat { idle_ms: 15_000, timeout_ms: 45_000 },
    }
}

fn command(command: CommandId, line: &str, retry: bool) -> DashboardToHub {
    DashboardToHub::Request(CommandRequest {
        command,
        agent: agent(),
        spec: Run::Shell(line.into()).into(),
        priority: Priority::Normal,
        deliver_within_ms: None,
        retry,
    })
}

pub(crate) fn state(command: CommandId, status: CommandStatus) -> CommandState {
    CommandState {
        command,
        agent: agent(),
        status,
        attempt: 1,
        title: "ls".into(),
        priority: Priority::Normal,
        requested_by: None,
        requested_at_ms: 0,
        started_at_ms: None,
        ended_at_ms: None,
        stream: None,
        interrupt: None,
        end: None,
    }
}

pub(crate) fn ended(command: CommandId, stream: StreamId, text: &str) -> CommandState {
    let hex =
        Sha256::digest(text).iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    let end = CommandEnd {
        exit_code: Some(0),
        end: text.len() as u64,
        digest: Some(format!("sha256:{hex}")),
        ..CommandEnd::default()
    };
    let state = state(command, CommandStatus::Completed);
    CommandState { stream: Some(stream), end: Some(end), ..state }
}

pub(crate) fn opened(
    command: CommandId,
    stream: StreamId,
    from: u64,
    live_from: u64,
) -> TerminalOpened {
    TerminalOpened { stream, command, attempt: 1, agent: agent(), from, live_from }
}

fn piece(event: TerminalEvent) -> Option<(String, bool)> {
    match event {
        TerminalEvent::Output { data, replay, .. } => {
            Some((String::from_utf8(data.to_vec()).unwrap(), replay))
        }
        _ => None, // what a test wants to read
    }
}
