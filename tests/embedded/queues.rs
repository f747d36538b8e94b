//! Queues.

use std::{sync::Arc, time::Duration};

use messaging_hub::{
    broker::{
        LaneOptions, MessageBroker, OrderKey, PublishOptions, QueueOptions, Submission,
        SubscribeOptions, TaskQueueBroker, lane::Fate,
    },
    error::ErrorCode,
    message::{Priority, Timestamp, wire::Marks},
};

use super::{body, broker, message, publish, queue, take, topic};

#[tokio::test(start_paused = true)]
async fn a_publish_before_any_subscriber_is_kept() {
    let broker = broker().await;
    publish(&broker, "tasks.early", &["a", "b"]).await;
    let mut consumer = broker
        .consume(&queue("tasks.early"), &SubscribeOptions::default())
        .await
        .unwrap();
    let got = take(&mut consumer, 2).await;
    assert_eq!(got.iter().map(body).collect::<Vec<_>>(), ["a", "b"]);
    for delivery in got {
        delivery.ack().await.unwrap();
    }
    let stats = broker.queue_stats(&topic("tasks.early")).await.unwrap();
    assert_eq!((stats.messages, stats.message_bytes), (0, Some(0)));
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_priority_queue_is_fifo_within_a_priority_also_after_a_requeue() {
    let broker = broker().await;
    let to = topic("tasks.prio");
    for (body, priority) in [("a5", 5), ("b5", 5), ("c9", 9), ("d5", 5), ("e9", 9)] {
        broker
            .publish(
                &to,
                message(body).with_priority(Priority::new(priority).unwrap()),
                &PublishOptions::default(),
            )
            .await
            .unwrap();
    }
    let mut consumer = broker
        .consume(
            &queue("tasks.prio"),
            &SubscribeOptions::default().with_prefetch(1),
        )
        .await
        .unwrap();
    let first = take(&mut consumer, 1).await.remove(0);
    assert_eq!(body(&first), "c9");
    assert!(!first.redelivered);
    first.requeue().await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..5 {
        let delivery = take(&mut consumer, 1).await.remove(0);
        seen.push((body(&delivery), delivery.redelivered));
        delivery.ack().await.unwrap();
    }
    assert_eq!(
        seen.iter().map(|(b, _)| b.as_str()).collect::<Vec<_>>(),
        ["c9", "e9", "a5", "b5", "d5"]
    );
    assert!(seen[0].1);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_expired_message_goes_to_the_dead_letters_without_a_consumer() {
    let broker = broker().await;
    let to = topic("tasks.ttl");
    publish(&broker, "tasks.ttl", &["stays"]).await;
    broker
        .publish(
            &to,
            message("goes").with_expiration(Timestamp::now() + Duration::from_secs(5)),
            &PublishOptions::default(),
        )
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(broker.queue_depth(&to).await.unwrap(), 1);
    let dead = broker
        .dequeue_task(&topic("helixagent.dlq"), "w", Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(body(&dead), "goes");
    let failure = dead.marks.failure.clone().unwrap();
    assert_eq!(failure.reason, "expired");
    assert_eq!(failure.original_topic, "tasks.ttl");
    dead.ack().await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn competing_consumers_share_a_queue_by_turns_and_within_their_prefetch() {
    let broker = broker().await;
    let options = SubscribeOptions::default().with_prefetch(2);
    let mut one = broker
        .consume(&queue("tasks.shared"), &options)
        .await
        .unwrap();
    let mut two = broker
        .consume(&queue("tasks.shared"), &options)
        .await
        .unwrap();
    publish(&broker, "tasks.shared", &["1", "2", "3", "4", "5", "6"]).await;
    let first = take(&mut one, 2).await;
    let second = take(&mut two, 2).await;
    assert_eq!(first.iter().map(body).collect::<Vec<_>>(), ["1", "3"]);
    assert_eq!(second.iter().map(body).collect::<Vec<_>>(), ["2", "4"]);
    let stats = broker.queue_stats(&topic("tasks.shared")).await.unwrap();
    assert_eq!((stats.messages_ready, stats.messages_unacked), (2, Some(4)));
    drop(first);
    // What the first consumer dropped comes again before what is behind it.
    let again = take(&mut one, 2).await;
    assert_eq!(again.iter().map(body).collect::<Vec<_>>(), ["1", "3"]);
    assert!(again.iter().all(|d| d.redelivered));
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_retry_rests_and_comes_back_with_its_attempt_counted() {
    let broker = broker().await;
    let mut consumer = broker
        .consume(&queue("tasks.retry"), &SubscribeOptions::default())
        .await
        .unwrap();
    publish(&broker, "tasks.retry", &["x"]).await;
    let delivery = take(&mut consumer, 1).await.remove(0);
    let failure =
        messaging_hub::message::wire::Failure::now("handler_error", "boom", "tasks.retry", None);
    let before = tokio::time::Instant::now();
    delivery
        .settle(messaging_hub::broker::Verdict::Retry {
            delay: Duration::from_secs(60),
            failure,
        })
        .await
        .unwrap();
    let again = tokio::time::timeout(Duration::from_secs(90), consumer.deliveries.recv())
        .await
        .unwrap()
        .unwrap()
        .remove(0);
    assert!(before.elapsed() >= Duration::from_secs(59));
    assert_eq!(again.retry_count, 1);
    assert_eq!(again.marks.failure.as_ref().unwrap().details, "boom");
    again.dead_letter("gave_up", "enough").await.unwrap();
    let dead = broker
        .dequeue_task(&topic("helixagent.dlq"), "w", Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(dead.marks.failure.as_ref().unwrap().reason, "gave_up");
    dead.ack().await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lane_confirms_each_message_and_a_full_queue_is_overload() {
    let broker = broker().await;
    let to = topic("tasks.lane");
    broker
        .declare_queue(
            &to,
            &QueueOptions {
                max_length: Some(2),
                overflow: Some("reject-publish".into()),
                ..QueueOptions::default()
            },
        )
        .await
        .unwrap();
    let mut lane = broker
        .open_lane(&to, 0, &LaneOptions::default())
        .await
        .unwrap();
    let batch = (0..3)
        .map(|token| Submission {
            token,
            message: Arc::new(message("x")),
            order: OrderKey::Publisher(1),
            marks: Marks::default(),
            confirm: true,
        })
        .collect();
    lane.submissions.send(batch).await.unwrap();
    for token in 0..3 {
        let answer = lane.confirmations.recv().await.unwrap();
        assert_eq!(answer.token, token);
        match (token, answer.fate) {
            (0 | 1, Fate::Confirmed(_)) => {}
            (2, Fate::Overloaded(e)) => assert!(e.is_retryable()),
            (_, other) => panic!("token {token}: {other:?}"),
        }
    }
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_waits_for_a_task_and_leaves_nothing_behind_when_it_gives_up() {
    let broker = broker().await;
    let to = topic("tasks.wait");
    let missing = broker.dequeue_task(&to, "w", Duration::ZERO).await;
    assert_eq!(missing.unwrap_err().code(), ErrorCode::QueueNotFound);
    broker
        .declare_queue(&to, &QueueOptions::default())
        .await
        .unwrap();
    let none = broker.dequeue_task(&to, "w", Duration::from_secs(3)).await;
    assert!(none.unwrap().is_none());
    let waiting = tokio::spawn({
        let (broker, to) = (broker.clone(), to.clone());
        async move {
            broker
                .dequeue_task(&to, "w", Duration::from_secs(600))
                .await
        }
    });
    tokio::task::yield_now().await;
    publish(&broker, "tasks.wait", &["late"]).await;
    let delivery = waiting.await.unwrap().unwrap().unwrap();
    assert_eq!(body(&delivery), "late");
    drop(delivery);
    let again = broker
        .dequeue_task(&to, "w", Duration::from_secs(1))
        .await
        .unwrap()
        .unwrap();
    assert!(again.redelivered);
    again.ack().await.unwrap();
    assert_eq!(broker.queue_stats(&to).await.unwrap().consumers, 0);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_twice_is_fine_and_ends_consumers_and_waits() {
    let broker = broker().await;
    let to = topic("tasks.close");
    broker
        .declare_queue(&to, &QueueOptions::default())
        .await
        .unwrap();
    let mut consumer = broker
        .consume(
            &queue("tasks.close"),
            &SubscribeOptions::default().with_prefetch(1),
        )
        .await
        .unwrap();
    publish(&broker, "tasks.close", &["held"]).await;
    let held = take(&mut consumer, 1).await.remove(0);
    let waiting = tokio::spawn({
        let (broker, to) = (broker.clone(), to.clone());
        async move {
            broker
                .dequeue_task(&to, "w", Duration::from_secs(600))
                .await
        }
    });
    tokio::task::yield_now().await;
    broker.close().await.unwrap();
    broker.close().await.unwrap();
    assert!(consumer.deliveries.recv().await.is_none());
    assert_eq!(
        waiting.await.unwrap().unwrap_err().code(),
        ErrorCode::OperationCanceled
    );
    assert_eq!(held.ack().await.unwrap_err().code(), ErrorCode::AckFailed);
    assert_eq!(
        broker.queue_stats(&to).await.unwrap_err().code(),
        ErrorCode::OperationCanceled
    );
    assert!(!broker.is_connected());
}

#[tokio::test(start_paused = true)]
async fn a_pattern_gets_queues_that_are_declared_later() {
    let broker = broker().await;
    let mut consumer = broker
        .consume(&queue("tasks.#"), &SubscribeOptions::default())
        .await
        .unwrap();
    publish(&broker, "tasks.one", &["a"]).await;
    publish(&broker, "tasks.two.deep", &["b"]).await;
    let got = take(&mut consumer, 2).await;
    assert_eq!(got[0].topic.as_str(), "tasks.one");
    assert_eq!(got[1].topic.as_str(), "tasks.two.deep");
    drop(got);
    broker.close().await.unwrap();
}
