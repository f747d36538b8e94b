//! The acceptance run in small: a broker is killed with -9 and comes back while
//! publishing goes on, and the ledger is checked with a client that is not ours.

#![cfg(all(feature = "rabbitmq", feature = "kafka", feature = "conformance"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use messaging_hub::{
    Message, MessageId, MessagingSystem, Outcome, Pattern,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{QueueOptions, TopicOptions},
    config::{DuringOutage, MessagingConfig, RouteKind, RouteSettings},
    conformance::ledger,
    hub::state::LaneState,
    secret::Secret,
};
use support::{Kafka, Rabbit, RabbitVersion, need, unique, wait};
use tokio::sync::watch;

/// Messages a second.
const RATE: u32 = 2_000;
/// Keys that order is kept by.
const KEYS: u64 = 50;
/// How long publishing goes on after the recovery.
const AFTERWARDS: Duration = Duration::from_secs(10);
const RECOVERY: Duration = Duration::from_secs(60);

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn payload(n: u64) -> Vec<u8> {
    format!("payload of message {n} {}", "x".repeat((n % 100) as usize)).into_bytes()
}

fn key(n: u64) -> String {
    format!("key-{}", n % KEYS)
}

/// What one publish became, and how long it took.
struct Record {
    n: u64,
    outcome: ledger::Outcome,
    took: Duration,
    started: Instant,
}

/// Publishes at a steady rate until told to stop; nothing it starts is left
/// unanswered.
async fn publish(
    system: Arc<MessagingSystem>,
    topic: String,
    mut stop: watch::Receiver<bool>,
) -> Vec<Record> {
    let publisher = system.hub().publisher(&topic).unwrap();
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    let each = u64::from(RATE) * 5 / 1000;
    let mut records = Vec::new();
    let mut pending = FuturesUnordered::new();
    let mut n = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                for _ in 0..each {
                    let message = Message::new("acceptance", payload(n))
                        .with_id(MessageId::new(format!("{topic}-{n}")).unwrap())
                        .with_key(key(n).as_str())
                        .with_header("n", n.to_string());
                    let started = Instant::now();
                    let accepted = publisher.enqueue(message).await.expect("room");
                    pending.push(async move { (n, started, accepted.await, started.elapsed()) });
                    n += 1;
                }
            }
            Some((n, started, result, took)) = pending.next() => {
                records.push(record(n, started, &result, took));
            }
            Ok(()) = stop.changed() => break,
        }
    }
    while let Some((n, started, result, took)) = pending.next().await {
        records.push(record(n, started, &result, took));
    }
    records
}

fn record(
    n: u64,
    started: Instant,
    result: &messaging_hub::Result<messaging_hub::Receipt>,
    took: Duration,
) -> Record {
    let outcome = match result {
        Ok(receipt) => match receipt.outcome {
            Outcome::Delivered { .. } => ledger::Outcome::Delivered,
            _ => ledger::Outcome::Spooled,
        },
        Err(error) => panic!("publish {n} failed: {error}"),
    };
    Record {
        n,
        outcome,
        took,
        started,
    }
}

type Seen = Arc<Mutex<Vec<(u32, LaneState)>>>;

/// Collects the states that a topic's lanes go to.
fn states(system: &MessagingSystem, topic: &str) -> (Seen, tokio::task::JoinHandle<()>) {
    let seen = Seen::default();
    let into = seen.clone();
    let mut changes = system.hub().state_changes();
    let topic = topic.to_owned();
    let task = tokio::spawn(async move {
        while let Ok(change) = changes.recv().await {
            if change.topic == topic {
                into.lock().unwrap().push((change.lane, change.to));
            }
        }
    });
    (seen, task)
}

fn history(
    topic: &str,
    records: &[Record],
    delivered: Vec<ledger::Delivered>,
    left: u64,
) -> ledger::History {
    ledger::History {
        published: records
            .iter()
            .map(|r| ledger::Published {
                publisher: "acceptance".to_owned(),
                topic: topic.to_owned(),
                key: Some(key(r.n)),
                seq: r.n,
                id: format!("{topic}-{}", r.n),
                payload_hash: hash(&payload(r.n)),
                outcome: r.outcome,
            })
            .collect(),
        delivered,
        expected_groups: BTreeMap::from([(
            topic.to_owned(),
            BTreeSet::from(["foreign".to_owned()]),
        )]),
        left_over: BTreeMap::from([("spool".to_owned(), left)]),
    }
}

