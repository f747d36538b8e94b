//! Queues.

use std::{sync::Arc, time::Duration};

use messaging_hub::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{
        LaneOptions, MessageBroker, OrderKey, PublishOptions, QueueOptions, Submission,
        SubscribeOptions, TaskQueueBroker, Verdict, lane::Fate,
    },
    error::ErrorCode,
    message::{
        Message, Priority, Task, TaskAttributes, Timestamp,
        wire::{Failure, Marks},
    },
    topology::{Binding, ExchangeKind, ExchangeSpec, QueueSpec, Topology},
};

use super::{body, broker, broker_with, message, publish, queue, take, topic};

#[tokio::test(start_paused = true)]
async fn fault_01_confirmed_publishes_one_after_the_other_do_not_block() {
    let broker = broker().await;
    let to = topic("tasks.confirms");
    broker
        .declare_queue(&to, &QueueOptions::default())
        .await
        .unwrap();
    let mut lane = broker
        .open_lane(&to, 0, &LaneOptions::default())
        .await
        .unwrap();
    for token in 0..1000 {
        let one = Submission {
            token,
            message: Arc::new(message("x")),
            order: OrderKey::Publisher(1),
            marks: Marks::default(),
            confirm: true,
        };
        lane.submissions.send(vec![one]).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(5), lane.confirmations.recv())
            .await
            .expect("a confirm")
            .unwrap();
        assert!(
            answer.token == token && matches!(answer.fate, Fate::Confirmed(_)),
            "{answer:?}"
        );
    }
    assert_eq!(broker.queue_depth(&to).await.unwrap(), 1000);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_02_a_publish_before_any_subscriber_is_kept() {
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
async fn fault_09_a_priority_queue_is_fifo_within_a_priority_also_after_a_requeue() {
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
async fn a_dead_letter_that_its_reader_refuses_stays_the_letter_that_it_is() {
    let broker = broker().await;
    // A deadline that is over ends no dead letter.
    let mut late = message("x");
    late.task = Some(Box::new(TaskAttributes {
        deadline: Some(Timestamp::now() + Duration::from_millis(900)),
        ..TaskAttributes::default()
    }));
    let options = PublishOptions::default();
    let published = broker.publish(&topic("tasks.bad"), late, &options).await;
    published.unwrap();
    let next = async |from: &str, wait: Duration| {
        let delivery = broker.dequeue_task(&topic(from), "w", wait).await;
        delivery.unwrap()
    };
    let bad = next("tasks.bad", Duration::ZERO).await.unwrap();
    bad.dead_letter("handler_error", "boom").await.unwrap();
    let letter = next("helixagent.dlq", Duration::ZERO).await.unwrap();
    let (id, failure) = (letter.id.clone(), letter.marks.failure.clone());
    letter.dead_letter("nacked", "no").await.unwrap();
    // Not as fast as that goes.
    assert!(next("helixagent.dlq", Duration::ZERO).await.is_none());
    let wait = Duration::from_secs(5);
    let again = next("helixagent.dlq", wait).await.unwrap();
    assert_eq!((&again.id, &again.marks.failure), (&id, &failure));
    // Nor one that is tried again.
    let failure = Failure::now("handler_error", "no", "helixagent.dlq", None);
    let delay = Duration::from_secs(1);
    let retried = again.settle(Verdict::Retry { delay, failure }).await;
    retried.unwrap();
    let again = next("helixagent.dlq", wait).await.unwrap();
    assert_eq!((&again.id, again.retry_count), (&id, 1));
    again.ack().await.unwrap();
    let left = broker.queue_depth(&topic("helixagent.dlq")).await;
    assert_eq!(left.unwrap(), 0);
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
async fn fault_16_two_thousand_messages_have_two_thousand_ids() {
    let broker = broker().await;
    publish(&broker, "tasks.ids", &["x"; 2000]).await;
    let mut consumer = broker
        .consume(
            &queue("tasks.ids"),
            &SubscribeOptions::default().with_prefetch(2000),
        )
        .await
        .unwrap();
    let got = take(&mut consumer, 2000).await;
    let ids: std::collections::HashSet<_> = got.iter().map(|d| d.id.clone()).collect();
    assert_eq!(ids.len(), 2000);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_19_closing_twice_is_fine_and_ends_consumers_and_waits() {
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

/// The next message of a queue, acked.
async fn pop(broker: &EmbeddedBroker, from: &str) -> Option<Message> {
    let delivery = broker
        .dequeue_task(&topic(from), "w", Duration::ZERO)
        .await
        .unwrap()?;
    let message = (*delivery.message).clone();
    delivery.ack().await.unwrap();
    Some(message)
}

fn bound(name: &str, exchange: &str, key: &str) -> QueueSpec {
    QueueSpec {
        name: name.into(),
        options: QueueOptions {
            dead_letter_exchange: Some("dlx".into()),
            dead_letter_routing_key: Some("dlq".into()),
            ..QueueOptions::default()
        },
        bindings: vec![Binding {
            exchange: exchange.into(),
            routing_key: key.into(),
        }],
        aliases: vec![format!("alias-{name}")],
    }
}

fn topology() -> Topology {
    let exchange = |name: &str, kind| ExchangeSpec {
        name: name.into(),
        kind,
        durable: true,
    };
    Topology {
        exchanges: vec![
            exchange("tasks", ExchangeKind::Direct),
            exchange("logs", ExchangeKind::Topic),
            exchange("dlx", ExchangeKind::Direct),
        ],
        queues: vec![
            bound("work", "tasks", "w"),
            bound("all-logs", "logs", "log.#"),
            bound("some-logs", "logs", "log.*"),
            QueueSpec {
                options: QueueOptions::default(),
                ..bound("graveyard", "dlx", "dlq")
            },
        ],
        ..Topology::default()
    }
}

#[tokio::test(start_paused = true)]
async fn aliases_and_exchanges_lead_where_the_topology_says() {
    let broker = broker_with(EmbeddedConfig::default(), topology()).await;
    publish(&broker, "alias-work", &["by alias"]).await;
    assert_eq!(pop(&broker, "work").await.unwrap().payload, "by alias");
    let by = |exchange: &str, key: &str, mandatory| PublishOptions {
        exchange: exchange.into(),
        routing_key: key.into(),
        mandatory,
        ..PublishOptions::default()
    };
    let to = topic("work");
    for (key, all, some) in [("log.a", true, true), ("log.a.b", true, false)] {
        broker
            .publish(&to, message(key), &by("logs", key, true))
            .await
            .unwrap();
        assert_eq!(pop(&broker, "all-logs").await.is_some(), all);
        assert_eq!(pop(&broker, "some-logs").await.is_some(), some);
    }
    let unroutable = broker
        .publish(&to, message("x"), &by("logs", "other", true))
        .await;
    assert_eq!(unroutable.unwrap_err().code(), ErrorCode::PublishRejected);
    broker
        .publish(&to, message("x"), &by("logs", "other", false))
        .await
        .unwrap();
    let nowhere = broker
        .publish(&to, message("x"), &by("missing", "k", true))
        .await;
    assert_eq!(nowhere.unwrap_err().code(), ErrorCode::ExchangeNotFound);
    assert!(broker.topology(false).await.unwrap().is_clean());
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn dead_letters_follow_the_queues_own_exchange() {
    let broker = broker_with(EmbeddedConfig::default(), topology()).await;
    publish(&broker, "work", &["x"]).await;
    let delivery = broker
        .dequeue_task(&topic("work"), "w", Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    broker
        .move_to_dead_letter(delivery, "no use")
        .await
        .unwrap();
    let dead = pop(&broker, "graveyard").await.unwrap();
    assert_eq!(dead.error.as_deref(), Some("no use"));
    assert_eq!(broker.metrics().messages_dead_lettered, 1);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unknown_topic_is_refused_where_nothing_is_made_by_itself() {
    let config = EmbeddedConfig {
        auto_declare: false,
        ..EmbeddedConfig::default()
    };
    let broker = broker_with(config, Topology::default()).await;
    let to = topic("tasks.unknown");
    let refused = broker
        .publish(&to, message("x"), &PublishOptions::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), ErrorCode::TopicNotFound);
    assert!(refused.is_refusal());
    assert!(
        broker
            .open_lane(&to, 0, &LaneOptions::default())
            .await
            .is_err()
    );
    let consumer = broker
        .consume(&queue("tasks.unknown"), &SubscribeOptions::default())
        .await;
    assert_eq!(consumer.unwrap_err().code(), ErrorCode::QueueNotFound);
    broker.ensure(&queue("tasks.unknown")).await.unwrap();
    publish(&broker, "tasks.unknown", &["x"]).await;
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_11_a_batch_says_of_each_message_what_became_of_it() {
    let broker = broker().await;
    let to = topic("tasks.batch");
    let options = QueueOptions {
        max_length: Some(3),
        overflow: Some("reject-publish-dlx".into()),
        ..QueueOptions::default()
    };
    broker.declare_queue(&to, &options).await.unwrap();
    let messages: Vec<_> = (0..5).map(|i| Arc::new(message(&i.to_string()))).collect();
    let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
    let outcomes = broker
        .publish_batch(&to, messages, &PublishOptions::default())
        .await;
    for (i, (outcome, id)) in outcomes.iter().zip(&ids).enumerate() {
        match outcome {
            Ok(receipt) => {
                assert!(i < 3);
                assert_eq!(&receipt.id, id);
            }
            Err(error) => {
                assert!(i >= 3);
                assert_eq!(error.message_id(), Some(id.as_str()));
            }
        }
    }
    assert_eq!(outcomes.len(), 5);
    assert_eq!(broker.queue_depth(&to).await.unwrap(), 3);
    assert_eq!(
        broker.queue_depth(&topic("helixagent.dlq")).await.unwrap(),
        2
    );
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_task_is_not_handed_out_before_it_is_scheduled() {
    let broker = broker().await;
    let to = topic("tasks.later");
    let mut task = Task::new("t", "x");
    task.attributes.scheduled_at = Some(Timestamp::now() + Duration::from_secs(30));
    broker.enqueue_task(&to, task).await.unwrap();
    let before = tokio::time::Instant::now();
    let delivery = broker
        .dequeue_task(&to, "worker-7", Duration::from_secs(60))
        .await
        .unwrap()
        .unwrap();
    assert!(before.elapsed() >= Duration::from_secs(29));
    let task = delivery.task.clone().unwrap();
    assert_eq!(task.worker_id.as_deref(), Some("worker-7"));
    delivery.ack().await.unwrap();
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_03_a_queue_is_declared_once_and_drift_is_named() {
    let broker = broker().await;
    let to = topic("tasks.declared");
    let options = QueueOptions {
        max_priority: Some(10),
        ..QueueOptions::default()
    };
    broker.declare_queue(&to, &options).await.unwrap();
    broker.declare_queue(&to, &options).await.unwrap();
    let error = broker
        .declare_queue(&to, &QueueOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::QueueDeclareFailed);
    assert!(error.message().contains("x-max-priority"), "{error}");
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn purge_leaves_what_is_in_hand_and_delete_voids_it() {
    let broker = broker().await;
    let to = topic("tasks.purge");
    publish(&broker, "tasks.purge", &["held", "b", "c"]).await;
    let held = broker
        .dequeue_task(&to, "w", Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(broker.purge_queue(&to).await.unwrap(), 2);
    let stats = broker.queue_stats(&to).await.unwrap();
    assert_eq!((stats.messages, stats.messages_unacked), (1, Some(1)));
    broker.delete_queue(&to).await.unwrap();
    assert_eq!(held.ack().await.unwrap_err().code(), ErrorCode::AckFailed);
    assert_eq!(
        broker.delete_queue(&to).await.unwrap_err().code(),
        ErrorCode::QueueNotFound
    );
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn unused_and_abandoned_queues_go() {
    let broker = broker().await;
    let (unused, left) = (topic("tasks.unused"), topic("tasks.left"));
    let expires = QueueOptions {
        expires_ms: Some(5000),
        ..QueueOptions::default()
    };
    let auto = QueueOptions {
        auto_delete: true,
        ..QueueOptions::default()
    };
    broker.declare_queue(&unused, &expires).await.unwrap();
    broker.declare_queue(&left, &auto).await.unwrap();
    let mut consumer = broker
        .consume(&queue("tasks.left"), &SubscribeOptions::default())
        .await
        .unwrap();
    consumer.control.begin_stop();
    while consumer.deliveries.recv().await.is_some() {}
    consumer.control.stop().await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    for gone in [&unused, &left] {
        assert_eq!(
            broker.queue_stats(gone).await.unwrap_err().code(),
            ErrorCode::QueueNotFound
        );
    }
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_stops_gives_back_what_nobody_saw_and_waits_for_the_rest() {
    let broker = broker().await;
    let mut consumer = broker
        .consume(&queue("tasks.stop"), &SubscribeOptions::default())
        .await
        .unwrap();
    publish(&broker, "tasks.stop", &["a", "b"]).await;
    let held = take(&mut consumer, 2).await;
    consumer.control.begin_stop();
    assert!(consumer.deliveries.recv().await.is_none());
    publish(&broker, "tasks.stop", &["c"]).await;
    let control = consumer.control.clone();
    let stopped = tokio::spawn(async move { control.stop().await });
    tokio::task::yield_now().await;
    assert!(!stopped.is_finished());
    for delivery in held {
        delivery.ack().await.unwrap();
    }
    stopped.await.unwrap();
    let left = pop(&broker, "tasks.stop").await.unwrap();
    assert_eq!(
        (left.payload.as_ref(), left.redelivered),
        (&b"c"[..], false)
    );
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_exclusive_consumer_keeps_others_out() {
    let broker = broker().await;
    let options = SubscribeOptions {
        exclusive: true,
        ..SubscribeOptions::default()
    };
    let _first = broker.consume(&queue("tasks.ex"), &options).await.unwrap();
    let second = broker
        .consume(&queue("tasks.ex"), &SubscribeOptions::default())
        .await;
    assert_eq!(second.unwrap_err().code(), ErrorCode::SubscribeFailed);
    broker.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fault_19_many_publishers_and_consumers_lose_and_repeat_nothing() {
    const PUBLISHERS: usize = 4;
    const EACH: usize = 500;
    let broker = broker().await;
    let (seen, mut all) = tokio::sync::mpsc::unbounded_channel();
    let mut consumers = Vec::new();
    for _ in 0..4 {
        let mut consumer = broker
            .consume(&queue("tasks.busy"), &SubscribeOptions::default())
            .await
            .unwrap();
        let seen = seen.clone();
        consumers.push(tokio::spawn(async move {
            while let Some(batch) = consumer.deliveries.recv().await {
                for delivery in batch {
                    let id = delivery.id.clone();
                    delivery.ack().await.unwrap();
                    seen.send(id).unwrap();
                }
            }
        }));
    }
    drop(seen);
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|_| {
            let broker = broker.clone();
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..EACH {
                    let m = message("x");
                    ids.push(m.id.clone());
                    broker
                        .publish(&topic("tasks.busy"), m, &PublishOptions::default())
                        .await
                        .unwrap();
                }
                ids
            })
        })
        .collect();
    let mut sent = std::collections::HashSet::new();
    for publisher in publishers {
        sent.extend(publisher.await.unwrap());
    }
    assert_eq!(sent.len(), PUBLISHERS * EACH);
    let mut got = std::collections::HashSet::new();
    while got.len() < sent.len() {
        let id = tokio::time::timeout(Duration::from_secs(20), all.recv())
            .await
            .expect("some messages never came")
            .unwrap();
        assert!(got.insert(id), "a message came twice");
    }
    assert_eq!(got, sent);
    let stats = broker.queue_stats(&topic("tasks.busy")).await.unwrap();
    assert_eq!((stats.messages, stats.message_bytes), (0, Some(0)));
    broker.close().await.unwrap();
    for consumer in consumers {
        consumer.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_brokers_own_bound_is_overload_and_dead_letters_still_find_room() {
    let config = EmbeddedConfig {
        max_bytes: 4096,
        ..EmbeddedConfig::default()
    };
    let broker = broker_with(config, Topology::default()).await;
    let to = topic("tasks.bytes");
    let mut taken = 0;
    let full = loop {
        let outcome = broker
            .publish(&to, message("x"), &PublishOptions::default())
            .await;
        match outcome {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
    };
    assert!(taken > 0 && full.is_retryable() && !full.is_refusal());
    for _ in 0..taken {
        let delivery = broker
            .dequeue_task(&to, "w", Duration::ZERO)
            .await
            .unwrap()
            .unwrap();
        broker.reject_task(delivery).await.unwrap();
    }
    assert_eq!(broker.queue_depth(&to).await.unwrap(), 0);
    let dlq = topic("helixagent.dlq");
    assert_eq!(broker.queue_depth(&dlq).await.unwrap(), taken);
    assert_eq!(broker.purge_queue(&dlq).await.unwrap(), taken);
    publish(&broker, "tasks.bytes", &["room again"]).await;
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lane_of_a_closed_broker_answers_unsent_or_ends() {
    let broker = broker().await;
    let to = topic("tasks.lane.close");
    let mut lane = broker
        .open_lane(&to, 0, &LaneOptions::default())
        .await
        .unwrap();
    broker.close().await.unwrap();
    assert!(lane.submissions.send(Vec::new()).await.is_err());
    assert!(lane.confirmations.recv().await.is_none());
    let again = broker.open_lane(&to, 0, &LaneOptions::default()).await;
    assert_eq!(again.unwrap_err().code(), ErrorCode::OperationCanceled);
}

#[tokio::test(start_paused = true)]
async fn with_auto_ack_a_message_is_done_when_it_is_handed_out() {
    let broker = broker().await;
    let options = SubscribeOptions {
        auto_ack: true,
        ..SubscribeOptions::default().with_prefetch(2)
    };
    let mut consumer = broker
        .consume(&queue("tasks.auto"), &options)
        .await
        .unwrap();
    publish(&broker, "tasks.auto", &["a", "b", "c", "d", "e"]).await;
    let got = take(&mut consumer, 5).await;
    assert_eq!(
        got.iter().map(body).collect::<Vec<_>>(),
        ["a", "b", "c", "d", "e"]
    );
    drop(got);
    let stats = broker.queue_stats(&topic("tasks.auto")).await.unwrap();
    assert_eq!((stats.messages, stats.message_bytes), (0, Some(0)));
    broker.close().await.unwrap();
}
