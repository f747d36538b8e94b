//! A message as a Kafka record and back, by the wire mapping. No I/O.

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

/// A record as a message, with the hub's marks. `None` when the topic's name is
/// none of ours (Kafka's own topics have such names).
pub(super) fn decode(record: &BorrowedMessage<'_>) -> Option<(Topic, Message, Marks)> {
    let topic = Topic::new(record.topic()).ok()?;
    let (partition, offset) = (record.partition(), record.offset());
    let mut message = Message::default();
    // Stands in for an id that foreign producers do not write; it is the same
    // at each delivery, so that repeats are known.
    if let Ok(id) = MessageId::new(foreign_id(&topic, partition, offset)) {
        message.id = id;
    }
    message.payload = bytes::Bytes::copy_from_slice(record.payload().unwrap_or_default());
    message.key = record.key().map(|k| k.to_vec().into());
    if let Some(ms) = record.timestamp().to_millis() {
        message.timestamp = Timestamp::from_millis(ms);
    }
    let mut marks = Marks::default();
    if let Some(headers) = record.headers() {
        let pairs = headers.iter().map(|h| (h.key, h.value.unwrap_or_default()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_foreign_records_are_valid_for_every_topic() {
        let long = "x".repeat(249);
        for topic in ["t", long.as_str()] {
            let id = foreign_id(topic, i32::MAX, i64::MAX);
            assert!(MessageId::new(&id).is_ok(), "{id}");
        }
        assert_eq!(foreign_id("t", 2, 7), "kafka-t-2-7");
    }
}
