//! The server's half of the opening handshake (RFC 6455 §4.2): one request of
//! bounded size, one answer. Whoever is refused hears why, in HTTP.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::error::{Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, header};
use trunkline_protocol::message::Secret;

/// The subprotocol that both ends name.
const SUBPROTOCOL: &str = "trunkline.v1";

/// Longest request line and headers together.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// A request that is no opening handshake of this hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refused {
    /// Code and phrase.
    status: &'static str,
    /// A header that the status asks for.
    header: &'static str,
    /// What is wrong, for people.
    why: &'static str,
}

impl Refused {
    const fn new(status: &'static str, why: &'static str) -> Self {
        Self { status, header: "", why }
    }

    const fn bad(why: &'static str) -> Self {
        Self::new("400 Bad Request", why)
    }

    fn response(self) -> String {
        let Self { status, header, why } = self;
        let length = why.len() + 1;
        format!(
            "HTTP/1.1 {status}\r\n{header}Content-Type: text/plain\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{why}\n"
        )
    }

    /// What the library found.
    fn of(error: &WsError) -> Self {
        match error {
            WsError::Protocol(ProtocolError::WrongHttpMethod) => Self {
                header: "Allow: GET\r\n",
                ..Self::new("405 Method Not Allowed", "a WebSocket handshake is a GET")
            },
            WsError::Protocol(ProtocolError::WrongHttpVersion) => {
                Self::new("505 HTTP Version Not Supported", "HTTP/1.1 is required")
            }
            WsError::Protocol(
                ProtocolError::MissingConnectionUpgradeHeader
                | ProtocolError::MissingUpgradeWebSocketHeader,
            ) => Self {
                header: "Upgrade: websocket\r\n",
                ..Self::new("426 Upgrade Required", "only WebSocket is spoken here")
            },
            WsError::Protocol(ProtocolError::MissingSecWebSocketVersionHeader) => Self {
                header: "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
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
const TOO_SLOW: Refused = Refused::new("408 Request Timeout", "the handshake took too long");

/// Performs the handshake and returns the token of its `Authorization: Bearer`
/// header. Whoever is refused is given the time that is left to read why.
pub(super) async fn shake<S>(
    socket: &mut S,
    within: std::time::Duration,
) -> io::Result<Option<Secret>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = async {
        let judged = match read_head(socket).await? {
            Ok(head) => judge(&head),
            Err(refused) => Err(refused),
        };
        match judged {
            Ok((response, token)) => {
                socket.write_all(&response).await?;
                Ok(token)
            }
            Err(refused) => {
                socket.write_all(refused.response().as_bytes()).await?;
                linger(socket).await?;
                Err(io::Error::other(refused.why))
            }
        }
    };
    if let Ok(result) = tokio::time::timeout(within, handshake).await {
        return result;
    }
    // As far as the kernel takes it: the time is over.
    let _ = socket.write_all(TOO_SLOW.response().as_bytes()).now_or_never();
    Err(io::ErrorKind::TimedOut.into())
}

/// Reads up to the empty line that ends the head.
async fn read_head<S: AsyncRead + Unpin>(socket: &mut S) -> io::Result<Result<Vec<u8>, Refused>> {
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
            Some(end) if end < head.len() => {
                return Ok(Err(Refused::bad(
                    "nothing may follow before the handshake is answered",
                )));
            }
            Some(_) => return Ok(Ok(head)),
            None if head.len() > HEAD_BYTES_MAX => return Ok(Err(TOO_LARGE)),
            None => {}
        }
    }
}

/// The answer to a whole head, and the token in it.
fn judge(head: &[u8]) -> Result<(Vec<u8>, Option<Secret>), Refused> {
    let request = Request::try_parse(head).map_err(|error| Refused::of(&error))?;
    let Some((_, request)) = request else { return Err(Refused::bad("not HTTP/1.1")) };
    let headers = request.headers();
    if headers.contains_key(header::CONTENT_LENGTH)
        || headers.contains_key(header::TRANSFER_ENCODING)
    {
        return Err(Refused::bad("a WebSocket handshake has no body"));
    }
    let mut response = create_response(&request).map_err(|error| Refused::of(&error))?;
    if !has_real_key(headers) {
        return Err(NO_KEY);
    }
    if !is_same_origin(headers) {
        return Err(Refused::new("403 Forbidden", "another origin may not connect"));
    }
    if !offers_subprotocol(headers) {
        return Err(Refused::bad("the subprotocol trunkline.v1 must be offered"));
    }
    let name = HeaderValue::from_static(SUBPROTOCOL);
    response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, name);
    let mut answer = Vec::new();
    write_response(&mut answer, &response).map_err(|error| Refused::of(&error))?;
    Ok((answer, bearer(headers)))
}

/// RFC 6455 §4.1: the key is 16 bytes in base64, once.
fn has_real_key(headers: &HeaderMap) -> bool {
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else { return false };
    STANDARD.decode(key.as_bytes()).is_ok_and(|bytes| bytes.len() == 16)
}

fn offers_subprotocol(headers: &HeaderMap) -> bool {
    let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    lists
        .filter_map(|list| list.to_str().ok())
        .any(|list| list.split(',').any(|name| name.trim() == SUBPROTOCOL))
}

/// A browser names the origin of the page that connects (RFC 6455 §10.2): it
/// must be the host that it connects to, or any page could drive a hub that
/// its visitor can reach. Programs name none.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let (Ok(origin), Some(host), None) = (origin.to_str(), host, origins.next()) else {
        return false;
    };
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

fn bearer(headers: &HeaderMap) -> Option<Secret> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Secret::from(token.trim()))
}

/// Ends our direction and reads away what still comes: a socket dropped over
/// unread bytes is reset, and a reset can overtake the last words.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) -> io::Result<()> {
    socket.shutdown().await?;
    let mut away = [0; 1024];
    while socket.read(&mut away).await? > 0 {}
    Ok(())
}
