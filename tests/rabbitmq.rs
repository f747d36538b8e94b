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
        Compression, Consumer, Delivery, Fate, HandlerError, Lane, LaneOptions, OrderKey,
        PublishOptions, QueueOptions, QueueType, Received, Source, StartFrom, Submission, Verdict,
    },
    message::{
        MessageId, TaskAttributes, Timestamp,
        wire::{Failure, Marks},
    },
    secret::Secret,
    topology::{Binding, QueueSpec, Topology, TopologyMode},
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
    wait::within(
        Duration::from_secs(60),
        "the connection changes",
        state.wait_for(|s| s.connected == up),
    )
    .await
    .unwrap();
}

/// A queue of its own, quorum, with dead letters.
async fn queue(broker: &RabbitMqBroker, name: &str) -> Topic {
    let topic = Topic::new(name).unwrap();
    broker
        .ensure(&Source::Queue(Pattern::new(name).unwrap()))
        .await
        .unwrap();
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

async fn publish_all(
    broker: &RabbitMqBroker,
    topic: &Topic,
    messages: Vec<Message>,
) -> BTreeMap<u64, Fate> {
    let mut lane = broker
        .open_lane(topic, 0, &LaneOptions::default())
        .await
        .unwrap();
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
        let batch = wait::within(
            SOON,
            &format!("{n} deliveries, {} came", all.len()),
            consumer.deliveries.recv(),
        )
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
    wait::until(
        SOON,
        &format!("{queue} has {expected} messages"),
        || async move { depth(broker, queue).await == expected },
    )
    .await;
}

// ---- publishing and consuming ----------------------------------------------

#[tokio::test]
async fn fault_01_a_thousand_confirmed_publishes_do_not_block() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let broker = connected(config(rabbit.url()), Topology::default()).await;
        let queue = queue(&broker, &unique("confirms")).await;
        let mut lane = broker
            .open_lane(&queue, 0, &LaneOptions::default())
            .await
            .unwrap();
        for n in 0..1000 {
            lane.submissions
                .send(vec![submission(n, numbered(n))])
                .await
                .unwrap();
            let c = wait::within(SOON, "a confirm", lane.confirmations.recv())
                .await
                .unwrap();
            assert!(
                c.token == n && matches!(c.fate, Fate::Confirmed(_)),
                "{c:?}"
            );
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

#[tokio::test]
async fn fault_02_a_publish_before_any_subscriber_is_kept_or_refused() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let nowhere = Topic::new(unique("nowhere")).unwrap();
    let fates = publish_all(&broker, &nowhere, vec![numbered(0)]).await;
    match &fates[&0] {
        Fate::Refused(e) => assert_eq!(e.code(), ErrorCode::PublishRejected),
        other => panic!("{other:?}"),
    }
    let queue = queue(&broker, &unique("kept")).await;
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(1)]).await);
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let got = receive(&mut consumer, 1).await;
    assert_eq!(text(&got[0]), "1");
    ack_all(got).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn fault_03_other_arguments_are_drift_and_cost_no_publisher_its_channel() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let name = unique("drift");
        let topic = Topic::new(&name).unwrap();
        let other = connected(config(rabbit.url()), Topology::default()).await;
        let classic = QueueOptions {
            max_priority: Some(5),
            ..QueueOptions::default()
        };
        other.declare_queue(&topic, &classic).await.unwrap();

        let wanted = Topology {
            queues: vec![QueueSpec {
                name: name.clone(),
                options: QueueOptions {
                    max_priority: Some(10),
                    ..QueueOptions::default()
                },
                bindings: Vec::new(),
                aliases: vec!["short".into()],
            }],
            ..Topology::default()
        };
        let broker = connected(config(rabbit.url()), wanted).await;
        let report = broker.last_topology_report();
        let drift = report
            .drift
            .iter()
            .find(|d| d.object == format!("queue {name}"))
            .unwrap();
        assert_eq!(drift.argument, "x-max-priority");
        assert_eq!(
            (drift.expected.as_str(), drift.actual.as_str()),
            ("10", "5")
        );

        let mut lane = broker
            .open_lane(&topic, 0, &LaneOptions::default())
            .await
            .unwrap();
        all_confirmed(&publish(&mut lane, vec![numbered(0)]).await);
        let error = broker
            .declare_queue(&topic, &QueueOptions::default())
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::QueueDeclareFailed);
        assert!(
            error.to_string().contains("x-queue-type")
                || error.to_string().contains("x-max-priority"),
            "{error}"
        );
        // The same lane still publishes, by the topic's other name too.
        all_confirmed(&publish(&mut lane, vec![numbered(1)]).await);
        all_confirmed(
            &publish_all(&broker, &Topic::new("short").unwrap(), vec![numbered(2)]).await,
        );
        assert_eq!(depth(&broker, &topic).await, 3);
        broker.close().await.unwrap();
        other.close().await.unwrap();
    }
}

