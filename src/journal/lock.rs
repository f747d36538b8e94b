//! One owner for each journal folder. The operating system ends the lock with
//! the process, so a crash leaves nothing to clean up.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Write},
    path::Path,
};

use super::{JournalError, storage::private};

/// The folder is ours until this is dropped.
pub(super) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the folder's lock, or says who has it.
    pub(super) fn take(folder: &Path) -> Result<Self, JournalError> {
        let path = folder.join(LOCK_FILE);
        let mut file = private(
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false),
        )
        .open(&path)
        .map_err(|e| JournalError::io("open the lock file", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only a help for whoever reads the message.
                let _ = file.read_to_string(&mut holder);
                return Err(JournalError::Locked {
                    path: folder.into(),
                    holder: holder.trim().parse().ok(),
                });
            }
            Err(TryLockError::Error(e)) => return Err(JournalError::io("lock", &path, e)),
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|e| JournalError::io("write the lock file", &path, e))?;
        Ok(Self { _file: file })
    }
}

const LOCK_FILE: &str = "lock";
