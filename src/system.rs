//! The system built from a configuration: the brokers that it names are built,
//! connected and plugged into a hub.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig, JournalConfig},
    broker::MessageBroker,
    config::MessagingConfig,
    error::{Error, ErrorCode, Result},
    hub::{CloseReport, MessagingHub, state::Weakness},
    topology::Topology,
};

/// How long a start waits for brokers when there is a fallback. Long enough for
/// a busy broker to accept, and for wrong credentials to be told.
const START_PATIENCE: Duration = Duration::from_secs(5);

type Factory = Box<dyn Fn() -> Arc<dyn MessageBroker> + Send + Sync>;

/// A hub with the brokers of a configuration.
///
/// ```
/// # async fn run() -> messaging_hub::Result<()> {
/// use messaging_hub::{MessagingSystem, config::MessagingConfig, Message};
/// let system = MessagingSystem::start(MessagingConfig::builtin()).await?;
/// let receipt = system.hub().publish("tasks", Message::new("greet", "hello")).await?;
/// println!("{receipt:?}");
/// system.close().await;
/// # Ok(())
/// # }
/// ```
pub struct MessagingSystem {
    config: MessagingConfig,
    topology: Arc<Topology>,
    hub: MessagingHub,
    factory: Option<Factory>,
    start_degraded: bool,
    initialized: AtomicBool,
}

impl MessagingSystem {
    /// Builds and initializes a system.
    ///
    /// # Errors
    /// As [`MessagingSystem::initialize`].
    pub async fn start(config: MessagingConfig) -> Result<Self> {
        let system = Self::new(config);
        system.initialize().await?;
        Ok(system)
    }

    /// A system that is not connected yet.
    #[must_use]
    pub fn new(config: MessagingConfig) -> Self {
        let topology = Arc::new(config.wanted_topology());
        let mut settings = config.hub.clone();
        settings.fallback_enabled &= config.fallback.enabled;
        let limit = usize::try_from(config.max_message_bytes).unwrap_or(usize::MAX);
        let hub = MessagingHub::with_limits(settings, topology.clone(), limit);
        Self {
            config,
            topology,
            hub,
            factory: None,
            start_degraded: false,
            initialized: AtomicBool::new(false),
        }
    }

    /// Takes the fallback from a factory instead of building the embedded
    /// broker.
    #[must_use]
    pub fn with_fallback_factory(
        mut self,
        factory: impl Fn() -> Arc<dyn MessageBroker> + Send + Sync + 'static,
    ) -> Self {
        self.factory = Some(Box::new(factory));
        self
    }

    /// Starts although a broker refuses the credentials. Default false: that is
    /// a mistake which waiting does not mend.
    #[must_use]
    pub fn with_start_degraded(mut self, start_degraded: bool) -> Self {
        self.start_degraded = start_degraded;
        self
    }

    /// Builds, connects and plugs in the brokers. While one is away it succeeds
    /// all the same when the fallback is enabled: the hub starts degraded and
    /// the broker joins when it appears.
    ///
    /// # Errors
    /// `INVALID_CONFIG`; `AUTHENTICATION_FAILED` unless starting degraded was
    /// asked for; with the fallback off, why a broker cannot be reached.
    pub async fn initialize(&self) -> Result<()> {
        if self.initialized.swap(true, Relaxed) {
            return Ok(());
        }
        if self.hub.is_closed() {
            return Err(Error::new(
                ErrorCode::OperationCanceled,
                "this system was closed, or failed to start; build a new one",
            ));
        }
        let done = self.connect().await;
        if done.is_err() {
            // Nothing of a failed start stays behind.
            self.hub.close(Duration::ZERO).await;
            self.initialized.store(false, Relaxed);
        }
        done
    }

