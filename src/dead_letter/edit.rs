//! Changing a dead letter's message before it is published again: a JSON merge
//! patch (RFC 7396) over the message's JSON, or new content in its place. Pure.
//! It refuses to change what the message is known by (its id) and what the hub
//! keeps of it (state, attempts, times).

use serde_json::{Map, Value};

use crate::{
    error::{Error, ErrorCode, Result},
    message::Message,
};

/// How a message is changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    fields: Map<String, Value>,
    /// Fields that are not named are emptied, but for the topic.
    replace: bool,
}

impl Edit {
    /// A merge patch: named fields change, `null` removes, headers are merged.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` when it is no object, or names a field that cannot be
    /// edited.
    pub fn patch(patch: Value) -> Result<Self> {
        Self::of(patch, false)
    }

    /// New content: what is not named is as in a fresh message.
    ///
    /// # Errors
    /// As [`Edit::patch`].
    pub fn replacement(message: Value) -> Result<Self> {
        Self::of(message, true)
    }

    fn of(value: Value, replace: bool) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(invalid(
                "an edit is a JSON object of message fields".to_owned(),
            ));
        };
        if let Some(name) = fields.keys().find(|n| !EDITABLE.contains(&n.as_str())) {
            return Err(invalid(format!(
                "{name:?} cannot be edited; what can is {}",
                EDITABLE.join(", ")
            )));
        }
        // Header names are lower-case everywhere, or a patch would miss its own.
        if let Some(Value::Object(headers)) = fields.get_mut("headers") {
            *headers = std::mem::take(headers)
                .into_iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value))
                .collect();
        }
        Ok(Self { fields, replace })
    }

    /// Whether the payload is another one afterwards.
    pub(super) fn changes_payload(&self) -> bool {
        self.replace || self.fields.contains_key("payload")
    }

    /// The message, changed.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` when the result is no message.
    pub(super) fn apply(&self, message: Message) -> Result<Message> {
        let json = serde_json::to_value(&message)
            .map_err(|e| invalid(format!("the letter's message has no JSON form: {e}")))?;
        let Value::Object(mut json) = json else {
            return Err(invalid("the letter's message has no JSON form".to_owned()));
        };
        if self.replace {
            json.retain(|name, _| name == "topic" || !EDITABLE.contains(&name.as_str()));
        }
        let mut json = Value::Object(json);
        merge(&mut json, &Value::Object(self.fields.clone()));
        serde_json::from_value(json)
            .map_err(|e| invalid(format!("the edited letter is not a message: {e}")))
    }
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                merge(target.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

fn invalid(why: String) -> Error {
    Error::rejected(ErrorCode::MessageInvalid, why)
}

/// What can be edited.
const EDITABLE: &[&str] = &[
    "content_encoding",
    "content_type",
    "correlation_id",
    "expiration",
    "headers",
    "key",
    "max_retries",
    "partition",
    "payload",
    "priority",
    "reply_to",
    "topic",
    "type",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message() -> Message {
        let mut message = Message::new("order", "old")
            .with_header("a", "1")
            .with_header("b", "2")
            .with_key("k");
        message.topic = Some("tasks.x".to_owned());
        message
    }

    #[test]
    fn a_patch_changes_what_it_names_and_nothing_else() {
        let edit = Edit::patch(json!({
            "payload": "bmV3", "headers": {"A": null, "C": "3"}, "priority": "high"
        }))
        .unwrap();
        let before = message();
        let after = edit.apply(before.clone()).unwrap();
        assert_eq!(&after.payload[..], b"new");
        let headers: Vec<_> = after.headers.iter().collect();
        assert_eq!(headers.len(), 2);
        assert_eq!((&*after.headers["b"], &*after.headers["c"]), ("2", "3"));
        assert_eq!(after.priority.value(), 8);
        assert_eq!(
            (after.id, after.key, after.kind),
            (before.id, before.key, before.kind)
        );
    }

    #[test]
    fn a_replacement_keeps_only_id_and_topic() {
        let edit = Edit::replacement(json!({"payload": "bmV3"})).unwrap();
        let before = message();
        let after = edit.apply(before.clone()).unwrap();
        assert_eq!(after.id, before.id);
        assert_eq!(after.topic.as_deref(), Some("tasks.x"));
        assert!(after.headers.is_empty() && after.key.is_none() && after.kind.is_empty());
    }

    #[test]
    fn what_a_message_is_known_by_stays() {
        for wrong in [
            json!({"id": "x"}),
            json!({"retry_count": 1}),
            json!([1]),
            json!({"paylod": ""}),
        ] {
            let error = Edit::patch(wrong).unwrap_err();
            assert_eq!(error.code(), ErrorCode::MessageInvalid);
        }
        let bad = Edit::patch(json!({"priority": 11})).unwrap();
        assert!(bad.apply(message()).is_err());
    }
}
