//! A dead letter, whoever keeps it: what failed, why, when, and what was decided
//! about it. No I/O.

use serde::{Deserialize, Serialize};

use crate::{
    broker::{BrokerType, Received},
    compression,
    message::{Message, MessageState, Timestamp, wire::Replayed},
};

/// Where a dead letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LetterStatus {
    /// Nobody has decided about it.
    Pending,
    /// A processor tries it again, at `next_retry`.
    Retrying,
    /// A copy was published, or a processor's handler took it.
    Processed,
    /// Somebody gave it up, with a reason.
    Discarded,
    /// Open like a pending one, but it died because its time was over.
    Expired,
}

impl LetterStatus {
    /// Every status.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Retrying,
        Self::Processed,
        Self::Discarded,
        Self::Expired,
    ];

    /// `pending`, `retrying`, `processed`, `discarded` or `expired`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Retrying => "retrying",
            Self::Processed => "processed",
            Self::Discarded => "discarded",
            Self::Expired => "expired",
        }
    }

    /// Whether nothing is left to decide.
    #[must_use]
    pub const fn is_decided(self) -> bool {
        matches!(self, Self::Processed | Self::Discarded)
    }
}

/// What was decided about a letter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// `processed` or `discarded`.
    pub status: LetterStatus,
    /// When.
    pub at: Timestamp,
    /// Why, or where it went.
    pub note: String,
}

/// A dead letter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Names the letter: its broker and where it lies, or, in a queue, what it
    /// is made of. The same at each look.
    pub id: String,
    /// Which broker has it.
    pub broker: BrokerType,
    /// The queue or topic it lies in.
    pub place: String,
    /// The queue it failed in, if it was one.
    pub original_queue: Option<String>,
    /// The topic it failed in; none for a foreign message that does not say.
    pub original_topic: Option<String>,
    /// A short, stable reason.
    pub failure_reason: String,
    /// The error's text.
    pub failure_details: String,
    /// Attempts that had failed before the last one.
    pub retry_count: u32,
    /// When it failed first.
    pub first_failure: Timestamp,
    /// When it failed last.
    pub last_failure: Timestamp,
    /// When a processor tries it again.
    pub next_retry: Option<Timestamp>,
    /// Where it stands.
    pub status: LetterStatus,
    /// How often it had been reprocessed before it came here.
    pub reprocessed: u32,
    /// What was decided about it.
    pub decision: Option<Decision>,
    /// The message as it failed. In a list, where a hub had compressed it, it
    /// still is.
    pub original_message: Message,
    /// What it was a replay of, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replayed>,
    /// Whether its id was made here: a foreign message without one. Copies of it
    /// cannot be told from each other.
    #[serde(default)]
    pub nameless: bool,
}

impl DeadLetter {
    /// A letter from what was received. `position` names it in a log; in a
    /// queue it is named by what it is made of. `is_queue` tells queues from
    /// streams.
    pub(super) fn of(
        received: &Received,
        position: Option<(i32, i64)>,
        is_queue: &dyn Fn(&str) -> bool,
    ) -> Self {
        let message = &received.message;
        let failure = received.marks.failure.as_deref();
        // The embedded broker keeps an id with its message; over AMQP one that
        // was made here was made at this look.
        let nameless = message.id.is_generated() && received.via == BrokerType::RabbitMq;
        let original = failure
            .map(|f| f.original_topic.clone())
            .filter(|t| !t.is_empty());
        let mut original_message = Message::clone(message);
        original_message.topic.clone_from(&original);
        original_message.partition = None;
        original_message.offset = None;
        original_message.redelivered = false;
        original_message.state = MessageState::DeadLettered;
        let reason = failure.map_or("unknown", |f| f.reason.as_str());
        let at = failure.map_or(message.timestamp, |f| f.last);
        let id = match position {
            Some((partition, offset)) => {
                format!("{}:{}:{partition}:{offset}", received.via, received.topic)
            }
            None => format!("{}:{:032x}", received.via, fingerprint(received, nameless)),
        };
        Self {
            id,
            broker: received.via,
            place: received.topic.as_str().to_owned(),
            original_queue: original.clone().filter(|t| is_queue(t)),
            original_topic: original,
            failure_reason: reason.to_owned(),
            failure_details: failure.map_or_else(
                || "nobody has noted why it is here".to_owned(),
                |f| f.details.clone(),
            ),
            retry_count: message.retry_count,
            first_failure: failure.map_or(message.timestamp, |f| f.first),
            last_failure: at,
            next_retry: None,
            status: if reason == EXPIRED {
                LetterStatus::Expired
            } else {
                LetterStatus::Pending
            },
            reprocessed: received.marks.reprocess,
            decision: None,
            original_message,
            replay: received.marks.replay.as_deref().cloned(),
            nameless,
        }
    }

    /// The letter with what was decided about it.
    #[must_use]
    pub(super) fn decided(mut self, decision: Decision) -> Self {
        self.status = decision.status;
        self.next_retry = None;
        self.decision = Some(decision);
        self
    }

    /// The message as it was published, if a hub compressed it. As it stands
    /// where this build does not know the format.
    ///
    /// # Errors
    /// Why it cannot be expanded: it is damaged, or would have more than `most`
    /// bytes.
    pub(super) fn whole_message(&self, most: usize) -> Result<Message, String> {
        let message = &self.original_message;
        if !compression::is_marked(message) {
            return Ok(message.clone());
        }
        let whole = compression::expand(message, most)?;
        Ok(whole.unwrap_or_else(|| message.clone()))
    }

