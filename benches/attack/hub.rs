//! The hub, in a process of its own, as an application would run it.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use trunkline_benches::process;
use trunkline_benches::wire::Result;
use trunkline_server::hooks::BoxFuture;
use trunkline_server::protocol::limits::Limits;
use trunkline_server::{Anyone, AuthError, Authenticator, Credentials, Hub, Identity};

/// The token that opens nothing.
pub(crate) const WRONG_TOKEN: &str = "wrong";

/// Lets anyone in but those with the wrong token.
struct Gate;

impl Authenticator for Gate {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, std::result::Result<Identity, AuthError>> {
        if credentials.token.as_ref().is_some_and(|token| token.reveal() == WRONG_TOKEN) {
            return Box::pin(async { Err(AuthError::Unauthorized("the wrong token".into())) });
        }
        Anyone.authenticate(credentials)
    }

    fn describe(&self) -> &'static str {
        "all but one"
    }
}

/// Every limit is the default one, but for heartbeats, which the honest load
/// does not answer.
pub(crate) fn limits() -> Limits {
    let never = Duration::from_secs(24 * 3600);
    Limits {
        agent_idle: never,
        agent_timeout: never,
        dashboard_idle: never,
        dashboard_timeout: never,
        ..Limits::default()
    }
}

/// Serves until killed.
pub(crate) fn serve(workers: usize) -> Result<()> {
    process::end_with_parent();
    process::raise_file_limit();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?.port());
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(workers).enable_all().build()?.block_on(async {
        let hub = Hub::builder().limits(limits()).authenticator(Gate).start().await?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        // A task of its own: what runs in `block_on` is no worker's.
        tokio::spawn(async move { hub.serve(listener).await }).await??;
        Ok(())
    })
}
