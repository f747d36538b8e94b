//! Death and return of the broker, security, groups and topics from outside.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use messaging_hub::{
    ErrorCode, MessageBroker, Pattern, SubscribeOptions, Topic,
    adapter::{
        kafka::{KafkaBroker, KafkaConfig, SaslConfig, SaslMechanism},
        rabbitmq::TlsConfig,
    },
    broker::{EventStreamBroker, Fate, LaneOptions, OrderKey, SeekTo, Submission, TopicOptions},
    secret::Secret,
    topology::{TopicSpec, Topology, TopologyMode},
};

use crate::{
    common::*,
    support::{Kafka, NodeOptions, need, shared_kafka, unique},
};

fn submission(token: u64) -> Submission {
    Submission {
        token,
        message: Arc::new(text(&token.to_string())),
        order: OrderKey::Publisher(7),
        marks: Default::default(),
        confirm: true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_outcomes_and_health_are_honest_when_the_broker_is_killed_and_comes_back() {
    let mut node = need!(Kafka::start().await);
    let broker = connected(KafkaConfig {
        message_timeout: Duration::from_secs(4),
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "kill", 1).await;
    let mut lane = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap();
    let (mut sent, mut fates) = (0u64, BTreeMap::new());
    let mut killed = false;
    // Publishes until the lane ends, and kills the broker in the middle.
    loop {
        let batch: Vec<_> = (sent..sent + 50).map(submission).collect();
        let room = sent - (fates.len() as u64) < 900;
        tokio::select! {
            biased;
            answer = lane.confirmations.recv() => match answer {
                Some(a) => assert!(fates.insert(a.token, a.fate).is_none(), "answered once"),
                None => break,
            },
            accepted = lane.submissions.send(batch), if room => {
                if accepted.is_ok() {
                    sent += 50;
                }
            }
            () = tokio::time::sleep(WAIT) => panic!("the lane does not end"),
        }
        if !killed && fates.len() > 2000 {
            killed = true;
            node.kill().await;
        }
    }
    assert_eq!(fates.len() as u64, sent, "every submission was answered");
    let confirmed: BTreeSet<u64> = fates
        .iter()
        .filter(|(_, f)| matches!(f, Fate::Confirmed(_)))
        .map(|(t, _)| *t)
        .collect();
    let unsent: BTreeSet<u64> = fates
        .iter()
        .filter(|(_, f)| matches!(f, Fate::Unsent(_)))
        .map(|(t, _)| *t)
        .collect();
    let refused = fates
        .values()
        .filter(|f| matches!(f, Fate::Refused(_)))
        .count();
    assert_eq!(refused, 0, "an outage refuses nothing");
    assert!(confirmed.len() > 2000 && (confirmed.len() as u64) < sent);
    assert!(!broker.is_connected(), "the loss was noticed");
    assert!(broker.health_check().await.is_err());
    let error = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConnectionFailed, "{error}");

    let generation = broker.connection().borrow().generation;
    node.restart().await;
    let mut state = broker.connection();
    tokio::time::timeout(WAIT, state.wait_for(|s| s.connected))
        .await
        .expect("reconnected in time")
        .unwrap();
    assert!(state.borrow().generation > generation);
    // The lane works again, and what was confirmed is there.
    publish(&broker, &topic, vec![text("last")]).await;
    let options = SubscribeOptions::default().starting(messaging_hub::broker::StartFrom::Earliest);
    let mut reader = broker.consume(&stream(&topic), &options).await.unwrap();
    let mut stored = BTreeSet::new();
    'read: loop {
        for delivery in take(&mut reader, 1).await {
            let text = body(&delivery);
            if text == "last" {
                break 'read;
            }
            stored.insert(text.parse::<u64>().unwrap());
        }
    }
    let lost: Vec<_> = confirmed.difference(&stored).collect();
    assert!(lost.is_empty(), "confirmed and lost: {lost:?}");
    let lied: Vec<_> = unsent.intersection(&stored).collect();
    assert!(lied.is_empty(), "said to be unsent and stored: {lied:?}");
    stop(reader).await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_confirm_after_an_outage_follows_a_raw_clients_within_a_second() {
    let mut node = need!(Kafka::start().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "back", 1).await;
    publish(&broker, &topic, vec![text("before")]).await;
    node.kill().await;
    let mut state = broker.connection();
    tokio::time::timeout(WAIT, state.wait_for(|s| !s.connected))
        .await
        .unwrap()
        .unwrap();
    // A raw client that tries all the time, from before the broker is back.
    let (bootstrap, name) = (node.bootstrap().to_owned(), topic.clone());
    let raw = tokio::task::spawn_blocking(move || {
        use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
        let producer: BaseProducer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", &bootstrap)
            .set("reconnect.backoff.max.ms", "100")
            .set("retry.backoff.max.ms", "100")
            .set("linger.ms", "0")
            .create()
            .unwrap();
        let record: BaseRecord<'_, (), str> =
            BaseRecord::to(name.as_str()).payload("raw").partition(0);
        producer.send(record).map_err(|(e, _)| e).unwrap();
        producer.flush(Duration::from_secs(60)).unwrap();
        Instant::now()
    });
    // What a hub does: waits for the connection, opens a lane, drains.
    let drain = tokio::spawn({
        let (broker, topic) = (Arc::clone(&broker), topic.clone());
        async move {
            let mut state = broker.connection();
            loop {
                state.wait_for(|s| s.connected).await.unwrap();
                let Ok(mut lane) = broker.open_lane(&topic, 0, &LaneOptions::default()).await
                else {
                    tokio::task::yield_now().await;
                    continue;
                };
                if lane.submissions.send(vec![submission(1)]).await.is_err() {
                    continue;
                }
                if let Some(answer) = lane.confirmations.recv().await
                    && matches!(answer.fate, Fate::Confirmed(_))
                {
                    return Instant::now();
                }
            }
        }
    });
    node.restart().await;
    let raw = tokio::time::timeout(WAIT, raw).await.unwrap().unwrap();
    let ours = tokio::time::timeout(WAIT, drain).await.unwrap().unwrap();
    let late = ours.saturating_duration_since(raw);
    eprintln!("confirmed {late:?} after the raw client");
    assert!(late < Duration::from_secs(1), "{late:?}");
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_04_fault_13_both_consumers_take_up_their_work_after_the_broker_comes_back() {
    let mut node = need!(Kafka::start().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "resume", 2).await;
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    let mut live = broker
        .consume(&stream(&topic), &SubscribeOptions::default())
        .await
        .unwrap();
    active(&consumer).await;
    active(&live).await;
    publish(&broker, &topic, vec![text("before")]).await;
    ack_all(take(&mut consumer, 1).await).await;
    ack_all(take(&mut live, 1).await).await;
    node.kill().await;
    eventually("the loss is seen", || async {
        !consumer.control.is_active()
    })
    .await;
    node.restart().await;
    let mut state = broker.connection();
    tokio::time::timeout(WAIT, state.wait_for(|s| s.connected))
        .await
        .unwrap()
        .unwrap();
    publish(&broker, &topic, vec![text("after")]).await;
    for mut consumer in [consumer, live] {
        loop {
            let delivery = take(&mut consumer, 1).await.remove(0);
            let last = body(&delivery) == "after";
            // One of a dead generation cannot be settled; it comes again.
            let _ = delivery.ack().await;
            if last {
                break;
            }
        }
        stop(consumer).await;
    }
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_broker_is_noticed_and_what_was_in_flight_is_confirmed_once_it_answers() {
    let node = need!(Kafka::start().await);
    let broker = connected(KafkaConfig {
        message_timeout: Duration::from_secs(30),
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "silent", 1).await;
    let mut lane = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap();
    node.pause().await;
    lane.submissions
        .send((0..10).map(submission).collect())
        .await
        .unwrap();
    let mut state = broker.connection();
    let lost = state.wait_for(|s| !s.connected);
    tokio::time::timeout(Duration::from_secs(10), lost)
        .await
        .expect("noticed")
        .unwrap();
    node.resume().await;
    for token in 0..10 {
        let answer = tokio::time::timeout(WAIT, lane.confirmations.recv())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer.token, token);
        assert!(matches!(answer.fate, Fate::Confirmed(_)), "{answer:?}");
    }
    // A stored record says that the broker is back.
    tokio::time::timeout(WAIT, state.wait_for(|s| s.connected))
        .await
        .unwrap()
        .unwrap();
    // Idempotence: once each, in order.
    let read = read_all(&broker, &topic, 10).await;
    let bodies: Vec<_> = read[&0].iter().map(|m| m.payload.to_vec()).collect();
    let expected: Vec<_> = (0..10).map(|i: u64| i.to_string().into_bytes()).collect();
    assert_eq!(bodies, expected);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_while_the_broker_is_dead_ends_in_time() {
    let node = need!(Kafka::start().await);
    let broker = connected(KafkaConfig {
        message_timeout: Duration::from_secs(3),
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "close", 1).await;
    let mut lane = broker
        .open_lane(&topic, 0, &LaneOptions::default())
        .await
        .unwrap();
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    active(&consumer).await;
    publish(&broker, &topic, vec![text("x"), text("y")]).await;
    // Held by its reader, and never settled.
    let held = take(&mut consumer, 2).await;
    node.kill().await;
    lane.submissions
        .send((0..10).map(submission).collect())
        .await
        .unwrap();
    let began = Instant::now();
    let closed = tokio::time::timeout(Duration::from_secs(45), broker.close()).await;
    eprintln!("closed after {:?}: {closed:?}", began.elapsed());
    assert!(closed.is_ok(), "close ends");
    let mut answers = 0;
    while let Some(answer) = lane.confirmations.recv().await {
        assert!(!matches!(answer.fate, Fate::Confirmed(_)));
        answers += 1;
    }
    assert_eq!(answers, 10, "every submission was answered");
    for delivery in held {
        assert_eq!(
            delivery.ack().await.unwrap_err().code(),
            ErrorCode::AckFailed
        );
    }
}

fn tls(node: &Kafka) -> TlsConfig {
    TlsConfig {
        ca_file: Some(node.tls_file("ca.pem")),
        ..TlsConfig::default()
    }
}

fn sasl(mechanism: SaslMechanism, password: &str) -> SaslConfig {
    SaslConfig {
        mechanism,
        username: "helixagent".into(),
        password: Secret::new(password),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_tls_and_sasl_work_and_wrong_ones_are_told_apart() {
    let node = need!(Kafka::start_with(NodeOptions::secure()).await);
    let localhost = |address: &str| address.replace("127.0.0.1", "localhost");
    let mut good = vec![KafkaConfig {
        tls: Some(tls(&node)),
        ..config(&localhost(node.bootstrap_tls()))
    }];
    for mechanism in [
        SaslMechanism::Plain,
        SaslMechanism::ScramSha256,
        SaslMechanism::ScramSha512,
    ] {
        good.push(KafkaConfig {
            sasl: Some(sasl(mechanism, "helixagent123")),
            ..config(&node.bootstrap_sasl())
        });
    }
    good.push(KafkaConfig {
        tls: Some(tls(&node)),
        sasl: Some(sasl(SaslMechanism::ScramSha512, "helixagent123")),
        ..config(&node.bootstrap_sasl_tls())
    });
    for config in good {
        let broker = connected(config).await;
        let topic = topic(&broker, "secure", 1).await;
        publish(&broker, &topic, vec![text("x")]).await;
        read_all(&broker, &topic, 1).await;
        broker.close().await.unwrap();
    }
    let start = |config| KafkaBroker::new(config, Arc::default(), TopologyMode::Apply);
    let broker = start(KafkaConfig {
        sasl: Some(sasl(SaslMechanism::ScramSha256, "not the password")),
        ..config(&node.bootstrap_sasl())
    });
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::AuthenticationFailed, "{error}");
    assert!(!error.to_string().contains("not the password"), "{error}");
    assert!(broker.connection().borrow().refused);
    broker.close().await.unwrap();
    // An authority that did not sign the server.
    let broker = start(KafkaConfig {
        tls: Some(TlsConfig::default()),
        ..config(&localhost(node.bootstrap_tls()))
    });
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConnectionFailed, "{error}");
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_topology_is_made_and_drift_is_named() {
    let node = need!(shared_kafka().await);
    let name = unique("topo");
    let spec = |retention_ms, partitions| TopicSpec {
        name: name.clone(),
        options: TopicOptions {
            partitions,
            retention_ms,
            ..TopicOptions::default()
        },
    };
    let start = |spec, mode| {
        let topology = Topology {
            topics: vec![spec],
            dead_letter_topic: Some(format!("{name}.dead")),
            ..Topology::default()
        };
        KafkaBroker::new(config(node.bootstrap()), Arc::new(topology), mode)
    };
    let broker = start(spec(60_000, 2), TopologyMode::Check);
    broker.connect().await.unwrap();
    let report = broker.topology(false).await.unwrap();
    assert_eq!(report.missing.len(), 2, "{report:?}");
    let report = broker.topology(true).await.unwrap();
    assert_eq!(report.created.len(), 2, "{report:?}");
    assert!(broker.topology(false).await.unwrap().is_clean());
    broker.close().await.unwrap();

    let broker = start(spec(70_000, 4), TopologyMode::Apply);
    broker.connect().await.unwrap();
    let report = broker.topology(true).await.unwrap();
    let drift: BTreeMap<_, _> = report
        .drift
        .iter()
        .map(|d| {
            (
                d.argument.as_str(),
                (d.expected.as_str(), d.actual.as_str()),
            )
        })
        .collect();
    assert_eq!(drift["partitions"], ("4", "2"));
    assert_eq!(drift["retention.ms"], ("70000", "60000"));
    let topic = Topic::new(&name).unwrap();
    let metadata = broker.topic_metadata(&topic).await.unwrap();
    assert_eq!(metadata.partitions.len(), 2);
    assert_eq!(metadata.retention_ms, Some(60_000));
    assert_eq!(metadata.cleanup_policy, "delete");
    assert_eq!(metadata.partitions[0].isr, metadata.partitions[0].replicas);
    let wrong = TopicOptions {
        partitions: 9,
        ..TopicOptions::default()
    };
    let error = broker.create_topic(&topic, &wrong).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TopicCreateFailed, "{error}");
    broker.delete_topic(&topic).await.unwrap();
    eventually("it is gone", || async {
        !broker.list_topics().await.unwrap().contains(&topic)
    })
    .await;
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_made_moved_and_deleted_from_outside() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "groups", 2).await;
    publish(
        &broker,
        &topic,
        (0..10).map(|i| text("x").with_partition(i % 2)).collect(),
    )
    .await;
    let group = unique("g");
    assert_eq!(broker.offset(&group, &topic, 0).await.unwrap(), None);
    broker
        .create_consumer_group(&group, &Pattern::from(&topic), SeekTo::End)
        .await
        .unwrap();
    assert_eq!(broker.offset(&group, &topic, 1).await.unwrap(), Some(5));
    broker.commit_offset(&group, &topic, 1, 3).await.unwrap();
    assert_eq!(broker.offset(&group, &topic, 1).await.unwrap(), Some(3));
    broker
        .seek(&group, &topic, None, SeekTo::Beginning)
        .await
        .unwrap();
    assert_eq!(broker.offset(&group, &topic, 1).await.unwrap(), Some(0));

    // A live group: commits from outside go through its member.
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group(&group))
        .await
        .unwrap();
    ack_all(take(&mut consumer, 10).await).await;
    broker
        .seek(&group, &topic, Some(0), SeekTo::Offset(2))
        .await
        .unwrap();
    let again = take(&mut consumer, 3).await;
    assert!(
        again
            .iter()
            .all(|d| d.received().message.partition == Some(0))
    );
    let error = broker.delete_consumer_group(&group).await.unwrap_err();
    assert!(error.to_string().contains("live members"), "{error}");
    // From another process it is refused, with the reason.
    let other = connected(config(node.bootstrap())).await;
    let error = other.commit_offset(&group, &topic, 0, 1).await.unwrap_err();
    assert!(error.to_string().contains("live members"), "{error}");
    other.close().await.unwrap();
    drop(again);
    stop(consumer).await;
    broker.delete_consumer_group(&group).await.unwrap();
    assert_eq!(broker.offset(&group, &topic, 0).await.unwrap(), None);
    broker.close().await.unwrap();
}
