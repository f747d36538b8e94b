//! A map by ids and a queue that grow a little at a time.
//!
//! A table of a million entries that doubles moves all of them at once, and every
//! publish waits for that: 20 ms at a hundred thousand ids, 100 ms at a million. These
//! move a part of theirs at a time. They hold what a window of ids needs and no more.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
};

use super::dedup::IdHash;

/// A map by ids, of which there may be a million.
#[derive(Debug)]
pub(crate) struct IdMap<V> {
    /// None before the first entry: the windows of most subscriptions are small.
    parts: Vec<FewIds<V>>,
}

/// A map by ids, of which there are few. They are hashes already, under a key that
/// nobody can guess: to hash them once more would protect nothing.
pub(crate) type FewIds<V> = HashMap<IdHash, V, BuildHasherDefault<AsItIs>>;

/// Parts of a map. Each grows at a time of its own, since chance fills them a little
/// unevenly.
const PARTS: usize = 128;

impl<V> Default for IdMap<V> {
    fn default() -> Self {
        Self { parts: Vec::new() }
    }
}

impl<V> IdMap<V> {
    pub(crate) fn get(&self, id: &IdHash) -> Option<&V> {
        self.parts.get(id.part(PARTS))?.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: &IdHash) -> Option<&mut V> {
        self.parts.get_mut(id.part(PARTS))?.get_mut(id)
    }

    pub(crate) fn insert(&mut self, id: IdHash, value: V) {
        if self.parts.is_empty() {
            self.parts.resize_with(PARTS, FewIds::default);
        }
        if let Some(part) = self.parts.get_mut(id.part(PARTS)) {
            part.insert(id, value);
        }
    }

    pub(crate) fn remove(&mut self, id: &IdHash) -> Option<V> {
        self.parts.get_mut(id.part(PARTS))?.remove(id)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(HashMap::len).sum()
    }

    pub(crate) fn clear(&mut self) {
        self.parts.clear();
    }
}

/// A queue, of which there may be a million entries.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Full but for the first and the last; none is empty.
    blocks: VecDeque<VecDeque<T>>,
    len: usize,
}

/// Entries of a block.
const BLOCK: usize = 4096;

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            blocks: VecDeque::new(),
            len: 0,
        }
    }
}

impl<T> Queue<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn front(&self) -> Option<&T> {
        self.blocks.front()?.front()
    }

    pub(crate) fn push_back(&mut self, entry: T) {
        self.len += 1;
        match self.blocks.back_mut().filter(|block| block.len() < BLOCK) {
            Some(block) => block.push_back(entry),
            None => self.blocks.push_back(VecDeque::from([entry])),
        }
    }

    pub(crate) fn pop_front(&mut self) -> Option<T> {
        let block = self.blocks.front_mut()?;
        let entry = block.pop_front();
        if block.is_empty() {
            self.blocks.pop_front();
        }
        self.len -= usize::from(entry.is_some());
        entry
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for block in &mut self.blocks {
            block.retain(&mut keep);
        }
        self.blocks.retain(|block| !block.is_empty());
        self.len = self.blocks.iter().map(VecDeque::len).sum();
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Takes a number for its own hash.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn write(&mut self, bytes: &[u8]) {
        // Only one number comes here.
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::dedup::IdHasher;

    #[test]
    fn a_map_is_a_map() {
        let hasher = IdHasher::with_key([7; 16]);
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut map, mut model) = (IdMap::default(), HashMap::new());
        for step in 0..20_000 {
            let n = rng.u32(..500);
            let id = hasher.hash("t", &n.to_string());
            match rng.u8(..4) {
                0 | 1 => {
                    map.insert(id, step);
                    model.insert(n, step);
                }
                2 => assert_eq!(map.remove(&id), model.remove(&n)),
                _ => {
                    assert_eq!(map.get(&id), model.get(&n));
                    assert_eq!(map.get_mut(&id), model.get_mut(&n));
                }
            }
            assert_eq!(map.len(), model.len());
        }
        map.clear();
        assert_eq!(map.len(), 0);
        assert_eq!(map.get(&hasher.hash("t", "1")), None);
    }

    #[test]
    fn a_queue_is_a_queue() {
        let mut rng = fastrand::Rng::with_seed(2);
        let (mut queue, mut model) = (Queue::default(), VecDeque::new());
        for step in 0..100_000 {
            // It grows over some blocks, and is drained again.
            let rising = step / 25_000 % 2 == 0;
            if rng.u8(..10) < if rising { 8 } else { 2 } {
                queue.push_back(step);
                model.push_back(step);
            } else {
                assert_eq!(queue.pop_front(), model.pop_front());
            }
            if step % 10_000 == 0 {
                queue.retain(|n| n % 7 != 0);
                model.retain(|n| n % 7 != 0);
            }
            assert_eq!((queue.front(), queue.len()), (model.front(), model.len()));
        }
        queue.clear();
        assert_eq!((queue.front(), queue.len()), (None, 0));
    }

    #[test]
    fn no_step_moves_more_than_a_small_part() {
        const IDS: usize = 200_000;
        let hasher = IdHasher::with_key([7; 16]);
        let (mut map, mut queue) = (IdMap::default(), Queue::default());
        for n in 0..IDS {
            map.insert(hasher.hash("t", &n.to_string()), ());
            queue.push_back(n);
        }
        let largest = map.parts.iter().map(HashMap::len).max().unwrap();
        assert!(largest < 2 * IDS / PARTS, "{largest}");
        assert!(queue.blocks.iter().all(|block| block.len() <= BLOCK));
    }
}
