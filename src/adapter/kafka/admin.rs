//! Making, deleting and describing topics and groups. Each call has a time-out
//! and never blocks a runtime worker.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    config::FromClientConfigAndContext,
    consumer::Consumer as _,
    error::KafkaError,
    types::{RDKafkaErrorCode as Code, RDKafkaRespErr},
};

use super::{
    client,
    config::KafkaConfig,
    connection::Asker,
    consumer::steady,
    error::{failed, invalid, raw_code},
    link::{Link, LinkContext},
    producer::Reaper,
    topics::{TopicFacts, Topics},
};
use crate::{
    broker::{BrokerType, PartitionMetadata, TopicMetadata, TopicOptions},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
    topic::Topic,
};

/// Administers a cluster.
pub(super) struct Admin {
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    topics: Arc<Topics>,
    asker: Mutex<Option<Arc<Asker>>>,
    client: Mutex<Option<Arc<AdminClient<LinkContext>>>>,
    reaper: Reaper,
}

/// The settings of a topic, as the broker tells them.
pub(super) type Settings = BTreeMap<String, String>;

impl Admin {
    pub(super) fn new(
        config: Arc<KafkaConfig>,
        link: Arc<Link>,
        topics: Arc<Topics>,
        reaper: Reaper,
    ) -> Self {
        Self {
            config,
            link,
            topics,
            asker: Mutex::default(),
            client: Mutex::default(),
            reaper,
        }
    }

    /// The client that only asks, made at first use.
    pub(super) fn asker(&self) -> Result<Arc<Asker>> {
        once(&self.asker, || {
            super::connection::asker(&self.config, &self.link)
        })
    }

