//! A consumer that spans a primary broker and the spool: one stream of
//! deliveries, each message once for its group, settled where it came from.
//!
//! ```text
//!   primary consumer --.
//!                       >--- span (dedup) ---> reader
//!   lanes (spool)    --'        <--- verdicts
//! ```

use std::sync::{Arc, atomic::AtomicUsize};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

#[cfg(feature = "schema")]
use super::schemas::{self, Checked, Checks};
use super::{
    group::{Group, Lease, Taken},
    handover::hand_over,
    lane::task::{Reader, Readers},
    pending as waited,
    relay::{Relay, Upstream, pass},
    resting,
};
use crate::broker::{
    ConnectionState, Consumer, ConsumerControl, Delivery, Received, Settlement, Verdict,
    consumer::{ConsumerState, report},
};
use crate::{
    compression::{self, UNDECODABLE},
    error::{Error, ErrorCode, Result},
    message::wire::Failure,
    metrics::MetricsRecorder,
    topology::Topology,
};

/// What a span needs.
pub(crate) struct Parts {
    pub(crate) primary: Consumer,
    pub(crate) connection: watch::Receiver<ConnectionState>,
    /// Where spooled messages come from, with what must be done to end that.
    pub(crate) local: Option<Local>,
    pub(crate) group: Arc<Group>,
    /// The hub closes: stop handing out.
    pub(crate) closing: CancellationToken,
    /// Batches that wait for the reader at most.
    pub(crate) buffer: usize,
    /// Bytes that a payload may have once it is expanded.
    pub(crate) most: usize,
    /// Counts what no handler saw.
    pub(crate) recorder: Arc<MetricsRecorder>,
    /// Knows where dead letters lie.
    pub(crate) topology: Arc<Topology>,
    /// It reads a topic in which failed events rest, to which each attempt that fails
    /// comes again as another message of the same id. Others may cover such topics by
    /// chance, and pass over them.
    pub(crate) rests: bool,
    /// What payloads must look like; none: anything.
    #[cfg(feature = "schema")]
    pub(crate) checks: Option<Checks>,
}

/// A reader that is registered with the lanes.
pub(crate) struct Local {
    pub(crate) id: u64,
    pub(crate) deliveries: mpsc::Receiver<Vec<Delivery>>,
    pub(crate) registry: Arc<watch::Sender<Readers>>,
    /// What failed is tried again where it is: no other attempt of it is made.
    pub(crate) in_place: bool,
}

impl Drop for Local {
    fn drop(&mut self) {
        let id = self.id;
        self.registry.send_modify(|list| {
            *list = Arc::new(list.iter().filter(|r| r.id != id).cloned().collect());
        });
    }
}

impl Local {
    /// Registers a reader of spooled messages.
    pub(crate) fn register(
        registry: &Arc<watch::Sender<Readers>>,
        id: u64,
        pattern: crate::topic::Pattern,
        group: Option<Arc<str>>,
        limit: usize,
        buffer: usize,
    ) -> Self {
        let (tx, deliveries) = mpsc::channel(buffer.max(1));
        let reader = Arc::new(Reader {
            id,
            pattern,
            deliveries: tx,
            group: group.clone(),
            limit,
            in_hand: AtomicUsize::new(0),
        });
        registry.send_modify(|list| {
            let mut new: Vec<Arc<Reader>> = list.to_vec();
            new.push(reader);
            *list = Arc::new(new);
        });
        Self {
            id,
            deliveries,
            registry: registry.clone(),
            in_place: group.is_some(),
        }
    }
}

/// Starts a span; the returned future is its task, to be spawned by an owner.
pub(crate) fn start(parts: Parts) -> (Consumer, impl Future<Output = ()> + Send + 'static) {
    let (control, stopping, report) = ConsumerControl::new();
    let (out, deliveries) = mpsc::channel(parts.buffer.max(1));
    let (relay, verdicts) = Relay::new();
    let retry = parts.primary.retry;
    let task = Span {
        parts,
        moving: FuturesUnordered::new(),
        answers: FuturesUnordered::new(),
        out: Some(out),
        relay,
        asking: None,
        unlooked: (Vec::new(), false),
        stopping,
        report,
    };
    (
        Consumer {
            deliveries,
            control,
            retry,
        },
        task.run(verdicts),
    )
}

