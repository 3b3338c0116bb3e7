//! A simulated agent: the real core, and programs that follow a script.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use trunkline_client::core::agent::{AgentCore, AgentOutput, AgentSetup};
use trunkline_client::{ExecutionEvent, Outcome};
use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{Channel, Run};
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

/// A process that runs programs for a hub.
#[derive(Debug)]
pub struct AgentNode {
    /// How every process of it is set up.
    pub setup: AgentSetup,
    /// `None` while it is crashed.
    pub core: Option<AgentCore>,
    programs: BTreeMap<CommandId, Program>,
    /// How often each command was started, over all incarnations.
    pub starts: BTreeMap<CommandId, u32>,
    /// How much each attempt has written.
    pub written: BTreeMap<(CommandId, u32), u64>,
    /// What was typed into each command.
    pub typed: BTreeMap<CommandId, Vec<u8>>,
    /// When each attempt began.
    pub began: BTreeMap<(CommandId, u32), Duration>,
    /// Commands of which one attempt began more than once.
    pub twice: BTreeSet<CommandId>,
    /// What became of each attempt.
    pub fates: BTreeMap<(CommandId, u32), Fate>,
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
    pub(crate) fn new(setup: AgentSetup, core: AgentCore) -> Self {
        Self {
            setup,
            core: Some(core),
            programs: BTreeMap::new(),
            starts: BTreeMap::new(),
            written: BTreeMap::new(),
            typed: BTreeMap::new(),
            began: BTreeMap::new(),
            twice: BTreeSet::new(),
            fates: BTreeMap::new(),
            deaths: 0,
        }
    }

    /// The process dies, and all it ran with it.
    pub(crate) fn crash(&mut self) {
        if self.core.take().is_some() {
            self.die();
        }
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
        programs.filter(|at| *at < Duration::MAX).min()
    }

    /// Hears the core and lets programs go on. Returns whether anything
    /// happened.
    pub(crate) fn advance(&mut self, now: Now) -> bool {
        let Some(core) = &mut self.core else { return false };
        if core.connection().is_over() && !self.programs.is_empty() {
            // The hub does not want it back: what runs is dropped.
            self.die();
            return true;
        }
        let Some(core) = &mut self.core else { return false };
        let mut happened = false;
        while let Some(output) = core.poll_output() {
            happened = true;
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
                    self.written.insert((id, attempt), 0);
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
            }
        }
        let ids: Vec<CommandId> = self.programs.keys().copied().collect();
        for id in ids {
            happened |= self.go_on(id, now);
        }
        happened
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
