//! The kinds of broker.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which kind of broker something is or came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BrokerType {
    /// RabbitMQ over AMQP 0-9-1.
    RabbitMq,
    /// Apache Kafka.
    Kafka,
    /// The embedded broker.
    InMemory,
}

impl BrokerType {
    /// `rabbitmq`, `kafka` or `inmemory`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RabbitMq => "rabbitmq",
            Self::Kafka => "kafka",
            Self::InMemory => "inmemory",
        }
    }
}

impl fmt::Display for BrokerType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
