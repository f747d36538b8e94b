//! Payloads that the hub compresses: smaller at the broker, whole for readers of
//! a hub, marked for others, and never larger than the hub allows.
#![cfg(feature = "compression")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "rabbitmq")]
mod support;
#[cfg(not(feature = "rabbitmq"))]
#[path = "support/wait.rs"]
mod wait;

use std::{sync::Arc, time::Duration};

use messaging_hub::{
    Delivery, ErrorCode, Message, MessageBroker, Pattern, PublishOptions, SubscribeOptions,
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{Compression, Consumer, Source},
    config::{CompressionSettings, RouteKind, RouteSettings},
    dead_letter::{Edit, Reprocessed},
    hub::{HubConfig, MessagingHub},
    message::MessageId,
    topology::Topology,
};
#[cfg(feature = "rabbitmq")]
use support::wait;

const SOON: Duration = Duration::from_secs(20);
const ALL: [(Compression, &str); 3] = [
    (Compression::Zstd, "zstd"),
    (Compression::Lz4, "lz4"),
    (Compression::Gzip, "gzip"),
];

fn large(id: &str) -> Message {
    Message::new("test", "all work and no play ".repeat(1000))
        .with_id(MessageId::new(id).unwrap())
        .with_header("h", "v")
}

fn with(algorithm: Compression) -> HubConfig {
    HubConfig {
        compression: CompressionSettings {
            algorithm,
            ..CompressionSettings::default()
        },
        ..HubConfig::default()
    }
}

fn by(compression: Compression) -> PublishOptions {
    PublishOptions {
        compression: Some(compression),
        ..PublishOptions::default()
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    let batch = wait::within(SOON, "a delivery", consumer.deliveries.recv()).await;
    let mut batch = batch.expect("the consumer lives");
    assert_eq!(batch.len(), 1);
    batch.pop().unwrap()
}

/// As it was published, id and headers included.
fn is_whole(delivery: &Delivery, id: &str) {
    let published = large(id);
    assert_eq!(delivery.id, published.id);
    assert_eq!(delivery.payload, published.payload);
    assert_eq!(delivery.headers, published.headers);
    assert_eq!(delivery.content_encoding, None);
}

#[tokio::test]
async fn a_compressed_dead_letter_is_shown_edited_and_published_whole() {
    let broker = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(Topology::default()));
    broker.connect().await.unwrap();
    let hub = MessagingHub::new(with(Compression::Zstd), Topology::default());
    hub.set_fallback_broker(broker.clone()).unwrap();
    let topic = "tasks.dies";
    let options = SubscribeOptions::default();
    let mut consumer = hub.consume(topic, options).await.unwrap();
    let edit = Edit::patch(serde_json::json!({"headers": {"h": "w"}})).unwrap();
    for (id, edit) in [("m1", None), ("m2", Some(&edit))] {
        hub.publish(topic, large(id)).await.unwrap();
        let dying = next(&mut consumer).await;
        is_whole(&dying, id);
        dying.dead_letter("handler_error", "no").await.unwrap();
        // The broker has it small, and whoever asks the hub gets it whole.
        let letter = wait::value(SOON, "the letter", || async {
            hub.dead_letter(id).await.unwrap()
        })
        .await;
        assert_eq!(letter.original_message.payload, large(id).payload);
        assert_eq!(letter.original_message.content_encoding, None);

        let done = hub.reprocess_dead_letter(id, edit).await.unwrap().unwrap();
        assert!(matches!(done, Reprocessed::Processed { .. }), "{done:?}");
        let again = next(&mut consumer).await;
        assert_eq!(again.payload, large(id).payload);
        assert_eq!(again.content_encoding, None);
        let header = if edit.is_some() { "w" } else { "v" };
        assert_eq!(again.headers["h"], header);
        assert_eq!(again.headers.len(), 1);
        assert_eq!(again.marks.reprocess, 1);
        again.ack().await.unwrap();
    }
    hub.close(SOON).await;
}

