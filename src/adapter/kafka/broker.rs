//! The broker itself: what the contract asks of Kafka, put together from the
//! parts of this folder.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    runtime::Handle,
    sync::{Mutex, mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    admin::{Admin, not_found},
    config::KafkaConfig,
    connection::Probe,
    consumer::Consumers,
    error::{closed, failed, invalid},
    groups,
    link::Link,
    producer::Reaper,
    publisher::Publisher,
    topics::{TopicFacts, Topics},
    topology,
    transaction::Transactions,
};
use crate::{
    broker::{
        BrokerType, ConnectionState, Consumer, ConsumerControl, EventStreamBroker, Fate, Handler,
        Lane, LaneOptions, MessageBroker, OrderKey, PublishOptions, Receipt, Received, SeekTo,
        Source, SubscribeOptions, Subscription, TopicMetadata, TopicOptions, TransactionalBroker,
        Transactor, Transformer, direct::DirectPublisher, dispatch::Subscriptions,
    },
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageState,
        wire::{Failure, Marks},
    },
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
    topology::{Topology, TopologyMode, TopologyReport},
};

/// Kafka as a broker: streams, and work queues in so far as one group shares a
/// topic.
pub struct KafkaBroker {
    backend: Arc<Backend>,
    direct: DirectPublisher,
    subscriptions: Subscriptions,
    mode: TopologyMode,
    running: Mutex<Option<Running>>,
    closed: AtomicBool,
    closing: CancellationToken,
}

/// What the parts share.
pub(super) struct Backend {
    pub(super) config: Arc<KafkaConfig>,
    pub(super) topology: Arc<Topology>,
    pub(super) topics: Arc<Topics>,
    pub(super) link: Arc<Link>,
    pub(super) recorder: Arc<MetricsRecorder>,
    pub(super) admin: Admin,
    pub(super) consumers: Consumers,
    pub(super) publisher: Arc<Publisher>,
    pub(super) transactions: Transactions,
    reaper: Reaper,
}

/// What [`MessageBroker::connect`] started.
struct Running {
    probe: Arc<Probe>,
    preparer: JoinHandle<()>,
}

impl KafkaBroker {
    /// A broker that connects when asked to. Call it within a tokio runtime.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(config: KafkaConfig, topology: Arc<Topology>, mode: TopologyMode) -> Arc<Self> {
        let config = Arc::new(config);
        let recorder = Arc::new(MetricsRecorder::default());
        let link = Arc::new(Link::new(Arc::clone(&recorder)));
        let topics = Arc::new(Topics::default());
        let reaper = Reaper::new(Handle::current());
        let publisher = Arc::new(Publisher::new(
            Arc::clone(&config),
            Arc::clone(&topics),
            Arc::clone(&link),
            reaper.clone(),
        ));
        let admin = Admin::new(
            Arc::clone(&config),
            Arc::clone(&link),
            Arc::clone(&topics),
            reaper.clone(),
        );
        let direct = DirectPublisher::default().with_max_message_bytes(config.max_message_bytes);
        Arc::new(Self {
            backend: Arc::new(Backend {
                config,
                topology,
                topics,
                link,
                recorder,
                admin,
                consumers: Consumers::default(),
                publisher,
                transactions: Transactions::new(Handle::current()),
                reaper,
            }),
            direct,
            subscriptions: Subscriptions::default(),
            mode,
            running: Mutex::default(),
            closed: AtomicBool::new(false),
            closing: CancellationToken::new(),
        })
    }

    /// Compares the topics that should exist with those that do; with `apply`
    /// what is missing is made. Nothing that exists is changed.
    ///
    /// # Errors
    /// Why the cluster could not be asked.
    pub async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        self.open()?;
        let backend = &self.backend;
        let report = topology::look(&backend.admin, &backend.topology, apply).await?;
        backend
            .recorder
            .topics_created
            .add(report.created.len() as u64);
        Ok(report)
    }

    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(closed());
        }
        Ok(())
    }
}

