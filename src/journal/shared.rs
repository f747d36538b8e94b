//! What the journal's handles and its writer share, with the signals between
//! them. The lock is held for bookkeeping only, never across I/O.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    Durable, JournalError,
    compact::Candidates,
    reader::Handles,
    segment,
    state::{Queued, State},
    storage::{SegmentFile, Storage},
};

/// Shared by all clones of a journal and its writer.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Wakes the writer: something is queued, or the journal closes.
    work: Condvar,
    pub(super) durable: watch::Sender<Durable>,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) handles: Handles,
}

/// What the writer does next.
pub(super) struct Work {
    pub(super) queue: Vec<Queued>,
    pub(super) closing: bool,
}

impl Shared {
    pub(super) fn new(state: State, storage: Arc<dyn Storage>) -> Self {
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            durable: watch::Sender::new(Durable::default()),
            storage,
            handles: Handles::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere stops the writer by its own guard; the bookkeeping
        // is never left half done by code that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was queued, or the journal closes.
    pub(super) fn wake(&self) {
        self.work.notify_one();
    }

    /// Takes all that is queued. Waits for it unless there is compaction to do, or
    /// until what is written must be synced.
    /// Entries that were removed since they were read for compaction are taken
    /// out in the same breath: the moves follow this queue in the log, so a
    /// remove is either in it, and the entry stays dead, or behind the move.
    pub(super) fn take_work(&self, moves: &mut Candidates, due: Option<Instant>) -> Work {
        let mut state = self.lock();
        while state.queue.is_empty()
            && !state.closing
            && moves.is_empty()
            && state.compactable().is_none()
        {
            let Some(due) = due else {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = self
                .work
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        moves.retain_live(&state.index);
        Work {
            queue: state.take_queue(),
            closing: state.closing,
        }
    }

    /// A segment's file, for readers.
    pub(super) fn open_segment(&self, seq: u64) -> Result<Arc<dyn SegmentFile>, JournalError> {
        let file = self
            .handles
            .open(&*self.storage, seq)
            .map_err(|e| JournalError::io("open", segment::path(&*self.storage, seq), e))?;
        // The writer may have deleted the file and forgotten the handle before
        // this one was kept; nobody else would then close it.
        if self.lock().index.oldest().is_none_or(|s| s.seq > seq) {
            self.handles.forget(seq);
        }
        Ok(file)
    }

    /// Waits a while for the disk to have space again. False: the journal closes.
    pub(super) fn wait_for_space(&self) -> bool {
        let mut state = self.lock();
        if !state.disk_full {
            tracing::warn!(
                journal = %self.storage.path().display(),
                "no space left on the disk for a segment; trying again until there is"
            );
            state.disk_full = true;
        }
        let (state, _) = self
            .work
            .wait_timeout_while(state, SPACE_RETRY, |state| !state.closing)
            .unwrap_or_else(PoisonError::into_inner);
        !state.closing
    }

    /// Records the first failure: from here on nothing more becomes durable.
    /// The state comes first, so that whoever is woken by the signal and appends
    /// is refused with the cause.
    pub(super) fn poison(&self, cause: &JournalError) {
        tracing::error!(
            journal = %self.storage.path().display(), %cause,
            "the journal's storage failed; nothing more will be durable until it is opened again"
        );
        let cause: Arc<str> = cause.to_string().into();
        let mut state = self.lock();
        state.poison.get_or_insert_with(|| cause.clone());
        // Their puts stay readable from memory.
        drop(state.take_queue());
        drop(state);
        self.durable.send_modify(|durable| {
            durable.poisoned.get_or_insert(cause);
        });
    }
}

/// How often a full disk is tried again.
const SPACE_RETRY: Duration = Duration::from_secs(1);
