//! The spool beside a plain list, and the room beside plain sums.

use super::*;
use crate::message::{MessageId, Priority};

const KEYS: u64 = 4;

fn order(key: u64) -> OrderKey {
    OrderKey::Publisher(key)
}

fn entry(seq: Seq, key: u64, priority: u8) -> Entry {
    let mut message = Message::new("t", "x");
    message.id = MessageId::new(format!("m{seq}")).unwrap();
    message.priority = Priority::new(priority).unwrap();
    let size = message.size() + ENTRY_OVERHEAD;
    Entry {
        message: Arc::new(message),
        order: order(key),
        marks: Marks::default(),
        confirm: true,
        since: at(seq),
        size,
        due: None,
    }
}

fn at(ms: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(ms).unwrap())
}

/// One entry of the list.
#[derive(Clone)]
struct Plain {
    entry: Entry,
    status: Status,
    /// On the disk only.
    away: bool,
}

impl Plain {
    fn rests(&self) -> bool {
        self.status == Status::Ready && self.entry.due.is_some()
    }

    fn ready(&self) -> bool {
        self.status == Status::Ready && !self.rests()
    }
}

#[derive(Default)]
struct List(BTreeMap<Seq, Plain>);

impl List {
    fn count(&self, of: impl Fn(&Plain) -> bool) -> usize {
        self.0.values().filter(|p| of(p)).count()
    }

    fn seqs(&self, of: impl Fn(&Plain) -> bool) -> Vec<Seq> {
        let chosen = self.0.iter().filter(|(_, p)| of(p));
        chosen.map(|(seq, _)| *seq).collect()
    }

    fn any_of_key(&self, key: &OrderKey, of: impl Fn(&Plain) -> bool) -> bool {
        self.count(|p| p.entry.order == *key && of(p)) > 0
    }

    /// The first that is ready and waits for no leased one of its key, unless it
    /// or one before it is on the disk.
    fn next_to_drain(&self, holds: bool) -> Option<Seq> {
        let held =
            |p: &Plain| holds && self.any_of_key(&p.entry.order, |o| o.status == Status::Leased);
        let first = self.seqs(|p| p.ready() && (p.away || !held(p)));
        first.first().copied().filter(|seq| !self.0[seq].away)
    }

    /// The most urgent that is before all on the disk and overtakes nothing in
    /// doubt.
    fn next_to_lease(&self) -> Option<Seq> {
        let tail = self.seqs(|p| p.away).first().copied().unwrap_or(Seq::MAX);
        let doubt = |p: &Plain| self.any_of_key(&p.entry.order, |o| o.status == Status::InDoubt);
        let free = self.seqs(|p| p.ready() && !p.away && !doubt(p));
        let free = free.into_iter().filter(|seq| *seq < tail);
        free.min_by_key(|seq| {
            let priority = self.0[seq].entry.message.priority.value();
            (u8::MAX - priority, *seq)
        })
    }

    fn check(&self, spool: &Spool, holds: bool) {
        assert_eq!(spool.len(), self.0.len());
        assert_eq!(spool.is_empty(), self.0.is_empty());
        assert_eq!(spool.head_len(), self.count(|p| !p.away));
        let tail = self.seqs(|p| p.away);
        assert_eq!(spool.tail_len(), tail.len());
        assert_eq!(spool.tail_first(), tail.first().copied());
        assert_eq!(spool.tail_end(), tail.last().copied());
        assert_eq!(spool.tail_start(3), tail[..tail.len().min(3)]);
        let bytes: usize = self.0.values().map(|p| p.entry.size).sum();
        assert_eq!(spool.bytes(), bytes);
        assert_eq!(
            spool.in_doubt(),
            self.count(|p| p.status == Status::InDoubt)
        );
        assert_eq!(
            spool.in_flight(),
            self.count(|p| p.status == Status::InFlight)
        );
        assert_eq!(spool.leased(), self.count(|p| p.status == Status::Leased));
        assert_eq!(spool.resting(), self.count(Plain::rests));
        assert_eq!(spool.ready(), self.count(Plain::ready));
        let dues = self.0.values().filter(|p| p.rests());
        assert_eq!(spool.next_due(), dues.filter_map(|p| p.entry.due).min());
        let here = self.seqs(|p| !p.away);
        let first = here.first().map(|seq| self.0[seq].entry.since);
        assert_eq!(spool.oldest(), first);
        let head = spool.head_from(5).map(|(seq, ..)| seq);
        assert!(head.eq(here.iter().copied().filter(|s| *s >= 5)));
        let from = spool.tail_from(5);
        assert!(from.eq(tail.iter().copied().filter(|s| *s >= 5)));
        for key in 0..KEYS {
            // What is in flight again or rests holds nobody up.
            let fences = |p: &Plain| p.status != Status::InFlight && !p.rests();
            assert_eq!(
                spool.fences(&order(key)),
                self.any_of_key(&order(key), fences)
            );
        }
        assert_eq!(spool.next_to_lease(), self.next_to_lease());
        if !holds {
            let ready = self.seqs(|p| p.ready() && !p.away);
            assert_eq!(spool.ready_here(), ready.len());
            let first = ready.first();
            let leads = first.is_some_and(|f| tail.first().is_none_or(|t| f < t));
            assert_eq!(spool.begins_here(), leads);
            assert_eq!(spool.next_to_drain(), self.next_to_drain(holds));
        }
        for (seq, plain) in &self.0 {
            let status = (!plain.away).then_some(plain.status);
            assert_eq!(spool.status(*seq), status);
            assert_eq!(
                spool.get(*seq).map(|e| e.due),
                status.map(|_| plain.entry.due)
            );
        }
    }
}

