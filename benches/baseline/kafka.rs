//! rdkafka without the hub, set as the hub sets it: a threaded producer with
//! delivery callbacks, and a polled consumer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};

use crate::{
    cli::{
        Failure,
        bench::{
            latency::{Tally, now_ns, ns_of},
            load::Load,
            published::Published,
        },
    },
    message::wire::{self, Carrier, Marks},
};

/// A producer; one for each that publishes at once.
#[derive(Clone)]
pub(crate) struct RawProducer {
    producer: Arc<ThreadedProducer<Delivered>>,
    delivered: Arc<Counter>,
}

/// What the callbacks said since the run began.
struct Counter {
    done: AtomicU64,
    failed: AtomicU64,
    run: Mutex<Published>,
}

struct Delivered(Arc<Counter>);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    /// When it was due, in nanoseconds of [`now_ns`]: a number needs no memory of
    /// its own.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, due: usize) {
        if result.is_err() {
            self.0.failed.fetch_add(1, Relaxed);
        }
        let took = now_ns().saturating_sub(due as u64);
        let mut run = self.0.run.lock().unwrap_or_else(PoisonError::into_inner);
        run.took(Duration::from_nanos(took));
        drop(run);
        self.0.done.fetch_add(1, Release);
    }
}

impl RawProducer {
    pub(crate) fn connect(brokers: &str) -> Result<Self, Failure> {
        let delivered = Arc::new(Counter {
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            run: Mutex::new(Published::new()),
        });
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("compression.type", "lz4")
            .set("linger.ms", "5")
            .set("batch.size", (128 * 1024).to_string())
            .set("queue.buffering.max.messages", "200000")
            .create_with_context::<_, ThreadedProducer<_>>(Delivered(delivered.clone()))
            .map_err(|e| Failure::new(format!("rdkafka cannot start: {e}")))?;
        Ok(Self {
            producer: Arc::new(producer),
            delivered,
        })
    }

    /// Publishes what the load says. librdkafka blocks, so it runs on a thread
    /// where it may.
    pub(crate) async fn publish(&self, topic: &str, load: Load) -> Result<Published, Failure> {
        let (this, topic) = (self.clone(), topic.to_owned());
        let running = tokio::task::spawn_blocking(move || this.run(&topic, &load));
        running
            .await
            .map_err(|e| Failure::new(format!("the bare producer ended early: {e}")))?
    }

    fn run(&self, topic: &str, load: &Load) -> Result<Published, Failure> {
        let counter = &self.delivered;
        *counter.run.lock().unwrap_or_else(PoisonError::into_inner) = Published::new();
        let before = counter.done.load(Acquire);
        let mut turns = load.turns()?;
        let mut n = 0;
        let window = load.window as u64;
        loop {
            while n - (counter.done.load(Acquire) - before) >= window {
                rest();
            }
            let Some(due) = turns.next_blocking() else {
                break;
            };
            self.send(topic, load, n, due)?;
            n += 1;
        }
        self.producer
            .flush(FLUSH)
            .map_err(|e| Failure::new(format!("rdkafka cannot flush: {e}")))?;
        let failed = counter.failed.load(Relaxed);
        if failed > 0 {
            return Err(Failure::new(format!(
                "{failed} records of the bare producer failed"
            )));
        }
        let mut run = counter.run.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *run, Published::new()))
    }

    fn send(&self, topic: &str, load: &Load, n: u64, due: Instant) -> Result<(), Failure> {
        let message = load.message(n, due);
        let marks = Marks::default();
        let list = wire::encode(&message, topic, &marks, Carrier::Kafka);
        let mut headers = OwnedHeaders::new_with_capacity(list.len());
        for (name, value) in &list {
            headers = headers.insert(Header {
                key: name,
                value: Some(value.as_ref()),
            });
        }
        let key = message
            .key
            .as_ref()
            .map(|k| k.as_bytes())
            .unwrap_or_default();
        let stamp = usize::try_from(ns_of(due)).unwrap_or(0);
        let mut record = BaseRecord::with_opaque_to(topic, stamp)
            .key(key)
            .payload(&message.payload[..])
            .timestamp(message.timestamp.as_millis())
            .headers(headers);
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((e, back)) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                    record = back;
                    rest();
                }
                Err((e, _)) => {
                    return Err(Failure::new(format!("rdkafka takes no record: {e}")));
                }
            }
        }
    }
}