impl Backend {
    /// Why there is no connection, as an error.
    pub(super) fn away(&self) -> Error {
        let state = self.link.watch().borrow().clone();
        let reason = state
            .reason
            .as_deref()
            .unwrap_or("no broker has answered yet");
        let code = if state.refused {
            ErrorCode::AuthenticationFailed
        } else {
            ErrorCode::ConnectionFailed
        };
        Error::new(
            code,
            format!(
                "Kafka at {} is not reachable: {reason}",
                self.config.brokers.join(", ")
            ),
        )
        .at(BrokerType::Kafka)
    }

    /// A topic that exists.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`, or why the cluster could not be asked.
    pub(super) async fn known(&self, topic: &Topic) -> Result<TopicFacts> {
        self.admin
            .facts(topic)
            .await?
            .ok_or_else(|| not_found(topic))
    }

    /// A topic that exists, made where that is allowed.
    pub(super) async fn known_or_made(&self, topic: &Topic) -> Result<TopicFacts> {
        if let Some(facts) = self.admin.facts(topic).await? {
            return Ok(facts);
        }
        if !self.config.auto_create_topics {
            return Err(not_found(topic));
        }
        self.make(topic).await?;
        self.known(topic).await
    }

    async fn make(&self, topic: &Topic) -> Result<()> {
        let options = self
            .topology
            .topic(topic)
            .map(|t| t.options.clone())
            .unwrap_or_default();
        if self.admin.create(topic, &options).await? {
            self.recorder.topics_created.inc();
        }
        Ok(())
    }

    /// The topic of the dead letters, which exists then. They must have a place,
    /// whatever may be created otherwise.
    ///
    /// # Errors
    /// `DEAD_LETTER_FAILED`.
    pub(super) async fn dead_letters(&self) -> Result<Topic> {
        let name = self.topology.dead_letter_topic();
        let topic = Topic::new(name).map_err(|e| unburied(e.to_string()))?;
        let known = self.admin.facts(&topic).await.map_err(|e| {
            let why = format!("the dead letters' topic {name} could not be looked up");
            unburied(why).caused_by(e)
        })?;
        if known.is_none() {
            self.make(&topic).await.map_err(|e| {
                unburied(format!("the dead letters' topic {name} could not be made")).caused_by(e)
            })?;
        }
        Ok(topic)
    }

    /// Puts a message among the dead letters and waits until it is there.
    pub(super) async fn dead_letter(&self, received: &Received, failure: Failure) -> Result<()> {
        let of_message = |e: Error| {
            e.on(received.topic.as_str())
                .with_id(received.message.id.as_str())
        };
        let topic = self.dead_letters().await.map_err(of_message)?;
        let name = topic.as_str();
        let (message, marks) = letter(received, failure);
        match self.publisher.send_one(&topic, &message, &marks).await {
            Fate::Confirmed(_) => Ok(()),
            Fate::Refused(e) | Fate::Overloaded(e) | Fate::Unknown(e) | Fate::Unsent(e) => {
                let why =
                    format!("the message could not be moved to {name}; it is delivered again");
                Err(of_message(unburied(why)).caused_by(e))
            }
        }
    }
}

/// A message could not be put among the dead letters.
fn unburied(why: String) -> Error {
    Error::new(ErrorCode::DeadLetterFailed, why).at(BrokerType::Kafka)
}

/// The dead letter of a message.
pub(super) fn letter(received: &Received, failure: Failure) -> (Message, Marks) {
    let mut message = Message::clone(&received.message);
    message.partition = None;
    message.state = MessageState::DeadLettered;
    failure.count_on(&mut message);
    message.error = Some(failure.details.clone());
    let mut marks = (*received.marks).clone();
    marks.failure = Some(Box::new(failure));
    (message, marks)
}

#[async_trait]
impl MessageBroker for KafkaBroker {
    fn broker_type(&self) -> BrokerType {
        BrokerType::Kafka
    }

