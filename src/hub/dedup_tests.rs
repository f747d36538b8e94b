//! Of the dedup window: what a careful caller may rely on.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const TOPIC: &str = "tasks.test";

fn window<T>(ids: usize, age: u64) -> DedupWindow<T> {
    DedupWindow::new(ids, Duration::from_secs(age), IdHasher::random())
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + seconds * 1000)
}

fn granted(offer: Offer) -> Lease {
    match offer {
        Offer::New(lease) => lease,
        other => panic!("not new: {other:?}"),
    }
}

fn park(window: &mut DedupWindow<u32>, offer: Offer, token: u32) {
    match offer {
        Offer::Leased(parking) => window.park(parking, token).unwrap(),
        other => panic!("not leased: {other:?}"),
    }
}

#[test]
fn an_id_is_handled_once_in_each_topic() {
    let mut w = DedupWindow::<u32>::default();
    let one = granted(w.offer(at(0), (TOPIC, "a"), 0));
    w.commit(at(0), one);
    assert!(matches!(w.offer(at(1), (TOPIC, "a"), 0), Offer::Committed));
    assert!(matches!(w.offer(at(1), ("other", "a"), 0), Offer::New(_)));
    assert_eq!(w.counts().duplicates, 1);
}

#[test]
fn a_commit_settles_what_is_parked() {
    let mut w = DedupWindow::default();
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    for token in [1, 2] {
        let offer = w.offer(at(0), (TOPIC, "a"), 0);
        park(&mut w, offer, token);
    }
    let ended = w.commit(at(1), first);
    assert_eq!(ended.duplicates, [1, 2]);
    assert!(ended.promoted.is_none());
}

#[test]
fn every_duplicate_is_counted_and_not_multiplied() {
    let mut w = window::<u32>(10, 100);
    // Two earlier attempts of one that runs.
    let lease = granted(w.offer(at(0), (TOPIC, "a"), 2));
    for count in 1..=2 {
        assert!(matches!(w.offer(at(0), (TOPIC, "a"), 1), Offer::Committed));
        assert_eq!(w.counts().duplicates, count);
    }
    // Three copies that its end settles, and two that come after it.
    for token in 0..3 {
        let offer = w.offer(at(0), (TOPIC, "a"), 2);
        park(&mut w, offer, token);
    }
    assert_eq!(w.commit(at(0), lease).duplicates.len(), 3);
    assert_eq!(w.counts().duplicates, 5);
    for count in 6..=7 {
        assert!(matches!(w.offer(at(1), (TOPIC, "a"), 2), Offer::Committed));
        assert_eq!(w.counts().duplicates, count);
    }
}

#[test]
fn what_a_group_forgets_is_new_to_it() {
    let mut w = window::<u32>(10, 100);
    let lease = granted(w.offer(at(0), (TOPIC, "a"), 0));
    w.commit(at(0), lease);
    w.forget_all();
    assert_eq!(w.len(), 0);
    let lease = granted(w.offer(at(1), (TOPIC, "a"), 0));
    w.commit(at(1), lease);
    // Nor does what was forgotten end the new one early.
    assert!(matches!(w.offer(at(99), (TOPIC, "a"), 0), Offer::Committed));
}

#[test]
fn an_id_is_its_bytes_and_back() {
    for halves in [
        [1, 2],
        [u64::MAX, 0],
        [0, u64::MAX],
        [1 << 63 | 5, 1 << 62 | 9],
    ] {
        let id = IdHash(halves);
        let bytes = id.to_bytes();
        assert_eq!(bytes[..8], halves[0].to_le_bytes());
        assert_eq!(bytes[8..], halves[1].to_le_bytes());
        assert_eq!(IdHash::from_bytes(bytes), id);
    }
}

#[test]
fn a_release_promotes_one_and_leaves_the_others_parked() {
    let mut w = DedupWindow::default();
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    for token in [1, 2] {
        let offer = w.offer(at(0), (TOPIC, "a"), 0);
        park(&mut w, offer, token);
    }
    let (second, token) = w.release(first).promoted.unwrap();
    assert_eq!((token, w.parked()), (1, 1));
    assert_eq!(w.commit(at(1), second).duplicates, [2]);
}

