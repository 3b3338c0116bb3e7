//! WebSocket (RFC 6455) on `tokio-tungstenite`, with what it leaves to its
//! user: bounds on what a message may take in fragments and in time, and an
//! end that gets the last words across.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode as WsCloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::limits::{GREETING_BYTES_MAX, Limits};

use super::Violation;
use super::guard::{Bounds, Greeted, Guarded, Meter};

/// Read buffer per link. The library's default of 128 KiB would be held, and
/// zero-filled, by every idle link.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// What is gathered before the library writes without being asked to flush.
/// The library never gives the room back, so every link that was once busy
/// keeps this much, and up to twice that. Half of it costs a fifth more CPU
/// in a flood, four times as much saves a tenth (`docs/benchmarks.md`).
const WRITE_BUFFER_BYTES: usize = 32 * 1024;

/// What the frame headers of a message may take beyond its content, and what
/// control frames may take between two messages. A message in fragments of
/// less than 14 bytes on average is more header than content, and no client
/// sends such.
const FRAMING_BYTES: usize = 64 * 1024;

/// The same, of somebody who has not greeted.
const STRANGER_FRAMING_BYTES: usize = 2 * 1024;

/// A WebSocket as a stream and sink of frames.
///
/// After the peer's close, or a violation of its, the stream reads away
/// whatever still comes and ends when the peer has ended its direction. Closing
/// the sink ends ours. A socket dropped over unread bytes would be reset, and
/// the reset could overtake the close that says why.
pub(crate) struct WebSocketLink<S> {
    socket: WebSocketStream<Guarded<S>>,
    message_timeout: Duration,
    /// When the message under way must be whole.
    message_due: Option<(u64, Pin<Box<Sleep>>)>,
    /// The peer has said its last word, or nothing after it can be understood.
    heard_all: bool,
}

/// The link on a socket whose handshake is over.
/// `greeted` will say when its peer has greeted: before that a greeting is all
/// that it may say.
pub(crate) async fn link<S>(socket: S, limits: &Limits, greeted: Greeted) -> WebSocketLink<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER_BYTES;
    config.write_buffer_size = WRITE_BUFFER_BYTES;
    config.max_write_buffer_size = WRITE_BUFFER_BYTES + limits.message_bytes_max + FRAMING_BYTES;
    config.max_message_size = Some(limits.message_bytes_max);
    config.max_frame_size = Some(limits.message_bytes_max);
    let stranger = Bounds {
        message_bytes_max: GREETING_BYTES_MAX + STRANGER_FRAMING_BYTES,
        control_bytes_max: STRANGER_FRAMING_BYTES,
    };
    let known = Bounds {
        message_bytes_max: limits.message_bytes_max.saturating_add(FRAMING_BYTES),
        control_bytes_max: FRAMING_BYTES,
    };
    let meter = Meter::new(stranger, Some((greeted, known)));
    let guarded = Guarded { socket, meter };
    let socket = WebSocketStream::from_raw_socket(guarded, Role::Server, Some(config)).await;
    let message_timeout = limits.message_timeout;
    WebSocketLink { socket, message_timeout, message_due: None, heard_all: false }
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
    matches!(error, E::ResetWithoutClosingHandshake | E::ReceivedAfterClosing | E::SendAfterClosing)
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocketLink<S> {
    /// Whether the message under way has taken too long.
    #[expect(clippy::disallowed_methods, reason = "a deadline of the shell, not a wait")]
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(now) = self.socket.get_ref().meter.under_way() else {
            self.message_due = None;
            return Poll::Pending;
        };
        let timeout = self.message_timeout;
        match &mut self.message_due {
            Some((known, due)) if *known == now => due.as_mut().poll(cx),
            due => {
                let (_, due) = due.insert((now, Box::pin(sleep(timeout))));
                due.as_mut().poll(cx)
            }
        }
    }

    fn poll_away(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let socket = &mut self.socket.get_mut().socket;
        loop {
            let mut away = [0; 4096];
            let mut away = ReadBuf::new(&mut away);
            let read = ready!(Pin::new(&mut *socket).poll_read(cx, &mut away));
            if read.is_err() || away.filled().is_empty() {
                return Poll::Ready(());
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for WebSocketLink<S> {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.heard_all {
            return self.poll_away(cx).map(|()| None);
        }
        loop {
            let message = match Pin::new(&mut self.socket).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Err(error))) => {
                    let error = sort(error);
                    self.heard_all = Violation::of(&error).is_some();
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(Some(Ok(message))) => message,
            };
            let frame = match message {
                Message::Text(text) => Frame::Text(text.into()),
                Message::Binary(bytes) => Frame::Binary(bytes),
                Message::Close(close) => {
                    self.heard_all = true;
                    Frame::Close(read_close(close))
                }
                // The library answers pings itself; they are no message.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.poll_late(cx).is_ready() {
            self.heard_all = true;
            let late = Violation::new(CloseCode::Violation, "the message took too long");
            return Poll::Ready(Some(Err(late.into_error())));
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
        ready!(Pin::new(&mut self.socket).poll_close(cx)).map_err(sort)?;
        Pin::new(&mut self.socket.get_mut().socket).poll_shutdown(cx)
    }
}

fn utf8(text: Bytes) -> io::Result<Utf8Bytes> {
    Utf8Bytes::try_from(text).map_err(|_| io::ErrorKind::InvalidData.into())
}
