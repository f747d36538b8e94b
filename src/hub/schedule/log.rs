//! What is scheduled, in the data folder: a log of its own, since a message that
//! waits for a month would pin segments of anything else.

use std::{path::Path, sync::Arc};

use super::{
    super::{
        MessagingHub,
        keep::{DISK_EXTRA, DISK_FACTOR, blocking},
        lock,
        spool::{
            codec::Kept,
            journal::SpoolLog,
            store::{KeptId, SpoolStore},
        },
    },
    shelf::Waiting,
    task::Found,
};
use crate::{
    broker::Outcome,
    error::Result,
    message::{MessageId, Timestamp},
    topic::Topic,
};

/// The folder in a data folder.
const FOLDER: &str = "schedule";

/// What is in a log.
#[derive(Default)]
struct Left {
    found: Vec<Found>,
    /// Ids that a client may bring again.
    brought: Vec<(Topic, MessageId)>,
}

impl MessagingHub {
    /// Keeps what is scheduled in a data folder, and takes up what an earlier
    /// process left there; says how much that was. Call it after the brokers are
    /// plugged in and before the first publish. The folder is held until
    /// [`MessagingHub::close`].
    ///
    /// # Errors
    /// The folder cannot be written, is held by another process, or holds what
    /// cannot be read; or the hub has no fallback.
    pub async fn keep_schedule_in(&self, dir: &Path) -> Result<u64> {
        let max = self
            .0
            .config
            .schedule
            .max_bytes
            .saturating_mul(DISK_FACTOR)
            .saturating_add(DISK_EXTRA);
        let since = Timestamp::now() - self.0.config.intake_window.age;
        let folder = dir.join(FOLDER);
        let (log, left) = blocking(move || open(&folder, max, since)).await?;
        let count = left.found.len() as u64;
        let log = Arc::new(log);
        let store: Arc<dyn SpoolStore> = log.clone();
        self.start_scheduler(Some(store), left.found)?;
        *lock(&self.0.schedule_log) = Some(log);
        self.know_again(left.brought);
        if count > 0 {
            tracing::info!(messages = count, "scheduled by an earlier process");
        }
        Ok(count)
    }

    /// How many scheduled messages a data folder holds, for who does not take them
    /// up; 0 where there are none.
    ///
    /// # Errors
    /// It is held by another process, or cannot be read.
    pub(crate) async fn schedule_left_in(dir: &Path) -> Result<u64> {
        let folder = dir.join(FOLDER);
        if !folder.is_dir() {
            return Ok(0);
        }
        blocking(move || {
            let (log, left) = open(&folder, u64::MAX, Timestamp::now())?;
            log.close()?;
            Ok(left.found.len() as u64)
        })
        .await
    }

    /// Moves what is scheduled in another hub's data folder into this one.
    /// Says how many came, and how many stay there with the first reason.
    pub(in super::super) async fn adopt_schedule(
        &self,
        dir: &Path,
    ) -> Result<super::super::Adopted> {
        let folder = dir.join(FOLDER);
        let mut adopted = super::super::Adopted::default();
        if !folder.is_dir() {
            return Ok(adopted);
        }
        let (log, left) = blocking(move || open(&folder, u64::MAX, Timestamp::now())).await?;
        let log = Arc::new(log);
        for Found { id, .. } in left.found {
            match self.adopt_one(&log, id).await {
                Ok(()) => adopted.moved += 1,
                Err(error) => {
                    adopted.left += 1;
                    adopted.reason.get_or_insert_with(|| error.to_string());
                }
            }
        }
        blocking(move || log.close()).await?;
        Ok(adopted)
    }

    async fn adopt_one(&self, log: &Arc<SpoolLog>, id: KeptId) -> Result<()> {
        let reader = log.clone();
        let bodies = blocking(move || reader.read(&[id])).await?;
        let Some(body) = bodies.into_iter().next().flatten() else {
            return Ok(());
        };
        let Kept {
            lane, mut entry, ..
        } = super::super::spool::codec::decode(&body)?;
        let resolved = self.entry(&lane.topic)?;
        let due = entry.due.unwrap_or(entry.since);
        // It may have been on its way when that hub died.
        entry.marks.possible_duplicate |= due <= Timestamp::now();
        let patience = crate::broker::PublishOptions::default().timeout;
        let persistent = entry.message.is_persistent();
        let pending = self
            .schedule(&resolved, lane, entry, due, patience, None)
            .await?;
        let receipt = pending.await?;
        if persistent && receipt.outcome == (Outcome::Spooled { durable: false }) {
            return Err(super::super::adopt::in_memory());
        }
        log.write(Vec::new(), &[id]).map(drop)
    }

    /// Lets go of the folder. Nothing is scheduled after this.
    pub(in super::super) async fn close_schedule(&self) {
        let log = lock(&self.0.schedule_log).take();
        if let Some(log) = log
            && let Err(error) = blocking(move || log.close()).await
        {
            tracing::error!(%error, "what is scheduled was not closed cleanly");
        }
    }
}

/// Opens a log. Bodies stay on the disk. Blocks.
fn open(folder: &Path, max: u64, since: Timestamp) -> Result<(SpoolLog, Left)> {
    let mut left = Left::default();
    let log = SpoolLog::open_each(folder, max, |id, kept| note(&mut left, id, kept, since))?;
    Ok((log, left))
}

fn note(left: &mut Left, id: KeptId, kept: Kept, since: Timestamp) {
    let (topic, entry) = (kept.lane.topic, kept.entry);
    if !kept.generated && entry.marks.reprocess == 0 && entry.since >= since {
        left.brought.push((topic.clone(), entry.message.id.clone()));
    }
    let due = entry.due.unwrap_or(entry.since);
    left.found.push(Found {
        id,
        waiting: Waiting::of(&topic, &entry, due),
    });
}
