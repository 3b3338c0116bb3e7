//! Rounds of calm and attacks, turn by turn, and the table of their medians.

#![expect(clippy::cast_precision_loss, reason = "figures for people: three digits are enough")]

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use trunkline_benches::load::{Kind, Load, Pace};
use trunkline_benches::measure::{Histogram, median, peak_resident};
use trunkline_benches::process::{Process, Server, machine, raise_file_limit};
use trunkline_benches::wire::{Chunks, Result};

use crate::hostile::{self, Attack};
use crate::hub;
use crate::orders::Orders;

const USAGE: &str = "\
cargo bench -p trunkline-benches --bench attack -- [OPTIONS]

  --quick         one short round: does everything work, within wider bounds?
  --only NAME     only this attack: loris, idle, guesses, floods, output, deaf,
                  explosion or all; again for another one
  --rounds N      rounds (3)
  --seconds S     length of each measurement (7)
  --workers N     worker threads of the hub (as many as cores)

It fails when honest peers are disturbed beyond the bounds that the table
names, and when one of them is refused, closed or shown a gap.";

/// The honest load: one agent whose terminal is watched, and commands beside.
const DASHBOARDS: usize = 20;
const CHUNKS: Chunks = Chunks { bytes: 1024 };
const PACE: Pace = Pace { per_second: Some(200), ahead: 1024 };

const MIB: f64 = 1024.0 * 1024.0;

struct Options {
    rounds: usize,
    time: Duration,
    only: Vec<Attack>,
    workers: usize,
    /// What latencies may be at most, in milliseconds, whatever they are in
    /// calm: a scheduler's time for each of thousands of peers on few cores.
    bound_millis: f64,
}

impl Options {
    fn be_quick(&mut self) {
        self.rounds = 1;
        self.time = Duration::from_secs(1);
        self.bound_millis = 1000.0;
    }
}

/// How many times the latency of calm that of an attack may be, where that is
/// above `bound_millis`.
const RATIO_MAX: f64 = 10.0;

/// What a hostile link may cost the hub at most, by its limits.
fn link_bytes_max(attack: Attack) -> usize {
    const KIB: usize = 1024;
    let limits = hub::limits();
    match attack {
        // A head of 16 KiB or a greeting of as many, and what a task takes.
        Attack::Loris | Attack::Idle | Attack::Guesses => 32 * KIB,
        // What waits for it, in the core and on its way, and one message.
        Attack::Floods | Attack::Output | Attack::Explosion => {
            2 * limits.control_bytes_max + limits.message_bytes_max
        }
        // What its transport has gathered, and its place in the log.
        Attack::Deaf => 512 * KIB,
        Attack::All => 0, // the sum of the others
    }
}

fn memory_max(attack: Attack) -> usize {
    if attack == Attack::All {
        return Attack::ALL[..7].iter().map(|attack| memory_max(*attack)).sum();
    }
    attack.links() * link_bytes_max(attack)
}

/// One measurement.
struct Figures {
    output_p50: f64,
    output_p99: f64,
    order_p50: f64,
    order_p99: f64,
    chunks_per_second: f64,
    peak_mib: f64,
    hostile_links: f64,
    hostile_messages: f64,
}

pub(crate) fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["--serve", workers] => workers.parse().map_err(Into::into).and_then(hub::serve),
        ["--attack", name, port] => attack(name, port),
        _ => match options(&args) {
            Ok(Some(options)) => measure_all(&options),
            Ok(None) => {
                println!("{USAGE}");
                Ok(())
            }
            Err(error) => {
                eprintln!("{error}\n\n{USAGE}");
                return ExitCode::from(2);
            }
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn named(name: &str) -> Result<Attack> {
    let known = Attack::ALL.into_iter().find(|attack| attack.name() == name);
    Ok(known.ok_or_else(|| format!("{name}: there is no such attack"))?)
}

fn attack(name: &str, port: &str) -> Result<()> {
    hostile::run(named(name)?, port.parse()?)
}

fn options(args: &[&str]) -> Result<Option<Options>> {
    let mut options = Options {
        rounds: 3,
        // Longer than a greeting may take.
        time: Duration::from_secs(7),
        only: Vec::new(),
        workers: thread::available_parallelism()?.get(),
        bound_millis: 300.0,
    };
    // `cargo bench` says so; `cargo test --benches` only asks whether it runs.
    if !args.contains(&"--bench") {
        options.be_quick();
    }
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match *arg {
            "--bench" => {}
            "--quick" => options.be_quick(),
            "--only" => options.only.push(named(value()?)?),
            "--rounds" => options.rounds = value()?.parse()?,
            "--seconds" => options.time = Duration::try_from_secs_f64(value()?.parse()?)?,
            "--workers" => options.workers = value()?.parse()?,
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("{arg}: there is no such option").into()),
        }
    }
    Ok(Some(options))
}

fn measure_all(options: &Options) -> Result<()> {
    raise_file_limit();
    let this = std::env::current_exe()?;
    let attacks: Vec<Attack> = Attack::ALL
        .into_iter()
        .filter(|attack| options.only.is_empty() || options.only.contains(attack))
        .collect();
    let mut calm = Vec::new();
    let mut attacked: Vec<Vec<Figures>> = attacks.iter().map(|_| Vec::new()).collect();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}: calm", options.rounds);
        calm.push(measure(options, &this, None).map_err(|error| format!("calm: {error}"))?);
        for (attack, figures) in attacks.iter().zip(&mut attacked) {
            let name = attack.name();
            eprintln!("round {round} of {}: {name}", options.rounds);
            let measured = measure(options, &this, Some(*attack));
            figures.push(measured.map_err(|error| format!("{name}: {error}"))?);
        }
    }
    println!(
        "{}; {} rounds of {:.0} s, medians; hub with {} workers.\n",
        machine(),
        options.rounds,
        options.time.as_secs_f64(),
        options.workers
    );
    let mut broken = Vec::new();
    print!("{}", table(options, &attacks, &calm, &attacked, &mut broken));
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\n").into()) }
}

