//! The roster as it travels: agents, their commands and their queues, each
//! entry at the revision of its last change.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::bound;
use super::command::{CommandEnd, CommandStatus, InterruptStage, Priority};
use super::greeting::AgentAbout;
use super::open::closed_words;
use crate::ids::{AgentId, CommandId, DashboardId, HubInstance, InstanceId, StreamId};

/// Where a reader of a roster stands: `<hub instance>:<revision>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RosterPosition {
    /// The hub that counts.
    pub hub: HubInstance,
    /// The last revision folded; 0 is before everything.
    pub revision: u64,
}

impl fmt::Display for RosterPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.hub, self.revision)
    }
}

impl FromStr for RosterPosition {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const RULE: &str = "must be <hub uuid>:<revision>";
        let (hub, revision) = text.split_once(':').ok_or(RULE)?;
        let digits = !revision.is_empty() && revision.bytes().all(|b| b.is_ascii_digit());
        if !digits {
            return Err(RULE);
        }
        Ok(Self {
            hub: hub.parse().map_err(|_| RULE)?,
            revision: revision.parse().map_err(|_| RULE)?,
        })
    }
}

impl Serialize for RosterPosition {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RosterPosition {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = RosterPosition;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a roster position")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RosterPosition, E> {
                text.parse().map_err(E::custom)
            }
        }
        from.deserialize_str(Text)
    }
}

closed_words! {
    /// Whether an agent is there: derived by the hub from its live link,
    /// never reported.
    Presence {
        /// Its link lives and it has a free slot.
        Online = "online",
        /// Its link lives and every slot is taken.
        Busy = "busy",
        /// Its link is gone or silent; it may be back in a moment.
        Unreachable = "unreachable",
        /// It said goodbye, or its grace is over.
        Offline = "offline",
    }
}

/// An agent as dashboards see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentState {
    /// Who.
    pub agent: AgentId,
    /// Whether it is there.
    pub presence: Presence,
    /// Since when, in milliseconds since the epoch, by the hub's clock.
    pub since_ms: u64,
    /// The incarnation last seen.
    pub instance: InstanceId,
    /// What it says about itself.
    #[serde(default)]
    pub about: AgentAbout,
    /// How many commands it runs at a time.
    pub slots: u32,
    /// Commands leased to it now.
    pub running: u32,
    /// Its latest figures.
    #[serde(default)]
    pub report: AgentReport,
}

/// `agent:status` from the agent: its latest figures. Only the newest counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    /// Figures by name: `load`, `memory_bytes`, … At most 64; a name has 1 to
    /// 64 characters of the alphabet of ids. One that is not finite is not
    /// sent.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "bound::figures::<64, _>",
        serialize_with = "bound::finite_figures"
    )]
    pub figures: BTreeMap<String, f64>,
    /// One line for people, at most 200 characters; a longer one is cut when
    /// it is sent.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bound::line::<200, _>",
        serialize_with = "bound::cut_line::<200, _>"
    )]
    pub note: Option<String>,
}

/// A command as dashboards see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandState {
    /// Which.
    pub command: CommandId,
    /// Whose.
    pub agent: AgentId,
    /// How far.
    pub status: CommandStatus,
    /// The latest attempt; 0 before the first dispatch.
    pub attempt: u32,
    /// One line for people.
    pub title: String,
    /// Its place in the queue.
    pub priority: Priority,
    /// Who asked for it; absent when a hub learnt of it from its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<DashboardId>,
    /// When it was accepted, in milliseconds since the epoch.
    pub requested_at_ms: u64,
    /// When the latest attempt started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_ms: Option<u64>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    /// The latest attempt's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamId>,
    /// How far an interrupt is, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupt: Option<InterruptStage>,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<CommandEnd>,
}

/// `agent:list`: a page of the roster from nothing. A snapshot is one or more
/// pages; the first resets, the last completes. Until then a reader goes on
/// showing what it had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentList {
    /// Where a reader stands that has folded this page.
    pub at: RosterPosition,
    /// Whether the reader starts from an empty roster with this page.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// Whether the roster is whole with this page.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub complete: bool,
    /// Agents.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agents: Vec<AgentState>,
    /// Commands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<CommandState>,
    /// Queues that are not empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<QueueState>,
}

/// The commands waiting for an agent, next first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Whose queue.
    pub agent: AgentId,
    /// Waiting commands, next first; empty when nothing waits.
    pub commands: Vec<CommandId>,
}

/// `agent:status` to dashboards: one agent as it now is, or gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentChanged {
    /// Where a reader stands that has folded this.
    pub at: RosterPosition,
    /// The agent as it now is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentState>,
    /// The agent that is no longer listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<AgentId>,
}

/// `command:status`, and `command:complete` when it is final: one command as
/// it now is, or gone from the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandChanged {
    /// Where a reader stands that has folded this.
    pub at: RosterPosition,
    /// The command as it now is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandState>,
    /// The command that is no longer listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<CommandId>,
}

/// `command:queue`: one agent's queue as it now is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueChanged {
    /// Where a reader stands that has folded this.
    pub at: RosterPosition,
    /// The queue.
    pub queue: QueueState,
}
