//! Keys to check signatures with, and where they come from.

use std::fmt;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{
    AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse,
};
use jsonwebtoken::{Algorithm, DecodingKey};
use tokio::sync::watch;
use tokio::time::Instant;

use super::JwtSetupError;
use crate::hooks::AuthError;

/// Longest key set that is read.
const SET_BYTES_MAX: usize = 256 * 1024;

/// Keys of a set that are used.
const KEYS_MAX: usize = 64;

/// How long one request for a set may take: less than a greeting.
const TIMEOUT: Duration = Duration::from_secs(3);

/// After this long a set is read again.
const MAX_AGE: Duration = Duration::from_secs(600);

/// After this long a set that could not be read again is given up.
const MAX_STALE: Duration = Duration::from_secs(24 * 3600);

/// A set is not asked for more often.
const PAUSE: Duration = Duration::from_secs(10);

/// A key, and the one algorithm that it is for.
#[derive(Clone)]
pub(super) struct Key {
    id: Option<String>,
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

impl Key {
    pub(super) fn secret(secret: &[u8]) -> Self {
        let decoding = DecodingKey::from_secret(secret);
        Self { id: None, algorithm: Algorithm::HS256, decoding }
    }

    /// A key of a set, if it is one that may be used here.
    fn of_set(jwk: &Jwk) -> Option<Self> {
        let is_for_signatures = match (&jwk.common.public_key_use, &jwk.common.key_operations) {
            (Some(PublicKeyUse::Signature), _) | (None, None) => true,
            (None, Some(operations)) => operations.contains(&KeyOperations::Verify),
            (Some(_), _) => false,
        };
        let (algorithm, name) = match &jwk.algorithm {
            AlgorithmParameters::RSA(rsa) if rsa_bits(&rsa.n) >= 2048 => {
                (Algorithm::RS256, KeyAlgorithm::RS256)
            }
            AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
                (Algorithm::ES256, KeyAlgorithm::ES256)
            }
            AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
            }
            _ => return None, // among them secrets, which are none in a set that anybody can read
        };
        if !is_for_signatures || jwk.common.key_algorithm.is_some_and(|said| said != name) {
            return None;
        }
        let decoding = DecodingKey::from_jwk(jwk).ok()?;
        Some(Self { id: jwk.common.key_id.clone(), algorithm, decoding })
    }
}

fn rsa_bits(modulus: &str) -> usize {
    let bytes = URL_SAFE_NO_PAD.decode(modulus).unwrap_or_default();
    let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    let top = bytes.get(first).map_or(0, |byte| byte.leading_zeros() as usize);
    (bytes.len() - first) * 8 - top
}

/// The key that a token names. One that names none is checked with the only
/// key, if there is but one.
pub(super) fn find<'a>(keys: &'a [Key], id: Option<&str>) -> Option<&'a Key> {
    match (id, keys) {
        // A secret has no name; what a token calls it says nothing.
        (_, [only]) if only.id.is_none() => Some(only),
        (None, [only]) => Some(only),
        (Some(id), keys) => keys.iter().find(|key| key.id.as_deref() == Some(id)),
        (None, _) => None,
    }
}

/// The keys of a set, without those that are of no use here.
fn parse(bytes: &[u8]) -> Result<Vec<Key>, String> {
    #[derive(serde::Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(bytes).map_err(|_| "not a JSON Web Key Set")?;
    let known = set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok());
    let keys: Vec<Key> = known.filter_map(|jwk: Jwk| Key::of_set(&jwk)).take(KEYS_MAX).collect();
    if keys.is_empty() {
        // All of them may have been withdrawn.
        tracing::warn!(target: "trunkline::hub", "the issuer's set has no key for RS256, ES256 or EdDSA");
    }
    Ok(keys)
}

/// Where a set is read from; may block.
pub(super) type Loader = Box<dyn Fn() -> Result<Vec<u8>, String> + Send + Sync>;

pub(super) fn from_file(path: PathBuf) -> Loader {
    Box::new(move || {
        let file = std::fs::File::open(&path).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        let read = file.take(SET_BYTES_MAX as u64 + 1).read_to_end(&mut bytes);
        read.map_err(|error| error.to_string())?;
        if bytes.len() > SET_BYTES_MAX { Err("too long".into()) } else { Ok(bytes) }
    })
}

