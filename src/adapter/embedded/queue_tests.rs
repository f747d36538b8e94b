//! The queue against a naive model of it, and its corners one by one.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::message::TaskAttributes;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millis(ms)
}

fn entry(message: Message) -> Entry {
    Entry {
        bytes: 10,
        message: Arc::new(message),
        marks: Arc::default(),
        routing_key: None,
        deliveries: 0,
        record: None,
    }
}

fn named(name: &str) -> Message {
    Message::new(name, "")
}

fn queue(options: QueueOptions) -> Queue {
    Queue::new(at(0), options, 1000).unwrap()
}

fn take(queue: &mut Queue, now: i64) -> Option<(String, Seq)> {
    let mut dead = Vec::new();
    let assigned = queue.assign(at(now), &mut dead, |_| true)?;
    assert!(dead.is_empty());
    Some((assigned.message.kind.clone(), assigned.seq))
}

#[test]
fn a_message_expires_wherever_it_stands() {
    let mut q = queue(QueueOptions::default());
    let mut dead = Vec::new();
    q.append(at(0), entry(named("first")), &mut dead);
    q.append(
        at(0),
        entry(named("second").with_expiration(at(50))),
        &mut dead,
    );
    q.append(at(0), entry(named("third")), &mut dead);
    assert_eq!(q.next_due(), Some(at(50)));
    q.tick(at(49), &mut dead);
    assert!(dead.is_empty());
    q.tick(at(50), &mut dead);
    assert_eq!(dead.len(), 1);
    assert_eq!(
        (dead[0].entry.message.kind.as_str(), dead[0].reason),
        ("second", EXPIRED)
    );
    assert_eq!((q.ready_len(), q.bytes(), q.next_due()), (2, 20, None));
}

#[test]
fn the_queues_ttl_counts_from_when_the_message_became_ready() {
    let mut q = queue(QueueOptions {
        message_ttl_ms: Some(100),
        ..QueueOptions::default()
    });
    let mut dead = Vec::new();
    let mut later = named("later");
    later.task = Some(Box::new(TaskAttributes {
        scheduled_at: Some(at(1000)),
        ..TaskAttributes::default()
    }));
    q.append(at(0), entry(later), &mut dead);
    q.append(at(0), entry(named("now")), &mut dead);
    q.attach(at(0), 1, false).unwrap();
    assert_eq!(take(&mut q, 0).unwrap().0, "now");
    assert!(take(&mut q, 999).is_none());
    q.tick(at(1000), &mut dead);
    assert!(dead.is_empty());
    assert_eq!(q.next_due(), Some(at(1100)));
    q.tick(at(1100), &mut dead);
    assert_eq!(dead.len(), 1);
}

#[test]
fn what_expires_while_a_reader_holds_it_dies_when_it_comes_back() {
    let mut q = queue(QueueOptions::default());
    let mut dead = Vec::new();
    q.attach(at(0), 1, false).unwrap();
    q.append(at(0), entry(named("x").with_expiration(at(10))), &mut dead);
    let (_, seq) = take(&mut q, 0).unwrap();
    q.tick(at(20), &mut dead);
    assert!(dead.is_empty());
    assert!(q.requeue(at(20), seq, true, &mut dead));
    assert_eq!((dead.len(), q.len(), q.bytes()), (1, 0, 0));
}

#[test]
fn at_the_bound_the_oldest_of_the_lowest_priority_goes() {
    let mut q = queue(QueueOptions {
        max_length: Some(3),
        ..QueueOptions::default()
    });
    let mut dead = Vec::new();
    for (name, priority) in [("a", 1), ("b", 9), ("c", 1), ("d", 5)] {
        let message = named(name).with_priority(Priority::new(priority).unwrap());
        assert_eq!(q.refuses(10), None);
        q.append(at(0), entry(message), &mut dead);
    }
    assert_eq!(dead.len(), 1);
    assert_eq!(
        (dead[0].entry.message.kind.as_str(), dead[0].reason),
        ("a", OVERFLOW)
    );
}

