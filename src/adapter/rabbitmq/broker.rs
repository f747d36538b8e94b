//! The broker itself: the traits, in terms of the other modules.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{
    RabbitMqConfig, address, connection, consumer,
    courier::{self, Courier, Job},
    error,
    link::Link,
    publisher, queue,
    shared::Shared,
    topology,
};
use crate::{
    broker::{
        BrokerType, ConnectionState, Consumer, Delivery, Handler, Lane, LaneOptions, MessageBroker,
        PublishOptions, QueueOptions, QueueStats, Receipt, Source, SubscribeOptions, Subscription,
        TaskQueueBroker, direct::DirectPublisher, dispatch::Subscriptions,
    },
    error::{Error, ErrorCode, Result},
    message::{Message, wire::Marks},
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
    topology::{Topology, TopologyMode, TopologyReport},
};

/// RabbitMQ as a broker of work queues, and of streams as far as an exchange
/// and a queue for each group can stand in for one.
pub struct RabbitMqBroker {
    shared: Arc<Shared>,
    courier: Courier,
    jobs: Mutex<Option<mpsc::Receiver<Job>>>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    direct: DirectPublisher,
    subscriptions: Subscriptions,
}

impl RabbitMqBroker {
    /// A broker that is not connected yet. What it depends on and the topology
    /// leaves out (retry and dead-letter objects, the event exchange) is added.
    #[must_use]
    pub fn new(config: RabbitMqConfig, topology: Arc<Topology>, mode: TopologyMode) -> Arc<Self> {
        let (courier, jobs) = Courier::new();
        Arc::new(Self {
            shared: Arc::new(Shared::new(config, &topology, mode)),
            courier,
            jobs: Mutex::new(Some(jobs)),
            supervisor: Mutex::new(None),
            direct: DirectPublisher::default(),
            subscriptions: Subscriptions::default(),
        })
    }

    /// Looks at the topology now; `apply` makes what is missing. Nothing that
    /// exists is changed.
    ///
    /// # Errors
    /// `CONNECTION_*`; differences stand in the report.
    pub async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        let link = self.shared.current()?;
        let mode = if apply {
            TopologyMode::Apply
        } else {
            TopologyMode::Check
        };
        let report = topology::reconcile(&self.shared, &link, mode).await?;
        self.shared.set_report(report.clone());
        Ok(report)
    }

    /// What the last look at the topology found.
    #[must_use]
    pub fn last_topology_report(&self) -> TopologyReport {
        self.shared.report()
    }

    fn queue_name<'a>(&'a self, topic: &'a Topic) -> &'a str {
        self.shared.topology.canonical(topic)
    }
}

#[async_trait]
impl MessageBroker for RabbitMqBroker {
    fn broker_type(&self) -> BrokerType {
        BrokerType::RabbitMq
    }

