//! Which messages a replay takes. Pure.

use super::request::{ReplayFilter, wrong};
use crate::{error::Result, message::Message, topic::Pattern};

/// A filter that was checked.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    types: Vec<Kind>,
    headers: Vec<(String, String)>,
    metadata: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Types need not be topic names, so they are compared as they stand.
    Exact(String),
    Pattern(Pattern),
}

impl Filter {
    pub(super) fn new(filter: &ReplayFilter) -> Result<Self> {
        for (field, n) in [
            ("types", filter.types.len()),
            ("headers", filter.headers.len()),
            ("metadata", filter.metadata.len()),
        ] {
            if n > MAX_TERMS {
                return wrong(format!(
                    "filter.{field} has {n} entries; at most {MAX_TERMS} are compared"
                ));
            }
        }
        if filter.headers.keys().any(String::is_empty) {
            return wrong("filter.headers has an entry without a name".to_owned());
        }
        Ok(Self {
            types: filter
                .types
                .iter()
                .map(|t| kind(t))
                .collect::<Result<_>>()?,
            headers: pairs(&filter.headers),
            metadata: pairs(&filter.metadata),
        })
    }

    pub(super) fn passes(&self, message: &Message) -> bool {
        let kind = |k: &Kind| match k {
            Kind::Exact(text) => *text == message.kind,
            Kind::Pattern(pattern) => pattern.matches(&message.kind),
        };
        let header = |(name, value): &(String, String)| {
            // Foreign producers write names as they like.
            let mut found = message
                .headers
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name));
            found.any(|(_, v)| v == value)
        };
        let metadata = |(name, value): &(String, String)| {
            let task = message.task.as_ref();
            task.and_then(|t| t.metadata.get(name)) == Some(value)
        };
        (self.types.is_empty() || self.types.iter().any(kind))
            && self.headers.iter().all(header)
            && self.metadata.iter().all(metadata)
    }
}

fn kind(text: &str) -> Result<Kind> {
    if text.is_empty() {
        return wrong("filter.types has an empty entry; leave types out for all".to_owned());
    }
    if !text.contains(['*', '#']) {
        return Ok(Kind::Exact(text.to_owned()));
    }
    match Pattern::new(text) {
        Ok(pattern) => Ok(Kind::Pattern(pattern)),
        Err(e) => wrong(format!("filter.types: {}", e.message())),
    }
}

fn pairs(map: &std::collections::BTreeMap<String, String>) -> Vec<(String, String)> {
    map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Terms of each kind; every message is compared with all.
const MAX_TERMS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Task;

    fn filter(json: &str) -> Filter {
        Filter::new(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn types_are_exact_or_patterns_and_one_of_them_is_enough() {
        let of = |kind: &str| Message::new(kind, "");
        let f = filter(r#"{"types":["a b","llm.request.*","audit.**"]}"#);
        for (kind, passes) in [
            ("a b", true),
            ("llm.request.started", true),
            ("llm.request", false),
            ("audit", true),
            ("audit.log.x", true),
            ("", false),
        ] {
            assert_eq!(f.passes(&of(kind)), passes, "{kind}");
        }
        assert!(filter("{}").passes(&of("anything")));
    }

    #[test]
    fn every_header_and_all_metadata_must_be_equal() {
        let f = filter(r#"{"headers":{"Tenant":"7","x":"y"},"metadata":{"m":"1"}}"#);
        let mut task = Task::new("t", "");
        task.attributes.metadata.insert("m".into(), "1".into());
        let whole = Message::from(task)
            .with_header("tenant", "7")
            .with_header("x", "y");
        assert!(f.passes(&whole));
        let mut other = whole.clone();
        other.headers.insert("x".into(), "z".into());
        assert!(!f.passes(&other));
        other = whole.clone();
        other.headers.remove("tenant");
        assert!(!f.passes(&other));
        other = whole;
        other.task = None;
        assert!(!f.passes(&other));
    }
}
