//! The desk: what operators and processors ask of dead letters, over all places
//! that keep them. One caller at a time looks at the places of this hub, because
//! what one holds the others would not see.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    Away, DeadLetter, Decision, Edit, LetterPage, LetterQuery, LetterStatus, Reprocessed,
    backoff::Book,
    copy,
    log::Wanted,
    place::{Grip, Look, Place},
    query,
};
use crate::{
    broker::{Outcome, Receipt},
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Marks},
    metrics::MetricsRecorder,
    topic::Topic,
};

/// The way back into the hub.
#[async_trait]
pub(crate) trait Outlet: Send + Sync {
    /// Whether a topic is a queue.
    fn is_queue(&self, topic: &str) -> bool;

    /// Bytes that a message may have.
    fn max_message_bytes(&self) -> usize;

    /// Where this hub counts.
    fn recorder(&self) -> &MetricsRecorder;

    /// Publishes a copy and waits for its outcome.
    async fn publish(&self, topic: &Topic, message: Message, marks: Marks) -> Result<Receipt>;
}

/// What is remembered between calls.
#[derive(Debug)]
pub(crate) struct Desk {
    /// One permit: whoever has it looks.
    turn: Semaphore,
    /// What processors have tried.
    book: Mutex<Book>,
    /// Letters in processors' hands, at most a batch for each.
    in_hand: Mutex<HashMap<String, DeadLetter>>,
}

/// One letter that was looked for.
struct Hold<'a> {
    found: Option<(&'a Place, DeadLetter, Grip)>,
    rest: Vec<Look>,
}

/// What purging did.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Purged {
    /// Decided letters that are gone.
    pub purged: usize,
    /// Places that could not be purged.
    pub away: Vec<Away>,
}

/// What reprocessing many did.
#[derive(Clone, Debug, Default)]
pub struct ReprocessedMany {
    /// One for each letter.
    pub results: Vec<Reprocessed>,
    /// Whether every letter that the query means was done: false when there are
    /// more than the limit, or than the hub holds at a time.
    pub complete: bool,
    /// Places that could not be seen.
    pub away: Vec<Away>,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            turn: Semaphore::new(1),
            book: Mutex::default(),
            in_hand: Mutex::default(),
        }
    }
}

impl Desk {
    /// A page of the letters that a query means, oldest failure first.
    ///
    /// # Errors
    /// The hub closes. A place that cannot be seen is named in the page.
    pub(crate) async fn list(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        query: &LetterQuery,
        offset: usize,
        limit: usize,
    ) -> Result<LetterPage> {
        let _turn = self.turn().await?;
        let (mut found, mut complete, mut away) = (Vec::new(), true, Vec::new());
        for place in places {
            let look = match self.look(outlet, place, query).await {
                Ok(look) => look,
                Err(error) => {
                    away.push(unseen(place, &error));
                    continue;
                }
            };
            complete &= look.complete;
            found.extend(look.letters.iter().map(|(letter, _)| letter.clone()));
            look.end().await;
        }
        let held = lock(&self.in_hand).values().cloned().collect::<Vec<_>>();
        found.retain(|l| held.iter().all(|h| h.id != l.id));
        found.extend(held.into_iter().filter(|l| query.covers(l)));
        Ok(query::page(found, complete, away, offset, limit))
    }

    /// One letter, by its id or, where that names one, its message's.
    ///
    /// # Errors
    /// Several letters are meant, or not every place could be looked at.
    pub(crate) async fn show(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        id: &str,
    ) -> Result<Option<DeadLetter>> {
        let _turn = self.turn().await?;
        let most = outlet.max_message_bytes();
        if let Some(letter) = self.held(id) {
            return Ok(Some(letter.whole(most)));
        }
        let hold = self.find(outlet, places, id).await?;
        let letter = hold.found.as_ref().map(|(_, letter, _)| letter.clone());
        hold.end().await;
        Ok(letter.map(|l| l.whole(most)))
    }

