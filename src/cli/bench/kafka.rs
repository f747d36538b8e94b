//! Kafka: producing (acks all, lz4, idempotent) and consuming, through the hub
//! and by bare rdkafka, on the same topic with the same bytes.
//!
//! Consuming reads what was produced before, each run as a new group. The hub
//! handles by key and commits what is handled; the bare consumer only counts.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::task::JoinSet;

use super::{
    Plan,
    baseline::kafka::{self, RawProducer},
    embedded::KEYS,
    latency::{Latencies, Tally},
    leftovers::Leftovers,
    load::{Load, Shape},
    payload::Bodies,
    published::Published,
    readers::Readers,
    report::Report,
    run::{ARRIVAL, Group, Row, Run, wait_until},
    through_hub::{self, How},
};
use crate::{
    adapter::kafka::KafkaConfig, broker::TopicOptions, cli::Failure, config::MessagingConfig,
    hub::MessagingHub,
};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let brokers = plan.options.kafka().ok_or_else(|| {
        Failure::usage(
            "no Kafka is named: give one with --kafka host:port or KAFKA_BROKERS; `scripts/brokers start kafka-4 DIR` starts one",
        )
    })?;
    let bodies = Bodies::new(plan.shape.size, false)?;
    let topic = format!("events.bench.{}", plan.suffix);
    let backlog = format!("events.bench-backlog.{}", plan.suffix);
    let mut topics = vec![&topic];
    if plan.shape.consumers > 0 {
        topics.push(&backlog);
    }
    for topic in topics {
        plan.leftovers.topic(&brokers, topic);
        kafka::create_topic(&brokers, topic, PARTITIONS).await?;
    }
    let config = config(&brokers, [&topic, &backlog], &plan.shape);
    let system = through_hub::start(config.clone()).await?;
    let producers: Result<Vec<_>, _> = (0..plan.shape.producers)
        .map(|_| RawProducer::connect(&brokers))
        .collect();
    let raw = RawProduce {
        topic: topic.clone(),
        shape: plan.shape.clone(),
        bodies: bodies.clone(),
        producers: producers?,
    };
    let mut groups: Vec<Group> = Vec::new();
    let mut filled = 0;
    if plan.shape.consumers > 0 {
        plan.progress.say("filling the topic that is consumed");
        // As fast as it goes, whatever the rate of the runs.
        let fill = Shape {
            rate: None,
            ..plan.shape.clone()
        };
        let done = raw
            .publish(&backlog, keyed(&fill, fill.time, &bodies))
            .await?;
        filled = done.messages();
        let side = ReadSide {
            brokers: brokers.clone(),
            topic: backlog.clone(),
            shape: plan.shape.clone(),
            there: filled,
            suffix: plan.suffix.clone(),
            leftovers: plan.leftovers.clone(),
            next: Arc::default(),
        };
        groups.push(vec![
            Box::new(HubConsume(side.clone(), system.hub())),
            Box::new(RawConsume(side)),
        ]);
    }
    groups.insert(
        0,
        vec![
            Box::new(HubProduce {
                hub: system.hub(),
                topic: topic.clone(),
                shape: plan.shape.clone(),
                bodies,
            }),
            Box::new(raw),
        ],
    );
    let mut report = plan.measure(groups).await?;
    report.servers(&system.hub().state().brokers);
    report.weakened(&config);
    report.set("partitions", PARTITIONS);
    report.set("keys", KEYS);
    if filled > 0 {
        report.set("backlog", filled);
        report.note("consuming reads what was produced before, so that it has no latency; -q bounds the hub's unfinished messages, the bare consumer has none");
    }
    system.close().await;
    Ok(report)
}

fn config(brokers: &str, topics: [&String; 2], shape: &Shape) -> MessagingConfig {
    let options = TopicOptions {
        partitions: PARTITIONS,
        ..TopicOptions::default()
    };
    let topics = topics.map(|t| (t.as_str(), options.clone()));
    MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: brokers.split(',').map(|b| b.trim().to_owned()).collect(),
            window: shape.window.saturating_mul(shape.producers),
            ..KafkaConfig::default()
        }),
        ..through_hub::config(&[], &topics)
    }
}

fn keyed(shape: &Shape, time: Duration, bodies: &Bodies) -> Vec<Load> {
    let mut loads = Load::split(shape, time, bodies);
    for load in &mut loads {
        load.keys = KEYS;
    }
    loads
}

