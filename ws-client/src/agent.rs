//! The handle to an agent.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, IdError};
use trunkline_protocol::message::{AgentAbout, AgentReport, Secret};
use trunkline_protocol::time::Now;

use crate::connector::Connector;
use crate::core::agent::{AgentCore, AgentOutput, AgentSetup, JournalRecord};
use crate::core::dialing::{Backoff, ConnectionState, DialAction};
use crate::handler::{CommandHandler, Execution, Output};
use crate::journal::{Journal, JournalError};
#[cfg(feature = "logs")]
use crate::logs::{self, Logs};
use crate::shell::{Driven, Shared, drive};
use crate::tokens::{Call, TokenSource, Tokens};
use crate::transport::{UrlError, WebSocket};

/// Rings for whoever waits for one command.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    pub(crate) events: Notify,
    pub(crate) room: Notify,
}

/// What runs.
struct Running {
    bells: Arc<Bells>,
    task: AbortHandle,
}

/// The core as the driver has it, with what belongs to its handlers.
pub(crate) struct Core {
    pub(crate) agent: AgentCore,
    running: HashMap<CommandId, Running>,
    /// Commands that the runner is to begin.
    to_begin: VecDeque<CommandId>,
    begin: Arc<Notify>,
    /// What is to be written to the journal next.
    to_record: Option<Vec<JournalRecord>>,
    record: Arc<Notify>,
    refresh: Arc<Call>,
    report_asked: watch::Sender<u64>,
}

impl Core {
    /// Whether these are the bells of the attempt that runs now.
    pub(crate) fn is_running(&self, command: CommandId, bells: &Arc<Bells>) -> bool {
        self.running.get(&command).is_some_and(|running| Arc::ptr_eq(&running.bells, bells))
    }
}

impl Driven for Core {
    type Ears = ();

    fn handle_dialed(&mut self, token: Option<Secret>, now: Now) {
        self.agent.handle_dialed(token, now);
    }

    fn handle_dial_failed(&mut self, close: &Close, now: Now) {
        self.agent.handle_dial_failed(close, now);
    }

    fn handle_frame(&mut self, frame: &Frame, now: Now) {
        self.agent.handle_frame(frame, now);
    }

    fn handle_lost(&mut self, close: &Close, now: Now) {
        self.agent.handle_lost(close, now);
    }

    fn handle_timeout(&mut self, now: Now) {
        self.agent.handle_timeout(now);
    }

    fn poll_dial(&mut self) -> Option<DialAction> {
        self.agent.poll_dial()
    }

    fn poll_transmit(&mut self, now: Now) -> Option<Frame> {
        self.agent.poll_transmit(now)
    }

    fn deadline(&self, _now: Now) -> Option<Duration> {
        self.agent.deadline()
    }

    fn connection(&self) -> &ConnectionState {
        self.agent.connection()
    }

    fn dispatch(&mut self, (): &mut ()) {
        while let Some(output) = self.agent.poll_output() {
            match output {
                AgentOutput::Execute(id) => {
                    self.to_begin.push_back(id);
                    self.begin.notify_one();
                }
                // `notify_one` leaves a permit for a handler that is about to
                // wait: the ring is not lost.
                AgentOutput::Event(id) => {
                    if let Some(running) = self.running.get(&id) {
                        running.bells.events.notify_one();
                    }
                }
                AgentOutput::Room(id) => {
                    if let Some(running) = self.running.get(&id) {
                        running.bells.room.notify_waiters();
                    }
                }
                AgentOutput::Kill(id) => {
                    if let Some(running) = self.running.remove(&id) {
                        running.task.abort();
                    }
                }
                AgentOutput::Report => self.report_asked.send_modify(|count| *count += 1),
                AgentOutput::Journal(records) => {
                    self.to_record = Some(records);
                    self.record.notify_one();
                }
            }
        }
        if let Some(wanted) = self.agent.poll_refresh() {
            self.refresh.make(wanted);
        }
    }
}

