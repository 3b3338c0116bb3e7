//! How links end: a close code is advice on what to do next, and both halves
//! read it with the same total function.

use std::fmt;
use std::time::Duration;

use crate::frame::Close;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $word:literal, $advice:expr;)+) => {
        /// Why a link was closed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum CloseCode {
            $($(#[$doc])* $name,)+
            /// A code this version does not know.
            Other(u16),
        }

        impl CloseCode {
            /// Every code that is known.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The number in the close frame (RFC 6455 §7.4).
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)+
                    Self::Other(number) => number,
                }
            }

            /// The code with this number.
            pub const fn from_number(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)+
                    other => Self::Other(other),
                }
            }

            /// A stable name for logs and metrics.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                    Self::Other(_) => "other",
                }
            }

            /// What the peer should do next. See also [`Close::advice`],
            /// which takes the reason's hint into account.
            pub const fn advice(self) -> Advice {
                match self {
                    $(Self::$name => $advice,)+
                    // 4400–4499 are the peer's fault by the scheme of this
                    // table: repeating the same thing cannot help.
                    Self::Other(4400..=4499) => Advice::Never,
                    Self::Other(_) => Advice::Reconnect,
                }
            }
        }
    };
}

/// What to do after a close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Dial again by the usual back-off, which starts at once.
    Reconnect,
    /// Dial again, not before this long.
    After(Duration),
    /// Dial again with a new token; with the same one it is in vain.
    WithNewToken,
    /// Do not dial again by yourself: something must change first.
    Never,
}

codes! {
    /// 1000: done; the peer said goodbye.
    Normal = 1000, "normal", Advice::Never;
    /// 1001: the process at the other end is going away.
    GoingAway = 1001, "going_away", Advice::Reconnect;
    /// 1002: the WebSocket protocol itself was broken.
    Protocol = 1002, "protocol", Advice::Reconnect;
    /// 1003: a kind of frame that is not accepted.
    Unsupported = 1003, "unsupported", Advice::Never;
    /// 1006: the link was lost without a close. Never sent.
    Lost = 1006, "lost", Advice::Reconnect;
    /// 1007: a text frame that is not UTF-8.
    NotUtf8 = 1007, "not_utf8", Advice::Reconnect;
    /// 1008: a policy was broken and no other code fits.
    Policy = 1008, "policy", Advice::Never;
    /// 1009: a message longer than the limit.
    TooBig = 1009, "too_big", Advice::After(Duration::from_secs(5));
    /// 1011: the hub failed.
    Internal = 1011, "internal", Advice::After(Duration::from_secs(1));
    /// 1012: the hub restarts, or drains: the reason may hold a hint.
    Restart = 1012, "restart", Advice::Reconnect;
    /// 1013: the hub has more links than it allows.
    TryLater = 1013, "try_later", Advice::After(Duration::from_secs(10));
    /// 4400: too many messages that are none, or one that must not be.
    Violation = 4400, "violation", Advice::After(Duration::from_secs(30));
    /// 4401: the credentials were not accepted, or have run out.
    Unauthorized = 4401, "unauthorized", Advice::WithNewToken;
    /// 4403: these credentials may not do this here.
    Forbidden = 4403, "forbidden", Advice::Never;
    /// 4408: no greeting in time.
    GreetingTimeout = 4408, "greeting_timeout", Advice::After(Duration::from_secs(1));
    /// 4409: another link took over under the same id.
    Superseded = 4409, "superseded", Advice::Never;
    /// 4410: nothing was heard for too long.
    Silent = 4410, "silent", Advice::Reconnect;
    /// 4413: more bytes than were granted.
    BeyondGrant = 4413, "beyond_grant", Advice::After(Duration::from_secs(5));
    /// 4414: a subscription asked to be disconnected rather than lose bytes.
    Lagging = 4414, "lagging", Advice::Reconnect;
    /// 4426: none of the offered protocol versions is spoken here.
    UnsupportedProtocol = 4426, "unsupported_protocol", Advice::Never;
    /// 4429: a flood that ignored `retry_after_ms`.
    Flood = 4429, "flood", Advice::After(Duration::from_secs(30));
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.number(), self.as_str())
    }
}

const HINT: &str = "retry_after_ms=";

impl Close {
    /// A close of a draining hub that asks this peer to be back no sooner
    /// than `after`, so that a fleet does not return all at once.
    pub fn restart(after: Duration) -> Self {
        Self::hinting(CloseCode::Restart, after)
    }

    /// A close with a hint not to come back sooner than `after`.
    pub fn hinting(code: CloseCode, after: Duration) -> Self {
        Self::new(code, format!("{HINT}{}", after.as_micros().div_ceil(1000)))
    }

    /// The hint in the reason, at most an hour.
    pub fn retry_after(&self) -> Option<Duration> {
        let (_, number) = self.reason.split_once(HINT)?;
        let digits = number.split(|c: char| !c.is_ascii_digit()).next()?;
        let millis = digits.parse().ok()?;
        Some(Duration::from_millis(millis).min(Duration::from_secs(3600)))
    }

    /// What to do next: the code's advice, with the reason's hint if it has
    /// one and dialling again makes sense at all.
    pub fn advice(&self) -> Advice {
        match (self.code.advice(), self.retry_after()) {
            (Advice::Reconnect | Advice::After(_), Some(after)) => Advice::After(after),
            (advice, _) => advice,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_back_and_every_number_has_advice() {
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from_number(code.number()), *code);
        }
        for number in 0..=u16::MAX {
            // Total: no number panics, and unknown ones are told apart by whose fault.
            let advice = CloseCode::from_number(number).advice();
            if let CloseCode::Other(n) = CloseCode::from_number(number) {
                assert_eq!(advice == Advice::Never, (4400..=4499).contains(&n), "{n}");
            }
        }
    }

    #[test]
    fn a_draining_hub_spreads_its_clients_by_a_hint() {
        let close = Close::restart(Duration::from_millis(1500));
        assert_eq!(close.advice(), Advice::After(Duration::from_millis(1500)));
        let greedy = Close::new(CloseCode::Restart, "retry_after_ms=99999999999");
        assert_eq!(greedy.advice(), Advice::After(Duration::from_secs(3600)));
        let superseded = Close::new(CloseCode::Superseded, "retry_after_ms=1");
        assert_eq!(superseded.advice(), Advice::Never, "a hint does not overrule a never");
        assert_eq!(Close::new(CloseCode::Restart, "x".repeat(500)).reason.len(), 123);
    }
}
