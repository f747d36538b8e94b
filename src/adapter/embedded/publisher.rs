//! Publishing: lanes, and batches straight into the state. A persistent message
//! is confirmed when the journal has synced it, where there is one.

use std::{collections::VecDeque, mem, sync::Arc};

use tokio::time::Instant;

use super::{
    durable::Mark,
    group::StreamId,
    routing,
    shared::Shared,
    state::{QueueId, State},
};
use crate::{
    broker::{
        BrokerType, Confirmation, Fate, Lane, LaneOptions, OrderKey, Outcome, PublishOptions,
        Receipt, Submission, TopicKind, lane::LanePort,
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
    /// What an unknown topic is made as; none: as the broker's patterns say.
    pub(super) kind: Option<TopicKind>,
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
        kind: options.kind,
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

/// Publishes a batch under one lock, and waits until it is synced.
///
/// # Cancel safety
/// Dropping the future abandons the answers, not the messages.
pub(super) async fn publish_batch(
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
        kind: None,
    };
    let ids: Vec<MessageId> = messages.iter().map(|m| m.id.clone()).collect();
    let prepared: Vec<Result<Arc<Message>>> = messages
        .into_iter()
        .map(|m| prepare(shared, topic, m, options))
        .collect();
    let bytes: usize = prepared.iter().flatten().map(|m| m.payload.len()).sum();
    let order = OrderKey::Publisher(0);
    let (mut fates, mark): (Vec<Fate>, Mark) = shared.step_marked(|state, now| {
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
    let waits = prepared
        .iter()
        .flatten()
        .any(|message| options.confirm && message.is_persistent());
    if waits && let Err(error) = shared.synced(mark, ErrorCode::PublishFailed).await {
        for (fate, message) in fates.iter_mut().zip(&prepared) {
            if message.as_ref().is_ok_and(|m| m.is_persistent()) {
                doubt(fate, &error);
            }
        }
    }
    count(shared, bytes as u64, fates.iter(), began);
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
    let mut unsynced = Unsynced::default();
    // A submitter that keeps to its window never meets this.
    let bound = port.confirmations.max_capacity();
    loop {
        let batch = tokio::select! {
            biased;
            () = shared.closed.cancelled() => break,
            synced = shared.synced(unsynced.first(), ErrorCode::PublishFailed),
                if !unsynced.batches.is_empty() =>
            {
                if !unsynced.answer(shared, &port, synced.err()).await {
                    return;
                }
                continue;
            }
            batch = port.submissions.recv(), if unsynced.messages < bound => batch,
        };
        let Some(mut batch) = batch else {
            unsynced.answer_all(shared, &port).await;
            return;
        };
        while let Ok(more) = port.submissions.try_recv() {
            batch.extend(more);
        }
        let began = Instant::now();
        let (mut now, mut later) = write(shared, topic, way, batch, began);
        if later.mark.is_nothing() && unsynced.batches.is_empty() {
            count(shared, 0, later.answers.iter().map(|c| &c.fate), began);
            now.append(&mut later.answers);
        }
        unsynced.push(later);
        for confirmation in now {
            if !answer(shared, &port, confirmation).await {
                return;
            }
        }
    }
    // Closed: what was written is answered when it is synced, what still waits
    // was never written.
    if !unsynced.answer_all(shared, &port).await {
        return;
    }
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

/// Writes a batch under one lock: the answers that wait for nothing, and those
/// that wait, in their order, for the journal.
fn write(
    shared: &Shared,
    topic: &Topic,
    way: &Way,
    batch: Vec<Submission>,
    began: Instant,
) -> (Vec<Confirmation>, Written) {
    let bytes: usize = batch.iter().map(|s| s.message.payload.len()).sum();
    let ((now, answers), mark) = shared.step_marked(|state, now| {
        let target = state.resolve(now, topic, way);
        let mut answers = (Vec::new(), Vec::new());
        for submission in batch {
            let Submission {
                token,
                message,
                order,
                marks,
                confirm,
            } = submission;
            let marks = state.shared_marks(marks);
            let fate = state.accept(now, &target, &message, &marks, &order);
            let confirmation = Confirmation { token, fate };
            if confirm && message.is_persistent() {
                answers.1.push(confirmation);
            } else {
                answers.0.push(confirmation);
            }
        }
        state.pump_target(now, &target);
        answers
    });
    count(shared, bytes as u64, now.iter().map(|c| &c.fate), began);
    let written = Written {
        mark,
        answers,
        began,
    };
    (now, written)
}

/// What a lane has written and the journal has not synced, in that order.
#[derive(Default)]
struct Unsynced {
    batches: VecDeque<Written>,
    messages: usize,
}

/// The messages of one step.
struct Written {
    mark: Mark,
    answers: Vec<Confirmation>,
    began: Instant,
}

impl Unsynced {
    fn push(&mut self, written: Written) {
        if !written.answers.is_empty() {
            self.messages += written.answers.len();
            self.batches.push_back(written);
        }
    }

    /// What must be synced for the oldest batch.
    fn first(&self) -> Mark {
        self.batches.front().map(|b| b.mark).unwrap_or_default()
    }

    /// Answers the oldest batch, which is synced, or never will be for `failed`;
    /// false when nobody wants answers any more.
    async fn answer(&mut self, shared: &Shared, port: &LanePort, failed: Option<Error>) -> bool {
        let Some(mut batch) = self.batches.pop_front() else {
            return true;
        };
        self.messages -= batch.answers.len();
        if let Some(error) = failed {
            for confirmation in &mut batch.answers {
                doubt(&mut confirmation.fate, &error);
            }
        }
        let fates = batch.answers.iter().map(|c| &c.fate);
        count(shared, 0, fates, batch.began);
        for confirmation in mem::take(&mut batch.answers) {
            if !answer(shared, port, confirmation).await {
                return false;
            }
        }
        true
    }

    async fn answer_all(&mut self, shared: &Shared, port: &LanePort) -> bool {
        while !self.batches.is_empty() {
            let synced = shared.synced(self.first(), ErrorCode::PublishFailed).await;
            if !self.answer(shared, port, synced.err()).await {
                return false;
            }
        }
        true
    }
}

/// What was taken in and may not survive is neither confirmed nor refused.
fn doubt(fate: &mut Fate, error: &Error) {
    if matches!(fate, Fate::Confirmed(_)) {
        *fate = Fate::Unknown(error.clone());
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
                "there is no such queue or stream; declare it, or set hub.auto_declare (MESSAGING_AUTO_DECLARE)",
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
        if self.names_queue(topic, way.kind) {
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
            Err(error) if error.is_refusal() => Fate::Refused(error.clone()),
            // It could not be made now, which may pass.
            Err(error) => Fate::Overloaded(error.clone()),
            Ok(Target::Nowhere) => Fate::Confirmed(None),
            Ok(Target::Stream(id)) => self.append(now, *id, message, marks, order),
            Ok(Target::Queues(queues, key)) => {
                self.enqueue(now, queues, message, marks, key.as_ref())
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
    fn names_queue(&self, topic: &str, kind: Option<TopicKind>) -> bool {
        if self.topology.queue(topic).is_some() || topic == self.topology.dead_letter_queue() {
            return true;
        }
        if self.topology.topic(topic).is_some() {
            return false;
        }
        match kind {
            Some(kind) => kind == TopicKind::Queue,
            None => self.config.queue_patterns.iter().any(|p| p.matches(topic)),
        }
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

fn count<'a>(shared: &Shared, bytes: u64, fates: impl Iterator<Item = &'a Fate>, began: Instant) {
    let (mut messages, mut good) = (0, 0);
    for fate in fates {
        messages += 1;
        good += u64::from(matches!(fate, Fate::Confirmed(_)));
    }
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