/// A connected agent, or one that is trying to be.
///
/// ```no_run
/// use trunkline_client::{Agent, Execution, Outcome, protocol::message::Channel};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let agent = Agent::builder("ws://127.0.0.1:7070", "build-1")?.connect(|command: Execution| async move {
///     let greeting = format!("asked for {:?}\n", command.spec().run);
///     command.output().write(Channel::Stdout, greeting.as_bytes()).await;
///     Outcome::Exited(0)
/// });
/// println!("over: {}", agent.closed().await);
/// # Ok(())
/// # }
/// ```
///
/// Cloning gives another handle to the same one. When the last handle is
/// dropped the agent stops as with [`stop`](Self::stop), in the background.
#[derive(Clone)]
pub struct Agent {
    shared: Arc<Shared<Core>>,
    report_asked: watch::Receiver<u64>,
    finished: watch::Receiver<bool>,
    _last: Arc<Last>,
}

struct Last(Arc<Shared<Core>>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.with(|core, now| core.agent.stop(now));
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

/// Why an agent cannot be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The name is not one.
    #[error("the id: {0}")]
    Id(#[from] IdError),
    /// The URL is not one.
    #[error("the hub's URL: {0}")]
    Url(#[from] UrlError),
}

/// What an agent is made of.
pub struct AgentBuilder {
    setup: AgentSetup,
    connector: Arc<dyn Connector>,
    tokens: Tokens,
    journal: Option<Arc<dyn Journal>>,
    #[cfg(feature = "logs")]
    logs: Option<Logs>,
}

impl std::fmt::Debug for AgentBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentBuilder").field("setup", &self.setup).finish_non_exhaustive()
    }
}

impl AgentBuilder {
    /// A fixed token. Once the hub does not accept it, the agent gives up.
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

    /// What the agent says about itself.
    #[must_use]
    pub fn about(mut self, about: AgentAbout) -> Self {
        self.setup.about = about;
        self
    }

    /// How many commands it runs at a time; 1 unless set. What the hub gives
    /// beyond that, because a command that it has given up still ends here,
    /// waits.
    #[must_use]
    pub fn slots(mut self, slots: u32) -> Self {
        self.setup.slots = slots.max(1);
        self
    }

    /// How it reconnects.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.setup.backoff = backoff;
        self
    }

    /// Memory of one stream's tail (at least 64 KiB) and how long a program is
    /// held when it is full of what the hub has not taken: 8 MiB and 30 s
    /// unless set. All ended commands together keep at most 64 MiB.
    #[must_use]
    pub fn tail(mut self, bytes: usize, hold: Duration) -> Self {
        self.setup.tail_bytes = bytes;
        self.setup.tail_hold = hold;
        self
    }

    /// How long a program has to end when interrupted, unless the interrupt
    /// says otherwise; 5 s unless set.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.setup.grace = grace;
        self
    }

    /// Keeps a journal, so that after a crash of this process the next one knows
    /// what was begun: no attempt is started a second time, and a command whose
    /// end was seen ends as it did. Without one, all that a process had begun is
    /// `unknown` once it is gone.
    ///
    /// Each command then waits for the journal before it starts; one that cannot
    /// be written down within ten seconds is `failed`.
    ///
    /// Dropping the future changes nothing.
    ///
    /// # Errors
    ///
    /// When the journal cannot be read.
    pub async fn journal(mut self, journal: impl Journal) -> Result<Self, JournalError> {
        self.setup.journal = Some(journal.load().await?);
        self.journal = Some(Arc::new(journal));
        Ok(self)
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

    /// Starts the agent on the present runtime. It dials at once, and for
    /// ever.
    ///
    /// # Panics
    ///
    /// When called outside a tokio runtime.
    #[expect(clippy::disallowed_methods, reason = "the shell is where the seed is drawn")]
    pub fn connect(mut self, handler: impl CommandHandler) -> Agent {
        self.setup.can_renew_token = self.tokens.can_renew;
        let (begin, refresh) = (Arc::new(Notify::new()), Arc::new(Call::default()));
        let record = Arc::new(Notify::new());
        let (report_asked, reports) = watch::channel(0);
        let shared = Arc::new(Shared::new(
            |now| Core {
                agent: AgentCore::new(self.setup, rand::random(), now),
                running: HashMap::new(),
                to_begin: VecDeque::new(),
                begin: Arc::clone(&begin),
                to_record: None,
                record: Arc::clone(&record),
                refresh: Arc::clone(&refresh),
                report_asked,
            },
            (),
        ));
        let (done, finished) = watch::channel(false);
        let done = Done { done, shared: Arc::clone(&shared) };
        let renewed = Arc::clone(&shared);
        #[cfg(feature = "logs")]
        let forwarding = {
            let shared = Arc::clone(&shared);
            logs::feed(self.logs, move |records| {
                shared.with(|core, now| {
                    for (number, record) in records {
                        core.agent.push_log(number, record, now);
                    }
                });
            })
        };
        #[cfg(not(feature = "logs"))]
        let forwarding = std::future::pending::<()>();
        let driver = drive(Arc::clone(&shared), self.connector, self.tokens.source.clone());
        let renewing = self.tokens.renew(refresh, move |token| {
            renewed.with(|core, now| core.agent.refresh(token, now));
        });
        let recording = keep_journal(Arc::clone(&shared), self.journal, record);
        let running = run_commands(Arc::clone(&shared), begin, Arc::new(handler));
        tokio::spawn(async move {
            let _done = done;
            tokio::select! {
                () = driver => {}
                () = renewing => {}
                () = forwarding => {}
                () = recording => {}
                () = running => {}
            }
        });
        Agent {
            _last: Arc::new(Last(Arc::clone(&shared))),
            shared,
            report_asked: reports,
            finished,
        }
    }
}

