//! Processes of the tests' own: started, heard, stopped, killed by their id,
//! and never left behind.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// Longest that anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The present moment. A test with real sockets has real time.
#[expect(clippy::disallowed_methods, reason = "the one clock of tests with real processes")]
pub fn now() -> Instant {
    Instant::now()
}

/// What comes of `what`, which has [`PATIENCE`] for it.
pub async fn within<F: Future>(what: F) -> F::Output {
    timeout(PATIENCE, what).await.expect("in time")
}

/// Lines of a process that are kept.
const LINES_MAX: usize = 1000;

/// A process that is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The last that it said; no more of it comes once the sender is gone.
    lines: watch::Receiver<VecDeque<String>>,
}

impl Process {
    /// Starts a program and listens to its standard output, so that it never
    /// waits for a reader. Needs a runtime.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, lines) = watch::channel(VecDeque::new());
        tokio::spawn(async move {
            while let Ok(Some(line)) = said.next_line().await {
                sender.send_modify(|lines| {
                    if lines.len() == LINES_MAX {
                        lines.pop_front();
                    }
                    lines.push_back(line);
                });
            }
        });
        Self { child, lines }
    }

    /// What follows `words` on the first line that begins with them.
    pub async fn says(&self, words: &str) -> String {
        let find = |lines: &VecDeque<String>| {
            lines.iter().find_map(|line| line.strip_prefix(words)).map(str::to_owned)
        };
        let mut lines = self.lines.clone();
        let found = within(lines.wait_for(|lines| find(lines).is_some())).await;
        let lines = found.unwrap_or_else(|_| panic!("it ended without a word of {words:?}"));
        find(&lines).unwrap()
    }

    /// `SIGSTOP`: it is there and does nothing.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// `SIGCONT`: it goes on.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// `SIGKILL`, and waits until it is gone.
    pub async fn kill(&mut self) -> ExitStatus {
        self.child.start_kill().unwrap();
        self.died().await
    }

    /// Waits until it is gone by itself.
    pub async fn died(&mut self) -> ExitStatus {
        within(self.child.wait()).await.unwrap()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        // The id is its own until it was waited for.
        if let Some(id) = id {
            kill_process(id, signal).unwrap();
        }
    }
}
