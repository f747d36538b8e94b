//! The broker's state, as far as it concerns queues: declaring, publishing,
//! handing out, settling, dead letters.

use std::sync::Arc;

use super::{
    queue::{ConsumerId, Dead, EXPIRED, Entry, OVERFLOW, Overflow, Queue},
    routing,
    state::{NamedQueue, Outgoing, QueueConsumer, QueueId, State},
};
use crate::{
    broker::{BrokerType, QueueOptions, QueueStats, Received, Verdict},
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageState, Timestamp,
        wire::{Failure, Marks},
    },
    topic::Topic,
};

impl State {
    /// The queue of a topic, by full name or alias.
    pub(super) fn queue_id(&self, topic: &str) -> Option<QueueId> {
        self.queue_names
            .get(self.topology.canonical(topic))
            .copied()
    }

    /// The queue of a topic.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    pub(super) fn known_queue(&self, topic: &str) -> Result<QueueId> {
        self.queue_id(topic).ok_or_else(|| {
            Error::new(
                ErrorCode::QueueNotFound,
                "there is no such queue; declare it first",
            )
            .at(BrokerType::InMemory)
            .on(topic)
        })
    }

    /// Makes a queue, or checks that it is as asked.
    ///
    /// # Errors
    /// `QUEUE_DECLARE_FAILED` that names what differs.
    pub(super) fn declare_queue(
        &mut self,
        now: Timestamp,
        name: &str,
        options: &QueueOptions,
    ) -> Result<QueueId> {
        let name = Topic::new(self.topology.canonical(name))?;
        let failed = |why: String| {
            Error::rejected(ErrorCode::QueueDeclareFailed, why)
                .at(BrokerType::InMemory)
                .on(name.as_str())
        };
        if let Some(id) = self.queue_names.get(&name).copied()
            && let Some(queue) = self.queues.get_mut(&id) {
                if let Some((argument, is, wanted)) = differences(queue.core.options(), options)
                    .into_iter()
                    .next()
                {
                    return Err(failed(format!(
                        "the queue exists with {argument} = {is}, not {wanted}; delete it first or declare it as it is"
                    )));
                }
                queue.core.touch(now);
                return Ok(id);
            }
        if self.stream_names.contains_key(&name) {
            return Err(failed(
                "a stream has this name; a topic is either a queue or a stream".to_owned(),
            ));
        }
        let core = Queue::new(now, options.clone(), self.config.max_messages)
            .map_err(|e| failed(e.message().to_owned()))?;
        let id = self.fresh_id();
        self.arm(core.next_due());
        self.queues.insert(
            id,
            NamedQueue {
                name: name.clone(),
                core,
            },
        );
        self.queue_names.insert(name.clone(), id);
        self.recorder.queues_declared.inc();
        let matching: Vec<ConsumerId> = self
            .consumers
            .iter()
            .filter(|(_, c)| !c.stopped && c.pattern.matches(&name))
            .map(|(id, _)| *id)
            .collect();
        for consumer in matching {
            if let Err(why) = self.attach(now, consumer, id) {
                tracing::warn!(queue = %name, "a pattern subscription does not get this queue: {why}");
            }
        }
        Ok(id)
    }

    /// Deletes a queue with everything in it.
    pub(super) fn delete_queue(&mut self, id: QueueId) {
        let Some(queue) = self.queues.remove(&id) else {
            return;
        };
        self.bytes -= queue.core.bytes();
        self.queue_names.remove(&queue.name);
        for consumer in self.consumers.values_mut() {
            consumer.queues.retain(|q| *q != id);
            let before = consumer.outbox.len();
            consumer.outbox.retain(|o| o.queue != id);
            consumer.credit += before - consumer.outbox.len();
        }
    }

    /// Deletes what is ready in a queue and says how many messages that were.
    pub(super) fn purge_queue(&mut self, now: Timestamp, id: QueueId) -> u64 {
        self.with_queue(now, id, |queue, _| queue.purge())
            .unwrap_or(0)
    }

    /// The state of a queue.
    pub(super) fn queue_stats(&mut self, now: Timestamp, id: QueueId) -> Option<QueueStats> {
        self.with_queue(now, id, |queue, dead| queue.tick(now, dead));
        let queue = self.queues.get_mut(&id)?;
        let (published, delivered) = queue.core.rates(now);
        Some(QueueStats {
            name: queue.name.as_str().to_owned(),
            messages: queue.core.len(),
            consumers: queue.core.consumer_count(),
            messages_ready: queue.core.ready_len(),
            messages_unacked: Some(queue.core.unacked_len()),
            message_bytes: Some(queue.core.bytes()),
            publish_rate: Some(published),
            deliver_rate: Some(delivered),
            timestamp: now,
        })
    }

    /// Puts a message into queues. All take it, or none does.
    ///
    /// # Errors
    /// `PUBLISH_FAILED` when a queue, or the broker, is full.
    pub(super) fn enqueue(
        &mut self,
        now: Timestamp,
        targets: &[QueueId],
        message: &Arc<Message>,
        marks: &Arc<Marks>,
        routing_key: Option<&Arc<str>>,
    ) -> Result<()> {
        let bytes = cost(message);
        self.check_room(bytes * targets.len() as u64)?;
        for id in targets {
            let Some(queue) = self.queues.get_mut(id) else {
                continue;
            };
            let Some(why) = queue.core.refuses(bytes) else {
                continue;
            };
            let full = Error::new(
                ErrorCode::PublishFailed,
                format!("the queue is full: {why}"),
            )
            .at(BrokerType::InMemory)
            .on(queue.name.as_str())
            .with_id(message.id.as_str());
            if queue.core.overflow() == Overflow::RejectDeadLetter {
                let entry = entry_for(&queue.name, message, marks, routing_key);
                let dead = Dead {
                    entry,
                    reason: OVERFLOW,
                };
                self.bury(now, *id, vec![dead]);
            }
            return Err(full);
        }
        for id in targets {
            let Some(name) = self.queues.get(id).map(|q| q.name.clone()) else {
                continue;
            };
            let entry = entry_for(&name, message, marks, routing_key);
            self.with_queue(now, *id, |queue, dead| queue.append(now, entry, dead));
        }
        Ok(())
    }

    /// Whether `bytes` more fit into the broker.
    ///
    /// # Errors
    /// `PUBLISH_FAILED` when they do not.
    pub(super) fn check_room(&self, bytes: u64) -> Result<()> {
        if self.bytes + bytes > self.config.max_bytes {
            return Err(Error::new(
                ErrorCode::PublishFailed,
                format!(
                    "the embedded broker holds {} bytes and its bound embedded.max_bytes is {}; consume, or raise the bound",
                    self.bytes, self.config.max_bytes
                ),
            )
            .at(BrokerType::InMemory));
        }
        Ok(())
    }

    /// Registers a consumer and attaches it to every queue that it covers.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` when a queue does not let it in.
    pub(super) fn add_queue_consumer(
        &mut self,
        now: Timestamp,
        consumer: QueueConsumer,
    ) -> Result<ConsumerId> {
        let matching: Vec<QueueId> = self
            .queue_names
            .iter()
            .filter(|(name, _)| consumer.pattern.matches(name))
            .map(|(_, id)| *id)
            .collect();
        for id in &matching {
            if let Some(queue) = self.queues.get(id) {
                queue.core.admits(consumer.exclusive).map_err(|why| {
                    Error::rejected(
                        ErrorCode::SubscribeFailed,
                        format!("the queue cannot be consumed: {why}"),
                    )
                    .at(BrokerType::InMemory)
                    .on(queue.name.as_str())
                })?;
            }
        }
        let id = self.fresh_id();
        self.consumers.insert(id, consumer);
        for queue in matching {
            // Every queue was asked above, in this same step.
            let _ = self.attach(now, id, queue);
        }
        self.pump_consumer(now, id);
        Ok(id)
    }

    /// Takes what was assigned to a consumer, with tags to settle by.
    pub(super) fn take_outbox(&mut self, now: Timestamp, id: ConsumerId) -> Vec<(u64, Received)> {
        let Some(consumer) = self.consumers.get_mut(&id) else {
            return Vec::new();
        };
        consumer.woken = false;
        let outbox = std::mem::take(&mut consumer.outbox);
        if outbox.is_empty() {
            return Vec::new();
        }
        let mut taken = Vec::with_capacity(outbox.len());
        if consumer.auto_ack {
            consumer.credit += outbox.len();
            for Outgoing {
                queue,
                seq,
                received,
            } in outbox
            {
                taken.push((0, received));
                self.with_queue(now, queue, |queue, _| queue.ack(seq));
            }
            self.pump_consumer(now, id);
        } else {
            for out in outbox {
                let tag = consumer.next_tag;
                consumer.next_tag += 1;
                consumer.held.insert(tag, (out.queue, out.seq));
                taken.push((tag, out.received));
            }
        }
        taken
    }

    /// Carries out verdicts of a consumer, and answers each.
    pub(super) fn settle_queue(
        &mut self,
        now: Timestamp,
        id: ConsumerId,
        verdicts: impl IntoIterator<Item = (u64, Verdict)>,
    ) -> Vec<Result<()>> {
        let mut answers = Vec::new();
        let mut touched: Vec<QueueId> = Vec::new();
        for (tag, verdict) in verdicts {
            let held = self.consumers.get_mut(&id).and_then(|c| {
                let held = c.held.remove(&tag)?;
                c.credit += 1;
                Some(held)
            });
            let Some((queue_id, seq)) = held else {
                answers.push(Err(stale()));
                continue;
            };
            if !touched.contains(&queue_id) {
                touched.push(queue_id);
            }
            let done = match verdict {
                Verdict::Ack => {
                    self.recorder.messages_acked.inc();
                    self.with_queue(now, queue_id, |queue, _| queue.ack(seq))
                }
                Verdict::Requeue => {
                    self.recorder.messages_nacked.inc();
                    self.with_queue(now, queue_id, |queue, dead| {
                        queue.requeue(now, seq, true, dead)
                    })
                }
                Verdict::Retry { delay, failure } => {
                    self.recorder.messages_retried.inc();
                    self.with_queue(now, queue_id, |queue, _| {
                        queue.retry(now, seq, delay, failure)
                    })
                }
                Verdict::DeadLetter { failure } => self
                    .with_queue(now, queue_id, |queue, _| queue.remove(seq))
                    .map(|entry| match entry {
                        Some(entry) => {
                            self.move_dead(now, queue_id, entry, &failure);
                            true
                        }
                        None => false,
                    }),
            };
            answers.push(match done {
                Some(true) => Ok(()),
                _ => Err(stale()),
            });
        }
        for queue in touched {
            self.pump(now, queue);
        }
        self.pump_consumer(now, id);
        answers
    }

    /// Stops handing out to a consumer: what it has not seen goes back. Returns
    /// how many messages it still holds.
    pub(super) fn detach_consumer(&mut self, now: Timestamp, id: ConsumerId) -> usize {
        let Some(consumer) = self.consumers.get_mut(&id) else {
            return 0;
        };
        // No queue declared from now on attaches to it.
        consumer.stopped = true;
        consumer.credit = 0;
        let queues = std::mem::take(&mut consumer.queues);
        let outbox = std::mem::take(&mut consumer.outbox);
        let held = consumer.held.len();
        for queue in &queues {
            self.with_queue(now, *queue, |queue, _| queue.detach(now, id));
        }
        for Outgoing { queue, seq, .. } in outbox {
            self.with_queue(now, queue, |queue, dead| {
                queue.requeue(now, seq, false, dead)
            });
        }
        for queue in queues {
            self.pump(now, queue);
            if self
                .queues
                .get(&queue)
                .is_some_and(|q| q.core.is_abandoned())
            {
                self.delete_queue(queue);
            }
        }
        held
    }

    /// Forgets a detached consumer; what it still holds goes back.
    pub(super) fn remove_consumer(&mut self, now: Timestamp, id: ConsumerId) {
        self.detach_consumer(now, id);
        let Some(consumer) = self.consumers.remove(&id) else {
            return;
        };
        for (queue_id, seq) in consumer.held.into_values() {
            self.with_queue(now, queue_id, |queue, dead| {
                queue.requeue(now, seq, true, dead)
            });
            self.pump(now, queue_id);
        }
    }

    /// How many messages a consumer holds.
    pub(super) fn held_by(&self, id: ConsumerId) -> usize {
        self.consumers.get(&id).map_or(0, |c| c.held.len())
    }

    /// Hands out what is ready in a queue, as far as there is credit.
    pub(super) fn pump(&mut self, now: Timestamp, id: QueueId) {
        let Self {
            queues,
            consumers,
            wakes,
            ..
        } = self;
        let Some(queue) = queues.get_mut(&id) else {
            return;
        };
        let before = queue.core.bytes();
        let mut dead = Vec::new();
        while let Some(assigned) = queue.core.assign(now, &mut dead, |c| {
            consumers.get(&c).is_some_and(|c| c.credit > 0)
        }) {
            let Some(consumer) = consumers.get_mut(&assigned.consumer) else {
                break;
            };
            consumer.credit -= 1;
            consumer.outbox.push(Outgoing {
                queue: id,
                seq: assigned.seq,
                received: Received {
                    topic: queue.name.clone(),
                    message: assigned.message,
                    marks: assigned.marks,
                    via: BrokerType::InMemory,
                },
            });
            if !consumer.woken {
                consumer.woken = true;
                wakes.push(consumer.notify.clone());
            }
        }
        self.bytes = self.bytes + queue.core.bytes() - before;
        self.bury(now, id, dead);
    }

    /// Everything that time brings to queues.
    pub(super) fn tick_queues(&mut self, now: Timestamp) {
        let due: Vec<QueueId> = self
            .queues
            .iter()
            .filter(|(_, q)| q.core.next_due().is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.with_queue(now, id, |queue, dead| queue.tick(now, dead));
            self.pump(now, id);
            if self
                .queues
                .get(&id)
                .is_some_and(|q| q.core.has_expired(now))
            {
                self.delete_queue(id);
            }
        }
    }

    /// Moves a message to the dead letters of `from`.
    pub(super) fn move_dead(
        &mut self,
        now: Timestamp,
        from: QueueId,
        entry: Entry,
        failure: &Failure,
    ) {
        let entry = dead_letter(entry, failure.clone());
        // A reader asked for this, so it is kept even where the dead letters of
        // a queue are that queue itself.
        self.bury_entry(now, from, entry, true, 0);
    }

    /// Puts a message among the dead letters of a queue.
    pub(super) fn dead_letter_message(
        &mut self,
        now: Timestamp,
        from: &str,
        message: &Arc<Message>,
        failure: &Failure,
    ) -> Result<()> {
        let from_id = self.queue_id(from);
        let name = Topic::new(self.topology.canonical(from))?;
        self.check_room(cost(message))?;
        let entry = entry_for(&name, message, &self.no_marks.clone(), None);
        let entry = dead_letter(entry, failure.clone());
        self.bury_entry(now, from_id.unwrap_or(0), entry, true, 0);
        Ok(())
    }

    fn attach(
        &mut self,
        now: Timestamp,
        consumer_id: ConsumerId,
        queue_id: QueueId,
    ) -> std::result::Result<(), &'static str> {
        let (Some(consumer), Some(queue)) = (
            self.consumers.get_mut(&consumer_id),
            self.queues.get_mut(&queue_id),
        ) else {
            return Ok(());
        };
        queue.core.attach(now, consumer_id, consumer.exclusive)?;
        consumer.queues.push(queue_id);
        Ok(())
    }

    /// Hands out to a consumer from all its queues, each getting its turn.
    pub(super) fn pump_consumer(&mut self, now: Timestamp, id: ConsumerId) {
        let Some(consumer) = self.consumers.get_mut(&id) else {
            return;
        };
        if consumer.queues.len() > 1 {
            consumer.queues.rotate_left(1);
        }
        for queue in consumer.queues.clone() {
            if self.consumers.get(&id).is_none_or(|c| c.credit == 0) {
                break;
            }
            if self
                .queues
                .get(&queue)
                .is_some_and(|q| q.core.ready_len() > 0)
            {
                self.pump(now, queue);
            }
        }
    }

    /// Steps one queue: keeps the sum of bytes, arms the timer, and buries what
    /// died.
    fn with_queue<R>(
        &mut self,
        now: Timestamp,
        id: QueueId,
        step: impl FnOnce(&mut Queue, &mut Vec<Dead>) -> R,
    ) -> Option<R> {
        let queue = self.queues.get_mut(&id)?;
        let before = queue.core.bytes();
        let mut dead = Vec::new();
        let result = step(&mut queue.core, &mut dead);
        let due = queue.core.next_due();
        self.bytes = self.bytes + queue.core.bytes() - before;
        self.arm(due);
        self.bury(now, id, dead);
        Some(result)
    }

    fn bury(&mut self, now: Timestamp, from: QueueId, dead: Vec<Dead>) {
        for Dead { entry, reason } in dead {
            let topic = entry.message.topic.clone().unwrap_or_default();
            let details = if reason == EXPIRED {
                "the message expired before it was handled"
            } else {
                "the queue was full"
            };
            let mut failure = Failure::now(reason, details, &topic, entry.marks.failure.as_ref());
            failure.last = now;
            let entry = dead_letter(entry, failure);
            self.bury_entry(now, from, entry, false, 0);
        }
    }

    fn bury_entry(
        &mut self,
        now: Timestamp,
        from: QueueId,
        entry: Entry,
        keep_in_place: bool,
        hops: u8,
    ) {
        self.recorder.messages_dead_lettered.inc();
        let targets = self.graves(now, from, &entry);
        for target in targets {
            // What dies by itself in the queue of its own dead letters, or goes
            // round between full queues, ends here, as it does in RabbitMQ.
            if (target == from && !keep_in_place) || hops >= MAX_HOPS {
                tracing::warn!(
                    id = %entry.message.id,
                    "a dead letter that expired, or found no room, is dropped"
                );
                continue;
            }
            let Some(queue) = self.queues.get_mut(&target) else {
                continue;
            };
            let mut entry = entry.clone();
            Arc::make_mut(&mut entry.message).topic = Some(queue.name.as_str().to_owned());
            entry.deliveries = 0;
            let before = queue.core.bytes();
            let mut dead = Vec::new();
            queue.core.append(now, entry, &mut dead);
            let due = queue.core.next_due();
            self.bytes = self.bytes + queue.core.bytes() - before;
            self.arm(due);
            for Dead { entry, reason } in dead {
                let topic = entry.message.topic.clone().unwrap_or_default();
                let failure = Failure::now(
                    reason,
                    "the queue was full",
                    &topic,
                    entry.marks.failure.as_ref(),
                );
                let entry = dead_letter(entry, failure);
                self.bury_entry(now, target, entry, false, hops + 1);
            }
            self.pump(now, target);
        }
    }

    /// The queues that the dead letters of `from` go to: by its dead-letter
    /// exchange, else, or when that leads nowhere, the topology's queue.
    fn graves(&mut self, now: Timestamp, from: QueueId, entry: &Entry) -> Vec<QueueId> {
        let by_exchange = self.queues.get(&from).and_then(|queue| {
            let options = queue.core.options();
            let exchange = options.dead_letter_exchange.as_deref()?;
            let key = options
                .dead_letter_routing_key
                .as_deref()
                .or(entry.routing_key.as_deref())
                .unwrap_or(queue.name.as_str());
            routing::route(&self.topology, exchange, key).ok()
        });
        let found: Vec<QueueId> = by_exchange
            .unwrap_or_default()
            .iter()
            .filter_map(|name| self.queue_names.get(name.as_str()).copied())
            .collect();
        if !found.is_empty() {
            return found;
        }
        let name = self.topology.dead_letter_queue().to_owned();
        if let Some(id) = self.queue_id(&name) {
            return vec![id];
        }
        let options = self
            .topology
            .queue(&name)
            .map(|q| q.options.clone())
            .unwrap_or_default();
        match self.declare_queue(now, &name, &options) {
            Ok(id) => vec![id],
            Err(error) => {
                tracing::error!(%error, "there is no queue for dead letters; a message is dropped");
                Vec::new()
            }
        }
    }
}

