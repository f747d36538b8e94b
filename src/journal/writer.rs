//! The one thread that writes. It takes all that is queued, writes it, syncs
//! once for all of it, says so, and begins again: the slower the sync, the more
//! batches share it. Where a sync may be late, what is written waits for it until
//! then, or until something else needs one.
//!
//! A failed write or sync ends the thread for good. After a failed fsync the
//! kernel may have dropped the pages and marked them clean, so a second fsync
//! that succeeds means nothing.

use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    EntryId, JournalError, JournalOptions, Lsn,
    compact::{Candidates, Compactor, delete_dead},
    format::{FrameWriter, SEGMENT_HEADER, SegmentHeader},
    segment,
    shared::Shared,
    state::{Contents, Queued, Written},
    storage::SegmentFile,
};

/// Owns the files.
pub(super) struct Writer {
    shared: Arc<Shared>,
    active: Option<Active>,
    next_seq: u64,
    /// The first id that is not in a file yet.
    next_id: EntryId,
    segment_size: u64,
    /// Frames that are encoded and not written.
    buffer: Vec<u8>,
    unwritten: Vec<Written>,
    /// The last batch that is in the buffer or in a file.
    taken: Lsn,
    compactor: Option<Compactor>,
    sync_delay: Duration,
    /// When what is written must be synced; none: all of it is.
    due: Option<Instant>,
}

/// The segment that is being filled.
struct Active {
    seq: u64,
    file: Arc<dyn SegmentFile>,
    /// Bytes written, and bytes known to be durable.
    end: u64,
    synced: u64,
    capacity: u64,
}

impl Writer {
    /// A writer that begins a new segment with the first batch.
    pub(super) fn new(
        shared: Arc<Shared>,
        next_seq: u64,
        next_id: EntryId,
        options: &JournalOptions,
    ) -> Self {
        Self {
            shared,
            active: None,
            next_seq,
            next_id,
            segment_size: options.segment_size(),
            buffer: Vec::new(),
            unwritten: Vec::new(),
            taken: 0,
            compactor: None,
            sync_delay: options.sync_delay,
            due: None,
        }
    }

