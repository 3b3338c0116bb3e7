//! What is written reads back, whatever it is; what is read, whatever it is,
//! never panics.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use trunkline_protocol::codec::{self, Invalid, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{
    AgentId, CommandId, DashboardId, HubInstance, InstanceId, QueueEpoch, RequestId, StreamId,
};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::*;

proptest! {
    #[test]
    fn greetings_read_back(message in envelope(greeting())) {
        reads_back(&message)?;
    }

    #[test]
    fn what_agents_say_reads_back(message in envelope(agent_to_hub())) {
        reads_back(&message)?;
    }

    #[test]
    fn what_agents_hear_reads_back(message in envelope(hub_to_agent())) {
        reads_back(&message)?;
    }

    #[test]
    fn what_dashboards_say_reads_back(message in envelope(dashboard_to_hub())) {
        reads_back(&message)?;
    }

    #[test]
    fn what_dashboards_hear_reads_back(message in envelope(hub_to_dashboard())) {
        reads_back(&message)?;
    }

    #[test]
    fn a_batch_reads_back(messages in vec(envelope(dashboard_to_hub()), 0..10)) {
        let each: Vec<Bytes> = messages.iter().map(|m| content(codec::encode(m))).collect();
        let read: Result<Vec<_>, Invalid> = read(&codec::batch(&each)).into_iter().collect();
        prop_assert_eq!(read, Ok(messages));
    }

    #[test]
    fn a_binary_frame_reads_back(output in output()) {
        let frame = codec::encode_output(&output);
        prop_assert_eq!(
            read(&frame),
            [Ok(Envelope::bare(AgentToHub::Output(output.clone())))]
        );
        // And says the same as its text.
        let text = codec::encode_output_text(
            &codec::binary::OutputHeader {
                stream: output.stream,
                offset: output.offset,
                channel: output.channel,
            },
            &output.data,
        );
        prop_assert_eq!(read(&Frame::Text(text)), [Ok(Envelope::bare(HubToDashboard::Output(output)))]);
    }

    #[test]
    fn nothing_makes_the_decoder_panic(bytes in vec(any::<u8>(), 0..300)) {
        read_as_everything(&Bytes::from(bytes))?;
    }

    #[test]
    fn nothing_like_json_makes_the_decoder_panic(
        tokens in vec(prop_oneof![
            Just("{"), Just("}"), Just("["), Just("]"), Just(","), Just(":"), Just("\""), Just("\\u"),
            Just("\"type\""), Just("\"payload\""), Just("\"batch\""), Just("\"subscribe\""),
            Just("\"terminals\""), Just("\"messages\""), Just("0"), Just("-"), Just("1e9"), Just("null"),
        ], 0..60)
    ) {
        read_as_everything(&Bytes::from(tokens.concat()))?;
    }

    #[test]
    fn a_message_with_a_few_bytes_changed_does_not_make_the_decoder_panic(
        which in any::<prop::sample::Index>(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..6),
    ) {
        let vectors = golden();
        let mut bytes = which.get(&vectors).clone();
        for (at, byte, how) in changes {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => bytes.truncate(at.max(1)),
            }
        }
        read_as_everything(&Bytes::from(bytes))?;
    }

    /// Readers in languages without bytes in strings depend on it.
    #[test]
    fn text_stays_text(data in "[\\PC\n\u{1b}]{1,40}") {
        let input = TerminalInput {
            command: CommandId::from_u128(1),
            writer: None,
            offset: 0,
            data: Bytes::from(data.clone()),
        };
        let json = content(codec::encode(&Envelope::bare(DashboardToHub::Input(input))));
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        prop_assert_eq!(value["payload"]["data"].as_str(), Some(data.as_str()));
    }
}

