//! Everything that the broker holds: queues, streams, groups and who consumes
//! them. Pure but for the wake-ups that it leaves for its owner; the owner
//! steps it under one short lock, a batch at a time.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
};

use tokio::sync::Notify;

use super::{
    config::EmbeddedConfig,
    durable::Handed,
    group::{Group, PartitionKey, StreamId},
    log::{Log, RecordId},
    queue::{ConsumerId, Queue, Seq},
    reader::Reader,
    streams::NamedStream,
};
use crate::{
    broker::Received,
    message::{Timestamp, wire::Marks},
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
    topology::Topology,
};

/// A queue, by its number in the broker; never used twice, so that what was
/// handed out by a deleted queue is recognised when its name lives again.
pub(super) type QueueId = u64;

/// The broker's state.
pub(super) struct State {
    pub(super) config: EmbeddedConfig,
    pub(super) topology: Arc<Topology>,
    pub(super) recorder: Arc<MetricsRecorder>,
    pub(super) queue_names: BTreeMap<Topic, QueueId>,
    pub(super) queues: HashMap<QueueId, NamedQueue>,
    pub(super) consumers: BTreeMap<ConsumerId, QueueConsumer>,
    pub(super) stream_names: BTreeMap<Topic, StreamId>,
    pub(super) streams: BTreeMap<StreamId, NamedStream>,
    pub(super) groups: BTreeMap<String, Group>,
    pub(super) readers: BTreeMap<ConsumerId, Reader>,
    /// Bytes in all queues and streams.
    pub(super) bytes: u64,
    pub(super) next_id: u64,
    /// The marks of messages that have none, shared.
    pub(super) no_marks: Arc<Marks>,
    /// Where queues and their messages are written.
    pub(super) queue_log: Log,
    /// Where streams, their messages and the positions of groups are written.
    pub(super) stream_log: Log,
    /// What left the queues in this step, to be taken from their log.
    pub(super) done: Vec<RecordId>,
    /// Positions that moved in this step, to be written once.
    pub(super) moved: Vec<(String, PartitionKey)>,
    /// Whom to wake after this step.
    pub(super) wakes: Vec<Arc<Notify>>,
    /// When the timer is to run next, as it was last told.
    pub(super) armed: Option<Timestamp>,
    /// The timer must be told an earlier time.
    pub(super) rearm: bool,
}

/// A queue with its name.
pub(super) struct NamedQueue {
    pub(super) name: Topic,
    pub(super) core: Queue,
    /// Its declaration in the log, where it survives restarts.
    pub(super) record: Option<RecordId>,
    pub(super) handed: Handed,
}

/// A consumer of queues.
pub(super) struct QueueConsumer {
    /// Which queues, those declared later included.
    pub(super) pattern: Pattern,
    pub(super) exclusive: bool,
    /// Acked when handed out.
    pub(super) auto_ack: bool,
    /// How many more messages it may hold.
    pub(super) credit: usize,
    /// The queues that it is attached to, in the order of their turn.
    pub(super) queues: Vec<QueueId>,
    /// Assigned and not yet taken by the consumer's task.
    pub(super) outbox: Vec<Outgoing>,
    /// Taken and not yet settled, by tag.
    pub(super) held: HashMap<u64, (QueueId, Seq)>,
    pub(super) next_tag: u64,
    pub(super) notify: Arc<Notify>,
    /// Woken, and has not looked since.
    pub(super) woken: bool,
    /// Gets nothing any more; kept until what it holds is settled.
    pub(super) stopped: bool,
}

impl QueueConsumer {
    pub(super) fn new(pattern: Pattern, prefetch: usize, notify: Arc<Notify>) -> Self {
        Self {
            pattern,
            exclusive: false,
            auto_ack: false,
            credit: prefetch,
            queues: Vec::new(),
            outbox: Vec::new(),
            held: HashMap::new(),
            next_tag: 0,
            notify,
            woken: false,
            stopped: false,
        }
    }
}

/// A message on its way to a consumer.
pub(super) struct Outgoing {
    pub(super) queue: QueueId,
    pub(super) seq: Seq,
    pub(super) received: Received,
}

impl State {
    pub(super) fn new(
        config: EmbeddedConfig,
        topology: Arc<Topology>,
        recorder: Arc<MetricsRecorder>,
    ) -> Self {
        Self {
            config,
            topology,
            recorder,
            queue_names: BTreeMap::new(),
            queues: HashMap::new(),
            consumers: BTreeMap::new(),
            stream_names: BTreeMap::new(),
            streams: BTreeMap::new(),
            groups: BTreeMap::new(),
            readers: BTreeMap::new(),
            bytes: 0,
            next_id: 1,
            no_marks: Arc::new(Marks::default()),
            queue_log: Log::default(),
            stream_log: Log::default(),
            done: Vec::new(),
            moved: Vec::new(),
            wakes: Vec::new(),
            armed: None,
            rearm: false,
        }
    }

    /// A number that was never used before.
    pub(super) fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// The marks as they are kept.
    pub(super) fn shared_marks(&self, marks: Marks) -> Arc<Marks> {
        if marks == *self.no_marks {
            self.no_marks.clone()
        } else {
            Arc::new(marks)
        }
    }

    /// Asks the timer to run at `at` at the latest.
    pub(super) fn arm(&mut self, at: Option<Timestamp>) {
        let Some(at) = at else { return };
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            self.rearm = true;
        }
    }

    /// Everything that time brings. Returns when to come again.
    pub(super) fn tick(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.armed = None;
        self.tick_queues(now);
        self.tick_streams(now);
        let next = self.next_due();
        self.armed = next;
        self.rearm = false;
        next
    }

    /// Whom to wake, and whether the timer is one of them.
    pub(super) fn take_wakes(&mut self) -> (Vec<Arc<Notify>>, bool) {
        (mem::take(&mut self.wakes), mem::take(&mut self.rearm))
    }

    fn next_due(&self) -> Option<Timestamp> {
        let queues = self.queues.values().filter_map(|q| q.core.next_due());
        let streams = self.streams.values().filter_map(|s| s.core.next_due());
        let readers = self.readers.values().filter_map(|r| r.hold_until);
        queues.chain(streams).chain(readers).min()
    }
}
