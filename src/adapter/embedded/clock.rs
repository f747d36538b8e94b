//! The broker's clock: wall time that follows tokio's clock, so that paused
//! tests can move it.

use tokio::time::Instant;

use crate::message::Timestamp;

/// Wall time anchored to a monotonic instant.
#[derive(Debug)]
pub(super) struct Clock {
    wall: Timestamp,
    instant: Instant,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            wall: Timestamp::now(),
            instant: Instant::now(),
        }
    }

    /// Now. The later of both clocks: a machine that slept has a monotonic
    /// clock that lags, and a clock that was set back must not keep messages
    /// alive for longer than they asked.
    pub(super) fn now(&self) -> Timestamp {
        (self.wall + self.instant.elapsed()).max(Timestamp::now())
    }
}
