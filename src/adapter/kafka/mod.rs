//! Apache Kafka.

pub mod config;

pub use config::{KafkaConfig, SaslMechanism};
