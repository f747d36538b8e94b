//! What all parts of the adapter share: settings, the connection that stands,
//! what was declared, and how everything ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{RabbitMqConfig, error, link::Link, topology, watchdog::Roll};
use crate::{
    broker::{ConnectionState, QueueOptions},
    error::Result,
    metrics::MetricsRecorder,
    topology::{Topology, TopologyMode, TopologyReport},
};

/// Shared by the broker, its supervisor, lanes and consumers.
pub(super) struct Shared {
    pub(super) config: RabbitMqConfig,
    /// What was configured, with the retry and dead-letter objects added.
    pub(super) topology: Topology,
    pub(super) mode: TopologyMode,
    pub(super) recorder: Arc<MetricsRecorder>,
    /// The connection's state as others see it.
    pub(super) state: watch::Sender<ConnectionState>,
    /// The connection that stands and whose topology was looked at.
    pub(super) link: watch::Sender<Option<Arc<Link>>>,
    /// Cancelled by close: everything ends.
    pub(super) closing: CancellationToken,
    /// Cancelled once nothing uses the connections any more.
    pub(super) hang_up: CancellationToken,
    /// Every lane, consumer and helper task.
    pub(super) tasks: TaskTracker,
    /// Counts changes of what was declared, for pattern subscriptions.
    pub(super) declarations: watch::Sender<u64>,
    /// Consumers that this process has, for the watchdogs.
    pub(super) roll: Roll,
    notes: Mutex<Notes>,
}

/// What is remembered from calls and connections.
#[derive(Default)]
struct Notes {
    declared: BTreeMap<String, QueueOptions>,
    streams: BTreeSet<String>,
    report: TopologyReport,
    version: Option<String>,
}

impl Shared {
    pub(super) fn new(config: RabbitMqConfig, wanted: &Topology, mode: TopologyMode) -> Self {
        Self {
            config,
            topology: topology::effective(wanted),
            mode,
            recorder: Arc::default(),
            state: watch::Sender::new(ConnectionState::default()),
            link: watch::Sender::new(None),
            closing: CancellationToken::new(),
            hang_up: CancellationToken::new(),
            tasks: TaskTracker::new(),
            declarations: watch::Sender::new(0),
            roll: Roll::default(),
            notes: Mutex::default(),
        }
    }

    /// The connection that stands now.
    ///
    /// # Errors
    /// `OPERATION_CANCELED` after close, else `CONNECTION_FAILED` with the
    /// reason.
    pub(super) fn current(&self) -> Result<Arc<Link>> {
        if self.closing.is_cancelled() {
            return Err(error::closed());
        }
        match self.link.borrow().as_ref() {
            Some(link) if !link.lost.is_cancelled() => Ok(link.clone()),
            _ => Err(error::unavailable(self.state.borrow().reason.as_deref())),
        }
    }

    /// The connection that follows one that is lost, if it stands within a time and
    /// nothing is closed meanwhile.
    ///
    /// Cancel safe.
    pub(super) async fn next_after(&self, lost: &Arc<Link>, within: Duration) -> Option<Arc<Link>> {
        let mut links = self.link.subscribe();
        let is_next = |link: &Option<Arc<Link>>| {
            let next = link.as_ref().filter(|l| !Arc::ptr_eq(l, lost));
            next.is_some_and(|l| !l.lost.is_cancelled())
        };
        let next = tokio::time::timeout(within, links.wait_for(is_next));
        tokio::select! {
            next = next => next.ok()?.ok()?.clone(),
            () = self.closing.cancelled() => None,
        }
    }

    /// Remembers a declared queue, to be declared again, exactly so, on every
    /// later connection.
    pub(super) fn remember_queue(&self, name: &str, options: &QueueOptions) {
        let before = self
            .notes()
            .declared
            .insert(name.to_owned(), options.clone());
        if before.is_none() {
            self.declarations.send_modify(|n| *n += 1);
        }
    }

    /// Forgets a deleted queue.
    pub(super) fn forget_queue(&self, name: &str) {
        self.notes().declared.remove(name);
        self.declarations.send_modify(|n| *n += 1);
    }

    /// Every remembered queue.
    pub(super) fn declared(&self) -> BTreeMap<String, QueueOptions> {
        self.notes().declared.clone()
    }

    /// Remembers that a topic is a stream although the topology does not say so.
    pub(super) fn remember_stream(&self, topic: &str) {
        self.notes().streams.insert(topic.to_owned());
    }

    /// Whether a topic was made known as a stream.
    pub(super) fn is_stream(&self, topic: &str) -> bool {
        self.topology.topic(topic).is_some() || self.notes().streams.contains(topic)
    }

    /// Whether a queue was declared through this broker.
    pub(super) fn is_declared(&self, queue: &str) -> bool {
        self.notes().declared.contains_key(queue)
    }

    pub(super) fn set_report(&self, report: TopologyReport) {
        self.notes().report = report;
    }

    pub(super) fn report(&self) -> TopologyReport {
        self.notes().report.clone()
    }

    pub(super) fn set_version(&self, version: String) {
        self.notes().version = Some(version);
    }

    pub(super) fn version(&self) -> Option<String> {
        self.notes().version.clone()
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.notes.lock().unwrap_or_else(|e| e.into_inner())
    }
}
