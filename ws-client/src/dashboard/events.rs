//! What happens, for whoever listens.

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::core::dashboard::DashboardEvent;

/// What happens, from when it was asked for. See
/// [`Dashboard::events`](crate::Dashboard::events).
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<DashboardEvent>,
}

impl Events {
    pub(super) fn new(sender: Option<&broadcast::Sender<DashboardEvent>>) -> Self {
        let receiver = match sender {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1, // nothing will happen any more
        };
        Self { receiver }
    }

    /// The next event; `None` once the dashboard is closed. Whoever was too
    /// slow gets [`DashboardEvent::Missed`] where events are missing.
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<DashboardEvent> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(missed)) => Some(DashboardEvent::Missed(missed)),
            Err(RecvError::Closed) => None,
        }
    }
}
