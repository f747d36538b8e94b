//! Consuming: subscriptions that span a primary and the spool.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    MessagingHub, Running,
    group::Group,
    lane::machine::Local as Hands,
    local_of, lock, resting,
    route::{Route, RouteKind},
    span::{self, Local},
};
use crate::{
    broker::{
        BatchHandler, BrokerType, Consumer, Delays, Delivery, Handler, Source, StartFrom,
        SubscribeOptions, Subscription, Verdict,
        dispatch::{self, DispatchSettings},
    },
    error::{Error, ErrorCode, Result},
    message::{Timestamp, wire::Failure},
    topic::Pattern,
};

/// How long a lease request goes on gathering after a message: what is ready at
/// the broker follows within this, what is not should not be waited for.
const LEASE_LINGER: Duration = Duration::from_millis(20);

/// How long it gathers after its first message at most.
const LEASE_GATHER: Duration = Duration::from_millis(200);

/// Who gets what a consumer brings.
#[derive(Clone, Copy)]
enum Reading {
    /// A handler of the hub's, whose failures are the hub's to retry.
    Handler,
    /// Whoever settles by themselves.
    Raw,
}

/// Groups whose handled ids are remembered while nobody reads for them.
pub(super) const MAX_GROUPS: usize = 1024;

/// How the window of a stream's named group is called; the rest is its name.
pub(super) const STREAM_GROUP: &str = "group:";

/// The name of a stream's group, from that of its window.
pub(super) fn stream_group(window: &str) -> Option<String> {
    window.strip_prefix(STREAM_GROUP).map(str::to_owned)
}

/// Deliveries of one lease request at most.
const MAX_LEASE: usize = 1000;

impl MessagingHub {
    /// Counts a message that a reader without a handler got.
    #[cfg(feature = "server")]
    pub(crate) fn count_consumed(&self, message: &crate::message::Message) {
        let recorder = &self.0.recorder;
        recorder.messages_consumed.inc();
        if message.retry_count == 0 {
            // A retry has rested on purpose.
            let age = Timestamp::now().since(message.timestamp);
            recorder.delivery_latency.record(age);
        }
    }

    /// Subscribes a handler; the pattern's route says whether to queues or to
    /// streams.
    ///
    /// # Errors
    /// An option that the broker cannot honour, an unknown queue, a bad pattern.
    pub async fn subscribe(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: impl Handler,
    ) -> Result<Subscription> {
        let source = self.source_of(&self.pattern(pattern)?)?;
        self.start(source, options, Arc::new(handler)).await
    }

    /// Subscribes a handler to work queues.
    ///
    /// # Errors
    /// As [`MessagingHub::subscribe`].
    pub async fn subscribe_tasks(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: impl Handler,
    ) -> Result<Subscription> {
        let source = Source::Queue(self.pattern(pattern)?);
        self.start(source, options, Arc::new(handler)).await
    }

    /// Subscribes a handler to streams.
    ///
    /// # Errors
    /// As [`MessagingHub::subscribe`].
    pub async fn subscribe_events(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: impl Handler,
    ) -> Result<Subscription> {
        let source = Source::Stream(self.pattern(pattern)?);
        self.start(source, options, Arc::new(handler)).await
    }

