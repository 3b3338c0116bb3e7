//! Reading terminals: for each reader, where it stands in which streams, and
//! a queue that a slow one cannot make grow.
//!
//! A *reader* is one local consumer of one target. It has its own position in
//! every stream, so it gets each byte once and each hole by name whatever the
//! hub sends, and how often. The *subscription* of a target is what all its
//! readers want together: from the least position of any of them, within the
//! smallest window. What a reader has is dropped when it comes again.
//!
//! ```text
//!   stream   ├──────────────┼─────────────┼───────────────────┤
//!                        consumed      position        consumed + window
//!            was given out  │   queued    │ may still be sent │
//! ```
//!
//! `consumed` is told to the hub as `terminal:shown`, the least of all readers
//! of the stream; so no queue holds more than the window, and the hub's log
//! has the rest. A new subscription starts from `consumed`, not from
//! `position`: the hub's window starts there too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use sha2::{Digest as _, Sha256};
use trunkline_protocol::ids::{CommandId, StreamId};
use trunkline_protocol::message::{
    Channel, CommandState, From, Gap, GapReason, Lag, Refusal, Target, TerminalGap, TerminalOpened,
    TerminalOutput, TerminalSubscription,
};
use trunkline_protocol::roster::Roster;
use trunkline_protocol::stream::{Piece, Taken, View};

/// Positions that a subscription may carry, and so the streams that a reader
/// remembers.
const READINGS_MAX: usize = 1024;

/// Pieces up to this size are joined in a queue, so that a program that
/// writes byte by byte costs memory by the byte.
const JOINED_BYTES_MAX: usize = 4096;

/// A window with less room than this is moved on at once: a hub may wait for
/// room for a whole chunk.
const CHUNK_BYTES: u64 = 16 * 1024;

/// How long a hub may take to announce the output of a command that has
/// ended: in this time a returning agent has refilled a hub that lost its
/// memory (it is `unreachable` for 5 s and in its grace for another 5).
pub(super) const RETURN_TIMEOUT: Duration = Duration::from_secs(10);

/// How to read a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Where to begin in streams without a position.
    pub from: From,
    /// What to do when behind.
    pub lag: Lag,
    /// Most bytes of each stream that wait for the consumer. At least 1.
    pub window_bytes: u64,
}

impl Default for Reading {
    /// Every byte from the oldest kept, within 1 MiB.
    fn default() -> Self {
        Self { from: From::Start, lag: Lag::EveryByte, window_bytes: 1024 * 1024 }
    }
}

/// What a terminal shows, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TerminalEvent {
    /// A stream begins: its first event, once.
    Opened {
        /// The stream.
        stream: StreamId,
        /// The command whose output it is.
        command: CommandId,
        /// Which attempt at the command.
        attempt: u32,
        /// Where reading begins.
        from: u64,
        /// What stands below is history, not what happens now.
        live_from: u64,
    },
    /// Bytes that a program wrote. Each comes once, in order.
    Output {
        /// The stream.
        stream: StreamId,
        /// Where the first byte stands.
        offset: u64,
        /// Which of the program's outputs they came from.
        channel: Channel,
        /// At least one byte. UTF-8 and escape sequences may be cut anywhere.
        data: Bytes,
        /// Whether they are history: nothing may answer a terminal query
        /// found there.
        replay: bool,
    },
    /// Bytes that will not come.
    Gap {
        /// The stream.
        stream: StreamId,
        /// Which, and why.
        gap: Gap,
    },
    /// The command has ended and its output was read to the end, or named a
    /// gap: the stream's last event.
    Ended {
        /// The stream.
        stream: StreamId,
        /// The command in its final state.
        state: Arc<CommandState>,
        /// Whether what was read is what was written.
        audit: Audit,
    },
    /// The hub refused the subscription; no more events follow.
    Refused(Refusal),
    /// The hub no longer knows a command that was read; how it ended is not
    /// known, and no more of it follows.
    Lost(CommandId),
}

/// Whether all the bytes that were read are those that were written, by the
/// SHA-256 that the agent made of its program's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audit {
    /// They are.
    Verified,
    /// They are not: some were changed on the way.
    Mismatch,
    /// It cannot be known: there was a gap, reading began later than at the
    /// first byte, or the agent gave no digest.
    NotChecked,
}

/// Names a reader for as long as the core lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReaderId(pub u64);

#[derive(Debug)]
struct Reader {
    target: Target,
    options: Reading,
    streams: BTreeMap<StreamId, Position>,
    queue: VecDeque<TerminalEvent>,
    /// The final state of the one command that is read, from when it is known.
    last: Option<Arc<CommandState>>,
    /// Nothing is added to the queue any more.
    is_over: bool,
}

