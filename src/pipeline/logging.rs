//! Logs calls. Never a payload, never a header.

use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tower::{BoxError, Service};
use tracing::Instrument;

use super::build::Input;

/// The layer's service.
#[derive(Clone, Debug)]
pub(super) struct Logged<S>(pub(super) S);

impl<S, R> Service<R> for Logged<S>
where
    S: Service<R, Response = (), Error = BoxError>,
    S::Future: Send + 'static,
    R: Input,
{
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, input: R) -> Self::Future {
        let first = input.first();
        let span = tracing::info_span!(
            "handle",
            topic = first.map(|r| r.topic.as_str()),
            id = first.map(|r| r.message.id.as_str()),
            kind = first.map(|r| r.message.kind.as_str()),
            retry_count = first.map(|r| r.message.retry_count),
            messages = input.len(),
        );
        let since = Instant::now();
        let call = span.in_scope(|| self.0.call(input));
        let logged = async move {
            let result = call.await;
            let taken = since.elapsed();
            match &result {
                Ok(()) => tracing::debug!(?taken, "handled"),
                Err(error) => tracing::warn!(?taken, %error, "a handler failed"),
            }
            result
        };
        Box::pin(logged.instrument(span))
    }
}
