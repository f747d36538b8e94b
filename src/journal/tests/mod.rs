//! A journal on a disk that fails as told, stepped by hand, and a model of what
//! it must hold.

mod compact;
mod crashes;
mod damage;
mod disk;
mod failures;
mod fixtures;
mod folder;
mod index;
mod layout;
mod room;
mod seeds;
mod state;
mod threads;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    Appended, Batch, EntryId, JournalError, JournalOptions, Lsn, Opened, RecoveryReport,
    handle::Journal, shared::Shared, writer::Writer,
};
use disk::Disk;

/// What a batch put.
type Puts = Vec<(EntryId, Bytes)>;

/// Live entries.
type Entries = BTreeMap<EntryId, Bytes>;

/// A journal whose writer runs only when told to.
struct Rig {
    shared: Arc<Shared>,
    writer: Writer,
    report: RecoveryReport,
}

impl Rig {
    /// Opens what is on the disk; also gives what was recovered.
    fn open(disk: &Disk) -> Result<(Self, Entries), JournalError> {
        Self::open_with(disk, small())
    }

    fn open_with(disk: &Disk, options: JournalOptions) -> Result<(Self, Entries), JournalError> {
        let opened = Opened::new(Arc::new(disk.clone()), None, options)?;
        let mut entries = Entries::new();
        opened.replay(|id, body| {
            let twice = entries.insert(id, Bytes::copy_from_slice(body));
            assert!(twice.is_none(), "entry {id} was recovered twice");
        });
        let report = opened.report().clone();
        assert_eq!(report.entries, entries.len() as u64);
        let (shared, writer) = opened.recover_stepped();
        let rig = Self {
            shared,
            writer,
            report,
        };
        Ok((rig, entries))
    }

    fn append(&self, batch: Batch) -> Result<Appended, JournalError> {
        self.shared.lock().append(batch)
    }

    /// Runs the writer while it has something to do.
    fn work(&mut self) -> Result<(), JournalError> {
        while self.has_work() {
            self.turn()?;
        }
        Ok(())
    }

    /// One round of the writer, if it has something to do.
    fn turn(&mut self) -> Result<(), JournalError> {
        if !self.has_work() {
            return Ok(());
        }
        let done = self.writer.turn();
        if let Err(cause) = &done {
            self.shared.poison(cause);
        }
        done.map(|_| ())
    }

    fn has_work(&self) -> bool {
        let state = self.shared.lock();
        state.poison.is_none() && (!state.queue.is_empty() || state.compactable().is_some())
    }

    fn close(mut self) {
        self.shared.lock().closing = true;
        assert!(!self.writer.turn().unwrap());
    }

    fn synced(&self) -> Lsn {
        self.shared.durable.borrow().lsn
    }

    /// Reads as callers do.
    fn read(&self, ids: &[EntryId]) -> Result<Vec<Option<Bytes>>, JournalError> {
        self.shared.read(ids)
    }
}

/// What was appended, batch by batch, on top of what there was.
#[derive(Clone, Default)]
struct Model {
    base: Entries,
    batches: Vec<(Puts, Vec<EntryId>)>,
    now: Entries,
}

impl Model {
    fn new(base: Entries) -> Self {
        Self {
            now: base.clone(),
            base,
            batches: Vec::new(),
        }
    }

    /// Appends to both.
    fn append(&mut self, rig: &Rig, batch: Batch) -> Result<Appended, JournalError> {
        self.append_to(&rig.shared, batch)
    }

    fn append_to(&mut self, shared: &Shared, batch: Batch) -> Result<Appended, JournalError> {
        let appended = shared.lock().append(batch.clone())?;
        let puts: Vec<_> = (appended.first..).zip(batch.puts).collect();
        apply(&mut self.now, &puts, &batch.removes);
        self.batches.push((puts, batch.removes));
        assert_eq!(appended.lsn, self.batches.len() as Lsn);
        Ok(appended)
    }

    /// How many batches `found` is the outcome of; at least those that were said
    /// to be durable.
    fn prefix(&self, found: &Entries, synced: Lsn) -> Option<usize> {
        let mut state = self.base.clone();
        let mut least = synced as usize;
        for n in 0..=self.batches.len() {
            if n > 0 {
                let (puts, removes) = &self.batches[n - 1];
                apply(&mut state, puts, removes);
            }
            if n >= least && state == *found {
                return Some(n);
            }
            least = least.max(synced as usize);
        }
        None
    }

    fn check(&self, found: &Entries, synced: Lsn, context: &dyn std::fmt::Display) -> usize {
        self.prefix(found, synced).unwrap_or_else(|| {
            panic!(
                "{context}: recovered {:?}, which is no prefix of {} batches with {synced} durable; all together are {:?}",
                found.keys().collect::<Vec<_>>(),
                self.batches.len(),
                self.now.keys().collect::<Vec<_>>()
            )
        })
    }
}

fn apply(state: &mut Entries, puts: &[(EntryId, Bytes)], removes: &[EntryId]) {
    // Removes name entries from before the batch, for a caller cannot know the
    // ids of the batch's own.
    for id in removes {
        state.remove(id);
    }
    state.extend(puts.iter().cloned());
}

/// Segments of 4 KiB.
fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes: 4096,
        max_bytes: 1 << 20,
        max_queued_bytes: 1 << 20,
        ..JournalOptions::default()
    }
}

/// The same, and nothing is synced for the sync's own sake.
fn late() -> JournalOptions {
    JournalOptions {
        sync_delay: Duration::MAX,
        ..small()
    }
}

fn put(body: impl Into<Bytes>) -> Batch {
    let mut batch = Batch::new();
    batch.put(body);
    batch
}

fn remove(ids: impl IntoIterator<Item = EntryId>) -> Batch {
    let mut batch = Batch::new();
    ids.into_iter().for_each(|id| batch.remove(id));
    batch
}

/// A body that says whose it is.
fn body(n: u64, len: usize) -> Bytes {
    n.to_le_bytes().into_iter().cycle().take(len).collect()
}

/// A whole journal, thread and all, on a disk.
fn journal(disk: &Disk, options: JournalOptions) -> Journal {
    Opened::new(Arc::new(disk.clone()), None, options)
        .unwrap()
        .recover(|_, _| {})
        .unwrap()
}
