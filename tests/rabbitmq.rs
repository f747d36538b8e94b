//! The RabbitMQ adapter against real servers: what it promises, and the faults
//! of the programs before it, each with its number in the reference.

#![cfg(feature = "rabbitmq")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use messaging_hub::{
    Error, ErrorCode, Message, MessageBroker, Pattern, Result, SubscribeOptions, TaskQueueBroker,
    Topic,
    adapter::rabbitmq::{RabbitMqBroker, RabbitMqConfig, TlsConfig},
    broker::{
        Compression, Consumer, Delivery, Fate, Lane, LaneOptions, OrderKey, QueueOptions, QueueType,
        Source, StartFrom, Submission, Verdict,
    },
    message::{MessageId, wire::{Failure, Marks}},
    secret::Secret,
    topology::{Binding, ExchangeKind, ExchangeSpec, QueueSpec, Topology, TopologyMode},
};
use support::{NodeOptions, Rabbit, RabbitVersion, TcpProxy, need, shared_rabbit, unique, wait};

const SOON: Duration = Duration::from_secs(20);

// ---- helpers ---------------------------------------------------------------

fn config(url: &str) -> RabbitMqConfig {
    RabbitMqConfig {
        url: Some(Secret::new(url)),
        connection_timeout: Duration::from_secs(5),
        ..RabbitMqConfig::default()
    }
}

async fn connected(config: RabbitMqConfig, topology: Topology) -> Arc<RabbitMqBroker> {
    let broker = RabbitMqBroker::new(config, Arc::new(topology), TopologyMode::Apply);
    broker.connect().await.expect("connects");
    broker
}

async fn up(broker: &RabbitMqBroker, up: bool) {
    let mut state = broker.connection();
    wait::within(Duration::from_secs(60), "the connection changes", state.wait_for(|s| s.connected == up))
        .await
        .unwrap();
}

/// A queue of its own, quorum, with dead letters.
async fn queue(broker: &RabbitMqBroker, name: &str) -> Topic {
    let topic = Topic::new(name).unwrap();
    broker.ensure(&Source::Queue(Pattern::new(name).unwrap())).await.unwrap();
    topic
}

fn of(queue: &Topic) -> Source {
    Source::Queue(Pattern::new(queue.as_str()).unwrap())
}

fn submission(token: u64, message: Message) -> Submission {
    Submission {
        token,
        message: Arc::new(message),
        order: OrderKey::Publisher(1),
        marks: Marks::default(),
        confirm: true,
    }
}

fn numbered(n: u64) -> Message {
    Message::new("test", n.to_string()).with_id(MessageId::new(format!("m{n}")).unwrap())
}

/// Publishes through one lane, pipelined; one fate for each, by token.
async fn publish(lane: &mut Lane, messages: Vec<Message>) -> BTreeMap<u64, Fate> {
    let expected = messages.len();
    let submissions = lane.submissions.clone();
    let mut messages = messages.into_iter().enumerate();
    let mut fates = BTreeMap::new();
    let mut in_flight = 0;
    let mut all_sent = false;
    while fates.len() < expected {
        let batch: Vec<_> = messages
            .by_ref()
            .take(100.min(1000 - in_flight))
            .map(|(n, m)| submission(n as u64, m))
            .collect();
        in_flight += batch.len();
        all_sent |= batch.is_empty() && in_flight < 1000;
        if !batch.is_empty() && submissions.send(batch).await.is_err() {
            panic!("the lane has ended");
        }
        let mut some = in_flight >= 1000 || all_sent;
        while some || fates.len() < expected {
            let next = if some || all_sent {
                wait::within(SOON, "a confirmation", lane.confirmations.recv()).await
            } else {
                match lane.confirmations.try_recv() {
                    Ok(c) => Some(c),
                    Err(_) => break,
                }
            };
            some = false;
            let c = next.expect("one answer for each");
            in_flight -= 1;
            assert!(fates.insert(c.token, c.fate).is_none(), "answered twice");
            if !all_sent && in_flight < 1000 {
                break;
            }
        }
    }
    fates
}

async fn publish_all(broker: &RabbitMqBroker, topic: &Topic, messages: Vec<Message>) -> BTreeMap<u64, Fate> {
    let mut lane = broker.open_lane(topic, 0, &LaneOptions::default()).await.unwrap();
    publish(&mut lane, messages).await
}

fn all_confirmed(fates: &BTreeMap<u64, Fate>) {
    let bad = fates.iter().find(|(_, f)| !matches!(f, Fate::Confirmed(_)));
    assert!(bad.is_none(), "{bad:?}");
}

/// The next `n` deliveries.
async fn receive(consumer: &mut Consumer, n: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    while all.len() < n {
        let batch = wait::within(SOON, &format!("{n} deliveries, {} came", all.len()), consumer.deliveries.recv())
            .await
            .expect("the consumer lives");
        all.extend(batch.into_iter().filter(Delivery::is_live));
    }
    all
}

async fn ack_all(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.ack().await.unwrap();
    }
}

fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.message.payload.to_vec()).unwrap()
}

async fn depth(broker: &RabbitMqBroker, queue: &Topic) -> u64 {
    broker.queue_stats(queue).await.unwrap().messages_ready
}

async fn depth_becomes(broker: &RabbitMqBroker, queue: &Topic, expected: u64) {
    wait::until(SOON, &format!("{queue} has {expected} messages"), || async move {
        depth(broker, queue).await == expected
    })
    .await;
}

// ---- publishing and consuming ----------------------------------------------

#[tokio::test]
async fn fault_01_a_thousand_confirmed_publishes_do_not_block() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let broker = connected(config(rabbit.url()), Topology::default()).await;
        let queue = queue(&broker, &unique("confirms")).await;
        let mut lane = broker.open_lane(&queue, 0, &LaneOptions::default()).await.unwrap();
        for n in 0..1000 {
            lane.submissions.send(vec![submission(n, numbered(n))]).await.unwrap();
            let c = wait::within(SOON, "a confirm", lane.confirmations.recv()).await.unwrap();
            assert!(c.token == n && matches!(c.fate, Fate::Confirmed(_)), "{c:?}");
        }
        assert_eq!(depth(&broker, &queue).await, 1000);
        broker.close().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_published_in_a_pipeline_is_delivered_in_order() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("order")).await;
    let fates = publish_all(&broker, &queue, (0..5000).map(numbered).collect()).await;
    all_confirmed(&fates);
    let options = SubscribeOptions::default().with_prefetch(500);
    let mut consumer = broker.consume(&of(&queue), &options).await.unwrap();
    let mut next = 0;
    while next < 5000 {
        for delivery in receive(&mut consumer, 1).await {
            assert_eq!(text(&delivery), next.to_string());
            assert_eq!(delivery.topic, queue);
            assert_eq!(delivery.id.as_str(), format!("m{next}"));
            next += 1;
            assert!(delivery.settle_now(Verdict::Ack));
        }
    }
    consumer.control.stop().await;
    assert_eq!(depth(&broker, &queue).await, 0);
    broker.close().await.unwrap();
}
