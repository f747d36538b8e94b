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
//! cargo bench --bench confirmed_publish -- kafka   # one of rabbitmq, kafka
//! RABBITMQ_URL=... KAFKA_BROKERS=... cargo bench --bench confirmed_publish
//! ```

mod support;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use messaging_hub::{
    MessagingSystem, Outcome,
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::{QueueOptions, QueueType, TopicOptions},
    config::MessagingConfig,
    hub::Publisher,
    topology::{QueueSpec, TopicSpec},
};
use support::{Brokers, Pairs, load, message, rate, raw_amqp::RawAmqp, raw_kafka::RawKafka};

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
        "{} bytes, window {AMQP_WINDOW} (RabbitMQ) and {KAFKA_WINDOW} (Kafka), {PAIRS} pairs of about {} s a side; load {}",
        support::PAYLOAD,
        RUN.as_secs(),
        load()
    );
    let only = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let wanted = |broker: &str| only.as_deref().is_none_or(|o| o == broker);
    if wanted("rabbitmq") {
        rabbitmq(&brokers, &system).await?;
    }
    if wanted("kafka") {
        kafka(&brokers, &system).await?;
    }
    println!("load {}", load());
    system.close().await;
    Ok(())
}

async fn rabbitmq(brokers: &Brokers, system: &MessagingSystem) -> Result<()> {
    let raw = RawAmqp::connect(&brokers.rabbitmq).await?;
    for queue in [QUORUM, CLASSIC] {
        let publisher = system.hub().publisher(queue)?;
        let mut pairs = Pairs::new(&format!("{queue}: raw lapin / hub"));
        let n = [
            calibrate(raw.run(queue, TRIAL, AMQP_WINDOW).await?),
            calibrate(through_hub(&publisher, TRIAL, AMQP_WINDOW, false).await?),
        ];
        for pair in 0..PAIRS {
            let mut rate = [0.0; 2];
            for side in in_turn(pair) {
                raw.purge(queue).await?;
                rate[side] = match side {
                    0 => raw.run(queue, n[0], AMQP_WINDOW).await?,
                    _ => through_hub(&publisher, n[1], AMQP_WINDOW, false).await?,
                };
            }
            pairs.add(rate[0], rate[1]);
        }
        raw.purge(queue).await?;
        pairs.print();
    }
    Ok(())
}

async fn kafka(brokers: &Brokers, system: &MessagingSystem) -> Result<()> {
    let raw = RawKafka::connect(&brokers.kafka)?;
    let publisher = system.hub().publisher(TOPIC)?;
    let mut pairs = Pairs::new(&format!("{TOPIC}: raw rdkafka / hub"));
    let trial = TRIAL * 5;
    // The first of each warms connections and the broker up.
    raw.run(TOPIC, trial, KAFKA_WINDOW).await?;
    through_hub(&publisher, trial, KAFKA_WINDOW, true).await?;
    let n = [
        calibrate(raw.run(TOPIC, trial, KAFKA_WINDOW).await?),
        calibrate(through_hub(&publisher, trial, KAFKA_WINDOW, true).await?),
    ];
    for pair in 0..PAIRS {
        let mut rate = [0.0; 2];
        for side in in_turn(pair) {
            rate[side] = match side {
                0 => raw.run(TOPIC, n[0], KAFKA_WINDOW).await?,
                _ => through_hub(&publisher, n[1], KAFKA_WINDOW, true).await?,
            };
        }
        pairs.add(rate[0], rate[1]);
    }
    pairs.print();
    Ok(())
}

/// Which side runs first: A B, B A, A B, ...
fn in_turn(pair: usize) -> [usize; 2] {
    if pair.is_multiple_of(2) {
        [0, 1]
    } else {
        [1, 0]
    }
}

/// How many messages take about [`RUN`] at this rate.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn calibrate(rate: f64) -> usize {
    ((rate * RUN.as_secs_f64()) as usize).max(TRIAL)
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
        url: Some(messaging_hub::secret::Secret::new(
            brokers.rabbitmq.as_str(),
        )),
        window: AMQP_WINDOW,
        ..RabbitMqConfig::default()
    });
    config.kafka = Some(KafkaConfig {
        brokers: brokers.kafka.split(',').map(str::to_owned).collect(),
        ..KafkaConfig::default()
    });
    // Beside the built-in ones: tasks need their retry queue.
    config.topology.queues.extend([
        queue(QUORUM, QueueType::Quorum),
        queue(CLASSIC, QueueType::Classic),
    ]);
    config.topology.topics.push(TopicSpec {
        name: TOPIC.to_owned(),
        options: TopicOptions {
            partitions: PARTITIONS,
            ..TopicOptions::default()
        },
    });
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

const QUORUM: &str = "tasks.bench.quorum";
const CLASSIC: &str = "tasks.bench.classic";
const TOPIC: &str = "events.bench";
const PARTITIONS: i32 = 6;
const PAIRS: usize = 5;
/// Publishes that may wait for their confirm.
const AMQP_WINDOW: usize = 1000;
const KAFKA_WINDOW: usize = 10_000;
/// Messages of the run that says how many the others have.
const TRIAL: usize = 10_000;
/// How long a run is meant to take.
const RUN: Duration = Duration::from_secs(3);