fn measure(options: &Options, program: &Path, attack: Option<Attack>) -> Result<Figures> {
    let server = Server::start(program, &["--serve", &options.workers.to_string()])?;
    let mut load = Load::connect(server.address, Kind::Hub, DASHBOARDS, CHUNKS)?;
    load.run(PACE, options.time / 8)?;
    let hostile = match attack {
        Some(attack) => {
            let port = server.address.port().to_string();
            let mut hostile = Process::start(program, &["--attack", attack.name(), &port])?;
            hostile.line()?; // they are there
            Some(hostile)
        }
        None => None,
    };
    let orders = Orders::begin(server.address)?;
    let phase = load.run(PACE, options.time)?;
    let orders = orders.end()?;
    let peak = peak_resident(server.pid())?;
    let said = hostile.map_or(Ok("0 0".into()), Process::end)?;
    let said: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [hostile_links, hostile_messages] = said[..] else {
        return Err("the attackers have failed".into());
    };
    let millis = |all: &Histogram, share| all.quantile(share).as_secs_f64() * 1e3;
    Ok(Figures {
        output_p50: millis(&phase.seen.latencies, 0.5),
        output_p99: millis(&phase.seen.latencies, 0.99),
        order_p50: millis(&orders, 0.5),
        order_p99: millis(&orders, 0.99),
        chunks_per_second: phase.chunks as f64 / phase.took.as_secs_f64(),
        peak_mib: peak as f64 / MIB,
        hostile_links,
        hostile_messages,
    })
}

fn table(
    options: &Options,
    attacks: &[Attack],
    calm: &[Figures],
    attacked: &[Vec<Figures>],
    broken: &mut Vec<String>,
) -> String {
    let mut table = String::from(
        "| attack | links | came | said | output p50 | p99 | × calm | command p50 | p99 | × calm \
         | chunks/s | hub memory | above calm | at most |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let of =
        |all: &[Figures], figure: fn(&Figures) -> f64| median(all.iter().map(figure).collect());
    table += &row(format_args!(
        "| none | | | | {:.2} ms | {:.2} ms | | {:.2} ms | {:.2} ms | | {:.0} | {:.0} MiB | | |\n",
        of(calm, |f| f.output_p50),
        of(calm, |f| f.output_p99),
        of(calm, |f| f.order_p50),
        of(calm, |f| f.order_p99),
        of(calm, |f| f.chunks_per_second),
        of(calm, |f| f.peak_mib),
    ));
    for (attack, own) in attacks.iter().zip(attacked) {
        // Of each round on its own: what disturbs one disturbs both.
        let rounds = |figure: fn(&Figures) -> f64| {
            own.iter().zip(calm).map(move |(own, calm)| (figure(own), figure(calm)))
        };
        let times = |figure: fn(&Figures) -> f64| {
            median(rounds(figure).map(|(own, calm)| own / calm).collect())
        };
        let above = median(rounds(|f| f.peak_mib).map(|(own, calm)| own - calm).collect());
        let memory_max = memory_max(*attack) as f64 / MIB;
        table += &row(format_args!(
            "| {} | {} | {:.0} | {:.0} | {:.2} ms | {:.2} ms | {:.1} | {:.2} ms | {:.2} ms | {:.1} \
             | {:.0} | {:.0} MiB | {above:.0} MiB | {memory_max:.0} MiB |\n",
            attack.about(),
            attack.links(),
            of(own, |f| f.hostile_links),
            of(own, |f| f.hostile_messages),
            of(own, |f| f.output_p50),
            of(own, |f| f.output_p99),
            times(|f| f.output_p99),
            of(own, |f| f.order_p50),
            of(own, |f| f.order_p99),
            times(|f| f.order_p99),
            of(own, |f| f.chunks_per_second),
            of(own, |f| f.peak_mib),
        ));
        let name = attack.name();
        let mut too = |what: &str, p99: f64, times: f64| {
            if p99 > options.bound_millis && times > RATIO_MAX {
                broken.push(format!(
                    "BROKEN: {name}: {what} has a p99 of {p99:.0} ms, {times:.1} times that of calm; \
                     at most {:.0} ms or {RATIO_MAX} times are allowed",
                    options.bound_millis
                ));
            }
        };
        too("output", of(own, |f| f.output_p99), times(|f| f.output_p99));
        too("a command", of(own, |f| f.order_p99), times(|f| f.order_p99));
        let slow = times(|f| f.chunks_per_second);
        if slow < 0.9 {
            broken
                .push(format!("BROKEN: {name}: output comes at {slow:.2} times the rate of calm"));
        }
        if above > memory_max {
            broken.push(format!(
                "BROKEN: {name}: the hub takes {above:.0} MiB more than in calm; its limits allow \
                 {memory_max:.0}"
            ));
        }
    }
    table
}

fn row(cells: std::fmt::Arguments<'_>) -> String {
    cells.to_string()
}