fn began(loads: &[Load]) -> Instant {
    loads.first().map_or_else(Instant::now, |l| l.started)
}

struct HubProduce {
    hub: MessagingHub,
    topic: String,
    shape: Shape,
    bodies: Bodies,
}

#[async_trait]
impl Row for HubProduce {
    fn name(&self) -> String {
        "produce, hub".to_owned()
    }

    fn durability(&self) -> &'static str {
        DURABILITY
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let loads = keyed(&self.shape, time, &self.bodies);
        let started = began(&loads);
        let done = through_hub::publish(&self.hub, &self.topic, loads, How::Window).await?;
        through_hub::drained(&self.hub).await?;
        Ok(done.into_run(started))
    }
}

struct RawProduce {
    topic: String,
    shape: Shape,
    bodies: Bodies,
    producers: Vec<RawProducer>,
}

impl RawProduce {
    async fn publish(&self, topic: &str, loads: Vec<Load>) -> Result<Published, Failure> {
        let mut producing = JoinSet::new();
        for (load, producer) in loads.into_iter().zip(&self.producers) {
            let (producer, topic) = (producer.clone(), topic.to_owned());
            producing.spawn(async move { producer.publish(&topic, load).await });
        }
        through_hub::gather(producing).await
    }
}

#[async_trait]
impl Row for RawProduce {
    fn name(&self) -> String {
        "produce, rdkafka".to_owned()
    }

    fn durability(&self) -> &'static str {
        DURABILITY
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let loads = keyed(&self.shape, time, &self.bodies);
        let started = began(&loads);
        Ok(self.publish(&self.topic, loads).await?.into_run(started))
    }
}

/// What both sides of consuming work with.
#[derive(Clone)]
struct ReadSide {
    brokers: String,
    topic: String,
    shape: Shape,
    /// Messages in the topic.
    there: u64,
    suffix: String,
    leftovers: Leftovers,
    next: Arc<AtomicU64>,
}

impl ReadSide {
    /// A group that has read nothing.
    fn group(&self) -> String {
        let group = format!("bench-{}-{}", self.suffix, self.next.fetch_add(1, Relaxed));
        self.leftovers.group(&self.brokers, &group);
        group
    }

    /// Waits until everything was read, or the time since the first message is
    /// over; joining the group is not what is measured.
    async fn read(&self, tally: &Tally, time: Duration) -> Result<Run, Failure> {
        let none = || {
            format!(
                "nothing of {} was consumed within {} s; does the broker let groups join?",
                self.topic,
                ARRIVAL.as_secs()
            )
        };
        wait_until(ARRIVAL, none, || tally.count() > 0).await?;
        let until = Instant::now() + time;
        let over = || tally.count() >= self.there || Instant::now() >= until;
        wait_until(time + ARRIVAL, String::new, over).await?;
        Ok(Run::new(tally.count(), tally.span(), Latencies::new()))
    }
}

struct HubConsume(ReadSide, MessagingHub);

#[async_trait]
impl Row for HubConsume {
    fn name(&self) -> String {
        "consume, hub".to_owned()
    }

    fn durability(&self) -> &'static str {
        DURABILITY
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let Self(side, hub) = self;
        let tally = Arc::new(Tally::new());
        let group = side.group();
        let members = (0..side.shape.consumers).map(|_| group.clone());
        let unfinished = side.shape.prefetch;
        let readers =
            Readers::of_stream(hub, &side.topic, members, unfinished, false, &tally).await?;
        let run = side.read(&tally, time).await?;
        readers.stop().await;
        Ok(run)
    }
}

struct RawConsume(ReadSide);

#[async_trait]
impl Row for RawConsume {
    fn name(&self) -> String {
        "consume, rdkafka".to_owned()
    }

    fn durability(&self) -> &'static str {
        DURABILITY
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let Self(side) = self;
        let tally = Arc::new(Tally::new());
        let group = side.group();
        let mut consumers = Vec::new();
        for _ in 0..side.shape.consumers {
            let consumer = kafka::consume(&side.brokers, &side.topic, &group, tally.clone());
            consumers.push(consumer?);
        }
        let run = side.read(&tally, time).await?;
        for consumer in consumers {
            consumer.stop().await;
        }
        Ok(run)
    }
}

/// One replica, which writes to the page cache before it answers.
const DURABILITY: &str = "page cache";
const PARTITIONS: i32 = 6;
