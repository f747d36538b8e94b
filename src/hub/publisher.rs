//! Publisher handles: a topic resolved once, and what a publish returns.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::oneshot;

use super::{MessagingHub, found::Found};
use crate::{
    broker::{PublishOptions, Receipt},
    error::{Error, ErrorCode, Result},
    message::Message,
    topic::Topic,
};

/// Publishes to one topic. Clones are the same publisher: what it publishes
/// without a key reaches the broker in the order in which it was accepted.
#[derive(Clone, Debug)]
pub struct Publisher {
    pub(super) hub: MessagingHub,
    pub(super) topic: Topic,
    /// Stands for the key of messages that have none.
    pub(super) number: u64,
    pub(super) options: Arc<PublishOptions>,
    /// Of these options.
    pub(super) found: Arc<Found>,
}

/// A publish that was accepted and whose outcome is not known yet. Dropping it
/// abandons the answer, not the message.
#[derive(Debug)]
pub struct Pending(pub(super) State);

#[derive(Debug)]
pub(super) enum State {
    Known(Option<Result<Receipt>>),
    Waiting(oneshot::Receiver<Result<Receipt>>),
}

impl Publisher {
    /// The topic.
    #[must_use]
    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    /// The same publisher with other options.
    #[must_use]
    pub fn with_options(mut self, options: PublishOptions) -> Self {
        self.options = Arc::new(options);
        self.found = Arc::default();
        self
    }

    /// Publishes and waits for the outcome.
    ///
    /// # Errors
    /// Says whether the message was not sent, rejected, or is unknown.
    ///
    /// # Cancel safety
    /// Dropped while it waits for room, nothing was published; afterwards only
    /// the answer is abandoned.
    pub async fn publish(&self, message: Message) -> Result<Receipt> {
        self.enqueue(message).await?.await
    }

    /// Waits for room, not for the broker.
    ///
    /// # Errors
    /// A refusal, or `TIMEOUT` when there was no room in time: not sent.
    ///
    /// # Cancel safety
    /// Dropped before it returns, nothing was published.
    pub fn enqueue(
        &self,
        message: Message,
    ) -> impl Future<Output = Result<Pending>> + Send + use<'_> {
        // Not `async`, which would move the message once more.
        self.hub.enqueue(
            &self.topic,
            self.number,
            message,
            &self.options,
            Some(&self.found),
        )
    }

    /// Publishes messages in order and waits for every outcome.
    ///
    /// # Cancel safety
    /// Those that were accepted are published all the same.
    pub async fn publish_batch(&self, messages: Vec<Message>) -> Vec<Result<Receipt>> {
        let mut pending = Vec::with_capacity(messages.len());
        for message in messages {
            pending.push(self.enqueue(message).await);
        }
        let mut receipts = Vec::with_capacity(pending.len());
        for one in pending {
            receipts.push(match one {
                Ok(pending) => pending.await,
                Err(error) => Err(error),
            });
        }
        receipts
    }
}

impl Publisher {
    /// Publishes messages as one: all of them become visible to readers of what is
    /// committed, or none. The topic's primary must be Kafka.
    ///
    /// # Errors
    /// As [`MessagingHub::publish_batch_atomic`].
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer once the messages are checked; the
    /// batch is published all the same.
    pub async fn publish_batch_atomic(&self, messages: Vec<Message>) -> Result<Vec<Receipt>> {
        self.hub
            .publish_as_one(&self.topic, self.number, messages, &self.options)
            .await
    }
}

impl Future for Pending {
    type Output = Result<Receipt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let lost = || {
            Err(Error::unknown(
                ErrorCode::OperationCanceled,
                "the hub was closed before the outcome was known",
            ))
        };
        match &mut self.0 {
            State::Known(result) => Poll::Ready(result.take().unwrap_or_else(lost)),
            State::Waiting(rx) => Pin::new(rx)
                .poll(cx)
                .map(|answer| answer.unwrap_or_else(|_| lost())),
        }
    }
}
