//! The binary form of `terminal:output`: a fixed header and the raw bytes.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | kind, `0x01` |
//! | 1 | channel: 0 `pty`, 1 `stdout`, 2 `stderr` |
//! | 2–3 | reserved, zero |
//! | 4–19 | stream id, most significant byte first |
//! | 20–27 | offset of the first byte, unsigned, most significant byte first |
//! | 28– | the terminal's bytes, at least one |
//!
//! Nothing in it belongs to one connection, so the frame that an agent sent is
//! the frame that every dashboard gets.

use bytes::{BufMut, Bytes, BytesMut};

use crate::ids::StreamId;
use crate::message::Channel;

/// Length of the header, in bytes.
pub const OUTPUT_HEADER_BYTES: usize = 28;

/// First byte of a binary `terminal:output`.
pub const OUTPUT_KIND: u8 = 0x01;

/// Why a binary frame is not one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BinaryError {
    /// Shorter than its header, or without any byte after it.
    #[error("a binary terminal:output has a header of 28 bytes and at least one byte of output")]
    Short,
    /// The first byte names no kind this version knows.
    #[error("the first byte of a binary message must be 1 (terminal:output)")]
    Kind,
    /// The channel is none of those defined.
    #[error("the channel must be 0 (pty), 1 (stdout) or 2 (stderr)")]
    Channel,
    /// A reserved byte is not zero.
    #[error("the reserved bytes must be zero")]
    Reserved,
    /// The last byte's offset would not fit 63 bits.
    #[error("the offset is beyond 2^63 - 1")]
    Offset,
}

/// What the header of a binary `terminal:output` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputHeader {
    /// The stream that the bytes belong to.
    pub stream: StreamId,
    /// Where the first byte stands in the stream.
    pub offset: u64,
    /// Which of the program's outputs they came from.
    pub channel: Channel,
}

/// Reads the header of a whole frame.
///
/// The payload is `frame[OUTPUT_HEADER_BYTES..]`, at least one byte; its end
/// offset fits 63 bits.
pub fn parse_output(frame: &[u8]) -> Result<OutputHeader, BinaryError> {
    let kind = frame.first().ok_or(BinaryError::Short)?;
    if *kind != OUTPUT_KIND {
        return Err(BinaryError::Kind);
    }
    let Some((head, payload)) = frame.split_at_checked(OUTPUT_HEADER_BYTES) else {
        return Err(BinaryError::Short);
    };
    if payload.is_empty() {
        return Err(BinaryError::Short);
    }
    let channel = match head[1] {
        0 => Channel::Pty,
        1 => Channel::Stdout,
        2 => Channel::Stderr,
        _ => return Err(BinaryError::Channel),
    };
    if head[2..4] != [0, 0] {
        return Err(BinaryError::Reserved);
    }
    let mut stream = [0; 16];
    stream.copy_from_slice(&head[4..20]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&head[20..28]);
    let offset = u64::from_be_bytes(offset);
    let end = offset.checked_add(payload.len() as u64);
    if end.is_none_or(|end| end > i64::MAX as u64) {
        return Err(BinaryError::Offset);
    }
    Ok(OutputHeader { stream: StreamId::from_u128(u128::from_be_bytes(stream)), offset, channel })
}

/// Writes a whole frame; `payload` must not be empty.
pub fn encode_output(header: &OutputHeader, payload: &[u8]) -> Bytes {
    debug_assert!(!payload.is_empty(), "an empty chunk has no frame");
    let mut frame = BytesMut::with_capacity(OUTPUT_HEADER_BYTES + payload.len());
    put_output_header(&mut frame, header);
    frame.put_slice(payload);
    frame.freeze()
}

/// Appends just the header, for callers that gather the payload themselves.
pub fn put_output_header(frame: &mut BytesMut, header: &OutputHeader) {
    frame.put_u8(OUTPUT_KIND);
    frame.put_u8(match header.channel {
        Channel::Pty => 0,
        Channel::Stdout => 1,
        Channel::Stderr => 2,
    });
    frame.put_u16(0);
    frame.put_u128(header.stream.as_u128());
    frame.put_u64(header.offset);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: OutputHeader =
        OutputHeader { stream: StreamId::from_u128(7), offset: 300, channel: Channel::Stderr };

    #[test]
    fn a_frame_reads_back() {
        let frame = encode_output(&HEADER, b"hi\xff");
        assert_eq!(parse_output(&frame), Ok(HEADER));
        assert_eq!(&frame[OUTPUT_HEADER_BYTES..], b"hi\xff");
    }

    #[test]
    fn each_rule_has_its_error() {
        let good = encode_output(&HEADER, b"x").to_vec();
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            parse_output(&bad)
        };
        assert_eq!(parse_output(&[]), Err(BinaryError::Short));
        assert_eq!(parse_output(&good[..28]), Err(BinaryError::Short));
        assert_eq!(with(0, 9), Err(BinaryError::Kind));
        assert_eq!(with(1, 3), Err(BinaryError::Channel));
        assert_eq!(with(3, 1), Err(BinaryError::Reserved));
        assert_eq!(with(20, 0x80), Err(BinaryError::Offset));
    }
}
