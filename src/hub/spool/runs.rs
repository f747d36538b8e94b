//! Pairs of numbers that mostly rise together, in little room: what is spooled
//! in one go has consecutive sequence numbers and consecutive names in the
//! store, so ten million entries are a handful of runs.

use std::collections::BTreeMap;

/// A map from one number to another, kept as runs in which both rise by one.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    /// By their first key: the first value, and how many there are (at least 1).
    runs: BTreeMap<u64, (u64, u64)>,
    len: usize,
}

impl Runs {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many runs stand for it: what the memory grows with.
    #[cfg(test)]
    pub(crate) fn pieces(&self) -> usize {
        self.runs.len()
    }

    pub(crate) fn first(&self) -> Option<(u64, u64)> {
        self.runs.first_key_value().map(|(key, run)| (*key, run.0))
    }

    pub(crate) fn last_key(&self) -> Option<u64> {
        let (key, (_, count)) = self.runs.last_key_value()?;
        Some(key + count - 1)
    }

    pub(crate) fn get(&self, key: u64) -> Option<u64> {
        let (start, (value, count)) = self.runs.range(..=key).next_back()?;
        (key - start < *count).then(|| value + (key - start))
    }

    /// Adds a pair; the key must not be there.
    pub(crate) fn insert(&mut self, key: u64, value: u64) {
        debug_assert!(self.get(key).is_none(), "the key is there");
        self.len += 1;
        let before = self.runs.range_mut(..key).next_back();
        let extends = |start: u64, run: &(u64, u64)| start + run.1 == key && run.0 + run.1 == value;
        let mut joined = None;
        if let Some((start, run)) = before
            && extends(*start, run)
        {
            run.1 += 1;
            joined = Some((*start, *run));
        }
        // What stood behind the gap that was just filled.
        let behind = self.runs.get(&(key + 1)).copied();
        match (joined, behind) {
            (Some((start, (first, count))), Some((next, more))) if next == value + 1 => {
                self.runs.remove(&(key + 1));
                self.runs.insert(start, (first, count + more));
            }
            (None, Some((next, more))) if next == value + 1 => {
                self.runs.remove(&(key + 1));
                self.runs.insert(key, (value, more + 1));
            }
            (Some(_), _) => {}
            (None, _) => {
                self.runs.insert(key, (value, 1));
            }
        }
    }

    /// Takes a pair out.
    pub(crate) fn remove(&mut self, key: u64) -> Option<u64> {
        let (&start, &(value, count)) = self.runs.range(..=key).next_back()?;
        let at = key - start;
        if at >= count {
            return None;
        }
        self.len -= 1;
        if at == 0 {
            self.runs.remove(&start);
        } else {
            self.runs.insert(start, (value, at));
        }
        if at + 1 < count {
            self.runs.insert(key + 1, (value + at + 1, count - at - 1));
        }
        Some(value + at)
    }

    /// Keys from one on, in order.
    pub(crate) fn keys_from(&self, key: u64) -> impl Iterator<Item = u64> {
        // The run that the key is in begins before it.
        let begin = match self.runs.range(..=key).next_back() {
            Some((start, _)) => *start,
            None => key,
        };
        self.runs
            .range(begin..)
            .flat_map(move |(start, (_, n))| key.max(*start)..start + n)
    }

    /// The first keys, at most `count`.
    pub(crate) fn first_keys(&self, count: usize) -> Vec<u64> {
        let keys = self
            .runs
            .iter()
            .flat_map(|(start, (_, n))| *start..start + n);
        keys.take(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_map_whatever_the_order_of_changes() {
        for seed in 0..300 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = BTreeMap::new();
            let mut runs = Runs::default();
            for _ in 0..400 {
                let key = rng.u64(0..60);
                if rng.bool() && !model.contains_key(&key) {
                    let value = if rng.u8(..4) > 0 {
                        key + 1000
                    } else {
                        rng.u64(..9999)
                    };
                    model.insert(key, value);
                    runs.insert(key, value);
                } else {
                    assert_eq!(runs.remove(key), model.remove(&key), "seed {seed}");
                }
                assert_eq!(runs.len(), model.len());
                assert_eq!(runs.is_empty(), model.is_empty());
                let first = model.first_key_value().map(|(k, v)| (*k, *v));
                assert_eq!(runs.first(), first, "seed {seed}");
                assert_eq!(runs.last_key(), model.last_key_value().map(|(k, _)| *k));
                assert!(runs.first_keys(7).iter().eq(model.keys().take(7)));
                let from = rng.u64(0..62);
                let keys = model.range(from..).map(|(k, _)| *k);
                assert!(runs.keys_from(from).eq(keys), "seed {seed}, from {from}");
            }
            for key in 0..60 {
                assert_eq!(runs.get(key), model.get(&key).copied(), "seed {seed}");
            }
        }
    }

    #[test]
    fn what_rises_together_is_one_run_also_after_a_gap_was_filled() {
        let mut runs = Runs::default();
        for key in (0..1000).filter(|k| k % 7 != 3) {
            runs.insert(key, key + 5);
        }
        for key in (0..1000).filter(|k| k % 7 == 3) {
            runs.insert(key, key + 5);
        }
        assert_eq!((runs.len(), runs.pieces()), (1000, 1));
        let mut runs = Runs::default();
        for key in (0..1000).rev() {
            runs.insert(key, key + 5);
        }
        assert_eq!((runs.len(), runs.pieces()), (1000, 1), "from behind");
    }
}
