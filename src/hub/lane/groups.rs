//! Which group of this hub has which spooled event in hand. Pure book-keeping:
//! it chooses what a group gets next and remembers who has what; it changes
//! nothing in the spool, and knows neither readers nor the lane's state.
//!
//! Each group reads the spool for itself, in spool order. Of an order key a
//! group has one event at a time: what stands behind one that is in hand, rests
//! after a failure, or is in doubt waits, and other keys pass it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use crate::{
    hub::spool::{Entry, Seq, Spool, Status},
    message::{Timestamp, wire::Failure},
};

/// One event in one group's hands.
pub(crate) type Tag = u64;

/// What the groups have in hand.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    books: HashMap<Arc<str>, Book>,
    taken: HashMap<Tag, (Arc<str>, Seq)>,
    /// How many groups have an event in hand.
    holders: HashMap<Seq, u32>,
    last: Tag,
}

/// What one group has.
#[derive(Debug, Default)]
struct Book {
    /// Every event before this one is settled by the group, or gone.
    low: Seq,
    /// In hand, with the slot of its order key.
    in_hand: HashMap<Seq, usize>,
    /// Failed, and not to be tried again before.
    resting: HashMap<Seq, Timestamp>,
    /// Handed out before, in this life of the process.
    tried: HashMap<Seq, Tried>,
}

/// What a group's earlier attempts at an event left.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tried {
    /// Attempts that failed.
    pub(crate) failed: u32,
    /// The last failure.
    pub(crate) failure: Option<Box<Failure>>,
}

/// What a group may get.
#[derive(Debug, Default)]
pub(crate) struct Chosen {
    /// In spool order; of a key one at most.
    pub(crate) events: Vec<Seq>,
    /// Expired, and in nobody's hands.
    pub(crate) expired: Vec<Seq>,
    /// The next one may be on the disk.
    pub(crate) reached_tail: bool,
}

/// How far a group may be ahead of its slowest event. It bounds what is looked
/// at in one turn: about a millisecond.
const LOOK_AHEAD: usize = 8_192;

impl Groups {
    /// Up to `max` events that a group may get now.
    pub(crate) fn choose(
        &mut self,
        group: &Arc<str>,
        now: Timestamp,
        spool: &Spool,
        max: usize,
    ) -> Chosen {
        let mut chosen = Chosen::default();
        let tail = spool.tail_first();
        let book = self.books.entry(group.clone()).or_default();
        let mut passed: HashSet<usize> = book.in_hand.values().copied().collect();
        let mut low = None;
        let mut next = book.low;
        for (looked, (seq, entry, status)) in spool.head_from(book.low).enumerate() {
            if tail.is_some_and(|tail| tail < seq) {
                break;
            }
            if looked == LOOK_AHEAD || chosen.events.len() == max {
                book.low = low.unwrap_or(seq);
                return chosen;
            }
            next = seq + 1;
            if has_settled(entry, group) {
                continue;
            }
            low.get_or_insert(seq);
            if !passed.insert(spool.slot(&entry.order))
                || matches!(status, Status::InDoubt | Status::InFlight)
                || book.resting.get(&seq).is_some_and(|due| *due > now)
            {
                continue;
            }
            if !entry.message.is_expired(now) {
                chosen.events.push(seq);
            } else if status == Status::Ready {
                chosen.expired.push(seq);
            }
        }
        book.low = low.unwrap_or(next);
        chosen.reached_tail = tail.is_some() && chosen.events.len() < max;
        chosen
    }

    /// A group takes an event that was chosen for it.
    pub(crate) fn take(&mut self, group: &Arc<str>, seq: Seq, slot: usize) -> Tag {
        let book = self.books.entry(group.clone()).or_default();
        book.resting.remove(&seq);
        book.in_hand.insert(seq, slot);
        *self.holders.entry(seq).or_default() += 1;
        self.last += 1;
        self.taken.insert(self.last, (group.clone(), seq));
        self.last
    }

    /// Who has what under a tag.
    pub(crate) fn taken(&self, tag: Tag) -> Option<(&Arc<str>, Seq)> {
        self.taken.get(&tag).map(|(group, seq)| (group, *seq))
    }

    /// A group has an event in hand no longer.
    pub(crate) fn end(&mut self, tag: Tag) -> Option<(Arc<str>, Seq)> {
        let (group, seq) = self.taken.remove(&tag)?;
        if let Some(book) = self.books.get_mut(&group) {
            book.in_hand.remove(&seq);
        }
        if let Some(holders) = self.holders.get_mut(&seq) {
            *holders -= 1;
            if *holders == 0 {
                self.holders.remove(&seq);
            }
        }
        Some((group, seq))
    }

    /// Whether any group has it in hand.
    pub(crate) fn is_held(&self, seq: Seq) -> bool {
        self.holders.contains_key(&seq)
    }

    /// A group gave an event back; `failure` with when to try it again: it
    /// failed there.
    pub(crate) fn gave_back(
        &mut self,
        group: &Arc<str>,
        seq: Seq,
        failure: Option<(Failure, Timestamp)>,
    ) {
        let book = self.books.entry(group.clone()).or_default();
        let tried = book.tried.entry(seq).or_default();
        if let Some((failure, due)) = failure {
            tried.failed += 1;
            tried.failure = Some(Box::new(failure));
            book.resting.insert(seq, due);
        }
    }

    /// What a group's earlier attempts at an event left, if it made any.
    pub(crate) fn tried(&self, group: &Arc<str>, seq: Seq) -> Option<&Tried> {
        self.books.get(group)?.tried.get(&seq)
    }

    /// When the first event that rests is to be tried again.
    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        let due = self.books.values().flat_map(|b| b.resting.values());
        due.copied().min()
    }

    /// Nothing rests any longer.
    pub(crate) fn end_rests(&mut self) {
        for book in self.books.values_mut() {
            book.resting.clear();
        }
    }

    /// An event came, perhaps before others that came earlier.
    pub(crate) fn came(&mut self, seq: Seq) {
        for book in self.books.values_mut() {
            book.low = book.low.min(seq);
        }
    }

    /// An event left the spool.
    pub(crate) fn left(&mut self, seq: Seq) {
        for book in self.books.values_mut() {
            book.resting.remove(&seq);
            book.tried.remove(&seq);
        }
    }

    /// A group has settled an event.
    pub(crate) fn settled(&mut self, group: &Arc<str>, seq: Seq) {
        if let Some(book) = self.books.get_mut(group) {
            book.tried.remove(&seq);
        }
    }

    /// Forgets the groups that nobody reads for and that have nothing in hand.
    pub(crate) fn keep(&mut self, reads: impl Fn(&str) -> bool) {
        self.books
            .retain(|group, book| !book.in_hand.is_empty() || reads(group));
    }
}

/// Whether a group has handled an event already.
fn has_settled(entry: &Entry, group: &str) -> bool {
    entry.marks.settled.iter().any(|g| g == group)
}
