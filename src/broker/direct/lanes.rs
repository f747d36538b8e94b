//! The lanes that are open: found, opened, evicted, closed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OnceCell, mpsc},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{call::Job, lane_task};
use crate::{
    broker::{Compression, LaneOptions, MessageBroker},
    error::{Error, ErrorCode, Result},
    topic::Topic,
};

/// What makes messages go through the same lane.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LaneKey {
    pub(super) topic: Topic,
    pub(super) lane: u32,
    pub(super) mandatory: bool,
    pub(super) confirm: bool,
    pub(super) compression: Option<Compression>,
    pub(super) address: Option<(String, String)>,
}

/// Room for one chunk in a lane's intake.
pub(super) type Room = mpsc::OwnedPermit<Vec<Job>>;

#[derive(Debug, Default)]
pub(super) struct Lanes {
    open: Mutex<Open>,
    tasks: TaskTracker,
    /// Asks every lane to finish what it has and end.
    retire: CancellationToken,
    /// Ends the patience with lanes that do not answer.
    kill: CancellationToken,
}

#[derive(Debug, Default)]
struct Open {
    closed: bool,
    /// One cell for each lane, so that a lane is opened once however many
    /// publishes want it. A cell stays while its lane ends: the next lane of the
    /// same key waits for that, or it could overtake.
    cells: HashMap<LaneKey, Slot>,
}

#[derive(Debug)]
struct Slot {
    cell: Arc<OnceCell<LaneHandle>>,
    used: Instant,
}

#[derive(Clone, Debug)]
struct LaneHandle {
    intake: mpsc::Sender<Vec<Job>>,
    /// Asks the task to finish what it has and end.
    retire: CancellationToken,
    /// Cancelled when the task has ended.
    ended: CancellationToken,
}

impl Lanes {
    /// Waits for room in the lane, which is opened when it is not there.
    pub(super) async fn room(
        &self,
        broker: &dyn MessageBroker,
        key: &LaneKey,
        options: &LaneOptions,
    ) -> Result<Room> {
        loop {
            let cell = self.cell(broker, key).await?;
            let handle = match cell.get() {
                Some(handle) => handle,
                None => {
                    cell.get_or_try_init(|| self.open_lane(broker, key, options))
                        .await?
                }
            };
            if let Ok(room) = handle.intake.clone().reserve_owned().await {
                return Ok(room);
            }
            handle.ended.cancelled().await;
            let mut open = self.lock();
            if open
                .cells
                .get(key)
                .is_some_and(|slot| Arc::ptr_eq(&slot.cell, &cell))
            {
                open.cells.remove(key);
            }
        }
    }

    pub(super) async fn close(&self, grace: Duration) {
        self.lock().closed = true;
        self.retire.cancel();
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait())
            .await
            .is_err()
        {
            self.kill.cancel();
            self.tasks.wait().await;
        }
    }

    /// The cell of a lane, made when there is none and fewer than
    /// [`MAX_LANES`] are open; else the one that was used least recently ends
    /// first.
    async fn cell(
        &self,
        broker: &dyn MessageBroker,
        key: &LaneKey,
    ) -> Result<Arc<OnceCell<LaneHandle>>> {
        loop {
            let evicted = {
                let mut open = self.lock();
                if open.closed {
                    return Err(closed().at(broker.broker_type()));
                }
                if let Some(slot) = open.cells.get_mut(key) {
                    slot.used = Instant::now();
                    return Ok(slot.cell.clone());
                }
                match open.evict() {
                    Some(handle) => handle,
                    None => {
                        let cell = Arc::new(OnceCell::new());
                        let slot = Slot {
                            cell: cell.clone(),
                            used: Instant::now(),
                        };
                        open.cells.insert(key.clone(), slot);
                        return Ok(cell);
                    }
                }
            };
            evicted.retire.cancel();
            evicted.ended.cancelled().await;
        }
    }

    async fn open_lane(
        &self,
        broker: &dyn MessageBroker,
        key: &LaneKey,
        options: &LaneOptions,
    ) -> Result<LaneHandle> {
        let away = |reason: String| {
            Error::new(
                ErrorCode::BrokerUnavailable,
                format!("there is no connection ({reason}); the message was not sent, so it can be published again later"),
            )
            .at(broker.broker_type())
        };
        let state = broker.connection().borrow().clone();
        if !state.connected {
            let reason = state.reason.as_deref().unwrap_or("not connected yet");
            return Err(away(reason.to_owned()));
        }
        let lane = match broker.open_lane(&key.topic, key.lane, options).await {
            Ok(lane) => lane,
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => return Err(away(error.message().to_owned()).caused_by(error)),
        };
        let (intake, jobs) = mpsc::channel(INTAKE_CHUNKS);
        let handle = LaneHandle {
            intake,
            retire: self.retire.child_token(),
            ended: CancellationToken::new(),
        };
        let task = lane_task::LaneTask::new(
            lane,
            jobs,
            options.window,
            handle.retire.clone(),
            self.kill.clone(),
            broker.recorder().clone(),
        );
        let ended = handle.ended.clone().drop_guard();
        // Checked and spawned under one lock: a close waits for this task, or it
        // is never spawned.
        let open = self.lock();
        if open.closed {
            return Err(closed().at(broker.broker_type()));
        }
        self.tasks.spawn(async move {
            let _ended = ended;
            task.run().await;
        });
        Ok(handle)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Forgets lanes that have ended; when there are still too many, names one
    /// that must end before another is opened.
    fn evict(&mut self) -> Option<LaneHandle> {
        if self.cells.len() < MAX_LANES {
            return None;
        }
        // A cell that nobody else has and that holds nothing is a lane that
        // could not be opened. Cells are cloned under the lock only.
        self.cells.retain(|_, slot| match slot.cell.get() {
            Some(handle) => !handle.ended.is_cancelled(),
            None => Arc::strong_count(&slot.cell) > 1,
        });
        if self.cells.len() < MAX_LANES {
            return None;
        }
        self.cells
            .values()
            .filter_map(|slot| slot.cell.get().map(|handle| (slot.used, handle)))
            .min_by_key(|(used, _)| *used)
            .map(|(_, handle)| handle.clone())
    }
}

fn closed() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the broker is closed; nothing can be published any more",
    )
}

/// Lanes that may be open at once.
pub(super) const MAX_LANES: usize = 1024;
/// Chunks, of `batch_size` messages at most, that may wait for a lane's task.
const INTAKE_CHUNKS: usize = 16;
