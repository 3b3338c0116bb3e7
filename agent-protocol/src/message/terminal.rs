//! What a terminal shows, what a person types into it, and how far each side
//! has got. Positions are byte offsets, counted from 0 at the source.

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::answer::ErrorCode;
use super::bound;
use super::open::{closed_words, open_words};
use super::subscription::Target;
use super::text;
use crate::ids::{AgentId, CommandId, DashboardId, StreamId};

closed_words! {
    /// Which of a program's outputs bytes came from. One stream interleaves
    /// all of its channels in the order the agent read them.
    Channel {
        /// A pseudo-terminal's single output.
        Pty = "pty",
        /// Standard output through a pipe.
        Stdout = "stdout",
        /// Standard error through a pipe.
        Stderr = "stderr",
    }
}

open_words! {
    /// Why bytes of a stream are missing.
    GapReason {
        /// The hub's log is bounded and these were the oldest.
        Evicted = "evicted",
        /// The agent's tail overflowed while the hub was out of reach or
        /// slower than the program.
        AgentOverflow = "agent_overflow",
        /// The command ended, and its agent forgot these bytes or died before
        /// it had sent them.
        AgentLoss = "agent_loss",
        /// The hub lost its memory and the agent no longer had these bytes.
        HubLoss = "hub_loss",
        /// The subscription asked for the newest output only, and the reader
        /// was behind.
        Lagged = "lagged",
        /// The subscription began at the live end.
        NotRequested = "not_requested",
    }
}

/// A range of a stream that will not come, and why: `from` inclusive, `to`
/// exclusive, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// First missing offset.
    pub from: u64,
    /// First offset after the hole.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

/// `terminal:output`: bytes a program wrote, exactly as the agent read them.
/// UTF-8 and escape sequences may be cut anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "OutputJson<'static>", try_from = "OutputJson<'_>")]
pub struct TerminalOutput {
    /// The stream.
    pub stream: StreamId,
    /// Where the first byte stands.
    pub offset: u64,
    /// Which output they came from.
    pub channel: Channel,
    /// 1 to `chunk_bytes_max` bytes.
    pub data: Bytes,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct OutputJson<'a> {
    stream: StreamId,
    offset: u64,
    channel: Channel,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    data: Option<Cow<'a, str>>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    data_base64: Option<Cow<'a, str>>,
}

impl<'a> OutputJson<'a> {
    pub(crate) fn new(stream: StreamId, offset: u64, channel: Channel, bytes: &'a [u8]) -> Self {
        let (data, data_base64) = text::encode(bytes);
        Self { stream, offset, channel, data, data_base64 }
    }
}

impl TryFrom<OutputJson<'_>> for TerminalOutput {
    type Error = &'static str;

    fn try_from(json: OutputJson<'_>) -> Result<Self, &'static str> {
        let data = text::decode(json.data, json.data_base64)?;
        if data.is_empty() {
            return Err("data: must not be empty");
        }
        check_offset(json.offset, data.len())?;
        Ok(Self { stream: json.stream, offset: json.offset, channel: json.channel, data })
    }
}

impl From<TerminalOutput> for OutputJson<'static> {
    fn from(output: TerminalOutput) -> Self {
        let (data, data_base64) = owned(&output.data);
        Self {
            stream: output.stream,
            offset: output.offset,
            channel: output.channel,
            data,
            data_base64,
        }
    }
}

type TwoForms = (Option<Cow<'static, str>>, Option<Cow<'static, str>>);

fn owned(bytes: &[u8]) -> TwoForms {
    let own = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
    let (data, data_base64) = text::encode(bytes);
    (data.map(own), data_base64.map(own))
}

fn check_offset(offset: u64, len: usize) -> Result<(), &'static str> {
    match offset.checked_add(len as u64) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err("offset: must not pass 2^63 - 1"),
    }
}

/// `terminal:gap`: a hole in a stream, named. An agent sends it for what its
/// tail lost; the hub sends it for what a reader will not get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawGap")]
pub struct TerminalGap {
    /// The stream.
    pub stream: StreamId,
    /// First missing offset.
    pub from: u64,
    /// First offset after the hole; greater than `from`.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

#[derive(Deserialize)]
struct RawGap {
    stream: StreamId,
    from: u64,
    to: u64,
    reason: GapReason,
}

impl TryFrom<RawGap> for TerminalGap {
    type Error = &'static str;

    fn try_from(raw: RawGap) -> Result<Self, &'static str> {
        let RawGap { stream, from, to, reason } = raw;
        if to <= from {
            return Err("to: must be greater than from");
        }
        check_offset(to, 0).map_err(|_| "to: must not pass 2^63 - 1")?;
        Ok(Self { stream, from, to, reason })
    }
}

