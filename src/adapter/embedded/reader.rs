//! A reader of streams, as the state keeps it: a member of a group, or one that
//! reads by itself.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::sync::Notify;

use super::group::{PartitionKey, StreamId};
use crate::{
    broker::{OffsetReset, StartFrom, SubscribeOptions},
    message::Timestamp,
    topic::Pattern,
};

/// A reader of streams.
pub(super) struct Reader {
    /// Which streams, those made later included.
    pub(super) pattern: Pattern,
    /// Only this partition of each.
    pub(super) partition: Option<i32>,
    /// Only these partitions, each up to this offset.
    pub(super) until: Option<BTreeMap<i32, i64>>,
    /// The group that it is a member of.
    pub(super) group: Option<String>,
    pub(super) instance: Option<String>,
    pub(super) start: StartFrom,
    pub(super) reset: OffsetReset,
    /// Finished when handed out.
    pub(super) auto_ack: bool,
    /// Unfinished messages at most.
    pub(super) limit: usize,
    /// Messages of a batch at most.
    pub(super) batch: usize,
    /// Bytes of a batch at most, but for a single message that is larger.
    pub(super) max_bytes: u64,
    /// Bytes that are waited for, and for how long.
    pub(super) min_bytes: u64,
    pub(super) max_wait: Duration,
    /// Fewer than `min_bytes` are there; hand them out then all the same.
    pub(super) hold_until: Option<Timestamp>,
    /// Where it reads next, when it reads by itself.
    pub(super) positions: BTreeMap<PartitionKey, i64>,
    /// Handed out and not settled, by tag.
    pub(super) held: HashMap<u64, Held>,
    pub(super) next_tag: u64,
    /// Whose turn it is among its partitions.
    pub(super) turn: usize,
    pub(super) notify: Arc<Notify>,
    /// Woken, and has not looked since.
    pub(super) woken: bool,
    /// Gets nothing any more; kept until what it holds is settled.
    pub(super) stopped: bool,
}

/// A message in a member's hands.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) stream: StreamId,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) epoch: u64,
}

impl Reader {
    /// A reader with the limits that its options set. `batches` is how many
    /// batches may wait for it.
    pub(super) fn new(
        pattern: Pattern,
        options: &SubscribeOptions,
        batches: usize,
        notify: Arc<Notify>,
    ) -> Self {
        Self {
            pattern,
            partition: options.stream.partition,
            until: options.stream.until.clone(),
            group: options.group_id.clone(),
            instance: options.group_instance_id.clone(),
            start: options.start.clone(),
            reset: options.effective_reset(),
            auto_ack: options.auto_ack,
            limit: options.max_poll_records,
            batch: (options.stream.buffer_size / batches.max(1)).max(1),
            max_bytes: options.stream.max_bytes as u64,
            min_bytes: options.stream.min_bytes as u64,
            max_wait: options.stream.max_wait,
            hold_until: None,
            positions: BTreeMap::new(),
            held: HashMap::new(),
            next_tag: 0,
            turn: 0,
            notify,
            woken: false,
            stopped: false,
        }
    }

    /// Whether it reads this partition.
    pub(super) fn wants(&self, name: &str, partition: i32) -> bool {
        self.pattern.matches(name)
            && self.partition.is_none_or(|p| p == partition)
            && self
                .until
                .as_ref()
                .is_none_or(|until| until.contains_key(&partition))
    }

    /// Where its reading of a partition ends.
    pub(super) fn end(&self, partition: i32) -> i64 {
        let until = self.until.as_ref().and_then(|u| u.get(&partition));
        until.copied().unwrap_or(i64::MAX)
    }

    /// Whether it has an end and has come to it everywhere. What was compacted or
    /// dropped meanwhile it has passed.
    pub(super) fn is_done(&self) -> bool {
        self.until.is_some()
            && self
                .positions
                .iter()
                .all(|((_, partition), at)| *at >= self.end(*partition))
    }

    /// How many more messages it may get now.
    pub(super) fn room(&self) -> usize {
        if self.group.is_some() && !self.auto_ack {
            self.batch.min(self.limit.saturating_sub(self.held.len()))
        } else {
            self.batch
        }
    }
}
