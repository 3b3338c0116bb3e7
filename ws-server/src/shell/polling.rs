//! Links over plain HTTP: what is answered to their requests
//! (`docs/protocol.md`, "Polling").

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use trunkline_protocol::limits::{GREETING_BYTES_MAX, Limits};
use trunkline_protocol::polling::{
    BATCH_FRAMES_MAX, BATCH_HEADER, BatchError, CONTENT_TYPE, FRAME_HEADER_BYTES, LINK_HEADER, read,
};

use super::arrival::Arriving;
use super::{LinkId, Shared};
use crate::transport::{self, Desk, Door, Missed, PollingLink, Refused};

/// How long a connection may stay between two requests, and take for the head
/// of one.
const IDLE: Duration = Duration::from_secs(30);

/// Read buffer of a connection: a head fits in, and a body passes through.
const BUFFER_BYTES: usize = 32 * 1024;

/// What the bytes of a batch may be beyond the content of its frames.
const FRAMING_BYTES: usize = BATCH_FRAMES_MAX * FRAME_HEADER_BYTES;

/// How long a browser may remember what it was allowed.
const PREFLIGHT_SECONDS: HeaderValue = HeaderValue::from_static("600");

type Answer = Response<Bytes>;

/// Links that poll, by the secret that names each.
#[derive(Default)]
pub(crate) struct Polled(Mutex<HashMap<String, (LinkId, Arc<Desk>)>>);

