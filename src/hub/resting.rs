//! Failed events that rest in topics of their group's own, one for each delay,
//! where a route says `retry_by: topic`. Nothing waits behind them, and whoever
//! reads for the group when their time has come tries them again.
//!
//! ```text
//!   the event's topic --.                       .--> reader
//!                        >--- this task -------<
//!   hub-retry.OWN.5s ---'   holds until due     '<-- verdicts
//!           ^                                          |
//!           '----- copy, confirmed; then the ack ------'  (retry)
//! ```
//!
//! A topic has one delay, so that its events fall due in the order in which they
//! lie there, and the first that is not due holds up no other that is. When an
//! event is due follows from when it failed, so what was spooled meanwhile is not
//! late. It refuses to keep a key's order: a retry comes after what followed it.

use std::{collections::VecDeque, sync::Arc, task::Poll, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    MessagingHub,
    handover::hand_over,
    relay::{Relay, pass},
    route::RetryBy,
};
use crate::{
    broker::{
        BrokerType, Consumer, ConsumerControl, Delays, Delivery, Outcome, PublishOptions, Received,
        RetryMode, Settlement, Source, SubscribeOptions, Verdict,
        consumer::{ConsumerState, report},
    },
    duration,
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Failure},
    topic::{MAX_TOPIC_LEN, Pattern, Topic},
};

/// What the names of these topics begin with.
const PREFIX: &str = "hub-retry.";

/// The topics of all groups.
pub(super) const PATTERN: &str = "hub-retry.#";

/// How long an event stays with its reader when its copy could not be made.
const PAUSE: Duration = Duration::from_secs(1);

/// Verdicts taken up in one turn.
const TURN: usize = 256;

/// Whether failed events rest in this topic. Readers of patterns that cover it
/// by chance pass over them.
pub(super) fn is_resting(topic: &str) -> bool {
    topic.starts_with(PREFIX)
}

/// What the failed events of a group's subscription to a pattern rest under. What a
/// topic's name cannot have is replaced, and a checksum keeps different ones apart:
/// subscriptions of one group to different patterns have handlers of their own.
fn own(group: &str, pattern: &Pattern) -> String {
    let is_kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let clean: String = group
        .chars()
        .map(|c| if is_kept(c) { c } else { '_' })
        .take(MAX_TOPIC_LEN / 2)
        .collect();
    let sum = crc32fast::hash(format!("{group}\u{0}{pattern}").as_bytes());
    format!("{clean}-{sum:08x}")
}

/// Where they rest for a time.
fn name(own: &str, delay: Duration) -> Result<Topic> {
    Topic::new(format!("{PREFIX}{own}.{}", duration::format(delay)))
}

/// How long events rest in a topic, if it is one of these.
fn delay_of(topic: &str, own: &str) -> Option<Duration> {
    let rest = topic.strip_prefix(PREFIX)?.strip_prefix(own)?;
    duration::parse(rest.strip_prefix('.')?).ok()
}

/// A topic in which events rest, and those of them that are in hand.
struct Rest {
    delay: Duration,
    consumer: Consumer,
    /// In the order in which they fall due.
    waiting: VecDeque<Delivery>,
    open: bool,
}

impl Rest {
    fn due(&self) -> Option<Timestamp> {
        let first = self.waiting.front()?;
        Some(match &first.marks.failure {
            Some(failure) => failure.last + self.delay,
            // Somebody else wrote it: it waits for nothing.
            None => Timestamp::from_millis(0),
        })
    }
}