/// Where a reader stands in a stream.
#[derive(Debug)]
struct Position {
    command: CommandId,
    attempt: u32,
    view: View,
    live_from: u64,
    consumed: u64,
    /// Bytes of it in the queue.
    queued: u64,
    /// Over all bytes so far; `None` once it can no longer be that of the
    /// whole stream.
    digest: Option<Sha256>,
    /// The command's final state, from when it is known until `Ended` is
    /// queued.
    last: Option<Arc<CommandState>>,
    course: Course,
    jump: Jump,
}

/// What is still to be expected of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// Its end.
    Awaited,
    /// No end: a later attempt has begun, or the command is lost. What still
    /// comes is read.
    Unawaited,
    /// Nothing: `Ended` is queued, and is the last.
    Ended,
}

/// What to do about a hole without a name. The hub owes a name for every
/// hole, so but for `Asked` this is only seen with a broken one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Jump {
    /// Subscribe again.
    None,
    /// That was done and is not answered yet: what still comes from before
    /// is not looked at.
    Asked,
    /// It was answered: if the hole is still there, it is named here.
    Answered,
    /// The hole is of this side's making: there was no room in the queue.
    /// Subscribe again once it is empty.
    Overrun,
}

/// A stream as the present link delivers it.
#[derive(Debug)]
struct Flow {
    opened: TerminalOpened,
    /// The last that the hub was told.
    shown: u64,
    /// How far the hub has sent. It is told of nothing beyond: a hub that lost
    /// its memory may begin before what was consumed here.
    sent: u64,
}

impl Flow {
    fn new(opened: TerminalOpened) -> Self {
        Self { shown: opened.from, sent: opened.from, opened }
    }

    /// What there is to tell the hub, if this much was consumed.
    fn unsaid(&self, consumed: u64) -> u64 {
        consumed.min(self.sent).saturating_sub(self.shown)
    }
}

#[derive(Debug, Default)]
pub(super) struct Readers {
    by_id: BTreeMap<ReaderId, Reader>,
    flows: BTreeMap<StreamId, Flow>,
    /// Streams of which the hub is to be told what was shown.
    to_show: BTreeSet<StreamId>,
    /// Readers with something new in their queue.
    awake: BTreeSet<ReaderId>,
    /// Targets whose subscription must be made anew.
    changed: BTreeSet<Target>,
    /// Targets whose subscription this link has answered.
    answered: BTreeSet<Target>,
    /// Readers that know of an end in a stream that this link has not
    /// announced, and how long they wait for that.
    unannounced: BTreeMap<ReaderId, Duration>,
    next: u64,
}

impl Readers {
    /// Adds a reader.
    pub(super) fn add(&mut self, target: Target, options: Reading, roster: &Roster) -> ReaderId {
        let id = ReaderId(self.next);
        self.next += 1;
        let options = Reading { window_bytes: options.window_bytes.max(1), ..options };
        let mut reader = Reader {
            target: target.clone(),
            options,
            streams: BTreeMap::new(),
            queue: VecDeque::new(),
            last: None,
            is_over: false,
        };
        if let Target::Command(command) = &target
            && let Some(state) = roster.command(*command)
        {
            reader.handle_state(state);
        }
        // Streams that others read already: from where they are, or once more
        // from the start, which takes all the subscriptions that cover them.
        let mut again = Vec::new();
        for (stream, flow) in &self.flows {
            if reader.is_over || !covers(&target, &flow.opened) {
                continue;
            }
            let positions = self.by_id.values().filter_map(|other| other.streams.get(stream));
            let read = positions.map(|position| position.view.position()).max();
            match options.from {
                From::Start => {
                    reader.open(&flow.opened, 0, roster);
                    if let Some(position) = reader.streams.get_mut(stream) {
                        position.jump = Jump::Asked;
                    }
                    again.push(*stream);
                }
                From::Live => {
                    reader.open(&flow.opened, read.unwrap_or(flow.opened.from), roster);
                }
            }
        }
        if !reader.queue.is_empty() || reader.is_over {
            self.awake.insert(id);
        }
        self.by_id.insert(id, reader);
        self.answered.remove(&target);
        self.changed.insert(target);
        for stream in again {
            self.resubscribe(stream);
        }
        id
    }

    /// Removes a reader. Says whether its target has no reader any more.
    pub(super) fn remove(&mut self, id: ReaderId) -> Option<Target> {
        let reader = self.by_id.remove(&id)?;
        self.awake.remove(&id);
        self.unannounced.remove(&id);
        // The slowest may have gone.
        let streams: Vec<StreamId> = reader.streams.keys().copied().collect();
        for stream in streams {
            self.consider_shown(stream);
        }
        let target = reader.target;
        if self.is_wanted(&target) {
            return None;
        }
        self.changed.remove(&target);
        self.answered.remove(&target);
        // The hub forgets its places in streams that nothing covers any more.
        let going = || self.by_id.values().filter(|reader| !reader.is_over);
        self.flows.retain(|_, flow| going().any(|reader| covers(&reader.target, &flow.opened)));
        Some(target)
    }