#[tokio::test]
async fn fault_04_fault_13_both_subscribers_of_a_queue_outlive_a_killed_server() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = Topic::new(unique("survivor")).unwrap();
    let options = QueueOptions {
        max_priority: Some(10),
        max_length: Some(1_000_000),
        ..QueueOptions::default()
    };
    broker.declare_queue(&queue, &options).await.unwrap();
    let subscribe = SubscribeOptions::default().with_prefetch(1);
    let mut first = broker.consume(&of(&queue), &subscribe).await.unwrap();
    let mut second = broker.consume(&of(&queue), &subscribe).await.unwrap();
    assert!(first.control.active().await && second.control.active().await);
    let generation = broker.connection().borrow().generation;

    rabbit.kill().await;
    up(&broker, false).await;
    assert!(!broker.is_connected());
    assert!(broker.health_check().await.is_err(), "fault 12");
    rabbit.restart().await;
    up(&broker, true).await;
    assert!(broker.connection().borrow().generation > generation);
    for consumer in [&first, &second] {
        wait::until(SOON, "the subscription is back", || async {
            consumer.control.is_active()
        })
        .await;
    }
    // The arguments are what they were: declaring them again is no drift.
    broker.declare_queue(&queue, &options).await.unwrap();
    assert!(broker.last_topology_report().drift.is_empty());

    all_confirmed(&publish_all(&broker, &queue, (0..2).map(numbered).collect()).await);
    // Neither takes a second message before it has settled its first.
    let one = receive(&mut first, 1).await;
    let two = receive(&mut second, 1).await;
    let got: BTreeSet<_> = one.iter().chain(&two).map(text).collect();
    assert_eq!(got.len(), 2);
    ack_all(one).await;
    ack_all(two).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn fault_12_health_does_not_trust_a_connection_that_is_silent() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let proxy = TcpProxy::to_port(rabbit.port()).await.unwrap();
    let short = RabbitMqConfig {
        heartbeat: Duration::from_secs(30),
        connection_timeout: Duration::from_secs(1),
        ..config(&rabbit.url_via(proxy.port()))
    };
    let broker = connected(short, Topology::default()).await;
    broker.health_check().await.unwrap();
    // No heartbeat is missed yet, so the connection looks well: it is asked.
    proxy.half_open();
    let asked = wait::within(SOON, "an answer", broker.health_check()).await;
    assert!(asked.is_err());
    proxy.cut().await;
    up(&broker, false).await;
    let asked = wait::within(SOON, "an answer", broker.health_check()).await;
    assert_eq!(asked.unwrap_err().code(), ErrorCode::ConnectionFailed);
    proxy.heal().await;
    up(&broker, true).await;
    broker.health_check().await.unwrap();
    broker.close().await.unwrap();
}

/// Failed messages rest for 300 ms.
fn resting(retry: &str, dead: &str) -> Topology {
    Topology {
        retry_exchange: Some(retry.to_owned()),
        dead_letter_queue: Some(dead.to_owned()),
        queues: vec![QueueSpec {
            name: retry.to_owned(),
            options: QueueOptions {
                message_ttl_ms: Some(300),
                dead_letter_exchange: Some(String::new()),
                dead_letter_strategy: Some("at-least-once".into()),
                overflow: Some("reject-publish".into()),
                ..QueueOptions::default()
            },
            bindings: vec![Binding {
                exchange: retry.to_owned(),
                routing_key: "#".into(),
            }],
            aliases: Vec::new(),
        }],
        ..Topology::default()
    }
}

#[tokio::test]
async fn fault_05_fault_06_a_failed_message_comes_back_counted_and_ends_in_the_dead_letters() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let retry = unique("retry");
        let dead = unique("dead");
        let topology = resting(&retry, &dead);
        let broker = connected(config(rabbit.url()), topology).await;
        let queue = queue(&broker, &unique("failing")).await;
        let message = numbered(7).with_key("k").with_header("h", "v");
        all_confirmed(&publish_all(&broker, &queue, vec![message.clone()]).await);
        let mut consumer = broker
            .consume(&of(&queue), &SubscribeOptions::default())
            .await
            .unwrap();
        for attempt in 0..3 {
            let delivery = receive(&mut consumer, 1).await.pop().unwrap();
            assert_eq!(delivery.retry_count, attempt);
            let failure = Failure::now(
                "handler_error",
                "no luck",
                &queue,
                delivery.marks.failure.as_deref(),
            );
            delivery
                .settle(Verdict::Retry {
                    delay: Duration::from_millis(300),
                    failure,
                })
                .await
                .unwrap();
        }
        let delivery = receive(&mut consumer, 1).await.pop().unwrap();
        assert_eq!(delivery.retry_count, 3);
        assert_eq!(delivery.message.error.as_deref(), Some("no luck"));
        delivery
            .dead_letter("gave_up", "four attempts")
            .await
            .unwrap();
        assert_eq!(depth(&broker, &queue).await, 0);

        let dead = Topic::new(dead).unwrap();
        let mut consumer = broker
            .consume(&of(&dead), &SubscribeOptions::default())
            .await
            .unwrap();
        let letter = receive(&mut consumer, 1).await.pop().unwrap();
        let failure = letter.marks.failure.clone().unwrap();
        assert_eq!(failure.reason, "gave_up");
        assert_eq!(failure.original_topic, queue.as_str());
        assert!(failure.first < failure.last);
        assert_eq!((letter.id.as_str(), letter.retry_count), ("m7", 3));
        assert_eq!(letter.key, message.key);
        assert_eq!(letter.headers, message.headers);
        letter.ack().await.unwrap();
        broker.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_dead_letter_that_its_reader_refuses_stays_the_letter_that_it_is() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let dead = unique("dead");
        let topology = resting(&unique("retry"), &dead);
        let broker = connected(config(rabbit.url()), topology).await;
        let queue = queue(&broker, &unique("failing")).await;
        let mut late = numbered(7);
        late.task = Some(Box::new(TaskAttributes {
            deadline: Some(Timestamp::now() + Duration::from_secs(5)),
            ..TaskAttributes::default()
        }));
        all_confirmed(&publish_all(&broker, &queue, vec![late]).await);
        let options = SubscribeOptions::default();
        let mut consumer = broker.consume(&of(&queue), &options).await.unwrap();
        let bad = receive(&mut consumer, 1).await.pop().unwrap();
        bad.dead_letter("handler_error", "no luck").await.unwrap();

        let dead = Topic::new(dead).unwrap();
        let mut reader = broker.consume(&of(&dead), &options).await.unwrap();
        let mut letter = receive(&mut reader, 1).await.pop().unwrap();
        let failure = letter.marks.failure.clone();
        for _ in 0..2 {
            letter.dead_letter("nacked", "not here").await.unwrap();
            letter = receive(&mut reader, 1).await.pop().unwrap();
            assert_eq!(letter.id.as_str(), "m7");
            assert_eq!(letter.marks.failure, failure);
        }
        // Nor does a deadline that is over end one that is tried again.
        wait::until(SOON, "the deadline", async || {
            letter.message.is_expired(Timestamp::now())
        })
        .await;
        let failure = Failure::now("handler_error", "no", &dead, failure.as_deref());
        let delay = Duration::from_millis(300);
        let retried = letter.settle(Verdict::Retry { delay, failure }).await;
        retried.unwrap();
        let letter = receive(&mut reader, 1).await.pop().unwrap();
        assert_eq!((letter.id.as_str(), letter.retry_count), ("m7", 1));
        letter.ack().await.unwrap();
        depth_becomes(&broker, &dead, 0).await;
        broker.close().await.unwrap();
    }
}

