//! RabbitMQ over AMQP 0-9-1: work queues, and streams as far as exchanges and
//! queues can stand in for them. Two connections for each generation, one task
//! for each publishing channel and each consumer. It refuses what RabbitMQ
//! cannot do (offsets, history, compression by the client) instead of
//! pretending.

mod acks;
mod address;
mod arguments;
mod backoff;
mod board;
mod broker;
pub mod config;
mod connection;
mod consumer;
mod courier;
mod error;
mod lane;
mod ledger;
mod link;
mod management;
mod publisher;
mod queue;
mod reader;
mod session;
mod shared;
mod tls;
mod topology;
mod wire;

pub use broker::RabbitMqBroker;
pub use config::{RabbitMqConfig, TlsConfig};
