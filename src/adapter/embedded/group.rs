//! One consumer group as a pure state machine: who owns which partition, what
//! is in hand, and how far the group has come. The position that it commits
//! never passes a message that is not finished.
//!
//! A partition changes hands only when its owner has nothing of it in hand any
//! more, so that no message is in two members' hands: until then the owner
//! gets nothing new of it.

use std::collections::{BTreeMap, BTreeSet};

use super::log::RecordId;

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
    /// What the log says, if it says something.
    logged: Option<Logged>,
}

/// A position as it lies in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logged {
    pub(super) record: RecordId,
    pub(super) committed: i64,
    pub(super) next: i64,
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

    /// Where its positions lie in the log, in all streams or in one.
    pub(super) fn records(&self, of: Option<StreamId>) -> impl Iterator<Item = RecordId> {
        self.cursors
            .iter()
            .filter(move |((stream, _), _)| of.is_none_or(|of| of == *stream))
            .filter_map(|(_, cursor)| cursor.logged)
            .map(|logged| logged.record)
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

    /// The position to write, if the log says another one.
    pub(super) fn unlogged(&self) -> Option<(i64, i64)> {
        let committed = self.committed?;
        self.logged
            .is_none_or(|l| (l.committed, l.next) != (committed, self.next))
            .then_some((committed, self.next))
    }

    pub(super) fn logged(&self) -> Option<Logged> {
        self.logged
    }

    pub(super) fn set_logged(&mut self, logged: Logged) {
        self.logged = Some(logged);
    }

    /// Goes on where a restart left it: what was handed out and is not covered
    /// by the position is handed out again.
    #[cfg(feature = "journal")]
    pub(super) fn restore(&mut self, logged: Logged) {
        self.committed = Some(logged.committed);
        self.next = logged.next.max(logged.committed);
        self.returned = (logged.committed..self.next).collect();
        self.logged = Some(logged);
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
#[path = "group_tests.rs"]
mod tests;