    /// The letter with its message whole, where that can be.
    #[must_use]
    pub(super) fn whole(mut self, most: usize) -> Self {
        if let Ok(whole) = self.whole_message(most) {
            self.original_message = whole;
        }
        self
    }

    /// What it counts towards the bound on bytes.
    pub(super) fn size(&self) -> usize {
        self.original_message.size() + OVERHEAD
    }
}

/// What makes a letter in a queue the one it is. Times of a foreign message
/// that has none are made up at each look, so they are left out. One message may
/// fail for two groups within a millisecond: what its readers said tells them apart.
fn fingerprint(received: &Received, nameless: bool) -> u128 {
    let message = &received.message;
    let mut hash = Fnv::default();
    if nameless {
        hash.add(&message.payload);
        hash.add(message.kind.as_bytes());
        for (name, value) in &message.headers {
            hash.add(name.as_bytes());
            hash.add(value.as_bytes());
        }
    } else {
        hash.add(message.id.as_str().as_bytes());
        hash.add(&received.marks.reprocess.to_be_bytes());
    }
    if let Some(failure) = &received.marks.failure {
        hash.add(failure.original_topic.as_bytes());
        hash.add(failure.reason.as_bytes());
        hash.add(failure.details.as_bytes());
        hash.add(&failure.last.as_millis().to_be_bytes());
    }
    hash.0
}

/// FNV-1a, 128 bits: the same in every process and version, which the standard
/// library's hashers do not promise.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_be_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 ^= u128::from(*byte);
            self.0 = self
                .0
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

/// The reason of what died because its time was over, by the hub, the embedded
/// broker and RabbitMQ.
const EXPIRED: &str = "expired";

/// Bytes that a letter takes beside what it carries.
const OVERHEAD: usize = 1024;

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        message::{
            MessageId,
            wire::{Failure, Marks},
        },
        topic::Topic,
    };

    pub(crate) fn received(id: &str, reason: &str, last: i64) -> Received {
        let message = Message::new("order", "body")
            .with_id(MessageId::new(id).unwrap())
            .with_header("a", "1");
        Received {
            topic: Topic::new("helixagent.dlq").unwrap(),
            message: Arc::new(message),
            marks: Arc::new(Marks {
                failure: Some(Box::new(Failure {
                    reason: reason.to_owned(),
                    details: "boom".to_owned(),
                    first: Timestamp::from_millis(1),
                    last: Timestamp::from_millis(last),
                    original_topic: "tasks.x".to_owned(),
                    retries: 0,
                })),
                reprocess: 1,
                ..Marks::default()
            }),
            via: BrokerType::RabbitMq,
        }
    }

    fn failure(marks: &mut Marks) -> &mut Failure {
        marks.failure.as_mut().unwrap()
    }

    #[test]
    fn a_letter_says_what_failed_where_why_and_when() {
        let letter = DeadLetter::of(&received("m1", "handler_error", 9), None, &|_| true);
        assert_eq!(letter.original_topic.as_deref(), Some("tasks.x"));
        assert_eq!(letter.original_queue.as_deref(), Some("tasks.x"));
        assert_eq!(letter.failure_reason, "handler_error");
        assert_eq!(letter.failure_details, "boom");
        assert_eq!(letter.first_failure, Timestamp::from_millis(1));
        assert_eq!(letter.last_failure, Timestamp::from_millis(9));
        assert_eq!(
            (letter.status, letter.reprocessed),
            (LetterStatus::Pending, 1)
        );
        let back: DeadLetter =
            serde_json::from_str(&serde_json::to_string(&letter).unwrap()).unwrap();
        assert_eq!(back, letter);
    }

    #[test]
    fn a_letter_keeps_its_name_and_another_has_another() {
        let name = |id, last| DeadLetter::of(&received(id, "r", last), None, &|_| true).id;
        assert_eq!(name("a", 1), name("a", 1));
        assert_ne!(name("a", 1), name("b", 1));
        assert_ne!(name("a", 1), name("a", 2), "it died twice");
        let of = |change: fn(&mut Marks)| {
            let mut received = received("a", "r", 1);
            change(Arc::make_mut(&mut received.marks));
            DeadLetter::of(&received, None, &|_| true).id
        };
        assert_eq!(of(|_| {}), name("a", 1));
        let others: [fn(&mut Marks); 3] = [
            |marks| failure(marks).original_topic = "tasks.y".to_owned(),
            |marks| failure(marks).details = "boom in group b".to_owned(),
            |marks| marks.reprocess = 2,
        ];
        for other in others {
            assert_ne!(of(other), name("a", 1));
        }
        let log = DeadLetter::of(&received("a", "r", 1), Some((2, 7)), &|_| false);
        assert_eq!(log.id, "rabbitmq:helixagent.dlq:2:7");
        assert_eq!(log.original_queue, None);
    }

    #[test]
    fn a_foreign_message_without_an_id_is_known_by_what_it_carries() {
        let mut one = received("x", "r", 1);
        one.message = Arc::new(Message::new("t", "same"));
        let mut two = one.clone();
        two.message = Arc::new(Message::new("t", "same"));
        let (one, two) = (
            DeadLetter::of(&one, None, &|_| true),
            DeadLetter::of(&two, None, &|_| true),
        );
        assert!(one.nameless && one.id == two.id);
    }

    #[test]
    fn what_expired_is_told_apart() {
        let letter = DeadLetter::of(&received("a", "expired", 1), None, &|_| true);
        assert_eq!(letter.status, LetterStatus::Expired);
        assert!(!letter.status.is_decided());
    }
}
