//! The servers, each in a process of its own: the hub, and two loops that do
//! nothing but pass the agent's frames on.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use trunkline_benches::load::Kind;
use trunkline_benches::process::{self, Server};
use trunkline_benches::wire::{self, Chunks, Result};
use trunkline_server::Hub;
use trunkline_server::protocol::limits::Limits;

/// Frames that the gathering loop takes at a time, at most.
pub(crate) const GATHERED_FRAMES: usize = 64;

const KINDS: [Kind; 3] = [Kind::Hub, Kind::Each, Kind::Gathered];

fn role(kind: Kind) -> &'static str {
    match kind {
        Kind::Hub => "hub",
        Kind::Each => "each",
        Kind::Gathered => "gathered",
    }
}

/// Starts `program` (a build of this benchmark) as a server.
pub(crate) fn start(
    program: &Path,
    kind: Kind,
    dashboards: usize,
    chunks: Chunks,
    workers: usize,
) -> Result<Server> {
    let numbers = [dashboards, chunks.bytes, workers].map(|number| number.to_string());
    let mut args = vec!["--serve", role(kind)];
    args.extend(numbers.iter().map(String::as_str));
    Server::start(program, &args)
}

/// The child's side of [`start`]: serves until killed.
pub(crate) fn serve(mut args: impl Iterator<Item = String>) -> Result<()> {
    let role = args.next().ok_or("which server?")?;
    let kind = KINDS.into_iter().find(|kind| self::role(*kind) == role).ok_or("no such server")?;
    let mut number = || -> Result<usize> { Ok(args.next().ok_or("a number is missing")?.parse()?) };
    let (dashboards, bytes, workers) = (number()?, number()?, number()?);
    process::end_with_parent();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?.port());
    match kind {
        Kind::Hub => serve_hub(listener, workers),
        Kind::Each => relay(&listener, dashboards, Chunks { bytes }, 1),
        Kind::Gathered => relay(&listener, dashboards, Chunks { bytes }, GATHERED_FRAMES),
    }
}

/// The hub as an application would run it, but for the agent's rate, and for
/// heartbeats, which a busy link has none of.
fn serve_hub(listener: TcpListener, workers: usize) -> Result<()> {
    let never = Duration::from_secs(24 * 3600);
    let limits = Limits {
        terminal_bytes_per_second: 1 << 40,
        agent_idle: never,
        agent_timeout: never,
        dashboard_idle: never,
        dashboard_timeout: never,
        ..Limits::default()
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(workers).enable_all().build()?.block_on(async {
        let hub = Hub::builder().limits(limits).start().await?;
        listener.set_nonblocking(true)?;
        // A task of its own: what runs in `block_on` is no worker's.
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(async move { hub.serve(listener).await }).await??;
        Ok(())
    })
}

/// Passes on what the agent writes, up to `frames` with one `write` per
/// dashboard. Blocking, on one thread: nothing is cheaper that uses `write`.
fn relay(listener: &TcpListener, dashboards: usize, chunks: Chunks, frames: usize) -> Result<()> {
    let mut agent = welcome(listener)?;
    let mut readers = Vec::new();
    for _ in 0..dashboards {
        readers.push(welcome(listener)?);
    }
    let frame_bytes = chunks.agent_frame_bytes();
    let mut arrived = vec![0; GATHERED_FRAMES * frame_bytes];
    let mut filled = 0;
    let mut ready = Vec::new();
    loop {
        let read = agent.read(&mut arrived[filled..])?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let whole = filled - filled % frame_bytes;
        for group in arrived[..whole].chunks(frames * frame_bytes) {
            ready.clear();
            for frame in group.chunks(frame_bytes) {
                chunks.append_server_frame(frame, &mut ready);
            }
            for reader in &mut readers {
                reader.write_all(&ready)?;
            }
        }
        arrived.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Accepts a peer and its greeting.
fn welcome(listener: &TcpListener) -> Result<TcpStream> {
    let (mut socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    wire::grant_handshake(&mut socket)?;
    wire::skip_client_text(&mut socket)?;
    socket.write_all(&wire::server_text(r#"{"type":"connection:ack"}"#)?)?;
    Ok(socket)
}