#[test]
fn texts_for_people_are_cut_rather_than_refused() {
    let report = AgentReport {
        figures: [("load".to_owned(), f64::NAN), ("ok".to_owned(), 1.0)].into(),
        note: Some(format!("two\nlines {}", "é".repeat(500))),
    };
    let [Ok(read)] =
        &read::<AgentToHub>(&codec::encode(&Envelope::bare(AgentToHub::Status(report))))[..]
    else {
        panic!("was refused");
    };
    let AgentToHub::Status(report) = &read.message else { panic!("{read:?}") };
    assert_eq!(report.figures, [("ok".to_owned(), 1.0)].into());
    assert_eq!(report.note, Some(format!("two·lines {}", "é".repeat(190))));
}

#[test]
fn a_figure_is_read_as_it_was_written() {
    let figures = [("load".to_owned(), 9.220_000_000_776_443e28)].into();
    let said = Envelope::bare(AgentToHub::Status(AgentReport { figures, note: None }));
    assert_eq!(read::<AgentToHub>(&codec::encode(&said)), [Ok(said)]);
}

// ---- helpers ------------------------------------------------------------------

fn rules() -> Rules {
    Rules::from(&Limits::default())
}

fn read<M: Direction>(frame: &Frame) -> Vec<Result<Envelope<M>, Invalid>> {
    codec::decode(frame, rules())
}

fn reads_back<M: Direction + PartialEq + std::fmt::Debug + Clone>(
    message: &Envelope<M>,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(read(&codec::encode(message)), [Ok(message.clone())]);
    Ok(())
}

fn content(frame: Frame) -> Bytes {
    match frame {
        Frame::Text(bytes) | Frame::Binary(bytes) => bytes,
        Frame::Close(close) => panic!("not a message: {close}"),
    }
}

/// Reads bytes as every direction, as text and as binary. What is understood
/// is written and read again.
fn read_as_everything(bytes: &Bytes) -> Result<(), TestCaseError> {
    fn one<M: Direction + PartialEq + std::fmt::Debug>(bytes: &Bytes) -> Result<(), TestCaseError> {
        for frame in [Frame::Text(bytes.clone()), Frame::Binary(bytes.clone())] {
            for message in read::<M>(&frame) {
                match message {
                    Ok(message) => {
                        let [Ok(again)] = &read::<M>(&codec::encode(&message))[..] else {
                            return Err(TestCaseError::fail("was understood, written and refused"));
                        };
                        prop_assert_eq!(again, &message);
                    }
                    Err(invalid) => {
                        let refusal = invalid.refusal();
                        prop_assert!(refusal.message.len() <= 400, "{:?}", refusal);
                        prop_assert!(refusal.message.is_ascii(), "{:?}", refusal);
                    }
                }
            }
            let _ = codec::peek(&frame, rules());
        }
        Ok(())
    }
    one::<Greeting>(bytes)?;
    one::<AgentToHub>(bytes)?;
    one::<HubToAgent>(bytes)?;
    one::<DashboardToHub>(bytes)?;
    one::<HubToDashboard>(bytes)
}

/// Every golden vector's text.
fn golden() -> Vec<Vec<u8>> {
    let files = [
        include_str!("../vectors/greeting.json"),
        include_str!("../vectors/agent-to-hub.json"),
        include_str!("../vectors/hub-to-agent.json"),
        include_str!("../vectors/dashboard-to-hub.json"),
        include_str!("../vectors/hub-to-dashboard.json"),
    ];
    let texts = |file: &str| -> Vec<Vec<u8>> {
        let vectors: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(file).unwrap();
        vectors.iter().map(|v| v["json"].as_str().unwrap().as_bytes().to_vec()).collect()
    };
    files.into_iter().flat_map(texts).collect()
}

// ---- anything that may be said ----------------------------------------------

fn envelope<M: std::fmt::Debug>(
    message: impl Strategy<Value = M>,
) -> impl Strategy<Value = Envelope<M>> {
    (option::of(request_id()), option::of(0..=codec::TS_MAX), message)
        .prop_map(|(id, ts, message)| Envelope { id, ts, message })
}

fn request_id() -> impl Strategy<Value = RequestId> {
    "[A-Za-z0-9._-]{1,128}".prop_map(|text| text.parse().unwrap())
}

