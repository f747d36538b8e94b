//! The state as the journals left it. Records may come in any order, since
//! compaction moves them; what belongs to nobody any more is taken away.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
};

use super::{
    durable::Handed,
    group::Logged,
    log::{Log, RecordId},
    queue::{Entry, Queue},
    queues::cost,
    record::{Content, Record},
    state::{NamedQueue, State},
    store::Store,
    stream::{At, Kept, Stream},
    streams::NamedStream,
};
use crate::{
    broker::{QueueOptions, TopicOptions},
    message::{MessageState, Timestamp},
    topic::Topic,
};

/// What the journals hold.
#[derive(Default)]
pub(super) struct Found {
    queues: BTreeMap<RecordId, (Topic, QueueOptions)>,
    tasks: HashMap<RecordId, Vec<Task>>,
    handed: HashMap<RecordId, Handed>,
    streams: BTreeMap<RecordId, (Topic, TopicOptions)>,
    partitions: HashMap<RecordId, BTreeMap<i32, Partition>>,
    positions: Vec<(RecordId, i32, String, Logged)>,
}

struct Task {
    record: RecordId,
    ready: Timestamp,
    rests: bool,
    content: Content,
}

#[derive(Default)]
struct Partition {
    events: BTreeMap<i64, (At, Content)>,
    base: Option<(i64, RecordId)>,
    /// What nothing needs any more.
    spare: Vec<RecordId>,
}

impl Found {
    /// Takes one entry of either journal.
    ///
    /// # Errors
    /// Why it cannot be understood.
    pub(super) fn visit(&mut self, id: RecordId, body: &[u8]) -> Result<(), String> {
        let topic = |name: String| Topic::new(name).map_err(|e| e.message().to_owned());
        match Record::decode(body)? {
            Record::Queue { name, options } => {
                self.queues.insert(id, (topic(name)?, options));
            }
            Record::Task {
                queue,
                ready,
                rests,
                content,
            } => self.tasks.entry(queue).or_default().push(Task {
                record: id,
                ready,
                rests,
                content,
            }),
            Record::Handed { queue, below } => {
                let record = Some(id);
                self.handed.insert(queue, Handed { below, record });
            }
            Record::Stream { name, options } => {
                self.streams.insert(id, (topic(name)?, options));
            }
            Record::Event {
                stream,
                partition,
                offset,
                appended,
                content,
            } => {
                let at = At {
                    partition,
                    appended,
                    record: Some(id),
                };
                let found = self.partition(stream, partition);
                if let Some((at, _)) = found.events.insert(offset, (at, content)) {
                    found.spare.extend(at.record);
                }
            }
            Record::Base {
                stream,
                partition,
                next,
            } => {
                let found = self.partition(stream, partition);
                if let Some((_, record)) = found.base.replace((next, id)) {
                    found.spare.push(record);
                }
            }
            Record::Position {
                group,
                stream,
                partition,
                committed,
                next,
            } => {
                let logged = Logged {
                    record: id,
                    committed,
                    next,
                };
                self.positions.push((stream, partition, group, logged));
            }
        }
        Ok(())
    }

    fn partition(&mut self, stream: RecordId, partition: i32) -> &mut Partition {
        let stream = self.partitions.entry(stream).or_default();
        stream.entry(partition).or_default()
    }
}

impl State {
    /// Takes over what the journals hold, and writes to them from now on.
    pub(super) fn restore(&mut self, now: Timestamp, store: &Store, mut found: Found) {
        self.queue_log = Log::new(store.queues.clone());
        self.stream_log = Log::new(store.streams.clone());
        for (id, (name, options)) in mem::take(&mut found.queues) {
            let tasks = found.tasks.remove(&id).unwrap_or_default();
            let handed = found.handed.remove(&id).unwrap_or_default();
            self.restore_queue(now, id, name, options, tasks, handed);
        }
        let mut streams = HashMap::new();
        for (id, (name, options)) in mem::take(&mut found.streams) {
            let partitions = found.partitions.remove(&id).unwrap_or_default();
            if let Some(number) = self.restore_stream(id, name, options, partitions) {
                streams.insert(id, number);
            }
        }
        let mut nobodys = Vec::new();
        for (stream, partition, group, logged) in found.positions {
            match streams.get(&stream) {
                Some(number) => self
                    .groups
                    .entry(group)
                    .or_default()
                    .cursor_or_new((*number, partition))
                    .restore(logged),
                None => nobodys.push(logged.record),
            }
        }
        // What a queue or a stream left that was deleted when the crash came.
        for partition in found
            .partitions
            .into_values()
            .flat_map(BTreeMap::into_values)
        {
            nobodys.extend(partition.records());
        }
        self.stream_log.remove(&nobodys);
        let tasks = found.tasks.into_values().flatten().map(|t| t.record);
        let handed = found.handed.into_values().filter_map(|h| h.record);
        let nobodys: Vec<RecordId> = tasks.chain(handed).collect();
        self.queue_log.remove(&nobodys);
        // What became due meanwhile.
        self.tick(now);
    }