    /// Publishes a copy of one letter, changed where an edit says so.
    ///
    /// # Errors
    /// As [`Desk::show`]; a copy that was refused, or whose fate is not known.
    /// The letter stays open then.
    pub(crate) async fn reprocess(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        id: &str,
        edit: Option<&Edit>,
    ) -> Result<Option<Reprocessed>> {
        let _turn = self.turn().await?;
        self.not_held(id)?;
        let mut hold = self.find(outlet, places, id).await?;
        let done = match hold.found.take() {
            None => Ok(None),
            Some((_, letter, _)) if letter.status == LetterStatus::Processed => {
                Ok(Some(Reprocessed::AlreadyProcessed { letter: letter.id }))
            }
            Some((place, letter, grip)) => {
                self.send(outlet, place, letter, grip, edit).await.map(Some)
            }
        };
        hold.end().await;
        done
    }

    /// Publishes a copy of each letter that a query means, oldest first; `limit`
    /// at most. Discarded ones are meant only where the query names them.
    ///
    /// # Errors
    /// The hub closes. What went wrong with single letters stands with them.
    pub(crate) async fn reprocess_all(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        query: &LetterQuery,
        limit: usize,
    ) -> Result<ReprocessedMany> {
        let _turn = self.turn().await?;
        let mut many = ReprocessedMany {
            complete: true,
            ..ReprocessedMany::default()
        };
        let kinds = (
            query.wants_open(),
            query.status == Some(LetterStatus::Discarded),
        );
        for place in places {
            let look = match self.look_for(outlet, place, query, kinds).await {
                Ok(look) => look,
                Err(error) => {
                    many.away.push(unseen(place, &error));
                    continue;
                }
            };
            many.complete &= look.complete;
            let (letters, rest) = look.apart();
            let (mut chosen, mut left) = (letters, Vec::new());
            chosen.sort_by_key(|(letter, _)| letter.last_failure);
            let room = limit.saturating_sub(many.results.len());
            if chosen.len() > room {
                many.complete = false;
                left.extend(chosen.drain(room..));
            }
            // Given back before anything is published: that may take its time.
            drop(left);
            for (letter, grip) in chosen {
                let id = letter.id.clone();
                let done = self.send(outlet, place, letter, grip, None).await;
                many.results
                    .push(done.unwrap_or_else(|error| Reprocessed::Failed { letter: id, error }));
            }
            rest.end().await;
        }
        Ok(many)
    }

