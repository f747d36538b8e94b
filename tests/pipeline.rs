//! Pipelines around handlers, over brokers: while what a handler needs is away,
//! nothing is failed, and afterwards everything is handled once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "rabbitmq")]
mod support;
#[cfg(not(feature = "rabbitmq"))]
#[path = "support/wait.rs"]
mod wait;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use messaging_hub::{
    Handler, HandlerError, Message, MessageBroker, Pattern, PublishOptions, SubscribeOptions,
    TaskQueueBroker, Topic,
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    breaker::BreakerState,
    broker::{Received, Source},
    hub::{HubConfig, MessagingHub},
    pipeline::{CircuitBreaker, Field, Piped, Pipeline, Validate},
    topology::Topology,
};
#[cfg(feature = "rabbitmq")]
use support::wait;

const LONG: Duration = Duration::from_secs(600);

/// What handlers need, such as a database: it can be away.
#[derive(Clone, Default)]
struct Service {
    away: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
    handled: Arc<Mutex<Vec<Received>>>,
}

impl Service {
    fn away() -> Self {
        let service = Self::default();
        service.away.store(true, SeqCst);
        service
    }

    fn is_back(&self) {
        self.away.store(false, SeqCst);
    }

    fn use_for(&self, messages: Vec<Received>) -> Result<(), HandlerError> {
        self.calls.fetch_add(1, SeqCst);
        if self.away.load(SeqCst) {
            return Err(HandlerError::retry("the service is away"));
        }
        self.handled.lock().unwrap().extend(messages);
        Ok(())
    }

    fn handler(&self) -> impl Handler + use<> {
        let service = self.clone();
        move |received: Received| {
            let service = service.clone();
            async move { service.use_for(vec![received]) }
        }
    }

    async fn called(&self, times: u32) {
        wait::until(LONG, "the handler is called", || async {
            self.calls.load(SeqCst) >= times
        })
        .await;
    }

    async fn handles(&self, messages: usize) {
        wait::until(LONG, "everything is handled", || async {
            self.handled.lock().unwrap().len() >= messages
        })
        .await;
    }

    fn payloads(&self) -> Vec<String> {
        let handled = self.handled.lock().unwrap();
        let text = |r: &Received| String::from_utf8(r.payload.to_vec()).unwrap();
        handled.iter().map(text).collect()
    }

    /// Each of `n` once, and none of them a second delivery.
    fn handled_each_once(&self, n: usize) {
        let mut payloads = self.payloads();
        payloads.sort();
        let mut expected: Vec<String> = (0..n).map(|n| n.to_string()).collect();
        expected.sort();
        assert_eq!(payloads, expected);
        let handled = self.handled.lock().unwrap();
        for one in handled.iter() {
            assert!(!one.redelivered && one.retry_count == 0, "{one:?}");
        }
    }
}

fn guarded(service: &Service, open_for: Duration) -> Piped<Received> {
    Pipeline::new()
        .logging()
        .circuit_breaker(CircuitBreaker::new(1, open_for))
        .concurrency(4)
        .timeout(Duration::from_secs(5))
        .build(service.handler())
        .unwrap()
}

