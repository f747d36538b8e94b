//! Carries out what readers decide about a session's deliveries: acks in
//! batches, gives back, and moves copies to the retry queue or the dead letters
//! before it acks the original. Never nacks and hopes: a quorum queue drops a
//! message that came back too often, so before that a copy takes its place.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions},
};
use tracing::warn;

use super::{
    acks::{Acks, Answer},
    courier::Job,
    error,
    session::{End, Session},
};
use crate::{
    broker::{BrokerType, Received, Settlement, Verdict},
    error::{Error, ErrorCode, Result},
    message::{Timestamp, wire::Failure},
};

/// What must be known of a delivery until it is settled.
pub(super) type Held = Received;

/// A retry or dead letter whose copy is on its way.
pub(super) struct Rerouted {
    tag: u64,
    way: Way,
    failure: Option<Failure>,
    answer: Option<Answer>,
    outcome: Result<()>,
}

/// Where a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// To the retry queue of this delay, with the failure noted.
    Retry(Duration),
    /// To the dead letters, with the failure noted.
    DeadLetter,
    /// To the end of its own queue, as it is.
    Back,
    /// The same after a moment, for a dead letter that its reader would put where it
    /// lies already.
    Stay,
}

/// Returns of a message from which on it is not given back any more but copied.
/// RabbitMQ 4's quorum queues drop it after 20, or dead-letter it where the
/// queue says so; other ways of coming back (a channel that closes) count too.
pub(super) const MOST_RETURNS: i64 = 10;

/// How long a message that could not be moved, or is where it should go, stays in hand.
const UNMOVED: Duration = Duration::from_secs(1);

pub(super) struct Serving<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) channel: &'a Channel,
    pub(super) queue: &'a str,
    pub(super) acks: Acks,
    pub(super) held: HashMap<u64, Held>,
    pub(super) reroutes: FuturesUnordered<BoxFuture<'static, Rerouted>>,
    /// Deliveries that came back [`MOST_RETURNS`] times.
    pub(super) worn: HashSet<u64>,
    /// How many were given back one by one.
    pub(super) given_back: usize,
}

