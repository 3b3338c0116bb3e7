//! A peer by hand over a link in memory: it says what its test likes, and
//! hears everything. The clock stands still while anybody can do anything.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::time::timeout;
use trunkline_server::protocol::frame::Frame;
use trunkline_server::testing::{TestHub, TestLink};

/// Until then nothing else comes: all that the hub does by itself within it is
/// done without waiting.
const SILENCE: Duration = Duration::from_millis(50);

/// What the hub said.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Heard {
    Message(Value),
    Close(u16, String),
    /// Nothing comes any more.
    End,
}

impl Heard {
    pub(crate) fn message(&self) -> Option<&Value> {
        match self {
            Self::Message(message) => Some(message),
            Self::Close(..) | Self::End => None,
        }
    }
}

pub(crate) struct Peer {
    link: TestLink,
}

impl Peer {
    /// Connected, and not a word said.
    pub(crate) fn dial(hub: &TestHub) -> Self {
        Self { link: hub.cable().dial().unwrap() }
    }

    /// Greeted, and let in; what came with the ack was heard.
    pub(crate) async fn greeted(hub: &TestHub, greeting: &Value) -> Self {
        let mut peer = Self::dial(hub);
        peer.say(&greeting.to_string()).await;
        let heard = peer.everything().await;
        assert!(heard.iter().any(|heard| is(heard, "connection:ack")), "{heard:?}");
        peer
    }

    pub(crate) async fn say(&mut self, text: &str) {
        // A link that is closed takes nothing, which is for the test to see.
        let _ = self.link.send(Frame::Text(text.to_owned().into())).await;
    }

    async fn hear(&mut self) -> Heard {
        match self.link.next().await {
            Some(Ok(Frame::Text(text))) => Heard::Message(serde_json::from_slice(&text).unwrap()),
            Some(Ok(Frame::Close(close))) => Heard::Close(close.code.number(), close.reason),
            Some(Ok(Frame::Binary(_))) => panic!("nobody here has agreed to binary"),
            Some(Err(_)) | None => Heard::End,
        }
    }

    /// All that comes until there is silence.
    pub(crate) async fn everything(&mut self) -> Vec<Heard> {
        let mut all = Vec::new();
        while let Ok(heard) = timeout(SILENCE, self.hear()).await {
            let is_over = heard == Heard::End;
            all.push(heard);
            if is_over {
                break;
            }
        }
        all
    }

    /// Says something, and hears all that comes of it.
    pub(crate) async fn ask(&mut self, text: &str) -> Vec<Heard> {
        self.say(text).await;
        self.everything().await
    }
}

/// Whether it is a message of this type.
pub(crate) fn is(heard: &Heard, kind: &str) -> bool {
    heard.message().is_some_and(|message| message["type"] == kind)
}
