//! The embedded broker on its journal: what comes back, in which state, and
//! that a real kill -9 takes nothing that was promised.

mod killed;
mod seeds;

use std::{path::Path, sync::Arc, time::Duration};

use messaging_hub::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig, JournalConfig},
    broker::{
        Delivery, EventStreamBroker, MessageBroker, Outcome, Position, PublishOptions,
        QueueOptions, SeekTo, StartFrom, SubscribeOptions, TaskQueueBroker, TopicOptions, Verdict,
    },
    error::{Assume, ErrorCode},
    message::{DeliveryMode, Message, Priority, Task, Timestamp, wire::Failure},
    topology::Topology,
};

use super::{body, message, publish, queue, stream, take, topic};

async fn open(dir: &Path) -> Arc<EmbeddedBroker> {
    open_with(JournalConfig {
        segment_bytes: 256 * 1024,
        ..JournalConfig::at(dir)
    })
    .await
}

async fn open_with(journal: JournalConfig) -> Arc<EmbeddedBroker> {
    let config = EmbeddedConfig {
        journal: Some(journal),
        ..EmbeddedConfig::default()
    };
    let broker = EmbeddedBroker::new(config, Arc::new(Topology::default()));
    broker.connect().await.unwrap();
    broker
}

async fn publish_one(broker: &EmbeddedBroker, to: &str, message: Message) -> Option<Position> {
    let receipt = broker
        .publish(&topic(to), message, &PublishOptions::default())
        .await
        .unwrap();
    match receipt.outcome {
        Outcome::Delivered { position, .. } => position,
        other => panic!("{other:?}"),
    }
}

async fn next(broker: &EmbeddedBroker, from: &str) -> Option<Delivery> {
    broker
        .dequeue_task(&topic(from), "w", Duration::ZERO)
        .await
        .unwrap()
}

