//! Of running subscriptions: begun, ended one by one, ended all at once.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::*;
use crate::{
    broker::{
        BrokerType, Consumer, ConsumerControl, Delivery, Handler, HandlerError, Received,
        RetryMode, Settlement, Source, SubscribeOptions, Subscription, Verdict,
        consumer::ConsumerState, direct::scripted::Peer,
    },
    error::{ErrorCode, Result},
    message::{Message, wire::Marks},
    topic::{Pattern, Topic},
};

/// An adapter's consumer that hands out one message and reports that it has
/// stopped once that is settled and it was told to stop.
fn consumer() -> (
    Consumer,
    mpsc::UnboundedSender<Settlement>,
    JoinHandle<Vec<Verdict>>,
) {
    let (batches, deliveries) = mpsc::channel(1);
    let (settling, mut settlements) = mpsc::unbounded_channel::<Settlement>();
    let (control, stopping, state) = ConsumerControl::new();
    let received = Received {
        topic: Topic::new("tasks.test").unwrap(),
        message: Arc::new(Message::new("t", "x")),
        marks: Arc::new(Marks::default()),
        via: BrokerType::InMemory,
    };
    let delivery = Delivery::new(received, settling.clone(), 1);
    let adapter = tokio::spawn(async move {
        let state: watch::Sender<ConsumerState> = state;
        state.send_replace(ConsumerState::Active);
        batches.send(vec![delivery]).await.unwrap();
        stopping.cancelled().await;
        let settled = settlements.recv().await.unwrap();
        state.send_replace(ConsumerState::Stopped);
        vec![settled.verdict]
    });
    let consumer = Consumer {
        deliveries,
        control,
        retry: RetryMode::Broker,
    };
    (consumer, settling, adapter)
}

fn pattern() -> Pattern {
    Pattern::new("tasks.test").unwrap()
}

async fn start(
    subscriptions: &Subscriptions,
    peer: &Peer,
    options: SubscribeOptions,
    handler: impl Handler,
) -> Result<Subscription> {
    let source = Source::Queue(pattern());
    subscriptions
        .start(peer, &source, options, Arc::new(handler), &peer.recorder)
        .await
}

async fn good(_: Received) -> Result<(), HandlerError> {
    Ok(())
}

async fn hangs(_: Received) -> Result<(), HandlerError> {
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn unsubscribing_by_pattern_waits_until_nothing_is_left() {
    let (peer, _) = Peer::new(1);
    let (consumer, _settling, adapter) = consumer();
    peer.consumers.lock().unwrap().push(consumer);
    let all = Subscriptions::default();
    let subscription = start(&all, &peer, SubscribeOptions::default(), good)
        .await
        .unwrap();
    assert!(subscription.active().await);
    while peer.recorder.messages_processed.get() == 0 {
        tokio::task::yield_now().await;
    }
    all.unsubscribe(&pattern()).await.unwrap();
    assert!(matches!(adapter.await.unwrap()[0], Verdict::Ack));
    assert_eq!(peer.recorder.active_subscriptions.get(), 0);
    let error = all.unsubscribe(&pattern()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SubscribeFailed);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_clone_ends_the_subscription() {
    let (peer, _) = Peer::new(1);
    let (consumer, _settling, adapter) = consumer();
    peer.consumers.lock().unwrap().push(consumer);
    let all = Subscriptions::default();
    let subscription = start(&all, &peer, SubscribeOptions::default(), good)
        .await
        .unwrap();
    drop(subscription);
    adapter.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_gives_back_what_a_hanging_handler_holds_and_refuses_new_ones() {
    let (peer, _) = Peer::new(1);
    let (consumer, _settling, adapter) = consumer();
    peer.consumers.lock().unwrap().push(consumer);
    let all = Subscriptions::default();
    let _subscription = start(&all, &peer, SubscribeOptions::default(), hangs)
        .await
        .unwrap();
    while peer.recorder.messages_consumed.get() == 0 {
        tokio::task::yield_now().await;
    }
    all.close_within(Duration::from_secs(5)).await;
    assert!(matches!(adapter.await.unwrap()[0], Verdict::Requeue));

    let asked = peer.asked.lock().unwrap().len();
    let error = start(&all, &peer, SubscribeOptions::default(), good)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled);
    assert_eq!(peer.asked.lock().unwrap().len(), asked);
}

#[tokio::test(start_paused = true)]
async fn a_refused_subscription_is_an_error_and_counted() {
    let (peer, _) = Peer::new(1);
    let all = Subscriptions::default();
    let error = start(&all, &peer, SubscribeOptions::default(), good)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::QueueNotFound);
    assert_eq!(peer.recorder.subscribe_errors.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_id_is_the_consumer_tag() {
    let (peer, _) = Peer::new(1);
    let mut peer = Arc::into_inner(peer).unwrap();
    peer.kind = BrokerType::RabbitMq;
    let all = Subscriptions::default();
    for tag in [Some("mine".to_owned()), None] {
        let (consumer, _settling, _adapter) = consumer();
        peer.consumers.lock().unwrap().push(consumer);
        let options = SubscribeOptions {
            consumer_tag: tag.clone(),
            ..SubscribeOptions::default()
        };
        let subscription = start(&all, &peer, options, good).await.unwrap();
        let asked = peer.asked.lock().unwrap().pop().unwrap();
        assert_eq!(asked.consumer_tag.as_deref(), Some(subscription.id()));
        assert!(tag.is_none_or(|t| t == subscription.id()));
    }
    all.close().await;
}
