//! Logs that are cut short, and logs with a wrong byte.

use super::*;
use crate::journal::segment;

#[test]
fn every_cut_point_yields_a_prefix_with_all_that_was_synced() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    let mut model = Model::default();
    let mut ends = vec![32];
    for n in 0..12u64 {
        let mut batch = put(body(n, n as usize * 7));
        batch.put(body(n, 3));
        batch.remove(n);
        model.append(&rig, batch).unwrap();
        rig.work().unwrap();
        ends.push(rig.shared.lock().index.bytes() as usize);
    }
    let name = &disk.names()[0];
    let whole = disk.read(name).len();
    let end = *ends.last().unwrap();
    for cut in 0..=end {
        let batches = ends
            .iter()
            .filter(|&&end| end <= cut)
            .count()
            .saturating_sub(1);
        for zeroed in [false, true] {
            let disk = disk.copy();
            disk.edit(name, |data| {
                data.truncate(cut);
                data.resize(if zeroed { whole } else { cut }, 0);
            });
            let (rig, found) = Rig::open(&disk).unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
            let kept = model.prefix(&found, 0).unwrap();
            // A zero byte that was cut off is there again in the zeroed tail.
            assert!(kept >= batches, "cut at {cut}: {kept} of {batches} batches");
            assert!(zeroed || kept == batches, "cut at {cut}");
            let torn = rig.report.torn.is_some() || rig.report.unfinished.is_some();
            assert!(
                zeroed || torn || cut < 32 || ends.contains(&cut),
                "cut at {cut}"
            );
        }
    }
    eprintln!("{} cut points, with and without a tail of zeros", end + 1);
}

#[test]
fn appending_goes_on_behind_a_torn_tail_and_ids_follow_what_was_kept() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    let ends = [0, 1, 2].map(|n| {
        rig.append(put(body(n, 50))).unwrap();
        rig.work().unwrap();
        rig.shared.lock().index.bytes()
    });
    let end = ends[2] as usize;
    disk.edit(&disk.names()[0], |data| data.truncate(end - 1));
    let (mut rig, found) = Rig::open(&disk).unwrap();
    let torn = rig.report.torn.as_ref().unwrap();
    assert_eq!((torn.offset, torn.bytes), (ends[1], ends[2] - 1 - ends[1]));
    assert_eq!(found.len(), 2);
    assert_eq!(rig.append(put("x")).unwrap().first, 3);
    rig.work().unwrap();
    rig.close();
    let (rig, found) = Rig::open(&disk).unwrap();
    assert!(rig.report.torn.is_none());
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn a_flipped_bit_anywhere_in_a_closed_log_is_noticed() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for n in 0..14 {
        rig.append(put(body(n, 600))).unwrap();
        rig.work().unwrap();
    }
    rig.append(remove([3, 5])).unwrap();
    rig.close();
    let names = disk.names();
    assert_eq!(names.len(), 3);
    let (_, whole) = Rig::open(&disk.copy()).unwrap();
    let (mut refused, mut cut_off) = (0, 0);
    let mut rng = fastrand::Rng::with_seed(1);
    for name in &names {
        for at in 0..disk.read(name).len() {
            let disk = disk.copy();
            disk.edit(name, |data| data[at] ^= 1 << rng.u8(..8));
            match Rig::open(&disk) {
                Err(JournalError::Corrupt { .. } | JournalError::Version { .. }) => refused += 1,
                Err(other) => panic!("byte {at} of {name}: {other}"),
                Ok((rig, found)) => {
                    // Only the mark itself, behind which nothing is known.
                    assert!(rig.report.torn.is_some(), "byte {at} of {name}");
                    assert!(found == whole, "byte {at} of {name}");
                    cut_off += 1;
                }
            }
        }
    }
    eprintln!("{refused} flips refused, {cut_off} reported as a torn mark");
    assert_eq!(cut_off, 33);
}