/// When it is dropped, the agent is over: for good, or with its runtime.
struct Done {
    done: watch::Sender<bool>,
    shared: Arc<Shared<Core>>,
}

impl Drop for Done {
    fn drop(&mut self) {
        // Nobody will ever hear of what still runs: the hub does not want
        // this agent back. (After a stop, nothing runs any more.)
        let left = self.shared.quietly(|core, _| std::mem::take(&mut core.running));
        for (command, running) in left {
            tracing::warn!(target: "trunkline::client", %command, "dropping a command: the agent is over");
            running.task.abort();
        }
        self.done.send_replace(true);
    }
}

impl Agent {
    /// An agent called `name` that dials a hub at `ws://host:port`, or
    /// `wss://host:port` with the feature `tls`: see [`WebSocket`]. With the feature
    /// `polling` it also gets through where no WebSocket does.
    ///
    /// # Errors
    ///
    /// When the URL or the name is not one.
    pub fn builder(url: &str, name: &str) -> Result<AgentBuilder, SetupError> {
        let hub = WebSocket::new(url)?;
        #[cfg(feature = "polling")]
        let hub = crate::Reaching::from(hub);
        Self::over(hub, name)
    }

    /// An agent called `name` over links of your own.
    ///
    /// # Errors
    ///
    /// When the name is not one.
    pub fn over(connector: impl Connector, name: &str) -> Result<AgentBuilder, SetupError> {
        let setup = AgentSetup::new(name.parse()?);
        let connector = Arc::new(connector);
        Ok(AgentBuilder {
            setup,
            connector,
            tokens: Tokens::default(),
            journal: None,
            #[cfg(feature = "logs")]
            logs: None,
        })
    }

    /// Who it is: the proposed name, or what the hub made of it.
    pub fn id(&self) -> AgentId {
        self.shared.quietly(|core, _| core.agent.id().clone())
    }

