//! Lanes: each is a task that writes one partition's records, in order, into a
//! producer that all lanes of a codec share.
//!
//! A lane ends with the first unknown outcome, with a fatal error of its
//! producer, and when the broker closes. Its confirmation channel closes by
//! itself after the last answer, because each record carries its share of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    client,
    config::KafkaConfig,
    error::{fate, invalid},
    link::Link,
    partitioner::Partitioner,
    producer::{self, LaneEnd, Producer, Reaper, Record, Reply, Ticket},
    record,
    topics::Topics,
};
use crate::{
    broker::{
        BrokerType, Compression, Confirmation, Fate, Lane, LaneOptions, OrderKey, Submission,
        lane::LanePort,
    },
    error::{Error, ErrorCode, Result},
    message::{Message, wire::Marks},
    topic::Topic,
};

/// What a producer is made for: a codec, and the largest batch.
type Make = (Compression, usize);

/// Opens lanes and keeps the producers under them.
pub(super) struct Publisher {
    config: Arc<KafkaConfig>,
    topics: Arc<Topics>,
    link: Arc<Link>,
    reaper: Reaper,
    partitioner: Partitioner,
    producers: Mutex<HashMap<Make, Arc<Producer>>>,
    /// One for each way of producing, idle, for when the one in use is given up.
    /// An idempotent producer asks for its number when it is made, and the client
    /// library asks a cluster that is not ready only twice a second: behind an
    /// outage that costs up to a second, which a number from before it saves.
    reserves: Mutex<HashMap<Make, Arc<Producer>>>,
    lanes: TaskTracker,
    closing: CancellationToken,
}

