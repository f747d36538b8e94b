//! Judges a recorded history: what was published with which outcome, what was
//! delivered to whom, what was left over. One pure function, [`check`]; it
//! knows no broker, asks no clock and records nothing itself.
//!
//! It does not decide how many duplicates are allowed: that bound depends on
//! what a test did (messages in doubt, unsettled deliveries), so the test
//! compares [`Verdict::duplicated`] with a bound that it computes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};

/// What the publisher was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The primary has it: it must arrive.
    Delivered,
    /// The fallback has it: it must arrive.
    Spooled,
    /// It was never written: it must not arrive.
    NotSent,
    /// A broker refused it: it must not arrive.
    Rejected,
    /// Nobody knows: it may arrive.
    Unknown,
}

impl Outcome {
    /// Whether the message was accepted, so that its loss is a violation.
    #[must_use]
    pub fn is_accepted(self) -> bool {
        matches!(self, Self::Delivered | Self::Spooled)
    }

    /// Whether the message was refused, so that its arrival is a violation.
    #[must_use]
    pub fn is_refused(self) -> bool {
        matches!(self, Self::NotSent | Self::Rejected)
    }
}

/// One publish, as its publisher saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Whose order counts (one handle, one request body).
    pub publisher: String,
    /// The topic it was published to.
    pub topic: String,
    /// What order is kept by; without a key the publisher is the key.
    pub key: Option<String>,
    /// Position among the publisher's messages, in publish order.
    pub seq: u64,
    /// The message's id.
    pub id: String,
    /// Any hash of the payload, the same one as in [`Delivered`].
    pub payload_hash: u64,
    /// What the publisher was told.
    pub outcome: Outcome,
}

/// One delivery, as a handler saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// The group; a subscription without one counts as its own.
    pub group: String,
    /// Which member of the group; order is judged for the group as a whole.
    pub consumer: String,
    /// The topic it came from.
    pub topic: String,
    /// The message's id.
    pub id: String,
    /// Hash of the payload that arrived.
    pub payload_hash: u64,
    /// The key that arrived.
    pub key: Option<String>,
    /// Position among all deliveries of the group, in order of arrival.
    pub index: u64,
    /// Marked by the broker or the hub as possibly seen before.
    pub redelivered: bool,
    /// Whether the handler settled it (acked or dead-lettered). Only what was
    /// settled once and came again is a duplicate.
    pub settled: bool,
}

/// What one run did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Every publish, whatever its outcome.
    pub published: Vec<Published>,
    /// Every delivery to every group.
    pub delivered: Vec<Delivered>,
    /// Groups that must see every accepted message of a topic, by topic. A
    /// topic that is not listed is judged by every group that got any of it;
    /// one that nobody got is lost.
    pub expected_groups: BTreeMap<String, BTreeSet<String>>,
    /// What is still somewhere at the end (spool, queue, unsettled), by place.
    pub left_over: BTreeMap<String, u64>,
}

/// A message that a group did not get, got wrongly, or got too often.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// The group that saw it, or missed it; empty when no group is concerned.
    pub group: String,
    /// The topic.
    pub topic: String,
    /// The message's id.
    pub id: String,
}

/// A message that was repeated within a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Duplicate {
    /// Which message, to which group.
    pub finding: Finding,
    /// How many deliveries came after it had been settled.
    pub extra: u64,
    /// How many of these were marked as possible duplicates.
    pub marked: u64,
}

/// A first delivery that came after one with a higher sequence number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Reordered {
    /// Which message, to which group.
    pub finding: Finding,
    /// The publisher whose order was broken.
    pub publisher: String,
    /// The key whose order was broken.
    pub key: Option<String>,
    /// The message's position.
    pub seq: u64,
    /// The position that had already arrived.
    pub after: u64,
}

/// What [`check`] found. Everything but `recovered` is empty in a good run;
/// `duplicated` is compared with a bound.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Publishes that were accepted.
    pub accepted: u64,
    /// Publishes whose outcome stayed unknown.
    pub unknown: u64,
    /// Accepted, but not delivered to a group that should have it.
    pub lost: Vec<Finding>,
    /// Delivered, though nobody published it or it was refused.
    pub unexpected: Vec<Finding>,
    /// Delivered with another payload or key.
    pub corrupted: Vec<Finding>,
    /// Delivered again after it had been settled.
    pub duplicated: Vec<Duplicate>,
    /// First deliveries out of publish order.
    pub reordered: Vec<Reordered>,
    /// The same id published twice with an accepted outcome and different
    /// payloads: then the history itself is not usable.
    pub ambiguous: Vec<Finding>,
    /// Unknown outcomes that arrived after all: (group, message).
    pub recovered: Vec<Finding>,
    /// What is still somewhere, places without anything left out.
    pub left_over: BTreeMap<String, u64>,
}

