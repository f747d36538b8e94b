//! The broker's state, as far as it concerns reading streams: batches out,
//! verdicts in.

use std::sync::Arc;

use super::{
    group::{PartitionKey, StreamId},
    queue::ConsumerId,
    queues::stale,
    reader::{Held, Reader},
    state::State,
    stream::Partition,
};
use crate::{
    broker::{BrokerType, Fate, OffsetReset, OrderKey, Received, Verdict},
    error::{Error, ErrorCode, Result},
    message::{Message, MessageState, Timestamp, wire::Failure},
};

impl State {
    /// The next batch of a reader. Tags are 0 where nothing is to be settled.
    pub(super) fn fetch(&mut self, now: Timestamp, id: ConsumerId) -> Vec<(u64, Received)> {
        let Some(reader) = self.readers.get_mut(&id) else {
            return Vec::new();
        };
        reader.woken = false;
        let room = reader.room();
        if reader.stopped || room == 0 {
            return Vec::new();
        }
        let mut keys: Vec<PartitionKey> = match &reader.group {
            Some(name) => self
                .groups
                .get(name)
                .map(|g| g.owned_by(id).collect())
                .unwrap_or_default(),
            None => reader.positions.keys().copied().collect(),
        };
        if keys.is_empty() {
            return Vec::new();
        }
        let turn = reader.turn % keys.len();
        keys.rotate_left(turn);
        reader.turn = turn + 1;
        if !self.enough(now, id, &keys) {
            return Vec::new();
        }
        // Each partition gets its share before any gets more.
        let share = room.div_ceil(keys.len());
        let mut batch = Batch::default();
        let group = self.readers.get(&id).and_then(|r| r.group.clone());
        for pass in [share, room] {
            for key in &keys {
                let take = pass.min(room - batch.taken.len());
                self.fetch_from(id, *key, take, &mut batch);
                // Also what is only handed out, so that it is known after a
                // crash to be handed out again.
                if let Some(group) = &group {
                    self.note_moved(group, *key);
                }
            }
            if batch.taken.len() >= room || batch.full {
                break;
            }
        }
        batch.taken
    }

    /// Whether a reader that ends has read everything.
    pub(super) fn is_read(&self, id: ConsumerId) -> bool {
        self.readers.get(&id).is_none_or(Reader::is_done)
    }

    /// Carries out verdicts of a member, and answers each.
    pub(super) fn settle_stream(
        &mut self,
        now: Timestamp,
        id: ConsumerId,
        verdicts: impl IntoIterator<Item = (u64, Verdict)>,
    ) -> Vec<Result<()>> {
        let Some(name) = self.readers.get(&id).and_then(|r| r.group.clone()) else {
            return verdicts.into_iter().map(|_| Err(stale())).collect();
        };
        let answers = verdicts
            .into_iter()
            .map(|(tag, verdict)| {
                let held = self
                    .readers
                    .get_mut(&id)
                    .and_then(|r| r.held.remove(&tag))
                    .ok_or_else(stale)?;
                self.settle_one(now, &name, held, verdict)
            })
            .collect();
        // Room for this member, or a partition that has gone to another.
        self.wake_group(&name);
        answers
    }

    /// Everything that time brings to streams and their readers.
    pub(super) fn tick_streams(&mut self, now: Timestamp) {
        self.retain_streams(now);
        for reader in self.readers.values_mut() {
            if reader.hold_until.is_some_and(|at| at <= now) && !reader.woken {
                reader.woken = true;
                self.wakes.push(reader.notify.clone());
            }
        }
    }

    fn fetch_from(&mut self, id: ConsumerId, key: PartitionKey, most: usize, batch: &mut Batch) {
        let Self {
            streams,
            groups,
            readers,
            ..
        } = self;
        let (Some(stream), Some(reader)) = (streams.get(&key.0), readers.get_mut(&id)) else {
            return;
        };
        let Some(log) = stream.core.partition(key.1) else {
            return;
        };
        let mut cursor = match &reader.group {
            Some(name) => match groups.get_mut(name).and_then(|g| g.cursor_mut(key)) {
                Some(cursor) => Some(cursor),
                None => return,
            },
            None => None,
        };
        let resume = resume(reader, log);
        if let Some(cursor) = &mut cursor {
            cursor.truncate(log.low(), resume);
        } else if let Some(position) = reader.positions.get_mut(&key)
            && *position < log.low()
        {
            tracing::warn!(
                stream = %stream.name,
                partition = key.1,
                "a reader was overtaken by retention and goes on at the oldest message"
            );
            *position = resume;
        }
        let mut left = most;
        while left > 0 && !batch.full {
            let (offset, again) = if let Some(cursor) = &mut cursor {
                match cursor.take(log.high()) {
                    Some(taken) => taken,
                    None => return,
                }
            } else {
                let end = reader.end(key.1).min(log.high());
                match reader.positions.get_mut(&key) {
                    Some(position) if *position < end => {
                        *position += 1;
                        (*position - 1, false)
                    }
                    _ => return,
                }
            };
            let epoch = cursor.as_ref().map_or(0, |c| c.epoch());
            let Some((message, marks)) = log.get(offset) else {
                // Compacted away: done.
                if let Some(cursor) = &mut cursor {
                    cursor.finish(offset, epoch);
                }
                continue;
            };
            let size = message.size() as u64;
            let mut message = message.clone();
            if again {
                Arc::make_mut(&mut message).redelivered = true;
            }
            let mut tag = 0;
            if let Some(cursor) = &mut cursor {
                if reader.auto_ack {
                    cursor.finish(offset, epoch);
                } else {
                    tag = reader.next_tag;
                    reader.next_tag += 1;
                    reader.held.insert(
                        tag,
                        Held {
                            stream: key.0,
                            partition: key.1,
                            offset,
                            epoch,
                        },
                    );
                }
            }
            batch.taken.push((
                tag,
                Received {
                    topic: stream.name.clone(),
                    message,
                    marks: marks.clone(),
                    via: BrokerType::InMemory,
                },
            ));
            left -= 1;
            batch.bytes += size;
            batch.full = batch.bytes >= reader.max_bytes;
        }
    }

