//! The handle and its driver against a scripted hub: over real sockets, and
//! over links in memory where time is tokio's, paused, and passes when nothing
//! else can happen.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message};
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::ids::{HubInstance, QueueEpoch};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentConnect, AgentToHub, Channel, CommandComplete, CommandExecute, CommandInterrupt,
    CommandSpec, CommandStatus, ConnectionAck, Envelope, Feature, Greeting, Heartbeat, HubToAgent,
    InterruptStage, Peer, Run, TerminalInput, TerminalTaken,
};

use super::*;
use crate::handler::{ExecutionEvent, Outcome};

const C: CommandId = CommandId::from_u128(0xc);

// ---- over real sockets ------------------------------------------------------

#[tokio::test]
async fn output_goes_on_where_it_was_when_a_socket_was_dropped() {
    let hub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let agent = agent_of(&hub).connect(|mut run: Execution| async move {
        let output = run.output();
        output.write(Channel::Stdout, b"before").await;
        let event = run.next_event().await;
        output.write(Channel::Stdout, b" and after").await;
        assert_eq!(event, ExecutionEvent::Input(Bytes::from_static(b"go")));
        Outcome::Exited(0)
    });
    let mut socket = accept(&hub).await;
    socket.greet(&[]).await;
    socket.say(execute(C)).await;
    let stream = loop {
        if let AgentToHub::Started(started) = socket.hear().await {
            break started.stream;
        }
    };
    assert_eq!(socket.output(6).await, b"before");
    drop(socket);

    let mut socket = accept(&hub).await;
    let greeting = socket.greet(&[]).await;
    assert_eq!(greeting.commands[0].status, CommandStatus::Running);
    assert_eq!(greeting.commands[0].stream.map(|stream| stream.to), Some(6));
    socket.say(HubToAgent::Taken(TerminalTaken { stream, stored: 3, allowed: 1 << 20 })).await;
    socket.say(input(C, b"go")).await;
    assert_eq!(socket.output(13).await, b"ore and after");
    assert_eq!(socket.ending().await.status, CommandStatus::Completed);
    assert!(agent.connection().borrow().is_connected());
}

#[tokio::test]
async fn an_agent_that_was_superseded_is_over_and_says_why() {
    let hub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let agent = agent_of(&hub).connect(forever);
    let mut socket = accept(&hub).await;
    socket.greet(&[]).await;
    socket.close(4409, "another link took over").await;
    let why = within(agent.closed()).await;
    assert_eq!((why.code, why.reason.as_str()), (CloseCode::Superseded, "another link took over"));
    assert!(agent.connection().borrow().is_over());
}

#[tokio::test]
async fn what_does_not_speak_the_protocol_is_no_hub() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let agent = agent_of(&server).connect(forever);
    let (socket, _) = server.accept().await.unwrap();
    let _ = tokio_tungstenite::accept_async(socket).await;
    let mut connection = agent.connection();
    let state = within(connection.wait_for(|state| *state != ConnectionState::Connecting)).await;
    let ConnectionState::Reconnecting { why, .. } = &*state.unwrap() else { panic!() };
    assert!(why.reason.to_lowercase().contains("protocol"), "{why}");
}