/// The dead letters of all queues lie in one, and pass by the same channel.
#[tokio::test]
async fn a_dead_letter_names_the_topic_that_it_comes_from() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let dead = unique("dead");
    let topology = Topology {
        dead_letter_queue: Some(dead.clone()),
        ..Topology::default()
    };
    let broker = connected(config(rabbit.url()), topology).await;
    let mut wanted = Vec::new();
    for n in 0..3 {
        let queue = queue(&broker, &unique("failing")).await;
        all_confirmed(&publish_all(&broker, &queue, vec![numbered(n)]).await);
        let mut consumer = broker
            .consume(&of(&queue), &SubscribeOptions::default())
            .await
            .unwrap();
        let delivery = receive(&mut consumer, 1).await.pop().unwrap();
        delivery.dead_letter("gave_up", "at once").await.unwrap();
        wanted.push(queue.to_string());
    }
    let channel = raw(rabbit.url()).await.create_channel().await.unwrap();
    let mut named = Vec::new();
    for _ in &wanted {
        let options = lapin::options::BasicGetOptions { no_ack: true };
        let letter = channel.basic_get(dead.as_str().into(), options).await;
        let letter = letter.unwrap().expect("a letter");
        let headers = letter.properties.headers().as_ref().unwrap().inner();
        match headers.get("hub-topic") {
            Some(lapin::types::AMQPValue::LongString(topic)) => named.push(topic.to_string()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(named, wanted);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn fault_11_a_batch_has_one_outcome_each_also_behind_a_refused_message() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("batch")).await;
    let mut messages: Vec<_> = (0..100).map(numbered).collect();
    messages[30] = numbered(30).with_header("large", "x".repeat(200_000));
    messages[60] = numbered(60).with_expiration(messaging_hub::Timestamp::from_millis(1));
    let fates = publish_all(&broker, &queue, messages).await;
    for (n, fate) in &fates {
        match (n, fate) {
            (30, Fate::Refused(e)) => assert_eq!(e.code(), ErrorCode::MessageTooLarge),
            (60, Fate::Refused(e)) => assert_eq!(e.code(), ErrorCode::MessageExpired),
            (_, Fate::Confirmed(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(fates.len(), 100);
    assert_eq!(depth(&broker, &queue).await, 98);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn fault_16_two_thousand_messages_have_two_thousand_ids() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("ids")).await;
    let messages = (0..2000).map(|_| Message::new("test", "x")).collect();
    all_confirmed(&publish_all(&broker, &queue, messages).await);
    let options = SubscribeOptions::default().with_prefetch(500);
    let mut consumer = broker.consume(&of(&queue), &options).await.unwrap();
    let mut ids = std::collections::HashSet::new();
    while ids.len() < 2000 {
        for delivery in receive(&mut consumer, 1).await {
            assert!(
                ids.insert(delivery.id.clone()),
                "{} came twice",
                delivery.id
            );
            assert!(delivery.settle_now(Verdict::Ack));
        }
    }
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_closing_twice_and_using_it_from_many_tasks_is_safe() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("many")).await;
    broker
        .connect()
        .await
        .expect("connecting again does nothing");
    let tasks: Vec<_> = (0..8)
        .map(|t| {
            let (broker, queue) = (broker.clone(), queue.clone());
            tokio::spawn(async move {
                let messages = (0..100).map(|n| numbered(t * 100 + n)).collect();
                all_confirmed(&publish_all(&broker, &queue, messages).await);
                broker.health_check().await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(depth(&broker, &queue).await, 800);
    let consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let (a, b) = tokio::join!(broker.close(), broker.close());
    a.unwrap();
    b.unwrap();
    broker.close().await.unwrap();
    wait::within(SOON, "the consumer has ended", consumer.control.stop()).await;
    assert!(!broker.is_connected());
    let closed = |r: Result<()>| assert_eq!(r.unwrap_err().code(), ErrorCode::OperationCanceled);
    closed(broker.connect().await);
    closed(broker.health_check().await);
    closed(
        broker
            .open_lane(&queue, 0, &LaneOptions::default())
            .await
            .map(drop),
    );
    closed(
        broker
            .consume(&of(&queue), &SubscribeOptions::default())
            .await
            .map(drop),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_unroutable_among_ten_thousand_are_refused_and_no_others() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("routed")).await;
    let exchange = unique("by-header");
    let raw = raw(rabbit.url()).await;
    let channel = raw.create_channel().await.unwrap();
    let kind = lapin::ExchangeKind::Headers;
    channel
        .exchange_declare(
            exchange.as_str().into(),
            kind,
            Default::default(),
            Default::default(),
        )
        .await
        .unwrap();
    let mut route = lapin::types::FieldTable::default();
    route.insert(
        "route".into(),
        lapin::types::AMQPValue::LongString("yes".into()),
    );
    channel
        .queue_bind(
            queue.as_str().into(),
            exchange.as_str().into(),
            "".into(),
            Default::default(),
            route,
        )
        .await
        .unwrap();
    for mode in [
        messaging_hub::message::DeliveryMode::Transient,
        messaging_hub::message::DeliveryMode::Persistent,
    ] {
        let options = LaneOptions {
            address: Some((exchange.clone(), String::new())),
            ..LaneOptions::default()
        };
        let mut lane = broker.open_lane(&queue, 0, &options).await.unwrap();
        let unroutable = |n: u64| n % 10 == 3;
        let messages = (0..10_000)
            .map(|n| {
                let m = numbered(n).with_delivery_mode(mode);
                if unroutable(n) {
                    m
                } else {
                    m.with_header("route", "yes")
                }
            })
            .collect();
        let fates = publish(&mut lane, messages).await;
        assert_eq!(fates.len(), 10_000);
        for (n, fate) in fates {
            match fate {
                Fate::Refused(e) => assert!(unroutable(n), "{n}: {e}"),
                Fate::Confirmed(_) => assert!(!unroutable(n), "{n} was lost"),
                other => panic!("{n}: {other:?}"),
            }
        }
        assert_eq!(broker.purge_queue(&queue).await.unwrap(), 9000);
    }
    channel
        .exchange_delete(exchange.as_str().into(), Default::default())
        .await
        .unwrap();
    broker.close().await.unwrap();
}

#[tokio::test]
async fn an_unknown_exchange_is_refused_and_costs_no_other_lane() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("healthy")).await;
    let mut healthy = broker
        .open_lane(&queue, 0, &LaneOptions::default())
        .await
        .unwrap();
    let exchange = unique("gone");
    let options = LaneOptions {
        address: Some((exchange.clone(), "k".into())),
        mandatory: false,
        ..LaneOptions::default()
    };
    let error = broker.open_lane(&queue, 0, &options).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ExchangeNotFound);
    assert!(error.is_refusal());

    // One that goes while the lane is open ends that lane, and that lane only.
    let raw = raw(rabbit.url()).await;
    let channel = raw.create_channel().await.unwrap();
    channel
        .exchange_declare(
            exchange.as_str().into(),
            lapin::ExchangeKind::Topic,
            Default::default(),
            Default::default(),
        )
        .await
        .unwrap();
    let mut lane = broker.open_lane(&queue, 0, &options).await.unwrap();
    all_confirmed(&publish(&mut lane, vec![numbered(0)]).await);
    channel
        .exchange_delete(exchange.as_str().into(), Default::default())
        .await
        .unwrap();
    lane.submissions
        .send((1..5).map(|n| submission(n, numbered(n))).collect())
        .await
        .unwrap();
    for n in 1..5 {
        let c = wait::within(SOON, "an answer", lane.confirmations.recv())
            .await
            .unwrap();
        assert!(
            c.token == n && matches!(c.fate, Fate::Unknown(_) | Fate::Unsent(_)),
            "{c:?}"
        );
    }
    assert!(
        wait::within(SOON, "the end", lane.confirmations.recv())
            .await
            .is_none()
    );
    assert_eq!(
        broker
            .open_lane(&queue, 0, &options)
            .await
            .unwrap_err()
            .code(),
        ErrorCode::ExchangeNotFound
    );
    all_confirmed(&publish(&mut healthy, vec![numbered(9)]).await);
    assert!(broker.is_connected());
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_answers_every_publish_in_order_and_ends_every_delivery() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let proxy = TcpProxy::to_port(rabbit.port()).await.unwrap();
    let broker = connected(config(&rabbit.url_via(proxy.port())), Topology::default()).await;
    let queue = queue(&broker, &unique("cut")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..20).map(numbered).collect()).await);
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let held = receive(&mut consumer, 1).await;
    assert!(held[0].is_live());

    // Nothing comes back any more, then the connection breaks.
    let mut lane = broker
        .open_lane(&queue, 0, &LaneOptions::default())
        .await
        .unwrap();
    proxy.half_open();
    let batch = (0..500)
        .map(|n| submission(n, numbered(1000 + n)))
        .collect();
    lane.submissions.send(batch).await.unwrap();
    proxy.cut().await;
    let mut written = true;
    for n in 0..500 {
        let c = wait::within(SOON, "an answer", lane.confirmations.recv())
            .await
            .unwrap();
        assert_eq!(c.token, n);
        match c.fate {
            Fate::Unknown(e) => {
                assert!(written, "what was written comes before what was not");
                assert_eq!(e.assume(), messaging_hub::Assume::Unknown);
            }
            Fate::Unsent(_) => written = false,
            other => panic!("{other:?}"),
        }
    }
    assert!(lane.confirmations.recv().await.is_none());
    assert!(lane.submissions.is_closed());
    up(&broker, false).await;
    for delivery in held {
        wait::until(SOON, "the delivery is dead", || async {
            !delivery.is_live()
        })
        .await;
        assert_eq!(
            delivery.ack().await.unwrap_err().code(),
            ErrorCode::AckFailed
        );
    }
    assert_eq!(
        broker
            .open_lane(&queue, 0, &LaneOptions::default())
            .await
            .unwrap_err()
            .code(),
        ErrorCode::ConnectionFailed
    );

    proxy.heal().await;
    up(&broker, true).await;
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(99)]).await);
    let mut seen = BTreeSet::new();
    while !seen.contains("99") {
        for delivery in receive(&mut consumer, 1).await {
            seen.insert(text(&delivery));
            delivery.ack().await.unwrap();
        }
    }
    assert!((0..20).all(|n| seen.contains(&n.to_string())), "{seen:?}");
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_wrong_password_is_told_without_showing_it() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let url = format!("amqp://guest:secretive@127.0.0.1:{}/%2f", rabbit.port());
    let broker = RabbitMqBroker::new(config(&url), Arc::default(), TopologyMode::Apply);
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::AuthenticationFailed, "{error}");
    assert!(!format!("{error:?}").contains("secretive"));
    let state = broker.connection().borrow().clone();
    assert!(!state.connected && state.refused);
    assert!(!format!("{state:?} {broker:?}").contains("secretive"));
    broker.close().await.unwrap();
}

