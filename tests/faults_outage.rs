//! Faults 7 and 20 of the programs before it: what they put into memory during an
//! outage stayed there, or was sent again at each reconnect, while they called
//! themselves connected. Shown not to be the hub's, over real brokers.

#![cfg(all(
    feature = "rabbitmq",
    feature = "kafka",
    feature = "journal",
    feature = "server"
))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{path::Path, sync::Arc, time::Duration};

use messaging_hub::{
    Message, MessagingSystem, Outcome, SubscribeOptions,
    adapter::{
        embedded::{EmbeddedBroker, EmbeddedConfig},
        kafka::{KafkaBroker, KafkaConfig},
        rabbitmq::{RabbitMqBroker, RabbitMqConfig},
    },
    broker::{
        BrokerType, Consumer, MessageBroker, QueueOptions, QueueType, Source, StartFrom,
        TopicOptions,
    },
    config::MessagingConfig,
    hub::{HubConfig, MessagingHub},
    secret::Secret,
    topic::{Pattern, Topic},
    topology::{Topology, TopologyMode},
};
use reqwest::StatusCode;
use support::{Kafka, Rabbit, RabbitVersion, need, shared_rabbit, unique, vacant_port, wait};

const SOON: Duration = Duration::from_secs(30);
/// A server that was killed may take this long to serve again.
const RECOVERY: Duration = Duration::from_secs(60);

fn at_rabbitmq(url: &str) -> RabbitMqConfig {
    RabbitMqConfig {
        url: Some(Secret::new(url)),
        ..RabbitMqConfig::default()
    }
}

fn at_kafka(bootstrap: &str) -> KafkaConfig {
    KafkaConfig {
        brokers: vec![bootstrap.to_owned()],
        ..KafkaConfig::default()
    }
}

async fn started(config: MessagingConfig, data: Option<&Path>) -> (MessagingSystem, MessagingHub) {
    let config = MessagingConfig {
        data_dir: data.map(Path::to_path_buf),
        ..config
    };
    let system = MessagingSystem::start(config).await.expect("it starts");
    let hub = system.hub();
    (system, hub)
}

fn over_rabbitmq(url: &str) -> MessagingConfig {
    MessagingConfig {
        rabbitmq: Some(at_rabbitmq(url)),
        ..MessagingConfig::builtin()
    }
}

fn over_kafka(bootstrap: &str) -> MessagingConfig {
    MessagingConfig {
        kafka: Some(at_kafka(bootstrap)),
        ..MessagingConfig::builtin()
    }
}

/// Publishes numbered messages one by one; how many of them were spooled.
async fn publish(hub: &MessagingHub, topic: &str, numbers: std::ops::Range<u32>) -> usize {
    let publisher = hub.publisher(topic).unwrap();
    let mut spooled = 0;
    for n in numbers {
        let message = Message::new("test", n.to_string()).with_key("k");
        let receipt = wait::within(SOON, "a receipt", publisher.publish(message)).await;
        let outcome = receipt.expect("it is accepted").outcome;
        spooled += usize::from(matches!(outcome, Outcome::Spooled { .. }));
    }
    spooled
}

/// Reads and acks until each of `numbers` has come, in their order.
async fn reads(consumer: &mut Consumer, who: &str, numbers: std::ops::Range<u32>) {
    let mut expected = numbers;
    while !expected.is_empty() {
        let what = format!("{who}: message {}", expected.start);
        let batch = wait::within(RECOVERY, &what, consumer.deliveries.recv()).await;
        for delivery in batch.expect("the reader lives") {
            let n: u32 = std::str::from_utf8(&delivery.message.payload)
                .unwrap()
                .parse()
                .unwrap();
            // What was in doubt when the server died may come twice to a reader
            // that is not the hub's; what comes first must be the next.
            if n >= expected.start {
                assert_eq!(n, expected.start, "{who}: one is missing or out of order");
                expected.start += 1;
            }
            // One of a connection that died cannot be settled.
            let _ = delivery.ack().await;
        }
    }
}

/// A classic queue: a quorum queue as young as the test's is lost by the server
/// itself when it is killed.
async fn queue(hub: &MessagingHub, name: &str) -> String {
    let name = unique(&format!("tasks.{name}"));
    let options = QueueOptions {
        queue_type: Some(QueueType::Classic),
        ..QueueOptions::default()
    };
    hub.declare_queue(&name, &options).await.unwrap();
    name
}

