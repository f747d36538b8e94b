//! One transactional id and its transactions, one after the other, on the thread
//! that owns it. It carries out what the machine decides; a producer that is given
//! up is replaced by another of the same id, which ends what the first left open.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    TopicPartitionList, consumer::ConsumerGroupMetadata, error::KafkaError,
    types::RDKafkaErrorCode as Code,
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    machine::{Clock, Stage, Step, Trouble, decide},
    producer::{Failed, Producer},
};
use crate::{
    adapter::kafka::{
        broker::Backend,
        client,
        error::{closed, failed, fate, raw_code},
        record::{self, Shape},
    },
    broker::{BrokerType, Compression, Fate, Outgoing, Position},
    error::{Assume, Error, ErrorCode, Result},
    topic::Topic,
};

/// What a transaction writes.
pub(super) struct Work<'a> {
    pub(super) batch: &'a [Outgoing],
    pub(super) compression: Option<Compression>,
    /// Asked when the records are there: the positions that go into it, and who
    /// read up to them.
    pub(super) offsets: Option<&'a dyn Fn() -> Option<Positions>>,
    /// When whoever waits wants an answer.
    pub(super) deadline: Instant,
}

/// Where a group stands, and which member of it says so.
pub(super) type Positions = (TopicPartitionList, ConsumerGroupMetadata);

/// How a transaction ended.
pub(super) type Outcome = Result<Vec<Option<Position>>>;

/// An id and its producer.
pub(super) struct Session {
    backend: Arc<Backend>,
    runtime: Handle,
    id: String,
    producer: Option<Made>,
    /// The largest batch: half of one that was too large for a broker, whose limit was
    /// lowered since it was asked for, or may not be asked for.
    largest: usize,
    /// Why nothing is written any more.
    ended: Option<Error>,
    /// Cancelled when nobody waits any longer.
    closing: CancellationToken,
}

struct Made {
    producer: Producer,
    compression: Compression,
    batch_bytes: usize,
    prepared: bool,
}

impl Session {
    pub(super) fn new(
        backend: Arc<Backend>,
        runtime: Handle,
        id: String,
        closing: CancellationToken,
    ) -> Self {
        Self {
            backend,
            runtime,
            id,
            producer: None,
            largest: usize::MAX,
            ended: None,
            closing,
        }
    }

    /// Why it is over, if another has its id.
    pub(super) fn ended(&self) -> Option<&Error> {
        self.ended.as_ref()
    }

    /// Whether nobody waits any longer for what is open.
    pub(super) fn is_abandoned(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// # Errors
    /// Why the brokers cannot be reached now.
    pub(super) fn reachable(&self) -> Result<()> {
        if self.backend.link.is_up() {
            Ok(())
        } else {
            Err(self.backend.away())
        }
    }

    /// The next transaction is written by a new producer, which fences whoever has the
    /// id by then.
    pub(super) fn renew(&mut self) {
        self.producer = None;
    }

    /// Makes this the only publisher of its id.
    ///
    /// # Errors
    /// Not sent: the brokers are away, did not answer by `until`, or refuse.
    pub(super) fn prepare(&mut self, until: Instant) -> Result<()> {
        let (compression, batch) = match &self.producer {
            Some(made) => (made.compression, made.batch_bytes),
            None => (
                self.backend.config.compression,
                self.backend.publisher.batch_bytes(std::iter::empty()),
            ),
        };
        self.prepare_for(compression, batch, until)
    }

    fn prepare_for(
        &mut self,
        compression: Compression,
        batch: usize,
        until: Instant,
    ) -> Result<()> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        let batch = batch.min(self.largest);
        let fits = |m: &Made| m.compression == compression && m.batch_bytes <= batch;
        if !self.producer.as_ref().is_some_and(fits) {
            let config = &self.backend.config;
            let settings = client::transactional(config, &self.id, compression, batch)?;
            // The other one first: two of an id in one process would fence each other.
            self.producer = None;
            let producer = Producer::new(&settings, Arc::clone(&self.backend.link))?;
            self.producer = Some(Made {
                producer,
                compression,
                batch_bytes: batch,
                prepared: false,
            });
        }
        let began = Instant::now();
        loop {
            if self.closing.is_cancelled() {
                return Err(closed());
            }
            let made = self.made()?;
            if made.prepared {
                return Ok(());
            }
            match made.producer.prepare() {
                Ok(()) => made.prepared = true,
                Err(why) => match self.step(Stage::Prepare, &why, began, until) {
                    Step::Again => {}
                    step => return Err(self.give_up(step, Stage::Prepare, &why)),
                },
            }
        }
    }

