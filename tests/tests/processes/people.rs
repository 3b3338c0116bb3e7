//! What people do in a round: each command has somebody who asks for it, reads
//! it at every dashboard, types into it, interrupts it, and waits for its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use trunkline_client::{
    Command, Dashboard, DashboardEvent, InputError, Lost, RequestError, Stage, TerminalOptions,
};
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{CommandState, CommandStatus, Lag, Target};
use trunkline_protocol::roster::{Roster, RosterEvent};
use trunkline_tests::process::now;

use crate::plan::{Ask, Pace};
use crate::program::{Expected, Program, typed};
use crate::reader::{Reading, read};
use crate::stage::{AGENT, IS_KEPT, Trace, pause};

/// After that an agent is back that could not connect for a while, and has told
/// a hub that lost its memory what it holds.
const AGENT_RETURNS: Duration = Duration::from_secs(60);

/// A command, and all that was heard of it.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) ask: Ask,
    pub(crate) at: Instant,
    pub(crate) expected: Arc<Expected>,
    pub(crate) exit_code: i32,
    pub(crate) marks: PathBuf,
    pub(crate) answer: Result<Heard, RequestError>,
}

/// What was heard of a command that was accepted.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) id: CommandId,
    /// By dashboard; `None` where the hub that knew of it died before it said
    /// so.
    pub(crate) seen: Vec<Option<Attended>>,
    /// How the typing went, where somebody typed.
    pub(crate) typing: Result<(), InputError>,
}

/// What a dashboard showed of a command until its end.
#[derive(Debug)]
pub(crate) struct Attended {
    pub(crate) end: Result<Arc<CommandState>, Lost>,
    pub(crate) reading: Reading,
}

/// One person with their command, from the request to the last byte.
#[derive(Debug, Clone)]
pub(crate) struct Person {
    pub(crate) ask: Ask,
    pub(crate) dashboards: Vec<Dashboard>,
    pub(crate) folder: PathBuf,
    /// Whether everything is as it should be again.
    pub(crate) healed: watch::Receiver<bool>,
    pub(crate) trace: Arc<Trace>,
}

impl Person {
    pub(crate) async fn live(self) -> Asked {
        let Self { ask, dashboards, folder, .. } = &self;
        let exit_code = i32::try_from(ask.number).unwrap() + 1;
        let marks = folder.join(format!("marks-{}", ask.number));
        let expected = Arc::new(ask.program.expected());
        let mut request = ask.program.request(&marks, exit_code).answer_within(None);
        if ask.retry {
            request = request.retry();
        }
        if let Some(time) = ask.within {
            request = request.within(time);
        }
        if let Some(time) = ask.run_for {
            request = request.run_for(time);
        }
        self.note("is asked for");
        let at = now();
        let answer = match dashboards[ask.asker].run(AGENT, request).await {
            Ok(command) => {
                self.note(format!("is accepted as {}", command.id()));
                Ok(self.hear(&command, &expected).await)
            }
            Err(error) => {
                self.note(format!("is not accepted: {error}"));
                Err(error)
            }
        };
        self.note("is done with");
        Asked { ask: ask.clone(), at, expected, exit_code, marks, answer }
    }

    fn note(&self, what: impl AsRef<str>) {
        self.trace.note(format!("command {} {}", self.ask.number, what.as_ref()));
    }

    async fn hear(&self, command: &Command, expected: &Expected) -> Heard {
        let id = command.id();
        let position = watch::Sender::new(0);
        let nobody = watch::Sender::new(0);
        let seen = self.dashboards.iter().enumerate().map(|(number, dashboard)| {
            let position = if number == self.ask.asker { &position } else { &nobody };
            self.attend(number, dashboard.command(id), expected, position)
        });
        let (seen, typing, ()) = tokio::join!(
            join_all(seen),
            self.type_into(command, position.subscribe()),
            self.interrupt(command),
        );
        Heard { id, seen, typing }
    }

    /// Waits at a dashboard until the command has ended and is read to its end.
    async fn attend(
        &self,
        number: usize,
        command: Command,
        expected: &Expected,
        position: &watch::Sender<u64>,
    ) -> Option<Attended> {
        let ended = async {
            let end = command.ended().await;
            let how = match &end {
                Ok(state) => format!("{}, attempt {}", state.status, state.attempt),
                Err(lost) => lost.to_string(),
            };
            self.note(format!("has ended for dashboard {number}: {how}"));
            end
        };
        let dashboard = &self.dashboards[number];
        let read = self.read(dashboard, command.id(), self.ask.readers[number], expected, position);
        let both = async { tokio::join!(ended, read) };
        tokio::select! {
            (end, reading) = both => Some(Attended { end, reading }),
            () = self.nobody_knows(dashboard, &command), if !IS_KEPT => None,
        }
    }