/// Copies a journal as a crash would leave it, if it came now.
fn snapshot(from: &Path, to: &Path) {
    while let Err(error) = copy(from, to) {
        // A segment of which nothing lives any more was deleted meanwhile. What was
        // copied before that may be of an earlier moment: no crash leaves both.
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        assert!(from.is_dir(), "there is no journal in {}", from.display());
        std::fs::remove_dir_all(to).unwrap();
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn queues_come_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    let options = QueueOptions {
        max_priority: Some(9),
        ..QueueOptions::default()
    };
    let to = topic("tasks.durable");
    broker.declare_queue(&to, &options).await.unwrap();
    for (body, priority) in [("low", 1), ("high", 9), ("done", 9), ("failed", 5)] {
        let message = message(body)
            .with_priority(Priority::new(priority).unwrap())
            .with_key("k")
            .with_header("h", "v");
        publish_one(&broker, "tasks.durable", message).await;
    }
    let late = Timestamp::now() + Duration::from_secs(3600);
    publish_one(
        &broker,
        "tasks.durable",
        message("expiring").with_expiration(late),
    )
    .await;
    let mut scheduled = Task::new("t", "scheduled");
    scheduled.attributes.scheduled_at = Some(late);
    publish_one(&broker, "tasks.durable", scheduled.into()).await;

    let held = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!(body(&held), "high");
    next(&broker, "tasks.durable")
        .await
        .unwrap()
        .ack()
        .await
        .unwrap();
    let failed = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!(body(&failed), "failed");
    let failure = Failure::now("handler_error", "boom", "tasks.durable", None);
    let verdict = Verdict::Retry {
        delay: Duration::ZERO,
        failure: failure.clone(),
    };
    failed.settle(verdict).await.unwrap();
    broker.close().await.unwrap();
    drop(held);

    let broker = open(dir.path()).await;
    let stats = broker.queue_stats(&to).await.unwrap();
    assert_eq!((stats.messages, stats.messages_ready), (5, 4));
    let error = broker
        .declare_queue(&to, &QueueOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::QueueDeclareFailed);
    let first = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!((body(&first).as_str(), first.redelivered), ("high", true));
    assert_eq!(first.headers.get("h").map(String::as_str), Some("v"));
    assert_eq!(first.key.as_ref().and_then(|k| k.as_str()), Some("k"));
    assert_eq!(first.topic.as_str(), "tasks.durable");
    let second = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!(body(&second), "expiring");
    assert_eq!(second.expiration, Some(late));
    let third = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!((body(&third).as_str(), third.retry_count), ("failed", 1));
    assert_eq!(third.marks.failure, Some(Box::new(failure)));
    assert!(third.redelivered);
    let last = next(&broker, "tasks.durable").await.unwrap();
    assert_eq!(body(&last), "low");
    broker.close().await.unwrap();
}

#[tokio::test]
async fn what_is_due_during_the_restart_is_done_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    let soon = Timestamp::now() + Duration::from_millis(300);
    publish_one(
        &broker,
        "tasks.ttl",
        message("expires").with_expiration(soon),
    )
    .await;
    let mut task = Task::new("t", "rests");
    task.attributes.scheduled_at = Some(soon);
    publish_one(&broker, "tasks.rest", task.into()).await;
    publish_one(&broker, "tasks.retry", message("retried")).await;
    let failure = Failure::now("handler_error", "boom", "tasks.retry", None);
    let retry = Verdict::Retry {
        delay: Duration::from_millis(300),
        failure,
    };
    let failed = next(&broker, "tasks.retry").await.unwrap();
    failed.settle(retry).await.unwrap();
    broker.close().await.unwrap();
    while Timestamp::now() <= soon + Duration::from_millis(300) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let broker = open(dir.path()).await;
    let dead = next(&broker, "helixagent.dlq").await.unwrap();
    assert_eq!(body(&dead), "expires");
    assert_eq!(dead.marks.failure.as_ref().unwrap().reason, "expired");
    assert_eq!(body(&next(&broker, "tasks.rest").await.unwrap()), "rests");
    let retried = next(&broker, "tasks.retry").await.unwrap();
    assert_eq!(
        (body(&retried).as_str(), retried.retry_count),
        ("retried", 1)
    );
    // The dead letter was moved in one batch: it is not in both places.
    dead.ack().await.unwrap();
    broker.close().await.unwrap();
    let broker = open(dir.path()).await;
    assert!(next(&broker, "helixagent.dlq").await.is_none());
    assert!(next(&broker, "tasks.ttl").await.is_none());
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_comes_back_with_its_marks_and_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    publish(&broker, "tasks.a", &["x"]).await;
    let delivery = next(&broker, "tasks.a").await.unwrap();
    delivery.dead_letter("handler_error", "boom").await.unwrap();
    broker.close().await.unwrap();
    let broker = open(dir.path()).await;
    assert!(next(&broker, "tasks.a").await.is_none());
    let dead = next(&broker, "helixagent.dlq").await.unwrap();
    let failure = dead.marks.failure.clone().unwrap();
    assert_eq!(
        (body(&dead).as_str(), failure.reason.as_str()),
        ("x", "handler_error")
    );
    assert_eq!(failure.original_topic, "tasks.a");
    assert!(next(&broker, "helixagent.dlq").await.is_none());
    broker.close().await.unwrap();
}