    /// Subscribes anew to every target that covers a stream: the hub moves its
    /// place in it only when none of them holds it.
    fn resubscribe(&mut self, stream: StreamId) {
        let reads = |reader: &&Reader| reader.streams.contains_key(&stream);
        let targets = self.by_id.values().filter(reads).map(|reader| reader.target.clone());
        self.changed.extend(targets);
    }

    /// Targets to unsubscribe from: those that were to be made anew, and that
    /// nobody reads any more by now.
    pub(super) fn take_unread(&mut self) -> BTreeSet<Target> {
        let changed = std::mem::take(&mut self.changed);
        let (wanted, unread) = changed.into_iter().partition(|target| self.is_wanted(target));
        self.changed = wanted;
        unread
    }

    fn is_wanted(&self, target: &Target) -> bool {
        self.by_id.values().any(|reader| !reader.is_over && reader.target == *target)
    }

    /// A link came up: it knows of no subscription.
    pub(super) fn handle_link(&mut self) {
        self.flows.clear();
        self.to_show.clear();
        self.answered.clear();
        self.unannounced.clear();
        let wanted = self.by_id.values().filter(|reader| !reader.is_over);
        self.changed = wanted.map(|reader| reader.target.clone()).collect();
        for position in self.by_id.values_mut().flat_map(|reader| reader.streams.values_mut()) {
            position.jump = Jump::None;
        }
    }

    /// The next target whose subscription is to be made anew.
    pub(super) fn poll_changed(&mut self) -> Option<TerminalSubscription> {
        while let Some(target) = self.changed.pop_first() {
            let Some(subscription) = self.subscription(target) else { continue };
            for (stream, position) in &subscription.positions {
                // The hub's window starts here again.
                if let Some(flow) = self.flows.get_mut(stream) {
                    flow.shown = flow.shown.min(*position);
                    flow.sent = flow.sent.min(*position);
                }
            }
            return Some(subscription);
        }
        None
    }

    /// Makes the subscription of a target anew.
    pub(super) fn change(&mut self, target: Target) {
        self.changed.insert(target);
    }

    /// What the readers of a target want together.
    pub(super) fn subscription(&self, target: Target) -> Option<TerminalSubscription> {
        let own = |reader: &&Reader| !reader.is_over && reader.target == target;
        let options = self.by_id.values().filter(own).map(|reader| reader.options);
        let together = options.reduce(|one, other| Reading {
            from: if one.from == other.from { one.from } else { From::Start },
            lag: if one.lag == other.lag { one.lag } else { Lag::EveryByte },
            window_bytes: one.window_bytes.min(other.window_bytes),
        })?;
        let streams = self.by_id.values().filter(own).flat_map(|reader| reader.streams.keys());
        let mut positions: BTreeMap<StreamId, u64> =
            streams.filter_map(|stream| Some((*stream, self.least_consumed(*stream)?))).collect();
        while positions.len() > READINGS_MAX {
            positions.pop_first(); // the oldest, as ids are ordered by time
        }
        Some(TerminalSubscription {
            target,
            from: together.from,
            lag: together.lag,
            window_bytes: Some(together.window_bytes),
            positions,
        })
    }

    /// The least that any reader of a stream has consumed. Whoever is through
    /// with it does not hold it back.
    fn least_consumed(&self, stream: StreamId) -> Option<u64> {
        let going = self.by_id.values().filter(|reader| !reader.is_over);
        let positions = || going.clone().filter_map(|reader| reader.streams.get(&stream));
        let reading = positions().filter(|position| position.course != Course::Ended);
        let through = || positions().map(|position| position.view.position()).max();
        reading.map(|position| position.consumed).min().or_else(through)
    }

    /// A subscription was answered: from now on the hub goes by it.
    pub(super) fn handle_subscribed(&mut self, target: &Target) {
        if self.changed.contains(target) {
            return; // and is about to go by another one
        }
        self.answered.insert(target.clone());
        let readers = self.by_id.values_mut().filter(|reader| reader.target == *target);
        for position in readers.flat_map(|reader| reader.streams.values_mut()) {
            if position.jump == Jump::Asked {
                position.jump = Jump::Answered;
            }
        }
    }

