//! What travels: [`Message`], and the two richer forms that become one,
//! [`Task`] and [`Event`]. Plain data, no I/O; how it looks on a wire is
//! [`wire`]'s business alone.

mod event;
mod id;
mod key;
mod priority;
mod task;
mod timestamp;
pub mod wire;

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorCode, Result};

pub use event::{Event, EventAttributes, EventKind};
pub use id::{MAX_ID_LEN, MessageId};
pub use key::Key;
pub use priority::Priority;
pub use task::{Task, TaskAttributes, TaskState};
pub use timestamp::Timestamp;

/// User metadata: lower-case names, text values, ordered by name.
pub type Headers = BTreeMap<String, String>;

/// Bytes that a message may always have beside its payload.
const MIN_BESIDE: usize = 64 * 1024;

/// Names beginning with this belong to the hub and are refused from users.
pub const RESERVED_HEADER_PREFIX: &str = "hub-";

/// One message, as it is published and as readers get it.
///
/// The JSON form (field names of the reference, payload in base64, times in
/// RFC 3339) is what HTTP speaks. Unknown fields are refused, so that a
/// misspelt one cannot be lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Message {
    /// Unique id. Default: a new UUIDv7.
    pub id: MessageId,
    /// What kind of message it is; handlers can be registered by it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The body, opaque to the hub.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub payload: Bytes,
    /// Media type of the payload. Default: none, which brokers see as
    /// `application/json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// Encoding of the payload, such as `gzip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_encoding: Option<String>,
    /// User metadata.
    pub headers: Headers,
    /// When the message was made. Default: now.
    pub timestamp: Timestamp,
    /// 0 to 10, default 5.
    pub priority: Priority,
    /// Order is kept among messages of one topic and key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Key>,
    /// Attempts that failed so far.
    pub retry_count: u32,
    /// Failed attempts after which it goes to the dead letters. Default 3.
    pub max_retries: u32,
    /// W3C trace id (32 hexadecimal digits) or a whole `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Links a reply to its request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Where a reply goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// When it stops being worth handling; absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiration: Option<Timestamp>,
    /// Whether it must survive restarts. Default persistent.
    pub delivery_mode: DeliveryMode,
    /// Where it stands. Default pending.
    pub state: MessageState,
    /// Why it failed last, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Set for readers: it was handed out before.
    pub redelivered: bool,
    /// The partition: a wish when publishing, a fact when reading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<i32>,
    /// Set for readers of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// Set for readers: the topic it came from. When publishing it must be
    /// absent or equal to the topic published to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// What makes it a task, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Box<TaskAttributes>>,
    /// What makes it a CloudEvent, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<Box<EventAttributes>>,
}

/// Whether a message must survive restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryMode {
    /// Goes the same way in the same order, without waiting for a disk.
    Transient,
    /// Survives what its backend promises to survive.
    #[default]
    Persistent,
}

/// Where a message stands in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageState {
    /// Not handled yet.
    #[default]
    Pending,
    /// In a handler's hands.
    Processing,
    /// Handled.
    Completed,
    /// Failed, to be tried again.
    Failed,
    /// In the dead letters.
    DeadLettered,
    /// Too late to be handled.
    Expired,
}

impl Default for Message {
    fn default() -> Self {
        Self::bare(MessageId::generate(), Timestamp::now())
    }
}

impl Message {
    /// An empty message; whoever has an id for it makes none first.
    pub(crate) fn bare(id: MessageId, timestamp: Timestamp) -> Self {
        Self {
            id,
            kind: String::new(),
            payload: Bytes::new(),
            content_type: None,
            content_encoding: None,
            headers: Headers::new(),
            timestamp,
            priority: Priority::NORMAL,
            key: None,
            retry_count: 0,
            max_retries: Self::DEFAULT_MAX_RETRIES,
            trace_id: None,
            correlation_id: None,
            reply_to: None,
            expiration: None,
            delivery_mode: DeliveryMode::Persistent,
            state: MessageState::Pending,
            error: None,
            redelivered: false,
            partition: None,
            offset: None,
            topic: None,
            task: None,
            event: None,
        }
    }

