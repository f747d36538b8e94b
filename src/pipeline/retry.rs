//! Retries without giving the message back, by tower's retry and its backoff.
//! Bounded: the delivery is held meanwhile, and what stays broken belongs to the
//! broker's retry or to the circuit breaker.

use std::time::Duration;

use tower::{
    BoxError,
    retry::{
        Policy,
        backoff::{Backoff, ExponentialBackoff, ExponentialBackoffMaker, MakeBackoff},
    },
    util::rng::HasherRng,
};

use super::{fault::may_mend, order::invalid};
use crate::error::Result;

/// How often, and after how long, a handler is called again.
#[derive(Clone, Debug)]
pub struct Retry {
    retries: u32,
    first: Duration,
    longest: Duration,
}

impl Retry {
    /// `retries` more calls (1 to 10) after the first; `first` before the first of
    /// them, doubled each time up to [`Retry::up_to`], and up to half as much
    /// again at random.
    #[must_use]
    pub fn new(retries: u32, first: Duration) -> Self {
        Self {
            retries,
            first,
            longest: LONGEST.min(first.saturating_mul(8)),
        }
    }

    /// The longest wait. Default: eight times the first, at most 10 s.
    #[must_use]
    pub fn up_to(mut self, longest: Duration) -> Self {
        self.longest = longest;
        self
    }

    pub(super) fn policy(&self) -> Result<Again> {
        if !(1..=MOST).contains(&self.retries) {
            return Err(invalid(format!(
                "retry: {} retries asked for, 1 to {MOST} are possible; more belongs to the broker's retry, which does not hold the delivery",
                self.retries
            )));
        }
        if self.longest > LONGEST {
            return Err(invalid(format!(
                "retry: a wait of {} asked for, at most {} is possible; longer waits belong to the broker's retry",
                crate::duration::format(self.longest),
                crate::duration::format(LONGEST)
            )));
        }
        let maker =
            ExponentialBackoffMaker::new(self.first, self.longest, JITTER, HasherRng::new());
        let mut maker = maker.map_err(|e| invalid(format!("retry: {e}")))?;
        Ok(Again {
            left: self.retries,
            backoff: maker.make_backoff(),
        })
    }
}

/// The policy of one call: tower clones it for each.
#[derive(Clone, Debug)]
pub(super) struct Again {
    left: u32,
    backoff: ExponentialBackoff,
}

impl<R: Clone> Policy<R, (), BoxError> for Again {
    type Future = tokio::time::Sleep;

    fn retry(&mut self, _: &mut R, result: &mut Result<(), BoxError>) -> Option<Self::Future> {
        let error = result.as_ref().err()?;
        if self.left == 0 || !may_mend(error) {
            return None;
        }
        self.left -= 1;
        tracing::debug!(%error, left = self.left, "a handler failed and is called again");
        Some(self.backoff.next_backoff())
    }

    fn clone_request(&mut self, input: &R) -> Option<R> {
        Some(input.clone())
    }
}

/// Retries of one call at most.
const MOST: u32 = 10;
/// The longest wait between two.
const LONGEST: Duration = Duration::from_secs(10);
/// Part of a wait that is added at random.
const JITTER: f64 = 0.5;
