use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use trunkline_protocol::message::{Channel, CommandSpec, Run, TerminalSize};

use super::Programs;
use crate::handler::Outcome;
use hub::Remote;

mod hub;

// What comes out

#[tokio::test]
async fn a_large_output_through_pipes_is_exact() {
    let run = piped("yes 0123456789abcdef | head -c 20000000");
    let (outcome, output) = Live::start(run).finish().await;
    assert_eq!(outcome, Outcome::Exited(0));
    assert_eq!(digest(&output), digest(&lines("0123456789abcdef\n", 20_000_000)));
}

#[tokio::test]
async fn a_large_output_through_a_terminal_is_exact() {
    let run = terminal("stty -opost; yes 0123456789abcdef | head -c 20000000");
    let (outcome, output) = Live::start(run).finish().await;
    assert_eq!(outcome, Outcome::Exited(0));
    assert_eq!(digest(&output), digest(&lines("0123456789abcdef\n", 20_000_000)));
}

#[tokio::test]
async fn bytes_are_not_touched() {
    let every: Vec<String> = (0..=255).map(|byte| format!("\\{byte:03o}")).collect();
    let every = every.concat();
    let all: Vec<u8> = (0..=255).collect();
    let (_, output) = Live::start(piped(&format!("printf '{every}'"))).finish().await;
    assert_eq!(output, all);
    let (_, output) =
        Live::start(terminal(&format!("stty -opost; printf '{every}'"))).finish().await;
    assert_eq!(output, all);
}

#[tokio::test]
async fn a_terminal_keeps_its_colours() {
    let (_, output) =
        Live::start(terminal(r"[ -t 1 ] && printf '\033[31mred\033[0m\n'")).finish().await;
    assert_eq!(output, b"\x1b[31mred\x1b[0m\r\n");
}

#[tokio::test]
async fn the_two_pipes_are_told_apart() {
    let mut live = Live::start(piped("printf out; printf err >&2; printf put"));
    let outcome = live.outcome().await;
    assert_eq!(outcome, Outcome::Exited(0));
    assert_eq!(live.of(Channel::Stdout), b"output");
    assert_eq!(live.of(Channel::Stderr), b"err");
}

#[tokio::test]
async fn no_byte_is_lost_right_before_the_end() {
    let text = "x".repeat(3_000);
    for round in 0..200 {
        let line = format!("printf %s{round} {text}; printf end{round}");
        for spec in [terminal(&line), piped(&line)] {
            let (outcome, output) = Live::start(spec).finish().await;
            assert_eq!(outcome, Outcome::Exited(0));
            assert_eq!(String::from_utf8_lossy(&output), format!("{text}{round}end{round}"));
        }
    }
}

#[tokio::test]
async fn a_terminal_that_is_closed_and_opened_again_goes_on() {
    let run = terminal("exec </dev/null >/dev/null 2>&1; sleep 0.2; echo back >/dev/tty");
    let (outcome, output) = Live::start(run).finish().await;
    assert_eq!((outcome, output.as_slice()), (Outcome::Exited(0), b"back\r\n".as_slice()));
}

#[tokio::test]
async fn output_that_nobody_takes_holds_the_program_and_not_an_interrupt() {
    for spec in [piped("yes"), terminal("yes")] {
        let mut live = Live::start(spec);
        live.until("y").await;
        live.remote.interrupt(SOON).await;
        live.remote.heard_signalled().await;
        assert_eq!(live.outcome().await, Outcome::Signalled(2));
    }
}

// What goes in

#[tokio::test]
async fn a_terminal_echoes_and_ends_its_input_with_a_key() {
    let mut live = Live::start(terminal("cat"));
    live.remote.input(b"h\xc3\xa4llo\n").await;
    live.until("hällo\r\nhällo\r\n").await;
    live.remote.input(b"\x04").await;
    assert_eq!(live.outcome().await, Outcome::Exited(0));
}

#[tokio::test]
async fn a_terminal_takes_an_interrupt_key() {
    let mut live = Live::start(terminal("echo ready; exec sleep 1000"));
    live.until("ready").await;
    live.remote.input(b"\x03").await;
    assert_eq!(live.outcome().await, Outcome::Signalled(2));
}

