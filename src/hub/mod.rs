//! The hub: one API over all brokers. It routes topics, keeps a lane to each,
//! spools what a primary cannot take, moves it back, and hands each message to
//! each group once.
//!
//! What is hard is pure and stands in `lane::machine`, `spool`, `dedup`,
//! `intake` and [`route`]; the rest is a thin shell of tasks. The hub knows
//! brokers only through [`crate::broker`].

mod accepted;
mod admin;
#[cfg(feature = "journal")]
mod adopt;
pub mod atomic;
mod batch;
mod canary;
mod check;
mod close;
mod compress;
mod consume;
mod controls;
mod dead;
mod dead_letters;
mod dead_rate;
#[cfg_attr(
    not(feature = "journal"),
    allow(dead_code, reason = "only the journal brings windows back")
)]
mod dedup;
mod found;
mod gradual;
mod group;
#[cfg_attr(
    not(feature = "journal"),
    allow(dead_code, reason = "only the journal keeps handled ids")
)]
mod handled;
mod handover;
mod health;
mod intake;
#[cfg(feature = "journal")]
mod keep;
mod lane;
mod long_running;
mod metrics;
pub mod operator;
mod publish;
mod publisher;
mod relay;
#[cfg(feature = "journal")]
mod remember;
mod replay;
mod resting;
pub mod route;
pub mod schedule;
#[cfg(feature = "schema")]
mod schemas;
#[cfg(test)]
mod simulation;
mod span;
mod spool;
pub mod state;
mod transform;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{broadcast, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use crate::breaker;

use self::{
    accepted::Accepted,
    breaker::Breaker,
    controls::Rules,
    dead::DeadLetters,
    group::Group,
    health::Health,
    lane::{
        machine::Local,
        task::{LaneHandle, Readers},
    },
    publish::TopicEntry,
    route::{DuringOutage, RetryBy, Route, RouteKind, RouteSettings, RouteTable},
    spool::{Budget, codec::LaneName},
    state::{CanaryState, StateChange, Weakness},
};
use crate::{
    broker::{BrokerType, ConsumerControl, MessageBroker, Transactor},
    dead_letter::Desk,
    error::{Error, ErrorCode, Result},
    metrics::MetricsRecorder,
    replay::Registry,
    topic::{Pattern, Topic},
    topology::Topology,
};

pub use crate::config::HubSettings as HubConfig;
#[cfg(feature = "journal")]
pub use adopt::Adopted;
pub use atomic::{Transaction, Transactions};
pub use close::CloseReport;
pub use dead_rate::DeadLetterRate;
#[cfg(feature = "journal")]
pub use keep::SpoolFound;
pub use metrics::HubMetrics;
pub use publisher::{Pending, Publisher};
pub use schedule::TaskScheduler;

/// One API over all brokers. Clones are the same hub.
#[derive(Clone)]
pub struct MessagingHub(Arc<Inner>);

struct Inner {
    config: HubConfig,
    topology: Arc<Topology>,
    max_message_bytes: usize,
    brokers: Mutex<Brokers>,
    routes: Mutex<Arc<RouteTable>>,
    topics: Mutex<HashMap<String, Arc<TopicEntry>>>,
    /// Counts how often brokers were plugged in, for whoever remembers what was
    /// resolved.
    epoch: AtomicU64,
    lanes: Mutex<HashMap<LaneName, Arc<LaneHandle>>>,
    /// Lanes of brokers that were replaced, until what they hold is moved.
    retired: Mutex<Vec<close::Ending>>,
    budget: Arc<Budget>,
    /// Where spools are kept; none: in memory.
    #[cfg(feature = "journal")]
    spool_log: Mutex<Option<Arc<spool::journal::SpoolLog>>>,
    /// Where what groups handled is kept; none: in memory.
    #[cfg(feature = "journal")]
    memory: Mutex<Option<remember::Memory>>,
    dead: Mutex<Option<(DeadLetters, JoinHandle<close::Left>)>>,
    /// What is remembered of dead letters between two looks.
    desk: Arc<Desk>,
    /// How many of the messages end there lately.
    dead_rate: Mutex<dead_rate::DeadRate>,
    accepted: Arc<Accepted>,
    /// The hub's own way to publish batches as one; none before the first.
    transactor: Mutex<Option<Transactor>>,
    groups: Mutex<HashMap<String, Arc<Group>>>,
    readers: Arc<watch::Sender<Readers>>,
    /// What operators want of lanes.
    controls: watch::Sender<Arc<Rules>>,
    changes: broadcast::Sender<StateChange>,
    recorder: Arc<MetricsRecorder>,
    health: Mutex<HashMap<BrokerType, Arc<Health>>>,
    /// What the canaries of routes last showed.
    canaries: Mutex<HashMap<Pattern, watch::Receiver<CanaryState>>>,
    drain_rates: Mutex<metrics::DrainRates>,
    subscriptions: Mutex<Vec<Running>>,
    replays: Mutex<Registry>,
    /// What routes want of their payloads.
    #[cfg(feature = "schema")]
    guards: Mutex<crate::schema::guard::Guards>,
    /// What waits for its time; none before the first.
    schedule: Mutex<Option<schedule::Scheduler>>,
    /// Where that is kept; none: in memory.
    #[cfg(feature = "journal")]
    schedule_log: Mutex<Option<Arc<spool::journal::SpoolLog>>>,
    weakened: Mutex<Vec<Weakness>>,
    tasks: TaskTracker,
    closing: CancellationToken,
    /// Every lane has ended, or nobody waits for one: no broker is waited for.
    abandoned: CancellationToken,
    closed: OnceLock<close::Closing>,
    next: AtomicU64,
    fallback_usages: Arc<AtomicU64>,
}

impl Drop for Inner {
    /// A hub that is dropped without being closed ends its tasks all the same:
    /// lanes finish what is in flight and let go of the spool.
    fn drop(&mut self) {
        self.closing.cancel();
        self.abandoned.cancel();
    }
}

/// The brokers that were plugged in.
#[derive(Clone, Default)]
struct Brokers {
    task: Option<Arc<dyn MessageBroker>>,
    event: Option<Arc<dyn MessageBroker>>,
    fallback: Option<Arc<dyn MessageBroker>>,
}

/// What is needed to end a subscription.
#[derive(Clone)]
struct Running {
    pattern: Pattern,
    control: ConsumerControl,
    give_up: CancellationToken,
    ended: CancellationToken,
}

/// State changes that a slow listener may be behind before it misses some.
const CHANGES_BOUND: usize = 1024;

/// Largest payload when nothing else is said: 10 MiB, what the largest topics
/// of the default topology take.
pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 10 * 1024 * 1024;

impl MessagingHub {
    /// A hub without brokers. Plug them in before publishing.
    #[must_use]
    pub fn new(config: HubConfig, topology: Topology) -> Self {
        Self::with_limits(config, Arc::new(topology), DEFAULT_MAX_MESSAGE_BYTES)
    }

