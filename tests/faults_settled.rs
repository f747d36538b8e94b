//! Events that groups handle out of a hub's spool while Kafka is dead, and what
//! everybody else sees of them afterwards: nobody twice, nobody too little.

#![cfg(feature = "kafka")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use messaging_hub::{
    Message, MessagingSystem, Outcome, SubscribeOptions,
    adapter::kafka::KafkaConfig,
    broker::{BrokerType, HandlerError, Received, Subscription, TopicOptions},
    config::{DuringOutage, MessagingConfig, RouteKind, RouteSettings},
    hub::MessagingHub,
    topic::Pattern,
};
use support::{Kafka, need, unique, wait};

const SOON: Duration = Duration::from_secs(30);
/// A server that was killed may take this long to serve again.
const RECOVERY: Duration = Duration::from_secs(90);
const PARTITIONS: i32 = 2;
const KEYS: usize = 8;
/// Events of each key that are published while the broker is dead.
const DURING: usize = 25;
/// What one group's handler never accepts.
const BAD: &str = "during-0-3";

/// Bodies in the order in which a group's handler got them.
type Seen = Arc<Mutex<Vec<String>>>;

fn config(bootstrap: &str, topic: &str) -> MessagingConfig {
    let mut config = MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![bootstrap.to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    config.hub.routes.push(RouteSettings {
        during_outage: Some(DuringOutage::Local),
        ..RouteSettings::new(Pattern::new(topic).unwrap(), RouteKind::Event)
    });
    config.validate().expect("local is for events too");
    config
}

/// A member of a group that handles everything but, if told so, `BAD`.
async fn member(
    hub: &MessagingHub,
    topic: &str,
    group: &str,
    refuses: bool,
) -> (Subscription, Seen) {
    let seen = Seen::default();
    let into = seen.clone();
    let handler = move |received: Received| {
        let into = into.clone();
        async move {
            let body = String::from_utf8(received.message.payload.to_vec()).unwrap();
            into.lock().unwrap().push(body.clone());
            if refuses && body == BAD {
                return Err(HandlerError::reject("it never will"));
            }
            Ok::<(), HandlerError>(())
        }
    };
    let options = SubscribeOptions::group(group);
    let subscription = hub.subscribe_events(topic, options, handler).await.unwrap();
    (subscription, seen)
}

fn events(said: &str, of_each: usize) -> Vec<(String, String)> {
    let numbers = (0..of_each).flat_map(|n| (0..KEYS).map(move |key| (key, n)));
    numbers
        .map(|(key, n)| (format!("k{key}"), format!("{said}-{key}-{n}")))
        .collect()
}

async fn publish(hub: &MessagingHub, topic: &str, events: Vec<(String, String)>) -> Vec<Outcome> {
    let publisher = hub.publisher(topic).unwrap();
    let messages = events
        .into_iter()
        .map(|(key, body)| Message::new("test", body).with_key(key.as_str()));
    let receipts = wait::within(
        SOON,
        "receipts",
        publisher.publish_batch(messages.collect()),
    );
    let receipts = receipts.await.into_iter();
    receipts
        .map(|r| r.expect("it is accepted").outcome)
        .collect()
}

fn count(seen: &Seen, said: &str) -> usize {
    let seen = seen.lock().unwrap();
    seen.iter().filter(|b| b.starts_with(said)).count()
}

async fn all_came(seen: &Seen, said: &str, number: usize, who: &str) {
    let what = format!("{number} of {said} at {who}");
    wait::until(RECOVERY, &what, async || count(seen, said) >= number).await;
}

fn each_once(seen: &Seen, said: &str, of_each: usize) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for body in seen.lock().unwrap().iter() {
        if body.starts_with(said) {
            *counts.entry(body.clone()).or_default() += 1;
        }
    }
    let expected = events(said, of_each).into_iter().map(|(_, body)| (body, 1));
    assert_eq!(counts, expected.collect());
}

async fn connected(hub: &MessagingHub, expected: bool) {
    let what = format!("Kafka connected: {expected}");
    wait::until(RECOVERY, &what, async || {
        let state = hub.state();
        let kafka = state.brokers.iter().find(|b| b.kind == BrokerType::Kafka);
        kafka.is_some_and(|b| b.connected == expected)
    })
    .await;
}