impl MessagingHub {
    /// The consumer of a group whose failed events rest in topics, where the
    /// route and the options ask for that; else the consumer as it is.
    pub(super) async fn with_resting(
        &self,
        primary: Consumer,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        let route = self.route_of(source.pattern())?;
        let (Source::Stream(_), Some(group), RetryBy::Topic) =
            (source, &options.group_id, route.retry_by)
        else {
            return Ok(primary);
        };
        if options.auto_ack || is_resting(source.pattern().as_str()) {
            return Ok(primary);
        }
        let delays = match options.retry_delay {
            Some(delay) => Delays::every(delay),
            None => self.retry_delays(source),
        };
        let own = own(group, source.pattern());
        let mut all: Vec<Duration> = Vec::new();
        // What rests under delays that were configured before is not left behind.
        let before = self.resting_before(route.primary, &own).await;
        for delay in delays.iter().chain(before) {
            if !all.contains(&delay) {
                all.push(delay);
            }
        }
        let mut rests: Vec<Rest> = Vec::new();
        let reading = SubscribeOptions {
            group_id: Some(format!("{own}.retry")),
            consumer_tag: None,
            max_poll_records: options.max_poll_records,
            session_timeout: options.session_timeout,
            heartbeat_interval: options.heartbeat_interval,
            buffer_size: options.buffer_size,
            ..SubscribeOptions::default()
        };
        for delay in all {
            let source = Source::Stream(Pattern::from(&name(&own, delay)?));
            let broker = self.route_of(source.pattern())?.primary;
            if let Some(broker) = self.broker(broker)
                && broker.is_connected()
            {
                // While it is away the lane does this, when something comes to rest.
                broker.ensure(&source).await?;
            }
            let one = SubscribeOptions {
                // Each topic has one reader, and two members of one id would fence
                // each other.
                group_instance_id: options
                    .group_instance_id
                    .as_ref()
                    .map(|id| format!("{id}-retry-{}", duration::format(delay))),
                ..reading.clone()
            };
            rests.push(Rest {
                delay,
                // A future that contains itself has no size.
                consumer: Box::pin(self.consume_from(&source, &one)).await?,
                waiting: VecDeque::new(),
                open: true,
            });
        }
        let (control, stopping, report) = ConsumerControl::new();
        let (out, deliveries) = mpsc::channel(options.buffer_size.max(1));
        let (relay, verdicts) = Relay::new();
        let task = Resting {
            hub: self.clone(),
            own,
            main: primary,
            main_open: true,
            rests,
            out: Some(out),
            relay,
            moving: FuturesUnordered::new(),
            stopping,
            report,
        };
        self.0.tasks.spawn(task.run(verdicts));
        Ok(Consumer {
            deliveries,
            control,
            retry: RetryMode::Broker,
        })
    }

    /// Delays under which events of a subscription may rest already. While the broker
    /// cannot be asked, none: they are read after the next start.
    async fn resting_before(&self, primary: BrokerType, own: &str) -> Vec<Duration> {
        if !self.broker(primary).is_some_and(|b| b.is_connected()) {
            return Vec::new();
        }
        let Ok(topics) = self.list_topics().await else {
            return Vec::new();
        };
        topics.iter().filter_map(|t| delay_of(t, own)).collect()
    }
}

/// The task behind such a consumer.
struct Resting {
    hub: MessagingHub,
    /// What its topics are named after.
    own: String,
    main: Consumer,
    main_open: bool,
    rests: Vec<Rest>,
    out: Option<mpsc::Sender<Vec<Delivery>>>,
    /// What readers hold, as its source has it.
    relay: Relay<Received>,
    /// Copies under way, at most one for each delivery that was handed out.
    moving: FuturesUnordered<BoxFuture<'static, ()>>,
    stopping: CancellationToken,
    report: watch::Sender<ConsumerState>,
}

impl Resting {
    async fn run(mut self, mut verdicts: mpsc::UnboundedReceiver<Settlement>) {
        let mut state = self.main.control.watch();
        let mut pending: Vec<Delivery> = Vec::new();
        let mut settled: Vec<Settlement> = Vec::with_capacity(TURN);
        loop {
            self.show(&state.borrow_and_update());
            let want = pending.is_empty() && self.out.is_some();
            let due = self.next_due().filter(|_| want);
            tokio::select! {
                biased;
                _ = verdicts.recv_many(&mut settled, TURN) => {
                    for one in settled.drain(..) {
                        self.settle(one);
                    }
                }
                Some(()) = self.moving.next() => {}
                () = self.hub.0.closing.cancelled(), if !self.stopping.is_cancelled() => {
                    self.stopping.cancel();
                }
                () = self.stopping.cancelled(), if self.out.is_some() => {
                    pending.clear();
                    self.let_go();
                }
                sent = hand_over(&self.out, &mut pending), if !pending.is_empty() => {
                    if !sent {
                        self.stopping.cancel();
                    }
                }
                () = until(due), if due.is_some() => pending = self.take_due(),
                batch = self.main.deliveries.recv(), if (want || self.out.is_none()) && self.main_open => {
                    match batch {
                        Some(late) if self.out.is_none() => drop(late),
                        Some(batch) => pending = batch.into_iter().map(|d| self.wrap(d, false)).collect(),
                        None => {
                            self.main_open = false;
                            self.stopping.cancel();
                        }
                    }
                }
                // What rests is taken in while there is none of that topic here.
                (n, batch) = receive(&mut self.rests), if want => match batch {
                    Some(batch) => self.rests[n].waiting.extend(batch),
                    None => {
                        self.rests[n].open = false;
                        // Half of the subscription is none.
                        self.stopping.cancel();
                    }
                },
                Ok(()) = state.changed() => {}
            }
            if self.out.is_none()
                && self.relay.is_empty()
                && self.moving.is_empty()
                && !self.main_open
            {
                break;
            }
        }
        self.main.control.stop().await;
        let mut failure = self.main.control.failure();
        for rest in &self.rests {
            rest.consumer.control.stop().await;
            failure = failure.or_else(|| rest.consumer.control.failure());
        }
        let _ = self.report.send(match failure {
            Some(why) => ConsumerState::Failed(why),
            None => ConsumerState::Stopped,
        });
    }

