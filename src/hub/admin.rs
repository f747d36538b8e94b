//! Asking and changing the brokers through the hub.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt, future::join_all, stream};

use super::{
    MessagingHub,
    consume::STREAM_GROUP,
    controls::Hold,
    lock,
    route::RouteKind,
    state::{BrokerState, DrainState, HubState, LaneState, RouteState, SpoolState},
};
use crate::{
    broker::{BrokerType, QueueOptions, QueueStats, SeekTo, TopicMetadata, TopicOptions},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
    topic::Topic,
    topology::TopologyReport,
};

impl MessagingHub {
    /// Declares a queue on its primary.
    ///
    /// # Errors
    /// `QUEUE_DECLARE_FAILED` that names what differs.
    pub async fn declare_queue(&self, queue: &str, options: &QueueOptions) -> Result<()> {
        let queue = self.canonical(queue)?;
        let entry = self.entry(&queue)?;
        match entry.broker.task_queue() {
            Some(broker) => broker.declare_queue(&queue, options).await,
            None => Err(unsupported(entry.broker.broker_type(), "queues").on(queue.as_str())),
        }
    }

    /// The state of a queue.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`.
    pub async fn queue_stats(&self, queue: &str) -> Result<QueueStats> {
        let queue = self.canonical(queue)?;
        let entry = self.entry(&queue)?;
        match entry.broker.task_queue() {
            Some(broker) => broker.queue_stats(&queue).await,
            None => Err(unsupported(entry.broker.broker_type(), "queues").on(queue.as_str())),
        }
    }

    /// Makes a topic on its primary.
    ///
    /// # Errors
    /// `TOPIC_CREATE_FAILED`.
    pub async fn create_topic(&self, topic: &str, options: &TopicOptions) -> Result<()> {
        let topic = self.canonical(topic)?;
        let entry = self.entry(&topic)?;
        match entry.broker.event_stream() {
            Some(broker) => broker.create_topic(&topic, options).await,
            None => Err(unsupported(entry.broker.broker_type(), "streams").on(topic.as_str())),
        }
    }

    /// The state of a topic.
    ///
    /// # Errors
    /// `TOPIC_NOT_FOUND`.
    pub async fn topic_metadata(&self, topic: &str) -> Result<TopicMetadata> {
        let topic = self.canonical(topic)?;
        let entry = self.entry(&topic)?;
        match entry.broker.event_stream() {
            Some(broker) => broker.topic_metadata(&topic).await,
            None => Err(unsupported(entry.broker.broker_type(), "streams").on(topic.as_str())),
        }
    }

    /// The streams that exist now, on the brokers that events are routed to.
    ///
    /// # Errors
    /// Why a broker cannot be asked.
    pub async fn list_topics(&self) -> Result<Vec<Topic>> {
        let table = lock(&self.0.routes).clone();
        let mut found = Vec::new();
        for broker in self.all_brokers() {
            let routed = table
                .all()
                .iter()
                .any(|r| r.kind == RouteKind::Event && r.primary == broker.broker_type());
            if let Some(streams) = broker.event_stream().filter(|_| routed) {
                found.extend(streams.list_topics().await?);
            }
        }
        Ok(found)
    }

    /// Commits a group's positions: for each topic and partition the offset of
    /// the next message that it has not handled.
    ///
    /// # Errors
    /// The first broker's error; positions before it are committed.
    pub async fn commit_positions(
        &self,
        group: &str,
        positions: &BTreeMap<(String, i32), i64>,
    ) -> Result<()> {
        for ((topic, partition), next) in positions {
            let topic = self.canonical(topic)?;
            let entry = self.entry(&topic)?;
            match entry.broker.event_stream() {
                Some(broker) => {
                    broker
                        .commit_offset(group, &topic, *partition, *next)
                        .await?;
                }
                None => {
                    return Err(
                        unsupported(entry.broker.broker_type(), "streams").on(topic.as_str())
                    );
                }
            }
        }
        Ok(())
    }

