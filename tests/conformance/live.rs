//! RabbitMQ and Kafka as backends of the suite, each with a node of its own
//! that the suite may kill.

// A module of a test binary: nothing is reachable from outside.
#![allow(unreachable_pub)]

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use messaging_hub::{
    Result,
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{MessageBroker, Source},
    conformance::{Capabilities, Capability as C, Factory, Kind, Restart, Target, hub::HubFactory},
    hub::{HubConfig, MessagingHub},
    topic::Pattern,
    topology::{Topology, TopologyMode},
};
use tokio::sync::Mutex;

use crate::support::{self, Unavailable};

/// Every wanted backend that needs a server, by server.
pub async fn backends(wanted: &impl Fn(&str) -> bool) -> Vec<Vec<Arc<dyn Factory>>> {
    let mut all = Vec::new();
    #[cfg(feature = "rabbitmq")]
    for version in support::RabbitVersion::ALL {
        all.push(rabbit::backends(version, wanted).await);
    }
    #[cfg(feature = "kafka")]
    all.push(kafka::backends(wanted).await);
    all
}

/// The name of the hub's column over a backend.
fn hub_over(name: &str) -> String {
    format!("hub over {name}")
}

/// The hub over a broker, with an embedded fallback for outages.
async fn hub(
    broker: Arc<dyn MessageBroker>,
    topology: Topology,
    plug: impl FnOnce(&MessagingHub, Arc<dyn MessageBroker>),
) -> Result<MessagingHub> {
    broker.connect().await?;
    let fallback = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(topology.clone()));
    fallback.connect().await?;
    let hub = MessagingHub::new(HubConfig::default(), topology);
    plug(&hub, broker);
    hub.set_fallback_broker(fallback)?;
    Ok(hub)
}

/// A node behind the restart hook: a restart needs it for itself.
struct Server<N>(Mutex<N>);

macro_rules! restart {
    ($feature:literal, $node:ty) => {
        #[cfg(feature = $feature)]
        #[async_trait]
        impl Restart for Server<$node> {
            async fn kill(&self) -> Result<(), String> {
                self.0.lock().await.kill().await;
                Ok(())
            }

            async fn start(&self) -> Result<(), String> {
                let mut node = self.0.lock().await;
                node.restart().await;
                node.wait_ready().await;
                Ok(())
            }
        }
    };
}

restart!("rabbitmq", support::Rabbit);
restart!("kafka", support::Kafka);

async fn connected(broker: Arc<dyn MessageBroker>) -> Result<Arc<dyn Target>> {
    broker.connect().await?;
    Ok(Arc::new(broker))
}

#[cfg(feature = "rabbitmq")]
mod rabbit {
    use messaging_hub::{
        adapter::rabbitmq::{RabbitMqBroker, RabbitMqConfig},
        broker::{QueueOptions, QueueType},
        secret::Secret,
        topology::{Binding, QueueSpec},
    };
    use support::{Rabbit, RabbitVersion};

    use super::*;

    pub async fn backends(
        version: RabbitVersion,
        wanted: &impl Fn(&str) -> bool,
    ) -> Vec<Arc<dyn Factory>> {
        let name = name(version);
        let over = hub_over(name);
        if !wanted(name) && !wanted(&over) {
            return Vec::new();
        }
        let server = RabbitFactory::start(version).await;
        let factory = Arc::new(support::need!(server, Vec::new()));
        let mut all: Vec<Arc<dyn Factory>> = Vec::new();
        if wanted(name) {
            all.push(factory.clone());
        }
        if wanted(&over) {
            let below = factory.clone();
            // The hub's streams are another broker's here.
            let queues = HubFactory::new(over, factory, move || {
                let topology = RabbitFactory::topology();
                Box::pin(hub(below.broker(), topology, |hub, broker| {
                    hub.set_task_queue_broker(broker);
                }))
            });
            all.push(Arc::new(queues.without(C::Streams)));
        }
        all
    }

    struct RabbitFactory {
        version: RabbitVersion,
        url: String,
        server: Server<Rabbit>,
    }

