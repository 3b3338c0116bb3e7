//! Answers: every request gets exactly one, `ok` or `error`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::open::open_words;
use super::subscription::Subscription;
use crate::ids::{CommandId, RequestId};
use crate::one_line::OneLine;

/// `ok`: the request was carried out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The request's `id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_reply_to: Option<RequestId>,
    /// For `command:request`: the command, now stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandId>,
    /// For `subscribe` and `unsubscribe`: the subscription as it now is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription: Option<Subscription>,
    /// For `system:emergency-stop`: how many commands it reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<u32>,
}

open_words! {
    /// What is wrong, for programs.
    ErrorCode {
        /// The message is not one this protocol has, or a field breaks its rule.
        InvalidMessage = "invalid_message",
        /// The message belongs to another role or another state of the link.
        Forbidden = "forbidden",
        /// No such agent, command or stream.
        NotFound = "not_found",
        /// The credentials were not accepted.
        Unauthorized = "unauthorized",
        /// None of the offered protocol versions is spoken here.
        UnsupportedProtocol = "unsupported_protocol",
        /// The agent's queue is full.
        QueueFull = "queue_full",
        /// The queue's storage did not answer, or refused.
        QueueUnavailable = "queue_unavailable",
        /// The same command id with another content.
        Conflict = "conflict",
        /// The agent is not there, and this hub does not let commands wait.
        AgentOffline = "agent_offline",
        /// The command is not running.
        NotRunning = "not_running",
        /// More subscriptions, streams or agents than the hub allows.
        LimitReached = "limit_reached",
        /// Faster than the hub allows.
        RateLimited = "rate_limited",
        /// This hub does not offer it.
        Unsupported = "unsupported",
        /// The hub is closing.
        Draining = "draining",
        /// The hub failed; the request may be repeated.
        Internal = "internal",
    }
}

/// `error`: the request was refused, or a message could not be understood.
/// The link lives on unless a close follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The request's `id`, where there was one to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_reply_to: Option<RequestId>,
    /// What is wrong, for programs.
    pub code: ErrorCode,
    /// What is wrong, for people. Never repeats what the peer sent.
    pub message: String,
    /// Whether the same request may succeed later.
    pub recoverable: bool,
    /// Not before this many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The field that breaks its rule, as a path: `payload.spec.run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl Refusal {
    /// A refusal that stays one.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let recoverable = matches!(
            code,
            ErrorCode::QueueFull
                | ErrorCode::QueueUnavailable
                | ErrorCode::AgentOffline
                | ErrorCode::RateLimited
                | ErrorCode::LimitReached
                | ErrorCode::Draining
                | ErrorCode::Internal
        );
        Self {
            in_reply_to: None,
            code,
            message: message.into(),
            recoverable,
            retry_after_ms: None,
            field: None,
        }
    }

    /// Names the request it answers.
    #[must_use]
    pub fn reply_to(mut self, request: Option<RequestId>) -> Self {
        self.in_reply_to = request;
        self
    }

    /// Names the field that breaks its rule.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, OneLine(&self.message))
    }
}

impl std::error::Error for Refusal {}
