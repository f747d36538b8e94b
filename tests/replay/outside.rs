//! Through the binary: HTTP and the command line.

use std::{process::Output, time::Duration};

use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::{process::Hub, support::wait};

const SOON: Duration = Duration::from_secs(20);
const TOPIC: &str = "events.outside";

fn out(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

async fn publish(hub: &Hub, count: u64) {
    let lines: String = (0..count)
        .map(|n| {
            let time = format!("2026-01-01T00:00:{:02}Z", n % 60);
            json!({"type": "made", "key": format!("k{}", n % 5), "timestamp": time,
                "headers": {"n": n.to_string()}})
            .to_string()
                + "\n"
        })
        .collect();
    let answers = Client::new()
        .post(hub.at(&format!("/v1/topics/{TOPIC}/messages")))
        .header("content-type", "application/x-ndjson")
        .body(lines)
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(
        answers.lines().all(|l| l.contains("\"delivered\"")),
        "{answers}"
    );
}

async fn post(hub: &Hub, path: &str, body: &Value) -> Response {
    let request = Client::new().post(hub.at(path)).json(body);
    request.send().await.unwrap()
}

async fn get(hub: &Hub, path: &str) -> Value {
    reqwest::get(hub.at(path))
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

async fn over(hub: &Hub, id: &str) -> Value {
    wait::value(SOON, "the replay is over", async || {
        let replay = get(hub, &format!("/v1/replays/{id}")).await;
        let status = replay["status"].as_str().unwrap().to_owned();
        (!matches!(&*status, "pending" | "running")).then_some(replay)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_is_started_watched_and_cancelled_over_http() {
    let hub = Hub::start();
    publish(&hub, 60).await;
    let ask = json!({
        "topic": TOPIC, "target_topic": "events.outside.out", "id": "r1",
        "from_time": "2026-01-01T00:00:10Z", "to_time": "2026-01-01T00:00:40Z",
        "options": {"batch_size": 7, "delay_between": "1ms"},
    });
    let answer = post(&hub, "/v1/replays", &ask).await;
    assert_eq!(answer.status(), 202);
    assert_eq!(answer.headers()["location"], "/v1/replays/r1");
    let started: Value = answer.json().await.unwrap();
    assert_eq!(started["id"], "r1");
    assert_eq!(started["request"]["from_time"], "2026-01-01T00:00:10.000Z");
    let done = over(&hub, "r1").await;
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(
        (&done["replayed"], &done["total"]),
        (&json!(30), &json!(30))
    );

    // Five that stay, and one too many.
    let mut stays = json!({"pattern": "events.outside.**",
        "options": {"batch_size": 1, "delay_between": "1h"}});
    for n in 0..5 {
        stays["id"] = json!(format!("stays-{n}"));
        assert_eq!(post(&hub, "/v1/replays", &stays).await.status(), 202);
    }
    stays["id"] = json!("one-more");
    let refused = post(&hub, "/v1/replays", &stays).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(problem["code"], "REPLAY_LIMIT");
    let metrics = reqwest::get(hub.at("/metrics")).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("\nmessaging_replay_active 5\n"),
        "{metrics}"
    );
    let list = get(&hub, "/v1/replays").await;
    assert_eq!(
        (&list["active"], &list["max_active"]),
        (&json!(5), &json!(5))
    );
    assert_eq!(list["replays"][0]["id"], "stays-4", "the newest first");
    for n in 0..5 {
        let path = format!("/v1/replays/stays-{n}/cancel");
        let answer: Value = post(&hub, &path, &json!({})).await.json().await.unwrap();
        assert_eq!(answer["status"], "cancelled", "{answer}");
    }

    for (body, status, code) in [
        (json!({"topic": TOPIC, "id": "r1"}), 409, "REPLAY_EXISTS"),
        (json!({"topic": "tasks"}), 400, "INVALID_CONFIG"),
        (json!({"topic": "events.none"}), 404, "TOPIC_NOT_FOUND"),
        (
            json!({"topic": TOPIC, "surprise": 1}),
            400,
            "INVALID_CONFIG",
        ),
    ] {
        let answer = post(&hub, "/v1/replays", &body).await;
        assert_eq!(answer.status(), status, "{body}");
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(problem["code"], code, "{problem}");
    }
    let unknown = reqwest::get(hub.at("/v1/replays/none")).await.unwrap();
    assert_eq!(unknown.status(), 404);
    let openapi = get(&hub, "/openapi.json").await;
    for path in ["/v1/replays", "/v1/replays/{id}", "/v1/replays/{id}/cancel"] {
        assert!(openapi["paths"][path].is_object(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_starts_follows_lists_and_cancels() {
    let hub = Hub::start();
    publish(&hub, 60).await;
    let followed = out(&hub.run(&[
        "replay",
        "start",
        TOPIC,
        "--id",
        "c1",
        "--from",
        "2026-01-01T00:00:30Z",
        "--target",
        "events.outside.cli",
        "--header",
        "n=31",
        "--follow",
        "--json",
    ]));
    let done: Value = serde_json::from_str(&followed).unwrap();
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(
        (&done["replayed"], &done["skipped"]),
        (&json!(1), &json!(29))
    );
    let dry = out(&hub.run(&["replay", "start", "events.**", "--dry-run", "--follow"]));
    assert!(
        dry.contains(" completed, a dry run: 61 of 61 replayed"),
        "{dry}"
    );
    out(&hub.run(&[
        "replay",
        "start",
        TOPIC,
        "--id",
        "c2",
        "--batch-size",
        "1",
        "--delay",
        "1h",
    ]));
    let status = out(&hub.run(&["replay", "status", "c2"]));
    assert!(status.starts_with("c2 running: "), "{status}");
    let cancelled = out(&hub.run(&["replay", "cancel", "c2"]));
    assert!(cancelled.starts_with("c2 cancelled: "), "{cancelled}");
    let list = out(&hub.run(&["replay", "list"]));
    assert!(
        list.contains("c1 ") && list.contains("0 of 5 active"),
        "{list}"
    );

    let unknown = hub.run(&["replay", "status", "none"]);
    assert_eq!(unknown.status.code(), Some(1));
    let wrong = hub.run(&["replay", "start", TOPIC, "--from", "soon"]);
    assert_eq!(wrong.status.code(), Some(2));
    // Followed to an end that is not well.
    let failed = hub.run(&["replay", "status", "c2", "--follow"]);
    assert_eq!(failed.status.code(), Some(1));
}
