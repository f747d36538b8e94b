//! Publishing straight to one broker, without the hub: lanes are opened on
//! demand and every message waits for its outcome.
//!
//! ```text
//!   publish_batch --chunks--> intake (bounded) --> lane task --> Lane --> broker
//!                 <--answers------------------------------
//! ```
//!
//! Each lane is owned by one task that writes up to the lane's window ahead of
//! the confirms. Nothing is spooled and nothing is written twice: what the
//! broker did not take is an error that says so.

mod call;
mod lane_task;
mod lanes;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
pub(super) mod scripted;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use self::{
    call::{Answers, Call, Job},
    lanes::{LaneKey, Lanes},
};
use super::{LaneOptions, MessageBroker, OrderKey, PublishOptions, Receipt};
use crate::{
    error::{Error, ErrorCode, Result},
    message::Message,
    metrics::MetricsRecorder,
    topic::Topic,
};

/// Lanes that were opened on demand, shared by all publishes of a broker.
///
/// Order is kept per key; messages without a key count as one publisher's.
/// Calls that overlap have no order between them, nor have calls with different
/// `mandatory`, `confirm`, `compression`, `exchange` or `routing_key`.
#[derive(Debug)]
pub struct DirectPublisher {
    lanes: Lanes,
    max_message_bytes: usize,
    publisher: u64,
}

impl Default for DirectPublisher {
    fn default() -> Self {
        static PUBLISHERS: AtomicU64 = AtomicU64::new(0);
        Self {
            lanes: Lanes::default(),
            max_message_bytes: DEFAULT_MAX_MESSAGE_BYTES,
            publisher: PUBLISHERS.fetch_add(1, Relaxed),
        }
    }
}

impl DirectPublisher {
    /// Sets the largest payload that is accepted, in bytes. Default
    /// [`DEFAULT_MAX_MESSAGE_BYTES`].
    #[must_use]
    pub fn with_max_message_bytes(mut self, max: usize) -> Self {
        self.max_message_bytes = max;
        self
    }

    /// Publishes a batch and waits for every outcome, one for each message, in
    /// order.
    ///
    /// `options.timeout` covers waiting for a lane, for room (`TIMEOUT`, not
    /// sent) and for the outcome (`PUBLISH_TIMEOUT`, unknown). Batches of up to
    /// `batch_size` are written as soon as the lane is free; only while other
    /// messages of the lane are unanswered does a batch that is not full wait,
    /// `linger` at most.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answers of what was taken in; what was
    /// still waiting for a lane or for room is not sent.
    pub async fn publish_batch(
        &self,
        broker: &dyn MessageBroker,
        topic: &Topic,
        messages: Vec<Arc<Message>>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        let began = Instant::now();
        let recorder = broker.recorder();
        count_taken(recorder, &messages);
        let via = broker.broker_type();
        let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
        let mut results: Vec<Option<Result<Receipt>>> = ids.iter().map(|_| None).collect();

        let deadline = deadline_after(began, options.timeout);
        // Without an answer in time nothing is begun; what is valid then ends in
        // TIMEOUT like everything that was not written.
        let lane_count = timeout_at(deadline, broker.lanes(topic)).await;
        let mut by_lane: BTreeMap<u32, Vec<(usize, Arc<Message>, OrderKey)>> = BTreeMap::new();
        for ((index, message), slot) in messages.into_iter().enumerate().zip(&mut results) {
            let prepared = self.prepare(topic, message, options);
            match (prepared, &lane_count) {
                (Ok(_), Err(_)) => {}
                (Ok(message), Ok(lanes)) => {
                    let order = message
                        .key
                        .as_ref()
                        .map_or(OrderKey::Publisher(self.publisher), |k| {
                            OrderKey::Key(k.clone())
                        });
                    let lane = broker.lane_of(topic, &order, message.partition, (*lanes).max(1));
                    by_lane
                        .entry(lane)
                        .or_default()
                        .push((index, message, order));
                }
                (Err(error), _) => *slot = Some(Err(error)),
            }
        }

        let (call, mut answers) = Call::new(ids, options, via, topic, deadline);
        // Lanes side by side: one that stalls holds up only its own messages.
        join_all(
            by_lane
                .into_iter()
                .map(|(lane, items)| self.submit(broker, topic, lane, items, options, &call)),
        )
        .await;
        collect(&mut answers, &mut results, deadline).await;

        let results: Vec<_> = results
            .into_iter()
            .enumerate()
            .map(|(index, result)| result.unwrap_or_else(|| Err(call.give_up(index))))
            .collect();
        count_outcomes(recorder, &results, began);
        results
    }

    /// Flushes and closes every lane and waits for their tasks, giving what is
    /// in flight [`CLOSE_GRACE`] to be answered. Idempotent; later publishes
    /// fail with `OPERATION_CANCELED`.
    pub async fn close(&self) {
        self.lanes.close(CLOSE_GRACE).await;
    }

