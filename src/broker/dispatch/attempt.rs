//! One attempt at one message: from the filter to the verdict.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;

use super::DispatchSettings;
use crate::{
    broker::{Delivery, Handler, HandlerError, Received, RetryMode, Verdict},
    message::{
        Message, Timestamp,
        wire::{Failure, Marks},
    },
};

/// A message on its way to a handler.
#[derive(Debug)]
pub(super) struct Attempt {
    delivery: Delivery,
    /// What the handler sees: the delivery's message, with the attempts made in
    /// this process counted in.
    received: Received,
}

/// What became of an attempt.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Settled, or given back.
    Settled,
    /// To be tried again here after the delay.
    Again(Box<Attempt>, Duration),
}

impl Attempt {
    pub(super) fn first(delivery: Delivery) -> Self {
        Self {
            received: delivery.received().clone(),
            delivery,
        }
    }

    pub(super) fn received(&self) -> &Received {
        &self.received
    }

    /// Hands the message to `handler` and settles it. Dropping the future gives
    /// the message back, wherever it stands.
    pub(super) async fn run(
        self,
        handler: Arc<dyn Handler>,
        settings: Arc<DispatchSettings>,
        mode: RetryMode,
    ) -> Outcome {
        let recorder = &settings.recorder;
        if !self.delivery.is_live() {
            // The generation that delivered it has ended: it comes again, and a
            // verdict on this copy could not be given.
            return Outcome::Settled;
        }
        if self.filtered_out(&settings) {
            self.delivery.settle_now(Verdict::Ack);
            return Outcome::Settled;
        }
        let now = Timestamp::now();
        if self.received.message.is_expired(now) {
            let failure = self.failure("expired", "it expired before it could be handled");
            return self.dead_letter(failure, &settings).await;
        }
        recorder.messages_consumed.inc();
        if self.received.message.retry_count == 0 {
            // A retry has rested on purpose.
            let made = self.received.message.timestamp;
            recorder.delivery_latency.record(now.since(made));
        }
        let limit = settings.handler_timeout;
        if settings.auto_ack {
            return self.at_most_once(handler, &settings).await;
        }
        match call(handler, self.received.clone(), limit).await {
            Ok(()) => {
                recorder.messages_processed.inc();
                self.delivery.settle_now(Verdict::Ack);
                Outcome::Settled
            }
            Err(error) => self.failed(error, &settings, mode).await,
        }
    }

    fn filtered_out(&self, settings: &DispatchSettings) -> bool {
        settings.filter.as_ref().is_some_and(|filter| {
            // A filter that panics lets everything pass: losing a message by an
            // ack is worse than handling one too many.
            !std::panic::catch_unwind(AssertUnwindSafe(|| filter.passes(&self.received)))
                .unwrap_or(true)
        })
    }

    async fn at_most_once(self, handler: Arc<dyn Handler>, settings: &DispatchSettings) -> Outcome {
        let received = self.received;
        if !self.delivery.settle_now(Verdict::Ack) {
            return Outcome::Settled;
        }
        match call(handler, received.clone(), settings.handler_timeout).await {
            Ok(()) => settings.recorder.messages_processed.inc(),
            Err(error) => {
                settings.recorder.messages_failed.inc();
                tracing::warn!(
                    topic = %received.topic, id = %received.message.id, %error,
                    "a handler failed; the message was acked before, so it is not tried again"
                );
            }
        }
        Outcome::Settled
    }

    async fn failed(
        mut self,
        error: HandlerError,
        settings: &DispatchSettings,
        mode: RetryMode,
    ) -> Outcome {
        settings.recorder.messages_failed.inc();
        let message = &self.received.message;
        let limit = settings.max_retries.unwrap_or(message.max_retries);
        tracing::debug!(
            topic = %self.received.topic, id = %message.id, %error,
            retry_count = message.retry_count, limit, "a handler failed"
        );
        let failure = self.failure(&error.reason, &error.details);
        if !(error.retryable && settings.retry_on_error && message.retry_count < limit) {
            return self.dead_letter(failure, settings).await;
        }
        let delay = settings.retry_delay;
        match mode {
            RetryMode::InLane => {
                settings.recorder.messages_retried.inc();
                self.count(&error, failure);
                Outcome::Again(Box::new(self), delay)
            }
            RetryMode::Broker => {
                let received = self.received;
                match self
                    .delivery
                    .settle(Verdict::Retry { delay, failure })
                    .await
                {
                    Ok(()) => settings.recorder.messages_retried.inc(),
                    Err(error) => unsettled(&received, &error, "retry"),
                }
                Outcome::Settled
            }
        }
    }

    /// Notes a failed attempt in what the next one sees.
    fn count(&mut self, error: &HandlerError, failure: Failure) {
        let message: &mut Message = Arc::make_mut(&mut self.received.message);
        message.retry_count = message.retry_count.saturating_add(1);
        message.error = Some(error.details.clone());
        let marks: &mut Marks = Arc::make_mut(&mut self.received.marks);
        marks.failure = Some(Box::new(failure));
    }

    async fn dead_letter(self, failure: Failure, settings: &DispatchSettings) -> Outcome {
        let received = self.received;
        match self.delivery.settle(Verdict::DeadLetter { failure }).await {
            Ok(()) => settings.recorder.messages_dead_lettered.inc(),
            Err(error) => unsettled(&received, &error, "dead letter"),
        }
        Outcome::Settled
    }

    fn failure(&self, reason: &str, details: &str) -> Failure {
        Failure::now(
            reason,
            details,
            self.received.topic.as_str(),
            self.received.marks.failure.as_deref(),
        )
    }
}

/// Calls a handler; a panic and a time-out are failures like any other.
pub(crate) async fn call(
    handler: Arc<dyn Handler>,
    received: Received,
    limit: Option<Duration>,
) -> Result<(), HandlerError> {
    // The handler is called inside the block, so that a panic before its first
    // await is caught too.
    let handled = AssertUnwindSafe(async move { handler.handle(received).await }).catch_unwind();
    let result = match limit {
        None => handled.await,
        Some(limit) => match tokio::time::timeout(limit, handled).await {
            Ok(result) => result,
            Err(_) => {
                return Err(HandlerError {
                    reason: "handler_timeout".to_owned(),
                    details: format!(
                        "the handler took longer than handler_timeout ({})",
                        crate::duration::format(limit)
                    ),
                    retryable: true,
                });
            }
        },
    };
    result.unwrap_or_else(|panic| {
        Err(HandlerError {
            reason: "handler_panic".to_owned(),
            details: text_of(panic.as_ref()),
            retryable: true,
        })
    })
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the handler panicked".to_owned())
}

fn unsettled(received: &Received, error: &crate::Error, verdict: &str) {
    tracing::warn!(
        topic = %received.topic, id = %received.message.id, %error,
        "the verdict \"{verdict}\" was not carried out; the message will be delivered again"
    );
}
