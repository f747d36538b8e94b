//! Consuming: groups, positions, settlement, slow readers.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use messaging_hub::{
    ErrorCode, MessageBroker, Pattern, PublishOptions, SubscribeOptions, Timestamp, Topic,
    broker::{
        EventStreamBroker, OffsetReset, SeekTo, Source, StartFrom, StreamOptions, Verdict,
        options::Filter,
    },
};

use crate::{
    common::*,
    support::{need, shared_kafka, unique},
};

async fn offset(
    broker: &messaging_hub::adapter::kafka::KafkaBroker,
    group: &str,
    topic: &Topic,
) -> Option<i64> {
    broker.offset(group, topic, 0).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_failed_message_is_not_skipped_when_a_later_one_commits() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "skip", 1).await;
    publish(
        &broker,
        &topic,
        (0..10).map(|i| text(&i.to_string())).collect(),
    )
    .await;
    let group = unique("g");
    let options = SubscribeOptions {
        commit_interval: Duration::from_millis(50),
        ..SubscribeOptions::group(&group)
    };
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    let mut failed = None;
    for delivery in take(&mut consumer, 10).await {
        if body(&delivery) == "3" {
            failed = Some(delivery);
        } else {
            delivery.ack().await.unwrap();
        }
    }
    eventually("what came before is committed", || async {
        offset(&broker, &group, &topic).await == Some(3)
    })
    .await;
    // Given back: it comes again at once, marked.
    failed.unwrap().requeue().await.unwrap();
    let again = take(&mut consumer, 1).await.remove(0);
    assert_eq!(body(&again), "3");
    assert!(again.received().message.redelivered);
    // Left to the group at the end.
    drop(again);
    stop(consumer).await;
    assert_eq!(offset(&broker, &group, &topic).await, Some(3));
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    let rest = take(&mut consumer, 7).await;
    assert_eq!(body(&rest[0]), "3");
    ack_all(rest).await;
    stop(consumer).await;
    assert_eq!(offset(&broker, &group, &topic).await, Some(10));
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_13_two_subscribers_of_a_topic_both_get_everything() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "two", 3).await;
    let mut a = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("a")))
        .await
        .unwrap();
    let mut b = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("b")))
        .await
        .unwrap();
    publish(
        &broker,
        &topic,
        (0..60).map(|i| text(&i.to_string())).collect(),
    )
    .await;
    for consumer in [&mut a, &mut b] {
        let got = take(consumer, 60).await;
        let bodies: BTreeSet<_> = got.iter().map(body).collect();
        assert_eq!(bodies.len(), 60);
        ack_all(got).await;
    }
    stop(a).await;
    stop(b).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebalance_of_two_members_loses_nothing_and_stale_settlements_fail() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "rebalance", 4).await;
    let group = unique("g");
    let options = SubscribeOptions::group(&group);
    let mut a = broker.consume(&stream(&topic), &options).await.unwrap();
    active(&a).await;
    let messages = (0..200)
        .map(|i| text(&i.to_string()).with_key(i.to_string()))
        .collect();
    publish(&broker, &topic, messages).await;
    // The first member holds everything when the second comes.
    let held = take(&mut a, 200).await;
    let mut b = broker.consume(&stream(&topic), &options).await.unwrap();
    active(&b).await;
    let mut handled = BTreeSet::new();
    // The second gets what it took over, again.
    let first = tokio::time::timeout(WAIT, b.deliveries.recv())
        .await
        .unwrap()
        .unwrap();
    let moved: BTreeSet<i32> = first
        .iter()
        .filter_map(|d| d.received().message.partition)
        .collect();
    assert!(!moved.is_empty());
    for delivery in first {
        handled.insert(body(&delivery));
        delivery.ack().await.unwrap();
    }
    let mut stale = 0;
    for delivery in held {
        let (text, partition) = (
            body(&delivery),
            delivery.received().message.partition.unwrap(),
        );
        match delivery.ack().await {
            Ok(()) => {
                handled.insert(text);
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::AckFailed, "{error}");
                stale += 1;
            }
        }
        let _ = partition;
    }
    assert!(stale > 0, "the partitions that moved are stale");
    while handled.len() < 200 {
        for delivery in take(&mut b, 1).await {
            handled.insert(body(&delivery));
            delivery.ack().await.unwrap();
        }
    }
    // Both share what comes now.
    let messages = (200..600)
        .map(|i| text(&i.to_string()).with_key(i.to_string()))
        .collect();
    publish(&broker, &topic, messages).await;
    let (mut by_a, mut by_b) = (0, 0);
    while handled.len() < 600 {
        tokio::select! {
            Some(batch) = a.deliveries.recv() => for d in batch {
                by_a += 1;
                handled.insert(body(&d));
                d.ack().await.unwrap();
            },
            Some(batch) = b.deliveries.recv() => for d in batch {
                by_b += 1;
                handled.insert(body(&d));
                d.ack().await.unwrap();
            },
            () = tokio::time::sleep(WAIT) => panic!("{} of 600", handled.len()),
        }
    }
    assert!(by_a > 0 && by_b > 0, "shared: {by_a} and {by_b}");
    stop(a).await;
    stop(b).await;
    let mut committed = 0;
    for partition in 0..4 {
        committed += broker
            .offset(&group, &topic, partition)
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(committed, 600);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn seeking_by_time_moves_a_live_group_and_one_at_rest() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "seek", 2).await;
    let start = Timestamp::now().as_millis() - 100_000;
    let messages = (0..100)
        .map(|i| {
            text(&i.to_string())
                .with_partition(i % 2)
                .with_timestamp(Timestamp::from_millis(start + i64::from(i) * 1000))
        })
        .collect();
    publish(&broker, &topic, messages).await;
    let group = unique("g");
    let options = SubscribeOptions::group(&group);
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    ack_all(take(&mut consumer, 100).await).await;
    // Live.
    let at = Timestamp::from_millis(start + 60_000);
    broker
        .seek(&group, &topic, None, SeekTo::Time(at))
        .await
        .unwrap();
    let again = take(&mut consumer, 40).await;
    let bodies: BTreeSet<u32> = again.iter().map(|d| body(d).parse().unwrap()).collect();
    assert_eq!(bodies, (60..100).collect());
    ack_all(again).await;
    stop(consumer).await;
    assert_eq!(offset(&broker, &group, &topic).await, Some(50));
    // At rest.
    let at = Timestamp::from_millis(start + 90_000);
    broker
        .seek(&group, &topic, None, SeekTo::Time(at))
        .await
        .unwrap();
    assert_eq!(offset(&broker, &group, &topic).await, Some(45));
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    let bodies: BTreeSet<u32> = take(&mut consumer, 10)
        .await
        .iter()
        .map(|d| body(d).parse().unwrap())
        .collect();
    assert_eq!(bodies, (90..100).collect());
    stop(consumer).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_by_time_leaves_the_positions_of_live_groups_alone() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "replay", 3).await;
    let start = Timestamp::now().as_millis() - 50_000;
    let messages = (0..50)
        .map(|i| {
            text(&i.to_string())
                .with_key(i.to_string())
                .with_timestamp(Timestamp::from_millis(start + i64::from(i) * 1000))
        })
        .collect();
    publish(&broker, &topic, messages).await;
    let group = unique("g");
    let mut live = broker
        .consume(&stream(&topic), &SubscribeOptions::group(&group))
        .await
        .unwrap();
    ack_all(take(&mut live, 50).await).await;
    let at = Timestamp::from_millis(start + 30_000);
    let options = SubscribeOptions::default().starting(StartFrom::Time(at));
    let mut replay = broker
        .stream_messages(live_pattern(&topic), &options)
        .await
        .unwrap();
    let bodies: BTreeSet<u32> = take(&mut replay, 20)
        .await
        .iter()
        .map(|d| body(d).parse().unwrap())
        .collect();
    assert_eq!(bodies, (30..50).collect());
    stop(replay).await;
    // The live group got nothing of it and stands where it stood.
    assert!(live.deliveries.try_recv().is_err());
    stop(live).await;
    let mut committed = 0;
    for partition in 0..3 {
        committed += broker
            .offset(&group, &topic, partition)
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(committed, 50);
    broker.close().await.unwrap();
}

