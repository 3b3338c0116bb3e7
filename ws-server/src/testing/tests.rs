use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use trunkline_protocol::ids::QueueEpoch;

use super::*;
use crate::hooks::{BoxFuture, MemoryQueue, QueueError};

#[tokio::test]
async fn the_memory_queue_keeps_to_it() {
    command_queue(async || MemoryQueue::new(), async |queue| queue).await;
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn the_sqlite_queue_keeps_to_it() {
    use crate::hooks::SqliteQueue;
    let folder = tempfile::tempdir().expect("a folder");
    let mut files = 0;
    let fresh = async || {
        files += 1;
        SqliteQueue::open(folder.path().join(format!("{files}.db"))).expect("it opens")
    };
    let reopen = async |queue: SqliteQueue| {
        let path = queue.path().to_owned();
        drop(queue);
        SqliteQueue::open(path).expect("it opens again")
    };
    command_queue(fresh, reopen).await;
}

/// A memory queue with something wrong.
struct Broken {
    queue: MemoryQueue,
    fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    LosesLeases,
    AcceptsOver,
    MixesTenants,
    ForgetsNothing,
    MakesWhatIsNotThere,
    LosesEnds,
    ChangesEpoch,
    LosesAllOverARestart,
    SharesAnEpoch,
}

impl CommandQueue for Broken {
    fn epoch(&self) -> QueueEpoch {
        match self.fault {
            Fault::SharesAnEpoch => QueueEpoch::from_u128(1),
            _ => self.queue.epoch(), // the others are about something else
        }
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredCommand>, QueueError>> {
        self.queue.load()
    }

    fn apply<'a>(&'a self, change: &'a QueueChange) -> BoxFuture<'a, Result<(), QueueError>> {
        let mut change = change.clone();
        let mut is_stored = true;
        match (&mut change, self.fault) {
            (QueueChange::Leased { .. }, Fault::LosesLeases)
            | (QueueChange::Settled { .. }, Fault::LosesEnds)
            | (QueueChange::Forgotten { .. }, Fault::ForgetsNothing) => is_stored = false,
            (QueueChange::Accepted(command), Fault::AcceptsOver) => {
                let (tenant, command) = (command.tenant.clone(), command.request.command);
                self.queue.store(&QueueChange::Forgotten { tenant, command });
            }
            (QueueChange::Accepted(command), Fault::MixesTenants) => {
                command.tenant = tenant("one");
            }
            (QueueChange::Leased { command, .. }, Fault::MakesWhatIsNotThere) => {
                let number = u64::try_from(command.as_u128()).expect("a small one");
                let made = accepted("one", number, 1);
                self.queue.store(&QueueChange::Accepted(Box::new(made)));
            }
            _ => {} // nothing is wrong with that
        }
        if is_stored {
            self.queue.store(&change);
        }
        Box::pin(async { Ok(()) })
    }
}

#[tokio::test]
async fn what_does_not_keep_to_it_is_caught() {
    let faults = [
        Fault::LosesLeases,
        Fault::AcceptsOver,
        Fault::MixesTenants,
        Fault::ForgetsNothing,
        Fault::MakesWhatIsNotThere,
        Fault::LosesEnds,
        Fault::ChangesEpoch,
        Fault::LosesAllOverARestart,
        Fault::SharesAnEpoch,
    ];
    for fault in faults {
        let fresh = async || Broken { queue: MemoryQueue::new(), fault };
        let reopen = async |queue: Broken| match fault {
            Fault::ChangesEpoch | Fault::LosesAllOverARestart => {
                let epoch = match fault {
                    Fault::ChangesEpoch => QueueEpoch::from_u128(2),
                    _ => queue.epoch(), // it loses the rest
                };
                let other = MemoryQueue::with_epoch(epoch);
                if fault == Fault::ChangesEpoch {
                    for command in queue.queue.stored() {
                        other.store(&QueueChange::Accepted(Box::new(command)));
                    }
                }
                Broken { queue: other, fault }
            }
            _ => queue, // it survives
        };
        let caught = AssertUnwindSafe(command_queue(fresh, reopen)).catch_unwind().await;
        assert!(caught.is_err(), "{fault:?} was not caught");
    }
}
