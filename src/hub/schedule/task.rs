//! The task that owns what is scheduled: the thin shell round [`Shelf`]. It keeps
//! what comes, publishes what is due, and lets go of what is safe elsewhere. It
//! decides nothing, and waits for one thing never: not for a disk, a lane, or an
//! outcome.
//!
//! ```text
//!   publish --Ask--> shelf --due--> read back --> admitted, one by one --> lane
//!                      |                                                    |
//!                      `--put--> store <--remove-- delivered, or spooled <--'
//! ```

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Page, Place, Scheduled,
    shelf::{Cancelled, Limits, Name, Number, Offered, Shelf, Waiting},
};
use crate::{
    broker::{Outcome, Receipt, Settlement, Verdict},
    error::{Assume, Error, ErrorCode, Result},
    hub::{
        Inner, MessagingHub,
        accepted::Seen,
        close::Left,
        dead::DeadLetters,
        pending,
        publisher::Pending,
        shutting_down,
        spool::{
            ENTRY_OVERHEAD, Entry,
            codec::{self, LaneName},
            store::{KeptId, SpoolStore, Synced},
        },
    },
    message::{Timestamp, wire::Failure},
    topic::Topic,
};

/// Asks that wait for the task at most.
pub(super) const ASKS_BOUND: usize = 1024;

/// Answers that wait for the disk at most; with more nothing is taken in.
const SYNCING: usize = 4096;

/// Messages that are read back at a time.
const READ: usize = 64;

/// Messages whose outcome is waited for at most.
const PUBLISHING: usize = 1024;

/// How long a due message waits for room in its lane before others get their turn.
const ADMIT_PATIENCE: Duration = Duration::from_secs(5);

/// How often the wall clock is looked at: it may be set, which no timer on the
/// steady clock notices.
const WALL_LOOK: Duration = Duration::from_secs(1);

/// A message with all that its publish needs.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Which lane, but for its number.
    pub(crate) lane: LaneName,
    pub(crate) entry: Entry,
}

/// Where a body is.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// In memory only.
    Here(Box<Held>),
    /// In the store. `again`: an earlier process may have published it.
    Kept { id: KeptId, again: bool },
}

/// A message that comes to be scheduled.
pub(super) struct Add {
    pub(super) held: Held,
    pub(super) due: Timestamp,
    /// How long its publisher waits for the disk.
    pub(super) patience: Duration,
    pub(super) answer: oneshot::Sender<Result<Receipt>>,
    /// Set for an id that the caller brought: repeats wait for it too.
    pub(super) seen: Option<Seen>,
}

/// What the task is asked.
pub(super) enum Ask {
    Add(Box<Add>),
    Cancel {
        topic: Topic,
        id: String,
        answer: oneshot::Sender<Result<Scheduled>>,
    },
    Find {
        topic: Topic,
        id: String,
        answer: oneshot::Sender<Option<Scheduled>>,
    },
    List {
        topic: Option<Topic>,
        after: Option<Place>,
        limit: usize,
        answer: oneshot::Sender<Page>,
    },
}

/// What is shown without asking the task.
#[derive(Debug, Default)]
pub(super) struct Status {
    pub(super) messages: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// A message that an earlier process left.
pub(crate) struct Found {
    pub(crate) id: KeptId,
    pub(crate) waiting: Waiting<()>,
}

type Loaded = Vec<(Number, Result<Held>)>;

/// What is done with a message that is due, and the message.
type Step<T> = BoxFuture<'static, (Number, Box<Held>, Result<T>)>;

pub(super) struct Task {
    hub: Weak<Inner>,
    dead: DeadLetters,
    shelf: Shelf<Body>,
    store: Option<Arc<dyn SpoolStore>>,
    asks: mpsc::Receiver<Ask>,
    status: Arc<Status>,
    loading: Option<BoxFuture<'static, Loaded>>,
    ready: VecDeque<(Number, Box<Held>)>,
    admitting: Option<Step<Pending>>,
    publishing: FuturesUnordered<Step<Receipt>>,
    syncing: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Those that are on their way to the dead letters.
    letters: mpsc::UnboundedSender<Settlement>,
    buried: mpsc::UnboundedReceiver<Settlement>,
}

/// What the task is made of.
pub(super) struct Parts {
    pub(super) hub: Weak<Inner>,
    pub(super) dead: DeadLetters,
    pub(super) limits: Limits,
    pub(super) store: Option<Arc<dyn SpoolStore>>,
    pub(super) found: Vec<Found>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) status: Arc<Status>,
}

