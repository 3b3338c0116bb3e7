//! The trunkline wire protocol: what agents, dashboards and the hub between
//! them say to each other, as pure types and pure functions.
//!
//! Nothing here has a socket, a task, a clock or a random number: bytes and
//! the time go in, messages and decisions come out. The hub
//! (`trunkline-server`) and its clients (`trunkline-client`) are built on this
//! crate, so that what the two ends must agree on exists once. Use it by
//! itself to write another transport, a proxy, or a test of your own.
//!
//! The specification is `docs/protocol.md` in the repository; what is said
//! there in rules is said here in types. Golden vectors that any other
//! implementation can test itself against are in this crate's `vectors/`.
//!
//! # One idea
//!
//! A link between two processes is mortal and carries no state worth saving.
//! What crosses it has a name and a position of its own, given at its source
//! and never reused, so that "resume" is only "this is what I have; go on from
//! there". There are three shapes of traffic:
//!
//! | shape | what | position | here |
//! |---|---|---|---|
//! | stream | what a terminal shows, what a person types | offset in bytes | [`stream`] |
//! | state | who is there, how far each command is | revision | [`roster`] |
//! | request | run this, interrupt that | an id minted by the sender | [`message::Envelope::id`] |
//!
//! # Reading and writing
//!
//! Messages are typed by direction: [`message::DashboardToHub`] has no word
//! that only an agent may say. [`codec::decode`] judges each message of a frame
//! on its own, within bounds, and says of what it refuses which field breaks
//! which rule.
//!
//! ```
//! use trunkline_protocol::codec::{Rules, decode, encode};
//! use trunkline_protocol::frame::Frame;
//! use trunkline_protocol::limits::Limits;
//! use trunkline_protocol::message::{DashboardToHub, Envelope, Subscribe, Target, TerminalSubscription};
//!
//! // A dashboard wants to see everything that the agent `build-1` runs.
//! let subscribe = Subscribe {
//!     terminals: vec![TerminalSubscription::new(Target::Agent("build-1".parse()?))],
//! };
//! let request = Envelope::request("req-1".parse()?, DashboardToHub::Subscribe(subscribe));
//! let frame = encode(&request);
//! let Frame::Text(json) = &frame else { panic!("JSON is text") };
//! assert_eq!(
//!     json,
//!     concat!(
//!         r#"{"type":"subscribe","id":"req-1","#,
//!         r#""payload":{"terminals":[{"agent":"build-1","from":"start","lag":"every_byte"}]}}"#
//!     )
//! );
//!
//! // The hub reads it.
//! let rules = Rules::from(&Limits::default());
//! assert_eq!(decode::<DashboardToHub>(&frame, rules), [Ok(request)]);
//!
//! // A misspelt subscription is refused, and the answer says where.
//! let misspelt = r#"{"type":"subscribe","id":"req-2","payload":{"terminal":[]}}"#;
//! let read = decode::<DashboardToHub>(&Frame::Text(misspelt.into()), rules);
//! let refusal = read[0].as_ref().unwrap_err().refusal();
//! assert_eq!(refusal.message, "payload.terminal: is not a field here");
//! assert_eq!(refusal.in_reply_to, Some("req-2".parse()?));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where things are
//!
//! | module | what it answers |
//! |---|---|
//! | [`ids`] | What is everything called? Names and serials, parsed once. |
//! | [`message`] | What may be said, and by whom? |
//! | [`codec`] | How is it written: as JSON, as a binary frame, as a batch? |
//! | [`frame`] | What does a transport carry? |
//! | [`close`] | Why did a link end, and what is to be done about it? |
//! | [`limits`] | What is bounded, by how much, at what cost? |
//! | [`stream`] | Who keeps a terminal's bytes, and who puts them together? |
//! | [`roster`] | Who is there and what do they run, as seen from anywhere? |
//! | [`liveness`] | Is the other end still there? |
//! | [`one_line`] | What of a stranger's text may stand in a log? |
//! | [`time`] | What time is it? Always an argument. |
//!
//! # What it does not do
//!
//! It does not decide: whether a command may run, who may see what and what
//! happens next is the hub's and its embedder's. It does not interpret what a
//! terminal shows; [`stream::Plain`] only strips it for searching.

pub mod close;
pub mod codec;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod liveness;
pub mod message;
pub mod one_line;
pub mod polling;
pub mod rate;
pub mod roster;
pub mod stream;
pub mod time;