    /// A subscription was refused for good.
    pub(super) fn handle_refused(&mut self, target: &Target, refusal: &Refusal) {
        for (id, reader) in &mut self.by_id {
            if reader.target == *target && !reader.is_over {
                reader.queue.push_back(TerminalEvent::Refused(refusal.clone()));
                reader.is_over = true;
                self.awake.insert(*id);
            }
        }
    }

    /// The hub announces a stream.
    pub(super) fn handle_opened(&mut self, opened: TerminalOpened, roster: &Roster) {
        let mut is_unnamed = false;
        for (id, reader) in &mut self.by_id {
            if reader.is_over || !covers(&reader.target, &opened) {
                continue;
            }
            let begin = match reader.options.from {
                From::Start => 0,
                From::Live => opened.from,
            };
            if reader.open(&opened, begin, roster) {
                self.awake.insert(*id);
            }
            match reader.look_back(&opened) {
                Fate::New => {
                    self.awake.insert(*id);
                }
                Fate::Nothing => {}
                Fate::Unnamed => is_unnamed = true,
            }
        }
        let stream = opened.stream;
        self.to_show.remove(&stream);
        self.flows.insert(stream, Flow::new(opened));
        if is_unnamed {
            self.resubscribe(stream);
        }
        if self.flows.len() > 2 * READINGS_MAX {
            let readers = &self.by_id;
            self.flows.retain(|stream, _| {
                readers.values().any(|reader| reader.streams.contains_key(stream))
            });
        }
    }

    /// Bytes of a stream.
    pub(super) fn handle_output(&mut self, output: &TerminalOutput) {
        self.hand_out(output.stream, |reader| reader.handle_output(output));
        self.handle_sent(output.stream, output.offset + output.data.len() as u64);
    }

    /// The name of a hole in a stream.
    pub(super) fn handle_gap(&mut self, gap: &TerminalGap) {
        self.hand_out(gap.stream, |reader| reader.handle_gap(gap));
        self.handle_sent(gap.stream, gap.to);
    }

    /// The hub has sent up to there. What was consumed before it came is never
    /// taken by anybody, and counts as shown at once.
    fn handle_sent(&mut self, stream: StreamId, to: u64) {
        if let Some(flow) = self.flows.get_mut(&stream) {
            flow.sent = flow.sent.max(to);
            self.consider_shown(stream);
        }
    }

    fn hand_out(&mut self, stream: StreamId, to: impl Fn(&mut Reader) -> Fate) {
        let mut is_unnamed = false;
        for (id, reader) in &mut self.by_id {
            match to(reader) {
                Fate::New => {
                    self.awake.insert(*id);
                }
                Fate::Nothing => {}
                Fate::Unnamed => is_unnamed = true,
            }
        }
        if is_unnamed {
            self.resubscribe(stream);
        }
    }

    /// A command is as the roster now has it.
    pub(super) fn handle_state(&mut self, state: &Arc<CommandState>) {
        if !state.status.is_final() {
            return;
        }
        for (id, reader) in &mut self.by_id {
            if reader.handle_state(state) {
                self.awake.insert(*id);
            }
        }
    }

    /// The roster is whole and may have news of ends: notes which readers wait
    /// for a stream that this link has not announced, though it has answered
    /// the subscription.
    pub(super) fn consider_unannounced(&mut self, now: Duration) {
        for (id, reader) in &self.by_id {
            let is_asked = self.answered.contains(&reader.target);
            if !is_asked || reader.unannounced(&self.flows).is_empty() {
                self.unannounced.remove(id);
            } else {
                self.unannounced.entry(*id).or_insert(now + RETURN_TIMEOUT);
            }
        }
    }

