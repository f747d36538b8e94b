//! Publishing: lanes, and batches straight into the state.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    group::StreamId,
    routing,
    shared::Shared,
    state::{QueueId, State},
};
use crate::{
    broker::{
        BrokerType, Confirmation, Fate, Lane, LaneOptions, OrderKey, Outcome, PublishOptions,
        Receipt, Submission, lane::LanePort,
    },
    error::{Error, ErrorCode, Result},
    message::{Message, MessageId, Timestamp, wire::Marks},
    topic::Topic,
};

/// Where a topic's messages go.
pub(super) enum Target {
    /// To these queues, with the key that they were routed by.
    Queues(Vec<QueueId>, Option<Arc<str>>),
    /// Into this stream.
    Stream(StreamId),
    /// Nowhere, which the publisher said is fine.
    Nowhere,
}

/// What a publish says about its way.
pub(super) struct Way {
    pub(super) mandatory: bool,
    /// Exchange and routing key, where they are not the topology's.
    pub(super) address: Option<(String, String)>,
}

/// Opens a lane: a task that appends batches under one lock each.
pub(super) fn open_lane(
    shared: &Arc<Shared>,
    topic: &Topic,
    options: &LaneOptions,
) -> Result<Lane> {
    shared.usable()?;
    let way = Way {
        mandatory: options.mandatory,
        address: options.address.clone(),
    };
    shared.step(|state, now| state.resolve(now, topic, &way))?;
    let (lane, port) = Lane::pair(options);
    let shared_by_task = shared.clone();
    let topic = topic.clone();
    shared
        .tasks
        .spawn(async move { run_lane(&shared_by_task, &topic, &way, port).await });
    Ok(lane)
}

/// Publishes a batch under one lock.
pub(super) fn publish_batch(
    shared: &Shared,
    topic: &Topic,
    messages: Vec<Arc<Message>>,
    options: &PublishOptions,
) -> Vec<Result<Receipt>> {
    if let Err(error) = shared.usable() {
        return messages.iter().map(|_| Err(error.clone())).collect();
    }
    let began = Instant::now();
    let way = Way {
        mandatory: options.mandatory,
        address: address(shared, topic, options),
    };
    let ids: Vec<MessageId> = messages.iter().map(|m| m.id.clone()).collect();
    let prepared: Vec<Result<Arc<Message>>> = messages
        .into_iter()
        .map(|m| prepare(shared, topic, m, options))
        .collect();
    let bytes: usize = prepared.iter().flatten().map(|m| m.payload.len()).sum();
    let order = OrderKey::Publisher(0);
    let fates: Vec<Fate> = shared.step(|state, now| {
        let target = state.resolve(now, topic, &way);
        let marks = state.no_marks.clone();
        let fates = prepared
            .iter()
            .map(|message| match message {
                Ok(message) => state.accept(now, &target, message, &marks, &order),
                Err(error) => Fate::Refused(error.clone()),
            })
            .collect();
        state.pump_target(now, &target);
        fates
    });
    count(shared, bytes as u64, &fates, began);
    ids.into_iter()
        .zip(fates)
        .map(|(id, fate)| match fate {
            Fate::Confirmed(position) => Ok(Receipt {
                id,
                outcome: if options.confirm {
                    Outcome::Delivered {
                        via: BrokerType::InMemory,
                        position,
                    }
                } else {
                    Outcome::Sent {
                        via: BrokerType::InMemory,
                    }
                },
            }),
            Fate::Refused(e) | Fate::Overloaded(e) | Fate::Unknown(e) | Fate::Unsent(e) => {
                Err(e.with_id(id.as_str()))
            }
        })
        .collect()
}