    async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        Self::topology(self, apply).await
    }

    fn window(&self) -> usize {
        self.shared.config.window
    }

    fn confirms(&self) -> bool {
        self.shared.config.publisher_confirm
    }

    async fn connect(&self) -> Result<()> {
        let outcome = {
            let mut supervisor = self.supervisor.lock().await;
            if self.shared.closing.is_cancelled() {
                return Err(error::closed());
            }
            if supervisor.is_some() {
                return Ok(());
            }
            if let Some(jobs) = self.jobs.lock().await.take() {
                self.shared
                    .tasks
                    .spawn(courier::run(self.shared.clone(), jobs));
            }
            let (first, outcome) = oneshot::channel();
            *supervisor = Some(tokio::spawn(connection::supervise(
                self.shared.clone(),
                first,
            )));
            outcome
        };
        outcome.await.map_err(|_| error::closed())?
    }

    async fn close(&self) -> Result<()> {
        self.subscriptions.close().await;
        self.direct.close().await;
        // Lanes finish what they wrote, consumers tell what was decided; then
        // nobody uses the connections any more, and they are closed.
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.hang_up.cancel();
        let mut supervisor = self.supervisor.lock().await;
        if let Some(task) = supervisor.as_mut() {
            // Awaiting a finished handle again would panic: it is taken only
            // once it is done, so that a dropped close can be called again.
            let ended = task.await;
            *supervisor = None;
            ended.map_err(|e| {
                Error::new(
                    ErrorCode::UnknownError,
                    "the connection's supervisor failed",
                )
                .caused_by(e)
            })?;
        }
        Ok(())
    }

    async fn health_check(&self) -> Result<()> {
        let link = self.shared.current()?;
        if let Some(why) = link.blocked.borrow().clone() {
            return Err(Error::new(
                ErrorCode::BrokerUnavailable,
                format!("{} blocks publishers: {why}", link.endpoint),
            )
            .at(BrokerType::RabbitMq));
        }
        for channel in [
            link.publish_channel(link.patience).await?,
            link.control_channel().await?,
        ] {
            link.bounded(link.patience, channel.close(200, "OK".into()))
                .await?
                .map_err(|e| {
                    error::operation(
                        &e,
                        "close a channel",
                        ErrorCode::ConnectionFailed,
                        ErrorCode::ConnectionFailed,
                    )
                })?;
        }
        Ok(())
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.shared.state.subscribe()
    }

    fn endpoints(&self) -> Vec<String> {
        address::endpoints(&self.shared.config)
            .map(|all| all.iter().map(address::display).collect())
            .unwrap_or_default()
    }

    /// Known where a management URL is set: the client library keeps what the
    /// server says at login to itself.
    fn server_version(&self) -> Option<String> {
        self.shared.version()
    }

    fn recorder(&self) -> &Arc<MetricsRecorder> {
        &self.shared.recorder
    }

    async fn open_lane(&self, topic: &Topic, lane: u32, options: &LaneOptions) -> Result<Lane> {
        let _ = lane; // One lane keeps a topic's order: there is only lane 0.
        publisher::open_lane(&self.shared, topic, options).await
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        if self.shared.closing.is_cancelled() {
            return Err(error::closed());
        }
        consumer::consume(&self.shared, &self.courier, source, options).await
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        messages: Vec<Arc<Message>>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        self.direct
            .publish_batch(self, topic, messages, options)
            .await
    }

    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        self.subscriptions
            .start(self, source, options, handler, &self.shared.recorder)
            .await
    }

    async fn unsubscribe(&self, pattern: &Pattern) -> Result<()> {
        self.subscriptions.unsubscribe(pattern).await
    }

    fn task_queue(&self) -> Option<&dyn TaskQueueBroker> {
        Some(self)
    }

    /// A queue is declared durable, replicated and with dead letters; one that
    /// exists is left as it is. A stream needs nothing: from now on its topic
    /// is published to the event exchange.
    async fn ensure(&self, source: &Source) -> Result<()> {
        let Some(topic) = source.pattern().literal() else {
            return Err(
                error::unsupported("only a topic without wildcards can be made")
                    .on(source.pattern().as_str()),
            );
        };
        match source {
            Source::Stream(_) => {
                self.shared.remember_stream(&topic);
                Ok(())
            }
            Source::Queue(_) => {
                let link = self.shared.current()?;
                match self.look_or_declare(&link, &topic).await {
                    // RabbitMQ ends the connection (INTERNAL_ERROR, seen on 3.10)
                    // now and then when a declare meets the deletion of the queue.
                    // To ask again does no harm, so one lost connection is no
                    // reason to fail whoever subscribes.
                    Err(e) if e.code() == ErrorCode::ConnectionClosed => {
                        let Some(next) = self.shared.next_after(&link, NEXT_LINK).await else {
                            return Err(e);
                        };
                        self.look_or_declare(&next, &topic).await
                    }
                    other => other,
                }
            }
        }
    }
}

impl RabbitMqBroker {
    /// Makes a queue that is not there, as the topology says or else safely.
    async fn look_or_declare(&self, link: &Link, topic: &Topic) -> Result<()> {
        let name = self.queue_name(topic);
        match queue::look(link, name).await {
            Err(e) if e.code() == ErrorCode::QueueNotFound => {
                let options = match self.shared.topology.queue(name) {
                    Some(known) => known.options.clone(),
                    None => topology::safe_queue(&self.shared.topology),
                };
                let name = Topic::new(name)?;
                self.declare_queue(&name, &options).await
            }
            other => other.map(drop),
        }
    }
}

