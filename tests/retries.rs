//! When handlers fail: the delays that a route names, on RabbitMQ, Kafka and the
//! embedded broker, the dead letter at their end, and its way back over HTTP.
//! And tasks that take longer than RabbitMQ would wait.
#![cfg(all(
    feature = "server",
    feature = "rabbitmq",
    feature = "kafka",
    feature = "journal"
))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use messaging_hub::{
    ErrorCode, Message, MessageId, MessagingSystem, SubscribeOptions,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{Delays, HandlerError, QueueOptions, Received, Subscription, TopicOptions},
    config::{MessagingConfig, RetryBy, RouteKind, RouteSettings},
    gateway::http::{HttpOptions, HttpServer},
    secret::Secret,
    topic::Pattern,
    topology::{QueueSpec, TopicSpec},
};
use process::Hub;
use reqwest::Client;
use serde_json::{Value, json};
use support::{Rabbit, RabbitVersion, need, shared_kafka, shared_rabbit, unique, wait};

const LIMIT: Duration = Duration::from_secs(90);
/// Before the second, the third and the fourth attempt; the route names two delays,
/// of which the last holds for all that follow.
const RESTS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(3),
];
/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(2_500);

/// When a message was handed to the handler, what it was, and how often it had
/// been retried.
type Seen = Arc<Mutex<Vec<(Instant, String, u32)>>>;

/// A hub with one route of its own, and a server in front of it.
struct Site {
    name: &'static str,
    system: MessagingSystem,
    server: HttpServer,
    topic: String,
    seen: Seen,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Task,
    Event(RetryBy),
}

impl Site {
    async fn start(
        name: &'static str,
        kind: Kind,
        change: impl FnOnce(&mut MessagingConfig),
    ) -> Self {
        let (prefix, route_kind) = match kind {
            Kind::Task => ("tasks.failing", RouteKind::Task),
            Kind::Event(_) => ("events.failing", RouteKind::Event),
        };
        let topic = unique(prefix);
        let mut config = MessagingConfig::builtin();
        config.hub.auto_declare = Some(true);
        let mut route = RouteSettings::new(Pattern::new(&topic).unwrap(), route_kind);
        route.retry_delay = Delays::list(&RESTS[..2]);
        if let Kind::Event(by) = kind {
            route.retry_by = by;
        }
        config.hub.routes.push(route);
        // Dead letters that no other test fills: of a long list only the first are seen.
        let letters = unique("test.dlq");
        let topology = &mut config.topology;
        topology.queues.push(QueueSpec {
            name: letters.clone(),
            options: QueueOptions::default(),
            bindings: Vec::new(),
            aliases: Vec::new(),
        });
        topology.topics.push(TopicSpec {
            name: format!("{letters}.events"),
            options: TopicOptions::default(),
        });
        topology.dead_letter_topic = Some(format!("{letters}.events"));
        topology.dead_letter_queue = Some(letters);
        change(&mut config);
        config.validate().expect("a configuration that holds");
        let system = MessagingSystem::start(config).await.unwrap();
        let options = HttpOptions {
            address: "127.0.0.1:0".parse().unwrap(),
            token: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
        };
        let server = HttpServer::start(system.hub(), options).await.unwrap();
        Self {
            name,
            system,
            server,
            topic,
            seen: Seen::default(),
        }
    }

    /// Subscribes a handler that fails whatever is bad.
    async fn subscribe(&self) -> Subscription {
        let into = self.seen.clone();
        let handler = move |received: Received| {
            let into = into.clone();
            async move {
                let body = String::from_utf8(received.message.payload.to_vec()).unwrap();
                let (bad, panics) = (body == "bad", body == "panic");
                into.lock()
                    .unwrap()
                    .push((Instant::now(), body, received.message.retry_count));
                if bad {
                    return Err(HandlerError::retry("it is bad"));
                }
                assert!(!panics, "a bug");
                Ok::<(), HandlerError>(())
            }
        };
        let options = SubscribeOptions::group(unique("workers"));
        let options = if self.topic.starts_with("tasks") {
            SubscribeOptions::default()
        } else {
            options
        };
        self.system
            .hub()
            .subscribe(&self.topic, options, handler)
            .await
            .unwrap()
    }

