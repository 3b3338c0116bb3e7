//! Carries orders out.

use std::collections::HashMap;
use std::error::Error;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::timeout;
use trunkline_client::protocol::ids::{AgentId, CommandId};
use trunkline_client::protocol::message::Target;
use trunkline_client::{Dashboard, TerminalOptions};
use trunkline_examples::{bytes_in_words, in_words, printable, short};

use crate::orders::{HELP, Order};
use crate::reading::{Readings, Shown};

/// How long output that the hub has may take to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lines that `search` finds at most.
const LINES_MAX: usize = 20;

/// How orders are carried out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    /// Whether `run` and `watch` wait for the end.
    pub(crate) waits: bool,
    /// What of output is shown.
    pub(crate) shown: Shown,
    /// How much output of each command is kept.
    pub(crate) kept_bytes: usize,
}

/// A person's desk: the dashboard, and what is being read.
#[derive(Debug)]
pub(crate) struct Desk {
    dashboard: Dashboard,
    manner: Manner,
    readings: Readings,
    readers: HashMap<Target, AbortHandle>,
    /// The command that was named, or run, last.
    last: Option<CommandId>,
}

/// Why an order was not carried out, for people.
type Failed = Box<dyn Error>;

impl Desk {
    pub(crate) fn new(dashboard: Dashboard, manner: Manner) -> Self {
        let readings = Readings::new(manner.kept_bytes, manner.shown);
        Self { dashboard, manner, readings, readers: HashMap::new(), last: None }
    }

    pub(crate) async fn carry_out(&mut self, order: Order) -> Result<(), Failed> {
        match order {
            Order::Agents => self.agents(),
            Order::Commands => self.commands(),
            Order::Run { agent, request, wait } => {
                let agent = self.agent(&agent)?;
                let command = self.dashboard.run(agent.clone(), request).await?;
                self.last = Some(command.id());
                eprintln!("-- {}: accepted", short(command.id()));
                if !self.is_read(&Target::Agent(agent)) {
                    self.read(Target::Command(command.id()), true);
                }
                if wait.unwrap_or(self.manner.waits) {
                    self.wait(command.id()).await?;
                }
            }
            Order::Watch(what) => self.watch(&what).await?,
            Order::Unwatch(what) => {
                let reader = self.readers.remove(&self.target(&what)?);
                reader.ok_or("that is not watched")?.abort();
            }
            Order::Wait(command) => {
                let command = self.command(&command)?;
                self.wait(command).await?;
            }
            Order::Input { command, text } => {
                let command = self.command(&command)?;
                self.dashboard.input(command, format!("{text}\n")).await?;
            }
            Order::Interrupt(command) => {
                let command = self.command(&command)?;
                self.dashboard.interrupt(command).await?;
                eprintln!("-- {}: is told to end", short(command));
            }
            Order::StopAll(agents) => {
                let agents: Result<Vec<_>, _> = agents.iter().map(|a| self.agent(a)).collect();
                let agents = Some(agents?).filter(|agents| !agents.is_empty());
                let count = self.dashboard.emergency_stop(agents).await?;
                println!("{count} commands are told to end");
            }
            Order::Queue(agent) => self.queue(&agent)?,
            Order::Search { command, text } => {
                let command = self.command(&command)?;
                self.fetch(command).await?;
                for found in self.readings.search(command, &text, LINES_MAX) {
                    println!("{:>10}  {}", found.offset, printable(&found.line));
                }
            }
            Order::Export { command, file } => {
                let command = self.command(&command)?;
                self.export(command, &file).await?;
            }
            Order::Help => println!("{HELP}"),
            Order::Quit => {}
        }
        Ok(())
    }

    // ---- the roster -------------------------------------------------------

    fn agents(&self) {
        let roster = self.dashboard.roster().borrow().clone();
        println!("{:<20} {:<12} {:>7} {:>7}", "agent", "is", "running", "waiting");
        for agent in roster.agents() {
            let running = format!("{}/{}", agent.running, agent.slots);
            let waiting = roster.queue(&agent.agent).len();
            println!(
                "{:<20} {:<12} {running:>7} {waiting:>7}",
                agent.agent,
                agent.presence.as_str()
            );
        }
    }

    fn commands(&self) {
        let roster = self.dashboard.roster().borrow().clone();
        println!("{:<8} {:<16} {:<28} command", "id", "agent", "is");
        for state in roster.commands() {
            let (id, title) = (short(state.command), printable(&state.title));
            println!("{id} {:<16} {:<28} {title}", state.agent, in_words(state));
        }
    }