impl Verdict {
    /// Nothing lost, invented, changed, out of order or left over; duplicates
    /// are judged by [`extra_deliveries`](Self::extra_deliveries).
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.lost.is_empty()
            && self.unexpected.is_empty()
            && self.corrupted.is_empty()
            && self.reordered.is_empty()
            && self.ambiguous.is_empty()
            && self.left_over.is_empty()
    }

    /// Sound, and nothing was delivered twice.
    #[must_use]
    pub fn is_exactly_once(&self) -> bool {
        self.is_sound() && self.duplicated.is_empty()
    }

    /// Deliveries that came after their message had been settled, all groups.
    #[must_use]
    pub fn extra_deliveries(&self) -> u64 {
        self.duplicated.iter().map(|d| d.extra).sum()
    }

    /// The columns of the line that [`Display`](fmt::Display) prints.
    pub const TABLE_HEAD: &str = "| accepted | unknown | recovered | lost | unexpected | corrupted | \
                                  duplicated | reordered | left over |";
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.accepted,
            self.unknown,
            self.recovered.len(),
            self.lost.len(),
            self.unexpected.len(),
            self.corrupted.len(),
            self.extra_deliveries(),
            self.reordered.len(),
            self.left_over.values().sum::<u64>(),
        )
    }
}

/// Judges a history. The order of its lists does not matter; `seq` and
/// `index` do. Several publishes of one id (a retry) count as one message
/// whose strongest outcome holds, at the place of the first attempt that was
/// not refused.
#[must_use]
pub fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::default();
    let messages = merge_publishes(&history.published, &mut verdict);
    let mut deliveries: Vec<&Delivered> = history.delivered.iter().collect();
    deliveries.sort_by_key(|d| (&d.group, d.index));

    judge_deliveries(&deliveries, &messages, &mut verdict);
    judge_order(&deliveries, &messages, &mut verdict);
    judge_losses(history, &messages, &mut verdict);
    verdict.left_over = history
        .left_over
        .iter()
        .filter(|(_, n)| **n > 0)
        .map(|(p, n)| (p.clone(), *n))
        .collect();
    verdict
}

type MessageRef<'a> = (&'a str, &'a str);

struct Message<'a> {
    /// The attempt whose place in the order counts.
    first: &'a Published,
    /// The strongest outcome of all attempts.
    outcome: Outcome,
    /// More than one attempt may have arrived.
    repeated: bool,
}

impl Message<'_> {
    /// After an unknown outcome and a repeat both places are right, so that
    /// neither can be held against the message or its neighbours.
    fn has_one_place(&self) -> bool {
        !(self.repeated && self.first.outcome == Outcome::Unknown)
    }
}

fn merge_publishes<'a>(
    published: &'a [Published],
    verdict: &mut Verdict,
) -> BTreeMap<MessageRef<'a>, Message<'a>> {
    let mut messages: BTreeMap<MessageRef<'a>, Message<'a>> = BTreeMap::new();
    for entry in published {
        match messages.get_mut(&(entry.topic.as_str(), entry.id.as_str())) {
            None => {
                let message = Message {
                    first: entry,
                    outcome: entry.outcome,
                    repeated: false,
                };
                messages.insert((&entry.topic, &entry.id), message);
            }
            Some(known) => {
                if known.first.payload_hash != entry.payload_hash || known.first.key != entry.key {
                    verdict.ambiguous.push(finding("", &entry.topic, &entry.id));
                }
                if !entry.outcome.is_refused() && !known.first.outcome.is_refused() {
                    known.repeated = true;
                }
                // A refused attempt took no place in the order.
                let rank = |p: &Published| (p.outcome.is_refused(), p.seq);
                if rank(entry) < rank(known.first) {
                    known.first = entry;
                }
                if strength(entry.outcome) > strength(known.outcome) {
                    known.outcome = entry.outcome;
                }
            }
        }
    }
    let count = |wanted: fn(Outcome) -> bool| {
        messages.values().filter(|m| wanted(m.outcome)).count() as u64
    };
    verdict.accepted = count(Outcome::is_accepted);
    verdict.unknown = count(|outcome| outcome == Outcome::Unknown);
    messages
}

/// One accepted attempt makes the message accepted; one unknown attempt makes
/// its arrival possible.
fn strength(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::NotSent | Outcome::Rejected => 0,
        Outcome::Unknown => 1,
        Outcome::Spooled => 2,
        Outcome::Delivered => 3,
    }
}

