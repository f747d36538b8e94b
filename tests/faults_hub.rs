//! The faults of the programs before it, each with its number in the reference,
//! shown not to be the hub's: over real brokers, and on its own fallback.

#![cfg(all(feature = "rabbitmq", feature = "kafka"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use messaging_hub::{
    ErrorCode, Message, MessagingSystem, Outcome, SubscribeOptions, Timestamp,
    adapter::{
        kafka::KafkaConfig,
        rabbitmq::{RabbitMqBroker, RabbitMqConfig},
    },
    broker::{
        BrokerType, Consumer, Delivery, HandlerError, MessageBroker, QueueOptions, Received,
        SeekTo, StartFrom, Subscription, TaskQueueBroker, TopicOptions,
    },
    config::{CanarySettings, MessagingConfig},
    hub::{
        MessagingHub,
        breaker::BreakerState,
        route::{RouteKind, RouteSettings},
    },
    message::Priority,
    secret::Secret,
    topic::{Pattern, Topic},
    topology::{QueueSpec, Topology, TopologyMode},
};
use support::{Kafka, Rabbit, RabbitVersion, need, shared_kafka, shared_rabbit, unique, wait};
use tokio::sync::{Barrier, mpsc};

const SOON: Duration = Duration::from_secs(30);
/// A server that was killed may take this long to serve again.
const RECOVERY: Duration = Duration::from_secs(60);
/// Nothing listens there.
const NOBODY: &str = "127.0.0.1:1";

// ---- helpers ---------------------------------------------------------------

fn alone() -> MessagingConfig {
    MessagingConfig::builtin()
}

fn over_rabbitmq(url: &str) -> MessagingConfig {
    MessagingConfig {
        rabbitmq: Some(RabbitMqConfig {
            url: Some(Secret::new(url)),
            ..RabbitMqConfig::default()
        }),
        ..MessagingConfig::builtin()
    }
}

fn over_kafka(bootstrap: &str) -> MessagingConfig {
    MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![bootstrap.to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    }
}

async fn started(config: MessagingConfig) -> (MessagingSystem, MessagingHub) {
    let system = MessagingSystem::start(config).await.expect("it starts");
    let hub = system.hub();
    (system, hub)
}

async fn queue(hub: &MessagingHub) -> String {
    let name = unique("tasks.fault");
    hub.declare_queue(&name, &QueueOptions::default())
        .await
        .unwrap();
    name
}

async fn stream(hub: &MessagingHub, partitions: i32) -> String {
    let name = unique("events.fault");
    let options = TopicOptions {
        partitions,
        ..TopicOptions::default()
    };
    hub.create_topic(&name, &options).await.unwrap();
    name
}

fn text(body: impl Into<String>) -> Message {
    Message::new("test", body.into())
}

fn body(message: &Message) -> String {
    String::from_utf8(message.payload.to_vec()).unwrap()
}

async fn publish(hub: &MessagingHub, topic: &str, message: Message) -> Outcome {
    let receipt = wait::within(SOON, "a receipt", hub.publish(topic, message)).await;
    receipt.expect("it is accepted").outcome
}

async fn take(consumer: &mut Consumer, n: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < n {
        let what = format!("{n} deliveries, {} came", taken.len());
        let batch = wait::within(RECOVERY, &what, consumer.deliveries.recv()).await;
        taken.extend(batch.expect("the consumer lives"));
    }
    taken
}

async fn ack_all(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.ack().await.unwrap();
    }
}

/// A live reader that misses nothing from here on.
async fn reader(hub: &MessagingHub, topic: &str) -> Consumer {
    let consumer = hub
        .stream_events(topic, SubscribeOptions::default())
        .await
        .unwrap();
    assert!(wait::within(SOON, "a live reader", consumer.control.active()).await);
    consumer
}

/// A group's member, from the start of the stream on.
async fn member(hub: &MessagingHub, topic: &str, group: &str) -> Consumer {
    hub.stream_events(topic, SubscribeOptions::group(group))
        .await
        .unwrap()
}