impl Polled {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (LinkId, Arc<Desk>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request is answered by.
#[derive(Clone)]
pub(crate) struct Polling {
    pub(crate) shared: Arc<Shared>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) door: Arc<Door>,
}

impl Polling {
    /// Answers the requests of one connection, of which `begun` was read
    /// already, until it ends or the hub does.
    pub(crate) async fn serve<S>(self, socket: S, begun: Vec<u8>, peer: IpAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Ok(_room) = Arc::clone(&self.shared).connections.clone().try_acquire_owned() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
            let this = self.clone();
            async move { Ok::<_, Infallible>(this.answer(request, peer).await.map(Full::new)) }
        });
        let io = TokioIo::new(Begun { begun: begun.into(), socket });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(BUFFER_BYTES);
        let connection = builder.serve_connection(io, answer).with_upgrades();
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(target: "trunkline::hub", %error, "an HTTP connection ended");
                }
                return;
            }
            () = shared.until_stopped() => connection.as_mut().graceful_shutdown(),
        }
        let _ = tokio::time::timeout(shared.close_timeout, connection).await;
    }

    /// Answers one request, over a connection from `peer`.
    pub(crate) async fn answer<B>(&self, request: Request<B>, peer: IpAddr) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let headers = request.headers();
        let is_passed_on = self.door.is_proxy(peer);
        let address = if is_passed_on { self.door.forwarded_for(headers) } else { Some(peer) };
        if headers.contains_key(header::UPGRADE) {
            return self.upgrade(request, address);
        }
        let origin = request.headers().get(header::ORIGIN).cloned();
        let mut answer = if self.door.lets_in(request.headers()) {
            self.judge(request, address).await
        } else {
            say(StatusCode::FORBIDDEN, "another origin may not connect")
        };
        let headers = answer.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(origin) = origin
            && headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).is_none()
            && self.door.allows_by_name(&origin)
        {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::VARY, HeaderValue::from_static("origin"));
            let link = HeaderValue::from_static(LINK_HEADER);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, link);
        }
        answer
    }

    async fn judge<B>(&self, request: Request<B>, address: Option<IpAddr>) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let link = match text(request.headers(), LINK_HEADER) {
            Ok(link) => link.map(str::to_owned),
            Err(()) => return say(StatusCode::BAD_REQUEST, "trunkline-link stands there once"),
        };
        match (request.method(), link) {
            (&Method::OPTIONS, _) => preflight(),
            (&Method::POST, None) => self.open(&request, address),
            (&Method::POST, Some(link)) => self.hear(&link, request).await,
            (&Method::GET, Some(link)) => self.tell(&link, request.headers()).await,
            (&Method::GET, None) => {
                let mut answer =
                    say(StatusCode::UPGRADE_REQUIRED, "a WebSocket, or a POST to open a link");
                let websocket = HeaderValue::from_static("websocket");
                answer.headers_mut().insert(header::UPGRADE, websocket);
                answer
            }
            _ => {
                let mut answer =
                    say(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are spoken here");
                let methods = HeaderValue::from_static("GET, POST, OPTIONS");
                answer.headers_mut().insert(header::ALLOW, methods);
                answer
            }
        }
    }

    /// Begins a WebSocket on the connection that the request came over.
    fn upgrade<B>(&self, mut request: Request<B>, address: Option<IpAddr>) -> Answer {
        let Some(arriving) = Arriving::new(&self.shared, address) else {
            return say(StatusCode::SERVICE_UNAVAILABLE, "the hub has ended");
        };
        if let Some(close) = arriving.turned_away() {
            return refused(&Refused::closed(&close));
        }
        if request.extensions().get::<OnUpgrade>().is_none() {
            let why = "a WebSocket needs a connection in HTTP/1.1 that can be upgraded";
            return say(StatusCode::BAD_REQUEST, why);
        }
        let socket = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let handshake = match transport::judge(&Request::from_parts(head, ()), &self.door) {
            Ok(handshake) => handshake,
            Err(why) => return refused(&why),
        };
        arriving.open(handshake.token, None);
        let limits = Arc::clone(&self.limits);
        tokio::spawn(async move {
            let socket = async { socket.await.map(TokioIo::new).map_err(io::Error::other) };
            arriving.upgraded(socket, &limits).await;
        });
        handshake.response.map(|()| Bytes::new())
    }

    /// Opens a link.
    fn open<B: Body>(&self, request: &Request<B>, address: Option<IpAddr>) -> Answer {
        if !request.body().is_end_stream() {
            return say(StatusCode::BAD_REQUEST, "the request that opens a link has no body");
        }
        let token = match self.door.token(request.uri(), request.headers()) {
            Ok(token) => token,
            Err(why) => return say(StatusCode::BAD_REQUEST, why),
        };
        let Some(arriving) = Arriving::new(&self.shared, address) else {
            return say(StatusCode::SERVICE_UNAVAILABLE, "the hub has ended");
        };
        if let Some(close) = arriving.turned_away() {
            return refused(&Refused::closed(&close));
        }
        let desk = Arc::new(Desk::default());
        let name = URL_SAFE_NO_PAD.encode(secret());
        let task = arriving.polled(PollingLink::new(Arc::clone(&desk)), token);
        let link = task.id();
        self.shared.polled.lock().insert(name.clone(), (link, desk));
        let (shared, key) = (Arc::clone(&self.shared), name.clone());
        tokio::spawn(async move {
            task.run().await;
            // Its last words may be fetched, and fetched again.
            shared.pause(shared.close_timeout).await;
            shared.polled.lock().remove(&key);
        });
        opened(&name)
    }

    fn find(&self, link: &str) -> Option<(LinkId, Arc<Desk>)> {
        self.shared.polled.lock().get(link).cloned()
    }

    /// Takes a batch from the peer.
    async fn hear<B>(&self, link: &str, request: Request<B>) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Some((id, desk)) = self.find(link) else { return no_such_link() };
        let is_greeted = self.shared.input(|core, _| core.is_greeted(id));
        let frame_max = if is_greeted { self.limits.message_bytes_max } else { GREETING_BYTES_MAX };
        take(&desk, request, frame_max, self.limits.message_timeout).await
    }

    /// Gives a batch to the peer.
    async fn tell(&self, link: &str, headers: &HeaderMap) -> Answer {
        let Some((_, desk)) = self.find(link) else { return no_such_link() };
        give(&desk, headers, self.shared.pause(self.limits.poll_hold)).await
    }
}

