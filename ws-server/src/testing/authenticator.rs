//! What every authenticator must keep to.

#[cfg(test)]
mod tests;

use std::pin::pin;
use std::task::{Context, Waker};

use futures_util::future::join_all;
use trunkline_protocol::message::Secret;

use crate::hooks::{AuthError, Authenticator, Credentials, Identity};

/// Runs everything that an [`Authenticator`] must keep to, whatever it goes by.
///
/// `good` are credentials that it accepts, and as whom; `bad` are some that it
/// does not, of which it says why. Of the good ones it makes others that are
/// none: with no token, with half of one, with one character changed, or with
/// more than there is room for. `expires_in` is not compared.
///
/// ```
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # runtime.block_on(async {
/// use trunkline_server::hooks::{Credentials, Identity, Role};
/// use trunkline_server::{TokenTable, testing};
///
/// let table = TokenTable::new().dashboard("s3cret-of-ann", "acme", "ann").unwrap();
/// let ann = Credentials { role: Role::Dashboard(None), token: Some("s3cret-of-ann".into()) };
/// let stranger = Credentials { token: Some("s3cret-of-eve".into()), ..ann.clone() };
/// let identity = Identity::new("acme".parse().unwrap(), "ann");
/// testing::authenticator(&table, &[(ann, identity)], &[stranger]).await;
/// # });
/// ```
///
/// Dropping the future ends the suite.
///
/// # Panics
///
/// When an obligation is not kept.
pub async fn authenticator(
    hook: &impl Authenticator,
    good: &[(Credentials, Identity)],
    bad: &[Credentials],
) {
    assert!(!hook.describe().is_empty(), "it has a name for the log");
    for (credentials, identity) in good {
        for _ in 0..2 {
            let answer = hook.authenticate(credentials).await.map(timeless);
            assert_eq!(
                answer,
                Ok(timeless(identity.clone())),
                "who is known is let in, each time alike"
            );
        }
        for spoilt in spoilt(credentials) {
            refuses(hook, &spoilt).await;
        }
    }
    for credentials in bad {
        refuses(hook, credentials).await;
    }

    // Many at once, good and bad in turn.
    let all: Vec<(&Credentials, Option<&Identity>)> = good
        .iter()
        .map(|(credentials, identity)| (credentials, Some(identity)))
        .chain(bad.iter().map(|credentials| (credentials, None)))
        .cycle()
        .take(64.min(64 * (good.len() + bad.len())))
        .collect();
    let answers = join_all(all.iter().map(|(credentials, _)| hook.authenticate(credentials))).await;
    for ((_, identity), answer) in all.iter().zip(&answers) {
        let answer = answer.clone().ok().map(timeless);
        let identity = identity.cloned().map(timeless);
        assert_eq!(answer, identity, "who asks beside whom changes nothing");
    }

    // A question that nobody waits for any more.
    for (credentials, _) in &all {
        let mut dropped = pin!(hook.authenticate(credentials));
        let _ = dropped.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }
    for (credentials, identity) in good {
        let answer = hook.authenticate(credentials).await.map(timeless);
        assert_eq!(
            answer,
            Ok(timeless(identity.clone())),
            "a dropped question has no lasting effect"
        );
    }
}

/// How long credentials still hold is less at every look.
fn timeless(identity: Identity) -> Identity {
    Identity { expires_in: None, ..identity }
}

/// Refuses, for good, and without giving the token away.
async fn refuses(hook: &impl Authenticator, credentials: &Credentials) {
    let role = &credentials.role;
    let error = match hook.authenticate(credentials).await {
        // The token is not shown.
        Ok(identity) => panic!("lets {identity:?} in as {role:?} with credentials that are none"),
        Err(error) => error,
    };
    assert!(
        !matches!(error, AuthError::Unavailable(_)),
        "what is refused is not tried again, but this is {error}"
    );
    if let Some(token) = &credentials.token
        && token.reveal().len() >= 8
    {
        let told = format!("{error} {error:?}");
        assert!(!told.contains(token.reveal()), "an error does not repeat the token");
    }
}

/// Credentials that are like these, and none.
fn spoilt(credentials: &Credentials) -> Vec<Credentials> {
    let Some(token) = &credentials.token else { return Vec::new() };
    let token = token.reveal();
    let other = |at: usize| -> String {
        let change = |(n, c): (usize, char)| match c {
            _ if n != at => c,
            'x' => 'y',
            _ => 'x',
        };
        token.chars().enumerate().map(change).collect()
    };
    let length = token.chars().count();
    let half: String = token.chars().take(length / 2).collect();
    let with = |token: Option<String>| Credentials {
        token: token.map(Secret::from),
        ..credentials.clone()
    };
    vec![
        with(None),
        with(Some(String::new())),
        with(Some(half)),
        with(Some(other(0))),
        with(Some(other(length / 2))),
        with(Some(format!("{token}x"))),
        with(Some(token.repeat(10_000))),
    ]
}
