//! The hub as a process of its own, so that killing it is a real `kill -9`.

use std::error::Error;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use trunkline_server::Hub;

/// The hidden argument that makes the demo be the hub.
pub(crate) const ARGUMENT: &str = "--hub-process";

/// A running hub. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct HubProcess {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl HubProcess {
    /// Starts one and waits until it listens.
    pub(crate) async fn start() -> Result<Self, Box<dyn Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let said = child.stdout.take().ok_or("the hub has no standard output")?;
        let address = BufReader::new(said).lines().next_line().await?;
        let address = address.ok_or("the hub ended before it listened")?.parse()?;
        Ok(Self { child, address })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// `kill -9`: it cannot notice, let alone say goodbye.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        self.child.kill().await
    }
}

/// What that process does: a hub on any free port, until whoever started it
/// is gone.
pub(crate) async fn be_the_hub() -> Result<(), Box<dyn Error>> {
    let hub = Hub::builder().start().await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let mut stdout = io::stdout();
    writeln!(stdout, "{}", listener.local_addr()?)?;
    stdout.flush()?;
    let parent_gone = async {
        let _ = tokio::io::stdin().read(&mut [0]).await; // nobody ever writes
    };
    tokio::select! {
        ended = hub.serve(listener) => ended?,
        () = parent_gone => {}
    }
    Ok(())
}
