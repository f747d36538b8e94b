//! The accept loop and the orderly end.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::{
    App, HttpOptions,
    flushed::{Flushed, Watched},
    limits, router,
};
use crate::{
    error::{Error, ErrorCode, Result},
    hub::MessagingHub,
};

/// A running HTTP server. Dropping it ends it abruptly; use
/// [`HttpServer::stop`].
pub struct HttpServer {
    app: App,
    address: std::net::SocketAddr,
    connections: TaskTracker,
    /// Cancelled: no new connections, and those that stand end after their
    /// current request.
    leaving: CancellationToken,
    /// Cancelled: connections end now.
    abort: CancellationToken,
}

impl HttpServer {
    /// Binds and serves.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for an address that is not loopback without a token;
    /// `CONNECTION_FAILED` when the address cannot be bound, such as a port
    /// that is taken.
    pub async fn start(hub: MessagingHub, options: HttpOptions) -> Result<Self> {
        let wanted = options.address;
        if options.token.as_ref().is_some_and(|t| t.is_empty()) {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "the HTTP token is empty; leave it out, or set one",
            ));
        }
        if !wanted.ip().is_loopback() && options.token.is_none() {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "HTTP on {wanted} would be open to the network without authentication; listen on 127.0.0.1, or set a token (MESSAGING_HTTP_TOKEN)"
                ),
            ));
        }
        let cannot = |e: std::io::Error| {
            let hint = match e.kind() {
                std::io::ErrorKind::AddrInUse => {
                    "the port is taken by another process; choose another with --http"
                }
                std::io::ErrorKind::PermissionDenied => {
                    "this user may not use the port; choose one above 1023 with --http"
                }
                _ => "choose another address with --http",
            };
            Error::new(
                ErrorCode::ConnectionFailed,
                format!("HTTP cannot listen on {wanted}: {hint}"),
            )
            .caused_by(e)
        };
        let listener = TcpListener::bind(wanted).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let server = Self {
            app: App::new(hub, options),
            address,
            connections: TaskTracker::new(),
            leaving: CancellationToken::new(),
            abort: CancellationToken::new(),
        };
        server.app.leases().spawn_expiry(&server.app);
        let router = router::router(&server.app);
        server.connections.spawn(accept(
            listener,
            router,
            server.connections.clone(),
            server.leaving.clone(),
            server.abort.clone(),
        ));
        Ok(server)
    }

    /// The address that is really bound.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Takes nothing new: `/ready` and publishes answer 503, streams and lease
    /// waits end. Everything else is still served.
    pub fn begin_stop(&self) {
        self.app.closing().cancel();
    }

    /// Stops: lets running requests end within `grace`, gives every lease back,
    /// and closes all connections. Says whether everything ended in time.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the server half-stopped; call it again.
    pub async fn stop(&self, grace: Duration) -> bool {
        let deadline = Instant::now() + grace;
        self.begin_stop();
        let inner = &self.app.0;
        inner.intake.close();
        let mut in_time = timeout_at(deadline, inner.intake.wait()).await.is_ok();
        tracing::debug!(in_time, "requests have ended");
        inner.leases.give_back_all();
        self.leaving.cancel();
        self.connections.close();
        in_time &= timeout_at(deadline, self.connections.wait()).await.is_ok();
        self.abort.cancel();
        self.connections.wait().await;
        tracing::debug!(in_time, "connections have closed");
        inner.tasks.close();
        // Tasks end by themselves once their connections are gone; what the hub
        // still owes them, its own close settles.
        in_time &= timeout_at(
            deadline.max(Instant::now() + LAST_TASKS),
            inner.tasks.wait(),
        )
        .await
        .is_ok();
        in_time
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.app.closing().cancel();
        self.leaving.cancel();
        self.abort.cancel();
    }
}

impl std::fmt::Debug for HttpServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpServer")
            .field("address", &self.address)
            .field("connections", &self.connections.len())
            .finish()
    }
}

async fn accept(
    listener: TcpListener,
    router: Router,
    connections: TaskTracker,
    leaving: CancellationToken,
    abort: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(limits::MAX_CONNECTIONS));
    loop {
        // Room first: a connection that is accepted is served.
        let permit = tokio::select! {
            permit = room.clone().acquire_owned() => permit,
            () = leaving.cancelled() => return,
        };
        let Ok(permit) = permit else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    // Out of file descriptors, most likely: some time must pass
                    // until one is free, or this loop would spin.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = leaving.cancelled() => return,
        };
        let (router, leaving, abort) = (router.clone(), leaving.clone(), abort.clone());
        connections.spawn(async move {
            tokio::select! {
                () = serve(stream, router, leaving) => {}
                () = abort.cancelled() => {}
            }
            drop(permit);
        });
    }
}

async fn serve(stream: TcpStream, router: Router, leaving: CancellationToken) {
    if let Err(e) = stream.set_nodelay(true) {
        tracing::debug!(error = %e, "TCP_NODELAY could not be set");
    }
    let flushed = Flushed::new();
    let io = Watched::new(TokioIo::new(stream), flushed.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(flushed.clone());
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEAD_TIMEOUT)
        .max_buf_size(limits::MAX_HEAD_BYTES)
        .max_headers(limits::MAX_HEADERS)
        .serve_connection(io, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = leaving.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        // Clients that go in the middle of something are everyday life.
        tracing::debug!(error = %e, "a connection ended early");
    }
}

/// How long accepting rests after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What tasks get to end after their connections are gone, at least.
const LAST_TASKS: Duration = Duration::from_millis(500);
