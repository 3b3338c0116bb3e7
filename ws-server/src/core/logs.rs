//! Forwarded log records on their way to the log sink: who has sent how much,
//! and what is under way.
//!
//! Of each sender one batch is under way at a time, and the next is sent when
//! the hub says that this one was taken: a slow sink slows its senders down, and
//! nobody else. How far a sender's log was taken is remembered beyond its link,
//! so that what was taken and not heard of does not come twice.
//!
//! ```text
//!            a batch                     taken
//!   idle ──────────────► under way ──────────────► idle, further on: `log:taken`
//!    ▲                       │ not taken
//!    └───────────────────────┘ `error`: send it again
//! ```

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Duration;

use trunkline_protocol::ids::{AgentId, RequestId, StreamId, TenantId};
use trunkline_protocol::message::{ErrorCode, HubToDashboard, LogBatch, LogTaken, Refusal};
use trunkline_protocol::time::Now;

use super::Core;
use super::Map;
use super::agents::Agent;
use super::link::{LinkId, State};
use super::tenant::Tenant;
use super::wires::{Effect, Wires};
use crate::hooks::{ForwardedLogs, Hook, LogSender, LogSinkError};

/// Senders of a tenant that are remembered, whoever has been quiet for longest
/// being forgotten first. About 300 bytes each.
const SENDERS_MAX: usize = 16 * 1024;

/// Memory of the records under way, of one tenant and of all.
const TENANT_BYTES_MAX: usize = 16 * 1024 * 1024;
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// When a sender that was early is to try again, and one whose records could
/// not be taken.
const EARLY: Duration = Duration::from_secs(1);
const FAILED: Duration = Duration::from_secs(5);

/// What is under way, of all tenants.
#[derive(Debug, Default)]
pub(super) struct Logging {
    bytes: usize,
}

/// What a tenant's peers have forwarded.
#[derive(Debug, Default)]
pub(super) struct Logs {
    senders: HashMap<LogSender, Known>,
    /// Who was heard when, by a count.
    by_age: BTreeMap<u64, LogSender>,
    age: u64,
    bytes: usize,
}

/// How far a sender's latest log is.
#[derive(Debug)]
struct Known {
    stream: StreamId,
    /// Everything below was taken, or is known to be missing.
    taken: u64,
    under_way: Option<UnderWay>,
    age: u64,
}

#[derive(Debug)]
struct UnderWay {
    request: Option<RequestId>,
    bytes: usize,
}

impl Core {
    /// From now on there is a log sink: records are taken, and given to
    /// [`Effect::TakeLogs`].
    pub fn take_logs(&mut self) {
        self.wires.logging = Some(Logging::default());
    }

    /// Records of an agent or a dashboard have arrived.
    pub(super) fn handle_log(
        &mut self,
        link: LinkId,
        tenant: &TenantId,
        sender: LogSender,
        request: Option<RequestId>,
        batch: LogBatch,
    ) {
        let Self { wires, tenants, .. } = self;
        let Some(tenant) = tenants.get_mut(tenant) else { return };
        if let Err(refusal) = tenant.forward(wires, link, sender, request.clone(), batch) {
            wires.refuse_message(link, "log:batch", refusal.reply_to(request));
        }
    }

    /// The log sink's answer to [`Effect::TakeLogs`], for those logs.
    pub fn handle_logged(
        &mut self,
        logs: &ForwardedLogs,
        result: &Result<(), LogSinkError>,
        now: Now,
    ) {
        self.wires.now = now;
        let Self { wires, tenants, .. } = self;
        if let Some(tenant) = tenants.get_mut(&logs.tenant) {
            tenant.handle_logged(wires, logs, result);
        }
        self.tidy();
    }
}

impl Tenant {
    fn forward(
        &mut self,
        wires: &mut Wires,
        link: LinkId,
        sender: LogSender,
        request: Option<RequestId>,
        batch: LogBatch,
    ) -> Result<(), Refusal> {
        let Some(logging) = &mut wires.logging else {
            let message = "this hub takes no forwarded logs";
            return Err(Refusal::new(ErrorCode::Unsupported, message));
        };
        let Some(subject) = subject(&self.agents, wires.links.get(&link).map(|link| &link.state))
        else {
            return Ok(()); // no peer: nothing is to be said to it
        };
        let (stream, bytes_under_way) = (batch.stream, self.logs.bytes);
        let known = self.logs.hear(&sender, stream, batch.missing_from.unwrap_or(batch.offset));
        let Some(known) = known else {
            return Err(later(ErrorCode::RateLimited, "one batch of records at a time", EARLY));
        };
        let LogBatch { offset, records, .. } = batch;
        let first = offset.max(known.taken);
        let old = usize::try_from(first - offset).unwrap_or(usize::MAX);
        let missing = missing(known.taken, batch.missing_from, offset);
        if old >= records.len() && missing.is_none() {
            // It has all of it, or there is nothing in it.
            known.taken = first;
            let taken = LogTaken { stream, offset: known.taken };
            wires.send(link, HubToDashboard::LogTaken(taken));
            return Ok(());
        }
        let records = records.into_iter().skip(old).collect();
        let tenant = self.id.clone();
        let logs = ForwardedLogs { tenant, sender, subject, stream, missing, first, records };
        let bytes = logs.cost();
        if bytes_under_way + bytes > TENANT_BYTES_MAX || logging.bytes + bytes > BYTES_MAX {
            let message = "too many records are under way";
            return Err(later(ErrorCode::RateLimited, message, EARLY));
        }
        known.under_way = Some(UnderWay { request, bytes });
        self.logs.bytes += bytes;
        logging.bytes += bytes;
        wires.effects.push_back(Effect::TakeLogs(Box::new(logs)));
        Ok(())
    }

