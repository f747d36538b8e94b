//! What a lane holds because its primary could not take it. Pure: no clock, no
//! I/O; whoever owns it decides when an entry may go.
//!
//! Entries are ordered by the sequence number that they got when the message
//! was admitted, whether or not it was written to the primary first. So a copy
//! that is taken late (its confirm did not come) still stands before everything
//! that was published after it.

pub(crate) mod codec;
#[cfg(feature = "journal")]
pub(crate) mod journal;
pub(crate) mod runs;
pub(crate) mod store;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tokio::sync::Notify;

use self::runs::Runs;
use crate::{
    broker::OrderKey,
    message::{Message, Timestamp, wire::Marks},
};

/// Place of a message in its lane's publish order.
pub(crate) type Seq = u64;

/// One spooled message.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) message: Arc<Message>,
    pub(crate) order: OrderKey,
    pub(crate) marks: Marks,
    pub(crate) confirm: bool,
    /// When it was spooled, for the oldest age.
    pub(crate) since: Timestamp,
    /// What it holds of the budget, in bytes, from admission to its end.
    pub(crate) size: usize,
    /// Not before this (a retry keeps its absolute due time).
    pub(crate) due: Option<Timestamp>,
}

/// Where an entry stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Written to the primary and not confirmed in time; neither handed out nor
    /// drained until its fate is known or its generation ends.
    InDoubt,
    /// May be handed out or drained.
    Ready,
    /// Being drained: written to the primary, not confirmed yet.
    InFlight,
    /// In a local handler's hands; of an event, in at least one group's.
    Leased,
}

/// How order keys find their slot: with random keys, so that nobody can choose
/// keys that share one.
#[cfg(not(test))]
type Hashing = std::hash::RandomState;

/// Under test with fixed keys, so that a seed reproduces its run exactly.
#[cfg(test)]
type Hashing = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;

/// The spool of one lane.
///
/// A long spool is mostly on the disk: its *head* is here, its *tail* is known
/// by sequence numbers only, and is loaded as the head is drained.
#[derive(Debug)]
pub(crate) struct Spool {
    entries: BTreeMap<Seq, (Entry, Status)>,
    /// Ready entries in publish order, for the drain.
    ready: BTreeSet<Seq>,
    /// Ready entries by falling priority, for local handlers.
    by_priority: BTreeSet<(u8, Seq)>,
    /// Ready entries that are on the disk only.
    tail: Runs,
    in_doubt: usize,
    in_flight: usize,
    leased: usize,
    bytes: usize,
    /// Ready entries that rest until a due time; in neither of the sets above.
    resting: BTreeSet<(Timestamp, Seq)>,
    /// How many entries in doubt each hash slot holds.
    doubts: HashMap<usize, u32>,
    /// Leased entries stay, and nothing of their order key is drained before
    /// they are given back.
    holds: bool,
    /// How many leased entries each hash slot holds, where they hold others.
    held: HashMap<usize, u32>,
    /// Ready entries behind a leased one, by hash slot; not in `ready`.
    parked: HashMap<usize, BTreeSet<Seq>>,
    parked_len: usize,
    /// How many entries that are not in flight each hash slot holds: what a new
    /// message of the same order key must not overtake. A slot shared by two
    /// keys only sends a message behind the drain that could have gone ahead.
    fence: Vec<u32>,
    hasher: Hashing,
}

/// What an earlier process left for one lane.
#[derive(Debug, Default)]
pub(crate) struct LaneLeft {
    pub(crate) spool: Spool,
    /// What the store calls each message.
    pub(crate) ids: Runs,
}

impl Default for Spool {
    fn default() -> Self {
        Self::new()
    }
}

/// The room that all lanes of a hub share (C8). A message takes its share when
/// it is admitted, before it is written anywhere, and gives it back when nobody
/// has to hold it any more: so what is in flight always fits.
#[derive(Debug)]
pub(crate) struct Budget {
    max_messages: usize,
    max_bytes: usize,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    /// Rung when room came free, for lanes where somebody waits for it.
    pub(crate) freed: Notify,
}

