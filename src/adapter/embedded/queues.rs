//! The broker's state, as far as it concerns queues: declaring, publishing,
//! looking, deleting.

use std::sync::Arc;

use super::{
    arguments::differences,
    durable::Handed,
    queue::{ConsumerId, Dead, Entry, OVERFLOW, Overflow, Queue},
    record::Record,
    state::{NamedQueue, QueueId, State},
};
use crate::{
    broker::{BrokerType, Fate, QueueOptions, QueueStats},
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Marks},
    topic::{Pattern, Topic},
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
    /// `QUEUE_DECLARE_FAILED` that names what differs, or why it cannot be kept.
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
            && let Some(queue) = self.queues.get_mut(&id)
        {
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
        let record = if self.keeps(options) {
            let record = Record::Queue {
                name: name.as_str().to_owned(),
                options: options.clone(),
            };
            let written = self.queue_log.write(vec![record.encode()], &[]);
            Some(written.map_err(|refused| {
                refused
                    .error(ErrorCode::QueueDeclareFailed)
                    .on(name.as_str())
            })?)
        } else {
            None
        };
        let id = self.fresh_id();
        self.arm(core.next_due());
        self.queues.insert(
            id,
            NamedQueue {
                name: name.clone(),
                core,
                record,
                handed: Handed::default(),
            },
        );
        self.queue_names.insert(name.clone(), id);
        self.recorder.queues_declared.inc();
        let matching: Vec<ConsumerId> = self
            .consumers
            .iter()
            .filter(|(_, c)| !c.stopped && self.covers(&c.pattern, &name))
            .map(|(id, _)| *id)
            .collect();
        for consumer in matching {
            if let Err(why) = self.attach(now, consumer, id) {
                tracing::warn!(queue = %name, "a pattern subscription does not get this queue: {why}");
            }
        }
        Ok(id)
    }

    /// Whether a subscription to this pattern means the queue. One with
    /// wildcards does not mean those that dead letters lie in.
    pub(super) fn covers(&self, pattern: &Pattern, name: &str) -> bool {
        pattern.matches(name)
            && (pattern.literal().is_some() || !self.topology.keeps_dead_letters(name))
    }

    /// Deletes a queue with everything in it.
    pub(super) fn delete_queue(&mut self, id: QueueId) {
        let Some(queue) = self.queues.remove(&id) else {
            return;
        };
        self.bytes -= queue.core.bytes();
        self.queue_names.remove(&queue.name);
        // The declaration first: without it the rest belongs to nobody, so a
        // crash in between deletes the queue all the same.
        let first = queue.record.into_iter().chain(queue.handed.record);
        let records = first.chain(queue.core.records()).collect::<Vec<_>>();
        self.queue_log.remove(&records);
        for consumer in self.consumers.values_mut() {
            consumer.queues.retain(|q| *q != id);
            let before = consumer.outbox.len();
            consumer.outbox.retain(|o| o.queue != id);
            consumer.credit += before - consumer.outbox.len();
        }
    }

    /// Deletes what is ready in a queue and says how many messages that were.
    pub(super) fn purge_queue(&mut self, now: Timestamp, id: QueueId) -> u64 {
        let mut gone = Vec::new();
        let purged = self.with_queue(now, id, |queue, _| queue.purge(&mut gone));
        self.queue_log.remove(&gone);
        purged.unwrap_or(0)
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
    pub(super) fn enqueue(
        &mut self,
        now: Timestamp,
        targets: &[QueueId],
        message: &Arc<Message>,
        marks: &Arc<Marks>,
        routing_key: Option<&Arc<str>>,
    ) -> Fate {
        let bytes = cost(message);
        if let Err(full) = self.check_room(bytes * targets.len() as u64) {
            return Fate::Overloaded(full);
        }
        for id in targets {
            let Some(queue) = self.queues.get(id) else {
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
            return Fate::Overloaded(full);
        }
        let mut entries: Vec<(QueueId, Entry)> = targets
            .iter()
            .filter_map(|id| {
                let name = &self.queues.get(id)?.name;
                Some((*id, entry_for(name, message, marks, routing_key)))
            })
            .collect();
        if let Err(refused) = self.keep(now, None, &mut entries, None) {
            return refused.fate();
        }
        for (id, entry) in entries {
            self.with_queue(now, id, |queue, dead| queue.append(now, entry, dead));
        }
        Fate::Confirmed(None)
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

    /// Steps one queue: keeps the sum of bytes, arms the timer, and buries what
    /// died.
    pub(super) fn with_queue<R>(
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
}

/// What a message counts towards the bounds.
pub(super) fn cost(message: &Message) -> u64 {
    (message.size() + OVERHEAD) as u64
}

/// The message as a queue keeps it.
pub(super) fn entry_for(
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
        record: None,
    }
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
