//! Tasks that may take longer than RabbitMQ waits for an ack (30 minutes, its
//! `consumer_timeout`): each is handed over to the embedded broker, on the disk,
//! acked at RabbitMQ, and handled from there, for as long as it takes.
//!
//! ```text
//!   RabbitMQ queue --> this task --confirmed, synced--> embedded queue, same name
//!         <--- then the ack ---                               |
//!                            reader <---- this task <---------'
//! ```
//!
//! No more is handed over than the subscription's prefetch, so other hubs share
//! the work as before. What was handed over belongs to this hub: killed, it goes on
//! with it at the next start, when somebody subscribes again; no other hub can. That
//! subscription need not be long-running any more: then it is given what was left
//! over beside what RabbitMQ has, and nothing more is handed over.
//! Failed tasks rest in the embedded queue, and their dead letters are the hub's
//! own. It refuses to work without a data folder: then an ack would lose the task
//! with the process.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    MessagingHub,
    handover::hand_over,
    lock,
    relay::{Relay, pass},
    route::Route,
};
use crate::{
    broker::{
        BrokerType, Confirmation, Consumer, ConsumerControl, Delivery, Fate, Lane, LaneOptions,
        MessageBroker, OrderKey, Settlement, Source, Submission, SubscribeOptions, Verdict,
        consumer::{ConsumerState, report},
    },
    error::{Error, ErrorCode, Result},
    message::DeliveryMode,
    topic::Topic,
};

/// How long is waited after the embedded broker would not take a task.
const PAUSE: Duration = Duration::from_millis(250);

/// How often it is looked whether what was counted here is still here, while that
/// leaves no room: tasks also expire, and other readers of the queue take some.
const LOOK: Duration = Duration::from_secs(1);

/// Verdicts taken up in one turn.
const TURN: usize = 256;

impl MessagingHub {
    /// Whether tasks of a subscription are handed over: where they, or their
    /// route, are long-running, and the broker would not wait.
    pub(super) fn hands_over(&self, route: &Route, options: &SubscribeOptions) -> bool {
        route.primary == BrokerType::RabbitMq && (options.long_running || route.long_running)
    }

    /// The queue, and the embedded broker, in which tasks are left that were handed
    /// over by a subscription that was long-running, while this one is not.
    pub(super) async fn left_over(&self, route: &Route, source: &Source) -> Option<LeftOver> {
        let (Source::Queue(pattern), BrokerType::RabbitMq) = (source, route.primary) else {
            return None;
        };
        let queue = pattern.literal()?;
        // The hub's own letters are not the queue's.
        if self.store().is_none() || self.0.topology.keeps_dead_letters(&queue) {
            return None;
        }
        let embedded = lock(&self.0.brokers).fallback.clone()?;
        let stats = embedded.task_queue()?.queue_stats(&queue).await;
        // Those that rest too.
        let left = stats.is_ok_and(|s| s.messages > 0);
        left.then_some((queue, embedded))
    }

    /// A consumer of a queue of which some tasks were handed over before.
    ///
    /// # Errors
    /// As the brokers' own `consume`.
    pub(super) async fn consume_left_over(
        &self,
        (queue, embedded): LeftOver,
        broker: &dyn MessageBroker,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        tracing::info!(%queue, "tasks of a subscription that was long-running are left over; they are handed out too");
        let here = SubscribeOptions {
            prefetch: options.prefetch,
            buffer_size: options.buffer_size,
            auto_ack: options.auto_ack,
            ..SubscribeOptions::default()
        };
        let kept = embedded.consume(source, &here).await?;
        let feed = broker.consume(source, options).await?;
        Ok(self.spanning(queue, embedded, (feed, kept), options, Way::PassOn))
    }

