//! Handlers: an async function, or any `tower::Service`, over what was received;
//! and how a handler says that it takes nothing now.
//!
//! ```text
//!   dispatcher --ready()--> handler       nothing is started, and no further
//!              <---Turn----               batch taken, until the turn is there
//!   dispatcher --Turn(message)--> handler
//!              <--verdict, and whose fault a failure was
//! ```
//!
//! A handler settles nothing: its result says what the dispatcher shall do.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use tower::{Service, ServiceExt};

use super::Received;

/// The future of a handler.
pub type HandlerFuture = Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send>>;

/// Handles one received message. `Ok` acks it; `Err` retries or dead-letters
/// it; a panic counts as an error.
pub trait Handler: Send + Sync + 'static {
    /// Handles one message.
    fn handle(&self, received: Received) -> HandlerFuture;

    /// Waits until the handler takes another message; `None`, the default, for
    /// one that always does. Whoever gets a turn uses or drops it.
    fn ready(&self) -> Option<ReadyFuture> {
        None
    }
}

/// Handles batches of received messages. A batch is settled as one.
pub trait BatchHandler: Send + Sync + 'static {
    /// Handles one batch.
    fn handle(&self, batch: Vec<Received>) -> HandlerFuture;

    /// As [`Handler::ready`].
    fn ready(&self) -> Option<ReadyFuture<Vec<Received>>> {
        None
    }

    /// Looks at a message before it joins a batch, so that a bad one fails
    /// alone. Default: everything may join.
    ///
    /// # Errors
    /// Why it may not; it goes to the dead letters.
    fn admit(&self, received: &Received) -> Result<(), HandlerError> {
        let _ = received;
        Ok(())
    }
}

/// Waits for a [`Turn`].
pub type ReadyFuture<R = Received> = Pin<Box<dyn Future<Output = Turn<R>> + Send>>;

/// Room for one message (or batch) that a handler has reserved. Dropped unused,
/// the room is free again.
pub struct Turn<R = Received> {
    call: Box<dyn FnOnce(R) -> HandlerFuture + Send>,
    judge: Judge,
}

/// Says whose a result is, after everything that the dispatcher adds to it: a
/// time-out, a panic.
type Judge = Box<dyn FnOnce(&Result<(), HandlerError>) -> Blame + Send>;

/// Whose a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The message's: it is retried or dead-lettered.
    Message,
    /// The handler's, or of what it needs: the message stays unsettled, no
    /// attempt is counted, and it waits for a later turn.
    Handler,
}

impl<R: Send + 'static> Turn<R> {
    /// A turn that calls `call`; every failure is the message's.
    pub fn new(call: impl FnOnce(R) -> HandlerFuture + Send + 'static) -> Self {
        Self {
            call: Box::new(call),
            judge: Box::new(|_| Blame::Message),
        }
    }

    /// Sets who says whose a result is. It is called at most once, and only for
    /// a message that was handed in.
    #[must_use]
    pub fn judged_by(
        mut self,
        judge: impl FnOnce(&Result<(), HandlerError>) -> Blame + Send + 'static,
    ) -> Self {
        self.judge = Box::new(judge);
        self
    }

    /// A turn whose message fails with `error`: its handler cannot take any.
    #[must_use]
    pub fn failed(error: HandlerError) -> Self {
        Self::new(|_| Box::pin(std::future::ready(Err(error))))
    }

    /// Takes apart what is called and who judges the result.
    pub(crate) fn into_parts(self) -> (Box<dyn FnOnce(R) -> HandlerFuture + Send>, Judge) {
        (self.call, self.judge)
    }
}

impl<R> fmt::Debug for Turn<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turn")
    }
}

impl<F, Fut, E> Handler for F
where
    F: Fn(Received) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<HandlerError>,
{
    fn handle(&self, received: Received) -> HandlerFuture {
        let future = self(received);
        Box::pin(async move { future.await.map_err(Into::into) })
    }
}

impl Handler for Arc<dyn Handler> {
    fn handle(&self, received: Received) -> HandlerFuture {
        self.as_ref().handle(received)
    }

    fn ready(&self) -> Option<ReadyFuture> {
        self.as_ref().ready()
    }
}

impl<F, Fut, E> BatchHandler for F
where
    F: Fn(Vec<Received>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<HandlerError>,
{
    fn handle(&self, batch: Vec<Received>) -> HandlerFuture {
        let future = self(batch);
        Box::pin(async move { future.await.map_err(Into::into) })
    }
}

/// Why a handler failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerError {
    /// Short, stable reason, such as `handler_error`.
    pub reason: String,
    /// The error's text.
    pub details: String,
    /// Whether another attempt may help.
    pub retryable: bool,
}

impl HandlerError {
    /// The reason of a failure by taking too long.
    pub const TIMEOUT: &'static str = "handler_timeout";
    /// The reason of a failure by a panic.
    pub const PANIC: &'static str = "handler_panic";

    /// A failure that another attempt may mend.
    pub fn retry(details: impl Into<String>) -> Self {
        Self {
            reason: "handler_error".to_owned(),
            details: details.into(),
            retryable: true,
        }
    }

    /// A failure that no attempt can mend: straight to the dead letters.
    pub fn reject(details: impl Into<String>) -> Self {
        Self {
            reason: "rejected".to_owned(),
            details: details.into(),
            retryable: false,
        }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.details)
    }
}

/// Any error of a handler's own counts as one that another attempt may mend.
/// (`HandlerError` itself is not an `Error`, so that this conversion exists.)
impl<E: std::error::Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retry(error.to_string())
    }
}

/// A `tower::Service` as a handler. Each message gets its own clone, made ready
/// before the message is started, so that limits in the stack act as
/// backpressure as far as the broker.
#[derive(Clone, Debug)]
pub struct ServiceHandler<S>(S);

impl<S> ServiceHandler<S> {
    /// Wraps a service.
    pub fn new(service: S) -> Self {
        Self(service)
    }
}

impl<S, E> Handler for ServiceHandler<S>
where
    S: Service<Received, Response = (), Error = E> + Clone + Send + Sync + 'static,
    S::Future: Send,
    E: fmt::Display + Send + 'static,
{
    fn handle(&self, received: Received) -> HandlerFuture {
        let service = self.0.clone();
        Box::pin(async move {
            service
                .oneshot(received)
                .await
                .map_err(|e| HandlerError::retry(e.to_string()))
        })
    }

    fn ready(&self) -> Option<ReadyFuture> {
        let mut service = self.0.clone();
        Some(Box::pin(async move {
            if let Err(error) = service.ready().await {
                return Turn::failed(HandlerError::retry(error.to_string()));
            }
            Turn::new(move |received| {
                let answer = service.call(received);
                Box::pin(
                    async move { answer.await.map_err(|e| HandlerError::retry(e.to_string())) },
                )
            })
        }))
    }
}
