//! The handle to an agent.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{AgentId, CommandId, IdError};
use trunkline_protocol::message::{AgentAbout, AgentReport, Secret};
use trunkline_protocol::time::Now;

use crate::connector::{Connector, TokenSource};
use crate::core::agent::{AgentCore, AgentOutput, AgentSetup};
use crate::core::dialing::{Backoff, ConnectionState, DialAction};
use crate::handler::{CommandHandler, Execution, Outcome, Output};
use crate::shell::{Driven, Shared, drive};
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
    task: Option<AbortHandle>,
}

/// The core as the driver has it, with what belongs to its handlers.
pub(crate) struct Core {
    pub(crate) agent: AgentCore,
    running: HashMap<CommandId, Running>,
    /// Commands that the runner is to begin.
    to_begin: VecDeque<CommandId>,
    begin: Arc<Notify>,
    report_asked: watch::Sender<u64>,
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
                        running.bells.room.notify_one();
                    }
                }
                AgentOutput::Kill(id) => {
                    if let Some(task) = self.running.remove(&id).and_then(|running| running.task) {
                        task.abort();
                    }
                }
                AgentOutput::Report => self.report_asked.send_modify(|count| *count += 1),
            }
        }
    }
}

/// A connected agent, or one that is trying to be. Cloning gives another
/// handle to the same one. When the last handle is dropped the agent stops as
/// with [`stop`](Self::stop), in the background.
#[derive(Clone)]
pub struct Agent {
    shared: Arc<Shared<Core>>,
    report_asked: watch::Receiver<u64>,
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
    tokens: Option<Arc<dyn TokenSource>>,
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
        let token = token.into();
        self.tokens = Some(Arc::new(move |_refused| std::future::ready(Ok(token.clone()))));
        self.setup.can_renew_token = false;
        self
    }

    /// Where tokens come from, asked before every attempt.
    #[must_use]
    pub fn token_source(mut self, source: impl TokenSource) -> Self {
        self.tokens = Some(Arc::new(source));
        self.setup.can_renew_token = true;
        self
    }

    /// What the agent says about itself.
    #[must_use]
    pub fn about(mut self, about: AgentAbout) -> Self {
        self.setup.about = about;
        self
    }

    /// How many commands it runs at a time; 1 unless set.
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

    /// Memory of one stream's tail and how long a program is held when it is
    /// full: 8 MiB and 30 s unless set.
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

    /// Starts the agent on the present runtime. It dials at once, and for
    /// ever.
    ///
    /// # Panics
    ///
    /// When called outside a tokio runtime.
    #[expect(clippy::disallowed_methods, reason = "the shell is where randomness comes from")]
    pub fn connect(self, handler: impl CommandHandler) -> Agent {
        let begin = Arc::new(Notify::new());
        let (report_asked, reports) = watch::channel(0);
        let shared = Arc::new(Shared::new(
            |now| Core {
                agent: AgentCore::new(self.setup, rand::random(), now),
                running: HashMap::new(),
                to_begin: VecDeque::new(),
                begin: Arc::clone(&begin),
                report_asked,
            },
            (),
        ));
        tokio::spawn(drive(Arc::clone(&shared), self.connector, self.tokens));
        tokio::spawn(run_commands(Arc::clone(&shared), begin, Arc::new(handler)));
        Agent { _last: Arc::new(Last(Arc::clone(&shared))), shared, report_asked: reports }
    }
}

impl Agent {
    /// An agent called `name` that dials a hub at `ws://host:port`.
    ///
    /// # Errors
    ///
    /// When the URL or the name is not one.
    pub fn builder(url: &str, name: &str) -> Result<AgentBuilder, SetupError> {
        Self::over(WebSocket::new(url)?, name)
    }

    /// An agent called `name` over links of your own.
    ///
    /// # Errors
    ///
    /// When the name is not one.
    pub fn over(connector: impl Connector, name: &str) -> Result<AgentBuilder, SetupError> {
        let setup = AgentSetup::new(name.parse()?);
        Ok(AgentBuilder { setup, connector: Arc::new(connector), tokens: None })
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
    /// out, the hub hears a goodbye. Returns when the connection is over, some
    /// seconds after the grace at the latest.
    ///
    /// Cancel safe: the stopping goes on.
    pub async fn stop(&self) {
        self.shared.with(|core, now| core.agent.stop(now));
        self.closed().await;
    }

    /// Waits until the connection is over for good, and says why: with
    /// [`CloseCode::Normal`] after a stop, otherwise because the hub does not
    /// want this agent back.
    ///
    /// Cancel safe.
    pub async fn closed(&self) -> Close {
        let mut connection = self.connection();
        let over = connection.wait_for(ConnectionState::is_over).await;
        match over.as_deref() {
            Ok(ConnectionState::Disconnected { why }) => why.clone(),
            // The sender lives in `shared`, which this handle holds.
            Ok(_) | Err(_) => Close::new(CloseCode::Normal, ""),
        }
    }
}

/// Begins commands as the core names them, each on a task of its own.
async fn run_commands(
    shared: Arc<Shared<Core>>,
    begin: Arc<Notify>,
    handler: Arc<dyn CommandHandler>,
) {
    let mut connection = shared.connection();
    loop {
        let more = begin.notified();
        while let Some(id) = shared.quietly(|core, _| core.to_begin.pop_front()) {
            begin_command(&shared, &handler, id);
        }
        tokio::select! {
            () = more => {}
            _ = connection.wait_for(ConnectionState::is_over) => break,
        }
    }
    // Nobody will ever hear of what still runs: the hub does not want this
    // agent back. (After a stop, nothing runs any more.)
    let tasks =
        shared.quietly(|core, _| core.running.drain().filter_map(|(_, r)| r.task).collect());
    let tasks: Vec<AbortHandle> = tasks;
    for task in tasks {
        tracing::warn!(target: "trunkline::client", "dropping a command: the hub does not want this agent back");
        task.abort();
    }
}

fn begin_command(shared: &Arc<Shared<Core>>, handler: &Arc<dyn CommandHandler>, id: CommandId) {
    let bells = Arc::new(Bells::default());
    let begun = shared.with(|core, now| {
        let begun = core.agent.begin(id, now)?;
        // In the table before any event can be for it.
        core.running.insert(id, Running { bells: Arc::clone(&bells), task: None });
        Some(begun)
    });
    let Some((attempt, spec)) = begun else { return };
    let output = Output { command: id, shared: Arc::clone(shared), bells };
    let execution = Execution { command: id, attempt, spec, output };
    let handler = Arc::clone(handler);
    let of_task = Arc::clone(shared);
    let task = tokio::spawn(async move {
        // A handler that panics has failed; what it shares with the agent is
        // behind the agent's own lock.
        let life = std::panic::AssertUnwindSafe(async { handler.run(execution).await });
        let outcome = life
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Outcome::Failed("the handler panicked".into()));
        of_task.with(|core, now| {
            core.running.remove(&id);
            core.agent.ended(id, outcome, now);
        });
    });
    shared.quietly(|core, _| {
        // It may have ended already.
        if let Some(running) = core.running.get_mut(&id) {
            running.task = Some(task.abort_handle());
        }
    });
}
