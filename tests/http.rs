//! The HTTP surface, driven from outside: the real binary, real sockets.
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use process::{Hub, PATIENCE, run};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;

const ENVELOPE: &str = "application/vnd.messaging-hub+json";

async fn post(
    hub: &Hub,
    topic: &str,
    content_type: &str,
    body: impl Into<reqwest::Body>,
) -> Response {
    Client::new()
        .post(hub.at(&format!("/v1/topics/{topic}/messages")))
        .header("content-type", content_type)
        .body(body)
        .send()
        .await
        .unwrap()
}

async fn publish(hub: &Hub, topic: &str, id: &str) -> Value {
    let envelope = json!({"id": id, "payload": "aGk="});
    let response = post(hub, topic, ENVELOPE, envelope.to_string()).await;
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

async fn call(hub: &Hub, path: &str, body: Value) -> (StatusCode, Value) {
    let response = Client::new()
        .post(hub.at(path))
        .timeout(PATIENCE)
        .body(body.to_string())
        .send()
        .await
        .unwrap();
    let status = response.status();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or_default())
}

async fn lease(hub: &Hub, queue: &str, ask: Value) -> Vec<Value> {
    let (status, answer) = call(hub, &format!("/v1/queues/{queue}/lease"), ask).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["deliveries"].as_array().unwrap().clone()
}

async fn settle(hub: &Hub, delivery: &Value, how: &str, body: Value) -> StatusCode {
    let token = delivery["token"].as_str().unwrap();
    call(hub, &format!("/v1/deliveries/{token}/{how}"), body)
        .await
        .0
}

/// A stream being read: ids of cursors and messages as they come.
struct Events {
    pieces:
        std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    text: String,
}

impl Events {
    async fn open(hub: &Hub, query: &[(&str, &str)], last: Option<&str>) -> Self {
        let mut request = Client::new().get(hub.at("/v1/stream")).query(query);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = timeout(PATIENCE, request.send())
            .await
            .expect("no headers in time")
            .unwrap();
        let status = response.status();
        if status != StatusCode::OK {
            panic!("{status}: {}", response.text().await.unwrap());
        }
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            pieces: Box::pin(response.bytes_stream()),
            text: String::new(),
        }
    }

    /// The next event: its cursor and its message; none at the stream's end.
    async fn next(&mut self) -> Option<(String, Value)> {
        // Of the whole wait: a heartbeat is no event.
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    event
                        .lines()
                        .find_map(|l| l.strip_prefix(name))
                        .map(str::to_owned)
                };
                let found = field("id: ").zip(field("data: "));
                self.text = rest.to_owned();
                match found {
                    Some((id, data)) => return Some((id, serde_json::from_str(&data).unwrap())),
                    None => continue,
                }
            }
            let piece = tokio::time::timeout_at(deadline, self.pieces.next())
                .await
                .expect("no event in time")?;
            self.text
                .push_str(std::str::from_utf8(&piece.ok()?).unwrap());
        }
    }

    async fn ids(&mut self, n: usize) -> Vec<String> {
        let mut out = Vec::new();
        for _ in 0..n {
            out.push(
                self.next().await.unwrap().1["id"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
            );
        }
        out
    }
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort();
    ids
}

#[tokio::test]
async fn every_form_of_publish_is_answered_with_a_receipt() {
    let hub = Hub::start();
    let receipt = publish(&hub, "tasks", "m1").await;
    assert_eq!(receipt["id"], "m1");
    assert_eq!(receipt["outcome"], "delivered");
    assert_eq!(receipt["via"], "inmemory");
    assert!(receipt.get("position").is_some());

    let array = r#"[{"id":"a1"},{"nonsense":1},{"id":"a2"}]"#;
    let response = post(&hub, "tasks", ENVELOPE, array).await;
    assert_eq!(response.status(), StatusCode::OK);
    let answers: Value = response.json().await.unwrap();
    assert_eq!(answers[0]["id"], "a1");
    assert_eq!(answers[1]["error"]["code"], "MESSAGE_INVALID");
    assert_eq!(answers[2]["id"], "a2");
    assert_eq!(answers.as_array().unwrap().len(), 3);

    let event = r#"{"specversion":"1.0","id":"e1","source":"/s","type":"t","data":{"n":1}}"#;
    let response = post(
        &hub,
        "tasks",
        "application/cloudevents+json; charset=utf-8",
        event,
    )
    .await;
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "e1");
    let batch = format!("[{event},{}]", event.replace("e1", "e2"));
    let response = post(&hub, "tasks", "application/cloudevents-batch+json", batch).await;
    let answers: Value = response.json().await.unwrap();
    // The repeat of an id is answered with its first outcome.
    assert_eq!(answers[0]["id"], "e1");
    assert_eq!(answers[1]["id"], "e2");

    let response = Client::new()
        .post(hub.at("/v1/topics/tasks/messages"))
        .header("content-type", "text/plain")
        .header("Hub-Id", "raw1")
        .header("Hub-Type", "greeting")
        .header("Hub-Key", "k")
        .header("Hub-Priority", "high")
        .header("Hub-Header-X-Tenant", "acme")
        .body("plain text")
        .send()
        .await
        .unwrap();
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "raw1");
    let response = Client::new()
        .post(hub.at("/v1/topics/tasks/messages"))
        .header("content-type", "application/json")
        .header("ce-specversion", "1.0")
        .header("ce-id", "b1")
        .header("ce-source", "/a%20b")
        .header("ce-type", "t")
        .body("{}")
        .send()
        .await
        .unwrap();
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "b1");

    let mut got = std::collections::BTreeMap::new();
    while got.len() < 7 {
        for delivery in lease(&hub, "tasks", json!({"max": 10, "wait_ms": 5000})).await {
            assert_eq!(settle(&hub, &delivery, "ack", json!({})).await, 204);
            let message = delivery["message"].clone();
            got.insert(message["id"].as_str().unwrap().to_owned(), message);
        }
    }
    let raw = &got["raw1"];
    assert_eq!(raw["payload"], "cGxhaW4gdGV4dA==");
    assert_eq!(raw["content_type"], "text/plain");
    assert_eq!(raw["headers"]["x-tenant"], "acme");
    assert_eq!((&raw["key"], &raw["priority"]), (&json!("k"), &json!(8)));
    assert_eq!(
        (&raw["topic"], &raw["redelivered"]),
        (&json!("tasks"), &json!(false))
    );
    assert_eq!(got["e1"]["payload"], "eyJuIjoxfQ==");
    assert_eq!(got["b1"]["event"]["source"], "/a b");
}

