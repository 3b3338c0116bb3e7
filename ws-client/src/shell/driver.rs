//! The driver: dials when the core says so, then moves frames both ways until
//! the link is gone, for ever.
//!
//! Finished work first, then flush, then new work: what has arrived is read,
//! all that the core has is written with one flush, and the task sleeps when
//! neither side has more. Reading goes on while the hub does not take what is
//! written.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use trunkline_protocol::close::CloseCode;
use trunkline_protocol::frame::{Close, Frame};

use super::{Driven, Shared};
use crate::HttpRefusal;
use crate::connector::{BoxLink, Connector};
use crate::core::dialing::DialAction;
use crate::tokens::TokenSource;

/// Frames read before anything is written, and written before one flush.
const ROUND_FRAMES: usize = 64;

/// How long the close of this side may take to go out and be answered.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(2);

/// Drives a core until its connection is over.
pub(crate) async fn drive<C: Driven>(
    shared: Arc<Shared<C>>,
    connector: Arc<dyn Connector>,
    tokens: Option<Arc<dyn TokenSource>>,
) {
    if tokens.is_some() && connector.is_exposed() {
        tracing::warn!(
            target: "trunkline::client",
            "THE TOKEN CAN BE READ ON THE WAY to the hub, which is on another machine and has no \
             TLS: use a wss:// URL"
        );
    }
    loop {
        match next_action(&shared).await {
            Some(DialAction::Dial { token_refused }) => {
                dial(&shared, &*connector, tokens.as_deref(), token_refused).await;
            }
            Some(DialAction::HangUp) => {}
            None => return,
        }
    }
}

/// Sleeps until the core wants to dial; `None` when it never will again.
async fn next_action<C: Driven>(shared: &Shared<C>) -> Option<DialAction> {
    loop {
        let changed = shared.changed.notified();
        let (over, action, deadline) = shared.quietly(|core, now| {
            core.handle_timeout(now);
            (core.connection().is_over(), core.poll_dial(), core.deadline(now))
        });
        if over {
            return None;
        }
        if action.is_some() {
            return action;
        }
        match deadline {
            Some(at) => {
                tokio::select! {
                    () = shared.clock().sleep_until(at) => {}
                    () = changed => {}
                }
            }
            None => changed.await,
        }
    }
}

