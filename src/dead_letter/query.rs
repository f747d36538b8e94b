//! Which letters are meant, and a page of them. Pure.

use serde::Serialize;

use super::{DeadLetter, LetterStatus};
use crate::{broker::BrokerType, topic::Pattern};

/// Which letters are meant; what is not said means all.
#[derive(Clone, Debug, Default)]
pub struct LetterQuery {
    /// Those that stand there.
    pub status: Option<LetterStatus>,
    /// Those of topics that the pattern covers.
    pub topic: Option<Pattern>,
    /// Those with exactly this reason.
    pub reason: Option<String>,
    /// Those that this broker has.
    pub broker: Option<BrokerType>,
    /// Those of this message type.
    pub kind: Option<String>,
}

impl LetterQuery {
    /// Whether it means a letter.
    #[must_use]
    pub fn covers(&self, letter: &DeadLetter) -> bool {
        self.status.is_none_or(|s| s == letter.status)
            && self
                .reason
                .as_ref()
                .is_none_or(|r| *r == letter.failure_reason)
            && self.broker.is_none_or(|b| b == letter.broker)
            && self
                .kind
                .as_ref()
                .is_none_or(|k| *k == letter.original_message.kind)
            && self.topic.as_ref().is_none_or(|pattern| {
                letter
                    .original_topic
                    .as_deref()
                    .is_some_and(|t| pattern.matches(t))
            })
    }

    /// Whether it can mean open letters.
    pub(super) fn wants_open(&self) -> bool {
        self.status.is_none_or(|s| !s.is_decided())
    }

    /// Whether it can mean decided letters.
    pub(super) fn wants_decided(&self) -> bool {
        self.status.is_none_or(LetterStatus::is_decided)
    }
}

/// A place whose letters could not be seen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Away {
    /// Which broker.
    pub broker: BrokerType,
    /// The queue or topic.
    pub place: String,
    /// Why.
    pub reason: String,
}

/// A page of letters.
#[derive(Clone, Debug, Default)]
pub struct LetterPage {
    /// Oldest failure first.
    pub letters: Vec<DeadLetter>,
    /// How many letters the query means, as far as they were seen.
    pub total: usize,
    /// Whether every letter was seen: false when a place has more than the hub
    /// holds at a time, or could not be seen.
    pub complete: bool,
    /// Places that could not be seen.
    pub away: Vec<Away>,
}

/// A page of what was found in all places.
pub(super) fn page(
    mut found: Vec<DeadLetter>,
    complete: bool,
    away: Vec<Away>,
    offset: usize,
    limit: usize,
) -> LetterPage {
    found.sort_by(|a, b| (a.last_failure, &a.id).cmp(&(b.last_failure, &b.id)));
    let total = found.len();
    LetterPage {
        letters: found.into_iter().skip(offset).take(limit).collect(),
        total,
        complete: complete && away.is_empty(),
        away,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::letter::tests::received, *};

    fn letter(id: &str, last: i64) -> DeadLetter {
        DeadLetter::of(&received(id, "handler_error", last), None, &|_| true)
    }

    #[test]
    fn a_query_means_what_it_says() {
        let one = letter("a", 1);
        let all = LetterQuery::default();
        assert!(all.covers(&one) && all.wants_open() && all.wants_decided());
        let by = |query: LetterQuery| query.covers(&one);
        assert!(by(LetterQuery {
            topic: Some(Pattern::new("tasks.*").unwrap()),
            ..LetterQuery::default()
        }));
        assert!(!by(LetterQuery {
            topic: Some(Pattern::new("events.#").unwrap()),
            ..LetterQuery::default()
        }));
        assert!(!by(LetterQuery {
            reason: Some("expired".into()),
            ..LetterQuery::default()
        }));
        assert!(!by(LetterQuery {
            broker: Some(BrokerType::Kafka),
            ..LetterQuery::default()
        }));
        assert!(!by(LetterQuery {
            kind: Some("other".into()),
            ..LetterQuery::default()
        }));
        let open = LetterQuery {
            status: Some(LetterStatus::Pending),
            ..LetterQuery::default()
        };
        assert!(open.covers(&one) && !open.wants_decided());
    }

    #[test]
    fn pages_follow_each_other_oldest_first() {
        let found = || vec![letter("c", 3), letter("a", 1), letter("b", 2)];
        let ids = |offset, limit| {
            let page = page(found(), true, Vec::new(), offset, limit);
            assert_eq!(page.total, 3);
            page.letters
                .iter()
                .map(|l| l.original_message.id.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(0, 2), ["a", "b"]);
        assert_eq!(ids(2, 2), ["c"]);
        assert!(ids(9, 2).is_empty());
    }
}
