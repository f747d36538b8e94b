//! One librdkafka producer: its callbacks, the tickets that carry each record's
//! answer, and its end. It knows nothing of lanes but how to end them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::KafkaError,
    message::Message as _,
    producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode as Code,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc::OwnedPermit, oneshot},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    error::{failed, fate, raw_code},
    link::{Link, log},
};
use crate::{
    broker::{BrokerType, Confirmation, Fate, Position},
    error::{Error, ErrorCode, Result},
};

/// A record as it is handed to the producer.
pub(super) type Record<'a> = BaseRecord<'a, [u8], [u8], Box<Ticket>>;

/// Where the answer of one record goes.
#[derive(Debug)]
pub(super) enum Reply {
    /// To a lane. The permit was taken before the record was written, so that
    /// answering never waits and the window cannot be exceeded.
    Lane(u64, OwnedPermit<Confirmation>),
    /// To whoever waits for this record alone.
    One(oneshot::Sender<Fate>),
    /// Nobody asked.
    Nobody,
}

/// A lane, as far as its records know it.
#[derive(Debug)]
pub(super) struct LaneEnd {
    pub(super) token: CancellationToken,
    /// Tickets without an outcome.
    owed: AtomicUsize,
}

impl LaneEnd {
    pub(super) fn new(token: CancellationToken) -> Self {
        Self {
            token,
            owed: AtomicUsize::new(0),
        }
    }

    /// A ticket for one of its records.
    pub(super) fn ticket(self: &Arc<Self>, reply: Reply) -> Box<Ticket> {
        self.owed.fetch_add(1, Ordering::AcqRel);
        Box::new(Ticket {
            reply,
            lane: Some(Arc::clone(self)),
            bytes: 0,
        })
    }

    /// Whether the producer still holds records of it.
    pub(super) fn owes(&self) -> bool {
        self.owed.load(Ordering::Acquire) > 0
    }
}

/// Travels with a record and answers for it exactly once.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) reply: Reply,
    /// Ended by an unknown outcome.
    pub(super) lane: Option<Arc<LaneEnd>>,
    /// Payload, key and headers.
    pub(super) bytes: usize,
}

impl Ticket {
    /// Answers.
    pub(super) fn answer(mut self, fate: Fate) {
        self.give(fate);
    }