    /// Subscribes a handler that gets batches: up to `max` messages, or what
    /// came within `wait` of the first. The batch is acked or retried as one.
    ///
    /// # Errors
    /// As [`MessagingHub::subscribe`].
    pub async fn subscribe_batch(
        &self,
        pattern: &str,
        mut options: SubscribeOptions,
        max: usize,
        wait: Duration,
        handler: impl BatchHandler,
    ) -> Result<Subscription> {
        let source = self.source_of(&self.pattern(pattern)?)?;
        if options.auto_ack || options.concurrency.is_some() {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "a batch subscription handles one batch at a time and acks it as a whole; leave auto_ack and concurrency unset",
            ));
        }
        let max = max.max(1);
        // A batch can only fill when that many may be unsettled.
        options.prefetch = options.prefetch.max(u16::try_from(max).unwrap_or(u16::MAX));
        let id = options
            .consumer_tag
            .clone()
            .unwrap_or_else(|| format!("hub-batch-{}", self.number()));
        let consumer = self
            .consumer_of(&source, &options, Reading::Handler)
            .await?;
        let control = consumer.control.clone();
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        let mut settings = DispatchSettings::new(&source, &options, &self.0.recorder);
        if options.retry_delay.is_none() {
            settings.retry_delays = self.retry_delays(&source);
        }
        let give_up = settings.give_up.clone();
        let task = self.0.tasks.spawn(async move {
            let _ended = guard;
            super::batch::run(consumer, settings, max, wait, handler).await;
        });
        self.remember(Running {
            pattern: source.pattern().clone(),
            control: control.clone(),
            give_up,
            ended,
        });
        Ok(Subscription::new(
            id,
            source.pattern().clone(),
            vec![control],
            vec![task],
        ))
    }

    /// A consumer over primary and spool, each message once for its group. The
    /// caller settles every delivery.
    ///
    /// # Errors
    /// As [`MessagingHub::subscribe`].
    pub async fn consume(&self, pattern: &str, options: SubscribeOptions) -> Result<Consumer> {
        let source = self.source_of(&self.pattern(pattern)?)?;
        self.consume_from(&source, &options).await
    }

    /// A consumer over streams.
    ///
    /// # Errors
    /// As [`MessagingHub::subscribe`], and `INVALID_CONFIG` for a pattern over
    /// work queues, which are leased instead.
    pub async fn stream_events(
        &self,
        pattern: &str,
        options: SubscribeOptions,
    ) -> Result<Consumer> {
        let pattern = self.pattern(pattern)?;
        let route = self.route_of(&pattern)?;
        if route.kind != RouteKind::Event {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("{pattern} names work queues, which are leased, not streamed"),
            )
            .on(pattern.as_str()));
        }
        self.consume_from(&Source::Stream(pattern), &options).await
    }

    /// Reads streams from a time on, without a group: live consumers and their
    /// positions are left alone.
    ///
    /// # Errors
    /// As [`MessagingHub::stream_events`].
    pub async fn replay_events(
        &self,
        pattern: &str,
        start: Timestamp,
        handler: impl Handler,
    ) -> Result<Subscription> {
        let options = SubscribeOptions::default().starting(StartFrom::Time(start));
        self.subscribe_events(pattern, options, handler).await
    }

    /// Takes up to `max` messages of a queue, or of all queues that a pattern covers,
    /// waiting up to `wait` for the first. They stay unsettled at the broker until the
    /// caller settles or drops them.
    ///
    /// # Errors
    /// `QUEUE_NOT_FOUND`; `INVALID_CONFIG` for a stream.
    ///
    /// # Cancel safety
    /// What arrived meanwhile is given back.
    pub async fn lease(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<Delivery>> {
        self.check_open()?;
        let pattern = self.pattern(queue)?;
        let queue = pattern.to_string();
        if self.kind_of_pattern(&pattern) != RouteKind::Task {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("{queue} is a stream; read it with /v1/stream"),
            )
            .on(queue.as_str()));
        }
        let max = max.clamp(1, MAX_LEASE);
        let prefetch = match pattern.literal() {
            Some(_) => u16::try_from(max).unwrap_or(u16::MAX),
            // Each queue hands out as much, and what is too much is given back, which
            // queues count.
            None => 1,
        };
        let options = SubscribeOptions::default().with_prefetch(prefetch);
        let mut consumer = self.consume_from(&Source::Queue(pattern), &options).await?;
        let mut leased = Vec::new();
        let mut until = tokio::time::Instant::now() + wait;
        let mut last = None;
        while leased.len() < max {
            match tokio::time::timeout_at(until, consumer.deliveries.recv()).await {
                Ok(Some(batch)) => {
                    leased.extend(batch.into_iter().filter_map(|d| self.in_time(d)));
                    // While they keep coming it goes on: what the broker has
                    // sent and nobody leases has to be given back.
                    let now = tokio::time::Instant::now();
                    let last = *last.get_or_insert(now + LEASE_GATHER);
                    until = last.min(now + LEASE_LINGER);
                }
                Ok(None) => {
                    if let Some(why) = consumer.control.failure()
                        && leased.is_empty()
                    {
                        return Err(
                            Error::new(ErrorCode::ConsumeFailed, why.as_ref()).on(queue.as_str())
                        );
                    }
                    break;
                }
                Err(_) => break,
            }
        }
        // The rest that the broker handed out goes back; what is leased stays
        // with the span's task until it is settled.
        consumer.control.begin_stop();
        // More than asked for goes back too, by being dropped.
        leased.truncate(max);
        Ok(leased)
    }

    /// A delivery that is worth handing out; one that is too late goes to the dead
    /// letters.
    fn in_time(&self, delivery: Delivery) -> Option<Delivery> {
        if !delivery.received().is_too_late(Timestamp::now()) {
            return Some(delivery);
        }
        let failure = Failure::now(
            "expired",
            "it expired before it could be handed out",
            &delivery.topic,
            delivery.marks.failure.as_deref(),
        );
        self.0.recorder.messages_dead_lettered.inc();
        delivery.settle_now(Verdict::DeadLetter { failure });
        None
    }

    /// Ends every subscription to exactly this pattern, after its running
    /// handlers.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` when there is none.
    pub async fn unsubscribe(&self, pattern: &str) -> Result<()> {
        let pattern = self.pattern(pattern)?;
        let ending: Vec<Running> = {
            let mut all = lock(&self.0.subscriptions);
            all.retain(|r| !r.ended.is_cancelled());
            all.iter()
                .filter(|r| r.pattern == pattern)
                .cloned()
                .collect()
        };
        if ending.is_empty() {
            return Err(Error::new(
                ErrorCode::SubscribeFailed,
                format!("there is no subscription to {pattern}"),
            ));
        }
        for one in &ending {
            one.control.begin_stop();
        }
        for one in &ending {
            one.ended.cancelled().await;
        }
        Ok(())
    }

    /// Starts a consumer of a source.
    ///
    /// # Errors
    /// As [`MessagingHub::consume`].
    pub async fn consume_from(
        &self,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        self.consumer_of(source, options, Reading::Raw).await
    }

    async fn consumer_of(
        &self,
        source: &Source,
        options: &SubscribeOptions,
        reading: Reading,
    ) -> Result<Consumer> {
        self.check_open()?;
        let route = self.route_of(source.pattern())?;
        let broker = self.broker(route.primary).ok_or_else(|| {
            Error::new(
                ErrorCode::BrokerUnavailable,
                "no broker serves this pattern: plug one in, or turn the fallback on",
            )
            .on(source.pattern().as_str())
        })?;
        if self.0.config.auto_declare == Some(true)
            && broker.is_connected()
            && source.pattern().literal().is_some()
        {
            broker.ensure(source).await?;
        }
        let primary = if self.hands_over(&route, options) {
            self.consume_long(&*broker, source, options).await?
        } else if let Some(left) = self.left_over(&route, source).await {
            self.consume_left_over(left, &*broker, source, options)
                .await?
        } else {
            broker.consume(source, options).await?
        };
        // Who reads for itself keeps positions, which those of resting events are
        // not; and it retries in its own way.
        let primary = match reading {
            Reading::Handler => self.with_resting(primary, source, options).await?,
            Reading::Raw => primary,
        };
        let away = route.primary != BrokerType::InMemory;
        let local = (away && route.spool).then(|| match (source, &options.group_id) {
            (Source::Queue(_), _) if local_of(&route) == Hands::Consumers => {
                Some((None, usize::from(options.prefetch).max(1)))
            }
            (Source::Stream(pattern), Some(group)) if self.has_local_events(pattern) => Some((
                Some(Arc::from(group.as_str())),
                options.max_poll_records.max(1),
            )),
            // Reading along takes nothing from anybody.
            (Source::Stream(_), None) => Some((None, 0)),
            _ => None,
        });
        let local = local.flatten().map(|(group, limit)| {
            Local::register(
                &self.0.readers,
                self.number(),
                source.pattern().clone(),
                group,
                limit,
                options.buffer_size,
            )
        });
        let group = self.group(source, options);
        let (consumer, task) = span::start(span::Parts {
            primary,
            connection: broker.connection(),
            local,
            group,
            closing: self.0.closing.clone(),
            buffer: options.buffer_size,
            most: self.0.max_message_bytes,
            recorder: self.0.recorder.clone(),
            topology: self.0.topology.clone(),
            rests: resting::is_resting(source.pattern().as_str()),
            #[cfg(feature = "schema")]
            checks: self.checks(),
        });
        self.0.tasks.spawn(task);
        Ok(consumer)
    }

    async fn start(
        &self,
        source: Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        let since = Instant::now();
        let id = options
            .consumer_tag
            .clone()
            .unwrap_or_else(|| format!("hub-{}", self.number()));
        let consumer = self
            .consumer_of(&source, &options, Reading::Handler)
            .await
            .inspect_err(|_| self.0.recorder.subscribe_errors.inc())?;
        let control = consumer.control.clone();
        let mut settings = DispatchSettings::new(&source, &options, &self.0.recorder);
        if options.retry_delay.is_none() {
            settings.retry_delays = self.retry_delays(&source);
        }
        let give_up = settings.give_up.clone();
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        let task = self.0.tasks.spawn(async move {
            let _ended = guard;
            dispatch::run(consumer, handler, settings).await;
        });
        self.remember(Running {
            pattern: source.pattern().clone(),
            control: control.clone(),
            give_up,
            ended,
        });
        self.0.recorder.subscribe_latency.record(since.elapsed());
        Ok(Subscription::new(
            id,
            source.pattern().clone(),
            vec![control],
            vec![task],
        ))
    }

    pub(super) fn remember(&self, running: Running) {
        let mut all = lock(&self.0.subscriptions);
        all.retain(|r| !r.ended.is_cancelled());
        all.push(running);
    }

    /// How long failed tasks of a queue rest.
    #[cfg(feature = "server")]
    pub(crate) fn task_delays(&self, queue: &crate::topic::Topic) -> Delays {
        self.retry_delays(&Source::Queue(Pattern::from(queue)))
    }

    pub(super) fn retry_delays(&self, source: &Source) -> Delays {
        let retry = &self.0.config.retry;
        if let Ok(Some(delays)) = self.route_of(source.pattern()).map(|r| r.retry_delay) {
            return delays;
        }
        Delays::every(match source {
            Source::Queue(_) => retry.task_delay,
            Source::Stream(_) => retry.event_delay,
        })
    }

    pub(super) fn pattern(&self, text: &str) -> Result<Pattern> {
        Pattern::new(self.0.topology.canonical(text))
    }

    pub(super) fn route_of(&self, pattern: &Pattern) -> Result<Route> {
        lock(&self.0.routes)
            .of_pattern(pattern)
            .map(|(_, r)| r.clone())
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::BrokerUnavailable,
                    "no broker serves this pattern: plug one in, or turn the fallback on",
                )
                .on(pattern.as_str())
            })
    }

    /// Whether groups may get spooled events of some topic that the pattern
    /// covers; each lane knows for itself.
    fn has_local_events(&self, pattern: &Pattern) -> bool {
        let routes = lock(&self.0.routes).clone();
        let local = |route: &Route| local_of(route) == Hands::Groups;
        match pattern.literal() {
            Some(topic) => routes.find(&topic).is_some_and(|(_, route)| local(route)),
            None => routes.all().iter().any(local),
        }
    }

    pub(super) fn source_of(&self, pattern: &Pattern) -> Result<Source> {
        Ok(match self.route_of(pattern)?.kind {
            RouteKind::Task => Source::Queue(pattern.clone()),
            RouteKind::Event => Source::Stream(pattern.clone()),
        })
    }

    /// The group that a consumer deduplicates with: the consumers of a queue
    /// are one, a named group is one, a live reader is its own.
    fn group(&self, source: &Source, options: &SubscribeOptions) -> Arc<Group> {
        let name = match (source, &options.group_id) {
            (Source::Queue(_), _) => "queue:".to_owned(),
            (Source::Stream(_), Some(group)) => format!("{STREAM_GROUP}{group}"),
            (Source::Stream(_), None) => {
                return Arc::new(Group::new(None, &self.0.config.dedup_window));
            }
        };
        let mut groups = lock(&self.0.groups);
        if groups.len() >= MAX_GROUPS {
            // Groups that nobody reads for: a later member starts without their
            // memory, and may see a repeat.
            groups.retain(|_, g| Arc::strong_count(g) > 1);
        }
        if let Some(known) = groups.get(&name) {
            return known.clone();
        }
        let group = Arc::new(self.new_group(&name));
        groups.insert(name, group.clone());
        group
    }
}