    fn show(&self, main: &ConsumerState) {
        // The last word is said when everything has come back.
        if self.out.is_none() || matches!(main, ConsumerState::Stopped | ConsumerState::Failed(_)) {
            return;
        }
        report(&self.report, main);
    }

    /// Nothing more is handed out; what was not goes back by being dropped.
    fn let_go(&mut self) {
        self.out = None;
        self.main.control.begin_stop();
        // Not closed: a source with room promised to it may still send, and what
        // it sends is dropped above until its end is told.
        for rest in &mut self.rests {
            rest.waiting.clear();
            rest.consumer.control.begin_stop();
            // Dropped, not only closed: what a source still sends with room that was
            // promised to it would lie here unseen, and be waited for.
            rest.consumer.deliveries = mpsc::channel(1).1;
            rest.open = false;
        }
    }

    fn next_due(&self) -> Option<Timestamp> {
        self.rests.iter().filter_map(Rest::due).min()
    }

    fn take_due(&mut self) -> Vec<Delivery> {
        let now = Timestamp::now();
        let mut due = Vec::new();
        for n in 0..self.rests.len() {
            while let Some(delivery) = self
                .rests
                .get_mut(n)
                .filter(|r| r.due().is_some_and(|at| at <= now))
                .and_then(|r| r.waiting.pop_front())
            {
                due.push(delivery);
            }
        }
        due.into_iter().map(|d| self.wrap(d, true)).collect()
    }

    /// A delivery whose verdict comes here first. One that rested is shown in the
    /// topic in which it failed.
    fn wrap(&mut self, delivery: Delivery, rested: bool) -> Delivery {
        let (mut received, upstream) = delivery.into_parts();
        if rested
            && let Some(failure) = &received.marks.failure
            && let Ok(topic) = Topic::new(&failure.original_topic)
        {
            let message = Arc::make_mut(&mut received.message);
            message.topic = Some(topic.to_string());
            // Where it lies is no place in that topic.
            message.partition = None;
            message.offset = None;
            received.topic = topic;
        }
        self.relay.wrap(received.clone(), upstream, received)
    }

    fn settle(&mut self, settlement: Settlement) {
        let Settlement { tag, verdict, done } = settlement;
        let Some((upstream, received)) = self.relay.take(tag) else {
            return;
        };
        let (delay, failure) = match verdict {
            Verdict::Retry { delay, failure } => (delay, failure),
            verdict => {
                pass(&upstream, verdict, done);
                return;
            }
        };
        if received.message.is_expired(Timestamp::now()) {
            let failure = Failure {
                reason: "expired".to_owned(),
                ..failure
            };
            pass(&upstream, Verdict::DeadLetter { failure }, done);
            return;
        }
        let hub = self.hub.clone();
        let topic = name(&self.own, delay);
        self.moving.push(Box::pin(async move {
            match rest(&hub, topic, &received, failure.clone()).await {
                // The copy is safe, so the original may go.
                Ok(()) => pass(&upstream, Verdict::Ack, done),
                Err(error) if is_of_the_message(&error) => {
                    // A foreign message that the hub itself would not publish: it would
                    // be refused each time, and never come to its last attempt.
                    tracing::warn!(
                        topic = %received.topic, id = %received.message.id, %error,
                        "a failed event cannot be put to rest; it goes to the dead letters"
                    );
                    pass(&upstream, Verdict::DeadLetter { failure }, done);
                }
                Err(error) => {
                    tracing::warn!(
                        topic = %received.topic, id = %received.message.id, %error,
                        "a failed event could not be put to rest; its reader gets it again"
                    );
                    if let Some(done) = done {
                        let _ = done.send(Err(Error::new(
                            ErrorCode::NackFailed,
                            "the event could not be put to rest and goes back to its reader",
                        )
                        .caused_by(error)));
                    }
                    tokio::select! {
                        () = hub.0.closing.cancelled() => {}
                        () = tokio::time::sleep(PAUSE) => {}
                    }
                    pass(&upstream, Verdict::Requeue, None);
                }
            }
        }));
    }
}

