//! A simulated agent: the real core, and programs that follow a script.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use trunkline_client::core::agent::{
    AgentCore, AgentOutput, AgentSetup, Attempts, JournalRecord, Recovered,
};
use trunkline_client::{ExecutionEvent, Outcome};
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{CommandId, InstanceId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{AgentToHub, Channel, Greeting, Run};
use trunkline_protocol::time::Now;

/// One thing that a program does.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u64),
    Sleep(Duration),
    Exit(i32),
    /// Runs until it is interrupted.
    Forever,
}

#[derive(Debug)]
struct Program {
    attempt: u32,
    steps: VecDeque<Step>,
    until: Duration,
    /// Ignores interrupts.
    stubborn: bool,
    ends_at: Option<Duration>,
}

/// Where the process dies, once.
#[derive(serde::Serialize, serde::Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashPoint {
    /// It is about to write down that a command begins.
    BeforeBegun,
    /// That is written, and the command has not started.
    AfterBegun,
    /// A command has ended, and that is not written down.
    BeforeEnded,
    /// That is written down; whether the hub has heard it or not.
    AfterEnded,
}

/// An agent's journal: what is in it survives the process.
#[derive(Debug)]
pub struct SimJournal {
    /// Its name.
    pub instance: InstanceId,
    /// Everything that was ever written.
    pub records: Vec<JournalRecord>,
    /// How long writing takes.
    pub delay: Duration,
    /// It cannot be written as long as this is set.
    pub fails: bool,
    /// It does not answer as long as this is set.
    pub hangs: bool,
    /// Where the process dies next.
    pub crash_at: Option<CrashPoint>,
    writing: Option<(Duration, Vec<JournalRecord>)>,
}

impl SimJournal {
    pub(crate) fn new(instance: InstanceId) -> Self {
        Self {
            instance,
            records: Vec::new(),
            delay: Duration::from_millis(2),
            fails: false,
            hangs: false,
            crash_at: None,
            writing: None,
        }
    }

    pub(crate) fn recovered(&self) -> Recovered {
        let attempts: Attempts = self.records.iter().collect();
        Recovered { instance: self.instance, records: attempts.records() }
    }

    /// Whether the process dies here. Once.
    fn dies(&mut self, at: CrashPoint) -> bool {
        self.crash_at.take_if(|point| *point == at).is_some()
    }
}

fn begins(records: &[JournalRecord]) -> bool {
    records.iter().any(|record| matches!(record, JournalRecord::Begun(_)))
}

fn ends(records: &[JournalRecord]) -> bool {
    records.iter().any(|record| matches!(record, JournalRecord::Ended(_)))
}

/// A process that runs programs for a hub.
#[derive(Debug)]
pub struct AgentNode {
    /// How every process of it is set up.
    pub setup: AgentSetup,
    /// `None` while it is crashed.
    pub core: Option<AgentCore>,
    /// What survives it, if anything does.
    pub journal: Option<SimJournal>,
    programs: BTreeMap<CommandId, Program>,
    /// How often each command was started, over all incarnations.
    pub starts: BTreeMap<CommandId, u32>,
    /// How much each attempt has written.
    pub written: BTreeMap<(CommandId, u32), u64>,
    /// How much was written before under the same number: a hub that lost its
    /// memory counts from 1 again.
    pub written_before: BTreeMap<(CommandId, u32), u64>,
    /// What was typed into the latest attempt at each command.
    pub typed: BTreeMap<CommandId, Vec<u8>>,
    /// When each attempt began.
    pub began: BTreeMap<(CommandId, u32), Duration>,
    /// Commands of which one attempt began more than once.
    pub twice: BTreeSet<CommandId>,
    /// The attempts that its greetings named.
    pub listed: BTreeSet<(CommandId, u32)>,
    /// How often it told in parts what it held.
    pub parts: u32,
    /// What became of each attempt.
    pub fates: BTreeMap<(CommandId, u32), Fate>,
    /// How often its process may put something out, an order to its machine or
    /// a frame, before it dies.
    pub dies_after: Option<u64>,
    /// How often its process died or was sent away for good.
    pub deaths: u32,
}

/// What became of an attempt, as its agent's machine knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It runs.
    Runs,
    /// It ended by itself.
    Exited(i32),
    /// It was made to end.
    Stopped,
    /// It died with its agent.
    Died,
}

