//! The data folder: made when missing, and held by one hub at a time.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    path::Path,
};

use super::Failure;

/// A folder that this process holds. The lock goes with the process, however it
/// ends.
#[derive(Debug)]
pub(super) struct DataFolder {
    _lock: File,
}

impl DataFolder {
    /// Makes and takes the folder.
    pub(super) fn take(dir: &Path) -> Result<Self, Failure> {
        let wrong = |what: &str, e: std::io::Error| {
            Failure::from(crate::Error::new(
                crate::ErrorCode::InvalidConfig,
                format!("{what} {}: {e}; choose another with --data", dir.display()),
            ))
        };
        fs::create_dir_all(dir).map_err(|e| wrong("cannot make the data folder", e))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("lock"))
            .map_err(|e| wrong("cannot write to the data folder", e))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(Failure::from(crate::Error::new(
                crate::ErrorCode::InvalidConfig,
                format!(
                    "the data folder {} is held by another hub; stop it, or choose another with --data",
                    dir.display()
                ),
            ))),
            Err(TryLockError::Error(e)) => Err(wrong("cannot lock the data folder", e)),
        }
    }
}
