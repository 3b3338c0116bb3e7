//! One contract, every transport: the same stories over in-memory links,
//! real `WebSocket`s and plain HTTP, with real programs in real pseudo-terminals, through
//! the public API only.

#![allow(clippy::unwrap_used, clippy::panic, reason = "stories")]

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use futures_util::{Sink, Stream};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, BoxFuture, BoxLink, ConnectionState, Connector, Dashboard, Polling, Programs,
    Request, Terminal, TerminalEvent, WebSocket,
};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::message::{CommandStatus, Presence, Priority};
use trunkline_server::Hub;

/// Longest that anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A hub, and the way to it.
struct Fabric {
    hub: Hub,
    connector: Arc<dyn Connector>,
}

/// A connector whose links can be cut from outside.
#[derive(Clone)]
struct Cuttable {
    inner: Arc<dyn Connector>,
    cuts: Arc<Mutex<Vec<Arc<Cut>>>>,
}

#[derive(Default)]
struct Cut {
    done: AtomicBool,
    waker: AtomicWaker,
}

impl Cuttable {
    fn cut(&self) {
        for cut in self.cuts.lock().unwrap().drain(..) {
            cut.done.store(true, Ordering::Release);
            cut.waker.wake();
        }
    }
}

impl Connector for Cuttable {
    fn dial(&self) -> BoxFuture<'_, io::Result<BoxLink>> {
        Box::pin(async move {
            let link = self.inner.dial().await?;
            let cut = Arc::new(Cut::default());
            self.cuts.lock().unwrap().push(Arc::clone(&cut));
            Ok(Box::pin(CutLink { link: Some(link), cut }) as BoxLink)
        })
    }
}

struct CutLink {
    link: Option<BoxLink>,
    cut: Arc<Cut>,
}

impl CutLink {
    fn link(
        &mut self,
        cx: &Context<'_>,
    ) -> io::Result<Pin<&mut (dyn trunkline_client::FrameLink + 'static)>> {
        self.cut.waker.register(cx.waker());
        if self.cut.done.load(Ordering::Acquire) {
            self.link = None; // the socket closes in the middle of whatever it does
        }
        let link = self.link.as_mut().ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(link.as_mut())
    }
}

impl Stream for CutLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.link(cx) {
            Ok(link) => link.poll_next(cx),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }
}

impl Sink<Frame> for CutLink {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_ready(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        match &mut self.link {
            Some(link) => link.as_mut().start_send(frame),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link(cx)?.poll_close(cx)
    }
}

async fn memory() -> Fabric {
    let hub = Hub::builder().start().await.unwrap();
    let of_links = hub.clone();
    let connector = move || {
        let link = of_links.memory();
        async move { Ok(link) }
    };
    Fabric { hub, connector: Arc::new(connector) }
}

async fn websocket() -> Fabric {
    let hub = Hub::builder().start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    Fabric { hub, connector: Arc::new(WebSocket::new(&url).unwrap()) }
}

async fn polling() -> Fabric {
    let hub = Hub::builder().start().await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    Fabric { hub, connector: Arc::new(Polling::from(WebSocket::new(&url).unwrap())) }
}

impl Fabric {
    fn cuttable(&self) -> Cuttable {
        Cuttable { inner: Arc::clone(&self.connector), cuts: Arc::default() }
    }

    fn agent(&self, name: &str) -> (Agent, Cuttable) {
        let cable = self.cuttable();
        let agent = Agent::over(cable.clone(), name).unwrap().connect(Programs::new());
        (agent, cable)
    }

