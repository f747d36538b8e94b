//! One stream as a pure state machine: partitioned logs with offsets, times,
//! retention and compaction. Who reads it, and up to where, is not its
//! business.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::log::RecordId;
use crate::{
    broker::TopicOptions,
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Marks},
};

/// A stream.
#[derive(Debug)]
pub(super) struct Stream {
    options: TopicOptions,
    retention: Option<Duration>,
    retention_bytes: Option<u64>,
    compact: bool,
    max_message_bytes: Option<u64>,
    partitions: Vec<Partition>,
    bytes: u64,
}

/// One log.
#[derive(Debug, Default)]
pub(super) struct Partition {
    records: VecDeque<Record>,
    /// The offset of the first record.
    base: i64,
    bytes: u64,
    /// Bytes ever appended.
    appended_bytes: u64,
    /// Up to where it was compacted.
    compacted: i64,
    /// Where in the log what was dropped lies, until it is taken away there.
    pub(super) dropped: Vec<RecordId>,
    /// Where the log says from where an empty partition goes on.
    pub(super) base_record: Option<RecordId>,
}

/// Where and when a message is appended.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub(super) partition: i32,
    pub(super) appended: Timestamp,
    /// Where it lies in the log, if it does.
    pub(super) record: Option<RecordId>,
}

/// A message as it is kept.
pub(super) type Kept = (Arc<Message>, Arc<Marks>);

/// One message of a log.
#[derive(Debug)]
struct Record {
    /// None once compacted away; its offset stays.
    content: Option<Kept>,
    bytes: u64,
    appended: Timestamp,
    /// The latest message time up to here, by which times are looked up.
    latest: Timestamp,
    /// Bytes ever appended before this one.
    before: u64,
    /// Where it lies in the log, if it does.
    log: Option<RecordId>,
}

impl Stream {
    /// An empty stream.
    ///
    /// # Errors
    /// `TOPIC_CREATE_FAILED` that names the setting which cannot be honoured.
    pub(super) fn new(options: TopicOptions, default_bytes: Option<u64>) -> Result<Self> {
        let failed = |why: String| Err(Error::rejected(ErrorCode::TopicCreateFailed, why));
        let Some(count) = usize::try_from(options.partitions)
            .ok()
            .filter(|n| (1..=MAX_PARTITIONS).contains(n))
        else {
            return failed(format!(
                "partitions is {}; use 1 to {MAX_PARTITIONS}",
                options.partitions
            ));
        };
        if options.replication < 1 {
            return failed(format!("replication is {}; use 1", options.replication));
        }
        if !matches!(
            options.compression.as_str(),
            "" | "none" | "uncompressed" | "producer" | "gzip" | "snappy" | "lz4" | "zstd"
        ) {
            return failed(format!(
                "compression {:?} is not known",
                options.compression
            ));
        }
        let policies: Vec<&str> = options.cleanup_policy.split(',').map(str::trim).collect();
        if let Some(other) = policies
            .iter()
            .find(|p| !matches!(**p, "delete" | "compact"))
        {
            return failed(format!(
                "cleanup_policy {other:?}; use delete, compact or compact,delete"
            ));
        }
        let mut retention_bytes = default_bytes;
        let mut max_message_bytes = options.max_message_bytes;
        for (name, value) in &options.settings {
            let number = || {
                value.parse::<i64>().map_err(|_| {
                    Error::rejected(
                        ErrorCode::TopicCreateFailed,
                        format!("setting {name} = {value:?} is not a number"),
                    )
                })
            };
            match name.as_str() {
                "retention.bytes" => retention_bytes = u64::try_from(number()?).ok(),
                "max.message.bytes" => max_message_bytes = u64::try_from(number()?).ok(),
                name if NEUTRAL_SETTINGS.contains(&name) => {}
                _ => {
                    return failed(format!(
                        "the embedded broker cannot honour the setting {name}; leave it out"
                    ));
                }
            }
        }
        let deletes = policies.contains(&"delete");
        Ok(Self {
            retention: u64::try_from(options.retention_ms)
                .ok()
                .filter(|_| deletes)
                .map(Duration::from_millis),
            retention_bytes: retention_bytes.filter(|_| deletes),
            compact: policies.contains(&"compact"),
            max_message_bytes,
            partitions: (0..count).map(|_| Partition::default()).collect(),
            bytes: 0,
            options,
        })
    }

