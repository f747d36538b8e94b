//! Which offsets are done: per partition, the low watermark of what was
//! delivered and completed without a gap. Pure.
//!
//! Only delivered offsets count, because compaction and transaction markers
//! leave holes. Each assignment of a partition is a generation of its own: what
//! an earlier one delivered can no longer complete anything. A watermark never
//! goes backwards within a generation.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

/// A partition of a topic. Cheap to clone: each message carries one.
pub(in crate::adapter::kafka) type TopicPartition = (Arc<str>, i32);

/// What was delivered, and to whom it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The assignment that delivered it.
    pub(super) generation: u64,
    /// Its offset.
    pub(super) offset: i64,
}

/// The assignment of a delivery has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stale;

/// All partitions of one consumer.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    partitions: HashMap<TopicPartition, Partition>,
    generations: u64,
}

#[derive(Debug)]
struct Partition {
    generation: u64,
    /// Offsets delivered and not below the watermark, ascending; true: done.
    open: VecDeque<(i64, bool)>,
    /// The next offset to commit, once anything was done.
    next: Option<i64>,
}

impl Tracker {
    /// A partition is ours from now on; what an earlier assignment of it
    /// delivered is stale.
    pub(super) fn assign(&mut self, partition: TopicPartition) {
        self.generations += 1;
        let fresh = Partition {
            generation: self.generations,
            open: VecDeque::new(),
            next: None,
        };
        self.partitions.insert(partition, fresh);
    }

    /// A partition is no longer ours. Gives the offset to commit, if anything
    /// was done.
    pub(super) fn revoke(&mut self, partition: &TopicPartition) -> Option<i64> {
        self.partitions.remove(partition)?.next
    }

    /// Notes a delivery. `None` when the partition is not ours, or the offset
    /// was delivered in this generation already.
    pub(super) fn deliver(&mut self, partition: &TopicPartition, offset: i64) -> Option<Mark> {
        let p = self.partitions.get_mut(partition)?;
        let newest = p.open.back().map(|(o, _)| o + 1).or(p.next);
        if newest.is_some_and(|n| offset < n) {
            return None;
        }
        p.open.push_back((offset, false));
        Some(Mark {
            generation: p.generation,
            offset,
        })
    }

    /// Notes that a delivery is done. Gives the new watermark when it moved.
    ///
    /// # Errors
    /// [`Stale`] when the assignment that delivered it has ended.
    pub(super) fn complete(
        &mut self,
        partition: &TopicPartition,
        mark: Mark,
    ) -> Result<Option<i64>, Stale> {
        let p = self
            .partitions
            .get_mut(partition)
            .filter(|p| p.generation == mark.generation)
            .ok_or(Stale)?;
        let at = p
            .open
            .binary_search_by_key(&mark.offset, |(offset, _)| *offset)
            .map_err(|_| Stale)?;
        if let Some((_, done)) = p.open.get_mut(at) {
            *done = true;
        }
        let mut moved = None;
        while let Some((offset, true)) = p.open.front().copied() {
            p.open.pop_front();
            moved = Some(offset + 1);
        }
        if moved.is_some() {
            p.next = moved;
        }
        Ok(moved)
    }

    /// Whether a delivery still belongs to a current assignment.
    pub(super) fn is_current(&self, partition: &TopicPartition, mark: Mark) -> bool {
        self.partitions
            .get(partition)
            .is_some_and(|p| p.generation == mark.generation)
    }

    /// Whether a partition is ours.
    pub(super) fn owns(&self, partition: &TopicPartition) -> bool {
        self.partitions.contains_key(partition)
    }

    /// Every partition that is ours.
    pub(super) fn partitions(&self) -> Vec<TopicPartition> {
        self.partitions.keys().cloned().collect()
    }

    /// The offsets to commit, for partitions where anything was done.
    pub(super) fn watermarks(&self) -> Vec<(TopicPartition, i64)> {
        self.partitions
            .iter()
            .filter_map(|(tp, p)| Some((tp.clone(), p.next?)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tp() -> TopicPartition {
        ("t".into(), 0)
    }

    #[test]
    fn a_failed_message_is_not_passed_by_a_later_one() {
        let mut t = Tracker::default();
        t.assign(tp());
        let marks: Vec<Mark> = (5..8).map(|o| t.deliver(&tp(), o).unwrap()).collect();
        assert_eq!(t.complete(&tp(), marks[1]), Ok(None));
        assert_eq!(t.complete(&tp(), marks[2]), Ok(None));
        assert_eq!(t.complete(&tp(), marks[0]), Ok(Some(8)));
    }

    #[test]
    fn holes_in_the_log_do_not_hold_the_watermark() {
        let mut t = Tracker::default();
        t.assign(tp());
        let a = t.deliver(&tp(), 5).unwrap();
        let b = t.deliver(&tp(), 900).unwrap();
        assert_eq!(t.complete(&tp(), a), Ok(Some(6)));
        assert_eq!(t.complete(&tp(), b), Ok(Some(901)));
    }

    #[test]
    fn deliveries_of_an_ended_assignment_are_stale() {
        let mut t = Tracker::default();
        t.assign(tp());
        let old = t.deliver(&tp(), 5).unwrap();
        assert_eq!(t.revoke(&tp()), None);
        assert_eq!(t.complete(&tp(), old), Err(Stale));
        t.assign(tp());
        let new = t.deliver(&tp(), 5).unwrap();
        assert_eq!(t.complete(&tp(), old), Err(Stale));
        assert_eq!(t.complete(&tp(), new), Ok(Some(6)));
        assert_eq!(t.revoke(&tp()), Some(6));
    }

    #[test]
    fn an_offset_is_delivered_once_in_a_generation() {
        let mut t = Tracker::default();
        t.assign(tp());
        let mark = t.deliver(&tp(), 5).unwrap();
        assert_eq!(t.deliver(&tp(), 5), None);
        t.complete(&tp(), mark).unwrap();
        assert_eq!(t.deliver(&tp(), 5), None);
        assert_eq!(t.complete(&tp(), mark), Err(Stale));
    }

    proptest! {
        /// Whatever the gaps and the order of completion, the watermark only
        /// rises and never passes anything that is not done.
        #[test]
        fn the_watermark_never_passes_what_is_open(
            gaps in prop::collection::vec(1i64..5, 1..60),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let mut t = Tracker::default();
            t.assign(tp());
            let mut offset = 0;
            let mut open: Vec<Mark> = gaps
                .iter()
                .map(|gap| {
                    offset += gap;
                    t.deliver(&tp(), offset).unwrap()
                })
                .collect();
            let mut last = 0;
            for pick in picks {
                if open.is_empty() {
                    break;
                }
                let mark = open.remove(pick.index(open.len()));
                if let Some(next) = t.complete(&tp(), mark).unwrap() {
                    prop_assert!(next > last);
                    last = next;
                }
                if let Some(first) = open.iter().map(|m| m.offset).min() {
                    prop_assert!(last <= first);
                } else {
                    prop_assert_eq!(last, offset + 1);
                }
            }
        }
    }
}
