//! What the hub counts, beside what each broker counts.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use serde::Serialize;

use super::{MessagingHub, lock, state::DrainState};
use crate::{broker::BrokerType, metrics::BrokerMetrics};

/// A snapshot of everything that is counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HubMetrics {
    /// What passed through the hub.
    pub hub: BrokerMetrics,
    /// What each broker did.
    pub brokers: BTreeMap<BrokerType, BrokerMetrics>,
    /// Messages that the spool took.
    pub fallback_usages: u64,
    /// Deliveries that a group had handled already.
    pub duplicates_suppressed: u64,
    /// Publishes of an id that had been accepted already.
    pub repeats_joined: u64,
    /// Ids that left a dedup window before their time because it was full.
    pub dedup_overflows: u64,
    /// Handled ids that a window has and the data folder, where there is one, has
    /// not: after a restart their messages may be handed out again.
    pub handled_unkept: u64,
    /// How many of the messages ended among the dead letters lately.
    pub dead_letters: super::DeadLetterRate,
    /// Messages that wait for their time.
    pub scheduled: u64,
    /// Lanes that are open.
    pub lanes: u64,
}

impl MessagingHub {
    /// A snapshot of everything that is counted.
    #[must_use]
    pub fn metrics(&self) -> HubMetrics {
        let groups: Vec<_> = lock(&self.0.groups).values().cloned().collect();
        HubMetrics {
            hub: self.0.recorder.snapshot(),
            brokers: self
                .all_brokers()
                .iter()
                .map(|b| (b.broker_type(), b.metrics()))
                .collect(),
            fallback_usages: self.fallback_usages(),
            duplicates_suppressed: groups.iter().map(|g| g.suppressed()).sum(),
            repeats_joined: self.0.accepted.joined(),
            dedup_overflows: groups.iter().map(|g| g.overflows()).sum(),
            #[cfg(feature = "journal")]
            handled_unkept: self.unkept_ids(),
            #[cfg(not(feature = "journal"))]
            handled_unkept: 0,
            dead_letters: self.dead_letter_rate(),
            scheduled: self.scheduled().0,
            lanes: lock(&self.0.lanes).len() as u64,
        }
    }
}

/// Drain rates by route, from the counts seen at successive looks.
#[derive(Debug, Default)]
pub(super) struct DrainRates(HashMap<String, Meter>);

/// A rate, from the counts seen at successive looks.
#[derive(Debug, Default)]
pub(crate) struct Meter(Option<(Instant, u64, f64)>);

/// Looks closer together than this share one rate.
const LOOK: f64 = 0.2;

impl DrainRates {
    /// The drain of a route that has drained `drained` so far and holds
    /// `remaining`.
    pub(super) fn of(&mut self, route: &str, drained: u64, remaining: u64) -> DrainState {
        let rate = self.0.entry(route.to_owned()).or_default().look(drained);
        DrainState { rate, remaining }
    }
}

impl Meter {
    /// How many a second, lately, when there were `count` by now.
    pub(crate) fn look(&mut self, count: u64) -> f64 {
        let now = Instant::now();
        let (at, before, rate) = self.0.get_or_insert((now, count, 0.0));
        let passed = now.duration_since(*at).as_secs_f64();
        if passed >= LOOK {
            *rate = count.saturating_sub(*before) as f64 / passed;
            (*at, *before) = (now, count);
        }
        *rate
    }
}
