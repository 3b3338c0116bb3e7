//! What is counted: each case makes ready, and then does one thing a number of
//! times.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use trunkline_protocol::codec::binary::OutputHeader;
use trunkline_protocol::codec::{self, Rules};
use trunkline_protocol::frame::Frame;
use trunkline_protocol::ids::{CommandId, HubInstance, QueueEpoch, StreamId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{Channel, CommandStatus, DashboardToHub};
use trunkline_protocol::stream::Log;
use trunkline_protocol::time::Now;
use trunkline_server::core::{Core, Effect, LinkId, Setup};
use trunkline_server::hooks::{Identity, WholeTenant};

/// Bytes of one piece of output.
const PIECE: usize = 256;

/// Dashboards that watch.
const DASHBOARDS: u64 = 100;

const STREAM: u128 = 0x0197_7a3e_7000_7b20_8000_0000_0000_f001;
const COMMAND: u128 = 0x0197_7a3e_6c00_7a10_8000_0000_0000_c001;

/// By how much a figure may be above the accepted one, in percent: what a compiler
/// of another day, or another layout of the program, makes of the same code.
const USUAL: u64 = 5;

/// The same for what takes little more than a hundred instructions, of which one
/// call that is inlined here and not there is many.
const ONE_CALL: u64 = 20;

/// A case: its name, how often it does its thing, by how many percent that may be
/// dearer than was accepted, and what the thing is.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) times: u64,
    pub(crate) tolerance: u64,
    pub(crate) make: fn() -> Box<dyn FnMut()>,
}

pub(crate) const CASES: &[Case] = &[
    Case { name: "encode-output", times: 1000, tolerance: ONE_CALL, make: encode_output },
    Case { name: "decode-output", times: 1000, tolerance: ONE_CALL, make: decode_output },
    Case { name: "encode-control", times: 1000, tolerance: USUAL, make: encode_control },
    Case { name: "decode-control", times: 1000, tolerance: USUAL, make: decode_control },
    Case { name: "append", times: 1000, tolerance: USUAL, make: append },
    Case { name: "fanout-one-by-one", times: 100 * DASHBOARDS, tolerance: USUAL, make: one_by_one },
    Case {
        name: "fanout-saturated",
        times: 64 * 10 * DASHBOARDS,
        tolerance: USUAL,
        make: saturated,
    },
    Case { name: "roster-delta", times: 20 * DASHBOARDS, tolerance: USUAL, make: roster_delta },
    Case { name: "command", times: 50, tolerance: USUAL, make: command },
    Case { name: "greeting", times: 50, tolerance: USUAL, make: greeting },
];

fn rules() -> Rules {
    Rules::from(&Limits::default())
}

fn stream() -> StreamId {
    StreamId::from_u128(STREAM)
}

fn output(offset: u64) -> Frame {
    let header = OutputHeader { stream: stream(), offset, channel: Channel::Pty };
    let data = [b'x'; PIECE];
    Frame::Binary(codec::binary::encode_output(&header, &data))
}

fn encode_output() -> Box<dyn FnMut()> {
    Box::new(|| {
        for n in 0..1000 {
            black_box(output(black_box(n * PIECE as u64)));
        }
    })
}

fn decode_output() -> Box<dyn FnMut()> {
    let Frame::Binary(frame) = output(4711) else { unreachable!("it is binary") };
    Box::new(move || {
        for _ in 0..1000 {
            black_box(codec::decode_output(black_box(&frame), rules())).expect("it is one");
        }
    })
}

fn request(number: u128) -> String {
    let id = CommandId::from_u128(number);
    format!(
        r#"{{"type":"command:request","id":"r{number}","payload":{{"command":"{id}","agent":"build-1","spec":{{"run":{{"argv":["cargo","test","--workspace"]}},"cwd":"/srv/app","env":{{"CI":"1"}}}},"priority":"normal"}}}}"#
    )
}

fn text(text: impl Into<Bytes>) -> Frame {
    Frame::Text(text.into())
}

fn decode_control() -> Box<dyn FnMut()> {
    let frame = text(request(7));
    Box::new(move || {
        for _ in 0..1000 {
            let messages = codec::decode::<DashboardToHub>(black_box(&frame), rules());
            assert!(black_box(messages)[0].is_ok(), "it is one");
        }
    })
}

