//! Transactions: messages that become visible to readers of what is committed all
//! together or not at all, and a stream that is read, transformed and written on
//! in one. They hold within one broker only, and nothing of them is ever spooled.
//!
//! ```text
//!   publish --Batch (bounded)--> Transactor's owner --begin, write, commit--> broker
//!           <----one outcome----
//! ```
//!
//! No type of a client library appears here, and there is no I/O.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{
            AtomicU8,
            Ordering::{AcqRel, Acquire},
        },
    },
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Compression, ConsumerControl, HandlerError, MessageBroker, OrderKey, Position, Received,
    Source, SubscribeOptions,
};
use crate::{
    error::{Error, ErrorCode, Result},
    message::{Message, wire::Marks},
    topic::Topic,
};

/// A broker with transactions.
pub trait TransactionalBroker: MessageBroker {
    /// A way to publish batches as one. `id` is this publisher's own, and the same
    /// after a restart: whoever opens it later fences whoever opened it before.
    /// Without one it is the configuration's, or made up. The broker is reached at
    /// the first batch.
    ///
    /// # Errors
    /// `INVALID_CONFIG`, or that the broker is closed.
    fn transactor(&self, id: Option<&str>) -> Result<Transactor>;

    /// Reads what is committed in `source`, for the group of `options`, and writes
    /// what `transformer` makes of it in one transaction with the group's position.
    /// A message that fails for good goes to the dead letters in the same way.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for an option that cannot be honoured. Later failures (a
    /// fence, a lost permission) are told by the control.
    fn transform(
        &self,
        source: &Source,
        options: &SubscribeOptions,
        id: &str,
        transformer: Arc<dyn Transformer>,
    ) -> Result<ConsumerControl>;
}

/// A message on its way out, checked and with its place.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Where to.
    pub topic: Topic,
    /// The message.
    pub message: Arc<Message>,
    /// What order is kept by.
    pub order: OrderKey,
    /// What the hub notes on it.
    pub marks: Marks,
}

/// Makes messages of a message. What it does beside that is outside of the
/// transaction, and may be done more than once.
pub trait Transformer: Send + Sync + 'static {
    /// Transforms one message; nothing is written before the whole batch is done.
    fn transform(&self, received: Received) -> TransformFuture;

    /// Whether nobody waits any longer: what fails now has not failed.
    fn has_given_up(&self) -> bool {
        false
    }
}

/// The future of a [`Transformer`].
pub type TransformFuture =
    Pin<Box<dyn Future<Output = Result<Vec<Outgoing>, HandlerError>> + Send>>;

/// Publishes batches as one. Clones are the same publisher; batches are written
/// one after the other, in the order in which they were taken in. When the last
/// clone is dropped its owner ends, after what was taken in.
#[derive(Clone, Debug)]
pub struct Transactor {
    batches: mpsc::Sender<Batch>,
}

/// One batch, as its owner gets it.
#[derive(Debug)]
pub struct Batch {
    /// The messages; none: only make sure that the publisher is the one of its id.
    pub messages: Vec<Outgoing>,
    /// Compression of all of them. Default: the broker's setting.
    pub compression: Option<Compression>,
    /// When its publisher wants to know.
    pub deadline: Instant,
    state: Arc<AtomicU8>,
    answer: oneshot::Sender<Result<Vec<Option<Position>>>>,
}

impl Transactor {
    /// Batches that may wait before the owner takes them up.
    pub const BATCHES: usize = 16;

    /// Both ends.
    #[must_use]
    pub fn pair() -> (Self, mpsc::Receiver<Batch>) {
        let (batches, taken) = mpsc::channel(Self::BATCHES);
        (Self { batches }, taken)
    }