fn judge_deliveries(
    deliveries: &[&Delivered],
    messages: &BTreeMap<MessageRef<'_>, Message<'_>>,
    verdict: &mut Verdict,
) {
    struct Seen {
        settled: bool,
        extra: u64,
        marked: u64,
    }
    let mut seen: BTreeMap<Finding, Seen> = BTreeMap::new();
    let mut corrupted = BTreeSet::new();
    let mut unexpected = BTreeSet::new();
    let mut recovered = BTreeSet::new();
    for delivery in deliveries {
        let found = finding(&delivery.group, &delivery.topic, &delivery.id);
        match messages.get(&(delivery.topic.as_str(), delivery.id.as_str())) {
            None => {
                unexpected.insert(found.clone());
            }
            Some(message) => {
                if message.outcome.is_refused() {
                    unexpected.insert(found.clone());
                } else if message.outcome == Outcome::Unknown {
                    recovered.insert(found.clone());
                }
                if message.first.payload_hash != delivery.payload_hash
                    || message.first.key != delivery.key
                {
                    corrupted.insert(found.clone());
                }
            }
        }
        let entry = seen.entry(found).or_insert(Seen {
            settled: false,
            extra: 0,
            marked: 0,
        });
        if entry.settled {
            entry.extra += 1;
            entry.marked += u64::from(delivery.redelivered);
        }
        entry.settled |= delivery.settled;
    }
    verdict.unexpected = unexpected.into_iter().collect();
    verdict.corrupted = corrupted.into_iter().collect();
    verdict.recovered = recovered.into_iter().collect();
    verdict.duplicated = seen
        .into_iter()
        .filter(|(_, seen)| seen.extra > 0)
        .map(|(finding, seen)| Duplicate {
            finding,
            extra: seen.extra,
            marked: seen.marked,
        })
        .collect();
}

fn judge_order(
    deliveries: &[&Delivered],
    messages: &BTreeMap<MessageRef<'_>, Message<'_>>,
    verdict: &mut Verdict,
) {
    type Line<'a> = (&'a str, &'a str, &'a str, Option<&'a str>);
    let mut first: HashSet<(&str, MessageRef<'_>)> = HashSet::new();
    let mut newest: HashMap<Line<'_>, u64> = HashMap::new();
    for delivery in deliveries {
        let id = (delivery.topic.as_str(), delivery.id.as_str());
        let Some(message) = messages.get(&id) else {
            continue;
        };
        if !first.insert((&delivery.group, id)) || !message.has_one_place() {
            continue;
        }
        let published = message.first;
        let line = (
            delivery.group.as_str(),
            published.topic.as_str(),
            published.publisher.as_str(),
            published.key.as_deref(),
        );
        let highest = newest.entry(line).or_insert(published.seq);
        if published.seq < *highest {
            verdict.reordered.push(Reordered {
                finding: finding(&delivery.group, &delivery.topic, &delivery.id),
                publisher: published.publisher.clone(),
                key: published.key.clone(),
                seq: published.seq,
                after: *highest,
            });
        }
        *highest = (*highest).max(published.seq);
    }
}

fn judge_losses(
    history: &History,
    messages: &BTreeMap<MessageRef<'_>, Message<'_>>,
    verdict: &mut Verdict,
) {
    let mut arrived: HashSet<(&str, MessageRef<'_>)> = HashSet::new();
    let mut readers: HashMap<&str, BTreeSet<&str>> = HashMap::new();
    for delivery in &history.delivered {
        arrived.insert((&delivery.group, (&delivery.topic, &delivery.id)));
        readers
            .entry(&delivery.topic)
            .or_default()
            .insert(&delivery.group);
    }
    for (topic, groups) in &history.expected_groups {
        // What is expected is the whole truth for its topic.
        readers.insert(topic, groups.iter().map(String::as_str).collect());
    }
    for (&id, message) in messages {
        if !message.outcome.is_accepted() {
            continue;
        }
        match readers.get(id.0) {
            None => verdict.lost.push(finding("", id.0, id.1)),
            Some(groups) => {
                let missed = groups
                    .iter()
                    .filter(|group| !arrived.contains(&(**group, id)));
                verdict
                    .lost
                    .extend(missed.map(|group| finding(group, id.0, id.1)));
            }
        }
    }
}

fn finding(group: &str, topic: &str, id: &str) -> Finding {
    Finding {
        group: group.to_owned(),
        topic: topic.to_owned(),
        id: id.to_owned(),
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
