//! Apache Kafka: streams, their groups and their topics.
//!
//! One producer for each codec, one thread for each consumer, one probe that
//! knows whether the brokers answer; one thread for each transactional id. No rdkafka type leaves this folder.

pub mod config;

#[cfg(feature = "kafka")]
mod admin;
#[cfg(feature = "kafka")]
mod broker;
#[cfg(feature = "kafka")]
mod client;
#[cfg(feature = "kafka")]
mod connection;
#[cfg(feature = "kafka")]
mod consumer;
#[cfg(feature = "kafka")]
mod error;
#[cfg(feature = "kafka")]
mod groups;
#[cfg(feature = "kafka")]
mod link;
#[cfg(feature = "kafka")]
mod partitioner;
#[cfg(feature = "kafka")]
mod producer;
#[cfg(feature = "kafka")]
mod publisher;
#[cfg(feature = "kafka")]
mod record;
#[cfg(feature = "kafka")]
mod topics;
#[cfg(feature = "kafka")]
mod topology;
#[cfg(feature = "kafka")]
mod transaction;

#[cfg(feature = "kafka")]
pub use broker::KafkaBroker;
pub use config::{IsolationLevel, KafkaConfig, RequiredAcks, SaslConfig, SaslMechanism};
