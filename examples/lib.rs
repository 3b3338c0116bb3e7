//! What the examples share: a clock, a log, and words for people.

#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(feature = "tls")]
pub mod tls;

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::Subscriber;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};
use trunkline_client::protocol::frame::Close;
use trunkline_client::protocol::ids::CommandId;
use trunkline_client::protocol::message::{CommandState, CommandStatus};
use trunkline_client::protocol::one_line::OneLine;
use trunkline_client::{ConnectionState, Connector, WebSocket};

/// The present moment. An example is a shell, and this is its one clock.
#[expect(clippy::disallowed_methods, reason = "the one place where the examples read the clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Waits, for what only time brings: an outage that is to last a while.
pub async fn pause(time: Duration) {
    sleep_until(now() + time).await;
}

/// Sends the libraries' log to standard error: what `RUST_LOG` asks for
/// (`RUST_LOG=trunkline=debug`), otherwise `default`.
pub fn log_to_stderr(default: &str) {
    tracing_subscriber::registry().with(to_stderr(default)).init();
}

/// The same, and what is to be forwarded to the hub: records of at least `INFO`,
/// those of `trunkline` itself left out.
#[cfg(feature = "logs")]
pub fn log_to_stderr_and_hub(default: &str) -> trunkline_client::logs::Logs {
    let (layer, logs) = trunkline_client::logs::forward(trunkline_client::logs::Options::default());
    tracing_subscriber::registry().with(to_stderr(default)).with(layer).init();
    logs
}

fn to_stderr<S>(default: &str) -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_filter(filter)
}

/// The way to the hub at `url`, whose certificate is to be signed by one of
/// those in the file `ca`, or by one that the platform trusts. With feature
/// `polling` over plain HTTP where no WebSocket gets through.
///
/// # Errors
///
/// When the URL is not one, or the file has no such certificates.
pub fn connector(url: &str, ca: Option<&Path>) -> Result<impl Connector, Box<dyn Error>> {
    let hub = WebSocket::new(url).map_err(|error| format!("{}: {error}", without_secrets(url)))?;
    let hub = match ca {
        Some(file) => trusting(hub, file)?,
        None => hub,
    };
    #[cfg(feature = "polling")]
    let hub = trunkline_client::Reaching::from(hub);
    Ok(hub)
}

#[cfg(feature = "tls")]
fn trusting(hub: WebSocket, ca: &Path) -> Result<WebSocket, Box<dyn Error>> {
    let pem = std::fs::read(ca).map_err(|error| format!("{}: {error}", ca.display()))?;
    Ok(hub.roots_pem(&pem).map_err(|error| format!("{}: {error}", ca.display()))?)
}

#[cfg(not(feature = "tls"))]
fn trusting(_: WebSocket, ca: &Path) -> Result<WebSocket, Box<dyn Error>> {
    Err(format!("{}: needs TLS, which is in the feature `tls`", ca.display()).into())
}

/// Text from elsewhere, safe to print: a title or an error must not move the
/// cursor, and must not read in another direction than it is written.
pub fn printable(text: &str) -> String {
    OneLine(text).to_string()
}

/// A URL without what may be a secret in it: who logs in, and its query.
pub fn without_secrets(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    match bare.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            printable(&format!("{scheme}://{host}{path}"))
        }
        None => printable(bare),
    }
}

/// The end of a command's id, where its randomness is: enough for people.
pub fn short(command: CommandId) -> String {
    let id = command.to_string();
    id[id.len() - 8..].to_owned() // a UUID is 36 ASCII characters
}

/// How far a command is, or how it ended, in a few words.
pub fn in_words(state: &CommandState) -> String {
    let end = state.end.as_ref();
    match (state.status, end.and_then(|e| e.exit_code), end.and_then(|e| e.signal)) {
        (CommandStatus::Completed, Some(0), _) => "completed".to_owned(),
        (status, Some(code), _) => format!("{status}, exit code {code}"),
        (status, None, Some(signal)) => format!("{status}, by signal {signal}"),
        (status, None, None) => match end.and_then(|e| e.error.as_deref()) {
            Some(error) => format!("{status}: {}", printable(error)),
            None => status.to_string(),
        },
    }
}

/// How a connection is, in a few words.
pub fn connection_in_words(state: &ConnectionState) -> String {
    match state {
        ConnectionState::Connecting => "connecting".to_owned(),
        ConnectionState::Connected => "connected".to_owned(),
        ConnectionState::Reconnecting { attempt, why, .. } => {
            format!("no link ({}); dialling again, attempt {attempt}", why_in_words(why))
        }
        ConnectionState::Disconnected { why } => format!("disconnected: {}", why_in_words(why)),
    }
}

fn why_in_words(why: &Close) -> String {
    if why.reason.is_empty() {
        why.code.to_string()
    } else {
        format!("{}: {}", why.code, printable(&why.reason))
    }
}

/// A number of bytes, to three digits.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn bytes_in_words(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_shows_no_secret_and_moves_no_cursor() {
        for (url, shown) in [
            ("wss://hub.example:7070/a?access_token=secret", "wss://hub.example:7070/a"),
            ("ws://ann:secret@hub.example", "ws://hub.example"),
            ("ws://a@b:secret@hub.example/x@y", "ws://hub.example/x@y"),
            ("ws://[::1]:7070#secret", "ws://[::1]:7070"),
            ("hub.example?secret", "hub.example"),
        ] {
            assert_eq!(without_secrets(url), shown);
        }
        assert_eq!(printable("a\u{1b}[2J\r\n\u{202e}b"), r"a\u{1b}[2J\r\n\u{202e}b");
    }
}
