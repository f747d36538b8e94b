//! A processor: tries dead letters again with handlers of their own, one rest
//! longer each time. A letter is taken away only when its handler has taken it;
//! one that does not fit into the batch stays where it is, and comes with a later
//! one. It refuses types that it has no handler for: their letters are not
//! touched.
//!
//! Run one processor over the letters of a log: two of them, in two processes,
//! may try the same letter. A queue gives each letter to one of them.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Backoff, DeadLetter, Decision, Desk, LetterStatus, Outlet, desk::Due, place::Place};
use crate::{
    broker::{
        Handler, HandlerError, Received,
        dispatch::{self, TypeRouter},
    },
    error::{Error, ErrorCode, Result},
    message::{
        Timestamp,
        wire::{Failure, Marks},
    },
    topic::Topic,
};

/// How letters are tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessorOptions {
    /// How long a failed letter rests.
    pub backoff: Backoff,
    /// Attempts of a letter; afterwards it stays pending, for an operator.
    /// Default 5. They are counted anew by each process.
    pub max_attempts: u32,
    /// Letters in hand at a time. Default 100, at most 1,000.
    pub batch: usize,
    /// How long until letters that came meanwhile are looked for. Default 30 s:
    /// each look reads a log to its end.
    pub poll: Duration,
    /// How long a handler may take. Default 5 min, at most 10 min: RabbitMQ ends
    /// a consumer that holds a message for 30 min.
    pub handler_timeout: Duration,
}

impl Default for ProcessorOptions {
    fn default() -> Self {
        Self {
            backoff: Backoff::default(),
            max_attempts: 5,
            batch: 100,
            poll: Duration::from_secs(30),
            handler_timeout: Duration::from_secs(300),
        }
    }
}

impl ProcessorOptions {
    /// # Errors
    /// `INVALID_CONFIG` that names the option.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |why: &str| Err(Error::rejected(ErrorCode::InvalidConfig, why));
        if self.batch == 0 || self.batch > MOST_IN_HAND {
            return wrong("the processor's batch is 1 to 1000 letters");
        }
        if self.max_attempts == 0 {
            return wrong("the processor's max_attempts must be 1 or more");
        }
        if self.handler_timeout.is_zero() || self.handler_timeout > LONGEST_HANDLER {
            return wrong("the processor's handler_timeout is more than 0 and at most 10 min");
        }
        if self.poll.is_zero() || self.backoff.first.is_zero() {
            return wrong("the processor's poll and backoff.first must be more than 0");
        }
        Ok(())
    }
}

/// A running processor. Dropped, it goes on until the hub closes.
#[derive(Debug)]
pub struct DeadLetterProcessor {
    stopping: CancellationToken,
    task: JoinHandle<()>,
}

impl DeadLetterProcessor {
    pub(crate) fn new(stopping: CancellationToken, task: JoinHandle<()>) -> Self {
        Self { stopping, task }
    }

    /// Stops it after the handler that runs, and waits for that.
    pub async fn stop(self) {
        self.stopping.cancel();
        // A panic was its own; there is nothing left to wait for.
        let _ = self.task.await;
    }
}

/// The processor's task. Between two passes it does not keep the hub alive.
pub(crate) async fn run<O: Outlet>(
    desk: Arc<Desk>,
    hub: impl Fn() -> Option<(O, Vec<Place>)>,
    router: TypeRouter,
    options: ProcessorOptions,
    stopping: CancellationToken,
) {
    while !stopping.is_cancelled() {
        let Some((outlet, places)) = hub() else {
            return;
        };
        let done = pass(&desk, &outlet, &places, &router, &options, &stopping).await;
        drop((outlet, places));
        match done {
            // There may be more of them than fitted.
            Ok(tried) if tried >= options.batch => {}
            Ok(_) => rest(&desk, &options, &stopping).await,
            Err(error) => {
                tracing::warn!(%error, "dead letters could not be looked at");
                rest(&desk, &options, &stopping).await;
            }
        }
    }
}

/// Until a letter is due, or new ones may have come.
async fn rest(desk: &Desk, options: &ProcessorOptions, stopping: &CancellationToken) {
    let now = Timestamp::now();
    let due = desk.book().next().map(|at| at.since(now));
    let pause = match due {
        // It was not tried: it cannot be had now, or is another processor's.
        Some(Duration::ZERO) => UNTRIED,
        Some(due) => due.max(SHORTEST),
        None => options.poll,
    };
    let pause = pause.min(options.poll);
    tokio::select! {
        () = stopping.cancelled() => {}
        () = tokio::time::sleep(pause) => {}
    }
}