/// Takes the batch of a request, of frames that are not too long, in time.
pub(crate) async fn take<B>(
    desk: &Desk,
    request: Request<B>,
    frame_max: usize,
    time: Duration,
) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Some(number) = number(request.headers()) else { return no_number() };
    let max = frame_max + FRAMING_BYTES;
    let declared = request.body().size_hint().lower();
    if declared > max as u64 {
        return too_long();
    }
    let body = Limited::new(request.into_body(), max).collect();
    let body = match tokio::time::timeout(time, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return too_long(),
        Ok(Err(_)) => return say(StatusCode::BAD_REQUEST, "the body did not come whole"),
        Err(_) => return say(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
    };
    let frames = match read(body, frame_max) {
        Ok(frames) => frames,
        Err(BatchError::TooLong) => return too_long(),
        Err(error) => return say(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    match desk.put(number, frames).await {
        Ok(()) => say(StatusCode::NO_CONTENT, ""),
        Err(missed) => missed_it(missed),
    }
}

/// Gives the batch that a request asks for, or nothing when `enough` is ready.
pub(crate) async fn give(
    desk: &Desk,
    headers: &HeaderMap,
    enough: impl Future<Output = ()>,
) -> Answer {
    let Some(number) = number(headers) else { return no_number() };
    match desk.take(number, enough).await {
        Ok(batch) => {
            let mut answer = Response::new(batch);
            let kind = HeaderValue::from_static(CONTENT_TYPE);
            answer.headers_mut().insert(header::CONTENT_TYPE, kind);
            answer
        }
        Err(missed) => missed_it(missed),
    }
}

/// Answers what is asked of the one link that there is, whose end is `desk`.
#[cfg(feature = "testing")]
pub(crate) async fn answer_for<B>(desk: &Desk, request: Request<B>, limits: &Limits) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let is_named = request.headers().contains_key(LINK_HEADER);
    match (request.method(), is_named) {
        (&Method::POST, false) => opened("the-only-one"),
        (&Method::POST, true) => {
            take(desk, request, limits.message_bytes_max, limits.message_timeout).await
        }
        (&Method::GET, true) => {
            let enough = tokio::time::timeout(limits.poll_hold, std::future::pending::<()>());
            give(desk, request.headers(), async { drop(enough.await) }).await
        }
        _ => say(StatusCode::METHOD_NOT_ALLOWED, ""),
    }
}

/// There is a link of this name now.
fn opened(name: &str) -> Answer {
    let mut answer = say(StatusCode::CREATED, "");
    if let Ok(name) = HeaderValue::from_str(name) {
        answer.headers_mut().insert(LINK_HEADER, name);
    }
    answer
}

/// 128 bits that nobody guesses.
#[expect(clippy::disallowed_methods, reason = "the shell is where randomness comes from")]
fn secret() -> [u8; 16] {
    rand::random()
}

fn say(status: StatusCode, why: &str) -> Answer {
    let body = if why.is_empty() { Bytes::new() } else { format!("{why}\n").into() };
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

fn no_such_link() -> Answer {
    say(StatusCode::NOT_FOUND, "no such link, or none any more")
}

fn no_number() -> Answer {
    say(StatusCode::BAD_REQUEST, "trunkline-batch is a number from 1 on")
}

fn too_long() -> Answer {
    say(StatusCode::PAYLOAD_TOO_LARGE, "longer than a message may be")
}

fn missed_it(missed: Missed) -> Answer {
    match missed {
        Missed::Number => say(StatusCode::CONFLICT, "that is not the next batch: the link is lost"),
        Missed::Superseded => say(StatusCode::CONFLICT, "another request has taken its place"),
        Missed::Over => say(StatusCode::GONE, "the link is over"),
    }
}

fn refused(refused: &Refused) -> Answer {
    let mut answer = say(refused.status(), refused.why);
    answer.headers_mut().extend(refused.headers());
    answer
}

/// A page from elsewhere asks whether it may (Fetch standard, CORS preflight).
fn preflight() -> Answer {
    let mut answer = say(StatusCode::NO_CONTENT, "");
    let headers = answer.headers_mut();
    let methods = HeaderValue::from_static("GET, POST");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    let names = "authorization, content-type, trunkline-link, trunkline-batch";
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(names));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, PREFLIGHT_SECONDS);
    answer
}

/// A header that stands there once, or not at all.
fn text<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, ()> {
    let mut values = headers.get_all(HeaderName::from_static(name)).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| ()),
        (Some(_), Some(_)) => Err(()),
    }
}

fn number(headers: &HeaderMap) -> Option<u64> {
    let number = text(headers, BATCH_HEADER).ok()??;
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    number.parse().ok().filter(|_| is_plain)
}

/// A socket of which something was read already.
struct Begun<S> {
    begun: Bytes,
    socket: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, into);
        }
        let length = self.begun.len().min(into.remaining());
        let begun = self.begun.split_to(length);
        into.put_slice(&begun);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
