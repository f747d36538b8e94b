//! Over the embedded broker.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use messaging_hub::{
    ErrorCode, HandlerError, Message, MessagingSystem, SubscribeOptions, Task, Timestamp,
    broker::{Received, StartFrom, TopicOptions},
    config::MessagingConfig,
    hub::MessagingHub,
    replay::{ReplayRequest, ReplayStatus},
};

use crate::support::{unique, wait};

const SOON: Duration = Duration::from_secs(20);

async fn started() -> (MessagingSystem, MessagingHub) {
    let system = MessagingSystem::start(MessagingConfig::builtin())
        .await
        .unwrap();
    let hub = system.hub();
    (system, hub)
}

async fn stream(hub: &MessagingHub, name: &str, partitions: i32) {
    let options = TopicOptions {
        partitions,
        ..TopicOptions::default()
    };
    hub.create_topic(name, &options).await.unwrap();
}

fn request(json: serde_json::Value) -> ReplayRequest {
    serde_json::from_value(json).unwrap()
}

async fn replayed(hub: &MessagingHub, json: serde_json::Value) -> messaging_hub::replay::Replay {
    let replay = hub.start_replay(request(json)).await.unwrap();
    wait::within(SOON, "the replay is over", hub.replay_ended(&replay.id))
        .await
        .unwrap()
}

/// Everything in a stream, in the order of arrival.
async fn contents(hub: &MessagingHub, topic: &str, n: usize) -> Vec<Received> {
    let options = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut reader = hub.stream_events(topic, options).await.unwrap();
    let mut all = Vec::new();
    while all.len() < n {
        let what = format!("{n} messages, {} came", all.len());
        let batch = wait::within(SOON, &what, reader.deliveries.recv()).await;
        all.extend(batch.unwrap().iter().map(|d| d.received().clone()));
    }
    let metadata = hub.topic_metadata(topic).await.unwrap();
    let held: i64 = metadata.partitions.iter().map(|p| p.high_watermark).sum();
    assert_eq!(held, i64::try_from(n).unwrap(), "and no more");
    all
}

