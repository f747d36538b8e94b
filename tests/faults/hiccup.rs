//! How late this machine is by itself, in the same run: a thread and a timer
//! that want to wake every few milliseconds, and a file that wants its bytes
//! on the disk. What a publish waited is judged beside it.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

pub struct Hiccups {
    stop: Arc<AtomicBool>,
    late: Arc<Mutex<Vec<(Instant, Duration)>>>,
    syncs: Arc<Mutex<Vec<(Instant, Duration)>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Hiccups {
    /// Syncs a file in `folder`, which is on the disk that the hub writes to.
    pub fn start(folder: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let late: Arc<Mutex<Vec<(Instant, Duration)>>> = Arc::default();
        let syncs: Arc<Mutex<Vec<(Instant, Duration)>>> = Arc::default();
        let timer = tokio::spawn(timers(stop.clone(), late.clone()));
        let thread = tokio::task::spawn_blocking({
            let (stop, late) = (stop.clone(), late.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    std::thread::park_timeout(EVERY);
                    note(&late, asked, asked.elapsed().saturating_sub(EVERY));
                }
            }
        });
        let syncing = tokio::task::spawn_blocking({
            let (stop, syncs) = (stop.clone(), syncs.clone());
            let path = folder.join("sync-meter");
            move || {
                let mut file = std::fs::File::create(path).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    file.write_all(&[0; 4096]).unwrap();
                    file.sync_data().unwrap();
                    syncs.lock().unwrap().push((asked, asked.elapsed()));
                    std::thread::park_timeout(SYNC_EVERY);
                }
            }
        });
        Self {
            stop,
            late,
            syncs,
            tasks: vec![timer, thread, syncing],
        }
    }

    /// The latest wake-up and the slowest sync within a time.
    pub fn worst(&self, from: Instant, to: Instant) -> (Duration, Duration) {
        let worst = |all: &Mutex<Vec<(Instant, Duration)>>| {
            let all = all.lock().unwrap();
            let within = all
                .iter()
                .filter(|(at, took)| *at + *took >= from && *at <= to);
            within.map(|(_, took)| *took).max().unwrap_or_default()
        };
        (worst(&self.late), worst(&self.syncs))
    }

    pub async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            task.await.expect("a meter does not panic");
        }
    }
}

impl Drop for Hiccups {
    /// A run that failed would wait for its meters for ever.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn timers(stop: Arc<AtomicBool>, late: Arc<Mutex<Vec<(Instant, Duration)>>>) {
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        tokio::time::sleep(EVERY).await;
        note(&late, asked, asked.elapsed().saturating_sub(EVERY));
    }
}

/// Only what is worth remembering.
fn note(late: &Mutex<Vec<(Instant, Duration)>>, asked: Instant, by: Duration) {
    if by > Duration::from_millis(2) {
        late.lock().unwrap().push((asked, by));
    }
}

const EVERY: Duration = Duration::from_millis(5);
const SYNC_EVERY: Duration = Duration::from_millis(50);
