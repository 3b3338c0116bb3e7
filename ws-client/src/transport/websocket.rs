//! WebSocket (RFC 6455) on `tokio-tungstenite`, over TCP or over TLS.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
#[cfg(feature = "tls")]
use tokio_rustls::rustls::ClientConfig;
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

#[cfg(feature = "tls")]
use super::tls::{Tls, TrustError};
use crate::connector::{BoxFuture, BoxLink, Connector};

const SUBPROTOCOL: &str = "trunkline.v1";

/// Longest message taken from a hub, unless told otherwise.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Read buffer: one full terminal chunk. The library's default of 128 KiB is
/// zero-filled for every read.
const READ_BUFFER_BYTES: usize = 20 * 1024;

/// What is gathered before the library writes without being asked to flush.
const WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// The answer of whoever is at the URL, in place of a WebSocket: the inner error
/// of a dial that failed so.
///
/// Agents and dashboards dial again later. With status 429 or 503 they wait as
/// long as the answer says (`Retry-After` in seconds, RFC 9110 §10.2.3; an hour at
/// most), or ten seconds, where their own back-off is shorter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the hub answered with HTTP status {status}")]
pub struct HttpRefusal {
    /// The status.
    pub status: u16,
    /// How long to wait, if it says so.
    pub retry_after: Option<Duration>,
}

impl HttpRefusal {
    /// What it means to whoever dials.
    pub(crate) fn close(&self) -> Close {
        match (self.status, self.retry_after) {
            (429 | 503, Some(after)) => Close::hinting(CloseCode::TryLater, after),
            (429 | 503, None) => Close::new(CloseCode::TryLater, self.to_string()),
            _ => Close::new(CloseCode::Lost, self.to_string()),
        }
    }
}

/// Why a text is not the URL of a hub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// Not a URL with a host.
    #[error("not a URL of the form ws://host:port/path or wss://host:port/path")]
    Syntax,
    /// Another scheme than `ws` and `wss`.
    #[error("only ws:// and wss:// are spoken here")]
    Scheme,
    /// `wss`, in a program that was built without the feature `tls`.
    #[error("wss:// takes the feature `tls` of trunkline-client, without which this was built")]
    NoTls,
    /// `wss`, with a host that no certificate can be for.
    #[error("not a host name or an address, as a certificate has it")]
    Host,
}

/// Dials a hub's WebSocket at `ws://host[:port][/path]`, or, with the feature
/// `tls`, at `wss://host[:port][/path]`.
///
/// # TLS
///
/// ```no_run
/// # #[cfg(feature = "tls")]
/// # fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use trunkline_client::{Agent, Programs, WebSocket};
///
/// // A hub with a certificate from a public authority:
/// let agent = Agent::builder("wss://hub.example", "build-1")?;
/// // One with a certificate from your own:
/// let hub = WebSocket::new("wss://hub.internal:7443")?.roots_pem(&std::fs::read("ca.pem")?)?;
/// let agent = Agent::over(hub, "build-1")?;
/// # Ok(())
/// # }
/// ```
///
/// TLS 1.2 and 1.3, by rustls on aws-lc-rs, whatever else the process has chosen
/// for itself. The certificate must be for the host of the URL, a name or an
/// address, and be signed by one of the platform's root certificates, or of
/// those given to `roots_pem`. It is not looked up on lists of revoked ones.
///
/// The platform's roots are read, on a thread for what blocks, at the first
/// dial that needs them, and again at each further one as long as there are
/// none. On Unix, `SSL_CERT_FILE` and `SSL_CERT_DIR` say where they are.
///
/// A dial succeeds only when the certificate was verified, and no token is sent
/// before it was. If it fails, its error has a `TlsError` inside, and agents and
/// dashboards dial again later: a certificate may be mended. They never go on
/// without TLS.
///
/// # Without TLS
///
/// `ws://` is for one machine, and for networks where somebody else takes care:
/// whoever is on the way can read the token and act by it. A client that is to
/// send a token over `ws://` to another host than `localhost` or a loopback
/// address does so, and warns of it once in its log.
#[derive(Clone)]
pub struct WebSocket {
    uri: Uri,
    address: String,
    is_exposed: bool,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
    message_bytes_max: usize,
}

