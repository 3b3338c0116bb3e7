//! Too much, too long, or taken too slowly: what it costs the hub is measured,
//! in a process where nothing else runs.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::runtime;
use tokio::time::timeout;
use trunkline_server::Hub;
use trunkline_server::protocol::limits::Limits;

use crate::raw::{BINARY, FIN, PATIENCE, PING, REQUEST, Raw, TEXT, frame, head, number, text};
use crate::stage::{GUEST_STREAM, Stage, limits, output, request, subscribe};

const MIB: usize = 1024 * 1024;

/// Runs a test in a process of its own, where its memory can be measured.
///
/// glibc gives each thread an arena, and what one thread allocates and another
/// frees stays with the first: with a link's frames now on this thread and now
/// on that, the same live bytes take up to 11 MiB more or less from run to run.
/// One arena takes what is used.
fn alone(name: &str, test: impl Future<Output = ()>) {
    const ALONE: &str = "BAD_INPUT_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([&format!("pressure::{name}"), "--exact", "--nocapture"])
            .env(ALONE, "1")
            .env("MALLOC_ARENA_MAX", "1")
            .status();
        assert!(status.unwrap().success(), "{name}");
        return;
    }
    runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// A figure of `/proc/self/status`, in bytes.
fn memory(figure: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(figure)).unwrap();
    let digits: String = line.chars().filter(char::is_ascii_digit).collect();
    digits.parse::<usize>().unwrap() * 1024
}

/// Measures how far memory rises above what it is now, at its highest.
struct Rise {
    before: usize,
}

impl Rise {
    fn begin() -> Self {
        // Sets the high-water mark back.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        Self { before: memory("VmRSS") }
    }

    fn at_most(&self, max: usize) {
        let rise = memory("VmHWM").saturating_sub(self.before);
        println!("memory rose by {} KiB at most; {} allowed", rise / 1024, max / 1024);
        assert!(rise <= max, "memory rose by {rise} bytes; at most {max}");
    }
}

/// Writes a message of `[0,0,…` between `before` and `after` without having it
/// in memory.
async fn say_zeros(guest: &mut Raw, before: &str, after: &str, len: usize) {
    let zeros = len / 2 - 1;
    let total = before.len() + 1 + 2 * zeros + 2 + after.len();
    guest.send(&head(FIN | TEXT, total as u64)).await.unwrap();
    guest.send(format!("{before}[").as_bytes()).await.unwrap();
    let piece = "0,".repeat(8 * 1024);
    let mut left = 2 * zeros;
    while left > 0 {
        let now = left.min(piece.len());
        guest.send(&piece.as_bytes()[..now]).await.unwrap();
        left -= now;
    }
    guest.send(format!("0]{after}").as_bytes()).await.unwrap();
}

