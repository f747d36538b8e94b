//! One consumer group as a pure state machine: who owns which partition, what
//! is in hand, and how far the group has come. The position that it commits
//! never passes a message that is not finished.
//!
//! A partition changes hands only when its owner has nothing of it in hand any
//! more, so that no message is in two members' hands: until then the owner
//! gets nothing new of it.

use std::collections::{BTreeMap, BTreeSet};

/// A member, by its number in the broker.
pub(super) type MemberId = u64;

/// A stream, by its number in the broker.
pub(super) type StreamId = u64;

/// A partition of a stream.
pub(super) type PartitionKey = (StreamId, i32);

/// A group.
#[derive(Debug, Default)]
pub(super) struct Group {
    members: BTreeMap<MemberId, Member>,
    cursors: BTreeMap<PartitionKey, Cursor>,
}

/// What a member wants.
#[derive(Debug, Default)]
pub(super) struct Member {
    pub(super) streams: BTreeSet<StreamId>,
    /// Only this partition of each.
    pub(super) partition: Option<i32>,
    /// Its name across restarts.
    pub(super) instance: Option<String>,
}

/// How far a group has come in one partition.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    committed: Option<i64>,
    /// The next offset to hand out for the first time.
    next: i64,
    unfinished: BTreeSet<i64>,
    /// Given back; handed out again before anything new.
    returned: BTreeSet<i64>,
    owner: Option<MemberId>,
    /// Who is to own it once `owner` has nothing in hand.
    heir: Option<MemberId>,
    /// Counts moves of the position; verdicts on what was handed out before a
    /// move are void.
    epoch: u64,
}

impl Group {
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn members(&self) -> impl Iterator<Item = MemberId> {
        self.members.keys().copied()
    }

    /// Whether a live member has this name.
    pub(super) fn has_instance(&self, instance: &str) -> bool {
        self.members
            .values()
            .any(|m| m.instance.as_deref() == Some(instance))
    }

    pub(super) fn join(&mut self, id: MemberId, member: Member) {
        self.members.insert(id, member);
    }

    /// Adds a stream to what a member wants.
    pub(super) fn cover(&mut self, id: MemberId, stream: StreamId) {
        if let Some(member) = self.members.get_mut(&id) {
            member.streams.insert(stream);
        }
    }

    /// A member gets nothing new; what it holds it may still finish.
    pub(super) fn leave(&mut self, id: MemberId) {
        self.members.remove(&id);
    }

    /// Forgets a stream.
    pub(super) fn forget_stream(&mut self, stream: StreamId) {
        self.cursors.retain(|(s, _), _| *s != stream);
        for member in self.members.values_mut() {
            member.streams.remove(&stream);
        }
    }

    pub(super) fn cursor(&self, key: PartitionKey) -> Option<&Cursor> {
        self.cursors.get(&key)
    }

    pub(super) fn cursor_mut(&mut self, key: PartitionKey) -> Option<&mut Cursor> {
        self.cursors.get_mut(&key)
    }

    /// The cursor of a partition, made when there is none.
    pub(super) fn cursor_or_new(&mut self, key: PartitionKey) -> &mut Cursor {
        self.cursors.entry(key).or_default()
    }

    /// The partitions that a member is fed from now.
    pub(super) fn owned_by(&self, id: MemberId) -> impl Iterator<Item = PartitionKey> {
        self.cursors
            .iter()
            .filter(move |(_, c)| c.owner == Some(id) && c.heir == Some(id))
            .map(|(key, _)| *key)
    }

    /// Shares the partitions among the members that want them: evenly, and so
    /// that as few as possible change hands.
    pub(super) fn rebalance(&mut self, streams: &BTreeMap<StreamId, i32>) {
        let keys: Vec<PartitionKey> = streams
            .iter()
            .flat_map(|(stream, count)| (0..*count).map(|p| (*stream, p)))
            .collect();
        let wants = |members: &BTreeMap<MemberId, Member>, id: MemberId, key: PartitionKey| {
            members.get(&id).is_some_and(|m| {
                m.streams.contains(&key.0) && m.partition.is_none_or(|p| p == key.1)
            })
        };
        let mut load: BTreeMap<MemberId, usize> = self.members.keys().map(|m| (*m, 0)).collect();
        let mut heirs: BTreeMap<PartitionKey, MemberId> = BTreeMap::new();
        for key in &keys {
            let before = self.cursors.get(key).and_then(|c| c.heir);
            if let Some(id) = before.filter(|id| wants(&self.members, *id, *key)) {
                heirs.insert(*key, id);
                *load.entry(id).or_default() += 1;
            }
        }
        for key in &keys {
            if heirs.contains_key(key) {
                continue;
            }
            let least = load
                .iter()
                .filter(|(id, _)| wants(&self.members, **id, *key))
                .min_by_key(|(id, n)| (**n, **id))
                .map(|(id, _)| *id);
            if let Some(id) = least {
                heirs.insert(*key, id);
                *load.entry(id).or_default() += 1;
            }
        }
        // Each move lessens the sum of squared loads, so this ends.
        loop {
            let better = heirs.iter().find_map(|(key, from)| {
                let heavy = load.get(from).copied().unwrap_or(0);
                load.iter()
                    .filter(|(id, n)| **n + 1 < heavy && wants(&self.members, **id, *key))
                    .min_by_key(|(id, n)| (**n, **id))
                    .map(|(to, _)| (*key, *from, *to))
            });
            let Some((key, from, to)) = better else { break };
            heirs.insert(key, to);
            *load.entry(from).or_default() -= 1;
            *load.entry(to).or_default() += 1;
        }
        for key in keys {
            let heir = heirs.get(&key).copied();
            if heir.is_some() || self.cursors.contains_key(&key) {
                let cursor = self.cursors.entry(key).or_default();
                cursor.heir = heir;
                cursor.pass_on();
            }
        }
    }
}

