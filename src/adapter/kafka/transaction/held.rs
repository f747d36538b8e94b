//! What a transform holds of each partition: messages that were read and are not
//! committed, in order, and how often those of them failed that did. Pure.
//!
//! A failing message holds up its own partition only: what stands before it is
//! committed, and it is tried again after its rest, with all that is behind it. Each
//! assignment of a partition is a generation of its own; what an earlier one was
//! given counts no more.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    adapter::kafka::consumer::TopicPartition,
    broker::{Outgoing, Received},
    message::{MessageId, wire::Failure},
};

/// A message, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) offset: i64,
    pub(super) received: Received,
    /// It failed for good already, in a transaction that was not committed: it is
    /// buried again, and not handled again.
    pub(super) verdict: Option<Failure>,
}

/// What a batch has of one partition.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) place: TopicPartition,
    pub(super) generation: u64,
    pub(super) items: VecDeque<Item>,
}

/// What became of a part.
#[derive(Debug)]
pub(super) struct Handled {
    pub(super) place: TopicPartition,
    pub(super) generation: u64,
    /// What is to be written.
    pub(super) outputs: Vec<Outgoing>,
    /// Behind the last message that is done, if one is.
    pub(super) next: Option<i64>,
    /// Messages that are done.
    pub(super) done: u64,
    /// The first that is not done failed, and is tried again after this long.
    pub(super) failed: Option<(Failure, Duration)>,
    /// Dead letters among the outputs.
    pub(super) letters: u64,
    /// Of those that are done: what failed for good, and why.
    pub(super) given_up: Vec<(i64, MessageId, Failure)>,
    /// What is not done.
    pub(super) left: VecDeque<Item>,
}

/// All partitions of one transform.
#[derive(Debug, Default)]
pub(super) struct Held {
    partitions: BTreeMap<TopicPartition, Partition>,
    generations: u64,
    /// The partition that a single message was taken from last.
    last: Option<TopicPartition>,
}

#[derive(Debug)]
struct Partition {
    generation: u64,
    queue: VecDeque<Item>,
    /// The last offset that was taken in.
    newest: Option<i64>,
    /// Where it was read from first, for a group without a position.
    first: Option<i64>,
    /// It rests until then.
    rest: Option<Instant>,
    /// Messages that failed, by their offsets: how often, and why. Kept until the
    /// position behind them is committed, since a rewind brings all of them back: one
    /// that is refused behind others would have theirs counted anew each time. Under
    /// their ids too: a topic that was made anew has other messages at these offsets.
    tried: BTreeMap<i64, (MessageId, u32, Failure)>,
    /// The same of what failed for good.
    given_up: BTreeMap<i64, (MessageId, Failure)>,
}

impl Held {
    /// A partition is ours from now on.
    pub(super) fn assign(&mut self, place: TopicPartition) {
        self.generations += 1;
        let fresh = Partition {
            generation: self.generations,
            queue: VecDeque::new(),
            newest: None,
            first: None,
            rest: None,
            tried: BTreeMap::new(),
            given_up: BTreeMap::new(),
        };
        self.partitions.insert(place, fresh);
    }

    /// A partition is no longer ours; nothing of it is committed any more.
    pub(super) fn revoke(&mut self, place: &TopicPartition) {
        self.partitions.remove(place);
    }

    /// Every partition that is ours, and where it was read from first.
    pub(super) fn places(&self) -> Vec<(TopicPartition, Option<i64>)> {
        self.partitions
            .iter()
            .map(|(place, p)| (place.clone(), p.first))
            .collect()
    }

    /// Messages that wait for their turn, and not for the end of a rest.
    pub(super) fn waiting(&self) -> usize {
        let awake = self.partitions.values().filter(|p| p.rest.is_none());
        awake.map(|p| p.queue.len()).sum()
    }

    /// Partitions that rest.
    pub(super) fn resting(&self) -> impl Iterator<Item = &TopicPartition> {
        let resting = self.partitions.iter().filter(|(_, p)| p.rest.is_some());
        resting.map(|(place, _)| place)
    }

