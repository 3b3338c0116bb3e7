//! TLS below the WebSocket: whom to trust, and one handshake.
//!
//! Everything that rustls would otherwise take from the process is chosen
//! here: the cryptography (aws-lc-rs), the versions (1.2 and 1.3), the protocol
//! above (HTTP/1.1).

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error as RustlsError, RootCertStore};

use super::websocket::UrlError;

/// Why a [`WebSocket`](crate::WebSocket) cannot be told whom to trust. Feature
/// `tls`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The URL is `ws://`: there is nobody to trust, and nothing to protect what
    /// is sent.
    #[error("the URL is ws://, without TLS; to trust somebody takes wss://")]
    Plain,
    /// The text is not PEM.
    #[error("not PEM: {0}")]
    Pem(String),
    /// There is no certificate among what the PEM has.
    #[error("no certificate in it")]
    NoCertificate,
    /// One of the certificates cannot be a root.
    #[error("certificate {number} cannot be a root: {why}")]
    Certificate {
        /// Which one, the first being 1.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
}

/// Why there is no TLS with a hub. Travels inside the [`io::Error`] of a dial;
/// agents and dashboards show it as the reason of
/// [`ConnectionState::Reconnecting`](crate::ConnectionState), and try again.
/// Feature `tls`.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The hub's certificate does not prove that it is the hub of the URL.
    #[error("certificate not accepted: {} ({host})", in_words(why))]
    Certificate {
        /// The host of the URL.
        host: String,
        /// What is wrong with the certificate.
        why: CertificateError,
    },
    /// There was no agreement on how to speak, or the peer speaks something else.
    #[error("no TLS: {} ({host})", without_agreement(why))]
    Handshake {
        /// The host of the URL.
        host: String,
        /// What came instead.
        why: RustlsError,
    },
    /// No root certificates were found on this machine, so that no hub could
    /// be believed.
    #[error("no root certificates on this machine: install them, or give your own ({host})")]
    NoRoots {
        /// The host of the URL.
        host: String,
    },
}

/// The end of a dial is a line of at most 123 bytes (the reason of a close), in
/// which a host must fit, too.
fn in_words(why: &CertificateError) -> String {
    use CertificateError as E;
    let words = match why {
        E::UnknownIssuer => "signed by nobody who is trusted here",
        E::Expired | E::ExpiredContext { .. } => "it has expired",
        E::NotValidYet | E::NotValidYetContext { .. } => "it is not valid yet",
        E::NotValidForName | E::NotValidForNameContext { .. } => "it is for another name",
        E::Revoked => "it was revoked",
        E::BadSignature => "its signature is wrong",
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => "it is not for a server",
        // The rest, of which there may be more: for experts, in their words.
        other => return other.to_string(),
    };
    words.to_owned()
}

fn without_agreement(why: &RustlsError) -> String {
    match why {
        RustlsError::InvalidMessage(_) => "the hub answers in something else".to_owned(),
        // The rest, of which there may be more: for experts, in their words.
        other => other.to_string(),
    }
}

/// With whom TLS is spoken, and why that is believed.
#[derive(Clone)]
pub(super) struct Tls {
    name: ServerName<'static>,
    trust: Trust,
}

#[derive(Clone)]
enum Trust {
    /// The platform's roots, once they have been read.
    Platform(Arc<OnceLock<Arc<ClientConfig>>>),
    Given(Arc<ClientConfig>),
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trust = match self.trust {
            Trust::Platform(_) => "the platform's roots",
            Trust::Given(_) => "as given",
        };
        f.debug_struct("Tls").field("name", &self.name).field("trust", &trust).finish()
    }
}

impl Tls {
    /// TLS with this host of a URL, by the platform's roots.
    pub(super) fn with(host: &str) -> Result<Self, UrlError> {
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let name = ServerName::try_from(address.unwrap_or(host).to_owned());
        let name = name.map_err(|_| UrlError::Host)?;
        Ok(Self { name, trust: Trust::Platform(Arc::default()) })
    }

    pub(super) fn trust_pem(&mut self, pem: &[u8]) -> Result<(), TrustError> {
        self.trust = Trust::Given(Arc::new(config(roots(pem)?)));
        Ok(())
    }