    /// Gives a letter up, for a reason. It can still be reprocessed until it is
    /// purged.
    ///
    /// # Errors
    /// As [`Desk::show`]; `MESSAGE_INVALID` without a reason or for a letter that
    /// was processed; why it could not be kept as discarded.
    pub(crate) async fn discard(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        id: &str,
        reason: &str,
    ) -> Result<Option<DeadLetter>> {
        if reason.trim().is_empty() {
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                "discarding a letter needs a reason",
            ));
        }
        let _turn = self.turn().await?;
        self.not_held(id)?;
        let mut hold = self.find(outlet, places, id).await?;
        let done = match hold.found.take() {
            None => Ok(None),
            Some((_, letter, _)) if letter.status == LetterStatus::Discarded => Ok(Some(letter)),
            Some((_, letter, _)) if letter.status == LetterStatus::Processed => {
                Err(Error::rejected(
                    ErrorCode::MessageInvalid,
                    "the letter was processed already; there is nothing to discard",
                )
                .with_id(letter.id))
            }
            Some((place, letter, grip)) => {
                let decision = Decision {
                    status: LetterStatus::Discarded,
                    at: Timestamp::now(),
                    note: reason.to_owned(),
                };
                let settled = place.settle(&letter, grip, decision.clone()).await;
                settled.map(|()| {
                    outlet.recorder().dead_letters_discarded.inc();
                    lock(&self.book).done(&letter.id);
                    tracing::warn!(
                        letter = letter.id, message = %letter.original_message.id, reason,
                        "a dead letter was discarded"
                    );
                    Some(letter.decided(decision))
                })
            }
        };
        hold.end().await;
        done
    }

    /// Takes away for good what is decided: processed letters, discarded ones,
    /// or both. Never an open one.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for another status.
    pub(crate) async fn purge(
        &self,
        outlet: &dyn Outlet,
        places: &[Place],
        query: &LetterQuery,
    ) -> Result<Purged> {
        if query.status.is_some_and(|s| !s.is_decided()) {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "only processed and discarded letters are purged; discard the others first",
            ));
        }
        let _turn = self.turn().await?;
        let mut done = Purged::default();
        for place in places {
            let purged = self.purge_place(outlet, place, query, &mut done).await;
            if let Err(error) = purged {
                done.away.push(unseen(place, &error));
            }
        }
        Ok(done)
    }

    async fn purge_place(
        &self,
        outlet: &dyn Outlet,
        place: &Place,
        query: &LetterQuery,
        done: &mut Purged,
    ) -> Result<()> {
        let wanted = Wanted {
            open: false,
            decided: true,
            keep: &|letter| covers_but_status(query, letter),
        };
        loop {
            let look = place.look(&wanted, &|t| outlet.is_queue(t)).await?;
            let (letters, rest) = look.apart();
            let complete = rest.complete;
            let before = done.purged;
            for (letter, grip) in letters {
                if letter.status.is_decided() && query.covers(&letter) {
                    place.purge(grip).await?;
                    done.purged += 1;
                }
            }
            rest.end().await;
            // More than fits into one look, as long as there is progress.
            if complete || done.purged == before {
                return Ok(());
            }
        }
    }

    /// Takes up to `most` open letters that are due into a processor's hands.
    /// Also when the next one is due, as far as that is known. Every other letter
    /// goes back, or stays.
    pub(super) async fn take_due<'a>(
        &self,
        outlet: &dyn Outlet,
        places: &'a [Place],
        most: usize,
        handles: &(dyn Fn(&str) -> bool + Send + Sync),
    ) -> Result<Vec<Due<'a>>> {
        let _turn = self.turn().await?;
        let now = Timestamp::now();
        let (mut due, mut seen, mut complete) = (Vec::new(), Default::default(), true);
        for place in places {
            let query = LetterQuery::default();
            let wanted = Wanted {
                open: true,
                decided: false,
                keep: &|letter| covers_but_status(&query, letter),
            };
            // A broker that is away keeps its letters until it is back.
            let Ok(look) = place.look(&wanted, &|t| outlet.is_queue(t)).await else {
                complete = false;
                continue;
            };
            complete &= look.complete;
            let (letters, rest) = look.apart();
            let mut taken = Vec::new();
            for (letter, grip) in letters {
                note(&mut seen, &letter);
                let wanted = handles(&letter.original_message.kind)
                    && lock(&self.book).is_due(&letter.id, now)
                    && !lock(&self.in_hand).contains_key(&letter.id);
                if wanted && due.len() + taken.len() < most {
                    taken.push((letter, grip));
                }
                // Dropped, it goes back.
            }
            for (letter, grip) in taken {
                let mut shown = letter.clone();
                shown.status = LetterStatus::Retrying;
                lock(&self.in_hand).insert(letter.id.clone(), shown);
                due.push(Due {
                    place,
                    letter,
                    grip: Some(grip),
                });
            }
            rest.let_go();
        }
        if complete {
            let held: Vec<String> = lock(&self.in_hand).keys().cloned().collect();
            seen.extend(held);
            lock(&self.book).keep(&seen);
        }
        Ok(due)
    }

    /// The letter is out of the processor's hands.
    pub(super) fn put_down(&self, letter: &str) {
        lock(&self.in_hand).remove(letter);
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }

    /// Publishes the copy of a letter; then, and only then, the letter is decided.
    async fn send(
        &self,
        outlet: &dyn Outlet,
        place: &Place,
        letter: DeadLetter,
        grip: Grip,
        edit: Option<&Edit>,
    ) -> Result<Reprocessed> {
        let now = Timestamp::now();
        let (topic, message, marks) = copy::of(&letter, edit, now, outlet.max_message_bytes())
            .map_err(|e| e.with_id(letter.id.as_str()))?;
        let receipt = outlet.publish(&topic, message, marks).await?;
        let topic = topic.to_string();
        let unsafe_yet = match &receipt.outcome {
            Outcome::Delivered { .. } | Outcome::Spooled { durable: true } => None,
            Outcome::Spooled { durable: false } => {
                Some("the copy is in the memory of this hub until its broker takes it")
            }
            Outcome::Sent { .. } => Some("the broker was not asked to confirm the copy"),
        };
        if let Some(reason) = unsafe_yet {
            return Ok(Reprocessed::LeftOpen {
                letter: letter.id,
                topic,
                receipt,
                reason: reason.to_owned(),
            });
        }
        outlet.recorder().dead_letters_reprocessed.inc();
        let decision = Decision {
            status: LetterStatus::Processed,
            at: Timestamp::now(),
            note: if edit.is_some() {
                format!("edited and published to {topic}")
            } else {
                format!("published to {topic}")
            },
        };
        if let Err(error) = place.settle(&letter, grip, decision).await {
            tracing::warn!(letter = letter.id, %error, "a letter whose copy was published stays open");
            return Ok(Reprocessed::LeftOpen {
                letter: letter.id,
                topic,
                receipt,
                reason: format!("it could not be taken away: {error}"),
            });
        }
        lock(&self.book).done(&letter.id);
        tracing::info!(letter = letter.id, topic, "a dead letter was reprocessed");
        Ok(Reprocessed::Processed {
            letter: letter.id,
            topic,
            receipt,
        })
    }

    /// The letters of a place that a query means, as they stand.
    async fn look(&self, outlet: &dyn Outlet, place: &Place, query: &LetterQuery) -> Result<Look> {
        let kinds = (query.wants_open(), query.wants_decided());
        self.look_for(outlet, place, query, kinds).await
    }

    async fn look_for(
        &self,
        outlet: &dyn Outlet,
        place: &Place,
        query: &LetterQuery,
        (open, decided): (bool, bool),
    ) -> Result<Look> {
        let wanted = Wanted {
            open,
            decided,
            keep: &|letter| covers_but_status(query, letter),
        };
        let mut look = place.look(&wanted, &|t| outlet.is_queue(t)).await?;
        let book = lock(&self.book);
        look.letters.retain_mut(|(letter, _)| {
            overlay(letter, &book);
            query.covers(letter)
        });
        drop(book);
        Ok(look)
    }

    /// The one letter that an id means.
    async fn find<'a>(
        &self,
        outlet: &dyn Outlet,
        places: &'a [Place],
        id: &str,
    ) -> Result<Hold<'a>> {
        let mut away = None;
        let mut rest = Vec::new();
        let mut found: Vec<(&Place, DeadLetter, Grip)> = Vec::new();
        // An id that names a place lies there; any other is a message's, however it
        // reads, and may lie anywhere.
        let narrow = places.iter().any(|place| is_named_by(place, id));
        for place in places {
            if narrow && !is_named_by(place, id) {
                continue;
            }
            let wanted = Wanted {
                open: true,
                decided: true,
                keep: &|letter| letter.id == id || letter.original_message.id.as_str() == id,
            };
            match place.look(&wanted, &|t| outlet.is_queue(t)).await {
                Ok(look) => {
                    let (letters, empty) = look.apart();
                    found.extend(letters.into_iter().map(|(l, grip)| (place, l, grip)));
                    rest.push(empty);
                }
                Err(error) => away = Some(error),
            }
        }
        // A letter's own id is meant before a message's that reads the same.
        if found.iter().any(|(_, l, _)| l.id == id) {
            found.retain(|(_, l, _)| l.id == id);
        }
        // What is open is meant before what was decided.
        if found.iter().any(|(_, l, _)| !l.status.is_decided()) {
            found.retain(|(_, l, _)| !l.status.is_decided());
        }
        let ids: BTreeSet<&str> = found.iter().map(|(_, l, _)| l.id.as_str()).collect();
        if ids.len() > 1 {
            let error = Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "{} dead letters have this message id; name one of {}",
                    ids.len(),
                    ids.into_iter().collect::<Vec<_>>().join(", ")
                ),
            )
            .with_id(id);
            drop(found);
            Hold { found: None, rest }.end().await;
            return Err(error);
        }
        // A letter that was kept as decided, and then not taken away, is there
        // twice; and two foreign messages without an id may look the same.
        let found = found.into_iter().next();
        if let (None, Some(error)) = (&found, away) {
            Hold { found, rest }.end().await;
            return Err(Error::new(
                ErrorCode::BrokerUnavailable,
                "the letter was not found, and not every broker that may have it can be asked now",
            )
            .with_id(id)
            .caused_by(error));
        }
        let found = found.map(|(place, mut letter, grip)| {
            overlay(&mut letter, &lock(&self.book));
            (place, letter, grip)
        });
        Ok(Hold { found, rest })
    }

    fn held(&self, id: &str) -> Option<DeadLetter> {
        let held = lock(&self.in_hand);
        held.get(id)
            .or_else(|| held.values().find(|l| l.original_message.id.as_str() == id))
            .cloned()
    }

    fn not_held(&self, id: &str) -> Result<()> {
        match self.held(id) {
            None => Ok(()),
            Some(letter) => Err(Error::new(
                ErrorCode::BrokerUnavailable,
                "a processor's handler has this letter just now; try again in a moment",
            )
            .with_id(letter.id)),
        }
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>> {
        self.turn.acquire().await.map_err(|e| {
            Error::new(ErrorCode::OperationCanceled, "the desk is closed").caused_by(e)
        })
    }
}