fn agent_id() -> impl Strategy<Value = AgentId> {
    "[A-Za-z0-9._-]{1,128}".prop_map(|text| text.parse().unwrap())
}

fn dashboard_id() -> impl Strategy<Value = DashboardId> {
    "[A-Za-z0-9._-]{1,128}".prop_map(|text| text.parse().unwrap())
}

fn command_id() -> impl Strategy<Value = CommandId> {
    any::<u128>().prop_map(CommandId::from_u128)
}

fn stream_id() -> impl Strategy<Value = StreamId> {
    any::<u128>().prop_map(StreamId::from_u128)
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0..1_000_000u64, 0..=i64::MAX as u64, Just(i64::MAX as u64)]
}

/// Any text at all.
fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..20).prop_map(String::from_iter)
}

/// A text without control characters.
fn line() -> impl Strategy<Value = String> {
    "\\PC{0,20}"
}

fn data() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        vec(any::<u8>(), 1..64).prop_map(Bytes::from),
        text().prop_filter("not empty", |text| !text.is_empty()).prop_map(Bytes::from),
    ]
}

fn word<T: Copy + std::fmt::Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(all)
}

fn size() -> impl Strategy<Value = TerminalSize> {
    (1..=4096u16, 1..=4096u16).prop_map(|(cols, rows)| TerminalSize { cols, rows })
}

fn run() -> impl Strategy<Value = Run> {
    let arg = || text().prop_map(|text| text.replace('\0', ""));
    prop_oneof![
        ("[a-z/]{1,9}", vec(arg(), 0..4)).prop_map(|(program, mut args)| {
            args.insert(0, program);
            Run::Argv(args)
        }),
        arg().prop_map(Run::Shell),
        text().prop_map(Run::Text),
    ]
}

fn spec() -> impl Strategy<Value = CommandSpec> {
    let env = btree_map("[A-Z_]{1,9}", "[^\0]{0,9}", 0..3);
    (run(), option::of("[^\0]{1,9}"), env, option::of(size()), option::of(any::<u64>())).prop_map(
        |(run, cwd, env, terminal, run_for_ms)| CommandSpec { run, cwd, env, terminal, run_for_ms },
    )
}

fn end() -> impl Strategy<Value = CommandEnd> {
    let digest = option::of("sha256:[0-9a-f]{64}");
    (any::<Option<i32>>(), any::<Option<i32>>(), option::of(text()), offset(), digest).prop_map(
        |(exit_code, signal, error, end, digest)| CommandEnd {
            exit_code,
            signal,
            error,
            end,
            digest,
        },
    )
}

fn status() -> impl Strategy<Value = CommandStatus> {
    word(CommandStatus::ALL)
}

fn held() -> impl Strategy<Value = HeldCommand> {
    let stream = (stream_id(), offset(), offset()).prop_map(|(stream, a, b)| HeldStream {
        stream,
        from: a.min(b),
        to: a.max(b),
    });
    (
        command_id(),
        any::<u32>(),
        status(),
        option::of(spec()),
        option::of(stream),
        option::of(end()),
    )
        .prop_map(|(command, attempt, status, spec, stream, end)| HeldCommand {
            command,
            attempt,
            status,
            spec,
            stream,
            end,
        })
}

fn about() -> impl Strategy<Value = AgentAbout> {
    (option::of(line()), option::of(line()), option::of(line()), vec(line(), 0..3)).prop_map(
        |(kind, version, host, capabilities)| AgentAbout { kind, version, host, capabilities },
    )
}

fn report() -> impl Strategy<Value = AgentReport> {
    // Quarters: JSON in decimals is not exact for every number.
    let figure = any::<i32>().prop_map(|n| f64::from(n) / 4.0);
    (btree_map("[a-z_.]{1,9}", figure, 0..4), option::of(line()))
        .prop_map(|(figures, note)| AgentReport { figures, note })
}

