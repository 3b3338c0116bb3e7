//! Just enough WebSocket and trunkline to load a server cheaply: ready-made
//! frames out, and a reader that touches little more than headers.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Whatever goes wrong ends the measurement, and is printed.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Header of a binary `terminal:output`.
const OUTPUT_HEADER_BYTES: usize = 28;

/// Header of an agent's frame of 126 to 65,535 bytes: two bytes, the length,
/// and a mask of zeros, which leaves the payload as it is.
const AGENT_FRAME_HEADER_BYTES: usize = 8;

/// The stream that the agent writes.
pub const STREAM: u128 = 0x0191_d4a8_5a3c_7f00_8000_0000_0000_0001;

/// One chunk on the wire: `bytes` of terminal, the first eight of which are
/// the chunk's number, so that a reader can tell them from any others.
#[derive(Debug, Clone, Copy)]
pub struct Chunks {
    /// Of terminal, its number included.
    pub bytes: usize,
}

impl Chunks {
    /// What the agent writes for one chunk.
    pub fn agent_frame_bytes(self) -> usize {
        AGENT_FRAME_HEADER_BYTES + OUTPUT_HEADER_BYTES + self.bytes
    }

    /// Appends the agent's frame for chunk `number`.
    pub fn append_agent_frame(self, number: u64, to: &mut Vec<u8>) {
        let offset = number * self.bytes as u64;
        let [high, low] = self.frame_len();
        to.extend_from_slice(&[0x82, 0xFE, high, low, 0, 0, 0, 0]);
        to.extend_from_slice(&[0x01, 0, 0, 0]);
        to.extend_from_slice(&STREAM.to_be_bytes());
        to.extend_from_slice(&offset.to_be_bytes());
        to.extend_from_slice(&number.to_be_bytes());
        to.resize(to.len() + self.bytes - 8, b'x');
    }

    /// Appends the server's frame for the agent's.
    pub fn append_server_frame(self, agent_frame: &[u8], to: &mut Vec<u8>) {
        let [high, low] = self.frame_len();
        to.extend_from_slice(&[0x82, 126, high, low]);
        to.extend_from_slice(&agent_frame[AGENT_FRAME_HEADER_BYTES..]);
    }

    #[expect(clippy::cast_possible_truncation, reason = "chunks are at most 16 KiB")]
    fn frame_len(self) -> [u8; 2] {
        ((OUTPUT_HEADER_BYTES + self.bytes) as u16).to_be_bytes()
    }
}

/// What a server sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Terminal bytes of the agent's stream, the first of which stands at
    /// `offset`. `begins` says whether a frame begins with them.
    Output {
        /// Of the first byte in the stream.
        offset: u64,
        /// What has arrived of the frame.
        bytes: &'a [u8],
        /// Whether a frame begins here.
        begins: bool,
    },
    /// A message.
    Text(&'a str),
}

/// Reads a server's frames from whatever pieces they arrive in, without
/// copying terminal bytes.
#[derive(Debug, Default)]
pub struct Incoming {
    state: State,
    /// The beginning of a header that has not arrived whole, or a text.
    partial: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Header,
    Output {
        offset: u64,
        left: usize,
        begins: bool,
    },
    Text {
        left: usize,
    },
}

impl Incoming {
    /// Takes bytes as they arrive, and gives what they hold.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        mut take: impl FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        while !bytes.is_empty() {
            match self.state {
                State::Header if self.partial.is_empty() => {
                    let Some((state, len)) = header(bytes)? else {
                        self.partial.extend_from_slice(bytes);
                        return Ok(());
                    };
                    self.state = state;
                    bytes = &bytes[len..];
                }
                State::Header => {
                    self.partial.push(bytes[0]);
                    bytes = &bytes[1..];
                    if let Some((state, _)) = header(&self.partial)? {
                        self.state = state;
                        self.partial.clear();
                    }
                }
                State::Output { offset, left, begins } => {
                    let (now, rest) = bytes.split_at(left.min(bytes.len()));
                    take(Piece::Output { offset, bytes: now, begins })?;
                    bytes = rest;
                    self.state = match left - now.len() {
                        0 => State::Header,
                        left => {
                            let offset = offset + now.len() as u64;
                            State::Output { offset, left, begins: false }
                        }
                    };
                }
                State::Text { left } => {
                    let (now, rest) = bytes.split_at(left.min(bytes.len()));
                    self.partial.extend_from_slice(now);
                    bytes = rest;
                    self.state = State::Text { left: left - now.len() };
                    if left == now.len() {
                        self.state = State::Header;
                        take(Piece::Text(std::str::from_utf8(&self.partial)?))?;
                        self.partial.clear();
                    }
                }
            }
        }
        Ok(())
    }
}

