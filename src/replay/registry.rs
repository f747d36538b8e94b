//! Which replays there are. Pure. Those that are over stay for a while, so that
//! their outcome can be read; the oldest go first.

use std::collections::VecDeque;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    progress::{Replay, ReplayProgress},
    request::ReplayRequest,
};
use crate::error::{Error, ErrorCode, Result};

/// A replay that was accepted.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) request: ReplayRequest,
    pub(crate) progress: watch::Receiver<ReplayProgress>,
    pub(crate) cancel: CancellationToken,
}

impl Entry {
    /// As it is listed.
    pub(crate) fn snapshot(&self) -> Replay {
        Replay {
            id: self.id.clone(),
            progress: self.progress.borrow().clone(),
            request: self.request.clone(),
        }
    }

    /// Waits until it is over.
    pub(crate) async fn over(&self) {
        let mut progress = self.progress.clone();
        // Its task is gone: over, too.
        let _ = progress.wait_for(|p| p.status.is_over()).await;
    }

    fn is_over(&self) -> bool {
        // One whose task has ended, however it did, takes no place.
        self.progress.borrow().status.is_over() || self.progress.has_changed().is_err()
    }
}

/// All of them, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Registry(VecDeque<Entry>);

impl Registry {
    /// Takes one in.
    ///
    /// # Errors
    /// `REPLAY_LIMIT` when too many are active, `REPLAY_EXISTS` when its id is
    /// known.
    pub(crate) fn add(&mut self, entry: Entry) -> Result<()> {
        if self.0.iter().any(|e| e.id == entry.id) {
            return Err(Error::rejected(
                ErrorCode::ReplayExists,
                format!(
                    "there is a replay {:?} already; look at it, or choose another id",
                    entry.id
                ),
            ));
        }
        if self.active() >= MAX_ACTIVE {
            return Err(Error::new(
                ErrorCode::ReplayLimit,
                format!(
                    "{MAX_ACTIVE} replays are active, which is the most; wait until one is over, or cancel one"
                ),
            ));
        }
        self.0.push_back(entry);
        while self.0.iter().filter(|e| e.is_over()).count() > MAX_OVER {
            let oldest = self.0.iter().position(Entry::is_over);
            let Some(oldest) = oldest else { break };
            self.0.remove(oldest);
        }
        Ok(())
    }

    /// Forgets one that never began.
    pub(crate) fn forget(&mut self, id: &str) {
        self.0.retain(|e| e.id != id);
    }

    /// One of them.
    ///
    /// # Errors
    /// `REPLAY_NOT_FOUND`.
    pub(crate) fn find(&self, id: &str) -> Result<Entry> {
        let found = self.0.iter().find(|e| e.id == id);
        found.cloned().ok_or_else(|| {
            Error::rejected(
                ErrorCode::ReplayNotFound,
                format!("there is no replay {id:?}; a restart forgets them, and of those that are over the last {MAX_OVER} are kept"),
            )
        })
    }

    /// All, the newest first.
    pub(crate) fn all(&self) -> Vec<Entry> {
        self.0.iter().rev().cloned().collect()
    }

    /// How many are not over.
    pub(crate) fn active(&self) -> usize {
        self.0.iter().filter(|e| !e.is_over()).count()
    }
}

/// Replays at once. Each reads and publishes as fast as brokers let it, beside
/// the live traffic.
pub(crate) const MAX_ACTIVE: usize = 5;

/// Replays that are over and can still be looked at.
pub(crate) const MAX_OVER: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::ReplayStatus;

    fn entry(id: &str) -> (Entry, watch::Sender<ReplayProgress>) {
        let (tx, progress) = watch::channel(ReplayProgress::default());
        let entry = Entry {
            id: id.to_owned(),
            request: ReplayRequest::default(),
            progress,
            cancel: CancellationToken::new(),
        };
        (entry, tx)
    }

    #[test]
    fn a_sixth_is_refused_until_one_is_over() {
        let mut registry = Registry::default();
        let running: Vec<_> = (0..MAX_ACTIVE)
            .map(|n| {
                let (entry, tx) = entry(&n.to_string());
                registry.add(entry).unwrap();
                tx
            })
            .collect();
        let error = registry.add(entry("more").0).unwrap_err();
        assert_eq!(error.code(), ErrorCode::ReplayLimit);
        assert!(error.message().contains("cancel one"), "{error}");
        let again = registry.add(entry("2").0).unwrap_err();
        assert_eq!(again.code(), ErrorCode::ReplayExists);
        running[1].send_modify(|p| p.status = ReplayStatus::Failed);
        let (more, _tx) = entry("more");
        registry.add(more).unwrap();
        assert_eq!(registry.active(), MAX_ACTIVE);
        assert_eq!(registry.all()[0].id, "more");
        drop(running);
        assert_eq!(registry.active(), 1, "a task that is gone takes no place");
    }

    #[test]
    fn of_those_that_are_over_the_newest_are_kept() {
        let mut registry = Registry::default();
        for n in 0..MAX_OVER + 10 {
            let (entry, tx) = entry(&n.to_string());
            registry.add(entry).unwrap();
            tx.send_modify(|p| p.status = ReplayStatus::Completed);
        }
        assert!(registry.all().len() <= MAX_OVER + 1);
        let gone = registry.find("0").unwrap_err();
        assert_eq!(gone.code(), ErrorCode::ReplayNotFound);
        assert!(registry.find(&(MAX_OVER + 9).to_string()).is_ok());
    }
}
