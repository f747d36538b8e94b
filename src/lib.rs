//! One API over RabbitMQ (task queues) and Kafka (event streams) that never
//! loses an accepted message: when a broker dies the hub spools, goes on
//! serving, and moves everything back in order, once, when the broker returns.
//!
//! Start at [`MessagingSystem`] (built from a configuration) or at
//! [`hub::MessagingHub`] (built from brokers in hand). The contract between the
//! hub and any broker is [`broker`]; the embedded broker of
//! [`adapter::embedded`] needs nothing else.
//!
//! The crate is not a cluster, a stream processor, a workflow engine or a job
//! database.

pub mod adapter;
pub mod breaker;
pub mod broker;
#[cfg(feature = "server")]
pub mod cli;
mod compression;
pub mod config;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod dead_letter;
pub mod duration;
pub mod error;
#[cfg(feature = "server")]
pub mod gateway;
pub mod hub;
#[cfg(feature = "journal")]
pub mod journal;
pub mod message;
pub mod metrics;
pub mod migration;
pub mod pipeline;
pub mod replay;
#[cfg(feature = "schema")]
pub mod schema;
pub mod secret;
pub mod system;
pub mod topic;
pub mod topology;

pub use broker::{
    Delivery, EventStreamBroker, Handler, HandlerError, MessageBroker, Outcome, PublishOptions,
    Receipt, SubscribeOptions, Subscription, TaskQueueBroker,
};
pub use error::{Assume, Error, ErrorCode, Result};
pub use message::{Event, Message, MessageId, Priority, Task, Timestamp};
pub use system::MessagingSystem;
pub use topic::{Pattern, Topic};
