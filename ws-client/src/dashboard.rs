//! The handle to a dashboard.

mod command;
mod events;
mod request;
mod terminal;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, broadcast, oneshot, watch};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, DashboardId, RequestId};
use trunkline_protocol::message::{
    Accepted, CommandInterrupt, CommandRequest, DashboardToHub, EmergencyStop, ErrorCode, Refusal,
    Secret, Target, TerminalResize, TerminalSize,
};
use trunkline_protocol::roster::{Roster, RosterEvent};
use trunkline_protocol::time::Now;

pub use self::command::{Command, Lost, Stage};
pub use self::events::Events;
pub use self::request::Request;
pub use self::terminal::{Terminal, TerminalOptions};

use crate::agent::SetupError;
use crate::connector::Connector;
use crate::core::dashboard::{
    DashboardCore, DashboardEvent, DashboardSetup, InputError, Output, ReaderId, RequestError,
};
use crate::core::dialing::{Backoff, ConnectionState, DialAction};
use crate::core::outbox::OutboxLimits;
#[cfg(feature = "logs")]
use crate::logs::{self, Logs};
use crate::shell::{Driven, Shared, drive};
use crate::tokens::{Call, TokenSource, Tokens};
use crate::transport::WebSocket;

/// How long a request waits for its answer unless it says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// Events that may wait for one reader of them. About 100 bytes each, shared
/// by all readers.
const EVENTS_MAX: usize = 1024;

/// Refusals of input that are remembered for whoever is still typing.
const REFUSALS_MAX: usize = 64;

/// The hub does not want this dashboard back, or it was closed here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("disconnected: {why}")]
pub struct Disconnected {
    /// Why.
    pub why: Close,
}

/// The core as the driver has it, with those who listen to it.
struct Core {
    pure: DashboardCore,
    answers: HashMap<RequestId, oneshot::Sender<Result<Accepted, RequestError>>>,
    readers: HashMap<ReaderId, Arc<Notify>>,
    stages: HashMap<CommandId, watch::Sender<Stage>>,
    roster: watch::Sender<Arc<Roster>>,
    /// `None` once nothing will happen any more.
    events: Option<broadcast::Sender<DashboardEvent>>,
    typists: Arc<Notify>,
    refusals: VecDeque<(u64, CommandId, Refusal)>,
    refused: u64,
    refresh: Arc<Call>,
}

impl Driven for Core {
    type Ears = ();

    fn handle_dialed(&mut self, token: Option<Secret>, now: Now) {
        self.pure.handle_dialed(token, now);
    }

    fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.pure.handle_dial_failed(close, now);
    }

    fn handle_frame(&mut self, frame: &Frame, now: Now) {
        self.pure.handle_frame(frame, now);
    }

    fn handle_lost(&mut self, close: &Close, now: Now) {
        self.pure.handle_lost(close, now);
    }

    fn handle_timeout(&mut self, now: Now) {
        self.pure.handle_timeout(now);
    }

    fn poll_dial(&mut self) -> Option<DialAction> {
        self.pure.poll_dial()
    }

    fn poll_transmit(&mut self, now: Now) -> Option<Frame> {
        self.pure.poll_transmit(now)
    }

    fn deadline(&self, now: Now) -> Option<Duration> {
        self.pure.deadline(now)
    }

    fn connection(&self) -> &ConnectionState {
        self.pure.connection()
    }

    fn dispatch(&mut self, (): &mut ()) {
        if let Some(wanted) = self.pure.poll_refresh() {
            self.refresh.make(wanted);
        }
        let mut is_roster_new = false;
        while let Some(output) = self.pure.poll_output() {
            match output {
                Output::Answered { request, answer } => {
                    if let Some(asker) = self.answers.remove(&request) {
                        let _ = asker.send(answer); // who asked may have gone
                    }
                }
                Output::Readable(reader) => {
                    if let Some(bell) = self.readers.get(&reader) {
                        bell.notify_one();
                    }
                }
                Output::InputMoved(_) => self.typists.notify_waiters(),
                Output::Event(event) => {
                    is_roster_new |= matches!(event, DashboardEvent::Roster(_));
                    self.hear(event);
                }
            }
        }
        // Whoever holds a roster makes the next change copy it: nobody does
        // unless somebody watches.
        if is_roster_new && self.roster.receiver_count() > 0 {
            self.roster.send_replace(Arc::clone(self.pure.roster()));
        }
    }
}