#[tokio::test]
async fn ndjson_lines_are_answered_in_order_while_the_body_arrives() {
    let hub = Hub::start();
    let (lines, body) = mpsc::unbounded_channel::<Result<String, std::io::Error>>();
    let body = reqwest::Body::wrap_stream(UnboundedReceiverStream::new(body));
    let response = post(&hub, "tasks", "application/x-ndjson", body).await;
    assert_eq!(response.status(), StatusCode::OK);
    let mut answers = response.bytes_stream();
    let mut text = String::new();
    let mut next = async || {
        loop {
            if let Some((line, rest)) = text.split_once('\n') {
                let line: Value = serde_json::from_str(line).unwrap();
                text = rest.to_owned();
                return Some(line);
            }
            let piece = timeout(PATIENCE, answers.next())
                .await
                .expect("no answer in time")?;
            text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        }
    };
    // Each answer is awaited before the next line is sent.
    lines.send(Ok("{\"id\":\"n1\"}\r\n\n".into())).unwrap();
    let first = next().await.unwrap();
    assert_eq!((&first["line"], &first["id"]), (&json!(1), &json!("n1")));
    assert_eq!(first["outcome"], "delivered");
    lines.send(Ok("{\"id\":".into())).unwrap();
    lines.send(Ok("oops\n".into())).unwrap();
    let second = next().await.unwrap();
    assert_eq!(second["line"], 3);
    assert_eq!(second["error"]["code"], "MESSAGE_INVALID");
    assert_eq!(second["error"]["assume"], "rejected");
    // The last line needs no line feed.
    lines.send(Ok("{\"id\":\"n2\"}".into())).unwrap();
    drop(lines);
    let third = next().await.unwrap();
    assert_eq!((&third["line"], &third["id"]), (&json!(4), &json!("n2")));
    assert_eq!(next().await, None);
}

