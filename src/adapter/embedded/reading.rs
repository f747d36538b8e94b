//! The broker's state, as far as it concerns reading streams: groups, their
//! members, readers by themselves, verdicts, positions.

use std::sync::Arc;

use super::{
    group::{Group, Member, PartitionKey, StreamId},
    queue::ConsumerId,
    queues::stale,
    reader::{Held, Reader},
    state::State,
    stream::Partition,
};
use crate::{
    broker::{BrokerType, Fate, OffsetReset, OrderKey, Received, SeekTo, StartFrom, Verdict},
    error::{Error, ErrorCode, Result},
    message::{Message, MessageState, Timestamp, wire::Failure},
    topic::Pattern,
};

impl State {
    /// Registers a reader and gives it its partitions.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED`: its instance is there already, or its group has no
    /// position and it refuses to start without one.
    pub(super) fn add_reader(&mut self, now: Timestamp, reader: Reader) -> Result<ConsumerId> {
        let refuse = |why: String| {
            Err(Error::rejected(ErrorCode::SubscribeFailed, why).at(BrokerType::InMemory))
        };
        let matching: Vec<StreamId> = self.matching(&reader.pattern);
        if let Some(name) = &reader.group {
            let group = self.groups.get(name);
            if let Some(instance) = &reader.instance
                && group.is_some_and(|g| g.has_instance(instance)) {
                    return refuse(format!(
                        "the group {name:?} has a live member with the instance id {instance:?}"
                    ));
                }
            let starts_nowhere =
                reader.reset == OffsetReset::None && reader.start == StartFrom::Latest;
            if starts_nowhere {
                for (stream, count) in self.partition_counts(matching.iter().copied()) {
                    let known = |p: i32| {
                        group
                            .and_then(|g| g.cursor((stream, p)))
                            .is_some_and(|c| c.committed().is_some())
                    };
                    if let Some(p) = (0..count)
                        .find(|p| reader.partition.is_none_or(|only| only == *p) && !known(*p))
                    {
                        return refuse(format!(
                            "the group {name:?} has no position in partition {p} and offset_reset is none; commit one or seek first"
                        ));
                    }
                }
            }
        }
        let id = self.fresh_id();
        match reader.group.clone() {
            Some(name) => {
                let member = Member {
                    streams: matching.into_iter().collect(),
                    partition: reader.partition,
                    instance: reader.instance.clone(),
                };
                self.readers.insert(id, reader);
                self.groups
                    .entry(name.clone())
                    .or_default()
                    .join(id, member);
                self.rebalance(now, &name);
            }
            None => {
                self.readers.insert(id, reader);
                for stream in matching {
                    self.open_positions(now, id, stream, false);
                }
                self.wake_reader(id);
            }
        }
        Ok(id)
    }

    /// Gives a stream that was made just now to those whose pattern covers it.
    pub(super) fn cover_new_stream(&mut self, now: Timestamp, stream: StreamId) {
        let Some(name) = self.streams.get(&stream).map(|s| s.name.clone()) else {
            return;
        };
        let covering: Vec<(ConsumerId, Option<String>)> = self
            .readers
            .iter()
            .filter(|(_, r)| !r.stopped && r.pattern.matches(&name))
            .map(|(id, r)| (*id, r.group.clone()))
            .collect();
        for (id, group) in covering {
            match group {
                Some(group) => {
                    if let Some(g) = self.groups.get_mut(&group) {
                        g.cover(id, stream);
                    }
                    self.rebalance(now, &group);
                }
                None => self.open_positions(now, id, stream, true),
            }
        }
    }

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
        for pass in [share, room] {
            for key in &keys {
                let take = pass.min(room - batch.taken.len());
                self.fetch_from(now, id, *key, take, &mut batch);
            }
            if batch.taken.len() >= room || batch.full {
                break;
            }
        }
        batch.taken
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

