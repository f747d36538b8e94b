//! A circuit breaker: after a number of failures in a row what failed is left
//! alone until a probe succeeds or a time has passed. The hub has one for each
//! broker, a [`crate::pipeline`] one for what its handler needs. Pure: time goes
//! in. It counts nobody who waits and lets any number of probes through: who
//! wants only one keeps count of them.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Where a breaker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// What it guards is used.
    Closed,
    /// What it guards is left alone.
    Open,
    /// One attempt is let through; its outcome decides.
    HalfOpen,
}

/// The breaker.
#[derive(Debug)]
pub(crate) struct Breaker {
    threshold: u32,
    timeout: Duration,
    failures: u32,
    open_since: Option<Instant>,
    half_open: bool,
}

impl Breaker {
    pub(crate) fn new(threshold: u32, timeout: Duration) -> Self {
        Self {
            threshold: threshold.max(1),
            timeout,
            failures: 0,
            open_since: None,
            half_open: false,
        }
    }

    pub(crate) fn state(&self, now: Instant) -> BreakerState {
        match self.open_since {
            None => BreakerState::Closed,
            Some(_) if self.half_open => BreakerState::HalfOpen,
            Some(since) if since + self.timeout <= now => BreakerState::HalfOpen,
            Some(_) => BreakerState::Open,
        }
    }

    /// When an open breaker half-opens by itself; `None` while it is closed.
    pub(crate) fn half_opens_at(&self) -> Option<Instant> {
        self.open_since.map(|since| since + self.timeout)
    }

    /// Whether it may be tried now.
    pub(crate) fn allows(&self, now: Instant) -> bool {
        self.state(now) != BreakerState::Open
    }

    /// An attempt failed.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        if self.failures >= self.threshold || self.half_open {
            self.open_since = Some(now);
            self.half_open = false;
        }
    }

    /// An attempt worked.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.open_since = None;
        self.half_open = false;
    }

    /// A probe, or a new connection, says that the broker answers: half-opens at
    /// once.
    pub(crate) fn probed_well(&mut self) {
        if self.open_since.is_some() {
            self.half_open = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_half_opens_on_a_probe() {
        let now = Instant::now();
        let mut breaker = Breaker::new(3, Duration::from_secs(30));
        for _ in 0..2 {
            breaker.failed(now);
        }
        breaker.succeeded();
        for _ in 0..2 {
            breaker.failed(now);
        }
        assert_eq!(breaker.state(now), BreakerState::Closed);
        assert!(breaker.allows(now));
        breaker.failed(now);
        assert_eq!(breaker.state(now), BreakerState::Open);
        assert!(!breaker.allows(now));
        breaker.probed_well();
        assert_eq!(breaker.state(now), BreakerState::HalfOpen);
        assert!(breaker.allows(now));
        breaker.failed(now);
        assert_eq!(
            breaker.state(now),
            BreakerState::Open,
            "one failure is enough"
        );
        let later = now + Duration::from_secs(30);
        assert_eq!(breaker.state(later), BreakerState::HalfOpen);
        breaker.succeeded();
        assert_eq!(breaker.state(later), BreakerState::Closed);
    }
}