    async fn publish(&self, id: &str, body: &str) {
        self.publish_for(id, body, 3).await;
    }

    async fn publish_for(&self, id: &str, body: &str, retries: u32) {
        let mut message = Message::new("test", body.to_owned())
            .with_id(MessageId::new(id).unwrap())
            .with_key("one");
        message.max_retries = retries;
        self.system
            .hub()
            .publish(&self.topic, message)
            .await
            .unwrap();
    }

    /// When attempts at this body were made, and their numbers.
    fn attempts(&self, body: &str) -> Vec<(Instant, u32)> {
        let seen = self.seen.lock().unwrap();
        let of = seen.iter().filter(|(_, b, _)| b == body);
        of.map(|(at, _, n)| (*at, *n)).collect()
    }

    async fn attempted(&self, body: &str, times: usize) {
        let what = format!("{}: {times} attempts at {body}", self.name);
        wait::until(LIMIT, &what, async || self.attempts(body).len() >= times).await;
    }

    fn at(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address())
    }

    async fn letters(&self) -> Vec<Value> {
        let path = self.at(&format!("/v1/dead-letters?topic={}", self.topic));
        let page: Value = reqwest::get(path).await.unwrap().json().await.unwrap();
        page["letters"].as_array().unwrap().clone()
    }
}

/// Attempts at the right times, one dead letter that says everything, and its way
/// back, mended.
async fn fails_rests_dies_and_comes_back(site: Site, waits_behind: bool) {
    let name = site.name;
    let subscription = site.subscribe().await;
    site.publish("the-bad-one", "bad").await;
    site.attempted("bad", 1).await;
    site.publish("the-next", "good").await;
    site.attempted("bad", 4).await;
    site.attempted("good", 1).await;

    let attempts = site.attempts("bad");
    let numbers: Vec<u32> = attempts.iter().map(|(_, n)| *n).collect();
    assert_eq!(numbers, [0, 1, 2, 3], "{name}");
    for (n, rest) in RESTS.iter().enumerate() {
        let gap = attempts[n + 1].0 - attempts[n].0;
        assert!(
            gap + Duration::from_millis(20) >= *rest && gap < *rest + SLACK,
            "{name}: {gap:?} before attempt {}, {rest:?} were meant",
            n + 2
        );
    }
    // What is behind it in its key waits for it in its lane, and nowhere else.
    let good = site.attempts("good")[0].0;
    assert_eq!(good > attempts[3].0, waits_behind, "{name}");

    let letter = wait::value(LIMIT, "a dead letter", async || site.letters().await.pop()).await;
    for (field, value) in [
        ("message_id", json!("the-bad-one")),
        ("original_topic", json!(site.topic)),
        ("failure_details", json!("it is bad")),
        ("retry_count", json!(3)),
        ("status", json!("pending")),
    ] {
        assert_eq!(letter[field], value, "{name}: {field} of {letter}");
    }
    let time = |field: &str| letter[field].as_str().unwrap().to_owned();
    assert!(
        time("first_failure") < time("last_failure"),
        "{name}: {letter}"
    );
    assert!(letter["failure_reason"].is_string(), "{name}: {letter}");
    assert_eq!(site.letters().await.len(), 1, "{name}");

    let path = site.at(&format!(
        "/v1/dead-letters/{}/edit",
        letter["id"].as_str().unwrap()
    ));
    let edit = json!({"patch": {"payload": BASE64_STANDARD.encode("mended")}});
    let answer = Client::new().post(path).json(&edit).send().await.unwrap();
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["result"], "processed", "{name}: {answer}");
    site.attempted("mended", 1).await;
    wait::until(LIMIT, "the letter is settled", async || {
        site.letters()
            .await
            .iter()
            .all(|l| l["status"] == "processed")
    })
    .await;
    // A message behind it shows that nothing more of it is on its way.
    site.publish("the-last", "last").await;
    site.attempted("last", 1).await;
    assert_eq!(site.attempts("mended").len(), 1, "{name}");
    assert_eq!(site.attempts("bad").len(), 4, "{name}");

    // A panic is a failure like any other, and nobody else's.
    site.publish_for("the-worst", "panic", 0).await;
    let panicked = async || {
        let letters = site.letters().await;
        letters.into_iter().find(|l| l["message_id"] == "the-worst")
    };
    let letter = wait::value(LIMIT, "the letter of a panic", panicked).await;
    assert_eq!(
        letter["failure_reason"],
        HandlerError::PANIC,
        "{name}: {letter}"
    );
    assert_eq!(letter["failure_details"], "a bug", "{name}: {letter}");
    site.publish("after-it", "alive").await;
    site.attempted("alive", 1).await;
    subscription.unsubscribe().await;
    site.server.stop(Duration::from_secs(1)).await;
    site.system.close().await;
}