impl Task {
    pub(super) fn new(parts: Parts) -> Self {
        let mut shelf = Shelf::new(parts.limits);
        let now = Timestamp::now();
        for Found { id, waiting } in parts.found {
            // It may have been on its way when that process ended.
            let again = waiting.due <= now;
            shelf.offer(waiting.with(Body::Kept { id, again }), true);
        }
        let (letters, buried) = mpsc::unbounded_channel();
        let task = Self {
            hub: parts.hub,
            dead: parts.dead,
            shelf,
            store: parts.store,
            asks: parts.asks,
            status: parts.status,
            loading: None,
            ready: VecDeque::new(),
            admitting: None,
            publishing: FuturesUnordered::new(),
            syncing: FuturesUnordered::new(),
            letters,
            buried,
        };
        task.show();
        task
    }

    /// Runs until it is stopped; what is under way then gets until `stop` says.
    pub(super) async fn run(
        mut self,
        stop: CancellationToken,
        until: oneshot::Receiver<Instant>,
    ) -> Left {
        loop {
            self.advance();
            self.show();
            let nap = self.nap(Timestamp::now());
            tokio::select! {
                () = stop.cancelled() => break,
                ask = self.asks.recv(), if self.syncing.len() < SYNCING => match ask {
                    Some(ask) => self.asked(ask),
                    None => break,
                },
                () = tokio::time::sleep(nap.unwrap_or_default()), if nap.is_some() => {}
                loaded = pending(&mut self.loading) => self.loaded(loaded),
                (number, held, admitted) = pending(&mut self.admitting) => {
                    self.admitted(number, held, admitted);
                }
                Some((number, held, outcome)) = self.publishing.next() => {
                    self.published(number, held, outcome);
                }
                Some(()) = self.syncing.next() => {}
                Some(settlement) = self.buried.recv() => self.buried(&settlement),
            }
        }
        self.asks.close();
        // Also those for which room was promised: they are on their way.
        while let Some(ask) = self.asks.recv().await {
            self.refuse(ask);
        }
        // A hub that was dropped waits for nothing.
        let until = until.await.unwrap_or_else(|_| Instant::now());
        let ended = tokio::time::timeout_at(until, async {
            while let Some((number, held, outcome)) = self.publishing.next().await {
                self.published(number, held, outcome);
            }
            while self.syncing.next().await.is_some() {}
        });
        if ended.await.is_err() {
            tracing::warn!(
                "scheduled messages were on their way when the grace period was over; they may come twice"
            );
        }
        let mut left = Left::default();
        for waiting in self.shelf.drain() {
            match waiting.body {
                Body::Here(_) => left.in_memory += 1,
                Body::Kept { .. } => left.kept += 1,
            }
        }
        self.show();
        left
    }

    fn show(&self) {
        self.status.messages.store(self.shelf.len() as u64, Relaxed);
        self.status.bytes.store(self.shelf.bytes() as u64, Relaxed);
    }

    /// How long nothing will happen by itself; none: until something comes.
    fn nap(&self, now: Timestamp) -> Option<Duration> {
        if self.loading.is_some() || !self.ready.is_empty() || self.publishing.len() >= PUBLISHING {
            return None;
        }
        let due = self.shelf.next_due()?;
        Some(due.since(now).clamp(Duration::from_millis(1), WALL_LOOK))
    }

    /// Starts what can be started.
    fn advance(&mut self) {
        let busy = self.loading.is_some() || !self.ready.is_empty();
        if !busy && self.publishing.len() < PUBLISHING {
            let due = self.shelf.take_due(Timestamp::now(), READ);
            if !due.is_empty() {
                self.loading = Some(self.load(&due));
            }
        }
        while self.admitting.is_none()
            && self.publishing.len() < PUBLISHING
            && let Some((number, held)) = self.ready.pop_front()
        {
            if held.entry.message.is_expired(Timestamp::now()) {
                self.bury(
                    number,
                    &held,
                    "expired",
                    "the message expired before its time came",
                );
                continue;
            }
            let Some(hub) = self.hub.upgrade().map(MessagingHub) else {
                return;
            };
            self.admitting = Some(Box::pin(async move {
                let admitted = tokio::time::timeout(ADMIT_PATIENCE, hub.enqueue_due(&held)).await;
                let admitted = admitted.unwrap_or_else(|_| {
                    Err(Error::new(
                        ErrorCode::Timeout,
                        "no room in its lane; the broker is slower than the publishers",
                    ))
                });
                (number, held, admitted)
            }));
        }
    }

