//! Tokens that somebody else has signed: JSON Web Tokens (RFC 7519), checked as
//! RFC 8725 asks.

mod keys;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Validation};
use serde_json::{Map, Value};
use trunkline_protocol::ids::{AgentId, TenantId};

use self::keys::{Key, Keys};
use super::{AuthError, Authenticator, BoxFuture, Credentials, Grant, Identity, Role};

/// Longest token that is looked at. Those in use have one or two KiB.
const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// Most roles, grants or labels that one token may bring.
const WORDS_MAX: usize = 256;

/// Why a [`JwtAuthenticator`] cannot be built so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwtSetupError {
    /// RFC 7518 §3.2: a key for HS256 has at least as many bits as its hash.
    #[error("a secret for HS256 has at least 32 bytes")]
    ShortSecret,
    /// A key that is told to others, in PEM, was given as a secret.
    #[error("a key in PEM is no shared secret")]
    PemSecret,
    /// Keys that somebody on the way could change decide nothing.
    #[error("keys are fetched from https:// URLs, or from this machine over http://")]
    InsecureUrl,
    /// Neither an issuer nor `any_issuer` was named.
    #[error("say whose tokens are accepted: issuer(…), or any_issuer()")]
    NoIssuer,
    /// Neither an audience nor `any_audience` was named.
    #[error("say for whom accepted tokens are: audience(…), or any_audience()")]
    NoAudience,
    /// Nothing says which tenant a token is for.
    #[error("say where the tenant is from: tenant(…), or tenant_claim(…)")]
    NoTenant,
    /// The platform has no root certificates to check the issuer's with.
    #[error("no root certificates are to be had: {0}")]
    NoRoots(String),
}

/// Lets in whoever shows a token (a JSON Web Token, RFC 7519) that an issuer of
/// your choice has signed. Feature `jwt`.
///
/// ```no_run
/// use trunkline_server::{Hub, JwtAuthenticator};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let tokens = JwtAuthenticator::jwks_url("https://id.example.com/.well-known/jwks.json")
///     .issuer("https://id.example.com/")
///     .audience("trunkline")
///     .tenant_claim("org")
///     .roles_claim("roles")
///     .agent_claim("agent")
///     .build()?;
/// let hub = Hub::builder().authenticator(tokens).start().await?;
/// # Ok(())
/// # }
/// ```
///
/// # What is checked
///
/// The signature, by a key whose algorithm is the key's own (RFC 8725 §3.1):
/// what the token says of that must be the same, and decides nothing. `exp`,
/// which must be there, `nbf` and `iat` (which is not to come), with
/// [`leeway`](JwtBuilder::leeway); `iss` and `aud`, unless you say that any will do; `sub`, which must be there and
/// not be empty. A token of more than 8 KiB is not looked at, and one with
/// `crit` (RFC 7515 §4.1.11) is refused, as no extension is known here.
///
/// # What an identity is made of
///
/// | of an [`Identity`] | from | |
/// |---|---|---|
/// | `subject` | `sub` | [`subject_claim`](JwtBuilder::subject_claim) |
/// | `tenant` | a fixed one, or a claim | [`tenant`](JwtBuilder::tenant), [`tenant_claim`](JwtBuilder::tenant_claim) |
/// | `roles` | none, or a claim | [`roles_claim`](JwtBuilder::roles_claim) |
/// | `grants` | none, or a claim | [`grants_claim`](JwtBuilder::grants_claim) |
/// | `labels` | none, or a claim | [`labels_claim`](JwtBuilder::labels_claim) |
/// | `expires_in` | `exp` | |
///
/// A claim is named by its name at the top (`https://example.com/org`, which
/// may hold dots), or by its way through objects (`app_metadata.org`).
///
/// A token is an agent's or a dashboard's, never both: with an
/// [`agent_claim`](JwtBuilder::agent_claim) in it, it is for the agents named
/// there, and without it for dashboards. While no such claim is configured,
/// all are for dashboards.
///
/// # Keys
///
/// A secret; or a JSON Web Key Set (RFC 7517) at a URL or in a file, of which
/// keys for RS256 (2,048 bits and more), ES256 and `EdDSA` (Ed25519) are used,
/// 64 at most. A set is read when the first token is shown, and again when it
/// is ten minutes old, so that a key that was withdrawn is of no use any more;
/// and at once when a token names a key that it does not have; but not more
/// often than every ten seconds, however many such tokens come. If it cannot be
/// had, the last one goes on for a day; for a key that is not in it, or without
/// one, the answer is [`AuthError::Unavailable`], and peers try again. One
/// request takes 3 s at most and reads 256 KiB.
///
/// # Supabase
///
/// [`supabase`](Self::supabase) accepts the tokens of a project's users as they
/// are.
#[derive(Debug)]
pub struct JwtAuthenticator {
    keys: Keys,
    mapping: Mapping,
    validation: Validation,
}

