//! Streams.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use messaging_hub::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{
        Consumer, Delivery, EventStreamBroker, MessageBroker, OffsetReset, Outcome, PublishOptions,
        SeekTo, StartFrom, SubscribeOptions, TopicOptions, Verdict,
    },
    error::ErrorCode,
    message::{Message, Timestamp, wire::Failure},
    topic::Pattern,
    topology::Topology,
};

use super::{body, broker, broker_with, message, publish, stream, take, topic};

/// Publishes `n` messages with `keys` keys and returns their bodies.
async fn publish_keyed(broker: &EmbeddedBroker, to: &str, n: usize, keys: usize) -> Vec<String> {
    let bodies: Vec<String> = (0..n).map(|i| format!("{i:05}")).collect();
    let messages: Vec<Arc<Message>> = bodies
        .iter()
        .enumerate()
        .map(|(i, b)| Arc::new(message(b).with_key(format!("k{}", i % keys))))
        .collect();
    for outcome in broker
        .publish_batch(&topic(to), messages, &PublishOptions::default())
        .await
    {
        outcome.unwrap();
    }
    bodies
}

/// Everything that comes until nothing does for a while (of paused time).
async fn drain(consumer: &mut Consumer) -> Vec<Delivery> {
    let mut all = Vec::new();
    while let Ok(Some(batch)) =
        tokio::time::timeout(Duration::from_secs(1), consumer.deliveries.recv()).await
    {
        all.extend(batch);
    }
    all
}

fn bodies(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(body).collect()
}