fn spooled(system: &MessagingSystem) -> u64 {
    let state = system.hub().state();
    state.routes.iter().map(|r| r.spool.messages).sum()
}

/// The worst state of the routes of one kind, as `/v1/state` shows it.
fn worst(system: &MessagingSystem, kind: RouteKind) -> LaneState {
    let state = system.hub().state();
    let states = state.routes.iter().filter(|r| r.kind == kind);
    states.map(|r| r.state).max().unwrap_or_default()
}

fn report(name: &str, records: &[Record], verdict: &ledger::Verdict, outage: (Instant, Instant)) {
    let mut during: Vec<Duration> = records
        .iter()
        .filter(|r| r.started >= outage.0 + Duration::from_secs(1) && r.started < outage.1)
        .map(|r| r.took)
        .collect();
    during.sort();
    let p99 = during
        .get(during.len().saturating_sub(1) * 99 / 100)
        .copied()
        .unwrap_or_default();
    let slowest = records.iter().max_by_key(|r| r.took).expect("records");
    let worst = slowest.took;
    let at = slowest.started.saturating_duration_since(outage.0);
    println!(
        "{name}: {} published, {} spooled; during the outage ({} publishes) p99 {p99:?}; worst of all {worst:?} ({:?}, {at:?} after the kill; restart after {:?}); {verdict}",
        records.len(),
        records
            .iter()
            .filter(|r| r.outcome == ledger::Outcome::Spooled)
            .count(),
        during.len(),
        slowest.outcome,
        outage.1 - outage.0,
    );
}

fn check_states(name: &str, seen: &[(u32, LaneState)]) {
    let lanes: BTreeSet<u32> = seen.iter().map(|(lane, _)| *lane).collect();
    assert!(!lanes.is_empty(), "{name}: no state ever changed");
    for lane in lanes {
        let path: Vec<LaneState> = seen
            .iter()
            .filter(|(l, _)| *l == lane)
            .map(|(_, to)| *to)
            .collect();
        println!("{name}: lane {lane}: Primary -> {path:?}");
        assert!(
            path.contains(&LaneState::Degraded),
            "{name}: never degraded"
        );
        assert!(
            path.contains(&LaneState::Draining),
            "{name}: never draining"
        );
        assert_eq!(
            path.last(),
            Some(&LaneState::Primary),
            "{name}: not primary at the end"
        );
    }
}

/// Whether the last that was told of each lane is that it is primary.
fn has_come_back(seen: &[(u32, LaneState)]) -> bool {
    let last = last_told(seen);
    last.values().all(|state| *state == LaneState::Primary)
}

fn last_told(seen: &[(u32, LaneState)]) -> BTreeMap<u32, LaneState> {
    seen.iter().copied().collect()
}

/// What a run did.
struct Done {
    records: Vec<Record>,
    seen: Vec<(u32, LaneState)>,
    outage: (Instant, Instant),
}