/// What a [`JwtAuthenticator`] is made of.
#[derive(Debug)]
pub struct JwtBuilder {
    source: Result<Source, JwtSetupError>,
    mapping: Mapping,
    issuers: Option<Vec<String>>,
    audiences: Option<Vec<String>>,
    leeway: Duration,
}

enum Source {
    Secret(Vec<u8>),
    Set(keys::Loader),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Secret(_) => "Secret(…)",
            Self::Set(_) => "Set(…)",
        })
    }
}

/// Which claims say what.
#[derive(Debug, Clone)]
struct Mapping {
    subject: String,
    tenant: Option<Tenant>,
    roles: Option<String>,
    grants: Option<String>,
    labels: Option<String>,
    agent: Option<String>,
}

#[derive(Debug, Clone)]
enum Tenant {
    Fixed(TenantId),
    Claim(String),
}

impl JwtAuthenticator {
    /// Tokens that are signed with a shared secret (HS256): whoever checks them
    /// can also make them. At least 32 bytes, and not of a password's kind.
    pub fn secret(secret: impl Into<Vec<u8>>) -> JwtBuilder {
        let secret = secret.into();
        let source = if secret.starts_with(b"-----BEGIN") {
            Err(JwtSetupError::PemSecret)
        } else if secret.len() < 32 {
            Err(JwtSetupError::ShortSecret)
        } else {
            Ok(Source::Secret(secret))
        };
        JwtBuilder::new(source)
    }

    /// Tokens that are signed with a key of the set at this URL: `https://`,
    /// checked against the platform's root certificates; or `http://` on this
    /// machine. It is not asked before the first token comes.
    pub fn jwks_url(url: &str) -> JwtBuilder {
        JwtBuilder::new(keys::from_url(url).map(Source::Set))
    }

    /// Tokens that are signed with a key of the set in this file, which is read
    /// again as one at a URL would be.
    pub fn jwks_file(path: impl Into<PathBuf>) -> JwtBuilder {
        JwtBuilder::new(Ok(Source::Set(keys::from_file(path.into()))))
    }

