//! A TCP proxy that can be cut: all connections close and new ones are refused,
//! until it is mended. It looks into nothing and changes nothing.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::cli::Failure;

/// A running proxy; it ends when this is dropped.
pub(super) struct Proxy {
    address: SocketAddr,
    cut: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a port of this machine's loopback.
    pub(super) async fn start(target: String) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::new(format!("the proxy cannot listen: {e}"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (cut, watching) = watch::channel(false);
        let task = tokio::spawn(accept(listener, address, target, watching));
        Ok(Self { address, cut, task })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub(super) fn mend(&self) {
        self.cut.send_replace(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Its connections are in a set of the task's and end with it.
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    address: SocketAddr,
    target: String,
    mut cut: watch::Receiver<bool>,
) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let is_cut = *cut.borrow_and_update();
        if is_cut {
            // Without a listener the kernel refuses.
            listener = None;
            connections.shutdown().await;
        } else if listener.is_none() {
            match TcpListener::bind(address).await {
                Ok(again) => listener = Some(again),
                Err(_) => {
                    // Sockets that the kernel still closes.
                    tokio::time::sleep(REBIND).await;
                    continue;
                }
            }
        }
        tokio::select! {
            changed = cut.changed() => if changed.is_err() { return },
            accepted = accept_one(listener.as_ref()) => {
                if let Ok(client) = accepted {
                    connections.spawn(connect(client, target.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn accept_one(listener: Option<&TcpListener>) -> std::io::Result<TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

/// Passes bytes both ways until either side ends.
async fn connect(mut client: TcpStream, target: String) -> std::io::Result<()> {
    let mut server = TcpStream::connect(target).await?;
    // A delay is not ours to make.
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

const REBIND: Duration = Duration::from_millis(20);
