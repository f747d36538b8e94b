//! The embedded broker: queues and streams in this process, for a laptop
//! without infrastructure and as the place where messages wait while another
//! broker is away.
//!
//! ```text
//!   lanes, publish_batch --> Shared::step( State ) --> outboxes --> consumer tasks
//!   timer task ------------>      |   ^
//!                                 v   |
//!                     queue / stream / group (pure)
//! ```
//!
//! All state is stepped under one lock, a batch at a time, and all of it is in
//! memory. With a journal ([`EmbeddedConfig::journal`]) each change is also
//! written, under that lock, to one of two logs on disk (`log`, `record`,
//! `durable`), from which `recovery` rebuilds the state before
//! [`MessageBroker::connect`] returns. It refuses to be a cluster: nothing is
//! replicated.
//!
//! What a crash (kill -9) may do, with a journal: acks, retries, positions and
//! deliveries that were not synced, those of the last milliseconds, happen again,
//! marked as redelivered; so may up to a few hundred messages of a queue be
//! marked that were not handed out. Transient messages of that time may be lost.
//! Queues that are exclusive or not durable stay in memory alone.
//!
//! Options that speak of a wire, a session or a cluster hold trivially here and
//! are accepted: compression (payloads come compressed from the hub, or not),
//! session time-out and heartbeat (a member lives exactly as long as its
//! consumer), commit interval (positions are committed as verdicts come),
//! replication, linger and batch size (a batch is taken as it comes).

mod arguments;
mod clock;
mod config;
mod consumer;
mod durable;
mod event_stream;
mod graves;
mod group;
mod handing;
mod lease;
mod log;
mod membership;
mod positions;
mod publisher;
mod queue;
mod queues;
mod rate;
mod reader;
mod reading;
mod record;
#[cfg(feature = "journal")]
mod recovery;
mod routing;
mod shared;
mod state;
#[cfg(feature = "journal")]
mod store;
mod stream;
mod streams;
mod task_queue;
mod topology;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use tokio::sync::watch;

use self::shared::Shared;
use crate::{
    broker::{
        BrokerType, ConnectionState, Consumer, EventStreamBroker, Handler, Lane, LaneOptions,
        MessageBroker, PublishOptions, Receipt, Source, SubscribeOptions, Subscription,
        TaskQueueBroker, dispatch::Subscriptions,
    },
    error::Result,
    message::Message,
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
    topology::{Topology, TopologyReport},
};

pub use config::{EmbeddedConfig, JournalConfig};

/// The embedded broker.
pub struct EmbeddedBroker {
    shared: Arc<Shared>,
    subscriptions: Subscriptions,
}

impl EmbeddedBroker {
    /// A broker that holds nothing yet; [`MessageBroker::connect`] starts it
    /// and makes what the topology names.
    #[must_use]
    pub fn new(config: EmbeddedConfig, topology: Arc<Topology>) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared::new(config, topology)),
            subscriptions: Subscriptions::default(),
        })
    }

    /// Compares what exists with the topology, and makes what is missing when
    /// `apply` says so.
    ///
    /// # Errors
    /// `OPERATION_CANCELED` after close; a queue or topic whose options are
    /// wrong.
    pub async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        self.shared.usable()?;
        self.shared
            .durably(|state, now| state.check_topology(now, apply))
            .await
    }

    /// Brings back what the journal holds, and makes what the topology names.
    async fn open(&self) -> Result<()> {
        let shared = &self.shared;
        shared.config.validate()?;
        #[cfg(feature = "journal")]
        if let Some(settings) = &shared.config.journal {
            // Once, also when two connect at the same time.
            let open = || async {
                let (store, found) = store::Store::open(settings.clone()).await?;
                shared.step(|state, now| state.restore(now, &store, found));
                Ok::<_, crate::error::Error>(store)
            };
            shared.store.get_or_try_init(open).await?;
        }
        let made = shared.durably(|state, now| {
            state.check_topology(now, true)?;
            if state.queue_log.is_durable() {
                // Before a full journal can refuse it.
                state.declare_graveyard(now)?;
            }
            Ok(())
        });
        made.await
    }
}

#[async_trait]
impl MessageBroker for EmbeddedBroker {
    fn broker_type(&self) -> BrokerType {
        BrokerType::InMemory
    }

    async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        Self::topology(self, apply).await
    }

    async fn connect(&self) -> Result<()> {
        let shared = &self.shared;
        if shared.closed.is_cancelled() {
            return Err(shared::canceled());
        }
        if shared.connection.borrow().connected {
            return Ok(());
        }
        shared.recorder.connection_attempts.inc();
        let made = self.open().await;
        if let Err(error) = made {
            shared.recorder.connection_failures.inc();
            return Err(error);
        }
        if shared.start() {
            shared.recorder.connection_successes.inc();
            shared.recorder.current_connections.inc();
        }
        shared.connection.send_replace(ConnectionState {
            generation: 1,
            connected: true,
            reason: None,
            refused: false,
        });
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        let shared = &self.shared;
        self.subscriptions.close().await;
        let first = !shared.closed.is_cancelled();
        shared.closed.cancel();
        if first && shared.connection.borrow().connected {
            shared.recorder.current_connections.dec();
        }
        shared.connection.send_replace(ConnectionState {
            generation: 1,
            connected: false,
            reason: Some("closed".into()),
            refused: false,
        });
        shared.tasks.close();
        shared.tasks.wait().await;
        #[cfg(feature = "journal")]
        if let Some(store) = shared.store.get() {
            store.close().await?;
        }
        Ok(())
    }

    async fn health_check(&self) -> Result<()> {
        self.shared.usable()?;
        // Takes the lock, so that a broker that is stuck does not say it is well.
        self.shared.step(|_, _| ());
        #[cfg(feature = "journal")]
        if let Some(store) = self.shared.store.get() {
            store.health()?;
        }
        Ok(())
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.shared.connection.subscribe()
    }

    fn endpoints(&self) -> Vec<String> {
        vec!["inmemory".to_owned()]
    }

    fn server_version(&self) -> Option<String> {
        Some(env!("CARGO_PKG_VERSION").to_owned())
    }

    fn recorder(&self) -> &Arc<MetricsRecorder> {
        &self.shared.recorder
    }

    async fn open_lane(&self, topic: &Topic, _lane: u32, options: &LaneOptions) -> Result<Lane> {
        publisher::open_lane(&self.shared, topic, options)
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        if self.shared.closed.is_cancelled() {
            return Err(shared::canceled());
        }
        match source {
            Source::Queue(pattern) => consumer::consume_queues(&self.shared, pattern, options),
            Source::Stream(pattern) => consumer::consume_streams(&self.shared, pattern, options),
        }
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Arc<Message>>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        publisher::publish_batch(&self.shared, topic, messages, options).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        self.subscriptions
            .start(self, source, options, handler, &self.shared.recorder)
            .await
    }

    async fn unsubscribe(&self, pattern: &Pattern) -> Result<()> {
        self.subscriptions.unsubscribe(pattern).await
    }

    fn task_queue(&self) -> Option<&dyn TaskQueueBroker> {
        Some(self)
    }

    fn event_stream(&self) -> Option<&dyn EventStreamBroker> {
        Some(self)
    }

    async fn ensure(&self, source: &Source) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, now| state.ensure(now, source))
            .await
    }
}

/// A broker that is dropped without being closed ends its tasks, unobserved.
impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

impl fmt::Debug for EmbeddedBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedBroker")
            .field("config", &self.shared.config)
            .field("connection", &*self.shared.connection.borrow())
            .finish_non_exhaustive()
    }
}
