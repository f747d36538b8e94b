//! What waits for its time, and what is due. Pure: events and the time go in,
//! what to do comes out. It knows no disk and no broker.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use crate::{
    message::{MessageId, Timestamp},
    topic::Topic,
};

/// A scheduled message, numbered as it came.
pub(crate) type Number = u64;

/// What a scheduled message is known by: an id is scheduled once in a topic. The
/// count tells a reprocessed letter's copy from the message itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) topic: Topic,
    pub(crate) id: MessageId,
    pub(crate) copy: u32,
}

/// A message that waits. `B` is its body, or where that is.
#[derive(Clone, Debug)]
pub(crate) struct Waiting<B> {
    pub(crate) name: Name,
    pub(crate) kind: String,
    /// When it was to be handed out.
    pub(crate) due: Timestamp,
    /// When it is tried, or tried again.
    pub(crate) next: Timestamp,
    /// Tries that failed.
    pub(crate) failures: u32,
    /// Why the last one did.
    pub(crate) error: Option<Arc<str>>,
    /// Bytes.
    pub(crate) size: usize,
    pub(crate) body: B,
    /// It is being published.
    pub(crate) in_hand: bool,
}

/// Bounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
}

/// Everything that waits.
#[derive(Debug)]
pub(crate) struct Shelf<B> {
    limits: Limits,
    waiting: BTreeMap<Number, Waiting<B>>,
    /// Those that nobody has in hand.
    by_time: BTreeSet<(Timestamp, Number)>,
    names: HashMap<Name, Number>,
    bytes: usize,
    next: Number,
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    /// It waits.
    Taken(Number),
    /// It waits already, under this number.
    Known(Number),
    /// There is no room.
    Full,
}

/// What became of a cancellation.
#[derive(Debug)]
pub(crate) enum Cancelled<B> {
    /// It will not be handed out.
    Out(Waiting<B>),
    /// It is being published.
    TooLate,
    /// There is none of that name.
    Unknown,
}

/// First wait after a failed try; doubles.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest wait between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl<B> Shelf<B> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: BTreeMap::new(),
            by_time: BTreeSet::new(),
            names: HashMap::new(),
            bytes: 0,
            next: 1,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn get(&self, number: Number) -> Option<&Waiting<B>> {
        self.waiting.get(&number)
    }

    pub(crate) fn find(&self, topic: &Topic, id: &str) -> impl Iterator<Item = &Waiting<B>> {
        // Copies of reprocessed letters are rare: the first few numbers are enough.
        (0..MAX_COPIES).filter_map(move |copy| {
            let id = MessageId::new(id).ok()?;
            let name = Name {
                topic: topic.clone(),
                id,
                copy,
            };
            self.waiting.get(self.names.get(&name)?)
        })
    }

    /// Takes a message, if there is room. What an earlier process had accepted
    /// (`kept`) has its room whether there is any or not.
    pub(crate) fn offer(&mut self, waiting: Waiting<B>, kept: bool) -> Offered {
        if let Some(number) = self.names.get(&waiting.name) {
            return Offered::Known(*number);
        }
        let full = self.waiting.len() >= self.limits.messages
            || self.bytes + waiting.size > self.limits.bytes;
        if full && !kept {
            return Offered::Full;
        }
        let number = self.next;
        self.next += 1;
        self.bytes += waiting.size;
        self.names.insert(waiting.name.clone(), number);
        self.by_time.insert((waiting.next, number));
        self.waiting.insert(number, waiting);
        Offered::Taken(number)
    }

    /// Where the body is from now on.
    pub(crate) fn moved(&mut self, number: Number, body: B) {
        if let Some(waiting) = self.waiting.get_mut(&number) {
            waiting.body = body;
        }
    }

    /// Takes in hand what is due, in the order of its time, at most so many.
    pub(crate) fn take_due(&mut self, now: Timestamp, at_most: usize) -> Vec<Number> {
        let mut due = Vec::new();
        while due.len() < at_most
            && let Some((at, number)) = self.by_time.first().copied()
            && at <= now
        {
            self.by_time.pop_first();
            if let Some(waiting) = self.waiting.get_mut(&number) {
                waiting.in_hand = true;
                due.push(number);
            }
        }
        due
    }

    /// What was in hand is safe elsewhere.
    pub(crate) fn done(&mut self, number: Number) -> Option<Waiting<B>> {
        let waiting = self.waiting.remove(&number)?;
        self.by_time.remove(&(waiting.next, number));
        self.names.remove(&waiting.name);
        self.bytes -= waiting.size;
        Some(waiting)
    }

    /// What was in hand could not be published: it is tried again later.
    pub(crate) fn failed(&mut self, number: Number, now: Timestamp, error: &str) {
        let Some(waiting) = self.waiting.get_mut(&number) else {
            return;
        };
        let pause = FIRST_PAUSE
            .saturating_mul(1 << waiting.failures.min(10))
            .min(LONGEST_PAUSE);
        waiting.failures = waiting.failures.saturating_add(1);
        waiting.error = Some(error.into());
        waiting.in_hand = false;
        self.by_time.remove(&(waiting.next, number));
        waiting.next = now + pause;
        self.by_time.insert((waiting.next, number));
    }

    /// Calls one off that is not in hand.
    pub(crate) fn cancel(&mut self, topic: &Topic, id: &str) -> Cancelled<B> {
        let mut in_hand = false;
        let mut free = None;
        for waiting in self.find(topic, id) {
            if waiting.in_hand {
                in_hand = true;
            } else {
                free = self.names.get(&waiting.name).copied();
                break;
            }
        }
        match free.and_then(|number| self.done(number)) {
            Some(waiting) => Cancelled::Out(waiting),
            None if in_hand => Cancelled::TooLate,
            None => Cancelled::Unknown,
        }
    }

    /// When something is due next.
    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Those of a topic, or all, in the order of their times, behind a place.
    pub(crate) fn page(
        &self,
        topic: Option<&Topic>,
        after: Option<(Timestamp, Number)>,
        limit: usize,
    ) -> Vec<(Number, &Waiting<B>)> {
        let from = match after {
            Some(place) => std::ops::Bound::Excluded(place),
            None => std::ops::Bound::Unbounded,
        };
        self.by_time
            .range((from, std::ops::Bound::Unbounded))
            .filter_map(|(_, number)| Some((*number, self.waiting.get(number)?)))
            .filter(|(_, w)| topic.is_none_or(|t| *t == w.name.topic))
            .take(limit)
            .collect()
    }

    /// Ends: everything that is still here.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Waiting<B>> {
        self.names.clear();
        self.by_time.clear();
        self.bytes = 0;
        std::mem::take(&mut self.waiting).into_values()
    }
}

