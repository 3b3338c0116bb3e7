//! TLS for the example hub: a certificate and its key, from PEM files.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{Error as RustlsError, ServerConfig};

/// What makes TLS of connections, by the chain of certificates in one file, the
/// hub's own first, and the private key in another.
///
/// # Errors
///
/// When a file cannot be read, has not what it should have, or the key is
/// another certificate's; each names the file.
pub fn acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, Box<dyn Error>> {
    let shown = cert.display();
    let chain = CertificateDer::pem_slice_iter(&read(cert)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("{shown}: {error}"))?;
    if chain.is_empty() {
        return Err(format!("{shown}: there is no certificate in it").into());
    }
    let shown_key = key.display();
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| match error {
        PemError::NoItemsFound => format!("{shown_key}: there is no private key in it"),
        // What it says quotes nothing of the file.
        error => format!("{shown_key}: {error}"),
    })?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| match error {
            RustlsError::InconsistentKeys(_) => {
                format!("{shown_key}: the key is not that of the certificate in {shown}")
            }
            error => format!("{shown}, {shown_key}: {error}"),
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))
}
