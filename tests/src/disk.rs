//! What a hub in the World has beside its process: a queue in memory, or the
//! one that is used on disks.

use trunkline_protocol::ids::QueueEpoch;
use trunkline_server::hooks::{QueueChange, StoredCommand};
use trunkline_server::{CommandQueue as _, MemoryQueue};

/// A queue that answers at once.
#[derive(Debug)]
pub enum Queue {
    /// In memory.
    Memory(MemoryQueue),
    /// In a file.
    #[cfg(feature = "sqlite")]
    File(File),
}

impl Queue {
    /// An empty queue in memory.
    pub fn memory(epoch: QueueEpoch) -> Self {
        Self::Memory(MemoryQueue::with_epoch(epoch))
    }

    /// An empty one of the same kind.
    pub(crate) fn another(&self, epoch: QueueEpoch) -> Self {
        match self {
            Self::Memory(_) => Self::memory(epoch),
            #[cfg(feature = "sqlite")]
            Self::File(_) => Self::file(), // which has an epoch of its own
        }
    }

    pub(crate) fn epoch(&self) -> QueueEpoch {
        match self {
            Self::Memory(queue) => queue.epoch(),
            #[cfg(feature = "sqlite")]
            Self::File(file) => file.queue().epoch(),
        }
    }

    pub(crate) fn store(&self, change: &QueueChange) {
        match self {
            Self::Memory(queue) => queue.store(change),
            #[cfg(feature = "sqlite")]
            Self::File(file) => file.wait(file.queue().apply(change)),
        }
    }

    pub(crate) fn stored(&self) -> Vec<StoredCommand> {
        match self {
            Self::Memory(queue) => queue.stored(),
            #[cfg(feature = "sqlite")]
            Self::File(file) => file.wait(file.queue().load()),
        }
    }

    /// The hub's process has died: the next one opens the queue again.
    pub(crate) fn reopen(&mut self) {
        match self {
            Self::Memory(_) => {}
            #[cfg(feature = "sqlite")]
            Self::File(file) => file.reopen(),
        }
    }
}

#[cfg(feature = "sqlite")]
pub use self::file::File;

#[cfg(feature = "sqlite")]
mod file {
    use tempfile::TempDir;
    use tokio::runtime::{Builder, Runtime};
    use trunkline_server::hooks::{QueueError, SqliteQueue, Synchronous};

    use super::Queue;

    /// A queue in a file of its own.
    #[derive(Debug)]
    pub struct File {
        folder: TempDir,
        /// `None` only while it is opened again.
        queue: Option<SqliteQueue>,
        runtime: Runtime,
    }

    impl Queue {
        /// An empty queue in a file.
        pub fn file() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let runtime = Builder::new_current_thread().build().unwrap();
            let mut file = File { folder, queue: None, runtime };
            file.reopen();
            Self::File(file)
        }
    }

    impl File {
        pub(super) fn queue(&self) -> &SqliteQueue {
            self.queue.as_ref().unwrap()
        }

        pub(super) fn reopen(&mut self) {
            self.queue = None;
            let queue = SqliteQueue::builder(self.folder.path().join("queue.db"));
            // What a power cut would take nobody takes here.
            self.queue = Some(queue.sync(Synchronous::Normal).open().unwrap());
        }

        pub(super) fn wait<T>(&self, answer: impl Future<Output = Result<T, QueueError>>) -> T {
            self.runtime.block_on(answer).unwrap()
        }
    }
}
