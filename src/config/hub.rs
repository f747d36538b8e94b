//! Settings of the hub itself: routes, breaker, spool, windows, retry. Plain
//! data; what they do is the hub's business, whether they fit together is
//! `validate`'s.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::schema::SchemaSettings;
use crate::{
    broker::{BrokerType, Compression, Delays},
    topic::{Pattern, Topic},
};

/// How the hub routes, spools and recovers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubSettings {
    /// Keep messages in the embedded broker while the primary is away. Default
    /// true. Danger: false makes every outage the caller's (voids C3, C4, C7).
    pub fallback_enabled: bool,
    /// Spool a message whose publish failed in a way that a retry can mend.
    /// Default true. False hands the error to the caller.
    pub use_fallback_on_error: bool,
    /// How often each broker is asked whether it is well, besides what its own
    /// connection reports. Default 30 s.
    #[serde(with = "crate::duration")]
    pub health_check_interval: Duration,
    /// When a broker that fails is left alone.
    pub breaker: BreakerSettings,
    /// How long a publish waits for its confirm before it is spooled in doubt.
    pub hedge: HedgeSettings,
    /// How long a lane may stay suspect before the hub gives its connection up.
    /// Default 10 s. Danger: shorter than a leader election makes duplicates
    /// likelier.
    #[serde(with = "crate::duration")]
    pub suspect_timeout: Duration,
    /// Room for what the primary could not take.
    pub spool: SpoolSettings,
    /// Room for messages that wait for their time.
    pub schedule: ScheduleSettings,
    /// For how long, and for how many ids, a repeated publish of the caller's
    /// own id is answered and not sent. Default 10 min, 1,000,000.
    pub intake_window: WindowSettings,
    /// For how long, and for how many ids, a group handles an id once. Default
    /// 24 h, 1,000,000. Cost: about 100 bytes an id in memory, and 50 in the data
    /// folder, where there is one.
    pub dedup_window: WindowSettings,
    /// How often and when a failed message is tried again.
    pub retry: RetrySettings,
    /// The share of messages, 0 to 1, that may end among the dead letters within
    /// ten minutes before that is an alarm: logged, and `messaging_dlq_alarm`.
    /// Default 0.001. 0: never.
    pub dead_letter_alarm: Share,
    /// What the hub compresses on the way to RabbitMQ and the embedded broker.
    pub compression: CompressionSettings,
    /// How long shutdown may take. Default 30 s.
    #[serde(with = "crate::duration")]
    pub shutdown_grace: Duration,
    /// Make a missing queue or topic at its first use. Default: only where the
    /// embedded broker is primary.
    pub auto_declare: Option<bool>,
    /// Routes, tried in order before the built-in ones
    /// ([`RouteSettings::defaults`]).
    pub routes: Vec<RouteSettings>,
}

/// When a broker that fails is left alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerSettings {
    /// Failures in a row that open it. Default 5.
    pub threshold: u32,
    /// How long it stays open when no probe succeeds earlier. Default 30 s.
    #[serde(with = "crate::duration")]
    pub timeout: Duration,
}

/// Bounds of the wait for a confirm; between them it is four times the recent
/// 99th percentile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HedgeSettings {
    /// Default 100 ms. Danger: below a normal confirm, healthy lanes turn suspect.
    #[serde(with = "crate::duration")]
    pub min: Duration,
    /// Default 1 s.
    #[serde(with = "crate::duration")]
    pub max: Duration,
}

/// Room for what the primary could not take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpoolSettings {
    /// Messages at most. Default 1,000,000.
    pub max_messages: u64,
    /// Bytes of payload and headers at most. Default 512 MiB (536870912).
    pub max_bytes: u64,
    /// How long a publish waits for room before `SPOOL_FULL`. Default 5 s.
    #[serde(with = "crate::duration")]
    pub wait: Duration,
    /// Messages that each lane drains a second at most, for a primary that
    /// should not be flooded when it comes back. Default 0: no limit. Danger:
    /// below what is published of spooled keys, the spool grows until it is full.
    pub drain_rate: u32,
}

/// Room for messages whose `scheduled_at` lies in the future.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSettings {
    /// Messages at most. Default 1,000,000. Cost: about 500 bytes of memory each;
    /// where there is a data folder, payloads are on the disk only.
    pub max_messages: u64,
    /// Bytes of payload and headers at most. Default 512 MiB (536870912).
    pub max_bytes: u64,
}

