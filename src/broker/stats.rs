//! What brokers report about queues and topics.

use serde::{Deserialize, Serialize};

use crate::message::Timestamp;

/// The state of a queue. `None` means that the broker was not asked (RabbitMQ
/// tells it only through its management API).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueStats {
    /// The queue.
    pub name: String,
    /// All messages.
    pub messages: u64,
    /// Consumers.
    pub consumers: u64,
    /// Messages ready to be handed out.
    pub messages_ready: u64,
    /// Messages handed out and not settled.
    pub messages_unacked: Option<u64>,
    /// Bytes of payload.
    pub message_bytes: Option<u64>,
    /// Published per second.
    pub publish_rate: Option<f64>,
    /// Delivered per second.
    pub deliver_rate: Option<f64>,
    /// When this was read.
    pub timestamp: Timestamp,
}

/// The state of a topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopicMetadata {
    /// The topic.
    pub name: String,
    /// Its partitions.
    pub partitions: Vec<PartitionMetadata>,
    /// Copies of each.
    pub replication_factor: i32,
    /// How long messages are kept, in milliseconds; none: for ever.
    pub retention_ms: Option<i64>,
    /// `delete`, `compact` or both.
    pub cleanup_policy: String,
    /// When this was read.
    pub timestamp: Timestamp,
}

/// The state of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionMetadata {
    /// Its number.
    pub id: i32,
    /// The node that leads it; -1 without one.
    pub leader: i32,
    /// Nodes that have a copy.
    pub replicas: Vec<i32>,
    /// Nodes whose copy is up to date.
    pub isr: Vec<i32>,
    /// The oldest offset that is still there.
    pub low_watermark: i64,
    /// The offset that the next message gets.
    pub high_watermark: i64,
}
