//! Which entries of the log stand for which ids of which group, what is to be
//! written next, and what is needed no longer. Pure: no clock, no disk.
//!
//! A turn writes one *loose* entry for each group that it brought something of.
//! Once a group has [`CHUNK`] ids in loose entries, they are written again as one
//! entry, with the removal of the loose ones in the same write: so a million ids
//! are a thousand entries, however slowly they came. Of a group entries go oldest
//! first, which is the order in which its window forgets.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    super::dedup::{Handled, IdHasher},
    codec::{self, Head},
};
use crate::journal::EntryId;

/// What is kept at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Ids of a group's window.
    pub(crate) ids: usize,
    /// How long a window keeps an id, in seconds.
    pub(crate) age: u64,
    /// Groups.
    pub(crate) groups: usize,
}

/// Ids that are written as one entry, and as many are in memory of a group at most.
pub(super) const CHUNK: usize = 1024;

/// Full windows that there is room for; with more full groups than that, the
/// fullest keep less than their windows have.
pub(super) const FULL_WINDOWS: usize = 4;

/// What was handled in a turn, by group.
pub(super) type Fresh = BTreeMap<Arc<str>, Vec<Handled>>;

/// What stands in the log.
#[derive(Debug)]
pub(super) struct Shelf {
    limits: Limits,
    hasher: IdHasher,
    groups: HashMap<Arc<str>, Kept>,
    ids: usize,
}

/// Of one group.
#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<Chunk>,
    loose: Vec<EntryId>,
    /// The ids of the loose entries.
    tail: Vec<Handled>,
    ids: usize,
    newest: u64,
}

#[derive(Debug)]
struct Chunk {
    entry: EntryId,
    ids: usize,
    newest: u64,
}

/// A write that is planned: as one batch, and told to [`Shelf::written`].
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// One for each group.
    pub(super) puts: Vec<Bytes>,
    pub(super) removes: Vec<EntryId>,
    parts: Vec<(Arc<str>, Vec<Handled>)>,
}

/// Entries that are needed no longer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Trimmed {
    pub(super) removes: Vec<EntryId>,
    /// Ids in them that a window still has: there was no room for them.
    pub(super) early: usize,
}

impl Shelf {
    pub(super) fn new(limits: Limits, hasher: IdHasher) -> Self {
        Self {
            limits,
            hasher,
            groups: HashMap::new(),
            ids: 0,
        }
    }

    /// Notes an entry that was found in the log. Entries come by rising number.
    pub(super) fn found(&mut self, entry: EntryId, head: &Head) {
        self.ids += head.ids;
        let kept = self.groups.entry(head.group.as_str().into()).or_default();
        kept.ids += head.ids;
        kept.newest = kept.newest.max(head.newest);
        if head.ids < CHUNK {
            kept.loose.push(entry);
        } else {
            kept.chunks.push_back(Chunk {
                entry,
                ids: head.ids,
                newest: head.newest,
            });
        }
    }

    /// The entries of each group, oldest first: those that are full, and the loose
    /// ones behind them, whose ids [`Shelf::recall`] must be told.
    pub(super) fn entries(&self) -> Vec<(Arc<str>, Vec<EntryId>, Vec<EntryId>)> {
        self.groups
            .iter()
            .map(|(group, kept)| {
                let chunks = kept.chunks.iter().map(|c| c.entry).collect();
                (group.clone(), chunks, kept.loose.clone())
            })
            .collect()
    }

    /// The ids of a loose entry that was found.
    pub(super) fn recall(&mut self, group: &str, ids: impl Iterator<Item = Handled>) {
        if let Some(kept) = self.groups.get_mut(group) {
            kept.tail.extend(ids);
        }
    }

    /// What is to be written of what was handled in a turn.
    pub(super) fn plan(&self, fresh: Fresh) -> Plan {
        let mut plan = Plan::default();
        for (group, ids) in fresh {
            let kept = self.groups.get(&group);
            let tail = kept.map_or(&[][..], |k| k.tail.as_slice());
            if tail.len() + ids.len() >= CHUNK {
                let all = tail.iter().chain(&ids);
                plan.puts.push(codec::encode(self.hasher, &group, all));
                plan.removes.extend(kept.iter().flat_map(|k| &k.loose));
            } else {
                plan.puts
                    .push(codec::encode(self.hasher, &group, ids.iter()));
            }
            plan.parts.push((group, ids));
        }
        plan
    }

