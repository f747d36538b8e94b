//! Publishing: a topic is resolved once, a message is checked, its lane found,
//! and whoever published gets the outcome.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
};

use tokio::sync::{
    OnceCell,
    mpsc::{self, error::TrySendError},
    oneshot,
};

use super::{
    MessagingHub,
    accepted::{Offer, Seen},
    found::Found,
    lane::{
        machine::Settings,
        task::{self, Item, LaneHandle, Waiter},
    },
    local_of, lock,
    publisher::{Pending, Publisher, State},
    resting,
    route::{Route, RouteKind},
    spool::{ENTRY_OVERHEAD, Entry, LaneLeft, codec::LaneName},
};
use crate::{
    broker::{
        BrokerType, Compression, LaneOptions, MessageBroker, OrderKey, PublishOptions, Receipt,
        Source, TopicKind,
    },
    error::{Error, ErrorCode, Result},
    message::{Event, Message, Task, Timestamp, wire::Marks},
    topic::{Pattern, Topic},
};

/// A topic, resolved.
pub(super) struct TopicEntry {
    pub(super) topic: Topic,
    pub(super) route: Route,
    pub(super) broker: Arc<dyn MessageBroker>,
    /// How many lanes keep its order apart; asked once.
    lanes: OnceCell<u32>,
    /// Kafka keeps the last message of each key, so each must have one.
    pub(super) keyed_only: bool,
    /// Which brokers were plugged in when it was resolved.
    pub(super) epoch: u64,
}

/// Lanes of a hub at most; each is a task and a channel at the broker.
const MAX_LANES: usize = 65_536;

/// Topics that stay resolved. More are resolved again at each use.
const MAX_TOPICS: usize = 100_000;

/// Publishes of the hub itself, without a handle, are one publisher.
const HUB_PUBLISHER: u64 = 0;

impl MessagingHub {
    /// Publishes a message and waits for its outcome.
    ///
    /// # Errors
    /// Says whether the message was not sent, rejected, or is unknown. With a
    /// working spool it is never unknown.
    ///
    /// # Cancel safety
    /// Dropped while it waits for room, nothing was published; afterwards only
    /// the answer is abandoned.
    pub async fn publish(&self, topic: &str, message: Message) -> Result<Receipt> {
        self.publish_with(topic, message, &PublishOptions::default())
            .await
    }

    /// Publishes a message with options.
    ///
    /// # Errors
    /// As [`MessagingHub::publish`].
    pub async fn publish_with(
        &self,
        topic: &str,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        let topic = self.canonical(topic)?;
        self.enqueue(&topic, HUB_PUBLISHER, message, options, None)
            .await?
            .await
    }

    /// Publishes the copy of a dead letter, or of what failed and rests. It passes
    /// the window of accepted ids, which knows its id from before.
    pub(super) async fn publish_again(
        &self,
        topic: &Topic,
        message: Message,
        marks: Marks,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        self.enqueue_marked(topic, HUB_PUBLISHER, message, options, None, marks)
            .await?
            .await
    }