#[tokio::test]
async fn what_was_purged_or_deleted_stays_away() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    publish(&broker, "tasks.purged", &["a", "b"]).await;
    publish(&broker, "tasks.deleted", &["a", "b"]).await;
    publish(&broker, "events.deleted", &["a", "b"]).await;
    assert_eq!(broker.purge_queue(&topic("tasks.purged")).await.unwrap(), 2);
    broker.delete_queue(&topic("tasks.deleted")).await.unwrap();
    broker.delete_topic(&topic("events.deleted")).await.unwrap();
    // The name lives again, without what the old one held.
    publish(&broker, "tasks.deleted", &["c"]).await;
    publish(&broker, "events.deleted", &["c"]).await;
    broker.close().await.unwrap();
    let broker = open(dir.path()).await;
    assert_eq!(broker.queue_depth(&topic("tasks.purged")).await.unwrap(), 0);
    assert_eq!(body(&next(&broker, "tasks.deleted").await.unwrap()), "c");
    assert!(next(&broker, "tasks.deleted").await.is_none());
    let described = broker
        .topic_metadata(&topic("events.deleted"))
        .await
        .unwrap();
    let held: i64 = described
        .partitions
        .iter()
        .map(|p| p.high_watermark - p.low_watermark)
        .sum();
    assert_eq!(held, 1);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn queues_that_promise_nothing_keep_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    let to = topic("tasks.passing");
    let options = QueueOptions {
        durable: false,
        ..QueueOptions::default()
    };
    broker.declare_queue(&to, &options).await.unwrap();
    publish(&broker, "tasks.passing", &["x"]).await;
    publish(&broker, "tasks.kept", &["y"]).await;
    broker.close().await.unwrap();
    let broker = open(dir.path()).await;
    assert_eq!(
        broker.queue_depth(&to).await.unwrap_err().code(),
        ErrorCode::QueueNotFound
    );
    assert_eq!(broker.queue_depth(&topic("tasks.kept")).await.unwrap(), 1);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn streams_come_back_with_offsets_settings_and_positions() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    let name = topic("events.durable");
    let options = TopicOptions {
        partitions: 2,
        ..TopicOptions::default()
    };
    broker.create_topic(&name, &options).await.unwrap();
    for n in 0..10 {
        let at = publish_one(
            &broker,
            "events.durable",
            message(&format!("{n}")).with_partition(n % 2),
        )
        .await
        .unwrap();
        assert_eq!((at.partition, at.offset), (n % 2, i64::from(n / 2)));
    }
    let group = SubscribeOptions::group("g");
    let mut consumer = broker
        .consume(&stream("events.durable"), &group)
        .await
        .unwrap();
    for delivery in take(&mut consumer, 10).await {
        // Partition 1 stands at its third message.
        if delivery.partition == Some(1) && delivery.offset == Some(2) {
            std::mem::forget(delivery);
        } else {
            delivery.ack().await.unwrap();
        }
    }
    broker.commit_offset("other", &name, 0, 4).await.unwrap();
    broker
        .seek("other", &name, Some(1), SeekTo::Offset(1))
        .await
        .unwrap();
    broker.close().await.unwrap();

    let broker = open(dir.path()).await;
    let error = broker
        .create_topic(&name, &TopicOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::TopicCreateFailed);
    for (group, partition, expected) in [("g", 0, 5), ("g", 1, 2), ("other", 0, 4), ("other", 1, 1)]
    {
        assert_eq!(
            broker.offset(group, &name, partition).await.unwrap(),
            Some(expected)
        );
    }
    let mut consumer = broker
        .consume(&stream("events.durable"), &group)
        .await
        .unwrap();
    let again = take(&mut consumer, 3).await;
    let bodies: Vec<String> = again.iter().map(body).collect();
    assert_eq!(bodies, ["5", "7", "9"]);
    assert!(again.iter().all(|d| d.redelivered));
    let everything = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut reader = broker
        .consume(&stream("events.durable"), &everything)
        .await
        .unwrap();
    let all = take(&mut reader, 10).await;
    assert!(all.iter().all(|d| body(d)
        == format!(
            "{}",
            d.offset.unwrap() * 2 + i64::from(d.partition.unwrap())
        )));
    let at = publish_one(&broker, "events.durable", message("n").with_partition(0)).await;
    assert_eq!(at.unwrap().offset, 5);
    drop(again);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn offsets_go_on_where_retention_left_an_empty_partition() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    let name = topic("events.short");
    let options = TopicOptions {
        partitions: 1,
        retention_ms: 100,
        ..TopicOptions::default()
    };
    broker.create_topic(&name, &options).await.unwrap();
    publish(&broker, "events.short", &["a", "b", "c"]).await;
    let watermarks = async |broker: &EmbeddedBroker| {
        let described = broker.topic_metadata(&name).await.unwrap();
        let p = &described.partitions[0];
        (p.low_watermark, p.high_watermark)
    };
    while watermarks(&broker).await != (3, 3) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    broker.close().await.unwrap();
    for round in 0..2 {
        let broker = open(dir.path()).await;
        assert_eq!(watermarks(&broker).await, (3 + round, 3 + round));
        let at = publish_one(&broker, "events.short", message("d")).await;
        assert_eq!(at.unwrap().offset, 3 + round);
        while watermarks(&broker).await != (4 + round, 4 + round) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        broker.close().await.unwrap();
    }
}

