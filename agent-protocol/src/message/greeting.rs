//! The first words on a link: who is there, and what holds from now on.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::bound;
use super::command::HeldCommand;
use super::open::open_words;
use super::roster::RosterPosition;
use crate::ids::{AgentId, DashboardId, HubInstance, InstanceId, QueueEpoch, TenantId};
use crate::rate::Rate;

/// The protocol versions this crate speaks, newest first.
pub const PROTOCOLS: &[u32] = &[1];

/// A token or password. `Debug` and `Display` never show it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself: for comparing or sending, never for logging.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<&str> for Secret {
    fn from(secret: &str) -> Self {
        Self::new(secret)
    }
}

impl From<String> for Secret {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

open_words! {
    /// Something a link may do beyond the JSON baseline. Offered in the
    /// greeting; in force when the ack repeats it.
    Feature {
        /// Terminal output travels as binary frames.
        Binary = "binary",
        /// Several messages may travel as one `batch`.
        Batch = "batch",
    }
}

/// `agent:connect`: an agent's greeting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentConnect {
    /// Protocol versions offered, in order of preference. At most 16.
    #[serde(deserialize_with = "bound::list::<16, _, _>")]
    pub protocols: Vec<u32>,
    /// The id it proposes.
    pub agent: AgentId,
    /// This incarnation of the process.
    pub instance: InstanceId,
    /// Credentials, unless they came in a header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
    /// What it says about itself.
    #[serde(default)]
    pub about: AgentAbout,
    /// How many commands it runs at a time. At least 1.
    #[serde(default = "one", deserialize_with = "bound::slots")]
    pub slots: u32,
    /// Features offered. At most 64.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "bound::list::<64, _, _>"
    )]
    pub features: Vec<Feature>,
    /// Every command it still holds: accepted, running, or ended and not yet
    /// settled, and ended ones whose output it still has. As many as a greeting
    /// has room for, which is at most
    /// [`GREETING_BYTES_MAX`](crate::limits::GREETING_BYTES_MAX) long.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<HeldCommand>,
    /// It holds more: [`HeldCommands`] follow the ack.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

/// `agent:commands`: what the greeting had no room for. The first thing that
/// an agent says after the ack if its greeting had `more`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeldCommands {
    /// Further commands that it holds.
    pub commands: Vec<HeldCommand>,
    /// Still more follow.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

fn one() -> u32 {
    1
}

/// What an agent says about itself; shown to people, decides nothing. Texts
/// are single lines; what is longer than allowed is cut when it is sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentAbout {
    /// What sort of agent: `shell`, `coder`, … At most 64 characters.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::line::<64, _>",
        serialize_with = "bound::cut_line::<64, _>"
    )]
    pub kind: Option<String>,
    /// Version of the program. At most 64 characters.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::line::<64, _>",
        serialize_with = "bound::cut_line::<64, _>"
    )]
    pub version: Option<String>,
    /// The machine it runs on. At most 255 characters.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::line::<255, _>",
        serialize_with = "bound::cut_line::<255, _>"
    )]
    pub host: Option<String>,
    /// Free words about what it can do. At most 64, of 64 characters each.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "bound::lines::<64, 64, _>",
        serialize_with = "bound::cut_lines::<64, 64, _>"
    )]
    pub capabilities: Vec<String>,
}

/// `dashboard:connect`: a dashboard's greeting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DashboardConnect {
    /// Protocol versions offered, in order of preference. At most 16.
    #[serde(deserialize_with = "bound::list::<16, _, _>")]
    pub protocols: Vec<u32>,
    /// This dashboard process. Without one the hub mints it; only a dashboard
    /// that brings its own is recognised after a reconnect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dashboard: Option<DashboardId>,
    /// Credentials, unless they came in a header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
    /// Features offered. At most 64.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "bound::list::<64, _, _>"
    )]
    pub features: Vec<Feature>,
    /// What it already knows.
    #[serde(default)]
    pub since: Since,
}

/// Where a returning dashboard stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// The last roster position it folded. Deltas follow from there where the
    /// hub still can, a snapshot otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roster: Option<RosterPosition>,
}

