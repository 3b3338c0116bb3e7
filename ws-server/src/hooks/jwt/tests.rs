//! Tokens as they come, good and bad; and sets of keys that change, or are not
//! to be had.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as BASE64};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{EncodingKey, Header};
use proptest::prelude::*;
use serde_json::json;
use trunkline_protocol::ids::DashboardId;
use trunkline_protocol::message::Secret;

use super::*;

const SECRET: &str = "a secret of thirty-two bytes, or more";

/// A key as its issuer has it, and as a set shows it.
struct Issuer {
    algorithm: Algorithm,
    signing: EncodingKey,
    kid: &'static str,
    jwk: Value,
}

/// Another key for each call.
fn ed25519(kid: &'static str) -> Issuer {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    // PKCS #8 (RFC 8410 §7), and a seed.
    let mut der = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
    der.extend([NEXT.fetch_add(1, Ordering::SeqCst).to_be_bytes(); 4].concat());
    issuer(kid, Algorithm::EdDSA, EncodingKey::from_ed_der(&der))
}

fn p256(kid: &'static str) -> Issuer {
    let der = STANDARD.decode(include_str!("p256.test-key").replace('\n', "")).unwrap();
    issuer(kid, Algorithm::ES256, EncodingKey::from_ec_der(&der))
}

fn rsa(kid: &'static str) -> Issuer {
    let der = STANDARD.decode(include_str!("rsa.test-key").replace('\n', "")).unwrap();
    issuer(kid, Algorithm::RS256, EncodingKey::from_rsa_der(&der))
}

fn issuer(kid: &'static str, algorithm: Algorithm, signing: EncodingKey) -> Issuer {
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let jwk = Jwk::from_encoding_key(&signing, algorithm).unwrap();
    let mut jwk = serde_json::to_value(jwk).unwrap();
    jwk["kid"] = json!(kid);
    Issuer { algorithm, signing, kid, jwk }
}

impl Issuer {
    fn sign(&self, claims: &Value) -> String {
        self.sign_as(claims, |_| {})
    }

    fn sign_as(&self, claims: &Value, change: impl FnOnce(&mut Header)) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(self.kid.into());
        change(&mut header);
        jsonwebtoken::encode(&header, claims, &self.signing).unwrap()
    }
}

fn shared_secret(kid: &'static str, secret: &[u8]) -> Issuer {
    let signing = EncodingKey::from_secret(secret);
    Issuer { algorithm: Algorithm::HS256, signing, kid, jwk: Value::Null }
}

fn seconds_from_now(seconds: i64) -> i64 {
    let now = wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap() + seconds
}

/// Claims without a fault, changed.
fn claims(change: impl FnOnce(&mut Map<String, Value>)) -> Value {
    let mut claims = json!({
        "iss": "https://id.example/",
        "aud": "trunkline",
        "sub": "ann",
        "exp": seconds_from_now(600),
        "app_metadata": {"org": "acme", "roles": ["ops", "dev"]},
        "https://example.com/grants": "command:label=ci",
    });
    change(claims.as_object_mut().unwrap());
    claims
}

fn good() -> Value {
    claims(|_| {})
}

fn with(name: &str, value: Value) -> Value {
    claims(|claims| {
        claims.insert(name.into(), value);
    })
}

fn without(name: &str) -> Value {
    claims(|claims| {
        claims.remove(name);
    })
}

fn builder(source: Result<Source, JwtSetupError>) -> JwtBuilder {
    JwtBuilder::new(source)
        .issuer("https://id.example/")
        .audience("trunkline")
        .tenant_claim("app_metadata.org")
        .roles_claim("app_metadata.roles")
        .grants_claim("https://example.com/grants")
        .agent_claim("agents")
        .labels_claim("labels")
}

fn set_of(issuers: &[&Issuer]) -> Vec<u8> {
    let keys: Vec<_> = issuers.iter().map(|issuer| &issuer.jwk).collect();
    serde_json::to_vec(&json!({ "keys": keys })).unwrap()
}

