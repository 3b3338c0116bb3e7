//! How a link's task hears that the core has something for it: the one place
//! where tasks meet without a lock.
//!
//! It takes its atomics from `super`, because it is built a second time with
//! those of a checker that tries every order of them.

use std::task::Context;

use super::sync::{AtomicBool, AtomicWaker, Ordering};

/// Tells a link's task that the core has something for it.
#[derive(Default)]
pub(crate) struct WakeUp {
    pending: AtomicBool,
    stopped: AtomicBool,
    waker: AtomicWaker,
}

impl WakeUp {
    pub(crate) fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Ends the link, without a word.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether the link is to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Whether it was woken since the last look. Whatever the answer, the task
    /// is woken by what comes next: waking used up its waker, so that is
    /// registered anew before looking.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> bool {
        self.waker.register(cx.waker());
        self.pending.swap(false, Ordering::AcqRel)
    }
}
