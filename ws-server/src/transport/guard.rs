//! A socket that counts: what a message may take in bytes and in time, below
//! the WebSocket library, which bounds the size of messages but neither the
//! number of their fragments, nor how long they take, nor the control frames
//! around them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use trunkline_protocol::close::CloseCode;

use super::Violation;

/// A socket's bounds until its peer has greeted, and from then on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// For one message with all that its frames take.
    pub(super) message_bytes_max: usize,
    /// For control frames between two messages.
    pub(super) control_bytes_max: usize,
}

/// Says when a peer has greeted.
pub(crate) type Greeted = Arc<AtomicBool>;

/// Longest frame header of RFC 6455 §5.2: two bytes, an extended length, a mask.
const HEADER_BYTES_MAX: usize = 14;

/// Follows the frames in the bytes as they are read.
///
/// ```text
///   text fin=0 │ ping │ continue fin=0 │ continue fin=1 │ ping │ text fin=1
///   └────────────── one message ──────────────────────┘ └alone┘ └─ another ─┘
/// ```
///
/// What is *under way* is a message, from the first byte of its first frame to
/// the last of its last, or a control frame that stands alone.
#[derive(Debug)]
pub(super) struct Meter {
    bounds: Bounds,
    /// What takes their place as soon as the peer has greeted.
    then: Option<(Greeted, Bounds)>,
    at: At,
    /// Bytes of the message under way, its frame headers and the control
    /// frames within it included.
    message_bytes: Option<usize>,
    /// Bytes of control frames since the last whole message.
    control_bytes: usize,
    /// Counts what was begun, so that one can be told from the next.
    begun: u64,
    /// A control frame is longer than RFC 6455 §5.5 allows.
    is_control_too_long: bool,
    /// A message is longer than it may be, or says that it will be.
    is_too_big: bool,
}

#[derive(Debug, Clone, Copy)]
enum At {
    /// In a header, of which this much is known.
    Header { bytes: [u8; HEADER_BYTES_MAX], len: usize },
    /// In a payload.
    Payload { left: u64, is_control: bool, is_last: bool },
}

impl At {
    const START: Self = Self::Header { bytes: [0; HEADER_BYTES_MAX], len: 0 };
}

impl Meter {
    pub(super) fn new(bounds: Bounds, then: Option<(Greeted, Bounds)>) -> Self {
        Self {
            bounds,
            then,
            at: At::START,
            message_bytes: None,
            control_bytes: 0,
            begun: 0,
            is_control_too_long: false,
            is_too_big: false,
        }
    }

    /// Names what is under way, if anything is: another number for another.
    pub(super) fn under_way(&self) -> Option<u64> {
        let between = self.message_bytes.is_none() && matches!(self.at, At::Header { len: 0, .. });
        (!between).then_some(self.begun)
    }

