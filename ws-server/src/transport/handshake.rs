//! The server's half of the opening handshake (RFC 6455 §4.2): one request of
//! bounded size, one answer. Whoever is refused hears why, in HTTP.

use std::borrow::Cow;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::error::{Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{
    Request as HttpRequest, Response as HttpResponse, create_response, write_response,
};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, header};
#[cfg(feature = "polling")]
use tokio_tungstenite::tungstenite::http::{HeaderName, StatusCode};
use trunkline_protocol::close::{Advice, CloseCode};
use trunkline_protocol::frame::Close;
use trunkline_protocol::message::Secret;

use super::door::{Door, subprotocols};

/// The subprotocol that both ends name.
const SUBPROTOCOL: &str = "trunkline.v1";

/// Longest request line and headers together.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Why there is no link, in the words of HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    /// Code and phrase.
    status: &'static str,
    /// A header that the status asks for.
    header: Cow<'static, str>,
    /// What is wrong, for people.
    pub(crate) why: &'static str,
}

impl Refused {
    const fn new(status: &'static str, why: &'static str) -> Self {
        Self { status, header: Cow::Borrowed(""), why }
    }

    const fn bad(why: &'static str) -> Self {
        Self::new("400 Bad Request", why)
    }

    fn response(&self) -> String {
        let Self { status, header, why } = self;
        let length = why.len() + 1;
        format!(
            "HTTP/1.1 {status}\r\n{header}Content-Type: text/plain\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{why}\n"
        )
    }

    /// What the hub itself has to say before there is a link.
    pub(crate) fn closed(close: &Close) -> Self {
        let (status, why) = match close.code {
            CloseCode::GreetingTimeout => {
                ("408 Request Timeout", "the handshake and the greeting took too long")
            }
            CloseCode::Flood => {
                ("429 Too Many Requests", "too many greetings from this address have failed")
            }
            _ => ("503 Service Unavailable", "no link can be had now"),
        };
        let after = match close.advice() {
            Advice::After(after) => after,
            Advice::Reconnect | Advice::WithNewToken | Advice::Never => Duration::ZERO,
        };
        // RFC 9110 §10.2.3: in whole seconds.
        let seconds = after.as_millis().div_ceil(1000);
        let header = Cow::Owned(format!("Retry-After: {seconds}\r\n"));
        Self { header, ..Self::new(status, why) }
    }

    /// Its code.
    #[cfg(feature = "polling")]
    pub(crate) fn status(&self) -> StatusCode {
        let code = self.status.split(' ').next().and_then(|code| code.parse().ok());
        code.unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
    }

    /// The headers that the status asks for.
    #[cfg(feature = "polling")]
    pub(crate) fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let lines = self.header.split("\r\n").filter_map(|line| line.split_once(": "));
        lines.filter_map(|(name, value)| Some((name.parse().ok()?, value.parse().ok()?)))
    }

    /// What the library found.
    fn of(error: &WsError) -> Self {
        match error {
            WsError::Protocol(ProtocolError::WrongHttpMethod) => Self {
                header: Cow::Borrowed("Allow: GET\r\n"),
                ..Self::new("405 Method Not Allowed", "a WebSocket handshake is a GET")
            },
            WsError::Protocol(ProtocolError::WrongHttpVersion) => {
                Self::new("505 HTTP Version Not Supported", "HTTP/1.1 is required")
            }
            WsError::Protocol(
                ProtocolError::MissingConnectionUpgradeHeader
                | ProtocolError::MissingUpgradeWebSocketHeader,
            ) => Self {
                header: Cow::Borrowed("Upgrade: websocket\r\n"),
                ..Self::new("426 Upgrade Required", "only WebSocket is spoken here")
            },
            WsError::Protocol(ProtocolError::MissingSecWebSocketVersionHeader) => Self {
                header: Cow::Borrowed("Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"),
                ..Self::new("426 Upgrade Required", "Sec-WebSocket-Version must be 13")
            },
            WsError::Protocol(
                ProtocolError::MissingSecWebSocketKey | ProtocolError::InvalidSecWebSocketKey,
            ) => NO_KEY,
            WsError::Capacity(_) => TOO_LARGE,
            _ => Self::bad("not HTTP/1.1"), // the rest are syntax
        }
    }
}

const NO_KEY: Refused = Refused::bad("Sec-WebSocket-Key must be 16 bytes in base64, once");
const TOO_LARGE: Refused =
    Refused::new("431 Request Header Fields Too Large", "the request's head is too large");

/// An opening handshake that is all right, and is yet to be answered.
#[derive(Debug)]
pub(crate) struct Request {
    /// What says yes to it.
    pub(crate) response: HttpResponse,
    /// The credentials that it carries.
    pub(crate) token: Option<Secret>,
    /// Where it says that it comes from: for those to believe who know who
    /// passed it on.
    pub(crate) forwarded_for: Option<IpAddr>,
}

