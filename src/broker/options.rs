//! Options of every operation, with their defaults. An option that a broker
//! cannot honour is refused with `INVALID_CONFIG`; none is ignored.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::Received;
use crate::message::{Key, Timestamp};

/// Compression of a batch on its way to a broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// None.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// Snappy.
    Snappy,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// How to publish.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishOptions {
    /// Refuse what no queue takes. Default true.
    pub mandatory: bool,
    /// AMQP exchange; empty means where the topology maps the topic.
    pub exchange: String,
    /// AMQP routing key; empty means the topology's, or the topic.
    pub routing_key: String,
    /// Media type for messages that have none. Default `application/json`.
    pub content_type: String,
    /// Encoding for messages that have none.
    pub content_encoding: Option<String>,
    /// How long to wait for room and for the outcome. Default 30 s.
    pub timeout: Duration,
    /// Ask for a confirm. Default true; false voids C1-C4 and ends in `Sent`.
    pub confirm: bool,
    /// Partition of a stream.
    pub partition: Option<i32>,
    /// Key for messages that have none.
    pub key: Option<Key>,
    /// Compression. Kafka's producer does it itself (default: its setting). For
    /// other brokers the hub does (default: the route's, then `hub.compression`),
    /// except snappy, which it refuses; a direct publish to RabbitMQ refuses all.
    pub compression: Option<Compression>,
    /// Messages written together at most when publishing straight to a broker.
    /// Default 100. The hub's lanes write whatever waits, up to the window.
    pub batch_size: usize,
    /// How long a batch may wait to fill while the lane is busy. Default 10 ms.
    /// No message waits for others while the lane is free, so it never adds to
    /// an idle publish.
    pub linger: Duration,
}

impl Default for PublishOptions {
    fn default() -> Self {
        Self {
            mandatory: true,
            exchange: String::new(),
            routing_key: String::new(),
            content_type: "application/json".to_owned(),
            content_encoding: None,
            timeout: Duration::from_secs(30),
            confirm: true,
            partition: None,
            key: None,
            compression: None,
            batch_size: 100,
            linger: Duration::from_millis(10),
        }
    }
}

/// Where a group without a committed position starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OffsetReset {
    /// At the oldest message.
    Earliest,
    /// At the next message.
    Latest,
    /// Nowhere: it is an error.
    None,
}

/// Where a reader without a group starts.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum StartFrom {
    /// At the next message.
    #[default]
    Latest,
    /// At the oldest message.
    Earliest,
    /// At the first message of this time or later.
    Time(Timestamp),
    /// At these offsets, by topic and partition; others at the latest.
    Offsets(BTreeMap<(String, i32), i64>),
}

/// A test that a message must pass to be handed out; what fails it is acked.
#[derive(Clone)]
pub struct Filter(Arc<dyn Fn(&Received) -> bool + Send + Sync>);

impl Filter {
    /// Wraps a predicate.
    pub fn new(predicate: impl Fn(&Received) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(predicate))
    }

    /// Whether it passes.
    #[must_use]
    pub fn passes(&self, received: &Received) -> bool {
        (self.0)(received)
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Filter")
    }
}

/// How to subscribe.
#[derive(Clone, Debug)]
pub struct SubscribeOptions {
    /// Consumer tag. Default: made up.
    pub consumer_tag: Option<String>,
    /// Ack before handling (at most once). Default false.
    pub auto_ack: bool,
    /// Refuse other consumers of the queue. Default false.
    pub exclusive: bool,
    /// Arguments for a queue that is made for this subscription.
    pub queue_arguments: BTreeMap<String, String>,
    /// Unsettled deliveries at most (queues). Default 10.
    pub prefetch: u16,
    /// Handlers that run at once at most. Default: prefetch.
    pub concurrency: Option<usize>,
    /// Group that shares the work of a stream and commits its position.
    pub group_id: Option<String>,
    /// Static membership of the group.
    pub group_instance_id: Option<String>,
    /// Default 10 s.
    pub session_timeout: Duration,
    /// Default 3 s.
    pub heartbeat_interval: Duration,
    /// Unfinished messages of a stream at most. Default 500.
    pub max_poll_records: usize,
    /// Default earliest with a group, latest without.
    pub offset_reset: Option<OffsetReset>,
    /// Default 5 s.
    pub commit_interval: Duration,
    /// What is handed out; the rest is acked. Default everything.
    pub filter: Option<Filter>,
    /// Batches that wait for the reader at most. Default 100.
    pub buffer_size: usize,
    /// Try a failed message again. Default true.
    pub retry_on_error: bool,
    /// Overrides the message's own limit.
    pub max_retries: Option<u32>,
    /// Default: the route's tier (tasks 60 s, events 1 s).
    pub retry_delay: Option<Duration>,
    /// How long a handler may take. Default: no limit. RabbitMQ waits for an ack
    /// for 30 minutes (`consumer_timeout`), so more is refused there, unless
    /// `long_running` is set.
    pub handler_timeout: Option<Duration>,
    /// Through a hub, tasks of one queue at RabbitMQ: each is handed over to the
    /// hub's own disk and acked before its handler runs, which may take as long
    /// as it likes. Default false, or as the route says. Needs a data folder.
    /// Danger: what was handed over waits for this hub if it dies.
    pub long_running: bool,
    /// Where a reader without a group starts.
    pub start: StartFrom,
    /// Stream reads: bytes to wait for (default 1), bytes at most (10 MiB), how
    /// long to wait (500 ms), only this partition.
    pub stream: StreamOptions,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            consumer_tag: None,
            auto_ack: false,
            exclusive: false,
            queue_arguments: BTreeMap::new(),
            prefetch: Self::DEFAULT_PREFETCH,
            concurrency: None,
            group_id: None,
            group_instance_id: None,
            session_timeout: Duration::from_secs(10),
            heartbeat_interval: Duration::from_secs(3),
            max_poll_records: 500,
            offset_reset: None,
            commit_interval: Duration::from_secs(5),
            filter: None,
            buffer_size: 100,
            retry_on_error: true,
            max_retries: None,
            retry_delay: None,
            handler_timeout: None,
            long_running: false,
            start: StartFrom::Latest,
            stream: StreamOptions::default(),
        }
    }
}

