//! The task behind each consumer: hands over batches as the reader takes them
//! and carries out verdicts.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    arguments::options_from, queue::ConsumerId, reader::Reader, shared::Shared,
    state::QueueConsumer,
};
use crate::{
    broker::{
        Consumer, ConsumerControl, Delivery, Received, RetryMode, Settlement, SubscribeOptions,
        Verdict, consumer::ConsumerState, options::Filter,
    },
    error::{Error, ErrorCode, Result},
    topic::Pattern,
};

/// Starts a consumer of queues.
///
/// # Errors
/// `QUEUE_NOT_FOUND`, `SUBSCRIBE_FAILED`, `INVALID_CONFIG`.
pub(super) fn consume_queues(
    shared: &Arc<Shared>,
    pattern: &Pattern,
    options: &SubscribeOptions,
) -> Result<Consumer> {
    let arguments = options_from(&options.queue_arguments)?;
    let notify = Arc::new(Notify::new());
    let prefetch = prefetch(options);
    let pattern = canonical(shared, pattern)?;
    let id = shared.step(|state, now| {
        if let Some(topic) = pattern.literal()
            && state.queue_id(&topic).is_none()
        {
            if !state.config.auto_declare {
                state.known_queue(&topic)?;
            }
            let options = state
                .topology
                .queue(&topic)
                .map_or(arguments, |q| q.options.clone());
            state.declare_queue(now, &topic, &options)?;
        }
        let consumer = QueueConsumer {
            exclusive: options.exclusive,
            auto_ack: options.auto_ack,
            ..QueueConsumer::new(pattern, prefetch, notify.clone())
        };
        state.add_queue_consumer(now, consumer)
    })?;
    Ok(start(
        shared,
        Port::Queue(id),
        notify,
        options,
        options.buffer_size,
        RetryMode::Broker,
    ))
}

/// Starts a reader of streams.
///
/// # Errors
/// `TOPIC_NOT_FOUND`, `SUBSCRIBE_FAILED`, `INVALID_CONFIG`.
pub(super) fn consume_streams(
    shared: &Arc<Shared>,
    pattern: &Pattern,
    options: &SubscribeOptions,
) -> Result<Consumer> {
    let wrong = |why: &str| Err(Error::rejected(ErrorCode::InvalidConfig, why));
    if options.exclusive {
        return wrong("a stream cannot be read exclusively; use a group with one member");
    }
    if !options.queue_arguments.is_empty() {
        return wrong("queue_arguments have no meaning for a stream");
    }
    if options.max_poll_records == 0 || options.stream.buffer_size == 0 {
        return wrong("max_poll_records and stream.buffer_size must be at least 1");
    }
    if options.stream.until.is_some() {
        if options.group_id.is_some() {
            return wrong("stream.until is for a reader without a group; leave one of the two out");
        }
        if pattern.literal().is_none() {
            return wrong("stream.until needs one topic, not a pattern: offsets are a topic's own");
        }
    }
    let capacity = options.buffer_size.clamp(1, STREAM_BATCHES);
    let notify = Arc::new(Notify::new());
    let reader = Reader::new(pattern.clone(), options, capacity, notify.clone());
    let id = shared.step(|state, _| {
        if let Some(topic) = pattern.literal() {
            if state.config.auto_declare {
                state.ensure_stream(&topic)?;
            } else {
                state.known_stream(&topic)?;
            }
        }
        state.add_reader(reader)
    })?;
    Ok(start(
        shared,
        Port::Stream(id),
        notify,
        options,
        capacity,
        RetryMode::InLane,
    ))
}

/// Which part of the state a consumer's task speaks to.
#[derive(Clone, Copy)]
pub(super) enum Port {
    Queue(ConsumerId),
    Stream(ConsumerId),
}

