//! The cables between the hub and everybody else, which can be pulled: a TCP
//! proxy with one address for all, in front of whichever hub is there.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Where cables lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plugged {
    Nowhere,
    Hub(SocketAddr),
}

/// The proxy. Dropping it pulls every cable.
#[derive(Debug)]
pub(crate) struct Cables {
    address: SocketAddr,
    plugged: watch::Sender<Plugged>,
    up: watch::Receiver<usize>,
    proxy: JoinHandle<()>,
}

impl Drop for Cables {
    fn drop(&mut self) {
        self.proxy.abort();
    }
}

impl Cables {
    /// Cables that lead nowhere yet.
    pub(crate) async fn lay() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let plugged = watch::Sender::new(Plugged::Nowhere);
        let (count, up) = watch::channel(0);
        let proxy = tokio::spawn(proxy(listener, plugged.subscribe(), count));
        Ok(Self { address, plugged, up, proxy })
    }

    /// The one URL under which the hub is reached, whatever happens to it.
    pub(crate) fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// Lets new connections through to this hub.
    pub(crate) fn plug_in(&self, hub: SocketAddr) {
        self.plugged.send_replace(Plugged::Hub(hub));
    }

    /// Pulls all of them at once, in the middle of whatever they carry.
    /// Returns how many there were. None works until the next
    /// [`plug_in`](Self::plug_in).
    pub(crate) fn pull(&self) -> usize {
        let up = *self.up.borrow();
        self.plugged.send_replace(Plugged::Nowhere);
        up
    }
}

async fn proxy(
    listener: TcpListener,
    plugged: watch::Receiver<Plugged>,
    count: watch::Sender<usize>,
) {
    let mut cables = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A cable that leads nowhere: the socket is closed at once.
                if let (Ok((near, _)), Plugged::Hub(hub)) = (accepted, *plugged.borrow()) {
                    cables.spawn(cable(near, hub, plugged.clone()));
                }
            }
            Some(_) = cables.join_next() => {}
        }
        count.send_replace(cables.len());
    }
}

/// One cable, until an end of it closes or it is pulled.
async fn cable(mut near: TcpStream, hub: SocketAddr, mut plugged: watch::Receiver<Plugged>) {
    let carry = async {
        let mut far = TcpStream::connect(hub).await?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        copy_bidirectional(&mut near, &mut far).await
    };
    tokio::select! {
        _ = carry => {}
        _ = plugged.wait_for(|plugged| *plugged != Plugged::Hub(hub)) => {}
    }
}