#[tokio::test]
async fn over_the_embedded_broker_a_payload_is_kept_small_and_read_whole() {
    let broker = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(Topology::default()));
    broker.connect().await.unwrap();
    let mut config = with(Compression::None);
    config.routes = vec![RouteSettings {
        compression: Some(Compression::Gzip),
        ..RouteSettings::new(Pattern::new("tasks.by-route").unwrap(), RouteKind::Task)
    }];
    let hub = MessagingHub::new(config, Topology::default());
    hub.set_fallback_broker(broker.clone()).unwrap();
    let raw = |topic: &str| {
        let source = Source::Queue(Pattern::new(topic).unwrap());
        let broker = broker.clone();
        async move {
            broker
                .consume(&source, &SubscribeOptions::default())
                .await
                .unwrap()
        }
    };
    for (n, (algorithm, name)) in ALL.into_iter().enumerate() {
        let topic = format!("tasks.by-option-{name}");
        let id = format!("m{n}");
        let options = by(algorithm);
        hub.publish_with(&topic, large(&id), &options)
            .await
            .unwrap();
        // What the broker holds, seen by a reader that is no hub.
        let mut direct = raw(&topic).await;
        let seen = next(&mut direct).await;
        assert_eq!(seen.content_encoding.as_deref(), Some(name));
        assert!(seen.payload.len() < large(&id).payload.len() / 10);
        assert_eq!(seen.id, large(&id).id);
        seen.requeue().await.unwrap();
        // What was handed out again goes back with it.
        drop(direct);
        // The same through the hub; a repeat of its id is still a repeat.
        let plain = by(Compression::None);
        hub.publish_with(&topic, large(&id), &plain).await.unwrap();
        let mut consumer = hub
            .consume(&topic, SubscribeOptions::default())
            .await
            .unwrap();
        let whole = next(&mut consumer).await;
        is_whole(&whole, &id);
        whole.ack().await.unwrap();
        consumer.control.begin_stop();
    }

    hub.publish("tasks.by-route", large("r")).await.unwrap();
    let seen = next(&mut raw("tasks.by-route").await).await;
    assert_eq!(seen.content_encoding.as_deref(), Some("gzip"));

    // Small, encoded by its sender, or told not to: as it is.
    let own = large("own").with_content_encoding("br");
    let small = Message::new("test", "a".repeat(4000));
    let zstd = by(Compression::Zstd);
    hub.publish_with("tasks.own", own, &zstd).await.unwrap();
    hub.publish_with("tasks.small", small, &zstd).await.unwrap();
    hub.publish("tasks.plain", large("plain")).await.unwrap();
    for (topic, encoding) in [("own", Some("br")), ("small", None), ("plain", None)] {
        let seen = next(&mut raw(&format!("tasks.{topic}")).await).await;
        assert_eq!(seen.content_encoding.as_deref(), encoding, "{topic}");
        assert!(seen.headers.keys().all(|h| !h.starts_with("hub-")));
    }

    let snappy = hub
        .publish_with("tasks.x", large("s"), &by(Compression::Snappy))
        .await
        .unwrap_err();
    assert_eq!(snappy.code(), ErrorCode::InvalidConfig);
    assert!(snappy.is_refusal(), "{snappy}");
    hub.close(SOON).await;
    broker.close().await.unwrap();
}

#[cfg(feature = "rabbitmq")]
mod live {
    use std::io::Read;

    use super::*;
    use crate::support::{RabbitVersion, need, shared_rabbit, unique};
    use lapin::{
        BasicProperties,
        message::BasicGetMessage,
        types::{AMQPValue, FieldTable},
    };
    use messaging_hub::{
        HandlerError,
        adapter::rabbitmq::{RabbitMqBroker, RabbitMqConfig},
        broker::{QueueOptions, Received},
        secret::Secret,
        topology::{QueueSpec, TopologyMode},
    };

    /// Most bytes that a payload may have for the hub of these tests.
    const MOST: usize = 64 * 1024;

    struct Site {
        hub: MessagingHub,
        broker: Arc<RabbitMqBroker>,
        channel: lapin::Channel,
        _bare: lapin::Connection,
        queue: String,
        dead: String,
    }

    async fn site(url: &str, algorithm: Compression) -> Site {
        let (queue, dead) = (unique("tasks.packed"), unique("tasks.dead"));
        let spec = |name: &str| QueueSpec {
            name: name.to_owned(),
            options: QueueOptions::default(),
            bindings: Vec::new(),
            aliases: Vec::new(),
        };
        let topology = Topology {
            dead_letter_queue: Some(dead.clone()),
            queues: vec![spec(&queue), spec(&dead)],
            ..Topology::default()
        };
        let config = RabbitMqConfig {
            url: Some(Secret::new(url)),
            ..RabbitMqConfig::default()
        };
        let topology = Arc::new(topology);
        let broker = RabbitMqBroker::new(config, topology.clone(), TopologyMode::Apply);
        broker.connect().await.unwrap();
        let hub = MessagingHub::with_limits(with(algorithm), topology, MOST);
        hub.set_task_queue_broker(broker.clone());
        let bare = lapin::Connection::connect(url, lapin::ConnectionProperties::default())
            .await
            .unwrap();
        Site {
            hub,
            broker,
            channel: bare.create_channel().await.unwrap(),
            _bare: bare,
            queue,
            dead,
        }
    }

    impl Site {
        /// The next message of a queue, taken by a bare client.
        async fn get(&self, queue: &str) -> BasicGetMessage {
            wait::value(SOON, "a message in the queue", || async {
                let options = lapin::options::BasicGetOptions { no_ack: true };
                self.channel.basic_get(queue.into(), options).await.unwrap()
            })
            .await
        }

        async fn put(&self, payload: &[u8], encoding: &str) {
            let mut headers = FieldTable::default();
            let mark = AMQPValue::LongString(encoding.into());
            headers.insert("hub-compressed".into(), mark);
            let properties = BasicProperties::default()
                .with_content_encoding(encoding.into())
                .with_message_id("bomb".into())
                .with_delivery_mode(2)
                .with_headers(headers);
            let queue = self.queue.as_str().into();
            self.channel
                .basic_publish("".into(), queue, Default::default(), payload, properties)
                .await
                .unwrap()
                .await
                .unwrap();
        }