/// Publishes, kills, goes on, restarts, recovers, goes on, stops.
async fn drive(
    system: &Arc<MessagingSystem>,
    topic: &str,
    kind: RouteKind,
    kill: impl AsyncFnOnce(),
    restart: impl AsyncFnOnce(),
) -> Done {
    let (seen, task) = states(system, topic);
    let (stop, stopped) = watch::channel(false);
    let publisher = tokio::spawn(publish(system.clone(), topic.to_owned(), stopped));
    let published = || system.hub().metrics().hub.publish_successes;
    wait::until(RECOVERY, "publishes before the kill", async || {
        published() >= 4_000
    })
    .await;
    let killed = Instant::now();
    kill().await;
    // Of each lane: until then its route may be called degraded for its broker alone,
    // and what is in doubt be confirmed by one that is back soon.
    let degraded = async || {
        let last = last_told(&seen.lock().unwrap());
        !last.is_empty()
            && last.values().all(|state| *state == LaneState::Degraded)
            && worst(system, kind) == LaneState::Degraded
    };
    wait::until(RECOVERY, "degraded lanes", degraded).await;
    let so_far = published();
    wait::until(RECOVERY, "publishes during the outage", async || {
        published() >= so_far + 4_000
    })
    .await;
    let returning = Instant::now();
    restart().await;
    let is_back = async || spooled(system) == 0 && worst(system, kind) == LaneState::Primary;
    wait::until(RECOVERY, "an empty spool while publishing goes on", is_back).await;
    // The run goes on for this long after the recovery, counted in messages.
    let goal = published() + u64::from(RATE) * AFTERWARDS.as_secs();
    wait::until(RECOVERY, "publishes after the recovery", async || {
        published() >= goal
    })
    .await;
    stop.send(true).unwrap();
    let records = publisher.await.unwrap();
    // One late confirm is enough for the last ones to pass by the spool.
    wait::until(RECOVERY, "an empty spool at the end", is_back).await;
    let told = async || has_come_back(&seen.lock().unwrap());
    wait::until(RECOVERY, "that primary is told", told).await;
    let report = system.close().await;
    assert_eq!(report.left_in_memory_spool, 0);
    task.abort();
    let seen = seen.lock().unwrap().clone();
    Done {
        records,
        seen,
        outage: (killed, returning),
    }
}

fn judge(name: &str, topic: &str, done: &Done, delivered: Vec<ledger::Delivered>, bound: u64) {
    let verdict = ledger::check(&history(topic, &done.records, delivered, 0));
    report(name, &done.records, &verdict, done.outage);
    check_states(name, &done.seen);
    assert!(verdict.is_sound(), "{name}: {verdict:?}");
    assert!(
        verdict.extra_deliveries() <= bound,
        "{name}: {} repeats, at most {bound} were in doubt",
        verdict.extra_deliveries()
    );
}

fn holding(pattern: &str, kind: RouteKind) -> RouteSettings {
    RouteSettings {
        during_outage: Some(DuringOutage::Hold),
        ..RouteSettings::new(Pattern::new(pattern).unwrap(), kind)
    }
}

/// Reads a whole queue with a bare client.
async fn read_queue(url: &str, queue: &str, wanted: usize) -> Vec<ledger::Delivered> {
    let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel
        .basic_qos(500, lapin::options::BasicQosOptions::default())
        .await
        .unwrap();
    let mut consumer = channel
        .basic_consume(
            queue.into(),
            "foreign".into(),
            lapin::options::BasicConsumeOptions::default(),
            lapin::types::FieldTable::default(),
        )
        .await
        .unwrap();
    let mut delivered = Vec::new();
    let mut distinct = BTreeSet::new();
    // Repeats may follow the last distinct one, so it reads on until the queue
    // has been quiet for a while.
    let patience = |distinct: usize| if distinct < wanted { RECOVERY } else { QUIET };
    while let Ok(Some(delivery)) =
        tokio::time::timeout(patience(distinct.len()), consumer.next()).await
    {
        let delivery = delivery.unwrap();
        let properties = &delivery.properties;
        let id = properties.message_id().as_ref().unwrap().to_string();
        let headers = properties.headers().as_ref().unwrap().inner();
        let text = |name: &str| match headers.get(name) {
            Some(lapin::types::AMQPValue::LongString(s)) => Some(s.to_string()),
            _ => None,
        };
        distinct.insert(id.clone());
        delivered.push(ledger::Delivered {
            group: "foreign".to_owned(),
            consumer: "lapin".to_owned(),
            topic: queue.to_owned(),
            id,
            payload_hash: hash(&delivery.data),
            key: text("hub-key"),
            index: delivered.len() as u64,
            redelivered: delivery.redelivered || text("hub-possible-duplicate").is_some(),
            settled: true,
        });
        delivery
            .ack(lapin::options::BasicAckOptions::default())
            .await
            .unwrap();
    }
    println!(
        "read {} of {wanted} distinct messages from {queue}",
        distinct.len()
    );
    delivered
}

/// A queue or topic that gives nothing for this long is read to its end.
const QUIET: Duration = Duration::from_secs(3);