/// What a message counts towards the bounds.
pub(super) fn cost(message: &Message) -> u64 {
    (message.size() + OVERHEAD) as u64
}

/// The arguments that differ, with both values.
pub(super) fn differences(
    is: &QueueOptions,
    wanted: &QueueOptions,
) -> Vec<(&'static str, String, String)> {
    let mut found = Vec::new();
    macro_rules! compare {
        ($($field:ident as $name:literal),*) => {
            $(if is.$field != wanted.$field {
                found.push(($name, format!("{:?}", is.$field), format!("{:?}", wanted.$field)));
            })*
        };
    }
    compare!(
        durable as "durable",
        auto_delete as "auto-delete",
        exclusive as "exclusive",
        dead_letter_exchange as "x-dead-letter-exchange",
        dead_letter_routing_key as "x-dead-letter-routing-key",
        message_ttl_ms as "x-message-ttl",
        expires_ms as "x-expires",
        max_length as "x-max-length",
        max_length_bytes as "x-max-length-bytes",
        overflow as "x-overflow",
        max_priority as "x-max-priority",
        dead_letter_strategy as "x-dead-letter-strategy",
        single_active_consumer as "x-single-active-consumer"
    );
    if is.effective_type() != wanted.effective_type() {
        found.push((
            "x-queue-type",
            format!("{:?}", is.effective_type()),
            format!("{:?}", wanted.effective_type()),
        ));
    }
    found
}