fn encode_control() -> Box<dyn FnMut()> {
    let mut messages = codec::decode::<DashboardToHub>(&text(request(7)), rules());
    let envelope = messages.pop().expect("it is one").expect("it is one");
    Box::new(move || {
        for _ in 0..1000 {
            black_box(codec::encode(black_box(&envelope)));
        }
    })
}

fn append() -> Box<dyn FnMut()> {
    let mut log = Log::new(stream());
    let data = [b'x'; PIECE];
    Box::new(move || {
        for _ in 0..1000 {
            let offset = log.end();
            black_box(log.append(offset, Channel::Pty, black_box(&data))).expect("it follows");
            log.evict_to(64 * 1024);
        }
    })
}

/// A hub with an agent and any number of dashboards, without sockets.
struct Stage {
    core: Core,
    now: Now,
    woken: Vec<LinkId>,
    out: Vec<Frame>,
    links: u64,
}

const AGENT: LinkId = LinkId(1);

impl Stage {
    fn new() -> Self {
        let limits = Limits {
            grant_bytes: 1 << 30,
            terminal_bytes_per_second: 1 << 40,
            ..Limits::default()
        };
        let now = Now { monotonic: Duration::from_secs(1), wall_ms: 1_764_000_000_000 };
        let setup = Setup {
            limits,
            policy: Arc::new(WholeTenant),
            hub: HubInstance::from_u128(1),
            epoch: QueueEpoch::from_u128(1),
            seed: [7; 32],
            stored: Vec::new(),
            streams: None,
        };
        let core = Core::new(setup, now);
        let mut stage = Self { core, now, woken: Vec::new(), out: Vec::new(), links: 0 };
        let greeting = r#"{"type":"agent:connect","payload":{"protocols":[1],"agent":"build-1","instance":"01977a3e-6400-7f00-8000-00000000a001","slots":64,"features":["binary","batch"]}}"#;
        assert_eq!(stage.greets(greeting), AGENT);
        stage
    }

    fn with_dashboards() -> Self {
        let mut stage = Self::new();
        for _ in 0..DASHBOARDS {
            stage.greets(
                r#"{"type":"dashboard:connect","payload":{"protocols":[1],"features":["binary","batch"]}}"#,
            );
        }
        stage
    }

    fn greets(&mut self, greeting: &'static str) -> LinkId {
        self.links += 1;
        let link = LinkId(self.links);
        self.core.handle_arrived(link, None, self.now);
        self.core.handle_opened(link, None, None, self.now);
        self.says(link, &text(greeting));
        link
    }

    /// A frame arrives, and what comes of it goes out.
    fn says(&mut self, link: LinkId, frame: &Frame) {
        // So that nobody is too fast.
        self.now.monotonic += Duration::from_millis(1);
        self.core.handle_frame(link, frame, self.now);
        self.settles();
    }

    fn settles(&mut self) {
        loop {
            while let Some(effect) = self.core.poll_effect() {
                match effect {
                    Effect::Wake(link) => self.woken.push(link),
                    Effect::Authenticate { link, .. } => {
                        let subject = format!("s{}", link.0);
                        let identity = Identity::new("acme".parse().expect("a name"), subject);
                        self.core.handle_authenticated(link, Ok(identity), self.now);
                    }
                    Effect::Store { tenant, command, .. } => {
                        self.core.handle_stored(&tenant, command, &Ok(()), self.now);
                    }
                    Effect::Forget(_)
                    | Effect::Keep(_)
                    | Effect::TakeLogs(_)
                    | Effect::Observe(_) => {}
                }
            }
            if self.woken.is_empty() {
                return;
            }
            for link in std::mem::take(&mut self.woken) {
                while self.core.transmit(link, self.now, &mut self.out, 64 * 1024) {
                    black_box(&self.out);
                    self.out.clear();
                }
                black_box(&self.out);
                self.out.clear();
            }
        }
    }