/// A letter in a processor's hands.
pub(super) struct Due<'a> {
    pub(super) place: &'a Place,
    pub(super) letter: DeadLetter,
    pub(super) grip: Option<Grip>,
}

impl Hold<'_> {
    async fn end(self) {
        drop(self.found);
        for look in self.rest {
            look.end().await;
        }
    }
}

impl Look {
    /// The letters, and what is left without them.
    fn apart(mut self) -> (Vec<(DeadLetter, Grip)>, Self) {
        (std::mem::take(&mut self.letters), self)
    }

    /// Ends without waiting: some of what it holds is still worked on.
    fn let_go(self) {}
}

fn note(seen: &mut std::collections::HashSet<String>, letter: &DeadLetter) {
    seen.insert(letter.id.clone());
}

fn overlay(letter: &mut DeadLetter, book: &Book) {
    if !letter.status.is_decided()
        && let Some(next) = book.next_of(&letter.id)
    {
        letter.status = LetterStatus::Retrying;
        letter.next_retry = Some(next);
    }
}

/// The status may still change by what follows in a log, or by what a processor
/// has in mind.
fn covers_but_status(query: &LetterQuery, letter: &DeadLetter) -> bool {
    let query = LetterQuery {
        status: None,
        ..query.clone()
    };
    query.covers(letter)
}

/// Whether an id reads as that of a letter in a place: it begins with the broker,
/// and in a log goes on with the topic.
fn is_named_by(place: &Place, id: &str) -> bool {
    let parts: Vec<&str> = id.split(':').collect();
    match parts.as_slice() {
        [broker, topic, _, _] => *broker == place.broker().as_str() && *topic == place.name(),
        [broker, print] if print.len() == 32 => *broker == place.broker().as_str(),
        _ => false,
    }
}

fn unseen(place: &Place, error: &Error) -> Away {
    Away {
        broker: place.broker(),
        place: place.name().to_owned(),
        reason: error.to_string(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
