//! Our two WebSocket transports, saying back whatever they hear: what the
//! Autobahn suite tests. `run`, beside this file, starts it.
//!
//! ```text
//!   echo server            prints its address, and echoes for ever
//!   echo client ws://…     is led through every case by a fuzzingserver
//! ```
//!
//! Handshake, limits and frames are those of the product. What is done with
//! them here is what the hub's and the client's link tasks do, which cannot
//! run by themselves: how a link ends, above all.

#![allow(clippy::unwrap_used, reason = "what cannot be set up ends the run")]

use std::io;
use std::pin::Pin;
use std::time::Duration;

use futures_util::{FutureExt as _, Sink, SinkExt as _, Stream, StreamExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;
use trunkline_client::{BoxLink, Connector as _, WebSocket};
use trunkline_server::Violation;
use trunkline_server::conformance::accept;
use trunkline_server::protocol::frame::Frame;
use trunkline_server::protocol::limits::Limits;

/// The suite sends messages of 16 MiB, and some of 4 MiB in fragments of 64
/// bytes, whose headers are counted beside them.
const MESSAGE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// More than any one case takes.
const CASE: Duration = Duration::from_secs(120);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["server"] => serve().await,
        ["client", url] => visit(url).await,
        _ => panic!("echo server, or echo client URL"),
    }
}

// ---- the hub's transport ------------------------------------------------

async fn serve() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("ws://{}", listener.local_addr().unwrap());
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            socket.set_nodelay(true).unwrap();
            let limits = Limits { message_bytes_max: MESSAGE_BYTES_MAX, ..Limits::default() };
            match accept(socket, &limits).await {
                Ok(link) => {
                    let _ = timeout(CASE, echo_as_hub(link, limits.close_timeout)).await;
                }
                Err(error) => eprintln!("no handshake: {error}"),
            }
        });
    }
}

/// As `ws-server/src/shell/link.rs` has it: a violation is answered with its
/// close, a close with a close; then the peer ends the connection, or the time
/// is over.
async fn echo_as_hub<L>(mut link: L, close_timeout: Duration) -> io::Result<()>
where
    L: Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin,
{
    loop {
        match link.next().await {
            Some(Ok(Frame::Close(_))) => break,
            Some(Ok(frame)) => link.send(frame).await?,
            Some(Err(error)) => {
                let violation = error.get_ref().and_then(|error| error.downcast_ref::<Violation>());
                let Some(Violation(close)) = violation else { return Err(error) };
                link.send(Frame::Close(close.clone())).await?;
                break;
            }
            None => return Ok(()),
        }
    }
    let part = async {
        if link.close().await.is_ok() {
            while let Some(Ok(_)) = link.next().await {}
        }
    };
    let _ = timeout(close_timeout, part).await;
    Ok(())
}

// ---- the client's transport ---------------------------------------------

/// Walks through every case, and asks for the report at the end.
async fn visit(server: &str) {
    let mut link = dial(&format!("{server}/getCaseCount")).await;
    let Some(Ok(Frame::Text(count))) = link.next().await else { panic!("no count of cases") };
    let count: u32 = std::str::from_utf8(&count).unwrap().parse().unwrap();
    drop(link);
    for case in 1..=count {
        let link = dial(&format!("{server}/runCase?case={case}&agent=client")).await;
        if timeout(CASE, echo_as_client(link)).await.is_err() {
            eprintln!("case {case} of {count} did not end");
        }
    }
    let link = dial(&format!("{server}/updateReports?agent=client")).await;
    timeout(CASE, echo_as_client(link)).await.unwrap();
}

async fn dial(url: &str) -> BoxLink {
    let connector = WebSocket::new(url).unwrap().message_bytes_max(MESSAGE_BYTES_MAX);
    timeout(CASE, connector.dial()).await.unwrap().unwrap()
}

/// As `ws-client/src/shell/driver.rs` has it: whatever ends the link, what
/// lies ready to be written goes out if it can at once, and the socket is
/// dropped.
async fn echo_as_client(mut link: BoxLink) {
    while let Some(Ok(frame)) = link.next().await {
        if matches!(frame, Frame::Close(_)) || link.send(frame).await.is_err() {
            break;
        }
    }
    let _ = Pin::new(&mut link).flush().now_or_never();
}
