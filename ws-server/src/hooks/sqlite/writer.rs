//! The thread that owns the connection: gathers what waits into transactions.

use std::time::{Duration, SystemTime};

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use trunkline_protocol::ids::{AgentId, TenantId};

use super::{HistoryCursor, HistoryPage, rows};
use crate::hooks::{QueueChange, QueueError, StoredCommand};

/// Most changes in one transaction.
const GROUP_MAX: usize = 256;

/// Most forgotten commands that are deleted at a time.
const PRUNE_MAX: u32 = 256;

type Answer<T> = oneshot::Sender<Result<T, QueueError>>;

/// Something to do.
#[derive(Debug)]
pub(super) enum Job {
    Apply {
        change: QueueChange,
        answer: Answer<()>,
    },
    Load {
        answer: Answer<Vec<StoredCommand>>,
    },
    History {
        tenant: TenantId,
        agent: Option<AgentId>,
        from: Option<HistoryCursor>,
        count: u32,
        answer: Answer<HistoryPage>,
    },
}

#[derive(Debug)]
pub(super) struct Writer {
    pub(super) connection: Connection,
    pub(super) history: Duration,
}

impl Writer {
    /// Does what there is to do until nobody can ask for more.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut group = Vec::new();
        while let Some(first) = jobs.blocking_recv() {
            let mut next = Some(first);
            while let Some(job) = next {
                match job {
                    Job::Apply { change, answer } => group.push((change, answer)),
                    Job::Load { answer } => {
                        self.store(&mut group);
                        let _ = answer.send(rows::load(&self.connection).map_err(|e| failed(&e)));
                    }
                    Job::History { tenant, agent, from, count, answer } => {
                        self.store(&mut group);
                        let page =
                            rows::history(&self.connection, &tenant, agent.as_ref(), from, count);
                        let _ = answer.send(page.map_err(|e| failed(&e)));
                    }
                }
                next = if group.len() < GROUP_MAX { jobs.try_recv().ok() } else { None };
            }
            self.store(&mut group);
        }
    }

    /// Stores a group in one transaction. If that fails each is tried alone,
    /// so that one that cannot be stored takes no other with it.
    fn store(&mut self, group: &mut Vec<(QueueChange, Answer<()>)>) {
        if group.is_empty() {
            return;
        }
        let together = self.try_store(group.iter().map(|(change, _)| change));
        let is_alone = group.len() == 1;
        for (change, answer) in group.drain(..) {
            let result = match &together {
                Ok(()) => Ok(()),
                Err(error) if is_alone => Err(failed(error)),
                Err(_) => self.try_store(std::iter::once(&change)).map_err(|error| failed(&error)),
            };
            let _ = answer.send(result); // who asked may have gone
        }
    }

    fn try_store<'a>(
        &mut self,
        changes: impl Iterator<Item = &'a QueueChange>,
    ) -> rusqlite::Result<()> {
        let now_ms = now_ms();
        let keeps = !self.history.is_zero();
        let whole = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut forgets = false;
        for change in changes {
            forgets |= matches!(change, QueueChange::Forgotten { .. });
            rows::apply(&whole, change, keeps.then_some(now_ms))?;
        }
        if forgets {
            let kept_ms = u64::try_from(self.history.as_millis()).unwrap_or(u64::MAX);
            rows::prune(&whole, now_ms.saturating_sub(kept_ms), PRUNE_MAX)?;
        }
        // Dropped without a commit, it is rolled back.
        whole.commit()
    }
}

fn failed(error: &rusqlite::Error) -> QueueError {
    QueueError(error.to_string())
}

#[expect(clippy::disallowed_methods, reason = "the age of a history, outside the core")]
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
