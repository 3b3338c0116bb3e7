//! Where a client's tokens come from.

use std::future::{Future, pending, ready};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;
use trunkline_protocol::message::Secret;

use crate::connector::BoxFuture;
use crate::core::RefreshWanted;

/// Where tokens come from.
///
/// Asked before every attempt to connect, and while connected when the present
/// token runs out soon; then, as long as none is taken, every ten seconds. A
/// source that can get a fresh one does so when the last was refused, or is
/// about to expire.
pub trait TokenSource: Send + Sync + 'static {
    /// A token. `refused` says that the hub did not accept the last one: the
    /// same again would be in vain.
    ///
    /// # Errors
    ///
    /// Counts as a failed attempt: it is tried again later.
    fn token(&self, refused: bool) -> BoxFuture<'_, io::Result<Secret>>;
}

impl<F, Fut> TokenSource for F
where
    F: Fn(bool) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = io::Result<Secret>> + Send + 'static,
{
    fn token(&self, refused: bool) -> BoxFuture<'_, io::Result<Secret>> {
        Box::pin(self(refused))
    }
}

/// The core's call for a new token.
#[derive(Debug, Default)]
pub(crate) struct Call {
    bell: Notify,
    refused: AtomicBool,
}

impl Call {
    pub(crate) fn make(&self, wanted: RefreshWanted) {
        self.refused.store(wanted.refused, Ordering::Relaxed);
        self.bell.notify_one();
    }
}

/// What a client was given to prove who it is.
#[derive(Clone, Default)]
pub(crate) struct Tokens {
    pub(crate) source: Option<Arc<dyn TokenSource>>,
    /// Whether asking again may give another.
    pub(crate) can_renew: bool,
}

impl Tokens {
    pub(crate) fn fixed(token: Secret) -> Self {
        let source = move |_refused| ready(Ok(token.clone()));
        Self { source: Some(Arc::new(source)), can_renew: false }
    }

    pub(crate) fn from(source: impl TokenSource) -> Self {
        Self { source: Some(Arc::new(source)), can_renew: true }
    }

    /// Gives a new token whenever the hub says that the present one runs out.
    /// Never ends.
    pub(crate) async fn renew(self, call: Arc<Call>, mut give: impl FnMut(Secret)) {
        let Some(source) = self.source.filter(|_| self.can_renew) else { return pending().await };
        loop {
            call.bell.notified().await;
            match source.token(call.refused.load(Ordering::Relaxed)).await {
                Ok(token) => give(token),
                // The hub asks again, and closes the link when the present one
                // has run out.
                Err(error) => {
                    tracing::warn!(target: "trunkline::client", %error, "no new token");
                }
            }
        }
    }
}