fn run(seed: u64, holds: bool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut spool = Spool::new();
    let mut list = List::default();
    if holds {
        spool.hold_keys();
    }
    let mut now = 0;
    for seq in 1..rng.u64(1..12) {
        let entry = entry(seq, rng.u64(..KEYS), rng.u8(..10));
        spool.restore(seq, &entry.order, entry.message.size());
        let (status, away) = (Status::Ready, true);
        let plain = Plain {
            entry,
            status,
            away,
        };
        list.0.insert(seq, plain);
    }
    for _ in 0..150 {
        let here = list.seqs(|p| !p.away);
        let of = |rng: &mut fastrand::Rng, s: Status| {
            let some = list.seqs(|p| !p.away && p.status == s);
            rng.choice(some)
        };
        match rng.u32(..12) {
            0..3 => {
                // Also late, under a number of its own.
                let seq = 20 + rng.u64(..100);
                if list.0.contains_key(&seq) {
                    continue;
                }
                let entry = entry(seq, rng.u64(..KEYS), rng.u8(..10));
                let status = if rng.bool() {
                    Status::Ready
                } else {
                    Status::InDoubt
                };
                spool.insert(seq, entry.clone(), status);
                let away = false;
                let plain = Plain {
                    entry,
                    status,
                    away,
                };
                list.0.insert(seq, plain);
            }
            3..6 => {
                let Some(seq) = rng.choice(here) else {
                    continue;
                };
                let to = [
                    Status::InDoubt,
                    Status::Ready,
                    Status::InFlight,
                    Status::Leased,
                ][rng.usize(..4)];
                assert!(spool.set(seq, to));
                list.0.get_mut(&seq).unwrap().status = to;
            }
            6 => {
                if let Some(seq) = of(&mut rng, Status::Leased) {
                    let due = at(now + rng.u64(1..40));
                    spool.edit(seq, |e| e.due = Some(due));
                    list.0.get_mut(&seq).unwrap().entry.due = Some(due);
                }
            }
            7 => {
                if let Some(seq) = rng.choice(here) {
                    assert!(spool.remove(seq).is_some());
                    list.0.remove(&seq);
                }
                assert!(spool.remove(999).is_none());
                assert!(!spool.set(999, Status::Ready));
            }
            8 => {
                now += rng.u64(..30);
                spool.wake(at(now));
                for plain in list.0.values_mut() {
                    if plain.rests() && plain.entry.due.is_some_and(|due| due <= at(now)) {
                        plain.entry.due = None;
                    }
                }
            }
            9 if !holds => {
                let Some(seq) = rng.choice(list.seqs(|_| true)) else {
                    continue;
                };
                let plain = &list.0[&seq];
                let behind = list.seqs(|p| p.away).last().is_none_or(|last| *last < seq);
                let fits = plain.ready() && !plain.away && behind;
                assert_eq!(spool.page_out(seq), fits);
                list.0.get_mut(&seq).unwrap().away |= fits;
            }
            10 => {
                // In publish order, as they are read.
                let Some(seq) = list.seqs(|p| p.away).first().copied() else {
                    continue;
                };
                let plain = list.0.get_mut(&seq).unwrap();
                assert!(spool.page_in(seq, plain.entry.clone()));
                assert!(!spool.page_in(seq, plain.entry.clone()));
                plain.away = false;
            }
            _ => {
                spool.park_held();
                assert_eq!(spool.next_to_drain(), list.next_to_drain(holds));
            }
        }
        list.check(&spool, holds);
    }
    // What was leased comes back, and then nothing is held any more.
    for seq in list.seqs(|p| !p.away) {
        spool.set(seq, Status::Ready);
        list.0.get_mut(&seq).unwrap().status = Status::Ready;
    }
    list.check(&spool, holds);
    while let Some(seq) = list.next_to_drain(holds) {
        assert_eq!(spool.next_to_drain(), Some(seq));
        spool.remove(seq);
        list.0.remove(&seq);
    }
    assert_eq!(spool.next_to_drain(), None);
}

