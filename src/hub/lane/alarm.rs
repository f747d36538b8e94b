//! The timer of a lane's loop. It says when something may be due, and refuses
//! to know what.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

/// A timer that is set again only for an earlier deadline. Most turns move the
/// deadline a little later; ringing once too early costs less than telling the
/// runtime each time.
pub(super) struct Alarm {
    sleep: Pin<Box<tokio::time::Sleep>>,
    /// Rings at the deadline of its sleep.
    armed: bool,
}

impl Alarm {
    pub(super) fn new() -> Self {
        Self {
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
            armed: false,
        }
    }

    /// Ends at the deadline, or at an earlier one that was asked for before.
    ///
    /// Cancel safe.
    pub(super) async fn until(&mut self, deadline: Option<Instant>) {
        let Some(deadline) = deadline.map(tokio::time::Instant::from_std) else {
            return std::future::pending().await;
        };
        if !self.armed || deadline < self.sleep.deadline() {
            self.sleep.as_mut().reset(deadline);
            self.armed = true;
        }
        self.sleep.as_mut().await;
        self.armed = false;
    }
}