impl Port {
    /// The next batch.
    fn take(self, shared: &Shared) -> Vec<(u64, Received)> {
        match self {
            Self::Queue(id) => shared.step(|state, now| state.take_outbox(now, id)),
            Self::Stream(id) => shared.step(|state, now| state.fetch(now, id)),
        }
    }

    fn settle(self, shared: &Shared, verdicts: Vec<(u64, Verdict)>) -> Vec<Result<()>> {
        match self {
            Self::Queue(id) => shared.step(|state, now| state.settle_queue(now, id, verdicts)),
            Self::Stream(id) => shared.step(|state, now| state.settle_stream(now, id, verdicts)),
        }
    }

    /// Stops handing out; what the reader holds can still be settled.
    fn detach(self, shared: &Shared) {
        match self {
            Self::Queue(id) => {
                shared.step(|state, now| state.detach_consumer(now, id));
            }
            Self::Stream(id) => shared.step(|state, _| state.detach_reader(id)),
        }
    }

    /// Whether it has come to the end that it was given.
    fn is_read(self, shared: &Shared) -> bool {
        match self {
            Self::Queue(_) => false,
            Self::Stream(id) => shared.step(|state, _| state.is_read(id)),
        }
    }

    fn held(self, shared: &Shared) -> usize {
        match self {
            Self::Queue(id) => shared.step(|state, _| state.held_by(id)),
            Self::Stream(id) => shared.step(|state, _| state.read_by(id)),
        }
    }

    fn remove(self, shared: &Shared) {
        match self {
            Self::Queue(id) => shared.step(|state, now| state.remove_consumer(now, id)),
            Self::Stream(id) => shared.step(|state, _| state.remove_reader(id)),
        }
    }
}

/// Starts the task of a registered consumer.
pub(super) fn start(
    shared: &Arc<Shared>,
    port: Port,
    notify: Arc<Notify>,
    options: &SubscribeOptions,
    capacity: usize,
    retry: RetryMode,
) -> Consumer {
    let (deliveries, receiver) = mpsc::channel(capacity.max(1));
    let (control, stopping, report) = ConsumerControl::new();
    let task = Task {
        shared: shared.clone(),
        port,
        notify,
        deliveries,
        stopping,
        report,
        filter: options.filter.clone(),
        ends: options.stream.until.is_some(),
        needs_settling: !options.auto_ack
            && (retry == RetryMode::Broker || options.group_id.is_some()),
    };
    shared.recorder.active_subscriptions.inc();
    shared.tasks.spawn(task.run());
    Consumer {
        deliveries: receiver,
        control,
        retry,
    }
}

struct Task {
    shared: Arc<Shared>,
    port: Port,
    notify: Arc<Notify>,
    deliveries: mpsc::Sender<Vec<Delivery>>,
    stopping: CancellationToken,
    report: watch::Sender<ConsumerState>,
    filter: Option<Filter>,
    /// It was given an end.
    ends: bool,
    needs_settling: bool,
}

impl Task {
    async fn run(self) {
        let (settle, mut settlements) = mpsc::unbounded_channel();
        let mut buffer = Vec::with_capacity(SETTLE_BATCH);
        // Something may have been assigned before this task ran.
        let mut may_have_more = true;
        self.report.send_replace(ConsumerState::Active);
        loop {
            tokio::select! {
                biased;
                () = self.shared.closed.cancelled() => break,
                () = self.stopping.cancelled() => break,
                () = self.deliveries.closed() => break,
                n = settlements.recv_many(&mut buffer, SETTLE_BATCH) => {
                    if n > 0 {
                        self.settle(&mut buffer);
                    }
                }
                () = self.notify.notified(), if !may_have_more => may_have_more = true,
                permit = self.deliveries.reserve(), if may_have_more => {
                    let Ok(permit) = permit else { break };
                    let taken = self.port.take(&self.shared);
                    if taken.is_empty() {
                        may_have_more = false;
                    } else {
                        let batch = self.deliver(taken, &settle);
                        if !batch.is_empty() {
                            permit.send(batch);
                        }
                    }
                    // Also after nothing was there: what was dropped is passed.
                    if self.ends && self.port.is_read(&self.shared) {
                        break;
                    }
                }
            }
        }
        self.port.detach(&self.shared);
        let Self {
            shared,
            port,
            deliveries,
            report,
            ..
        } = self;
        // The reader gets what is buffered, then the end.
        drop(deliveries);
        drop(settle);
        while !shared.closed.is_cancelled() && port.held(&shared) > 0 {
            tokio::select! {
                biased;
                () = shared.closed.cancelled() => break,
                n = settlements.recv_many(&mut buffer, SETTLE_BATCH) => {
                    if n == 0 {
                        break;
                    }
                    settle_all(&shared, port, &mut buffer);
                }
            }
        }
        port.remove(&shared);
        shared.recorder.active_subscriptions.dec();
        report.send_replace(ConsumerState::Stopped);
    }