/// The header at the beginning of `bytes` and its length, if it is there whole.
fn header(bytes: &[u8]) -> Result<Option<(State, usize)>> {
    let Some((&[first, second], rest)) = bytes.split_first_chunk() else { return Ok(None) };
    let (len, at) = match second {
        0..126 => (usize::from(second), 2),
        126 => {
            let Some(len) = rest.first_chunk() else { return Ok(None) };
            (usize::from(u16::from_be_bytes(*len)), 4)
        }
        127 => {
            let Some(len) = rest.first_chunk() else { return Ok(None) };
            (usize::try_from(u64::from_be_bytes(*len))?, 10)
        }
        128.. => return Err("a server's frame is masked".into()),
    };
    match first {
        0x81 => Ok(Some((State::Text { left: len }, at))),
        0x82 => {
            let Some(output) = bytes.get(at..at + OUTPUT_HEADER_BYTES) else { return Ok(None) };
            if output[0] != 0x01 || output[4..20] != STREAM.to_be_bytes() {
                return Err("a binary frame is no output of the agent's stream".into());
            }
            let offset = output.last_chunk().ok_or("a header without an offset")?;
            let offset = u64::from_be_bytes(*offset);
            let left = len.checked_sub(OUTPUT_HEADER_BYTES).ok_or("a frame without output")?;
            Ok(Some((State::Output { offset, left, begins: true }, at + OUTPUT_HEADER_BYTES)))
        }
        0x88 => Err("the server closed the link".into()),
        other => Err(format!("a frame that begins with {other:#x}").into()),
    }
}

/// A client's text frame.
pub fn client_text(json: &str) -> Result<Vec<u8>> {
    let mut frame = vec![0x81];
    if let Ok(len @ 0..126) = u8::try_from(json.len()) {
        frame.push(0x80 | len);
    } else {
        frame.push(0xFE);
        frame.extend_from_slice(&u16::try_from(json.len())?.to_be_bytes());
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(json.as_bytes());
    Ok(frame)
}

/// Reads one frame of [`client_text`] and drops it.
pub fn skip_client_text(from: &mut impl Read) -> io::Result<()> {
    let mut head = [0; 2];
    from.read_exact(&mut head)?;
    let len = match head[1] & 0x7F {
        126 => {
            from.read_exact(&mut head)?;
            usize::from(u16::from_be_bytes(head))
        }
        len => usize::from(len),
    };
    from.read_exact(&mut vec![0; 4 + len])
}

/// A server's text frame of fewer than 126 bytes.
pub fn server_text(json: &str) -> Result<Vec<u8>> {
    let len = u8::try_from(json.len())?;
    assert!(len < 126, "a longer text has another header");
    Ok([&[0x81, len], json.as_bytes()].concat())
}

/// Asks for a WebSocket.
pub const HANDSHAKE: &[u8] =
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
      Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
      Sec-WebSocket-Protocol: trunkline.v1\r\n\r\n";

/// Asks for a WebSocket and waits until it is granted.
pub fn handshake(socket: &mut TcpStream) -> Result<()> {
    socket.write_all(HANDSHAKE)?;
    let head = read_http_head(socket)?;
    if head.starts_with("HTTP/1.1 101 ") { Ok(()) } else { Err(head.into()) }
}

/// Grants a WebSocket to whoever asks.
pub fn grant_handshake(socket: &mut TcpStream) -> Result<()> {
    read_http_head(socket)?;
    socket.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\
          Sec-WebSocket-Protocol: trunkline.v1\r\n\r\n",
    )?;
    Ok(())
}

fn read_http_head(socket: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // Byte by byte: what follows the head is not to be touched.
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        head.push(byte[0]);
        if head.len() > 4096 {
            return Err("a handshake without an end".into());
        }
    }
    Ok(String::from_utf8(head)?)
}
