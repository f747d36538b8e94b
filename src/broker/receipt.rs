//! What became of a publish (C1).

use serde::{Deserialize, Serialize};

use super::BrokerType;
use crate::message::MessageId;

/// The answer to a publish that did not fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The message's id.
    pub id: MessageId,
    /// Who has it now.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Who has the message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The broker confirmed it (RabbitMQ: acked and not returned; Kafka: all
    /// in-sync replicas).
    Delivered {
        /// The broker.
        via: BrokerType,
        /// Where in the broker, as far as it says.
        position: Option<Position>,
    },
    /// The spool has it and will move it to the broker.
    Spooled {
        /// Whether it survives the hub's death.
        durable: bool,
    },
    /// Written without asking for a confirm; nothing is promised.
    Sent {
        /// The broker.
        via: BrokerType,
    },
}

/// Where a broker put a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Partition of a stream.
    pub partition: i32,
    /// Offset in the partition.
    pub offset: i64,
}
