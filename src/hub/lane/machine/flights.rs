//! Messages that were written to the open lane and not answered yet. It knows
//! their numbers and times, and refuses to know why they were written.
//!
//! New messages are written in the order of their numbers and mostly answered
//! in it, so they stand in a queue: the usual answer is at its front. Drained
//! ones have smaller numbers than new ones written before them, and may be
//! written again; they stand in a map of their own.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use crate::hub::spool::{Entry, Seq};

/// A message that was written and answered, or taken back.
pub(super) struct Flight<W> {
    pub(super) written: Instant,
    /// What it is, unless the spool has it or nobody waits any longer.
    pub(super) fresh: Option<Fresh<W>>,
}

/// A new message that only the lane holds, with whoever waits for its outcome.
pub(super) struct Fresh<W> {
    pub(super) entry: Entry,
    pub(super) waiter: W,
    /// When waiting is over.
    pub(super) deadline: Instant,
}

struct Slot<W> {
    seq: Seq,
    written: Instant,
    stage: Stage<W>,
}

enum Stage<W> {
    /// Somebody waits.
    Waited(Fresh<W>),
    /// The spool has it, or whoever waited was told that it took too long.
    Taken,
    /// Answered; leaves when it comes to the front.
    Answered,
}

/// Answered ones that may stand behind one without an answer, beside as many as
/// have none: more are taken out, or a single lost answer would keep them all.
const KEPT: usize = 64;

/// Room that an empty queue keeps: a window that was full once is given back.
const ROOMY: usize = 2_048;

pub(super) struct Flights<W> {
    /// New messages, by number and so by the time when they were written.
    /// Neither the first nor the last is `Answered`.
    new: VecDeque<Slot<W>>,
    answered: usize,
    waited: usize,
    drained: BTreeMap<Seq, Instant>,
    by_time: BTreeSet<(Instant, Seq)>,
}

impl<W> Flights<W> {
    pub(super) fn new() -> Self {
        Self {
            new: VecDeque::new(),
            answered: 0,
            waited: 0,
            drained: BTreeMap::new(),
            by_time: BTreeSet::new(),
        }
    }

    /// How many are without an answer.
    pub(super) fn len(&self) -> usize {
        self.new.len() - self.answered + self.drained.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of them somebody waits for; the spool has the others.
    pub(super) fn waited(&self) -> usize {
        self.waited
    }

    /// When the one was written that has waited longest.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let new = self.new.front().map(|s| s.written);
        let drained = self.by_time.first().map(|(at, _)| *at);
        new.into_iter().chain(drained).min()
    }

    /// The first deadline of those that are waited for.
    pub(super) fn first_deadline(&self) -> Option<Instant> {
        let waited = self.new.iter().filter_map(|s| match &s.stage {
            Stage::Waited(fresh) => Some(fresh.deadline),
            _ => None,
        });
        waited.min()
    }

    /// A new message was written. Its number is above all before it.
    pub(super) fn write(&mut self, seq: Seq, at: Instant, fresh: Fresh<W>) {
        debug_assert!(self.new.back().is_none_or(|last| last.seq < seq));
        self.waited += 1;
        self.new.push_back(Slot {
            seq,
            written: at,
            stage: Stage::Waited(fresh),
        });
    }

    /// A spooled message was written.
    pub(super) fn write_drained(&mut self, seq: Seq, at: Instant) {
        self.by_time.insert((at, seq));
        self.drained.insert(seq, at);
    }

    /// Takes out one that was answered; none: its generation was given up.
    pub(super) fn land(&mut self, seq: Seq) -> Option<Flight<W>> {
        if let Some(written) = self.drained.remove(&seq) {
            self.by_time.remove(&(written, seq));
            return Some(Flight {
                written,
                fresh: None,
            });
        }
        let place = match self.new.front() {
            Some(first) if first.seq == seq => 0,
            _ => self.new.binary_search_by_key(&seq, |s| s.seq).ok()?,
        };
        let slot = self.new.get_mut(place)?;
        let written = slot.written;
        let fresh = match std::mem::replace(&mut slot.stage, Stage::Answered) {
            Stage::Waited(fresh) => {
                self.waited -= 1;
                Some(fresh)
            }
            Stage::Taken => None,
            Stage::Answered => return None,
        };
        self.answered += 1;
        if self.answered > self.new.len() / 2 + KEPT {
            self.new.retain(|s| !matches!(s.stage, Stage::Answered));
            self.answered = 0;
        }
        self.trim();
        Some(Flight { written, fresh })
    }

    /// Answered ones leave at both ends: whatever is first has waited longest.
    fn trim(&mut self) {
        let gone =
            |slot: Option<&Slot<W>>| slot.is_some_and(|s| matches!(s.stage, Stage::Answered));
        while gone(self.new.front()) {
            self.new.pop_front();
            self.answered -= 1;
        }
        while gone(self.new.back()) {
            self.new.pop_back();
            self.answered -= 1;
        }
        if self.new.is_empty() && self.new.capacity() > ROOMY {
            self.new = VecDeque::new();
        }
    }

    /// The numbers of all, in publish order.
    pub(super) fn numbers(&self) -> Vec<Seq> {
        let new = self.new.iter();
        let new = new.filter(|s| !matches!(s.stage, Stage::Answered));
        let mut all: Vec<Seq> = self.drained.keys().copied().collect();
        all.extend(new.map(|s| s.seq));
        all.sort_unstable();
        all
    }

