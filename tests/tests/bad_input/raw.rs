//! A WebSocket peer by hand: it keeps no rule of RFC 6455 that its test does
//! not keep.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// How long a test waits for what must come. Only a failing test takes it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An opening handshake without a fault.
pub(crate) const REQUEST: &str = "GET / HTTP/1.1\r\n\
     Host: hub.example\r\n\
     Connection: Upgrade\r\n\
     Upgrade: websocket\r\n\
     Sec-WebSocket-Version: 13\r\n\
     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
     Sec-WebSocket-Protocol: trunkline.v1\r\n\
     \r\n";

pub(crate) const FIN: u8 = 0x80;
pub(crate) const CONTINUE: u8 = 0x0;
pub(crate) const TEXT: u8 = 0x1;
pub(crate) const BINARY: u8 = 0x2;
pub(crate) const CLOSE: u8 = 0x8;
pub(crate) const PING: u8 = 0x9;
pub(crate) const PONG: u8 = 0xa;

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// The header of a masked frame whose mask is zero, so that the payload can
/// follow as it is.
pub(crate) fn head(first: u8, len: u64) -> Vec<u8> {
    let mut head = vec![first];
    match len {
        0..126 => head.push(0x80 | u8::try_from(len).unwrap()),
        126..0x1_0000 => {
            head.push(0x80 | 0x7e);
            head.extend(u16::try_from(len).unwrap().to_be_bytes());
        }
        _ => {
            head.push(0x80 | 0x7f);
            head.extend(len.to_be_bytes());
        }
    }
    head.extend([0; 4]);
    head
}

/// A masked frame.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = head(first, payload.len() as u64);
    let mask_at = frame.len() - 4;
    frame[mask_at..].copy_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// A whole text message.
pub(crate) fn text(json: &str) -> Vec<u8> {
    frame(FIN | TEXT, json.as_bytes())
}

/// A close frame.
pub(crate) fn close(code: u16, reason: &str) -> Vec<u8> {
    frame(FIN | CLOSE, &[&code.to_be_bytes(), reason.as_bytes()].concat())
}

/// The text after `"key":"`, in the compact JSON that the hub writes.
pub(crate) fn word<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = json.split_once(&format!("\"{key}\":\""))?;
    rest.split_once('"').map(|(word, _)| word)
}

/// The number after `"key":`.
pub(crate) fn number(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.split_once(&format!("\"{key}\":"))?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What the hub sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Text(String),
    Binary(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16, String),
    /// The hub ended its direction, or reset the connection.
    End,
}

/// One connection to the hub.
pub(crate) struct Raw<S = TcpStream> {
    pub(crate) socket: S,
    read: Vec<u8>,
}

impl Raw {
    /// The half that is heard and the half that is said, for floods that go on
    /// until the hub has had enough.
    pub(crate) fn split(self) -> (Raw<OwnedReadHalf>, OwnedWriteHalf) {
        let (socket, write) = self.socket.into_split();
        (Raw { socket, read: self.read }, write)
    }

