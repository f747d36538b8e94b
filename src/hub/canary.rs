//! A canary for a route: a small message of the hub's own, sent through the
//! route's primary at an interval and waited for at the other end. It shows that
//! what is published there also comes out, which no probe of the connection and
//! no confirm can. It refuses to touch what users read: its topic is its own, and
//! it neither goes through the spool nor counts as traffic of the route.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{pending, route::RouteKind};
use crate::{
    broker::{
        BrokerType, Consumer, Delivery, MessageBroker, PublishOptions, Receipt, Source,
        SubscribeOptions,
    },
    config::CanarySettings,
    error::Result,
    message::{Message, Timestamp},
    topic::{Pattern, Topic},
};

/// How a route's canary does.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CanaryState {
    /// Whether the last one came back in time; none before the first.
    pub well: Option<bool>,
    /// How long the last one that came back took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<f64>,
    /// When one came back last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_well: Option<Timestamp>,
    /// How many did not come back in time.
    pub failures: u64,
    /// Why the last one did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Which canary is on its way, and when the next one leaves. Pure.
#[derive(Debug)]
struct Flight {
    every: Duration,
    within: Duration,
    next: Instant,
    number: u64,
    /// The one that is out, since when.
    out: Option<Instant>,
    /// What the broker said of the one that is out, if that was an error.
    refused: Option<String>,
    state: CanaryState,
}

impl Flight {
    fn new(now: Instant, settings: &CanarySettings) -> Self {
        Self {
            every: settings.every,
            within: settings.within,
            next: now,
            number: 0,
            out: None,
            refused: None,
            state: CanaryState::default(),
        }
    }

    /// When `step` is due.
    fn due(&self) -> Instant {
        match self.out {
            Some(since) => since + self.within,
            None => self.next,
        }
    }

    /// Gives up on one that is late, or says which to send.
    fn step(&mut self, now: Instant) -> Option<u64> {
        if let Some(since) = self.out {
            if since + self.within > now {
                return None;
            }
            self.out = None;
            self.state.well = Some(false);
            self.state.failures += 1;
            let late = || format!("it did not come back within {:?}", self.within);
            self.state.reason = Some(self.refused.take().unwrap_or_else(late));
        }
        if self.next > now {
            return None;
        }
        self.next = now + self.every;
        self.number += 1;
        self.out = Some(now);
        self.refused = None;
        Some(self.number)
    }

    /// The broker would not take it. It is still waited for: an outcome that is
    /// unknown may come back yet.
    fn refused(&mut self, number: u64, why: String) {
        if number == self.number {
            self.refused = Some(why);
        }
    }

    /// One came back. An older one says nothing of now.
    fn seen(&mut self, now: Instant, wall: Timestamp, number: u64) {
        if number != self.number {
            return;
        }
        if let Some(since) = self.out.take() {
            self.state.well = Some(true);
            self.state.latency_ms = Some((now - since).as_secs_f64() * 1000.0);
            self.state.last_well = Some(wall);
            self.state.reason = None;
        }
    }
}

/// Where a canary flies.
pub(super) struct Parts {
    pub(super) route: String,
    pub(super) kind: RouteKind,
    pub(super) broker: Arc<dyn MessageBroker>,
    pub(super) settings: CanarySettings,
    pub(super) state: watch::Sender<CanaryState>,
    pub(super) closing: CancellationToken,
}

/// Sends canaries until the hub closes.
pub(super) async fn fly(parts: Parts) {
    let instance = uuid::Uuid::now_v7().simple().to_string();
    let topic = match parts.perch(&instance) {
        Ok(topic) => topic,
        Err(error) => {
            parts.fail(error.to_string());
            return;
        }
    };
    let (source, options) = parts.reader(&topic);
    let mut flight = Flight::new(now(), &parts.settings);
    let mut consumer: Option<Consumer> = None;
    let mut sending: Option<BoxFuture<'_, (u64, Result<Receipt>)>> = None;
    // A reader makes its own queue; a stream must be there.
    let mut missing = matches!(source, Source::Stream(_));
    loop {
        parts.show(&flight);
        if consumer.is_none() {
            // Without a reader nothing comes back, and that is what is shown.
            consumer = tokio::select! {
                made = parts.broker.consume(&source, &options) => match made {
                    Ok(consumer) => Some(consumer),
                    Err(error) => {
                        flight.refused(flight.number, error.to_string());
                        None
                    }
                },
                () = parts.closing.cancelled() => break,
            };
        }
        tokio::select! {
            () = parts.closing.cancelled() => break,
            () = tokio::time::sleep_until(flight.due().into()) => {
                if let Some(number) = flight.step(now()) {
                    let make = missing.then_some(&source);
                    sending = Some(Box::pin(parts.send(make, &topic, &instance, number)));
                }
            }
            (number, outcome) = pending(&mut sending) => {
                sending = None;
                match outcome {
                    Ok(_) => missing = false,
                    Err(error) => flight.refused(number, error.to_string()),
                }
            }
            batch = receive(&mut consumer) => match batch {
                Some(batch) => {
                    for delivery in batch {
                        if let Some(number) = number_of(&delivery, &instance) {
                            flight.seen(now(), Timestamp::now(), number);
                        }
                        delivery.settle_now(crate::broker::Verdict::Ack);
                    }
                }
                None => consumer = None,
            },
        }
    }
    if let Some(consumer) = consumer {
        consumer.control.stop().await;
    }
}

impl Parts {
    /// Queues hand each message to one of their readers, so every hub has a
    /// queue of its own; of a stream everybody reads all.
    fn perch(&self, instance: &str) -> Result<Topic> {
        if self.has_queue() {
            Topic::new(format!("{}.{instance}", self.settings.topic))
        } else {
            Topic::new(self.settings.topic.as_str())
        }
    }