    /// The state of its connection, observable.
    pub fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.shared.connection()
    }

    /// Reports figures. Only the newest that waits is sent.
    pub fn report(&self, report: AgentReport) {
        self.shared.with(|core, _| core.agent.report(report));
    }

    /// Counts how often the hub has asked for a report: a place to wait for
    /// the next time.
    pub fn report_asked(&self) -> watch::Receiver<u64> {
        self.report_asked.clone()
    }

    /// Dials at once instead of waiting for the next attempt.
    pub fn retry_now(&self) {
        self.shared.with(|core, now| core.agent.retry_now(now));
    }

    /// Stops in order: running commands are interrupted, what they wrote goes
    /// out, the hub hears a goodbye. Returns when that is done, fifteen seconds
    /// after the grace at the latest.
    ///
    /// Cancel safe: the stopping goes on.
    pub async fn stop(&self) {
        self.shared.with(|core, now| core.agent.stop(now));
        self.closed().await;
    }

    /// Waits until the agent is over for good, and says why: with
    /// [`CloseCode::Normal`] after a stop, otherwise because the hub does not
    /// want it back. What still ran then was dropped.
    ///
    /// Cancel safe.
    pub async fn closed(&self) -> Close {
        // An error is the end too: the runtime that it lived on is gone.
        let _ = self.finished.clone().wait_for(|finished| *finished).await;
        match &*self.shared.connection().borrow() {
            ConnectionState::Disconnected { why } => why.clone(),
            ConnectionState::Connecting
            | ConnectionState::Connected
            | ConnectionState::Reconnecting { .. } => {
                Close::new(CloseCode::GoingAway, "the runtime of the agent has ended")
            }
        }
    }
}

/// Writes what the core wants written, one batch at a time.
async fn keep_journal(
    shared: Arc<Shared<Core>>,
    journal: Option<Arc<dyn Journal>>,
    record: Arc<Notify>,
) {
    let Some(journal) = journal else { return std::future::pending().await };
    loop {
        let more = record.notified();
        while let Some(records) = shared.quietly(|core, _| core.to_record.take()) {
            let result = journal.record(&records).await;
            shared.with(|core, now| {
                let result = match &result {
                    Ok(()) => Ok(()),
                    Err(error) => Err(error.0.as_str()),
                };
                core.agent.handle_journaled(result, now);
            });
        }
        more.await;
    }
}

/// Begins commands as the core names them, each on a task of its own. Ends
/// with whoever polls it.
async fn run_commands(
    shared: Arc<Shared<Core>>,
    begin: Arc<Notify>,
    handler: Arc<dyn CommandHandler>,
) {
    loop {
        let more = begin.notified();
        while let Some(id) = shared.quietly(|core, _| core.to_begin.pop_front()) {
            begin_command(&shared, &handler, id);
        }
        more.await;
    }
}

fn begin_command(shared: &Arc<Shared<Core>>, handler: &Arc<dyn CommandHandler>, id: CommandId) {
    let bells = Arc::new(Bells::default());
    let (start, started) = oneshot::channel();
    let task = run_command(Arc::clone(shared), Arc::clone(handler), Arc::clone(&bells), started);
    let task = tokio::spawn(task).abort_handle();
    let execution = shared.with(|core, now| {
        let (attempt, spec) = core.agent.begin(id, now)?;
        // In the table before any event can be for it.
        core.running.insert(id, Running { bells: Arc::clone(&bells), task });
        let output = Output { command: id, shared: Arc::clone(shared), bells };
        Some(Execution { command: id, attempt, spec, output })
    });
    // Without one the task ends: the command was interrupted in between.
    if let Some(execution) = execution {
        let _ = start.send(execution);
    }
}

/// The task of one attempt.
async fn run_command(
    shared: Arc<Shared<Core>>,
    handler: Arc<dyn CommandHandler>,
    bells: Arc<Bells>,
    started: oneshot::Receiver<Execution>,
) {
    let Ok(execution) = started.await else { return };
    let command = execution.command;
    // What a handler that panics shares with the agent is behind the agent's
    // own lock.
    let life = std::panic::AssertUnwindSafe(async { handler.run(execution).await });
    let outcome = life.catch_unwind().await;
    shared.with(|core, now| {
        if !core.is_running(command, &bells) {
            return; // it was dropped a moment ago, and has ended without this word
        }
        core.running.remove(&command);
        match outcome {
            Ok(outcome) => core.agent.ended(command, outcome, now),
            Err(panic) => core.agent.lost(command, &said_by(&*panic), now),
        }
    });
}

/// What a panic said.
fn said_by(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    match text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)) {
        Some(text) => format!("the handler panicked: {text}"),
        None => "the handler panicked".to_owned(),
    }
}
