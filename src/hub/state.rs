//! What operators see: the state of routes, lanes and brokers, in the shape of
//! `/v1/state`, and its changes.

use serde::Serialize;

use super::{breaker::BreakerState, route::RouteKind};
use crate::{broker::BrokerType, message::Timestamp};

pub use super::canary::CanaryState;

/// Where a lane, or a whole route, stands. Ordered from good to bad.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LaneState {
    /// Publishes go to the primary.
    #[default]
    Primary,
    /// The primary is back; the spool is moved to it.
    Draining,
    /// Confirms are late; nothing more is written.
    Suspect,
    /// The primary is away; publishes go to the spool.
    Degraded,
}

impl LaneState {
    /// `primary`, `draining`, `suspect` or `degraded`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Draining => "draining",
            Self::Suspect => "suspect",
            Self::Degraded => "degraded",
        }
    }
}

/// One change of a lane's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StateChange {
    /// The route's pattern.
    pub route: String,
    /// The topic.
    pub topic: String,
    /// Which lane of the topic (Kafka: the partition).
    pub lane: u32,
    /// From. The same as `to` when an operator paused or resumed a drain.
    pub from: LaneState,
    /// To.
    pub to: LaneState,
    /// When.
    pub at: Timestamp,
    /// Why.
    pub reason: String,
}

/// Everything in `/v1/state`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HubState {
    /// The hub's version.
    pub version: &'static str,
    /// Every route, with the worst state of its lanes.
    pub routes: Vec<RouteState>,
    /// Every broker.
    pub brokers: Vec<BrokerState>,
    /// Guarantees that the configuration weakens.
    pub weakened: Vec<Weakness>,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouteState {
    /// Its pattern.
    pub pattern: String,
    /// Tasks or events.
    pub kind: RouteKind,
    /// Its primary broker.
    pub primary: BrokerType,
    /// The worst state of its lanes.
    pub state: LaneState,
    /// What its lanes hold.
    pub spool: SpoolState,
    /// How the drain does.
    pub drain: DrainState,
    /// Whether an operator paused the drain of a lane, or of the whole route.
    pub paused: bool,
    /// How its canary does, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryState>,
}

/// What a route's lanes hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpoolState {
    /// Messages, those in doubt too.
    pub messages: u64,
    /// Those whose fate at the primary is not known.
    pub in_doubt: u64,
    /// Bytes.
    pub bytes: u64,
    /// Age of the oldest.
    pub oldest_age_ms: u64,
    /// Whether they survive the hub's death.
    pub durable: bool,
}

/// How a drain does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DrainState {
    /// Messages drained per second, lately.
    pub rate: f64,
    /// Messages still to be drained.
    pub remaining: u64,
}

/// One broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerState {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: BrokerType,
    /// Whether it is connected.
    pub connected: bool,
    /// Why not, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its breaker; the embedded broker has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breaker: Option<BreakerState>,
    /// When it was probed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_probe: Option<Timestamp>,
    /// What the last probe said, if it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_error: Option<String>,
    /// Addresses, without credentials.
    pub endpoints: Vec<String>,
    /// What the server says.
    pub server_version: Option<String>,
}

/// One guarantee that the configuration weakens (C13).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Weakness {
    /// The setting.
    pub what: String,
    /// The clauses that it voids, such as `C2`.
    pub clause: String,
    /// What that means.
    pub why: String,
}
