//! Readers that know nothing of the hub: a bare client that reads what is committed
//! (or everything) up to where the broker says that it ends, and Kafka's own console.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{BorrowedMessage, Headers as _, Message as _},
};

use crate::{common::WAIT, support::Kafka};

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) id: String,
    pub(crate) body: String,
    pub(crate) headers: BTreeMap<String, String>,
}

/// What readers of what is committed see of topics now.
pub(crate) async fn committed(bootstrap: &str, topics: &[&str]) -> Vec<Seen> {
    read(bootstrap, topics, "read_committed").await
}

/// The same, once so many are seen or it takes too long: Kafka answers a commit when it
/// is decided, and readers see it when that is written to each partition.
pub(crate) async fn committed_n(bootstrap: &str, topics: &[&str], n: usize) -> Vec<Seen> {
    committed_when(bootstrap, topics, WAIT, |seen| seen.len() >= n).await
}

/// The same, for what is enough.
pub(crate) async fn committed_when(
    bootstrap: &str,
    topics: &[&str],
    within: Duration,
    is_enough: impl Fn(&[Seen]) -> bool,
) -> Vec<Seen> {
    let until = std::time::Instant::now() + within;
    loop {
        let seen = committed(bootstrap, topics).await;
        if is_enough(&seen) || std::time::Instant::now() > until {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Everything that was written, also what was aborted.
pub(crate) async fn written(bootstrap: &str, topics: &[&str]) -> Vec<Seen> {
    read(bootstrap, topics, "read_uncommitted").await
}

async fn read(bootstrap: &str, topics: &[&str], isolation: &str) -> Vec<Seen> {
    let topics: Vec<String> = topics.iter().map(|t| (*t).to_owned()).collect();
    let (bootstrap, isolation) = (bootstrap.to_owned(), isolation.to_owned());
    tokio::task::spawn_blocking(move || read_now(&bootstrap, &topics, &isolation))
        .await
        .unwrap()
}

fn read_now(bootstrap: &str, topics: &[String], isolation: &str) -> Vec<Seen> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "a-bare-reader")
        .set("enable.auto.commit", "false")
        .set("isolation.level", isolation)
        .set("enable.partition.eof", "true")
        .set("reconnect.backoff.max.ms", "200")
        .create()
        .unwrap();
    let until = std::time::Instant::now() + 2 * WAIT;
    let mut seen = Vec::new();
    for topic in topics {
        let metadata = (0..30)
            .find_map(|_| consumer.fetch_metadata(Some(topic), WAIT).ok())
            .expect("metadata");
        let mut list = TopicPartitionList::new();
        for partition in metadata.topics()[0].partitions() {
            list.add_partition_offset(topic, partition.id(), Offset::Beginning)
                .unwrap();
        }
        consumer.assign(&list).unwrap();
        // One topic at a time, since an end says the partition only; and a partition
        // that others write to meanwhile has several.
        let mut ended = BTreeSet::new();
        while ended.len() < list.count() {
            assert!(
                std::time::Instant::now() < until,
                "the ends were not reached"
            );
            match consumer.poll(Duration::from_millis(200)) {
                None => {}
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    ended.insert(partition);
                }
                // While the broker is away.
                Some(Err(_)) => {}
                Some(Ok(m)) => seen.push(taken_down(&m)),
            }
        }
    }
    seen
}

fn taken_down(m: &BorrowedMessage<'_>) -> Seen {
    let headers: BTreeMap<String, String> = m
        .headers()
        .into_iter()
        .flat_map(|h| h.iter())
        .map(|h| {
            let value = String::from_utf8_lossy(h.value.unwrap_or_default());
            (h.key.to_owned(), value.into_owned())
        })
        .collect();
    Seen {
        topic: m.topic().to_owned(),
        partition: m.partition(),
        offset: m.offset(),
        id: headers.get("hub-id").cloned().unwrap_or_default(),
        body: String::from_utf8_lossy(m.payload().unwrap_or_default()).into_owned(),
        headers,
    }
}

/// Watches how much was written to a topic, committed or not.
pub(crate) struct Ends {
    consumer: BaseConsumer,
    topic: String,
}

impl Ends {
    pub(crate) fn new(bootstrap: &str, topic: &str) -> Self {
        let consumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("group.id", "a-bare-reader")
            // Else the end is where the oldest open transaction begins.
            .set("isolation.level", "read_uncommitted")
            .create()
            .unwrap();
        Self {
            consumer,
            topic: topic.to_owned(),
        }
    }

    /// Behind the last record of a partition, markers included.
    pub(crate) fn of(&self, partition: i32) -> i64 {
        tokio::task::block_in_place(|| {
            let ends = self.consumer.fetch_watermarks(&self.topic, partition, WAIT);
            ends.unwrap().1
        })
    }
}

/// The bodies that Kafka's own console shows to a reader of what is committed.
pub(crate) async fn console(node: &Kafka, topic: &str) -> Vec<String> {
    let shown = node
        .ctl(&[
            "org.apache.kafka.tools.consumer.ConsoleConsumer",
            "--topic",
            topic,
            "--from-beginning",
            "--timeout-ms",
            "8000",
            "--isolation-level",
            "read_committed",
        ])
        .await;
    shown.lines().map(str::to_owned).collect()
}

/// How often each thing comes, for what is to come once.
pub(crate) fn counts(bodies: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for body in bodies {
        *counts.entry(body).or_default() += 1;
    }
    counts
}
