//! Two-phase window of handled ids, for one group: handle each id once (C6).
//!
//! An id is *leased* when it is handed out, *committed* when it is handled, and
//! *released* when it was given back. A delivery whose id is leased is parked
//! unsettled: the commit settles both, a release promotes one that is parked.
//! Attempts of one id follow each other: a retry of an attempt that is over is
//! new, a copy of that attempt is not, and two never run at once.
//!
//! Pure: no clock, no channel, no task. Ids are kept as 128-bit keyed hashes, so
//! that memory is flat: about 80 bytes for each id, however long ids are. The
//! random key makes it infeasible to choose colliding ids; by chance, a window of
//! one million ids mistakes a new id for a known one with odds of 10^6 / 2^128,
//! about 3 in 10^33, for each delivery. Where ids are kept on a disk (`handled`)
//! the key is kept with them.

use std::{
    collections::VecDeque,
    fmt,
    hash::{Hash, Hasher},
    time::Duration,
};

use siphasher::sip128::{Hasher128, SipHasher13};
use uuid::Uuid;

use super::gradual::{FewIds, IdMap, Queue};
use crate::message::Timestamp;

/// Hashes (topic, id) with a secret key. The same key gives the same hashes in
/// every process and every version of this program.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdHasher([u8; 16]);

/// The hash of a topic and an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IdHash([u64; 2]);

impl Hash for IdHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
    }
}

impl IdHasher {
    /// A key that nobody can guess.
    pub(crate) fn random() -> Self {
        // 122 of its bits are from the operating system's generator.
        Self(Uuid::new_v4().into_bytes())
    }

    /// A key that was kept.
    pub(crate) fn with_key(key: [u8; 16]) -> Self {
        Self(key)
    }

    /// The key, to be kept where the ids are.
    pub(crate) fn key(&self) -> [u8; 16] {
        self.0
    }

    /// The hash of an id in a topic.
    pub(crate) fn hash(&self, topic: &str, id: &str) -> IdHash {
        let mut hasher = SipHasher13::new_with_key(&self.0);
        hasher.write(topic.as_bytes());
        // In no text, so ("ab", "c") differs from ("a", "bc").
        hasher.write(&[0xff]);
        hasher.write(id.as_bytes());
        let hash = hasher.finish128();
        IdHash([hash.h1, hash.h2])
    }
}

impl fmt::Debug for IdHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdHasher")
    }
}

impl IdHash {
    /// Which of so many parts it belongs to; not told by its [`Hash`].
    pub(super) fn part(&self, parts: usize) -> usize {
        self.0[1] as usize % parts
    }

    /// As bytes, to be kept.
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        (u128::from(self.0[0]) | u128::from(self.0[1]) << 64).to_le_bytes()
    }

    /// From bytes that were kept.
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        let both = u128::from_le_bytes(bytes);
        Self([both as u64, (both >> 64) as u64])
    }
}

/// What a window learned of an id, to be kept on a disk and brought back by
/// [`DedupWindow::restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handled {
    /// When, in whole seconds since the epoch.
    pub(crate) at: u64,
    pub(crate) id: IdHash,
    pub(crate) attempt: Attempt,
}

/// The attempt, shifted left by one; the lowest bit says that no further attempt
/// follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt(pub(crate) u32);

/// The window of one group. `T` stands for a parked delivery.
#[derive(Debug)]
pub(crate) struct DedupWindow<T> {
    max_ids: usize,
    max_age: u32,
    hasher: IdHasher,
    /// What times are counted from; the first one seen.
    base: Option<Timestamp>,
    settled: IdMap<Settled>,
    /// When what was settled, oldest first. An id that was settled again has
    /// more than one entry, of which the last counts.
    order: Queue<(u32, IdHash)>,
    /// Ids in handlers' hands; few, since each is an unsettled delivery.
    leased: FewIds<Leased<T>>,
    serial: u64,
    counts: DedupCounts,
}

/// What a window has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DedupCounts {
    /// Deliveries that were recognised as duplicates and not handled.
    pub(crate) duplicates: u64,
    /// Ids that were forgotten for want of room before they were `max_age` old.
    /// More than none means that the window is too short: a duplicate of one of
    /// them would be handled again.
    pub(crate) forgotten_early: u64,
}

/// What to do with a delivery.
#[derive(Debug)]
pub(crate) enum Offer {
    /// Hand it out, and end the lease.
    New(Lease),
    /// Another delivery of this id is in a handler's hands: park this one.
    Leased(Parking),
    /// Handled already: settle it as a duplicate.
    Committed,
}

