//! Over a real Kafka, judged by a bare client.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use messaging_hub::{
    ErrorCode, HandlerError, Message, MessagingSystem, SubscribeOptions, Timestamp,
    adapter::kafka::KafkaConfig,
    broker::{Received, TopicOptions},
    config::MessagingConfig,
    hub::MessagingHub,
    replay::{Replay, ReplayRequest, ReplayStatus},
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use serde_json::{Value, json};

use crate::support::{Kafka, need, shared_kafka, unique, wait};

const SOON: Duration = Duration::from_secs(60);
const PARTITIONS: i32 = 3;
const KEYS: u64 = 50;

async fn started(bootstrap: &str) -> (MessagingSystem, MessagingHub) {
    let config = MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![bootstrap.to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    let system = MessagingSystem::start(config).await.unwrap();
    let hub = system.hub();
    (system, hub)
}

async fn stream(hub: &MessagingHub, name: &str, partitions: i32) {
    let options = TopicOptions {
        partitions,
        ..TopicOptions::default()
    };
    hub.create_topic(name, &options).await.unwrap();
}

/// Message `n` of key `n % KEYS` is made `n` milliseconds after `start`. On a slow
/// machine some wait in the spool for a moment: it returns when all are in Kafka.
async fn publish(hub: &MessagingHub, topics: &[String], start: Timestamp, count: u64) {
    let mut by_topic: BTreeMap<&String, Vec<Message>> = BTreeMap::new();
    for n in 0..count {
        let topic = &topics[usize::try_from(n).unwrap() % topics.len()];
        let message = Message::new("made", n.to_string())
            .with_key(format!("k{}", n % KEYS))
            .with_timestamp(start + Duration::from_millis(n));
        by_topic.entry(topic).or_default().push(message);
    }
    for (topic, messages) in by_topic {
        for outcome in hub.publish_batch(topic, messages).await {
            outcome.expect("published");
        }
    }
    wait::until(SOON, "all are in Kafka", async || {
        let mut there = 0;
        for topic in topics {
            let metadata = hub.topic_metadata(topic).await.unwrap();
            let ends = metadata.partitions.iter().map(|p| p.high_watermark);
            there += ends.sum::<i64>().unsigned_abs();
        }
        there == count
    })
    .await;
}

fn request(json: Value) -> ReplayRequest {
    serde_json::from_value(json).unwrap()
}

async fn replayed(hub: &MessagingHub, json: Value) -> Replay {
    let replay = hub.start_replay(request(json)).await.unwrap();
    wait::within(SOON, "the replay is over", hub.replay_ended(&replay.id))
        .await
        .unwrap()
}

fn bare(bootstrap: &str, group: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .create()
        .unwrap()
}

/// What a bare client finds: the number, key, time, and the two ids.
struct Found {
    number: u64,
    key: String,
    millis: i64,
    id: String,
    of: String,
}

/// Reads a topic whole: what it has by its watermarks, which must be `wanted`.
async fn read(bootstrap: &str, topic: &str, partitions: i32, wanted: u64) -> Vec<Found> {
    holds(bootstrap, topic, partitions, wanted).await;
    let consumer = bare(bootstrap, &unique("judge"));
    let mut list = TopicPartitionList::new();
    for p in 0..partitions {
        list.add_partition_offset(topic, p, Offset::Beginning)
            .unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut found = Vec::new();
    let until = Instant::now() + SOON;
    while (found.len() as u64) < wanted {
        assert!(Instant::now() < until, "{} of {wanted}", found.len());
        let Some(record) = consumer.poll(Duration::from_millis(100)) else {
            continue;
        };
        let record = record.unwrap();
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap().to_vec()).unwrap();
        let header = |name: &str| {
            let headers = record.headers().unwrap();
            let found = headers.iter().find(|h| h.key == name);
            found.map_or_else(String::new, |h| text(h.value))
        };
        found.push(Found {
            number: text(record.payload()).parse().unwrap(),
            key: text(record.key()),
            millis: record.timestamp().to_millis().unwrap(),
            id: header("hub-id"),
            of: header("hub-replay-of"),
        });
    }
    found
}

fn committed(bootstrap: &str, group: &str, topic: &str) -> Vec<Offset> {
    let mut list = TopicPartitionList::new();
    for p in 0..PARTITIONS {
        list.add_partition(topic, p);
    }
    let found = bare(bootstrap, group).committed_offsets(list, SOON);
    let found = found.unwrap();
    found.elements().iter().map(|e| e.offset()).collect()
}

fn held(bootstrap: &str, topic: &str, partitions: i32) -> u64 {
    let consumer = bare(bootstrap, "asks");
    (0..partitions)
        .map(|p| consumer.fetch_watermarks(topic, p, SOON).unwrap().1)
        .sum::<i64>()
        .unsigned_abs()
}

/// Waits until a topic holds just so many: what was spooled comes a little later,
/// and a transaction's end is seen a little after its commit.
async fn holds(bootstrap: &str, topic: &str, partitions: i32, wanted: u64) {
    wait::until(SOON, &format!("{wanted} in {topic}"), async || {
        held(bootstrap, topic, partitions) >= wanted
    })
    .await;
    assert_eq!(held(bootstrap, topic, partitions), wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_18_replay_fetches_the_middle_of_two_topics_and_disturbs_nobody() {
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let base = unique("events.replay");
    let topics = [format!("{base}.a"), format!("{base}.b")];
    let target = format!("{base}.out");
    for topic in topics.iter().chain([&target]) {
        stream(&hub, topic, PARTITIONS).await;
    }
    let start = Timestamp::now() - Duration::from_secs(3600);
    publish(&hub, &topics, start, 10_000).await;

    // A live group that has handled everything of one topic.
    let group = unique("live");
    let handled = Arc::new(AtomicUsize::new(0));
    let counter = handled.clone();
    let options = SubscribeOptions {
        commit_interval: Duration::from_millis(100),
        ..SubscribeOptions::group(&group)
    };
    let live = hub
        .subscribe(&topics[0], options, move |_: Received| {
            counter.fetch_add(1, SeqCst);
            async { Ok::<(), HandlerError>(()) }
        })
        .await
        .unwrap();
    wait::until(SOON, "the group is through", async || {
        handled.load(SeqCst) == 5_000
    })
    .await;
    let bootstrap = node.bootstrap().to_owned();
    let sum = |offsets: &[Offset]| {
        let numbers = offsets.iter().map(|o| match o {
            Offset::Offset(n) => *n,
            _ => 0,
        });
        numbers.sum::<i64>()
    };
    wait::until(SOON, "its position is committed", async || {
        sum(&committed(&bootstrap, &group, &topics[0])) == 5_000
    })
    .await;
    let before = committed(&bootstrap, &group, &topics[0]);

    let ask = |dry_run: bool| {
        json!({
            "pattern": format!("{base}.*"),
            "from_time": start + Duration::from_millis(3_000),
            "to_time": start + Duration::from_millis(7_000),
            "target_topic": target,
            "options": {"dry_run": dry_run},
        })
    };
    let dry = replayed(&hub, ask(true)).await;
    assert_eq!(dry.progress.status, ReplayStatus::Completed, "{dry:?}");
    assert_eq!((dry.progress.replayed, dry.progress.total), (4_000, 4_000));
    assert_eq!(held(&bootstrap, &target, PARTITIONS), 0, "a dry run");

    let done = replayed(&hub, ask(false)).await;
    assert_eq!(done.progress.status, ReplayStatus::Completed, "{done:?}");
    let p = &done.progress;
    assert_eq!(
        (p.replayed, p.total, p.skipped, p.failed),
        (4_000, 4_000, 0, 0)
    );
    assert!(p.rate > 0.0 && p.last_id.is_some() && p.offsets_read == p.offsets_total);

    let found = read(&bootstrap, &target, PARTITIONS, 4_000).await;
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut ids, mut firsts) = (HashSet::new(), HashSet::new());
    for one in &found {
        assert_eq!(one.key, format!("k{}", one.number % KEYS));
        let time = start.as_millis() + i64::try_from(one.number).unwrap();
        assert_eq!(one.millis, time, "its time stays");
        if let Some(before) = last.insert(&one.key, one.number) {
            assert!(before < one.number, "{}: {before} first", one.key);
        }
        assert!(ids.insert(&one.id) && firsts.insert(&one.of));
        assert_ne!(one.id, one.of);
    }
    let mut numbers: Vec<u64> = found.iter().map(|f| f.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (3_000..7_000).collect::<Vec<_>>());

    // The same again under the same id of another hub makes the same ids.
    let (other_system, other) = started(&bootstrap).await;
    let mut again = ask(false);
    again["id"] = json!(done.id);
    let second = replayed(&other, again).await;
    assert_eq!(second.progress.replayed, 4_000, "{second:?}");
    let found = read(&bootstrap, &target, PARTITIONS, 8_000).await;
    assert_eq!(
        found.iter().map(|f| &f.id).collect::<HashSet<_>>().len(),
        4_000
    );
    other_system.close().await;

    // The group noticed nothing, and lives.
    assert_eq!(committed(&bootstrap, &group, &topics[0]), before);
    assert_eq!(handled.load(SeqCst), 5_000);
    hub.publish(&topics[0], Message::new("new", "1").with_key("k"))
        .await
        .unwrap();
    wait::until(SOON, "the group goes on", async || {
        handled.load(SeqCst) == 5_001
    })
    .await;
    live.unsubscribe().await;
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_of_a_stretch_are_replayed_while_live_readers_go_on() {
    const ALL: u64 = 120_000;
    const STRETCH: std::ops::Range<u64> = 10_000..110_000;
    const MORE: u64 = 2_000;
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let topic = unique("events.replay.long");
    let target = format!("{topic}.out");
    for name in [&topic, &target] {
        stream(&hub, name, PARTITIONS).await;
    }
    let start = Timestamp::now() - Duration::from_secs(3600);
    publish(&hub, std::slice::from_ref(&topic), start, ALL).await;

    let handled = Arc::new(AtomicUsize::new(0));
    let counter = handled.clone();
    let group = unique("live");
    let options = SubscribeOptions {
        commit_interval: Duration::from_millis(100),
        ..SubscribeOptions::group(&group)
    };
    let live = hub
        .subscribe(&topic, options, move |_: Received| {
            counter.fetch_add(1, SeqCst);
            async { Ok::<(), HandlerError>(()) }
        })
        .await
        .unwrap();
    // It has begun, and has much left, when the replay starts beside it.
    wait::until(SOON, "the group has begun", async || {
        handled.load(SeqCst) > 0
    })
    .await;
    let replay = hub
        .start_replay(request(json!({
            "pattern": topic,
            "from_time": start + Duration::from_millis(STRETCH.start),
            "to_time": start + Duration::from_millis(STRETCH.end),
            "target_topic": target,
        })))
        .await
        .unwrap();
    let shown = wait::value(SOON, "progress on the way", async || {
        let progress = hub.replay(&replay.id).ok()?.progress;
        (progress.replayed > 0 && progress.rate > 0.0).then_some(progress)
    })
    .await;
    assert_eq!(shown.total, STRETCH.end - STRETCH.start, "{shown:?}");
    assert!(shown.offsets_read <= shown.offsets_total, "{shown:?}");
    let publisher = hub.publisher(&topic).unwrap();
    let more =
        (0..MORE).map(|n| Message::new("new", n.to_string()).with_key(format!("k{}", n % KEYS)));
    for outcome in publisher.publish_batch(more.collect()).await {
        outcome.expect("published");
    }
    let done = wait::within(SOON, "the replay is over", hub.replay_ended(&replay.id))
        .await
        .unwrap();
    let p = &done.progress;
    assert_eq!(p.status, ReplayStatus::Completed, "{done:?}");
    assert_eq!((p.replayed, p.failed), (STRETCH.end - STRETCH.start, 0));

    let found = read(node.bootstrap(), &target, PARTITIONS, p.replayed).await;
    let mut numbers: Vec<u64> = found.iter().map(|f| f.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, STRETCH.collect::<Vec<_>>());
    // The group got each event of its own once, and its position is behind them.
    let wanted = usize::try_from(ALL + MORE).unwrap();
    wait::until(SOON, "the group is through", async || {
        handled.load(SeqCst) >= wanted
    })
    .await;
    wait::until(SOON, "its position is committed", async || {
        let at = committed(node.bootstrap(), &group, &topic).into_iter();
        let at = at.map(|o| match o {
            Offset::Offset(n) => n.unsigned_abs(),
            _ => 0,
        });
        at.sum::<u64>() == ALL + MORE
    })
    .await;
    assert_eq!(handled.load(SeqCst), wanted);
    live.unsubscribe().await;
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_the_topic_that_it_reads_ends() {
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let topic = unique("events.self");
    stream(&hub, &topic, PARTITIONS).await;
    let start = Timestamp::now() - Duration::from_secs(600);
    publish(&hub, std::slice::from_ref(&topic), start, 5_000).await;
    let done = replayed(
        &hub,
        json!({"topic": topic, "options": {"preserve_order": false, "batch_size": 500}}),
    )
    .await;
    assert_eq!(done.progress.status, ReplayStatus::Completed, "{done:?}");
    assert_eq!(done.progress.replayed, 5_000);
    holds(node.bootstrap(), &topic, PARTITIONS, 10_000).await;
    // Both generations lie in the same time now; each message once, please.
    let done = replayed(
        &hub,
        json!({"topic": topic, "options": {"skip_duplicates": true, "dry_run": true}}),
    )
    .await;
    assert_eq!(
        (done.progress.replayed, done.progress.skipped),
        (5_000, 5_000)
    );
    system.close().await;
}

/// The last offset of a transaction is its marker, which no reader gets. The
/// pauses are long enough for the reader to stop fetching meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn markers_at_the_end_are_not_waited_for_also_by_a_slow_replay() {
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let (topic, target) = (unique("events.markers"), unique("events.markers.out"));
    stream(&hub, &topic, 1).await;
    stream(&hub, &target, 1).await;
    let (bootstrap, written) = (node.bootstrap().to_owned(), topic.clone());
    tokio::task::spawn_blocking(move || {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .set("transactional.id", unique("writer"))
            .create()
            .unwrap();
        producer.init_transactions(SOON).unwrap();
        producer.begin_transaction().unwrap();
        for n in 0..3_000 {
            let (key, body) = (format!("k{}", n % 5), n.to_string());
            let record = BaseRecord::to(&written).key(&key).payload(&body);
            producer.send(record).map_err(|(e, _)| e).unwrap();
        }
        producer.commit_transaction(SOON).unwrap();
    })
    .await
    .unwrap();
    holds(node.bootstrap(), &topic, 1, 3_001).await;
    let done = replayed(
        &hub,
        json!({"topic": topic, "target_topic": target,
            "options": {"batch_size": 100, "delay_between": "120ms"}}),
    )
    .await;
    let p = &done.progress;
    assert_eq!(p.status, ReplayStatus::Completed, "{done:?}");
    assert_eq!((p.replayed, p.total, p.failed), (3_000, 3_000, 0));
    assert_eq!((p.offsets_read, p.offsets_total), (3_001, 3_001));
    let found = read(node.bootstrap(), &target, 1, 3_000).await;
    let numbers: Vec<u64> = found.iter().map(|f| f.number).collect();
    assert_eq!(numbers, (0..3_000).collect::<Vec<_>>());
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_at_once_the_sixth_is_refused_and_a_cancel_ends_one_in_the_middle() {
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let (topic, target) = (unique("events.slow"), unique("events.slow.out"));
    stream(&hub, &topic, PARTITIONS).await;
    stream(&hub, &target, PARTITIONS).await;
    let start = Timestamp::now() - Duration::from_secs(600);
    publish(&hub, std::slice::from_ref(&topic), start, 2_000).await;
    let slow = |dry: bool| {
        json!({"topic": topic, "target_topic": target,
            "options": {"batch_size": 10, "delay_between": "20ms", "dry_run": dry}})
    };
    let first = hub.start_replay(request(slow(false))).await.unwrap();
    let mut others = Vec::new();
    for _ in 1..MessagingHub::MAX_REPLAYS {
        let mut stays = slow(false);
        stays["options"]["delay_between"] = json!("1h");
        others.push(hub.start_replay(request(stays)).await.unwrap());
    }
    assert_eq!(hub.active_replays(), 5);
    let refused = hub.start_replay(request(slow(true))).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::ReplayLimit);
    assert!(refused.is_retryable() && refused.message().contains("cancel one"));

    wait::until(SOON, "it is in the middle", async || {
        hub.replay(&first.id).unwrap().progress.replayed >= 50
    })
    .await;
    let cancelled = hub.cancel_replay(&first.id).await.unwrap();
    let p = &cancelled.progress;
    assert_eq!(p.status, ReplayStatus::Cancelled, "{cancelled:?}");
    assert!((50..2_000).contains(&p.replayed), "{cancelled:?}");
    assert!(p.ended_at.is_some() && p.total == 2_000);
    // The place is free.
    let dry = replayed(&hub, slow(true)).await;
    assert_eq!(dry.progress.replayed, 2_000);

    for other in &others {
        let over = hub.cancel_replay(&other.id).await.unwrap();
        assert_eq!(over.progress.status, ReplayStatus::Cancelled, "{over:?}");
    }
    let counted: u64 = hub.replays().iter().map(|r| r.progress.replayed).sum();
    // What was counted is what is there.
    let there = counted - dry.progress.replayed;
    holds(node.bootstrap(), &target, PARTITIONS, there).await;
    assert_eq!(hub.active_replays(), 0);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_meanwhile_fails_its_replay() {
    let node = need!(shared_kafka().await);
    let (system, hub) = started(node.bootstrap()).await;
    let topic = unique("events.gone");
    stream(&hub, &topic, 1).await;
    let target = unique("events.gone.out");
    stream(&hub, &target, 1).await;
    // More than the reader fetches ahead, and not to be compressed.
    let noise = || (0..4_096).map(|_| fastrand::u8(..)).collect::<Vec<u8>>();
    let messages = (0..10_000).map(|_| Message::new("made", noise()));
    for outcome in hub.publish_batch(&topic, messages.collect()).await {
        outcome.expect("published");
    }
    holds(node.bootstrap(), &topic, 1, 10_000).await;
    let replay = hub
        .start_replay(request(json!({"topic": topic, "target_topic": target,
            "options": {"batch_size": 100, "delay_between": "10ms"}})))
        .await
        .unwrap();
    let bootstrap = node.bootstrap().to_owned();
    let admin: rdkafka::admin::AdminClient<_> = ClientConfig::new()
        .set("bootstrap.servers", &bootstrap)
        .create()
        .unwrap();
    let deleted = admin
        .delete_topics(&[&topic], &rdkafka::admin::AdminOptions::new())
        .await;
    assert!(deleted.unwrap().iter().all(Result::is_ok));
    let over = wait::within(SOON, "it is over", hub.replay_ended(&replay.id)).await;
    let over = over.unwrap();
    assert_eq!(over.progress.status, ReplayStatus::Failed, "{over:?}");
    assert!(over.progress.error.unwrap().contains(&topic));
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_goes_on_when_its_broker_is_killed_and_comes_back() {
    let mut node = need!(Kafka::start().await);
    let (system, hub) = started(node.bootstrap()).await;
    let (topic, target) = (unique("events.outage"), unique("events.outage.out"));
    stream(&hub, &topic, PARTITIONS).await;
    stream(&hub, &target, PARTITIONS).await;
    let start = Timestamp::now() - Duration::from_secs(600);
    publish(&hub, std::slice::from_ref(&topic), start, 3_000).await;
    let ask = json!({"topic": topic, "target_topic": target,
        "options": {"batch_size": 50, "delay_between": "20ms"}});
    let replay = hub.start_replay(request(ask)).await.unwrap();
    wait::until(SOON, "it is under way", async || {
        hub.replay(&replay.id).unwrap().progress.replayed >= 200
    })
    .await;
    node.kill().await;
    node.restart().await;
    let over = wait::within(SOON * 2, "it is over", hub.replay_ended(&replay.id)).await;
    let over = over.unwrap();
    assert_eq!(over.progress.status, ReplayStatus::Completed, "{over:?}");
    assert_eq!((over.progress.replayed, over.progress.failed), (3_000, 0));
    wait::until(SOON, "the spool is empty", async || {
        let routes = hub.state().routes;
        routes.iter().all(|r| r.spool.messages == 0)
    })
    .await;
    // What was in doubt may be there twice, under one id.
    let there = held(node.bootstrap(), &target, PARTITIONS);
    let found = read(node.bootstrap(), &target, PARTITIONS, there).await;
    let (mut last, mut ids) = (BTreeMap::new(), HashSet::new());
    for one in found.iter().filter(|f| ids.insert(&f.id)) {
        if let Some(before) = last.insert(&one.key, one.number) {
            assert!(before < one.number, "{}: {before} first", one.key);
        }
    }
    assert_eq!(ids.len(), 3_000);
    system.close().await;
}
