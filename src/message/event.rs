//! Events: facts that any number of readers may want. CloudEvents 1.0.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Headers, Key, Message, MessageId, Timestamp};

/// What an event has beyond a message: CloudEvents context attributes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventAttributes {
    /// Who says so; a URI reference.
    pub source: String,
    /// What it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Schema of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_schema: Option<String>,
    /// CloudEvents extension attributes, by name.
    #[serde(skip_serializing_if = "Headers::is_empty")]
    pub extensions: Headers,
}

/// A fact that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Event {
    /// Unique id, default a UUIDv7.
    pub id: MessageId,
    /// What happened, such as `llm.request.started`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who says so.
    pub source: String,
    /// What it is about.
    pub subject: Option<String>,
    /// The details.
    pub data: Bytes,
    /// Default `application/json`.
    pub data_content_type: String,
    /// Schema of the data.
    pub data_schema: Option<String>,
    /// When it happened.
    pub timestamp: Timestamp,
    /// User metadata.
    pub headers: Headers,
    /// Trace id.
    pub trace_id: Option<String>,
    /// Correlation id.
    pub correlation_id: Option<String>,
    /// Partition, for readers.
    pub partition: Option<i32>,
    /// Offset, for readers.
    pub offset: Option<i64>,
    /// The key that order is kept by.
    pub key: Option<Key>,
    /// CloudEvents extension attributes.
    pub extensions: Headers,
}

impl Default for Event {
    fn default() -> Self {
        Self::new("", "", Bytes::new())
    }
}

impl Event {
    /// An event of a type from a source, with its data.
    pub fn new(kind: impl Into<String>, source: impl Into<String>, data: impl Into<Bytes>) -> Self {
        Self {
            id: MessageId::generate(),
            kind: kind.into(),
            source: source.into(),
            subject: None,
            data: data.into(),
            data_content_type: "application/json".to_owned(),
            data_schema: None,
            timestamp: Timestamp::now(),
            headers: Headers::new(),
            trace_id: None,
            correlation_id: None,
            partition: None,
            offset: None,
            key: None,
            extensions: Headers::new(),
        }
    }
}

impl From<Event> for Message {
    fn from(event: Event) -> Self {
        Self {
            id: event.id,
            kind: event.kind,
            payload: event.data,
            content_type: Some(event.data_content_type),
            headers: event.headers,
            timestamp: event.timestamp,
            trace_id: event.trace_id,
            correlation_id: event.correlation_id,
            partition: event.partition,
            offset: event.offset,
            key: event.key,
            event: Some(Box::new(EventAttributes {
                source: event.source,
                subject: event.subject,
                data_schema: event.data_schema,
                extensions: event.extensions,
            })),
            ..Self::default()
        }
    }
}

impl From<Message> for Event {
    fn from(message: Message) -> Self {
        let attributes = message.event.map(|e| *e).unwrap_or_default();
        Self {
            id: message.id,
            kind: message.kind,
            source: attributes.source,
            subject: attributes.subject,
            data: message.payload,
            data_content_type: message
                .content_type
                .unwrap_or_else(|| "application/json".to_owned()),
            data_schema: attributes.data_schema,
            timestamp: message.timestamp,
            headers: message.headers,
            trace_id: message.trace_id,
            correlation_id: message.correlation_id,
            partition: message.partition,
            offset: message.offset,
            key: message.key,
            extensions: attributes.extensions,
        }
    }
}

macro_rules! kinds {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// The event types that the hub's users agree on. Any other text is a
        /// valid type too.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        #[non_exhaustive]
        pub enum EventKind { $($name),* }

        impl EventKind {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The type's text.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

kinds! {
    LlmRequestStarted = "llm.request.started",
    LlmRequestCompleted = "llm.request.completed",
    LlmRequestFailed = "llm.request.failed",
    LlmStreamToken = "llm.stream.token",
    LlmStreamEnd = "llm.stream.end",
    DebateStarted = "debate.started",
    DebateRound = "debate.round",
    DebateCompleted = "debate.completed",
    DebateFailed = "debate.failed",
    VerificationStarted = "verification.started",
    VerificationCompleted = "verification.completed",
    VerificationFailed = "verification.failed",
    ProviderDiscovered = "provider.discovered",
    ProviderScored = "provider.scored",
    ProviderHealthCheck = "provider.health_check",
    ModelRanked = "model.ranked",
    TeamSelected = "team.selected",
    TaskCreated = "task.created",
    TaskStarted = "task.started",
    TaskCompleted = "task.completed",
    TaskFailed = "task.failed",
    TaskCanceled = "task.canceled",
    SystemStartup = "system.startup",
    SystemShutdown = "system.shutdown",
    SystemHealth = "system.health",
    SystemError = "system.error",
    AuditLog = "audit.log",
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<EventKind> for String {
    fn from(kind: EventKind) -> Self {
        kind.as_str().to_owned()
    }
}
