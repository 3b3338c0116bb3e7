//! How a command becomes a process, or why it does not.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use pty_process::OwnedWritePty;
use rustix::process::Pid;
#[cfg(target_os = "linux")]
use tokio::io::{Interest, unix::AsyncFd};
use tokio::process::{Child, ChildStdin};
use trunkline_protocol::message::TerminalSize;
use trunkline_protocol::message::{CommandSpec, Run};

use super::Programs;
use super::group::Group;
use super::sources::Sources;

/// A running program and its two directions.
pub(super) struct Started {
    // Before `leader`: whoever drops this half-way kills first and reaps then.
    pub(super) group: Group,
    pub(super) leader: Leader,
    pub(super) sources: Sources,
    pub(super) input: Input,
}

/// Where what a person types goes.
pub(super) enum Input {
    Pty(OwnedWritePty),
    Pipe(ChildStdin),
    /// The program was started without.
    Closed,
}

/// The program itself: the first process of its group.
pub(super) struct Leader {
    child: Child,
    /// Tells of its end without reaping it, so that its number, which is also
    /// its group's, cannot be given to somebody else while the group is still
    /// to be signalled.
    #[cfg(target_os = "linux")]
    exit: Option<AsyncFd<OwnedFd>>,
}

impl Leader {
    fn new(child: Child, pid: Pid) -> Self {
        #[cfg(target_os = "linux")]
        {
            Self { child, exit: watch(pid) }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = pid;
            Self { child }
        }
    }

    /// Waits until it has ended. Dropping the future loses nothing.
    pub(super) async fn ended(&mut self) {
        #[cfg(target_os = "linux")]
        if let Some(exit) = &self.exit
            && exit.readable().await.is_ok()
        {
            return;
        }
        // An error is met again, and told, in `reap`.
        let _ = self.child.wait().await;
    }

    /// How it ended.
    pub(super) async fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }
}

/// A pseudo-terminal is open for a moment before it is marked as not to be
/// inherited. A program started in that moment would keep it open, and those
/// that run in it would never hear that their terminal is gone.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Becomes readable when the process ends; not there before Linux 5.3 and in
/// some sandboxes.
#[cfg(target_os = "linux")]
#[allow(
    deprecated,
    reason = "unsound for descriptors that can be closed elsewhere; this one is owned, and `register` needs unsafe"
)]
fn watch(pid: Pid) -> Option<AsyncFd<OwnedFd>> {
    use rustix::process::{PidfdFlags, pidfd_open};
    let process = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
    AsyncFd::with_interest(process, Interest::READABLE).ok()
}

/// Starts a command, or says in words for people why it cannot be run.
pub(super) fn start(rules: &Programs, spec: &CommandSpec) -> Result<Started, String> {
    let (program, args) = program(rules, &spec.run)?;
    let cwd = directory(rules, spec)?;
    let env = environment(rules, spec)?;

    let mut command = tokio::process::Command::new(program);
    command.args(args).kill_on_drop(true);
    if rules.clear_env {
        command.env_clear();
    }
    for name in &rules.withheld_env {
        command.env_remove(name);
    }
    if spec.terminal.is_some() {
        // These described the terminal the agent was started from.
        command.env("TERM", "xterm-256color").env_remove("COLUMNS").env_remove("LINES");
    }
    command.envs(env);
    if let Some(cwd) = cwd {
        command.current_dir(cwd);
    }
    let started = {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        match spec.terminal {
            Some(size) => in_terminal(command, size),
            None => with_pipes(command, rules.piped_input),
        }
    };
    started.map_err(|problem| match problem {
        Problem::Terminal(error) => format!("cannot open a pseudo-terminal: {error}"),
        Problem::Run(error) => {
            let program = quote(&program.to_string_lossy());
            match error.kind() {
                io::ErrorKind::NotFound => format!("cannot run {program}: no such program"),
                io::ErrorKind::PermissionDenied => {
                    format!("cannot run {program}: no permission, or not an executable file")
                }
                _ => format!("cannot run {program}: {error}"),
            }
        }
    })
}