/// Queue options from the arguments of a subscription, by AMQP's names.
///
/// # Errors
/// `INVALID_CONFIG` that names the argument.
pub(super) fn options_from(
    arguments: &std::collections::BTreeMap<String, String>,
) -> Result<QueueOptions> {
    let mut options = QueueOptions::default();
    for (name, value) in arguments {
        let wrong = || {
            Error::rejected(
                ErrorCode::InvalidConfig,
                format!("queue argument {name} = {value:?} is not understood"),
            )
        };
        let number = || value.parse::<u64>().map_err(|_| wrong());
        match name.as_str() {
            "x-message-ttl" => options.message_ttl_ms = Some(number()?),
            "x-expires" => options.expires_ms = Some(number()?),
            "x-max-length" => options.max_length = Some(number()?),
            "x-max-length-bytes" => options.max_length_bytes = Some(number()?),
            "x-overflow" => options.overflow = Some(value.clone()),
            "x-dead-letter-exchange" => options.dead_letter_exchange = Some(value.clone()),
            "x-dead-letter-routing-key" => {
                options.dead_letter_routing_key = Some(value.clone());
            }
            "x-dead-letter-strategy" => options.dead_letter_strategy = Some(value.clone()),
            "x-max-priority" => {
                options.max_priority = Some(value.parse().map_err(|_| wrong())?);
            }
            "x-single-active-consumer" => {
                options.single_active_consumer = value.parse().map_err(|_| wrong())?;
            }
            "x-queue-type" => {
                options.queue_type = Some(match value.as_str() {
                    "quorum" => crate::broker::QueueType::Quorum,
                    "classic" => crate::broker::QueueType::Classic,
                    _ => return Err(wrong()),
                });
            }
            _ => return Err(wrong()),
        }
    }
    Ok(options)
}

