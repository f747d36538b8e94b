//! The shell: opens the log, gives windows back what they knew, and writes what
//! groups note until the hub closes. It decides nothing but when to write.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    super::dedup::{DedupWindow, IdHasher},
    Note, Tally,
    codec::{self, Head},
    shelf::{FULL_WINDOWS, Fresh, Shelf, Trimmed},
};
use crate::{
    error::{Error, ErrorCode, Result},
    journal::{Batch, EntryId, Journal, JournalError, JournalOptions},
    message::Timestamp,
};

pub(crate) use super::shelf::Limits;

/// The folder in a data folder.
pub(crate) const FOLDER: &str = "handled";

/// Ids that wait to be written at most: what is noted while the disk stands
/// still. More are counted, and not kept.
pub(crate) const QUEUE: usize = 65_536;

/// Ids that are written at once.
const TURN: usize = 4096;

/// Pause between two writes, so that a busy hub writes one entry for many ids.
const PAUSE: Duration = Duration::from_millis(5);

/// How late a sync may come. Each would cost the disk as much as one of the
/// spool's, and what it adds is only what a power cut would take.
const SYNC_DELAY: Duration = Duration::from_secs(1);

/// How often it is looked for what is too old.
const TRIM: Duration = Duration::from_secs(60);

/// Disk of an id: itself, and as much again that is dead until it is compacted.
const ID_BYTES: u64 = 2 * 24;

/// Disk beyond that: loose entries of many groups, segments that are made ahead.
const DISK_EXTRA: u64 = 256 * 1024 * 1024;

/// Small, so that what is dead is given back soon.
const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;

/// Entries that are read back at a time.
const READ: usize = 64;

/// The log, and what was in it.
#[derive(Debug)]
pub(crate) struct Opened<T> {
    pub(crate) log: Log,
    /// What groups had handled, where it is not too old.
    pub(crate) windows: Vec<(Arc<str>, DedupWindow<T>)>,
}

/// The log of handled ids.
#[derive(Debug)]
pub(crate) struct Log {
    journal: Journal,
    shelf: Shelf,
    hasher: IdHasher,
}

impl Log {
    /// Opens the log in a data folder and brings back the windows. Blocks. Ids
    /// stream from the disk: of the log only its entries' heads are in memory.
    ///
    /// # Errors
    /// The folder cannot be used, or what is in it cannot be read: nothing is
    /// dropped silently.
    pub(crate) fn open<T>(
        data: &Path,
        limits: Limits,
        window: impl Fn(IdHasher) -> DedupWindow<T>,
    ) -> Result<Opened<T>> {
        let ids = u64::try_from(limits.ids).unwrap_or(u64::MAX);
        let options = JournalOptions {
            segment_bytes: SEGMENT_BYTES,
            max_bytes: ids
                .saturating_mul(ID_BYTES * FULL_WINDOWS as u64)
                .saturating_add(DISK_EXTRA),
            sync_delay: SYNC_DELAY,
            ..JournalOptions::default()
        };
        let opened = Journal::open(&data.join(FOLDER), options).map_err(|e| wrong(&e))?;
        let mut heads: Vec<(EntryId, Head)> = Vec::new();
        let mut unreadable = None;
        let journal = opened
            .recover(|entry, body| match codec::head(&body) {
                Ok(head) => heads.push((entry, head)),
                Err(error) => drop(unreadable.get_or_insert(error)),
            })
            .map_err(|e| wrong(&e))?;
        let hasher = heads
            .first()
            .map_or_else(IdHasher::random, |(_, h)| h.hasher);
        if heads.iter().any(|(_, h)| h.hasher != hasher) {
            unreadable.get_or_insert_with(codec::unreadable);
        }
        if let Some(error) = unreadable {
            return Err(error.on(data.join(FOLDER).display().to_string()));
        }
        // Those that compaction moved come where they stand now.
        heads.sort_unstable_by_key(|(entry, _)| *entry);
        let mut shelf = Shelf::new(limits, hasher);
        for (entry, head) in heads {
            shelf.found(entry, &head);
        }
        let mut log = Self {
            journal,
            shelf,
            hasher,
        };
        let trimmed = log.shelf.trim(now());
        log.remove(trimmed.removes).map_err(|e| wrong(&e))?;
        let windows = log.windows(window)?;
        Ok(Opened { log, windows })
    }

    fn windows<T>(
        &mut self,
        window: impl Fn(IdHasher) -> DedupWindow<T>,
    ) -> Result<Vec<(Arc<str>, DedupWindow<T>)>> {
        let mut windows = Vec::new();
        for (group, chunks, loose) in self.shelf.entries() {
            let mut window = window(self.hasher);
            for some in chunks.chunks(READ) {
                for body in self.read(some)? {
                    codec::ids(&body)?.for_each(|h| window.restore(h));
                }
            }
            for some in loose.chunks(READ) {
                for body in self.read(some)? {
                    codec::ids(&body)?.for_each(|h| window.restore(h));
                    self.shelf.recall(&group, codec::ids(&body)?);
                }
            }
            windows.push((group, window));
        }
        Ok(windows)
    }

