//! Static membership: a consumer that comes back as who it was disturbs nobody.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use messaging_hub::{MessageBroker, SubscribeOptions};
use rdkafka::{
    ClientConfig, ClientContext,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance},
};

use crate::{
    common::*,
    support::{need, shared_kafka, unique, wait},
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

async fn stop_consumer(consumer: messaging_hub::broker::Consumer) {
    crate::common::stop(consumer).await;
}
