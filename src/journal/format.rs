//! The format on disk, version 1: bytes in, bytes out, no I/O.
//!
//! ```text
//! segment  = header frame* zero*
//! header   = magic[8] version:u32 seq:u64 first_id:u64 crc:u32
//! frame    = len:u32 crc:u32 first_id:u64 puts:u32 moves:u32 synced:u64 op*   (len = bytes of op*)
//! op       = 1 len:u32 crc:u32 body        put; ids first_id, first_id+1, ...
//!          | 2 id:u64                      remove
//!          | 3 id:u64 len:u32 crc:u32 body the live entry `id`, moved here by compaction
//!          | 4                             mark: the log was closed here
//! ```
//! Numbers are little-endian, checksums CRC-32 (IEEE). A frame's checksum also
//! covers the segment's number and the frame's place in it, so that a frame in
//! the wrong place, a copy inside a body for one, is not taken for one. A body's
//! covers its id, and is what a single read checks. `synced` is the length of the
//! segment that was known to be durable when the frame was written: it tells
//! damage in what was once durable from a tail that a crash tore.

use crc32fast::Hasher;

use super::EntryId;

/// The version that is written.
pub(super) const VERSION: u32 = 1;
/// Bytes of a segment's header.
pub(super) const SEGMENT_HEADER: usize = 32;
/// Bytes of a frame before its operations.
pub(super) const FRAME_HEADER: usize = 32;
/// Bytes of a put before its body.
pub(super) const PUT_HEADER: usize = 9;
/// Bytes of a moved entry before its body.
pub(super) const MOVED_HEADER: usize = 17;
/// Bytes of a remove.
pub(super) const REMOVE_LEN: usize = 9;
/// The largest frame: what a length field of 32 bits holds with room to spare,
/// and what recovery must be able to hold in memory.
pub(super) const MAX_FRAME: u64 = 1 << 30;

/// A segment's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) seq: u64,
    /// The id that the first put after this point gets.
    pub(super) first_id: EntryId,
}

/// What the first bytes of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Valid(SegmentHeader),
    /// Written by a newer program.
    Unknown(u32),
    /// Damaged, or never written to the end.
    Bad,
}

impl SegmentHeader {
    pub(super) fn encode(self) -> [u8; SEGMENT_HEADER] {
        let mut out = Vec::with_capacity(SEGMENT_HEADER);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.first_id.to_le_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        let mut bytes = [0; SEGMENT_HEADER];
        bytes.copy_from_slice(&out);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Head {
        let mut fields = Fields(bytes);
        let (Some(magic), Some(version)) = (fields.take(MAGIC.len()), fields.u32()) else {
            return Head::Bad;
        };
        if magic != MAGIC || version == 0 {
            return Head::Bad;
        }
        if version != VERSION {
            return Head::Unknown(version);
        }
        let (Some(seq), Some(first_id), Some(crc)) = (fields.u64(), fields.u64(), fields.u32())
        else {
            return Head::Bad;
        };
        match bytes.get(..SEGMENT_HEADER - 4) {
            Some(covered) if crc32fast::hash(covered) == crc => Head::Valid(Self { seq, first_id }),
            _ => Head::Bad,
        }
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    /// Bytes of the operations behind it.
    pub(super) len: u32,
    pub(super) crc: u32,
    pub(super) first_id: EntryId,
    pub(super) puts: u32,
    pub(super) moves: u32,
    pub(super) synced: u64,
}

impl FrameHeader {
    /// Reads a header; `None` when it cannot be one at this place.
    pub(super) fn decode(bytes: &[u8], offset: u64) -> Option<Self> {
        let mut fields = Fields(bytes);
        let header = Self {
            len: fields.u32()?,
            crc: fields.u32()?,
            first_id: fields.u64()?,
            puts: fields.u32()?,
            moves: fields.u32()?,
            synced: fields.u64()?,
        };
        let least = u64::from(header.puts) * PUT_HEADER as u64
            + u64::from(header.moves) * MOVED_HEADER as u64;
        let plausible = header.len > 0
            && header.total() <= MAX_FRAME
            && least <= u64::from(header.len)
            && header.synced <= offset;
        plausible.then_some(header)
    }

    /// Bytes of the whole frame.
    pub(super) fn total(&self) -> u64 {
        FRAME_HEADER as u64 + u64::from(self.len)
    }

    /// Whether the checksum fits the frame, given whole.
    pub(super) fn verify(&self, frame: &[u8], seq: u64, offset: u64) -> bool {
        checksum(frame, seq, offset) == Some(self.crc)
    }
}

/// One operation of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op<'a> {
    Put { id: EntryId, body: &'a [u8] },
    Remove { id: EntryId },
    Moved { id: EntryId, body: &'a [u8] },
    Mark,
}

/// Builds one frame at the end of a buffer that will be written at a known place.
pub(super) struct FrameWriter<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    first_id: EntryId,
    puts: u32,
    moves: u32,
}

impl<'a> FrameWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>, first_id: EntryId) -> Self {
        let start = out.len();
        out.resize(start + FRAME_HEADER, 0);
        Self {
            out,
            start,
            first_id,
            puts: 0,
            moves: 0,
        }
    }

