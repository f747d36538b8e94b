//! The hub's spool on the disk: opened before intake, what an earlier process
//! left goes back to its lanes first (C12), and its ids are known again (C14).

use std::{path::Path, sync::Arc};

use super::{
    MessagingHub,
    accepted::Offer,
    lock,
    spool::{
        journal::{FOLDER, Left, SpoolLog, Wanted},
        store::SpoolStore,
    },
};
use crate::{
    broker::{Outcome, Receipt},
    error::{Error, ErrorCode, Result},
    message::{MessageId, Timestamp},
    topic::Topic,
};

/// What was found in a spool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolFound {
    /// Messages that are drained, or handed out, from now on.
    pub taken_up: u64,
    /// Messages whose topic no broker serves now. They stay where they are.
    pub stranded: u64,
}

/// Disk for each byte that the spool may hold: records that are done stay until
/// their segment is.
pub(super) const DISK_FACTOR: u64 = 2;

/// Disk beyond that, for segments that are made ahead and for removals.
pub(super) const DISK_EXTRA: u64 = 256 * 1024 * 1024;

impl MessagingHub {
    /// Keeps what is spooled in a data folder, and takes up what an earlier
    /// process left there. Call it after the brokers are plugged in and before the
    /// first publish. The folder is held until [`MessagingHub::close`].
    ///
    /// # Errors
    /// The folder cannot be written, is held by another process, or holds what
    /// cannot be read; each says what to do.
    pub async fn keep_spool_in(&self, dir: &Path) -> Result<SpoolFound> {
        let max = self
            .0
            .config
            .spool
            .max_bytes
            .saturating_mul(DISK_FACTOR)
            .saturating_add(DISK_EXTRA);
        let window = &self.0.config.intake_window;
        let wanted = Wanted {
            ids: usize::try_from(window.ids).unwrap_or(usize::MAX),
            since: Timestamp::now() - window.age,
        };
        let folder = dir.join(FOLDER);
        let (log, left) = blocking(move || SpoolLog::open(&folder, max, wanted)).await?;
        let log = Arc::new(log);
        *lock(&self.0.spool_log) = Some(log);
        Ok(self.take_up(left))
    }

    /// How many messages the spool in a data folder holds, for who does not
    /// take them up; 0 where there is none.
    ///
    /// # Errors
    /// The spool is held by another process, or cannot be read.
    pub(crate) async fn spool_left_in(dir: &Path) -> Result<u64> {
        let folder = dir.join(FOLDER);
        if !folder.is_dir() {
            return Ok(0);
        }
        let nothing = Wanted {
            ids: 0,
            since: Timestamp::now(),
        };
        blocking(move || {
            let (log, left) = SpoolLog::open(&folder, u64::MAX, nothing)?;
            log.close()?;
            Ok(left.lanes.values().map(|l| l.spool.len() as u64).sum())
        })
        .await
    }

    fn take_up(&self, left: Left) -> SpoolFound {
        let mut found = SpoolFound::default();
        for (lane, of_lane) in left.lanes {
            let count = of_lane.spool.len() as u64;
            let topic = lane.topic.clone();
            match self.restore_lane(lane, of_lane) {
                Ok(()) => found.taken_up += count,
                Err(error) => {
                    tracing::error!(%topic, messages = count, %error,
                        "messages in the spool have no broker; they stay in the data folder");
                    found.stranded += count;
                }
            }
        }
        self.know_again(left.ids);
        if found != SpoolFound::default() {
            tracing::warn!(
                messages = found.taken_up,
                stranded = found.stranded,
                "taken up from the spool of an earlier process"
            );
        }
        found
    }

    /// Answers publishes of these ids as they were answered: a client that never got
    /// its answer may repeat the publish (C14).
    pub(super) fn know_again(&self, ids: impl IntoIterator<Item = (Topic, MessageId)>) {
        for (topic, id) in ids {
            if let Ok(Offer::Fresh(Some(seen))) = self.0.accepted.offer(&topic, &id) {
                seen.settle(&Ok(Receipt {
                    id,
                    outcome: Outcome::Spooled { durable: true },
                }));
            }
        }
    }

    /// Where spools are kept; none: in memory.
    pub(super) fn store(&self) -> Option<Arc<dyn SpoolStore>> {
        let log = lock(&self.0.spool_log).clone()?;
        Some(log)
    }

    /// Whether what is spooled now is on a disk that works.
    pub(super) fn spool_is_durable(&self) -> bool {
        lock(&self.0.spool_log)
            .as_ref()
            .is_some_and(|log| log.synced().borrow().poisoned.is_none())
    }

    /// Lets go of the folder. Nothing is spooled after this.
    pub(super) async fn close_spool(&self) {
        let log = lock(&self.0.spool_log).take();
        if let Some(log) = log
            && let Err(error) = blocking(move || log.close()).await
        {
            tracing::error!(%error, "the spool was not closed cleanly");
        }
    }
}

/// Runs what waits for a disk where that is allowed.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| {
        Error::new(ErrorCode::UnknownError, "a look at the disk panicked").caused_by(e)
    })?
}
