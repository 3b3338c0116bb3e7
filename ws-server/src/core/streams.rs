//! Stream logs: filled by one agent, read by any number of cursors, and the
//! grants that hold an agent to what the hub takes.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec;
use trunkline_protocol::codec::binary::OutputHeader;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, StreamId, TenantId};
use trunkline_protocol::message::{
    Envelope, ErrorCode, From, GapReason, HeldCommand, HubToAgent, HubToDashboard, Lag, Refusal,
    Target, TerminalGap, TerminalOpened, TerminalSubscription, TerminalTaken,
};
use trunkline_protocol::stream::{Log, Read};

use super::Map;
use super::agents::Agent;
use super::commands::Command;
use super::counts::OUTPUT;
use super::deadlines::Due;
use super::keeping::{Copied, Keeping};
use super::link::{DashboardLink, LinkId, Reader, State, Wait};
use super::rights::Rights;
use super::tenant::Tenant;
use super::wires::Wires;
use crate::hooks::{StreamHead, What};

/// The type of the message that names a hole.
const GAP: &str = "terminal:gap";

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) command: CommandId,
    pub(super) attempt: u32,
    pub(super) agent: AgentId,
    pub(super) log: Log,
    /// What the log was last known to cost, as counted in all logs together.
    counted: usize,
    /// The agent may send up to here.
    allowed: u64,
    /// What the agent was last told.
    pub(super) told: TerminalTaken,
    /// How far its copy in the stream log is.
    pub(super) copied: Copied,
    /// It is in line for more of that.
    pub(super) copying: bool,
    /// Whether the agent's list of takens to send has it.
    telling: bool,
    /// Dashboards that have read everything and are to be woken by more.
    waiting: Vec<LinkId>,
}

/// What a reader gets next.
enum Step {
    Frame(Frame),
    /// The reader was too slow for these.
    Slow(Frame, Range<u64>),
    Wait(Wait),
    /// It asked to be disconnected rather than lose a byte.
    Lost,
}

impl Stream {
    fn step(&mut self, reader: &mut Reader, binary: bool, behind_max: u64) -> Step {
        let end = self.log.end();
        let behind = reader.window.unwrap_or(behind_max);
        if reader.lag == Lag::Newest && end.saturating_sub(reader.at) > behind {
            let from = std::mem::replace(&mut reader.at, end);
            reader.shown = reader.shown.max(end);
            return Step::Frame(gap_frame(self.log.stream(), from, end, GapReason::Lagged));
        }
        let up_to = reader.window.map_or(u64::MAX, |window| reader.shown.saturating_add(window));
        if reader.at >= up_to && reader.at < end {
            return Step::Wait(Wait::Window);
        }
        let read = if binary {
            self.log.read_shared(reader.at, up_to)
        } else {
            self.log.read_text(reader.at, up_to, codec::encode_output_text)
        };
        match read {
            Read::Chunk { frame, next } => {
                reader.at = next;
                Step::Frame(if binary { Frame::Binary(frame) } else { Frame::Text(frame) })
            }
            Read::Gap(gap) if reader.lag == Lag::Disconnect && gap.reason == GapReason::Evicted => {
                Step::Lost
            }
            Read::Gap(gap) => {
                let was_late = std::mem::replace(&mut reader.is_late, false);
                reader.at = gap.to;
                reader.shown = reader.shown.max(gap.to);
                let is_slow = gap.reason == GapReason::Evicted && !was_late;
                let frame = gap_frame(self.log.stream(), gap.from, gap.to, gap.reason);
                if is_slow { Step::Slow(frame, gap.from..gap.to) } else { Step::Frame(frame) }
            }
            Read::End => Step::Wait(Wait::Output),
        }
    }
}

impl Stream {
    /// Brings the sums of all logs, and of all of its tenant, up to date with
    /// what this one costs now.
    fn count(&mut self, of_all: &mut usize, of_tenant: &mut usize) {
        let cost = self.log.cost();
        for sum in [of_all, of_tenant] {
            *sum = *sum - self.counted + cost;
        }
        self.counted = cost;
    }

    /// There is more in the log, be it the name of a hole, which is memory,
    /// too.
    fn grown(&mut self, wires: &mut Wires, tenant: &TenantId, of_tenant: &mut usize) {
        let before = self.log.start();
        self.log.evict_to(wires.limits.log_bytes_per_stream);
        wires.counts.evicted_bytes += self.log.start() - before;
        self.count(&mut wires.log_bytes, of_tenant);
        wires.keep(tenant, self.log.stream(), &mut self.copying);
    }

