//! A simulated link: two lanes of frames, each with latency, room and faults.

use std::collections::VecDeque;
use std::time::Duration;

use trunkline_protocol::frame::Frame;
use trunkline_server::core::LinkId;

use crate::world::Peer;

/// Bytes that fit a lane: what lies in the sockets' buffers of a real link.
const LANE_BYTES: usize = 64 * 1024;

/// One direction of a cable.
#[derive(Debug)]
pub struct Lane {
    under_way: VecDeque<(Duration, Frame)>,
    bytes: usize,
    /// Nothing arrives until it is lifted.
    pub stalled: bool,
    /// What is sent is lost, and nobody is told.
    pub dead: bool,
    pub(crate) latency: Duration,
    pub(crate) bytes_per_second: Option<u64>,
    free_at: Duration,
}

impl Lane {
    fn new(latency: Duration) -> Self {
        Self {
            under_way: VecDeque::new(),
            bytes: 0,
            stalled: false,
            dead: false,
            latency,
            bytes_per_second: None,
            free_at: Duration::ZERO,
        }
    }

    /// Bytes that fit now. A dead lane takes everything, like a socket whose
    /// peer is gone without a word, until its buffers are full.
    pub(crate) fn room(&self) -> usize {
        LANE_BYTES.saturating_sub(self.bytes)
    }

    pub(crate) fn push(&mut self, frame: Frame, now: Duration) {
        if self.dead {
            self.bytes += frame.len().min(LANE_BYTES);
            return;
        }
        let takes = self.bytes_per_second.map_or(Duration::ZERO, |rate| {
            Duration::from_micros(frame.len() as u64 * 1_000_000 / rate.max(1))
        });
        self.free_at = self.free_at.max(now) + takes;
        self.bytes += frame.len();
        self.under_way.push_back((self.free_at + self.latency, frame));
    }

    pub(crate) fn next(&self) -> Option<Duration> {
        if self.stalled { None } else { self.under_way.front().map(|(at, _)| *at) }
    }

    pub(crate) fn pop(&mut self, now: Duration) -> Option<Frame> {
        if self.next()? > now {
            return None;
        }
        let (_, frame) = self.under_way.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

/// A link between a peer and the hub.
#[derive(Debug)]
pub struct Cable {
    pub(crate) peer: Peer,
    pub(crate) link: LinkId,
    /// From the peer to the hub.
    pub up: Lane,
    /// From the hub to the peer.
    pub down: Lane,
    /// Whether each end still has it.
    pub(crate) at_peer: bool,
    pub(crate) at_hub: bool,
}

impl Cable {
    pub(crate) fn new(peer: Peer, link: LinkId, latency: Duration) -> Self {
        Self {
            peer,
            link,
            up: Lane::new(latency),
            down: Lane::new(latency),
            at_peer: true,
            at_hub: true,
        }
    }

    /// Lets both lanes carry no more than this.
    pub fn throttle(&mut self, bytes_per_second: u64) {
        self.up.bytes_per_second = Some(bytes_per_second);
        self.down.bytes_per_second = Some(bytes_per_second);
    }
}
