//! A dashboard with a line interface: sees every agent, runs commands on them,
//! shows what they write.
//!
//! ```sh
//! cargo run --example dashboard -- --hub ws://127.0.0.1:7070
//! cargo run --example dashboard --features tls -- --hub wss://hub.internal:7070 --ca ca.pem
//! printf 'agents\nrun build-1 -- echo hi\nquit\n' | cargo run --example dashboard
//! ```
//!
//! `help` lists what it understands. A command is named by the beginning or
//! the end of its id, as long as that is unique, or by `last`.
//!
//! In a terminal `run` returns at once and the output comes as it is written;
//! in a pipe each order is finished before the next one is read, so `run`
//! waits until the command has ended and all its output is here (`--bg` and
//! `--wait` say otherwise). The end of standard input is `quit`. Output, lists
//! and search results go to standard output, everything said about them to
//! standard error. Exit status 1: an order failed, or the hub does not want
//! this dashboard.
//!
//! What commands write is text and colours here; other escape sequences are
//! left out. With `--raw` all passes that only draws, such as the cursor's moves;
//! what does more to your terminal (the clipboard, its title, its questions) does
//! not, unless no terminal reads it: then every byte passes. `export` has every
//! byte in any case.
//!
//! Kill the hub with `kill -9` while something runs and start it again: the
//! rest of the output arrives, each byte once.

mod desk;
mod orders;
mod reading;

use std::error::Error;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use trunkline_client::protocol::close::CloseCode;
use trunkline_client::protocol::stream::TerminalFilter;
use trunkline_client::{ConnectionState, Dashboard};
use trunkline_examples::connection_in_words;

use crate::desk::{Desk, Manner};
use crate::orders::Order;
use crate::reading::Shown;

/// Where a token may also come from.
const TOKEN: &str = "TRUNKLINE_TOKEN";

/// Sees every agent, runs commands on them, shows what they write.
#[derive(Debug, Parser)]
#[command(
    name = "dashboard",
    after_help = "Orders are read from standard input, one a line: try `help`."
)]
struct Args {
    /// The hub's URL
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:7070")]
    hub: String,
    /// Whose signature the hub's certificate must have, as a PEM file, if it
    /// is not one that this machine trusts (feature `tls`)
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Who you are, for a hub that asks; also read from `TRUNKLINE_TOKEN`
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// How much output of each command is kept for `search` and `export`
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    keep: usize,
    /// Show all that draws, not only colours; to a file or a pipe, every byte
    #[arg(long)]
    raw: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    trunkline_examples::log_to_stderr("trunkline=error");
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let mut dashboard =
        Dashboard::over(trunkline_examples::connector(&args.hub, args.ca.as_deref())?);
    if let Some(token) = args.token.or_else(|| std::env::var(TOKEN).ok()) {
        dashboard = dashboard.token(token);
    }
    let dashboard = dashboard.connect();
    let told = tokio::spawn(tell(dashboard.connection()));
    let is_interactive = io::stdin().is_terminal();
    let shown = match (args.raw, io::stdout().is_terminal()) {
        (false, _) => Shown::Styles,
        (true, true) => Shown::Drawing,
        (true, false) => Shown::Bytes,
    };
    let manner = Manner { waits: !is_interactive, shown, kept_bytes: args.keep << 20 };
    let mut desk = Desk::new(dashboard.clone(), manner);

    let mut lines = lines();
    let _restore = (shown == Shown::Drawing).then_some(Restore);
    let mut all_well = true;
    tokio::select! {
        connected = dashboard.connected() => connected?,
        _ = interrupt.recv() => return Ok(ExitCode::FAILURE),
        _ = terminate.recv() => return Ok(ExitCode::FAILURE),
    }
    loop {
        if is_interactive {
            eprint!("> ");
            io::stderr().flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            () = over(&dashboard) => None,
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
        };
        let order = match line.as_deref().map(Order::parse) {
            None | Some(Ok(Some(Order::Quit))) => break,
            Some(Ok(None)) => continue,
            Some(Ok(Some(order))) => Ok(order),
            Some(Err(why)) => Err(why),
        };
        let done = match order {
            Err(why) => Err(why.into()),
            Ok(order) => tokio::select! {
                done = desk.carry_out(order) => done,
                _ = interrupt.recv() => Err("no longer waited for".into()),
                _ = terminate.recv() => break,
            },
        };
        if let Err(why) = done {
            eprintln!("{why}");
            all_well = false;
        }
    }
    all_well &= !dashboard.connection().borrow().is_over();
    dashboard.close().await;
    told.await?;
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The lines of standard input. A thread of its own reads them, since nothing
/// can call back a read that nobody answers any more.
fn lines() -> mpsc::Receiver<String> {
    let (lines, read) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    read
}

/// Waits until the hub does not want this dashboard any more.
async fn over(dashboard: &Dashboard) {
    // An error says that it is gone altogether.
    let _ = dashboard.connection().wait_for(ConnectionState::is_over).await;
}

/// Says how the connection is, until it is over.
async fn tell(mut connection: watch::Receiver<ConnectionState>) {
    loop {
        let state = connection.borrow_and_update().clone();
        let is_goodbye = matches!(&state, ConnectionState::Disconnected { why } if why.code == CloseCode::Normal);
        if state != ConnectionState::Connecting && !is_goodbye {
            eprintln!("-- {}", connection_in_words(&state));
        }
        if state.is_over() || connection.changed().await.is_err() {
            return;
        }
    }
}

/// Puts the terminal back in order in the end, whatever was drawn.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        // Nobody may be reading any more.
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(TerminalFilter::RESTORE).and_then(|()| stdout.flush());
    }
}
