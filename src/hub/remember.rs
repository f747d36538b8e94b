//! What groups handled, remembered in the data folder: opened before anybody
//! consumes, closed when nobody does any more (C6).

use std::{path::Path, sync::Arc};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    MessagingHub,
    consume::{MAX_GROUPS, stream_group},
    dedup::IdHasher,
    group::{self, Group},
    handled::{self, Keeper, Limits, Log, Note, Notes, Tally},
    keep::blocking,
    lock,
    state::Weakness,
};
use crate::{
    error::{Error, ErrorCode, Result},
    journal::Journal,
};

/// Where groups remember what they handled.
pub(super) struct Memory {
    hasher: IdHasher,
    notes: mpsc::Sender<Note>,
    tally: Arc<Tally>,
    journal: Journal,
    closing: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl MessagingHub {
    /// Keeps the ids of handled messages in a data folder, and takes up those that
    /// an earlier process left there: what its groups handled they are not handed
    /// again. Call it before the first consumer; groups that exist by then keep
    /// nothing. The folder is held until [`MessagingHub::close`]. Within a Tokio
    /// runtime.
    ///
    /// Consumers do not wait for the disk: see the README for what a kill or a
    /// power cut takes. Gives the number of ids that are known again.
    ///
    /// # Errors
    /// The folder cannot be written, is held by another process, or holds what
    /// cannot be read; each says what to do.
    pub async fn keep_handled_in(&self, dir: &Path) -> Result<u64> {
        self.check_open()?;
        let settings = self.0.config.dedup_window.clone();
        let limits = Limits {
            ids: usize::try_from(settings.ids).unwrap_or(usize::MAX),
            age: settings.age.as_secs(),
            groups: MAX_GROUPS,
        };
        let dir = dir.to_owned();
        let opened =
            blocking(move || Log::open(&dir, limits, |hasher| group::window(&settings, hasher)))
                .await?;
        let log = opened.log;
        let known = log.ids() as u64;
        let (notes, queue) = mpsc::channel(handled::QUEUE);
        let tally = Arc::<Tally>::default();
        let closing = CancellationToken::new();
        let mut memory = Memory {
            hasher: log.hasher(),
            notes,
            tally: tally.clone(),
            journal: log.journal(),
            closing: closing.clone(),
            task: None,
        };
        let mut groups = lock(&self.0.groups);
        for (name, window) in opened.windows {
            let group = Arc::new(Group::kept(
                stream_group(&name),
                window,
                memory.notes_of(&name),
            ));
            groups.entry(name.to_string()).or_insert(group);
        }
        drop(groups);
        let keeper = Keeper {
            log,
            notes: queue,
            tally,
        };
        memory.task = Some(tokio::spawn(keeper.run(closing)));
        *lock(&self.0.memory) = Some(memory);
        if known > 0 {
            tracing::info!(
                ids = known,
                "an earlier process handled these; they are known again"
            );
        }
        Ok(known)
    }

    /// A group that has handled nothing yet.
    pub(super) fn new_group(&self, name: &str) -> Group {
        let settings = &self.0.config.dedup_window;
        match &*lock(&self.0.memory) {
            Some(memory) => Group::kept(
                stream_group(name),
                group::window(settings, memory.hasher),
                memory.notes_of(&name.into()),
            ),
            None => Group::new(stream_group(name), settings),
        }
    }

    /// Forgets on the disk what a group handled, before anything is built on it.
    ///
    /// # Errors
    /// The disk failed: after a restart the group would know it again.
    pub(super) async fn forget_kept(&self, name: &str) -> Result<()> {
        let Some((notes, journal)) = lock(&self.0.memory)
            .as_ref()
            .map(|m| (m.notes.clone(), m.journal.clone()))
        else {
            return Ok(());
        };
        let failed = |why: String| {
            Error::new(
                ErrorCode::OperationCanceled,
                format!(
                    "the group's handled ids could not be forgotten in the data folder, and a restart would bring them back: {why}"
                ),
            )
        };
        let (written, answer) = oneshot::channel();
        let group = name.into();
        let asked = notes.send(Note::Forget { group, written }).await;
        let number = match (asked, answer.await) {
            (Ok(()), Ok(number)) => number.map_err(|e| failed(e.to_string()))?,
            _ => return Err(failed("the hub is closing".into())),
        };
        journal
            .synced(number)
            .await
            .map_err(|e| failed(e.to_string()))
    }

    /// What is weaker than the configuration promises, because the disk fails.
    pub(super) fn memory_weakness(&self) -> Option<Weakness> {
        let why = lock(&self.0.memory).as_ref()?.tally.failing()?;
        Some(Weakness {
            what: "handled ids are not kept in the data folder".into(),
            clause: "C6".into(),
            why: format!(
                "after a restart of the hub what was not settled at its broker may be handed out again: {why}"
            ),
        })
    }

    /// Handled ids that are not on the disk although a window has them.
    pub(super) fn unkept_ids(&self) -> u64 {
        lock(&self.0.memory)
            .as_ref()
            .map_or(0, |memory| memory.tally.unkept())
    }

    /// Writes what was handled to the end and gives the folder back.
    pub(super) async fn close_memory(&self, until: Instant) {
        let task = lock(&self.0.memory).as_mut().and_then(|memory| {
            memory.closing.cancel();
            memory.task.take()
        });
        if let Some(mut task) = task
            && tokio::time::timeout_at(until, &mut task).await.is_err()
        {
            tracing::error!(
                "the data folder's disk does not answer; handled ids are left as they are"
            );
            task.abort();
            let _ = task.await;
        }
    }
}

impl Memory {
    fn notes_of(&self, group: &Arc<str>) -> Notes {
        Notes::new(group.clone(), self.notes.clone(), self.tally.clone())
    }
}