    /// Writes a batch as one, and waits for its outcome, however late: `tell` hears
    /// when it is not known by the deadline.
    pub(super) fn write(&mut self, work: &Work<'_>, tell: &mut dyn FnMut(Error)) -> Outcome {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        self.reachable()?;
        let shapes = self.shapes(work)?;
        let compression = work.compression.unwrap_or(self.backend.config.compression);
        let topics = work.batch.iter().map(|o| &o.topic);
        let bytes = self.backend.publisher.batch_bytes(topics);
        self.prepare_for(compression, bytes, work.deadline)?;
        let began = Instant::now();
        match self.transact(work, shapes, began, tell) {
            Ok(positions) => Ok(positions),
            Err(Stopped::Told(error)) => Err(error),
            Err(Stopped::Abort(why)) => Err(self.abort(why, began, work.deadline, tell)),
        }
    }

    fn transact(
        &mut self,
        work: &Work<'_>,
        shapes: Vec<Shape>,
        began: Instant,
        tell: &mut dyn FnMut(Error),
    ) -> Result<Vec<Option<Position>>, Stopped> {
        let until = work.deadline;
        let count = work.batch.len();
        self.call(Stage::Begin, began, until, tell, |p| p.begin(count))?;
        let sizes: Vec<usize> = shapes.iter().map(|s| s.bytes).collect();
        let queued = until.min(began + self.backend.config.transaction_timeout);
        // Since when nothing but an abort can come of it.
        let mut lost = None;
        let mut unwritten = None;
        for (index, (out, shape)) in work.batch.iter().zip(shapes).enumerate() {
            let made = self.made().map_err(Stopped::Told)?;
            let bytes = shape.bytes;
            if let Err(why) = made.producer.write(index, out, shape, queued) {
                if let Some(error) = not_taken(&why, out, bytes) {
                    return Err(self.written_off(Step::Abort, error));
                }
                // Mostly because one before it was refused, which is about to be told.
                unwritten = Some(why);
                lost = Some(Instant::now());
                break;
            }
        }
        loop {
            let made = self.made().map_err(Stopped::Told)?;
            let settled = made.producer.settled();
            let over = settled || lost.is_some_and(|since: Instant| since.elapsed() >= CAUSE);
            let batch_bytes = made.batch_bytes;
            let told = made.producer.refusal(work.batch, &sizes, batch_bytes);
            let known = made.producer.knows_the_cause();
            if over
                && !known
                && (told.is_some() || unwritten.is_some())
                && let Some(why) = made.producer.cause()
                && let Some(error) = not_permitted(&why, &self.id, work.batch)
            {
                return Err(Stopped::Abort(error));
            }
            if let Some(refusal) = told {
                if over || known {
                    if refusal.crowded {
                        self.largest = batch_bytes / 2;
                    }
                    let step = decide(Stage::Write, refusal.trouble, self.clock(began, until));
                    return Err(self.written_off(step, refusal.error));
                }
                lost.get_or_insert_with(Instant::now);
            }
            if over {
                break;
            }
            let clock = self.clock(began, until);
            if decide(Stage::Write, Trouble::Passing, clock) != Step::Again
                || self.closing.is_cancelled()
            {
                return Err(Stopped::Abort(late()));
            }
        }
        if let Some(why) = unwritten {
            return Err(self.stopped(Step::Abort, Stage::Write, &why));
        }
        if let Some(offsets) = work.offsets {
            let Some((list, member)) = offsets() else {
                return Err(Stopped::Abort(no_member()));
            };
            self.call(Stage::Offsets, began, until, tell, |p| {
                p.offsets(&list, &member)
            })?;
        }
        self.call(Stage::Commit, began, until, tell, Producer::commit)?;
        let made = self.made().map_err(Stopped::Told)?;
        Ok(made.producer.positions())
    }

