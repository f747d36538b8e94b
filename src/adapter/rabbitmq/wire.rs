//! Messages as AMQP properties and back. Which header carries what is
//! [`crate::message::wire`]'s business; here are the properties, the table
//! types of other people's headers, and what must fit into one frame.

use std::borrow::Cow;

use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldTable, LongString, ShortString},
};

use crate::{
    broker::BrokerType,
    error::{Error, ErrorCode, Result},
    message::{
        DeliveryMode, Message, MessageId, Priority, Timestamp,
        wire::{self, Carrier, Failure, Marks},
    },
};

/// Properties of a message for the wire. `expires` false leaves the AMQP
/// expiration out (dead letters are kept, however old); the header stays.
///
/// # Errors
/// Refusals: `MESSAGE_EXPIRED`, `MESSAGE_TOO_LARGE` (headers do not fit into
/// one frame), `MESSAGE_INVALID` (a property longer than AMQP allows).
pub(super) fn properties(
    message: &Message,
    topic: &str,
    marks: &Marks,
    expires: bool,
    frame_max: usize,
) -> Result<BasicProperties> {
    let refuse = |code, why: String| {
        Error::rejected(code, why)
            .at(BrokerType::RabbitMq)
            .on(topic)
            .with_id(message.id.as_str())
    };
    let short = |field: &str, value: &str| {
        ShortString::try_new(value).map_err(|_| {
            refuse(
                ErrorCode::MessageInvalid,
                format!("{field} is longer than 255 bytes, which is AMQP's limit"),
            )
        })
    };
    let mut table = FieldTable::default();
    let mut size = FIXED;
    for (name, value) in wire::encode(message, topic, marks, Carrier::Amqp) {
        size += name.len() + value.len() + PER_HEADER;
        let value = match value {
            Cow::Owned(text) => LongString::from(text),
            Cow::Borrowed(text) => LongString::from(text),
        };
        table.insert(short("a header name", &name)?, AMQPValue::LongString(value));
    }
    // Headers travel in one frame; a larger one would cost the connection, and
    // the next one again.
    if size > frame_max {
        return Err(refuse(
            ErrorCode::MessageTooLarge,
            format!(
                "the headers take about {size} bytes, the server takes {frame_max} (frame_max)"
            ),
        ));
    }
    let mut properties = BasicProperties::default()
        .with_headers(table)
        .with_message_id(short("the id", message.id.as_str())?)
        .with_type(short("the type", &message.kind)?)
        .with_priority(message.priority.value())
        .with_delivery_mode(if message.is_persistent() { 2 } else { 1 })
        .with_timestamp(u64::try_from(message.timestamp.as_millis()).unwrap_or(0) / 1000)
        .with_content_type(short(
            "content_type",
            message
                .content_type
                .as_deref()
                .unwrap_or("application/json"),
        )?);
    if let Some(encoding) = &message.content_encoding {
        properties = properties.with_content_encoding(short("content_encoding", encoding)?);
    }
    if let Some(id) = &message.correlation_id {
        properties = properties.with_correlation_id(short("correlation_id", id)?);
    }
    if let Some(to) = &message.reply_to {
        properties = properties.with_reply_to(short("reply_to", to)?);
    }
    if expires && let Some(at) = message.expiration {
        let left = at.since(Timestamp::now()).as_millis();
        if left == 0 {
            return Err(refuse(
                ErrorCode::MessageExpired,
                format!("the message expired at {at}, before it was written"),
            ));
        }
        properties = properties.with_expiration(left.min(LONGEST_TTL_MS).to_string().into());
    }
    Ok(properties)
}