/// `connection:ack`: the hub's answer to a greeting. Identity and limits in
/// it are final.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectionAck {
    /// The version spoken from now on.
    pub protocol: u32,
    /// The tenant the link belongs to.
    pub tenant: TenantId,
    /// Who the peer is, whatever it proposed.
    pub peer: Peer,
    /// This incarnation of the hub.
    pub hub: HubInstance,
    /// The memory of its command queue: while this stays the same, no
    /// accepted command was forgotten.
    pub queue: QueueEpoch,
    /// Features in force, out of those offered.
    #[serde(default)]
    pub features: Vec<Feature>,
    /// Limits in force on this link.
    pub limits: LinkLimits,
    /// When the link counts as dead.
    pub heartbeat: Heartbeat,
}

/// Who the hub says the peer is: `{"agent":"…"}` or `{"dashboard":"…"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPeer", into = "RawPeer")]
pub enum Peer {
    /// An agent, under this id.
    Agent(AgentId),
    /// A dashboard, under this id.
    Dashboard(DashboardId),
}

#[derive(Serialize, Deserialize)]
struct RawPeer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<AgentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dashboard: Option<DashboardId>,
}

impl TryFrom<RawPeer> for Peer {
    type Error = &'static str;

    fn try_from(raw: RawPeer) -> Result<Self, &'static str> {
        match (raw.agent, raw.dashboard) {
            (Some(agent), None) => Ok(Self::Agent(agent)),
            (None, Some(dashboard)) => Ok(Self::Dashboard(dashboard)),
            _ => Err("exactly one of agent and dashboard is required"),
        }
    }
}

impl From<Peer> for RawPeer {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Agent(agent) => Self { agent: Some(agent), dashboard: None },
            Peer::Dashboard(dashboard) => Self { agent: None, dashboard: Some(dashboard) },
        }
    }
}

/// Limits that a peer has to know. The hub's own are in
/// [`Limits`](crate::limits::Limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkLimits {
    /// Longest message, in bytes; a longer one closes the link (1009).
    pub message_bytes_max: u64,
    /// Longest `data` of one terminal message, in bytes.
    pub chunk_bytes_max: u64,
    /// Most messages in one `batch`.
    pub batch_messages_max: u32,
    /// How far ahead of `stored` an agent may send, in bytes, before the
    /// first `terminal:taken` says otherwise.
    pub grant_bytes: u64,
    /// Most commands waiting per agent.
    pub queue_per_agent: u32,
    /// Most bytes of input a dashboard may have under way to one command.
    pub input_bytes_ahead: u64,
    /// How often it may speak. All links of its subject share these.
    pub rates: LinkRates,
}

/// How often a peer may speak. Who keeps to it alone is never refused; who
/// shares it with other links of the same subject may be, and waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRates {
    /// `command:request`, `subscribe`, `terminal:resize`.
    pub requests: Rate,
    /// `command:interrupt`, `system:emergency-stop`.
    pub interrupts: Rate,
    /// `terminal:input`.
    pub input: Rate,
    /// Messages of any kind, terminal output aside. More closes the link
    /// (4429).
    pub messages: Rate,
}

/// The rhythm of a link, in milliseconds. Any received byte counts as life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The hub pings after this much silence from its side.
    pub idle_ms: u64,
    /// Either end gives the link up after this much silence from the other.
    pub timeout_ms: u64,
}

/// `agent:disconnect` and `dashboard:disconnect`: an orderly goodbye. An
/// agent that says it is offline at once, without a grace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disconnect {
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `heartbeat:ping` and `heartbeat:pong`. A pong repeats its ping's number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatBeat {
    /// Pairs pong with ping.
    #[serde(default)]
    pub n: u64,
}

/// `auth:refresh-needed`: credentials run out soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshNeeded {
    /// Milliseconds left.
    pub expires_in_ms: u64,
}

/// `auth:refresh-token`: new credentials for the same subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshToken {
    /// The new token.
    pub token: Secret,
}

/// `auth:refresh-success`: the link goes on under the new credentials.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshSuccess {
    /// When those run out, in milliseconds from now; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
}

/// `auth:refresh-failed`: the old credentials still hold until they expire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshFailed {
    /// Why, for people; says nothing about how tokens are checked.
    pub message: String,
}
