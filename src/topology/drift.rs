//! What a look at a broker found.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::broker::BrokerType;

/// What is done about the topology at connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TopologyMode {
    /// Make what is missing; report drift. Nothing is redeclared.
    #[default]
    Apply,
    /// Report what is missing and drift.
    Check,
    /// Do not look.
    Ignore,
}

/// One difference between what should be and what is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// On which broker.
    pub broker: BrokerType,
    /// What, such as `queue helixagent.tasks.llm`.
    pub object: String,
    /// Which argument differs, such as `x-max-priority`.
    pub argument: String,
    /// What it should be.
    pub expected: String,
    /// What it is.
    pub actual: String,
}

/// Everything a look found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopologyReport {
    /// Objects that are as they should be.
    pub ok: Vec<String>,
    /// Objects that are missing (and were not made).
    pub missing: Vec<String>,
    /// Objects that were missing and were made.
    pub created: Vec<String>,
    /// Objects that differ.
    pub drift: Vec<Drift>,
    /// What could not be looked at, and why.
    pub not_checked: Vec<String>,
    /// Brokers that could not be asked, or not to the end, and why. What was found,
    /// or made, there before is not told.
    #[serde(default)]
    pub unreachable: Vec<String>,
}

impl TopologyReport {
    /// Whether every broker was asked, nothing is missing and nothing differs.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.drift.is_empty() && self.unreachable.is_empty()
    }

    /// Adds another look's findings.
    pub fn merge(&mut self, other: Self) {
        self.ok.extend(other.ok);
        self.missing.extend(other.missing);
        self.created.extend(other.created);
        self.drift.extend(other.drift);
        self.not_checked.extend(other.not_checked);
        self.unreachable.extend(other.unreachable);
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: {} is {}, expected {}",
            self.broker, self.object, self.argument, self.actual, self.expected
        )
    }
}
