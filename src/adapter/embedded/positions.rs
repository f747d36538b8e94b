//! The broker's state, as far as it concerns the positions of groups, as
//! operators see and move them.

use super::{
    group::{PartitionKey, StreamId},
    state::State,
};
use crate::{
    broker::{BrokerType, SeekTo},
    error::{Error, ErrorCode, Result},
    topic::Pattern,
};

impl State {
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
        self.groups.entry(name.to_owned()).or_default();
        for (key, at) in starts {
            let group = self.groups.entry(name.to_owned()).or_default();
            let cursor = group.cursor_or_new(key);
            if cursor.committed().is_none() {
                cursor.start(at);
                self.note_moved(name, key);
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
        if let Some(group) = self.groups.remove(name) {
            let records = group.records(None).collect::<Vec<_>>();
            self.stream_log.remove(&records);
        }
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
        self.note_moved(group, key);
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
        for (key, at) in targets {
            self.groups
                .entry(group.to_owned())
                .or_default()
                .cursor_or_new(key)
                .seek(at);
            self.note_moved(group, key);
        }
        self.wake_group(group);
        Ok(())
    }
}
