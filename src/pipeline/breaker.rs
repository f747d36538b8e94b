//! The circuit breaker of a pipeline: a thin shell that waits for what
//! [`super::circuit`] decides. It refuses to fail messages: while it is open none
//! is taken, and what failed for the same cause stays where it is, uncounted.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    circuit::{Admission, Circuit, Pass, Sign},
    order::invalid,
};
use crate::{
    breaker::BreakerState,
    broker::{Blame, HandlerError},
    error::Result,
};

/// Pauses a subscription after failures in a row, and resumes it by one message.
///
/// While it is open the dispatcher starts nothing and takes nothing further. What
/// it holds (a queue's `prefetch`, a stream's `max_poll_records`) stays
/// unsettled: not failed, not retried, not dead-lettered. After `open_for` one
/// message probes; if it fails it is put back uncounted, another goes first next
/// time where order allows, and the circuit stays open for as long again.
///
/// Two things to know. RabbitMQ closes a channel whose delivery is unsettled for
/// longer than its `consumer_timeout` (30 minutes by default), and hands its
/// messages out again. And a message that always fails with an error that
/// counts, alone or the only one of its key, is probed for as long as nothing
/// else succeeds: let a handler say [`HandlerError::reject`] where the message is
/// at fault.
#[derive(Clone)]
pub struct CircuitBreaker {
    failures: u32,
    open_for: Duration,
    counts: Counts,
}

type Counts = Arc<dyn Fn(&HandlerError) -> bool + Send + Sync>;

impl CircuitBreaker {
    /// Opens after `failures` in a row, for `open_for`; both above zero.
    ///
    /// By default every failure counts that another attempt may mend, time-outs
    /// included. A panic does not: it is a fault of the handler or the message.
    #[must_use]
    pub fn new(failures: u32, open_for: Duration) -> Self {
        Self {
            failures,
            open_for,
            counts: Arc::new(|e| e.retryable && e.reason != HandlerError::PANIC),
        }
    }

    /// Sets which errors are those of what the handler needs. Others say nothing
    /// about it, and take their ordinary course.
    #[must_use]
    pub fn counting(
        mut self,
        counts: impl Fn(&HandlerError) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.counts = Arc::new(counts);
        self
    }

    pub(super) fn gate(self) -> Result<Gate> {
        if self.failures == 0 || self.open_for.is_zero() {
            return Err(invalid(
                "circuit_breaker: the failures in a row and the time it stays open must be above zero"
                    .to_owned(),
            ));
        }
        Ok(Gate(Arc::new(Inner {
            circuit: Mutex::new(Circuit::new(self.failures, self.open_for)),
            changed: watch::Sender::new(()),
            counts: self.counts,
        })))
    }
}

impl fmt::Debug for CircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreaker")
            .field("failures", &self.failures)
            .field("open_for", &self.open_for)
            .finish_non_exhaustive()
    }
}

/// A breaker that runs; clones are the same one.
#[derive(Clone)]
pub(super) struct Gate(Arc<Inner>);

struct Inner {
    circuit: Mutex<Circuit>,
    /// Told after each end of a call that others may wait for.
    changed: watch::Sender<()>,
    counts: Counts,
}

impl Gate {
    pub(super) fn state(&self) -> BreakerState {
        self.circuit().state(now())
    }

    /// Waits until a call may go. Dropped before, nothing is reserved.
    pub(super) async fn admit(&self) -> Permit {
        // Subscribed before the first look, so that no change is missed.
        let mut changed = self.0.changed.subscribe();
        loop {
            let admission = self.circuit().admit(now());
            match admission {
                Admission::Go(pass) => {
                    return Permit {
                        gate: self.clone(),
                        pass: Some(pass),
                    };
                }
                Admission::At(at) => tokio::select! {
                    () = sleep_until(Instant::from_std(at)) => {}
                    _ = changed.changed() => {}
                },
                // The sender is in `self`, so this is never an error.
                Admission::AfterProbe => {
                    let _ = changed.changed().await;
                }
            }
        }
    }

    fn end(&self, pass: Pass, sign: Sign) -> Blame {
        let (before, blame, after) = {
            let mut circuit = self.circuit();
            let before = circuit.state(now());
            let blame = circuit.end(now(), pass, sign);
            (before, blame, circuit.state(now()))
        };
        match (before, after) {
            (BreakerState::Closed, BreakerState::Open) => tracing::warn!(
                "a handler failed too often in a row; its subscription is paused, and nothing is failed meanwhile"
            ),
            (BreakerState::HalfOpen, BreakerState::Open) => {
                tracing::warn!("the probe of a paused subscription failed; it stays paused");
            }
            (BreakerState::HalfOpen, BreakerState::Closed) => {
                tracing::info!("the probe of a paused subscription worked; it goes on");
            }
            _ => {}
        }
        self.0.changed.send_replace(());
        blame
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.0
            .circuit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leave for one call. Dropped without a verdict it says nothing, and a probe's
/// place is free again.
pub(super) struct Permit {
    gate: Gate,
    pass: Option<Pass>,
}

impl Permit {
    /// Whether the circuit still is as it was when the permit was given.
    pub(super) fn holds(&self) -> bool {
        self.pass.is_some_and(|p| self.gate.circuit().holds(p))
    }

    pub(super) fn judge(mut self, result: &Result<(), HandlerError>) -> Blame {
        let sign = match result {
            Ok(()) => Sign::Works,
            Err(error) if (self.gate.0.counts)(error) => Sign::Broken,
            Err(_) => Sign::None,
        };
        match self.pass.take() {
            Some(pass) => self.gate.end(pass, sign),
            None => Blame::Message,
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(pass) = self.pass.take() {
            self.gate.end(pass, Sign::None);
        }
    }
}

/// The runtime's time, which tests can stop.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}