fn live_pattern(topic: &Topic) -> &'static Pattern {
    Box::leak(Box::new(Pattern::from(topic)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_at_the_latest_misses_nothing_once_it_is_active() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "latest", 4).await;
    publish(&broker, &topic, (0..20).map(|_| text("old")).collect()).await;
    for round in 0..5 {
        let mut readers = Vec::new();
        for options in [
            SubscribeOptions::default(),
            SubscribeOptions {
                offset_reset: Some(OffsetReset::Latest),
                ..SubscribeOptions::group(unique("latest"))
            },
        ] {
            let reader = broker.consume(&stream(&topic), &options).await.unwrap();
            active(&reader).await;
            readers.push(reader);
        }
        let messages = (0..40)
            .map(|i| text(&format!("{round}-{i}")).with_key(i.to_string()))
            .collect();
        publish(&broker, &topic, messages).await;
        for mut reader in readers {
            let got = take(&mut reader, 40).await;
            assert!(
                got.iter()
                    .all(|d| body(d).starts_with(&format!("{round}-")))
            );
            ack_all(got).await;
            stop(reader).await;
        }
    }
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_is_paused_keeps_its_membership_and_loses_nothing() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "slow", 2).await;
    let options = SubscribeOptions {
        session_timeout: Duration::from_secs(6),
        heartbeat_interval: Duration::from_secs(1),
        max_poll_records: 20,
        buffer_size: 1,
        ..SubscribeOptions::group(unique("g"))
    };
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    active(&consumer).await;
    publish(
        &broker,
        &topic,
        (0..500)
            .map(|i| text(&i.to_string()).with_key(i.to_string()))
            .collect(),
    )
    .await;
    let first = take(&mut consumer, 20).await;
    // A member that falls silent now, with a longer session: once the
    // coordinator has given it up, more than our own session has passed, and only
    // background heartbeats have kept us.
    let silent = unique("silent");
    fall_silent(node.bootstrap(), &silent, &topic, Duration::from_secs(8)).await;
    assert!(!has_no_members(node.bootstrap(), &silent).await);
    eventually("the silent member is given up", || {
        has_no_members(node.bootstrap(), &silent)
    })
    .await;
    // No generation has ended, so these still count.
    let mut seen: BTreeSet<String> = first.iter().map(body).collect();
    ack_all(first).await;
    while seen.len() < 500 {
        for delivery in take(&mut consumer, 1).await {
            assert!(
                seen.insert(body(&delivery)),
                "no duplicates: {}",
                body(&delivery)
            );
            delivery.ack().await.unwrap();
        }
    }
    stop(consumer).await;
    broker.close().await.unwrap();
}

