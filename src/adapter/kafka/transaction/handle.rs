//! Runs a transformer over what a batch has: the messages of a partition one after
//! the other, partitions side by side. It writes and commits nothing.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::held::{Handled, Item, Part};
use crate::{
    adapter::kafka::broker::letter,
    broker::{
        HandlerError, OrderKey, Outgoing, SubscribeOptions, Transformer,
        dispatch::{EVENT_RETRY_DELAY, guarded},
        options::Filter,
    },
    error::Error,
    message::wire::Failure,
    metrics::MetricsRecorder,
    topic::Topic,
    topology::Topology,
};

/// How messages are handled.
pub(super) struct Rules {
    pub(super) transformer: Arc<dyn Transformer>,
    pub(super) recorder: Arc<MetricsRecorder>,
    /// Where messages go that failed for good.
    pub(super) dead_letters: Topic,
    /// Knows all topics that they lie in.
    topology: Arc<Topology>,
    /// Partitions at once.
    pub(super) concurrency: usize,
    /// No further message is begun.
    pub(super) stopping: CancellationToken,
    filter: Option<Filter>,
    timeout: Option<Duration>,
    retry_on_error: bool,
    max_retries: Option<u32>,
    retry_delay: Duration,
}

impl Rules {
    pub(super) fn new(
        options: &SubscribeOptions,
        transformer: Arc<dyn Transformer>,
        recorder: Arc<MetricsRecorder>,
        dead_letters: Topic,
        topology: Arc<Topology>,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            transformer,
            recorder,
            dead_letters,
            topology,
            concurrency: options.concurrency.unwrap_or(CONCURRENCY).max(1),
            stopping,
            filter: options.filter.clone(),
            timeout: options.handler_timeout,
            retry_on_error: options.retry_on_error,
            max_retries: options.max_retries,
            retry_delay: options.retry_delay.unwrap_or(EVENT_RETRY_DELAY),
        }
    }
}

/// Handles a batch.
pub(super) async fn handle(parts: Vec<Part>, rules: Arc<Rules>) -> Vec<Handled> {
    let concurrency = rules.concurrency;
    stream::iter(parts)
        .map(|part| handle_part(part, Arc::clone(&rules)))
        .buffer_unordered(concurrency)
        .collect()
        .await
}

async fn handle_part(part: Part, rules: Arc<Rules>) -> Handled {
    let mut handled = Handled {
        place: part.place,
        generation: part.generation,
        outputs: Vec::new(),
        next: None,
        done: 0,
        failed: None,
        letters: 0,
        given_up: Vec::new(),
        left: part.items,
    };
    // Enough for one transaction; the rest is for the next.
    while handled.outputs.len() < ENOUGH && !rules.stopping.is_cancelled() {
        let Some(item) = handled.left.front() else {
            break;
        };
        let mut letter = None;
        let outcome = match &item.verdict {
            Some(failure) => {
                letter = buried(item, failure.clone(), &rules);
                Ok(Vec::new())
            }
            None => one(item, &rules).await,
        };
        match outcome {
            Ok(mut made) => handled.outputs.append(&mut made),
            // The next member of the group handles it, from its beginning.
            Err(_) if rules.transformer.has_given_up() => break,
            Err((failure, true)) => {
                rules.recorder.messages_retried.inc();
                handled.failed = Some((failure, rules.retry_delay));
                break;
            }
            Err((failure, false)) => {
                let id = item.received.message.id.clone();
                handled.given_up.push((item.offset, id, failure.clone()));
                letter = buried(item, failure, &rules);
            }
        }
        handled.next = Some(item.offset + 1);
        handled.done += 1;
        handled.left.pop_front();
        handled.letters += u64::from(letter.is_some());
        handled.outputs.extend(letter);
    }
    handled
}