async fn rabbitmq(version: RabbitVersion) {
    let mut rabbit = need!(Rabbit::start(version).await);
    let topic = unique("tasks.accept");
    let mut config = MessagingConfig {
        rabbitmq: Some(RabbitMqConfig {
            url: Some(Secret::new(rabbit.url())),
            ..RabbitMqConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    config.hub.routes.push(holding("tasks.#", RouteKind::Task));
    let window = config.rabbitmq.as_ref().unwrap().window as u64;
    let system = Arc::new(MessagingSystem::start(config).await.unwrap());
    system
        .hub()
        .declare_queue(&topic, &QueueOptions::default())
        .await
        .unwrap();
    let node = tokio::sync::Mutex::new(&mut rabbit);
    let done = drive(
        &system,
        &topic,
        RouteKind::Task,
        async || node.lock().await.kill().await,
        async || node.lock().await.restart().await,
    )
    .await;
    let url = rabbit.url().to_owned();
    let delivered = read_queue(&url, &topic, done.records.len()).await;
    judge(
        &format!("RabbitMQ {}", rabbit.version()),
        &topic,
        &done,
        delivered,
        window,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_4_killed_while_publishing_loses_and_reorders_nothing() {
    rabbitmq(RabbitVersion::V4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_3_10_killed_while_publishing_loses_and_reorders_nothing() {
    rabbitmq(RabbitVersion::V3_10).await;
}

/// Reads a whole topic with a bare client.
async fn read_topic(bootstrap: String, topic: String, wanted: usize) -> Vec<ledger::Delivered> {
    use rdkafka::{
        Message as _,
        config::ClientConfig,
        consumer::{BaseConsumer, Consumer as _},
        message::Headers as _,
    };
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .set("group.id", "foreign")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&[&topic]).unwrap();
        let mut delivered: Vec<ledger::Delivered> = Vec::new();
        let mut distinct = BTreeSet::new();
        let mut quiet_since: Option<Instant> = None;
        loop {
            let Some(message) = consumer.poll(Duration::from_millis(200)) else {
                let since = *quiet_since.get_or_insert_with(Instant::now);
                let limit = if distinct.len() < wanted {
                    RECOVERY
                } else {
                    QUIET
                };
                if since.elapsed() > limit {
                    return delivered;
                }
                continue;
            };
            let Ok(message) = message else { continue };
            quiet_since = None;
            let header = |name: &str| {
                message.headers().and_then(|h| {
                    h.iter()
                        .find(|h| h.key == name)
                        .and_then(|h| h.value)
                        .map(|v| String::from_utf8_lossy(v).into_owned())
                })
            };
            let id = header("hub-id").unwrap();
            distinct.insert(id.clone());
            delivered.push(ledger::Delivered {
                group: "foreign".to_owned(),
                consumer: "rdkafka".to_owned(),
                topic: topic.clone(),
                id,
                payload_hash: hash(message.payload().unwrap_or_default()),
                key: message
                    .key()
                    .map(|k| String::from_utf8_lossy(k).into_owned()),
                index: delivered.len() as u64,
                redelivered: header("hub-possible-duplicate").is_some(),
                settled: true,
            });
        }
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafka_killed_while_publishing_loses_and_reorders_nothing() {
    let mut kafka = need!(Kafka::start().await);
    let topic = unique("events.accept");
    let config = MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![kafka.bootstrap().to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    let window = config.kafka.as_ref().unwrap().window as u64;
    let system = Arc::new(MessagingSystem::start(config).await.unwrap());
    let partitions = 6;
    system
        .hub()
        .create_topic(
            &topic,
            &TopicOptions {
                partitions,
                ..TopicOptions::default()
            },
        )
        .await
        .unwrap();
    let node = tokio::sync::Mutex::new(&mut kafka);
    let done = drive(
        &system,
        &topic,
        RouteKind::Event,
        async || node.lock().await.kill().await,
        async || node.lock().await.restart().await,
    )
    .await;
    let delivered = read_topic(
        kafka.bootstrap().to_owned(),
        topic.clone(),
        done.records.len(),
    )
    .await;
    judge(
        &format!("Kafka {}", kafka.version()),
        &topic,
        &done,
        delivered,
        window * u64::try_from(partitions).unwrap(),
    );
}
