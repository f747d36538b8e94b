//! The copy of a dead letter that is published again. Pure.
//!
//! All copies of one letter are one to whoever handles them: they carry the
//! letter's message id and, as `hub-reprocess`, how often the message has been
//! reprocessed with this letter counted. A group knows what it handled by both,
//! so a copy is handled although the id was handled before, and a second copy of
//! the same letter is not. A copy that dies in its turn is another letter, whose
//! copies carry the next number.
//!
//! What a hub had compressed is published whole, to be compressed again as its new
//! way says. What cannot be expanded goes on as it stands, marked as it was.

use super::{DeadLetter, Edit};
use crate::{
    compression,
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageId, MessageState, Timestamp,
        wire::{Marks, names::COMPRESSED, take_off_refused},
    },
    topic::Topic,
};

/// The copy, what is marked on it, and where it goes.
///
/// # Errors
/// `MESSAGE_INVALID` when nobody knows where it came from, or the edit is wrong.
pub(super) fn of(
    letter: &DeadLetter,
    edit: Option<&Edit>,
    now: Timestamp,
    most: usize,
) -> Result<(Topic, Message, Marks)> {
    let raw = &letter.original_message;
    let mut message = letter.whole_message(most).unwrap_or_else(|_| raw.clone());
    let packed = message.headers.get(COMPRESSED).cloned();
    let packed = packed.filter(|_| compression::is_marked(&message));
    message.topic.clone_from(&letter.original_topic);
    // What only brokers and the hub write is not the user's to send again.
    take_off_refused(&mut message, None);
    message.retry_count = 0;
    message.error = None;
    message.state = MessageState::Pending;
    message.partition = None;
    message.offset = None;
    message.redelivered = false;
    let over = |at: Option<Timestamp>| at.filter(|at| *at > now);
    // It was too late once; whoever reprocesses it wants it handled now.
    message.expiration = over(message.expiration);
    if let Some(task) = &mut message.task {
        task.scheduled_at = None;
        task.started_at = None;
        task.completed_at = None;
        task.worker_id = None;
        task.deadline = over(task.deadline);
    }
    if packed.is_some() && edit.is_some_and(Edit::changes_payload) {
        // It said how the old payload is encoded.
        message.content_encoding = None;
    }
    let mut message = match edit {
        Some(edit) => edit.apply(message)?,
        None => message,
    };
    if let Some(algorithm) = packed
        && !edit.is_some_and(Edit::changes_payload)
        && message.content_encoding.as_ref() == Some(&algorithm)
    {
        message.headers.insert(COMPRESSED.to_owned(), algorithm);
    }
    message.id = if letter.nameless {
        // Two letters may look the same and be two; better twice than never.
        MessageId::generate()
    } else {
        MessageId::new(letter.original_message.id.as_str())?
    };
    let topic = message.topic.take().ok_or_else(|| {
        Error::rejected(
            ErrorCode::MessageInvalid,
            "nobody has noted where this letter came from; edit it and name the topic",
        )
        .with_id(letter.original_message.id.as_str())
    })?;
    let marks = Marks {
        replay: letter.replay.clone().map(Box::new),
        reprocess: letter.reprocessed.saturating_add(1),
        ..Marks::default()
    };
    Ok((Topic::new(topic)?, message, marks))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{super::letter::tests::received, *};
    use crate::message::wire::Replayed;

    const MOST: usize = 1 << 20;

    fn letter() -> DeadLetter {
        DeadLetter::of(&received("m1", "handler_error", 9), None, &|_| true)
    }

    #[test]
    fn a_copy_begins_anew_and_every_copy_of_a_letter_is_the_same_one() {
        let mut letter = letter();
        letter.original_message.retry_count = 4;
        letter.original_message.error = Some("boom".into());
        letter.original_message.expiration = Some(Timestamp::from_millis(5));
        let now = Timestamp::from_millis(10);
        let (topic, one, marks) = of(&letter, None, now, MOST).unwrap();
        assert_eq!(topic.as_str(), "tasks.x");
        assert_eq!((one.id.as_str(), one.retry_count), ("m1", 0));
        assert!(one.error.is_none() && one.expiration.is_none());
        assert!(!one.id.is_generated(), "a repeat must be recognised");
        assert_eq!(marks.reprocess, 2, "it was a copy before");
        let (_, two, again) = of(&letter, None, now, MOST).unwrap();
        assert_eq!((one.id, marks), (two.id, again));
    }

    #[test]
    fn a_letter_from_nowhere_needs_a_topic() {
        let mut letter = letter();
        letter.original_topic = None;
        let error = of(&letter, None, Timestamp::now(), MOST).unwrap_err();
        assert!(error.message().contains("name the topic"), "{error}");
        let edit = Edit::patch(serde_json::json!({"topic": "tasks.y"})).unwrap();
        let (topic, _, _) = of(&letter, Some(&edit), Timestamp::now(), MOST).unwrap();
        assert_eq!(topic.as_str(), "tasks.y");
    }

    #[test]
    fn copies_of_a_nameless_letter_have_names_of_their_own() {
        let mut letter = letter();
        letter.nameless = true;
        let id = || of(&letter, None, Timestamp::now(), MOST).unwrap().1.id;
        assert_ne!(id(), id());
    }

    #[test]
    fn a_copy_of_a_replay_still_says_so() {
        let mut received = received("m1", "handler_error", 9);
        let replay = Some(Box::new(Replayed {
            of: "first".into(),
            by: "again".into(),
        }));
        Arc::make_mut(&mut received.marks).replay = replay.clone();
        let letter = DeadLetter::of(&received, None, &|_| true);
        let (_, _, marks) = of(&letter, None, Timestamp::now(), MOST).unwrap();
        assert_eq!((marks.replay, marks.reprocess), (replay, 2));
    }

    #[cfg(feature = "compression")]
    #[test]
    fn what_a_hub_had_compressed_is_published_whole_or_else_as_it_stands() {
        let zstd = crate::broker::Compression::Zstd;
        let payload = bytes::Bytes::from(vec![7; 100_000]);
        let mut letter = letter();
        let small = compression::smaller(&payload, zstd).unwrap();
        compression::mark(&mut letter.original_message, zstd, small.clone());
        let copy = |edit: Option<&Edit>, most| of(&letter, edit, Timestamp::now(), most).unwrap().1;

        let whole = copy(None, MOST);
        assert_eq!((&whole.payload, whole.content_encoding), (&payload, None));
        assert!(!whole.headers.contains_key(COMPRESSED));

        let raw = copy(None, 1_000);
        assert_eq!(raw.payload, small);
        assert!(compression::is_marked(&raw), "its readers still know how");

        let other = Edit::patch(serde_json::json!({"payload": "bmV3"})).unwrap();
        let new = copy(Some(&other), 1_000);
        assert_eq!(
            (&new.payload[..], new.content_encoding),
            (&b"new"[..], None)
        );
        assert!(!new.headers.contains_key(COMPRESSED));

        let aside = Edit::patch(serde_json::json!({"headers": {"b": "2"}})).unwrap();
        assert!(compression::is_marked(&copy(Some(&aside), 1_000)));
    }
}
