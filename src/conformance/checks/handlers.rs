//! Subscribed handlers: success, failure, panic, and the end of a subscription.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    broker::{
        Handler, HandlerError, Received, RetryMode, SubscribeOptions, Verdict, options::Filter,
    },
    conformance::{Failure, Fixture, Reader, failure::ensure, fixture::numbered},
    message::{Message, MessageId, wire::Failure as Noted},
};

/// What handlers were called with: `retry_count` of each call, by message.
#[derive(Clone)]
struct Calls {
    calls: Arc<Mutex<HashMap<MessageId, Vec<u32>>>>,
    done: Arc<Mutex<HashSet<MessageId>>>,
    progress: Arc<watch::Sender<usize>>,
}

impl Calls {
    fn new() -> Self {
        Self {
            calls: Arc::default(),
            done: Arc::default(),
            progress: Arc::new(watch::channel(0).0),
        }
    }

    /// A handler that lets `outcome` decide each call, by the message and how
    /// many calls of it there were before.
    fn handler(
        &self,
        outcome: impl Fn(&Received, usize) -> Result<(), HandlerError> + Send + Sync + 'static,
    ) -> Arc<dyn Handler> {
        let this = self.clone();
        let outcome = Arc::new(outcome);
        Arc::new(move |received: Received| {
            let (this, outcome) = (this.clone(), outcome.clone());
            async move {
                let before = {
                    let mut calls = locked(&this.calls);
                    let mine = calls.entry(received.message.id.clone()).or_default();
                    mine.push(received.message.retry_count);
                    mine.len() - 1
                };
                outcome(&received, before)?;
                let done = {
                    let mut done = locked(&this.done);
                    done.insert(received.message.id.clone());
                    done.len()
                };
                // Calls that end at once may come here in any order.
                this.progress.send_modify(|most| *most = done.max(*most));
                Ok::<(), HandlerError>(())
            }
        })
    }

    /// Waits until `count` different messages were handled.
    async fn handled(&self, count: usize, patience: Duration) -> Result<(), Failure> {
        let mut progress = self.progress.subscribe();
        let waiting = tokio::time::timeout(patience, progress.wait_for(|n| *n >= count));
        let reached = waiting.await.is_ok();
        ensure!(
            reached,
            "expected {count} handled messages within {patience:?}, seen {}",
            locked(&self.done).len()
        );
        Ok(())
    }

    fn of(&self, id: &MessageId) -> Vec<u32> {
        locked(&self.calls).get(id).cloned().unwrap_or_default()
    }
}

pub(super) async fn a_handler_gets_everything_once(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let calls = Calls::new();
    let handler = calls.handler(|_, _| Ok(()));
    let subscription = f.handler(&client, &topic, f.options(), handler).await?;
    let ids = f.publish_numbered(&client, &topic, 200).await?;
    calls.handled(ids.len(), Reader::PATIENCE).await?;
    subscription.unsubscribe().await;
    for id in &ids {
        let seen = calls.of(id);
        ensure!(
            seen == [0],
            "expected one call for message {id}, seen {}",
            seen.len()
        );
    }
    Ok(())
}

pub(super) async fn a_failing_handler_is_called_again(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let calls = Calls::new();
    let handler = calls.handler(|_, before| {
        if before < 2 {
            Err(HandlerError::retry("on purpose"))
        } else {
            Ok(())
        }
    });
    let subscription = f.handler(&client, &topic, retrying(&f), handler).await?;
    let ids = f.publish_numbered(&client, &topic, 3).await?;
    calls.handled(ids.len(), patience(&f, 2)).await?;
    for id in &ids {
        let seen = calls.of(id);
        ensure!(
            seen == [0, 1, 2],
            "expected calls with retry counts 0, 1 and 2, seen {seen:?}"
        );
    }
    subscription.unsubscribe().await;
    Ok(())
}

pub(super) async fn a_panic_is_a_failed_delivery(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let calls = Calls::new();
    let handler = calls.handler(|received, before| {
        if before == 0 && received.headers.get("number").map(String::as_str) == Some("3") {
            // Unwinds as a panic does, without the panic hook's noise.
            std::panic::resume_unwind(Box::new("on purpose"));
        }
        Ok(())
    });
    let subscription = f.handler(&client, &topic, retrying(&f), handler).await?;
    let ids = f.publish_numbered(&client, &topic, 10).await?;
    calls.handled(ids.len(), patience(&f, 1)).await?;
    for (number, id) in ids.iter().enumerate() {
        let expected = if number == 3 { 2 } else { 1 };
        let seen = calls.of(id).len();
        ensure!(
            seen == expected,
            "expected {expected} calls of message {number}, seen {seen}"
        );
    }
    subscription.unsubscribe().await;
    Ok(())
}

