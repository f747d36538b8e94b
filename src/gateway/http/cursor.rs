//! The opaque position of a stream: for every partition the next offset. Text
//! form: base64url of JSON. No I/O.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use crate::message::Timestamp;

/// By topic and partition, the offset of the next message.
pub(super) type Positions = BTreeMap<(String, i32), i64>;

/// Where a stream stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Where it stands in each partition.
    pub(super) positions: Positions,
    /// Partitions that are not in `positions` begin at this time.
    pub(super) since: Option<Timestamp>,
    /// The stream that gave it out, and how many messages it had given by then:
    /// how a live stream recognises what a commit means.
    pub(super) stream: String,
    pub(super) given: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    /// `topic/partition` -> next offset. Topics have no slash.
    p: BTreeMap<String, i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    t: Option<i64>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    s: String,
    #[serde(default)]
    n: u64,
}

impl Cursor {
    /// The text form.
    pub(super) fn encode(&self) -> String {
        let json = Json {
            p: self
                .positions
                .iter()
                .map(|((topic, partition), next)| (format!("{topic}/{partition}"), *next))
                .collect(),
            t: self.since.map(Timestamp::as_millis),
            s: self.stream.clone(),
            n: self.given,
        };
        // Maps with text keys and numbers always have a JSON form.
        BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(&json).unwrap_or_default())
    }

    /// Reads the text form.
    pub(super) fn decode(text: &str) -> Result<Self, Problem> {
        let wrong =
            || Problem::parameter(format!("{text:?} is not a cursor that this hub gave out"));
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(text.trim_end_matches('='))
            .map_err(|_| wrong())?;
        let json: Json = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
        let mut positions = Positions::new();
        for (name, next) in json.p {
            let (topic, partition) = name.rsplit_once('/').ok_or_else(wrong)?;
            let partition: i32 = partition.parse().map_err(|_| wrong())?;
            if partition < 0 || next < 0 {
                return Err(wrong());
            }
            positions.insert((topic.to_owned(), partition), next);
        }
        Ok(Self {
            positions,
            since: json.t.map(Timestamp::from_millis),
            stream: json.s,
            given: json.n,
        })
    }

    /// Moves past a message.
    pub(super) fn pass(&mut self, topic: &str, partition: i32, offset: i64) {
        let next = offset.saturating_add(1);
        // Looked up by a borrowed key would need another map type; topics are
        // short and one message costs far more than one allocation.
        let at = self
            .positions
            .entry((topic.to_owned(), partition))
            .or_insert(next);
        *at = next.max(*at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text_form() {
        let mut cursor = Cursor {
            since: Some(Timestamp::from_millis(5)),
            stream: "s1".into(),
            given: 3,
            ..Cursor::default()
        };
        cursor.pass("a.b-c_d", 0, 41);
        cursor.pass("a.b-c_d", 2, 7);
        cursor.pass("a.b-c_d", 0, 12);
        assert_eq!(cursor.positions[&("a.b-c_d".to_owned(), 0)], 42);
        assert_eq!(Cursor::decode(&cursor.encode()).unwrap(), cursor);
    }

    #[test]
    fn what_is_no_cursor_is_refused() {
        for text in [
            "",
            "!",
            "e30",
            "eyJwIjp7ImEiOjF9fQ",
            "eyJwIjp7ImEvLTEiOjF9fQ",
        ] {
            assert_eq!(Cursor::decode(text).unwrap_err().status(), 400, "{text}");
        }
    }
}
