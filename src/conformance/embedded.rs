//! The embedded broker as a backend of the suite; also the example for authors
//! of further factories.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;

use super::{Capabilities, Capability, Factory, Kind, Target};
use crate::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{MessageBroker, Source},
    error::Result,
    topic::Pattern,
    topology::{QueueSpec, TopicSpec, Topology},
};

/// The embedded broker in memory. A closed one has lost everything, so a new
/// client is a new broker and nothing that outlives a client is declared.
#[derive(Debug, Default)]
pub struct EmbeddedFactory {
    current: Mutex<Option<Arc<EmbeddedBroker>>>,
}

impl EmbeddedFactory {
    /// A factory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The broker, a new one where the last was closed.
    #[must_use]
    pub fn broker(&self) -> Arc<EmbeddedBroker> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(broker) = &*current
            && broker.is_connected()
        {
            return broker.clone();
        }
        let config = EmbeddedConfig {
            // A name that nobody declared must be refused.
            auto_declare: false,
            ..EmbeddedConfig::default()
        };
        let broker = EmbeddedBroker::new(config, Arc::new(topology()));
        *current = Some(broker.clone());
        broker
    }
}

#[async_trait]
impl Factory for EmbeddedFactory {
    fn name(&self) -> String {
        "embedded memory".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        use Capability as C;
        Capabilities::from([
            C::Queues,
            C::Streams,
            C::Priority,
            C::Ttl,
            C::Delay,
            C::DeadLetters,
            C::Retry,
            C::Offsets,
            C::Seek,
            C::Groups,
            C::GrouplessReaders,
            C::HistoryReplay,
            C::RedeliveredInQueues,
            C::RedeliveredInStreams,
            C::UnroutableRefused,
            C::PerKeyOrder,
            C::OrderedSingleConsumer,
            C::QueueStats,
            C::Dequeue,
            C::Purge,
            C::QueueTtl,
            C::DeclareConflict,
            C::HandlerOptions,
            C::Unconfirmed,
            C::TopicMetadata,
            C::BoundedPrefetch,
        ])
    }

    async fn connect(&self) -> Result<Arc<dyn Target>> {
        let broker = self.broker();
        broker.connect().await?;
        let broker: Arc<dyn MessageBroker> = broker;
        Ok(Arc::new(broker))
    }

    fn retry_delay(&self, _kind: Kind) -> Duration {
        RETRY_DELAY
    }

    fn dead_letters(&self, kind: Kind) -> Option<Source> {
        let topology = Topology::default();
        let name = match kind {
            Kind::Queue => topology.dead_letter_queue(),
            Kind::Stream => topology.dead_letter_topic(),
        };
        Some(kind.source_of(Pattern::new(name).ok()?))
    }
}

/// The places for dead letters.
#[must_use]
pub fn topology() -> Topology {
    let names = Topology::default();
    Topology {
        queues: vec![QueueSpec {
            name: names.dead_letter_queue().to_owned(),
            options: crate::broker::QueueOptions::default(),
            bindings: Vec::new(),
            aliases: Vec::new(),
        }],
        topics: vec![TopicSpec {
            name: names.dead_letter_topic().to_owned(),
            options: crate::broker::TopicOptions::default(),
        }],
        ..Topology::default()
    }
}

const RETRY_DELAY: Duration = Duration::from_millis(50);
