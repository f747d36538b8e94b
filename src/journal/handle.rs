//! The journal as its callers see it.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{Batch, EntryId, JournalError, Lsn, lock::FolderLock, shared::Shared};

/// What became of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The first put's id; the next ones follow without gaps.
    pub first: EntryId,
    /// The batch's number, to wait for with [`Journal::synced`].
    pub lsn: Lsn,
}

/// How far the journal is durable.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// Every batch up to this one is.
    pub lsn: Lsn,
    /// Why nothing later will be.
    pub poisoned: Option<Arc<str>>,
    /// The journal was closed, or stopped.
    pub closed: bool,
}

/// What a journal holds and has done.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Usage {
    /// Bytes in segment files, allocated but unused ones not counted.
    pub disk_bytes: u64,
    /// Bytes of live entries, reckoned at the average of their segments.
    pub live_bytes: u64,
    /// Live entries.
    pub live_entries: u64,
    /// Segment files.
    pub segments: usize,
    /// Bytes that wait in memory for the writer.
    pub queued_bytes: u64,
    /// Batches appended since the journal was opened.
    pub appended: Lsn,
    /// Of those, durable.
    pub synced: Lsn,
    /// Syncs that it took.
    pub syncs: u64,
    /// The first failure of the storage, if there was one.
    pub poisoned: Option<Arc<str>>,
}

/// A durable log. Clones share it; when the last one is dropped it closes as by
/// [`close`](Self::close), which blocks until the last sync.
#[derive(Clone)]
pub struct Journal(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    /// Ended by whoever closes first; held while joining, so that whoever closes
    /// second returns no earlier.
    running: Mutex<Option<Running>>,
}

struct Running {
    thread: JoinHandle<()>,
    lock: Option<FolderLock>,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Journal").field(&self.path()).finish()
    }
}

impl Journal {
    pub(super) fn new(
        shared: Arc<Shared>,
        thread: JoinHandle<()>,
        lock: Option<FolderLock>,
    ) -> Self {
        Self(Arc::new(Handle {
            shared,
            running: Mutex::new(Some(Running { thread, lock })),
        }))
    }

    /// The journal's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.shared.storage.path()
    }

    /// Queues a batch for the writer. Never waits for the disk, so it may be
    /// called under a short lock; the order of calls is the order on disk.
    ///
    /// # Errors
    /// Nothing of the batch was taken. [`Full`](JournalError::Full) is for
    /// batches with puts only, and passes ([`durable`](Self::durable) changes
    /// when there is more room); [`TooLarge`](JournalError::TooLarge) does not;
    /// [`Poisoned`](JournalError::Poisoned), [`Closed`](JournalError::Closed).
    pub fn append(&self, batch: Batch) -> Result<Appended, JournalError> {
        let appended = self.0.shared.lock().append(batch)?;
        self.0.shared.wake();
        Ok(appended)
    }

    /// How far the journal is durable, now and later. It is also marked as
    /// changed when segments were deleted and there is room again.
    #[must_use]
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.0.shared.durable.subscribe()
    }

    /// Waits until the batch, and all before it, are durable.
    ///
    /// # Errors
    /// [`Poisoned`](JournalError::Poisoned) or [`Closed`](JournalError::Closed)
    /// if it never will be: after a crash it may be there, or not.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn synced(&self, lsn: Lsn) -> Result<(), JournalError> {
        let mut durable = self.durable();
        let reached = durable
            .wait_for(|d| d.lsn >= lsn || d.poisoned.is_some() || d.closed)
            .await
            .map_err(|_| JournalError::Closed)?;
        match &reached.poisoned {
            _ if reached.lsn >= lsn => Ok(()),
            Some(cause) => Err(JournalError::Poisoned {
                cause: cause.clone(),
            }),
            None => Err(JournalError::Closed),
        }
    }

    /// The bodies of entries, `None` for those that were removed or never were.
    /// Rising ids are read sequentially. Sees all that was appended before, also
    /// what is not durable yet. Blocking: call it where that is allowed.
    ///
    /// # Errors
    /// [`Corrupt`](JournalError::Corrupt) if a body does not fit its checksum,
    /// [`Io`](JournalError::Io), [`Closed`](JournalError::Closed). A poisoned
    /// journal is still read.
    pub fn read(&self, ids: &[EntryId]) -> Result<Vec<Option<Bytes>>, JournalError> {
        self.0.shared.read(ids)
    }

    /// What the journal holds and has done.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.0.shared.lock();
        Usage {
            disk_bytes: state.index.bytes(),
            live_bytes: state.index.live_bytes(),
            live_entries: state.live(),
            segments: state.index.segments().len(),
            queued_bytes: state.queued_bytes,
            appended: state.appended(),
            synced: state.synced,
            syncs: state.syncs,
            poisoned: state.poison.clone(),
        }
    }

    /// Writes and syncs what is queued, ends the writer and frees the folder.
    /// Blocking. Closing again does nothing and says the same.
    ///
    /// # Errors
    /// [`Poisoned`](JournalError::Poisoned) if not all of it could be made
    /// durable.
    pub fn close(&self) -> Result<(), JournalError> {
        self.0.close()
    }
}

impl Handle {
    fn close(&self) -> Result<(), JournalError> {
        self.shared.lock().closing = true;
        self.shared.wake();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.take() {
            // A panic was made a poison by the writer's guard.
            let _ = running.thread.join();
            drop(running.lock);
        }
        drop(running);
        match &self.shared.lock().poison {
            Some(cause) => Err(JournalError::Poisoned {
                cause: cause.clone(),
            }),
            None => Ok(()),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Whoever wants to know closes; the cause is in the log besides.
        let _ = self.close();
    }
}
