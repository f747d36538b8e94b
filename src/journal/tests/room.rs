//! Bounds: on the disk, in memory, and what is done about segments of which
//! little is left.

use super::{
    super::{index::Index, state::Found},
    *,
};

#[test]
fn many_appends_share_one_sync() {
    let disk = Disk::new();
    let options = JournalOptions {
        segment_bytes: 1 << 20,
        max_bytes: 64 << 20,
        ..small()
    };
    let (mut rig, _) = Rig::open_with(&disk, options).unwrap();
    rig.append(put("first")).unwrap();
    rig.work().unwrap();
    let before = disk.syncs();
    for n in 0..1000 {
        rig.append(put(body(n, 100))).unwrap();
    }
    rig.work().unwrap();
    assert_eq!(disk.syncs() - before, 1);
    assert_eq!(rig.synced(), 1001);
}

#[test]
fn a_full_journal_refuses_puts_lets_every_entry_be_removed_and_stays_in_its_bound() {
    let disk = Disk::new();
    let options = JournalOptions {
        max_bytes: 100_000,
        ..small()
    };
    let on_disk = |disk: &Disk| -> usize { disk.names().iter().map(|n| disk.read(n).len()).sum() };
    let (mut rig, _) = Rig::open_with(&disk, options).unwrap();
    let mut ids = Vec::new();
    let mut peak = 0;
    for round in 0..5 {
        // Until it is full, one by one, tiny ones so that removes weigh most.
        loop {
            match rig.append(put(body(round, 10))) {
                Ok(appended) => ids.push(appended.first),
                Err(JournalError::Full) => break,
                Err(other) => panic!("{other}"),
            }
            rig.work().unwrap();
        }
        assert!(ids.len() > 500, "full with {}", ids.len());
        for id in ids.drain(..) {
            rig.append(remove([id])).unwrap();
            rig.work().unwrap();
            peak = peak.max(on_disk(&disk));
        }
        assert_eq!(rig.shared.lock().live(), 0);
    }
    eprintln!("at most {peak} of 100000 bytes on disk");
    assert!(peak <= 100_000, "{peak}");
    assert!(disk.names().len() <= 2, "{:?}", disk.names());
}

#[test]
fn stragglers_are_moved_so_that_their_segments_can_go() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    let mut stragglers = Vec::new();
    for n in 0..400u64 {
        let id = rig.append(put(body(n, 500))).unwrap().first;
        rig.work().unwrap();
        if n % 20 == 0 {
            stragglers.push((id, body(n, 500)));
        } else {
            rig.append(remove([id])).unwrap();
            rig.work().unwrap();
        }
    }
    // 200 kB went through; 20 entries of 500 bytes live.
    assert!(disk.names().len() <= 8, "{} segments", disk.names().len());
    let ids: Vec<_> = stragglers.iter().map(|(id, _)| *id).collect();
    let bodies: Vec<_> = stragglers
        .iter()
        .map(|(_, body)| Some(body.clone()))
        .collect();
    assert_eq!(rig.read(&ids).unwrap(), bodies);
    rig.close();
    let (rig, found) = Rig::open(&disk).unwrap();
    assert_eq!(found, stragglers.into_iter().collect());
    assert_eq!(rig.read(&ids).unwrap(), bodies);
}

#[test]
fn many_that_were_moved_are_read_on_and_on() {
    let disk = Disk::new();
    let options = JournalOptions {
        segment_bytes: 1 << 20,
        max_bytes: 64 << 20,
        ..small()
    };
    let (mut rig, _) = Rig::open_with(&disk, options).unwrap();
    // A segment of which a quarter lives, and more of them behind it.
    let mut kept = Vec::new();
    for n in 0..60_000u64 {
        let id = rig.append(put(body(n, 250))).unwrap().first;
        if n % 4 == 0 {
            kept.push((id, body(n, 250)));
        } else {
            rig.append(remove([id])).unwrap();
        }
        if n % 500 == 0 {
            rig.work().unwrap();
        }
    }
    rig.work().unwrap();
    let moved = {
        let state = rig.shared.lock();
        kept.iter()
            .filter(|(id, _)| matches!(state.find(*id), Found::Stored(place) if !place.home))
            .count()
    };
    assert!(moved > 2_000, "only {moved} were moved");
    let before = disk.bytes_read();
    let ids: Vec<_> = kept.iter().map(|(id, _)| *id).collect();
    let bodies: Vec<_> = kept.into_iter().map(|(_, body)| Some(body)).collect();
    assert_eq!(rig.read(&ids).unwrap(), bodies);
    let read = disk.bytes_read() - before;
    // What is there, its neighbours, and a buffer's length too much at each turn.
    assert!(
        read < 64 << 20,
        "{read} bytes were read for {} entries",
        ids.len()
    );
    // Backwards is slow, and right all the same.
    let some: Vec<_> = ids.iter().rev().step_by(97).copied().collect();
    let found = rig.read(&some).unwrap();
    assert!(found.iter().all(Option::is_some));
}