#[tokio::test]
async fn a_pipe_takes_every_byte_as_it_is() {
    let live = Live::start(piped("head -c 5"));
    live.remote.input(b"\x04\x03\0").await;
    live.remote.input(b"ab").await;
    assert_eq!(live.finish().await, (Outcome::Exited(0), b"\x04\x03\0ab".to_vec()));
}

#[tokio::test]
async fn much_input_arrives_whole_while_output_flows() {
    let all = lines("0123456789abcdef\n", 2_000_000);
    let mut live = Live::start(piped("head -c 2000000"));
    let remote = live.remote.clone();
    let pieces = all.clone();
    let typing = tokio::spawn(async move {
        for piece in pieces.chunks(16 * 1024) {
            remote.input(piece).await;
        }
    });
    let outcome = live.outcome().await;
    typing.await.expect("typed");
    assert_eq!((outcome, digest(&live.seen())), (Outcome::Exited(0), digest(&all)));
}

#[tokio::test]
async fn input_that_is_switched_off_has_ended() {
    let programs = Programs::new().piped_input(false);
    let live = Live::with(programs, piped("cat; echo end"));
    live.remote.input(b"dropped").await;
    assert_eq!(live.finish().await, (Outcome::Exited(0), b"end\n".to_vec()));
}

#[tokio::test]
async fn an_interrupt_passes_a_flood_of_input_that_nobody_reads() {
    let run = "echo ready; exec sleep 1000";
    // About what fits into the kernel and into what is read ahead.
    for (spec, room) in
        [(piped(run), 144 * 1024), (terminal(&format!("stty raw; {run}")), 96 * 1024)]
    {
        let mut live = Live::start(spec);
        live.until("ready").await;
        let remote = live.remote.clone();
        let flood = tokio::spawn(async move {
            for _ in 0..1_000 {
                remote.input(&[b'x'; 16 * 1024]).await;
            }
        });
        live.remote.taken(room).await;
        live.remote.interrupt(SOON).await;
        live.remote.heard_signalled().await;
        assert_eq!(live.outcome().await, Outcome::Signalled(2));
        flood.abort();
    }
}

#[tokio::test]
async fn a_resize_reaches_the_program() {
    let script = "stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 1000 & wait; done";
    let mut live = Live::start(terminal(script));
    live.until("24 80\r\nready\r\n").await;
    live.remote.resize(TerminalSize { cols: 132, rows: 43 }).await;
    live.until("43 132\r\n").await;
    assert_eq!(live.outcome().await, Outcome::Exited(7));
}

#[tokio::test]
async fn a_resize_without_a_terminal_means_nothing() {
    let mut live = Live::start(piped("head -n 1"));
    live.remote.resize(TerminalSize { cols: 132, rows: 43 }).await;
    live.remote.input(b"on\n").await;
    assert_eq!(live.outcome().await, Outcome::Exited(0));
}

// How it ends

#[tokio::test]
async fn an_exit_code_and_a_signal_are_told() {
    for spec in [piped, terminal] {
        assert_eq!(Live::start(spec("exit 7")).finish().await.0, Outcome::Exited(7));
        assert_eq!(Live::start(spec("kill -TERM $$")).finish().await.0, Outcome::Signalled(15));
    }
}

