//! Wire mapping, version 1: which header carries which field, the same on every
//! broker. It knows header names and their texts; it does not know lapin or
//! rdkafka, whose own properties the adapters fill.
//!
//! Headers that belong to the hub begin with `hub-`; CloudEvents attributes
//! travel as `cloudEvents:*` over AMQP and as `ce_*` over Kafka (binary mode of
//! the two protocol bindings).

use std::borrow::Cow;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use super::{EventAttributes, Message, MessageId, Priority, TaskAttributes, Timestamp};

/// The version that `hub-wire` carries.
pub const VERSION: &str = "1";

/// Header names of the hub's own.
pub mod names {
    #![allow(missing_docs)]
    pub const WIRE: &str = "hub-wire";
    pub const TOPIC: &str = "hub-topic";
    pub const ID: &str = "hub-id";
    pub const TYPE: &str = "hub-type";
    pub const CORRELATION_ID: &str = "hub-correlation-id";
    pub const REPLY_TO: &str = "hub-reply-to";
    pub const TIME: &str = "hub-time";
    pub const KEY: &str = "hub-key";
    pub const PRIORITY: &str = "hub-priority";
    pub const EXPIRES: &str = "hub-expires";
    pub const ATTEMPT: &str = "hub-attempt";
    pub const MAX_RETRIES: &str = "hub-max-retries";
    pub const ERROR: &str = "hub-error";
    pub const TRACE: &str = "hub-trace-id";
    pub const DELIVERY_MODE: &str = "hub-delivery-mode";
    pub const TRACEPARENT: &str = "traceparent";
    pub const CONTENT_TYPE: &str = "content-type";
    pub const CONTENT_ENCODING: &str = "content-encoding";
    pub const COMPRESSED: &str = "hub-compressed";
    pub const POSSIBLE_DUPLICATE: &str = "hub-possible-duplicate";
    pub const SETTLED: &str = "hub-settled";
    pub const FAILURE_REASON: &str = "hub-failure-reason";
    pub const FAILURE_DETAILS: &str = "hub-failure-details";
    pub const FIRST_FAILURE: &str = "hub-first-failure";
    pub const LAST_FAILURE: &str = "hub-last-failure";
    pub const ORIGINAL_TOPIC: &str = "hub-original-topic";
    pub const REPLAY_OF: &str = "hub-replay-of";
    pub const REPLAY_ID: &str = "hub-replay-id";
    pub const REPROCESS: &str = "hub-reprocess";
    pub const TASK_PREFIX: &str = "hub-task-";
}

/// Which protocol the headers travel over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// AMQP 0-9-1: id, type, priority and their like are properties.
    Amqp,
    /// Kafka: everything but key, value and time is a header.
    Kafka,
}

impl Carrier {
    const fn event_prefix(self) -> &'static str {
        match self {
            Self::Amqp => "cloudEvents:",
            Self::Kafka => "ce_",
        }
    }
}

/// What the hub notes on a message beside its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// It may have been delivered before, under the same id.
    pub possible_duplicate: bool,
    /// Groups that have handled it already and must skip it.
    pub settled: Vec<String>,
    /// Why, and when, it failed; set on dead letters and retries.
    pub failure: Option<Box<Failure>>,
    /// What it is a replay of, if it is one.
    pub replay: Option<Box<Replayed>>,
    /// How often it was taken out of the dead letters and published again; 0 for
    /// a message that never was. Part of what a repeat is recognised by: the
    /// copies of one dead letter carry the same number, and are handled once,
    /// although the id was handled before.
    pub reprocess: u32,
}

impl Marks {
    /// What a repeat of a message is recognised by: its id, and for the copy of a
    /// dead letter its number too, since the id was handled before and is to be
    /// handled once more.
    pub(crate) fn identity<'a>(&self, id: &'a str) -> Cow<'a, str> {
        match self.reprocess {
            0 => id.into(),
            // No id has the character that stands between.
            n => format!("{id}\u{0}{n}").into(),
        }
    }

    /// Whether they stand on a copy that the hub makes of what it had before: a
    /// reprocessed letter, or a failed event that rests.
    pub(crate) fn are_of_a_copy(&self) -> bool {
        self.reprocess > 0 || self.failure.is_some()
    }

    /// The marks of a dead letter of the message. Who settled the message says
    /// nothing about who reads the letter.
    pub(crate) fn of_letter(self, failure: Failure) -> Self {
        Self {
            failure: Some(Box::new(failure)),
            settled: Vec::new(),
            ..self
        }
    }
}

