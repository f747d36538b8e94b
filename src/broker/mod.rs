//! The contract between the hub and any broker: traits, options, outcomes.
//!
//! ```text
//!   publish:  hub lane --Vec<Submission>--> Lane (one task, one channel) --> broker
//!                      <----Confirmation---
//!   consume:  broker --> Consumer (bounded) --Vec<Delivery>--> dispatch --> handler
//!                                          <--Settlement------
//! ```
//!
//! A broker is reached through two streams and nothing else: a [`Lane`] that
//! takes batches and confirms each message, and a [`Consumer`] that gives
//! batches and takes settlements. Both pay a virtual call once a batch or less.
//! No type of a client library appears here, and there is no I/O.

mod broker_type;
pub mod consumer;
mod delays;
pub mod delivery;
pub mod direct;
pub mod dispatch;
pub mod handler;
pub mod lane;
pub mod options;
pub mod receipt;
pub mod stats;
pub mod subscription;
mod traits;
pub mod transaction;

pub use broker_type::BrokerType;
pub use consumer::{ConnectionState, Consumer, ConsumerControl, RetryMode, Source};
pub use delays::Delays;
pub use delivery::{Delivery, Received, Settlement, Verdict};
pub use handler::{
    BatchHandler, Blame, Handler, HandlerError, HandlerFuture, ReadyFuture, ServiceHandler, Turn,
};
pub use lane::{Confirmation, Fate, Lane, LaneOptions, OrderKey, Submission, TopicKind};
pub use options::{
    Compression, OffsetReset, PublishOptions, QueueOptions, QueueType, SeekTo, StartFrom,
    StreamOptions, SubscribeOptions, TopicOptions,
};
pub use receipt::{Outcome, Position, Receipt};
pub use stats::{PartitionMetadata, QueueStats, TopicMetadata};
pub use subscription::Subscription;
pub use traits::{EventStreamBroker, MessageBroker, TaskQueueBroker};
pub use transaction::{Outgoing, TransactionalBroker, Transactor, TransformFuture, Transformer};
