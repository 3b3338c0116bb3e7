//! The hub's wake-ups in every order of two threads: built from the same file
//! as the hub, with the atomics of `loom`. A wake-up that is lost is a thread
//! that waits for ever, which `loom` reports.

#![allow(clippy::expect_used, clippy::panic, reason = "tests")]

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::Poll;

use loom::future::block_on;
use loom::sync::{Arc, Mutex};
use loom::thread;

use self::wake_up::WakeUp;

#[path = "../../ws-server/src/shell/wake_up.rs"]
mod wake_up;

mod sync {
    use std::task::Waker;

    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};

    /// That of `loom`, with the signatures of the one that the hub uses.
    #[derive(Default)]
    pub(crate) struct AtomicWaker(loom::future::AtomicWaker);

    impl AtomicWaker {
        pub(crate) fn register(&self, waker: &Waker) {
            self.0.register_by_ref(waker);
        }

        pub(crate) fn wake(&self) {
            self.0.wake();
        }
    }
}

/// What stands for the core: how much there is for the link.
#[derive(Default)]
struct Hub {
    core: Mutex<u32>,
    wake: WakeUp,
}

impl Hub {
    fn more(&self) {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        *core += 1;
        self.wake.wake(); // as the shell does it, before the lock is released
    }

    fn take(&self) -> u32 {
        std::mem::take(&mut *self.core.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A link's task: looks into the core only when it was woken. Ends with `all`,
/// or when it is stopped; how much it had by then.
fn run(hub: &Hub, all: u32) -> u32 {
    let mut had = 0;
    block_on(poll_fn(|cx| {
        loop {
            let woken = hub.wake.poll(cx);
            if hub.wake.is_stopped() {
                return Poll::Ready(());
            }
            if !woken {
                return Poll::Pending;
            }
            had += hub.take();
            if had == all {
                return Poll::Ready(());
            }
        }
    }));
    had
}

#[test]
fn no_wake_up_is_lost() {
    loom::model(|| {
        let hub = Arc::new(Hub::default());
        let link = Arc::clone(&hub);
        let task = thread::spawn(move || run(&link, 2));
        hub.more();
        hub.more();
        assert_eq!(task.join().expect("it ends"), 2);
    });
}

#[test]
fn two_who_wake_at_a_time_are_both_heard() {
    loom::model(|| {
        let hub = Arc::new(Hub::default());
        let (link, other) = (Arc::clone(&hub), Arc::clone(&hub));
        let task = thread::spawn(move || run(&link, 2));
        let other = thread::spawn(move || other.more());
        hub.more();
        assert_eq!(task.join().expect("it ends"), 2);
        other.join().expect("it ends");
    });
}

#[test]
fn a_link_that_is_stopped_ends() {
    loom::model(|| {
        let hub = Arc::new(Hub::default());
        let link = Arc::clone(&hub);
        let task = thread::spawn(move || run(&link, 2));
        hub.more();
        hub.wake.stop();
        assert!(task.join().expect("it ends") <= 1);
    });
}
