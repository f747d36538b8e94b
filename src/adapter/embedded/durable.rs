//! The broker's state, as far as it concerns its logs: what is written when.
//!
//! A change is written before it is made, so that a log that refuses leaves the
//! state as it was; both happen under the state's lock. What needs no answer of
//! the log (a message that is done, a position that moved) is collected and
//! written once at the end of the step.

use std::mem;

use super::{
    group::{Logged, StreamId},
    log::{RecordId, Refused},
    queue::{Entry, scheduled},
    record::{Content, Record},
    state::{QueueId, State},
};
use crate::{broker::QueueOptions, message::Timestamp};

/// Up to where in the logs something was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) queues: u64,
    pub(super) streams: u64,
}

impl Mark {
    /// What was written after `before`; nothing where nothing was.
    pub(super) fn since(self, before: Self) -> Self {
        let only = |now: u64, then: u64| if now > then { now } else { 0 };
        Self {
            queues: only(self.queues, before.queues),
            streams: only(self.streams, before.streams),
        }
    }

    pub(super) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// Which messages of a queue the log calls handed out.
#[derive(Debug, Default)]
pub(super) struct Handed {
    /// Those before this.
    pub(super) below: RecordId,
    pub(super) record: Option<RecordId>,
}

impl State {
    /// How much is written.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            queues: self.queue_log.last(),
            streams: self.stream_log.last(),
        }
    }

    /// Writes what this step has left to write.
    pub(super) fn flush(&mut self) {
        if !self.done.is_empty() {
            // Answered when written, not when synced: acks that a crash takes
            // back make their messages come again, marked as redelivered.
            let done = mem::take(&mut self.done);
            self.queue_log.remove(&done);
        }
        self.flush_positions();
    }

    /// Whether a queue survives restarts.
    pub(super) fn keeps(&self, options: &QueueOptions) -> bool {
        self.queue_log.is_durable() && options.durable && !options.exclusive
    }

    /// Writes messages that are about to stand in queues, in place of `old`,
    /// together; those of queues that do not survive are passed over. `due` is
    /// until when they rest, where they do not say it themselves.
    ///
    /// # Errors
    /// Nothing was written.
    pub(super) fn keep(
        &mut self,
        now: Timestamp,
        old: Option<RecordId>,
        entries: &mut [(QueueId, Entry)],
        due: Option<Timestamp>,
    ) -> Result<(), Refused> {
        if !self.queue_log.is_durable() {
            return Ok(());
        }
        let mut puts = Vec::with_capacity(entries.len());
        for (id, entry) in entries.iter() {
            let Some(queue) = self.queues.get(id).and_then(|q| q.record) else {
                continue;
            };
            let due = due.or_else(|| scheduled(&entry.message).filter(|at| *at > now));
            let record = Record::Task {
                queue,
                ready: due.unwrap_or(now),
                rests: due.is_some(),
                content: Content {
                    message: entry.message.clone(),
                    marks: entry.marks.clone(),
                    routing_key: entry.routing_key.clone(),
                },
            };
            puts.push(record.encode());
        }
        if puts.is_empty() {
            self.done.extend(old);
            return Ok(());
        }
        let mut next = self.queue_log.write(puts, old.as_slice())?;
        for (id, entry) in entries {
            entry.record = None;
            if self.queues.get(id).is_some_and(|q| q.record.is_some()) {
                entry.record = Some(next);
                next += 1;
            }
        }
        Ok(())
    }

    /// Notes that the message at `record` is handed out. Some more are noted
    /// ahead, so that this costs one small record for many messages; after a
    /// crash those, too, come marked as redelivered.
    pub(super) fn note_handed(&mut self, id: QueueId, record: RecordId) {
        let Some(queue) = self.queues.get_mut(&id) else {
            return;
        };
        let Some(declared) = queue.record.filter(|_| record >= queue.handed.below) else {
            return;
        };
        let below = record.saturating_add(HANDED_AHEAD);
        let note = Record::Handed {
            queue: declared,
            below,
        };
        // A log that refuses takes nothing else that matters here: the messages
        // come again unmarked.
        if let Ok(record) = self
            .queue_log
            .write(vec![note.encode()], queue.handed.record.as_slice())
        {
            queue.handed = Handed {
                below,
                record: Some(record),
            };
        }
    }

    /// Takes from the log what a stream has dropped.
    pub(super) fn forget_events(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let Some(declared) = stream.record else {
            return;
        };
        for (partition, log) in stream.core.with_dropped() {
            let mut gone = mem::take(&mut log.dropped);
            if log.low() < log.high() {
                // The messages that are left say where the partition stands.
                gone.extend(log.base_record.take());
                self.stream_log.remove(&gone);
                continue;
            }
            let newest = gone.iter().max().copied();
            let base = Record::Base {
                stream: declared,
                partition,
                next: log.high(),
            };
            // Behind those of earlier batches, so that a crash in between leaves
            // a message that is too old, not a partition that counts from 0.
            gone.retain(|r| Some(*r) != newest);
            self.stream_log.remove(&gone);
            let last: Vec<RecordId> = newest.into_iter().chain(log.base_record).collect();
            match self.stream_log.write(vec![base.encode()], &last) {
                Ok(record) => log.base_record = Some(record),
                // There is no room for it: the newest message stays in its
                // place and goes with the next that are dropped.
                Err(_) => log.dropped.extend(newest),
            }
        }
    }

    /// Notes that a group's position moved in a partition.
    pub(super) fn note_moved(&mut self, group: &str, key: (StreamId, i32)) {
        if self.stream_log.is_durable()
            && self
                .moved
                .last()
                .is_none_or(|(g, k)| *k != key || g != group)
        {
            self.moved.push((group.to_owned(), key));
        }
    }

    /// Writes the positions that moved, each once, in place of what the log said.
    fn flush_positions(&mut self) {
        if self.moved.is_empty() {
            return;
        }
        let mut moved = mem::take(&mut self.moved);
        moved.sort_unstable();
        moved.dedup();
        let mut puts = Vec::new();
        let mut replaced = Vec::new();
        let mut written = Vec::new();
        for (group, key) in moved {
            let declared = self.streams.get(&key.0).and_then(|s| s.record);
            let cursor = self.groups.get(&group).and_then(|g| g.cursor(key));
            let (Some(stream), Some(cursor)) = (declared, cursor) else {
                continue;
            };
            let Some((committed, next)) = cursor.unlogged() else {
                continue;
            };
            let record = Record::Position {
                group: group.clone(),
                stream,
                partition: key.1,
                committed,
                next,
            };
            puts.push(record.encode());
            replaced.extend(cursor.logged().map(|l| l.record));
            written.push((group, key, committed, next));
        }
        if puts.is_empty() {
            return;
        }
        match self.stream_log.write(puts, &replaced) {
            Ok(first) => {
                for (record, (group, key, committed, next)) in (first..).zip(written) {
                    if let Some(cursor) =
                        self.groups.get_mut(&group).and_then(|g| g.cursor_mut(key))
                    {
                        cursor.set_logged(Logged {
                            record,
                            committed,
                            next,
                        });
                    }
                }
            }
            // Tried again with the next step, until there is room.
            Err(Refused::Full(_)) => {
                self.moved
                    .extend(written.into_iter().map(|(group, key, ..)| (group, key)));
            }
            Err(Refused::TooLarge(_) | Refused::Broken(_)) => {}
        }
    }
}

/// Messages that count as handed out ahead of the last that was.
const HANDED_AHEAD: u64 = 256;