    async fn dashboard(&self) -> (Dashboard, Cuttable) {
        let cable = self.cuttable();
        let dashboard = Dashboard::over(cable.clone()).connect();
        timeout(PATIENCE, dashboard.connected()).await.unwrap().unwrap();
        (dashboard, cable)
    }
}

async fn is_there(dashboard: &Dashboard, agent: &str, presence: Presence) {
    let agent = agent.parse().unwrap();
    let mut roster = dashboard.roster();
    let there =
        roster.wait_for(|roster| roster.agent(&agent).is_some_and(|a| a.presence == presence));
    timeout(PATIENCE, there).await.unwrap().unwrap();
}

/// Reads a terminal to its end: its bytes, and whether they were audited.
async fn read(terminal: &mut Terminal) -> (Vec<u8>, Option<Audit>) {
    let mut bytes = Vec::new();
    let mut audit = None;
    let all = async {
        while let Some(event) = terminal.next().await {
            match event {
                TerminalEvent::Output { offset, data, .. } => {
                    assert_eq!(offset, bytes.len() as u64);
                    bytes.extend_from_slice(&data);
                }
                TerminalEvent::Ended { audit: found, .. } => audit = Some(found),
                TerminalEvent::Opened { .. } => {}
                TerminalEvent::Gap { gap, .. } => panic!("a gap: {gap:?}"),
                TerminalEvent::Refused(refusal) => panic!("refused: {refusal}"),
                TerminalEvent::Lost(_) => panic!("lost"),
            }
        }
    };
    timeout(PATIENCE, all).await.unwrap();
    (bytes, audit)
}

async fn runs_a_program_in_a_terminal(fabric: Fabric) {
    let (agent, _) = fabric.agent("build-1");
    let (ann, _) = fabric.dashboard().await;
    let (bob, _) = fabric.dashboard().await;
    let request =
        Request::shell(r"printf '\033[31mred\033[0m\n'; stty size; exit 3").terminal(100, 30);
    let command = ann.run("build-1", request).await.unwrap();
    let (bytes, audit) = read(&mut command.terminal()).await;
    assert_eq!(bytes, b"\x1b[31mred\x1b[0m\r\n30 100\r\n");
    assert_eq!(audit, Some(Audit::Verified));
    let end = timeout(PATIENCE, command.ended()).await.unwrap().unwrap();
    assert_eq!(end.status, CommandStatus::Completed);
    assert_eq!(end.end.as_ref().unwrap().exit_code, Some(3));
    let (same, _) = read(&mut bob.command(command.id()).terminal()).await;
    assert_eq!(same, bytes, "all dashboards agree");
    agent.stop().await;
    is_there(&bob, "build-1", Presence::Offline).await;
    fabric.hub.drain(Duration::ZERO).await;
    assert_eq!(fabric.hub.links(), 0);
}

async fn loses_no_byte_of_a_large_output_when_cables_are_cut(fabric: Fabric) {
    let (_agent, agent_cable) = fabric.agent("build-1");
    let (ann, ann_cable) = fabric.dashboard().await;
    let (bob, bob_cable) = fabric.dashboard().await;
    let line = "0123456789abcdef".repeat(64);
    let script = format!("i=0; while [ $i -lt 7000 ]; do echo {line}; i=$((i+1)); done");
    let command = ann.run("build-1", Request::shell(script)).await.unwrap();
    let expected = format!("{line}\n").repeat(7_000);
    let cables = [agent_cable, ann_cable, bob_cable];
    let cutting = tokio::spawn(async move {
        for cable in cables.iter().cycle().take(6) {
            // In the middle of the output, wherever that is: nothing depends on when.
            let _ = timeout(Duration::from_millis(150), std::future::pending::<()>()).await;
            cable.cut();
        }
    });
    let (mut by_ann, mut by_bob) = (command.terminal(), bob.command(command.id()).terminal());
    let ((ann_read, ann_audit), (bob_read, bob_audit)) =
        tokio::join!(read(&mut by_ann), read(&mut by_bob));
    cutting.await.unwrap();
    let digest = |bytes: &[u8]| Sha256::digest(bytes).to_vec();
    assert_eq!(digest(&ann_read), digest(expected.as_bytes()), "{} bytes", ann_read.len());
    assert_eq!(digest(&bob_read), digest(expected.as_bytes()), "{} bytes", bob_read.len());
    assert_eq!((ann_audit, bob_audit), (Some(Audit::Verified), Some(Audit::Verified)));
}

async fn feeds_a_program_what_is_typed(fabric: Fabric) {
    let (_agent, cable) = fabric.agent("build-1");
    let (ann, _) = fabric.dashboard().await;
    let request = Request::shell("read a; read b; echo got $a $b");
    let command = ann.run("build-1", request).await.unwrap();
    timeout(PATIENCE, ann.input(command.id(), "one\n")).await.unwrap().unwrap();
    cable.cut();
    timeout(PATIENCE, ann.input(command.id(), "two\n")).await.unwrap().unwrap();
    let (bytes, _) = read(&mut command.terminal()).await;
    assert_eq!(String::from_utf8_lossy(&bytes), "got one two\n");
}

async fn interrupts_and_stops(fabric: Fabric) {
    let (_agent, _) = fabric.agent("build-1");
    let (ann, _) = fabric.dashboard().await;
    let (bob, _) = fabric.dashboard().await;
    let sleeping =
        ann.run("build-1", Request::argv(["sleep", "600"]).terminal(80, 24)).await.unwrap();
    timeout(PATIENCE, sleeping.reached(CommandStatus::Running)).await.unwrap().unwrap();
    let low = ann.run("build-1", Request::shell("exit 0").priority(Priority::Low)).await.unwrap();
    let high = bob.run("build-1", Request::shell("exit 0").priority(Priority::High)).await.unwrap();
    let second = bob.run("build-1", Request::argv(["sleep", "600"])).await.unwrap();
    bob.interrupt(sleeping.id()).await.unwrap();
    let ended = async |command: &trunkline_client::Command| {
        timeout(PATIENCE, command.ended()).await.unwrap().unwrap()
    };
    assert_eq!(ended(&sleeping).await.status, CommandStatus::Interrupted);
    assert_eq!(ended(&high).await.status, CommandStatus::Completed);
    timeout(PATIENCE, second.reached(CommandStatus::Running)).await.unwrap().unwrap();
    assert_eq!(ann.emergency_stop(None).await.unwrap(), 2);
    assert_eq!(ended(&second).await.status, CommandStatus::Interrupted);
    assert_eq!(ended(&low).await.status, CommandStatus::Interrupted);
    assert!(low.state().unwrap().started_at_ms.is_none(), "it never ran");
}

async fn refuses_a_program_that_is_none(fabric: Fabric) {
    let (_agent, _) = fabric.agent("build-1");
    let (ann, _) = fabric.dashboard().await;
    let request = Request::argv(["there-is-no-such-program"]);
    let command = ann.run("build-1", request).await.unwrap();
    let end = timeout(PATIENCE, command.ended()).await.unwrap().unwrap();
    assert_eq!(end.status, CommandStatus::Failed);
    assert!(end.end.as_ref().unwrap().error.is_some());
}

macro_rules! contract {
    ($($story:ident)*) => {
        mod over_memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() {
                super::$story(super::memory().await).await;
            })*
        }

