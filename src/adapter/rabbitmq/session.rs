//! One consumer on one channel of one connection, from subscribing to its end.
//! Verdicts come back on a channel that ends with the session, so that those
//! on deliveries of a dead connection fail by themselves.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Channel,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::{FieldTable, ShortString},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    acks::Acks,
    courier::Courier,
    error,
    link::Link,
    queue,
    shared::Shared,
    verdicts::{MOST_RETURNS, Serving},
    watchdog::{Enrolled, Watchdog},
    wire,
};
use crate::{
    broker::{BrokerType, Delivery, Received, Settlement},
    error::{ErrorCode, Result},
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
    pub(super) async fn run(
        &self,
        channel: Channel,
        queue: &str,
        watchdog: &mut Option<Watchdog>,
        active: impl FnOnce(),
    ) -> End {
        let consumer = match self.subscribe(&channel, queue).await {
            Ok(consumer) => consumer,
            Err(_) if self.link.lost.is_cancelled() => return End::Lost,
            Err(e) => return End::Broken(e.message().to_owned()),
        };
        active();
        let enrolled = self.shared.roll.enrol(queue);
        if let Some(watchdog) = watchdog {
            watchdog.subscribed(Instant::now().into_std());
        }
        let mut serving = Serving {
            session: self,
            channel: &channel,
            queue,
            acks: Acks::default(),
            held: HashMap::new(),
            reroutes: FuturesUnordered::new(),
            worn: HashSet::new(),
            given_back: 0,
        };
        let end = serving.serve(consumer, watchdog, enrolled).await;
        let given_back = serving.given_back;
        drop(serving);
        if given_back >= MANY && matches!(end, End::Stopped) {
            // A quorum queue takes some 32 verdicts of a channel at a time; the
            // rest, acks among them, waits in the server's channel process, and
            // is forgotten when the channel closes: what was acked would come
            // again. AMQP has no answer to an ack that could be waited for.
            tokio::select! {
                () = tokio::time::sleep(PASS_ON) => {}
                () = self.shared.closing.cancelled() => {}
                () = self.link.lost.cancelled() => {}
            }
        }
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

impl Serving<'_> {
    async fn serve(
        &mut self,
        consumer: lapin::Consumer,
        watchdog: &mut Option<Watchdog>,
        enrolled: Enrolled,
    ) -> End {
        let session = self.session;
        let link = session.link;
        let name = self.queue;
        // Taken off the roll before the server is told to end the consumer, or a
        // look in between would miss it.
        let mut enrolled = Some(enrolled);
        let mut looking: Option<BoxFuture<'_, Look>> = None;
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
                    enrolled = None;
                    if let Some(consumer) = consumer.take() {
                        self.stop_reading(consumer, &mut waiting, &mut waiting_tags, &mut settle)
                            .await;
                    }
                }
                () = session.deliveries.closed(), if consumer.is_some() => {
                    enrolled = None;
                    if let Some(consumer) = consumer.take() {
                        self.stop_reading(consumer, &mut waiting, &mut waiting_tags, &mut settle)
                            .await;
                    }
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
                () = look_due(watchdog), if looking.is_none() && enrolled.is_some() => {
                    looking = Some(Box::pin(look(session, name)));
                }
                found = found(&mut looking) => {
                    looking = None;
                    if let Some(watchdog) = watchdog
                        && enrolled.is_some()
                        && watchdog.looked(Instant::now().into_std(), found.ours, found.theirs)
                    {
                        session.shared.recorder.consumers_revived.inc();
                        return self.broken(format!(
                            "the server knows {} consumers of the queue, of {} that are ours",
                            found.theirs.unwrap_or_default(), found.ours,
                        ));
                    }
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
        let returns = wire::returns(&delivery);
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
        if returns >= MOST_RETURNS {
            self.worn.insert(tag);
        }
        Delivery::new(received, settle.clone(), tag)
    }

    /// Stops the server from sending more, and gives back what no reader has.
    async fn stop_reading(
        &mut self,
        mut consumer: lapin::Consumer,
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
        // The server had sent more than was read. Left in the client's buffer it
        // would belong to this channel, and be invisible to everybody, until the
        // last reader settles what it holds; so it is taken in and goes back.
        let rest = async {
            while let Some(Ok(delivery)) = consumer.next().await {
                tags.push(delivery.delivery_tag);
                if let Some(settle) = settle.as_ref() {
                    waiting.push(self.receive(delivery, settle));
                }
            }
        };
        if link.bounded(link.patience, rest).await.is_err() {
            debug!(
                queue = self.queue,
                "a cancelled consumer did not end in time"
            );
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
}

async fn next_of(
    consumer: &mut Option<lapin::Consumer>,
) -> Option<Result<lapin::message::Delivery, lapin::Error>> {
    match consumer {
        Some(consumer) => consumer.next().await,
        None => std::future::pending().await,
    }
}

/// What the server and our own account say of a queue's consumers.
struct Look {
    ours: u64,
    /// None: it could not be asked.
    theirs: Option<u64>,
}

async fn look(session: &Session<'_>, queue: &str) -> Look {
    // One that comes or goes meanwhile is not missed: the fewer counts.
    let before = session.shared.roll.of(queue);
    let theirs = queue::look(session.link, queue).await;
    Look {
        ours: before.min(session.shared.roll.of(queue)),
        theirs: theirs.ok().map(|(_, consumers)| consumers),
    }
}

async fn look_due(watchdog: &Option<Watchdog>) {
    match watchdog {
        Some(watchdog) => tokio::time::sleep_until(watchdog.due().into()).await,
        None => std::future::pending().await,
    }
}

async fn found(looking: &mut Option<BoxFuture<'_, Look>>) -> Look {
    match looking {
        Some(looking) => looking.await,
        None => std::future::pending().await,
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
/// Messages given back one by one from which on a server may be behind with
/// verdicts; half of what RabbitMQ lets a channel have under way at a queue.
const MANY: usize = 16;
/// How long the server is given to pass verdicts on to the queue. In
/// trials half a second was enough for 600 of them.
const PASS_ON: Duration = Duration::from_secs(2);
/// How long the server may take to close a channel.
const FAREWELL: Duration = Duration::from_secs(2);
