//! Servers as processes of their own, and what the machine allows them.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::wire::Result;

/// A process that this one has started. It ends with this value, and by itself
/// when the process that started it is gone.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a program that ends when its standard input does.
    pub fn start(program: &Path, args: &[&str]) -> Result<Self> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("no stdout")?;
        Ok(Self { child, stdout: BufReader::new(stdout) })
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line)
    }

    /// Tells it to end, and returns what else it prints.
    pub fn end(mut self) -> Result<String> {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        self.child.wait()?;
        Ok(rest)
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server in a process of its own.
#[derive(Debug)]
pub struct Server {
    process: Process,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// Starts a program that prints the port it listens on, and calls
    /// [`end_with_parent`].
    pub fn start(program: &Path, args: &[&str]) -> Result<Self> {
        let mut process = Process::start(program, args)?;
        let port = process.line()?.trim().parse()?;
        Ok(Self { process, address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) })
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

/// Ends this process when the one that started it is gone.
pub fn end_with_parent() {
    thread::spawn(|| {
        // The other end of the pipe goes with the parent.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
}

/// Thousands of peers take as many sockets on either side.
pub fn raise_file_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If it stays too low, connecting says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// What the figures were measured on, in a few words.
pub fn machine() -> String {
    let cores = thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.split(['-', '\n']).next().unwrap_or_default().to_owned();
    let rustc = Command::new("rustc").arg("--version").output().ok();
    let rustc =
        rustc.map_or("unknown".into(), |out| String::from_utf8_lossy(&out.stdout).into_owned());
    let rustc = rustc.split_whitespace().nth(1).unwrap_or("unknown").to_owned();
    format!("{cores} cores, Linux {kernel}, Rust {rustc}")
}
