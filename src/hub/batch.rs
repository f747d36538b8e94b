//! Handlers that get batches. A batch is settled as one: all acked, or all
//! retried or dead-lettered by their own counts. A panic is a failure.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt;

use crate::{
    broker::{
        Consumer, Delivery, HandlerError, Received, RetryMode, Verdict, dispatch::DispatchSettings,
    },
    message::{Timestamp, wire::Failure},
};

/// Gathers and hands out batches until the consumer ends.
pub(super) async fn run<F, Fut>(
    mut consumer: Consumer,
    settings: DispatchSettings,
    max: usize,
    wait: Duration,
    handler: F,
) where
    F: Fn(Vec<Received>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    let mut held: Vec<Delivery> = Vec::new();
    while let Some(first) = consumer.deliveries.recv().await {
        admit(&mut held, first, &settings);
        let until = tokio::time::Instant::now() + wait;
        while held.len() < max {
            match tokio::time::timeout_at(until, consumer.deliveries.recv()).await {
                Ok(Some(more)) => admit(&mut held, more, &settings),
                Ok(None) | Err(_) => break,
            }
        }
        while !held.is_empty() {
            if consumer.control.is_stopping() {
                // Not started: given back by being dropped.
                return;
            }
            let batch: Vec<Delivery> = held.drain(..max.min(held.len())).collect();
            tokio::select! {
                () = handle(batch, &consumer, &settings, &handler) => {}
                // The patience of whoever stops is over; the batch is dropped,
                // and so given back.
                () = settings.give_up.cancelled() => return,
            }
        }
    }
}

fn admit(held: &mut Vec<Delivery>, batch: Vec<Delivery>, settings: &DispatchSettings) {
    for delivery in batch {
        settings.recorder.messages_received.inc();
        let passes = std::panic::catch_unwind(AssertUnwindSafe(|| {
            settings
                .filter
                .as_ref()
                .is_none_or(|f| f.passes(delivery.received()))
        }));
        let Ok(passes) = passes else {
            // A filter that cannot judge a message is no reason to skip it.
            held.push(delivery);
            continue;
        };
        if !passes {
            delivery.settle_now(Verdict::Ack);
        } else if delivery.is_expired(Timestamp::now()) {
            let failure = Failure::now(
                "expired",
                "the message expired before it was handled",
                &delivery.topic,
                delivery.marks.failure.as_deref(),
            );
            settings.recorder.messages_dead_lettered.inc();
            delivery.settle_now(Verdict::DeadLetter { failure });
        } else {
            held.push(delivery);
        }
    }
}

async fn handle<F, Fut>(
    mut batch: Vec<Delivery>,
    consumer: &Consumer,
    settings: &DispatchSettings,
    handler: &F,
) where
    F: Fn(Vec<Received>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    let mut attempt = 0;
    loop {
        let received: Vec<Received> = batch.iter().map(|d| d.received().clone()).collect();
        settings
            .recorder
            .messages_consumed
            .add(received.len() as u64);
        let call = AssertUnwindSafe(async { handler(received).await }).catch_unwind();
        let outcome = match settings.handler_timeout {
            Some(limit) => tokio::time::timeout(limit, call).await,
            None => Ok(call.await),
        };
        let error = match outcome {
            Ok(Ok(Ok(()))) => {
                settings.recorder.messages_processed.add(batch.len() as u64);
                for delivery in batch {
                    delivery.settle_now(Verdict::Ack);
                }
                return;
            }
            Ok(Ok(Err(error))) => error,
            Ok(Err(_)) => HandlerError::retry("the handler panicked"),
            Err(_) => HandlerError::retry("the handler took too long"),
        };
        settings.recorder.messages_failed.add(batch.len() as u64);
        let attempts = attempt;
        let may_retry = |d: &Delivery| {
            error.retryable
                && settings.retry_on_error
                && d.retry_count + attempts < settings.max_retries.unwrap_or(d.max_retries)
        };
        if consumer.retry == RetryMode::InLane && batch.iter().any(&may_retry) {
            // Those without an attempt left go; the others stay in their order.
            let (again, over): (Vec<_>, Vec<_>) = batch.into_iter().partition(&may_retry);
            bury(over, &error, settings);
            batch = again;
            attempt += 1;
            settings.recorder.messages_retried.add(batch.len() as u64);
            tokio::select! {
                () = tokio::time::sleep(settings.retry_delay) => continue,
                () = consumer.control.stopping() => return,
            }
        }
        let (again, over): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|d| consumer.retry == RetryMode::Broker && may_retry(d));
        bury(over, &error, settings);
        for delivery in again {
            settings.recorder.messages_retried.inc();
            let failure = failure(&delivery, &error);
            delivery.settle_now(Verdict::Retry {
                delay: settings.retry_delay,
                failure,
            });
        }
        return;
    }
}

fn bury(batch: Vec<Delivery>, error: &HandlerError, settings: &DispatchSettings) {
    for delivery in batch {
        settings.recorder.messages_dead_lettered.inc();
        let failure = failure(&delivery, error);
        delivery.settle_now(Verdict::DeadLetter { failure });
    }
}

fn failure(delivery: &Delivery, error: &HandlerError) -> Failure {
    Failure::now(
        error.reason.clone(),
        error.details.clone(),
        &delivery.topic,
        delivery.marks.failure.as_deref(),
    )
}
