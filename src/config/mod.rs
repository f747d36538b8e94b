//! What the hub is told: built-in defaults, then a YAML file, then the
//! environment, each beating the one before; checked as a whole and never
//! changed afterwards. Start at [`MessagingConfig`].
//!
//! An option that this version cannot honour is refused, not ignored. No error,
//! warning or report shows a secret.

mod environment;
#[cfg(feature = "yaml")]
mod file;
#[cfg(feature = "yaml")]
mod hide;
mod hub;
mod redact;
mod report;
mod schema;
mod settings;
#[cfg(feature = "yaml")]
mod source;
mod validate;
mod variables;
mod weakened;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Serialize;

use crate::{
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    broker::BrokerType,
    error::{Error, ErrorCode, Result},
    topology::{Topology, TopologyMode},
};

pub use hub::{
    BreakerSettings, CanarySettings, CompressionSettings, DuringOutage, HedgeSettings, HubSettings,
    RetryBy, RetrySettings, RouteKind, RouteSettings, ScheduleSettings, Share, SpoolSettings,
    WindowSettings,
};
pub use schema::{CheckAt, RegistrySettings, SchemaFormat, SchemaSettings, SchemasSettings};
pub use settings::{FallbackKind, FallbackSettings, LogConfig, LogFormat, ServerConfig};
pub use validate::Problem;
pub use variables::{VARIABLES, Variable};
pub use weakened::{Weakened, weakened};

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MessagingConfig {
    /// Use the brokers. Default true; false means the embedded broker alone.
    pub enabled: bool,
    /// What stands in while a primary is away.
    pub fallback: FallbackSettings,
    /// The hub itself.
    pub hub: HubSettings,
    /// RabbitMQ, where the file has its section or the environment names it. See
    /// [`Self::active_rabbitmq`] for whether it is used.
    pub rabbitmq: Option<RabbitMqConfig>,
    /// Kafka, likewise.
    pub kafka: Option<KafkaConfig>,
    /// What should exist on the brokers. Default [`Topology::helixagent`].
    pub topology: Topology,
    /// What is done about it at connect. Default apply.
    pub topology_mode: TopologyMode,
    /// Where schemas come from. Which payloads they are for, routes say.
    pub schemas: SchemasSettings,
    /// Where clients reach the hub.
    pub server: ServerConfig,
    /// Largest message at every entrance and broker, in bytes of payload and
    /// headers. Default 10 MiB: the largest that the built-in topics take, and
    /// below RabbitMQ's own 16 MiB. Danger: memory, as lanes and spool hold
    /// whole messages; and Kafka topics must allow it.
    pub max_message_bytes: u64,
    /// Folder for what survives the process: the spool, and the embedded
    /// broker's queues and streams. It is made, and held by one hub at a time.
    /// Default: none, all in memory; `messaging-hub serve` has one of its own,
    /// by its address.
    pub data_dir: Option<PathBuf>,
    /// What is logged, and how.
    pub log: LogConfig,
    /// What was set and has no effect, for the log. Found while loading.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

impl Default for MessagingConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            fallback: FallbackSettings::default(),
            hub: HubSettings::default(),
            rabbitmq: None,
            kafka: None,
            topology: Topology::helixagent(),
            topology_mode: TopologyMode::default(),
            schemas: SchemasSettings::default(),
            server: ServerConfig::default(),
            max_message_bytes: DEFAULT_MAX_MESSAGE_BYTES,
            data_dir: None,
            log: LogConfig::default(),
            warnings: Vec::new(),
        }
    }
}

impl MessagingConfig {
    /// The defaults alone: no broker, the built-in topology.
    #[must_use]
    pub fn builtin() -> Self {
        Self::default()
    }

    /// The defaults and the environment of this process.
    ///
    /// # Errors
    /// `INVALID_CONFIG` that names the variables that are wrong.
    pub fn from_env() -> Result<Self> {
        Self::from_env_map(&environment::of_process()?)
    }

    /// The defaults and this environment.
    ///
    /// # Errors
    /// As [`Self::from_env`].
    pub fn from_env_map(env: &BTreeMap<String, String>) -> Result<Self> {
        Self::builtin().finish(env)
    }