/// What one message becomes, or why it failed, and whether it is tried again.
async fn one(item: &Item, rules: &Rules) -> Result<Vec<Outgoing>, (Failure, bool)> {
    if let Some(filter) = &rules.filter {
        // A filter that panics lets everything pass.
        let passes = std::panic::catch_unwind(AssertUnwindSafe(|| filter.passes(&item.received)));
        if !passes.unwrap_or(true) {
            return Ok(Vec::new());
        }
    }
    rules.recorder.messages_consumed.inc();
    let (transformer, received) = (Arc::clone(&rules.transformer), item.received.clone());
    let work = async move { transformer.transform(received).await };
    let error = match guarded(work, rules.timeout).await {
        Ok(made) => {
            rules.recorder.messages_processed.inc();
            return Ok(made);
        }
        Err(error) => error,
    };
    rules.recorder.messages_failed.inc();
    let again = rules.again(&error, item);
    tracing::debug!(target: "messaging_hub::kafka", topic = %item.received.topic,
        id = %item.received.message.id, %error, again, "a transform failed");
    let failure = Failure::now(
        &error.reason,
        &error.details,
        &item.received.topic,
        item.received.marks.failure.as_deref(),
    );
    Err((failure, again))
}

impl Rules {
    fn again(&self, error: &HandlerError, item: &Item) -> bool {
        let message = &item.received.message;
        let limit = self.max_retries.unwrap_or(message.max_retries);
        error.retryable && self.retry_on_error && message.retry_count < limit
    }
}

/// The dead letter of a message whose outputs the broker refuses.
pub(super) fn bury(item: &Item, why: &Error, rules: &Rules) -> Option<Outgoing> {
    let failure = Failure::now(
        "refused",
        why.to_string(),
        &item.received.topic,
        item.received.marks.failure.as_deref(),
    );
    buried(item, failure, rules)
}

/// The dead letter of a message; none for what is one: in their log it lies already,
/// and a copy would be another letter.
fn buried(item: &Item, failure: Failure, rules: &Rules) -> Option<Outgoing> {
    if rules.topology.is_dead_letter_topic(&item.received.topic) {
        return None;
    }
    let (message, marks) = letter(&item.received, failure);
    let order = message.key.as_ref().map_or_else(
        || OrderKey::Publisher(u64::from(crc32fast::hash(message.id.as_str().as_bytes()))),
        |key| OrderKey::Key(key.clone()),
    );
    Some(Outgoing {
        topic: rules.dead_letters.clone(),
        message: Arc::new(message),
        order,
        marks,
    })
}

/// Partitions that are handled at once unless the subscription says otherwise.
const CONCURRENCY: usize = 16;

/// Messages that a partition adds to one transaction before it stops.
const ENOUGH: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::{BrokerType, Received, TransformFuture},
        message::Message,
    };

    /// Fails at everything.
    struct Fails;

    impl Transformer for Fails {
        fn transform(&self, _: Received) -> TransformFuture {
            let failed: Result<Vec<Outgoing>, _> = Err(HandlerError::retry("no"));
            Box::pin(async move { failed })
        }
    }

    #[tokio::test]
    async fn a_dead_letter_is_left_to_be_counted_when_it_is_committed() {
        let recorder = Arc::new(MetricsRecorder::default());
        let options = SubscribeOptions {
            retry_on_error: false,
            ..SubscribeOptions::default()
        };
        let rules = Rules::new(
            &options,
            Arc::new(Fails),
            Arc::clone(&recorder),
            Topic::new("letters").unwrap(),
            Arc::default(),
            CancellationToken::new(),
        );
        let item = |offset, verdict| Item {
            offset,
            received: Received {
                topic: Topic::new("t").unwrap(),
                message: Arc::new(Message::default()),
                marks: Arc::default(),
                via: BrokerType::Kafka,
            },
            verdict,
        };
        // One that fails now, and one that did before a transaction that went back.
        let earlier = Failure::now("handler_error", "no", "t", None);
        let part = Part {
            place: ("t".into(), 0),
            generation: 1,
            items: [item(0, None), item(1, Some(earlier))].into(),
        };
        let handled = handle(vec![part], Arc::new(rules)).await.remove(0);
        assert_eq!((handled.done, handled.outputs.len()), (2, 2));
        assert_eq!((handled.letters, handled.given_up.len()), (2, 1));
        assert_eq!(recorder.messages_failed.get(), 1);
        assert_eq!(recorder.messages_dead_lettered.get(), 0);
    }
}
