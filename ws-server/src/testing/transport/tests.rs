use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::task::Context;

use futures_util::FutureExt as _;

use super::*;
use crate::MemoryLink;
use crate::testing::{TestHub, memory_link};

#[tokio::test(start_paused = true)]
async fn the_memory_transport_keeps_to_it() {
    transport(async || memory_link()).await;
}

/// An end with something wrong.
struct Broken {
    link: MemoryLink,
    fault: Fault,
    said: usize,
    waiting: VecDeque<Frame>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    LosesOne,
    SaysBinary,
    CutsLargeOnes,
    TakesWhateverComes,
    NeverSaysThatItIsOver,
    LosesLastWords,
    ForgetsTheReason,
    KeepsTheLastForItself,
}

impl Stream for Broken {
    type Item = io::Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.link.poll_next_unpin(cx);
        match (&polled, self.fault) {
            (Poll::Ready(None), Fault::NeverSaysThatItIsOver) => Poll::Pending,
            _ => polled, // nothing is wrong with that
        }
    }
}

impl Broken {
    fn poll_waiting(&mut self, left: usize, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.waiting.len() > left {
            std::task::ready!(self.link.poll_ready_unpin(cx))?;
            if let Some(frame) = self.waiting.pop_front() {
                self.link.start_send_unpin(frame)?;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Sink<Frame> for Broken {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.poll_waiting(0, cx);
        if self.fault == Fault::TakesWhateverComes && polled.is_pending() {
            return Poll::Ready(Ok(()));
        }
        polled
    }

    fn start_send(mut self: Pin<&mut Self>, frame: Frame) -> io::Result<()> {
        self.said += 1;
        let said = self.said;
        let frame = match (frame, self.fault) {
            (_, Fault::LosesOne) if said == 7 => return Ok(()),
            (Frame::Text(bytes), Fault::SaysBinary) => Frame::Binary(bytes),
            (Frame::Binary(bytes), Fault::CutsLargeOnes) => {
                Frame::Binary(bytes.slice(..bytes.len().min(65_536)))
            }
            (Frame::Close(_), Fault::LosesLastWords) => return Ok(()),
            (Frame::Close(close), Fault::ForgetsTheReason) => {
                Frame::Close(Close::new(close.code, ""))
            }
            (frame, _) => frame,
        };
        self.waiting.push_back(frame);
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let left = usize::from(self.fault == Fault::KeepsTheLastForItself);
        self.poll_waiting(left, cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.poll_waiting(0, cx))?;
        self.link.poll_close_unpin(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_keep_to_it_is_caught() {
    let faults = [
        Fault::LosesOne,
        Fault::SaysBinary,
        Fault::CutsLargeOnes,
        Fault::TakesWhateverComes,
        Fault::NeverSaysThatItIsOver,
        Fault::LosesLastWords,
        Fault::ForgetsTheReason,
        Fault::KeepsTheLastForItself,
    ];
    for fault in faults {
        let connect = async || {
            let (one, other) = memory_link();
            (Broken { link: one, fault, said: 0, waiting: VecDeque::new() }, other)
        };
        let caught = AssertUnwindSafe(transport(connect)).catch_unwind().await;
        assert!(caught.is_err(), "{fault:?} was not caught");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cable_that_is_cut_ends_both_ends_and_another_can_be_had() {
    let hub = TestHub::start().await;
    let (cable, other) = (hub.cable(), hub.cable());
    let (mut link, mut untouched) = (cable.dial().unwrap(), other.dial().unwrap());
    let is_up = |hub: &TestHub| hub.hub().map(|hub| hub.links());
    assert_eq!(is_up(&hub), Some(2));
    assert_eq!((cable.cut(), cable.cut()), (1, 0));
    assert!(link.next().await.unwrap().is_err());
    assert!(link.send(text(1, 1)).await.is_err());
    while is_up(&hub) != Some(1) {
        tokio::task::yield_now().await;
    }
    untouched.send(text(1, 1)).await.expect("nobody cut that");
    cable.refuse(true);
    assert_eq!(cable.dial().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    cable.refuse(false);
    cable.dial().unwrap();
    let old = hub.hub().unwrap();
    assert!(hub.kill() && !hub.kill());
    assert!(untouched.next().await.unwrap().is_err());
    assert!(cable.dial().is_err() && hub.hub().is_none());
    while old.links() > 0 {
        tokio::task::yield_now().await;
    }
    hub.restart().await;
    cable.dial().unwrap();
}
