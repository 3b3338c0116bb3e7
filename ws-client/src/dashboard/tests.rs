//! The handles against a scripted hub, over links in memory. Time is tokio's,
//! paused: it passes when nothing else can happen.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Sink, Stream};
use tokio::sync::mpsc;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec;
use trunkline_protocol::ids::{HubInstance, QueueEpoch, StreamId};
use trunkline_protocol::message::{
    AgentList, Channel, CommandChanged, CommandState, CommandStatus, Direction as _, Envelope,
    Greeting, HubToDashboard, RefreshNeeded, RosterPosition, TerminalInputTaken, TerminalOutput,
};

use super::*;
use crate::core::dashboard::tests::{ack, decode, ended, opened, rules, state};
use crate::core::dashboard::{Audit, TerminalEvent};

const S: StreamId = StreamId::from_u128(1);
const C: CommandId = CommandId::from_u128(0xc);

#[tokio::test(start_paused = true)]
async fn a_command_is_run_watched_and_ended() {
    let (dashboard, mut hub) = start();
    let story = async {
        let command = dashboard.run("a1", Request::argv(["echo", "hi"])).await.unwrap();
        let mut terminal = command.terminal();
        let mut text = Vec::new();
        let audit = loop {
            match terminal.next().await.unwrap() {
                TerminalEvent::Output { data, .. } => text.extend_from_slice(&data),
                TerminalEvent::Ended { audit, .. } => break audit,
                _ => {} // the announcement
            }
        };
        assert_eq!(terminal.next().await, None);
        assert_eq!((text.as_slice(), audit), (b"hi\n".as_slice(), Audit::Verified));
        assert_eq!(terminal.view(S).unwrap().export_plain(), "hi\n");
        let state = command.ended().await.unwrap();
        assert_eq!(state.end.as_ref().unwrap().exit_code, Some(0));
        assert_eq!(command.state(), Some(state));
    };
    let script = async {
        let mut link = hub.link().await;
        link.list(&[]);
        let (id, message) = link.hear().await;
        let DashboardToHub::Request(request) = message else { panic!("{message:?}") };
        link.ok(id);
        link.list_command(&state(request.command, CommandStatus::Running));
        link.hear_kind("subscribe").await;
        link.say(HubToDashboard::Opened(opened(request.command, S, 0, 0)));
        link.list_command(&ended(request.command, S, "hi\n"));
        link.output(0, "hi\n");
        link
    };
    let ((), _link) = tokio::join!(story, script);
}

#[tokio::test(start_paused = true)]
async fn a_request_outlives_its_link() {
    let (dashboard, mut hub) = start();
    let script = async {
        let mut link = hub.link().await;
        let (first, _) = link.hear().await;
        drop(link);
        let mut link = hub.link().await;
        let (again, _) = link.hear().await;
        assert_eq!(first, again);
        link.say(HubToDashboard::Ok(Accepted {
            in_reply_to: Some(again),
            stopped: Some(2),
            ..Accepted::default()
        }));
        link
    };
    let (stopped, _link) = tokio::join!(dashboard.emergency_stop(None), script);
    assert_eq!(stopped, Ok(2));
}

