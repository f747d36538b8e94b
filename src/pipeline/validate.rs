//! Rules that a message must keep before its handler sees it. A message that
//! breaks one is rejected: no attempt could mend it. It checks form only; whether
//! a payload keeps a schema is another matter.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::{Either, Ready, ready};
use tower::{BoxError, Service};

use super::fault::boxed;
use crate::{
    broker::{HandlerError, Received},
    error::Result,
};

/// What a message must have. Without a rule it is refused when built.
#[derive(Clone, Debug, Default)]
pub struct Validate {
    required: Vec<Field>,
    most: Option<usize>,
}

/// A field that may be required.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field {
    /// The key that order is kept by.
    Key,
    /// Which request or conversation it belongs to.
    CorrelationId,
    /// Where an answer goes.
    ReplyTo,
    /// The payload's media type.
    ContentType,
    /// The trace it belongs to.
    TraceId,
    /// A payload that is not empty.
    Payload,
    /// A header of this name.
    Header(String),
    /// A value that is not null at this JSON pointer (`/user/id`) of a JSON
    /// payload.
    Json(String),
}

impl Validate {
    /// No rule yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires a field.
    #[must_use]
    pub fn require(mut self, field: Field) -> Self {
        self.required.push(field);
        self
    }

    /// Refuses payloads of more bytes. Default: no limit but the broker's.
    #[must_use]
    pub fn max_payload_bytes(mut self, most: usize) -> Self {
        self.most = Some(most);
        self
    }

    pub(super) fn check_settings(&self) -> Result<()> {
        if self.required.is_empty() && self.most.is_none() {
            return Err(super::order::invalid(
                "validate has no rule; add .require(..) or .max_payload_bytes(..)".to_owned(),
            ));
        }
        for field in &self.required {
            if let Field::Json(pointer) = field
                && !pointer.is_empty()
                && !pointer.starts_with('/')
            {
                return Err(super::order::invalid(format!(
                    "validate: {pointer:?} is no JSON pointer; it begins with a slash, as /user/id"
                )));
            }
        }
        Ok(())
    }

    /// Whether a message keeps the rules.
    pub(super) fn check(&self, received: &Received) -> Result<(), HandlerError> {
        let message = &received.message;
        if let Some(most) = self.most
            && message.payload.len() > most
        {
            return Err(broken(format!(
                "the payload has {} bytes, and {most} are allowed",
                message.payload.len()
            )));
        }
        let mut parsed = None;
        for field in &self.required {
            let there = match field {
                Field::Key => message.key.is_some(),
                Field::CorrelationId => message.correlation_id.is_some(),
                Field::ReplyTo => message.reply_to.is_some(),
                Field::ContentType => message.content_type.is_some(),
                Field::TraceId => message.trace_id.is_some(),
                Field::Payload => !message.payload.is_empty(),
                // Names of headers are in lower case once they were published.
                Field::Header(name) => message.headers.keys().any(|k| k.eq_ignore_ascii_case(name)),
                Field::Json(pointer) => {
                    let json: &serde_json::Value = match &mut parsed {
                        Some(json) => json,
                        None => parsed.insert(
                            serde_json::from_slice(&message.payload)
                                .map_err(|e| broken(format!("the payload is not JSON: {e}")))?,
                        ),
                    };
                    json.pointer(pointer).is_some_and(|v| !v.is_null())
                }
            };
            if !there {
                return Err(broken(format!("{field} is missing")));
            }
        }
        Ok(())
    }
}

fn broken(details: String) -> HandlerError {
    HandlerError {
        reason: "invalid_message".to_owned(),
        details,
        retryable: false,
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key => f.write_str("key"),
            Self::CorrelationId => f.write_str("correlation_id"),
            Self::ReplyTo => f.write_str("reply_to"),
            Self::ContentType => f.write_str("content_type"),
            Self::TraceId => f.write_str("trace_id"),
            Self::Payload => f.write_str("payload"),
            Self::Header(name) => write!(f, "the header {name}"),
            Self::Json(pointer) => write!(f, "the payload's {pointer}"),
        }
    }
}

/// The layer's service.
#[derive(Clone, Debug)]
pub(super) struct Validated<S> {
    pub(super) rules: Arc<Validate>,
    pub(super) inner: S,
}

impl<S> Service<Received> for Validated<S>
where
    S: Service<Received, Response = (), Error = BoxError>,
{
    type Response = ();
    type Error = BoxError;
    type Future = Either<S::Future, Ready<Result<(), BoxError>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, received: Received) -> Self::Future {
        match self.rules.check(&received) {
            Ok(()) => Either::Left(self.inner.call(received)),
            Err(error) => Either::Right(ready(Err(boxed(error)))),
        }
    }
}
