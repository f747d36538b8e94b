//! The shelf against a model: what was noted, in order, and nothing else.

use std::time::Duration;

use super::*;
use crate::{
    hub::dedup::{Attempt, DedupWindow, Offer},
    message::Timestamp,
};

const LIMITS: Limits = Limits {
    ids: 3000,
    age: 1000,
    groups: 10,
};

/// One write, as a journal has it: whole or not at all.
#[derive(Default)]
struct Write {
    puts: Vec<(EntryId, Bytes)>,
    removes: Vec<EntryId>,
    noted: Vec<(Arc<str>, Handled)>,
    forgot: Option<Arc<str>>,
}

/// A log of which any number of the last writes can be lost.
#[derive(Default)]
struct Disk {
    writes: Vec<Write>,
    next: EntryId,
}

impl Disk {
    fn entries(&self) -> BTreeMap<EntryId, Bytes> {
        let mut entries = BTreeMap::new();
        for write in &self.writes {
            for removed in &write.removes {
                assert!(entries.remove(removed).is_some(), "{removed} is not there");
            }
            entries.extend(write.puts.iter().cloned());
        }
        entries
    }

    fn noted(&self, group: &str) -> Vec<Handled> {
        let mut all = Vec::new();
        for write in &self.writes {
            if write.forgot.as_deref() == Some(group) {
                all.clear();
            }
            let of_group = write.noted.iter().filter(|(g, _)| &**g == group);
            all.extend(of_group.map(|(_, handled)| *handled));
        }
        all
    }

    fn keep(&mut self, shelf: &mut Shelf, fresh: Fresh) -> usize {
        let mut plan = shelf.plan(fresh.clone());
        let first = self.next + 1;
        let puts: Vec<_> = (first..).zip(std::mem::take(&mut plan.puts)).collect();
        self.next += puts.len() as EntryId;
        self.writes.push(Write {
            puts,
            removes: plan.removes.clone(),
            noted: fresh
                .into_iter()
                .flat_map(|(g, all)| all.into_iter().map(move |h| (g.clone(), h)))
                .collect(),
            forgot: None,
        });
        let trimmed = shelf.written(plan, first);
        self.remove(trimmed.removes);
        trimmed.early
    }

    fn remove(&mut self, removes: Vec<EntryId>) {
        self.writes.push(Write {
            removes,
            ..Write::default()
        });
    }

    /// What a process that starts now finds.
    fn reopen(&self, hasher: IdHasher, limits: Limits) -> Shelf {
        let entries = self.entries();
        let mut shelf = Shelf::new(limits, hasher);
        for (entry, body) in &entries {
            shelf.found(*entry, &codec::head(body).unwrap());
        }
        for (group, _, loose) in shelf.entries() {
            for entry in loose {
                shelf.recall(&group, codec::ids(&entries[&entry]).unwrap());
            }
        }
        shelf
    }

    /// The window that such a process has of a group.
    fn window(&self, shelf: &Shelf, group: &str, hasher: IdHasher) -> DedupWindow<()> {
        let entries = self.entries();
        let mut window = window(hasher);
        for (name, chunks, loose) in shelf.entries() {
            if &*name == group {
                for entry in chunks.iter().chain(&loose) {
                    codec::ids(&entries[entry])
                        .unwrap()
                        .for_each(|h| window.restore(h));
                }
            }
        }
        window
    }
}

fn window(hasher: IdHasher) -> DedupWindow<()> {
    DedupWindow::new(LIMITS.ids, Duration::from_secs(LIMITS.age), hasher)
}

fn handled(hasher: IdHasher, at: u64, id: u64, attempt: u32) -> Handled {
    Handled {
        at,
        id: hasher.hash("topic", &id.to_string()),
        attempt: Attempt(attempt),
    }
}

fn is_known(window: &mut DedupWindow<()>, now: u64, id: u64, attempt: u32) -> bool {
    let now = Timestamp::from_millis(i64::try_from(now).unwrap() * 1000);
    let offer = window.offer(now, ("topic", &id.to_string()), attempt);
    matches!(offer, Offer::Committed)
}