#[test]
fn a_retry_is_new_and_a_copy_of_the_failed_attempt_is_not() {
    let mut w = DedupWindow::<u32>::default();
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    w.retried(at(0), first);
    assert!(matches!(w.offer(at(0), (TOPIC, "a"), 0), Offer::Committed));
    let second = granted(w.offer(at(1), (TOPIC, "a"), 1));
    assert!(matches!(w.offer(at(1), (TOPIC, "a"), 0), Offer::Committed));
    w.commit(at(1), second);
    for attempt in 0..4 {
        assert!(matches!(
            w.offer(at(2), (TOPIC, "a"), attempt),
            Offer::Committed
        ));
    }
}

#[test]
fn a_retry_that_overtakes_the_end_of_its_attempt_waits_for_it() {
    let mut w = DedupWindow::default();
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    let (copy, retry) = (
        w.offer(at(0), (TOPIC, "a"), 0),
        w.offer(at(0), (TOPIC, "a"), 1),
    );
    park(&mut w, copy, 10);
    park(&mut w, retry, 11);
    let ended = w.retried(at(0), first);
    assert_eq!(ended.duplicates, [10]);
    assert_eq!(ended.promoted.unwrap().1, 11);
}

#[test]
fn an_id_is_forgotten_with_age() {
    let mut w = window::<u32>(10, 60);
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    w.commit(at(0), first);
    assert!(matches!(w.offer(at(59), (TOPIC, "a"), 0), Offer::Committed));
    assert!(matches!(w.offer(at(60), (TOPIC, "a"), 0), Offer::New(_)));
    assert_eq!(w.counts().forgotten_early, 0);
}

#[test]
fn a_window_that_is_too_short_says_so() {
    let mut w = window::<u32>(10, 60);
    for n in 0..25 {
        let one = granted(w.offer(at(0), (TOPIC, &n.to_string()), 0));
        w.commit(at(0), one);
    }
    assert_eq!(w.len(), 10);
    assert_eq!(w.counts().forgotten_early, 15);
}

#[test]
fn a_lease_outlives_any_eviction() {
    let mut w = window::<u32>(1, 1);
    let held = granted(w.offer(at(0), (TOPIC, "held"), 0));
    for n in 0..5 {
        let one = granted(w.offer(at(n * 10), (TOPIC, &n.to_string()), 0));
        w.commit(at(n * 10), one);
    }
    assert!(matches!(
        w.offer(at(100), (TOPIC, "held"), 0),
        Offer::Leased(_)
    ));
    w.commit(at(100), held);
}

#[test]
fn what_was_read_from_a_journal_is_known() {
    let hasher = IdHasher::random();
    let mut before = DedupWindow::<u32>::new(10, MAX_AGE, hasher);
    let first = granted(before.offer(at(0), (TOPIC, "a"), 0));
    let handled = before.commit(at(0), first).handled.unwrap();
    let first = granted(before.offer(at(0), (TOPIC, "b"), 0));
    let retried = before.retried(at(0), first).handled.unwrap();
    let mut w = DedupWindow::<u32>::new(10, MAX_AGE, hasher);
    w.restore(handled);
    w.restore(retried);
    assert!(matches!(w.offer(at(1), (TOPIC, "b"), 0), Offer::Committed));
    assert!(matches!(w.offer(at(1), (TOPIC, "b"), 1), Offer::New(_)));
    assert!(matches!(w.offer(at(1), (TOPIC, "a"), 7), Offer::Committed));
}

#[test]
fn what_is_brought_back_beyond_the_room_is_not_counted_again() {
    let mut w = window::<u32>(10, 60);
    for n in 0..25_u8 {
        w.restore(Handled {
            at: u64::from(n),
            id: IdHash::from_bytes([n; 16]),
            attempt: Attempt(1),
        });
    }
    assert_eq!((w.len(), w.counts().forgotten_early), (10, 0));
}

/// Hashes are on disks: no version may compute others.
#[test]
fn a_key_gives_the_same_hashes_for_ever() {
    let hash = IdHasher::with_key(*b"0123456789abcdef").hash(TOPIC, "a");
    assert_eq!(IdHash::from_bytes(hash.to_bytes()), hash);
    assert_eq!(hash, IdHash([0xb49c_c6e7_a30e_49b7, 0x903c_5b51_30a3_1393]));
    let other = IdHasher::random();
    assert_ne!(other.hash("ab", "c"), other.hash("a", "bc"));
}

#[test]
fn parked_deliveries_of_a_dead_generation_can_be_dropped() {
    let mut w = DedupWindow::default();
    let first = granted(w.offer(at(0), (TOPIC, "a"), 0));
    for token in [1, 2] {
        let offer = w.offer(at(0), (TOPIC, "a"), 0);
        park(&mut w, offer, token);
    }
    w.retain_parked(|token| *token == 2);
    assert_eq!(w.release(first).promoted.unwrap().1, 2);
}

