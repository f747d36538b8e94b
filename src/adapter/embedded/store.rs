//! The broker's two journals: opening them, waiting for them, their health.

use tokio::task::spawn_blocking;

use super::{config::JournalConfig, durable::Mark, recovery::Found};
use crate::{
    broker::BrokerType,
    error::{Error, ErrorCode, Result},
    journal::{Journal, JournalError, JournalOptions},
};

/// The journals of queues and of streams.
pub(super) struct Store {
    pub(super) queues: Journal,
    pub(super) streams: Journal,
}

impl Store {
    /// Opens both and reads what they hold.
    ///
    /// # Errors
    /// `INVALID_CONFIG` with the journal's own words: held by another, damaged,
    /// of a later version.
    ///
    /// # Cancel safety
    /// What is opened is closed again.
    pub(super) async fn open(settings: JournalConfig) -> Result<(Self, Found)> {
        spawn_blocking(move || Self::open_blocking(&settings))
            .await
            .unwrap_or_else(|e| Err(Error::new(ErrorCode::UnknownError, e.to_string())))
    }

    fn open_blocking(settings: &JournalConfig) -> Result<(Self, Found)> {
        let mut found = Found::default();
        let mut open = |name: &str, max_bytes: u64| {
            let dir = settings.dir.join(name);
            let options = JournalOptions {
                segment_bytes: settings.segment_bytes,
                max_bytes,
                ..JournalOptions::default()
            };
            let mut wrong = None;
            let journal = Journal::open(&dir, options)
                .and_then(|opened| {
                    opened.recover(|id, body| {
                        if let Err(why) = found.visit(id, &body) {
                            wrong.get_or_insert((id, why));
                        }
                    })
                })
                .map_err(failed)?;
            match wrong {
                None => Ok(journal),
                Some((id, why)) => Err(Error::rejected(
                    ErrorCode::InvalidConfig,
                    format!(
                        "entry {id} of the journal {} cannot be understood: {why}",
                        dir.display()
                    ),
                )
                .at(BrokerType::InMemory)),
            }
        };
        let queues = open("queues", settings.queue_bytes)?;
        let streams = open("streams", settings.stream_bytes)?;
        Ok((Self { queues, streams }, found))
    }

    /// Waits until both have synced what was written up to `mark`.
    ///
    /// # Errors
    /// The journal failed, or was closed, before.
    pub(super) async fn synced(&self, mark: Mark) -> std::result::Result<(), JournalError> {
        if mark.queues > 0 {
            self.queues.synced(mark.queues).await?;
        }
        if mark.streams > 0 {
            self.streams.synced(mark.streams).await?;
        }
        Ok(())
    }

    /// Whether both still take and sync what they are given.
    ///
    /// # Errors
    /// `BROKER_UNAVAILABLE` that names the cause.
    pub(super) fn health(&self) -> Result<()> {
        for (name, journal) in [("queues", &self.queues), ("streams", &self.streams)] {
            if let Some(cause) = journal.durable().borrow().poisoned.clone() {
                return Err(Error::new(
                    ErrorCode::BrokerUnavailable,
                    format!(
                        "the journal of the {name} failed and takes nothing more: {cause}; what is in memory is still served; mend the disk and start again"
                    ),
                )
                .at(BrokerType::InMemory));
            }
        }
        Ok(())
    }

    /// Syncs and closes both.
    ///
    /// # Errors
    /// What could not be synced.
    pub(super) async fn close(&self) -> Result<()> {
        let (queues, streams) = (self.queues.clone(), self.streams.clone());
        let closed = spawn_blocking(move || {
            let queues = queues.close();
            streams.close().and(queues)
        });
        match closed.await {
            Ok(Ok(()) | Err(JournalError::Closed)) => Ok(()),
            Ok(Err(error)) => Err(failed(error)),
            Err(error) => Err(Error::new(ErrorCode::UnknownError, error.to_string())),
        }
    }
}

fn failed(error: JournalError) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, error.to_string()).at(BrokerType::InMemory)
}