/// A part of a whole, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Share(pub f64);

/// What is no number is refused before anybody compares it.
impl Eq for Share {}

/// A window of remembered ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSettings {
    /// How long an id is remembered.
    #[serde(with = "crate::duration")]
    pub age: Duration,
    /// How many ids are remembered.
    pub ids: u64,
}

/// Compression of payloads by the hub, for brokers that do none themselves
/// (Kafka has `kafka.compression`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompressionSettings {
    /// `none`, `zstd`, `lz4` or `gzip`, for routes and publishes that say nothing.
    /// Default none. Danger: readers that are no hubs must know `content_encoding`.
    pub algorithm: Compression,
    /// Payloads below stay as they are, in bytes. Default 4096.
    pub threshold: u64,
}

/// How often and when a failed message is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrySettings {
    /// Delay of a failed task. Default 60 s. RabbitMQ gets a retry queue for each
    /// delay that its routes name.
    #[serde(with = "crate::duration")]
    pub task_delay: Duration,
    /// Delay of a failed event. Default 1 s.
    #[serde(with = "crate::duration")]
    pub event_delay: Duration,
    /// Tries after the first, for messages that say nothing. Default 3.
    pub max_retries: u32,
}

/// One route: which topics, of which kind, over which broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSettings {
    /// Topics it covers: `*` one word, `#` any number of words.
    pub pattern: Pattern,
    /// Tasks (each handled by one consumer) or events (a stream).
    pub kind: RouteKind,
    /// The broker. Default by kind: RabbitMQ for tasks, Kafka for events,
    /// whichever of them is used, the embedded broker where neither is.
    #[serde(default)]
    pub primary: Option<BrokerType>,
    /// What subscribers see of spooled messages. Default `local` for tasks,
    /// `hold` for events; for these it concerns groups, readers without one
    /// read along either way.
    #[serde(default)]
    pub during_outage: Option<DuringOutage>,
    /// Keep messages while the primary is away. Default true. Danger: false
    /// makes an outage of the primary the caller's, for these topics.
    #[serde(default = "yes")]
    pub spool: bool,
    /// Delay of a failed message, or one for each of its retries (`[5s, 1m]`; the
    /// last holds for further ones). Default by kind, from `retry`. On RabbitMQ
    /// each is a retry queue of its own.
    #[serde(default)]
    pub retry_delay: Option<Delays>,
    /// Where a group's failed event rests. Default `lane`. For events only.
    #[serde(default)]
    pub retry_by: RetryBy,
    /// Tasks of RabbitMQ that may take longer than it waits for an ack (30 minutes,
    /// its `consumer_timeout`): each is handed over to this hub's disk and acked
    /// before it is handled, or leased. Default false. Needs a data folder.
    /// Danger: what was handed over waits for this hub if it dies.
    #[serde(default)]
    pub long_running: bool,
    /// Compression of payloads. Default: `hub.compression`, over Kafka
    /// `kafka.compression`.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// What payloads must look like. Default: anything.
    #[serde(default)]
    pub schema: Option<SchemaSettings>,
    /// A message of the hub's own that is sent through the primary at an interval
    /// and waited for at the other end. Default: none.
    #[serde(default)]
    pub canary: Option<CanarySettings>,
}

/// How a route's canary flies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanarySettings {
    /// Its topic, which the route's pattern must cover and nobody else should
    /// use. On RabbitMQ a task route's canary has a queue of that name with a
    /// suffix for each hub, which goes 10 minutes after the hub.
    pub topic: Topic,
    /// From one to the next. Default 30 s.
    #[serde(default = "half_a_minute", with = "crate::duration")]
    pub every: Duration,
    /// How long one may take before it counts as failed. Default 10 s.
    #[serde(default = "ten_seconds", with = "crate::duration")]
    pub within: Duration,
}

/// Kinds of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// Work that one consumer handles once.
    Task,
    /// Facts that every group reads.
    Event,
}

/// What happens to spooled messages while the primary is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DuringOutage {
    /// Local subscribers get them at once: tasks one consumer each, events each
    /// group its own copy. Order holds within the spool and within the primary,
    /// not between them. Danger, for events: a handler that never ends keeps
    /// its event, and those behind it of the same key, from the drain.
    Local,
    /// They wait for the primary; order holds throughout.
    Hold,
}