/// `terminal:opened`: a stream that a subscription covers, announced before
/// its first byte on this link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalOpened {
    /// The stream.
    pub stream: StreamId,
    /// The command whose output it is.
    pub command: CommandId,
    /// Which attempt at the command.
    pub attempt: u32,
    /// The agent that runs it.
    pub agent: AgentId,
    /// Where this link goes on reading.
    #[serde(deserialize_with = "bound::offset")]
    pub from: u64,
    /// Everything below this offset is replay: history, not what happens now.
    /// Nothing may answer a terminal query found there.
    #[serde(deserialize_with = "bound::offset")]
    pub live_from: u64,
}

/// `terminal:refused`: a subscription has ended because it is no longer
/// allowed. Nothing more comes for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalRefused {
    /// What the subscription was for.
    pub target: Target,
    /// Why, for programs.
    pub code: ErrorCode,
    /// Why, for people.
    pub message: String,
}

/// `terminal:shown`: how far a view has drawn. A subscription with a window
/// is sent no further than this plus the window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalShown {
    /// The stream.
    pub stream: StreamId,
    /// Every byte below this offset has been shown or deliberately skipped.
    #[serde(deserialize_with = "bound::offset")]
    pub offset: u64,
}

/// `terminal:taken`: what the hub has of a stream, and what it may be sent.
/// Both are absolute, so a lost or repeated one is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalTaken {
    /// The stream.
    pub stream: StreamId,
    /// The hub holds everything below (or has been told that it is lost).
    #[serde(deserialize_with = "bound::offset")]
    pub stored: u64,
    /// The agent may send up to here, exclusive.
    #[serde(deserialize_with = "bound::offset")]
    pub allowed: u64,
}

/// `terminal:input`: what a person typed, as a stream of its own, numbered by
/// the dashboard that types it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "InputJson<'static>", try_from = "InputJson<'_>")]
pub struct TerminalInput {
    /// The running command it is for.
    pub command: CommandId,
    /// Who types. Set by the hub; what a dashboard writes here is ignored.
    pub writer: Option<DashboardId>,
    /// Where the first byte stands in this writer's input to this command.
    pub offset: u64,
    /// 1 to `chunk_bytes_max` bytes.
    pub data: Bytes,
}

#[derive(Serialize, Deserialize)]
struct InputJson<'a> {
    command: CommandId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    writer: Option<DashboardId>,
    offset: u64,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    data: Option<Cow<'a, str>>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    data_base64: Option<Cow<'a, str>>,
}

impl TryFrom<InputJson<'_>> for TerminalInput {
    type Error = &'static str;

    fn try_from(json: InputJson<'_>) -> Result<Self, &'static str> {
        let data = text::decode(json.data, json.data_base64)?;
        if data.is_empty() {
            return Err("data: must not be empty");
        }
        check_offset(json.offset, data.len())?;
        Ok(Self { command: json.command, writer: json.writer, offset: json.offset, data })
    }
}

impl From<TerminalInput> for InputJson<'static> {
    fn from(input: TerminalInput) -> Self {
        let (data, data_base64) = owned(&input.data);
        Self {
            command: input.command,
            writer: input.writer,
            offset: input.offset,
            data,
            data_base64,
        }
    }
}

/// `terminal:input-taken`: how far the agent has taken a writer's input.
/// From the agent to the hub, and on to the dashboard that types.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalInputTaken {
    /// The command.
    pub command: CommandId,
    /// Whose input.
    pub writer: DashboardId,
    /// Everything below this offset was handed to the program.
    #[serde(deserialize_with = "bound::offset")]
    pub offset: u64,
    /// Whether the writer must go on from here whatever it sent already:
    /// the agent is back after a lost link, or input skipped an offset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resend: bool,
}

/// `terminal:resize`: the size of the terminal, in character cells. The last
/// one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalResize {
    /// The running command.
    pub command: CommandId,
    /// The new size.
    pub size: TerminalSize,
}

/// The size of a terminal, in character cells: 1 to 4096 each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSize")]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

impl Default for TerminalSize {
    /// 80 columns, 24 rows.
    fn default() -> Self {
        Self { cols: 80, rows: 24 }
    }
}

#[derive(Deserialize)]
struct RawSize {
    cols: u16,
    rows: u16,
}

impl TryFrom<RawSize> for TerminalSize {
    type Error = &'static str;

    fn try_from(raw: RawSize) -> Result<Self, &'static str> {
        if !(1..=4096).contains(&raw.cols) {
            return Err("cols: must be 1 to 4096");
        }
        if !(1..=4096).contains(&raw.rows) {
            return Err("rows: must be 1 to 4096");
        }
        Ok(Self { cols: raw.cols, rows: raw.rows })
    }
}