async fn ack_all(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.ack().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn fault_08_an_event_reaches_both_of_two_groups_and_every_lone_reader() {
    let broker = broker().await;
    let mut live = broker
        .consume(&stream("events.#"), &SubscribeOptions::default())
        .await
        .unwrap();
    publish(&broker, "events.made", &["a", "b"]).await;
    for group in ["audit", "billing"] {
        let mut consumer = broker
            .consume(&stream("events.made"), &SubscribeOptions::group(group))
            .await
            .unwrap();
        let mut got = drain(&mut consumer).await;
        got.sort_by_key(body);
        assert_eq!(bodies(&got), ["a", "b"], "{group}");
        ack_all(got).await;
    }
    let got = take(&mut live, 2).await;
    assert_eq!(bodies(&got), ["a", "b"]);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_15_keys_spread_over_partitions_and_each_key_keeps_its_order() {
    let broker = broker().await;
    let to = topic("events.keys");
    publish_keyed(&broker, "events.keys", 300, 30).await;
    let metadata = broker.topic_metadata(&to).await.unwrap();
    assert_eq!(metadata.partitions.len(), 3);
    assert!(metadata.partitions.iter().all(|p| p.high_watermark > 0));
    let mut consumer = broker
        .consume(&stream("events.keys"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    let got = drain(&mut consumer).await;
    assert_eq!(got.len(), 300);
    let mut last = std::collections::BTreeMap::new();
    for delivery in &got {
        let key = delivery.key.clone().unwrap();
        if let Some((partition, before)) = last.insert(key, (delivery.partition, body(delivery))) {
            assert_eq!(partition, delivery.partition);
            assert!(before < body(delivery));
        }
    }
    ack_all(got).await;
    for p in 0..3 {
        assert_eq!(
            broker.offset("g", &to, p).await.unwrap(),
            Some(metadata.partitions[p as usize].high_watermark)
        );
    }
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_15_members_of_a_group_share_the_partitions_and_a_leaver_hands_its_own_over() {
    let broker = broker().await;
    let options = SubscribeOptions::group("workers");
    let mut one = broker
        .consume(&stream("events.shared"), &options)
        .await
        .unwrap();
    let mut two = broker
        .consume(&stream("events.shared"), &options)
        .await
        .unwrap();
    let sent = publish_keyed(&broker, "events.shared", 90, 30).await;
    let (first, second) = (drain(&mut one).await, drain(&mut two).await);
    assert!(!first.is_empty() && !second.is_empty());
    let partitions = |d: &[Delivery]| -> BTreeSet<_> { d.iter().map(|d| d.partition).collect() };
    assert!(partitions(&first).is_disjoint(&partitions(&second)));
    assert_eq!(first.len() + second.len(), sent.len());
    ack_all(second).await;
    // The first member goes without a verdict: what it held comes to the second.
    let mut expected = bodies(&first);
    drop(first);
    drop(one);
    let mut got = drain(&mut two).await;
    assert!(got.iter().all(|d| d.redelivered));
    got.sort_by_key(body);
    expected.sort();
    assert_eq!(bodies(&got), expected);
    ack_all(got).await;
    publish_keyed(&broker, "events.shared", 30, 30).await;
    assert_eq!(drain(&mut two).await.len(), 30);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_gets_a_partition_only_when_nothing_of_it_is_in_hand() {
    let broker = broker().await;
    let options = SubscribeOptions::group("g");
    let mut one = broker
        .consume(&stream("events.join"), &options)
        .await
        .unwrap();
    publish_keyed(&broker, "events.join", 60, 30).await;
    let held = drain(&mut one).await;
    assert_eq!(held.len(), 60);
    let mut two = broker
        .consume(&stream("events.join"), &options)
        .await
        .unwrap();
    assert!(drain(&mut two).await.is_empty());
    ack_all(held).await;
    publish_keyed(&broker, "events.join", 60, 30).await;
    let (a, b) = (drain(&mut one).await, drain(&mut two).await);
    assert!(!a.is_empty() && !b.is_empty());
    assert_eq!(a.len() + b.len(), 60);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_14_the_committed_position_never_passes_an_unfinished_message() {
    let broker = broker().await;
    let to = topic("events.mark");
    broker
        .create_topic(
            &to,
            &TopicOptions {
                partitions: 1,
                ..TopicOptions::default()
            },
        )
        .await
        .unwrap();
    publish(&broker, "events.mark", &["0", "1", "2", "3"]).await;
    let mut consumer = broker
        .consume(&stream("events.mark"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    let mut held = take(&mut consumer, 4).await;
    let last = held.pop().unwrap();
    last.ack().await.unwrap();
    assert_eq!(broker.offset("g", &to, 0).await.unwrap(), Some(0));
    let first = held.remove(0);
    first.ack().await.unwrap();
    assert_eq!(broker.offset("g", &to, 0).await.unwrap(), Some(1));
    // What was not settled comes again, what was does not.
    drop(held);
    consumer.control.stop().await;
    let mut again = broker
        .consume(&stream("events.mark"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    let got = drain(&mut again).await;
    assert_eq!(bodies(&got), ["1", "2"]);
    ack_all(got).await;
    assert_eq!(broker.offset("g", &to, 0).await.unwrap(), Some(4));
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_15_a_seek_by_time_finds_the_time_and_not_the_beginning() {
    let broker = broker().await;
    let to = topic("events.time");
    broker
        .create_topic(
            &to,
            &TopicOptions {
                partitions: 1,
                ..TopicOptions::default()
            },
        )
        .await
        .unwrap();
    let start = Timestamp::now();
    for minute in 0..5u64 {
        let m =
            message(&minute.to_string()).with_timestamp(start + Duration::from_secs(60 * minute));
        broker
            .publish(&to, m, &PublishOptions::default())
            .await
            .unwrap();
    }
    let third = start + Duration::from_secs(120);
    let mut reader = broker
        .stream_messages(
            &Pattern::new("events.time").unwrap(),
            &SubscribeOptions::default().starting(StartFrom::Time(third)),
        )
        .await
        .unwrap();
    assert_eq!(bodies(&drain(&mut reader).await), ["2", "3", "4"]);
    let mut member = broker
        .consume(&stream("events.time"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    let held = drain(&mut member).await;
    assert_eq!(held.len(), 5);
    broker
        .seek("g", &to, None, SeekTo::Time(third))
        .await
        .unwrap();
    // Live members follow at once, and verdicts from before are void.
    assert_eq!(bodies(&drain(&mut member).await), ["2", "3", "4"]);
    for stale in held {
        assert_eq!(stale.ack().await.unwrap_err().code(), ErrorCode::AckFailed);
    }
    broker.seek("g", &to, Some(0), SeekTo::End).await.unwrap();
    assert_eq!(broker.offset("g", &to, 0).await.unwrap(), Some(5));
    let outside = broker.seek("g", &to, Some(0), SeekTo::Offset(9)).await;
    assert_eq!(outside.unwrap_err().code(), ErrorCode::InvalidConfig);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_15_a_slow_reader_is_fed_no_faster_than_it_reads_and_loses_nothing() {
    let broker = broker().await;
    let mut options = SubscribeOptions::default();
    options.stream.buffer_size = 8;
    let mut slow = broker
        .consume(&stream("events.slow"), &options)
        .await
        .unwrap();
    let sent = publish_keyed(&broker, "events.slow", 500, 50).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut waiting = 0;
    while let Ok(batch) = slow.deliveries.try_recv() {
        waiting += batch.len();
    }
    assert!(waiting <= 8, "{waiting} waited");
    let mut rest = drain(&mut slow).await;
    rest.sort_by_key(body);
    rest.dedup_by_key(|d| body(d));
    assert_eq!(waiting + rest.len(), sent.len());
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_member_holds_no_more_than_max_poll_records() {
    let broker = broker().await;
    let options = SubscribeOptions {
        max_poll_records: 7,
        ..SubscribeOptions::group("g")
    };
    let mut consumer = broker
        .consume(&stream("events.poll"), &options)
        .await
        .unwrap();
    publish_keyed(&broker, "events.poll", 50, 10).await;
    let held = drain(&mut consumer).await;
    assert_eq!(held.len(), 7);
    ack_all(held).await;
    assert_eq!(drain(&mut consumer).await.len(), 7);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dead_event_goes_to_the_dead_letter_topic_and_its_position_moves_on() {
    let broker = broker().await;
    let mut consumer = broker
        .consume(&stream("events.bad"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    publish(&broker, "events.bad", &["x"]).await;
    let delivery = take(&mut consumer, 1).await.remove(0);
    let partition = delivery.partition.unwrap();
    delivery.dead_letter("handler_error", "boom").await.unwrap();
    assert_eq!(
        broker
            .offset("g", &topic("events.bad"), partition)
            .await
            .unwrap(),
        Some(1)
    );
    let mut dead = broker
        .consume(
            &stream("helixagent.dlq.events"),
            &SubscribeOptions::default().starting(StartFrom::Earliest),
        )
        .await
        .unwrap();
    let got = take(&mut dead, 1).await;
    let failure = got[0].marks.failure.clone().unwrap();
    assert_eq!(
        (
            failure.reason.as_str(),
            failure.details.as_str(),
            failure.original_topic.as_str()
        ),
        ("handler_error", "boom", "events.bad")
    );
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dead_event_that_its_reader_refuses_is_there_once_and_the_reader_is_past_it() {
    let broker = broker().await;
    let of = |group: &str| SubscribeOptions::group(group);
    let mut consumer = broker
        .consume(&stream("events.bad"), &of("g"))
        .await
        .unwrap();
    publish(&broker, "events.bad", &["x"]).await;
    let bad = take(&mut consumer, 1).await.remove(0);
    bad.dead_letter("handler_error", "boom").await.unwrap();
    let log = "helixagent.dlq.events";
    let mut reader = broker.consume(&stream(log), &of("readers")).await.unwrap();
    let letter = take(&mut reader, 1).await.remove(0);
    let partition = letter.partition.unwrap();
    letter.dead_letter("nacked", "no").await.unwrap();
    let position = broker.offset("readers", &topic(log), partition).await;
    assert_eq!(position.unwrap(), Some(1));
    let everything = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut all = broker.consume(&stream(log), &everything).await.unwrap();
    let letters = drain(&mut all).await;
    assert_eq!(letters.len(), 1);
    let failure = letters[0].marks.failure.as_ref().unwrap();
    assert_eq!(failure.details, "boom");
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stream_never_takes_a_delayed_retry_and_hands_the_message_out_again() {
    let broker = broker().await;
    let mut consumer = broker
        .consume(&stream("events.retry"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    publish(&broker, "events.retry", &["x"]).await;
    let delivery = take(&mut consumer, 1).await.remove(0);
    let verdict = Verdict::Retry {
        delay: Duration::from_secs(1),
        failure: Failure::now("handler_error", "boom", "events.retry", None),
    };
    assert_eq!(
        delivery.settle(verdict).await.unwrap_err().code(),
        ErrorCode::NackFailed
    );
    assert!(take(&mut consumer, 1).await[0].redelivered);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn retention_drops_what_is_old_and_a_full_stream_is_overload() {
    let config = EmbeddedConfig {
        max_stream_bytes: 4096,
        ..EmbeddedConfig::default()
    };
    let broker = broker_with(config, Topology::default()).await;
    let to = topic("events.short");
    let options = TopicOptions {
        partitions: 1,
        retention_ms: 60_000,
        ..TopicOptions::default()
    };
    broker.create_topic(&to, &options).await.unwrap();
    let mut taken = 0;
    let full = loop {
        match broker
            .publish(&to, message("x"), &PublishOptions::default())
            .await
        {
            Ok(receipt) => {
                let Outcome::Delivered {
                    position: Some(p), ..
                } = receipt.outcome
                else {
                    panic!("{receipt:?}");
                };
                assert_eq!(p.offset, taken);
                taken += 1;
            }
            Err(error) => break error,
        }
    };
    assert!(full.is_retryable());
    tokio::time::sleep(Duration::from_secs(62)).await;
    let metadata = broker.topic_metadata(&to).await.unwrap();
    assert_eq!(
        (
            metadata.partitions[0].low_watermark,
            metadata.partitions[0].high_watermark
        ),
        (taken, taken)
    );
    publish(&broker, "events.short", &["again"]).await;
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pattern_gets_streams_that_are_made_later_from_their_start() {
    let broker = broker().await;
    let mut reader = broker
        .consume(&stream("events.#"), &SubscribeOptions::default())
        .await
        .unwrap();
    let mut member = broker
        .consume(&stream("events.#"), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    publish(&broker, "events.new", &["a"]).await;
    publish(&broker, "events.newer", &["b"]).await;
    assert_eq!(bodies(&take(&mut reader, 2).await), ["a", "b"]);
    assert_eq!(bodies(&take(&mut member, 2).await), ["a", "b"]);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_group_without_a_position_starts_where_it_says_or_not_at_all() {
    let broker = broker().await;
    publish(&broker, "events.reset", &["old"]).await;
    let with = |reset| SubscribeOptions {
        offset_reset: Some(reset),
        ..SubscribeOptions::group(format!("{reset:?}"))
    };
    let refused = broker
        .consume(&stream("events.reset"), &with(OffsetReset::None))
        .await;
    assert_eq!(refused.unwrap_err().code(), ErrorCode::SubscribeFailed);
    let mut latest = broker
        .consume(&stream("events.reset"), &with(OffsetReset::Latest))
        .await
        .unwrap();
    publish(&broker, "events.reset", &["new"]).await;
    assert_eq!(bodies(&drain(&mut latest).await), ["new"]);
    broker
        .create_consumer_group(
            "None",
            &Pattern::new("events.#").unwrap(),
            SeekTo::Beginning,
        )
        .await
        .unwrap();
    let mut made = broker
        .consume(&stream("events.reset"), &with(OffsetReset::None))
        .await
        .unwrap();
    assert_eq!(drain(&mut made).await.len(), 2);
    let busy = broker.delete_consumer_group("None").await;
    assert_eq!(busy.unwrap_err().code(), ErrorCode::SubscribeFailed);
    made.control.begin_stop();
    while made.deliveries.recv().await.is_some() {}
    made.control.stop().await;
    broker.delete_consumer_group("None").await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_fetch_waits_for_min_bytes_but_no_longer_than_max_wait() {
    let broker = broker().await;
    let mut options = SubscribeOptions::default();
    options.stream.min_bytes = 1_000_000;
    options.stream.max_wait = Duration::from_secs(30);
    let mut reader = broker
        .consume(&stream("events.wait"), &options)
        .await
        .unwrap();
    publish(&broker, "events.wait", &["x"]).await;
    let before = tokio::time::Instant::now();
    let got = tokio::time::timeout(Duration::from_secs(60), reader.deliveries.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(bodies(&got), ["x"]);
    assert!(before.elapsed() >= Duration::from_secs(29));
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn members_that_come_and_go_under_load_lose_nothing_and_finish_nothing_twice() {
    const MESSAGES: usize = 2000;
    let broker = broker().await;
    broker
        .create_topic(
            &topic("events.load"),
            &TopicOptions {
                partitions: 8,
                ..TopicOptions::default()
            },
        )
        .await
        .unwrap();
    let (done, mut all) = tokio::sync::mpsc::unbounded_channel();
    let member = |settles: usize| {
        let (broker, done) = (broker.clone(), done.clone());
        tokio::spawn(async move {
            let mut consumer = broker
                .consume(&stream("events.load"), &SubscribeOptions::group("g"))
                .await
                .unwrap();
            let mut left = settles;
            while let Some(batch) = consumer.deliveries.recv().await {
                for delivery in batch {
                    if left == 0 {
                        // Dropped unsettled: somebody else finishes it.
                        continue;
                    }
                    left -= 1;
                    let text = body(&delivery);
                    delivery.ack().await.unwrap();
                    done.send(text).unwrap();
                }
                if left == 0 {
                    consumer.control.begin_stop();
                }
            }
            consumer.control.stop().await;
        })
    };
    let publisher = tokio::spawn({
        let broker = broker.clone();
        async move {
            for chunk in 0..MESSAGES / 20 {
                let messages = (0..20)
                    .map(|i| {
                        let n = chunk * 20 + i;
                        Arc::new(message(&n.to_string()).with_key(format!("k{}", n % 64)))
                    })
                    .collect();
                for outcome in broker
                    .publish_batch(&topic("events.load"), messages, &PublishOptions::default())
                    .await
                {
                    outcome.unwrap();
                }
                tokio::task::yield_now().await;
            }
        }
    });
    for settles in [10, 50, 100, 20, 200, 30] {
        let (one, two) = (member(settles), member(settles));
        one.await.unwrap();
        two.await.unwrap();
    }
    let last = member(usize::MAX);
    publisher.await.unwrap();
    let mut finished = BTreeSet::new();
    while finished.len() < MESSAGES {
        let text = tokio::time::timeout(Duration::from_secs(20), all.recv())
            .await
            .expect("some messages never came")
            .unwrap();
        assert!(finished.insert(text), "a message was finished twice");
    }
    for p in 0..8 {
        let metadata = broker.topic_metadata(&topic("events.load")).await.unwrap();
        assert_eq!(
            broker.offset("g", &topic("events.load"), p).await.unwrap(),
            Some(metadata.partitions[p as usize].high_watermark)
        );
    }
    broker.close().await.unwrap();
    last.await.unwrap();
}
