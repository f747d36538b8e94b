//! Health by probing: each broker is asked at an interval whether it works, and
//! its breaker hears the answer. What a connection believes of itself is not
//! asked; that is how a broker was once called healthy while it was dead.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    breaker::{Breaker, BreakerState},
    lock,
};
use crate::{
    broker::MessageBroker,
    error::{Error, ErrorCode},
    message::Timestamp,
};

/// What is known of one broker's health.
pub(crate) struct Health {
    breaker: Mutex<Breaker>,
    last: Mutex<Option<(Timestamp, Option<String>)>>,
    /// Rung when the breaker may let something through again.
    pub(crate) changed: Notify,
}

/// How long a probe may take before it counts as failed.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// How soon a broker that failed a probe is asked again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl Health {
    pub(crate) fn new(breaker: Breaker) -> Self {
        Self {
            breaker: Mutex::new(breaker),
            last: Mutex::new(None),
            changed: Notify::new(),
        }
    }

    pub(crate) fn state(&self) -> BreakerState {
        lock(&self.breaker).state(now())
    }

    /// When it was asked last and what it answered, if that was an error.
    pub(crate) fn last(&self) -> Option<(Timestamp, Option<String>)> {
        lock(&self.last).clone()
    }

    /// Whether the broker may be tried.
    ///
    /// # Errors
    /// `BROKER_UNAVAILABLE` while the breaker is open.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if lock(&self.breaker).allows(now()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::BrokerUnavailable,
            "the breaker is open after repeated failures; it half-opens when a probe succeeds",
        ))
    }

    fn failed(&self) {
        lock(&self.breaker).failed(now());
    }

    pub(crate) fn succeeded(&self) {
        lock(&self.breaker).succeeded();
    }

    /// The broker has connected again, or answered a probe.
    pub(crate) fn answers(&self) {
        lock(&self.breaker).probed_well();
        self.changed.notify_waiters();
    }
}

/// Probes one broker until no lane needs it any more.
pub(crate) async fn probe(
    broker: Arc<dyn MessageBroker>,
    health: Arc<Health>,
    interval: Duration,
    over: CancellationToken,
) {
    let mut connection = broker.connection();
    let mut wait = Duration::ZERO;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = connection.changed() => {
                if changed.is_err() {
                    return;
                }
                // A new connection is as good as a probe, and comes first.
                if connection.borrow_and_update().connected {
                    health.answers();
                }
                wait = Duration::ZERO;
                continue;
            }
            () = over.cancelled() => return,
        }
        let answer = tokio::select! {
            answer = tokio::time::timeout(PROBE_TIMEOUT, broker.health_check()) => answer,
            () = over.cancelled() => return,
        };
        let error = match answer {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer to a health probe within 5 s".to_owned()),
        };
        // While something is wrong it is asked often, so that a broker which
        // works again is not left alone for a whole interval.
        wait = if error.is_some() {
            interval.min(RETRY_INTERVAL)
        } else {
            interval
        };
        match &error {
            None => health.answers(),
            Some(error) => {
                tracing::debug!(broker = %broker.broker_type(), error, "a health probe failed");
                health.failed();
            }
        }
        *lock(&health.last) = Some((Timestamp::now(), error));
    }
}

fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}