fn body(message: &Message) -> String {
    String::from_utf8(message.payload.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_handles_what_is_replayed_again_and_only_once() {
    let (system, hub) = started().await;
    let topic = unique("events.again");
    stream(&hub, &topic, 3).await;
    // Bodies, and what they are replays of.
    type Seen = Vec<(String, Option<String>)>;
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let notes = seen.clone();
    let options = SubscribeOptions::group("workers");
    let subscription = hub
        .subscribe(&topic, options, move |got: Received| {
            let of = got.marks.replay.as_ref().map(|r| r.of.clone());
            notes.lock().unwrap().push((body(&got), of));
            async { Ok::<(), HandlerError>(()) }
        })
        .await
        .unwrap();
    let mut ids = Vec::new();
    for n in 0..20 {
        let message = Message::new("t", n.to_string()).with_key(format!("k{}", n % 4));
        ids.push(message.id.as_str().to_owned());
        hub.publish(&topic, message).await.unwrap();
    }
    let count = async |n: usize| {
        wait::until(SOON, "the handler ran", async || {
            seen.lock().unwrap().len() >= n
        })
        .await;
    };
    count(20).await;
    // Into the topic that it reads: it ends all the same.
    let first = replayed(&hub, serde_json::json!({"topic": topic, "id": "once"})).await;
    assert_eq!(first.progress.status, ReplayStatus::Completed, "{first:?}");
    assert_eq!((first.progress.replayed, first.progress.total), (20, 20));
    count(40).await;
    let mut again: Vec<String> = seen.lock().unwrap()[20..]
        .iter()
        .map(|(_, of)| of.clone().expect("marked as a replay"))
        .collect();
    again.sort();
    ids.sort();
    assert_eq!(again, ids);
    // The replays are in the topic now, and are of the same messages.
    let second = replayed(
        &hub,
        serde_json::json!({"topic": topic, "options": {"skip_duplicates": true, "dry_run": true}}),
    )
    .await;
    assert_eq!(
        (second.progress.replayed, second.progress.skipped),
        (20, 20)
    );
    let error = hub
        .start_replay(request(serde_json::json!({"topic": topic, "id": "once"})))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ReplayExists);
    assert_eq!(seen.lock().unwrap().len(), 40);
    subscription.unsubscribe().await;
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_and_times_choose_and_order_by_key_holds() {
    let (system, hub) = started().await;
    let base = unique("events.chosen");
    let (a, b, target) = (
        format!("{base}.a"),
        format!("{base}.b"),
        format!("{base}.out"),
    );
    for topic in [&a, &b, &target] {
        stream(&hub, topic, 3).await;
    }
    let start = Timestamp::now() - Duration::from_secs(3600);
    for n in 0..200_u64 {
        let mut task = Task::new(if n % 10 == 0 { "other" } else { "job.run" }, n.to_string());
        let parity = if n % 3 == 0 { "x" } else { "y" };
        task.attributes
            .metadata
            .insert("m".into(), parity.to_owned());
        let message = Message::from(task)
            .with_key(format!("k{}", n % 7))
            .with_header("tenant", (n % 2).to_string())
            .with_timestamp(start + Duration::from_secs(n));
        hub.publish(if n < 100 { &a } else { &b }, message)
            .await
            .unwrap();
    }
    let done = replayed(
        &hub,
        serde_json::json!({
            "pattern": format!("{base}.*"),
            "from_time": start + Duration::from_secs(50),
            "to_time": start + Duration::from_secs(150),
            "target_topic": target,
            "filter": {"types": ["job.*"], "headers": {"tenant": "1"}, "metadata": {"m": "x"}},
            "options": {"batch_size": 3},
        }),
    )
    .await;
    let wanted: Vec<u64> = (50..150)
        .filter(|n| n % 10 != 0 && n % 2 == 1 && n % 3 == 0)
        .collect();
    let progress = &done.progress;
    assert_eq!(progress.status, ReplayStatus::Completed, "{done:?}");
    assert_eq!(progress.replayed, wanted.len() as u64);
    assert_eq!(progress.skipped, 100 - wanted.len() as u64);
    assert_eq!(progress.total, 100);
    assert_eq!(progress.offsets_read, progress.offsets_total);
    let got = contents(&hub, &target, wanted.len()).await;
    let mut numbers: Vec<u64> = got.iter().map(|m| body(m).parse().unwrap()).collect();
    for key in 0..7 {
        let of_key: Vec<u64> = numbers.iter().copied().filter(|n| n % 7 == key).collect();
        assert!(of_key.is_sorted(), "key {key}: {of_key:?}");
    }
    numbers.sort_unstable();
    assert_eq!(numbers, wanted);
    assert_eq!(got[0].marks.replay.as_ref().unwrap().by, done.id);
    assert_eq!(
        got[0].timestamp.as_millis() % 1000,
        start.as_millis() % 1000
    );
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_stream_and_an_expired_message_are_replayed_to_the_end() {
    let (system, hub) = started().await;
    let topic = unique("events.compacted");
    let options = TopicOptions {
        partitions: 1,
        cleanup_policy: "compact".into(),
        ..TopicOptions::default()
    };
    hub.create_topic(&topic, &options).await.unwrap();
    for n in 0..50 {
        let message = Message::new("t", n.to_string()).with_key("only");
        hub.publish(&topic, message).await.unwrap();
    }
    let target = unique("events.target");
    stream(&hub, &target, 1).await;
    let done = replayed(
        &hub,
        serde_json::json!({"topic": topic, "target_topic": target}),
    )
    .await;
    let progress = &done.progress;
    assert_eq!(progress.status, ReplayStatus::Completed, "{done:?}");
    assert_eq!(progress.offsets_read, progress.offsets_total);
    assert_eq!(progress.total, progress.replayed);

    let short = unique("events.short");
    stream(&hub, &short, 1).await;
    let message = Message::new("t", "was in time").with_ttl(Duration::from_millis(300));
    let ends = message.expiration.unwrap();
    hub.publish(&short, message).await.unwrap();
    wait::until(SOON, "it has expired", async || Timestamp::now() > ends).await;
    let done = replayed(
        &hub,
        serde_json::json!({"topic": short, "target_topic": target}),
    )
    .await;
    assert_eq!((done.progress.replayed, done.progress.failed), (1, 0));
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_replayed_is_refused_at_once() {
    let (system, hub) = started().await;
    let refused = async |json: serde_json::Value| {
        let error = hub.start_replay(request(json)).await.unwrap_err();
        (error.code(), error.message().to_owned())
    };
    let (code, why) = refused(serde_json::json!({"topic": "helixagent.tasks.llm"})).await;
    assert_eq!(code, ErrorCode::InvalidConfig);
    assert!(why.contains("work queue"), "{why}");
    let (code, _) = refused(serde_json::json!({"topic": "events.never.made"})).await;
    assert_eq!(code, ErrorCode::TopicNotFound);
    let (code, _) = refused(serde_json::json!({"pattern": "events.never.made.*"})).await;
    assert_eq!(code, ErrorCode::TopicNotFound);
    assert_eq!(
        hub.replay("none").unwrap_err().code(),
        ErrorCode::ReplayNotFound
    );
    // Nothing of it stays, and no place is taken.
    assert!(hub.replays().is_empty() && hub.active_replays() == 0);
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_publish_ends_a_replay_in_order_and_no_other() {
    let (system, hub) = started().await;
    let (topic, target) = (unique("events.large"), unique("events.narrow"));
    stream(&hub, &topic, 1).await;
    let options = TopicOptions {
        partitions: 1,
        max_message_bytes: Some(1_000),
        ..TopicOptions::default()
    };
    hub.create_topic(&target, &options).await.unwrap();
    for n in 0..30 {
        let body = if n == 15 {
            "x".repeat(5_000)
        } else {
            n.to_string()
        };
        hub.publish(&topic, Message::new("t", body)).await.unwrap();
    }
    let ask = |ordered: bool| {
        serde_json::json!({"topic": topic, "target_topic": target,
            "options": {"batch_size": 5, "preserve_order": ordered}})
    };
    let done = replayed(&hub, ask(true)).await;
    assert_eq!(done.progress.status, ReplayStatus::Failed, "{done:?}");
    assert_eq!(done.progress.failed, 1);
    assert!((15..20).contains(&done.progress.replayed), "{done:?}");
    assert!(
        done.progress
            .error
            .as_ref()
            .unwrap()
            .contains("MESSAGE_TOO_LARGE"),
        "{done:?}"
    );
    let done = replayed(&hub, ask(false)).await;
    assert_eq!(done.progress.status, ReplayStatus::Completed);
    assert_eq!((done.progress.replayed, done.progress.failed), (29, 1));
    system.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_closes_ends_its_replays_first() {
    let (system, hub) = started().await;
    let topic = unique("events.closing");
    stream(&hub, &topic, 1).await;
    let target = unique("events.closing.target");
    stream(&hub, &target, 1).await;
    let arrived = Arc::new(AtomicUsize::new(0));
    let counter = arrived.clone();
    let _live = hub
        .subscribe(&target, SubscribeOptions::default(), move |_: Received| {
            counter.fetch_add(1, SeqCst);
            async { Ok::<(), HandlerError>(()) }
        })
        .await
        .unwrap();
    for n in 0..100 {
        hub.publish(&topic, Message::new("t", n.to_string()))
            .await
            .unwrap();
    }
    let replay = hub
        .start_replay(request(serde_json::json!({
            "topic": topic, "target_topic": target,
            "options": {"batch_size": 1, "delay_between": "1h"},
        })))
        .await
        .unwrap();
    wait::until(SOON, "the first is published", async || {
        arrived.load(SeqCst) > 0
    })
    .await;
    wait::within(SOON, "it closes at once", system.close()).await;
    let ended = hub.replay(&replay.id).unwrap();
    assert_eq!(ended.progress.status, ReplayStatus::Cancelled);
    assert_eq!(ended.progress.replayed, 1);
    assert!(ended.progress.ended_at.is_some());
}