#[test]
fn priorities_above_the_queues_own_count_as_its_highest() {
    let mut q = queue(QueueOptions {
        max_priority: Some(3),
        ..QueueOptions::default()
    });
    let mut dead = Vec::new();
    q.attach(at(0), 1, false).unwrap();
    for (name, priority) in [("a", 3), ("b", 10)] {
        let message = named(name).with_priority(Priority::new(priority).unwrap());
        q.append(at(0), entry(message), &mut dead);
    }
    assert_eq!(take(&mut q, 0).unwrap().0, "a");
}

#[test]
fn a_single_active_consumer_is_followed_by_the_next() {
    let mut q = queue(QueueOptions {
        single_active_consumer: true,
        ..QueueOptions::default()
    });
    let mut dead = Vec::new();
    q.attach(at(0), 1, false).unwrap();
    q.attach(at(0), 2, false).unwrap();
    for _ in 0..3 {
        q.append(at(0), entry(named("x")), &mut dead);
    }
    let who = |q: &mut Queue, credit: fn(ConsumerId) -> bool| {
        q.assign(at(0), &mut Vec::new(), credit).map(|a| a.consumer)
    };
    assert_eq!(who(&mut q, |_| true), Some(1));
    assert_eq!(who(&mut q, |c| c == 2), None);
    q.detach(at(0), 1);
    assert_eq!(who(&mut q, |_| true), Some(2));
}

#[test]
fn an_exclusive_consumer_is_alone() {
    let mut q = queue(QueueOptions::default());
    q.attach(at(0), 1, true).unwrap();
    assert!(q.attach(at(0), 2, false).is_err());
    q.detach(at(0), 1);
    q.attach(at(0), 2, false).unwrap();
    assert!(q.attach(at(0), 3, true).is_err());
}

#[test]
fn options_that_are_not_understood_are_refused() {
    for options in [
        QueueOptions {
            overflow: Some("drop-tail".into()),
            ..QueueOptions::default()
        },
        QueueOptions {
            dead_letter_strategy: Some("sometimes".into()),
            ..QueueOptions::default()
        },
    ] {
        assert!(Queue::new(at(0), options, 10).is_err());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Publish { priority: u8, ttl: Option<i64> },
    Advance(i64),
    Take,
    Ack(usize),
    Requeue(usize),
    Retry(usize, u64),
    Dead(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..11u8, proptest::option::of(1..200i64))
            .prop_map(|(priority, ttl)| Step::Publish { priority, ttl }),
        2 => (1..60i64).prop_map(Step::Advance),
        6 => Just(Step::Take),
        3 => any::<usize>().prop_map(Step::Ack),
        2 => any::<usize>().prop_map(Step::Requeue),
        2 => (any::<usize>(), 0..100u64).prop_map(|(n, d)| Step::Retry(n, d)),
        1 => any::<usize>().prop_map(Step::Dead),
    ]
}

/// What the queue should be, as plainly as it can be said.
#[derive(Default)]
struct Model {
    now: i64,
    next_seq: u64,
    /// (priority, seq, name, expires), in no order.
    ready: Vec<(u8, u64, usize, Option<i64>)>,
    /// (look at, due, name, priority, expires), in the order of resting.
    resting: Vec<(i64, i64, usize, u8, Option<i64>)>,
    dead: Vec<usize>,
}

impl Model {
    fn ready(&mut self, priority: u8, name: usize, expires: Option<i64>) {
        self.ready.push((priority, self.next_seq, name, expires));
        self.next_seq += 1;
    }

    fn pass(&mut self) {
        let now = self.now;
        // A stable sort: what is due at once keeps the order of resting.
        self.resting.sort_by_key(|r| r.0);
        while self.resting.first().is_some_and(|r| r.0 <= now) {
            let (_, due, name, priority, expires) = self.resting.remove(0);
            if due > now {
                self.dead.push(name);
            } else {
                self.ready(priority, name, expires);
            }
        }
        let dead = &mut self.dead;
        self.ready.retain(|(_, _, name, expires)| {
            let gone = expires.is_some_and(|e| e <= now);
            if gone {
                dead.push(*name);
            }
            !gone
        });
    }

    fn take(&mut self) -> Option<(u8, u64, usize, Option<i64>)> {
        let best = self
            .ready
            .iter()
            .copied()
            .min_by_key(|(priority, seq, ..)| (u8::MAX - priority, *seq))?;
        self.ready.retain(|r| r.1 != best.1);
        Some(best)
    }
}

