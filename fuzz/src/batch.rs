//! Any bytes as the body of a request of a link that polls: what is taken is what
//! is written for it, and nothing in it is longer than it may be.

use bytes::Bytes;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::polling::{BATCH_FRAMES_MAX, append, read};

/// Longest frame that is let in.
const FRAME_BYTES_MAX: usize = 256;

/// Reads the bytes as a batch.
pub fn run(data: &[u8]) {
    let Ok(frames) = read(Bytes::copy_from_slice(data), FRAME_BYTES_MAX) else { return };
    assert!(frames.len() <= BATCH_FRAMES_MAX);
    let mut written = Vec::new();
    for (nth, frame) in (1..).zip(&frames) {
        match frame {
            Frame::Text(text) => {
                assert!(text.len() <= FRAME_BYTES_MAX);
                assert!(std::str::from_utf8(text).is_ok());
            }
            Frame::Binary(bytes) => assert!(bytes.len() <= FRAME_BYTES_MAX),
            Frame::Close(_) => assert_eq!(nth, frames.len(), "a close is the last"),
        }
        append(&mut written, frame);
    }
    // The reason of a close may be longer than one can be: it is cut.
    if !matches!(frames.last(), Some(Frame::Close(_))) {
        assert_eq!(written, data);
    }
    assert_eq!(read(written.into(), FRAME_BYTES_MAX), Ok(frames));
}
