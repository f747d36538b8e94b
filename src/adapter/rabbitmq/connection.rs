//! Supervises the connection: makes it, looks after the topology, notices its
//! end, and makes it again, for ever, at every address in turn. It refuses to
//! let lapin reconnect by itself: that hides an outage from those who must
//! know at once.

use std::{sync::Arc, time::Duration};

use lapin::{Connection, ConnectionProperties, tcp::OwnedTLSConfig, uri::AMQPUri};
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{error as log_error, info, warn};

use super::{
    address,
    backoff::Backoff,
    error,
    link::{Link, watch_events},
    management,
    shared::Shared,
    tls, topology,
};
use crate::{
    broker::{BrokerType, ConnectionState},
    error::{Error, ErrorCode, Result},
};

/// Runs until the broker is closed. Tells `first` how the first attempt went.
pub(super) async fn supervise(shared: Arc<Shared>, first: oneshot::Sender<Result<()>>) {
    let mut first = Some(first);
    let endpoints = match address::endpoints(&shared.config) {
        Ok(endpoints) => endpoints,
        Err(e) => {
            // Trying again cannot mend a setting.
            report_down(&shared, &e, true);
            answer(&mut first, Err(e));
            return;
        }
    };
    let mut backoff = Backoff::new(
        shared.config.reconnect_delay,
        shared.config.max_reconnect_delay,
    );
    let mut generation = 0;
    for uri in endpoints.iter().cycle() {
        let attempt = tokio::select! {
            () = shared.hang_up.cancelled() => break,
            attempt = establish(&shared, uri, generation + 1) => attempt,
        };
        let mut pause = backoff.pause();
        match attempt {
            Ok((link, watchers)) => {
                generation += 1;
                backoff.reset();
                pause = backoff.pause();
                shared.recorder.current_connections.add(2);
                shared.link.send_replace(Some(link.clone()));
                shared.state.send_replace(ConnectionState {
                    generation,
                    connected: true,
                    reason: None,
                    refused: false,
                });
                info!(endpoint = %link.endpoint, generation, "connected to RabbitMQ");
                answer(&mut first, Ok(()));
                stand(&shared, link, watchers).await;
            }
            Err(e) => {
                let refused = e.code() == ErrorCode::AuthenticationFailed
                    || e.code() == ErrorCode::InvalidConfig;
                if refused {
                    log_error!(error = %e, "RabbitMQ does not let us in");
                    pause = pause.max(REFUSED_PAUSE);
                } else {
                    warn!(error = %e, "no connection to RabbitMQ");
                }
                report_down(&shared, &e, refused);
                answer(&mut first, Err(e));
            }
        }
        tokio::select! {
            () = shared.hang_up.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
        }
    }
    report_down(&shared, &error::closed(), false);
    answer(&mut first, Err(error::closed()));
}

/// Waits for the end of a generation and cleans up after it.
async fn stand(shared: &Shared, link: Arc<Link>, mut watchers: JoinSet<Option<String>>) {
    let closed = tokio::select! {
        () = shared.hang_up.cancelled() => true,
        () = link.lost.cancelled() => false,
    };
    // First nobody gets the link any more, then its end is told.
    shared.link.send_replace(None);
    for _ in 0..2 {
        shared.recorder.current_connections.dec();
    }
    if closed {
        link.hang_up().await;
        link.lost.cancel();
    }
    let mut reason = None;
    while let Some(watcher) = watchers.join_next().await {
        reason = reason.or(watcher.ok().flatten());
    }
    if !closed {
        let reason = reason.unwrap_or_else(|| "the connection was lost".to_owned());
        warn!(endpoint = %link.endpoint, generation = link.generation, %reason, "lost RabbitMQ");
        shared.recorder.connection_errors.inc();
        shared.recorder.total_errors.inc();
        shared.state.send_modify(|s| {
            s.connected = false;
            s.reason = Some(reason.into());
        });
        // The twin may stand yet. It is closed on the side: a server that does
        // not answer must not delay the next attempt.
        shared.tasks.spawn(async move { link.hang_up().await });
    }
}

/// One attempt: both connections, their watchers, and the topology.
async fn establish(
    shared: &Arc<Shared>,
    uri: &AMQPUri,
    generation: u64,
) -> Result<(Arc<Link>, JoinSet<Option<String>>)> {
    let recorder = &shared.recorder;
    recorder.connection_attempts.inc();
    if generation > 1 {
        recorder.reconnection_attempts.inc();
    }
    let made = try_establish(shared, uri, generation).await;
    match &made {
        Ok(_) => recorder.connection_successes.inc(),
        Err(_) => {
            recorder.connection_failures.inc();
            recorder.connection_errors.inc();
            recorder.total_errors.inc();
        }
    }
    made
}

