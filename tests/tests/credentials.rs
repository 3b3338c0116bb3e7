//! What opens a link and keeps it open is a token, and nothing else: no
//! position, no id, no earlier link.

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use trunkline_server::hooks::BoxFuture;
use trunkline_server::testing::TestHub;
use trunkline_server::{AuthError, Authenticator, Credentials, Identity};

#[path = "by_hand/peer.rs"]
mod peer;

use peer::{Heard, Peer, is};

const S: Duration = Duration::from_secs(1);

/// Tokens are `SUBJECT SECONDS`; `slow` ones are thought about for ever.
#[derive(Clone, Default)]
struct Desk {
    asked: Arc<AtomicUsize>,
}

impl Authenticator for Desk {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        self.asked.fetch_add(1, SeqCst);
        Box::pin(async move {
            let refused = || AuthError::Unauthorized("no such token".into());
            let token = credentials.token.as_ref().ok_or_else(refused)?.reveal();
            let (subject, seconds) = token.split_once(' ').ok_or_else(refused)?;
            if subject == "slow" {
                return pending().await;
            }
            let seconds = seconds.parse().map_err(|_| refused())?;
            let identity = Identity::new("acme".parse().unwrap(), subject);
            Ok(Identity { expires_in: Some(Duration::from_secs(seconds)), ..identity })
        })
    }
}

async fn hub() -> (TestHub, Arc<AtomicUsize>) {
    let desk = Desk::default();
    let asked = Arc::clone(&desk.asked);
    (TestHub::start_with(move |builder| builder.authenticator(desk.clone())).await, asked)
}

fn dashboard(id: &str, token: Option<&str>) -> Value {
    let mut greeting =
        json!({"type": "dashboard:connect", "payload": {"protocols": [1], "dashboard": id}});
    if let Some(token) = token {
        greeting["payload"]["token"] = json!(token);
    }
    greeting
}

fn refresh(token: &str) -> String {
    json!({"type": "auth:refresh-token", "payload": {"token": token}}).to_string()
}

fn closed(heard: &[Heard]) -> Option<u16> {
    heard.iter().find_map(|heard| match heard {
        Heard::Close(code, _) => Some(*code),
        Heard::Message(_) | Heard::End => None,
    })
}

fn told<'a>(heard: &'a [Heard], kind: &str) -> Vec<&'a Value> {
    heard.iter().filter(|heard| is(heard, kind)).filter_map(Heard::message).collect()
}

/// The clock goes on, and nothing else happens.
async fn pass(time: Duration) {
    let _ = timeout(time, pending::<()>()).await;
}

/// Where somebody stood, under which id, and what of it was asked: all of it
/// may be known to others, and opens nothing.
#[tokio::test(start_paused = true)]
async fn a_position_is_not_a_credential() {
    let (hub, _) = hub().await;
    let mut ann = Peer::dial(&hub);
    let heard = ann.ask(&dashboard("web", Some("ann 600")).to_string()).await;
    let at = told(&heard, "agent:list")[0]["payload"]["at"].clone();
    let stop = json!({"type": "system:emergency-stop", "id": "r1", "payload": {"agents": ["x"]}});
    assert_eq!(told(&ann.ask(&stop.to_string()).await, "ok").len(), 1);

    for (token, code) in [(None, 4401), (Some("eve"), 4401), (Some("eve 600"), 4403)] {
        let mut greeting = dashboard("web", token);
        greeting["payload"]["since"] = json!({"roster": at});
        let mut thief = Peer::dial(&hub);
        thief.say(&greeting.to_string()).await;
        thief.say(&stop.to_string()).await;
        let heard = thief.everything().await;
        let told_more = |heard: &&Heard| is(heard, "agent:list") || is(heard, "ok");
        assert_eq!(heard.iter().filter(told_more).count(), 0, "{token:?}: {heard:?}");
        // Who goes on before the answer has broken the protocol beside that.
        assert!([Some(code), Some(4400)].contains(&closed(&heard)), "{token:?}: {heard:?}");
        let mut thief = Peer::dial(&hub);
        let heard = thief.ask(&greeting.to_string()).await;
        assert_eq!(closed(&heard), Some(code), "{token:?}: {heard:?}");
    }
    assert_eq!(closed(&ann.everything().await), None, "and Ann was not put out by it");
    // After her goodbye her id is hers for as long as it is remembered.
    ann.ask(r#"{"type":"dashboard:disconnect"}"#).await;
    let heard = Peer::dial(&hub).ask(&dashboard("web", Some("eve 600")).to_string()).await;
    assert_eq!(closed(&heard), Some(4403));
}

#[tokio::test(start_paused = true)]
async fn one_refresh_is_looked_at_at_a_time() {
    let (hub, asked) = hub().await;
    let mut ann = Peer::greeted(&hub, &dashboard("web", Some("ann 600"))).await;
    let before = asked.load(SeqCst);
    for _ in 0..100 {
        ann.say(&refresh("slow 600")).await;
    }
    let heard = ann.everything().await;
    assert_eq!(told(&heard, "auth:refresh-failed").len(), 99);
    assert_eq!(asked.load(SeqCst) - before, 1);
    // The one that is never answered has its time, and the link goes on.
    pass(11 * S).await;
    assert_eq!(told(&ann.everything().await, "auth:refresh-failed").len(), 1);
    assert_eq!(told(&ann.ask(&refresh("ann 600")).await, "auth:refresh-success").len(), 1);
}

/// A token that holds less long than the one before holds less long; the same
/// one again changes nothing; somebody else's is none.
#[tokio::test(start_paused = true)]
async fn what_a_new_token_says_of_time_counts() {
    let (hub, _) = hub().await;
    let mut ann = Peer::greeted(&hub, &dashboard("web", Some("ann 3600"))).await;
    for (token, taken) in [("ann 3600", true), ("eve 3600", false), ("ann 100", true)] {
        let heard = ann.ask(&refresh(token)).await;
        assert_eq!(told(&heard, "auth:refresh-success").len(), usize::from(taken), "{token}");
    }
    // Heartbeats go on meanwhile.
    let mut told_early = 0;
    let mut lived = 0;
    let close = loop {
        pass(5 * S).await;
        lived += 5;
        let heard = ann.ask(r#"{"type":"heartbeat:ping"}"#).await;
        told_early += told(&heard, "auth:refresh-needed").len();
        if let Some(code) = closed(&heard) {
            break code;
        }
        assert!(lived < 200, "it should have ended");
    };
    assert_eq!(close, 4401);
    assert!((125..=140).contains(&lived), "100 s and 30 s of grace, not {lived}");
    assert!(told_early >= 6, "it was told in time");
}
