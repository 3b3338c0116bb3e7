//! The course of a command: from its start to its last byte.
//!
//! Three things go on at once and none waits for another: output is read and
//! handed on, input is written, and events are heeded. Whoever takes no more
//! (the hub the output, the program the input) holds up only that one
//! direction, so an interrupt arrives in any state.

use std::future::pending;
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use pty_process::OwnedWritePty;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use trunkline_protocol::message::TerminalSize;

use super::group::Group;
use super::sources::Sources;
use super::start::{Input, Started};
use crate::handler::{Execution, ExecutionEvent, Outcome, Output};

/// Pieces of input taken from the execution and not yet written.
const INPUT_AHEAD: usize = 4;
/// Longest that what a program left running may go on writing.
const LINGER_MAX: Duration = Duration::from_secs(10);
/// How long no more bytes must come before what was killed counts as dead.
const SETTLE: Duration = Duration::from_millis(100);
/// What a pipe can hold at most, unless the administrator says otherwise.
const PIPE_BYTES_MAX: usize = 1024 * 1024;
/// How often a terminal that everybody closed is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Follows a started program until it has ended and its output is read.
/// Dropping the future kills it.
pub(super) async fn follow(
    started: Started,
    linger: Duration,
    mut execution: Execution,
) -> Outcome {
    // The group is dropped, and with that killed, before its leader is reaped.
    let Started { mut leader, group, mut sources, input } = started;
    let output = execution.output();
    let (stage, stages) = watch::channel(Stage::Runs);
    let (pieces, untaken) = mpsc::channel(INPUT_AHEAD);

    let mut reading = pin!(Some(read(&mut sources, &output, &group, linger, stages)));
    // Gone once the program is: what it left running reads the end.
    let mut writing = pin!(Some(write(input, untaken)));
    let mut behind: Option<Bytes> = None;
    let mut runs = true;
    let mut kill_at = None;

    while runs || reading.is_some() {
        tokio::select! {
            () = leader.ended(), if runs => {
                runs = false;
                writing.set(None);
                stage.send_if_modified(|stage| stage.advance(Stage::Ended));
            }
            () = due(kill_at) => {
                kill_at = None;
                group.kill();
                stage.send_if_modified(|stage| stage.advance(Stage::Killed));
            }
            event = next_event(&mut execution, behind.is_some()) => match event {
                ExecutionEvent::Interrupt { grace } => {
                    group.interrupt();
                    execution.signalled();
                    let asked = now().checked_add(grace);
                    kill_at = match *stage.borrow() {
                        Stage::Killed => Some(now()),
                        Stage::Runs | Stage::Ended => [kill_at, asked].into_iter().flatten().min(),
                    };
                }
                ExecutionEvent::Input(piece) => behind = Some(piece),
                ExecutionEvent::Resize(size) => resize(&group, size),
            },
            Ok(place) = pieces.reserve(), if behind.is_some() => {
                if let Some(piece) = behind.take() {
                    place.send(piece);
                }
            }
            () = if_any(reading.as_mut()) => reading.set(None),
            () = if_any(writing.as_mut()) => writing.set(None),
        }
    }
    group.kill_left();
    let status = leader.reap().await;
    group.release();
    outcome(status)
}

/// How far the program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Runs,
    /// The program has ended; what it started may live on.
    Ended,
    /// All that it started was killed.
    Killed,
}

impl Stage {
    fn advance(&mut self, to: Self) -> bool {
        let further = *self < to;
        *self = to.max(*self);
        further
    }
}

/// The next event. While the program is behind with its input, no more of it
/// is taken, so that who types it waits; an interrupt comes all the same.
async fn next_event(execution: &mut Execution, behind: bool) -> ExecutionEvent {
    if behind { execution.next_event_but_input().await } else { execution.next_event().await }
}

