//! What the hub costs a publisher: confirmed publishing of 128-byte messages
//! through the hub beside the bare clients that it stands on, to the same
//! queues and topic, with the same properties and headers.
//!
//! Both sides run in one process, in turn (A B, B A, ...), so that what else
//! the machine does falls on both; each pair gives one ratio. It measures
//! publishing alone: nobody consumes, and a queue is purged before each run.
//!
//! ```text
//! cargo bench --bench confirmed_publish            # starts its own brokers
//! RABBITMQ_URL=... KAFKA_BROKERS=... cargo bench --bench confirmed_publish
//! ```

mod support;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions},
};
use messaging_hub::{
    Message, MessagingSystem, Outcome,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{QueueOptions, QueueType, TopicOptions},
    config::MessagingConfig,
    hub::Publisher,
    message::wire::{self, Carrier, Marks},
    topology::{QueueSpec, Topology, TopicSpec},
};
use rdkafka::{
    ClientConfig, ClientContext,
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};

use support::{Brokers, Pairs, body, key, load};

#[tokio::main]
async fn main() -> Result<()> {
    // `cargo test --benches` builds this and runs it with `--test`; a
    // measurement says nothing there.
    if std::env::args().any(|a| a == "--test" || a == "--list") {
        return Ok(());
    }
    let brokers = Brokers::find()?;
    let system = hub(&brokers).await?;
    println!(
        "{PAYLOAD} bytes, window {AMQP_WINDOW} (RabbitMQ) and {KAFKA_WINDOW} (Kafka), {PAIRS} pairs of about {} s a side; load {}",
        RUN.as_secs(),
        load()
    );
    let raw = RawAmqp::connect(&brokers.rabbitmq).await?;
    for queue in [QUORUM, CLASSIC] {
        let publisher = system.hub().publisher(queue)?;
        let mut pairs = Pairs::new(&format!("{queue}: raw lapin / hub"));
        let n = [
            calibrate(raw.run(queue, TRIAL).await?),
            calibrate(through_hub(&publisher, TRIAL, AMQP_WINDOW, false).await?),
        ];
        for pair in 0..PAIRS {
            let mut rate = [0.0; 2];
            for side in in_turn(pair) {
                raw.purge(queue).await?;
                rate[side] = match side {
                    0 => raw.run(queue, n[0]).await?,
                    _ => through_hub(&publisher, n[1], AMQP_WINDOW, false).await?,
                };
            }
            pairs.add(rate[0], rate[1]);
        }
        raw.purge(queue).await?;
        pairs.print();
    }
    let raw = RawKafka::connect(&brokers.kafka)?;
    let publisher = system.hub().publisher(TOPIC)?;
    let mut pairs = Pairs::new(&format!("{TOPIC}: raw rdkafka / hub"));
    let trial = TRIAL * 5;
    // The first of each warms connections and the broker up.
    raw.run(trial).await?;
    through_hub(&publisher, trial, KAFKA_WINDOW, true).await?;
    let n = [
        calibrate(raw.run(trial).await?),
        calibrate(through_hub(&publisher, trial, KAFKA_WINDOW, true).await?),
    ];
    for pair in 0..PAIRS {
        let mut rate = [0.0; 2];
        for side in in_turn(pair) {
            rate[side] = match side {
                0 => raw.run(n[0]).await?,
                _ => through_hub(&publisher, n[1], KAFKA_WINDOW, true).await?,
            };
        }
        pairs.add(rate[0], rate[1]);
    }
    pairs.print();
    println!("load {}", load());
    system.close().await;
    Ok(())
}

/// Which side runs first: A B, B A, A B, ...
fn in_turn(pair: usize) -> [usize; 2] {
    if pair % 2 == 0 { [0, 1] } else { [1, 0] }
}

/// How many messages take about [`RUN`] at this rate.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn calibrate(rate: f64) -> usize {
    ((rate * RUN.as_secs_f64()) as usize).max(TRIAL)
}

fn rate(count: usize, since: Instant) -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let count = count as f64;
    count / since.elapsed().as_secs_f64()
}