/// What has come over a new connection.
pub(crate) enum Heard {
    /// An opening handshake.
    Handshake(Request),
    /// Another request in HTTP, perhaps with something of its body.
    #[cfg(feature = "polling")]
    Plain(Vec<u8>),
}

/// Reads the request. `Err` is what is wrong with it, in the words of HTTP.
pub(crate) async fn read<S>(socket: &mut S, door: &Door) -> io::Result<Result<Heard, Refused>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (read, end) = match read_head(socket).await? {
        Ok(head) => head,
        Err(refused) => return Ok(Err(refused)),
    };
    #[cfg(feature = "polling")]
    if is_plain(&read[..end]) {
        return Ok(Ok(Heard::Plain(read)));
    }
    if end < read.len() {
        let why = "nothing may follow before the handshake is answered";
        return Ok(Err(Refused::bad(why)));
    }
    let request = match HttpRequest::try_parse(&read) {
        Ok(Some((_, request))) => judge(&request, door),
        Ok(None) => Err(Refused::bad("not HTTP/1.1")),
        Err(error) => Err(Refused::of(&error)),
    };
    Ok(request.map(Heard::Handshake))
}

/// Whether a head is that of a request about a link that polls.
#[cfg(feature = "polling")]
fn is_plain(head: &[u8]) -> bool {
    use trunkline_protocol::polling::LINK_HEADER;
    let names_a_link = || {
        let mut lines = head.split(|byte| *byte == b'\n');
        lines.any(|line| {
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
            name.eq_ignore_ascii_case(LINK_HEADER.as_bytes())
        })
    };
    head.starts_with(b"POST ")
        || head.starts_with(b"OPTIONS ")
        || (head.starts_with(b"GET ") && names_a_link())
}

impl Request {
    /// Says yes.
    pub(crate) async fn accept<S: AsyncWrite + Unpin>(&self, socket: &mut S) -> io::Result<()> {
        let mut head = Vec::new();
        write_response(&mut head, &self.response).map_err(io::Error::other)?;
        socket.write_all(&head).await?;
        socket.flush().await
    }
}

/// Says no, and gives the peer time to read why.
pub(crate) async fn refuse<S>(socket: &mut S, refused: &Refused) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    socket.write_all(refused.response().as_bytes()).await?;
    socket.flush().await?;
    linger(socket).await
}

/// Reads up to the empty line that ends the head, and perhaps beyond: where it
/// ends.
async fn read_head<S: AsyncRead + Unpin>(
    socket: &mut S,
) -> io::Result<Result<(Vec<u8>, usize), Refused>> {
    let mut head = Vec::with_capacity(1024);
    loop {
        // Looked for where it can have come to be, so that a head in tiny
        // pieces is not parsed once for each of them.
        let seen = head.len().saturating_sub(3);
        if socket.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let end = head[seen..].windows(4).position(|four| four == b"\r\n\r\n");
        match end.map(|at| seen + at + 4) {
            Some(end) if end > HEAD_BYTES_MAX => return Ok(Err(TOO_LARGE)),
            Some(end) => return Ok(Ok((head, end))),
            None if head.len() > HEAD_BYTES_MAX => return Ok(Err(TOO_LARGE)),
            None => {}
        }
    }
}

/// What to make of a whole head.
pub(crate) fn judge(request: &HttpRequest, door: &Door) -> Result<Request, Refused> {
    let headers = request.headers();
    if headers.contains_key(header::CONTENT_LENGTH)
        || headers.contains_key(header::TRANSFER_ENCODING)
    {
        return Err(Refused::bad("a WebSocket handshake has no body"));
    }
    let mut response = create_response(request).map_err(|error| Refused::of(&error))?;
    if !has_real_key(headers) {
        return Err(NO_KEY);
    }
    if !door.lets_in(headers) {
        return Err(Refused::new("403 Forbidden", "another origin may not connect"));
    }
    if !subprotocols(headers).any(|name| name == SUBPROTOCOL) {
        return Err(Refused::bad("the subprotocol trunkline.v1 must be offered"));
    }
    let name = HeaderValue::from_static(SUBPROTOCOL);
    response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, name);
    let token = door.token(request.uri(), headers).map_err(Refused::bad)?;
    Ok(Request { response, token, forwarded_for: door.forwarded_for(headers) })
}

/// RFC 6455 §4.1: the key is 16 bytes in base64, once.
fn has_real_key(headers: &HeaderMap) -> bool {
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else { return false };
    STANDARD.decode(key.as_bytes()).is_ok_and(|bytes| bytes.len() == 16)
}

/// Ends our direction and reads away what still comes: a socket dropped over
/// unread bytes is reset, and a reset can overtake the last words.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) -> io::Result<()> {
    socket.shutdown().await?;
    let mut away = [0; 1024];
    while socket.read(&mut away).await? > 0 {}
    Ok(())
}
