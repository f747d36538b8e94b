//! A TCP proxy that can be as bad as a network: slow, narrow, silent in one or
//! both directions, cut. It never drops or changes a byte of a connection that
//! lives: what is held back by silence goes on after [`TcpProxy::heal`], as
//! TCP would do it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// What has gone through so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    pub accepted: u64,
    /// Connections that the target did not take.
    pub refused: u64,
    pub open: u64,
    pub bytes_to_server: u64,
    pub bytes_to_client: u64,
}

/// A proxy from a port of its own to a target that may change.
#[derive(Debug)]
pub struct TcpProxy {
    address: SocketAddr,
    faults: watch::Sender<Faults>,
    listening: watch::Receiver<bool>,
    totals: Arc<Totals>,
    acceptor: Option<JoinHandle<()>>,
}

impl TcpProxy {
    /// Listens on a free port of 127.0.0.1.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = bind_free().await?;
        let address = listener.local_addr()?;
        let totals = Arc::new(Totals::default());
        let (faults, _) = watch::channel(Faults::none(target));
        let (announce, listening) = watch::channel(true);
        let acceptor = tokio::spawn(accept(
            listener,
            address,
            faults.subscribe(),
            announce,
            Arc::clone(&totals),
        ));
        Ok(Self {
            address,
            faults,
            listening,
            totals,
            acceptor: Some(acceptor),
        })
    }

    /// To a port of this machine.
    pub async fn to_port(port: u16) -> io::Result<Self> {
        Self::start(([127, 0, 0, 1], port).into()).await
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// For new connections; those that live keep theirs.
    pub fn set_target(&self, target: SocketAddr) {
        self.faults.send_modify(|f| f.target = target);
    }

    /// Each byte arrives this much later, in each direction; the rate stays.
    pub fn set_delay(&self, delay: Duration) {
        self.faults.send_modify(|f| f.delay = delay);
    }

    /// Bytes per second, for each connection and direction; `None` is no limit.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.faults
            .send_modify(|f| f.rate = bytes_per_second.map(|rate| rate.max(1)));
    }

    /// Nothing passes any more, no socket is told. New connections are
    /// accepted and hear nothing.
    pub fn half_open(&self) {
        self.faults.send_modify(|f| f.silent = [true, true]);
    }

    /// As [`half_open`](Self::half_open), in one direction.
    pub fn drop_direction(&self, direction: Direction) {
        self.faults
            .send_modify(|f| f.silent[direction as usize] = true);
    }

    /// Closes all connections and refuses new ones; returns once both is so.
    pub async fn cut(&self) {
        self.faults.send_modify(|f| {
            f.generation += 1;
            f.cut = true;
        });
        self.settled(false).await;
    }

    /// Closes all connections and goes on accepting new ones.
    pub fn reset_connections(&self) {
        self.faults.send_modify(|f| f.generation += 1);
    }

    /// Ends every fault but delay and rate; returns once it listens again.
    pub async fn heal(&self) {
        self.faults.send_modify(|f| {
            f.cut = false;
            f.silent = [false, false];
        });
        self.settled(true).await;
    }

    pub fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            accepted: read(&self.totals.accepted),
            refused: read(&self.totals.refused),
            open: read(&self.totals.open),
            bytes_to_server: read(&self.totals.bytes[Direction::ToServer as usize]),
            bytes_to_client: read(&self.totals.bytes[Direction::ToClient as usize]),
        }
    }

    /// Closes everything and waits for the tasks.
    pub async fn close(mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            self.faults.send_modify(|f| f.closed = true);
            acceptor.await.expect("the proxy's task does not panic");
        }
    }

    async fn settled(&self, state: bool) {
        let mut listening = self.listening.clone();
        tokio::time::timeout(SETTLE, listening.wait_for(|now| *now == state))
            .await
            .expect("the proxy changes its state in time")
            .expect("the proxy lives");
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        // The connections are in a set that the acceptor owns: they end with it.
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
        }
    }
}

#[derive(Debug, Clone)]
struct Faults {
    target: SocketAddr,
    delay: Duration,
    rate: Option<u64>,
    silent: [bool; 2],
    /// Connections of an older generation are closed.
    generation: u64,
    cut: bool,
    closed: bool,
}

impl Faults {
    fn none(target: SocketAddr) -> Self {
        Self {
            target,
            delay: Duration::ZERO,
            rate: None,
            silent: [false; 2],
            generation: 0,
            cut: false,
            closed: false,
        }
    }
}

#[derive(Debug, Default)]
struct Totals {
    accepted: AtomicU64,
    refused: AtomicU64,
    open: AtomicU64,
    bytes: [AtomicU64; 2],
}

/// Counts an open connection for as long as it lives, aborted or not.
struct Open(Arc<Totals>);

