//! Which processes a command is, and how they are told to end.
//!
//! A command is the process group of its program. Signals go to the whole
//! group, so that a build ends with its compilers. Two kinds of process are
//! in no group of ours and still belong to the command: the foreground job of
//! an interactive shell, which has a group of its own in the same terminal,
//! and whatever else put itself into another group (`timeout` does). The
//! first hears an interrupt too; both are found and killed when the command
//! must not live on.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, getsid, kill_process_group};
use rustix::termios::tcgetpgrp;

/// How often to look for processes that were being started during the look
/// before.
const LOOKS_MAX: usize = 8;

/// The processes of one running command. Dropped before [`Group::release`],
/// it kills them.
#[derive(Debug)]
pub(super) struct Group {
    /// The program: leader of its group, and in a terminal of its session.
    leader: Pid,
    /// The controlling side of its terminal.
    terminal: Option<OwnedFd>,
    released: AtomicBool,
}

impl Group {
    pub(super) fn new(leader: Pid, terminal: Option<OwnedFd>) -> Self {
        Self { leader, terminal, released: AtomicBool::new(false) }
    }

    /// The controlling side of the terminal, if it runs in one.
    pub(super) fn terminal(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref()
    }

    /// Asks everything to end: what ^C does, and on to the program itself if
    /// another job is in the foreground.
    pub(super) fn interrupt(&self) {
        signal(self.leader, Signal::INT);
        // A stopped process hears nothing but this.
        signal(self.leader, Signal::CONT);
        if let Some(job) = self.foreground() {
            signal(job, Signal::INT);
            signal(job, Signal::CONT);
        }
    }

    /// Ends everything that the command started and that can be found.
    pub(super) fn kill(&self) {
        let mut groups = vec![self.leader];
        groups.extend(self.foreground());
        // Whoever is stopped starts nothing new. When a look around finds
        // nobody who still runs, nobody can have slipped away.
        for _ in 0..LOOKS_MAX {
            for group in &groups {
                signal(*group, Signal::STOP);
            }
            let found = kin::groups_of(self.leader);
            let known = groups.len();
            groups.extend(
                found
                    .into_iter()
                    .filter(|group| !groups[..known].contains(group))
                    .collect::<Vec<_>>(),
            );
            if groups.len() == known {
                break;
            }
        }
        for group in groups {
            signal(group, Signal::KILL);
        }
    }

    /// Ends what is left of the program's own group.
    pub(super) fn kill_left(&self) {
        signal(self.leader, Signal::KILL);
    }

    /// The command has ended: nothing is to be signalled any more.
    pub(super) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// The group in the foreground of the terminal, if it is another one than
    /// the program's.
    fn foreground(&self) -> Option<Pid> {
        let job = tcgetpgrp(self.terminal.as_ref()?).ok()?;
        let ours = match getsid(Some(job)) {
            Ok(session) => session == self.leader,
            // Its first process is gone, the group may live: its number is
            // not given out again before it is empty.
            Err(Errno::SRCH) => true,
            Err(_) => false,
        };
        (job != self.leader && ours).then_some(job)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.released.load(Ordering::Relaxed) {
            self.kill();
        }
    }
}

/// Signals a process group. That it is gone already is no news, and there is
/// nobody to hear of anything else.
fn signal(group: Pid, signal: Signal) {
    if let Err(error) = kill_process_group(group, signal)
        && error != Errno::SRCH
    {
        tracing::debug!(group = group.as_raw_pid(), ?signal, %error, "signal not delivered");
    }
}

#[cfg(target_os = "linux")]
mod kin {
    use std::collections::HashSet;

    use rustix::process::getpgrp;

    use super::Pid;

    struct Process {
        pid: i32,
        parent: i32,
        group: i32,
        session: i32,
    }

    /// The groups of all processes that descend from `leader` or are in its
    /// session, apart from its own.
    pub(super) fn groups_of(leader: Pid) -> HashSet<Pid> {
        let processes = running();
        let first = leader.as_raw_pid();
        let mut kin = HashSet::from([first]);
        loop {
            let known = kin.len();
            kin.extend(
                processes
                    .iter()
                    .filter(|process| process.session == first || kin.contains(&process.parent))
                    .map(|process| process.pid)
                    .collect::<Vec<_>>(),
            );
            if kin.len() == known {
                break;
            }
        }
        let own = getpgrp();
        processes
            .iter()
            .filter(|process| kin.contains(&process.pid))
            .filter_map(|process| Pid::from_raw(process.group))
            .filter(|group| *group != leader && *group != own)
            .collect()
    }

    /// Every process this one may see; none where `/proc` is not there.
    fn running() -> Vec<Process> {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read(entry.path().join("stat")).ok()?;
                // "pid (any bytes) state parent group session …"
                let name_end = stat.iter().rposition(|byte| *byte == b')')?;
                let rest = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
                let mut numbers = rest.split_whitespace().skip(1).map(str::parse);
                let mut number = || numbers.next()?.ok();
                Some(Process { pid, parent: number()?, group: number()?, session: number()? })
            })
            .collect()
    }
}

#[cfg(not(target_os = "linux"))]
mod kin {
    use super::Pid;

    /// Other systems have no way to ask without `unsafe`.
    pub(super) fn groups_of(_leader: Pid) -> [Pid; 0] {
        []
    }
}