#[derive(Clone, Debug)]
enum Step {
    Deliver { id: u8, attempt: u32 },
    Commit(usize),
    Retried(usize),
    Release(usize),
    Pass(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4_u8, 0..3_u32).prop_map(|(id, attempt)| Step::Deliver { id, attempt }),
        1 => (0..8_usize).prop_map(Step::Commit),
        1 => (0..8_usize).prop_map(Step::Retried),
        1 => (0..8_usize).prop_map(Step::Release),
        1 => (0..100_i64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 0..200)
}

/// Drives a window as a hub does and checks every promise on the way.
#[derive(Default)]
struct Hub {
    now: i64,
    next: u32,
    ids: BTreeMap<u32, (u8, u32)>,
    running: Vec<(Lease, u32)>,
    parked: BTreeSet<u32>,
    committed: BTreeMap<u8, i64>,
    over: BTreeMap<(u8, u32), i64>,
}

const AGE: i64 = 300;

impl Hub {
    /// A delivery goes to a handler.
    fn run(&mut self, lease: Lease, token: u32) {
        let (id, attempt) = self.ids[&token];
        let twice = self.running.iter().any(|(_, t)| self.ids[t].0 == id);
        assert!(!twice, "two of id {id} run at once");
        let fresh = |since: Option<&i64>| since.is_none_or(|t| self.now - t >= AGE);
        assert!(fresh(self.committed.get(&id)), "id {id} was committed");
        assert!(
            fresh(self.over.get(&(id, attempt))),
            "{id}/{attempt} was over"
        );
        self.running.push((lease, token));
    }

    fn ended(&mut self, ended: Ended<u32>) {
        for token in ended.duplicates {
            assert!(self.parked.remove(&token), "{token} was not parked");
        }
        if let Some((lease, token)) = ended.promoted {
            assert!(self.parked.remove(&token), "{token} was not parked");
            self.run(lease, token);
        }
    }

    fn step(&mut self, w: &mut DedupWindow<u32>, step: &Step) {
        match *step {
            Step::Deliver { id, attempt } => {
                self.next += 1;
                let token = self.next;
                self.ids.insert(token, (id, attempt));
                let name = id.to_string();
                match w.offer(at(self.now), (TOPIC, &name), attempt) {
                    Offer::New(lease) => self.run(lease, token),
                    Offer::Leased(parking) => {
                        w.park(parking, token).unwrap();
                        self.parked.insert(token);
                    }
                    Offer::Committed => {}
                }
            }
            Step::Commit(n) | Step::Retried(n) | Step::Release(n) => {
                if self.running.is_empty() {
                    return;
                }
                let (lease, token) = self.running.remove(n % self.running.len());
                let (id, attempt) = self.ids[&token];
                let ended = match step {
                    Step::Commit(_) => {
                        self.committed.insert(id, self.now);
                        w.commit(at(self.now), lease)
                    }
                    Step::Retried(_) => {
                        self.over.insert((id, attempt), self.now);
                        w.retried(at(self.now), lease)
                    }
                    _ => w.release(lease),
                };
                let released = matches!(step, Step::Release(_));
                let waited = self.parked.iter().any(|t| self.ids[t].0 == id);
                assert!(!released || !waited || ended.promoted.is_some());
                self.ended(ended);
                if released && !waited {
                    // It comes again, and is handed out again.
                    self.next += 1;
                    let token = self.next;
                    self.ids.insert(token, (id, attempt));
                    let again = granted(w.offer(at(self.now), (TOPIC, &id.to_string()), attempt));
                    self.run(again, token);
                }
            }
            Step::Pass(seconds) => self.now += seconds,
        }
        assert_eq!(w.parked(), self.parked.len(), "nothing parked is forgotten");
    }
}

proptest! {
    #[test]
    fn no_id_runs_twice_and_nothing_parked_is_forgotten(steps in steps()) {
        let mut window = window(1000, AGE as u64);
        let mut hub = Hub::default();
        for step in &steps {
            hub.step(&mut window, step);
        }
        // Once every handler has ended, nothing is left behind.
        while !hub.running.is_empty() {
            hub.step(&mut window, &Step::Commit(0));
        }
        prop_assert!(hub.parked.is_empty());
    }
}
