//! What a handshake may say beyond RFC 6455: from which pages, over which
//! proxies, and where its credentials stand.

use std::net::IpAddr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ipnet::IpNet;
use percent_encoding::percent_decode_str;
#[cfg(feature = "polling")]
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::uri::Authority;
use tokio_tungstenite::tungstenite::http::{HeaderMap, Uri, header};
use trunkline_protocol::message::Secret;

/// Begins a subprotocol that is a token, in base64url without padding: the
/// only place where a page can put one that is neither logged nor cached.
const TOKEN_SUBPROTOCOL: &str = "trunkline.bearer.";

/// The name of RFC 6750 §2.3.
const TOKEN_PARAMETER: &str = "access_token";

/// Addresses in one `X-Forwarded-For` that are looked at, from the right.
const HOPS_MAX: usize = 16;

/// Where a web page comes from (RFC 6454): `https://app.example.com`, with a
/// port if it is not the usual one.
///
/// ```
/// use trunkline_server::Origin;
///
/// let origin: Origin = "https://App.example.com:443".parse()?;
/// assert_eq!(origin.to_string(), "https://app.example.com");
/// assert!("app.example.com".parse::<Origin>().is_err());
/// # Ok::<(), trunkline_server::OriginError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    scheme: String,
    host: String,
    /// Not if it is the scheme's own.
    port: Option<u16>,
}

/// A text that names no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an origin is http:// or https://, a host, and a port if need be: no path, no wildcard")]
pub struct OriginError;

impl FromStr for Origin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let uri: Uri = text.parse().map_err(|_| OriginError)?;
        let scheme = uri.scheme_str().ok_or(OriginError)?.to_ascii_lowercase();
        let usual = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return Err(OriginError),
        };
        let authority = uri.authority().ok_or(OriginError)?;
        let host = authority.host().to_ascii_lowercase();
        // `Uri` reads an empty path as `/`.
        let is_bare = text.ends_with(authority.as_str());
        if host.is_empty() || host.contains('*') || authority.as_str().contains('@') || !is_bare {
            return Err(OriginError);
        }
        // The parser leaves a port that is none unread.
        let rest = &authority.as_str()[authority.host().len()..];
        let port = match rest.strip_prefix(':') {
            Some(port) => Some(port.parse().map_err(|_| OriginError)?),
            None if rest.is_empty() => None,
            None => return Err(OriginError),
        };
        Ok(Self { scheme, host, port: port.filter(|port| *port != usual) })
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme, self.host)?;
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

/// What a hub's embedder has decided about handshakes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Door {
    /// Pages from elsewhere that may connect.
    pub(crate) origins: Vec<Origin>,
    /// Whose word on where a link comes from is taken.
    pub(crate) proxies: Vec<IpNet>,
    /// A token may stand in the URL.
    pub(crate) query_tokens: bool,
    /// Whoever connects is let in, so that being able to connect is all that
    /// a page needs.
    pub(crate) is_open_to_anyone: bool,
}

impl Door {
    /// Whether a link from there was passed on by somebody who is believed.
    pub(crate) fn is_proxy(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.proxies.iter().any(|proxies| proxies.contains(&address))
    }

    /// A browser names the origin of the page that connects (RFC 6455 §10.2):
    /// it must be the host that it connects to, or one that was allowed, or
    /// any page could drive a hub that its visitor can reach. Programs name
    /// none.
    ///
    /// Where no credentials are asked for, that is not enough: a page's own
    /// name may be made to lead to this machine once the page is there (DNS
    /// rebinding). What leads here for certain is an address, or `localhost`.
    pub(crate) fn lets_in(&self, headers: &HeaderMap) -> bool {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = origins.next() else { return true };
        let (Ok(origin), None) = (origin.to_str(), origins.next()) else { return false };
        is_same_origin(origin, headers) && (!self.is_open_to_anyone || is_not_by_dns(headers))
            || origin.parse().is_ok_and(|origin| self.origins.contains(&origin))
    }

    /// Whether pages of this origin were allowed to connect, wherever they are
    /// from.
    #[cfg(feature = "polling")]
    pub(crate) fn allows_by_name(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().ok().and_then(|origin| origin.parse().ok());
        origin.is_some_and(|origin| self.origins.contains(&origin))
    }