/// A message, and the hub's marks, from a delivery that came from `queue`.
/// `stream` names its topic by the routing key instead of the queue.
pub(super) fn message(delivery: Delivery, queue: &str, stream: bool) -> (Message, Marks) {
    let mut message = Message::default();
    let now = message.timestamp;
    let properties = &delivery.properties;
    message.payload = delivery.data.into();
    message.content_type = property(properties.content_type());
    message.content_encoding = property(properties.content_encoding());
    message.correlation_id = property(properties.correlation_id());
    message.reply_to = property(properties.reply_to());
    message.kind = property(properties.kind()).unwrap_or_default();
    message.priority = properties
        .priority()
        .map_or(Priority::NORMAL, Priority::clamped);
    message.delivery_mode = match properties.delivery_mode() {
        Some(2) => DeliveryMode::Persistent,
        _ => DeliveryMode::Transient,
    };
    if let Some(seconds) = *properties.timestamp()
        && let Ok(ms) = i64::try_from(seconds.saturating_mul(1000))
    {
        message.timestamp = Timestamp::from_millis(ms);
    }
    if let Some(ms) = properties
        .expiration()
        .as_ref()
        .and_then(|e| e.as_str().parse().ok())
    {
        // Foreign publishers say how long, not until when; without their time
        // it counts from when it was first seen here.
        let from = if properties.timestamp().is_some() {
            message.timestamp
        } else {
            now
        };
        message.expiration = Some(from + std::time::Duration::from_millis(ms));
    }
    if let Some(id) = properties.message_id() {
        match MessageId::new(id.as_str()) {
            Ok(id) => message.id = id,
            // An id that cannot be ours is kept where its owner can find it.
            Err(_) => {
                message
                    .headers
                    .insert("amqp-message-id".to_owned(), id.to_string());
            }
        }
    }
    let mut death = None;
    let mut headers: Vec<(Cow<'_, str>, Cow<'_, [u8]>)> = Vec::new();
    if let Some(table) = properties.headers() {
        headers.reserve(table.inner().len());
        for (name, value) in table.inner() {
            if is_servers(name.as_str()) {
                if name.as_str() == "x-death" {
                    death = death_of(value);
                }
                continue;
            }
            headers.push((header_name(name.as_str()), bytes(value)));
        }
    }
    let mut marks = wire::decode(
        &mut message,
        headers.iter().map(|(n, v)| (n.as_ref(), v.as_ref())),
        Carrier::Amqp,
    );
    if marks.failure.is_none()
        && let Some(death) = death
    {
        let at = death.at.unwrap_or(now);
        marks.failure = Some(Box::new(Failure {
            details: format!(
                "dead-lettered by RabbitMQ from queue {}, {} times",
                death.queue, death.count
            ),
            reason: death.reason,
            first: at,
            last: at,
            original_topic: death.queue,
            retries: 0,
        }));
    }
    message.redelivered = delivery.redelivered;
    if stream {
        if message.topic.is_none() {
            message.topic = Some(delivery.routing_key.to_string());
        }
    } else {
        message.topic = Some(queue.to_owned());
    }
    (message, marks)
}

fn property(value: &Option<ShortString>) -> Option<String> {
    value.as_ref().map(|v| v.as_str().to_owned())
}

/// How often a quorum queue has got this message back; 0 where it does not say.
pub(super) fn returns(delivery: &Delivery) -> i64 {
    let headers = delivery.properties.headers().as_ref();
    let counted = headers.and_then(|h| h.inner().get("x-delivery-count"));
    match counted {
        Some(AMQPValue::LongLongInt(n)) => *n,
        Some(AMQPValue::LongUInt(n)) => i64::from(*n),
        Some(AMQPValue::LongInt(n)) => i64::from(*n),
        Some(AMQPValue::ShortInt(n)) => i64::from(*n),
        Some(AMQPValue::ShortShortInt(n)) => i64::from(*n),
        _ => 0,
    }
}

/// Headers that RabbitMQ sets itself. They are not the sender's, and sending
/// them back as text would confuse the server that made them.
fn is_servers(name: &str) -> bool {
    matches!(name, "x-death" | "x-delivery-count" | "x-acquired-count")
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
}

/// What the server says of the newest death.
struct Death {
    reason: String,
    queue: String,
    count: String,
    at: Option<Timestamp>,
}

