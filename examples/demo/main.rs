//! Everything at once: a hub, two agents that run real programs, and two
//! dashboards, over real sockets; every cable is pulled in the middle of a
//! large output, and the hub is killed with `kill -9` and started again. At
//! the end both dashboards must have every byte, each once.
//!
//! ```sh
//! cargo run --example demo
//! cargo run --example demo -- --plain    # no colours, no live lines
//! ```
//!
//! It takes 10 to 15 seconds, listens on the loopback address only, and ends
//! with a table and exit status 0 if all of it held, 1 otherwise. It needs a
//! Unix with `sh`, `ls` and `seq`.
//!
//! The hub is a process of its own; the agents and dashboards live in this
//! one, each with its own link, through a proxy whose cables can be pulled.
//! What happens is in `story.rs`, in order.

mod agents;
mod cables;
mod hub_process;
mod show;
mod story;
mod truth;
mod verdict;
mod watcher;

use std::error::Error;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::show::{Colour, Show};

/// What must not take longer.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A hub, two agents and two dashboards; cables are pulled, the hub is killed,
/// and every byte must arrive once.
#[derive(Debug, Parser)]
struct Args {
    /// Neither colours nor live lines, as when standard output is no terminal
    #[arg(long)]
    plain: bool,
    /// Be the hub: the demo starts itself with this
    #[arg(long, hide = true)]
    hub_process: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    if std::env::var_os("RUST_LOG").is_some() {
        trunkline_examples::log_to_stderr("warn");
    }
    if args.hub_process {
        hub_process::be_the_hub().await?;
        return Ok(ExitCode::SUCCESS);
    }
    // Asked for first: whoever started this may ignore ^C, and the programs
    // that the agents run would inherit that.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let show = Show::new(args.plain || !std::io::stdout().is_terminal());
    // Whatever the story started is dropped, and with that ended, with it.
    let told = tokio::select! {
        told = timeout(TIME_LIMIT, story::tell(&show)) => told.unwrap_or_else(|_| {
            Err(format!("not over after {} s; {}", TIME_LIMIT.as_secs(), show.waiting_for()).into())
        }),
        _ = interrupt.recv() => Err("interrupted".into()),
        _ = terminate.recv() => Err("told to end".into()),
    };
    show.live(Vec::new());
    let held = match told {
        Ok(held) => held,
        Err(error) => {
            show.line(&show.paint(Colour::Red, &format!("the demo failed: {error}")));
            false
        }
    };
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