impl Budget {
    pub(crate) fn new(max_messages: usize, max_bytes: usize) -> Self {
        Self {
            max_messages,
            max_bytes,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            freed: Notify::new(),
        }
    }

    /// Whether a message that goes into the spool at once would find room. A
    /// tenth is kept aside for what lanes write to healthy brokers, so that the
    /// outage of one broker does not stop the others.
    pub(crate) fn has_spool_room(&self, size: usize) -> bool {
        self.messages.load(Relaxed) < self.max_messages - self.max_messages / 10
            && self.bytes.load(Relaxed) + size <= self.max_bytes - self.max_bytes / 10
    }

    /// Takes room for one message of `size` bytes, if there is any.
    pub(crate) fn take(&self, size: usize) -> bool {
        // Two counters cannot be changed at once: the first is given back when
        // the second has no room, so a rival may see a full budget for a moment
        // and wait for `freed`, which is rung then.
        if self.messages.fetch_add(1, Relaxed) >= self.max_messages {
            self.messages.fetch_sub(1, Relaxed);
            return false;
        }
        if self.bytes.fetch_add(size, Relaxed) + size > self.max_bytes {
            self.bytes.fetch_sub(size, Relaxed);
            self.messages.fetch_sub(1, Relaxed);
            return false;
        }
        true
    }

    /// Takes room that may not be there, for what was accepted before.
    pub(crate) fn take_anyway(&self, messages: usize, bytes: usize) {
        self.messages.fetch_add(messages, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// Whether a message of `size` bytes would find room.
    pub(crate) fn has_room(&self, size: usize) -> bool {
        self.messages.load(Relaxed) < self.max_messages
            && self.bytes.load(Relaxed) + size <= self.max_bytes
    }

    /// Gives the room of messages back.
    pub(crate) fn give_back(&self, messages: usize, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.messages.fetch_sub(messages, Relaxed);
        self.freed.notify_waiters();
    }

    #[cfg(test)]
    pub(crate) fn taken(&self) -> (usize, usize) {
        (self.messages.load(Relaxed), self.bytes.load(Relaxed))
    }
}

/// What a spooled message takes beside its own bytes: the entry, three index
/// nodes, the message's fixed part.
pub(crate) const ENTRY_OVERHEAD: usize = 512;

/// Hash slots of the fence. 4 bytes each, so memory stays flat whatever the
/// number of keys; with 16,384 slots two keys rarely share one.
const FENCE_SLOTS: usize = 16_384;

impl Spool {
    pub(crate) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            ready: BTreeSet::new(),
            by_priority: BTreeSet::new(),
            tail: Runs::default(),
            in_doubt: 0,
            in_flight: 0,
            leased: 0,
            bytes: 0,
            resting: BTreeSet::new(),
            doubts: HashMap::new(),
            holds: false,
            held: HashMap::new(),
            parked: HashMap::new(),
            parked_len: 0,
            // Made when the first entry comes: most lanes never spool.
            fence: Vec::new(),
            hasher: Hashing::default(),
        }
    }

    /// From here on leased entries stay where they are in the order: nothing
    /// of their order key is drained until they are ready again. Before any is.
    pub(crate) fn hold_keys(&mut self) {
        self.holds = true;
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() + self.tail.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.tail.is_empty()
    }

    /// Entries that are here.
    pub(crate) fn head_len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn tail_len(&self) -> usize {
        self.tail.len()
    }

    /// The tail's first entries.
    pub(crate) fn tail_start(&self, count: usize) -> Vec<Seq> {
        self.tail.first_keys(count)
    }