/// Everything in the topic, with the groups that a bare client finds noted on
/// it and whether it may be a repeat.
async fn read_topic(
    bootstrap: String,
    topic: String,
    number: usize,
) -> Vec<(String, BTreeSet<String>, bool)> {
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
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        consumer.subscribe(&[&topic]).unwrap();
        let mut found = Vec::new();
        let mut ended = BTreeSet::new();
        let deadline = std::time::Instant::now() + RECOVERY;
        while ended.len() < usize::try_from(PARTITIONS).unwrap() || found.len() < number {
            assert!(std::time::Instant::now() < deadline, "{} came", found.len());
            let message = match consumer.poll(Duration::from_millis(200)) {
                Some(Ok(message)) => message,
                Some(Err(rdkafka::error::KafkaError::PartitionEOF(partition))) => {
                    ended.insert(partition);
                    continue;
                }
                _ => continue,
            };
            let header = |name: &str| {
                let headers = message.headers()?;
                let value = headers.iter().find(|h| h.key == name)?.value?;
                Some(String::from_utf8_lossy(value).into_owned())
            };
            let settled = header("hub-settled").unwrap_or_default();
            let groups = settled.split(',').filter(|g| !g.is_empty());
            found.push((
                String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
                groups.map(str::to_owned).collect(),
                header("hub-possible-duplicate").is_some(),
            ));
        }
        found
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_handle_events_while_kafka_is_dead_and_nobody_gets_them_twice() {
    let mut kafka = need!(Kafka::start().await);
    let topic = unique("events.settled");
    let folder = tempfile::tempdir().unwrap();
    let durable = MessagingConfig {
        data_dir: Some(folder.path().to_owned()),
        ..config(kafka.bootstrap(), &topic)
    };
    let first = MessagingSystem::start(durable).await.unwrap();
    let hub = first.hub();
    let options = TopicOptions {
        partitions: PARTITIONS,
        ..TopicOptions::default()
    };
    hub.create_topic(&topic, &options).await.unwrap();
    let (moved, moved_here) = member(&hub, &topic, "moved", false).await;
    let (stayed, at_stayed) = member(&hub, &topic, "stayed", true).await;
    publish(&hub, &topic, events("before", 1)).await;
    all_came(&moved_here, "before", KEYS, "moved").await;
    all_came(&at_stayed, "before", KEYS, "stayed").await;

    kafka.kill().await;
    connected(&hub, false).await;
    for outcome in publish(&hub, &topic, events("during", DURING)).await {
        assert_eq!(outcome, Outcome::Spooled { durable: true });
    }
    // Both groups handle all of it, each in the order of its keys, and it is
    // still there for everybody else.
    for (seen, who) in [(&moved_here, "moved"), (&at_stayed, "stayed")] {
        all_came(seen, "during", KEYS * DURING, who).await;
        each_once(seen, "during", DURING);
        for key in 0..KEYS {
            let of_key = format!("during-{key}-");
            let seen = seen.lock().unwrap();
            let got: Vec<&String> = seen.iter().filter(|b| b.starts_with(&of_key)).collect();
            let expected = (0..DURING).map(|n| format!("{of_key}{n}"));
            assert!(
                got.into_iter().eq(&expected.collect::<Vec<_>>()),
                "key {key}"
            );
        }
    }
    assert!(!hub.is_connected());
    let route = |r: &messaging_hub::hub::state::RouteState| r.spool.messages;
    let spooled: u64 = hub.state().routes.iter().map(route).sum();
    assert_eq!(spooled, (KEYS * DURING) as u64);
    let dead = hub.lease("helixagent.dlq", 10, SOON).await.unwrap();
    let letters: Vec<&[u8]> = dead.iter().map(|d| &d.message.payload[..]).collect();
    assert_eq!(letters, [BAD.as_bytes()], "one group's copy");
    let why = dead[0].marks.failure.as_ref().unwrap();
    assert!(why.details.contains("in group stayed"), "{}", why.details);
    for letter in dead {
        letter.ack().await.unwrap();
    }
    // This group goes on in another process, whose window knows of nothing.
    moved.unsubscribe().await;

    kafka.restart().await;
    connected(&hub, true).await;
    let second = MessagingSystem::start(config(kafka.bootstrap(), &topic))
        .await
        .unwrap();
    let other = second.hub();
    let (went_on, moved_there) = member(&other, &topic, "moved", false).await;
    let (late, at_late) = member(&other, &topic, "late", false).await;
    wait::until(RECOVERY, "the spool is empty", async || {
        hub.state().routes.iter().all(|r| r.spool.messages == 0)
    })
    .await;
    publish(&hub, &topic, events("after", 1)).await;
    // What comes last of each key has everything of the key before it.
    all_came(&moved_there, "after", KEYS, "moved").await;
    all_came(&at_stayed, "after", KEYS, "stayed").await;
    all_came(&at_late, "after", KEYS, "late").await;

    assert_eq!(count(&moved_there, "during"), 0, "handled in the other hub");
    each_once(&moved_there, "after", 1);
    for (seen, who) in [(&at_stayed, "stayed"), (&at_late, "late")] {
        println!("{who}: {} handed out", seen.lock().unwrap().len());
        each_once(seen, "before", 1);
        each_once(seen, "during", DURING);
        each_once(seen, "after", 1);
    }
    let skipped = other.metrics().duplicates_suppressed;
    assert!(skipped >= (KEYS * DURING) as u64, "{skipped} were skipped");

    let number = KEYS * (DURING + 2);
    let found = read_topic(kafka.bootstrap().to_owned(), topic.clone(), number).await;
    let mut bodies = BTreeSet::new();
    for (body, groups, may_repeat) in &found {
        assert!(
            bodies.insert(body.clone()) || *may_repeat,
            "{body} is there twice"
        );
        let both = ["moved", "stayed"].map(str::to_owned).into();
        let expected = if body.starts_with("during") {
            both
        } else {
            BTreeSet::new()
        };
        assert_eq!(*groups, expected, "{body}");
    }
    assert_eq!(bodies.len(), number);
    for subscription in [stayed, went_on, late] {
        subscription.unsubscribe().await;
    }
    for system in [first, second] {
        assert_eq!(system.close().await.left_in_memory_spool, 0);
    }
}
