//! [`Programs`]: the ready-made handler that runs real programs.

mod course;
mod group;
mod sources;
mod start;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::connector::BoxFuture;
use crate::handler::{CommandHandler, Execution, Outcome};

/// Runs commands as programs of this machine, in a pseudo-terminal or with
/// pipes.
///
/// ```
/// use trunkline_client::Programs;
///
/// let programs = Programs::new()
///     .allow_shell(false)
///     .working_dir("/srv/build")
///     .withhold_env(["TRUNKLINE_TOKEN"]);
/// ```
///
/// # What is run
///
/// `argv` is run as it is, without a shell: a program looked up in `PATH`,
/// or, with a `/` in its name, found from the directory it runs in. `shell`
/// is a line for [`shell`](Self::shell). `text` is refused: it is for other
/// handlers.
///
/// Whoever may send commands to this agent may do whatever its user may do on
/// this machine. Who that is, the hub's `Policy` decides; an agent that
/// should be able to do less runs as a user, or in a container, that can do
/// less. What can be switched off here narrows mistakes, not attackers.
///
/// # In a terminal
///
/// A command that names a terminal size runs in a pseudo-terminal of that
/// size, in a session of its own. `TERM` is `xterm-256color` unless the
/// command or [`env`](Self::env) says otherwise. All output is one channel.
/// Input is typed: the program, or the terminal's own line editing, sees ^C
/// and ^D as a person's. As in any terminal, a line of more than 4,095 bytes
/// is cut by the line editing, unless the program switched that off.
///
/// # With pipes
///
/// Without a terminal, standard output and standard error are pipes of their
/// own. What arrives in both at the same moment may change order, as with any
/// two pipes. Input goes to standard input as it is, no byte is special, and
/// so there is **no way to say that input has ended**: a program that reads
/// to the end, such as `sort` without a file, waits until it is interrupted.
/// Run it in a terminal, give it `< /dev/null` in a shell line, or switch
/// [`piped_input`](Self::piped_input) off, and it finds the end at once.
///
/// # Held back
///
/// A program whose output nobody takes is not read, so that it stops writing
/// and waits, as it would in a pipe to a slow program. A program that does
/// not read its input is given no more, and whoever types has to wait. An
/// interrupt passes both; behind input that nobody reads it may take half a
/// second.
///
/// # Interrupts
///
/// An interrupt sends `SIGINT` to the program's process group, and to the
/// terminal's foreground job if that is another one. What has not ended when
/// the grace is over is killed: the group, the foreground job, and on Linux
/// all descendants and everything else in its terminal's session. A second
/// interrupt signals again and never lengthens the grace. It is a request to
/// end, not a keystroke: an interactive shell survives `SIGINT` and is killed
/// after the grace. (A ^C for what runs inside of it is input.)
///
/// An agent that itself ignores `SIGINT`, as one started with `&` from a
/// script does, passes that on to its programs; each interrupt of theirs then
/// takes the whole grace.
///
/// # The end
///
/// A command has ended when its program has, and its output when nobody can
/// write to it any more. Every byte is read until then. Should the program
/// have left others running that keep the output open, they are waited for
/// until they have been quiet for [`linger`](Self::linger), at most ten
/// seconds; then the rest of the process group is killed, what it had written
/// is read, and the command is over. What is left of the group is killed in
/// any case, so a program that is to outlive its command must start in a
/// session of its own (`setsid`), with its output somewhere else.
///
/// # When the agent goes
///
/// Dropping the future that runs a command kills all that an overdue
/// interrupt would kill. Nothing can do that when the agent itself is killed
/// with `SIGKILL`: a program in a terminal then gets `SIGHUP` from the kernel,
/// one with pipes finds its input ended and its output broken, and goes on
/// for as long as it needs neither. So nobody can say how its command ended:
/// it is `unknown`, also to an agent that keeps a
/// [`Journal`](crate::Journal), which runs it again only as a new attempt,
/// where that was asked for.
///
/// # Needs
///
/// A tokio runtime with I/O and time. Nobody else in the process may wait for
/// children that are not theirs, nor set `SIGCHLD` to be ignored; how such a
/// command ended is then not known, and it counts as failed.
#[derive(Debug, Clone)]
pub struct Programs {
    shell: PathBuf,
    allow_shell: bool,
    working_dir: Option<PathBuf>,
    clear_env: bool,
    env: BTreeMap<String, String>,
    withheld_env: BTreeSet<String>,
    allowed_env: Option<BTreeSet<String>>,
    piped_input: bool,
    linger: Duration,
}

impl Default for Programs {
    fn default() -> Self {
        Self {
            shell: PathBuf::from("/bin/sh"),
            allow_shell: true,
            working_dir: None,
            clear_env: false,
            env: BTreeMap::new(),
            withheld_env: BTreeSet::new(),
            allowed_env: None,
            piped_input: true,
            linger: Duration::from_millis(500),
        }
    }
}

impl Programs {
    /// Runs anything, in the agent's own directory and environment.
    pub fn new() -> Self {
        Self::default()
    }

    /// The shell that runs `shell` commands, as `SHELL -c LINE`; `/bin/sh` by
    /// default.
    #[must_use]
    pub fn shell(mut self, program: impl Into<PathBuf>) -> Self {
        self.shell = program.into();
        self
    }

    /// Whether `shell` commands are run at all; they are by default, since a
    /// requester has to ask for a shell by name. It keeps mistakes in quoting
    /// out, and nothing else: `argv` can name a shell too.
    #[must_use]
    pub fn allow_shell(mut self, allow: bool) -> Self {
        self.allow_shell = allow;
        self
    }

    /// Where commands run that name no directory, and what a relative `cwd`
    /// is relative to; the agent's own directory by default. It does not
    /// confine: a `cwd` may be absolute.
    #[must_use]
    pub fn working_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.working_dir = Some(dir.into());
        self
    }

    /// Lets commands inherit nothing of the agent's environment. `PATH` too
    /// is then gone unless [`env`](Self::env) sets it; programs are then
    /// looked for in the system's default places.
    #[must_use]
    pub fn clear_env(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// Sets a variable for every command; a command's own goes before it.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Keeps variables of the agent's environment from its commands, such as
    /// the one that its own token came in.
    #[must_use]
    pub fn withhold_env<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.withheld_env.extend(names.into_iter().map(Into::into));
        self
    }

    /// The only variables that a command may set; a command that sets another
    /// one is refused. Any by default. Called again, it adds to the list.
    #[must_use]
    pub fn allow_env<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.allowed_env.get_or_insert_default().extend(names.into_iter().map(Into::into));
        self
    }

    /// Whether a program without a terminal can be given input; it can by
    /// default. Without, it finds the end of its input at once, and input
    /// sent to it is dropped.
    #[must_use]
    pub fn piped_input(mut self, open: bool) -> Self {
        self.piped_input = open;
        self
    }

    /// How long those that a program left running with its output open may be
    /// quiet before they are killed; 500 ms by default. A command that leaves
    /// such processes behind ends later by this much.
    #[must_use]
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }
}

impl CommandHandler for Programs {
    /// Runs the command to its end. Dropping the future kills it.
    fn run(&self, execution: Execution) -> BoxFuture<'static, Outcome> {
        let rules = self.clone();
        Box::pin(async move {
            match start::start(&rules, execution.spec()) {
                Ok(started) => course::follow(started, rules.linger, execution).await,
                Err(reason) => Outcome::Failed(reason),
            }
        })
    }
}
