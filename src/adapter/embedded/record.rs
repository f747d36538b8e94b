//! What the broker writes to its journal, and how it reads it back. Pure.
//!
//! ```text
//!   version (1 byte) | kind (1 byte) | numbers, big-endian | JSON or text | payload
//! ```
//!
//! A message lies as its metadata in JSON, with its length in front, and then
//! the payload as it is. What follows from where it lies (topic, partition,
//! offset) is not written twice. It refuses to know when something is written,
//! and what a set of records means together.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::log::RecordId;
use crate::{
    broker::{QueueOptions, TopicOptions},
    message::{
        DeliveryMode, EventAttributes, Headers, Key, Message, MessageState, TaskAttributes,
        Timestamp,
        wire::{Failure, Marks, Replayed},
    },
};

/// One entry of a journal. Queues and streams are named, in the records that
/// belong to them, by the id of the record that declares them: what a deleted
/// one has left belongs to nobody, also when its name lives again.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    /// A queue exists.
    Queue { name: String, options: QueueOptions },
    /// A queue holds a message.
    Task {
        queue: RecordId,
        /// When it became ready, or, of one that rests, when it will be.
        ready: Timestamp,
        rests: bool,
        content: Content,
    },
    /// Messages of a queue that may have been handed out: those before `below`.
    Handed { queue: RecordId, below: RecordId },
    /// A stream exists.
    Stream { name: String, options: TopicOptions },
    /// A stream holds a message.
    Event {
        stream: RecordId,
        partition: i32,
        offset: i64,
        appended: Timestamp,
        content: Content,
    },
    /// A partition from which retention took everything goes on at `next`.
    Base {
        stream: RecordId,
        partition: i32,
        next: i64,
    },
    /// How far a group has come.
    Position {
        group: String,
        stream: RecordId,
        partition: i32,
        committed: i64,
        /// The next offset to hand out for the first time.
        next: i64,
    },
}

/// A message and what is noted on it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Content {
    pub(super) message: Arc<Message>,
    pub(super) marks: Arc<Marks>,
    /// The key it was routed by, where that is not the queue's name.
    pub(super) routing_key: Option<Arc<str>>,
}

impl Record {
    /// The bytes.
    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.size_hint());
        out.put_u8(VERSION);
        match self {
            Self::Queue { name, options } => {
                out.put_u8(QUEUE);
                put_json(&mut out, &Declared { name, options });
            }
            Self::Task {
                queue,
                ready,
                rests,
                content,
            } => {
                out.put_u8(TASK);
                out.put_u64(*queue);
                out.put_i64(ready.as_millis());
                out.put_u8(u8::from(*rests));
                content.put(&mut out);
            }
            Self::Handed { queue, below } => {
                out.put_u8(HANDED);
                out.put_u64(*queue);
                out.put_u64(*below);
            }
            Self::Stream { name, options } => {
                out.put_u8(STREAM);
                put_json(&mut out, &Declared { name, options });
            }
            Self::Event {
                stream,
                partition,
                offset,
                appended,
                content,
            } => {
                out.put_u8(EVENT);
                out.put_u64(*stream);
                out.put_i32(*partition);
                out.put_i64(*offset);
                out.put_i64(appended.as_millis());
                content.put(&mut out);
            }
            Self::Base {
                stream,
                partition,
                next,
            } => {
                out.put_u8(BASE);
                out.put_u64(*stream);
                out.put_i32(*partition);
                out.put_i64(*next);
            }
            Self::Position {
                group,
                stream,
                partition,
                committed,
                next,
            } => {
                out.put_u8(POSITION);
                out.put_u64(*stream);
                out.put_i32(*partition);
                out.put_i64(*committed);
                out.put_i64(*next);
                out.put_slice(group.as_bytes());
            }
        }
        out.freeze()
    }

    /// The record.
    ///
    /// # Errors
    /// Why it cannot be understood.
    #[cfg(any(feature = "journal", test))]
    pub(super) fn decode(body: &[u8]) -> Result<Self, String> {
        let mut from = reading::Source(body);
        let version = from.u8()?;
        if version != VERSION {
            return Err(format!(
                "it was written in version {version}, this program knows {VERSION}; use the program that wrote it or a later one"
            ));
        }
        Ok(match from.u8()? {
            QUEUE => {
                let Declares { name, options } = from.json()?;
                Self::Queue { name, options }
            }
            TASK => Self::Task {
                queue: from.u64()?,
                ready: from.time()?,
                rests: from.u8()? != 0,
                content: from.content()?,
            },
            HANDED => Self::Handed {
                queue: from.u64()?,
                below: from.u64()?,
            },
            STREAM => {
                let Declares { name, options } = from.json()?;
                Self::Stream { name, options }
            }
            EVENT => Self::Event {
                stream: from.u64()?,
                partition: from.i32()?,
                offset: from.i64()?,
                appended: from.time()?,
                content: from.content()?,
            },
            BASE => Self::Base {
                stream: from.u64()?,
                partition: from.i32()?,
                next: from.i64()?,
            },
            POSITION => Self::Position {
                stream: from.u64()?,
                partition: from.i32()?,
                committed: from.i64()?,
                next: from.i64()?,
                group: from.text()?,
            },
            other => return Err(format!("its kind {other} is not known")),
        })
    }

    fn size_hint(&self) -> usize {
        match self {
            Self::Task { content, .. } | Self::Event { content, .. } => {
                content.message.size() + USUAL_METADATA
            }
            _ => USUAL_METADATA,
        }
    }
}

