//! The hub as a target: it must keep the same promises as the brokers that it
//! stands on.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::{BoxFuture, join_all};

use super::{Capabilities, Capability, Factory, Kind, Restart, Target, Wanted};
use crate::{
    broker::{
        Consumer, Delivery, Handler, PublishOptions, QueueStats, Receipt, SeekTo, Source,
        SubscribeOptions, Subscription, TopicMetadata,
    },
    error::{Error, ErrorCode, Result},
    hub::MessagingHub,
    message::Message,
    topic::Topic,
};

type Connect = Box<dyn Fn() -> BoxFuture<'static, Result<MessagingHub>> + Send + Sync>;

/// The hub over any backend.
pub struct HubFactory {
    name: String,
    connect: Connect,
    over: Arc<dyn Factory>,
    without: Vec<Capability>,
    current: Mutex<Option<MessagingHub>>,
}

impl HubFactory {
    /// The hub that `connect` makes, with its brokers connected, over the
    /// backend of `over`, whose capabilities hold but for those that the hub
    /// does not offer.
    pub fn new(
        name: impl Into<String>,
        over: Arc<dyn Factory>,
        connect: impl Fn() -> BoxFuture<'static, Result<MessagingHub>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            connect: Box::new(connect),
            over,
            // The hub has no call for these.
            without: vec![Capability::Offsets, Capability::Purge],
            current: Mutex::new(None),
        }
    }

    /// Without a capability of the backend that this hub is not given.
    #[must_use]
    pub fn without(mut self, capability: Capability) -> Self {
        self.without.push(capability);
        self
    }

    fn open_hub(&self) -> Option<MessagingHub> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone().filter(MessagingHub::is_accepting)
    }
}

#[async_trait]
impl Factory for HubFactory {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn capabilities(&self) -> Capabilities {
        // What waits for its time waits in the hub, whatever its broker can.
        let all = self.over.capabilities().with(Capability::Delay);
        let lacking = self.without.iter().copied();
        lacking.fold(all, Capabilities::without)
    }

    async fn connect(&self) -> Result<Arc<dyn Target>> {
        // A backend inside its client has one hub at a time.
        if self.over.one_client()
            && let Some(hub) = self.open_hub()
        {
            return Ok(Arc::new(hub));
        }
        let hub = (self.connect)().await?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(hub.clone());
        Ok(Arc::new(hub))
    }

    fn one_client(&self) -> bool {
        self.over.one_client()
    }

    /// Names that the default routes send to queues and to streams.
    fn topic_name(&self, kind: Kind, unique: &str) -> String {
        match kind {
            Kind::Queue => format!("tasks.conformance.{unique}"),
            Kind::Stream => format!("events.conformance.{unique}"),
        }
    }

    fn retry_delay(&self, kind: Kind) -> Duration {
        self.over.retry_delay(kind)
    }

    fn dead_letters(&self, kind: Kind) -> Option<Source> {
        self.over.dead_letters(kind)
    }

    fn secrets(&self) -> Vec<String> {
        self.over.secrets()
    }

    fn declaration_settles(&self) -> Duration {
        self.over.declaration_settles()
    }

    fn restart(&self) -> Option<&dyn Restart> {
        self.over.restart()
    }
}

impl fmt::Debug for HubFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubFactory")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Target for MessagingHub {
    async fn declare(&self, topic: &Topic, wanted: &Wanted) -> Result<()> {
        match wanted.kind {
            Kind::Queue => {
                let options = wanted.queue_options();
                self.declare_queue(topic.as_str(), &options).await
            }
            Kind::Stream => {
                let options = wanted.topic_options();
                self.create_topic(topic.as_str(), &options).await
            }
        }
    }

    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        self.publish_with(topic.as_str(), message, options).await
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        if *options == PublishOptions::default() {
            return MessagingHub::publish_batch(self, topic.as_str(), messages).await;
        }
        // Polled in order, so they are enqueued in order.
        let publishing = messages
            .into_iter()
            .map(|message| self.publish_with(topic.as_str(), message, options));
        join_all(publishing).await
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        self.consume_from(source, options).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        match source {
            Source::Queue(p) => self.subscribe_tasks(p.as_str(), options, handler).await,
            Source::Stream(p) => self.subscribe_events(p.as_str(), options, handler).await,
        }
    }

    fn description(&self) -> Vec<String> {
        vec![
            format!("{:?}", self.state()),
            format!("{:?}", MessagingHub::metrics(self)),
        ]
    }

    async fn health_check(&self) -> Result<()> {
        if !self.is_accepting() {
            return Err(Error::new(
                ErrorCode::OperationCanceled,
                "the hub accepts nothing",
            ));
        }
        for (broker, health) in MessagingHub::health_check(self).await {
            health.map_err(|why| Error::new(ErrorCode::BrokerUnavailable, why).at(broker))?;
        }
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        // A hub that has just met its server again still moves back what it
        // keeps in memory; an operator would not stop it before.
        let spooled = || -> u64 {
            let state = self.state();
            state.routes.iter().map(|r| r.spool.messages).sum()
        };
        let until = tokio::time::Instant::now() + DRAIN;
        while spooled() > 0 && tokio::time::Instant::now() < until {
            tokio::time::sleep(LOOK).await;
        }
        let report = MessagingHub::close(self, GRACE).await;
        match report.left_in_memory_spool {
            0 => Ok(()),
            left => Err(Error::new(
                ErrorCode::OperationCanceled,
                format!("{left} messages were left in the memory spool"),
            )),
        }
    }

    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        MessagingHub::queue_stats(self, queue.as_str()).await
    }

    async fn dequeue(&self, queue: &Topic, wait: Duration) -> Result<Option<Delivery>> {
        Ok(self.lease(queue.as_str(), 1, wait).await?.pop())
    }

    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata> {
        MessagingHub::topic_metadata(self, topic.as_str()).await
    }

    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()> {
        let positions = BTreeMap::from([((topic.as_str().to_owned(), partition), next)]);
        self.commit_positions(group, &positions).await
    }

    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        MessagingHub::seek(self, group, topic.as_str(), partition, to).await
    }
}

/// How long moving back may take once a check is over.
const DRAIN: Duration = Duration::from_secs(20);

/// Between looks at what is spooled.
const LOOK: Duration = Duration::from_millis(20);

/// What a hub is given to close; what a check still holds unsettled then uses it
/// up.
const GRACE: Duration = Duration::from_secs(3);
