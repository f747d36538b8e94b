//! Publishing several messages as one: all of them become visible to readers of
//! what is committed, or none. It holds where every topic's primary is Kafka.
//!
//! It passes the lanes and the spool: while Kafka is away a batch is an error, and
//! between what is published in a transaction and what is published otherwise there
//! is no order.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{MessagingHub, accepted::Offer, lock, publish::TopicEntry};
use crate::{
    broker::{
        BrokerType, Compression, OrderKey, Outcome, Outgoing, PublishOptions, Receipt, Transactor,
    },
    error::{Error, ErrorCode, Result},
    message::{Message, MessageId, wire::Marks},
    topic::Topic,
};

/// Publishes transactions under one transactional id. Whoever opens an id later, in
/// this process or another, fences whoever opened it before. Clones are the same.
#[derive(Clone, Debug)]
pub struct Transactions {
    hub: MessagingHub,
    transactor: Transactor,
    /// Stands for the key of messages that have none.
    number: u64,
    options: Arc<PublishOptions>,
}

/// Messages that will be published as one. Nothing is written before it is
/// committed, so that one which is forgotten holds up nobody; dropping it is as good
/// as [`Transaction::abort`].
#[derive(Debug)]
pub struct Transaction {
    via: Transactions,
    held: Vec<Checked>,
    bytes: usize,
}

/// A message that may be written.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) out: Outgoing,
    pub(super) compression: Option<Compression>,
}

impl MessagingHub {
    /// Publishes messages to one topic as one: receipts for all of them, or an error
    /// that holds for all. One after the other where it is called at once.
    ///
    /// An id that the caller brought and that was accepted before is not written
    /// again; its receipt is the first one.
    ///
    /// # Errors
    /// *Not sent* or *rejected*: nothing of it is visible, nor will be (the topic's
    /// primary is not Kafka, Kafka is away, a message is refused, it was aborted).
    /// *Unknown*: nobody heard whether it was committed; it is never in part.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer once the messages are checked; the
    /// batch is published all the same.
    pub async fn publish_batch_atomic(
        &self,
        topic: &str,
        messages: Vec<Message>,
    ) -> Result<Vec<Receipt>> {
        let options = PublishOptions::default();
        self.publish_as_one(&self.canonical(topic)?, HUB_PUBLISHER, messages, &options)
            .await
    }