fn of_set(bytes: Vec<u8>) -> JwtAuthenticator {
    let loader: keys::Loader = Box::new(move || Ok(bytes.clone()));
    builder(Ok(Source::Set(loader))).build().unwrap()
}

fn of_secret() -> JwtAuthenticator {
    builder(Ok(Source::Secret(SECRET.into()))).build().unwrap()
}

fn dashboard(token: &str) -> Credentials {
    Credentials { role: Role::Dashboard(None::<DashboardId>), token: Some(Secret::new(token)) }
}

fn agent(id: &str, token: &str) -> Credentials {
    Credentials { role: Role::Agent(id.parse().unwrap()), token: Some(Secret::new(token)) }
}

async fn why_not(hook: &JwtAuthenticator, credentials: &Credentials) -> String {
    let error = hook.authenticate(credentials).await.unwrap_err();
    let said = format!("{error} {error:?}");
    if let Some(token) = &credentials.token {
        let token = token.reveal();
        assert!(token.is_empty() || !said.contains(token), "a token in a log: {said}");
    }
    error.to_string()
}

#[tokio::test]
async fn what_a_token_says_is_who_it_is() {
    for issuer in [ed25519("a"), p256("b"), rsa("c")] {
        let hook = of_set(set_of(&[&issuer, &ed25519("other")]));
        let identity = hook.authenticate(&dashboard(&issuer.sign(&good()))).await.unwrap();
        assert_eq!((identity.tenant.as_str(), identity.subject.as_str()), ("acme", "ann"));
        assert_eq!(identity.roles, ["dev".to_owned(), "ops".into()].into());
        assert_eq!(identity.grants, ["command:label=ci".parse().unwrap()].into());
        assert_eq!((identity.agent, identity.labels), (None, BTreeSet::new()));
        let left = identity.expires_in.unwrap().as_secs();
        assert!((598..=600).contains(&left), "{left}");
    }
}

#[tokio::test]
async fn a_token_is_an_agents_or_a_dashboards() {
    let (hook, issuer) = (of_secret(), shared_secret("any", SECRET.as_bytes()));
    let for_two = claims(|claims| {
        claims.insert("agents".into(), json!(["build-1", "build-2"]));
        claims.insert("labels".into(), json!("ci"));
    });
    let token = issuer.sign(&for_two);
    let identity = hook.authenticate(&agent("build-2", &token)).await.unwrap();
    assert_eq!(identity.agent, Some("build-2".parse().unwrap()));
    assert_eq!((identity.labels, identity.roles), (["ci".to_owned()].into(), BTreeSet::new()));
    let forbidden = |error: String| assert!(error.starts_with("not allowed"), "{error}");
    forbidden(why_not(&hook, &agent("build-3", &token)).await);
    forbidden(why_not(&hook, &dashboard(&token)).await);
    forbidden(why_not(&hook, &agent("build-1", &issuer.sign(&good()))).await);
    let any = issuer.sign(&with("agents", json!("*")));
    assert!(hook.authenticate(&agent("whatever", &any)).await.is_ok());
}

