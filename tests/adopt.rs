//! Two hubs on the same brokers, and one of them dies with a spool: its journal,
//! adopted by the other or reopened by its successor, drains. Nothing is lost,
//! the order of each key holds, and a foreign client judges.
#![cfg(all(feature = "server", feature = "rabbitmq", feature = "journal"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{collections::BTreeMap, path::Path, time::Duration};

use futures_util::StreamExt;
use process::Hub;
use reqwest::Client;
use serde_json::{Value, json};
use support::{Rabbit, RabbitVersion, need, vacant_port, wait};

const QUEUE: &str = "helixagent.tasks.llm";
const KEYS: usize = 20;
const LIMIT: Duration = Duration::from_secs(90);

fn hub(rabbit: &Rabbit, data: &Path) -> Hub {
    Hub::start_with(
        &["--data", data.to_str().unwrap()],
        &[("RABBITMQ_URL", rabbit.url()), ("RUST_LOG", "warn")],
    )
}

/// Publishes numbered messages; each is answered, and answered well.
async fn publish(hub: &Hub, from: usize, to: usize) -> BTreeMap<String, usize> {
    let lines: String = (from..to)
        .map(|n| {
            let key = format!("k{}", n % KEYS);
            json!({"id": format!("m{n}"), "key": key, "headers": {"n": n.to_string()}}).to_string()
                + "\n"
        })
        .collect();
    let response = Client::new()
        .post(hub.at(&format!("/v1/topics/{QUEUE}/messages")))
        .header("content-type", "application/x-ndjson")
        .body(lines)
        .send()
        .await
        .unwrap();
    let mut outcomes = BTreeMap::new();
    for line in response.text().await.unwrap().lines() {
        let answer: Value = serde_json::from_str(line).unwrap();
        let outcome = answer["outcome"]
            .as_str()
            .unwrap_or_else(|| panic!("{line}"));
        if outcome == "spooled" {
            assert_eq!(answer["durable"], true, "{line}");
        }
        *outcomes.entry(outcome.to_owned()).or_default() += 1;
    }
    assert_eq!(outcomes.values().sum::<usize>(), to - from);
    outcomes
}

async fn drained(hub: &Hub) {
    wait::until(LIMIT, "an empty spool", async || hub.spooled().await == 0).await;
}

