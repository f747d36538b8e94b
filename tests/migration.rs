//! From one messaging system to another while both run: RabbitMQ to Kafka, and a
//! system of one's own to RabbitMQ. Each message is handled once, on whichever side.
#![cfg(all(feature = "rabbitmq", feature = "kafka"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use messaging_hub::{
    Error, ErrorCode, Message, MessageId, MessagingSystem, SubscribeOptions,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{BrokerType, Handler, HandlerError, Received, Subscription, TopicOptions},
    config::{MessagingConfig, RouteKind, RouteSettings},
    migration::{Migration, MigrationSettings, Phase, System},
    secret::Secret,
    topic::Pattern,
};
use support::{RabbitVersion, need, shared_kafka, shared_rabbit, unique, wait};

const SOON: Duration = Duration::from_secs(60);

/// Ids, and which broker they came from, as a handler got them.
type Seen = Arc<Mutex<Vec<(String, BrokerType)>>>;

fn collector() -> (Seen, Arc<dyn Handler>) {
    let seen = Seen::default();
    let into = seen.clone();
    let handler = move |received: Received| {
        let one = (received.id.as_str().to_owned(), received.via);
        into.lock().unwrap().push(one);
        std::future::ready(Ok::<(), HandlerError>(()))
    };
    (seen, Arc::new(handler))
}

fn message(id: &str) -> Message {
    Message::new("t", id.to_owned())
        .with_id(MessageId::new(id).unwrap())
        .with_key(id)
}