    /// Follows bytes that were read. Returns how many of them may be passed
    /// on: all, or those before the frame that makes its message too long.
    fn count(&mut self, read: &[u8]) -> usize {
        let bounds = self.bounds();
        let (mut at, mut frame) = (0, 0);
        while let Some(&next) = read.get(at) {
            let taken = match &mut self.at {
                At::Header { bytes, len } => {
                    if *len == 0 {
                        frame = at;
                        let is_control = next & 0x08 != 0;
                        if self.message_bytes.is_none() {
                            self.begun += 1;
                            self.message_bytes = (!is_control).then_some(0);
                        }
                    }
                    bytes[*len] = next;
                    *len += 1;
                    1
                }
                At::Payload { left, .. } => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len() - at);
                    *left -= taken as u64;
                    taken
                }
            };
            at += taken;
            let is_control = match self.at {
                At::Header { bytes, .. } => bytes[0] & 0x08 != 0,
                At::Payload { is_control, .. } => is_control,
            };
            if is_control {
                self.control_bytes += taken;
            }
            if let Some(message) = &mut self.message_bytes {
                *message += taken;
            }
            self.step();
            if self.is_too_big || self.message_bytes_to_come() > bounds.message_bytes_max {
                self.is_too_big = true;
                return frame;
            }
        }
        read.len()
    }

    /// Of the message under way, with what its frame is yet to bring by its own
    /// word: whoever reads its header may make room for all of it.
    fn message_bytes_to_come(&self) -> usize {
        let left = match self.at {
            At::Payload { left, is_control: false, .. } => usize::try_from(left),
            At::Payload { .. } | At::Header { .. } => Ok(0),
        };
        let bytes = self.message_bytes.unwrap_or_default();
        bytes.saturating_add(left.unwrap_or(usize::MAX))
    }

    fn bounds(&mut self) -> Bounds {
        if let Some((_, bounds)) = self.then.take_if(|(greeted, _)| greeted.load(Ordering::Acquire))
        {
            self.bounds = bounds;
        }
        self.bounds
    }

    /// From a whole header to its payload, from a whole payload to the next
    /// header.
    fn step(&mut self) {
        if let At::Header { bytes, len } = self.at
            && let Some(left) = payload_bytes(&bytes[..len])
        {
            let is_control = bytes[0] & 0x08 != 0;
            self.is_control_too_long |= is_control && left > 125;
            self.at = At::Payload { left, is_control, is_last: bytes[0] & 0x80 != 0 };
        }
        if let At::Payload { left: 0, is_control, is_last } = self.at {
            self.at = At::START;
            if is_last && !is_control {
                self.message_bytes = None;
                self.control_bytes = 0;
            }
        }
    }

    fn violation(&self) -> Option<Violation> {
        if self.is_control_too_long {
            let why = "a control frame has at most 125 bytes";
            return Some(Violation::new(CloseCode::Protocol, why));
        }
        if self.is_too_big {
            return Some(Violation::new(CloseCode::TooBig, "a message takes too many bytes"));
        }
        if self.control_bytes > self.bounds.control_bytes_max {
            let why = "too many control frames without a message";
            return Some(Violation::new(CloseCode::Policy, why));
        }
        None
    }
}

/// The length of the payload, once the header is whole.
fn payload_bytes(header: &[u8]) -> Option<u64> {
    let second = *header.get(1)?;
    let (start, extended) = match second & 0x7f {
        126 => (2, 2),
        127 => (2, 8),
        short => (0, usize::from(short)),
    };
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    if start == 0 {
        return (header.len() == 2 + mask).then_some(extended as u64);
    }
    if header.len() < start + extended + mask {
        return None;
    }
    let length = &header[start..start + extended];
    Some(length.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)))
}

