//! An authority of the test's own: it signs whatever it is asked to.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;
use trunkline_examples::tls::acceptor;

pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub(crate) pem: String,
}

/// A certificate and its key, in files.
pub(crate) struct Signed {
    folder: TempDir,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// For a host by this name or address.
    pub(crate) fn signs(&self, host: &str) -> Signed {
        self.signs_params(&CertificateParams::new([host.to_owned()]).unwrap())
    }

    /// One that has expired.
    pub(crate) fn signed_long_ago(&self, host: &str) -> Signed {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.signs_params(&params)
    }

    /// One for later.
    pub(crate) fn signs_ahead(&self, host: &str) -> Signed {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.not_before = date_time_ymd(3000, 1, 1);
        params.not_after = date_time_ymd(3001, 1, 1);
        self.signs_params(&params)
    }

    fn signs_params(&self, params: &CertificateParams) -> Signed {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let signed = Signed { folder: tempfile::tempdir().unwrap() };
        std::fs::write(signed.cert(), certificate.pem()).unwrap();
        std::fs::write(signed.key(), key.serialize_pem()).unwrap();
        signed
    }
}

impl Signed {
    pub(crate) fn cert(&self) -> Box<Path> {
        self.folder.path().join("cert.pem").into()
    }

    pub(crate) fn key(&self) -> Box<Path> {
        self.folder.path().join("key.pem").into()
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        acceptor(&self.cert(), &self.key()).unwrap()
    }
}
