//! Which ids a replay has read, so that it can skip what comes again. Bounded: of
//! more ids than it holds it forgets the oldest. Pure.

use std::{
    collections::{HashSet, VecDeque},
    hash::{BuildHasher, RandomState},
};

/// Ids by two hashes of 64 bits: among a million, two ids share both with a
/// chance of one in 10^26, and an id may have 128 characters.
#[derive(Debug)]
pub(super) struct Seen {
    most: usize,
    hashers: (RandomState, RandomState),
    set: HashSet<(u64, u64)>,
    order: VecDeque<(u64, u64)>,
}

impl Seen {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            hashers: (RandomState::new(), RandomState::new()),
            set: HashSet::new(),
            order: VecDeque::new(),
        }
    }

    /// Notes an id. False when it was there.
    pub(super) fn insert(&mut self, id: &str) -> bool {
        let hash = (self.hashers.0.hash_one(id), self.hashers.1.hash_one(id));
        if !self.set.insert(hash) {
            return false;
        }
        self.order.push_back(hash);
        if self.order.len() > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
        true
    }
}

/// Ids that one replay remembers; 64 MiB at most, with what the set needs.
pub(super) const MAX_SEEN: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_once_until_it_is_forgotten() {
        let mut seen = Seen::new(2);
        assert!(seen.insert("a") && seen.insert("b"));
        assert!(!seen.insert("a") && !seen.insert("b"));
        assert!(seen.insert("c"));
        assert!(seen.insert("a") && !seen.insert("c"));
    }
}