#[tokio::test]
async fn a_body_that_breaks_off_publishes_only_its_whole_lines() {
    let hub = Hub::start();
    let mut socket = TcpStream::connect(hub.address()).await.unwrap();
    let head = format!(
        "POST /v1/topics/tasks/messages HTTP/1.1\r\nHost: {}\r\nContent-Type: application/x-ndjson\r\nContent-Length: 1000\r\n\r\n{{\"id\":\"w1\"}}\n{{\"id\":\"w2\"}}",
        hub.address()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains("\"w1\"") {
        let mut buffer = [0; 1024];
        let n = timeout(PATIENCE, socket.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert!(n > 0, "{seen}");
        seen.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    drop(socket);
    let got = lease(&hub, "tasks", json!({"max": 10, "wait_ms": 2000})).await;
    let ids: Vec<_> = got.iter().map(|d| d["message"]["id"].clone()).collect();
    assert_eq!(ids, [json!("w1")]);
}

#[tokio::test]
async fn a_stream_is_live_when_its_headers_arrive_and_resumes_without_loss_or_repeat() {
    let hub = Hub::start();
    publish(&hub, "user.created", "before").await;
    let mut events = Events::open(&hub, &[("pattern", "user.created")], None).await;
    for id in ["s1", "s2"] {
        publish(&hub, "user.created", id).await;
    }
    let (_, first) = events.next().await.unwrap();
    assert_eq!(
        (&first["topic"], &first["redelivered"]),
        (&json!("user.created"), &json!(false))
    );
    let (cursor, _) = events.next().await.unwrap();
    drop(events);
    // While the client is away every partition gets something.
    let missed: Vec<String> = (0..12).map(|n| format!("m{n:02}")).collect();
    for id in &missed {
        publish(&hub, "user.created", id).await;
    }
    let mut events = Events::open(
        &hub,
        &[("pattern", "user.created"), ("from", "earliest")],
        Some(&cursor),
    )
    .await;
    let mut seen = events.ids(12).await;
    publish(&hub, "user.created", "tail").await;
    seen.extend(events.ids(1).await);
    let mut expected = missed;
    expected.push("tail".into());
    assert_eq!(sorted(seen), expected);
}

#[tokio::test]
async fn a_pattern_covers_topics_and_earliest_begins_at_the_oldest() {
    let hub = Hub::start();
    publish(&hub, "events.a", "1").await;
    publish(&hub, "events.b", "2").await;
    for pattern in ["events.**", "events.#"] {
        let mut events =
            Events::open(&hub, &[("pattern", pattern), ("from", "earliest")], None).await;
        assert_eq!(sorted(events.ids(2).await), ["1", "2"]);
    }
}

#[tokio::test]
async fn a_resumed_pattern_has_what_came_on_topics_that_were_new_meanwhile() {
    let hub = Hub::start();
    for id in ["old1", "old2"] {
        publish(&hub, "user.created", id).await;
    }
    let mut events = Events::open(&hub, &[("pattern", "user.*")], None).await;
    publish(&hub, "user.created", "u1").await;
    let (cursor, first) = events.next().await.unwrap();
    assert_eq!(first["id"], "u1");
    drop(events);
    publish(&hub, "user.created", "u2").await;
    publish(&hub, "user.deleted", "u3").await;
    let mut events = Events::open(&hub, &[("pattern", "user.*")], Some(&cursor)).await;
    assert_eq!(sorted(events.ids(2).await), ["u2", "u3"]);
}

#[tokio::test]
async fn a_group_goes_on_after_what_was_written_to_its_socket() {
    let hub = Hub::start();
    publish(&hub, "user.created", "g1").await;
    let query = [("pattern", "user.created"), ("group", "readers")];
    let mut events = Events::open(&hub, &query, None).await;
    assert_eq!(events.ids(1).await, ["g1"]);
    drop(events);
    // Until the hub has noticed, what is written to that socket is handled.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = reqwest::get(hub.at("/v1/metrics")).await.unwrap();
        let metrics: Value = answer.json().await.unwrap();
        if metrics["brokers"]["inmemory"]["active_subscriptions"] == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
    }
    publish(&hub, "user.created", "g2").await;
    let mut events = Events::open(&hub, &query, None).await;
    assert_eq!(events.ids(1).await, ["g2"]);
}

/// What was written to a socket may have been lost on the way: the client knows.
#[tokio::test]
async fn a_group_that_resumes_behind_what_it_was_given_gets_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start_with(&["--data", folder.path().to_str().unwrap()], &[]);
    for id in ["r1", "r2", "r3"] {
        let body = json!({"id": id, "key": "same"});
        let answer = post(&hub, "user.created", ENVELOPE, body.to_string()).await;
        assert_eq!(answer.status(), 200);
    }
    let query = [("pattern", "user.created"), ("group", "resumed")];
    let mut events = Events::open(&hub, &query, None).await;
    let (cursor, first) = events.next().await.unwrap();
    assert_eq!(first["id"], "r1");
    assert_eq!(events.ids(2).await, ["r2", "r3"]);
    drop(events);
    // Nothing is left for whoever asks for what was not given yet. The hub may not
    // have noticed that the first reader is gone: what is written to its socket is
    // handled, and never seen here.
    let mut events = Events::open(&hub, &query, None).await;
    let deadline = Instant::now() + PATIENCE;
    for n in 4.. {
        assert!(Instant::now() < deadline, "the second reader gets nothing");
        let id = format!("r{n}");
        publish(&hub, "user.created", &id).await;
        if let Ok(got) = timeout(Duration::from_secs(1), events.ids(1)).await {
            assert_eq!(got, [id]);
            break;
        }
    }
    drop(events);
    // The position moves once the hub has noticed that the last reader is gone.
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "nothing came again");
        let mut events = Events::open(&hub, &query, Some(&cursor)).await;
        if let Ok(again) = timeout(Duration::from_millis(500), events.ids(2)).await {
            assert_eq!(again, ["r2", "r3"]);
            break;
        }
    }
}

/// The hub may hear of a broken connection much later than its client, who asks again
/// at once: the stream that it lost ends, and its group goes back to the cursor.
#[tokio::test]
async fn a_client_that_resumes_ends_the_stream_that_it_lost() {
    let hub = Hub::start();
    for id in ["l1", "l2", "l3"] {
        let body = json!({"id": id, "key": "same"}).to_string();
        let answer = post(&hub, "user.created", ENVELOPE, body).await;
        assert_eq!(answer.status(), 200);
    }
    let query = [("pattern", "user.created"), ("group", "lost")];
    let mut lost = Events::open(&hub, &query, None).await;
    let (cursor, _) = lost.next().await.unwrap();
    assert_eq!(lost.ids(2).await, ["l2", "l3"]);
    // Its connection stands; nothing tells the hub that nobody reads it any more. Nor
    // does anybody read the next one.
    let mut also_lost = Events::open(&hub, &query, Some(&cursor)).await;
    assert!(lost.next().await.is_none(), "the lost stream goes on");
    assert_eq!(also_lost.ids(2).await, ["l2", "l3"]);
    let mut events = Events::open(&hub, &query, Some(&cursor)).await;
    assert!(also_lost.next().await.is_none(), "the next one goes on");
    assert_eq!(events.ids(2).await, ["l2", "l3"]);
    publish(&hub, "user.created", "l4").await;
    assert_eq!(events.ids(1).await, ["l4"]);
}

#[tokio::test]
async fn with_ack_cursor_only_what_the_client_commits_is_done() {
    let hub = Hub::start();
    for id in ["c1", "c2", "c3"] {
        let body = json!({"id": id, "key": "same"});
        assert_eq!(
            post(&hub, "user.created", ENVELOPE, body.to_string())
                .await
                .status(),
            200
        );
    }
    let query = [
        ("pattern", "user.created"),
        ("group", "g"),
        ("ack", "cursor"),
    ];
    let mut events = Events::open(&hub, &query, None).await;
    let (cursor, first) = events.next().await.unwrap();
    assert_eq!(first["id"], "c1");
    assert_eq!(events.ids(2).await, ["c2", "c3"]);
    let commit = json!({"group": "g", "cursor": cursor});
    let wrong = json!({"group": "other", "cursor": cursor});
    assert_eq!(call(&hub, "/v1/stream/commit", wrong).await.0, 400);
    assert_eq!(call(&hub, "/v1/stream/commit", commit.clone()).await.0, 204);
    drop(events);
    let mut events = Events::open(&hub, &query, None).await;
    let (cursor, second) = events.next().await.unwrap();
    assert_eq!(second["id"], "c2");
    drop(events);
    // Also when the stream has ended.
    let late = json!({"group": "g", "cursor": cursor});
    assert_eq!(call(&hub, "/v1/stream/commit", late).await.0, 204);
    let mut events = Events::open(&hub, &query, None).await;
    assert_eq!(events.ids(1).await, ["c3"]);
}