#[tokio::test]
async fn an_interrupt_ends_the_whole_group() {
    for spec in [piped, terminal] {
        let mut live = Live::start(spec("sh -c 'echo ready; exec sleep 1000'; echo not here"));
        live.until("ready").await;
        live.remote.interrupt(SOON).await;
        live.remote.heard_signalled().await;
        let (outcome, output) = live.finish().await;
        assert_eq!(outcome, Outcome::Signalled(2));
        assert!(!String::from_utf8_lossy(&output).contains("not here"));
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_stopped_program_hears_an_interrupt() {
    let script = "(until grep -q State:.T /proc/$$/status; do :; done; echo ready) & kill -STOP $$";
    let mut live = Live::start(piped(script));
    live.until("ready").await;
    live.remote.interrupt(Duration::from_secs(60)).await;
    assert_eq!(live.outcome().await, Outcome::Signalled(2));
}

#[tokio::test]
async fn who_ignores_an_interrupt_is_killed_after_the_grace() {
    for spec in [piped, terminal] {
        let mut live = Live::start(spec("trap '' INT; echo ready; while :; do sleep 1; done"));
        live.until("ready").await;
        live.remote.interrupt(Duration::from_millis(100)).await;
        assert_eq!(live.outcome().await, Outcome::Signalled(9));
    }
}

#[tokio::test]
async fn a_second_interrupt_signals_again_and_does_not_lengthen_the_grace() {
    let mut live = Live::start(piped(
        "trap 'echo heard' INT; echo ready; while :; do sleep 1000 & wait; done",
    ));
    live.until("ready").await;
    live.remote.interrupt(Duration::from_secs(2)).await;
    live.until("heard").await;
    live.remote.interrupt(Duration::from_secs(600)).await;
    live.until("heard\nheard").await;
    assert_eq!(live.outcome().await, Outcome::Signalled(9));
}

#[tokio::test]
async fn a_second_interrupt_may_shorten_the_grace() {
    let mut live = Live::start(piped("trap '' INT; echo ready; while :; do sleep 1; done"));
    live.until("ready").await;
    live.remote.interrupt(Duration::from_secs(600)).await;
    live.remote.interrupt(Duration::ZERO).await;
    assert_eq!(live.outcome().await, Outcome::Signalled(9));
}

#[tokio::test]
async fn the_foreground_job_of_a_shell_hears_an_interrupt() {
    // With job control, each job is a process group of its own.
    let script = "trap : INT; set -m; sh -c \"trap 'echo job heard; exit 0' INT; echo ready; while :; do sleep 0.1; done\"; exit 3";
    let mut live = Live::start(terminal(script));
    live.until("ready").await;
    live.remote.interrupt(Duration::from_secs(60)).await;
    live.until("job heard").await;
    assert_eq!(live.outcome().await, Outcome::Exited(3));
}

#[tokio::test]
async fn dropping_it_kills_all_that_it_started() {
    let lines = [
        "sleep 1000 & wait",
        // In a process group of its own.
        "timeout 1000 sleep 1000",
        // In a session of its own.
        "setsid sleep 1000 & wait",
        // Orphaned, and in a group of its own as a background job.
        "set -m; (sleep 1000 &); sleep 1000",
    ];
    for (at, line) in lines.iter().enumerate() {
        for spec in [piped, terminal] {
            // Without a session there is no telling whose an orphan is.
            if at == 3 && spec("").terminal.is_none() {
                continue;
            }
            let witness = Witness::new();
            let mut live =
                Live::start(spec(&format!("exec 9>{}; echo ready; {line}", witness.path())));
            live.until("ready").await;
            live.remote.drop_it().await;
            witness.all_dead().await;
        }
    }
}

#[tokio::test]
async fn what_is_left_running_does_not_hold_up_the_end_and_is_killed() {
    for spec in [piped, terminal] {
        let witness = Witness::new();
        let programs = Programs::new().linger(Duration::from_millis(50));
        // The kernel's own SIGHUP would do it in a terminal.
        let line = format!("trap '' HUP; exec 9>{}; sleep 1000 & echo ready", witness.path());
        let (outcome, output) = Live::with(programs, spec(&line)).finish().await;
        assert_eq!(
            (outcome, String::from_utf8_lossy(&output).trim_end()),
            (Outcome::Exited(0), "ready")
        );
        witness.all_dead().await;
    }
}

#[tokio::test]
async fn what_is_left_running_without_output_is_killed_too() {
    let witness = Witness::new();
    let line = format!("exec 9>{}; sleep 1000 <&- >&- 2>&- & exit 4", witness.path());
    assert_eq!(Live::start(piped(&line)).finish().await.0, Outcome::Exited(4));
    witness.all_dead().await;
}

#[tokio::test]
async fn what_is_left_running_may_finish_its_sentence() {
    let programs = Programs::new().linger(Duration::from_secs(5));
    let line = "(for i in 1 2 3; do sleep 0.1; echo $i; done) & echo 0";
    let (outcome, output) = Live::with(programs, piped(line)).finish().await;
    assert_eq!((outcome, output.as_slice()), (Outcome::Exited(0), b"0\n1\n2\n3\n".as_slice()));
}

#[tokio::test]
async fn what_is_left_running_in_another_session_does_not_hold_up_the_end() {
    for spec in [piped, terminal] {
        let programs = Programs::new().linger(Duration::from_millis(50));
        let live = Live::with(programs, spec("trap '' HUP; setsid sleep 1000 & echo $!"));
        let (outcome, output) = live.finish().await;
        assert_eq!(outcome, Outcome::Exited(0));
        let left: i32 = String::from_utf8_lossy(&output).trim().parse().expect("a process id");
        let left = rustix::process::Pid::from_raw(left).expect("not zero");
        rustix::process::kill_process(left, rustix::process::Signal::KILL).expect("it lives");
    }
}

// What is not run

#[tokio::test]
async fn what_cannot_be_run_is_said_in_words() {
    let argv = |words: &[&str]| {
        CommandSpec::from(Run::Argv(words.iter().map(|&word| word.to_owned()).collect()))
    };
    let cwd = |dir: &str| CommandSpec { cwd: Some(dir.to_owned()), ..piped("true") };
    let cases = [
        (argv(&["no-such-program"]), "cannot run \"no-such-program\": no such program"),
        (
            argv(&["/etc/passwd"]),
            "cannot run \"/etc/passwd\": no permission, or not an executable file",
        ),
        (CommandSpec::from(Run::Text("hi".into())), "text: this agent runs programs, not text"),
        (cwd("/no/such"), "cwd: \"/no/such\" does not exist"),
        (cwd("/etc/passwd"), "cwd: \"/etc/passwd\" is not a directory"),
    ];
    for (spec, text) in cases {
        for terminal in [None, Some(TerminalSize::default())] {
            let (outcome, output) =
                Live::start(CommandSpec { terminal, ..spec.clone() }).finish().await;
            assert_eq!((outcome, output), (Outcome::Failed(text.to_owned()), Vec::new()));
        }
    }
}

#[tokio::test]
async fn a_variable_that_cannot_be_is_refused() {
    let cases = [
        ("A=B", "", "env: the name \"A=B\" must not be empty or contain '=' or NUL"),
        ("", "", "env: the name \"\" must not be empty or contain '=' or NUL"),
        ("A", "\0", "env: the value of \"A\" must not contain NUL"),
    ];
    for (name, value, text) in cases {
        let programs = Programs::new().env(name, value);
        let (outcome, _) = Live::with(programs, piped("true")).finish().await;
        assert_eq!(outcome, Outcome::Failed(text.to_owned()));
    }
}

#[tokio::test]
async fn what_is_switched_off_is_refused() {
    let refused = |programs, spec| async { Live::with(programs, spec).finish().await.0 };
    assert_eq!(
        refused(Programs::new().allow_shell(false), piped("true")).await,
        Outcome::Failed(
            "shell: this agent runs programs with argv only, no shell lines".to_owned()
        )
    );
    let mut spec = piped("true");
    spec.env.insert("LD_PRELOAD".to_owned(), "x".to_owned());
    assert_eq!(
        refused(Programs::new().allow_env(["LANG"]), spec).await,
        Outcome::Failed("env: this agent does not let commands set \"LD_PRELOAD\"".to_owned())
    );
}

// What it finds around it

#[tokio::test]
async fn argv_is_not_for_a_shell() {
    let words = ["printf", "%s|", "$HOME", "a b", "*", "; true"].map(str::to_owned);
    let (_, output) = Live::start(CommandSpec::from(Run::Argv(words.to_vec()))).finish().await;
    assert_eq!(output, b"$HOME|a b|*|; true|");
}

#[tokio::test]
async fn a_directory_may_be_relative_to_the_agents() {
    let programs = Programs::new().working_dir("/usr");
    let spec = CommandSpec { cwd: Some("bin".to_owned()), ..piped("pwd -L") };
    assert_eq!(Live::with(programs.clone(), spec).finish().await.1, b"/usr/bin\n");
    assert_eq!(Live::with(programs, piped("pwd -L")).finish().await.1, b"/usr\n");
}

#[tokio::test]
async fn the_environment_is_layered() {
    let programs = Programs::new().env("A", "agent").env("B", "agent").withhold_env(["PATH"]);
    let mut spec = terminal("echo $A-$B-${PATH-none}-$TERM");
    spec.env.insert("B".to_owned(), "command".to_owned());
    // Some shells fall back to a PATH of their own.
    let (_, output) = Live::with(programs.clone(), spec.clone()).finish().await;
    let output = String::from_utf8_lossy(&output).into_owned();
    assert!(
        output.starts_with("agent-command-") && output.ends_with("-xterm-256color\r\n"),
        "{output}"
    );
    assert!(!output.contains(&std::env::var("PATH").expect("set in tests")), "{output}");
    spec.env.insert("TERM".to_owned(), "dumb".to_owned());
    let (_, output) = Live::with(programs.clear_env(), spec).finish().await;
    assert!(output.ends_with(b"-dumb\r\n"));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn no_program_holds_another_ones_terminal() {
    let argv = ["ls", "-l", "/proc/self/fd"].map(str::to_owned).to_vec();
    let spec = CommandSpec {
        terminal: Some(TerminalSize::default()),
        ..CommandSpec::from(Run::Argv(argv))
    };
    let keeps_open = Live::start(terminal("cat"));
    let runs: Vec<_> = (0..16)
        .map(|_| {
            let spec = spec.clone();
            tokio::spawn(async move { Live::start(spec).finish().await.1 })
        })
        .collect();
    for run in runs {
        let output = run.await.expect("ran");
        let output = String::from_utf8_lossy(&output);
        assert!(output.contains("/dev/pts/") && !output.contains("ptmx"), "{output}");
    }
    drop(keeps_open);
}

// Below the stories

/// Long enough for the slowest machine; only a failure takes it.
const PATIENCE: Duration = Duration::from_secs(20);

/// A grace that is long enough for whoever heeds an interrupt.
const SOON: Duration = Duration::from_secs(10);

fn piped(line: &str) -> CommandSpec {
    CommandSpec::from(Run::Shell(line.to_owned()))
}

fn terminal(line: &str) -> CommandSpec {
    CommandSpec { terminal: Some(TerminalSize::default()), ..piped(line) }
}

fn lines(line: &str, bytes: usize) -> Vec<u8> {
    line.bytes().cycle().take(bytes).collect()
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

/// A command and whoever sent it.
struct Live {
    remote: Remote,
    chunks: Vec<(Channel, Bytes)>,
}

impl Live {
    fn start(spec: CommandSpec) -> Self {
        Self::with(Programs::new(), spec)
    }

    fn with(programs: Programs, spec: CommandSpec) -> Self {
        Self { remote: hub::run(programs, spec), chunks: Vec::new() }
    }

    fn of(&self, channel: Channel) -> Vec<u8> {
        self.chunks
            .iter()
            .filter(|(of, _)| *of == channel)
            .flat_map(|(_, bytes)| bytes.to_vec())
            .collect()
    }

    fn seen(&self) -> Vec<u8> {
        self.chunks.iter().flat_map(|(_, bytes)| bytes.to_vec()).collect()
    }

    /// Takes output until it contains `text`.
    async fn until(&mut self, text: &str) {
        loop {
            let seen = self.seen();
            let seen = String::from_utf8_lossy(&seen);
            if seen.contains(text) {
                return;
            }
            let Some(chunk) = within(self.remote.next_output()).await else {
                panic!("ended without {text:?}: {seen:?}");
            };
            self.chunks.push(chunk);
        }
    }

    async fn outcome(&mut self) -> Outcome {
        while let Some(chunk) = within(self.remote.next_output()).await {
            self.chunks.push(chunk);
        }
        within(self.remote.outcome()).await
    }

    async fn finish(mut self) -> (Outcome, Vec<u8>) {
        let outcome = self.outcome().await;
        (outcome, self.seen())
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// A named pipe. Whoever holds its other end open is alive.
struct Witness {
    dir: PathBuf,
    end: tokio::sync::oneshot::Receiver<()>,
}

impl Witness {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("trunkline-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).expect("created");
        let pipe = dir.join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs");
        assert!(made.success());
        let (tell, end) = tokio::sync::oneshot::channel();
        // Not one of the runtime's, which would wait for it for ever.
        std::thread::spawn(move || {
            let mut pipe = std::fs::File::open(pipe).expect("opened");
            pipe.read_to_end(&mut Vec::new()).expect("read");
            let _ = tell.send(());
        });
        Self { dir, end }
    }

    fn path(&self) -> String {
        self.dir.join("pipe").display().to_string()
    }

    async fn all_dead(self) {
        within(self.end).await.expect("watched");
        std::fs::remove_dir_all(self.dir).expect("removed");
    }
}
