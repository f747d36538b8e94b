//! One generation: the two connections that stand together. Publishing and
//! consuming are kept apart, because a server that runs out of memory blocks
//! the connection that publishes, and acks must still get through.

use std::{future::Future, sync::Arc, time::Duration};

use futures_util::StreamExt;
use lapin::{Channel, Connection, Event};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::error;
use crate::{
    broker::BrokerType,
    error::{Error, ErrorCode, Result},
};

/// Both connections of a generation, and the signs of its end.
pub(super) struct Link {
    /// Which generation this is.
    pub(super) generation: u64,
    /// The address, without credentials.
    pub(super) endpoint: Arc<str>,
    /// For publishes; blocked when the server is short of memory or disk.
    pub(super) publishing: Connection,
    /// For consumers, and for looking at and declaring things.
    pub(super) consuming: Connection,
    /// Why the server blocks the publishing connection, while it does.
    pub(super) blocked: watch::Receiver<Option<Arc<str>>>,
    /// Cancelled when either connection is gone.
    pub(super) lost: CancellationToken,
    /// Most bytes of a frame; headers must fit into one.
    pub(super) frame_max: usize,
    /// How long an operation may take.
    pub(super) patience: Duration,
}

impl Link {
    /// A channel for publishing.
    ///
    /// # Errors
    /// `CONNECTION_*`.
    pub(super) async fn publish_channel(&self, within: Duration) -> Result<Channel> {
        self.channel(&self.publishing, within).await
    }

    /// A channel for consuming, or to be thrown away after a look.
    ///
    /// # Errors
    /// `CONNECTION_*`.
    pub(super) async fn control_channel(&self) -> Result<Channel> {
        self.channel(&self.consuming, self.patience).await
    }

    async fn channel(&self, connection: &Connection, within: Duration) -> Result<Channel> {
        match self.bounded(within, connection.create_channel()).await? {
            Ok(channel) => Ok(channel),
            Err(e) => Err(Error::new(
                ErrorCode::ConnectionFailed,
                format!("no channel on {}: {}", self.endpoint, error::text(&e)),
            )
            .at(BrokerType::RabbitMq)),
        }
    }

    /// An operation that ends with the link, or after `within`, at the latest.
    ///
    /// # Errors
    /// `CONNECTION_CLOSED`, `CONNECTION_TIMEOUT`.
    pub(super) async fn bounded<T>(
        &self,
        within: Duration,
        operation: impl Future<Output = T>,
    ) -> Result<T> {
        tokio::select! {
            done = timeout(within, operation) => done.map_err(|_| Error::new(
                ErrorCode::ConnectionTimeout,
                format!("{} did not answer within {within:?}", self.endpoint),
            ).at(BrokerType::RabbitMq)),
            () = self.lost.cancelled() => Err(Error::new(
                ErrorCode::ConnectionClosed,
                format!("the connection to {} was lost", self.endpoint),
            ).at(BrokerType::RabbitMq)),
        }
    }

    /// Closes both connections in good order, as far as the server answers.
    pub(super) async fn hang_up(&self) {
        let close = async |connection: &Connection| {
            if connection.status().connected() {
                // A server that does not answer is left alone; the socket
                // closes with the connection's last handle.
                let _ = timeout(HANG_UP, connection.close(200, "OK".into())).await;
            }
        };
        tokio::join!(close(&self.consuming), close(&self.publishing));
    }
}

/// Watches one connection until it, or its twin, is gone. lapin gives each
/// event to one listener only, so that this is the only one; it passes on what
/// others need. Returns why the connection was lost, if it was this one.
pub(super) async fn watch_events(
    status: lapin::ConnectionStatus,
    events: impl futures_util::Stream<Item = Event> + Send + 'static,
    blocked: Option<watch::Sender<Option<Arc<str>>>>,
    lost: CancellationToken,
) -> Option<String> {
    let mut events = std::pin::pin!(events);
    // Events can come before there was a listener, and lapin's stream does not
    // end with its connection: a look now and then makes up for both.
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        tokio::select! {
            () = lost.cancelled() => return last,
            event = events.next() => match event {
                Some(Event::ConnectionBlocked(why)) => {
                    if let Some(blocked) = &blocked {
                        blocked.send_replace(Some(why.into()));
                    }
                }
                Some(Event::ConnectionUnblocked) => {
                    if let Some(blocked) = &blocked {
                        blocked.send_replace(None);
                    }
                }
                // Also reported for channels that the server closed, after
                // which the connection stands as before.
                Some(Event::Error(e)) => last = Some(error::text(&e)),
                Some(_) => {}
                None => {
                    lost.cancel();
                    return last;
                }
            },
            _ = look.tick() => {
                if status.blocked() && let Some(blocked) = &blocked {
                    blocked.send_if_modified(|b| {
                        let unknown = b.is_none();
                        if unknown {
                            *b = Some("the server blocks publishers".into());
                        }
                        unknown
                    });
                }
            }
        }
        if !status.connected() {
            lost.cancel();
            return last;
        }
    }
}

/// How often a connection's state is looked at, beside its events.
const LOOK: Duration = Duration::from_millis(200);
/// How long a server may take to answer a close.
const HANG_UP: Duration = Duration::from_secs(2);
