use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt as _;

use super::*;
use crate::hooks::{BoxFuture, Role, TokenTable};

fn table() -> TokenTable {
    let table = TokenTable::new().agent("s3cret-of-build-1", "acme", "build-1");
    table.and_then(|table| table.dashboard("s3cret-of-ann", "acme", "ann")).expect("names")
}

fn build() -> Credentials {
    let role = Role::Agent("build-1".parse().expect("a name"));
    Credentials { role, token: Some("s3cret-of-build-1".into()) }
}

fn ann() -> Credentials {
    Credentials { role: Role::Dashboard(None), token: Some("s3cret-of-ann".into()) }
}

fn good() -> Vec<(Credentials, Identity)> {
    let acme = || "acme".parse().expect("a name");
    let agent = Some("build-1".parse().expect("a name"));
    let build_is = Identity { agent, ..Identity::new(acme(), "build-1") };
    vec![(build(), build_is), (ann(), Identity::new(acme(), "ann"))]
}

/// Each with the token of the other.
fn bad() -> Vec<Credentials> {
    vec![
        Credentials { token: ann().token, ..build() },
        Credentials { token: build().token, ..ann() },
    ]
}

#[tokio::test]
async fn the_token_table_keeps_to_it() {
    authenticator(&table(), &good(), &bad()).await;
}

/// A table with something wrong.
struct Broken {
    table: TokenTable,
    fault: Fault,
    asked: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    LetsNobodyIn,
    LetsInWithoutAToken,
    LooksAtTheBeginningOnly,
    LooksAtTheEndOnly,
    LooksAtNoRole,
    RepeatsTheToken,
    SaysThatItIsOutOfOrder,
    CountsQuestions,
    MixesThoseWhoAskTogether,
}

impl Authenticator for Broken {
    fn authenticate<'a>(
        &'a self,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<Identity, AuthError>> {
        Box::pin(async move {
            let mut asked = credentials.clone();
            let token = asked.token.as_ref().map_or("", |token| token.reveal()).to_owned();
            let known = ["s3cret-of-build-1", "s3cret-of-ann"];
            match self.fault {
                Fault::LetsNobodyIn => return Err(AuthError::Unauthorized("no".into())),
                Fault::LetsInWithoutAToken if asked.token.is_none() => asked = ann(),
                Fault::LooksAtTheBeginningOnly => {
                    let known = known.into_iter().find(|known| token.starts_with(known));
                    asked.token = known.map(Secret::from);
                }
                Fault::LooksAtTheEndOnly => {
                    let end = |of: &str| of.chars().skip(5).collect::<String>();
                    let known = known.into_iter().find(|known| end(known) == end(&token));
                    asked.token = known.map(Secret::from);
                }
                Fault::LooksAtNoRole if token == known[0] => asked.role = build().role,
                Fault::RepeatsTheToken => {
                    let refused = |_| AuthError::Unauthorized(format!("{token} is unknown"));
                    return self.table.authenticate(&asked).await.map_err(refused);
                }
                Fault::SaysThatItIsOutOfOrder => {
                    let refused = |_| AuthError::Unavailable("out of order".into());
                    return self.table.authenticate(&asked).await.map_err(refused);
                }
                Fault::CountsQuestions if self.asked.fetch_add(1, Ordering::Relaxed) > 100 => {
                    return Err(AuthError::Unauthorized("too many questions".into()));
                }
                Fault::MixesThoseWhoAskTogether => {
                    let number = self.asked.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    if self.asked.load(Ordering::Relaxed) > number + 1 {
                        asked = ann();
                    }
                }
                _ => {} // nothing is wrong with that
            }
            self.table.authenticate(&asked).await
        })
    }
}

#[tokio::test]
async fn what_does_not_keep_to_it_is_caught() {
    let faults = [
        Fault::LetsNobodyIn,
        Fault::LetsInWithoutAToken,
        Fault::LooksAtTheBeginningOnly,
        Fault::LooksAtTheEndOnly,
        Fault::LooksAtNoRole,
        Fault::RepeatsTheToken,
        Fault::SaysThatItIsOutOfOrder,
        Fault::CountsQuestions,
        Fault::MixesThoseWhoAskTogether,
    ];
    for fault in faults {
        let broken = Broken { table: table(), fault, asked: AtomicUsize::new(0) };
        let (good, bad) = (good(), bad());
        let caught = AssertUnwindSafe(authenticator(&broken, &good, &bad)).catch_unwind().await;
        assert!(caught.is_err(), "{fault:?} was not caught");
    }
}
