//! An agent by itself: runs programs of this machine for whoever may ask.
//!
//! ```sh
//! cargo run --example agent -- --hub ws://127.0.0.1:7070 --name build-1
//! cargo run --example agent -- --hub ws://127.0.0.1:7070 --name build-1 --slots 4
//! cargo run --example agent --features tls -- --hub wss://hub.example --name build-1
//! cargo run --example agent --features logs -- --name build-1 --forward-logs
//! ```
//!
//! Whoever may give commands to the hub may do here what you may do: run it as
//! a user who may do little. The token, if the hub asks for one, is better put
//! into `TRUNKLINE_TOKEN` than into `--token`, which others on this machine
//! can read; the programs it runs do not get that variable.
//!
//! It keeps a journal, so that nothing is run twice when it crashes or is killed:
//! in the user's state folder (`~/.local/state/trunkline/`), one for each hub and
//! name. `--journal FILE` keeps it elsewhere, `--no-journal` keeps none; then all
//! that was running when it was killed is `unknown` afterwards.
//!
//! It reconnects for ever, and its commands run on meanwhile. ^C, or
//! `SIGTERM`, ends it in order: commands are interrupted, and what they wrote
//! still goes out. Exit status 1 says that the hub does not want it.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use trunkline_client::protocol::close::CloseCode;
use trunkline_client::{
    Agent, CommandHandler as _, ConnectionState, Execution, FileJournal, Outcome, Programs,
};
use trunkline_examples::{connection_in_words, printable, short, without_secrets};

/// Where a token may also come from.
const TOKEN: &str = "TRUNKLINE_TOKEN";
/// What of its log goes to standard error, unless `RUST_LOG` says otherwise.
const LOG: &str = "trunkline=warn";

/// Runs commands, and streams what they show.
#[derive(Debug, Parser)]
#[command(name = "agent")]
struct Args {
    /// The hub's URL
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:7070")]
    hub: String,
    /// Whose signature the hub's certificate must have, as a PEM file, if it
    /// is not one that this machine trusts (feature `tls`)
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// What it is called: letters, digits, `.`, `_` and `-`
    #[arg(long, value_name = "NAME")]
    name: String,
    /// How many commands it runs at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    slots: u32,
    /// Who it is, for a hub that asks; also read from `TRUNKLINE_TOKEN`
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// Where commands run that name no directory
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where it writes down what it begins; a file in the user's state folder
    /// unless given
    #[arg(long, value_name = "FILE", conflicts_with = "no_journal")]
    journal: Option<PathBuf>,
    /// Writes nothing down
    #[arg(long)]
    no_journal: bool,
    /// Forwards what it logs to the hub: which command begins, and how it ends
    #[cfg(feature = "logs")]
    #[arg(long)]
    forward_logs: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    #[cfg(feature = "logs")]
    let logs = if args.forward_logs {
        Some(trunkline_examples::log_to_stderr_and_hub(LOG))
    } else {
        trunkline_examples::log_to_stderr(LOG);
        None
    };
    #[cfg(not(feature = "logs"))]
    trunkline_examples::log_to_stderr(LOG);
    // Asked for first: an agent that ignores ^C, as one started with `&` from
    // a script does, would pass that on to its programs.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let mut programs = Programs::new().withhold_env([TOKEN]);
    if let Some(dir) = args.dir {
        programs = programs.working_dir(dir);
    }
    let hub = trunkline_examples::connector(&args.hub, args.ca.as_deref())?;
    let mut agent = Agent::over(hub, &args.name)?.slots(args.slots);
    if let Some(token) = args.token.or_else(|| std::env::var(TOKEN).ok()) {
        agent = agent.token(token);
    }
    #[cfg(feature = "logs")]
    if let Some(logs) = logs {
        agent = agent.logs(logs);
    }
    if !args.no_journal {
        let file = args.journal.map_or_else(|| default_journal(&args.hub, &args.name), Ok)?;
        let journal = FileJournal::open(&file)
            .map_err(|error| format!("{error} (see --journal and --no-journal)"))?;
        println!("agent: writes down what it begins in {}", file.display());
        agent = agent.journal(journal).await?;
    }
    let agent = agent.connect(move |execution| run(programs.clone(), execution));

    println!("agent: {} dials {}", args.name, without_secrets(&args.hub));
    let told = tokio::spawn(tell(agent.connection()));
    let mut is_wanted = true;
    tokio::select! {
        why = agent.closed() => is_wanted = why.code == CloseCode::Normal,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    if is_wanted {
        println!("agent: ending");
        agent.stop().await;
    }
    told.await?;
    Ok(if is_wanted { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The journal of this agent at this hub, in a folder that is there.
fn default_journal(hub: &str, name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|it| it.is_absolute());
    let state = folder("XDG_STATE_HOME").or_else(|| Some(folder("HOME")?.join(".local/state")));
    let state = state.ok_or("there is no home folder to keep a journal in: see --journal")?;
    let folder = state.join("trunkline");
    std::fs::create_dir_all(&folder)
        .map_err(|error| format!("{}: {error} (see --journal)", folder.display()))?;
    // Nothing that is secret in a URL gets into a file name.
    let hub = without_secrets(hub);
    let hub = hub.split_once("://").map_or(&*hub, |(_, address)| address);
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let file: String = format!("{name}@").chars().chain(hub.chars().map(plain)).collect();
    Ok(folder.join(Path::new(&file).with_added_extension("journal")))
}

/// Runs a program, and says so.
async fn run(programs: Programs, execution: Execution) -> Outcome {
    let command = execution.command();
    let id = short(command);
    println!("agent: {id} runs: {}", execution.spec().run.title());
    tracing::info!(%command, "a command begins");
    let outcome = programs.run(execution).await;
    let how = match &outcome {
        Outcome::Exited(code) => format!("exited with {code}"),
        Outcome::Signalled(signal) => format!("was ended by signal {signal}"),
        Outcome::Interrupted => "was interrupted".to_owned(),
        Outcome::Failed(why) => format!("could not be run: {}", printable(why)),
    };
    println!("agent: {id} {how}");
    tracing::info!(%command, "a command {how}");
    outcome
}

/// Says how the connection is, until it is over.
async fn tell(mut connection: watch::Receiver<ConnectionState>) {
    while connection.changed().await.is_ok() {
        let state = connection.borrow_and_update().clone();
        println!("agent: {}", connection_in_words(&state));
        if state.is_over() {
            return;
        }
    }
}