    /// Retries of a message that says nothing.
    pub const DEFAULT_MAX_RETRIES: u32 = 3;

    /// A message of a type, with a payload and a fresh id.
    pub fn new(kind: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Self {
            kind: kind.into(),
            payload: payload.into(),
            ..Self::default()
        }
    }

    /// A message whose payload is `body` as JSON.
    ///
    /// # Errors
    /// `SERIALIZATION_ERROR` when `body` has no JSON form.
    pub fn json(kind: impl Into<String>, body: &impl Serialize) -> Result<Self> {
        let payload = serde_json::to_vec(body).map_err(|e| {
            Error::rejected(ErrorCode::SerializationError, "the body has no JSON form").caused_by(e)
        })?;
        Ok(Self::new(kind, payload).with_content_type("application/json"))
    }

    /// Sets the id; from now on the id counts as brought by the caller, and a
    /// repeat of it is recognised.
    #[must_use]
    pub fn with_id(mut self, id: MessageId) -> Self {
        self.id = id;
        self
    }

    /// Sets the key that order is kept by.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Key>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets one header.
    #[must_use]
    pub fn with_header(mut self, name: impl AsRef<str>, value: impl Into<String>) -> Self {
        self.headers
            .insert(name.as_ref().to_ascii_lowercase(), value.into());
        self
    }

    /// Sets the priority.
    #[must_use]
    pub fn with_priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the media type of the payload.
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets the encoding of the payload.
    #[must_use]
    pub fn with_content_encoding(mut self, encoding: impl Into<String>) -> Self {
        self.content_encoding = Some(encoding.into());
        self
    }

    /// Sets when it was made.
    #[must_use]
    pub fn with_timestamp(mut self, timestamp: Timestamp) -> Self {
        self.timestamp = timestamp;
        self
    }

    /// Sets the trace id.
    #[must_use]
    pub fn with_trace_id(mut self, trace_id: impl Into<String>) -> Self {
        self.trace_id = Some(trace_id.into());
        self
    }

    /// Sets the correlation id.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// Sets where a reply goes.
    #[must_use]
    pub fn with_reply_to(mut self, topic: impl Into<String>) -> Self {
        self.reply_to = Some(topic.into());
        self
    }

    /// Sets when it expires.
    #[must_use]
    pub fn with_expiration(mut self, at: Timestamp) -> Self {
        self.expiration = Some(at);
        self
    }