impl Publisher {
    pub(super) fn new(
        config: Arc<KafkaConfig>,
        topics: Arc<Topics>,
        link: Arc<Link>,
        reaper: Reaper,
    ) -> Self {
        let partitioner = if config.murmur2_partitioner {
            Partitioner::Murmur2
        } else {
            Partitioner::Crc32
        };
        Self {
            config,
            topics,
            link,
            reaper,
            partitioner,
            producers: Mutex::default(),
            reserves: Mutex::default(),
            lanes: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    pub(super) fn partitioner(&self) -> Partitioner {
        self.partitioner
    }

    /// Opens a lane of a topic that is known to exist.
    ///
    /// # Errors
    /// A refusal of options that Kafka does not have.
    pub(super) fn open(
        self: &Arc<Self>,
        topic: &Topic,
        partitions: i32,
        options: &LaneOptions,
    ) -> Result<Lane> {
        if options.address.is_some() {
            return Err(invalid(
                "exchange and routing_key are AMQP's; on Kafka publish to the topic, with a key or a partition",
            )
            .on(topic.as_str()));
        }
        let producer = self.producer(topic, options.compression)?;
        // The configuration bounds what a caller may ask for.
        let options = LaneOptions {
            window: options.window.min(self.config.window).max(1),
            ..options.clone()
        };
        let (lane, port) = Lane::pair(&options);
        let writer = Writer {
            publisher: Arc::clone(self),
            // A fatal error of the producer ends all its lanes.
            end: Arc::new(LaneEnd::new(producer.shared.dead.child_token())),
            producer,
            topic: topic.clone(),
            partitions,
            confirm: options.confirm,
        };
        self.lanes.spawn(writer.run(port));
        Ok(lane)
    }

    /// Writes one message outside of any lane and waits for its outcome.
    pub(super) async fn send_one(
        self: &Arc<Self>,
        topic: &Topic,
        message: &Message,
        marks: &Marks,
    ) -> Fate {
        let producer = match self.producer(topic, None) {
            Ok(producer) => producer,
            Err(error) => return Fate::Unsent(error),
        };
        let order = message.key.as_ref().map_or_else(
            || OrderKey::Publisher(u64::from(crc32fast::hash(message.id.as_str().as_bytes()))),
            |key| OrderKey::Key(key.clone()),
        );
        let (tx, mut outcome) = oneshot::channel();
        let ticket = Box::new(Ticket {
            reply: Reply::One(tx),
            lane: None,
            bytes: 0,
        });
        let until = self.closing.clone();
        let place = (topic, self.partitions(topic, 0));
        self.write(&producer, place, (message, marks, &order), ticket, &until)
            .await;
        // Held on to, a producer that was given up would never be purged.
        let dead = producer.shared.dead.clone();
        drop(producer);
        let told = tokio::select! {
            told = &mut outcome => told,
            () = dead.cancelled() => {
                drop(self.living());
                outcome.await
            }
        };
        told.unwrap_or_else(|_| {
            Fate::Unknown(Error::unknown(
                ErrorCode::PublishFailed,
                "the producer ended without an outcome",
            ))
        })
    }

    /// Stops lanes, waits for what is queued, and ends the producers. Says
    /// whether everything queued has its outcome.
    pub(super) async fn close(&self) -> bool {
        self.closing.cancel();
        self.lanes.close();
        self.lanes.wait().await;
        let idle = std::mem::take(&mut *guard(&self.reserves));
        drop(idle);
        let producers: Vec<_> = self.producers().drain().map(|(_, p)| p).collect();
        // What is queued is answered, one way or the other, within this time.
        let within = self.config.message_timeout + FLUSH_SLACK;
        let mut flushed = true;
        for producer in producers {
            flushed &= tokio::task::spawn_blocking(move || producer.flush(within))
                .await
                .unwrap_or(false);
        }
        flushed
    }

    /// The producer for a topic and codec; made when there is none that lives.
    fn producer(
        self: &Arc<Self>,
        topic: &Topic,
        compression: Option<Compression>,
    ) -> Result<Arc<Producer>> {
        let compression = compression.unwrap_or(self.config.compression);
        let batch = self.batch_bytes([topic]);
        let make = (compression, batch);
        let mut producers = self.living();
        if let Some(producer) = producers.get(&make) {
            return Ok(Arc::clone(producer));
        }
        let reserve = guard(&self.reserves).remove(&make);
        let producer = match reserve.filter(|p| !p.shared.dead.is_cancelled()) {
            Some(reserve) => reserve,
            None => self.make(make)?,
        };
        producers.insert(make, Arc::clone(&producer));
        drop(producers);
        let this = Arc::clone(self);
        let (shared, topic) = (Arc::clone(&producer.shared), topic.clone());
        let unproven = Arc::downgrade(&producer);
        self.lanes.spawn(async move {
            let hasten = hasten(unproven, topic, this.lanes.clone());
            this.look_after(make, &shared, hasten).await;
        });
        Ok(producer)
    }

    /// The largest batch that all of these topics take.
    pub(super) fn batch_bytes<'a>(&self, topics: impl IntoIterator<Item = &'a Topic>) -> usize {
        // A batch over the topic's limit would be refused whole, small records
        // included. Halving down keeps the number of producers small.
        let mut batch = self.config.batch_size.max(1);
        let limits = topics.into_iter().filter_map(|t| self.topics.get(t));
        if let Some(limit) = limits.filter_map(|f| f.max_bytes).min() {
            while batch > limit && batch > SMALLEST_BATCH {
                batch /= 2;
            }
        }
        batch
    }

    fn make(&self, (compression, batch): Make) -> Result<Arc<Producer>> {
        let config = client::producer(&self.config, compression, batch)?;
        let link = Arc::clone(&self.link);
        Producer::new(&config, batch, link, self.reaper.clone()).map(Arc::new)
    }

    /// Hastens a producer that has stored nothing yet, gives it a reserve once it has,
    /// and gives it up when it stands still.
    async fn look_after(
        &self,
        make: Make,
        shared: &producer::Shared,
        hasten: impl Future<Output = ()>,
    ) {
        let limit = self.config.message_timeout;
        let mut without = self.config.enable_idempotence;
        let mut hastens = without;
        tokio::pin!(hasten);
        loop {
            tokio::select! {
                () = shared.proven(), if without => {
                    (without, hastens) = (false, false);
                    self.reserve(make);
                }
                () = &mut hasten, if hastens => hastens = false,
                () = shared.stalled(limit) => {
                    tracing::warn!(target: "messaging_hub::kafka", ?limit,
                        "no outcome came for so long that the producer is given up");
                    shared.dead.cancel();
                    return;
                }
                () = shared.dead.cancelled() => return,
                () = self.closing.cancelled() => return,
            }
        }
    }

    /// Makes a producer of the usual kind ahead of the first publish, which would
    /// otherwise wait until it has its number, and be spooled if that takes longer
    /// than the hedge.
    pub(super) fn prepare(&self) {
        if self.config.enable_idempotence {
            self.reserve((self.config.compression, self.config.batch_size.max(1)));
        }
    }

    fn reserve(&self, make: Make) {
        match self.make(make) {
            Ok(producer) => {
                let mut reserves = guard(&self.reserves);
                // Looked at under the lock: `close` empties the map after it.
                if !self.closing.is_cancelled() {
                    reserves.insert(make, producer);
                }
            }
            // The next producer is made when it is needed.
            Err(error) => {
                tracing::debug!(target: "messaging_hub::kafka", %error, "no reserve producer");
            }
        }
    }

    /// How many partitions a topic has. One that is missing from the last look
    /// has as many as it had: a cluster that is coming back may know less than
    /// it has.
    fn partitions(&self, topic: &Topic, had: i32) -> i32 {
        self.topics.get(topic).map_or(had, |f| f.partitions)
    }

    /// Hands one message to a producer; its ticket answers for everything.
    async fn write(
        &self,
        producer: &Producer,
        (topic, partitions): (&Topic, i32),
        (message, marks, order): (&Message, &Marks, &OrderKey),
        mut ticket: Box<Ticket>,
        until: &CancellationToken,
    ) {
        let shape = record::shape(
            self.partitioner,
            (topic, partitions),
            (message, marks, order),
        );
        let shape = match shape {
            Ok(shape) => shape,
            Err(error) => return ticket.answer(Fate::Refused(error)),
        };
        let bytes = shape.bytes;
        ticket.bytes = bytes;
        let unasked = matches!(ticket.reply, Reply::Nobody);
        let mut out = Record::with_opaque_to(topic.as_str(), ticket)
            .partition(shape.partition)
            .payload(message.payload.as_ref())
            .timestamp(record::time(message, marks))
            .headers(shape.headers);
        out.key = message.key.as_ref().map(|k| k.as_bytes());
        match producer.send(out, until).await {
            Ok(()) => {}
            Err((ticket, Some(error))) => {
                // Turned down before it was queued, so it is certainly not stored.
                let fate = match fate(&error, topic, bytes, false) {
                    Fate::Unknown(error) => {
                        Fate::Unsent(error.assuming(crate::error::Assume::NotSent))
                    }
                    other => other,
                };
                if unasked {
                    tracing::warn!(target: "messaging_hub::kafka", %topic, ?fate, "an unconfirmed message was not written");
                }
                ticket.answer(fate);
            }
            Err((ticket, None)) => ticket.answer(Fate::Unsent(ended(topic))),
        }
    }

    /// The producers that live; the others are let go of, which purges them once
    /// nobody else holds on to them.
    fn living(&self) -> MutexGuard<'_, HashMap<Make, Arc<Producer>>> {
        let mut producers = self.producers();
        producers.retain(|_, p| !p.shared.dead.is_cancelled());
        producers
    }

