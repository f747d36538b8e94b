//! What a publish is compressed with, and by whom: Kafka's producer compresses
//! its batches itself; for every other broker the hub does it, before the message
//! is spooled or written, so that the spool holds it small too.

use super::{MessagingHub, publish::TopicEntry};
use crate::{
    broker::{BrokerType, Compression, PublishOptions},
    compression,
    error::{Error, ErrorCode, Result},
    message::Message,
};

/// Who compresses, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// For the lane: what the broker's client is told.
    pub(super) broker: Option<Compression>,
    /// For the message: what the hub does.
    pub(super) hub: Compression,
}

impl MessagingHub {
    /// The publish's own wish beats the route's, the route's beats the hub's.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for what cannot be done on the way to this broker.
    pub(super) fn compression(&self, entry: &TopicEntry, options: &PublishOptions) -> Result<Plan> {
        let wish = options.compression.or(entry.route.compression);
        if entry.broker.broker_type() == BrokerType::Kafka {
            return Ok(Plan {
                broker: wish,
                hub: Compression::None,
            });
        }
        let hub = wish.unwrap_or(self.0.config.compression.algorithm);
        match compression::unusable(hub) {
            None => Ok(Plan { broker: None, hub }),
            Some(why) => Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("compression: {why}"),
            )
            .on(entry.topic.as_str())),
        }
    }

    /// Compresses a message that is large enough and gets smaller by it.
    ///
    /// # Cancel safety
    /// Dropped, nothing was done.
    pub(super) async fn compress(&self, message: &mut Message, algorithm: Compression) {
        let threshold = self.0.config.compression.threshold;
        if algorithm == Compression::None
            || message.content_encoding.is_some()
            || (message.payload.len() as u64) < threshold
        {
            return;
        }
        let payload = message.payload.clone();
        let smaller = if payload.len() <= AT_ONCE {
            compression::smaller(&payload, algorithm)
        } else {
            // Joined here; whoever gives up waiting leaves it to its end, which
            // changes nothing.
            let work = move || compression::smaller(&payload, algorithm);
            tokio::task::spawn_blocking(work).await.unwrap_or_default()
        };
        if let Some(smaller) = smaller {
            compression::mark(message, algorithm, smaller);
        }
    }
}

/// Bytes that are compressed where the publisher runs; a millisecond or so. More
/// would hold up others of its thread.
const AT_ONCE: usize = 128 * 1024;
