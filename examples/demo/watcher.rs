//! A dashboard that believes nothing: it looks at everything that both agents
//! show, and counts and hashes every byte itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use trunkline_client::protocol::ids::CommandId;
use trunkline_client::protocol::message::{CommandState, Gap};
use trunkline_client::{Audit, Dashboard, SetupError, Terminal, TerminalEvent, TerminalOptions};
use trunkline_examples::now;

use crate::truth::{Truth, digest};

/// What of a command's output is kept to be shown.
const KEPT_BYTES: usize = 16 * 1024;

/// A dashboard and what it has seen.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) name: &'static str,
    pub(crate) dashboard: Dashboard,
    seen: watch::Receiver<Seen>,
    _eyes: JoinSet<()>,
}

/// By command, what was seen of it.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    commands: BTreeMap<CommandId, Output>,
}

/// What was seen of one command.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) bytes: u64,
    hash: Sha256,
    pub(crate) beginning: Vec<u8>,
    /// Up to where its bytes had arrived, and when.
    pub(crate) arrivals: Vec<(u64, Instant)>,
    pub(crate) gaps: Vec<Gap>,
    /// Bytes that did not follow on from those before: lost or doubled
    /// without a word.
    pub(crate) jumps: u64,
    pub(crate) end: Option<(Arc<CommandState>, Audit)>,
}

impl Seen {
    pub(crate) fn output(&self, command: CommandId) -> Option<&Output> {
        self.commands.get(&command)
    }

    pub(crate) fn outputs(&self) -> impl Iterator<Item = &Output> {
        self.commands.values()
    }

    fn look(&mut self, command: CommandId, event: TerminalEvent) {
        let seen = self.commands.entry(command).or_default();
        match event {
            TerminalEvent::Output { offset, data, .. } => {
                seen.jumps += u64::from(offset != seen.bytes);
                seen.bytes = offset + data.len() as u64;
                seen.hash.update(&data);
                let room = KEPT_BYTES - seen.beginning.len();
                seen.beginning.extend_from_slice(&data[..room.min(data.len())]);
                seen.arrivals.push((seen.bytes, now()));
            }
            TerminalEvent::Gap { gap, .. } => {
                seen.jumps += u64::from(gap.from != seen.bytes);
                seen.bytes = gap.to;
                seen.gaps.push(gap);
            }
            TerminalEvent::Ended { state, audit, .. } => seen.end = Some((state, audit)),
            TerminalEvent::Opened { .. } | TerminalEvent::Refused(_) | TerminalEvent::Lost(_) => {}
        }
    }
}

impl Output {
    pub(crate) fn truth(&self) -> Truth {
        Truth { bytes: self.bytes, digest: digest(self.hash.clone()) }
    }
}

impl Watcher {
    /// Connects, and watches everything that these agents run.
    pub(crate) fn connect(
        name: &'static str,
        url: &str,
        backoff: trunkline_client::Backoff,
        agents: &[trunkline_client::protocol::ids::AgentId],
    ) -> Result<Self, SetupError> {
        let dashboard = Dashboard::builder(url)?.backoff(backoff).connect();
        let (sender, seen) = watch::channel(Seen::default());
        let mut eyes = JoinSet::new();
        for agent in agents {
            let options = TerminalOptions { scrollback_bytes: 0, ..TerminalOptions::default() };
            let target = trunkline_client::protocol::message::Target::Agent(agent.clone());
            eyes.spawn(watch(dashboard.terminal_with(target, options), sender.clone()));
        }
        Ok(Self { name, dashboard, seen, _eyes: eyes })
    }

    /// What it has seen so far.
    pub(crate) fn seen(&self) -> watch::Ref<'_, Seen> {
        self.seen.borrow()
    }

    /// Waits until it has seen that.
    pub(crate) async fn sees(&self, what: impl Fn(&Seen) -> bool) {
        // The eyes, which hold the senders, close only with this.
        let _ = self.seen.clone().wait_for(|seen| what(seen)).await;
    }

    /// Waits until it has seen this much of a command's output.
    pub(crate) async fn sees_bytes(&self, command: CommandId, bytes: u64) {
        self.sees(|seen| seen.output(command).is_some_and(|output| output.bytes >= bytes)).await;
    }

    /// Waits until it has seen a command's output to the end.
    pub(crate) async fn sees_end(&self, command: CommandId) {
        self.sees(|seen| seen.output(command).is_some_and(|output| output.end.is_some())).await;
    }
}

async fn watch(mut terminal: Terminal, seen: watch::Sender<Seen>) {
    let mut commands = BTreeMap::new();
    while let Some(event) = terminal.next().await {
        let stream = match &event {
            TerminalEvent::Opened { stream, command, .. } => {
                commands.insert(*stream, *command);
                continue;
            }
            TerminalEvent::Output { stream, .. }
            | TerminalEvent::Gap { stream, .. }
            | TerminalEvent::Ended { stream, .. } => stream,
            TerminalEvent::Refused(_) | TerminalEvent::Lost(_) => continue,
        };
        if let Some(command) = commands.get(stream) {
            seen.send_modify(|seen| seen.look(*command, event));
        }
    }
}
