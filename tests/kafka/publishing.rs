//! Publishing: outcomes, order, partitions, options.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use messaging_hub::{
    ErrorCode, MessageBroker, PublishOptions, SubscribeOptions, Topic,
    adapter::kafka::KafkaConfig,
    broker::{
        Compression, EventStreamBroker, Fate, LaneOptions, OrderKey, Submission, TopicOptions,
    },
};

use crate::{
    common::*,
    support::{need, shared_kafka, unique},
};

#[tokio::test(flavor = "multi_thread")]
async fn fault_01_confirmed_publishes_one_after_the_other_do_not_block() {
    let node = need!(shared_kafka().await);
    let broker = connected(KafkaConfig {
        linger: Duration::ZERO,
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "confirms", 1).await;
    let mut lane = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap();
    for token in 0..1000 {
        lane.submissions
            .send(vec![submission(token)])
            .await
            .unwrap();
        let answer = tokio::time::timeout(WAIT, lane.confirmations.recv())
            .await
            .expect("a confirm")
            .unwrap();
        assert!(
            answer.token == token && matches!(answer.fate, Fate::Confirmed(_)),
            "{answer:?}"
        );
    }
    broker.close().await.unwrap();
}

fn submission(token: u64) -> Submission {
    Submission {
        token,
        message: Arc::new(text("x")),
        order: OrderKey::Publisher(1),
        marks: Default::default(),
        confirm: true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_02_a_publish_before_any_subscriber_is_kept_or_refused() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "early", 1).await;
    publish(&broker, &topic, vec![text("early")]).await;
    let mut late = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("late")))
        .await
        .unwrap();
    let got = take(&mut late, 1).await;
    assert_eq!(body(&got[0]), "early");
    ack_all(got).await;
    let nowhere = Topic::new(unique("nowhere")).unwrap();
    let error = broker
        .publish(&nowhere, text("x"), &PublishOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::TopicNotFound, "{error}");
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_confirmed_and_consumed_and_closing_twice_is_fine() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "round-trip", 3).await;
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("g")))
        .await
        .unwrap();
    active(&consumer).await;
    let messages: Vec<_> = (0..100)
        .map(|i| text(&format!("m{i}")).with_key(format!("k{}", i % 7)))
        .collect();
    publish(&broker, &topic, messages).await;
    ack_all(take(&mut consumer, 100).await).await;
    stop(consumer).await;
    broker.close().await.unwrap();
    broker.close().await.unwrap();
    let error = broker
        .publish(&topic, text("late"), &PublishOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_order_per_key_is_kept_and_keys_spread_over_the_partitions() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "order", 6).await;
    let messages: Vec<_> = (0..3000)
        .map(|i| text(&format!("{i}")).with_key(format!("key-{}", i % 50)))
        .collect();
    publish(&broker, &topic, messages).await;
    let read = read_all(&broker, &topic, 3000).await;
    assert_eq!(read.len(), 6, "keys spread over all partitions");
    for messages in read.values() {
        let mut last = std::collections::BTreeMap::new();
        for m in messages {
            let n: u64 = std::str::from_utf8(&m.payload).unwrap().parse().unwrap();
            let before = last.insert(m.key.clone(), n);
            assert!(
                before.is_none_or(|b| b < n),
                "{:?}: {before:?} before {n}",
                m.key
            );
        }
    }
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_keys_land_where_kafkas_own_partitioners_put_them() {
    let node = need!(shared_kafka().await);
    for (murmur2, partitioner) in [(false, "consistent"), (true, "murmur2")] {
        let broker = connected(KafkaConfig {
            murmur2_partitioner: murmur2,
            ..config(node.bootstrap())
        })
        .await;
        let topic = topic(&broker, "partitioner", 5).await;
        let keys: Vec<String> = (0..200).map(|i| format!("some-key-{i}")).collect();
        // librdkafka's own partitioner writes them first.
        let bootstrap = node.bootstrap().to_owned();
        let (name, theirs) = (topic.clone(), keys.clone());
        tokio::task::spawn_blocking(move || {
            use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
            let producer: BaseProducer = rdkafka::ClientConfig::new()
                .set("bootstrap.servers", &bootstrap)
                .set("partitioner", partitioner)
                .create()
                .unwrap();
            for key in &theirs {
                let record = BaseRecord::to(name.as_str()).key(key.as_str()).payload("x");
                producer.send(record).map_err(|(e, _)| e).unwrap();
            }
            producer.flush(Duration::from_secs(10)).unwrap();
        })
        .await
        .unwrap();
        let ours = keys
            .iter()
            .map(|k| text("y").with_key(k.as_str()))
            .collect();
        publish(&broker, &topic, ours).await;
        let read = read_all(&broker, &topic, 400).await;
        for (partition, messages) in &read {
            for m in messages {
                let twice = messages.iter().filter(|o| o.key == m.key).count();
                assert_eq!(twice, 2, "{partitioner}: {:?} in {partition}", m.key);
            }
        }
        broker.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_11_a_batch_has_one_outcome_for_each_message() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = Topic::new(unique("batch")).unwrap();
    let options = TopicOptions {
        partitions: 1,
        max_message_bytes: Some(20_000),
        ..TopicOptions::default()
    };
    broker.create_topic(&topic, &options).await.unwrap();
    // Random bytes, so that compression does not make them fit.
    let large: Vec<u8> = (0..50_000).map(|_| fastrand::u8(..)).collect();
    let mut messages: Vec<_> = (0..100).map(|i| text(&format!("{i}"))).collect();
    messages[40].payload = Bytes::from(large);
    messages[60] = text("wrong partition").with_partition(9);
    messages[80] = text("reserved").with_header("hub-id", "x");
    let outcomes = broker
        .publish_batch(
            &topic,
            messages.into_iter().map(Arc::new).collect(),
            &PublishOptions::default(),
        )
        .await;
    assert_eq!(outcomes.len(), 100);
    for (i, outcome) in outcomes.iter().enumerate() {
        let expected = match i {
            40 => Some(ErrorCode::MessageTooLarge),
            60 => Some(ErrorCode::PublishRejected),
            80 => Some(ErrorCode::MessageInvalid),
            _ => None,
        };
        match (outcome, expected) {
            (Ok(_), None) => {}
            (Err(e), Some(code)) => {
                assert_eq!(e.code(), code, "{i}: {e}");
                assert!(e.is_refusal(), "{i}: {e}");
            }
            other => panic!("{i}: {other:?}"),
        }
    }
    let read = read_all(&broker, &topic, 97).await;
    assert_eq!(read[&0].len(), 97);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_records_are_not_refused_with_their_batch_where_the_topic_takes_little() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = Topic::new(unique("little")).unwrap();
    let options = TopicOptions {
        partitions: 1,
        max_message_bytes: Some(5_000),
        ..TopicOptions::default()
    };
    broker.create_topic(&topic, &options).await.unwrap();
    let messages = (0..500)
        .map(|_| {
            let noise: Vec<u8> = (0..1000).map(|_| fastrand::u8(..)).collect();
            messaging_hub::Message::new("noise", noise)
        })
        .collect();
    assert_eq!(publish(&broker, &topic, messages).await.len(), 500);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_topic_is_refused_and_made_where_that_is_allowed() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = Topic::new(unique("unknown")).unwrap();
    let error = broker
        .publish(&topic, text("x"), &PublishOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::TopicNotFound, "{error}");
    assert!(error.is_refusal());
    broker.close().await.unwrap();

    let broker = connected(KafkaConfig {
        auto_create_topics: true,
        ..config(node.bootstrap())
    })
    .await;
    publish(&broker, &topic, vec![text("x")]).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_compression_is_what_was_asked_for_in_the_stored_batches() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    for (compression, code) in [
        (None, 3),
        (Some(Compression::Zstd), 4),
        (Some(Compression::Gzip), 1),
        (Some(Compression::Snappy), 2),
        (Some(Compression::None), 0),
    ] {
        let topic = Topic::new(unique("codec")).unwrap();
        let options = TopicOptions {
            partitions: 1,
            // The broker keeps what the producer wrote.
            compression: "producer".into(),
            ..TopicOptions::default()
        };
        broker.create_topic(&topic, &options).await.unwrap();
        let messages = (0..50).map(|_| Arc::new(text(&"a".repeat(500)))).collect();
        let options = PublishOptions {
            compression,
            ..PublishOptions::default()
        };
        for outcome in broker.publish_batch(&topic, messages, &options).await {
            outcome.unwrap();
        }
        let log = find_log(&node.info().dir, &format!("{topic}-0"));
        // The first batch's attributes (record batch version 2): the low
        // three bits name the codec.
        let batch = std::fs::read(log).unwrap();
        assert_eq!(batch[16], 2, "the format's version");
        assert_eq!(batch[22] & 7, code, "{compression:?}");
    }
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_idempotence_is_in_the_stored_batches_where_it_was_asked_for() {
    let node = need!(shared_kafka().await);
    for enable_idempotence in [true, false] {
        let broker = connected(KafkaConfig {
            enable_idempotence,
            ..config(node.bootstrap())
        })
        .await;
        let topic = topic(&broker, "idempotent", 1).await;
        publish(&broker, &topic, vec![text("x")]).await;
        let batch = std::fs::read(find_log(&node.info().dir, &format!("{topic}-0"))).unwrap();
        // The producer's id (record batch version 2), by which the broker knows
        // a repeat; -1 where the producer has none.
        let producer = i64::from_be_bytes(batch[43..51].try_into().unwrap());
        assert_eq!(producer >= 0, enable_idempotence, "producer id {producer}");
        broker.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_batch_waits_for_its_linger() {
    let node = need!(shared_kafka().await);
    let linger = Duration::from_millis(600);
    let broker = connected(KafkaConfig {
        linger,
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "linger", 1).await;
    for _ in 0..3 {
        let began = std::time::Instant::now();
        publish(&broker, &topic, vec![text("x")]).await;
        // Its clock may be a little ahead of ours.
        assert!(began.elapsed() >= linger * 9 / 10, "{:?}", began.elapsed());
    }
    broker.close().await.unwrap();
}

fn find_log(under: &std::path::Path, partition: &str) -> std::path::PathBuf {
    let mut folders = vec![under.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                if path.file_name().is_some_and(|n| n == partition) {
                    return path.join("00000000000000000000.log");
                }
                folders.push(path);
            }
        }
    }
    panic!("no log of {partition} under {}", under.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_every_broker_address_is_dialled() {
    let node = need!(shared_kafka().await);
    // Nothing listens at the first two.
    let broker = connected(KafkaConfig {
        brokers: vec![
            "127.0.0.1:1".into(),
            "127.0.0.1:2".into(),
            node.bootstrap().into(),
        ],
        ..config(node.bootstrap())
    })
    .await;
    broker.health_check().await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_not_there_says_so_and_refuses_lanes() {
    let broker = messaging_hub::adapter::kafka::KafkaBroker::new(
        config("127.0.0.1:1"),
        Arc::default(),
        messaging_hub::topology::TopologyMode::Apply,
    );
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConnectionFailed, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(broker.health_check().await.is_err());
    let topic = Topic::new("t").unwrap();
    let error = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConnectionFailed, "{error}");
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_16_ids_are_unique_and_foreign_records_get_one_from_their_place() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "ids", 2).await;
    publish(&broker, &topic, (0..2000).map(|_| text("x")).collect()).await;
    let (bootstrap, name) = (node.bootstrap().to_owned(), topic.clone());
    tokio::task::spawn_blocking(move || {
        use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
        let producer: BaseProducer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .create()
            .unwrap();
        for _ in 0..10 {
            let record: BaseRecord<'_, (), str> = BaseRecord::to(name.as_str())
                .payload("foreign")
                .partition(0);
            producer.send(record).map_err(|(e, _)| e).unwrap();
        }
        producer.flush(Duration::from_secs(10)).unwrap();
    })
    .await
    .unwrap();
    let mut ids = std::collections::BTreeSet::new();
    let mut derived = 0;
    for m in read_all(&broker, &topic, 2010)
        .await
        .into_values()
        .flatten()
    {
        if &m.payload[..] == b"foreign" {
            let expected = format!("kafka-{topic}-0-{}", m.offset.unwrap());
            assert_eq!(m.id.as_str(), expected);
            derived += 1;
        }
        assert!(ids.insert(m.id.as_str().to_owned()), "{} twice", m.id);
    }
    assert_eq!(derived, 10);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_closing_twice_and_using_it_from_many_tasks_is_safe() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "many", 3).await;
    broker
        .connect()
        .await
        .expect("connecting again does nothing");
    let using: Vec<_> = (0..8)
        .map(|task| {
            let (broker, topic) = (broker.clone(), topic.clone());
            tokio::spawn(async move {
                let messages = (0..100).map(|n| text(&format!("{task}-{n}"))).collect();
                publish(&broker, &topic, messages).await;
                broker.health_check().await.unwrap();
            })
        })
        .collect();
    for task in using {
        task.await.unwrap();
    }
    let read = read_all(&broker, &topic, 800).await;
    assert_eq!(read.values().map(Vec::len).sum::<usize>(), 800);
    let consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(unique("g")))
        .await
        .unwrap();
    active(&consumer).await;
    let (a, b) = tokio::join!(broker.close(), broker.close());
    a.unwrap();
    b.unwrap();
    broker.close().await.unwrap();
    tokio::time::timeout(WAIT, consumer.control.stop())
        .await
        .expect("the consumer has ended");
    assert!(!broker.is_connected());
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_lane_and_outgrowing_its_window_lose_no_answer() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "lane", 1).await;
    let options = LaneOptions {
        window: 10,
        ..LaneOptions::default()
    };
    let mut lane = broker.open_lane(&topic, 0, &options).await.unwrap();
    // Ten times the window at once: held back, not lost.
    let batch = (0..100)
        .map(|token| messaging_hub::broker::Submission {
            token,
            message: Arc::new(text("x")),
            order: OrderKey::Publisher(1),
            marks: Default::default(),
            confirm: token % 2 == 0,
        })
        .collect();
    lane.submissions.send(batch).await.unwrap();
    let mut tokens = std::collections::BTreeSet::new();
    while tokens.len() < 100 {
        let answer = tokio::time::timeout(WAIT, lane.confirmations.recv())
            .await
            .unwrap()
            .unwrap();
        assert!(matches!(
            answer.fate,
            messaging_hub::broker::Fate::Confirmed(_)
        ));
        assert!(tokens.insert(answer.token));
    }
    drop(lane.submissions);
    // Nothing is left, so the channel closes.
    let end = tokio::time::timeout(WAIT, lane.confirmations.recv()).await;
    assert!(end.unwrap().is_none());
    broker.close().await.unwrap();
}
