//! The embedded broker through its public interface.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "journal")]
mod durable;
mod handlers;
mod queues;
mod streams;

use std::{sync::Arc, time::Duration};

use messaging_hub::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{Consumer, Delivery, MessageBroker, PublishOptions, Source},
    message::Message,
    topic::{Pattern, Topic},
    topology::Topology,
};

async fn broker() -> Arc<EmbeddedBroker> {
    broker_with(EmbeddedConfig::default(), Topology::default()).await
}

async fn broker_with(config: EmbeddedConfig, topology: Topology) -> Arc<EmbeddedBroker> {
    let broker = EmbeddedBroker::new(config, Arc::new(topology));
    broker.connect().await.unwrap();
    broker
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn queue(pattern: &str) -> Source {
    Source::Queue(Pattern::new(pattern).unwrap())
}

fn stream(pattern: &str) -> Source {
    Source::Stream(Pattern::new(pattern).unwrap())
}

fn message(body: &str) -> Message {
    Message::new("test", body.to_owned())
}

fn body(delivery: &Delivery) -> String {
    String::from_utf8(delivery.payload.to_vec()).unwrap()
}

async fn publish(broker: &EmbeddedBroker, to: &str, bodies: &[&str]) {
    let messages = bodies.iter().map(|b| Arc::new(message(b))).collect();
    for outcome in broker
        .publish_batch(&topic(to), messages, &PublishOptions::default())
        .await
    {
        outcome.unwrap();
    }
}

/// The next `n` deliveries.
async fn take(consumer: &mut Consumer, n: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < n {
        let batch = tokio::time::timeout(Duration::from_secs(5), consumer.deliveries.recv())
            .await
            .unwrap_or_else(|_| panic!("only {} of {n} deliveries came", taken.len()))
            .expect("the consumer ended");
        taken.extend(batch);
    }
    taken
}