#[tokio::test]
async fn it_starts_while_the_server_is_away_and_joins_it_later() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V3_10).await);
    let url = rabbit.url().to_owned();
    rabbit.stop().await;
    let broker = RabbitMqBroker::new(config(&url), Arc::default(), TopologyMode::Apply);
    assert_eq!(
        broker.connect().await.unwrap_err().code(),
        ErrorCode::ConnectionFailed
    );
    let queue = Topic::new(unique("later")).unwrap();
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    assert!(!consumer.control.is_active());
    rabbit.restart().await;
    up(&broker, true).await;
    // The consumer found no queue, and finds it as soon as it is there.
    broker.ensure(&of(&queue)).await.unwrap();
    assert!(consumer.control.active().await);
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(0)]).await);
    ack_all(receive(&mut consumer, 1).await).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn tls_with_a_client_certificate() {
    let rabbit = need!(Rabbit::start_with(RabbitVersion::V3_10, NodeOptions::tls()).await);
    let tls = TlsConfig {
        ca_file: Some(rabbit.tls_file("ca.pem")),
        cert_file: Some(rabbit.tls_file("client.pem")),
        key_file: Some(rabbit.tls_file("client.key")),
    };
    let secured = RabbitMqConfig {
        tls: Some(tls.clone()),
        ..config(rabbit.tls_url())
    };
    let broker = connected(secured.clone(), Topology::default()).await;
    assert!(broker.endpoints()[0].starts_with("amqps://"));
    let queue = queue(&broker, &unique("tls")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..100).map(numbered).collect()).await);
    let subjects = rabbit
        .ctl(&["-q", "list_connections", "peer_cert_subject"])
        .await;
    assert_eq!(subjects.matches("CN=helixagent").count(), 2, "{subjects}");
    broker.close().await.unwrap();

    let untrusted = RabbitMqConfig {
        tls: Some(TlsConfig {
            ca_file: Some(rabbit.tls_file("other-ca.pem")),
            ..TlsConfig::default()
        }),
        ..secured.clone()
    };
    let broker = RabbitMqBroker::new(untrusted, Arc::default(), TopologyMode::Apply);
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConnectionFailed, "{error}");
    broker.close().await.unwrap();

    let no_key = RabbitMqConfig {
        tls: Some(TlsConfig {
            key_file: None,
            ..tls
        }),
        ..secured
    };
    let broker = RabbitMqBroker::new(no_key, Arc::default(), TopologyMode::Apply);
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig);
    assert!(error.to_string().contains("key_file"), "{error}");
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_blocked_connection_holds_publishes_back_and_lets_acks_through() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("blocked")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..10).map(numbered).collect()).await);
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let got = receive(&mut consumer, 10).await;

    rabbit.ctl(&["set_vm_memory_high_watermark", "0"]).await;
    let mut lane = broker.open_lane(&queue, 0, &LaneOptions::default()).await;
    wait::until(SOON, "the server blocks us", || {
        let attempt = lane.as_mut().ok().map(|lane| {
            // The first write after the alarm is what gets us blocked.
            let _ = lane.submissions.try_send(vec![submission(0, numbered(50))]);
        });
        let broker = &broker;
        async move {
            let _ = attempt;
            matches!(broker.health_check().await, Err(e) if e.to_string().contains("blocks publishers"))
        }
    })
    .await;
    assert!(broker.is_connected());
    wait::within(SOON, "acks get through", ack_all(got)).await;
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.4"]).await;
    let mut lane = lane.unwrap();
    let c = wait::within(SOON, "the confirm", lane.confirmations.recv())
        .await
        .unwrap();
    assert!(matches!(c.fate, Fate::Confirmed(_)), "{c:?}");
    wait::until(SOON, "healthy again", || async {
        broker.health_check().await.is_ok()
    })
    .await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn prefetch_bounds_what_is_handed_out_and_acks_are_batched_under_it() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("prefetch")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..1000).map(numbered).collect()).await);
    let options = SubscribeOptions::default().with_prefetch(100);
    let mut consumer = broker.consume(&of(&queue), &options).await.unwrap();
    let mut held = receive(&mut consumer, 100).await;
    assert_eq!(held.len(), 100);
    depth_becomes(&broker, &queue, 900).await;
    // The first stays unsettled for the whole time and holds nobody back.
    let slow = held.remove(0);
    let mut handled = 1;
    while handled < 1000 {
        for delivery in held.drain(..) {
            assert!(delivery.settle_now(Verdict::Ack));
            handled += 1;
        }
        if handled < 1000 {
            held = receive(&mut consumer, 1).await;
        }
    }
    depth_becomes(&broker, &queue, 0).await;
    slow.requeue().await.unwrap();
    let again = receive(&mut consumer, 1).await;
    assert_eq!(
        (text(&again[0]).as_str(), again[0].redelivered),
        ("0", true)
    );
    ack_all(again).await;
    consumer.control.stop().await;
    assert_eq!(broker.queue_stats(&queue).await.unwrap().consumers, 0);
    assert_eq!(depth(&broker, &queue).await, 0);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_message_that_is_given_back_for_ever_is_never_dropped() {
    // RabbitMQ 4's quorum queues drop a message at its twenty-first return.
    const RETURNS: usize = 50;
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("returns")).await;
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(7)]).await);
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    for _ in 0..RETURNS {
        let delivery = receive(&mut consumer, 1).await.remove(0);
        assert_eq!(text(&delivery), "7");
        delivery.requeue().await.unwrap();
    }
    ack_all(receive(&mut consumer, 1).await).await;
    consumer.control.stop().await;
    assert_eq!(depth(&broker, &queue).await, 0);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn stopping_gives_back_what_was_not_settled() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("stop")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..50).map(numbered).collect()).await);
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let mut held = receive(&mut consumer, 2).await;
    let kept = held.remove(0);
    consumer.control.begin_stop();
    drop(held);
    kept.ack()
        .await
        .expect("what was handed out can still be settled");
    drop(consumer.deliveries);
    wait::within(SOON, "stopped", consumer.control.stop()).await;
    depth_becomes(&broker, &queue, 49).await;
    broker.close().await.unwrap();
}

