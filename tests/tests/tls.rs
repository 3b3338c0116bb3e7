//! `wss://`: what it carries, and to whom it says nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "stories")]

#[path = "tls/authority.rs"]
mod authority;
#[path = "tls/ears.rs"]
mod ears;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::subscriber::set_default;
use tracing_subscriber::Layer;
use tracing_subscriber::prelude::*;
use trunkline_client::rustls::crypto::aws_lc_rs;
use trunkline_client::rustls::pki_types::CertificateDer;
use trunkline_client::rustls::pki_types::pem::PemObject as _;
use trunkline_client::rustls::version::TLS12;
use trunkline_client::rustls::{ClientConfig, ProtocolVersion, RootCertStore};
use trunkline_client::{
    Agent, Audit, Backoff, ConnectionState, Connector as _, Dashboard, Programs, Request, Terminal,
    TerminalEvent, TlsError, WebSocket,
};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::Presence;
use trunkline_server::{Hub, TokenTable};
use trunkline_tests::process::{PATIENCE, Process, within};
use trunkline_tests::proxy::{Cut, Proxy, Way};

use crate::authority::Authority;
use crate::ears::{Ears, Manner};

const TOKEN: &str = "a-token-that-nobody-may-see";

// ---- what it carries ---------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_and_its_output_cross_a_hub_with_a_certificate_for_its_name() {
    carries_a_command("localhost").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_may_be_for_an_address() {
    carries_a_command("127.0.0.1").await;
}

