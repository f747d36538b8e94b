//! What groups handled, kept in the data folder (C6): a hub that is killed and
//! started again does not hand out what its handlers were done with, although the
//! broker never heard of it.
//!
//! ```text
//!   group (window) --note--> queue --> keeper: one entry for all that a turn
//!                                        |     brought, of each group
//!                                        v
//!                            shelf: which entries stand for which ids, and which
//!                                   are needed no longer
//!                                        |
//!                                        v
//!                                     journal
//! ```
//!
//! It refuses to be waited for: an ack is answered before its id is on the disk,
//! and where the queue is full or the disk fails, ids are counted and not kept.
//! What a kill takes is what was settled within the last few milliseconds; a power
//! cut takes what was not synced, `SYNC_DELAY` at most.

#[cfg(feature = "journal")]
mod codec;
#[cfg(feature = "journal")]
mod keeper;
#[cfg(feature = "journal")]
mod shelf;

#[cfg(feature = "journal")]
pub(crate) use keeper::{Keeper, Limits, Log, QUEUE};

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use tokio::sync::{mpsc, oneshot};

use super::{dedup::Handled, lock};
use crate::error::Result;

/// Where a group notes what it handled.
#[derive(Clone, Debug)]
pub(crate) struct Notes {
    group: Arc<str>,
    queue: mpsc::Sender<Note>,
    tally: Arc<Tally>,
}

/// What the keeper is told.
#[derive(Debug)]
pub(crate) enum Note {
    /// A group learned of an id.
    Handled { group: Arc<str>, handled: Handled },
    /// A group forgot everything. Answered with the number of the write that
    /// forgets it on the disk too.
    Forget {
        group: Arc<str>,
        written: oneshot::Sender<Result<u64>>,
    },
}

/// How keeping goes.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Ids that are not on the disk although a window has them.
    unkept: AtomicU64,
    /// Why the newest are not.
    failing: Mutex<Option<Arc<str>>>,
}

impl Notes {
    #[cfg(feature = "journal")]
    pub(crate) fn new(group: Arc<str>, queue: mpsc::Sender<Note>, tally: Arc<Tally>) -> Self {
        Self {
            group,
            queue,
            tally,
        }
    }

    /// Notes what the group learned. Never waits.
    pub(crate) fn handled(&self, handled: Handled) {
        let note = Note::Handled {
            group: self.group.clone(),
            handled,
        };
        if self.queue.try_send(note).is_err() {
            self.tally.lost(1);
        }
    }
}

impl Tally {
    /// Ids that are not on the disk although a window has them.
    pub(crate) fn unkept(&self) -> u64 {
        self.unkept.load(Relaxed)
    }

    /// Why what is handled now is not kept; none: it is.
    pub(crate) fn failing(&self) -> Option<Arc<str>> {
        lock(&self.failing).clone()
    }

    fn lost(&self, ids: u64) {
        self.unkept.fetch_add(ids, Relaxed);
    }

    /// Notes how a write went. Says whether that is news.
    #[cfg(feature = "journal")]
    fn went(&self, failure: Option<&str>) -> bool {
        let mut failing = lock(&self.failing);
        let news = failing.is_some() != failure.is_some();
        if news {
            *failing = failure.map(Arc::from);
        }
        news
    }
}