/// Where a replayed message comes from. It has an id of its own, so that its
/// readers handle it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// The id of the message that was published first.
    pub of: String,
    /// The replay that published it again.
    pub by: String,
}

/// Failure metadata as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Short, stable reason such as `handler_error`, `expired`, `refused`.
    pub reason: String,
    /// The error's text.
    pub details: String,
    /// When it failed first.
    pub first: Timestamp,
    /// When it failed last.
    pub last: Timestamp,
    /// The topic or queue it failed in.
    pub original_topic: String,
    /// Retries, of which its source knows nothing where they were made in the
    /// reader's hands. The letter's `retry_count` says so; this does not travel.
    pub retries: u32,
}

impl Failure {
    /// A failure now, of a message that may have failed before. Of `reason` 256 bytes
    /// are kept, of `details` 8 KiB.
    #[must_use]
    pub fn now(
        reason: impl Into<String>,
        details: impl Into<String>,
        topic: &str,
        earlier: Option<&Self>,
    ) -> Self {
        let now = Timestamp::now();
        Self {
            reason: cut(reason.into(), MAX_REASON),
            details: cut(details.into(), MAX_DETAILS),
            first: earlier.map_or(now, |f| f.first),
            last: now,
            original_topic: earlier.map_or_else(|| topic.to_owned(), |f| f.original_topic.clone()),
            retries: 0,
        }
    }
}

impl Failure {
    /// The failure of a message that was retried so often.
    #[must_use]
    pub fn after(self, retries: u32) -> Self {
        Self { retries, ..self }
    }

    /// Counts on a letter the retries of which its source knew nothing.
    pub(crate) fn count_on(&self, letter: &mut Message) {
        letter.retry_count = letter.retry_count.max(self.retries);
    }

    /// What went wrong, for people.
    #[must_use]
    pub fn text(&self) -> &str {
        if self.details.is_empty() {
            &self.reason
        } else {
            &self.details
        }
    }
}

/// The beginning of a text that is too long, with a word of how much it was.
fn cut(mut text: String, most: usize) -> String {
    let whole = text.len();
    if whole > most {
        let end = (0..=most).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push_str(&format!("... ({whole} bytes)"));
    }
    text
}

/// Bytes of a failure's details that travel: twice, as the error too, and all of a
/// message's headers have to fit an AMQP frame. What did not fit could be neither
/// retried nor buried, and would come back for ever.
const MAX_DETAILS: usize = 8 * 1024;

/// Bytes of a failure's reason.
const MAX_REASON: usize = 256;

/// One header on its way out.
pub type Header<'a> = (Cow<'a, str>, Cow<'a, str>);

