//! A message as a Kafka record and back, by the wire mapping. No I/O.

use std::{borrow::Cow, collections::HashSet};

use rdkafka::message::{BorrowedMessage, Header, Headers, Message as _, OwnedHeaders};

use super::partitioner::Partitioner;
use crate::{
    broker::{BrokerType, OrderKey},
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageId, Timestamp,
        wire::{self, Carrier, Marks},
    },
    topic::Topic,
};

/// Where a record goes, and what it carries beside key and payload.
pub(super) struct Shape {
    pub(super) partition: i32,
    pub(super) headers: OwnedHeaders,
    /// Payload, key and headers.
    pub(super) bytes: usize,
}

/// The shape of a message in a topic of so many partitions.
///
/// # Errors
/// Why it is refused, whoever would write it.
pub(super) fn shape(
    partitioner: Partitioner,
    (topic, partitions): (&Topic, i32),
    (message, marks, order): (&Message, &Marks, &OrderKey),
) -> Result<Shape> {
    let named = |e: Error| {
        e.at(BrokerType::Kafka)
            .on(topic.as_str())
            .with_id(message.id.as_str())
    };
    if partitions < 1 {
        return Err(named(Error::new(
            ErrorCode::TopicNotFound,
            "the topic does not exist (any more); create it, or set kafka.auto_create_topics",
        )));
    }
    let partition = partitioner.partition(order, message.partition, partitions);
    if !(0..partitions).contains(&partition) {
        return Err(named(Error::rejected(
            ErrorCode::PublishRejected,
            format!("partition {partition} does not exist, the topic has {partitions}"),
        )));
    }
    let (headers, header_bytes) = headers(message, topic, marks).map_err(named)?;
    let key = message.key.as_ref().map_or(0, |k| k.as_bytes().len());
    Ok(Shape {
        partition,
        headers,
        bytes: message.payload.len() + key + header_bytes,
    })
}

/// When a record was made. A copy that the hub makes of an older message, a dead
/// letter or a failed event that rests, is as old as that copy: else retention might
/// take it before anybody read it. The message's own time is in a header then.
pub(super) fn time(message: &Message, marks: &Marks) -> i64 {
    let time = match &marks.failure {
        Some(failure) => failure.last,
        None if marks.are_of_a_copy() => Timestamp::now(),
        None => message.timestamp,
    };
    time.as_millis()
}

/// The headers of a record, and how many bytes they take.
///
/// # Errors
/// `MESSAGE_TOO_LARGE` when a header is beyond what the client library counts.
fn headers(message: &Message, topic: &str, marks: &Marks) -> Result<(OwnedHeaders, usize)> {
    let list = wire::encode(message, topic, marks, Carrier::Kafka);
    let mut bytes = 0usize;
    let mut out = OwnedHeaders::new_with_capacity(list.len());
    for (name, value) in &list {
        if name.len() > MAX_HEADER || value.len() > MAX_HEADER {
            return Err(Error::rejected(
                ErrorCode::MessageTooLarge,
                format!(
                    "header {name:?} has {} bytes, at most {MAX_HEADER} fit",
                    value.len()
                ),
            ));
        }
        bytes += name.len() + value.len();
        out = out.insert(Header {
            key: name,
            value: Some(value.as_ref()),
        });
    }
    Ok((out, bytes))
}

/// The topics that a reader meets, each checked and kept once.
#[derive(Debug, Default)]
pub(super) struct Topics(HashSet<Topic>);

impl Topics {
    /// `None` when the name is none of ours (Kafka's own topics have such names).
    fn named(&mut self, name: &str) -> Option<Topic> {
        if let Some(known) = self.0.get(name) {
            return Some(known.clone());
        }
        let topic = Topic::new(name).ok()?;
        self.0.insert(topic.clone());
        Some(topic)
    }
}