    /// A consumer of a queue whose tasks are handed over.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for a stream, a pattern, `auto_ack`, or without a data
    /// folder; as the brokers' own `consume`.
    pub(super) async fn consume_long(
        &self,
        broker: &dyn MessageBroker,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        let refuse = |why: &str| {
            Err(
                Error::rejected(ErrorCode::InvalidConfig, format!("long_running: {why}"))
                    .on(source.pattern().as_str()),
            )
        };
        let Source::Queue(pattern) = source else {
            return refuse("is for tasks; an event's reader may take as long as it likes");
        };
        let Some(queue) = pattern.literal() else {
            return refuse("subscribe to each queue by its name; this pattern may cover several");
        };
        if options.auto_ack {
            return refuse(
                "auto_ack acks before the handler runs, so nothing waits; leave one of the two out",
            );
        }
        if self.store().is_none() {
            return refuse(
                "a task is acked at RabbitMQ once it is on this hub's disk, so it needs a data folder and the fallback; set data_dir",
            );
        }
        let Some(embedded) = lock(&self.0.brokers).fallback.clone() else {
            return refuse("needs the embedded broker; turn the fallback on");
        };
        let feed = SubscribeOptions {
            handler_timeout: None,
            long_running: false,
            ..options.clone()
        };
        let here = SubscribeOptions {
            prefetch: options.prefetch,
            buffer_size: options.buffer_size,
            ..SubscribeOptions::default()
        };
        embedded.ensure(source).await?;
        // What was handed over before and waits comes first, and counts.
        let waiting = match embedded.task_queue() {
            Some(queues) => queues.queue_stats(&queue).await?.messages_ready,
            None => 0,
        };
        let kept = embedded.consume(source, &here).await?;
        let feed = broker.consume(source, &feed).await?;
        let way = Way::HandOver {
            most: usize::from(options.prefetch).max(1),
            here: usize::try_from(waiting).unwrap_or(usize::MAX),
        };
        Ok(self.spanning(queue, embedded, (feed, kept), options, way))
    }

    fn spanning(
        &self,
        queue: Topic,
        embedded: Arc<dyn MessageBroker>,
        (feed, kept): (Consumer, Consumer),
        options: &SubscribeOptions,
        way: Way,
    ) -> Consumer {
        let (control, stopping, report) = ConsumerControl::new();
        let (out, deliveries) = mpsc::channel(options.buffer_size.max(1));
        let (relay, verdicts) = Relay::new();
        let retry = kept.retry;
        let task = LongRunning {
            hub: self.clone(),
            queue,
            embedded,
            feed: Some(feed),
            kept,
            way,
            lane: None,
            moving: HashMap::new(),
            next: 0,
            relay,
            out: Some(out),
            report,
        };
        let stop = stopping.clone();
        self.0.tasks.spawn(task.run(verdicts, stop));
        Consumer {
            deliveries,
            control,
            retry,
        }
    }
}

/// A queue at RabbitMQ, and where some of its tasks are.
type LeftOver = (Topic, Arc<dyn MessageBroker>);

/// What becomes of RabbitMQ's deliveries.
enum Way {
    /// They are handed over.
    HandOver {
        /// Tasks of this subscription here at most, but for those that rest.
        most: usize,
        here: usize,
    },
    /// They go to the reader as they are.
    PassOn,
}

impl Way {
    fn has_room(&self) -> bool {
        match self {
            Self::HandOver { most, here } => here < most,
            Self::PassOn => true,
        }
    }

    /// So many tasks are here no more.
    fn went(&mut self, tasks: usize) {
        if let Self::HandOver { here, .. } = self {
            *here = here.saturating_sub(tasks);
        }
    }

    fn came(&mut self) {
        if let Self::HandOver { here, .. } = self {
            *here += 1;
        }
    }
}

struct LongRunning {
    hub: MessagingHub,
    queue: Topic,
    embedded: Arc<dyn MessageBroker>,
    /// None once nothing more is taken from RabbitMQ.
    feed: Option<Consumer>,
    kept: Consumer,
    way: Way,
    lane: Option<Lane>,
    /// On their way into the embedded queue.
    moving: HashMap<u64, Delivery>,
    next: u64,
    relay: Relay<()>,
    out: Option<mpsc::Sender<Vec<Delivery>>>,
    report: watch::Sender<ConsumerState>,
}