#[tokio::test(start_paused = true)]
async fn an_absent_hub_is_waited_for_only_so_long() {
    let (dashboard, _hub) = start();
    let answer = dashboard.interrupt(C).await;
    assert!(matches!(answer, Err(RequestError::TimedOut { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn connected_means_with_the_whole_roster() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let early = tokio::time::timeout(Duration::from_secs(5), dashboard.connected()).await;
    assert!(early.is_err(), "the roster is missing");
    link.list(&[state(C, CommandStatus::Running)]);
    dashboard.connected().await.unwrap();
    assert_eq!(dashboard.roster().borrow().commands().len(), 1);
    assert_eq!(dashboard.command(C).state().unwrap().status, CommandStatus::Running);
}

#[tokio::test(start_paused = true)]
async fn a_refused_dashboard_says_why() {
    let (dashboard, mut hub) = start();
    let mut link = hub.greeted().await;
    link.send(Frame::Close(Close::new(CloseCode::Forbidden, "not here")));
    let why = dashboard.connected().await.unwrap_err().why;
    assert_eq!((why.code, why.reason.as_str()), (CloseCode::Forbidden, "not here"));
    assert_eq!(dashboard.interrupt(C).await, Err(RequestError::Closed));
    assert_eq!(dashboard.command(C).ended().await, Err(Lost::Closed { command: C }));
}

#[tokio::test(start_paused = true)]
async fn closing_ends_everything_that_waits() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let mut terminal = dashboard.terminal(Target::Command(C));
    let mut events = dashboard.events();
    let other = dashboard.clone();
    let request = tokio::spawn(async move { other.interrupt(C).await });
    link.hear_kind("subscribe").await;
    link.hear_kind("command:interrupt").await;
    let closing = dashboard.close();
    let script = async {
        link.hear_kind("dashboard:disconnect").await;
        assert!(matches!(link.frame().await, Some(Frame::Close(_))));
        drop(link);
    };
    tokio::join!(closing, script);
    assert_eq!(request.await.unwrap(), Err(RequestError::Closed));
    assert_eq!(terminal.next().await, None);
    while events.next().await.is_some() {}
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_handle_says_goodbye() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let terminal = dashboard.terminal(Target::Command(C));
    drop(dashboard);
    link.hear_kind("subscribe").await;
    drop(terminal);
    link.hear_kind("dashboard:disconnect").await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_terminal_ends_its_subscription() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let terminal = dashboard.watch_agent("a1".parse().unwrap());
    link.hear_kind("subscribe").await;
    drop(terminal);
    link.hear_kind("unsubscribe").await;
}

#[tokio::test(start_paused = true)]
async fn typing_waits_for_room() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    link.list(&[state(C, CommandStatus::Running)]);
    dashboard.connected().await.unwrap();
    let typing = dashboard.input(C, vec![b'x'; 100 * 1024]);
    let script = async {
        let mut taken = 0;
        while taken < 100 * 1024 {
            let (_, message) = link.hear().await;
            let DashboardToHub::Input(input) = message else { panic!("{message:?}") };
            assert!(input.offset + input.data.len() as u64 <= taken + 64 * 1024);
            if input.offset == taken {
                taken += input.data.len() as u64;
                let writer = dashboard.id();
                let taken = TerminalInputTaken { command: C, writer, offset: taken, resend: false };
                link.say(HubToDashboard::InputTaken(taken));
            }
        }
    };
    let (typed, ()) = tokio::join!(typing, script);
    assert_eq!(typed, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn refused_input_reaches_whoever_still_types() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let script = async {
        let (id, _) = link.hear().await;
        let refusal = Refusal::new(ErrorCode::Forbidden, "look, do not touch");
        link.say(HubToDashboard::Error(refusal.reply_to(Some(id))));
    };
    let (typed, ()) = tokio::join!(dashboard.input(C, vec![b'x'; 100 * 1024]), script);
    assert!(matches!(typed, Err(InputError::Refused(_))), "{typed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_command_is_told_to_who_waits_for_it() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    link.list(&[state(C, CommandStatus::Running)]);
    dashboard.connected().await.unwrap();
    let command = dashboard.command(C);
    link.list(&[]);
    assert_eq!(command.ended().await, Err(Lost::ByHub { command: C }));
    assert_eq!(command.state().unwrap().status, CommandStatus::Running, "what was last known");
}

#[tokio::test(start_paused = true)]
async fn a_slow_listener_is_told_how_much_it_missed() {
    let (dashboard, mut hub) = start();
    let mut link = hub.link().await;
    let mut events = dashboard.events();
    link.list(&[]);
    for _ in 0..2000 {
        link.list_command(&state(C, CommandStatus::Running));
        tokio::task::yield_now().await;
    }
    let stages = dashboard.command(C);
    stages.reached(CommandStatus::Running).await.unwrap();
    link.list_command(&state(C, CommandStatus::Completed));
    stages.ended().await.unwrap();
    let Some(DashboardEvent::Missed(missed)) = events.next().await else {
        panic!("nothing missed")
    };
    assert!(missed >= 900, "{missed}");
}

#[tokio::test(start_paused = true)]
async fn a_token_is_renewed_without_losing_the_link() {
    let (hub, connector) = memory();
    let mut hub = hub;
    let asked = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counter = Arc::clone(&asked);
    let tokens = move |_refused| {
        let n = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        std::future::ready(Ok(Secret::new(format!("token {n}"))))
    };
    let _dashboard = Dashboard::over(connector).token_source(tokens).connect();
    let mut link = hub.link().await;
    link.say(HubToDashboard::RefreshNeeded(RefreshNeeded { expires_in_ms: 60_000 }));
    let (_, message) = link.hear().await;
    let DashboardToHub::RefreshToken(refresh) = message else { panic!("{message:?}") };
    assert_eq!(refresh.token.reveal(), "token 1");
}

// ---- the scripted hub -------------------------------------------------------

fn start() -> (Dashboard, Hub) {
    let (hub, connector) = memory();
    (Dashboard::over(connector).connect(), hub)
}

/// A hub that nobody runs: it says what the test says.
struct Hub {
    links: mpsc::Receiver<HubEnd>,
    revision: u64,
}

impl Hub {
    /// The next link, greeted and acknowledged.
    async fn link(&mut self) -> HubEnd {
        let mut link = self.greeted().await;
        let me = link.me.clone();
        let ack = ack(&me, QueueEpoch::from_u128(1), HubInstance::from_u128(1));
        link.say(HubToDashboard::Ack(ack));
        link
    }

    async fn greeted(&mut self) -> HubEnd {
        let mut link = self.links.recv().await.expect("the dashboard dials");
        let frame = link.frame().await.expect("a greeting");
        let greeting = codec::decode::<Greeting>(&frame, rules()).remove(0).unwrap().message;
        let Greeting::Dashboard(greeting) = greeting else { panic!("{greeting:?}") };
        link.me = greeting.dashboard.unwrap();
        self.revision += 1_000_000; // whatever link it is, news is news
        link.revision = self.revision;
        link
    }
}

struct HubEnd {
    heard: mpsc::Receiver<Frame>,
    said: mpsc::Sender<Frame>,
    waiting: VecDeque<(RequestId, DashboardToHub)>,
    me: DashboardId,
    revision: u64,
}

impl HubEnd {
    fn send(&mut self, frame: Frame) {
        self.said.try_send(frame).expect("the dashboard reads");
    }

    fn say(&mut self, message: HubToDashboard) {
        self.send(codec::encode(&Envelope::bare(message)));
    }

    fn ok(&mut self, id: RequestId) {
        self.say(HubToDashboard::Ok(Accepted { in_reply_to: Some(id), ..Accepted::default() }));
    }

    async fn frame(&mut self) -> Option<Frame> {
        self.heard.recv().await
    }

    /// The next request.
    async fn hear(&mut self) -> (RequestId, DashboardToHub) {
        loop {
            if let Some(next) = self.waiting.pop_front() {
                return next;
            }
            let frame = self.frame().await.expect("the dashboard is there");
            for envelope in decode(&frame) {
                let id = envelope.id.unwrap_or_else(|| "none".parse().unwrap());
                self.waiting.push_back((id, envelope.message));
            }
        }
    }

    async fn hear_kind(&mut self, kind: &str) {
        let (_, message) = self.hear().await;
        assert_eq!(message.kind(), kind);
    }

    fn at(&mut self) -> RosterPosition {
        self.revision += 1;
        RosterPosition { hub: HubInstance::from_u128(1), revision: self.revision }
    }

    fn list(&mut self, commands: &[CommandState]) {
        let at = self.at();
        self.say(HubToDashboard::List(AgentList {
            at,
            reset: true,
            complete: true,
            agents: Vec::new(),
            commands: commands.to_vec(),
            queues: Vec::new(),
        }));
    }

    fn list_command(&mut self, state: &CommandState) {
        let at = self.at();
        let changed = CommandChanged { at, command: Some(state.clone()), removed: None };
        self.say(HubToDashboard::Command(changed));
    }

    fn output(&mut self, offset: u64, text: &str) {
        let data = Bytes::copy_from_slice(text.as_bytes());
        let output = TerminalOutput { stream: S, offset, channel: Channel::Stdout, data };
        self.send(codec::encode_output(&output));
    }
}

fn memory() -> (Hub, impl Connector) {
    let (dialled, links) = mpsc::channel(16);
    let connector = move || {
        let (to_dashboard, from_hub) = mpsc::channel(256);
        let (to_hub, heard) = mpsc::channel(256);
        let me = "nobody".parse().unwrap();
        let end = HubEnd { heard, said: to_dashboard, waiting: VecDeque::new(), me, revision: 0 };
        let dialled = dialled.clone();
        async move {
            dialled
                .send(end)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok(MemoryLink { hears: from_hub, says: Some(to_hub) })
        }
    };
    (Hub { links, revision: 0 }, connector)
}

struct MemoryLink {
    hears: mpsc::Receiver<Frame>,
    says: Option<mpsc::Sender<Frame>>,
}

impl Stream for MemoryLink {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.hears.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

impl Sink<Frame> for MemoryLink {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        let says = self.says.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        says.try_send(frame).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.says = None;
        Poll::Ready(Ok(()))
    }
}