    /// A hub without brokers, with the largest payload that any entrance takes.
    #[must_use]
    pub fn with_limits(
        config: HubConfig,
        topology: Arc<Topology>,
        max_message_bytes: usize,
    ) -> Self {
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let budget = Arc::new(Budget::new(
            size(config.spool.max_messages),
            size(config.spool.max_bytes),
        ));
        let accepted = Arc::new(Accepted::new(&config.intake_window));
        let controls = watch::channel(Arc::new(Rules::new(config.spool.drain_rate))).0;
        Self(Arc::new(Inner {
            config,
            topology,
            max_message_bytes,
            brokers: Mutex::default(),
            routes: Mutex::default(),
            topics: Mutex::default(),
            epoch: AtomicU64::new(0),
            lanes: Mutex::default(),
            retired: Mutex::default(),
            budget,
            #[cfg(feature = "journal")]
            spool_log: Mutex::default(),
            #[cfg(feature = "journal")]
            memory: Mutex::default(),
            dead: Mutex::default(),
            desk: Arc::default(),
            dead_rate: Mutex::default(),
            accepted,
            transactor: Mutex::default(),
            groups: Mutex::default(),
            readers: Arc::new(watch::channel(Readers::default()).0),
            controls,
            changes: broadcast::channel(CHANGES_BOUND).0,
            recorder: Arc::default(),
            health: Mutex::default(),
            canaries: Mutex::default(),
            drain_rates: Mutex::default(),
            subscriptions: Mutex::default(),
            replays: Mutex::default(),
            #[cfg(feature = "schema")]
            guards: Mutex::default(),
            schedule: Mutex::default(),
            #[cfg(feature = "journal")]
            schedule_log: Mutex::default(),
            weakened: Mutex::default(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            closed: OnceLock::new(),
            next: AtomicU64::new(1),
            fallback_usages: Arc::default(),
        }))
    }

    /// Plugs in the broker for tasks. Within a Tokio runtime.
    pub fn set_task_queue_broker(&self, broker: Arc<dyn MessageBroker>) {
        self.plug(|b| b.task = Some(broker));
    }

    /// Plugs in the broker for events. Within a Tokio runtime.
    pub fn set_event_stream_broker(&self, broker: Arc<dyn MessageBroker>) {
        self.plug(|b| b.event = Some(broker));
    }

    /// Plugs in the fallback: it serves routes that have no other broker, and
    /// keeps dead letters of the spool.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for any broker but the embedded one: no other can hold
    /// a spool.
    pub fn set_fallback_broker(&self, broker: Arc<dyn MessageBroker>) -> Result<()> {
        if broker.broker_type() != BrokerType::InMemory {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "{} cannot be the fallback: it has no spool; use the embedded broker",
                    broker.broker_type()
                ),
            ));
        }
        let (dead, task) = DeadLetters::start(broker.clone());
        *lock(&self.0.dead) = Some((dead, task));
        self.plug(|b| b.fallback = Some(broker));
        Ok(())
    }

    fn plug(&self, change: impl FnOnce(&mut Brokers)) {
        let mut brokers = lock(&self.0.brokers);
        change(&mut brokers);
        let table = self.table(&brokers);
        *lock(&self.0.routes) = Arc::new(table);
        drop(brokers);
        // What was resolved before may belong to another broker now.
        lock(&self.0.topics).clear();
        // From here on no lane is made for what was resolved before; those that
        // were are swept below.
        self.0.epoch.fetch_add(1, Release);
        // Lanes to a broker that was replaced end once what they hold is moved; who
        // closes the hub before that waits for them and counts what they have.
        let replaced = std::mem::take(&mut *lock(&self.0.lanes));
        let mut retired = lock(&self.0.retired);
        retired.retain(|lane| !lane.has_ended());
        retired.extend(replaced.values().map(|lane| close::Ending::of(lane)));
        drop(retired);
        self.watch_health();
        self.watch_dead_letters();
        self.fly_canaries();
    }

    /// Starts the canary of each route that has none yet.
    fn fly_canaries(&self) {
        let routes = self.0.config.effective_routes().into_iter();
        for (settings, pattern) in routes.filter_map(|r| Some((r.canary?, r.pattern))) {
            let table = lock(&self.0.routes).clone();
            let Some(route) = table.all().iter().find(|r| r.pattern == pattern) else {
                continue;
            };
            let Some(broker) = self.broker(route.primary) else {
                continue;
            };
            // In this process there is nothing on the way that could break.
            let embedded = route.primary == BrokerType::InMemory;
            if embedded || lock(&self.0.canaries).contains_key(&pattern) {
                continue;
            }
            let (state, shown) = watch::channel(CanaryState::default());
            lock(&self.0.canaries).insert(pattern, shown);
            self.0.tasks.spawn(canary::fly(canary::Parts {
                route: route.pattern.to_string(),
                kind: route.kind,
                broker,
                settings,
                state,
                closing: self.0.closing.clone(),
            }));
        }
    }

    /// Starts a prober for each broker that has none.
    fn watch_health(&self) {
        for broker in self.all_brokers() {
            let kind = broker.broker_type();
            if kind == BrokerType::InMemory || lock(&self.0.health).contains_key(&kind) {
                continue;
            }
            let breaker = &self.0.config.breaker;
            let health = Arc::new(Health::new(Breaker::new(
                breaker.threshold,
                breaker.timeout,
            )));
            lock(&self.0.health).insert(kind, health.clone());
            self.0.tasks.spawn(health::probe(
                broker,
                health,
                self.0.config.health_check_interval,
                // A lane that waits for its broker while the hub closes needs the
                // breaker to half-open.
                self.0.abandoned.clone(),
            ));
        }
    }

    /// The routes as the plugged-in brokers allow them.
    fn table(&self, brokers: &Brokers) -> RouteTable {
        let by_kind = |kind| match kind {
            RouteKind::Task => brokers.task.as_ref().or(brokers.fallback.as_ref()),
            RouteKind::Event => brokers.event.as_ref().or(brokers.fallback.as_ref()),
        };
        let settings = self.0.config.effective_routes();
        // Whatever covers everything must not decide where failed events rest.
        let rests = settings.iter().any(|r| r.retry_by == RetryBy::Topic);
        let resting = rests.then(|| Pattern::new(resting::PATTERN).ok()).flatten();
        let routes = resting
            .map(|pattern| RouteSettings::new(pattern, RouteKind::Event))
            .into_iter()
            .chain(settings)
            .filter_map(|r| {
                let primary = match r.primary {
                    Some(kind) => Some(kind),
                    None => by_kind(r.kind).map(|b| b.broker_type()),
                }?;
                let spool = r.spool
                    && self.0.config.fallback_enabled
                    && self.0.config.use_fallback_on_error
                    && brokers.fallback.is_some()
                    && primary != BrokerType::InMemory;
                let during_outage = r.effective_during_outage();
                Some(Route {
                    pattern: r.pattern,
                    kind: r.kind,
                    primary,
                    spool,
                    during_outage,
                    retry_delay: r.retry_delay,
                    retry_by: r.retry_by,
                    long_running: r.long_running,
                    compression: r.compression,
                })
            });
        RouteTable::new(routes.collect())
    }

    /// Whether a topic is for tasks or for events: queues and streams of the
    /// topology are what they are, other names are decided by the routes.
    #[must_use]
    pub fn kind_of(&self, topic: &str) -> RouteKind {
        let name = self.0.topology.canonical(topic);
        lock(&self.0.routes)
            .find(name)
            .map_or(RouteKind::Event, |(_, r)| r.kind)
    }

    /// The same of what a pattern covers: of the first route whose topics begin as the
    /// pattern does.
    #[must_use]
    pub fn kind_of_pattern(&self, pattern: &Pattern) -> RouteKind {
        match pattern.literal() {
            Some(topic) => self.kind_of(&topic),
            None => self
                .route_of(pattern)
                .map_or(RouteKind::Event, |route| route.kind),
        }
    }

    /// Notes which guarantees the configuration weakens, for `/v1/state`.
    pub fn set_weakened(&self, weakened: Vec<Weakness>) {
        *lock(&self.0.weakened) = weakened;
    }

    /// State changes of all lanes, from now on. A listener that falls more than
    /// 1,024 behind is told how many it missed.
    #[must_use]
    pub fn state_changes(&self) -> broadcast::Receiver<StateChange> {
        self.0.changes.subscribe()
    }

    /// Whether publishes are accepted.
    #[must_use]
    pub fn is_accepting(&self) -> bool {
        !self.0.closing.is_cancelled()
            && (!lock(&self.0.routes).all().is_empty())
            && self.0.brokers_ready()
    }

    /// Whether [`MessagingHub::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closing.is_cancelled()
    }

    /// Where the hub counts.
    #[must_use]
    pub fn recorder(&self) -> &Arc<MetricsRecorder> {
        &self.0.recorder
    }

    /// What should exist on the brokers.
    #[must_use]
    pub fn wanted_topology(&self) -> &Arc<Topology> {
        &self.0.topology
    }

    /// The largest payload that is accepted, in bytes.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        self.0.max_message_bytes
    }

    fn broker(&self, kind: BrokerType) -> Option<Arc<dyn MessageBroker>> {
        let brokers = lock(&self.0.brokers);
        [&brokers.task, &brokers.event, &brokers.fallback]
            .into_iter()
            .flatten()
            .find(|b| b.broker_type() == kind)
            .cloned()
    }

    fn all_brokers(&self) -> Vec<Arc<dyn MessageBroker>> {
        let brokers = lock(&self.0.brokers).clone();
        let mut all: Vec<Arc<dyn MessageBroker>> = Vec::new();
        for broker in [brokers.task, brokers.event, brokers.fallback]
            .into_iter()
            .flatten()
        {
            if !all.iter().any(|b| b.broker_type() == broker.broker_type()) {
                all.push(broker);
            }
        }
        all
    }

    fn number(&self) -> u64 {
        self.0.next.fetch_add(1, Relaxed)
    }

    /// Where spools are kept: without the journal, in memory.
    #[cfg(not(feature = "journal"))]
    #[allow(clippy::unused_self)]
    fn store(&self) -> Option<Arc<dyn spool::store::SpoolStore>> {
        None
    }

    /// A group that has handled nothing yet: without the journal, in memory.
    #[cfg(not(feature = "journal"))]
    fn new_group(&self, name: &str) -> Group {
        Group::new(consume::stream_group(name), &self.0.config.dedup_window)
    }

    fn check_open(&self) -> Result<()> {
        if self.0.closing.is_cancelled() {
            return Err(shutting_down());
        }
        Ok(())
    }

    /// The topic's full name.
    fn canonical(&self, topic: &str) -> Result<Topic> {
        Topic::new(self.0.topology.canonical(topic))
    }
}

