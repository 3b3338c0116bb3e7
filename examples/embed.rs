//! The smallest program with everything in it: a hub, an agent and a dashboard
//! in one process, over the in-memory transport. Nothing listens anywhere.
//!
//! ```sh
//! cargo run --example embed
//! ```

use std::error::Error;
use std::io::Write as _;

use trunkline_client::protocol::stream::TerminalFilter;
use trunkline_client::{Agent, Dashboard, Programs, Request, TerminalEvent};
use trunkline_server::Hub;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let hub = Hub::builder().start().await?;

    let for_agent = hub.clone();
    let dial = move || std::future::ready(Ok(for_agent.memory()));
    let agent = Agent::over(dial, "build-1")?.connect(Programs::new());

    let for_dashboard = hub.clone();
    let dial = move || std::future::ready(Ok(for_dashboard.memory()));
    let dashboard = Dashboard::over(dial).connect();

    let request = Request::shell("echo hello from $$; sleep 0.2; echo goodbye").terminal(80, 24);
    let command = dashboard.run("build-1", request).await?;

    let mut terminal = command.terminal();
    // What a command writes goes to a terminal that is not its own.
    let (mut filter, mut shown) = (TerminalFilter::new(), Vec::new());
    while let Some(event) = terminal.next().await {
        match event {
            TerminalEvent::Opened { .. } => {}
            TerminalEvent::Output { data, .. } => {
                filter.feed(&data, &mut shown);
                std::io::stdout().write_all(&shown)?;
                shown.clear();
            }
            TerminalEvent::Ended { state, audit, .. } => {
                println!("-- {}; every byte is here: {audit:?}", state.status);
            }
            other => println!("-- {other:?}"),
        }
    }

    agent.stop().await;
    dashboard.close().await;
    Ok(())
}
