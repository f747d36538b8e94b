//! How far a bounded reader reads: per partition an end that was fixed when it
//! began. Pure.
//!
//! A partition is read when a message at its end or behind it was seen, or when
//! the broker said that it has no more: offsets that were compacted away, or that
//! belong to transaction markers, are never delivered and must not be waited for.

use std::collections::BTreeMap;

/// The ends that are not reached yet.
#[derive(Debug)]
pub(super) struct Ends {
    /// None: it reads on for ever.
    left: Option<BTreeMap<i32, i64>>,
    /// Reached, and not told yet.
    reached: Vec<i32>,
}

impl Ends {
    pub(super) fn new(until: Option<&BTreeMap<i32, i64>>) -> Self {
        Self {
            left: until.cloned(),
            reached: Vec::new(),
        }
    }

    /// Whether it ends at all.
    pub(super) fn is_bounded(&self) -> bool {
        self.left.is_some()
    }

    /// Whether nothing is left to be read.
    pub(super) fn is_over(&self) -> bool {
        self.left.as_ref().is_some_and(BTreeMap::is_empty)
    }

    /// Whether a partition is to be read (still).
    pub(super) fn wants(&self, partition: i32) -> bool {
        self.left
            .as_ref()
            .is_none_or(|left| left.contains_key(&partition))
    }

    /// Whether a partition that is to be read is not among those that there are.
    pub(super) fn misses(&self, there: &[i32]) -> bool {
        self.left
            .as_ref()
            .is_some_and(|left| left.keys().any(|p| !there.contains(p)))
    }

    /// Reading begins there. False when that is the end already.
    pub(super) fn begin(&mut self, partition: i32, offset: i64) -> bool {
        let Some(left) = &mut self.left else {
            return true;
        };
        let more = left.get(&partition).is_some_and(|end| offset < *end);
        if !more {
            left.remove(&partition);
        }
        more
    }

    /// A message was seen. Whether it lies before the end.
    pub(super) fn admits(&mut self, partition: i32, offset: i64) -> bool {
        let Some(left) = &self.left else {
            return true;
        };
        let Some(end) = left.get(&partition).copied() else {
            return false;
        };
        if offset + 1 >= end {
            self.reach(partition);
        }
        offset < end
    }

    /// The broker has no more of a partition now. Its end was fixed before, so
    /// it lies behind.
    pub(super) fn reach(&mut self, partition: i32) {
        if let Some(left) = &mut self.left
            && left.remove(&partition).is_some()
        {
            self.reached.push(partition);
        }
    }

    /// Partitions that were read to their ends since the last call.
    pub(super) fn take_reached(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.reached)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_is_not_there_is_missed_until_it_was_read() {
        let mut ends = ends(&[(0, 1), (4, 1)]);
        assert!(!ends.misses(&[0, 1, 2, 3, 4]));
        assert!(ends.misses(&[0, 1]));
        ends.reach(4);
        assert!(!ends.misses(&[0, 1]));
        assert!(!Ends::new(None).misses(&[]));
    }

    fn ends(until: &[(i32, i64)]) -> Ends {
        Ends::new(Some(&until.iter().copied().collect()))
    }

    #[test]
    fn a_reader_without_ends_reads_everything_for_ever() {
        let mut ends = Ends::new(None);
        assert!(ends.begin(7, 0) && ends.admits(7, i64::MAX - 1) && ends.wants(8));
        ends.reach(7);
        assert!(ends.wants(7) && !ends.is_over() && ends.take_reached().is_empty());
    }

    #[test]
    fn it_is_over_when_the_last_message_before_each_end_was_seen() {
        let mut ends = ends(&[(0, 3), (1, 5)]);
        assert!(ends.begin(0, 1) && ends.begin(1, 4));
        assert!(ends.admits(0, 1) && ends.admits(0, 2));
        assert_eq!(ends.take_reached(), [0]);
        // What was fetched ahead.
        assert!(!ends.admits(0, 3) && !ends.wants(0) && !ends.is_over());
        assert!(ends.admits(1, 4) && ends.is_over());
    }

    #[test]
    fn offsets_that_do_not_exist_are_not_waited_for() {
        let mut ends = ends(&[(0, 3), (1, 5), (2, 9), (3, 0)]);
        // Compacted away up to behind the end.
        assert!(!ends.admits(0, 12));
        // A transaction's marker is the last record.
        assert!(ends.admits(1, 3));
        ends.reach(1);
        ends.reach(1);
        // Nothing to read from the start.
        assert!(!ends.begin(2, 9) && !ends.begin(3, 0));
        assert!(ends.is_over());
        assert_eq!(ends.take_reached(), [0, 1]);
    }
}