    /// Makes one call until it is done, or something else is to be.
    fn call(
        &mut self,
        stage: Stage,
        began: Instant,
        until: Instant,
        tell: &mut dyn FnMut(Error),
        call: impl Fn(&Producer) -> Result<(), Failed>,
    ) -> Result<(), Stopped> {
        let mut told = false;
        loop {
            let made = self.made().map_err(Stopped::Told)?;
            let Err(why) = call(&made.producer) else {
                return Ok(());
            };
            match self.step(stage, &why, began, until) {
                _ if self.closing.is_cancelled() => {
                    // The broker ends it, when its time is over or its id comes again.
                    self.producer = None;
                    return Err(Stopped::Told(match stage {
                        Stage::Commit => unknown(&why),
                        _ => closed(),
                    }));
                }
                Step::Again => {}
                Step::Tell if told => {}
                Step::Tell => {
                    told = true;
                    tracing::warn!(target: "messaging_hub::kafka", id = self.id, error = %why.error,
                        "the outcome of a commit is not known yet; it is asked for until it is");
                    tell(unknown(&why));
                }
                step => return Err(self.stopped(step, stage, &why)),
            }
        }
    }

    /// Aborts what is open. It is certain already that it will not be visible; this
    /// only makes the producer fit for the next, and finds out whether it was fenced.
    fn abort(
        &mut self,
        why: Error,
        began: Instant,
        until: Instant,
        tell: &mut dyn FnMut(Error),
    ) -> Error {
        loop {
            let Ok(made) = self.made() else { return why };
            let Err(trouble) = made.producer.abort() else {
                return why;
            };
            if Instant::now() >= until + ABORT_PATIENCE {
                tell(why.clone());
            }
            match self.step(Stage::Abort, &trouble, began, until) {
                Step::Again if !self.closing.is_cancelled() && self.backend.link.is_up() => {}
                Step::End(_) => {
                    return self.give_up(Step::End(Assume::NotSent), Stage::Abort, &trouble);
                }
                // A new producer of the id ends it too, when the brokers are there.
                _ => {
                    self.producer = None;
                    return why;
                }
            }
        }
    }

    /// Where each record goes.
    fn shapes(&self, work: &Work<'_>) -> Result<Vec<Shape>> {
        let mut known: Vec<(&Topic, i32)> = Vec::new();
        let mut shapes = Vec::with_capacity(work.batch.len());
        for out in work.batch {
            let partitions = match known.iter().find(|(t, _)| *t == &out.topic) {
                Some((_, partitions)) => *partitions,
                None => {
                    let partitions = self.partitions(&out.topic, work.deadline)?;
                    known.push((&out.topic, partitions));
                    partitions
                }
            };
            let shape = record::shape(
                self.backend.publisher.partitioner(),
                (&out.topic, partitions),
                (&out.message, &out.marks, &out.order),
            )?;
            shapes.push(shape);
        }
        Ok(shapes)
    }

    fn partitions(&self, topic: &Topic, until: Instant) -> Result<i32> {
        let look = async {
            let facts = self.backend.known_or_made(topic).await?;
            if let Err(error) = self.backend.admin.learn_limit(topic).await {
                tracing::debug!(target: "messaging_hub::kafka", %error, "max.message.bytes is not known");
            }
            Ok::<_, Error>(facts.partitions)
        };
        let until = tokio::time::Instant::from_std(until);
        self.runtime.block_on(async {
            tokio::time::timeout_at(until, look)
                .await
                .unwrap_or_else(|_| Err(late().on(topic.as_str())))
        })
    }

    fn step(&self, stage: Stage, why: &Failed, began: Instant, until: Instant) -> Step {
        decide(stage, why.trouble, self.clock(began, until))
    }

    fn clock(&self, began: Instant, until: Instant) -> Clock {
        let now = Instant::now();
        Clock {
            late: now >= until,
            outlived: now.duration_since(began) >= self.backend.config.transaction_timeout,
        }
    }

    fn stopped(&mut self, step: Step, stage: Stage, why: &Failed) -> Stopped {
        match step {
            Step::Abort => Stopped::Abort(self.error(Assume::NotSent, stage, why)),
            step => Stopped::Told(self.give_up(step, stage, why)),
        }
    }