async fn try_establish(
    shared: &Arc<Shared>,
    uri: &AMQPUri,
    generation: u64,
) -> Result<(Arc<Link>, JoinSet<Option<String>>)> {
    let endpoint: Arc<str> = address::display(uri).into();
    let settings = shared.config.tls.clone();
    let tls = tokio::task::spawn_blocking(move || tls::load(settings.as_ref()))
        .await
        .map_err(|e| {
            Error::new(ErrorCode::UnknownError, "reading certificates failed").caused_by(e)
        })??;
    let publishing = dial(shared, uri, &endpoint, &tls, "publish").await?;
    let consuming = dial(shared, uri, &endpoint, &tls, "consume").await?;

    let lost = CancellationToken::new();
    let (block, blocked) = watch::channel(None);
    let mut watchers = JoinSet::new();
    watchers.spawn(watch_events(
        publishing.status().clone(),
        publishing.events_listener(),
        Some(block),
        lost.clone(),
    ));
    watchers.spawn(watch_events(
        consuming.status().clone(),
        consuming.events_listener(),
        None,
        lost.clone(),
    ));
    let frame_max = usize::try_from(publishing.configuration().frame_max()).unwrap_or(usize::MAX);
    let link = Arc::new(Link {
        generation,
        endpoint,
        publishing,
        consuming,
        blocked,
        lost,
        // 0 means that the server sets no limit; lapin then cuts at the same
        // size as RabbitMQ's default.
        frame_max: if frame_max == 0 {
            DEFAULT_FRAME
        } else {
            frame_max
        },
        patience: shared.config.connection_timeout,
    });
    let looked = topology::reconcile(shared, &link, shared.mode).await;
    match looked {
        Ok(report) => {
            topology::log(&report);
            let young = report.created.iter().any(|o| o.starts_with("queue "));
            shared.set_report(report);
            if young {
                tokio::select! {
                    () = tokio::time::sleep(YOUNG) => {}
                    () = link.lost.cancelled() => {}
                    () = shared.closing.cancelled() => {}
                }
            }
        }
        Err(e) => {
            link.hang_up().await;
            link.lost.cancel();
            while watchers.join_next().await.is_some() {}
            return Err(e);
        }
    }
    if shared.version().is_none()
        && let Some(version) = management::server_version(&shared.config).await
    {
        shared.set_version(version);
    }
    Ok((link, watchers))
}

async fn dial(
    shared: &Shared,
    uri: &AMQPUri,
    endpoint: &str,
    tls: &OwnedTLSConfig,
    purpose: &str,
) -> Result<Connection> {
    let name = format!("{} ({purpose})", shared.config.connection_name);
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let runtime = lapin::runtime::default_runtime().map_err(|e| error::connecting(&e, endpoint))?;
    let limit = shared.config.connection_timeout;
    // lapin has a time limit for the TCP connect only, and only when blocking.
    let dialled = timeout(
        limit,
        Connection::connect_uri_with_config(uri.clone(), properties, tls.clone(), runtime),
    )
    .await;
    match dialled {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(e)) => Err(error::connecting(&e, endpoint)),
        Err(_) => Err(Error::new(
            ErrorCode::ConnectionTimeout,
            format!("{endpoint} did not let us in within {limit:?}"),
        )
        .at(BrokerType::RabbitMq)),
    }
}

fn report_down(shared: &Shared, error: &Error, refused: bool) {
    shared.state.send_modify(|s| {
        s.connected = false;
        s.reason = Some(error.to_string().into());
        s.refused = refused;
    });
}

fn answer(first: &mut Option<oneshot::Sender<Result<()>>>, outcome: Result<()>) {
    if let Some(first) = first.take() {
        // Whoever asked may have gone; the state tells the rest.
        let _ = first.send(outcome);
    }
}

/// The pause after a refused login: credentials are mended by people, and
/// servers log each attempt.
const REFUSED_PAUSE: Duration = Duration::from_secs(2);
/// A quorum queue that was made just now is not for messages yet: a server that is
/// killed before it has written the queue's Raft member into its directory (which
/// it does within half a second) starts the member "as a new one", without what
/// it had confirmed, and never elects it. Seen on 3.10 and 4.0 with a queue of
/// 0.1 s; with one of 1 s everything was there.
const YOUNG: Duration = Duration::from_secs(1);
/// RabbitMQ's default frame size.
const DEFAULT_FRAME: usize = 131_072;
