//! A hub on a real socket, and two honest peers who must not notice a thing.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::timeout;
use trunkline_server::protocol::limits::Limits;
use trunkline_server::protocol::rate::Rate;
use trunkline_server::{Hub, HubBuilder};

use crate::raw::{PATIENCE, Raw, number, word};

/// The command that the honest agent runs, and the stream it writes.
pub(crate) const COMMAND: &str = "0191d4a8-5a3c-7f00-8000-00000000000c";
pub(crate) const STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000005";

/// Another of each, for guests.
pub(crate) const GUEST_COMMAND: &str = "0191d4a8-5a3c-7f00-8000-0000000000cc";
pub(crate) const GUEST_STREAM: &str = "0191d4a8-5a3c-7f00-8000-000000000055";

/// Times short enough to wait for; no heartbeats, so that nobody has to answer
/// any; and no rates, which have tests of their own (`rates.rs`): here
/// everything may come as fast as it can.
pub(crate) fn limits() -> Limits {
    let never = Duration::from_secs(3600);
    Limits {
        greeting_timeout: Duration::from_secs(2),
        message_timeout: Duration::from_millis(300),
        close_timeout: Duration::from_millis(300),
        agent_idle: never,
        agent_timeout: 2 * never,
        dashboard_idle: never,
        dashboard_timeout: 2 * never,
        request_rate: Rate::UNLIMITED,
        interrupt_rate: Rate::UNLIMITED,
        input_rate: Rate::UNLIMITED,
        link_rate: Rate::UNLIMITED,
        refresh_rate: Rate::UNLIMITED,
        message_rate: Rate::UNLIMITED,
        piece_rate: Rate::UNLIMITED,
        failure_rate: Rate::UNLIMITED,
        ..Limits::default()
    }
}

/// `agent:connect`, with a token that `Anyone` does not look at.
pub(crate) fn agent_greeting(id: &str) -> String {
    let instance = "0191d4a8-5a3c-7f00-8000-00000000001a";
    format!(
        r#"{{"type":"agent:connect","payload":{{"protocols":[1],"agent":"{id}","instance":"{instance}","token":"token-of-{id}"}}}}"#
    )
}

/// `dashboard:connect`, likewise.
pub(crate) fn dashboard_greeting(id: &str) -> String {
    format!(
        r#"{{"type":"dashboard:connect","payload":{{"protocols":[1],"dashboard":"{id}","token":"token-of-{id}"}}}}"#
    )
}

/// `command:request`, of a line for the shell.
pub(crate) fn request(id: &str, command: &str, agent: &str) -> String {
    format!(
        r#"{{"type":"command:request","id":"{id}","payload":{{"command":"{command}","agent":"{agent}","spec":{{"run":{{"shell":"true"}}}}}}}}"#
    )
}

/// `terminal:output`.
pub(crate) fn output(stream: &str, offset: u64, data: &str) -> String {
    format!(
        r#"{{"type":"terminal:output","payload":{{"stream":"{stream}","offset":{offset},"channel":"stdout","data":"{data}"}}}}"#
    )
}

/// `subscribe` to the terminals of an agent.
pub(crate) fn subscribe(agent: &str) -> String {
    format!(
        r#"{{"type":"subscribe","id":"subscribe","payload":{{"terminals":[{{"agent":"{agent}"}}]}}}}"#
    )
}

pub(crate) struct Stage {
    pub(crate) hub: Hub,
    pub(crate) address: SocketAddr,
    pub(crate) agent: Raw,
    pub(crate) dashboard: Raw,
    /// The honest stream's length.
    pub(crate) position: u64,
    rounds: u64,
}

impl Stage {
    /// A hub that lets anyone in.
    pub(crate) async fn new() -> Self {
        Self::of(Hub::builder().limits(limits())).await
    }

    /// A hub that lets in at least `honest`, an agent, and `watcher`, a
    /// dashboard, with `token-of-…` them.
    pub(crate) async fn of(builder: HubBuilder) -> Self {
        let hub = builder.start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn({
            let hub = hub.clone();
            async move { hub.serve(listener).await }
        });
        let mut agent = Raw::upgraded(address).await;
        agent.say(&agent_greeting("honest")).await;
        agent.until("connection:ack").await;
        let mut dashboard = Raw::upgraded(address).await;
        dashboard.say(&dashboard_greeting("watcher")).await;
        dashboard.until("connection:ack").await;
        dashboard.say(&subscribe("honest")).await;
        dashboard.until("ok").await;
        dashboard.say(&request("honest-request", COMMAND, "honest")).await;
        start(&mut agent, COMMAND, STREAM).await;
        dashboard.until("terminal:opened").await;
        Self { hub, address, agent, dashboard, position: 0, rounds: 0 }
    }

    /// A peer that has not greeted.
    pub(crate) async fn stranger(&self) -> Raw {
        Raw::upgraded(self.address).await
    }

    /// A greeted agent.
    pub(crate) async fn guest_agent(&self, id: &str) -> Raw {
        let mut guest = self.stranger().await;
        guest.say(&agent_greeting(id)).await;
        guest.until("connection:ack").await;
        guest
    }

    /// A greeted dashboard.
    pub(crate) async fn guest_dashboard(&self, id: &str) -> Raw {
        let mut guest = self.stranger().await;
        guest.say(&dashboard_greeting(id)).await;
        guest.until("connection:ack").await;
        guest
    }

    /// A greeted agent that runs [`GUEST_COMMAND`] and writes [`GUEST_STREAM`].
    pub(crate) async fn running_guest(&mut self, id: &str) -> Raw {
        let mut guest = self.guest_agent(id).await;
        self.dashboard.say(&request("guest-request", GUEST_COMMAND, id)).await;
        start(&mut guest, GUEST_COMMAND, GUEST_STREAM).await;
        guest
    }

    /// What the honest agent writes reaches the honest dashboard, whole and in
    /// order, and both are answered.
    pub(crate) async fn goes_on(&mut self) {
        self.rounds += 1;
        let line = format!("round {}", self.rounds);
        self.agent.say(&output(STREAM, self.position, &line)).await;
        let heard = self.dashboard.until("terminal:output").await;
        assert_eq!(word(&heard, "stream"), Some(STREAM));
        assert_eq!(number(&heard, "offset"), Some(self.position));
        assert_eq!(word(&heard, "data"), Some(line.as_str()));
        self.position += line.len() as u64;
        self.agent.lives(self.rounds).await;
        self.dashboard.lives(self.rounds).await;
    }

    /// Only the honest links are left, and go on.
    pub(crate) async fn goes_on_alone(&mut self) {
        let alone = async {
            while self.hub.links() > 2 {
                self.goes_on().await;
            }
        };
        timeout(PATIENCE, alone).await.expect("the hub lets go of links that ended");
        self.goes_on().await;
    }
}

/// An agent takes a command and starts it.
pub(crate) async fn start(agent: &mut Raw, command: &str, stream: &str) {
    let execute = agent.until("command:execute").await;
    assert_eq!(word(&execute, "command"), Some(command));
    let attempt = number(&execute, "attempt").unwrap();
    agent
        .say(&format!(
            r#"{{"type":"command:started","payload":{{"command":"{command}","attempt":{attempt},"stream":"{stream}"}}}}"#
        ))
        .await;
}
