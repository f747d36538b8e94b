//! Tasks that wait for their time, from the outside: over RabbitMQ and over Kafka,
//! which both hand out at once, through kills of the hub and of the broker.
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
    time::{Duration, Instant},
};

use process::Hub;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use support::{Kafka, Rabbit, RabbitVersion, need, wait};

const QUEUE: &str = "helixagent.tasks.llm";
const LIMIT: Duration = Duration::from_secs(60);

fn hub(url: &str, data: &Path) -> Hub {
    Hub::start_with(
        &["--data", data.to_str().unwrap()],
        &[("RABBITMQ_URL", url), ("RUST_LOG", "warn")],
    )
}

async fn publish(hub: &Hub, topic: &str, id: &str, at: &str) -> (StatusCode, Value) {
    let response = Client::new()
        .post(hub.at(&format!("/v1/topics/{topic}/messages")))
        .header("content-type", "text/plain")
        .header("hub-id", id)
        .header("hub-type", "later")
        .header("hub-scheduled-at", at)
        .body(id.to_owned())
        .send()
        .await
        .unwrap();
    (response.status(), response.json().await.unwrap())
}

fn is_kept(answer: &(StatusCode, Value)) -> bool {
    let (status, body) = answer;
    *status == StatusCode::ACCEPTED && body["outcome"] == "spooled" && body["durable"] == true
}

/// Leases for a while, acks, and says what came when.
async fn lease(hub: &Hub, queue: &str, wait: Duration) -> Vec<(String, Value)> {
    let deliveries = hub.lease(queue, 100, wait).await;
    hub.ack(&deliveries).await;
    let one = |d: &Value| {
        let message = d["message"].clone();
        (message["id"].as_str().unwrap().to_owned(), message)
    };
    deliveries.iter().map(one).collect()
}

/// The ids of the dead letters.
async fn letters(hub: &Hub) -> Vec<String> {
    let page: Value = reqwest::get(hub.at("/v1/dead-letters"))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let ids = page["letters"].as_array().unwrap().iter();
    ids.map(|l| l["message_id"].as_str().unwrap().to_owned())
        .collect()
}