#[test]
fn it_agrees_with_a_plain_list() {
    let slots: BTreeSet<usize> = (0..KEYS).map(|k| Spool::new().slot(&order(k))).collect();
    assert_eq!(slots.len() as u64, KEYS, "two keys share a slot");
    for seed in 0..100 {
        for holds in [false, true] {
            if let Err(panic) = std::panic::catch_unwind(|| run(seed, holds)) {
                eprintln!("seed {seed}, holding keys: {holds}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn what_was_changed_since_it_was_kept_stays_in_memory() {
    let changes: [fn(&mut Entry); 3] = [
        |e| e.marks.possible_duplicate = true,
        |e| {
            let mut message = (*e.message).clone();
            message.redelivered = true;
            e.message = Arc::new(message);
        },
        |e| e.size += 1,
    ];
    for change in changes {
        let mut spool = Spool::new();
        let mut changed = entry(1, 0, 5);
        change(&mut changed);
        spool.insert(1, changed, Status::Ready);
        spool.insert(2, entry(2, 0, 5), Status::Ready);
        assert!(!spool.page_out(1));
        assert!(spool.page_out(2));
    }
}

#[test]
fn what_waits_for_a_leased_one_of_its_key_is_not_next() {
    let mut spool = Spool::new();
    spool.hold_keys();
    for seq in 1..3 {
        spool.insert(seq, entry(seq, 0, 5), Status::Ready);
    }
    spool.set(1, Status::Leased);
    assert_eq!(spool.next_to_drain(), None);
    spool.set(1, Status::Ready);
    assert_eq!(spool.next_to_drain(), Some(1));
}

#[test]
fn the_fence_of_an_empty_spool_takes_no_memory() {
    let mut spool = Spool::new();
    spool.insert(1, entry(1, 0, 5), Status::Ready);
    spool.insert(2, entry(2, 0, 5), Status::Ready);
    spool.remove(1);
    assert!(spool.fences(&order(0)));
    spool.remove(2);
    assert!(spool.fence.is_empty());
}

#[test]
fn an_entry_that_cannot_be_read_is_given_up_and_may_only_hold_up_its_key() {
    let mut spool = Spool::new();
    for seq in 1..3 {
        spool.restore(seq, &order(seq), 10);
    }
    spool.drop_unreadable(1);
    assert_eq!((spool.len(), spool.tail_first()), (1, Some(2)));
}

#[test]
fn a_message_has_room_to_the_last_byte_and_the_last_place() {
    let budget = Budget::new(2, 100);
    assert!(budget.has_room(100) && !budget.has_room(101));
    assert!(!budget.take(101));
    assert_eq!(budget.taken(), (0, 0), "what is refused takes nothing");
    assert!(budget.take(60));
    assert!(budget.has_room(40) && !budget.has_room(41));
    assert!(!budget.take(41));
    assert!(budget.take(40));
    assert!(!budget.has_room(0));
    assert!(!budget.take(0));
    assert_eq!(budget.taken(), (2, 100));
    budget.give_back(1, 60);
    assert_eq!(budget.taken(), (1, 40));
    // What was accepted before has its room whether there is any or not.
    budget.take_anyway(3, 200);
    assert_eq!(budget.taken(), (4, 240));
    assert!(!budget.take(1));
}

#[test]
fn a_tenth_of_the_room_is_kept_aside_for_what_healthy_brokers_get() {
    let budget = Budget::new(20, 1_000);
    assert!(budget.has_spool_room(900) && !budget.has_spool_room(901));
    for _ in 0..17 {
        assert!(budget.take(50));
    }
    assert!(budget.has_spool_room(50) && !budget.has_spool_room(51));
    assert!(budget.take(1));
    assert!(!budget.has_spool_room(0), "eighteen of twenty are taken");
    assert!(budget.has_room(0));
}

#[tokio::test]
async fn whoever_waits_for_room_hears_that_some_came_free() {
    let budget = Budget::new(1, 100);
    assert!(budget.take(1));
    let freed = budget.freed.notified();
    budget.give_back(1, 1);
    freed.await;
    assert!(budget.take(1));
}
