//! Any bytes as a binary frame: what is taken is exactly what is written for
//! it, and says the same as its form in JSON.

use bytes::Bytes;
use trunkline_protocol::codec::binary::{OUTPUT_HEADER_BYTES, encode_output, parse_output};
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentToHub, DashboardToHub, Envelope, HubToDashboard, TerminalOutput,
};

/// Reads the bytes as a binary frame.
pub fn run(data: &[u8]) {
    let frame = Bytes::copy_from_slice(data);
    let rules = Rules { chunk_bytes_max: 256, ..Rules::from(&Limits::default()) };
    let decoded = codec::decode_output(&frame, rules);
    assert_eq!(codec::decode::<DashboardToHub>(&Frame::Binary(frame.clone()), rules).len(), 1);
    let Ok(header) = parse_output(data) else {
        assert!(decoded.is_err());
        return;
    };
    let payload = &data[OUTPUT_HEADER_BYTES..];
    assert_eq!(encode_output(&header, payload), data);
    if payload.len() > rules.chunk_bytes_max {
        assert!(decoded.is_err());
        return;
    }
    let (read, bytes) = decoded.expect("it has a header, and is not too long");
    assert_eq!((read, &bytes[..]), (header, payload));

    let output = TerminalOutput {
        stream: header.stream,
        offset: header.offset,
        channel: header.channel,
        data: bytes,
    };
    let binary = Frame::Binary(frame);
    let text = Frame::Text(codec::encode_output_text(&header, payload));
    let said = Envelope::bare(AgentToHub::Output(output.clone()));
    assert_eq!(codec::decode::<AgentToHub>(&binary, rules), [Ok(said.clone())]);
    assert_eq!(codec::decode::<AgentToHub>(&text, rules), [Ok(said)]);
    let shown = Envelope::bare(HubToDashboard::Output(output.clone()));
    assert_eq!(codec::decode::<HubToDashboard>(&text, rules), [Ok(shown)]);
    assert_eq!(codec::encode_output(&output), binary);
}
