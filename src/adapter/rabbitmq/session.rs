//! One consumer on one channel of one connection, from subscribing to its end.
//! Verdicts come back on a channel that ends with the session, so that those
//! on deliveries of a dead connection fail by themselves.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Channel,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    },
    types::{FieldTable, ShortString},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    acks::{Acks, Answer},
    courier::{Courier, Job},
    error,
    link::Link,
    shared::Shared,
    wire,
};
use crate::{
    broker::{BrokerType, Delivery, Received, Settlement, Verdict},
    error::{Error, ErrorCode, Result},
    message::{Timestamp, wire::Failure},
    topic::Topic,
};

/// How a consumer reads its queue.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) tag: String,
    pub(super) prefetch: u16,
    pub(super) exclusive: bool,
    /// Hand out without waiting for verdicts.
    pub(super) unsettled: bool,
    /// The topic is the routing key's, not the queue's.
    pub(super) stream: bool,
    /// The topic where a message names none.
    pub(super) topic: Topic,
}

/// Why a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// It was told to, and everything is settled or given back.
    Stopped,
    /// The connection is gone.
    Lost,
    /// The server ended it, or would not begin it.
    Broken(String),
}

/// What a session works with.
pub(super) struct Session<'a> {
    pub(super) shared: &'a Shared,
    pub(super) courier: &'a Courier,
    pub(super) link: &'a Link,
    pub(super) plan: &'a Plan,
    pub(super) deliveries: &'a mpsc::Sender<Vec<Delivery>>,
    pub(super) stopping: &'a CancellationToken,
}

impl Session<'_> {
    /// Subscribes to `queue` and serves it until the end.
    pub(super) async fn run(&self, channel: Channel, queue: &str, active: impl FnOnce()) -> End {
        let consumer = match self.subscribe(&channel, queue).await {
            Ok(consumer) => consumer,
            Err(_) if self.link.lost.is_cancelled() => return End::Lost,
            Err(e) => return End::Broken(e.message().to_owned()),
        };
        active();
        let mut serving = Serving {
            session: self,
            channel: &channel,
            queue,
            acks: Acks::default(),
            held: HashMap::new(),
            reroutes: FuturesUnordered::new(),
        };
        let end = serving.serve(consumer).await;
        drop(serving);
        if channel.status().connected() {
            // Closing gives back what was not settled.
            let _ = timeout(FAREWELL, channel.close(200, "OK".into())).await;
        }
        end
    }

    async fn subscribe(&self, channel: &Channel, queue: &str) -> Result<lapin::Consumer> {
        let fail = |e: lapin::Error| {
            error::operation(
                &e,
                &format!("subscribe to {queue}"),
                ErrorCode::QueueNotFound,
                ErrorCode::SubscribeFailed,
            )
        };
        let short = |text: &str| {
            ShortString::try_new(text)
                .map_err(|_| error::unsupported(format!("{text:?} is longer than 255 bytes")))
        };
        let patience = self.link.patience;
        // lapin's own buffer has no bound: the prefetch is the bound.
        self.link
            .bounded(
                patience,
                channel.basic_qos(self.plan.prefetch.max(1), BasicQosOptions::default()),
            )
            .await?
            .map_err(fail)?;
        let options = BasicConsumeOptions {
            exclusive: self.plan.exclusive,
            ..BasicConsumeOptions::default()
        };
        self.link
            .bounded(
                patience,
                channel.basic_consume(
                    short(queue)?,
                    short(&self.plan.tag)?,
                    options,
                    FieldTable::default(),
                ),
            )
            .await?
            .map_err(fail)
    }
}

/// What must be known of a delivery until it is settled.
type Held = Received;

/// A retry or dead letter whose copy is on its way.
struct Rerouted {
    tag: u64,
    dead: bool,
    answer: Option<Answer>,
    outcome: Result<()>,
}

struct Serving<'a> {
    session: &'a Session<'a>,
    channel: &'a Channel,
    queue: &'a str,
    acks: Acks,
    held: HashMap<u64, Held>,
    reroutes: FuturesUnordered<BoxFuture<'static, Rerouted>>,
}

