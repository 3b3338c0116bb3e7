//! Links over plain HTTP (`docs/protocol.md`, "Polling"): one connection that
//! asks for what there is, and one that says what there is to say.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::polling::{
    BATCH_FRAMES_MAX, BATCH_HEADER, CONTENT_TYPE, FRAME_HEADER_BYTES, LINK_HEADER, append, read,
};

use super::websocket::{HttpRefusal, WebSocket, retry_after};
use crate::connector::{BoxFuture, BoxLink, Connector};

/// What is put into one request, in bytes; a longer frame goes alone.
const BATCH_BYTES: usize = 256 * 1024;

/// Longest that one request may take: more than a hub holds it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a request that failed is tried again, with the same number, before
/// the link is given up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(250);

/// Dials a hub over plain HTTP: at the same URL, `ws://` or `wss://`, as
/// [`WebSocket`]. Feature `polling`.
///
/// For where no WebSocket comes through. Everything is as over a WebSocket but
/// that it costs more, and takes a moment longer.
///
/// You need not choose: [`Agent::builder`](crate::Agent::builder) and
/// [`Dashboard::builder`](crate::Dashboard::builder) fall back to it by
/// themselves, and return to a WebSocket when one comes through again.
#[derive(Debug, Clone)]
pub struct Polling(WebSocket);

impl From<WebSocket> for Polling {
    /// The same hub, with the same trust in its certificate.
    fn from(websocket: WebSocket) -> Self {
        Self(websocket)
    }
}

impl Connector for Polling {
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        Box::pin(async move {
            let mut http = Http { hub: self.0.clone(), connection: None };
            let answer = http.ask(Method::POST, None, Bytes::new()).await?;
            let name = answer.headers().get(LINK_HEADER).cloned();
            let (StatusCode::CREATED, Some(name)) = (answer.status(), name) else {
                return Err(unexpected(&answer));
            };
            let (told, incoming) = mpsc::channel(1);
            let outgoing = Arc::new(Outgoing::default());
            let asking = Http { hub: self.0.clone(), connection: None };
            let tasks = [
                tokio::spawn(asking.receive(name.clone(), Arc::clone(&outgoing), told.clone())),
                tokio::spawn(http.send(name, Arc::clone(&outgoing), told)),
            ];
            let link = PollingLink { incoming, heard: VecDeque::new(), outgoing, tasks };
            Ok(Box::pin(link) as BoxLink)
        })
    }

    fn is_exposed(&self) -> bool {
        self.0.is_exposed()
    }
}

/// A connection, opened when it is needed.
struct Http {
    hub: WebSocket,
    connection: Option<(SendRequest<Full<Bytes>>, Task)>,
}

/// Ends with whoever has it.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn unexpected<B>(answer: &Response<B>) -> io::Error {
    let after = answer.headers().get(header::RETRY_AFTER);
    let status = answer.status().as_u16();
    io::Error::other(HttpRefusal { status, retry_after: retry_after(after) })
}

/// The number of a batch, and whose it is.
type Numbered<'a> = (&'a HeaderValue, u64);

impl Http {
    async fn connected(&mut self) -> io::Result<&mut SendRequest<Full<Bytes>>> {
        if self.connection.as_ref().is_none_or(|(sender, _)| sender.is_closed()) {
            let socket = TokioIo::new(self.hub.socket().await?);
            let (sender, connection) = http1::handshake(socket).await.map_err(io::Error::other)?;
            let task = Task(tokio::spawn(async move { drop(connection.await) }));
            self.connection = Some((sender, task));
        }
        let (sender, _) = self.connection.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        sender.ready().await.map_err(io::Error::other)?;
        Ok(sender)
    }

    /// One request and its answer. The connection is given up if that fails.
    async fn ask(
        &mut self,
        method: Method,
        batch: Option<Numbered<'_>>,
        body: Bytes,
    ) -> io::Result<Response<Bytes>> {
        let limit = self.hub.batch_bytes_max();
        let uri: &Uri = self.hub.uri();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let host = uri.authority().map_or("", |authority| authority.as_str());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, CONTENT_TYPE);
        if let Some((link, number)) = batch {
            request = request.header(LINK_HEADER, link).header(BATCH_HEADER, number);
        }
        let request = request.body(Full::new(body)).map_err(io::Error::other)?;
        let asked = async {
            let answer = self.connected().await?.send_request(request).await;
            let (head, body) = answer.map_err(io::Error::other)?.into_parts();
            let body = Limited::new(body, limit).collect().await.map_err(io::Error::other)?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        let answer = match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        if answer.is_err() {
            self.connection = None;
        }
        answer
    }