    /// Whether its owner has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.batches.is_closed()
    }

    /// Publishes a batch and says where each message is.
    ///
    /// # Errors
    /// *Not sent* or *rejected*: it was aborted, or never begun; nothing of it will
    /// ever be visible. *Unknown*: nobody heard whether it was committed.
    /// `TIMEOUT`: it was not begun within `timeout`. `TRANSACTION_FENCED`: another
    /// publisher opened the id.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer, not a batch that was taken in.
    pub async fn publish(
        &self,
        messages: Vec<Outgoing>,
        compression: Option<Compression>,
        timeout: Duration,
    ) -> Result<Vec<Option<Position>>> {
        let now = Instant::now();
        // A time-out too long for the clock is as good as none.
        let deadline = now.checked_add(timeout).unwrap_or(now + FOR_EVER);
        let until = tokio::time::Instant::from_std(deadline);
        let late = || {
            Error::new(
                ErrorCode::Timeout,
                "the batch was not begun within the timeout, others were before it; nothing of it was sent",
            )
        };
        let (answer, outcome) = oneshot::channel();
        tokio::pin!(outcome);
        let state = Arc::new(AtomicU8::new(WAITING));
        let batch = Batch {
            messages,
            compression,
            deadline,
            state: Arc::clone(&state),
            answer,
        };
        match tokio::time::timeout_at(until, self.batches.reserve()).await {
            Ok(Ok(permit)) => permit.send(batch),
            Ok(Err(_)) => return Err(ended()),
            Err(_) => return Err(late()),
        }
        if let Ok(told) = tokio::time::timeout_at(until, &mut outcome).await {
            return told.unwrap_or_else(|_| Err(lost(&state)));
        }
        // Whoever changes the state first decides, so that "not sent" is never said
        // of what is begun after. The owner of what is begun knows the deadline.
        if abandon(&state) {
            return Err(late());
        }
        outcome.await.unwrap_or_else(|_| Err(lost(&state)))
    }
}

impl Batch {
    /// Begins it. False: its publisher was told that it is not sent, so it must
    /// not be written any more.
    #[must_use]
    pub fn begin(&self) -> bool {
        self.state
            .compare_exchange(WAITING, BEGUN, AcqRel, Acquire)
            .is_ok()
    }

    /// Splits off the answer, for whoever must give it before the end.
    #[must_use]
    pub fn into_parts(self) -> (Vec<Outgoing>, Answer) {
        (self.messages, Answer(Some(self.answer)))
    }
}

/// Answers for a batch, once.
#[derive(Debug)]
pub struct Answer(Option<oneshot::Sender<Result<Vec<Option<Position>>>>>);

impl Answer {
    /// Answers, unless that was done before. A publisher that has gone does not mind.
    pub fn give(&mut self, result: Result<Vec<Option<Position>>>) {
        if let Some(answer) = self.0.take() {
            let _ = answer.send(result);
        }
    }
}

fn abandon(state: &AtomicU8) -> bool {
    state
        .compare_exchange(WAITING, ABANDONED, AcqRel, Acquire)
        .is_ok()
}

/// The owner has gone without an answer.
fn lost(state: &AtomicU8) -> Error {
    if abandon(state) {
        return ended();
    }
    Error::unknown(
        ErrorCode::PublishFailed,
        "the publisher of transactions ended before the outcome was known",
    )
}

fn ended() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the publisher of transactions has ended; the batch was not sent",
    )
}

/// Taken in, and not begun.
const WAITING: u8 = 0;
/// Begun by its owner.
const BEGUN: u8 = 1;
/// Given up by its publisher before it was begun.
const ABANDONED: u8 = 2;

/// Ten years.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Assume;

    #[tokio::test]
    async fn not_sent_is_only_said_of_what_is_not_begun_after() {
        let (transactor, mut batches) = Transactor::pair();
        let publish = |ms| transactor.publish(Vec::new(), None, Duration::from_millis(ms));
        // Not taken up in time: told so, and not begun any more.
        let error = publish(5).await.unwrap_err();
        assert_eq!(
            (error.code(), error.assume()),
            (ErrorCode::Timeout, Assume::NotSent)
        );
        assert!(!batches.recv().await.unwrap().begin());
        // Begun in time: its outcome is waited for, however late.
        let owner = async {
            let batch = batches.recv().await.unwrap();
            assert!(batch.begin());
            tokio::time::sleep(Duration::from_millis(50)).await;
            batch.into_parts().1.give(Ok(Vec::new()));
            // Begun, and its owner is gone.
            let batch = batches.recv().await.unwrap();
            assert!(batch.begin());
            drop(batch);
            // Never begun.
            drop(batches.recv().await.unwrap());
            drop(batches);
        };
        let publisher = async {
            assert!(publish(5).await.is_ok());
            assert_eq!(publish(5000).await.unwrap_err().assume(), Assume::Unknown);
            assert_eq!(publish(5000).await.unwrap_err().assume(), Assume::NotSent);
        };
        tokio::join!(owner, publisher);
        assert!(transactor.is_closed());
    }
}