/// The server forgets a queue's consumers and tells nobody: their channels live
/// on, and AMQP knows no word for it.
async fn forget_consumers(rabbit: &Rabbit, queue: &Topic) {
    let script = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
         [ra:process_command(amqqueue:get_pid(Q), rabbit_fifo:make_checkout({{element(2, C), element(1, C)}}, cancel, #{{}})) \
          || C <- rabbit_amqqueue:consumers(Q)], length(rabbit_amqqueue:consumers(Q))."
    );
    assert_eq!(rabbit.ctl(&["-q", "eval", &script]).await.trim(), "0");
}

#[tokio::test]
async fn a_queue_that_lost_its_consumers_without_a_word_gets_them_back() {
    for version in [RabbitVersion::V3_10, RabbitVersion::V4] {
        let rabbit = need!(shared_rabbit(version).await);
        let check = Duration::from_millis(300);
        let watched = RabbitMqConfig {
            consumer_check_interval: check,
            ..config(rabbit.url())
        };
        let broker = connected(watched, Topology::default()).await;
        let queue = queue(&broker, &unique("forgotten")).await;
        let mut readers = Vec::new();
        for _ in 0..2 {
            let options = SubscribeOptions::default().with_prefetch(1);
            let reader = broker.consume(&of(&queue), &options).await.unwrap();
            assert!(reader.control.active().await);
            readers.push(reader);
        }
        forget_consumers(&rabbit, &queue).await;
        wait::until(SOON, "both consumers", async || {
            broker.queue_stats(&queue).await.unwrap().consumers == 2
        })
        .await;
        let revived = broker.recorder().consumers_revived.get();
        assert!(revived >= 2, "{revived} were revived");
        // One each: with a prefetch of one, neither reader can have both.
        all_confirmed(&publish_all(&broker, &queue, (0..2).map(numbered).collect()).await);
        let mut held = Vec::new();
        for reader in &mut readers {
            held.extend(receive(reader, 1).await);
        }
        for delivery in held {
            delivery.ack().await.unwrap();
        }
        depth_becomes(&broker, &queue, 0).await;
        drop(readers);
        broker.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_deleted_queue_ends_the_subscription_until_it_is_back() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("deleted")).await;
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    assert!(consumer.control.active().await);
    broker.delete_queue(&queue).await.unwrap();
    wait::until(SOON, "the loss is noticed", || async {
        !consumer.control.is_active()
    })
    .await;
    let missing = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap_err();
    assert_eq!(missing.code(), ErrorCode::QueueNotFound);
    assert_eq!(
        broker.queue_stats(&queue).await.unwrap_err().code(),
        ErrorCode::QueueNotFound
    );
    assert_eq!(
        broker.delete_queue(&queue).await.unwrap_err().code(),
        ErrorCode::QueueNotFound
    );
    broker.ensure(&of(&queue)).await.unwrap();
    wait::until(SOON, "the subscription is back", || async {
        consumer.control.is_active()
    })
    .await;
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(1)]).await);
    ack_all(receive(&mut consumer, 1).await).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_pattern_covers_all_declared_queues_also_later_ones() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let prefix = unique("many");
    let first = queue(&broker, &format!("{prefix}.a")).await;
    let pattern = Pattern::new(format!("{prefix}.#")).unwrap();
    let mut consumer = broker
        .consume(&Source::Queue(pattern), &SubscribeOptions::default())
        .await
        .unwrap();
    let second = queue(&broker, &format!("{prefix}.b.c")).await;
    for queue in [&first, &second] {
        all_confirmed(&publish_all(&broker, queue, vec![numbered(0)]).await);
        let got = receive(&mut consumer, 1).await;
        assert_eq!(got[0].topic, *queue);
        ack_all(got).await;
    }
    broker.close().await.unwrap();
}

