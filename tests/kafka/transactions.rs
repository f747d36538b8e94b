//! Batches that are visible as one: whole or not at all, aborted, fenced, refused,
//! and what a killed process leaves behind.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use messaging_hub::{
    Assume, ErrorCode, Message, MessageBroker, MessageId, Outcome, PublishOptions, Task, Timestamp,
    Topic,
    adapter::{
        embedded::{EmbeddedBroker, EmbeddedConfig},
        kafka::{KafkaBroker, KafkaConfig},
    },
    broker::{EventStreamBroker, TopicOptions},
    hub::{HubConfig, MessagingHub, Transactions},
    topology::{Topology, TopologyMode},
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
};

use crate::{
    common::*,
    foreign::{committed, committed_n, console, counts, written},
    support::{Kafka, need, shared_kafka, unique},
};

pub(crate) fn hub_over(broker: &Arc<KafkaBroker>) -> MessagingHub {
    let hub = MessagingHub::new(HubConfig::default(), Topology::default());
    hub.set_event_stream_broker(broker.clone());
    hub
}

async fn close(hub: MessagingHub) {
    hub.close(Duration::from_secs(10)).await;
}

/// Numbered texts of a round, over keys.
fn round(round: usize, messages: std::ops::Range<usize>) -> Vec<Message> {
    messages
        .map(|n| text(&format!("{round}/{n}")).with_key(format!("k{}", n % 50)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_over_topics_and_partitions_is_seen_whole_or_not_at_all() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let (a, b) = (
        topic(&broker, "tx-a", 3).await,
        topic(&broker, "tx-b", 2).await,
    );
    let hub = hub_over(&broker);
    let transactions = hub.transactions(&unique("tx")).await.unwrap();
    let (done, looked) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let reader = tokio::spawn({
        let (done, looked, bootstrap) = (done.clone(), looked.clone(), node.bootstrap().to_owned());
        let names = [a.as_str().to_owned(), b.as_str().to_owned()];
        async move {
            let mut looks = Vec::new();
            loop {
                let last = done.load(Ordering::Acquire);
                let topics: Vec<&str> = names.iter().map(String::as_str).collect();
                // What a partition shows of each round.
                let mut shown: BTreeMap<(String, i32, String), usize> = BTreeMap::new();
                for seen in committed(&bootstrap, &topics).await {
                    let of = seen.body.split('/').next().unwrap().to_owned();
                    *shown.entry((seen.topic, seen.partition, of)).or_default() += 1;
                }
                looks.push(shown);
                looked.fetch_add(1, Ordering::AcqRel);
                if last {
                    return looks;
                }
            }
        }
    });
    let mut rounds = 0;
    // Until it has looked often enough while they were written.
    while rounds < 5 || (looked.load(Ordering::Acquire) < 5 && rounds < 60) {
        let mut transaction = transactions.begin();
        for message in round(rounds, 0..500) {
            transaction.publish(&a, message).await.unwrap();
        }
        for message in round(rounds, 500..1000) {
            transaction.publish(&b, message).await.unwrap();
        }
        assert_eq!(transaction.len(), 1000);
        rounds += 1;
        if rounds == 3 {
            // Forgotten: nothing of it was written.
            transaction.abort();
            continue;
        }
        let receipts = transaction.commit().await.unwrap();
        assert_eq!(receipts.len(), 1000);
        assert!(receipts.iter().all(|r| matches!(
            r.outcome,
            Outcome::Delivered {
                position: Some(_),
                ..
            }
        )));
    }
    done.store(true, Ordering::Release);
    let looks = reader.await.unwrap();
    let last = looks.last().unwrap();
    assert_eq!(last.values().sum::<usize>(), 1000 * (rounds - 1));
    assert!(last.keys().all(|(_, _, of)| of != "2"));
    for look in &looks {
        for (place, count) in look {
            assert_eq!(*count, last[place], "{place:?} was seen in part");
        }
    }
    eprintln!("{} looks at {rounds} rounds", looks.len());
    // It prints a word of its own at the end.
    let bodies = console(&node, &a).await.into_iter();
    let foreign = counts(bodies.filter(|line| line.contains('/') && !line.contains(' ')));
    assert_eq!(foreign.len(), 500 * (rounds - 1));
    assert!(foreign.values().all(|n| *n == 1));
    close(hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_with_a_message_that_the_broker_refuses_leaves_nothing_visible() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = Topic::new(unique("tx-refused")).unwrap();
    let options = TopicOptions {
        partitions: 2,
        max_message_bytes: Some(20_000),
        ..TopicOptions::default()
    };
    broker.create_topic(&topic, &options).await.unwrap();
    let hub = hub_over(&broker);
    let mut messages = round(0, 0..500);
    // Random bytes, so that compression does not make them fit.
    messages[400].payload = (0..50_000)
        .map(|_| fastrand::u8(..))
        .collect::<Vec<_>>()
        .into();
    let id = messages[400].id.clone();
    let error = hub
        .publish_batch_atomic(&topic, messages)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::MessageTooLarge, "{error}");
    assert_eq!(error.assume(), Assume::Rejected, "{error}");
    assert_eq!(error.message_id(), Some(id.as_str()), "{error}");
    assert!(
        error.to_string().contains("nothing of it is visible"),
        "{error}"
    );
    // The next one is whole, and the only one that is seen.
    let receipts = hub.publish_batch_atomic(&topic, round(1, 0..100)).await;
    assert_eq!(receipts.unwrap().len(), 100);
    let seen = committed_n(node.bootstrap(), &[&topic], 100).await;
    assert_eq!(seen.len(), 100);
    assert!(seen.iter().all(|s| s.body.starts_with("1/")));
    let all = written(node.bootstrap(), &[&topic]).await.len();
    eprintln!(
        "{} records of the aborted batch had been written",
        all - 100
    );
    close(hub).await;
}

/// What the client library itself does not take is a refusal of that message, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_over_the_clients_own_limit_is_refused_by_its_id() {
    let node = need!(shared_kafka().await);
    // Keys and headers have 64 KiB beside it.
    let little = KafkaConfig {
        max_message_bytes: 10_000,
        ..config(node.bootstrap())
    };
    let broker = connected(little).await;
    let topic = topic(&broker, "tx-client", 1).await;
    let hub = hub_over(&broker);
    let mut messages = round(0, 0..20);
    messages[10].payload = vec![7_u8; 200_000].into();
    let id = messages[10].id.clone();
    let refused = hub.publish_batch_atomic(&topic, messages).await;
    let error = refused.unwrap_err();
    assert_eq!(error.code(), ErrorCode::MessageTooLarge, "{error}");
    assert_eq!(error.assume(), Assume::Rejected, "{error}");
    assert_eq!(error.message_id(), Some(id.as_str()), "{error}");
    let aborted = error.to_string().contains("nothing of it is visible");
    assert!(aborted, "{error}");
    close(hub).await;
}

/// The hub knows a limit that is no more: what is over the new one is refused by its id,
/// and what was only in a batch with it, or in one that is too large now, is not.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_a_limit_that_was_lowered_is_refused_after_a_few_tries() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "tx-lowered", 1).await;
    let hub = hub_over(&broker);
    let noisy = || {
        let mut messages = round(0, 0..20);
        let noise = (0..50_000).map(|_| fastrand::u8(..)).collect::<Vec<_>>();
        messages[10].payload = noise.into();
        messages
    };
    let before = hub.publish_batch_atomic(&topic, noisy()).await;
    assert_eq!(before.unwrap().len(), 20);
    lower(node.bootstrap(), &topic, "20000").await;
    let mut tries = 0;
    let (error, id) = loop {
        tries += 1;
        assert!(tries < 50, "nothing is refused");
        let messages = noisy();
        let id = messages[10].id.clone();
        match hub.publish_batch_atomic(&topic, messages).await {
            // The broker has yet to hear of it.
            Ok(_) => {}
            Err(error) if error.is_refusal() => break (error, id),
            Err(error) => assert_eq!(error.assume(), Assume::NotSent, "{error}"),
        }
    };
    assert_eq!(error.code(), ErrorCode::MessageTooLarge, "{error}");
    assert_eq!(error.message_id(), Some(id.as_str()), "{error}");
    let mut tries = 0;
    while let Err(error) = hub.publish_batch_atomic(&topic, round(1, 0..500)).await {
        assert_eq!(error.assume(), Assume::NotSent, "{error}");
        tries += 1;
        assert!(tries < 10, "{error}");
    }
    close(hub).await;
}