#[tokio::test]
async fn a_lease_ends_by_ack_nack_or_time() {
    let hub = Hub::start();
    publish(&hub, "tasks", "t1").await;
    let first = lease(&hub, "tasks", json!({"max": 5, "wait_ms": 5000})).await;
    assert_eq!(first.len(), 1);
    assert!(first[0]["expires_at"].is_string());
    assert!(
        lease(&hub, "tasks", json!({})).await.is_empty(),
        "leased to one only"
    );
    assert_eq!(
        settle(&hub, &first[0], "nack", json!({"retry": "now"})).await,
        204
    );
    assert_eq!(settle(&hub, &first[0], "ack", json!({})).await, 410);

    let again = lease(&hub, "tasks", json!({"wait_ms": 5000, "lease_ms": 400})).await;
    assert_eq!(again[0]["message"]["id"], "t1");
    assert_eq!(again[0]["message"]["redelivered"], true);
    // It expires and comes back by itself.
    let third = lease(&hub, "tasks", json!({"wait_ms": 10000, "lease_ms": 60000})).await;
    assert_eq!(third[0]["message"]["id"], "t1");
    assert_eq!(settle(&hub, &again[0], "ack", json!({})).await, 410);
    assert_eq!(settle(&hub, &again[0], "extend", json!({})).await, 410);
    assert_eq!(
        settle(&hub, &third[0], "extend", json!({"lease_ms": 60000})).await,
        204
    );
    assert_eq!(settle(&hub, &third[0], "ack", json!({})).await, 204);
    assert_eq!(settle(&hub, &third[0], "ack", json!({})).await, 410);
    assert!(lease(&hub, "tasks", json!({})).await.is_empty());
}

#[tokio::test]
async fn many_leases_are_acked_at_once_and_the_gone_ones_are_named() {
    let hub = Hub::start();
    for id in ["x1", "x2", "x3"] {
        publish(&hub, "tasks", id).await;
    }
    let mut tokens = Vec::new();
    while tokens.len() < 3 {
        for d in lease(&hub, "tasks", json!({"max": 3, "wait_ms": 5000})).await {
            tokens.push(d["token"].clone());
        }
    }
    let (status, _) = call(&hub, "/v1/deliveries/ack", json!({"tokens": &tokens[..2]})).await;
    assert_eq!(status, 204);
    let (status, problem) = call(&hub, "/v1/deliveries/ack", json!({"tokens": tokens})).await;
    assert_eq!(status, 410);
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains(tokens[0].as_str().unwrap()), "{detail}");
    assert!(!detail.contains(tokens[2].as_str().unwrap()), "{detail}");
}

