//! The proxy does what it says, between a plain echo and whoever dials it.

use std::io::ErrorKind;

use tokio::task::JoinHandle;

use super::*;
use crate::process::within;

/// A server that echoes, and ends a connection when its peer does.
struct Echo {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                connections.spawn(async move {
                    let (mut read, mut write) = socket.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await; // however it ends
                    let _ = write.shutdown().await;
                });
            }
        });
        Self { address, accepting }
    }
}

/// An echo behind a proxy, and a connection through it that has echoed.
async fn set() -> (Echo, Proxy, TcpStream) {
    let echo = Echo::start().await;
    let proxy = Proxy::start(echo.address).await.unwrap();
    let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(echoed(&mut socket, b"hello").await, b"hello");
    (echo, proxy, socket)
}

/// Both ends of a connection through a proxy over which a byte has gone up.
async fn both_ends() -> (Proxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
    let mut near = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut far, _) = within(listener.accept()).await.unwrap();
    near.write_all(b"x").await.unwrap();
    assert_eq!(within(far.read_u8()).await.unwrap(), b'x');
    (proxy, near, far)
}

async fn echoed(socket: &mut TcpStream, data: &[u8]) -> Vec<u8> {
    within(socket.write_all(data)).await.unwrap();
    let mut back = vec![0; data.len()];
    within(socket.read_exact(&mut back)).await.unwrap();
    back
}

/// All that still comes, and how that ends.
async fn rest(socket: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut data = Vec::new();
    let error = within(socket.read_to_end(&mut data)).await.err();
    (data, error.map(|error| error.kind()))
}

/// Bytes that tell where they stand.
fn numbered(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

/// Waits until the proxy has `live` connections.
async fn comes_to(proxy: &Proxy, live: usize) {
    let wait = async {
        while proxy.live() != live {
            tokio::task::yield_now().await;
        }
    };
    within(wait).await;
}

#[tokio::test]
async fn every_byte_passes_and_is_counted() {
    let (_echo, proxy, mut socket) = set().await;
    let data = numbered(300_000);
    let (mut read, mut write) = socket.split();
    let mut back = Vec::new();
    let (sent, got) = within(async {
        tokio::join!(
            async {
                write.write_all(&data).await?;
                write.shutdown().await
            },
            read.read_to_end(&mut back)
        )
    })
    .await;
    sent.unwrap();
    got.unwrap(); // the end was passed on, there and back
    assert!(back == data);
    let counts = proxy.counts();
    assert_eq!((counts.connections, counts.refused, counts.broken), (1, 0, 0));
    assert_eq!((counts.up, counts.down), (300_005, 300_005));
    comes_to(&proxy, 0).await;
}

#[tokio::test]
async fn a_cut_ends_what_there_is_and_nothing_more() {
    let (_echo, proxy, mut socket) = set().await;
    assert_eq!(proxy.cut(), 1);
    assert_eq!(rest(&mut socket).await, (Vec::new(), None));
    assert_eq!(proxy.counts().broken, 1);
    let mut next = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(echoed(&mut next, b"again").await, b"again");
    comes_to(&proxy, 1).await;
    assert_eq!(proxy.counts().connections, 2);
}

#[tokio::test]
async fn a_reset_is_one_for_both_ends() {
    let (proxy, mut near, mut far) = both_ends().await;
    assert_eq!(proxy.reset(), 1);
    for end in [&mut near, &mut far] {
        assert_eq!(rest(end).await, (Vec::new(), Some(ErrorKind::ConnectionReset)));
    }
}

#[tokio::test]
async fn a_cut_falls_after_the_byte_that_was_named() {
    for way in Way::BOTH {
        let (_echo, proxy, mut socket) = set().await;
        proxy.cut_after(way, 1234, Cut::Close);
        let data = numbered(10_000);
        let (mut read, mut write) = socket.split();
        let mut back = Vec::new();
        // The last bytes may find nobody.
        let (_, _) =
            within(async { tokio::join!(write.write_all(&data), read.read_to_end(&mut back)) })
                .await;
        let counts = proxy.counts();
        let passed = if way == Way::Up { counts.up } else { counts.down };
        assert_eq!(passed, 5 + 1234, "{way:?}");
        assert_eq!((counts.broken, counts.cut_by_bytes), (1, 1), "{way:?}");
        if way == Way::Down {
            assert!(back == data[..1234], "{} came back", back.len());
        } else {
            assert!(data[..1234].starts_with(&back), "{} came back", back.len());
        }
        // It cuts once.
        let mut next = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(echoed(&mut next, &data).await == data);
    }
}

#[tokio::test]
async fn a_cut_after_nothing_lets_no_byte_pass() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.cut_after(Way::Up, 0, Cut::Reset);
    socket.write_all(b"x").await.unwrap();
    assert_eq!(rest(&mut socket).await, (Vec::new(), Some(ErrorKind::ConnectionReset)));
    assert_eq!(proxy.counts().up, 5);
}

