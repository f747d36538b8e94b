//! Dead letters, the same on every broker: RabbitMQ 3.10 and 4, Kafka, and the
//! embedded one. Asked over HTTP and by the command line as operators do.

#![cfg(all(feature = "rabbitmq", feature = "kafka", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{
    collections::BTreeMap,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use messaging_hub::{
    Message, MessageId, SubscribeOptions,
    adapter::{
        embedded::{EmbeddedBroker, EmbeddedConfig},
        kafka::{KafkaBroker, KafkaConfig},
        rabbitmq::{RabbitMqBroker, RabbitMqConfig},
    },
    broker::{
        Handler, HandlerError, LaneOptions, MessageBroker, OrderKey, QueueOptions, Received,
        Source, Submission, Subscription, dispatch::TypeRouter,
    },
    config::{RouteKind, RouteSettings},
    dead_letter::{Backoff, Edit, LetterQuery, LetterStatus, ProcessorOptions, Reprocessed},
    gateway::http::{HttpOptions, HttpServer},
    hub::{HubConfig, MessagingHub},
    message::wire::Marks,
    secret::Secret,
    topic::{Pattern, Topic},
    topology::{QueueSpec, TopicSpec, Topology, TopologyMode},
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{RabbitVersion, need, shared_kafka, shared_rabbit, unique, wait};
use tokio::sync::Semaphore;

const SOON: Duration = Duration::from_secs(60);

/// A hub over one broker with an HTTP server, a topic of its own, and dead
/// letters that no other test sees.
struct Site {
    name: &'static str,
    hub: MessagingHub,
    broker: Arc<dyn MessageBroker>,
    topic: String,
    server: HttpServer,
    handled: Arc<Mutex<Vec<(String, String)>>>,
}

/// A topology with dead letters of its own.
fn topology() -> Topology {
    let dlq = unique("test.dlq");
    let log = format!("{dlq}.events");
    let builtin = Topology::helixagent();
    let retry = builtin.retry_exchange().to_owned();
    Topology {
        exchanges: builtin
            .exchanges
            .into_iter()
            .filter(|e| e.name == retry)
            .collect(),
        queues: vec![
            QueueSpec {
                name: dlq.clone(),
                options: QueueOptions::default(),
                bindings: Vec::new(),
                aliases: Vec::new(),
            },
            builtin
                .queues
                .into_iter()
                .find(|q| q.name == "helixagent.retry")
                .unwrap(),
        ],
        topics: vec![TopicSpec {
            name: log.clone(),
            options: Default::default(),
        }],
        dead_letter_queue: Some(dlq),
        dead_letter_topic: Some(log),
        ..Topology::default()
    }
}

impl Site {
    async fn over(
        name: &'static str,
        broker: Arc<dyn MessageBroker>,
        topology: Topology,
        stream: bool,
    ) -> Self {
        wait::within(SOON, "the broker", broker.connect())
            .await
            .unwrap();
        let mut config = HubConfig::default();
        let letters = Pattern::new(topology.dead_letter_queue()).unwrap();
        let route = RouteSettings::new(letters, RouteKind::Task);
        config.routes.push(route);
        let hub = MessagingHub::new(config, topology.clone());
        if name.starts_with("embedded") {
            hub.set_fallback_broker(broker.clone()).unwrap();
        } else {
            let fallback =
                EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(topology.clone()));
            fallback.connect().await.unwrap();
            hub.set_fallback_broker(fallback).unwrap();
            if stream {
                hub.set_event_stream_broker(broker.clone());
            } else {
                hub.set_task_queue_broker(broker.clone());
            }
        }
        let topic = unique(if stream { "events.dead" } else { "tasks.dead" });
        let pattern = Pattern::new(&topic).unwrap();
        let source = if stream {
            Source::Stream(pattern)
        } else {
            Source::Queue(pattern)
        };
        broker.ensure(&source).await.unwrap();
        let options = HttpOptions {
            address: "127.0.0.1:0".parse().unwrap(),
            token: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
        };
        let server = HttpServer::start(hub.clone(), options).await.unwrap();
        Self {
            name,
            hub,
            broker,
            topic,
            server,
            handled: Arc::default(),
        }
    }

    async fn embedded(stream: bool) -> Self {
        let topology = topology();
        let broker = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(topology.clone()));
        let name = if stream {
            "embedded stream"
        } else {
            "embedded queue"
        };
        Self::over(name, broker, topology, stream).await
    }

    async fn rabbit(version: RabbitVersion) -> Option<Self> {
        let node = need!(shared_rabbit(version).await, None);
        let topology = topology();
        let config = RabbitMqConfig {
            url: Some(Secret::new(node.url())),
            ..RabbitMqConfig::default()
        };
        let broker = RabbitMqBroker::new(config, Arc::new(topology.clone()), TopologyMode::Apply);
        let name = match version {
            RabbitVersion::V3_10 => "rabbitmq 3.10",
            RabbitVersion::V4 => "rabbitmq 4",
        };
        Some(Self::over(name, broker, topology, false).await)
    }

    async fn kafka() -> Option<Self> {
        let node = need!(shared_kafka().await, None);
        let topology = topology();
        let config = KafkaConfig {
            brokers: vec![node.bootstrap().to_owned()],
            ..KafkaConfig::default()
        };
        let broker = KafkaBroker::new(config, Arc::new(topology.clone()), TopologyMode::Apply);
        Some(Self::over("kafka", broker, topology, true).await)
    }

    async fn everywhere() -> Vec<Self> {
        let mut all = vec![Self::embedded(false).await, Self::embedded(true).await];
        for version in RabbitVersion::ALL {
            all.extend(Self::rabbit(version).await);
        }
        all.extend(Self::kafka().await);
        all
    }

    /// A handler that fails what says "bad", and notes the rest.
    async fn handler(&self) -> Subscription {
        let handled = self.handled.clone();
        let options = SubscribeOptions {
            group_id: Some(format!("{}.group", self.topic)),
            max_retries: Some(0),
            ..SubscribeOptions::default()
        };
        let handler = move |received: Received| {
            let body = String::from_utf8(received.message.payload.to_vec()).unwrap();
            let id = received.message.id.to_string();
            let handled = handled.clone();
            async move {
                if body == "bad" {
                    return Err(HandlerError::retry("it is bad"));
                }
                handled.lock().unwrap().push((id, body));
                Ok(())
            }
        };
        let subscription = self.hub.subscribe(&self.topic, options, handler).await;
        subscription.expect("it subscribes")
    }

    /// A handler that fails everything in a topic, in a group of its own.
    async fn failing(&self, topic: &str) -> Subscription {
        let options = SubscribeOptions {
            group_id: Some(unique("failing")),
            max_retries: Some(0),
            ..SubscribeOptions::default()
        };
        let handler = |_: Received| async { Err::<(), _>(HandlerError::retry("never")) };
        let subscription = self.hub.subscribe(topic, options, handler).await;
        subscription.expect("it subscribes")
    }

    /// A handler of the dead letters themselves.
    async fn reader(&self, handler: impl Handler) -> Subscription {
        let topology = self.hub.wanted_topology().clone();
        let options = SubscribeOptions {
            group_id: Some(unique("readers")),
            max_retries: Some(0),
            ..SubscribeOptions::default()
        };
        let subscription = if self.is_stream() {
            let log = topology.dead_letter_topic();
            self.hub.subscribe_events(log, options, handler).await
        } else {
            let queue = topology.dead_letter_queue();
            self.hub.subscribe_tasks(queue, options, handler).await
        };
        subscription.expect("it subscribes")
    }

    fn is_stream(&self) -> bool {
        self.topic.starts_with("events")
    }

    async fn publish(&self, id: &str, kind: &str, body: &str) {
        self.publish_to(&self.topic, id, kind, body).await;
    }

    async fn publish_to(&self, topic: &str, id: &str, kind: &str, body: &str) {
        let message = Message::new(kind, body.to_owned())
            .with_id(MessageId::new(id).unwrap())
            .with_header("a", "1")
            .with_key("k");
        let receipt = self.hub.publish(topic, message).await;
        receipt.expect("it is accepted");
    }

    fn handled(&self, id: &str) -> Vec<String> {
        let handled = self.handled.lock().unwrap();
        let of_id = handled.iter().filter(|(i, _)| i == id);
        of_id.map(|(_, body)| body.clone()).collect()
    }

    /// Everything that was published before has been handled, or never will be.
    async fn settled(&self) {
        let id = unique("sentinel");
        self.publish(&id, "test", "sentinel").await;
        wait::until(SOON, &format!("{}: the sentinel", self.name), || async {
            !self.handled(&id).is_empty()
        })
        .await;
    }

    fn at(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address())
    }

    async fn list(&self, query: &str) -> Value {
        let response = reqwest::get(self.at(&format!("/v1/dead-letters?{query}")))
            .await
            .unwrap();
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{}: {answer}", self.name);
        assert!(answer.get("away").is_none(), "{}: {answer}", self.name);
        answer
    }

    /// The letters that a query means, once there are so many.
    async fn letters(&self, query: &str, count: usize) -> Vec<Value> {
        let what = format!("{}: {count} letters with {query:?}", self.name);
        wait::value(SOON, &what, || async {
            let answer = self.list(query).await;
            let letters = answer["letters"].as_array().unwrap().clone();
            (letters.len() == count && answer["total"] == count).then_some(letters)
        })
        .await
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let response = reqwest::Client::new()
            .post(self.at(&format!("/v1/dead-letters{path}")))
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        let status = response.status();
        (status, response.json().await.unwrap())
    }

    /// The binary, asked of this site's server.
    async fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = process::binary();
        command
            .arg("dlq")
            .args(arguments)
            .env("MESSAGING_URL", self.at(""))
            .stdin(Stdio::null());
        tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap()
    }

    async fn close(self, subscription: Option<Subscription>) {
        if let Some(subscription) = subscription {
            subscription.unsubscribe().await;
        }
        self.server.stop(Duration::from_secs(5)).await;
        self.hub.close(Duration::from_secs(10)).await;
    }
}

