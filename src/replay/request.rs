//! What is asked for, and whether it can be done. Nothing here is ignored: what
//! makes no sense is refused with a reason.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::filter::Filter;
use crate::{
    error::{Error, ErrorCode, Result},
    message::{MessageId, Timestamp},
    topic::{Pattern, Topic},
};

/// What to publish again, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayRequest {
    /// 1 to 64 letters, digits, `.`, `_`, `-`. Default: a new UUIDv7. The ids of
    /// what is published follow from it: the same replay under the same id makes
    /// the same ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The topic to read. Either this or `pattern`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// The topics to read, as they are at the start: `*` one word, `**` (or `#`)
    /// any number. Of these `target_topic` is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// From messages of this time on. Default: the oldest that is still there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_time: Option<Timestamp>,
    /// Up to messages before this time. Default: everything that is there when
    /// the replay starts; what comes later is never replayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_time: Option<Timestamp>,
    /// Where to publish. Default: each message to the topic it was read from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_topic: Option<String>,
    /// Which messages. Default: all.
    pub filter: ReplayFilter,
    /// How.
    pub options: ReplayOptions,
}

/// Which messages are replayed. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayFilter {
    /// One of these types, exact or with wildcards (`llm.request.*`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<String>,
    /// All these headers, with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// All of this task metadata, with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// How a replay is carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayOptions {
    /// Messages published together. 1 to 1,000, default 100.
    pub batch_size: usize,
    /// The pause between two batches, such as `250ms`. Default none, at most an
    /// hour. A dry run makes none.
    #[serde(with = "crate::duration")]
    pub delay_between: Duration,
    /// Count what would be replayed, and publish nothing. Default false.
    pub dry_run: bool,
    /// Default true: what was read from one partition, and so what has one key, is
    /// published in its order, and a publish that fails ends the replay, so that
    /// nothing passes it but what was under way beside it. With false several
    /// batches are under way at once, and a failure is counted and passed.
    pub preserve_order: bool,
    /// Skip a message whose id this replay has read before, replays of it
    /// included. It remembers the last million ids. Default false.
    pub skip_duplicates: bool,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self {
            batch_size: 100,
            delay_between: Duration::ZERO,
            dry_run: false,
            preserve_order: true,
            skip_duplicates: false,
        }
    }
}

/// A request that was checked.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) id: String,
    pub(crate) topics: Pattern,
    pub(crate) target: Option<Topic>,
    pub(super) from: Option<Timestamp>,
    pub(super) to: Option<Timestamp>,
    pub(super) filter: Filter,
    pub(super) options: ReplayOptions,
}

impl Wanted {
    /// Checks a request. `full` gives a topic's full name.
    ///
    /// # Errors
    /// `INVALID_CONFIG` that names the field.
    pub(crate) fn check(
        request: &ReplayRequest,
        full: impl Fn(&str) -> Result<Topic>,
    ) -> Result<Self> {
        let id = match &request.id {
            Some(id) => check_id(id)?.to_owned(),
            None => MessageId::generate().as_str().to_owned(),
        };
        let topics = match (&request.topic, &request.pattern) {
            (Some(topic), None) if topic.contains(['*', '#']) => {
                return wrong(format!(
                    "topic {topic:?} has a wildcard; give it as pattern"
                ));
            }
            (Some(topic), None) => Pattern::from(&full(topic)?),
            // An alias is a name too, and a pattern without wildcards may be one.
            (None, Some(pattern)) => match Pattern::new(pattern)?.literal() {
                Some(topic) => Pattern::from(&full(&topic)?),
                None => Pattern::new(pattern)?,
            },
            (None, None) => {
                return wrong("neither topic nor pattern says what to read; give one".to_owned());
            }
            (Some(_), Some(_)) => {
                return wrong("topic and pattern are both given; leave one out".to_owned());
            }
        };
        if let (Some(from), Some(to)) = (request.from_time, request.to_time)
            && from >= to
        {
            return wrong(format!(
                "from_time {from} is not before to_time {to}, so nothing lies between"
            ));
        }
        let options = &request.options;
        if !(1..=MAX_BATCH).contains(&options.batch_size) {
            return wrong(format!(
                "options.batch_size is {}; it can be 1 to {MAX_BATCH}",
                options.batch_size
            ));
        }
        if options.delay_between > MAX_DELAY {
            return wrong("options.delay_between is more than an hour".to_owned());
        }
        Ok(Self {
            id,
            topics,
            target: request.target_topic.as_deref().map(full).transpose()?,
            from: request.from_time,
            to: request.to_time,
            filter: Filter::new(&request.filter)?,
            options: options.clone(),
        })
    }
}

/// An id that can stand in a path.
fn check_id(id: &str) -> Result<&str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(fits) {
        return wrong(format!(
            "id {id:?}: use 1 to {MAX_ID} letters, digits, '.', '_' and '-'"
        ));
    }
    Ok(id)
}

pub(super) fn wrong<T>(why: String) -> Result<T> {
    Err(Error::rejected(ErrorCode::InvalidConfig, why))
}

/// Messages of a batch at most: what waits for outcomes, and what a cancel waits
/// for, stays small.
pub const MAX_BATCH: usize = 1_000;

/// Characters of a replay's id at most.
const MAX_ID: usize = 64;

/// A longer pause is a schedule, which replay is not.
const MAX_DELAY: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<Wanted> {
        let request: ReplayRequest = serde_json::from_str(json).unwrap();
        Wanted::check(&request, |name| Topic::new(name))
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name() {
        for (json, names) in [
            (r#"{}"#, "neither topic nor pattern"),
            (r#"{"topic":"a","pattern":"b"}"#, "both given"),
            (r#"{"topic":"a.*"}"#, "give it as pattern"),
            (r#"{"topic":"a","id":"a/b"}"#, "id \"a/b\""),
            (r#"{"topic":"a","id":""}"#, "id \"\""),
            (r#"{"topic":"a","from_time":2,"to_time":2}"#, "from_time"),
            (
                r#"{"topic":"a","options":{"batch_size":0}}"#,
                "options.batch_size",
            ),
            (
                r#"{"topic":"a","options":{"batch_size":1001}}"#,
                "options.batch_size",
            ),
            (
                r#"{"topic":"a","options":{"delay_between":"2h"}}"#,
                "options.delay_between",
            ),
            (r#"{"topic":"a","filter":{"types":[""]}}"#, "filter.types"),
            (
                r#"{"topic":"a","filter":{"types":["a.b*"]}}"#,
                "filter.types",
            ),
            (
                r#"{"topic":"a","filter":{"headers":{"":"x"}}}"#,
                "filter.headers",
            ),
        ] {
            let error = check(json).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidConfig, "{json}");
            assert!(error.message().contains(names), "{json}: {error}");
        }
        assert!(serde_json::from_str::<ReplayRequest>(r#"{"topics":"a"}"#).is_err());
    }

    #[test]
    fn defaults_hold_where_nothing_is_said() {
        let wanted = check(r#"{"topic":"a.b"}"#).unwrap();
        assert_eq!(wanted.topics.as_str(), "a.b");
        assert_eq!(wanted.options, ReplayOptions::default());
        assert!(wanted.options.preserve_order && wanted.options.batch_size == 100);
        assert_ne!(wanted.id, check(r#"{"topic":"a.b"}"#).unwrap().id);
        let wanted = check(r#"{"pattern":"a.**","id":"x-1"}"#).unwrap();
        assert_eq!((wanted.topics.as_str(), wanted.id.as_str()), ("a.#", "x-1"));
    }
}
