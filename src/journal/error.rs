//! What can go wrong with a journal, and what to do about it. It knows nothing
//! of messages: callers say what a failure means for theirs.

use std::{io, path::PathBuf, sync::Arc};

/// Why a journal refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// No room: nothing of the batch was taken.
    #[error(
        "the journal is full: wait until entries are removed or the disk has caught up, or raise max_bytes (or max_queued_bytes)"
    )]
    Full,
    /// A write or a sync failed; what is not durable yet will never be said to be.
    #[error(
        "the journal stopped after a failure of its storage: {cause}; mend the storage and open the journal again"
    )]
    Poisoned {
        /// The first failure.
        cause: Arc<str>,
    },
    /// The journal was closed.
    #[error("the journal is closed")]
    Closed,
    /// Another process, or another place in this one, has the journal open.
    #[error(
        "journal {} is in use{}: stop the other process, or give this one a folder of its own",
        path.display(), holder.map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    Locked {
        /// The journal's folder.
        path: PathBuf,
        /// The process that wrote its id into the lock file, if that could be read.
        holder: Option<u32>,
    },
    /// What is on disk is not what was written there.
    #[error(
        "{} is damaged at byte {offset}: {why}; restore the journal's folder from a copy, or move this file and those after it away and accept the loss of what they hold", file.display()
    )]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        why: String,
    },
    /// A file of a format that this version does not know.
    #[error(
        "{} has format version {found}, and this program knows up to {known}: use the program that wrote it, or a newer one", file.display()
    )]
    Version {
        /// The file.
        file: PathBuf,
        /// The version in its header.
        found: u32,
        /// The newest version that can be read.
        known: u32,
    },
    /// A batch that is larger than one frame may be.
    #[error(
        "a batch of {bytes} bytes is over the limit of {limit}: split it, or keep large bodies elsewhere"
    )]
    TooLarge {
        /// The batch's size on disk.
        bytes: u64,
        /// The largest size.
        limit: u64,
    },
    /// The operating system refused an operation.
    #[error("could not {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: Arc<io::Error>,
    },
}

impl JournalError {
    /// An operation that failed on a file.
    pub(super) fn io(what: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.into(),
            source: Arc::new(source),
        }
    }

    /// Whether the storage has no space left, which may pass.
    pub(super) fn is_storage_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}
