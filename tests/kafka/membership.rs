//! Static membership: a consumer that comes back as who it was disturbs nobody.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use messaging_hub::{MessageBroker, PublishOptions, SubscribeOptions};
use rdkafka::{
    ClientConfig, ClientContext,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance},
};

use crate::{
    common::*,
    support::{Kafka, need, shared_kafka, unique, wait},
};

/// Another member of the group, which is not ours and counts what it is told.
struct Counting(Arc<AtomicUsize>);

impl ClientContext for Counting {}

impl ConsumerContext for Counting {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, _: &Rebalance<'_>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_that_restarts_causes_no_rebalance_and_another_does() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "static", 4).await;
    let group = unique("g");
    let (rebalances, stop) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let other: BaseConsumer<Counting> = BaseConsumer::from_config_and_context(
        ClientConfig::new()
            .set("bootstrap.servers", node.bootstrap())
            .set("group.id", &group)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("enable.auto.commit", "false")
            .set("session.timeout.ms", "30000")
            .set("group.instance.id", "other"),
        Counting(rebalances.clone()),
    )
    .unwrap();
    other.subscribe(&[topic.as_str()]).unwrap();
    let polling = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(Ordering::Acquire) {
                let _ = other.poll(Duration::from_millis(50));
            }
        }
    });
    let member = |instance: Option<&str>| SubscribeOptions {
        group_instance_id: instance.map(str::to_owned),
        session_timeout: Duration::from_secs(30),
        ..SubscribeOptions::group(&group)
    };
    let options = member(Some("ours"));
    let consumer = broker.consume(&stream(&topic), &options).await.unwrap();
    active(&consumer).await;
    let quiet = || async {
        // Until nothing was told for longer than a rebalance takes.
        loop {
            let before = rebalances.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(4)).await;
            if rebalances.load(Ordering::SeqCst) == before {
                return before;
            }
        }
    };
    let before = quiet().await;
    assert!(before > 0, "the other is a member");
    // Three times gone and back within its session.
    let mut consumer = consumer;
    for _ in 0..3 {
        stop_consumer(consumer).await;
        consumer = broker.consume(&stream(&topic), &options).await.unwrap();
        active(&consumer).await;
    }
    assert_eq!(quiet().await, before, "a static member came back unnoticed");
    // It has its partitions again.
    let messages = (0..40).map(|i| text("x").with_partition(i % 4)).collect();
    publish(&broker, &topic, messages).await;
    let got = take(&mut consumer, 20).await;
    ack_all(got).await;
    // Without an id of its own it is a stranger each time.
    stop_consumer(consumer).await;
    let consumer = broker
        .consume(&stream(&topic), &member(None))
        .await
        .unwrap();
    // The group waits for the one that has gone until its session is over.
    wait::until(3 * WAIT, "the other hears of a stranger", || async {
        rebalances.load(Ordering::SeqCst) > before
    })
    .await;
    stop_consumer(consumer).await;
    stop.store(true, Ordering::Release);
    polling.join().unwrap();
    broker.close().await.unwrap();
}

/// What Kafka keeps of its groups, as files.
fn groups(node: &Kafka) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(node.info().dir.join("data")).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("__consumer_offsets-")
        })
        .collect()
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let file = entry.unwrap().path();
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_that_kafka_forgot_in_a_crash_joins_again() {
    let mut node = need!(Kafka::start().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "forgot", 2).await;
    let options = SubscribeOptions {
        group_instance_id: Some("ours".to_owned()),
        session_timeout: Duration::from_secs(45),
        ..SubscribeOptions::group(unique("g"))
    };
    let consume = || async {
        let consumer = broker.consume(&stream(&topic), &options).await.unwrap();
        active(&consumer).await;
        consumer
    };
    stop_consumer(consume().await).await;
    // What Kafka knows of the group before the member comes back.
    node.kill().await;
    let kept = tempfile::tempdir().unwrap();
    let logs = groups(&node);
    for (n, log) in logs.iter().enumerate() {
        copy(log, &kept.path().join(n.to_string()));
    }
    node.restart().await;
    let mut consumer = consume().await;
    publish(&broker, &topic, vec![text("before")]).await;
    ack_all(take(&mut consumer, 1).await).await;
    // A crash that costs it what it learned since.
    node.kill().await;
    for (n, log) in logs.iter().enumerate() {
        copy(&kept.path().join(n.to_string()), log);
    }
    node.restart().await;
    wait::until(WAIT, "published again", || async {
        let message = vec![Arc::new(text("after"))];
        let receipts = broker
            .publish_batch(&topic, message, &PublishOptions::default())
            .await;
        receipts.iter().all(Result::is_ok)
    })
    .await;
    let mut bodies = Vec::new();
    while !bodies.contains(&"after".to_owned()) {
        // The first comes again: its position was forgotten too.
        for delivery in take(&mut consumer, 1).await {
            let text = body(&delivery);
            // One that the fenced client had fetched is not its any more, and comes again.
            if delivery.ack().await.is_ok() {
                bodies.push(text);
            }
        }
    }
    stop_consumer(consumer).await;
    broker.close().await.unwrap();
}

async fn stop_consumer(consumer: messaging_hub::broker::Consumer) {
    crate::common::stop(consumer).await;
}
