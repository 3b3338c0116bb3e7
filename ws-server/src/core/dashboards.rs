//! Dashboards: their requests, each answered once, and what they read.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, DashboardId, RequestId, StreamId};
use trunkline_protocol::message::{
    Accepted, DashboardToHub, Direction as _, Envelope, ErrorCode, HubToAgent, HubToDashboard,
    Refusal, Subscribe, Subscription, Target, TerminalInput, TerminalInputTaken, TerminalResize,
    TerminalSubscription, Unsubscribe,
};

use super::agents::Agent;
use super::agents::stale;
use super::deadlines::Due;
use super::link::{DashboardLink, LinkId, State};
use super::subjects::{flood, rate_limited};
use super::tenant::Tenant;
use super::wires::Wires;
use crate::hooks::{Identity, What};

/// Dashboards that type into one command, all of its life. About 100 bytes
/// each.
const WRITERS_MAX: usize = 1024;

/// How long a dashboard that left is remembered: its answers with it.
const REMEMBERED: Duration = Duration::from_secs(15 * 60);

/// Dashboards of a tenant that are remembered after they left; beyond that
/// whoever left first is forgotten first. A request that such a one asks again
/// is carried out again, which is harmless: every request names its effect.
const REMEMBERED_MAX: usize = 4096;

/// Answers remembered for all of those together. About 300 bytes each.
const REMEMBERED_ANSWERS_MAX: usize = 32 * 1024;

/// The dashboards that left, by when.
#[derive(Debug, Default)]
pub(super) struct Left {
    by_time: BTreeSet<(Duration, DashboardId)>,
    answers: usize,
}

#[derive(Debug)]
pub(super) struct Dashboard {
    /// As it was on its latest link.
    pub(super) identity: Arc<Identity>,
    pub(super) link: Option<LinkId>,
    /// The newest of its links so far.
    latest: LinkId,
    /// The latest answers, oldest first.
    answers: VecDeque<(RequestId, &'static str, Frame)>,
    /// Since when it is away, and with how many answers.
    left: Option<(Duration, usize)>,
}

/// What a dashboard asks for that is told whatever becomes of it.
enum Asked {
    Command { command: CommandId, agent: AgentId, title: String },
    Interrupt(CommandId, Option<AgentId>),
    Stop(Option<Vec<AgentId>>),
    Other,
}

impl Asked {
    fn refused(self, message: &'static str, code: &ErrorCode) -> What {
        let code = code.clone();
        match self {
            Self::Command { command, agent, title } => {
                What::CommandRequested { command, agent, title, outcome: Err(code) }
            }
            Self::Interrupt(command, agent) => {
                What::InterruptRequested { command, agent, outcome: Err(code) }
            }
            Self::Stop(agents) => What::StopRequested { agents, outcome: Err(code) },
            Self::Other => What::Refused { message: Some(message), code },
        }
    }

    /// `None` for what is told elsewhere, or not at all.
    fn accepted(self, stopped: Option<u32>) -> Option<What> {
        match self {
            Self::Command { .. } | Self::Other => None,
            Self::Interrupt(command, agent) => {
                Some(What::InterruptRequested { command, agent, outcome: Ok(()) })
            }
            Self::Stop(agents) => {
                Some(What::StopRequested { agents, outcome: Ok(stopped.unwrap_or_default()) })
            }
        }
    }
}

impl Tenant {
    /// A dashboard has greeted and been recognised: whether it may see what it
    /// could when it was here last. `Err` when it may not come under this id.
    pub(super) fn handle_dashboard_here(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        id: &DashboardId,
        identity: &Arc<Identity>,
    ) -> Result<bool, Close> {
        let known = self.dashboards.get(id);
        if known.is_some_and(|known| known.identity.subject != identity.subject) {
            return Err(Close::new(CloseCode::Forbidden, "another subject has this id"));
        }
        if known.is_some_and(|known| link < known.latest) {
            return Err(stale());
        }
        let replaces = known.is_some_and(|known| known.link.is_some());
        self.add_link(wires, &identity.subject, replaces)?;
        let mut sees_as_before = false;
        if let Some(known) = self.dashboards.get_mut(id) {
            known.latest = link;
            sees_as_before = known.identity.sees_as(identity);
            known.identity = Arc::clone(identity);
            if let Some(old) = known.link.replace(link) {
                wires.close(old, Close::new(CloseCode::Superseded, "another link took over"));
            }
            if let Some((since, answers)) = known.left.take() {
                self.left.by_time.remove(&(since, id.clone()));
                self.left.answers -= answers;
            }
        } else {
            let identity = Arc::clone(identity);
            let answers = VecDeque::new();
            let dashboard =
                Dashboard { identity, link: Some(link), latest: link, answers, left: None };
            self.dashboards.insert(id.clone(), dashboard);
        }
        wires.deadlines.cancel(&Due::Dashboard(self.id.clone(), id.clone()));
        Ok(sees_as_before)
    }

