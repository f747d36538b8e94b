//! A simulated disk with the simulated log on it: what a process writes stands
//! in its own memory, then in the page cache, then on the medium. A process that
//! is killed leaves the page cache behind; a power cut leaves the medium and a
//! prefix of the rest, whose last record may be torn.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    error::{Error, ErrorCode, Result},
    hub::spool::store::{KeptId, SpoolStore, Synced, Written},
};

/// One process's log, in every stage of its way to the medium.
pub(super) struct Disk {
    inner: Mutex<Inner>,
    synced: watch::Sender<Synced>,
}

#[derive(Default)]
struct Inner {
    medium: Vec<Record>,
    cached: Vec<Record>,
    buffered: Vec<Record>,
    last: u64,
    next_id: KeptId,
    broken: bool,
    /// The number that a running sync will have covered.
    syncing: Option<u64>,
}

struct Record {
    number: u64,
    what: What,
    crc: u32,
}

enum What {
    /// All of it or nothing.
    Batch(Vec<(KeptId, Bytes)>, Vec<KeptId>),
    /// A dead letter, by its attempt.
    Letter(u32),
}

impl Disk {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::default(),
            synced: watch::Sender::new(Synced::default()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn append(&self, what: impl FnOnce(&mut Inner) -> What) -> Result<u64> {
        let inner = &mut *self.lock();
        if inner.broken {
            return Err(Error::new(ErrorCode::UnknownError, "the disk failed"));
        }
        let what = what(inner);
        inner.last += 1;
        let number = inner.last;
        let crc = what.crc();
        inner.buffered.push(Record { number, what, crc });
        Ok(number)
    }

    /// Keeps a dead letter.
    pub(super) fn bury(&self, attempt: u32) -> bool {
        self.append(|_| What::Letter(attempt)).is_ok()
    }

    /// Begins a sync of everything written, if there is anything and none runs.
    pub(super) fn begin_sync(&self) -> bool {
        let inner = &mut *self.lock();
        if inner.syncing.is_some() || inner.broken {
            return false;
        }
        inner.cached.append(&mut inner.buffered);
        inner.syncing = inner.cached.last().map(|r| r.number);
        inner.syncing.is_some()
    }

    /// The running sync ends.
    pub(super) fn end_sync(&self, well: bool) {
        let inner = &mut *self.lock();
        let Some(up_to) = inner.syncing.take() else {
            return;
        };
        if well {
            let n = inner.cached.partition_point(|r| r.number <= up_to);
            inner.medium.extend(inner.cached.drain(..n));
            self.synced.send_modify(|s| s.lsn = up_to);
        } else {
            inner.broken = true;
            self.synced
                .send_modify(|s| s.poisoned = Some("fsync failed".into()));
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken
    }

    /// The process is gone. Returns whether a record was torn.
    pub(super) fn die(&self, power_cut: bool, rng: &mut fastrand::Rng) -> bool {
        let inner = &mut *self.lock();
        inner.syncing = None;
        let mut torn = false;
        if power_cut {
            inner.buffered.clear();
            let keep = rng.usize(..=inner.cached.len());
            inner.cached.truncate(keep);
            if rng.bool()
                && let Some(last) = inner.cached.last_mut()
                && let What::Batch(puts, _) = &mut last.what
                && let Some((_, body)) = puts.last_mut()
            {
                *body = body.slice(..rng.usize(..body.len()));
                torn = true;
            }
        } else {
            // What its writer had not handed to the system yet dies with it.
            let keep = rng.usize(..=inner.buffered.len());
            inner.buffered.truncate(keep);
            inner.cached.append(&mut inner.buffered);
        }
        torn
    }

    /// Opens the log as the next process does: reads it up to the first record
    /// that is not whole, and cuts off the rest.
    pub(super) fn reopen(&self) -> BTreeMap<KeptId, Bytes> {
        let inner = &mut *self.lock();
        inner.broken = false;
        let whole = inner.cached.iter().take_while(|r| r.crc == r.what.crc());
        let whole = whole.count();
        inner.cached.truncate(whole);
        self.synced.send_modify(|s| s.poisoned = None);
        live(inner.medium.iter().chain(&inner.cached)).0
    }

    /// The dead letters, and whether each body that is kept has reached the
    /// medium, as the oracle sees them.
    pub(super) fn letters(&self) -> BTreeSet<u32> {
        let inner = self.lock();
        live(
            inner
                .medium
                .iter()
                .chain(&inner.cached)
                .chain(&inner.buffered),
        )
        .1
    }

    /// Whether the medium has a record of this attempt.
    pub(super) fn is_on_medium(&self, attempt: u32) -> bool {
        self.lock().medium.iter().rev().any(|r| match &r.what {
            What::Batch(puts, _) => puts
                .iter()
                .any(|(_, body)| attempt_of(body) == Some(attempt)),
            What::Letter(_) => false,
        })
    }
}

impl SpoolStore for Disk {
    fn write(&self, puts: Vec<Bytes>, removals: &[KeptId]) -> Result<Written> {
        let mut id = 0;
        let number = self.append(|inner| {
            id = inner.next_id;
            inner.next_id += puts.len() as u64;
            What::Batch((id..).zip(puts).collect(), removals.to_vec())
        })?;
        Ok(Written { id, number })
    }

    fn read(&self, ids: &[KeptId]) -> Result<Vec<Option<Bytes>>> {
        let inner = self.lock();
        let all = inner
            .medium
            .iter()
            .chain(&inner.cached)
            .chain(&inner.buffered);
        let kept = live(all).0;
        Ok(ids.iter().map(|id| kept.get(id).cloned()).collect())
    }

    fn synced(&self) -> watch::Receiver<Synced> {
        self.synced.subscribe()
    }
}

impl What {
    fn crc(&self) -> u32 {
        match self {
            Self::Batch(puts, _) => {
                let mut crc = crc32fast::Hasher::new();
                for (_, body) in puts {
                    crc.update(body);
                }
                crc.finalize()
            }
            Self::Letter(_) => 0,
        }
    }
}

/// The attempt that a kept body is of: payloads are attempts, and a body ends
/// with its payload.
pub(super) fn attempt_of(body: &Bytes) -> Option<u32> {
    let from = body.len().checked_sub(4)?;
    Some(u32::from_le_bytes(body[from..].try_into().ok()?))
}

fn live<'a>(records: impl Iterator<Item = &'a Record>) -> (BTreeMap<KeptId, Bytes>, BTreeSet<u32>) {
    let mut kept = BTreeMap::new();
    let mut letters = BTreeSet::new();
    for record in records {
        match &record.what {
            What::Batch(puts, removals) => {
                for (id, body) in puts {
                    kept.insert(*id, body.clone());
                }
                for id in removals {
                    kept.remove(id);
                }
            }
            What::Letter(attempt) => {
                letters.insert(*attempt);
            }
        }
    }
    (kept, letters)
}
