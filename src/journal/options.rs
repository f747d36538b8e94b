//! A journal's settings. Nothing here touches the disk.

use std::time::Duration;

use super::format::{FRAME_HEADER, SEGMENT_HEADER};

/// How a journal uses its disk and memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalOptions {
    /// Size of a segment file in bytes, allocated at once. Default 16 MiB; never
    /// more than an eighth of `max_bytes`, and never less than 4 KiB. Space is
    /// given back a whole segment at a time; small segments give it back sooner
    /// and sync more often.
    pub segment_bytes: u64,
    /// Bound on the disk that the journal takes, in bytes. Default 1 GiB. Two
    /// segments of it are kept aside (for the one that is being filled and for
    /// compaction), and so is what the removal of each live entry will take.
    pub max_bytes: u64,
    /// Bound on the bytes that wait in memory for the writer. Default 64 MiB. A
    /// batch with puts that comes while more wait is refused as full; one batch
    /// is always let in.
    pub max_queued_bytes: u64,
    /// How long what is written may wait for its sync. Default 0: it is synced
    /// at once. Longer spares the disk where nobody waits for the sync: the death
    /// of the process takes nothing that is written, a power cut takes what was
    /// not synced.
    pub sync_delay: Duration,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            max_bytes: 1 << 30,
            max_queued_bytes: 64 << 20,
            sync_delay: Duration::ZERO,
        }
    }
}

impl JournalOptions {
    /// The segment size in force.
    pub(super) fn segment_size(&self) -> u64 {
        self.segment_bytes
            .min(self.max_bytes / 8)
            .max(MIN_SEGMENT_BYTES)
    }

    /// What puts may fill, removals to come included.
    pub(super) fn budget(&self) -> u64 {
        self.max_bytes.saturating_sub(2 * self.segment_size())
    }
}

/// A smaller segment would be mostly headers.
const MIN_SEGMENT_BYTES: u64 = 4096;

const _: () = assert!(MIN_SEGMENT_BYTES > (SEGMENT_HEADER + FRAME_HEADER) as u64);
