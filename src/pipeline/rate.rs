//! How fast messages may be started: tower's rate limit, shared by all that use
//! the handler. It counts what is started, not attempts.

use std::{
    convert::Infallible,
    future::{Ready, poll_fn, ready},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Semaphore;
use tower::{
    Service,
    limit::rate::{Rate, RateLimit},
    util::ServiceFn,
};

/// The limit.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Rate,
    /// Tower's limit wakes only the last that waits, so one waits there at a
    /// time, and the others, in turn, here.
    turnstile: Semaphore,
    /// Made at the first use: its timer needs a runtime.
    limit: Mutex<Option<RateLimit<Grant>>>,
}

type Grant = ServiceFn<fn(()) -> Ready<Result<(), Infallible>>>;

impl Pace {
    /// Both must be above zero, or tower panics; the caller has checked it.
    pub(super) fn new(messages: u64, per: Duration) -> Self {
        Self {
            rate: Rate::new(messages, per),
            turnstile: Semaphore::new(1),
            limit: Mutex::new(None),
        }
    }

    /// Waits until one more may be started, and counts it. Dropped before,
    /// nothing is counted.
    pub(super) async fn wait(&self) {
        // Never closed, so never an error.
        let _turn = self.turnstile.acquire().await;
        poll_fn(|cx| {
            let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = limit.get_or_insert_with(|| {
                let grant: fn(()) -> Ready<Result<(), Infallible>> = |()| ready(Ok(()));
                RateLimit::new(tower::service_fn(grant), self.rate)
            });
            let ready = limit.poll_ready(cx);
            if ready.is_ready() {
                let Ok(()) = limit.call(()).into_inner();
            }
            ready.map(|_| ())
        })
        .await;
    }
}
