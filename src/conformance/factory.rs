//! How a backend takes part: what it can do, and how to reach it.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

use super::Target;
use crate::{
    broker::{QueueOptions, Source, TopicOptions},
    error::Result,
    topic::{Pattern, Topic},
};

/// Queue or stream; most checks run once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A work queue.
    Queue,
    /// A stream.
    Stream,
}

impl Kind {
    /// Both.
    pub const ALL: &'static [Self] = &[Self::Queue, Self::Stream];

    /// `queue` or `stream`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Stream => "stream",
        }
    }

    /// What a reader of `topic` reads.
    #[must_use]
    pub fn source(self, topic: &Topic) -> Source {
        self.source_of(Pattern::from(topic))
    }

    /// What a reader of all topics that match reads.
    #[must_use]
    pub fn source_of(self, pattern: Pattern) -> Source {
        match self {
            Self::Queue => Source::Queue(pattern),
            Self::Stream => Source::Stream(pattern),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a backend can do. A declared capability is a promise: its checks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Capability {
    /// Work queues.
    Queues,
    /// Streams.
    Streams,
    /// Higher priorities first, in queues made with `max_priority`.
    Priority,
    /// What expired in a queue is not handed out.
    Ttl,
    /// A task is not handed out before its `scheduled_at`.
    Delay,
    /// A dead-lettered message can be read at [`Factory::dead_letters`].
    DeadLetters,
    /// A failed message comes again after [`Factory::retry_delay`].
    Retry,
    /// Groups' positions can be read and committed.
    Offsets,
    /// Groups' positions can be moved.
    Seek,
    /// Each group of a stream gets everything, its members share it.
    Groups,
    /// Readers of a stream without a group.
    GrouplessReaders,
    /// Late readers of a stream can have what was published before.
    HistoryReplay,
    /// Confirmed messages survive the kill of the server.
    Persistent,
    /// Messages and positions outlive the client: a new one finds them.
    OutlivesClient,
    /// `redelivered` is set on what a queue hands out again.
    RedeliveredInQueues,
    /// `redelivered` is set on what a stream hands out again.
    RedeliveredInStreams,
    /// A publish to a topic that does not exist is refused.
    UnroutableRefused,
    /// Handlers of one key run one after the other, in publish order.
    PerKeyOrder,
    /// One reader gets a publisher's messages in publish order.
    OrderedSingleConsumer,
    /// `queue_stats`.
    QueueStats,
    /// `dequeue_task`.
    Dequeue,
    /// `purge_queue`.
    Purge,
    /// Queues that expire messages (`message_ttl_ms`).
    QueueTtl,
    /// A queue declared again with other options is refused.
    DeclareConflict,
    /// `filter` and `handler_timeout` of handlers.
    HandlerOptions,
    /// A publish without a confirm.
    Unconfirmed,
    /// `topic_metadata`.
    TopicMetadata,
    /// Unfinished messages are bounded by prefetch and `max_poll_records`.
    BoundedPrefetch,
}

/// The set of what a backend can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(BTreeSet<Capability>);

impl Capabilities {
    /// Whether it is declared.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        self.0.contains(&capability)
    }

    /// Whether queues, or streams, are declared.
    #[must_use]
    pub fn has_kind(&self, kind: Kind) -> bool {
        self.has(match kind {
            Kind::Queue => Capability::Queues,
            Kind::Stream => Capability::Streams,
        })
    }

    /// With one more.
    #[must_use]
    pub fn with(mut self, capability: Capability) -> Self {
        self.0.insert(capability);
        self
    }

    /// Without one of them.
    #[must_use]
    pub fn without(mut self, capability: Capability) -> Self {
        self.0.remove(&capability);
        self
    }
}

impl FromIterator<Capability> for Capabilities {
    fn from_iter<I: IntoIterator<Item = Capability>>(all: I) -> Self {
        Self(all.into_iter().collect())
    }
}

impl<const N: usize> From<[Capability; N]> for Capabilities {
    fn from(all: [Capability; N]) -> Self {
        all.into_iter().collect()
    }
}

/// What a check wants of the queue or stream that is made for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which of the two.
    pub kind: Kind,
    /// Highest priority of a queue.
    pub max_priority: Option<u8>,
    /// How long messages of a queue live.
    pub message_ttl_ms: Option<u64>,
    /// Partitions of a stream. Default 3.
    pub partitions: i32,
    /// Largest message of a stream in bytes. Default: the backend's.
    pub max_message_bytes: Option<u64>,
}

impl Wanted {
    /// Safe defaults of a kind.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            max_priority: None,
            message_ttl_ms: None,
            partitions: TopicOptions::default().partitions,
            max_message_bytes: None,
        }
    }

    /// One line of order: a stream with one partition.
    #[must_use]
    pub fn single_partition(kind: Kind) -> Self {
        Self {
            partitions: 1,
            ..Self::new(kind)
        }
    }

    /// As options of a queue.
    #[must_use]
    pub fn queue_options(&self) -> QueueOptions {
        QueueOptions {
            max_priority: self.max_priority,
            message_ttl_ms: self.message_ttl_ms,
            ..QueueOptions::default()
        }
    }

    /// As options of a stream.
    #[must_use]
    pub fn topic_options(&self) -> TopicOptions {
        TopicOptions {
            partitions: self.partitions,
            max_message_bytes: self.max_message_bytes,
            ..TopicOptions::default()
        }
    }
}

/// Kills and restarts the server behind a factory.
#[async_trait]
pub trait Restart: Send + Sync {
    /// Kills the server without warning (SIGKILL); returns when it is dead.
    ///
    /// # Errors
    /// Why it could not be killed, in words.
    async fn kill(&self) -> Result<(), String>;

    /// Starts it again, on the same address and data; returns when it serves.
    ///
    /// # Errors
    /// Why it did not start, in words.
    async fn start(&self) -> Result<(), String>;
}

/// A backend that the suite runs against.
#[async_trait]
pub trait Factory: Send + Sync + 'static {
    /// Column head in the table, such as `rabbitmq 4`.
    fn name(&self) -> String;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// A connected client of the backend. Where a backend lives inside its
    /// client (an embedded broker), this is the same client again until it is
    /// closed, and then a new one on the same data.
    ///
    /// # Errors
    /// Why it could not connect.
    async fn connect(&self) -> Result<Arc<dyn Target>>;

    /// Whether [`Factory::connect`] gives the same client to everybody until it
    /// is closed; then checks run one at a time. Default: where nothing outlives
    /// a client.
    fn one_client(&self) -> bool {
        !self.capabilities().has(Capability::OutlivesClient)
    }

    /// A check that runs alone begins: what earlier ones left is not needed any
    /// more. Default: it stays.
    fn begin(&self) {}

    /// The name of a fresh queue or stream, made from a part that is unique.
    fn topic_name(&self, kind: Kind, unique: &str) -> String {
        format!("conformance.{kind}.{unique}")
    }

    /// The shortest delay at which this backend tries a failed message again.
    fn retry_delay(&self, kind: Kind) -> Duration {
        let _ = kind;
        Duration::ZERO
    }

    /// Where dead letters of this kind can be read.
    fn dead_letters(&self, kind: Kind) -> Option<Source> {
        let _ = kind;
        None
    }

    /// Texts that must show up nowhere, such as the password in use.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }

    /// How long after its declaration a queue or stream may still be lost, or
    /// made unusable, by a kill of the server. The suite kills no younger one.
    fn declaration_settles(&self) -> Duration {
        Duration::ZERO
    }

    /// How to kill and restart the server, if the suite may.
    fn restart(&self) -> Option<&dyn Restart> {
        None
    }
}
