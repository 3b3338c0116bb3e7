//! The hub among the routes of an axum application.

use std::net::SocketAddr;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::ExtensionRejection;
use axum::extract::{ConnectInfo, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;

use crate::Hub;

/// What is answered when nobody says who connects.
const NO_CONNECT_INFO: &str = "the hub does not know who connects: serve the application with \
                               `into_make_service_with_connect_info::<SocketAddr>()`";

pub(crate) fn router<S>(hub: Hub) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    let answer = async move |peer: Result<ConnectInfo<SocketAddr>, ExtensionRejection>,
                             request: Request|
                -> Response {
        let Ok(ConnectInfo(peer)) = peer else {
            tracing::error!(target: "trunkline::hub", "{NO_CONNECT_INFO}");
            return (StatusCode::INTERNAL_SERVER_ERROR, NO_CONNECT_INFO).into_response();
        };
        hub.answer(request, peer.ip()).await.map(Body::from)
    };
    Router::new().route("/", any(answer))
}