/// What is noted on a delivery in a reader's hands.
struct Held {
    lease: Option<Lease>,
    /// A retry of it is the same delivery again, and the copy that the primary
    /// may bring meanwhile is as good.
    in_place: bool,
    /// It lies in the queue of dead letters.
    in_grave: bool,
}

/// A retry or a dead letter whose copy the source was asked to make.
struct Moved {
    lease: Lease,
    comes: Comes,
    outcome: Result<()>,
    done: Option<oneshot::Sender<Result<()>>>,
}

/// What comes to the group of a message that was moved.
#[derive(Clone, Copy)]
enum Comes {
    /// Its next attempt.
    Attempt,
    /// Nothing more: it is among the dead letters.
    Nothing,
    /// It again: it was read among the dead letters, and stays there.
    Itself,
}

fn gone() -> Error {
    Error::new(
        ErrorCode::AckFailed,
        "the source was gone before the verdict was carried out; the message comes again",
    )
}

struct Span {
    parts: Parts,
    /// At most one for each delivery that was handed out.
    moving: FuturesUnordered<BoxFuture<'static, Moved>>,
    /// Acks that the source has not answered; as many as were held at most.
    answers: FuturesUnordered<BoxFuture<'static, ()>>,
    out: Option<mpsc::Sender<Vec<Delivery>>>,
    relay: Relay<Held>,
    /// A schema that has to be known before the rest of a batch can be looked at.
    asking: Option<BoxFuture<'static, ()>>,
    /// That rest, and whether it is in place.
    unlooked: (Vec<Delivery>, bool),
    stopping: CancellationToken,
    report: watch::Sender<ConsumerState>,
}

/// Verdicts taken up in one turn.
const TURN: usize = 256;

impl Span {
    async fn run(mut self, mut verdicts: mpsc::UnboundedReceiver<Settlement>) {
        let mut primary_state = self.parts.primary.control.watch();
        let mut pending: Vec<Delivery> = Vec::new();
        let mut settled: Vec<Settlement> = Vec::with_capacity(TURN);
        let mut primary_open = true;
        loop {
            self.show_state(&primary_state.borrow_and_update());
            let want = pending.is_empty() && self.out.is_some() && self.asking.is_none();
            tokio::select! {
                biased;
                n = verdicts.recv_many(&mut settled, TURN) => {
                    debug_assert!(n > 0, "the span holds a sender itself");
                    for s in settled.drain(..) {
                        self.settle(s);
                    }
                }
                Some(moved) = self.moving.next() => self.moved(moved),
                () = self.parts.closing.cancelled(), if !self.stopping.is_cancelled() => {
                    self.stopping.cancel();
                }
                () = self.stopping.cancelled(), if self.out.is_some() => {
                    // What the reader has not got is given back by being
                    // dropped; what it has can still be settled.
                    self.out = None;
                    pending.clear();
                    self.asking = None;
                    self.unlooked.0.clear();
                    self.parts.primary.control.begin_stop();
                    self.parts.local = None;
                    self.parts.primary.deliveries.close();
                    while self.parts.primary.deliveries.try_recv().is_ok() {}
                }
                sent = hand_over(&self.out, &mut pending), if !pending.is_empty() => {
                    if !sent {
                        // The reader dropped its end without a word.
                        self.stopping.cancel();
                    }
                }
                // Noticed also while nothing arrives: an abandoned reader must
                // not go on holding a subscription that takes from others.
                () = abandoned(&self.out), if self.out.is_some() => self.stopping.cancel(),
                batch = self.parts.primary.deliveries.recv(), if (want || self.out.is_none()) && primary_open => {
                    match batch {
                        // A source with room promised to it may still send after
                        // the stop: that goes back too, or the source waits for
                        // its settlement for ever.
                        Some(late) if self.out.is_none() => drop(late),
                        Some(batch) => pending = self.take(batch, false),
                        // The source has ended, by itself or because its broker
                        // was closed; its last word may come a little later.
                        None => {
                            primary_open = false;
                            self.stopping.cancel();
                        }
                    }
                }
                Some((batch, in_place)) = receive(&mut self.parts.local), if want => {
                    pending = self.take(batch, in_place);
                }
                () = waited(&mut self.asking) => {
                    self.asking = None;
                    let (rest, in_place) = std::mem::take(&mut self.unlooked);
                    pending.extend(self.take(rest, in_place));
                }
                Some(()) = self.answers.next() => {}
                Ok(()) = primary_state.changed() => {}
                Ok(()) = self.parts.connection.changed() => {}
            }
            let idle = self.moving.is_empty() && self.answers.is_empty();
            if self.out.is_none() && !primary_open && self.relay.is_empty() && idle {
                break;
            }
        }
        self.parts.primary.control.stop().await;
        let last = match self.parts.primary.control.failure() {
            Some(why) => ConsumerState::Failed(why),
            None => ConsumerState::Stopped,
        };
        let _ = self.report.send(last);
    }