async fn embedded() -> Arc<EmbeddedBroker> {
    let broker = EmbeddedBroker::new(EmbeddedConfig::default(), Arc::new(Topology::default()));
    broker.connect().await.unwrap();
    broker
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn numbered(n: usize) -> Arc<Message> {
    Arc::new(Message::new("test", n.to_string()))
}

async fn publish(broker: &dyn MessageBroker, to: &Topic, messages: Vec<Arc<Message>>) {
    let options = PublishOptions::default();
    for outcome in broker.publish_batch(to, messages, &options).await {
        outcome.unwrap();
    }
}

fn nothing_failed(broker: &dyn MessageBroker) {
    let counted = broker.metrics();
    assert_eq!(counted.messages_failed, 0);
    assert_eq!(counted.messages_retried, 0);
    assert_eq!(counted.messages_dead_lettered, 0);
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_fails_no_task_and_then_each_is_handled_once() {
    let broker = embedded().await;
    let queue = topic("tasks.paused");
    let service = Service::away();
    let handler = guarded(&service, Duration::from_secs(10));
    let subscription = broker
        .subscribe(
            &Source::Queue(Pattern::from(&queue)),
            SubscribeOptions::default().with_prefetch(5),
            Arc::new(handler.clone()),
        )
        .await
        .unwrap();
    publish(&*broker, &queue, (0..20).map(numbered).collect()).await;
    // More probes than a message has attempts.
    service.called(12).await;
    assert_ne!(handler.circuit(), Some(BreakerState::Closed));
    let stats = broker.queue_stats(&queue).await.unwrap();
    assert_eq!((stats.messages, stats.messages_ready), (20, 15));
    nothing_failed(&*broker);
    service.is_back();
    service.handles(20).await;
    service.handled_each_once(20);
    assert_eq!(handler.circuit(), Some(BreakerState::Closed));
    nothing_failed(&*broker);
    subscription.unsubscribe().await;
    assert_eq!(broker.queue_stats(&queue).await.unwrap().messages, 0);
    broker.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_fails_no_event_and_the_order_of_each_key_is_kept() {
    let broker = embedded().await;
    let stream = topic("events.paused");
    let service = Service::away();
    let handler = guarded(&service, Duration::from_secs(10));
    let subscription = broker
        .subscribe(
            &Source::Stream(Pattern::from(&stream)),
            SubscribeOptions::group("g"),
            Arc::new(handler),
        )
        .await
        .unwrap();
    let keys = ["a", "b", "c"];
    let events = (0..30).map(|n| {
        let key = keys[n % keys.len()];
        Arc::new(Message::new("test", format!("{key}{:02}", n / 3)).with_key(key))
    });
    publish(&*broker, &stream, events.collect()).await;
    service.called(12).await;
    nothing_failed(&*broker);
    service.is_back();
    service.handles(30).await;
    nothing_failed(&*broker);
    let payloads = service.payloads();
    assert_eq!(payloads.len(), 30);
    for key in keys {
        let of_key = payloads.iter().filter(|p| p.starts_with(key));
        let expected: Vec<String> = (0..10).map(|n| format!("{key}{n:02}")).collect();
        assert!(of_key.eq(expected.iter()), "{payloads:?}");
    }
    subscription.unsubscribe().await;
    broker.close().await.unwrap();
}

#[tokio::test]
async fn a_batch_waits_for_the_circuit_and_a_bad_message_fails_alone() {
    let broker = embedded().await;
    let hub = MessagingHub::new(HubConfig::default(), Topology::default());
    hub.set_fallback_broker(broker.clone()).unwrap();
    let service = Service::away();
    let handler = {
        let service = service.clone();
        Pipeline::new()
            .validate(Validate::new().require(Field::Payload))
            .circuit_breaker(CircuitBreaker::new(1, Duration::from_millis(20)))
            .build_batch(move |batch: Vec<Received>| {
                let service = service.clone();
                async move { service.use_for(batch) }
            })
            .unwrap()
    };
    let queue = topic("helixagent.tasks.batched");
    publish(&*broker, &queue, (0..10).map(numbered).collect()).await;
    publish(&*broker, &queue, vec![Arc::new(Message::new("test", ""))]).await;
    let subscription = hub
        .subscribe_batch(
            queue.as_str(),
            SubscribeOptions::default(),
            4,
            Duration::from_millis(50),
            handler,
        )
        .await
        .unwrap();
    service.called(6).await;
    assert!(service.payloads().is_empty());
    service.is_back();
    service.handles(10).await;
    service.handled_each_once(10);
    wait::until(LONG, "only the bad one is dead", || async {
        hub.recorder().snapshot().messages_dead_lettered == 1
    })
    .await;
    assert_eq!(hub.recorder().snapshot().messages_failed, 1);
    subscription.unsubscribe().await;
    hub.close(LONG).await;
    broker.close().await.unwrap();
}

#[cfg(feature = "rabbitmq")]
mod live {
    use super::*;
    use crate::support::{RabbitVersion, need, shared_rabbit, unique};
    use messaging_hub::{
        adapter::rabbitmq::{RabbitMqBroker, RabbitMqConfig},
        broker::QueueOptions,
        secret::Secret,
        topology::{Binding, QueueSpec, TopologyMode},
    };

    fn spec(name: &str, options: QueueOptions, bindings: Vec<Binding>) -> QueueSpec {
        QueueSpec {
            name: name.to_owned(),
            options,
            bindings,
            aliases: Vec::new(),
        }
    }

    #[tokio::test]
    async fn while_the_circuit_is_open_rabbitmq_redelivers_and_buries_nothing() {
        const N: usize = 60;
        for version in RabbitVersion::ALL {
            let rabbit = need!(shared_rabbit(version).await);
            let (work, retry, dead) = (unique("tasks.work"), unique("retry"), unique("dead"));
            let resting = QueueOptions {
                message_ttl_ms: Some(60_000),
                dead_letter_exchange: Some(String::new()),
                dead_letter_strategy: Some("at-least-once".into()),
                overflow: Some("reject-publish".into()),
                ..QueueOptions::default()
            };
            let bound = Binding {
                exchange: retry.clone(),
                routing_key: "#".into(),
            };
            let topology = Topology {
                retry_exchange: Some(retry.clone()),
                dead_letter_queue: Some(dead.clone()),
                queues: vec![
                    spec(&work, QueueOptions::default(), Vec::new()),
                    spec(&retry, resting, vec![bound]),
                    spec(&dead, QueueOptions::default(), Vec::new()),
                ],
                ..Topology::default()
            };
            let config = RabbitMqConfig {
                url: Some(Secret::new(rabbit.url())),
                ..RabbitMqConfig::default()
            };
            let wanted = Arc::new(topology.clone());
            let broker = RabbitMqBroker::new(config, wanted, TopologyMode::Apply);
            broker.connect().await.unwrap();
            let hub = MessagingHub::new(HubConfig::default(), topology);
            hub.set_task_queue_broker(broker.clone());

            let service = Service::away();
            let handler = guarded(&service, Duration::from_millis(200));
            let options = SubscribeOptions::default().with_prefetch(10);
            let subscription = hub
                .subscribe_tasks(&work, options, handler.clone())
                .await
                .unwrap();
            assert!(subscription.active().await);
            let queue = topic(&work);
            publish(&*broker, &queue, (0..N).map(numbered).collect()).await;

            service.called(10).await;
            assert_ne!(handler.circuit(), Some(BreakerState::Closed));
            let ready = |queue: &str| {
                let (broker, queue) = (broker.clone(), topic(queue));
                async move { broker.queue_stats(&queue).await.unwrap().messages_ready }
            };
            wait::until(LONG, "only the prefetch is out", || async {
                ready(&work).await == N as u64 - 10
            })
            .await;
            assert_eq!((ready(&retry).await, ready(&dead).await), (0, 0));

            service.is_back();
            service.handles(N).await;
            service.handled_each_once(N);
            assert_eq!(handler.circuit(), Some(BreakerState::Closed));
            let counted = hub.recorder().snapshot();
            assert_eq!(counted.messages_failed + counted.messages_retried, 0);
            subscription.unsubscribe().await;
            for name in [&work, &retry, &dead] {
                assert_eq!(ready(name).await, 0, "{name}");
            }
            hub.close(LONG).await;
            broker.close().await.unwrap();
        }
    }
}