/// RFC 8725 §2 and §3, and whatever else a token may be that is none.
#[tokio::test]
async fn what_is_not_right_is_refused() {
    let (ed, p256, rsa) = (ed25519("ed"), p256("p256"), rsa("rsa"));
    let hook = of_set(set_of(&[&ed, &p256, &rsa]));
    let text = |value: &Value| BASE64.encode(value.to_string());
    let signed = ed.sign(&good());
    let (rest, signature) = signed.rsplit_once('.').unwrap();
    let (head, payload) = rest.split_once('.').unwrap();
    let public = BASE64.decode(rsa.jwk["n"].as_str().unwrap()).unwrap();
    let mut twice = good().to_string();
    twice.insert_str(1, r#""exp":99999999999,"#);

    let bad: Vec<(&str, String)> = vec![
        ("nothing", String::new()),
        ("no JWT", "token".into()),
        ("only dots", "..".into()),
        ("four parts", format!("{signed}.x")),
        ("no signature", format!("{rest}.")),
        ("half a signature", format!("{rest}.{}", &signature[..signature.len() / 2])),
        ("truncated", signed[..signed.len() - 1].into()),
        (
            "another's signature",
            format!("{rest}.{}", p256.sign(&good()).rsplit_once('.').unwrap().1),
        ),
        ("no base64", format!("{head}.{payload}=.{signature}")),
        ("none", format!("{}.{payload}.", text(&json!({"alg": "none", "typ": "JWT"})))),
        ("None", format!("{}.{payload}.", text(&json!({"alg": "None", "kid": "ed"})))),
        (
            "another alg for the key",
            format!("{}.{payload}.{signature}", text(&json!({"alg": "ES256", "kid": "ed"}))),
        ),
        (
            "another key for the alg",
            p256.sign_as(&good(), |header| header.kid = Some("rsa".into())),
        ),
        ("a public key as secret", shared_secret("rsa", &public).sign(&good())),
        (
            "a PSS signature",
            Issuer { algorithm: Algorithm::PS256, ..rsa_again(&rsa) }.sign(&good()),
        ),
        ("RS512", Issuer { algorithm: Algorithm::RS512, ..rsa_again(&rsa) }.sign(&good())),
        ("a stranger's key under a known name", ed25519("ed").sign(&good())),
        ("an unknown name", ed25519("new").sign(&good())),
        ("no name, and several keys", ed.sign_as(&good(), |header| header.kid = None)),
        ("crit", ed.sign_as(&good(), |header| header.crit = Some(vec!["b64".into()]))),
        ("expired", ed.sign(&with("exp", json!(seconds_from_now(-60))))),
        ("no exp", ed.sign(&without("exp"))),
        ("exp as text", ed.sign(&with("exp", json!("99999999999")))),
        ("exp before 1970", ed.sign(&with("exp", json!(-5)))),
        ("exp null", ed.sign(&with("exp", Value::Null))),
        ("exp a list", ed.sign(&with("exp", json!([99_999_999_999_u64])))),
        ("exp twice", raw(&ed, &twice)),
        ("not yet", ed.sign(&with("nbf", json!(seconds_from_now(60))))),
        ("nbf as text", ed.sign(&with("nbf", json!("soon")))),
        ("another issuer", ed.sign(&with("iss", json!("https://id.example")))),
        ("no issuer", ed.sign(&without("iss"))),
        ("issuers in a list", ed.sign(&with("iss", json!(["https://id.example/"])))),
        ("issuer a number", ed.sign(&with("iss", json!(5)))),
        ("another audience", ed.sign(&with("aud", json!(["others", "trunklin"])))),
        ("no audience", ed.sign(&without("aud"))),
        ("nobody's audience", ed.sign(&with("aud", json!([])))),
        ("no subject", ed.sign(&without("sub"))),
        ("an empty subject", ed.sign(&with("sub", json!("")))),
        ("a number as subject", ed.sign(&with("sub", json!(7)))),
        ("a long subject", ed.sign(&with("sub", json!("x".repeat(300))))),
        ("no tenant", ed.sign(&with("app_metadata", json!({})))),
        ("a tenant of another kind", ed.sign(&with("app_metadata", json!({"org": ["acme"]})))),
        ("a tenant that is no name", ed.sign(&with("app_metadata", json!({"org": "a b"})))),
        ("metadata that is text", ed.sign(&with("app_metadata", json!("org")))),
        (
            "roles that are numbers",
            ed.sign(&with("app_metadata", json!({"org": "acme", "roles": [1]}))),
        ),
        (
            "too many roles",
            ed.sign(&with("app_metadata", json!({"org": "acme", "roles": vec!["r"; 300]}))),
        ),
        ("a grant that is none", ed.sign(&with("https://example.com/grants", json!(["own:*"])))),
        ("too long", ed.sign(&with("padding", json!("x".repeat(9000))))),
        ("claims that are a list", raw(&ed, "[]")),
        ("claims that are no JSON", raw(&ed, "{")),
    ];
    for (what, token) in &bad {
        let error = why_not(&hook, &dashboard(token)).await;
        assert!(error.starts_with("credentials not accepted"), "{what}: {error}");
    }
    let none = Credentials { token: None, ..dashboard("") };
    assert!(hook.authenticate(&none).await.is_err());
    assert!(hook.authenticate(&dashboard(&signed)).await.is_ok(), "and a good one is accepted");
}

fn rsa_again(rsa: &Issuer) -> Issuer {
    Issuer {
        algorithm: rsa.algorithm,
        signing: rsa.signing.clone(),
        kid: rsa.kid,
        jwk: Value::Null,
    }
}

/// A good signature over any text.
fn raw(issuer: &Issuer, payload: &str) -> String {
    let mut header = Header::new(issuer.algorithm);
    header.kid = Some(issuer.kid.into());
    let header = BASE64.encode(serde_json::to_vec(&header).unwrap());
    let message = format!("{header}.{}", BASE64.encode(payload));
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &issuer.signing, issuer.algorithm).unwrap();
    format!("{message}.{signature}")
}