#[test]
fn a_megabyte_of_zeros() {
    alone("a_megabyte_of_zeros", async {
        let mut stage = Stage::new().await;
        let mut guest = stage.guest_dashboard("guest").await;
        let cases = [
            ("", ""),
            (r#"{"type":"subscribe","payload":"#, "}"),
            (r#"{"type":"subscribe","payload":{"terminals":"#, "}}"),
            (r#"{"type":"heartbeat:ping","x":"#, "}"),
            (r#"{"x":"#, r#","type":"heartbeat:ping"}"#),
            (r#"{"type":"heartbeat:ping","payload":{"x":"#, "}}"),
            (r#"{"type":"batch","payload":{"messages":"#, "}}"),
            (r#"{"type":"heartbeat:ping","x":[["#, "]]}"),
            (r#"{"type":"system:emergency-stop","payload":{"agents":"#, "}}"),
        ];
        // Once before measuring, so that what a link needs once is there.
        for warm in [true, false] {
            let rise = Rise::begin();
            for (n, (before, after)) in (0..).zip(cases) {
                say_zeros(&mut guest, before, after, MIB - 200).await;
                guest.until("error").await;
                guest.lives(n).await;
            }
            if !warm {
                rise.at_most(4 * MIB);
            }
        }
        // Before a greeting no more than after it.
        let rise = Rise::begin();
        for (before, after) in
            [("", ""), (r#"{"type":"agent:connect","payload":{"commands":"#, "}}")]
        {
            let mut stranger = stage.stranger().await;
            say_zeros(&mut stranger, before, after, 16 * 1024 - 200).await;
            stranger.until("error").await;
            stranger.closed(4400).await;
        }
        rise.at_most(256 * 1024);
        stage.goes_on().await;
    });
}

#[test]
fn declared_and_not_sent() {
    alone("declared_and_not_sent", async {
        let limits = Limits {
            message_timeout: Duration::from_secs(20),
            greeting_timeout: Duration::from_secs(20),
            ..limits()
        };
        let mut stage = Stage::of(Hub::builder().limits(limits)).await;
        let mut guests = Vec::new();
        for _ in 0..200 {
            guests.push(stage.stranger().await);
        }
        let rise = Rise::begin();
        for guest in &mut guests {
            guest.send(&[head(FIN | BINARY, MIB as u64), b"four".to_vec()].concat()).await.unwrap();
        }
        for _ in 0..10 {
            stage.goes_on().await;
        }
        // 200 MiB were announced.
        rise.at_most(8 * MIB);
        drop(guests);
        stage.goes_on_alone().await;
    });
}

/// Before they have said who they are, peers cost next to nothing: what they
/// have in mind does not matter then.
#[test]
fn crowds_that_say_nothing() {
    alone("crowds_that_say_nothing", async {
        let limits = Limits { greeting_timeout: Duration::from_secs(60), ..limits() };
        let mut stage = Stage::of(Hub::builder().limits(limits)).await;
        // A few before measuring, so that what is needed once is there; not more,
        // as what they leave behind would be used again.
        for crowd_size in [30, 1500] {
            let rise = Rise::begin();
            let mut crowd = Vec::new();
            for n in 0..crowd_size {
                // A third has only connected, a third is in the middle of its
                // handshake, a third is through it and in the middle of a frame.
                let mut raw = match n % 3 {
                    0 | 1 => Raw::dial(stage.address).await,
                    _ => stage.stranger().await,
                };
                match n % 3 {
                    0 => {}
                    1 => raw.send(&REQUEST.as_bytes()[..100]).await.unwrap(),
                    _ => {
                        raw.send(&[head(FIN | TEXT, 9000), vec![b' '; 100]].concat())
                            .await
                            .unwrap();
                    }
                }
                crowd.push(raw);
            }
            stage.goes_on().await;
            if crowd_size == 1500 {
                // Both ends of each connection are in this process.
                rise.at_most(crowd_size * 16 * 1024);
            }
            drop(crowd);
            stage.goes_on_alone().await;
        }
    });
}

/// Sends the same bytes until the hub takes no more of them, or `enough`.
/// Nothing that the hub says is read. Returns what was sent.
async fn flood(guest: &mut Raw, bytes: &[u8], enough: usize) -> usize {
    let bytes = bytes.repeat((64 * 1024 / bytes.len()).max(1));
    let mut sent = 0;
    while sent < enough {
        let writing = timeout(Duration::from_millis(500), guest.socket.write_all(&bytes));
        if !matches!(writing.await, Ok(Ok(()))) {
            break;
        }
        sent += bytes.len();
    }
    sent
}

#[test]
fn questions_whose_answers_are_never_read() {
    alone("questions_whose_answers_are_never_read", async {
        let mut stage = Stage::new().await;
        let mut guest = stage.guest_dashboard("guest").await;
        let rise = Rise::begin();
        let ping = text(r#"{"type":"heartbeat:ping","payload":{"n":1}}"#);
        let sent = flood(&mut guest, &ping, 256 * MIB).await;
        println!("{} KiB of questions", sent / 1024);
        // The connection is kept, and nothing is read: the hub lets go of it
        // all the same.
        stage.goes_on_alone().await;
        // What waits is bounded twice over by `control_bytes_max`: in the core,
        // and on its way to the transport.
        rise.at_most(12 * MIB);
        drop(guest);
    });
}

#[test]
fn pings_whose_pongs_are_never_read() {
    alone("pings_whose_pongs_are_never_read", async {
        let mut stage = Stage::new().await;
        let mut guest = stage.guest_dashboard("guest").await;
        let rise = Rise::begin();
        // A message now and then, so that it is no flood of control frames.
        let note = text(r#"{"type":"heartbeat:pong"}"#);
        let pings = [frame(FIN | PING, &[b'x'; 125]).repeat(100), note].concat();
        let sent = flood(&mut guest, &pings, 64 * MIB).await;
        println!("{} KiB of pings", sent / 1024);
        rise.at_most(8 * MIB);
        stage.goes_on().await;
        drop(guest);
        stage.goes_on_alone().await;
    });
}

/// The honest agent's guest writes this much, within its grants.
async fn write_out(guest: &mut Raw, total: u64) {
    let mut allowed = 0;
    let mut at = 0;
    let data = "x".repeat(16 * 1024);
    while at < total {
        while at + data.len() as u64 > allowed {
            let taken = guest.until("terminal:taken").await;
            allowed = number(&taken, "allowed").unwrap();
        }
        guest.say(&output(GUEST_STREAM, at, &data)).await;
        at += data.len() as u64;
    }
}

#[test]
fn a_reader_that_never_reads() {
    alone("a_reader_that_never_reads", async {
        let limits =
            Limits { log_bytes_per_stream: MIB, terminal_bytes_per_second: 1 << 40, ..limits() };
        let mut stage = Stage::of(Hub::builder().limits(limits)).await;
        let mut slow = Vec::new();
        for n in 0..20 {
            let mut reader = stage.guest_dashboard(&format!("slow-{n}")).await;
            reader.say(&subscribe("guest")).await;
            slow.push(reader);
        }
        let mut guest = stage.running_guest("guest").await;
        let rise = Rise::begin();
        write_out(&mut guest, 48 * MIB as u64).await;
        stage.goes_on().await;
        // A log of 1 MiB; for each reader what its transport has gathered.
        rise.at_most(MIB + 20 * 512 * 1024);
        // One of them begins to read: it hears of the gap, and catches up.
        let mut late = slow.swap_remove(0);
        let mut at = 0;
        let mut gaps = 0;
        while at < 48 * MIB as u64 {
            let crate::raw::Heard::Text(json) = late.hear().await else { panic!("it is kept") };
            if json.starts_with(r#"{"type":"terminal:gap""#) {
                assert_eq!(number(&json, "from"), Some(at));
                at = number(&json, "to").unwrap();
                gaps += 1;
            } else if json.starts_with(r#"{"type":"terminal:output""#) {
                assert_eq!(number(&json, "offset"), Some(at));
                at += crate::raw::word(&json, "data").unwrap().len() as u64;
            }
        }
        assert!(gaps > 0);
        drop((slow, late, guest));
        stage.goes_on_alone().await;
    });
}

#[test]
fn endless_gaps() {
    alone("endless_gaps", async {
        let limits = Limits { log_bytes_per_stream: MIB, ..limits() };
        let mut stage = Stage::of(Hub::builder().limits(limits)).await;
        let mut guest = stage.running_guest("guest").await;
        let rise = Rise::begin();
        for batch in 0..2000 {
            // Reasons take turns, so that no gap joins the one before it.
            let gaps: Vec<String> = (batch * 100..batch * 100 + 100)
                .map(|n| {
                    let reason = ["evicted", "hub_loss"][n % 2];
                    format!(
                        r#"{{"type":"terminal:gap","payload":{{"stream":"{GUEST_STREAM}","from":{n},"to":{},"reason":"{reason}"}}}}"#,
                        n + 1
                    )
                })
                .collect();
            guest
                .say(&format!(
                    r#"{{"type":"batch","payload":{{"messages":[{}]}}}}"#,
                    gaps.join(",")
                ))
                .await;
        }
        guest.lives(1).await;
        rise.at_most(16 * MIB);
        drop(guest);
        stage.goes_on_alone().await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_commands_than_a_queue_holds() {
    let mut stage = Stage::new().await;
    let mut guest = stage.guest_dashboard("guest").await;
    // In two batches and one segment: none of them is stored before all are
    // there.
    let batch = |from: usize| {
        let requests: Vec<String> = (from..from + 100)
            .map(|n| {
                request(
                    &format!("r{n}"),
                    &format!("0191d4a8-5a3c-7f00-8000-0000000003{n:02x}"),
                    "absent",
                )
            })
            .collect();
        text(&format!(r#"{{"type":"batch","payload":{{"messages":[{}]}}}}"#, requests.join(",")))
    };
    guest.send(&[batch(0), batch(100)].concat()).await.unwrap();
    let (mut ok, mut full) = (0, 0);
    while ok + full < 200 {
        let crate::raw::Heard::Text(json) = guest.hear().await else { panic!("it lives") };
        match crate::raw::word(&json, "type") {
            Some("ok") => ok += 1,
            Some("error") => {
                assert_eq!(crate::raw::word(&json, "code"), Some("queue_full"), "{json}");
                full += 1;
            }
            _ => {} // the roster
        }
    }
    assert_eq!((ok, full), (100, 100));
    drop(guest);
    stage.goes_on_alone().await;
}

#[test]
fn dashboards_that_come_once() {
    alone("dashboards_that_come_once", async {
        let mut stage = Stage::new().await;
        let mut guests = 0;
        let mut come = async |stage: &mut Stage, times: usize| {
            for _ in 0..times {
                guests += 1;
                let mut guest = stage.guest_dashboard(&format!("guest-{guests}")).await;
                let asks: Vec<String> = (0..100)
                    .map(|n| format!(r#"{{"type":"system:emergency-stop","id":"s{n}","payload":{{"agents":["nobody"]}}}}"#))
                    .collect();
                guest
                    .say(&format!(
                        r#"{{"type":"batch","payload":{{"messages":[{}]}}}}"#,
                        asks.join(",")
                    ))
                    .await;
                guest.lives(guests).await;
            }
            stage.goes_on_alone().await;
        };
        // Beyond 32,768 answers the oldest are forgotten.
        come(&mut stage, 400).await;
        let rise = Rise::begin();
        come(&mut stage, 1500).await;
        rise.at_most(2 * MIB);
    });
}

#[test]
fn links_by_the_hundred_that_break_off() {
    alone("links_by_the_hundred_that_break_off", async {
        let mut stage = Stage::new().await;
        for warm in [true, false] {
            let rise = Rise::begin();
            for n in 0..300 {
                let mut guest = stage.guest_agent("guest").await;
                let cut = [head(FIN | TEXT, 1000 + n), b"{".to_vec()].concat();
                guest.send(&cut).await.unwrap();
            }
            timeout(PATIENCE, stage.goes_on_alone()).await.unwrap();
            if !warm {
                rise.at_most(2 * MIB);
            }
        }
    });
}
