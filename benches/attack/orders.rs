//! Honest commands: one dashboard asks, one agent hears, again and again.

#![expect(clippy::disallowed_methods, reason = "a load keeps real time")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use trunkline_benches::load::Peer;
use trunkline_benches::measure::Histogram;
use trunkline_benches::wire::Result;

/// Less often than one subject may ask.
const EVERY: Duration = Duration::from_millis(60);

/// Commands under way, until they are ended.
pub(crate) struct Orders {
    stop: Arc<AtomicBool>,
    giving: JoinHandle<Result<Histogram>>,
}

impl Orders {
    pub(crate) fn begin(address: SocketAddr) -> Result<Self> {
        let agent = Peer::connect(
            address,
            r#"{"type":"agent:connect","payload":{"protocols":[1],"agent":"ordered",
                "instance":"0191d4a8-5a3c-7f00-8000-0000000000ab"}}"#,
        )?;
        let dashboard = Peer::connect(
            address,
            r#"{"type":"dashboard:connect","payload":{"protocols":[1],"dashboard":"ordering"}}"#,
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let giving = thread::spawn(move || give(agent, dashboard, &told));
        Ok(Self { stop, giving })
    }

    /// From each request to the agent's hearing of it.
    pub(crate) fn end(self) -> Result<Histogram> {
        self.stop.store(true, SeqCst);
        self.giving.join().map_err(|_| "giving orders panicked")?
    }
}

fn give(mut agent: Peer, mut dashboard: Peer, stop: &AtomicBool) -> Result<Histogram> {
    let mut latencies = Histogram::default();
    let begin = Instant::now();
    for n in 0_u32.. {
        if stop.load(SeqCst) {
            break;
        }
        thread::sleep((EVERY * n).saturating_sub(begin.elapsed()));
        let command = format!("0191d4a8-5a3c-7f00-9000-{n:012x}");
        let asked = Instant::now();
        dashboard.say(&format!(
            r#"{{"type":"command:request","id":"r{n}","payload":{{"command":"{command}",
                "agent":"ordered","spec":{{"run":{{"text":"go"}}}}}}}}"#
        ))?;
        agent.hear("command:execute")?;
        latencies.add(u64::try_from(asked.elapsed().as_nanos())?);
        agent.say(&format!(
            r#"{{"type":"command:complete","payload":{{"command":"{command}","attempt":1,
                "status":"completed","end":{{}}}}}}"#
        ))?;
        agent.hear("command:settled")?;
        dashboard.hear("ok")?;
    }
    Ok(latencies)
}
