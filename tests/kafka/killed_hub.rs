//! Batches as one through the binary: a hub that is killed while it writes them, and
//! how HTTP and the command line answer.

use std::{collections::BTreeMap, io::Write as _, process::Stdio};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use messaging_hub::MessageBroker;
use serde_json::{Value, json};

use crate::{
    common::*,
    foreign::{Ends, committed, committed_n, written},
    process::Hub,
    support::{Kafka, need, shared_kafka, unique},
};

fn start(node: &Kafka, id: &str) -> Hub {
    Hub::start_with(
        &[],
        &[
            ("KAFKA_BROKERS", node.bootstrap()),
            ("KAFKA_TRANSACTIONAL_ID", id),
            ("MESSAGING_TOPOLOGY_MODE", "ignore"),
        ],
    )
}

/// Messages that compression makes no smaller, so that writing them takes a while.
fn envelopes(round: usize, n: usize) -> Value {
    let one = |i: usize| {
        let mut body = format!("{round}/{i}/").into_bytes();
        body.extend((0..1_800).map(|_| fastrand::u8(..)));
        json!({"type": "t", "key": format!("k{}", i % 20), "payload": BASE64_STANDARD.encode(body)})
    };
    (0..n).map(one).collect()
}

async fn post(hub: &Hub, topic: &str, query: &str, body: &Value) -> (u16, Value) {
    let answer = reqwest::Client::new()
        .post(hub.at(&format!("/v1/topics/{topic}/messages{query}")))
        .header("content-type", "application/vnd.messaging-hub+json")
        .body(body.to_string())
        .send()
        .await
        .unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_is_killed_in_the_middle_of_a_batch_leaves_all_of_it_or_nothing() {
    const BATCH: usize = 10_000;
    const ROUNDS: usize = 5;
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "tx-killed", 3).await;
    let id = unique("killed");
    let ends = Ends::new(node.bootstrap(), &topic);
    for round in 0..ROUNDS {
        let mut hub = start(&node, &id);
        // The id is this process's, and everything is warm.
        let (status, answer) =
            post(&hub, &topic, "?atomic=true", &envelopes(100 + round, 10)).await;
        assert_eq!(status, 200, "{answer}");
        let body = envelopes(round, BATCH);
        let before = ends.of(0);
        let url = hub.at(&format!("/v1/topics/{topic}/messages?atomic=true"));
        let publishing = tokio::spawn(async move {
            let request = reqwest::Client::new().post(url);
            let request = request.header("content-type", "application/vnd.messaging-hub+json");
            request.body(body.to_string()).send().await.is_ok()
        });
        // A little later each time, when so much of it is written.
        while ends.of(0) < before + 1 + 500 * round as i64 && !publishing.is_finished() {
            tokio::task::yield_now().await;
        }
        hub.signal("KILL");
        hub.ended();
        let answered = publishing.await.unwrap();
        eprintln!("round {round}: answered {answered}");
    }
    // The next of the id ends what is open, long before its time-out.
    let began = std::time::Instant::now();
    let hub = start(&node, &id);
    let (status, answer) = post(&hub, &topic, "?atomic=true", &envelopes(99, 10)).await;
    assert_eq!(status, 200, "{answer}");
    assert!(began.elapsed() < WAIT, "{:?}", began.elapsed());
    let seen = committed(node.bootstrap(), &[&topic]).await;
    let by_round = |seen: &[crate::foreign::Seen]| {
        let mut rounds: BTreeMap<usize, usize> = BTreeMap::new();
        for s in seen {
            let round = s.body.split('/').next().unwrap().parse().unwrap();
            *rounds.entry(round).or_default() += 1;
        }
        rounds
    };
    let (rounds, all) = (
        by_round(&seen),
        by_round(&written(node.bootstrap(), &[&topic]).await),
    );
    eprintln!("seen {rounds:?}, written {all:?}");
    for (round, count) in &rounds {
        assert_eq!(
            *count,
            if *round < ROUNDS { BATCH } else { 10 },
            "round {round}"
        );
    }
    assert_eq!(rounds[&99], 10);
    let cut = (0..ROUNDS).filter(|r| all.contains_key(r) && !rounds.contains_key(r));
    assert!(cut.count() > 0, "no kill came while a transaction was open");
    drop(hub);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_and_on_the_command_line_an_array_is_published_as_one() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let topic = topic(&broker, "tx-http", 2).await;
    let hub = start(&node, &unique("http"));
    let (status, answer) = post(&hub, &topic, "?atomic=true", &envelopes(0, 50)).await;
    assert_eq!(status, 200, "{answer}");
    let receipts = answer.as_array().unwrap();
    assert_eq!(receipts.len(), 50);
    for receipt in receipts {
        assert_eq!(receipt["outcome"], "delivered");
        assert!(receipt["position"]["offset"].is_u64(), "{receipt}");
    }
    // One that is wrong is the answer for all.
    for wrong in [
        json!({"paylod": ""}),
        json!({"id": "w", "headers": {"hub-id": "x"}}),
    ] {
        let mut body = envelopes(1, 20);
        body.as_array_mut().unwrap().push(wrong);
        let (status, answer) = post(&hub, &topic, "?atomic=true", &body).await;
        assert_eq!((status, &answer["code"]), (400, &json!("MESSAGE_INVALID")));
        assert_eq!(answer["assume"], "rejected");
    }
    for (query, body) in [
        ("?atomic=true", json!({"payload": ""})),
        ("?atomic=yes", json!([])),
        ("?atomc=true", json!([])),
    ] {
        let (status, answer) = post(&hub, &topic, query, &body).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!("INVALID_CONFIG")),
            "{query}"
        );
    }
    // A work queue of the embedded broker has no transactions.
    let (status, answer) = post(&hub, "helixagent.tasks.llm", "?atomic=true", &json!([{}])).await;
    assert_eq!(
        (status, &answer["code"]),
        (400, &json!("INVALID_CONFIG")),
        "{answer}"
    );

    let publish = |input: &'static str| {
        let mut child = hub
            .command(&["publish", &topic, "--atomic", "--json"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap()
    };
    let done = publish("{\"type\":\"a\"}\n\n{\"type\":\"b\"}\n");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let answer: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(answer.as_array().unwrap().len(), 2);
    let failed = publish("[{\"type\":\"c\"},{\"priority\":11}]");
    assert_eq!(failed.status.code(), Some(1));
    let seen = committed_n(node.bootstrap(), &[&topic], 52).await;
    assert_eq!(seen.len(), 52);
    broker.close().await.unwrap();
}
