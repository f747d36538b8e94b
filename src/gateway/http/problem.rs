//! RFC 9457 problems: how every refusal and failure is told to a client.

use std::{fmt, time::Duration};

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::error::{Assume, Error, ErrorCode};

/// What went wrong, in the form that clients get.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Problem(Box<Inner>);

#[derive(Clone, Debug, Serialize)]
struct Inner {
    /// A stable URI for the kind of problem.
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: String,
    code: &'static str,
    retryable: bool,
    assume: Assume,
    #[serde(skip_serializing_if = "Option::is_none")]
    topic: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    broker: Option<&'static str>,
    #[serde(skip)]
    retry_after: Option<Duration>,
}

impl Problem {
    /// A problem of HTTP itself, that no message was touched by.
    pub(super) fn http(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind: uri(code),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: detail.into(),
            code,
            retryable: false,
            assume: Assume::NotSent,
            topic: None,
            id: None,
            broker: None,
            retry_after: None,
        }))
    }

    /// The body or its parameters cannot be understood.
    pub(super) fn invalid(detail: impl Into<String>) -> Self {
        Error::rejected(ErrorCode::MessageInvalid, detail).into()
    }

    /// A query parameter or a setting of a request is wrong.
    pub(super) fn parameter(detail: impl Into<String>) -> Self {
        Error::rejected(ErrorCode::InvalidConfig, detail).into()
    }

    /// The body is over a limit.
    pub(super) fn too_large(detail: impl Into<String>) -> Self {
        Error::rejected(ErrorCode::MessageTooLarge, detail).into()
    }

    /// The hub is on its way out.
    pub(super) fn shutting_down() -> Self {
        Error::new(
            ErrorCode::BrokerUnavailable,
            "the hub is shutting down and takes nothing new; send it again to another one, or later",
        )
        .into()
    }

    /// The body stopped coming.
    pub(super) fn idle() -> Self {
        Self::http(
            StatusCode::REQUEST_TIMEOUT,
            "TIMEOUT",
            "the body brought nothing for too long; send it again",
        )
        .retry_after(RETRY_AFTER)
    }

    /// A lease token that means nothing here.
    pub(super) fn gone(detail: impl Into<String>) -> Self {
        Self::http(StatusCode::GONE, "LEASE_EXPIRED", detail)
    }

    /// The status that it is answered with.
    pub(super) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Names the topic where the error did not.
    pub(super) fn on(mut self, topic: &str) -> Self {
        self.0.topic.get_or_insert_with(|| topic.to_owned());
        self
    }

    /// Names the message where the error did not.
    pub(super) fn with_id(mut self, id: &str) -> Self {
        self.0.id.get_or_insert_with(|| id.to_owned());
        self
    }

    /// Says when it may be tried again.
    pub(super) fn retry_after(mut self, after: Duration) -> Self {
        self.0.retryable = true;
        self.0.retry_after = Some(after);
        self
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let (status, title) = describe(error.code());
        let mut detail = error.message().to_owned();
        let mut cause = std::error::Error::source(&error);
        while let Some(why) = cause {
            detail.push_str(": ");
            detail.push_str(&why.to_string());
            cause = why.source();
        }
        Self(Box::new(Inner {
            kind: uri(error.code().as_str()),
            title,
            status: status.as_u16(),
            detail,
            code: error.code().as_str(),
            retryable: error.is_retryable(),
            assume: error.assume(),
            topic: error.topic().map(str::to_owned),
            id: error.message_id().map(str::to_owned),
            broker: error.broker().map(|b| b.as_str()),
            retry_after: matches!(
                status,
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
            )
            .then_some(RETRY_AFTER),
        }))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code, self.0.detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (
            self.status(),
            [(header::CONTENT_TYPE, "application/problem+json")],
            body,
        )
            .into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.0.retry_after {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from(after.as_secs().max(1)),
            );
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

fn uri(code: &str) -> String {
    format!(
        "urn:messaging-hub:problem:{}",
        code.to_ascii_lowercase().replace('_', "-")
    )
}

/// Status and title of each code.
fn describe(code: ErrorCode) -> (StatusCode, &'static str) {
    use ErrorCode as C;
    match code {
        C::MessageInvalid | C::SerializationError => {
            (StatusCode::BAD_REQUEST, "The message is not valid")
        }
        C::MessageExpired => (StatusCode::BAD_REQUEST, "The message has expired"),
        C::InvalidConfig | C::MissingConfig => {
            (StatusCode::BAD_REQUEST, "A setting is wrong or missing")
        }
        C::MessageTooLarge => (
            StatusCode::PAYLOAD_TOO_LARGE,
            "The message is over the limit",
        ),
        C::TopicNotFound => (StatusCode::NOT_FOUND, "There is no such topic"),
        C::QueueNotFound => (StatusCode::NOT_FOUND, "There is no such queue"),
        C::ExchangeNotFound => (StatusCode::NOT_FOUND, "There is no such exchange"),
        C::PublishRejected => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "The broker refused the message",
        ),
        C::QueueDeclareFailed | C::TopicCreateFailed => (
            StatusCode::CONFLICT,
            "It could not be made, or exists with other settings",
        ),
        C::SchemaInvalid => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "The payload is not as its schema says",
        ),
        C::SchemaUnavailable => (
            StatusCode::SERVICE_UNAVAILABLE,
            "The schema registry cannot be asked",
        ),
        C::ScheduleNotFound => (StatusCode::NOT_FOUND, "Nothing of this id is scheduled"),
        C::TransactionFenced => (
            StatusCode::CONFLICT,
            "Another publisher has the transactional id",
        ),
        C::ReplayNotFound => (StatusCode::NOT_FOUND, "There is no such replay"),
        C::ReplayExists => (StatusCode::CONFLICT, "There is a replay of this id"),
        C::ReplayLimit => (StatusCode::TOO_MANY_REQUESTS, "Too many replays are active"),
        C::AuthenticationFailed => (
            StatusCode::BAD_GATEWAY,
            "The broker refused the hub's credentials",
        ),
        C::SpoolFull => (StatusCode::SERVICE_UNAVAILABLE, "The spool is full"),
        C::BrokerUnavailable | C::OperationCanceled => {
            (StatusCode::SERVICE_UNAVAILABLE, "Not available now")
        }
        C::ConnectionFailed
        | C::ConnectionClosed
        | C::ConnectionTimeout
        | C::ReconnectionFailed
        | C::SubscribeFailed
        | C::ConsumeFailed
        | C::ConsumerCanceled => (StatusCode::SERVICE_UNAVAILABLE, "The broker is away"),
        C::Timeout | C::PublishTimeout | C::ConfirmTimeout => {
            (StatusCode::GATEWAY_TIMEOUT, "It took too long")
        }
        C::PublishFailed | C::AckFailed | C::NackFailed | C::DeadLetterFailed => {
            (StatusCode::BAD_GATEWAY, "The broker did not do it")
        }
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "Something failed"),
    }
}

/// What a client is told to wait when the hub has no room or no broker.
const RETRY_AFTER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_spool_is_503_not_sent_retryable_with_retry_after() {
        let problem = Problem::from(Error::new(ErrorCode::SpoolFull, "no room").on("t"));
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["code"], "SPOOL_FULL");
        assert_eq!(json["retryable"], true);
        assert_eq!(json["assume"], "not_sent");
        assert_eq!(json["topic"], "t");
        let response = problem.into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
    }

    #[test]
    fn every_code_has_a_client_or_server_error_status() {
        for code in ErrorCode::ALL {
            let (status, title) = describe(*code);
            assert!(status.is_client_error() || status.is_server_error());
            assert!(!title.is_empty());
        }
    }
}
