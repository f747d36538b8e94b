//! From a consumer to handlers: order, concurrency, panics, time-outs, retries.

use std::sync::Arc;

use super::{Handler, MessageBroker, Source, SubscribeOptions, Subscription};
use crate::{error::Result, metrics::MetricsRecorder, topic::Pattern};

/// The running subscriptions of a broker.
#[derive(Debug, Default)]
pub struct Subscriptions {}

impl Subscriptions {
    /// Starts a consumer and dispatches it to a handler.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`].
    pub async fn start(
        &self,
        broker: &dyn MessageBroker,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
        recorder: &Arc<MetricsRecorder>,
    ) -> Result<Subscription> {
        let consumer = broker.consume(source, &options).await?;
        let _ = (handler, recorder);
        Ok(Subscription::new(
            String::new(),
            source.pattern().clone(),
            vec![consumer.control],
            Vec::new(),
        ))
    }

    /// Ends every subscription to exactly this pattern.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` when there is none.
    pub async fn unsubscribe(&self, pattern: &Pattern) -> Result<()> {
        let _ = pattern;
        Ok(())
    }

    /// Ends all.
    pub async fn close(&self) {}
}