fn death_of(value: &AMQPValue) -> Option<Death> {
    let AMQPValue::FieldArray(deaths) = value else {
        return None;
    };
    let AMQPValue::FieldTable(newest) = deaths.as_slice().first()? else {
        return None;
    };
    let field = |name: &str| {
        newest
            .inner()
            .get(name)
            .map(|v| String::from_utf8_lossy(&bytes(v)).into_owned())
    };
    let at = match newest.inner().get("time") {
        Some(AMQPValue::Timestamp(seconds)) => i64::try_from(seconds.saturating_mul(1000))
            .ok()
            .map(Timestamp::from_millis),
        _ => None,
    };
    Some(Death {
        reason: field("reason")?,
        queue: field("queue")?,
        count: field("count").unwrap_or_else(|| "1".to_owned()),
        at,
    })
}

/// User header names are lower-case here; CloudEvents' other AMQP prefix means
/// the same as the one that we write.
fn header_name(name: &str) -> Cow<'_, str> {
    for prefix in ["cloudEvents:", "cloudEvents_"] {
        if let Some(start) = name.get(..prefix.len())
            && start.eq_ignore_ascii_case(prefix)
        {
            return Cow::Owned(format!(
                "cloudEvents:{}",
                name.get(prefix.len()..).unwrap_or_default()
            ));
        }
    }
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

/// A header of any table type as text (or bytes, where it is bytes).
fn bytes(value: &AMQPValue) -> Cow<'_, [u8]> {
    let owned = |text: String| Cow::Owned(text.into_bytes());
    match value {
        AMQPValue::LongString(s) => Cow::Borrowed(s.as_bytes()),
        AMQPValue::ByteArray(b) => Cow::Borrowed(b.as_slice()),
        AMQPValue::ShortString(s) => Cow::Borrowed(s.as_str().as_bytes()),
        AMQPValue::Boolean(v) => owned(v.to_string()),
        AMQPValue::ShortShortInt(v) => owned(v.to_string()),
        AMQPValue::ShortShortUInt(v) => owned(v.to_string()),
        AMQPValue::ShortInt(v) => owned(v.to_string()),
        AMQPValue::ShortUInt(v) => owned(v.to_string()),
        AMQPValue::LongInt(v) => owned(v.to_string()),
        AMQPValue::LongUInt(v) => owned(v.to_string()),
        AMQPValue::LongLongInt(v) => owned(v.to_string()),
        AMQPValue::Float(v) => owned(v.to_string()),
        AMQPValue::Double(v) => owned(v.to_string()),
        AMQPValue::Timestamp(v) => owned(v.to_string()),
        AMQPValue::DecimalValue(v) => owned(decimal(v.value, v.scale)),
        AMQPValue::Void => Cow::Borrowed(b""),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) => owned(json(value).to_string()),
    }
}

fn decimal(value: u32, scale: u8) -> String {
    let digits = format!("{value:0>width$}", width = usize::from(scale) + 1);
    let (whole, part) = digits.split_at(digits.len() - usize::from(scale));
    if part.is_empty() {
        whole.to_owned()
    } else {
        format!("{whole}.{part}")
    }
}

fn json(value: &AMQPValue) -> serde_json::Value {
    use serde_json::Value;
    match value {
        AMQPValue::FieldArray(items) => items.as_slice().iter().map(json).collect(),
        AMQPValue::FieldTable(table) => Value::Object(
            table
                .inner()
                .iter()
                .map(|(k, v)| (k.as_str().to_owned(), json(v)))
                .collect(),
        ),
        AMQPValue::Boolean(v) => Value::from(*v),
        AMQPValue::Void => Value::Null,
        AMQPValue::LongInt(v) => Value::from(*v),
        AMQPValue::LongLongInt(v) => Value::from(*v),
        AMQPValue::Timestamp(v) => Value::from(*v),
        AMQPValue::Double(v) => Value::from(*v),
        other => Value::from(String::from_utf8_lossy(&bytes(other)).into_owned()),
    }
}