impl Cursor {
    pub(super) fn committed(&self) -> Option<i64> {
        self.committed
    }

    #[cfg(test)]
    fn owner(&self) -> Option<MemberId> {
        self.owner
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn next(&self) -> i64 {
        self.next
    }

    /// Whether something given back waits.
    pub(super) fn has_returned(&self) -> bool {
        !self.returned.is_empty()
    }

    /// Starts where the group has never been; the start is committed, or a
    /// crash before the first commit would start elsewhere.
    pub(super) fn start(&mut self, at: i64) {
        self.next = at;
        self.committed = Some(at);
    }

    /// The oldest offsets are gone: nothing before `low` can be handed out,
    /// and reading goes on at `resume`.
    pub(super) fn truncate(&mut self, low: i64, resume: i64) {
        self.returned = self.returned.split_off(&low);
        if self.next < low {
            self.next = resume;
            self.commit();
        }
    }

    /// The next offset to hand out and whether it was handed out before.
    pub(super) fn take(&mut self, high: i64) -> Option<(i64, bool)> {
        let (offset, again) = match self.returned.pop_first() {
            Some(offset) => (offset, true),
            None if self.next < high => {
                self.next += 1;
                (self.next - 1, false)
            }
            None => return None,
        };
        self.unfinished.insert(offset);
        Some((offset, again))
    }

    /// Finishes a message. False: it was not in hand (any more).
    pub(super) fn finish(&mut self, offset: i64, epoch: u64) -> bool {
        if epoch != self.epoch || !self.unfinished.remove(&offset) {
            return false;
        }
        self.commit();
        self.pass_on();
        true
    }

    /// Gives a message back. False: it was not in hand (any more).
    pub(super) fn give_back(&mut self, offset: i64, epoch: u64) -> bool {
        if epoch != self.epoch || !self.unfinished.remove(&offset) {
            return false;
        }
        self.returned.insert(offset);
        self.pass_on();
        true
    }

    /// Moves the position; what is in hand is void.
    pub(super) fn seek(&mut self, to: i64) {
        self.epoch += 1;
        self.unfinished.clear();
        self.returned.clear();
        self.next = to;
        self.committed = Some(to);
        self.pass_on();
    }

    /// Takes a position that somebody committed for the group. Without an
    /// owner reading goes on there; with one, what lies before it is done.
    pub(super) fn commit_to(&mut self, to: i64) {
        if self.owner.is_none() {
            self.seek(to);
            return;
        }
        self.unfinished = self.unfinished.split_off(&to);
        self.returned = self.returned.split_off(&to);
        self.next = self.next.max(to);
        self.committed = Some(to);
        self.pass_on();
    }

    fn commit(&mut self) {
        let unfinished = self.unfinished.first().copied();
        let returned = self.returned.first().copied();
        let watermark = [unfinished, returned, Some(self.next)]
            .into_iter()
            .flatten()
            .min();
        self.committed = watermark;
    }

    fn pass_on(&mut self) {
        if self.owner != self.heir && self.unfinished.is_empty() {
            self.owner = self.heir;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(streams: &[StreamId]) -> Member {
        Member {
            streams: streams.iter().copied().collect(),
            ..Member::default()
        }
    }

    fn owners(group: &Group, count: i32) -> Vec<Option<MemberId>> {
        (0..count)
            .map(|p| group.cursor((1, p)).and_then(Cursor::owner))
            .collect()
    }

    #[test]
    fn members_share_the_partitions_and_few_change_hands() {
        let streams = BTreeMap::from([(1, 6)]);
        let mut group = Group::default();
        group.join(10, member(&[1]));
        group.rebalance(&streams);
        assert_eq!(owners(&group, 6), [Some(10); 6]);
        group.join(11, member(&[1]));
        group.rebalance(&streams);
        let after = owners(&group, 6);
        assert_eq!(after.iter().filter(|o| **o == Some(10)).count(), 3);
        group.join(12, member(&[1]));
        group.rebalance(&streams);
        let last = owners(&group, 6);
        let moved = after.iter().zip(&last).filter(|(a, b)| a != b).count();
        assert_eq!(moved, 2);
    }

    #[test]
    fn a_partition_changes_hands_only_when_nothing_of_it_is_in_hand() {
        let streams = BTreeMap::from([(1, 1)]);
        let mut group = Group::default();
        group.join(10, member(&[1]));
        group.rebalance(&streams);
        let cursor = group.cursor_mut((1, 0)).unwrap();
        assert_eq!(cursor.take(5), Some((0, false)));
        group.leave(10);
        group.join(11, member(&[1]));
        group.rebalance(&streams);
        assert_eq!(owners(&group, 1), [Some(10)]);
        assert_eq!(group.owned_by(10).count(), 0);
        assert!(group.cursor_mut((1, 0)).unwrap().give_back(0, 0));
        assert_eq!(owners(&group, 1), [Some(11)]);
        let cursor = group.cursor_mut((1, 0)).unwrap();
        assert_eq!(cursor.take(5), Some((0, true)));
    }

    #[test]
    fn verdicts_from_before_a_seek_are_void() {
        let mut cursor = Cursor::default();
        cursor.start(0);
        cursor.take(5);
        cursor.seek(3);
        assert!(!cursor.finish(0, 0));
        assert_eq!(cursor.committed(), Some(3));
        assert_eq!(cursor.take(5), Some((3, false)));
        assert!(cursor.finish(3, 1));
        assert_eq!(cursor.committed(), Some(4));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Append(i32),
        Join(MemberId),
        Leave(MemberId),
        Take(MemberId),
        Finish(usize),
        GiveBack(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3i32).prop_map(Step::Append),
            1 => (0..4u64).prop_map(Step::Join),
            1 => (0..4u64).prop_map(Step::Leave),
            6 => (0..4u64).prop_map(Step::Take),
            4 => any::<usize>().prop_map(Step::Finish),
            2 => any::<usize>().prop_map(Step::GiveBack),
        ]
    }

    proptest! {
        /// Every offset is in one live hand at most, is finished once, and the
        /// committed position never passes one that is not finished.
        #[test]
        fn offsets_go_to_one_member_and_the_watermark_passes_nothing_unfinished(
            steps in proptest::collection::vec(step(), 1..200)
        ) {
            let streams = BTreeMap::from([(1, 3)]);
            let mut group = Group::default();
            let mut high = [0i64; 3];
            let mut hands: Vec<(MemberId, i32, i64)> = Vec::new();
            let mut finished: BTreeSet<(i32, i64)> = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Append(p) => high[p as usize] += 1,
                    Step::Join(m) => {
                        // One that left and still holds something is not the
                        // same member as one that joins.
                        if hands.iter().any(|(h, ..)| *h == m) { continue; }
                        group.join(m, member(&[1]));
                        group.rebalance(&streams);
                    }
                    Step::Leave(m) => {
                        group.leave(m);
                        group.rebalance(&streams);
                    }
                    Step::Take(m) => {
                        let owned: Vec<_> = group.owned_by(m).collect();
                        for key in owned {
                            let p = key.1;
                            let cursor = group.cursor_mut(key).unwrap();
                            if let Some((offset, _)) = cursor.take(high[p as usize]) {
                                prop_assert!(!hands.iter().any(|(_, hp, ho)| (*hp, *ho) == (p, offset)));
                                prop_assert!(!finished.contains(&(p, offset)));
                                prop_assert!(hands.iter().all(|(h, hp, _)| *hp != p || *h == m));
                                hands.push((m, p, offset));
                            }
                        }
                    }
                    Step::Finish(n) if !hands.is_empty() => {
                        let (_, p, offset) = hands.swap_remove(n % hands.len());
                        prop_assert!(group.cursor_mut((1, p)).unwrap().finish(offset, 0));
                        finished.insert((p, offset));
                    }
                    Step::GiveBack(n) if !hands.is_empty() => {
                        let (_, p, offset) = hands.swap_remove(n % hands.len());
                        prop_assert!(group.cursor_mut((1, p)).unwrap().give_back(offset, 0));
                    }
                    Step::Finish(_) | Step::GiveBack(_) => {}
                }
                for p in 0..3 {
                    if let Some(committed) = group.cursor((1, p)).and_then(Cursor::committed) {
                        for offset in 0..committed {
                            prop_assert!(finished.contains(&(p, offset)));
                        }
                    }
                }
            }
            // Whoever is left finishes everything.
            for (_, p, offset) in hands {
                group.cursor_mut((1, p)).unwrap().give_back(offset, 0);
            }
            group.join(99, member(&[1]));
            for m in 0..4 { group.leave(m); }
            group.rebalance(&streams);
            for p in 0..3 {
                let cursor = group.cursor_mut((1, p)).unwrap();
                while let Some((offset, _)) = cursor.take(high[p as usize]) {
                    prop_assert!(cursor.finish(offset, 0));
                    prop_assert!(finished.insert((p, offset)));
                }
                prop_assert_eq!(cursor.next(), high[p as usize]);
                prop_assert_eq!(finished.iter().filter(|(fp, _)| *fp == p).count() as i64, high[p as usize]);
            }
        }
    }
}
