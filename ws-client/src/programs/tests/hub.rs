//! A hub with one agent and one command, and the person who watches it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _, sink, stream};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{CommandId, DashboardId, HubInstance, QueueEpoch, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentToHub, Channel, CommandExecute, CommandInterrupt, CommandSpec, ConnectionAck, Envelope,
    ErrorCode, Feature, Greeting, Heartbeat, HubToAgent, InterruptStage, Peer, TerminalInput,
    TerminalResize, TerminalSize, TerminalTaken,
};

use super::within;
use crate::agent::Agent;
use crate::handler::{CommandHandler, Execution, Outcome};
use crate::programs::Programs;

const COMMAND: CommandId = CommandId::from_u128(1);

/// Runs one command on an agent of its own.
pub(super) fn run(programs: Programs, spec: CommandSpec) -> Remote {
    let (near, far) = link();
    let near = Mutex::new(Some(near));
    let (tell, outcome) = oneshot::channel();
    let tell = Arc::new(Mutex::new(Some(tell)));
    let drop_it = Arc::new(Notify::new());
    let dropped = Arc::clone(&drop_it);
    let handler = move |execution: Execution| {
        let run = programs.run(execution);
        let (tell, dropped) = (Arc::clone(&tell), Arc::clone(&dropped));
        async move {
            tokio::select! {
                () = dropped.notified() => Outcome::Interrupted,
                outcome = run => {
                    let tell = tell.lock().expect("not poisoned").take().expect("runs once");
                    let _ = tell.send(outcome.clone());
                    outcome
                }
            }
        }
    };
    let dial = move || {
        let link = near.lock().expect("not poisoned").take();
        async { link.ok_or_else(|| io::Error::other("there is one link only")) }
    };
    let agent = Agent::over(dial, "runner").expect("a name").connect(handler);
    let seen = Arc::new(Seen::default());
    let (orders, from) = mpsc::channel(4);
    let gone = Gone(Arc::clone(&seen));
    tokio::spawn(async move { serve(far, spec, from, &gone.0).await });
    Remote { orders, seen, outcome: Arc::new(outcome.into()), drop_it, _agent: agent }
}

/// Whoever sent the command.
#[derive(Clone)]
pub(super) struct Remote {
    orders: mpsc::Sender<HubToAgent>,
    seen: Arc<Seen>,
    outcome: Arc<tokio::sync::Mutex<oneshot::Receiver<Outcome>>>,
    drop_it: Arc<Notify>,
    _agent: Agent,
}

impl Remote {
    /// Sends input, as far ahead of what is taken as a dashboard may.
    pub(super) async fn input(&self, bytes: &[u8]) {
        let writer: DashboardId = "dashboard".parse().expect("an id");
        let ahead = Limits::default().input_bytes_ahead;
        let offset = {
            let mut sent = self.seen.input_sent.lock().expect("not poisoned");
            let offset = *sent;
            *sent += bytes.len() as u64;
            offset
        };
        let end = offset + bytes.len() as u64;
        let mut taken = self.seen.input_taken.subscribe();
        let _ = taken.wait_for(|taken| end <= taken + ahead).await;
        let data = Bytes::copy_from_slice(bytes);
        self.order(HubToAgent::Input(TerminalInput {
            command: COMMAND,
            writer: Some(writer),
            offset,
            data,
        }))
        .await;
    }

    /// Waits until this much input was taken.
    pub(super) async fn taken(&self, bytes: u64) {
        let mut taken = self.seen.input_taken.subscribe();
        within(taken.wait_for(|taken| *taken >= bytes)).await.expect("the hub is there");
    }

    pub(super) async fn resize(&self, size: TerminalSize) {
        self.order(HubToAgent::Resize(TerminalResize { command: COMMAND, size })).await;
    }

    pub(super) async fn interrupt(&self, grace: Duration) {
        let grace_ms = Some(u64::try_from(grace.as_millis()).expect("short"));
        let interrupt = CommandInterrupt { command: COMMAND, attempt: Some(1), grace_ms };
        self.order(HubToAgent::Interrupt(interrupt)).await;
    }