impl Content {
    fn put(&self, out: &mut BytesMut) {
        let at = out.len();
        out.put_u32(0);
        put_json(out, &Metadata::of(self));
        let length = u32::try_from(out.len() - at - 4).unwrap_or(u32::MAX);
        if let Some(place) = out.get_mut(at..at + 4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
        out.put_slice(&self.message.payload);
    }
}

/// A declaration on its way out.
#[derive(Serialize)]
struct Declared<'a, O> {
    name: &'a str,
    options: &'a O,
}

/// A declaration on its way back.
#[derive(Deserialize)]
#[cfg(any(feature = "journal", test))]
struct Declares<O> {
    name: String,
    options: O,
}

/// A message without its payload. Short names, because each message carries
/// them; times in milliseconds, because every one of them has that form.
#[derive(Serialize, Deserialize)]
struct Metadata<'a> {
    i: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "str::is_empty")]
    t: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ct: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ce: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "no_headers")]
    h: Cow<'a, Headers>,
    ts: i64,
    p: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    k: Option<Cow<'a, Key>>,
    #[serde(default, skip_serializing_if = "is_zero")]
    r: u32,
    m: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tr: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    co: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rt: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ex: Option<i64>,
    #[serde(default, skip_serializing_if = "is_false")]
    transient: bool,
    #[serde(default, skip_serializing_if = "is_pending")]
    st: MessageState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    er: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    task: Option<Task<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event: Option<Cow<'a, EventAttributes>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rk: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "is_false")]
    pd: bool,
    #[serde(default, skip_serializing_if = "<[String]>::is_empty")]
    settled: Cow<'a, [String]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failure: Option<Failed<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replay: Option<Cow<'a, Replayed>>,
    #[serde(default, skip_serializing_if = "is_zero")]
    rp: u32,
}

#[derive(Serialize, Deserialize)]
struct Task<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deadline: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scheduled: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    started: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    completed: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "no_headers")]
    metadata: Cow<'a, BTreeMap<String, String>>,
}

#[derive(Serialize, Deserialize)]
struct Failed<'a> {
    reason: Cow<'a, str>,
    details: Cow<'a, str>,
    first: i64,
    last: i64,
    topic: Cow<'a, str>,
}