/// The right to handle an id. It must be ended by [`DedupWindow::commit`],
/// [`DedupWindow::retried`] or [`DedupWindow::release`].
#[must_use]
#[derive(Debug)]
pub(crate) struct Lease {
    id: IdHash,
    serial: u64,
}

/// The right to park a delivery behind the lease of its id.
#[derive(Debug)]
pub(crate) struct Parking {
    id: IdHash,
    attempt: u32,
}

/// What follows from the end of a lease.
#[derive(Debug)]
pub(crate) struct Ended<T> {
    /// What the window learned, if anything.
    pub(crate) handled: Option<Handled>,
    /// Parked deliveries to settle as duplicates.
    pub(crate) duplicates: Vec<T>,
    /// A parked delivery to hand out now.
    pub(crate) promoted: Option<(Lease, T)>,
}

/// Eight bytes, because there are a million of it.
#[derive(Clone, Copy, Debug)]
struct Settled {
    at: u32,
    attempt: Attempt,
}

#[derive(Debug)]
struct Leased<T> {
    serial: u64,
    attempt: u32,
    parked: VecDeque<(u32, T)>,
}

impl<T> Default for DedupWindow<T> {
    fn default() -> Self {
        Self::new(MAX_IDS, MAX_AGE, IdHasher::random())
    }
}

impl<T> DedupWindow<T> {
    /// A window of at most `max_ids` settled ids, each for at most `max_age`.
    pub(crate) fn new(max_ids: usize, max_age: Duration, hasher: IdHasher) -> Self {
        Self {
            max_ids,
            max_age: u32::try_from(max_age.as_secs()).unwrap_or(u32::MAX),
            hasher,
            base: None,
            settled: IdMap::default(),
            order: Queue::default(),
            leased: FewIds::default(),
            serial: 0,
            counts: DedupCounts::default(),
        }
    }

    /// Asks what to do with a delivery. `attempt` is its retry count.
    pub(crate) fn offer(
        &mut self,
        now: Timestamp,
        (topic, id): (&str, &str),
        attempt: u32,
    ) -> Offer {
        self.evict(now);
        let id = self.hasher.hash(topic, id);
        if let Some(leased) = self.leased.get(&id) {
            if attempt < leased.attempt {
                // An earlier attempt, which is over, or this one would not run.
                self.counts.duplicates += 1;
                return Offer::Committed;
            }
            return Offer::Leased(Parking { id, attempt });
        }
        if self.settled.get(&id).is_some_and(|s| s.covers(attempt)) {
            self.counts.duplicates += 1;
            return Offer::Committed;
        }
        Offer::New(self.lease(id, attempt, VecDeque::new()))
    }

    /// Parks a delivery until the lease of its id ends. Gives it back when there
    /// is no lease any more: it must be offered again.
    pub(crate) fn park(&mut self, parking: Parking, token: T) -> Result<(), T> {
        match self.leased.get_mut(&parking.id) {
            Some(leased) => {
                leased.parked.push_back((parking.attempt, token));
                Ok(())
            }
            None => Err(token),
        }
    }

    /// It was handled; the id is done with.
    pub(crate) fn commit(&mut self, now: Timestamp, lease: Lease) -> Ended<T> {
        self.settle(now, lease, true)
    }

    /// This attempt failed and another one was given to the broker. Copies of
    /// this attempt are duplicates; the other attempt is new.
    pub(crate) fn retried(&mut self, now: Timestamp, lease: Lease) -> Ended<T> {
        self.settle(now, lease, false)
    }

    /// It was not handled and will come again. One delivery that is parked is
    /// promoted, the lowest attempt first.
    pub(crate) fn release(&mut self, lease: Lease) -> Ended<T> {
        let Some(parked) = self.end(&lease) else {
            return Ended::nothing();
        };
        Ended {
            promoted: self.promote(lease.id, parked),
            ..Ended::nothing()
        }
    }

    /// Learns again what a window of the same key had learned before, oldest
    /// first.
    pub(crate) fn restore(&mut self, handled: Handled) {
        let at = handled.time();
        self.note(at, handled.id, handled.attempt);
        // Whoever counts has counted these already.
        let counts = self.counts;
        self.evict(at);
        self.counts = counts;
    }

    /// Forgets every id that was handled.
    pub(crate) fn forget_all(&mut self) {
        self.settled.clear();
        self.order.clear();
    }

