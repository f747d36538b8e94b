//! The task that hands out and settles. It never touches the client: offsets to
//! store go through the shared state to the polling thread.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Future, StreamExt, stream::FuturesUnordered};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    core::Core,
    state::{Held, Settled, State},
};
use crate::{
    adapter::kafka::broker::Backend,
    broker::{BrokerType, Delivery, Settlement, Verdict},
    error::{Error, ErrorCode, Result},
    message::wire::Failure,
};

/// The task's own.
pub(super) struct HandOut {
    pub(super) core: Arc<Core>,
    pub(super) backend: Arc<Backend>,
    pub(super) deliveries: mpsc::Sender<Vec<Delivery>>,
    pub(super) stopping: CancellationToken,
    /// Deliveries of one batch at most.
    pub(super) batch: usize,
}

/// Something that a verdict started and that takes its time.
enum Later {
    /// The dead letter's outcome.
    DeadLetter(u64, Result<()>, Answer),
    /// A rest is over.
    Rested(u64, Failure),
}

type Answer = Option<oneshot::Sender<Result<()>>>;
type Laters = FuturesUnordered<Pin<Box<dyn Future<Output = Later> + Send>>>;

impl HandOut {
    pub(super) async fn run(self) {
        let (verdicts, mut settlements) = mpsc::unbounded_channel::<Settlement>();
        let mut later: Laters = FuturesUnordered::new();
        let mut deliveries = Some(self.deliveries.clone());
        loop {
            let (ready, out) = {
                let state = self.core.state();
                (state.has_ready(), state.handed_out())
            };
            if self.stopping.is_cancelled() {
                // Closing the channel tells the reader that no more come.
                deliveries = None;
                if out == 0 && later.is_empty() {
                    return;
                }
            }
            if self.core.abort.load(std::sync::atomic::Ordering::Acquire) {
                return;
            }
            tokio::select! {
                biased;
                Some(settlement) = settlements.recv() => {
                    // As many at a time as hold the polling thread up for no time.
                    let mut state = self.core.state();
                    self.settle(&mut state, settlement, &mut later);
                    for _ in 1..SETTLED_AT_ONCE {
                        let Ok(more) = settlements.try_recv() else {
                            break;
                        };
                        self.settle(&mut state, more, &mut later);
                    }
                    drop(state);
                    self.core.wake();
                }
                Some(done) = later.next(), if !later.is_empty() => {
                    self.conclude(done);
                    self.core.wake();
                }
                () = self.stopping.cancelled(), if deliveries.is_some() => {
                    self.core.state().stop();
                    self.core.wake();
                }
                () = closed(deliveries.as_ref()), if deliveries.is_some() => {
                    self.stopping.cancel();
                }
                Some(permit) = room(deliveries.as_ref()), if ready && deliveries.is_some() => {
                    let batch = self.next_batch(&verdicts);
                    if !batch.is_empty() {
                        permit.send(batch);
                    }
                    self.core.wake();
                }
                () = self.core.ready.notified() => {}
            }
        }
    }

    fn next_batch(&self, verdicts: &mpsc::UnboundedSender<Settlement>) -> Vec<Delivery> {
        let mut state = self.core.state();
        let mut batch = Vec::new();
        while batch.len() < self.batch {
            let Some((tag, held)) = state.hand_out() else {
                break;
            };
            match tag {
                Some(tag) => batch.push(Delivery::new(held.received, verdicts.clone(), tag)),
                None => {
                    if let Settled::Done(Some((tp, next))) = state.complete(&held) {
                        state.note(tp, next);
                    }
                    batch.push(Delivery::unsettled(held.received));
                }
            }
        }
        batch
    }