async fn run_lane(shared: &Arc<Shared>, topic: &Topic, way: &Way, mut port: LanePort) {
    loop {
        let batch = tokio::select! {
            biased;
            () = shared.closed.cancelled() => break,
            batch = port.submissions.recv() => batch,
        };
        let Some(mut batch) = batch else { return };
        while let Ok(more) = port.submissions.try_recv() {
            batch.extend(more);
        }
        let began = Instant::now();
        let bytes: usize = batch.iter().map(|s| s.message.payload.len()).sum();
        let mut tokens = Vec::with_capacity(batch.len());
        let fates = shared.step(|state, now| {
            let target = state.resolve(now, topic, way);
            let fates: Vec<Fate> = batch
                .into_iter()
                .map(|submission| {
                    let Submission {
                        token,
                        message,
                        order,
                        marks,
                        ..
                    } = submission;
                    tokens.push(token);
                    let marks = state.shared_marks(marks);
                    state.accept(now, &target, &message, &marks, &order)
                })
                .collect();
            state.pump_target(now, &target);
            fates
        });
        count(shared, bytes as u64, &fates, began);
        for (token, fate) in tokens.into_iter().zip(fates) {
            if !answer(shared, &port, Confirmation { token, fate }).await {
                return;
            }
        }
    }
    // Closed: what still waits was never written.
    port.submissions.close();
    while let Some(batch) = port.submissions.recv().await {
        for submission in batch {
            let confirmation = Confirmation {
                token: submission.token,
                fate: Fate::Unsent(super::shared::canceled()),
            };
            if !answer(shared, &port, confirmation).await {
                return;
            }
        }
    }
}

/// Answers one submission; false when nobody wants answers any more. With a
/// submitter that keeps to its window there always is room; one that does not
/// must not hold up the broker's close.
async fn answer(shared: &Shared, port: &LanePort, confirmation: Confirmation) -> bool {
    tokio::select! {
        biased;
        sent = port.confirmations.send(confirmation) => sent.is_ok(),
        () = shared.closed.cancelled() => false,
    }
}

impl State {
    /// Where a topic's messages go now; makes what is missing where that is
    /// allowed.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`, `EXCHANGE_NOT_FOUND`.
    pub(super) fn resolve(&mut self, now: Timestamp, topic: &Topic, way: &Way) -> Result<Target> {
        let topology = self.topology.clone();
        if let Some((exchange, key)) = &way.address {
            let names = routing::route(&topology, exchange, key)?;
            let queues: Vec<QueueId> = names.iter().filter_map(|n| self.queue_id(n)).collect();
            return self.routed(queues, Some(key.as_str().into()), way, || {
                format!("exchange {exchange:?} routes the key {key:?} to no queue")
            });
        }
        if let Some(own) = self.queue_id(topic) {
            // The topic's address may reach further queues that are bound so.
            let address = topology.amqp_address(topic);
            let mut queues = vec![own];
            if !address.exchange.is_empty() {
                let names = routing::route(&topology, &address.exchange, &address.routing_key)
                    .unwrap_or_default();
                for id in names.iter().filter_map(|n| self.queue_id(n)) {
                    if !queues.contains(&id) {
                        queues.push(id);
                    }
                }
                return Ok(Target::Queues(
                    queues,
                    Some(address.routing_key.as_str().into()),
                ));
            }
            return Ok(Target::Queues(queues, None));
        }
        if let Some(id) = self.stream_names.get(topic.as_str()) {
            return Ok(Target::Stream(*id));
        }
        let unknown = || {
            Error::new(
                ErrorCode::TopicNotFound,
                "there is no such queue or stream; declare it, or set embedded.auto_declare",
            )
            .at(BrokerType::InMemory)
            .on(topic.as_str())
        };
        if !self.config.auto_declare {
            return if way.mandatory {
                Err(unknown())
            } else {
                Ok(Target::Nowhere)
            };
        }
        if self.names_queue(topic) {
            let options = topology
                .queue(topic)
                .map(|q| q.options.clone())
                .unwrap_or_default();
            let id = self.declare_queue(now, topic, &options)?;
            return Ok(Target::Queues(vec![id], None));
        }
        self.ensure_stream(topic).map(Target::Stream)
    }

