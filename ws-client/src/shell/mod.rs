//! The only place that waits: one driver task per client.
//!
//! Handles and driver share the core behind a mutex that is never held across
//! an await. Whoever gives the core an input (a handle, or the driver) lets
//! its outputs be dispatched before the lock is released, and wakes the
//! driver, which dials, reads, writes and sleeps as the core says.

mod clock;
mod driver;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use trunkline_protocol::frame::{Close, Frame};
use trunkline_protocol::message::Secret;
use trunkline_protocol::time::Now;

pub(crate) use self::clock::Clock;
pub(crate) use self::driver::drive;
use crate::core::dialing::{ConnectionState, DialAction};

/// What a driver needs of a core: both halves have it.
pub(crate) trait Driven: Send + 'static {
    /// Whoever hears the outputs.
    type Ears: Send + 'static;

    fn handle_dialed(&mut self, token: Option<Secret>, now: Now);
    fn handle_dial_failed(&mut self, close: &Close, now: Now);
    fn handle_frame(&mut self, frame: &Frame, now: Now);
    fn handle_lost(&mut self, close: &Close, now: Now);
    fn handle_timeout(&mut self, now: Now);
    fn poll_dial(&mut self) -> Option<DialAction>;
    /// The next frame for the link; a [`Frame::Close`] is the last.
    fn poll_transmit(&mut self, now: Now) -> Option<Frame>;
    fn deadline(&self, now: Now) -> Option<Duration>;
    fn connection(&self) -> &ConnectionState;
    /// Hands out what there is to hear. Called under the lock: must not block.
    fn dispatch(&mut self, ears: &mut Self::Ears);
}

/// A core and those who share it.
pub(crate) struct Shared<C: Driven> {
    inside: Mutex<Inside<C>>,
    /// Something changed that the driver has to look at.
    pub(crate) changed: Notify,
    connection: watch::Sender<ConnectionState>,
    clock: Clock,
}

struct Inside<C: Driven> {
    core: C,
    ears: C::Ears,
}

impl<C: Driven> Shared<C> {
    pub(crate) fn new(core: impl FnOnce(Now) -> C, ears: C::Ears) -> Self {
        let clock = Clock::start();
        let core = core(clock.now());
        let connection = watch::Sender::new(core.connection().clone());
        Self {
            inside: Mutex::new(Inside { core, ears }),
            changed: Notify::new(),
            connection,
            clock,
        }
    }

    /// Gives the core an input from a handle.
    pub(crate) fn with<T>(&self, input: impl FnOnce(&mut C, Now) -> T) -> T {
        let result = self.quietly(input);
        self.changed.notify_one();
        result
    }

    /// Gives the core an input without waking the driver: from the driver.
    pub(crate) fn quietly<T>(&self, input: impl FnOnce(&mut C, Now) -> T) -> T {
        let now = self.clock.now();
        // A panic in the core is a bug and was reported; what it left is used
        // to end in order.
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let Inside { core, ears } = &mut *inside;
        let result = input(core, now);
        core.dispatch(ears);
        self.connection.send_if_modified(|shown| {
            let changed = shown != core.connection();
            if changed {
                shown.clone_from(core.connection());
            }
            changed
        });
        result
    }

    /// The connection, observable.
    pub(crate) fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.connection.subscribe()
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }
}