/// Starts a consumer of a group on a thread of its own, from the beginning of
/// the topic until told to stop.
pub(crate) fn consume(
    brokers: &str,
    topic: &str,
    group: &str,
    tally: Arc<Tally>,
) -> Result<RawConsumer, Failure> {
    let failed = |e| Failure::new(format!("the bare consumer cannot start: {e}"));
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        .set("queued.max.messages.kbytes", (16 * 1024).to_string())
        .create()
        .map_err(failed)?;
    consumer.subscribe(&[topic]).map_err(failed)?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = stop.clone();
    let thread = std::thread::Builder::new()
        .name("bare-consumer".to_owned())
        .spawn(move || {
            while !stopping.load(Relaxed) {
                // Errors of the connection pass; what never comes, the run notices.
                if let Some(Ok(_message)) = consumer.poll(POLL) {
                    tally.count_one();
                }
            }
            consumer.unsubscribe();
        })
        .map_err(|e| Failure::new(format!("no thread can be started: {e}")))?;
    Ok(RawConsumer {
        stop,
        thread: Some(thread),
    })
}

/// A running consumer; it is told to end when this is dropped.
pub(crate) struct RawConsumer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl RawConsumer {
    /// Ends it and waits until it has left its group.
    pub(crate) async fn stop(mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended too.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Drop for RawConsumer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Makes a topic with one replica.
pub(crate) async fn create_topic(
    brokers: &str,
    topic: &str,
    partitions: i32,
) -> Result<(), Failure> {
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    let made = admin(brokers)?
        .create_topics([&new], &patience())
        .await
        .map_err(|e| Failure::new(format!("Kafka cannot be asked for a topic: {e}")))?;
    match made.into_iter().next() {
        Some(Err((_, code))) => Err(Failure::new(format!(
            "Kafka does not make the topic {topic}: {code}"
        ))),
        _ => Ok(()),
    }
}

pub(crate) async fn delete_topic(brokers: &str, topic: &str) -> Result<(), Failure> {
    let deleted = admin(brokers)?
        .delete_topics(&[topic], &patience())
        .await
        .map_err(|e| Failure::new(e.to_string()))?;
    match deleted.into_iter().next() {
        Some(Err((_, code))) => Err(Failure::new(code.to_string())),
        _ => Ok(()),
    }
}

pub(crate) async fn delete_group(brokers: &str, group: &str) -> Result<(), Failure> {
    admin(brokers)?
        .delete_groups(&[group], &patience())
        .await
        .map_err(|e| Failure::new(e.to_string()))?;
    Ok(())
}

fn admin(brokers: &str) -> Result<AdminClient<DefaultClientContext>, Failure> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .map_err(|e| Failure::new(format!("rdkafka cannot start: {e}")))
}

fn patience() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(Duration::from_secs(15)))
        .operation_timeout(Some(Duration::from_secs(15)))
}

#[allow(
    clippy::disallowed_methods,
    reason = "a thread of its own, and a wake-up for each delivery would slow the bare client down"
)]
fn rest() {
    std::thread::sleep(PAUSE);
}

/// How long the producer rests when its window is full.
const PAUSE: Duration = Duration::from_micros(50);
/// How long what was sent may take at the end of a run.
const FLUSH: Duration = Duration::from_secs(60);
/// How long a poll waits, and so how soon a consumer sees that it shall end.
const POLL: Duration = Duration::from_millis(100);