    /// The tokens of a Supabase project's users, as they are: `project` is its
    /// URL, `https://PROJECT.supabase.co`.
    ///
    /// Keys are those of its `/auth/v1/.well-known/jwks.json` (a project with
    /// asymmetric signing keys, which new ones have), the issuer is its
    /// `/auth/v1`, the audience `authenticated`; roles come from
    /// `app_metadata.roles`, which only the project's owner can set, and so may
    /// the tenant. Tokens of nobody in particular (`anon`, `service_role`) have
    /// no subject, and are refused.
    ///
    /// ```no_run
    /// # use trunkline_server::JwtAuthenticator;
    /// let tokens = JwtAuthenticator::supabase("https://abcdefgh.supabase.co")
    ///     .tenant_claim("app_metadata.org")
    ///     .build()?;
    ///
    /// // A project that still signs with its legacy secret:
    /// let secret = std::env::var("SUPABASE_JWT_SECRET")?;
    /// let tokens = JwtAuthenticator::secret(secret)
    ///     .issuer("https://abcdefgh.supabase.co/auth/v1")
    ///     .audience("authenticated")
    ///     .roles_claim("app_metadata.roles")
    ///     .tenant_claim("app_metadata.org")
    ///     .build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn supabase(project: &str) -> JwtBuilder {
        let auth = format!("{}/auth/v1", project.trim_end_matches('/'));
        Self::jwks_url(&format!("{auth}/.well-known/jwks.json"))
            .issuer(auth)
            .audience("authenticated")
            .roles_claim("app_metadata.roles")
    }

    /// Who shows this token, at this time?
    fn judge(&self, token: &str, keys: &[Key], role: &Role) -> Result<Identity, AuthError> {
        let refuse = |why: &str| AuthError::Unauthorized(why.into());
        let header = jsonwebtoken::decode_header(token).map_err(|_| refuse("not a JWT"))?;
        if header.crit.is_some() {
            return Err(refuse("crit: no extension is known"));
        }
        let key = keys::find(keys, header.kid.as_deref())
            .ok_or_else(|| refuse("kid: no key of that name"))?;
        // What the token says of its algorithm is compared, never followed.
        let validation = Validation { algorithms: vec![key.algorithm], ..self.validation.clone() };
        let decoded = jsonwebtoken::decode::<Map<String, Value>>(token, &key.decoding, &validation);
        // Which check it was, in the library's words; never what stood there,
        // which a parser repeats.
        let why = |error: jsonwebtoken::errors::Error| match error.kind() {
            ErrorKind::Json(_) => refuse("claims that cannot be read"),
            kind => refuse(&format!("{kind:?}")),
        };
        let claims = decoded.map_err(why)?.claims;
        // One, not a list of them (RFC 7519 §4.1.1).
        text(&claims, "iss")?;
        is_made(&claims, self.validation.leeway)?;
        self.mapping.identity(&claims, role, wall_clock())
    }
}

impl Mapping {
    fn identity(
        &self,
        claims: &Map<String, Value>,
        role: &Role,
        now: SystemTime,
    ) -> Result<Identity, AuthError> {
        let bad = |claim: &str, rule: &str| AuthError::Unauthorized(format!("{claim}: {rule}"));
        let subject = text(claims, &self.subject)?;
        let subject = subject.filter(|subject| !subject.is_empty() && subject.len() <= 256);
        let subject =
            subject.ok_or_else(|| bad(&self.subject, "must be 1 to 256 bytes of text"))?;
        let tenant = match &self.tenant {
            Some(Tenant::Fixed(tenant)) => tenant.clone(),
            Some(Tenant::Claim(claim)) => {
                let tenant = text(claims, claim)?.ok_or_else(|| bad(claim, "is required"))?;
                tenant.parse().map_err(|_| bad(claim, "must be a tenant's name"))?
            }
            None => return Err(AuthError::Unavailable("no tenant is configured".into())),
        };
        let agents = match &self.agent {
            Some(claim) => words(claims, claim)?,
            None => None,
        };
        let mut identity = Identity::new(tenant, subject);
        match (role, agents) {
            (Role::Agent(agent), Some(agents)) => {
                if !agents.iter().any(|name| name == "*" || name == agent.as_str()) {
                    return Err(AuthError::Forbidden("the token is for another agent".into()));
                }
                identity.agent = Some(AgentId::clone(agent));
                identity.labels = set(claims, self.labels.as_deref())?;
            }
            (Role::Agent(_), None) => {
                return Err(AuthError::Forbidden("the token is for no agent".into()));
            }
            (Role::Dashboard(_), Some(_)) => {
                return Err(AuthError::Forbidden("the token is for an agent".into()));
            }
            (Role::Dashboard(_), None) => {
                identity.roles = set(claims, self.roles.as_deref())?;
                if let Some(claim) = &self.grants {
                    for grant in words(claims, claim)?.unwrap_or_default() {
                        let grant: Grant =
                            grant.parse().map_err(|_| bad(claim, "must be a list of grants"))?;
                        identity.grants.insert(grant);
                    }
                }
            }
        }
        // Checked already; whole seconds (RFC 7519 §2), or parts of one.
        let expires = claims.get("exp").and_then(Value::as_f64).unwrap_or_default();
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let expires = Duration::try_from_secs_f64(expires).unwrap_or(Duration::MAX);
        identity.expires_in = Some(expires.saturating_sub(now));
        Ok(identity)
    }
}

