//! The hub's WebSocket without a hub behind it, for suites that test the
//! transport alone. No part of the API: it may change at any time.

use std::io;

use futures_util::{Sink, Stream};
use tokio::net::TcpStream;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::limits::Limits;

use crate::transport;

/// Performs the hub's half of the handshake and returns the link, exactly as
/// [`Hub::serve`](crate::Hub::serve) would run it.
///
/// Cancel safe: dropping the future drops the socket.
pub async fn accept(
    mut socket: TcpStream,
    limits: &Limits,
) -> io::Result<impl Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin> {
    let handshake = async {
        let request = transport::read(&mut socket, &transport::Door::default()).await?;
        match request.map_err(|refused| io::Error::other(refused.why))? {
            transport::Heard::Handshake(request) => request.accept(&mut socket).await,
            #[cfg(feature = "polling")]
            transport::Heard::Plain(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    tokio::time::timeout(limits.greeting_timeout, handshake).await??;
    // Nobody greets here.
    let greeted = transport::Greeted::new(true.into());
    Ok(transport::link(socket, limits, greeted).await)
}
