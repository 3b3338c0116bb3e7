//! Who is there: credentials to identity.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use trunkline_protocol::ids::{AgentId, DashboardId, TenantId};
use trunkline_protocol::message::Secret;
use trunkline_protocol::one_line::OneLine;

use super::{BoxFuture, Grant};

/// What a peer shows at its greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// What it wants to be, and the id it proposes.
    pub role: Role,
    /// The token of the greeting, or of the `Authorization: Bearer` header.
    pub token: Option<Secret>,
}

/// What a peer wants to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// An agent, under this id.
    Agent(AgentId),
    /// A dashboard, under this id if it brought one.
    Dashboard(Option<DashboardId>),
}

/// Who a peer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The tenant it belongs to.
    pub tenant: TenantId,
    /// Who it is, in the embedder's words: a user, a machine account. Two
    /// links may share a subject; only a link of the same subject supersedes
    /// another.
    pub subject: String,
    /// The id an agent goes on under, where it is not the one it proposed.
    pub agent: Option<AgentId>,
    /// The labels of an agent, by which a [`Policy`](super::Policy) may know
    /// it beside its id.
    pub labels: BTreeSet<String>,
    /// What a dashboard is, in the words of the [`Policy`](super::Policy).
    pub roles: BTreeSet<String>,
    /// What a dashboard may do, whatever its roles; it is the
    /// [`Policy`](super::Policy) that heeds it.
    pub grants: BTreeSet<Grant>,
    /// How long the credentials hold from now; `None`: for ever.
    pub expires_in: Option<Duration>,
}

impl Identity {
    /// An identity that never expires, under the proposed id, with neither
    /// labels nor roles nor grants.
    pub fn new(tenant: TenantId, subject: impl Into<String>) -> Self {
        Self {
            tenant,
            subject: subject.into(),
            agent: None,
            labels: BTreeSet::new(),
            roles: BTreeSet::new(),
            grants: BTreeSet::new(),
            expires_in: None,
        }
    }

    /// Whether a policy, which goes by nothing else, shows both the same.
    pub(crate) fn sees_as(&self, other: &Self) -> bool {
        let Self { tenant, subject, agent: _, labels: _, roles, grants, expires_in: _ } = self;
        (tenant, subject, roles, grants)
            == (&other.tenant, &other.subject, &other.roles, &other.grants)
    }
}

/// Why credentials were not accepted. What the peer hears does not depend on
/// the text: that is for the hub's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// They are not valid: the peer needs others.
    #[error("credentials not accepted: {}", OneLine(.0))]
    Unauthorized(String),
    /// They are valid, but not for this role or id.
    #[error("not allowed: {}", OneLine(.0))]
    Forbidden(String),
    /// It could not be found out. The peer tries again.
    #[error("authenticator unavailable: {}", OneLine(.0))]
    Unavailable(String),
}

/// Decides who a peer is.
///
/// Called once for every greeting, and once for every `auth:refresh-token`,
/// concurrently for different links and never twice at a time for one. The
/// answer is final for the link: whatever the peer proposed, it goes on as
/// the [`Identity`] says.
///
/// It may be slow, but not longer than
/// [`hook_timeout`](trunkline_protocol::limits::Limits::hook_timeout) and, at a
/// greeting, what is left of `greeting_timeout`: the future is then dropped
/// and the peer refused. Dropping it must have no lasting effect.
pub trait Authenticator: Send + Sync + 'static {
    /// Who shows these credentials?
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>>;

    /// Said once, when the hub starts; a place for a warning.
    fn describe(&self) -> &'static str {
        "custom"
    }
}

/// One that your application asks, too.
impl<T: Authenticator + ?Sized> Authenticator for Arc<T> {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        (**self).authenticate(credentials)
    }

    fn describe(&self) -> &'static str {
        (**self).describe()
    }
}

/// What [`Anyone`] calls itself, by which a hub knows that it asks for no
/// credentials.
pub(crate) const ANYONE: &str = "anyone";

/// Lets anyone be anything, all in the tenant `default`. For development: the
/// hub warns about it in its log when it starts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anyone;

impl Authenticator for Anyone {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        // A subject of its own for each id: one dashboard cannot take over
        // another's link by accident, and an agent's successor can. A space
        // stands in no id.
        let subject = match &credentials.role {
            Role::Agent(agent) => agent.to_string(),
            Role::Dashboard(Some(dashboard)) => dashboard.to_string(),
            Role::Dashboard(None) => {
                static NEXT: AtomicU64 = AtomicU64::new(1);
                format!("anonymous {}", NEXT.fetch_add(1, Ordering::Relaxed))
            }
        };
        Box::pin(async move {
            let tenant =
                TenantId::try_from("default").map_err(|e| AuthError::Unavailable(e.to_string()))?;
            Ok(Identity::new(tenant, subject))
        })
    }

    fn describe(&self) -> &'static str {
        ANYONE
    }
}