/// The byte at an offset of an attempt's output: nobody can guess it, so
/// whoever shows it has it from the program.
pub fn byte_of(command: CommandId, attempt: u32, offset: u64) -> u8 {
    #[expect(clippy::cast_possible_truncation, reason = "half of a random number is one")]
    let bits = command.as_u128() as u64 ^ (u64::from(attempt) << 56) ^ offset;
    let mixed = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

fn script(text: &str) -> (VecDeque<Step>, bool) {
    let mut steps = VecDeque::new();
    let mut stubborn = false;
    for word in text.split_whitespace() {
        let (verb, number) = word.split_once(':').unwrap_or((word, "0"));
        let number: u64 = number.parse().unwrap_or(0);
        match verb {
            "write" => steps.push_back(Step::Write(number)),
            "sleep" => steps.push_back(Step::Sleep(Duration::from_millis(number))),
            "exit" => steps.push_back(Step::Exit(i32::try_from(number).unwrap_or(0))),
            "forever" => steps.push_back(Step::Forever),
            "stubborn" => stubborn = true,
            other => panic!("no such step: {other}"),
        }
    }
    (steps, stubborn)
}

impl AgentNode {
    pub(crate) fn new(setup: AgentSetup, core: AgentCore, journal: Option<SimJournal>) -> Self {
        Self {
            setup,
            core: Some(core),
            journal,
            programs: BTreeMap::new(),
            starts: BTreeMap::new(),
            written: BTreeMap::new(),
            written_before: BTreeMap::new(),
            typed: BTreeMap::new(),
            began: BTreeMap::new(),
            twice: BTreeSet::new(),
            listed: BTreeSet::new(),
            parts: 0,
            dies_after: None,
            fates: BTreeMap::new(),
            deaths: 0,
        }
    }

    /// The process dies, and all it ran with it.
    pub(crate) fn crash(&mut self) {
        if self.core.take().is_some() {
            self.die();
        }
        if let Some(journal) = &mut self.journal {
            journal.writing = None;
        }
    }

    /// Notes which attempts it says are its own, if this frame is a greeting.
    pub(crate) fn note_greeting(&mut self, frame: &Frame) {
        let Frame::Text(text) = frame else { return };
        if text.starts_with(br#"{"type":"agent:commands""#) {
            for message in codec::decode::<AgentToHub>(frame, Rules::from(&Limits::default())) {
                let message = message.expect("an agent speaks as agreed").message;
                let AgentToHub::Commands(held) = message else { panic!("it is a list") };
                self.listed.extend(held.commands.iter().map(|held| (held.command, held.attempt)));
                self.parts += 1;
            }
        }
        if !text.starts_with(br#"{"type":"agent:connect""#) {
            return;
        }
        for message in codec::decode::<Greeting>(frame, Rules::from(&Limits::default())) {
            let message = message.expect("an agent speaks as agreed").message;
            let Greeting::Agent(greeting) = message else { panic!("it is an agent's") };
            let listed = greeting.commands.iter().map(|held| (held.command, held.attempt));
            self.listed.extend(listed);
        }
    }

    /// Whether its time has come, before it puts something out.
    pub(crate) fn dies(&mut self) -> bool {
        let Some(left) = &mut self.dies_after else { return false };
        let less = left.checked_sub(1);
        self.dies_after = less;
        less.is_none()
    }

    /// All that it runs is gone.
    fn die(&mut self) {
        self.deaths += 1;
        for (command, program) in std::mem::take(&mut self.programs) {
            self.fates.insert((command, program.attempt), Fate::Died);
        }
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.core.as_ref()?;
        let programs = self.programs.values().map(|program| match program.ends_at {
            Some(at) => at.min(program.until),
            None => program.until,
        });
        let journal = self.journal.as_ref().filter(|journal| !journal.hangs);
        let journal = journal.and_then(|journal| Some(journal.writing.as_ref()?.0));
        programs.filter(|at| *at < Duration::MAX).chain(journal).min()
    }

    /// Hears the core and lets programs go on. Returns whether anything
    /// happened.
    pub(crate) fn advance(&mut self, now: Now) -> bool {
        if self.core.as_ref().is_some_and(|core| core.connection().is_over())
            && !self.programs.is_empty()
        {
            // The hub does not want it back: what runs is dropped.
            self.die();
            return true;
        }
        let mut happened = self.go_on_writing(now);
        while let Some(core) = &mut self.core
            && let Some(output) = core.poll_output()
        {
            happened = true;
            if self.dies_after == Some(0) {
                self.dies_after = None;
                self.crash();
                return true;
            }
            self.dies_after = self.dies_after.map(|left| left - 1);
            match output {
                AgentOutput::Execute(id) => {
                    let Some((attempt, spec)) = core.begin(id, now) else { continue };
                    let Run::Text(text) = &spec.run else { panic!("a script is a text") };
                    let (steps, stubborn) = script(text);
                    *self.starts.entry(id).or_default() += 1;
                    if self.began.insert((id, attempt), now.monotonic).is_some() {
                        self.twice.insert(id);
                    }
                    self.fates.insert((id, attempt), Fate::Runs);
                    if let Some(before) = self.written.insert((id, attempt), 0) {
                        let most = self.written_before.entry((id, attempt)).or_default();
                        *most = before.max(*most);
                    }
                    self.typed.remove(&id); // that was another program's
                    let until = now.monotonic;
                    let program = Program { attempt, steps, until, stubborn, ends_at: None };
                    self.programs.insert(id, program);
                }
                AgentOutput::Event(id) => {
                    while let Some(event) = core.take_event(id, true) {
                        let Some(program) = self.programs.get_mut(&id) else { continue };
                        match event {
                            ExecutionEvent::Input(data) => {
                                self.typed.entry(id).or_default().extend_from_slice(&data);
                            }
                            ExecutionEvent::Resize(_) => {}
                            ExecutionEvent::Interrupt { grace } => {
                                core.signalled(id);
                                let after = if program.stubborn {
                                    grace
                                } else {
                                    Duration::from_millis(10)
                                };
                                program.ends_at.get_or_insert(now.monotonic + after);
                            }
                        }
                    }
                }
                AgentOutput::Room(id) => {
                    if let Some(program) = self.programs.get_mut(&id) {
                        program.until = program.until.min(now.monotonic);
                    }
                }
                AgentOutput::Kill(id) => {
                    if let Some(program) = self.programs.remove(&id) {
                        self.fates.insert((id, program.attempt), Fate::Stopped);
                    }
                }
                AgentOutput::Report => {}
                AgentOutput::Journal(records) => self.write(records, now),
            }
        }
        let ids: Vec<CommandId> = self.programs.keys().copied().collect();
        for id in ids {
            happened |= self.go_on(id, now);
        }
        happened
    }

    /// The core wants something written down.
    fn write(&mut self, records: Vec<JournalRecord>, now: Now) {
        let Some(journal) = &mut self.journal else { panic!("it has a journal") };
        assert!(journal.writing.is_none(), "one batch at a time");
        let dies = (begins(&records) && journal.dies(CrashPoint::BeforeBegun))
            || (ends(&records) && journal.dies(CrashPoint::BeforeEnded));
        if dies {
            self.crash();
            return;
        }
        journal.writing = Some((now.monotonic + journal.delay, records));
    }

    fn go_on_writing(&mut self, now: Now) -> bool {
        let (Some(core), Some(journal)) = (&mut self.core, &mut self.journal) else { return false };
        let is_due = |(at, _): &mut (Duration, Vec<JournalRecord>)| *at <= now.monotonic;
        if journal.hangs {
            return false;
        }
        let Some((_, records)) = journal.writing.take_if(is_due) else { return false };
        if journal.fails {
            core.handle_journaled(Err("out of order"), now);
            return true;
        }
        let (begins, ends) = (begins(&records), ends(&records));
        journal.records.extend(records);
        let dies = (begins && journal.dies(CrashPoint::AfterBegun))
            || (ends && journal.dies(CrashPoint::AfterEnded));
        if dies {
            self.crash();
        } else {
            core.handle_journaled(Ok(()), now);
        }
        true
    }

    fn go_on(&mut self, id: CommandId, now: Now) -> bool {
        let Some(core) = &mut self.core else { return false };
        let Some(program) = self.programs.get_mut(&id) else { return false };
        let key = (id, program.attempt);
        if program.ends_at.is_some_and(|at| at <= now.monotonic) {
            self.programs.remove(&id);
            self.fates.insert(key, Fate::Stopped);
            core.ended(id, Outcome::Signalled(2), now);
            return true;
        }
        let mut happened = false;
        while program.until <= now.monotonic {
            match program.steps.pop_front().unwrap_or(Step::Exit(0)) {
                Step::Write(0) => {}
                Step::Write(left) => {
                    happened = true;
                    let written = self.written.entry((id, program.attempt)).or_default();
                    let part = left.min(16 * 1024);
                    let bytes: Vec<u8> = (*written..*written + part)
                        .map(|offset| byte_of(id, program.attempt, offset))
                        .collect();
                    let taken = core.write(id, Channel::Pty, &bytes, now) as u64;
                    *written += taken;
                    program.steps.push_front(Step::Write(left - taken));
                    if taken == 0 {
                        program.until = Duration::MAX; // until there is room
                        break;
                    }
                }
                Step::Sleep(pause) => program.until = now.monotonic + pause,
                Step::Forever => {
                    program.steps.push_front(Step::Forever);
                    program.until = Duration::MAX;
                }
                Step::Exit(status) => {
                    self.programs.remove(&id);
                    self.fates.insert(key, Fate::Exited(status));
                    core.ended(id, Outcome::Exited(status), now);
                    return true;
                }
            }
        }
        happened
    }
}