    /// A dashboard's link is gone: nothing of it stays but its answers.
    pub(super) fn handle_dashboard_lost(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        gone: &DashboardLink,
    ) {
        self.remove_link(wires, &gone.identity.subject);
        self.followers.retain(|follower| *follower != link);
        for target in gone.subscription.keys() {
            self.lose_interest(target, link);
        }
        for stream in gone.readers.keys() {
            if let Some(stream) = self.streams.get_mut(stream) {
                stream.forget_reader(link);
            }
        }
        if let Some(known) = self.dashboards.get_mut(&gone.dashboard)
            && known.link == Some(link)
        {
            known.link = None;
            let since = wires.now.monotonic;
            known.left = Some((since, known.answers.len()));
            self.left.answers += known.answers.len();
            self.left.by_time.insert((since, gone.dashboard.clone()));
            wires.in_time(Due::Dashboard(self.id.clone(), gone.dashboard.clone()), REMEMBERED);
            while self.left.by_time.len() > REMEMBERED_MAX
                || self.left.answers > REMEMBERED_ANSWERS_MAX
            {
                let Some((_, first)) = self.left.by_time.first() else { return };
                let first = first.clone();
                self.forget_dashboard(wires, &first);
            }
        }
    }

    /// A dashboard has been away for long enough, or others need the room.
    pub(super) fn forget_dashboard(&mut self, wires: &mut Wires, id: &DashboardId) {
        let Some(left) = self.dashboards.get(id).and_then(|known| known.left) else { return };
        let (since, answers) = left;
        self.left.by_time.remove(&(since, id.clone()));
        self.left.answers -= answers;
        self.dashboards.remove(id);
        wires.deadlines.cancel(&Due::Dashboard(self.id.clone(), id.clone()));
    }

    fn lose_interest(&mut self, target: &Target, link: LinkId) {
        if let Some(links) = self.interests.get_mut(target) {
            links.retain(|interested| *interested != link);
            if links.is_empty() {
                self.interests.remove(target);
            }
        }
    }

    pub(super) fn handle_dashboard_message(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        from: &DashboardId,
        envelope: Envelope<DashboardToHub>,
    ) {
        let Envelope { id, message, .. } = envelope;
        let kind = message.kind();
        let Some(dashboard) = wires.dashboard(link) else { return };
        let who = Arc::clone(&dashboard.identity);
        let asked = self.asked(wires, &who, &message);
        if let Err(refusal) = self.count_request(wires, &who.subject, &message) {
            // Not remembered: it is to be asked again.
            wires.observe_peer(link, asked.refused(kind, &refusal.code));
            wires.refuse(link, refusal.reply_to(id));
            return;
        }
        if let Some((kind, frame)) = self.remembered(from, id.as_ref()) {
            wires.send_frame(link, kind, frame);
            return;
        }
        if let Err(refusal) = self.permit(wires, &who, &message) {
            // Not remembered: another token may allow it.
            wires.observe_peer(link, asked.refused(kind, &refusal.code));
            wires.refuse(link, refusal.reply_to(id));
            return;
        }
        let done: Result<Option<Accepted>, Refusal> = match message {
            DashboardToHub::Subscribe(subscribe) => {
                let named = subscribe.terminals.len();
                let subscribed = match self.count_answer(wires, link, &who, named) {
                    Ok(()) => self.subscribe(wires, link, id.clone(), subscribe),
                    Err(wait) => Err(rate_limited(wait)),
                };
                if let Err(refusal) = subscribed {
                    wires.refuse_message(link, kind, refusal.reply_to(id));
                }
                return;
            }
            DashboardToHub::Unsubscribe(unsubscribe) => {
                let named = unsubscribe.terminals.len();
                if self.count_answer(wires, link, &who, named).is_err() {
                    // To end something is never refused.
                    wires.close(link, flood());
                    return;
                }
                self.unsubscribe(wires, link, id.clone(), &unsubscribe);
                return;
            }
            DashboardToHub::Shown(shown) => {
                Self::handle_shown(wires, link, shown.stream, shown.offset);
                return;
            }
            DashboardToHub::Request(request) => {
                self.request_command(wires, from, id.clone(), request).map(|()| None)
            }
            DashboardToHub::Interrupt(interrupt) => {
                self.interrupt_command(wires, &interrupt).map(|()| Some(Accepted::default()))
            }
            DashboardToHub::Input(input) => {
                self.handle_input(wires, link, from, input).map(|()| None)
            }
            DashboardToHub::Resize(resize) => {
                self.handle_resize(wires, resize).map(|()| Some(Accepted::default()))
            }
            DashboardToHub::EmergencyStop(stop) => {
                let stopped = Some(self.stop_all(wires, &who, &stop));
                Ok(Some(Accepted { stopped, ..Accepted::default() }))
            }
            // These are about the link, and are handled where links are.
            DashboardToHub::Disconnect(_)
            | DashboardToHub::Log(_)
            | DashboardToHub::Ping(_)
            | DashboardToHub::Pong(_)
            | DashboardToHub::RefreshToken(_)
            | DashboardToHub::Error(_) => return,
        };
        match done {
            // A command is told of when it is stored.
            Ok(None) => {}
            Ok(Some(accepted)) => {
                if let Some(what) = asked.accepted(accepted.stopped) {
                    wires.observe_peer(link, what);
                }
                self.answer_ok(wires, from, id, accepted);
            }
            Err(refusal) => {
                wires.observe_peer(link, asked.refused(kind, &refusal.code));
                self.answer_error(wires, from, id, refusal);
            }
        }
    }