#[tokio::test]
async fn a_swallowed_connection_is_open_and_silent_for_both() {
    let (proxy, mut near, mut far) = both_ends().await;
    assert_eq!(proxy.half_open(), 1);
    // Far more than fits anywhere is taken, both ways.
    let much = numbered(8 * 1024 * 1024);
    within(near.write_all(&much)).await.unwrap();
    within(far.write_all(&much)).await.unwrap();
    assert_eq!((proxy.counts().up, proxy.counts().down), (1, 0));
    // One end gives up; the other is not told.
    drop(near);
    within(far.write_all(&much)).await.unwrap();
    let mut byte = [0];
    assert_eq!(far.try_read(&mut byte).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(proxy.live(), 1);
    // It can still be cut, and is not swallowed twice.
    assert_eq!(proxy.half_open(), 0);
    assert_eq!(proxy.cut(), 1);
    rest(&mut far).await;
    comes_to(&proxy, 0).await;
    assert_eq!(proxy.counts().broken, 1);
}

#[tokio::test]
async fn a_swallowed_connection_is_over_when_both_ends_have_gone() {
    let (echo, proxy, socket) = set().await;
    proxy.half_open();
    drop(socket);
    drop(echo);
    comes_to(&proxy, 0).await;
}

#[tokio::test]
async fn a_stall_holds_one_way_back_within_bounds_and_loses_nothing() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.stall(Way::Down);
    let data = numbered(100_000);
    within(socket.write_all(&data)).await.unwrap();
    let all_up = async {
        while proxy.counts().up < 100_005 {
            tokio::task::yield_now().await;
        }
    };
    within(all_up).await;
    assert_eq!(proxy.counts().down, 5, "up passes, down does not");
    proxy.resume(Way::Down);
    let mut back = vec![0; data.len()];
    within(socket.read_exact(&mut back)).await.unwrap();
    assert!(back == data);
}

#[tokio::test]
async fn what_is_stalled_is_held_by_whoever_sends() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.stall(Way::Up);
    let data = numbered(64 * 1024 * 1024);
    let all = timeout_soon(socket.write_all(&data)).await;
    assert!(all.is_none(), "64 MiB do not fit");
    assert_eq!(proxy.counts().up, 5);
    // And a connection that is stalled can be cut.
    assert_eq!(proxy.cut(), 1);
    rest(&mut socket).await;
}

/// What comes of `what`, if anything does while a stalled socket fills up.
async fn timeout_soon<F: Future>(what: F) -> Option<F::Output> {
    tokio::time::timeout(Duration::from_millis(300), what).await.ok()
}

#[tokio::test]
async fn a_throttle_passes_no_more_than_its_rate() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.throttle(Way::Up, Some(20_000));
    let began = now();
    let data = numbered(10_000);
    assert!(echoed(&mut socket, &data).await == data);
    // The last write may come as soon as those before it have been waited for.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(440), "{took:?}");
    // A crawl ends when it is lifted, not when its last byte is through.
    proxy.throttle(Way::Up, Some(1));
    let began = now();
    socket.write_all(&data).await.unwrap();
    proxy.heal();
    let mut back = vec![0; data.len()];
    within(socket.read_exact(&mut back)).await.unwrap();
    assert!(back == data && began.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn a_delay_is_that_of_the_way_and_keeps_the_order() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.delay(Way::Up, Duration::from_millis(200));
    proxy.delay(Way::Down, Duration::from_millis(100));
    let began = now();
    let data = numbered(20_000);
    assert!(echoed(&mut socket, &data).await == data);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
}

#[tokio::test]
async fn chunks_are_writes_of_their_own() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
    let mut near = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut far, _) = within(listener.accept()).await.unwrap();
    // Each chunk waits to be read before the next can be written.
    proxy.chunk(Way::Up, Some(3));
    proxy.throttle(Way::Up, Some(200));
    near.write_all(b"abcdefgh").await.unwrap();
    let mut parts = Vec::new();
    while parts.iter().map(Vec::len).sum::<usize>() < 8 {
        let mut part = vec![0; 100];
        let length = within(far.read(&mut part)).await.unwrap();
        part.truncate(length);
        parts.push(part);
    }
    assert_eq!(parts.concat(), b"abcdefgh");
    assert!(parts.iter().all(|part| part.len() <= 3), "{parts:?}");
}

#[tokio::test]
async fn who_is_refused_is_reset_and_who_comes_later_is_not() {
    let (_echo, proxy, mut socket) = set().await;
    proxy.refuse(true);
    assert_eq!(echoed(&mut socket, b"I stay").await, b"I stay");
    let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(rest(&mut refused).await, (Vec::new(), Some(ErrorKind::ConnectionReset)));
    assert_eq!(proxy.counts().refused, 1);
    proxy.refuse(false);
    let mut next = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(echoed(&mut next, b"let in").await, b"let in");
}

#[tokio::test]
async fn it_leads_to_where_it_is_told() {
    let (echo, proxy, mut socket) = set().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    drop(echo);
    // The echo's listener goes before its connections.
    assert_eq!(rest(&mut socket).await.0, Vec::<u8>::new());
    let mut nobody = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(rest(&mut nobody).await, (Vec::new(), Some(ErrorKind::ConnectionReset)));
    proxy.lead_to(free.local_addr().unwrap());
    let _somebody = TcpStream::connect(proxy.address()).await.unwrap();
    within(free.accept()).await.unwrap();
}

#[tokio::test]
async fn a_dropped_proxy_closes_everything() {
    let (_echo, proxy, mut socket) = set().await;
    drop(proxy);
    assert_eq!(rest(&mut socket).await.0, Vec::<u8>::new());
}