impl Serving<'_> {
    pub(super) async fn settle(&mut self, settlement: Settlement) -> Result<(), End> {
        let Settlement { tag, verdict, done } = settlement;
        if !self.acks.is_open(tag) {
            answer(
                done,
                Err(
                    Error::new(ErrorCode::AckFailed, "this delivery was settled before")
                        .at(BrokerType::RabbitMq),
                ),
            );
            return Ok(());
        }
        let shared = self.session.shared;
        let recorder = &shared.recorder;
        match verdict {
            Verdict::Ack => {
                self.held.remove(&tag);
                self.worn.remove(&tag);
                recorder.messages_acked.inc();
                self.acks.done(tag, done);
            }
            Verdict::Requeue => {
                if self.worn.contains(&tag) && self.held.contains_key(&tag) {
                    self.reroute(tag, Way::Back, None, done);
                } else {
                    recorder.messages_nacked.inc();
                    self.give_back(tag).await?;
                    answer(done, Ok(()));
                }
            }
            Verdict::Retry { delay, failure } => {
                // What lies among the dead letters is kept, however old it is.
                let kept = self.session.shared.topology.keeps_dead_letters(self.queue);
                let held = self.held.get(&tag).filter(|_| !kept);
                let expired = held.is_some_and(|h| h.message.is_expired(Timestamp::now()));
                if expired {
                    let failure = Failure {
                        reason: "expired".to_owned(),
                        ..failure
                    };
                    self.reroute(tag, Way::DeadLetter, Some(failure), done);
                } else {
                    self.reroute(tag, Way::Retry(delay), Some(failure), done);
                }
            }
            Verdict::DeadLetter { failure } => {
                self.reroute(tag, Way::DeadLetter, Some(failure), done);
            }
        }
        Ok(())
    }

    /// Sends a copy; the original is acked when the copy is confirmed.
    fn reroute(&mut self, tag: u64, way: Way, failure: Option<Failure>, done: Option<Answer>) {
        let Some(held) = self.held.get(&tag) else {
            return;
        };
        let topology = &self.session.shared.topology;
        // With another failure noted it would be another letter of its message.
        let (way, failure) = match way {
            Way::DeadLetter if self.queue == topology.dead_letter_queue() => (Way::Stay, None),
            way => (way, failure),
        };
        let mut message = (*held.message).clone();
        let mut marks = (*held.marks).clone();
        if let Some(failure) = &failure {
            message.error = Some(failure.text().to_owned());
            marks.failure = Some(Box::new(failure.clone()));
        }
        let address = match way {
            Way::DeadLetter => (String::new(), topology.dead_letter_queue().to_owned()),
            Way::Retry(delay) => {
                message.retry_count = message.retry_count.saturating_add(1);
                // A delay without a tier comes only from who ignores the topology,
                // and has a retry queue of their own.
                let tier = topology.retry_tier(delay);
                let exchange = tier.map_or(topology.retry_exchange(), |t| t.exchange);
                (exchange.to_owned(), self.queue.to_owned())
            }
            Way::Back | Way::Stay => (String::new(), self.queue.to_owned()),
        };
        // Dead letters are kept, however old, also when they go back to where they are.
        let expires = match way {
            Way::Retry(_) => !topology.keeps_dead_letters(self.queue),
            Way::DeadLetter => false,
            Way::Back | Way::Stay => !topology.keeps_dead_letters(self.queue),
        };
        let job = Job::new(address, held.topic.as_str().into(), message, marks, expires);
        let courier = self.session.courier.clone();
        self.reroutes.push(
            async move {
                if way == Way::Stay {
                    // It is handed out, and refused, again: not as fast as that goes.
                    tokio::time::sleep(UNMOVED).await;
                }
                let outcome = courier.send(job).await;
                if outcome.is_err() {
                    // It is handed out, and fails, again: not as fast as that goes.
                    tokio::time::sleep(UNMOVED).await;
                }
                Rerouted {
                    tag,
                    way,
                    failure,
                    answer: done,
                    outcome,
                }
            }
            .boxed(),
        );
    }

    pub(super) async fn rerouted(&mut self, done: Rerouted) -> Result<(), End> {
        let recorder = &self.session.shared.recorder;
        match done.outcome {
            Ok(()) => {
                match done.way {
                    Way::DeadLetter => recorder.messages_dead_lettered.inc(),
                    Way::Retry(_) => recorder.messages_retried.inc(),
                    Way::Back | Way::Stay => recorder.messages_nacked.inc(),
                }
                self.held.remove(&done.tag);
                self.worn.remove(&done.tag);
                self.acks.done(done.tag, done.answer);
            }
            Err(e) if e.code() == ErrorCode::MessageExpired => {
                // No later try would do better, and the queue would be held up by it.
                let details = done.failure.as_ref().map(|f| f.details.clone());
                let topic = self.held.get(&done.tag).map(|h| h.topic.clone());
                let failure = Failure::now(
                    "expired",
                    details.unwrap_or_else(|| e.message().to_owned()),
                    topic.as_ref().map_or(self.queue, |t| t.as_str()),
                    done.failure.as_ref(),
                );
                self.reroute(done.tag, Way::DeadLetter, Some(failure), done.answer);
            }
            Err(e) if self.worn.contains(&done.tag) => {
                // The queue might drop it, given back once more: it stays in hand
                // until it can be moved, or the channel ends.
                warn!(queue = self.queue, error = %e, way = ?done.way, "a failed message could not be moved, and has come back often; it is tried again");
                recorder.total_errors.inc();
                self.reroute(done.tag, done.way, done.failure, done.answer);
            }
            Err(e) => {
                warn!(queue = self.queue, error = %e, way = ?done.way, "a failed message could not be moved; it goes back to its queue");
                recorder.messages_nacked.inc();
                recorder.total_errors.inc();
                self.give_back(done.tag).await?;
                if matches!(done.way, Way::Back | Way::Stay) {
                    // Where it should go, it went.
                    answer(done.answer, Ok(()));
                    return Ok(());
                }
                let code = if done.way == Way::DeadLetter {
                    ErrorCode::DeadLetterFailed
                } else {
                    ErrorCode::NackFailed
                };
                answer(
                    done.answer,
                    Err(Error::new(
                        code,
                        "the message could not be moved and went back to its queue",
                    )
                    .at(BrokerType::RabbitMq)
                    .caused_by(e)),
                );
            }
        }
        Ok(())
    }

    async fn give_back(&mut self, tag: u64) -> Result<(), End> {
        self.held.remove(&tag);
        self.worn.remove(&tag);
        self.given_back += 1;
        let options = BasicNackOptions {
            multiple: false,
            requeue: true,
        };
        let sent = self
            .session
            .link
            .bounded(
                self.session.link.patience,
                self.channel.basic_nack(tag, options),
            )
            .await;
        self.acks.forget(tag);
        self.check(sent)
    }

    /// Sends what is done; `all` also what lies above an open delivery.
    pub(super) async fn flush(&mut self, all: bool) -> Result<(), End> {
        let (acks, answers) = self.acks.take(all);
        for ack in acks {
            let options = BasicAckOptions {
                multiple: ack.multiple,
            };
            let sent = self
                .session
                .link
                .bounded(
                    self.session.link.patience,
                    self.channel.basic_ack(ack.tag, options),
                )
                .await;
            // The answers are dropped with an error: their deliveries come again.
            self.check(sent)?;
        }
        for waiting in answers {
            let _ = waiting.send(Ok(()));
        }
        Ok(())
    }

    fn check(&self, sent: Result<Result<(), lapin::Error>>) -> Result<(), End> {
        match sent {
            Ok(Ok(())) => Ok(()),
            _ if self.session.link.lost.is_cancelled() => Err(End::Lost),
            Ok(Err(e)) => Err(self.broken(error::text(&e))),
            Err(e) => Err(End::Broken(e.message().to_owned())),
        }
    }

    pub(super) fn broken(&self, why: String) -> End {
        if self.session.link.lost.is_cancelled()
            || !self.session.link.consuming.status().connected()
        {
            End::Lost
        } else {
            End::Broken(why)
        }
    }
}

fn answer(done: Option<Answer>, outcome: Result<()>) {
    if let Some(done) = done {
        let _ = done.send(outcome);
    }
}
