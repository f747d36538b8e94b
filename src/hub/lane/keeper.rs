//! Keeps what a lane's spool holds, and holds the publishers' answers until it
//! is on the disk. It decides nothing about messages; without a store it answers
//! at once that nothing is durable.
//!
//! A disk that does not come on (it is full, or stands still) makes nobody wait
//! for ever: after a while publishers are told that their message is in memory.
//!
//! A crash between a write and its sync loses at most messages whose publishers
//! were never answered, and removals: what was removed then comes back, marked
//! as a possible duplicate.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::{
    broker::Outcome,
    error::{Error, Result},
    hub::spool::{
        Entry, Seq,
        codec::{self, LaneName},
        runs::Runs,
        store::{KeptId, SpoolStore, Synced},
    },
};

/// The keeping side of one lane. `W` is whoever waits for an answer.
pub(crate) struct Keeper<W> {
    lane: LaneName,
    store: Option<Store>,
    /// What the store calls each message.
    ids: Runs,
    /// To be written with the next flush: one record for all.
    puts: Vec<Put<W>>,
    removals: Vec<KeptId>,
    /// Written, not synced; in the order of their numbers. Bounded by the room
    /// that the spool has.
    unsynced: VecDeque<Unsynced<W>>,
    /// How long a publisher waits for the disk.
    patience: Duration,
    /// Until when publishers were told.
    gave_up: Option<Instant>,
    /// The last record that was written.
    written: u64,
    /// Handlers who wait for what was written before they decided; at most one
    /// for each delivery that was handed out.
    handlers: VecDeque<Handler>,
}

/// A handler whose verdict was noted, and which is told once that is on the disk.
struct Handler {
    number: u64,
    done: Done,
    until: Instant,
}

/// Who waits for a verdict to be carried out.
pub(crate) type Done = oneshot::Sender<Result<()>>;

struct Unsynced<W> {
    number: u64,
    seq: Seq,
    waiter: Option<W>,
    until: Instant,
}

struct Store {
    kept: Arc<dyn SpoolStore>,
    synced: watch::Receiver<Synced>,
}

struct Put<W> {
    seq: Seq,
    body: Bytes,
    /// None: nobody is to be told any more.
    waiter: Option<W>,
    /// The form that this one stands in for; gone with the same record.
    replaces: Option<KeptId>,
}

/// What a flush or a sync brought.
pub(crate) struct Progress<W> {
    /// Publishers that can be answered.
    pub(crate) answers: Vec<(W, Outcome)>,
    /// Messages that are on the disk now.
    pub(crate) kept: Vec<Seq>,
}

