//! The broker's state, as far as it concerns streams: making them, appending,
//! and what is known of them.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    group::StreamId,
    log::RecordId,
    queues::cost,
    record::{Content, Record},
    state::State,
    stream::{At, Stream},
};
use crate::{
    broker::{
        BrokerType, Fate, OrderKey, PartitionMetadata, Position, SeekTo, TopicMetadata,
        TopicOptions,
    },
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Marks},
    topic::Topic,
    topology::{Drift, TopologyReport},
};

/// A stream with its name.
pub(super) struct NamedStream {
    pub(super) name: Topic,
    pub(super) core: Stream,
    /// Its declaration in the log, where there is one.
    pub(super) record: Option<RecordId>,
}

impl State {
    /// The stream of a topic.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`.
    pub(super) fn known_stream(&self, topic: &str) -> Result<StreamId> {
        self.stream_names.get(topic).copied().ok_or_else(|| {
            Error::new(
                ErrorCode::TopicNotFound,
                "there is no such stream; create it first",
            )
            .at(BrokerType::InMemory)
            .on(topic)
        })
    }

    /// Makes a stream, or checks that it is as asked.
    ///
    /// # Errors
    /// `TOPIC_CREATE_FAILED` that names what differs, or why it cannot be kept.
    pub(super) fn create_stream(&mut self, name: &str, options: &TopicOptions) -> Result<StreamId> {
        let name = Topic::new(name)?;
        let failed = |e: &str| {
            Error::rejected(ErrorCode::TopicCreateFailed, e)
                .at(BrokerType::InMemory)
                .on(name.as_str())
        };
        if let Some(id) = self.stream_names.get(&name).copied() {
            if let Some(stream) = self.streams.get(&id)
                && let Some((setting, is, wanted)) = differences(stream.core.options(), options)
                    .into_iter()
                    .next()
            {
                return Err(failed(&format!(
                    "the stream exists with {setting} = {is}, not {wanted}; delete it first or create it as it is"
                )));
            }
            return Ok(id);
        }
        if self.queue_id(&name).is_some() {
            return Err(failed(
                "a queue has this name; a topic is either a queue or a stream",
            ));
        }
        let core = Stream::new(options.clone(), self.config.retention_bytes)
            .map_err(|e| failed(e.message()))?;
        let record = if self.stream_log.is_durable() {
            let record = Record::Stream {
                name: name.as_str().to_owned(),
                options: options.clone(),
            };
            let written = self.stream_log.write(vec![record.encode()], &[]);
            Some(written.map_err(|refused| {
                refused
                    .error(ErrorCode::TopicCreateFailed)
                    .on(name.as_str())
            })?)
        } else {
            None
        };
        let id = self.fresh_id();
        self.streams.insert(
            id,
            NamedStream {
                name: name.clone(),
                core,
                record,
            },
        );
        self.stream_names.insert(name, id);
        self.recorder.topics_created.inc();
        self.cover_new_stream(id);
        Ok(id)
    }

    /// The options of a stream that nobody described.
    pub(super) fn default_topic_options(&self, name: &str) -> TopicOptions {
        self.topology.topic(name).map_or_else(
            || TopicOptions {
                partitions: self.config.default_partitions,
                ..TopicOptions::default()
            },
            |t| t.options.clone(),
        )
    }

    /// Makes a stream with safe settings when it is missing.
    ///
    /// # Errors
    /// As [`State::create_stream`].
    pub(super) fn ensure_stream(&mut self, name: &str) -> Result<StreamId> {
        if let Some(id) = self.stream_names.get(name) {
            return Ok(*id);
        }
        let options = self.default_topic_options(name);
        self.create_stream(name, &options)
    }

