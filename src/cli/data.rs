//! The data folder: made when missing, and held by one hub at a time.

use std::{
    env,
    fs::{self, File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
};

use super::Failure;

/// A folder that this process holds. The lock goes with the process, however it
/// ends.
#[derive(Debug)]
pub(super) struct DataFolder {
    _lock: File,
}

/// The folder of a hub that was given none: in the user's data folder (where
/// the XDG base directory specification puts it), by the address that it serves
/// on, since two hubs never share one. None without a home, or when the port is
/// whichever is free: nobody would find it again.
pub(super) fn own_folder(address: &str) -> Option<PathBuf> {
    let set = |name| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let (host, port) = address.rsplit_once(':')?;
    if port.parse::<u16>().is_ok_and(|p| p == 0) {
        return None;
    }
    let host: String = host
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let base = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")))?;
    Some(base.join("messaging-hub").join(format!("{host}-{port}")))
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