fn features() -> impl Strategy<Value = Vec<Feature>> {
    let other = "x-[a-z0-9]{1,9}".prop_map(|word| Feature::Other(word.into()));
    vec(prop_oneof![Just(Feature::Binary), Just(Feature::Batch), other], 0..4)
}

fn token() -> impl Strategy<Value = Secret> {
    text().prop_map(Secret::from)
}

fn position() -> impl Strategy<Value = RosterPosition> {
    (any::<u128>(), any::<u64>())
        .prop_map(|(hub, revision)| RosterPosition { hub: HubInstance::from_u128(hub), revision })
}

fn greeting() -> impl Strategy<Value = Greeting> {
    let protocols = || vec(any::<u32>(), 0..=16);
    let agent = (
        (protocols(), agent_id(), any::<u128>(), option::of(token())),
        (about(), 1..=u32::MAX, features(), vec(held(), 0..3), any::<bool>()),
    )
        .prop_map(
            |((protocols, agent, instance, token), (about, slots, features, commands, more))| {
                Greeting::Agent(AgentConnect {
                    protocols,
                    agent,
                    instance: InstanceId::from_u128(instance),
                    token,
                    about,
                    slots,
                    features,
                    commands,
                    more,
                })
            },
        );
    let dashboard = (
        protocols(),
        option::of(dashboard_id()),
        option::of(token()),
        features(),
        option::of(position()),
    )
        .prop_map(|(protocols, dashboard, token, features, roster)| {
            let since = Since { roster };
            Greeting::Dashboard(DashboardConnect { protocols, dashboard, token, features, since })
        });
    prop_oneof![agent, dashboard]
}

fn output() -> impl Strategy<Value = TerminalOutput> {
    let from = offset().prop_map(|offset| offset.min(i64::MAX as u64 - 1000));
    (stream_id(), from, word(Channel::ALL), data()).prop_map(|(stream, offset, channel, data)| {
        TerminalOutput { stream, offset, channel, data }
    })
}

fn input() -> impl Strategy<Value = TerminalInput> {
    let from = offset().prop_map(|offset| offset.min(i64::MAX as u64 - 1000));
    (command_id(), option::of(dashboard_id()), from, data())
        .prop_map(|(command, writer, offset, data)| TerminalInput { command, writer, offset, data })
}

fn gap() -> impl Strategy<Value = TerminalGap> {
    let reason = prop_oneof![
        Just(GapReason::Evicted),
        Just(GapReason::AgentOverflow),
        Just(GapReason::AgentLoss),
        Just(GapReason::HubLoss),
        Just(GapReason::Lagged),
        Just(GapReason::NotRequested),
        Just(GapReason::Other("solar_flare".into())),
    ];
    (stream_id(), 0..i64::MAX as u64, 1..1000u64, reason).prop_map(|(stream, from, len, reason)| {
        TerminalGap { stream, from, to: (from + len).min(i64::MAX as u64), reason }
    })
}

fn input_taken() -> impl Strategy<Value = TerminalInputTaken> {
    (command_id(), dashboard_id(), offset(), any::<bool>()).prop_map(
        |(command, writer, offset, resend)| TerminalInputTaken { command, writer, offset, resend },
    )
}

fn resize() -> impl Strategy<Value = TerminalResize> {
    (command_id(), size()).prop_map(|(command, size)| TerminalResize { command, size })
}

fn interrupt() -> impl Strategy<Value = CommandInterrupt> {
    (command_id(), any::<Option<u32>>(), any::<Option<u64>>())
        .prop_map(|(command, attempt, grace_ms)| CommandInterrupt { command, attempt, grace_ms })
}

fn held_commands() -> impl Strategy<Value = HeldCommands> {
    (vec(held(), 0..3), any::<bool>()).prop_map(|(commands, more)| HeldCommands { commands, more })
}

