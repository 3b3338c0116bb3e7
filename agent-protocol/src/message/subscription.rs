//! Which terminals a dashboard reads, from where, and what it wants when it
//! cannot keep up. Unknown fields are refused here: a misspelt subscription
//! must not be a silent one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bound;
use super::open::closed_words;
use crate::ids::{AgentId, CommandId, StreamId};

/// What a terminal subscription is for: exactly one of `agent` and `command`.
/// It is a standing interest: the agent or command need not exist yet, and
/// streams that begin later are covered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "RawTarget", into = "RawTarget")]
pub enum Target {
    /// Every command of an agent.
    Agent(AgentId),
    /// Every attempt of one command.
    Command(CommandId),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTarget {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<AgentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<CommandId>,
}

impl TryFrom<RawTarget> for Target {
    type Error = &'static str;

    fn try_from(raw: RawTarget) -> Result<Self, &'static str> {
        match (raw.agent, raw.command) {
            (Some(agent), None) => Ok(Self::Agent(agent)),
            (None, Some(command)) => Ok(Self::Command(command)),
            _ => Err("exactly one of agent and command is required"),
        }
    }
}

impl std::convert::From<Target> for RawTarget {
    fn from(target: Target) -> Self {
        match target {
            Target::Agent(agent) => Self { agent: Some(agent), command: None },
            Target::Command(command) => Self { agent: None, command: Some(command) },
        }
    }
}

closed_words! {
    /// Where reading a stream begins when the reader has no position in it.
    #[derive(Default)]
    From {
        /// With the oldest byte that is kept.
        #[default]
        Start = "start",
        /// With what comes next. Streams that begin later are read whole.
        Live = "live",
    }
}

closed_words! {
    /// What a reader wants that falls behind.
    #[derive(Default)]
    Lag {
        /// Every byte as long as the log holds it, then the gap.
        #[default]
        EveryByte = "every_byte",
        /// Only the newest: skip to the live end, with a named gap, when more
        /// than `window_bytes` (64 KiB by default) behind.
        Newest = "newest",
        /// To be disconnected with advice as soon as a byte is lost to it.
        Disconnect = "disconnect",
    }
}

/// One terminal subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSubscription", into = "RawSubscription")]
pub struct TerminalSubscription {
    /// What for.
    pub target: Target,
    /// Where to begin in streams without a position.
    pub from: From,
    /// What to do when behind.
    pub lag: Lag,
    /// Send no further than what was shown plus this, in bytes.
    pub window_bytes: Option<u64>,
    /// Where the reader stands in streams that it already knows. At most
    /// 1,024. Not repeated in the answer.
    pub positions: BTreeMap<StreamId, u64>,
}

impl TerminalSubscription {
    /// Everything of `target` from the oldest byte kept.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            from: From::default(),
            lag: Lag::default(),
            window_bytes: None,
            positions: BTreeMap::new(),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSubscription {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<AgentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<CommandId>,
    #[serde(default)]
    from: From,
    #[serde(default)]
    lag: Lag,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    window_bytes: Option<u64>,
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "bound::positions::<1024, _>"
    )]
    positions: BTreeMap<StreamId, u64>,
}

impl TryFrom<RawSubscription> for TerminalSubscription {
    type Error = &'static str;

    fn try_from(raw: RawSubscription) -> Result<Self, &'static str> {
        let target = RawTarget { agent: raw.agent, command: raw.command }.try_into()?;
        if raw.window_bytes == Some(0) {
            return Err("window_bytes: must not be 0");
        }
        Ok(Self {
            target,
            from: raw.from,
            lag: raw.lag,
            window_bytes: raw.window_bytes,
            positions: raw.positions,
        })
    }
}

impl std::convert::From<TerminalSubscription> for RawSubscription {
    fn from(subscription: TerminalSubscription) -> Self {
        let RawTarget { agent, command } = subscription.target.into();
        Self {
            agent,
            command,
            from: subscription.from,
            lag: subscription.lag,
            window_bytes: subscription.window_bytes,
            positions: subscription.positions,
        }
    }
}

/// `subscribe`: adds subscriptions, replacing those for the same target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subscribe {
    /// What to read from now on.
    pub terminals: Vec<TerminalSubscription>,
}

/// `unsubscribe`: ends subscriptions; unknown targets are no error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unsubscribe {
    /// What to read no longer.
    pub terminals: Vec<Target>,
}

/// The subscription as it now is: part of the answer to both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// Everything that is read.
    pub terminals: Vec<TerminalSubscription>,
}