        mod over_websocket {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() {
                super::$story(super::websocket().await).await;
            })*
        }

        mod over_polling {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() {
                super::$story(super::polling().await).await;
            })*
        }
    };
}

contract! {
    runs_a_program_in_a_terminal
    loses_no_byte_of_a_large_output_when_cables_are_cut
    feeds_a_program_what_is_typed
    interrupts_and_stops
    refuses_a_program_that_is_none
}

/// Who is turned away before there is a link comes back when it was told to,
/// and not before.
#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "states are shown by the wall clock")]
async fn a_client_that_is_told_in_http_to_come_later_does() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    for (answer, range) in [
        ("503 Service Unavailable\r\nRetry-After: 70", 70..=71),
        ("429 Too Many Requests\r\nRetry-After: 7", 7..=8),
        ("503 Service Unavailable", 10..=11),
        ("503 Service Unavailable\r\nRetry-After: soon", 10..=11),
        ("429 Too Many Requests\r\nRetry-After: 99999999999", 3600..=3601),
        ("502 Bad Gateway\r\nRetry-After: 70", 0..=1),
    ] {
        let dashboard = Dashboard::builder(&url).unwrap().connect();
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await.unwrap());
        }
        let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
        socket.write_all(answer.as_bytes()).await.unwrap();
        let mut states = dashboard.connection();
        let is_waiting =
            |state: &ConnectionState| matches!(state, ConnectionState::Reconnecting { .. });
        let state = states.wait_for(is_waiting).await.unwrap().clone();
        let ConnectionState::Reconnecting { next_at_ms, .. } = state else { unreachable!() };
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        let wait = Duration::from_millis(next_at_ms).saturating_sub(now).as_secs_f64();
        assert!(
            (f64::from(*range.start()) - 1.0..=f64::from(*range.end())).contains(&wait),
            "{answer}: {wait}"
        );
    }
}
