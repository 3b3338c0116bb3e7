//! An axum application with a hub among its routes: one listener, and one way of
//! saying who somebody is, for its own pages and for agents and dashboards.
//!
//! ```sh
//! cargo run --example app --features axum -- --key ann:s3cret --key build-1:k3y
//! curl -H 'Authorization: Bearer s3cret' http://127.0.0.1:7080/agents
//! cargo run --example agent -- --hub ws://127.0.0.1:7080/hub --name build-1 --token k3y
//! cargo run --example dashboard -- --hub ws://127.0.0.1:7080/hub --token s3cret
//! ```
//!
//! A key belongs to somebody: an agent connects under that name, and no other.
//! Links come as WebSocket, and over plain HTTP where that does not get
//! through. ^C, or `SIGTERM`, ends it in order.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use axum::{Extension, Router};
use clap::Parser;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use trunkline_client::Dashboard;
use trunkline_client::protocol::message::Secret;
use trunkline_server::hooks::{BoxFuture, Role};
use trunkline_server::{AuthError, Authenticator, Credentials, Hub, Identity};

/// In how long a time peers are told to be back, each at a moment of its own.
const SPREAD: Duration = Duration::from_secs(2);

/// An application with a hub in it.
#[derive(Debug, Parser)]
#[command(name = "app")]
struct Args {
    /// Where to listen
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7080")]
    listen: String,
    /// Somebody and their key; may stand there several times
    #[arg(long = "key", value_name = "NAME:KEY", required = true)]
    keys: Vec<String>,
}

/// Who has which key: all that this application knows of its users. They are
/// looked up by their hash, which tells a stopwatch nothing.
#[derive(Debug, Default)]
struct Keys(HashMap<[u8; 32], String>);

impl Keys {
    fn add(&mut self, name: &str, key: &str) {
        self.0.insert(Sha256::digest(key).into(), name.to_owned());
    }

    fn whose(&self, key: &str) -> Option<&str> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        self.0.get(&hash).map(String::as_str)
    }
}

/// What the hub asks of each agent and dashboard.
impl Authenticator for Keys {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        let key = credentials.token.as_ref().map(Secret::reveal);
        let identity = match (key.and_then(|key| self.whose(key)), &credentials.role) {
            (None, _) => Err(AuthError::Unauthorized("no such key".into())),
            (Some(name), Role::Agent(agent)) if agent.as_str() != name => {
                Err(AuthError::Forbidden(format!("{name} is not {agent}")))
            }
            (Some(name), _) => "app"
                .parse()
                .map(|tenant| Identity::new(tenant, name))
                .map_err(|_| AuthError::Unavailable("no such tenant".into())),
        };
        Box::pin(std::future::ready(identity))
    }
}

/// Who asks, as far as the application is concerned.
#[derive(Debug, Clone)]
struct User(String);

/// What this application asks before its own pages.
async fn with_key(State(keys): State<Arc<Keys>>, mut request: Request, next: Next) -> Response {
    let header = request.headers().get(header::AUTHORIZATION);
    let key = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(user) = key.and_then(|key| keys.whose(key)).map(|name| User(name.to_owned())) else {
        return (StatusCode::UNAUTHORIZED, "a key is needed\n").into_response();
    };
    request.extensions_mut().insert(user);
    next.run(request).await
}

/// A page of the application that shows what the hub knows.
async fn agents(
    Extension(User(name)): Extension<User>,
    State(dashboard): State<Dashboard>,
) -> String {
    let roster = dashboard.roster().borrow().clone();
    let mut page = format!("Hello {name}, there are {} agents.\n", roster.agents().len());
    for agent in roster.agents() {
        let _ = writeln!(page, "{}: {}", agent.agent, agent.presence);
    }
    page
}

#[expect(clippy::disallowed_methods, reason = "an example is a shell")]
fn unguessable() -> u128 {
    rand::random()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    trunkline_examples::log_to_stderr("trunkline=info");
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let mut keys = Keys::default();
    for pair in &args.keys {
        let (name, key) = pair.split_once(':').ok_or("a key is given as NAME:KEY")?;
        keys.add(name, key);
    }
    // The application watches the hub itself, under a name and a key of its own
    // that never leave this process.
    let own = format!("{:032x}", unguessable());
    keys.add("the application", &own);
    let keys = Arc::new(keys);

    let hub = Hub::builder().authenticator(Arc::clone(&keys)).start().await?;
    let watched = hub.clone();
    let dial = move || std::future::ready(Ok(watched.memory()));
    let dashboard = Dashboard::over(dial).token(own).connect();

    let app = Router::new()
        .route("/agents", get(agents))
        .layer(from_fn_with_state(keys, with_key))
        .with_state(dashboard.clone())
        .route("/", get(|| async { "An application. Its hub is at /hub.\n" }))
        .nest("/hub", hub.router())
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = TcpListener::bind(&args.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", args.listen))?;
    println!("app: listening on http://{}", listener.local_addr()?);
    let listener = listener.tap_io(|socket| {
        // Small messages are gathered by the hub, and must not wait in the kernel.
        let _ = socket.set_nodelay(true);
    });
    let told = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    tokio::select! {
        served = axum::serve(listener, app) => served?,
        () = told => {}
    }
    println!("app: ending; {} links are told to be back", hub.links());
    dashboard.close().await;
    hub.drain(SPREAD).await;
    Ok(())
}