    /// The numbers of those whose deadline has come.
    pub(super) fn late(&self, now: Instant) -> Vec<Seq> {
        let late = self.new.iter().filter(|s| match &s.stage {
            Stage::Waited(fresh) => fresh.deadline <= now,
            _ => false,
        });
        late.map(|s| s.seq).collect()
    }

    /// Takes a new message from one that stays in flight: its answer is still
    /// to come, and it keeps its place in the window until then.
    pub(super) fn take(&mut self, seq: Seq) -> Option<Fresh<W>> {
        let place = self.new.binary_search_by_key(&seq, |s| s.seq).ok()?;
        let slot = self.new.get_mut(place)?;
        match std::mem::replace(&mut slot.stage, Stage::Taken) {
            Stage::Waited(fresh) => {
                self.waited -= 1;
                Some(fresh)
            }
            other => {
                slot.stage = other;
                None
            }
        }
    }

    /// Takes out all, in publish order: their generation is over.
    pub(super) fn end(&mut self) -> Vec<(Seq, Option<Fresh<W>>)> {
        let ended = std::mem::replace(self, Self::new());
        let drained = ended.drained.into_keys().map(|seq| (seq, None));
        let new = ended.new.into_iter().filter_map(|s| match s.stage {
            Stage::Waited(fresh) => Some((s.seq, Some(fresh))),
            Stage::Taken => Some((s.seq, None)),
            Stage::Answered => None,
        });
        let mut all: Vec<_> = drained.chain(new).collect();
        all.sort_unstable_by_key(|(seq, _)| *seq);
        all
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        broker::OrderKey,
        message::{Message, Timestamp, wire::Marks},
    };

    fn fresh(deadline: Instant) -> Fresh<Seq> {
        Fresh {
            entry: Entry {
                message: Arc::new(Message::default()),
                order: OrderKey::Publisher(0),
                marks: Marks::default(),
                confirm: true,
                since: Timestamp::now(),
                size: 1,
                due: None,
            },
            waiter: 0,
            deadline,
        }
    }

    /// Random writes, answers, takings and ends, beside a map of what is there.
    #[test]
    fn it_agrees_with_a_plain_map() {
        let start = Instant::now();
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let mut flights = Flights::<Seq>::new();
            let mut plain: BTreeMap<Seq, (Instant, bool, bool)> = BTreeMap::new();
            let (mut next, mut at) = (100, start);
            for _ in 0..200 {
                at += Duration::from_millis(random.u64(0..2));
                match random.u8(0..10) {
                    0..4 => {
                        flights.write(next, at, fresh(at));
                        plain.insert(next, (at, true, true));
                        next += 1;
                    }
                    4 => {
                        let seq = random.u64(0..100);
                        if plain.contains_key(&seq) {
                            continue;
                        }
                        flights.write_drained(seq, at);
                        plain.insert(seq, (at, false, false));
                    }
                    5..8 => {
                        let seq = random.u64(0..next + 2);
                        let was = plain.remove(&seq);
                        let is = flights.land(seq);
                        let is = is.map(|f| (f.written, f.fresh.is_some()));
                        assert_eq!(is, was.map(|(at, _, held)| (at, held)), "{seq}");
                    }
                    8 => {
                        let seq = random.u64(100..next + 2);
                        let held = plain
                            .get_mut(&seq)
                            .is_some_and(|p| std::mem::take(&mut p.2));
                        assert_eq!(flights.take(seq).is_some(), held, "{seq}");
                    }
                    _ if random.u8(..) < 8 => {
                        let ended: Vec<_> = flights.end();
                        let ended: Vec<_> = ended.iter().map(|(s, f)| (*s, f.is_some())).collect();
                        let were = std::mem::take(&mut plain);
                        let were: Vec<_> = were.iter().map(|(s, p)| (*s, p.2)).collect();
                        assert_eq!(ended, were);
                    }
                    _ => {}
                }
                assert_eq!(flights.len(), plain.len());
                assert_eq!(flights.is_empty(), plain.is_empty());
                assert_eq!(flights.waited(), plain.values().filter(|p| p.2).count());
                assert_eq!(flights.oldest(), plain.values().map(|p| p.0).min());
                let numbers: Vec<Seq> = plain.keys().copied().collect();
                assert_eq!(flights.numbers(), numbers);
                let late: Vec<Seq> = numbers
                    .into_iter()
                    .filter(|s| plain.get(s).is_some_and(|p| p.2))
                    .collect();
                assert_eq!(flights.late(at), late);
                let first = plain.values().filter(|p| p.2).map(|p| p.0).min();
                assert_eq!(flights.first_deadline(), first);
            }
        }
    }

    #[test]
    fn one_without_an_answer_does_not_keep_all_that_were_answered_behind_it() {
        let now = Instant::now();
        let mut flights = Flights::<Seq>::new();
        for seq in 0..10_000 {
            flights.write(seq, now, fresh(now));
        }
        for seq in 1..10_000 {
            assert!(flights.land(seq).is_some());
            assert!(flights.new.len() <= 2 * (flights.len() + KEPT));
        }
        assert_eq!((flights.len(), flights.numbers()), (1, vec![0]));
    }

    #[test]
    fn a_window_that_was_full_once_is_given_back() {
        let now = Instant::now();
        let mut flights = Flights::<Seq>::new();
        for (count, kept) in [(ROOMY, true), (2 * ROOMY, false)] {
            for seq in 0..count as Seq {
                flights.write(seq, now, fresh(now));
            }
            for seq in 0..count as Seq {
                flights.land(seq);
            }
            assert_eq!(flights.new.capacity() > 0, kept, "{count}");
        }
    }
}