async fn due(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

async fn if_any(future: Pin<&mut Option<impl Future<Output = ()>>>) {
    match future.as_pin_mut() {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// Hands on every byte until the last one, or until what the program left
/// running has had its time.
async fn read(
    sources: &mut Sources,
    output: &Output,
    group: &Group,
    linger: Duration,
    mut stages: watch::Receiver<Stage>,
) {
    // It runs.
    loop {
        let bytes = tokio::select! {
            biased;
            () = reached(&mut stages, Stage::Ended) => break,
            bytes = sources.next() => bytes,
        };
        if let Some((channel, bytes)) = bytes {
            output.write(channel, bytes).await;
        } else if sources.may_open_again() {
            tokio::select! {
                () = reached(&mut stages, Stage::Ended) => break,
                () = sleep_until(now() + LOOK_AGAIN) => {}
            }
        } else {
            return;
        }
    }
    // It ended. Usually everybody who could write has, and the end is near.
    let mut until = now() + LINGER_MAX;
    loop {
        if now() >= until {
            break;
        }
        let quiet = now().checked_add(linger).map_or(until, |quiet| quiet.min(until));
        tokio::select! {
            biased;
            () = reached(&mut stages, Stage::Killed) => break,
            bytes = timeout_at(quiet, sources.next()) => match bytes {
                Ok(Some((channel, bytes))) => {
                    let asked = now();
                    output.write(channel, bytes).await;
                    // Being held back is not its fault.
                    until += asked.elapsed();
                }
                Ok(None) => return,
                Err(_) => break,
            }
        }
    }
    // Somebody still has the output open. What was written before this moment
    // is read; what somebody in another group or session writes later is not.
    group.kill_left();
    let mut left = PIPE_BYTES_MAX;
    while left > 0
        && let Ok(Some((channel, bytes))) = timeout(SETTLE, sources.next()).await
    {
        left = left.saturating_sub(bytes.len());
        output.write(channel, bytes).await;
    }
}

/// Dropping the future loses nothing.
async fn reached(stages: &mut watch::Receiver<Stage>, stage: Stage) {
    // The sender lives as long as the command.
    let _ = stages.wait_for(|at| *at >= stage).await;
}

/// Hands the program what is typed, as fast as it reads.
async fn write(input: Input, mut pieces: mpsc::Receiver<Bytes>) {
    match input {
        Input::Pty(pty) => type_into(pty, &mut pieces).await,
        Input::Pipe(stdin) => pour_into(stdin, &mut pieces).await,
        Input::Closed => {}
    }
    // Nobody reads it any more, and nobody must wait for that.
    while pieces.recv().await.is_some() {}
}

async fn type_into(mut pty: OwnedWritePty, pieces: &mut mpsc::Receiver<Bytes>) {
    while let Some(piece) = pieces.recv().await {
        // Fails while everybody has closed the terminal: keys that nobody
        // reads, but it may be opened again.
        let _ = pty.write_all(&piece).await;
    }
}

async fn pour_into(mut stdin: ChildStdin, pieces: &mut mpsc::Receiver<Bytes>) {
    while let Some(piece) = pieces.recv().await {
        if stdin.write_all(&piece).await.is_err() {
            return;
        }
    }
}

fn resize(group: &Group, size: TerminalSize) {
    let Some(terminal) = group.terminal() else { return };
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = tcsetwinsize(terminal, size) {
        tracing::debug!(%error, "terminal not resized");
    }
}

fn outcome(status: std::io::Result<std::process::ExitStatus>) -> Outcome {
    use std::os::unix::process::ExitStatusExt;
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Outcome::Exited(code),
            (None, Some(signal)) => Outcome::Signalled(signal),
            (None, None) => Outcome::Failed(format!("it ran and ended strangely: {status}")),
        },
        Err(error) => Outcome::Failed(format!("it ran, but how it ended cannot be known: {error}")),
    }
}

#[expect(clippy::disallowed_methods, reason = "programs run by the real clock: this is a shell")]
fn now() -> Instant {
    Instant::now()
}