/// Whether a header name is not the user's to set.
#[must_use]
pub fn is_reserved(name: &str) -> bool {
    let starts = |prefix: &str| {
        name.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    starts(super::RESERVED_HEADER_PREFIX) || starts("ce_") || starts("cloudEvents:")
}

/// Takes off what a read message may carry and nobody may publish, but for one header.
pub(crate) fn take_off_refused(message: &mut Message, but: Option<&str>) {
    message
        .headers
        .retain(|name, _| but == Some(name.as_str()) || why_refused(name).is_none());
    if let Some(event) = &mut message.event {
        event.extensions.retain(|name, _| !is_event_attribute(name));
    }
}

/// Why nobody may publish a header of this name, if so.
pub(super) fn why_refused(name: &str) -> Option<String> {
    if name.chars().any(char::is_control) {
        return Some(format!(
            "header name {name:?} has a control character, which not every broker carries"
        ));
    }
    for (header, field) in [
        (names::CONTENT_TYPE, "content_type"),
        (names::CONTENT_ENCODING, "content_encoding"),
    ] {
        if name.eq_ignore_ascii_case(header) {
            return Some(format!(
                "header {name:?} would be read as the message's {field}; set that instead"
            ));
        }
    }
    is_reserved(name).then(|| {
        format!(
            "header {name:?} is reserved for the hub; choose a name that does not begin with \"hub-\", \"ce_\" or \"cloudevents:\""
        )
    })
}

/// Whether an attribute of an event is one of those that are no extensions.
pub(super) fn is_event_attribute(name: &str) -> bool {
    [
        "specversion",
        "id",
        "type",
        "source",
        "time",
        "subject",
        "dataschema",
        "datacontenttype",
        "data",
        "data_base64",
    ]
    .contains(&name)
}

/// All headers of a message for a carrier: the hub's, the event's, the user's.
#[must_use]
pub fn encode<'a>(
    message: &'a Message,
    topic: &'a str,
    marks: &'a Marks,
    carrier: Carrier,
) -> Vec<Header<'a>> {
    let mut out: Vec<Header<'a>> = Vec::with_capacity(12 + message.headers.len());
    let mut put = |name: &'static str, value: Cow<'a, str>| out.push((name.into(), value));
    let time = || message.timestamp.as_millis().to_string().into();

    put(names::WIRE, VERSION.into());
    if carrier == Carrier::Kafka {
        put(names::ID, message.id.as_str().into());
        put(names::TYPE, message.kind.as_str().into());
        if let Some(v) = &message.correlation_id {
            put(names::CORRELATION_ID, v.into());
        }
        if let Some(v) = &message.reply_to {
            put(names::REPLY_TO, v.into());
        }
        if let Some(v) = &message.content_type {
            put(names::CONTENT_TYPE, v.into());
        }
        if let Some(v) = &message.content_encoding {
            put(names::CONTENT_ENCODING, v.into());
        }
        put(names::PRIORITY, message.priority.value().to_string().into());
        if !message.is_persistent() {
            put(names::DELIVERY_MODE, "transient".into());
        }
        if marks.are_of_a_copy() {
            put(names::TIME, time());
        }
    } else {
        put(names::TOPIC, topic.into());
        put(names::TIME, time());
        if let Some(key) = &message.key {
            // AMQP tables hold text here; a key that is not text goes as
            // base64 under the "-bin" name that readers below undo.
            match key.as_str() {
                Some(text) => put(names::KEY, Cow::Owned(text.to_owned())),
                None => put("hub-key-bin", BASE64_STANDARD.encode(key.as_bytes()).into()),
            }
        }
    }
    if let Some(at) = message.expiration {
        put(names::EXPIRES, at.as_millis().to_string().into());
    }
    if message.retry_count > 0 {
        put(names::ATTEMPT, message.retry_count.to_string().into());
    }
    put(names::MAX_RETRIES, message.max_retries.to_string().into());
    if let Some(error) = &message.error {
        put(names::ERROR, error.into());
    }
    if let Some(trace) = &message.trace_id
        && !message.headers.contains_key(names::TRACEPARENT)
    {
        put_trace(trace, &mut put);
    }
    if marks.possible_duplicate {
        put(names::POSSIBLE_DUPLICATE, "true".into());
    }
    if !marks.settled.is_empty() {
        put(names::SETTLED, join_groups(&marks.settled).into());
    }
    if let Some(failure) = &marks.failure {
        put(names::FAILURE_REASON, failure.reason.as_str().into());
        put(names::FAILURE_DETAILS, failure.details.as_str().into());
        put(names::FIRST_FAILURE, failure.first.to_string().into());
        put(names::LAST_FAILURE, failure.last.to_string().into());
        put(
            names::ORIGINAL_TOPIC,
            failure.original_topic.as_str().into(),
        );
    }
    if let Some(replay) = &marks.replay {
        put(names::REPLAY_OF, replay.of.as_str().into());
        put(names::REPLAY_ID, replay.by.as_str().into());
    }
    if marks.reprocess > 0 {
        put(names::REPROCESS, marks.reprocess.to_string().into());
    }
    if let Some(task) = &message.task {
        encode_task(task, &mut out);
    }
    if let Some(event) = &message.event {
        encode_event(message, event, carrier, &mut out);
    }
    for (name, value) in &message.headers {
        out.push((name.as_str().into(), value.as_str().into()));
    }
    out
}