    /// Sets a group's positions where its reader says that it stands, which may lie
    /// before what was handed to it: that is handed out again.
    ///
    /// # Errors
    /// As [`MessagingHub::seek`]; the first broker's error.
    pub async fn resume_group(
        &self,
        group: &str,
        positions: &BTreeMap<(String, i32), i64>,
    ) -> Result<()> {
        self.forget_handled(group).await?;
        self.commit_positions(group, positions).await
    }

    /// A group's position is moved on purpose: what it handled is new again, here
    /// and after a restart.
    #[cfg_attr(
        not(feature = "journal"),
        allow(clippy::unused_async, reason = "only a disk is waited for")
    )]
    async fn forget_handled(&self, group: &str) -> Result<()> {
        let name = format!("{STREAM_GROUP}{group}");
        let known = lock(&self.0.groups).get(&name).cloned();
        if let Some(known) = known {
            known.forget();
        }
        #[cfg(feature = "journal")]
        self.forget_kept(&name).await?;
        Ok(())
    }

    /// Moves a group's position. What the group handled before may be handled
    /// again: that is what moving back is for.
    ///
    /// # Errors
    /// Why the broker refused; `OPERATION_CANCELED` when the data folder could not
    /// forget what the group handled.
    pub async fn seek(
        &self,
        group: &str,
        topic: &str,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        let topic = self.canonical(topic)?;
        let entry = self.entry(&topic)?;
        match entry.broker.event_stream() {
            Some(broker) => {
                self.forget_handled(group).await?;
                broker.seek(group, &topic, partition, to).await
            }
            None => Err(unsupported(entry.broker.broker_type(), "streams").on(topic.as_str())),
        }
    }

    /// Asks every broker whether it works.
    pub async fn health_check(&self) -> BTreeMap<BrokerType, Result<(), String>> {
        let mut health = BTreeMap::new();
        for broker in self.all_brokers() {
            let answer = broker.health_check().await.map_err(|e| e.to_string());
            health.insert(broker.broker_type(), answer);
        }
        health
    }

    /// Whether every broker is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.all_brokers().iter().all(|b| b.is_connected())
    }

    /// Looks at, or makes, the topology on every broker. One that is away hides
    /// nothing of the others: the report says so.
    ///
    /// # Errors
    /// Why the first could not be asked, when none could.
    ///
    /// # Cancel safety
    /// Dropping the future leaves what was made by then.
    pub async fn topology(&self, apply: bool) -> Result<TopologyReport> {
        self.topology_within(apply, Duration::MAX).await
    }

    /// As [`MessagingHub::topology`], for whoever waits for so long at most: a broker
    /// that has not answered by then is told as one that could not be asked.
    ///
    /// # Errors
    /// As [`MessagingHub::topology`].
    ///
    /// # Cancel safety
    /// As [`MessagingHub::topology`].
    pub(crate) async fn topology_within(
        &self,
        apply: bool,
        limit: Duration,
    ) -> Result<TopologyReport> {
        let brokers = self.all_brokers();
        let looks = brokers.iter().map(|broker| async move {
            let via = broker.broker_type();
            let look = tokio::time::timeout(limit, broker.topology(apply)).await;
            look.unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorCode::Timeout,
                    format!("it did not answer within {} s", limit.as_secs()),
                )
                .at(via))
            })
            .map_err(|error| (via, error))
        });
        let mut report = TopologyReport::default();
        let mut first = None;
        for look in join_all(looks).await {
            match look {
                Ok(found) => report.merge(found),
                Err((via, error)) => {
                    report.unreachable.push(format!("{via}: {error}"));
                    first = first.or(Some(error));
                }
            }
        }
        match first {
            Some(error) if report.unreachable.len() == brokers.len() => Err(error),
            _ => Ok(report),
        }
    }

    /// What operators see, in the shape of `/v1/state`.
    #[must_use]
    pub fn state(&self) -> HubState {
        let table = lock(&self.0.routes).clone();
        let connected: BTreeMap<BrokerType, bool> = self
            .all_brokers()
            .iter()
            .map(|b| (b.broker_type(), b.is_connected()))
            .collect();
        let rules = self.0.controls.borrow().clone();
        #[cfg(feature = "journal")]
        let durable = self.spool_is_durable();
        #[cfg(not(feature = "journal"))]
        let durable = false;
        let canaries = lock(&self.0.canaries).clone();
        let mut routes: Vec<RouteState> = table
            .all()
            .iter()
            .map(|r| RouteState {
                pattern: r.pattern.to_string(),
                kind: r.kind,
                primary: r.primary,
                state: LaneState::Primary,
                spool: SpoolState {
                    durable: durable && r.spool,
                    ..SpoolState::default()
                },
                drain: DrainState::default(),
                paused: rules.of_pattern(&r.pattern).hold != Hold::Nothing,
                canary: canaries.get(&r.pattern).map(|c| c.borrow().clone()),
            })
            .collect();
        let now = Timestamp::now();
        let mut has_lane = vec![false; routes.len()];
        for (key, handle) in &*lock(&self.0.lanes) {
            let Some((at, _)) = table.find(&key.topic) else {
                continue;
            };
            let (Some(route), Some(seen)) = (routes.get_mut(at), has_lane.get_mut(at)) else {
                continue;
            };
            *seen = true;
            handle.status.add_to(route, now);
        }
        for (route, has_lane) in routes.iter_mut().zip(has_lane) {
            // A route that nothing was published to yet is as its broker is.
            let up = connected.get(&route.primary).copied().unwrap_or(false);
            if !has_lane && !up {
                route.state = LaneState::Degraded;
            }
            route.drain = lock(&self.0.drain_rates).of(
                &route.pattern,
                route.drain.remaining,
                route.spool.messages,
            );
        }
        #[cfg_attr(not(feature = "journal"), allow(unused_mut, reason = "no disk fails"))]
        let mut weakened = lock(&self.0.weakened).clone();
        #[cfg(feature = "journal")]
        weakened.extend(self.memory_weakness());
        HubState {
            version: env!("CARGO_PKG_VERSION"),
            routes,
            brokers: self
                .all_brokers()
                .iter()
                .map(|b| {
                    let state = b.connection().borrow().clone();
                    let health = lock(&self.0.health).get(&b.broker_type()).cloned();
                    let probe = health.as_ref().and_then(|h| h.last());
                    BrokerState {
                        breaker: health.as_ref().map(|h| h.state()),
                        last_probe: probe.as_ref().map(|(at, _)| *at),
                        probe_error: probe.and_then(|(_, error)| error),
                        kind: b.broker_type(),
                        connected: state.connected,
                        reason: state.reason.map(|r| r.to_string()),
                        endpoints: b.endpoints(),
                        server_version: b.server_version(),
                    }
                })
                .collect(),
            weakened,
        }
    }

    /// The depth of every queue of the topology whose broker can say.
    pub async fn queue_depths(&self) -> BTreeMap<String, u64> {
        let queues = self.0.topology.queues.iter().map(|q| q.name.clone());
        let tasks: Vec<String> = queues
            .filter(|name| self.kind_of(name) == RouteKind::Task)
            .collect();
        let asked = tasks.into_iter().map(|queue| async move {
            let stats = self.queue_stats(&queue).await.ok()?;
            Some((queue, stats.messages_ready))
        });
        // Several at once: a broker that is slow to answer is not waited for by each.
        let known: Vec<_> = stream::iter(asked).buffer_unordered(ASKED).collect().await;
        known.into_iter().flatten().collect()
    }
}

/// Queues that are asked for at a time.
const ASKED: usize = 16;

fn unsupported(broker: BrokerType, what: &str) -> Error {
    Error::rejected(
        ErrorCode::InvalidConfig,
        format!("{broker} has no {what}; route the topic to a broker that has"),
    )
    .at(broker)
}