#[test]
fn what_comes_back_is_what_the_groups_knew_wherever_the_log_ends() {
    let seeds = std::env::var("HANDLED_SEEDS").map_or(8, |n| n.parse().unwrap());
    let (mut checked, mut known) = (0, 0);
    for seed in 0..seeds {
        let mut rng = fastrand::Rng::with_seed(seed);
        let hasher = IdHasher::with_key([7; 16]);
        let groups: [Arc<str>; 2] = ["queue:".into(), "group:g".into()];
        let mut disk = Disk::default();
        let mut shelf = Shelf::new(LIMITS, hasher);
        let mut now = 1_700_000_000;
        let mut next_id = 0;
        for step in 0..rng.usize(20..150) {
            let context = format!("seed {seed}, step {step}");
            match rng.u8(..40) {
                0 => {
                    let group = rng.choice(&groups).unwrap();
                    let removes = shelf.forget(group);
                    disk.remove(removes);
                    disk.writes.last_mut().unwrap().forgot = Some(group.clone());
                }
                1..4 => {
                    let trimmed = shelf.trim(now);
                    assert_eq!(trimmed.early, 0, "{context}");
                    disk.remove(trimmed.removes);
                }
                4..6 => now += rng.u64(..LIMITS.age / 2),
                6..8 => {
                    // The process dies, and so does the end of what it wrote.
                    if rng.bool() {
                        disk.writes.truncate(rng.usize(..=disk.writes.len()));
                    }
                    shelf = disk.reopen(hasher, LIMITS);
                    for group in &groups {
                        let mut ideal = window(hasher);
                        disk.noted(group).iter().for_each(|h| ideal.restore(*h));
                        let mut found = disk.window(&shelf, group, hasher);
                        for id in 0..next_id {
                            let attempt = rng.u32(..3);
                            let wanted = is_known(&mut ideal, now, id, attempt);
                            let is = is_known(&mut found, now, id, attempt);
                            assert_eq!(is, wanted, "{context}: {id}/{attempt} of {group}");
                            checked += 1;
                            known += u64::from(wanted);
                        }
                    }
                }
                _ => {
                    let mut fresh = Fresh::new();
                    let most = if rng.u8(..5) == 0 { 4096 } else { 30 };
                    for _ in 0..rng.usize(..most) {
                        let group = rng.choice(&groups).unwrap().clone();
                        next_id += u64::from(rng.u8(..10) != 0);
                        let one = handled(hasher, now, next_id, rng.u32(..6));
                        fresh.entry(group).or_default().push(one);
                    }
                    let plan_fails = rng.u8(..10) == 0;
                    if plan_fails {
                        drop(shelf.plan(fresh));
                    } else {
                        assert_eq!(disk.keep(&mut shelf, fresh), 0, "{context}");
                    }
                }
            }
            let on_disk: usize = disk
                .entries()
                .values()
                .map(|body| codec::head(body).unwrap().ids)
                .sum();
            assert_eq!(shelf.ids(), on_disk, "{context}");
            let bound = groups.len() * (LIMITS.ids + 4096 + 2 * CHUNK);
            assert!(on_disk <= bound, "{context}: {on_disk} ids");
        }
    }
    eprintln!("{seeds} seeds, {checked} ids asked for, {known} known");
    assert!(known > 1000 && checked > 2 * known);
}

#[test]
fn a_million_ids_are_a_thousand_entries_however_slowly_they_come() {
    const IDS: usize = 1_000_000;
    let limits = Limits { ids: IDS, ..LIMITS };
    let hasher = IdHasher::random();
    let mut shelf = Shelf::new(limits, hasher);
    let (mut next, mut bytes, mut live) = (0, 0_usize, HashMap::new());
    for n in 0..IDS as u64 + 100_000 {
        let fresh = Fresh::from([("queue:".into(), vec![handled(hasher, n / 2000, n, 1)])]);
        let plan = shelf.plan(fresh);
        next += 1;
        let len = plan.puts[0].len();
        live.insert(next, len);
        bytes += len;
        let removes = plan.removes.clone();
        let trimmed = shelf.written(plan, next);
        for gone in removes.iter().chain(&trimmed.removes) {
            bytes -= live.remove(gone).unwrap();
        }
    }
    eprintln!("{} ids: {} entries, {bytes} bytes", shelf.ids(), live.len());
    assert!((IDS..IDS + 2 * CHUNK).contains(&shelf.ids()));
    assert!(live.len() < 1000 + CHUNK);
    assert!(bytes < 26_000_000);
}