    /// The end of the first reader's patience.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.unannounced.values().min().copied()
    }

    /// Whoever waited long enough is told that the output is gone: neither
    /// the hub nor the agent has it any more.
    pub(super) fn handle_timeout(&mut self, now: Duration) {
        let due = |(id, until): (&ReaderId, &Duration)| (*until <= now).then_some(*id);
        let ids: Vec<ReaderId> = self.unannounced.iter().filter_map(due).collect();
        for id in ids {
            self.unannounced.remove(&id);
            let Some(reader) = self.by_id.get_mut(&id) else { continue };
            for state in reader.unannounced(&self.flows) {
                reader.give_up(&state);
            }
            self.awake.insert(id);
        }
    }

    /// A command is lost: how it ended will not be known.
    pub(super) fn handle_lost(&mut self, command: CommandId) {
        for (id, reader) in &mut self.by_id {
            if reader.handle_lost(command) {
                self.awake.insert(*id);
            }
        }
    }

    /// Nothing will ever come again.
    pub(super) fn close(&mut self) {
        for (id, reader) in &mut self.by_id {
            reader.is_over = true;
            self.awake.insert(*id);
        }
    }

    /// The next event for a reader.
    pub(super) fn take(&mut self, id: ReaderId) -> Next {
        let Some(reader) = self.by_id.get_mut(&id) else { return Next::Over };
        let Some(event) = reader.queue.pop_front() else {
            return if reader.is_over { Next::Over } else { Next::Wait };
        };
        let consumed = match &event {
            TerminalEvent::Output { stream, offset, data, .. } => {
                Some((*stream, *offset, data.len() as u64))
            }
            TerminalEvent::Gap { stream, gap } => Some((*stream, gap.to, 0)),
            TerminalEvent::Opened { .. }
            | TerminalEvent::Ended { .. }
            | TerminalEvent::Refused(_)
            | TerminalEvent::Lost(_) => None,
        };
        if let Some((stream, offset, len)) = consumed {
            let mut is_overrun = false;
            if let Some(position) = reader.streams.get_mut(&stream) {
                position.consumed = offset + len;
                position.queued -= len;
                if position.jump == Jump::Overrun && position.queued == 0 {
                    position.jump = Jump::Asked;
                    is_overrun = true;
                }
            }
            if is_overrun {
                self.resubscribe(stream);
            }
            self.consider_shown(stream);
        }
        Next::Event(event)
    }

    /// Tells the hub what was shown if enough was: a quarter of the window, or
    /// so much that less than a chunk could follow.
    fn consider_shown(&mut self, stream: StreamId) {
        let Some(flow) = self.flows.get(&stream) else { return };
        let readers = self.by_id.values().filter(|reader| covers(&reader.target, &flow.opened));
        let Some(window) = readers.map(|reader| reader.options.window_bytes).min() else { return };
        let Some(consumed) = self.least_consumed(stream) else { return };
        let unsaid = flow.unsaid(consumed);
        if unsaid > 0 && (unsaid >= window / 4 || unsaid + CHUNK_BYTES > window) {
            self.to_show.insert(stream);
        }
    }

    /// What is to be said next of what was shown.
    pub(super) fn poll_shown(&mut self) -> Option<(StreamId, u64)> {
        while let Some(stream) = self.to_show.pop_first() {
            let Some(consumed) = self.least_consumed(stream) else { continue };
            let Some(flow) = self.flows.get_mut(&stream) else { continue };
            let unsaid = flow.unsaid(consumed);
            if unsaid > 0 {
                flow.shown += unsaid;
                return Some((stream, flow.shown));
            }
        }
        None
    }

    /// Whether subscriptions are to be made anew.
    pub(super) fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether the hub is to hear of something.
    pub(super) fn has_something_to_say(&self) -> bool {
        !self.to_show.is_empty() || !self.changed.is_empty()
    }

    /// A reader with something new.
    pub(super) fn poll_awake(&mut self) -> Option<ReaderId> {
        self.awake.pop_first()
    }

    /// Bytes in a reader's queue.
    #[cfg(test)]
    pub(super) fn queued_bytes(&self, id: ReaderId) -> usize {
        let data = |event: &TerminalEvent| match event {
            TerminalEvent::Output { data, .. } => data.len(),
            _ => 0, // a test's figure
        };
        self.by_id.get(&id).map_or(0, |reader| reader.queue.iter().map(data).sum())
    }
}

/// What a reader may do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Take this.
    Event(TerminalEvent),
    /// Nothing is there yet.
    Wait,
    /// Nothing will come any more.
    Over,
}

/// What became of something that arrived.
enum Fate {
    New,
    Nothing,
    /// It leaves a hole without a name: subscribe again.
    Unnamed,
}

fn covers(target: &Target, opened: &TerminalOpened) -> bool {
    match target {
        Target::Agent(agent) => *agent == opened.agent,
        Target::Command(command) => *command == opened.command,
    }
}

impl Reader {
    /// Takes note of a stream. Says whether there is something new to read.
    fn open(&mut self, opened: &TerminalOpened, begin: u64, roster: &Roster) -> bool {
        let stream = opened.stream;
        if let Some(position) = self.streams.get_mut(&stream) {
            position.view.handle_opened(opened.live_from);
            position.live_from = opened.live_from;
            return self.check(stream);
        }
        self.make_room();
        // Earlier attempts at the same command are over, whatever came of them.
        for position in self.streams.values_mut() {
            if position.command == opened.command && position.attempt < opened.attempt {
                position.give_up_end();
            }
        }
        self.begin(stream, opened.command, opened.attempt, begin, opened.live_from);
        if let Some(state) = roster.command(opened.command).or(self.last.as_ref()).cloned() {
            self.handle_state(&state);
        }
        true
    }

