//! A hub by itself, for any number of agents and dashboards.
//!
//! ```sh
//! cargo run --example hub -- --listen 127.0.0.1:7070
//! cargo run --example hub -- --listen 0.0.0.0:7070 --tokens tokens.txt
//! cargo run --example hub --features sqlite -- --queue queue.db --output output.db
//! cargo run --example hub --features tls -- --listen 0.0.0.0:7070 --tokens tokens.txt \
//!     --tls-cert cert.pem --tls-key key.pem
//! ```
//!
//! With feature `metrics`, `--metrics 127.0.0.1:9090` shows its figures at
//! `http://127.0.0.1:9090/metrics`, for Prometheus.
//!
//! Without `--tokens` anyone who can reach it may be anything: keep that to
//! your own machine. A file of tokens has one per line, with its tenant and
//! whose it is; a dashboard's name is only for the log:
//!
//! ```text
//! # who       token              tenant  name
//! agent       s3cret-of-build-1  acme    build-1
//! dashboard   s3cret-of-ann      acme    ann
//! ```
//!
//! With a certificate and its key it speaks TLS, and `wss://` alone. They are read
//! once: to renew them, start it again. What else there is to do where others
//! rely on it is in `docs/deployment.md`.
//!
//! ^C, or `SIGTERM`, ends it in order: every peer is told to be back soon.
//! `kill -9` does not, and nothing that agents still hold is lost by it: start
//! it again and see. What it has to say goes to standard error; `RUST_LOG`
//! asks for more or less (`RUST_LOG=trunkline=debug`). Among it are the log
//! records that agents forward (`agent --forward-logs`), under the target
//! `trunkline::forwarded`.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use trunkline_server::{Hub, IpNet, TokenTable, TracingLogSink};

/// In how long a time peers are told to be back, each at a moment of its own.
const SPREAD: Duration = Duration::from_secs(2);

/// The place between agents, which run commands, and dashboards.
#[derive(Debug, Parser)]
#[command(name = "hub")]
struct Args {
    /// Where to listen
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    listen: String,
    /// Who is let in: lines of `agent|dashboard TOKEN TENANT NAME`; anyone without
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Speak TLS, by the certificates in this PEM file, the hub's own first
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, a PEM file
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Believe the reverse proxies in this network, such as `127.0.0.1/32`, about
    /// the addresses that links come from
    #[arg(long, value_name = "NETWORK")]
    trust_proxy: Vec<IpNet>,
    /// Show figures for Prometheus at this address, under `/metrics`: not where
    /// strangers are
    #[cfg(feature = "metrics")]
    #[arg(long, value_name = "ADDR")]
    metrics: Option<std::net::SocketAddr>,
    /// Keep accepted commands in this SQLite file; in memory without
    #[cfg(feature = "sqlite")]
    #[arg(long, value_name = "FILE")]
    queue: Option<PathBuf>,
    /// Keep recent output in this SQLite file, too
    #[cfg(feature = "sqlite")]
    #[arg(long, value_name = "FILE", requires = "queue")]
    output: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    trunkline_examples::log_to_stderr("trunkline=info");
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    #[cfg(feature = "metrics")]
    if let Some(address) = args.metrics {
        trunkline_examples::metrics::serve(address)
            .map_err(|error| format!("no metrics at {address}: {error}"))?;
        println!("hub: metrics at http://{address}/metrics");
    }
    // Before anything is opened: they may be wrong.
    #[cfg(feature = "tls")]
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => Some(trunkline_examples::tls::acceptor(cert, key)?),
        (None, _) | (_, None) => None,
    };
    // What agents forward is in this log, too, each record as one line.
    let mut hub = Hub::builder().logs(Arc::new(TracingLogSink));
    for network in &args.trust_proxy {
        hub = hub.trust_proxies(*network);
    }
    if let Some(file) = &args.tokens {
        hub = hub.authenticator(read_tokens(file)?);
    }
    #[cfg(feature = "sqlite")]
    if let Some(file) = &args.queue {
        let queue = trunkline_server::hooks::SqliteQueue::open(file)?;
        hub = hub.queue(Arc::new(queue));
    }
    #[cfg(feature = "sqlite")]
    if let Some(file) = &args.output {
        let output = trunkline_server::hooks::SqliteStreamLog::open(file)?;
        hub = hub.stream_log(Arc::new(output));
    }
    let hub = hub.start().await?;
    let listener = TcpListener::bind(&args.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", args.listen))?;
    let address = listener.local_addr()?;
    let told = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    #[cfg(feature = "tls")]
    if let Some(tls) = tls {
        println!("hub: listening on wss://{address}");
        let serving = hub.serve_over(listener, move |socket, _| tls.accept(socket));
        return run(&hub, serving, told).await;
    }
    println!("hub: listening on ws://{address}");
    run(&hub, hub.serve(listener), told).await
}

/// Serves until it is told to end, which it then does in order.
async fn run(
    hub: &Hub,
    serving: impl Future<Output = io::Result<()>>,
    told: impl Future<Output = ()>,
) -> Result<(), Box<dyn Error>> {
    tokio::select! {
        served = serving => served?,
        () = told => {}
    }
    println!("hub: ending; {} links are told to be back", hub.links());
    hub.drain(SPREAD).await;
    Ok(())
}

fn read_tokens(file: &Path) -> Result<TokenTable, Box<dyn Error>> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| format!("{shown}: {error}"))?;
    let mut table = TokenTable::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let row = match words.as_slice() {
            ["agent", token, tenant, name] => table.agent(*token, tenant, name),
            ["dashboard", token, tenant, name] => table.dashboard(*token, tenant, *name),
            // The line is not repeated: it may hold a token.
            _ => {
                return Err(
                    format!("{shown}:{number}: not `agent|dashboard TOKEN TENANT NAME`").into()
                );
            }
        };
        table = row.map_err(|error| format!("{shown}:{number}: {error}"))?;
    }
    Ok(table)
}