impl Core {
    fn hear(&mut self, event: DashboardEvent) {
        let mut is_over = false;
        match &event {
            DashboardEvent::Roster(RosterEvent::Command(state)) => {
                if let Some(stages) = self.stages.get(&state.command) {
                    // The newest there is: a list that was told of before this
                    // event may have had it already.
                    let newest = self.pure.roster().command(state.command).unwrap_or(state);
                    stages.send_replace(Stage::Listed(Arc::clone(newest)));
                }
            }
            DashboardEvent::Roster(RosterEvent::Replaced) => {
                self.stages.retain(|_, stages| stages.receiver_count() > 0);
                let roster = self.pure.roster();
                for (command, stages) in &self.stages {
                    if let Some(state) = roster.command(*command) {
                        stages.send_replace(Stage::Listed(Arc::clone(state)));
                    }
                }
            }
            DashboardEvent::CommandLost(command) => {
                if let Some(stages) = self.stages.get(command) {
                    stages.send_modify(|stage| stage.lose(Lost::ByHub { command: *command }));
                }
            }
            DashboardEvent::InputRefused { command, refusal } => {
                self.refused += 1;
                self.refusals.push_back((self.refused, *command, refusal.clone()));
                if self.refusals.len() > REFUSALS_MAX {
                    self.refusals.pop_front();
                }
            }
            DashboardEvent::Connection(state) if state.is_over() => {
                for (command, stages) in &self.stages {
                    stages.send_modify(|stage| stage.lose(Lost::Closed { command: *command }));
                }
                is_over = true;
            }
            DashboardEvent::Connection(_)
            | DashboardEvent::Roster(_)
            | DashboardEvent::TerminalOpened(_)
            | DashboardEvent::Missed(_) => {}
        }
        if let Some(events) = &self.events {
            let _ = events.send(event); // nobody may be listening
        }
        if is_over {
            self.events = None;
        }
    }

    /// How far a command is, observable.
    fn stages(&mut self, command: CommandId) -> watch::Receiver<Stage> {
        if let Some(stages) = self.stages.get(&command) {
            return stages.subscribe();
        }
        let mut stage = match self.pure.roster().command(command) {
            Some(state) => Stage::Listed(Arc::clone(state)),
            None => Stage::Unlisted,
        };
        if self.pure.connection().is_over() {
            stage.lose(Lost::Closed { command });
        }
        let (stages, receiver) = watch::channel(stage);
        self.stages.insert(command, stages);
        receiver
    }

    fn refusal_since(&self, number: u64, command: CommandId) -> Option<Refusal> {
        let new = self.refusals.iter().rev().take_while(|(at, _, _)| *at > number);
        let mut own = new.filter(|(_, of, _)| *of == command);
        own.next().map(|(_, _, refusal)| refusal.clone())
    }
}

/// A connected dashboard, or one that is trying to be: sees every agent of its
/// tenant, runs commands, reads terminals.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use trunkline_client::{Dashboard, Request, TerminalEvent};
///
/// let dashboard = Dashboard::builder("ws://127.0.0.1:7070")?.connect();
/// let command = dashboard.run("build-1", Request::argv(["cargo", "test"])).await?;
/// let mut terminal = command.terminal();
/// while let Some(event) = terminal.next().await {
///     if let TerminalEvent::Output { data, .. } = event {
///         // To a terminal of your own, feed it through a `TerminalFilter` first.
///         print!("{}", String::from_utf8_lossy(&data));
///     }
/// }
/// # Ok(()) }
/// ```
///
/// Everything goes on across lost links: terminals from their last byte,
/// requests under their ids, input from what was taken. Cloning gives another
/// handle to the same dashboard. [`Command`] and [`Terminal`] are handles
/// too; when the last one is dropped the dashboard says goodbye as with
/// [`close`](Self::close), in the background.
#[derive(Clone)]
pub struct Dashboard {
    shared: Arc<Shared<Core>>,
    finished: watch::Receiver<bool>,
    _last: Arc<Last>,
}

struct Last(Arc<Shared<Core>>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.with(|core, now| core.pure.stop(None, now));
    }
}

impl std::fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dashboard").finish_non_exhaustive()
    }
}

/// What a dashboard is made of.
pub struct DashboardBuilder {
    setup: DashboardSetup,
    connector: Arc<dyn Connector>,
    tokens: Tokens,
    #[cfg(feature = "logs")]
    logs: Option<Logs>,
}

impl std::fmt::Debug for DashboardBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DashboardBuilder").field("setup", &self.setup).finish_non_exhaustive()
    }
}