#[tokio::test]
async fn clocks_may_be_apart_a_little() {
    let (hook, issuer) = (of_secret(), shared_secret("any", SECRET.as_bytes()));
    let late = issuer.sign(&with("exp", json!(seconds_from_now(-20))));
    let identity = hook.authenticate(&dashboard(&late)).await.unwrap();
    assert_eq!(identity.expires_in, Some(Duration::ZERO), "it has run out all the same");
    let early = issuer.sign(&with("nbf", json!(seconds_from_now(20))));
    assert!(hook.authenticate(&dashboard(&early)).await.is_ok());
    let parts = issuer
        .sign(&with("exp", json!(format!("{}.5", seconds_from_now(100)).parse::<f64>().unwrap())));
    let left = hook.authenticate(&dashboard(&parts)).await.unwrap().expires_in.unwrap();
    assert!((98..=101).contains(&left.as_secs()), "{left:?}");
}

#[test]
fn keys_that_are_of_no_use_here_are_left_out() {
    let good = ed25519("good");
    let mut long = ed25519("encryption");
    long.jwk["use"] = json!("enc");
    let mut other = p256("other");
    other.jwk["alg"] = json!("ES384");
    let mut short = rsa("short");
    let n = BASE64.decode(short.jwk["n"].as_str().unwrap()).unwrap();
    short.jwk["n"] = json!(BASE64.encode(&n[..128]));
    let set = json!({"keys": [
        {"kty": "oct", "k": BASE64.encode(SECRET), "kid": "secret", "alg": "HS256"},
        {"kty": "unheard-of", "kid": "u"},
        {"kty": "EC", "crv": "P-999", "x": "AA", "y": "AA"},
        "nonsense", 5, null, {},
        long.jwk, other.jwk, short.jwk, good.jwk,
    ]});
    let hook = of_set(serde_json::to_vec(&set).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        assert!(hook.authenticate(&dashboard(&good.sign(&self::good()))).await.is_ok());
        for issuer in [&long, &other, &short, &shared_secret("secret", SECRET.as_bytes())] {
            why_not(&hook, &dashboard(&issuer.sign(&self::good()))).await;
        }
        // The only key that is left needs no name.
        let nameless = good.sign_as(&self::good(), |header| header.kid = None);
        assert!(hook.authenticate(&dashboard(&nameless)).await.is_ok());
    });
}

