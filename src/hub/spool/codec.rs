//! A spooled message as it is kept: bytes in, bytes out. Pure; it refuses what
//! it cannot read instead of guessing.
//!
//! ```text
//! version (1 byte) | length of the description (4 bytes, little endian) | description (JSON) | payload
//! ```
//!
//! The payload stands as it is, so that large ones cost a copy and no more.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Entry, Seq};
use crate::{
    broker::{Compression, OrderKey},
    error::{Error, ErrorCode, Result},
    message::{
        Message, Timestamp,
        wire::{Failure, Marks, Replayed},
    },
    topic::Topic,
};

/// Which lane a message belongs to, in words that outlive the process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct LaneName {
    pub(crate) topic: Topic,
    pub(crate) lane: u32,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) mandatory: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) compression: Option<Compression>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<(String, String)>,
}

/// What is read back.
#[cfg_attr(
    not(any(test, feature = "journal")),
    allow(dead_code, reason = "only an earlier process's lanes are looked for")
)]
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) lane: LaneName,
    pub(crate) seq: Seq,
    /// Its `size` is not known yet.
    pub(crate) entry: Entry,
    /// The hub made its id, so nobody can bring it a second time.
    pub(crate) generated: bool,
}

/// Everything but the payload, as it is read. Names are short: each message
/// carries them.
#[derive(Deserialize)]
struct Description {
    #[serde(flatten)]
    lane: LaneName,
    seq: Seq,
    /// Whose order it keeps when it has no key.
    #[serde(default)]
    publisher: Option<u64>,
    since: i64,
    #[serde(default)]
    due: Option<i64>,
    #[serde(default)]
    duplicate: bool,
    #[serde(default)]
    settled: Vec<String>,
    #[serde(default)]
    failure: Option<KeptFailure>,
    #[serde(default)]
    replay: Option<Box<Replayed>>,
    #[serde(default)]
    reprocess: u32,
    /// The hub made the id.
    #[serde(default)]
    generated: bool,
    /// With an empty payload.
    message: Message,
}

/// A [`Description`] as it is written. Every message of an outage passes here, so
/// the lane's name is not copied for each.
#[derive(Serialize)]
struct Described<'a> {
    topic: &'a Topic,
    lane: u32,
    #[serde(skip_serializing_if = "is_false")]
    mandatory: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    compression: Option<Compression>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<&'a (String, String)>,
    seq: Seq,
    #[serde(skip_serializing_if = "Option::is_none")]
    publisher: Option<u64>,
    since: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    due: Option<i64>,
    #[serde(skip_serializing_if = "is_false")]
    duplicate: bool,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    settled: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<KeptFailure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<&'a Replayed>,
    #[serde(skip_serializing_if = "is_zero")]
    reprocess: u32,
    #[serde(skip_serializing_if = "is_false")]
    generated: bool,
    message: &'a Message,
}

#[derive(Serialize, Deserialize)]
struct KeptFailure {
    reason: String,
    details: String,
    first: i64,
    last: i64,
    topic: String,
}

/// The form that is written today.
const VERSION: u8 = 1;

/// Bytes before the description.
const PREFIX: usize = 5;

/// Bytes of a description beside what its message brings: names and numbers.
const TYPICAL: usize = 448;

/// The bytes that stand for a spooled message.
pub(crate) fn encode(lane: &LaneName, seq: Seq, entry: &Entry) -> Result<Bytes> {
    let mut message = (*entry.message).clone();
    let payload = std::mem::take(&mut message.payload);
    let description = Described {
        topic: &lane.topic,
        lane: lane.lane,
        mandatory: lane.mandatory,
        compression: lane.compression,
        address: lane.address.as_ref(),
        seq,
        publisher: match entry.order {
            OrderKey::Publisher(number) => Some(number),
            OrderKey::Key(_) => None,
        },
        since: entry.since.as_millis(),
        due: entry.due.map(Timestamp::as_millis),
        duplicate: entry.marks.possible_duplicate,
        settled: &entry.marks.settled,
        failure: entry.marks.failure.as_ref().map(|f| KeptFailure {
            reason: f.reason.clone(),
            details: f.details.clone(),
            first: f.first.as_millis(),
            last: f.last.as_millis(),
            topic: f.original_topic.clone(),
        }),
        replay: entry.marks.replay.as_deref(),
        reprocess: entry.marks.reprocess,
        generated: message.id.is_generated(),
        message: &message,
    };
    let mut out = Vec::with_capacity(PREFIX + TYPICAL + message.size() + payload.len());
    out.push(VERSION);
    out.extend_from_slice(&[0; PREFIX - 1]);
    serde_json::to_writer(&mut out, &description).map_err(|e| {
        Error::new(
            ErrorCode::UnknownError,
            format!("a spooled message has no durable form: {e}"),
        )
    })?;
    let length = u32::try_from(out.len() - PREFIX).map_err(|e| {
        Error::new(
            ErrorCode::MessageTooLarge,
            "a spooled message's headers are too large to be kept",
        )
        .caused_by(e)
    })?;
    if let Some(place) = out.get_mut(1..PREFIX) {
        place.copy_from_slice(&length.to_le_bytes());
    }
    // A description longer than that must not double the room of a large payload.
    out.reserve_exact(payload.len());
    out.extend_from_slice(&payload);
    Ok(out.into())
}