    /// With the primary away, a subscription that reads the spool is live.
    fn show_state(&self, primary: &ConsumerState) {
        if self.out.is_none() {
            return;
        }
        let away = !self.parts.connection.borrow().connected;
        let now = match primary {
            ConsumerState::Starting if away && self.parts.local.is_some() => ConsumerState::Active,
            ConsumerState::Stopped => return,
            other => other.clone(),
        };
        report(&self.report, &now);
    }

    /// Lets each message of a batch through once.
    fn take(&mut self, batch: Vec<Delivery>, in_place: bool) -> Vec<Delivery> {
        let mut out = Vec::with_capacity(batch.len());
        #[cfg_attr(not(feature = "schema"), allow(unused_mut))]
        let mut batch = batch.into_iter();
        // With schemas the rest of it may have to wait.
        #[cfg_attr(not(feature = "schema"), allow(clippy::while_let_on_iterator))]
        while let Some(delivery) = batch.next() {
            if !self.parts.rests && resting::is_resting(&delivery.topic) {
                delivery.settle_now(Verdict::Ack);
                continue;
            }
            // For a reader without a group nothing is buried: others have it as well.
            let buries = !delivery.is_settled();
            let keeps = |topic: &str| self.keeps_letters(topic);
            let Some(delivery) = expanded(delivery, self.parts.most, keeps) else {
                self.parts
                    .recorder
                    .messages_dead_lettered
                    .add(u64::from(buries));
                continue;
            };
            #[cfg(feature = "schema")]
            let looked = match &self.parts.checks {
                Some(checks) => checks.look(delivery),
                None => Checked::Fits(delivery),
            };
            #[cfg(feature = "schema")]
            let delivery = match looked {
                Checked::Fits(delivery) => delivery,
                Checked::Gone => {
                    self.parts
                        .recorder
                        .messages_dead_lettered
                        .add(u64::from(buries));
                    continue;
                }
                Checked::Ask(delivery, guard, question) => {
                    let closing = self.parts.closing.clone();
                    self.asking = Some(schemas::ask(guard, question, closing));
                    let rest = std::iter::once(delivery).chain(batch).collect();
                    self.unlooked = (rest, in_place);
                    break;
                }
            };
            let is_letter = delivery.is_dead_letter() && self.keeps_letters(&delivery.topic);
            let taken = match is_letter {
                true => self.parts.group.take_in_letter(delivery),
                false => self.parts.group.take_in(delivery),
            };
            if let Taken::New(delivery, lease) = taken {
                let (received, upstream) = delivery.into_parts();
                out.push(self.wrap(received, upstream, lease, in_place));
            }
        }
        out
    }

    /// Whether dead letters lie in a queue or topic.
    fn keeps_letters(&self, name: &str) -> bool {
        let topology = &self.parts.topology;
        topology.keeps_dead_letters(name) || topology.is_dead_letter_topic(name)
    }

    fn wrap(
        &mut self,
        received: Received,
        upstream: Option<Upstream>,
        lease: Option<Lease>,
        in_place: bool,
    ) -> Delivery {
        // Live reading without a group: handing out is all there is.
        let lease = match lease {
            Some(lease) if upstream.is_none() => {
                self.parts.group.commit(lease);
                None
            }
            lease => lease,
        };
        let held = Held {
            lease,
            in_place,
            in_grave: received.topic.as_str() == self.parts.topology.dead_letter_queue(),
        };
        self.relay.wrap(received, upstream, held)
    }