pub(super) async fn keyed_messages_survive_periodic_errors(f: Fixture) -> Result<(), Failure> {
    const MESSAGES: usize = 1_200;
    const KEYS: usize = 10;
    const EVERY: usize = 100;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let calls = Calls::new();
    let handler = calls.handler(|received, before| {
        let number = received.headers.get("number");
        let number: usize = number.and_then(|n| n.parse().ok()).unwrap_or(1);
        if before == 0 && number.is_multiple_of(EVERY) {
            return Err(HandlerError::retry("on purpose"));
        }
        Ok(())
    });
    let subscription = f.handler(&client, &topic, retrying(&f), handler).await?;
    let messages: Vec<_> = (0..MESSAGES)
        .map(|n| numbered(n).with_key(format!("key {}", n % KEYS)))
        .collect();
    let ids: Vec<_> = messages.iter().map(|m: &Message| m.id.clone()).collect();
    f.publish(&client, &topic, messages).await?;
    // Where retries wait in the key's own lane, they wait one after the other.
    let rounds = u32::try_from(MESSAGES / EVERY).unwrap_or(u32::MAX);
    calls.handled(MESSAGES, patience(&f, rounds)).await?;
    for (number, id) in ids.iter().enumerate() {
        let expected = 1 + usize::from(number.is_multiple_of(EVERY));
        let seen = calls.of(id).len();
        ensure!(
            seen == expected,
            "expected {expected} calls of message {number}, seen {seen}"
        );
    }
    subscription.unsubscribe().await;
    Ok(())
}

