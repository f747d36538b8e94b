//! When handlers hear of their verdicts, with a disk that syncs on demand.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::oneshot::error::TryRecvError;

use super::*;
use crate::{
    broker::OrderKey,
    hub::spool::store::Written,
    message::{Message, Timestamp, wire::Marks},
    topic::Topic,
};

struct Disk {
    synced: watch::Sender<Synced>,
    written: AtomicU64,
}

impl SpoolStore for Disk {
    fn write(&self, _puts: Vec<Bytes>, _removals: &[KeptId]) -> Result<Written> {
        let number = self.written.fetch_add(1, Relaxed) + 1;
        Ok(Written { id: number, number })
    }

    fn read(&self, ids: &[KeptId]) -> Result<Vec<Option<Bytes>>> {
        Ok(vec![None; ids.len()])
    }

    fn synced(&self) -> watch::Receiver<Synced> {
        self.synced.subscribe()
    }
}

const PATIENCE: Duration = Duration::from_secs(5);

fn keeper(disk: Option<&Arc<Disk>>) -> Keeper<u8> {
    let name = LaneName {
        topic: Topic::new("events.t").unwrap(),
        lane: 0,
        mandatory: true,
        compression: None,
        address: None,
    };
    let store = disk.map(|d| d.clone() as Arc<dyn SpoolStore>);
    Keeper::new(name, store, PATIENCE)
}

fn disk() -> Arc<Disk> {
    Arc::new(Disk {
        synced: watch::channel(Synced::default()).0,
        written: AtomicU64::new(0),
    })
}

fn entry(settled: &[&str]) -> Entry {
    Entry {
        message: Arc::new(Message::new("t", "x")),
        order: OrderKey::Publisher(0),
        marks: Marks {
            settled: settled.iter().map(|g| (*g).to_owned()).collect(),
            ..Marks::default()
        },
        confirm: true,
        since: Timestamp::now(),
        size: 1,
        due: None,
    }
}

#[test]
fn a_handler_is_told_when_its_mark_is_on_the_disk_and_not_before() {
    let disk = disk();
    let mut keeper = keeper(Some(&disk));
    let now = Instant::now();
    assert!(keeper.store(1, &entry(&[]), 0).is_none());
    keeper.flush(now);
    keeper.rewrite(1, &entry(&["a"]));
    keeper.flush(now);
    let (done, mut told) = oneshot::channel();
    keeper.tell_handler(now, done);
    let reach = |lsn| {
        disk.synced.send_replace(Synced {
            lsn,
            ..Synced::default()
        })
    };
    reach(1);
    assert_eq!(keeper.synced().answers.len(), 1, "the publisher");
    assert_eq!(told.try_recv().unwrap_err(), TryRecvError::Empty);
    assert!(!keeper.is_quiet());
    reach(2);
    keeper.synced();
    assert!(told.try_recv().unwrap().is_ok());
    assert!(keeper.is_quiet());
    // What is there already is not waited for.
    let (done, mut told) = oneshot::channel();
    keeper.tell_handler(now, done);
    assert!(told.try_recv().unwrap().is_ok());
}

#[test]
fn a_handler_waits_no_longer_for_a_disk_than_a_publisher() {
    let disk = disk();
    let mut keeper = keeper(Some(&disk));
    let now = Instant::now();
    keeper.store(1, &entry(&["a"]), 0);
    keeper.flush(now);
    let (done, mut told) = oneshot::channel();
    keeper.tell_handler(now, done);
    assert_eq!(keeper.next_deadline(), Some(now + PATIENCE));
    keeper.give_up(now + PATIENCE / 2);
    assert!(told.try_recv().is_err());
    keeper.give_up(now + PATIENCE);
    assert!(told.try_recv().unwrap().is_ok());
}

#[test]
fn without_a_disk_a_handler_is_told_at_once() {
    let mut keeper = keeper(None);
    let (done, mut told) = oneshot::channel();
    keeper.tell_handler(Instant::now(), done);
    assert!(told.try_recv().unwrap().is_ok());
}