// ---- over links in memory ---------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_command_is_run_typed_into_interrupted_and_ended() {
    let (builder, mut hub) = in_memory();
    let _agent = builder.connect(|mut run: Execution| async move {
        assert_eq!((run.command(), run.attempt()), (C, 1));
        loop {
            match run.next_event().await {
                ExecutionEvent::Input(data) => run.output().write(Channel::Pty, &data).await,
                ExecutionEvent::Resize(_) => {}
                ExecutionEvent::Interrupt { grace } => {
                    assert_eq!(grace, Duration::from_millis(700));
                    run.signalled();
                    return Outcome::Signalled(2);
                }
            }
        }
    });
    let mut link = hub.greet().await;
    link.say(execute(C));
    link.until(|word| matches!(word, AgentToHub::Started(_))).await;
    link.say(input(C, b"echo"));
    let output = link.until(|word| matches!(word, AgentToHub::Output(_))).await;
    let AgentToHub::Output(output) = output else { panic!() };
    assert_eq!(&output.data[..], b"echo");
    link.say(interrupt(C, Some(700)));
    for stage in [InterruptStage::Delivered, InterruptStage::Signalled] {
        let is_stage =
            |word: &AgentToHub| matches!(word, AgentToHub::Interrupting(i) if i.stage == stage);
        link.until(is_stage).await;
    }
    assert_eq!(link.ending().await.status, CommandStatus::Interrupted);
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_leaves_its_command_unknown() {
    let (builder, mut hub) = in_memory();
    let _agent = builder.connect(|_: Execution| async move { panic!("no such thing") });
    let mut link = hub.greet().await;
    link.say(execute(C));
    let end = link.ending().await;
    assert_eq!(end.status, CommandStatus::Unknown);
    assert_eq!(end.end.error.as_deref(), Some("the handler panicked: no such thing"));
    link.say(execute(CommandId::from_u128(2)));
    link.ending().await; // the agent lives
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_ignores_an_interrupt_is_dropped() {
    let (builder, mut hub) = in_memory();
    let (dropped, mut was_dropped) = mpsc::channel::<()>(1);
    let _agent = builder.connect(move |run: Execution| {
        let witness = dropped.clone();
        async move {
            let _witness = witness;
            let _run = run;
            std::future::pending::<Outcome>().await
        }
    });
    let mut link = hub.greet().await;
    link.say(execute(C));
    link.until(|word| matches!(word, AgentToHub::Started(_))).await;
    let asked = now();
    link.say(interrupt(C, Some(1_000)));
    let end = link.ending().await;
    assert_eq!((end.status, asked.elapsed().as_secs()), (CommandStatus::Interrupted, 6));
    // The builder's own sender is left; the handler's is gone.
    assert!(was_dropped.try_recv().is_err() && was_dropped.sender_strong_count() == 1);
}

#[tokio::test(start_paused = true)]
async fn what_outlives_a_dropped_handler_has_no_say_in_the_next_attempt() {
    let (builder, mut hub) = in_memory();
    let (outlives, mut outputs) = mpsc::channel(2);
    let _agent = builder.connect(move |run: Execution| {
        let outlives = outlives.clone();
        async move {
            outlives.send(run.output()).await.unwrap();
            std::future::pending::<Outcome>().await
        }
    });
    let mut link = hub.greet().await;
    link.say(execute(C));
    let old = outputs.recv().await.unwrap();
    link.say(interrupt(C, Some(0)));
    link.ending().await;
    link.say(HubToAgent::Execute(CommandExecute { command: C, attempt: 2, spec: spec() }));
    let new = outputs.recv().await.unwrap();
    old.write(Channel::Stdout, b"old").await;
    new.write(Channel::Stdout, b"new").await;
    let output = link.until(|word| matches!(word, AgentToHub::Output(_))).await;
    let AgentToHub::Output(output) = output else { panic!() };
    assert_eq!(&output.data[..], b"new");
}

#[tokio::test(start_paused = true)]
async fn a_stop_returns_when_the_goodbye_is_said() {
    let (builder, mut hub) = in_memory();
    let agent = builder.connect(|mut run: Execution| async move {
        let _ = run.next_event().await;
        run.signalled();
        run.output().write(Channel::Pty, b"^C").await;
        Outcome::Signalled(2)
    });
    let mut link = hub.greet().await;
    link.say(execute(C));
    link.until(|word| matches!(word, AgentToHub::Started(_))).await;
    agent.stop().await;
    assert_eq!(link.ending().await.status, CommandStatus::Interrupted);
    link.until(|word| matches!(word, AgentToHub::Output(_))).await;
    link.until(|word| matches!(word, AgentToHub::Disconnect(_))).await;
    assert_eq!(link.close().await.code, CloseCode::Normal);
    assert_eq!(agent.closed().await.code, CloseCode::Normal);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_last_handle_is_dropped_says_goodbye() {
    let (builder, mut hub) = in_memory();
    let agent = builder.connect(forever);
    let mut link = hub.greet().await;
    drop(agent.clone());
    link.say(HubToAgent::Ping(trunkline_protocol::message::HeartbeatBeat { n: 1 }));
    link.until(|word| matches!(word, AgentToHub::Pong(_))).await;
    drop(agent);
    link.until(|word| matches!(word, AgentToHub::Disconnect(_))).await;
    link.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_link_that_takes_nothing_is_still_read_and_then_given_up() {
    let (builder, mut hub) = in_memory();
    let (told, mut heard) = mpsc::channel(1);
    let _agent = builder.connect(move |mut run: Execution| {
        let told = told.clone();
        async move {
            let event = run.next_event().await;
            told.send(event).await.unwrap();
            std::future::pending::<Outcome>().await
        }
    });
    let mut link = hub.greet().await;
    link.say(execute(C));
    link.until(|word| matches!(word, AgentToHub::Started(_))).await;
    // Nothing of what the agent writes is taken any more.
    link.fill();
    link.say(interrupt(C, Some(60_000)));
    assert!(matches!(heard.recv().await, Some(ExecutionEvent::Interrupt { .. })));
    // And then the hub falls silent, too: five seconds, and two for the close.
    let silent = now();
    let _again = hub.greet().await;
    assert!((7..9).contains(&silent.elapsed().as_secs()), "{:?}", silent.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_replaced_if_there_is_a_source() {
    let (builder, mut hub) = in_memory();
    let source =
        |refused: bool| async move { Ok(Secret::new(if refused { "fresh" } else { "stale" })) };
    let _agent = builder.token_source(source).connect(forever);
    for expected in ["stale", "fresh"] {
        let (greeting, mut link) = hub.link().await;
        assert_eq!(greeting.token.unwrap().reveal(), expected);
        link.hang_up(Close::new(CloseCode::Unauthorized, ""));
    }
    let (builder, mut hub) = in_memory();
    let agent = builder.token("stale").connect(forever);
    let (_, mut link) = hub.link().await;
    link.hang_up(Close::new(CloseCode::Unauthorized, "no"));
    assert_eq!(agent.closed().await.code, CloseCode::Unauthorized);
}

#[tokio::test(start_paused = true)]
async fn a_hub_that_never_answers_is_tried_again() {
    let (builder, mut hub) = in_memory();
    let agent = builder.connect(forever);
    let begun = now();
    let (_, _silent) = hub.link().await;
    let (_, _link) = hub.link().await;
    assert!((10..=11).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let shown = agent.connection().borrow().clone();
    assert!(matches!(shown, ConnectionState::Reconnecting { attempt: 1, .. }), "{shown:?}");
}

// ---- below the stories ------------------------------------------------------

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("in time")
}

#[expect(
    clippy::disallowed_methods,
    reason = "how long something took is what these tests are about"
)]
fn now() -> Instant {
    Instant::now()
}

async fn forever(run: Execution) -> Outcome {
    let _run = run;
    std::future::pending().await
}

fn spec() -> CommandSpec {
    CommandSpec::from(Run::Text("work".into()))
}

fn execute(command: CommandId) -> HubToAgent {
    HubToAgent::Execute(CommandExecute { command, attempt: 1, spec: spec() })
}

fn interrupt(command: CommandId, grace_ms: Option<u64>) -> HubToAgent {
    HubToAgent::Interrupt(CommandInterrupt { command, attempt: Some(1), grace_ms })
}

fn input(command: CommandId, data: &'static [u8]) -> HubToAgent {
    let writer = Some("d1".parse().unwrap());
    HubToAgent::Input(TerminalInput { command, writer, offset: 0, data: Bytes::from_static(data) })
}

fn ack(features: &[Feature]) -> HubToAgent {
    HubToAgent::Ack(ConnectionAck {
        protocol: 1,
        tenant: "t1".parse().unwrap(),
        peer: Peer::Agent("build-1".parse().unwrap()),
        hub: HubInstance::from_u128(1),
        queue: QueueEpoch::from_u128(1),
        features: features.to_vec(),
        limits: Limits::default().for_link(),
        heartbeat: Heartbeat { idle_ms: 2_000, timeout_ms: 5_000 },
    })
}

fn encode(message: HubToAgent) -> Frame {
    codec::encode(&Envelope::bare(message))
}

fn decode(frame: &Frame) -> AgentToHub {
    let rules = Rules::from(&Limits::default());
    codec::decode(frame, rules).remove(0).expect("a message").message
}

fn decode_greeting(frame: &Frame) -> AgentConnect {
    let rules = Rules::from(&Limits::default());
    match codec::decode::<Greeting>(frame, rules).remove(0).expect("a greeting").message {
        Greeting::Agent(greeting) => greeting,
        Greeting::Dashboard(_) => panic!("the greeting of a dashboard"),
    }
}

// A hub's end of a real socket.

fn agent_of(hub: &TcpListener) -> AgentBuilder {
    Agent::builder(&format!("ws://{}/", hub.local_addr().unwrap()), "build-1").unwrap()
}

/// With the end of a command, which may pass its output.
struct Socket(WebSocketStream<TcpStream>, Option<CommandComplete>);

async fn accept(hub: &TcpListener) -> Socket {
    let (socket, _) = within(hub.accept()).await.unwrap();
    #[expect(clippy::result_large_err, reason = "the library's own signature")]
    let named = |request: &Request, mut response: Response| {
        assert_eq!(request.headers()["sec-websocket-protocol"], "trunkline.v1");
        let name = HeaderValue::from_static("trunkline.v1");
        response.headers_mut().insert("sec-websocket-protocol", name);
        Ok(response)
    };
    Socket(within(tokio_tungstenite::accept_hdr_async(socket, named)).await.unwrap(), None)
}

impl Socket {
    async fn greet(&mut self, features: &[Feature]) -> AgentConnect {
        let greeting = decode_greeting(&self.frame().await);
        self.say(ack(features)).await;
        greeting
    }

    async fn say(&mut self, message: HubToAgent) {
        let Frame::Text(text) = encode(message) else { panic!() };
        let text = String::from_utf8(text.to_vec()).unwrap();
        self.0.send(Message::text(text)).await.unwrap();
    }

    async fn frame(&mut self) -> Frame {
        match within(self.0.next()).await.expect("a frame").expect("a link") {
            Message::Text(text) => Frame::Text(text.into()),
            Message::Binary(bytes) => Frame::Binary(bytes),
            other => panic!("{other:?}"),
        }
    }

    async fn hear(&mut self) -> AgentToHub {
        decode(&self.frame().await)
    }

    async fn output(&mut self, bytes: usize) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < bytes {
            match self.hear().await {
                AgentToHub::Output(output) => text.extend_from_slice(&output.data),
                AgentToHub::Complete(complete) => self.1 = Some(complete),
                _ => {} // of no interest here
            }
        }
        text
    }

    async fn ending(&mut self) -> CommandComplete {
        loop {
            if let Some(complete) = self.1.take() {
                return complete;
            }
            if let AgentToHub::Complete(complete) = self.hear().await {
                self.1 = Some(complete);
            }
        }
    }

    async fn close(mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame { code: code.into(), reason: reason.into() };
        self.0.close(Some(frame)).await.unwrap();
        let answer = within(self.0.next()).await;
        assert!(matches!(answer, Some(Ok(Message::Close(_)))), "{answer:?}");
    }
}

// A hub's end of links in memory.

struct MemoryHub(mpsc::Receiver<MemoryLink>);

struct MemoryLink {
    to_agent: mpsc::Sender<Frame>,
    from_agent: mpsc::Receiver<Frame>,
    fill: mpsc::Sender<Frame>,
}

/// The agent's end. What is written waits in a channel; when that is full,
/// nothing is taken until somebody reads, and nobody is woken for it.
struct Pipe {
    out: mpsc::Sender<Frame>,
    incoming: mpsc::Receiver<Frame>,
}

fn in_memory() -> (AgentBuilder, MemoryHub) {
    let (dialed, links) = mpsc::channel(8);
    let connector = move || {
        let dialed = dialed.clone();
        async move {
            let (to_agent, incoming) = mpsc::channel(64);
            let (out, from_agent) = mpsc::channel(64);
            let link = MemoryLink { to_agent, from_agent, fill: out.clone() };
            dialed
                .send(link)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok(Pipe { out, incoming })
        }
    };
    (Agent::over(connector, "build-1").unwrap(), MemoryHub(links))
}

impl Stream for Pipe {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

impl Sink<Frame> for Pipe {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.out.capacity() == 0 { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn start_send(self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        self.out.try_send(frame).map_err(io::Error::other)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl MemoryHub {
    async fn link(&mut self) -> (AgentConnect, MemoryLink) {
        let mut link = self.0.recv().await.expect("the agent dials");
        let greeting = decode_greeting(&link.from_agent.recv().await.expect("a greeting"));
        (greeting, link)
    }

    async fn greet(&mut self) -> MemoryLink {
        let (_, mut link) = self.link().await;
        link.say(ack(&[Feature::Binary]));
        link
    }
}

impl MemoryLink {
    fn say(&mut self, message: HubToAgent) {
        self.to_agent.try_send(encode(message)).expect("the agent reads");
    }

    fn hang_up(&mut self, close: Close) {
        self.to_agent.try_send(Frame::Close(close)).expect("the agent reads");
    }

    /// Takes nothing any more.
    fn fill(&mut self) {
        while self.fill.try_send(Frame::Text(Bytes::new())).is_ok() {}
    }

    async fn until(&mut self, is_it: impl Fn(&AgentToHub) -> bool) -> AgentToHub {
        loop {
            let frame = self.from_agent.recv().await.expect("the link lives");
            let word = decode(&frame);
            if let AgentToHub::Ping(ping) = word {
                self.say(HubToAgent::Pong(ping));
            }
            if is_it(&word) {
                return word;
            }
        }
    }

    async fn ending(&mut self) -> CommandComplete {
        match self.until(|word| matches!(word, AgentToHub::Complete(_))).await {
            AgentToHub::Complete(complete) => complete,
            other => panic!("{other:?}"),
        }
    }

    async fn close(&mut self) -> Close {
        loop {
            if let Frame::Close(close) = self.from_agent.recv().await.expect("a close") {
                return close;
            }
        }
    }
}
