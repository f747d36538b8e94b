//! Operations of the disk that fail.

use super::{disk::Faults, *};

#[test]
fn after_a_failure_at_any_step_nobody_is_told_durable_and_all_that_was_is_there() {
    let disk = Disk::new();
    let (_, steps) = work(&disk);
    let mut poisoned = 0;
    for step in 1..=steps {
        let disk = Disk::new();
        disk.set_faults(Faults {
            fail_at: Some(step),
            ..Faults::default()
        });
        let (outcome, _) = work(&disk);
        let (model, rig) = outcome;
        let before = rig.synced();
        let syncs = disk.syncs();
        let refused = rig.append(put("more"));
        let Err(JournalError::Poisoned { cause }) = refused else {
            panic!("step {step}: {refused:?}");
        };
        assert!(cause.contains("the disk failed"), "{cause}");
        assert_eq!(
            rig.shared.durable.borrow().poisoned.as_deref(),
            Some(&*cause)
        );
        assert_eq!((rig.synced(), disk.syncs()), (before, syncs), "step {step}");
        // What was accepted stays readable, durable or not.
        let ids: Vec<_> = model.now.keys().copied().collect();
        let read = rig.read(&ids).unwrap();
        assert!(
            read.iter().eq(model
                .now
                .values()
                .map(Some)
                .map(|b| b.cloned())
                .collect::<Vec<_>>()
                .iter())
        );
        poisoned += 1;
        for seed in 0..3 {
            let disk = disk.after_power_cut(&mut fastrand::Rng::with_seed(seed));
            let (_, found) = Rig::open(&disk).unwrap_or_else(|e| panic!("step {step}: {e}"));
            model.check(&found, before, &format!("step {step}"));
        }
    }
    eprintln!("{poisoned} steps failed, each");
}

/// Work that creates, writes, syncs, deletes and moves.
fn work(disk: &Disk) -> ((Model, Rig), u64) {
    let (mut rig, _) = Rig::open(disk).unwrap();
    let mut model = Model::default();
    for n in 0..60u64 {
        let mut batch = put(body(n, 700));
        if n > 10 && n % 7 != 0 {
            batch.remove(n - 9);
        }
        if model.append(&rig, batch).is_err() || rig.work().is_err() {
            break;
        }
    }
    ((model, rig), disk.steps())
}

#[test]
fn those_who_wait_for_a_sync_are_told_the_cause_when_it_fails() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let disk = Disk::new();
    let journal = journal(&disk, small());
    let first = journal.append(put("a")).unwrap();
    runtime.block_on(journal.synced(first.lsn)).unwrap();
    disk.set_faults(Faults {
        // The write passes, its sync fails.
        fail_at: Some(disk.steps() + 2),
        ..Faults::default()
    });
    let second = journal.append(put("b")).unwrap();
    let Err(JournalError::Poisoned { cause }) = runtime.block_on(journal.synced(second.lsn)) else {
        panic!("said to be durable");
    };
    assert!(cause.contains("could not sync"), "{cause}");
    runtime.block_on(journal.synced(first.lsn)).unwrap();
    assert_eq!(journal.read(&[2]).unwrap(), [Some("b".into())]);
    assert_eq!(journal.usage().poisoned, Some(cause));
    assert!(matches!(
        journal.close(),
        Err(JournalError::Poisoned { .. })
    ));
    assert!(matches!(
        journal.append(put("c")),
        Err(JournalError::Poisoned { .. })
    ));
}

#[test]
fn a_disk_without_space_is_waited_for_and_then_gone_on_with() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let disk = Disk::new();
    let journal = journal(&disk, small());
    disk.set_faults(Faults {
        full: true,
        ..Faults::default()
    });
    let waiting = journal.append(put("a")).unwrap();
    let refused = wait_until(|| journal.append(put("b")).err());
    assert!(matches!(refused, JournalError::Full));
    // Removes are let in all the same.
    journal.append(remove([waiting.first])).unwrap();
    disk.set_faults(Faults::default());
    runtime.block_on(journal.synced(waiting.lsn)).unwrap();
    let after = journal.append(put("c")).unwrap();
    runtime.block_on(journal.synced(after.lsn)).unwrap();
    journal.close().unwrap();
}

#[test]
fn a_journal_that_waits_for_space_closes_when_told_and_says_what_it_lost() {
    let disk = Disk::new();
    let journal = journal(&disk, small());
    disk.set_faults(Faults {
        full: true,
        ..Faults::default()
    });
    journal.append(put("a")).unwrap();
    wait_until(|| journal.append(put("b")).err());
    let closed = journal.close();
    assert!(
        matches!(closed, Err(JournalError::Poisoned { .. })),
        "{closed:?}"
    );
}

fn wait_until<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "waited in vain");
        std::thread::yield_now();
    }
}