#[tokio::test]
async fn each_group_of_a_stream_gets_each_event_once_and_live_readers_get_all() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let base = unique("events");
    let topic = Topic::new(format!("{base}.created")).unwrap();
    let stream = Source::Stream(Pattern::new(format!("{base}.#")).unwrap());
    broker
        .ensure(&Source::Stream(Pattern::new(topic.as_str()).unwrap()))
        .await
        .unwrap();
    let group = SubscribeOptions::group("audit");
    let mut one = broker.consume(&stream, &group).await.unwrap();
    let mut two = broker
        .consume(&stream, &SubscribeOptions::group("billing"))
        .await
        .unwrap();
    let mut live = broker
        .consume(&stream, &SubscribeOptions::default())
        .await
        .unwrap();
    for consumer in [&one, &two, &live] {
        assert!(consumer.control.active().await);
    }
    all_confirmed(&publish_all(&broker, &topic, (0..100).map(numbered).collect()).await);
    for consumer in [&mut one, &mut two, &mut live] {
        let got = receive(consumer, 100).await;
        let order: Vec<_> = got.iter().map(text).collect();
        assert_eq!(order, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
        assert!(got.iter().all(|d| d.topic == topic));
        ack_all(got).await;
    }
    // A group that is away keeps its place.
    one.control.stop().await;
    all_confirmed(&publish_all(&broker, &topic, vec![numbered(100)]).await);
    let mut one = broker.consume(&stream, &group).await.unwrap();
    let got = receive(&mut one, 1).await;
    assert_eq!(text(&got[0]), "100");
    ack_all(got).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_worker_takes_one_task_at_a_time() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("lease")).await;
    let none = broker
        .dequeue_task(&queue, "w", Duration::from_millis(200))
        .await
        .unwrap();
    assert!(none.is_none());
    all_confirmed(&publish_all(&broker, &queue, (0..3).map(numbered).collect()).await);
    let first = broker
        .dequeue_task(&queue, "w", SOON)
        .await
        .unwrap()
        .unwrap();
    let second = broker
        .dequeue_task(&queue, "w", SOON)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((text(&first).as_str(), text(&second).as_str()), ("0", "1"));
    broker.ack_task(first).await.unwrap();
    broker.nack_task(second, true).await.unwrap();
    depth_becomes(&broker, &queue, 2).await;
    let missing = Topic::new(unique("missing")).unwrap();
    let error = broker.dequeue_task(&missing, "w", SOON).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::QueueNotFound);
    assert_eq!(broker.purge_queue(&queue).await.unwrap(), 2);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn auto_ack_settles_what_it_hands_out() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("auto")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..300).map(numbered).collect()).await);
    let options = SubscribeOptions {
        auto_ack: true,
        ..SubscribeOptions::default()
    };
    let mut consumer = broker.consume(&of(&queue), &options).await.unwrap();
    let got = receive(&mut consumer, 300).await;
    assert_eq!(got.len(), 300);
    drop(got);
    consumer.control.stop().await;
    depth_becomes(&broker, &queue, 0).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn messages_of_other_programs_are_read_by_their_properties() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("foreign")).await;
    let raw = raw(rabbit.url()).await;
    let channel = raw.create_channel().await.unwrap();
    let properties = lapin::BasicProperties::default()
        .with_content_type("text/plain".into())
        .with_type("greeting".into())
        .with_priority(9)
        .with_correlation_id("c".into());
    channel
        .basic_publish(
            "".into(),
            queue.as_str().into(),
            Default::default(),
            b"hello",
            properties,
        )
        .await
        .unwrap()
        .await
        .unwrap();
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    let got = receive(&mut consumer, 1).await.pop().unwrap();
    assert_eq!(text(&got), "hello");
    assert_eq!((got.kind.as_str(), got.priority.value()), ("greeting", 9));
    assert_eq!(got.correlation_id.as_deref(), Some("c"));
    assert!(got.id.is_generated());
    got.ack().await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test]