/// Shows where it leads. What else a URL may hold, a login or a token in its
/// query, is nobody's business who reads a log.
impl fmt::Debug for WebSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocket")
            .field("scheme", &self.uri.scheme_str().unwrap_or_default())
            .field("address", &self.address)
            .field("path", &self.uri.path())
            .field("message_bytes_max", &self.message_bytes_max)
            .finish_non_exhaustive()
    }
}

impl WebSocket {
    /// A connector for this URL. The port is 80, or 443 for `wss://`, unless it
    /// says otherwise.
    ///
    /// # Errors
    ///
    /// When it is no such URL, or `wss://` without the feature `tls`.
    pub fn new(url: &str) -> Result<Self, UrlError> {
        let uri: Uri = url.parse().map_err(|_| UrlError::Syntax)?;
        let is_tls = match uri.scheme_str() {
            Some("ws") => false,
            Some("wss") => true,
            Some(_) => return Err(UrlError::Scheme),
            None => return Err(UrlError::Syntax),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(UrlError::Syntax)?;
        #[cfg(not(feature = "tls"))]
        if is_tls {
            return Err(UrlError::NoTls);
        }
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        Ok(Self {
            address: format!("{host}:{port}"),
            is_exposed: !is_tls && !is_loopback(host),
            #[cfg(feature = "tls")]
            tls: if is_tls { Some(Tls::with(host)?) } else { None },
            message_bytes_max: MESSAGE_BYTES_MAX,
            uri,
        })
    }

    /// Trusts the certificates in this PEM text, and whatever they have signed,
    /// instead of the platform's. Feature `tls`.
    ///
    /// # Errors
    ///
    /// When there are none in it, when one of them cannot be a root, and when
    /// the URL is `ws://`, where this would protect nothing.
    #[cfg(feature = "tls")]
    pub fn roots_pem(mut self, pem: &[u8]) -> Result<Self, TrustError> {
        self.tls.as_mut().ok_or(TrustError::Plain)?.trust_pem(pem)?;
        Ok(self)
    }

    /// Speaks TLS by a configuration of your own: with a certificate of the
    /// client's, say, or with another provider of cryptography. Only its
    /// protocols (ALPN) are replaced, by `http/1.1`. What it verifies, and
    /// whether, is up to you. Feature `tls`.
    ///
    /// The type is from [`trunkline_client::rustls`](crate::rustls).
    ///
    /// # Errors
    ///
    /// When the URL is `ws://`, where this would protect nothing.
    #[cfg(feature = "tls")]
    pub fn tls_config(mut self, config: &ClientConfig) -> Result<Self, TrustError> {
        self.tls.as_mut().ok_or(TrustError::Plain)?.trust_config(config);
        Ok(self)
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

/// What bytes go over.
#[cfg(feature = "polling")]
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

#[cfg(feature = "polling")]
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Socket for S {}

#[cfg(feature = "polling")]
impl WebSocket {
    /// A connection to the hub, with TLS if the URL says so.
    pub(super) async fn socket(&self) -> io::Result<Box<dyn Socket>> {
        let socket = TcpStream::connect(&self.address).await?;
        socket.set_nodelay(true)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return Ok(Box::new(tls.connect(socket).await?));
        }
        Ok(Box::new(socket))
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The longest frame that is taken.
    pub(super) fn longest(&self) -> usize {
        self.message_bytes_max
    }

    /// The longest body that is taken: a hub puts no more into one.
    pub(super) fn batch_bytes_max(&self) -> usize {
        self.message_bytes_max.saturating_add(512 * 1024)
    }
}

impl WebSocket {
    /// Upgrades a connection to a link.
    async fn upgrade<S>(&self, socket: S) -> io::Result<BoxLink>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut config = WebSocketConfig::default();
        config.read_buffer_size = READ_BUFFER_BYTES;
        config.write_buffer_size = WRITE_BUFFER_BYTES;
        config.max_write_buffer_size = WRITE_BUFFER_BYTES.saturating_add(self.message_bytes_max);
        config.max_message_size = Some(self.message_bytes_max);
        config.max_frame_size = Some(self.message_bytes_max);
        // A hub that does not name the subprotocol is none: the library
        // refuses its answer.
        let (socket, _) =
            tokio_tungstenite::client_async_with_config(self.request()?, socket, Some(config))
                .await
                .map_err(sort)?;
        Ok(Box::pin(WebSocketLink { socket }))
    }
}

impl Connector for WebSocket {
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        Box::pin(async move {
            let socket = TcpStream::connect(&self.address).await?;
            socket.set_nodelay(true)?;
            #[cfg(feature = "tls")]
            if let Some(tls) = &self.tls {
                return self.upgrade(tls.connect(socket).await?).await;
            }
            self.upgrade(socket).await
        })
    }

    fn is_exposed(&self) -> bool {
        self.is_exposed
    }
}

/// Whether what goes to this host of a URL stays on this machine.
fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match address.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// What the header says, if it says seconds (RFC 9110 §10.2.3).
pub(super) fn retry_after(header: Option<&HeaderValue>) -> Option<Duration> {
    let seconds = header?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

struct WebSocketLink<S> {
    socket: WebSocketStream<S>,
}

fn sort(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::Http(response) => {
            let retry_after = retry_after(response.headers().get(header::RETRY_AFTER));
            io::Error::other(HttpRefusal { status: response.status().as_u16(), retry_after })
        }
        error => io::Error::other(error.to_string()),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for WebSocketLink<S> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_before_anything_is_dialled() {
        for (url, expected) in [
            ("ws://127.0.0.1:7070", None),
            ("ws://[::1]:7070/hub", None),
            ("http://hub.example", Some(UrlError::Scheme)),
            ("127.0.0.1:7070", Some(UrlError::Syntax)),
            ("", Some(UrlError::Syntax)),
        ] {
            assert_eq!(WebSocket::new(url).err(), expected, "{url}");
        }
    }

    #[test]
    fn what_may_be_a_secret_in_a_url_is_not_shown() {
        let hub = WebSocket::new("ws://ann:secret@127.0.0.1:7070/hub?access_token=secret").unwrap();
        let shown = format!("{hub:?}");
        assert!(!shown.contains("secret"), "{shown}");
        assert!(shown.contains("127.0.0.1:7070") && shown.contains("/hub"), "{shown}");
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn without_the_feature_an_error_names_it() {
        let error = WebSocket::new("wss://hub.example").unwrap_err();
        assert_eq!(error, UrlError::NoTls);
        assert!(error.to_string().contains("feature `tls`"));
    }

    #[cfg(feature = "tls")]
    #[test]
    fn with_the_feature_wss_has_a_port_and_a_name_of_its_own() {
        for (url, address) in [
            ("ws://hub.example", "hub.example:80"),
            ("wss://hub.example", "hub.example:443"),
            ("wss://hub.example:7443/hub", "hub.example:7443"),
            ("wss://[::1]", "[::1]:443"),
            ("wss://192.0.2.7", "192.0.2.7:443"),
        ] {
            assert_eq!(WebSocket::new(url).unwrap().address, address);
        }
        assert_eq!(WebSocket::new("wss://-.example").unwrap_err(), UrlError::Host);
        let plain = || WebSocket::new("ws://hub.example").unwrap();
        assert_eq!(plain().roots_pem(b"").unwrap_err(), TrustError::Plain);
    }

    #[test]
    fn what_leaves_the_machine_in_plain_text_is_exposed() {
        for (url, expected) in [
            ("ws://127.0.0.1:7070", false),
            ("ws://127.9.9.9", false),
            ("ws://[::1]:7070", false),
            ("ws://[::ffff:127.0.0.1]:7070", false),
            ("ws://localhost:7070", false),
            ("ws://LocalHost", false),
            ("ws://0.0.0.0:7070", true),
            ("ws://192.168.0.1:7070", true),
            ("ws://[fe80::1]:7070", true),
            ("ws://hub.example", true),
            ("ws://localhost.example", true),
            #[cfg(feature = "tls")]
            ("wss://hub.example", false),
        ] {
            assert_eq!(WebSocket::new(url).unwrap().is_exposed(), expected, "{url}");
        }
    }
}