    /// Lets go of the body of an entry that is on the disk. False when it is
    /// none that the tail could take: it moves, rests, or others of the tail
    /// would stand before it.
    pub(crate) fn page_out(&mut self, seq: Seq) -> bool {
        let fits = self.tail.last_key().is_none_or(|last| last < seq);
        let Some((entry, Status::Ready)) = self.entries.get(&seq) else {
            return false;
        };
        // What the disk has is what it was when it came: a mark made since would
        // be lost, and a changed size be given back wrongly.
        let changed = entry.marks.possible_duplicate
            || entry.message.redelivered
            || entry.size != entry.message.size() + ENTRY_OVERHEAD;
        if !fits || changed || !self.ready.contains(&seq) {
            return false;
        }
        self.by_priority
            .remove(&(u8::MAX - entry.message.priority.value(), seq));
        self.ready.remove(&seq);
        self.entries.remove(&seq);
        // It still counts in bytes and in the fence.
        self.tail.insert(seq, seq);
        true
    }

    /// Notes an entry that is on the disk already.
    #[cfg(any(test, feature = "journal"))]
    pub(crate) fn restore(&mut self, seq: Seq, order: &OrderKey, size: usize) {
        let size = size + ENTRY_OVERHEAD;
        if self.fence.is_empty() {
            self.fence = vec![0; FENCE_SLOTS];
        }
        let slot = self.slot(order);
        if let Some(count) = self.fence.get_mut(slot) {
            *count += 1;
        }
        self.bytes += size;
        self.tail.insert(seq, seq);
    }

    /// An entry of the tail is here again. False when it is none.
    pub(crate) fn page_in(&mut self, seq: Seq, entry: Entry) -> bool {
        if self.tail.remove(seq).is_none() {
            return false;
        }
        let slot = self.slot(&entry.order);
        if let Some(count) = self.fence.get_mut(slot) {
            *count -= 1;
        }
        self.bytes -= entry.size;
        self.insert(seq, entry, Status::Ready);
        true
    }

