//! What happens in a round, and when: drawn from a seed, and nothing else.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use trunkline_tests::proxy::{Cut, Way};

use crate::program::Program;

/// Dashboards that are there all the time.
pub(crate) const DASHBOARDS: usize = 2;

/// A link, by who dialled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Agent,
    Dashboard(usize),
}

/// A process that can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Hub,
    Agent,
}

/// When a reader begins to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// At once, at everything.
    Prompt,
    /// When all is healed; the hub keeps what it can until then.
    Late,
    /// At once, and only at the newest when it is behind.
    Newest,
}

/// A command that somebody asks for.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Its number in the round.
    pub(crate) number: usize,
    /// Which dashboard asks.
    pub(crate) asker: usize,
    pub(crate) program: Program,
    pub(crate) retry: bool,
    /// It must be dispatched by then.
    pub(crate) within: Option<Duration>,
    /// The longest it may run.
    pub(crate) run_for: Option<Duration>,
    /// How each dashboard reads it.
    pub(crate) readers: [Pace; DASHBOARDS],
    /// When somebody interrupts it.
    pub(crate) interrupted_after: Option<Duration>,
}

#[derive(Debug, Clone)]
pub(crate) enum Act {
    Ask(Ask),
    Cut(Link),
    Reset(Link),
    CutAfter(Link, Way, u64, Cut),
    HalfOpen(Link),
    Stall(Link, Way),
    Resume(Link, Way),
    Throttle(Link, Way, Option<u64>),
    Delay(Link, Way, Duration),
    Chunk(Link, Way, Option<usize>),
    Refuse(Link, bool),
    /// `kill -9`.
    Kill(Who),
    Start(Who),
    /// `SIGSTOP`.
    Stop(Who),
    /// `SIGCONT`.
    GoOn(Who),
}

/// A round.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// In the order of their times.
    pub(crate) acts: Vec<(Duration, Act)>,
    /// Whether somebody hangs up dead links of dashboards when all heals;
    /// otherwise they are found dead by their silence, after 45 s.
    pub(crate) hangs_up: bool,
    /// Whether it takes longer than a test should.
    pub(crate) is_long: bool,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Plan {
    /// The round of a seed.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let is_long = rng.random_ratio(1, 3);
        let hangs_up = !is_long || rng.random_ratio(1, 2);
        let length = if is_long { rng.random_range(6_000..20_000) } else { 5_000 };
        let mut plan = Self { seed, acts: Vec::new(), hangs_up, is_long };
        let commands = if is_long { rng.random_range(6..14) } else { rng.random_range(5..9) };
        for number in 0..commands {
            let at = ms(rng.random_range(0..length * 3 / 4));
            plan.acts.push((at, Act::Ask(ask(number, is_long, &mut rng))));
        }
        let faults = if is_long { rng.random_range(8..24) } else { rng.random_range(6..12) };
        for _ in 0..faults {
            let at = ms(rng.random_range(200..length));
            plan.fault(at, &mut rng);
        }
        // Every process dies in most rounds, and is held up in many.
        for who in [Who::Hub, Who::Agent] {
            if rng.random_ratio(2, 3) {
                let at = ms(rng.random_range(500..length));
                plan.kill(who, at, &mut rng);
            }
            if rng.random_ratio(1, 3) {
                let at = ms(rng.random_range(500..length));
                let long = is_long && rng.random_ratio(1, 2);
                let time = if long { 35_000 } else { rng.random_range(500..4_000) };
                plan.acts.push((at, Act::Stop(who)));
                plan.acts.push((at + ms(time), Act::GoOn(who)));
            }
        }
        plan.acts.sort_by_key(|(at, _)| *at);
        plan
    }

    fn kill(&mut self, who: Who, at: Duration, rng: &mut StdRng) {
        let gone = if self.is_long { 6_000 } else { 1_500 };
        self.acts.push((at, Act::Kill(who)));
        self.acts.push((at + ms(rng.random_range(0..gone)), Act::Start(who)));
    }

    fn fault(&mut self, at: Duration, rng: &mut StdRng) {
        let link = match rng.random_range(0..4) {
            0 | 1 => Link::Agent,
            n => Link::Dashboard(n - 2),
        };
        let way = if rng.random_bool(0.5) { Way::Up } else { Way::Down };
        let until = at + ms(rng.random_range(100..2_500));
        let (begins, ends) = match rng.random_range(0..10) {
            0 => (Act::Cut(link), None),
            1 => (Act::Reset(link), None),
            2 | 3 => {
                // Of any size, up to that of many frames.
                let digits = rng.random_range(1..6);
                let bytes = rng.random_range(0..=10_u64.pow(digits));
                let cut = if rng.random_bool(0.5) { Cut::Close } else { Cut::Reset };
                (Act::CutAfter(link, way, bytes, cut), None)
            }
            4 => (Act::HalfOpen(link), None),
            5 => (Act::Stall(link, way), Some(Act::Resume(link, way))),
            6 => {
                let rate = 10_u64.pow(rng.random_range(2..6));
                (Act::Throttle(link, way, Some(rate)), Some(Act::Throttle(link, way, None)))
            }
            7 => {
                let delay = ms(rng.random_range(5..400));
                (Act::Delay(link, way, delay), Some(Act::Delay(link, way, Duration::ZERO)))
            }
            8 => {
                let bytes = rng.random_range(1..40);
                (Act::Chunk(link, way, Some(bytes)), Some(Act::Chunk(link, way, None)))
            }
            _ => {
                let cut = if rng.random_bool(0.5) { Act::Cut(link) } else { Act::Reset(link) };
                self.acts.push((at, Act::Refuse(link, true)));
                (cut, Some(Act::Refuse(link, false)))
            }
        };
        self.acts.push((at, begins));
        self.acts.extend(ends.map(|ends| (until, ends)));
    }
}

