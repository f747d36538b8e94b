//! Readers at the broker with clients that are not ours: bare lapin, bare
//! rdkafka. Both survive restarts of the broker and of themselves, and count
//! what the loss of their own connections may repeat.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::message::Headers as _;
use rdkafka::{ClientConfig, Message as _, Offset, TopicPartitionList};
use tokio::task::JoinHandle;

use crate::book::{Arrival, Book, Reader, hash};

/// One foreign reader.
pub struct Foreign {
    shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
}

enum From {
    /// The broker's address, and the queue that has a copy of everything.
    Queue { url: String, queue: String },
    /// The broker's address.
    Topic { bootstrap: String },
}

struct Shared {
    from: From,
    book: Arc<Book>,
    stop: AtomicBool,
    /// End without a word, with everything unsettled.
    die: AtomicBool,
    /// How often it found nothing left to read.
    ends: AtomicU64,
    /// What had been delivered and was not surely settled when a connection
    /// of its own was lost, all losses together.
    repeatable: AtomicU64,
}

impl Foreign {
    pub fn of_queue(book: &Arc<Book>, url: String, queue: String) -> Self {
        Self::start(book, From::Queue { url, queue })
    }

    pub fn of_topic(book: &Arc<Book>, bootstrap: String) -> Self {
        Self::start(book, From::Topic { bootstrap })
    }

    fn start(book: &Arc<Book>, from: From) -> Self {
        let shared = Arc::new(Shared {
            from,
            book: book.clone(),
            stop: AtomicBool::new(false),
            die: AtomicBool::new(false),
            ends: AtomicU64::new(0),
            repeatable: AtomicU64::new(0),
        });
        let mut reader = Self { shared, task: None };
        reader.start_again();
        reader
    }

    /// How often it has found nothing left.
    pub fn ends(&self) -> u64 {
        self.shared.ends.load(Ordering::SeqCst)
    }

    /// Deliveries that a loss of its own connections may have repeated.
    pub fn repeatable(&self) -> u64 {
        self.shared.repeatable.load(Ordering::SeqCst)
    }

    pub fn start_again(&mut self) {
        self.shared.stop.store(false, Ordering::SeqCst);
        self.shared.die.store(false, Ordering::SeqCst);
        let shared = self.shared.clone();
        self.task = Some(match shared.from {
            From::Queue { .. } => tokio::spawn(async move { shared.read_queues().await }),
            From::Topic { .. } => tokio::task::spawn_blocking(move || shared.read_topics()),
        });
    }

    /// Ends it with everything unsettled; nobody is told.
    pub async fn kill(&mut self) {
        self.shared.die.store(true, Ordering::SeqCst);
        self.joined().await;
    }