#[async_trait]
impl TaskQueueBroker for RabbitMqBroker {
    async fn declare_queue(&self, queue: &Topic, options: &QueueOptions) -> Result<()> {
        let name = self.queue_name(queue);
        let link = self.shared.current()?;
        if options.exclusive {
            return Err(error::unsupported(
                "an exclusive queue ends with its connection, which is made anew after every loss; use expires_ms",
            )
            .on(name));
        }
        topology::declare_queue(&self.shared.topology, &link, name, options)
            .await
            .map_err(|e| e.on(name))?;
        self.shared.recorder.queues_declared.inc();
        self.shared.remember_queue(name, options);
        Ok(())
    }

    async fn dequeue_task(
        &self,
        queue: &Topic,
        worker_id: &str,
        wait: Duration,
    ) -> Result<Option<Delivery>> {
        // Only while there is a server can it be known that the queue is there.
        self.shared.current()?;
        let source = Source::Queue(Pattern::new(queue.as_str())?);
        let options = SubscribeOptions {
            prefetch: 1,
            buffer_size: 1,
            ..SubscribeOptions::default()
        };
        let mut consumer = self.consume(&source, &options).await?;
        // Dropping the consumer, at any point, stops it and gives back what it
        // holds; what was handed out can still be settled.
        let first = tokio::time::timeout(wait, consumer.deliveries.recv()).await;
        consumer.control.begin_stop();
        let delivery = match first {
            Ok(batch) => batch.and_then(|mut b| b.pop()),
            // It may have come while the time ran out.
            Err(_) => consumer
                .deliveries
                .try_recv()
                .ok()
                .and_then(|mut b| b.pop()),
        };
        Ok(delivery.map(|d| for_worker(d, worker_id)))
    }

    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        let link = self.shared.current()?;
        queue::stats(&self.shared, &link, self.queue_name(queue)).await
    }

    async fn purge_queue(&self, queue: &Topic) -> Result<u64> {
        let link = self.shared.current()?;
        queue::purge(&link, self.queue_name(queue)).await
    }

    async fn delete_queue(&self, queue: &Topic) -> Result<()> {
        let link = self.shared.current()?;
        let name = self.queue_name(queue);
        queue::delete(&link, name).await?;
        self.shared.forget_queue(name);
        Ok(())
    }

    async fn dead_letter(&self, queue: &Topic, message: Arc<Message>, marks: Marks) -> Result<()> {
        self.shared.current()?;
        let mut message = (*message).clone();
        if let Some(failure) = &marks.failure {
            message.error.get_or_insert_with(|| failure.details.clone());
        }
        let address = (
            String::new(),
            self.shared.topology.dead_letter_queue().to_owned(),
        );
        let job = Job::new(
            address,
            self.queue_name(queue).into(),
            message,
            marks,
            false,
        );
        self.courier.send(job).await.map_err(|e| {
            Error::new(
                ErrorCode::DeadLetterFailed,
                "the dead letter was not confirmed",
            )
            .at(BrokerType::RabbitMq)
            .on(queue.as_str())
            .assuming(e.assume())
            .caused_by(e)
        })
    }
}

impl std::fmt::Debug for RabbitMqBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RabbitMqBroker")
            .field("endpoints", &self.endpoints())
            .field("connection", &*self.shared.state.borrow())
            .finish_non_exhaustive()
    }
}

/// Notes the worker on a task; other messages have no place for it.
fn for_worker(delivery: Delivery, worker_id: &str) -> Delivery {
    let (mut received, settle) = delivery.into_parts();
    if received.message.task.is_some() {
        let message = Arc::make_mut(&mut received.message);
        if let Some(task) = &mut message.task {
            task.worker_id = Some(worker_id.to_owned());
        }
    }
    match settle {
        Some((settlements, tag)) => Delivery::new(received, settlements, tag),
        None => Delivery::unsettled(received),
    }
}

/// How long a lost connection's successor is waited for: some tries to connect.
const NEXT_LINK: Duration = Duration::from_secs(5);
