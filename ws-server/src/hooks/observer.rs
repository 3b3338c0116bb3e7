//! What a hub saw: who came, what was asked of whom, and what became of it.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use trunkline_protocol::frame::Close;
use trunkline_protocol::ids::{AgentId, CommandId, StreamId, TenantId};
use trunkline_protocol::message::{CommandEnd, CommandStatus, ErrorCode, GapReason, Peer};

use crate::core::LinkId;

/// Hears what happens in a hub, for an audit trail or for figures of your own.
///
/// # When it is called
///
/// For each [`Event`], once, in the order in which they happened, one at a
/// time, from a task of its own: the hub does not wait for it, and a peer
/// notices nothing of it. Up to [`EVENTS_MAX`] events wait; those that come
/// beyond are left out, and an [`What::Missed`] says how many in the place where
/// they would have been. Of that room, events about peers that nobody knows yet
/// take half at most, so that strangers cannot push out what those did who were
/// let in.
///
/// [`Hub::drain`](crate::Hub::drain) waits, for a bounded time, until it has heard
/// everything. A hub that is dropped or killed says no more.
///
/// # What it must keep
///
/// It runs on the hub's runtime: it must not block for long. A trail that is
/// written to a disk or sent away goes to a thread or a task of yours through a
/// channel. If it panics, that event is over for it, and the next one comes.
///
/// # What an event holds
///
/// Never a token, nor what was typed or printed. Texts come from peers or from
/// identities and may hold anything: their `Debug` form is safe to print.
pub trait Observer: Send + Sync + 'static {
    /// Something has happened.
    fn observe(&self, event: &Event);
}

impl<F: Fn(&Event) + Send + Sync + 'static> Observer for F {
    fn observe(&self, event: &Event) {
        self(event);
    }
}

/// Events that wait for an [`Observer`]. About 500 bytes each.
pub const EVENTS_MAX: usize = 16 * 1024;

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// When, in milliseconds since the epoch, by the hub's clock.
    pub at_ms: u64,
    /// On which link, if on one.
    pub link: Option<LinkId>,
    /// Whose doing it was, or about whom it is; `None` before a greeting was
    /// accepted, and for what nobody did.
    pub who: Option<Who>,
    /// What.
    pub what: What,
}

/// Somebody who was let in.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Who {
    /// The tenant.
    pub tenant: TenantId,
    /// The subject of its identity.
    pub subject: String,
    /// As what it is here.
    pub peer: Peer,
}

impl Who {
    pub(crate) fn new(tenant: &TenantId, subject: &str, peer: Peer) -> Self {
        Self { tenant: tenant.clone(), subject: subject.to_owned(), peer }
    }
}

