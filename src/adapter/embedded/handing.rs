//! The broker's state, as far as it concerns handing out the messages of queues:
//! consumers, their credit, their verdicts.

use std::time::Duration;

use super::{
    queue::{ConsumerId, Entry},
    queues::stale,
    state::{Outgoing, QueueConsumer, QueueId, State},
};
use crate::{
    broker::{BrokerType, Received, Verdict},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
};

impl State {
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
            .filter(|(name, _)| self.covers(&consumer.pattern, name))
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
                let done = self.with_queue(now, queue, |queue, _| queue.remove(seq));
                self.done.extend(done.flatten().and_then(|e| e.record));
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
                    self.with_queue(now, queue_id, |queue, _| queue.remove(seq))
                        .map(|entry| {
                            self.done.extend(entry.as_ref().and_then(|e| e.record));
                            entry.is_some()
                        })
                }
                Verdict::Requeue => {
                    self.recorder.messages_nacked.inc();
                    self.with_queue(now, queue_id, |queue, dead| {
                        queue.requeue(now, seq, true, dead)
                    })
                }
                Verdict::Retry { delay, failure } => {
                    self.recorder.messages_retried.inc();
                    self.with_queue(now, queue_id, |queue, _| queue.fail(seq, failure))
                        .map(|entry| match entry {
                            Some(entry) => {
                                self.retry(now, queue_id, entry, delay);
                                true
                            }
                            None => false,
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

    /// Gives a failed message back to its queue, after a rest if there is one.
    pub(super) fn retry(&mut self, now: Timestamp, queue: QueueId, entry: Entry, delay: Duration) {
        let due = (!delay.is_zero()).then(|| now + delay);
        let old = entry.record;
        let mut entries = [(queue, entry)];
        // A log that refuses keeps the message as it was before this attempt,
        // which a crash then does not count; it goes on here all the same.
        let _ = self.keep(now, old, &mut entries, due);
        let [(_, entry)] = entries;
        self.with_queue(now, queue, |queue, _| queue.take_back(now, entry, due));
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
        let mut newest = None;
        while let Some(assigned) = queue.core.assign(now, &mut dead, |c| {
            consumers.get(&c).is_some_and(|c| c.credit > 0)
        }) {
            let Some(consumer) = consumers.get_mut(&assigned.consumer) else {
                break;
            };
            newest = newest.max(assigned.record);
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
        if let Some(record) = newest {
            self.note_handed(id, record);
        }
        self.bury(now, id, dead);
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

    pub(super) fn attach(
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
}