async fn carries_a_command(host: &str) {
    let authority = Authority::new("of the test");
    let tokens = TokenTable::new();
    let tokens = tokens.agent(TOKEN, "acme", "build-1").unwrap();
    let tokens = tokens.dashboard("ann's", "acme", "ann").unwrap();
    let hub = Hub::builder().authenticator(tokens).start().await.unwrap();
    let address = serve(&hub, authority.signs(host).acceptor()).await;
    let url = format!("wss://{host}:{}", address.port());
    let to_hub = || WebSocket::new(&url).unwrap().roots_pem(authority.pem.as_bytes()).unwrap();
    let agent = Agent::over(to_hub(), "build-1").unwrap().token(TOKEN).connect(Programs::new());
    let ann = Dashboard::over(to_hub()).token("ann's").connect();
    is_there(&ann).await;
    let command = ann.run("build-1", Request::shell("read a; echo got $a; exit 3")).await.unwrap();
    within(ann.input(command.id(), "typed\n")).await.unwrap();
    assert_eq!(read(&mut command.terminal()).await, b"got typed\n");
    let end = within(command.ended()).await.unwrap();
    assert_eq!(end.end.as_ref().unwrap().exit_code, Some(3));
    agent.stop().await;
    ann.close().await;
    within(hub.drain(Duration::ZERO)).await;
    assert_eq!(hub.links(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cables_cut_without_a_word_lose_no_byte() {
    let authority = Authority::new("of the test");
    let hub = Hub::builder().start().await.unwrap();
    let address = serve(&hub, authority.signs("127.0.0.1").acceptor()).await;
    let cable = Proxy::start(address).await.unwrap();
    let url = format!("wss://{}", cable.address());
    let to_hub = || WebSocket::new(&url).unwrap().roots_pem(authority.pem.as_bytes()).unwrap();
    let _agent =
        Agent::over(to_hub(), "build-1").unwrap().backoff(hasty()).connect(Programs::new());
    let ann = Dashboard::over(to_hub()).backoff(hasty()).connect();
    is_there(&ann).await;
    let line = "0123456789abcdef".repeat(64);
    let block = format!("i=0; while [ $i -lt 1000 ]; do echo {line}; i=$((i+1)); done");
    let script = format!("for n in 1 2 3 4; do read go; {block}; done");
    let command = ann.run("build-1", Request::shell(script)).await.unwrap();
    // In the middle of TLS records, on the way up and on the way down, with and
    // without an RST; each while a block of a megabyte passes.
    let cuts = [
        (Way::Up, 300_001, Cut::Close),
        (Way::Down, 200_003, Cut::Close),
        (Way::Up, 500_007, Cut::Reset),
        (Way::Down, 300_011, Cut::Reset),
    ];
    let cutting = async {
        for (way, bytes, cut) in cuts {
            let before = cable.counts().cut_by_bytes;
            cable.cut_after(way, bytes, cut);
            within(ann.input(command.id(), "go\n")).await.unwrap();
            while cable.counts().cut_by_bytes == before {
                let _ = timeout(Duration::from_millis(5), std::future::pending::<()>()).await;
            }
        }
    };
    let mut terminal = command.terminal();
    let (bytes, ()) = tokio::join!(read(&mut terminal), within(cutting));
    let expected = format!("{line}\n").repeat(4_000);
    assert!(bytes == expected.as_bytes(), "{} of {} bytes", bytes.len(), expected.len());
    assert_eq!(cable.counts().cut_by_bytes, 4);
}

#[tokio::test]
async fn a_configuration_of_ones_own_is_kept_to_except_for_its_protocols() {
    let authority = Authority::new("of the test");
    let acceptor = authority.signs("localhost").acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("wss://localhost:{}", listener.local_addr().unwrap().port());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let hub = || WebSocket::new(&url).unwrap();
    let usual = hub().roots_pem(authority.pem.as_bytes()).unwrap();
    let own = hub().tls_config(&config).unwrap();
    for (hub, expected) in [(usual, ProtocolVersion::TLSv1_3), (own, ProtocolVersion::TLSv1_2)] {
        let accepting = async {
            let (socket, _) = listener.accept().await.unwrap();
            let tls = acceptor.accept(socket).await.unwrap();
            let (_, session) = tls.get_ref();
            (session.protocol_version(), session.alpn_protocol().map(<[u8]>::to_vec))
        };
        let (_, (version, protocol)) = within(async { tokio::join!(hub.dial(), accepting) }).await;
        assert_eq!(version, Some(expected));
        assert_eq!(protocol.as_deref(), Some(&b"http/1.1"[..]));
    }
}

// ---- to whom it says nothing ---------------------------------------------------

/// Has an agent try a few times; returns what its user is shown.
async fn tries(hub: WebSocket) -> String {
    tries_by(hasty(), hub).await
}

async fn tries_by(backoff: Backoff, hub: WebSocket) -> String {
    let agent = Agent::over(hub, "build-1").unwrap();
    let agent = agent.token(TOKEN).backoff(backoff).connect(Programs::new());
    let mut connection = agent.connection();
    let tried = connection.wait_for(|state| {
        assert!(!state.is_over(), "{state:?}");
        matches!(state, ConnectionState::Reconnecting { attempt: 3.., .. })
    });
    let ConnectionState::Reconnecting { why, .. } = within(tried).await.unwrap().clone() else {
        panic!("it waits for the next attempt")
    };
    why.reason
}

#[tokio::test]
async fn who_cannot_prove_to_be_the_hub_hears_nothing() {
    let (ours, other) = (Authority::new("of the test"), Authority::new("of somebody else"));
    for (signed, why) in [
        (other.signs("localhost"), "signed by nobody who is trusted here"),
        (ours.signs("hub.example"), "it is for another name"),
        (ours.signs("127.0.0.1"), "it is for another name"),
        (ours.signed_long_ago("localhost"), "it has expired"),
        (ours.signs_ahead("localhost"), "it is not valid yet"),
    ] {
        let ears = Ears::listen(Manner::Tls(signed.acceptor())).await;
        let url = format!("wss://localhost:{}", ears.port);
        let hub = WebSocket::new(&url).unwrap().roots_pem(ours.pem.as_bytes()).unwrap();
        let error = hub.dial().await.err().unwrap();
        let error = error.get_ref().unwrap().downcast_ref::<TlsError>().unwrap();
        assert!(matches!(error, TlsError::Certificate { .. }), "{error:?}");
        let said = tries(hub).await;
        assert_eq!(said, format!("certificate not accepted: {why} (localhost)"));
        let heard = ears.heard();
        assert_eq!(heard.through_tls, b"", "{why}");
        assert!(is_tls(&heard.raw), "{why}: {:?}", heard.raw);
    }
}

/// The ears above are not deaf.
#[tokio::test]
async fn who_can_prove_it_is_heard_and_hears() {
    let authority = Authority::new("of the test");
    let ears = Ears::listen(Manner::Tls(authority.signs("localhost").acceptor())).await;
    let url = format!("wss://localhost:{}", ears.port);
    let hub = WebSocket::new(&url).unwrap().roots_pem(authority.pem.as_bytes()).unwrap();
    let dialling = tokio::spawn(async move { hub.dial().await.err() });
    ears.until(|heard| heard.through_tls.ends_with(b"\r\n\r\n")).await;
    let heard = ears.heard();
    assert!(heard.through_tls.starts_with(b"GET / HTTP/1.1\r\n"));
    assert!(is_tls(&heard.raw));
    // The dial is given up: its connection goes with it.
    dialling.abort();
    ears.until(|heard| heard.ended == 1).await;
}

#[tokio::test]
async fn a_hub_without_tls_behind_wss_gets_no_request() {
    let ears = Ears::listen(Manner::Plain).await;
    let authority = Authority::new("of the test");
    let hub = WebSocket::new(&format!("wss://127.0.0.1:{}", ears.port)).unwrap();
    let hub = hub.roots_pem(authority.pem.as_bytes()).unwrap();
    let error = hub.dial().await.err().unwrap();
    let error = error.get_ref().unwrap().downcast_ref::<TlsError>().unwrap();
    assert!(matches!(error, TlsError::Handshake { .. }), "{error:?}");
    let said = tries(hub).await;
    assert_eq!(said, "no TLS: the hub answers in something else (127.0.0.1)");
    assert!(is_tls(&ears.heard().raw));
}

#[tokio::test]
async fn a_hub_with_tls_behind_ws_gets_a_request_without_the_token() {
    let authority = Authority::new("of the test");
    let hub = Hub::builder().start().await.unwrap();
    let address = serve(&hub, authority.signs("127.0.0.1").acceptor()).await;
    let said = tries(WebSocket::new(&format!("ws://{address}")).unwrap()).await;
    assert!(!said.is_empty());
    let ears = Ears::listen(Manner::Plain).await;
    tries(WebSocket::new(&format!("ws://127.0.0.1:{}", ears.port)).unwrap()).await;
    let heard = String::from_utf8(ears.heard().raw).unwrap();
    assert!(heard.starts_with("GET / HTTP/1.1\r\n"), "{heard}");
    // Requests, and nothing between them: the greeting was not sent.
    for request in heard.split_terminator("\r\n\r\n") {
        assert!(request.starts_with("GET / HTTP/1.1\r\n"), "{request}");
        assert!(!request.to_ascii_lowercase().contains("authorization"), "{request}");
        assert!(!request.contains(TOKEN), "{request}");
    }
}

#[tokio::test]
async fn a_handshake_without_an_answer_ends_with_the_attempt() {
    let ears = Ears::listen(Manner::Mute).await;
    let authority = Authority::new("of the test");
    let hub = WebSocket::new(&format!("wss://127.0.0.1:{}", ears.port)).unwrap();
    let hub = hub.roots_pem(authority.pem.as_bytes()).unwrap();
    let impatient = Backoff { attempt_timeout: Duration::from_millis(300), ..hasty() };
    assert_eq!(tries_by(impatient, hub).await, "no answer in time");
    ears.until(|heard| heard.ended >= 3).await;
    assert!(is_tls(&ears.heard().raw));
}

// ---- the platform's roots -----------------------------------------------------

/// As processes, since where the roots are is said in the environment.
#[tokio::test]
async fn the_platforms_roots_are_believed_and_without_any_nobody_is() {
    let authority = Authority::new("of the test");
    let signed = authority.signs("localhost");
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, &authority.pem).unwrap();
    let hub = Process::start(
        Command::new(env!("CARGO_BIN_EXE_hub"))
            .args(["--listen", "127.0.0.1:0", "--tls-cert"])
            .arg(&*signed.cert())
            .arg("--tls-key")
            .arg(&*signed.key()),
    );
    let address = hub.says("hub: listening on wss://").await;
    let port = address.parse::<SocketAddr>().unwrap().port();
    let agent = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_agent"));
        let url = format!("wss://localhost:{port}");
        command.args(["--no-journal", "--name", "build-1", "--hub", &url]);
        command.env_remove("SSL_CERT_DIR").env_remove("SSL_CERT_FILE");
        command
    };
    let none = Process::start(agent().env("SSL_CERT_FILE", folder.path().join("none.pem")));
    let said = none.says("agent: no link (").await;
    assert!(said.contains("no root certificates on this machine"), "{said}");
    let others = Process::start(agent().env("SSL_CERT_FILE", &*authority_file(&folder)));
    let said = others.says("agent: no link (").await;
    assert!(said.contains("signed by nobody who is trusted here (localhost)"), "{said}");
    let platform = Process::start(agent().env("SSL_CERT_FILE", &ca));
    platform.says("agent: connected").await;
    drop(platform);
    let given = Process::start(agent().arg("--ca").arg(&ca));
    given.says("agent: connected").await;
}

fn authority_file(folder: &tempfile::TempDir) -> Box<std::path::Path> {
    let file = folder.path().join("other.pem");
    std::fs::write(&file, Authority::new("of somebody else").pem).unwrap();
    file.into()
}

// ---- the hub ------------------------------------------------------------------

#[tokio::test]
async fn handshakes_that_stall_keep_nobody_waiting_and_end_in_time() {
    let authority = Authority::new("of the test");
    let limits = Limits { greeting_timeout: Duration::from_millis(500), ..Limits::default() };
    let hub = Hub::builder().limits(limits).start().await.unwrap();
    let address = serve(&hub, authority.signs("127.0.0.1").acceptor()).await;
    let mut stalled = Vec::new();
    for said in [&b""[..], b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00"] {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(said).await.unwrap();
        stalled.push(socket);
    }
    let mut wrong = TcpStream::connect(address).await.unwrap();
    wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stalled.push(wrong);
    let to_hub = WebSocket::new(&format!("wss://{address}")).unwrap();
    let ann = Dashboard::over(to_hub.roots_pem(authority.pem.as_bytes()).unwrap()).connect();
    within(ann.connected()).await.unwrap();
    for mut socket in stalled {
        let mut away = Vec::new();
        // With an end or a reset, whichever comes first.
        let _ = within(socket.read_to_end(&mut away)).await;
    }
    assert_eq!(hub.links(), 1);
}

#[test]
fn files_that_do_not_do_are_named() {
    let authority = Authority::new("of the test");
    let (one, other) = (authority.signs("localhost"), authority.signs("localhost"));
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let missing = folder.path().join("missing.pem");
    let (cert, key, other_key) = (one.cert(), one.key(), other.key());
    for (cert, key, blamed, why) in [
        (&*missing, &*key, &*missing, "No such file"),
        (&*cert, &*missing, &*missing, "No such file"),
        (&*empty, &*key, &*empty, "there is no certificate in it"),
        (&*cert, &*empty, &*empty, "there is no private key in it"),
        (&*key, &*key, &*key, "there is no certificate in it"),
        (&*cert, &*cert, &*cert, "there is no private key in it"),
        (&*cert, &*other_key, &*other_key, "the key is not that of the certificate"),
    ] {
        let said = trunkline_examples::tls::acceptor(cert, key).err().unwrap().to_string();
        assert!(said.starts_with(&blamed.display().to_string()), "{said}");
        assert!(said.contains(why), "{said}");
        assert!(!said.contains("BEGIN"), "{said}");
    }
}

// ---- without it -----------------------------------------------------------------

#[tokio::test]
async fn a_token_that_leaves_the_machine_in_plain_text_is_warned_of_once() {
    for (url, token, expected) in [
        // On this machine nothing listens there, so that an attempt fails at once.
        ("ws://0.0.0.0:1", Some(TOKEN), 1),
        ("ws://0.0.0.0:1", None, 0),
        ("ws://127.0.0.1:1", Some(TOKEN), 0),
        ("wss://0.0.0.0:1", Some(TOKEN), 0),
    ] {
        let warnings = Arc::new(AtomicUsize::new(0));
        let counted = Warnings(Arc::clone(&warnings));
        let _listening = set_default(tracing_subscriber::registry().with(counted));
        let dashboard = Dashboard::builder(url).unwrap().backoff(hasty());
        let dashboard = match token {
            Some(token) => dashboard.token(token),
            None => dashboard,
        };
        let dashboard = dashboard.connect();
        let mut connection = dashboard.connection();
        let tried = connection
            .wait_for(|state| matches!(state, ConnectionState::Reconnecting { attempt: 3.., .. }));
        within(tried).await.unwrap();
        assert_eq!(warnings.load(Ordering::Relaxed), expected, "{url}");
    }
}

struct Warnings(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() == tracing::Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// ---- helpers ----------------------------------------------------------------

async fn serve(hub: &Hub, acceptor: TlsAcceptor) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = hub.clone();
    tokio::spawn(async move {
        serving.serve_over(listener, move |socket, _| acceptor.accept(socket)).await
    });
    address
}

fn hasty() -> Backoff {
    let a_moment = Duration::from_millis(10);
    Backoff {
        first: a_moment,
        base: a_moment,
        max: a_moment,
        attempt_timeout: PATIENCE,
        ..Backoff::default()
    }
}

async fn is_there(dashboard: &Dashboard) {
    let agent = "build-1".parse().unwrap();
    let mut roster = dashboard.roster();
    let there = roster.wait_for(|roster| {
        roster.agent(&agent).is_some_and(|agent| agent.presence == Presence::Online)
    });
    within(there).await.unwrap();
}

/// Reads a terminal to its end, which must have been audited.
async fn read(terminal: &mut Terminal) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        match within(terminal.next()).await.unwrap() {
            TerminalEvent::Output { offset, data, .. } => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.extend_from_slice(&data);
            }
            TerminalEvent::Ended { audit, .. } => {
                assert_eq!(audit, Audit::Verified);
                return bytes;
            }
            TerminalEvent::Opened { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Whether these are records of TLS, and begin with a handshake.
fn is_tls(bytes: &[u8]) -> bool {
    let mut left = bytes;
    while let [kind, 3, _, high, low, rest @ ..] = left {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if !(20..=23).contains(kind) || rest.len() < length {
            return false;
        }
        left = &rest[length..];
    }
    left.is_empty() && bytes.first() == Some(&22)
}