/// What happened. More kinds may come.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum What {
    /// A transport's handshake was all right; its greeting is due.
    Connected {
        /// From where, if that is known.
        address: Option<IpAddr>,
    },
    /// A link ended before its greeting was accepted.
    Rejected {
        /// From where, if that is known.
        address: Option<IpAddr>,
        /// What it was told; [`Lost`](trunkline_protocol::close::CloseCode::Lost)
        /// if it went by itself.
        close: Close,
        /// Why, in the authenticator's words, if that is what turned it away.
        why: Option<String>,
    },
    /// A greeting was accepted.
    Greeted {
        /// From where, if that is known.
        address: Option<IpAddr>,
        /// Since the connection was accepted.
        after: Duration,
        /// How long its credentials hold; `None`: for ever.
        expires_in: Option<Duration>,
    },
    /// A link goes on with new credentials.
    Refreshed {
        /// How long they hold; `None`: for ever.
        expires_in: Option<Duration>,
    },
    /// New credentials were not accepted; the link goes on with the old ones,
    /// for as long as they hold.
    RefreshRefused {
        /// Why.
        why: String,
    },
    /// A link that was greeted has ended.
    Closed {
        /// What it was told; [`Lost`](trunkline_protocol::close::CloseCode::Lost)
        /// if the peer, or what was between, ended it. Another link of the same
        /// peer may have taken over
        /// ([`Superseded`](trunkline_protocol::close::CloseCode::Superseded)).
        close: Close,
        /// How long it had been up.
        after: Duration,
    },
    /// The embedder has ended all links of a subject.
    Revoked {
        /// Whose tenant.
        tenant: TenantId,
        /// Whose.
        subject: String,
        /// How many those were.
        links: usize,
    },
    /// A dashboard asked an agent to run something. Told once: a request that
    /// is asked again under its id is answered, and does nothing.
    CommandRequested {
        /// Which command it is, or would have been.
        command: CommandId,
        /// At which agent.
        agent: AgentId,
        /// What it is called. At most 200 characters, none of them a control character.
        title: String,
        /// Whether it was accepted, and thereby stored.
        outcome: Result<(), ErrorCode>,
    },
    /// An agent has started a command.
    CommandStarted {
        /// Which one.
        command: CommandId,
        /// At which agent.
        agent: AgentId,
        /// For the how manieth time.
        attempt: u32,
        /// How long it had waited since it was accepted, by the wall clock.
        waited: Duration,
    },
    /// How a command ended is stored.
    CommandEnded {
        /// Which one.
        command: CommandId,
        /// At which agent.
        agent: AgentId,
        /// The attempt that counts; 0 if it never started.
        attempt: u32,
        /// How.
        status: CommandStatus,
        /// In the agent's words.
        end: CommandEnd,
        /// How long it ran, by the wall clock; `None` if this hub did not see it
        /// start.
        ran: Option<Duration>,
    },
    /// A dashboard asked to interrupt a command.
    InterruptRequested {
        /// Which one.
        command: CommandId,
        /// At which agent, if the dashboard may know that.
        agent: Option<AgentId>,
        /// Whether that was accepted.
        outcome: Result<(), ErrorCode>,
    },
    /// A dashboard asked to stop everything.
    StopRequested {
        /// At which agents; `None`: at all.
        agents: Option<Vec<AgentId>>,
        /// How many commands that reached.
        outcome: Result<u32, ErrorCode>,
    },
    /// A dashboard begins to type into a command.
    InputBegan {
        /// Which one.
        command: CommandId,
        /// At which agent.
        agent: AgentId,
    },
    /// A command has ended that a dashboard had typed into.
    InputEnded {
        /// Which one.
        command: CommandId,
        /// At which agent.
        agent: AgentId,
        /// How many bytes of its input the agent had taken.
        bytes: u64,
    },
    /// Something else that a peer said was refused.
    Refused {
        /// The type of its message; `None` if it could not be read.
        message: Option<&'static str>,
        /// Why.
        code: ErrorCode,
    },
    /// A dashboard read so slowly that output was gone before it had it; it was
    /// told which.
    Slow {
        /// Of which stream.
        stream: StreamId,
        /// From which byte on.
        from: u64,
        /// Up to which byte.
        to: u64,
    },
    /// Output is missing, for everybody.
    Gap {
        /// At which agent.
        agent: AgentId,
        /// Of which stream.
        stream: StreamId,
        /// From which byte on.
        from: u64,
        /// Up to which byte.
        to: u64,
        /// Why.
        reason: GapReason,
    },
    /// A hook has failed, or took too long.
    HookFailed {
        /// Which one.
        hook: Hook,
        /// In its own words.
        why: String,
    },
    /// Events that came too fast are left out here.
    Missed {
        /// How many.
        count: u64,
    },
}

/// A hook that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Hook {
    /// The [`Authenticator`](super::Authenticator).
    Authenticator,
    /// The [`CommandQueue`](super::CommandQueue).
    Queue,
    /// The [`StreamLog`](super::StreamLog).
    StreamLog,
    /// The [`LogSink`](super::LogSink).
    LogSink,
}

impl Hook {
    /// A stable name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Authenticator => "authenticator",
            Self::Queue => "queue",
            Self::StreamLog => "stream_log",
            Self::LogSink => "log_sink",
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
