//! What users test with: a hub whose process can be killed and whose cables can
//! be cut, agents that follow scripts, viewers that say what must be seen; and
//! the suite for transports on the one that is in use.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::time::Duration;

use tokio::net::TcpListener;
use trunkline_client::testing::{Script, Scripts, Viewer};
use trunkline_client::{Agent, Audit, Connector as _, Dashboard, Polling, Request, WebSocket};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{Channel, CommandStatus, Presence};
use trunkline_server::testing::{TestHub, transport};
use trunkline_tests::process::now;

const S: Duration = Duration::from_secs(1);

/// Time passes, on the virtual clock.
async fn passes(time: Duration) {
    tokio::time::sleep_until(now() + time).await;
}

fn scripts() -> Scripts {
    let build = Script::new().prints("Compiling\r\n").sleeps(3600 * S).prints("Finished\r\n");
    let login = Script::new().prints("password: ").hears("secret\n").prints("welcome\r\n");
    Scripts::new()
        .on("cargo build", build)
        .on("login", login)
        .on("top", Script::new().prints("load: 0.4").goes_on())
        .on("warn", Script::new().writes(Channel::Stderr, "no\n").exits(2))
}

/// An hour of building, over a hub that dies and cables that break, takes no
/// time.
#[tokio::test(start_paused = true)]
async fn a_fleet_is_tested_on_a_virtual_clock() {
    let begun = now();
    let hub = TestHub::start().await;
    let (agents, people) = (hub.cable(), hub.cable());
    let scripts = scripts();
    let agent = Agent::over(agents.connector(), "build-1").unwrap().connect(scripts.clone());
    let dashboard = Dashboard::over(people.connector()).connect();
    let run =
        async |text: &str| Viewer::run(&dashboard, "build-1", Request::text(text)).await.unwrap();

    let mut build = run("cargo build").await;
    build.sees("Compiling").await;
    hub.kill();
    passes(60 * S).await;
    hub.restart().await;
    agents.cut();
    people.refuse(true);
    people.cut();
    passes(60 * S).await;
    people.refuse(false);
    // More than two minutes without a word, which a viewer would not wait.
    passes(3600 * S).await;
    let seen = build.sees_the_end().await;
    assert_eq!(seen.text(), "Compiling\r\nFinished\r\n");
    assert_eq!((seen.gaps, seen.audit), (vec![], Some(Audit::Verified)));
    assert_eq!(seen.state.unwrap().status, CommandStatus::Completed);

    let mut login = run("login").await;
    login.sees("password: ").await;
    login.types("not secret\n").await.unwrap();
    login.sees("welcome").await;
    assert_eq!(login.sees_the_end().await.audit, Some(Audit::Verified));

    let mut top = run("top").await;
    top.sees("load").await;
    top.interrupts().await.unwrap();
    assert_eq!(top.sees_the_end().await.state.unwrap().status, CommandStatus::Interrupted);

    let exit = async |viewer: Viewer| {
        let state = viewer.sees_the_end().await.state.unwrap();
        state.end.as_ref().unwrap().exit_code
    };
    assert_eq!(exit(run("warn").await).await, Some(2));
    assert_eq!(exit(run("what?").await).await, Some(127));
    let started = scripts.started();
    assert_eq!(started.len(), 5, "{started:?}");
    assert!(started.iter().all(|started| started.attempt == 1));
    agent.stop().await;
    let mut roster = dashboard.roster();
    let name = "build-1".parse().unwrap();
    let is_gone = |roster: &std::sync::Arc<trunkline_protocol::roster::Roster>| {
        roster.agent(&name).is_some_and(|agent| agent.presence == Presence::Offline)
    };
    roster.wait_for(is_gone).await.unwrap();
    assert!(begun.elapsed() > 3600 * S, "by the virtual clock");
}

#[tokio::test]
#[should_panic(expected = "did not show \"password\", but \"no\\n\"")]
async fn a_viewer_says_what_was_shown_instead() {
    let hub = TestHub::start().await;
    let _agent = Agent::over(hub.cable().connector(), "build-1").unwrap().connect(scripts());
    let dashboard = Dashboard::over(hub.cable().connector()).connect();
    let mut viewer = Viewer::run(&dashboard, "build-1", Request::text("warn")).await.unwrap();
    viewer.sees("password").await;
}

#[tokio::test]
async fn web_sockets_keep_to_what_a_transport_must() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let limits = Limits::default();
    transport(async || {
        let client = WebSocket::new(&url).unwrap();
        let accept = async {
            let (socket, _) = listener.accept().await.unwrap();
            trunkline_server::conformance::accept(socket, &limits).await.unwrap()
        };
        let (server, client) = tokio::join!(accept, client.dial());
        (server, client.unwrap())
    })
    .await;
}

#[tokio::test]
async fn links_that_poll_keep_to_what_a_transport_must() {
    transport(async || {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        let server = trunkline_server::conformance::polled(listener, Limits::default());
        let client = Polling::from(WebSocket::new(&url).unwrap());
        (server, client.dial().await.unwrap())
    })
    .await;
}
