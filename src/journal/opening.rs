//! From a folder to a running journal, in two steps: [`Journal::open`] checks the
//! log, [`Opened::recover`] hands out what lives in it and starts the writer.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use bytes::Bytes;

use super::{
    EntryId, Journal, JournalError, JournalOptions, TornTail,
    lock::FolderLock,
    recovery::{self, Recovered},
    shared::Shared,
    state::State,
    storage::{Folder, Storage},
    writer::Writer,
};

/// What opening a journal found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Live entries.
    pub entries: u64,
    /// Segment files.
    pub segments: usize,
    /// Frames that a crash tore off the end of the log, if it did. Nobody was
    /// told that they are durable.
    pub torn: Option<TornTail>,
    /// A segment file that a crash left without a header and that was deleted.
    pub unfinished: Option<PathBuf>,
}

/// A journal that was checked, before its entries are taken back.
pub struct Opened {
    storage: Arc<dyn Storage>,
    lock: Option<FolderLock>,
    options: JournalOptions,
    recovered: Recovered,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("folder", &self.storage.path())
            .field("report", &self.recovered.report)
            .finish_non_exhaustive()
    }
}

impl Journal {
    /// Takes the folder's lock (the folder is made if it is missing), reads the
    /// whole log once, checks it, and cuts off what a crash tore. Blocking.
    ///
    /// # Errors
    /// [`Locked`](JournalError::Locked), [`Version`](JournalError::Version),
    /// [`Corrupt`](JournalError::Corrupt), [`Io`](JournalError::Io). Nothing is
    /// changed on disk but a torn tail.
    pub fn open(dir: &Path, options: JournalOptions) -> Result<Opened, JournalError> {
        let folder = Folder::new(dir).map_err(|e| JournalError::io("make the folder", dir, e))?;
        let lock = FolderLock::take(dir)?;
        Opened::new(Arc::new(folder), Some(lock), options)
    }
}

impl Opened {
    /// Checks a log on any storage.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        lock: Option<FolderLock>,
        options: JournalOptions,
    ) -> Result<Self, JournalError> {
        let recovered = recovery::scan(&*storage)?;
        if let Some(torn) = &recovered.report.torn {
            tracing::warn!(
                file = %torn.file.display(), offset = torn.offset, bytes = torn.bytes,
                "cut off the end of the journal that a crash tore; nothing of it had been confirmed"
            );
        }
        Ok(Self {
            storage,
            lock,
            options,
            recovered,
        })
    }

    /// What was found and what was cut off.
    #[must_use]
    pub fn report(&self) -> &RecoveryReport {
        &self.recovered.report
    }

    /// Calls `visit` with each live entry, in the order of the log (one that was
    /// moved by compaction comes where it stands now), and starts the writer.
    /// Reads the log a second time, as a stream. Blocking.
    ///
    /// # Errors
    /// [`Corrupt`](JournalError::Corrupt) or [`Io`](JournalError::Io) if the log
    /// cannot be read, [`Io`](JournalError::Io) if the thread cannot be started.
    pub fn recover(self, mut visit: impl FnMut(EntryId, Bytes)) -> Result<Journal, JournalError> {
        recovery::replay(&*self.storage, &self.recovered.index, |id, body| {
            visit(id, Bytes::copy_from_slice(body));
        })?;
        let lock = self.lock;
        let (shared, writer) = start(self.storage, self.recovered, &self.options);
        let path = shared.storage.path();
        let thread = thread::Builder::new()
            .name("journal-writer".into())
            .spawn(move || writer.run())
            .map_err(|e| JournalError::io("start the writer of", path, e))?;
        Ok(Journal::new(shared, thread, lock))
    }

    /// A journal whose writer is stepped by hand.
    #[cfg(test)]
    pub(super) fn recover_stepped(self) -> (Arc<Shared>, Writer) {
        start(self.storage, self.recovered, &self.options)
    }

    /// The storage, and where entries live.
    #[cfg(test)]
    pub(super) fn replay(&self, mut visit: impl FnMut(EntryId, &[u8])) {
        recovery::replay(&*self.storage, &self.recovered.index, &mut visit).unwrap();
    }
}

fn start(
    storage: Arc<dyn Storage>,
    found: Recovered,
    options: &JournalOptions,
) -> (Arc<Shared>, Writer) {
    let state = State::new(found.index, found.next_id, options);
    let shared = Arc::new(Shared::new(state, storage));
    let writer = Writer::new(shared.clone(), found.next_seq, found.next_id, options);
    (shared, writer)
}