impl<'a> Metadata<'a> {
    fn of(content: &'a Content) -> Self {
        let (m, marks) = (&*content.message, &*content.marks);
        Self {
            i: m.id.as_str().into(),
            t: m.kind.as_str().into(),
            ct: text(m.content_type.as_ref()),
            ce: text(m.content_encoding.as_ref()),
            h: Cow::Borrowed(&m.headers),
            ts: m.timestamp.as_millis(),
            p: m.priority.value(),
            k: m.key.as_ref().map(Cow::Borrowed),
            r: m.retry_count,
            m: m.max_retries,
            tr: text(m.trace_id.as_ref()),
            co: text(m.correlation_id.as_ref()),
            rt: text(m.reply_to.as_ref()),
            ex: m.expiration.map(Timestamp::as_millis),
            transient: m.delivery_mode == DeliveryMode::Transient,
            st: m.state,
            er: text(m.error.as_ref()),
            task: m.task.as_deref().map(Task::of),
            event: m.event.as_deref().map(Cow::Borrowed),
            rk: content.routing_key.as_deref().map(Cow::Borrowed),
            pd: marks.possible_duplicate,
            settled: Cow::Borrowed(&marks.settled),
            failure: marks.failure.as_deref().map(Failed::of),
            replay: marks.replay.as_deref().map(Cow::Borrowed),
            rp: marks.reprocess,
        }
    }
}

impl<'a> Task<'a> {
    fn of(task: &'a TaskAttributes) -> Self {
        Self {
            deadline: task.deadline.map(Timestamp::as_millis),
            scheduled: task.scheduled_at.map(Timestamp::as_millis),
            started: task.started_at.map(Timestamp::as_millis),
            completed: task.completed_at.map(Timestamp::as_millis),
            worker: text(task.worker_id.as_ref()),
            parent: text(task.parent_task_id.as_ref()),
            metadata: Cow::Borrowed(&task.metadata),
        }
    }
}

impl<'a> Failed<'a> {
    fn of(failure: &'a Failure) -> Self {
        Self {
            reason: failure.reason.as_str().into(),
            details: failure.details.as_str().into(),
            first: failure.first.as_millis(),
            last: failure.last.as_millis(),
            topic: failure.original_topic.as_str().into(),
        }
    }
}

fn put_json(out: &mut BytesMut, value: &impl Serialize) {
    // Texts, numbers and maps with text keys always have a JSON form, and
    // memory is all that is written to.
    if let Err(error) = serde_json::to_writer(out.writer(), value) {
        tracing::error!(%error, "a record has no JSON form");
    }
}

fn text(text: Option<&String>) -> Option<Cow<'_, str>> {
    text.map(|t| t.as_str().into())
}