async fn cancel(hub: &Hub, topic: &str, id: &str) -> StatusCode {
    let path = hub.at(&format!("/v1/scheduled/{topic}/{id}"));
    Client::new().delete(path).send().await.unwrap().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_waits_on_rabbitmq_through_a_kill_and_is_handed_out_once() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let first = hub(rabbit.url(), folder.path());
    let published = Instant::now();
    let at = Duration::from_secs(20);
    assert!(is_kept(&publish(&first, QUEUE, "soon", "20s").await));
    assert!(is_kept(&publish(&first, QUEUE, "off", "1h").await));
    // A repeat of the same id gets the first answer and is not a second task.
    assert!(is_kept(&publish(&first, QUEUE, "soon", "20s").await));
    assert_eq!(first.scheduled().await, ["soon", "off"]);
    first.signal("KILL");
    drop(first);

    let second = hub(rabbit.url(), folder.path());
    assert_eq!(second.scheduled().await, ["soon", "off"]);
    let one: Value = reqwest::get(second.at(&format!("/v1/scheduled/{QUEUE}/off")))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&one["type"], &one["failures"]),
        (&json!("later"), &json!(0))
    );
    // Not before its time, whoever asks; and then once.
    let mut got = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while got.is_empty() {
        assert!(Instant::now() < deadline, "it never came");
        got = lease(&second, QUEUE, Duration::from_secs(2)).await;
        assert!(got.is_empty() || published.elapsed() >= at, "too early");
    }
    assert_eq!(got.len(), 1, "{got:?}");
    assert_eq!(
        (got[0].0.as_str(), &got[0].1["type"]),
        ("soon", &json!("later"))
    );
    assert_eq!(lease(&second, QUEUE, Duration::from_secs(2)).await, []);

    // Called off it never comes, and its id may be used again.
    assert_eq!(cancel(&second, QUEUE, "off").await, StatusCode::OK);
    assert_eq!(cancel(&second, QUEUE, "off").await, StatusCode::NOT_FOUND);
    assert_eq!(cancel(&second, QUEUE, "soon").await, StatusCode::NOT_FOUND);
    assert!(is_kept(&publish(&second, QUEUE, "off", "1s").await));
    let again = lease(&second, QUEUE, Duration::from_secs(20)).await;
    assert_eq!(again.len(), 1, "{again:?}");
    assert_eq!(again[0].0, "off");
    // It may be handed out before its publisher has heard that it was confirmed.
    wait::until(LIMIT, "the schedule to let go of it", async || {
        second.scheduled().await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_while_the_broker_is_away_is_spooled_and_drained() {
    const TASKS: usize = 50;
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let hub = hub(rabbit.url(), folder.path());
    let due = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(20);
    for n in 0..TASKS {
        let id = format!("t{n:02}");
        assert!(is_kept(&publish(&hub, QUEUE, &id, &due.to_string()).await));
    }
    rabbit.kill().await;
    assert!(jiff::Timestamp::now() < due, "too slow: some are there");
    wait::until(LIMIT, "everything due to be spooled", async || {
        hub.scheduled().await.is_empty() && hub.spooled().await == TASKS as u64
    })
    .await;
    rabbit.restart().await;
    wait::until(LIMIT, "an empty spool", async || hub.spooled().await == 0).await;
    let mut seen = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while seen.len() < TASKS {
        assert!(Instant::now() < deadline, "{} of {TASKS}", seen.len());
        let some = lease(&hub, QUEUE, Duration::from_secs(1)).await;
        seen.extend(some.into_iter().map(|(id, _)| id));
    }
    assert_eq!(lease(&hub, QUEUE, Duration::from_secs(1)).await, []);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), TASKS);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_refuses_when_its_time_has_come_is_a_dead_letter() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let hub = hub(rabbit.url(), folder.path());
    assert!(is_kept(
        &publish(&hub, "tasks.nobody.made", "lost", "1s").await
    ));
    wait::until(LIMIT, "its dead letter", async || {
        letters(&hub).await == ["lost"]
    })
    .await;
    wait::until(LIMIT, "the schedule to let go of it", async || {
        hub.scheduled().await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_waits_on_kafka_too() {
    const TOPIC: &str = "helixagent.events.audit";
    let kafka = need!(Kafka::start().await);
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start_with(
        &["--data", folder.path().to_str().unwrap()],
        &[("KAFKA_BROKERS", kafka.bootstrap()), ("RUST_LOG", "warn")],
    );
    let published = Instant::now();
    let (status, body) = publish(&hub, TOPIC, "k1", "2s").await;
    assert!(is_kept(&(status, body.clone())), "{status} {body}");
    let mut stream = Client::new()
        .get(hub.at(&format!("/v1/stream?pattern={TOPIC}&from=earliest")))
        .send()
        .await
        .unwrap();
    let read = async {
        let mut text = String::new();
        while !text.contains("\"id\":\"k1\"") {
            let piece = stream.chunk().await.unwrap().expect("the stream ended");
            text.push_str(&String::from_utf8_lossy(&piece));
        }
    };
    tokio::time::timeout(LIMIT, read)
        .await
        .expect("it never came");
    assert!(published.elapsed() >= Duration::from_secs(2), "too early");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_past_its_deadline_is_not_started() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let hub = hub(rabbit.url(), folder.path());
    let post = async |id: &str, deadline: &str| {
        Client::new()
            .post(hub.at(&format!("/v1/topics/{QUEUE}/messages")))
            .header("content-type", "text/plain")
            .header("hub-id", id)
            .header("hub-deadline", deadline)
            .body("x")
            .send()
            .await
            .unwrap()
            .status()
    };
    assert_eq!(post("far", "1h").await, StatusCode::OK);
    assert_eq!(post("near", "5s").await, StatusCode::OK);
    let published = Instant::now();
    assert_eq!(
        post("past", "2020-01-01T00:00:00Z").await,
        StatusCode::BAD_REQUEST
    );
    // Until then nobody asks for it.
    wait::until(LIMIT, "the deadline", async || {
        published.elapsed() > Duration::from_secs(5)
    })
    .await;
    let got = lease(&hub, QUEUE, Duration::from_secs(2)).await;
    let ids: Vec<&str> = got.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["far"]);
    wait::until(LIMIT, "the near one among the dead letters", async || {
        letters(&hub).await == ["near"]
    })
    .await;
}
