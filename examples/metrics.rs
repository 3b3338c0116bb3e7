//! A program's figures, for Prometheus.

use std::error::Error;
use std::net::SocketAddr;

use metrics_exporter_prometheus::PrometheusBuilder;

/// Shows the figures of this process at `http://ADDRESS/metrics`, on a thread of
/// its own.
///
/// # Errors
///
/// When it cannot listen there, or figures are shown already.
pub fn serve(address: SocketAddr) -> Result<(), Box<dyn Error>> {
    // The listener is opened in the background: an address that cannot be had is
    // to be known now.
    drop(std::net::TcpListener::bind(address)?);
    Ok(PrometheusBuilder::new().with_http_listener(address).install()?)
}
