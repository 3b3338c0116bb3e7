//! WebSocket (RFC 6455) on `tokio-tungstenite`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Uri, header};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode as WsCloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, WebSocketConfig};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};

use crate::connector::{BoxFuture, BoxLink, Connector};

const SUBPROTOCOL: &str = "trunkline.v1";

/// Longest message taken from a hub, unless told otherwise.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Read buffer: one full terminal chunk. The library's default of 128 KiB is
/// zero-filled for every read.
const READ_BUFFER_BYTES: usize = 20 * 1024;

/// What is gathered before the library writes without being asked to flush.
const WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// Why a text is not the URL of a hub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a URL with a host.
    #[error("not a URL of the form ws://host:port/path")]
    Syntax,
    /// Another scheme than `ws`.
    #[error("only ws:// is spoken here; put wss:// behind a proxy on this machine")]
    Scheme,
}

/// Dials a hub's WebSocket at `ws://host[:port][/path]`.
#[derive(Debug, Clone)]
pub struct WebSocket {
    uri: Uri,
    address: String,
    message_bytes_max: usize,
}

impl WebSocket {
    /// A connector for this URL. The port is 80 unless it says otherwise.
    pub fn new(url: &str) -> Result<Self, UrlError> {
        let uri: Uri = url.parse().map_err(|_| UrlError::Syntax)?;
        match uri.scheme_str() {
            Some("ws") => {}
            Some(_) => return Err(UrlError::Scheme),
            None => return Err(UrlError::Syntax),
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(UrlError::Syntax)?;
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Self { uri, address, message_bytes_max: MESSAGE_BYTES_MAX })
    }

    /// The longest message taken from a hub, and the most that one may make
    /// this process hold; 4 MiB otherwise. A longer one ends the link.
    #[must_use]
    pub fn message_bytes_max(mut self, bytes: usize) -> Self {
        self.message_bytes_max = bytes;
        self
    }

    fn request(&self) -> io::Result<Request> {
        let mut request = self.uri.clone().into_client_request().map_err(io::Error::other)?;
        let name = HeaderValue::from_static(SUBPROTOCOL);
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, name);
        Ok(request)
    }
}

impl Connector for WebSocket {
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        Box::pin(async move {
            let socket = TcpStream::connect(&self.address).await?;
            socket.set_nodelay(true)?;
            let mut config = WebSocketConfig::default();
            config.read_buffer_size = READ_BUFFER_BYTES;
            config.write_buffer_size = WRITE_BUFFER_BYTES;
            config.max_write_buffer_size =
                WRITE_BUFFER_BYTES.saturating_add(self.message_bytes_max);
            config.max_message_size = Some(self.message_bytes_max);
            config.max_frame_size = Some(self.message_bytes_max);
            // A hub that does not name the subprotocol is none: the library
            // refuses its answer.
            let (socket, _) =
                tokio_tungstenite::client_async_with_config(self.request()?, socket, Some(config))
                    .await
                    .map_err(sort)?;
            Ok(Box::pin(WebSocketLink { socket }) as BoxLink)
        })
    }
}

struct WebSocketLink {
    socket: WebSocketStream<TcpStream>,
}

fn sort(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::Http(response) => {
            io::Error::other(format!("the hub answered with HTTP status {}", response.status()))
        }
        error => io::Error::other(error.to_string()),
    }
}

impl Stream for WebSocketLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Poll::Ready(message) = Pin::new(&mut self.socket).poll_next(cx) else {
                return Poll::Pending;
            };
            let frame = match message {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(sort(error)))),
                Some(Ok(Message::Text(text))) => Frame::Text(text.into()),
                Some(Ok(Message::Binary(bytes))) => Frame::Binary(bytes),
                Some(Ok(Message::Close(Some(close)))) => {
                    let code = CloseCode::from_number(close.code.into());
                    Frame::Close(Close::new(code, close.reason.as_str()))
                }
                Some(Ok(Message::Close(None))) => {
                    Frame::Close(Close::new(CloseCode::GoingAway, ""))
                }
                // Pings are answered by the library.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            };
            return Poll::Ready(Some(Ok(frame)));
        }
    }
}

impl Sink<Frame> for WebSocketLink {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_ready(cx).map_err(sort)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let message = match frame {
            Frame::Text(text) => Message::Text(utf8(text)?),
            Frame::Binary(bytes) => Message::Binary(bytes),
            Frame::Close(close) => Message::Close(Some(CloseFrame {
                code: WsCloseCode::from(close.code.number()),
                reason: close.reason.into(),
            })),
        };
        Pin::new(&mut self.socket).start_send(message).map_err(sort)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(sort)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(sort)
    }
}

fn utf8(text: Bytes) -> io::Result<Utf8Bytes> {
    Utf8Bytes::try_from(text).map_err(|_| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_before_anything_is_dialled() {
        for (url, expected) in [
            ("ws://127.0.0.1:7070", None),
            ("ws://[::1]:7070/hub", None),
            ("wss://hub.example", Some(UrlError::Scheme)),
            ("http://hub.example", Some(UrlError::Scheme)),
            ("127.0.0.1:7070", Some(UrlError::Syntax)),
            ("", Some(UrlError::Syntax)),
        ] {
            assert_eq!(WebSocket::new(url).err(), expected, "{url}");
        }
    }
}
