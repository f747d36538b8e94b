//! Reads a log back: which entries live and where, what a crash tore off, and
//! whether anything that was durable is damaged. Memory is the index and one
//! frame, whatever the log's size.
//!
//! A segment is synced before the next one is made, so only the last can end in
//! the middle of a frame. There the first frame that does not fit its checksum
//! ends the log, unless a later frame says that the place was durable before:
//! that is damage, and nothing is thrown away.

use std::{path::PathBuf, sync::Arc};

use super::{
    EntryId, JournalError, RecoveryReport,
    cursor::Cursor,
    format::{
        FRAME_HEADER, FrameHeader, Head, MOVED_HEADER, Op, PUT_HEADER, SEGMENT_HEADER,
        SegmentHeader, VERSION, operations,
    },
    index::Index,
    segment,
    storage::{SegmentFile, Storage},
};

/// What the first pass over a log found.
pub(super) struct Recovered {
    pub(super) index: Index,
    pub(super) next_id: EntryId,
    pub(super) next_seq: u64,
    pub(super) report: RecoveryReport,
}

/// Checks every frame, builds the index, cuts off a torn tail.
pub(super) fn scan(storage: &dyn Storage) -> Result<Recovered, JournalError> {
    let names = storage
        .list()
        .map_err(|e| JournalError::io("list", storage.path(), e))?;
    let mut seqs: Vec<u64> = names.iter().filter_map(|n| segment::parse(n)).collect();
    seqs.sort_unstable();
    let mut found = Recovered {
        index: Index::default(),
        next_id: 1,
        next_seq: seqs.first().copied().unwrap_or(1),
        report: RecoveryReport::default(),
    };
    let last = seqs.last().copied();
    for seq in seqs {
        if seq != found.next_seq {
            return Err(JournalError::Corrupt {
                file: storage.path().join(segment::name(found.next_seq)),
                offset: 0,
                why: format!("the file is missing, and segment {seq} follows it"),
            });
        }
        let file = storage
            .open(&segment::name(seq))
            .map_err(|e| JournalError::io("open", segment::path(storage, seq), e))?;
        Scan {
            storage,
            seq,
            path: segment::path(storage, seq),
            cursor: Cursor::new(file.clone()),
            file,
            is_last: Some(seq) == last,
        }
        .run(&mut found)?;
    }
    found.report.entries = found.index.live();
    found.report.segments = found.index.segments().len();
    Ok(found)
}

/// Calls `visit` with each live entry, in the order of the log.
pub(super) fn replay(
    storage: &dyn Storage,
    index: &Index,
    mut visit: impl FnMut(EntryId, &[u8]),
) -> Result<(), JournalError> {
    for segment in index.segments().filter(|segment| segment.live > 0) {
        let (seq, path) = (segment.seq, segment::path(storage, segment.seq));
        let file = storage
            .open(&segment::name(seq))
            .map_err(|e| JournalError::io("open", &path, e))?;
        let mut cursor = Cursor::new(file);
        let mut offset = SEGMENT_HEADER as u64;
        while offset < segment.end {
            let frame = read_frame(&mut cursor, seq, offset)
                .map_err(|e| JournalError::io("read", &path, e))?;
            let Some((header, ops)) = frame else {
                return Err(damaged(path, offset, "the frame changed while it was read"));
            };
            for op in operations(&header, ops) {
                match op {
                    Some(Op::Put { id, body } | Op::Moved { id, body })
                        if index.lives_in(id, seq) =>
                    {
                        visit(id, body);
                    }
                    _ => {}
                }
            }
            offset += header.total();
        }
    }
    Ok(())
}

struct Scan<'a> {
    storage: &'a dyn Storage,
    seq: u64,
    path: PathBuf,
    file: Arc<dyn SegmentFile>,
    cursor: Cursor,
    is_last: bool,
}