    /// Works until the journal closes or its storage fails.
    pub(super) fn run(mut self) {
        let mut guard = Guard {
            shared: self.shared.clone(),
            finished: false,
        };
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => {
                    self.shared.poison(&cause);
                    break;
                }
            }
        }
        guard.finished = true;
    }

    /// One round: take, write, sync, tidy. False when the journal is closed.
    pub(super) fn turn(&mut self) -> Result<bool, JournalError> {
        let mut moves = Compactor::gather(&mut self.compactor, &self.shared)?;
        let work = self.shared.take_work(&mut moves, self.due);
        let urgent = work.queue.iter().any(|queued| queued.batch.urgent);
        let must = work.closing || urgent || !moves.is_empty();
        for queued in work.queue {
            self.append(queued)?;
        }
        self.append_moves(moves)?;
        self.flush()?;
        // What was moved must be durable before its old place is deleted, and so
        // must every remove: without a sync nothing is deleted.
        if !must && self.may_wait() {
            return Ok(true);
        }
        self.sync()?;
        if work.closing {
            self.mark()?;
        }
        if delete_dead(&self.shared)? > 0 {
            // Nothing more is durable, but there is room for who waits for it.
            self.shared.durable.send_modify(|_| {});
        }
        if work.closing {
            self.seal()?;
        }
        Ok(!work.closing)
    }

    /// Whether the sync of what is written may wait: until the oldest of it is
    /// `sync_delay` old.
    fn may_wait(&mut self) -> bool {
        let now = Instant::now();
        if self.due.is_none() {
            self.due = now.checked_add(self.sync_delay);
        }
        self.due.is_none_or(|due| now < due)
    }

    fn append(&mut self, queued: Queued) -> Result<(), JournalError> {
        let lsn = queued.lsn;
        if !queued.batch.is_empty() {
            self.place(queued)?;
        }
        // Only now: making room syncs what came before, and says up to where.
        self.taken = lsn;
        Ok(())
    }

    fn place(&mut self, queued: Queued) -> Result<(), JournalError> {
        let (seq, frame, synced) = self.room(queued.batch.encoded_len())?;
        let mut writer = FrameWriter::new(&mut self.buffer, queued.first_id);
        for body in &queued.batch.puts {
            writer.put(body);
        }
        for &id in &queued.batch.removes {
            writer.remove(id);
        }
        writer.finish(seq, frame, synced);
        self.next_id = queued.first_id + queued.batch.puts.len() as u64;
        self.written(seq, frame, Contents::Batch(queued))
    }

    fn append_moves(&mut self, moves: Candidates) -> Result<(), JournalError> {
        if moves.is_empty() {
            return Ok(());
        }
        let (seq, frame, synced) = self.room(moves.encoded_len())?;
        let mut writer = FrameWriter::new(&mut self.buffer, self.next_id);
        for (id, body) in moves.entries() {
            writer.moved(*id, body);
        }
        writer.finish(seq, frame, synced);
        let ids = moves.entries().iter();
        let ids = ids.map(|(id, body)| (*id, body.len())).collect();
        self.written(seq, frame, Contents::Moves(ids))
    }

    /// Says at the end of the log, when all of it is durable, that it was closed:
    /// damage in front of this is never taken for a torn tail.
    fn mark(&mut self) -> Result<(), JournalError> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let mut writer = FrameWriter::new(&mut self.buffer, self.next_id);
        writer.mark();
        writer.finish(active.seq, active.end, active.synced);
        self.flush()?;
        self.sync()
    }

    /// Remembers a frame in the buffer, and keeps the buffer small.
    fn written(&mut self, seq: u64, frame: u64, what: Contents) -> Result<(), JournalError> {
        self.unwritten.push(Written { seq, frame, what });
        if self.buffer.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Makes sure that a frame of `bytes` fits the active segment; says where
    /// it will stand, and how much of the segment is durable.
    fn room(&mut self, bytes: u64) -> Result<(u64, u64, u64), JournalError> {
        loop {
            if let Some(active) = &self.active {
                let at = active.end + self.buffer.len() as u64;
                if at + bytes <= active.capacity {
                    return Ok((active.seq, at, active.synced));
                }
                self.seal()?;
            }
            self.begin(bytes)?;
        }
    }

    /// Writes the buffer.
    fn flush(&mut self) -> Result<(), JournalError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if self.buffer.is_empty() {
            return Ok(());
        }
        active
            .file
            .write_at(active.end, &self.buffer)
            .map_err(|e| {
                JournalError::io("write", segment::path(&*self.shared.storage, active.seq), e)
            })?;
        active.end += self.buffer.len() as u64;
        if self.buffer.capacity() > 2 * WRITE_BYTES {
            self.buffer = Vec::new();
        } else {
            self.buffer.clear();
        }
        let mut state = self.shared.lock();
        for written in mem::take(&mut self.unwritten) {
            state.publish(written);
        }
        state.index.grow(active.seq, active.end);
        Ok(())
    }

    /// Syncs what is written, and tells everybody who waits for it.
    fn sync(&mut self) -> Result<(), JournalError> {
        let mut synced = 0;
        if let Some(active) = self.active.as_mut().filter(|a| a.synced < a.end) {
            active.file.sync().map_err(|e| {
                JournalError::io("sync", segment::path(&*self.shared.storage, active.seq), e)
            })?;
            active.synced = active.end;
            synced = 1;
        }
        self.due = None;
        let mut state = self.shared.lock();
        state.syncs += synced;
        state.synced = self.taken;
        drop(state);
        let lsn = self.taken;
        self.shared.durable.send_if_modified(|durable| {
            let rose = durable.lsn < lsn;
            durable.lsn = lsn;
            rose
        });
        Ok(())
    }

    /// Begins a segment with room for a frame of `bytes`. A full disk is waited
    /// for: nothing is lost yet, and appends are refused meanwhile.
    fn begin(&mut self, bytes: u64) -> Result<(), JournalError> {
        let capacity = self.segment_size.max(SEGMENT_HEADER as u64 + bytes);
        let file = loop {
            match self.create(capacity) {
                Ok(file) => break file,
                Err(e) if e.is_storage_full() && self.shared.wait_for_space() => {}
                Err(e) => return Err(e),
            }
        };
        let end = SEGMENT_HEADER as u64;
        let mut state = self.shared.lock();
        state.disk_full = false;
        state.index.begin_segment(self.next_seq, self.next_id, end);
        drop(state);
        self.active = Some(Active {
            seq: self.next_seq,
            file,
            end,
            synced: end,
            capacity,
        });
        self.next_seq += 1;
        Ok(())
    }

    /// Makes a segment's file, durable with its header and its name before any
    /// frame is written to it.
    fn create(&self, capacity: u64) -> Result<Arc<dyn SegmentFile>, JournalError> {
        let storage = &*self.shared.storage;
        let name = segment::name(self.next_seq);
        let failed = |what| {
            let path = segment::path(storage, self.next_seq);
            move |e| JournalError::io(what, path, e)
        };
        let header = SegmentHeader {
            seq: self.next_seq,
            first_id: self.next_id,
        };
        let file = storage.create(&name, capacity).map_err(failed("create"))?;
        let written = file
            .write_at(0, &header.encode())
            .map_err(failed("write"))
            .and_then(|()| file.sync().map_err(failed("sync")))
            .and_then(|()| storage.sync_dir().map_err(failed("sync the folder of")));
        if let Err(error) = written {
            // The name must be free if the disk is tried again.
            let _ = storage.delete(&name);
            return Err(error);
        }
        Ok(file)
    }

    /// Ends the active segment. It is durable before its successor is made: so
    /// only the last segment of a log can be torn.
    fn seal(&mut self) -> Result<(), JournalError> {
        self.flush()?;
        self.sync()?;
        if let Some(active) = self.active.take() {
            // Gives unused space back. If a crash undoes it, the tail is zeros.
            active.file.truncate(active.end).map_err(|e| {
                let path = segment::path(&*self.shared.storage, active.seq);
                JournalError::io("truncate", path, e)
            })?;
        }
        Ok(())
    }
}

/// A writer that panics leaves nobody waiting.
struct Guard {
    shared: Arc<Shared>,
    finished: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.finished {
            self.shared.poison(&JournalError::Poisoned {
                cause: "the journal's writer panicked".into(),
            });
        }
        self.shared
            .durable
            .send_modify(|durable| durable.closed = true);
    }
}

/// Frames are written in pieces of about this size; more would be copied for
/// nothing, less would be calls for nothing.
const WRITE_BYTES: usize = 1 << 20;
