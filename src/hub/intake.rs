//! Window of accepted ids, so that a client may simply repeat a publish (C14).
//!
//! An id that the caller brought is accepted once in a topic: a repeat joins the
//! one in flight and gets its answer, or gets the first outcome again. An error
//! is told to those who joined and leaves the window, so that the next repeat is
//! tried afresh. Ids that the hub made, and what the hub itself publishes again
//! (retries, reprocessing), pass by.
//!
//! Pure: no clock, no channel, no task. Ids are kept as the hashes of
//! [`super::dedup`], with the same odds against mistaking one for another.

use std::time::Duration;

use super::{
    dedup::{IdHash, IdHasher},
    gradual::{IdMap, Queue},
};
use crate::{
    message::{MessageId, Timestamp},
    topic::Topic,
};

/// The window. `O` is a good outcome, cheap to clone; `J` stands for somebody
/// who waits for the outcome of a publish in flight.
#[derive(Debug)]
pub(crate) struct IntakeWindow<O, J> {
    max_ids: usize,
    max_age: Duration,
    hasher: IdHasher,
    entries: IdMap<Entry<O, J>>,
    /// When each outcome was recorded, oldest first.
    order: Queue<(Timestamp, IdHash)>,
    serial: u64,
    counts: IntakeCounts,
}

/// What a window has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IntakeCounts {
    /// Repeats that joined a publish in flight or got the first outcome.
    pub(crate) repeats: u64,
    /// Outcomes that were forgotten for want of room before they were `max_age`
    /// old; a repeat of one of them is accepted again.
    pub(crate) forgotten_early: u64,
}

/// Who publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A client of the hub.
    Caller,
    /// The hub: a retry or a reprocessing, under the id of the original.
    Hub,
}

/// What to do with a publish.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Intake<O> {
    /// Not watched for repeats: publish it.
    Bypass,
    /// The first of its id: publish it and [`IntakeWindow::finish`] the ticket.
    Fresh(Ticket),
    /// In flight: [`IntakeWindow::join`] it.
    InFlight(Joining),
    /// It had this outcome: answer with it.
    Done(O),
}

/// A publish in flight. It must be ended by [`IntakeWindow::finish`], also when
/// its publish is abandoned, or repeats would wait for ever.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    id: IdHash,
    serial: u64,
}

/// The right to wait for a publish in flight.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Joining(IdHash);

#[derive(Debug)]
enum Entry<O, J> {
    InFlight { serial: u64, joined: Vec<J> },
    Done(O),
}

impl<O, J> Default for IntakeWindow<O, J> {
    fn default() -> Self {
        Self {
            max_ids: MAX_IDS,
            max_age: MAX_AGE,
            hasher: IdHasher::random(),
            entries: IdMap::default(),
            order: Queue::default(),
            serial: 0,
            counts: IntakeCounts::default(),
        }
    }
}

impl<O: Clone, J> IntakeWindow<O, J> {
    /// A window of at most `max_ids` outcomes, each for at most `max_age`. What
    /// is in flight comes on top and is as many as the hub lets be in flight.
    pub(crate) fn new(max_ids: usize, max_age: Duration) -> Self {
        Self {
            max_ids,
            max_age,
            ..Self::default()
        }
    }

    /// Asks what to do with a publish.
    pub(crate) fn offer(
        &mut self,
        now: Timestamp,
        topic: &Topic,
        id: &MessageId,
        origin: Origin,
    ) -> Intake<O> {
        if origin == Origin::Hub || id.is_generated() {
            return Intake::Bypass;
        }
        self.evict(now);
        let id = self.hasher.hash(topic.as_str(), id.as_str());
        match self.entries.get(&id) {
            Some(Entry::Done(outcome)) => {
                self.counts.repeats += 1;
                Intake::Done(outcome.clone())
            }
            Some(Entry::InFlight { .. }) => Intake::InFlight(Joining(id)),
            None => {
                self.serial += 1;
                let serial = self.serial;
                let entry = Entry::InFlight {
                    serial,
                    joined: Vec::new(),
                };
                self.entries.insert(id, entry);
                Intake::Fresh(Ticket { id, serial })
            }
        }
    }

    /// Waits for a publish in flight.
    ///
    /// # Errors
    /// Gives the joiner back when [`MAX_JOINED`] wait already, or when the
    /// publish is not in flight any more (then it must be offered again).
    pub(crate) fn join(&mut self, joining: &Joining, joiner: J) -> Result<(), Refused<J>> {
        match self.entries.get_mut(&joining.0) {
            Some(Entry::InFlight { joined, .. }) if joined.len() < MAX_JOINED => {
                joined.push(joiner);
                self.counts.repeats += 1;
                Ok(())
            }
            Some(Entry::InFlight { .. }) => Err(Refused::TooMany(joiner)),
            _ => Err(Refused::Over(joiner)),
        }
    }

    /// A publish ended: with an outcome, which is recorded, or without one, and
    /// then its id leaves the window. Returns those who joined; they get the
    /// same answer, the error too.
    pub(crate) fn finish(&mut self, now: Timestamp, ticket: Ticket, outcome: Option<O>) -> Vec<J> {
        let Ticket { id, serial } = ticket;
        let Some(entry) = self.entries.get_mut(&id) else {
            return Vec::new();
        };
        let joined = match entry {
            Entry::InFlight { serial: s, joined } if *s == serial => std::mem::take(joined),
            _ => return Vec::new(),
        };
        if let Some(outcome) = outcome {
            *entry = Entry::Done(outcome);
            self.order.push_back((now, id));
            self.evict(now);
        } else {
            self.entries.remove(&id);
        }
        joined
    }

    /// Forgets the outcome of an id: it may be accepted anew.
    pub(crate) fn forget(&mut self, topic: &Topic, id: &MessageId) {
        let id = self.hasher.hash(topic.as_str(), id.as_str());
        if matches!(self.entries.get(&id), Some(Entry::Done(_))) {
            self.entries.remove(&id);
            // Its place in the order would otherwise end a later outcome early.
            self.order.retain(|(_, other)| *other != id);
        }
    }

    /// What it has seen.
    pub(crate) fn counts(&self) -> IntakeCounts {
        self.counts
    }

    /// Ids that it knows, in flight or done.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn evict(&mut self, now: Timestamp) {
        while let Some(&(at, id)) = self.order.front() {
            let old = now.since(at) >= self.max_age;
            if !old && self.order.len() <= self.max_ids {
                return;
            }
            self.order.pop_front();
            // An id has one outcome in the window, and none in flight beside it,
            // so the entry is the one that was recorded then.
            self.entries.remove(&id);
            self.counts.forgotten_early += u64::from(!old);
        }
    }
}

/// Why somebody could not join.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused<J> {
    /// Too many wait for the same publish.
    TooMany(J),
    /// The publish is over; offer it again.
    Over(J),
}

/// Outcomes that a window keeps unless set otherwise.
pub(crate) const MAX_IDS: usize = 1_000_000;
/// How long a window keeps an outcome unless set otherwise.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(600);
/// Repeats that may wait for one publish in flight.
pub(crate) const MAX_JOINED: usize = 1024;

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