    /// The token that a handshake carries, if any. `Err` when there are
    /// several (RFC 6750 §2), or one that cannot be read.
    pub(crate) fn token(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Option<Secret>, &'static str> {
        let mut tokens = Vec::new();
        for value in headers.get_all(header::AUTHORIZATION) {
            tokens.extend(value.to_str().ok().and_then(bearer));
        }
        for name in subprotocols(headers) {
            if let Some(token) = name.strip_prefix(TOKEN_SUBPROTOCOL) {
                let bytes = URL_SAFE_NO_PAD.decode(token).ok();
                let token = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
                tokens.push(token.ok_or("trunkline.bearer. is followed by a token in base64url")?);
            }
        }
        for pair in uri.query().unwrap_or_default().split('&') {
            if let Some((TOKEN_PARAMETER, token)) = pair.split_once('=') {
                if !self.query_tokens {
                    return Err("no token is taken from a URL here");
                }
                let token = percent_decode_str(token).decode_utf8();
                tokens.push(token.map_err(|_| "access_token must be UTF-8")?.into_owned());
            }
        }
        match (tokens.pop(), tokens.pop()) {
            (token, None) => Ok(token.map(Secret::from)),
            (_, Some(_)) => Err("a token is given once, in one place"),
        }
    }

    /// Where a link that a believed proxy has passed on comes from: the last
    /// address in `X-Forwarded-For` that is not such a proxy itself. What
    /// stands to the left of it anybody may have written.
    pub(crate) fn forwarded_for(&self, headers: &HeaderMap) -> Option<IpAddr> {
        let lists: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
        let hops = lists
            .iter()
            .rev()
            .filter_map(|list| list.to_str().ok())
            .flat_map(|list| list.rsplit(','))
            .map(|hop| hop.trim().parse::<IpAddr>());
        for hop in hops.take(HOPS_MAX) {
            match hop {
                Ok(address) if self.is_proxy(address) => {}
                Ok(address) => return Some(address),
                Err(_) => return None,
            }
        }
        None
    }
}

/// What was asked for, said once (RFC 9110 §7.2).
fn host(headers: &HeaderMap) -> Option<&str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok(),
        (_, _) => None,
    }
}

fn is_same_origin(origin: &str, headers: &HeaderMap) -> bool {
    let Some(host) = host(headers) else { return false };
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

/// Whether what was asked for is an address, or a name that leads to one
/// without being looked up anywhere (RFC 6761 §6.3).
fn is_not_by_dns(headers: &HeaderMap) -> bool {
    let Some(host) = host(headers).and_then(|host| host.parse::<Authority>().ok()) else {
        return false;
    };
    let name = host.host();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or_default();
    address.parse::<IpAddr>().is_ok() || last.eq_ignore_ascii_case("localhost")
}

fn bearer(value: &str) -> Option<String> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
}