/// Where a group's failed event rests until it is tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetryBy {
    /// In front of its key: what is behind it in the key waits, so that order is
    /// kept; other keys go on.
    #[default]
    Lane,
    /// In a topic of the group's own for each delay (`hub-retry.GROUP-1a2b3c4d.5s`,
    /// the number standing for group and pattern), read by its members: nothing waits behind it, and it outlives its
    /// reader. Danger: a retry comes after what followed it in its key.
    Topic,
}

impl RouteSettings {
    /// A route with the defaults of its kind.
    #[must_use]
    pub fn new(pattern: Pattern, kind: RouteKind) -> Self {
        Self {
            pattern,
            kind,
            primary: None,
            during_outage: None,
            spool: true,
            retry_delay: None,
            retry_by: RetryBy::Lane,
            long_running: false,
            schema: None,
            canary: None,
            compression: None,
        }
    }

    /// The routes that hold after the configured ones: task names, event names,
    /// and everything else as events.
    #[must_use]
    pub fn defaults() -> Vec<Self> {
        DEFAULT_ROUTES
            .iter()
            .filter_map(|(pattern, kind)| Some(Self::new(Pattern::new(pattern).ok()?, *kind)))
            .collect()
    }

    /// What subscribers see during an outage, the kind's default included.
    #[must_use]
    pub fn effective_during_outage(&self) -> DuringOutage {
        self.during_outage.unwrap_or(match self.kind {
            RouteKind::Task => DuringOutage::Local,
            RouteKind::Event => DuringOutage::Hold,
        })
    }
}

impl HubSettings {
    /// The configured routes, then the built-in ones; the first that matches
    /// holds.
    #[must_use]
    pub fn effective_routes(&self) -> Vec<RouteSettings> {
        let mut routes = self.routes.clone();
        routes.extend(RouteSettings::defaults());
        routes
    }
}

impl Default for HubSettings {
    fn default() -> Self {
        Self {
            fallback_enabled: true,
            use_fallback_on_error: true,
            health_check_interval: Duration::from_secs(30),
            breaker: BreakerSettings::default(),
            hedge: HedgeSettings::default(),
            suspect_timeout: Duration::from_secs(10),
            spool: SpoolSettings::default(),
            schedule: ScheduleSettings::default(),
            intake_window: WindowSettings {
                age: Duration::from_secs(600),
                ids: 1_000_000,
            },
            dedup_window: WindowSettings {
                age: Duration::from_secs(24 * 3600),
                ids: 1_000_000,
            },
            retry: RetrySettings::default(),
            dead_letter_alarm: Share(0.001),
            compression: CompressionSettings::default(),
            shutdown_grace: Duration::from_secs(30),
            auto_declare: None,
            routes: Vec::new(),
        }
    }
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            threshold: 5,
            timeout: Duration::from_secs(30),
        }
    }
}

impl Default for HedgeSettings {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(100),
            max: Duration::from_secs(1),
        }
    }
}

impl Default for SpoolSettings {
    fn default() -> Self {
        Self {
            max_messages: 1_000_000,
            max_bytes: 512 * 1024 * 1024,
            wait: Duration::from_secs(5),
            drain_rate: 0,
        }
    }
}

impl Default for ScheduleSettings {
    fn default() -> Self {
        Self {
            max_messages: 1_000_000,
            max_bytes: 512 * 1024 * 1024,
        }
    }
}

impl Default for CompressionSettings {
    fn default() -> Self {
        Self {
            algorithm: Compression::None,
            threshold: 4096,
        }
    }
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            task_delay: Duration::from_secs(60),
            event_delay: Duration::from_secs(1),
            max_retries: 3,
        }
    }
}

const fn yes() -> bool {
    true
}

const fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}

const fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

/// `task.*.#` needs a word after the dot: `task` alone is no task prefix, while
/// `tasks` alone is a queue that people use.
const DEFAULT_ROUTES: &[(&str, RouteKind)] = &[
    ("helixagent.tasks.#", RouteKind::Task),
    ("helixagent.retry.#", RouteKind::Task),
    ("helixagent.dlq", RouteKind::Task),
    ("tasks.#", RouteKind::Task),
    ("task.*.#", RouteKind::Task),
    ("helixagent.events.#", RouteKind::Event),
    ("helixagent.stream.#", RouteKind::Event),
    ("events.#", RouteKind::Event),
    ("event.#", RouteKind::Event),
    ("llmsverifier.events.#", RouteKind::Event),
    ("#", RouteKind::Event),
];
