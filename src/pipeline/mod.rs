//! Layers around a handler: what every consumer needs and nobody should write
//! twice. Logging, validation, a circuit breaker, a rate, a bound on what runs
//! at once, time-outs, and retries without giving the message back.
//!
//! ```text
//!              .- the gate: before a message is taken -.
//!   delivery --> circuit breaker --> rate --> concurrency
//!            --> logging --> validation --> timeout --> retry --> timeout --> handler
//! ```
//!
//! What waits (breaker, rate, concurrency) waits before a message is started:
//! the dispatcher then takes no more, and so the pressure reaches the broker by
//! the prefetch, or by paused partitions. Time-out, retry, rate and concurrency
//! are tower's own layers.
//!
//! It stores nothing, settles nothing, and starts no task. It refuses a stack
//! whose layers stand in an order that does not do what it seems to
//! ([`Pipeline`] has the order and its reasons).

mod breaker;
mod build;
mod circuit;
mod fault;
mod logging;
mod order;
mod rate;
mod retry;
#[cfg(test)]
mod tests;
mod validate;

use std::time::Duration;

pub use breaker::CircuitBreaker;
pub use build::Piped;
pub use retry::Retry;
pub use validate::{Field, Validate};

use crate::{
    broker::{BatchHandler, Handler, Received},
    error::Result,
};

use order::Layer;

/// Builds a handler from layers, named from the outermost to the innermost.
///
/// Each layer is optional and may stand once; only these orders are built:
///
/// | Layer | Must stand outside of | Because else |
/// |---|---|---|
/// | [`logging`](Self::logging) | all others | what an outer layer refuses would not be logged |
/// | [`validate`](Self::validate) | all but logging | a bad message would be retried, and counted as a failure of what the breaker guards |
/// | [`circuit_breaker`](Self::circuit_breaker) | rate, concurrency, timeout, retry | a retry outside of it would hammer what it guards, and time-outs would not count |
/// | [`rate_limit`](Self::rate_limit) | concurrency, timeout, retry | a message that waits for the rate would hold a place among the running, or time out while it waits |
/// | [`concurrency`](Self::concurrency) | timeout, retry | the wait for a place would be part of the time-out, and each retry would queue again |
/// | [`timeout`](Self::timeout) | – | outside of a retry it bounds all attempts together, inside each; with a retry it may stand on both sides |
/// | [`retry`](Self::retry) | – | |
///
/// ```
/// use std::time::Duration;
/// use messaging_hub::{HandlerError, broker::Received,
///     pipeline::{CircuitBreaker, Pipeline, Retry, Validate}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let handler = Pipeline::new()
///     .logging()
///     .validate(Validate::new().max_payload_bytes(64 * 1024))
///     .circuit_breaker(CircuitBreaker::new(5, Duration::from_secs(10)))
///     .rate_limit(100, Duration::from_secs(1))
///     .concurrency(8)
///     .retry(Retry::new(2, Duration::from_millis(50)))
///     .timeout(Duration::from_secs(5))
///     .build(|_: Received| async { Ok::<(), HandlerError>(()) })
///     .unwrap();
/// // hub.subscribe("llm", SubscribeOptions::default(), handler).await?;
/// # let _ = handler;
/// # });
/// ```
#[derive(Clone, Debug, Default)]
pub struct Pipeline {
    layers: Vec<Layer>,
}

impl Pipeline {
    /// No layer yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Logs each call with topic, id, attempt and time taken: at debug what went
    /// well, at warn what failed. Never a payload.
    #[must_use]
    pub fn logging(self) -> Self {
        self.with(Layer::Logging)
    }

    /// Sends what misses a required field, or is too large, to the dead letters
    /// without calling the handler. Of a batch, only the bad message.
    #[must_use]
    pub fn validate(self, rules: Validate) -> Self {
        self.with(Layer::Validate(rules))
    }

    /// Pauses the subscription while what the handler needs is broken.
    #[must_use]
    pub fn circuit_breaker(self, breaker: CircuitBreaker) -> Self {
        self.with(Layer::Breaker(breaker))
    }

    /// At most `messages` (batches, in a batch pipeline) are started in each
    /// `per`. Neither has a default; both must be above zero.
    #[must_use]
    pub fn rate_limit(self, messages: u64, per: Duration) -> Self {
        self.with(Layer::Rate { messages, per })
    }

    /// At most `most` run at once, over all subscriptions that share the handler.
    #[must_use]
    pub fn concurrency(self, most: usize) -> Self {
        self.with(Layer::Concurrency(most))
    }

    /// Fails a call that takes longer, with the reason `handler_timeout`; the
    /// handler is dropped at its next await.
    #[must_use]
    pub fn timeout(self, limit: Duration) -> Self {
        self.with(Layer::Timeout(limit))
    }

    /// Calls the handler again, here and at once, before the message counts as
    /// failed. A panic is not tried again.
    #[must_use]
    pub fn retry(self, retry: Retry) -> Self {
        self.with(Layer::Retry(retry))
    }

    /// Puts the layers around a handler of single messages.
    ///
    /// # Errors
    /// `INVALID_CONFIG` when a layer stands where it does not belong, and says
    /// which must stand where; when one stands twice; when a value is out of its
    /// range.
    pub fn build(self, handler: impl Handler) -> Result<Piped<Received>> {
        Piped::single(self.layers, handler)
    }

    /// Puts the layers around a handler of batches.
    ///
    /// # Errors
    /// As [`Pipeline::build`].
    pub fn build_batch(self, handler: impl BatchHandler) -> Result<Piped<Vec<Received>>> {
        Piped::batch(self.layers, handler)
    }

    fn with(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }
}