pub(super) async fn unsubscribing_lets_handlers_finish(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let (begun, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let finished = Arc::new(Mutex::new(false));
    let handler = {
        let (begun, release, finished) = (begun.clone(), release.clone(), finished.clone());
        move |_: Received| {
            let (begun, release, finished) = (begun.clone(), release.clone(), finished.clone());
            async move {
                begun.notify_one();
                release.notified().await;
                *locked(&finished) = true;
                Ok::<(), HandlerError>(())
            }
        }
    };
    let subscription = f
        .handler(&client, &topic, options.clone(), Arc::new(handler))
        .await?;
    f.publish_numbered(&client, &topic, 1).await?;
    let started = tokio::time::timeout(Reader::PATIENCE, begun.notified()).await;
    ensure!(started.is_ok(), "expected the handler to be called");
    let ending = tokio::spawn(async move { subscription.unsubscribe().await });
    release.notify_one();
    let ended = tokio::time::timeout(Reader::PATIENCE, ending).await;
    ensure!(
        matches!(ended, Ok(Ok(()))),
        "expected unsubscribe to end once its handler had, seen {ended:?}"
    );
    ensure!(
        *locked(&finished),
        "expected unsubscribe to wait for the running handler"
    );
    // Its message was settled, so nobody else gets it.
    let mut reader = f.reader(&client, &topic, &options).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn what_a_filter_keeps_away_is_settled(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let filtered = SubscribeOptions {
        filter: Some(Filter::new(|received| {
            let number = received.headers.get("number");
            number.is_some_and(|n| n.ends_with('5'))
        })),
        ..options.clone()
    };
    let calls = Calls::new();
    let handler = calls.handler(|_, _| Ok(()));
    let subscription = f.handler(&client, &topic, filtered, handler).await?;
    let ids = f.publish_numbered(&client, &topic, 50).await?;
    calls.handled(5, Reader::PATIENCE).await?;
    // Whether the last ones, which it keeps away, were looked at cannot be
    // seen: a sentinel behind them can.
    let sentinel = numbered(55).with_key("sentinel");
    f.publish(&client, &topic, vec![sentinel]).await?;
    calls.handled(6, Reader::PATIENCE).await?;
    for (number, id) in ids.iter().enumerate() {
        let expected = usize::from(number % 10 == 5);
        let seen = calls.of(id).len();
        ensure!(
            seen == expected,
            "expected {expected} calls of message {number}, seen {seen}"
        );
    }
    subscription.unsubscribe().await;
    let mut reader = f.reader(&client, &topic, &options).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn a_handler_over_its_time_is_a_failed_delivery(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let attempts = Arc::new(watch::channel(0_usize).0);
    let handler = {
        let attempts = attempts.clone();
        move |_: Received| {
            let attempts = attempts.clone();
            async move {
                let first = *attempts.borrow() == 0;
                attempts.send_modify(|n| *n += 1);
                if first {
                    std::future::pending::<()>().await;
                }
                Ok::<(), HandlerError>(())
            }
        }
    };
    let options = SubscribeOptions {
        handler_timeout: Some(Duration::from_millis(100)),
        ..retrying(&f)
    };
    let subscription = f
        .handler(&client, &topic, options, Arc::new(handler))
        .await?;
    f.publish_numbered(&client, &topic, 1).await?;
    let mut seen = attempts.subscribe();
    let again = tokio::time::timeout(patience(&f, 1), seen.wait_for(|n| *n == 2));
    let again = again.await.is_ok();
    ensure!(
        again,
        "expected a second call after the first ran out of time, seen {} calls",
        *attempts.borrow()
    );
    subscription.unsubscribe().await;
    Ok(())
}

pub(super) async fn with_auto_ack_a_failure_is_not_repeated(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let calls = Calls::new();
    let handler = calls.handler(|received, _| {
        if received.headers.get("number").map(String::as_str) == Some("0") {
            return Err(HandlerError::retry("on purpose"));
        }
        Ok(())
    });
    let options = f.options();
    let at_most_once = SubscribeOptions {
        auto_ack: true,
        ..options.clone()
    };
    let subscription = f.handler(&client, &topic, at_most_once, handler).await?;
    let ids = f.publish_numbered(&client, &topic, 3).await?;
    calls.handled(2, Reader::PATIENCE).await?;
    subscription.unsubscribe().await;
    let mut reader = f.reader(&client, &topic, &options).await?;
    reader.expect_quiet().await?;
    reader.stop().await?;
    let seen = calls.of(&ids[0]).len();
    ensure!(
        seen == 1,
        "expected one call of the failing message, seen {seen}"
    );
    Ok(())
}

pub(super) async fn a_retry_comes_not_before_its_delay(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 1).await?;
    let options = f.options();
    let consumer = client.consume(&f.source(&topic), &options).await?;
    let in_lane = consumer.retry == RetryMode::InLane;
    let mut reader = Reader::new(consumer);
    if in_lane {
        // The reader itself holds what failed: there is nothing to check here.
        return reader.stop().await;
    }
    let delay = f.factory().retry_delay(f.kind());
    let delivery = reader.next().await?;
    let failure = Noted::now("conformance", "on purpose", &topic, None);
    let begun = Instant::now();
    delivery.settle(Verdict::Retry { delay, failure }).await?;
    let again = tokio::time::timeout(patience(&f, 1), reader.next_without_deadline()).await;
    let Ok(Some(again)) = again else {
        return Err(Failure::new(format!(
            "expected the message again after {delay:?}, it did not come"
        )));
    };
    let waited = begun.elapsed();
    ensure!(
        waited + CLOCK_SLACK >= delay,
        "expected the message not before {delay:?}, seen after {waited:?}"
    );
    ensure!(
        again.message.retry_count == 1,
        "expected retry count 1, seen {}",
        again.message.retry_count
    );
    let noted = again.marks.failure.as_ref().map(|n| n.reason.as_str());
    ensure!(
        noted == Some("conformance"),
        "expected the failure to be noted on the message, seen {noted:?}"
    );
    again.ack().await?;
    reader.stop().await
}

/// Options that retry at the backend's shortest delay.
fn retrying(f: &Fixture) -> SubscribeOptions {
    SubscribeOptions {
        retry_delay: Some(f.factory().retry_delay(f.kind())),
        ..f.options()
    }
}

/// How long `rounds` retries, one after the other, may take.
fn patience(f: &Fixture, rounds: u32) -> Duration {
    Reader::PATIENCE + f.factory().retry_delay(f.kind()) * rounds
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A handler that panics on purpose does not hold a lock while it does.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What two clocks may differ by when one measures what the other waits for.
const CLOCK_SLACK: Duration = Duration::from_millis(20);
