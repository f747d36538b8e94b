//! Which entries live, and where: no I/O. Ids are dense, so an entry is a bit in
//! a word of 64 and costs a fraction of a byte; a word knows where in its segment
//! its first entry's frame stands, and a reader looks on from there.
//!
//! An entry stands in one segment at a time, its own or the one that compaction
//! moved it to, so a word of ids may be spread over several segments, each with
//! the bits that stand there.

use std::collections::{BTreeMap, VecDeque};

use super::{EntryId, Lsn};

/// What is known of one segment file.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) seq: u64,
    /// The id that the first put in it got, or would have got.
    pub(super) first_id: EntryId,
    /// Bytes in use.
    pub(super) end: u64,
    /// Entries that live here.
    pub(super) live: u64,
    /// The last remove of an entry that stood here: the file must outlive it,
    /// or a crash could lose the entry without what its remove was bound to.
    pub(super) last_remove: Lsn,
    /// Entries that ever stood here, and their bytes.
    entries: u64,
    bytes: u64,
}

impl Segment {
    /// Bytes of the live entries, reckoned at the segment's average.
    pub(super) fn live_bytes(&self) -> u64 {
        let bytes = u128::from(self.bytes) * u128::from(self.live);
        u64::try_from(bytes / u128::from(self.entries.max(1))).unwrap_or(u64::MAX)
    }
}

/// Where to look for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) seq: u64,
    /// A frame at or before the entry's own.
    pub(super) frame: u64,
    /// The entry stands where it was first put, among its neighbours in rising
    /// order.
    pub(super) home: bool,
}

/// The live entries of a log.
#[derive(Debug, Default)]
pub(super) struct Index {
    segments: VecDeque<Segment>,
    words: BTreeMap<(u64, u64), Word>,
    live: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Word {
    frame: u64,
    bits: u64,
}

impl Index {
    /// A segment was begun behind the others.
    pub(super) fn begin_segment(&mut self, seq: u64, first_id: EntryId, end: u64) {
        self.bytes += end;
        self.segments.push_back(Segment {
            seq,
            first_id,
            end,
            live: 0,
            last_remove: 0,
            entries: 0,
            bytes: 0,
        });
    }

    /// The segment grew to `end`.
    pub(super) fn grow(&mut self, seq: u64, end: u64) {
        if let Some(segment) = self.segment_mut(seq) {
            let grown = end.saturating_sub(segment.end);
            segment.end = end;
            self.bytes += grown;
        }
    }

    /// An entry of `bytes` was put, and lives.
    pub(super) fn insert(&mut self, id: EntryId, seq: u64, frame: u64, bytes: u64) {
        self.count(seq, bytes);
        self.set(id, seq, frame);
    }

    /// An entry was put that `lsn` has removed already.
    pub(super) fn insert_removed(&mut self, seq: u64, bytes: u64, lsn: Lsn) {
        self.count(seq, bytes);
        if let Some(segment) = self.segment_mut(seq) {
            segment.last_remove = segment.last_remove.max(lsn);
        }
    }

    /// A live entry was copied to another segment. One that was removed in the
    /// meantime stays removed.
    pub(super) fn relocate(&mut self, id: EntryId, seq: u64, frame: u64, bytes: u64) {
        self.count(seq, bytes);
        if self.clear(id).is_some() {
            self.set(id, seq, frame);
        }
    }

    /// A moved entry was read back. Its old place may be deleted already; that
    /// it was not removed is what its being moved says.
    pub(super) fn adopt(&mut self, id: EntryId, seq: u64, frame: u64, bytes: u64) {
        self.clear(id);
        self.insert(id, seq, frame, bytes);
    }

    /// An entry was removed; says whether it was there.
    pub(super) fn remove(&mut self, id: EntryId, lsn: Lsn) -> bool {
        let Some(seq) = self.clear(id) else {
            return false;
        };
        if let Some(segment) = self.segment_mut(seq) {
            segment.last_remove = segment.last_remove.max(lsn);
        }
        true
    }

    /// Where a live entry stands.
    pub(super) fn locate(&self, id: EntryId) -> Option<Place> {
        let (key, bit) = split(id);
        let (&(_, seq), word) = self.words_of(key).find(|(_, word)| word.bits & bit != 0)?;
        let home = self.segment(seq).is_some_and(|s| id >= s.first_id);
        Some(Place {
            seq,
            frame: word.frame,
            home,
        })
    }

    /// Whether an entry lives in this segment.
    pub(super) fn lives_in(&self, id: EntryId, seq: u64) -> bool {
        let (key, bit) = split(id);
        self.words
            .get(&(key, seq))
            .is_some_and(|word| word.bits & bit != 0)
    }

    /// The oldest segment.
    pub(super) fn oldest(&self) -> Option<&Segment> {
        self.segments.front()
    }

    /// Forgets the oldest segment, whose file is gone.
    pub(super) fn drop_oldest(&mut self) {
        if let Some(gone) = self.segments.pop_front() {
            self.bytes -= gone.end;
        }
    }

    /// The segments, oldest first.
    pub(super) fn segments(&self) -> impl ExactSizeIterator<Item = &Segment> {
        self.segments.iter()
    }

    /// Bytes in use in all segments.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the live entries, about.
    pub(super) fn live_bytes(&self) -> u64 {
        self.segments.iter().map(Segment::live_bytes).sum()
    }

    /// Live entries.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Words held, which is what the index costs.
    #[cfg(test)]
    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    fn words_of(&self, key: u64) -> impl Iterator<Item = (&(u64, u64), &Word)> {
        self.words.range((key, 0)..=(key, u64::MAX))
    }

    fn segment(&self, seq: u64) -> Option<&Segment> {
        self.segments.get(self.position(seq)?)
    }

    fn segment_mut(&mut self, seq: u64) -> Option<&mut Segment> {
        let at = self.position(seq)?;
        self.segments.get_mut(at)
    }

    /// Sequence numbers have no gaps.
    fn position(&self, seq: u64) -> Option<usize> {
        usize::try_from(seq.checked_sub(self.segments.front()?.seq)?).ok()
    }

    fn count(&mut self, seq: u64, bytes: u64) {
        if let Some(segment) = self.segment_mut(seq) {
            segment.entries += 1;
            segment.bytes += bytes;
        }
    }

    fn set(&mut self, id: EntryId, seq: u64, frame: u64) {
        let (key, bit) = split(id);
        let word = self
            .words
            .entry((key, seq))
            .or_insert(Word { frame, bits: 0 });
        word.bits |= bit;
        self.live += 1;
        if let Some(segment) = self.segment_mut(seq) {
            segment.live += 1;
        }
    }

    /// Takes an entry's bit away and says where it was.
    fn clear(&mut self, id: EntryId) -> Option<u64> {
        let (key, bit) = split(id);
        let (&(_, seq), _) = self.words_of(key).find(|(_, word)| word.bits & bit != 0)?;
        let word = self.words.get_mut(&(key, seq))?;
        word.bits &= !bit;
        if word.bits == 0 {
            self.words.remove(&(key, seq));
        }
        self.live -= 1;
        if let Some(segment) = self.segment_mut(seq) {
            segment.live -= 1;
        }
        Some(seq)
    }
}

fn split(id: EntryId) -> (u64, u64) {
    (id / 64, 1 << (id % 64))
}