pub(super) fn from_url(url: &str) -> Result<Loader, JwtSetupError> {
    let uri: ureq::http::Uri = url.parse().map_err(|_| JwtSetupError::InsecureUrl)?;
    let host = uri.host().unwrap_or_default();
    let is_https = match uri.scheme_str() {
        Some("https") if !host.is_empty() => true,
        Some("http") if matches!(host, "localhost" | "127.0.0.1" | "[::1]") => false,
        _ => return Err(JwtSetupError::InsecureUrl),
    };
    let mut config = ureq::Agent::config_builder()
        .https_only(is_https)
        .max_redirects(0)
        .max_response_header_size(16 * 1024)
        .timeout_global(Some(TIMEOUT));
    if is_https {
        let roots = rustls_native_certs::load_native_certs();
        if roots.certs.is_empty() {
            let errors = roots.errors.iter().map(ToString::to_string).collect::<Vec<_>>();
            return Err(JwtSetupError::NoRoots(errors.join("; ")));
        }
        let root = |der: &rustls::pki_types::CertificateDer<'_>| {
            ureq::tls::Certificate::from_der(der.as_ref()).to_owned()
        };
        let tls = ureq::tls::TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(
                rustls::crypto::aws_lc_rs::default_provider(),
            ))
            .root_certs(roots.certs.iter().map(root).into());
        config = config.tls_config(tls.build());
    } else {
        // A proxy is another machine, and could answer what it likes.
        config = config.proxy(None);
    }
    let agent = config.build().new_agent();
    let url = url.to_owned();
    Ok(Box::new(move || {
        let mut response = agent.get(&url).call().map_err(|error| error.to_string())?;
        if response.status() != 200 {
            return Err(format!("HTTP status {}", response.status().as_u16()));
        }
        let body = response.body_mut().with_config().limit(SET_BYTES_MAX as u64);
        body.read_to_vec().map_err(|error| error.to_string())
    }))
}

/// All keys, or where they are from.
#[derive(Debug)]
pub(super) enum Keys {
    Fixed(Arc<Vec<Key>>),
    Set(Arc<KeySet>),
}

impl Keys {
    /// The keys, among which is one of this name if there is any.
    pub(super) async fn with(&self, id: Option<&str>) -> Result<Arc<Vec<Key>>, AuthError> {
        match self {
            Self::Fixed(keys) => Ok(Arc::clone(keys)),
            Self::Set(set) => set.with(id).await,
        }
    }
}

/// A set that is read again now and then.
pub(super) struct KeySet {
    loader: Loader,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last good ones, and since when.
    keys: Option<(Arc<Vec<Key>>, Instant)>,
    /// When they were last asked for.
    asked: Option<Instant>,
    /// Ends when what is asked for is there, or is not to be had.
    asking: Option<watch::Receiver<()>>,
    /// Whether what was last asked for was not to be had.
    failed: bool,
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySet").finish_non_exhaustive()
    }
}

#[expect(clippy::disallowed_methods, reason = "a cache has an age")]
fn now() -> Instant {
    Instant::now()
}

impl KeySet {
    pub(super) fn new(loader: Loader) -> Self {
        Self { loader, state: Mutex::default() }
    }

    async fn with(self: &Arc<Self>, id: Option<&str>) -> Result<Arc<Vec<Key>>, AuthError> {
        if let Some(mut asking) = self.look(id) {
            // Whoever asks, all wait for the same; it goes on without any.
            let _ = asking.changed().await;
        }
        let state = self.lock();
        match &state.keys {
            // Only whoever has been asked can say that there is no such key.
            Some((keys, _)) if state.failed && find(keys, id).is_none() => {
                Err(AuthError::Unavailable("a new key of the issuer is not to be had".into()))
            }
            Some((keys, since)) if now() < *since + MAX_STALE => Ok(Arc::clone(keys)),
            _ => Err(AuthError::Unavailable("the issuer's keys are not to be had".into())),
        }
    }

    /// Starts to read the set if that is due. Returns what to wait for if there
    /// is nothing to go on with.
    fn look(self: &Arc<Self>, id: Option<&str>) -> Option<watch::Receiver<()>> {
        let now = now();
        let mut state = self.lock();
        let (mut is_known, mut is_old) = (false, true);
        if let Some((keys, since)) = &state.keys {
            is_known = find(keys, id).is_some() && now < *since + MAX_STALE;
            is_old = now >= *since + MAX_AGE;
        }
        let may_ask = state.asked.is_none_or(|asked| now >= asked + PAUSE);
        // One that panicked, or went with its runtime, is closed, and still there.
        let is_asking = state.asking.as_ref().is_some_and(|asking| asking.has_changed().is_ok());
        if (!is_known || is_old) && may_ask && !is_asking {
            state.asked = Some(now);
            state.asking = Some(self.ask());
        }
        if is_known && !is_old { None } else { state.asking.clone() }
    }

    /// Reads the set, whatever becomes of who asked for it.
    fn ask(self: &Arc<Self>) -> watch::Receiver<()> {
        let (done, asking) = watch::channel(());
        let set = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            // Also if the loader panics: who waits is told by the drop.
            let _done = done;
            let loaded = (set.loader)().and_then(|bytes| parse(&bytes));
            let mut state = set.lock();
            state.failed = loaded.is_err();
            match loaded {
                Ok(keys) => {
                    tracing::debug!(target: "trunkline::hub", keys = keys.len(), "key set read");
                    state.keys = Some((Arc::new(keys), now()));
                }
                Err(error) => {
                    tracing::warn!(target: "trunkline::hub", %error, "the issuer's keys cannot be read");
                }
            }
            state.asking = None;
        });
        asking
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
