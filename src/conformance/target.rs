//! What the suite drives: a broker, or the hub over several.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{Kind, Wanted};
use crate::{
    broker::{
        Consumer, Delivery, EventStreamBroker, Handler, MessageBroker, PublishOptions, QueueStats,
        Receipt, SeekTo, Source, SubscribeOptions, Subscription, TaskQueueBroker, TopicMetadata,
    },
    error::{Error, ErrorCode, Result},
    message::Message,
    topic::Topic,
};

/// One client of a backend. What a target does not offer answers
/// `INVALID_CONFIG`; its factory does not declare the capability then.
#[async_trait]
pub trait Target: Send + Sync + 'static {
    /// Makes a queue or a stream.
    async fn declare(&self, topic: &Topic, wanted: &Wanted) -> Result<()>;

    /// Publishes one message and waits for its outcome.
    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt>;

    /// Publishes messages pipelined, one outcome for each, in order.
    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>>;

    /// Starts a consumer.
    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer>;

    /// Subscribes a handler.
    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription>;

    /// Everything that this client says of itself: addresses, versions, states.
    fn description(&self) -> Vec<String>;

    /// Asks the backend itself.
    async fn health_check(&self) -> Result<()>;

    /// Flushes and closes. Idempotent.
    async fn close(&self) -> Result<()>;

    /// The state of a queue.
    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        Err(not_offered("queue_stats", queue))
    }

    /// Takes one message of a queue, waiting up to `wait` for one.
    async fn dequeue(&self, queue: &Topic, wait: Duration) -> Result<Option<Delivery>> {
        let _ = wait;
        Err(not_offered("dequeue", queue))
    }

    /// Deletes the ready messages of a queue.
    async fn purge_queue(&self, queue: &Topic) -> Result<u64> {
        Err(not_offered("purge_queue", queue))
    }

    /// The state of a stream.
    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata> {
        Err(not_offered("topic_metadata", topic))
    }

    /// Commits a group's next offset.
    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()> {
        let _ = (group, partition, next);
        Err(not_offered("commit_offset", topic))
    }

    /// A group's committed next offset.
    async fn offset(&self, group: &str, topic: &Topic, partition: i32) -> Result<Option<i64>> {
        let _ = (group, partition);
        Err(not_offered("offset", topic))
    }

    /// Moves a group's position.
    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        let _ = (group, partition, to);
        Err(not_offered("seek", topic))
    }
}

impl fmt::Debug for dyn Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Target").field(&self.description()).finish()
    }
}

#[async_trait]
impl Target for Arc<dyn MessageBroker> {
    async fn declare(&self, topic: &Topic, wanted: &Wanted) -> Result<()> {
        match wanted.kind {
            Kind::Queue => {
                let options = wanted.queue_options();
                queues(self, topic)?.declare_queue(topic, &options).await
            }
            Kind::Stream => {
                let options = wanted.topic_options();
                streams(self, topic)?.create_topic(topic, &options).await
            }
        }
    }

    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        (**self).publish(topic, message, options).await
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        let messages = messages.into_iter().map(Arc::new).collect();
        (**self).publish_batch(topic, messages, options).await
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        (**self).consume(source, options).await
    }

    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        (**self).subscribe(source, options, handler).await
    }

    fn description(&self) -> Vec<String> {
        let mut all = self.endpoints();
        all.extend(self.server_version());
        all.push(format!("{:?}", *self.connection().borrow()));
        all
    }

    async fn health_check(&self) -> Result<()> {
        (**self).health_check().await
    }

    async fn close(&self) -> Result<()> {
        (**self).close().await
    }

    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        queues(self, queue)?.queue_stats(queue).await
    }

    async fn dequeue(&self, queue: &Topic, wait: Duration) -> Result<Option<Delivery>> {
        let queues = queues(self, queue)?;
        queues.dequeue_task(queue, "conformance", wait).await
    }

    async fn purge_queue(&self, queue: &Topic) -> Result<u64> {
        queues(self, queue)?.purge_queue(queue).await
    }

    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata> {
        streams(self, topic)?.topic_metadata(topic).await
    }

    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()> {
        let streams = streams(self, topic)?;
        streams.commit_offset(group, topic, partition, next).await
    }

    async fn offset(&self, group: &str, topic: &Topic, partition: i32) -> Result<Option<i64>> {
        streams(self, topic)?.offset(group, topic, partition).await
    }

    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        streams(self, topic)?
            .seek(group, topic, partition, to)
            .await
    }
}

fn queues<'a>(
    broker: &'a Arc<dyn MessageBroker>,
    topic: &Topic,
) -> Result<&'a dyn TaskQueueBroker> {
    broker
        .task_queue()
        .ok_or_else(|| not_offered("work queues", topic))
}

fn streams<'a>(
    broker: &'a Arc<dyn MessageBroker>,
    topic: &Topic,
) -> Result<&'a dyn EventStreamBroker> {
    broker
        .event_stream()
        .ok_or_else(|| not_offered("streams", topic))
}

fn not_offered(what: &str, topic: &Topic) -> Error {
    Error::new(
        ErrorCode::InvalidConfig,
        format!("this target does not offer {what}; do not declare the capability"),
    )
    .on(topic.as_str())
}