    /// A plan was written, and the first of its entries got this number.
    pub(super) fn written(&mut self, plan: Plan, first: EntryId) -> Trimmed {
        let mut trimmed = Trimmed::default();
        for (entry, (group, ids)) in (first..).zip(plan.parts) {
            let kept = self.groups.entry(group).or_default();
            let newest = ids.iter().map(|h| h.at).max().unwrap_or(0);
            kept.newest = kept.newest.max(newest);
            kept.ids += ids.len();
            self.ids += ids.len();
            let all = kept.tail.len() + ids.len();
            if all < CHUNK {
                kept.loose.push(entry);
                kept.tail.extend(ids);
                continue;
            }
            let newest = kept.tail.iter().map(|h| h.at).fold(newest, u64::max);
            kept.chunks.push_back(Chunk {
                entry,
                ids: all,
                newest,
            });
            // Most groups are quiet: what they do not need is given back.
            (kept.loose, kept.tail) = (Vec::new(), Vec::new());
            while let Some(oldest) = kept.chunks.front()
                && kept.ids - oldest.ids >= self.limits.ids
            {
                self.ids -= kept.drop_oldest(&mut trimmed.removes);
            }
        }
        self.make_room(&mut trimmed);
        trimmed
    }

    /// Ids of a plan that could not be written.
    pub(super) fn unwritten(plan: &Plan) -> usize {
        plan.parts.iter().map(|(_, ids)| ids.len()).sum()
    }

    /// A group forgot everything; the entries that have to go.
    pub(super) fn forget(&mut self, group: &str) -> Vec<EntryId> {
        let Some(kept) = self.groups.remove(group) else {
            return Vec::new();
        };
        self.ids -= kept.ids;
        let chunks = kept.chunks.into_iter().map(|c| c.entry);
        chunks.chain(kept.loose).collect()
    }

    /// Lets go of what every window has forgotten by now, and of what there is no
    /// room for.
    pub(super) fn trim(&mut self, now: u64) -> Trimmed {
        let mut trimmed = Trimmed::default();
        let old = |newest: u64| now.saturating_sub(newest) >= self.limits.age;
        for kept in self.groups.values_mut() {
            while let Some(oldest) = kept.chunks.front()
                && (old(oldest.newest) || kept.ids - oldest.ids >= self.limits.ids)
            {
                self.ids -= kept.drop_oldest(&mut trimmed.removes);
            }
            if kept.chunks.is_empty() && old(kept.newest) {
                trimmed.removes.append(&mut kept.loose);
                self.ids -= kept.ids;
                kept.ids = 0;
            }
        }
        self.groups.retain(|_, kept| kept.ids > 0);
        self.make_room(&mut trimmed);
        trimmed
    }

    /// Ids that it has.
    pub(super) fn ids(&self) -> usize {
        self.ids
    }

    fn make_room(&mut self, trimmed: &mut Trimmed) {
        while self.groups.len() > self.limits.groups {
            let quiet = self.groups.iter().min_by_key(|(_, kept)| kept.newest);
            let Some(quiet) = quiet.map(|(group, _)| group.clone()) else {
                break;
            };
            trimmed.early += self.groups.get(&quiet).map_or(0, |kept| kept.ids);
            trimmed.removes.append(&mut self.forget(&quiet));
        }
        while self.ids > self.limits.ids.saturating_mul(FULL_WINDOWS) {
            let fullest = self
                .groups
                .values_mut()
                .filter(|kept| !kept.chunks.is_empty())
                .max_by_key(|kept| kept.ids);
            // What is left are loose entries, which CHUNK bounds.
            let Some(fullest) = fullest else { break };
            let gone = fullest.drop_oldest(&mut trimmed.removes);
            trimmed.early += gone;
            self.ids -= gone;
        }
    }
}

impl Kept {
    /// Says how many ids went.
    fn drop_oldest(&mut self, removes: &mut Vec<EntryId>) -> usize {
        let Some(oldest) = self.chunks.pop_front() else {
            return 0;
        };
        removes.push(oldest.entry);
        self.ids -= oldest.ids;
        oldest.ids
    }
}

#[cfg(test)]
#[path = "shelf_tests.rs"]
mod tests;