impl Scan<'_> {
    fn run(mut self, found: &mut Recovered) -> Result<(), JournalError> {
        let head = self
            .cursor
            .peek(0, SEGMENT_HEADER)
            .map(SegmentHeader::decode)
            .map_err(|e| self.io("read", e))?;
        let header = match head {
            Head::Valid(header) if header.seq == self.seq => header,
            Head::Valid(header) => {
                let why = format!("the header belongs to segment {}", header.seq);
                return Err(damaged(self.path, 0, why));
            }
            Head::Unknown(version) => {
                return Err(JournalError::Version {
                    file: self.path,
                    found: version,
                    known: VERSION,
                });
            }
            Head::Bad => return self.unfinished(found),
        };
        if found.index.segments().len() == 0 {
            found.next_id = header.first_id;
        } else if header.first_id != found.next_id {
            let why = format!(
                "the segment begins with id {}, and {} is next",
                header.first_id, found.next_id
            );
            return Err(damaged(self.path, 0, why));
        }
        let mut offset = SEGMENT_HEADER as u64;
        found.index.begin_segment(self.seq, header.first_id, offset);
        while let Some((header, ops)) = read_frame(&mut self.cursor, self.seq, offset)
            .map_err(|e| JournalError::io("read", self.path.clone(), e))?
        {
            apply(found, self.seq, offset, &header, ops)
                .map_err(|why| damaged(self.path.clone(), offset, why))?;
            offset += header.total();
            found.index.grow(self.seq, offset);
        }
        found.next_seq = self.seq + 1;
        self.end(offset, found)
    }

    /// Frames end at `offset`: cleanly, torn, or damaged.
    fn end(mut self, offset: u64, found: &mut Recovered) -> Result<(), JournalError> {
        let rest = self.cursor.first_nonzero(offset);
        let clean = rest.map_err(|e| self.io("read", e))?.is_none();
        let len = self.file.len().map_err(|e| self.io("measure", e))?;
        if !self.is_last {
            if clean {
                return Ok(());
            }
            let why = "a frame does not fit its checksum, and newer segments follow";
            return Err(damaged(self.path, offset, why));
        }
        if !clean {
            if let Some(at) = self.durable_beyond(offset, len)? {
                let why = format!(
                    "a frame does not fit its checksum, though it was durable before the frame at {at} was written"
                );
                return Err(damaged(self.path, offset, why));
            }
            found.report.torn = Some(TornTail {
                file: self.path.clone(),
                offset,
                bytes: len - offset,
            });
        }
        if len > offset {
            // Durable before anything is written behind it: in a segment that
            // is not the last such a tail would be damage.
            self.file
                .truncate(offset)
                .and_then(|()| self.file.sync())
                .map_err(|e| self.io("truncate", e))?;
        }
        Ok(())
    }

    /// A valid frame behind `bad` that was written when `bad` was durable.
    fn durable_beyond(&mut self, bad: u64, len: u64) -> Result<Option<u64>, JournalError> {
        let mut offset = bad + 1;
        while offset + FRAME_HEADER as u64 <= len {
            let candidate = self
                .cursor
                .peek(offset, FRAME_HEADER)
                .map(|bytes| FrameHeader::decode(bytes, offset))
                .map_err(|e| self.io("read", e))?;
            if candidate.is_some_and(|header| header.synced > bad) {
                let valid =
                    read_frame(&mut self.cursor, self.seq, offset).map(|frame| frame.is_some());
                if valid.map_err(|e| self.io("read", e))? {
                    return Ok(Some(offset));
                }
            }
            offset += 1;
        }
        Ok(None)
    }

    /// A segment without a header. Nothing is written behind a header that is
    /// not durable, so in the last file that is one whose making a crash cut
    /// short; it goes, if the next id is known from elsewhere.
    fn unfinished(mut self, found: &mut Recovered) -> Result<(), JournalError> {
        let rest = self.cursor.first_nonzero(SEGMENT_HEADER as u64);
        let empty = rest.map_err(|e| self.io("read", e))?.is_none();
        let id_known = self.seq == 1 || found.index.segments().len() > 0;
        if !(self.is_last && empty && id_known) {
            return Err(damaged(self.path, 0, "the segment's header is damaged"));
        }
        self.storage
            .delete(&segment::name(self.seq))
            .and_then(|()| self.storage.sync_dir())
            .map_err(|e| self.io("delete", e))?;
        found.report.unfinished = Some(self.path);
        Ok(())
    }

    fn io(&self, what: &'static str, error: std::io::Error) -> JournalError {
        JournalError::io(what, &self.path, error)
    }
}

/// Where a crash cut the log off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The file, the last of the log.
    pub file: PathBuf,
    /// Where its valid frames end.
    pub offset: u64,
    /// Bytes that were cut off, allocated but unused ones included.
    pub bytes: u64,
}

/// The valid frame at a place, if there is one.
fn read_frame(
    cursor: &mut Cursor,
    seq: u64,
    offset: u64,
) -> std::io::Result<Option<(FrameHeader, &[u8])>> {
    let Some(header) = FrameHeader::decode(cursor.peek(offset, FRAME_HEADER)?, offset) else {
        return Ok(None);
    };
    let total = usize::try_from(header.total()).unwrap_or(usize::MAX);
    // A length that is damaged must not become an allocation.
    if header.total() > cursor.remaining(offset)? {
        return Ok(None);
    }
    let frame = cursor.peek(offset, total)?;
    let whole = frame.len() == total && header.verify(frame, seq, offset);
    Ok(whole.then(|| (header, frame.get(FRAME_HEADER..).unwrap_or_default())))
}

fn apply(
    found: &mut Recovered,
    seq: u64,
    offset: u64,
    header: &FrameHeader,
    ops: &[u8],
) -> Result<(), String> {
    if header.first_id != found.next_id {
        return Err(format!(
            "the frame begins with id {}, and {} is next",
            header.first_id, found.next_id
        ));
    }
    for op in operations(header, ops) {
        match op {
            Some(Op::Put { id, body }) => {
                let bytes = (PUT_HEADER + body.len()) as u64;
                found.index.insert(id, seq, offset, bytes);
                found.next_id = id + 1;
            }
            Some(Op::Moved { id, body }) => {
                let bytes = (MOVED_HEADER + body.len()) as u64;
                found.index.adopt(id, seq, offset, bytes);
            }
            Some(Op::Remove { id }) => {
                found.index.remove(id, 0);
            }
            Some(Op::Mark) => {}
            None => return Err("an operation cannot be read".into()),
        }
    }
    Ok(())
}

fn damaged(file: PathBuf, offset: u64, why: impl Into<String>) -> JournalError {
    JournalError::Corrupt {
        file,
        offset,
        why: why.into(),
    }
}
