//! The message that is published for one that was read. Pure.
//!
//! It has an id of its own, so that groups which handled the first handle it
//! again; the id follows from the replay and the place it was read from, so that
//! the same replay, begun again under its id after a crash, makes the same ids and
//! is recognised. The first id travels along as a mark.

use std::borrow::Cow;

use uuid::Uuid;

use crate::{
    broker::Received,
    compression,
    message::{
        Message, MessageId, MessageState,
        wire::{self, Marks, Replayed, names::COMPRESSED},
    },
    topic::Topic,
};

/// A message to be published.
#[derive(Clone, Debug)]
pub(crate) struct Copied {
    pub(crate) target: Topic,
    pub(crate) message: Message,
    pub(crate) marks: Marks,
    /// Messages of one source keep their order, also those without a key.
    pub(crate) source: u64,
}

/// The id that was published first, before any replay.
pub(super) fn first_id(received: &Received) -> &str {
    match &received.marks.replay {
        Some(replay) if !replay.of.is_empty() => &replay.of,
        _ => received.id.as_str(),
    }
}

/// What tells repeats of it from others. A dead letter that was published again
/// under its id is no repeat: it may have been mended.
pub(super) fn first_identity(received: &Received) -> Cow<'_, str> {
    match &received.marks.replay {
        Some(replay) if !replay.of.is_empty() => replay.of.as_str().into(),
        _ => received.marks.identity(received.id.as_str()),
    }
}

/// The copy of a message. Whatever was a fact about its first life is left out:
/// attempts, errors, place, and an expiration that would have it refused, because
/// somebody wants it handled now. Its time stays.
pub(super) fn copy(received: &Received, replay: &str, target: Topic, source: u64) -> Copied {
    let read = received.message.as_ref();
    let place = format!(
        "{replay}\n{}\n{}\n{}",
        received.topic,
        read.partition.unwrap_or_default(),
        read.offset.unwrap_or_default()
    );
    let id = Uuid::new_v5(&IDS, place.as_bytes());
    let mut message = Message {
        id: MessageId::derived(id),
        state: MessageState::Pending,
        retry_count: 0,
        error: None,
        expiration: None,
        redelivered: false,
        partition: None,
        offset: None,
        topic: None,
        ..read.clone()
    };
    // Of another version's hub; what of it we know was taken from it.
    let marked = compression::is_marked(&message);
    wire::take_off_refused(&mut message, marked.then_some(COMPRESSED));
    if let Some(task) = &mut message.task {
        task.deadline = None;
        task.scheduled_at = None;
    }
    Copied {
        target,
        message,
        marks: Marks {
            replay: Some(Box::new(Replayed {
                of: first_id(received).to_owned(),
                by: replay.to_owned(),
            })),
            ..Marks::default()
        },
        source,
    }
}

/// The namespace of ids that replays make.
const IDS: Uuid = Uuid::from_u128(0x8c1f_6d0e_52f7_4b7a_9b0c_6f2f_1d3a_70e5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::BrokerType, message::Timestamp};
    use std::sync::Arc;

    fn received(offset: i64) -> Received {
        let mut message = Message::new("t", "body")
            .with_id(MessageId::new("first").unwrap())
            .with_key("k")
            .with_header("h", "v")
            .with_header("hub-from-tomorrow", "x")
            .with_timestamp(Timestamp::from_millis(7))
            .with_expiration(Timestamp::from_millis(8));
        message.retry_count = 3;
        message.error = Some("e".into());
        message.partition = Some(2);
        message.offset = Some(offset);
        message.topic = Some("a".into());
        Received {
            topic: Topic::new("a").unwrap(),
            message: Arc::new(message),
            marks: Arc::default(),
            via: BrokerType::Kafka,
        }
    }

    fn copied(received: &Received, replay: &str) -> Copied {
        copy(received, replay, Topic::new("b").unwrap(), 0)
    }

    #[test]
    fn an_id_follows_from_the_replay_and_the_place() {
        let id = |r: &Copied| r.message.id.clone();
        let one = id(&copied(&received(5), "r"));
        assert_eq!(one, id(&copied(&received(5), "r")));
        assert_ne!(one, id(&copied(&received(6), "r")));
        assert_ne!(one, id(&copied(&received(5), "s")));
        // The hub made it: it takes no place among the ids that clients brought.
        assert!(one.is_generated());
    }

    #[test]
    fn what_was_published_is_kept_and_what_became_of_it_is_not() {
        let copy = copied(&received(5), "r");
        assert!(copy.message.validate(1024).is_ok());
        assert_eq!(copy.message.timestamp, Timestamp::from_millis(7));
        assert_eq!(copy.message.payload, "body");
        assert_eq!(copy.message.key, Some("k".into()));
        assert_eq!(copy.message.headers.len(), 1);
        assert_eq!(
            (copy.message.expiration, copy.message.retry_count),
            (None, 0)
        );
        assert_eq!((copy.message.partition, copy.message.offset), (None, None));
        let mark = copy.marks.replay.unwrap();
        assert_eq!((mark.of.as_str(), mark.by.as_str()), ("first", "r"));
    }

    #[test]
    fn a_letter_that_was_published_again_is_no_repeat() {
        let mut again = received(9);
        again.marks = Arc::new(Marks {
            reprocess: 1,
            ..Marks::default()
        });
        assert_ne!(first_identity(&again), first_identity(&received(5)));
        assert_eq!(first_identity(&again), first_identity(&again.clone()));
        assert_eq!(first_id(&again), "first");
    }

    #[test]
    fn a_replay_of_a_replay_names_the_first() {
        let mut again = received(9);
        again.marks = Arc::new(copied(&received(5), "r").marks);
        assert_eq!(first_id(&again), "first");
        assert_eq!(copied(&again, "s").marks.replay.unwrap().of, "first");
    }
}
