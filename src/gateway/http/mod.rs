//! HTTP and Server-Sent Events over the hub: publishing in every form, streams,
//! leases of work queues, state and metrics.
//!
//! ```text
//!   socket -> server (accept, limits) -> guard (Host, Origin, token) -> router -> handlers -> hub
//! ```
//!
//! It keeps nothing but what a client holds at the moment: leases, and the
//! deliveries of a stream that have not reached the socket. Both are given back
//! when the client, or the server, goes. It speaks HTTP/1.1 in clear; TLS is a
//! proxy's business.

mod cloudevents;
mod commit;
mod cursor;
mod dead_letters;
mod envelope;
mod flushed;
mod guard;
mod lease;
mod lease_table;
mod leases;
mod limits;
pub(crate) mod lines;
mod metrics;
mod ndjson;
mod positions;
mod problem;
mod publish;
mod raw;
mod replays;
mod router;
mod scheduled;
mod server;
mod spool;
mod state;
mod stream;
mod streams;

use std::{future::Future, net::SocketAddr, sync::Arc};

use axum::body::{Body, Bytes, HttpBody};
use futures_util::StreamExt;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use self::{leases::Leases, problem::Problem, streams::Streams};
use crate::{hub::MessagingHub, secret::Secret, topology::Topology};

pub use server::HttpServer;

/// How the HTTP server is set up.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Where to listen. Port 0 takes a free one. An address that is not
    /// loopback is refused without a token.
    pub address: SocketAddr,
    /// What clients must send as `Authorization: Bearer`. Without it only
    /// loopback is served, and `Host` and `Origin` must name it.
    pub token: Option<Secret>,
    /// Hosts that are answered besides the names of loopback, without a token.
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://example.org`) that are answered besides loopback's,
    /// without a token.
    pub allowed_origins: Vec<String>,
}

/// What every handler shares.
#[derive(Clone)]
pub(crate) struct App(Arc<Inner>);

struct Inner {
    hub: MessagingHub,
    options: HttpOptions,
    /// Cancelled when nothing new is taken any more.
    closing: CancellationToken,
    /// Requests that the shutdown waits for.
    intake: TaskTracker,
    /// Everything that runs beside a request.
    tasks: TaskTracker,
    leases: Leases,
    streams: Streams,
}

/// Held by a request that the shutdown waits for.
type Intake = TaskTrackerToken;

impl App {
    fn new(hub: MessagingHub, options: HttpOptions) -> Self {
        Self(Arc::new(Inner {
            hub,
            options,
            closing: CancellationToken::new(),
            intake: TaskTracker::new(),
            tasks: TaskTracker::new(),
            leases: Leases::new(),
            streams: Streams::default(),
        }))
    }

    fn hub(&self) -> &MessagingHub {
        &self.0.hub
    }

    fn topology(&self) -> &Topology {
        self.0.hub.wanted_topology()
    }

    fn max_message_bytes(&self) -> usize {
        self.0.hub.max_message_bytes()
    }

    fn options(&self) -> &HttpOptions {
        &self.0.options
    }

    fn token(&self) -> Option<&Secret> {
        self.0.options.token.as_ref()
    }

    fn closing(&self) -> &CancellationToken {
        &self.0.closing
    }

    fn leases(&self) -> &Leases {
        &self.0.leases
    }

    fn streams(&self) -> &Streams {
        &self.0.streams
    }

    /// Lets a request in that takes something new, unless the hub is leaving.
    fn enter(&self) -> Result<Intake, Problem> {
        // The token first: a shutdown that begins now either sees it and waits,
        // or has been seen here.
        let token = self.0.intake.token();
        if self.closing().is_cancelled() {
            return Err(Problem::shutting_down());
        }
        Ok(token)
    }

    /// Runs a task that the shutdown joins.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.tasks.spawn(task);
    }
}

/// Reads a whole body; `Err(None)` when it is over `max`.
async fn read_body(body: Body, max: usize) -> Result<Bytes, Option<Problem>> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut over = announced > max;
    let mut pieces = body.into_data_stream();
    let mut whole = Vec::with_capacity(if over { 0 } else { announced });
    let mut seen = 0_usize;
    loop {
        let piece = tokio::time::timeout(limits::BODY_IDLE, pieces.next())
            .await
            .map_err(|_| Some(Problem::idle()))?;
        let Some(piece) = piece else { break };
        let piece =
            piece.map_err(|e| Some(Problem::invalid(format!("the body broke off: {e}"))))?;
        seen = seen.saturating_add(piece.len());
        over = over || seen > max;
        if !over {
            whole.extend_from_slice(&piece);
        } else if seen > max.saturating_add(DISCARD_BYTES) {
            break;
        }
    }
    if over { Err(None) } else { Ok(whole.into()) }
}

/// Bytes over the limit that are read and dropped, so that a client which
/// writes everything before it reads gets the answer rather than a reset.
const DISCARD_BYTES: usize = 16 * 1024 * 1024;