/// A record as a message, with the hub's marks. `None` when it is of none of our
/// topics.
pub(super) fn decode(
    record: &BorrowedMessage<'_>,
    topics: &mut Topics,
) -> Option<(Topic, Message, Marks)> {
    let topic = topics.named(record.topic())?;
    let (partition, offset) = (record.partition(), record.offset());
    let headers = record.headers();
    let own = headers.and_then(|all| {
        let id = all.iter().find(|h| h.key == wire::names::ID)?.value?;
        MessageId::new(std::str::from_utf8(id).ok()?).ok()
    });
    // Stands in for an id that foreign producers do not write; it is the same at
    // each delivery, so that repeats are known.
    let id = own
        .or_else(|| MessageId::new(foreign_id(&topic, partition, offset)).ok())
        .unwrap_or_else(MessageId::generate);
    let timestamp = match record.timestamp().to_millis() {
        Some(ms) => Timestamp::from_millis(ms),
        None => Timestamp::now(),
    };
    let mut message = Message::bare(id, timestamp);
    message.payload = bytes::Bytes::copy_from_slice(record.payload().unwrap_or_default());
    message.key = record.key().map(|k| k.to_vec().into());
    let mut marks = Marks::default();
    if let Some(headers) = headers {
        let named: Vec<Cow<'_, str>> = match headers.iter().any(|h| is_foreign(h.key)) {
            true => headers.iter().map(|h| lower_case(h.key)).collect(),
            false => Vec::new(),
        };
        let pairs = headers.iter().enumerate().map(|(n, h)| {
            let name = named.get(n).map_or(h.key, |name| name.as_ref());
            (name, h.value.unwrap_or_default())
        });
        marks = wire::decode(&mut message, pairs, Carrier::Kafka);
    }
    message.topic = Some(topic.as_str().to_owned());
    message.partition = Some(partition);
    message.offset = Some(offset);
    Some((topic, message, marks))
}

/// An id for what has none: at most 128 characters, so a long topic is hashed.
fn foreign_id(topic: &str, partition: i32, offset: i64) -> String {
    if topic.len() <= 80 {
        format!("kafka-{topic}-{partition}-{offset}")
    } else {
        let hash = crc32fast::hash(topic.as_bytes());
        let start = topic.get(..64).unwrap_or_default();
        format!("kafka-{start}~{hash:08x}-{partition}-{offset}")
    }
}

/// What the client library takes in one header, with room to spare.
const MAX_HEADER: usize = i32::MAX as usize / 4;

/// Whether a name is written as no hub writes it. The keys of a task's metadata and
/// of an event's extensions are written as they are.
fn is_foreign(name: &str) -> bool {
    let is_key = name.starts_with(wire::names::TASK_PREFIX) || name.starts_with("ce_");
    !is_key && name.bytes().any(|b| b.is_ascii_uppercase())
}

/// A header's name as readers get it, however a foreign producer writes it.
fn lower_case(name: &str) -> Cow<'_, str> {
    if is_foreign(name) {
        name.to_ascii_lowercase().into()
    } else {
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_lower_case_but_for_the_keys_of_tasks_and_events() {
        assert_eq!(lower_case("X-Tenant"), "x-tenant");
        for kept in ["x-tenant", "hub-task-meta-tenantId", "ce_myExtension"] {
            assert_eq!(lower_case(kept), kept);
        }
    }

    #[test]
    fn ids_of_foreign_records_are_valid_for_every_topic() {
        let long = "x".repeat(249);
        for topic in ["t", long.as_str()] {
            let id = foreign_id(topic, i32::MAX, i64::MAX);
            assert!(MessageId::new(&id).is_ok(), "{id}");
        }
        assert_eq!(foreign_id("t", 2, 7), "kafka-t-2-7");
    }

    #[test]
    fn a_letter_is_as_old_as_it_is_and_keeps_the_messages_own_time() {
        let message = Message::new("k", "x").with_timestamp(Timestamp::from_millis(7));
        let plain = Marks::default();
        assert_eq!(time(&message, &plain), 7);
        let letter = Marks {
            failure: Some(Box::new(wire::Failure::now("r", "d", "t", None))),
            ..Marks::default()
        };
        let again = Marks {
            reprocess: 1,
            ..Marks::default()
        };
        for marks in [&letter, &again] {
            assert!(Timestamp::now().as_millis() - time(&message, marks) < 60_000);
            let headers = wire::encode(&message, "t", marks, Carrier::Kafka);
            let pairs = headers.iter().map(|(n, v)| (n.as_ref(), v.as_bytes()));
            let mut read = Message::bare(message.id.clone(), Timestamp::now());
            wire::decode(&mut read, pairs, Carrier::Kafka);
            assert_eq!(read.timestamp, message.timestamp);
        }
        let headers = wire::encode(&message, "t", &plain, Carrier::Kafka);
        assert!(headers.iter().all(|(name, _)| name != wire::names::TIME));
    }
}