    pub(super) async fn heard_signalled(&self) {
        let mut signalled = self.seen.signalled.subscribe();
        within(signalled.wait_for(|signalled| *signalled)).await.expect("the hub is there");
    }

    /// The next output, or `None` once the command is over and all of it was
    /// seen.
    pub(super) async fn next_output(&self) -> Option<(Channel, Bytes)> {
        loop {
            let more = self.seen.more.notified();
            let (chunk, over) = {
                let mut output = self.seen.output();
                let chunk = output.waiting.pop_front();
                if let Some((_, bytes)) = &chunk {
                    output.shown += bytes.len() as u64;
                }
                (chunk, output.over)
            };
            if chunk.is_some() {
                self.seen.shown.notify_one();
                return chunk;
            }
            match over {
                Some(Over::Ended) => return None,
                Some(Over::Gone) => panic!("the hub is gone"),
                None => {}
            }
            more.await;
        }
    }

    pub(super) async fn outcome(&self) -> Outcome {
        let mut outcome = self.outcome.lock().await;
        (&mut *outcome).await.expect("it was not dropped")
    }

    /// Drops the future that runs the command.
    pub(super) async fn drop_it(&self) {
        self.drop_it.notify_one();
        while within(self.next_output()).await.is_some() {}
    }

    async fn order(&self, order: HubToAgent) {
        let mut started = self.seen.started.subscribe();
        within(started.wait_for(|started| *started)).await.expect("the hub is there");
        // After the end there is nobody to hear it.
        let _ = self.orders.send(order).await;
    }
}

struct Seen {
    output: Mutex<Output>,
    more: Notify,
    shown: Notify,
    started: watch::Sender<bool>,
    input_sent: Mutex<u64>,
    input_taken: watch::Sender<u64>,
    signalled: watch::Sender<bool>,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            output: Mutex::default(),
            more: Notify::new(),
            shown: Notify::new(),
            started: watch::Sender::new(false),
            input_sent: Mutex::default(),
            input_taken: watch::Sender::new(0),
            signalled: watch::Sender::new(false),
        }
    }
}

impl Seen {
    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().expect("not poisoned")
    }
}

#[derive(Default)]
struct Output {
    waiting: VecDeque<(Channel, Bytes)>,
    digest: Sha256,
    /// The stream's length so far.
    stored: u64,
    /// How much of it was looked at.
    shown: u64,
    over: Option<Over>,
}

#[derive(Clone, Copy, PartialEq)]
enum Over {
    /// The command, and all of its output was seen.
    Ended,
    /// The hub, before that.
    Gone,
}

/// Tells, when the hub is gone, whoever waits for it.
struct Gone(Arc<Seen>);

impl Drop for Gone {
    fn drop(&mut self) {
        let mut output = self.0.output.lock().unwrap_or_else(PoisonError::into_inner);
        output.over.get_or_insert(Over::Gone);
        self.0.more.notify_one();
    }
}