    /// Reads back what is due, in the order of its time.
    fn load(&self, due: &[Number]) -> BoxFuture<'static, Loaded> {
        let mut loaded: Vec<(Number, Option<Result<Held>>)> = Vec::new();
        let mut wanted: Vec<(usize, KeptId, bool)> = Vec::new();
        for number in due {
            let Some(waiting) = self.shelf.get(*number) else {
                continue;
            };
            match &waiting.body {
                Body::Here(held) => loaded.push((*number, Some(Ok((**held).clone())))),
                Body::Kept { id, again } => {
                    wanted.push((loaded.len(), *id, *again));
                    loaded.push((*number, None));
                }
            }
        }
        let store = self.store.clone();
        Box::pin(async move {
            if let Some(store) = store
                && !wanted.is_empty()
            {
                let ids: Vec<KeptId> = wanted.iter().map(|(_, id, _)| *id).collect();
                let bodies = tokio::task::spawn_blocking(move || store.read(&ids))
                    .await
                    .unwrap_or_else(
                        |e| Err(unreadable("a look at the disk panicked").caused_by(e)),
                    );
                for (n, (place, _, again)) in wanted.into_iter().enumerate() {
                    let held = match &bodies {
                        Ok(bodies) => match bodies.get(n).cloned().flatten() {
                            Some(body) => codec::decode(&body).map(|kept| Held {
                                lane: kept.lane,
                                entry: {
                                    let mut entry = kept.entry;
                                    entry.marks.possible_duplicate |= again;
                                    entry
                                },
                            }),
                            None => Err(unreadable("its record is gone")),
                        },
                        Err(error) => Err(error.clone()),
                    };
                    if let Some((_, slot)) = loaded.get_mut(place) {
                        *slot = Some(held);
                    }
                }
            }
            loaded
                .into_iter()
                .map(|(number, held)| {
                    let held = held.unwrap_or_else(|| Err(unreadable("there is no store")));
                    (number, held)
                })
                .collect()
        })
    }

    fn loaded(&mut self, loaded: Loaded) {
        self.loading = None;
        for (number, held) in loaded {
            match held {
                Ok(held) => self.ready.push_back((number, Box::new(held))),
                Err(error) => self.failed(number, &error),
            }
        }
    }

    fn admitted(&mut self, number: Number, held: Box<Held>, admitted: Result<Pending>) {
        self.admitting = None;
        match admitted {
            Ok(pending) => self
                .publishing
                .push(Box::pin(async move { (number, held, pending.await) })),
            Err(error) => self.published(number, held, Err(error)),
        }
    }

    fn published(&mut self, number: Number, held: Box<Held>, outcome: Result<Receipt>) {
        match outcome {
            Ok(receipt) => {
                let persistent = held.entry.message.is_persistent();
                // In a memory spool it would not outlive this process, as its
                // record does: then a restart repeats it, marked.
                let weaker = persistent && receipt.outcome == Outcome::Spooled { durable: false };
                self.let_go(number, !weaker);
            }
            Err(error) if error.assume() == Assume::Rejected => {
                self.bury(number, &held, "refused", error.message());
            }
            Err(error) => {
                if error.assume() == Assume::Unknown {
                    self.may_come_again(number);
                }
                self.failed(number, &error);
            }
        }
    }

    fn may_come_again(&mut self, number: Number) {
        let Some(waiting) = self.shelf.get(number) else {
            return;
        };
        let mut body = waiting.body.clone();
        match &mut body {
            Body::Here(held) => held.entry.marks.possible_duplicate = true,
            Body::Kept { again, .. } => *again = true,
        }
        self.shelf.moved(number, body);
    }

    fn failed(&mut self, number: Number, error: &Error) {
        if let Some(waiting) = self.shelf.get(number) {
            tracing::warn!(topic = %waiting.name.topic, id = %waiting.name.id, %error,
                "a scheduled message could not be published; it is tried again");
        }
        self.shelf
            .failed(number, Timestamp::now(), &error.to_string());
    }

    fn bury(&mut self, number: Number, held: &Held, reason: &str, details: &str) {
        let entry = &held.entry;
        let topic = &held.lane.topic;
        let mut marks = entry.marks.clone();
        let failure = Failure::now(reason, details, topic.as_str(), marks.failure.as_deref());
        marks.failure = Some(Box::new(failure));
        self.dead
            .copy(topic, entry.message.clone(), marks, &self.letters, number);
    }

    fn buried(&mut self, settlement: &Settlement) {
        match settlement.verdict {
            Verdict::Ack => self.let_go(settlement.tag, true),
            _ => self.shelf.failed(
                settlement.tag,
                Timestamp::now(),
                "its dead letter could not be kept",
            ),
        }
    }

    /// Lets go of a message that is safe elsewhere.
    fn let_go(&mut self, number: Number, forget: bool) {
        let Some(waiting) = self.shelf.done(number) else {
            return;
        };
        if forget {
            let _ = self.forget(&waiting.body);
        }
    }

    /// Removes a record. Says when that is on the disk.
    fn forget(&self, body: &Body) -> Result<Option<u64>> {
        let (Some(store), Body::Kept { id, .. }) = (&self.store, body) else {
            return Ok(None);
        };
        let written = store.write(Vec::new(), &[*id]);
        if let Err(error) = &written {
            tracing::error!(%error, "a scheduled message that is done stays in the data folder; a restart would repeat it");
        }
        Ok(Some(written?.number))
    }

    fn asked(&mut self, ask: Ask) {
        match ask {
            Ask::Add(add) => self.add(*add),
            Ask::Cancel { topic, id, answer } => self.cancel(&topic, &id, answer),
            Ask::Find { topic, id, answer } => {
                let found = self.shelf.find(&topic, &id).next().map(Scheduled::of);
                // Whoever dropped the future abandoned the answer.
                let _ = answer.send(found);
            }
            Ask::List {
                topic,
                after,
                limit,
                answer,
            } => {
                let after = after.map(|place| (place.at, place.number));
                let page = self.shelf.page(topic.as_ref(), after, limit);
                let next = page
                    .last()
                    .filter(|_| page.len() == limit)
                    .map(|(number, last)| Place {
                        at: last.next,
                        number: *number,
                    });
                let scheduled = page.into_iter().map(|(_, w)| Scheduled::of(w)).collect();
                let _ = answer.send(Page {
                    total: self.shelf.len() as u64,
                    scheduled,
                    next,
                });
            }
        }
    }

    fn add(&mut self, add: Add) {
        let Add {
            held,
            due,
            patience,
            answer,
            mut seen,
        } = add;
        let message = &held.entry.message;
        let (id, persistent) = (message.id.clone(), message.is_persistent());
        let waiting = Waiting::of(&held.lane.topic, &held.entry, due);
        let record = self
            .store
            .as_ref()
            .map(|store| (store.clone(), codec::encode(&held.lane, 0, &held.entry)));
        let topic = held.lane.topic.clone();
        let waiting = waiting.with(Body::Here(Box::new(held)));
        let number = match self.shelf.offer(waiting, false) {
            Offered::Taken(number) => {
                if let Some(seen) = &mut seen {
                    seen.hand_over(true);
                }
                number
            }
            // It was accepted before, in a window longer than the intake's.
            Offered::Known(number) => {
                let known = self.shelf.get(number).map(|w| &w.body);
                // In memory it may be for want of a disk that takes it.
                let durable = persistent && matches!(known, Some(Body::Kept { .. }));
                return reply(answer, seen, spooled(id, durable));
            }
            Offered::Full => {
                let full = Error::new(
                    ErrorCode::SpoolFull,
                    "no more messages can be scheduled: hub.schedule.max_messages or max_bytes is reached",
                );
                return reply(
                    answer,
                    seen,
                    Err(full.on(topic.as_str()).with_id(id.as_str())),
                );
            }
        };
        let Some((store, record)) = record else {
            return reply(answer, seen, spooled(id, false));
        };
        let written = record.and_then(|body| store.write(vec![body], &[]));
        match written {
            Ok(written) => {
                let kept = Body::Kept {
                    id: written.id,
                    again: false,
                };
                self.shelf.moved(number, kept);
                if !persistent {
                    return reply(answer, seen, spooled(id, false));
                }
                let mut synced = store.synced();
                self.syncing.push(Box::pin(async move {
                    let wait = synced.wait_for(|s| is_over(s, written.number));
                    let durable = match tokio::time::timeout(patience, wait).await {
                        Ok(Ok(s)) => s.lsn >= written.number,
                        Ok(Err(_)) | Err(_) => false,
                    };
                    reply(answer, seen, spooled(id, durable));
                }));
            }
            Err(error) => {
                tracing::error!(%topic, %id, %error, "a scheduled message is in memory only");
                reply(answer, seen, spooled(id, false));
            }
        }
    }

    fn cancel(&mut self, topic: &Topic, id: &str, answer: oneshot::Sender<Result<Scheduled>>) {
        let cancelled = match self.shelf.cancel(topic, id) {
            Cancelled::Out(waiting) => waiting,
            Cancelled::TooLate => {
                let _ = answer.send(Err(Error::rejected(
                    ErrorCode::OperationCanceled,
                    "it is being published; it is too late to call it off",
                )
                .on(topic.as_str())
                .with_id(id)));
                return;
            }
            Cancelled::Unknown => {
                let _ = answer.send(Err(super::unknown(topic, id)));
                return;
            }
        };
        if let Some(hub) = self.hub.upgrade() {
            // The same id may be scheduled anew.
            hub.accepted.forget(topic, &cancelled.name.id);
        }
        let scheduled = Scheduled::of(&cancelled);
        let number = match self.forget(&cancelled.body) {
            Ok(Some(number)) => number,
            Ok(None) => {
                let _ = answer.send(Ok(scheduled));
                return;
            }
            Err(error) => {
                let _ = answer.send(Err(error));
                return;
            }
        };
        let Some(store) = &self.store else { return };
        let mut synced = store.synced();
        self.syncing.push(Box::pin(async move {
            let done = match synced.wait_for(|s| is_over(s, number)).await {
                Ok(s) if s.lsn >= number => Ok(scheduled),
                _ => Err(Error::new(
                    ErrorCode::OperationCanceled,
                    "it is called off here, but its record could not be removed from the data folder: a restart would bring it back",
                )),
            };
            let _ = answer.send(done);
        }));
    }

    fn refuse(&self, ask: Ask) {
        if let Ask::Add(add) = ask {
            reply(add.answer, add.seen, Err(shutting_down()));
        }
        // The others see that nobody answers.
    }
}

