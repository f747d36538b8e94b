//! One transactional producer of librdkafka, owned by the thread that calls it:
//! every call blocks, for a slice of time at most. It decides nothing; it says what
//! the client library says, as a [`Trouble`].

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, TopicPartitionList,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    consumer::ConsumerGroupMetadata,
    error::KafkaError,
    message::Message as _,
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    types::RDKafkaErrorCode as Code,
};

use super::machine::Trouble;
use crate::{
    adapter::kafka::{
        error::{failed, fate, is_too_large, raw_code},
        link::{Link, log},
        record::{self, Shape},
    },
    broker::{Fate, Outgoing, Position},
    error::{Error, ErrorCode, Result},
};

/// What went wrong in a call.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) trouble: Trouble,
    pub(super) error: KafkaError,
}

/// What it means that a record was not stored.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) trouble: Trouble,
    pub(super) error: Error,
    /// The batch that it may have shared was too large for the broker: in a smaller one
    /// it is stored, or is itself what is too large.
    pub(super) crowded: bool,
}

impl Refusal {
    fn new(error: KafkaError, out: &Outgoing, size: usize, batch_bytes: usize) -> Option<Self> {
        // The library puts nothing beside a record that fills a batch.
        let shared = size < batch_bytes;
        let told = match fate(&error, &out.topic, size, shared) {
            Fate::Refused(e) | Fate::Overloaded(e) | Fate::Unknown(e) | Fate::Unsent(e) => e,
            Fate::Confirmed(_) => return None,
        };
        Some(Self {
            crowded: shared && is_too_large(&error),
            error: told.with_id(out.message.id.as_str()),
            trouble: Failed::from(error).trouble.max_abort(),
        })
    }
}

/// What became of the records of one transaction.
#[derive(Debug, Default)]
struct Book {
    positions: Vec<Option<Position>>,
    owed: usize,
    /// The first that was not stored, and why.
    failed: Option<(usize, KafkaError)>,
}

struct Context {
    link: Arc<Link>,
    book: Mutex<Book>,
}

impl Context {
    fn book(&self) -> MutexGuard<'_, Book> {
        // A book is whole whenever the lock is free.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // Fatal ones are seen by whichever call comes next.
        if raw_code(&error) != Some(Code::Fatal) {
            self.link.report(&error, reason);
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    /// Called by the polls of the thread that owns the producer.
    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        let mut book = self.book();
        book.owed = book.owed.saturating_sub(1);
        match result {
            Ok(record) => {
                self.link.delivered();
                if let Some(slot) = book.positions.get_mut(index) {
                    *slot = Some(Position {
                        partition: record.partition(),
                        offset: record.offset(),
                    });
                }
            }
            // The first that is at fault, whatever was told before of others: on a
            // refusal the library purges what it still holds, and may tell of that
            // before it tells of the refused.
            Err((error, _)) => {
                let first = book.failed.as_ref();
                if first.is_none_or(|(_, first)| follows(first) && !follows(error)) {
                    book.failed = Some((index, error.clone()));
                }
            }
        }
    }
}

/// Whether a record failed because of another: it was written beside one that is
/// refused, or purged with a transaction that has to be aborted.
fn follows(error: &KafkaError) -> bool {
    matches!(
        raw_code(error),
        Some(Code::InvalidDifferentRecord | Code::PurgeQueue | Code::PurgeInflight)
    )
}

/// A producer of one transactional id.
pub(super) struct Producer {
    inner: BaseProducer<Context>,
}

impl Producer {
    /// Makes one; it connects by itself.
    ///
    /// # Errors
    /// `INVALID_CONFIG` with what the client library says.
    pub(super) fn new(settings: &ClientConfig, link: Arc<Link>) -> Result<Self> {
        let context = Context {
            link,
            book: Mutex::default(),
        };
        let inner = BaseProducer::from_config_and_context(settings, context).map_err(|e| {
            failed(
                ErrorCode::InvalidConfig,
                "the transactional producer's settings",
                e,
            )
        })?;
        Ok(Self { inner })
    }

    /// Makes it the only one of its id: fences others, and ends what they left.
    pub(super) fn prepare(&self) -> Result<(), Failed> {
        self.inner.init_transactions(SLICE).map_err(Failed::from)
    }

    pub(super) fn begin(&self, records: usize) -> Result<(), Failed> {
        *self.inner.context().book() = Book {
            positions: vec![None; records],
            ..Book::default()
        };
        self.inner.begin_transaction().map_err(Failed::from)
    }

    /// Hands over one record, waiting for room in the queue until `until`.
    pub(super) fn write(
        &self,
        index: usize,
        out: &Outgoing,
        shape: Shape,
        until: Instant,
    ) -> Result<(), Failed> {
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(out.topic.as_str(), index)
                .partition(shape.partition)
                .payload(out.message.payload.as_ref())
                .timestamp(record::time(&out.message, &out.marks))
                .headers(shape.headers);
        record.key = out.message.key.as_ref().map(|k| k.as_bytes());
        loop {
            self.inner.context().book().owed += 1;
            let (error, back) = match self.inner.send(record) {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            };
            self.inner.context().book().owed -= 1;
            if raw_code(&error) != Some(Code::QueueFull) || Instant::now() >= until {
                return Err(Failed::from(error));
            }
            record = back;
            self.inner.poll(TICK);
        }
    }