    /// Deletes a stream with everything in it.
    pub(super) fn delete_stream(&mut self, id: StreamId) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        self.bytes -= stream.core.bytes();
        self.stream_names.remove(&stream.name);
        // The declaration first: without it the rest belongs to nobody, so a
        // crash in between deletes the stream all the same.
        let positions = self.groups.values().flat_map(|g| g.records(Some(id)));
        let records: Vec<RecordId> = stream
            .record
            .into_iter()
            .chain(stream.core.records())
            .chain(positions)
            .collect();
        self.stream_log.remove(&records);
        for group in self.groups.values_mut() {
            group.forget_stream(id);
        }
        for reader in self.readers.values_mut() {
            reader.positions.retain(|(s, _), _| *s != id);
        }
    }

    /// Takes one message into a stream.
    pub(super) fn append(
        &mut self,
        now: Timestamp,
        id: StreamId,
        message: &Arc<Message>,
        marks: &Arc<Marks>,
        order: &OrderKey,
    ) -> Fate {
        let bytes = cost(message);
        if let Err(full) = self.check_room(bytes) {
            // What is due to go makes room first.
            self.retain_streams(now);
            if self.check_room(bytes).is_err() {
                return Fate::Overloaded(full);
            }
        }
        let bound = self.config.max_stream_bytes;
        let Some(stream) = self.streams.get_mut(&id) else {
            return Fate::Refused(
                Error::new(ErrorCode::TopicNotFound, "the stream was deleted just now")
                    .at(BrokerType::InMemory),
            );
        };
        let named = |e: Error, name: &Topic| e.at(BrokerType::InMemory).on(name.as_str());
        if let Some(why) = stream.core.refuses(message) {
            return Fate::Refused(named(why, &stream.name));
        }
        let count = stream.core.count();
        let partition = match message.partition {
            Some(p) if (0..count).contains(&p) => p,
            Some(p) => {
                return Fate::Refused(named(
                    Error::rejected(
                        ErrorCode::MessageInvalid,
                        format!("partition {p} does not exist, the stream has {count}"),
                    ),
                    &stream.name,
                ));
            }
            None => partition_of(message, order, count),
        };
        let before = stream.core.bytes();
        if before + bytes > bound {
            stream.core.make_room(now);
        }
        let held = stream.core.bytes();
        self.bytes = self.bytes + held - before;
        if held + bytes > bound {
            let name = stream.name.clone();
            self.forget_events(id);
            return Fate::Overloaded(named(
                Error::new(
                    ErrorCode::PublishFailed,
                    format!(
                        "the stream holds {held} bytes and its bound embedded.max_stream_bytes is {bound}; shorten its retention, set a retention in bytes, or raise the bound"
                    ),
                ),
                &name,
            ));
        }
        let mut message = message.clone();
        if message.topic.as_deref() != Some(stream.name.as_str()) {
            Arc::make_mut(&mut message).topic = Some(stream.name.as_str().to_owned());
        }
        let first = stream
            .core
            .partition(partition)
            .is_none_or(|p| p.low() == p.high());
        let mut record = None;
        if let Some(declared) = stream.record {
            let offset = stream.core.partition(partition).map_or(0, |p| p.high());
            let event = Record::Event {
                stream: declared,
                partition,
                offset,
                appended: now,
                content: Content {
                    message: message.clone(),
                    marks: marks.clone(),
                    routing_key: None,
                },
            };
            match self.stream_log.write(vec![event.encode()], &[]) {
                Ok(written) => record = Some(written),
                Err(refused) => {
                    // What made room has left the stream already.
                    self.forget_events(id);
                    return refused.fate();
                }
            }
        }
        let at = At {
            partition,
            appended: now,
            record,
        };
        let offset = stream.core.append(at, message, marks.clone(), bytes);
        let after = stream.core.bytes();
        let due = if first { stream.core.next_due() } else { None };
        self.bytes = self.bytes + after - held;
        self.arm(due);
        if held < before || after < held + bytes {
            self.forget_events(id);
        }
        Fate::Confirmed(offset.map(|offset| Position { partition, offset }))
    }

    /// Drops what streams have kept for long enough.
    pub(super) fn retain_streams(&mut self, now: Timestamp) {
        let mut shorter = Vec::new();
        for (id, stream) in &mut self.streams {
            let before = stream.core.bytes();
            stream.core.retain(now);
            if stream.core.bytes() < before {
                shorter.push(*id);
            }
            self.bytes = self.bytes + stream.core.bytes() - before;
        }
        for id in shorter {
            self.forget_events(id);
        }
    }

    /// The state of a stream.
    pub(super) fn stream_metadata(&self, now: Timestamp, id: StreamId) -> Option<TopicMetadata> {
        let stream = self.streams.get(&id)?;
        let partitions = (0..stream.core.count())
            .filter_map(|p| {
                let log = stream.core.partition(p)?;
                Some(PartitionMetadata {
                    id: p,
                    leader: 0,
                    replicas: vec![0],
                    isr: vec![0],
                    low_watermark: log.low(),
                    high_watermark: log.high(),
                })
            })
            .collect();
        Some(TopicMetadata {
            name: stream.name.as_str().to_owned(),
            partitions,
            replication_factor: 1,
            retention_ms: stream
                .core
                .retention()
                .map(|r| i64::try_from(r.as_millis()).unwrap_or(i64::MAX)),
            cleanup_policy: stream.core.options().cleanup_policy.clone(),
            timestamp: now,
        })
    }

    /// Where a position is in one partition.
    ///
    /// # Errors
    /// An offset that the partition does not have, an unknown partition.
    pub(super) fn locate(&self, id: StreamId, partition: i32, to: SeekTo) -> Result<i64> {
        let wrong = |why: String, name: &str| {
            Err(Error::rejected(ErrorCode::InvalidConfig, why)
                .at(BrokerType::InMemory)
                .on(name))
        };
        let Some(stream) = self.streams.get(&id) else {
            return wrong("the stream was deleted just now".to_owned(), "");
        };
        let Some(log) = stream.core.partition(partition) else {
            return wrong(
                format!(
                    "partition {partition} does not exist, the stream has {}",
                    stream.core.count()
                ),
                &stream.name,
            );
        };
        match to {
            SeekTo::Beginning => Ok(log.low()),
            SeekTo::End => Ok(log.high()),
            SeekTo::Time(time) => Ok(log.offset_at(time)),
            SeekTo::Offset(offset) if (0..=log.high()).contains(&offset) => {
                // What retention has dropped cannot be read; the oldest that
                // is left follows it.
                Ok(offset.max(log.low()))
            }
            SeekTo::Offset(offset) => wrong(
                format!(
                    "offset {offset} is not in partition {partition}, which has {} to {}",
                    log.low(),
                    log.high()
                ),
                &stream.name,
            ),
        }
    }

    /// The streams of the topology against what exists.
    pub(super) fn check_streams(&mut self, apply: bool, report: &mut TopologyReport) -> Result<()> {
        let topology = self.topology.clone();
        for spec in &topology.topics {
            let object = format!("topic {}", spec.name);
            let existing = self
                .stream_names
                .get(spec.name.as_str())
                .and_then(|id| self.streams.get(id));
            match existing {
                Some(stream) => {
                    let found = differences(stream.core.options(), &spec.options);
                    if found.is_empty() {
                        report.ok.push(object);
                        continue;
                    }
                    report
                        .drift
                        .extend(found.into_iter().map(|(argument, is, wanted)| Drift {
                            broker: BrokerType::InMemory,
                            object: object.clone(),
                            argument: argument.to_owned(),
                            expected: wanted,
                            actual: is,
                        }));
                }
                None if apply => {
                    self.create_stream(&spec.name, &spec.options)?;
                    report.created.push(object);
                }
                None => report.missing.push(object),
            }
        }
        Ok(())
    }

    /// How many partitions each stream has that any of `ids` is.
    pub(super) fn partition_counts(
        &self,
        ids: impl Iterator<Item = StreamId>,
    ) -> BTreeMap<StreamId, i32> {
        ids.filter_map(|id| Some((id, self.streams.get(&id)?.core.count())))
            .collect()
    }
}

