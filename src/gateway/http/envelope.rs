//! The message JSON on its way in: one object, an array, one line. No I/O.

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::problem::Problem;
use crate::{error::Error, message::Message};

/// Reads one envelope for `topic`.
///
/// A message that was read from the hub, or exported from its spool, can be
/// published as it stands: what is set for readers only (`redelivered`, `offset` and
/// the `partition` beside it), and what the spool had noted (`spool`), is taken off. A `topic` in it
/// must be the one that is published to, by whichever of its names; the hub
/// knows them and checks that.
pub(super) fn parse(json: &[u8], topic: &str) -> Result<Message, Problem> {
    let mut message: Message = object(json)
        .or_else(|e| rearranged(json).unwrap_or(Err(e)))
        .map_err(|e| Problem::invalid(format!("the envelope is not a message: {e}")).on(topic))?;
    message.redelivered = false;
    if message.offset.take().is_some() {
        // Where it lay is no place in another topic, nor where its key belongs.
        message.partition = None;
    }
    lower_case_headers(message).map_err(|e| Problem::from(e).on(topic))
}

/// What only tasks have. Who writes a task by hand writes it beside the rest.
const TASK_FIELDS: [&str; 7] = [
    "deadline",
    "scheduled_at",
    "started_at",
    "completed_at",
    "worker_id",
    "parent_task_id",
    "metadata",
];

/// A message that was exported, without the notes of the spool, or a task with its
/// own fields beside the others; none when it is neither.
fn rearranged(json: &[u8]) -> Option<Result<Message, serde_json::Error>> {
    let mut fields: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(json).ok()?;
    let mut changed = fields.remove("spool").is_some();
    for name in TASK_FIELDS {
        let Some(value) = fields.remove(name) else {
            continue;
        };
        changed = true;
        let task = fields
            .entry("task")
            .or_insert_with(|| serde_json::Value::Object(serde_json::Map::new()));
        let twice = task.as_object_mut()?.insert(name.to_owned(), value);
        if twice.is_some() {
            return Some(Err(serde::de::Error::custom(format!(
                "{name} stands in it and in its task; say it once"
            ))));
        }
    }
    changed.then(|| serde_json::from_value(fields.into()))
}

/// Reads an object. An array is none: its elements would be taken for the fields, by
/// their places, and an empty one for an object without any.
pub(super) fn object<T: DeserializeOwned>(json: &[u8]) -> Result<T, serde_json::Error> {
    if is_array(json) {
        return Err(serde::de::Error::custom(
            "it is an array, and an object is expected",
        ));
    }
    serde_json::from_slice(json)
}

/// Splits an array into its elements, unparsed, so that one bad element costs
/// only itself.
pub(super) fn elements(json: &[u8]) -> Result<Vec<&RawValue>, Problem> {
    serde_json::from_slice(json)
        .map_err(|e| Problem::invalid(format!("the body is not a JSON array: {e}")))
}

/// Whether the body is an array, by its first character.
pub(super) fn is_array(json: &[u8]) -> bool {
    json.iter()
        .find(|b| !b.is_ascii_whitespace())
        .is_some_and(|b| *b == b'[')
}

/// Header names are lower-case everywhere, so that every broker and reader
/// sees the same one.
fn lower_case_headers(mut message: Message) -> Result<Message, Error> {
    if message
        .headers
        .keys()
        .any(|n| n.bytes().any(|b| b.is_ascii_uppercase()))
    {
        let headers = std::mem::take(&mut message.headers);
        for (name, value) in headers {
            let lower = name.to_ascii_lowercase();
            if message.headers.insert(lower, value).is_some() {
                return Err(Error::rejected(
                    crate::ErrorCode::MessageInvalid,
                    format!("header {name:?} comes twice once names are lower-cased"),
                )
                .with_id(message.id.as_str()));
            }
        }
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_is_read_with_lower_case_headers_and_its_own_id() {
        let m = parse(
            br#"{"id":"a-1","type":"t","payload":"aGk=","headers":{"X-A":"1"},"key":"k","priority":"high"}"#,
            "orders",
        )
        .unwrap();
        assert_eq!(m.id.as_str(), "a-1");
        assert!(!m.id.is_generated());
        assert_eq!(&m.payload[..], b"hi");
        assert_eq!(m.headers["x-a"], "1");
        assert_eq!(m.priority.value(), 8);
    }

    #[test]
    fn what_only_readers_get_is_taken_off() {
        let m = parse(br#"{"topic":"t","redelivered":true,"offset":9}"#, "t").unwrap();
        assert!(!m.redelivered && m.offset.is_none());
    }

    #[test]
    fn the_notes_of_an_export_are_taken_off_and_other_mistakes_still_named() {
        let m = parse(
            br#"{"id":"e1","payload":"aGk=","key":{"base64":"/w=="},"spool":{"seq":7}}"#,
            "t",
        )
        .unwrap();
        assert_eq!((m.id.as_str(), &m.payload[..]), ("e1", &b"hi"[..]));
        let wrong = parse(br#"{"paylod":"","spool":{}}"#, "t").unwrap_err();
        assert!(wrong.to_string().contains("paylod"), "{wrong}");
    }

    #[test]
    fn a_task_may_have_its_fields_beside_the_others() {
        let at = "2100-01-01T00:00:00Z";
        let m = parse(
            br#"{"type":"t","scheduled_at":"2100-01-01T00:00:00Z","metadata":{"a":"b"},"task":{"worker_id":"w"}}"#,
            "t",
        )
        .unwrap();
        let task = m.task.unwrap();
        assert_eq!(task.scheduled_at, Some(at.parse().unwrap()));
        assert_eq!(
            (task.metadata["a"].as_str(), task.worker_id.as_deref()),
            ("b", Some("w"))
        );
        let wrong = parse(
            br#"{"deadline":"2100-01-01T00:00:00Z","task":{"deadline":"2100-01-01T00:00:00Z"}}"#,
            "t",
        )
        .unwrap_err();
        assert!(wrong.to_string().contains("say it once"), "{wrong}");
    }

    #[test]
    fn mistakes_are_named() {
        for (json, word) in [
            (&br#"{"paylod":""}"#[..], "paylod"),
            (br#"{"payload":"%"}"#, "base64"),
            (br#"{"id":""}"#, "id"),
            (br#"{"priority":11}"#, "11"),
            (br#"{"headers":{"A":"1","a":"2"}}"#, "twice"),
            (br#"[1]"#, "message"),
            (b"[]", "an object is expected"),
            (br#" ["x", "t", "aGk="]"#, "an object is expected"),
            (b"", "message"),
        ] {
            let problem = parse(json, "t").unwrap_err();
            assert_eq!(problem.status(), 400);
            assert!(problem.to_string().contains(word), "{problem}");
        }
    }

    #[test]
    fn an_array_is_told_from_an_object() {
        assert!(is_array(b" \n[{}]"));
        assert!(!is_array(b"{}"));
        assert_eq!(elements(b"[1,{\"a\":[]}]").unwrap().len(), 2);
        assert!(elements(b"[1").is_err());
    }
}