    fn has_queue(&self) -> bool {
        self.kind == RouteKind::Task && self.broker.broker_type() == BrokerType::RabbitMq
    }

    fn reader(&self, topic: &Topic) -> (Source, SubscribeOptions) {
        let pattern = Pattern::from(topic);
        if !self.has_queue() {
            return (Source::Stream(pattern), SubscribeOptions::default());
        }
        let ms = |d: Duration| d.as_millis().to_string();
        // Made for this reader, again whenever it subscribes; gone some time after
        // the hub is.
        let queue_arguments = BTreeMap::from([
            ("x-expires".to_owned(), ms(LINGER)),
            (
                "x-message-ttl".to_owned(),
                ms(self.settings.within.max(Duration::from_millis(1))),
            ),
        ]);
        let options = SubscribeOptions {
            queue_arguments,
            ..SubscribeOptions::default()
        };
        (Source::Queue(pattern), options)
    }

    async fn send(
        &self,
        make: Option<&Source>,
        topic: &Topic,
        instance: &str,
        number: u64,
    ) -> (u64, Result<Receipt>) {
        if let Some(source) = make
            && let Err(error) = self.broker.ensure(source).await
        {
            return (number, Err(error));
        }
        let message = Message::new(TYPE, number.to_string()).with_correlation_id(instance);
        let options = PublishOptions {
            timeout: self.settings.within,
            ..PublishOptions::default()
        };
        let outcome = self.broker.publish(topic, message, &options).await;
        (number, outcome)
    }

    fn show(&self, flight: &Flight) {
        let before = self.state.borrow().well;
        self.state.send_if_modified(|shown| {
            let new = *shown != flight.state;
            shown.clone_from(&flight.state);
            new
        });
        let route = &self.route;
        match (before, flight.state.well) {
            (Some(false), Some(true)) => tracing::info!(route, "the canary comes back again"),
            (None | Some(true), Some(false)) => {
                let why = flight.state.reason.as_deref().unwrap_or_default();
                tracing::warn!(route, why, "the canary did not come back");
            }
            _ => {}
        }
    }

    fn fail(&self, why: String) {
        tracing::error!(route = self.route, why, "the canary cannot fly");
        self.state.send_modify(|s| {
            s.well = Some(false);
            s.reason = Some(why);
        });
    }
}

fn number_of(delivery: &Delivery, instance: &str) -> Option<u64> {
    if delivery.message.correlation_id.as_deref() != Some(instance) {
        return None;
    }
    std::str::from_utf8(&delivery.message.payload)
        .ok()?
        .parse()
        .ok()
}

async fn receive(consumer: &mut Option<Consumer>) -> Option<Vec<Delivery>> {
    match consumer {
        Some(consumer) => consumer.deliveries.recv().await,
        // Tried again with the next step.
        None => std::future::pending().await,
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The type of a canary's messages.
const TYPE: &str = "hub.canary";

/// How long a canary's queue outlives the hub that read it.
const LINGER: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> CanarySettings {
        CanarySettings {
            topic: Topic::new("tasks.canary").unwrap(),
            every: Duration::from_secs(30),
            within: Duration::from_secs(5),
        }
    }

    #[test]
    fn one_that_comes_back_in_time_is_well_and_the_next_leaves_at_the_interval() {
        let start = Instant::now();
        let wall = Timestamp::from_millis(7);
        let mut flight = Flight::new(start, &settings());
        assert_eq!(flight.step(start), Some(1));
        flight.seen(start + Duration::from_millis(20), wall, 1);
        assert_eq!(flight.state.well, Some(true));
        assert_eq!(flight.state.latency_ms, Some(20.0));
        assert_eq!(flight.state.last_well, Some(wall));
        assert_eq!(flight.due(), start + Duration::from_secs(30));
        assert_eq!(flight.step(flight.due()), Some(2));
    }

    #[test]
    fn one_that_is_late_has_failed_with_the_brokers_reason_and_counts_no_more() {
        let start = Instant::now();
        let wall = Timestamp::from_millis(7);
        let mut flight = Flight::new(start, &settings());
        assert_eq!(flight.step(start), Some(1));
        let late = flight.due();
        assert_eq!(flight.step(late), None);
        assert_eq!(flight.state.well, Some(false));
        assert!(flight.state.reason.as_deref().unwrap().contains("5s"));
        flight.seen(late, wall, 1);
        assert_eq!(flight.state.well, Some(false), "it was given up");
        assert_eq!(flight.step(flight.due()), Some(2));
        flight.refused(2, "away".to_owned());
        flight.seen(flight.due(), wall, 1);
        assert_eq!(flight.step(flight.due()), None);
        assert_eq!(flight.state.reason.as_deref(), Some("away"));
        assert_eq!(flight.state.failures, 2);
        assert_eq!(flight.step(flight.due()), Some(3));
        flight.seen(flight.due(), wall, 3);
        assert_eq!(flight.state.well, Some(true));
        assert_eq!(
            (flight.state.failures, flight.state.reason.clone()),
            (2, None)
        );
    }

    #[test]
    fn a_time_limit_longer_than_the_interval_never_has_two_in_the_air() {
        let start = Instant::now();
        let slow = CanarySettings {
            within: Duration::from_secs(60),
            ..settings()
        };
        let mut flight = Flight::new(start, &slow);
        assert_eq!(flight.step(start), Some(1));
        assert_eq!(flight.step(start + Duration::from_secs(30)), None);
        assert_eq!(flight.step(start + Duration::from_secs(60)), Some(2));
    }
}