impl Waiting<()> {
    /// A message that has not been tried yet.
    pub(super) fn of(topic: &Topic, entry: &Entry, due: Timestamp) -> Self {
        let message = &entry.message;
        Self {
            name: Name {
                topic: topic.clone(),
                id: message.id.clone(),
                copy: entry.marks.reprocess,
            },
            kind: message.kind.clone(),
            due,
            next: due,
            failures: 0,
            error: None,
            size: message.size() + ENTRY_OVERHEAD,
            body: (),
            in_hand: false,
        }
    }
}

impl<B> Waiting<B> {
    fn with<C>(self, body: C) -> Waiting<C> {
        Waiting {
            name: self.name,
            kind: self.kind,
            due: self.due,
            next: self.next,
            failures: self.failures,
            error: self.error,
            size: self.size,
            body,
            in_hand: self.in_hand,
        }
    }
}

fn is_over(synced: &Synced, number: u64) -> bool {
    synced.lsn >= number || synced.poisoned.is_some() || synced.closed
}

#[allow(clippy::unnecessary_wraps, reason = "as the answer is")]
fn spooled(id: crate::message::MessageId, durable: bool) -> Result<Receipt> {
    Ok(Receipt {
        id,
        outcome: Outcome::Spooled { durable },
    })
}

fn reply(answer: oneshot::Sender<Result<Receipt>>, seen: Option<Seen>, result: Result<Receipt>) {
    if let Some(seen) = seen {
        seen.settle(&result);
    }
    // Whoever dropped the future abandoned the answer.
    let _ = answer.send(result);
}

fn unreadable(why: &str) -> Error {
    Error::new(
        ErrorCode::UnknownError,
        format!("a scheduled message cannot be read back: {why}"),
    )
}