// ---- publishing ------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn fault_01_confirmed_publishes_one_after_the_other_do_not_block() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let kafka = need!(shared_kafka().await);
    let (tasks, on_rabbitmq) = started(over_rabbitmq(rabbit.url())).await;
    let (events, on_kafka) = started(over_kafka(kafka.bootstrap())).await;
    let (embedded, on_embedded) = started(alone()).await;
    for (hub, topic) in [
        (&on_rabbitmq, queue(&on_rabbitmq).await),
        (&on_kafka, stream(&on_kafka, 1).await),
        (&on_embedded, queue(&on_embedded).await),
    ] {
        for n in 0..300 {
            publish(hub, &topic, text(n.to_string())).await;
        }
    }
    let stats = || on_rabbitmq.metrics().hub.publish_successes;
    assert_eq!(stats(), 300);
    for system in [tasks, events, embedded] {
        assert_eq!(system.close().await.left_in_memory_spool, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_02_a_publish_before_any_subscriber_is_kept_or_refused() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let kafka = need!(shared_kafka().await);
    let (tasks, hub) = started(over_rabbitmq(rabbit.url())).await;
    let to = queue(&hub).await;
    publish(&hub, &to, text("early")).await;
    let leased = hub.lease(&to, 1, SOON).await.unwrap();
    assert_eq!(body(&leased[0].message), "early");
    ack_all(leased).await;
    let error = hub
        .publish(&unique("tasks.nowhere"), text("x"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::PublishRejected, "{error}");
    tasks.close().await;

    let (events, hub) = started(over_kafka(kafka.bootstrap())).await;
    let to = stream(&hub, 1).await;
    publish(&hub, &to, text("early")).await;
    let mut late = member(&hub, &to, "late").await;
    let got = take(&mut late, 1).await;
    assert_eq!(body(&got[0].message), "early");
    ack_all(got).await;
    let error = hub
        .publish(&unique("events.nowhere"), text("x"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::TopicNotFound, "{error}");
    events.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_other_arguments_are_reported_and_publishing_goes_on() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let name = unique("tasks.drift");
    let spec = |max_priority| QueueSpec {
        name: name.clone(),
        options: QueueOptions {
            max_priority: Some(max_priority),
            ..QueueOptions::default()
        },
        bindings: Vec::new(),
        aliases: Vec::new(),
    };
    let before = RabbitMqBroker::new(
        over_rabbitmq(rabbit.url()).rabbitmq.unwrap(),
        Arc::new(Topology {
            queues: vec![spec(5)],
            ..Topology::default()
        }),
        TopologyMode::Apply,
    );
    before.connect().await.unwrap();

    let mut config = over_rabbitmq(rabbit.url());
    config.topology.queues.push(spec(10));
    let (system, hub) = started(config).await;
    let report = hub.topology(false).await.unwrap();
    let object = format!("queue {name}");
    let drift = report.drift.iter().find(|d| d.object == object).unwrap();
    assert_eq!(
        (
            drift.argument.as_str(),
            drift.expected.as_str(),
            drift.actual.as_str()
        ),
        ("x-max-priority", "10", "5")
    );
    let other = queue(&hub).await;
    for n in 0..5 {
        publish(&hub, &name, text(n.to_string())).await;
        publish(&hub, &other, text(n.to_string())).await;
    }
    assert_eq!(system.close().await.left_in_memory_spool, 0);
    for queue in [&name, &other] {
        let topic = messaging_hub::Topic::new(queue).unwrap();
        assert_eq!(before.queue_depth(&topic).await.unwrap(), 5, "{queue}");
    }
    before.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_11_a_batch_has_one_outcome_for_each_message() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let kafka = need!(shared_kafka().await);
    let (tasks, on_rabbitmq) = started(over_rabbitmq(rabbit.url())).await;
    let (events, on_kafka) = started(over_kafka(kafka.bootstrap())).await;
    let (embedded, on_embedded) = started(alone()).await;
    for (hub, topic) in [
        (&on_rabbitmq, queue(&on_rabbitmq).await),
        (&on_kafka, stream(&on_kafka, 1).await),
        (&on_embedded, queue(&on_embedded).await),
    ] {
        let mut messages: Vec<_> = (0..100).map(|n| text(n.to_string())).collect();
        messages[30] = text("reserved").with_header("hub-id", "x");
        messages[60] = text("expired").with_expiration(Timestamp::from_millis(1));
        messages[90] = text("x".repeat(11 * 1024 * 1024));
        let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
        let outcomes = hub.publish_batch(&topic, messages).await;
        assert_eq!(outcomes.len(), 100);
        for (n, outcome) in outcomes.into_iter().enumerate() {
            let expected = match n {
                30 => Some(ErrorCode::MessageInvalid),
                60 => Some(ErrorCode::MessageExpired),
                90 => Some(ErrorCode::MessageTooLarge),
                _ => None,
            };
            match (outcome, expected) {
                (Ok(receipt), None) => assert_eq!(receipt.id, ids[n]),
                (Err(error), Some(code)) => assert_eq!(error.code(), code, "{n}: {error}"),
                other => panic!("{topic} {n}: {other:?}"),
            }
        }
    }
    for system in [tasks, events, embedded] {
        system.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_16_two_thousand_publishes_at_once_have_two_thousand_ids() {
    let (system, hub) = started(alone()).await;
    let topic = queue(&hub).await;
    let publishing: Vec<_> = (0..8)
        .map(|_| {
            let (hub, topic) = (hub.clone(), topic.clone());
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..250 {
                    ids.push(hub.publish(&topic, text("x")).await.unwrap().id);
                }
                ids
            })
        })
        .collect();
    let mut ids = HashSet::new();
    for task in publishing {
        ids.extend(task.await.unwrap());
    }
    assert_eq!(ids.len(), 2000);
    let mut read = HashSet::new();
    while read.len() < 2000 {
        let leased = hub.lease(&topic, 500, SOON).await.unwrap();
        assert!(!leased.is_empty(), "{} were read", read.len());
        for delivery in leased {
            assert!(read.insert(delivery.message.id.clone()), "an id came twice");
            delivery.ack().await.unwrap();
        }
    }
    assert_eq!(read, ids);
    system.close().await;
}

// ---- a broker that dies ----------------------------------------------------

async fn health(hub: &MessagingHub, of: BrokerType) -> Result<(), String> {
    hub.health_check().await.remove(&of).expect("it is asked")
}

/// The hub says at once that the broker is dead, and later that it is back.
async fn health_is(hub: &MessagingHub, of: BrokerType, well: bool) {
    let what = format!("{of} is {}", if well { "well" } else { "dead" });
    wait::until(RECOVERY, &what, async || {
        let state = hub.state();
        let broker = state.brokers.iter().find(|b| b.kind == of).unwrap();
        health(hub, of).await.is_ok() == well && broker.connected == well
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_04_fault_12_fault_13_both_subscribers_of_a_queue_outlive_rabbitmq() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let (system, hub) = started(over_rabbitmq(rabbit.url())).await;
    let name = unique("tasks.survivor");
    let arguments = QueueOptions {
        max_priority: Some(10),
        max_length: Some(1_000_000),
        ..QueueOptions::default()
    };
    hub.declare_queue(&name, &arguments).await.unwrap();
    // A message is done when the other subscriber has one too: with a prefetch
    // of one, only two that live get any further.
    let both = Arc::new(Barrier::new(2));
    let (handled, mut done) = mpsc::unbounded_channel();
    let mut subscriptions = Vec::new();
    for _ in 0..2 {
        let (both, handled) = (both.clone(), handled.clone());
        let handler = move |received: Received| {
            let (both, handled) = (both.clone(), handled.clone());
            async move {
                both.wait().await;
                handled.send(body(&received.message)).unwrap();
                Ok::<(), HandlerError>(())
            }
        };
        let options = SubscribeOptions::default().with_prefetch(1);
        subscriptions.push(hub.subscribe_tasks(&name, options, handler).await.unwrap());
    }
    let mut pair = async |round: &str| {
        for n in 0..2 {
            publish(&hub, &name, text(format!("{round}-{n}"))).await;
        }
        let mut got = BTreeSet::new();
        while got.len() < 2 {
            got.extend(wait::within(RECOVERY, "both handlers", done.recv()).await);
        }
        let expected = (0..2).map(|n| format!("{round}-{n}")).collect();
        assert_eq!(got, expected);
    };
    pair("before").await;
    rabbit.kill().await;
    health_is(&hub, BrokerType::RabbitMq, false).await;
    assert!(!hub.is_connected());
    rabbit.restart().await;
    health_is(&hub, BrokerType::RabbitMq, true).await;
    pair("after").await;
    assert!(subscriptions.iter().all(Subscription::is_active));
    // The arguments are what they were: declaring them again is no drift.
    hub.declare_queue(&name, &arguments).await.unwrap();
    assert_eq!(system.close().await.left_in_memory_spool, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_04_fault_08_fault_12_fault_13_both_readers_of_a_stream_outlive_kafka() {
    let mut kafka = need!(Kafka::start().await);
    let (system, hub) = started(over_kafka(kafka.bootstrap())).await;
    let topic = stream(&hub, 2).await;
    let mut readers = [reader(&hub, &topic).await, reader(&hub, &topic).await];
    let mut all = async |said: &str| {
        publish(&hub, &topic, text(said)).await;
        for reader in &mut readers {
            loop {
                let delivery = take(reader, 1).await.remove(0);
                let last = body(&delivery.message) == said;
                // One of a dead generation cannot be settled; it comes again.
                let _ = delivery.ack().await;
                if last {
                    break;
                }
            }
        }
    };
    all("before").await;
    kafka.kill().await;
    health_is(&hub, BrokerType::Kafka, false).await;
    // On the fallback: each of them reads what was spooled.
    all("during").await;
    kafka.restart().await;
    health_is(&hub, BrokerType::Kafka, true).await;
    all("after").await;
    assert_eq!(system.close().await.left_in_memory_spool, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_comes_back_falls_silent_with_its_broker_and_comes_back_again() {
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let kafka = need!(shared_kafka().await);
    let route = |pattern: &str, kind, topic: &str| RouteSettings {
        canary: Some(CanarySettings {
            topic: Topic::new(topic).unwrap(),
            every: Duration::from_millis(500),
            within: Duration::from_secs(5),
        }),
        ..RouteSettings::new(Pattern::new(pattern).unwrap(), kind)
    };
    let mut config = MessagingConfig {
        kafka: over_kafka(kafka.bootstrap()).kafka,
        ..over_rabbitmq(rabbit.url())
    };
    config.hub.routes = vec![
        route("tasks.#", RouteKind::Task, &unique("tasks.canary")),
        route("events.#", RouteKind::Event, &unique("events.canary")),
    ];
    let (system, hub) = started(config).await;
    // (tasks, events)
    let are = async |tasks: bool, events: bool| {
        let what = format!("canaries {tasks}, {events}");
        wait::until(RECOVERY, &what, async || {
            let routes = hub.state().routes;
            let well = |n: usize| routes[n].canary.as_ref().and_then(|c| c.well);
            well(0) == Some(tasks) && well(1) == Some(events)
        })
        .await;
    };
    are(true, true).await;
    assert!(hub.state().routes[0].canary.as_ref().unwrap().latency_ms < Some(5_000.0));
    rabbit.kill().await;
    are(false, true).await;
    let sick = hub.state().routes[0].canary.clone().unwrap();
    assert!(sick.failures > 0 && sick.reason.is_some(), "{sick:?}");
    rabbit.restart().await;
    are(true, true).await;
    // It is no traffic of the route: nothing of it was spooled or counted.
    assert!(hub.state().routes.iter().all(|r| r.spool.messages == 0));
    assert_eq!(hub.metrics().hub.messages_published, 0);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_on_rabbitmq_reaches_its_readers_also_when_its_topic_is_new() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let root = unique("user");
    let pattern = format!("{root}.#");
    let mut config = over_rabbitmq(rabbit.url());
    config.hub.routes = vec![RouteSettings {
        primary: Some(BrokerType::RabbitMq),
        ..RouteSettings::new(Pattern::new(&pattern).unwrap(), RouteKind::Event)
    }];
    let (system, hub) = started(config).await;
    let (read, mut reads) = mpsc::unbounded_channel();
    let handler = move |received: Received| {
        let read = read.clone();
        async move {
            read.send((received.topic.to_string(), body(&received.message)))
                .unwrap();
            Ok::<(), HandlerError>(())
        }
    };
    let options = SubscribeOptions::group(unique("readers"));
    let subscription = hub.subscribe(&pattern, options, handler).await.unwrap();
    let topic = format!("{root}.created");
    // Refused, as NO_ROUTE, until the group's queue is bound.
    wait::until(SOON, "the event is accepted", || async {
        hub.publish(&topic, text("new")).await.is_ok()
    })
    .await;
    let got = wait::within(SOON, "the event", reads.recv()).await;
    assert_eq!(got, Some((topic, "new".to_owned())));
    subscription.unsubscribe().await;
    system.close().await;
}

// ---- the fallback ----------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn fault_08_on_the_fallback_an_event_reaches_each_of_two_subscribers() {
    let (system, hub) = started(alone()).await;
    let topic = stream(&hub, 3).await;
    let (sent, mut got) = mpsc::unbounded_channel();
    let mut subscriptions = Vec::new();
    for name in ["one", "two"] {
        let sent = sent.clone();
        let handler = move |received: Received| {
            sent.send((name, body(&received.message))).unwrap();
            async { Ok::<(), HandlerError>(()) }
        };
        let subscription = hub
            .subscribe_events(&topic, SubscribeOptions::default(), handler)
            .await
            .unwrap();
        assert!(subscription.active().await);
        subscriptions.push(subscription);
    }
    for n in 0..50 {
        publish(&hub, &topic, text(n.to_string())).await;
    }
    let mut seen: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for _ in 0..100 {
        let (name, body) = wait::within(SOON, "an event", got.recv()).await.unwrap();
        assert!(
            seen.entry(name).or_default().insert(body),
            "{name} got it twice"
        );
    }
    assert!(seen["one"].len() == 50 && seen["two"].len() == 50);
    drop(subscriptions);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_09_tasks_are_handed_out_by_priority_and_in_order_within_one() {
    // Alone, and as the spool of a broker that is away.
    let away = over_rabbitmq(&format!("amqp://guest:guest@{NOBODY}/%2f"));
    for config in [alone(), away] {
        let (system, hub) = started(config).await;
        let name = unique("tasks.priority");
        let publisher = hub.publisher(&name).unwrap();
        let priorities = [5, 5, 9, 5, 1, 9, 5, 1, 9];
        for (n, priority) in priorities.into_iter().enumerate() {
            let message =
                text(format!("{priority}-{n}")).with_priority(Priority::new(priority).unwrap());
            publisher.publish(message).await.unwrap();
        }
        let mut got = Vec::new();
        while got.len() < priorities.len() {
            let leased = hub.lease(&name, 1, SOON).await.unwrap();
            assert!(!leased.is_empty(), "only {got:?}");
            got.extend(leased.iter().map(|d| body(&d.message)));
            ack_all(leased).await;
        }
        assert_eq!(
            got,
            [
                "9-2", "9-5", "9-8", "5-0", "5-1", "5-3", "5-6", "1-4", "1-7"
            ]
        );
        assert_eq!(system.close().await.left_in_memory_spool, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_failed_event_is_not_skipped_when_a_later_one_commits() {
    let kafka = need!(shared_kafka().await);
    let (first, hub) = started(over_kafka(kafka.bootstrap())).await;
    let topic = stream(&hub, 1).await;
    let group = unique("group");
    for n in 0..10 {
        publish(&hub, &topic, text(n.to_string()).with_key("k")).await;
    }
    let mut consumer = member(&hub, &topic, &group).await;
    for delivery in take(&mut consumer, 10).await {
        // The fourth is dropped without a verdict.
        if body(&delivery.message) != "3" {
            delivery.ack().await.unwrap();
        }
    }
    drop(consumer);
    first.close().await;
    // Another process of the group goes on where the first one failed.
    let (second, hub) = started(over_kafka(kafka.bootstrap())).await;
    let mut consumer = member(&hub, &topic, &group).await;
    let rest = take(&mut consumer, 7).await;
    let bodies: Vec<_> = rest.iter().map(|d| body(&d.message)).collect();
    assert_eq!(bodies, ["3", "4", "5", "6", "7", "8", "9"]);
    ack_all(rest).await;
    second.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_15_streams_in_memory_have_partitions_groups_positions_and_patience() {
    let (system, hub) = started(alone()).await;
    let topic = stream(&hub, 4).await;
    let start = Timestamp::now();
    // Two members from the beginning, and one reader that does not read yet.
    let mut one = member(&hub, &topic, "shared").await;
    let mut two = member(&hub, &topic, "shared").await;
    let mut slow_options = SubscribeOptions::default();
    slow_options.stream.buffer_size = 4;
    let mut slow = hub.stream_events(&topic, slow_options).await.unwrap();
    for n in 0..400_u64 {
        let message = text(n.to_string())
            .with_key(format!("key-{}", n % 40))
            .with_timestamp(start + Duration::from_secs(n));
        publish(&hub, &topic, message).await;
    }
    let metadata = hub.topic_metadata(&topic).await.unwrap();
    let used = metadata.partitions.iter().filter(|p| p.high_watermark > 0);
    assert_eq!(used.count(), 4, "keys spread over the partitions");

    // A group's members share the partitions.
    let mut by_member = [Vec::new(), Vec::new()];
    while by_member[0].len() + by_member[1].len() < 400 {
        let (who, batch) = tokio::select! {
            batch = one.deliveries.recv() => (0, batch),
            batch = two.deliveries.recv() => (1, batch),
            () = tokio::time::sleep(SOON) => panic!("the group does not get on"),
        };
        for delivery in batch.expect("the member lives") {
            by_member[who].push(delivery.partition.unwrap());
            delivery.ack().await.unwrap();
        }
    }
    let [a, b] = by_member.map(BTreeSet::from_iter);
    assert!(
        a.is_disjoint(&b) && !a.is_empty() && !b.is_empty(),
        "{a:?} {b:?}"
    );

    // Whoever reads late loses nothing.
    let late: BTreeSet<_> = take(&mut slow, 400)
        .await
        .iter()
        .map(|d| body(&d.message))
        .collect();
    assert_eq!(late.len(), 400);

    // A time is a time, for a group and for a reader.
    let at = start + Duration::from_secs(300);
    hub.seek("shared", &topic, None, SeekTo::Time(at))
        .await
        .unwrap();
    let since = SubscribeOptions::default().starting(StartFrom::Time(at));
    let mut replay = hub.stream_events(&topic, since).await.unwrap();
    let read = take(&mut replay, 100).await;
    let bodies: BTreeSet<u64> = read
        .iter()
        .map(|d| body(&d.message).parse().unwrap())
        .collect();
    assert_eq!(bodies, (300..400).collect());
    // Nothing is in hand that closing would wait for.
    drop((read, replay, slow, one, two));
    system.close().await;
}

// ---- settings and shared state ----------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn fault_17_the_port_of_a_broker_is_shown_as_a_number() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let (system, hub) = started(over_rabbitmq(rabbit.url())).await;
    let state = hub.state();
    let of = |kind| state.brokers.iter().find(|b| b.kind == kind).unwrap();
    let endpoints = of(BrokerType::RabbitMq).endpoints.join(" ");
    let port = format!(":{}", rabbit.port());
    assert!(endpoints.contains(&port), "{endpoints}");
    assert!(!endpoints.contains("guest:guest"), "{endpoints}");
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_closing_twice_and_using_it_from_many_tasks_is_safe() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V3_10).await);
    let (system, hub) = started(over_rabbitmq(rabbit.url())).await;
    let topic = queue(&hub).await;
    let (handled, mut done) = mpsc::unbounded_channel();
    let using: Vec<_> = (0..8)
        .map(|task| {
            let (hub, topic, handled) = (hub.clone(), topic.clone(), handled.clone());
            tokio::spawn(async move {
                // Subscribers come and go while others publish and look.
                let handler = move |received: Received| {
                    handled.send(body(&received.message)).unwrap();
                    async { Ok::<(), HandlerError>(()) }
                };
                let subscription = hub
                    .subscribe_tasks(&topic, SubscribeOptions::default(), handler)
                    .await
                    .unwrap();
                for n in 0..50 {
                    publish(&hub, &topic, text(format!("{task}-{n}"))).await;
                    let _ = hub.state();
                    let _ = hub.metrics();
                }
                // One stays, for what the others leave.
                if task == 0 {
                    return Some(subscription);
                }
                subscription.unsubscribe().await;
                None
            })
        })
        .collect();
    let mut stays = Vec::new();
    for task in using {
        stays.extend(task.await.unwrap());
    }
    let mut got = BTreeSet::new();
    while got.len() < 400 {
        got.extend(wait::within(SOON, "all are handled", done.recv()).await);
    }
    let (a, b) = tokio::join!(system.close(), system.close());
    assert_eq!(a, b);
    assert_eq!(system.close().await, a);
    let error = hub.publish(&topic, text("late")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_breaker_and_retry_settings_are_used() {
    // The breaker opens after as many failures as it was told, and no sooner.
    for (threshold, expected) in [(2, BreakerState::Open), (1_000_000, BreakerState::Closed)] {
        let mut config = over_rabbitmq(&format!("amqp://guest:guest@{NOBODY}/%2f"));
        config.hub.health_check_interval = Duration::from_millis(20);
        config.hub.breaker.threshold = threshold;
        let (system, hub) = started(config).await;
        let broker = || {
            let state = hub.state();
            let mut brokers = state.brokers.into_iter();
            brokers.find(|b| b.kind == BrokerType::RabbitMq).unwrap()
        };
        // Three probes have failed: it was asked again after the second.
        let mut probes = BTreeSet::new();
        wait::until(SOON, "three failed probes", || {
            let broker = broker();
            probes.extend(broker.probe_error.and(broker.last_probe));
            std::future::ready(probes.len() >= 3)
        })
        .await;
        assert_eq!(broker().breaker, Some(expected), "threshold {threshold}");
        system.close().await;
    }

    // A message that says nothing is tried as often as the settings say.
    let mut config = alone();
    config.hub.retry.max_retries = 1;
    config.hub.retry.event_delay = Duration::from_millis(5);
    let (system, hub) = started(config).await;
    let topic = stream(&hub, 1).await;
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = attempts.clone();
    let (good, mut passed) = mpsc::unbounded_channel();
    let handler = move |received: Received| {
        let (counted, good) = (counted.clone(), good.clone());
        async move {
            if &received.message.payload[..] == b"good" {
                good.send(()).unwrap();
                return Ok(());
            }
            counted.fetch_add(1, SeqCst);
            Err(HandlerError::retry("boom"))
        }
    };
    let subscription = hub
        .subscribe_events(&topic, SubscribeOptions::group("g"), handler)
        .await
        .unwrap();
    // In the lane of one key, so the good one comes when the bad one is over.
    publish(&hub, &topic, text("bad").with_key("k")).await;
    publish(&hub, &topic, text("good").with_key("k")).await;
    wait::within(SOON, "the good one", passed.recv())
        .await
        .unwrap();
    assert_eq!(attempts.load(SeqCst), 2);
    subscription.unsubscribe().await;
    system.close().await;
}