    pub(super) fn forget_reader(&mut self, link: LinkId) {
        self.waiting.retain(|waiting| *waiting != link);
    }
}

/// Where a stream ends, as far as its agent has said: how a command ended tells
/// that of the attempt that counted, and of no other.
fn told_end(commands: &HashMap<CommandId, Command>, id: StreamId, stream: &Stream) -> Option<u64> {
    let counted = commands.get(&stream.command).filter(|command| command.stream() == Some(id));
    counted.and_then(Command::end)
}

/// Up to where an agent may send that is taken up to `end`. No offset is beyond
/// 2^63 - 1, or the agent could not read it.
fn allowance(end: u64, ahead: u64) -> u64 {
    end.saturating_add(ahead).min(i64::MAX as u64)
}

fn gap_frame(stream: StreamId, from: u64, to: u64, reason: GapReason) -> Frame {
    let gap = TerminalGap { stream, from, to, reason };
    codec::encode(&Envelope::bare(HubToDashboard::Gap(gap)))
}

impl Tenant {
    // ---- filling --------------------------------------------------------

    /// A stream that the last hub kept. Whether its command is known.
    pub(super) fn load_stream(
        &mut self,
        wires: &mut Wires,
        head: StreamHead,
        log: Log,
        copied: Copied,
    ) -> bool {
        let StreamHead { stream, command, attempt, agent, .. } = head;
        let known = self.commands.get_mut(&command).filter(|known| known.request.agent == agent);
        let Some(known) = known else { return false };
        if !known.note_stream(attempt, stream) {
            return false;
        }
        if known.is_final() {
            let retention = wires.limits.log_retention;
            wires.in_time(Due::LogRetention(self.id.clone(), command), retention);
        }
        let (stored, allowed) = (log.end(), allowance(log.end(), wires.limits.grant_bytes));
        let mut loaded = Stream {
            command,
            attempt,
            agent,
            counted: 0,
            told: TerminalTaken { stream, stored, allowed },
            copied,
            copying: false,
            log,
            allowed,
            telling: false,
            waiting: Vec::new(),
        };
        loaded.log.evict_to(wires.limits.log_bytes_per_stream);
        loaded.count(&mut wires.log_bytes, &mut self.log_bytes);
        self.starting.remove(&command);
        self.streams.insert(stream, loaded);
        self.bound_logs(wires);
        true
    }

    /// A stream begins, or is known again: `from` is the oldest byte that its
    /// agent can still give. What is missing below the agent names itself: it
    /// knows whether a hub had it.
    pub(super) fn open_stream(
        &mut self,
        wires: &mut Wires,
        command: CommandId,
        stream: StreamId,
        from: u64,
    ) {
        let Some(record) = self.commands.get(&command) else { return };
        let attempt =
            record.streams.iter().find(|(_, id)| *id == stream).map_or(record.attempt, |(a, _)| *a);
        let agent = record.request.agent.clone();
        let order = record.is_final().then_some(record.order);
        if let Entry::Vacant(vacant) = self.streams.entry(stream) {
            let allowed = allowance(from, wires.limits.grant_bytes);
            let mut opened = Stream {
                command,
                counted: 0,
                attempt,
                agent: agent.clone(),
                told: TerminalTaken { stream, stored: 0, allowed },
                copied: Copied::default(),
                copying: false,
                log: Log::new(stream),
                allowed,
                telling: false,
                waiting: Vec::new(),
            };
            opened.count(&mut wires.log_bytes, &mut self.log_bytes);
            wires.keep(&self.id, stream, &mut opened.copying);
            vacant.insert(opened);
            self.starting.remove(&command);
            // Of one that has ended it may give way like any other.
            self.readable.extend(order.map(|order| (order, command)));
            self.announce(wires, stream, &Target::Command(command));
            self.announce(wires, stream, &Target::Agent(agent.clone()));
        }
        self.tell(wires, &agent, stream);
    }

