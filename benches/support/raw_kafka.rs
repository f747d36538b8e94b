//! rdkafka without the hub.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use messaging_hub::message::wire::{self, Carrier, Marks};
use rdkafka::{
    ClientConfig, ClientContext,
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};

use super::{key, message, rate};

/// Counts what was delivered.
#[derive(Default)]
struct Counter {
    done: AtomicUsize,
    failed: AtomicUsize,
}

struct Delivered(Arc<Counter>);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();
    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_err() {
            self.0.failed.fetch_add(1, Relaxed);
        }
        self.0.done.fetch_add(1, Relaxed);
    }
}

/// rdkafka alone, set as the hub sets it.
pub(crate) struct RawKafka {
    producer: Arc<ThreadedProducer<Delivered>>,
    counter: Arc<Counter>,
}

impl RawKafka {
    pub(crate) fn connect(brokers: &str) -> Result<Self> {
        let counter = Arc::new(Counter::default());
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("compression.type", "lz4")
            .set("linger.ms", "5")
            .set("batch.size", (128 * 1024).to_string())
            .create_with_context::<_, ThreadedProducer<_>>(Delivered(counter.clone()))
            .context("rdkafka cannot start")?;
        Ok(Self {
            producer: Arc::new(producer),
            counter,
        })
    }

    /// librdkafka blocks, so it runs on a thread where it may.
    pub(crate) async fn run(
        &self,
        topic: &'static str,
        count: usize,
        window: usize,
    ) -> Result<f64> {
        let (producer, counter) = (self.producer.clone(), self.counter.clone());
        tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let before = counter.done.load(Relaxed);
            for n in 0..count {
                while n - (counter.done.load(Relaxed) - before) >= window {
                    rest();
                }
                send(&producer, topic, n)?;
            }
            producer.flush(Duration::from_secs(60))?;
            let failed = counter.failed.load(Relaxed);
            ensure!(failed == 0, "{failed} records failed");
            Ok(rate(count, started))
        })
        .await?
    }
}

fn send(producer: &ThreadedProducer<Delivered>, topic: &str, n: usize) -> Result<()> {
    let message = message(n, true);
    let marks = Marks::default();
    let list = wire::encode(&message, topic, &marks, Carrier::Kafka);
    let mut headers = OwnedHeaders::new_with_capacity(list.len());
    for (name, value) in &list {
        headers = headers.insert(Header {
            key: name,
            value: Some(value.as_ref()),
        });
    }
    let key = key(n);
    let mut record = BaseRecord::to(topic)
        .key(key.as_bytes())
        .payload(&message.payload[..])
        .timestamp(message.timestamp.as_millis())
        .headers(headers);
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((e, back)) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                record = back;
                rest();
            }
            Err((e, _)) => return Err(e.into()),
        }
    }
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