    /// The same, again and again while it may only be the network's fault:
    /// asking twice with one number is asking once.
    async fn insist(
        &mut self,
        method: Method,
        batch: Numbered<'_>,
        body: &Bytes,
    ) -> io::Result<Response<Bytes>> {
        let mut waited = Duration::ZERO;
        loop {
            let answer = self.ask(method.clone(), Some(batch), body.clone()).await;
            let error = match answer {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                // A proxy that has lost its way to the hub, say.
                Ok(answer) if answer.status().is_server_error() => unexpected(&answer),
                Ok(answer) => return Err(unexpected(&answer)),
                Err(error) => error,
            };
            if waited >= PATIENCE {
                return Err(error);
            }
            waited += PAUSE;
            let _ = tokio::time::timeout(PAUSE, std::future::pending::<()>()).await;
        }
    }

    /// Asks for batch after batch.
    async fn receive(
        mut self,
        link: HeaderValue,
        outgoing: Arc<Outgoing>,
        told: mpsc::Sender<io::Result<Vec<Frame>>>,
    ) {
        for number in 1.. {
            let answer = self.insist(Method::GET, (&link, number), &Bytes::new()).await;
            let frames = answer.and_then(|answer| {
                read(answer.into_body(), self.hub.longest()).map_err(io::Error::other)
            });
            if frames.is_err() {
                outgoing.lose();
            }
            let is_last = frames
                .as_ref()
                .map_or(true, |frames| matches!(frames.last(), Some(Frame::Close(_))));
            if told.send(frames).await.is_err() || is_last {
                return;
            }
        }
    }

    /// Sends what there is to say, as it comes.
    async fn send(
        mut self,
        link: HeaderValue,
        outgoing: Arc<Outgoing>,
        told: mpsc::Sender<io::Result<Vec<Frame>>>,
    ) {
        for number in 1.. {
            let (batch, is_last) = outgoing.next().await;
            if let Err(error) = self.insist(Method::POST, (&link, number), &batch).await {
                outgoing.lose();
                let _ = told.send(Err(error)).await;
                return;
            }
            outgoing.sent();
            if is_last {
                return;
            }
        }
    }
}

/// What is to be said.
#[derive(Debug, Default)]
struct Outgoing {
    inside: Mutex<Waiting>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
    is_sending: bool,
    /// The link is lost: nothing goes out any more.
    is_lost: bool,
    writer: Option<Waker>,
}

impl Waiting {
    fn has_room(&self) -> bool {
        self.bytes < BATCH_BYTES && self.frames.len() < BATCH_FRAMES_MAX
    }
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch, as soon as there is one, and whether it is the last.
    async fn next(&self) -> (Bytes, bool) {
        loop {
            let news = self.news.notified();
            {
                let mut waiting = self.lock();
                let mut batch = Vec::new();
                let mut is_last = false;
                while let Some(frame) = waiting.frames.pop_front_if(|frame| {
                    batch.is_empty() || batch.len() + frame.len() <= BATCH_BYTES
                }) {
                    waiting.bytes -= frame.len() + FRAME_HEADER_BYTES;
                    is_last = matches!(frame, Frame::Close(_));
                    append(&mut batch, &frame);
                }
                if !batch.is_empty() {
                    waiting.is_sending = true;
                    if let Some(writer) = waiting.writer.take() {
                        writer.wake();
                    }
                    return (batch.into(), is_last);
                }
            }
            news.await;
        }
    }

    fn sent(&self) {
        let mut waiting = self.lock();
        waiting.is_sending = false;
        if let Some(writer) = waiting.writer.take() {
            writer.wake();
        }
    }

    fn lose(&self) {
        let mut waiting = self.lock();
        waiting.is_lost = true;
        if let Some(writer) = waiting.writer.take() {
            writer.wake();
        }
    }
}

fn lost() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

struct PollingLink {
    incoming: mpsc::Receiver<io::Result<Vec<Frame>>>,
    heard: VecDeque<Frame>,
    outgoing: Arc<Outgoing>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for PollingLink {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Stream for PollingLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(frame) = self.heard.pop_front() {
                return Poll::Ready(Some(Ok(frame)));
            }
            match ready!(self.incoming.poll_recv(cx)) {
                Some(Ok(frames)) => self.heard.extend(frames),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Sink<Frame> for PollingLink {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.outgoing.lock();
        if waiting.is_lost {
            return Poll::Ready(Err(lost()));
        }
        if waiting.has_room() {
            return Poll::Ready(Ok(()));
        }
        waiting.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    fn start_send(self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let mut waiting = self.outgoing.lock();
        waiting.bytes += frame.len() + FRAME_HEADER_BYTES;
        waiting.frames.push_back(frame);
        self.outgoing.news.notify_one();
        Ok(())
    }

    /// Ready when all of it has arrived.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.outgoing.lock();
        if waiting.is_lost {
            return Poll::Ready(Err(lost()));
        }
        if waiting.frames.is_empty() && !waiting.is_sending {
            return Poll::Ready(Ok(()));
        }
        waiting.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}