    /// Opens a transactional id of the caller's own, the same after a restart: what
    /// an earlier process of this id left open is aborted before this returns, and
    /// that process, should it still live, is fenced.
    ///
    /// # Errors
    /// `INVALID_CONFIG` without Kafka or for a bad id; that Kafka is away.
    ///
    /// # Cancel safety
    /// Dropped, the id may have been opened, and others fenced.
    pub async fn transactions(&self, id: &str) -> Result<Transactions> {
        self.check_open()?;
        let broker = self
            .all_brokers()
            .into_iter()
            .find(|b| b.transactions().is_some());
        let Some(transactional) = broker.as_deref().and_then(|b| b.transactions()) else {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "transactions need Kafka, which this hub does not have",
            ));
        };
        let transactor = transactional.transactor(Some(id))?;
        let options = Arc::<PublishOptions>::default();
        transactor
            .publish(Vec::new(), None, options.timeout)
            .await?;
        Ok(Transactions {
            hub: self.clone(),
            transactor,
            number: self.number() << 1,
            options,
        })
    }

    pub(super) async fn publish_as_one(
        &self,
        topic: &Topic,
        publisher: u64,
        messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Result<Vec<Receipt>> {
        self.check_open()?;
        let mut held = Vec::with_capacity(messages.len());
        let mut bytes = 0;
        for message in messages {
            let checked = self.checked(topic, publisher, message, options).await?;
            bytes += checked.out.message.size();
            fits(held.len() + 1, bytes)?;
            held.push(checked);
        }
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let entry = self.entry(topic)?;
        let transactor = self.transactor(&entry)?;
        self.commit(transactor, held, options.timeout).await
    }

    /// Checks a message as every publish is checked, and what a transaction cannot
    /// do.
    pub(super) async fn checked(
        &self,
        topic: &Topic,
        publisher: u64,
        mut message: Message,
        options: &PublishOptions,
    ) -> Result<Checked> {
        let entry = self.entry(topic)?;
        let refuse = |code, why: String, message: &Message| {
            Err(Error::rejected(code, why)
                .on(topic.as_str())
                .with_id(message.id.as_str()))
        };
        if entry.broker.transactions().is_none() {
            let why = format!(
                "{topic} is routed to {}, which has no transactions; publish it otherwise, or route it to kafka",
                entry.broker.broker_type()
            );
            return refuse(ErrorCode::InvalidConfig, why, &message);
        }
        if !options.confirm || !options.exchange.is_empty() || !options.routing_key.is_empty() {
            let why = "a transaction is always confirmed, and has no exchange or routing_key; leave these options out";
            return refuse(ErrorCode::InvalidConfig, why.to_owned(), &message);
        }
        let marks = Marks::default();
        let (due, plan) = self.check(&entry, &mut message, options, &marks).await?;
        if due.is_some() {
            let why = "scheduled_at lies in the future, and a transaction is published now or not at all; leave it out, or publish the task by itself";
            return refuse(ErrorCode::MessageInvalid, why.to_owned(), &message);
        }
        let order = match &message.key {
            Some(key) => OrderKey::Key(key.clone()),
            None => OrderKey::Publisher(publisher),
        };
        Ok(Checked {
            out: Outgoing {
                topic: topic.clone(),
                message: Arc::new(message),
                order,
                marks,
            },
            compression: plan.broker,
        })
    }

    /// The hub's own way to publish batches.
    fn transactor(&self, entry: &TopicEntry) -> Result<Transactor> {
        let mut own = lock(&self.0.transactor);
        if let Some(transactor) = own.as_ref().filter(|t| !t.is_closed()) {
            return Ok(transactor.clone());
        }
        let transactional = entry.broker.transactions().ok_or_else(|| {
            Error::rejected(ErrorCode::InvalidConfig, "the broker has no transactions")
        })?;
        let transactor = transactional.transactor(None)?;
        *own = Some(transactor.clone());
        Ok(transactor)
    }

    /// Publishes a batch in a task of its own, so that whoever gives up waiting gives
    /// up the answer only: a repeat of its ids then joins it, and writes nothing.
    async fn commit(
        &self,
        transactor: Transactor,
        held: Vec<Checked>,
        timeout: Duration,
    ) -> Result<Vec<Receipt>> {
        let hub = self.clone();
        let task = async move { hub.commit_now(&transactor, held, timeout).await };
        self.0.tasks.spawn(task).await.unwrap_or_else(|e| {
            Err(Error::unknown(
                ErrorCode::UnknownError,
                "the task of a batch ended without an outcome",
            )
            .caused_by(e))
        })
    }

    async fn commit_now(
        &self,
        transactor: &Transactor,
        held: Vec<Checked>,
        timeout: Duration,
    ) -> Result<Vec<Receipt>> {
        let began = Instant::now();
        let compression = one_compression(&held)?;
        let ids: Vec<MessageId> = held.iter().map(|c| c.out.message.id.clone()).collect();
        let offered = self.offer(&held)?;
        let fresh: Vec<Outgoing> = held
            .into_iter()
            .zip(&offered)
            .filter(|(_, offer)| matches!(offer, Offer::Fresh(_)))
            .map(|(checked, _)| checked.out)
            .collect();
        for message in fresh.iter().map(|o| &o.message) {
            self.count_published(message);
        }
        let count = fresh.len() as u64;
        let outcome = if fresh.is_empty() {
            Ok(Vec::new())
        } else {
            transactor.publish(fresh, compression, timeout).await
        };
        self.count_outcome(&outcome, count, began);
        let mut positions = match outcome {
            Ok(positions) => positions.into_iter(),
            Err(error) => {
                for offer in offered {
                    if let Offer::Fresh(Some(seen)) = offer {
                        seen.settle(&Err(error.clone()));
                    }
                }
                return Err(error);
            }
        };
        let mut receipts = Vec::with_capacity(ids.len());
        for (id, offer) in ids.into_iter().zip(offered) {
            receipts.push(match offer {
                Offer::Fresh(seen) => {
                    let receipt = Receipt {
                        id,
                        outcome: Outcome::Delivered {
                            via: BrokerType::Kafka,
                            position: positions.next().flatten(),
                        },
                    };
                    if let Some(seen) = seen {
                        seen.settle(&Ok(receipt.clone()));
                    }
                    receipt
                }
                Offer::Done(receipt) => receipt,
                Offer::Joined(answer) => answer.await.unwrap_or_else(|_| Err(lost(&id)))?,
            });
        }
        Ok(receipts)
    }

    /// Takes the ids that callers brought through the window of what was accepted. A
    /// batch is either all on its way already, or waits for no other: two that wait
    /// for each other would wait for ever.
    fn offer(&self, held: &[Checked]) -> Result<Vec<Offer>> {
        let mut seen: HashSet<(&str, &str)> = HashSet::with_capacity(held.len());
        for Outgoing { topic, message, .. } in held.iter().map(|c| &c.out) {
            if !seen.insert((topic.as_str(), message.id.as_str())) {
                return Err(Error::rejected(
                    ErrorCode::MessageInvalid,
                    "the id stands twice in one batch; give each message its own",
                )
                .on(topic.as_str())
                .with_id(message.id.as_str()));
            }
        }
        let brought = held.iter().map(|c| (&c.out.topic, &c.out.message.id));
        let brought = brought.filter(|(_, id)| !id.is_generated());
        let mut answers = self.0.accepted.offer_all(brought).into_iter();
        let mut offers = Vec::with_capacity(held.len());
        let (mut fresh, mut joined) = (0, 0);
        for message in held.iter().map(|c| &c.out.message) {
            let answer = (!message.id.is_generated()).then(|| answers.next());
            let offer = answer.flatten().unwrap_or(Ok(Offer::Fresh(None)))?;
            fresh += usize::from(matches!(offer, Offer::Fresh(_)));
            joined += usize::from(matches!(offer, Offer::Joined(_)));
            offers.push(offer);
        }
        if fresh > 0 && joined > 0 {
            return Err(Error::new(
                ErrorCode::PublishFailed,
                "some ids of the batch are being published by others right now; nothing was sent, repeat it",
            ));
        }
        Ok(offers)
    }

    fn count_outcome<T>(&self, outcome: &Result<T>, count: u64, began: Instant) {
        let recorder = &self.0.recorder;
        match outcome {
            Ok(_) => {
                recorder.publish_successes.add(count);
                recorder.publish_latency.record_n(began.elapsed(), count);
            }
            Err(error) => {
                recorder.publish_failures.add(count);
                recorder.publish_errors.add(count);
                recorder.total_errors.add(count);
                if matches!(error.code(), ErrorCode::PublishTimeout | ErrorCode::Timeout) {
                    recorder.publish_timeouts.add(count);
                }
            }
        }
    }
}