/// Joins a group and goes without a word: a static member does not say that it
/// leaves, so the coordinator waits for it as long as its session lasts.
async fn fall_silent(bootstrap: &str, group: &str, topic: &Topic, session: Duration) {
    use rdkafka::consumer::{BaseConsumer, Consumer as _};
    let (bootstrap, group, topic) = (bootstrap.to_owned(), group.to_owned(), topic.clone());
    tokio::task::spawn_blocking(move || {
        let member: BaseConsumer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .set("group.id", &group)
            .set("group.instance.id", "silent")
            .set("session.timeout.ms", session.as_millis().to_string())
            .set("heartbeat.interval.ms", "500")
            .create()
            .unwrap();
        member.subscribe(&[topic.as_str()]).unwrap();
        let until = std::time::Instant::now() + WAIT;
        while member.assignment().unwrap().count() == 0 {
            assert!(std::time::Instant::now() < until, "it never joined");
            let _ = member.poll(Duration::from_millis(50));
        }
    })
    .await
    .unwrap();
}

async fn has_no_members(bootstrap: &str, group: &str) -> bool {
    use rdkafka::consumer::{BaseConsumer, Consumer as _};
    let (bootstrap, group) = (bootstrap.to_owned(), group.to_owned());
    tokio::task::spawn_blocking(move || {
        let asks: BaseConsumer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .create()
            .unwrap();
        let list = asks.fetch_group_list(Some(&group), WAIT).unwrap();
        list.groups().iter().all(|g| g.members().is_empty())
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_without_a_group_loses_nothing() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "slow-live", 1).await;
    let options = SubscribeOptions {
        stream: StreamOptions {
            buffer_size: 10,
            ..StreamOptions::default()
        },
        ..SubscribeOptions::default()
    };
    let mut consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    active(&consumer).await;
    publish(
        &broker,
        &topic,
        (0..2000).map(|i| text(&i.to_string())).collect(),
    )
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let got = take(&mut consumer, 2000).await;
    for (i, delivery) in got.iter().enumerate() {
        assert_eq!(body(delivery), i.to_string());
    }
    stop(consumer).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_finds_new_topics_and_a_partition_can_be_read_alone() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let prefix = unique("pat");
    let pattern = Source::Stream(Pattern::new(format!("{prefix}.*")).unwrap());
    let first = Topic::new(format!("{prefix}.a")).unwrap();
    let two = messaging_hub::broker::TopicOptions {
        partitions: 2,
        ..Default::default()
    };
    broker.create_topic(&first, &two).await.unwrap();
    let grouped = broker
        .consume(&pattern, &SubscribeOptions::group(unique("g")))
        .await
        .unwrap();
    let live = broker
        .consume(&pattern, &SubscribeOptions::default())
        .await
        .unwrap();
    active(&grouped).await;
    active(&live).await;
    let second = Topic::new(format!("{prefix}.b")).unwrap();
    broker.create_topic(&second, &two).await.unwrap();
    publish(&broker, &first, vec![text("a")]).await;
    publish(&broker, &second, vec![text("b")]).await;
    for mut consumer in [grouped, live] {
        let got = take(&mut consumer, 2).await;
        let topics: BTreeSet<_> = got.iter().map(|d| d.received().topic.clone()).collect();
        assert_eq!(topics, BTreeSet::from([first.clone(), second.clone()]));
        ack_all(got).await;
        stop(consumer).await;
    }
    let messages = (0..10)
        .map(|i| text(&i.to_string()).with_partition(i % 2))
        .collect();
    publish(&broker, &first, messages).await;
    let options = SubscribeOptions {
        stream: StreamOptions {
            partition: Some(1),
            ..StreamOptions::default()
        },
        ..SubscribeOptions::default().starting(StartFrom::Earliest)
    };
    let mut one = broker.consume(&stream(&first), &options).await.unwrap();
    for delivery in take(&mut one, 5).await {
        assert_eq!(delivery.received().message.partition, Some(1));
    }
    stop(one).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_carries_its_failure_and_frees_its_offset() {
    let node = need!(shared_kafka().await);
    let dead = unique("dead-letters");
    let topology = messaging_hub::topology::Topology {
        dead_letter_topic: Some(dead.clone()),
        ..Default::default()
    };
    let broker = messaging_hub::adapter::kafka::KafkaBroker::new(
        config(node.bootstrap()),
        Arc::new(topology),
        messaging_hub::topology::TopologyMode::Apply,
    );
    broker.connect().await.unwrap();
    let topic = topic(&broker, "failing", 1).await;
    publish(
        &broker,
        &topic,
        vec![text("bad").with_key("k"), text("good")],
    )
    .await;
    let group = unique("g");
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(&group))
        .await
        .unwrap();
    let mut got = take(&mut consumer, 2).await;
    let bad = got.remove(0);
    let id = bad.received().message.id.clone();
    bad.dead_letter("rejected", "no such customer")
        .await
        .unwrap();
    ack_all(got).await;
    stop(consumer).await;
    assert_eq!(offset(&broker, &group, &topic).await, Some(2));
    let options = SubscribeOptions::default().starting(StartFrom::Earliest);
    let dead = Topic::new(dead).unwrap();
    let mut reader = broker.consume(&stream(&dead), &options).await.unwrap();
    let letter = take(&mut reader, 1).await.remove(0);
    assert_eq!(letter.received().message.id, id);
    assert_eq!(body(&letter), "bad");
    let failure = letter.received().marks.failure.clone().unwrap();
    assert_eq!(failure.reason, "rejected");
    assert_eq!(failure.details, "no such customer");
    assert_eq!(failure.original_topic, topic.as_str());
    stop(reader).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_and_groups_work_through_subscriptions() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "handlers", 3).await;
    let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
    let subscription = broker
        .subscribe(
            &stream(&topic),
            SubscribeOptions {
                filter: Some(Filter::new(|r| &r.message.payload[..] != b"skip")),
                ..SubscribeOptions::group(unique("g"))
            },
            Arc::new(move |received: messaging_hub::broker::Received| {
                let tx = tx.clone();
                async move {
                    tx.send(received).unwrap();
                    Ok::<(), std::io::Error>(())
                }
            }),
        )
        .await
        .unwrap();
    assert!(subscription.active().await);
    publish(
        &broker,
        &topic,
        vec![text("one"), text("skip"), text("two")],
    )
    .await;
    let mut got = BTreeSet::new();
    for _ in 0..2 {
        let received = tokio::time::timeout(WAIT, rx.recv())
            .await
            .unwrap()
            .unwrap();
        got.insert(received.message.payload.to_vec());
    }
    assert_eq!(got, BTreeSet::from([b"one".to_vec(), b"two".to_vec()]));
    broker.unsubscribe(&Pattern::from(&topic)).await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_kafka_does_not_have_are_refused() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "options", 1).await;
    let wrong = [
        SubscribeOptions {
            exclusive: true,
            ..SubscribeOptions::default()
        },
        SubscribeOptions {
            queue_arguments: [("x-a".to_owned(), "1".to_owned())].into(),
            ..SubscribeOptions::default()
        },
    ];
    for options in wrong {
        let error = broker.consume(&stream(&topic), &options).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
    }
    let error = broker
        .publish(
            &topic,
            text("x"),
            &PublishOptions {
                exchange: "e".into(),
                routing_key: "r".into(),
                ..PublishOptions::default()
            },
        )
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
    // A group without a position and without a place to begin fails, audibly.
    let options = SubscribeOptions {
        offset_reset: Some(OffsetReset::None),
        ..SubscribeOptions::group(unique("none"))
    };
    publish(&broker, &topic, vec![text("x")]).await;
    let consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    eventually("it fails for good", || async {
        consumer.control.failure().is_some()
    })
    .await;
    // A retry through a broker is carried out in memory.
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("retry")))
        .await
        .unwrap();
    let delivery = take(&mut consumer, 1).await.remove(0);
    let failure = messaging_hub::message::wire::Failure::now("r", "d", &topic, None);
    let delay = Duration::from_millis(10);
    delivery
        .settle(Verdict::Retry { delay, failure })
        .await
        .unwrap();
    let again = take(&mut consumer, 1).await.remove(0);
    assert_eq!(again.received().message.retry_count, 1);
    again.ack().await.unwrap();
    stop(consumer).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_waits_for_a_topic_that_does_not_exist_yet() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = Topic::new(unique("later")).unwrap();
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("g")))
        .await
        .unwrap();
    broker
        .ensure(&Source::Stream(Pattern::from(&topic)))
        .await
        .unwrap();
    publish(&broker, &topic, vec![text("x")]).await;
    ack_all(take(&mut consumer, 1).await).await;
    assert!(consumer.control.is_active());
    stop(consumer).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_work_queue_is_a_topic_that_one_group_shares() {
    let node = need!(shared_kafka().await);
    let broker = connected(messaging_hub::adapter::kafka::KafkaConfig {
        group_id: unique("workers"),
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "queue", 2).await;
    publish(
        &broker,
        &topic,
        (0..20).map(|i| text(&i.to_string())).collect(),
    )
    .await;
    let source = Source::Queue(Pattern::from(&topic));
    let options = SubscribeOptions::default().with_prefetch(3);
    let mut consumer = broker.consume(&source, &options).await.unwrap();
    let first = take(&mut consumer, 3).await;
    // The prefetch holds the rest back.
    let more = tokio::time::timeout(Duration::from_millis(500), consumer.deliveries.recv()).await;
    assert!(more.is_err(), "{more:?}");
    ack_all(first).await;
    let mut left = 17;
    while left > 0 {
        // A batch may bring more than one, and never more than the prefetch.
        let next = take(&mut consumer, 1).await;
        assert!(next.len() <= 3);
        left -= next.len();
        ack_all(next).await;
    }
    stop(consumer).await;
    broker.close().await.unwrap();
}
