//! A hub that is none: it takes connections and remembers what it was told.

use std::io;
use std::pin::Pin;

use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// What it does with a connection.
#[derive(Clone)]
pub(crate) enum Manner {
    /// Shakes hands, and listens.
    Tls(TlsAcceptor),
    /// Listens, and answers in HTTP.
    Plain,
    /// Listens, and never says anything.
    Mute,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Heard {
    /// All that came, as it came.
    pub(crate) raw: Vec<u8>,
    /// What of it was said through TLS.
    pub(crate) through_tls: Vec<u8>,
    /// Connections that have ended.
    pub(crate) ended: usize,
}

pub(crate) struct Ears {
    pub(crate) port: u16,
    heard: watch::Sender<Heard>,
}

impl Ears {
    pub(crate) async fn listen(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = watch::Sender::new(Heard::default());
        let to = heard.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (manner, to) = (manner.clone(), to.clone());
                tokio::spawn(async move {
                    let _ = hear(socket, manner, &to).await; // an error is an end, too
                    to.send_modify(|heard| heard.ended += 1);
                });
            }
        });
        Self { port, heard }
    }

    pub(crate) fn heard(&self) -> Heard {
        self.heard.borrow().clone()
    }

    /// Waits until it was told so much.
    pub(crate) async fn until(&self, is_so: impl FnMut(&Heard) -> bool) {
        let mut heard = self.heard.subscribe();
        trunkline_tests::process::within(heard.wait_for(is_so)).await.unwrap();
    }
}

async fn hear(socket: TcpStream, manner: Manner, to: &watch::Sender<Heard>) -> io::Result<()> {
    let mut socket = Tapped { socket, heard: to.clone() };
    match manner {
        Manner::Tls(acceptor) => {
            let mut tls = acceptor.accept(socket).await?;
            let mut piece = [0; 1024];
            loop {
                let count = tls.read(&mut piece).await?;
                if count == 0 {
                    return Ok(());
                }
                to.send_modify(|heard| heard.through_tls.extend_from_slice(&piece[..count]));
            }
        }
        Manner::Plain => {
            let mut piece = [0; 1024];
            while socket.read(&mut piece).await? > 0 {
                socket.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await?;
            }
            Ok(())
        }
        Manner::Mute => {
            let mut piece = [0; 1024];
            while socket.read(&mut piece).await? > 0 {}
            Ok(())
        }
    }
}

/// A socket whose bytes are written down as they are read.
struct Tapped {
    socket: TcpStream,
    heard: watch::Sender<Heard>,
}

impl AsyncRead for Tapped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buffer);
        let new = &buffer.filled()[before..];
        if !new.is_empty() {
            self.heard.send_modify(|heard| heard.raw.extend_from_slice(new));
        }
        read
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
