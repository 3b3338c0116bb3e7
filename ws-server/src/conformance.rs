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
    socket: TcpStream,
    limits: &Limits,
) -> io::Result<impl Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin> {
    let (link, _) = transport::accept(socket, limits, limits.greeting_timeout).await?;
    Ok(link)
}
