//! What can be measured, by the names of the command line.

use clap::ValueEnum;

use crate::broker::QueueType;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Scenario {
    /// Confirmed publishing and end to end over RabbitMQ, beside bare lapin.
    Rabbitmq,
    /// Producing and consuming over Kafka, beside bare rdkafka.
    Kafka,
    /// The embedded broker in memory, beside a bare channel.
    Embedded,
    /// The embedded broker on a disk, beside a bare file.
    Journal,
    /// Publishing over HTTP, beside a bare server.
    Http,
    /// A steady load while RabbitMQ is away and when it is back.
    Failover,
}

/// Which queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum QueueKind {
    /// On one node, in the page cache.
    Classic,
    /// Replicated, fsynced.
    Quorum,
    /// One after the other.
    Both,
}

impl QueueKind {
    /// The queue types.
    pub(super) fn types(self) -> &'static [QueueType] {
        match self {
            Self::Classic => &[QueueType::Classic],
            Self::Quorum => &[QueueType::Quorum],
            Self::Both => &[QueueType::Classic, QueueType::Quorum],
        }
    }
}

impl Scenario {
    /// As it is written on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rabbitmq => "rabbitmq",
            Self::Kafka => "kafka",
            Self::Embedded => "embedded",
            Self::Journal => "journal",
            Self::Http => "http",
            Self::Failover => "failover",
        }
    }
}