    /// Gives up on an entry of the tail that cannot be read. What it counted in
    /// the fence stays: that only sends messages behind the drain.
    pub(crate) fn drop_unreadable(&mut self, seq: Seq) {
        self.tail.remove(seq);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn in_doubt(&self) -> usize {
        self.in_doubt
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn leased(&self) -> usize {
        self.leased
    }

    pub(crate) fn ready(&self) -> usize {
        self.ready.len() + self.parked_len + self.tail.len()
    }

    /// The first of those on the disk.
    pub(crate) fn tail_first(&self) -> Option<Seq> {
        self.tail.first().map(|(seq, _)| seq)
    }

    /// The last of those on the disk.
    pub(crate) fn tail_end(&self) -> Option<Seq> {
        self.tail.last_key()
    }

    /// Ready entries that are here.
    pub(crate) fn ready_here(&self) -> usize {
        self.ready.len()
    }

    pub(crate) fn oldest(&self) -> Option<Timestamp> {
        self.entries.values().next().map(|(e, _)| e.since)
    }

    pub(crate) fn status(&self, seq: Seq) -> Option<Status> {
        self.entries.get(&seq).map(|(_, s)| *s)
    }

    pub(crate) fn get(&self, seq: Seq) -> Option<&Entry> {
        self.entries.get(&seq).map(|(e, _)| e)
    }

    /// Entries of the tail from a place on, in publish order.
    pub(crate) fn tail_from(&self, seq: Seq) -> impl Iterator<Item = Seq> {
        self.tail.keys_from(seq)
    }

    /// Entries that are here, from a place on, in publish order.
    pub(crate) fn head_from(&self, seq: Seq) -> impl Iterator<Item = (Seq, &Entry, Status)> {
        self.entries.range(seq..).map(|(s, (e, st))| (*s, e, *st))
    }

    /// Adds an entry at its place in the publish order.
    pub(crate) fn insert(&mut self, seq: Seq, entry: Entry, status: Status) {
        self.bytes += entry.size;
        let priority = entry.message.priority.value();
        let slot = self.slot(&entry.order);
        let due = entry.due;
        let old = self.entries.insert(seq, (entry, status));
        debug_assert!(old.is_none(), "a sequence number was used twice");
        self.enter(seq, status, due, priority, slot);
    }

    /// Moves an entry to another status. False when it is not there.
    pub(crate) fn set(&mut self, seq: Seq, status: Status) -> bool {
        let Some((entry, old)) = self.entries.get_mut(&seq) else {
            return false;
        };
        let was = std::mem::replace(old, status);
        let priority = entry.message.priority.value();
        let due = entry.due;
        let slot = slot(&self.hasher, &entry.order);
        self.leave(seq, was, due, priority, slot);
        self.enter(seq, status, due, priority, slot);
        true
    }

    /// Changes an entry in place, one that is not ready. The message's priority,
    /// its order key and the size must stay what they are.
    pub(crate) fn edit(&mut self, seq: Seq, change: impl FnOnce(&mut Entry)) {
        if let Some((entry, _)) = self.entries.get_mut(&seq) {
            change(entry);
        }
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, seq: Seq) -> Option<Entry> {
        let (entry, status) = self.entries.remove(&seq)?;
        self.bytes -= entry.size;
        let slot = self.slot(&entry.order);
        self.leave(seq, status, entry.due, entry.message.priority.value(), slot);
        if self.is_empty() {
            // Most lanes spool rarely; the next outage makes another fence.
            self.fence = Vec::new();
        }
        Some(entry)
    }

    /// Wakes entries whose rest is over.
    pub(crate) fn wake(&mut self, now: Timestamp) {
        while let Some((due, seq)) = self.resting.first().copied() {
            if due > now {
                return;
            }
            self.resting.pop_first();
            if let Some((entry, _)) = self.entries.get_mut(&seq) {
                entry.due = None;
                let priority = entry.message.priority.value();
                let slot = slot(&self.hasher, &entry.order);
                self.enter(seq, Status::Ready, None, priority, slot);
            }
        }
    }

    /// The first ready entry in publish order. None also while it is on the
    /// disk: nothing of the head overtakes the tail.
    pub(crate) fn next_to_drain(&self) -> Option<Seq> {
        let first = self.ready.first().copied()?;
        let free = self.leads(first) && !self.is_held(first);
        free.then_some(first)
    }

    /// Whether the first ready entry is here, and not on the disk.
    pub(crate) fn begins_here(&self) -> bool {
        self.ready.first().is_some_and(|first| self.leads(*first))
    }

    /// Sets aside what stands first and waits for a leased entry of its order
    /// key, so that the drain looks at it once. It comes back with the lease.
    pub(crate) fn park_held(&mut self) {
        while let Some(first) = self.ready.first().copied() {
            let Some(slot) = self.held_slot(first) else {
                return;
            };
            self.ready.remove(&first);
            self.park(slot, first);
        }
    }

    fn leads(&self, seq: Seq) -> bool {
        self.tail_first().is_none_or(|tail| seq < tail)
    }

    fn is_held(&self, seq: Seq) -> bool {
        self.held_slot(seq).is_some()
    }

    /// The hash slot of an entry, if a leased entry holds it.
    fn held_slot(&self, seq: Seq) -> Option<usize> {
        if self.held.is_empty() {
            return None;
        }
        let slot = self.slot(&self.get(seq)?.order);
        self.held.contains_key(&slot).then_some(slot)
    }

    fn park(&mut self, slot: usize, seq: Seq) {
        if self.parked.entry(slot).or_default().insert(seq) {
            self.parked_len += 1;
        }
    }

    /// A lease of a slot has ended; with the last one its entries come back.
    fn let_go(&mut self, slot: usize) {
        let Some(count) = self.held.get_mut(&slot) else {
            return;
        };
        *count -= 1;
        if *count > 0 {
            return;
        }
        self.held.remove(&slot);
        let parked = self.parked.remove(&slot).unwrap_or_default();
        self.parked_len -= parked.len();
        self.ready.extend(parked);
    }

    /// The first ready entry by priority, then publish order, that overtakes
    /// nothing which is in doubt.
    pub(crate) fn next_to_lease(&self) -> Option<Seq> {
        let free = |seq: &Seq| {
            self.doubts.is_empty()
                || self
                    .get(*seq)
                    .is_some_and(|e| !self.doubts.contains_key(&slot(&self.hasher, &e.order)))
        };
        // Priorities count within the head; nobody sorts what is on the disk.
        self.by_priority
            .iter()
            .map(|(_, seq)| *seq)
            .filter(|seq| self.tail.first().is_none_or(|(tail, _)| *seq < tail))
            .find(free)
    }

    /// When the first entry that rests becomes due.
    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        self.resting.first().map(|(due, _)| *due)
    }

    /// Entries that rest.
    pub(crate) fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Whether a new message of this order key would overtake an entry.
    pub(crate) fn fences(&self, order: &OrderKey) -> bool {
        self.fence
            .get(self.slot(order))
            .is_some_and(|count| *count > 0)
    }

    /// The hash slot of an order key; few keys share one.
    pub(crate) fn slot(&self, order: &OrderKey) -> usize {
        slot(&self.hasher, order)
    }

    fn enter(
        &mut self,
        seq: Seq,
        status: Status,
        due: Option<Timestamp>,
        priority: u8,
        slot: usize,
    ) {
        match status {
            Status::InDoubt => {
                self.in_doubt += 1;
                *self.doubts.entry(slot).or_default() += 1;
            }
            Status::InFlight => self.in_flight += 1,
            Status::Leased => {
                self.leased += 1;
                if self.holds {
                    *self.held.entry(slot).or_default() += 1;
                }
            }
            Status::Ready => {
                if let Some(due) = due {
                    // A retry has lost its place in the order: it rests apart
                    // and holds nobody up.
                    self.resting.insert((due, seq));
                    return;
                }
                if self.held.contains_key(&slot) {
                    self.park(slot, seq);
                } else {
                    self.ready.insert(seq);
                }
                self.by_priority.insert((u8::MAX - priority, seq));
            }
        }
        if status != Status::InFlight {
            if self.fence.is_empty() {
                self.fence = vec![0; FENCE_SLOTS];
            }
            if let Some(count) = self.fence.get_mut(slot) {
                *count += 1;
            }
        }
    }

    fn leave(
        &mut self,
        seq: Seq,
        status: Status,
        due: Option<Timestamp>,
        priority: u8,
        slot: usize,
    ) {
        match status {
            Status::InDoubt => {
                self.in_doubt -= 1;
                if let Some(count) = self.doubts.get_mut(&slot) {
                    *count -= 1;
                    if *count == 0 {
                        self.doubts.remove(&slot);
                    }
                }
            }
            Status::InFlight => self.in_flight -= 1,
            Status::Leased => {
                self.leased -= 1;
                self.let_go(slot);
            }
            Status::Ready => {
                if let Some(due) = due
                    && self.resting.remove(&(due, seq))
                {
                    return;
                }
                if !self.ready.remove(&seq)
                    && let Some(parked) = self.parked.get_mut(&slot)
                    && parked.remove(&seq)
                {
                    self.parked_len -= 1;
                }
                self.by_priority.remove(&(u8::MAX - priority, seq));
            }
        }
        if status != Status::InFlight
            && let Some(count) = self.fence.get_mut(slot)
        {
            *count -= 1;
        }
    }
}

fn slot(hasher: &Hashing, order: &OrderKey) -> usize {
    usize::try_from(hasher.hash_one(order)).unwrap_or(0) % FENCE_SLOTS
}

#[cfg(test)]
mod tests;