    /// Takes one message.
    pub(super) fn accept(
        &mut self,
        now: Timestamp,
        target: &Result<Target>,
        message: &Arc<Message>,
        marks: &Arc<Marks>,
        order: &OrderKey,
    ) -> Fate {
        match target {
            Err(error) => Fate::Refused(error.clone()),
            Ok(Target::Nowhere) => Fate::Confirmed(None),
            Ok(Target::Stream(id)) => self.append(now, *id, message, marks, order),
            Ok(Target::Queues(queues, key)) => {
                match self.enqueue(now, queues, message, marks, key.as_ref()) {
                    Ok(()) => Fate::Confirmed(None),
                    Err(error) => Fate::Overloaded(error),
                }
            }
        }
    }

    /// Hands out what a batch brought.
    pub(super) fn pump_target(&mut self, now: Timestamp, target: &Result<Target>) {
        match target {
            Ok(Target::Queues(queues, _)) => {
                for queue in queues {
                    self.pump(now, *queue);
                }
            }
            Ok(Target::Stream(id)) => self.wake_stream(*id),
            Ok(Target::Nowhere) | Err(_) => {}
        }
    }

    /// Whether an unknown name is to be a queue.
    pub(super) fn names_queue(&self, topic: &str) -> bool {
        self.topology.queue(topic).is_some()
            || topic == self.topology.dead_letter_queue()
            || (self.topology.topic(topic).is_none()
                && self.config.queue_patterns.iter().any(|p| p.matches(topic)))
    }

    fn routed(
        &self,
        queues: Vec<QueueId>,
        key: Option<Arc<str>>,
        way: &Way,
        why: impl FnOnce() -> String,
    ) -> Result<Target> {
        if !queues.is_empty() {
            return Ok(Target::Queues(queues, key));
        }
        if way.mandatory {
            return Err(Error::new(ErrorCode::PublishRejected, why()).at(BrokerType::InMemory));
        }
        Ok(Target::Nowhere)
    }
}

/// The exchange and key of a publish, when it names one of them.
fn address(shared: &Shared, topic: &Topic, options: &PublishOptions) -> Option<(String, String)> {
    if options.exchange.is_empty() && options.routing_key.is_empty() {
        return None;
    }
    let mapped = shared.topology.amqp_address(topic);
    let or = |given: &str, mapped: String| {
        if given.is_empty() {
            mapped
        } else {
            given.to_owned()
        }
    };
    Some((
        or(&options.exchange, mapped.exchange),
        or(&options.routing_key, mapped.routing_key),
    ))
}

/// The message as it is kept: with what the options give to messages that lack
/// it, and checked.
///
/// # Errors
/// `MESSAGE_INVALID`, `MESSAGE_TOO_LARGE`.
fn prepare(
    shared: &Shared,
    topic: &Topic,
    mut message: Arc<Message>,
    options: &PublishOptions,
) -> Result<Arc<Message>> {
    if let Some(other) = message.topic.as_deref().filter(|t| *t != topic.as_str()) {
        return Err(Error::rejected(
            ErrorCode::MessageInvalid,
            format!("the message names the topic {other:?} but is published to {topic:?}"),
        )
        .at(BrokerType::InMemory)
        .on(topic.as_str()));
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
        if message.content_encoding.is_none() {
            message
                .content_encoding
                .clone_from(&options.content_encoding);
        }
        if message.key.is_none() {
            message.key.clone_from(&options.key);
        }
        message.partition = message.partition.or(options.partition);
    }
    message
        .validate(shared.config.max_message_bytes)
        .map_err(|e| e.at(BrokerType::InMemory).on(topic.as_str()))?;
    Ok(message)
}

fn count(shared: &Shared, bytes: u64, fates: &[Fate], began: Instant) {
    let messages = fates.len() as u64;
    let good = fates
        .iter()
        .filter(|f| matches!(f, Fate::Confirmed(_)))
        .count() as u64;
    let recorder = &shared.recorder;
    recorder.messages_published.add(messages);
    recorder.bytes_published.add(bytes);
    recorder.batches_published.inc();
    recorder.publish_successes.add(good);
    recorder.publish_confirmations.add(good);
    if good > 0 {
        recorder.publish_latency.record_n(began.elapsed(), good);
    }
    let bad = messages - good;
    if bad > 0 {
        recorder.publish_failures.add(bad);
        recorder.publish_errors.add(bad);
        recorder.total_errors.add(bad);
    }
    recorder.touch_publish();
}
