//! What compaction gathers, before any of it is written.

use super::*;
use crate::journal::{
    compact::{Candidates, Compactor},
    format::{FrameWriter, MOVED_HEADER},
};

/// A journal of several full segments, and the entries of its oldest.
fn full(disk: &Disk, options: JournalOptions, len: usize) -> (Rig, Vec<EntryId>) {
    let (mut rig, _) = Rig::open_with(disk, options).unwrap();
    let mut n = 0;
    while rig.shared.lock().index.segments().len() < 6 {
        n += 1;
        rig.append(put(body(n, len))).unwrap();
        rig.turn().unwrap();
    }
    let oldest = {
        let state = rig.shared.lock();
        let seq = state.index.oldest().unwrap().seq;
        (1..=n)
            .filter(|id| state.index.lives_in(*id, seq))
            .collect()
    };
    (rig, oldest)
}

fn gather(rig: &Rig, walk: &mut Option<Compactor>) -> Result<Candidates, JournalError> {
    Compactor::gather(walk, &rig.shared)
}

fn ids(found: &Candidates) -> Vec<EntryId> {
    found.entries().iter().map(|(id, _)| *id).collect()
}

#[test]
fn what_lives_is_gathered_whole_and_counted_as_it_is_written() {
    let disk = Disk::new();
    let (rig, oldest) = full(&disk, small(), 600);
    let (kept, gone) = oldest.split_at(1);
    assert!(
        gather(&rig, &mut None).unwrap().is_empty(),
        "not worth it yet"
    );
    rig.append(remove(gone.iter().copied())).unwrap();
    let found = gather(&rig, &mut None).unwrap();
    assert_eq!(found.entries(), [(kept[0], body(kept[0], 600))]);
    let mut out = Vec::new();
    let mut writer = FrameWriter::new(&mut out, 1);
    for (id, body) in found.entries() {
        writer.moved(*id, body);
    }
    writer.finish(1, 32, 32);
    assert_eq!(found.encoded_len(), out.len() as u64);
}

#[test]
fn what_was_removed_since_it_was_read_is_not_moved() {
    let disk = Disk::new();
    let (rig, oldest) = full(&disk, small(), 300);
    let (kept, gone) = oldest.split_at(2);
    rig.append(remove(gone.iter().copied())).unwrap();
    let mut found = gather(&rig, &mut None).unwrap();
    assert_eq!(ids(&found), kept);
    rig.append(remove([kept[0]])).unwrap();
    found.retain_live(&rig.shared.lock().index);
    assert_eq!(ids(&found), kept[1..]);
}

#[test]
fn a_large_segment_is_gathered_in_pieces_each_entry_once() {
    let disk = Disk::new();
    let options = JournalOptions {
        segment_bytes: 8 << 20,
        max_bytes: 256 << 20,
        max_queued_bytes: 64 << 20,
        ..JournalOptions::default()
    };
    let len = 100 << 10;
    let (rig, oldest) = full(&disk, options, len);
    let (kept, gone) = oldest.split_at(15);
    rig.append(remove(gone.iter().copied())).unwrap();
    let mut walk = None;
    let first = gather(&rig, &mut walk).unwrap();
    // As soon as it is a mebibyte.
    let piece = (1_usize << 20).div_ceil(len + MOVED_HEADER);
    assert_eq!(ids(&first), kept[..piece]);
    let second = gather(&rig, &mut walk).unwrap();
    assert_eq!(ids(&second), kept[piece..]);
    // They were not written, and the walk is at the end: that is not looked for
    // again and again.
    let lost = gather(&rig, &mut walk).unwrap_err();
    assert!(
        lost.to_string().contains("15 live entries were not found"),
        "{lost}"
    );
}

#[test]
fn nothing_is_moved_that_changed_since_it_was_written() {
    let disk = Disk::new();
    let (rig, oldest) = full(&disk, small(), 600);
    rig.append(remove(oldest[1..].iter().copied())).unwrap();
    let name = disk.names()[0].clone();
    let body = body(oldest[0], 600);
    let whole = disk.read(&name);
    let at = whole.windows(600).position(|w| w == body).unwrap();
    for (at, why) in [(at + 300, "its body"), (35, "its frame's length")] {
        disk.edit(&name, |data| data[at] ^= 0x40);
        let refused = gather(&rig, &mut None).map(|found| ids(&found));
        let error = refused.expect_err(why).to_string();
        assert!(error.contains("changed since it was written"), "{error}");
        disk.edit(&name, |data| data.copy_from_slice(&whole));
    }
    assert_eq!(ids(&gather(&rig, &mut None).unwrap()), oldest[..1]);
}
