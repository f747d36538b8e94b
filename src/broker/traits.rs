//! The three broker traits.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{
    BrokerType, ConnectionState, Consumer, Delivery, Handler, Lane, LaneOptions, OrderKey,
    PublishOptions, QueueOptions, QueueStats, Receipt, SeekTo, Source, SubscribeOptions,
    Subscription, TopicMetadata, TopicOptions, TransactionalBroker,
};
use crate::{
    error::{Error, ErrorCode, Result},
    message::{Event, Message, Task, wire::Marks},
    metrics::{BrokerMetrics, MetricsRecorder},
    topic::{Pattern, Topic},
    topology::TopologyReport,
};

/// A backend that messages can be published to and consumed from.
///
/// An adapter supervises its own connection: after [`MessageBroker::connect`]
/// it reconnects by itself until [`MessageBroker::close`], and
/// [`MessageBroker::connection`] says how it does.
#[async_trait]
pub trait MessageBroker: Send + Sync + 'static {
    /// Which kind it is.
    fn broker_type(&self) -> BrokerType;

    /// Connects, and starts to reconnect whenever the connection is lost.
    /// Called again, it does nothing.
    ///
    /// # Errors
    /// The first attempt's error, with credentials left out; the broker goes on
    /// trying in the background all the same.
    async fn connect(&self) -> Result<()>;

    /// Flushes, closes everything and waits for its tasks. Idempotent;
    /// afterwards every operation fails with `OPERATION_CANCELED`.
    ///
    /// # Errors
    /// What could not be flushed.
    async fn close(&self) -> Result<()>;

    /// Asks the broker itself, by a round trip that changes nothing.
    ///
    /// # Errors
    /// Why the broker cannot be used now.
    async fn health_check(&self) -> Result<()>;

    /// The connection's state, to be watched.
    fn connection(&self) -> watch::Receiver<ConnectionState>;

    /// Whether the connection stands now.
    fn is_connected(&self) -> bool {
        self.connection().borrow().connected
    }

    /// Addresses, without credentials.
    fn endpoints(&self) -> Vec<String>;

    /// What the server says of its version, once connected.
    fn server_version(&self) -> Option<String>;

    /// Where this broker counts.
    fn recorder(&self) -> &Arc<MetricsRecorder>;

    /// A snapshot of the counters.
    fn metrics(&self) -> BrokerMetrics {
        self.recorder().snapshot()
    }

    /// Whether its publishes are confirmed; without, they end in `Sent`.
    fn confirms(&self) -> bool {
        true
    }

    /// Messages in flight that a lane of this broker does well with.
    fn window(&self) -> usize {
        1000
    }

    /// How many lanes keep the order of a topic apart (Kafka: its partitions).
    /// 1 while the broker does not know.
    async fn lanes(&self, topic: &Topic) -> u32 {
        let _ = topic;
        1
    }

    /// Which of `lanes` lanes a message belongs to. Messages of one order key
    /// always get the same one.
    fn lane_of(&self, topic: &Topic, order: &OrderKey, partition: Option<i32>, lanes: u32) -> u32 {
        let _ = (topic, order, partition, lanes);
        0
    }

    /// Opens a publishing lane on the current connection.
    ///
    /// # Errors
    /// `CONNECTION_*` when there is no connection; a refusal when the topic
    /// cannot exist.
    async fn open_lane(&self, topic: &Topic, lane: u32, options: &LaneOptions) -> Result<Lane>;

    /// Starts a consumer. It succeeds while the broker is away and takes up its
    /// subscription when the broker is there.
    ///
    /// # Errors
    /// A refusal (an option that this broker cannot honour, a queue that is
    /// known not to exist).
    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer>;

    /// Publishes messages, one outcome for each, in order.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answers, not the messages.
    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Arc<Message>>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>>;

    /// Publishes one message and waits for its outcome.
    ///
    /// # Errors
    /// Says whether the message was not sent, rejected, or is unknown.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer, not the message.
    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        self.publish_batch(topic, vec![Arc::new(message)], options)
            .await
            .pop()
            .unwrap_or_else(|| {
                Err(Error::new(
                    ErrorCode::UnknownError,
                    "the broker gave no outcome",
                ))
            })
    }

    /// Subscribes a handler.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`].
    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription>;

    /// Ends every subscription to exactly this pattern.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` when there is none.
    async fn unsubscribe(&self, pattern: &Pattern) -> Result<()>;

    /// This broker's queues, if it has any.
    fn task_queue(&self) -> Option<&dyn TaskQueueBroker> {
        None
    }

    /// This broker's streams, if it has any.
    fn event_stream(&self) -> Option<&dyn EventStreamBroker> {
        None
    }

    /// This broker's transactions, if it has any.
    fn transactions(&self) -> Option<&dyn TransactionalBroker> {
        None
    }

    /// Compares the wanted topology with what is there; `apply` makes what is
    /// missing. Nothing that differs is changed.
    ///
    /// # Errors
    /// Why the broker could not be asked.
    async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        let _ = apply;
        Ok(TopologyReport::default())
    }

    /// Makes `topic` usable with safe settings when it is missing (the hub's
    /// `auto_declare`).
    ///
    /// # Errors
    /// Why it could not be made.
    async fn ensure(&self, source: &Source) -> Result<()>;
}

