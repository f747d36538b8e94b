//! Spools that are larger than the memory they may take: ten million messages
//! of as many keys, and a million of 1 KiB. The process that drains them stays
//! under 256 MiB while publishing goes on, and everything arrives.
//!
//! `LARGE_SPOOL=kafka:10000000x16,rabbitmq:1000000x1024` runs it, with any such
//! list of brokers, messages and bytes (`make large-spool`). It needs a few
//! gigabytes of disk and some minutes; build it with `--release`.
#![cfg(all(
    feature = "server",
    feature = "rabbitmq",
    feature = "kafka",
    feature = "journal"
))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use process::Hub;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use reqwest::Client;
use support::{
    DEAD_EVENTS, Kafka, RETRY_EXCHANGE, RETRY_QUEUES, Rabbit, RabbitVersion, need, wait,
};
use tokio::sync::watch;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_larger_than_memory_is_drained_while_publishing_goes_on() {
    let Ok(wanted) = std::env::var("LARGE_SPOOL") else {
        println!("runs with LARGE_SPOOL=kafka:10000000x16,rabbitmq:1000000x1024");
        return;
    };
    for one in wanted.split(',') {
        let (broker, size) = one.split_once(':').expect("broker:COUNTxBYTES");
        let (count, bytes) = size.split_once('x').expect("COUNTxBYTES");
        let (count, bytes) = (count.parse().unwrap(), bytes.parse().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // Brokers end in good order: after a kill a quorum queue as young as this
        // one was seen to take nothing any more, from any client.
        match broker {
            "kafka" => {
                let mut node = need!(Kafka::start().await);
                let setting = format!("kafka:\n  brokers: [\"{}\"]\n", node.bootstrap());
                let hub = begin(folder, "event", &setting, bytes).await;
                node.stop().await;
                let hub = fill(hub, folder, count, bytes).await;
                node.restart().await;
                let all = drain(&hub, count, bytes).await;
                judge(all, read_topic(node.bootstrap(), all));
            }
            "rabbitmq" => {
                let mut node = need!(Rabbit::start(RabbitVersion::V4).await);
                let setting = format!("rabbitmq:\n  url: {}\n", node.url());
                let hub = begin(folder, "task", &setting, bytes).await;
                node.stop().await;
                let hub = fill(hub, folder, count, bytes).await;
                node.restart().await;
                let (total, known) = watch::channel(None);
                let reading = tokio::spawn(read_queue(node.url().to_owned(), known));
                let all = drain(&hub, count, bytes).await;
                total.send_replace(Some(all));
                judge(all, reading.await.unwrap());
            }
            other => panic!("LARGE_SPOOL: {other} is neither kafka nor rabbitmq"),
        }
    }
}

/// A hub beside its broker, with the first message through.
async fn begin(folder: &Path, kind: &str, broker: &str, bytes: usize) -> Hub {
    configure(folder, kind, broker);
    let hub = hub(folder);
    wait::until(LIMIT, "the hub is connected", async || {
        let state = hub.state().await;
        let mut brokers = state["brokers"].as_array().unwrap().iter();
        brokers.any(|b| b["type"] != "inmemory" && b["connected"] == true)
    })
    .await;
    publish(&hub, 0, 1, bytes).await;
    // A lane that was just being opened may have spooled it.
    wait::until(LIMIT, "the first message at the broker", async || {
        hub.spooled().await == 0
    })
    .await;
    hub
}

fn configure(folder: &Path, kind: &str, broker: &str) {
    let (topics, queues) = match kind {
        "event" => (
            format!("    - {{name: {TOPIC}, options: {{partitions: {PARTITIONS}}}}}\n"),
            String::new(),
        ),
        _ => (String::new(), format!("    - {{name: {TOPIC}}}\n")),
    };
    let text = format!(
        "{broker}hub:
  routes:
    - {{pattern: \"{TOPIC}\", kind: {kind}, during_outage: hold}}
  spool: {{max_messages: 20000000, max_bytes: 64000000000, wait: 60s, drain_rate: 0}}
topology:
  defaults: false
  topics:
{topics}{DEAD_EVENTS}  exchanges:
{RETRY_EXCHANGE}  queues:
{queues}{RETRY_QUEUES}"
    );
    std::fs::write(folder.join("hub.yaml"), text).unwrap();
}

fn hub(folder: &Path) -> Hub {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    Hub::start_with(
        &["--config", &path("hub.yaml"), "--data", &path("data")],
        &[("RUST_LOG", "warn")],
    )
}

/// Fills the spool while the broker is away, and hands over to the next process,
/// which finds it on the disk.
async fn fill(hub: Hub, folder: &Path, count: u64, bytes: usize) -> Hub {
    let began = Instant::now();
    let mut from = 1;
    while from < count {
        let to = count.min(from + REQUEST);
        publish(&hub, from, to, bytes).await;
        from = to;
    }
    let took = began.elapsed();
    println!(
        "  {count} messages of {bytes} bytes spooled in {:.0} s, {:.0} a second; peak memory {} MiB",
        took.as_secs_f64(),
        count as f64 / took.as_secs_f64(),
        peak(&hub)
    );
    drop(hub);
    let began = Instant::now();
    let hub = self::hub(folder);
    let found = hub.spooled().await;
    println!(
        "  taken up by the next process in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    assert_eq!(found, count - 1, "of what was answered `durable: true`");
    hub
}

/// Until the spool is empty, publishing all the while; how many there are now.
async fn drain(hub: &Hub, count: u64, bytes: usize) -> u64 {
    let began = Instant::now();
    let mut all = count;
    let mut told = began;
    let mut pace = tokio::time::interval(PACE);
    loop {
        pace.tick().await;
        publish(hub, all, all + TRICKLE, bytes).await;
        all += TRICKLE;
        let left = hub.spooled().await;
        if left == 0 {
            break;
        }
        if told.elapsed() >= TELL {
            println!(
                "  {left} left after {:.0} s, peak memory {} MiB",
                began.elapsed().as_secs_f64(),
                peak(hub)
            );
            told = Instant::now();
        }
        assert!(began.elapsed() < DRAINING, "{left} are left");
        assert!(left < 2 * count, "{left}: it fills and does not drain");
    }
    let (took, memory) = (began.elapsed(), peak(hub));
    println!(
        "  drained in {:.0} s, {:.0} a second, while {} more were published; peak memory {memory} MiB",
        took.as_secs_f64(),
        all as f64 / took.as_secs_f64(),
        all - count
    );
    assert!(memory < MEMORY, "{memory} MiB, {MEMORY} are allowed");
    all
}

async fn publish(hub: &Hub, from: u64, to: u64, bytes: usize) {
    let mut lines = String::new();
    for n in from..to {
        let payload = BASE64_STANDARD.encode(format!("{n:0bytes$}"));
        lines += &format!("{{\"type\":\"large\",\"key\":\"key-{n}\",\"payload\":\"{payload}\"}}\n");
    }
    let response = Client::new()
        .post(hub.at(&format!("/v1/topics/{TOPIC}/messages")))
        .header("content-type", "application/x-ndjson")
        .body(lines)
        .send()
        .await
        .unwrap();
    let text = response.text().await.unwrap();
    let good = |line: &&str| {
        line.contains("\"delivered\"")
            || line.contains("\"spooled\"") && line.contains("\"durable\":true")
    };
    let accepted = text.lines().filter(good).count() as u64;
    let other = text.lines().find(|line| !good(line));
    assert_eq!(accepted, to - from, "{other:?}");
}

/// The most memory that the process ever had, in MiB.
fn peak(hub: &Hub) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", hub.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024
}

/// How often each message arrived.
struct Seen(Vec<u8>);

impl Seen {
    fn note(&mut self, payload: &[u8]) {
        let n: usize = std::str::from_utf8(payload).unwrap().parse().unwrap();
        if self.0.len() <= n {
            self.0.resize(n + 1, 0);
        }
        self.0[n] = self.0[n].saturating_add(1);
    }

    fn missing(&self) -> usize {
        self.0.iter().filter(|n| **n == 0).count()
    }
}

fn judge(all: u64, seen: Seen) {
    assert_eq!(seen.0.len(), index(all), "what was published, and no more");
    let repeats: u64 = seen.0.iter().map(|n| u64::from(n.saturating_sub(1))).sum();
    println!(
        "  {all} published, lost {}, repeated {repeats}",
        seen.missing()
    );
    assert_eq!(seen.missing(), 0, "lost");
}

/// Reads the whole topic. A reader that hears nothing for a while begins anew where it
/// was: with ten million behind a broker of half a GiB that was seen once in each run,
/// while the broker had them all.
fn read_topic(bootstrap: &str, all: u64) -> Seen {
    let mut seen = Seen(vec![0; index(all)]);
    let mut next = [Offset::Beginning; PARTITIONS];
    let mut ends = std::collections::HashSet::new();
    let mut silent = 0;
    while ends.len() < PARTITIONS {
        let before = seen.missing();
        let consumer = reader(bootstrap, &next);
        while ends.len() < PARTITIONS {
            match consumer.poll(SILENCE * 3) {
                Some(Ok(message)) => {
                    seen.note(message.payload().unwrap_or_default());
                    let partition = usize::try_from(message.partition()).unwrap();
                    next[partition] = Offset::Offset(message.offset() + 1);
                }
                Some(Err(rdkafka::error::KafkaError::PartitionEOF(partition))) => {
                    ends.insert(partition);
                }
                Some(Err(error)) => println!("  reading: {error}"),
                None => break,
            }
        }
        if ends.len() < PARTITIONS {
            println!("  the reader heard nothing at {next:?}; another one goes on");
        }
        silent = if seen.missing() < before {
            0
        } else {
            silent + 1
        };
        if silent > 5 {
            for partition in 0..PARTITIONS {
                let partition = i32::try_from(partition).unwrap();
                let there = consumer.fetch_watermarks(TOPIC, partition, LIMIT);
                println!("  partition {partition}: {there:?} at the broker");
            }
            panic!("nothing comes; {} are missing", seen.missing());
        }
    }
    seen
}

/// Without a group: nobody has to let it in.
fn reader(bootstrap: &str, next: &[Offset; PARTITIONS]) -> BaseConsumer {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "none")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let mut all_of_it = TopicPartitionList::new();
    for (partition, offset) in next.iter().enumerate() {
        let partition = i32::try_from(partition).unwrap();
        all_of_it
            .add_partition_offset(TOPIC, partition, *offset)
            .unwrap();
    }
    consumer.assign(&all_of_it).unwrap();
    consumer
}

/// Reads the queue while it is filled, as users do, and until everything came of
/// which `total` says how much it is. A quorum queue that nobody reads is a measure
/// of the broker: with 2.5 million in it RabbitMQ 4.0 took 700 to 6,000 messages with
/// three headers a second, from pika as from the hub, and 10,000 without headers.
async fn read_queue(url: String, mut total: watch::Receiver<Option<u64>>) -> Seen {
    let mut seen = Seen(Vec::new());
    let connection = lapin::Connection::connect(&url, lapin::ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = lapin::options::BasicConsumeOptions {
        no_ack: true,
        ..Default::default()
    };
    let table = lapin::types::FieldTable::default();
    let mut consumer = channel
        .basic_consume(TOPIC.into(), "judge".into(), options, table)
        .await
        .unwrap();
    let mut read = 0;
    loop {
        let all = *total.borrow_and_update();
        let limit = match all {
            None => DRAINING,
            Some(all) if read < all => LIMIT,
            // Repeats may follow the last distinct one.
            Some(_) => SILENCE,
        };
        tokio::select! {
            changed = total.changed(), if all.is_none() => changed.unwrap(),
            next = tokio::time::timeout(limit, consumer.next()) => match next {
                Ok(Some(delivery)) => {
                    seen.note(&delivery.unwrap().data);
                    read += 1;
                }
                _ => {
                    let most = seen.0.len().max(index(all.unwrap_or(read)));
                    seen.0.resize(most, 0);
                    return seen;
                }
            },
        }
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

const TOPIC: &str = "helixagent.large";
const PARTITIONS: usize = 3;
/// Messages of one request.
const REQUEST: u64 = 20_000;
/// Messages of a request while it drains.
const TRICKLE: u64 = 500;
/// Between two words about a long drain.
const TELL: Duration = Duration::from_secs(20);
/// Between two of them.
const PACE: Duration = Duration::from_millis(50);
/// MiB.
const MEMORY: u64 = 256;
const LIMIT: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_secs(3);
const DRAINING: Duration = Duration::from_secs(1_200);