    /// Opens a new stream for everyone who has asked for its target.
    fn announce(&mut self, wires: &mut Wires, stream: StreamId, target: &Target) {
        let Some(links) = self.interests.get(target) else { return };
        for id in links.clone() {
            let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) else {
                continue;
            };
            let Some(subscription) = dashboard.subscription.get(target).cloned() else { continue };
            self.open_reader(wires, id, stream, &subscription);
        }
    }

    /// The stream that a returning agent lists with a command: says how far
    /// this hub is, which is where the agent goes on.
    pub(super) fn take_stream(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        agent: &AgentId,
        held: &HeldCommand,
    ) {
        let Some(listed) = held.stream else { return };
        match self.streams.get_mut(&listed.stream) {
            Some(stream) if stream.agent == *agent => {
                // An end that is not stored yet may be forgotten with this hub.
                let known = self.commands.get(&held.command).filter(|known| known.is_final());
                let end = known.and_then(Command::end);
                if end.is_some_and(|end| stream.stored(wires.keeping.as_ref()) >= end) {
                    // Nothing more is wanted of it.
                    let stored = listed.to.max(stream.log.end());
                    let taken = TerminalTaken { stream: listed.stream, stored, allowed: stored };
                    wires.send(link, HubToAgent::Taken(taken));
                    return;
                }
                let ahead = allowance(stream.log.end(), wires.limits.grant_bytes);
                stream.allowed = stream.allowed.max(ahead);
                self.tell(wires, agent, listed.stream);
            }
            Some(_) => {}
            None => {
                // Its command is stored as ended here, but its output is gone
                // (or never was): take it again if the command is listed.
                let known = self.commands.get_mut(&held.command);
                let known = known.filter(|c| c.request.agent == *agent && !c.is_dropped);
                if known.is_some_and(|command| command.note_stream(held.attempt, listed.stream)) {
                    self.open_stream(wires, held.command, listed.stream, listed.from);
                } else {
                    let stored = listed.to;
                    let taken = TerminalTaken { stream: listed.stream, stored, allowed: stored };
                    wires.send(link, HubToAgent::Taken(taken));
                }
            }
        }
    }

    /// Output from its agent.
    pub(super) fn handle_output(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        agent: &AgentId,
        header: &OutputHeader,
        data: &Bytes,
    ) {
        let Some(stream) = self.streams.get_mut(&header.stream).filter(|s| s.agent == *agent)
        else {
            if self.dropped(header.stream, &Target::Agent(agent.clone())).is_some() {
                return; // it was on its way
            }
            let refusal = Refusal::new(ErrorCode::NotFound, "no such stream");
            wires.refuse_message(link, OUTPUT, refusal.field("payload.stream"));
            return;
        };
        if header.offset.saturating_add(data.len() as u64) > stream.allowed {
            wires.close(link, Close::new(CloseCode::BeyondGrant, "more output than was granted"));
            return;
        }
        // An end that was told is the end, whoever returns with more.
        let end = told_end(&self.commands, header.stream, stream).unwrap_or(u64::MAX);
        let room = usize::try_from(end.saturating_sub(header.offset)).unwrap_or(usize::MAX);
        let data = data.slice(..data.len().min(room));
        if data.is_empty() {
            return;
        }
        match stream.log.append(header.offset, header.channel, &data) {
            Ok(0) => {}
            Ok(_) => {
                stream.grown(wires, &self.id, &mut self.log_bytes);
                self.wake_readers(wires, header.stream);
                self.grant(wires, header.stream);
                self.bound_logs(wires);
            }
            Err(jump) => {
                let message = format!("offset: must not be beyond {}", jump.expected);
                let refusal = Refusal::new(ErrorCode::InvalidMessage, message);
                self.tell(wires, agent, header.stream);
                wires.refuse_message(link, OUTPUT, refusal.field("payload.offset"));
            }
        }
    }

    /// The agent lost bytes and says which.
    pub(super) fn handle_gap(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        agent: &AgentId,
        gap: TerminalGap,
    ) {
        let Some(stream) = self.streams.get_mut(&gap.stream).filter(|s| s.agent == *agent) else {
            let refusal = Refusal::new(ErrorCode::NotFound, "no such stream");
            wires.refuse_message(link, GAP, refusal.field("payload.stream"));
            return;
        };
        if gap.from > stream.log.end() {
            let message = format!("from: must not be beyond {}", stream.log.end());
            let refusal = Refusal::new(ErrorCode::InvalidMessage, message);
            wires.refuse_message(link, GAP, refusal.field("payload.from"));
            return;
        }
        let end = told_end(&self.commands, gap.stream, stream).unwrap_or(u64::MAX);
        if let Some(skipped) = stream.log.skip(gap.to.min(end), gap.reason) {
            wires.observe_gap(agent, gap.stream, &skipped);
            stream.allowed = stream.allowed.max(gap.to);
            stream.grown(wires, &self.id, &mut self.log_bytes);
            self.wake_readers(wires, gap.stream);
            self.grant(wires, gap.stream);
            self.bound_logs(wires);
        }
    }

    /// What an agent that returns does not list of the output of its ended
    /// commands, it no longer has: nobody is to wait for it.
    pub(super) fn close_lost_streams(
        &mut self,
        wires: &mut Wires,
        id: &AgentId,
        held: &[HeldCommand],
    ) {
        let Some(agent) = self.agents.get(id) else { return };
        let listed: BTreeSet<StreamId> =
            held.iter().filter_map(|held| held.stream).map(|listed| listed.stream).collect();
        let commands = agent.held.iter().chain(&agent.relearnt).chain(&agent.finished);
        let ended = commands.filter_map(|id| {
            let command = self.commands.get(id)?;
            Some((command.stream()?, command.end()?))
        });
        let lost: Vec<(StreamId, u64)> =
            ended.filter(|(stream, _)| !listed.contains(stream)).collect();
        for (id, end) in lost {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if let Some(gap) = stream.log.skip(end, GapReason::AgentLoss) {
                wires.observe_gap(&stream.agent, id, &gap);
                stream.grown(wires, &self.id, &mut self.log_bytes);
                self.wake_readers(wires, id);
            }
        }
        self.bound_logs(wires);
    }

    fn wake_readers(&mut self, wires: &mut Wires, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        for link in stream.waiting.drain(..) {
            let Some(dashboard) = wires.links.get_mut(&link).and_then(|l| l.dashboard()) else {
                continue;
            };
            let Some(reader) = dashboard.readers.get_mut(&id) else { continue };
            if reader.wait == Wait::Output {
                reader.wait = Wait::Turn;
                dashboard.turn.push_back(id);
                wires.wake(link);
            }
        }
    }

    // ---- grants ---------------------------------------------------------

    /// Lets the agent go on as it is read, as fast as its rate allows.
    fn grant(&mut self, wires: &mut Wires, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some(agent) = self.agents.get_mut(&stream.agent) else { return };
        let ahead = wires.limits.grant_bytes;
        let step = (ahead / 8).max(1);
        let wanted = allowance(stream.log.end(), ahead).saturating_sub(stream.allowed);
        if wanted < step {
            return;
        }
        let rate = wires.limits.terminal_bytes_per_second.max(1);
        let passed = wires.now.monotonic.saturating_sub(agent.tokens_at);
        let earned = u128::from(rate) * passed.as_micros() / 1_000_000;
        let earned = u64::try_from(earned).unwrap_or(u64::MAX);
        if earned > 0 {
            agent.tokens = agent.tokens.saturating_add(earned).min(ahead);
            agent.tokens_at = wires.now.monotonic;
        }
        let given = wanted.min(agent.tokens);
        if given < step {
            let missing = step.saturating_sub(agent.tokens);
            let micros = u128::from(missing) * 1_000_000 / u128::from(rate);
            let after = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX) + 1);
            let at = wires.at(after);
            wires.deadlines.set_earlier(Due::Grant(self.id.clone(), stream.agent.clone()), at);
            return;
        }
        agent.tokens -= given;
        stream.allowed += given;
        let agent = stream.agent.clone();
        self.tell(wires, &agent, id);
    }

    /// The agent's rate allows more.
    pub(super) fn handle_grant(&mut self, wires: &mut Wires, agent: &AgentId) {
        for id in self.live_streams(agent) {
            self.grant(wires, id);
        }
    }

    /// The link to an agent was silent: a good time to say what is stored.
    pub(super) fn tell_stored(&mut self, wires: &mut Wires, agent: &AgentId) {
        for id in self.live_streams(agent) {
            let behind =
                |stream: &Stream| stream.told.stored < stream.stored(wires.keeping.as_ref());
            if self.streams.get(&id).is_some_and(behind) {
                self.tell(wires, agent, id);
            }
        }
    }

    /// More of a stream is stored: says so if that is much, or all.
    pub(super) fn tell_stored_of(&mut self, wires: &mut Wires, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let stored = stream.stored(wires.keeping.as_ref());
        let news = stored.saturating_sub(stream.told.stored);
        if news >= (wires.limits.grant_bytes / 8).max(1) || (news > 0 && stored == stream.log.end())
        {
            let agent = stream.agent.clone();
            self.tell(wires, &agent, id);
        }
    }

    /// The agent's streams that may still grow here: those of commands that
    /// have not ended, and those that ended with output still under way.
    pub(super) fn live_streams(&self, agent: &AgentId) -> Vec<StreamId> {
        let Some(agent) = self.agents.get(agent) else { return Vec::new() };
        let commands = agent.held.iter().chain(&agent.relearnt).chain(&agent.finished);
        let commands = commands.filter_map(|id| self.commands.get(id));
        let live = commands.filter_map(|command| {
            let id = command.stream()?;
            let stream = self.streams.get(&id)?;
            command.end().is_none_or(|end| stream.log.end() < end).then_some(id)
        });
        live.collect()
    }

    fn tell(&mut self, wires: &mut Wires, agent: &AgentId, id: StreamId) {
        let Some(record) = self.agents.get_mut(agent) else { return };
        let Some(link) = record.link() else { return };
        let Some(stream) = self.streams.get_mut(&id) else { return };
        // The list is emptied when a link is lost; the flag tells by whether
        // the list still has it.
        if !(stream.telling && record.tell.contains(&id)) {
            stream.telling = true;
            record.tell.push(id);
        }
        wires.wake(link);
    }

    /// Writes the takens that wait, newest figures only.
    pub(super) fn transmit_agent(
        &mut self,
        keeping: Option<&Keeping>,
        agent: &AgentId,
        into: &mut Vec<Frame>,
    ) {
        let Some(agent) = self.agents.get_mut(agent) else { return };
        for id in std::mem::take(&mut agent.tell) {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.telling = false;
            let (stored, allowed) = (stream.stored(keeping), stream.allowed);
            stream.told = TerminalTaken { stream: id, stored, allowed };
            into.push(codec::encode(&Envelope::bare(HubToAgent::Taken(stream.told.clone()))));
        }
    }

    // ---- reading --------------------------------------------------------

    /// Opens a stream for a dashboard, announced before its first byte.
    pub(super) fn open_reader(
        &mut self,
        wires: &mut Wires,
        id: LinkId,
        stream_id: StreamId,
        subscription: &TerminalSubscription,
    ) {
        let Some(stream) = self.streams.get(&stream_id) else {
            self.tell_dropped(wires, id, stream_id, subscription);
            return;
        };
        let Some(dashboard) = wires.dashboard(id) else { return };
        if dashboard.readers.contains_key(&stream_id)
            || !self.rights(wires).sees(&dashboard.identity, &stream.agent)
        {
            return;
        }
        let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) else {
            return;
        };
        let end = stream.log.end();
        let from = match (subscription.positions.get(&stream_id), subscription.from) {
            (Some(position), _) => *position,
            (None, From::Live) => end,
            // What is gone before it began is no loss to a reader that would
            // rather be disconnected than lose a byte.
            (None, From::Start) if subscription.lag == Lag::Disconnect => stream.log.start(),
            (None, From::Start) => 0,
        };
        dashboard.readers.insert(
            stream_id,
            Reader {
                at: from,
                lag: subscription.lag,
                window: subscription.window_bytes,
                shown: from,
                is_late: from < stream.log.start(),
                wait: Wait::Turn,
            },
        );
        dashboard.turn.push_back(stream_id);
        let opened = TerminalOpened {
            stream: stream_id,
            command: stream.command,
            attempt: stream.attempt,
            agent: stream.agent.clone(),
            from,
            live_from: end,
        };
        wires.send(id, HubToDashboard::Opened(opened));
    }

    /// The output that a dashboard wants was here, and has had to go: it hears
    /// so as it would have if it had been reading.
    fn tell_dropped(
        &self,
        wires: &mut Wires,
        id: LinkId,
        stream: StreamId,
        subscription: &TerminalSubscription,
    ) {
        let Some(command) = self.dropped(stream, &subscription.target) else { return };
        let (agent, end) = (command.request.agent.clone(), command.end().unwrap_or(0));
        let Some(dashboard) = wires.dashboard(id) else { return };
        if !self.rights(wires).sees(&dashboard.identity, &agent) {
            return;
        }
        let from = match (subscription.positions.get(&stream), subscription.from) {
            (Some(position), _) => *position,
            (None, From::Live) => end,
            (None, From::Start) if subscription.lag == Lag::Disconnect => end,
            (None, From::Start) => 0,
        };
        let opened = TerminalOpened {
            stream,
            command: command.request.command,
            attempt: command.attempt,
            agent,
            from,
            live_from: end,
        };
        wires.send(id, HubToDashboard::Opened(opened));
        if from < end {
            wires.send_frame(id, GAP, gap_frame(stream, from, end, GapReason::Evicted));
        }
    }

    /// The finished command whose output this was, if it was dropped here.
    pub(super) fn dropped(&self, stream: StreamId, target: &Target) -> Option<&Command> {
        let is_it = |command: &&Command| {
            command.is_final() && command.is_dropped && command.stream() == Some(stream)
        };
        match target {
            Target::Command(id) => self.commands.get(id).filter(is_it),
            Target::Agent(id) => {
                let finished = self.agents.get(id).into_iter().flat_map(|agent| &agent.finished);
                finished.filter_map(|id| self.commands.get(id)).find(is_it)
            }
        }
    }

    /// A dashboard no longer reads a stream.
    pub(super) fn close_reader(
        streams: &mut Map<StreamId, Stream>,
        dashboard: &mut DashboardLink,
        link: LinkId,
        id: StreamId,
    ) {
        dashboard.readers.remove(&id);
        dashboard.turn.retain(|turn| *turn != id);
        if let Some(stream) = streams.get_mut(&id) {
            stream.waiting.retain(|waiting| *waiting != link);
        }
    }

    /// What a view has shown lets a reader with a window go on.
    pub(super) fn handle_shown(wires: &mut Wires, id: LinkId, stream: StreamId, offset: u64) {
        let Some(link) = wires.links.get_mut(&id) else { return };
        let Some(dashboard) = link.dashboard() else { return };
        let Some(reader) = dashboard.readers.get_mut(&stream) else { return };
        reader.shown = reader.shown.max(offset.min(reader.at));
        if reader.wait == Wait::Window {
            reader.wait = Wait::Turn;
            dashboard.turn.push_back(stream);
            wires.wake(id);
        }
    }

    /// The next pieces of what a dashboard reads, in turn, about `bytes` of
    /// them. Returns whether there is more.
    pub(super) fn transmit_dashboard(
        &mut self,
        wires: &mut Wires,
        id: LinkId,
        into: &mut Vec<Frame>,
        bytes: usize,
    ) -> bool {
        let behind_max = wires.limits.newest_bytes_behind;
        let stream_bytes_max = wires.limits.log_bytes_per_stream;
        let log_bytes = &mut wires.log_bytes;
        let Some(link) = wires.links.get_mut(&id) else { return false };
        let binary = link.binary;
        let State::Dashboard(dashboard) = &mut link.state else { return false };
        let rights =
            Rights { policy: &*wires.policy, agents: &self.agents, departed: &self.departed };
        let sees = |agent: &AgentId| rights.sees(&dashboard.identity, agent);
        let mut left = bytes;
        while left > 0 && self.ledger.has_news(&dashboard.cursor) {
            let Some(frame) = self.ledger.read(&mut dashboard.cursor, sees) else { break };
            left = left.saturating_sub(frame.len());
            wires.counts.sent("roster", frame.len());
            into.push(frame);
        }
        if !dashboard.follows && !self.ledger.has_news(&dashboard.cursor) {
            dashboard.follows = true;
            self.followers.push(id);
        }
        let mut lost = false;
        let mut slow = Vec::new();
        while left > 0
            && let Some(stream_id) = dashboard.turn.pop_front()
        {
            let (Some(stream), Some(reader)) =
                (self.streams.get_mut(&stream_id), dashboard.readers.get_mut(&stream_id))
            else {
                continue;
            };
            // As long as nothing else has its turn, this stream goes on.
            let next = loop {
                match stream.step(reader, binary, behind_max) {
                    Step::Frame(frame) => {
                        wires.output.sent.add(frame.len());
                        left = left.saturating_sub(frame.len());
                        into.push(frame);
                        if left == 0 || !dashboard.turn.is_empty() {
                            break Some(Wait::Turn);
                        }
                    }
                    Step::Slow(frame, missed) => {
                        slow.push((stream_id, missed));
                        wires.counts.sent(GAP, frame.len());
                        into.push(frame);
                    }
                    Step::Wait(wait) => break Some(wait),
                    Step::Lost => break None,
                }
            };
            if stream.log.cost() != stream.counted {
                // The log keeps frames that it made, within its bound.
                stream.log.evict_to(stream_bytes_max);
                stream.count(log_bytes, &mut self.log_bytes);
            }
            match next {
                Some(wait) => {
                    reader.wait = wait;
                    match wait {
                        Wait::Turn => dashboard.turn.push_back(stream_id),
                        Wait::Output => stream.waiting.push(id),
                        Wait::Window => {}
                    }
                }
                None => lost = true,
            }
        }
        let more = !dashboard.turn.is_empty() || self.ledger.has_news(&dashboard.cursor);
        // The frames that logs keep for other readers are memory like the rest.
        self.bound_logs(wires);
        for (stream, missed) in slow {
            let what = What::Slow { stream, from: missed.start, to: missed.end };
            wires.observe_peer(id, what);
        }
        if lost {
            wires.close(id, Close::new(CloseCode::Lagging, "output was lost to this reader"));
        }
        more && !lost
    }

    // ---- dropping -------------------------------------------------------

    /// Drops a stream's log. Who has not read it all is told what is gone.
    pub(super) fn drop_stream(&mut self, wires: &mut Wires, id: StreamId) {
        let Some(stream) = self.streams.remove(&id) else { return };
        wires.log_bytes -= stream.counted;
        self.log_bytes -= stream.counted;
        wires.keep_no_more(&self.id, id);
        let told = told_end(&self.commands, id, &stream);
        let end = stream.log.end().max(told.unwrap_or(0));
        if stream.log.end() < end
            && let Some(link) = self.agents.get(&stream.agent).and_then(Agent::link)
        {
            // Nothing more is wanted of it.
            let taken = TerminalTaken { stream: id, stored: end, allowed: end };
            wires.send(link, HubToAgent::Taken(taken));
        }
        let links: BTreeSet<LinkId> = self.dashboards.values().filter_map(|d| d.link).collect();
        for link in links {
            let Some(dashboard) = wires.links.get_mut(&link).and_then(|l| l.dashboard()) else {
                continue;
            };
            let Some(reader) = dashboard.readers.remove(&id) else { continue };
            dashboard.turn.retain(|turn| *turn != id);
            if reader.at < end {
                wires.send_frame(link, GAP, gap_frame(id, reader.at, end, GapReason::Evicted));
            }
        }
    }

    /// Keeps this tenant's logs together within their bound: the largest gives.
    fn bound_logs(&mut self, wires: &mut Wires) {
        while self.log_bytes > wires.limits.log_bytes_per_tenant {
            let Some((cost, stream)) = self.largest_stream() else { return };
            let before = self.log_bytes;
            // An eighth at a time, so that the search is rare.
            self.evict(wires, stream, cost - cost / 8);
            if self.log_bytes >= before {
                return;
            }
        }
    }

    /// The largest log's cost, and whose it is.
    pub(super) fn largest_stream(&self) -> Option<(usize, StreamId)> {
        self.streams.iter().map(|(id, stream)| (stream.log.cost(), *id)).max()
    }

    /// Frees memory of one log.
    pub(super) fn evict(&mut self, wires: &mut Wires, id: StreamId, down_to: usize) {
        if let Some(stream) = self.streams.get_mut(&id) {
            let before = stream.log.start();
            stream.log.evict_to(down_to);
            wires.counts.evicted_bytes += stream.log.start() - before;
            stream.count(&mut wires.log_bytes, &mut self.log_bytes);
            wires.keep(&self.id, id, &mut stream.copying);
        }
    }
}

impl Tenant {
    /// A finished command's output has been kept long enough; the command
    /// itself stays listed.
    pub(super) fn drop_output(&mut self, wires: &mut Wires, id: CommandId) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        self.readable.remove(&(command.order, id));
        let streams: Vec<StreamId> = command.streams.iter().map(|(_, stream)| *stream).collect();
        command.is_dropped |= streams.iter().any(|stream| self.streams.contains_key(stream));
        for stream in streams {
            self.drop_stream(wires, stream);
        }
    }
}
