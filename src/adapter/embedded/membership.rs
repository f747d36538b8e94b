//! The broker's state, as far as it concerns who reads streams: members of
//! groups, readers by themselves, and whom to wake.

use super::{
    group::{Group, Member, PartitionKey, StreamId},
    queue::ConsumerId,
    reader::Reader,
    state::State,
    stream::Partition,
};
use crate::{
    broker::{BrokerType, OffsetReset, StartFrom},
    error::{Error, ErrorCode, Result},
    topic::Pattern,
};

impl State {
    /// Registers a reader and gives it its partitions.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED`: its instance is there already, or its group has no
    /// position and it refuses to start without one.
    pub(super) fn add_reader(&mut self, reader: Reader) -> Result<ConsumerId> {
        let refuse = |why: String| {
            Err(Error::rejected(ErrorCode::SubscribeFailed, why).at(BrokerType::InMemory))
        };
        let matching: Vec<StreamId> = self.matching(&reader.pattern);
        if let Some(name) = &reader.group {
            let group = self.groups.get(name);
            if let Some(instance) = &reader.instance
                && group.is_some_and(|g| g.has_instance(instance))
            {
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
                self.rebalance(&name);
            }
            None => {
                self.readers.insert(id, reader);
                for stream in matching {
                    self.open_positions(id, stream, false);
                }
                self.wake_reader(id);
            }
        }
        Ok(id)
    }

    /// Gives a stream that was made just now to those whose pattern covers it.
    pub(super) fn cover_new_stream(&mut self, stream: StreamId) {
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
                    self.rebalance(&group);
                }
                None => self.open_positions(id, stream, true),
            }
        }
    }

    /// Stops handing out to a reader.
    pub(super) fn detach_reader(&mut self, id: ConsumerId) {
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
            self.rebalance(&name);
        }
    }

    /// Forgets a reader; what it still holds goes back.
    pub(super) fn remove_reader(&mut self, id: ConsumerId) {
        self.detach_reader(id);
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

    /// Shares the partitions of a group's streams among its members anew.
    fn rebalance(&mut self, name: &str) {
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
        let mut started = Vec::new();
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
                    && let Some(log) = stream.core.partition(key.1)
                {
                    cursor.start(start(reader, &stream.name, key.1, log));
                    started.push(key);
                }
            }
        }
        for key in started {
            self.note_moved(name, key);
        }
        self.wake_group(name);
    }

    /// Opens a reader's own positions in a stream. What is made after it
    /// subscribed it reads from the start: all of it is new.
    fn open_positions(&mut self, id: ConsumerId, stream: StreamId, new: bool) {
        let (Some(named), Some(reader)) = (self.streams.get(&stream), self.readers.get_mut(&id))
        else {
            return;
        };
        if new && reader.until.is_some() {
            // Its ends are another stream's of this name.
            return;
        }
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

    pub(super) fn matching(&self, pattern: &Pattern) -> Vec<StreamId> {
        self.stream_names
            .iter()
            .filter(|(name, _)| pattern.matches(name))
            .map(|(_, id)| *id)
            .collect()
    }

    fn wake_reader(&mut self, id: ConsumerId) {
        if let Some(reader) = self.readers.get_mut(&id)
            && !reader.woken
        {
            reader.woken = true;
            self.wakes.push(reader.notify.clone());
        }
    }

    pub(super) fn wake_group(&mut self, name: &str) {
        let members: Vec<ConsumerId> = self
            .groups
            .get(name)
            .map(|g| Group::members(g).collect())
            .unwrap_or_default();
        for member in members {
            self.wake_reader(member);
        }
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