#[allow(clippy::ptr_arg)]
fn no_headers(headers: &Cow<'_, Headers>) -> bool {
    headers.is_empty()
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(b: &bool) -> bool {
    !b
}

fn is_pending(state: &MessageState) -> bool {
    *state == MessageState::Pending
}

/// Reading back.
#[cfg(any(feature = "journal", test))]
mod reading {
    use super::{
        Arc, Bytes, Content, Cow, DeliveryMode, Deserialize, Failed, Failure, Marks, Message,
        Metadata, Task, TaskAttributes, Timestamp,
    };
    use crate::message::{MessageId, Priority};

    /// What is left of a record.
    pub(super) struct Source<'a>(pub(super) &'a [u8]);

    impl<'a> Source<'a> {
        pub(super) fn u8(&mut self) -> Result<u8, String> {
            self.fixed::<1>().map(|[byte]| byte)
        }

        pub(super) fn u64(&mut self) -> Result<u64, String> {
            self.fixed().map(u64::from_be_bytes)
        }

        pub(super) fn i64(&mut self) -> Result<i64, String> {
            self.fixed().map(i64::from_be_bytes)
        }

        pub(super) fn i32(&mut self) -> Result<i32, String> {
            self.fixed().map(i32::from_be_bytes)
        }

        pub(super) fn time(&mut self) -> Result<Timestamp, String> {
            self.i64().map(Timestamp::from_millis)
        }

        pub(super) fn text(&mut self) -> Result<String, String> {
            String::from_utf8(self.0.to_vec()).map_err(|e| format!("its text is not UTF-8: {e}"))
        }

        pub(super) fn json<T: Deserialize<'a>>(&mut self) -> Result<T, String> {
            serde_json::from_slice(self.0).map_err(|e| format!("its JSON is wrong: {e}"))
        }

        pub(super) fn content(&mut self) -> Result<Content, String> {
            let length = u32::from_be_bytes(self.fixed()?);
            let json = self.some(usize::try_from(length).unwrap_or(usize::MAX))?;
            let metadata: Metadata<'a> = Source(json).json()?;
            // A copy, because what it lies in may be a large piece of a file.
            metadata.content(Bytes::copy_from_slice(self.0))
        }

        fn some(&mut self, length: usize) -> Result<&'a [u8], String> {
            let (taken, left) = self
                .0
                .split_at_checked(length)
                .ok_or_else(|| format!("it ends {} bytes early", length - self.0.len()))?;
            self.0 = left;
            Ok(taken)
        }

        fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
            let taken = self.some(N)?;
            <[u8; N]>::try_from(taken).map_err(|e| e.to_string())
        }
    }

    impl Metadata<'_> {
        fn content(self, payload: Bytes) -> Result<Content, String> {
            let id = MessageId::new(self.i).map_err(|e| e.message().to_owned())?;
            let message = Message {
                id,
                kind: self.t.into_owned(),
                payload,
                content_type: owned(self.ct),
                content_encoding: owned(self.ce),
                headers: self.h.into_owned(),
                timestamp: Timestamp::from_millis(self.ts),
                priority: Priority::clamped(self.p),
                key: self.k.map(Cow::into_owned),
                retry_count: self.r,
                max_retries: self.m,
                trace_id: owned(self.tr),
                correlation_id: owned(self.co),
                reply_to: owned(self.rt),
                expiration: self.ex.map(Timestamp::from_millis),
                delivery_mode: if self.transient {
                    DeliveryMode::Transient
                } else {
                    DeliveryMode::Persistent
                },
                state: self.st,
                error: owned(self.er),
                redelivered: false,
                partition: None,
                offset: None,
                topic: None,
                task: self.task.map(|t| Box::new(t.attributes())),
                event: self.event.map(|e| Box::new(e.into_owned())),
            };
            let marks = Marks {
                possible_duplicate: self.pd,
                settled: self.settled.into_owned(),
                failure: self.failure.map(|f| Box::new(f.failure())),
                replay: self.replay.map(|r| Box::new(r.into_owned())),
                reprocess: self.rp,
            };
            Ok(Content {
                message: Arc::new(message),
                marks: Arc::new(marks),
                routing_key: self.rk.map(|k| Arc::from(&*k)),
            })
        }
    }

    impl Task<'_> {
        fn attributes(self) -> TaskAttributes {
            TaskAttributes {
                deadline: self.deadline.map(Timestamp::from_millis),
                scheduled_at: self.scheduled.map(Timestamp::from_millis),
                started_at: self.started.map(Timestamp::from_millis),
                completed_at: self.completed.map(Timestamp::from_millis),
                worker_id: owned(self.worker),
                parent_task_id: owned(self.parent),
                metadata: self.metadata.into_owned(),
            }
        }
    }

    impl Failed<'_> {
        fn failure(self) -> Failure {
            Failure {
                reason: self.reason.into_owned(),
                details: self.details.into_owned(),
                first: Timestamp::from_millis(self.first),
                last: Timestamp::from_millis(self.last),
                original_topic: self.topic.into_owned(),
                retries: 0,
            }
        }
    }

    fn owned(text: Option<Cow<'_, str>>) -> Option<String> {
        text.map(Cow::into_owned)
    }
}

/// The form of a record; the first byte of each.
const VERSION: u8 = 1;

const QUEUE: u8 = 1;
const TASK: u8 = 2;
const HANDED: u8 = 3;
const STREAM: u8 = 4;
const EVENT: u8 = 5;
const BASE: u8 = 6;
const POSITION: u8 = 7;

/// What metadata takes, mostly.
const USUAL_METADATA: usize = 256;

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
