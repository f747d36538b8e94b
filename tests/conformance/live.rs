//! RabbitMQ and Kafka as backends of the suite, each with a node of its own
//! that the suite may kill.

// A module of a test binary: nothing is reachable from outside.
#![allow(unreachable_pub)]

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use messaging_hub::{
    Result,
    broker::{MessageBroker, Source},
    conformance::{Capabilities, Capability as C, Factory, Kind, Restart, Target},
    topic::Pattern,
    topology::{Topology, TopologyMode},
};
use tokio::sync::Mutex;

use crate::support::{self, Unavailable};

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
pub use rabbit::{RabbitFactory, name as rabbit_name};

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

    pub struct RabbitFactory {
        version: RabbitVersion,
        url: String,
        server: Server<Rabbit>,
    }

    pub fn name(version: RabbitVersion) -> &'static str {
        match version {
            RabbitVersion::V3_10 => "rabbitmq 3.10",
            RabbitVersion::V4 => "rabbitmq 4",
        }
    }

    impl RabbitFactory {
        pub async fn start(version: RabbitVersion) -> Result<Self, Unavailable> {
            let node = Rabbit::start(version).await?;
            Ok(Self {
                version,
                // A user whose password no address or name contains by chance.
                url: node.url_as_helixagent(),
                server: Server(Mutex::new(node)),
            })
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

        /// Streams over an exchange and a queue for each group keep no history
        /// and no offsets, so only queues are declared.
        fn capabilities(&self) -> Capabilities {
            Capabilities::from([
                C::Queues,
                C::Priority,
                C::Ttl,
                C::DeadLetters,
                C::Retry,
                C::Persistent,
                C::OutlivesClient,
                C::RedeliveredInQueues,
                C::UnroutableRefused,
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
            let config = RabbitMqConfig {
                url: Some(Secret::new(self.url.as_str())),
                ..RabbitMqConfig::default()
            };
            let topology = Arc::new(Self::topology());
            connected(RabbitMqBroker::new(config, topology, TopologyMode::Apply)).await
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

        fn restart(&self) -> Option<&dyn Restart> {
            Some(&self.server)
        }
    }

    const RETRY: Duration = Duration::from_secs(1);
}

#[cfg(feature = "kafka")]
pub use kafka::KafkaFactory;

#[cfg(feature = "kafka")]
mod kafka {
    use messaging_hub::{
        adapter::kafka::{KafkaBroker, KafkaConfig},
        broker::TopicOptions,
        topology::TopicSpec,
    };
    use support::Kafka;

    use super::*;

    pub struct KafkaFactory {
        bootstrap: String,
        server: Server<Kafka>,
    }

    impl KafkaFactory {
        pub async fn start() -> Result<Self, Unavailable> {
            let node = Kafka::start().await?;
            Ok(Self {
                bootstrap: node.bootstrap().to_owned(),
                server: Server(Mutex::new(node)),
            })
        }
    }

    #[async_trait]
    impl Factory for KafkaFactory {
        fn name(&self) -> String {
            "kafka".to_owned()
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
            let config = KafkaConfig {
                brokers: vec![self.bootstrap.clone()],
                ..KafkaConfig::default()
            };
            let names = Topology::default();
            let topology = Arc::new(Topology {
                topics: vec![TopicSpec {
                    name: names.dead_letter_topic().to_owned(),
                    options: TopicOptions::default(),
                }],
                ..Topology::default()
            });
            connected(KafkaBroker::new(config, topology, TopologyMode::Apply)).await
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

    const RETRY: Duration = Duration::from_millis(100);
}
