//! What the fuzz targets have found in the hub's core, each in its shortest
//! form.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::ids::{HubInstance, QueueEpoch};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{ErrorCode, HubToAgent, HubToDashboard};
use trunkline_protocol::time::Now;
use trunkline_server::Identity;
use trunkline_server::core::{Core, LinkId, Setup};
use trunkline_server::hooks::WholeTenant;

const LINK: LinkId = LinkId(1);

fn at(seconds: u64) -> Now {
    Now { monotonic: Duration::from_secs(seconds), wall_ms: 1_700_000_000_000 + seconds * 1000 }
}

fn core() -> Core {
    let setup = Setup {
        limits: Limits::default(),
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(1),
        epoch: QueueEpoch::from_u128(2),
        seed: [0; 32],
        stored: Vec::new(),
        streams: None,
    };
    Core::new(setup, at(0))
}

#[test]
fn a_link_closed_while_the_hub_drains_still_hears_why() {
    let mut core = core();
    core.handle_arrived(LINK, None, at(0));
    core.handle_opened(LINK, None, None, at(0));
    core.handle_drain(Duration::from_secs(1), at(1));
    let close = Close::new(CloseCode::Protocol, "not WebSocket");
    core.handle_violation(LINK, close.clone(), at(1));
    // Its transport takes nothing until the time for draining is over.
    core.handle_timeout(at(10));
    assert!(core.is_closing(LINK));
    let mut frames = Vec::new();
    core.transmit(LINK, at(10), &mut frames, 1024);
    assert_eq!(frames, [Frame::Close(close)]);
}

#[test]
fn a_request_on_a_link_that_is_being_flushed_is_answered() {
    let mut core = core();
    core.handle_arrived(LINK, None, at(0));
    core.handle_opened(LINK, None, None, at(0));
    say(&mut core, r#"{"type":"dashboard:connect","payload":{"protocols":[1]}}"#);
    let identity = Identity::new("t".parse().expect("a name"), "somebody");
    core.handle_authenticated(LINK, Ok(identity), at(0));
    core.handle_drain(Duration::from_secs(1), at(1));
    say(
        &mut core,
        r#"{"type":"command:request","id":"r","payload":{
            "command":"00000000-0000-0000-0000-0000000000c0","agent":"a",
            "spec":{"run":{"text":"x"}}}}"#,
    );
    let mut frames = Vec::new();
    core.transmit(LINK, at(1), &mut frames, 64 * 1024);
    let rules = Rules::from(&Limits::default());
    let refusal = frames.iter().flat_map(|frame| codec::decode::<HubToDashboard>(frame, rules));
    let refusal = refusal.flatten().find_map(|envelope| match envelope.message {
        HubToDashboard::Error(refusal) => Some(refusal),
        _ => None, // the greeting's answers
    });
    let refusal = refusal.expect("it is answered");
    assert_eq!(refusal.code, ErrorCode::Draining);
    assert_eq!(refusal.in_reply_to, Some("r".parse().expect("a name")));
    assert!(matches!(frames.last(), Some(Frame::Close(_))), "and then closed");
}

#[test]
fn a_grant_at_the_end_of_all_offsets_can_be_read() {
    let mut core = core();
    core.handle_arrived(LINK, None, at(0));
    core.handle_opened(LINK, None, None, at(0));
    // A stream of which nearly all is gone.
    say(
        &mut core,
        r#"{"type":"agent:connect","payload":{"protocols":[1],"agent":"a",
            "instance":"00000000-0000-0000-0000-000000000010","commands":[{
            "command":"00000000-0000-0000-0000-0000000000c0","attempt":1,"status":"running",
            "spec":{"run":{"text":"x"}},"stream":{
            "stream":"00000000-0000-0000-0000-000000000050",
            "from":9223372036854775800,"to":9223372036854775801}}]}}"#,
    );
    let identity = Identity::new("t".parse().expect("a name"), "somebody");
    core.handle_authenticated(LINK, Ok(identity), at(0));
    say(
        &mut core,
        r#"{"type":"terminal:gap","payload":{"stream":"00000000-0000-0000-0000-000000000050",
            "from":9223372036854775800,"to":9223372036854775801,"reason":"agent_overflow"}}"#,
    );
    let mut frames = Vec::new();
    core.transmit(LINK, at(0), &mut frames, 64 * 1024);
    let rules = Rules::from(&Limits::default());
    let mut grants = 0;
    for message in frames.iter().flat_map(|frame| codec::decode::<HubToAgent>(frame, rules)) {
        let message = message.expect("an agent understands its hub").message;
        grants += u32::from(matches!(message, HubToAgent::Taken(_)));
    }
    assert!(grants > 0, "the stream is granted something");
}

fn say(core: &mut Core, json: &'static str) {
    core.handle_frame(LINK, &Frame::Text(Bytes::from_static(json.as_bytes())), at(0));
}

#[test]
fn limits_without_end_are_no_accident() {
    let never = Duration::MAX;
    let limits = Limits {
        agent_idle: never,
        agent_timeout: never,
        agent_grace: never,
        agent_retention: never,
        dashboard_idle: never,
        dashboard_timeout: never,
        greeting_timeout: never,
        deliver_within: never,
        log_retention: never,
        run_for_margin: never,
        close_timeout: never,
        ..Limits::default()
    };
    let setup = Setup {
        limits,
        policy: Arc::new(WholeTenant),
        hub: HubInstance::from_u128(1),
        epoch: QueueEpoch::from_u128(2),
        seed: [0; 32],
        stored: Vec::new(),
        streams: None,
    };
    let mut core = Core::new(setup, at(5));
    core.handle_arrived(LINK, None, at(5));
    core.handle_opened(LINK, None, None, at(5));
    say(&mut core, r#"{"type":"dashboard:connect","payload":{"protocols":[1]}}"#);
    let identity = Identity::new("t".parse().expect("a name"), "somebody");
    core.handle_authenticated(LINK, Ok(identity), at(6));
    core.handle_timeout(at(1 << 40));
    core.handle_drain(never, at(1 << 40));
    core.handle_lost(LINK, at(1 << 40));
    assert_eq!(core.links(), 0);
}
