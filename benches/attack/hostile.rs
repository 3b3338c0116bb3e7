//! The attackers, all in a process of their own, each from an address of its
//! own in 127.0.0.0/8: limits per address hold back none of the others.

#![expect(clippy::disallowed_methods, reason = "an attack keeps real time")]

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use trunkline_benches::process;
use trunkline_benches::wire::{HANDSHAKE, Result, client_text};

use crate::hub::WRONG_TOKEN;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attack {
    /// Handshakes byte by byte.
    Loris,
    /// Sockets that say nothing, and such as are through their handshake.
    Idle,
    /// Greetings with a wrong token, as fast as they are refused.
    Guesses,
    /// Dashboards that say everything there is, too often.
    Floods,
    /// Agents that write output that nobody asked for.
    Output,
    /// Dashboards that subscribe to everything and read nothing.
    Deaf,
    /// Dashboards that subscribe to a thousand agents, over and over.
    Explosion,
    /// All of them at once.
    All,
}

impl Attack {
    pub(crate) const ALL: [Self; 8] = [
        Self::Loris,
        Self::Idle,
        Self::Guesses,
        Self::Floods,
        Self::Output,
        Self::Deaf,
        Self::Explosion,
        Self::All,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loris => "loris",
            Self::Idle => "idle",
            Self::Guesses => "guesses",
            Self::Floods => "floods",
            Self::Output => "output",
            Self::Deaf => "deaf",
            Self::Explosion => "explosion",
            Self::All => "all",
        }
    }

    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Loris => "slow handshakes",
            Self::Idle => "silent sockets, half of them upgraded",
            Self::Guesses => "greetings with a wrong token",
            Self::Floods => "dashboards, 2,500 messages/s each",
            Self::Output => "agents, 4,000 pieces/s each",
            Self::Deaf => "subscribed dashboards that do not read",
            Self::Explosion => "dashboards, 1,024 subscriptions each, 210 requests/s",
            Self::All => "all of these",
        }
    }

    /// Hostile links at a time.
    pub(crate) fn links(self) -> usize {
        match self {
            Self::Loris => 2000,
            Self::Idle => 4000,
            Self::Guesses => 100,
            Self::Floods | Self::Output => 20,
            Self::Deaf => 300,
            Self::Explosion => 50,
            Self::All => Self::ALL[..7].iter().map(|attack| attack.links()).sum(),
        }
    }
}

/// What a process of attackers knows.
struct Crowd {
    hub: SocketAddr,
    /// Numbers given out, by which attackers differ.
    numbers: AtomicUsize,
    /// Who has got as far as it wanted, once.
    ready: AtomicUsize,
    links: AtomicU64,
    messages: AtomicU64,
}

