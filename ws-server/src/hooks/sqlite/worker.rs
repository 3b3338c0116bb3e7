//! A thread that owns a connection, and the way to it.

use std::io;
use std::thread::{Builder, JoinHandle};

use tokio::sync::{mpsc, oneshot};

/// What is said of a thread that has panicked.
pub(super) const GONE: &str = "its writer is gone";

/// The thread. It ends when this is dropped and all that waits is done.
#[derive(Debug)]
pub(super) struct Worker<J> {
    /// `None` once it is dropped.
    jobs: Option<mpsc::Sender<J>>,
    thread: Option<JoinHandle<()>>,
}

impl<J: Send + 'static> Worker<J> {
    /// Starts a thread that takes jobs, of which so many may wait.
    pub(super) fn start(
        name: &str,
        jobs_max: usize,
        run: impl FnOnce(mpsc::Receiver<J>) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, waiting) = mpsc::channel(jobs_max);
        let thread = Builder::new().name(name.into()).spawn(move || run(waiting))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Has a job done. `None` when there is nobody to do it.
    pub(super) async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> J) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.jobs.as_ref()?.send(job(answer)).await.ok()?;
        answered.await.ok()
    }
}

impl<J> Drop for Worker<J> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic of it was told when it happened
        }
    }
}