#[tokio::test]
async fn refusals_are_problems_with_a_fitting_status() {
    let hub = Hub::start_with(&[], &[("MESSAGING_MAX_MESSAGE_BYTES", "1000")]);
    let client = Client::new();
    let problem = async |request: reqwest::RequestBuilder| {
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        let problem: Value = response.json().await.unwrap();
        assert_eq!(problem["status"], status);
        for field in ["type", "title", "detail", "code", "retryable", "assume"] {
            assert!(
                problem.get(field).is_some(),
                "{field} is missing: {problem}"
            );
        }
        (status, problem["code"].as_str().unwrap().to_owned())
    };
    let to = |path: &str| client.post(hub.at(path));
    let envelope = |body: &str| {
        to("/v1/topics/tasks/messages")
            .header("content-type", ENVELOPE)
            .body(body.to_owned())
    };
    for (request, status, code) in [
        (client.get(hub.at("/nothing")), 404, "NOT_FOUND"),
        (
            client.delete(hub.at("/v1/state")),
            405,
            "METHOD_NOT_ALLOWED",
        ),
        (client.get(hub.at("/v1/stream")), 400, "INVALID_REQUEST"),
        (
            client.get(hub.at("/v1/stream?pattern=tasks")),
            409,
            "WORK_QUEUE",
        ),
        (
            client.get(hub.at("/v1/stream?pattern=a..b*")),
            400,
            "INVALID_CONFIG",
        ),
        (
            client.get(hub.at("/v1/stream?pattern=a&from=soon")),
            400,
            "INVALID_CONFIG",
        ),
        (
            client.get(hub.at("/v1/stream?pattern=a&ack=cursor")),
            400,
            "INVALID_CONFIG",
        ),
        (
            to("/v1/topics/b%20d/messages").body("x"),
            400,
            "MESSAGE_INVALID",
        ),
        (
            to("/v1/topics/tasks/messages").body(vec![0; 1001]),
            413,
            "MESSAGE_TOO_LARGE",
        ),
        (
            to("/v1/topics/tasks/messages").header("Hub-Prio", "1"),
            400,
            "MESSAGE_INVALID",
        ),
        (envelope("{"), 400, "MESSAGE_INVALID"),
        (
            envelope(r#"{"headers":{"hub-x":"1"}}"#),
            400,
            "MESSAGE_INVALID",
        ),
        (
            envelope("{}").header("content-encoding", "gzip"),
            415,
            "UNSUPPORTED_ENCODING",
        ),
        (to("/v1/queues/tasks.nowhere/lease"), 404, "QUEUE_NOT_FOUND"),
        (to("/v1/queues/user.created/lease"), 404, "QUEUE_NOT_FOUND"),
        (
            to("/v1/queues/tasks/lease").body(r#"{"mx":1}"#),
            400,
            "INVALID_CONFIG",
        ),
        (to("/v1/deliveries/nobody/ack"), 410, "LEASE_EXPIRED"),
        (
            client
                .get(hub.at("/v1/state"))
                .header("host", "evil.example"),
            403,
            "FORBIDDEN",
        ),
        (
            client
                .get(hub.at("/v1/state"))
                .header("origin", "https://evil.example"),
            403,
            "FORBIDDEN",
        ),
    ] {
        let text = format!("{request:?}");
        assert_eq!(problem(request).await, (status, code.to_owned()), "{text}");
    }
    let local = client
        .get(hub.at("/v1/state"))
        .header("origin", "http://localhost:3000");
    assert_eq!(local.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn the_state_and_the_metrics_say_what_stands_there() {
    let hub = Hub::start();
    let get = async |path: &str| Client::new().get(hub.at(path)).send().await.unwrap();
    let state: Value = get("/v1/state").await.json().await.unwrap();
    assert!(state["routes"].as_array().unwrap().iter().all(|r| {
        r["primary"] == "inmemory" && r["state"] == "primary" && r["spool"]["messages"] == 0
    }));
    assert!(!state["weakened"].as_array().unwrap().is_empty());
    let ready: Value = get("/ready").await.json().await.unwrap();
    assert_eq!(ready, json!({"status": "ready", "state": "primary"}));
    assert_eq!(get("/healthz").await.status(), 200);
    let openapi: Value = get("/openapi.json").await.json().await.unwrap();
    assert!(openapi["paths"]["/v1/topics/{topic}/messages"]["post"].is_object());
    assert!(
        get("/")
            .await
            .text()
            .await
            .unwrap()
            .contains("<title>messaging-hub")
    );
    for id in ["p1", "p2", "p1"] {
        publish(&hub, "tasks", id).await;
    }
    let metrics = get("/metrics").await.text().await.unwrap();
    let has = |line: &str| assert!(metrics.lines().any(|l| l == line), "{line} in {metrics}");
    has("messaging_messages_published_total 2");
    has("# TYPE messaging_delivery_latency_seconds histogram");
    has("messaging_route_state{route=\"tasks.#\",state=\"primary\"} 1");
    let metrics: Value = get("/v1/metrics").await.json().await.unwrap();
    assert_eq!(metrics["hub"]["publish_successes"], 2);
}

#[tokio::test]
async fn a_signal_ends_streams_and_waits_gives_leases_back_and_exits_with_0() {
    let mut hub = Hub::start();
    let mut events = Events::open(&hub, &[("pattern", "user.created")], None).await;
    publish(&hub, "tasks", "held").await;
    assert_eq!(
        lease(&hub, "tasks", json!({"wait_ms": 5000})).await.len(),
        1
    );
    let waiting = tokio::spawn(
        Client::new()
            .post(hub.at("/v1/queues/helixagent.tasks.llm/lease"))
            .body(r#"{"wait_ms":60000}"#)
            .send(),
    );
    hub.signal("TERM");
    assert!(events.next().await.is_none(), "the stream ends");
    if let Ok(Ok(response)) = timeout(PATIENCE, waiting).await.unwrap() {
        let answer: Value = response.json().await.unwrap();
        assert!(answer.get("deliveries").is_some() || answer["code"] == "BROKER_UNAVAILABLE");
    }
    let (status, err) = hub.ended();
    assert_eq!(status.code(), Some(0), "{err}");
    assert!(err.contains("stopped"), "{err}");
}

#[tokio::test]
async fn during_the_grace_period_nothing_new_is_taken_and_a_second_signal_ends_at_once() {
    let mut hub = Hub::start();
    // A running request: its body is not finished.
    let (lines, body) = mpsc::unbounded_channel::<Result<String, std::io::Error>>();
    let body = reqwest::Body::wrap_stream(UnboundedReceiverStream::new(body));
    lines.send(Ok("{\"id\":\"r1\"}\n".into())).unwrap();
    let response = post(&hub, "tasks", "application/x-ndjson", body).await;
    // And one that holds the shutdown up: a body that never comes.
    let mut stuck = TcpStream::connect(hub.address()).await.unwrap();
    let head = format!(
        "POST /v1/topics/tasks/messages HTTP/1.1\r\nHost: {}\r\nContent-Length: 10\r\n\r\nabc",
        hub.address()
    );
    stuck.write_all(head.as_bytes()).await.unwrap();
    // Once this answer is there, both requests are inside.
    publish(&hub, "tasks", "r2").await;
    hub.signal("TERM");
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let ready = Client::new().get(hub.at("/ready")).send().await.unwrap();
        if ready.status() == 503 {
            assert_eq!(ready.json::<Value>().await.unwrap()["status"], "not_ready");
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "it never stopped being ready"
        );
    }
    let refused = post(&hub, "tasks", ENVELOPE, r#"{"id":"late"}"#).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(
        (&problem["assume"], &problem["retryable"]),
        (&json!("not_sent"), &json!(true))
    );
    // The running request got its answers and is told where it was cut.
    let text = timeout(PATIENCE, response.text()).await.unwrap().unwrap();
    assert!(
        text.contains("\"r1\"") && text.contains("shutting down"),
        "{text}"
    );
    hub.signal("TERM");
    let (status, err) = hub.ended();
    assert_eq!(status.code(), Some(1), "{err}");
}

#[tokio::test]
async fn an_open_address_needs_a_token_and_then_every_request_does() {
    let refused = run(&["serve", "--http", "0.0.0.0:0"]);
    assert_eq!(refused.status.code(), Some(1));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("token"), "{why}");

    let hub = Hub::start_with(&[], &[("MESSAGING_HTTP_TOKEN", "s3cret")]);
    assert!(!hub.report.contains("s3cret"));
    let get = |path: &str| Client::new().get(hub.at(path));
    assert_eq!(get("/v1/state").send().await.unwrap().status(), 401);
    assert_eq!(
        get("/v1/state")
            .bearer_auth("wrong!")
            .send()
            .await
            .unwrap()
            .status(),
        401
    );
    assert_eq!(
        get("/v1/state")
            .bearer_auth("s3cret")
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    assert_eq!(get("/healthz").send().await.unwrap().status(), 200);
    let by_name = get("/v1/state")
        .bearer_auth("s3cret")
        .header("host", "hub.example");
    assert_eq!(by_name.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_taken_port_is_said_and_ends_with_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let out = run(&["serve", "--http", &address]);
    assert_eq!(out.status.code(), Some(1));
    let why = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(why.contains(&address) && why.contains("taken"), "{why}");
}

#[tokio::test]
async fn one_request_and_one_named_publisher_keep_their_order() {
    let hub = Hub::start();
    let many: String = (0..300)
        .map(|n| format!("{{\"id\":\"o{n:03}\"}}\n"))
        .collect();
    let answers = post(&hub, "user.created", "application/x-ndjson", many).await;
    assert_eq!(answers.text().await.unwrap().lines().count(), 300);
    for n in 300..320 {
        let response = Client::new()
            .post(hub.at("/v1/topics/user.created/messages"))
            .header("Hub-Publisher", "p")
            .header("Hub-Id", format!("o{n:03}"))
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
    }
    let query = [("pattern", "user.created"), ("from", "earliest")];
    let mut events = Events::open(&hub, &query, None).await;
    let ids = events.ids(320).await;
    let of = |range: std::ops::Range<usize>| -> Vec<String> {
        let names: Vec<String> = range.map(|n| format!("o{n:03}")).collect();
        ids.iter()
            .filter(|id| names.contains(id))
            .cloned()
            .collect()
    };
    for range in [0..300, 300..320] {
        let got = of(range.clone());
        assert_eq!(got, sorted(got.clone()));
        assert_eq!(got.len(), range.len());
    }
}

#[tokio::test]
async fn a_nack_later_rests_a_never_goes_to_the_dead_letters() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hub.yaml");
    std::fs::write(&file, "hub:\n  retry:\n    task_delay: 300ms\n").unwrap();
    let hub = Hub::start_with(&["--config", file.to_str().unwrap()], &[]);
    let queue = "helixagent.tasks.llm";
    publish(&hub, "llm", "n1").await;
    let first = lease(&hub, queue, json!({"wait_ms": 5000})).await;
    let later = json!({"retry": "later", "reason": "busy"});
    assert_eq!(settle(&hub, &first[0], "nack", later).await, 204);
    let second = lease(&hub, queue, json!({"wait_ms": 10000})).await;
    assert_eq!(second[0]["message"]["id"], "n1");
    assert_eq!(second[0]["message"]["retry_count"], 1);
    let never = json!({"retry": "never", "reason": "hopeless"});
    assert_eq!(settle(&hub, &second[0], "nack", never).await, 204);
    let found = reqwest::get(hub.at("/v1/dead-letters?reason=hopeless"))
        .await
        .unwrap();
    let found: Value = found.json().await.unwrap();
    assert_eq!(found["letters"][0]["message_id"], "n1", "{found}");
    let dead = lease(&hub, "helixagent.dlq", json!({"wait_ms": 5000})).await;
    assert_eq!(dead[0]["message"]["id"], "n1");
    assert!(lease(&hub, queue, json!({})).await.is_empty());
    // There it stays, also when it is refused once more.
    let never = json!({"retry": "never"});
    assert_eq!(settle(&hub, &dead[0], "nack", never).await, 204);
    let again = lease(&hub, "helixagent.dlq", json!({"wait_ms": 5000})).await;
    assert_eq!(again[0]["message"]["id"], "n1");
}

#[tokio::test]
async fn what_is_no_envelope_or_would_arrive_as_something_else_is_refused() {
    let hub = Hub::start_with(&[], &[]);
    for (body, word) in [
        ("[[]]", "object"),
        (r#"{"headers":{"Content-Type":"x"}}"#, "content_type"),
    ] {
        let response = post(&hub, "tasks", ENVELOPE, body).await;
        let text = response.text().await.unwrap();
        assert!(text.contains("MESSAGE_INVALID"), "{body}: {text}");
        assert!(text.contains(word), "{body}: {text}");
    }
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn while_the_broker_is_away_publishes_are_spooled_and_what_is_left_ends_it_with_1() {
    let mut hub = Hub::start_with(
        &[],
        &[
            ("RABBITMQ_URL", "amqp://127.0.0.1:1"),
            ("MESSAGING_SHUTDOWN_GRACE", "2s"),
        ],
    );
    let ready = Client::new().get(hub.at("/ready")).send().await.unwrap();
    assert_eq!(ready.status(), 200);
    assert_eq!(ready.json::<Value>().await.unwrap()["state"], "degraded");
    let response = post(&hub, "tasks", ENVELOPE, r#"{"id":"s1"}"#).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let receipt: Value = response.json().await.unwrap();
    assert_eq!(
        receipt,
        json!({"id": "s1", "outcome": "spooled", "durable": false})
    );
    let array = post(&hub, "tasks", ENVELOPE, r#"[{"id":"s2"},{"id":"s3"}]"#).await;
    assert_eq!(array.status(), StatusCode::ACCEPTED);
    let state: Value = Client::new()
        .get(hub.at("/v1/state"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let spooled: u64 = state["routes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|r| r["spool"]["messages"].as_u64())
        .sum();
    assert_eq!(spooled, 3);
    hub.signal("TERM");
    let (status, err) = hub.ended();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("3 accepted messages"), "{err}");
}

#[tokio::test]
async fn a_pattern_over_work_queues_is_leased_from_all_of_them() {
    let hub = Hub::start();
    for (topic, id) in [("tasks.p.a", "a"), ("tasks.p.b", "b"), ("tasks.q", "q")] {
        publish(&hub, topic, id).await;
    }
    let mut ids = Vec::new();
    while ids.len() < 2 {
        for given in lease(&hub, "tasks.p.*", json!({"max": 5, "wait_ms": 20_000})).await {
            ids.push(given["message"]["id"].as_str().unwrap().to_owned());
            let done = settle(&hub, &given, "ack", json!({})).await;
            assert_eq!(done, StatusCode::NO_CONTENT);
        }
    }
    ids.sort();
    assert_eq!(ids, ["a", "b"]);
    let rest = lease(&hub, "tasks.p.%23", json!({"wait_ms": 0})).await;
    assert!(rest.is_empty(), "{rest:?}");
}

#[tokio::test]
async fn a_new_topic_is_a_queue_or_a_stream_as_its_route_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hub.yaml");
    let routes = "hub:
  routes:
    - {pattern: 'orders.#', kind: task}
    - {pattern: 'tasks.audit.#', kind: event}
";
    std::fs::write(&path, routes).unwrap();
    let hub = Hub::start_with(&["--config", path.to_str().unwrap()], &[]);
    publish(&hub, "orders.new", "o1").await;
    let given = lease(&hub, "orders.new", json!({"wait_ms": 5000})).await;
    assert_eq!(given[0]["message"]["id"], "o1");
    // Of the routes that are always there, `task.*.#` does not cover the last.
    for topic in ["tasks.audit.x", "task"] {
        publish(&hub, topic, "e1").await;
        let query = [("pattern", topic), ("from", "earliest")];
        let mut events = Events::open(&hub, &query, None).await;
        assert_eq!(events.ids(1).await, ["e1"], "{topic}");
    }
}

/// Whoever started it may have given it a pipe and forgotten about it: a pipe
/// holds 64 KiB, and a hub that waited for its reader would stand still.
#[tokio::test]
async fn a_log_that_nobody_reads_stops_nothing() {
    const WORDS: usize = 1_000;
    let mut hub = Hub::start_with(&[], &[("RUST_LOG", "warn")]);
    let client = Client::new();
    let say = async |what: &str| {
        let asked = client
            .post(hub.at(&format!("/v1/spool/{what}")))
            .json(&json!({}));
        let answer = timeout(PATIENCE, asked.send()).await.expect("it answers");
        assert_eq!(answer.unwrap().status(), StatusCode::OK);
    };
    // Each is a line of the log, of a hundred bytes and more.
    for _ in 0..WORDS {
        say("pause").await;
        say("resume").await;
    }
    let well = client.get(hub.at("/healthz")).send().await.unwrap();
    assert_eq!(well.status(), StatusCode::OK);
    hub.signal("TERM");
    let (status, said) = hub.ended();
    assert!(status.success(), "{status}");
    // Full, but for the line that had no room.
    let kept = said.len();
    assert!(kept > 63 * 1024, "{kept} bytes did not fill the pipe");
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn operators_see_the_spool_pause_it_and_export_what_can_be_published_again() {
    let mut hub = Hub::start_with(
        &[],
        &[
            ("RABBITMQ_URL", "amqp://127.0.0.1:1"),
            ("MESSAGING_SHUTDOWN_GRACE", "2s"),
            ("MESSAGING_SPOOL_DRAIN_RATE", "70"),
        ],
    );
    let get = async |path: &str| {
        let response = Client::new().get(hub.at(path)).send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (
            status,
            serde_json::from_str::<Value>(&text).unwrap_or_default(),
        )
    };
    let envelopes =
        r#"[{"id":"s1","key":"k","type":"greet","payload":"aGk="},{"id":"s2"},{"id":"s3"}]"#;
    let array = post(&hub, "tasks", ENVELOPE, envelopes).await;
    assert_eq!(array.status(), StatusCode::ACCEPTED);

    let (status, list) = get("/v1/spool?topic=tasks.%23").await;
    assert_eq!(status, StatusCode::OK, "{list}");
    assert_eq!(list["total"]["messages"], 3);
    let lane = &list["lanes"][0];
    for (field, value) in [
        ("topic", json!("tasks")),
        ("state", json!("degraded")),
        ("messages", json!(3)),
        ("ready", json!(3)),
        ("in_doubt", json!(0)),
        ("durable", json!(false)),
        ("paused", json!(false)),
        ("forced", json!(false)),
    ] {
        assert_eq!(lane[field], value, "{field} of {lane}");
    }
    assert_eq!(lane["drain"]["limit"], 70);
    assert!(lane["why"].is_string(), "{lane}");
    let route = lane["route"].as_str().unwrap();
    let by_route = format!("/v1/spool?route={}", route.replace('#', "%23"));
    assert_eq!(get(&by_route).await.1["total"]["lanes"], 1);
    assert_eq!(get("/v1/spool?topic=other").await.1["total"]["lanes"], 0);

    // A page at a time, in publish order.
    let (_, first) = get("/v1/spool?entries=1&limit=2").await;
    assert_eq!(first["messages"][0]["id"], "s1");
    assert_eq!(first["messages"][0]["key"], "k");
    assert_eq!(first["messages"][0]["type"], "greet");
    assert_eq!(first["messages"][0]["status"], "ready");
    assert!(first["messages"][0].get("payload").is_none());
    let cursor = first["next"].as_str().unwrap();
    let (_, second) = get(&format!("/v1/spool?entries=1&cursor={cursor}")).await;
    assert_eq!(second["messages"][0]["id"], "s3");
    assert_eq!(second["messages"].as_array().unwrap().len(), 1);
    assert!(second.get("next").is_none(), "{second}");

    // A word holds for lanes that come later, too.
    let (status, said) = call(&hub, "/v1/spool/pause", json!({"pattern": "tasks.#"})).await;
    assert_eq!(status, StatusCode::OK, "{said}");
    assert_eq!(
        said,
        json!({"pattern": "tasks.#", "lanes": 1, "pending": 0})
    );
    let later = post(&hub, "tasks.later", ENVELOPE, r#"{"id":"l1"}"#).await;
    assert_eq!(later.status(), StatusCode::ACCEPTED);
    let (_, list) = get("/v1/spool").await;
    let paused = |list: &Value| {
        let lanes = list["lanes"].as_array().unwrap().clone();
        lanes.iter().filter(|l| l["paused"] == true).count()
    };
    assert_eq!(paused(&list), 2, "{list}");
    let (_, state) = get("/v1/state").await;
    let routes = state["routes"].as_array().unwrap();
    let of = |pattern: &str| routes.iter().find(|r| r["pattern"] == pattern).unwrap();
    assert_eq!(of("tasks.#")["paused"], true);
    assert_eq!(of("helixagent.tasks.#")["paused"], false);
    let rate = json!({"pattern": "tasks", "rate": "unlimited"});
    assert_eq!(call(&hub, "/v1/spool/resume", rate).await.0, 200);
    let (_, list) = get("/v1/spool?topic=tasks").await;
    assert_eq!(paused(&list), 0, "{list}");
    assert_eq!(list["lanes"][0]["drain"]["limit"], 0);
    let forced = call(&hub, "/v1/spool/pause", json!({"degrade": true})).await;
    assert_eq!(forced.1["lanes"], 2, "{}", forced.1);
    let (_, list) = get("/v1/spool?topic=tasks").await;
    assert_eq!(list["lanes"][0]["forced"], true);

    // What is exported can be published elsewhere as it stands.
    let export = Client::new()
        .get(hub.at("/v1/spool/export?pattern=tasks"))
        .send()
        .await
        .unwrap();
    assert_eq!(export.headers()["content-type"], "application/x-ndjson");
    let lines = export.text().await.unwrap();
    let exported: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(exported.len(), 3);
    assert_eq!(exported[0]["topic"], "tasks");
    assert_eq!(exported[0]["payload"], "aGk=");
    assert_eq!(exported[0]["spool"]["possible_duplicate"], false);
    let other = Hub::start();
    let again = post(&other, "tasks", "application/x-ndjson", lines).await;
    let answers = again.text().await.unwrap();
    assert_eq!(answers.matches("\"delivered\"").count(), 3, "{answers}");

    hub.signal("TERM");
    let (status, err) = hub.ended();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("4 accepted messages"), "{err}");
}

#[tokio::test]
async fn wrong_words_about_the_spool_are_problems() {
    let hub = Hub::start();
    for query in [
        "limit=0",
        "limit=10001",
        "entries=1&limit=1001",
        "entries=perhaps",
        "cursor=e30",
        "entries=1&cursor=e30",
        "topic=a%20b",
        "nonsense=1",
    ] {
        let response = Client::new()
            .get(hub.at(&format!("/v1/spool?{query}")))
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{query}");
    }
    for (what, body) in [
        ("resume", json!({"rate": -1})),
        ("resume", json!({"rate": "fast"})),
        ("resume", json!({"rate": 4_294_967_296_u64})),
        ("pause", json!({"pattern": "a b"})),
        ("pause", json!({"patern": "a"})),
        // Without a broker nothing is ever spooled.
        ("pause", json!({"degrade": true})),
    ] {
        let (status, problem) = call(&hub, &format!("/v1/spool/{what}"), body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(problem["code"], "INVALID_CONFIG", "{body}: {problem}");
    }
}

#[cfg(all(feature = "rabbitmq", feature = "journal"))]
#[tokio::test]
async fn a_spool_that_is_mostly_on_the_disk_is_listed_and_exported_whole_and_in_order() {
    // More than a lane keeps in memory.
    const MESSAGES: usize = 6_000;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let hub = Hub::start_with(&["--data", data], &[("RABBITMQ_URL", "amqp://127.0.0.1:1")]);
    let expected: Vec<String> = (0..MESSAGES).map(|n| format!("d{n}")).collect();
    let lines: String = expected
        .iter()
        .map(|id| format!("{{\"id\":\"{id}\",\"key\":\"k\"}}\n"))
        .collect();
    let answers = post(&hub, "tasks", "application/x-ndjson", lines).await;
    let answers = answers.text().await.unwrap();
    assert_eq!(answers.matches("\"durable\":true").count(), MESSAGES);

    let mut listed = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/v1/spool?entries=1&limit=1000{cursor}");
        let page: Value = Client::new()
            .get(hub.at(&path))
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        for message in page["messages"].as_array().unwrap() {
            assert_eq!(message["status"], "ready", "{message}");
            listed.push(message["id"].as_str().unwrap().to_owned());
        }
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert!(listed == expected, "{} were listed", listed.len());
    let export = Client::new()
        .get(hub.at("/v1/spool/export"))
        .send()
        .await
        .unwrap();
    let exported: Vec<String> = export
        .text()
        .await
        .unwrap()
        .lines()
        .map(|l| {
            serde_json::from_str::<Value>(l).unwrap()["id"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert!(exported == expected, "{} were exported", exported.len());
}