    /// Connected, and not a byte said.
    pub(crate) async fn dial(address: SocketAddr) -> Self {
        let socket = timeout(PATIENCE, TcpStream::connect(address)).await.unwrap().unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket, read: Vec::new() }
    }

    /// Through the handshake, and not a frame said.
    pub(crate) async fn upgraded(address: SocketAddr) -> Self {
        let mut raw = Self::dial(address).await;
        let response = raw.ask(REQUEST.as_bytes()).await;
        assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
        raw
    }

    /// Sends an HTTP request and returns the whole answer: of a refusal up to
    /// the end of the connection, of a 101 its head.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> String {
        let _ = self.send(request).await;
        self.answer().await
    }

    /// The answer to an HTTP request.
    pub(crate) async fn answer(&mut self) -> String {
        loop {
            if self.read.starts_with(b"HTTP/1.1 101 ")
                && let Some(end) = self.read.windows(4).position(|four| four == b"\r\n\r\n")
            {
                let rest = self.read.split_off(end + 4);
                return String::from_utf8(std::mem::replace(&mut self.read, rest)).unwrap();
            }
            if !self.more().await {
                return String::from_utf8(std::mem::take(&mut self.read)).unwrap();
            }
        }
    }

    /// Sends bytes. Fails when the hub has closed, which an attack may ignore.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        timeout(PATIENCE, self.socket.write_all(bytes)).await.expect("the hub reads")
    }

    /// Sends a text message that must get out.
    pub(crate) async fn say(&mut self, json: &str) {
        self.send(&text(json)).await.unwrap();
    }

    /// The hub closes with this code, says why, is answered, and ends the
    /// connection.
    pub(crate) async fn closed(&mut self, expected: u16) -> String {
        let reason = self.heard_close(expected).await;
        let _ = self.send(&close(expected, "")).await;
        self.ended().await;
        reason
    }

    /// Proves, by a round trip, that the link lives and what was said before
    /// has been handled.
    pub(crate) async fn lives(&mut self, n: u64) {
        self.say(&format!(r#"{{"type":"heartbeat:ping","payload":{{"n":{n}}}}}"#)).await;
        loop {
            let pong = self.until("heartbeat:pong").await;
            if number(&pong, "n") == Some(n) {
                return;
            }
        }
    }
}

impl<S: AsyncRead + Unpin> Raw<S> {
    /// Waits for more bytes; false at the end.
    async fn more(&mut self) -> bool {
        let read = self.socket.read_buf(&mut self.read);
        let read = timeout(PATIENCE, read).await.expect("the hub says something, or ends");
        read.is_ok_and(|bytes| bytes > 0)
    }

    /// The next frame of the hub.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            if let Some((heard, length)) = parse(&self.read) {
                self.read.drain(..length);
                return heard;
            }
            if !self.more().await {
                return Heard::End;
            }
        }
    }

    /// The next message of this type; others are passed over, but no end.
    pub(crate) async fn until(&mut self, kind: &str) -> String {
        loop {
            match self.hear().await {
                Heard::Text(json) if word(&json, "type") == Some(kind) => return json,
                Heard::Text(_) | Heard::Binary(_) | Heard::Pong(_) => {}
                end => panic!("{end:?} while waiting for {kind}"),
            }
        }
    }

    /// The next `error` has this code and names this field.
    pub(crate) async fn refused(&mut self, code: &str, field: Option<&str>) -> String {
        let json = self.until("error").await;
        assert_eq!(word(&json, "code"), Some(code), "{json}");
        assert_eq!(word(&json, "field"), field, "{json}");
        json
    }

    /// The hub closes with this code and says why.
    pub(crate) async fn heard_close(&mut self, expected: u16) -> String {
        let reason = loop {
            match self.hear().await {
                Heard::Close(code, reason) => {
                    assert_eq!(code, expected, "{reason}");
                    break reason;
                }
                Heard::Text(_) | Heard::Binary(_) | Heard::Pong(_) => {}
                Heard::End => panic!("ended without a close; expected {expected}"),
            }
        };
        assert!(!reason.is_empty(), "a close says why");
        reason
    }

    /// The next pong of the WebSocket itself.
    pub(crate) async fn hear_pong(&mut self) -> Vec<u8> {
        loop {
            match self.hear().await {
                Heard::Pong(payload) => return payload,
                Heard::Text(_) | Heard::Binary(_) => {}
                end => panic!("{end:?} while waiting for a pong"),
            }
        }
    }

    /// Nothing comes any more.
    pub(crate) async fn ended(&mut self) {
        assert_eq!(self.hear().await, Heard::End);
    }
}

/// A frame of the hub at the beginning of `bytes`, and its length.
fn parse(bytes: &[u8]) -> Option<(Heard, usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    assert_eq!(first & 0x70, 0, "no extension was agreed");
    assert_eq!(second & 0x80, 0, "a server does not mask");
    assert_eq!(first & FIN, FIN, "the hub does not fragment");
    let (start, len) = match second {
        126 => (4, usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().unwrap()))),
        127 => {
            let len = u64::from_be_bytes(bytes.get(2..10)?.try_into().unwrap());
            (10, usize::try_from(len).unwrap())
        }
        len => (2, usize::from(len)),
    };
    let payload = bytes.get(start..start + len)?.to_vec();
    let heard = match first & 0x0f {
        TEXT => Heard::Text(String::from_utf8(payload).unwrap()),
        BINARY => Heard::Binary(payload),
        PONG => Heard::Pong(payload),
        CLOSE => match payload.split_at_checked(2) {
            Some((code, reason)) => Heard::Close(
                u16::from_be_bytes(code.try_into().unwrap()),
                String::from_utf8(reason.to_vec()).unwrap(),
            ),
            None => Heard::Close(1005, String::new()),
        },
        other => panic!("opcode {other}"),
    };
    Some((heard, start + len))
}