    pub(super) fn options(&self) -> &TopicOptions {
        &self.options
    }

    /// How long messages are kept; none: for ever.
    pub(super) fn retention(&self) -> Option<Duration> {
        self.retention
    }

    pub(super) fn count(&self) -> i32 {
        self.options.partitions
    }

    pub(super) fn partition(&self, partition: i32) -> Option<&Partition> {
        self.partitions.get(usize::try_from(partition).ok()?)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Why a message can never be taken, if so.
    pub(super) fn refuses(&self, message: &Message) -> Option<Error> {
        let max = self.max_message_bytes?;
        let size = message.size() as u64;
        (size > max).then(|| {
            Error::new(
                ErrorCode::MessageTooLarge,
                format!("the message has {size} bytes, the topic takes {max}"),
            )
        })
    }

    /// Appends and returns the offset.
    pub(super) fn append(
        &mut self,
        at: At,
        mut message: Arc<Message>,
        marks: Arc<Marks>,
        bytes: u64,
    ) -> Option<i64> {
        let limit = self.retention_bytes;
        let log = self
            .partitions
            .get_mut(usize::try_from(at.partition).ok()?)?;
        let before = log.bytes;
        let offset = log.high();
        let own = Arc::make_mut(&mut message);
        own.partition = Some(at.partition);
        own.offset = Some(offset);
        own.redelivered = false;
        log.push(at, Some((message, marks)), bytes);
        if let Some(limit) = limit {
            while log.bytes > limit && log.records.len() > 1 {
                log.drop_oldest();
            }
        }
        self.bytes = self.bytes + log.bytes - before;
        Some(offset)
    }

    /// Takes in what a partition held before a restart, oldest first; it goes on
    /// at `next` or behind its newest message. Nothing is dropped for it.
    #[cfg(feature = "journal")]
    pub(super) fn restore(
        &mut self,
        partition: i32,
        records: Vec<(i64, At, Kept, u64)>,
        next: Option<(i64, RecordId)>,
    ) {
        let Some(log) = usize::try_from(partition)
            .ok()
            .and_then(|p| self.partitions.get_mut(p))
        else {
            return;
        };
        log.base = match (records.first(), next) {
            (Some((offset, ..)), _) => *offset,
            (None, Some((next, _))) => next,
            (None, None) => 0,
        };
        log.base_record = next.map(|(_, record)| record);
        for (offset, at, content, bytes) in records {
            // What was compacted away keeps its offset.
            while log.high() < offset {
                log.push(At { record: None, ..at }, None, 0);
            }
            if log.high() == offset {
                log.push(at, Some(content), bytes);
                self.bytes += bytes;
            }
        }
        log.compacted = log.base;
    }

    /// The partitions that have dropped something that the log still has.
    pub(super) fn with_dropped(&mut self) -> impl Iterator<Item = (i32, &mut Partition)> {
        (0..)
            .zip(&mut self.partitions)
            .filter(|(_, p)| !p.dropped.is_empty())
    }

    /// Where everything that it holds lies in the log.
    pub(super) fn records(&self) -> impl Iterator<Item = RecordId> {
        self.partitions.iter().flat_map(|p| {
            let records = p.records.iter().filter_map(|r| r.log);
            records
                .chain(p.dropped.iter().copied())
                .chain(p.base_record)
        })
    }

    /// Drops what has been kept for long enough.
    pub(super) fn retain(&mut self, now: Timestamp) {
        let Some(retention) = self.retention else {
            return;
        };
        for log in &mut self.partitions {
            let before = log.bytes;
            while log
                .records
                .front()
                .is_some_and(|r| r.appended + retention <= now)
            {
                log.drop_oldest();
            }
            self.bytes -= before - log.bytes;
        }
    }

    /// Makes room as far as the policies allow: what is too old, then what a
    /// newer message of the same key has replaced.
    pub(super) fn make_room(&mut self, now: Timestamp) {
        self.retain(now);
        if self.compact {
            for log in &mut self.partitions {
                let before = log.bytes;
                log.compact();
                self.bytes -= before - log.bytes;
            }
        }
    }

    /// When [`Stream::retain`] has something to drop next; a second late, so
    /// that a busy stream is looked at once a second.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        let retention = self.retention?;
        self.partitions
            .iter()
            .filter_map(|p| p.records.front())
            .map(|r| r.appended + retention + RETENTION_GRAIN)
            .min()
    }
}