/// A fixed table of tokens.
///
/// ```
/// use trunkline_server::TokenTable;
///
/// let table = TokenTable::new()
///     .agent("s3cret-of-build-1", "acme", "build-1")?
///     .dashboard("s3cret-of-ann", "acme", "ann")?;
/// # Ok::<(), trunkline_protocol::ids::IdError>(())
/// ```
#[derive(Clone, Default)]
pub struct TokenTable {
    rows: HashMap<String, Row>,
}

#[derive(Clone)]
enum Row {
    Agent { tenant: TenantId, agent: AgentId },
    Dashboard { tenant: TenantId, subject: String },
}

impl TokenTable {
    /// An empty table, which lets nobody in.
    pub fn new() -> Self {
        Self::default()
    }

    /// A token for one agent: whoever shows it is that agent.
    pub fn agent(
        mut self,
        token: impl Into<String>,
        tenant: &str,
        agent: &str,
    ) -> Result<Self, trunkline_protocol::ids::IdError> {
        let row = Row::Agent { tenant: tenant.parse()?, agent: agent.parse()? };
        self.rows.insert(token.into(), row);
        Ok(self)
    }

    /// A token for the dashboards of one person.
    pub fn dashboard(
        mut self,
        token: impl Into<String>,
        tenant: &str,
        subject: impl Into<String>,
    ) -> Result<Self, trunkline_protocol::ids::IdError> {
        let row = Row::Dashboard { tenant: tenant.parse()?, subject: subject.into() };
        self.rows.insert(token.into(), row);
        Ok(self)
    }

    /// Compares with every row in full, so that the time taken tells nothing
    /// about how much of a token was right.
    fn find(&self, token: &str) -> Option<&Row> {
        let mut found = None;
        for (known, row) in &self.rows {
            if same(known.as_bytes(), token.as_bytes()) {
                found = Some(row);
            }
        }
        found
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    let difference =
        a.iter().zip(b).fold(a.len() ^ b.len(), |acc, (x, y)| acc | usize::from(x ^ y));
    std::hint::black_box(difference) == 0
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenTable").field("tokens", &self.rows.len()).finish_non_exhaustive()
    }
}

impl Authenticator for TokenTable {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        Box::pin(async move {
            let token = credentials
                .token
                .as_ref()
                .ok_or_else(|| AuthError::Unauthorized("no token".into()))?;
            let row = self
                .find(token.reveal())
                .ok_or_else(|| AuthError::Unauthorized("unknown token".into()))?;
            match (row, &credentials.role) {
                (Row::Agent { tenant, agent }, Role::Agent(_)) => Ok(Identity {
                    agent: Some(agent.clone()),
                    ..Identity::new(tenant.clone(), agent.as_str())
                }),
                (Row::Dashboard { tenant, subject }, Role::Dashboard(_)) => {
                    Ok(Identity::new(tenant.clone(), subject.clone()))
                }
                (Row::Agent { .. }, Role::Dashboard(_)) => {
                    Err(AuthError::Forbidden("an agent's token".into()))
                }
                (Row::Dashboard { .. }, Role::Agent(_)) => {
                    Err(AuthError::Forbidden("a dashboard's token".into()))
                }
            }
        })
    }

    fn describe(&self) -> &'static str {
        "token table"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_what_its_row_says_and_nothing_else() {
        let table = TokenTable::new()
            .agent("a-token", "acme", "build-1")
            .and_then(|t| t.dashboard("d-token", "acme", "ann"))
            .unwrap();
        let ask = async |role: Role, token: Option<&str>| {
            table.authenticate(&Credentials { role, token: token.map(Secret::from) }).await
        };
        let agent = || Role::Agent("other".parse().unwrap());
        let identity = ask(agent(), Some("a-token")).await.unwrap();
        assert_eq!(
            identity.agent.unwrap().as_str(),
            "build-1",
            "the table's id, not the proposed one"
        );
        assert!(matches!(ask(agent(), Some("d-token")).await, Err(AuthError::Forbidden(_))));
        assert!(matches!(ask(agent(), Some("a-toke")).await, Err(AuthError::Unauthorized(_))));
        assert!(matches!(ask(agent(), None).await, Err(AuthError::Unauthorized(_))));
        assert!(matches!(
            ask(Role::Dashboard(None), Some("a-token")).await,
            Err(AuthError::Forbidden(_))
        ));
        assert_eq!(ask(Role::Dashboard(None), Some("d-token")).await.unwrap().subject, "ann");
        assert!(!format!("{table:?}").contains("a-token"), "tokens are not shown");
    }
}