async fn knows(hub: &MessagingHub, of: BrokerType, well: bool) {
    let what = format!("{of} is {}", if well { "well" } else { "dead" });
    wait::until(RECOVERY, &what, async || {
        let health = hub.health_check().await.remove(&of).expect("it is asked");
        health.is_ok() == well && hub.is_connected() == well
    })
    .await;
}

async fn empty(hub: &MessagingHub) {
    wait::until(RECOVERY, "an empty spool", async || {
        hub.state().routes.iter().all(|r| r.spool.messages == 0)
    })
    .await;
}

/// Closed, it leaves no spooled message anywhere.
async fn leaves_nothing(system: MessagingSystem) {
    let report = system.close().await;
    assert_eq!(
        (report.left_in_memory_spool, report.left_in_journal),
        (0, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_07_tasks_of_an_outage_reach_everybody_and_outlive_a_close() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let data = tempfile::tempdir().unwrap();
    let (system, hub) = started(over_rabbitmq(rabbit.url()), Some(data.path())).await;
    let theirs = queue(&hub, "theirs").await;
    let ours = queue(&hub, "ours").await;
    // Somebody who knows nothing of the hub, on the primary.
    let other = RabbitMqBroker::new(
        at_rabbitmq(rabbit.url()),
        Arc::new(Topology::default()),
        TopologyMode::Apply,
    );
    other.connect().await.unwrap();
    let source = Source::Queue(Pattern::new(&theirs).unwrap());
    let options = SubscribeOptions::default();
    let mut at_the_primary = other.consume(&source, &options).await.unwrap();

    publish(&hub, &theirs, 0..20).await;
    reads(&mut at_the_primary, "on the primary", 0..20).await;
    rabbit.kill().await;
    knows(&hub, BrokerType::RabbitMq, false).await;
    assert_eq!(publish(&hub, &theirs, 20..120).await, 100);
    assert_eq!(publish(&hub, &ours, 0..50).await, 50);
    // One that begins while there is nothing but the fallback.
    let mut begun_away = hub
        .consume(&ours, SubscribeOptions::default())
        .await
        .unwrap();
    reads(&mut begun_away, "begun on the fallback", 0..50).await;

    // A close takes nothing with it.
    drop(begun_away);
    let report = system.close().await;
    assert_eq!(report.left_in_memory_spool, 0);
    assert_eq!(report.left_in_journal, 100, "what nobody handled");
    let (system, hub) = started(over_rabbitmq(rabbit.url()), Some(data.path())).await;
    let mut begun_away = hub
        .consume(&ours, SubscribeOptions::default())
        .await
        .unwrap();

    rabbit.restart().await;
    knows(&hub, BrokerType::RabbitMq, true).await;
    empty(&hub).await;
    reads(&mut at_the_primary, "on the primary", 20..120).await;
    // It moves to the primary: what another process puts there reaches it.
    let receipt = other
        .publish(
            &Topic::new(&ours).unwrap(),
            Message::new("test", "50"),
            &Default::default(),
        )
        .await;
    receipt.expect("the primary takes it");
    reads(&mut begun_away, "begun on the fallback", 50..51).await;
    drop(begun_away);
    drop(at_the_primary);
    other.close().await.unwrap();
    leaves_nothing(system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_07_events_of_an_outage_reach_everybody_and_outlive_a_close() {
    let mut kafka = need!(Kafka::start().await);
    let data = tempfile::tempdir().unwrap();
    let (system, hub) = started(over_kafka(kafka.bootstrap()), Some(data.path())).await;
    let topic = unique("events.outage");
    let options = TopicOptions {
        partitions: 2,
        ..TopicOptions::default()
    };
    hub.create_topic(&topic, &options).await.unwrap();
    let other = KafkaBroker::new(
        at_kafka(kafka.bootstrap()),
        Arc::new(Topology::default()),
        TopologyMode::Apply,
    );
    other.connect().await.unwrap();
    let source = Source::Stream(Pattern::new(&topic).unwrap());
    let from_the_start = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut at_the_primary = other.consume(&source, &from_the_start).await.unwrap();

    publish(&hub, &topic, 0..20).await;
    reads(&mut at_the_primary, "on the primary", 0..20).await;
    kafka.kill().await;
    knows(&hub, BrokerType::Kafka, false).await;
    let mut begun_away = hub
        .stream_events(&topic, SubscribeOptions::default())
        .await
        .unwrap();
    assert!(wait::within(SOON, "a live reader", begun_away.control.active()).await);
    assert_eq!(publish(&hub, &topic, 20..120).await, 100);
    reads(&mut begun_away, "begun on the fallback", 20..120).await;

    drop(begun_away);
    let report = system.close().await;
    assert_eq!(report.left_in_memory_spool, 0);
    assert!(report.left_in_journal >= 100, "{report:?}");
    let (system, hub) = started(over_kafka(kafka.bootstrap()), Some(data.path())).await;
    let mut begun_away = hub
        .stream_events(&topic, SubscribeOptions::group("later"))
        .await
        .unwrap();
    kafka.restart().await;
    knows(&hub, BrokerType::Kafka, true).await;
    empty(&hub).await;
    reads(&mut at_the_primary, "on the primary", 20..120).await;
    reads(&mut begun_away, "a group begun on the fallback", 0..120).await;
    drop(begun_away);
    drop(at_the_primary);
    other.close().await.unwrap();
    leaves_nothing(system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_20_an_outage_is_told_and_nothing_is_sent_again_at_each_reconnect() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let (system, hub) = started(over_rabbitmq(rabbit.url()), None).await;
    let name = queue(&hub, "requests").await;
    publish(&hub, &name, 0..10).await;
    // What is in doubt at the kill may be there twice after it, rightly.
    empty(&hub).await;
    rabbit.kill().await;
    knows(&hub, BrokerType::RabbitMq, false).await;
    assert_eq!(publish(&hub, &name, 10..40).await, 30);
    for round in 1..=3 {
        rabbit.restart().await;
        knows(&hub, BrokerType::RabbitMq, true).await;
        empty(&hub).await;
        let stats = hub.queue_stats(&name).await.unwrap();
        assert_eq!(stats.messages_ready, 40, "after {round} reconnects");
        if round < 3 {
            rabbit.kill().await;
            knows(&hub, BrokerType::RabbitMq, false).await;
        }
    }
    assert_eq!(system.close().await.left_in_memory_spool, 0);
}

/// What waits for a broker that was replaced meanwhile is counted, also by whoever
/// closes again after giving up.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_replaced_broker_is_counted_at_the_close() {
    let nobody = vacant_port();
    let away = || {
        let config = at_rabbitmq(&format!("amqp://guest:guest@127.0.0.1:{nobody}/%2f"));
        RabbitMqBroker::new(config, Arc::default(), TopologyMode::Apply)
    };
    let hub = MessagingHub::new(HubConfig::default(), Topology::default());
    let embedded = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::default());
    embedded.connect().await.unwrap();
    hub.set_fallback_broker(embedded).unwrap();
    let first = away();
    hub.set_task_queue_broker(first.clone());
    assert_eq!(publish(&hub, "tasks.replaced", 0..20).await, 20);
    hub.set_task_queue_broker(away());
    assert_eq!(publish(&hub, "tasks.replaced", 20..25).await, 5);
    let given_up = tokio::time::timeout(Duration::from_millis(50), hub.close(SOON / 15)).await;
    assert!(given_up.is_err(), "it waits for its brokers");
    let report = hub.close(SOON).await;
    assert_eq!(
        (report.left_in_memory_spool, report.left_in_journal),
        (25, 0)
    );
    first.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_20_a_publish_that_went_nowhere_is_not_answered_with_200() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let hub = process::Hub::start_with(&[], &[("RABBITMQ_URL", rabbit.url())]);
    let url = hub.at(&format!("/v1/topics/{}/messages", unique("tasks.nowhere")));
    let answer = reqwest::Client::new()
        .post(url)
        .body("x")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::UNPROCESSABLE_ENTITY);
    let problem: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(problem["code"], "PUBLISH_REJECTED", "{problem}");
    assert_eq!(problem["assume"], "rejected", "{problem}");
    assert_eq!(problem["retryable"], false, "{problem}");
    // Refused is refused: it is in no spool either.
    assert_eq!(hub.spooled().await, 0);
}