/// A socket under a [`Meter`].
pub(super) struct Guarded<S> {
    pub(super) socket: S,
    pub(super) meter: Meter,
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(violation) = self.meter.violation() {
            return Poll::Ready(Err(violation.into_error()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        let read = &buf.filled()[before..];
        let passed = self.meter.count(read);
        if passed == 0 && !read.is_empty() {
            buf.set_filled(before);
            let violation = self.meter.violation();
            let violation =
                violation.map_or(io::ErrorKind::InvalidData.into(), Violation::into_error);
            return Poll::Ready(Err(violation));
        }
        // The rest is said at the next read.
        buf.set_filled(before + passed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A masked frame of `len` zero bytes.
    fn frame(first: u8, len: usize) -> Vec<u8> {
        let mut frame = match len {
            0..126 => vec![first, 0x80 | u8::try_from(len).unwrap()],
            126..0x1_0000 => {
                let mut head = vec![first, 0x80 | 0x7e];
                head.extend(u16::try_from(len).unwrap().to_be_bytes());
                head
            }
            _ => {
                let mut head = vec![first, 0x80 | 127];
                head.extend((len as u64).to_be_bytes());
                head
            }
        };
        frame.resize(frame.len() + 4 + len, 0);
        frame
    }

    fn metering(message_bytes_max: usize, control_bytes_max: usize) -> Meter {
        Meter::new(Bounds { message_bytes_max, control_bytes_max }, None)
    }

    const PING: u8 = 0x89;
    const TEXT: u8 = 0x81;
    const TEXT_BEGINS: u8 = 0x01;
    const GOES_ON: u8 = 0x00;
    const ENDS: u8 = 0x80;

    #[test]
    fn what_is_under_way_does_not_depend_on_how_the_bytes_are_cut() {
        for len in [0, 1, 125, 126, 200, 65_535, 65_536, 70_000] {
            let mut bytes = frame(TEXT, len);
            bytes.extend(frame(PING, 5));
            bytes.extend(frame(TEXT_BEGINS, len));
            bytes.extend(frame(PING, 0));
            bytes.extend(frame(GOES_ON, 0));
            bytes.extend(frame(ENDS, len));
            for piece in [1, 3, 4096] {
                let mut meter = metering(1 << 20, 1 << 20);
                for piece in bytes.chunks(piece) {
                    assert!(meter.violation().is_none());
                    meter.count(piece);
                }
                assert_eq!(meter.under_way(), None, "{len} in pieces of {piece}");
                assert_eq!(meter.begun, 3);
                meter.count(&frame(TEXT, 9)[..4]);
                assert_eq!(meter.under_way(), Some(4));
            }
        }
    }

    #[test]
    fn fragments_and_control_frames_are_bounded_apart() {
        let mut meter = metering(100, 50);
        meter.count(&frame(TEXT_BEGINS, 0));
        for _ in 0..16 {
            assert!(meter.violation().is_none());
            meter.count(&frame(GOES_ON, 0));
        }
        assert_eq!(meter.violation().unwrap().0.code, CloseCode::TooBig);

        let mut meter = metering(100, 50);
        for _ in 0..20 {
            meter.count(&frame(PING, 34));
            assert!(meter.violation().is_none(), "a message in between makes room");
            meter.count(&frame(TEXT, 1));
        }
        meter.count(&frame(PING, 34));
        meter.count(&frame(PING, 34));
        assert_eq!(meter.violation().unwrap().0.code, CloseCode::Policy);
    }

    #[test]
    fn an_absurd_length_is_only_a_number() {
        let mut meter = metering(100, 50);
        meter.count(&[0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        meter.count(&[7; 20]);
        assert!(meter.under_way().is_some());
    }

    #[test]
    fn of_a_message_that_says_it_is_too_long_not_even_the_header_is_passed_on() {
        let good = frame(TEXT, 30);
        for piece in [1, 7, 4096] {
            let mut meter = metering(100, 50);
            let bytes = [good.as_slice(), &frame(TEXT_BEGINS, 60), &frame(ENDS, 60)].concat();
            let head = bytes.len() - 60; // of its last frame, which is one too many
            let mut passed = 0;
            for piece in bytes.chunks(piece) {
                passed += meter.count(piece);
            }
            assert!(passed < head, "{passed} in pieces of {piece}");
            assert!(passed >= good.len() + 60, "what came before is");
            assert_eq!(meter.violation().unwrap().0.code, CloseCode::TooBig);
        }
    }

    #[test]
    fn who_has_greeted_may_say_more() {
        let greeted = Greeted::default();
        let later = Bounds { message_bytes_max: 1000, control_bytes_max: 50 };
        let first = Bounds { message_bytes_max: 100, control_bytes_max: 50 };
        let mut meter = Meter::new(first, Some((Arc::clone(&greeted), later)));
        assert_eq!(meter.count(&frame(TEXT, 50)), frame(TEXT, 50).len());
        greeted.store(true, Ordering::Release);
        assert_eq!(meter.count(&frame(TEXT, 500)), frame(TEXT, 500).len());
        assert_eq!(meter.count(&frame(TEXT, 2000)), 0);
    }
}
