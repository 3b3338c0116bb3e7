//! Whatever a stranger says, the hub answers by name, and nobody else notices.
//!
//! Every test has a stage: a hub on a real socket, and an honest agent and an
//! honest dashboard on it that are checked alive, by a round trip through the
//! hub, when the attack is over. Peers speak through raw sockets and frames
//! made by hand, since no client library can be brought to say these things.
//!
//! | module | what is bad |
//! |---|---|
//! | `handshake` | the HTTP request |
//! | `frames` | the WebSocket frames |
//! | `messages` | the JSON in them, and who says it |
//! | `streams` | offsets, grants, streams of others |
//! | `admission` | how many there are, and from where |
//! | `greetings` | who it claims to be, and when |
//! | `pressure` | how much, how long, how slowly: memory is measured |

#![allow(clippy::unwrap_used, reason = "what does not hold fails the test")]

#[path = "bad_input/admission.rs"]
mod admission;
#[path = "bad_input/frames.rs"]
mod frames;
#[path = "bad_input/greetings.rs"]
mod greetings;
#[path = "bad_input/handshake.rs"]
mod handshake;
#[path = "bad_input/messages.rs"]
mod messages;
#[path = "bad_input/pressure.rs"]
mod pressure;
#[path = "bad_input/raw.rs"]
mod raw;
#[path = "bad_input/stage.rs"]
mod stage;
#[path = "bad_input/streams.rs"]
mod streams;
