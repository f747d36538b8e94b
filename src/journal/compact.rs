//! Gives space back: deletes segments in which nothing lives, oldest first, and
//! gathers the last entries of a sparse oldest segment so that it can go too.
//!
//! Oldest first, one at a time with the folder synced after each: a remove must
//! never disappear from the disk before the put that it undoes.

use std::io;

use bytes::Bytes;

use super::{
    EntryId, JournalError,
    cursor::Cursor,
    format::{FRAME_HEADER, FrameHeader, MOVED_HEADER, OpHead, SEGMENT_HEADER, body_checksum},
    index::Index,
    segment,
    shared::Shared,
};

/// Entries of one segment, read to be appended again.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    from: u64,
    entries: Vec<(EntryId, Bytes)>,
}

impl Candidates {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Leaves out what was removed since it was read.
    pub(super) fn retain_live(&mut self, index: &Index) {
        let from = self.from;
        self.entries.retain(|&(id, _)| index.lives_in(id, from));
    }

    pub(super) fn entries(&self) -> &[(EntryId, Bytes)] {
        &self.entries
    }

    /// Bytes of the frame that holds them.
    pub(super) fn encoded_len(&self) -> u64 {
        let moves = self.entries.iter();
        let bytes: usize = moves.map(|(_, body)| MOVED_HEADER + body.len()).sum();
        (FRAME_HEADER + bytes) as u64
    }
}

/// The walk through the segment that is being emptied.
pub(super) struct Compactor {
    seq: u64,
    offset: u64,
    cursor: Cursor,
}

impl Compactor {
    /// The next live entries of a segment worth emptying; none when there is no
    /// such segment.
    pub(super) fn gather(
        current: &mut Option<Self>,
        shared: &Shared,
    ) -> Result<Candidates, JournalError> {
        let Some(seq) = shared.lock().compactable() else {
            return Ok(Candidates::default());
        };
        let mut walk = match current.take().filter(|walk| walk.seq == seq) {
            Some(walk) => walk,
            None => Self::enter(seq, shared)?,
        };
        let found = walk.next(shared)?;
        *current = Some(walk);
        Ok(found)
    }

    fn enter(seq: u64, shared: &Shared) -> Result<Self, JournalError> {
        let storage = &*shared.storage;
        let file = storage
            .open(&segment::name(seq))
            .map_err(|e| JournalError::io("open", segment::path(storage, seq), e))?;
        Ok(Self {
            seq,
            offset: SEGMENT_HEADER as u64,
            cursor: Cursor::new(file),
        })
    }

    fn next(&mut self, shared: &Shared) -> Result<Candidates, JournalError> {
        let path = segment::path(&*shared.storage, self.seq);
        let end = shared.lock().index.oldest().map_or(0, |oldest| oldest.end);
        let mut found = Candidates {
            from: self.seq,
            entries: Vec::new(),
        };
        let mut bytes = 0;
        while self.offset < end && bytes < CHUNK {
            let read = self.frame(shared, &mut found, &mut bytes);
            if !read.map_err(|e| JournalError::io("read", &path, e))? {
                return Err(JournalError::Corrupt {
                    file: path,
                    offset: self.offset,
                    why: "a frame changed since it was written, found while it was moved".into(),
                });
            }
        }
        // Removes in the meantime leave nothing to move. Anything else that
        // still lives would keep the writer looking for ever.
        let state = shared.lock();
        let left = state.index.oldest().map_or(0, |oldest| oldest.live);
        if found.is_empty() && left > 0 {
            return Err(JournalError::Corrupt {
                file: path,
                offset: self.offset,
                why: format!("{left} live entries were not found in it"),
            });
        }
        Ok(found)
    }

    /// Gathers from one frame; false if it cannot be read.
    fn frame(
        &mut self,
        shared: &Shared,
        found: &mut Candidates,
        bytes: &mut usize,
    ) -> io::Result<bool> {
        let header = self.cursor.peek(self.offset, FRAME_HEADER)?;
        let Some(header) = FrameHeader::decode(header, self.offset) else {
            return Ok(false);
        };
        let end = self.offset + header.total();
        let mut at = self.offset + FRAME_HEADER as u64;
        let mut next_id = header.first_id;
        self.offset = end;
        if header.puts == 0 && header.moves == 0 {
            return Ok(true);
        }
        while at < end {
            let head = self.cursor.peek(at, OpHead::MAX)?;
            let Some(head) = OpHead::decode(head, next_id) else {
                return Ok(false);
            };
            let body_at = at + head.len() as u64;
            at = body_at + head.body_len() as u64;
            let (id, crc) = match head {
                OpHead::Put { id, crc, .. } => {
                    next_id += 1;
                    (id, crc)
                }
                OpHead::Moved { id, crc, .. } => (id, crc),
                OpHead::Remove { .. } | OpHead::Mark => continue,
            };
            if !shared.lock().index.lives_in(id, self.seq) {
                continue;
            }
            let body = self.cursor.read(body_at, head.body_len())?;
            if body.len() != head.body_len() || body_checksum(id, &body) != crc {
                return Ok(false);
            }
            *bytes += body.len() + MOVED_HEADER;
            found.entries.push((id, body.into()));
        }
        Ok(true)
    }
}

/// Deletes what can go; says how many segments went.
pub(super) fn delete_dead(shared: &Shared) -> Result<usize, JournalError> {
    let storage = &*shared.storage;
    let mut deleted = 0;
    loop {
        let Some(seq) = shared.lock().deletable() else {
            return Ok(deleted);
        };
        let path = segment::path(storage, seq);
        storage
            .delete(&segment::name(seq))
            .map_err(|e| JournalError::io("delete", &path, e))?;
        storage
            .sync_dir()
            .map_err(|e| JournalError::io("sync the folder of", &path, e))?;
        shared.lock().index.drop_oldest();
        shared.handles.forget(seq);
        deleted += 1;
    }
}

/// What is moved between two syncs: enough to be quick about it, little enough
/// that appends hardly wait.
const CHUNK: usize = 1 << 20;