    /// Stops handing out to a reader.
    pub(super) fn detach_reader(&mut self, now: Timestamp, id: ConsumerId) {
        let Some(reader) = self.readers.get_mut(&id) else {
            return;
        };
        if reader.stopped {
            return;
        }
        reader.stopped = true;
        if let Some(name) = reader.group.clone() {
            if let Some(group) = self.groups.get_mut(&name) {
                group.leave(id);
            }
            self.rebalance(now, &name);
        }
    }

    /// Forgets a reader; what it still holds goes back.
    pub(super) fn remove_reader(&mut self, now: Timestamp, id: ConsumerId) {
        self.detach_reader(now, id);
        let Some(reader) = self.readers.remove(&id) else {
            return;
        };
        let Some(name) = reader.group else { return };
        if let Some(group) = self.groups.get_mut(&name) {
            for held in reader.held.into_values() {
                if let Some(cursor) = group.cursor_mut((held.stream, held.partition)) {
                    cursor.give_back(held.offset, held.epoch);
                }
            }
        }
        self.wake_group(&name);
    }

    /// How many messages a reader holds.
    pub(super) fn read_by(&self, id: ConsumerId) -> usize {
        self.readers.get(&id).map_or(0, |r| r.held.len())
    }

    /// Makes a group with a position in every partition of the streams that
    /// exist; positions that it has stay.
    pub(super) fn create_group(
        &mut self,
        name: &str,
        pattern: &Pattern,
        reset: SeekTo,
    ) -> Result<()> {
        let streams = self.matching(pattern);
        let mut starts = Vec::new();
        for (stream, count) in self.partition_counts(streams.into_iter()) {
            for p in 0..count {
                starts.push(((stream, p), self.locate(stream, p, reset)?));
            }
        }
        let group = self.groups.entry(name.to_owned()).or_default();
        for (key, at) in starts {
            let cursor = group.cursor_or_new(key);
            if cursor.committed().is_none() {
                cursor.start(at);
            }
        }
        Ok(())
    }

    /// Forgets a group.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` while it has members, or they hold something.
    pub(super) fn delete_group(&mut self, name: &str) -> Result<()> {
        let in_use = self
            .readers
            .values()
            .any(|r| r.group.as_deref() == Some(name));
        if in_use || self.groups.get(name).is_some_and(|g| !g.is_empty()) {
            return Err(Error::rejected(
                ErrorCode::SubscribeFailed,
                format!("the group {name:?} has live members; end their subscriptions first"),
            )
            .at(BrokerType::InMemory));
        }
        self.groups.remove(name);
        Ok(())
    }

    /// A group's committed position.
    pub(super) fn committed(&self, group: &str, key: PartitionKey) -> Option<i64> {
        self.groups.get(group)?.cursor(key)?.committed()
    }

    /// Takes a position that was committed from outside.
    pub(super) fn commit(&mut self, group: &str, key: PartitionKey, next: i64) -> Result<()> {
        self.locate(key.0, key.1, SeekTo::Offset(next))?;
        self.groups
            .entry(group.to_owned())
            .or_default()
            .cursor_or_new(key)
            .commit_to(next);
        self.wake_group(group);
        Ok(())
    }

    /// Moves a group's position in one partition, or in all.
    pub(super) fn seek(
        &mut self,
        group: &str,
        stream: StreamId,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        let count = self.streams.get(&stream).map_or(0, |s| s.core.count());
        let partitions = partition.map_or(0..count, |p| p..p.saturating_add(1));
        // All are looked up before any is moved.
        let targets = partitions
            .map(|p| Ok(((stream, p), self.locate(stream, p, to)?)))
            .collect::<Result<Vec<_>>>()?;
        let state = self.groups.entry(group.to_owned()).or_default();
        for (key, at) in targets {
            state.cursor_or_new(key).seek(at);
        }
        self.wake_group(group);
        Ok(())
    }

