//! What the parts of one consumer share, and the callbacks that librdkafka
//! makes on its polling thread when partitions come and go.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, Rebalance},
    error::{KafkaError, KafkaResult},
};
use tokio::sync::Notify;

use super::{
    fence::Fence,
    position,
    state::{Settle, State},
    tracker::TopicPartition,
};
use crate::{
    adapter::kafka::link::{Link, log},
    broker::OffsetReset,
};

/// The client of a consumer.
pub(super) type Client = BaseConsumer<Context>;

/// An order to the polling thread, from elsewhere in this process.
#[derive(Debug)]
pub(in crate::adapter::kafka) enum Command {
    /// Go on at these offsets, and commit them.
    Seek(Vec<(TopicPartition, i64)>),
    /// Commit these offsets and read on.
    Commit(Vec<(TopicPartition, i64)>),
}

/// A command with the place for its answer.
pub(super) type Order = (
    Command,
    tokio::sync::oneshot::Sender<KafkaResult<Vec<TopicPartition>>>,
);

/// What the parts of a consumer share.
#[derive(Debug)]
pub(in crate::adapter::kafka) struct Core {
    pub(super) link: Arc<Link>,
    state: Mutex<State>,
    /// Wakes the polling thread: there is room, or something to do.
    room: Condvar,
    /// Wakes the task that hands out.
    pub(super) ready: Notify,
    /// None once nobody carries them out any more.
    orders: Mutex<Option<Vec<Order>>>,
    /// Partitions are paused because the reader is slow.
    pub(super) paused: AtomicBool,
    /// Partitions were assigned (none included): the group has us.
    pub(super) joined: AtomicBool,
    pub(super) fence: Fence,
    /// The broker closes and waits no longer for readers.
    pub(super) abort: AtomicBool,
    pub(super) settle: Settle,
    pub(super) reset: OffsetReset,
    /// Whether members share the partitions (else they are assigned by hand).
    pub(super) member: bool,
}

impl Core {
    pub(super) fn new(
        link: Arc<Link>,
        settle: Settle,
        reset: OffsetReset,
        member: bool,
        session: Duration,
    ) -> Self {
        Self {
            link,
            state: Mutex::default(),
            room: Condvar::new(),
            ready: Notify::new(),
            orders: Mutex::new(Some(Vec::new())),
            paused: AtomicBool::new(false),
            joined: AtomicBool::new(false),
            fence: Fence::new(session),
            abort: AtomicBool::new(false),
            settle,
            reset,
            member,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic under this lock is impossible short of exhausted memory.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the polling thread.
    pub(super) fn wake(&self) {
        self.room.notify_all();
    }

    /// Waits on the polling thread until `done`, woken, or out of time.
    pub(super) fn wait(&self, at_most: Duration, done: impl Fn(&State) -> bool) {
        let guard = self.state();
        let _ = self
            .room
            .wait_timeout_while(guard, at_most, |state| !done(state) && !self.has_orders());
    }

    /// Leaves an order for the polling thread. Where that has left, the order is
    /// dropped, which whoever waits for its answer hears.
    pub(super) fn order(&self, order: Order) {
        if let Some(orders) = &mut *self.orders() {
            orders.push(order);
        }
        self.wake();
    }

    pub(super) fn take_orders(&self) -> Vec<Order> {
        self.orders()
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The polling thread takes no more orders. A thread is not over the moment it has
    /// reported its end: an order that came in between would wait for nobody.
    pub(super) fn refuse_orders(&self) {
        *self.orders() = None;
    }

    /// Whether its polling thread has left the group, though it may not be over yet.
    pub(super) fn has_left(&self) -> bool {
        self.orders().is_none()
    }

    fn has_orders(&self) -> bool {
        let orders = self.orders();
        orders.as_ref().is_some_and(|o| !o.is_empty()) || self.abort.load(Ordering::Acquire)
    }

    fn orders(&self) -> MutexGuard<'_, Option<Vec<Order>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker closes: readers that hold messages are not waited for.
    pub(in crate::adapter::kafka) fn abort(&self) {
        self.abort.store(true, Ordering::Release);
        self.ready.notify_one();
        self.wake();
    }
}

/// rdkafka's way to the callbacks.
pub(super) struct Context(pub(super) Arc<Core>);

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.link.report(&error, reason);
    }
}

impl ConsumerContext for Context {
    fn pre_rebalance(&self, client: &Client, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => {
                let partitions = names(list);
                // Before anything is fetched: a group that has no position yet
                // gets one now, so that what is published from here on is
                // found even after a restart.
                position::commit_start(client, &partitions, self.0.reset);
                self.0.state().assign(partitions);
            }
            Rebalance::Revoke(list) => {
                let done: Vec<_> = {
                    let mut state = self.0.state();
                    names(list)
                        .into_iter()
                        .filter_map(|tp| state.revoke(&tp).map(|next| (tp, next)))
                        .collect()
                };
                self.0.wake();
                // Lost partitions belong to others already; so may the offsets.
                // Without a broker the commit would only wait.
                if !client.assignment_lost() && !done.is_empty() && self.0.link.is_up() {
                    let result = client.commit(&list_of(&done), CommitMode::Sync);
                    if let Err(error) = result {
                        tracing::warn!(target: "messaging_hub::kafka", %error, "the last offsets of revoked partitions were not committed; those messages come again");
                    }
                }
            }
            Rebalance::Error(error) => {
                tracing::warn!(target: "messaging_hub::kafka", %error, "rebalance failed");
            }
        }
    }

