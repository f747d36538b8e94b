//! The spool on the journal: a log of its own, since spooled messages live for
//! minutes and would pin nothing else's segments, nor be pinned by them.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    LaneLeft, Seq,
    codec::{self, LaneName},
    store::{KeptId, SpoolStore, Synced, Written},
};
use crate::{
    error::{Error, ErrorCode, Result},
    journal::{Batch, Journal, JournalError, JournalOptions},
    message::{MessageId, Timestamp},
    topic::Topic,
};

/// The spool of a hub, on the disk.
pub(crate) struct SpoolLog(Journal);

/// Bytes that wait for the disk at most, for all lanes.
const QUEUED_BYTES: u64 = 256 * 1024 * 1024;

/// The spool's folder in a data folder.
pub(crate) const FOLDER: &str = "spool";

/// What an earlier process left.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// By lane.
    pub(crate) lanes: HashMap<LaneName, LaneLeft>,
    /// The newest ids, with their topics, in the order in which they were kept.
    pub(crate) ids: VecDeque<(Topic, MessageId)>,
}

/// How many ids, and since when, are wanted back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) ids: usize,
    pub(crate) since: Timestamp,
}

impl SpoolLog {
    /// Opens the spool in a folder and looks at what is there; the messages
    /// themselves stay on the disk. Blocks.
    ///
    /// # Errors
    /// The folder cannot be used, or what is in it cannot be read: nothing is
    /// dropped silently.
    pub(crate) fn open(dir: &Path, max_bytes: u64, wanted: Wanted) -> Result<(Self, Left)> {
        let mut left = Left::default();
        let log = Self::open_each(dir, max_bytes, |id, kept| {
            note(&mut left, id, kept, wanted);
        })?;
        Ok((log, left))
    }

    /// As [`SpoolLog::open`], and shows each record.
    ///
    /// # Errors
    /// As [`SpoolLog::open`].
    pub(crate) fn open_each(
        dir: &Path,
        max_bytes: u64,
        mut each: impl FnMut(KeptId, codec::Kept),
    ) -> Result<Self> {
        let options = JournalOptions {
            max_bytes,
            // All lanes of a broker that stalls file their windows at once.
            max_queued_bytes: QUEUED_BYTES,
            ..JournalOptions::default()
        };
        let opened = Journal::open(dir, options).map_err(|e| wrong(&e))?;
        let mut unreadable = None;
        let journal = opened
            .recover(|id, body| match codec::decode(&body) {
                Ok(kept) => each(id, kept),
                Err(error) => {
                    unreadable.get_or_insert(error);
                }
            })
            .map_err(|e| wrong(&e))?;
        if let Some(error) = unreadable {
            return Err(error.on(dir.display().to_string()));
        }
        Ok(Self(journal))
    }

    /// As [`SpoolLog::open`], but only what is there already.
    ///
    /// # Errors
    /// There is no spool in the folder, or as [`SpoolLog::open`].
    pub(crate) fn open_existing(
        dir: &Path,
        max_bytes: u64,
        wanted: Wanted,
    ) -> Result<(Self, Left)> {
        let spool = dir.join(FOLDER);
        if !spool.is_dir() {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "{} holds no spool; name the data folder of a hub, which has a folder {FOLDER:?} in it",
                    dir.display()
                ),
            ));
        }
        Self::open(&spool, max_bytes, wanted)
    }

    /// Writes what is queued and gives the folder back. Blocks.
    pub(crate) fn close(&self) -> Result<()> {
        self.0.close().map_err(|e| wrong(&e))
    }
}

fn note(left: &mut Left, id: KeptId, kept: codec::Kept, wanted: Wanted) {
    let message = &kept.entry.message;
    // The copy of a dead letter passed the window by: its id may be another's in
    // the topic that it was sent to.
    let brought = !kept.generated && kept.entry.marks.reprocess == 0;
    if brought && kept.entry.since >= wanted.since && wanted.ids > 0 {
        if left.ids.len() == wanted.ids {
            left.ids.pop_front();
        }
        left.ids
            .push_back((kept.lane.topic.clone(), message.id.clone()));
    }
    let size = message.size();
    let lane = left.lanes.entry(kept.lane).or_default();
    // Two lanes of one name, one after the other in one process, both began at
    // one: what came later stands behind.
    let seq: Seq = match lane.ids.get(kept.seq) {
        None => kept.seq,
        Some(_) => lane.ids.last_key().map_or(1, |last| last + 1),
    };
    lane.ids.insert(seq, id);
    lane.spool.restore(seq, &kept.entry.order, size);
}

impl SpoolStore for SpoolLog {
    fn write(&self, puts: Vec<Bytes>, removals: &[KeptId]) -> Result<Written> {
        let mut batch = Batch::new();
        for body in puts {
            batch.put(body);
        }
        for id in removals {
            batch.remove(*id);
        }
        let appended = self.0.append(batch).map_err(|e| wrong(&e))?;
        Ok(Written {
            id: appended.first,
            number: appended.lsn,
        })
    }

    fn read(&self, ids: &[KeptId]) -> Result<Vec<Option<Bytes>>> {
        self.0.read(ids).map_err(|e| wrong(&e))
    }

    fn synced(&self) -> watch::Receiver<Synced> {
        self.0.durable()
    }
}

fn wrong(error: &JournalError) -> Error {
    Error::new(ErrorCode::InvalidConfig, format!("the spool: {error}"))
}
