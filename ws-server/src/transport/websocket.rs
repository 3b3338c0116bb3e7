//! WebSocket (RFC 6455) on `tokio-tungstenite`, with what it leaves to its
//! user: a deadline for the handshake, a real key, the subprotocol, and bounds
//! on what a message may take in fragments and in time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Sleep, sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode as WsCloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, WebSocketConfig};
use tokio_tungstenite::tungstenite::Utf8Bytes;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::Secret;

use super::Violation;
use super::guard::{Guarded, Meter};

/// The subprotocol that both ends name.
const SUBPROTOCOL: &str = "trunkline.v1";

/// Read buffer per link. The library's default of 128 KiB would be held, and
/// zero-filled, by every idle link.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// What is gathered before the library writes without being asked to flush.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// What a message may take beyond its content: frame headers and control
/// frames in between. A message in fragments of less than 14 bytes on average
/// is more header than content, and no client sends such.
const FRAMING_BYTES: usize = 64 * 1024;

/// A WebSocket as a stream and sink of frames.
pub(crate) struct WebSocketLink<S> {
    socket: WebSocketStream<Guarded<S>>,
    meter: Arc<Meter>,
    message_timeout: Duration,
    /// When the message under way must be whole.
    message_due: Option<Pin<Box<Sleep>>>,
}

/// Performs the server's half of the handshake, within `within`. Returns the
/// link and the token of its `Authorization: Bearer` header.
pub(crate) async fn accept<S>(
    socket: S,
    limits: &Limits,
    within: Duration,
) -> io::Result<(WebSocketLink<S>, Option<Secret>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let meter = Meter::new(limits.message_bytes_max + FRAMING_BYTES);
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER_BYTES;
    config.write_buffer_size = WRITE_BUFFER_BYTES;
    config.max_write_buffer_size = WRITE_BUFFER_BYTES + limits.message_bytes_max + FRAMING_BYTES;
    config.max_message_size = Some(limits.message_bytes_max);
    config.max_frame_size = Some(limits.message_bytes_max);
    let mut token = None;
    let guarded = Guarded { socket, meter: Arc::clone(&meter) };
    #[expect(clippy::result_large_err, reason = "the library's callback has this type")]
    let callback = |request: &Request, response: Response| answer(request, response, &mut token);
    let handshake =
        tokio_tungstenite::accept_hdr_async_with_config(guarded, callback, Some(config));
    let socket = tokio::time::timeout(within, handshake)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map_err(|error| match error {
            WsError::Io(error) => error,
            error => io::Error::other(error.to_string()),
        })?;
    meter.reset();
    let message_timeout = limits.message_timeout;
    Ok((WebSocketLink { socket, meter, message_timeout, message_due: None }, token))
}

/// Judges the request beyond what the library does.
#[expect(clippy::result_large_err, reason = "the library's callback has this type")]
fn answer(
    request: &Request,
    mut response: Response,
    token: &mut Option<Secret>,
) -> Result<Response, ErrorResponse> {
    let headers = request.headers();
    let refuse = |status: StatusCode, why: &str| {
        let mut response = ErrorResponse::new(Some(format!("{why}\n")));
        *response.status_mut() = status;
        Err(response)
    };
    if !has_real_key(headers) {
        return refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64");
    }
    if headers.contains_key(header::CONTENT_LENGTH) || headers.contains_key(header::TRANSFER_ENCODING)
    {
        return refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake has no body");
    }
    if !offers_subprotocol(headers) {
        return refuse(StatusCode::BAD_REQUEST, "the subprotocol trunkline.v1 must be offered");
    }
    *token = bearer(headers);
    let name = HeaderValue::from_static(SUBPROTOCOL);
    response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, name);
    Ok(response)
}

/// RFC 6455 §4.1: the key is 16 bytes in base64, once.
fn has_real_key(headers: &HeaderMap) -> bool {
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else { return false };
    STANDARD.decode(key.as_bytes()).is_ok_and(|bytes| bytes.len() == 16)
}

fn offers_subprotocol(headers: &HeaderMap) -> bool {
    let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    lists.filter_map(|list| list.to_str().ok()).any(|list| {
        list.split(',').any(|name| name.trim() == SUBPROTOCOL)
    })
}

fn bearer(headers: &HeaderMap) -> Option<Secret> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Secret::from(token.trim()))
}

/// Sorts the library's errors by whose fault they are.
fn sort(error: WsError) -> io::Error {
    let violation = match error {
        WsError::Capacity(CapacityError::MessageTooLong { .. }) => {
            Violation::new(CloseCode::TooBig, "the message is longer than message_bytes_max")
        }
        WsError::Utf8(_) => Violation::new(CloseCode::NotUtf8, "a text message must be UTF-8"),
        WsError::Protocol(error) if !is_loss(&error) => {
            Violation::new(CloseCode::Protocol, "not WebSocket (RFC 6455)")
        }
        WsError::Io(error) => return error,
        // The rest are ends of one kind or another.
        error => return io::Error::other(error.to_string()),
    };
    violation.into_error()
}

fn is_loss(error: &tokio_tungstenite::tungstenite::error::ProtocolError) -> bool {
    use tokio_tungstenite::tungstenite::error::ProtocolError as E;
    matches!(
        error,
        E::ResetWithoutClosingHandshake | E::ReceivedAfterClosing | E::SendAfterClosing
    )
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for WebSocketLink<S> {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let message = match Pin::new(&mut self.socket).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(sort(error)))),
                Poll::Ready(Some(Ok(message))) => message,
            };
            let frame = match message {
                Message::Text(text) => Frame::Text(text.into()),
                Message::Binary(bytes) => Frame::Binary(bytes),
                Message::Close(close) => Frame::Close(read_close(close)),
                // The library answers pings itself; they are no message, and
                // do not renew what one may take.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            self.meter.reset();
            self.message_due = None;
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.meter.is_inside() {
            let timeout = self.message_timeout;
            let due = self.message_due.get_or_insert_with(|| Box::pin(sleep(timeout)));
            if due.as_mut().poll(cx).is_ready() {
                let late = Violation::new(CloseCode::Policy, "the message took too long");
                return Poll::Ready(Some(Err(late.into_error())));
            }
        }
        Poll::Pending
    }
}

fn read_close(close: Option<CloseFrame>) -> Close {
    match close {
        Some(frame) => Close::new(CloseCode::from_number(frame.code.into()), frame.reason.as_str()),
        None => Close::new(CloseCode::Normal, ""),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Sink<Frame> for WebSocketLink<S> {
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