    async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        Self::topology(self, apply).await
    }

    fn window(&self) -> usize {
        self.backend.config.window
    }

    async fn connect(&self) -> Result<()> {
        self.open()?;
        let mut running = self.running.lock().await;
        if running.is_none() {
            let backend = &self.backend;
            // Wrong settings are found now, not at the first publish.
            super::client::producer(
                &backend.config,
                backend.config.compression,
                backend.config.batch_size,
            )?;
            backend.publisher.prepare();
            let asker = backend.admin.asker()?;
            let (found, finds) = mpsc::channel(1);
            let probe = Arc::new(Probe::start(
                asker,
                Arc::clone(&backend.link),
                Arc::clone(&backend.topics),
                Arc::clone(&backend.recorder),
                found,
            )?);
            let preparer = Preparer {
                backend: Arc::clone(backend),
                probe: Arc::clone(&probe),
                mode: self.mode,
                looked: false,
            };
            *running = Some(Running {
                probe,
                preparer: tokio::spawn(preparer.run(finds, self.closing.clone())),
            });
        } else if self.is_connected() {
            return Ok(());
        }
        drop(running);
        let mut state = self.backend.link.watch();
        let within = self.backend.config.connection_timeout;
        let first = async {
            let settled = |s: &ConnectionState| s.connected || s.refused;
            // The link outlives this wait, so neither can fail.
            let _ = state.wait_for(|s| settled(s) || s.reason.is_some()).await;
            // One address may be away and another about to answer.
            let _ = tokio::time::timeout(SECOND_CHANCE, state.wait_for(settled)).await;
        };
        let answered = tokio::time::timeout(within, first).await.is_ok();
        if self.is_connected() {
            return Ok(());
        }
        if answered {
            return Err(self.backend.away());
        }
        Err(Error::new(
            ErrorCode::ConnectionTimeout,
            format!(
                "Kafka at {} did not answer within kafka.connection_timeout",
                self.backend.config.brokers.join(", ")
            ),
        )
        .at(BrokerType::Kafka))
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        // A second close waits for the first here and finds nothing left.
        let mut running = self.running.lock().await;
        self.subscriptions.close().await;
        self.direct.close().await;
        self.backend.consumers.close(CLOSE_GRACE).await;
        self.backend.transactions.close(CLOSE_GRACE).await;
        let flushed = self.backend.publisher.close().await;
        self.closing.cancel();
        if let Some(running) = running.take() {
            running.probe.stop().await;
            // A preparer that panicked has ended too.
            let _ = running.preparer.await;
        }
        self.backend.admin.close();
        self.backend.reaper.finish().await;
        self.backend.link.down("closed", false);
        if flushed {
            Ok(())
        } else {
            Err(Error::unknown(
                ErrorCode::PublishFailed,
                "some messages had no outcome when the producer was closed",
            )
            .at(BrokerType::Kafka))
        }
    }

    async fn health_check(&self) -> Result<()> {
        self.open()?;
        use rdkafka::consumer::Consumer as _;
        let brokers = self
            .backend
            .admin
            .ask(|asker| {
                asker
                    .fetch_metadata(Some(HEALTH_TOPIC), HEALTH)
                    .map(|m| m.brokers().len())
                    .map_err(|e| failed(ErrorCode::BrokerUnavailable, "Kafka does not answer", e))
            })
            .await?;
        if brokers == 0 {
            return Err(Error::new(
                ErrorCode::BrokerUnavailable,
                "Kafka answers, but has no broker that is alive",
            )
            .at(BrokerType::Kafka));
        }
        Ok(())
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.backend.link.watch()
    }

    fn endpoints(&self) -> Vec<String> {
        self.backend.config.brokers.clone()
    }

    /// Kafka tells its clients no version.
    fn server_version(&self) -> Option<String> {
        None
    }

    fn recorder(&self) -> &Arc<MetricsRecorder> {
        &self.backend.recorder
    }

    async fn lanes(&self, topic: &Topic) -> u32 {
        let facts = match self.backend.topics.get(topic) {
            Some(facts) => Some(facts),
            None if self.is_connected() => self.backend.admin.facts(topic).await.ok().flatten(),
            None => None,
        };
        facts.map_or(1, |f| u32::try_from(f.partitions).unwrap_or(1).max(1))
    }

    fn lane_of(&self, _: &Topic, order: &OrderKey, partition: Option<i32>, lanes: u32) -> u32 {
        let lanes = lanes.max(1);
        let count = i32::try_from(lanes).unwrap_or(i32::MAX);
        let partition = self
            .backend
            .publisher
            .partitioner()
            .partition(order, partition, count);
        // A partition that does not exist is refused by whichever lane gets it.
        u32::try_from(partition).unwrap_or(0).min(lanes - 1)
    }

    async fn open_lane(&self, topic: &Topic, lane: u32, options: &LaneOptions) -> Result<Lane> {
        self.open()?;
        if !self.is_connected() {
            return Err(self.backend.away().on(topic.as_str()));
        }
        let open = async {
            let facts = self.backend.known_or_made(topic).await?;
            // A lane beyond the partitions was numbered while the cluster was
            // away and its topic thought larger. It still keeps its keys in
            // order: each record's partition is worked out when it is written.
            if lane >= u32::try_from(facts.partitions).unwrap_or(0) {
                tracing::info!(target: "messaging_hub::kafka", %topic, lane,
                    partitions = facts.partitions, "a lane is numbered beyond the partitions");
            }
            if let Err(error) = self.backend.admin.learn_limit(topic).await {
                // Describing needs a permission of its own; without it batches
                // are as large as configured.
                tracing::debug!(target: "messaging_hub::kafka", %error, "max.message.bytes is not known");
            }
            self.backend
                .publisher
                .open(topic, facts.partitions, options)
        };
        tokio::time::timeout(options.open_timeout, open)
            .await
            .map_err(|_| {
                Error::new(
                    ErrorCode::ConnectionTimeout,
                    "the lane was not ready within its open_timeout",
                )
                .at(BrokerType::Kafka)
                .on(topic.as_str())
            })?
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        self.open()?;
        self.backend.consumers.start(&self.backend, source, options)
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
            .start(self, source, options, handler, &self.backend.recorder)
            .await
    }

    async fn unsubscribe(&self, pattern: &Pattern) -> Result<()> {
        self.subscriptions.unsubscribe(pattern).await
    }

    fn event_stream(&self) -> Option<&dyn EventStreamBroker> {
        Some(self)
    }

    fn transactions(&self) -> Option<&dyn TransactionalBroker> {
        Some(self)
    }

    async fn ensure(&self, source: &Source) -> Result<()> {
        self.open()?;
        // Wildcards mean the topics that exist; there is nothing to make.
        let Some(topic) = source.pattern().literal() else {
            return Ok(());
        };
        if self.backend.admin.look_up(&topic).await?.is_none() {
            self.backend.make(&topic).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl EventStreamBroker for KafkaBroker {
    async fn create_topic(&self, topic: &Topic, options: &TopicOptions) -> Result<()> {
        self.open()?;
        let backend = &self.backend;
        if backend.admin.create(topic, options).await? {
            backend.recorder.topics_created.inc();
            return Ok(());
        }
        let facts = backend.known(topic).await?;
        if facts.partitions != options.partitions {
            return Err(Error::new(
                ErrorCode::TopicCreateFailed,
                format!(
                    "the topic exists with {} partitions, not {}",
                    facts.partitions, options.partitions
                ),
            )
            .at(BrokerType::Kafka)
            .on(topic.as_str()));
        }
        let settings = backend.admin.settings(topic).await?;
        for (name, wanted) in super::admin::wanted_settings(options) {
            let actual = settings.get(&name).map_or("", String::as_str);
            if !topology::same(&wanted, actual) {
                return Err(Error::new(
                    ErrorCode::TopicCreateFailed,
                    format!("the topic exists with {name} = {actual}, not {wanted}"),
                )
                .at(BrokerType::Kafka)
                .on(topic.as_str()));
            }
        }
        Ok(())
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.open()?;
        self.backend.admin.delete(topic).await
    }

    async fn list_topics(&self) -> Result<Vec<Topic>> {
        self.open()?;
        self.backend.admin.list().await
    }

    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata> {
        self.open()?;
        self.backend.admin.describe(topic).await
    }

    async fn locate(&self, topic: &Topic, at: SeekTo) -> Result<BTreeMap<i32, i64>> {
        self.open()?;
        groups::locate(&self.backend, topic, at).await
    }

    async fn create_consumer_group(
        &self,
        group: &str,
        pattern: &Pattern,
        reset: SeekTo,
    ) -> Result<()> {
        self.open()?;
        groups::create(&self.backend, group, pattern, reset).await
    }

    async fn delete_consumer_group(&self, group: &str) -> Result<()> {
        self.open()?;
        self.backend.admin.delete_group(group).await
    }

    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()> {
        self.open()?;
        groups::commit(&self.backend, group, topic, partition, next).await
    }

    async fn offset(&self, group: &str, topic: &Topic, partition: i32) -> Result<Option<i64>> {
        self.open()?;
        groups::committed(&self.backend, group, topic, partition).await
    }

    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        self.open()?;
        if matches!(to, SeekTo::Offset(o) if o < 0) {
            return Err(invalid("an offset must not be negative").on(topic.as_str()));
        }
        groups::seek(&self.backend, group, topic, partition, to).await
    }
}

impl TransactionalBroker for KafkaBroker {
    fn transactor(&self, id: Option<&str>) -> Result<Transactor> {
        self.open()?;
        self.backend.transactions.transactor(&self.backend, id)
    }

    fn transform(
        &self,
        source: &Source,
        options: &SubscribeOptions,
        id: &str,
        transformer: Arc<dyn Transformer>,
    ) -> Result<ConsumerControl> {
        self.open()?;
        let transactions = &self.backend.transactions;
        transactions.transform(&self.backend, source, options, id, transformer)
    }
}

impl Drop for KafkaBroker {
    fn drop(&mut self) {
        // Not closed, just forgotten: the probe ends with the preparer.
        self.closing.cancel();
        self.backend.transactions.abandon();
    }
}

impl std::fmt::Debug for KafkaBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaBroker")
            .field("brokers", &self.backend.config.brokers)
            .field("connection", &*self.backend.link.watch().borrow())
            .finish_non_exhaustive()
    }
}