impl SubscribeOptions {
    /// The prefetch of a subscription that says nothing.
    pub const DEFAULT_PREFETCH: u16 = 10;

    /// Defaults, with a group.
    pub fn group(id: impl Into<String>) -> Self {
        Self {
            group_id: Some(id.into()),
            ..Self::default()
        }
    }

    /// Sets the prefetch.
    #[must_use]
    pub fn with_prefetch(mut self, prefetch: u16) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets where a reader without a group starts.
    #[must_use]
    pub fn starting(mut self, from: StartFrom) -> Self {
        self.start = from;
        self
    }

    /// Where a group without a committed position starts.
    #[must_use]
    pub fn effective_reset(&self) -> OffsetReset {
        self.offset_reset.unwrap_or(if self.group_id.is_some() {
            OffsetReset::Earliest
        } else {
            OffsetReset::Latest
        })
    }
}

/// How a stream is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// Messages that wait for the reader at most. Default 1000.
    pub buffer_size: usize,
    /// Bytes that a fetch waits for. Default 1.
    pub min_bytes: usize,
    /// Bytes that a fetch brings at most. Default 10 MiB.
    pub max_bytes: usize,
    /// How long a fetch waits. Default 500 ms.
    pub max_wait: Duration,
    /// Read this partition only.
    pub partition: Option<i32>,
    /// Read these partitions of one topic, each up to this offset (the first that
    /// is not read), and end: the deliveries are closed when all of it was handed
    /// over. Offsets that were compacted away are not waited for. For readers
    /// without a group. Default: every partition, for ever.
    pub until: Option<BTreeMap<i32, i64>>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            buffer_size: 1000,
            min_bytes: 1,
            max_bytes: 10 * 1024 * 1024,
            max_wait: Duration::from_millis(500),
            partition: None,
            until: None,
        }
    }
}

/// Kind of a RabbitMQ queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// Replicated, fsynced; knows no `max_priority`.
    Quorum,
    /// One node, page cache.
    Classic,
}

/// How a queue is declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QueueOptions {
    /// Survives restarts. Default true.
    pub durable: bool,
    /// Goes with its last consumer. Default false.
    pub auto_delete: bool,
    /// Belongs to one connection. Default false.
    pub exclusive: bool,
    /// Where dead letters go.
    pub dead_letter_exchange: Option<String>,
    /// With this key.
    pub dead_letter_routing_key: Option<String>,
    /// How long messages live, in milliseconds.
    pub message_ttl_ms: Option<u64>,
    /// How long the unused queue itself lives, in milliseconds.
    pub expires_ms: Option<u64>,
    /// Messages at most.
    pub max_length: Option<u64>,
    /// Bytes at most.
    pub max_length_bytes: Option<u64>,
    /// What happens at the limit: `drop-head`, `reject-publish` or
    /// `reject-publish-dlx`.
    pub overflow: Option<String>,
    /// Highest priority; makes the default queue type classic.
    pub max_priority: Option<u8>,
    /// `at-most-once` or `at-least-once` (quorum).
    pub dead_letter_strategy: Option<String>,
    /// Hand out to one consumer at a time.
    pub single_active_consumer: bool,
    /// Default quorum, or classic where `max_priority`, `exclusive` or
    /// `auto_delete` is set or `durable` is not.
    pub queue_type: Option<QueueType>,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self {
            durable: true,
            auto_delete: false,
            exclusive: false,
            dead_letter_exchange: None,
            dead_letter_routing_key: None,
            message_ttl_ms: None,
            expires_ms: None,
            max_length: None,
            max_length_bytes: None,
            overflow: None,
            max_priority: None,
            dead_letter_strategy: None,
            single_active_consumer: false,
            queue_type: None,
        }
    }
}

impl QueueOptions {
    /// The type that holds when none is set: quorum queues ignore
    /// `max_priority` and cannot be exclusive, auto-deleted or transient.
    #[must_use]
    pub fn effective_type(&self) -> QueueType {
        self.queue_type.unwrap_or(
            if self.max_priority.is_some() || self.exclusive || self.auto_delete || !self.durable {
                QueueType::Classic
            } else {
                QueueType::Quorum
            },
        )
    }
}

/// How a topic is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopicOptions {
    /// Default 3.
    pub partitions: i32,
    /// Default 1.
    pub replication: i32,
    /// How long messages are kept, in milliseconds. Default 7 days.
    pub retention_ms: i64,
    /// `delete` (default), `compact` or `compact,delete`.
    pub cleanup_policy: String,
    /// Default `lz4`.
    pub compression: String,
    /// Largest message in bytes.
    pub max_message_bytes: Option<u64>,
    /// Further broker settings, by Kafka's names.
    pub settings: BTreeMap<String, String>,
}

impl Default for TopicOptions {
    fn default() -> Self {
        Self {
            partitions: 3,
            replication: 1,
            retention_ms: 7 * 24 * 3600 * 1000,
            cleanup_policy: "delete".to_owned(),
            compression: "lz4".to_owned(),
            max_message_bytes: None,
            settings: BTreeMap::new(),
        }
    }
}

/// Where a group's position is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    /// To an offset.
    Offset(i64),
    /// To the first message of this time or later.
    Time(Timestamp),
    /// To the oldest message.
    Beginning,
    /// Behind the newest message.
    End,
}