    /// Runs a blocking question on a blocking thread.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Asker) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let asker = self.asker()?;
        tokio::task::spawn_blocking(move || question(&asker))
            .await
            .map_err(|e| Error::new(ErrorCode::UnknownError, "a look-up panicked").caused_by(e))?
    }

    /// What is known of a topic; asks when nothing is. `None`: the cluster says
    /// that there is none.
    pub(super) async fn facts(&self, topic: &Topic) -> Result<Option<TopicFacts>> {
        if let Some(facts) = self.topics.get(topic) {
            return Ok(Some(facts));
        }
        self.look_up(topic).await
    }

    /// Asks the cluster about one topic. One that may not be seen is an error: nobody
    /// says whether there is one.
    pub(super) async fn look_up(&self, topic: &Topic) -> Result<Option<TopicFacts>> {
        let topics = Arc::clone(&self.topics);
        let name = topic.clone();
        self.ask(move |asker| {
            let look = || asker.fetch_metadata(Some(&name), QUESTION);
            // The connection broke under the question; the next makes another.
            let broke = |e: &KafkaError| raw_code(e) == Some(Code::BrokerTransportFailure);
            let metadata = match look() {
                Err(e) if broke(&e) => look(),
                answer => answer,
            };
            let metadata = metadata.map_err(|e| {
                failed(ErrorCode::ConnectionFailed, "looking up a topic", e).on(name.as_str())
            })?;
            topics.learn(&metadata, false);
            let facts = topics.get(&name);
            let denied = metadata.topics().iter().any(|t| t.error() == Some(DENIED));
            if facts.is_none() && denied {
                return Err(Error::rejected(
                    ErrorCode::AuthenticationFailed,
                    "not permitted to see whether there is such a topic; permit this client to read it or to write to it",
                )
                .at(BrokerType::Kafka)
                .on(name.as_str()));
            }
            Ok(facts)
        })
        .await
    }

    /// Looks up the largest batch of a topic, once.
    pub(super) async fn learn_limit(&self, topic: &Topic) -> Result<()> {
        if self
            .topics
            .get(topic)
            .is_some_and(|f| f.max_bytes.is_some())
        {
            return Ok(());
        }
        let settings = self.settings(topic).await?;
        if let Some(bytes) = settings
            .get("max.message.bytes")
            .and_then(|v| v.parse().ok())
        {
            self.topics.set_max_bytes(topic, bytes);
        }
        Ok(())
    }

    /// Makes a topic. True: it was made; false: it existed.
    pub(super) async fn create(&self, topic: &Topic, options: &TopicOptions) -> Result<bool> {
        if options.partitions < 1 || options.replication < 1 {
            return Err(
                invalid("a topic has at least one partition and one replica").on(topic.as_str()),
            );
        }
        let wanted = wanted_settings(options);
        let mut new = NewTopic::new(
            topic,
            options.partitions,
            TopicReplication::Fixed(options.replication),
        );
        for (name, value) in &wanted {
            new = new.set(name, value);
        }
        let client = self.client()?;
        let results = client
            .create_topics([&new], &self.options())
            .await
            .map_err(|e| {
                failed(ErrorCode::TopicCreateFailed, "creating a topic", e).on(topic.as_str())
            })?;
        let made = match results.into_iter().next() {
            Some(Err((_, Code::TopicAlreadyExists))) => false,
            Some(Err((_, code))) => {
                return Err(Error::new(
                    ErrorCode::TopicCreateFailed,
                    format!("the broker refused to create the topic: {code}"),
                )
                .at(BrokerType::Kafka)
                .on(topic.as_str()));
            }
            Some(Ok(_)) | None => true,
        };
        // Brokers learn of a new topic one after the other.
        let until = tokio::time::Instant::now() + SETTLE;
        while self.look_up(topic).await?.is_none() && tokio::time::Instant::now() < until {
            tokio::time::sleep(SETTLE_STEP).await;
        }
        Ok(made)
    }

    /// Deletes a topic.
    pub(super) async fn delete(&self, topic: &Topic) -> Result<()> {
        let client = self.client()?;
        let results = client
            .delete_topics(&[topic.as_str()], &self.options())
            .await
            .map_err(|e| {
                failed(ErrorCode::UnknownError, "deleting a topic", e).on(topic.as_str())
            })?;
        self.topics.forget(topic);
        match results.into_iter().next() {
            Some(Err((_, Code::UnknownTopicOrPartition | Code::UnknownTopic))) => {
                Err(not_found(topic))
            }
            Some(Err((_, code))) => Err(Error::new(
                ErrorCode::UnknownError,
                format!("the broker refused to delete the topic: {code}"),
            )
            .at(BrokerType::Kafka)
            .on(topic.as_str())),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// All topics but Kafka's own.
    pub(super) async fn list(&self) -> Result<Vec<Topic>> {
        let topics = Arc::clone(&self.topics);
        self.ask(move |asker| {
            let metadata = asker
                .fetch_metadata(None, QUESTION)
                .map_err(|e| failed(ErrorCode::ConnectionFailed, "listing topics", e))?;
            topics.learn(&metadata, true);
            let mut names: Vec<Topic> = metadata
                .topics()
                .iter()
                .filter(|t| !t.name().starts_with("__"))
                .filter_map(|t| Topic::new(t.name()).ok())
                .collect();
            names.sort();
            Ok(names)
        })
        .await
    }

    /// The state of a topic, asked now.
    pub(super) async fn describe(&self, topic: &Topic) -> Result<TopicMetadata> {
        let partitions = self.partitions(topic).await?;
        let settings = self.settings(topic).await?;
        Ok(TopicMetadata {
            name: topic.as_str().to_owned(),
            replication_factor: partitions
                .first()
                .and_then(|p| i32::try_from(p.replicas.len()).ok())
                .unwrap_or(0),
            partitions,
            retention_ms: settings
                .get("retention.ms")
                .and_then(|v| v.parse().ok())
                .filter(|ms: &i64| *ms >= 0),
            cleanup_policy: settings.get("cleanup.policy").cloned().unwrap_or_default(),
            timestamp: Timestamp::now(),
        })
    }

    /// The partitions of a topic with their watermarks.
    async fn partitions(&self, topic: &Topic) -> Result<Vec<PartitionMetadata>> {
        let name = topic.clone();
        self.ask(move |asker| {
            let fail =
                |e| failed(ErrorCode::ConnectionFailed, "describing a topic", e).on(name.as_str());
            let metadata = asker.fetch_metadata(Some(&name), QUESTION).map_err(fail)?;
            let found = metadata.topics().iter().find(|t| {
                t.name() == name.as_str() && t.error().is_none() && !t.partitions().is_empty()
            });
            let mut partitions = Vec::new();
            for p in found.ok_or_else(|| not_found(&name))?.partitions() {
                let (low, high) =
                    steady(|| asker.fetch_watermarks(&name, p.id(), QUESTION)).map_err(fail)?;
                partitions.push(PartitionMetadata {
                    id: p.id(),
                    leader: p.leader(),
                    replicas: p.replicas().to_vec(),
                    isr: p.isr().to_vec(),
                    low_watermark: low,
                    high_watermark: high,
                });
            }
            partitions.sort_by_key(|p| p.id);
            Ok(partitions)
        })
        .await
    }

    /// Partitions and copies of a topic; `None` when there is no such topic.
    pub(super) async fn shape(&self, topic: &Topic) -> Result<Option<(i32, i32)>> {
        match self.partitions(topic).await {
            Ok(partitions) => {
                let copies = partitions.first().map_or(0, |p| p.replicas.len());
                Ok(Some((
                    i32::try_from(partitions.len()).unwrap_or(i32::MAX),
                    i32::try_from(copies).unwrap_or(i32::MAX),
                )))
            }
            Err(e) if e.code() == ErrorCode::TopicNotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The settings of a topic, defaults included.
    pub(super) async fn settings(&self, topic: &Topic) -> Result<Settings> {
        let client = self.client()?;
        let fail =
            |e| failed(ErrorCode::UnknownError, "reading a topic's settings", e).on(topic.as_str());
        let mut found = client
            .describe_configs([&ResourceSpecifier::Topic(topic)], &self.options())
            .await
            .map_err(fail)?;
        match found.pop() {
            Some(Ok(resource)) => Ok(resource
                .entries
                .into_iter()
                .filter_map(|e| Some((e.name, e.value?)))
                .collect()),
            Some(Err(code)) => Err(fail(rdkafka::error::KafkaError::AdminOp(code))),
            None => Err(not_found(topic)),
        }
    }

    /// Forgets a group and its positions.
    pub(super) async fn delete_group(&self, group: &str) -> Result<()> {
        let client = self.client()?;
        let results = client
            .delete_groups(&[group], &self.options())
            .await
            .map_err(|e| failed(ErrorCode::UnknownError, "deleting a group", e))?;
        match results.into_iter().next() {
            Some(Err((_, code))) => Err(Error::new(
                ErrorCode::UnknownError,
                match code {
                    Code::NonEmptyGroup => {
                        format!("group {group:?} has live members; stop them first")
                    }
                    Code::GroupIdNotFound => format!("there is no group {group:?}"),
                    other => format!("the broker refused to delete group {group:?}: {other}"),
                },
            )
            .at(BrokerType::Kafka)),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// Lets go of the clients, where that may block.
    pub(super) fn close(&self) {
        if let Some(client) = lock(&self.client).take() {
            self.reaper.drop_aside(client);
        }
        if let Some(asker) = lock(&self.asker).take() {
            self.reaper.drop_aside(asker);
        }
    }

    fn client(&self) -> Result<Arc<AdminClient<LinkContext>>> {
        once(&self.client, || {
            // The client poses as a producer, so a consumer's settings are
            // not for it.
            let settings = client::base(&self.config)?;
            AdminClient::from_config_and_context(&settings, LinkContext(Arc::clone(&self.link)))
                .map(Arc::new)
                .map_err(|e| failed(ErrorCode::InvalidConfig, "the client's settings", e))
        })
    }

    fn options(&self) -> AdminOptions {
        AdminOptions::new()
            .request_timeout(Some(ADMIN))
            .operation_timeout(Some(ADMIN))
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.close();
    }
}

/// What is in the place, made when nothing is.
fn once<T>(place: &Mutex<Option<Arc<T>>>, make: impl FnOnce() -> Result<Arc<T>>) -> Result<Arc<T>> {
    let mut place = lock(place);
    if let Some(made) = &*place {
        return Ok(Arc::clone(made));
    }
    let made = make()?;
    *place = Some(Arc::clone(&made));
    Ok(made)
}

fn lock<T>(place: &Mutex<Option<T>>) -> MutexGuard<'_, Option<T>> {
    // Filled and emptied in one step, so a poisoned one is whole.
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The settings that options stand for, by Kafka's names.
pub(super) fn wanted_settings(options: &TopicOptions) -> Settings {
    let mut wanted = options.settings.clone();
    wanted.insert("retention.ms".to_owned(), options.retention_ms.to_string());
    wanted.insert("cleanup.policy".to_owned(), options.cleanup_policy.clone());
    let compression = match options.compression.as_str() {
        "" => "producer",
        "none" => "uncompressed",
        other => other,
    };
    wanted.insert("compression.type".to_owned(), compression.to_owned());
    if let Some(bytes) = options.max_message_bytes {
        wanted.insert("max.message.bytes".to_owned(), bytes.to_string());
    }
    wanted
}

/// A topic that does not exist.
pub(super) fn not_found(topic: &Topic) -> Error {
    Error::rejected(
        ErrorCode::TopicNotFound,
        "the topic does not exist; create it, or set kafka.auto_create_topics",
    )
    .at(BrokerType::Kafka)
    .on(topic.as_str())
}

/// What the cluster says of a topic that this client may not even know of.
const DENIED: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;

/// How long one question may take.
const QUESTION: Duration = Duration::from_secs(3);

/// How long an administrative request may take.
const ADMIN: Duration = Duration::from_secs(10);

/// How long brokers may take to learn of a new topic.
const SETTLE: Duration = Duration::from_secs(5);

/// Between looks at a new topic.
const SETTLE_STEP: Duration = Duration::from_millis(50);