    /// Whether the hub goes on beyond where this reader stands: because others
    /// of this dashboard are further, and then it can be asked to go back; or
    /// because it has no more, and may not say so.
    fn look_back(&mut self, opened: &TerminalOpened) -> Fate {
        let lag = self.options.lag;
        let Some(position) = self.streams.get_mut(&opened.stream) else { return Fate::Nothing };
        let (from, to) = (position.view.position(), opened.from);
        if self.is_over || position.course == Course::Ended || from >= to {
            return Fate::Nothing;
        }
        match position.jump {
            Jump::None if lag != Lag::Disconnect => {
                position.jump = Jump::Asked;
                Fate::Unnamed
            }
            Jump::None | Jump::Answered => {
                let gap = Gap { from, to, reason: GapReason::Evicted };
                position.skip(&mut self.queue, opened.stream, gap);
                self.check(opened.stream);
                Fate::New
            }
            Jump::Asked | Jump::Overrun => Fate::Nothing,
        }
    }

    fn begin(
        &mut self,
        stream: StreamId,
        command: CommandId,
        attempt: u32,
        from: u64,
        live_from: u64,
    ) {
        let mut view = View::resuming(from, 0);
        view.handle_opened(live_from);
        self.streams.insert(
            stream,
            Position {
                command,
                attempt,
                view,
                live_from,
                consumed: from,
                queued: 0,
                digest: (from == 0).then(Sha256::new),
                last: None,
                course: Course::Awaited,
                jump: Jump::None,
            },
        );
        let opened = TerminalEvent::Opened { stream, command, attempt, from, live_from };
        self.queue.push_back(opened);
    }

    /// Forgets the oldest stream if there are too many, rather one that is
    /// over than one that is not.
    fn make_room(&mut self) {
        if self.streams.len() < READINGS_MAX {
            return;
        }
        let over = self.streams.iter().find(|(_, position)| position.course != Course::Awaited);
        let oldest = over.or_else(|| self.streams.iter().next()).map(|(stream, _)| *stream);
        if let Some(stream) = oldest {
            self.streams.remove(&stream);
        }
    }

    fn handle_output(&mut self, output: &TerminalOutput) -> Fate {
        if self.is_over {
            return Fate::Nothing;
        }
        let TerminalOutput { stream, offset, channel, data } = output;
        let Some(position) = self.streams.get_mut(stream) else { return Fate::Nothing };
        if position.course == Course::Ended {
            return Fate::Nothing; // an agent that goes on after its own word
        }
        let mut is_new = false;
        if *offset > position.view.position() {
            match position.bridge(*stream, *offset) {
                Ok(gap) => position.skip(&mut self.queue, *stream, gap),
                Err(fate) => return fate,
            }
            is_new = true;
        }
        let known = usize::try_from(position.view.position() - *offset).unwrap_or(usize::MAX);
        if known < data.len() {
            is_new = true;
            let mut data = data.slice(known..);
            let window = usize::try_from(self.options.window_bytes).unwrap_or(usize::MAX);
            if self.options.lag == Lag::Newest {
                position.make_room(&mut self.queue, *stream, &mut data, window);
            } else {
                position.cut(*stream, &mut data, window);
            }
            let offset = position.view.position();
            if let Taken::New(pieces) = position.view.handle_output(offset, *channel, data) {
                for piece in pieces {
                    position.push(&mut self.queue, *stream, piece);
                }
            }
        }
        self.check(*stream);
        if is_new { Fate::New } else { Fate::Nothing }
    }

    fn handle_gap(&mut self, gap: &TerminalGap) -> Fate {
        if self.is_over {
            return Fate::Nothing;
        }
        let TerminalGap { stream, from, to, reason } = gap;
        let Some(position) = self.streams.get_mut(stream) else { return Fate::Nothing };
        if position.course == Course::Ended {
            return Fate::Nothing;
        }
        if *from > position.view.position() {
            match position.bridge(*stream, *from) {
                Ok(gap) => position.skip(&mut self.queue, *stream, gap),
                Err(fate) => return fate,
            }
        }
        if *to <= position.view.position() {
            return Fate::Nothing;
        }
        let gap = Gap { from: *from, to: *to, reason: reason.clone() };
        position.skip(&mut self.queue, *stream, gap);
        self.check(*stream);
        Fate::New
    }