    fn read(&self, entries: &[EntryId]) -> Result<Vec<bytes::Bytes>> {
        let bodies = self.journal.read(entries).map_err(|e| wrong(&e))?;
        Ok(bodies.into_iter().flatten().collect())
    }

    /// What ids are hashed with.
    pub(crate) fn hasher(&self) -> IdHasher {
        self.hasher
    }

    /// Ids that it has.
    pub(crate) fn ids(&self) -> usize {
        self.shelf.ids()
    }

    /// The journal, to wait for its syncs.
    pub(crate) fn journal(&self) -> Journal {
        self.journal.clone()
    }

    /// Writes what was handled, or nothing of it.
    fn keep(&mut self, fresh: Fresh, tally: &Tally) {
        if fresh.is_empty() {
            return;
        }
        let mut plan = self.shelf.plan(fresh);
        let mut batch = Batch::new();
        for body in std::mem::take(&mut plan.puts) {
            batch.put(body);
        }
        for entry in &plan.removes {
            batch.remove(*entry);
        }
        match self.journal.append(batch) {
            Ok(appended) => {
                let trimmed = self.shelf.written(plan, appended.first);
                if tally.went(None) {
                    tracing::info!("handled ids are kept in the data folder again");
                }
                self.let_go(trimmed, tally);
            }
            Err(error) => {
                tally.lost(Shelf::unwritten(&plan) as u64);
                if tally.went(Some(&error.to_string())) {
                    tracing::error!(folder = %self.journal.path().display(), %error,
                        "handled ids are not kept any more: consuming goes on, but after a restart \
                         of this process what was not settled at its broker may be handed out again");
                }
            }
        }
    }

    fn let_go(&self, trimmed: Trimmed, tally: &Tally) {
        tally.lost(trimmed.early as u64);
        if let Err(error) = self.remove(trimmed.removes) {
            // The disk's failure is told where something is written.
            tracing::debug!(%error, "old handled ids stay in the data folder");
        }
    }

    fn forget(&mut self, group: &str) -> Result<u64> {
        let mut batch = removal(self.shelf.forget(group));
        // Somebody waits for it.
        batch.hurry();
        let appended = self.journal.append(batch).map_err(|e| wrong(&e))?;
        Ok(appended.lsn)
    }

    fn remove(&self, entries: Vec<EntryId>) -> Result<(), JournalError> {
        if !entries.is_empty() {
            self.journal.append(removal(entries))?;
        }
        Ok(())
    }
}

/// The log's task.
pub(crate) struct Keeper {
    pub(crate) log: Log,
    pub(crate) notes: mpsc::Receiver<Note>,
    pub(crate) tally: Arc<Tally>,
}

impl Keeper {
    /// Writes until nobody can note anything any more, or `closing` is cancelled:
    /// then what waits is still written, and the folder is given back.
    pub(crate) async fn run(mut self, closing: CancellationToken) {
        let mut turn: Vec<Note> = Vec::with_capacity(TURN);
        let mut trim = Instant::now() + TRIM;
        let mut open = true;
        loop {
            tokio::select! {
                n = self.notes.recv_many(&mut turn, TURN) => {
                    if n == 0 {
                        break;
                    }
                }
                () = closing.cancelled(), if open => {
                    open = false;
                    self.notes.close();
                }
                () = tokio::time::sleep_until(trim) => {
                    trim = Instant::now() + TRIM;
                    let trimmed = self.log.shelf.trim(now());
                    self.log.let_go(trimmed, &self.tally);
                }
            }
            let more = turn.len() == TURN;
            self.write(&mut turn);
            if open && !more {
                // The first after a quiet time is written at once.
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => {}
                    () = closing.cancelled() => {}
                }
            }
        }
        let journal = self.log.journal;
        let closed = tokio::task::spawn_blocking(move || journal.close()).await;
        if let Ok(Err(error)) = closed {
            tracing::error!(%error, "the handled ids were not closed cleanly");
        }
    }

    fn write(&mut self, turn: &mut Vec<Note>) {
        let mut fresh = Fresh::new();
        for note in turn.drain(..) {
            match note {
                Note::Handled { group, handled } => fresh.entry(group).or_default().push(handled),
                Note::Forget { group, written } => {
                    // What was noted before it must not be written after it.
                    self.log.keep(std::mem::take(&mut fresh), &self.tally);
                    answer(written, self.log.forget(&group));
                }
            }
        }
        self.log.keep(fresh, &self.tally);
    }
}

fn removal(entries: Vec<EntryId>) -> Batch {
    let mut batch = Batch::new();
    for entry in entries {
        batch.remove(entry);
    }
    batch
}

fn answer(to: oneshot::Sender<Result<u64>>, with: Result<u64>) {
    // Whoever dropped the future abandoned the answer.
    let _ = to.send(with);
}

fn now() -> u64 {
    u64::try_from(Timestamp::now().as_millis() / 1000).unwrap_or(0)
}

fn wrong(error: &JournalError) -> Error {
    Error::new(
        ErrorCode::InvalidConfig,
        format!("the ids of handled messages: {error}"),
    )
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