    /// Whether there is enough for a batch, or it has been waited for.
    fn enough(&mut self, now: Timestamp, id: ConsumerId, keys: &[PartitionKey]) -> bool {
        let Self {
            streams,
            groups,
            readers,
            ..
        } = self;
        let Some(reader) = readers.get_mut(&id) else {
            return false;
        };
        if reader.min_bytes <= 1 {
            return true;
        }
        let group = reader.group.as_ref().and_then(|name| groups.get(name));
        let mut available = 0;
        for key in keys {
            let cursor = group.and_then(|g| g.cursor(*key));
            if cursor.is_some_and(|c| c.has_returned()) {
                reader.hold_until = None;
                return true;
            }
            let next = cursor.map_or_else(
                || reader.positions.get(key).copied().unwrap_or(0),
                |c| c.next(),
            );
            available += streams
                .get(&key.0)
                .and_then(|s| s.core.partition(key.1))
                .map_or(0, |log| log.bytes_from(next));
        }
        if available == 0 {
            reader.hold_until = None;
            return true;
        }
        let until = *reader.hold_until.get_or_insert(now + reader.max_wait);
        if available >= reader.min_bytes || until <= now {
            reader.hold_until = None;
            return true;
        }
        self.arm(Some(until));
        false
    }

    fn settle_one(
        &mut self,
        now: Timestamp,
        group: &str,
        held: Held,
        verdict: Verdict,
    ) -> Result<()> {
        let verdict = match verdict {
            // In their log it lies already, and a copy would be another letter.
            Verdict::DeadLetter { .. } if self.keeps_letters(held.stream) => Verdict::Ack,
            verdict => verdict,
        };
        let (finished, result) = match verdict {
            Verdict::Ack => {
                self.recorder.messages_acked.inc();
                (true, Ok(()))
            }
            Verdict::Requeue => {
                self.recorder.messages_nacked.inc();
                (false, Ok(()))
            }
            Verdict::Retry { .. } => (
                false,
                Err(Error::new(
                    ErrorCode::NackFailed,
                    "a stream's messages are retried by their reader; this one is handed out again at once",
                )
                .at(BrokerType::InMemory)),
            ),
            Verdict::DeadLetter { failure } => match self.dead_event(now, held, &failure) {
                Ok(()) => (true, Ok(())),
                Err(error) => (false, Err(error)),
            },
        };
        let cursor = self
            .groups
            .get_mut(group)
            .and_then(|g| g.cursor_mut((held.stream, held.partition)))
            .ok_or_else(stale)?;
        let known = if finished {
            cursor.finish(held.offset, held.epoch)
        } else {
            cursor.give_back(held.offset, held.epoch)
        };
        self.note_moved(group, (held.stream, held.partition));
        if known { result } else { Err(stale()) }
    }

    /// Whether dead letters lie in a stream.
    fn keeps_letters(&self, stream: StreamId) -> bool {
        let stream = self.streams.get(&stream);
        stream.is_some_and(|s| self.topology.is_dead_letter_topic(&s.name))
    }

    /// Puts a copy of an event among the dead letters of streams.
    fn dead_event(&mut self, now: Timestamp, held: Held, failure: &Failure) -> Result<()> {
        let failed = |e: &Error| {
            Error::new(ErrorCode::DeadLetterFailed, e.message()).at(BrokerType::InMemory)
        };
        let (message, marks) = self
            .streams
            .get(&held.stream)
            .and_then(|s| s.core.partition(held.partition))
            .and_then(|log| log.get(held.offset))
            .map(|(message, marks)| (message.clone(), marks.clone()))
            .ok_or_else(stale)?;
        let name = self.topology.dead_letter_topic().to_owned();
        let stream = self.ensure_stream(&name).map_err(|e| failed(&e))?;
        let mut marks = (*marks).clone();
        marks.failure = Some(Box::new(failure.clone()));
        let mut copy = Message {
            state: MessageState::DeadLettered,
            error: Some(failure.details.clone()),
            expiration: None,
            partition: None,
            offset: None,
            ..(*message).clone()
        };
        failure.count_on(&mut copy);
        match self.append(
            now,
            stream,
            &Arc::new(copy),
            &Arc::new(marks),
            &OrderKey::Publisher(0),
        ) {
            Fate::Confirmed(_) => {
                self.recorder.messages_dead_lettered.inc();
                self.wake_stream(stream);
                Ok(())
            }
            Fate::Refused(e) | Fate::Overloaded(e) | Fate::Unknown(e) | Fate::Unsent(e) => {
                Err(failed(&e))
            }
        }
    }
}

/// A batch that is being filled.
#[derive(Default)]
struct Batch {
    taken: Vec<(u64, Received)>,
    bytes: u64,
    full: bool,
}

/// Where a reader goes on when retention has overtaken it.
fn resume(reader: &Reader, log: &Partition) -> i64 {
    // Only a group that asked for the latest skips what is still there.
    if reader.group.is_some() && reader.reset == OffsetReset::Latest {
        log.high()
    } else {
        log.low()
    }
}
