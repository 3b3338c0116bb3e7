//! What it costs to show one agent's terminal to many dashboards, beside a
//! loop that does nothing but write the same frames to the same sockets.
//!
//! `docs/benchmarks.md` says what is measured and how to read the table.

#[cfg(target_os = "linux")]
mod rounds;
#[cfg(target_os = "linux")]
mod servers;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    rounds::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("fanout reads what the Linux kernel accounts in /proc, and runs only there");
}