    fn restore_queue(
        &mut self,
        now: Timestamp,
        record: RecordId,
        name: Topic,
        options: QueueOptions,
        mut tasks: Vec<Task>,
        handed: Handed,
    ) {
        let core = match Queue::new(now, options, self.config.max_messages) {
            Ok(core) => core,
            Err(error) => {
                // It was checked when it was declared.
                tracing::error!(queue = %name, %error, "a queue of the journal is left there");
                return;
            }
        };
        // What never rested stands in the order in which it was written; what
        // has finished its rest stands behind it, by when that was.
        tasks.sort_unstable_by_key(|t| {
            let rested = t.rests.then_some(t.ready);
            (rested, t.record)
        });
        let mut queue = NamedQueue {
            name: name.clone(),
            core,
            record: Some(record),
            handed,
        };
        for task in tasks {
            let entry = task.entry(&name, queue.handed.below);
            queue.core.restore(now, entry, task.ready, task.rests);
        }
        self.bytes += queue.core.bytes();
        let id = self.fresh_id();
        self.queue_names.insert(name, id);
        self.queues.insert(id, queue);
    }

    /// The stream's number in the broker.
    fn restore_stream(
        &mut self,
        record: RecordId,
        name: Topic,
        options: TopicOptions,
        partitions: BTreeMap<i32, Partition>,
    ) -> Option<u64> {
        let mut core = match Stream::new(options, self.config.retention_bytes) {
            Ok(core) => core,
            Err(error) => {
                tracing::error!(stream = %name, %error, "a stream of the journal is left there");
                return None;
            }
        };
        let mut spare = Vec::new();
        for (number, partition) in partitions {
            spare.extend(partition.spare);
            let events = partition.events.into_iter().map(|(offset, (at, content))| {
                let kept = kept(&name, number, offset, content);
                let bytes = cost(&kept.0);
                (offset, at, kept, bytes)
            });
            core.restore(number, events.collect(), partition.base);
        }
        self.stream_log.remove(&spare);
        self.bytes += core.bytes();
        let id = self.fresh_id();
        self.stream_names.insert(name.clone(), id);
        let stream = NamedStream {
            name,
            core,
            record: Some(record),
        };
        self.streams.insert(id, stream);
        Some(id)
    }
}

impl Task {
    fn entry(&self, queue: &Topic, handed_below: RecordId) -> Entry {
        let mut message = self.content.message.clone();
        let own = Arc::make_mut(&mut message);
        own.topic = Some(queue.as_str().to_owned());
        // A retry was written anew, behind what is noted as handed out.
        let seen = self.record < handed_below || own.state == MessageState::Failed;
        Entry {
            bytes: cost(&message),
            message,
            marks: self.content.marks.clone(),
            routing_key: self.content.routing_key.clone(),
            deliveries: u32::from(seen),
            record: Some(self.record),
        }
    }
}

impl Partition {
    fn records(self) -> impl Iterator<Item = RecordId> {
        let events = self.events.into_values().filter_map(|(at, _)| at.record);
        let base = self.base.map(|(_, record)| record);
        events.chain(base).chain(self.spare)
    }
}

fn kept(stream: &Topic, partition: i32, offset: i64, content: Content) -> Kept {
    let mut message = content.message;
    let own = Arc::make_mut(&mut message);
    own.topic = Some(stream.as_str().to_owned());
    own.partition = Some(partition);
    own.offset = Some(offset);
    (message, content.marks)
}
