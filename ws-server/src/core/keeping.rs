//! A copy of the output in the stream log, which outlives the hub.
//!
//! The stream log reads each log as one more reader: it has a position in
//! each, and takes what there is since, about 1 MiB at a time. One batch is
//! under way at a time; what comes meanwhile gathers for the next. A log that
//! evicts faster than that leaves a gap in the copy, as it would for anybody.

use std::collections::VecDeque;
use std::time::Duration;

use trunkline_protocol::codec::binary::{OUTPUT_HEADER_BYTES, parse_output};
use trunkline_protocol::ids::{StreamId, TenantId};
use trunkline_protocol::message::GapReason;
use trunkline_protocol::stream::{Log, Read};
use trunkline_protocol::time::Now;

use super::Core;
use super::deadlines::Due;
use super::streams::Stream;
use super::tenant::Tenant;
use super::wires::{Effect, Wires};
use crate::hooks::{Hook, LogChange, LogError, Piece, StoredStream, StreamHead};

/// Output of one batch, and of one stream in it while others wait.
const BATCH_BYTES: usize = 1024 * 1024;
const TURN_BYTES: usize = 256 * 1024;

/// Changes in one batch.
const BATCH_CHANGES: usize = 1024;

/// How long after a failure the next batch is tried.
const RETRY: Duration = Duration::from_secs(1);

/// How far the copies are.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// Streams of which there is more than was taken, each once.
    turn: VecDeque<(TenantId, StreamId)>,
    /// Streams that are gone, and were kept.
    dropped: Vec<(TenantId, StreamId)>,
    under_way: Option<Batch>,
    /// The last batch failed, and the next is not yet tried.
    pub(super) fails: bool,
}

/// What will be kept when the answer is good.
#[derive(Debug, Default)]
struct Batch {
    taken: Vec<(TenantId, StreamId, Copied)>,
    dropped: Vec<(TenantId, StreamId)>,
}

/// How far the copy of one stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Copied {
    /// The stream log knows whose it is.
    is_open: bool,
    /// It has nothing below.
    from: u64,
    /// It has everything else below.
    pub(super) to: u64,
}

impl Wires {
    /// There is something to copy of a stream, which is in line for that once.
    pub(super) fn keep(&mut self, tenant: &TenantId, id: StreamId, copying: &mut bool) {
        if let Some(keeping) = &mut self.keeping
            && !std::mem::replace(copying, true)
        {
            keeping.turn.push_back((tenant.clone(), id));
        }
    }

    /// A stream is gone, and so is to be its copy.
    pub(super) fn keep_no_more(&mut self, tenant: &TenantId, id: StreamId) {
        let Some(keeping) = &mut self.keeping else { return };
        // What is under way is about this one, not about another of its name.
        if let Some(batch) = &mut keeping.under_way {
            batch.taken.retain(|(of, taken, _)| (of, *taken) != (tenant, id));
        }
        keeping.dropped.push((tenant.clone(), id));
    }
}

impl Core {
    /// Sends the next batch on its way if none is.
    pub(super) fn keep(&mut self) {
        let Self { wires, tenants, .. } = self;
        let slack = wires.limits.log_bytes_per_stream as u64 / 8;
        let Some(keeping) = &mut wires.keeping else { return };
        let is_idle = keeping.turn.is_empty() && keeping.dropped.is_empty();
        if is_idle || keeping.fails || keeping.under_way.is_some() {
            return;
        }
        let mut batch = Batch { taken: Vec::new(), dropped: std::mem::take(&mut keeping.dropped) };
        let mut changes: Vec<LogChange> = Vec::new();
        for (tenant, stream) in &batch.dropped {
            changes.push(LogChange::Dropped { tenant: tenant.clone(), stream: *stream });
        }
        let (mut left, mut again) = (BATCH_BYTES, Vec::new());
        while left > 0
            && changes.len() < BATCH_CHANGES
            && let Some((tenant, id)) = keeping.turn.pop_front()
        {
            let stream = tenants.get_mut(&tenant).and_then(|tenant| tenant.streams.get_mut(&id));
            let Some(stream) = stream else { continue };
            let share = if keeping.turn.is_empty() { left } else { left.min(TURN_BYTES) };
            let (taken, copied) = stream.copy(&tenant, share, slack, &mut changes);
            left = left.saturating_sub(taken);
            stream.copying = copied.to < stream.log.end();
            if stream.copying {
                again.push((tenant.clone(), id));
            }
            batch.taken.push((tenant, id, copied));
        }
        keeping.turn.extend(again);
        if !changes.is_empty() {
            wires.effects.push_back(Effect::Keep(changes));
            keeping.under_way = Some(batch);
        }
    }