    fn settle(&mut self, settlement: Settlement) {
        let Settlement { tag, verdict, done } = settlement;
        let Some((upstream, held)) = self.relay.take(tag) else {
            return;
        };
        let done = match (held.lease, &verdict) {
            (Some(lease), Verdict::Retry { .. }) if held.in_place => {
                self.parts.group.release(lease);
                done
            }
            (Some(lease), Verdict::Requeue) => {
                self.parts.group.release(lease);
                done
            }
            // Handled is handled, whether or not the broker hears of it.
            (Some(lease), Verdict::Ack) => {
                if self.parts.rests {
                    // Handled, or copied for another attempt: this one is over.
                    self.parts.group.retried(lease);
                } else {
                    self.parts.group.commit(lease);
                }
                done.map(|answer| {
                    let (done, upstream) = oneshot::channel();
                    let closing = self.parts.closing.clone();
                    self.answers
                        .push(Box::pin(acknowledged(upstream, answer, closing)));
                    done
                })
            }
            // Not handled, and perhaps nowhere else yet: only once the source
            // says that the copy is safe may this one count as a duplicate. Had
            // the copy failed, the original comes again and must be handed out.
            (Some(lease), Verdict::Retry { .. } | Verdict::DeadLetter { .. }) => {
                let comes = match verdict {
                    Verdict::Retry { .. } => Comes::Attempt,
                    _ if held.in_grave => Comes::Itself,
                    _ => Comes::Nothing,
                };
                let (answer, outcome) = oneshot::channel();
                self.moving.push(Box::pin(async move {
                    let outcome = outcome.await.unwrap_or_else(|_| Err(gone()));
                    Moved {
                        lease,
                        comes,
                        outcome,
                        done,
                    }
                }));
                Some(answer)
            }
            (None, _) => done,
        };
        pass(&upstream, verdict, done);
    }

    /// A copy was made, or was not.
    fn moved(&self, moved: Moved) {
        match (&moved.outcome, moved.comes) {
            (Ok(()), Comes::Attempt) => self.parts.group.retried(moved.lease),
            (Ok(()), Comes::Nothing) => self.parts.group.commit(moved.lease),
            (Ok(()), Comes::Itself) | (Err(_), _) => self.parts.group.release(moved.lease),
        }
        if let Some(done) = moved.done {
            let _ = done.send(moved.outcome);
        }
    }
}

/// A delivery as it was published, if a hub compressed it: the reader gets it
/// whole, while the source keeps what it holds, and moves that should the message
/// fail. `None` for one that cannot be expanded; it goes to the dead letters raw, and
/// is read so where they lie.
fn expanded(
    delivery: Delivery,
    most: usize,
    keeps_letters: impl Fn(&str) -> bool,
) -> Option<Delivery> {
    if !compression::is_marked(&delivery.message) {
        return Some(delivery);
    }
    match compression::expand(&delivery.message, most) {
        Ok(None) => Some(delivery),
        Ok(Some(message)) => {
            let (mut received, settle) = delivery.into_parts();
            received.message = Arc::new(message);
            Some(match settle {
                Some((settlements, tag)) => Delivery::new(received, settlements, tag),
                None => Delivery::unsettled(received),
            })
        }
        // There every one is read, as it stands if need be.
        Err(_) if keeps_letters(&delivery.topic) => Some(delivery),
        Err(why) => {
            tracing::warn!(
                topic = %delivery.topic, id = %delivery.message.id, why,
                "a compressed message cannot be expanded; it goes to the dead letters as it stands"
            );
            let earlier = delivery.marks.failure.as_deref();
            let failure = Failure::now(UNDECODABLE, why, &delivery.topic, earlier);
            delivery.settle_now(Verdict::DeadLetter { failure });
            None
        }
    }
}

/// Passes the source's answer to an ack on. Where the source can no longer take
/// it, the id is committed all the same: a copy that it hands out again is
/// settled by the hub and reaches nobody, so the ack holds. Only a hub that
/// closes, and forgets, must say otherwise.
async fn acknowledged(
    upstream: oneshot::Receiver<Result<()>>,
    answer: oneshot::Sender<Result<()>>,
    closing: CancellationToken,
) {
    let result = match upstream.await {
        Ok(Err(error)) if error.code() == ErrorCode::AckFailed && !closing.is_cancelled() => Ok(()),
        Ok(result) => result,
        Err(_) if !closing.is_cancelled() => Ok(()),
        // Dropping the answer tells the reader that the source is gone.
        Err(_) => return,
    };
    // Whoever dropped the future abandoned the answer.
    let _ = answer.send(result);
}

async fn receive(local: &mut Option<Local>) -> Option<(Vec<Delivery>, bool)> {
    match local {
        Some(local) => Some((local.deliveries.recv().await?, local.in_place)),
        None => std::future::pending().await,
    }
}

/// Waits until the reader has dropped its end.
async fn abandoned(out: &Option<mpsc::Sender<Vec<Delivery>>>) {
    match out {
        Some(out) => out.closed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "span_tests.rs"]
mod tests;