#[tokio::test]
async fn retention_gives_the_disk_back() {
    const BOUND: u64 = 2 * 1024 * 1024;
    let dir = tempfile::tempdir().unwrap();
    let broker = open_with(JournalConfig {
        stream_bytes: BOUND,
        segment_bytes: 128 * 1024,
        ..JournalConfig::at(dir.path())
    })
    .await;
    let options = TopicOptions {
        partitions: 1,
        settings: [("retention.bytes".to_owned(), "200000".to_owned())].into(),
        ..TopicOptions::default()
    };
    let name = topic("events.round");
    broker.create_topic(&name, &options).await.unwrap();
    // Ten times what the disk may take goes through.
    let large = "x".repeat(20_000);
    for _ in 0..1000 {
        publish(&broker, "events.round", &[&large]).await;
    }
    broker.close().await.unwrap();
    let disk: u64 = std::fs::read_dir(dir.path().join("streams"))
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    assert!(disk <= BOUND, "{disk}");
    let broker = open(dir.path()).await;
    let described = broker.topic_metadata(&name).await.unwrap();
    assert_eq!(described.partitions[0].high_watermark, 1000);
    assert!(described.partitions[0].low_watermark > 980);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_full_journal_is_an_overload_that_consuming_ends() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open_with(JournalConfig {
        queue_bytes: 512 * 1024,
        segment_bytes: 32 * 1024,
        ..JournalConfig::at(dir.path())
    })
    .await;
    let to = topic("tasks.full");
    let large = "x".repeat(10_000);
    let mut taken = 0;
    let error = loop {
        let result = broker
            .publish(&to, message(&large), &PublishOptions::default())
            .await;
        match result {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
    };
    assert!(taken > 20, "{taken}");
    assert_eq!(error.code(), ErrorCode::PublishFailed);
    assert_eq!(error.assume(), Assume::NotSent);
    assert!(error.message().contains("full"), "{error}");
    broker.health_check().await.unwrap();
    // What is moved while it is full is neither lost nor doubled.
    next(&broker, "tasks.full")
        .await
        .unwrap()
        .dead_letter("handler_error", "boom")
        .await
        .unwrap();
    for _ in 0..taken - 1 {
        next(&broker, "tasks.full")
            .await
            .unwrap()
            .ack()
            .await
            .unwrap();
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while let Err(error) = broker
        .publish(&to, message("small"), &PublishOptions::default())
        .await
    {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    broker.close().await.unwrap();
    let broker = open(dir.path()).await;
    let dead = broker.queue_depth(&topic("helixagent.dlq")).await;
    let here = broker.queue_depth(&to).await.unwrap();
    // The dead letter may stand where it was before, but once.
    assert_eq!(dead.unwrap_or(0) + here, 2);
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_crash_keeps_what_was_confirmed_and_comes_with_transient_ones_or_without() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(&dir.path().join("first")).await;
    for n in 0..50 {
        let mode = if n % 2 == 0 {
            DeliveryMode::Persistent
        } else {
            DeliveryMode::Transient
        };
        let message = message(&format!("{n}")).with_delivery_mode(mode);
        publish_one(&broker, "tasks.mixed", message).await;
    }
    let crashed = dir.path().join("crashed");
    snapshot(&dir.path().join("first"), &crashed);
    broker.close().await.unwrap();
    let broker = open(&crashed).await;
    let mut back = Vec::new();
    while let Some(delivery) = next(&broker, "tasks.mixed").await {
        assert!(!delivery.redelivered);
        back.push(body(&delivery).parse::<u32>().unwrap());
        delivery.ack().await.unwrap();
    }
    assert!(back.is_sorted());
    assert!((0..50).step_by(2).all(|n| back.contains(&n)), "{back:?}");
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_folder_is_held_by_one_broker_and_a_closed_one_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).await;
    let config = EmbeddedConfig {
        journal: Some(JournalConfig::at(dir.path())),
        ..EmbeddedConfig::default()
    };
    let second = EmbeddedBroker::new(config, Arc::new(Topology::default()));
    let error = second.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig);
    assert!(error.message().contains("in use"), "{error}");
    first.close().await.unwrap();
    second.connect().await.unwrap();
    second.close().await.unwrap();
}

#[tokio::test]
async fn a_damaged_journal_is_told_in_its_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let broker = open(dir.path()).await;
    publish(&broker, "tasks.x", &["a"]).await;
    broker.close().await.unwrap();
    let queues = dir.path().join("queues");
    let segment = std::fs::read_dir(&queues)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.metadata().unwrap().len() > 1000)
        .max()
        .unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[..8].fill(0x55);
    std::fs::write(&segment, bytes).unwrap();
    let config = EmbeddedConfig {
        journal: Some(JournalConfig::at(dir.path())),
        ..EmbeddedConfig::default()
    };
    let broker = EmbeddedBroker::new(config, Arc::new(Topology::default()));
    let error = broker.connect().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidConfig);
    assert!(
        error.message().contains(segment.to_str().unwrap()),
        "{error}"
    );
}
