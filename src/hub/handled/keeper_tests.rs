//! The log on real files, with its task.

use std::time::Duration;

use super::*;
use crate::hub::{
    dedup::{Handled, Offer},
    handled::Notes,
};

const LIMITS: Limits = Limits {
    ids: 5000,
    age: 24 * 3600,
    groups: 10,
};

fn open(dir: &Path) -> Result<Opened<()>> {
    let age = Duration::from_secs(LIMITS.age);
    Log::open(dir, LIMITS, |hasher| {
        DedupWindow::new(LIMITS.ids, age, hasher)
    })
}

struct Running {
    notes: mpsc::Sender<Note>,
    tally: Arc<Tally>,
    hasher: IdHasher,
    journal: Journal,
    closing: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(log: Log) -> Self {
        let (notes, queue) = mpsc::channel(QUEUE);
        let (hasher, journal) = (log.hasher(), log.journal());
        let (tally, closing) = (Arc::<Tally>::default(), CancellationToken::new());
        let keeper = Keeper {
            log,
            notes: queue,
            tally: tally.clone(),
        };
        let task = tokio::spawn(keeper.run(closing.clone()));
        Self {
            notes,
            tally,
            hasher,
            journal,
            closing,
            task,
        }
    }

    /// A group that goes through its window, as groups do.
    fn handle(&self, group: &str, ids: std::ops::Range<u32>) {
        let notes = Notes::new(group.into(), self.notes.clone(), self.tally.clone());
        let mut window = DedupWindow::<()>::new(usize::MAX, Duration::MAX, self.hasher);
        for id in ids {
            let now = Timestamp::now();
            let Offer::New(lease) = window.offer(now, ("t", &id.to_string()), 0) else {
                panic!("{id} is not new");
            };
            notes.handled(window.commit(now, lease).handled.unwrap());
        }
    }

    async fn forget(&self, group: &str) -> Result<u64> {
        let (written, answer) = oneshot::channel();
        let group = group.into();
        let note = Note::Forget { group, written };
        self.notes.send(note).await.unwrap();
        answer.await.unwrap()
    }

    async fn close(self) {
        self.closing.cancel();
        self.task.await.unwrap();
    }
}

fn knows(opened: &mut Opened<()>, group: &str, id: u32) -> bool {
    let window = opened.windows.iter_mut().find(|(name, _)| &**name == group);
    window.is_some_and(|(_, w)| {
        let offer = w.offer(Timestamp::now(), ("t", &id.to_string()), 0);
        matches!(offer, Offer::Committed)
    })
}

#[tokio::test]
async fn what_was_noted_is_known_after_a_close_and_again_after_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let mut next = 0;
    for generation in 1..=3_u32 {
        let mut opened = open(folder.path()).unwrap();
        assert_eq!(opened.log.ids(), next as usize);
        for id in 0..next {
            assert!(knows(&mut opened, "queue:", id), "{id}, {generation}");
        }
        assert!(!knows(&mut opened, "queue:", next));
        assert!(!knows(&mut opened, "group:g", 0));
        let running = Running::start(opened.log);
        running.handle("queue:", next..next + 700);
        next += 700;
        running.close().await;
    }
}

/// A kill leaves the files as they are at some moment.
#[tokio::test]
async fn what_is_answered_as_forgotten_stays_forgotten_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(open(folder.path()).unwrap().log);
    running.handle("group:g", 0..3000);
    running.handle("queue:", 0..100);
    let number = running.forget("group:g").await.unwrap();
    running.journal.synced(number).await.unwrap();
    let killed = tempfile::tempdir().unwrap();
    let to = killed.path().join(FOLDER);
    std::fs::create_dir(&to).unwrap();
    for file in std::fs::read_dir(folder.path().join(FOLDER)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    let mut found = open(killed.path()).unwrap();
    assert!(!knows(&mut found, "group:g", 0));
    assert!(knows(&mut found, "queue:", 0));
    running.close().await;
}

#[tokio::test]
async fn where_the_disk_fails_ids_are_counted_and_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(open(folder.path()).unwrap().log);
    // As after a failure: it takes nothing more.
    running.journal.close().unwrap();
    running.handle("queue:", 0..10);
    assert!(running.forget("queue:").await.is_err());
    assert_eq!(running.tally.unkept(), 10);
    let why = running.tally.failing().unwrap();
    assert!(why.contains("closed"), "{why}");
    running.close().await;
}

#[tokio::test]
async fn a_full_queue_is_not_waited_for() {
    let (queue, _held) = mpsc::channel(1);
    let tally = Arc::<Tally>::default();
    let notes = Notes::new("queue:".into(), queue, tally.clone());
    let window = &mut DedupWindow::<()>::default();
    let mut handled = || -> Handled {
        let id = fastrand::u64(..).to_string();
        match window.offer(Timestamp::now(), ("t", &id), 0) {
            Offer::New(lease) => window.commit(Timestamp::now(), lease).handled.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    for _ in 0..5 {
        notes.handled(handled());
    }
    assert_eq!(tally.unkept(), 4);
}

#[tokio::test]
async fn a_damaged_log_is_refused_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(open(folder.path()).unwrap().log);
    running.handle("queue:", 0..100);
    running.close().await;
    let file = std::fs::read_dir(folder.path().join(FOLDER))
        .unwrap()
        .map(|file| file.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "seg"))
        .unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&file, bytes).unwrap();
    let said = open(folder.path()).unwrap_err().to_string();
    assert!(said.contains("handled messages"), "{said}");
    assert!(said.contains("damaged at byte"), "{said}");
}