    /// Publishes messages, one outcome for each, in order.
    pub async fn publish_batch(&self, topic: &str, messages: Vec<Message>) -> Vec<Result<Receipt>> {
        match self.publisher_numbered(topic, HUB_PUBLISHER) {
            Ok(publisher) => publisher.publish_batch(messages).await,
            Err(error) => messages.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    /// Publishes a task.
    ///
    /// # Errors
    /// As [`MessagingHub::publish`]; `INVALID_CONFIG` when the topic is routed
    /// as events.
    pub async fn publish_task(&self, topic: &str, task: Task) -> Result<Receipt> {
        self.expect_kind(topic, RouteKind::Task)?;
        self.publish(topic, task.into()).await
    }

    /// Publishes tasks, one outcome for each.
    pub async fn publish_task_batch(&self, topic: &str, tasks: Vec<Task>) -> Vec<Result<Receipt>> {
        if let Err(error) = self.expect_kind(topic, RouteKind::Task) {
            return tasks.iter().map(|_| Err(error.clone())).collect();
        }
        let messages = tasks.into_iter().map(Message::from).collect();
        self.publish_batch(topic, messages).await
    }

    /// Publishes an event.
    ///
    /// # Errors
    /// As [`MessagingHub::publish`]; `INVALID_CONFIG` when the topic is routed
    /// as tasks.
    pub async fn publish_event(&self, topic: &str, event: Event) -> Result<Receipt> {
        self.expect_kind(topic, RouteKind::Event)?;
        self.publish(topic, event.into()).await
    }

    /// Publishes events, one outcome for each.
    pub async fn publish_event_batch(
        &self,
        topic: &str,
        events: Vec<Event>,
    ) -> Vec<Result<Receipt>> {
        if let Err(error) = self.expect_kind(topic, RouteKind::Event) {
            return events.iter().map(|_| Err(error.clone())).collect();
        }
        let messages = events.into_iter().map(Message::from).collect();
        self.publish_batch(topic, messages).await
    }

    /// A new publisher: its keyless messages keep their order.
    ///
    /// # Errors
    /// A bad topic name, or no route.
    pub fn publisher(&self, topic: &str) -> Result<Publisher> {
        self.publisher_numbered(topic, self.number() << 1)
    }

    /// The publisher of a name: the same name is the same publisher, wherever
    /// in this process it is asked for.
    ///
    /// # Errors
    /// As [`MessagingHub::publisher`].
    pub fn named_publisher(&self, topic: &str, name: &str) -> Result<Publisher> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        // Odd numbers are names, even ones are counted.
        self.publisher_numbered(topic, hasher.finish() | 1)
    }

    fn publisher_numbered(&self, topic: &str, number: u64) -> Result<Publisher> {
        let topic = self.canonical(topic)?;
        self.entry(&topic)?;
        Ok(Publisher {
            hub: self.clone(),
            topic,
            number,
            options: Arc::default(),
            found: Arc::default(),
        })
    }

    fn expect_kind(&self, topic: &str, kind: RouteKind) -> Result<()> {
        if self.kind_of(topic) == kind {
            return Ok(());
        }
        let (is, wants) = match kind {
            RouteKind::Task => ("events", "tasks"),
            RouteKind::Event => ("tasks", "events"),
        };
        Err(Error::rejected(
            ErrorCode::InvalidConfig,
            format!("topic {topic} is routed as {is}; publish it as such, or add a route of kind {wants}"),
        )
        .on(topic))
    }

    /// Accepts a message: checks it, finds its lane and waits for room there.
    pub(super) fn enqueue<'a>(
        &'a self,
        topic: &'a Topic,
        publisher: u64,
        message: Message,
        options: &'a PublishOptions,
        found: Option<&'a Found>,
    ) -> impl Future<Output = Result<Pending>> + Send + use<'a> {
        // Not `async`, which would move the message once more.
        self.enqueue_marked(topic, publisher, message, options, found, Marks::default())
    }

    /// Accepts a message with marks of the hub's own.
    pub(super) async fn enqueue_marked(
        &self,
        topic: &Topic,
        publisher: u64,
        mut message: Message,
        options: &PublishOptions,
        found: Option<&Found>,
        marks: Marks,
    ) -> Result<Pending> {
        let since = tokio::time::Instant::now().into_std();
        self.check_open()?;
        let entry = self.entry_found(topic, found)?;
        let (due, compression) = self.check(&entry, &mut message, options, &marks).await?;
        let seen = if message.id.is_generated() || marks.are_of_a_copy() {
            None
        } else {
            match self.0.accepted.offer(topic, &message.id)? {
                Offer::Fresh(seen) => seen,
                Offer::Joined(rx) => return Ok(Pending(State::Waiting(rx))),
                Offer::Done(receipt) => return Ok(Pending(State::Known(Some(Ok(receipt))))),
            }
        };
        let order = match &message.key {
            Some(key) => OrderKey::Key(key.clone()),
            None => OrderKey::Publisher(publisher),
        };
        if let Some(due) = due {
            return self
                .keep_for_later(
                    &entry,
                    message,
                    order,
                    due,
                    (options, compression.broker),
                    marks,
                    seen,
                )
                .await;
        }
        let lanes = self.lane_count(&entry).await;
        let lane = entry
            .broker
            .lane_of(topic, &order, message.partition, lanes);
        let (answer, rx) = oneshot::channel();
        self.count_published(&message);
        let mut item = Item {
            order,
            confirm: options.confirm && entry.broker.confirms(),
            deadline: since + options.timeout,
            marks,
            waiter: Waiter {
                id: message.id.clone(),
                since,
                answer,
                seen,
            },
            message: Arc::new(message),
        };
        // A publisher in a loop still lets others run.
        tokio::task::coop::consume_budget().await;
        // Mostly the lane is known and has room.
        if let Some(handle) = found.and_then(|f| f.lane(&entry, lane)) {
            item.waiter.hand_over(true);
            item = match handle.intake.try_send(item) {
                Ok(()) => return Ok(Pending(State::Waiting(rx))),
                Err(TrySendError::Full(item) | TrySendError::Closed(item)) => item,
            };
            item.waiter.hand_over(false);
        }
        let until = tokio::time::Instant::from_std(since) + options.timeout;
        let name = lane_name(topic, lane, options, compression.broker);
        let room = self.room(entry.clone(), &name);
        let Ok(room) = tokio::time::timeout_at(until, room).await else {
            return Err(Error::new(
                ErrorCode::Timeout,
                "no room to publish within the timeout; the broker is slower than the publishers",
            )
            .on(topic.as_str()));
        };
        let (handle, permit) = room?;
        item.waiter.hand_over(true);
        permit.send(item);
        if let Some(found) = found {
            found.keep_lane(&entry, lane, &handle);
        }
        Ok(Pending(State::Waiting(rx)))
    }

    /// Hands a message that is not due to the scheduler.
    #[allow(clippy::too_many_arguments, reason = "all that its publish needs")]
    async fn keep_for_later(
        &self,
        entry: &TopicEntry,
        message: Message,
        order: OrderKey,
        due: Timestamp,
        (options, compression): (&PublishOptions, Option<Compression>),
        marks: Marks,
        seen: Option<Seen>,
    ) -> Result<Pending> {
        self.count_published(&message);
        let held = Entry {
            size: message.size() + ENTRY_OVERHEAD,
            message: Arc::new(message),
            order,
            marks,
            confirm: options.confirm && entry.broker.confirms(),
            since: Timestamp::now(),
            due: Some(due),
        };
        // Which lane is asked when the time has come.
        let name = lane_name(&entry.topic, 0, options, compression);
        self.schedule(entry, name, held, due, options.timeout, seen)
            .await
    }

    /// Publishes a message that was accepted before: nothing is checked again, and
    /// it passes the window of accepted ids.
    pub(super) async fn enqueue_kept(
        &self,
        resolved: Arc<TopicEntry>,
        name: &LaneName,
        kept: Entry,
    ) -> Result<Pending> {
        let since = tokio::time::Instant::now().into_std();
        let (answer, rx) = oneshot::channel();
        let (_, permit) = self.room(resolved, name).await?;
        permit.send(Item {
            order: kept.order,
            confirm: kept.confirm,
            deadline: since + PublishOptions::default().timeout,
            marks: kept.marks,
            waiter: Waiter {
                id: kept.message.id.clone(),
                since,
                answer,
                seen: None,
            },
            message: kept.message,
        });
        Ok(Pending(State::Waiting(rx)))
    }

    pub(super) fn count_published(&self, message: &Message) {
        self.0.recorder.messages_published.inc();
        self.0
            .recorder
            .bytes_published
            .add(message.payload.len() as u64);
    }

    /// Waits for room in front of a lane.
    pub(super) async fn room(
        &self,
        mut entry: Arc<TopicEntry>,
        name: &LaneName,
    ) -> Result<(Arc<LaneHandle>, mpsc::OwnedPermit<Item>)> {
        loop {
            let Some(handle) = self.lane(&entry, name)? else {
                // Brokers were plugged in meanwhile: the topic may be another's.
                entry = self.entry(&name.topic)?;
                continue;
            };
            if let Ok(permit) = handle.intake.clone().reserve_owned().await {
                return Ok((handle, permit));
            }
            // The lane's task is gone: the hub closes, or the runtime that ran
            // the task did. Then another lane takes its place, once.
            self.check_open()?;
            lock(&self.0.lanes).retain(|_, h| !Arc::ptr_eq(h, &handle));
        }
    }

    /// The resolved form of a topic, from what its publisher remembers if that
    /// still holds.
    fn entry_found(&self, topic: &Topic, found: Option<&Found>) -> Result<Arc<TopicEntry>> {
        if let Some(entry) = found.and_then(|f| f.entry(self.0.epoch.load(Acquire))) {
            return Ok(entry);
        }
        let entry = self.entry(topic)?;
        if let Some(found) = found {
            found.keep_entry(&entry);
        }
        Ok(entry)
    }

    /// The resolved form of a topic.
    pub(super) fn entry(&self, topic: &Topic) -> Result<Arc<TopicEntry>> {
        // Before the routes: what is plugged in between makes this outdated, and
        // what was kept just before the list was cleared too.
        let epoch = self.0.epoch.load(Acquire);
        if let Some(entry) = lock(&self.0.topics).get(topic.as_str())
            && entry.epoch == epoch
        {
            return Ok(entry.clone());
        }
        let route = lock(&self.0.routes)
            .find(topic)
            .map(|(_, r)| r.clone())
            .ok_or_else(|| no_broker(topic))?;
        let broker = self.broker(route.primary).ok_or_else(|| no_broker(topic))?;
        let keyed_only = broker.broker_type() == BrokerType::Kafka
            && self
                .0
                .topology
                .topic(topic)
                .is_some_and(|t| t.options.cleanup_policy.contains("compact"));
        let entry = Arc::new(TopicEntry {
            topic: topic.clone(),
            route,
            broker,
            lanes: OnceCell::new(),
            keyed_only,
            epoch,
        });
        let mut topics = lock(&self.0.topics);
        if topics.len() < MAX_TOPICS {
            topics.insert(topic.to_string(), entry.clone());
        }
        Ok(entry)
    }

    pub(super) async fn lane_count(&self, entry: &TopicEntry) -> u32 {
        *entry
            .lanes
            .get_or_init(|| async {
                let known = entry.broker.lanes(&entry.topic).await;
                // While the broker is away the topology says how many there
                // will be; the adapter looks again when it writes.
                let wanted = self
                    .0
                    .topology
                    .topic(&entry.topic)
                    .and_then(|t| u32::try_from(t.options.partitions).ok());
                match wanted {
                    Some(n) if known <= 1 && entry.broker.broker_type() == BrokerType::Kafka => {
                        n.max(1)
                    }
                    _ => known.max(1),
                }
            })
            .await
    }

    /// None: the entry is no longer how the topic is resolved.
    fn lane(&self, entry: &TopicEntry, name: &LaneName) -> Result<Option<Arc<LaneHandle>>> {
        let mut lanes = lock(&self.0.lanes);
        if entry.epoch != self.0.epoch.load(Acquire) {
            return Ok(None);
        }
        if let Some(handle) = lanes.get(name) {
            return Ok(Some(handle.clone()));
        }
        self.check_open()?;
        if lanes.len() >= MAX_LANES {
            lanes.retain(|_, h| !h.intake.is_closed());
        }
        if lanes.len() >= MAX_LANES {
            return Err(Error::new(
                ErrorCode::PublishFailed,
                format!("{MAX_LANES} lanes are open already; use fewer topics in one process"),
            )
            .on(entry.topic.as_str()));
        }
        let handle = Arc::new(task::spawn(self.parts(entry, name, None)));
        lanes.insert(name.clone(), handle.clone());
        Ok(Some(handle))
    }

    /// Starts a lane with what an earlier process left in its spool.
    ///
    /// # Errors
    /// No broker serves the topic any more; then the messages are given back.
    #[cfg(feature = "journal")]
    pub(super) fn restore_lane(&self, name: LaneName, left: LaneLeft) -> Result<()> {
        let entry = self.entry(&name.topic)?;
        let handle = Arc::new(task::spawn(self.parts(&entry, &name, Some(left))));
        lock(&self.0.lanes).insert(name, handle);
        Ok(())
    }

    fn parts(
        &self,
        entry: &TopicEntry,
        name: &LaneName,
        restored: Option<LaneLeft>,
    ) -> task::Parts {
        // A route that spools no longer still lets go of what it had.
        let kept = entry.route.spool || restored.is_some();
        let store = kept.then(|| self.store()).flatten();

        let config = &self.0.config;
        let window = entry.broker.window();
        let ensure = match config.auto_declare {
            Some(true) => Some(self.source(entry)),
            // Nobody else makes the topics of failed events.
            _ if resting::is_resting(&entry.topic) => Some(self.source(entry)),
            // The embedded broker makes what is missing by itself, as the kind
            // that the lane names.
            _ => None,
        };
        task::Parts {
            route: entry.route.pattern.to_string(),
            topic: entry.topic.clone(),
            lane: name.lane,
            broker: entry.broker.clone(),
            options: LaneOptions {
                window,
                mandatory: name.mandatory,
                compression: name.compression,
                address: name.address.clone(),
                kind: Some(match entry.route.kind {
                    RouteKind::Task => TopicKind::Queue,
                    RouteKind::Event => TopicKind::Stream,
                }),
                ..LaneOptions::default()
            },
            settings: Settings {
                via: entry.broker.broker_type(),
                topic: entry.topic.as_str().into(),
                window,
                hedge: (config.hedge.min, config.hedge.max),
                suspect_timeout: config.suspect_timeout,
                spool: entry.route.spool,
                durable: store.is_some(),
                head: SPOOL_HEAD,
                budget: self.0.budget.clone(),
                spool_wait: config.spool.wait,
                local: local_of(&entry.route),
                overload_pause: OVERLOAD_PAUSE,
            },
            ensure,
            health: lock(&self.0.health)
                .get(&entry.broker.broker_type())
                .cloned(),
            store,
            restored,
            name: name.clone(),
            dead: lock(&self.0.dead).as_ref().map(|(d, _)| d.clone()),
            changes: self.0.changes.clone(),
            recorder: self.0.recorder.clone(),
            fallback_usages: self.0.fallback_usages.clone(),
            readers: self.0.readers.subscribe(),
            controls: self.0.controls.subscribe(),
            closing: self.0.closing.clone(),
            abandoned: self.0.abandoned.clone(),
        }
    }

    fn source(&self, entry: &TopicEntry) -> Source {
        let pattern = Pattern::from(&entry.topic);
        match entry.route.kind {
            RouteKind::Task => Source::Queue(pattern),
            RouteKind::Event => Source::Stream(pattern),
        }
    }

    /// How often something was spooled.
    pub(super) fn fallback_usages(&self) -> u64 {
        self.0.fallback_usages.load(Relaxed)
    }
}

/// Spooled messages of each lane that stay in memory although they are on the
/// disk: enough for a drain to go on while more are read.
const SPOOL_HEAD: usize = 4_096;

/// First pause after a broker said that it is overloaded; doubles to 2 s.
const OVERLOAD_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// What makes two publishes share a lane.
fn lane_name(
    topic: &Topic,
    lane: u32,
    options: &PublishOptions,
    compression: Option<Compression>,
) -> LaneName {
    let address = if options.exchange.is_empty() && options.routing_key.is_empty() {
        None
    } else {
        Some((options.exchange.clone(), options.routing_key.clone()))
    };
    LaneName {
        topic: topic.clone(),
        lane,
        mandatory: options.mandatory,
        compression,
        address,
    }
}

fn no_broker(topic: &Topic) -> Error {
    Error::new(
        ErrorCode::BrokerUnavailable,
        "no broker serves this topic: plug one in, or turn the fallback on",
    )
    .on(topic.as_str())
}
