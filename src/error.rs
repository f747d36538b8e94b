//! One error for the whole crate: what failed, where, and what the caller may
//! assume about the message. It refuses to be a bag of strings: the code decides
//! whether a retry can help, [`Assume`] says what became of the message.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::broker::BrokerType;

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its code, context and cause. Cheap to clone.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    code: ErrorCode,
    message: String,
    assume: Assume,
    cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
    broker: Option<BrokerType>,
    topic: Option<String>,
    message_id: Option<String>,
}

/// What the sender of a message may assume after a failed publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Assume {
    /// The broker does not have the message; sending again cannot duplicate it.
    NotSent,
    /// The broker, or the hub, looked at the message and refused it.
    Rejected,
    /// The message may or may not be there; sending again may duplicate it.
    Unknown,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $retryable:literal;)*) => {
        /// Why an operation failed. The text form is stable and is what HTTP
        /// clients and logs see.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum ErrorCode { $($(#[$doc])* #[serde(rename = $text)] $name,)* }

        impl ErrorCode {
            /// Every code, in the order of the reference.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The stable text form, such as `CONNECTION_FAILED`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Whether the same call may succeed later without being changed.
            #[must_use]
            pub const fn is_retryable(self) -> bool {
                match self { $(Self::$name => $retryable,)* }
            }
        }
    };
}

