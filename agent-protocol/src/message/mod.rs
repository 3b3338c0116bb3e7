//! What may be said, and by whom: one enum for each direction, so that a
//! dashboard cannot even form an agent's sentence.
//!
//! Every message travels in an [`Envelope`]: `{"type", "id", "ts", "payload"}`.
//! The types of one direction are listed in one place, below; the codec, the
//! golden vectors and the tests are driven by that list.

mod answer;
mod bound;
mod command;
mod greeting;
mod log;
mod open;
mod roster;
mod subscription;
mod terminal;
mod text;

use serde::Serialize;

pub use answer::*;
pub use command::*;
pub use greeting::*;
pub use log::*;
pub use roster::*;
pub use subscription::*;
pub use terminal::*;

use crate::codec::{DecodeError, Payload};
use crate::ids::RequestId;

pub(crate) use terminal::OutputJson;

/// A message and what stands around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope<M> {
    /// Names a request, so that its answer can refer to it and a repetition
    /// is recognised.
    pub id: Option<RequestId>,
    /// When it was sent, in milliseconds since the epoch, by the sender's
    /// clock. For people; decides nothing.
    pub ts: Option<u64>,
    /// What is said.
    pub message: M,
}

impl<M> Envelope<M> {
    /// A message without id and time.
    pub fn bare(message: M) -> Self {
        Self { id: None, ts: None, message }
    }

    /// A message with a request id.
    pub fn request(id: RequestId, message: M) -> Self {
        Self { id: Some(id), ts: None, message }
    }
}

/// All that may be said in one direction.
pub trait Direction: Sized {
    /// The `type` words of this direction.
    const TYPES: &'static [&'static str];

    /// The `type` word of this message.
    fn kind(&self) -> &'static str;

    /// Reads the payload of a message of type `kind`; `None` if this
    /// direction has no such type.
    fn read(kind: &str, payload: Payload<'_>) -> Option<Result<Self, DecodeError>>;

    /// The payload, to be written.
    fn payload(&self) -> &dyn ErasedPayload;

    /// The message as terminal output, which has a binary form.
    fn as_output(&self) -> Option<&TerminalOutput> {
        None
    }

    /// The message as terminal input.
    fn as_input(&self) -> Option<&TerminalInput> {
        None
    }

    /// Terminal output as a message, in the directions that have it.
    fn from_output(_output: TerminalOutput) -> Option<Self> {
        None
    }
}

/// A payload that can be appended to a JSON text.
pub trait ErasedPayload {
    /// Appends the payload as JSON.
    fn append_json(&self, to: &mut Vec<u8>);
}

impl<T: Serialize> ErasedPayload for T {
    fn append_json(&self, to: &mut Vec<u8>) {
        // Serialising to memory fails only for maps with non-string keys,
        // which no message has; the golden vectors write every one of them.
        serde_json::to_writer(to, self).expect("messages serialise to JSON");
    }
}

macro_rules! direction {
    (
        $(#[$doc:meta])* $name:ident {
            $($kind:literal => $variant:ident($payload:ty),)+
        }
        $(output: $output:ident)?
        $(input: $input:ident)?
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $name {
            $(#[doc = concat!("`", $kind, "`")] $variant($payload),)+
        }

        impl Direction for $name {
            const TYPES: &'static [&'static str] = &[$($kind,)+];

            fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $kind,)+
                }
            }

            fn read(kind: &str, payload: Payload<'_>) -> Option<Result<Self, DecodeError>> {
                match kind {
                    $($kind => Some(payload.read::<$payload>().map(Self::$variant)),)+
                    _ => None,
                }
            }

            fn payload(&self) -> &dyn ErasedPayload {
                match self {
                    $(Self::$variant(payload) => payload,)+
                }
            }

            $(
                fn as_output(&self) -> Option<&TerminalOutput> {
                    match self {
                        Self::$output(output) => Some(output),
                        _ => None, // only terminal output has a binary form
                    }
                }

                fn from_output(output: TerminalOutput) -> Option<Self> {
                    Some(Self::$output(output))
                }
            )?

            $(
                fn as_input(&self) -> Option<&TerminalInput> {
                    match self {
                        Self::$input(input) => Some(input),
                        _ => None, // only terminal input is that
                    }
                }
            )?
        }
    };
}