    /// The stream log's answer to [`Effect::Keep`].
    pub fn handle_kept(&mut self, result: &Result<(), LogError>, now: Now) {
        self.wires.now = now;
        let Self { wires, tenants, .. } = self;
        let Some(keeping) = &mut wires.keeping else { return };
        let Some(batch) = keeping.under_way.take() else { return };
        keeping.fails = result.is_err();
        if let Err(error) = result {
            keeping.dropped.extend(batch.dropped);
            wires.observe_failure(Hook::StreamLog, error.to_string());
            wires.in_time(Due::Keep, RETRY);
        }
        for (id, stream, copied) in batch.taken {
            if let Some(tenant) = tenants.get_mut(&id) {
                tenant.handle_copied(wires, stream, result.is_ok().then_some(copied));
            }
        }
        self.tidy();
    }

    /// After a failure it is time to try again.
    pub(super) fn handle_keep(&mut self) {
        if let Some(keeping) = &mut self.wires.keeping {
            keeping.fails = false;
        }
    }

    /// What the stream log has, at the start.
    pub(super) fn load_streams(&mut self, stored: Vec<StoredStream>) {
        for stored in stored {
            let Self { wires, tenants, .. } = self;
            let StoredStream { head, pieces } = stored;
            let (id, stream) = (head.tenant.clone(), head.stream);
            let log = restored(stream, pieces);
            let copied = Copied { is_open: true, from: log.start(), to: log.end() };
            let tenant = tenants.get_mut(&id);
            if !tenant.is_some_and(|tenant| tenant.load_stream(wires, head, log, copied)) {
                wires.keep_no_more(&id, stream);
            }
        }
        self.bound_logs();
        self.keep();
    }
}

impl Stream {
    /// Up to where its agent need not keep it for a hub that dies: what the
    /// stream log has, or, while there is none that works, what is here.
    pub(super) fn stored(&self, keeping: Option<&Keeping>) -> u64 {
        match keeping {
            Some(keeping) if !keeping.fails => self.copied.to.max(self.told.stored),
            Some(_) | None => self.log.end(),
        }
    }

    /// Appends what the copy lacks, about `bytes` of it: how much that was, and
    /// how far the copy is with it.
    fn copy(
        &self,
        tenant: &TenantId,
        bytes: usize,
        slack: u64,
        changes: &mut Vec<LogChange>,
    ) -> (usize, Copied) {
        let (id, mut taken, mut copied) = (self.log.stream(), 0, self.copied);
        if !std::mem::replace(&mut copied.is_open, true) {
            changes.push(LogChange::Opened(StreamHead {
                tenant: tenant.clone(),
                stream: id,
                command: self.command,
                attempt: self.attempt,
                agent: self.agent.clone(),
            }));
        }
        while taken < bytes && changes.len() < BATCH_CHANGES {
            let piece = match self.log.read_gathered(copied.to, u64::MAX) {
                Read::Chunk { frame, next } => {
                    let Ok(header) = parse_output(&frame) else { break };
                    copied.to = next;
                    let data = frame.slice(OUTPUT_HEADER_BYTES..);
                    taken += data.len();
                    Piece::Output { offset: header.offset, channel: header.channel, data }
                }
                Read::Gap(gap) => {
                    copied.to = gap.to;
                    Piece::Gap(gap)
                }
                Read::End => break,
            };
            changes.push(LogChange::Grown { tenant: tenant.clone(), stream: id, piece });
        }
        let start = self.log.start().min(copied.to);
        if start.saturating_sub(copied.from) > slack {
            copied.from = start;
            changes.push(LogChange::Evicted { tenant: tenant.clone(), stream: id, before: start });
        }
        (taken, copied)
    }
}

impl Tenant {
    /// A batch with something of a stream is kept, or is not.
    fn handle_copied(&mut self, wires: &mut Wires, id: StreamId, copied: Option<Copied>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        match copied {
            Some(copied) => stream.copied = copied,
            None => wires.keep(&self.id, id, &mut stream.copying),
        }
        self.tell_stored_of(wires, id);
    }
}

/// The log that was kept. What does not follow on what is there was lost.
fn restored(stream: StreamId, pieces: Vec<Piece>) -> Log {
    let mut log = match pieces.first() {
        Some(Piece::Output { offset, .. }) if *offset > 0 => {
            Log::new_after_loss(stream, *offset, GapReason::Evicted)
        }
        Some(Piece::Gap(gap)) if gap.from > 0 => {
            Log::new_after_loss(stream, gap.from, GapReason::Evicted)
        }
        Some(_) | None => Log::new(stream),
    };
    for piece in pieces {
        log.skip(piece.from(), GapReason::HubLoss);
        match piece {
            // It follows, or is known.
            Piece::Output { offset, channel, data } => drop(log.append(offset, channel, &data)),
            Piece::Gap(gap) => drop(log.skip(gap.to, gap.reason)),
        }
    }
    log
}