    fn handle_logged(
        &mut self,
        wires: &mut Wires,
        logs: &ForwardedLogs,
        result: &Result<(), LogSinkError>,
    ) {
        let known = self.logs.senders.get_mut(&logs.sender);
        let Some(known) = known.filter(|known| known.stream == logs.stream) else { return };
        let Some(UnderWay { request, bytes }) = known.under_way.take() else { return };
        self.logs.bytes -= bytes;
        if let Some(logging) = &mut wires.logging {
            logging.bytes -= bytes;
        }
        let answer = match result {
            Ok(()) => {
                known.taken = logs.end();
                let taken = LogTaken { stream: known.stream, offset: known.taken };
                HubToDashboard::LogTaken(taken)
            }
            Err(error) => {
                wires.observe_failure(Hook::LogSink, error.to_string());
                let refusal = later(ErrorCode::Internal, "the records were not taken", FAILED);
                wires.counts.refused(&refusal.code);
                HubToDashboard::Error(refusal.reply_to(request))
            }
        };
        // On the link that it has now: the one that they came on may be gone.
        let link = match &logs.sender {
            LogSender::Agent(agent) => self.agents.get(agent).and_then(Agent::link),
            LogSender::Dashboard(id) => self.dashboards.get(id).and_then(|known| known.link),
        };
        if let Some(link) = link {
            wires.send(link, answer);
        }
    }
}

impl Logs {
    /// A sender says something of its log, which is not known to be further
    /// than `from`. `None` while something of it is under way, or if there is no
    /// room to remember it.
    fn hear(&mut self, sender: &LogSender, stream: StreamId, from: u64) -> Option<&mut Known> {
        if self.senders.get(sender).is_some_and(|known| known.under_way.is_some()) {
            return None;
        }
        if !self.senders.contains_key(sender) && self.senders.len() >= SENDERS_MAX {
            let is_idle = |sender: &LogSender| {
                self.senders.get(sender).is_none_or(|known| known.under_way.is_none())
            };
            let quiet = self.by_age.iter().find(|(_, sender)| is_idle(sender));
            let age = quiet.map(|(age, _)| *age)?;
            if let Some(quiet) = self.by_age.remove(&age) {
                self.senders.remove(&quiet);
            }
        }
        self.age += 1;
        let age = self.age;
        let known = self.senders.entry(sender.clone()).or_insert_with(|| Known {
            stream,
            taken: from,
            under_way: None,
            age,
        });
        self.by_age.remove(&known.age);
        self.by_age.insert(age, sender.clone());
        known.age = age;
        if known.stream != stream {
            // Another process: what is known of the last one is of no use.
            known.stream = stream;
            known.taken = from;
        }
        // Where the sender goes on from was taken by somebody.
        known.taken = known.taken.max(from);
        Some(known)
    }
}

/// What will not come of a log that was taken up to `taken`.
fn missing(taken: u64, from: Option<u64>, offset: u64) -> Option<Range<u64>> {
    let missing = from?.max(taken)..offset;
    (!missing.is_empty()).then_some(missing)
}

fn later(code: ErrorCode, message: &str, after: Duration) -> Refusal {
    let mut refusal = Refusal::new(code, message);
    refusal.retry_after_ms = u64::try_from(after.as_millis()).ok();
    refusal
}

/// Who is at the other end of a link.
fn subject(agents: &Map<AgentId, Agent>, state: Option<&State>) -> Option<String> {
    match state? {
        State::Agent(link) => {
            let seen = agents.get(&link.agent)?.seen.as_ref()?;
            Some(seen.subject.clone())
        }
        State::Dashboard(link) => Some(link.identity.subject.clone()),
        State::Arriving | State::Greeting { .. } | State::Authenticating { .. } | State::Closed => {
            None
        }
    }
}