/// Where a token says that its key is, or what its key is, is not looked at.
#[tokio::test]
async fn a_token_brings_no_key_and_names_no_place_for_one() {
    let (ours, theirs) = (ed25519("ours"), ed25519("ours"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    let hook = of_set(set_of(&[&ours]));
    let jwk: Jwk = serde_json::from_value(theirs.jwk.clone()).unwrap();
    let mut forged = vec![
        theirs.sign_as(&good(), |header| header.jku = Some(url.clone())),
        theirs.sign_as(&good(), |header| header.x5u = Some(url.clone())),
        theirs.sign_as(&good(), |header| header.jwk = Some(jwk)),
        theirs.sign_as(&good(), |header| header.x5c = Some(vec!["MIIB".into()])),
        // The place in the claims: an issuer that is nobody's.
        theirs.sign(&with("iss", json!(url.clone()))),
        ours.sign(&with("iss", json!(url.clone()))),
    ];
    // Beside a good signature it does no harm.
    let harmless = ours.sign_as(&good(), |header| header.jku = Some(url.clone()));
    assert!(hook.authenticate(&dashboard(&harmless)).await.is_ok());
    for name in ["../../etc/passwd", "ours'; DROP TABLE keys; --", "", "ours\0", "*"] {
        forged.push(theirs.sign_as(&good(), |header| header.kid = Some(name.into())));
        forged.push(ours.sign_as(&good(), |header| header.kid = Some(name.into())));
    }
    forged.push(ours.sign_as(&good(), |header| header.kid = Some("k".repeat(1_000_000))));
    for token in &forged {
        let error = why_not(&hook, &dashboard(token)).await;
        assert!(error.starts_with("credentials not accepted"), "{error}");
    }
    let asked = listener.accept().map(|_| ());
    assert_eq!(asked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nobody asked there");
}

/// At the edges of time, with clocks that may not be apart at all.
#[tokio::test]
async fn a_second_too_late_is_too_late() {
    let strict = builder(Ok(Source::Secret(SECRET.into()))).leeway(Duration::ZERO).build().unwrap();
    let issuer = shared_secret("any", SECRET.as_bytes());
    for (what, claim, seconds, is_good) in [
        ("expired a second ago", "exp", -1, false),
        ("expires in a while", "exp", 5, true),
        ("begins in a while", "nbf", 5, false),
        ("began a second ago", "nbf", -1, true),
        ("made a second ago", "iat", -1, true),
        ("made in a while", "iat", 5, false),
    ] {
        let token = issuer.sign(&with(claim, json!(seconds_from_now(seconds))));
        let answer = strict.authenticate(&dashboard(&token)).await;
        assert_eq!(answer.is_ok(), is_good, "{what}: {answer:?}");
    }
    // Clocks that may be 30 s apart.
    let hook = of_secret();
    for (claim, seconds, is_good) in [
        ("exp", -28, true),
        ("exp", -32, false),
        ("nbf", 28, true),
        ("nbf", 34, false),
        ("iat", 28, true),
        ("iat", 34, false),
    ] {
        let token = issuer.sign(&with(claim, json!(seconds_from_now(seconds))));
        let answer = hook.authenticate(&dashboard(&token)).await;
        assert_eq!(answer.is_ok(), is_good, "{claim} {seconds}: {answer:?}");
    }
    for iat in [json!("now"), json!([1]), json!({}), json!(true)] {
        let error = why_not(&hook, &dashboard(&issuer.sign(&with("iat", iat)))).await;
        assert!(error.starts_with("credentials not accepted"), "{error}");
    }
    // However far it is, it is a time; and what is none is refused.
    for exp in ["253402300800", "18446744073709551615", "18446744073709551616", "1e300"] {
        let token = raw(
            &issuer,
            &good()
                .to_string()
                .replace(&format!("\"exp\":{}", good()["exp"]), &format!("\"exp\":{exp}")),
        );
        let answer = hook.authenticate(&dashboard(&token)).await;
        if let Ok(identity) = answer {
            assert!(identity.expires_in.unwrap() > Duration::from_secs(1 << 30), "{exp}");
        }
    }
}

#[tokio::test]
async fn many_claims_are_too_long_before_they_are_many() {
    let (hook, issuer) = (of_secret(), shared_secret("any", SECRET.as_bytes()));
    let many = claims(|claims| {
        claims.extend((0..10_000).map(|n| (format!("c{n}"), json!(n))));
    });
    let error = why_not(&hook, &dashboard(&issuer.sign(&many))).await;
    assert!(error.contains("too long"), "{error}");
    // The longest that there may be, and the next one.
    let (mut longest, mut shortest) = (0, usize::MAX);
    for padding in 5800..5950 {
        let token = issuer.sign(&with("padding", json!("x".repeat(padding))));
        match hook.authenticate(&dashboard(&token)).await {
            Ok(_) => longest = longest.max(token.len()),
            Err(_) => shortest = shortest.min(token.len()),
        }
    }
    assert!(longest <= TOKEN_BYTES_MAX && shortest > TOKEN_BYTES_MAX, "{longest} {shortest}");
    assert!(
        TOKEN_BYTES_MAX - longest < 4 && shortest - TOKEN_BYTES_MAX < 4,
        "{longest} {shortest}"
    );
}

/// A set that answers what is next in line, and counts.
fn scripted(
    answers: impl IntoIterator<Item = Result<Vec<u8>, String>>,
) -> (JwtAuthenticator, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let answers = Mutex::new(answers.into_iter().collect::<VecDeque<_>>());
    let count = Arc::clone(&asked);
    let loader: keys::Loader = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        let mut answers = answers.lock().unwrap();
        if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0].clone() }
    });
    (builder(Ok(Source::Set(loader))).build().unwrap(), asked)
}