proptest! {
    /// Order, no loss, nothing twice without a requeue, bytes that add up.
    #[test]
    fn the_queue_does_what_its_model_does(steps in proptest::collection::vec(step(), 1..150)) {
        let mut q = queue(QueueOptions::default());
        q.attach(at(0), 1, false).unwrap();
        q.attach(at(0), 2, false).unwrap();
        let mut model = Model::default();
        let mut dead = Vec::new();
        let mut held: Vec<(u8, u64, usize, Option<i64>)> = Vec::new();
        let mut credit: BTreeMap<ConsumerId, usize> = BTreeMap::from([(1, 3), (2, 3)]);
        let mut holder: BTreeMap<u64, ConsumerId> = BTreeMap::new();
        let mut published = 0;
        let mut done = Vec::new();
        let mut seen: BTreeMap<usize, u32> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Publish { priority, ttl } => {
                    let expires = ttl.map(|t| model.now + t);
                    let mut message = named(&published.to_string())
                        .with_priority(Priority::new(priority).unwrap());
                    message.expiration = expires.map(at);
                    q.append(at(model.now), entry(message), &mut dead);
                    model.ready(priority, published, expires);
                    published += 1;
                }
                Step::Advance(ms) => {
                    model.now += ms;
                    model.pass();
                    q.tick(at(model.now), &mut dead);
                }
                Step::Take => {
                    let got = q.assign(at(model.now), &mut dead, |c| credit[&c] > 0);
                    if credit.values().sum::<usize>() == 0 {
                        prop_assert!(got.is_none());
                        continue;
                    }
                    let expected = model.take();
                    prop_assert_eq!(
                        got.as_ref().map(|g| g.message.kind.clone()),
                        expected.map(|e| e.2.to_string())
                    );
                    if let (Some(got), Some(expected)) = (got, expected) {
                        let before = seen.entry(expected.2).or_default();
                        prop_assert_eq!(got.message.redelivered, *before > 0);
                        *before += 1;
                        *credit.get_mut(&got.consumer).unwrap() -= 1;
                        prop_assert_eq!(got.seq, expected.1);
                        holder.insert(got.seq, got.consumer);
                        held.push(expected);
                    }
                }
                Step::Ack(n) | Step::Requeue(n) | Step::Retry(n, _) | Step::Dead(n) if !held.is_empty() => {
                    let (priority, seq, name, expires) = held.swap_remove(n % held.len());
                    *credit.get_mut(&holder[&seq]).unwrap() += 1;
                    match step {
                        Step::Ack(_) => {
                            prop_assert!(q.remove(seq).is_some());
                            prop_assert!(q.remove(seq).is_none());
                            done.push(name);
                        }
                        Step::Requeue(_) => {
                            prop_assert!(q.requeue(at(model.now), seq, true, &mut dead));
                            model.ready.push((priority, seq, name, expires));
                        }
                        Step::Retry(_, delay) => {
                            let failure = Failure::now("e", "", "q", None);
                            let failed = q.fail(seq, failure).unwrap();
                            let due = (delay > 0).then(|| at(model.now) + Duration::from_millis(delay));
                            q.take_back(at(model.now), failed, due);
                            if delay == 0 {
                                model.ready(priority, name, expires);
                            } else {
                                let due = model.now + delay as i64;
                                let look = expires.map_or(due, |e| e.min(due));
                                model.resting.push((look, due, name, priority, expires));
                            }
                        }
                        _ => {
                            prop_assert!(q.remove(seq).is_some());
                            done.push(name);
                        }
                    }
                    model.pass();
                    q.tick(at(model.now), &mut dead);
                }
                _ => {}
            }
            let mut died: Vec<usize> = dead.iter().map(|d| d.entry.message.kind.parse().unwrap()).collect();
            died.sort_unstable();
            model.dead.sort_unstable();
            prop_assert_eq!(&died, &model.dead);
            let live = published - done.len() - died.len();
            prop_assert_eq!(q.len(), live as u64);
            prop_assert_eq!(q.bytes(), 10 * live as u64);
            prop_assert_eq!(q.unacked_len(), held.len() as u64);
        }
    }
}