async fn over_rabbitmq(version: RabbitVersion, name: &'static str) {
    let node = need!(shared_rabbit(version).await);
    let site = Site::start(name, Kind::Task, |config| {
        config.rabbitmq = Some(RabbitMqConfig {
            url: Some(Secret::new(node.url())),
            ..RabbitMqConfig::default()
        });
    });
    fails_rests_dies_and_comes_back(site.await, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_fault_06_fault_10_a_failing_task_rests_on_rabbitmq_3_10() {
    over_rabbitmq(RabbitVersion::V3_10, "rabbitmq 3.10").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_fault_06_fault_10_a_failing_task_rests_on_rabbitmq_4() {
    over_rabbitmq(RabbitVersion::V4, "rabbitmq 4").await;
}

async fn over_kafka(by: RetryBy, name: &'static str) {
    let node = need!(shared_kafka().await);
    let site = Site::start(name, Kind::Event(by), |config| {
        config.kafka = Some(KafkaConfig {
            brokers: vec![node.bootstrap().to_owned()],
            ..KafkaConfig::default()
        });
    });
    fails_rests_dies_and_comes_back(site.await, by == RetryBy::Lane).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_06_fault_10_a_failing_event_rests_in_front_of_its_key_on_kafka() {
    over_kafka(RetryBy::Lane, "kafka, lane").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_fault_06_fault_10_a_failing_event_rests_in_a_topic_on_kafka() {
    over_kafka(RetryBy::Topic, "kafka, topic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_fault_06_fault_10_what_fails_on_the_embedded_broker_rests() {
    for (kind, name, waits) in [
        (Kind::Task, "embedded queue", false),
        (Kind::Event(RetryBy::Lane), "embedded stream, lane", true),
        (Kind::Event(RetryBy::Topic), "embedded stream, topic", false),
    ] {
        let site = Site::start(name, kind, |_| {}).await;
        fails_rests_dies_and_comes_back(site, waits).await;
    }
}

/// An event that rests outlives the hub that put it there, and reaches no reader of
/// a pattern that covers its topic by chance.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_rests_outlives_its_hub_and_is_nobody_elses() {
    let node = need!(shared_kafka().await);
    let topic = unique("events.resting");
    let group = unique("workers");
    let config = || {
        let mut config = MessagingConfig::builtin();
        config.hub.auto_declare = Some(true);
        config.hub.routes.push(RouteSettings {
            retry_delay: Some(Delays::every(Duration::from_secs(4))),
            retry_by: RetryBy::Topic,
            ..RouteSettings::new(Pattern::new(&topic).unwrap(), RouteKind::Event)
        });
        config.kafka = Some(KafkaConfig {
            brokers: vec![node.bootstrap().to_owned()],
            ..KafkaConfig::default()
        });
        config
    };
    let seen = Seen::default();
    let handler = |fails: bool| {
        let seen = seen.clone();
        move |received: Received| {
            let seen = seen.clone();
            async move {
                let topic = received.topic.to_string();
                let count = received.message.retry_count;
                seen.lock().unwrap().push((Instant::now(), topic, count));
                if fails {
                    return Err(HandlerError::retry("not here"));
                }
                Ok::<(), HandlerError>(())
            }
        }
    };
    let first = MessagingSystem::start(config()).await.unwrap();
    let by_chance = Seen::default();
    let others = by_chance.clone();
    let _all = first
        .hub()
        .subscribe_events(
            "#",
            SubscribeOptions::group(unique("all")),
            move |r: Received| {
                others.lock().unwrap().push((
                    Instant::now(),
                    r.topic.to_string(),
                    r.message.retry_count,
                ));
                std::future::ready(Ok::<(), HandlerError>(()))
            },
        )
        .await
        .unwrap();
    let _workers = first
        .hub()
        .subscribe(&topic, SubscribeOptions::group(&group), handler(true))
        .await
        .unwrap();
    first
        .hub()
        .publish(&topic, Message::new("test", "x").with_key("k"))
        .await
        .unwrap();
    wait::until(LIMIT, "the first attempt", async || {
        !seen.lock().unwrap().is_empty()
    })
    .await;
    // Put to rest, and acked: nothing is left to the group.
    let recorder = first.hub().recorder().clone();
    wait::until(LIMIT, "it rests", async || {
        recorder.snapshot().messages_retried > 0
    })
    .await;
    first.close().await;

    let second = MessagingSystem::start(config()).await.unwrap();
    let _workers = second
        .hub()
        .subscribe(&topic, SubscribeOptions::group(&group), handler(false))
        .await
        .unwrap();
    wait::until(LIMIT, "the second attempt", async || {
        seen.lock().unwrap().len() >= 2
    })
    .await;
    {
        let seen = seen.lock().unwrap();
        let told: Vec<_> = seen.iter().map(|(_, t, n)| (t.as_str(), *n)).collect();
        assert_eq!(told, [(topic.as_str(), 0), (topic.as_str(), 1)]);
        assert!(seen[1].0 - seen[0].0 >= Duration::from_secs(4) - Duration::from_millis(20));
    }
    second.close().await;
    let by_chance = by_chance.lock().unwrap();
    assert!(
        by_chance
            .iter()
            .all(|(_, t, n)| !t.starts_with("hub-retry.") && *n == 0),
        "{by_chance:?}"
    );
}

// ---- tasks that take long ---------------------------------------------------

const QUEUE: &str = "helixagent.tasks.background";

fn hub_of(url: &str, folder: &Path, long_running: bool) -> Hub {
    let file = folder.join("hub.yaml");
    let routes = format!(
        "hub:\n  routes:\n    - {{pattern: {QUEUE}, kind: task, long_running: {long_running}}}\n"
    );
    std::fs::write(&file, routes).unwrap();
    let data = folder.join("data");
    Hub::start_with(
        &[
            "--config",
            file.to_str().unwrap(),
            "--data",
            data.to_str().unwrap(),
        ],
        &[("RABBITMQ_URL", url), ("RUST_LOG", "warn")],
    )
}

/// Messages of the queue at RabbitMQ: ready, and unacked.
async fn at_rabbitmq(rabbit: &Rabbit) -> (u64, u64) {
    let text = rabbit
        .ctl(&[
            "-q",
            "list_queues",
            "name",
            "messages_ready",
            "messages_unacknowledged",
        ])
        .await;
    let line = text.lines().find(|l| l.starts_with(QUEUE)).unwrap();
    let numbers: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(|n| n.parse().unwrap())
        .collect();
    (numbers[0], numbers[1])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_task_is_acked_at_rabbitmq_and_kept_by_the_hub_through_a_kill() {
    const ALL: usize = 20;
    const FIRST: usize = 5;
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let hub = hub_of(rabbit.url(), folder.path(), true);
    let lines: String = (0..ALL)
        .map(|n| json!({"id": format!("t{n}")}).to_string() + "\n")
        .collect();
    let published = Client::new()
        .post(hub.at(&format!("/v1/topics/{QUEUE}/messages")))
        .header("content-type", "application/x-ndjson")
        .body(lines)
        .send()
        .await
        .unwrap();
    let text = published.text().await.unwrap();
    assert_eq!(text.matches("\"outcome\"").count(), ALL, "{text}");
    wait::until(LIMIT, "an empty spool", async || hub.spooled().await == 0).await;

    let mut held = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while held.len() < FIRST {
        assert!(Instant::now() < deadline, "{} leased", held.len());
        held.extend(
            hub.lease(QUEUE, FIRST - held.len(), Duration::from_secs(1))
                .await,
        );
    }
    // Nothing at RabbitMQ waits for an ack, so nothing there can run out of time.
    // Its figures are some seconds old, and at first those of an empty queue.
    let wanted = "no unacked task at RabbitMQ, and the rest left to others";
    wait::until(LIMIT, wanted, async || {
        let (ready, unacked) = at_rabbitmq(&rabbit).await;
        unacked == 0 && ready >= (ALL - 2 * FIRST) as u64
    })
    .await;
    hub.signal("KILL");
    drop(hub);

    // One that goes on with what was handed over, until it is killed too.
    let hub = hub_of(rabbit.url(), folder.path(), true);
    let mut held = Vec::new();
    while held.len() < FIRST {
        assert!(Instant::now() < deadline, "{} leased again", held.len());
        held.extend(
            hub.lease(QUEUE, FIRST - held.len(), Duration::from_secs(1))
                .await,
        );
    }
    hub.signal("KILL");
    drop(hub);

    // And one whose route is not long-running any more: what was handed over is
    // handed out beside what RabbitMQ has.
    let hub = hub_of(rabbit.url(), folder.path(), false);
    let mut ids = std::collections::BTreeMap::<String, usize>::new();
    let deadline = Instant::now() + LIMIT;
    while ids.len() < ALL {
        assert!(Instant::now() < deadline, "{ids:?}");
        let leased = hub.lease(QUEUE, 10, Duration::from_secs(1)).await;
        hub.ack(&leased).await;
        for delivery in &leased {
            *ids.entry(delivery["message"]["id"].as_str().unwrap().to_owned())
                .or_default() += 1;
        }
    }
    assert!(ids.values().all(|n| *n == 1), "{ids:?}");
    assert_eq!(
        hub.lease(QUEUE, 10, Duration::from_millis(300)).await.len(),
        0
    );
    // Its figures are some seconds old.
    wait::until(LIMIT, "an empty queue at RabbitMQ", async || {
        at_rabbitmq(&rabbit).await == (0, 0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_folder_a_long_task_is_refused_and_told_why() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let mut config = MessagingConfig::builtin();
    config.rabbitmq = Some(RabbitMqConfig {
        url: Some(Secret::new(rabbit.url())),
        ..RabbitMqConfig::default()
    });
    let system = MessagingSystem::start(config).await.unwrap();
    let hour = Some(Duration::from_secs(3600));
    let short = SubscribeOptions {
        handler_timeout: hour,
        ..SubscribeOptions::default()
    };
    let long = SubscribeOptions {
        long_running: true,
        ..short.clone()
    };
    for (options, says) in [(short, "long_running"), (long, "data folder")] {
        let error = system
            .hub()
            .subscribe(QUEUE, options, |_: Received| {
                std::future::ready(Ok::<(), HandlerError>(()))
            })
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfig);
        assert!(error.to_string().contains(says), "{error}");
    }
    system.close().await;
}
