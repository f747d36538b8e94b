//! Names of segment files: the segment's number, so that a folder's listing is
//! the log's order.

use std::path::PathBuf;

use super::storage::Storage;

/// A segment's file name.
pub(super) fn name(seq: u64) -> String {
    format!("{seq:020}.{EXTENSION}")
}

/// A segment's number from its file name; `None` for other files.
pub(super) fn parse(name: &str) -> Option<u64> {
    let (seq, extension) = name.split_once('.')?;
    let ours = extension == EXTENSION && seq.len() == 20;
    ours.then(|| seq.parse().ok()).flatten()
}

/// A segment's path, for messages.
pub(super) fn path(storage: &dyn Storage, seq: u64) -> PathBuf {
    storage.path().join(name(seq))
}

const EXTENSION: &str = "seg";