fn ask(number: usize, is_long: bool, rng: &mut StdRng) -> Ask {
    // No two lines of a round are alike.
    let first = 10_000_000_000 * (number as u64 + 1) + rng.random_range(0..1_000_000);
    let program = match rng.random_range(0..12) {
        0 | 1 => Program::Count { first, lines: rng.random_range(1..20_000) },
        2 => Program::Count {
            first,
            // Up to more than any log holds.
            lines: rng.random_range(20_000..if is_long { 1_000_000 } else { 100_000 }),
        },
        3..=5 => Program::Drip {
            first,
            lines: rng.random_range(10..if is_long { 200 } else { 50 }),
            every_ms: rng.random_range(10..80),
        },
        6 | 7 => Program::Talk { lines: rng.random_range(1..30), in_terminal: false },
        8 => Program::Talk { lines: rng.random_range(1..30), in_terminal: true },
        9 => Program::TwoChannels { lines: rng.random_range(10..500) },
        10 => Program::Endless { first, every_ms: rng.random_range(10..80) },
        _ => Program::Missing,
    };
    let is_endless = matches!(program, Program::Endless { .. });
    let run_for = (is_endless && rng.random_bool(0.5)).then(|| ms(rng.random_range(100..3_000)));
    let is_typed_into = matches!(program, Program::Talk { .. });
    let pace = |rng: &mut StdRng| match rng.random_range(0..8) {
        0 => Pace::Late,
        1 => Pace::Newest,
        _ => Pace::Prompt,
    };
    Ask {
        number,
        asker: rng.random_range(0..DASHBOARDS),
        program,
        // What was typed is not typed again.
        retry: !is_typed_into && rng.random_ratio(1, 4),
        within: rng.random_ratio(1, 10).then(|| ms(rng.random_range(1..3_000))),
        run_for,
        readers: [pace(rng), pace(rng)],
        interrupted_after: ((is_endless && run_for.is_none()) || rng.random_ratio(1, 8))
            .then(|| ms(rng.random_range(0..3_000))),
    }
}