impl Serving<'_> {
    async fn serve(&mut self, consumer: lapin::Consumer) -> End {
        let session = self.session;
        let link = session.link;
        let (settle, mut settlements) = mpsc::unbounded_channel();
        let mut settle = Some(settle);
        let mut hearing = true;
        let mut consumer = Some(consumer);
        // What was read and has no room yet at the reader.
        let mut waiting: Vec<Delivery> = Vec::new();
        let mut waiting_tags: Vec<u64> = Vec::new();
        let mut flush_at: Option<Instant> = None;
        let mut verdicts: Vec<Settlement> = Vec::new();
        let most = usize::from(session.plan.prefetch / 2).clamp(1, ACK_BATCH);
        loop {
            tokio::select! {
                () = link.lost.cancelled() => return End::Lost,
                () = session.shared.closing.cancelled() => {
                    // What was decided is told; the rest goes back with the channel.
                    let _ = self.flush(true).await;
                    return End::Stopped;
                }
                () = session.stopping.cancelled(), if consumer.is_some() => {
                    consumer = None;
                    self.stop_reading(&mut waiting, &mut waiting_tags, &mut settle).await;
                }
                () = session.deliveries.closed(), if consumer.is_some() => {
                    consumer = None;
                    self.stop_reading(&mut waiting, &mut waiting_tags, &mut settle).await;
                }
                n = settlements.recv_many(&mut verdicts, BATCH), if hearing => {
                    // Nobody is left who could give a verdict.
                    hearing = n > 0;
                    for verdict in verdicts.drain(..) {
                        if let Err(end) = self.settle(verdict).await {
                            return end;
                        }
                    }
                }
                Some(done) = self.reroutes.next() => {
                    if let Err(end) = self.rerouted(done).await {
                        return end;
                    }
                }
                permit = session.deliveries.reserve(), if !waiting.is_empty() => {
                    if let Ok(permit) = permit {
                        session.shared.recorder.messages_consumed.add(waiting.len() as u64);
                        permit.send(std::mem::take(&mut waiting));
                        if session.plan.unsettled {
                            for tag in waiting_tags.drain(..) {
                                self.acks.done(tag, None);
                                self.held.remove(&tag);
                            }
                        }
                        waiting_tags.clear();
                    }
                }
                next = next_of(&mut consumer), if waiting.is_empty() => {
                    let mut next = next;
                    loop {
                        match next {
                            Some(Ok(delivery)) => {
                                waiting_tags.push(delivery.delivery_tag);
                                if let Some(settle) = &settle {
                                    waiting.push(self.receive(delivery, settle));
                                }
                            }
                            Some(Err(e)) => return self.broken(error::text(&e)),
                            None => return self.broken("the server cancelled the consumer (queue deleted or moved)".to_owned()),
                        }
                        if waiting.len() >= BATCH {
                            break;
                        }
                        match next_of(&mut consumer).now_or_never() {
                            Some(more) => next = more,
                            None => break,
                        }
                    }
                    session.shared.recorder.touch_receive();
                }
                () = sleep_until(flush_at) => {
                    if let Err(end) = self.flush(true).await {
                        return end;
                    }
                }
            }
            // Enough is done, or nothing else is to come: tell the server.
            let idle = self.acks.open() == 0;
            if self.acks.waiting() > 0 && (idle || self.acks.waiting() >= most) {
                if let Err(end) = self.flush(idle).await {
                    return end;
                }
                if self.acks.waiting() >= most
                    && let Err(end) = self.flush(true).await
                {
                    return end;
                }
            }
            flush_at = match (self.acks.waiting(), flush_at) {
                (0, _) => None,
                (_, Some(at)) if at > Instant::now() => Some(at),
                (_, _) => Some(Instant::now() + ACK_AFTER),
            };
            if consumer.is_none() && self.acks.open() == 0 && self.reroutes.is_empty() {
                return match self.flush(true).await {
                    Ok(()) => End::Stopped,
                    Err(end) => end,
                };
            }
        }
    }

    /// Turns what the server sent into a delivery.
    fn receive(
        &mut self,
        delivery: lapin::message::Delivery,
        settle: &mpsc::UnboundedSender<Settlement>,
    ) -> Delivery {
        let plan = self.session.plan;
        let recorder = &self.session.shared.recorder;
        let tag = delivery.delivery_tag;
        recorder.messages_received.inc();
        recorder.bytes_received.add(delivery.data.len() as u64);
        let (mut message, marks) = wire::message(delivery, self.queue, plan.stream);
        let topic = match message.topic.as_deref().map(Topic::new) {
            Some(Ok(topic)) if plan.stream => topic,
            _ => plan.topic.clone(),
        };
        message.topic = Some(topic.as_str().to_owned());
        let received = Received {
            topic,
            message: Arc::new(message),
            marks: Arc::new(marks),
            via: BrokerType::RabbitMq,
        };
        self.acks.delivered(tag);
        if plan.unsettled {
            return Delivery::unsettled(received);
        }
        self.held.insert(tag, received.clone());
        Delivery::new(received, settle.clone(), tag)
    }

    /// Stops the server from sending more, and gives back what no reader has.
    async fn stop_reading(
        &mut self,
        waiting: &mut Vec<Delivery>,
        tags: &mut Vec<u64>,
        settle: &mut Option<mpsc::UnboundedSender<Settlement>>,
    ) {
        let link = self.session.link;
        let cancel = self.channel.basic_cancel(
            self.session.plan.tag.as_str().into(),
            BasicCancelOptions::default(),
        );
        if let Ok(Err(e)) = link.bounded(link.patience, cancel).await {
            debug!(queue = self.queue, error = %e, "cancelling a consumer failed");
        }
        if self.session.plan.unsettled {
            // Nobody settles these: they go back when the channel closes.
            for tag in tags.drain(..) {
                self.acks.forget(tag);
            }
        }
        // Dropped, each gives itself back through the settlements.
        waiting.clear();
        tags.clear();
        *settle = None;
    }

    async fn settle(&mut self, settlement: Settlement) -> Result<(), End> {
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
                recorder.messages_acked.inc();
                self.acks.done(tag, done);
            }
            Verdict::Requeue => {
                recorder.messages_nacked.inc();
                self.give_back(tag).await?;
                answer(done, Ok(()));
            }
            // There is one tier, whose length consume() has checked: the delay
            // is that of the retry queue.
            Verdict::Retry { failure, .. } => {
                let expired = self
                    .held
                    .get(&tag)
                    .is_some_and(|h| h.message.is_expired(Timestamp::now()));
                if expired {
                    let failure = Failure {
                        reason: "expired".to_owned(),
                        ..failure
                    };
                    self.reroute(tag, failure, true, done);
                } else {
                    self.reroute(tag, failure, false, done);
                }
            }
            Verdict::DeadLetter { failure } => self.reroute(tag, failure, true, done),
        }
        Ok(())
    }

    /// Sends a copy with the failure noted; the original is acked when the copy
    /// is confirmed.
    fn reroute(&mut self, tag: u64, failure: Failure, dead: bool, done: Option<Answer>) {
        let Some(held) = self.held.get(&tag) else {
            return;
        };
        let topology = &self.session.shared.topology;
        let mut message = (*held.message).clone();
        let mut marks = (*held.marks).clone();
        message.error = Some(if failure.details.is_empty() {
            failure.reason.clone()
        } else {
            failure.details.clone()
        });
        marks.failure = Some(failure);
        let address = if dead {
            (String::new(), topology.dead_letter_queue().to_owned())
        } else {
            message.retry_count = message.retry_count.saturating_add(1);
            (topology.retry_exchange().to_owned(), self.queue.to_owned())
        };
        // Dead letters are kept, however old.
        let job = Job::new(address, held.topic.as_str().into(), message, marks, !dead);
        let courier = self.session.courier.clone();
        self.reroutes.push(
            async move {
                let outcome = courier.send(job).await;
                Rerouted {
                    tag,
                    dead,
                    answer: done,
                    outcome,
                }
            }
            .boxed(),
        );
    }

    async fn rerouted(&mut self, done: Rerouted) -> Result<(), End> {
        let recorder = &self.session.shared.recorder;
        match done.outcome {
            Ok(()) => {
                if done.dead {
                    recorder.messages_dead_lettered.inc();
                } else {
                    recorder.messages_retried.inc();
                }
                self.held.remove(&done.tag);
                self.acks.done(done.tag, done.answer);
            }
            Err(e) => {
                warn!(queue = self.queue, error = %e, dead = done.dead, "a failed message could not be moved; it goes back to its queue");
                recorder.messages_nacked.inc();
                recorder.total_errors.inc();
                self.give_back(done.tag).await?;
                let code = if done.dead {
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
    async fn flush(&mut self, all: bool) -> Result<(), End> {
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

    fn broken(&self, why: String) -> End {
        if self.session.link.lost.is_cancelled()
            || !self.session.link.consuming.status().connected()
        {
            End::Lost
        } else {
            End::Broken(why)
        }
    }
}

async fn next_of(
    consumer: &mut Option<lapin::Consumer>,
) -> Option<Result<lapin::message::Delivery, lapin::Error>> {
    match consumer {
        Some(consumer) => consumer.next().await,
        None => std::future::pending().await,
    }
}

fn answer(done: Option<Answer>, outcome: Result<()>) {
    if let Some(done) = done {
        let _ = done.send(outcome);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Deliveries handed out, and verdicts taken, together at most.
const BATCH: usize = 256;
/// Acks that wait for each other at most.
const ACK_BATCH: usize = 100;
/// How long an ack waits for others at most.
const ACK_AFTER: Duration = Duration::from_millis(10);
/// How long the server may take to close a channel.
const FAREWELL: Duration = Duration::from_secs(2);