/// Reads the queue to its end with a bare client: for each key the numbers in
/// the order of their arrival, first deliveries only.
async fn read(url: &str, wanted: usize) -> (BTreeMap<String, Vec<usize>>, usize) {
    let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = lapin::options::BasicConsumeOptions {
        no_ack: true,
        ..Default::default()
    };
    let mut consumer = channel
        .basic_consume(
            QUEUE.into(),
            "judge".into(),
            options,
            lapin::types::FieldTable::default(),
        )
        .await
        .unwrap();
    let mut by_key: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut seen = std::collections::BTreeSet::new();
    let mut repeats = 0;
    loop {
        // Repeats may follow the last distinct one.
        let limit = if seen.len() < wanted {
            LIMIT
        } else {
            Duration::from_secs(2)
        };
        let Ok(Some(delivery)) = tokio::time::timeout(limit, consumer.next()).await else {
            return (by_key, repeats);
        };
        let delivery = delivery.unwrap();
        let headers = delivery.properties.headers().as_ref().unwrap().inner();
        let text = |name: &str| match headers.get(name) {
            Some(lapin::types::AMQPValue::LongString(s)) => s.to_string(),
            other => panic!("{name}: {other:?}"),
        };
        let n: usize = text("n").parse().unwrap();
        if seen.insert(n) {
            by_key.entry(text("hub-key")).or_default().push(n);
        } else {
            repeats += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spool_of_a_dead_hub_drains_through_another_or_its_successor() {
    const BEFORE: usize = 500;
    const ADOPTED: usize = 3_000;
    const REOPENED: usize = 1_000;
    let mut rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folders = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = hub(&rabbit, folders.0.path());
    let second = hub(&rabbit, folders.1.path());
    publish(&first, 0, BEFORE).await;
    rabbit.kill().await;
    let outcomes = publish(&first, BEFORE, BEFORE + ADOPTED).await;
    assert!(
        outcomes.get("spooled").is_some_and(|n| *n > ADOPTED / 2),
        "{outcomes:?}"
    );
    // Alive, it keeps its own.
    let refused = second.run(&["spool", "adopt", folders.0.path().to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("spool"), "{why}");
    first.signal("KILL");
    drop(first);

    // Into a hub whose broker is away, too: from one disk to another.
    let adopted = second.run(&[
        "--json",
        "spool",
        "adopt",
        folders.0.path().to_str().unwrap(),
    ]);
    let said = String::from_utf8_lossy(&adopted.stdout).into_owned();
    assert_eq!(
        adopted.status.code(),
        Some(0),
        "{said} {}",
        String::from_utf8_lossy(&adopted.stderr)
    );
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["left"], 0, "{said}");
    assert!(said["moved"].as_u64().unwrap() > 0, "{said}");
    let again = second.run(&[
        "--json",
        "spool",
        "adopt",
        folders.0.path().to_str().unwrap(),
    ]);
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(again["moved"], 0, "what was moved is gone there: {again}");

    // And one that dies and comes back by itself.
    let total = BEFORE + ADOPTED + REOPENED;
    publish(&second, BEFORE + ADOPTED, total).await;
    second.signal("KILL");
    drop(second);
    let second = hub(&rabbit, folders.1.path());
    assert!(second.spooled().await > 0, "nothing was taken up");
    rabbit.restart().await;
    drained(&second).await;

    let (by_key, repeats) = read(rabbit.url(), total).await;
    let read: usize = by_key.values().map(Vec::len).sum();
    println!("published {total}, read {read}, repeats {repeats}, adopted {said}");
    assert_eq!(read, total, "lost");
    for (key, numbers) in &by_key {
        assert!(numbers.is_sorted(), "{key} is out of order: {numbers:?}");
    }
    // What was in doubt when the broker died, at most a window.
    assert!(repeats <= 1_000, "{repeats} repeats");
}

/// A task that failed while its broker was away rests in the spool, for as long there
/// as it would have rested at the broker.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_rests_in_an_adopted_spool_keeps_its_time() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folders = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = hub(&rabbit, folders.0.path());
    let second = hub(&rabbit, folders.1.path());
    publish(&first, 0, 1).await;
    let handed = first.lease(QUEUE, 1, Duration::from_secs(60)).await;
    first.ack(&handed).await;
    rabbit.kill().await;
    publish(&first, 1, 2).await;
    let handed = first.lease(QUEUE, 1, Duration::from_secs(60)).await;
    assert_eq!(handed.len(), 1, "handed out while the broker is away");
    let nack = first.at(&format!(
        "/v1/deliveries/{}/nack",
        handed[0]["token"].as_str().unwrap()
    ));
    let body = json!({"retry": "later", "reason": "not today"});
    let nacked = Client::new().post(nack).json(&body).send().await.unwrap();
    assert!(nacked.status().is_success(), "{nacked:?}");
    first.signal("KILL");
    drop(first);

    let folder = folders.0.path().to_str().unwrap();
    let adopted = second.run(&["--json", "spool", "adopt", folder]);
    let said: Value = serde_json::from_slice(&adopted.stdout).unwrap();
    assert_eq!((&said["moved"], &said["left"]), (&json!(1), &json!(0)));
    assert_eq!(second.scheduled().await, ["m1"]);
}

/// Started without its brokers, by mistake or on purpose, a hub says what it
/// leaves alone, and the next one with them still has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_this_configuration_does_not_drain_is_told_and_kept() {
    const SPOOLED: usize = 50;
    // Nobody listens there: the broker is away.
    let port = vacant_port();
    let url = format!("amqp://guest:guest@127.0.0.1:{port}/%2f");
    let folder = tempfile::tempdir().unwrap();
    let data = ["--data", folder.path().to_str().unwrap()];
    let with = [("RABBITMQ_URL", url.as_str()), ("RUST_LOG", "warn")];
    let hub = Hub::start_with(&data, &with);
    let outcomes = publish(&hub, 0, SPOOLED).await;
    assert_eq!(outcomes.get("spooled"), Some(&SPOOLED));
    drop(hub);
    let mut without = Hub::start_with(&data, &[("RUST_LOG", "warn")]);
    assert_eq!(without.spooled().await, 0);
    without.signal("TERM");
    let (status, said) = without.ended();
    assert!(status.success());
    assert!(said.contains("does not drain"), "{said}");
    assert!(said.contains("messages=50"), "{said}");
    let again = Hub::start_with(&data, &with);
    assert_eq!(again.spooled().await, SPOOLED as u64);
}
