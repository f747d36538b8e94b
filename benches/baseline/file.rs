//! A bare file: records appended to what was allocated and written before, and
//! synced before they count. The best that a disk gives to whoever waits for it.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::Path,
    time::Instant,
};

use crate::cli::{
    Failure,
    bench::{load::Load, published::Published},
};

/// A file that was written to its end once.
pub(crate) struct BareFile {
    file: File,
    at: u64,
}

impl BareFile {
    pub(crate) fn create(path: &Path) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| {
            Failure::new(format!(
                "{} cannot be written: {e}; choose another folder with --data",
                path.display()
            ))
        };
        let mut file = File::create(path).map_err(failed)?;
        let zeros = vec![0; 1024 * 1024];
        for _ in 0..FILE_MIB {
            file.write_all(&zeros).map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        Ok(Self { file, at: 0 })
    }

    /// Appends what the load says, up to a window of records in each write,
    /// each write followed by a sync. Blocks its thread.
    pub(crate) fn append(&mut self, load: &Load) -> Result<Published, Failure> {
        let failed = |e: std::io::Error| Failure::new(format!("the bare file failed: {e}"));
        let mut turns = load.turns()?;
        let mut done = Published::new();
        let mut buffer = Vec::new();
        let mut batch: Vec<Instant> = Vec::with_capacity(load.window);
        let mut n = 0;
        while let Some(due) = turns.next_blocking() {
            let mut next = Some(due);
            // What is due by now shares the sync, as far as the window goes.
            while let Some(due) = next {
                buffer.extend_from_slice(&load.body(n, due));
                batch.push(due);
                n += 1;
                let room = batch.len() < load.window;
                next = room.then(|| turns.ready()).flatten();
            }
            if self.at + buffer.len() as u64 > FILE_MIB * 1024 * 1024 {
                self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
                self.at = 0;
            }
            self.file.write_all(&buffer).map_err(failed)?;
            self.file.sync_data().map_err(failed)?;
            self.at += buffer.len() as u64;
            buffer.clear();
            for due in batch.drain(..) {
                done.note(due);
            }
        }
        Ok(done)
    }
}

/// Size of the file; at its end it is written from the beginning again.
const FILE_MIB: u64 = 64;