async fn what_rabbitmq_cannot_do_is_refused() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("refuse")).await;
    let compressed = LaneOptions {
        compression: Some(Compression::Lz4),
        ..LaneOptions::default()
    };
    let refused = |e: Error| {
        assert!(
            e.code() == ErrorCode::InvalidConfig && e.is_refusal(),
            "{e}"
        )
    };
    refused(broker.open_lane(&queue, 0, &compressed).await.unwrap_err());
    let wrong = [
        SubscribeOptions {
            start: StartFrom::Earliest,
            ..SubscribeOptions::default()
        },
        SubscribeOptions {
            retry_delay: Some(Duration::from_secs(1)),
            ..SubscribeOptions::default()
        },
        SubscribeOptions {
            handler_timeout: Some(Duration::from_secs(3600)),
            ..SubscribeOptions::default()
        },
        SubscribeOptions {
            prefetch: 0,
            ..SubscribeOptions::default()
        },
    ];
    for options in wrong {
        refused(broker.consume(&of(&queue), &options).await.unwrap_err());
    }
    let impossible = QueueOptions {
        queue_type: Some(QueueType::Quorum),
        max_priority: Some(10),
        ..QueueOptions::default()
    };
    refused(
        broker
            .declare_queue(&Topic::new(unique("x")).unwrap(), &impossible)
            .await
            .unwrap_err(),
    );
    broker.close().await.unwrap();
}

#[tokio::test]
async fn the_management_api_adds_what_amqp_does_not_tell() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let url = rabbit
        .management_url()
        .replace("http://", "http://guest:guest@");
    let managed = RabbitMqConfig {
        management_url: Some(Secret::new(url)),
        ..config(rabbit.url())
    };
    let broker = connected(managed, Topology::default()).await;
    assert_eq!(broker.server_version().as_deref(), Some(rabbit.version()));
    let queue = queue(&broker, &unique("figures")).await;
    all_confirmed(&publish_all(&broker, &queue, (0..10).map(numbered).collect()).await);
    wait::until(SOON, "the API counts the bytes", || async {
        let stats = broker.queue_stats(&queue).await.unwrap();
        stats.messages_ready == 10 && stats.message_bytes.is_some_and(|b| b > 0)
    })
    .await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_silent_server_is_noticed_and_joined_again() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let proxy = TcpProxy::to_port(rabbit.port()).await.unwrap();
    let short = RabbitMqConfig {
        heartbeat: Duration::from_secs(1),
        connection_timeout: Duration::from_secs(1),
        ..config(&rabbit.url_via(proxy.port()))
    };
    let broker = connected(short, Topology::default()).await;
    let queue = queue(&broker, &unique("silent")).await;
    let mut consumer = broker
        .consume(&of(&queue), &SubscribeOptions::default())
        .await
        .unwrap();
    proxy.half_open();
    let noticed = std::time::Instant::now();
    up(&broker, false).await;
    assert!(
        noticed.elapsed() < Duration::from_secs(6),
        "{:?}",
        noticed.elapsed()
    );
    proxy.heal().await;
    let healed = std::time::Instant::now();
    up(&broker, true).await;
    assert!(
        healed.elapsed() < Duration::from_secs(3),
        "{:?}",
        healed.elapsed()
    );
    all_confirmed(&publish_all(&broker, &queue, vec![numbered(0)]).await);
    ack_all(receive(&mut consumer, 1).await).await;
    broker.close().await.unwrap();
}

/// RabbitMQ 4 with Mnesia answers a declare of a classic queue before it is decided on
/// the disk, now and then two seconds before; killed meanwhile it forgets the queue and
/// what it confirmed. What the node has on its disk is what a kill leaves.
#[tokio::test]
async fn a_declared_queue_is_on_the_disk() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let options = QueueOptions {
        queue_type: Some(QueueType::Classic),
        ..QueueOptions::default()
    };
    for n in 0..200 {
        let name = format!("tasks.declared.{n}.end");
        let queue = Topic::new(&name).unwrap();
        broker.declare_queue(&queue, &options).await.unwrap();
        assert!(decided(&rabbit.info().dir, name.as_bytes()), "{name}");
        broker.delete_queue(&queue).await.unwrap();
    }
    broker.close().await.unwrap();
}