impl Inner {
    /// Without a fallback a publish is accepted only while its broker is there.
    fn brokers_ready(&self) -> bool {
        let brokers = lock(&self.brokers);
        let spool = self.config.fallback_enabled
            && self.config.use_fallback_on_error
            && brokers.fallback.is_some();
        let mut primaries = [&brokers.task, &brokers.event].into_iter().flatten();
        // Without any other broker the embedded one is the primary.
        spool || primaries.all(|b| b.is_connected())
    }
}

impl fmt::Debug for MessagingHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessagingHub")
            .field("lanes", &lock(&self.0.lanes).len())
            .finish_non_exhaustive()
    }
}

/// Waits for work that is under way, if there is any.
async fn pending<T>(work: &mut Option<BoxFuture<'_, T>>) -> T {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

fn shutting_down() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the hub is shutting down and accepts nothing new",
    )
}

/// Locks a mutex; what it guards is whole even after a panic elsewhere, because
/// nothing under these locks can panic half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which local handlers may take spooled messages of a route.
fn local_of(route: &Route) -> Local {
    match route.kind {
        _ if !route.spool || route.during_outage == DuringOutage::Hold => Local::Nobody,
        RouteKind::Task => Local::Consumers,
        RouteKind::Event => Local::Groups,
    }
}