    /// Ends it in good order.
    pub async fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.joined().await;
    }

    async fn joined(&mut self) {
        if let Some(task) = self.task.take() {
            task.await.expect("a reader does not panic");
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // The thread of a Kafka reader ends by this.
        self.shared.die.store(true, Ordering::SeqCst);
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Shared {
    fn over(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.die.load(Ordering::SeqCst)
    }

    async fn read_queues(&self) {
        while !self.over() {
            let before = self.book.arrived(Reader::Foreign);
            if let Err(error) = self.read_queue().await {
                println!("  the foreign reader begins again: {error}");
                // A link that was lost, or a process that was: acks have no
                // confirms, so as much as may be unsettled may come again.
                let new = self.book.arrived(Reader::Foreign) - before;
                let again = u64::from(PREFETCH).min(new as u64);
                self.repeatable.fetch_add(again, Ordering::SeqCst);
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// A connection that broke may leave a call of the client waiting for ever,
    /// so each has its time.
    async fn consume(
        url: &str,
        queue: &str,
    ) -> Result<(lapin::Connection, lapin::Channel, lapin::Consumer), lapin::Error> {
        let connection =
            lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel
            .basic_qos(PREFETCH, BasicQosOptions::default())
            .await?;
        let consumer = channel
            .basic_consume(
                queue.into(),
                "foreign".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok((connection, channel, consumer))
    }

    /// Ok: ended in good order.
    async fn read_queue(&self) -> Result<(), lapin::Error> {
        let From::Queue { url, queue } = &self.from else {
            return Ok(());
        };
        let (connection, channel, mut consumer) = within(Self::consume(url, queue)).await?;
        let (mut silent, mut unheard) = (0, 0);
        loop {
            if self.die.load(Ordering::SeqCst) {
                return Err(gone());
            }
            if self.stop.load(Ordering::SeqCst) {
                let cancel = channel.basic_cancel("foreign".into(), BasicCancelOptions::default());
                within(cancel).await?;
                within(connection.close(200, "done".into())).await?;
                return Ok(());
            }
            match tokio::time::timeout(LOOK, consumer.next()).await {
                Ok(Some(delivery)) => {
                    (silent, unheard) = (0, 0);
                    let delivery = delivery?;
                    let properties = &delivery.properties;
                    let headers = properties.headers().as_ref();
                    let text = |name: &str| match headers.and_then(|h| h.inner().get(name)) {
                        Some(AMQPValue::LongString(s)) => Some(s.to_string()),
                        _ => None,
                    };
                    let id = properties.message_id().as_ref();
                    self.book.arrives(
                        Reader::Foreign,
                        Arrival {
                            id: id.map(ToString::to_string).unwrap_or_default(),
                            key: text("hub-key"),
                            payload_hash: hash(&delivery.data),
                            marked: delivery.redelivered
                                || text("hub-possible-duplicate").is_some(),
                            again: delivery.redelivered,
                            settled: true,
                            life: 0,
                        },
                    );
                    within(delivery.ack(BasicAckOptions::default())).await?;
                }
                Ok(None) => {
                    return Err(gone());
                }
                // Nothing came: is there nothing? A link that is dead does not
                // answer that either.
                Err(_) => {
                    let passive = QueueDeclareOptions {
                        passive: true,
                        ..QueueDeclareOptions::default()
                    };
                    let asked = channel.queue_declare(
                        queue.as_str().into(),
                        passive,
                        FieldTable::default(),
                    );
                    match tokio::time::timeout(LOOK * 10, asked).await {
                        Ok(answer) => {
                            unheard = 0;
                            let empty = answer?.message_count() == 0;
                            silent = if empty { silent + 1 } else { 0 };
                            // What was on its way at the first look has come by the second.
                            if silent > 1 {
                                self.ends.fetch_add(1, Ordering::SeqCst);
                            }
                        }
                        Err(_) => {
                            silent = 0;
                            unheard += 1;
                            if unheard > UNHEARD {
                                return Err(gone());
                            }
                        }
                    }
                }
            }
        }
    }

    fn read_topics(&self) {
        while !self.over() {
            if self.read_topic().is_none() {
                std::thread::park_timeout(RETRY);
            }
        }
    }

    /// Reads by its own assignment, from what its group has committed.
    fn read_topic(&self) -> Option<()> {
        let From::Topic { bootstrap } = &self.from else {
            return None;
        };
        let topic = self.book.topic.as_str();
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("group.id", "foreign")
            .set("enable.auto.commit", "false")
            .set("reconnect.backoff.max.ms", "500")
            .create()
            .ok()?;
        let metadata = consumer.fetch_metadata(Some(topic), OPEN).ok()?;
        let count = metadata.topics().first()?.partitions().len();
        let mut wanted = TopicPartitionList::new();
        for partition in 0..count as i32 {
            wanted.add_partition(topic, partition);
        }
        let committed = consumer.committed_offsets(wanted, OPEN).ok()?;
        let mut next: BTreeMap<i32, i64> = BTreeMap::new();
        let mut assignment = TopicPartitionList::new();
        for element in committed.elements() {
            let from = match element.offset() {
                Offset::Offset(offset) => offset,
                _ => 0,
            };
            next.insert(element.partition(), from);
            assignment
                .add_partition_offset(topic, element.partition(), Offset::Offset(from))
                .ok()?;
        }
        consumer.assign(&assignment).ok()?;
        let (mut uncommitted, mut unheard) = (0, 0);
        loop {
            if self.die.load(Ordering::SeqCst) {
                self.repeatable
                    .fetch_add(uncommitted + unheard, Ordering::SeqCst);
                return Some(());
            }
            let stop = self.stop.load(Ordering::SeqCst);
            match consumer.poll(LOOK) {
                Some(Ok(message)) => {
                    let header = |name: &str| {
                        let headers = message.headers()?;
                        let found = headers.iter().find(|h| h.key == name)?;
                        Some(String::from_utf8_lossy(found.value?).into_owned())
                    };
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    next.insert(message.partition(), message.offset() + 1);
                    uncommitted += 1;
                    self.book.arrives(
                        Reader::Foreign,
                        Arrival {
                            id: header("hub-id").unwrap_or_default(),
                            key: message.key().map(text),
                            payload_hash: hash(message.payload().unwrap_or_default()),
                            marked: header("hub-possible-duplicate").is_some(),
                            again: false,
                            settled: true,
                            life: 0,
                        },
                    );
                }
                Some(Err(_)) => {}
                None if self.at_end(&consumer, &next) => {
                    self.ends.fetch_add(1, Ordering::SeqCst);
                }
                None => {}
            }
            if uncommitted >= COMMIT || stop {
                let mut positions = TopicPartitionList::new();
                for (partition, offset) in &next {
                    positions
                        .add_partition_offset(topic, *partition, Offset::Offset(*offset))
                        .ok()?;
                }
                // Waiting for the answer could last as long as the broker is away:
                // what this one commits counts as settled with the next.
                if consumer.commit(&positions, CommitMode::Async).is_ok() {
                    (unheard, uncommitted) = (uncommitted, 0);
                }
            }
            if stop {
                // What could not be committed comes again.
                self.repeatable
                    .fetch_add(uncommitted + unheard, Ordering::SeqCst);
                return Some(());
            }
        }
    }

    fn at_end(&self, consumer: &BaseConsumer, next: &BTreeMap<i32, i64>) -> bool {
        !next.is_empty()
            && next.iter().all(|(partition, offset)| {
                consumer
                    .fetch_watermarks(&self.book.topic, *partition, Duration::from_secs(2))
                    .is_ok_and(|(_, high)| high == *offset)
            })
    }
}

async fn within<T>(
    call: impl std::future::Future<Output = Result<T, lapin::Error>>,
) -> Result<T, lapin::Error> {
    match tokio::time::timeout(OPEN, call).await {
        Ok(answer) => answer,
        Err(_) => Err(gone()),
    }
}

fn gone() -> lapin::Error {
    lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into()
}

const PREFETCH: u16 = 200;
/// Records between two commits.
const COMMIT: u64 = 500;
/// Questions of a second each that get no answer, before a link counts as dead.
const UNHEARD: u32 = 5;
const LOOK: Duration = Duration::from_millis(100);
const OPEN: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(50);