    fn give(&mut self, fate: Fate) {
        if matches!(fate, Fate::Unknown(_))
            && let Some(lane) = &self.lane
        {
            lane.token.cancel();
        }
        match std::mem::replace(&mut self.reply, Reply::Nobody) {
            Reply::Lane(token, permit) => {
                permit.send(Confirmation { token, fate });
            }
            Reply::One(tx) => {
                // Whoever asked has gone; the record's fate stands all the same.
                let _ = tx.send(fate);
            }
            Reply::Nobody => {}
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Only a client library that forgets a record gets here unanswered.
        if !matches!(self.reply, Reply::Nobody) {
            self.give(Fate::Unknown(
                Error::unknown(
                    ErrorCode::PublishFailed,
                    "the producer ended without an outcome",
                )
                .at(BrokerType::Kafka),
            ));
        }
        if let Some(lane) = &self.lane {
            lane.owed.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// What the callbacks share with the lanes.
#[derive(Debug)]
pub(super) struct Shared {
    link: Arc<Link>,
    /// Cancelled by a fatal error, or when it is given up: nothing more can be
    /// written.
    pub(super) dead: CancellationToken,
    /// Records without an outcome, and since when there was none.
    owed: AtomicUsize,
    quiet_since: Mutex<Instant>,
    /// Wakes lanes that found the queue full.
    room: Notify,
    waiting: AtomicUsize,
    batch_bytes: usize,
    /// A record was stored, and whoever waits for that has been told.
    proven: AtomicBool,
    proof: Notify,
}

impl Shared {
    /// Waits until a record was stored.
    ///
    /// Cancel safe.
    pub(super) async fn proven(&self) {
        while !self.proven.load(Ordering::Acquire) {
            self.proof.notified().await;
        }
    }

    fn owe(&self) -> Owed<'_> {
        if self.owed.fetch_add(1, Ordering::AcqRel) == 0 {
            self.touch();
        }
        Owed(self)
    }

    fn settled(&self) {
        self.owed.fetch_sub(1, Ordering::AcqRel);
        self.touch();
    }

    fn touch(&self) {
        *self
            .quiet_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until outcomes have been owed for `limit` and none came.
    ///
    /// Cancel safe.
    pub(super) async fn stalled(&self, limit: Duration) {
        loop {
            let since = *self
                .quiet_since
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let until = if self.owed.load(Ordering::Acquire) == 0 {
                now + limit
            } else {
                since + limit
            };
            if until <= now {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }

    fn is_fatal(code: Option<Code>) -> bool {
        matches!(
            code,
            Some(Code::Fatal | Code::Fenced | Code::ProducerFenced | Code::GaplessGuarantee)
        )
    }
}

/// One more outcome that is owed; dropped, it is not after all.
struct Owed<'a>(&'a Shared);

impl Owed<'_> {
    /// The callback settles it.
    fn taken(self) {
        std::mem::forget(self);
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        self.0.settled();
    }
}

/// rdkafka's way to the callbacks.
pub(super) struct Context(Arc<Shared>);

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if Shared::is_fatal(raw_code(&error)) {
            tracing::error!(target: "messaging_hub::kafka", reason, "the producer failed for good and is replaced");
            self.0.dead.cancel();
        } else {
            self.0.link.report(&error, reason);
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Ticket>;

    /// Runs on the producer's own thread and must not wait.
    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        let shared = &self.0;
        shared.settled();
        let fate = match result {
            Ok(record) => {
                shared.link.delivered();
                if !shared.proven.load(Ordering::Relaxed) {
                    shared.proven.store(true, Ordering::Release);
                    // Kept for the one who waits, also if it is not there yet.
                    shared.proof.notify_one();
                }
                // Without acks the broker tells no offset.
                Fate::Confirmed((record.offset() >= 0).then(|| Position {
                    partition: record.partition(),
                    offset: record.offset(),
                }))
            }
            Err((error, record)) => {
                if Shared::is_fatal(raw_code(error)) {
                    shared.dead.cancel();
                }
                // One of half a batch is taken to have been alone in its own.
                let small = ticket.bytes < shared.batch_bytes / 2;
                fate(error, record.topic(), ticket.bytes, small)
            }
        };
        ticket.answer(fate);
        if shared.waiting.load(Ordering::Acquire) > 0 {
            shared.room.notify_waiters();
        }
    }
}

/// A producer. Dropping it purges what is queued, on a thread where that may
/// block.
pub(super) struct Producer {
    inner: Option<ThreadedProducer<Context>>,
    pub(super) shared: Arc<Shared>,
    reaper: Reaper,
}

impl Producer {
    /// Makes a producer; it connects by itself.
    ///
    /// # Errors
    /// `INVALID_CONFIG` with what the client library says.
    pub(super) fn new(
        config: &rdkafka::ClientConfig,
        batch_bytes: usize,
        link: Arc<Link>,
        reaper: Reaper,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            link,
            dead: CancellationToken::new(),
            owed: AtomicUsize::new(0),
            quiet_since: Mutex::new(Instant::now()),
            room: Notify::new(),
            waiting: AtomicUsize::new(0),
            batch_bytes,
            proven: AtomicBool::new(false),
            proof: Notify::new(),
        });
        let inner = ThreadedProducer::from_config_and_context(config, Context(Arc::clone(&shared)))
            .map_err(|e| failed(ErrorCode::InvalidConfig, "the producer's settings", e))?;
        Ok(Self {
            inner: Some(inner),
            shared,
            reaper,
        })
    }

    /// Hands over a record, waiting for room in the queue. The record comes
    /// back as its ticket when it was not taken: with the reason, or none when
    /// `until` ended first.
    pub(super) async fn send(
        &self,
        record: Record<'_>,
        until: &CancellationToken,
    ) -> Result<(), (Box<Ticket>, Option<KafkaError>)> {
        let owed = self.shared.owe();
        self.hand_over(record, until).await?;
        owed.taken();
        Ok(())
    }

    async fn hand_over(
        &self,
        mut record: Record<'_>,
        until: &CancellationToken,
    ) -> Result<(), (Box<Ticket>, Option<KafkaError>)> {
        let Some(inner) = &self.inner else {
            return Err((record.delivery_opaque, None));
        };
        match inner.send(record) {
            Ok(()) => return Ok(()),
            Err((error, back)) if raw_code(&error) == Some(Code::QueueFull) => record = back,
            Err((error, back)) => return Err((back.delivery_opaque, Some(error))),
        }
        let _waiting = Waiting::new(&self.shared.waiting);
        loop {
            // Listening begins before the next try, or a record delivered in
            // between would wake nobody.
            let room = self.shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            match inner.send(record) {
                Ok(()) => return Ok(()),
                Err((error, back)) if raw_code(&error) == Some(Code::QueueFull) => record = back,
                Err((error, back)) => return Err((back.delivery_opaque, Some(error))),
            }
            tokio::select! {
                () = &mut room => {}
                () = until.cancelled() => return Err((record.delivery_opaque, None)),
            }
        }
    }

    /// Asks the brokers, on this thread, about a topic. What they answer is of no
    /// interest here: the client library takes each answer as an occasion to ask
    /// for the producer's number, if it has none.
    pub(super) fn nudge(&self, topic: &str, within: Duration) {
        if let Some(inner) = &self.inner
            && let Err(error) = inner.client().fetch_metadata(Some(topic), within)
        {
            tracing::debug!(target: "messaging_hub::kafka", %error, "a nudge was not answered");
        }
    }

    /// Waits, on this thread, until everything queued has its outcome.
    pub(super) fn flush(&self, within: std::time::Duration) -> bool {
        self.inner.as_ref().is_none_or(|p| p.flush(within).is_ok())
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            self.reaper.drop_aside(inner);
        }
    }
}

/// Counts a lane among those that wait, for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Drops clients where blocking is allowed, and waits for that on close.
#[derive(Clone, Debug)]
pub(super) struct Reaper {
    tasks: TaskTracker,
    runtime: Handle,
}

impl Reaper {
    pub(super) fn new(runtime: Handle) -> Self {
        Self {
            tasks: TaskTracker::new(),
            runtime,
        }
    }

    /// Drops a value on a blocking thread.
    pub(super) fn drop_aside<T: Send + 'static>(&self, value: T) {
        self.tasks
            .spawn_blocking_on(move || drop(value), &self.runtime);
    }

    /// Waits until everything given so far is gone.
    pub(super) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }
}
