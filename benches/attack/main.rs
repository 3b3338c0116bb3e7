//! What honest peers notice of hostile ones: latency, throughput and the hub's
//! memory, with each kind of attack and without it, turn by turn.
//!
//! `docs/security.md` has a table, and says how to read it.

#[cfg(target_os = "linux")]
mod hostile;
#[cfg(target_os = "linux")]
mod hub;
#[cfg(target_os = "linux")]
mod orders;
#[cfg(target_os = "linux")]
mod rounds;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    rounds::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("attack reads what the Linux kernel accounts in /proc, and runs only there");
}