/// Applies headers to a message that the adapter has filled from the carrier's
/// own properties, and returns the hub's marks. Unknown headers become user
/// headers; a value that is not UTF-8 is kept as base64 under `NAME-bin`.
pub fn decode<'a>(
    message: &mut Message,
    headers: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    carrier: Carrier,
) -> Marks {
    let mut marks = Marks::default();
    let mut failure: Option<Failure> = None;
    for (name, bytes) in headers {
        let Ok(value) = std::str::from_utf8(bytes) else {
            message
                .headers
                .insert(format!("{name}-bin"), BASE64_STANDARD.encode(bytes));
            continue;
        };
        if let Some(attribute) = name.strip_prefix(carrier.event_prefix()) {
            decode_event(message, attribute, value);
        } else if let Some(attribute) = name.strip_prefix(names::TASK_PREFIX) {
            decode_task(message, attribute, value);
        } else if let Some(rest) = failure_part(name) {
            let f = failure.get_or_insert_with(|| Failure {
                reason: String::new(),
                details: String::new(),
                first: message.timestamp,
                last: message.timestamp,
                original_topic: String::new(),
                retries: 0,
            });
            set_failure(f, rest, value);
        } else {
            decode_one(message, &mut marks, name, value);
        }
    }
    marks.failure = failure.map(Box::new);
    if message.trace_id.is_some()
        && message.trace_id.as_ref() == message.headers.get(names::TRACEPARENT)
    {
        // A whole traceparent in the trace id travels under both names; in the
        // headers it was ours, for readers that know only the standard's.
        message.headers.remove(names::TRACEPARENT);
    }
    marks
}

fn decode_one(message: &mut Message, marks: &mut Marks, name: &str, value: &str) {
    match name {
        names::WIRE => {}
        names::TOPIC => message.topic = Some(value.to_owned()),
        // An adapter may have looked for it before.
        names::ID if message.id.as_str() == value => {}
        names::ID => {
            if let Ok(id) = MessageId::new(value) {
                message.id = id;
            }
        }
        names::TYPE => value.clone_into(&mut message.kind),
        names::CORRELATION_ID => message.correlation_id = Some(value.to_owned()),
        names::REPLY_TO => message.reply_to = Some(value.to_owned()),
        names::CONTENT_TYPE => message.content_type = Some(value.to_owned()),
        names::CONTENT_ENCODING => message.content_encoding = Some(value.to_owned()),
        names::TIME => {
            if let Ok(ms) = value.parse() {
                message.timestamp = Timestamp::from_millis(ms);
            }
        }
        names::KEY => message.key = Some(value.into()),
        "hub-key-bin" => {
            if let Ok(key) = BASE64_STANDARD.decode(value) {
                message.key = Some(key.into());
            }
        }
        names::PRIORITY => {
            if let Ok(p) = value.parse() {
                message.priority = Priority::clamped(p);
            }
        }
        names::DELIVERY_MODE => {
            if value == "transient" {
                message.delivery_mode = super::DeliveryMode::Transient;
            }
        }
        names::EXPIRES => {
            if let Ok(ms) = value.parse() {
                message.expiration = Some(Timestamp::from_millis(ms));
            }
        }
        names::ATTEMPT => {
            if let Ok(n) = value.parse() {
                message.retry_count = n;
            }
        }
        names::MAX_RETRIES => {
            if let Ok(n) = value.parse() {
                message.max_retries = n;
            }
        }
        names::ERROR => message.error = Some(value.to_owned()),
        names::TRACE => message.trace_id = Some(value.to_owned()),
        names::REPROCESS => {
            if let Ok(n) = value.parse() {
                marks.reprocess = n;
            }
        }
        names::POSSIBLE_DUPLICATE => marks.possible_duplicate = value == "true",
        names::SETTLED => {
            marks.settled = value
                .split(',')
                .filter(|g| !g.is_empty())
                .map(group_named)
                .collect();
        }
        names::REPLAY_OF => value.clone_into(&mut replayed(marks).of),
        names::REPLAY_ID => value.clone_into(&mut replayed(marks).by),
        names::TRACEPARENT => {
            match split_traceparent(value) {
                // A parent that we made from a bare trace id is undone; any
                // other is the user's header and stays whole.
                Some((trace, span)) if span == made_span(trace) => {
                    message.trace_id = Some(trace.to_owned());
                }
                Some((trace, _)) => {
                    message.trace_id.get_or_insert_with(|| trace.to_owned());
                    message.headers.insert(name.to_owned(), value.to_owned());
                }
                None => {
                    message.headers.insert(name.to_owned(), value.to_owned());
                }
            }
        }
        _ => {
            message.headers.insert(name.to_owned(), value.to_owned());
        }
    }
}