/// One look and what came of it; answers how many letters were tried.
async fn pass(
    desk: &Desk,
    outlet: &dyn Outlet,
    places: &[Place],
    router: &TypeRouter,
    options: &ProcessorOptions,
    stopping: &CancellationToken,
) -> Result<usize> {
    let due = desk
        .take_due(outlet, places, options.batch, &|kind| router.handles(kind))
        .await?;
    let tried = due.len();
    let mut hands = Hands {
        desk,
        due: due.into(),
    };
    let until = tokio::time::Instant::now() + LONGEST_HOLD;
    while let Some(mut one) = hands.due.pop_front() {
        // What is not tried now goes back untouched.
        if stopping.is_cancelled() || tokio::time::Instant::now() > until {
            hands.desk.put_down(&one.letter.id);
            drop(one.grip.take());
            continue;
        }
        attempt(desk, outlet, one, router, options).await;
    }
    Ok(tried)
}

async fn attempt(
    desk: &Desk,
    outlet: &dyn Outlet,
    mut one: Due<'_>,
    router: &TypeRouter,
    options: &ProcessorOptions,
) {
    let id = one.letter.id.clone();
    let handled = match received(&one.letter, outlet.max_message_bytes()) {
        Ok(received) => {
            let limit = Some(options.handler_timeout);
            dispatch::guarded(async { router.handle(received).await }, limit).await
        }
        Err(error) => Err(HandlerError::reject(error.to_string())),
    };
    let Some(grip) = one.grip.take() else {
        return;
    };
    match handled {
        Ok(()) => {
            let decision = Decision {
                status: LetterStatus::Processed,
                at: Timestamp::now(),
                note: "a processor's handler took it".to_owned(),
            };
            match one.place.settle(&one.letter, grip, decision).await {
                Ok(()) => {
                    outlet.recorder().dead_letters_reprocessed.inc();
                    desk.book().done(&id);
                }
                Err(error) => {
                    tracing::warn!(letter = id, %error, "a letter that was handled stays, and is handled again");
                }
            }
        }
        Err(failed) => {
            let (times, next) = desk.book().failed(
                &id,
                Timestamp::now(),
                &options.backoff,
                options.max_attempts,
                !failed.retryable,
            );
            tracing::warn!(
                letter = id,
                times,
                next = next.map(tracing::field::display),
                "a dead letter failed again: {failed}"
            );
            // Dropped, it goes back to its place.
            drop(grip);
        }
    }
    desk.put_down(&id);
}

/// The letter as its handler gets it: as it failed, under its topic.
///
/// # Errors
/// The topic has no valid name; the message cannot be expanded.
fn received(letter: &DeadLetter, most: usize) -> Result<Received> {
    let topic = letter.original_topic.as_deref().unwrap_or(&letter.place);
    let message = letter
        .whole_message(most)
        .map_err(|why| Error::rejected(ErrorCode::MessageInvalid, why))?;
    Ok(Received {
        topic: Topic::new(topic)?,
        message: Arc::new(message),
        marks: Arc::new(Marks {
            failure: Some(Box::new(Failure {
                reason: letter.failure_reason.clone(),
                details: letter.failure_details.clone(),
                first: letter.first_failure,
                last: letter.last_failure,
                original_topic: topic.to_owned(),
                retries: 0,
            })),
            replay: letter.replay.clone().map(Box::new),
            reprocess: letter.reprocessed,
            ..Marks::default()
        }),
        via: letter.broker,
    })
}

/// What a processor holds. Put down also when its task is dropped half-way.
struct Hands<'a> {
    desk: &'a Desk,
    due: VecDeque<Due<'a>>,
}

impl Drop for Hands<'_> {
    fn drop(&mut self) {
        for one in &self.due {
            self.desk.put_down(&one.letter.id);
        }
    }
}

/// Letters in hand at most.
const MOST_IN_HAND: usize = 1_000;

/// The longest that a handler may take.
const LONGEST_HANDLER: Duration = Duration::from_secs(600);

/// How long letters are held before the rest of a batch goes back: with the
/// longest handler still under the 30 min after which RabbitMQ takes them away.
const LONGEST_HOLD: Duration = Duration::from_secs(900);

/// Before a letter that is due and was not tried is looked for again.
const UNTRIED: Duration = Duration::from_secs(1);

/// Between looks at least.
const SHORTEST: Duration = Duration::from_millis(50);