/// The hub: grants output as it is looked at, and checks it as a whole.
async fn serve(
    mut link: Link,
    spec: CommandSpec,
    mut orders: mpsc::Receiver<HubToAgent>,
    seen: &Seen,
) {
    let limits = Limits::default();
    let rules = Rules::from(&limits);
    let greeting = within(link.next()).await.expect("a greeting").expect("no error");
    let greeting = codec::decode::<Greeting>(&greeting, rules).remove(0).expect("understood");
    let Greeting::Agent(greeting) = greeting.message else { panic!("an agent") };
    let ack = ConnectionAck {
        protocol: 1,
        tenant: "default".parse().expect("an id"),
        peer: Peer::Agent(greeting.agent),
        hub: HubInstance::from_u128(2),
        queue: QueueEpoch::from_u128(3),
        features: vec![Feature::Binary],
        limits: limits.for_link(),
        heartbeat: Heartbeat { idle_ms: 60_000, timeout_ms: 120_000 },
    };
    say(&mut link, HubToAgent::Ack(ack)).await;
    say(&mut link, HubToAgent::Execute(CommandExecute { command: COMMAND, attempt: 1, spec }))
        .await;

    let mut stream: Option<StreamId> = None;
    let mut end = None;
    loop {
        tokio::select! {
            frame = link.next() => {
                let Some(Ok(frame)) = frame else { break };
                if matches!(frame, Frame::Close(_)) {
                    break;
                }
                for message in codec::decode::<AgentToHub>(&frame, rules) {
                    match message.expect("understood").message {
                        AgentToHub::Started(started) => {
                            stream = Some(started.stream);
                            seen.started.send_replace(true);
                        }
                        AgentToHub::Output(chunk) => {
                            let mut output = seen.output();
                            assert_eq!(chunk.offset, output.stored, "no hole, nothing twice");
                            output.stored += chunk.data.len() as u64;
                            output.digest.update(&chunk.data);
                            output.waiting.push_back((chunk.channel, chunk.data));
                        }
                        AgentToHub::InputTaken(taken) => {
                            seen.input_taken.send_replace(taken.offset);
                        }
                        AgentToHub::Interrupting(word) => {
                            seen.signalled.send_replace(word.stage == InterruptStage::Signalled);
                        }
                        AgentToHub::Complete(complete) => end = Some(complete.end),
                        AgentToHub::Status(_) | AgentToHub::Accepted(_) | AgentToHub::Ping(_) => {}
                        // Typed when the program had just ended.
                        AgentToHub::Error(refusal) if refusal.code == ErrorCode::NotRunning => {}
                        other => panic!("unexpected: {other:?}"),
                    }
                }
            }
            order = orders.recv() => match order {
                Some(order) => say(&mut link, order).await,
                None => break,
            },
            () = seen.shown.notified() => {
                let (stored, shown) = { let output = seen.output(); (output.stored, output.shown) };
                if let Some(stream) = stream {
                    let allowed = shown + limits.grant_bytes;
                    say(&mut link, HubToAgent::Taken(TerminalTaken { stream, stored, allowed })).await;
                }
            }
        }
        if let Some(end) = &end {
            let mut output = seen.output();
            if output.stored == end.end && output.over.is_none() {
                let digest = format!("sha256:{}", hex(&output.digest.clone().finalize()));
                assert!(end.digest.as_ref().is_none_or(|told| *told == digest), "the same bytes");
                output.over = Some(Over::Ended);
            }
        }
        seen.more.notify_one();
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

async fn say(link: &mut Link, message: HubToAgent) {
    // The agent may have gone.
    let _ = link.send(codec::encode(&Envelope::bare(message))).await;
}

/// One end of a link in memory.
struct Link {
    incoming: Pin<Box<dyn Stream<Item = io::Result<Frame>> + Send>>,
    outgoing: Pin<Box<dyn Sink<Frame, Error = io::Error> + Send>>,
}

fn link() -> (Link, Link) {
    let (to_far, at_far) = mpsc::channel(16);
    let (to_near, at_near) = mpsc::channel(16);
    (end_of(to_far, at_near), end_of(to_near, at_far))
}

fn end_of(to: mpsc::Sender<Frame>, from: mpsc::Receiver<Frame>) -> Link {
    let incoming = stream::unfold(from, async |mut from| Some((Ok(from.recv().await?), from)));
    let outgoing = sink::unfold(to, async |to: mpsc::Sender<Frame>, frame| {
        to.send(frame).await.map_err(io::Error::other)?;
        Ok(to)
    });
    Link { incoming: Box::pin(incoming), outgoing: Box::pin(outgoing) }
}

impl Stream for Link {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.as_mut().poll_next(cx)
    }
}

impl Sink<Frame> for Link {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.as_mut().poll_ready(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        self.outgoing.as_mut().start_send(frame)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.as_mut().poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.as_mut().poll_close(cx)
    }
}