/// Group names with commas between them. A comma of a name's own, and the sign
/// that stands for it, are written as `%2C` and `%25`.
fn join_groups(groups: &[String]) -> String {
    let escaped: Vec<String> = groups
        .iter()
        .map(|g| g.replace('%', "%25").replace(',', "%2C"))
        .collect();
    escaped.join(",")
}

fn group_named(text: &str) -> String {
    text.replace("%2C", ",").replace("%25", "%")
}

fn replayed(marks: &mut Marks) -> &mut Replayed {
    marks.replay.get_or_insert_with(|| {
        Box::new(Replayed {
            of: String::new(),
            by: String::new(),
        })
    })
}

fn put_trace<'a>(trace: &'a str, put: &mut impl FnMut(&'static str, Cow<'a, str>)) {
    if is_trace_id(trace) {
        put(
            names::TRACEPARENT,
            format!("00-{trace}-{}-01", made_span(trace)).into(),
        );
    } else if split_traceparent(trace).is_some() {
        put(names::TRACEPARENT, trace.into());
        put(names::TRACE, trace.into());
    } else {
        put(names::TRACE, trace.into());
    }
}

fn is_trace_id(text: &str) -> bool {
    text.len() == 32
        && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        && text.bytes().any(|b| b != b'0')
}

/// W3C needs a span id where we only have a trace id: half of the trace id
/// stands in, made non-zero, so that a reader can tell that it means nothing.
fn made_span(trace: &str) -> &str {
    match trace.get(16..) {
        Some("0000000000000000") | None => trace.get(..16).unwrap_or("0000000000000001"),
        Some(half) => half,
    }
}

fn split_traceparent(text: &str) -> Option<(&str, &str)> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    (version.len() == 2 && is_trace_id(trace) && span.len() == 16 && flags.len() == 2)
        .then_some((trace, span))
}

fn encode_task<'a>(task: &'a TaskAttributes, out: &mut Vec<Header<'a>>) {
    // Marks it as a task even when nothing else is set.
    out.push(("hub-task-version".into(), VERSION.into()));
    let times = [
        ("hub-task-deadline", task.deadline),
        ("hub-task-scheduled-at", task.scheduled_at),
        ("hub-task-started-at", task.started_at),
        ("hub-task-completed-at", task.completed_at),
    ];
    for (name, time) in times {
        if let Some(at) = time {
            out.push((name.into(), at.as_millis().to_string().into()));
        }
    }
    let texts = [
        ("hub-task-worker-id", &task.worker_id),
        ("hub-task-parent-id", &task.parent_task_id),
    ];
    for (name, text) in texts {
        if let Some(text) = text {
            out.push((name.into(), text.into()));
        }
    }
    for (name, value) in &task.metadata {
        out.push((format!("hub-task-meta-{name}").into(), value.into()));
    }
}

fn decode_task(message: &mut Message, attribute: &str, value: &str) {
    let task = message.task.get_or_insert_default();
    let time = || value.parse().ok().map(Timestamp::from_millis);
    match attribute {
        "deadline" => task.deadline = time(),
        "scheduled-at" => task.scheduled_at = time(),
        "started-at" => task.started_at = time(),
        "completed-at" => task.completed_at = time(),
        "worker-id" => task.worker_id = Some(value.to_owned()),
        "parent-id" => task.parent_task_id = Some(value.to_owned()),
        other => {
            if let Some(name) = other.strip_prefix("meta-") {
                task.metadata.insert(name.to_owned(), value.to_owned());
            }
        }
    }
}

fn encode_event<'a>(
    message: &'a Message,
    event: &'a EventAttributes,
    carrier: Carrier,
    out: &mut Vec<Header<'a>>,
) {
    let mut put = |attribute: &str, value: Cow<'a, str>| {
        out.push((
            format!("{}{attribute}", carrier.event_prefix()).into(),
            value,
        ));
    };
    put("specversion", "1.0".into());
    put("id", message.id.as_str().into());
    put("type", message.kind.as_str().into());
    put("source", event.source.as_str().into());
    put("time", message.timestamp.to_string().into());
    if let Some(subject) = &event.subject {
        put("subject", subject.into());
    }
    if let Some(schema) = &event.data_schema {
        put("dataschema", schema.into());
    }
    for (name, value) in &event.extensions {
        put(name, value.into());
    }
}