impl Partition {
    /// The oldest offset that is still there.
    pub(super) fn low(&self) -> i64 {
        self.base
    }

    /// The offset that the next message gets.
    pub(super) fn high(&self) -> i64 {
        self.base + i64::try_from(self.records.len()).unwrap_or(i64::MAX)
    }

    /// The message at an offset; none when it is not there (any more).
    pub(super) fn get(&self, offset: i64) -> Option<(&Arc<Message>, &Arc<Marks>)> {
        self.record(offset)?
            .content
            .as_ref()
            .map(|(message, marks)| (message, marks))
    }

    /// The first offset whose message is of this time or later; the end when
    /// there is none.
    pub(super) fn offset_at(&self, time: Timestamp) -> i64 {
        // Message times need not rise. The first of this time or later is also
        // the first that raises the latest time to it, except when a record
        // that is dropped by now had raised it already: then from there on.
        let from = self.records.partition_point(|r| r.latest < time);
        let found = self
            .records
            .iter()
            .skip(from)
            .position(|r| r.content.as_ref().is_some_and(|(m, _)| m.timestamp >= time))
            .map_or(self.records.len(), |n| from + n);
        self.base + i64::try_from(found).unwrap_or(i64::MAX)
    }

    /// Bytes from an offset to the end.
    pub(super) fn bytes_from(&self, offset: i64) -> u64 {
        self.record(offset.max(self.base))
            .map_or(0, |r| self.appended_bytes - r.before)
    }

    fn record(&self, offset: i64) -> Option<&Record> {
        self.records
            .get(usize::try_from(offset.checked_sub(self.base)?).ok()?)
    }

    fn push(&mut self, at: At, content: Option<Kept>, bytes: u64) {
        let latest = self.records.back().map(|r| r.latest);
        let time = content.as_ref().map(|(message, _)| message.timestamp);
        self.records.push_back(Record {
            content,
            bytes,
            appended: at.appended,
            latest: latest.max(time).unwrap_or(at.appended),
            before: self.appended_bytes,
            log: at.record,
        });
        self.bytes += bytes;
        self.appended_bytes += bytes;
    }

    fn drop_oldest(&mut self) {
        if let Some(record) = self.records.pop_front() {
            self.base += 1;
            self.bytes -= record.bytes;
            self.dropped.extend(record.log);
        }
    }

    fn compact(&mut self) {
        // Looking at everything again is worth it only when enough is new.
        let new = self.high() - self.compacted.max(self.base);
        if new <= i64::try_from(self.records.len() / 4).unwrap_or(0) {
            return;
        }
        let mut seen = HashSet::new();
        let mut freed = 0;
        for record in self.records.iter_mut().rev() {
            let Some((message, _)) = &record.content else {
                continue;
            };
            if let Some(key) = &message.key
                && !seen.insert(key.clone())
            {
                record.content = None;
                self.dropped.extend(record.log.take());
                freed += record.bytes;
                record.bytes = 0;
            }
        }
        self.bytes -= freed;
        self.compacted = self.high();
    }
}

/// Partitions of a stream at most.
const MAX_PARTITIONS: usize = 10_000;

/// How late retention may be.
const RETENTION_GRAIN: Duration = Duration::from_secs(1);

/// Settings of Kafka that speak of disks and copies, and hold trivially here.
const NEUTRAL_SETTINGS: &[&str] = &[
    "compression.type",
    "delete.retention.ms",
    "file.delete.delay.ms",
    "flush.messages",
    "flush.ms",
    "index.interval.bytes",
    "max.compaction.lag.ms",
    "min.cleanable.dirty.ratio",
    "min.compaction.lag.ms",
    "min.insync.replicas",
    "preallocate",
    "segment.bytes",
    "segment.index.bytes",
    "segment.jitter.ms",
    "segment.ms",
    "unclean.leader.election.enable",
];

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
