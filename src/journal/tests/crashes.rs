//! The power fails at each step of a fixed course of work.

use super::{disk::Faults, *};

#[test]
fn a_power_cut_at_any_step_of_deleting_and_compacting_loses_nothing() {
    cut_everywhere(&small());
}

/// What was not synced may be gone, but only from the end, and what was deleted
/// or moved meanwhile takes nothing with it.
#[test]
fn a_power_cut_where_syncs_are_late_takes_only_the_newest() {
    cut_everywhere(&late());
}

fn cut_everywhere(options: &JournalOptions) {
    let disk = Disk::new();
    let (model, synced) = course(&disk, options);
    if options.sync_delay.is_zero() {
        assert_eq!(synced, model.batches.len() as Lsn);
    }
    let steps = disk.steps();
    assert!(steps > 100, "{steps} steps are too few to mean anything");
    for step in 1..=steps {
        let disk = Disk::new();
        disk.set_faults(Faults {
            crash_at: Some(step),
            ..Faults::default()
        });
        let (model, synced) = course(&disk, options);
        assert!(disk.crashed());
        for seed in 0..6 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let disk = disk.after_power_cut(&mut rng);
            let context = format!("step {step}, seed {seed}");
            let (_, found) = Rig::open(&disk).unwrap_or_else(|e| panic!("{context}: {e}"));
            model.check(&found, synced, &context);
        }
    }
    eprintln!("{steps} steps, 6 seeds each");
}

/// Fills segments, removes most of each, so that the oldest are deleted and the
/// stragglers of others moved, more than once.
fn course(disk: &Disk, options: &JournalOptions) -> (Model, Lsn) {
    let mut model = Model::default();
    let Ok((mut rig, _)) = Rig::open_with(disk, options.clone()) else {
        return (model, 0);
    };
    let mut moved = 0;
    for n in 0..120u64 {
        let mut batch = put(body(n, 500));
        batch.put(body(n + 1000, 20));
        for id in (n * 2).saturating_sub(12)..(n * 2).saturating_sub(10) {
            if id % 10 != 1 {
                batch.remove(id);
            }
        }
        if n % 40 == 39 {
            // Stragglers, those that were moved among them, go at last.
            model
                .now
                .keys()
                .filter(|&&id| id + 60 < n * 2)
                .for_each(|&id| batch.remove(id));
        }
        if model.append(&rig, batch).is_err() || rig.work().is_err() {
            break;
        }
        let state = rig.shared.lock();
        moved += usize::from(
            model
                .now
                .keys()
                .any(|&id| state.index.locate(id).is_some_and(|place| !place.home)),
        );
    }
    assert!(disk.crashed() || moved > 10, "nothing was moved");
    assert!(
        disk.crashed() || !disk.names()[0].ends_with("01.seg"),
        "nothing was deleted"
    );
    let synced = rig.synced();
    (model, synced)
}