    /// Takes a message in; a repeat, or one of a partition that is not ours, is not.
    pub(super) fn take_in(&mut self, place: &TopicPartition, mut item: Item) {
        let Some(p) = self.partitions.get_mut(place) else {
            return;
        };
        if p.newest.is_some_and(|newest| item.offset <= newest) {
            return;
        }
        p.newest = Some(item.offset);
        p.first.get_or_insert(item.offset);
        if let Some((id, times, failure)) = p.tried.get(&item.offset)
            && *id == item.received.message.id
        {
            note(&mut item, *times, failure.clone());
        }
        if let Some((id, failure)) = p.given_up.get(&item.offset)
            && *id == item.received.message.id
        {
            item.verdict = Some(failure.clone());
        }
        p.queue.push_back(item);
    }

    /// Everything that does not rest, or one message of it, of each partition in turn.
    pub(super) fn batch(&mut self, now: Instant, one: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        let last = self.last.take().filter(|_| one);
        let is_behind = |place: &TopicPartition| last.as_ref().is_none_or(|last| place > last);
        let (mut turn, others): (Vec<_>, Vec<_>) = self
            .partitions
            .iter_mut()
            .partition(|(place, _)| is_behind(place));
        turn.extend(others);
        for (place, p) in turn {
            if p.rest.is_some_and(|until| now < until) {
                continue;
            }
            p.rest = None;
            if p.queue.is_empty() {
                continue;
            }
            let rest = p.queue.split_off(if one { 1 } else { p.queue.len() });
            parts.push(Part {
                place: place.clone(),
                generation: p.generation,
                items: std::mem::replace(&mut p.queue, rest),
            });
            if one {
                self.last = Some(place.clone());
                break;
            }
        }
        parts
    }

    /// A partition stands still for a while.
    pub(super) fn rest(&mut self, place: &TopicPartition, until: Instant) {
        if let Some(p) = self.partitions.get_mut(place) {
            p.rest = Some(until);
        }
    }

    /// Takes back what was not done. False: the partition is another's by now, and
    /// nothing of the part may be committed.
    pub(super) fn settle(&mut self, handled: &mut Handled, now: Instant) -> bool {
        let current = self
            .partitions
            .get_mut(&handled.place)
            .filter(|p| p.generation == handled.generation);
        let Some(p) = current else {
            return false;
        };
        for (offset, id, failure) in handled.given_up.drain(..) {
            p.given_up.insert(offset, (id, failure));
        }
        let mut left = std::mem::take(&mut handled.left);
        if let (Some((failure, rest)), Some(first)) = (handled.failed.take(), left.front_mut()) {
            let times = first.received.message.retry_count.saturating_add(1);
            note(first, times, failure.clone());
            let id = first.received.message.id.clone();
            p.tried.insert(first.offset, (id, times, failure));
            p.rest = Some(now + rest);
        }
        left.append(&mut p.queue);
        p.queue = left;
        true
    }

    /// What stands before a position is done for good.
    pub(super) fn committed(&mut self, place: &TopicPartition, next: i64) {
        if let Some(p) = self.partitions.get_mut(place) {
            p.tried = p.tried.split_off(&next);
            p.given_up = p.given_up.split_off(&next);
        }
    }

    /// Forgets what was read; it is read again from the committed positions.
    pub(super) fn rewind(&mut self) {
        for p in self.partitions.values_mut() {
            p.queue.clear();
            p.newest = None;
        }
    }
}