/// Whether Mnesia's log, or the table that it was moved to, says that what was made
/// under this name is decided. The log is a chain of (length, magic, term).
fn decided(node: &std::path::Path, name: &[u8]) -> bool {
    let has = |bytes: &[u8], word: &[u8]| bytes.windows(word.len()).any(|w| w == word);
    let files = |name: &str| {
        let mut folders = std::fs::read_dir(node.join("mnesia")).unwrap();
        folders.find_map(|f| std::fs::read(f.unwrap().path().join(name)).ok())
    };
    let mut prepared = false;
    for log in ["PREVIOUS.LOG", "LATEST.LOG"] {
        let Some(log) = files(log) else { continue };
        let mut rest = log.get(8..).unwrap_or_default();
        while let Some((head, tail)) = rest.split_at_checked(8) {
            let length = u32::from_be_bytes(head[..4].try_into().unwrap()) as usize;
            let Some((term, after)) = tail.split_at_checked(length) else {
                break;
            };
            let named = has(term, name);
            prepared |= named;
            if (named && has(term, b"presume_commit")) || (prepared && has(term, b"committed")) {
                return true;
            }
            rest = after;
        }
    }
    !prepared && files("rabbit_durable_queue.DCD").is_some_and(|table| has(&table, name))
}

#[tokio::test]
async fn a_full_queue_is_overload_and_not_a_refusal() {
    for version in RabbitVersion::ALL {
        let rabbit = need!(shared_rabbit(version).await);
        let broker = connected(config(rabbit.url()), Topology::default()).await;
        let queue = Topic::new(unique("full")).unwrap();
        let options = QueueOptions {
            queue_type: Some(QueueType::Classic),
            max_length: Some(3),
            overflow: Some("reject-publish".into()),
            ..QueueOptions::default()
        };
        broker.declare_queue(&queue, &options).await.unwrap();
        let fates = publish_all(&broker, &queue, (0..10).map(numbered).collect()).await;
        let count = |f: fn(&Fate) -> bool| fates.values().filter(|x| f(x)).count();
        assert_eq!(count(|f| matches!(f, Fate::Confirmed(_))), 3, "{fates:?}");
        assert_eq!(count(|f| matches!(f, Fate::Overloaded(_))), 7, "{fates:?}");
        broker.close().await.unwrap();
    }
}

#[tokio::test]
async fn without_confirms_a_publish_is_answered_once_written() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("sent")).await;
    let options = LaneOptions {
        confirm: false,
        window: 100,
        ..LaneOptions::default()
    };
    let mut lane = broker.open_lane(&queue, 0, &options).await.unwrap();
    for round in 0..50 {
        let batch = (0..100)
            .map(|n| submission(n, numbered(round * 100 + n)))
            .collect();
        lane.submissions.send(batch).await.unwrap();
        for _ in 0..100 {
            let c = wait::within(SOON, "an answer", lane.confirmations.recv())
                .await
                .unwrap();
            assert!(matches!(c.fate, Fate::Confirmed(None)), "{c:?}");
        }
    }
    // Letting go of the lane still writes out what was taken.
    drop(lane.submissions);
    assert!(
        wait::within(SOON, "the lane ends", lane.confirmations.recv())
            .await
            .is_none()
    );
    depth_becomes(&broker, &queue, 5000).await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn who_may_not_write_is_refused() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    rabbit.ctl(&["add_user", "reader", "pw@/:%"]).await;
    rabbit
        .ctl(&["set_permissions", "reader", ".*", "^$", ".*"])
        .await;
    let url = format!("amqp://reader:pw%40%2F%3A%25@127.0.0.1:{}", rabbit.port());
    let broker = RabbitMqBroker::new(config(&url), Arc::default(), TopologyMode::Ignore);
    broker.connect().await.unwrap();
    let queue = Topic::new(unique("readonly")).unwrap();
    broker
        .declare_queue(&queue, &QueueOptions::default())
        .await
        .expect("configuring is allowed");
    let mut lane = broker
        .open_lane(&queue, 0, &LaneOptions::default())
        .await
        .unwrap();
    let fates = publish(&mut lane, (0..3).map(numbered).collect()).await;
    for fate in fates.values() {
        match fate {
            Fate::Refused(e) => assert_eq!(e.code(), ErrorCode::AuthenticationFailed, "{e}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(broker.is_connected());
    broker.close().await.unwrap();
}

#[tokio::test]
async fn handlers_and_direct_publishes_work_over_it() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let broker = connected(config(rabbit.url()), Topology::default()).await;
    let queue = queue(&broker, &unique("handled")).await;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let handler = move |received: Received| {
        let tell = tell.clone();
        async move {
            tell.send(received.id.to_string()).unwrap();
            if received.id.as_str() == "m5" {
                return Err(HandlerError::reject("not this one"));
            }
            Ok(())
        }
    };
    let subscription = broker
        .subscribe(&of(&queue), SubscribeOptions::default(), Arc::new(handler))
        .await
        .unwrap();
    assert!(subscription.active().await);
    let messages = (0..10).map(|n| Arc::new(numbered(n))).collect();
    let receipts = broker
        .publish_batch(&queue, messages, &PublishOptions::default())
        .await;
    assert_eq!(receipts.len(), 10);
    for receipt in receipts {
        receipt.unwrap();
    }
    let mut seen = BTreeSet::new();
    while seen.len() < 10 {
        seen.insert(
            wait::within(SOON, "a handled message", told.recv())
                .await
                .unwrap(),
        );
    }
    wait::until(SOON, "the failed one is in the dead letters", || async {
        broker.metrics().messages_dead_lettered > 0
    })
    .await;
    subscription.unsubscribe().await;
    depth_becomes(&broker, &queue, 0).await;
    broker.close().await.unwrap();
}

async fn raw(url: &str) -> lapin::Connection {
    lapin::Connection::connect(url, lapin::ConnectionProperties::default())
        .await
        .unwrap()
}