fn decode_event(message: &mut Message, attribute: &str, value: &str) {
    match attribute {
        "specversion" => {
            message.event.get_or_insert_default();
        }
        "id" => {
            if let Ok(id) = MessageId::new(value) {
                message.id = id;
            }
        }
        "type" => value.clone_into(&mut message.kind),
        "time" => {
            if let Ok(at) = value.parse() {
                message.timestamp = at;
            }
        }
        other => {
            let event = message.event.get_or_insert_default();
            match other {
                "source" => value.clone_into(&mut event.source),
                "subject" => event.subject = Some(value.to_owned()),
                "dataschema" => event.data_schema = Some(value.to_owned()),
                "datacontenttype" => message.content_type = Some(value.to_owned()),
                extension => {
                    event
                        .extensions
                        .insert(extension.to_owned(), value.to_owned());
                }
            }
        }
    }
}

fn failure_part(name: &str) -> Option<&'static str> {
    [
        names::FAILURE_REASON,
        names::FAILURE_DETAILS,
        names::FIRST_FAILURE,
        names::LAST_FAILURE,
        names::ORIGINAL_TOPIC,
    ]
    .into_iter()
    .find(|n| *n == name)
}

fn set_failure(failure: &mut Failure, part: &str, value: &str) {
    match part {
        names::FAILURE_REASON => value.clone_into(&mut failure.reason),
        names::FAILURE_DETAILS => value.clone_into(&mut failure.details),
        names::ORIGINAL_TOPIC => value.clone_into(&mut failure.original_topic),
        names::FIRST_FAILURE => failure.first = value.parse().unwrap_or(failure.first),
        _ => failure.last = value.parse().unwrap_or(failure.last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Event, Key, Task};

    #[test]
    fn of_a_long_failure_the_beginning_travels_so_that_its_message_can_be_moved() {
        let failure = |details: &str| Failure::now("r", details, "t", None).details;
        let fits = "x".repeat(MAX_DETAILS);
        assert_eq!(failure(&fits), fits);
        // Not in the middle of a character.
        let long = format!("x{}", "é".repeat(MAX_DETAILS));
        let kept = failure(&long);
        assert!(kept.len() < MAX_DETAILS + 32, "{}", kept.len());
        assert!(kept.starts_with("xéé") && kept.ends_with("é... (16385 bytes)"));
    }

    fn round_trip(message: &Message, marks: &Marks, carrier: Carrier) -> (Message, Marks) {
        let headers = encode(message, "t", marks, carrier);
        // What the adapters fill from the carrier's own properties.
        let mut back = match carrier {
            Carrier::Kafka => Message {
                key: message.key.clone(),
                timestamp: message.timestamp,
                ..Message::default()
            },
            Carrier::Amqp => Message {
                id: message.id.clone(),
                kind: message.kind.clone(),
                priority: message.priority,
                delivery_mode: message.delivery_mode,
                correlation_id: message.correlation_id.clone(),
                reply_to: message.reply_to.clone(),
                content_type: message.content_type.clone(),
                content_encoding: message.content_encoding.clone(),
                ..Message::default()
            },
        };
        back.payload = message.payload.clone();
        let marks = decode(
            &mut back,
            headers.iter().map(|(n, v)| (n.as_ref(), v.as_bytes())),
            carrier,
        );
        back.topic = None;
        (back, marks)
    }

    #[test]
    fn every_field_survives_both_carriers() {
        let mut message = Message::new("t.type", "body")
            .with_key(Key::from("k1"))
            .with_header("x-user", "é")
            .with_header("empty", "")
            .with_priority(Priority::HIGH)
            .with_correlation_id("c")
            .with_reply_to("r")
            .with_content_type("text/plain")
            .with_content_encoding("identity")
            .with_expiration(Timestamp::from_millis(1_900_000_000_123))
            .with_trace_id("4bf92f3577b34da6a3ce929d0e0e4736");
        message.retry_count = 2;
        message.error = Some("boom".to_owned());
        message.delivery_mode = crate::message::DeliveryMode::Transient;
        message.task = Some(Box::new(TaskAttributes {
            deadline: Some(Timestamp::from_millis(1)),
            metadata: [("m".to_owned(), "v".to_owned())].into(),
            ..TaskAttributes::default()
        }));
        let marks = Marks {
            possible_duplicate: true,
            settled: vec!["a".into(), "b, and c".into(), "100%2C%".into()],
            failure: Some(Box::new(Failure::now("handler_error", "x", "t", None))),
            replay: Some(Box::new(Replayed {
                of: "first".into(),
                by: "again".into(),
            })),
            reprocess: 3,
        };
        for carrier in [Carrier::Amqp, Carrier::Kafka] {
            let (back, back_marks) = round_trip(&message, &marks, carrier);
            assert_eq!(back, message, "{carrier:?}");
            assert_eq!(back_marks, marks, "{carrier:?}");
        }
    }

    #[test]
    fn the_copy_of_a_letter_is_another_than_what_died_and_than_the_next_copy() {
        let known = |reprocess| {
            let marks = Marks {
                reprocess,
                ..Marks::default()
            };
            marks.identity("m").into_owned()
        };
        assert_eq!(known(0), "m");
        assert_eq!(known(1), known(1));
        assert_ne!(known(1), known(0));
        assert_ne!(known(1), known(2));
        assert!(MessageId::new(known(1)).is_err(), "nobody else's id");
    }

    #[test]
    fn a_letter_says_what_the_message_was_and_not_who_settled_it() {
        let failure = Failure::now("expired", "x", "t", None);
        let marks = Marks {
            possible_duplicate: true,
            settled: vec!["a".into()],
            failure: None,
            replay: Some(Box::new(Replayed {
                of: "first".into(),
                by: "again".into(),
            })),
            reprocess: 3,
        };
        let letter = marks.clone().of_letter(failure.clone());
        assert_eq!(letter.failure.as_deref(), Some(&failure));
        assert_eq!((letter.replay, letter.reprocess), (marks.replay, 3));
        assert!(letter.settled.is_empty());
    }

    #[test]
    fn the_groups_that_settled_an_event_stand_in_one_header() {
        let marks = Marks {
            settled: vec!["audit".to_owned(), "a,b".to_owned()],
            ..Marks::default()
        };
        let message = Message::default();
        let headers = encode(&message, "t", &marks, Carrier::Kafka);
        let settled = headers.iter().find(|(n, _)| n == names::SETTLED);
        assert_eq!(settled.unwrap().1, "audit,a%2Cb");
    }

    #[test]
    fn a_trace_id_comes_back_as_it_was_and_leaves_no_header() {
        for trace in [
            "4bf92f3577b34da6a3ce929d0e0e4736",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "not W3C's",
        ] {
            let message = Message::default().with_trace_id(trace);
            let (back, _) = round_trip(&message, &Marks::default(), Carrier::Kafka);
            assert_eq!(back.trace_id.as_deref(), Some(trace));
            assert!(back.headers.is_empty(), "{:?}", back.headers);
        }
    }

    #[test]
    fn an_event_survives_both_carriers() {
        let mut event = Event::new("debate.round", "/hub", "{}");
        event.subject = Some("s".into());
        event.extensions.insert("tenant".into(), "x".into());
        let message = Message::from(event);
        for carrier in [Carrier::Amqp, Carrier::Kafka] {
            assert_eq!(round_trip(&message, &Marks::default(), carrier).0, message);
        }
    }

    #[test]
    fn a_task_without_attributes_stays_a_task() {
        let message = Message::from(Task::new("t", "x"));
        let (back, _) = round_trip(&message, &Marks::default(), Carrier::Kafka);
        assert!(back.task.is_some());
    }

    #[test]
    fn a_foreign_header_that_is_not_text_is_kept_as_base64() {
        let mut message = Message::default();
        decode(&mut message, [("x", &[0xff_u8, 0][..])], Carrier::Kafka);
        assert_eq!(message.headers["x-bin"], "/wA=");
    }

    #[test]
    fn reserved_names_are_recognised_in_any_case() {
        for name in ["hub-x", "HUB-id", "ce_id", "cloudEvents:id"] {
            assert!(is_reserved(name), "{name}");
        }
        assert!(!is_reserved("hubble"));
    }
}