/// The message as a queue keeps it.
fn entry_for(
    name: &Topic,
    message: &Arc<Message>,
    marks: &Arc<Marks>,
    routing_key: Option<&Arc<str>>,
) -> Entry {
    let bytes = cost(message);
    let mut message = message.clone();
    if message.topic.as_deref() != Some(name.as_str())
        || message.partition.is_some()
        || message.offset.is_some()
        || message.redelivered
    {
        let own = Arc::make_mut(&mut message);
        own.topic = Some(name.as_str().to_owned());
        own.partition = None;
        own.offset = None;
        own.redelivered = false;
    }
    Entry {
        message,
        marks: marks.clone(),
        routing_key: routing_key.cloned(),
        bytes,
        deliveries: 0,
    }
}

/// The message as it lies among the dead letters. Its expiration is taken off,
/// as AMQP does, or it would be dead there at once; a rest that it asked for is
/// over.
fn dead_letter(mut entry: Entry, failure: Failure) -> Entry {
    let message = Arc::make_mut(&mut entry.message);
    message.state = MessageState::DeadLettered;
    message.error = Some(failure.details.clone());
    message.expiration = None;
    message.redelivered = false;
    if let Some(task) = &mut message.task {
        task.scheduled_at = None;
    }
    Arc::make_mut(&mut entry.marks).failure = Some(failure);
    entry
}

/// The answer to a verdict on what is not held any more.
pub(super) fn stale() -> Error {
    Error::new(
        ErrorCode::AckFailed,
        "this delivery is not held any more (its queue was deleted, or its position moved)",
    )
    .at(BrokerType::InMemory)
}

/// Bytes that a message takes beside what it carries.
const OVERHEAD: usize = 512;

/// Dead-letterings of one message within one step at most.
const MAX_HOPS: u8 = 8;
