//! Few names, so that what one message names another knows: ids of agents,
//! commands and streams, what a stream holds, and what a command is.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::ids::{
    AgentId, CommandId, DashboardId, HubInstance, InstanceId, RequestId, StreamId, TenantId,
};
use trunkline_protocol::message::{
    AgentAbout, AgentReport, AgentState, Channel, CommandEnd, CommandSpec, CommandState,
    CommandStatus, GapReason, InterruptStage, Presence, Priority, Run, TerminalSize,
};
use trunkline_protocol::time::Now;

use crate::plan::Plan;

/// Commands there are, and streams.
pub const SERIALS: u8 = 6;

fn name<T: for<'a> TryFrom<&'a str>>(letter: char, number: u8) -> T {
    T::try_from(&format!("{letter}{number}")).unwrap_or_else(|_| unreachable!("it is a name"))
}

/// An agent.
pub fn agent(number: u8) -> AgentId {
    name('a', number)
}

/// A dashboard.
pub fn dashboard(number: u8) -> DashboardId {
    name('d', number)
}

/// A tenant.
pub fn tenant(number: u8) -> TenantId {
    name('t', number)
}

/// A request.
pub fn request(number: u32) -> RequestId {
    RequestId::try_from(format!("r{number}")).unwrap_or_else(|_| unreachable!("it is a name"))
}

/// One of the commands.
pub fn command(plan: &mut Plan<'_>) -> CommandId {
    CommandId::from_u128(0xc0 + u128::from(plan.below(SERIALS)))
}

/// One of the streams.
pub fn stream(plan: &mut Plan<'_>) -> StreamId {
    StreamId::from_u128(0x50 + u128::from(plan.below(SERIALS)))
}

/// One of a few processes.
pub fn instance(number: u8) -> InstanceId {
    InstanceId::from_u128(0x10 + u128::from(number))
}

/// One of a few hubs.
pub fn hub(number: u8) -> HubInstance {
    HubInstance::from_u128(0xb0 + u128::from(number))
}

/// The time, after so long.
pub fn now(after: Duration) -> Now {
    let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    Now { monotonic: after, wall_ms: 1_700_000_000_000_u64.saturating_add(millis) }
}

/// How long nothing happens.
pub fn pause(plan: &mut Plan<'_>) -> Duration {
    plan.of(&[
        Duration::from_millis(1),
        Duration::from_millis(50),
        Duration::from_millis(600),
        Duration::from_secs(2),
        Duration::from_secs(6),
        Duration::from_secs(31),
        Duration::from_secs(3700),
        Duration::from_secs(25 * 3600),
    ])
}

/// What a stream holds at an offset, whoever sends it.
pub fn byte_at(stream: StreamId, offset: u64) -> u8 {
    let mixed = (offset ^ u64::try_from(stream.as_u128() & 0xff).unwrap_or(0) << 56)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

/// What a stream holds in a range.
pub fn bytes_at(stream: StreamId, from: u64, len: u64) -> Bytes {
    (from..from + len).map(|offset| byte_at(stream, offset)).collect()
}

/// A length of output: some of them larger than a chunk may be.
pub fn len(plan: &mut Plan<'_>) -> u64 {
    match plan.byte() {
        small @ 0..160 => 1 + u64::from(small),
        160..250 => 1 + u64::from(plan.short()) % 5000,
        250..254 => 16 * 1024,
        _ => 16 * 1024 + 1,
    }
}

/// One of a program's outputs.
pub fn channel(plan: &mut Plan<'_>) -> Channel {
    plan.of(&[Channel::Pty, Channel::Stdout, Channel::Stderr])
}

/// Why bytes are missing.
pub fn reason(plan: &mut Plan<'_>) -> GapReason {
    plan.of(&[
        GapReason::Evicted,
        GapReason::AgentOverflow,
        GapReason::HubLoss,
        GapReason::Lagged,
        GapReason::NotRequested,
        GapReason::Other("x".into()),
    ])
}

/// What to run.
pub fn spec(plan: &mut Plan<'_>) -> CommandSpec {
    let run = match plan.below(3) {
        0 => Run::Text(plan.text(3)),
        1 => Run::Shell("true".into()),
        _ => Run::Argv(vec!["true".into()]),
    };
    let run_for_ms = plan.maybe(Plan::number);
    let terminal = plan.maybe(|_| TerminalSize::default());
    CommandSpec { terminal, run_for_ms, ..CommandSpec::from(run) }
}

/// How far a command is.
pub fn status(plan: &mut Plan<'_>) -> CommandStatus {
    use CommandStatus::{
        Completed, Dispatched, Expired, Failed, Interrupted, Queued, Running, TimedOut, Unknown,
    };
    plan.of(&[
        Completed,
        Failed,
        Interrupted,
        TimedOut,
        Unknown,
        Expired,
        Running,
        Dispatched,
        Queued,
    ])
}

/// How a command ended.
pub fn end(plan: &mut Plan<'_>) -> CommandEnd {
    CommandEnd { exit_code: plan.maybe(|_| 0), end: plan.offset(), ..CommandEnd::default() }
}

/// An agent as dashboards see it.
pub fn agent_state(plan: &mut Plan<'_>, number: u8) -> AgentState {
    AgentState {
        agent: agent(number),
        presence: plan.of(&[
            Presence::Online,
            Presence::Busy,
            Presence::Unreachable,
            Presence::Offline,
        ]),
        since_ms: 0,
        instance: instance(plan.below(2)),
        about: AgentAbout::default(),
        slots: 1,
        running: 0,
        report: AgentReport { figures: BTreeMap::new(), note: plan.maybe(|_| "note".into()) },
    }
}

/// A command as dashboards see it.
pub fn command_state(plan: &mut Plan<'_>) -> CommandState {
    let status = status(plan);
    CommandState {
        command: command(plan),
        agent: agent(plan.below(2)),
        status,
        attempt: u32::from(plan.below(4)),
        title: "title".into(),
        priority: priority(plan),
        requested_by: None,
        requested_at_ms: 0,
        started_at_ms: None,
        ended_at_ms: status.is_final().then_some(1),
        stream: plan.maybe(stream),
        interrupt: plan.maybe(|_| InterruptStage::Accepted),
        end: status.is_final().then(|| end(plan)),
    }
}

/// A place in the queue.
pub fn priority(plan: &mut Plan<'_>) -> Priority {
    plan.of(&[Priority::Normal, Priority::High, Priority::Low])
}