/// Lowers the limit of a topic at its broker.
async fn lower(bootstrap: &str, topic: &str, bytes: &str) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .create()
        .unwrap();
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("max.message.bytes", bytes);
    let options = AdminOptions::new();
    let changed = admin.alter_configs(&[change], &options).await.unwrap();
    assert!(changed.iter().all(|c| c.is_ok()), "{changed:?}");
}

async fn commit_one(
    via: &Transactions,
    topic: &Topic,
    body: &str,
) -> messaging_hub::Result<Vec<messaging_hub::Receipt>> {
    let mut transaction = via.begin();
    transaction.publish(topic, text(body)).await.unwrap();
    transaction.commit().await
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_opens_an_id_later_fences_whoever_opened_it_before() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "tx-fence", 1).await;
    let other = connected(config(node.bootstrap())).await;
    let (first, second) = (hub_over(&broker), hub_over(&other));
    let id = unique("tx");
    let early = first.transactions(&id).await.unwrap();
    commit_one(&early, &topic, "a").await.unwrap();
    let late = second.transactions(&id).await.unwrap();
    let error = commit_one(&early, &topic, "b").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TransactionFenced, "{error}");
    assert_eq!(error.assume(), Assume::NotSent, "{error}");
    assert!(error.to_string().contains(&id), "{error}");
    commit_one(&late, &topic, "c").await.unwrap();
    // It stays so, and disturbs nobody.
    let error = commit_one(&early, &topic, "d").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TransactionFenced, "{error}");
    commit_one(&late, &topic, "e").await.unwrap();
    let seen = committed_n(node.bootstrap(), &[&topic], 3).await;
    let bodies: Vec<&str> = seen.iter().map(|s| s.body.as_str()).collect();
    assert_eq!(bodies, ["a", "c", "e"]);
    // Opened again it fences the other.
    let again = first.transactions(&id).await.unwrap();
    commit_one(&again, &topic, "f").await.unwrap();
    let error = commit_one(&late, &topic, "g").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TransactionFenced, "{error}");
    close(first).await;
    close(second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_published_as_one_is_refused_and_nothing_is_sent() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "tx-checks", 2).await;
    let hub = hub_over(&broker);
    let past = Timestamp::from_millis(1000);
    let later = Timestamp::now() + Duration::from_secs(3600);
    let mut task = Task::new("t", "x");
    task.attributes.scheduled_at = Some(later);
    let task = Message::from(task);
    let repeated = text("x").with_id(MessageId::new("one").unwrap());
    for (what, wrong, code) in [
        (
            "a reserved header",
            vec![text("x").with_header("hub-id", "y")],
            ErrorCode::MessageInvalid,
        ),
        (
            "expired",
            vec![text("x").with_expiration(past)],
            ErrorCode::MessageExpired,
        ),
        ("scheduled", vec![task], ErrorCode::InvalidConfig),
        (
            "too large",
            vec![Message::new("t", vec![0; 11 * 1024 * 1024])],
            ErrorCode::MessageTooLarge,
        ),
        (
            "an id twice",
            vec![repeated.clone(), repeated],
            ErrorCode::MessageInvalid,
        ),
        (
            "no such partition",
            vec![text("x").with_partition(7)],
            ErrorCode::PublishRejected,
        ),
    ] {
        let mut messages = round(0, 0..10);
        messages.extend(wrong);
        let error = hub
            .publish_batch_atomic(&topic, messages)
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
        assert!(error.is_refusal(), "{what}: {error}");
    }
    let unknown = unique("tx-unknown");
    let error = hub.publish_batch_atomic(&unknown, round(0, 0..2)).await;
    assert_eq!(error.unwrap_err().code(), ErrorCode::TopicNotFound);
    let publisher = hub.publisher(&topic).unwrap();
    let unconfirmed = publisher.clone().with_options(PublishOptions {
        confirm: false,
        ..PublishOptions::default()
    });
    let error = unconfirmed.publish_batch_atomic(round(0, 0..2)).await;
    assert_eq!(error.unwrap_err().code(), ErrorCode::InvalidConfig);
    assert!(hub.transactions("a b").await.is_err());
    assert_eq!(committed(node.bootstrap(), &[&topic]).await, []);
    assert!(
        publisher
            .publish_batch_atomic(Vec::new())
            .await
            .unwrap()
            .is_empty()
    );

    // A repeat gets the first answer and is not written again; nor do two at once stand
    // in each other's way.
    for n in 0..20 {
        let batch = || -> Vec<Message> {
            let ids = (0..20).map(|i| MessageId::new(format!("id-{n}-{i}")).unwrap());
            ids.map(|id| text("x").with_id(id)).collect()
        };
        let (first, second) = tokio::join!(
            publisher.publish_batch_atomic(batch()),
            publisher.publish_batch_atomic(batch())
        );
        let first = first.unwrap();
        assert_eq!(second.unwrap(), first);
        assert_eq!(
            publisher.publish_batch_atomic(batch()).await.unwrap(),
            first
        );
    }
    let seen = committed_n(node.bootstrap(), &[&topic], 400).await;
    assert_eq!(seen.len(), 400);
    close(hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_brokers_refuse_a_batch_as_one_and_say_why() {
    let hub = MessagingHub::new(HubConfig::default(), Topology::default());
    let embedded = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::default());
    embedded.connect().await.unwrap();
    hub.set_fallback_broker(embedded).unwrap();
    #[cfg(feature = "rabbitmq")]
    {
        use messaging_hub::adapter::rabbitmq::{RabbitMqBroker, RabbitMqConfig};
        let config = RabbitMqConfig::default();
        let rabbitmq = RabbitMqBroker::new(config, Arc::default(), TopologyMode::Apply);
        hub.set_task_queue_broker(rabbitmq);
        let error = hub
            .publish_batch_atomic("helixagent.tasks.llm", round(0, 0..2))
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
        assert!(
            error.is_refusal() && error.to_string().contains("rabbitmq"),
            "{error}"
        );
    }
    let error = hub
        .publish_batch_atomic("events.x", round(0, 0..2))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
    assert!(error.to_string().contains("no transactions"), "{error}");
    let error = hub.transactions("id").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig, "{error}");
    close(hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_kafka_is_away_a_batch_is_an_error_and_never_spooled() {
    let mut node = need!(Kafka::start().await);
    let broker = connected(KafkaConfig {
        transaction_timeout: Duration::from_secs(20),
        ..config(node.bootstrap())
    })
    .await;
    let topic = topic(&broker, "tx-away", 2).await;
    let hub = hub_over(&broker);
    let embedded = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::default());
    embedded.connect().await.unwrap();
    hub.set_fallback_broker(embedded).unwrap();
    let publisher = hub.publisher(&topic).unwrap();
    publisher
        .publish_batch_atomic(round(0, 0..100))
        .await
        .unwrap();
    // Batches all the time, while the broker is killed.
    let mut outcomes = Vec::new();
    let mut killed = None;
    for n in 1.. {
        let batch = publisher.clone().with_options(PublishOptions {
            timeout: Duration::from_secs(5),
            ..PublishOptions::default()
        });
        let outcome = batch.publish_batch_atomic(round(n, 0..100)).await;
        let away = outcome
            .as_ref()
            .is_err_and(|e| e.code() == ErrorCode::ConnectionFailed);
        outcomes.push((n, outcome));
        if n == 5 {
            node.kill().await;
            killed = Some(Instant::now());
        }
        if away {
            break;
        }
        assert!(killed.is_none_or(|at| at.elapsed() < WAIT), "{outcomes:?}");
    }
    let began = Instant::now();
    let error = publisher
        .publish_batch_atomic(round(0, 0..2))
        .await
        .unwrap_err();
    assert_eq!(error.assume(), Assume::NotSent, "{error}");
    assert!(began.elapsed() < Duration::from_secs(1), "told at once");
    assert_eq!(
        hub.state()
            .routes
            .iter()
            .map(|r| r.spool.messages)
            .sum::<u64>(),
        0
    );
    node.restart().await;
    let mut state = broker.connection();
    tokio::time::timeout(WAIT, state.wait_for(|s| s.connected))
        .await
        .unwrap()
        .unwrap();
    let mut last = Err(ErrorCode::UnknownError);
    for _ in 0..20 {
        // The coordinator may still be loading.
        last = publisher
            .publish_batch_atomic(round(99, 0..100))
            .await
            .map_err(|e| e.code());
        if last.is_ok() {
            break;
        }
    }
    last.expect("it goes on");
    let whole = 100 * (1 + outcomes.iter().filter(|(_, o)| o.is_ok()).count());
    let seen = committed_n(node.bootstrap(), &[&topic], whole).await;
    let by_round = counts(
        seen.into_iter()
            .map(|s| s.body.split('/').next().unwrap().into()),
    );
    for (n, outcome) in outcomes {
        let count = by_round.get(&n.to_string()).copied().unwrap_or(0);
        match outcome {
            Ok(_) => assert_eq!(count, 100, "{n}"),
            Err(e) if e.assume() == Assume::Unknown => assert!([0, 100].contains(&count), "{n}"),
            Err(e) => assert_eq!(count, 0, "{n}: {e}"),
        }
    }
    assert_eq!(by_round["99"], 100);
    close(hub).await;
}
