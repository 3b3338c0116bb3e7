//! Who may do what to which agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use trunkline_protocol::ids::AgentId;

use super::Identity;

/// What a dashboard may do to an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Permission {
    /// See that it is there, what it runs and what that writes.
    Observe,
    /// Ask it to run something, and interrupt what runs.
    Command,
    /// Type into what runs, and say how large its terminal is.
    Input,
    /// Stop it at once, with all that it runs and that waits for it: the
    /// emergency stop.
    Administer,
}

impl Permission {
    /// Every permission.
    pub const ALL: [Self; 4] = [Self::Observe, Self::Command, Self::Input, Self::Administer];

    /// Its word in a [`Grant`].
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Command => "command",
            Self::Input => "input",
            Self::Administer => "administer",
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which agents a [`Grant`] is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Agents {
    /// Every agent of the tenant: `*`.
    All,
    /// This one: its id.
    Id(AgentId),
    /// Those whose identity has this label: `label=` and the label.
    Label(String),
}

impl Agents {
    /// Whether an agent is one of these.
    pub fn contain(&self, agent: &AgentRef<'_>) -> bool {
        match self {
            Self::All => true,
            Self::Id(id) => id == agent.id,
            Self::Label(label) => agent.labels.contains(label),
        }
    }
}

/// A permission on some agents, written `PERMISSION:AGENTS`.
///
/// ```
/// use trunkline_server::hooks::{Agents, Grant, Permission};
///
/// let grant: Grant = "observe:*".parse()?;
/// assert_eq!(grant, Grant { permission: Permission::Observe, agents: Agents::All });
/// let grant: Grant = "command:label=ci".parse()?;
/// assert_eq!(grant.agents, Agents::Label("ci".into()));
/// assert_eq!("input:build-1".parse::<Grant>()?.to_string(), "input:build-1");
/// assert!("delete:*".parse::<Grant>().is_err());
/// # Ok::<(), trunkline_server::hooks::GrantError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Grant {
    /// What.
    pub permission: Permission,
    /// To whom.
    pub agents: Agents,
}

impl Grant {
    /// A permission on every agent of the tenant.
    pub const fn on_all(permission: Permission) -> Self {
        Self { permission, agents: Agents::All }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { permission, agents } = self;
        match agents {
            Agents::All => write!(f, "{permission}:*"),
            Agents::Id(id) => write!(f, "{permission}:{id}"),
            Agents::Label(label) => write!(f, "{permission}:label={label}"),
        }
    }
}

/// What is no [`Grant`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// Not `PERMISSION:AGENTS`.
    #[error("a grant is PERMISSION:AGENTS, such as observe:*")]
    Form,
    /// No such permission.
    #[error("a permission is observe, command, input or administer")]
    Permission,
    /// Neither `*`, nor an agent's id, nor `label=` and a label.
    #[error("agents are *, the id of one, or label=LABEL")]
    Agents,
}

impl FromStr for Grant {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let (word, agents) = text.split_once(':').ok_or(GrantError::Form)?;
        let permission = Permission::ALL.into_iter().find(|known| known.as_str() == word);
        let permission = permission.ok_or(GrantError::Permission)?;
        let agents = match (agents, agents.strip_prefix("label=")) {
            ("*", _) => Agents::All,
            (_, Some("")) => return Err(GrantError::Agents),
            (_, Some(label)) => Agents::Label(label.to_owned()),
            (id, None) => Agents::Id(id.parse().map_err(|_| GrantError::Agents)?),
        };
        Ok(Self { permission, agents })
    }
}

/// An agent, as a policy knows it.
#[derive(Debug, Clone, Copy)]
pub struct AgentRef<'a> {
    /// Its id.
    pub id: &'a AgentId,
    /// The labels of its [`Identity`]; none of an agent that has not been here
    /// since the hub started. What an agent says about itself is not here: it
    /// decides nothing.
    pub labels: &'a BTreeSet<String>,
}

/// Decides what dashboards may do. Only identities that an
/// [`Authenticator`](super::Authenticator) has given, and only agents of the
/// same tenant, come before it: another tenant's do not exist.
///
/// It is asked for every message that is about an agent, for every entry of the
/// roster that is sent, and again for all that an identity reads when its
/// grants or an agent's labels change. So it must be pure and fast: the answer
/// depends on its arguments and on nothing else, and it waits for nothing. What
/// may change from outside belongs into the identity, and tokens that expire
/// soon.
///
/// An agent that somebody may not [`Observe`](Permission::Observe) does not
/// exist for them; there is no need to allow less to them elsewhere.
pub trait Policy: fmt::Debug + Send + Sync + 'static {
    /// Whether `who` may do this to `agent`.
    fn allows(&self, who: &Identity, permission: Permission, agent: &AgentRef<'_>) -> bool;
}

/// Whoever is let in may do everything to all agents of its tenant. The default.
#[derive(Debug, Clone, Copy, Default)]
pub struct WholeTenant;

impl Policy for WholeTenant {
    fn allows(&self, _: &Identity, _: Permission, _: &AgentRef<'_>) -> bool {
        true
    }
}

/// What roles may do, and what an identity was granted beside them.
///
/// Something is allowed if one of the identity's own
/// [`grants`](Identity::grants) says so, or one of those that this policy gives
/// to one of its [`roles`](Identity::roles). A role that it does not know gives
/// nothing.
///
/// ```
/// use trunkline_server::hooks::RolePolicy;
///
/// let policy = RolePolicy::new()
///     .role("viewer", ["observe:*"])?
///     .role("operator", ["observe:*", "command:label=ci", "input:label=ci"])?
///     .role("admin", ["observe:*", "command:*", "input:*", "administer:*"])?;
/// # Ok::<(), trunkline_server::hooks::GrantError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct RolePolicy {
    roles: BTreeMap<String, BTreeSet<Grant>>,
}

impl RolePolicy {
    /// A policy without roles: only an identity's own grants count.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a role may do, beside what was said of it before.
    ///
    /// # Errors
    ///
    /// When one of them is no [`Grant`].
    pub fn role<'a>(
        mut self,
        role: impl Into<String>,
        grants: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, GrantError> {
        let role = self.roles.entry(role.into()).or_default();
        for grant in grants {
            role.insert(grant.parse()?);
        }
        Ok(self)
    }
}

impl Policy for RolePolicy {
    fn allows(&self, who: &Identity, permission: Permission, agent: &AgentRef<'_>) -> bool {
        let of_roles = who.roles.iter().filter_map(|role| self.roles.get(role)).flatten();
        let mut grants = who.grants.iter().chain(of_roles);
        grants.any(|grant| grant.permission == permission && grant.agents.contain(agent))
    }
}