/// A broker with work queues.
#[async_trait]
pub trait TaskQueueBroker: MessageBroker {
    /// Declares a queue; declaring it again with the same options does nothing.
    ///
    /// # Errors
    /// `QUEUE_DECLARE_FAILED` that names the argument which differs.
    async fn declare_queue(&self, queue: &Topic, options: &QueueOptions) -> Result<()>;

    /// Puts a task into a queue.
    ///
    /// # Errors
    /// As [`MessageBroker::publish`].
    async fn enqueue_task(&self, queue: &Topic, task: Task) -> Result<Receipt> {
        self.publish(queue, task.into(), &PublishOptions::default())
            .await
    }

    /// Puts tasks into a queue, one outcome for each.
    async fn enqueue_tasks(&self, queue: &Topic, tasks: Vec<Task>) -> Vec<Result<Receipt>> {
        let messages = tasks.into_iter().map(|t| Arc::new(t.into())).collect();
        self.publish_batch(queue, messages, &PublishOptions::default())
            .await
    }

    /// Takes one task for a worker, waiting up to `wait` for one. Settle it
    /// with [`TaskQueueBroker::ack_task`] and its siblings, or by the delivery.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`, or why the broker cannot be asked.
    ///
    /// # Cancel safety
    /// A task that arrived just then is given back.
    async fn dequeue_task(
        &self,
        queue: &Topic,
        worker_id: &str,
        wait: Duration,
    ) -> Result<Option<Delivery>>;

    /// The task is done.
    ///
    /// # Errors
    /// `ACK_FAILED` when the delivery's connection is gone.
    async fn ack_task(&self, delivery: Delivery) -> Result<()> {
        delivery.ack().await
    }

    /// The task failed; hand it out again, or dead-letter it.
    ///
    /// # Errors
    /// `NACK_FAILED`, `ACK_FAILED`.
    async fn nack_task(&self, delivery: Delivery, requeue: bool) -> Result<()> {
        if requeue {
            delivery.requeue().await
        } else {
            delivery.dead_letter("nacked", "").await
        }
    }

    /// The task is refused: to the dead letters.
    ///
    /// # Errors
    /// `DEAD_LETTER_FAILED`, `ACK_FAILED`.
    async fn reject_task(&self, delivery: Delivery) -> Result<()> {
        delivery.dead_letter("rejected", "").await
    }

    /// Moves the task to the dead letters with a reason.
    ///
    /// # Errors
    /// `DEAD_LETTER_FAILED`, `ACK_FAILED`.
    async fn move_to_dead_letter(&self, delivery: Delivery, reason: &str) -> Result<()> {
        delivery.dead_letter("moved", reason).await
    }

    /// The state of a queue.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats>;