    fn queue(&self, agent: &str) -> Result<(), Failed> {
        let agent = self.agent(agent)?;
        let roster = self.dashboard.roster().borrow().clone();
        for (place, id) in (1..).zip(roster.queue(&agent)) {
            let state = roster.command(*id);
            let priority = state.map_or("", |state| state.priority.as_str());
            let title = state.map_or(String::new(), |state| printable(&state.title));
            println!("{place:>3}. {} {priority:<6} {title}", short(*id));
        }
        Ok(())
    }

    /// An agent by its name.
    fn agent(&self, name: &str) -> Result<AgentId, Failed> {
        let id: AgentId = name.parse()?;
        match self.dashboard.roster().borrow().agent(&id) {
            Some(_) => Ok(id),
            None => Err(format!("there is no agent {id}").into()),
        }
    }

    /// A command by the beginning or end of its id.
    fn command(&mut self, name: &str) -> Result<CommandId, Failed> {
        let id = match name {
            "last" => self.last.ok_or("there was none yet")?,
            _ => self.find(name)?,
        };
        self.last = Some(id);
        Ok(id)
    }

    fn find(&self, name: &str) -> Result<CommandId, Failed> {
        let roster = self.dashboard.roster().borrow().clone();
        let is_meant = |id: &CommandId| {
            let text = id.to_string();
            text.starts_with(name) || text.ends_with(name)
        };
        let mut meant = roster.commands().map(|state| state.command).filter(is_meant);
        match (meant.next(), meant.count()) {
            (Some(id), 0) => Ok(id),
            (None, _) => Err("there is no such command".into()),
            (Some(_), others) => {
                Err(format!("that may be {} commands: say more of its id", others + 1).into())
            }
        }
    }

    fn target(&self, name: &str) -> Result<Target, Failed> {
        if let Ok(agent) = self.agent(name) {
            return Ok(Target::Agent(agent));
        }
        match name {
            "last" => Ok(Target::Command(self.last.ok_or("there was none yet")?)),
            _ => Ok(Target::Command(
                self.find(name).map_err(|_| "there is no such agent or command")?,
            )),
        }
    }

    // ---- output -----------------------------------------------------------

    fn is_read(&self, target: &Target) -> bool {
        self.readers.get(target).is_some_and(|reader| !reader.is_finished())
    }

    fn read(&mut self, target: Target, is_shown: bool) {
        // Kept in `readings`, where it can be looked at while it is read.
        let options = TerminalOptions { scrollback_bytes: 0, ..TerminalOptions::default() };
        let terminal = self.dashboard.terminal_with(target.clone(), options);
        let reader = tokio::spawn(self.readings.clone().read(terminal, is_shown));
        self.readers.retain(|_, reader| !reader.is_finished());
        self.readers.insert(target, reader.abort_handle());
    }

    async fn watch(&mut self, what: &str) -> Result<(), Failed> {
        let target = self.target(what)?;
        match target {
            Target::Command(command) => {
                self.last = Some(command);
                if self.readings.has(command) {
                    self.readings.show(command);
                } else {
                    self.read(target, true);
                }
                if self.manner.waits {
                    self.wait(command).await?;
                }
            }
            Target::Agent(_) if self.is_read(&target) => {}
            Target::Agent(_) => self.read(target, true),
        }
        Ok(())
    }

    /// Waits until a command has ended and, if it is read, its output is here.
    async fn wait(&self, command: CommandId) -> Result<(), Failed> {
        let state = self.dashboard.command(command).ended().await?;
        if state.stream.is_some() && self.readings.has(command) {
            let come = self.readings.has_come(command, false);
            timeout(PATIENCE, come).await.map_err(|_| "its output does not come")?;
        } else {
            eprintln!("-- {}: {}", short(command), in_words(&state));
        }
        Ok(())
    }

    /// Reads a command's output that is not read yet, up to where it now is.
    async fn fetch(&mut self, command: CommandId) -> Result<(), Failed> {
        if !self.readings.has(command) {
            let state = self.dashboard.command(command).state();
            if state.is_some_and(|state| state.status.is_final() && state.stream.is_none()) {
                return Err("it never ran: there is no output".into());
            }
            self.read(Target::Command(command), false);
        }
        let come = self.readings.has_come(command, true);
        Ok(timeout(PATIENCE, come).await.map_err(|_| "there is no output")?)
    }

    async fn export(&mut self, command: CommandId, file: &str) -> Result<(), Failed> {
        self.fetch(command).await?;
        let exported = self.readings.export(command).ok_or("there is no output")?;
        let bytes = exported.bytes.len() as u64;
        tokio::fs::write(file, exported.bytes).await.map_err(|error| format!("{file}: {error}"))?;
        let whole =
            if exported.is_whole { "every byte" } else { "not all: what is missing is said there" };
        let so_far = if exported.is_over { "" } else { " so far; it still runs" };
        eprintln!("-- {}: {} in {file}, {whole}{so_far}", short(command), bytes_in_words(bytes));
        Ok(())
    }
}
