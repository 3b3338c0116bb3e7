//! Rounds over all servers, turn by turn, and the table of their medians.

#![expect(clippy::cast_precision_loss, reason = "figures for people: three digits are enough")]
#![expect(clippy::disallowed_methods, reason = "measures real time")]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use trunkline_benches::load::{Kind, Load, Pace};
use trunkline_benches::measure::{cpu_time, median, peak_resident};
use trunkline_benches::process::{Server, machine, raise_file_limit};
use trunkline_benches::wire::{Chunks, Result};

use crate::servers;

const USAGE: &str = "\
cargo bench -p trunkline-benches --bench fanout -- [OPTIONS]

  --quick            one short round: does everything work?
  --filter WORDS     only loads whose name has all of these words, which are
                     parted by commas: `100 dashboards,256 B,saturated`
  --rounds N         rounds (5)
  --seconds S        length of each measurement (1.5)
  --workers N        worker threads of the hub (as many as cores)
  --ahead N          chunks under way to the slowest dashboard, at most (256)
  --against PROGRAM  measure the hub of another build of this benchmark, too";

struct Options {
    rounds: usize,
    time: Duration,
    filter: Vec<String>,
    workers: usize,
    ahead: u64,
    against: Option<PathBuf>,
}

impl Options {
    fn be_quick(&mut self) {
        self.rounds = 1;
        self.time = Duration::from_millis(150);
    }
}

/// One load.
#[derive(Clone, Copy)]
struct Cell {
    dashboards: usize,
    chunks: Chunks,
    per_second: Option<u32>,
}

impl Cell {
    fn name(&self) -> String {
        let Self { dashboards, chunks, .. } = self;
        let plural = if *dashboards == 1 { "" } else { "s" };
        format!("{dashboards} dashboard{plural}, {} B, {}", chunks.bytes, self.pace())
    }

    fn pace(&self) -> String {
        self.per_second.map_or("saturated".into(), |rate| format!("{rate}/s"))
    }
}

/// What is measured beside each other.
struct Contender {
    name: &'static str,
    kind: Kind,
    program: PathBuf,
}

/// One measurement.
struct Figures {
    deliveries_per_second: f64,
    /// CPU time of the server's process per delivery.
    cpu_micros: f64,
    /// Below 1 where a server joined chunks for those who lagged.
    frames_per_delivery: f64,
    p50_millis: f64,
    p99_millis: f64,
    peak_mib: f64,
}