    /// Lets it expire `ttl` after now.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.expiration = Some(Timestamp::now() + ttl);
        self
    }

    /// Sets the retry limit.
    #[must_use]
    pub fn with_max_retries(mut self, max: u32) -> Self {
        self.max_retries = max;
        self
    }

    /// Sets whether it must survive restarts.
    #[must_use]
    pub fn with_delivery_mode(mut self, mode: DeliveryMode) -> Self {
        self.delivery_mode = mode;
        self
    }

    /// Asks for a partition of a stream.
    #[must_use]
    pub fn with_partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// When it is worth nothing any more: its expiration, or its task's deadline,
    /// whichever comes first.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        let deadline = self.task.as_ref().and_then(|task| task.deadline);
        [self.expiration, deadline].into_iter().flatten().min()
    }

    /// Whether it is past its expiration, or its task's deadline, at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at().is_some_and(|at| at <= now)
    }

    /// Whether a failed attempt leaves another one.
    #[must_use]
    pub fn can_retry(&self) -> bool {
        self.retry_count < self.max_retries
    }

    /// Whether it must survive restarts.
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.delivery_mode == DeliveryMode::Persistent
    }

    /// Bytes that it takes, roughly: everything in it that has no fixed size.
    #[must_use]
    pub fn size(&self) -> usize {
        let pairs = |map: &BTreeMap<String, String>| -> usize {
            map.iter().map(|(k, v)| k.len() + v.len()).sum()
        };
        let texts = [
            &self.content_type,
            &self.content_encoding,
            &self.trace_id,
            &self.correlation_id,
            &self.reply_to,
            &self.error,
            &self.topic,
        ];
        let texts = texts.into_iter().flatten().map(String::len).sum::<usize>();
        let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let task = self.task.as_ref().map_or(0, |t| {
            optional(&t.worker_id) + optional(&t.parent_task_id) + pairs(&t.metadata)
        });
        let event = self.event.as_ref().map_or(0, |e| {
            e.source.len() + optional(&e.subject) + optional(&e.data_schema) + pairs(&e.extensions)
        });
        self.payload.len()
            + self.kind.len()
            + self.id.as_str().len()
            + self.key.as_ref().map_or(0, |k| k.as_bytes().len())
            + pairs(&self.headers)
            + texts
            + task
            + event
    }

    /// Checks what every entrance must check before accepting a message.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` (reserved or malformed header, over-long type) or
    /// `MESSAGE_TOO_LARGE`; both refusals that name the field.
    pub fn validate(&self, max_message_bytes: usize) -> Result<()> {
        let invalid = |why: String| {
            Err(Error::rejected(ErrorCode::MessageInvalid, why).with_id(self.id.as_str()))
        };
        if self.payload.len() > max_message_bytes {
            return Err(Error::rejected(
                ErrorCode::MessageTooLarge,
                format!(
                    "the payload has {} bytes, the limit max_message_bytes is {max_message_bytes}",
                    self.payload.len()
                ),
            )
            .with_id(self.id.as_str()));
        }
        // Ids, headers and attributes have some room however small payloads must be.
        let (beside, most) = (
            self.size() - self.payload.len(),
            max_message_bytes.max(MIN_BESIDE),
        );
        if beside > most {
            return Err(Error::rejected(
                ErrorCode::MessageTooLarge,
                format!("what stands beside the payload has {beside} bytes, at most {most} fit"),
            )
            .with_id(self.id.as_str()));
        }
        if self.kind.len() > 255 {
            return invalid(format!(
                "the type has {} bytes, at most 255 fit on every broker",
                self.kind.len()
            ));
        }
        for (field, value) in [
            ("correlation_id", &self.correlation_id),
            ("reply_to", &self.reply_to),
            ("content_type", &self.content_type),
            ("content_encoding", &self.content_encoding),
        ] {
            if value.as_ref().is_some_and(|v| v.len() > 255) {
                return invalid(format!("{field} is longer than 255 bytes"));
            }
        }
        for name in self.headers.keys() {
            if name.is_empty() || name.len() > 255 {
                return invalid(format!("header name {name:?} must have 1 to 255 bytes"));
            }
            if let Some(why) = wire::why_refused(name) {
                return invalid(why);
            }
        }
        let extensions = self.event.iter().flat_map(|e| e.extensions.keys());
        for name in extensions {
            if wire::is_event_attribute(name) {
                return invalid(format!(
                    "extension {name:?} is an attribute that each event has; set that instead"
                ));
            }
        }
        if self.partition.is_some_and(|p| p < 0) {
            return invalid("partition must not be negative".to_owned());
        }
        Ok(())
    }
}

fn to_base64<S: Serializer>(bytes: &Bytes, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&BASE64_STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(d: D) -> Result<Bytes, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
    BASE64_STANDARD
        .decode(text.as_bytes())
        .map(Bytes::from)
        .map_err(|e| serde::de::Error::custom(format!("payload is not base64: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_arrive_as_something_else_is_refused_by_its_name() {
        let refused = |message: Message| message.validate(1024).unwrap_err().to_string();
        for (name, instead) in [
            ("content-type", "content_type"),
            ("Content-Encoding", "content_encoding"),
            ("a\u{0}b", "control character"),
            ("hub-x", "reserved"),
        ] {
            let mut named = Message::new("t", "x").with_header(name, "v");
            let why = refused(named.clone());
            assert!(why.contains(instead), "{name:?}: {why}");
            // A copy of one that was read, and had it, goes without.
            wire::take_off_refused(&mut named, None);
            named.validate(1024).unwrap();
        }
        let mut event = Message::new("t", "x");
        event
            .event
            .get_or_insert_default()
            .extensions
            .insert("id".into(), "other".into());
        assert!(refused(event).contains("\"id\""));
        let plain = Message::new("t", "x").with_header("content-language", "de");
        plain.validate(1024).unwrap();
    }
}
