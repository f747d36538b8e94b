//! A death at every step of a retry and of a reprocessing, over RabbitMQ: of the
//! hub, and of the broker, both with -9. Nothing is lost, and no process handles a
//! message twice.
//!
//! ```text
//! leased | nacked, the copy not written | written, its confirm lost | resting | back again
//! reprocessed: the copy not written | written, its confirm lost | done
//! ```
#![cfg(all(feature = "server", feature = "rabbitmq", feature = "journal"))]
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
use support::{Direction, Rabbit, RabbitVersion, TcpProxy, need, wait};

const QUEUE: &str = "helixagent.tasks.debate";
const LIMIT: Duration = Duration::from_secs(90);
/// Long enough for what must happen while a message rests.
const REST: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Hub,
    Broker,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Leased,
    CopyUnwritten,
    ConfirmLost,
    Resting,
    Back,
}

/// A broker behind a proxy, and the hub that is killed and started again.
struct Scene {
    rabbit: Rabbit,
    proxy: TcpProxy,
    folder: tempfile::TempDir,
    hub: Option<Hub>,
}

impl Scene {
    async fn start() -> Option<Self> {
        let rabbit = need!(Rabbit::start(RabbitVersion::V4).await, None);
        let proxy = TcpProxy::to_port(rabbit.port()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let hub = Some(start(&rabbit.url_via(proxy.port()), folder.path()));
        Some(Self {
            rabbit,
            proxy,
            folder,
            hub,
        })
    }

    fn hub(&self) -> &Hub {
        self.hub.as_ref().unwrap()
    }

    /// Kills one of the two with -9 and brings it back; the link is whole again.
    async fn kill(&mut self, victim: Victim) {
        match victim {
            Victim::Hub => {
                self.hub().signal("KILL");
                self.hub = None;
                // What the proxy held back is gone with the connection.
                self.proxy.cut().await;
                self.proxy.heal().await;
                let url = self.rabbit.url_via(self.proxy.port());
                self.hub = Some(start(&url, self.folder.path()));
            }
            Victim::Broker => {
                self.rabbit.kill().await;
                self.proxy.cut().await;
                self.rabbit.restart().await;
                self.proxy.heal().await;
            }
        }
    }

    async fn publish(&self, id: &str) {
        let answer = Client::new()
            .post(self.hub().at(&format!("/v1/topics/{QUEUE}/messages")))
            .header("hub-id", id)
            .body("x")
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
    }

    /// What comes within a time; nothing while the broker is away.
    async fn lease(&self, patience: Duration) -> Vec<Value> {
        let leased = self.hub().try_lease(QUEUE, 10, patience).await;
        leased.unwrap_or_default()
    }

    /// The next message, which must be this one.
    async fn next(&self, id: &str) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < deadline, "{id} is lost");
            if let Some(delivery) = self.lease(Duration::from_secs(1)).await.pop() {
                assert_eq!(delivery["message"]["id"], id);
                return delivery;
            }
        }
    }

    /// Posts something about a delivery; the answer may be long in coming.
    fn post(&self, delivery: &Value, what: &str, body: Value) -> tokio::task::JoinHandle<()> {
        let token = delivery["token"].as_str().unwrap();
        let path = self.hub().at(&format!("/v1/deliveries/{token}/{what}"));
        let request = Client::new().post(path).json(&body);
        tokio::spawn(async move {
            // The hub may die over it.
            let _ = request.send().await;
        })
    }

    /// Waits until a token stands for nothing any more: its verdict was taken up.
    async fn taken_up(&self, delivery: &Value) {
        let token = delivery["token"].as_str().unwrap();
        let path = self.hub().at(&format!("/v1/deliveries/{token}/extend"));
        wait::until(LIMIT, "the verdict is taken up", async || {
            let answer = Client::new().post(&path).json(&json!({})).send().await;
            answer.is_ok_and(|a| a.status() == StatusCode::GONE)
        })
        .await;
    }

    /// Handles what comes of one message until nothing does, and says how often.
    async fn handle_all(&self, id: &str) -> usize {
        self.handle_after(id, async || {}).await
    }

    /// As `handle_all`, doing something before each look until the first comes.
    async fn handle_after(&self, id: &str, mut before: impl AsyncFnMut()) -> usize {
        let mut handled = 0;
        let mut quiet = Instant::now();
        let deadline = Instant::now() + LIMIT;
        // A retry, or what a killed broker gives again, comes within its rest.
        while handled == 0 || quiet.elapsed() < REST + Duration::from_secs(2) {
            assert!(Instant::now() < deadline, "{id} is lost");
            if handled == 0 {
                before().await;
            }
            for delivery in self.lease(Duration::from_millis(500)).await {
                assert_eq!(delivery["message"]["id"], id);
                self.post(&delivery, "ack", json!({})).await.unwrap();
                handled += 1;
                quiet = Instant::now();
            }
        }
        handled
    }

    async fn letters(&self) -> Vec<Value> {
        let path = self.hub().at("/v1/dead-letters?status=pending");
        let page: Value = reqwest::get(path).await.unwrap().json().await.unwrap();
        page["letters"].as_array().cloned().unwrap_or_default()
    }

    fn reprocess(&self, letter: &Value) -> reqwest::RequestBuilder {
        let letter = letter["id"].as_str().unwrap();
        let path = format!("/v1/dead-letters/{letter}/reprocess");
        Client::new().post(self.hub().at(&path))
    }

    /// As an operator would: what is still open is reprocessed again.
    async fn reprocess_open(&self) {
        for open in self.letters().await {
            // It may be settled by now, or the broker away.
            let _ = self.reprocess(&open).send().await;
        }
    }
}