#[tokio::test(start_paused = true)]
async fn keys_rotate_and_strangers_names_cost_one_request() {
    let (old, new) = (ed25519("old"), ed25519("new"));
    let both = set_of(&[&old, &new]);
    let (hook, asked) = scripted([Ok(set_of(&[&old])), Ok(both)]);
    let shows = |issuer: &Issuer| dashboard(&issuer.sign(&good()));
    // Many at once, and one request for all.
    let all: Vec<_> = (0..50).map(|_| shows(&old)).collect();
    let all = futures_util::future::join_all(all.iter().map(|one| hook.authenticate(one))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    // Too soon after that one: whoever makes up names asks for nothing.
    for n in 0..20 {
        let made_up = old.sign_as(&good(), |header| header.kid = Some(format!("made up {n}")));
        why_not(&hook, &dashboard(&made_up)).await;
    }
    why_not(&hook, &shows(&new)).await;
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(hook.authenticate(&shows(&new)).await.is_ok(), "the new key is found at once");
    assert!(hook.authenticate(&shows(&old)).await.is_ok());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_withdrawn_is_of_no_use_once_the_set_is_old() {
    let (old, new) = (ed25519("old"), ed25519("new"));
    let none = serde_json::to_vec(&json!({"keys": []})).unwrap();
    let (hook, _) = scripted([Ok(set_of(&[&old, &new])), Ok(set_of(&[&new])), Ok(none)]);
    let shows = |issuer: &Issuer| dashboard(&issuer.sign(&good()));
    assert!(hook.authenticate(&shows(&old)).await.is_ok());
    tokio::time::advance(Duration::from_secs(601)).await;
    let error = why_not(&hook, &shows(&old)).await;
    assert!(error.starts_with("credentials not accepted"), "{error}");
    assert!(hook.authenticate(&shows(&new)).await.is_ok());
    // Nor is any if all were.
    tokio::time::advance(Duration::from_secs(601)).await;
    let error = why_not(&hook, &shows(&new)).await;
    assert!(error.starts_with("credentials not accepted"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_last_good_keys_go_on_for_a_day() {
    let issuer = ed25519("a");
    let down = || Err("no route to host".to_owned());
    let (hook, asked) = scripted([down(), Ok(set_of(&[&issuer])), down()]);
    let token = dashboard(&issuer.sign(&good()));
    let error = hook.authenticate(&token).await.unwrap_err();
    assert!(matches!(error, AuthError::Unavailable(_)), "{error}");
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(hook.authenticate(&token).await.is_ok());
    // Old, and not to be had: asked for behind, and no oftener than may be.
    tokio::time::advance(Duration::from_secs(23 * 3600)).await;
    for _ in 0..20 {
        assert!(hook.authenticate(&token).await.is_ok());
    }
    while asked.load(Ordering::SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    tokio::time::advance(Duration::from_secs(3600)).await;
    let error = hook.authenticate(&token).await.unwrap_err();
    assert!(matches!(error, AuthError::Unavailable(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_waiting_takes_nothing_from_the_others() {
    let issuer = ed25519("a");
    let (hook, asked) = scripted([Ok(set_of(&[&issuer]))]);
    let token = dashboard(&issuer.sign(&good()));
    {
        let mut first = hook.authenticate(&token);
        let waker = std::task::Waker::noop();
        let pending = first.as_mut().poll(&mut std::task::Context::from_waker(waker));
        assert!(pending.is_pending());
    }
    assert!(hook.authenticate(&token).await.is_ok());
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reading_that_panicked_is_not_the_last() {
    let issuer = ed25519("a");
    let (set, first) = (set_of(&[&issuer]), AtomicUsize::new(0));
    let loader: keys::Loader = Box::new(move || {
        assert!(first.fetch_add(1, Ordering::SeqCst) > 0, "a panic on purpose");
        Ok(set.clone())
    });
    let hook = builder(Ok(Source::Set(loader))).build().unwrap();
    let token = dashboard(&issuer.sign(&good()));
    assert!(hook.authenticate(&token).await.is_err());
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(hook.authenticate(&token).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_new_key_of_an_issuer_that_is_down_may_come_again() {
    let (old, new) = (ed25519("old"), ed25519("new"));
    let (before, after) = (set_of(&[&old]), set_of(&[&old, &new]));
    let (hook, _) = scripted([Ok(before), Err("down".to_owned()), Ok(after)]);
    let shows = |issuer: &Issuer| dashboard(&issuer.sign(&good()));
    assert!(hook.authenticate(&shows(&old)).await.is_ok());
    tokio::time::advance(Duration::from_secs(11)).await;
    for _ in 0..2 {
        let error = hook.authenticate(&shows(&new)).await.unwrap_err();
        assert!(matches!(error, AuthError::Unavailable(_)), "{error}");
        assert!(hook.authenticate(&shows(&old)).await.is_ok(), "that one is still known");
    }
    tokio::time::advance(Duration::from_secs(11)).await;
    assert!(hook.authenticate(&shows(&new)).await.is_ok());
}

#[tokio::test]
async fn what_stands_in_a_token_is_not_in_the_reason() {
    let issuer = ed25519("a");
    let hook = of_set(set_of(&[&issuer]));
    let error = why_not(&hook, &dashboard(&raw(&issuer, "\"a private word\""))).await;
    assert!(!error.contains("private"), "{error}");
}

/// Serves HTTP answers, one to a connection; returns its URL.
fn serve(answers: Vec<Vec<u8>>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for answer in answers {
            let (mut socket, _) = listener.accept().unwrap();
            let mut head = [0; 4096];
            let _ = socket.read(&mut head);
            let _ = socket.write_all(&answer);
        }
    });
    url
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[tokio::test]
async fn sets_come_from_urls_and_files() {
    let issuer = p256("a");
    let token = dashboard(&issuer.sign(&good()));
    let set = set_of(&[&issuer]);
    let at = |url: &str| builder(keys::from_url(url).map(Source::Set)).build();
    let hook = at(&serve(vec![http("200 OK", "", &set)])).unwrap();
    assert!(hook.authenticate(&token).await.is_ok());

    for answer in [
        http("404 Not Found", "", b"gone"),
        http("302 Found", "Location: http://127.0.0.1:1/\r\n", b""),
        http("200 OK", "", b"{}"),
        http("200 OK", "", &vec![b' '; 300 * 1024]),
        b"nonsense\r\n\r\n".to_vec(),
    ] {
        let hook = at(&serve(vec![answer])).unwrap();
        let error = hook.authenticate(&token).await.unwrap_err();
        assert!(matches!(error, AuthError::Unavailable(_)), "{error}");
    }
    for url in ["http://id.example/keys", "ftp://id.example", "https://", "keys", ""] {
        assert_eq!(at(url).unwrap_err(), JwtSetupError::InsecureUrl, "{url}");
    }

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &set).unwrap();
    let source = Ok(Source::Set(keys::from_file(file.path().into())));
    assert!(builder(source).build().unwrap().authenticate(&token).await.is_ok());
}

#[test]
fn what_matters_must_be_said() {
    let secret = || JwtAuthenticator::secret(SECRET);
    let tenant = "acme".parse::<TenantId>().unwrap();
    assert_eq!(JwtAuthenticator::secret("short").build().unwrap_err(), JwtSetupError::ShortSecret);
    let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----";
    assert_eq!(JwtAuthenticator::secret(pem).build().unwrap_err(), JwtSetupError::PemSecret);
    assert_eq!(secret().build().unwrap_err(), JwtSetupError::NoIssuer);
    assert_eq!(secret().any_issuer().build().unwrap_err(), JwtSetupError::NoAudience);
    let nearly = secret().any_issuer().any_audience();
    assert_eq!(nearly.build().unwrap_err(), JwtSetupError::NoTenant);
    let built = secret().any_issuer().any_audience().tenant(tenant.clone());
    let said = format!("{built:?}");
    let said = format!("{said} {:?}", built.leeway(Duration::ZERO).build().unwrap());
    assert!(!said.contains(SECRET) && !said.contains("97, 32, 115"), "{said}");
    let supabase = JwtAuthenticator::supabase("http://127.0.0.1:54321/").tenant(tenant);
    assert_eq!(supabase.issuers, Some(vec!["http://127.0.0.1:54321/auth/v1".into()]));
    assert!(supabase.build().is_ok());
}

proptest! {
    /// However a token is changed, it is another one, and not accepted.
    #[test]
    fn no_change_of_a_token_is_accepted(at in any::<prop::sample::Index>(), to in any::<char>()) {
        let issuer = shared_secret("any", SECRET.as_bytes());
        let hook = of_secret();
        let token = issuer.sign(&good());
        let at = at.index(token.len());
        let mut changed: Vec<char> = token.chars().collect();
        prop_assume!(changed[at] != to);
        changed[at] = to;
        let changed: String = changed.into_iter().collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let answer = runtime.block_on(hook.authenticate(&dashboard(&changed)));
        prop_assert!(answer.is_err(), "{changed}");
    }

    #[test]
    fn nothing_makes_it_panic(token in ".*", parts in prop::collection::vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
        let hook = of_secret();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for token in [token, parts.join(".")] {
            prop_assert!(runtime.block_on(hook.authenticate(&dashboard(&token))).is_err());
        }
    }

    /// Whatever its claims are, an identity has what they say or there is none.
    #[test]
    fn any_claims_are_read_or_refused(tenant in "\\PC{0,12}", subject in "\\PC{0,12}") {
        let hook = of_secret();
        let claims = claims(|claims| {
            claims.insert("sub".into(), json!(subject.clone()));
            claims.insert("app_metadata".into(), json!({"org": tenant.clone()}));
        });
        let token = shared_secret("any", SECRET.as_bytes()).sign(&claims);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        match runtime.block_on(hook.authenticate(&dashboard(&token))) {
            Ok(identity) => {
                prop_assert_eq!(identity.tenant.as_str(), tenant);
                prop_assert_eq!(identity.subject, subject);
            }
            Err(_) => prop_assert!(subject.is_empty() || tenant.parse::<TenantId>().is_err()),
        }
    }
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn it_keeps_what_every_authenticator_must() {
    let (hook, issuer) = (of_secret(), shared_secret("any", SECRET.as_bytes()));
    let ann = dashboard(&issuer.sign(&good()));
    let build = agent("build-1", &issuer.sign(&with("agents", json!("build-1"))));
    let mut good = Vec::new();
    for one in [ann, build] {
        let identity = hook.authenticate(&one).await.unwrap();
        good.push((one, identity));
    }
    let bad = [dashboard("nonsense"), dashboard(&issuer.sign(&without("sub")))];
    crate::testing::authenticator(&hook, &good, &bad).await;
}
