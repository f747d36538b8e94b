//! What the tests of the Kafka adapter share.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use messaging_hub::{
    Message, MessageBroker, Pattern, PublishOptions, SubscribeOptions, Topic,
    adapter::kafka::{KafkaBroker, KafkaConfig},
    broker::{
        Consumer, Delivery, EventStreamBroker, Outcome, Source, StartFrom, TopicOptions,
        receipt::Position,
    },
    topology::{Topology, TopologyMode},
};

use crate::support::unique;

pub(crate) const WAIT: Duration = Duration::from_secs(30);

pub(crate) fn config(bootstrap: &str) -> KafkaConfig {
    KafkaConfig {
        brokers: vec![bootstrap.to_owned()],
        metadata_refresh: Duration::from_secs(1),
        ..KafkaConfig::default()
    }
}

pub(crate) async fn connected(config: KafkaConfig) -> Arc<KafkaBroker> {
    let broker = KafkaBroker::new(config, Arc::new(Topology::default()), TopologyMode::Apply);
    broker.connect().await.expect("Kafka is there");
    broker
}

pub(crate) async fn topic(broker: &KafkaBroker, prefix: &str, partitions: i32) -> Topic {
    let topic = Topic::new(unique(prefix)).unwrap();
    let options = TopicOptions {
        partitions,
        ..TopicOptions::default()
    };
    broker.create_topic(&topic, &options).await.unwrap();
    topic
}

pub(crate) fn text(body: &str) -> Message {
    Message::new("test", body.as_bytes().to_vec())
}

pub(crate) fn body(delivery: &Delivery) -> String {
    String::from_utf8(delivery.received().message.payload.to_vec()).unwrap()
}

pub(crate) fn stream(topic: &Topic) -> Source {
    Source::Stream(Pattern::from(topic))
}

/// Publishes texts under keys and returns where each went.
pub(crate) async fn publish(
    broker: &KafkaBroker,
    topic: &Topic,
    messages: Vec<Message>,
) -> Vec<Position> {
    let messages = messages.into_iter().map(Arc::new).collect();
    broker
        .publish_batch(topic, messages, &PublishOptions::default())
        .await
        .into_iter()
        .map(|r| match r.expect("published").outcome {
            Outcome::Delivered {
                position: Some(at), ..
            } => at,
            other => panic!("{other:?}"),
        })
        .collect()
}

pub(crate) async fn active(consumer: &Consumer) {
    let is = tokio::time::timeout(WAIT, consumer.control.active())
        .await
        .expect("active in time");
    assert!(is, "{:?}", consumer.control);
}

/// Takes `n` deliveries.
pub(crate) async fn take(consumer: &mut Consumer, n: usize) -> Vec<Delivery> {
    let mut out = Vec::new();
    while out.len() < n {
        let batch = tokio::time::timeout(WAIT, consumer.deliveries.recv())
            .await
            .unwrap_or_else(|_| panic!("{} of {n} came in time", out.len()))
            .expect("the consumer lives");
        out.extend(batch);
    }
    out
}

/// Stops a consumer. What it was handed and did not look at is given back: a
/// message that was dropped may have come again just before.
pub(crate) async fn stop(consumer: Consumer) {
    let Consumer {
        deliveries,
        control,
        ..
    } = consumer;
    control.begin_stop();
    drop(deliveries);
    tokio::time::timeout(WAIT, control.stop())
        .await
        .expect("the consumer stops");
}

pub(crate) async fn ack_all(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.ack().await.unwrap();
    }
}

/// Everything in a topic, read without a group, by partition.
pub(crate) async fn read_all(
    broker: &KafkaBroker,
    topic: &Topic,
    n: usize,
) -> BTreeMap<i32, Vec<Message>> {
    let options = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut consumer = broker.consume(&stream(topic), &options).await.unwrap();
    let mut out: BTreeMap<i32, Vec<Message>> = BTreeMap::new();
    for delivery in take(&mut consumer, n).await {
        let message = Message::clone(&delivery.received().message);
        out.entry(message.partition.unwrap())
            .or_default()
            .push(message);
    }
    consumer.control.stop().await;
    out
}

/// Polls until it holds.
pub(crate) async fn eventually<F, Fut>(what: &str, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let until = tokio::time::Instant::now() + WAIT;
    while !check().await {
        assert!(tokio::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