/// Reads a spooled message back.
pub(crate) fn decode(bytes: &Bytes) -> Result<Kept> {
    let wrong = |why: String| {
        Error::new(
            ErrorCode::InvalidConfig,
            format!(
                "a record of the spool cannot be read: {why}; it was written by another version, or is damaged"
            ),
        )
    };
    let (Some(&version), Some(length)) = (bytes.first(), bytes.get(1..PREFIX)) else {
        return Err(wrong(format!("it has only {} bytes", bytes.len())));
    };
    if version != VERSION {
        return Err(wrong(format!("its form is {version}, not {VERSION}")));
    }
    let length = length
        .iter()
        .rev()
        .fold(0_usize, |n, b| n << 8 | usize::from(*b));
    let json = bytes
        .get(PREFIX..PREFIX + length)
        .ok_or_else(|| wrong("it is cut off".to_owned()))?;
    let found: Description = serde_json::from_slice(json).map_err(|e| wrong(e.to_string()))?;
    let mut message = found.message;
    message.payload = bytes.slice(PREFIX + length..);
    let order = match (&message.key, found.publisher) {
        (Some(key), None) => OrderKey::Key(key.clone()),
        (_, publisher) => OrderKey::Publisher(publisher.unwrap_or(0)),
    };
    Ok(Kept {
        lane: found.lane,
        seq: found.seq,
        entry: Entry {
            message: Arc::new(message),
            order,
            marks: Marks {
                possible_duplicate: found.duplicate,
                settled: found.settled,
                failure: found.failure.map(|f| {
                    Box::new(Failure {
                        reason: f.reason,
                        details: f.details,
                        first: Timestamp::from_millis(f.first),
                        last: Timestamp::from_millis(f.last),
                        original_topic: f.topic,
                        retries: 0,
                    })
                }),
                replay: found.replay,
                reprocess: found.reprocess,
            },
            // Whatever was asked for then, nobody waits for the answer now.
            confirm: true,
            since: Timestamp::from_millis(found.since),
            size: 0,
            due: found.due.map(Timestamp::from_millis),
        },
        generated: found.generated,
    })
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
fn is_false(b: &bool) -> bool {
    !b
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::message::{MessageId, Priority};

    fn lane() -> LaneName {
        LaneName {
            topic: Topic::new("helixagent.tasks.llm").unwrap(),
            lane: 3,
            mandatory: true,
            compression: Some(Compression::Zstd),
            address: Some(("x".to_owned(), "y".to_owned())),
        }
    }

    fn entry(message: Message) -> Entry {
        let order = match &message.key {
            Some(key) => OrderKey::Key(key.clone()),
            None => OrderKey::Publisher(77),
        };
        Entry {
            message: Arc::new(message),
            order,
            marks: Marks {
                possible_duplicate: true,
                settled: vec!["g".to_owned()],
                failure: Some(Box::new(Failure {
                    reason: "r".to_owned(),
                    details: "d".to_owned(),
                    first: Timestamp::from_millis(1),
                    last: Timestamp::from_millis(2),
                    original_topic: "t".to_owned(),
                    retries: 0,
                })),
                replay: Some(Box::new(Replayed {
                    of: "o".to_owned(),
                    by: "b".to_owned(),
                })),
                reprocess: 2,
            },
            confirm: true,
            since: Timestamp::from_millis(5),
            size: 0,
            due: Some(Timestamp::from_millis(9)),
        }
    }

    #[test]
    fn what_is_kept_comes_back_as_it_was() {
        let message = Message::new("kind", vec![0_u8, 255, 7])
            .with_id(MessageId::new("brought").unwrap())
            .with_key(vec![0xff_u8, 0])
            .with_priority(Priority::new(7).unwrap())
            .with_header("h", "v")
            .with_ttl(std::time::Duration::from_secs(60));
        for message in [
            message.clone(),
            Message {
                key: None,
                ..message
            },
        ] {
            let entry = entry(message);
            let kept = decode(&encode(&lane(), 42, &entry).unwrap()).unwrap();
            assert_eq!((kept.lane, kept.seq), (lane(), 42));
            assert_eq!(kept.entry.message, entry.message);
            assert_eq!(kept.entry.order, entry.order);
            assert_eq!(kept.entry.marks, entry.marks);
            assert_eq!(kept.entry.since, entry.since);
            assert_eq!(kept.entry.due, entry.due);
        }
    }

    /// An earlier process of this version may have left such a record, and a later
    /// one of an earlier program may have to read it.
    #[test]
    fn version_1_is_written_as_it_always_was() {
        let message = Message {
            timestamp: Timestamp::from_millis(1_700_000_000_000),
            ..Message::new("kind", "body")
                .with_id(MessageId::new("brought").unwrap())
                .with_key("k")
                .with_header("h", "v")
        };
        let bytes = encode(&lane(), 42, &entry(message)).unwrap();
        let text = String::from_utf8_lossy(&bytes[PREFIX..]);
        assert_eq!(text, GOLDEN);
        assert_eq!(bytes[0], 1);
        assert_eq!(bytes[1..PREFIX], (GOLDEN.len() as u32 - 4).to_le_bytes());
    }

    const GOLDEN: &str = concat!(
        r#"{"topic":"helixagent.tasks.llm","lane":3,"mandatory":true,"compression":"zstd","#,
        r#""address":["x","y"],"seq":42,"since":5,"due":9,"duplicate":true,"settled":["g"],"#,
        r#""failure":{"reason":"r","details":"d","first":1,"last":2,"topic":"t"},"#,
        r#""replay":{"of":"o","by":"b"},"reprocess":2,"message":{"id":"brought","type":"kind","#,
        r#""payload":"","headers":{"h":"v"},"timestamp":"2023-11-14T22:13:20.000Z","#,
        r#""priority":5,"key":"k","retry_count":0,"max_retries":3,"#,
        r#""delivery_mode":"persistent","state":"pending","redelivered":false}}body"#,
    );

    #[test]
    fn an_id_that_the_hub_made_is_told_from_one_that_was_brought() {
        let brought = MessageId::new("brought").unwrap();
        for (message, generated) in [
            (Message::new("k", "x"), true),
            (Message::new("k", "x").with_id(brought), false),
        ] {
            let kept = decode(&encode(&lane(), 1, &entry(message)).unwrap()).unwrap();
            assert_eq!(kept.generated, generated);
            // From here on it is an id like any other: its copy at the primary
            // must be recognised.
            assert!(!kept.entry.message.id.is_generated());
        }
    }

    #[test]
    fn a_time_that_no_calendar_reaches_comes_back_too() {
        for far in [i64::MAX, i64::MIN, 0] {
            let far = Timestamp::from_millis(far);
            let mut message = Message::new("kind", "x").with_timestamp(far);
            message.expiration = Some(far);
            let mut entry = entry(message);
            (entry.since, entry.due) = (far, Some(far));
            let kept = decode(&encode(&lane(), 1, &entry).unwrap()).unwrap();
            assert_eq!(kept.entry.message, entry.message);
            assert_eq!((kept.entry.since, kept.entry.due), (far, Some(far)));
        }
    }

    #[test]
    fn what_is_as_usual_takes_no_room() {
        let id = MessageId::new("brought").unwrap();
        let usual = Entry {
            marks: Marks::default(),
            due: None,
            ..entry(Message::new("k", "x").with_id(id))
        };
        let plain = LaneName {
            mandatory: false,
            compression: None,
            address: None,
            ..lane()
        };
        let bytes = encode(&plain, 1, &usual).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&bytes[PREFIX..bytes.len() - 1]).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            ["lane", "message", "publisher", "seq", "since", "topic"]
        );
    }

    #[test]
    fn what_cannot_be_read_is_refused_at_every_cut() {
        let whole = encode(&lane(), 1, &entry(Message::new("k", "payload"))).unwrap();
        let described = whole.len() - "payload".len();
        for cut in 0..described {
            assert!(decode(&whole.slice(..cut)).is_err(), "cut at {cut}");
        }
        let mut other = whole.to_vec();
        other[0] = 9;
        let error = decode(&other.into()).unwrap_err().to_string();
        assert!(error.contains("its form is 9"), "{error}");
    }
}