    /// A record was not stored.
    fn written_off(&mut self, step: Step, error: Error) -> Stopped {
        let told = aborted(&error);
        if step != Step::Abort {
            // The abort finds out, and finds the right words.
            tracing::debug!(target: "messaging_hub::kafka", %error, "the producer of transactions failed");
        }
        Stopped::Abort(told)
    }

    /// Does what a step asks for, but for going on, and says it.
    fn give_up(&mut self, step: Step, stage: Stage, why: &Failed) -> Error {
        match step {
            Step::End(assume) => {
                self.producer = None;
                let error = fenced(&self.id).caused_by(why.error.clone());
                self.ended = Some(error.clone());
                error.assuming(assume)
            }
            Step::Renew(assume) => {
                self.producer = None;
                self.error(assume, stage, why)
            }
            Step::Again | Step::Tell | Step::Leave | Step::Abort => {
                self.error(Assume::NotSent, stage, why)
            }
        }
    }

    fn error(&self, assume: Assume, stage: Stage, why: &Failed) -> Error {
        if assume == Assume::Unknown {
            return unknown(why);
        }
        tracing::debug!(target: "messaging_hub::kafka", ?stage, id = self.id, ?why, "a transaction failed");
        if let Some(error) = not_permitted(&why.error, &self.id, &[]) {
            return error;
        }
        let text = match stage {
            Stage::Prepare | Stage::Begin => {
                "the transaction could not be begun; nothing of it was sent"
            }
            _ => "the transaction was aborted; nothing of it is visible",
        };
        failed(ErrorCode::PublishFailed, text, why.error.clone()).assuming(Assume::NotSent)
    }

    fn made(&mut self) -> Result<&mut Made> {
        self.producer.as_mut().ok_or_else(closed)
    }
}

/// Why a transaction was not committed.
enum Stopped {
    /// It is over, and this is what to say.
    Told(Error),
    /// It is to be aborted, and this is why.
    Abort(Error),
}

/// The client library knows its own limit, and which topics it was denied, and does not
/// even take such a record: a refusal, as the broker's would be.
fn not_taken(why: &Failed, out: &Outgoing, bytes: usize) -> Option<Error> {
    let Fate::Refused(error) = fate(&why.error, &out.topic, bytes, false) else {
        return None;
    };
    let known = [ErrorCode::MessageTooLarge, ErrorCode::AuthenticationFailed];
    known
        .contains(&error.code())
        .then(|| error.with_id(out.message.id.as_str()))
}

/// What this publisher may not do, where that is why nothing of `batch` can be written.
fn not_permitted(why: &KafkaError, id: &str, batch: &[Outgoing]) -> Option<Error> {
    let refusal = |what: String| {
        let text = format!("nothing of the transaction is visible: {what}");
        Error::rejected(ErrorCode::AuthenticationFailed, text)
            .at(BrokerType::Kafka)
            .caused_by(why.clone())
    };
    match raw_code(why)? {
        // Brokers name the topic to the client library, and that to its log only.
        Code::TopicAuthorizationFailed => {
            let topics: BTreeSet<&str> = batch.iter().map(|o| o.topic.as_str()).collect();
            let few: Vec<&str> = topics.iter().copied().take(NAMED).collect();
            match few[..] {
                // It is one that is read.
                [] => None,
                [only] => {
                    let what = "not permitted to write to its topic; permit this client to";
                    Some(refusal(what.to_owned()).on(only))
                }
                _ => Some(refusal(format!(
                    "not permitted to write to one of its {} topics ({}); permit this client to",
                    topics.len(),
                    few.join(", ")
                ))),
            }
        }
        Code::TransactionalIdAuthorizationFailed | Code::ClusterAuthorizationFailed => {
            Some(refusal(format!(
                "not permitted to write under the transactional id {id:?}; permit this client to, or use another id"
            )))
        }
        _ => None,
    }
}

fn aborted(error: &Error) -> Error {
    // A refusal stays one: the same batch would be refused again.
    let assume = match error.assume() {
        Assume::Rejected => Assume::Rejected,
        _ => Assume::NotSent,
    };
    let why = match error.assume() {
        Assume::Unknown => "a record of it had no outcome",
        _ => error.message(),
    };
    let text = format!("the batch was aborted, nothing of it is visible: {why}");
    let mut told = Error::new(error.code(), text)
        .assuming(assume)
        .at(BrokerType::Kafka);
    if let Some(topic) = error.topic() {
        told = told.on(topic);
    }
    if let Some(id) = error.message_id() {
        told = told.with_id(id);
    }
    told
}