    /// What a message asks, in an observer's words.
    fn asked(&self, wires: &Wires, who: &Identity, message: &DashboardToHub) -> Asked {
        match message {
            DashboardToHub::Request(request) => Asked::Command {
                command: request.command,
                agent: request.agent.clone(),
                title: request.spec.run.title(),
            },
            DashboardToHub::Interrupt(interrupt) => {
                let known = self.commands.get(&interrupt.command).map(|known| &known.request.agent);
                let agent = known.filter(|agent| self.rights(wires).sees(who, agent)).cloned();
                Asked::Interrupt(interrupt.command, agent)
            }
            DashboardToHub::EmergencyStop(stop) => Asked::Stop(stop.agents.clone()),
            DashboardToHub::Subscribe(_)
            | DashboardToHub::Unsubscribe(_)
            | DashboardToHub::Shown(_)
            | DashboardToHub::Input(_)
            | DashboardToHub::Resize(_)
            | DashboardToHub::Disconnect(_)
            | DashboardToHub::Log(_)
            | DashboardToHub::Ping(_)
            | DashboardToHub::Pong(_)
            | DashboardToHub::RefreshToken(_)
            | DashboardToHub::Error(_) => Asked::Other,
        }
    }

    // ---- answers --------------------------------------------------------

    fn remembered(
        &self,
        from: &DashboardId,
        id: Option<&RequestId>,
    ) -> Option<(&'static str, Frame)> {
        let id = id?;
        let known = self.dashboards.get(from)?;
        let answer = known.answers.iter().find(|(answered, ..)| answered == id);
        answer.map(|(_, kind, frame)| (*kind, frame.clone()))
    }

    pub(super) fn answer_ok(
        &mut self,
        wires: &mut Wires,
        to: &DashboardId,
        id: Option<RequestId>,
        accepted: Accepted,
    ) {
        let accepted = Accepted { in_reply_to: id.clone(), ..accepted };
        self.answer(wires, to, id, HubToDashboard::Ok(accepted));
    }

    pub(super) fn answer_error(
        &mut self,
        wires: &mut Wires,
        to: &DashboardId,
        id: Option<RequestId>,
        refusal: Refusal,
    ) {
        wires.counts.refused(&refusal.code);
        self.answer(wires, to, id.clone(), HubToDashboard::Error(refusal.reply_to(id)));
    }