fn log() -> impl Strategy<Value = LogBatch> {
    let level = prop_oneof![Just(LogLevel::Error), Just(LogLevel::Other("fatal".into()))];
    let record = (any::<u64>(), level, text(), text(), btree_map(text(), text(), 0..3)).prop_map(
        |(ts_ms, level, target, message, fields)| LogRecord {
            ts_ms,
            level,
            target,
            message,
            fields,
        },
    );
    (stream_id(), offset(), any::<bool>(), vec(record, 0..4)).prop_map(
        |(stream, offset, missing, records)| {
            let offset = offset.min(i64::MAX as u64 - 4);
            let missing_from = (missing && offset > 0).then_some(offset / 2);
            LogBatch { stream, missing_from, offset, records }
        },
    )
}

fn log_taken() -> impl Strategy<Value = LogTaken> {
    (stream_id(), offset()).prop_map(|(stream, offset)| LogTaken { stream, offset })
}

fn beat() -> impl Strategy<Value = HeartbeatBeat> {
    any::<u64>().prop_map(|n| HeartbeatBeat { n })
}

fn disconnect() -> impl Strategy<Value = Disconnect> {
    option::of(text()).prop_map(|reason| Disconnect { reason })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let code = prop_oneof![
        Just(ErrorCode::NotFound),
        Just(ErrorCode::QueueFull),
        Just(ErrorCode::Other("teapot".into()))
    ];
    let more = (option::of(request_id()), any::<Option<u64>>(), option::of(text()));
    (code, text(), any::<bool>(), more).prop_map(
        |(code, message, recoverable, (in_reply_to, retry_after_ms, field))| Refusal {
            in_reply_to,
            code,
            message,
            recoverable,
            retry_after_ms,
            field,
        },
    )
}

fn agent_to_hub() -> impl Strategy<Value = AgentToHub> {
    let lease = || (command_id(), any::<u32>());
    let ended = word(CommandStatus::ALL).prop_filter("final", |status| status.is_final());
    prop_oneof![
        held_commands().prop_map(AgentToHub::Commands),
        report().prop_map(AgentToHub::Status),
        lease().prop_map(|(command, attempt)| AgentToHub::Accepted(CommandAccepted {
            command,
            attempt
        })),
        (lease(), stream_id()).prop_map(|((command, attempt), stream)| {
            AgentToHub::Started(CommandStarted { command, attempt, stream })
        }),
        (lease(), word(InterruptStage::ALL)).prop_map(|((command, attempt), stage)| {
            AgentToHub::Interrupting(CommandInterrupting { command, attempt, stage })
        }),
        (lease(), ended, end()).prop_map(|((command, attempt), status, end)| {
            AgentToHub::Complete(CommandComplete { command, attempt, status, end })
        }),
        output().prop_map(AgentToHub::Output),
        gap().prop_map(AgentToHub::Gap),
        input_taken().prop_map(AgentToHub::InputTaken),
        log().prop_map(AgentToHub::Log),
        disconnect().prop_map(AgentToHub::Disconnect),
        beat().prop_map(AgentToHub::Ping),
        beat().prop_map(AgentToHub::Pong),
        token().prop_map(|token| AgentToHub::RefreshToken(RefreshToken { token })),
        refusal().prop_map(AgentToHub::Error),
    ]
}

fn ack() -> impl Strategy<Value = ConnectionAck> {
    let peer =
        prop_oneof![agent_id().prop_map(Peer::Agent), dashboard_id().prop_map(Peer::Dashboard)];
    (peer, any::<u128>(), any::<u128>(), features(), any::<u64>()).prop_map(
        |(peer, hub, queue, features, ms)| ConnectionAck {
            protocol: 1,
            tenant: "acme".parse().unwrap(),
            peer,
            hub: HubInstance::from_u128(hub),
            queue: QueueEpoch::from_u128(queue),
            features,
            limits: Limits::default().for_link(),
            heartbeat: Heartbeat { idle_ms: ms, timeout_ms: ms },
        },
    )
}