    /// A command runs, and everyone watches.
    fn is_watched(&mut self) {
        let dashboard = LinkId(2);
        self.says(dashboard, &text(request(COMMAND)));
        let (command, stream) = (CommandId::from_u128(COMMAND), stream());
        let started = format!(
            r#"{{"type":"command:started","payload":{{"command":"{command}","attempt":1,"stream":"{stream}"}}}}"#
        );
        self.says(AGENT, &text(started));
        for link in 2..2 + DASHBOARDS {
            let subscribe = format!(
                r#"{{"type":"subscribe","id":"s","payload":{{"terminals":[{{"command":"{command}","from":"start"}}]}}}}"#
            );
            self.says(LinkId(link), &text(subscribe));
        }
        self.says(AGENT, &output(0));
        assert_eq!(self.core.stats(self.now).counts.sent["terminal:output"].count, DASHBOARDS);
    }
}

fn one_by_one() -> Box<dyn FnMut()> {
    let mut stage = Stage::with_dashboards();
    stage.is_watched();
    let frames: Vec<Frame> = (1..=100).map(|n| output(n * PIECE as u64)).collect();
    Box::new(move || {
        for frame in &frames {
            stage.says(AGENT, frame);
        }
        let sent = &stage.core.stats(stage.now).counts.sent["terminal:output"];
        assert_eq!(sent.count, 101 * DASHBOARDS, "each got each");
    })
}

fn saturated() -> Box<dyn FnMut()> {
    let mut stage = Stage::with_dashboards();
    stage.is_watched();
    let frames: Vec<Frame> = (1..=640).map(|n| output(n * PIECE as u64)).collect();
    Box::new(move || {
        for burst in frames.chunks(64) {
            for frame in burst {
                stage.core.handle_frame(AGENT, frame, stage.now);
            }
            stage.settles();
        }
        let sent = &stage.core.stats(stage.now).counts.sent["terminal:output"];
        assert!(sent.bytes > (641 * PIECE) as u64 * DASHBOARDS, "each got all of it");
    })
}

fn roster_delta() -> Box<dyn FnMut()> {
    let mut stage = Stage::with_dashboards();
    stage.is_watched();
    let reports: Vec<Frame> = (0..20)
        .map(|n| {
            text(format!(r#"{{"type":"agent:status","payload":{{"figures":{{"cpu":{n}}}}}}}"#))
        })
        .collect();
    Box::new(move || {
        let before = stage.core.stats(stage.now).counts.sent["roster"].count;
        for report in &reports {
            stage.says(AGENT, report);
        }
        let after = stage.core.stats(stage.now).counts.sent["roster"].count;
        assert_eq!(after - before, 20 * DASHBOARDS, "each got each");
    })
}

/// From the request to the end that is stored, as one dashboard sees it.
fn command() -> Box<dyn FnMut()> {
    let mut stage = Stage::new();
    let dashboard = stage.greets(
        r#"{"type":"dashboard:connect","payload":{"protocols":[1],"features":["binary","batch"]}}"#,
    );
    let talks: Vec<[Frame; 3]> = (1..=50)
        .map(|n| {
            let (command, stream) = (CommandId::from_u128(n), StreamId::from_u128(n));
            let started = format!(
                r#"{{"type":"command:started","payload":{{"command":"{command}","attempt":1,"stream":"{stream}"}}}}"#
            );
            let complete = format!(
                r#"{{"type":"command:complete","payload":{{"command":"{command}","attempt":1,"status":"completed","end":{{"exit_code":0,"end":0}}}}}}"#
            );
            [text(request(n)), text(started), text(complete)]
        })
        .collect();
    Box::new(move || {
        for [request, started, complete] in &talks {
            stage.now.monotonic += Duration::from_millis(100);
            stage.says(dashboard, request);
            stage.says(AGENT, started);
            stage.says(AGENT, complete);
        }
        let ended = &stage.core.stats(stage.now).counts.commands_ended;
        assert_eq!(ended[CommandStatus::Completed.as_str()], 50);
    })
}

fn greeting() -> Box<dyn FnMut()> {
    let mut stage = Stage::with_dashboards();
    Box::new(move || {
        for _ in 0..50 {
            stage.greets(
                r#"{"type":"dashboard:connect","payload":{"protocols":[1],"features":["binary","batch"]}}"#,
            );
        }
        assert_eq!(stage.core.links() as u64, 151);
    })
}