/// Copies of one id that are told apart when one is looked for.
const MAX_COPIES: u32 = 8;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    fn waiting(id: &str, due: i64) -> Waiting<()> {
        Waiting {
            name: Name {
                topic: Topic::new("tasks.a").unwrap(),
                id: MessageId::new(id).unwrap(),
                copy: 0,
            },
            kind: "k".into(),
            due: at(due),
            next: at(due),
            failures: 0,
            error: None,
            size: 10,
            body: (),
            in_hand: false,
        }
    }

    fn shelf(messages: usize, bytes: usize) -> Shelf<()> {
        Shelf::new(Limits { messages, bytes })
    }

    fn ids(shelf: &Shelf<()>, numbers: &[Number]) -> Vec<String> {
        numbers
            .iter()
            .map(|n| shelf.get(*n).unwrap().name.id.to_string())
            .collect()
    }

    #[test]
    fn what_is_due_comes_in_the_order_of_its_time_then_as_it_came() {
        let mut shelf = shelf(10, 1000);
        for (id, due) in [("c", 30), ("b1", 20), ("b2", 20), ("a", 10), ("later", 99)] {
            assert!(matches!(
                shelf.offer(waiting(id, due), false),
                Offered::Taken(_)
            ));
        }
        assert_eq!(shelf.next_due(), Some(at(10)));
        assert_eq!(shelf.take_due(at(9), 10), [0; 0]);
        let first = shelf.take_due(at(30), 3);
        assert_eq!(ids(&shelf, &first), ["a", "b1", "b2"]);
        let rest = shelf.take_due(at(30), 3);
        assert_eq!(ids(&shelf, &rest), ["c"]);
        assert_eq!(shelf.next_due(), Some(at(99)));
        for number in first.into_iter().chain(rest) {
            assert!(shelf.done(number).is_some());
        }
        assert_eq!((shelf.len(), shelf.bytes()), (1, 10));
    }

    #[test]
    fn an_id_waits_once_in_a_topic_and_again_after_it_went() {
        let mut shelf = shelf(10, 1000);
        let Offered::Taken(first) = shelf.offer(waiting("a", 1), false) else {
            panic!("there is room");
        };
        assert_eq!(shelf.offer(waiting("a", 5), false), Offered::Known(first));
        let mut copy = waiting("a", 5);
        copy.name.copy = 1;
        assert!(matches!(shelf.offer(copy, false), Offered::Taken(_)));
        let numbers = shelf.take_due(at(1), 10);
        shelf.done(numbers[0]).unwrap();
        assert!(matches!(
            shelf.offer(waiting("a", 9), false),
            Offered::Taken(_)
        ));
    }

    #[test]
    fn what_does_not_fit_is_refused_but_not_what_was_accepted_before() {
        let mut few = shelf(1, 1000);
        few.offer(waiting("a", 1), false);
        assert_eq!(few.offer(waiting("b", 1), false), Offered::Full);
        assert!(matches!(
            few.offer(waiting("b", 1), true),
            Offered::Taken(_)
        ));
        let mut small = shelf(10, 15);
        small.offer(waiting("a", 1), false);
        assert_eq!(small.offer(waiting("b", 1), false), Offered::Full);
        let numbers = small.take_due(at(1), 1);
        small.done(numbers[0]);
        assert!(matches!(
            small.offer(waiting("b", 1), false),
            Offered::Taken(_)
        ));
    }

    #[test]
    fn a_failed_try_is_made_again_after_pauses_that_double_to_a_minute() {
        let mut shelf = shelf(10, 1000);
        shelf.offer(waiting("a", 0), false);
        let mut now = at(0);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let number = shelf.take_due(now, 1)[0];
            shelf.failed(number, now, "why");
            now = now + Duration::from_secs(pause);
            assert_eq!(shelf.next_due(), Some(now));
        }
        let (_, waiting) = shelf.page(None, None, 10)[0];
        assert_eq!(
            (waiting.failures, waiting.error.as_deref()),
            (8, Some("why"))
        );
        assert_eq!(waiting.due, at(0));
    }

    #[test]
    fn a_cancelled_one_is_gone_and_one_in_hand_is_too_late() {
        let mut shelf = shelf(10, 1000);
        let topic = Topic::new("tasks.a").unwrap();
        shelf.offer(waiting("a", 1), false);
        shelf.offer(waiting("b", 1), false);
        assert!(matches!(shelf.cancel(&topic, "a"), Cancelled::Out(_)));
        assert!(matches!(shelf.cancel(&topic, "a"), Cancelled::Unknown));
        let due = shelf.take_due(at(1), 10);
        assert_eq!(ids(&shelf, &due), ["b"]);
        assert!(matches!(shelf.cancel(&topic, "b"), Cancelled::TooLate));
        // A failed one is free again.
        shelf.failed(due[0], at(1), "e");
        assert!(matches!(shelf.cancel(&topic, "b"), Cancelled::Out(_)));
        assert_eq!((shelf.len(), shelf.bytes(), shelf.next_due()), (0, 0, None));
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repeat() {
        let mut shelf = shelf(100, 10_000);
        for n in 0..10 {
            shelf.offer(waiting(&format!("m{n}"), i64::from(n % 3)), false);
        }
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = shelf.page(None, after, 3);
            let Some((number, last)) = page.last() else {
                break;
            };
            after = Some((last.next, *number));
            seen.extend(page.iter().map(|(_, w)| w.name.id.to_string()));
        }
        assert_eq!(
            seen,
            ["m0", "m3", "m6", "m9", "m1", "m4", "m7", "m2", "m5", "m8"]
        );
        let other = Topic::new("tasks.b").unwrap();
        assert!(shelf.page(Some(&other), None, 10).is_empty());
    }

    fn copy_of(id: &str, due: i64, copy: u32) -> Waiting<()> {
        let mut copied = waiting(id, due);
        copied.name.copy = copy;
        copied
    }

    #[test]
    fn a_message_and_the_copies_of_its_letter_are_found_under_one_id() {
        let mut shelf = shelf(10, 1000);
        let topic = Topic::new("tasks.a").unwrap();
        for copy in [0, 2] {
            shelf.offer(copy_of("a", 1 + i64::from(copy), copy), false);
        }
        shelf.offer(waiting("b", 1), false);
        let found: Vec<u32> = shelf.find(&topic, "a").map(|w| w.name.copy).collect();
        assert_eq!(found, [0, 2]);
        // With the first in hand the other is still called off.
        assert_eq!(shelf.take_due(at(1), 1).len(), 1);
        match shelf.cancel(&topic, "a") {
            Cancelled::Out(waiting) => assert_eq!(waiting.name.copy, 2),
            other => panic!("{other:?}"),
        }
        assert!(matches!(shelf.cancel(&topic, "a"), Cancelled::TooLate));
    }

    #[test]
    fn room_is_to_the_last_byte() {
        let mut shelf = shelf(10, 20);
        for id in ["a", "b"] {
            assert!(matches!(
                shelf.offer(waiting(id, 1), false),
                Offered::Taken(_)
            ));
        }
        assert_eq!(shelf.bytes(), 20);
        assert_eq!(shelf.offer(waiting("c", 1), false), Offered::Full);
    }

    #[test]
    fn what_is_left_at_the_end_is_given_out_and_nothing_is_due_any_more() {
        let mut shelf = Shelf::new(Limits {
            messages: 10,
            bytes: 1000,
        });
        let with_body = |id: &str, body: u8| Waiting {
            name: waiting(id, 1).name,
            kind: String::new(),
            due: at(1),
            next: at(1),
            failures: 0,
            error: None,
            size: 10,
            body,
            in_hand: false,
        };
        shelf.offer(with_body("a", 1), false);
        let Offered::Taken(number) = shelf.offer(with_body("b", 2), false) else {
            panic!("there is room");
        };
        shelf.moved(number, 3);
        let bodies: Vec<u8> = shelf.drain().map(|w| w.body).collect();
        assert_eq!(bodies, [1, 3]);
        assert_eq!((shelf.len(), shelf.bytes(), shelf.next_due()), (0, 0, None));
    }
}
