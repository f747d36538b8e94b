//! A message in a reader's hands, settled exactly once.

use std::{fmt, ops::Deref, sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot};

use super::BrokerType;
use crate::{
    error::{Error, ErrorCode, Result},
    message::{
        Message, Timestamp,
        wire::{Failure, Marks},
    },
    topic::Topic,
};

/// A received message with where it came from; what a handler gets.
#[derive(Clone, Debug)]
pub struct Received {
    /// The topic or queue.
    pub topic: Topic,
    /// The message, with `redelivered`, `partition`, `offset` and `topic` set.
    pub message: Arc<Message>,
    /// What the hub noted on it.
    pub marks: Arc<Marks>,
    /// Who delivered it.
    pub via: BrokerType,
}

impl Received {
    /// Whether it lies among the dead letters: it failed somewhere else. A retry
    /// goes back to where it failed.
    #[must_use]
    pub fn is_dead_letter(&self) -> bool {
        let failure = self.marks.failure.as_ref();
        failure.is_some_and(|f| f.original_topic != self.topic.as_str())
    }

    /// Whether it expired before it could be handled. What lies among the dead
    /// letters is kept, however old it is.
    #[must_use]
    pub fn is_too_late(&self, now: Timestamp) -> bool {
        !self.is_dead_letter() && self.message.is_expired(now)
    }
}

impl Deref for Received {
    type Target = Message;
    fn deref(&self) -> &Message {
        &self.message
    }
}

/// What a reader decides about a delivery.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Handled. Streams: its offset may be committed.
    Ack,
    /// Give it back as it is, to be handed out again at once.
    Requeue,
    /// Give it back after `delay` with its attempt counted and the failure
    /// noted. Sources that retry in the reader's lane ([`super::RetryMode`])
    /// never get this.
    Retry {
        /// How long it rests.
        delay: Duration,
        /// Why.
        failure: Failure,
    },
    /// Move it to the dead letters. What lies where they lie stays there, as it is:
    /// a queue hands it out again after a moment, in a stream its reader is past it.
    DeadLetter {
        /// Why.
        failure: Failure,
    },
}

/// A verdict on its way to the task that owns the source.
#[derive(Debug)]
pub struct Settlement {
    /// Which delivery, in the source's own numbering.
    pub tag: u64,
    /// The verdict.
    pub verdict: Verdict,
    /// Told when the broker has been told (acks may be batched before), or why
    /// it could not be.
    pub done: Option<oneshot::Sender<Result<()>>>,
}

/// A message in a reader's hands. Dropped unsettled, it is given back.
pub struct Delivery {
    received: Received,
    settle: Option<(mpsc::UnboundedSender<Settlement>, u64)>,
}

impl Delivery {
    /// A delivery that reports its verdict, with `tag`, to `settlements`.
    ///
    /// The channel has no bound of its own because each delivery sends at most
    /// once: the source's prefetch is the bound.
    #[must_use]
    pub fn new(
        received: Received,
        settlements: mpsc::UnboundedSender<Settlement>,
        tag: u64,
    ) -> Self {
        Self {
            received,
            settle: Some((settlements, tag)),
        }
    }

    /// A delivery that needs no settlement (live streams without a group).
    #[must_use]
    pub fn unsettled(received: Received) -> Self {
        Self {
            received,
            settle: None,
        }
    }

    /// The message and where it came from.
    #[must_use]
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Whether the source still listens; once false, every verdict fails.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.settle.as_ref().is_none_or(|(tx, _)| !tx.is_closed())
    }

    /// Whether no verdict is waited for: it had one, or needs none.
    pub(crate) fn is_settled(&self) -> bool {
        self.settle.is_none()
    }

    /// Handled.
    ///
    /// # Errors
    /// `ACK_FAILED` when the source is gone or the generation that delivered it
    /// has ended; the message will come again.
    ///
    /// # Cancel safety
    /// The verdict is given when this is first polled; dropping the future
    /// abandons only the answer.
    pub async fn ack(self) -> Result<()> {
        self.settle(Verdict::Ack).await
    }

    /// Gives it back, to be handed out again at once.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn requeue(self) -> Result<()> {
        self.settle(Verdict::Requeue).await
    }

    /// Moves it to the dead letters; see [`Verdict::DeadLetter`].
    ///
    /// # Errors
    /// As [`Delivery::ack`], and `DEAD_LETTER_FAILED`.
    pub async fn dead_letter(self, reason: &str, details: &str) -> Result<()> {
        let failure = Failure::now(
            reason,
            details,
            &self.received.topic,
            self.received.marks.failure.as_deref(),
        );
        self.settle(Verdict::DeadLetter { failure }).await
    }

    /// Gives a verdict and waits until the source has carried it out.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn settle(mut self, verdict: Verdict) -> Result<()> {
        let Some((tx, tag)) = self.settle.take() else {
            return Ok(());
        };
        let (done, answer) = oneshot::channel();
        let gone = || {
            Error::new(
                ErrorCode::AckFailed,
                "the connection that delivered this message is gone; it will be delivered again",
            )
            .on(self.received.topic.as_str())
            .with_id(self.received.message.id.as_str())
        };
        tx.send(Settlement {
            tag,
            verdict,
            done: Some(done),
        })
        .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Gives a verdict without waiting for it to be carried out. Returns
    /// whether the source still listened.
    pub fn settle_now(mut self, verdict: Verdict) -> bool {
        self.settle.take().is_none_or(|(tx, tag)| {
            tx.send(Settlement {
                tag,
                verdict,
                done: None,
            })
            .is_ok()
        })
    }

    /// Takes the settlement apart from the message, for wrappers that forward
    /// verdicts under their own numbering.
    #[must_use]
    pub fn into_parts(mut self) -> (Received, Option<(mpsc::UnboundedSender<Settlement>, u64)>) {
        (self.received.clone(), self.settle.take())
    }
}

impl Deref for Delivery {
    type Target = Received;
    fn deref(&self) -> &Received {
        &self.received
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some((tx, tag)) = self.settle.take() {
            // A closed channel means that the source is gone, which gives the
            // message back by itself.
            let _ = tx.send(Settlement {
                tag,
                verdict: Verdict::Requeue,
                done: None,
            });
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("received", &self.received)
            .field("settled", &self.settle.is_none())
            .finish()
    }
}