        async fn close(self) {
            self.hub.close(SOON).await;
            self.broker.close().await.unwrap();
        }
    }

    /// As a reader that knows the encodings and nothing of the hub.
    fn decoded(encoding: &str, packed: &[u8]) -> Vec<u8> {
        let mut whole = Vec::new();
        match encoding {
            "zstd" => {
                whole = vec![0; MOST];
                let size = zstd_safe::decompress(&mut whole[..], packed).unwrap();
                whole.truncate(size);
            }
            "lz4" => {
                let mut decoder = lz4_flex::frame::FrameDecoder::new(packed);
                decoder.read_to_end(&mut whole).unwrap();
            }
            "gzip" => {
                let mut decoder = flate2::read::GzDecoder::new(packed);
                decoder.read_to_end(&mut whole).unwrap();
            }
            other => panic!("{other}"),
        }
        whole
    }

    #[tokio::test]
    async fn a_bare_client_sees_the_encoding_and_readers_of_the_hub_see_nothing_of_it() {
        for version in RabbitVersion::ALL {
            let rabbit = need!(shared_rabbit(version).await);
            for (algorithm, name) in ALL {
                let site = site(rabbit.url(), algorithm).await;
                site.hub.publish(&site.queue, large("a")).await.unwrap();
                let got = site.get(&site.queue).await;
                let encoding = got.properties.content_encoding().as_ref();
                assert_eq!(encoding.map(|e| e.as_str()), Some(name));
                let id = got.properties.message_id().as_ref();
                assert_eq!(id.map(|i| i.as_str()), Some("a"));
                assert!(got.data.len() < large("a").payload.len() / 10);
                assert_eq!(decoded(name, &got.data), large("a").payload);

                site.hub.publish(&site.queue, large("b")).await.unwrap();
                let options = SubscribeOptions::default();
                let mut consumer = site.hub.consume(&site.queue, options).await.unwrap();
                let delivery = next(&mut consumer).await;
                is_whole(&delivery, "b");
                // What fails is moved as the broker holds it.
                delivery.dead_letter("test", "on purpose").await.unwrap();
                consumer.control.begin_stop();
                let dead = site.get(&site.dead).await;
                let encoding = dead.properties.content_encoding().as_ref();
                assert_eq!(encoding.map(|e| e.as_str()), Some(name));
                assert_eq!(decoded(name, &dead.data), large("b").payload);
                site.close().await;
            }
        }
    }

    #[tokio::test]
    async fn a_bomb_goes_to_the_dead_letters_as_it_came_and_harms_nobody() {
        let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
        let site = site(rabbit.url(), Compression::Zstd).await;
        let zeros = vec![0; MOST + 1];
        let mut bomb = vec![0; MOST];
        let size = zstd_safe::compress(&mut bomb[..], &zeros, 3).unwrap();
        bomb.truncate(size);
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let handler = move |received: Received| {
            let tell = tell.clone();
            async move {
                tell.send(received).unwrap();
                Ok::<(), HandlerError>(())
            }
        };
        let options = SubscribeOptions::default();
        let subscription = site
            .hub
            .subscribe(&site.queue, options, handler)
            .await
            .unwrap();
        for (payload, encoding) in [(&bomb[..], "zstd"), (b"no gzip at all", "gzip")] {
            site.put(payload, encoding).await;
            let dead = site.get(&site.dead).await;
            assert_eq!(dead.data, payload, "raw");
            let seen = dead.properties.content_encoding().as_ref();
            assert_eq!(seen.map(|e| e.as_str()), Some(encoding));
            let headers = dead.properties.headers().as_ref().unwrap().inner().clone();
            let reason = AMQPValue::LongString("undecodable".into());
            assert_eq!(headers.get("hub-failure-reason"), Some(&reason));
        }
        // What comes behind is handled.
        site.hub.publish(&site.queue, large("after")).await.unwrap();
        let handled = wait::within(SOON, "the one behind", told.recv()).await;
        assert_eq!(handled.unwrap().id.as_str(), "after");
        subscription.unsubscribe().await;

        // Among the dead letters it can be read, as it stands.
        site.put(&bomb, "zstd").await;
        let options = SubscribeOptions::default();
        let mut dying = site
            .hub
            .consume(&site.queue, options.clone())
            .await
            .unwrap();
        let mut dead = site.hub.consume(&site.dead, options).await.unwrap();
        let letter = next(&mut dead).await;
        assert_eq!(letter.payload, bomb);
        let failure = letter.marks.failure.as_deref().unwrap();
        assert_eq!(failure.reason, "undecodable");
        assert!(failure.details.contains("more than 65536 bytes"));
        letter.ack().await.unwrap();
        assert!(dying.deliveries.try_recv().is_err(), "never handed out");
        site.close().await;
    }
}