pub(crate) fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if_eq("--serve").is_some() {
        return match servers::serve(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("server: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let measured = match options(args) {
        Ok(Some(options)) => measure_all(&options),
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn options(args: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let args: Vec<String> = args.collect();
    let mut options = Options {
        rounds: 5,
        time: Duration::from_millis(1500),
        filter: Vec::new(),
        workers: thread::available_parallelism()?.get(),
        ahead: 256,
        against: None,
    };
    // `cargo bench` says so; `cargo test --benches` only asks whether it runs.
    if !args.iter().any(|arg| arg == "--bench") {
        options.be_quick();
    }
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match arg.as_str() {
            "--bench" => {}
            "--quick" => options.be_quick(),
            "--filter" => options.filter = value()?.split(',').map(|w| w.trim().into()).collect(),
            "--rounds" => options.rounds = value()?.parse()?,
            "--seconds" => options.time = Duration::try_from_secs_f64(value()?.parse()?)?,
            "--workers" => options.workers = value()?.parse()?,
            "--ahead" => options.ahead = value()?.parse::<u64>()?.clamp(4, 1 << 16),
            "--against" => options.against = Some(value()?.into()),
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("{arg}: there is no such option").into()),
        }
    }
    Ok(Some(options))
}

fn cells(filter: &[String]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for dashboards in [1, 100, 1000] {
        for bytes in [256, 1024] {
            let moderate = if dashboards < 1000 { 1000 } else { 100 };
            for per_second in [Some(moderate), None] {
                cells.push(Cell { dashboards, chunks: Chunks { bytes }, per_second });
            }
        }
    }
    cells.retain(|cell| {
        let name = format!(" {}", cell.name());
        // `100 dashboards` is not meant by `1100 dashboards`.
        filter.iter().all(|words| name.contains(&format!(" {words}")))
    });
    cells
}

/// Returns whether every measurement succeeded.
fn measure_all(options: &Options) -> Result<bool> {
    raise_file_limit();
    let this = std::env::current_exe()?;
    let mut contenders = vec![
        Contender { name: "hub", kind: Kind::Hub, program: this.clone() },
        Contender { name: "loop, a write per frame", kind: Kind::Each, program: this.clone() },
        Contender { name: "loop, gathered writes", kind: Kind::Gathered, program: this },
    ];
    if let Some(program) = &options.against {
        let program = program.clone();
        contenders.push(Contender { name: "hub, other build", kind: Kind::Hub, program });
    }
    let cells = cells(&options.filter);
    let mut figures: Vec<Vec<Vec<Figures>>> = Vec::new();
    figures.resize_with(cells.len(), || contenders.iter().map(|_| Vec::new()).collect());
    let mut failures = String::new();
    for round in 1..=options.rounds {
        for (cell, figures) in cells.iter().zip(&mut figures) {
            eprintln!("round {round} of {}: {}", options.rounds, cell.name());
            for (contender, figures) in contenders.iter().zip(figures) {
                match measure(options, *cell, contender) {
                    Ok(measured) => figures.push(measured),
                    Err(error) => writeln!(
                        failures,
                        "FAILED in round {round}: {}: {}: {error}",
                        cell.name(),
                        contender.name
                    )?,
                }
            }
        }
    }
    println!("{}", conditions(options));
    print!("{}", table(options, &cells, &contenders, &figures));
    eprint!("{failures}");
    Ok(failures.is_empty())
}

fn measure(options: &Options, cell: Cell, contender: &Contender) -> Result<Figures> {
    let Contender { kind, program, .. } = contender;
    let Cell { dashboards, chunks, per_second } = cell;
    let server = servers::start(program, *kind, dashboards, chunks, options.workers)?;
    let mut load = Load::connect(server.address, *kind, dashboards, chunks)?;
    let pace = Pace { per_second, ahead: options.ahead };
    load.run(pace, options.time / 4)?;
    settle(&server)?;
    let before = cpu_time(server.pid())?;
    let phase = load.run(pace, options.time)?;
    let cpu = settle(&server)?.saturating_sub(before);
    let deliveries = phase.chunks as f64 * dashboards as f64;
    Ok(Figures {
        deliveries_per_second: deliveries / phase.took.as_secs_f64(),
        cpu_micros: cpu.as_secs_f64() * 1e6 / deliveries,
        frames_per_delivery: phase.seen.frames as f64 / deliveries,
        p50_millis: phase.seen.latencies.quantile(0.5).as_secs_f64() * 1e3,
        p99_millis: phase.seen.latencies.quantile(0.99).as_secs_f64() * 1e3,
        peak_mib: peak_resident(server.pid())? as f64 / f64::from(1 << 20),
    })
}

/// Waits until the server sleeps, so that all it did is accounted for.
fn settle(server: &Server) -> Result<Duration> {
    let since = Instant::now();
    let mut before = cpu_time(server.pid())?;
    loop {
        thread::sleep(Duration::from_millis(3));
        let now = cpu_time(server.pid())?;
        if now == before {
            return Ok(now);
        }
        if since.elapsed() > Duration::from_secs(5) {
            return Err("the server does not come to rest".into());
        }
        before = now;
    }
}

fn conditions(options: &Options) -> String {
    format!(
        "{}; {} rounds of {:.2} s, medians; hub with {} workers; at most {} chunks under way.\n",
        machine(),
        options.rounds,
        options.time.as_secs_f64(),
        options.workers,
        options.ahead
    )
}

fn table(
    options: &Options,
    cells: &[Cell],
    contenders: &[Contender],
    figures: &[Vec<Vec<Figures>>],
) -> String {
    let mut table = String::from(
        "| dashboards | chunk | rate | server | deliveries/s | CPU per delivery | × write per frame \
         | × gathered | frames per delivery | p50 | p99 | peak memory |\n\
         |--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for (cell, figures) in cells.iter().zip(figures) {
        for (contender, own) in contenders.iter().zip(figures) {
            let Cell { dashboards, chunks, .. } = cell;
            let load = format!("| {dashboards} | {} B | {} ", chunks.bytes, cell.pace());
            if own.len() < options.rounds {
                table.push_str(&load);
                table.push_str(&["| ", contender.name, " | FAILED | | | | | | | |\n"].concat());
                continue;
            }
            let of = |figure: fn(&Figures) -> f64| median(own.iter().map(figure).collect());
            // Of each round on its own: what disturbs one disturbs both.
            let times = |kind: Kind| {
                let whole = |other: &Vec<Figures>| other.len() == options.rounds;
                let mut all = contenders.iter().zip(figures);
                let other = all.find(|(c, other)| c.kind == kind && whole(other));
                let rounds = other.iter().flat_map(|(_, other)| own.iter().zip(*other));
                median(rounds.map(|(own, other)| own.cpu_micros / other.cpu_micros).collect())
            };
            let row = format!(
                "{load}| {} | {} | {:.2} µs | {:.2} | {:.2} | {:.2} | {:.2} ms | {:.2} ms | {:.0} MiB |\n",
                contender.name,
                thousands(of(|f| f.deliveries_per_second)),
                of(|f| f.cpu_micros),
                times(Kind::Each),
                times(Kind::Gathered),
                of(|f| f.frames_per_delivery),
                of(|f| f.p50_millis),
                of(|f| f.p99_millis),
                of(|f| f.peak_mib),
            );
            table.push_str(&row);
        }
    }
    table
}

/// `1,234,567`
fn thousands(figure: f64) -> String {
    let digits = format!("{figure:.0}");
    let mut grouped = String::new();
    for (left, digit) in (0..digits.len()).rev().zip(digits.chars()) {
        grouped.push(digit);
        if left > 0 && left % 3 == 0 {
            grouped.push(',');
        }
    }
    grouped
}