/// Whether a refusal says something about the message, and not about where it was to
/// go: a topic or a right that is missing may be there soon.
fn is_of_the_message(error: &Error) -> bool {
    error.is_refusal()
        && matches!(
            error.code(),
            ErrorCode::MessageInvalid
                | ErrorCode::MessageTooLarge
                | ErrorCode::MessageExpired
                | ErrorCode::SchemaInvalid
        )
}

/// Publishes the copy that is tried again, and waits until it is safe.
async fn rest(
    hub: &MessagingHub,
    topic: Result<Topic>,
    received: &Received,
    failure: Failure,
) -> Result<()> {
    let topic = topic?;
    if received.via != BrokerType::InMemory && hub.store().is_none() {
        // Kept in memory only, the copy would be gone with the process while the
        // original was acked.
        let primary = hub.route_of(&Pattern::from(&topic))?.primary;
        if !hub.broker(primary).is_some_and(|b| b.is_connected()) {
            return Err(Error::new(
                ErrorCode::BrokerUnavailable,
                "the broker is away, and this hub has no disk to keep the copy on",
            )
            .on(topic.as_str()));
        }
    }
    let mut message: Message = (*received.message).clone();
    message.retry_count = message.retry_count.saturating_add(1);
    message.error = Some(failure.text().to_owned());
    message.topic = None;
    // Facts of where it lay.
    message.partition = None;
    let marks = (*received.marks).clone().of_letter(failure);
    let kept = message.is_persistent();
    let receipt = hub
        .publish_again(&topic, message, marks, &PublishOptions::default())
        .await?;
    let in_memory = receipt.outcome == Outcome::Spooled { durable: false };
    if received.via != BrokerType::InMemory && kept && in_memory {
        // The broker went away since it was asked, or the disk fails. The original
        // stays; it and this copy are one attempt of one id.
        return Err(Error::new(
            ErrorCode::BrokerUnavailable,
            "the broker is away, and the copy is in this hub's memory only",
        )
        .on(topic.as_str()));
    }
    Ok(())
}

async fn until(due: Option<Timestamp>) {
    if let Some(due) = due {
        tokio::time::sleep(due.since(Timestamp::now())).await;
    }
}

/// The next batch of those topics of which nothing waits here.
async fn receive(rests: &mut [Rest]) -> (usize, Option<Vec<Delivery>>) {
    std::future::poll_fn(|cx| {
        for (n, rest) in rests.iter_mut().enumerate() {
            if !rest.open || !rest.waiting.is_empty() {
                continue;
            }
            if let Poll::Ready(batch) = rest.consumer.deliveries.poll_recv(cx) {
                return Poll::Ready((n, batch));
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_and_delay_has_a_topic_of_its_own() {
        let events = Pattern::new("events.#").unwrap();
        let of = |group: &str, ms| {
            let own = own(group, &events);
            name(&own, Duration::from_millis(ms)).unwrap().to_string()
        };
        let audit = own("audit", &events);
        assert_eq!(of("audit", 5000), format!("hub-retry.{audit}.5s"));
        assert!(audit.starts_with("audit-") && audit.len() == 14);
        let other = own("audit", &Pattern::new("mail.#").unwrap());
        assert_ne!(audit, other, "another pattern, another handler");
        let delay = Duration::from_secs(5);
        assert_eq!(delay_of(&of("audit", 5000), &audit), Some(delay));
        assert_eq!(delay_of(&of("audit", 5000), &other), None);
        assert_eq!(delay_of("events.5s", &audit), None);
        let names = [
            of("audit", 5000),
            of("audit", 6000),
            of("a.b", 5000),
            of("a_b", 5000),
            of("a/b", 5000),
            of(&"g".repeat(400), 1),
            of(&"g".repeat(401), 1),
        ];
        for (n, one) in names.iter().enumerate() {
            assert!(is_resting(one) && Pattern::new(PATTERN).unwrap().matches(one));
            assert!(names[n + 1..].iter().all(|other| one != other), "{one}");
        }
    }
}