impl DashboardBuilder {
    /// A fixed token. Once the hub does not accept it, the dashboard gives up.
    #[must_use]
    pub fn token(mut self, token: impl Into<Secret>) -> Self {
        self.tokens = Tokens::fixed(token.into());
        self
    }

    /// Where tokens come from: asked before every attempt, and when the hub
    /// says that the present one runs out.
    #[must_use]
    pub fn token_source(mut self, source: impl TokenSource) -> Self {
        self.tokens = Tokens::from(source);
        self
    }

    /// Who it is. By default each dashboard mints an id of its own, which is
    /// what makes the hub recognise it when it returns; two that live at once
    /// under one id supersede each other.
    #[must_use]
    pub fn id(mut self, id: DashboardId) -> Self {
        self.setup.dashboard = Some(id);
        self
    }

    /// How it reconnects.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.setup.backoff = backoff;
        self
    }

    /// How many requests may wait for their answer: 1,000 or 4 MiB unless set.
    #[must_use]
    pub fn outbox(mut self, limits: OutboxLimits) -> Self {
        self.setup.outbox = limits;
        self
    }

    /// Forwards what a layer hears to the hub: see [`logs::forward`]. Records go
    /// last of all that is sent. Feature `logs`.
    #[cfg(feature = "logs")]
    #[must_use]
    pub fn logs(mut self, logs: Logs) -> Self {
        self.setup.logs = Some(logs.tail());
        self.logs = Some(logs);
        self
    }

    /// Starts the dashboard on the present runtime. It dials at once, and for
    /// ever.
    ///
    /// # Panics
    ///
    /// When called outside a tokio runtime.
    #[expect(clippy::disallowed_methods, reason = "the shell is where the seed is drawn")]
    pub fn connect(mut self) -> Dashboard {
        self.setup.can_renew = self.tokens.can_renew;
        let refresh = Arc::new(Call::default());
        let shared = Arc::new(Shared::new(
            |now| {
                let core = DashboardCore::new(self.setup, rand::random(), now);
                Core {
                    answers: HashMap::new(),
                    readers: HashMap::new(),
                    stages: HashMap::new(),
                    roster: watch::Sender::new(Arc::clone(core.roster())),
                    events: Some(broadcast::Sender::new(EVENTS_MAX)),
                    typists: Arc::new(Notify::new()),
                    refusals: VecDeque::new(),
                    refused: 0,
                    refresh: Arc::clone(&refresh),
                    pure: core,
                }
            },
            (),
        ));
        let (done, finished) = watch::channel(false);
        let renewed = Arc::clone(&shared);
        #[cfg(feature = "logs")]
        let forwarding = {
            let shared = Arc::clone(&shared);
            logs::feed(self.logs, move |records| {
                shared.with(|core, now| {
                    for (number, record) in records {
                        core.pure.push_log(number, record, now);
                    }
                });
            })
        };
        #[cfg(not(feature = "logs"))]
        let forwarding = std::future::pending::<()>();
        let driver = drive(Arc::clone(&shared), self.connector, self.tokens.source.clone());
        let renewing = self.tokens.renew(refresh, move |token| {
            renewed.with(|core, _| core.pure.refresh(token));
        });
        tokio::spawn(async move {
            tokio::select! {
                () = driver => {}
                () = renewing => {}
                () = forwarding => {}
            }
            done.send_replace(true);
        });
        Dashboard { _last: Arc::new(Last(Arc::clone(&shared))), shared, finished }
    }
}

impl Dashboard {
    /// A dashboard that dials a hub at `ws://host:port`, or
    /// `wss://host:port` with the feature `tls`: see [`WebSocket`].
    ///
    /// # Errors
    ///
    /// When the URL is not one.
    pub fn builder(url: &str) -> Result<DashboardBuilder, SetupError> {
        let hub = WebSocket::new(url)?;
        #[cfg(feature = "polling")]
        let hub = crate::Reaching::from(hub);
        Ok(Self::over(hub))
    }

    /// A dashboard over links of your own.
    pub fn over(connector: impl Connector) -> DashboardBuilder {
        DashboardBuilder {
            setup: DashboardSetup::default(),
            connector: Arc::new(connector),
            tokens: Tokens::default(),
            #[cfg(feature = "logs")]
            logs: None,
        }
    }

    /// Who it is: the id it minted or was given, or what the hub made of it.
    pub fn id(&self) -> DashboardId {
        self.shared.quietly(|core, _| core.pure.id().clone())
    }

