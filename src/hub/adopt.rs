//! Taking over the spool of a process that will not come back: each message is
//! published here, and let go of there only when this hub has it. What that process
//! had handled is not taken over: its brokers have given what was unsettled to others
//! long before anybody adopts, and what is moved is marked as a possible duplicate.

use std::{collections::VecDeque, path::Path, sync::Arc};

use serde::Serialize;

use super::{
    MessagingHub,
    keep::blocking,
    lane::keeper::{Keeper, Loaded},
    publisher::Pending,
    spool::{
        Entry, LaneLeft, Seq,
        codec::LaneName,
        journal::{SpoolLog, Wanted},
    },
};
use crate::{
    broker::{Outcome, PublishOptions},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
};

/// What became of another hub's spool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Adopted {
    /// Messages that this hub has now.
    pub moved: u64,
    /// Messages that stay in the other folder.
    pub left: u64,
    /// Why, for the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

pub(super) fn in_memory() -> Error {
    Error::rejected(
        ErrorCode::InvalidConfig,
        "this hub's own spool is in memory now, where the messages would be less safe; start it with --data, or look at its disk",
    )
}

/// Messages under way at a time.
const AT_ONCE: usize = 512;

impl MessagingHub {
    /// Moves the spool in another hub's data folder into this hub, in its
    /// publish order, marked as possible duplicates. The other hub must be dead;
    /// its folder is held while this goes on.
    ///
    /// # Errors
    /// The folder holds no spool that can be read, or its hub lives.
    ///
    /// # Cancel safety
    /// Dropped in the middle, messages that were under way may be in both
    /// spools; adopting again repeats them, marked.
    pub async fn adopt_spool(&self, dir: &Path) -> Result<Adopted> {
        self.check_open()?;
        if !self.spool_is_durable() {
            return Err(in_memory());
        }
        let folder = dir.to_owned();
        let nothing = Wanted {
            ids: 0,
            since: Timestamp::now(),
        };
        // What stands there stays readable, however full it is.
        let open = move || SpoolLog::open_existing(&folder, u64::MAX, nothing);
        let (log, left) = blocking(open).await?;
        let log = Arc::new(log);
        let mut adopted = Adopted::default();
        let mut lanes: Vec<_> = left.lanes.into_iter().collect();
        lanes.sort_by(|a, b| (&a.0.topic, a.0.lane).cmp(&(&b.0.topic, b.0.lane)));
        for (name, lane) in lanes {
            self.adopt_lane(&log, name, lane, &mut adopted).await;
        }
        let closing = log.clone();
        blocking(move || closing.close()).await?;
        if self.schedule_is_kept() {
            let scheduled = self.adopt_schedule(dir).await?;
            adopted.moved += scheduled.moved;
            adopted.left += scheduled.left;
            adopted.reason = adopted.reason.or(scheduled.reason);
        }
        tracing::warn!(folder = %dir.display(), moved = adopted.moved, left = adopted.left,
            "adopted the spool of another hub");
        Ok(adopted)
    }

    async fn adopt_lane(
        &self,
        log: &Arc<SpoolLog>,
        name: LaneName,
        lane: LaneLeft,
        adopted: &mut Adopted,
    ) {
        let mut keeper: Keeper<()> =
            Keeper::new(name.clone(), Some(log.clone()), std::time::Duration::ZERO);
        let mut left = lane.ids.len() as u64;
        keeper.restored(lane.ids);
        let failed = |why: Error, adopted: &mut Adopted| {
            adopted.reason.get_or_insert_with(|| why.to_string());
        };
        let mut under_way: VecDeque<(Seq, bool, Pending)> = VecDeque::new();
        'lane: loop {
            let next = keeper.first(AT_ONCE);
            if next.is_empty() {
                break;
            }
            let Some(loader) = keeper.loader(next) else {
                break;
            };
            let Loaded {
                entries,
                unreadable,
            } = match blocking(move || loader.load()).await {
                Ok(loaded) => loaded,
                Err(error) => {
                    failed(error, adopted);
                    break;
                }
            };
            if let Some((_, error)) = unreadable.into_iter().next() {
                failed(error, adopted);
                break;
            }
            for (seq, entry) in entries {
                let persistent = entry.message.is_persistent();
                match self.enqueue_adopted(&name, entry).await {
                    Ok(pending) => under_way.push_back((seq, persistent, pending)),
                    Err(error) => {
                        failed(error, adopted);
                        break;
                    }
                }
            }
            let all = under_way.len();
            while let Some((seq, persistent, pending)) = under_way.pop_front() {
                match pending.await {
                    Ok(receipt) => {
                        let in_doubt = Outcome::Spooled { durable: false };
                        if persistent && receipt.outcome == in_doubt {
                            // Here it would not outlive this process.
                            failed(in_memory(), adopted);
                            keeper.flush(std::time::Instant::now());
                            break 'lane;
                        }
                        keeper.remove(seq);
                        adopted.moved += 1;
                        left -= 1;
                    }
                    // What comes behind it may be of its key, and must not pass.
                    Err(error) => {
                        failed(error, adopted);
                        keeper.flush(std::time::Instant::now());
                        break 'lane;
                    }
                }
            }
            keeper.flush(std::time::Instant::now());
            if all == 0 {
                break;
            }
        }
        adopted.left += left;
    }

    async fn enqueue_adopted(&self, name: &LaneName, mut entry: Entry) -> Result<Pending> {
        let resolved = self.entry(&name.topic)?;
        entry.marks.possible_duplicate = true;
        let due = entry.due.filter(|due| *due > Timestamp::now());
        if let Some(due) = due.filter(|_| self.can_schedule()) {
            // A retry keeps its time, as it does over a restart.
            let lane = LaneName {
                lane: 0,
                ..name.clone()
            };
            let patience = PublishOptions::default().timeout;
            return self
                .schedule(&resolved, lane, entry, due, patience, None)
                .await;
        }
        self.enqueue_kept(resolved, name, entry).await
    }
}
