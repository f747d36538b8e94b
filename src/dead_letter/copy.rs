//! The copy of a dead letter that is published again. Pure.
//!
//! All copies of one letter are one to whoever handles them: they carry the
//! letter's message id and, as `hub-reprocess`, how often the message has been
//! reprocessed with this letter counted. A group knows what it handled by both,
//! so a copy is handled although the id was handled before, and a second copy of
//! the same letter is not. A copy that dies in its turn is another letter, whose
//! copies carry the next number.

use super::{DeadLetter, Edit};
use crate::{
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageId, MessageState, Timestamp,
        wire::{Marks, is_reserved},
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
) -> Result<(Topic, Message, Marks)> {
    let mut message = letter.original_message.clone();
    message.topic.clone_from(&letter.original_topic);
    // What only brokers and the hub write is not the user's to send again.
    message.headers.retain(|name, _| !is_reserved(name));
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
    let mut message = match edit {
        Some(edit) => edit.apply(message)?,
        None => message,
    };
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
        reprocess: letter.reprocessed.saturating_add(1),
        ..Marks::default()
    };
    Ok((Topic::new(topic)?, message, marks))
}

#[cfg(test)]
mod tests {
    use super::{super::letter::tests::received, *};

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
        let (topic, one, marks) = of(&letter, None, now).unwrap();
        assert_eq!(topic.as_str(), "tasks.x");
        assert_eq!((one.id.as_str(), one.retry_count), ("m1", 0));
        assert!(one.error.is_none() && one.expiration.is_none());
        assert!(!one.id.is_generated(), "a repeat must be recognised");
        assert_eq!(marks.reprocess, 2, "it was a copy before");
        let (_, two, again) = of(&letter, None, now).unwrap();
        assert_eq!((one.id, marks), (two.id, again));
    }

    #[test]
    fn a_letter_from_nowhere_needs_a_topic() {
        let mut letter = letter();
        letter.original_topic = None;
        let error = of(&letter, None, Timestamp::now()).unwrap_err();
        assert!(error.message().contains("name the topic"), "{error}");
        let edit = Edit::patch(serde_json::json!({"topic": "tasks.y"})).unwrap();
        let (topic, _, _) = of(&letter, Some(&edit), Timestamp::now()).unwrap();
        assert_eq!(topic.as_str(), "tasks.y");
    }

    #[test]
    fn copies_of_a_nameless_letter_have_names_of_their_own() {
        let mut letter = letter();
        letter.nameless = true;
        let id = || of(&letter, None, Timestamp::now()).unwrap().1.id;
        assert_ne!(id(), id());
    }
}