    async fn connect(&self) -> Result<()> {
        if let Err(problems) = self.config.validate() {
            let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
            return Err(Error::rejected(ErrorCode::InvalidConfig, all.join("; ")));
        }
        #[cfg(feature = "schema")]
        self.hub
            .use_schemas(self.config.schemas.registry.as_ref())
            .await?;
        let rabbitmq = self.rabbitmq()?;
        let kafka = self.kafka()?;
        let alone = rabbitmq.is_none() && kafka.is_none();
        let fallback = self.config.fallback.enabled && self.config.hub.fallback_enabled;
        if alone || fallback {
            let broker: Arc<dyn MessageBroker> = match &self.factory {
                Some(factory) => factory(),
                None => EmbeddedBroker::new(self.embedded(), self.topology.clone()),
            };
            broker.connect().await?;
            self.hub.set_fallback_broker(broker)?;
        }
        if let Some(broker) = &rabbitmq {
            self.hub.set_task_queue_broker(broker.clone());
            if kafka.is_none() && !fallback {
                self.hub.set_event_stream_broker(broker.clone());
            }
        }
        if let Some(broker) = &kafka {
            self.hub.set_event_stream_broker(broker.clone());
        }
        #[cfg(feature = "journal")]
        if let Some(dir) = self.config.journal_dir() {
            self.hub.keep_handled_in(dir).await?;
            if fallback && !alone {
                self.hub.keep_spool_in(dir).await?;
            } else {
                // Moved to the embedded broker they would never reach theirs.
                let left = MessagingHub::spool_left_in(dir).await?;
                if left > 0 {
                    tracing::error!(messages = left, folder = %dir.display(),
                        "the data folder holds a spool that this configuration does not drain: \
                         it has no broker, or the fallback is off; the messages stay there until \
                         the hub is started as before, or another adopts them");
                }
            }
            if fallback || alone {
                self.hub.keep_schedule_in(dir).await?;
            } else {
                let left = MessagingHub::schedule_left_in(dir).await?;
                if left > 0 {
                    tracing::error!(messages = left, folder = %dir.display(),
                        "the data folder holds scheduled messages that this configuration does not \
                         publish: the fallback is off; they stay there");
                }
            }
        }
        #[cfg(not(feature = "journal"))]
        if self.config.journal_dir().is_some() {
            return Err(not_built("journal"));
        }
        self.hub.set_weakened(
            self.config
                .weakened()
                .into_iter()
                .map(|w| Weakness {
                    what: w.what,
                    clause: w.clause,
                    why: w.why,
                })
                .collect(),
        );
        // Side by side: a broker that is away takes its whole time-out.
        let brokers: Vec<Arc<dyn MessageBroker>> =
            [rabbitmq, kafka].into_iter().flatten().collect();
        // With a fallback nobody has to wait for one that gives no answer at all:
        // it goes on trying by itself, and joins when it appears.
        let patience = if fallback {
            START_PATIENCE
        } else {
            Duration::from_secs(u64::from(u16::MAX))
        };
        let attempts = brokers.iter().map(|b| async {
            tokio::time::timeout(patience, b.connect())
                .await
                .unwrap_or_else(|_| {
                    Err(Error::new(
                        ErrorCode::ConnectionTimeout,
                        "no answer yet; still trying in the background",
                    ))
                })
        });
        for (broker, outcome) in brokers
            .iter()
            .zip(futures_util::future::join_all(attempts).await)
        {
            let Err(error) = outcome else { continue };
            let refused = error.code() == ErrorCode::AuthenticationFailed;
            if (refused && !self.start_degraded)
                || !fallback
                || error.code() == ErrorCode::InvalidConfig
            {
                return Err(error.at(broker.broker_type()));
            }
            tracing::warn!(broker = %broker.broker_type(), %error,
                "the broker is away; starting degraded, it joins when it appears");
        }
        Ok(())
    }

    fn embedded(&self) -> EmbeddedConfig {
        EmbeddedConfig {
            auto_declare: self.config.hub.auto_declare.unwrap_or(true),
            journal: self.config.journal_dir().map(JournalConfig::at),
            ..EmbeddedConfig::default()
        }
    }

    #[cfg(feature = "rabbitmq")]
    #[allow(clippy::unnecessary_wraps)]
    fn rabbitmq(&self) -> Result<Option<Arc<dyn MessageBroker>>> {
        Ok(self.config.active_rabbitmq().map(|config| {
            crate::adapter::rabbitmq::RabbitMqBroker::new(
                config.clone(),
                self.topology.clone(),
                self.config.topology_mode,
            ) as Arc<dyn MessageBroker>
        }))
    }

    #[cfg(not(feature = "rabbitmq"))]
    fn rabbitmq(&self) -> Result<Option<Arc<dyn MessageBroker>>> {
        match self.config.active_rabbitmq() {
            Some(_) => Err(not_built("rabbitmq")),
            None => Ok(None),
        }
    }

    #[cfg(feature = "kafka")]
    #[allow(clippy::unnecessary_wraps)]
    fn kafka(&self) -> Result<Option<Arc<dyn MessageBroker>>> {
        Ok(self.config.active_kafka().map(|config| {
            crate::adapter::kafka::KafkaBroker::new(
                config.clone(),
                self.topology.clone(),
                self.config.topology_mode,
            ) as Arc<dyn MessageBroker>
        }))
    }

    #[cfg(not(feature = "kafka"))]
    fn kafka(&self) -> Result<Option<Arc<dyn MessageBroker>>> {
        match self.config.active_kafka() {
            Some(_) => Err(not_built("kafka")),
            None => Ok(None),
        }
    }

    /// The hub.
    #[must_use]
    pub fn hub(&self) -> MessagingHub {
        self.hub.clone()
    }

    /// The configuration that holds.
    #[must_use]
    pub fn config(&self) -> &MessagingConfig {
        &self.config
    }

    /// Whether [`MessagingSystem::initialize`] has succeeded and
    /// [`MessagingSystem::close`] was not called.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.initialized.load(Relaxed)
    }

    /// Closes the hub within the configured grace period.
    pub async fn close(&self) -> CloseReport {
        self.initialized.store(false, Relaxed);
        self.hub.close(self.config.hub.shutdown_grace).await
    }
}

impl fmt::Debug for MessagingSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessagingSystem")
            .field("initialized", &self.is_initialized())
            .field("hub", &self.hub)
            .finish_non_exhaustive()
    }
}

#[cfg(not(all(feature = "rabbitmq", feature = "kafka", feature = "journal")))]
fn not_built(feature: &str) -> Error {
    Error::rejected(
        ErrorCode::InvalidConfig,
        format!(
            "the configuration uses {feature}, but this program was built without the feature `{feature}`"
        ),
    )
}