fn hub_to_agent() -> impl Strategy<Value = HubToAgent> {
    let lease = || (command_id(), any::<u32>());
    let action =
        prop_oneof![Just(ControlAction::Report), Just(ControlAction::Other("dance".into()))];
    prop_oneof![
        ack().prop_map(HubToAgent::Ack),
        (lease(), spec()).prop_map(|((command, attempt), spec)| {
            HubToAgent::Execute(CommandExecute { command, attempt, spec })
        }),
        interrupt().prop_map(HubToAgent::Interrupt),
        lease().prop_map(|(command, attempt)| HubToAgent::Settled(CommandSettled {
            command,
            attempt
        })),
        input().prop_map(HubToAgent::Input),
        resize().prop_map(HubToAgent::Resize),
        (stream_id(), offset(), offset()).prop_map(|(stream, stored, allowed)| {
            HubToAgent::Taken(TerminalTaken { stream, stored, allowed })
        }),
        action.prop_map(|action| HubToAgent::Control(AgentControl { action })),
        log_taken().prop_map(HubToAgent::LogTaken),
        answer().prop_map(HubToAgent::Ok),
        refusal().prop_map(HubToAgent::Error),
        beat().prop_map(HubToAgent::Ping),
        beat().prop_map(HubToAgent::Pong),
        any::<u64>()
            .prop_map(|expires_in_ms| HubToAgent::RefreshNeeded(RefreshNeeded { expires_in_ms })),
        any::<Option<u64>>()
            .prop_map(|expires_in_ms| HubToAgent::RefreshSuccess(RefreshSuccess { expires_in_ms })),
        text().prop_map(|message| HubToAgent::RefreshFailed(RefreshFailed { message })),
    ]
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![agent_id().prop_map(Target::Agent), command_id().prop_map(Target::Command)]
}

fn subscription() -> impl Strategy<Value = TerminalSubscription> {
    let positions = btree_map(stream_id(), offset(), 0..4);
    (target(), word(From::ALL), word(Lag::ALL), option::of(1..=u64::MAX), positions).prop_map(
        |(target, from, lag, window_bytes, positions)| TerminalSubscription {
            target,
            from,
            lag,
            window_bytes,
            positions,
        },
    )
}

fn answer() -> impl Strategy<Value = Accepted> {
    let subscription = vec(subscription(), 0..3).prop_map(|terminals| Subscription { terminals });
    (
        option::of(request_id()),
        option::of(command_id()),
        option::of(subscription),
        any::<Option<u32>>(),
    )
        .prop_map(|(in_reply_to, command, subscription, stopped)| Accepted {
            in_reply_to,
            command,
            subscription,
            stopped,
        })
}

fn request() -> impl Strategy<Value = CommandRequest> {
    ((command_id(), agent_id(), spec()), (word(Priority::ALL), any::<Option<u64>>(), any::<bool>()))
        .prop_map(|((command, agent, spec), (priority, deliver_within_ms, retry))| CommandRequest {
            command,
            agent,
            spec,
            priority,
            deliver_within_ms,
            retry,
        })
}

fn dashboard_to_hub() -> impl Strategy<Value = DashboardToHub> {
    prop_oneof![
        vec(subscription(), 0..4)
            .prop_map(|terminals| DashboardToHub::Subscribe(Subscribe { terminals })),
        vec(target(), 0..4)
            .prop_map(|terminals| DashboardToHub::Unsubscribe(Unsubscribe { terminals })),
        (stream_id(), offset())
            .prop_map(|(stream, offset)| DashboardToHub::Shown(TerminalShown { stream, offset })),
        request().prop_map(DashboardToHub::Request),
        interrupt().prop_map(DashboardToHub::Interrupt),
        input().prop_map(DashboardToHub::Input),
        resize().prop_map(DashboardToHub::Resize),
        option::of(vec(agent_id(), 0..4))
            .prop_map(|agents| DashboardToHub::EmergencyStop(EmergencyStop { agents })),
        log().prop_map(DashboardToHub::Log),
        disconnect().prop_map(DashboardToHub::Disconnect),
        beat().prop_map(DashboardToHub::Ping),
        beat().prop_map(DashboardToHub::Pong),
        token().prop_map(|token| DashboardToHub::RefreshToken(RefreshToken { token })),
        refusal().prop_map(DashboardToHub::Error),
    ]
}