/// The partition of a message: by its key, else by its publisher, so that
/// either keeps its order.
fn partition_of(message: &Message, order: &OrderKey, count: i32) -> i32 {
    let count = u64::try_from(count).unwrap_or(1).max(1);
    let hash = match (&message.key, order) {
        (Some(key), _) => u64::from(crc32fast::hash(key.as_bytes())),
        (None, OrderKey::Key(key)) => u64::from(crc32fast::hash(key.as_bytes())),
        (None, OrderKey::Publisher(n)) => *n,
    };
    i32::try_from(hash % count).unwrap_or(0)
}

/// The settings that differ, with both values.
fn differences(is: &TopicOptions, wanted: &TopicOptions) -> Vec<(&'static str, String, String)> {
    let mut found = Vec::new();
    macro_rules! compare {
        ($($field:ident as $name:literal),*) => {
            $(if is.$field != wanted.$field {
                found.push(($name, format!("{:?}", is.$field), format!("{:?}", wanted.$field)));
            })*
        };
    }
    compare!(
        partitions as "partitions",
        replication as "replication",
        retention_ms as "retention.ms",
        cleanup_policy as "cleanup.policy",
        compression as "compression.type",
        max_message_bytes as "max.message.bytes",
        settings as "settings"
    );
    found
}
