//! A bare axum server: it reads a request to its end and answers 202. What HTTP
//! itself costs with the same client on the same machine.

use std::net::SocketAddr;

use axum::{Router, body::Bytes, extract::DefaultBodyLimit, http::StatusCode, routing::post};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::cli::Failure;

/// A running server; it ends when this is dropped.
pub(crate) struct BareServer {
    pub(crate) address: SocketAddr,
    task: JoinHandle<std::io::Result<()>>,
}

impl BareServer {
    pub(crate) async fn start() -> Result<Self, Failure> {
        let failed =
            |e: std::io::Error| Failure::new(format!("the bare server cannot listen: {e}"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let accept = |_whole: Bytes| async { StatusCode::ACCEPTED };
        let router = Router::new()
            .route("/{*path}", post(accept))
            .layer(DefaultBodyLimit::disable());
        let task = tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, task })
    }
}

impl Drop for BareServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