    pub(super) fn put(&mut self, body: &[u8]) {
        let id = self.first_id + u64::from(self.puts);
        self.puts += 1;
        self.out.push(PUT);
        self.body(id, body);
    }

    pub(super) fn remove(&mut self, id: EntryId) {
        self.out.push(REMOVE);
        self.out.extend_from_slice(&id.to_le_bytes());
    }

    pub(super) fn moved(&mut self, id: EntryId, body: &[u8]) {
        self.moves += 1;
        self.out.push(MOVED);
        self.out.extend_from_slice(&id.to_le_bytes());
        self.body(id, body);
    }

    pub(super) fn mark(&mut self) {
        self.out.push(MARK);
    }

    /// Fills in the header. `offset` is where in segment `seq` the frame stands.
    pub(super) fn finish(self, seq: u64, offset: u64, synced: u64) {
        let Some(frame) = self.out.get_mut(self.start..) else {
            return;
        };
        let len = u32::try_from(frame.len() - FRAME_HEADER).unwrap_or(u32::MAX);
        let mut header = Vec::with_capacity(FRAME_HEADER);
        header.extend_from_slice(&len.to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&self.first_id.to_le_bytes());
        header.extend_from_slice(&self.puts.to_le_bytes());
        header.extend_from_slice(&self.moves.to_le_bytes());
        header.extend_from_slice(&synced.to_le_bytes());
        if let Some(place) = frame.get_mut(..FRAME_HEADER) {
            place.copy_from_slice(&header);
        }
        let crc = checksum(frame, seq, offset).unwrap_or_default();
        if let Some(place) = frame.get_mut(CRC_AT..CRC_AT + 4) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
    }

    fn body(&mut self, id: EntryId, body: &[u8]) {
        // A batch over MAX_FRAME was refused before it got here.
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.out.extend_from_slice(&len.to_le_bytes());
        self.out
            .extend_from_slice(&body_checksum(id, body).to_le_bytes());
        self.out.extend_from_slice(body);
    }
}

/// The operations of a frame whose checksum fitted. `None` at the place where
/// they cannot be read.
pub(super) fn operations<'a>(
    header: &FrameHeader,
    mut ops: &'a [u8],
) -> impl Iterator<Item = Option<Op<'a>>> + use<'a> {
    let mut next_id = header.first_id;
    std::iter::from_fn(move || {
        if ops.is_empty() {
            return None;
        }
        let op = next_operation(&mut ops, &mut next_id);
        if op.is_none() {
            ops = &[];
        }
        Some(op)
    })
}

fn next_operation<'a>(ops: &mut &'a [u8], next_id: &mut EntryId) -> Option<Op<'a>> {
    let head = OpHead::decode(ops, *next_id)?;
    let (_, rest) = ops.split_at_checked(head.len())?;
    let (body, rest) = rest.split_at_checked(head.body_len())?;
    *ops = rest;
    Some(match head {
        OpHead::Put { id, .. } => {
            *next_id += 1;
            Op::Put { id, body }
        }
        OpHead::Moved { id, .. } => Op::Moved { id, body },
        OpHead::Remove { id } => Op::Remove { id },
        OpHead::Mark => Op::Mark,
    })
}

/// An operation without its body, for readers that jump over bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpHead {
    Put { id: EntryId, len: u32, crc: u32 },
    Remove { id: EntryId },
    Moved { id: EntryId, len: u32, crc: u32 },
    Mark,
}

impl OpHead {
    /// Most bytes that a head takes.
    pub(super) const MAX: usize = MOVED_HEADER;

    pub(super) fn decode(bytes: &[u8], next_id: EntryId) -> Option<Self> {
        let mut fields = Fields(bytes);
        Some(match *fields.take(1)?.first()? {
            PUT => Self::Put {
                id: next_id,
                len: fields.u32()?,
                crc: fields.u32()?,
            },
            REMOVE => Self::Remove { id: fields.u64()? },
            MOVED => Self::Moved {
                id: fields.u64()?,
                len: fields.u32()?,
                crc: fields.u32()?,
            },
            MARK => Self::Mark,
            _ => return None,
        })
    }

    /// Bytes of the head itself.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Put { .. } => PUT_HEADER,
            Self::Remove { .. } => REMOVE_LEN,
            Self::Moved { .. } => MOVED_HEADER,
            Self::Mark => 1,
        }
    }

    /// Bytes of the body behind it.
    pub(super) fn body_len(self) -> usize {
        match self {
            Self::Put { len, .. } | Self::Moved { len, .. } => len as usize,
            Self::Remove { .. } | Self::Mark => 0,
        }
    }
}

/// A body's checksum.
pub(super) fn body_checksum(id: EntryId, body: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&id.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn checksum(frame: &[u8], seq: u64, offset: u64) -> Option<u32> {
    let mut hasher = Hasher::new();
    hasher.update(&seq.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(frame.get(..CRC_AT)?);
    hasher.update(frame.get(CRC_AT + 4..)?);
    Some(hasher.finalize())
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

const MAGIC: &[u8; 8] = b"MSGHUBJL";
const CRC_AT: usize = 4;
const PUT: u8 = 1;
const REMOVE: u8 = 2;
const MOVED: u8 = 3;
const MARK: u8 = 4;