    /// Answers on the dashboard's present link, and remembers the answer in
    /// case that link is lost first.
    fn answer(
        &mut self,
        wires: &mut Wires,
        to: &DashboardId,
        id: Option<RequestId>,
        message: HubToDashboard,
    ) {
        let Some(dashboard) = self.dashboards.get_mut(to) else { return };
        let (ts, kind) = (Some(wires.now.wall_ms), message.kind());
        let frame = codec::encode(&Envelope { id: None, ts, message });
        if let Some(id) = id {
            dashboard.answers.push_back((id, kind, frame.clone()));
            if dashboard.answers.len() > wires.limits.answers_max {
                dashboard.answers.pop_front();
            }
        }
        if let Some(link) = dashboard.link {
            wires.send_frame(link, kind, frame);
        }
    }

    // ---- subscriptions --------------------------------------------------

    /// Counts a message that names some terminals, and is answered with those
    /// that are subscribed to. `Err` is a time to wait.
    fn count_answer(
        &mut self,
        wires: &Wires,
        link: LinkId,
        who: &Identity,
        named: usize,
    ) -> Result<(), Duration> {
        let known = wires.dashboard(link).map_or(0, |dashboard| dashboard.subscription.len());
        self.count_terminals(wires, &who.subject, named + known)
    }

