//! RabbitMQ over AMQP 0-9-1: work queues, and streams as far as exchanges and
//! queues can stand in for them. Two connections for each generation, one task
//! for each publishing channel and each consumer. It refuses what RabbitMQ
//! cannot do (offsets, history, compression by the client) instead of
//! pretending.

#[cfg(feature = "rabbitmq")]
mod acks;
#[cfg(feature = "rabbitmq")]
mod address;
#[cfg(feature = "rabbitmq")]
mod arguments;
#[cfg(feature = "rabbitmq")]
mod backoff;
#[cfg(feature = "rabbitmq")]
mod board;
#[cfg(feature = "rabbitmq")]
mod broker;
pub mod config;
#[cfg(feature = "rabbitmq")]
mod connection;
#[cfg(feature = "rabbitmq")]
mod consumer;
#[cfg(feature = "rabbitmq")]
mod courier;
#[cfg(feature = "rabbitmq")]
mod error;
#[cfg(feature = "rabbitmq")]
mod lane;
#[cfg(feature = "rabbitmq")]
mod ledger;
#[cfg(feature = "rabbitmq")]
mod link;
#[cfg(feature = "rabbitmq")]
mod management;
#[cfg(feature = "rabbitmq")]
mod publisher;
#[cfg(feature = "rabbitmq")]
mod queue;
#[cfg(feature = "rabbitmq")]
mod reader;
#[cfg(feature = "rabbitmq")]
mod session;
#[cfg(feature = "rabbitmq")]
mod shared;
#[cfg(feature = "rabbitmq")]
mod tls;
#[cfg(feature = "rabbitmq")]
mod topology;
#[cfg(feature = "rabbitmq")]
mod verdicts;
#[cfg(feature = "rabbitmq")]
mod watchdog;
#[cfg(feature = "rabbitmq")]
mod wire;

#[cfg(feature = "rabbitmq")]
pub use broker::RabbitMqBroker;
pub use config::{RabbitMqConfig, TlsConfig};