/// A hub for one topic, as tasks over RabbitMQ.
async fn over_rabbitmq(url: &str, topic: &str) -> MessagingSystem {
    let mut config = MessagingConfig {
        rabbitmq: Some(RabbitMqConfig {
            url: Some(Secret::new(url)),
            ..RabbitMqConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    let pattern = Pattern::new(topic).unwrap();
    config
        .hub
        .routes
        .push(RouteSettings::new(pattern, RouteKind::Task));
    let system = MessagingSystem::start(config).await.unwrap();
    system
        .hub()
        .declare_queue(topic, &Default::default())
        .await
        .unwrap();
    system
}

/// And as events over Kafka.
async fn over_kafka(bootstrap: &str, topic: &str) -> MessagingSystem {
    let mut config = MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![bootstrap.to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    let pattern = Pattern::new(topic).unwrap();
    config
        .hub
        .routes
        .push(RouteSettings::new(pattern, RouteKind::Event));
    let system = MessagingSystem::start(config).await.unwrap();
    system
        .hub()
        .create_topic(topic, &TopicOptions::default())
        .await
        .unwrap();
    system
}

#[tokio::test(flavor = "multi_thread")]
async fn from_rabbitmq_to_kafka_and_back_each_message_is_handled_once() {
    const EACH: usize = 100;
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let kafka = need!(shared_kafka().await);
    let topic = unique("migrated");
    let old = over_rabbitmq(rabbit.url(), &topic).await;
    let new = over_kafka(kafka.bootstrap(), &topic).await;
    let migration = Migration::new(
        Arc::new(old.hub()),
        Arc::new(new.hub()),
        MigrationSettings::default(),
    )
    .unwrap();
    let (seen, handler) = collector();
    let options = SubscribeOptions::group("movers");
    let _subscriptions = migration.subscribe(&topic, options, handler).await.unwrap();

    let mut wanted = Vec::new();
    let publish = async |phase: &str, wanted: &mut Vec<String>| {
        for n in 0..EACH {
            let id = format!("{phase}-{n}");
            migration.publish(&topic, message(&id)).await.unwrap();
            wanted.push(id);
        }
    };
    publish("legacy", &mut wanted).await;
    assert_eq!(migration.advance().unwrap(), Phase::DualWrite);
    publish("dual-0", &mut wanted).await;
    migration.set_consumer_percent(50).unwrap();
    publish("dual-50", &mut wanted).await;
    assert_eq!(migration.advance().unwrap(), Phase::Messaging);
    publish("messaging", &mut wanted).await;
    migration.rollback("to see that it works");
    publish("again", &mut wanted).await;

    wait::until(SOON, "every message", async || {
        seen.lock().unwrap().len() >= wanted.len()
    })
    .await;
    // What would come twice would come about now.
    migration.publish(&topic, message("last")).await.unwrap();
    wanted.push("last".to_owned());
    wait::until(SOON, "the last one", async || {
        seen.lock().unwrap().iter().any(|(id, _)| id == "last")
    })
    .await;
    let seen = seen.lock().unwrap().clone();
    let mut ids: Vec<String> = seen.iter().map(|(id, _)| id.clone()).collect();
    ids.sort();
    wanted.sort();
    assert_eq!(ids, wanted, "each once");
    let mut sides: BTreeMap<(&str, BrokerType), usize> = BTreeMap::new();
    for (id, via) in &seen {
        let phase = id.rsplit_once('-').map_or("last", |(phase, _)| phase);
        *sides.entry((phase, *via)).or_default() += 1;
    }
    let of = |phase, via| sides.get(&(phase, via)).copied().unwrap_or(0);
    assert_eq!(of("legacy", BrokerType::RabbitMq), EACH);
    assert_eq!(of("dual-0", BrokerType::RabbitMq), EACH);
    let moved = of("dual-50", BrokerType::Kafka);
    assert!((30..=70).contains(&moved), "{sides:?}");
    assert_eq!(of("messaging", BrokerType::Kafka), EACH);
    assert_eq!(of("again", BrokerType::RabbitMq), EACH);
    old.close().await;
    new.close().await;
}

/// A system that nobody here knows, and that can be broken.
#[derive(Default)]
struct Theirs {
    broken: AtomicBool,
    has: Mutex<Vec<Message>>,
}

#[async_trait]
impl System for Theirs {
    async fn publish(&self, _: &str, message: Message) -> Result<(), Error> {
        if self.broken.load(Relaxed) {
            return Err(Error::new(ErrorCode::PublishFailed, "it is broken"));
        }
        self.has.lock().unwrap().push(message);
        Ok(())
    }

    async fn subscribe(
        &self,
        _: &str,
        _: SubscribeOptions,
        _: Arc<dyn Handler>,
    ) -> Result<Subscription, Error> {
        Err(Error::new(ErrorCode::SubscribeFailed, "it has none"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_system_that_fails_costs_nothing_and_is_left_by_itself() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let topic = unique("kept");
    let old = over_rabbitmq(rabbit.url(), &topic).await;
    let new = Arc::new(Theirs::default());
    let settings = MigrationSettings {
        consumer_percent: 100,
        least: 20,
        ..MigrationSettings::default()
    };
    let migration = Migration::new(Arc::new(old.hub()), new.clone(), settings).unwrap();
    let mut watch = migration.watch();
    // One that cannot be subscribed on both sides is not subscribed at all.
    let (seen, handler) = collector();
    let half = migration
        .subscribe(&topic, SubscribeOptions::default(), handler.clone())
        .await;
    assert!(half.is_err());

    migration.advance().unwrap();
    for n in 0..20 {
        migration
            .publish(&topic, message(&format!("both-{n}")))
            .await
            .unwrap();
    }
    assert_eq!(new.has.lock().unwrap().len(), 20);
    new.broken.store(true, Relaxed);
    for n in 0..20 {
        // The old system has them, so they are answered as accepted.
        migration
            .publish(&topic, message(&format!("old-{n}")))
            .await
            .unwrap();
    }
    let shown = watch.wait_for(|p| p.rolled_back.is_some());
    let shown = tokio::time::timeout(SOON, shown)
        .await
        .unwrap()
        .unwrap()
        .clone();
    assert_eq!(shown.phase, Phase::Legacy);
    assert!(shown.failed >= 2, "{shown:?}");
    // Whatever the share was: what the new system did not take is the old one's.
    let hub = old.hub();
    let (legacy, _) = (
        hub.subscribe(&topic, SubscribeOptions::default(), handler)
            .await
            .unwrap(),
        (),
    );
    wait::until(SOON, "what the new system did not take", async || {
        seen.lock().unwrap().len() >= 40
    })
    .await;
    legacy.unsubscribe().await;
    let owner = |id: &str| {
        let has = new.has.lock().unwrap();
        has.iter()
            .find(|m| m.id.as_str() == id)
            .map(|m| m.headers["migration-owner"].clone())
    };
    assert_eq!(owner("both-3").as_deref(), Some("messaging"));
    assert_eq!(owner("old-3"), None);
    old.close().await;
}
