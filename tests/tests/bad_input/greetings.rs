//! Bad greetings: too late, too early, too long, or somebody else's.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use trunkline_server::hooks::BoxFuture;
use trunkline_server::{Anyone, AuthError, Authenticator, Credentials, Hub, Identity, TokenTable};

use crate::raw::{BINARY, FIN, Heard, PATIENCE, frame, text, word};
use crate::stage::{
    COMMAND, GUEST_COMMAND, GUEST_STREAM, STREAM, Stage, agent_greeting, dashboard_greeting,
    limits, output, request, start, subscribe,
};

#[tokio::test]
async fn one_that_never_comes() {
    let mut stage = Stage::new().await;
    let mut silent = stage.stranger().await;
    // A WebSocket ping is no greeting.
    let mut pinging = stage.stranger().await;
    pinging.send(&frame(FIN | 0x9, b"")).await.unwrap();
    silent.closed(4408).await;
    pinging.closed(4408).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn something_else_first() {
    let mut stage = Stage::new().await;
    let greeting = dashboard_greeting("guest");
    let cases = [
        (subscribe("honest"), "forbidden"),
        (request("r", COMMAND, "honest"), "forbidden"),
        (output(STREAM, 0, "forged"), "forbidden"),
        (r#"{"type":"heartbeat:ping"}"#.into(), "forbidden"),
        (r#"{"type":"system:emergency-stop"}"#.into(), "forbidden"),
        (r#"{"type":"hello"}"#.into(), "invalid_message"),
        ("hello".into(), "invalid_message"),
        ("[]".into(), "invalid_message"),
        (r#"["dashboard:connect",{"protocols":[1]}]"#.into(), "invalid_message"),
        (r#"{"type":"dashboard:connect"}"#.into(), "invalid_message"),
        (r#"{"type":"dashboard:connect","payload":[[1]]}"#.into(), "invalid_message"),
        (r#"{"type":"dashboard:connect","payload":{"protocols":1}}"#.into(), "invalid_message"),
        (r#"{"type":"dashboard:connect","payload":{"protocols":[-1]}}"#.into(), "invalid_message"),
        (dashboard_greeting(&"x".repeat(129)), "invalid_message"),
        (agent_greeting("../honest"), "invalid_message"),
        (agent_greeting("honest").replace("0191d4a8", "0191D4A8"), "invalid_message"),
    ];
    for (json, code) in cases {
        let mut stranger = stage.stranger().await;
        stranger.say(&json).await;
        let error = stranger.until("error").await;
        assert_eq!(word(&error, "code"), Some(code), "{json}: {error}");
        stranger.closed(4400).await;
    }
    // Nor two at once, nor an empty batch, nor bytes.
    let two = format!(r#"{{"type":"batch","payload":{{"messages":[{greeting},{greeting}]}}}}"#);
    let none = r#"{"type":"batch","payload":{"messages":[]}}"#;
    for bytes in [text(&two), text(none), frame(FIN | BINARY, b"\x01"), frame(FIN | BINARY, b"")] {
        let mut stranger = stage.stranger().await;
        stranger.send(&bytes).await.unwrap();
        stranger.closed(4400).await;
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn an_unknown_protocol_version() {
    let mut stage = Stage::new().await;
    for protocols in ["[]", "[2]", "[0,4294967295]"] {
        for greeting in [agent_greeting("guest"), dashboard_greeting("guest")] {
            let mut stranger = stage.stranger().await;
            stranger.say(&greeting.replace("[1]", protocols)).await;
            stranger.refused("unsupported_protocol", Some("payload.protocols")).await;
            stranger.closed(4426).await;
        }
    }
    stage.goes_on_alone().await;
}

fn table() -> TokenTable {
    TokenTable::new()
        .agent("token-of-honest", "acme", "honest")
        .and_then(|table| table.dashboard("token-of-watcher", "acme", "watcher"))
        .and_then(|table| table.dashboard("token-of-mallory", "acme", "mallory"))
        .and_then(|table| table.dashboard("token-of-stranger", "elsewhere", "watcher"))
        .unwrap()
}

#[tokio::test]
async fn tokens_that_open_nothing() {
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(table())).await;
    let mallory = |greeting: String, id: &str| {
        greeting.replace(&format!("token-of-{id}"), "token-of-mallory")
    };
    let no_token = dashboard_greeting("guest").replace(r#","token":"token-of-guest""#, "");
    let cases = [
        (dashboard_greeting("guest"), "unauthorized", 4401),
        (agent_greeting("guest"), "unauthorized", 4401),
        (no_token, "unauthorized", 4401),
        (dashboard_greeting("watcher").replace("token-of-watcher", ""), "unauthorized", 4401),
        // A dashboard's token for an agent, and the other way round.
        (mallory(agent_greeting("honest"), "honest"), "forbidden", 4403),
        (dashboard_greeting("honest"), "forbidden", 4403),
        // Another subject's dashboard.
        (mallory(dashboard_greeting("watcher"), "watcher"), "forbidden", 4403),
    ];
    for (greeting, code, close) in cases {
        let mut stranger = stage.stranger().await;
        stranger.say(&greeting).await;
        stranger.refused(code, None).await;
        stranger.closed(close).await;
    }
    // In another tenant the same id is another dashboard.
    let mut elsewhere = stage.stranger().await;
    elsewhere.say(&dashboard_greeting("watcher").replace("of-watcher", "of-stranger")).await;
    elsewhere.until("connection:ack").await;
    elsewhere
        .say(&format!(
            r#"{{"type":"command:interrupt","id":"i","payload":{{"command":"{COMMAND}"}}}}"#
        ))
        .await;
    elsewhere.refused("not_found", None).await;
    drop(elsewhere);
    stage.goes_on_alone().await;
}

/// Says nothing to `slow` for as long as it is waited for, and knows how many
/// wait.
#[derive(Default, Clone)]
struct Slow {
    waiting: Arc<()>,
}

impl Slow {
    fn waiting(&self) -> usize {
        // One here, one in the hub.
        Arc::strong_count(&self.waiting) - 2
    }
}

impl Authenticator for Slow {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        match &credentials.token {
            Some(token) if token.reveal() == "token-of-slow" => {
                let waiting = Arc::clone(&self.waiting);
                Box::pin(async move {
                    let answer = std::future::pending().await;
                    drop(waiting);
                    answer
                })
            }
            _ => Anyone.authenticate(credentials),
        }
    }
}

#[tokio::test]
async fn something_between_the_greeting_and_its_answer() {
    let slow = Slow::default();
    let mut stage = Stage::of(Hub::builder().limits(limits()).authenticator(slow.clone())).await;
    for early in
        [subscribe("honest"), dashboard_greeting("slow"), r#"{"type":"heartbeat:ping"}"#.into()]
    {
        let mut eager = stage.stranger().await;
        eager.send(&[text(&dashboard_greeting("slow")), text(&early)].concat()).await.unwrap();
        eager.closed(4400).await;
    }
    // Whoever waits is told in the end.
    let mut patient = stage.stranger().await;
    patient.say(&dashboard_greeting("slow")).await;
    patient.closed(4408).await;
    // Nobody is asked about those who did not wait.
    for _ in 0..20 {
        let mut gone = stage.stranger().await;
        gone.say(&dashboard_greeting("slow")).await;
    }
    stage.goes_on_alone().await;
    let none = async {
        while slow.waiting() > 0 {
            stage.goes_on().await;
        }
    };
    timeout(PATIENCE, none).await.expect("the questions are dropped");
}

#[tokio::test]
async fn a_superseded_link_changes_nothing_any_more() {
    let mut stage = Stage::new().await;
    let command = "0191d4a8-5a3c-7f00-8000-0000000000cc";
    let mut old = stage.running_guest("guest").await;
    let mut new = stage.guest_agent("guest").await;
    // All that it says after its close, before it has read it.
    let words = [
        output(GUEST_STREAM, 0, "forged"),
        format!(
            r#"{{"type":"command:complete","payload":{{"command":"{command}","attempt":1,"status":"failed","end":{{}}}}}}"#
        ),
        r#"{"type":"agent:status","payload":{"note":"forged"}}"#.into(),
        r#"{"type":"agent:disconnect"}"#.into(),
    ];
    for word in words {
        let _ = old.send(&text(&word)).await;
    }
    old.closed(4409).await;
    new.lives(1).await;
    stage.goes_on().await;
    let mut witness = stage.guest_dashboard("witness").await;
    let list = witness.until("agent:list").await;
    assert!(!list.contains("forged") && !list.contains("offline"), "{list}");
    assert!(!list.contains("failed"), "{list}");
    // The same for dashboards.
    let mut old = stage.guest_dashboard("twice").await;
    let mut new = stage.guest_dashboard("twice").await;
    let _ = old.send(&text(r#"{"type":"system:emergency-stop","id":"s","payload":{}}"#)).await;
    old.closed(4409).await;
    new.lives(1).await;
    drop((witness, new));
    stage.goes_on().await;
}

#[tokio::test]
async fn an_agent_cannot_claim_what_is_anothers() {
    let mut stage = Stage::new().await;
    let mine = "0191d4a8-5a3c-7f00-8000-0000000000dd";
    let held = |command: &str, stream: &str| {
        format!(
            r#"{{"command":"{command}","attempt":1,"status":"running","spec":{{"run":{{"text":"mine"}}}},"stream":{{"stream":"{stream}","from":0,"to":9}}}}"#
        )
    };
    for listed in [held(COMMAND, STREAM), held(COMMAND, GUEST_STREAM), held(mine, STREAM)] {
        let mut thief = stage.stranger().await;
        let greeting = agent_greeting("thief");
        let greeting = greeting
            .replace(r#""protocols":[1]"#, &format!(r#""protocols":[1],"commands":[{listed}]"#));
        thief.say(&greeting).await;
        thief.until("connection:ack").await;
        thief.say(&output(STREAM, 0, "forged")).await;
        thief.refused("not_found", Some("payload.stream")).await;
        let over = format!(
            r#"{{"type":"command:complete","payload":{{"command":"{COMMAND}","attempt":1,"status":"failed","end":{{}}}}}}"#
        );
        thief.say(&over).await;
        thief.say(&format!(r#"{{"type":"command:complete","payload":{{"command":"{mine}","attempt":1,"status":"failed","end":{{}}}}}}"#)).await;
        thief.lives(1).await;
        stage.goes_on().await;
    }
    // What was listed with it is forgotten in time, and takes nothing along.
    let mut thief = stage.guest_agent("thief").await;
    for n in 0..110 {
        let command = format!("0191d4a8-5a3c-7f00-8000-0000000001{n:02x}");
        stage.dashboard.say(&request(&format!("thief-{n}"), &command, "thief")).await;
        start(&mut thief, &command, &format!("0191d4a8-5a3c-7f00-8000-0000000002{n:02x}")).await;
        thief.say(&format!(r#"{{"type":"command:complete","payload":{{"command":"{command}","attempt":1,"status":"completed","end":{{}}}}}}"#)).await;
        thief.until("command:settled").await;
    }
    drop(thief);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn an_agent_that_holds_too_much() {
    let mut stage = Stage::new().await;
    let greeting =
        agent_greeting("guest").replace(r#""protocols":[1]"#, r#""protocols":[1],"more":true"#);
    let held = |from: u32, to: u32, more: bool| {
        let held = |n: u32| {
            format!(
                r#"{{"command":"0191d4a8-5a3c-7f00-8000-{n:012x}","attempt":1,"status":"dispatched","spec":{{"run":{{"text":"x"}}}}}}"#
            )
        };
        let held = (from..to).map(held).collect::<Vec<_>>().join(",");
        format!(r#"{{"type":"agent:commands","payload":{{"commands":[{held}],"more":{more}}}}}"#)
    };
    let mut guest = stage.stranger().await;
    guest.say(&greeting).await;
    guest.until("connection:ack").await;
    guest.say(&held(0, 1000, true)).await;
    guest.say(&held(1000, 1025, false)).await;
    guest.closed(1009).await;
    // Nor in bytes.
    let mut guest = stage.stranger().await;
    guest.say(&greeting).await;
    guest.until("connection:ack").await;
    for _ in 0..2 {
        let long = held(0, 1, true).replace("more", &format!("{}\":0,\"more", "x".repeat(600_000)));
        guest.say(&long).await;
    }
    guest.closed(1009).await;
    // Nor by coming back with others again and again.
    let mut running = 0;
    for round in 0..3 {
        let mut guest = stage.stranger().await;
        guest.say(&greeting).await;
        guest.until("connection:ack").await;
        guest.say(&held(round * 1000, round * 1000 + 1000, false)).await;
        guest.lives(1).await;
        let mut witness = stage.guest_dashboard("witness").await;
        running = loop {
            let list = witness.until("agent:list").await;
            let entry = r#""agent":"guest","presence""#;
            let Some((_, guest)) = list.split_once(entry) else { continue };
            break crate::raw::number(guest, "running").unwrap();
        };
    }
    assert_eq!(running, 1024);
    stage.goes_on().await;
}

/// Nothing is about a command that the hub cannot know yet.
#[tokio::test]
async fn an_agent_that_goes_on_before_it_has_listed_what_it_holds() {
    let mut stage = Stage::new().await;
    let greeting =
        agent_greeting("guest").replace(r#""protocols":[1]"#, r#""protocols":[1],"more":true"#);
    let rest = r#"{"type":"agent:commands","payload":{"commands":[]}}"#;
    for early in [
        text(r#"{"type":"agent:status","payload":{}}"#),
        text(&output(GUEST_STREAM, 0, "early")),
        frame(FIN | BINARY, b"early"),
    ] {
        let mut guest = stage.stranger().await;
        guest.say(&greeting).await;
        guest.until("connection:ack").await;
        guest.send(&early).await.unwrap();
        guest.closed(4400).await;
    }
    // Until then it is given nothing; a ping may come, and is answered.
    let mut guest = stage.stranger().await;
    guest.say(&greeting).await;
    guest.until("connection:ack").await;
    stage.dashboard.say(&request("guest-request", GUEST_COMMAND, "guest")).await;
    stage.dashboard.until("ok").await;
    guest.say(r#"{"type":"heartbeat:ping","payload":{"n":5}}"#).await;
    match guest.hear().await {
        Heard::Text(json) => assert!(json.contains("heartbeat:pong"), "{json}"),
        other => panic!("{other:?}"),
    }
    guest.say(rest).await;
    guest.until("command:execute").await;
    // Once is enough.
    guest.say(rest).await;
    let refused = guest.until("error").await;
    assert!(refused.contains("invalid_message"), "{refused}");
    guest.lives(1).await;
    drop(guest);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn an_agent_that_never_lists_the_rest() {
    let mut stage = Stage::new().await; // 300 ms for a message
    let greeting =
        agent_greeting("guest").replace(r#""protocols":[1]"#, r#""protocols":[1],"more":true"#);
    let mut guest = stage.stranger().await;
    guest.say(&greeting).await;
    guest.until("connection:ack").await;
    guest.closed(4408).await;
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn whoever_says_goodbye_is_closed_and_may_not_go_on() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    let bye = text(r#"{"type":"dashboard:disconnect"}"#);
    let ping = text(r#"{"type":"heartbeat:ping","payload":{"n":7}}"#);
    guest.send(&[bye, ping].concat()).await.unwrap();
    loop {
        match guest.hear().await {
            Heard::Close(code, _) => break assert_eq!(code, 1000),
            Heard::Text(json) => assert!(!json.contains("heartbeat:pong"), "{json}"),
            other => panic!("{other:?}"),
        }
    }
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_peer_that_falls_silent() {
    let limits = trunkline_server::protocol::limits::Limits {
        dashboard_idle: Duration::from_millis(100),
        dashboard_timeout: Duration::from_secs(1),
        ..limits()
    };
    let hub = Hub::builder().limits(limits).start().await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { hub.serve(listener).await });
    let mut guest = crate::raw::Raw::upgraded(address).await;
    guest.say(&dashboard_greeting("guest")).await;
    guest.until("heartbeat:ping").await;
    guest.closed(4410).await;
}