    /// Drops parked deliveries that `keep` does not want: those of a generation
    /// that has ended, which come again by themselves.
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "consumers that end a generation will drop their parked copies with it"
        )
    )]
    pub(crate) fn retain_parked(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for leased in self.leased.values_mut() {
            leased.parked.retain(|(_, token)| keep(token));
        }
    }

    /// What it has seen.
    pub(crate) fn counts(&self) -> DedupCounts {
        self.counts
    }

    /// Ids that it knows as handled.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.settled.len()
    }

    /// Deliveries that are parked.
    #[cfg(test)]
    pub(crate) fn parked(&self) -> usize {
        self.leased.values().map(|l| l.parked.len()).sum()
    }

    fn settle(&mut self, now: Timestamp, lease: Lease, done: bool) -> Ended<T> {
        let id = lease.id;
        let attempt = self.leased.get(&id).map_or(0, |l| l.attempt);
        let Some(parked) = self.end(&lease) else {
            return Ended::nothing();
        };
        let attempt_over = Attempt::new(attempt, done);
        self.note(now, id, attempt_over);
        let (over, open): (VecDeque<_>, VecDeque<_>) = parked
            .into_iter()
            .partition(|(parked, _)| done || *parked <= attempt);
        self.counts.duplicates += over.len() as u64;
        let promoted = self.promote(id, open);
        self.evict(now);
        Ended {
            handled: Some(Handled::new(now, id, attempt_over)),
            duplicates: over.into_iter().map(|(_, token)| token).collect(),
            promoted,
        }
    }

    fn note(&mut self, now: Timestamp, id: IdHash, attempt: Attempt) {
        let at = self.seconds(now);
        self.settled.insert(id, Settled { at, attempt });
        self.order.push_back((at, id));
    }

    /// Ends a lease; none when it was ended before.
    fn end(&mut self, lease: &Lease) -> Option<VecDeque<(u32, T)>> {
        if self.leased.get(&lease.id)?.serial != lease.serial {
            return None;
        }
        self.leased.remove(&lease.id).map(|l| l.parked)
    }

    fn promote(&mut self, id: IdHash, mut parked: VecDeque<(u32, T)>) -> Option<(Lease, T)> {
        let lowest = parked.iter().map(|(attempt, _)| *attempt).min()?;
        let first = parked.iter().position(|(attempt, _)| *attempt == lowest)?;
        let (attempt, token) = parked.remove(first)?;
        Some((self.lease(id, attempt, parked), token))
    }

    fn lease(&mut self, id: IdHash, attempt: u32, parked: VecDeque<(u32, T)>) -> Lease {
        self.serial += 1;
        let serial = self.serial;
        self.leased.insert(
            id,
            Leased {
                serial,
                attempt,
                parked,
            },
        );
        Lease { id, serial }
    }

    fn evict(&mut self, now: Timestamp) {
        let now = self.seconds(now);
        while let Some(&(at, id)) = self.order.front() {
            let old = now.saturating_sub(at) >= self.max_age;
            if !old && self.order.len() <= self.max_ids {
                return;
            }
            self.order.pop_front();
            // Settled again since, or forgotten: a later entry counts.
            if self.settled.get(&id).is_some_and(|s| s.at == at) {
                self.settled.remove(&id);
                self.counts.forgotten_early += u64::from(!old);
            }
        }
    }

    /// Whole seconds since the first time seen, which fits four bytes.
    fn seconds(&mut self, now: Timestamp) -> u32 {
        let base = *self.base.get_or_insert(now);
        u32::try_from(now.since(base).as_secs()).unwrap_or(u32::MAX)
    }
}

impl Attempt {
    fn new(attempt: u32, done: bool) -> Self {
        Self(attempt.min(u32::MAX >> 1) << 1 | u32::from(done))
    }
}

impl Settled {
    /// Whether an attempt is over.
    fn covers(self, attempt: u32) -> bool {
        self.attempt.0 & 1 == 1 || attempt <= self.attempt.0 >> 1
    }
}

impl Handled {
    fn new(at: Timestamp, id: IdHash, attempt: Attempt) -> Self {
        let at = u64::try_from(at.as_millis() / 1000).unwrap_or(0);
        Self { at, id, attempt }
    }

    fn time(self) -> Timestamp {
        let seconds = i64::try_from(self.at).unwrap_or(i64::MAX);
        Timestamp::from_millis(seconds.saturating_mul(1000))
    }
}

impl<T> Ended<T> {
    fn nothing() -> Self {
        Self {
            handled: None,
            duplicates: Vec::new(),
            promoted: None,
        }
    }
}

/// Ids that a window keeps unless set otherwise.
pub(crate) const MAX_IDS: usize = 1_000_000;
/// How long a window keeps an id unless set otherwise.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
#[path = "dedup_tests.rs"]
mod tests;