impl Open {
    fn new(totals: &Arc<Totals>) -> Self {
        totals.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(totals))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn accept(
    listener: TcpListener,
    address: SocketAddr,
    mut faults: watch::Receiver<Faults>,
    listening: watch::Sender<bool>,
    totals: Arc<Totals>,
) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let (cut, closed) = {
            let now = faults.borrow_and_update();
            (now.cut, now.closed)
        };
        if closed {
            connections.shutdown().await;
            return;
        }
        if cut {
            // Dropping the listener is what makes the kernel refuse.
            listener = None;
            connections.shutdown().await;
            listening.send_replace(false);
        } else if listener.is_none() {
            match TcpListener::bind(address).await {
                Ok(again) => {
                    listener = Some(again);
                    listening.send_replace(true);
                }
                Err(_) => {
                    // Sockets of the kernel's that still close; heal() has the deadline.
                    tokio::time::sleep(REBIND).await;
                    continue;
                }
            }
        }
        tokio::select! {
            changed = faults.changed() => if changed.is_err() { return },
            accepted = accept_one(listener.as_ref()) => {
                // The error of one connection that was gone before we took it.
                let Ok(client) = accepted else { continue };
                totals.accepted.fetch_add(1, Ordering::Relaxed);
                connections.spawn(connection(client, faults.clone(), Arc::clone(&totals)));
            }
            _ = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn accept_one(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

async fn connection(client: TcpStream, mut faults: watch::Receiver<Faults>, totals: Arc<Totals>) {
    let _open = Open::new(&totals);
    let (target, generation) = {
        let now = faults.borrow_and_update();
        (now.target, now.generation)
    };
    let both_ways = async {
        let Ok(server) = TcpStream::connect(target).await else {
            totals.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        // A delay is ours to make, not Nagle's.
        if client.set_nodelay(true).is_err() || server.set_nodelay(true).is_err() {
            return;
        }
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::join!(
            pump(
                from_client,
                to_server,
                Direction::ToServer,
                faults.clone(),
                &totals
            ),
            pump(
                from_server,
                to_client,
                Direction::ToClient,
                faults.clone(),
                &totals
            ),
        );
    };
    let mut watched = faults.clone();
    tokio::select! {
        () = both_ways => {}
        _ = watched.wait_for(|f| f.generation != generation) => {}
    }
}

/// One direction: a reader that stamps what it read, and a writer that waits
/// until it is due. The queue between them is what is "on the wire".
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    faults: watch::Receiver<Faults>,
    totals: &Totals,
) {
    let (wire, mut arrivals) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WIRE);
    let reading = async {
        let mut faults = faults.clone();
        loop {
            hearing(&mut faults, direction).await;
            let mut piece = vec![0; PIECE];
            let Ok(count @ 1..) = from.read(&mut piece).await else {
                break;
            };
            piece.truncate(count);
            let due = Instant::now() + faults.borrow().delay;
            if wire.send((due, piece)).await.is_err() {
                break;
            }
        }
        drop(wire);
    };
    let writing = async {
        let mut faults = faults.clone();
        while let Some((due, piece)) = arrivals.recv().await {
            tokio::time::sleep_until(due).await;
            let mut rest = piece.as_slice();
            while !rest.is_empty() {
                hearing(&mut faults, direction).await;
                let rate = faults.borrow().rate;
                let (now, later) = rest.split_at(slice(rest.len(), rate));
                if let Some(rate) = rate {
                    tokio::time::sleep(Duration::from_secs_f64(now.len() as f64 / rate as f64))
                        .await;
                }
                if to.write_all(now).await.is_err() {
                    return;
                }
                totals.bytes[direction as usize].fetch_add(now.len() as u64, Ordering::Relaxed);
                rest = later;
            }
        }
        // The other side closed: that news passes the silence no sooner than bytes.
        hearing(&mut faults, direction).await;
        let _already_closed = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

async fn hearing(faults: &mut watch::Receiver<Faults>, direction: Direction) {
    // An error means that the proxy is being dropped; the task ends with it.
    let _dropped = faults.wait_for(|f| !f.silent[direction as usize]).await;
}

/// How much goes out at once: a twentieth of a second's worth.
fn slice(available: usize, rate: Option<u64>) -> usize {
    let most = rate.map_or(usize::MAX, |rate| {
        usize::try_from(rate / 20).unwrap_or(usize::MAX).max(1)
    });
    available.min(most)
}

/// Not port 0: that is taken from the range of outgoing connections, and while
/// the proxy is cut any client could be given its port.
async fn bind_free() -> io::Result<TcpListener> {
    let mut last = None;
    for _ in 0..100 {
        let draw = RandomState::new().build_hasher().finish();
        let port = 20_000 + u16::try_from(draw % 12_000).expect("below 12000");
        match TcpListener::bind(("127.0.0.1", port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::other("no port tried")))
}

const PIECE: usize = 16 * 1024;
/// Pieces between reader and writer: enough that a delay does not become a rate.
const ON_THE_WIRE: usize = 1024;
const SETTLE: Duration = Duration::from_secs(10);
const REBIND: Duration = Duration::from_millis(20);
