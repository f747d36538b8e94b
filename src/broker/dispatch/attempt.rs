//! One attempt at one message: from the filter to the verdict.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;

use super::DispatchSettings;
use crate::{
    broker::{
        Blame, Delivery, Handler, HandlerError, Received, RetryMode, Turn, Verdict,
        handler::ReadyFuture,
    },
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
    /// Not handled, and not for a fault of its own: it waits for the handler's
    /// next turn as if it had not been started.
    Held(Box<Attempt>),
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

    /// Hands the message to `handler`, by its turn where it gave one, and settles
    /// it. Dropping the future gives the message back, wherever it stands.
    pub(super) async fn run(
        self,
        handler: Arc<dyn Handler>,
        turn: Option<Turn>,
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
        if self.received.is_too_late(now) {
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
            return self.at_most_once(handler, turn, &settings).await;
        }
        let (result, blame) = call(handler, turn, self.received.clone(), limit).await;
        match result {
            Ok(()) => {
                recorder.messages_processed.inc();
                self.delivery.settle_now(Verdict::Ack);
                Outcome::Settled
            }
            Err(error) if blame == Blame::Handler => {
                tracing::debug!(
                    topic = %self.received.topic, id = %self.received.message.id, %error,
                    "a handler cannot work now; the message waits, and no attempt is counted"
                );
                Outcome::Held(Box::new(self))
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

    async fn at_most_once(
        self,
        handler: Arc<dyn Handler>,
        turn: Option<Turn>,
        settings: &DispatchSettings,
    ) -> Outcome {
        let received = self.received;
        if !self.delivery.settle_now(Verdict::Ack) {
            return Outcome::Settled;
        }
        let (result, _) = call(handler, turn, received.clone(), settings.handler_timeout).await;
        match result {
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
        let delay = settings.retry_delays.after(message.retry_count);
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
        .after(self.received.message.retry_count)
    }
}

/// Calls a handler, by its turn where it gave one; a panic and a time-out are
/// failures like any other.
async fn call(
    handler: Arc<dyn Handler>,
    turn: Option<Turn>,
    received: Received,
    limit: Option<Duration>,
) -> (Result<(), HandlerError>, Blame) {
    match turn {
        None => (
            guarded(async move { handler.handle(received).await }, limit).await,
            Blame::Message,
        ),
        Some(turn) => by_turn(turn, received, limit).await,
    }
}

/// Uses a turn, and has the result judged.
pub(crate) async fn by_turn<R: Send + 'static>(
    turn: Turn<R>,
    input: R,
    limit: Option<Duration>,
) -> (Result<(), HandlerError>, Blame) {
    let (call, judge) = turn.into_parts();
    let result = guarded(async move { call(input).await }, limit).await;
    let judged = std::panic::catch_unwind(AssertUnwindSafe(|| judge(&result)));
    // A judge that panics says nothing; the message has its ordinary course.
    (result, judged.unwrap_or(Blame::Message))
}

/// Runs a handler's future. The handler is called inside of it, so that a panic
/// before its first await is caught too.
pub(crate) async fn guarded<T>(
    handled: impl Future<Output = Result<T, HandlerError>>,
    limit: Option<Duration>,
) -> Result<T, HandlerError> {
    let handled = AssertUnwindSafe(handled).catch_unwind();
    let result = match limit {
        None => handled.await,
        Some(limit) => match tokio::time::timeout(limit, handled).await {
            Ok(result) => result,
            Err(_) => {
                return Err(HandlerError {
                    reason: HandlerError::TIMEOUT.to_owned(),
                    details: format!(
                        "the handler took longer than handler_timeout ({})",
                        crate::duration::format(limit)
                    ),
                    retryable: true,
                });
            }
        },
    };
    result.unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
}

/// Asks a handler for its turn; `None` where it always takes a message. A panic
/// in the asking fails the message that the turn is used for.
pub(crate) fn turn_of<R: Send + 'static>(
    ask: impl FnOnce() -> Option<ReadyFuture<R>>,
) -> Option<ReadyFuture<R>> {
    match std::panic::catch_unwind(AssertUnwindSafe(ask)) {
        Ok(None) => None,
        Ok(Some(ready)) => Some(Box::pin(async move {
            let turn = AssertUnwindSafe(ready).catch_unwind().await;
            turn.unwrap_or_else(|panic| Turn::failed(panicked(panic.as_ref())))
        })),
        Err(panic) => {
            let error = panicked(panic.as_ref());
            Some(Box::pin(async move { Turn::failed(error) }))
        }
    }
}

fn panicked(panic: &(dyn Any + Send)) -> HandlerError {
    HandlerError {
        reason: HandlerError::PANIC.to_owned(),
        details: text_of(panic),
        retryable: true,
    }
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
