//! Every bound there is, with its default, its unit in its name, and what it
//! costs. A hub is configured with one [`Limits`]; peers hear those that
//! concern them in the ack.

use std::time::Duration;

use crate::message::{LinkLimits, LinkRates};
use crate::rate::Rate;

/// Longest greeting, in bytes: all that a hub takes from somebody it does not
/// know. 16 KiB. No hub has another bound, as an agent must know it before it
/// has heard anything.
pub const GREETING_BYTES_MAX: usize = 16 * 1024;

/// Most commands that an agent may hold when it greets.
pub const HELD_MAX: usize = 1024;

/// The bounds of a hub.
///
/// ```
/// use trunkline_protocol::limits::Limits;
///
/// let limits = Limits { queue_per_agent: 10, ..Limits::default() };
/// assert_eq!(limits.message_bytes_max, 1024 * 1024);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Longest message. One per link may be under assembly: this is what a
    /// hostile link can make the hub hold. 1 MiB.
    pub message_bytes_max: usize,
    /// Longest `data` of one terminal message. 16 KiB, so that control never
    /// waits longer than one of these takes to write.
    pub chunk_bytes_max: usize,
    /// Deepest nesting of JSON, a message's envelope being the first level. 32.
    pub json_depth_max: u32,
    /// Most members and elements in one JSON message, all levels together:
    /// bounds the memory that parsing may take to a small multiple of the
    /// message. 16,384.
    pub json_items_max: u32,
    /// Most messages in one `batch`. 100.
    pub batch_messages_max: u32,
    /// Messages in a row that could not be understood before the link is
    /// closed. 32.
    pub invalid_messages_max: u32,

    /// From the accepted connection to a successful greeting, over all. 5 s.
    pub greeting_timeout: Duration,
    /// From the first byte of a message to its last. 30 s.
    pub message_timeout: Duration,
    /// How long a closing link may take to say its last words. 5 s.
    pub close_timeout: Duration,
    /// The hub pings an agent after this much silence of its own. 2 s.
    pub agent_idle: Duration,
    /// An agent is `unreachable` after this much silence from it. 5 s.
    pub agent_timeout: Duration,
    /// How long an agent stays `unreachable` before it is `offline`. 5 s.
    pub agent_grace: Duration,
    /// How long an `offline` agent stays on the roster; after that, commands
    /// it held become `unknown` and it is forgotten. 24 h.
    pub agent_retention: Duration,
    /// The hub pings a dashboard after this much silence of its own. 15 s.
    pub dashboard_idle: Duration,
    /// A dashboard's link is given up after this much silence from it. 45 s.
    pub dashboard_timeout: Duration,
    /// How long a request that asks for what there is waits for something, on a
    /// link over plain HTTP: shorter than proxies on the way wait. 25 s.
    pub poll_hold: Duration,
    /// How long a hook may take before it counts as failed. 10 s.
    pub hook_timeout: Duration,
    /// `auth:refresh-needed` is sent this long before credentials expire. 60 s.
    pub refresh_ahead: Duration,
    /// How long a link lives on after its credentials expired. 30 s.
    pub refresh_grace: Duration,

    /// Most links at once. About 8 KiB each when idle. 20,000.
    pub links_max: usize,
    /// Most links from one IPv4 address, or from one IPv6 /64, at once;
    /// in-memory links are not counted. More are told to try later. 4,096.
    pub links_per_address: usize,
    /// How often links from one IPv4 address, or from one IPv6 /64, may end
    /// without a greeting that was accepted. More are refused for a while
    /// before anything is read from them. One per second, 50 at once.
    pub failure_rate: Rate,
    /// Most links of dashboards of one subject at once. 100.
    pub links_per_subject: usize,
    /// Most agents remembered per tenant, present or not. 10,000.
    pub agents_max: usize,
    /// Most terminal subscriptions per dashboard. 1,024.
    pub subscriptions_max: usize,
    /// Bytes of control messages that may wait for one link; more closes it
    /// as unable to keep up. 4 MiB.
    pub control_bytes_max: usize,
    /// Answers remembered per dashboard, so that a request asked again is
    /// answered alike. About 100 bytes each. 256.
    pub answers_max: usize,

    /// Most commands waiting per agent. 100.
    pub queue_per_agent: usize,
    /// Memory of all commands of one tenant: their `spec`, and 1 KiB for each.
    /// Finished ones give way, those first that were asked for first; when none
    /// is left, requests are refused with `queue_full`, and agents that hold
    /// commands which this hub does not know are told to try later. 64 MiB.
    pub command_bytes_per_tenant: usize,
    /// Streams of one tenant whose output is kept. That of finished commands
    /// gives way, those first that were asked for first; while there are as many
    /// that may still grow, no further command is given out. What agents that
    /// come back bring may be more until it has ended. 16,384.
    pub streams_per_tenant: usize,
    /// Longest `spec` of a command, in bytes as JSON. 64 KiB.
    pub spec_bytes_max: usize,
    /// Finished commands kept on the roster per agent. About 1 KiB each. 100.
    pub finished_per_agent: usize,
    /// A command must be started within this long unless its request says
    /// otherwise. 1 h.
    pub deliver_within: Duration,
    /// How much longer than `run_for_ms` a command may run before the hub
    /// ends it for an agent that vanished. 30 s.
    pub run_for_margin: Duration,

    /// Memory of one stream's log, its bookkeeping included. 8 MiB.
    pub log_bytes_per_stream: usize,
    /// Memory of all logs of one tenant; the largest gives. 128 MiB.
    pub log_bytes_per_tenant: usize,
    /// Memory of all logs. 256 MiB.
    pub log_bytes_total: usize,
    /// How long a log is kept after its command has ended. 15 min.
    pub log_retention: Duration,
    /// How far an agent may send ahead of what is stored, per stream. 1 MiB.
    pub grant_bytes: u64,
    /// How fast grants are given to one agent, in bytes per second, all its
    /// streams together; the first `grant_bytes` are free. 8 MiB/s.
    pub terminal_bytes_per_second: u64,
    /// Input that a dashboard may have under way to one command. 64 KiB.
    pub input_bytes_ahead: u64,
    /// What the dashboards of one subject may ask: requests, subscriptions,
    /// sizes. More is refused with `rate_limited` and a time to wait. 20 per
    /// second, 50 at once.
    pub request_rate: Rate,
    /// How often they may interrupt, or stop everything; for itself, so that
    /// no flood of requests is in the way. 20 per second, 50 at once.
    pub interrupt_rate: Rate,
    /// How many messages with input they may send. 50 per second, 200 at once.
    pub input_rate: Rate,
    /// How often a subject, or an agent, may come with another link. More is
    /// closed with a time to wait (1013). 5 per second, 100 at once.
    pub link_rate: Rate,
    /// How often a new token may be shown on links of one subject, or of one
    /// agent. One every 2 s, 10 at once.
    pub refresh_rate: Rate,
    /// How many messages of any kind may come from the dashboards of one
    /// subject, or from one agent, terminal output aside; what is about
    /// subscriptions counts once more for every 8 terminals. More closes the
    /// link as a flood. 1,000 per second, 5,000 at once.
    pub message_rate: Rate,
    /// How many pieces of output may come from one agent. More closes the link
    /// as a flood. 20,000 per second, 40,000 at once.
    pub piece_rate: Rate,

    /// How far behind a `newest` reader without a window may fall before it
    /// is moved to the live end. 64 KiB.
    pub newest_bytes_behind: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const KIB: usize = 1024;
        const MIB: usize = 1024 * KIB;
        Self {
            message_bytes_max: MIB,
            chunk_bytes_max: 16 * KIB,
            json_depth_max: 32,
            json_items_max: 16_384,
            batch_messages_max: 100,
            invalid_messages_max: 32,

            greeting_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(30),
            close_timeout: Duration::from_secs(5),
            agent_idle: Duration::from_secs(2),
            agent_timeout: Duration::from_secs(5),
            agent_grace: Duration::from_secs(5),
            agent_retention: Duration::from_secs(24 * 3600),
            dashboard_idle: Duration::from_secs(15),
            dashboard_timeout: Duration::from_secs(45),
            poll_hold: Duration::from_secs(25),
            hook_timeout: Duration::from_secs(10),
            refresh_ahead: Duration::from_secs(60),
            refresh_grace: Duration::from_secs(30),

            links_max: 20_000,
            links_per_address: 4096,
            failure_rate: Rate::per_second(1, 50),
            links_per_subject: 100,
            agents_max: 10_000,
            subscriptions_max: 1024,
            control_bytes_max: 4 * MIB,
            answers_max: 256,

            queue_per_agent: 100,
            command_bytes_per_tenant: 64 * MIB,
            streams_per_tenant: 16 * KIB,
            spec_bytes_max: 64 * KIB,
            finished_per_agent: 100,
            deliver_within: Duration::from_secs(3600),
            run_for_margin: Duration::from_secs(30),

            log_bytes_per_stream: 8 * MIB,
            log_bytes_per_tenant: 128 * MIB,
            log_bytes_total: 256 * MIB,
            log_retention: Duration::from_secs(15 * 60),
            grant_bytes: MIB as u64,
            terminal_bytes_per_second: 8 * MIB as u64,
            input_bytes_ahead: 64 * KIB as u64,
            request_rate: Rate::per_second(20, 50),
            interrupt_rate: Rate::per_second(20, 50),
            input_rate: Rate::per_second(50, 200),
            link_rate: Rate::per_second(5, 100),
            refresh_rate: Rate { every: Duration::from_secs(2), burst: 10 },
            message_rate: Rate::per_second(1000, 5000),
            piece_rate: Rate::per_second(20_000, 40_000),

            newest_bytes_behind: 64 * KIB as u64,
        }
    }
}

impl Limits {
    /// The part that a peer is told in its ack.
    pub fn for_link(&self) -> LinkLimits {
        LinkLimits {
            message_bytes_max: self.message_bytes_max as u64,
            chunk_bytes_max: self.chunk_bytes_max as u64,
            batch_messages_max: self.batch_messages_max,
            grant_bytes: self.grant_bytes,
            queue_per_agent: u32::try_from(self.queue_per_agent).unwrap_or(u32::MAX),
            input_bytes_ahead: self.input_bytes_ahead,
            rates: LinkRates {
                requests: self.request_rate,
                interrupts: self.interrupt_rate,
                input: self.input_rate,
                messages: self.message_rate,
            },
        }
    }
}