#[test]
fn more_full_groups_than_there_is_room_for_keep_less_and_it_is_counted() {
    let limits = Limits {
        ids: 2048,
        ..LIMITS
    };
    let hasher = IdHasher::random();
    let mut disk = Disk::default();
    let mut shelf = Shelf::new(limits, hasher);
    let mut early = 0;
    for n in 0..8 {
        let group: Arc<str> = format!("group:{n}").into();
        for part in 0..4 {
            let ids = (0..512).map(|id| handled(hasher, n, part * 512 + id, 1));
            early += disk.keep(&mut shelf, Fresh::from([(group.clone(), ids.collect())]));
        }
    }
    assert_eq!(early, 8 * 2048 - FULL_WINDOWS * 2048);
    assert_eq!(shelf.ids(), FULL_WINDOWS * 2048);
    assert_eq!(disk.reopen(hasher, limits).ids(), shelf.ids());
}

#[test]
fn the_quietest_group_makes_room_for_another() {
    let limits = Limits {
        groups: 2,
        ..LIMITS
    };
    let hasher = IdHasher::random();
    let mut disk = Disk::default();
    let mut shelf = Shelf::new(limits, hasher);
    for (at, group) in [(1, "a"), (2, "b"), (3, "a"), (4, "c")] {
        let one = vec![handled(hasher, at, at, 1)];
        disk.keep(&mut shelf, Fresh::from([(group.into(), one)]));
    }
    let mut left: Vec<_> = shelf.entries().into_iter().map(|(g, ..)| g).collect();
    left.sort();
    assert_eq!(left, ["a".into(), "c".into()]);
}

#[test]
fn what_is_old_goes_and_what_is_young_stays() {
    let hasher = IdHasher::random();
    let mut disk = Disk::default();
    let mut shelf = Shelf::new(LIMITS, hasher);
    for (at, count) in [(0, 1500), (500, 1500), (900, 10)] {
        let ids = (0..count).map(|id| handled(hasher, at, at * 10_000 + id, 1));
        disk.keep(&mut shelf, Fresh::from([("g".into(), ids.collect())]));
    }
    assert_eq!(shelf.trim(999), Trimmed::default());
    for (now, left) in [
        (1000, 1510),
        (1499, 1510),
        (1500, 10),
        (1899, 10),
        (1900, 0),
    ] {
        let trimmed = shelf.trim(now);
        assert_eq!((shelf.ids(), trimmed.early), (left, 0), "at {now}");
        disk.remove(trimmed.removes);
    }
    assert!(disk.entries().is_empty());
    assert!(shelf.entries().is_empty(), "the group too");
}

/// What a process finds: an entry with so many ids of each group.
fn found(limits: Limits, entries: &[(&str, usize)]) -> Shelf {
    let hasher = IdHasher::random();
    let mut shelf = Shelf::new(limits, hasher);
    for (entry, (group, ids)) in (1..).zip(entries) {
        let head = Head {
            hasher,
            group: (*group).to_owned(),
            ids: *ids,
            newest: entry,
        };
        shelf.found(entry, &head);
    }
    shelf
}

#[test]
fn an_entry_is_loose_until_it_has_a_chunks_ids() {
    let shelf = found(
        LIMITS,
        &[("g", CHUNK), ("g", CHUNK + 1), ("g", CHUNK - 1), ("g", 1)],
    );
    let (_, chunks, loose) = shelf.entries().remove(0);
    assert_eq!((chunks, loose), (vec![1, 2], vec![3, 4]));
}

#[test]
fn a_window_that_was_made_smaller_lets_go_of_what_it_has_too_much() {
    let limits = Limits {
        ids: 2 * CHUNK,
        ..LIMITS
    };
    let mut shelf = found(limits, &[("g", CHUNK); 4]);
    let trimmed = shelf.trim(4);
    assert_eq!((trimmed.removes, trimmed.early), (vec![1, 2], 0));
    assert_eq!(shelf.ids(), 2 * CHUNK);
}

#[test]
fn as_many_groups_as_there_may_be_stay() {
    let limits = Limits {
        groups: 2,
        ..LIMITS
    };
    let mut shelf = found(limits, &[("a", 1), ("b", 1)]);
    assert_eq!(shelf.trim(2), Trimmed::default());
    assert_eq!(shelf.ids(), 2);
}

#[test]
fn all_that_went_for_want_of_room_is_counted() {
    let limits = Limits {
        ids: CHUNK,
        groups: 5,
        ..LIMITS
    };
    let groups = ["a", "b", "c", "d", "e", "f"].map(|group| (group, CHUNK));
    let mut shelf = found(limits, &groups);
    // One group too many, and one full window.
    let trimmed = shelf.trim(6);
    assert_eq!(trimmed.early, 2 * CHUNK);
    assert_eq!(trimmed.removes.len(), 2);
    assert_eq!(shelf.ids(), FULL_WINDOWS * CHUNK);
}
