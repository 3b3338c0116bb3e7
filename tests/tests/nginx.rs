//! A reverse proxy as they are in the world, nginx, that passes no upgrade on and
//! keeps answers until they are whole: links over plain HTTP come through it; and
//! when it is told to pass upgrades on, each becomes a `WebSocket`.
//!
//! It is looked for on the path, or where `TRUNKLINE_NGINX` says. Where there is
//! none, this says so and tries nothing.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use trunkline_client::{
    Agent, Audit, Backoff, Dashboard, Programs, Reaching, Request, TerminalEvent, Way, WebSocket,
};
use trunkline_protocol::limits::Limits;
use trunkline_server::Hub;
use trunkline_tests::process::now;

const PATIENCE: Duration = Duration::from_secs(60);

const MS: Duration = Duration::from_millis(1);

/// What Debian's configuration of a location comes to, unless more is said.
const PLAIN: &str = "proxy_pass http://HUB;";

/// What `docs/deployment.md` says that there must be.
const UPGRADING: &str = "proxy_pass http://HUB;
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;";

fn program() -> Option<PathBuf> {
    let named = std::env::var_os("TRUNKLINE_NGINX").map(PathBuf::from);
    let program = named.clone().unwrap_or_else(|| PathBuf::from("nginx"));
    let runs = Command::new(&program).arg("-v").stderr(Stdio::null()).status().is_ok();
    if !runs {
        assert!(named.is_none(), "TRUNKLINE_NGINX: {} does not run", program.display());
        eprintln!("SKIPPED: nginx is not installed: `apt-get install nginx`, or TRUNKLINE_NGINX");
    }
    runs.then_some(program)
}

struct Nginx {
    program: PathBuf,
    folder: TempDir,
    child: Child,
    hub: String,
    port: u16,
}

impl Nginx {
    /// Between whoever dials it and the hub.
    async fn start(program: PathBuf, hub: String, location: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // The port is free now; somebody else may be quicker, now and then.
        for _ in 0..20 {
            let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            configure(&folder, port, &hub, location);
            let mut child = spawn(&program, &folder);
            if listens(port, &mut child).await {
                return Self { program, folder, child, hub, port };
            }
        }
        panic!("nginx does not start: {}", said(&folder));
    }

    fn connector(&self) -> Reaching {
        let url = format!("ws://127.0.0.1:{}", self.port);
        Reaching::from(WebSocket::new(&url).unwrap()).probing_every(200 * MS)
    }

    /// Dies without a word, and another one starts in its place.
    async fn is_killed(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.starts_again().await;
    }

    async fn starts_again(&mut self) {
        for _ in 0..50 {
            self.child = spawn(&self.program, &self.folder);
            if listens(self.port, &mut self.child).await {
                return;
            }
        }
        panic!("nginx does not start again: {}", said(&self.folder));
    }

    /// Has another configuration from now on.
    async fn becomes(&mut self, location: &str) {
        configure(&self.folder, self.port, &self.hub, location);
        self.is_killed().await;
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn configure(folder: &TempDir, port: u16, hub: &str, location: &str) {
    let at = folder.path().display();
    let location = location.replace("HUB", hub);
    let text = format!(
        "daemon off;
master_process off;
pid {at}/pid;
error_log {at}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {at}/body;
  proxy_temp_path {at}/proxy;
  fastcgi_temp_path {at}/fastcgi;
  uwsgi_temp_path {at}/uwsgi;
  scgi_temp_path {at}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
    {location}
    }}
  }}
}}
"
    );
    std::fs::write(folder.path().join("nginx.conf"), text).unwrap();
}

fn spawn(program: &PathBuf, folder: &TempDir) -> Child {
    let log = std::fs::File::create(folder.path().join("said")).unwrap();
    Command::new(program)
        .arg("-p")
        .arg(folder.path())
        .arg("-c")
        .arg(folder.path().join("nginx.conf"))
        .arg("-e")
        .arg(folder.path().join("error.log"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn said(folder: &TempDir) -> String {
    let mut text = String::new();
    for name in ["said", "error.log"] {
        if let Ok(mut file) = std::fs::File::open(folder.path().join(name)) {
            let _ = file.read_to_string(&mut text);
        }
    }
    text
}

/// Waits until it listens; `false` if it ended instead.
async fn listens(port: u16, child: &mut Child) -> bool {
    let end = now() + PATIENCE;
    while now() < end {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            return true;
        }
        let _ = timeout(10 * MS, std::future::pending::<()>()).await;
    }
    false
}

async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = now() + PATIENCE;
    while !so() {
        assert!(now() < end, "{what}");
        let _ = timeout(10 * MS, std::future::pending::<()>()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_come_through_a_proxy_that_passes_no_upgrade_on() {
    let Some(program) = program() else { return };
    let limits = Limits {
        terminal_bytes_per_second: 6 << 20,
        log_bytes_per_stream: 64 << 20,
        ..Limits::default()
    };
    let hub = Hub::builder()
        .limits(limits)
        .trust_proxies("127.0.0.1/32".parse().unwrap())
        .start()
        .await
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = hub.clone();
    tokio::spawn(async move { serving.serve(listener).await });

    let mut nginx = Nginx::start(program, address, PLAIN).await;
    let quick = Backoff { first: 20 * MS, base: 20 * MS, max: 100 * MS, ..Backoff::default() };
    let ways = [nginx.connector(), nginx.connector()];
    let agent = Agent::over(ways[0].clone(), "build-1").unwrap().backoff(quick);
    let agent = agent.tail(64 << 20, PATIENCE).connect(Programs::new());
    let dashboard = Dashboard::over(ways[1].clone()).backoff(quick).connect();
    let both = |way| ways.iter().all(|reaching| reaching.way() == way);

    let command = dashboard.run("build-1", Request::argv(["seq", "1", "6800000"])).await.unwrap();
    assert!(both(Way::Polling), "it came through, and not over a WebSocket");
    let mut terminal = command.terminal();
    let seen = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&seen);
    let reading = tokio::spawn(async move {
        while let Some(event) = terminal.next().await {
            match event {
                TerminalEvent::Output { data, .. } => {
                    counts.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
                TerminalEvent::Ended { audit, .. } => return Some(audit),
                TerminalEvent::Opened { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        None
    });
    let has_seen = |more: u64| {
        let (seen, end) = (Arc::clone(&seen), seen.load(Ordering::Relaxed) + more);
        move || seen.load(Ordering::Relaxed) >= end
    };

    until("output comes through", has_seen(4 << 20)).await;
    nginx.is_killed().await;
    until("it goes on through the next one", has_seen(4 << 20)).await;
    nginx.becomes(UPGRADING).await;
    until("both return to WebSockets", || both(Way::WebSocket)).await;
    until("output comes over WebSockets", has_seen(4 << 20)).await;
    nginx.becomes(PLAIN).await;
    until("both fall back again", || both(Way::Polling)).await;
    let audit = timeout(2 * PATIENCE, reading).await.unwrap().unwrap();
    assert_eq!((seen.load(Ordering::Relaxed), audit), (53_288_896, Some(Audit::Verified)));
    dashboard.close().await;
    agent.stop().await;
    hub.drain(MS).await;
}