direction! {
    /// A peer's first message.
    Greeting {
        "agent:connect" => Agent(AgentConnect),
        "dashboard:connect" => Dashboard(DashboardConnect),
    }
}

direction! {
    /// What an agent says to the hub after the greeting.
    AgentToHub {
        "agent:commands" => Commands(HeldCommands),
        "agent:status" => Status(AgentReport),
        "command:accepted" => Accepted(CommandAccepted),
        "command:started" => Started(CommandStarted),
        "command:interrupting" => Interrupting(CommandInterrupting),
        "command:complete" => Complete(CommandComplete),
        "terminal:output" => Output(TerminalOutput),
        "terminal:gap" => Gap(TerminalGap),
        "terminal:input-taken" => InputTaken(TerminalInputTaken),
        "log:batch" => Log(LogBatch),
        "agent:disconnect" => Disconnect(Disconnect),
        "heartbeat:ping" => Ping(HeartbeatBeat),
        "heartbeat:pong" => Pong(HeartbeatBeat),
        "auth:refresh-token" => RefreshToken(RefreshToken),
        "error" => Error(Refusal),
    }
    output: Output
}

direction! {
    /// What the hub says to an agent.
    HubToAgent {
        "connection:ack" => Ack(ConnectionAck),
        "command:execute" => Execute(CommandExecute),
        "command:interrupt" => Interrupt(CommandInterrupt),
        "command:settled" => Settled(CommandSettled),
        "terminal:input" => Input(TerminalInput),
        "terminal:resize" => Resize(TerminalResize),
        "terminal:taken" => Taken(TerminalTaken),
        "agent:control" => Control(AgentControl),
        "log:taken" => LogTaken(LogTaken),
        "ok" => Ok(Accepted),
        "error" => Error(Refusal),
        "heartbeat:ping" => Ping(HeartbeatBeat),
        "heartbeat:pong" => Pong(HeartbeatBeat),
        "auth:refresh-needed" => RefreshNeeded(RefreshNeeded),
        "auth:refresh-success" => RefreshSuccess(RefreshSuccess),
        "auth:refresh-failed" => RefreshFailed(RefreshFailed),
    }
    input: Input
}

direction! {
    /// What a dashboard says to the hub after the greeting.
    DashboardToHub {
        "subscribe" => Subscribe(Subscribe),
        "unsubscribe" => Unsubscribe(Unsubscribe),
        "terminal:shown" => Shown(TerminalShown),
        "command:request" => Request(CommandRequest),
        "command:interrupt" => Interrupt(CommandInterrupt),
        "terminal:input" => Input(TerminalInput),
        "terminal:resize" => Resize(TerminalResize),
        "system:emergency-stop" => EmergencyStop(EmergencyStop),
        "log:batch" => Log(LogBatch),
        "dashboard:disconnect" => Disconnect(Disconnect),
        "heartbeat:ping" => Ping(HeartbeatBeat),
        "heartbeat:pong" => Pong(HeartbeatBeat),
        "auth:refresh-token" => RefreshToken(RefreshToken),
        "error" => Error(Refusal),
    }
    input: Input
}

direction! {
    /// What the hub says to a dashboard.
    HubToDashboard {
        "connection:ack" => Ack(ConnectionAck),
        "agent:list" => List(AgentList),
        "agent:status" => Agent(AgentChanged),
        "command:status" => Command(CommandChanged),
        "command:complete" => Complete(CommandChanged),
        "command:queue" => Queue(QueueChanged),
        "terminal:opened" => Opened(TerminalOpened),
        "terminal:refused" => Refused(TerminalRefused),
        "terminal:output" => Output(TerminalOutput),
        "terminal:gap" => Gap(TerminalGap),
        "terminal:input-taken" => InputTaken(TerminalInputTaken),
        "log:taken" => LogTaken(LogTaken),
        "ok" => Ok(Accepted),
        "error" => Error(Refusal),
        "heartbeat:ping" => Ping(HeartbeatBeat),
        "heartbeat:pong" => Pong(HeartbeatBeat),
        "auth:refresh-needed" => RefreshNeeded(RefreshNeeded),
        "auth:refresh-success" => RefreshSuccess(RefreshSuccess),
        "auth:refresh-failed" => RefreshFailed(RefreshFailed),
    }
    output: Output
}
