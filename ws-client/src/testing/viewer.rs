//! Somebody who looks at a command's terminal.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use trunkline_protocol::message::{CommandState, Gap};

use crate::{
    Audit, Command, Dashboard, InputError, Request, RequestError, Terminal, TerminalEvent,
};

/// Longest that something is waited for, by tokio's clock.
const PATIENCE: Duration = Duration::from_secs(120);

/// A dashboard's look at one command, for a test that says what must be seen
/// next.
///
/// It checks what every reader may rely on: that bytes come once, in order and
/// without an unnamed hole. Of a command that is tried again it sees all
/// attempts, one after the other.
///
/// ```
/// use trunkline_client::testing::Viewer;
/// use trunkline_client::{Dashboard, Request};
///
/// # #[allow(dead_code)]
/// async fn logs_in(dashboard: &Dashboard) {
///     let mut viewer = Viewer::run(dashboard, "build-1", Request::text("login")).await.unwrap();
///     viewer.sees("password: ").await;
///     viewer.types("secret\n").await.unwrap();
///     let seen = viewer.sees_the_end().await;
///     assert!(seen.text().ends_with("welcome\r\n"));
/// }
/// ```
#[derive(Debug)]
pub struct Viewer {
    dashboard: Dashboard,
    command: Command,
    terminal: Terminal,
    seen: Seen,
    /// Where the next byte of the present stream stands.
    at: u64,
    /// What was seen up to here is no news any more.
    looked_at: usize,
}

/// What was seen of a command.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// All bytes, whatever output they came from.
    pub bytes: Vec<u8>,
    /// What was missing.
    pub gaps: Vec<Gap>,
    /// The command in its final state.
    pub state: Option<Arc<CommandState>>,
    /// Whether all that was written was seen; of the last attempt.
    pub audit: Option<Audit>,
}

impl Seen {
    /// The bytes as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Viewer {
    /// Asks for a command, and looks at it.
    ///
    /// Dropped before it has an answer, the command may run all the same: see
    /// [`Dashboard::run`].
    ///
    /// # Errors
    ///
    /// When it is not accepted.
    pub async fn run(
        dashboard: &Dashboard,
        agent: &str,
        request: Request,
    ) -> Result<Self, RequestError> {
        let command = dashboard.run(agent, request).await?;
        Ok(Self::of(dashboard, command))
    }

    /// Looks at a command.
    pub fn of(dashboard: &Dashboard, command: Command) -> Self {
        let terminal = command.terminal();
        let seen = Seen::default();
        Self { dashboard: dashboard.clone(), command, terminal, seen, at: 0, looked_at: 0 }
    }

    /// The command.
    pub fn command(&self) -> &Command {
        &self.command
    }

    /// All that was seen by now.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Waits until this is shown, after what was waited for before.
    ///
    /// Cancel safe: what was seen by then stays seen.
    ///
    /// # Panics
    ///
    /// When the command ends without it, or nothing is shown for two minutes of
    /// the runtime's time; with what was shown instead.
    pub async fn sees(&mut self, text: &str) {
        loop {
            let news = self.seen.bytes.get(self.looked_at..).unwrap_or_default();
            let mut parts = news.windows(text.len().max(1));
            if let Some(at) = parts.position(|part| part == text.as_bytes()) {
                self.looked_at += at + text.len();
                return;
            }
            if text.is_empty() {
                return;
            }
            let goes_on = self.look().await;
            assert!(goes_on, "it ended, and did not show {text:?}, but {:?}", self.seen.text());
        }
    }

    /// Types into it. Dropping the future is as with [`Dashboard::input`].
    ///
    /// # Errors
    ///
    /// See [`Dashboard::input`].
    pub async fn types(&self, text: impl Into<bytes::Bytes>) -> Result<(), InputError> {
        self.dashboard.input(self.command.id(), text).await
    }

    /// Asks it to end. Dropping the future is as with [`Dashboard::interrupt`].
    ///
    /// # Errors
    ///
    /// See [`Dashboard::interrupt`].
    pub async fn interrupts(&self) -> Result<(), RequestError> {
        self.dashboard.interrupt(self.command.id()).await
    }

    /// Waits until it has ended and is read to its end: all that was seen.
    /// Dropping the future drops the viewer, and nothing else.
    ///
    /// # Panics
    ///
    /// When nothing is shown for two minutes.
    pub async fn sees_the_end(mut self) -> Seen {
        while self.look().await {}
        if let Ok(state) = self.command.ended().await {
            self.seen.state = Some(state);
        }
        self.seen
    }

    /// Takes what is shown next. Whether there may be more.
    async fn look(&mut self) -> bool {
        let Ok(event) = timeout(PATIENCE, self.terminal.next()).await else {
            panic!("nothing more is shown after {:?}", self.seen.text());
        };
        match event {
            Some(TerminalEvent::Opened { from, .. }) => self.at = from,
            Some(TerminalEvent::Output { offset, data, .. }) => {
                assert_eq!(offset, self.at, "every byte comes once, in order, or is named");
                self.at += data.len() as u64;
                self.seen.bytes.extend_from_slice(&data);
            }
            Some(TerminalEvent::Gap { gap, .. }) => {
                assert_eq!(gap.from, self.at, "a gap begins where the stream stands");
                self.at = gap.to;
                self.seen.gaps.push(gap);
            }
            Some(TerminalEvent::Ended { state, audit, .. }) => {
                (self.seen.state, self.seen.audit) = (Some(state), Some(audit));
            }
            Some(TerminalEvent::Refused(refusal)) => panic!("it may not be seen: {refusal:?}"),
            Some(TerminalEvent::Lost(_)) => panic!("the hub no longer knows it"),
            None => return false,
        }
        true
    }
}