    fn subscribe(
        &mut self,
        wires: &mut Wires,
        id: LinkId,
        request: Option<RequestId>,
        subscribe: Subscribe,
    ) -> Result<(), Refusal> {
        let max = wires.limits.subscriptions_max;
        let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) else {
            return Ok(());
        };
        let known = &dashboard.subscription;
        // Of two for one target the later counts.
        let terminals = subscribe.terminals.into_iter().map(|s| (s.target.clone(), s));
        let terminals: BTreeMap<Target, TerminalSubscription> = terminals.collect();
        let new = terminals.keys().filter(|target| !known.contains_key(target)).count();
        if known.len() + new > max {
            let message = format!("at most {max} terminal subscriptions");
            return Err(Refusal::new(ErrorCode::LimitReached, message).field("payload.terminals"));
        }
        self.end_subscriptions(wires, id, terminals.keys());
        let mut open = Vec::new();
        for (target, subscription) in terminals {
            let streams = self.covered(&subscription);
            self.interests.entry(target.clone()).or_default().push(id);
            if let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) {
                // With its positions: a stream may be known again only later, when
                // the agent of a hub that lost its memory is back.
                dashboard.subscription.insert(target, subscription.clone());
            }
            open.extend(streams.into_iter().map(|stream| (stream, subscription.clone())));
        }
        Self::answer_subscription(wires, id, request);
        for (stream, subscription) in open {
            self.open_reader(wires, id, stream, &subscription);
        }
        Ok(())
    }

    /// The streams that a subscription covers now. For a command: those of
    /// all its attempts. For an agent: those that are being written, and
    /// those in which the reader has a position.
    pub(super) fn covered(&self, subscription: &TerminalSubscription) -> Vec<StreamId> {
        match &subscription.target {
            Target::Command(id) => {
                let command = self.commands.get(id);
                command.into_iter().flat_map(|c| c.streams.iter().map(|(_, s)| *s)).collect()
            }
            Target::Agent(id) => {
                let mut streams: Vec<StreamId> = self.live_streams(id);
                let known = subscription.positions.keys().filter(|stream| {
                    let known = self.streams.get(stream);
                    known.is_some_and(|known| known.agent == *id)
                        || self.dropped(**stream, &subscription.target).is_some()
                });
                for stream in known {
                    if !streams.contains(stream) {
                        streams.push(*stream);
                    }
                }
                streams
            }
        }
    }

    fn unsubscribe(
        &mut self,
        wires: &mut Wires,
        id: LinkId,
        request: Option<RequestId>,
        unsubscribe: &Unsubscribe,
    ) {
        self.end_subscriptions(wires, id, &unsubscribe.terminals);
        Self::answer_subscription(wires, id, request);
    }

    pub(super) fn end_subscription(&mut self, wires: &mut Wires, id: LinkId, target: &Target) {
        self.end_subscriptions(wires, id, [target]);
    }

    /// All at once: each reader is looked at once, however many end.
    fn end_subscriptions<'a>(
        &mut self,
        wires: &mut Wires,
        id: LinkId,
        targets: impl IntoIterator<Item = &'a Target>,
    ) {
        let Some(dashboard) = wires.links.get_mut(&id).and_then(|link| link.dashboard()) else {
            return;
        };
        let before = dashboard.subscription.len();
        for target in targets {
            if dashboard.subscription.remove(target).is_some() {
                self.lose_interest(target, id);
            }
        }
        if dashboard.subscription.len() == before {
            return;
        }
        let kept = |stream: &StreamId| {
            let Some(stream) = self.streams.get(stream) else { return false };
            dashboard.subscription.contains_key(&Target::Command(stream.command))
                || dashboard.subscription.contains_key(&Target::Agent(stream.agent.clone()))
        };
        let gone: Vec<StreamId> = dashboard.readers.keys().filter(|s| !kept(s)).copied().collect();
        for stream in gone {
            Self::close_reader(&mut self.streams, dashboard, id, stream);
        }
    }

    fn answer_subscription(wires: &mut Wires, id: LinkId, request: Option<RequestId>) {
        let Some(link) = wires.links.get(&id) else { return };
        let State::Dashboard(dashboard) = &link.state else { return };
        // Not remembered: a subscription belongs to its link.
        let told = |subscription: &TerminalSubscription| TerminalSubscription {
            positions: BTreeMap::new(),
            ..subscription.clone()
        };
        let terminals = dashboard.subscription.values().map(told).collect();
        let accepted = Accepted {
            in_reply_to: request,
            subscription: Some(Subscription { terminals }),
            ..Accepted::default()
        };
        wires.send(id, HubToDashboard::Ok(accepted));
    }

    // ---- input ----------------------------------------------------------

    fn handle_input(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        from: &DashboardId,
        input: TerminalInput,
    ) -> Result<(), Refusal> {
        let not_found = || Refusal::new(ErrorCode::NotFound, "no such command");
        let command = self.commands.get_mut(&input.command).ok_or_else(not_found)?;
        if !command.is_running() {
            let mut refusal = Refusal::new(ErrorCode::NotRunning, "the command is not running");
            refusal.recoverable = !command.is_final();
            return Err(refusal);
        }
        if command.writers.len() >= WRITERS_MAX && !command.writers.contains_key(from) {
            let message = format!("at most {WRITERS_MAX} dashboards type into one command");
            return Err(Refusal::new(ErrorCode::LimitReached, message));
        }
        let is_new = !command.writers.contains_key(from);
        // A writer that this hub meets half-way goes on from where it stands;
        // the agent knows better and says so.
        let taken = command.writers.entry(from.clone()).or_insert(input.offset);
        let end = input.offset.saturating_add(input.data.len() as u64);
        if end > taken.saturating_add(wires.limits.input_bytes_ahead) {
            let message =
                format!("at most {} bytes ahead of what was taken", wires.limits.input_bytes_ahead);
            return Err(Refusal::new(ErrorCode::LimitReached, message).field("payload.offset"));
        }
        if is_new {
            let agent = command.request.agent.clone();
            wires.observe_peer(link, What::InputBegan { command: input.command, agent });
        }
        // An absent agent gets it again when it is back: it says how far it got.
        if let Some(link) = self.agents.get(&command.request.agent).and_then(Agent::link) {
            let input = TerminalInput { writer: Some(from.clone()), ..input };
            wires.send(link, HubToAgent::Input(input));
        }
        Ok(())
    }

    /// The agent says how far a writer's input has got.
    pub(super) fn handle_input_taken(
        &mut self,
        wires: &mut Wires,
        agent: &AgentId,
        taken: TerminalInputTaken,
    ) {
        let Some(command) = self.commands.get_mut(&taken.command) else { return };
        if command.request.agent != *agent || !command.is_running() {
            return;
        }
        // Writers are dashboards that typed: an agent cannot invent them.
        let Some(dashboard) = self.dashboards.get(&taken.writer) else { return };
        let known = command.writers.entry(taken.writer.clone()).or_insert(0);
        *known = (*known).max(taken.offset);
        if let Some(link) = dashboard.link {
            wires.send(link, HubToDashboard::InputTaken(taken));
        }
    }

    fn handle_resize(&mut self, wires: &mut Wires, resize: TerminalResize) -> Result<(), Refusal> {
        let not_found = || Refusal::new(ErrorCode::NotFound, "no such command");
        let command = self.commands.get_mut(&resize.command).ok_or_else(not_found)?;
        if command.is_final() {
            return Err(Refusal::new(ErrorCode::NotRunning, "the command has ended"));
        }
        command.size = Some(resize.size);
        if command.is_running()
            && let Some(link) = self.agents.get(&command.request.agent).and_then(Agent::link)
        {
            wires.send(link, HubToAgent::Resize(resize));
        }
        Ok(())
    }
}