    /// A command's final state. Says whether there is something new.
    fn handle_state(&mut self, state: &Arc<CommandState>) -> bool {
        if self.is_over || !state.status.is_final() {
            return false;
        }
        let is_target = self.target == Target::Command(state.command);
        if is_target {
            self.last = Some(Arc::clone(state));
        }
        let Some(stream) = state.stream else {
            // It never started, or nobody is left who knows its output: there is
            // nothing more to read.
            let is_open = |(id, position): (&StreamId, &Position)| {
                let of_it = (position.command, position.attempt) == (state.command, state.attempt);
                (of_it && position.course == Course::Awaited).then_some(*id)
            };
            let open: Vec<StreamId> = self.streams.iter().filter_map(is_open).collect();
            let mut is_news = is_target;
            for stream in open {
                self.end_without_rest(stream, state);
                is_news = true;
            }
            self.is_over = is_target;
            return is_news;
        };
        // It is the attempt that counted, even if a later one was seen: a hub
        // without memory may have heard of that one never.
        for (id, position) in &mut self.streams {
            if position.command == state.command && *id != stream {
                position.give_up_end();
            }
        }
        if let Some(position) = self.streams.get_mut(&stream) {
            if position.course != Course::Ended {
                position.course = Course::Awaited;
                position.last = Some(Arc::clone(state));
            }
            return self.check(stream);
        }
        let is_empty = state.end.as_ref().is_some_and(|end| end.end == 0);
        if is_target && is_empty {
            // Nothing was written, so nothing may announce the stream.
            self.give_up(state);
            return true;
        }
        false
    }

    /// The final states of streams that are not read to their end and that
    /// the link has not announced.
    fn unannounced(&self, flows: &BTreeMap<StreamId, Flow>) -> Vec<Arc<CommandState>> {
        if self.is_over {
            return Vec::new();
        }
        let begun = self.streams.values().filter_map(|position| position.last.as_ref());
        let states = begun
            .chain(&self.last)
            .filter(|state| state.stream.is_some_and(|stream| !flows.contains_key(&stream)));
        let mut states: Vec<_> = states.cloned().collect();
        states.dedup_by_key(|state| state.stream);
        states
    }

    /// Ends a stream that nobody has any more, with what is missing named.
    fn give_up(&mut self, state: &Arc<CommandState>) {
        let Some(stream) = state.stream else { return };
        let end = state.end.as_ref().map_or(0, |end| end.end);
        if !self.streams.contains_key(&stream) {
            self.make_room();
            self.begin(stream, state.command, state.attempt, 0, end);
        }
        self.end_without_rest(stream, state);
    }

    /// Ends a stream of which nothing more will come.
    fn end_without_rest(&mut self, stream: StreamId, state: &Arc<CommandState>) {
        let end = state.end.as_ref().map_or(0, |end| end.end);
        if let Some(position) = self.streams.get_mut(&stream) {
            let from = position.view.position();
            if from < end {
                let gap = Gap { from, to: end, reason: GapReason::HubLoss };
                position.skip(&mut self.queue, stream, gap);
            }
            position.last = Some(Arc::clone(state));
            position.live_from = 0;
        }
        self.check(stream);
    }

    /// Queues the end of a stream once it is reached.
    fn check(&mut self, stream: StreamId) -> bool {
        let Some(position) = self.streams.get_mut(&stream) else { return false };
        let at = position.view.position();
        let Some(state) = position.last.take_if(|state| {
            // A length that nobody knows is what was there when it was opened.
            at >= state.end.as_ref().map_or(position.live_from, |end| end.end)
        }) else {
            return false;
        };
        position.course = Course::Ended;
        let end = state.end.as_ref();
        let audit = match (position.digest.take(), end.and_then(|end| end.digest.as_deref())) {
            (Some(own), Some(digest)) => compare(own, digest),
            (None, _) | (_, None) => Audit::NotChecked,
        };
        if audit == Audit::Mismatch {
            tracing::error!(%stream, "the output read is not the output written");
        }
        self.is_over = self.target == Target::Command(state.command);
        self.queue.push_back(TerminalEvent::Ended { stream, state, audit });
        true
    }

    fn handle_lost(&mut self, command: CommandId) -> bool {
        if self.is_over {
            return false;
        }
        let mut is_read = self.target == Target::Command(command);
        self.is_over = is_read;
        for position in self.streams.values_mut() {
            if position.command == command && position.course == Course::Awaited {
                position.give_up_end();
                is_read = true;
            }
        }
        if is_read {
            self.queue.push_back(TerminalEvent::Lost(command));
        }
        is_read
    }
}

impl Position {
    /// Awaits no end any more, unless that has come.
    fn give_up_end(&mut self) {
        if self.course == Course::Awaited {
            self.course = Course::Unawaited;
        }
    }

    /// What to make of something that stands beyond the position: the gap up
    /// to it, if it has a name, or why nothing is to be made of it yet.
    fn bridge(&mut self, stream: StreamId, to: u64) -> Result<Gap, Fate> {
        let from = self.view.position();
        match self.jump {
            Jump::None => {
                tracing::warn!(%stream, from, to, "the hub left a hole without a name");
                self.jump = Jump::Asked;
                Err(Fate::Unnamed)
            }
            Jump::Asked | Jump::Overrun => Err(Fate::Nothing),
            Jump::Answered => {
                tracing::error!(%stream, from, to, "the hub does not mend a hole");
                self.jump = Jump::None;
                Ok(Gap { from, to, reason: GapReason::Other("unnamed".into()) })
            }
        }
    }