    fn producers(&self) -> MutexGuard<'_, HashMap<Make, Arc<Producer>>> {
        guard(&self.producers)
    }
}

/// Nudges a producer for a while, so that it has its number sooner if it has none. A
/// cluster that has just started refuses the first request for one, and the client
/// library asks again after half a second, or when it hears of the cluster. Whether
/// there is a number nobody can see but by a record that was stored.
async fn hasten(producer: Weak<Producer>, topic: Topic, tasks: TaskTracker) {
    let until = Instant::now() + HASTENING;
    let mut turns = interval(NUDGE);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < until {
        turns.tick().await;
        // Held on to for one question only: one that is given up has to be purged.
        let Some(producer) = producer.upgrade() else {
            return;
        };
        let topic = topic.clone();
        // Tracked, because whoever closes has to see the last of the producer.
        let asked = tasks.spawn_blocking(move || producer.nudge(topic.as_str(), NUDGE_PATIENCE));
        if asked.await.is_err() {
            return;
        }
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can stop half-way, so a poisoned map is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task of one lane.
struct Writer {
    publisher: Arc<Publisher>,
    producer: Arc<Producer>,
    topic: Topic,
    /// As many as there were when the lane was opened.
    partitions: i32,
    confirm: bool,
    end: Arc<LaneEnd>,
}

impl Writer {
    async fn run(self, mut port: LanePort) {
        let closing = self.publisher.closing.clone();
        loop {
            let batch = tokio::select! {
                biased;
                () = self.end.token.cancelled() => break,
                () = closing.cancelled() => break,
                // The reader of the answers is gone, and with it the lane.
                () = port.confirmations.closed() => break,
                batch = port.submissions.recv() => batch,
            };
            let Some(batch) = batch else { break };
            let partitions = self.publisher.partitions(&self.topic, self.partitions);
            for submission in batch {
                self.submit(submission, partitions, &port.confirmations)
                    .await;
            }
        }
        if self.end.owes() && !closing.is_cancelled() {
            // The lane was given up, and what the producer still holds of it will
            // be written again by another: stored late, the rest would stand
            // before what comes again. Nothing but a purge takes it back.
            self.producer.shared.dead.cancel();
        }
        if self.producer.shared.dead.is_cancelled() {
            // Lets go of the dead producer, so that it is purged and every
            // record it still holds is answered.
            drop(self.publisher.living());
        }
        // What was never written is said to be so; senders see the lane closed.
        port.submissions.close();
        while let Some(batch) = port.submissions.recv().await {
            for submission in batch {
                let answer = Confirmation {
                    token: submission.token,
                    fate: Fate::Unsent(ended(&self.topic)),
                };
                if port.confirmations.send(answer).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn submit(
        &self,
        submission: Submission,
        partitions: i32,
        answers: &mpsc::Sender<Confirmation>,
    ) {
        // Room for the answer first: a submitter that keeps to the window never
        // waits here, one that does not is held back instead of losing answers.
        let Ok(permit) = answers.clone().reserve_owned().await else {
            return;
        };
        if self.end.token.is_cancelled() {
            permit.send(Confirmation {
                token: submission.token,
                fate: Fate::Unsent(ended(&self.topic)),
            });
            return;
        }
        let (permit, reply) = if self.confirm && submission.confirm {
            (None, Reply::Lane(submission.token, permit))
        } else {
            (Some(permit), Reply::Nobody)
        };
        let ticket = self.end.ticket(reply);
        let place = (&self.topic, partitions);
        let message = (&*submission.message, &submission.marks, &submission.order);
        self.publisher
            .write(&self.producer, place, message, ticket, &self.end.token)
            .await;
        if let Some(permit) = permit {
            permit.send(Confirmation {
                token: submission.token,
                fate: Fate::Confirmed(None),
            });
        }
    }
}

fn ended(topic: &Topic) -> Error {
    Error::new(
        ErrorCode::ConnectionClosed,
        "the lane ended before this message was written; open another lane",
    )
    .at(BrokerType::Kafka)
    .on(topic.as_str())
}

/// Above the message timeout, for the last callbacks.
const FLUSH_SLACK: Duration = Duration::from_secs(2);

/// How long a producer that has yet to store its first record is hastened. Shorter
/// than `topic.metadata.propagation.max.ms`: behind that time the library believes a
/// broker that has not heard of the topic.
const HASTENING: Duration = Duration::from_millis(1_500);

/// Between two nudges.
const NUDGE: Duration = Duration::from_millis(25);

/// How long a nudge may wait for its answer: so long it keeps a producer that was
/// given up meanwhile.
const NUDGE_PATIENCE: Duration = Duration::from_millis(100);

/// Smaller batches than this are not made for any topic's sake.
const SMALLEST_BATCH: usize = 1024;