    /// Waits until a hub with another memory has had time to hear of a command
    /// from its agent, and the dashboard has never heard of it: it waits for
    /// ever for a command that its hub never knew.
    async fn nobody_knows(&self, dashboard: &Dashboard, command: &Command) {
        self.healed().await;
        let mut listed = command.stages();
        let has_come = timeout(AGENT_RETURNS, listed.wait_for(|stage| *stage != Stage::Unlisted));
        if has_come.await.is_ok() || dashboard.connected().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.note("was never heard of by a dashboard");
    }

    async fn read(
        &self,
        dashboard: &Dashboard,
        id: CommandId,
        pace: Pace,
        expected: &Expected,
        position: &watch::Sender<u64>,
    ) -> Reading {
        let mut options = TerminalOptions { scrollback_bytes: 0, ..TerminalOptions::default() };
        match pace {
            Pace::Prompt => {}
            Pace::Newest => options.lag = Lag::Newest,
            Pace::Late => options.window_bytes = 64 * 1024,
        }
        let terminal = dashboard.terminal_with(Target::Command(id), options);
        if pace == Pace::Late {
            self.healed().await;
        }
        read(terminal, expected, position).await
    }

    async fn healed(&self) {
        // An error says that the round is over, and this with it.
        let _ = self.healed.clone().wait_for(|healed| *healed).await;
    }

    /// Types what the program wants to hear. In a terminal only after it has
    /// asked: what comes earlier is echoed.
    async fn type_into(
        &self,
        command: &Command,
        mut position: watch::Receiver<u64>,
    ) -> Result<(), InputError> {
        let Program::Talk { lines, in_terminal } = self.ask.program else { return Ok(()) };
        if in_terminal {
            tokio::select! {
                _ = position.wait_for(|at| *at > 0) => {}
                _ = command.ended() => return Ok(()),
            }
        }
        for line in 0..lines {
            command.input(typed(line)).await.inspect_err(|error| {
                self.note(format!("takes no input at line {line}: {error}"));
            })?;
            pause(Duration::from_millis(20)).await;
        }
        self.note("has been told everything");
        Ok(())
    }

    /// Interrupts what is to be interrupted, and again when all is healed: a
    /// hub that dies may take with it what it has not passed on.
    async fn interrupt(&self, command: &Command) {
        let Some(after) = self.ask.interrupted_after else { return };
        let interrupt = async {
            pause(after).await;
            self.interrupt_once(command).await;
            self.healed().await;
            loop {
                self.interrupt_once(command).await;
                pause(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            () = interrupt => {}
            _ = command.ended() => {}
        }
    }

    async fn interrupt_once(&self, command: &Command) {
        let grace = Duration::from_secs(1);
        let dashboard = &self.dashboards[self.ask.asker];
        match dashboard.interrupt_with_grace(command.id(), grace).await {
            Ok(()) => self.note("is to be interrupted"),
            Err(error) => self.note(format!("cannot be interrupted: {error}")),
        }
    }
}

/// Looks at a roster, and sees to it that final states are final.
pub(crate) async fn watch_ends(dashboard: Dashboard, mut over: watch::Receiver<bool>) {
    let mut events = dashboard.events();
    let roster = dashboard.roster();
    let mut finals = std::collections::BTreeMap::new();
    let mut note = |state: &CommandState| {
        if let Some(known) = finals.get(&state.command) {
            assert_eq!(*known, state.status, "the final state of {} changed", state.command);
        }
        if state.status.is_final() {
            finals.insert(state.command, state.status);
        }
    };
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = over.wait_for(|over| *over) => return,
        };
        match event {
            Some(DashboardEvent::Roster(RosterEvent::Command(state))) => note(&state),
            Some(DashboardEvent::Roster(RosterEvent::Replaced) | DashboardEvent::Missed(_)) => {
                let roster: Arc<Roster> = Arc::clone(&roster.borrow());
                roster.commands().for_each(|state| note(state));
            }
            Some(_) => {}
            None => return,
        }
    }
}

/// How often a program began and ended, as it says itself.
pub(crate) fn marks(file: &Path) -> (u32, u32) {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let count = |word| u32::try_from(text.lines().filter(|line| *line == word).count()).unwrap();
    (count("begun"), count("ended"))
}

/// Whether a command can have ended so.
pub(crate) fn is_true_of(status: CommandStatus, asked: &Asked) -> bool {
    let ask = &asked.ask;
    match status {
        CommandStatus::Completed => {
            ask.program != Program::Missing && !matches!(ask.program, Program::Endless { .. })
        }
        CommandStatus::Failed => ask.program == Program::Missing,
        CommandStatus::Interrupted => ask.interrupted_after.is_some(),
        CommandStatus::Expired => ask.within.is_some(),
        CommandStatus::Unknown => true,
        CommandStatus::TimedOut => ask.run_for.is_some(),
        CommandStatus::Queued | CommandStatus::Dispatched | CommandStatus::Running => false,
    }
}
