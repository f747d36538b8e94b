//! Handlers that get batches. A batch is settled as one: all acked, or all
//! retried or dead-lettered by their own counts. A panic is a failure. While the
//! handler takes nothing, no more is gathered than the batch in hand.

use std::{panic::AssertUnwindSafe, time::Duration};

use crate::{
    broker::{
        BatchHandler, Blame, Consumer, Delivery, HandlerError, Received, RetryMode, Verdict,
        dispatch::{DispatchSettings, by_turn, guarded, turn_of},
    },
    message::{Timestamp, wire::Failure},
};

/// Gathers and hands out batches until the consumer ends.
pub(super) async fn run(
    mut consumer: Consumer,
    settings: DispatchSettings,
    max: usize,
    wait: Duration,
    handler: impl BatchHandler,
) {
    let mut held: Vec<Delivery> = Vec::new();
    while let Some(first) = consumer.deliveries.recv().await {
        admit(&mut held, first, &settings, &handler);
        let until = tokio::time::Instant::now() + wait;
        while held.len() < max {
            match tokio::time::timeout_at(until, consumer.deliveries.recv()).await {
                Ok(Some(more)) => admit(&mut held, more, &settings, &handler),
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

fn admit(
    held: &mut Vec<Delivery>,
    batch: Vec<Delivery>,
    settings: &DispatchSettings,
    handler: &impl BatchHandler,
) {
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
        } else if delivery.is_too_late(Timestamp::now()) {
            let failure = Failure::now(
                "expired",
                "the message expired before it was handled",
                &delivery.topic,
                delivery.marks.failure.as_deref(),
            );
            settings.recorder.messages_dead_lettered.inc();
            delivery.settle_now(Verdict::DeadLetter { failure });
        } else {
            let looked =
                std::panic::catch_unwind(AssertUnwindSafe(|| handler.admit(delivery.received())));
            match looked {
                Ok(Err(error)) => {
                    settings.recorder.messages_failed.inc();
                    bury(vec![delivery], &error, 0, settings);
                }
                // What cannot be judged is no reason to skip it, either.
                Ok(Ok(())) | Err(_) => held.push(delivery),
            }
        }
    }
}

async fn handle(
    mut batch: Vec<Delivery>,
    consumer: &Consumer,
    settings: &DispatchSettings,
    handler: &impl BatchHandler,
) {
    let mut attempt = 0;
    loop {
        let turn = match turn_of(|| handler.ready()) {
            None => None,
            Some(ready) => tokio::select! {
                turn = ready => Some(turn),
                // Not started: given back by being dropped.
                () = consumer.control.stopping() => return,
            },
        };
        let received: Vec<Received> = batch.iter().map(|d| d.received().clone()).collect();
        settings
            .recorder
            .messages_consumed
            .add(received.len() as u64);
        let limit = settings.handler_timeout;
        let (outcome, blame) = match turn {
            None => (
                guarded(async { handler.handle(received).await }, limit).await,
                Blame::Message,
            ),
            Some(turn) => by_turn(turn, received, limit).await,
        };
        let error = match outcome {
            Ok(()) => {
                settings.recorder.messages_processed.add(batch.len() as u64);
                for delivery in batch {
                    delivery.settle_now(Verdict::Ack);
                }
                return;
            }
            // The batch waits for the handler's next turn; no attempt is counted.
            Err(_) if blame == Blame::Handler => continue,
            Err(error) => error,
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
            bury(over, &error, attempts, settings);
            batch = again;
            attempt += 1;
            settings.recorder.messages_retried.add(batch.len() as u64);
            let rest = settings.retry_delays.after(attempts);
            tokio::select! {
                () = tokio::time::sleep(rest) => continue,
                () = consumer.control.stopping() => return,
            }
        }
        let (again, over): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|d| consumer.retry == RetryMode::Broker && may_retry(d));
        bury(over, &error, attempts, settings);
        for delivery in again {
            settings.recorder.messages_retried.inc();
            let failure = failure(&delivery, &error);
            let delay = settings.retry_delays.after(delivery.retry_count);
            delivery.settle_now(Verdict::Retry { delay, failure });
        }
        return;
    }
}

fn bury(batch: Vec<Delivery>, error: &HandlerError, attempts: u32, settings: &DispatchSettings) {
    for delivery in batch {
        settings.recorder.messages_dead_lettered.inc();
        let failure = failure(&delivery, error).after(delivery.retry_count + attempts);
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