fn out(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{err}");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_message_is_listed_shown_edited_and_then_handled_once() {
    for site in Site::everywhere().await {
        let subscription = site.handler().await;
        site.publish("x1", "order", "bad").await;
        let listed = site.letters("", 1).await.remove(0);
        assert_eq!(listed["message_id"], "x1", "{listed}");
        assert_eq!(listed["original_topic"], site.topic, "{listed}");
        assert_eq!(listed["failure_reason"], "handler_error", "{listed}");
        assert_eq!(listed["failure_details"], "it is bad", "{listed}");
        assert_eq!(listed["status"], "pending", "{listed}");
        assert_eq!(listed["next_retry"], Value::Null, "{listed}");
        assert!(listed["first_failure"].is_string() && listed["last_failure"].is_string());
        let is_queue = listed["original_queue"] == site.topic.as_str();
        assert_eq!(is_queue, site.topic.starts_with("tasks"), "{listed}");

        // Looking takes nothing away, and names stay.
        let id = listed["id"].as_str().unwrap().to_owned();
        for name in [id.as_str(), "x1"] {
            let shown = reqwest::get(site.at(&format!("/v1/dead-letters/{name}"))).await;
            let shown: Value = shown.unwrap().json().await.unwrap();
            assert_eq!(shown["id"], id, "{shown}");
            assert_eq!(shown["original_message"]["payload"], "YmFk");
            assert_eq!(shown["original_message"]["headers"]["a"], "1");
        }
        let missing = reqwest::get(site.at("/v1/dead-letters/nobody")).await;
        assert_eq!(missing.unwrap().status(), StatusCode::NOT_FOUND);

        let edit = json!({"patch": {"payload": "Z29vZA==", "headers": {"Edited": "yes"}}});
        let (status, answer) = site.post(&format!("/{id}/edit"), edit).await;
        assert_eq!(status, StatusCode::OK, "{}: {answer}", site.name);
        assert_eq!(answer["result"], "processed", "{answer}");
        assert_eq!(answer["outcome"], "delivered", "{answer}");
        wait::until(SOON, &format!("{}: the copy", site.name), || async {
            site.handled("x1") == ["good"]
        })
        .await;

        let done = site.letters("status=processed", 1).await.remove(0);
        assert_eq!(done["message_id"], "x1");
        assert!(
            done["decision"]["note"]
                .as_str()
                .unwrap()
                .contains("edited")
        );
        site.letters("status=pending", 0).await;
        let (status, answer) = site.post(&format!("/{id}/reprocess"), json!({})).await;
        assert_eq!(
            (status, &answer["result"]),
            (StatusCode::OK, &json!("already_processed"))
        );
        site.settled().await;
        assert_eq!(site.handled("x1"), ["good"], "{}", site.name);

        let (_, answer) = site.post("/purge", json!({})).await;
        assert_eq!(answer["purged"], 1, "{}: {answer}", site.name);
        site.letters("", 0).await;
        let metrics = reqwest::get(site.at("/metrics")).await.unwrap();
        let metrics = metrics.text().await.unwrap();
        for line in [
            "messaging_dlq_messages_total 1",
            "messaging_dlq_reprocessed_total 1",
        ] {
            assert!(metrics.contains(line), "{}: {line}", site.name);
        }
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_share_of_dead_letters_is_looked_at_now_and_then_and_raises_the_alarm() {
    let site = Site::embedded(false).await;
    let subscription = site.handler().await;
    let rate = || site.hub.dead_letter_rate();
    assert_eq!((rate().letters, rate().alarm), (0, false));
    site.publish("x1", "order", "bad").await;
    site.letters("", 1).await;
    site.settled().await;
    wait::until(SOON, "one of two is a dead letter", || async {
        (rate().rate - 0.5).abs() < 1e-9
    })
    .await;
    assert_eq!((rate().letters, rate().alarm), (1, true));
    let metrics = reqwest::get(site.at("/metrics")).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("messaging_dlq_alarm 1"), "{metrics}");
    site.close(Some(subscription)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_between_copy_and_letter_loses_nothing_and_does_nothing_twice() {
    for site in Site::everywhere().await {
        site.publish("y1", "order", "bad").await;
        let subscription = site.handler().await;
        let letter = site.letters("", 1).await.remove(0);
        let id = letter["id"].as_str().unwrap();
        // The copy, as the hub publishes it, and then no second step.
        half(&site, "y1", "good").await;
        wait::until(SOON, &format!("{}: the copy", site.name), || async {
            site.handled("y1") == ["good"]
        })
        .await;
        site.letters("status=pending", 1).await;
        // Again, and twice at once: the copies are one to whoever handles them.
        let edit = Edit::patch(json!({"payload": "Z29vZA=="})).unwrap();
        let again = || site.hub.reprocess_dead_letter(id, Some(&edit));
        let (one, two) = tokio::join!(again(), again());
        let results = [one.unwrap().unwrap(), two.unwrap().unwrap()];
        let done = |r: &&Reprocessed| matches!(r, Reprocessed::Processed { .. });
        assert_eq!(results.iter().filter(done).count(), 1, "{results:?}");
        site.settled().await;
        assert_eq!(site.handled("y1"), ["good"], "{}", site.name);
        // It fails again as another letter, and that one's copy is new.
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_dies_again_is_a_letter_whose_copy_is_handled() {
    for site in Site::everywhere().await {
        let subscription = site.handler().await;
        site.publish("z1", "order", "bad").await;
        for round in 0..2 {
            let letter = site.letters("status=pending", 1).await.remove(0);
            assert_eq!(letter["reprocessed"], round, "{}: {letter}", site.name);
            let id = letter["id"].as_str().unwrap();
            let (status, answer) = site.post(&format!("/{id}/reprocess"), json!({})).await;
            assert_eq!(status, StatusCode::OK, "{}: {answer}", site.name);
        }
        let letter = site.letters("status=pending", 1).await.remove(0);
        assert_eq!(letter["reprocessed"], 2, "{}: {letter}", site.name);
        let edit = json!({"message": {"type": "order", "payload": "Z29vZA==", "key": "k"}});
        let id = letter["id"].as_str().unwrap();
        let (status, answer) = site.post(&format!("/{id}/edit"), edit).await;
        assert_eq!(status, StatusCode::OK, "{}: {answer}", site.name);
        site.settled().await;
        assert_eq!(site.handled("z1"), ["good"], "{}", site.name);
        site.letters("status=processed", 3).await;
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_of_one_message_id_are_told_apart_by_operators_and_by_readers() {
    // Made of as many parts as a letter's own.
    const ID: &str = "order:7:eu:1";
    for site in Site::everywhere().await {
        let mut subscriptions = Vec::new();
        let handler = site.handler().await;
        let other = if site.is_stream() {
            unique("events.other")
        } else {
            unique("tasks.other")
        };
        let pattern = Pattern::new(&other).unwrap();
        let source = if site.is_stream() {
            Source::Stream(pattern)
        } else {
            Source::Queue(pattern)
        };
        site.broker.ensure(&source).await.unwrap();
        subscriptions.push(site.failing(&other).await);
        for topic in [&site.topic, &other] {
            site.publish_to(topic, ID, "order", "bad").await;
        }
        let letters = site.letters("", 2).await;
        let of = |topic: &str| {
            let letter = letters.iter().find(|l| l["original_topic"] == topic);
            let letter = letter.unwrap_or_else(|| panic!("{}: {letters:?}", site.name));
            assert_eq!(letter["message_id"], ID, "{letter}");
            letter["id"].as_str().unwrap().to_owned()
        };
        let (one, two) = (of(&site.topic), of(&other));
        assert_ne!(one, two, "{}", site.name);

        // The message's id means neither.
        let edit = json!({"patch": {"payload": "Z29vZA=="}});
        for (step, body) in [
            ("reprocess", json!({})),
            ("edit", edit.clone()),
            ("discard", json!({"reason": "r"})),
        ] {
            let (status, answer) = site.post(&format!("/{ID}/{step}"), body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{}: {answer}", site.name);
            let detail = answer["detail"].as_str().unwrap();
            assert!(detail.contains(&one) && detail.contains(&two), "{detail}");
        }
        let shown = site.cli(&["show", ID]).await;
        let why = String::from_utf8_lossy(&shown.stderr).into_owned();
        assert_eq!(shown.status.code(), Some(1), "{why}");
        assert!(why.contains(&one) && why.contains(&two), "{why}");
        site.letters("status=pending", 2).await;

        // Each one's own means it alone; then the message's means the one that is open.
        let reason = json!({"reason": "r"});
        let (status, answer) = site.post(&format!("/{two}/discard"), reason).await;
        assert_eq!(
            (status, &answer["id"]),
            (StatusCode::OK, &json!(two)),
            "{answer}"
        );
        let (status, answer) = site.post(&format!("/{ID}/edit"), edit).await;
        assert_eq!(
            (status, &answer["letter"]),
            (StatusCode::OK, &json!(one)),
            "{answer}"
        );
        wait::until(SOON, &format!("{}: the copy", site.name), || async {
            site.handled(ID) == ["good"]
        })
        .await;
        let done = |letters: Vec<Value>| letters[0]["id"].as_str().unwrap().to_owned();
        assert_eq!(done(site.letters("status=processed", 1).await), one);
        assert_eq!(done(site.letters("status=discarded", 1).await), two);

        // Whoever reads the dead letters gets each of them.
        for topic in [&site.topic, &other] {
            site.publish_to(topic, "twice", "order", "bad").await;
        }
        site.letters("status=pending", 2).await;
        let seen: Arc<Mutex<Vec<(String, String)>>> = Arc::default();
        let into = seen.clone();
        let reader = move |received: Received| {
            let failure = received.marks.failure.as_deref();
            let topic = failure.map_or_else(String::new, |f| f.original_topic.clone());
            let id = received.message.id.to_string();
            into.lock().unwrap().push((id, topic));
            async { Ok::<(), HandlerError>(()) }
        };
        subscriptions.push(site.reader(reader).await);
        let came = |id: &str| {
            let seen = seen.lock().unwrap();
            let of_id = seen.iter().filter(|(i, _)| i == id);
            let mut topics: Vec<String> = of_id.map(|(_, topic)| topic.clone()).collect();
            topics.sort();
            topics
        };
        let mut both = [site.topic.clone(), other.clone()];
        both.sort();
        let what = format!("{}: both letters", site.name);
        wait::until(SOON, &what, || async { came("twice") == both }).await;
        if site.is_stream() {
            // So it is when both failed in one topic, for two groups.
            subscriptions.push(site.failing(&site.topic).await);
            site.publish("groups", "order", "bad").await;
            let both = [site.topic.clone(), site.topic.clone()];
            wait::until(SOON, &what, || async { came("groups") == both }).await;
            let (status, answer) = site.post("/groups/reprocess", json!({})).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{}: {answer}", site.name);
        }
        for subscription in subscriptions {
            subscription.unsubscribe().await;
        }
        site.close(Some(handler)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_its_reader_refuses_stays_the_one_letter_that_it_is() {
    for site in Site::everywhere().await {
        let subscription = site.handler().await;
        site.publish("r1", "order", "bad").await;
        let before = site.letters("", 1).await.remove(0);
        let calls: Arc<Mutex<u32>> = Arc::default();
        let count = calls.clone();
        let refuse = move |_: Received| {
            *count.lock().unwrap() += 1;
            async { Err::<(), _>(HandlerError::reject("not here either")) }
        };
        let reader = site.reader(refuse).await;
        // A queue hands it out again; in a log its reader is past it.
        let least = if site.is_stream() { 1 } else { 3 };
        let what = format!("{}: {least} calls", site.name);
        wait::until(SOON, &what, || async { *calls.lock().unwrap() >= least }).await;
        reader.unsubscribe().await;
        let after = site.letters("", 1).await.remove(0);
        assert_eq!(after, before, "{}", site.name);
        if site.is_stream() {
            assert_eq!(*calls.lock().unwrap(), 1, "{}", site.name);
        }
        site.close(Some(subscription)).await;
    }
}

/// The first step of reprocessing alone.
async fn half(site: &Site, id: &str, body: &str) {
    let topic = Topic::new(&site.topic).unwrap();
    let message = Message::new("order", body.to_owned())
        .with_id(MessageId::new(id).unwrap())
        .with_key("k");
    let order = OrderKey::Key("k".into());
    let lanes = site.broker.lanes(&topic).await;
    let number = site.broker.lane_of(&topic, &order, None, lanes);
    let options = LaneOptions::default();
    let mut lane = site
        .broker
        .open_lane(&topic, number, &options)
        .await
        .unwrap();
    let submission = Submission {
        token: 1,
        message: Arc::new(message),
        order,
        marks: Marks {
            reprocess: 1,
            ..Marks::default()
        },
        confirm: true,
    };
    lane.submissions.send(vec![submission]).await.unwrap();
    let fate = wait::within(SOON, "a confirm", lane.confirmations.recv()).await;
    assert!(fate.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_reprocessed_by_query_and_discarded_and_purged_by_the_command_line() {
    for site in Site::everywhere().await {
        let subscription = site.handler().await;
        for n in 0..6 {
            let kind = if n % 2 == 0 { "even" } else { "odd" };
            site.publish(&format!("q{n}"), kind, "bad").await;
        }
        let letters = site.letters("limit=6", 6).await;
        let page = site.list("limit=2&offset=4").await;
        assert_eq!(page["letters"].as_array().unwrap().len(), 2);
        assert_eq!(page["letters"][0]["id"], letters[4]["id"]);
        let table = out(&site.cli(&["list"]).await);
        assert!(table.contains("6 of 6") && table.contains("q3"), "{table}");

        // Without a reason nothing is given up.
        let refused = site.cli(&["discard", "q1"]).await;
        assert_eq!(refused.status.code(), Some(2));
        out(&site.cli(&["discard", "q1", "--reason", "of no use"]).await);
        let discarded = site.letters("status=discarded", 1).await.remove(0);
        assert_eq!(discarded["decision"]["note"], "of no use");

        // All that a query means, and only those.
        let many = out(&site.cli(&["reprocess", "--type", "even"]).await);
        assert!(many.contains("3 letters"), "{many}");
        site.letters("status=processed", 3).await;
        // They are bad still, and come back as new letters.
        site.letters("status=pending&type=even", 3).await;
        site.letters("status=pending&type=odd", 2).await;

        let one = out(&site
            .cli(&["edit", "q3", "--payload", "good", "--json"])
            .await);
        let one: Value = serde_json::from_str(&one).unwrap();
        assert_eq!(one["result"], "processed", "{one}");
        site.settled().await;
        assert_eq!(site.handled("q3"), ["good"]);

        // What was discarded can be had back until it is purged.
        out(&site.cli(&["edit", "q1", "--payload", "good"]).await);
        out(&site.cli(&["discard", "q5", "--reason", "r"]).await);
        site.settled().await;
        assert_eq!(site.handled("q1"), ["good"]);
        let purged = out(&site.cli(&["purge", "--status", "discarded"]).await);
        assert_eq!(purged, "purged 1\n", "{}", site.name);
        for (query, count) in [
            (&["--reason", "none_such"][..], 0),
            (&["--type", "even", "--reason", "handler_error"], 3),
            (&[], 2),
        ] {
            let arguments = [&["purge"], query].concat();
            let purged = out(&site.cli(&arguments).await);
            let expected = format!("purged {count}\n");
            assert_eq!(purged, expected, "{}: {query:?}", site.name);
        }
        // Open ones stay.
        site.letters("", 3).await;
        let missing = site.cli(&["show", "q5"]).await;
        assert_eq!(missing.status.code(), Some(1));
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_18_a_processor_takes_a_letter_only_when_it_was_handled_and_drops_none() {
    const COUNT: usize = 11;
    for site in Site::everywhere().await {
        let subscription = site.handler().await;
        for n in 0..COUNT {
            site.publish(&format!("p{n}"), "order", "bad").await;
        }
        site.publish("other", "unknown", "bad").await;
        site.letters("", COUNT + 1).await;

        // Each fails once; the very first waits for a word.
        let gate = Arc::new(Semaphore::new(0));
        let calls: Arc<Mutex<BTreeMap<String, u32>>> = Arc::default();
        let (word, seen) = (gate.clone(), calls.clone());
        let router = TypeRouter::new().on("order", move |received: Received| {
            let (word, seen) = (word.clone(), seen.clone());
            async move {
                let times = {
                    let mut seen = seen.lock().unwrap();
                    let times = seen.entry(received.message.id.to_string()).or_default();
                    *times += 1;
                    *times
                };
                word.acquire().await.unwrap().forget();
                word.add_permits(1);
                if times == 1 {
                    return Err(HandlerError::retry("not yet"));
                }
                Ok(())
            }
        });
        let options = ProcessorOptions {
            backoff: Backoff {
                first: Duration::from_millis(300),
                longest: Duration::from_secs(1),
            },
            batch: 3,
            poll: Duration::from_millis(200),
            ..ProcessorOptions::default()
        };
        let processor = site.hub.dead_letter_processor(router, options).unwrap();
        wait::until(SOON, "a handler runs", || async {
            !calls.lock().unwrap().is_empty()
        })
        .await;
        // While handlers run nothing is taken away, and everything is there.
        site.letters("status=processed", 0).await;
        site.letters("", COUNT + 1).await;
        assert_ne!(site.list("status=retrying").await["total"], 0);
        gate.add_permits(1);
        let done = site.letters("status=processed", COUNT).await;
        assert_eq!(done.len(), COUNT);
        let calls = calls.lock().unwrap().clone();
        assert_eq!(calls.len(), COUNT, "{}: {calls:?}", site.name);
        assert!(calls.values().all(|n| *n == 2), "{}: {calls:?}", site.name);
        // What has no handler was not touched.
        let left = site.letters("status=pending", 1).await.remove(0);
        assert_eq!(left["message_id"], "other");
        processor.stop().await;
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rabbitmq_dead_lettered_by_itself_is_listed_and_can_be_reprocessed() {
    for version in RabbitVersion::ALL {
        let Some(site) = Site::rabbit(version).await else {
            continue;
        };
        let dlq = site.hub.wanted_topology().dead_letter_queue().to_owned();
        let short = unique("tasks.short");
        let options = QueueOptions {
            message_ttl_ms: Some(50),
            dead_letter_exchange: Some(String::new()),
            dead_letter_routing_key: Some(dlq),
            ..QueueOptions::default()
        };
        site.hub.declare_queue(&short, &options).await.unwrap();
        let message = Message::new("t", "late").with_id(MessageId::new("late").unwrap());
        site.hub.publish(&short, message).await.unwrap();
        let letter = site.letters("", 1).await.remove(0);
        assert_eq!(letter["status"], "expired", "{letter}");
        assert_eq!(letter["original_topic"], short, "{letter}");
        assert!(letter["failure_details"].as_str().unwrap().contains(&short));
        let again = site.letters("", 1).await.remove(0);
        assert_eq!(letter["id"], again["id"], "a letter keeps its name");
        let subscription = site.handler().await;
        let edit = Edit::patch(json!({"topic": site.topic})).unwrap();
        let done = site.hub.reprocess_dead_letter("late", Some(&edit)).await;
        assert!(
            matches!(done, Ok(Some(Reprocessed::Processed { .. }))),
            "{done:?}"
        );
        wait::until(SOON, "the copy", || async {
            site.handled("late") == ["late"]
        })
        .await;
        site.close(Some(subscription)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_looks_lose_no_letter_of_a_quorum_queue() {
    for version in RabbitVersion::ALL {
        let Some(site) = Site::rabbit(version).await else {
            continue;
        };
        let subscription = site.handler().await;
        site.publish("l0", "order", "bad").await;
        // Letters are kept, however old: their time must not come with a copy that
        // takes the place of one which was looked at often.
        for (id, lives) in [("l1", 3), ("l2", 3_600)] {
            let message = Message::new("order", "bad")
                .with_id(MessageId::new(id).unwrap())
                .with_ttl(Duration::from_secs(lives));
            site.hub.publish(&site.topic, message).await.unwrap();
        }
        site.letters("", 3).await;
        let published = Instant::now();
        // RabbitMQ 4 drops a message at its 21st return.
        let mut looks = 0;
        while looks < 30 || published.elapsed() < Duration::from_secs(4) {
            let page = site.hub.dead_letters(&LetterQuery::default(), 0, 10).await;
            let page = page.unwrap();
            assert!(page.complete, "{}: {page:?}", site.name);
            assert_eq!(page.total, 3, "{}: {looks} looks", site.name);
            looks += 1;
        }
        site.letters("", 3).await;
        let open = LetterQuery {
            status: Some(LetterStatus::Pending),
            ..LetterQuery::default()
        };
        let page = site.hub.dead_letters(&open, 0, 10).await.unwrap();
        assert_eq!(page.total, 3, "{}", site.name);
        site.close(Some(subscription)).await;
    }
}