    // ---- what there is to see -------------------------------------------

    /// Waits until the hub has acknowledged and the roster is complete.
    /// Nothing has to wait for that: requests made before go out then.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When the hub does not want this dashboard, or it was closed.
    pub async fn connected(&self) -> Result<(), Disconnected> {
        let mut connection = self.connection();
        let mut roster = self.roster();
        loop {
            match &*connection.borrow_and_update() {
                ConnectionState::Connected if roster.borrow_and_update().position().is_some() => {
                    return Ok(());
                }
                ConnectionState::Disconnected { why } => {
                    return Err(Disconnected { why: why.clone() });
                }
                ConnectionState::Connected
                | ConnectionState::Connecting
                | ConnectionState::Reconnecting { .. } => {}
            }
            // Neither sender goes: both live in `shared`.
            tokio::select! {
                _ = connection.changed() => {}
                _ = roster.changed() => {}
            }
        }
    }

    /// The state of the connection, observable.
    pub fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.shared.connection()
    }

    /// Agents, commands and queues as last known, observable; empty before
    /// the first complete list, and never half of one. While somebody holds a
    /// receiver, each round of changes copies the roster's three maps (not
    /// their entries).
    ///
    /// What `borrow` gives holds the next change back: clone the `Arc` out of
    /// it before anything that waits.
    pub fn roster(&self) -> watch::Receiver<Arc<Roster>> {
        self.shared.quietly(|core, _| {
            core.roster.send_replace(Arc::clone(core.pure.roster()));
            core.roster.subscribe()
        })
    }

    /// What happens from now on. At most 1,024 events wait for a slow reader;
    /// after that it is told how many it missed.
    pub fn events(&self) -> Events {
        self.shared.quietly(|core, _| Events::new(core.events.as_ref()))
    }

    // ---- commands -------------------------------------------------------

    /// Asks that `agent` runs something. Returns once the hub has stored it:
    /// from then on it survives whatever the hub's queue survives.
    ///
    /// Dropped half-way, it may or may not run; the id that was minted for it
    /// is lost.
    ///
    /// # Errors
    ///
    /// See [`RequestError`]. An `agent` that is no id is refused here, as
    /// `invalid_message`.
    pub async fn run(
        &self,
        agent: impl TryInto<AgentId>,
        request: Request,
    ) -> Result<Command, RequestError> {
        let agent = agent.try_into().map_err(|_| {
            let refusal = Refusal::new(ErrorCode::InvalidMessage, "not the id of an agent");
            RequestError::Refused(refusal.field("payload.agent"))
        })?;
        let Request { spec, priority, deliver_within, retry, patience } = request;
        let deliver_within_ms = deliver_within.map(request::millis);
        let (command, answer) = self.shared.with(|core, now| {
            let command = core.pure.mint_command(now);
            let request =
                CommandRequest { command, agent, spec, priority, deliver_within_ms, retry };
            let answer = core.ask(DashboardToHub::Request(request), patience, now)?;
            Ok((command, answer))
        })?;
        answer.await.unwrap_or(Err(RequestError::Closed))?;
        Ok(self.command(command))
    }

    /// A command by its id, whoever asked for it.
    pub fn command(&self, id: CommandId) -> Command {
        let stages = self.shared.quietly(|core, _| core.stages(id));
        Command::new(self.clone(), id, stages)
    }

    /// Interrupts a command in whatever state: takes it from the queue, or
    /// has its process group interrupted and, after the agent's grace, killed.
    /// Returns once the hub has accepted that; how far it is then shows in
    /// [`CommandState::interrupt`](trunkline_protocol::message::CommandState::interrupt).
    ///
    /// Dropped half-way, it may or may not happen. It may be repeated.
    ///
    /// # Errors
    ///
    /// See [`RequestError`].
    pub async fn interrupt(&self, command: CommandId) -> Result<(), RequestError> {
        let interrupt = CommandInterrupt { command, attempt: None, grace_ms: None };
        self.ask(DashboardToHub::Interrupt(interrupt)).await.map(drop)
    }

    /// As [`interrupt`](Self::interrupt), with this much time for the program
    /// to end by itself.
    ///
    /// # Errors
    ///
    /// See [`RequestError`].
    pub async fn interrupt_with_grace(
        &self,
        command: CommandId,
        grace: Duration,
    ) -> Result<(), RequestError> {
        let grace_ms = Some(request::millis(grace));
        let interrupt = CommandInterrupt { command, attempt: None, grace_ms };
        self.ask(DashboardToHub::Interrupt(interrupt)).await.map(drop)
    }

    /// Interrupts everything, queued and running, of these agents or of all.
    /// Returns how many commands it reached.
    ///
    /// Dropped half-way, it may or may not happen. It may be repeated.
    ///
    /// # Errors
    ///
    /// See [`RequestError`].
    pub async fn emergency_stop(&self, agents: Option<Vec<AgentId>>) -> Result<u32, RequestError> {
        let stop = DashboardToHub::EmergencyStop(EmergencyStop { agents });
        Ok(self.ask(stop).await?.stopped.unwrap_or(0))
    }

    // ---- terminals ------------------------------------------------------

    /// Reads the terminals of a command or an agent: every byte from the
    /// oldest that is kept.
    pub fn terminal(&self, target: Target) -> Terminal {
        self.terminal_with(target, TerminalOptions::default())
    }

    /// Reads the terminals of a command or an agent, in this way.
    pub fn terminal_with(&self, target: Target, options: TerminalOptions) -> Terminal {
        let bell = Arc::new(Notify::new());
        let reader = self.shared.with(|core, now| {
            let reader = core.pure.read(target, options.reading(), now);
            core.readers.insert(reader, Arc::clone(&bell));
            reader
        });
        Terminal::new(self.clone(), reader, bell, options.scrollback_bytes)
    }

    /// Reads everything that an agent's commands write.
    pub fn watch_agent(&self, agent: AgentId) -> Terminal {
        self.terminal(Target::Agent(agent))
    }

    /// Types into a command. Returns once all of it is under way: kept here
    /// until the agent has taken it, at most 64 KiB (or what the hub allows)
    /// ahead. Keys arrive once and in order, across lost links too; those
    /// typed before the program runs wait for it. What is written by calls at
    /// the same time is not mixed if it is shorter than that.
    ///
    /// Dropped half-way, a part from the front may have been typed.
    ///
    /// # Errors
    ///
    /// When the command has ended, or what was typed was refused: then what
    /// was not taken yet is dropped, and the next call starts afresh. A
    /// refusal that comes after this returned is told as
    /// [`DashboardEvent::InputRefused`].
    pub async fn input(
        &self,
        command: CommandId,
        data: impl Into<Bytes>,
    ) -> Result<(), InputError> {
        let mut data = data.into();
        let (typists, refused) =
            self.shared.quietly(|core, _| (Arc::clone(&core.typists), core.refused));
        loop {
            let moved = typists.notified();
            self.shared.with(|core, _| match core.refusal_since(refused, command) {
                Some(refusal) => Err(InputError::Refused(refusal)),
                None => core.pure.input(command, &mut data),
            })?;
            if data.is_empty() {
                return Ok(());
            }
            moved.await;
        }
    }

    /// Changes the size of a command's terminal.
    ///
    /// Dropped half-way, it may or may not happen. It may be repeated.
    ///
    /// # Errors
    ///
    /// See [`RequestError`].
    pub async fn resize(&self, command: CommandId, size: TerminalSize) -> Result<(), RequestError> {
        self.ask(DashboardToHub::Resize(TerminalResize { command, size })).await.map(drop)
    }

    // ---- the connection -------------------------------------------------

    /// Dials at once instead of waiting for the next attempt.
    pub fn retry_now(&self) {
        self.shared.with(|core, now| core.pure.retry_now(now));
    }

    /// Says goodbye and waits until it is said, some seconds at most. All
    /// handles stay usable, and find everything closed.
    ///
    /// Cancel safe: the closing goes on.
    pub async fn close(&self) {
        self.shared.with(|core, now| core.pure.stop(None, now));
        let mut finished = self.finished.clone();
        // An error says that the driver is gone with its runtime.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    async fn ask(&self, message: DashboardToHub) -> Result<Accepted, RequestError> {
        let answer = self.shared.with(|core, now| core.ask(message, Some(PATIENCE), now))?;
        // The sender goes only with `shared`, which this handle holds.
        answer.await.unwrap_or(Err(RequestError::Closed))
    }
}

impl Core {
    fn ask(
        &mut self,
        message: DashboardToHub,
        patience: Option<Duration>,
        now: Now,
    ) -> Result<oneshot::Receiver<Result<Accepted, RequestError>>, RequestError> {
        let request = self.pure.request(message, patience, now)?;
        let (asker, answer) = oneshot::channel();
        self.answers.insert(request, asker);
        Ok(answer)
    }
}