    /// Serves callbacks for a moment, and says whether every record has its outcome.
    pub(super) fn settled(&self) -> bool {
        // The library's poll uses up its time whatever comes, so it is short.
        self.inner.poll(if self.inner.context().book().owed == 0 {
            Duration::ZERO
        } else {
            TICK
        });
        self.inner.context().book().owed == 0
    }

    /// The first record that was not stored, of records of these sizes.
    pub(super) fn refusal(
        &self,
        batch: &[Outgoing],
        sizes: &[usize],
        batch_bytes: usize,
    ) -> Option<Refusal> {
        let (index, error) = self.inner.context().book().failed.clone()?;
        Refusal::new(error, batch.get(index)?, *sizes.get(index)?, batch_bytes)
    }

    /// Whether a record failed by its own fault; until then another may be told yet.
    pub(super) fn knows_the_cause(&self) -> bool {
        let book = self.inner.context().book();
        book.failed.as_ref().is_some_and(|(_, e)| !follows(e))
    }

    /// Why the transaction can only be aborted, where that is no record's own fault: the
    /// library purges all of them then, and only it knows.
    pub(super) fn cause(&self) -> Option<KafkaError> {
        // Nothing begins in the middle of another: it is refused with the error that
        // ended that one or, where none did, for its state.
        self.inner.begin_transaction().err()
    }

    /// Where the records are.
    pub(super) fn positions(&self) -> Vec<Option<Position>> {
        self.inner.context().book().positions.clone()
    }

    pub(super) fn offsets(
        &self,
        offsets: &TopicPartitionList,
        member: &ConsumerGroupMetadata,
    ) -> Result<(), Failed> {
        let sent = self
            .inner
            .send_offsets_to_transaction(offsets, member, SLICE);
        sent.map_err(|error| {
            let failed = Failed::from(error);
            match raw_code(&failed.error) {
                // The group has gone on without this member.
                Some(
                    Code::IllegalGeneration
                    | Code::UnknownMemberId
                    | Code::FencedInstanceId
                    | Code::RebalanceInProgress,
                ) => Failed {
                    trouble: Trouble::Abortable,
                    ..failed
                },
                _ => failed,
            }
        })
    }

    pub(super) fn commit(&self) -> Result<(), Failed> {
        self.inner.commit_transaction(SLICE).map_err(Failed::from)
    }

    pub(super) fn abort(&self) -> Result<(), Failed> {
        // The outcomes of what is purged have to be taken, or the call waits for it.
        self.inner.poll(Duration::ZERO);
        self.inner.abort_transaction(SLICE).map_err(Failed::from)
    }
}

impl Trouble {
    /// The trouble of one record costs its transaction at least.
    fn max_abort(self) -> Self {
        match self {
            Self::Passing => Self::Abortable,
            other => other,
        }
    }
}

impl From<KafkaError> for Failed {
    fn from(error: KafkaError) -> Self {
        let fenced = matches!(
            raw_code(&error),
            Some(Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
        );
        let trouble = match &error {
            KafkaError::Transaction(e) if e.is_fatal() && fenced => Trouble::Fenced,
            KafkaError::Transaction(e) if e.is_fatal() => Trouble::Fatal,
            KafkaError::Transaction(e) if e.txn_requires_abort() => Trouble::Abortable,
            KafkaError::Transaction(e) if e.is_retriable() => Trouble::Passing,
            KafkaError::Flush(_) => Trouble::Passing,
            // Of a record; a producer that failed for good says so in the abort.
            KafkaError::MessageProduction(_) => Trouble::Abortable,
            _ => Trouble::Fatal,
        };
        Self { trouble, error }
    }
}

/// How long one call may take; a deadline and an end are seen after it.
const SLICE: Duration = Duration::from_millis(200);

/// How long callbacks are waited for at once.
const TICK: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::OrderKey,
        message::{Message, wire::Marks},
        topic::Topic,
    };

    fn refusal(code: Code, size: usize, batch_bytes: usize) -> Refusal {
        let out = Outgoing {
            topic: Topic::new("t").unwrap(),
            message: Arc::new(Message::default()),
            order: OrderKey::Publisher(0),
            marks: Marks::default(),
        };
        let error = KafkaError::MessageProduction(code);
        Refusal::new(error, &out, size, batch_bytes).unwrap()
    }

    #[test]
    fn a_record_over_a_limit_that_was_lowered_is_refused_after_a_few_smaller_batches() {
        for code in [Code::MessageSizeTooLarge, Code::MessageBatchTooLarge] {
            let mut batch_bytes = 131_072;
            let mut tries = 1;
            // Whichever record of a batch that is too large is told first.
            while refusal(code, 50_000, batch_bytes).crowded {
                let error = refusal(code, 50_000, batch_bytes).error;
                assert!(!error.is_refusal() && error.is_retryable(), "{error}");
                batch_bytes /= 2;
                tries += 1;
            }
            let error = refusal(code, 50_000, batch_bytes).error;
            assert_eq!(error.code(), ErrorCode::MessageTooLarge);
            assert_eq!((error.is_refusal(), tries), (true, 3));
        }
    }

    #[test]
    fn only_a_batch_that_was_too_large_is_to_be_smaller() {
        for code in [
            Code::InvalidRecord,
            Code::NotEnoughReplicas,
            Code::PurgeQueue,
            Code::InvalidDifferentRecord,
        ] {
            assert!(!refusal(code, 100, 131_072).crowded, "{code:?}");
        }
    }
}
