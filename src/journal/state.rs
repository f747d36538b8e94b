//! What appenders, readers and the writer share, behind one short lock: the
//! queue, the index, the room that is left. No I/O happens here.
//!
//! An entry is *pending* from `append` until its frame is in a file; its body is
//! read from memory so long. Removes count from `append` on, for readers and for
//! compaction alike: that and the order of the queue are what keeps a removed
//! entry from being moved, and so from coming back.

use std::{collections::VecDeque, mem, sync::Arc};

use bytes::Bytes;

use super::{
    Appended, Batch, EntryId, JournalError, JournalOptions, Lsn,
    format::{FRAME_HEADER, MAX_FRAME, MOVED_HEADER, PUT_HEADER, REMOVE_LEN},
    index::{Index, Place},
};

/// A batch on its way to the disk.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) lsn: Lsn,
    pub(super) first_id: EntryId,
    pub(super) batch: Batch,
    bytes: u64,
}

/// A frame that is in a file, not necessarily synced.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) seq: u64,
    pub(super) frame: u64,
    pub(super) what: Contents,
}

/// What a frame holds.
#[derive(Debug)]
pub(super) enum Contents {
    Batch(Queued),
    /// Entries that compaction moved, each with its length.
    Moves(Vec<(EntryId, usize)>),
}

/// Where an entry's body is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Pending(Bytes),
    Stored(Place),
    Gone,
}

/// Everything behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) index: Index,
    pub(super) queue: Vec<Queued>,
    pub(super) queued_bytes: u64,
    pending: VecDeque<Slot>,
    pending_first: EntryId,
    pending_live: u64,
    next_id: EntryId,
    next_lsn: Lsn,
    pub(super) synced: Lsn,
    pub(super) syncs: u64,
    pub(super) closing: bool,
    /// The disk had no space for a segment; the writer tries again.
    pub(super) disk_full: bool,
    pub(super) poison: Option<Arc<str>>,
    budget: u64,
    max_queued_bytes: u64,
}

#[derive(Debug)]
enum Slot {
    Live(Bytes),
    Removed(Lsn),
}

impl State {
    pub(super) fn new(index: Index, next_id: EntryId, options: &JournalOptions) -> Self {
        Self {
            index,
            queue: Vec::new(),
            queued_bytes: 0,
            pending: VecDeque::new(),
            pending_first: next_id,
            pending_live: 0,
            next_id,
            next_lsn: 1,
            synced: 0,
            syncs: 0,
            closing: false,
            disk_full: false,
            poison: None,
            budget: options.budget(),
            max_queued_bytes: options.max_queued_bytes,
        }
    }

    /// Takes a batch into the queue, or nothing of it.
    pub(super) fn append(&mut self, mut batch: Batch) -> Result<Appended, JournalError> {
        self.usable()?;
        self.admit(&batch)?;
        let (lsn, first) = (self.next_lsn, self.next_id);
        self.next_lsn += 1;
        // What is not there needs no remove in the log.
        batch.removes.retain(|&id| self.remove(id, lsn));
        let bytes = batch.encoded_len();
        self.next_id += batch.puts.len() as u64;
        self.pending_live += batch.puts.len() as u64;
        self.pending
            .extend(batch.puts.iter().cloned().map(Slot::Live));
        self.queued_bytes += bytes;
        self.queue.push(Queued {
            lsn,
            first_id: first,
            batch,
            bytes,
        });
        Ok(Appended { first, lsn })
    }

    /// Whether the journal still takes and gives anything.
    pub(super) fn usable(&self) -> Result<(), JournalError> {
        match &self.poison {
            Some(cause) => Err(JournalError::Poisoned {
                cause: cause.clone(),
            }),
            None if self.closing => Err(JournalError::Closed),
            None => Ok(()),
        }
    }

    /// Where an entry's body is now.
    pub(super) fn find(&self, id: EntryId) -> Found {
        match self.pending_at(id).and_then(|at| self.pending.get(at)) {
            Some(Slot::Live(body)) => Found::Pending(body.clone()),
            Some(Slot::Removed(_)) => Found::Gone,
            None => self.index.locate(id).map_or(Found::Gone, Found::Stored),
        }
    }

    /// Hands the queue to the writer.
    pub(super) fn take_queue(&mut self) -> Vec<Queued> {
        mem::take(&mut self.queue)
    }

