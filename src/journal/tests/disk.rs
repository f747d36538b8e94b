//! A disk that can lose power: what was not synced is lost in part, whatever
//! part; the last write is torn; a sync fails; space runs out. Everything comes
//! from a seed, so that a failure can be repeated.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use super::super::storage::{SegmentFile, Storage};

/// A disk in memory. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Disk {
    inner: Arc<Mutex<Inner>>,
    hook: Arc<Mutex<Option<Hook>>>,
}

/// Done while an operation is under way, which is how long a slow disk takes.
type Hook = Box<dyn FnMut() + Send>;

#[derive(Default)]
struct Inner {
    /// Names as the running system sees them, and as they would survive.
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    files: Vec<Contents>,
    steps: u64,
    faults: Faults,
    crashed: bool,
    syncs: u64,
    bytes_read: u64,
}

/// What shall go wrong, by the number of a changing operation (from 1).
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    /// Power fails in the middle of this operation.
    pub(super) crash_at: Option<u64>,
    /// This operation fails, and has done nothing.
    pub(super) fail_at: Option<u64>,
    /// New files find no space.
    pub(super) full: bool,
}

#[derive(Clone, Default)]
struct Contents {
    data: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
}

impl Change {
    /// Applies the change, a write up to a byte only.
    fn apply(&self, data: &mut Vec<u8>, upto: usize) {
        match self {
            Self::Resize(len) => data.resize(*len, 0),
            Self::Write(at, bytes) => {
                let bytes = &bytes[..upto.min(bytes.len())];
                if data.len() < at + bytes.len() {
                    data.resize(at + bytes.len(), 0);
                }
                data[*at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

impl Disk {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// What others do while the disk works; `None` to end it.
    pub(super) fn set_hook(&self, hook: Option<Hook>) {
        *self.hook.lock().unwrap() = hook;
    }

    /// Changing operations so far.
    pub(super) fn steps(&self) -> u64 {
        self.lock().steps
    }

    /// File syncs so far.
    pub(super) fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// Bytes that were read so far.
    pub(super) fn bytes_read(&self) -> u64 {
        self.lock().bytes_read
    }

    pub(super) fn crashed(&self) -> bool {
        self.lock().crashed
    }

    /// The disk as it is found after the power came back: names and writes that
    /// were not synced are there or not, each on its own, and a write may be
    /// there in part.
    pub(super) fn after_power_cut(&self, rng: &mut fastrand::Rng) -> Self {
        let inner = self.lock();
        let mut files = inner.files.clone();
        for file in &mut files {
            let mut data = std::mem::take(&mut file.durable);
            for change in std::mem::take(&mut file.unsynced) {
                match (rng.u8(..5), &change) {
                    (0, _) => {}
                    (1, _) => change.apply(&mut data, rng.usize(..4096)),
                    (2, Change::Write(at, bytes)) => {
                        for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                            let part = Change::Write(at + n * SECTOR, sector.to_vec());
                            if rng.bool() {
                                part.apply(&mut data, usize::MAX);
                            }
                        }
                    }
                    _ => change.apply(&mut data, usize::MAX),
                }
            }
            *file = Contents {
                durable: data.clone(),
                data,
                unsynced: Vec::new(),
            };
        }
        let mut names = inner.durable_names.clone();
        for (name, file) in &inner.names {
            if !names.contains_key(name) && rng.bool() {
                names.insert(name.clone(), *file);
            }
        }
        for name in inner.durable_names.keys() {
            if !inner.names.contains_key(name) && rng.bool() {
                names.remove(name);
            }
        }
        let disk = Self::new();
        *disk.lock() = Inner {
            durable_names: names.clone(),
            names,
            files,
            ..Inner::default()
        };
        disk
    }

    /// A copy of it as it stands, as if all was synced.
    pub(super) fn copy(&self) -> Self {
        let inner = self.lock();
        let files = inner.files.iter().map(|file| Contents {
            data: file.data.clone(),
            durable: file.data.clone(),
            unsynced: Vec::new(),
        });
        let disk = Self::new();
        *disk.lock() = Inner {
            files: files.collect(),
            names: inner.names.clone(),
            durable_names: inner.names.clone(),
            ..Inner::default()
        };
        disk
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }

    pub(super) fn read(&self, name: &str) -> Vec<u8> {
        let inner = self.lock();
        inner.files[inner.names[name]].data.clone()
    }

    /// Changes a file behind the journal's back.
    pub(super) fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut inner = self.lock();
        let file = inner.names[name];
        let file = &mut inner.files[file];
        edit(&mut file.data);
        file.durable = file.data.clone();
    }

    /// Adds a file behind the journal's back.
    pub(super) fn insert(&self, name: &str, data: Vec<u8>) {
        let mut inner = self.lock();
        let at = inner.files.len();
        inner.files.push(Contents {
            durable: data.clone(),
            data,
            unsynced: Vec::new(),
        });
        inner.names.insert(name.into(), at);
        inner.durable_names.insert(name.into(), at);
    }

    pub(super) fn remove(&self, name: &str) {
        let mut inner = self.lock();
        inner.names.remove(name);
        inner.durable_names.remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn run_hook(&self) {
        if let Some(hook) = &mut *self.hook.lock().unwrap() {
            hook();
        }
    }

    /// Counts an operation that changes something; `torn` does what is left of
    /// it when the power fails in its middle.
    fn step(&self, torn: impl FnOnce(&mut Inner)) -> io::Result<MutexGuard<'_, Inner>> {
        self.run_hook();
        let mut inner = self.lock();
        if inner.crashed {
            return Err(io::Error::other("the power is off"));
        }
        inner.steps += 1;
        if inner.faults.crash_at == Some(inner.steps) {
            torn(&mut inner);
            inner.crashed = true;
            return Err(io::Error::other("the power failed"));
        }
        if inner.faults.fail_at == Some(inner.steps) {
            return Err(io::Error::other("the disk failed"));
        }
        Ok(inner)
    }
}

impl Storage for Disk {
    fn path(&self) -> &Path {
        Path::new("disk")
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn SegmentFile>> {
        let add = |inner: &mut Inner| {
            let mut file = Contents::default();
            let grown = Change::Resize(bytes as usize);
            grown.apply(&mut file.data, 0);
            file.unsynced.push(grown);
            inner.files.push(file);
            let at = inner.files.len() - 1;
            inner.names.insert(name.into(), at);
            at
        };
        let mut inner = self.step(|inner| {
            add(inner);
        })?;
        if inner.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if inner.faults.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let at = add(&mut inner);
        Ok(Arc::new(DiskFile {
            disk: self.clone(),
            at,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        let inner = self.lock();
        let at = *inner.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(DiskFile {
            disk: self.clone(),
            at,
        }))
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        let mut inner = self.step(|inner| {
            inner.names.remove(name);
        })?;
        inner.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut inner = self.step(|_| {})?;
        inner.durable_names = inner.names.clone();
        Ok(())
    }
}

struct DiskFile {
    disk: Disk,
    at: usize,
}

impl DiskFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let torn = change.clone();
        let mut inner = self
            .disk
            .step(|inner| inner.files[self.at].unsynced.push(torn))?;
        let file = &mut inner.files[self.at];
        change.apply(&mut file.data, usize::MAX);
        file.unsynced.push(change);
        Ok(())
    }
}

impl SegmentFile for DiskFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[self.at].data.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.disk.run_hook();
        let mut inner = self.disk.lock();
        let data = &inner.files[self.at].data;
        let rest = data.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        inner.bytes_read += len as u64;
        Ok(len)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset as usize, bytes.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.disk.step(|_| {})?;
        inner.syncs += 1;
        let file = &mut inner.files[self.at];
        file.durable = file.data.clone();
        file.unsynced.clear();
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.change(Change::Resize(len as usize))
    }
}

/// What a disk writes at once.
const SECTOR: usize = 512;