impl<W> Default for Progress<W> {
    fn default() -> Self {
        Self {
            answers: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl<W> Keeper<W> {
    pub(crate) fn new(
        lane: LaneName,
        kept: Option<Arc<dyn SpoolStore>>,
        patience: Duration,
    ) -> Self {
        Self {
            lane,
            store: kept.map(|kept| Store {
                synced: kept.synced(),
                kept,
            }),
            ids: Runs::default(),
            puts: Vec::new(),
            removals: Vec::new(),
            unsynced: VecDeque::new(),
            patience,
            gave_up: None,
            written: 0,
            handlers: VecDeque::new(),
        }
    }

    /// Takes up the names of what an earlier process kept.
    pub(crate) fn restored(&mut self, ids: Runs) {
        self.ids = ids;
    }

    /// The first messages that are kept.
    #[cfg(feature = "journal")]
    pub(crate) fn first(&self, count: usize) -> Vec<Seq> {
        self.ids.first_keys(count)
    }

    /// How many of so many spooled messages are in memory only.
    pub(crate) fn unkept(&self, spooled: usize) -> usize {
        spooled.saturating_sub(self.ids.len() + self.puts.len())
    }

    /// Nobody waits for the disk.
    pub(crate) fn is_quiet(&self) -> bool {
        self.unsynced.is_empty() && self.puts.is_empty() && self.handlers.is_empty()
    }

    /// Keeps a message, from the next flush on. Whoever waits is given back,
    /// with the answer, unless the answer has to wait for the disk.
    pub(crate) fn store(&mut self, seq: Seq, entry: &Entry, waiter: W) -> Option<(W, Outcome)> {
        let in_memory = Outcome::Spooled { durable: false };
        if self.store.is_none() {
            return Some((waiter, in_memory));
        }
        let body = match codec::encode(&self.lane, seq, entry) {
            Ok(body) => body,
            Err(error) => {
                self.complain(&error);
                return Some((waiter, in_memory));
            }
        };
        // A transient message goes the same way, and nobody waits for it.
        let (waits, told) = if entry.message.is_persistent() {
            (Some(waiter), None)
        } else {
            (None, Some((waiter, in_memory)))
        };
        self.puts.push(Put {
            seq,
            body,
            waiter: waits,
            replaces: None,
        });
        told
    }

    /// Keeps the new form of a message instead of the old.
    pub(crate) fn rewrite(&mut self, seq: Seq, entry: &Entry) {
        if self.store.is_none() {
            return;
        }
        match codec::encode(&self.lane, seq, entry) {
            Ok(body) => {
                let mut replaces = self.ids.remove(seq);
                let mut waiter = None;
                if let Some(at) = self.puts.iter().rposition(|p| p.seq == seq) {
                    let earlier = self.puts.remove(at);
                    waiter = earlier.waiter;
                    replaces = replaces.or(earlier.replaces);
                }
                self.puts.push(Put {
                    seq,
                    body,
                    waiter,
                    replaces,
                });
            }
            Err(error) => self.complain(&error),
        }
    }

    /// Lets go of a message, from the next flush on. One that was not even
    /// written yet never will be; its publisher is given back, with the answer.
    pub(crate) fn remove(&mut self, seq: Seq) -> Option<(W, Outcome)> {
        if let Some(id) = self.ids.remove(seq) {
            self.removals.push(id);
            return None;
        }
        let at = self.puts.iter().rposition(|p| p.seq == seq)?;
        let put = self.puts.remove(at);
        self.removals.extend(put.replaces);
        Some((put.waiter?, Outcome::Spooled { durable: false }))
    }

    /// Hands the duty to let go of a message to somebody else. None: it is not
    /// kept, or not yet; then `remove` says what is left to do.
    pub(crate) fn give_away(&mut self, seq: Seq) -> Option<Release> {
        let id = self.ids.remove(seq)?;
        Some(Release {
            store: self.store.as_ref()?.kept.clone(),
            id,
        })
    }

    /// Writes what was noted since the last flush, as one record.
    pub(crate) fn flush(&mut self, now: Instant) -> Progress<W> {
        let mut progress = Progress::default();
        let Some(store) = &self.store else {
            return progress;
        };
        if self.puts.is_empty() && self.removals.is_empty() {
            return progress;
        }
        let puts = std::mem::take(&mut self.puts);
        let removals = std::mem::take(&mut self.removals);
        let bodies = puts.iter().map(|p| p.body.clone()).collect();
        let replaced = puts.iter().filter_map(|p| p.replaces);
        let outdated: Vec<KeptId> = removals.iter().copied().chain(replaced).collect();
        match store.kept.write(bodies, &outdated) {
            Ok(written) => {
                self.written = written.number;
                for (put, id) in puts.into_iter().zip(written.id..) {
                    self.ids.insert(put.seq, id);
                    self.unsynced.push_back(Unsynced {
                        number: written.number,
                        seq: put.seq,
                        waiter: put.waiter,
                        until: now + self.patience,
                    });
                }
            }
            Err(error) => {
                self.complain(&error);
                for put in &puts {
                    if let Some(old) = put.replaces {
                        self.ids.insert(put.seq, old);
                    }
                }
                // Removals need no room; alone they are taken unless it is broken.
                if !removals.is_empty() && store.kept.write(Vec::new(), &removals).is_err() {
                    self.removals = removals;
                }
                let waiting = puts.into_iter().filter_map(|p| p.waiter);
                progress
                    .answers
                    .extend(waiting.map(|w| (w, Outcome::Spooled { durable: false })));
            }
        }
        progress
    }

    /// Waits until the disk has come further; for ever when nobody waits for it.
    ///
    /// Cancel safe: what was seen is taken up by [`Keeper::synced`].
    pub(crate) async fn progress(&mut self) {
        match &mut self.store {
            Some(store) if !self.unsynced.is_empty() || !self.handlers.is_empty() => {
                if store.synced.changed().await.is_err() {
                    // The store is gone, and with it the answers.
                    std::future::pending::<()>().await;
                }
            }
            _ => std::future::pending().await,
        }
    }

    /// What is on the disk by now, or never will be.
    pub(crate) fn synced(&mut self) -> Progress<W> {
        let mut progress = Progress::default();
        self.tell_handlers();
        let Some(store) = &mut self.store else {
            return progress;
        };
        let synced = store.synced.borrow_and_update().clone();
        let over = synced.poisoned.is_some() || synced.closed;
        while let Some(next) = self.unsynced.front() {
            let durable = next.number <= synced.lsn;
            if !durable && !over {
                break;
            }
            let Some(next) = self.unsynced.pop_front() else {
                break;
            };
            if durable {
                progress.kept.push(next.seq);
            } else {
                self.ids.remove(next.seq);
            }
            if let Some(waiter) = next.waiter {
                // With a broken disk it is in memory all the same, and drained
                // from there: that much is true.
                progress
                    .answers
                    .push((waiter, Outcome::Spooled { durable }));
            }
        }
        progress
    }

    /// Tells a handler once everything that was flushed is on the disk, or after
    /// as long as a publisher waits. What could not be written is in memory, and
    /// drained from there: the verdict holds all the same.
    pub(crate) fn tell_handler(&mut self, now: Instant, done: Done) {
        self.handlers.push_back(Handler {
            number: self.written,
            done,
            until: now + self.patience,
        });
        match &self.store {
            Some(_) => self.tell_handlers(),
            None => self.give_up_handlers(None),
        }
    }

    fn tell_handlers(&mut self) {
        let Some(store) = &self.store else {
            return;
        };
        let synced = store.synced.borrow();
        let over = synced.poisoned.is_some() || synced.closed;
        let lsn = synced.lsn;
        drop(synced);
        while let Some(first) = self.handlers.front() {
            if !over && first.number > lsn {
                return;
            }
            if let Some(first) = self.handlers.pop_front() {
                // Whoever dropped the future abandoned the answer.
                let _ = first.done.send(Ok(()));
            }
        }
    }

    /// Tells those whose patience is over by now; without a time, all.
    fn give_up_handlers(&mut self, now: Option<Instant>) {
        while let Some(first) = self.handlers.front() {
            if now.is_some_and(|now| first.until > now) {
                return;
            }
            if let Some(first) = self.handlers.pop_front() {
                let _ = first.done.send(Ok(()));
            }
        }
    }

    /// When the first publisher's, or handler's, patience is over.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let publisher = self.unsynced.get(self.answered()).map(|u| u.until);
        let handler = self.handlers.front().map(|h| h.until);
        publisher.into_iter().chain(handler).min()
    }

    /// How many of the first unsynced were told already: nobody is looked at
    /// twice, however long the disk stands still.
    fn answered(&self) -> usize {
        let gave_up = self.gave_up;
        self.unsynced
            .partition_point(|u| gave_up.is_some_and(|at| u.until <= at))
    }

    /// Answers those who have waited long enough; what they published is kept
    /// all the same as soon as the disk comes on.
    pub(crate) fn give_up(&mut self, now: Instant) -> Vec<(W, Outcome)> {
        self.give_up_handlers(Some(now));
        let first = self.answered();
        self.gave_up = Some(now);
        let late = self.unsynced.iter_mut().skip(first);
        let late = late.take_while(|u| u.until <= now);
        let waiters = late.filter_map(|u| u.waiter.take());
        waiters
            .map(|w| (w, Outcome::Spooled { durable: false }))
            .collect()
    }

    /// What is needed to read messages back, on a thread that may block.
    pub(crate) fn loader(&self, seqs: Vec<Seq>) -> Option<Loader> {
        let named = seqs.into_iter().map(|seq| (seq, self.ids.get(seq)));
        Some(Loader {
            store: self.store.as_ref()?.kept.clone(),
            wanted: named.collect(),
        })
    }

    fn complain(&self, error: &Error) {
        tracing::error!(topic = %self.lane.topic, %error,
            "what is spooled is in memory only; a restart may lose or repeat messages");
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
        self.store.write(Vec::new(), &[self.id]).map(drop)
    }
}

/// Reads messages back.
pub(crate) struct Loader {
    store: Arc<dyn SpoolStore>,
    wanted: Vec<(Seq, Option<KeptId>)>,
}

/// What was read back.
#[derive(Default)]
pub(crate) struct Loaded {
    pub(crate) entries: Vec<(Seq, Entry)>,
    /// Those that are not there, or cannot be understood, with the reason.
    pub(crate) unreadable: Vec<(Seq, Error)>,
}

/// Messages that are read in one go.
const CHUNK: usize = 64;

/// Bytes of payload after which no further chunk is read.
const ENOUGH: usize = 8 * 1024 * 1024;

impl Loader {
    /// Reads, in order, until that is enough. Blocks.
    ///
    /// # Errors
    /// The disk cannot be read at all.
    pub(crate) fn load(self) -> Result<Loaded> {
        let mut loaded = Loaded::default();
        let mut bytes = 0;
        let gone = || {
            Error::new(
                crate::error::ErrorCode::UnknownError,
                "the data folder no longer has it",
            )
        };
        for chunk in self.wanted.chunks(CHUNK) {
            let ids: Vec<KeptId> = chunk.iter().filter_map(|(_, id)| *id).collect();
            let mut bodies: Vec<Result<Option<Bytes>>> = match self.store.read(&ids) {
                Ok(bodies) => bodies.into_iter().map(Ok).collect(),
                // One that is damaged costs its chunk; asked for one by one, the
                // others come.
                Err(error) => {
                    let one = |id: &KeptId| {
                        let read = self.store.read(std::slice::from_ref(id))?;
                        Ok(read.into_iter().next().flatten())
                    };
                    let single: Vec<_> = ids.iter().map(one).collect();
                    if ids.len() > 1 && single.iter().all(Result::is_err) {
                        return Err(error);
                    }
                    single
                }
            };
            bodies.reverse();
            for (seq, id) in chunk {
                let body = match id {
                    Some(_) => bodies.pop().unwrap_or(Ok(None)),
                    None => Ok(None),
                };
                let found = body.and_then(|body| body.ok_or_else(gone));
                match found.and_then(|b| codec::decode(&b)) {
                    Ok(kept) => {
                        bytes += kept.entry.message.size();
                        loaded.entries.push((*seq, kept.entry));
                    }
                    Err(error) => loaded.unreadable.push((*seq, error)),
                }
            }
            if bytes >= ENOUGH {
                break;
            }
        }
        Ok(loaded)
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