/// The subprotocols that are offered (RFC 6455 §4.1, in one header or in
/// several).
pub(super) fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    lists.filter_map(|list| list.to_str().ok()).flat_map(|list| list.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    #[cfg(not(feature = "polling"))]
    use tokio_tungstenite::tungstenite::http::HeaderValue;

    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn origins_are_exact() {
        for (text, expected) in [
            ("https://app.example.com", Some("https://app.example.com")),
            ("HTTPS://APP.example.com", Some("https://app.example.com")),
            ("http://localhost:3000", Some("http://localhost:3000")),
            ("http://[::1]:3000", Some("http://[::1]:3000")),
            ("https://a.example:443", Some("https://a.example")),
            ("http://a.example:443", Some("http://a.example:443")),
            ("https://a.example/", None),
            ("https://a.example/path", None),
            ("https://*.example", None),
            ("https://user@a.example", None),
            ("https://a.example:port", None),
            ("https://a.example:99999", None),
            ("ws://a.example", None),
            ("a.example", None),
            ("null", None),
            ("*", None),
            ("", None),
        ] {
            let parsed = text.parse::<Origin>().ok().map(|origin| origin.to_string());
            assert_eq!(parsed.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn a_page_is_let_in_from_its_own_host_or_by_name() {
        let door =
            Door { origins: vec!["https://app.example".parse().unwrap()], ..Door::default() };
        for (origin, is_let_in) in [
            ("https://hub.example:7070", true),
            ("http://HUB.example:7070", true),
            ("https://app.example", true),
            ("https://app.example:443", true),
            ("http://app.example", false),
            ("https://app.example.evil.example", false),
            ("https://evil.example/https://app.example", false),
            ("https://hub.example", false),
            ("null", false),
            ("", false),
        ] {
            let headers = headers(&[("host", "hub.example:7070"), ("origin", origin)]);
            assert_eq!(door.lets_in(&headers), is_let_in, "{origin}");
        }
        assert!(door.lets_in(&headers(&[("host", "hub.example:7070")])), "a program names none");
        let twice = [("host", "h"), ("origin", "https://app.example"), ("origin", "http://h")];
        assert!(!door.lets_in(&headers(&twice)));
        let two_hosts = [("host", "h"), ("host", "other"), ("origin", "http://h")];
        assert!(!door.lets_in(&headers(&two_hosts)));
    }

    /// A name that is its attacker's, and leads here for now.
    #[test]
    fn without_credentials_a_page_is_let_in_from_what_no_stranger_can_name() {
        let origins = vec!["https://app.example".parse().unwrap()];
        let door = Door { origins, is_open_to_anyone: true, ..Door::default() };
        for (host, is_let_in) in [
            ("127.0.0.1:7070", true),
            ("[::1]:7070", true),
            ("192.0.2.7", true),
            ("localhost:7070", true),
            ("LOCALHOST", true),
            ("hub.localhost:7070", true),
            ("evil.example:7070", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:7070", false),
            ("localhost.", false),
            ("evil.example", false),
            ("", false),
        ] {
            let page = format!("http://{host}");
            let lines = headers(&[("host", host), ("origin", &page)]);
            assert_eq!(door.lets_in(&lines), is_let_in, "{host}");
            assert!(door.lets_in(&headers(&[("host", host)])), "a program names no origin");
            let allowed = headers(&[("host", host), ("origin", "https://app.example")]);
            assert!(door.lets_in(&allowed), "it was allowed by name");
        }
    }

    #[test]
    fn a_token_stands_in_one_place() {
        let open = Door { query_tokens: true, ..Door::default() };
        let closed = Door::default();
        let token = |door: &Door, path: &str, lines: &[(&'static str, &str)]| {
            let token = door.token(&path.parse().unwrap(), &headers(lines));
            token.map(|token| token.map(|token| token.reveal().to_owned()))
        };
        let header = ("authorization", "Bearer a.b");
        // "a.b" in base64url is "YS5i".
        let subprotocol = ("sec-websocket-protocol", "trunkline.v1, trunkline.bearer.YS5i");
        assert_eq!(token(&closed, "/", &[]), Ok(None));
        assert_eq!(token(&closed, "/", &[header]), Ok(Some("a.b".into())));
        assert_eq!(token(&closed, "/", &[subprotocol]), Ok(Some("a.b".into())));
        assert_eq!(token(&open, "/hub?x=1&access_token=a%2Eb", &[]), Ok(Some("a.b".into())));
        assert!(token(&closed, "/?access_token=a", &[]).is_err(), "it is switched off");
        assert!(token(&open, "/?access_token=%ff", &[]).is_err());
        assert!(token(&closed, "/", &[header, header]).is_err());
        assert!(token(&closed, "/", &[header, subprotocol]).is_err());
        assert!(token(&open, "/?access_token=a", &[header]).is_err());
        let broken = ("sec-websocket-protocol", "trunkline.v1, trunkline.bearer.Y=");
        assert!(token(&closed, "/", &[broken]).is_err());
        assert_eq!(token(&closed, "/", &[("authorization", "Basic YTpi")]), Ok(None));
    }

    #[test]
    fn a_proxy_is_believed_about_the_last_stranger_only() {
        let door = Door {
            proxies: vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            ..Door::default()
        };
        let source = |lists: &[&str]| {
            let lines: Vec<_> = lists.iter().map(|list| ("x-forwarded-for", *list)).collect();
            door.forwarded_for(&headers(&lines)).map(|address| address.to_string())
        };
        assert!(door.is_proxy("10.1.2.3".parse().unwrap()));
        assert!(door.is_proxy("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!door.is_proxy("192.0.2.1".parse().unwrap()));
        assert_eq!(source(&["192.0.2.1"]).as_deref(), Some("192.0.2.1"));
        assert_eq!(source(&["198.51.100.9, 192.0.2.1, 10.0.0.2"]).as_deref(), Some("192.0.2.1"));
        assert_eq!(source(&["198.51.100.9", "192.0.2.1"]).as_deref(), Some("192.0.2.1"));
        assert_eq!(source(&["192.0.2.1, nonsense"]), None, "who wrote that writes nonsense");
        assert_eq!(source(&["10.0.0.1"]), None);
        assert_eq!(source(&[]), None);
        let long = vec!["10.0.0.1"; 5000].join(",");
        assert_eq!(source(&[&format!("192.0.2.1,{long}")]), None, "only so many are looked at");
    }
}