#[test]
fn what_lives_weighs_after_a_start_what_it_weighed_before() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for n in 0..60 {
        rig.append(put(body(n, 300 + n as usize))).unwrap();
        rig.work().unwrap();
    }
    rig.append(remove((1..=60).filter(|id| id % 7 != 0)))
        .unwrap();
    rig.work().unwrap();
    let weight = |rig: &Rig| {
        let index = &rig.shared.lock().index;
        (index.live_bytes(), index.segments().len())
    };
    let moved = |id| !rig.shared.lock().index.locate(id).unwrap().home;
    assert!((1..=8).any(|n| moved(7 * n)), "nothing was moved");
    let before = weight(&rig);
    let (rig, _) = Rig::open(&disk).unwrap();
    assert_eq!(weight(&rig), before);
}

#[test]
fn ids_are_never_given_again_even_when_nothing_is_left() {
    let disk = Disk::new();
    let mut last = 0;
    for round in 0..5 {
        let (mut rig, found) = Rig::open(&disk).unwrap();
        assert!(found.is_empty());
        for n in 0..30 {
            let id = rig.append(put(body(n, 300))).unwrap().first;
            assert_eq!(id, last + 1, "round {round}");
            last = id;
            rig.append(remove([id])).unwrap();
            rig.work().unwrap();
        }
        if round % 2 == 0 {
            rig.close();
        }
    }
    assert!(disk.names().len() <= 2, "{:?}", disk.names());
}

#[test]
fn a_body_larger_than_a_segment_gets_one_of_its_own() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    let bodies = [body(1, 10), body(2, 300_000), body(3, 10)];
    for body in &bodies {
        rig.append(put(body.clone())).unwrap();
    }
    rig.work().unwrap();
    let expected: Vec<_> = bodies.iter().cloned().map(Some).collect();
    assert_eq!(rig.read(&[1, 2, 3]).unwrap(), expected);
    assert_eq!(rig.read(&[3, 2, 1, 4]).unwrap()[1], expected[1]);
    rig.close();
    let (_, found) = Rig::open(&disk).unwrap();
    assert!(found.into_values().eq(bodies));
}

#[test]
fn a_batch_that_can_never_fit_is_too_large() {
    let (rig, _) = Rig::open(&Disk::new()).unwrap();
    let refused = rig.append(put(body(0, 2 << 20)));
    assert!(
        matches!(refused, Err(JournalError::TooLarge { .. })),
        "{refused:?}"
    );
}

#[test]
fn what_waits_for_the_writer_is_bounded() {
    let options = JournalOptions {
        max_queued_bytes: 10_000,
        ..small()
    };
    let (mut rig, _) = Rig::open_with(&Disk::new(), options).unwrap();
    rig.append(put(body(0, 50_000))).unwrap();
    assert!(matches!(rig.append(put("x")), Err(JournalError::Full)));
    rig.append(remove([1])).unwrap();
    assert_eq!(rig.read(&[1]).unwrap(), [None]);
    rig.work().unwrap();
    rig.append(put("x")).unwrap();
}

#[test]
fn removing_what_is_not_there_is_ignored_and_still_has_a_number() {
    let (mut rig, _) = Rig::open(&Disk::new()).unwrap();
    let appended = rig.append(remove([7, 7, 0])).unwrap();
    assert_eq!(appended, Appended { first: 1, lsn: 1 });
    rig.append(Batch::new()).unwrap();
    rig.work().unwrap();
    assert_eq!(rig.synced(), 2);
    assert_eq!(rig.shared.lock().index.bytes(), 0);
}

#[test]
fn ten_million_live_entries_cost_few_words() {
    let mut index = Index::default();
    let (entries, per_segment) = (1_000_000u64, 100_000);
    for id in 0..entries {
        let seq = 1 + id / per_segment;
        if id % per_segment == 0 {
            index.begin_segment(seq, id, 32);
        }
        index.insert(id, seq, (id % per_segment) * 100, 100);
    }
    assert_eq!(index.live(), entries);
    // A node of the tree holds at most 11 words of 32 bytes and is at least
    // half full: 64 bytes a word, for 64 entries, and some for the nodes.
    let bytes = index.words() as u64 * 80 * 10;
    eprintln!("at most {bytes} bytes for ten million entries");
    assert!(bytes < 20 << 20, "{bytes}");
    for id in 0..entries {
        assert!(index.remove(id, 1));
    }
    assert_eq!((index.live(), index.words()), (0, 0));
}