    fn post_rebalance(&self, client: &Client, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => {
                if self.0.paused.load(Ordering::Acquire) {
                    let _ = client.pause(list);
                }
                self.0.fence.joined();
                self.0.joined.store(true, Ordering::Release);
            }
            Rebalance::Revoke(_) if client.assignment_lost() => {
                self.0.joined.store(false, Ordering::Release);
            }
            _ => {}
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(target: "messaging_hub::kafka", %error, "offsets were not committed; they are tried again");
        }
    }
}

/// The partitions of a list.
pub(in crate::adapter::kafka) fn names(list: &TopicPartitionList) -> Vec<TopicPartition> {
    list.elements()
        .iter()
        .map(|e| (e.topic().into(), e.partition()))
        .collect()
}

/// A list of partitions with offsets.
pub(in crate::adapter::kafka) fn list_of(offsets: &[(TopicPartition, i64)]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for ((topic, partition), offset) in offsets {
        // Only a negative offset is turned down, and none is.
        let _ = list.add_partition_offset(topic, *partition, Offset::Offset((*offset).max(0)));
    }
    list
}

/// A list of partitions without offsets.
pub(in crate::adapter::kafka) fn bare_list(partitions: &[TopicPartition]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for (topic, partition) in partitions {
        list.add_partition(topic, *partition);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::MetricsRecorder;

    #[tokio::test]
    async fn an_order_that_nobody_carries_out_is_dropped_with_its_answer() {
        let link = Arc::new(Link::new(Arc::new(MetricsRecorder::default())));
        let session = Duration::from_secs(45);
        let core = Core::new(link, Settle::Never, OffsetReset::Latest, true, session);
        let order = || {
            let (tx, answer) = tokio::sync::oneshot::channel();
            core.order((Command::Commit(Vec::new()), tx));
            answer
        };
        let early = order();
        let (_, answer) = core.take_orders().pop().unwrap();
        answer.send(Ok(Vec::new())).unwrap();
        assert!(early.await.is_ok());
        // Between the thread's last look and its end, and behind that.
        let between = order();
        core.refuse_orders();
        let behind = order();
        assert!(between.await.is_err() && behind.await.is_err());
        assert!(core.take_orders().is_empty());
    }
}