#[test]
fn a_flipped_bit_in_what_was_durable_is_no_torn_tail_even_after_a_crash() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for n in 0..4 {
        rig.append(put(body(n, 60))).unwrap();
        rig.work().unwrap();
    }
    let name = &disk.names()[0];
    let frame = 32 + 32 + 9 + 60;
    // Not closed: no mark. The last frame knows that those before it were
    // durable, and only its own damage looks like a torn tail.
    disk.edit(name, |data| data[frame + 40] ^= 1);
    match Rig::open(&disk) {
        Err(JournalError::Corrupt { offset, why, .. }) => {
            assert_eq!(offset, frame as u64, "{why}");
            assert!(why.contains("durable"), "{why}");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
    assert_eq!(disk.names().len(), 1, "nothing was deleted");
}

#[test]
fn a_frame_behind_a_torn_one_of_the_same_sync_is_torn_with_it() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    rig.append(put(body(0, 60))).unwrap();
    rig.work().unwrap();
    // Three frames in one write and one sync.
    for n in 1..4 {
        rig.append(put(body(n, 60))).unwrap();
    }
    rig.work().unwrap();
    let second = 32 + (32 + 9 + 60);
    disk.edit(&disk.names()[0], |data| data[second + 40] ^= 1);
    let (rig, found) = Rig::open(&disk).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(rig.report.torn.as_ref().unwrap().offset, second as u64);
}

#[test]
fn a_body_that_looks_like_a_frame_is_not_taken_for_one() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for _ in 0..2 {
        rig.append(put("inner")).unwrap();
        rig.work().unwrap();
    }
    let name = &disk.names()[0];
    let inner = disk.read(name)[32..32 + 2 * (32 + 9 + 5)].to_vec();
    rig.append(put(inner)).unwrap();
    rig.work().unwrap();
    let last = 32 + 2 * (32 + 9 + 5);
    disk.edit(name, |data| data[last + 33] ^= 1);
    let (rig, found) = Rig::open(&disk).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(rig.report.torn.as_ref().unwrap().offset, last as u64);
}

#[test]
fn a_segment_under_the_name_of_another_is_damage() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for n in 0..14 {
        rig.append(put(body(n, 600))).unwrap();
        rig.work().unwrap();
    }
    let names = disk.names();
    let first = disk.read(&names[0]);
    disk.edit(&names[1], |data| *data = first);
    let Err(error) = Rig::open(&disk) else {
        panic!("opened");
    };
    assert!(
        error.to_string().contains("belongs to segment 1"),
        "{error}"
    );
}

/// Its making was cut short; but what if it knew the next id?
#[test]
fn a_last_segment_without_a_header_goes_if_the_next_id_is_known_without_it() {
    let zeros = || vec![0; 4096];
    let only = |seq| {
        let disk = Disk::new();
        disk.insert(&segment::name(seq), zeros());
        disk
    };
    let (rig, found) = Rig::open(&only(1)).unwrap();
    assert!(rig.report.unfinished.is_some() && found.is_empty());
    let Err(error) = Rig::open(&only(2)) else {
        panic!("opened");
    };
    assert!(matches!(error, JournalError::Corrupt { .. }), "{error}");
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    rig.append(put("a")).unwrap();
    rig.work().unwrap();
    rig.close();
    disk.insert(&segment::name(2), zeros());
    let (mut rig, found) = Rig::open(&disk).unwrap();
    assert!(rig.report.unfinished.is_some());
    assert_eq!(found.len(), 1);
    assert_eq!(rig.append(put("b")).unwrap().first, 2);
    rig.work().unwrap();
}

#[test]
fn a_missing_segment_is_damage() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for n in 0..20 {
        rig.append(put(body(n, 600))).unwrap();
        rig.work().unwrap();
    }
    rig.close();
    disk.remove(&disk.names()[1]);
    let Err(JournalError::Corrupt { why, file, .. }) = Rig::open(&disk) else {
        panic!("opened");
    };
    assert!(why.contains("missing"), "{why}");
    assert!(file.ends_with("00000000000000000002.seg"));
}

#[test]
fn a_body_damaged_while_the_journal_is_open_is_not_given_out() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    rig.append(put(body(0, 60))).unwrap();
    rig.append(put(body(1, 60))).unwrap();
    rig.work().unwrap();
    disk.edit(&disk.names()[0], |data| data[32 + 32 + 9 + 3] ^= 1);
    assert!(matches!(rig.read(&[1]), Err(JournalError::Corrupt { .. })));
    assert_eq!(rig.read(&[2]).unwrap(), [Some(body(1, 60))]);
}