/// Notes failed attempts in what the next one sees.
fn note(item: &mut Item, times: u32, failure: Failure) {
    let message = Arc::make_mut(&mut item.received.message);
    message.retry_count = times;
    message.redelivered = true;
    message.error = Some(failure.details.clone());
    Arc::make_mut(&mut item.received.marks).failure = Some(Box::new(failure));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::BrokerType, message::Message, topic::Topic};

    fn place(n: i32) -> TopicPartition {
        ("t".into(), n)
    }

    /// The same message each time.
    fn item(offset: i64) -> Item {
        let message = Message {
            id: MessageId::new(format!("m-{offset}")).unwrap(),
            ..Message::default()
        };
        Item {
            offset,
            received: Received {
                topic: Topic::new("t").unwrap(),
                message: Arc::new(message),
                marks: Arc::default(),
                via: BrokerType::Kafka,
            },
            verdict: None,
        }
    }

    fn held(partitions: i32, messages: i64) -> Held {
        let mut held = Held::default();
        for n in 0..partitions {
            held.assign(place(n));
            for offset in 0..messages {
                held.take_in(&place(n), item(offset));
            }
        }
        held
    }

    /// Done up to `done`; the next one failed.
    fn failing(mut part: Part, done: usize) -> Handled {
        let left = part.items.split_off(done);
        Handled {
            place: part.place,
            generation: part.generation,
            outputs: Vec::new(),
            next: part.items.back().map(|i| i.offset + 1),
            done: done as u64,
            failed: Some((
                Failure::now("handler_error", "no", "t", None),
                Duration::from_secs(1),
            )),
            letters: 0,
            given_up: Vec::new(),
            left,
        }
    }

    #[test]
    fn a_failing_message_rests_with_what_is_behind_it_and_stops_its_partition_alone() {
        let mut held = held(2, 5);
        let now = Instant::now();
        let mut parts = held.batch(now, false);
        assert_eq!((parts.len(), held.waiting()), (2, 0));
        held.take_in(&place(0), item(5));
        let mut handled = failing(parts.remove(0), 2);
        assert_eq!(handled.next, Some(2));
        assert!(held.settle(&mut handled, now));
        held.take_in(&place(1), item(5));
        // Only the other partition goes on.
        let parts = held.batch(now, false);
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].place, place(1));
        // After its rest, in order, with the attempt counted.
        let again = held.batch(now + Duration::from_secs(1), false).remove(0);
        let offsets: Vec<i64> = again.items.iter().map(|i| i.offset).collect();
        assert_eq!(offsets, [2, 3, 4, 5]);
        assert_eq!(again.items[0].received.message.retry_count, 1);
        assert_eq!(again.items[1].received.message.retry_count, 0);
    }

    #[test]
    fn attempts_are_counted_over_a_rewind() {
        let mut held = held(1, 3);
        let now = Instant::now();
        let mut handled = failing(held.batch(now, false).remove(0), 1);
        assert!(held.settle(&mut handled, now));
        held.rewind();
        assert_eq!(held.waiting(), 0);
        for offset in 1..3 {
            held.take_in(&place(0), item(offset));
        }
        let later = now + Duration::from_secs(1);
        let mut handled = failing(held.batch(later, false).remove(0), 0);
        assert_eq!(handled.left[0].received.message.retry_count, 1);
        assert!(held.settle(&mut handled, later));
        let again = held.batch(later + Duration::from_secs(1), false).remove(0);
        assert_eq!(again.items[0].received.message.retry_count, 2);
    }

    #[test]
    fn another_message_at_an_offset_has_not_failed() {
        let mut held = held(1, 2);
        let now = Instant::now();
        let mut handled = failing(held.batch(now, false).remove(0), 0);
        assert!(held.settle(&mut handled, now));
        held.rewind();
        let mut other = item(0);
        other.received.message = Arc::new(Message::default());
        held.take_in(&place(0), other);
        held.take_in(&place(0), item(1));
        let again = held.batch(now + Duration::from_secs(1), false).remove(0);
        let first = &again.items[0].received;
        assert_eq!(first.message.retry_count, 0);
        assert!(!first.message.redelivered && first.marks.failure.is_none());
    }

    #[test]
    fn what_failed_for_good_is_not_handled_again_behind_a_rewind() {
        let mut held = held(1, 3);
        let now = Instant::now();
        let items = held.batch(now, false).remove(0).items;
        let failure = Failure::now("handler_error", "no", "t", None);
        let id = |n: usize| items[n].received.message.id.clone();
        let mut handled = Handled {
            place: place(0),
            generation: 1,
            outputs: Vec::new(),
            next: Some(2),
            done: 2,
            failed: None,
            letters: 2,
            given_up: vec![(0, id(0), failure.clone()), (1, id(1), failure)],
            left: VecDeque::new(),
        };
        assert!(held.settle(&mut handled, now));
        let verdicts = |held: &mut Held, items: &[Item]| {
            held.rewind();
            for item in items {
                held.take_in(&place(0), item.clone());
            }
            let part = held.batch(now, false).remove(0);
            let verdicts: Vec<bool> = part.items.iter().map(|i| i.verdict.is_some()).collect();
            verdicts
        };
        let mut again: Vec<Item> = items.iter().cloned().collect();
        assert_eq!(verdicts(&mut held, &again), [true, true, false]);
        // Another message at that offset is handled, and so is what comes after a commit.
        again[1].received.message = Arc::new(Message::default());
        assert_eq!(verdicts(&mut held, &again), [true, false, false]);
        held.committed(&place(0), 2);
        assert!(held.partitions[&place(0)].given_up.is_empty());
    }

    #[test]
    fn a_later_failure_does_not_make_an_earlier_one_count_anew() {
        let mut held = held(1, 3);
        let mut now = Instant::now();
        let retries = |held: &mut Held, now, done| {
            let part = held.batch(now, false).remove(0);
            let counts: Vec<u32> = part
                .items
                .iter()
                .map(|i| i.received.message.retry_count)
                .collect();
            assert!(held.settle(&mut failing(part, done), now));
            counts
        };
        // The first fails, then the second, whose transaction is not committed.
        assert_eq!(retries(&mut held, now, 0), [0, 0, 0]);
        now += Duration::from_secs(1);
        assert_eq!(retries(&mut held, now, 1), [1, 0, 0]);
        now += Duration::from_secs(1);
        held.rewind();
        for offset in 0..3 {
            held.take_in(&place(0), item(offset));
        }
        assert_eq!(retries(&mut held, now, 2), [1, 1, 0]);
        // What was committed is not kept; the third is.
        held.committed(&place(0), 2);
        let kept: Vec<i64> = held.partitions[&place(0)].tried.keys().copied().collect();
        assert_eq!(kept, [2]);
    }

    #[test]
    fn what_an_earlier_assignment_was_given_counts_no_more() {
        let mut held = held(1, 3);
        let now = Instant::now();
        let part = held.batch(now, false).remove(0);
        held.revoke(&place(0));
        held.take_in(&place(0), item(3));
        assert_eq!(held.waiting(), 0);
        held.assign(place(0));
        held.take_in(&place(0), item(0));
        let mut handled = failing(part, 3);
        assert!(!held.settle(&mut handled, now));
        assert_eq!(held.waiting(), 1);
    }

    #[test]
    fn single_messages_are_taken_of_each_partition_in_turn_but_of_none_that_rests() {
        let mut held = held(3, 3);
        let now = Instant::now();
        let next = |held: &mut Held| {
            let part = held.batch(now, true).remove(0);
            (part.place.1, part.items[0].offset)
        };
        assert_eq!(
            (0..4).map(|_| next(&mut held)).collect::<Vec<_>>(),
            [(0, 0), (1, 0), (2, 0), (0, 1)]
        );
        held.rest(&place(1), now + Duration::from_secs(1));
        assert_eq!(
            (0..2).map(|_| next(&mut held)).collect::<Vec<_>>(),
            [(2, 1), (0, 2)]
        );
        let all = held.batch(now, false);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].place, place(2));
    }

    #[test]
    fn an_offset_is_taken_in_once() {
        let mut held = held(1, 3);
        held.take_in(&place(0), item(2));
        held.take_in(&place(0), item(1));
        assert_eq!(held.waiting(), 3);
        assert_eq!(held.places(), [(place(0), Some(0))]);
    }
}