/// A hub over both brokers, as a configuration file would make it.
async fn hub(brokers: &Brokers) -> Result<MessagingSystem> {
    let queue = |name: &str, kind| QueueSpec {
        name: name.to_owned(),
        options: QueueOptions {
            queue_type: Some(kind),
            ..QueueOptions::default()
        },
        bindings: Vec::new(),
        aliases: Vec::new(),
    };
    let mut config = MessagingConfig::builtin();
    config.rabbitmq = Some(RabbitMqConfig {
        url: Some(messaging_hub::secret::Secret::new(brokers.rabbitmq.as_str())),
        window: AMQP_WINDOW,
        ..RabbitMqConfig::default()
    });
    config.kafka = Some(KafkaConfig {
        brokers: brokers.kafka.split(',').map(str::to_owned).collect(),
        ..KafkaConfig::default()
    });
    config.topology = Topology {
        queues: vec![
            queue(QUORUM, QueueType::Quorum),
            queue(CLASSIC, QueueType::Classic),
        ],
        topics: vec![TopicSpec {
            name: TOPIC.to_owned(),
            options: TopicOptions {
                partitions: PARTITIONS,
                ..TopicOptions::default()
            },
        }],
        ..Topology::default()
    };
    let system = MessagingSystem::start(config).await?;
    let until = Instant::now() + Duration::from_secs(30);
    while system.hub().state().brokers.iter().any(|b| !b.connected) {
        ensure!(Instant::now() < until, "the hub did not connect in 30 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(system)
}

/// Publishes through the hub's public API, pipelined; the rate.
async fn through_hub(
    publisher: &Publisher,
    count: usize,
    window: usize,
    keyed: bool,
) -> Result<f64> {
    let started = Instant::now();
    let mut waiting = VecDeque::with_capacity(window);
    let mut spooled = 0_usize;
    let mut take = |outcome: messaging_hub::Result<messaging_hub::Receipt>| -> Result<()> {
        match outcome?.outcome {
            Outcome::Delivered { .. } => {}
            Outcome::Spooled { .. } => spooled += 1,
            other => bail!("a publish ended as {other:?}"),
        }
        Ok(())
    };
    for n in 0..count {
        if waiting.len() == window
            && let Some(oldest) = waiting.pop_front()
        {
            take(oldest.await)?;
        }
        waiting.push_back(publisher.enqueue(message(n, keyed)).await?);
    }
    for pending in waiting {
        take(pending.await)?;
    }
    let rate = rate(count, started);
    if spooled > 0 {
        println!("  {spooled} of {count} were spooled: a confirm was late");
    }
    Ok(rate)
}

/// The message of both sides.
fn message(n: usize, keyed: bool) -> Message {
    let message = Message::new(KIND, body(n)).with_content_type("application/json");
    if keyed { message.with_key(key(n)) } else { message }
}

/// lapin alone: one connection, one channel, as many confirms outstanding as
/// the hub's lane has.
struct RawAmqp {
    channel: Channel,
    _connection: Connection,
}

impl RawAmqp {
    async fn connect(url: &str) -> Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .context("lapin cannot connect")?;
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(Self {
            channel,
            _connection: connection,
        })
    }

    async fn purge(&self, queue: &str) -> Result<()> {
        let purged = self
            .channel
            .queue_purge(queue.into(), QueuePurgeOptions::default());
        purged.await.context("the queue cannot be purged")?;
        Ok(())
    }

    async fn run(&self, queue: &str, count: usize) -> Result<f64> {
        let started = Instant::now();
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let mut waiting = FuturesUnordered::new();
        for n in 0..count {
            if waiting.len() == AMQP_WINDOW
                && let Some(confirmed) = waiting.next().await
            {
                acked(confirmed)?;
            }
            let message = message(n, false);
            let properties = properties(&message, queue);
            waiting.push(async move {
                let confirm = self
                    .channel
                    .basic_publish("".into(), queue.into(), options, &message.payload, properties)
                    .await?;
                confirm.await
            });
        }
        while let Some(confirmed) = waiting.next().await {
            acked(confirmed)?;
        }
        Ok(rate(count, started))
    }
}

fn acked(confirmed: lapin::Result<Confirmation>) -> Result<()> {
    match confirmed? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("a publish ended as {other:?}"),
    }
}

/// What the hub puts on the wire.
fn properties(message: &Message, queue: &str) -> BasicProperties {
    let mut table = lapin::types::FieldTable::default();
    for (name, value) in wire::encode(message, queue, &Marks::default(), Carrier::Amqp) {
        let value = lapin::types::LongString::from(value.into_owned());
        table.insert(
            name.into_owned().into(),
            lapin::types::AMQPValue::LongString(value),
        );
    }
    BasicProperties::default()
        .with_headers(table)
        .with_message_id(message.id.as_str().into())
        .with_type(message.kind.as_str().into())
        .with_priority(message.priority.value())
        .with_delivery_mode(2)
        .with_timestamp(u64::try_from(message.timestamp.as_millis() / 1000).unwrap_or(0))
        .with_content_type("application/json".into())
}

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
struct RawKafka {
    producer: Arc<ThreadedProducer<Delivered>>,
    counter: Arc<Counter>,
}

impl RawKafka {
    fn connect(brokers: &str) -> Result<Self> {
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
    async fn run(&self, count: usize) -> Result<f64> {
        let (producer, counter) = (self.producer.clone(), self.counter.clone());
        tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let before = counter.done.load(Relaxed);
            for n in 0..count {
                while n - (counter.done.load(Relaxed) - before) >= KAFKA_WINDOW {
                    std::thread::sleep(PAUSE);
                }
                send(&producer, n)?;
            }
            producer.flush(Duration::from_secs(60))?;
            let failed = counter.failed.load(Relaxed);
            ensure!(failed == 0, "{failed} records failed");
            Ok(rate(count, started))
        })
        .await?
    }
}

fn send(producer: &ThreadedProducer<Delivered>, n: usize) -> Result<()> {
    let message = message(n, true);
    let list = wire::encode(&message, TOPIC, &Marks::default(), Carrier::Kafka);
    let mut headers = OwnedHeaders::new_with_capacity(list.len());
    for (name, value) in &list {
        headers = headers.insert(Header {
            key: name,
            value: Some(value.as_ref()),
        });
    }
    let key = key(n);
    let mut record = BaseRecord::to(TOPIC)
        .key(key.as_bytes())
        .payload(&message.payload[..])
        .timestamp(message.timestamp.as_millis())
        .headers(headers);
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((e, back)) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                record = back;
                std::thread::sleep(PAUSE);
            }
            Err((e, _)) => return Err(e.into()),
        }
    }
}

const QUORUM: &str = "tasks.bench.quorum";
const CLASSIC: &str = "tasks.bench.classic";
const TOPIC: &str = "events.bench";
const KIND: &str = "bench";
const PAYLOAD: usize = 128;
const PARTITIONS: i32 = 6;
const PAIRS: usize = 5;
/// Publishes that may wait for their confirm.
const AMQP_WINDOW: usize = 1000;
const KAFKA_WINDOW: usize = 10_000;
/// Messages of the run that says how many the others have.
const TRIAL: usize = 10_000;
/// How long a run is meant to take.
const RUN: Duration = Duration::from_secs(3);
/// How long the bare producer rests when its window is full.
const PAUSE: Duration = Duration::from_micros(50);