    /// Messages ready in a queue.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    async fn queue_depth(&self, queue: &Topic) -> Result<u64> {
        Ok(self.queue_stats(queue).await?.messages_ready)
    }

    /// Deletes the ready messages of a queue and says how many there were.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    async fn purge_queue(&self, queue: &Topic) -> Result<u64>;

    /// Deletes a queue with everything in it.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    async fn delete_queue(&self, queue: &Topic) -> Result<()>;

    /// Subscribes a handler to queues.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`].
    async fn subscribe_tasks(
        &self,
        pattern: &Pattern,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        self.subscribe(&Source::Queue(pattern.clone()), options, handler)
            .await
    }

    /// Puts a raw message among the dead letters of `queue`. Its marks say why.
    ///
    /// # Errors
    /// `DEAD_LETTER_FAILED`.
    async fn dead_letter(&self, queue: &Topic, message: Arc<Message>, marks: Marks) -> Result<()>;
}

/// A broker with streams.
#[async_trait]
pub trait EventStreamBroker: MessageBroker {
    /// Makes a topic; one that exists with the same settings is fine.
    ///
    /// # Errors
    /// `TOPIC_CREATE_FAILED`.
    async fn create_topic(&self, topic: &Topic, options: &TopicOptions) -> Result<()>;

    /// Deletes a topic with everything in it.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`.
    async fn delete_topic(&self, topic: &Topic) -> Result<()>;

    /// All topics.
    ///
    /// # Errors
    /// Why the broker cannot be asked.
    async fn list_topics(&self) -> Result<Vec<Topic>>;

    /// The state of a topic.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`.
    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata>;

    /// The offset of every partition that a reader who starts there begins at.
    /// Where nothing is that new it is the end.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`, or why the broker cannot be asked.
    async fn locate(&self, topic: &Topic, at: SeekTo) -> Result<BTreeMap<i32, i64>>;

    /// Makes a group with a position in every partition of the topics that
    /// exist now (`reset` says where).
    ///
    /// # Errors
    /// Why the broker refused.
    async fn create_consumer_group(
        &self,
        group: &str,
        pattern: &Pattern,
        reset: SeekTo,
    ) -> Result<()>;

    /// Forgets a group and its positions.
    ///
    /// # Errors
    /// Why the broker refused, such as a group with live members.
    async fn delete_consumer_group(&self, group: &str) -> Result<()>;

    /// Publishes an event.
    ///
    /// # Errors
    /// As [`MessageBroker::publish`].
    async fn publish_event(&self, topic: &Topic, event: Event) -> Result<Receipt> {
        self.publish(topic, event.into(), &PublishOptions::default())
            .await
    }

    /// Publishes events, one outcome for each.
    async fn publish_events(&self, topic: &Topic, events: Vec<Event>) -> Vec<Result<Receipt>> {
        let messages = events.into_iter().map(|e| Arc::new(e.into())).collect();
        self.publish_batch(topic, messages, &PublishOptions::default())
            .await
    }

    /// Subscribes a handler to streams.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`].
    async fn subscribe_events(
        &self,
        pattern: &Pattern,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        self.subscribe(&Source::Stream(pattern.clone()), options, handler)
            .await
    }

    /// Reads streams without a group, from where `options.start` says.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`].
    async fn stream_messages(
        &self,
        pattern: &Pattern,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        let options = SubscribeOptions {
            group_id: None,
            ..options.clone()
        };
        self.consume(&Source::Stream(pattern.clone()), &options)
            .await
    }

    /// Commits a group's position: `next` is the offset of the next message
    /// that it has not handled.
    ///
    /// # Errors
    /// Why the broker refused.
    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()>;

    /// A group's committed position, if it has one.
    ///
    /// # Errors
    /// Why the broker cannot be asked.
    async fn offset(&self, group: &str, topic: &Topic, partition: i32) -> Result<Option<i64>>;

    /// Moves a group's position in one partition, or in all. Live members of
    /// this process follow at once.
    ///
    /// # Errors
    /// Why the broker refused, such as a group with live members elsewhere.
    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()>;
}