    fn settle(&self, state: &mut State, settlement: Settlement, later: &mut Laters) {
        let Settlement { tag, verdict, done } = settlement;
        let recorder = &self.backend.recorder;
        let Some(held) = state.current(tag) else {
            // Stale, and gone from the books either way.
            state.finish(tag);
            return answer(done, Err(stale()));
        };
        let topic = &held.received.topic;
        let verdict = match verdict {
            // In their log it lies already, and a copy would be another letter.
            Verdict::DeadLetter { .. } if self.backend.topology.is_dead_letter_topic(topic) => {
                Verdict::Ack
            }
            verdict => verdict,
        };
        match verdict {
            Verdict::Ack => {
                let settled = state.finish(tag);
                if let Settled::Done(Some((tp, next))) = settled {
                    state.note(tp, next);
                }
                recorder.messages_acked.inc();
                answer(done, Ok(()));
            }
            Verdict::Requeue => {
                state.give_back(tag, redelivered);
                recorder.messages_nacked.inc();
                answer(done, Ok(()));
            }
            Verdict::Retry { delay, failure } => {
                let delay = delay.min(LONGEST_REST);
                later.push(Box::pin(async move {
                    tokio::time::sleep(delay).await;
                    Later::Rested(tag, failure)
                }));
                answer(done, Ok(()));
            }
            Verdict::DeadLetter { failure } => {
                let received = held.received.clone();
                let backend = Arc::clone(&self.backend);
                later.push(Box::pin(async move {
                    let sent = backend.dead_letter(&received, failure).await;
                    if sent.is_err() {
                        // It is handed out, and fails, again: not as fast as that goes.
                        tokio::time::sleep(UNMOVED).await;
                    }
                    Later::DeadLetter(tag, sent, done)
                }));
            }
        }
    }

    fn conclude(&self, done: Later) {
        match done {
            Later::Rested(tag, failure) => {
                self.core.state().give_back(tag, |held| {
                    redelivered(held);
                    let message = Arc::make_mut(&mut held.received.message);
                    message.retry_count = message.retry_count.saturating_add(1);
                    message.error = Some(failure.details.clone());
                    Arc::make_mut(&mut held.received.marks).failure = Some(Box::new(failure));
                });
            }
            Later::DeadLetter(tag, Ok(()), done) => {
                let settled = {
                    let mut state = self.core.state();
                    let settled = state.finish(tag);
                    if let Settled::Done(Some((tp, next))) = &settled {
                        state.note(tp.clone(), *next);
                    }
                    settled
                };
                answer(
                    done,
                    match settled {
                        Settled::Done(_) => Ok(()),
                        Settled::Stale => Err(stale()),
                    },
                );
            }
            Later::DeadLetter(tag, Err(error), done) => {
                // Kept rather than lost: it is handed out again.
                self.core.state().give_back(tag, redelivered);
                answer(done, Err(error));
            }
        }
    }
}

/// How long a message that could not be put among the dead letters stays in hand.
const UNMOVED: Duration = Duration::from_secs(1);

fn redelivered(held: &mut Held) {
    Arc::make_mut(&mut held.received.message).redelivered = true;
}

fn answer(done: Answer, result: Result<()>) {
    if let Some(done) = done {
        // Whoever asked may have gone; the verdict stands.
        let _ = done.send(result);
    }
}

fn stale() -> Error {
    Error::new(
        ErrorCode::AckFailed,
        "the partition was assigned anew since this message was delivered; it will be delivered again",
    )
    .at(BrokerType::Kafka)
}

async fn closed(deliveries: Option<&mpsc::Sender<Vec<Delivery>>>) {
    match deliveries {
        Some(tx) => tx.closed().await,
        None => std::future::pending().await,
    }
}

async fn room(
    deliveries: Option<&mpsc::Sender<Vec<Delivery>>>,
) -> Option<mpsc::Permit<'_, Vec<Delivery>>> {
    match deliveries {
        Some(tx) => tx.reserve().await.ok(),
        None => None,
    }
}

/// Settled under one lock.
const SETTLED_AT_ONCE: usize = 256;

/// A rest in memory holds its partition's offset, so it is not a place for
/// long delays.
const LONGEST_REST: Duration = Duration::from_secs(3600);
