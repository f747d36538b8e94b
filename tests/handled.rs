//! A hub that is killed before the broker heard of its acks: started again on its
//! data folder, it does not hand out what was handled. A hub without one does,
//! which shows that the broker did give it again.
#![cfg(all(feature = "server", feature = "rabbitmq", feature = "journal"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use process::Hub;
use reqwest::Client;
use serde_json::{Value, json};
use support::{Direction, Rabbit, RabbitVersion, TcpProxy, need, wait};

const TASKS: usize = 300;
const LIMIT: Duration = Duration::from_secs(60);

fn hub(url: &str, data: &Path) -> Hub {
    Hub::start_with(
        &["--data", data.to_str().unwrap()],
        &[("RABBITMQ_URL", url), ("RUST_LOG", "warn")],
    )
}

async fn publish(hub: &Hub, queue: &str, ids: std::ops::Range<usize>) {
    let lines: String = ids
        .clone()
        .map(|n| json!({"id": format!("m{n}")}).to_string() + "\n")
        .collect();
    let response = Client::new()
        .post(hub.at(&format!("/v1/topics/{queue}/messages")))
        .header("content-type", "application/x-ndjson")
        .body(lines)
        .send()
        .await
        .unwrap();
    let text = response.text().await.unwrap();
    let accepted = |line: &&str| {
        let answer: Value = serde_json::from_str(line).unwrap();
        answer["outcome"].is_string()
    };
    assert_eq!(text.lines().filter(accepted).count(), ids.len(), "{text}");
    // On a busy machine the broker may have joined, or confirmed, late.
    wait::until(LIMIT, "an empty spool", async || hub.spooled().await == 0).await;
}

/// Takes what is handed out within `wait`, as (id, token).
async fn lease(hub: &Hub, queue: &str, wait: Duration) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let deliveries = hub.lease(queue, TASKS, wait).await;
    deliveries
        .iter()
        .map(|d| (text(&d["message"]["id"]), text(&d["token"])))
        .collect()
}

/// Leases until everything was handed out.
async fn lease_all(hub: &Hub, queue: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let deadline = Instant::now() + LIMIT;
    while all.len() < TASKS {
        assert!(Instant::now() < deadline, "{} of {TASKS}", all.len());
        all.extend(lease(hub, queue, Duration::from_secs(1)).await);
    }
    all
}

async fn counted(hub: &Hub, name: &str) -> u64 {
    let text = reqwest::get(hub.at("/metrics"))
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap();
    line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
}

/// Bytes that the log of handled ids takes, allocated but unused ones left out.
fn written(data: &Path) -> usize {
    let files = std::fs::read_dir(data.join("handled")).unwrap();
    files
        .filter_map(|file| std::fs::read(file.unwrap().path()).ok())
        .map(|bytes| bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1))
        .sum()
}

/// Handles every task of a queue, and is killed before an ack reaches the broker.
async fn handle_and_die(rabbit: &Rabbit, queue: &str, data: &Path) {
    let proxy = TcpProxy::to_port(rabbit.port()).await.unwrap();
    let hub = hub(&rabbit.url_via(proxy.port()), data);
    publish(&hub, queue, 0..TASKS).await;
    let leased = lease_all(&hub, queue).await;
    let before = written(data);
    proxy.drop_direction(Direction::ToServer);
    let tokens: Vec<&String> = leased.values().collect();
    let acks = Client::new()
        .post(hub.at("/v1/deliveries/ack"))
        .json(&json!({"tokens": tokens}))
        .send();
    // The answer may wait for a broker that hears nothing. An id takes 24 bytes, and
    // each write of some of them a little more: the last one is seen by that nothing
    // follows it.
    let last = std::cell::Cell::new((0, Instant::now()));
    let on_disk = wait::until(LIMIT, "the handled ids on the disk", async || {
        let now = written(data);
        if now != last.get().0 {
            last.set((now, Instant::now()));
        }
        now >= before + TASKS * 24 && last.get().1.elapsed() > Duration::from_secs(1)
    });
    tokio::select! {
        () = on_disk => {}
        () = async { drop(acks.await); std::future::pending::<()>().await } => {}
    }
    hub.signal("KILL");
    drop(hub);
    // What the proxy held back is gone with the connection.
    proxy.cut().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handled_before_a_kill_is_not_handed_out_again() {
    let rabbit = need!(Rabbit::start(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();

    // The broker gives everything again: to a hub that knows nothing of it.
    const FORGOTTEN: &str = "helixagent.tasks.background";
    let elsewhere = tempfile::tempdir().unwrap();
    handle_and_die(&rabbit, FORGOTTEN, elsewhere.path()).await;
    let fresh = tempfile::tempdir().unwrap();
    let stranger = hub(rabbit.url(), fresh.path());
    assert_eq!(lease_all(&stranger, FORGOTTEN).await.len(), TASKS);
    assert_eq!(counted(&stranger, DUPLICATES).await, 0);
    drop(stranger);

    const QUEUE: &str = "helixagent.tasks.llm";
    handle_and_die(&rabbit, QUEUE, folder.path()).await;
    let successor = hub(rabbit.url(), folder.path());
    let deadline = Instant::now() + LIMIT;
    while counted(&successor, DUPLICATES).await < TASKS as u64 {
        assert!(Instant::now() < deadline, "they did not come again");
        let again = lease(&successor, QUEUE, Duration::from_millis(500)).await;
        assert_eq!(again, BTreeMap::new(), "handed out twice");
    }
    // They are settled, so the next one is spared them; what is new passes.
    successor.signal("KILL");
    drop(successor);
    let last = hub(rabbit.url(), folder.path());
    publish(&last, QUEUE, TASKS..TASKS + 1).await;
    let new = lease(&last, QUEUE, Duration::from_secs(20)).await;
    assert_eq!(new.into_keys().collect::<Vec<_>>(), [format!("m{TASKS}")]);
    assert_eq!(counted(&last, UNKEPT).await, 0);
}

const DUPLICATES: &str = "messaging_duplicates_suppressed_total";
const UNKEPT: &str = "messaging_handled_unkept_total";
