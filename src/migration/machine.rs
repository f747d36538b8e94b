//! The steps of a migration, and when it is rolled back. Pure: the time comes in.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    time::Instant,
};

use serde::Serialize;

use super::MigrationSettings;

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Only the old system is written.
    Legacy,
    /// Both are.
    DualWrite,
    /// Only the new one is.
    Messaging,
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Progress {
    /// The step.
    pub phase: Phase,
    /// Percent of what is written to both that the new system's consumers handle.
    pub consumer_percent: u8,
    /// Publishes to the new system.
    pub published: u64,
    /// Of those, failed.
    pub failed: u64,
    /// The share of those that failed lately.
    pub error_rate: f64,
    /// Why it was last rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rolled_back: Option<String>,
}

/// What to do with a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Legacy,
    /// `to_target`: the new system's consumers handle it.
    Both {
        to_target: bool,
    },
    Target,
}

pub(super) struct Machine {
    settings: MigrationSettings,
    phase: Phase,
    percent: u8,
    published: u64,
    failed: u64,
    /// Publishes to the new system lately, in slices of the window: from when,
    /// how many, and how many of them failed.
    lately: VecDeque<(Instant, u64, u64)>,
    rolled_back: Option<String>,
}

/// Slices of the window.
const SLICES: u32 = 60;

impl Machine {
    pub(super) fn new(settings: MigrationSettings) -> Self {
        Self {
            percent: settings.consumer_percent,
            settings,
            phase: Phase::Legacy,
            published: 0,
            failed: 0,
            lately: VecDeque::new(),
            rolled_back: None,
        }
    }

    pub(super) fn plan(&self, id: &str) -> Plan {
        match self.phase {
            Phase::Legacy => Plan::Legacy,
            Phase::Messaging => Plan::Target,
            Phase::DualWrite => {
                let mut hasher = DefaultHasher::new();
                id.hash(&mut hasher);
                // The same id is the same side's, also when it is published again.
                let to_target = hasher.finish() % 100 < u64::from(self.percent);
                Plan::Both { to_target }
            }
        }
    }

    /// The new system took a publish, or did not. The error rate, if that was too
    /// much and it was rolled back.
    pub(super) fn told(&mut self, now: Instant, failed: bool) -> Option<f64> {
        self.published += 1;
        self.failed += u64::from(failed);
        let slice = self.settings.window / SLICES;
        match self.lately.back_mut() {
            Some((since, all, bad)) if now.duration_since(*since) < slice => {
                *all += 1;
                *bad += u64::from(failed);
            }
            _ => self.lately.push_back((now, 1, u64::from(failed))),
        }
        while let Some((since, ..)) = self.lately.front()
            && now.duration_since(*since) > self.settings.window
        {
            self.lately.pop_front();
        }
        let (all, _) = self.sums();
        let rate = self.rate();
        let level = self.settings.rollback_error_rate;
        let too_much = level > 0.0 && all >= self.settings.least && rate >= level;
        if !failed || !too_much || self.phase == Phase::Legacy {
            return None;
        }
        self.rollback(&format!(
            "{:.1} % of the publishes to the new system failed",
            rate * 100.0
        ));
        Some(rate)
    }

    pub(super) fn advance(&mut self) -> Option<Phase> {
        self.phase = match self.phase {
            Phase::Legacy => Phase::DualWrite,
            Phase::DualWrite => Phase::Messaging,
            Phase::Messaging => return None,
        };
        self.lately.clear();
        Some(self.phase)
    }

    pub(super) fn rollback(&mut self, why: &str) {
        self.phase = Phase::Legacy;
        self.lately.clear();
        self.rolled_back = Some(why.to_owned());
    }

    pub(super) fn set_percent(&mut self, percent: u8) {
        self.percent = percent;
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            phase: self.phase,
            consumer_percent: self.percent,
            published: self.published,
            failed: self.failed,
            error_rate: self.rate(),
            rolled_back: self.rolled_back.clone(),
        }
    }

    fn sums(&self) -> (u64, u64) {
        let slices = self.lately.iter();
        slices.fold((0, 0), |(all, bad), (_, a, b)| (all + a, bad + b))
    }

    #[allow(clippy::cast_precision_loss, reason = "a share")]
    fn rate(&self) -> f64 {
        match self.sums() {
            (0, _) => 0.0,
            (all, bad) => bad as f64 / all as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn machine(percent: u8) -> Machine {
        Machine::new(MigrationSettings {
            consumer_percent: percent,
            ..MigrationSettings::default()
        })
    }

    #[test]
    fn it_goes_step_by_step_and_back_from_any() {
        let mut m = machine(0);
        assert_eq!(m.plan("a"), Plan::Legacy);
        assert_eq!(m.advance(), Some(Phase::DualWrite));
        assert_eq!(m.plan("a"), Plan::Both { to_target: false });
        m.rollback("by hand");
        assert_eq!(m.progress().phase, Phase::Legacy);
        assert_eq!(m.progress().rolled_back.as_deref(), Some("by hand"));
        m.advance();
        assert_eq!(m.advance(), Some(Phase::Messaging));
        assert_eq!(m.plan("a"), Plan::Target);
        assert_eq!(m.advance(), None);
        m.rollback("again");
        assert_eq!(m.plan("a"), Plan::Legacy);
    }

    #[test]
    fn the_share_is_that_of_the_ids_and_an_id_keeps_its_side() {
        let mut m = machine(30);
        m.advance();
        let ids: Vec<String> = (0..10_000).map(|n| format!("id-{n}")).collect();
        let target = |m: &Machine| -> Vec<bool> {
            ids.iter()
                .map(|id| m.plan(id) == Plan::Both { to_target: true })
                .collect()
        };
        let first = target(&m);
        let count = first.iter().filter(|t| **t).count();
        assert!((2_700..3_300).contains(&count), "{count}");
        assert_eq!(first, target(&m));
        // Those that were the new system's stay that when it gets more.
        m.set_percent(60);
        let more = target(&m);
        assert!(first.iter().zip(&more).all(|(a, b)| !*a || *b));
        m.set_percent(100);
        assert!(target(&m).iter().all(|t| *t));
    }

    #[test]
    fn too_many_failures_lately_roll_it_back_and_old_ones_do_not() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut m = machine(0);
        m.advance();
        // Too few to conclude anything.
        for _ in 0..99 {
            assert_eq!(m.told(at(0), true), None);
        }
        // They are too old to count when the rest comes.
        for n in 0..200 {
            assert_eq!(m.told(at(120), n % 25 == 0), None, "{n}");
        }
        assert_eq!(m.progress().phase, Phase::DualWrite);
        let mut rolled_back = None;
        for _ in 0..20 {
            rolled_back = rolled_back.or(m.told(at(121), true));
        }
        assert!(rolled_back.is_some_and(|rate| rate >= 0.05));
        assert_eq!(m.progress().phase, Phase::Legacy);
        assert!(m.progress().rolled_back.is_some());
    }

    #[test]
    fn level_0_never_rolls_back() {
        let mut m = Machine::new(MigrationSettings {
            rollback_error_rate: 0.0,
            ..MigrationSettings::default()
        });
        m.advance();
        for _ in 0..1_000 {
            assert_eq!(m.told(Instant::now(), true), None);
        }
    }
}
