//! Any bytes as a frame, read in every direction: each message is refused by
//! name, or says the same when it is written and read again.

use std::fmt::Debug;

use bytes::Bytes;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    AgentToHub, DashboardToHub, Direction, Envelope, Greeting, HubToAgent, HubToDashboard,
};

/// Longest text of a refusal: a path, a rule, and the words around them.
const REFUSAL_BYTES_MAX: usize = 1024;

/// Reads the bytes as text, and as a binary frame.
pub fn run(data: &[u8]) {
    let data = Bytes::copy_from_slice(data);
    for frame in [Frame::Text(data.clone()), Frame::Binary(data)] {
        read::<Greeting>(&frame);
        read::<AgentToHub>(&frame);
        read::<HubToAgent>(&frame);
        read::<DashboardToHub>(&frame);
        read::<HubToDashboard>(&frame);
    }
}

fn read<M: Direction + PartialEq + Debug>(frame: &Frame) {
    let rules = Rules::from(&Limits::default());
    // What is escaped takes more room than what it stands for.
    let written = Rules { message_bytes_max: 8 * frame.len() + 1024, ..rules };
    let messages = codec::decode::<M>(frame, rules);
    assert!(messages.len() <= rules.batch_messages_max as usize, "a batch is bounded");
    let is_one = messages.len() == 1;
    for message in messages {
        match message {
            Ok(envelope) => {
                if is_one && let Some((kind, _)) = codec::peek(frame, rules) {
                    assert!(kind == envelope.message.kind() || kind == "batch");
                }
                let again = codec::encode(&envelope);
                assert_eq!(codec::decode::<M>(&again, written), [Ok(envelope)]);
            }
            Err(invalid) => {
                let refusal = invalid.refusal();
                assert!(refusal.message.len() <= REFUSAL_BYTES_MAX, "{}", refusal.message);
                let answer = Envelope::bare(HubToDashboard::Error(refusal));
                let read = codec::decode::<HubToDashboard>(&codec::encode(&answer), rules);
                assert_eq!(read, [Ok(answer)], "an answer can be read");
            }
        }
    }
}