impl LongRunning {
    async fn run(
        mut self,
        mut verdicts: mpsc::UnboundedReceiver<Settlement>,
        stopping: tokio_util::sync::CancellationToken,
    ) {
        let closing = self.hub.0.closing.clone();
        let mut pending: Vec<Delivery> = Vec::new();
        let mut settled: Vec<Settlement> = Vec::with_capacity(TURN);
        let mut kept_open = true;
        let mut state = self.feed.as_ref().map(|f| f.control.watch());
        let mut failure = None;
        let mut look = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Some(state) = &mut state
                && self.out.is_some()
            {
                report(&self.report, &state.borrow_and_update());
            }
            let room = self.way.has_room();
            let (want, done) = (pending.is_empty(), self.out.is_none());
            let take = match self.way {
                Way::HandOver { .. } => room,
                Way::PassOn => want,
            };
            tokio::select! {
                biased;
                _ = verdicts.recv_many(&mut settled, TURN) => {
                    for one in settled.drain(..) {
                        self.settle(one);
                    }
                }
                () = closing.cancelled(), if !stopping.is_cancelled() => stopping.cancel(),
                () = stopping.cancelled(), if self.out.is_some() => {
                    self.out = None;
                    pending.clear();
                    self.kept.control.begin_stop();
                    if let Some(feed) = &self.feed {
                        feed.control.begin_stop();
                    }
                }
                sent = hand_over(&self.out, &mut pending), if !pending.is_empty() => {
                    if !sent {
                        stopping.cancel();
                    }
                }
                answer = confirmed(&mut self.lane), if !self.moving.is_empty() => self.moved(answer).await,
                batch = self.kept.deliveries.recv(), if kept_open && (want || done) => {
                    match batch {
                        Some(late) if self.out.is_none() => drop(late),
                        Some(batch) => pending = self.wrap(batch),
                        None => {
                            kept_open = false;
                            stopping.cancel();
                        }
                    }
                }
                batch = next_of(&mut self.feed), if take || done => match batch {
                    Some(late) if self.out.is_none() => drop(late),
                    Some(batch) if matches!(self.way, Way::PassOn) => pending = self.wrap(batch),
                    Some(batch) => self.move_in(batch).await,
                    None => {
                        if let Some(feed) = self.feed.take() {
                            feed.control.stop().await;
                            failure = feed.control.failure();
                        }
                        state = None;
                        stopping.cancel();
                    }
                },
                () = changed(&mut state) => {}
                _ = look.tick(), if !room && want && !done => self.look().await,
            }
            let idle = self.moving.is_empty() && self.relay.is_empty();
            if self.out.is_none() && idle && !kept_open && self.feed.is_none() {
                break;
            }
        }
        self.kept.control.stop().await;
        let last = match failure.or_else(|| self.kept.control.failure()) {
            Some(why) => ConsumerState::Failed(why),
            None => ConsumerState::Stopped,
        };
        let _ = self.report.send(last);
    }

    fn wrap(&mut self, batch: Vec<Delivery>) -> Vec<Delivery> {
        let wrap = |d: Delivery| {
            let (received, upstream) = d.into_parts();
            self.relay.wrap(received, upstream, ())
        };
        batch.into_iter().map(wrap).collect()
    }

    /// No more is here than the queue has in all, other readers' tasks included.
    async fn look(&mut self) {
        let Some(queues) = self.embedded.task_queue() else {
            return;
        };
        let Ok(stats) = queues.queue_stats(&self.queue).await else {
            return;
        };
        let Some(unacked) = stats.messages_unacked else {
            return;
        };
        let all = usize::try_from(stats.messages_ready + unacked).unwrap_or(usize::MAX);
        if let Way::HandOver { here, .. } = &mut self.way {
            *here = all.saturating_add(self.moving.len()).min(*here);
        }
    }

    fn settle(&mut self, settlement: Settlement) {
        let Settlement { tag, verdict, done } = settlement;
        let Some((upstream, ())) = self.relay.take(tag) else {
            return;
        };
        if !matches!(verdict, Verdict::Requeue) {
            // What came back after a rest was counted out before.
            self.way.went(1);
        }
        pass(&upstream, verdict, done);
    }

    /// Writes tasks into the embedded queue. More than there is room for may come
    /// in a batch; prefetch bounds that.
    async fn move_in(&mut self, batch: Vec<Delivery>) {
        let mut submissions = Vec::with_capacity(batch.len());
        for delivery in batch {
            self.next += 1;
            let mut message = delivery.received().message.clone();
            if !message.is_persistent() {
                // Acked at RabbitMQ it is nowhere but here, so it waits for the disk.
                Arc::make_mut(&mut message).delivery_mode = DeliveryMode::Persistent;
            }
            submissions.push(Submission {
                token: self.next,
                message,
                order: OrderKey::Publisher(0),
                marks: (*delivery.received().marks).clone(),
                confirm: true,
            });
            self.way.came();
            self.moving.insert(self.next, delivery);
        }
        if self.lane.is_none() {
            // As many as RabbitMQ's prefetch may let in: with less room for answers, the
            // lane would wait for this task to take one while this task waits for the
            // lane to take a batch.
            let options = LaneOptions {
                window: usize::from(u16::MAX),
                ..LaneOptions::default()
            };
            match self.embedded.open_lane(&self.queue, 0, &options).await {
                Ok(lane) => self.lane = Some(lane),
                Err(error) => {
                    self.give_back(&error).await;
                    return;
                }
            }
        }
        if let Some(lane) = &self.lane
            && lane.submissions.send(submissions).await.is_err()
        {
            // Its last answers say what was written.
            tracing::debug!(queue = %self.queue, "the embedded broker's lane has ended");
        }
    }

    /// Takes the answer to a task that was written.
    async fn moved(&mut self, answer: Option<Confirmation>) {
        let Some(Confirmation { token, fate }) = answer else {
            self.lane = None;
            let gone = Error::new(ErrorCode::PublishFailed, "the lane has ended");
            self.give_back(&gone).await;
            return;
        };
        let Some(delivery) = self.moving.remove(&token) else {
            return;
        };
        match fate {
            // It is on the disk. Should the ack get lost, the copy that RabbitMQ
            // delivers again is known by its id.
            Fate::Confirmed(_) => {
                delivery.settle_now(Verdict::Ack);
            }
            Fate::Refused(error)
            | Fate::Overloaded(error)
            | Fate::Unknown(error)
            | Fate::Unsent(error) => {
                self.way.went(1);
                tracing::warn!(
                    queue = %self.queue, id = %delivery.message.id, %error,
                    "a long-running task could not be handed over; it goes back to RabbitMQ"
                );
                tokio::time::sleep(PAUSE).await;
                drop(delivery);
            }
        }
    }

    /// What is on its way goes back to RabbitMQ.
    async fn give_back(&mut self, error: &Error) {
        tracing::warn!(
            queue = %self.queue, %error, tasks = self.moving.len(),
            "long-running tasks could not be handed over; they go back to RabbitMQ"
        );
        self.way.went(self.moving.len());
        tokio::time::sleep(PAUSE).await;
        self.moving.clear();
    }
}

async fn confirmed(lane: &mut Option<Lane>) -> Option<Confirmation> {
    match lane {
        Some(lane) => lane.confirmations.recv().await,
        None => None,
    }
}

async fn next_of(feed: &mut Option<Consumer>) -> Option<Vec<Delivery>> {
    match feed {
        Some(feed) => feed.deliveries.recv().await,
        None => std::future::pending().await,
    }
}

async fn changed(state: &mut Option<watch::Receiver<ConsumerState>>) {
    let gone = match state {
        Some(state) => state.changed().await.is_err(),
        None => true,
    };
    if gone {
        std::future::pending::<()>().await;
    }
}