    fn settle(&self, buffer: &mut Vec<Settlement>) {
        settle_all(&self.shared, self.port, buffer);
    }

    fn deliver(
        &self,
        taken: Vec<(u64, Received)>,
        settle: &mpsc::UnboundedSender<Settlement>,
    ) -> Vec<Delivery> {
        let recorder = &self.shared.recorder;
        recorder.messages_received.add(taken.len() as u64);
        recorder
            .bytes_received
            .add(taken.iter().map(|(_, r)| r.payload.len() as u64).sum());
        recorder.touch_receive();
        let mut skipped = Vec::new();
        let batch: Vec<Delivery> = taken
            .into_iter()
            .filter_map(|(tag, received)| {
                if !passes(self.filter.as_ref(), &received) {
                    skipped.push((tag, Verdict::Ack));
                    return None;
                }
                Some(if self.needs_settling {
                    Delivery::new(received, settle.clone(), tag)
                } else {
                    Delivery::unsettled(received)
                })
            })
            .collect();
        if self.needs_settling && !skipped.is_empty() {
            self.port.settle(&self.shared, skipped);
        }
        recorder.messages_consumed.add(batch.len() as u64);
        batch
    }
}

/// Carries out verdicts under one lock and answers those who wait.
pub(super) fn settle_all(shared: &Shared, port: Port, buffer: &mut Vec<Settlement>) {
    let mut waiting = Vec::with_capacity(buffer.len());
    let verdicts = buffer
        .drain(..)
        .map(|s| {
            waiting.push(s.done);
            (s.tag, s.verdict)
        })
        .collect();
    for (done, answer) in waiting.into_iter().zip(port.settle(shared, verdicts)) {
        if let Some(done) = done {
            // Who dropped the future does not want the answer.
            let _ = done.send(answer);
        }
    }
}

/// Whether the reader wants it. A predicate that panics cannot be asked, and
/// the reader decides by itself.
fn passes(filter: Option<&Filter>, received: &Received) -> bool {
    filter.is_none_or(|f| catch_unwind(AssertUnwindSafe(|| f.passes(received))).unwrap_or(true))
}

/// Unsettled deliveries at most; 0 means as many as a prefetch can say.
fn prefetch(options: &SubscribeOptions) -> usize {
    match options.prefetch {
        0 => usize::from(u16::MAX),
        n => usize::from(n),
    }
}

/// The pattern with an alias resolved.
fn canonical(shared: &Shared, pattern: &Pattern) -> Result<Pattern> {
    let name = shared.topology.canonical(pattern.as_str());
    Pattern::new(name).map_err(|e| {
        Error::rejected(ErrorCode::InvalidConfig, "the queue's name is no topic").caused_by(e)
    })
}

/// Batches of a stream that wait for the reader at most: few, so that each may
/// be large and all together keep to `stream.buffer_size` messages.
const STREAM_BATCHES: usize = 4;

/// Verdicts carried out under one lock at most.
const SETTLE_BATCH: usize = 1024;
