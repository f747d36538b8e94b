//! Leaving well (C11): intake stops, what is in hand is finished or given
//! back, lanes flush, and what stays behind is counted.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use serde::Serialize;
use tokio::task::JoinHandle;

use super::{
    MessagingHub,
    lane::task::{LaneHandle, Status},
    lock,
};

/// What a close left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CloseReport {
    /// Accepted messages that were in a memory spool and are gone with it.
    pub left_in_memory_spool: u64,
    /// Accepted messages that are on the disk for the next process.
    pub left_in_journal: u64,
    /// Scheduled messages that wait in the data folder for the next process. Those
    /// that are in memory only count as left in the memory spool.
    pub scheduled: u64,
    /// Subscriptions whose handlers outlived the grace period; their messages
    /// were given back.
    pub handlers_given_up: u64,
}

/// Accepted messages that stay behind when a task of the hub ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// In memory only: lost with the process.
    pub(super) in_memory: u64,
    /// On the disk, for the next process.
    pub(super) kept: u64,
}

/// A closing that has begun, for everybody who waits for it.
pub(super) type Closing = Shared<BoxFuture<'static, CloseReport>>;

/// A lane that takes nothing more in. Its intake is not kept: the lane ends when all
/// of that is gone.
pub(super) struct Ending {
    join: Option<JoinHandle<()>>,
    status: Arc<Status>,
    durable: bool,
}

impl Ending {
    pub(super) fn of(lane: &LaneHandle) -> Self {
        Self {
            join: lock(&lane.join).take(),
            status: lane.status.clone(),
            durable: lane.durable,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.join.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// What closing the files in the data folder gets at least.
#[cfg(feature = "journal")]
const CLOSE_SLACK: Duration = Duration::from_secs(5);

/// Share of the grace period that handlers get; the rest is for lanes and
/// brokers.
const HANDLERS_SHARE: f64 = 0.6;

/// Share of the grace period that replays get for what they have under way.
const REPLAYS_SHARE: f64 = 0.2;

impl MessagingHub {
    /// Stops intake, finishes or hands back work, flushes and closes every
    /// broker, within `grace`. What a memory spool holds is moved to its broker,
    /// and one that is away is waited for as long. Later calls wait for the first
    /// and get its report.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the report; the closing goes on, in a task of its
    /// own.
    pub async fn close(&self, grace: Duration) -> CloseReport {
        let closing = self.0.closed.get_or_init(|| {
            let hub = self.clone();
            let task = tokio::spawn(async move { hub.close_once(grace).await });
            let report = async move {
                task.await.unwrap_or_else(|error| {
                    tracing::error!(%error, "the hub's closing ended without a report");
                    CloseReport::default()
                })
            };
            report.boxed().shared()
        });
        closing.clone().await
    }

    async fn close_once(&self, grace: Duration) -> CloseReport {
        let start = tokio::time::Instant::now();
        let mut report = CloseReport::default();
        // First: what they publish takes room in the lanes from what is waited for.
        self.stop_replays(start + grace.mul_f64(REPLAYS_SHARE))
            .await;
        let running = lock(&self.0.subscriptions).clone();
        for one in &running {
            one.control.begin_stop();
        }
        let patience = start + grace.mul_f64(HANDLERS_SHARE);
        for one in &running {
            if tokio::time::timeout_at(patience, one.ended.cancelled())
                .await
                .is_err()
            {
                one.give_up.cancel();
                // A handler that blocks its thread cannot be stopped at all.
                let _ = tokio::time::timeout_at(start + grace, one.ended.cancelled()).await;
                report.handlers_given_up += 1;
            }
        }
        // Handlers may publish until they have ended; from here nobody may. What is
        // scheduled and under way needs its lanes until it is there.
        let scheduled = self
            .stop_scheduler(start + grace.mul_f64(HANDLERS_SHARE + REPLAYS_SHARE))
            .await;
        report.left_in_memory_spool += scheduled.in_memory;
        report.scheduled = scheduled.kept;
        self.0.closing.cancel();
        // One that began since: from here on none can.
        let late = self.stop_scheduler(start + grace).await;
        report.left_in_memory_spool += late.in_memory;
        report.scheduled += late.kept;
        let mut lanes: Vec<Ending> = lock(&self.0.retired).drain(..).collect();
        lanes.extend(lock(&self.0.lanes).values().map(|lane| Ending::of(lane)));
        for lane in lanes {
            if let Some(mut join) = lane.join
                && tokio::time::timeout_at(start + grace, &mut join)
                    .await
                    .is_err()
            {
                join.abort();
                let _ = join.await;
            }
            let left = lane.status.messages.load(Relaxed);
            if lane.durable {
                let unkept = lane.status.unkept.load(Relaxed).min(left);
                report.left_in_journal += left - unkept;
                report.left_in_memory_spool += unkept;
            } else {
                report.left_in_memory_spool += left;
            }
        }
        lock(&self.0.lanes).clear();
        self.0.abandoned.cancel();
        self.0.tasks.close();
        // Spans end when their deliveries are settled; what a caller still
        // holds is given back by the broker's own close.
        let _ = tokio::time::timeout_at(start + grace, self.0.tasks.wait()).await;
        let dead = lock(&self.0.dead).take();
        if let Some((letters, task)) = dead {
            drop(letters);
            if let Ok(Ok(left)) = tokio::time::timeout_at(start + grace, task).await {
                report.left_in_memory_spool += left.in_memory;
                report.left_in_journal += left.kept;
            }
        }
        // Nothing is handled after the spans.
        #[cfg(feature = "journal")]
        self.close_memory(start + grace.max(CLOSE_SLACK)).await;
        // The dead letters' task was the last that lets go of spooled messages.
        #[cfg(feature = "journal")]
        let closing = async {
            self.close_spool().await;
            self.close_schedule().await;
        };
        #[cfg(feature = "journal")]
        if tokio::time::timeout_at(start + grace.max(CLOSE_SLACK), closing)
            .await
            .is_err()
        {
            tracing::error!("the data folder's disk does not answer; left as it is");
        }
        for broker in self.all_brokers() {
            if let Err(error) = broker.close().await {
                tracing::warn!(broker = %broker.broker_type(), %error, "a broker did not close cleanly");
            }
        }
        if report.left_in_journal > 0 {
            tracing::warn!(
                messages = report.left_in_journal,
                "spooled messages stay in the data folder; the next start goes on with them"
            );
        }
        if report.scheduled > 0 {
            tracing::info!(
                messages = report.scheduled,
                "scheduled messages stay in the data folder; the next start goes on with them"
            );
        }
        if report.left_in_memory_spool > 0 {
            tracing::error!(
                messages = report.left_in_memory_spool,
                "accepted messages were left in memory, spooled or scheduled, and are lost with this process"
            );
        }
        report
    }
}