/// Prepares the cluster each time that it is found, then says that it is up.
struct Preparer {
    backend: Arc<Backend>,
    probe: Arc<Probe>,
    mode: TopologyMode,
    looked: bool,
}

impl Preparer {
    async fn run(mut self, mut finds: mpsc::Receiver<()>, closing: CancellationToken) {
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                found = finds.recv() => if found.is_none() { return },
            }
            // Bounded, because a cluster that answers is of use even where its
            // topics could not be looked at.
            if tokio::time::timeout(PREPARE, self.prepare()).await.is_err() {
                tracing::warn!(target: "messaging_hub::kafka", "the topology was not looked at in time");
            }
            // Found a moment ago may be lost by now.
            if self.probe.is_alive() {
                self.backend.link.up();
            }
        }
    }

    async fn prepare(&mut self) {
        let backend = &self.backend;
        let apply = match self.mode {
            TopologyMode::Ignore => return,
            TopologyMode::Apply => true,
            TopologyMode::Check => false,
        };
        // After the first time only what went missing needs a look, and the
        // probe has just brought all names: reconnects stay quick.
        let missing = topology::wanted(&backend.topology)
            .iter()
            .any(|(name, _)| backend.topics.get(name).is_none());
        if self.looked && !missing {
            return;
        }
        match topology::look(&backend.admin, &backend.topology, apply).await {
            Ok(report) => {
                self.looked = true;
                backend
                    .recorder
                    .topics_created
                    .add(report.created.len() as u64);
                for drift in &report.drift {
                    tracing::warn!(target: "messaging_hub::kafka", "topology: {drift}");
                }
                for name in &report.missing {
                    tracing::warn!(target: "messaging_hub::kafka", "topology: {name} is missing");
                }
            }
            Err(error) => {
                tracing::warn!(target: "messaging_hub::kafka", %error, "the topology could not be looked at");
            }
        }
    }
}

/// How long readers may take to settle what they hold when the broker closes.
const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// After a first error, another address may still answer.
const SECOND_CHANCE: Duration = Duration::from_secs(1);

/// How long preparing may take before the cluster counts as up all the same.
const PREPARE: Duration = Duration::from_secs(15);

/// How long a health check may take.
const HEALTH: Duration = Duration::from_secs(3);

/// A topic that every cluster knows or denies; either is an answer.
const HEALTH_TOPIC: &str = "__consumer_offsets";