/// The program and its arguments.
fn program<'a>(rules: &'a Programs, run: &'a Run) -> Result<(&'a OsStr, Vec<&'a OsStr>), String> {
    match run {
        Run::Argv(words) => {
            let [program, args @ ..] = words.as_slice() else {
                return Err("argv: must have 1 to 1024 strings".to_owned());
            };
            if program.is_empty() {
                return Err("argv: the program must not be empty".to_owned());
            }
            Ok((OsStr::new(program), args.iter().map(OsStr::new).collect()))
        }
        Run::Shell(_) if !rules.allow_shell => {
            Err("shell: this agent runs programs with argv only, no shell lines".to_owned())
        }
        Run::Shell(line) => Ok((rules.shell.as_os_str(), vec![OsStr::new("-c"), OsStr::new(line)])),
        Run::Text(_) => Err("text: this agent runs programs, not text".to_owned()),
    }
}

/// The directory to run in, if it is not the agent's own.
fn directory(rules: &Programs, spec: &CommandSpec) -> Result<Option<PathBuf>, String> {
    let wanted = match (&rules.working_dir, &spec.cwd) {
        (None, None) => return Ok(None),
        (Some(dir), None) => dir.clone(),
        (None, Some(cwd)) => PathBuf::from(cwd),
        (Some(dir), Some(cwd)) => dir.join(cwd),
    };
    match std::fs::metadata(&wanted) {
        Ok(found) if found.is_dir() => Ok(Some(wanted)),
        Ok(_) => Err(format!("cwd: {} is not a directory", quote_path(&wanted))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("cwd: {} does not exist", quote_path(&wanted)))
        }
        Err(error) => Err(format!("cwd: {} cannot be used: {error}", quote_path(&wanted))),
    }
}

/// The variables set for this command: the agent's settings, and over them
/// what was asked for.
fn environment<'a>(
    rules: &'a Programs,
    spec: &'a CommandSpec,
) -> Result<BTreeMap<&'a str, &'a str>, String> {
    if let Some(allowed) = &rules.allowed_env
        && let Some(name) = spec.env.keys().find(|name| !allowed.contains(*name))
    {
        return Err(format!("env: this agent does not let commands set {}", quote(name)));
    }
    let env: BTreeMap<_, _> = rules
        .env
        .iter()
        .chain(&spec.env)
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    for (name, value) in &env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!(
                "env: the name {} must not be empty or contain '=' or NUL",
                quote(name)
            ));
        }
        if value.contains('\0') {
            return Err(format!("env: the value of {} must not contain NUL", quote(name)));
        }
    }
    Ok(env)
}

enum Problem {
    Terminal(pty_process::Error),
    Run(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Run(error)
    }
}

fn in_terminal(command: tokio::process::Command, size: TerminalSize) -> Result<Started, Problem> {
    let (pty, pts) = pty_process::open().map_err(Problem::Terminal)?;
    pty.resize(pty_process::Size::new(size.rows, size.cols)).map_err(Problem::Terminal)?;
    speak_utf8(&pts);
    let control =
        pty.as_fd().try_clone_to_owned().map_err(|error| Problem::Terminal(error.into()))?;
    // Our own copies of the program's side go with `pts` and the command.
    let child = pty_process::Command::from(command).spawn(pts).map_err(|error| match error {
        pty_process::Error::Io(error) => Problem::Run(error),
        other => Problem::Terminal(other),
    })?;
    let (leader, group) = lead(child, Some(control))?;
    let (output, input) = pty.into_split();
    Ok(Started { group, leader, sources: Sources::terminal(output), input: Input::Pty(input) })
}

fn with_pipes(mut command: tokio::process::Command, input: bool) -> Result<Started, Problem> {
    let mut child = command
        .stdin(if input { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let sources = Sources::pipes(child.stdout.take(), child.stderr.take());
    let input = child.stdin.take().map_or(Input::Closed, Input::Pipe);
    let (leader, group) = lead(child, None)?;
    Ok(Started { group, leader, sources, input })
}

fn lead(child: Child, terminal: Option<OwnedFd>) -> io::Result<(Leader, Group)> {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("it has no process id"))?;
    Ok((Leader::new(child, pid), Group::new(pid, terminal)))
}

/// Lets the terminal's own line editing erase whole characters.
fn speak_utf8(terminal: &impl AsFd) {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::termios::{InputModes, OptionalActions, tcgetattr, tcsetattr};
        // Only a comfort: a terminal that refuses works all the same.
        if let Ok(mut modes) = tcgetattr(terminal) {
            modes.input_modes |= InputModes::IUTF8;
            let _ = tcsetattr(terminal, OptionalActions::Now, &modes);
        }
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    let _ = terminal;
}

/// At most 200 characters of a requester's text, fit to be shown.
fn quote(text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    format!("{short:?}")
}

fn quote_path(path: &Path) -> String {
    quote(&path.to_string_lossy())
}