    /// A file and the environment of this process. `${NAME:-default}` in the
    /// file is filled in from the environment.
    ///
    /// # Errors
    /// `MISSING_CONFIG` when the file cannot be read, else `INVALID_CONFIG` with
    /// the line and column, the variables, or the paths that are wrong.
    #[cfg(feature = "yaml")]
    pub fn from_yaml(path: impl AsRef<std::path::Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::new(
                ErrorCode::MissingConfig,
                format!("cannot read the configuration file {}", path.display()),
            )
            .caused_by(e)
        })?;
        let env = environment::of_process()?;
        file::parse(&text, &path.display().to_string(), &env)?.finish(&env)
    }

    /// A file's text and this environment.
    ///
    /// # Errors
    /// As [`Self::from_yaml`].
    #[cfg(feature = "yaml")]
    pub fn from_yaml_str(text: &str, env: &BTreeMap<String, String>) -> Result<Self> {
        file::parse(text, "configuration", env)?.finish(env)
    }

    /// RabbitMQ's settings, when it is used.
    #[must_use]
    pub fn active_rabbitmq(&self) -> Option<&RabbitMqConfig> {
        self.rabbitmq.as_ref().filter(|r| self.enabled && r.enabled)
    }

    /// Kafka's settings, when it is used.
    #[must_use]
    pub fn active_kafka(&self) -> Option<&KafkaConfig> {
        self.kafka.as_ref().filter(|k| self.enabled && k.enabled)
    }

    /// What should exist on the brokers: [`Self::topology`], and at RabbitMQ a
    /// retry queue for each delay of a task route, unless the topology is ignored.
    #[must_use]
    pub fn wanted_topology(&self) -> Topology {
        let topology = self.topology.clone();
        if self.active_rabbitmq().is_none() || self.topology_mode == TopologyMode::Ignore {
            return topology;
        }
        topology.with_retry_tiers(self.task_delays())
    }

    /// How long failed tasks of RabbitMQ's rest, by whichever route.
    fn task_delays(&self) -> impl Iterator<Item = Duration> {
        let settings = &self.hub.retry;
        let tasks = |r: &RouteSettings| {
            r.kind == RouteKind::Task && matches!(r.primary, None | Some(BrokerType::RabbitMq))
        };
        self.hub
            .effective_routes()
            .into_iter()
            .filter(tasks)
            .flat_map(|r| match r.retry_delay {
                Some(delays) => delays.iter().collect::<Vec<_>>(),
                None => vec![settings.task_delay],
            })
    }

    /// The folder for what survives the process, unless memory was asked for.
    #[must_use]
    pub fn journal_dir(&self) -> Option<&std::path::Path> {
        match self.fallback.kind {
            FallbackKind::Journal => self.data_dir.as_deref(),
            FallbackKind::Memory => None,
        }
    }

    /// Turns the fallback on or off, in both of its places.
    pub fn set_fallback(&mut self, on: bool) {
        self.fallback.enabled = on;
        self.hub.fallback_enabled = on;
    }

    fn finish(mut self, env: &BTreeMap<String, String>) -> Result<Self> {
        environment::apply(&mut self, env)?;
        self.settle();
        self.validate().map_err(|problems| {
            let list: Vec<String> = problems.iter().map(ToString::to_string).collect();
            Error::rejected(ErrorCode::InvalidConfig, list.join("\n"))
        })?;
        Ok(self)
    }

    /// Brings settings that can be written in two ways together.
    fn settle(&mut self) {
        self.set_fallback(self.fallback.enabled && self.hub.fallback_enabled);
        if let Some(rabbitmq) = &mut self.rabbitmq {
            let empty = |s: &crate::secret::Secret| s.expose().trim().is_empty();
            rabbitmq.url.take_if(|url| empty(url));
            rabbitmq.management_url.take_if(|url| empty(url));
        }
        if let Some(kafka) = &mut self.kafka {
            kafka.brokers = split_list(&kafka.brokers.join(","));
            kafka.group_instance_id.take_if(|id| id.is_empty());
            // One limit holds everywhere; a smaller one of Kafka's is kept.
            if kafka.max_message_bytes == KafkaConfig::default().max_message_bytes {
                kafka.max_message_bytes =
                    usize::try_from(self.max_message_bytes).unwrap_or(usize::MAX);
            }
        }
        self.data_dir.take_if(|dir| dir.as_os_str().is_empty());
        self.server.tcp.take_if(|tcp| tcp.is_empty());
    }
}

/// The parts of a comma-separated list, without empty ones.
pub(crate) fn split_list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Whether this version has the TCP gateway.
pub const HAS_TCP_GATEWAY: bool = false;

/// Default of [`MessagingConfig::max_message_bytes`].
pub const DEFAULT_MAX_MESSAGE_BYTES: u64 = 10 * 1024 * 1024;
