//! The shell around the state: one lock that is held for a batch and never
//! across an await, the clock, the timer task and the end of it all.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    sync::{Notify, watch},
    time::Duration,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

#[cfg(feature = "journal")]
use super::store::Store;
use super::{clock::Clock, config::EmbeddedConfig, durable::Mark, state::State};
use crate::{
    broker::{BrokerType, ConnectionState},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
    metrics::MetricsRecorder,
    topology::Topology,
};

/// What the broker's tasks share.
pub(super) struct Shared {
    state: Mutex<State>,
    clock: Clock,
    timer: Notify,
    started: AtomicBool,
    pub(super) closed: CancellationToken,
    pub(super) tasks: TaskTracker,
    pub(super) recorder: Arc<MetricsRecorder>,
    pub(super) topology: Arc<Topology>,
    pub(super) config: EmbeddedConfig,
    pub(super) connection: watch::Sender<ConnectionState>,
    /// The journals, once connected, where there are any.
    #[cfg(feature = "journal")]
    pub(super) store: tokio::sync::OnceCell<Store>,
}

impl Shared {
    pub(super) fn new(config: EmbeddedConfig, topology: Arc<Topology>) -> Self {
        let recorder = Arc::new(MetricsRecorder::default());
        Self {
            state: Mutex::new(State::new(
                config.clone(),
                topology.clone(),
                recorder.clone(),
            )),
            clock: Clock::new(),
            timer: Notify::new(),
            started: AtomicBool::new(false),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            recorder,
            topology,
            config,
            connection: watch::channel(ConnectionState::default()).0,
            #[cfg(feature = "journal")]
            store: tokio::sync::OnceCell::new(),
        }
    }

    /// One step of the state, under its lock; wakes whom it woke afterwards.
    pub(super) fn step<R>(&self, step: impl FnOnce(&mut State, Timestamp) -> R) -> R {
        self.step_marked(step).0
    }

    /// One step of the state, and what it wrote to the logs.
    pub(super) fn step_marked<R>(
        &self,
        step: impl FnOnce(&mut State, Timestamp) -> R,
    ) -> (R, Mark) {
        let now = self.clock.now();
        // A panic inside a step is a bug, but one that must not take every
        // queue of the process with it.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.mark();
        let result = step(&mut state, now);
        state.flush();
        let mark = state.mark().since(before);
        let (wakes, rearm) = state.take_wakes();
        drop(state);
        for wake in wakes {
            wake.notify_one();
        }
        if rearm {
            self.timer.notify_one();
        }
        (result, mark)
    }

    /// One step of the state that is answered when it survives a restart.
    ///
    /// # Errors
    /// Those of the step; `BROKER_UNAVAILABLE` with an unknown outcome when the
    /// journal fails before it is synced.
    ///
    /// # Cancel safety
    /// The step is done before the first await.
    pub(super) async fn durably<R>(
        &self,
        step: impl FnOnce(&mut State, Timestamp) -> Result<R>,
    ) -> Result<R> {
        let (result, mark) = self.step_marked(step);
        let value = result?;
        self.synced(mark, ErrorCode::BrokerUnavailable).await?;
        Ok(value)
    }

    /// Waits until what a step wrote is synced.
    ///
    /// # Errors
    /// The code given, with an unknown outcome: the journal failed before.
    ///
    /// # Cancel safety
    /// Dropping the future abandons only the waiting.
    pub(super) async fn synced(&self, mark: Mark, code: ErrorCode) -> Result<()> {
        if mark.is_nothing() {
            return Ok(());
        }
        #[cfg(feature = "journal")]
        if let Some(store) = self.store.get() {
            store.synced(mark).await.map_err(|cause| {
                Error::unknown(
                    code,
                    format!("it was written and may be lost with this process: {cause}"),
                )
                .at(BrokerType::InMemory)
            })?;
        }
        let _ = code;
        Ok(())
    }

    /// The broker's now.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Whether operations are possible.
    ///
    /// # Errors
    /// `OPERATION_CANCELED` after close, `CONNECTION_CLOSED` before connect.
    pub(super) fn usable(&self) -> Result<()> {
        if self.closed.is_cancelled() {
            return Err(canceled());
        }
        if !self.connection.borrow().connected {
            return Err(Error::new(
                ErrorCode::ConnectionClosed,
                "the embedded broker is not connected; call connect first",
            )
            .at(BrokerType::InMemory));
        }
        Ok(())
    }

    /// Starts the timer task, once. Whether this was the first time.
    pub(super) fn start(self: &Arc<Self>) -> bool {
        if self.started.swap(true, Ordering::AcqRel) {
            return false;
        }
        let shared = self.clone();
        self.tasks.spawn(async move {
            let closed = shared.closed.clone();
            tokio::select! {
                () = closed.cancelled() => {}
                () = shared.run_timer() => {}
            }
        });
        true
    }

    /// Runs what time brings when it is due. A step that makes something due
    /// earlier rearms it; the permit of `Notify` covers a rearm that comes
    /// between the tick and the wait.
    async fn run_timer(&self) {
        loop {
            let wait = self.step(|state, now| {
                state
                    .tick(now)
                    .map_or(LONGEST_WAIT, |at| at.since(now).min(LONGEST_WAIT))
            });
            tokio::select! {
                () = self.timer.notified() => {}
                // At least a millisecond, the clock's own grain, so that a due
                // time within it does not spin.
                () = tokio::time::sleep(wait.max(Duration::from_millis(1))) => {}
            }
        }
    }
}

/// What everything answers after close.
pub(super) fn canceled() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the embedded broker is closed",
    )
    .at(BrokerType::InMemory)
}

/// The timer looks at the clock at least this often, because the wall clock
/// may jump (a machine that slept).
const LONGEST_WAIT: Duration = Duration::from_secs(60);
