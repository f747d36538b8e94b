//! The index beside plain maps.

use std::collections::BTreeMap;

use crate::journal::{EntryId, Lsn, index::Index};

/// One segment, and where its live entries' words begin.
#[derive(Default)]
struct Plain {
    first_id: EntryId,
    end: u64,
    last_remove: Lsn,
    entries: u64,
    bytes: u64,
}

#[derive(Default)]
struct Maps {
    segments: BTreeMap<u64, Plain>,
    /// Where each live entry stands.
    live: BTreeMap<EntryId, u64>,
    /// Of a word of entries in a segment: the frame of the first that came.
    frames: BTreeMap<(u64, u64), u64>,
}

impl Maps {
    fn live_in(&self, seq: u64) -> u64 {
        self.live.values().filter(|s| **s == seq).count() as u64
    }

    fn put(&mut self, id: EntryId, seq: u64, frame: u64) {
        self.live.insert(id, seq);
        self.frames.entry((id / 64, seq)).or_insert(frame);
    }

    fn take(&mut self, id: EntryId) -> Option<u64> {
        let seq = self.live.remove(&id)?;
        let word = id / 64 * 64..(id / 64 + 1) * 64;
        if !self.live.range(word).any(|(_, s)| *s == seq) {
            self.frames.remove(&(id / 64, seq));
        }
        Some(seq)
    }

    fn count(&mut self, seq: u64, bytes: u64) {
        let segment = self.segments.get_mut(&seq).unwrap();
        segment.entries += 1;
        segment.bytes += bytes;
    }

    fn check(&self, index: &Index, ids: EntryId) {
        assert_eq!(index.live(), self.live.len() as u64);
        assert_eq!(index.words(), self.frames.len());
        let ends: u64 = self.segments.values().map(|s| s.end).sum();
        assert_eq!(index.bytes(), ends);
        let shares = self.segments.iter().map(|(seq, s)| {
            let live = self.live_in(*seq);
            s.bytes * live / s.entries.max(1)
        });
        assert_eq!(index.live_bytes(), shares.sum::<u64>());
        let oldest = index.oldest().map(|s| s.seq);
        assert_eq!(oldest, self.segments.keys().next().copied());
        assert_eq!(index.segments().len(), self.segments.len());
        for (found, (seq, plain)) in index.segments().zip(&self.segments) {
            assert_eq!((found.seq, found.first_id), (*seq, plain.first_id));
            assert_eq!((found.end, found.live), (plain.end, self.live_in(*seq)));
            assert_eq!(found.last_remove, plain.last_remove);
        }
        for id in 0..ids + 2 {
            let found = index.locate(id).map(|p| (p.seq, p.frame, p.home));
            let is = self.live.get(&id).map(|seq| {
                let home = id >= self.segments[seq].first_id;
                (*seq, self.frames[&(id / 64, *seq)], home)
            });
            assert_eq!(found, is, "entry {id}");
            for seq in self.segments.keys() {
                let lives = self.live.get(&id) == Some(seq);
                assert_eq!(index.lives_in(id, *seq), lives);
            }
        }
    }
}

/// Puts, removes and moves at random, with segments that come and go.
fn run(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut index, mut maps) = (Index::default(), Maps::default());
    let (mut next, mut lsn, mut last) = (1, 0, 2);
    for step in 0..200 {
        if maps.segments.is_empty() || rng.u8(..20) == 0 {
            last += 1;
            index.begin_segment(last, next, 32);
            let plain = Plain {
                first_id: next,
                end: 32,
                ..Plain::default()
            };
            maps.segments.insert(last, plain);
        }
        let frame = 32 + step * 100;
        let bytes = rng.u64(9..90);
        match rng.u8(..8) {
            0..3 => {
                index.insert(next, last, frame, bytes);
                maps.count(last, bytes);
                maps.put(next, last, frame);
                next += 1;
            }
            3 => {
                lsn += 1;
                index.insert_removed(last, bytes, lsn);
                maps.count(last, bytes);
                maps.segments.get_mut(&last).unwrap().last_remove = lsn;
                next += 1;
            }
            4..6 => {
                lsn += 1;
                let id = rng.u64(..next + 1);
                let seq = maps.take(id);
                assert_eq!(index.remove(id, lsn), seq.is_some());
                if let Some(seq) = seq {
                    maps.segments.get_mut(&seq).unwrap().last_remove = lsn;
                }
            }
            6 => {
                // Of one that was removed only the bytes are there.
                let id = rng.u64(..next);
                let adopted = rng.bool();
                maps.count(last, bytes);
                let was = maps.take(id);
                if was.is_some() || adopted {
                    maps.put(id, last, frame);
                }
                if adopted {
                    index.adopt(id, last, frame, bytes);
                } else {
                    index.relocate(id, last, frame, bytes);
                }
            }
            _ => {
                let seq = rng.u64(3..last + 2);
                let grown = rng.u64(..500);
                let end = maps.segments.get(&seq).map_or(9, |s| s.end + grown);
                index.grow(seq, end);
                if let Some(segment) = maps.segments.get_mut(&seq) {
                    segment.end = end;
                }
            }
        }
        while let Some(oldest) = maps.segments.keys().next().copied()
            && oldest < last
            && maps.live_in(oldest) == 0
        {
            maps.segments.remove(&oldest);
            index.drop_oldest();
        }
        if step % 4 == 0 {
            maps.check(&index, next);
        }
    }
    maps.check(&index, next);
}

#[test]
fn it_agrees_with_plain_maps() {
    for seed in 0..40 {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