    /// Fills in what the message leaves open and checks it.
    fn prepare(
        &self,
        topic: &Topic,
        mut message: Arc<Message>,
        options: &PublishOptions,
    ) -> Result<Arc<Message>> {
        if message.topic.as_ref().is_some_and(|t| t != topic.as_str()) {
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                "the message's field topic names another topic than it is published to; leave it out",
            )
            .on(topic.as_str())
            .with_id(message.id.as_str()));
        }
        let fills = message.content_type.is_none()
            || (message.content_encoding.is_none() && options.content_encoding.is_some())
            || (message.key.is_none() && options.key.is_some())
            || (message.partition.is_none() && options.partition.is_some());
        if fills {
            let message = Arc::make_mut(&mut message);
            message
                .content_type
                .get_or_insert_with(|| options.content_type.clone());
            message.content_encoding = message
                .content_encoding
                .take()
                .or_else(|| options.content_encoding.clone());
            message.key = message.key.take().or_else(|| options.key.clone());
            message.partition = message.partition.or(options.partition);
        }
        message
            .validate(self.max_message_bytes)
            .map_err(|e| e.on(topic.as_str()))?;
        Ok(message)
    }

    /// Takes the messages of one lane in, in order, waiting for room; answers
    /// for what could not be taken in.
    async fn submit(
        &self,
        broker: &dyn MessageBroker,
        topic: &Topic,
        lane: u32,
        items: Vec<(usize, Arc<Message>, OrderKey)>,
        options: &PublishOptions,
        call: &Arc<Call>,
    ) {
        let address = (!options.exchange.is_empty() || !options.routing_key.is_empty())
            .then(|| (options.exchange.clone(), options.routing_key.clone()));
        let key = LaneKey {
            topic: topic.clone(),
            lane,
            mandatory: options.mandatory,
            confirm: options.confirm,
            compression: options.compression,
            address: address.clone(),
        };
        let lane_options = LaneOptions {
            confirm: options.confirm,
            mandatory: options.mandatory,
            compression: options.compression,
            address,
            open_timeout: LaneOptions::default().open_timeout.min(options.timeout),
            ..LaneOptions::default()
        };
        let chunk_size = call.batch_size.min(lane_options.window);
        let mut items = items.into_iter();
        loop {
            let chunk: Vec<_> = items
                .by_ref()
                .take(chunk_size)
                .map(|(index, message, order)| Job::new(call.clone(), index, message, order))
                .collect();
            if chunk.is_empty() {
                return;
            }
            let room = timeout_at(call.deadline, self.lanes.room(broker, &key, &lane_options));
            let error = match room.await {
                Ok(Ok(room)) => {
                    room.send(chunk);
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_) => Error::new(
                    ErrorCode::Timeout,
                    "there was no room in the publishing lane before the timeout; the message was not sent, so it can be published again",
                )
                .at(call.via)
                .on(topic.as_str()),
            };
            // What is behind a chunk that was not taken in must not overtake it.
            for job in chunk {
                job.answer(Err(error.clone()));
            }
            for (index, message, order) in items {
                Job::new(call.clone(), index, message, order).answer(Err(error.clone()));
            }
            return;
        }
    }
}

/// Waits for the answers, until the deadline.
async fn collect(
    answers: &mut Answers,
    results: &mut [Option<Result<Receipt>>],
    deadline: Instant,
) {
    let mut missing = results.iter().filter(|r| r.is_none()).count();
    while missing > 0 {
        match timeout_at(deadline, answers.recv()).await {
            Ok(Some((index, result))) => {
                if let Some(slot) = results.get_mut(index) {
                    *slot = Some(result);
                    missing -= 1;
                }
            }
            Ok(None) | Err(_) => return,
        }
    }
}

fn count_taken(recorder: &MetricsRecorder, messages: &[Arc<Message>]) {
    recorder.messages_published.add(messages.len() as u64);
    let bytes: usize = messages.iter().map(|m| m.payload.len()).sum();
    recorder.bytes_published.add(bytes as u64);
    recorder.touch_publish();
}

fn count_outcomes(recorder: &MetricsRecorder, results: &[Result<Receipt>], began: Instant) {
    let mut failed = 0;
    for result in results {
        let Err(error) = result else { continue };
        failed += 1;
        if matches!(error.code(), ErrorCode::PublishTimeout | ErrorCode::Timeout) {
            recorder.publish_timeouts.inc();
        }
    }
    recorder.publish_failures.add(failed);
    recorder.publish_errors.add(failed);
    recorder.total_errors.add(failed);
    let good = results.len() as u64 - failed;
    if good > 0 {
        recorder.publish_successes.add(good);
        recorder.publish_latency.record_n(began.elapsed(), good);
    }
}

/// The largest payload unless set otherwise: 16 MiB.
pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// How long [`DirectPublisher::close`] waits for what is in flight.
pub const CLOSE_GRACE: Duration = Duration::from_secs(10);

/// A time-out too long for the clock is as good as none.
fn deadline_after(began: Instant, timeout: Duration) -> Instant {
    began.checked_add(timeout).unwrap_or(began + FOR_EVER)
}

/// Ten years.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