    /// A frame is in its file: its entries are read from there from now on.
    pub(super) fn publish(&mut self, written: Written) {
        let (seq, frame) = (written.seq, written.frame);
        match written.what {
            Contents::Batch(queued) => {
                self.queued_bytes -= queued.bytes;
                for (id, body) in (queued.first_id..).zip(&queued.batch.puts) {
                    let bytes = (PUT_HEADER + body.len()) as u64;
                    self.pending_first = id + 1;
                    match self.pending.pop_front() {
                        Some(Slot::Removed(lsn)) => self.index.insert_removed(seq, bytes, lsn),
                        _ => {
                            self.pending_live -= 1;
                            self.index.insert(id, seq, frame, bytes);
                        }
                    }
                }
            }
            Contents::Moves(moves) => {
                for (id, len) in moves {
                    let bytes = (MOVED_HEADER + len) as u64;
                    self.index.relocate(id, seq, frame, bytes);
                }
            }
        }
    }

    /// The oldest segment, if its file can go: nothing lives in it, and every
    /// remove that made it so is durable, with what was bound to it. The last
    /// segment stays, for it knows the next id.
    pub(super) fn deletable(&self) -> Option<u64> {
        let oldest = self.index.oldest()?;
        let gone = oldest.live == 0 && oldest.last_remove <= self.synced;
        (gone && self.index.segments().len() > 1).then_some(oldest.seq)
    }

    /// The oldest segment, if its entries should be moved: because few live in
    /// it, or because half of the log is dead, and it is what keeps the segments
    /// behind it. The second rule bounds the log at twice what lives in it, and
    /// the copying at one byte for each byte given back. When room is short more
    /// copying is worth the room it makes.
    pub(super) fn compactable(&self) -> Option<u64> {
        let oldest = self.index.oldest()?;
        let short = self.used() > self.budget / 4 * 3;
        let (share, least) = if short { (3, 2) } else { (2, FEW_SEGMENTS) };
        if oldest.live == 0 || self.index.segments().len() <= least {
            return None;
        }
        let sparse = oldest.live_bytes() < oldest.end / 4;
        let wanted = sparse || self.index.live_bytes() < self.index.bytes() / 4 * share;
        wanted.then_some(oldest.seq)
    }

    /// Bytes of the log, of what waits for it, and of the removes to come.
    pub(super) fn used(&self) -> u64 {
        self.index.bytes() + self.queued_bytes + self.live() * REMOVE_COST
    }

    /// Live entries, pending ones included.
    pub(super) fn live(&self) -> u64 {
        self.index.live() + self.pending_live
    }

    /// Batches appended so far.
    pub(super) fn appended(&self) -> Lsn {
        self.next_lsn - 1
    }

    fn admit(&self, batch: &Batch) -> Result<(), JournalError> {
        let bytes = batch.encoded_len();
        let kept = bytes + batch.puts.len() as u64 * REMOVE_COST;
        let limit = MAX_FRAME.min(self.budget);
        if batch.puts.is_empty() && bytes <= MAX_FRAME {
            return Ok(());
        }
        if bytes > MAX_FRAME || kept > self.budget {
            return Err(JournalError::TooLarge { bytes, limit });
        }
        let queue_full = self.queued_bytes > 0 && self.queued_bytes + bytes > self.max_queued_bytes;
        if queue_full || self.disk_full || self.used() + kept > self.budget {
            return Err(JournalError::Full);
        }
        Ok(())
    }

    fn remove(&mut self, id: EntryId, lsn: Lsn) -> bool {
        let pending = self.pending_at(id);
        match pending.and_then(|at| self.pending.get_mut(at)) {
            Some(slot @ Slot::Live(_)) => {
                *slot = Slot::Removed(lsn);
                self.pending_live -= 1;
                true
            }
            Some(Slot::Removed(_)) => false,
            None => self.index.remove(id, lsn),
        }
    }

    fn pending_at(&self, id: EntryId) -> Option<usize> {
        usize::try_from(id.checked_sub(self.pending_first)?).ok()
    }
}

/// What removing an entry takes at most: a frame of its own. Kept aside for each
/// live entry, so that a full journal can always be emptied.
const REMOVE_COST: u64 = (FRAME_HEADER + REMOVE_LEN) as u64;
/// With fewer segments there is little to gain.
const FEW_SEGMENTS: usize = 4;