fn start(url: &str, folder: &Path) -> Hub {
    let file = folder.join("hub.yaml");
    let routes = format!(
        "hub:\n  routes:\n    - {{pattern: {QUEUE}, kind: task, retry_delay: {}ms}}\n",
        REST.as_millis()
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

/// Takes one message to a step of its retry, kills, and counts what comes of it.
async fn retried(scene: &mut Scene, step: Step, victim: Victim) {
    let id = format!("{step:?}-{victim:?}");
    let nack = json!({"retry": "later", "reason": "it failed"});
    if step == Step::ConfirmLost {
        // Another retry has opened the channel on which this one's copy goes.
        let before = format!("before-{id}");
        scene.publish(&before).await;
        let one = scene.next(&before).await;
        scene.post(&one, "nack", nack.clone()).await.unwrap();
        assert_eq!(scene.handle_all(&before).await, 1, "{before}");
    }
    scene.publish(&id).await;
    let first = scene.next(&id).await;
    // The lease's consumer has left, or it would wait for the broker's answer to
    // that instead of sending the copy.
    wait::until(LIMIT, "no consumer at the broker", async || {
        let consumers = scene.rabbit.ctl(&["-q", "list_consumers"]).await;
        !consumers.contains(QUEUE)
    })
    .await;
    match step {
        Step::Leased => {}
        Step::CopyUnwritten => {
            scene.proxy.drop_direction(Direction::ToServer);
            scene.post(&first, "nack", nack);
            scene.taken_up(&first).await;
        }
        Step::ConfirmLost => {
            scene.proxy.drop_direction(Direction::ToClient);
            let before = scene.proxy.counters().bytes_to_server;
            scene.post(&first, "nack", nack);
            scene.taken_up(&first).await;
            let written = async || scene.proxy.counters().bytes_to_server > before + 200;
            wait::until(LIMIT, "the copy is written", written).await;
        }
        Step::Resting => scene.post(&first, "nack", nack).await.unwrap(),
        Step::Back => {
            scene.post(&first, "nack", nack).await.unwrap();
            let second = scene.next(&id).await;
            assert_eq!(second["message"]["retry_count"], 1, "{second}");
        }
    }
    scene.kill(victim).await;
    let handled = scene.handle_all(&id).await;
    assert!(handled >= 1, "{id}");
    // The process that handled it is one and the same from here on.
    assert_eq!(
        handled, 1,
        "{id} was handled {handled} times by one process"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hub_dies_at_every_step_of_a_retry() {
    let Some(mut scene) = Scene::start().await else {
        return;
    };
    for step in STEPS {
        retried(&mut scene, step, Victim::Hub).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_dies_at_every_step_of_a_retry() {
    let Some(mut scene) = Scene::start().await else {
        return;
    };
    for step in STEPS {
        retried(&mut scene, step, Victim::Broker).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hub_and_the_broker_die_at_every_step_of_a_reprocessing() {
    let Some(mut scene) = Scene::start().await else {
        return;
    };
    for victim in [Victim::Hub, Victim::Broker] {
        for step in [Step::CopyUnwritten, Step::ConfirmLost, Step::Resting] {
            let id = format!("letter-{step:?}-{victim:?}");
            scene.publish(&id).await;
            let first = scene.next(&id).await;
            let never = json!({"retry": "never", "reason": "it is bad"});
            scene.post(&first, "nack", never).await.unwrap();
            let letter = wait::value(LIMIT, "a dead letter", async || scene.letters().await.pop());
            let request = scene.reprocess(&letter.await).send();
            match step {
                Step::CopyUnwritten => scene.proxy.drop_direction(Direction::ToServer),
                Step::ConfirmLost => scene.proxy.drop_direction(Direction::ToClient),
                _ => {}
            }
            let before = scene.proxy.counters();
            let asked = tokio::spawn(async move {
                let _ = request.await;
            });
            match step {
                // Nothing can be written, so nothing is to be waited for.
                Step::CopyUnwritten => {}
                Step::ConfirmLost => {
                    let written =
                        async || scene.proxy.counters().bytes_to_server > before.bytes_to_server;
                    wait::until(LIMIT, "something is written", written).await;
                }
                _ => asked.await.unwrap(),
            }
            scene.kill(victim).await;
            let again = async || scene.reprocess_open().await;
            let handled = scene.handle_after(&id, again).await;
            assert_eq!(
                handled, 1,
                "{id} was handled {handled} times by one process"
            );
            wait::until(LIMIT, "no open letter", async || {
                scene.reprocess_open().await;
                scene.letters().await.is_empty()
            })
            .await;
            assert_eq!(scene.lease(Duration::from_secs(1)).await.len(), 0, "{id}");
        }
    }
}

const STEPS: [Step; 5] = [
    Step::Leased,
    Step::CopyUnwritten,
    Step::ConfirmLost,
    Step::Resting,
    Step::Back,
];