/// Attacks until standard input ends; prints a line when all are there, and
/// then what they did.
pub(crate) fn run(attack: Attack, port: u16) -> Result<()> {
    process::raise_file_limit();
    // They share the machine with those whom they attack, which the attackers
    // of others do not.
    rustix::process::nice(19)?;
    let crowd = Arc::new(Crowd {
        hub: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        numbers: AtomicUsize::new(0),
        ready: AtomicUsize::new(0),
        links: AtomicU64::new(0),
        messages: AtomicU64::new(0),
    });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime?;
    runtime.block_on(async {
        let kinds = if attack == Attack::All { &Attack::ALL[..7] } else { &[attack] };
        for kind in kinds {
            for _ in 0..kind.links() {
                tokio::spawn(again_and_again(Arc::clone(&crowd), *kind));
            }
        }
        // Whoever is kept out never gets there.
        let all = async {
            while crowd.ready.load(SeqCst) < attack.links() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = timeout(Duration::from_secs(3), all).await;
        println!("ready");
        tokio::task::spawn_blocking(|| io::Read::read(&mut io::stdin(), &mut [0])).await
    })??;
    println!("{} {}", crowd.links.load(SeqCst), crowd.messages.load(SeqCst));
    runtime.shutdown_background();
    Ok(())
}

/// One attacker: whatever ends its link, it comes back.
async fn again_and_again(crowd: Arc<Crowd>, attack: Attack) {
    let number = crowd.numbers.fetch_add(1, SeqCst);
    // Not all in the same moment.
    sleep(Duration::from_micros(number as u64 * 200)).await;
    let mut is_ready = false;
    loop {
        let mut ready = || {
            if !std::mem::replace(&mut is_ready, true) {
                crowd.ready.fetch_add(1, SeqCst);
            }
        };
        // It fails by being refused or closed: that is what is hoped for.
        let _ = once(&crowd, attack, number, &mut ready).await;
        sleep(Duration::from_millis(20)).await;
    }
}

async fn once(
    crowd: &Crowd,
    attack: Attack,
    number: usize,
    ready: &mut (dyn FnMut() + Send),
) -> io::Result<()> {
    match attack {
        Attack::Loris => {
            let mut socket = crowd.dial(number, None).await?;
            ready();
            for byte in HANDSHAKE {
                socket.write_all(&[*byte]).await?;
                crowd.messages.fetch_add(1, SeqCst);
                sleep(Duration::from_millis(250)).await;
            }
            drain(&mut socket).await
        }
        Attack::Idle => {
            let mut socket = crowd.dial(number, None).await?;
            if number.is_multiple_of(2) {
                upgrade(&mut socket).await?;
            }
            ready();
            drain(&mut socket).await
        }
        Attack::Guesses => {
            let mut socket = crowd.dial(number, None).await?;
            upgrade(&mut socket).await?;
            ready();
            crowd.say(&mut socket, &dashboard(number, WRONG_TOKEN)).await?;
            // Once it is refused it has no more to wait for.
            socket.read_u8().await.map(|_| ())
        }
        Attack::Floods => {
            let mut socket = crowd.greeted(number, &dashboard(number, ""), None).await?;
            ready();
            let (mut hub, mut flood) = socket.split();
            let flooding = async {
                let begin = Instant::now();
                for round in 0_u32.. {
                    let mut frames = Vec::new();
                    for n in 0..25 {
                        frames.extend(text(&anything(number, round as usize * 25 + n)));
                    }
                    flood.write_all(&frames).await?;
                    crowd.messages.fetch_add(25, SeqCst);
                    let due = Duration::from_millis(10) * round;
                    sleep(due.saturating_sub(begin.elapsed())).await;
                }
                io::Result::Ok(())
            };
            tokio::try_join!(flooding, drain(&mut hub)).map(|_| ())
        }
        Attack::Output => {
            let mut socket = crowd.greeted(number, &agent(number), None).await?;
            ready();
            let (mut hub, mut flood) = socket.split();
            let flooding = async {
                let begin = Instant::now();
                let pieces = piece().repeat(40);
                for round in 0_u32.. {
                    flood.write_all(&pieces).await?;
                    crowd.messages.fetch_add(40, SeqCst);
                    let due = Duration::from_millis(10) * round;
                    sleep(due.saturating_sub(begin.elapsed())).await;
                }
                io::Result::Ok(())
            };
            tokio::try_join!(flooding, drain(&mut hub)).map(|_| ())
        }
        Attack::Deaf => {
            let mut socket = crowd.greeted(number, &dashboard(number, ""), Some(4096)).await?;
            crowd.say(&mut socket, &subscribe(["bench", "ordered"])).await?;
            ready();
            // Its link is the hub's to end.
            loop {
                sleep(Duration::from_secs(1)).await;
                crowd.say(&mut socket, r#"{"type":"heartbeat:ping"}"#).await?;
            }
        }
        Attack::Explosion => {
            let mut socket = crowd.greeted(number, &dashboard(number, ""), None).await?;
            ready();
            let names: Vec<String> = (0..1023).map(|n| format!("nobody-{n}")).collect();
            let all = subscribe(names.iter().map(String::as_str).chain(["bench"]));
            let all = text(&all);
            let (mut hub, mut ask) = socket.split();
            let asking = async {
                // Each of these is answered with all that is subscribed to.
                let nothing = text(r#"{"type":"unsubscribe","payload":{"terminals":[]}}"#);
                let nothing = nothing.repeat(20);
                loop {
                    ask.write_all(&all).await?;
                    ask.write_all(&nothing).await?;
                    crowd.messages.fetch_add(21, SeqCst);
                    sleep(Duration::from_millis(100)).await;
                }
                #[expect(unreachable_code, reason = "says what it would return")]
                io::Result::Ok(())
            };
            tokio::try_join!(asking, drain(&mut hub)).map(|_| ())
        }
        Attack::All => Ok(()), // each is one of the others
    }
}

impl Crowd {
    /// From an address of the attacker's own.
    async fn dial(&self, number: usize, receive_bytes: Option<u32>) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        if let Some(bytes) = receive_bytes {
            socket.set_recv_buffer_size(bytes)?;
        }
        let [high, low] = u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes();
        socket.bind(SocketAddr::from((Ipv4Addr::new(127, 1, high, low), 0)))?;
        let socket = socket.connect(self.hub).await?;
        self.links.fetch_add(1, SeqCst);
        Ok(socket)
    }

    async fn greeted(
        &self,
        number: usize,
        greeting: &str,
        receive_bytes: Option<u32>,
    ) -> io::Result<TcpStream> {
        let mut socket = self.dial(number, receive_bytes).await?;
        upgrade(&mut socket).await?;
        self.say(&mut socket, greeting).await?;
        let mut heard = [0; 2048];
        let len = socket.read(&mut heard).await?;
        let ack = b"connection:ack";
        let is_let_in = heard[..len].windows(ack.len()).any(|window| window == ack);
        if is_let_in { Ok(socket) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    async fn say(&self, socket: &mut TcpStream, json: &str) -> io::Result<()> {
        self.messages.fetch_add(1, SeqCst);
        socket.write_all(&text(json)).await
    }
}

async fn upgrade(socket: &mut TcpStream) -> io::Result<()> {
    socket.write_all(HANDSHAKE).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if socket.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    if head.starts_with(b"HTTP/1.1 101 ") {
        Ok(())
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Reads until the hub has had enough, and does not wait for it to say so twice.
async fn drain(socket: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<()> {
    let flood = 4429_u16.to_be_bytes();
    let is_close = |frame: &[u8]| frame[0] == 0x88 && frame[2..] == flood;
    let mut away = [0; 4096];
    loop {
        let len = socket.read(&mut away).await?;
        if len == 0 || away[..len].windows(4).any(is_close) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn text(json: &str) -> Vec<u8> {
    // Nothing here is longer than 64 KiB.
    client_text(json).unwrap_or_default()
}

fn dashboard(number: usize, token: &str) -> String {
    format!(
        r#"{{"type":"dashboard:connect","payload":{{"protocols":[1],"dashboard":"hostile-{number}","token":"{token}"}}}}"#
    )
}

fn agent(number: usize) -> String {
    format!(
        r#"{{"type":"agent:connect","payload":{{"protocols":[1],"agent":"hostile-{number}","instance":"0191d4a8-5a3c-7f00-8000-0000000000ac"}}}}"#
    )
}

fn subscribe<'a>(agents: impl IntoIterator<Item = &'a str>) -> String {
    let all = agents.into_iter().map(|agent| format!(r#"{{"agent":"{agent}","from":"start"}}"#));
    let all = all.collect::<Vec<_>>().join(",");
    format!(r#"{{"type":"subscribe","id":"s","payload":{{"terminals":[{all}]}}}}"#)
}

/// Everything that a dashboard may say, and things that nobody may.
fn anything(number: usize, n: usize) -> String {
    let command = format!("0191d4a8-5a3c-7f00-a{:03x}-{n:012x}", number % 4096);
    match n % 12 {
        0 => r#"{"type":"heartbeat:ping"}"#.into(),
        1 => format!(
            r#"{{"type":"command:request","id":"r{n}","payload":{{"command":"{command}","agent":"absent-{}","spec":{{"run":{{"text":"x"}}}}}}}}"#,
            n % 100
        ),
        2 => subscribe(["bench", "ordered"]),
        3 => r#"{"type":"unsubscribe","payload":{"terminals":[{"agent":"bench"}]}}"#.into(),
        4 => format!(r#"{{"type":"command:interrupt","payload":{{"command":"{command}"}}}}"#),
        5 => r#"{"type":"system:emergency-stop","payload":{"agents":["nobody"]}}"#.into(),
        6 => format!(
            r#"{{"type":"terminal:input","payload":{{"command":"{command}","offset":0,"data":"x"}}}}"#
        ),
        7 => format!(
            r#"{{"type":"terminal:shown","payload":{{"stream":"{command}","offset":{n}}}}}"#
        ),
        8 => r#"{"type":"auth:refresh-token","payload":{"token":"wrong"}}"#.into(),
        9 => "nonsense".into(),
        10 => r#"{"type":"no:such-thing"}"#.into(),
        _ => {
            let pings = [r#"{"type":"heartbeat:ping"}"#; 20].join(",");
            format!(r#"{{"type":"batch","payload":{{"messages":[{pings}]}}}}"#)
        }
    }
}

/// A kilobyte of output of a stream that there is not.
fn piece() -> Vec<u8> {
    let mut frame = vec![0x82, 0xfe];
    frame.extend((28_u16 + 1024).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend([1, 0, 0, 0]);
    frame.extend(0x0191_d4a8_5a3c_7f00_8000_0000_0000_00ff_u128.to_be_bytes());
    frame.extend(0_u64.to_be_bytes());
    frame.resize(frame.len() + 1024, b'x');
    frame
}
