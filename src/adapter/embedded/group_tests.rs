//! The group against its promises.

use proptest::prelude::*;

use super::*;

fn member(streams: &[StreamId]) -> Member {
    Member {
        streams: streams.iter().copied().collect(),
        ..Member::default()
    }
}

fn owners(group: &Group, count: i32) -> Vec<Option<MemberId>> {
    (0..count)
        .map(|p| group.cursor((1, p)).and_then(Cursor::owner))
        .collect()
}

#[test]
fn members_share_the_partitions_and_few_change_hands() {
    let streams = BTreeMap::from([(1, 6)]);
    let mut group = Group::default();
    group.join(10, member(&[1]));
    group.rebalance(&streams);
    assert_eq!(owners(&group, 6), [Some(10); 6]);
    group.join(11, member(&[1]));
    group.rebalance(&streams);
    let after = owners(&group, 6);
    assert_eq!(after.iter().filter(|o| **o == Some(10)).count(), 3);
    group.join(12, member(&[1]));
    group.rebalance(&streams);
    let last = owners(&group, 6);
    let moved = after.iter().zip(&last).filter(|(a, b)| a != b).count();
    assert_eq!(moved, 2);
}

#[test]
fn a_partition_changes_hands_only_when_nothing_of_it_is_in_hand() {
    let streams = BTreeMap::from([(1, 1)]);
    let mut group = Group::default();
    group.join(10, member(&[1]));
    group.rebalance(&streams);
    let cursor = group.cursor_mut((1, 0)).unwrap();
    assert_eq!(cursor.take(5), Some((0, false)));
    group.leave(10);
    group.join(11, member(&[1]));
    group.rebalance(&streams);
    assert_eq!(owners(&group, 1), [Some(10)]);
    assert_eq!(group.owned_by(10).count(), 0);
    assert!(group.cursor_mut((1, 0)).unwrap().give_back(0, 0));
    assert_eq!(owners(&group, 1), [Some(11)]);
    let cursor = group.cursor_mut((1, 0)).unwrap();
    assert_eq!(cursor.take(5), Some((0, true)));
}

#[test]
fn verdicts_from_before_a_seek_are_void() {
    let mut cursor = Cursor::default();
    cursor.start(0);
    cursor.take(5);
    cursor.seek(3);
    assert!(!cursor.finish(0, 0));
    assert_eq!(cursor.committed(), Some(3));
    assert_eq!(cursor.take(5), Some((3, false)));
    assert!(cursor.finish(3, 1));
    assert_eq!(cursor.committed(), Some(4));
}

#[derive(Clone, Debug)]
enum Step {
    Append(i32),
    Join(MemberId),
    Leave(MemberId),
    Take(MemberId),
    Finish(usize),
    GiveBack(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3i32).prop_map(Step::Append),
        1 => (0..4u64).prop_map(Step::Join),
        1 => (0..4u64).prop_map(Step::Leave),
        6 => (0..4u64).prop_map(Step::Take),
        4 => any::<usize>().prop_map(Step::Finish),
        2 => any::<usize>().prop_map(Step::GiveBack),
    ]
}

proptest! {
    /// Every offset is in one live hand at most, is finished once, and the
    /// committed position never passes one that is not finished.
    #[test]
    fn offsets_go_to_one_member_and_the_watermark_passes_nothing_unfinished(
        steps in proptest::collection::vec(step(), 1..200)
    ) {
        let streams = BTreeMap::from([(1, 3)]);
        let mut group = Group::default();
        let mut high = [0i64; 3];
        let mut hands: Vec<(MemberId, i32, i64)> = Vec::new();
        let mut finished: BTreeSet<(i32, i64)> = BTreeSet::new();
        for step in steps {
            match step {
                Step::Append(p) => high[p as usize] += 1,
                Step::Join(m) => {
                    // One that left and still holds something is not the
                    // same member as one that joins.
                    if hands.iter().any(|(h, ..)| *h == m) { continue; }
                    group.join(m, member(&[1]));
                    group.rebalance(&streams);
                }
                Step::Leave(m) => {
                    group.leave(m);
                    group.rebalance(&streams);
                }
                Step::Take(m) => {
                    let owned: Vec<_> = group.owned_by(m).collect();
                    for key in owned {
                        let p = key.1;
                        let cursor = group.cursor_mut(key).unwrap();
                        if let Some((offset, _)) = cursor.take(high[p as usize]) {
                            prop_assert!(!hands.iter().any(|(_, hp, ho)| (*hp, *ho) == (p, offset)));
                            prop_assert!(!finished.contains(&(p, offset)));
                            prop_assert!(hands.iter().all(|(h, hp, _)| *hp != p || *h == m));
                            hands.push((m, p, offset));
                        }
                    }
                }
                Step::Finish(n) if !hands.is_empty() => {
                    let (_, p, offset) = hands.swap_remove(n % hands.len());
                    prop_assert!(group.cursor_mut((1, p)).unwrap().finish(offset, 0));
                    finished.insert((p, offset));
                }
                Step::GiveBack(n) if !hands.is_empty() => {
                    let (_, p, offset) = hands.swap_remove(n % hands.len());
                    prop_assert!(group.cursor_mut((1, p)).unwrap().give_back(offset, 0));
                }
                Step::Finish(_) | Step::GiveBack(_) => {}
            }
            for p in 0..3 {
                if let Some(committed) = group.cursor((1, p)).and_then(Cursor::committed) {
                    for offset in 0..committed {
                        prop_assert!(finished.contains(&(p, offset)));
                    }
                }
            }
        }
        // Whoever is left finishes everything.
        for (_, p, offset) in hands {
            group.cursor_mut((1, p)).unwrap().give_back(offset, 0);
        }
        group.join(99, member(&[1]));
        for m in 0..4 { group.leave(m); }
        group.rebalance(&streams);
        for p in 0..3 {
            let cursor = group.cursor_mut((1, p)).unwrap();
            while let Some((offset, _)) = cursor.take(high[p as usize]) {
                prop_assert!(cursor.finish(offset, 0));
                prop_assert!(finished.insert((p, offset)));
            }
            prop_assert_eq!(cursor.next(), high[p as usize]);
            prop_assert_eq!(finished.iter().filter(|(fp, _)| *fp == p).count() as i64, high[p as usize]);
        }
    }
}
