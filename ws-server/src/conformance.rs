//! The hub's transports without a hub behind them, for suites that test them
//! alone. No part of the API: it may change at any time.

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

/// The hub's end of one link that polls: whoever connects to the listener speaks
/// for the peer, as with [`Hub::serve`](crate::Hub::serve) after its greeting.
#[cfg(feature = "polling")]
pub fn polled(
    listener: tokio::net::TcpListener,
    limits: Limits,
) -> impl Stream<Item = io::Result<Frame>> + Sink<Frame, Error = io::Error> + Unpin {
    use std::convert::Infallible;
    use std::sync::Arc;

    use http_body_util::Full;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;

    let desk = Arc::new(transport::Desk::default());
    let link = transport::PollingLink::new(Arc::clone(&desk));
    let limits = Arc::new(limits);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (desk, limits) = (Arc::clone(&desk), Arc::clone(&limits));
            let answer = service_fn(move |request| {
                let (desk, limits) = (Arc::clone(&desk), Arc::clone(&limits));
                async move {
                    let answer = crate::shell::answer_for(&desk, request, &limits).await;
                    Ok::<_, Infallible>(answer.map(Full::new))
                }
            });
            let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), answer);
            tokio::spawn(async move { drop(connection.await) });
        }
    });
    link
}