    fn name(version: RabbitVersion) -> &'static str {
        match version {
            RabbitVersion::V3_10 => "rabbitmq 3.10",
            RabbitVersion::V4 => "rabbitmq 4",
        }
    }

    impl RabbitFactory {
        async fn start(version: RabbitVersion) -> Result<Self, Unavailable> {
            let node = Rabbit::start(version).await?;
            Ok(Self {
                version,
                // A user whose password no address or name contains by chance.
                url: node.url_as_helixagent(),
                server: Server(Mutex::new(node)),
            })
        }

        fn broker(&self) -> Arc<dyn MessageBroker> {
            let config = RabbitMqConfig {
                url: Some(Secret::new(self.url.as_str())),
                ..RabbitMqConfig::default()
            };
            let topology = Arc::new(Self::topology());
            RabbitMqBroker::new(config, topology, TopologyMode::Apply)
        }

        /// Retries after a second instead of a minute.
        fn topology() -> Topology {
            let names = Topology::default();
            Topology {
                queues: vec![QueueSpec {
                    name: names.retry_exchange().to_owned(),
                    options: QueueOptions {
                        queue_type: Some(QueueType::Quorum),
                        message_ttl_ms: Some(RETRY.as_millis() as u64),
                        dead_letter_exchange: Some(String::new()),
                        dead_letter_strategy: Some("at-least-once".to_owned()),
                        overflow: Some("reject-publish".to_owned()),
                        ..QueueOptions::default()
                    },
                    bindings: vec![Binding {
                        exchange: names.retry_exchange().to_owned(),
                        routing_key: "#".to_owned(),
                    }],
                    aliases: Vec::new(),
                }],
                ..Topology::default()
            }
        }
    }

    #[async_trait]
    impl Factory for RabbitFactory {
        fn name(&self) -> String {
            name(self.version).to_owned()
        }

        /// A stream is an exchange with a queue for each group: it keeps no
        /// history and no offsets, so of streams only what needs neither.
        fn capabilities(&self) -> Capabilities {
            Capabilities::from([
                C::Queues,
                C::Streams,
                C::Groups,
                C::Priority,
                C::Ttl,
                C::DeadLetters,
                C::Retry,
                C::Persistent,
                C::OutlivesClient,
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
                C::BoundedPrefetch,
            ])
        }

        async fn connect(&self) -> Result<Arc<dyn Target>> {
            connected(self.broker()).await
        }

        fn retry_delay(&self, _kind: Kind) -> Duration {
            RETRY
        }

        fn dead_letters(&self, kind: Kind) -> Option<Source> {
            let topology = Topology::default();
            let name = Pattern::new(topology.dead_letter_queue()).ok()?;
            Some(kind.source_of(name))
        }

        fn secrets(&self) -> Vec<String> {
            vec!["helixagent123".to_owned()]
        }

        /// A quorum queue's name is registered in a file that is written half a
        /// second later; killed before, RabbitMQ makes the queue anew, without
        /// its messages, and version 4 may never elect a leader for it.
        fn declaration_settles(&self) -> Duration {
            Duration::from_secs(2)
        }

        fn restart(&self) -> Option<&dyn Restart> {
            Some(&self.server)
        }
    }

    const RETRY: Duration = Duration::from_secs(1);
}

#[cfg(feature = "kafka")]
mod kafka {
    use messaging_hub::{
        adapter::kafka::{KafkaBroker, KafkaConfig},
        broker::TopicOptions,
        topology::TopicSpec,
    };
    use support::Kafka;

    use super::*;

    pub async fn backends(wanted: &impl Fn(&str) -> bool) -> Vec<Arc<dyn Factory>> {
        let over = hub_over(NAME);
        if !wanted(NAME) && !wanted(&over) {
            return Vec::new();
        }
        let server = KafkaFactory::start().await;
        let factory = Arc::new(support::need!(server, Vec::new()));
        let mut all: Vec<Arc<dyn Factory>> = Vec::new();
        if wanted(NAME) {
            all.push(factory.clone());
        }
        if wanted(&over) {
            let below = factory.clone();
            all.push(Arc::new(HubFactory::new(over, factory, move || {
                let topology = KafkaFactory::topology();
                Box::pin(hub(below.broker(), topology, |hub, broker| {
                    hub.set_event_stream_broker(broker);
                }))
            })));
        }
        all
    }

    struct KafkaFactory {
        bootstrap: String,
        server: Server<Kafka>,
    }

    impl KafkaFactory {
        async fn start() -> Result<Self, Unavailable> {
            let node = Kafka::start().await?;
            Ok(Self {
                bootstrap: node.bootstrap().to_owned(),
                server: Server(Mutex::new(node)),
            })
        }

        fn broker(&self) -> Arc<dyn MessageBroker> {
            let config = KafkaConfig {
                brokers: vec![self.bootstrap.clone()],
                ..KafkaConfig::default()
            };
            KafkaBroker::new(config, Arc::new(Self::topology()), TopologyMode::Apply)
        }

        fn topology() -> Topology {
            let names = Topology::default();
            Topology {
                topics: vec![TopicSpec {
                    name: names.dead_letter_topic().to_owned(),
                    options: TopicOptions::default(),
                }],
                ..Topology::default()
            }
        }
    }

    #[async_trait]
    impl Factory for KafkaFactory {
        fn name(&self) -> String {
            NAME.to_owned()
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities::from([
                C::Streams,
                C::DeadLetters,
                C::Retry,
                C::Offsets,
                C::Seek,
                C::Groups,
                C::GrouplessReaders,
                C::HistoryReplay,
                C::Persistent,
                C::OutlivesClient,
                C::RedeliveredInStreams,
                C::UnroutableRefused,
                C::PerKeyOrder,
                C::OrderedSingleConsumer,
                C::HandlerOptions,
                C::TopicMetadata,
                C::Unconfirmed,
                C::BoundedPrefetch,
            ])
        }

        async fn connect(&self) -> Result<Arc<dyn Target>> {
            connected(self.broker()).await
        }

        fn retry_delay(&self, _kind: Kind) -> Duration {
            RETRY
        }

        fn dead_letters(&self, kind: Kind) -> Option<Source> {
            let topology = Topology::default();
            let name = Pattern::new(topology.dead_letter_topic()).ok()?;
            Some(kind.source_of(name))
        }

        fn restart(&self) -> Option<&dyn Restart> {
            Some(&self.server)
        }
    }

    const NAME: &str = "kafka";
    const RETRY: Duration = Duration::from_millis(100);
}