impl Transactions {
    /// The same with other options; what they say of the address, or of publishing
    /// unconfirmed, is refused.
    #[must_use]
    pub fn with_options(mut self, options: PublishOptions) -> Self {
        self.options = Arc::new(options);
        self
    }

    /// Begins a transaction. Several may be begun; they are written one after the
    /// other, as they are committed.
    #[must_use]
    pub fn begin(&self) -> Transaction {
        Transaction {
            via: self.clone(),
            held: Vec::new(),
            bytes: 0,
        }
    }
}

impl Transaction {
    /// Adds a message to any topic whose primary is Kafka. It is checked as every
    /// publish is.
    ///
    /// # Errors
    /// Why it is refused; the transaction stands as before.
    ///
    /// # Cancel safety
    /// Dropped, nothing was added.
    pub async fn publish(&mut self, topic: &str, message: Message) -> Result<MessageId> {
        let hub = &self.via.hub;
        let topic = hub.canonical(topic)?;
        let checked = hub
            .checked(&topic, self.via.number, message, &self.via.options)
            .await?;
        let bytes = self.bytes + checked.out.message.size();
        fits(self.held.len() + 1, bytes)?;
        self.bytes = bytes;
        let id = checked.out.message.id.clone();
        self.held.push(checked);
        Ok(id)
    }

    /// Messages in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there is none in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Writes and commits it: a receipt for each message, in the order in which they
    /// were added.
    ///
    /// # Errors
    /// As [`MessagingHub::publish_batch_atomic`]. `TRANSACTION_FENCED`: the id was
    /// opened by another since; open it again only where that one has ended.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer once the messages are checked; the
    /// batch is published all the same.
    pub async fn commit(self) -> Result<Vec<Receipt>> {
        let via = &self.via;
        via.hub.check_open()?;
        if self.held.is_empty() {
            return Ok(Vec::new());
        }
        via.hub
            .commit(via.transactor.clone(), self.held, via.options.timeout)
            .await
    }

    /// Forgets it; nothing of it was written.
    pub fn abort(self) {}
}

fn fits(messages: usize, bytes: usize) -> Result<()> {
    if messages > MAX_MESSAGES || bytes > MAX_BYTES {
        return Err(Error::rejected(
            ErrorCode::MessageTooLarge,
            format!(
                "one transaction has at most {MAX_MESSAGES} messages and {MAX_BYTES} bytes; use several"
            ),
        ));
    }
    Ok(())
}

fn one_compression(held: &[Checked]) -> Result<Option<Compression>> {
    let mut wishes = held.iter().map(|c| c.compression);
    let first = wishes.next().flatten();
    if wishes.any(|wish| wish != first) {
        return Err(Error::rejected(
            ErrorCode::InvalidConfig,
            "the routes of its topics ask for different compression, and a transaction has one; use one for each, or let the routes agree",
        ));
    }
    Ok(first)
}

fn lost(id: &MessageId) -> Error {
    Error::unknown(
        ErrorCode::OperationCanceled,
        "the publish that this repeat had joined ended without an outcome",
    )
    .with_id(id.as_str())
}

/// Messages of one transaction at most.
pub const MAX_MESSAGES: usize = 100_000;

/// Bytes of one transaction at most, overheads included.
pub const MAX_BYTES: usize = 128 * 1024 * 1024;

/// Batches of the hub itself, without a handle, are one publisher.
const HUB_PUBLISHER: u64 = 0;
