use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

use super::*;
use crate::hooks::{BoxFuture, LogError, MemoryStreamLog};

#[tokio::test]
async fn the_memory_log_keeps_to_it() {
    stream_log(async || MemoryStreamLog::new(), async |log| log).await;
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn the_sqlite_log_keeps_to_it() {
    use crate::hooks::SqliteStreamLog;
    let folder = tempfile::tempdir().expect("a folder");
    let fresh = async || SqliteStreamLog::open(folder.path().join("log.db")).expect("it opens");
    let reopen = async |log: SqliteStreamLog| {
        let path = log.path().to_owned();
        drop(log);
        SqliteStreamLog::open(path).expect("it opens again")
    };
    stream_log(fresh, reopen).await;
}

/// A memory log with something wrong.
struct Broken {
    log: MemoryStreamLog,
    fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    AppendsOver,
    ForgetsHoles,
    MixesTenants,
    DropsNothing,
    EvictsNothing,
    EvictsTooMuch,
    OpensOver,
    MakesWhatIsNotThere,
    LosesAllOverARestart,
    TurnsOrder,
}

impl StreamLog for Broken {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredStream>, LogError>> {
        self.log.load()
    }

    fn apply<'a>(&'a self, changes: &'a [LogChange]) -> BoxFuture<'a, Result<(), LogError>> {
        let mut changes = changes.to_vec();
        if self.fault == Fault::TurnsOrder {
            changes.reverse();
        }
        for change in &mut changes {
            self.apply_one(change);
        }
        Box::pin(async { Ok(()) })
    }
}

impl Broken {
    fn apply_one(&self, change: &mut LogChange) {
        let known = |tenant: &_, stream: &_| {
            let stored = self.log.stored().into_iter();
            stored.map(|s| s.head).find(|h| h.tenant == *tenant && h.stream == *stream)
        };
        match (&mut *change, self.fault) {
            (LogChange::Grown { piece: Piece::Gap(_), .. }, Fault::ForgetsHoles)
            | (LogChange::Dropped { .. }, Fault::DropsNothing)
            | (LogChange::Evicted { .. }, Fault::EvictsNothing) => return,
            (LogChange::Grown { tenant, stream, piece }, Fault::AppendsOver) => {
                let stored = self.log.stored();
                let all =
                    stored.iter().filter(|s| (&s.head.tenant, s.head.stream) == (tenant, *stream));
                if all.flat_map(|s| &s.pieces).any(|known| known.from() >= piece.from()) {
                    return;
                }
            }
            (LogChange::Evicted { before, .. }, Fault::EvictsTooMuch) => *before += 16 * 1024,
            (LogChange::Dropped { tenant, .. }, Fault::MixesTenants)
                if tenant.as_str() == "one" =>
            {
                for stored in self.log.stored() {
                    let StreamHead { tenant, stream, .. } = stored.head;
                    self.log.store(&LogChange::Dropped { tenant, stream });
                }
            }
            (LogChange::Opened(head), Fault::OpensOver)
                if known(&head.tenant, &head.stream).is_some() =>
            {
                return;
            }
            (LogChange::Grown { tenant, stream, .. }, Fault::MakesWhatIsNotThere)
                if known(tenant, stream).is_none() =>
            {
                let made = StreamHead { tenant: tenant.clone(), stream: *stream, ..head("one", 1) };
                self.log.store(&LogChange::Opened(made));
            }
            _ => {} // nothing is wrong with that
        }
        self.log.store(change);
    }
}

#[tokio::test]
async fn what_does_not_keep_to_it_is_caught() {
    let faults = [
        Fault::AppendsOver,
        Fault::ForgetsHoles,
        Fault::MixesTenants,
        Fault::DropsNothing,
        Fault::EvictsNothing,
        Fault::EvictsTooMuch,
        Fault::OpensOver,
        Fault::MakesWhatIsNotThere,
        Fault::LosesAllOverARestart,
        Fault::TurnsOrder,
    ];
    for fault in faults {
        let fresh = async || Broken { log: MemoryStreamLog::new(), fault };
        let reopen = async |broken: Broken| match fault {
            Fault::LosesAllOverARestart => Broken { log: MemoryStreamLog::new(), fault },
            _ => broken, // it survives
        };
        let caught = AssertUnwindSafe(stream_log(fresh, reopen)).catch_unwind().await;
        assert!(caught.is_err(), "{fault:?} was not caught");
    }
}
