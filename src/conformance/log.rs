//! Records a history while a check runs, for [`ledger`](super::ledger) to judge.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    Failure,
    ledger::{self, Delivered, History, Outcome, Published, Verdict},
};
use crate::{
    broker::{self, Receipt, Received},
    error::{Assume, Result},
    message::{Key, Message},
    topic::Topic,
};

/// What a verdict must show beside that nothing is lost, invented or altered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Demand {
    /// First deliveries in publish order, for each publisher and key.
    pub order: bool,
    /// Deliveries after the message had been settled, at most; none: any
    /// number, where members of a group come and go.
    pub duplicates: Option<u64>,
}

impl Demand {
    /// Nothing twice.
    pub(crate) const ONCE: Self = Self {
        order: false,
        duplicates: Some(0),
    };
    /// Nothing twice, and in order.
    pub(crate) const ONCE_IN_ORDER: Self = Self {
        order: true,
        duplicates: Some(0),
    };
    /// Nothing lost.
    pub(crate) const AT_LEAST_ONCE: Self = Self {
        order: false,
        duplicates: None,
    };
}

/// A history in the making, shared by all publishers and readers of a check.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Inner>);

/// The history, with counts beside it that are asked for at every delivery.
#[derive(Debug, Default)]
struct Inner {
    history: History,
    accepted: HashSet<String>,
    groups: HashMap<String, Got>,
}

#[derive(Debug, Default)]
struct Got {
    ids: HashSet<String>,
    /// How many of `ids` were accepted.
    accepted: usize,
}

impl Log {
    /// Notes a publish with its outcome.
    pub(crate) fn published(
        &self,
        publisher: &str,
        seq: u64,
        topic: &Topic,
        message: &Message,
        result: &Result<Receipt>,
    ) {
        let id = message.id.as_str().to_owned();
        let outcome = outcome(result);
        let mut inner = self.lock();
        if outcome.is_accepted() && inner.accepted.insert(id.clone()) {
            for got in inner.groups.values_mut() {
                // It may arrive before its publisher hears of it.
                got.accepted += usize::from(got.ids.contains(&id));
            }
        }
        inner.history.published.push(Published {
            publisher: publisher.to_owned(),
            topic: topic.as_str().to_owned(),
            key: message.key.as_ref().map(key_text),
            seq,
            id,
            payload_hash: fingerprint(message),
            outcome,
        });
    }

    /// Notes a delivery.
    pub(crate) fn delivered(&self, group: &str, received: &Received, settled: bool) {
        let id = received.message.id.as_str().to_owned();
        let mut inner = self.lock();
        let accepted = inner.accepted.contains(&id);
        let got = inner.groups.entry(group.to_owned()).or_default();
        if got.ids.insert(id.clone()) {
            got.accepted += usize::from(accepted);
        }
        let index = inner.history.delivered.len() as u64;
        inner.history.delivered.push(Delivered {
            group: group.to_owned(),
            consumer: String::new(),
            topic: received.topic.as_str().to_owned(),
            id,
            payload_hash: fingerprint(&received.message),
            key: received.message.key.as_ref().map(key_text),
            index,
            redelivered: received.message.redelivered,
            settled,
        });
    }

    /// Names the groups that must see everything of a topic.
    pub(crate) fn expect(&self, topic: &Topic, groups: &[&str]) {
        let groups: BTreeSet<_> = groups.iter().map(|g| (*g).to_owned()).collect();
        let expected = &mut self.lock().history.expected_groups;
        expected.insert(topic.as_str().to_owned(), groups);
    }

    /// How many different messages a group has got.
    pub(crate) fn distinct(&self, group: &str) -> usize {
        self.lock().groups.get(group).map_or(0, |got| got.ids.len())
    }

    /// How many accepted messages a group has not got.
    pub(crate) fn missing(&self, group: &str) -> usize {
        let inner = self.lock();
        let got = inner.groups.get(group).map_or(0, |got| got.accepted);
        inner.accepted.len() - got
    }

    /// How many messages were accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.lock().accepted.len()
    }

    /// Judges what was recorded.
    pub(crate) fn judge(&self, demand: Demand) -> Result<Verdict, Failure> {
        let mut verdict = ledger::check(&self.lock().history);
        if !demand.order {
            verdict.reordered.clear();
        }
        let extra = verdict.extra_deliveries();
        let too_many = demand.duplicates.is_some_and(|most| extra > most);
        if verdict.is_sound() && !too_many {
            return Ok(verdict);
        }
        let mut text = format!(
            "expected {} accepted messages, each delivered unaltered; seen: ",
            verdict.accepted
        );
        let mut name = |what: &str, ids: Vec<String>| {
            if !ids.is_empty() {
                let shown = ids.iter().take(SHOWN).cloned().collect::<Vec<_>>();
                // Writing to a String cannot fail.
                let _ = write!(text, "{} {what} ({}) ", ids.len(), shown.join(", "));
            }
        };
        let ids = |all: &[ledger::Finding]| {
            let named = all.iter().map(|f| format!("{} {}", f.group, f.id));
            named.collect::<Vec<_>>()
        };
        name("lost", ids(&verdict.lost));
        name("unexpected", ids(&verdict.unexpected));
        name("altered", ids(&verdict.corrupted));
        name("ambiguous", ids(&verdict.ambiguous));
        let out_of_order = verdict.reordered.iter();
        name(
            "out of order",
            out_of_order
                .map(|r| format!("{} after {}", r.seq, r.after))
                .collect(),
        );
        if too_many {
            let twice = verdict.duplicated.iter();
            name(
                "delivered again after being settled",
                twice.map(|d| d.finding.id.clone()).collect(),
            );
        }
        Err(Failure::new(text.trim_end()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A check that panicked while it recorded left complete entries only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Payload and headers: what must not be altered.
fn fingerprint(message: &Message) -> u64 {
    let mut body = crc32fast::Hasher::new();
    body.update(&message.payload);
    let mut headers = crc32fast::Hasher::new();
    for (name, value) in &message.headers {
        headers.update(name.as_bytes());
        headers.update(&[0]);
        headers.update(value.as_bytes());
        headers.update(&[0]);
    }
    u64::from(body.finalize()) << 32 | u64::from(headers.finalize())
}

fn key_text(key: &Key) -> String {
    key.as_str().map_or_else(
        || format!("{:02x?}", key.as_bytes()),
        std::borrow::ToOwned::to_owned,
    )
}

fn outcome(result: &Result<Receipt>) -> Outcome {
    match result {
        Ok(receipt) => match receipt.outcome {
            broker::Outcome::Delivered { .. } => Outcome::Delivered,
            broker::Outcome::Spooled { .. } => Outcome::Spooled,
            // Written without a confirm: nothing is promised.
            broker::Outcome::Sent { .. } => Outcome::Unknown,
        },
        Err(error) => match error.assume() {
            Assume::NotSent => Outcome::NotSent,
            Assume::Rejected => Outcome::Rejected,
            Assume::Unknown => Outcome::Unknown,
        },
    }
}

/// Ids that a failure names; more would bury the point.
const SHOWN: usize = 5;