/// Bytes that the other properties take at most, roughly: seven short strings
/// and the fixed ones.
const FIXED: usize = 2048;
/// Bytes of a table entry beside name and value: lengths and type.
const PER_HEADER: usize = 6;
/// RabbitMQ refuses larger ones; 49 days are as good as for ever here.
const LONGEST_TTL_MS: u128 = 4_294_967_295;

#[cfg(test)]
mod tests {
    use super::*;

    fn round(message: &Message, marks: &Marks) -> (Message, Marks) {
        let properties = properties(message, "tasks.x", marks, true, 131_072).unwrap();
        let mut delivery = Delivery::mock(
            1,
            "".into(),
            "tasks.x".into(),
            false,
            message.payload.to_vec(),
        );
        delivery.properties = properties;
        super::message(delivery, "tasks.x", false)
    }

    #[test]
    fn a_message_comes_back_as_it_went() {
        let mut message = Message::new("task.created", "payload")
            .with_key("k")
            .with_header("a", "b")
            .with_priority(Priority::HIGH)
            .with_content_type("text/plain")
            .with_correlation_id("c")
            .with_reply_to("r")
            .with_max_retries(7);
        message.retry_count = 2;
        message.error = Some("why".into());
        let marks = Marks {
            possible_duplicate: true,
            settled: vec!["g".into()],
            failure: Some(Box::new(Failure::now("r", "d", "tasks.x", None))),
            replay: None,
            reprocess: 1,
        };
        let (mut back, back_marks) = round(&message, &marks);
        assert_eq!(back.topic.take().as_deref(), Some("tasks.x"));
        assert_eq!(back, message);
        assert_eq!(back_marks, marks);
    }

    #[test]
    fn what_expired_or_does_not_fit_is_refused() {
        let past = Message::new("t", "").with_expiration(Timestamp::from_millis(1));
        let refused = |m: &Message, expires| {
            properties(m, "t", &Marks::default(), expires, 131_072).map(drop)
        };
        assert_eq!(
            refused(&past, true).unwrap_err().code(),
            ErrorCode::MessageExpired
        );
        assert!(refused(&past, false).is_ok());
        let large = Message::new("t", "").with_header("h", "x".repeat(131_072));
        let error = refused(&large, true).unwrap_err();
        assert_eq!(error.code(), ErrorCode::MessageTooLarge);
        assert!(error.is_refusal());
    }

    #[test]
    fn foreign_headers_of_any_type_become_text() {
        let mut table = FieldTable::default();
        let mut inner = FieldTable::default();
        inner.insert("n".into(), AMQPValue::LongInt(1));
        for (name, value) in [
            ("Int", AMQPValue::LongLongInt(-5)),
            ("flag", AMQPValue::Boolean(true)),
            ("void", AMQPValue::Void),
            ("table", AMQPValue::FieldTable(inner)),
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            ("cloudEvents_source", AMQPValue::LongString("s".into())),
        ] {
            table.insert(name.into(), value);
        }
        let mut delivery = Delivery::mock(1, "".into(), "q".into(), true, b"x".to_vec());
        delivery.properties = BasicProperties::default()
            .with_headers(table)
            .with_timestamp(1_700_000_000);
        let (message, _) = super::message(delivery, "q", false);
        let header = |n: &str| message.headers.get(n).map(String::as_str);
        assert_eq!(header("int"), Some("-5"));
        assert_eq!(header("flag"), Some("true"));
        assert_eq!(header("void"), Some(""));
        assert_eq!(header("table"), Some("{\"n\":1}"));
        assert_eq!(header("x-delivery-count"), None);
        assert_eq!(message.event.as_ref().map(|e| e.source.as_str()), Some("s"));
        assert_eq!(message.timestamp, Timestamp::from_millis(1_700_000_000_000));
        assert!(message.redelivered && message.id.is_generated());
        assert_eq!(decimal(1234, 2), "12.34");
        assert_eq!(decimal(5, 3), "0.005");
    }
}
