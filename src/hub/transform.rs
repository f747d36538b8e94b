//! Consume, transform, produce: what a handler makes of a stream is written in one
//! transaction with the position of its group, so that readers of what is committed
//! get what comes of each message once, whatever dies. From Kafka to Kafka only.
//!
//! What a message is checked for on its way to a handler, and what a publish is
//! checked for, is checked here too; the adapter reads, writes and commits.

use std::{future::Future, sync::Arc};

use tokio_util::sync::CancellationToken;

#[cfg(feature = "schema")]
use super::schemas::{self, Checks};
use super::{MessagingHub, Running};
use crate::{
    broker::{
        HandlerError, Outgoing, PublishOptions, Received, SubscribeOptions, Subscription,
        TransformFuture, Transformer,
    },
    compression::{self, UNDECODABLE},
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp},
};

impl MessagingHub {
    /// Reads what is committed in the streams of `pattern`, for the group of
    /// `options`, and publishes what `handler` makes of each message, in one
    /// transaction with the group's position: for readers of what is committed,
    /// each message is handled once, also when this process, another member or Kafka
    /// dies. What the handler does beside that may be done more than once.
    ///
    /// Messages of a partition are handled one after the other, `concurrency` (16)
    /// partitions at once, `max_poll_records` (500) in a transaction at most; each
    /// commits, so `commit_interval` has no effect, and all of it is compressed as
    /// `kafka.compression` says. One that fails is tried again
    /// after `retry_delay`, as often as its `max_retries` says, while other
    /// partitions go on; then it goes to the dead letters' topic, in the same way.
    ///
    /// `transactional_id` is this member's own and the same after a restart: another
    /// process that opens it fences this one, which then fails
    /// ([`Subscription::active`] is false, the log says why). So it does where it may not
    /// write: to a topic, or under that id. Members that share a group need ids of their
    /// own.
    ///
    /// # Errors
    /// `INVALID_CONFIG`: no group, not Kafka, or an option that is of no use here.
    pub async fn transform<F, Fut, E>(
        &self,
        pattern: &str,
        mut options: SubscribeOptions,
        transactional_id: &str,
        handler: F,
    ) -> Result<Subscription>
    where
        F: Fn(Received) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<(String, Message)>, E>> + Send + 'static,
        E: Into<HandlerError>,
    {
        self.check_open()?;
        let pattern = self.pattern(pattern)?;
        let source = self.source_of(&pattern)?;
        let route = self.route_of(&pattern)?;
        let broker = self.broker(route.primary);
        let Some(transactional) = broker.as_deref().and_then(|b| b.transactions()) else {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "{pattern} is routed to {}, which has no transactions; subscribe to it, or route it to kafka",
                    route.primary
                ),
            )
            .on(pattern.as_str()));
        };
        if options.long_running {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "long_running is for tasks; a transform may take as long as its transaction (kafka.transaction_timeout)",
            )
            .on(pattern.as_str()));
        }
        options.retry_delay = Some(
            options
                .retry_delay
                .unwrap_or_else(|| self.retry_delays(&source).after(0)),
        );
        let give_up = CancellationToken::new();
        let step = Arc::new(Transform(Arc::new(Step {
            hub: self.clone(),
            group: options.group_id.clone().unwrap_or_default(),
            number: self.number() << 1,
            give_up: give_up.clone(),
            #[cfg(feature = "schema")]
            checks: self.checks(),
            handler,
        })));
        let control = transactional.transform(&source, &options, transactional_id, step)?;
        let ended = CancellationToken::new();
        let (guard, watched) = (ended.clone().drop_guard(), control.clone());
        let task = self.0.tasks.spawn(async move {
            let _ended = guard;
            watched.ended().await;
        });
        self.remember(Running {
            pattern: pattern.clone(),
            control: control.clone(),
            give_up,
            ended,
        });
        let id = format!("hub-transform-{}", self.number());
        Ok(Subscription::new(id, pattern, vec![control], vec![task]))
    }
}

/// One transform's way from a message to what is made of it.
struct Step<F> {
    hub: MessagingHub,
    group: String,
    /// Stands for the key of messages that have none.
    number: u64,
    give_up: CancellationToken,
    #[cfg(feature = "schema")]
    checks: Option<Checks>,
    handler: F,
}

/// What the adapter calls.
struct Transform<F>(Arc<Step<F>>);

impl<F, Fut, E> Transformer for Transform<F>
where
    F: Fn(Received) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Vec<(String, Message)>, E>> + Send + 'static,
    E: Into<HandlerError>,
{
    fn transform(&self, received: Received) -> TransformFuture {
        let step = self.0.clone();
        Box::pin(async move {
            tokio::select! {
                made = step.run(received) => made,
                // Nobody waits any longer: it is handled again by the next member.
                () = step.give_up.cancelled() => Err(HandlerError::retry("the hub is closing")),
            }
        })
    }

    fn has_given_up(&self) -> bool {
        self.0.give_up.is_cancelled()
    }
}

impl<F, Fut, E> Step<F>
where
    F: Fn(Received) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Vec<(String, Message)>, E>> + Send + 'static,
    E: Into<HandlerError>,
{
    async fn run(&self, mut received: Received) -> Result<Vec<Outgoing>, HandlerError> {
        if received.marks.settled.contains(&self.group) {
            // The group handled it from a spool, during an outage.
            return Ok(Vec::new());
        }
        if received.is_too_late(Timestamp::now()) {
            return Err(HandlerError {
                reason: "expired".to_owned(),
                details: "it expired before it could be handled".to_owned(),
                retryable: false,
            });
        }
        if compression::is_marked(&received.message) {
            let whole = compression::expand(&received.message, self.hub.0.max_message_bytes);
            match whole {
                Ok(None) => {}
                Ok(Some(message)) => received.message = Arc::new(message),
                Err(why) => {
                    return Err(HandlerError {
                        reason: UNDECODABLE.to_owned(),
                        details: why,
                        retryable: false,
                    });
                }
            }
        }
        #[cfg(feature = "schema")]
        if let Some(checks) = &self.checks {
            checks
                .check(&received)
                .await
                .map_err(|e| failure(schemas::REASON, &e))?;
        }
        let made = (self.handler)(received).await.map_err(Into::into)?;
        let mut outputs = Vec::with_capacity(made.len());
        for (topic, message) in made {
            let checked = async {
                let topic = self.hub.canonical(&topic)?;
                let options = PublishOptions::default();
                self.hub
                    .checked(&topic, self.number, message, &options)
                    .await
            };
            let checked = checked.await.map_err(|e| failure("refused", &e))?;
            outputs.push(checked.out);
        }
        Ok(outputs)
    }
}

/// What the hub refuses will be refused again; what it cannot find out now may be
/// found out later.
fn failure(reason: &str, error: &Error) -> HandlerError {
    HandlerError {
        reason: reason.to_owned(),
        details: error.to_string(),
        retryable: error.is_retryable(),
    }
}
