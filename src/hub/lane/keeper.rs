//! Keeps what a lane's spool holds, and holds the publishers' answers until it
//! is on the disk. It decides nothing about messages; without a store it answers
//! at once that nothing is durable.
//!
//! A crash between a write and its sync loses at most messages whose publishers
//! were never answered, and removals: what was removed then comes back, marked
//! as a possible duplicate.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use tokio::sync::watch;

use crate::{
    broker::Outcome,
    error::Result,
    hub::spool::{
        Entry, Seq,
        codec::{self, LaneName},
        store::{KeptId, SpoolStore, Synced, Written},
    },
};

/// The keeping side of one lane. `W` is whoever waits for an answer.
pub(crate) struct Keeper<W> {
    lane: LaneName,
    store: Option<Store>,
    ids: HashMap<Seq, KeptId>,
    /// Written, not synced; in the order of their numbers. Bounded by the room
    /// that the spool has.
    waiting: VecDeque<(u64, W)>,
}

struct Store {
    kept: Arc<dyn SpoolStore>,
    synced: watch::Receiver<Synced>,
}

impl<W> Keeper<W> {
    pub(crate) fn new(lane: LaneName, kept: Option<Arc<dyn SpoolStore>>) -> Self {
        Self {
            lane,
            store: kept.map(|kept| Store {
                synced: kept.synced(),
                kept,
            }),
            ids: HashMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Notes what an earlier process kept.
    pub(crate) fn restored(&mut self, seq: Seq, id: KeptId) {
        self.ids.insert(seq, id);
    }

    /// Nobody waits for the disk.
    pub(crate) fn is_quiet(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Keeps a message. Whoever waits is given back, with the answer, unless the
    /// answer has to wait for the disk.
    pub(crate) fn store(&mut self, seq: Seq, entry: &Entry, waiter: W) -> Option<(W, Outcome)> {
        let in_memory = Outcome::Spooled { durable: false };
        let Some(store) = &self.store else {
            return Some((waiter, in_memory));
        };
        let put = codec::encode(&self.lane, seq, entry).and_then(|body| store.kept.put(body));
        match put {
            Ok(Written { id, number }) => {
                self.ids.insert(seq, id);
                if entry.message.is_persistent() {
                    self.waiting.push_back((number, waiter));
                    return None;
                }
                Some((waiter, in_memory))
            }
            Err(error) => {
                tracing::error!(topic = %self.lane.topic, id = %entry.message.id, %error,
                    "a spooled message is in memory only");
                Some((waiter, in_memory))
            }
        }
    }

    /// Keeps the new form of a message.
    pub(crate) fn rewrite(&mut self, seq: Seq, entry: &Entry) {
        let (Some(store), Some(old)) = (&self.store, self.ids.get(&seq)) else {
            return;
        };
        let put =
            codec::encode(&self.lane, seq, entry).and_then(|body| store.kept.replace(*old, body));
        match put {
            Ok(written) => {
                self.ids.insert(seq, written.id);
            }
            Err(error) => self.complain(&error),
        }
    }

    /// Lets go of a message.
    pub(crate) fn remove(&mut self, seq: Seq) {
        let (Some(store), Some(id)) = (&self.store, self.ids.remove(&seq)) else {
            return;
        };
        if let Err(error) = store.kept.remove(id) {
            self.complain(&error);
        }
    }

    /// Hands the duty to let go of a message to somebody else.
    pub(crate) fn give_away(&mut self, seq: Seq) -> Option<Release> {
        let (Some(store), Some(id)) = (&self.store, self.ids.remove(&seq)) else {
            return None;
        };
        Some(Release {
            store: store.kept.clone(),
            id,
        })
    }

    /// Waits until the disk has come further; for ever when nobody waits for it.
    ///
    /// Cancel safe: what was seen is taken up by [`Keeper::answers`].
    pub(crate) async fn progress(&mut self) {
        match &mut self.store {
            Some(store) if !self.waiting.is_empty() => {
                if store.synced.changed().await.is_err() {
                    // The store is gone, and with it the answers.
                    std::future::pending::<()>().await;
                }
            }
            _ => std::future::pending().await,
        }
    }

    /// Everybody whose message is on the disk by now, or never will be.
    pub(crate) fn answers(&mut self) -> Vec<(W, Outcome)> {
        let Some(store) = &mut self.store else {
            return Vec::new();
        };
        let synced = store.synced.borrow_and_update().clone();
        let mut told = Vec::new();
        while let Some((number, _)) = self.waiting.front() {
            let durable = *number <= synced.up_to;
            if !durable && synced.broken.is_none() {
                break;
            }
            if let Some((_, waiter)) = self.waiting.pop_front() {
                // With a broken disk it is in memory all the same, and drained
                // from there: that much is true.
                told.push((waiter, Outcome::Spooled { durable }));
            }
        }
        told
    }

    fn complain(&self, error: &crate::error::Error) {
        tracing::error!(topic = %self.lane.topic, %error,
            "the spool on the disk is behind; a restart may repeat messages");
    }
}

/// The duty to let go of a kept message.
pub(crate) struct Release {
    store: Arc<dyn SpoolStore>,
    id: KeptId,
}

impl Release {
    /// The message is safe elsewhere.
    pub(crate) fn done(self) -> Result<()> {
        self.store.remove(self.id)
    }
}