#[expect(clippy::disallowed_methods, reason = "a token's times are told by the wall clock")]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// A token that says when it was made was made by now, by clocks that are this
/// many seconds apart: whoever can have them made for later has them for longer
/// than their issuer meant.
fn is_made(claims: &Map<String, Value>, leeway: u64) -> Result<(), AuthError> {
    let Some(iat) = find(claims, "iat") else { return Ok(()) };
    let refuse = |why: &str| AuthError::Unauthorized(why.into());
    let iat = iat.as_f64().ok_or_else(|| refuse("iat: must be a number"))?;
    let now = wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if iat > now.saturating_add(Duration::from_secs(leeway)).as_secs_f64() {
        return Err(refuse("iat: is yet to come"));
    }
    Ok(())
}

/// The claim of this name, or at the end of this way.
fn find<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let found = claims.get(name).or_else(|| {
        let (first, rest) = name.split_once('.')?;
        let first = claims.get(first)?;
        rest.split('.').try_fold(first, |value, name| value.get(name))
    });
    found.filter(|value| !value.is_null())
}

fn text(claims: &Map<String, Value>, name: &str) -> Result<Option<String>, AuthError> {
    match find(claims, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(AuthError::Unauthorized(format!("{name}: must be text"))),
    }
}

/// One text, or a list of texts.
fn words(claims: &Map<String, Value>, name: &str) -> Result<Option<Vec<String>>, AuthError> {
    let bad = || AuthError::Unauthorized(format!("{name}: must be a text or a list of texts"));
    match find(claims, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(vec![text.clone()])),
        Some(Value::Array(list)) if list.len() <= WORDS_MAX => {
            let word = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(bad);
            list.iter().map(word).collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(bad()),
    }
}

fn set(claims: &Map<String, Value>, name: Option<&str>) -> Result<BTreeSet<String>, AuthError> {
    let Some(name) = name else { return Ok(BTreeSet::new()) };
    Ok(words(claims, name)?.unwrap_or_default().into_iter().collect())
}

impl JwtBuilder {
    fn new(source: Result<Source, JwtSetupError>) -> Self {
        let mapping = Mapping {
            subject: "sub".into(),
            tenant: None,
            roles: None,
            grants: None,
            labels: None,
            agent: None,
        };
        Self { source, mapping, issuers: None, audiences: None, leeway: Duration::from_secs(30) }
    }

    /// Accepts tokens of this issuer (`iss`); called again, of that one too.
    #[must_use]
    pub fn issuer(mut self, issuer: impl Into<String>) -> Self {
        self.issuers.get_or_insert_default().push(issuer.into());
        self
    }

    /// Accepts tokens whatever they say of their issuer: for a key that has but
    /// one.
    #[must_use]
    pub fn any_issuer(mut self) -> Self {
        self.issuers = Some(Vec::new());
        self
    }

    /// Accepts tokens for this audience (`aud`); called again, for that one
    /// too.
    #[must_use]
    pub fn audience(mut self, audience: impl Into<String>) -> Self {
        self.audiences.get_or_insert_default().push(audience.into());
        self
    }