codes! {
    /// No connection could be made, or it was lost.
    ConnectionFailed = "CONNECTION_FAILED", true;
    /// The connection was closed, by us or by the peer.
    ConnectionClosed = "CONNECTION_CLOSED", true;
    /// No connection within the time allowed.
    ConnectionTimeout = "CONNECTION_TIMEOUT", true;
    /// A lost connection could not be made again.
    ReconnectionFailed = "RECONNECTION_FAILED", true;
    /// The broker refused the credentials or the permission.
    AuthenticationFailed = "AUTHENTICATION_FAILED", false;
    /// A publish did not succeed.
    PublishFailed = "PUBLISH_FAILED", true;
    /// A publish had no outcome within its time.
    PublishTimeout = "PUBLISH_TIMEOUT", true;
    /// The broker refused the message (unroutable, nacked).
    PublishRejected = "PUBLISH_REJECTED", false;
    /// The broker did not confirm in time.
    ConfirmTimeout = "CONFIRM_TIMEOUT", true;
    /// A subscription could not be made.
    SubscribeFailed = "SUBSCRIBE_FAILED", true;
    /// Consuming failed.
    ConsumeFailed = "CONSUME_FAILED", true;
    /// The broker cancelled the consumer.
    ConsumerCanceled = "CONSUMER_CANCELED", true;
    /// A handler failed or panicked.
    HandlerError = "HANDLER_ERROR", true;
    /// An acknowledgement did not reach the broker.
    AckFailed = "ACK_FAILED", true;
    /// A negative acknowledgement did not reach the broker.
    NackFailed = "NACK_FAILED", true;
    /// A message could not be moved to the dead letters.
    DeadLetterFailed = "DEAD_LETTER_FAILED", true;
    /// The queue does not exist.
    QueueNotFound = "QUEUE_NOT_FOUND", false;
    /// The queue could not be declared, or exists with other arguments.
    QueueDeclareFailed = "QUEUE_DECLARE_FAILED", false;
    /// The topic does not exist.
    TopicNotFound = "TOPIC_NOT_FOUND", false;
    /// The topic could not be created.
    TopicCreateFailed = "TOPIC_CREATE_FAILED", false;
    /// The exchange does not exist.
    ExchangeNotFound = "EXCHANGE_NOT_FOUND", false;
    /// The message is over the limit.
    MessageTooLarge = "MESSAGE_TOO_LARGE", false;
    /// The message expired before it could be handled.
    MessageExpired = "MESSAGE_EXPIRED", false;
    /// The message breaks a rule (reserved header, bad id, ...).
    MessageInvalid = "MESSAGE_INVALID", false;
    /// Encoding or decoding failed.
    SerializationError = "SERIALIZATION_ERROR", false;
    /// A setting has a wrong value, or an option is not supported here.
    InvalidConfig = "INVALID_CONFIG", false;
    /// A required setting is missing.
    MissingConfig = "MISSING_CONFIG", false;
    /// No broker can take the operation now.
    BrokerUnavailable = "BROKER_UNAVAILABLE", true;
    /// The spool has no room.
    SpoolFull = "SPOOL_FULL", true;
    /// Another publisher opened the same transactional id later.
    TransactionFenced = "TRANSACTION_FENCED", false;
    /// As many replays are active as may be.
    ReplayLimit = "REPLAY_LIMIT", true;
    /// There is a replay of this id.
    ReplayExists = "REPLAY_EXISTS", false;
    /// The payload is not as its route's schema says.
    SchemaInvalid = "SCHEMA_INVALID", false;
    /// The schema registry cannot be asked.
    SchemaUnavailable = "SCHEMA_UNAVAILABLE", true;
    /// Nothing of this id is scheduled.
    ScheduleNotFound = "SCHEDULE_NOT_FOUND", false;
    /// There is no replay of this id (any more).
    ReplayNotFound = "REPLAY_NOT_FOUND", false;
    /// An operation took longer than it was given.
    Timeout = "TIMEOUT", true;
    /// The operation was cancelled, or the component is closed.
    OperationCanceled = "OPERATION_CANCELED", false;
    /// Anything else.
    UnknownError = "UNKNOWN_ERROR", false;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Error {
    /// An error that concerns no message, or one that was certainly not sent.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let assume = match code {
            ErrorCode::PublishRejected
            | ErrorCode::MessageTooLarge
            | ErrorCode::MessageInvalid
            | ErrorCode::MessageExpired
            | ErrorCode::SerializationError
            | ErrorCode::QueueNotFound
            | ErrorCode::TopicNotFound
            | ErrorCode::ExchangeNotFound
            | ErrorCode::AuthenticationFailed => Assume::Rejected,
            ErrorCode::ConfirmTimeout | ErrorCode::PublishTimeout => Assume::Unknown,
            _ => Assume::NotSent,
        };
        Self(Box::new(Inner {
            code,
            message: message.into(),
            assume,
            cause: None,
            broker: None,
            topic: None,
            message_id: None,
        }))
    }

    /// A refusal: looked at and turned down, never a reason to fail over.
    pub fn rejected(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(code, message).assuming(Assume::Rejected)
    }

    /// An outcome that nobody can know.
    pub fn unknown(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(code, message).assuming(Assume::Unknown)
    }

    /// Sets what the caller may assume.
    #[must_use]
    pub fn assuming(mut self, assume: Assume) -> Self {
        self.0.assume = assume;
        self
    }

    /// Adds the error that this one follows from.
    #[must_use]
    pub fn caused_by(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.cause = Some(Arc::new(cause));
        self
    }

    /// Names the broker that was involved.
    #[must_use]
    pub fn at(mut self, broker: BrokerType) -> Self {
        self.0.broker = Some(broker);
        self
    }

    /// Names the topic or queue that was involved.
    #[must_use]
    pub fn on(mut self, topic: impl Into<String>) -> Self {
        self.0.topic = Some(topic.into());
        self
    }

    /// Names the message that was involved.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<String>) -> Self {
        self.0.message_id = Some(id.into());
        self
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.0.code
    }

    /// The text, without context.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What the caller may assume about the message.
    #[must_use]
    pub fn assume(&self) -> Assume {
        self.0.assume
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.code.is_retryable()
    }

    /// Whether this is a refusal, which never triggers failover.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        self.0.assume == Assume::Rejected
    }

    /// The broker involved, if one was.
    #[must_use]
    pub fn broker(&self) -> Option<BrokerType> {
        self.0.broker
    }

    /// The topic involved, if one was.
    #[must_use]
    pub fn topic(&self) -> Option<&str> {
        self.0.topic.as_deref()
    }

    /// The message involved, if one was.
    #[must_use]
    pub fn message_id(&self) -> Option<&str> {
        self.0.message_id.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code, self.0.message)?;
        if let Some(broker) = self.0.broker {
            write!(f, " (broker {broker})")?;
        }
        if let Some(topic) = &self.0.topic {
            write!(f, " (topic {topic})")?;
        }
        if let Some(id) = &self.0.message_id {
            write!(f, " (message {id})")?;
        }
        if let Some(cause) = &self.0.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({self}; assume {:?})", self.0.assume)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.cause.as_deref().map(|c| c as _)
    }
}