fn agent_state() -> impl Strategy<Value = AgentState> {
    let first = (agent_id(), word(Presence::ALL), any::<u64>(), any::<u128>());
    (first, about(), any::<u32>(), any::<u32>(), report()).prop_map(
        |((agent, presence, since_ms, instance), about, slots, running, report)| AgentState {
            agent,
            presence,
            since_ms,
            instance: InstanceId::from_u128(instance),
            about,
            slots,
            running,
            report,
        },
    )
}

fn command_state() -> impl Strategy<Value = CommandState> {
    let who = (command_id(), agent_id(), status(), any::<u32>(), line(), word(Priority::ALL));
    let when = (any::<u64>(), any::<Option<u64>>(), any::<Option<u64>>());
    let how = (
        option::of(dashboard_id()),
        option::of(stream_id()),
        option::of(word(InterruptStage::ALL)),
        option::of(end()),
    );
    (who, when, how).prop_map(|(who, when, how)| {
        let (command, agent, status, attempt, title, priority) = who;
        let (requested_at_ms, started_at_ms, ended_at_ms) = when;
        let (requested_by, stream, interrupt, end) = how;
        CommandState {
            command,
            agent,
            status,
            attempt,
            title,
            priority,
            requested_by,
            requested_at_ms,
            started_at_ms,
            ended_at_ms,
            stream,
            interrupt,
            end,
        }
    })
}

fn queue() -> impl Strategy<Value = QueueState> {
    (agent_id(), vec(command_id(), 0..4))
        .prop_map(|(agent, commands)| QueueState { agent, commands })
}

fn list() -> impl Strategy<Value = AgentList> {
    let content = (vec(agent_state(), 0..3), vec(command_state(), 0..3), vec(queue(), 0..3));
    (position(), any::<bool>(), any::<bool>(), content).prop_map(
        |(at, reset, complete, (agents, commands, queues))| AgentList {
            at,
            reset,
            complete,
            agents,
            commands,
            queues,
        },
    )
}

fn hub_to_dashboard() -> impl Strategy<Value = HubToDashboard> {
    let changed = || {
        (position(), option::of(command_state()), option::of(command_id()))
            .prop_map(|(at, command, removed)| CommandChanged { at, command, removed })
    };
    let opened = (stream_id(), command_id(), any::<u32>(), agent_id(), offset(), offset())
        .prop_map(|(stream, command, attempt, agent, from, live_from)| TerminalOpened {
            stream,
            command,
            attempt,
            agent,
            from,
            live_from,
        });
    prop_oneof![
        ack().prop_map(HubToDashboard::Ack),
        list().prop_map(HubToDashboard::List),
        (position(), option::of(agent_state()), option::of(agent_id())).prop_map(
            |(at, agent, removed)| HubToDashboard::Agent(AgentChanged { at, agent, removed })
        ),
        changed().prop_map(HubToDashboard::Command),
        changed().prop_map(HubToDashboard::Complete),
        (position(), queue())
            .prop_map(|(at, queue)| HubToDashboard::Queue(QueueChanged { at, queue })),
        opened.prop_map(HubToDashboard::Opened),
        (target(), refusal()).prop_map(|(target, Refusal { code, message, .. })| {
            HubToDashboard::Refused(TerminalRefused { target, code, message })
        }),
        output().prop_map(HubToDashboard::Output),
        gap().prop_map(HubToDashboard::Gap),
        input_taken().prop_map(HubToDashboard::InputTaken),
        log_taken().prop_map(HubToDashboard::LogTaken),
        answer().prop_map(HubToDashboard::Ok),
        refusal().prop_map(HubToDashboard::Error),
        beat().prop_map(HubToDashboard::Ping),
        beat().prop_map(HubToDashboard::Pong),
    ]
}
