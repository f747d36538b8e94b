//! Finds entries in segment files: from the place that the index knows, frame by
//! frame, jumping over bodies; on and on where ids rise. Every body is checked
//! before it is given out.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;

use super::{
    EntryId, JournalError,
    cursor::Cursor,
    format::{FRAME_HEADER, FrameHeader, OpHead, body_checksum},
    index::Place,
    segment,
    shared::Shared,
    state::Found,
    storage::{SegmentFile, Storage},
};

impl Shared {
    /// The bodies of entries, `None` for those that do not live.
    pub(super) fn read(&self, ids: &[EntryId]) -> Result<Vec<Option<Bytes>>, JournalError> {
        let mut reader = None;
        ids.iter()
            .map(|&id| self.read_one(id, &mut reader))
            .collect()
    }

    fn read_one(
        &self,
        id: EntryId,
        reader: &mut Option<SegmentReader>,
    ) -> Result<Option<Bytes>, JournalError> {
        let mut failed_afresh_at = None;
        loop {
            let place = {
                let state = self.lock();
                if state.closing {
                    return Err(JournalError::Closed);
                }
                match state.find(id) {
                    Found::Pending(body) => return Ok(Some(body)),
                    Found::Gone => return Ok(None),
                    Found::Stored(place) => place,
                }
            };
            if reader.as_ref().is_some_and(|r| r.seq != place.seq) {
                *reader = None;
            }
            let afresh = reader.is_none();
            match self.read_at(id, place, reader) {
                Ok(body) => return Ok(Some(body)),
                // The entry was moved and its segment deleted in the meantime,
                // or the reader's buffer is older than the entry. Again, unless
                // this was from scratch and the entry still stands there.
                Err(error) if afresh && failed_afresh_at == Some(place) => return Err(error),
                Err(_) => {
                    failed_afresh_at = afresh.then_some(place);
                    *reader = None;
                }
            }
        }
    }

    fn read_at(
        &self,
        id: EntryId,
        place: Place,
        reader: &mut Option<SegmentReader>,
    ) -> Result<Bytes, JournalError> {
        if let Some(reader) = reader {
            return reader.find(id, place, &*self.storage);
        }
        let file = self.open_segment(place.seq)?;
        reader
            .insert(SegmentReader::new(place.seq, file))
            .find(id, place, &*self.storage)
    }
}

/// Where a walk ends that finds nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// With the frame that it is in.
    FrameEnd,
    /// With the segment.
    Found,
}

/// A walk through one segment.
struct SegmentReader {
    seq: u64,
    cursor: Cursor,
    /// The frame that the walk is in, and where the next operation is.
    frame: Option<FrameHeader>,
    frame_at: u64,
    op_at: u64,
    next_id: EntryId,
    /// The last entry found at home; those behind it are further on.
    last: Option<EntryId>,
    /// The last entry found where compaction had moved it. It moves entries in the
    /// order in which it meets them, so those behind it are mostly further on.
    last_moved: Option<EntryId>,
}

impl SegmentReader {
    fn new(seq: u64, file: Arc<dyn SegmentFile>) -> Self {
        Self {
            seq,
            cursor: Cursor::new(file),
            frame: None,
            frame_at: 0,
            op_at: 0,
            next_id: 0,
            last: None,
            last_moved: None,
        }
    }

    /// The body of an entry of this segment.
    fn find(
        &mut self,
        id: EntryId,
        place: Place,
        storage: &dyn Storage,
    ) -> Result<Bytes, JournalError> {
        let seq = self.seq;
        let failed = |e| JournalError::io("read", segment::path(storage, seq), e);
        let mut body = None;
        if place.home {
            let reads_on = self.last.is_some_and(|last| last < id);
            if !reads_on || self.frame_at < place.frame {
                self.enter(place.frame);
            }
        } else {
            // A frame may hold thousands that were moved: from its start for each
            // of them a spool is not read, it stands still.
            let reads_on = self.last_moved.is_some_and(|last| last < id)
                && self.frame.is_some()
                && self.frame_at == place.frame;
            if reads_on {
                body = self.walk(id, false, Until::FrameEnd).map_err(failed)?;
            }
            if body.is_none() {
                self.enter(place.frame);
            }
        }
        if body.is_none() {
            body = self.walk(id, place.home, Until::Found).map_err(failed)?;
        }
        let found = body.as_ref().map(|_| id);
        self.last = found.filter(|_| place.home);
        self.last_moved = found.filter(|_| !place.home);
        body.ok_or_else(|| JournalError::Corrupt {
            file: segment::path(storage, self.seq),
            offset: self.op_at,
            why: format!("entry {id} cannot be read where it was written"),
        })
    }

    fn enter(&mut self, frame: u64) {
        (self.frame, self.frame_at, self.op_at) = (None, frame, frame);
    }

    fn walk(&mut self, id: EntryId, home: bool, until: Until) -> io::Result<Option<Bytes>> {
        let first = self.frame_at;
        loop {
            if until == Until::FrameEnd && self.frame_at != first {
                return Ok(None);
            }
            let Some(frame) = self.frame else {
                let bytes = self.cursor.peek(self.frame_at, FRAME_HEADER)?;
                let Some(header) = FrameHeader::decode(bytes, self.frame_at) else {
                    return Ok(None);
                };
                self.frame = Some(header);
                self.op_at = self.frame_at + FRAME_HEADER as u64;
                self.next_id = header.first_id;
                continue;
            };
            let end = self.frame_at + frame.total();
            let may_hold = if home {
                let puts = frame.first_id..frame.first_id + u64::from(frame.puts);
                puts.contains(&id)
            } else {
                frame.moves > 0
            };
            if !may_hold || self.op_at >= end {
                self.enter(end);
                continue;
            }
            let bytes = self.cursor.peek(self.op_at, OpHead::MAX)?;
            let Some(head) = OpHead::decode(bytes, self.next_id) else {
                return Ok(None);
            };
            let body_at = self.op_at + head.len() as u64;
            self.op_at = body_at + head.body_len() as u64;
            let (found, crc) = match head {
                OpHead::Put { id, crc, .. } => {
                    self.next_id += 1;
                    (id, crc)
                }
                OpHead::Moved { id, crc, .. } => (id, crc),
                OpHead::Remove { .. } | OpHead::Mark => continue,
            };
            if found == id {
                let body = self.cursor.read(body_at, head.body_len())?;
                let sound = body.len() == head.body_len() && body_checksum(id, &body) == crc;
                return Ok(sound.then(|| body.into()));
            }
        }
    }
}

/// A few files kept open for readers: opening costs more than reading one entry.
pub(super) struct Handles(Mutex<VecDeque<(u64, Arc<dyn SegmentFile>)>>);

impl Handles {
    pub(super) fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    /// A segment's file.
    pub(super) fn open(&self, storage: &dyn Storage, seq: u64) -> io::Result<Arc<dyn SegmentFile>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = kept.iter().find(|(s, _)| *s == seq) {
            return Ok(file.clone());
        }
        let file = storage.open(&segment::name(seq))?;
        if kept.len() == OPEN_FILES {
            kept.pop_front();
        }
        kept.push_back((seq, file.clone()));
        Ok(file)
    }

    /// Closes a deleted segment's file: until then its space is not free.
    pub(super) fn forget(&self, seq: u64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(s, _)| *s != seq);
    }
}

/// Readers are few and mostly read on; a process has files for other things too.
const OPEN_FILES: usize = 8;