    pub(super) fn trust_config(&mut self, config: &ClientConfig) {
        let mut config = config.clone();
        config.alpn_protocols = protocols();
        self.trust = Trust::Given(Arc::new(config));
    }

    /// Shakes hands. When this succeeds the peer is who the URL says; nothing
    /// but the handshake was sent before.
    pub(super) async fn connect(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.config().await?;
        let connecting = TlsConnector::from(config).connect(self.name.clone(), socket);
        connecting.await.map_err(|error| self.sort(error))
    }

    async fn config(&self) -> io::Result<Arc<ClientConfig>> {
        let known = match &self.trust {
            Trust::Given(config) => return Ok(Arc::clone(config)),
            Trust::Platform(known) => known,
        };
        if let Some(config) = known.get() {
            return Ok(Arc::clone(config));
        }
        // Some hundred files, or a system service: not for a thread that others
        // wait for.
        let roots = tokio::task::spawn_blocking(platform_roots).await?;
        if roots.is_empty() {
            return Err(io::Error::other(TlsError::NoRoots { host: self.host() }));
        }
        Ok(Arc::clone(known.get_or_init(|| Arc::new(config(roots)))))
    }

    fn host(&self) -> String {
        self.name.to_str().into_owned()
    }

    /// Names what rustls found; other errors are the socket's.
    fn sort(&self, error: io::Error) -> io::Error {
        let host = self.host();
        match error.get_ref().and_then(|inner| inner.downcast_ref::<RustlsError>()) {
            None => error,
            Some(RustlsError::InvalidCertificate(why)) => {
                io::Error::other(TlsError::Certificate { host, why: why.clone() })
            }
            Some(why) => io::Error::other(TlsError::Handshake { host, why: why.clone() }),
        }
    }
}

fn protocols() -> Vec<Vec<u8>> {
    vec![b"http/1.1".to_vec()]
}

fn config(roots: RootCertStore) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .expect("aws-lc-rs has cipher suites for both versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols();
    config
}

/// What the platform trusts, as far as it can be read. Blocks.
fn platform_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(target: "trunkline::client", %error, "a root certificate cannot be read");
    }
    let mut roots = RootCertStore::empty();
    // Old roots in forms that nobody accepts any more are common.
    roots.add_parsable_certificates(found.certs);
    roots
}

/// The certificates of a PEM file, each of which must do.
fn roots(pem: &[u8]) -> Result<RootCertStore, TrustError> {
    let mut roots = RootCertStore::empty();
    for (number, certificate) in (1..).zip(CertificateDer::pem_slice_iter(pem)) {
        let certificate = match certificate {
            Ok(certificate) => certificate,
            Err(PemError::NoItemsFound) => break,
            Err(error) => return Err(TrustError::Pem(error.to_string())),
        };
        roots
            .add(certificate)
            .map_err(|error| TrustError::Certificate { number, why: error.to_string() })?;
    }
    if roots.is_empty() { Err(TrustError::NoCertificate) } else { Ok(roots) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_that_are_none_are_refused_with_the_reason() {
        let torn = b"-----BEGIN CERTIFICATE-----\nMAA=\n";
        let hollow = b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        let a_key = b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
        assert_eq!(roots(b"").err(), Some(TrustError::NoCertificate));
        assert_eq!(roots(b"no PEM at all").err(), Some(TrustError::NoCertificate));
        assert_eq!(roots(a_key).err(), Some(TrustError::NoCertificate));
        assert!(matches!(roots(torn), Err(TrustError::Pem(_))), "{:?}", roots(torn));
        assert!(matches!(roots(hollow), Err(TrustError::Certificate { number: 1, .. })));
    }

    #[test]
    fn reading_the_platforms_roots_does_not_panic() {
        // How many there are depends on where this runs.
        platform_roots();
    }

    #[test]
    fn what_went_wrong_fits_into_the_reason_of_a_close() {
        let host = "hub.some-quite-long-department.some-company.example";
        for why in [
            CertificateError::UnknownIssuer,
            CertificateError::Expired,
            CertificateError::NotValidForName,
        ] {
            let said = TlsError::Certificate { host: host.to_owned(), why }.to_string();
            assert!(said.len() <= 123, "{said}");
        }
        let said = TlsError::NoRoots { host: host.to_owned() }.to_string();
        assert!(said.len() <= 123, "{said}");
    }
}