    /// Wakes everybody who reads a stream.
    pub(super) fn wake_stream(&mut self, stream: StreamId) {
        let Some(name) = self.streams.get(&stream).map(|s| &s.name) else {
            return;
        };
        for reader in self.readers.values_mut() {
            if !reader.woken && !reader.stopped && reader.pattern.matches(name) {
                reader.woken = true;
                self.wakes.push(reader.notify.clone());
            }
        }
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

    fn fetch_from(
        &mut self,
        now: Timestamp,
        id: ConsumerId,
        key: PartitionKey,
        most: usize,
        batch: &mut Batch,
    ) {
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
        let _ = now;
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
            && *position < log.low() {
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
                match reader.positions.get_mut(&key) {
                    Some(position) if *position < log.high() => {
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
        if known { result } else { Err(stale()) }
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
        let stream = self.ensure_stream(now, &name).map_err(|e| failed(&e))?;
        let mut marks = (*marks).clone();
        marks.failure = Some(failure.clone());
        let copy = Arc::new(Message {
            state: MessageState::DeadLettered,
            error: Some(failure.details.clone()),
            expiration: None,
            partition: None,
            offset: None,
            ..(*message).clone()
        });
        match self.append(
            now,
            stream,
            &copy,
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

    /// Shares the partitions of a group's streams among its members anew.
    fn rebalance(&mut self, now: Timestamp, name: &str) {
        let counts = self.partition_counts(self.streams.keys().copied());
        let Self {
            streams,
            groups,
            readers,
            ..
        } = self;
        let Some(group) = groups.get_mut(name) else {
            return;
        };
        group.rebalance(&counts);
        let members: Vec<ConsumerId> = group.members().collect();
        for member in members {
            let Some(reader) = readers.get(&member) else {
                continue;
            };
            let owned: Vec<PartitionKey> = group.owned_by(member).collect();
            for key in owned {
                let (Some(stream), Some(cursor)) = (streams.get(&key.0), group.cursor_mut(key))
                else {
                    continue;
                };
                if cursor.committed().is_none()
                    && let Some(log) = stream.core.partition(key.1) {
                        cursor.start(start(reader, &stream.name, key.1, log));
                    }
            }
        }
        let _ = now;
        self.wake_group(name);
    }

    /// Opens a reader's own positions in a stream. What is made after it
    /// subscribed it reads from the start: all of it is new.
    fn open_positions(&mut self, now: Timestamp, id: ConsumerId, stream: StreamId, new: bool) {
        let _ = now;
        let (Some(named), Some(reader)) = (self.streams.get(&stream), self.readers.get_mut(&id))
        else {
            return;
        };
        for p in 0..named.core.count() {
            if !reader.wants(&named.name, p) {
                continue;
            }
            if let Some(log) = named.core.partition(p) {
                let at = if new {
                    log.low()
                } else {
                    start(reader, &named.name, p, log)
                };
                reader.positions.insert((stream, p), at);
            }
        }
    }

    fn matching(&self, pattern: &Pattern) -> Vec<StreamId> {
        self.stream_names
            .iter()
            .filter(|(name, _)| pattern.matches(name))
            .map(|(_, id)| *id)
            .collect()
    }

    fn wake_reader(&mut self, id: ConsumerId) {
        if let Some(reader) = self.readers.get_mut(&id)
            && !reader.woken {
                reader.woken = true;
                self.wakes.push(reader.notify.clone());
            }
    }

    fn wake_group(&mut self, name: &str) {
        let members: Vec<ConsumerId> = self
            .groups
            .get(name)
            .map(|g| Group::members(g).collect())
            .unwrap_or_default();
        for member in members {
            self.wake_reader(member);
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

/// Where a reader starts that has no position.
fn start(reader: &Reader, name: &str, partition: i32, log: &Partition) -> i64 {
    match &reader.start {
        StartFrom::Latest => match reader.reset {
            OffsetReset::Earliest => log.low(),
            OffsetReset::Latest => log.high(),
            // Streams that existed were checked when it subscribed; this one
            // is new, and all of it is after that.
            OffsetReset::None => log.low(),
        },
        StartFrom::Earliest => log.low(),
        StartFrom::Time(time) => log.offset_at(*time),
        StartFrom::Offsets(offsets) => offsets
            .get(&(name.to_owned(), partition))
            .map_or(log.high(), |at| (*at).clamp(log.low(), log.high())),
    }
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