    /// Accepts tokens whoever they are for: also those that were given to
    /// others, and that these others show here (RFC 8725 §2.7).
    #[must_use]
    pub fn any_audience(mut self) -> Self {
        self.audiences = Some(Vec::new());
        self
    }

    /// How far clocks may be apart, an hour at most. 30 s unless you say
    /// otherwise.
    #[must_use]
    pub fn leeway(mut self, leeway: Duration) -> Self {
        self.leeway = leeway.min(Duration::from_secs(3600));
        self
    }

    /// Who it is, text; `sub` unless you say otherwise.
    #[must_use]
    pub fn subject_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.subject = claim.into();
        self
    }

    /// Everybody belongs to this tenant.
    #[must_use]
    pub fn tenant(mut self, tenant: TenantId) -> Self {
        self.mapping.tenant = Some(Tenant::Fixed(tenant));
        self
    }

    /// The tenant's name, text; required in every token then. It must be one
    /// that nobody can choose for himself.
    #[must_use]
    pub fn tenant_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.tenant = Some(Tenant::Claim(claim.into()));
        self
    }

    /// What a dashboard is: a text or a list of texts.
    #[must_use]
    pub fn roles_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.roles = Some(claim.into());
        self
    }

    /// What a dashboard may do: a [`Grant`] or a list of them, as text
    /// (`command:label=ci`).
    #[must_use]
    pub fn grants_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.grants = Some(claim.into());
        self
    }

    /// The labels of an agent: a text or a list of texts.
    #[must_use]
    pub fn labels_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.labels = Some(claim.into());
        self
    }

    /// The agents that a token is for: a name or a list of names, or `*` for
    /// any in its tenant. A token without this claim is for dashboards.
    #[must_use]
    pub fn agent_claim(mut self, claim: impl Into<String>) -> Self {
        self.mapping.agent = Some(claim.into());
        self
    }

    /// The authenticator, if everything that matters was said.
    ///
    /// # Errors
    ///
    /// What is missing, or cannot be.
    pub fn build(self) -> Result<JwtAuthenticator, JwtSetupError> {
        let Self { source, mapping, issuers, audiences, leeway } = self;
        let source = source?;
        let issuers = issuers.ok_or(JwtSetupError::NoIssuer)?;
        let audiences = audiences.ok_or(JwtSetupError::NoAudience)?;
        if mapping.tenant.is_none() {
            return Err(JwtSetupError::NoTenant);
        }
        // Whose cryptography it is, should there be several in the process.
        let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
        // Which algorithm is for each key to say.
        let mut validation = Validation::new(Algorithm::HS256);
        let mut required = vec!["exp"];
        validation.leeway = leeway.as_secs();
        validation.validate_nbf = true;
        validation.validate_aud = !audiences.is_empty();
        if !audiences.is_empty() {
            validation.set_audience(&audiences);
            required.push("aud");
        }
        if !issuers.is_empty() {
            validation.set_issuer(&issuers);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        let keys = match source {
            Source::Secret(secret) => Keys::Fixed(Arc::new(vec![Key::secret(&secret)])),
            Source::Set(loader) => Keys::Set(Arc::new(keys::KeySet::new(loader))),
        };
        Ok(JwtAuthenticator { keys, mapping, validation })
    }
}

impl Authenticator for JwtAuthenticator {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        Box::pin(async move {
            let refuse = |why: &str| AuthError::Unauthorized(why.into());
            let token = credentials.token.as_ref().ok_or_else(|| refuse("no token"))?.reveal();
            if token.len() > TOKEN_BYTES_MAX {
                return Err(refuse("the token is too long"));
            }
            // Not before it has the shape of one: that costs no request.
            let header = jsonwebtoken::decode_header(token).map_err(|_| refuse("not a JWT"))?;
            let keys = self.keys.with(header.kid.as_deref()).await?;
            self.judge(token, &keys, &credentials.role)
        })
    }

    fn describe(&self) -> &'static str {
        "JSON Web Tokens"
    }
}