/// One attempt, and the life of the link if it succeeds.
async fn dial<C: Driven>(
    shared: &Shared<C>,
    connector: &dyn Connector,
    tokens: Option<&dyn TokenSource>,
    token_refused: bool,
) {
    let attempt = async {
        let token = match tokens {
            Some(tokens) => Some(tokens.token(token_refused).await?),
            None => None,
        };
        io::Result::Ok((connector.dial().await?, token))
    };
    let mut attempt = pin!(attempt);
    let (link, token) = loop {
        let changed = shared.changed.notified();
        let (action, deadline) = shared.quietly(|core, now| {
            core.handle_timeout(now);
            (core.poll_dial(), core.deadline(now))
        });
        if action == Some(DialAction::HangUp) || shared.quietly(|c, _| c.connection().is_over()) {
            return;
        }
        let timer = async {
            match deadline {
                Some(at) => shared.clock().sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            made = &mut attempt => match made {
                Ok(made) => break made,
                Err(error) => {
                    tracing::debug!(target: "trunkline::client", %error, "no link");
                    let said = error.get_ref().and_then(|error| error.downcast_ref());
                    let close = said.map_or_else(
                        || Close::new(CloseCode::Lost, error.to_string()),
                        HttpRefusal::close,
                    );
                    shared.quietly(|core, now| core.handle_dial_failed(&close, now));
                    return;
                }
            },
            () = timer => {}
            () = changed => {}
        }
    };
    shared.quietly(|core, now| core.handle_dialed(token, now));
    let life = run(shared, link);
    // A record about the sending of records would be one more to send.
    #[cfg(feature = "logs")]
    let life = crate::logs::unheard(life);
    life.await;
}

/// How a link ended.
enum Over {
    /// The hub is gone, or said a close.
    Lost(Close),
    /// The close of this side is written.
    Said(Close),
    /// The core gave it up.
    HungUp,
}

/// The life of one link.
async fn run<C: Driven>(shared: &Shared<C>, mut link: BoxLink) {
    let mut state = Moving { reading: true, unflushed: false };
    let over = loop {
        let changed = shared.changed.notified();
        let deadline = shared.quietly(|core, now| {
            core.handle_timeout(now);
            core.deadline(now)
        });
        let timer = async {
            match deadline {
                Some(at) => shared.clock().sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            over = std::future::poll_fn(|cx| state.poll(shared, &mut link, cx)) => {
                // With none, frames were read: the deadline may have moved.
                if let Some(over) = over {
                    break over;
                }
            }
            () = changed => {}
            () = timer => {}
        }
    };
    match over {
        Over::Lost(close) => {
            // What answers the hub's close lies ready; if it cannot go at
            // once, nobody waits for it.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = link.as_mut().poll_flush(&mut cx);
            shared.quietly(|core, now| core.handle_lost(&close, now));
        }
        // The core knows.
        Over::HungUp => {}
        Over::Said(close) => {
            // Whether the last words arrive is up to the hub.
            let last = async {
                use futures_util::{SinkExt as _, StreamExt as _};
                if link.flush().await.is_ok() {
                    while let Some(Ok(_)) = link.next().await {}
                }
            };
            let _ = tokio::time::timeout(LAST_WORDS, last).await;
            shared.quietly(|core, now| core.handle_lost(&close, now));
        }
    }
}

struct Moving {
    reading: bool,
    unflushed: bool,
}

impl Moving {
    /// Moves what can be moved. Ready with `None` when something was read:
    /// the core may have other deadlines now.
    fn poll<C: Driven>(
        &mut self,
        shared: &Shared<C>,
        link: &mut BoxLink,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Over>> {
        let lost = |error: &io::Error| {
            Poll::Ready(Some(Over::Lost(Close::new(CloseCode::Lost, error.to_string()))))
        };
        let mut read = Vec::new();
        let mut end = None;
        while self.reading && end.is_none() && read.len() < ROUND_FRAMES {
            match link.as_mut().poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(Frame::Close(close)))) => end = Some(close),
                Poll::Ready(Some(Ok(frame))) => read.push(frame),
                Poll::Ready(Some(Err(error))) => {
                    end = Some(Close::new(CloseCode::Lost, error.to_string()));
                }
                Poll::Ready(None) => end = Some(Close::new(CloseCode::Lost, "the link ended")),
            }
        }
        if !read.is_empty() {
            shared.quietly(|core, now| {
                for frame in &read {
                    core.handle_frame(frame, now);
                }
            });
        }
        if let Some(close) = end {
            self.reading = false;
            return Poll::Ready(Some(Over::Lost(close)));
        }
        if shared.quietly(|core, _| core.poll_dial()) == Some(DialAction::HangUp) {
            return Poll::Ready(Some(Over::HungUp));
        }
        let mut wrote = 0;
        let mut blocked = false;
        loop {
            match link.as_mut().poll_ready(cx) {
                Poll::Pending => {
                    blocked = true;
                    break;
                }
                Poll::Ready(Err(error)) => return lost(&error),
                Poll::Ready(Ok(())) => {}
            }
            let next = shared.quietly(C::poll_transmit);
            let Some(frame) = next else { break };
            let close = match &frame {
                Frame::Close(close) => Some(close.clone()),
                Frame::Text(_) | Frame::Binary(_) => None,
            };
            if let Err(error) = link.as_mut().start_send(frame) {
                return lost(&error);
            }
            self.unflushed = true;
            if let Some(close) = close {
                return Poll::Ready(Some(Over::Said(close)));
            }
            wrote += 1;
            if wrote >= ROUND_FRAMES {
                break;
            }
        }
        if self.unflushed {
            match link.as_mut().poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => return lost(&error),
                Poll::Pending => {}
            }
        }
        let more = !read.is_empty() || (wrote >= ROUND_FRAMES && !blocked);
        if more { Poll::Ready(None) } else { Poll::Pending }
    }
}
