//! Handlers: an async function, or any `tower::Service`, over what was received.

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
/// before the call, so that limits in the stack act as backpressure.
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
}
