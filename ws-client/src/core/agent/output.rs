//! What programs write on its way to the hub, and what people type on its way
//! to programs.

use std::ops::Bound::{Excluded, Included, Unbounded};
use std::time::Duration;

use trunkline_protocol::codec;
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{CommandId, RequestId};
use trunkline_protocol::message::{
    AgentToHub, Channel, Envelope, ErrorCode, Refusal, TerminalInput, TerminalInputTaken,
    TerminalTaken,
};
use trunkline_protocol::time::Now;

use super::held::{Held, Stage, Typed};
use super::tail::{Sent, Tail};
use super::{AgentCore, AgentOutput, Link};

impl AgentCore {
    pub(super) fn write_held(
        &mut self,
        command: CommandId,
        channel: Channel,
        bytes: &[u8],
        now: Now,
    ) -> usize {
        let hold = self.setup.tail_hold;
        let running = self.commands.get_mut(&command).filter(|held| held.stage == Stage::Running);
        match running.and_then(|held| held.tail.as_mut()) {
            Some(tail) => tail.write(channel, bytes, hold, now.monotonic),
            None => bytes.len(),
        }
    }

    // ---- to the hub -----------------------------------------------------

    pub(super) fn handle_taken(&mut self, taken: &TerminalTaken) {
        let Some(command) = self.streams.get(&taken.stream) else { return };
        let Some(held) = self.commands.get_mut(command) else { return };
        let Some(tail) = &mut held.tail else { return };
        if tail.handle_taken(taken.stored, taken.allowed) {
            self.outputs.push_back(AgentOutput::Room(*command));
        }
    }

    pub(super) fn handle_refusal(&mut self, refusal: &Refusal) {
        tracing::warn!(target: "trunkline::client", %refusal, "the hub refused");
        let tails = self.commands.values_mut().filter_map(|held| held.tail.as_mut());
        match (&refusal.code, refusal.field.as_deref()) {
            (_, Some("payload.offset" | "payload.from")) => tails.for_each(Tail::rewind),
            (ErrorCode::NotFound, Some("payload.stream")) => tails.for_each(Tail::doubt),
            _ => {} // nothing else is about how far a stream has got
        }
    }

    /// The next piece of output, streams taking turns.
    pub(super) fn poll_bulk(&mut self, now: Duration) -> Option<Frame> {
        let Link::Up(up) = &self.link else { return None };
        let (binary, limits) = (up.binary, up.limits);
        // A byte of text takes at most six as JSON.
        let text_max = (limits.message_bytes_max / 6).saturating_sub(64).max(1);
        let bytes_max = if binary { u64::MAX } else { text_max };
        let chunk_bytes_max = limits.chunk_bytes_max.clamp(1, bytes_max);
        let (after, before) = match self.turn {
            Some(turn) => ((Excluded(turn), Unbounded), Some((Unbounded, Included(turn)))),
            None => ((Unbounded, Unbounded), None),
        };
        for range in std::iter::once(after).chain(before) {
            for (id, held) in self.commands.range_mut(range) {
                let Some(tail) = &mut held.tail else { continue };
                let Some(sent) = tail.poll_send(chunk_bytes_max, now) else { continue };
                self.turn = Some(*id);
                return self.output_frame(sent, binary);
            }
        }
        None
    }

    fn output_frame(&self, sent: Sent, binary: bool) -> Option<Frame> {
        Some(match sent {
            Sent::Chunk(frame) if binary => Frame::Binary(frame),
            Sent::Chunk(frame) => {
                // The log wrote it a moment ago: it can be read.
                let (header, data) = codec::decode_output(&frame, self.rules).ok()?;
                Frame::Text(codec::encode_output_text(&header, &data))
            }
            Sent::Gap(gap) => codec::encode(&Envelope::bare(AgentToHub::Gap(gap))),
        })
    }

    /// The next records of its log.
    pub(super) fn poll_logs(&mut self, now: Duration) -> Option<Frame> {
        let Link::Up(up) = &self.link else { return None };
        let message_bytes_max = usize::try_from(up.limits.message_bytes_max).unwrap_or(usize::MAX);
        let (id, batch) = self.logs.as_mut()?.poll(message_bytes_max, now)?;
        Some(codec::encode(&Envelope::request(id, AgentToHub::Log(batch))))
    }

    /// The latest figures.
    pub(super) fn poll_report(&mut self) -> Option<Frame> {
        if !std::mem::take(&mut self.report_unsaid) {
            return None;
        }
        let report = self.report.clone()?;
        Some(codec::encode(&Envelope::bare(AgentToHub::Status(report))))
    }

    // ---- to the program -------------------------------------------------

    pub(super) fn handle_input(&mut self, id: Option<RequestId>, input: TerminalInput) {
        let TerminalInput { command, writer, offset, data } = input;
        let is_running = |held: &&mut Held| held.stage == Stage::Running;
        let Some(held) = self.commands.get_mut(&command).filter(is_running) else {
            let refusal = Refusal::new(ErrorCode::NotRunning, "the command is not running");
            self.refuse(id, refusal.field("payload.command"));
            return;
        };
        let Some(writer) = writer else {
            let refusal = Refusal::new(ErrorCode::InvalidMessage, "writer: is required");
            self.refuse(id, refusal.field("payload.writer"));
            return;
        };
        match held.handle_input(writer, offset, &data) {
            Typed::Received => self.outputs.push_back(AgentOutput::Event(command)),
            Typed::Nothing => {}
            Typed::TooMany => {
                let refusal = Refusal::new(ErrorCode::LimitReached, "too many type into it");
                self.refuse(id, refusal.field("payload.writer"));
            }
        }
    }

    /// How far somebody's input has got.
    pub(super) fn poll_input_taken(&mut self) -> Option<Frame> {
        for (id, held) in &mut self.commands {
            if held.stage != Stage::Running {
                continue;
            }
            for (name, writer) in &mut held.writers {
                if std::mem::take(&mut writer.tell) {
                    let taken = TerminalInputTaken {
                        command: *id,
                        writer: name.clone(),
                        offset: writer.taken(),
                        resend: std::mem::take(&mut writer.resend),
                    };
                    return Some(codec::encode(&Envelope::bare(AgentToHub::InputTaken(taken))));
                }
            }
        }
        None
    }
}
