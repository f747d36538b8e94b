//! Handlers: what fails comes again or goes to the dead letters, never nowhere.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use messaging_hub::{
    broker::{
        HandlerError, MessageBroker, PublishOptions, Received, StartFrom, SubscribeOptions,
        TaskQueueBroker,
    },
    topic::Pattern,
};
use tokio::sync::mpsc;

use super::{body, broker, message, publish, queue, stream, take, topic};

#[tokio::test(start_paused = true)]
async fn a_failing_task_is_tried_as_often_as_it_says_and_then_dead_lettered() {
    let broker = broker().await;
    let attempts = Arc::new(Mutex::new(Vec::new()));
    let seen = attempts.clone();
    let subscription = broker
        .subscribe(
            &queue("tasks.fails"),
            SubscribeOptions::default(),
            Arc::new(move |received: Received| {
                seen.lock().unwrap().push(received.retry_count);
                async move { Err::<(), _>(HandlerError::retry("boom")) }
            }),
        )
        .await
        .unwrap();
    broker
        .publish(
            &topic("tasks.fails"),
            message("x").with_max_retries(4),
            &PublishOptions::default(),
        )
        .await
        .unwrap();
    let dead = loop {
        tokio::time::sleep(Duration::from_secs(30)).await;
        let found = broker
            .dequeue_task(&topic("helixagent.dlq"), "w", Duration::ZERO)
            .await;
        if let Ok(Some(dead)) = found {
            break dead;
        }
    };
    assert_eq!(*attempts.lock().unwrap(), [0, 1, 2, 3, 4]);
    assert_eq!(dead.marks.failure.as_ref().unwrap().details, "boom");
    dead.ack().await.unwrap();
    subscription.unsubscribe().await;
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_10_a_handler_that_panics_kills_nothing_and_loses_nothing() {
    let broker = broker().await;
    let (done, mut handled) = mpsc::unbounded_channel();
    let calls = Arc::new(AtomicU32::new(0));
    let subscription = broker
        .subscribe(
            &queue("tasks.panics"),
            SubscribeOptions {
                retry_delay: Some(Duration::from_secs(1)),
                ..SubscribeOptions::default()
            },
            Arc::new(move |received: Received| {
                let (done, calls) = (done.clone(), calls.clone());
                async move {
                    assert!(
                        calls.fetch_add(1, Ordering::SeqCst) > 0,
                        "the first call panics"
                    );
                    done.send(received.payload.clone()).unwrap();
                    Ok::<(), HandlerError>(())
                }
            }),
        )
        .await
        .unwrap();
    publish(&broker, "tasks.panics", &["a", "b"]).await;
    let mut got = [handled.recv().await.unwrap(), handled.recv().await.unwrap()];
    got.sort();
    assert_eq!(got, ["a", "b"]);
    subscription.unsubscribe().await;
    let stats = broker.queue_stats(&topic("tasks.panics")).await.unwrap();
    assert_eq!((stats.messages, stats.consumers), (0, 0));
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failing_event_is_retried_in_its_place_and_then_dead_lettered() {
    let broker = broker().await;
    let (tried, mut tries) = mpsc::unbounded_channel();
    let subscription = broker
        .subscribe(
            &stream("events.fails"),
            SubscribeOptions::group("g"),
            Arc::new(move |received: Received| {
                let tried = tried.clone();
                async move {
                    tried.send(received.payload.clone()).unwrap();
                    if received.payload == "bad" {
                        return Err(HandlerError::retry("boom"));
                    }
                    Ok(())
                }
            }),
        )
        .await
        .unwrap();
    let key = |b: &str| message(b).with_key("k").with_max_retries(2);
    for b in ["bad", "good"] {
        broker
            .publish(&topic("events.fails"), key(b), &PublishOptions::default())
            .await
            .unwrap();
    }
    for expected in ["bad", "bad", "bad", "good"] {
        assert_eq!(tries.recv().await.unwrap(), expected);
    }
    let mut dead = broker
        .consume(
            &stream("helixagent.dlq.events"),
            &SubscribeOptions::default().starting(StartFrom::Earliest),
        )
        .await
        .unwrap();
    assert_eq!(body(&take(&mut dead, 1).await[0]), "bad");
    subscription.unsubscribe().await;
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fault_08_fault_13_two_subscribers_of_one_event_both_get_it_and_one_may_go() {
    let broker = broker().await;
    let (sent, mut got) = mpsc::unbounded_channel();
    let mut subscriptions = Vec::new();
    for name in ["one", "two"] {
        let sent = sent.clone();
        let subscription = broker
            .subscribe(
                &stream("events.#"),
                SubscribeOptions::default(),
                Arc::new(move |received: Received| {
                    sent.send((name, received.payload.clone())).unwrap();
                    async { Ok::<(), HandlerError>(()) }
                }),
            )
            .await
            .unwrap();
        subscriptions.push(subscription);
    }
    publish(&broker, "events.both", &["a"]).await;
    let mut names = [got.recv().await.unwrap().0, got.recv().await.unwrap().0];
    names.sort_unstable();
    assert_eq!(names, ["one", "two"]);
    subscriptions.pop().unwrap().unsubscribe().await;
    publish(&broker, "events.both", &["b"]).await;
    assert_eq!(got.recv().await.unwrap(), ("one", "b".into()));
    broker
        .unsubscribe(&Pattern::new("events.#").unwrap())
        .await
        .unwrap();
    broker.close().await.unwrap();
}
