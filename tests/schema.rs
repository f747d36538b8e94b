//! Payloads against schemas, on real brokers and a real registry: what does not
//! fit is refused at publish and dead-lettered at consume, whoever sent it, and a
//! registry that is away loses nothing.
#![cfg(all(feature = "rabbitmq", feature = "kafka", feature = "schema"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use messaging_hub::{
    Assume, ErrorCode, Message, MessagingSystem, SubscribeOptions,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{HandlerError, Received, Subscription, TopicOptions},
    config::{MessagingConfig, RouteKind, RouteSettings},
    dead_letter::LetterQuery,
    hub::MessagingHub,
    schema::{CheckAt, RegistrySettings, SchemaFormat, SchemaRegistry, SchemaSettings, frame},
    secret::Secret,
    topic::Pattern,
};
use rdkafka::{
    ClientConfig,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use serde_json::json;
use support::{RabbitVersion, Registry, TcpProxy, need, shared_kafka, shared_rabbit, unique, wait};

const SOON: Duration = Duration::from_secs(60);
const POINT: &str = r#"{"type":"record","name":"Point","fields":[{"name":"x","type":"int"}]}"#;
/// A reader of `POINT` cannot read what this writes.
const OTHER: &str = r#"{"type":"record","name":"Point","fields":[{"name":"y","type":"string"}]}"#;

/// A registry; a test is skipped where it cannot be had, which `make test` says.
macro_rules! registry {
    () => {
        match Registry::start().await {
            Ok(registry) => registry,
            Err(why) => {
                eprintln!("skipped: no schema registry: {why:?}");
                return;
            }
        }
    };
}

type Seen = Arc<Mutex<Vec<Vec<u8>>>>;

fn with_route(
    mut config: MessagingConfig,
    topic: &str,
    kind: RouteKind,
    schema: SchemaSettings,
) -> MessagingConfig {
    config.hub.routes.push(RouteSettings {
        schema: Some(schema),
        ..RouteSettings::new(Pattern::new(topic).unwrap(), kind)
    });
    config
}

fn from_file(file: &Path) -> SchemaSettings {
    SchemaSettings {
        format: SchemaFormat::Json,
        file: Some(file.to_owned()),
        subject: None,
        register: false,
        check: vec![CheckAt::Publish, CheckAt::Consume],
    }
}

fn of_registry(format: SchemaFormat) -> SchemaSettings {
    SchemaSettings {
        format,
        ..SchemaSettings {
            file: None,
            ..from_file(Path::new(""))
        }
    }
}

/// A registry that has just started is slow.
fn patient(url: &str) -> RegistrySettings {
    RegistrySettings {
        timeout: SOON,
        ..RegistrySettings::at(url)
    }
}

fn over_kafka(bootstrap: &str, registry: &str) -> MessagingConfig {
    let mut config = MessagingConfig {
        kafka: Some(KafkaConfig {
            brokers: vec![bootstrap.to_owned()],
            ..KafkaConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    config.schemas.registry = Some(RegistrySettings {
        timeout: Duration::from_secs(2),
        ..RegistrySettings::at(registry)
    });
    config
}

fn collector() -> (
    Seen,
    impl Fn(Received) -> std::future::Ready<Result<(), HandlerError>> + Send + Sync + 'static,
) {
    let seen = Seen::default();
    let into = seen.clone();
    let handler = move |received: Received| {
        into.lock().unwrap().push(received.message.payload.to_vec());
        std::future::ready(Ok(()))
    };
    (seen, handler)
}

async fn events(hub: &MessagingHub, topic: &str) -> (Subscription, Seen) {
    let (seen, handler) = collector();
    let options = SubscribeOptions::group("readers");
    let subscription = hub.subscribe_events(topic, options, handler).await.unwrap();
    (subscription, seen)
}

/// Writes payloads past the hub.
fn produce<'a>(bootstrap: &str, topic: &str, payloads: impl IntoIterator<Item = &'a bytes::Bytes>) {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .create()
        .unwrap();
    for payload in payloads {
        let record = BaseRecord::<(), [u8]>::to(topic).payload(&payload[..]);
        producer.send(record).map_err(|(e, _)| e).unwrap();
    }
    producer.flush(SOON).unwrap();
}

/// What the dead letters of a topic say, once there are so many.
async fn letters(hub: &MessagingHub, topic: &str, count: usize) -> Vec<(String, String)> {
    let query = LetterQuery {
        topic: Some(Pattern::new(topic).unwrap()),
        ..LetterQuery::default()
    };
    let look = async || {
        let page = hub.dead_letters(&query, 0, 100).await.unwrap();
        let one = |l: &messaging_hub::dead_letter::DeadLetter| {
            (l.failure_reason.clone(), l.failure_details.clone())
        };
        page.letters.iter().map(one).collect::<Vec<_>>()
    };
    wait::until(SOON, "the dead letters", async || {
        look().await.len() >= count
    })
    .await;
    look().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_not_as_its_file_says_is_refused_or_a_dead_letter() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let queue = unique("tasks.schema");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("schema.json");
    let schema = json!({"type":"object","required":["n"],"properties":{"n":{"type":"integer"}}});
    std::fs::write(&file, schema.to_string()).unwrap();
    let config = MessagingConfig {
        rabbitmq: Some(RabbitMqConfig {
            url: Some(Secret::new(rabbit.url())),
            ..RabbitMqConfig::default()
        }),
        ..MessagingConfig::builtin()
    };
    let config = with_route(config, &queue, RouteKind::Task, from_file(&file));
    let system = MessagingSystem::start(config).await.unwrap();
    let hub = system.hub();
    hub.declare_queue(&queue, &Default::default())
        .await
        .unwrap();

    let error = hub
        .publish(&queue, Message::new("t", r#"{"n":"seven"}"#))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::SchemaInvalid);
    assert_eq!(error.assume(), Assume::Rejected);
    assert!(error.message().contains("/n"), "{error}");
    hub.publish(&queue, Message::new("t", r#"{"n":7}"#))
        .await
        .unwrap();

    // Whoever does not ask the hub can write what it likes.
    let options = lapin::ConnectionProperties::default();
    let connection = lapin::Connection::connect(rabbit.url(), options)
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    for body in [&b"no json"[..], br#"{"n":8}"#] {
        channel
            .basic_publish(
                "".into(),
                queue.as_str().into(),
                Default::default(),
                body,
                lapin::BasicProperties::default(),
            )
            .await
            .unwrap();
    }
    let (seen, handler) = collector();
    let options = SubscribeOptions::default();
    let _subscription = hub.subscribe_tasks(&queue, options, handler).await.unwrap();
    wait::until(SOON, "what fits", async || seen.lock().unwrap().len() >= 2).await;
    let letters = letters(&hub, &queue, 1).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0].0, "schema");
    assert!(letters[0].1.contains("not JSON"), "{letters:?}");
    // Handlers run side by side.
    seen.lock().unwrap().sort();
    assert_eq!(
        *seen.lock().unwrap(),
        [br#"{"n":7}"#.to_vec(), br#"{"n":8}"#.to_vec()]
    );
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn avro_events_are_read_by_the_schema_that_they_name() {
    let kafka = need!(shared_kafka().await);
    let node = registry!();
    let url = node.url_via(node.port());
    let registry = SchemaRegistry::new(patient(&url)).unwrap();
    let topic = unique("events.avro");
    let subject = format!("{topic}-value");
    let id = registry
        .register(&subject, SchemaFormat::Avro, POINT)
        .await
        .unwrap();
    let foreign = registry
        .register("somebody-elses", SchemaFormat::Avro, OTHER)
        .await
        .unwrap();
    let good = registry.encode(&subject, &json!({"x": 7})).await.unwrap();
    assert_eq!(good[..5], [0, 0, 0, 0, u8::try_from(id).unwrap()]);
    assert_eq!(registry.decode(&good).await.unwrap(), json!({"x": 7}));
    let wrong = registry.encode(&subject, &json!({"x": "y"})).await;
    assert_eq!(wrong.unwrap_err().code(), ErrorCode::SchemaInvalid);

    let config = over_kafka(kafka.bootstrap(), &url);
    let config = with_route(
        config,
        &topic,
        RouteKind::Event,
        of_registry(SchemaFormat::Avro),
    );
    let system = MessagingSystem::start(config).await.unwrap();
    let hub = system.hub();
    let options = TopicOptions {
        partitions: 1,
        ..TopicOptions::default()
    };
    hub.create_topic(&topic, &options).await.unwrap();
    hub.publish(&topic, Message::new("e", good.clone()))
        .await
        .unwrap();
    let broken = frame(id, b"");
    let of_another = registry
        .encode("somebody-elses", &json!({"y": "z"}))
        .await
        .unwrap();
    let unknown = frame(id + foreign + 1000, b"\x0e");
    let bad = [
        (&broken, "schema says"),
        (&of_another, "not registered under"),
        (&unknown, "has no schema"),
        (&bytes::Bytes::from_static(b"{}"), "wire format"),
    ];
    for (payload, why) in bad {
        let error = hub
            .publish(&topic, Message::new("e", payload.clone()))
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::SchemaInvalid, "{error}");
        assert!(error.message().contains(why), "{error}");
    }

    // The same, written past the hub, and one that fits at the end.
    let second = registry.encode(&subject, &json!({"x": 8})).await.unwrap();
    let all = bad.iter().map(|(p, _)| *p).chain([&second]);
    produce(kafka.bootstrap(), &topic, all);
    let (_subscription, seen) = events(&hub, &topic).await;
    wait::until(SOON, "what fits", async || seen.lock().unwrap().len() >= 2).await;
    let letters = letters(&hub, &topic, bad.len()).await;
    assert_eq!(letters.len(), bad.len(), "{letters:?}");
    for (_, why) in bad {
        let said = |l: &(String, String)| l.0 == "schema" && l.1.contains(why);
        assert!(letters.iter().any(said), "{why}: {letters:?}");
    }
    assert_eq!(*seen.lock().unwrap(), [good.to_vec(), second.to_vec()]);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_away_known_schemas_hold_and_others_are_waited_for() {
    let kafka = need!(shared_kafka().await);
    let node = registry!();
    let direct = node.url_via(node.port());
    let proxy = TcpProxy::to_port(node.port()).await.unwrap();
    let registry = SchemaRegistry::new(patient(&direct)).unwrap();
    let topic = unique("events.away");
    let subject = format!("{topic}-value");
    let format = SchemaFormat::Json;
    let schema =
        r#"{"$schema":"http://json-schema.org/draft-07/schema#","type":"object","required":["n"]}"#;
    let stricter = r#"{"$schema":"http://json-schema.org/draft-07/schema#","type":"object","required":["n","m"]}"#;
    registry.register(&subject, format, schema).await.unwrap();
    // Else the registry's first answer of this kind is the hub's first, which it may
    // not wait for that long.
    let example = serde_json::json!({"n": 0});
    registry.encode(&subject, &example).await.unwrap();

    let config = over_kafka(kafka.bootstrap(), &node.url_via(proxy.port()));
    let config = with_route(config, &topic, RouteKind::Event, of_registry(format));
    let system = MessagingSystem::start(config).await.unwrap();
    let hub = system.hub();
    hub.create_topic(&topic, &TopicOptions::default())
        .await
        .unwrap();
    let (_subscription, seen) = events(&hub, &topic).await;

    proxy.cut().await;
    let publish =
        async |payload: bytes::Bytes| hub.publish(&topic, Message::new("e", payload)).await;
    let plain = bytes::Bytes::from_static(br#"{"n":1}"#);
    let error = publish(plain.clone()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SchemaUnavailable, "{error}");
    assert_eq!(error.assume(), Assume::NotSent);
    assert!(error.is_retryable());

    proxy.heal().await;
    publish(plain.clone()).await.unwrap();
    // This time it takes connections and says nothing.
    proxy.half_open();
    proxy.reset_connections();
    publish(plain.clone()).await.unwrap();

    wait::until(SOON, "the two of known schemas", async || {
        seen.lock().unwrap().len() >= 2
    })
    .await;

    // A schema that this hub has never seen, in a message that was written past it.
    let id = registry.register(&subject, format, stricter).await.unwrap();
    let framed = frame(id, br#"{"n":2,"m":3}"#);
    produce(kafka.bootstrap(), &topic, [&framed]);
    let before = proxy.counters().accepted;
    wait::until(SOON, "the hub to ask", async || {
        proxy.counters().accepted > before + 1
    })
    .await;
    assert_eq!(seen.lock().unwrap().len(), 2, "it was handed out unseen");
    proxy.heal().await;
    wait::until(SOON, "the third", async || seen.lock().unwrap().len() >= 3).await;
    assert_eq!(seen.lock().unwrap()[2], framed);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_go_with_its_subject_ends_the_start() {
    let node = registry!();
    let url = node.url_via(node.port());
    let settings = patient(&url);
    let registry = SchemaRegistry::new(settings.clone()).unwrap();
    let put = reqwest::Client::new()
        .put(format!("{url}/config"))
        .header("content-type", "application/vnd.schemaregistry.v1+json")
        .body(r#"{"compatibility":"BACKWARD"}"#)
        .send()
        .await
        .unwrap();
    assert!(put.status().is_success());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("point.avsc");
    let start = async |schema: &str| {
        std::fs::write(&file, schema).unwrap();
        let mut config = MessagingConfig::builtin();
        config.schemas.registry = Some(settings.clone());
        let schema = SchemaSettings {
            format: SchemaFormat::Avro,
            subject: Some("points-value".to_owned()),
            register: true,
            ..from_file(&file)
        };
        let config = with_route(config, "events.points", RouteKind::Event, schema);
        MessagingSystem::start(config).await
    };
    start(POINT).await.unwrap().close().await;
    let value = registry.encode("points-value", &json!({"x": 1})).await;
    assert!(value.is_ok(), "it was registered: {value:?}");
    let error = start(OTHER).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SchemaInvalid);
    assert!(error.message().contains("points-value"), "{error}");
    let error = start("{").await.unwrap_err();
    assert!(error.message().contains("point.avsc"), "{error}");
    // Bare payloads are held against the file.
    let system = start(POINT).await.unwrap();
    let publish = async |payload: &'static [u8]| {
        system
            .hub()
            .publish("events.points", Message::new("e", payload))
            .await
    };
    publish(b"\x0e").await.unwrap();
    assert!(publish(b"").await.is_err());
    system.close().await;
}