fn late() -> Error {
    Error::new(
        ErrorCode::Timeout,
        "the batch could not be written in time and was aborted; nothing of it is visible",
    )
    .at(BrokerType::Kafka)
}

fn unknown(why: &Failed) -> Error {
    Error::unknown(
        ErrorCode::PublishTimeout,
        "nobody heard whether the transaction was committed; all of it is visible, or nothing",
    )
    .at(BrokerType::Kafka)
    .caused_by(why.error.clone())
}

fn no_member() -> Error {
    Error::new(
        ErrorCode::ConsumeFailed,
        "the group has no place for this member now",
    )
    .at(BrokerType::Kafka)
}

/// Another publisher has the id.
fn fenced(id: &str) -> Error {
    Error::new(
        ErrorCode::TransactionFenced,
        format!(
            "another publisher has opened the transactional id {id:?} since; one process at a time may use it"
        ),
    )
    .at(BrokerType::Kafka)
}

/// Topics of a batch that an error names.
const NAMED: usize = 10;

/// How long a transaction that will be aborted is asked which record was at fault.
const CAUSE: Duration = Duration::from_secs(1);

/// How long after its deadline a caller waits for an abort, which only tells it more.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::OrderKey,
        message::{Message, wire::Marks},
    };

    fn to(topic: &str) -> Outgoing {
        Outgoing {
            topic: Topic::new(topic).unwrap(),
            message: Arc::new(Message::default()),
            order: OrderKey::Publisher(0),
            marks: Marks::default(),
        }
    }

    fn denied(code: Code, batch: &[Outgoing]) -> Option<Error> {
        not_permitted(&KafkaError::MessageProduction(code), "orders-1", batch)
    }

    #[test]
    fn a_lacking_permission_is_a_refusal_that_names_what_is_denied() {
        let one = denied(Code::TopicAuthorizationFailed, &[to("a"), to("a")]).unwrap();
        assert_eq!(one.code(), ErrorCode::AuthenticationFailed);
        assert!(one.is_refusal() && !one.is_retryable(), "{one}");
        assert_eq!((one.topic(), one.message_id()), (Some("a"), None));
        let batch = [to("b"), to("a"), to("b")];
        let several = denied(Code::TopicAuthorizationFailed, &batch).unwrap();
        assert_eq!(several.topic(), None);
        let text = several.to_string();
        assert!(text.contains("2 topics (a, b)"), "{text}");
        for code in [
            Code::TransactionalIdAuthorizationFailed,
            Code::ClusterAuthorizationFailed,
        ] {
            let error = denied(code, &[]).unwrap();
            assert!(error.is_refusal(), "{error}");
            assert!(error.to_string().contains("orders-1"), "{error}");
        }
    }

    #[test]
    fn whatever_else_fails_a_transaction_is_no_lacking_permission() {
        // Of a topic that is read, where nothing is written.
        assert!(denied(Code::TopicAuthorizationFailed, &[]).is_none());
        for code in [
            Code::GroupAuthorizationFailed,
            Code::PurgeQueue,
            Code::State,
            Code::ProducerFenced,
        ] {
            assert!(denied(code, &[to("a")]).is_none(), "{code:?}");
        }
    }

    #[test]
    fn what_the_client_library_does_not_take_is_a_refusal_of_that_record() {
        let out = to("a");
        let not_taken = |code| {
            let why = Failed::from(KafkaError::MessageProduction(code));
            super::not_taken(&why, &out, 100)
        };
        for code in [Code::MessageSizeTooLarge, Code::TopicAuthorizationFailed] {
            let error = not_taken(code).unwrap();
            assert!(error.is_refusal(), "{error}");
            assert_eq!(error.message_id(), Some(out.message.id.as_str()));
        }
        // Another record's fault, or one that the next look at the cluster may mend.
        for code in [Code::State, Code::UnknownPartition] {
            assert!(not_taken(code).is_none(), "{code:?}");
        }
    }
}