    /// Cuts bytes for which there is no room: the hub goes beyond the window.
    fn cut(&mut self, stream: StreamId, data: &mut Bytes, window: usize) {
        let room = window.saturating_sub(usize::try_from(self.queued).unwrap_or(usize::MAX));
        if data.len() > room {
            tracing::debug!(%stream, room, "more output than the window has room for");
            data.truncate(room);
            self.jump = Jump::Overrun;
        }
    }

    /// Makes room for the newest bytes at the expense of older ones.
    fn make_room(
        &mut self,
        queue: &mut VecDeque<TerminalEvent>,
        stream: StreamId,
        data: &mut Bytes,
        window: usize,
    ) {
        let queued = usize::try_from(self.queued).unwrap_or(usize::MAX);
        if queued.saturating_add(data.len()) <= window {
            return;
        }
        queue.retain(|event| match event {
            TerminalEvent::Output { stream: of, .. } | TerminalEvent::Gap { stream: of, .. } => {
                *of != stream
            }
            TerminalEvent::Opened { .. }
            | TerminalEvent::Ended { .. }
            | TerminalEvent::Refused(_)
            | TerminalEvent::Lost(_) => true,
        });
        let at = self.view.position();
        let skipped = data.len().saturating_sub(window);
        data.advance(skipped);
        if self.consumed < at {
            let gap = Gap { from: self.consumed, to: at, reason: GapReason::Lagged };
            push_gap(queue, stream, gap);
        }
        self.queued = 0;
        self.digest = None;
        let gap = Gap { from: at, to: at + skipped as u64, reason: GapReason::Lagged };
        self.skip(queue, stream, gap);
    }

    /// Goes on behind a gap that starts at or below the position.
    fn skip(&mut self, queue: &mut VecDeque<TerminalEvent>, stream: StreamId, gap: Gap) {
        if let Taken::New(pieces) = self.view.handle_gap(gap) {
            for piece in pieces {
                self.push(queue, stream, piece);
            }
        }
    }

    fn push(&mut self, queue: &mut VecDeque<TerminalEvent>, stream: StreamId, piece: Piece) {
        match piece {
            Piece::Gap(gap) => {
                self.digest = None;
                push_gap(queue, stream, gap);
            }
            Piece::Bytes { offset, channel, data, replay } => {
                if self.jump == Jump::Answered {
                    self.jump = Jump::None;
                }
                self.queued += data.len() as u64;
                if let Some(digest) = &mut self.digest {
                    digest.update(&data);
                }
                push_bytes(queue, TerminalEvent::Output { stream, offset, channel, data, replay });
            }
        }
    }
}

/// Queues bytes, together with what is last in the queue if both are small.
fn push_bytes(queue: &mut VecDeque<TerminalEvent>, event: TerminalEvent) {
    let TerminalEvent::Output { stream, channel, data, replay, .. } = &event else { return };
    if let Some(TerminalEvent::Output {
        stream: last_stream,
        channel: last_channel,
        data: last,
        replay: last_replay,
        ..
    }) = queue.back_mut()
    {
        let is_same = (&*last_stream, &*last_channel, &*last_replay) == (stream, channel, replay);
        if is_same && last.remaining() + data.len() <= JOINED_BYTES_MAX {
            let mut joined =
                std::mem::take(last).try_into_mut().unwrap_or_else(|shared| shared[..].into());
            joined.extend_from_slice(data);
            *last = joined.freeze();
            return;
        }
    }
    queue.push_back(event);
}

fn push_gap(queue: &mut VecDeque<TerminalEvent>, stream: StreamId, gap: Gap) {
    if let Some(TerminalEvent::Gap { stream: last_stream, gap: last }) = queue.back_mut()
        && *last_stream == stream
        && last.reason == gap.reason
    {
        last.to = gap.to; // positions only ever go on
        return;
    }
    queue.push_back(TerminalEvent::Gap { stream, gap });
}

/// Compares bytes with a digest as `command:complete` carries it.
fn compare(own: Sha256, digest: &str) -> Audit {
    let Some(hex) = digest.strip_prefix("sha256:") else { return Audit::NotChecked };
    let mut own_hex = String::with_capacity(64);
    for byte in own.finalize() {
        for nibble in [byte >> 4, byte & 15] {
            own_hex.extend(char::from_digit(nibble.into(), 16));
        }
    }
    if own_hex == hex { Audit::Verified } else { Audit::Mismatch }
}
