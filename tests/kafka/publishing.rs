//! Publishing and the first look at consuming.

use messaging_hub::{MessageBroker, SubscribeOptions};

use crate::{
    common::*,
    support::{need, shared_kafka},
};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_confirmed_and_consumed() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "round-trip", 3).await;
    let mut consumer = broker
        .consume(&stream(&topic), &SubscribeOptions::group("g"))
        .await
        .unwrap();
    active(&consumer).await;
    let messages: Vec<_> = (0..100)
        .map(|i| text(&format!("m{i}")).with_key(format!("k{}", i % 7)))
        .collect();
    publish(&broker, &topic, messages).await;
    let got = take(&mut consumer, 100).await;
    ack_all(got).await;
    consumer.control.stop().await;
    broker.close().await.unwrap();
    broker.close().await.unwrap();
}
