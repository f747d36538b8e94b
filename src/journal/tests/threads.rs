//! The journal as it is used: its own thread, many callers, real files.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use super::*;

#[test]
fn callers_on_many_threads_append_remove_and_read_while_segments_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let options = JournalOptions {
        segment_bytes: 16 << 10,
        max_bytes: 4 << 20,
        ..small()
    };
    let open = || Journal::open(folder.path(), options.clone()).unwrap();
    let journal = open().recover(|_, _| panic!("not empty")).unwrap();
    let checked = AtomicU64::new(0);
    let kept: Vec<Entries> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (journal, checked) = (journal.clone(), &checked);
                scope.spawn(move || worker(&journal, thread, checked))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let usage = journal.usage();
    journal.close().unwrap();
    let mut expected = Entries::new();
    kept.into_iter().for_each(|part| expected.extend(part));
    assert_eq!(usage.live_entries, expected.len() as u64);
    eprintln!(
        "{} appends, {} syncs, {} segments, {} reads checked",
        usage.appended,
        usage.syncs,
        usage.segments,
        checked.load(Ordering::Relaxed)
    );
    let mut found = Entries::new();
    open()
        .recover(|id, body| drop(found.insert(id, body)))
        .unwrap();
    assert_eq!(found, expected);
}

/// Nobody has to append again for the last batch to become durable.
#[tokio::test]
async fn what_may_wait_for_its_sync_is_synced_when_its_time_is_over() {
    let options = JournalOptions {
        sync_delay: Duration::from_secs(2),
        ..JournalOptions::default()
    };
    let journal = journal(&Disk::new(), options);
    let mut last = 0;
    for n in 0..50u64 {
        last = journal.append(put(body(n, 100))).unwrap().lsn;
    }
    journal.synced(last).await.unwrap();
    let usage = journal.usage();
    assert!(usage.syncs < 5, "{usage:?}");
    let mut urgent = put("now");
    urgent.hurry();
    let (urgent, since) = (journal.append(urgent).unwrap(), Instant::now());
    journal.synced(urgent.lsn).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(2));
    journal.append(put("more")).unwrap();
    journal.close().unwrap();
}

/// Keeps a window of entries, leaves one in ten behind, reads back at random.
fn worker(journal: &Journal, thread: u64, checked: &AtomicU64) -> Entries {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut rng = fastrand::Rng::with_seed(thread);
    let mut mine = Entries::new();
    for n in 0..1500 {
        let mut batch = Batch::new();
        let body = body(rng.u64(..), rng.usize(..600));
        batch.put(body.clone());
        let oldest = mine.keys().copied().find(|id| id % 10 != 0);
        let gone = oldest.filter(|_| mine.len() > 60);
        gone.into_iter().for_each(|id| batch.remove(id));
        let appended = journal.append(batch).unwrap();
        if let Some(id) = gone {
            mine.remove(&id);
        }
        mine.insert(appended.first, body);
        if n % 50 == 0 {
            runtime.block_on(journal.synced(appended.lsn)).unwrap();
        }
        let ids: Vec<_> = mine.keys().copied().filter(|_| rng.u8(..20) == 0).collect();
        let read = journal.read(&ids).unwrap();
        for (id, body) in ids.iter().zip(read) {
            assert_eq!(body.as_ref(), mine.get(id), "entry {id}");
            checked.fetch_add(1, Ordering::Relaxed);
        }
    }
    mine
}

#[test]
fn dropping_the_last_clone_syncs_what_is_queued_and_frees_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Journal::open(folder.path(), small());
    let journal = open().unwrap().recover(|_, _| {}).unwrap();
    let clone = journal.clone();
    drop(journal);
    assert!(matches!(open(), Err(JournalError::Locked { .. })));
    clone.append(put("kept")).unwrap();
    drop(clone);
    let mut found = Vec::new();
    let opened = open().unwrap();
    assert!(opened.report().torn.is_none());
    let journal = opened.recover(|_, body| found.push(body)).unwrap();
    assert_eq!(found, ["kept"]);
    journal.close().unwrap();
    journal.close().unwrap();
    assert!(matches!(
        journal.append(put("late")),
        Err(JournalError::Closed)
    ));
    assert!(matches!(journal.read(&[1]), Err(JournalError::Closed)));
}

#[test]
fn waiting_for_a_batch_of_a_closed_journal_ends() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let journal = journal(&Disk::new(), small());
    let appended = journal.append(put("a")).unwrap();
    journal.close().unwrap();
    runtime.block_on(journal.synced(appended.lsn)).unwrap();
    let never = runtime.block_on(journal.synced(appended.lsn + 1));
    assert!(matches!(never, Err(JournalError::Closed)));
}
