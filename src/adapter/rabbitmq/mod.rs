//! RabbitMQ over AMQP 0-9-1.

pub mod config;

pub use config::{RabbitMqConfig, TlsConfig};
